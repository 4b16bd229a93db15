"""Plain text, without CaseOps: bytes are counted by tables of the tokenizer's pieces."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from train_gpt import Config, DataError


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
        """Tokens [N] -> bytes of each target tokens[1:], int16 [N-1]."""
        counts, size = torch.empty(len(tokens) - 1, dtype=torch.int16), 1 << 20  # a few MB at a time
        for start in range(0, len(counts), size):
            part = tokens[start : start + size + 1].long()
            space = self.has_leading_space[part[1:]] & ~self.is_boundary[part[:-1]]
            counts[start : start + size] = self.base_bytes[part[1:]] + space
        return counts


def tokenizer_file(cfg: Config) -> Path:
    """The SentencePiece model: set, else named by the data's manifest, else at the contest's place."""
    if cfg.tokenizer_path:
        return Path(cfg.tokenizer_path)
    named = read_manifest(cfg.data_folder).get("tokenizer", {}).get("file")
    if named:
        return cfg.data_folder / named
    name = f"fineweb_{cfg.vocab_size}_bpe"
    if not cfg.caseops_enabled:
        return Path(cfg.data_dir) / "tokenizers" / f"{name}.model"
    caseops = Path(cfg.data_dir) / "datasets" / f"fineweb10B_sp{cfg.vocab_size}_caseops" / "datasets"
    return caseops / "tokenizers" / f"{name}_lossless_caps_caseops_v1_reserved.model"


def load_tokenizer(cfg: Config) -> object:
    """The SentencePiece tokenizer. Raises DataError when missing, unreadable or of another vocabulary."""
    import sentencepiece

    path = tokenizer_file(cfg)
    if not os.path.isfile(path):
        raise DataError(f"TOKENIZER_PATH={path}: no such file, must be the model that made {cfg.data_folder}")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes() or b"\0")
    except (RuntimeError, OSError):
        raise DataError(f"TOKENIZER_PATH={path}: not a SentencePiece model") from None
    if processor.get_piece_size() != cfg.vocab_size:
        pieces = processor.get_piece_size()
        raise DataError(f"VOCAB_SIZE={cfg.vocab_size}: must be {pieces}, the pieces of the tokenizer {path}")
    return processor


def read_manifest(folder: Path) -> dict:
    """The manifest beside the shards, {} where there is none."""
    path = folder / "manifest.json"
    if not os.path.isfile(path):
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError(f"{path}: not readable JSON") from None
    if not _is_manifest(manifest):
        raise DataError(f"{path}: not a manifest of prepare_caseops_data.py")
    return manifest


def _is_manifest(manifest: object) -> bool:
    if not (isinstance(manifest, dict) and manifest):
        return False
    tokenizer, *groups = (manifest.get(key, {}) for key in ("tokenizer", "splits", "files"))
    entries = [entry for group in groups if isinstance(group, dict) for entry in group.values()]
    named = isinstance(tokenizer, dict) and isinstance(tokenizer.get("file", ""), str)
    return named and all(isinstance(part, dict) for part in [*groups, *entries])
