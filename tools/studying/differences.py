"""Statistics of paired differences: the same seed in two arms, weights and batches alike."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

LEVEL = 0.95  # of all intervals


class Difference(NamedTuple):
    """Mean of paired differences with its spread; `half` is half the width of the 95 % t interval."""

    mean: float
    sd: float | None  # sample standard deviation; None: of a single pair
    half: float | None
    pairs: int

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval is below zero."""
        return self.half is not None and self.mean + self.half < 0

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval is above zero."""
        return self.half is not None and self.mean - self.half > 0


def paired(values: Mapping[str, float], control: Mapping[str, float]) -> Difference | None:
    """Differences of an arm from the control over the seeds that both have; None without such a seed."""
    return summarised([values[seed] - control[seed] for seed in values if seed in control])


def summarised(values: Sequence[float]) -> Difference | None:
    """Mean, sample standard deviation and t interval of numbers; None where there are none."""
    if not values:
        return None
    mean, pairs = statistics.mean(values), len(values)
    if pairs == 1:
        return Difference(mean, None, None, 1)
    sd = statistics.stdev(values)
    return Difference(mean, sd, t_quantile(pairs - 1) * sd / math.sqrt(pairs), pairs)


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """The t that a Student variable of `freedom` degrees stays within, in size, with probability `level`.

    Bisection on the angle atan(t / sqrt(freedom)), which runs from 0 to a quarter of a turn.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) tan(angle)): the finite series for whole degrees (Abramowitz, Stegun 26.7.3)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = total = (cosine if freedom > 1 else 0.0) if odd else 1.0
    for k in range(2 + odd, freedom, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
