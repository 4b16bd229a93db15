"""A run, and every tool, outlives its console; what tells a run to stop stops it."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from systems.console import Console

ROOT = Path(__file__).resolve().parents[2]
KEPT = "import os, sys\nfrom systems.console import keep_consoles, lost_consoles\nkeep_consoles()\n"


def process(code: str, shell: str = "", **variables: str) -> subprocess.CompletedProcess:
    """Run code in a process whose console a shell has changed; its last words are in the file `said`."""
    command = f'exec "$0" -c "$1" {shell}'
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}", **variables}
    return subprocess.run(["sh", "-c", command, sys.executable, code], env=environ, capture_output=True)


@pytest.mark.parametrize(
    ("shell", "lost"),
    [
        (">/dev/full", ["standard output (No space left on device)"]),
        ("2>/dev/full", ["standard error (No space left on device)"]),
        (">&- 2>&- <&-", ["standard output (closed)", "standard error (closed)"]),
        ("", []),
    ],
)
def test_a_console_that_cannot_be_written_is_given_up(tmp_path, shell, lost):
    code = f"{KEPT}for _ in range(2): print('a line', flush=True); print('b', file=sys.stderr, flush=True)\n"
    code += (
        f"file = open({str(tmp_path / 'said')!r}, 'w')\nprint(file.fileno() > 2, lost_consoles(), file=file)"
    )
    done = process(code, shell)
    assert (tmp_path / "said").read_text() == f"True {lost}\n"
    assert done.returncode == 0
    assert done.stdout.count(b"a line") == (0 if "standard output" in str(lost) else 2)


def test_a_console_nobody_reads_is_given_up():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        console = Console(stream)
        for _ in range(2):
            print("a line", file=console, flush=True)
        assert console.lost == "Broken pipe"


def test_a_console_of_another_alphabet_shows_escapes():
    done = process(f"{KEPT}print('\\u0111', '\\udcc3')", PYTHONIOENCODING="ascii")
    assert (done.stdout, done.stderr) == (b"\\u0111 \\udcc3\n", b"")


def test_a_console_line_does_not_run_into_the_progress():
    terminal = io.StringIO()
    errors, output = Console(terminal), Console(terminal)
    errors.show_progress("train 1/2", is_last=False)
    print("a line", file=output)
    errors.show_progress("train 2/2", is_last=True)
    print("the next", file=output)
    clear = "\r\x1b[J"
    assert terminal.getvalue() == f"{clear}train 1/2\r{clear}a line\n{clear}train 2/2\nthe next\n"


def test_the_log_says_once_that_a_console_is_lost(tg, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Console(open("/dev/full", "w")))  # noqa: SIM115
    files = tg.LogFiles(tg.CPU)
    watches = tg.Watches([files, tg.ConsoleNotice()])
    log = tg.RunLog(tg.Config(artifact_dir=str(tmp_path), run_id="name"), watch=watches)
    for step in range(3):
        log.event("train", step=step)
    files.close()
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [event["stage"] for event in events] == ["train", "notice", "train", "train"]
    assert "standard output (No space left on device)" in events[1]["text"]
    assert len((tmp_path / "logs/name.txt").read_text().splitlines()) == 4


def test_a_name_that_is_no_text_in_this_locale_stands_in_the_log(tg, tmp_path):
    files = tg.LogFiles(tg.CPU)
    log = tg.RunLog(tg.Config(artifact_dir=str(tmp_path), run_id="name"), watch=files)
    log.text("DATA_PATH=d\udcc3\udca4ta")
    files.close()
    assert (tmp_path / "logs/name.txt").read_text(encoding="utf-8") == "DATA_PATH=däta\n"


TOOL = """
import sys
from command import start

def main():
    print("a line", flush=True)
    open(sys.argv[1], "w")
    return 0

sys.argv = ["tools/a.py", {file!r}]
start(main)
"""


@pytest.mark.parametrize(
    ("console", "code", "error"),
    [
        ("", 141, b""),
        ("/dev/full", 141, b"a.py: error: standard output cannot be written (No space left on device)\n"),
        (os.devnull, 0, b""),
    ],
)
def test_console_of_a_tool(tmp_path, console, code, error):
    """It works to its end, and does not say that all is well where its answer did not arrive."""
    reader, closed = os.pipe()
    os.close(reader)  # as `| head` does
    with open(console or closed, "wb") as stdout:
        text, end = TOOL.format(file=str(tmp_path / "end")), tmp_path / "end"
        environ = {"PYTHONPATH": str(ROOT / "tools")}
        options = {"env": environ, "stdout": stdout, "stderr": subprocess.PIPE}
        done = subprocess.run([sys.executable, "-c", text], **options)
    assert (done.returncode, done.stderr, end.exists()) == (code, error, True)


@pytest.mark.parametrize(
    ("name", "reason"), [("n" * 300, "File name too long"), ("no/such/file", "No such file or directory")]
)
def test_what_the_system_refuses_a_tool_is_one_line(tmp_path, name, reason):
    command = [sys.executable, "-c", TOOL.format(file=f"{tmp_path}/{name}")]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT / "tools")}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "a line\n")
    assert done.stderr == f"a.py: error: {tmp_path}/{name}: {reason}\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_the_consoles_end_and_other_signals_stop_a_run(tg, name):
    number = getattr(signal, name)
    ranks = tg.Ranks(tg.torch.device("cpu"))
    before = signal.signal(number, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        with pytest.raises(tg.Stopped, match=name) as stopped, tg.StopSignals(ranks):
            os.kill(os.getpid(), number)
            signal.sigtimedwait([], 1)  # the handler runs before this returns
    finally:
        signal.signal(number, before)
    assert (stopped.value.code, ranks.stop_signal) == (128 + number, number)


def test_nohup_keeps_the_consoles_end_from_a_run(tg):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with tg.StopSignals(tg.Ranks(tg.torch.device("cpu"))):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


COMMANDS = [path for path in sorted((ROOT / "tools").glob("*.py")) if "\n    start(main" in path.read_text()]


COMMANDS += [ROOT / name for name in ("tools/readme_settings.py", "train_gpt.py", "prepare_caseops_data.py")]


@pytest.mark.parametrize("tool", COMMANDS, ids=lambda path: path.name)
def test_tool_outside_the_environment_says_how_to_start_it(tool):
    """Python without its libraries, `-S`: one line."""
    arguments = ["--help"] * (tool.name != "train_gpt.py")  # whose help needs no library
    done = subprocess.run([sys.executable, "-SE", str(tool), *arguments], capture_output=True)
    told = done.stderr.decode()
    assert done.returncode == 2 and len(told.splitlines()) == 1, told
    assert told.startswith(f"{tool.name}: error: ") and "is not installed for" in told


def test_who_only_imports_from_here_keeps_his_own_ways():
    code = "import sys, systems.early; sys.exit(sys.excepthook is not sys.__excepthook__)"
    assert subprocess.run([sys.executable, "-SE", "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", ["tools/counted.py", "train_gpt.py"])
def test_tool_that_is_interrupted_says_so_in_a_line(tmp_path, name):
    """Also while it imports, which takes seconds."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, str(ROOT / name)], capture_output=True, env=environ)
    assert (done.returncode, done.stderr) == (130, f"{Path(name).name}: error: interrupted\n".encode())
