"""The arithmetic of bench/side_by_side.py, and what it refuses."""

import math
import subprocess
import sys

import pytest
from house import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import side_by_side  # noqa: E402
from side_by_side import summary  # noqa: E402


def test_ratio_is_the_geometric_mean_of_blocks():
    """Of the blocks' ratios 1/2 and 1/8 it is 1/4; the interval is Student's, of one degree."""
    figures = summary([(2.0, 1.0, 1.0, 2.0), (8.0, 1.0, 1.0, 8.0)])
    assert figures["ratio"] == pytest.approx(0.25)
    assert math.log(figures["high"] / 0.25) == pytest.approx(12.71 * math.log(2), rel=1e-3)
    assert figures["low"] * figures["high"] == pytest.approx(0.25**2)
    assert (figures["before"], figures["now"]) == (5.0, 1.0)
    assert summary([(2.0, 1.0, 1.0, 2.0)])["high"] == math.inf


def test_seconds_and_memory_of_the_demo_are_of_the_same_runs(monkeypatch, tmp_path):
    """Four runs for both keys; a key's own column of what they cost."""
    costs = iter([(8.0, 100.0), (2.0, 50.0), (2.0, 50.0), (8.0, 100.0)])
    monkeypatch.setattr(side_by_side, "measured", lambda *arguments: next(costs))
    rows = side_by_side.compare(["demo", "demo_rss"], tmp_path, 1, {}, {})
    assert [(row["key"], row["ratio"]) for row in rows] == [("demo", 0.25), ("demo_rss", 0.5)]


def test_what_a_revision_needs_besides_is_installed_for_it_alone(monkeypatch, tmp_path):
    """What is here already is not; comments and empty lines are nothing."""
    commands = []
    monkeypatch.setattr(side_by_side, "process", lambda command, *rest: commands.append(command))
    required = tmp_path / "requirements.txt"
    required.write_text("# Pinned.\nnumpy==1.0\n\n")
    assert side_by_side.add_packages(tmp_path, tmp_path / "packages") == {} and not commands
    required.write_text("numpy==1.0\nnot_here_at-all==0.5\n")
    assert side_by_side.add_packages(tmp_path, tmp_path / "packages") == {
        "PYTHONPATH": str(tmp_path / "packages")
    }
    assert commands[0][-3:] == ["--target", str(tmp_path / "packages"), "not_here_at-all==0.5"]


@pytest.mark.parametrize(("code", "ends"), [(0, False), (3, False), (1, True)])
def test_a_limit_of_the_contest_is_no_failure(code, ends, tmp_path):
    """The demo on a busy machine ends with exit code 3."""
    command = [sys.executable, "-c", f"print('text'); raise SystemExit({code})"]
    if ends:
        with pytest.raises(SystemExit, match="exit code 1"):
            side_by_side.process(command, tmp_path, {})
    else:
        assert side_by_side.process(command, tmp_path, {})[2] == "text\n"


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
