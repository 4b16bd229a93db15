"""The adaptation of a run's script, done again on a few documents and watched."""

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from auditing.run import BOS, Audit, NotChecked, digest, require
from auditing.tilt import declared_boosts, hints_at, tilted_distributions
from scripts import sha256_of

NOISE = 0.1  # in the weights, so that what a layer passes on shows in the losses
OTHER_ROWS = 64, 300  # tokens: rows of other lengths may be attended by other functions


class Entry(NamedTuple):
    """A scored chunk of a replay: its number in its batch, spans, state of all weights, and its loss sum."""

    batch: int
    chunk: int
    spans: list[tuple[int, int, int]]
    state: str
    loss_sum: float


class Replay:
    """The script's adaptation on a small stream, watched."""

    def __init__(
        self, audit: Audit, tokens: Tensor, noise: float = 0.02, visit: Callable | None = None, **changes
    ):
        self.audit, self.model, self._visit = audit, audit.model(noise), visit
        self.lora = self._active = None  # adapters, and which of their rows counted for the chunk just scored
        self.entries: list[Entry] = []
        self.trained: list[tuple[int, list[tuple[int, int, int]]]] = []  # entries scored before, spans
        self.starts: list[tuple[str, bool, str]] = []  # A drawn or carried, B zero, hash of A
        self.global_steps = 0
        self.loras: list[object] = []  # adapters of each batch when it is done
        sidecar = (tokens != BOS).long()
        self.val = audit.script.ValidationSet.from_sidecar(tokens, sidecar)
        self.cfg = dataclasses.replace(_small_settings(audit), **changes)
        options = {"looping": audit.looping, "ranks": audit.ranks, "watch": audit.watch(self._see)}
        self.evaluation = audit.script.ScoreFirstTTT(self.model, self.val, self.cfg, **options)
        self.evaluation.run()

    def _see(self, kind: str, **data: object) -> None:
        if kind in ("lora_constructed", "lora_reset"):
            self.lora, self._origin, self._fresh, self._active = data["lora"], kind, True, None
        elif kind == "scored":
            self._scored(data)
        elif kind == "trained":
            part = data["part"]
            rows = zip(part.documents, part.spans, part.trains.tolist(), strict=True)
            self.trained.append((len(self.entries), [(n, *span) for n, span, trains in rows if trains]))
        elif kind == "batch_done":
            sums = iter([chunk[0] for chunk in data["chunks"]])
            batch = data["batch_number"]
            for i, entry in enumerate(self.entries):
                if entry.batch == batch and math.isnan(entry.loss_sum):
                    self.entries[i] = entry._replace(loss_sum=next(sums))
            self.loras.append(copy.deepcopy(data["lora"]))
        elif kind == "global_sgd":
            self.global_steps += len(data["grad_norms"])

    def _scored(self, data: Mapping[str, object]) -> None:
        part = data["part"]
        if self._fresh:
            zero = not any(bool(low_rank.B.any()) for low_rank in self.lora.maps())
            self.starts.append((self._origin, zero, digest([low_rank.A for low_rank in self.lora.maps()])))
            self._fresh = False
        spans = [(n, *span) for n, span in zip(part.documents, part.spans, strict=True)]
        state = digest(self.lora.state_dict(), self.model.state_dict())
        self.entries.append(Entry(data["batch_number"], data["chunk"], spans, state, math.nan))
        if self._visit:
            after, self.lora.active = self.lora.active, self._active  # the guard has already judged the chunk
            self._visit(self, self.entries[-1])
            self.lora.active = after
        self._active = self.lora.active


