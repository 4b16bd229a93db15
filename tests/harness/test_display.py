"""The run as people see it: sentences, a live line, a table; and the log, which has every line as ever."""

import io
import json
import math
import re
import sys
import types

import pytest

from harness import console

MATRICES = [(f"blocks.{i}.attn.c_q.weight", 6, 10.0 * i) for i in range(5)] + [("tok_emb.weight", 7, 25.0)]
SCORE = {"val_loss": 4.0, "val_bpb": 2.5, "documents": 40, "targets": 9, "bytes": 9, "seconds": 1.5}
FINAL = {"val_bpb": 2.25, "val_loss": 3.5, "artifact_bytes": 1300, "code_bytes": 300, "model_bytes": 1000}
FINAL |= {"train_seconds": 200.0, "calibrate_seconds": 2.5, "eval_seconds": 80.0, "legal": True}
EVENTS = [
    ("model", {"parameters": 1020265, "layers": 6, "virtual_layers": 8}),
    ("train", {"step": 1, "train_loss": 6.5}),
    ("quantised", SCORE),
    *[("matrix", {"name": n, "bits": b, "weighted_error": e, "seconds": 0.1}) for n, b, e in MATRICES],
    ("notice", {"text": "python-minifier is missing"}),
    ("unheard", {"of": 1.25}),
    ("size", {"artifact_bytes": 5}),  # without the limit that its sentence needs
    ("final", FINAL),
]
STAGES = {"untrained": {"val_bpb": 4.0}, "prequant": {"val_bpb": 2.25}, "ttt": {"val_bpb": 2.5}}
SECONDS = {"untrained": 2.0, "train": 195.25, "ttt": 83.0}
TABLE = """\
                   val_bpb     change   seconds
untrained          4.00000                  2.0
trained            2.25000   -1.75000     195.2
adapted            2.50000   +0.25000      83.0
"""


@pytest.fixture
def settings(tg, tmp_path):
    """Settings of a run in the temporary folder."""
    return lambda: tg.Config(artifact_dir=str(tmp_path / "run"), run_id="watched")


