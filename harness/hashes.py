"""SHA-256 of data files, remembered from one start to the next."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from harness.settings import verifies
from systems.layout import file_sha256
from train_gpt import write_whole

YOUNG = 2.0  # seconds after a change in which another one may leave the file's times as they are


class Hashes:
    """What files hashed to at an earlier start, for as long as they are the same by what the system says.

    That is size, inode and the times of the last change of contents and of anything (`ctime`, which programs
    cannot set). It spares a start of a run the reading of all shards and is no evidence: the audit hashes.
    """

    def __init__(self, folder: Path | None = None, believe: bool = True):
        """Hashes kept in a folder, one file for each; without one nothing is remembered."""
        self._folder, self._believe = folder, believe

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> "Hashes":
        """Those in the user's folder for such things; with VERIFY=1 all are made anew."""
        home = environ.get("XDG_CACHE_HOME") or environ.get("HOME") and f"{environ['HOME']}/.cache"
        return cls(Path(home) / "train_gpt" if home else None, not verifies(environ))

    def sha256(self, path: Path) -> str:
        """SHA-256 of a file, in hex. Raises OSError where it cannot be read."""
        known, before = self._file(path), self._mark(path)
        with contextlib.suppress(OSError, ValueError, TypeError):
            mark, digest = json.loads(known.read_text()) if known and self._believe else ([], "")
            if mark == before and len(digest) == 64:
                return digest
        digest = file_sha256(path)
        if known and self._mark(path) == before and time.time() - before[-1] / 1e9 > YOUNG:
            with contextlib.suppress(OSError, RuntimeError):  # a folder that cannot be written is none
                known.parent.mkdir(parents=True, exist_ok=True)
                write_whole(known, json.dumps([before, digest]).encode())
        return digest

    def _file(self, path: Path) -> Path | None:
        name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
        return self._folder and self._folder / f"{name[:32]}.json"

    @staticmethod
    def _mark(path: Path) -> list[int]:
        told = path.stat()
        return [told.st_size, told.st_dev, told.st_ino, told.st_mtime_ns, told.st_ctime_ns]


NO_HASHES = Hashes()  # remembers nothing
