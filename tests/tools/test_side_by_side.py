"""The arithmetic of bench/side_by_side.py, and what it refuses."""

import math
import subprocess
import sys

import pytest
from house import ROOT

sys.path.insert(0, str(ROOT / "bench"))
from side_by_side import summary  # noqa: E402


def test_ratio_is_the_geometric_mean_of_blocks():
    """Of the blocks' ratios 1/2 and 1/8 it is 1/4; the interval is Student's, of one degree."""
    figures = summary([(2.0, 1.0, 1.0, 2.0), (8.0, 1.0, 1.0, 8.0)])
    assert figures["ratio"] == pytest.approx(0.25)
    assert math.log(figures["high"] / 0.25) == pytest.approx(12.71 * math.log(2), rel=1e-3)
    assert figures["low"] * figures["high"] == pytest.approx(0.25**2)
    assert (figures["before"], figures["now"]) == (5.0, 1.0)
    assert summary([(2.0, 1.0, 1.0, 2.0)])["high"] == math.inf


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], "bench: --before or --peer: one of them is needed"),
        (["--before", "HEAD", "--keys", "speed"], "bench: --keys speed: must be some of step,"),
        (["--peer", "nowhere.py"], "bench: --peer nowhere.py: no such file"),
        (["--before", "no-such-thing"], "bench: --before no-such-thing: no such revision here"),
    ],
)
def test_mistakes_are_one_line(options, line):
    command = [sys.executable, str(ROOT / "bench" / "side_by_side.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.startswith(line) and len(done.stderr.splitlines()) == 1
