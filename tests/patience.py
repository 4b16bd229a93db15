"""How long a test waits for what must come: so long that on a busy machine nothing fails but what hangs.

What is to be ended by others sleeps for an hour: where nobody ends it, who waits for its end fails.
"""

import time
from collections.abc import Callable

PATIENCE = 900  # seconds


def wait_for(condition: Callable[[], object]) -> object:
    """The first true value of a function."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return value
