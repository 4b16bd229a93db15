"""Bytes of plain text, without CaseOps."""

from typing import NamedTuple

import torch
from torch import Tensor

from train_gpt import DataError


class ByteTables(NamedTuple):
    """Bytes of plain text per piece (no CaseOps): tensors [V]."""

    base_bytes: Tensor  # UTF-8 bytes of the piece without its leading space mark
    has_leading_space: Tensor
    is_boundary: Tensor  # control, unknown or unused: no space is charged after it

    @classmethod
    def from_sentencepiece(cls, processor: object, vocab_size: int) -> "ByteTables":
        """Read the tables off a tokenizer. Raises DataError where it owns no bare space piece."""
        if processor.is_unknown(processor.piece_to_id("▁")):
            raise DataError(
                "TOKENIZER_PATH: the tokenizer has no bare '▁' piece, its bytes cannot be counted"
            )
        base, space, boundary = [0] * vocab_size, [False] * vocab_size, [True] * vocab_size
        for i in range(min(vocab_size, processor.get_piece_size())):
            boundary[i] = processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i)
            if boundary[i]:
                continue
            piece = processor.id_to_piece(i)
            space[i] = piece.startswith("▁")
            base[i] = 1 if processor.is_byte(i) else len(piece.removeprefix("▁").encode())
        return cls(torch.tensor(base), torch.tensor(space), torch.tensor(boundary))

    def target_bytes(self, tokens: Tensor) -> Tensor:
        """Tokens [N] -> bytes of each target tokens[1:], [N-1]."""
        previous, target = tokens[:-1].long(), tokens[1:].long()
        return self.base_bytes[target] + (self.has_leading_space[target] & ~self.is_boundary[previous])
