"""The box: runs a program that nobody knows, and says which files it opened.

    ran = box.run([sys.executable, "script.py"], folder, environment={"SEED": "42"}, timeout=600)

The program and all that it starts can write in `folder` only (and in a /dev/shm of its own), see the Python
installation, the system's libraries and what `readable` names, reach no network and no process outside, and
are killed when it ends. Nothing has to be installed; needed are Linux on x86-64 of 5.14 or later, and either
user namespaces or Landlock. `jail.py` builds the walls, each of which does another thing:

* namespaces: a root that holds nothing but what was named, read-only but for `folder`; processes, network,
  host name, System V memory and message queues of its own. Where a container refuses them, Landlock and the
  filter do their work alone: the same rules, but there is no /dev/shm, changing a file's mode or times does
  nothing, and files outside can be seen to exist.
* Landlock: files that were not named cannot be read, run or changed by whatever name; no TCP, no signals and
  abstract sockets to the outside.
* seccomp: no sockets, no ptrace or reading of another's memory, no io_uring, mounts, keys, BPF, namespaces.
  The kernel asks the supervisor about every file that is opened and every program that is started. What is
  read it opens itself and hands over, so that the name cannot be changed after it was noted.
* no capabilities, no new privileges, no file descriptors but output and an empty input, limits on CPU time
  and processes, a cap on the output that is kept.

Not shut out: a full disk, and changed files of an installed distribution whose RECORD was changed with them.
"""

import base64
import contextlib
import csv
import errno
import functools
import hashlib
import json
import os
import platform
import site
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from auditing.run import NotChecked, printable

JAIL = Path(__file__).with_name("jail.py")
KEPT = 8 << 20  # bytes of output: the last ones
MOST_TASKS = 1_000  # processes and threads
PATIENCE = 30.0  # seconds beyond its time limit for killing and telling

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/opt/nvidia", "/proc", "/sys")
ETC = (
    "ld.so.cache",
    "localtime",
    "passwd",
    "group",
    "nsswitch.conf",
    "alternatives",
    "ssl/openssl.cnf",
    "OpenCL",
)
DEVICES = ("null", "zero", "full", "random", "urandom", "shm")
LIBRARIES = (
    "/lib",
    "/lib32",
    "/lib64",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/include",
    "/bin",
    "/sbin",
)
LIBRARIES += ("/usr/bin", "/usr/sbin", "/usr/share/locale", "/usr/share/zoneinfo", "/usr/local/cuda", "/proc")
LIBRARIES += ("/usr/local/lib", "/usr/local/nvidia", os.path.realpath("/usr/local/cuda"))
LIBRARIES += ("/sys", "/dev", "/etc", "/run", "/var/run", "/opt/nvidia")


class Ran(NamedTuple):
    """What a program did: exit code (minus a signal's number), output, and files by their absolute names.

    `opened` lacks directories, what was only written, and libraries (`is_library`); `refused` has the files
    that were wanted and not given or not to be written, and sockets, as "network AF_INET".
    """

    code: int
    output: str
    errors: str
    opened: list[str]
    refused: list[str]
    seconds: float
    timed_out: bool


def run(
    command: Sequence[str],
    folder: Path,
    *,
    readable: Sequence[Path] = (),
    environment: Mapping[str, str] = {},
    timeout: float = 600,
    memory: int | None = None,
    enough: Callable[[bytes], bool] = lambda output: False,
) -> Ran:
    """Run a command in `folder`. `memory`: bytes that a process may have. Raises NotChecked without a box.

    Whoever wants no more than the beginning says when the output so far is `enough`: then all is killed.
    """
    if reason := available():
        raise NotChecked(reason)
    namespaces = not _lacks(True)
    return _run(command, folder, readable, environment, timeout, memory, namespaces, enough)


def available() -> str:
    """ "" where the box can be made, else the reason in a line."""
    return _lacks(True) and _lacks(False)


@functools.cache
def _lacks(namespaces: bool) -> str:
    """Why the box cannot be made with these means: tried with a program that does nothing."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "no box: made for Linux on x86-64"
    with tempfile.TemporaryDirectory() as folder:
        try:
            _run(["/proc/self/exe"], Path(folder), (), {}, 30, None, namespaces)
        except NotChecked as reason:
            return str(reason)
    return ""


def _normalised(program: str) -> str:
    """The program's path as the box knows it: there, no `..` leads to where it lies."""
    return os.path.abspath(program) if os.sep in program else program


