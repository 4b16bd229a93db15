"""How a run is told to stop: by signals, also where it waits for something that does not come."""

import os
import signal
import threading
from types import FrameType

from train_gpt import Ranks, Run

# What a forked process is sent is not for the run that it comes from.
os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))

PATIENCE = 10.0  # seconds from a signal until a call that does not return is given up; torchrun waits for 30


class Stopped(BaseException):
    """A signal to stop: everything is left whole; exit code 128 + number."""

    def __init__(self, number: int):
        super().__init__(f"told to stop ({signal.Signals(number).name})")
        self.code = 128 + number


class StopSignals:
    """While entered, what tells a run to stop raises Stopped; a second signal ends all.

    SIGTERM (torchrun's, when another rank has failed), SIGINT, SIGHUP (the terminal is gone) and SIGUSR1 (a
    batch system, before its time limit). The last two are left ignored where they are, as by `nohup`.
    Where `ranks.stage_handles_stop`, whoever watches the stage looks at `ranks.stop_signal` and raises it.

    Python handles a signal between two of its own instructions, so never in a collective whose other rank
    is dead, and not before a minute's compression is over. A thread of its own reads the signals as they
    come, and ends the process if none has been handled for `patience` seconds.
    """

    def __init__(self, ranks: Ranks, patience: float = PATIENCE):
        self.run: Run | None = None  # tells the stage, once there is one
        self._ranks, self._patience = ranks, patience
        self._left = threading.Event()

    @property
    def stage(self) -> str:
        """The stage of the run."""
        return self.run.clock.current if self.run else "start"

    def __enter__(self) -> "StopSignals":
        numbers = [signal.SIGTERM, signal.SIGINT, *unless_ignored(signal.SIGHUP, signal.SIGUSR1)]
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, args=[reader, set(numbers)], daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._writer)
        self._thread.join()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._ranks.stop_signal:
            os._exit(128 + number)
        self._ranks.stop_signal = number
        if not self._ranks.stage_handles_stop:
            raise Stopped(number)

    def _watch(self, reader: int, numbers: set[int]) -> None:
        """Wait for a signal, then for its handling: by the handler, or by the end of the run."""
        with open(reader, "rb", buffering=0) as signals:
            while byte := signals.read(1):
                stopped = Stopped(byte[0])
                if byte[0] in numbers and not (self._left.wait(self._patience) or self._ranks.stop_signal):
                    self._ranks.say(f"stage {self.stage}: {stopped}, amid a call that does not return")
                    os._exit(stopped.code)


def unless_ignored(*numbers: int) -> list[int]:
    """The signals that this process was not started to ignore."""
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
