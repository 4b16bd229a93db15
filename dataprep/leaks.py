"""Leak guard: training documents that are, or nearly are, validation documents.

Exact, and equal but for white space: by hash of the text (`Document.digest`, `Document.key`); dropped and
counted.

Other texts with the same tokens, because the tokenizer normalises (ligatures, full-width letters, U+200B): by
hash of the tokens (`document_hashes`), as the check of a finished folder compares them; dropped and counted.

Nearly equal, counted and dropped on request: by hashed windows of WINDOW tokens. One window in SAMPLE is
looked at, chosen by its hash, so the same windows in every document. A training document is near a
validation document if at least NEAR_SHARE of the sampled windows of either of the two occur in the other
(for the training document: in validation as a whole), and at least NEAR_WINDOWS do. Documents too short to
have so many (some 80 tokens) are never near; where words changed, the windows that hold them do not match.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataprep import words
from dataprep.shards import BOS_ID, document_parts, read_shard, shard_paths

WINDOW, SAMPLE = 16, 16
NEAR_SHARE, NEAR_WINDOWS = 0.5, 4
_SLICE = 1 << 20  # tokens hashed at once
_SEEN = 1 << 22  # bits of a filter; a uint64 array divides by it as fast as it masks
_FACTOR = 0x9E3779B97F4A7C15  # of the polynomial in the tokens' random values
_VALUES = np.random.Generator(np.random.PCG64(1729)).integers(1, 1 << 63, size=65_536, dtype=np.uint64)


def token_values(tokens: np.ndarray) -> np.ndarray:
    """A fixed random value for each token, (T,) uint64: what hashes of token sequences are made of."""
    return _VALUES[tokens]


def document_hashes(tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Hash of each document: sum over its tokens of value * factor^place, (n,) uint64.

    Args:
        tokens: (T,) uint16, whole documents.
        starts: (n,) where each begins, ascending from 0.
    """
    if not len(starts):
        return np.empty(0, np.uint64)
    if words.library():
        return words.document_hashes(tokens, np.append(starts[1:], len(tokens)), _VALUES)
    lengths = np.diff(starts, append=len(tokens))
    places = np.arange(len(tokens)) - np.repeat(starts, lengths)
    powers = np.full(lengths.max(), _FACTOR, np.uint64)
    powers[0] = 1
    powers = np.multiply.accumulate(powers)
    return np.add.reduceat(token_values(tokens) * powers[places], starts)


class Windows(NamedTuple):
    """Sampled windows in order: their hashes (n,) uint64, and the document of each (n,), from 0."""

    hashes: np.ndarray
    documents: np.ndarray


def sampled_windows(tokens: np.ndarray) -> Windows:
    """Sampled windows of documents, (T,) uint16 with BOS before each."""
    if words.library():
        return Windows(*words.sampled_windows(tokens, _VALUES, BOS_ID))
    text = tokens != BOS_ID
    documents = np.cumsum(tokens == BOS_ID, dtype=np.int32)[text] - 1
    tokens = tokens[text]
    found = [Windows(np.empty(0, np.uint64), np.empty(0, np.int32))]
    for start in range(0, len(tokens) - WINDOW + 1, _SLICE):
        end = start + _SLICE + WINDOW - 1
        hashes = _window_hashes(tokens[start:end])
        first, last = documents[start : start + len(hashes)], documents[start + WINDOW - 1 : end]
        chosen = ((hashes >> np.uint64(32)) % SAMPLE == 0) & (first == last)
        found.append(Windows(hashes[chosen], first[chosen]))
    return Windows(*map(np.concatenate, zip(*found, strict=True)))


def _window_hashes(tokens: np.ndarray) -> np.ndarray:
    """Hash of each window of WINDOW tokens, (T - WINDOW + 1,) uint64, by doubling their width."""
    hashes, factor, width = token_values(tokens), _FACTOR, 1
    while width < WINDOW:
        hashes = hashes[:-width] * factor + hashes[width:]
        factor, width = factor * factor & 0xFFFFFFFFFFFFFFFF, 2 * width
    return hashes


