"""The study: its statistics, its pairs, who runs what, what comes of kills, and a real small one."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE, wait_for
from scipy import stats
from test_smoke import documents, environment

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import study  # noqa: E402
from command import Mistake  # noqa: E402
from harness.settings import PRESETS  # noqa: E402
from runs import read_run  # noqa: E402
from studying import cells, data, differences, page  # noqa: E402
from studying.arms import ARMS, GROUPS, KEPT, Arm, chosen_arms  # noqa: E402

# A run in milliseconds. Its score is 2 + SEED / 10 + GAIN; what it did stands in a file of all runs.
STAND_IN = """
import json, os, sys, time
folder, seed = os.environ["ARTIFACT_DIR"], int(os.environ["SEED"])
if os.environ.get("TRAIN_SEQ_LEN"):
    sys.exit("stand-in: no luck")
os.makedirs(folder)
with open(os.environ["TOLD"], "a") as file:
    print(os.environ["RUN_ID"], os.environ["DATA_PATH"], os.environ.get("MODEL_PATH", ""), file=file)
time.sleep(3600 if os.environ["RUN_ID"] == os.environ.get("HANGS") else float(os.environ.get("TAKES", 0)))
steps = int(os.environ.get("ITERATIONS", 8))
bpb = 2 + seed / 10 + float(os.environ.get("MATRIX_LR", 0))
pace = 1 + float(os.environ.get("MUON_WD", 0))
with open(folder + "/steps.jsonl", "w") as file:
    for step in range(1, steps + 1):
        print(json.dumps({"step": step, "processor_seconds": 5 + pace * step}), file=file)
stages = {"prequant": {"val_loss": 2 * bpb, "val_bpb": bpb, "seconds": 1.0, "targets": 9}}
result = {"run": os.environ["RUN_ID"], "final_stage": "prequant", "stages": stages, "steps": steps,
          "settings": {"SEED": seed}, "val_bpb": bpb, "val_loss": 2 * bpb, "artifact_bytes": 0}
with open(folder + "/.result.json", "w") as file:
    json.dump(result, file)
os.replace(folder + "/.result.json", folder + "/result.json")  # whole, as a run does: others look for it
"""
# The tool with the stand-in; what it would ask the script for its settings is answered here.
TOOL = f"""
import os, sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tools")!r}]
import study
from runs import read_run
from studying import cells
cells.SCRIPT = Path("stand_in.py").resolve()
steps = lambda environ: int(environ.get("ITERATIONS", 8))
cells.Place.settings = lambda self, environ: dict(environ, ITERATIONS=steps(environ), TRAIN_BATCH_TOKENS=64)
cells.finished = lambda experiment, folder: read_run(folder)
sys.exit(study.main(sys.argv[1:], os.environ))
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty folder to work in with the stand-in, the tool around it, data of four seeds of each kind."""
    monkeypatch.chdir(tmp_path)
    Path("stand_in.py").write_text(STAND_IN)
    Path("tool.py").write_text(TOOL)
    for kind in data.KINDS:
        for number in range(1, 5):
            for variant in ("", "fused"):
                folder = data.folder_of(Path("data/study"), kind, number, variant)
                folder.mkdir(parents=True)
                (folder / "manifest.json").write_text("{}")
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    return tmp_path


def tool(*arguments: str, **environ: object) -> subprocess.Popen:
    """Start the tool in a process of its own."""
    command = [sys.executable, "tool.py", "--out", "out", *arguments]
    env = os.environ | {name: str(value) for name, value in environ.items()}
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, start_new_session=True, **quiet)


def told() -> list[list[str]]:
    """Name, data and model of every run that began."""
    return [line.split(" ") for line in Path("told").read_text().splitlines()]


def result(name: str = "study-screen") -> dict[str, dict]:
    """Runs of each arm by seed."""
    return {arm["name"]: arm["runs"] for arm in json.loads(Path(f"out/{name}.json").read_text())["arms"]}


# ---- Statistics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 8, 15, 40, 199])
def test_t_quantile_is_scipys(freedom):
    for level in (0.5, 0.95, 0.99):
        expected = stats.t.ppf((1 + level) / 2, freedom)
        assert differences.t_quantile(freedom, level) == pytest.approx(expected, rel=1e-9)


def test_differences_are_paired():
    """By hand: -0.01, -0.02 and -0.03, whatever the seeds themselves are worth; and scipy's interval."""
    control = {"1": 2.0, "2": 3.0, "3": 2.5, "9": 7.0}
    arm = {"1": 1.99, "2": 2.98, "3": 2.47, "4": 1.0}
    found = differences.paired(arm, control)
    assert (found.mean, found.sd, found.pairs) == (pytest.approx(-0.02), pytest.approx(0.01), 3)
    assert found.half == pytest.approx(4.302652729911275 * 0.01 / 3**0.5)
    low, high = stats.ttest_rel([1.99, 2.98, 2.47], [2.0, 3.0, 2.5]).confidence_interval()
    assert (found.mean - found.half, found.mean + found.half) == (pytest.approx(low), pytest.approx(high))
    assert not found.below_zero and not found.above_zero
    assert differences.paired({"4": 1.0}, control) is None
    single = differences.paired({"1": 1.0}, control)
    assert (single.mean, single.sd, single.half, single.below_zero) == (-1.0, None, None, False)