def _run(
    command: Sequence[str],
    folder: Path,
    readable: Sequence[Path],
    environment: Mapping[str, str],
    timeout: float,
    memory: int | None,
    namespaces: bool,
    enough: Callable[[bytes], bool] = lambda output: False,
) -> Ran:
    folder = folder.resolve()
    given = {str(folder): True} | {os.path.abspath(path): False for path in readable}
    paths, links = _visible(given, namespaces)
    plan = {
        "command": [_normalised(str(command[0])), *map(str, command[1:])],
        "environment": _environment(folder) | {name: str(value) for name, value in environment.items()},
        "folder": str(folder),
        "paths": paths,
        "links": links,
        "namespaces": namespaces,
        "timeout": timeout,
        "tasks": MOST_TASKS,
        "memory": memory,
    }
    start = time.perf_counter()
    report, output, errors = _carry_out(plan, enough)
    seconds = time.perf_counter() - start
    if "error" in report:
        raise NotChecked(f"no box: {report['error']}")
    opened = sorted(name for name in report["opened"] if not is_library(name))
    refused = _missed(plan, report["failed"]) + report["network"]
    names = [list(map(printable, names)) for names in (opened, refused)]
    late = report["timed_out"] and not enough(output.encode())
    return Ran(report["code"], output, errors, *names, seconds, late)


def _carry_out(plan: Mapping, enough: Callable[[bytes], bool]) -> tuple[dict, str, str]:
    """Start jail.py, give it the plan: its report, and the program's output and errors."""

    def look(text: bytearray) -> None:
        if enough(bytes(text)):
            with contextlib.suppress(OSError):  # it has ended by itself
                ours.shutdown(socket.SHUT_WR)  # the supervisor sees that nobody wants it any more

    ours, theirs = socket.socketpair()
    command = [sys.executable, "-I", "-S", str(JAIL), str(theirs.fileno())]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env={}, pass_fds=[theirs.fileno()], start_new_session=True, **pipes)
    with ours, process:
        theirs.close()
        texts = [bytearray(), bytearray()]
        readers = [
            threading.Thread(target=_keep, args=part, daemon=True)
            for part in zip((process.stdout, process.stderr), texts, (look, None), strict=True)
        ]
        for reader in readers:
            reader.start()
        ours.settimeout(plan["timeout"] + PATIENCE)
        try:
            ours.sendall(json.dumps(plan).encode() + b"\n")
            answer = b"".join(iter(lambda: ours.recv(1 << 16), b""))
        except OSError as error:
            answer = json.dumps({"error": f"its supervisor does not answer ({error})"}).encode()
        finally:
            ours.close()
            process.kill()  # either ends the supervisor, and that all who are left
        for reader in readers:
            reader.join(PATIENCE)
    output, errors = (bytes(text).decode(errors="replace") for text in texts)
    missing = {"error": f"its supervisor ended without a word {errors[-200:]}".strip()}
    return json.loads(answer) if answer else missing, output, errors


def _keep(pipe: IO[bytes], text: bytearray, look: Callable[[bytearray], None] | None) -> None:
    """Read to the end; keep the last bytes, and have somebody look at them."""
    while part := os.read(pipe.fileno(), 1 << 16):
        text += part
        del text[: max(0, len(text) - KEPT)]
        if look:
            look(text)


