"""A run that a tool watches over: it ends with its tool, however that ends, and when a signal says so."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from harness.stopping import unless_ignored

PATIENCE = 40  # seconds that a run has to end in once it is told to; torchrun gives its ranks 30
GUARD = """read _  # the tool writes nothing: this returns when it is gone, even by kill -9
kill -TERM -$1 || exit
for second in $(seq $2); do sleep 1; kill -0 -$1 || exit; done
kill -KILL -$1"""


class Stop:
    """Set by a signal to stop: the run under way is ended, then the tool."""

    signal = 0  # of the process: a storage that waits looks at it too

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals while entered."""
        Stop.signal = 0
        numbers = [signal.SIGINT, signal.SIGTERM, *unless_ignored(signal.SIGHUP, signal.SIGUSR1)]
        before = {number: signal.getsignal(number) for number in numbers}
        for number in before:
            signal.signal(number, self._take)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, _: object) -> None:
        Stop.signal = number


def last_line(path: Path) -> str:
    """The last line of a console that is not empty."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "no output")


@contextlib.contextmanager
def guarded(process: subprocess.Popen) -> Iterator[None]:
    """End a run with the block, and even where the tool is killed in it: a shell of its own sees to that."""
    command = ["sh", "-c", GUARD, "guard", str(process.pid), str(PATIENCE)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, **quiet) as guard:
        try:
            yield
        finally:
            if process.poll() is None:
                end(process)
            guard.kill()


def end(process: subprocess.Popen) -> None:
    """End a run and all its processes: first by asking."""
    for number, patience in ((signal.SIGTERM, PATIENCE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):  # no process of the run is left
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
