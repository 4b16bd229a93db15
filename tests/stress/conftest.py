"""What the fuzzers share: a seed, a number of cases, and a random generator for each of them."""

import os
import random

import pytest

SEED, FACTOR = os.environ.get("STRESS_SEED", "1"), os.environ.get("STRESS_CASES", "1")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with `@pytest.mark.cases(n)` runs n times, times STRESS_CASES; `rng` is another each time."""
    marker = metafunc.definition.get_closest_marker("cases")
    if marker:
        numbers = range(max(1, round(marker.args[0] * float(FACTOR))))
        metafunc.parametrize("rng", numbers, indirect=True, ids="case{}".format)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """The generator of a case. What is printed is shown where the case fails: how it can be run again."""
    node = request.node
    print(f"STRESS_SEED={SEED} STRESS_CASES={FACTOR} python -m pytest '{node.nodeid}'")
    return random.Random(f"{SEED} {node.originalname} {request.param}")