def _environment(folder: Path) -> dict[str, str]:
    """What every program needs."""
    paths = [os.path.dirname(sys.executable), "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"]
    places = dict.fromkeys(("HOME", "TMPDIR"), str(folder))
    return places | {"PATH": ":".join(paths), "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}


# -- what may be seen


def _visible(given: Mapping[str, bool], namespaces: bool) -> tuple[list, dict[str, str]]:
    """(path, where it is really, may be written) of all that the program sees; links by their place."""
    devices = {f"/dev/{name}": True for name in DEVICES if name != "shm" or namespaces}
    devices |= {str(path): True for path in Path("/dev").glob("nvidia*")}
    wanted = dict.fromkeys([*SYSTEM, *(f"/etc/{name}" for name in ETC), *_installation()], False)
    wanted = {path: may for path, may in (wanted | devices | given).items() if os.path.exists(path)}
    links = {path: os.readlink(path) for path in SYSTEM if os.path.islink(path)}
    wanted |= {os.path.realpath(path): may for path, may in wanted.items()}  # where links among them lead
    paths = [(path, os.path.realpath(path), may) for path, may in wanted.items() if path not in links]
    return paths, links


@functools.cache
def _installation() -> list[str]:
    """Folders of Python and of what is installed for it."""
    folders = [sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, *_sites()]
    return [folder for folder in dict.fromkeys(folders) if os.path.isdir(folder)]


@functools.cache
def _sites() -> list[str]:
    """Folders that hold installed distributions."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    real = map(os.path.realpath, [*folders, site.getusersitepackages()])
    return [folder for folder in dict.fromkeys(real) if os.path.isdir(folder)]


def _within(name: str, folder: str) -> bool:
    return f"{name}/".startswith(f"{folder.rstrip('/')}/")


def _missed(plan: Mapping, failed: Mapping[str, int]) -> list[str]:
    """Files that are there and were not given, or were to be written outside.

    Others do not exist: libraries are looked for in many places.
    """
    found = set()
    for name, code in failed.items():
        if _within(name, "/proc"):  # means another thing here
            continue
        real = os.path.realpath(name)
        given = any(_within(real, path) for place in plan["paths"] for path in place[:2])
        there = os.path.lexists(real) and not os.path.isdir(real)
        if (code == errno.EROFS or there and not given) and not is_library(real):
            found.add(real)
    return sorted(found)


def is_library(name: str) -> bool:
    """A file of the system, of Python, or of an installed distribution, as that was when it was installed."""
    real, (standard, own) = os.path.realpath(name), _places()
    for folder in _sites():
        if _within(real, folder):
            return _installed(folder, real)
    if _within(real, standard):
        top = os.path.relpath(real, standard).split(os.sep)[0].partition(".")[0]
        return top in sys.stdlib_module_names or top in ("lib-dynload", "__pycache__", "LICENSE")
    return any(_within(path, folder) for folder in own for path in (name, real))


@functools.cache
def _places() -> tuple[str, list[str]]:
    """The folder of Python's own modules, and other places that hold what came with it or the system."""
    prefixes = {os.path.realpath(prefix) for prefix in (sys.prefix, sys.base_prefix)}
    own = [f"{prefix}/{part}" for prefix in prefixes for part in ("bin", "pyvenv.cfg", "pybuilddir.txt")]
    own += [str(path) for prefix in prefixes for path in Path(prefix).glob("lib/*.so*")]
    return os.path.realpath(sysconfig.get_path("stdlib")), [*LIBRARIES, *own]


@functools.cache
def _records(folder: str) -> dict[str, str]:
    """The hash of every file that the distributions in a folder say is theirs, "" where they give none."""
    found = {}
    for path in Path(folder).glob("*.dist-info/RECORD"):
        with path.open(newline="", encoding="utf-8") as file:
            for name, told, *_ in filter(None, csv.reader(file)):
                found[os.path.normpath(os.path.join(folder, name))] = told
    return found


def _installed(folder: str, name: str) -> bool:
    """A distribution has this file; compiled modules are those of their source."""
    if name.endswith(".pyc") and os.path.basename(os.path.dirname(name)) == "__pycache__":
        parent, module = os.path.dirname(os.path.dirname(name)), os.path.basename(name).partition(".")[0]
        name = os.path.join(parent, f"{module}.py")
    told = _records(folder).get(name)
    if told is None:
        return False
    kind, _, value = told.partition("=")
    return kind != "sha256" or value == _hash(name, os.stat(name).st_mtime_ns)


@functools.cache
def _hash(name: str, _: int) -> str:
    """SHA-256 as a RECORD has it."""
    with open(name, "rb") as file:
        found = hashlib.file_digest(file, "sha256").digest()
    return base64.urlsafe_b64encode(found).rstrip(b"=").decode()


def strange_libraries(names: Iterable[str] = ()) -> list[str]:
    """Files that change what Python does at its start and belong to no distribution, and those of `names`."""
    found = {
        name for name in names if any(_within(name, folder) for folder in _sites()) and not is_library(name)
    }
    for folder in _sites():
        starters = [*Path(folder).glob("*.pth"), *Path(folder).glob("*customize*")]
        found |= {str(path) for path in starters if not is_library(str(path))}
    return sorted(found)