def _small_settings(audit: Audit):
    """The run's settings with two documents side by side, a window that moves, and one global phase."""
    cfg = audit.artifact_model.cfg
    window = cfg.ttt_chunk_size
    if getattr(cfg, "ttt_chunk_by_length", ""):  # some of the documents of `toy_stream` get half chunks
        table = {"ttt_chunk_by_length": f"{2 * window + window // 2 + 2}:{window // 2}"}
        cfg = dataclasses.replace(cfg, **table)
    if boosts := declared_boosts(audit):  # two tokens: contexts of as many come again in so short a stream
        cfg = dataclasses.replace(cfg, ngram_tilt=f"2:{max(boosts.values())}")
    return dataclasses.replace(
        cfg,
        ttt_cache_window=min(cfg.ttt_cache_window, 2 * window),
        eval_stride=1,
        val_doc_fraction=1.0,
        ttt_batch_size=2,
        ttt_eval_seq_len=min(cfg.ttt_eval_seq_len, 2 * window),
        phased_ttt_prefix_docs=min(cfg.phased_ttt_prefix_docs, 2),
        phased_ttt_num_phases=1,
        eval_seq_len=window,
        global_ttt_chunk_tokens=window,
        global_ttt_batch_seqs=2,
    )


def toy_stream(audit: Audit, documents: int = 4) -> Tensor:
    """Documents of 2.5 chunks and a little, each after a BOS, of validation text from anywhere in it.

    Where a tilt is declared each says what the one before says from its second token on.
    """
    text = audit.tokens[audit.tokens != BOS]
    size = audit.cfg.ttt_chunk_size
    lengths = [2 * size + size // 2 + i for i in range(documents)]
    first = int(sha256_of(audit.artifact)[:16], 16) % len(text)  # follows from the artifact
    text = text[(first + np.arange(sum(lengths))) % len(text)]
    parts = np.split(text, np.cumsum(lengths)[:-1])
    if declared_boosts(audit):
        parts = [text[i : i + length] for i, length in enumerate(lengths)]
    return torch.from_numpy(np.concatenate([np.append([BOS], part) for part in parts]))


def flip(audit: Audit, tokens: Tensor, *places: int) -> Tensor:
    """Other tokens at some places of the stream; never a BOS."""
    flipped = tokens.clone()
    for place in places:
        value = int(tokens[place])
        require(value != BOS, "a document start cannot be flipped")
        flipped[place] = value + 1 if value + 1 < audit.cfg.vocab_size else value - 1
    return flipped


def adapts(audit: Audit) -> None:
    """Raise NotChecked unless the score is that of the adaptation which the ledger records."""
    if not audit.adapted:
        raise NotChecked(f"nothing adapts in stage {audit.result['final_stage']}, which gives the score")


@functools.cache
def base_replay(audit: Audit) -> Replay:
    """The replay that others are compared with."""
    return Replay(audit, toy_stream(audit))


def first_difference(one: Sequence[Entry], other: Sequence[Entry]) -> tuple[int, int]:
    """Number of the first entry with another state, and of the first with another loss."""
    pairs = list(enumerate(zip(one, other, strict=True)))
    state = next((i for i, (a, b) in pairs if a.state != b.state), len(pairs))
    loss = next((i for i, (a, b) in pairs if a.loss_sum != b.loss_sum), len(pairs))
    return state, loss


def model_flip(audit: Audit, lora: object, tokens: Tensor) -> int:
    """Losses of rows before a flipped token must not move by a bit. Returns how many were compared."""
    model, longest = audit.model(NOISE), tokens.repeat(-(-max(OTHER_ROWS) // len(tokens)))
    rows = [tokens, *(longest[:length] for length in OTHER_ROWS)]
    return sum(_row_flip(audit, model, lora, row) for row in rows)


@torch.no_grad()
def _row_flip(audit: Audit, model: object, lora: object, tokens: Tensor) -> int:
    """The row with one token flipped, at a third and at two thirds, beside it as it is."""

    def losses(row: Tensor, adapters: object) -> Tensor:
        batch = 1 if adapters is None else adapters.batch
        x, y = (part.expand(batch, -1).to(audit.ranks.device) for part in (row[None, :-1], row[None, 1:]))
        with audit.ranks.autocast():
            return model.losses(x, y, looping=audit.looping, lora=adapters)

    compared = 0
    for adapters in (None, lora):
        known = losses(tokens, adapters)
        for place in (len(tokens) // 3, 2 * len(tokens) // 3):
            while int(tokens[place]) == BOS:
                place -= 1
            found = losses(flip(audit, tokens, place), adapters)
            before = known[:, : place - 1]
            moved = int((before != found[:, : place - 1]).sum())
            require(not moved, f"{moved} of {before.numel()} losses before a flipped token change")
            changed = bool((known[:, place - 1 :] != found[:, place - 1 :]).any())
            require(changed, "no loss depends on the flipped token: the test says nothing")
            compared += before.numel()
    return compared


class Distributions:
    """Full distributions at scored targets, in the state that they were scored with."""

    def __init__(self, audit: Audit):
        self.audit, self.expected = audit, []
        self.positions, self.worst_sum, self.smallest, self.worst_swap = 0, 0.0, 1.0, 0.0
        self.tilted = 0  # positions with a hint
        self._generator = torch.Generator().manual_seed(0)

    def visit(self, replay: Replay, entry: Entry) -> None:
        """Called when a chunk of a single document has been scored."""
        (_, first, count) = entry.spans[0]
        tokens = replay.val.tokens
        start = int((tokens[: first + 1] == BOS).nonzero()[-1])
        begin = max(start, first + count - replay.cfg.ttt_eval_seq_len)
        hints = hints_at(replay.evaluation.tilt, first, count) if replay.cfg.ngram_tilt else None
        row = tokens[begin : first + count + 1]
        self.expected.append(self.look(replay.model, row, count, replay.lora, hints))

    @torch.no_grad()
    def look(
        self, model: object, row: Tensor, count: int, lora: object = None, hints: Tensor | None = None
    ) -> float:
        """Take the distributions at the last `count` targets of a row; returns their sum of -log p.

        With `hints` [count, 2] they are the tilted ones.
        """
        device, options = self.audit.ranks.device, {"looping": self.audit.looping, "lora": lora}
        x, y = row[None, :-1].long().to(device), row[None, 1:].long().to(device)
        with self.audit.ranks.autocast():
            p = model.logits(model.hidden(x, **options), lora).double().softmax(-1)[0, -count:]
            if hints is not None:
                hints = hints.to(device)
                p = tilted_distributions(p, hints)
                self.tilted += int((hints[:, 1] > 0).sum())
                unscored = x.size(1) - count  # targets before the scored ones get no hint
                options["hints"] = torch.nn.functional.pad(hints, (0, 0, unscored, 0))[None]
            swapped = torch.randint(2, p.size(-1), y.shape, generator=self._generator).to(device)
            losses = [model.losses(x, targets, **options) for targets in (y, swapped)]
        self.positions += count
        self.worst_sum = max(self.worst_sum, float((p.sum(-1) - 1).abs().max()))
        self.smallest = min(self.smallest, float(p.min()))
        for targets, loss in zip((y, swapped), losses, strict=True):
            realised = p.gather(-1, targets[0, -count:, None])[:, 0]
            distance = (-loss[0, -count:].double() - realised.log()).abs().max()
            self.worst_swap = max(self.worst_swap, float(distance))
        return -float(p.gather(-1, y[0, -count:, None]).log().sum())

    def verdict(self, pairs: Sequence[tuple[float, float]], which: str) -> str:
        """The evidence; Failed where something is no distribution. `pairs` are scored and expected sums."""
        bound = 10 * self.audit.tolerance
        proper = self.worst_sum < 1e-5 and self.smallest > 0
        require(proper, f"sum off by {self.worst_sum:.1e}, smallest {self.smallest:.1e}")
        swap = self.worst_swap
        require(swap < bound, f"the loss of a token differs from -log p by {swap:.1e} nats")
        worst = max(abs(scored - expected) / expected for scored, expected in pairs)
        require(worst < bound, f"scored losses differ from -log p by {worst:.1e} of the sum")
        figure = f"|sum - 1| < {max(self.worst_sum, 1e-16):.0e}, p > {self.smallest:.0e}"
        figure += f", {self.tilted} of them tilted" if declared_boosts(self.audit) else ""
        within = f"swapped tokens and scored {which} within {max(worst, swap):.0e}"
        return f"{self.positions} positions: {figure}; {within}"
