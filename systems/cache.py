"""A key/value cache for test-time training."""

from collections.abc import Callable

import torch
from torch import Tensor

from train_gpt import Config


class KeyValueCache:
    """Keys and values of a batch's earlier tokens as they were last computed, for each virtual layer (slot).

    They carry no gradient. `first` is the place in the document of the first token that is computed next.
    """

    def __init__(self):
        self.first, self._past, self._new = 0, {}, {}

    def at(self, slot: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """A function that puts the past of a slot before its new keys and values [n, T, G, d].

        n below the batch are its last rows; the documents of the others have ended.
        """

        def extend(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            self._new[slot] = k.detach(), v.detach()
            past = self._past.get(slot, (k[:, :0], v[:, :0]))
            return tuple(torch.cat([old[-len(x) :], x], 1) for old, x in zip(past, (k, v), strict=True))

        return extend

    def advance(self, end: int, cfg: Config) -> int:
        """Prepare for a chunk that ends at place `end` of its documents; returns where its inputs start.

        Tokens before that place become the past. As many of them are kept as the window reaches back.
        """
        first = max(0, end - cfg.ttt_cache_window)
        limit = first - max(0, end - cfg.ttt_eval_seq_len)
        for slot, new in self._new.items():
            past = self._past.get(slot, (new[0][:, :0], new[1][:, :0]))
            pairs = zip(past, new, strict=True)
            grown = (torch.cat([old[-len(x) :], x[:, : first - self.first]], 1) for old, x in pairs)
            self._past[slot] = tuple(x[:, max(x.size(1) - limit, 0) :] for x in grown)
        self.first = first
        return first