class Terminal(io.StringIO):
    """Stands for a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def display(tg, settings, monkeypatch):
    """Function: terminal? and environment -> Display, the log it watches, and what is on its console."""
    open_files = []

    def make(terminal=False, world=(0, 1), **environ):
        stream = Terminal() if terminal else io.StringIO()
        monkeypatch.setattr(sys, "stdout", stream)
        shown = tg.console_watch(tg.Ranks(tg.torch.device("cpu"), *world), {"TERM": "xterm", **environ})
        files = tg.LogFiles(tg.CPU)
        open_files.append(files)
        log = tg.RunLog(settings(), tg.Ranks(tg.torch.device("cpu"), *world), tg.Watches([files, shown]))
        cfg = types.SimpleNamespace(train_batch_tokens=1000)
        clock = types.SimpleNamespace(seconds=SECONDS, elapsed=lambda _: console.time.perf_counter())
        shown.see("opened", run=types.SimpleNamespace(log=log, cfg=cfg, stages=STAGES, clock=clock))
        return shown, log, stream

    yield make
    for files in open_files:
        files.close()


def tell(log, **changes: object) -> None:
    for stage, values in EVENTS:
        log.event(stage, **values | (changes if stage == "final" else {}))
    log.text("resumed within ttt", said=True)


def test_the_console_has_sentences_and_the_log_every_line(tg, display, tmp_path):
    _, log, stream = display()
    tell(log)
    lines, folder = stream.getvalue().splitlines(), tmp_path / "run"
    assert lines[:6] == [
        "Model: 1,020,265 parameters, 6 layers (8 with loops)",
        "Quantised: val_bpb 2.50000, val_loss 4.00000, 40 documents, 1.5 s",
        "Matrices: 5 to 6 bits, 1 to 7 bits; "
        "largest weighted errors 4.attn.c_q 40, 3.attn.c_q 30, tok_emb 25",
        "Notice: python-minifier is missing",
        "Unheard: of 1.25",
        "Size: artifact_bytes 5",
    ]
    assert TABLE in stream.getvalue() and lines[-1] == "resumed within ttt"
    assert "2.25000 bits per byte (val_bpb), lower is better" in lines
    assert "legal   True: limits kept, every target scored, an artifact made" in lines
    assert "bytes   1,300 = 300 code + 1,000 model, 15,998,700 left of 16,000,000" in lines
    assert f"next    make report RUN_DIR={folder}" in lines and "\x1b" not in stream.getvalue()
    text = (folder / "logs/watched.txt").read_text()
    assert len(text.splitlines()) == len(EVENTS) + 1 and "final val_bpb:2.25 val_loss:3.5" in text
    stages = [json.loads(line)["stage"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert stages == [stage for stage, _ in EVENTS]


def test_the_anchor_is_said_where_it_is_asked_for(display, tmp_path):
    """Five hashes on the console tell people nothing, and a terminal would cut the line to be posted."""
    _, log, stream = display()
    log.text("anchor run=watched chain=0123", said=True)
    run = tmp_path / "run"
    asked = f"python tools/audit.py {run} --anchor prints it"
    assert stream.getvalue() == f"Anchor, to be posted before the score is known: {asked}\n"
    assert (run / "logs/watched.txt").read_text() == "anchor run=watched chain=0123\n"


def test_work_without_units_has_a_live_line(display):
    """Else the screen stands still, on large models for minutes."""
    shown, _, stream = display(terminal=True)
    shown.see("finished", stage="prequant")
    shown.saved("ttt")
    texts = [text.rstrip("\r") for text in stream.getvalue().split("\r\x1b[J")[1:]]
    assert texts == ["calibrating and quantising ...", "adapting ..."]
    shown, _, stream = display()
    shown.see("finished", stage="prequant")
    shown.saved("ttt")
    assert stream.getvalue() == ""


def test_console_log_shows_the_lines_of_the_log(display, tmp_path):
    _, log, stream = display(CONSOLE="log")
    tell(log)
    assert stream.getvalue() == (tmp_path / "run/logs/watched.txt").read_text()


@pytest.mark.parametrize("form", ["auto", "log"])
def test_only_rank_0_has_a_console(display, form):
    _, log, stream = display(terminal=True, world=(1, 2), CONSOLE=form)
    tell(log)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("environ", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {}])
@pytest.mark.parametrize("columns", [80, 120])
def test_the_end_fits_the_terminal_and_has_colours_only_where_wanted(display, monkeypatch, environ, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    shown, log, stream = display(terminal=True, **environ)
    monkeypatch.setattr(log, "folder", "runs/a")
    log.event("limit", text="evaluation took 700.0 s, limit 600")
    tell(log, legal=False)
    assert ("\x1b[31mlegal   " in stream.getvalue()) == (not environ)
    text = re.sub(r"\x1b\[[0-9]*[mK]|\r", "", stream.getvalue())
    dumb = "TERM" in environ  # what is no terminal keeps its lines whole
    assert all(len(line) < columns or dumb for line in text.splitlines())
    assert "limits  broken: evaluation took 700.0 s, limit 600" in text


def test_a_sentence_every_ten_seconds_or_one_live_line(display, monkeypatch):
    """Of the loss of steps that are over, and none of a step before the run was resumed."""
    clock = types.SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr("harness.console.time", clock)
    for terminal in (False, True):
        clock.now = 0.0
        shown, _, stream = display(terminal=terminal)
        shown.saved("train")
        for step in range(21, 41):
            clock.now += 1.0
            worker = Training(step)
            shown.unit("train", worker)
        texts = stream.getvalue().replace("\r\x1b[J", "\n").replace("\r", "").strip("\n").split("\n")
        assert len(texts) == (21 if terminal else 2) and (texts[0] == "training ...") == terminal
        assert "loss" not in texts[terminal] and ("loss 39.000" in stream.getvalue()) == terminal
        assert terminal or texts[1] == "training 78%: 31/40, 0:09 left, loss 30.000, 1,000 tokens/s"
        shown._said = -math.inf
        shown.unit("train", Training(40))  # whose end is said by another line
        assert "training 100%" not in stream.getvalue()
    assert texts[-1].startswith("training [#") and all(len(text) < 80 for text in texts)


def test_the_score_of_a_validation_is_said_with_its_step(display):
    """It stays on the line while training goes on, and would else be taken for the model's of now."""
    shown, log, stream = display(terminal=True)
    shown.saved("train")
    for stage, step, words in (("untrained", 10, "at step 0"), ("step_20", 30, "at step 20")):
        log.event(stage, **SCORE)
        for done in (step, step + 1):  # the loss is of a step that is over
            shown._drawn = -math.inf
            shown.unit("train", Training(done))
        assert f"loss {step:.3f}  val_bpb 2.500 {words}" in stream.getvalue().split("\x1b[J")[-1]


def test_the_time_left_is_that_of_the_stage_itself(display):
    """The first validation takes place within training, before its first step."""
    shown, _, stream = display(terminal=True)
    shown._run.clock.elapsed = lambda _: 2.0
    shown._begun["train"] = console.time.perf_counter() - 300.0, 0
    shown.unit("train", Training(4))
    assert "  4/40  0:18 left" in stream.getvalue()


class Training:
    """A trainer behind a step: it has the reports of the last two."""

    total, meter = 40.0, None

    def __init__(self, step: int):
        self.done = self.steps = step
        self.reports = [types.SimpleNamespace(step=s, train_loss=float(s)) for s in (step - 1, step)]


