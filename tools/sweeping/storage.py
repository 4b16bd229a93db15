"""Where a study is kept, so that neither a full disk nor another process makes it unreadable."""

import contextlib
import fcntl
import itertools
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
from optuna.storages.journal import JournalFileBackend

from command import Mistake

LOCKED_SECONDS = 60  # a line is written in milliseconds: whoever takes so long hangs
SQLITE_SECONDS, MOST_WAITS = 5, 60  # before a locked database is said; how often it is asked again


class SweepError(Mistake):
    """The command or its study makes no sense: one line, exit code 2."""


class HeldFile:
    """A lock that a process has as long as it holds a file open: none is left behind by one that is gone."""

    def __init__(self, path: Path):
        self._path, self._file = path.absolute(), None

    def acquire(self) -> bool:
        """Wait for the lock, then write who has it. SweepError after a minute."""
        latest = time.monotonic() + LOCKED_SECONDS
        file = open(self._path, "ab+", buffering=0)  # noqa: SIM115 - `release` closes it
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > latest:
                file.seek(0)
                holder = file.read().decode(errors="replace").strip() or "somebody"
                file.close()
                raise SweepError(f"{self._path}: held for {LOCKED_SECONDS} s by {holder}; end that process")
            time.sleep(0.02)
        self._file = file
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
            file.truncate(0)
            file.write(f"process {os.getpid()} of {socket.gethostname()}".encode())
        return True

    def release(self) -> None:
        """Let the next one have it."""
        self._file.close()


class Journal(JournalFileBackend):
    """A file with a line of JSON for each change of the study, to which whole lines are added or nothing."""

    def __init__(self, path: Path):
        self._place = path.absolute()
        lock = HeldFile(path.with_name(f"{path.name}.held"))
        super().__init__(str(self._place), lock)
        with self._locked():
            repair(self._place)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def append_logs(self, logs: list[dict]) -> None:
        """Add lines. SweepError where that fails; what was written of them is taken back."""
        lines = "".join(f"{json.dumps(log, separators=(',', ':'))}\n" for log in logs).encode()
        with self._locked(), open(self._place, "ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                if file.write(lines) < len(lines):
                    raise OSError(0, "the disk is full")
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(size)
                text = f"{self._place}: cannot be written ({error.strerror}); the same command goes on"
                raise SweepError(text) from None


def repair(path: Path) -> None:
    """Cut a journal back to its last whole line; the rest goes into a file beside it, and is said."""
    whole, data = 0, path.read_bytes()
    for line in data.splitlines(keepends=True):
        try:
            good = line.endswith(b"\n") and isinstance(json.loads(line), dict)
        except ValueError:
            good = False
        if not good:
            break
        whole += len(line)
    if whole == len(data):
        return
    names = (path.with_name(f"{path.name}.damaged{number}") for number in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    aside.write_bytes(data[whole:])
    os.truncate(path, whole)
    text = (
        f"{path}: damaged, the last {len(data) - whole} bytes are no whole lines and lie in {aside.name} now"
    )
    print(f"sweep.py: notice: {text}", file=sys.stderr, flush=True)


def open_storage(where: str, out: Path, stopped: Callable[[], bool]) -> optuna.storages.BaseStorage:
    """A database by its URL, or a journal file. `stopped` says whether to wait no longer for one."""
    try:
        if "://" in where:
            waiting = {"connect_args": {"timeout": SQLITE_SECONDS}} if where.startswith("sqlite") else {}
            made = optuna.storages.RDBStorage(where, engine_kwargs=waiting)
            return patient(optuna.storages.get_storage(made), where, stopped)
        path = Path(where) if where else out / "study.journal"
        path.parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.JournalStorage(Journal(path))
    except SweepError:
        raise
    except Exception as error:  # SQLAlchemy, drivers and the journal have a dozen types
        reason = " ".join(str(error).split())[:200]
        raise SweepError(f"--storage {where or out}: cannot be opened ({reason})") from None


def patient(
    storage: optuna.storages.BaseStorage, where: str, stopped: Callable[[], bool]
) -> optuna.storages.BaseStorage:
    """The storage, which waits for a database that another process has locked, and says so once a time."""

    def waiting(method: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            for attempt in itertools.count():
                try:
                    return method(*arguments, **options)
                except Exception as error:  # optuna's, SQLAlchemy's, the driver's
                    reason = " ".join(f"{error} {error.__cause__}".split())
                    if "locked" not in reason:
                        raise
                    if stopped():
                        raise KeyboardInterrupt from None
                    if attempt >= MOST_WAITS:
                        text = f"--storage {where}: locked by another process for minutes; end that process"
                        raise SweepError(text) from None
                    if attempt == 0:
                        text = f"{where} is locked by another process: waiting for it"
                        print(f"sweep.py: notice: {text}", file=sys.stderr, flush=True)
                    time.sleep(0.2)

        return call

    for name in vars(optuna.storages.BaseStorage):
        method = getattr(storage, name)
        if callable(method) and not name.startswith("_"):
            setattr(storage, name, waiting(method))
    return storage
