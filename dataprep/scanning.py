"""What there is in shards: counts, document lengths, a hash of each document."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataprep.leaks import NearIndex, Overlap, document_hashes
from dataprep.shards import BOS_ID, FIRST_OPERATOR_ID, OPERATOR_COUNT, read_shard, shard_paths
from systems.layout import file_sha256

CHUNK_TOKENS = 1 << 21


class Scan:
    """What there is in a run of tokens: counts, document lengths, a hash of each document's tokens.

    A document may have begun before the run, and go on behind it: its tokens are held until `append` or
    `finish`.
    """

    def __init__(self) -> None:
        self.counts, self.lengths, self.highest = Counter(), Counter(), 0
        self.first: int | None = None
        """The first token."""
        self._hashes: list[np.ndarray] = []
        self._head = self._tail = np.empty(0, np.uint16)  # up to the first BOS; from the last BOS on

    @property
    def hashes(self) -> np.ndarray:
        """Hashes of the whole documents, in order, (n,) uint64."""
        return np.concatenate([np.empty(0, np.uint64), *self._hashes])

    def add(self, tokens: np.ndarray) -> None:
        """Take tokens, (n,) uint16, that follow those before."""
        if not len(tokens):
            return
        if self.first is None:
            self.first = int(tokens[0])
        operator = tokens - np.uint16(FIRST_OPERATOR_ID) < OPERATOR_COUNT
        self.counts.update(tokens=len(tokens), operator_tokens=int(np.count_nonzero(operator)))
        self.highest = max(self.highest, int(tokens.max()))
        self._take(tokens)

    def append(self, other: "Scan") -> None:
        """Take another run, which follows this one."""
        self.first = other.first if self.first is None else self.first
        self.counts.update(tokens=other.counts["tokens"], operator_tokens=other.counts["operator_tokens"])
        self.highest = max(self.highest, other.highest)
        self._take(other._head)
        if len(other._tail):
            self.finish()
            self.counts["documents"] += other.counts["documents"]
            self.lengths.update(other.lengths)
            self._hashes += other._hashes
            self._tail = other._tail

    def finish(self) -> None:
        """What is held is a whole document."""
        self._count(self._tail, np.flatnonzero(self._tail[:1] == BOS_ID))
        self._tail = self._tail[:0]

    def _take(self, tokens: np.ndarray) -> None:
        tokens = np.concatenate([self._tail, tokens])
        starts = np.flatnonzero(tokens == BOS_ID)
        if not len(starts):
            self._head = np.concatenate([self._head, tokens])
            return
        self._head = np.concatenate([self._head, tokens[: starts[0]]])
        self._count(tokens[starts[0] : starts[-1]], starts[:-1] - starts[0])
        self._tail = tokens[starts[-1] :]

    def _count(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        """Count whole documents and hash each."""
        if not len(starts):
            return
        lengths = np.diff(starts, append=len(tokens))
        self.counts["documents"] += len(starts)
        self.lengths.update(lengths.tolist())
        self._hashes.append(document_hashes(tokens, starts))


class ShardScan(NamedTuple):
    """What a worker finds in a shard."""

    sha256: str
    scan: Scan
    """Empty for byte counts."""
    overlap: Overlap = Overlap(0, set())
    """With validation, of training shards where that is asked for."""


def scan_shard(path: Path, near: NearIndex | None = None) -> ShardScan:
    """Read a shard whole. DataError as `read_shard`.

    With an index of validation documents, what a training shard has of them: there a document that runs on
    into the next shard is looked at as two.
    """
    shard = read_shard(path)
    scan = Scan() if is_sidecar(path) else scan_tokens(shard)
    overlap = near.overlap(shard) if near and path.name.startswith("fineweb_train_") else Overlap(0, set())
    return ShardScan(file_sha256(path), scan, overlap)


def scan_tokens(shard: np.ndarray) -> Scan:
    """The scan of a shard's tokens, (T,) uint16, a part at a time: hashing takes several bytes for each."""
    scan = Scan()
    for start in range(0, len(shard), CHUNK_TOKENS):
        scan.add(np.array(shard[start : start + CHUNK_TOKENS]))
    return scan


def is_sidecar(path: Path) -> bool:
    """Whether a shard holds byte counts, not tokens."""
    return path.name.startswith("fineweb_val_bytes_")


def joined(scans: Iterable[Scan]) -> Scan:
    """The scan of shards that follow each other."""
    whole = Scan()
    for scan in scans:
        whole.append(scan)
    whole.finish()
    return whole


def validation_hashes(folder: Path) -> np.ndarray:
    """Hashes of the validation documents in a folder, each once, ascending, (n,) uint64."""
    scans = (scan_tokens(read_shard(path)) for path in shard_paths(folder, "val"))
    return np.unique(joined(scans).hashes)