def made(**finals: list[float]) -> dict:
    """A study of arms with scores for seeds 1, 2, ..."""

    def run(bpb: float, size: int) -> dict:
        stages = {"prequant": bpb - 0.1, "quantised": bpb}
        return {"val_bpb": bpb, "stages": stages, "artifact_bytes": size, "seconds": 10 * bpb, "steps": 8}

    arms = [
        {"name": name, "source": "PR #1", "settings": {}, "data": "",
         "runs": {str(n): run(bpb, 1000 + 100 * (name == "large")) for n, bpb in enumerate(values, 1)}}
        for name, values in finals.items()
    ]  # fmt: skip
    about = {"study": "s", "scored_on": "these", "seconds_are": "seconds", "steps": 8, "batch_tokens": 64}
    return about | {"arms": arms}


def test_table_says_what_the_intervals_say():
    control = [2.0, 3.0, 2.5]
    below, above = (
        [b + sign * d for b, d in zip(control, (0.1, 0.11, 0.12), strict=True)] for sign in (-1, 1)
    )
    chance = [b + d for b, d in zip(control, (0.1, -0.1, 0.0), strict=True)]
    text = page.table(made(control=control, good=below, large=above, **{"other batches": chance}))
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert "| -0.1100 ± 0.0248 |" in rows["good"] and "| better |" in rows["good"]
    assert "| worse |" in rows["large"] and "1,100 (not equal)" in rows["large"]
    assert "| not told apart |" in rows["other batches"]
    assert "different batches differ by a standard deviation of 0.1000." in text
    assert "val_bpb 2.5000 ± 1.2421 over 3 seeds" in text and "Scored on these." in text
    assert page.forest(made(control=control, good=below)).startswith(b"\x89PNG")


# ---- Arms and data ----------------------------------------------------------------------------------------


def test_arms_are_settings_of_the_script(tg):
    """Each arm differs from the control, and could run; one that goes on from a file names nothing else."""
    base = PRESETS["pr1851-study"] | {"fit_bytes": 900_000}
    control = tg.Config(**base)
    later = {"artifact": ("TTT", "PHASED", "NGRAM_TILT")}
    later["model"] = ("GPTQ", "LQER", "QUANT", "COMPRESSOR", "TRAIN_BATCH", "GRAD_ACCUM")
    for group, arms in GROUPS.items():
        for arm in arms:
            assert arm.settings or arm.data or group == "noise", arm.name
            types = tg.Config.__annotations__
            own = {n.lower(): tg.parse_setting(n, text, types[n.lower()]) for n, text in arm.settings.items()}
            cfg = tg.Config(**base | own)
            tg.check_settings(cfg)
            preset = own.get("preset")  # what an arm sets besides takes a part of its preset back
            whole = tg.Config(**PRESETS[f"{preset}-study"], preset=preset) if preset else control
            begun = {name: control if name == "preset" else whole for name in own}
            changed = [name for name in own if getattr(cfg, name) != getattr(begun[name], name)]
            assert changed == list(own), arm.name
            assert all(name.startswith(later.get(arm.start, "")) for name in arm.settings), arm.name


