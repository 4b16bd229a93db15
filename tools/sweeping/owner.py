"""Which process a trial belongs to, and whether that is gone: names of hosts and numbers come again."""

import contextlib
import fcntl
import os
import socket
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

NAME = "held_by_its_sweep"  # in the trial's folder: locked as long as the sweep that runs it lives


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def started(process: int) -> str:
    """When a process of this machine began, in ticks since its start; empty: there is none."""
    fields = _read(f"/proc/{process}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] != "Z" else ""


def myself() -> dict[str, object]:
    """This process, as no other one is: also beside a container of the same name, or before a restart."""
    space = ""
    with contextlib.suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "machine": _read("/etc/machine-id"),
        "process": os.getpid(),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "space": space,
        "started": started(os.getpid()),
        "token": uuid.uuid4().hex,
    }


@contextlib.contextmanager
def holding(folder: Path, owner: Mapping[str, object]) -> Iterator[None]:
    """Lock the trial's folder for its owner; the kernel takes the lock back when the process is gone."""
    with open(folder / NAME, "w", encoding="utf-8") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write(str(owner["token"]))
        file.flush()
        try:
            yield
        finally:
            (folder / NAME).unlink(missing_ok=True)


def is_gone(owner: Mapping[str, object], folders: list[Path]) -> bool:
    """Whether the process of a trial has ended; False where that cannot be known from here.

    `folders`: where the trial's may lie, as seen from here. A lock there tells about containers, too.
    """
    me = myself()
    boot, space = (owner.get(key) == me[key] for key in ("boot", "space"))
    machine = boot or all(owner.get(key) == me[key] for key in ("host", "machine"))  # started anew since
    for folder in folders if machine else ():
        with contextlib.suppress(OSError), open(folder / NAME, encoding="utf-8") as file:
            if file.read() != owner.get("token"):
                continue
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True
    return boot and space and started(owner["process"]) != owner["started"]
