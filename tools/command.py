"""What the tools' command lines share: a mistake is one line on standard error and exit code 2.

A tool imports this first: what is missing of all that it imports then is such a line, too.
"""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import systems.early  # noqa: E402, F401 - what is missing of the rest is said in one line
from systems.console import keep_consoles  # noqa: E402


class Mistake(ValueError):
    """The command makes no sense, or names what cannot be read: one line, exit code 2."""


class Parser(argparse.ArgumentParser):
    """Explains itself with a tool's docstring; raises `Mistake` instead of printing the usage."""

    def __init__(self, text: str):
        super().__init__(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> None:
        """Raise what argparse would print."""
        raise Mistake(message)


def start(main: Callable[..., int], *arguments: object) -> NoReturn:
    """Run a tool to its end, also where its output cannot be written, and leave with its exit code.

    Where that would be 0 without all of the output, it is that of a closed pipe (`| head`, without a word).
    What the system refuses is a mistake that names the file: a name that is too long, a folder of others.
    """
    keep_consoles()
    tool = Path(sys.argv[0]).name
    try:
        code = main(*arguments)
    except OSError as error:
        if error.filename is None:  # of no file that the command could have named
            raise
        code = complain(tool, error)
    sys.stdout.flush()
    lost = getattr(sys.stdout, "lost", "")
    if lost not in ("", os.strerror(errno.EPIPE)):
        complain(tool, OSError(f"standard output cannot be written ({lost})"))
    sys.exit(code or (128 + signal.SIGPIPE if lost else 0))


def complain(tool: str, error: Exception) -> int:
    """Print a mistake as one line; returns the exit code. An OSError names its file first, as ours do."""
    told = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
    print(f"{tool}: error: {' '.join(told.split())}", file=sys.stderr)
    return 2