def test_arms_that_commands_ask_for_are_there():
    """An arm that has gone must go from the Makefile and the page too."""
    said = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "docs/study.md"))
    asked = re.findall(r'--arms (?:"([^"]+)"|(\S+))', said)
    assert len(asked) > 3
    for pair in asked:
        chosen_arms("".join(pair), [])


def test_chosen_arms():
    found = chosen_arms("null,no TTT", ["mine:MATRIX_LR=0.01 TTT_CHUNK_BY_LENGTH=8:8,9:9"])
    assert [arm.name for arm in found] == ["control", "null", "no TTT", "mine"]
    assert found[3].settings == {"MATRIX_LR": "0.01", "TTT_CHUNK_BY_LENGTH": "8:8,9:9"}
    assert [arm.name for arm in chosen_arms("noise", [])] == ["control", "null", "other batches"]
    for names, own, words in (
        ("nul", [], "--arms nul: must be some of noise, "),
        ("", [], "name an arm"),
        ("null,null", [], "^null: two arms of this name"),
        ("", ["a/b:QK_GAIN_INIT=2", "a-b:QK_GAIN_INIT=3"], "^a/b: two arms of this name"),
        ("", [f"{81 * 'x'}:QK_GAIN_INIT=2"], "a name has at most 80 letters"),
        ("", ["a|b:QK_GAIN_INIT=2"], "a name has at most 80 letters, none of them |"),
        ("", ["mine:SEED=3"], "--arm mine: SEED: every run of a study has its own"),
        ("", ["mine"], "--arm mine: must be NAME:SETTING=VALUE"),
        ("", ["mine:X"], "--arm mine:X: must be"),
    ):
        with pytest.raises(ValueError, match=words):
            chosen_arms(names, own)
    assert len(ARMS) == sum(map(len, GROUPS.values()))


def test_streams_share_no_document():
    """Screening reads no validation document, and neither kind trains on what either scores."""
    streams = data.Streams(split=30, scored=10, documents=7, seeds=3)
    every = list(range(streams.needed))
    parts = {(kind, n): streams.of(kind, n) for kind in data.KINDS for n in (1, 2, 3)}
    assert {tuple(every[scored]) for (kind, _), (scored, _) in parts.items() if kind == "confirm"} == {
        (*range(10),)
    }
    assert {tuple(every[scored]) for (kind, _), (scored, _) in parts.items() if kind == "screen"} == {
        (*range(30, 40),)
    }
    trained = [document for _, part in parts.values() for document in every[part]]
    assert sorted(trained) == list(range(40, 40 + 6 * 7)) and streams.needed == 82


# ---- Running ----------------------------------------------------------------------------------------------


def test_study_pairs_arms_and_goes_on(work):
    """The same seed and data in all arms but the two that are about data; nothing is run twice."""
    arguments = ("--arms", "noise,fused markers", "--arm", "high:MATRIX_LR=0.5", "--seeds", "2")
    first = tool(*arguments)
    output, errors = first.communicate(timeout=PATIENCE)
    assert first.returncode == 0, errors
    found = result()
    assert found["high"]["1"]["val_bpb"] == pytest.approx(found["control"]["1"]["val_bpb"] + 0.5)
    assert (
        "| high |  | +0.5000 ± 0.0000 |" in output
        and "| null | the control once more | +0.0000 ± 0.0000 |" in output
    )
    assert "no validation document was read" in output and Path("out/study-screen.png").is_file()
    read = {name: Path(place).parent.name + "/" + Path(place).name for name, place, _ in told()}
    assert read["control-1"] == read["high-1"] == read["null-1"] == "study/screen1"
    assert read["other-batches-1"] == "study/screen2" and read["fused-markers-2"] == "study_fused/screen2"
    assert found["control"]["1"]["seconds"] == pytest.approx(8)
    again = tool(*arguments)
    assert again.communicate(timeout=PATIENCE)[0] and again.returncode == 0 and len(told()) == 10


