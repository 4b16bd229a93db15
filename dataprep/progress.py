"""How far a long piece of work is."""

import sys
import time
from collections.abc import Callable
from typing import Any


class Progress:
    """On a terminal a bar, else a line a minute on stderr."""

    def __init__(self, total: int = 0, position: Callable[[], int] | None = None) -> None:
        """`total` bytes of input, 0 where it is not known, and how many are read, by default all done."""
        self._total, self._position = total, position or (lambda: self._bytes)
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm  # imported where it is used: that takes a tenth of a start

            self._bar = tqdm(total=total or None, unit="B", unit_scale=True)
        self._start = self._said = time.monotonic()
        self._bytes = 0

    def update(self, documents: int, size: int) -> None:
        """`size` more bytes of input are done, `documents` in all."""
        self._bytes += size
        now = time.monotonic()
        rate = self._bytes / 1e6 / max(now - self._start, 1e-9)
        position = self._position()
        if self._bar is not None:
            self._bar.set_postfix_str(f"documents={documents} MB/s={rate:.1f}", refresh=False)
            self._bar.update(position - self._bar.n)
        elif now - self._said >= 60:
            self._said = now
            line = f"documents:{documents} megabytes:{self._bytes / 1e6:.0f} megabytes_per_second:{rate:.1f}"
            if self._total and position:
                left = (now - self._start) * (self._total / position - 1)
                line += f" remaining_minutes:{left / 60:.0f}"
            print(line, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A remark that does not disturb the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
