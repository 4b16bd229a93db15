"""Standard output and error of work that goes on where they cannot be written: a closed pipe, a full disk."""

import os
import sys
from typing import TextIO

CLEAR = "\r\x1b[J"  # what a terminal does then: the cursor's line is empty, and so are those below


class Console:
    """A stream that is given up, instead of ending what writes to it; `lost` says why.

    What its encoding lacks is written as an escape. An unfinished line on a terminal (`show_progress`) is
    cleared before anything else is written, on either stream.
    """

    unfinished: "list[Console]" = []  # the console whose terminal shows a line without an end, or none

    def __init__(self, stream: TextIO | None):
        self.lost = "" if stream else "closed"
        self._stream = stream or open(os.devnull, "w")  # noqa: SIM115 - as long as the process lives
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, or nothing where the stream is lost."""
        while self.unfinished:
            self.unfinished.pop().write(CLEAR)
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Let what was written appear."""
        self._try(self._stream.flush)

    def show_progress(self, line: str, is_last: bool) -> None:
        """Write a line over the one before it; the last one stays.

        The cursor waits at its beginning: a terminal that becomes narrow folds the line, and all is cleared.
        """
        self.unfinished.clear()
        self.write(f"{CLEAR}{line}" + ("\n" if is_last else "\r"))
        self.flush()
        if not is_last:
            self.unfinished.append(self)

    def _try(self, function: object, *arguments: object) -> None:
        if self.lost:
            return
        try:
            function(*arguments)
        except OSError as error:
            self.lost = error.strerror or str(error)
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())  # for what is written past this object, as at the end
            os.close(nothing)


def keep_consoles() -> None:
    """Let this process outlive its consoles; a test's capture in their place is left as it is.

    A closed one is opened on nothing: the next file that is opened would have its number, and get its lines.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is getattr(sys, f"__{name}__"):
            setattr(sys, name, Console(getattr(sys, name)))


def lost_consoles() -> list[str]:
    """Which of the two were given up, and why."""
    named = (("standard output", sys.stdout), ("standard error", sys.stderr))
    return [f"{name} ({stream.lost})" for name, stream in named if getattr(stream, "lost", "")]
