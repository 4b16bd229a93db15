"""Files of a data set: shards, the manifest, and a folder in which they appear whole or not at all.

A shard is 256 little-endian int32 (20240520, 1, number of tokens, zeros), then uint16 values.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from systems.layout import file_sha256

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
BOS_ID, FIRST_OPERATOR_ID, OPERATOR_COUNT = 1, 4, 4
MANIFEST, UNFINISHED = "manifest.json", ".unfinished.json"
TRAIN_SHARD, VAL_SHARD, BYTES_SHARD = (f"fineweb_{split}_%06d.bin" for split in ("train", "val", "val_bytes"))
FORMAT, TRANSFORM, NO_TRANSFORM = "parameter-golf-data/1", "lossless_caps_caseops_v1", "none"
SHARD_NAME = re.compile(r"fineweb_(train|val|val_bytes)_\d{6}\.bin")


_LOCKS: set[int] = set()  # descriptors of the folders that this process has locked


class DataError(ValueError):
    """Something the user gave cannot be used; the message is one line that names it."""


class BusyError(DataError):
    """Another process writes into the folder."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Own a folder, which is made where it is not there, and removed again if nothing came into it.

    The lock is the kernel's, so that it ends with this process, however that ends. Where the file system
    knows no locks there is none.

    Raises:
        BusyError: another process has it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    descriptor = _lock(folder)
    _LOCKS.add(descriptor)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the first that is not empty
            for path in made:
                path.rmdir()
        _LOCKS.discard(descriptor)
        with contextlib.suppress(OSError):  # a worker that is just being forked may still have it open
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _lock(folder: Path) -> int:
    """Descriptor of a folder, locked. A folder that its owner has just removed is made again."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            what = "another process writes there; wait, or choose another --out"
            raise BusyError(f"{folder}: {what}") from None
        except OSError:
            return descriptor
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                return descriptor
        os.close(descriptor)


def _forget_locks() -> None:
    """In a child process: else the lock would last as long as its workers, who learn late of a kill -9."""
    while _LOCKS:
        os.close(_LOCKS.pop())


os.register_at_fork(after_in_child=_forget_locks)


def shard_bytes(values: np.ndarray) -> bytes:
    """A shard file that holds `values`, (n,) integers below 65,536."""
    return b"".join(shard_buffers([values]))


def shard_buffers(parts: Sequence[np.ndarray]) -> list[memoryview]:
    """What one after the other are a shard file of all values: not copied where they are uint16 already."""
    header = np.zeros(SHARD_HEADER_INTS, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, sum(map(len, parts))
    return [header.data, *(np.ascontiguousarray(part, "<u2").data for part in parts)]


def read_shard(path: Path) -> np.ndarray:
    """Values of a shard, (n,) uint16, memory-mapped. DataError unless header and size fit."""
    header = np.fromfile(path, "<i4", SHARD_HEADER_INTS)
    if len(header) < SHARD_HEADER_INTS or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise DataError(f"{path}: not a shard (needs magic {SHARD_MAGIC}, version {SHARD_VERSION})")
    size, expected = path.stat().st_size, 4 * SHARD_HEADER_INTS + 2 * int(header[2])
    if size != expected:
        raise DataError(f"{path}: {size} bytes, but its header of {header[2]} tokens means {expected}")
    return np.memmap(path, "<u2", "r", 4 * SHARD_HEADER_INTS) if header[2] else np.empty(0, np.uint16)


def shard_paths(folder: Path, split: str) -> list[Path]:
    """Shards of a split ("train", "val" or "val_bytes") in order."""
    return sorted(
        path
        for path in folder.glob("fineweb_*.bin")
        if (name := SHARD_NAME.fullmatch(path.name)) and name[1] == split
    )


def document_parts(tokens: np.ndarray, size: int) -> Iterator[tuple[int, int]]:
    """Start and end of parts of a stream, (T,) uint16: of about `size` tokens, from document to document."""
    starts = np.flatnonzero(tokens == BOS_ID)
    firsts = np.searchsorted(starts, range(size, len(tokens), size))
    inner = starts[np.unique(firsts[firsts < len(starts)])].tolist()
    return itertools.pairwise([0, *inner, len(tokens)])


def write_whole(path: Path, *data: bytes | memoryview) -> None:
    """Let a complete file of these bytes appear under `path`, or none.

    A temporary name, fsync, rename, fsync of the folder.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)  # a full disk is reported without one
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def manifest_bytes(manifest: dict) -> bytes:
    """A manifest as it is written."""
    return (json.dumps(manifest, indent=1) + "\n").encode()


