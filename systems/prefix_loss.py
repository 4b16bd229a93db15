"""A second target while training: the longest piece that the next one begins with (PREFIX_LOSS; mn- #337).

Where " theory" comes next, " the" would not have been wholly wrong: it is the longest other piece with which
those bytes begin. Cross entropy alone tells the model nothing of that; a second, weaker target does, and more
so the fewer tokens it has seen. Its weight falls to 0 with training, as only the first is scored.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from systems.plain_text import load_tokenizer
from train_gpt import Config, softcap


def prefix_table(processor: object, vocab_size: int) -> Tensor:
    """Each piece's longest proper prefix among the pieces, int64 [V]; the piece itself where there is none.

    Neither has nor is a prefix: a control or byte piece, an unused one, and an operator of CaseOps (of the
    private use area). The bare space is none: it comes before operators, and where a word begins it is not
    the start of what the model should have said. A mark of a space counts as the byte that it stands for.
    """
    pieces = {}
    for i in range(min(vocab_size, processor.get_piece_size())):
        piece = processor.id_to_piece(i)
        odd = processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i)
        operator = any("\ue000" <= letter <= "\uf8ff" for letter in piece)
        if not (odd or processor.is_byte(i) or operator or piece == "▁"):
            pieces[piece] = i
    table = torch.arange(vocab_size)
    for piece, i in pieces.items():
        prefixes = (piece[:end] for end in range(len(piece) - 1, 0, -1))
        table[i] = next((pieces[prefix] for prefix in prefixes if prefix in pieces), i)
    return table


class Prefixes:
    """Adds the gradient of the second target to the losses of a model that trains; their values stay.

    As both targets share the logits, its cross entropy is the first one's plus the difference of two logits,
    which takes no second product with the head.
    """

    def __init__(self, cfg: Config, device: torch.device):
        """Raises DataError where there is no tokenizer that made the data."""
        self._table = prefix_table(load_tokenizer(cfg), cfg.vocab_size).to(device)
        self._first, self._cap = cfg.prefix_loss, cfg.logit_softcap
        self._weight = torch.zeros((), device=device)

    def fall(self, frac: float) -> None:
        """The weight at a fraction of training: PREFIX_LOSS at first, then linear to 0 at the end."""
        self._weight.fill_(self._first * (1 - frac))

    def __call__(self, nats: Tensor, h: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        """Losses [B, T] of hidden states [B, T, D], head [V, D] and targets [B, T] -> the same [B, T]."""
        if not torch.is_grad_enabled():
            return nats
        prefixes = self._table[targets]
        own, other = (self._logit(h, head, ids) for ids in (targets, prefixes))
        second = torch.where(prefixes == targets, 0.0, self._weight * (nats + own - other))
        return nats + (second - second.detach())

    def _logit(self, h: Tensor, head: Tensor, ids: Tensor) -> Tensor:
        """The soft-capped logit of one piece a token, float32 [B, T]."""
        return softcap((h.float() * F.embedding(ids, head).float()).sum(-1), self._cap)