def test_a_terminal_may_become_narrow(display, monkeypatch):
    shown, _, stream = display(terminal=True)
    shown.saved("train")
    for columns in ("120", "40", "5"):
        monkeypatch.setenv("COLUMNS", columns)
        shown._drawn = -math.inf
        shown.unit("train", Training(20))
        assert len(stream.getvalue().split("\x1b[J")[-1].rstrip("\r")) < int(columns)


def test_console_is_read_and_refused_like_a_setting(tg):
    assert tg.console_form({}) == "auto" and tg.console_form({"CONSOLE": "log"}) == "log"
    assert tg.console_form({"CONSOLE": "/dev/console"}) == "auto"  # of a container's first process
    for environ, said in (
        ({"CONSOLE": "loud"}, "CONSOLE='loud': must be one of auto, log"),
        ({"CONSOLES": "log"}, "CONSOLES='log': no such setting; did you mean CONSOLE?"),
    ):
        with pytest.raises(tg.ConfigError, match=re.escape(said)):
            tg.read_settings(environ)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_steps_are_written_when_their_numbers_are_there(tg, tmp_path, on_gpu):
    """Nothing waits for a GPU: a step is told one unit late, and the last one at the end."""
    clock = iter(range(100))
    run = types.SimpleNamespace(
        log=types.SimpleNamespace(folder=tmp_path),
        clock=types.SimpleNamespace(elapsed=lambda stage: float(next(clock)) + 2),
        cfg=types.SimpleNamespace(train_batch_tokens=1000),
    )
    (tmp_path / "steps.jsonl").write_text('{"step": 3}\n{"step": 4}\n{"step": 5}\n{"st')
    steps = tg.StepFile(types.SimpleNamespace(is_main=True, on_gpu=on_gpu))
    steps.see("opened", run=run)
    reports = [report(tg, step) for step in range(4, 8)]
    for last in range(1, 4):  # resumed after step 4, whose report has no numbers
        steps.unit("train", types.SimpleNamespace(steps=4 + last, reports=reports[last - 1 : last + 1]))
        lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [3, 4, *range(5, 5 + last - on_gpu)]
    steps._worker.reports = reports[2:]
    steps.see("finished", stage="train", run=run)
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4, 5, 6, 7] and lines[-1]["train_loss"] == 7.0
    assert "tokens_per_second" not in lines[2] and lines[3]["tokens_per_second"] == 1000.0


def report(tg, step: int):
    """What a step did."""
    return tg.StepReport(
        step, tg.Pending(tg.torch.tensor([float(step), 1.0, 0.0, 0.0, 0.0])), 1.0, 0.9, False
    )


class Counting:
    """A worker that has done this much of four."""

    total, meter = 4.0, None

    def __init__(self, done: float):
        self.done = done


def test_progress_of_a_stage_within_another(tg, settings, tmp_path, monkeypatch):
    """The inner one begins anew each time, the outer one goes on from its own beginning."""
    clock = iter(range(100))
    seconds = types.SimpleNamespace(perf_counter=lambda: float(next(clock)))
    monkeypatch.setattr("harness.console.time", seconds)  # not the module's own, which pytest uses too
    progress, files = tg.Progress(tg.CPU), tg.LogFiles(tg.CPU)
    log = tg.RunLog(settings(), watch=files)
    progress.see("opened", run=types.SimpleNamespace(log=log))
    progress.saved("train")  # at 0 s; each look at the clock is a second later
    progress.unit("train", Counting(1.0))
    for stage in ("step_1", "step_2"):
        progress.saved(stage)
        progress.unit(stage, Counting(4.0))
    progress.unit("train", Counting(1.0))  # nothing new to show
    progress.unit("train", Counting(2.0))
    files.close()
    assert (tmp_path / "run/logs/watched.txt").read_text().splitlines() == [
        "train 1/4 elapsed:1s left:3s",
        "step_1 4/4 elapsed:1s left:0s",
        "step_2 4/4 elapsed:1s left:0s",
        "train 2/4 elapsed:7s left:7s",
    ]


def test_progress_shows_the_loss_of_an_evaluation(tg, settings, tmp_path):
    progress, files = tg.Progress(tg.CPU), tg.LogFiles(tg.CPU)
    progress.see("opened", run=types.SimpleNamespace(log=tg.RunLog(settings(), watch=files)))
    worker, progress_line = Counting(2.0), "ttt 2/4 elapsed:0s left:0s running_loss:3.5"
    worker.meter = tg.BpbMeter()
    progress.saved("ttt")
    worker.done = 1.0
    progress.unit("ttt", worker)  # a rank that has scored nothing yet has no loss
    worker.done = 2.0
    worker.meter.add_sums(7.0, 4.0, 2.0)
    progress.unit("ttt", worker)
    files.close()
    assert (tmp_path / "run/logs/watched.txt").read_text().splitlines()[1:] == [progress_line]
