"""Smaller chunks for short documents in test-time training (PR #2014, #2067)."""

import contextlib
import itertools
from collections.abc import Sequence

from train_gpt import Config, ConfigError, chunk_size


def chunk_by_length(cfg: Config, targets: int) -> int:
    """The chunk size that TTT_CHUNK_BY_LENGTH has for a document of so many targets. Raises ConfigError."""
    text, longest, fits = cfg.ttt_chunk_by_length, cfg.ttt_chunk_size, False
    with contextlib.suppress(ValueError):
        pairs = [[int(number) for number in pair.split(":")] for pair in text.split(",")]
        lengths, sizes = zip(*pairs, strict=True)
        fits = all(list(part) == sorted({*part}) and part[0] > 0 for part in (lengths, (*sizes, longest)))
    if not fits:
        must = f"LENGTH:CHUNK,... such as 256:8,2000:24, both rising, chunks below TTT_CHUNK_SIZE={longest}"
        raise ConfigError(f"TTT_CHUNK_BY_LENGTH={text!r}: must be {must}")
    return next((size for limit, size in pairs if targets <= limit), longest)


def chunk_groups(documents: Sequence[tuple], cfg: Config) -> list[list[tuple]]:
    """Documents by ascending length, apart where their chunk size changes."""
    groups = itertools.groupby(documents, lambda document: chunk_size(cfg, document[1][1] - 1))
    return [list(group) for _, group in groups]