def test_confirmation_has_seeds_and_documents_of_its_own(work):
    run = tool("--arms", "null", "--seeds", "2-3", "--confirm")
    output, errors = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, errors
    assert {Path(place).name for _, place, _ in told()} == {"confirm2", "confirm3"}
    assert result("study-confirm")["control"]["3"]["val_bpb"] == pytest.approx(2 + 103 / 10)
    assert "Scored on validation documents (confirmation" in output


def test_two_processes_share_a_study(work):
    """No run twice, and both end with the whole study."""
    arguments = ("--arms", "noise", "--seeds", "4", "--jobs", "2")
    both = [tool(*arguments, "--json", f"{name}.json", TAKES=0.4) for name in "ab"]
    for process in both:
        output, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, errors
    names = [name for name, *_ in told()]
    assert len(names) == len(set(names)) == 12
    assert Path("a.json").read_text() == Path("b.json").read_text()


def alive() -> bool:
    """Whether a stand-in of this folder is running."""
    for process in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            command = Path("/proc", process, "cmdline").read_bytes()
            if b"stand_in.py" in command and Path("/proc", process, "cwd").resolve() == Path.cwd():
                return True
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_study_goes_on(work, number):
    """The run under way ends with it and is made anew; what was finished is kept."""
    arguments = ("--arms", "null", "--seeds", "2")
    first = tool(*arguments, HANGS="null-1")
    wait_for(lambda: Path("told").is_file() and len(told()) == 2)
    first.send_signal(number)
    first.communicate(timeout=PATIENCE)
    assert first.returncode == (-9 if number == signal.SIGKILL else 128 + 15)
    wait_for(lambda: not alive())
    assert len(told()) == 2
    second = tool(*arguments)
    errors = second.communicate(timeout=PATIENCE)[1]
    assert second.returncode == 0, errors
    names = [name for name, *_ in told()]
    assert len(names) == 5 and names.count("control-1") == 1 and names.count("null-1") == 2
    assert [len(runs) for runs in result().values()] == [2, 2]


def test_equal_seconds_gives_a_slower_arm_fewer_steps(work):
    run = tool("--arms", "null", "--arm", "slow:MUON_WD=1", "--seeds", "2", "--equal-seconds")
    output, errors = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, errors
    found = result()
    assert found["slow"]["1"]["seconds"] == pytest.approx(16)
    assert {run["steps"] for run in found["slow at equal seconds"].values()} == {4}
    assert {run["seconds"] for run in found["slow at equal seconds"].values()} == {8}
    assert "null at equal seconds" not in found and "| slow at equal seconds |" in output


def test_arms_that_go_on_from_the_control_wait_for_it(work):
    run = tool("--arms", "no LQER", "--seeds", "2", "--jobs", "4", TAKES=0.2)
    errors = run.communicate(timeout=PATIENCE)[1]
    assert run.returncode == 0, errors
    models = {name: model for name, _, model in told()}
    assert models["no-LQER-2"].endswith("control/seed2/run/final_model.pt") and models["control-1"] == ""
    assert all(run["seconds"] is None for run in result()["no LQER"].values())


