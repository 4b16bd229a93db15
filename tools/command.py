"""What the tools' command lines share: a mistake is one line on standard error and exit code 2."""

import argparse
import signal
import sys
from collections.abc import Callable
from typing import NoReturn


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
    """Run a tool and leave with its exit code; without a word where its reader has had enough (`| head`)."""
    try:
        sys.exit(main(*arguments))
    except BrokenPipeError:
        sys.exit(128 + signal.SIGPIPE)
    finally:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # for what Python writes at its end


def complain(tool: str, error: Exception) -> int:
    """Print a mistake as one line; returns the exit code."""
    print(f"{tool}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