class NearIndex:
    """Sampled windows of the validation documents, to find training documents near one of them."""

    def __init__(self, windows: Windows) -> None:
        order = np.argsort(windows.hashes, kind="stable")  # of equal ones the first document stays first
        hashes, documents = windows.hashes[order], windows.documents[order]
        new = np.diff(hashes, prepend=~hashes[:1]) != 0
        new_pair = new | (np.diff(documents, prepend=-1) != 0)
        self._totals = np.bincount(documents[new_pair], minlength=1)  # distinct windows of each document
        self._hashes, self._owners = hashes[new], documents[new]  # the first document that has it
        self._seen = np.zeros(_SEEN, bool)  # by a hash's low bits: most windows are not looked for further
        self._seen[self._hashes % _SEEN] = True

    @classmethod
    def of_folder(cls, folder: Path) -> "NearIndex":
        """Index of the validation shards in a folder."""
        return cls.of_stream(np.concatenate([read_shard(path) for path in shard_paths(folder, "val")]))

    @classmethod
    def of_stream(cls, tokens: np.ndarray) -> "NearIndex":
        """Index of validation documents, (T,) uint16."""
        found, first = [Windows(np.empty(0, np.uint64), np.empty(0, np.int32))], 0
        for start, end in document_parts(tokens, _SLICE):
            windows = sampled_windows(tokens[start:end])
            found.append(Windows(windows.hashes, windows.documents + np.int32(first)))
            first += np.count_nonzero(tokens[start:end] == BOS_ID)
        return cls(Windows(*map(np.concatenate, zip(*found, strict=True))))

    def overlap(self, tokens: np.ndarray) -> "Overlap":
        """What a stream of training documents, (T,) uint16, has of the validation documents."""
        documents, held = 0, set()
        for start, end in document_parts(tokens, _SLICE):
            for _, near, owners in self._suspects(np.asarray(tokens[start:end])):
                documents += near
                held |= owners
        return Overlap(documents, held)

    def near(self, tokens: np.ndarray) -> list[int]:
        """Numbers, from 0, of the documents in `tokens` that are near a validation document."""
        return [number for number, near, _ in self._suspects(tokens) if near]

    def _suspects(self, tokens: np.ndarray) -> Iterator[tuple[int, bool, set[int]]]:
        """Documents that share a window: number, is it near, and the validation documents that it holds."""
        windows = sampled_windows(tokens)
        hit = self._seen[windows.hashes % _SEEN]
        place = np.zeros(len(hit), np.int64)
        place[hit] = np.searchsorted(self._hashes, windows.hashes[hit], "right") - 1
        hit[hit] = self._hashes[place[hit]] == windows.hashes[hit]
        numbers = np.unique(windows.documents[hit])
        starts, ends = (np.searchsorted(windows.documents, numbers, side) for side in ("left", "right"))
        for number, start, end in zip(numbers.tolist(), starts.tolist(), ends.tolist(), strict=True):
            yield number, *self._compared(place[start:end][hit[start:end]], end - start)

    def _compared(self, hits: np.ndarray, windows: int) -> tuple[bool, set[int]]:
        """Of a document with so many windows, of which some are held out: is it near, and what it holds."""
        found = np.unique(hits)
        if len(found) < NEAR_WINDOWS:
            return False, set()
        share = len(hits) / windows
        owners = np.bincount(self._owners[found])
        shares = owners / np.maximum(self._totals[: len(owners)], 1)
        held = np.flatnonzero((owners >= NEAR_WINDOWS) & (shares >= NEAR_SHARE))
        return bool(max(share, shares.max()) >= NEAR_SHARE), set(held.tolist())


class Overlap(NamedTuple):
    """What training documents have of validation documents."""

    documents: int
    """Training documents that are near a validation document."""
    held: set[int]
    """Validation documents, from 0, of which a training document holds the half, by their sampled windows."""
