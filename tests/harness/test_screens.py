"""A whole run on the consoles that people have: a terminal that is resized, pipes, files, two ranks."""

import contextlib
import fcntl
import io
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from quick_run import QUICK
from test_smoke import environment, make_data, read_result

from systems.console import Console

RUN = {"DATA_PATH": "data", "ARTIFACT_DIR": "run", "RUN_ID": "watched", "CONSOLE": "auto", "TERM": "xterm"}
ALONE, TWO_RANKS = [QUICK], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", QUICK]
LIVE = (  # what the live line tells of, one after another
    *("warm-up", "scoring untrained", "training", "scoring trained", "calibrating and quantising"),
    *("packing the code", "scoring quantised", "preparing the adaptation", "adapting"),
)
LASTING = (  # beginnings of lines that stay, in their order
    *("Run watched, folder run", "On ", "With python ", "Checked: ", "Model: ", "Speed: "),
    *("Untrained: val_bpb ", "Trained in ", "Trained: val_bpb ", "Matrices: ", "Artifact: ", "Size: "),
    *("Quantised: val_bpb ", "Adapted: val_bpb ", "", "trained ", "quantised ", "adapted ", ""),
    *("bytes ", "limits ", "legal ", "log ", "next    make report RUN_DIR=run"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with data, in which runs begin."""
    work = tmp_path_factory.mktemp("screens")
    make_data(work / "data")
    return work


@pytest.fixture(autouse=True)
def no_run(folder):
    """Each begins without the files of another."""
    shutil.rmtree(folder / "run", ignore_errors=True)


class Screen:
    """A terminal that knows what a run may write: text, line ends, colours, and to clear what is below.

    Rows that have scrolled away are kept; `overflows` counts lines that were longer than the screen is wide.
    """

    def __init__(self, columns: int):
        self.columns, self.column, self.row, self.overflows, self.rows = columns, 0, 0, 0, [""]

    def feed(self, text: str) -> None:
        """Show what was written."""
        for part in re.findall(r"\x1b\[\d*m|\x1b\[J|[\r\n]|[^\x1b\r\n]+|.", text):
            here = self.rows[self.row]
            if part == "\r":
                self.column = 0
            elif part == "\n":
                self.row += 1
                self.rows += [""] * (self.row == len(self.rows))
            elif part == "\x1b[J":
                self.rows[self.row :] = [here[: self.column]]
            elif not re.fullmatch(r"\x1b\[\d*m", part):
                assert part.isprintable(), f"{part!r} is no text"
                end = self.column + len(part)
                self.rows[self.row] = here[: self.column].ljust(self.column) + part + here[end:]
                self.column, self.overflows = end, self.overflows + (end > self.columns)

    def become(self, columns: int) -> None:
        """Another width: the cursor's line is folded, and the cursor stays at its text."""
        self.columns, here = columns, self.rows[self.row]
        parts = [here[i : i + columns] for i in range(0, len(here), columns)]
        self.rows[self.row :] = parts or [""]
        self.row, self.column = self.row + self.column // columns, self.column % columns


def resize(terminal: int, columns: int, rows: int) -> None:
    """Give a terminal another size."""
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def watched(folder: Path, command: list, wider_at: str = "", **settings: object) -> tuple[Screen, str]:
    """A run on a terminal of 80 x 24, from a word on of 120 x 40: its screen, and all that it wrote."""
    ours, its = pty.openpty()
    resize(ours, 80, 24)
    screen, written = Screen(80), ""
    options = {"cwd": folder, "env": environment(**RUN | settings)}
    options |= dict.fromkeys(("stdin", "stdout", "stderr"), its)
    with subprocess.Popen([sys.executable, *map(str, command)], **options) as process:
        os.close(its)
        with contextlib.suppress(OSError):  # how Linux tells that nobody has the other end
            while data := os.read(ours, 1 << 16):
                screen.feed(data.decode())
                written += data.decode()
                if wider_at and wider_at in written and screen.columns == 80:
                    screen.become(120)
                    resize(ours, 120, 40)
    os.close(ours)
    assert process.returncode == 0, written
    return screen, written


def has_in_order(rows: list[str], beginnings: tuple[str, ...]) -> bool:
    """Whether there is a row for each beginning, each behind the one before."""
    left = iter(rows)
    fits = lambda row, start: row.startswith(start) and bool(row) == bool(start)  # noqa: E731
    return all(any(fits(row, start) for row in left) for start in beginnings)


@pytest.mark.parametrize("command", [ALONE, TWO_RANKS], ids=["alone", "two ranks"])
def test_a_run_on_a_terminal_that_is_resized(folder, command):
    screen, written = watched(folder, command, wider_at="Trained in", VAL_LOSS_EVERY=50, AUDIT=1)
    assert has_in_order(screen.rows, LASTING), "\n".join(screen.rows)
    assert "Traceback" not in written and screen.overflows == 0
    live = re.findall(r"\r\x1b\[J([^\r\n\x1b]+)(?=\r\r\x1b\[J)", written)
    told = [name for name in LIVE if any(line.startswith(name) for line in live)]
    assert told == [*LIVE] and max(map(len, live)) < 120
    remains = [row for row in screen.rows if re.search(r"\d%  | \.\.\.$", row)]
    assert remains == [], "a live line has been left on the screen"
    for start in filter(None, LASTING):  # of several ranks, one speaks
        assert sum(row.startswith(start) for row in screen.rows) == 1, start


def test_a_live_line_that_a_narrow_terminal_folds_is_cleared_whole():
    console, screen = Console(io.StringIO()), Screen(80)
    console.write("a line that stays\n")
    console.show_progress("training " * 8, is_last=False)
    screen.feed(console.getvalue())
    screen.become(30)
    assert len(screen.rows) == 4
    drawn = len(console.getvalue())
    console.show_progress("training", is_last=False)
    console.write("the end\n")
    screen.feed(console.getvalue()[drawn:])
    assert screen.rows == ["a line that stays", "the end", ""]


@pytest.mark.parametrize(
    ("console", "lines"),
    [
        ("> said", None),
        ("| cat > said", None),
        ("| head -n 5 > said", 5),
        ("| true", 0),
        ("2>&1 > /dev/full", 0),
    ],
)
def test_a_run_whose_console_is_no_terminal(folder, console, lines):
    """What nobody reads any more is given up, and the run goes on to its end."""
    (folder / "said").write_text("")
    shell = f'set -o pipefail; "$0" "$1" {console}; echo "${{PIPESTATUS[0]}}" > code'
    options = {"cwd": folder, "env": environment(**RUN, ITERATIONS=2, TTT_ENABLED=0), "capture_output": True}
    done = subprocess.run(["bash", "-c", shell, sys.executable, str(QUICK)], **options)
    assert ((folder / "code").read_text(), done.stderr) == ("0\n", b"")
    said, log = (folder / "said").read_text(), (folder / "run/logs/watched.txt").read_text()
    assert read_result(folder / "run")["final_stage"] == "quantised"
    assert "\x1b" not in said and "\r" not in said
    if lines is None:
        kept = [start for start in LASTING if not re.match(r"Untrained|[Aa]dapted", start)]
        assert has_in_order(said.split("\n"), tuple(kept)), said
    else:
        assert len(said.splitlines()) == lines and "given up, the run goes on without: standard output" in log


@pytest.mark.skipif(not shutil.which("script"), reason="needs script, of util-linux")
def test_a_run_that_script_writes_down(folder):
    command = ["script", "-qec", f"{sys.executable} {QUICK}", "typescript"]
    options = {"cwd": folder, "env": environment(**RUN, ITERATIONS=2, TTT_ENABLED=0), "capture_output": True}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, **options)
    assert done.returncode == 0, done.stdout
    screen = Screen(80)
    screen.feed(done.stdout.decode())
    assert "next    make report RUN_DIR=run" in screen.rows and screen.overflows == 0
