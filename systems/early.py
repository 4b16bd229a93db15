"""What is said where a program ends while it still imports: one line, no traceback. To be imported first."""

import os
import signal
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import NoReturn

ROOT, PROGRAM = Path(__file__).resolve().parents[1], Path(sys.argv[0]).resolve()
REQUIREMENTS = {"tools": "requirements-dev.txt", "bench": "requirements-dev.txt"}  # of other folders: to run


def say_in_a_line(kind: type, error: BaseException, trace: TracebackType | None) -> None:
    """What an error that nobody takes is told by: one line for a library that is not there, and Ctrl-C."""
    name = str(getattr(error, "name", "")).partition(".")[0]
    if kind is KeyboardInterrupt:
        leave("interrupted", 128 + signal.SIGINT)
    ours = (ROOT / name).is_dir() or any(ROOT.glob(f"*/{name}.py"))
    if kind is not ModuleNotFoundError or ours:
        return sys.__excepthook__(kind, error, trace)
    made = ROOT / ".venv/bin/python"
    needed = REQUIREMENTS.get(PROGRAM.parent.name, "requirements.txt")
    get = f"python3.11 -m venv .venv && .venv/bin/pip install -r {needed}"
    text = f"start it with {made}" if made.exists() else f"make the environment in {ROOT}: {get}"
    leave(f"{name} is not installed for {sys.executable}: {text}", 2)


def leave(text: str, code: int) -> NoReturn:
    """Say it in one line and end."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(2)  # torchrun ends this rank meanwhile, if rank 0 has met the same
    print(f"{PROGRAM.name}: error: {text}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


# A program of this repository, and none that only imports from it: that has its own ways.
if PROGRAM.is_file() and ROOT in PROGRAM.parents[:2]:
    sys.excepthook = say_in_a_line