class DataFolder:
    """Output folder. Files appear whole, and no file of another data set is replaced unasked.

    While a data set is made, `.unfinished.json` says of which job and how far it is; that job continues
    there.
    """

    def __init__(self, path: Path, overwrite: bool) -> None:
        """Make the folder; with `overwrite` remove its data set. DataError for *.bin files we never write."""
        self.path, self.overwrite = path, overwrite
        self.sha256: dict[str, str] = {}  # of every file of this data set, by name
        self._created: list[Path] = []
        path.mkdir(parents=True, exist_ok=True)
        for other in sorted(path.glob("*.bin")):
            if not SHARD_NAME.fullmatch(other.name):
                raise DataError(f"{other}: is no file of a data set; choose another --out")
        if overwrite:
            for old in [path / MANIFEST, path / UNFINISHED, *path.glob("*.bin")]:
                old.unlink(missing_ok=True)
        for pattern in (".fineweb_*.bin.tmp", ".*.json.tmp", ".*.model.tmp"):  # of a run that was killed
            for old in path.glob(pattern):
                old.unlink()
        self._complete = (path / MANIFEST).exists()

    def publish(self, name: str, *data: bytes | memoryview) -> None:
        """Let a complete file of these bytes appear under its name. One that is there with the same is kept.

        Raises:
            DataError: without `overwrite`, and there is another file of that name.
        """
        target, digest = self.path / name, hashlib.sha256()
        for part in data:
            digest.update(part)
        self.sha256[name] = digest.hexdigest()
        if target.exists():
            if file_sha256(target) == self.sha256[name]:
                return
            if not self.overwrite:
                raise self._other_data(target)
        self._created.append(target)
        write_whole(target, *data)

    def begin(self, job: dict) -> dict:
        """What the folder remembers of this job, nothing but the job itself if it is new.

        Raises:
            DataError: the folder holds an unfinished data set of another job.
        """
        path = self.path / UNFINISHED
        if not path.exists():
            self.remember({"job": job})
            return {"job": job}
        try:
            state = json.loads(path.read_bytes())
            old = state["job"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}: cannot be read; pass --overwrite to start over") from None
        for key, value in job.items():
            if old.get(key) != value:
                raise DataError(
                    f"{self.path}: holds an unfinished data set with {key} {old.get(key)}, not {value}; "
                    "choose another --out or pass --overwrite"
                )
        for name, entry in state.get("files", {}).items():
            size = 4 * SHARD_HEADER_INTS + 2 * entry["tokens"]
            if not (target := self.path / name).exists() or target.stat().st_size != size:
                raise DataError(f"{target}: is gone or changed; pass --overwrite to start over")
            self.sha256[name] = entry["sha256"]
        return state

    def remember(self, state: dict) -> None:
        """Note how far the job is; what is complete already is only compared, so nothing is noted then."""
        if not self._complete:
            self._created.append(self.path / UNFINISHED)
            write_whole(self.path / UNFINISHED, json.dumps(state).encode())

    def finish(self, manifest: dict) -> None:
        """Write the manifest. DataError if the folder holds shards that are no part of this data set."""
        for path in sorted(self.path.glob("*.bin")):
            if path.name not in self.sha256:
                raise self._other_data(path)
        self.publish(MANIFEST, manifest_bytes(manifest))
        (self.path / UNFINISHED).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove what this run has written."""
        for path in self._created:
            path.unlink(missing_ok=True)

    @staticmethod
    def _other_data(path: Path) -> DataError:
        return DataError(f"{path}: is of another data set; choose another --out or pass --overwrite")


class ShardWriter:
    """Cuts a stream of uint16 values into shard files of `shard_tokens`; the last may be shorter."""

    def __init__(self, folder: DataFolder, pattern: str, shard_tokens: int) -> None:
        self.tokens: dict[str, int] = {}  # number of values in each shard, by file name
        self._folder, self._pattern, self._shard_tokens = folder, pattern, shard_tokens
        self._parts: list[np.ndarray] = []
        self._held = 0

    def resume(self, tokens: dict[str, int], held: np.ndarray) -> None:
        """Go on after the shards `tokens`, with the values that were held then."""
        self.tokens = dict(tokens)
        self._parts, self._held = [held], len(held)

    @property
    def held(self) -> np.ndarray:
        """Values that no shard holds yet, (n,) uint16."""
        return np.concatenate([np.empty(0, np.uint16), *self._parts])

    def add(self, values: np.ndarray) -> int:
        """Append values, (n,) uint16, and write every shard that they fill; returns how many."""
        before = len(self.tokens)
        while len(values):
            part, values = np.split(values, [self._shard_tokens - self._held])
            self._parts.append(part)
            self._held += len(part)
            if self._held == self._shard_tokens:
                self.flush()
        return len(self.tokens) - before

    def flush(self) -> None:
        """Write what is held, if anything, as one shard."""
        if self._held:
            name = self._pattern % len(self.tokens)
            self._folder.publish(name, *shard_buffers(self._parts))
            self.tokens[name] = self._held
            self._parts, self._held = [], 0
