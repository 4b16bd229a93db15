"""Of check A2: how many short phrases of validation documents stand in training text.

Copies in which every tenth word is another have no long passage in common with the original. Six tokens in a
row are common in any text, so their share is laid beside that of training documents in others of them.
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from auditing.run import BOS, FEWEST_DOCUMENTS, Audit, read_values, require

PHRASE = 6  # tokens
LEAST = 20  # phrases of a document of which a share can be told
ENOUGH = 1 << 25  # training tokens that are looked at: shards are drawn until they have so many
WHOLE = 1 << 22  # tokens of which every phrase is looked at; of more a sixteenth, by their hashes
SAMPLE = 16
PART = 1 << 20  # tokens hashed at once
GAP, ERRORS = 0.1, 4.0  # share, and standard errors, by which validation may be nearer to training text
PRIME = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64


class Phrases(NamedTuple):
    """Phrases of documents, each once a document: their hashes, (n,) uint64, and their documents, (n,)."""

    hashes: np.ndarray
    documents: np.ndarray

    def shares(self, known: np.ndarray) -> np.ndarray:
        """Share of each document's phrases that are `known` (n,) bool; of documents with LEAST phrases."""
        counts = np.bincount(self.documents)
        found = np.bincount(self.documents, known, len(counts))
        return found[counts >= LEAST] / counts[counts >= LEAST]


def window_sums(tokens: np.ndarray, width: int) -> np.ndarray:
    """A checksum of each window of a stream: a polynomial modulo 2**64, (T - width + 1,)."""
    powers, inverse = (
        np.cumprod(np.full(len(tokens), base, np.uint64)) for base in (PRIME, pow(PRIME, -1, 1 << 64))
    )
    sums = np.append(np.uint64(0), np.cumsum((tokens.astype(np.uint64) + np.uint64(1)) * powers))
    return (sums[width:] - sums[:-width]) * inverse[: len(tokens) - width + 1]


def phrases_of(tokens: np.ndarray, sample: int) -> Phrases:
    """Phrases within the documents of a stream, (T,) integers: all, or one in `sample` by their hashes."""
    found, begun = [np.empty((0, 2), np.uint64)], 0
    for first in range(0, len(tokens) - PHRASE + 1, PART):
        part = tokens[first : first + PART + PHRASE - 1]
        count = len(part) - PHRASE + 1
        starts, hashes = begun + np.cumsum(part == BOS), window_sums(part, PHRASE)
        inside = (starts[PHRASE - 1 :] == starts[:count]) & (part[:count] != BOS)
        chosen = inside & ((hashes >> np.uint64(32)) % np.uint64(sample) == 0)
        found.append(np.stack([hashes[chosen], starts[:count][chosen].astype(np.uint64)], 1))
        begun = int(starts[count - 1])
    pairs = np.unique(np.concatenate(found), axis=0)
    return Phrases(pairs[:, 0], pairs[:, 1].astype(np.int64))


def _drawn(audit: Audit, paths: Sequence[Path]) -> np.ndarray:
    """Tokens of training shards that are drawn until there are enough; each begins a document."""
    parts, size = [], 0
    for path in random.Random(audit.sample_seed).sample(paths, len(paths)):
        if size >= ENOUGH:
            break
        parts += [np.array([BOS], np.uint16), np.asarray(read_values(path)[: ENOUGH - size], np.uint16)]
        size += len(parts[-1])
    return np.concatenate(parts)


def no_nearer(audit: Audit, paths: Sequence[Path]) -> str:
    """Raise Failed where validation is much nearer to training text than that is to itself; else in words."""
    training = _drawn(audit, paths)
    sample = 1 if len(training) <= WHOLE else SAMPLE
    theirs, ours = phrases_of(training, sample), phrases_of(np.asarray(audit.tokens), sample)
    known, counts = np.unique(theirs.hashes, return_counts=True)
    places = np.minimum(np.searchsorted(known, ours.hashes), max(len(known) - 1, 0))
    mine = ours.shares(known[places] == ours.hashes) if len(known) else np.empty(0)
    own = theirs.shares(counts[np.searchsorted(known, theirs.hashes)] > 1)
    if min(len(mine), len(own)) < FEWEST_DOCUMENTS:
        return ""
    error = math.sqrt(sum(float(shares.var(ddof=1)) / len(shares) for shares in (mine, own)))
    gap = float(mine.mean() - own.mean())
    figure = f"{mine.mean():.1%} of phrases of {PHRASE} tokens stand in training text, {own.mean():.1%} of"
    figure += " training documents in others"
    require(gap <= GAP or gap <= ERRORS * error, f"{figure}: validation text with other words is among it")
    return f"; {figure}"