def test_failures_and_time_are_said(work):
    broken = tool("--arm", "bad:TRAIN_SEQ_LEN=1", "--arms", "null", "--seeds", "1")
    output, errors = broken.communicate(timeout=PATIENCE)
    assert broken.returncode == 1 and "bad, seed 1: exit code 1: stand-in: no luck" in errors
    assert "| null |" in output
    late = tool("--arms", "null", "--seeds", "3", "--seconds", "0.0", "--study", "late")
    output, errors = late.communicate(timeout=PATIENCE)
    assert late.returncode == 0 and "6 of 6 runs are missing; the same command goes on" in output


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--arms", "null", "--seeds", "0"], "--seeds 0: must be a number"),
        (["--arms", "null", "--seeds", "5-3"], "--seeds 5-3: must be"),
        (["--arms", "null", "--seeds", "1-99999999999"], "--seeds 1-99999999999: must be"),
        (["--arm", "mine:HELLO=1"], "arm mine: HELLO is no setting of a run"),
        (["--arm", "mine:MATRIX_LR=0.01"], "arm mine: its settings are the control's"),
        (["--arms", "null", "--json", "stand_in.py/x.json"], "stand_in.py"),
        (["--arms", "null", "--jobs", "0"], "--jobs 0: must be at least 1"),
        (["--arms", "null", "--study", "a/b"], "--study 'a/b': must be a name"),
        (["--arms", "null", "--seeds", "9"], "data/study/screen5: no data; make them: python tools/study.py"),
        (["--prepare"], "--prepare: needs --docs FILE"),
        (
            ["--prepare", "--docs", "x", "--scored", "9", "--split", "8"],
            "--scored 9: must be at most --split 8",
        ),
        (["--prepare", "--docs", "nothing.jsonl"], "nothing.jsonl"),
        (["--show", "nothing.json"], "nothing.json: cannot be read"),
        (["--show", "stand_in.py"], "stand_in.py: not the JSON of a study"),
        (["--show", "odd.json"], "odd.json: not the JSON of a study"),
        (["--show", "none.json"], "none.json: not the JSON of a study"),
        (["--keep", "told.json"], "told.json: cannot be read"),
        (["--show", "told.json", "--keep", "told.json"], "not allowed with argument --show"),
    ],
)
def test_mistakes_are_one_line(work, monkeypatch, capsys, arguments, words):
    settings = {"ITERATIONS": 8, "TRAIN_BATCH_TOKENS": 64}
    monkeypatch.setattr(cells.Place, "settings", lambda self, environ: settings)
    for name, runs in (("odd", [1]), ("none", {"1": {"val_bpb": 0.0, "stages": {}, "seconds": 1.0}})):
        arms = [{"name": arm, "source": "", "runs": runs} for arm in ("control", "mine")]
        Path(f"{name}.json").write_text(json.dumps({"study": name, "arms": arms}))
    assert study.main(arguments, {"PATH": os.environ["PATH"]}) == 2
    error = capsys.readouterr().err
    assert error.startswith("study.py: error: ") and words in error and error.count("\n") == 1


def test_settings_that_each_run_has_of_its_own_are_refused(work, capsys):
    assert study.main(["--arms", "null"], {"SEED": "3"}) == 2
    assert "SEED is set: every run of a study has its own" in capsys.readouterr().err
    with pytest.raises(Mistake, match="MATRIX_LR='x'"):
        cells.Place(Path("out"), Path("data"), "screen", [1], {}).settings({"MATRIX_LR": "x"})


def test_the_page_has_the_committed_tables():
    text = study.PAGE.read_text(encoding="utf-8")
    paths = sorted(study.SHOWN.glob("*.json"))
    assert paths
    for path in paths:
        found = json.loads(path.read_text(encoding="utf-8"))
        begin, end = study.marks(found["study"])
        assert path.stem == found["study"] and f"{begin}\n{page.table(found)}\n{end}" in text
    assert f"{study.IDEAS[0]}{study.ideas()}{study.IDEAS[1]}" in (ROOT / "README.md").read_text(
        encoding="utf-8"
    )
    assert all(text in ("removed", "not built in") or name in ARMS for name, text in KEPT.items())


def test_a_real_study(tmp_path, monkeypatch, capfd):
    """Data from a file, the null arm's digits are the control's, a rate makes others; seconds are told."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": text}) for text in documents(150)]
    Path("docs.jsonl").write_text("\n".join(lines))
    env = environment(SCALE="full", PREQUANT_ONLY=1, ITERATIONS=3)
    prepare = [
        "--prepare",
        "--docs",
        "docs.jsonl",
        "--split",
        "10",
        "--scored",
        "8",
        "--stream",
        "40",
        "--streams",
        "1",
    ]
    assert study.main(prepare, env) == 0
    assert (
        study.main(["--arms", "null", "--arm", "fast:MATRIX_LR=0.2", "--seeds", "1", "--jobs", "2"], env) == 0
    )
    found = {
        a["name"]: a["runs"]["1"]
        for a in json.loads(Path("runs/study/study-screen.json").read_text())["arms"]
    }
    assert found["null"]["val_bpb"] == found["control"]["val_bpb"] != found["fast"]["val_bpb"]
    assert all(run["seconds"] > 0 and run["steps"] == 3 for run in found.values())
    record = read_run(Path("runs/study/study/screen/null/seed1/run"))
    assert record.settings["DATA_PATH"] == "data/study/screen1" and record.seed == 1
    assert Arm("a", {}).start == ""
