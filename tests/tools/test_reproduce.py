"""tools/reproduce.py: statistics, what it refuses, seeds run and continued, submission and README."""

import dataclasses
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import test_smoke as smoke
from patience import PATIENCE
from scipy import integrate
from test_logbook import april
from test_tracking import scalars

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import reproduce  # noqa: E402
import runs  # noqa: E402
from reproducing import claim, submission  # noqa: E402
from reproducing.bases import BASES, base_of  # noqa: E402

DEMO = ROOT / "logs" / "demo_seed42_cpu.json"
TOOL = ROOT / "tools" / "reproduce.py"

# Stands in for train_gpt.py: knows --show --json, writes what a run writes, fails where it is told to.
FAKE = """
import json, os, sys
from pathlib import Path
settings = {"PRESET": "fake", "SEED": 0, "MATRIX_LR": 0.5, "DEVICE": "auto"}
settings |= {name: json.loads(os.environ[name]) for name in ("SEED", "MATRIX_LR") if name in os.environ}
if "--show" in sys.argv:
    if "BROKEN" in os.environ:
        sys.exit("train_gpt.py: error: MATRIX_LR=none: must be a number")
    print(json.dumps({"preset": "fake", "settings": settings}))
    sys.exit()
folder = wanted = Path(os.environ["ARTIFACT_DIR"])
number = 2
while (folder / "metrics.jsonl").exists():
    folder, number = wanted.with_name(f"{wanted.name}+{number}"), number + 1
folder.mkdir(parents=True)
(folder / "metrics.jsonl").write_text(json.dumps({"stage": "start"}))
code = json.loads(os.environ.get("CODES", "{}")).get(str(settings["SEED"]), 0)
if code in (1, 2):
    sys.exit(code)
import hashlib
score = {"val_bpb": 2 + settings["SEED"] / 100, "val_loss": 4 + settings["SEED"] / 50}
stage = score | {"targets": 10, "bytes": 7, "documents": 2, "seconds": 1.0}
result = {"run": os.environ["RUN_ID"], "final_stage": "ttt", **score, "artifact_bytes": 30, "code_bytes": 10,
    "model_bytes": 20, "legal": not code, "broken_limits": ["too long"] if code else [], "steps": 3,
    "stages": {"quantised": stage, "ttt": stage}, "seconds": {"train": 1.0, "calibrate": 0.5},
    "environment": {"source_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), "torch": "2",
        "data_sha256": "d" * 64, "device": "fake", "ranks": 1, "python": "3", "commit": "c" * 40}}
(folder / "result.json").write_text(json.dumps(result | {"settings": settings}))
sys.exit(code)
"""


@pytest.fixture
def demo():
    """The committed demo run."""
    return runs.read(DEMO)


@pytest.fixture
def trio(demo):
    """Function: three runs like the demo's, seeds 1 to 3, with these scores in bits per byte."""

    def make(*scores):
        return [with_score(demo, seed, bpb) for seed, bpb in enumerate(scores, 1)]

    return make


def with_score(record, seed, bpb):
    """A run like this one with another seed and score, in the same proportion to its nats."""
    final = record.stages["ttt"]
    final = final | {"val_bpb": bpb, "val_loss": bpb * record.nats_per_bit}
    return dataclasses.replace(record, seed=seed, stages={**record.stages, "ttt": final})


def call(*arguments, capsys=None) -> tuple[int, str, str]:
    """The tool in this process: exit code, what it printed, what it complained."""
    code = reproduce.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


# -- statistics


def tail(t: float, df: float) -> float:
    """P(T < t) of Student's distribution by integrating its density: not scipy's function for it."""
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    return integrate.quad(lambda x: scale * (1 + x * x / df) ** (-(df + 1) / 2), -math.inf, t)[0]


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_welch_is_the_textbooks(margin):
    """t = (mean difference) / sqrt(v1/n1 + v2/n2), Satterthwaite's degrees of freedom, lower tail."""
    ours, base = [1.0, 1.4, 1.1], [1.6, 2.1, 1.7, 1.9]
    terms = [statistics.variance(side) / len(side) for side in (ours, base)]
    t = (statistics.fmean(ours) + margin - statistics.fmean(base)) / math.sqrt(sum(terms))
    df = sum(terms) ** 2 / (terms[0] ** 2 / 2 + terms[1] ** 2 / 3)
    found = claim.welch(ours, base, margin)
    assert found == pytest.approx({"t": t, "df": df, "p": tail(t, df)}, rel=1e-6)


def test_no_test_without_spread():
    assert claim.welch([1.0], [1.0, 2.0]) is None and claim.welch([1.0, 1.0], [2.0, 2.0]) is None


def test_why_there_is_no_test_is_said(trio, recwarn):
    ours, base = trio(2.3, 2.3, 2.3), base_of(trio(2.4, 2.4, 2.4))
    assert "No test: no run differs from another of its side." in claim.sentence(
        claim.compare(ours, base), "b"
    )
    told = claim.sentence(claim.compare(ours[:1], base), "b")
    assert "No test: it takes two runs on each side." in told
    claim.compare(ours, base_of(trio(2.4, 2.5, 2.6)))
    assert not recwarn.list, "scipy has something to say of a side whose scores are all the same"


def test_a_run_does_not_stand_on_both_sides(trio):
    ours = trio(2.3, 2.31, 2.32)
    with pytest.raises(claim.ClaimError, match=r"stands on both sides, in base .* too \(seed 2\)"):
        claim.compare(ours[1:], base_of(ours[:2]))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"stages": {"ttt": {"val_loss": 2.0, "val_bpb": -1.0}}}, "its score val_bpb of ttt is -1.0"),
        ({"stages": {"ttt": {"val_loss": math.nan, "val_bpb": 1.0}}}, "its score val_loss of ttt is nan"),
        ({"seconds": {"train": math.nan}}, "its seconds of train are nan"),
        ({"artifact_bytes": -1}, "its artifact_bytes are -1"),
    ],
)
def test_figures_that_keep_every_limit_are_refused(demo, change, told):
    fields = {field.name: getattr(demo, field.name) for field in dataclasses.fields(demo)}
    with pytest.raises(runs.ReadError, match=told):
        runs._checked(**fields | {"final_stage": "ttt"} | change)


def compared(published_logs, pattern, base, capsys) -> dict:
    """The last line of the tool on published logs, parsed."""
    logs = sorted(published_logs.glob(pattern))
    code, out, _ = call("--json", "--base", base, "--from-logs", *logs, capsys=capsys)
    assert code == 0
    return json.loads(out.splitlines()[-1])


def test_pr1868(published_logs, capsys):
    """Three seeds of PR #1868: 1.06145 and 0.00068, as published (the sample standard deviation)."""
    names = ("pr1851_seed42", "pr1868_seed314", "pr1868_seed1234")
    code, out, _ = call("--json", "--from-logs", *(published_logs / f"{n}.log" for n in names), capsys=capsys)
    found = json.loads(out.splitlines()[-1])
    assert (code, round(found["mean"], 5), round(found["std"], 5)) == (0, 1.06145, 0.00068)
    assert found["seeds"] == [42, 314, 1234] and found["welch"] is None
    assert "train_shards differs" in out and "Not told by these files: script hash" in out


def test_pr1855_against_the_rerun_of_pr1868(published_logs, capsys):
    """Mean as published; 0.00090 was the population's deviation; p of these logs is 0.355, not 0.188.

    The published 0.188 rests on "broader reproduction evidence" (PR #1902): runs whose logs are not here.
    """
    found = compared(published_logs, "pr1855_*", "pr1868_rerun", capsys)
    assert round(found["mean"], 5) == 1.06108 and round(found["std"], 5) == 0.00111
    scores = [run["val_bpb"] for run in found["runs"]]
    assert round(statistics.pstdev(scores), 5) == 0.00090
    welch = found["welch"]
    assert welch["base_seeds"] == [42, 314, 1234] and not welch["nats_converted"]
    assert welch["t"] == pytest.approx(-0.3989, abs=1e-4) and welch["df"] == pytest.approx(3.892, abs=1e-3)
    assert welch["p"] == pytest.approx(tail(-0.39890, 3.89169), abs=1e-4) == pytest.approx(0.3554, abs=1e-4)
    assert welch["difference_nats"] == pytest.approx(-0.00073, abs=5e-6) and not welch["beats_margin"]


def test_the_base_may_be_logs(published_logs, capsys):
    built_in = compared(published_logs, "pr1855_*", "pr1868_rerun", capsys)["welch"]
    logs = sorted(published_logs.glob("pr1855_*"))
    others = sorted(published_logs.glob("pr1868_rerun_*"))
    code, out, _ = call("--json", "--from-logs", *logs, "--base", *others, capsys=capsys)
    from_logs = json.loads(out.splitlines()[-1])["welch"]
    for key in ("t", "df", "p", "p_margin", "difference_nats", "base_mean"):
        assert from_logs[key] == pytest.approx(built_in[key], rel=1e-9), key


def test_bases_of_another_tokenizer_are_converted_to_our_tokens(published_logs, capsys):
    """PR #1855 against PR #1493, plain SP8192: published as -0.04359 nats with the leaderboard's 1.0810."""
    welch = compared(published_logs, "pr1855_*", "pr1493", capsys)["welch"]
    assert welch["nats_converted"] and welch["difference_nats"] == pytest.approx(-0.0436, abs=1e-4)
    assert welch["beats_margin"] and welch["p_margin"] < 0.001


def test_a_base_of_another_text_is_refused(demo):
    with pytest.raises(claim.ClaimError, match="base pr1855: scored 151,074,499 bytes .* these runs 109,295"):
        claim.compare([demo], BASES["pr1855"])


@pytest.mark.parametrize(
    "scores, p_below, met",
    [
        ((2.29, 2.2901, 2.2902), 1e-6, True),
        ((2.2985, 2.2986, 2.2987), 1e-3, False),
        ((2.30005, 2.30005, 2.4), 1, False),
    ],
)
def test_the_margin_of_0005_nats_is_more_than_a_plain_p(trio, scores, p_below, met):
    """0.0014 bits per byte are 0.0024 nats here: significantly better, and not by 0.005 nats."""
    base = base_of(trio(2.3, 2.3001, 2.2999))
    found = claim.compare(trio(*scores), base)
    assert found["p"] < p_below and found["beats_margin"] is met


def test_what_a_log_leaves_in_doubt_is_noted(tmp_path, capsys):
    (tmp_path / "seed3.log").write_text(april(7) + april(214))
    code, out, _ = call("--from-logs", tmp_path / "seed3.log", "--json", capsys=capsys)
    notes = json.loads(out.splitlines()[-1])["notes"]
    assert code == 0 and [note.split(": ")[1][:18] for note in notes] == [
        "holds 2 runs; read",
        "its name says seed",
    ]
    assert all(f"Note: {note}." in out for note in notes)


def test_a_run_without_a_seed_stands_alone(demo):
    seedless = dataclasses.replace(demo, seed=None)
    assert claim.check_alike([seedless]) == []
    with pytest.raises(claim.ClaimError, match="tells no seed"):
        claim.check_alike([seedless, demo])


# -- what is refused


def change(record, **fields):
    return dataclasses.replace(record, **fields)


def environment(record, **values):
    return {"environment": {**record.environment, **values}}


DIFFERENCES = {
    "other settings: MATRIX_LR 0.026 and 0.03": lambda r: {"settings": {**r.settings, "MATRIX_LR": 0.03}},
    "script [0-9a-f]{12} and [0-9a-f]{12}": lambda r: environment(r, source_sha256="e" * 64),
    "data aaaaaaaaaaaa and bbbbbbbbbbbb": lambda r: environment(r, data_sha256="b" * 64),
    "different evaluators: ttt, quantised": lambda r: {"final_stage": "quantised"},
    "scored targets 44999 and 7": lambda r: {"stages": {"ttt": {**r.stages["ttt"], "targets": 7}}},
}


@pytest.mark.parametrize("wanted", DIFFERENCES)
def test_runs_of_different_experiments_are_not_mixed(demo, wanted):
    one = change(demo, **environment(demo, data_sha256="a" * 64, source_sha256="d" * 64))
    other = change(one, seed=43, **DIFFERENCES[wanted](one))
    with pytest.raises(claim.ClaimError, match=wanted):
        claim.check_alike([one, other])
    assert re.search(wanted, " ".join(claim.check_alike([one, other], mixed=True)))
    assert claim.check_alike([one, change(one, seed=43)]) == []


def test_a_seed_counts_once_and_hardware_is_noted(demo):
    with pytest.raises(claim.ClaimError, match="seed 42 2 times"):
        claim.check_alike([demo, demo])
    other = change(demo, seed=43, **environment(demo, device="NVIDIA H100"))
    assert claim.check_alike([demo, other]) == [
        f"device differs: {demo.environment['device']} (seed 42), NVIDIA H100 (seed 43)"
    ]


def test_mixed_published_logs(published_logs, capsys):
    """PR #1493's seed 42 ran another script, with a hash embedding; PR #1868 and its re-run differ too."""
    code, _, err = call("--from-logs", *sorted(published_logs.glob("pr1493_*")), capsys=capsys)
    assert code == 2 and "TTT_HASH_EMBED not there and 1" in err and err.count("\n") == 1
    logs = [published_logs / "pr1868_seed314.log", published_logs / "pr1868_rerun_seed42.log"]
    code, _, err = call("--from-logs", *logs, capsys=capsys)
    assert code == 2 and "GPTQ_RESERVE_SECONDS 0.5 and 8.0" in err
    code, out, _ = call("--mixed", "--from-logs", *logs, capsys=capsys)
    assert code == 0 and "Note: " in out and "GPTQ_RESERVE_SECONDS" in out


@pytest.mark.parametrize(
    "arguments, wanted",
    [
        (["--from-logs", "nowhere.log"], "nowhere.log: cannot be read"),
        ([], "give --from-logs FILE ..., or --seeds"),
        (["--seeds", "1", "--from-logs", DEMO], "give --from-logs FILE ..., or --seeds"),
        (["--seeds", "1,2"], "needs the command behind --"),
        (["--seeds", "1,x", "--", "python"], "--seeds x: must be whole numbers"),
        (["--seeds", "1,1", "--", "python"], "each seed once"),
        (["--seeds", "1", "--", "python", "nowhere.py"], "-- python nowhere.py: names no Python script"),
        (["--seeds", "1", "--", "A=1", "python", TOOL], "A=1 is no program"),
        (["--from-logs", DEMO, "--preset", "demo"], "--preset: is for runs"),
        (["--from-logs", DEMO, "--base", "pr9"], "--base pr9: no file, and none of pr1493, pr1667"),
        (["--from-logs", DEMO, "--base", "pr1855"], "base pr1855: scored 151,074,499 bytes"),
        (["--from-logs", DEMO, "--mixed", "--submission"], "--mixed: never for a submission"),
        (["--from-logs", DEMO, "--submission", "--base", "runs/x"], "for a submission one of pr1493"),
        (["--from-logs", DEMO, "--sedes", "3"], "unrecognized arguments: --sedes"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, arguments, wanted):
    code, out, err = call(*arguments, capsys=capsys)
    assert (code, out, err.count("\n")) == (2, "", 1) and wanted in err


# -- running


@pytest.fixture
def fake(tmp_path, monkeypatch, capfd):
    """Function: the tool with the stand-in script, variables given; exit code, output, complaints."""
    monkeypatch.chdir(tmp_path)
    Path("train_gpt.py").write_text(FAKE)

    def run(*arguments, **variables):
        environ = {"PATH": os.environ["PATH"], **{n: json.dumps(v) for n, v in variables.items()}}
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", environ)
            return call(*arguments, "--", sys.executable, "train_gpt.py", capsys=capfd)

    return run


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_seeds_are_run_continued_after_a_crash_and_never_overwritten(fake, tmp_path):
    """Seed 2 dies: exit code 1, seed 1 stays; the same command runs 2 and 3 only, beside what is there."""
    line = ("--seeds", "1,2,3", "--out", "out", "--json")
    code, _, err = fake(*line, CODES={"2": 1})
    assert code == 1 and "seed 2" in err and "exit code 1" in err
    before = everything(tmp_path / "out")
    assert {path.parent.name for path in before} == {"seed1", "seed2"}
    code, out, _ = fake(*line)
    assert code == 0
    assert everything(tmp_path / "out").items() >= before.items()
    assert out.count("finished before") == 1 and (tmp_path / "out" / "seed2+2" / "result.json").is_file()
    found = json.loads(out.splitlines()[-1])
    assert found["seeds"] == [1, 2, 3] and found["mean"] == pytest.approx(2.02)
    after = everything(tmp_path / "out")
    assert fake(*line)[0] == 0 and everything(tmp_path / "out") == after


def test_finished_runs_of_other_settings_or_another_script_are_an_error(fake, tmp_path):
    assert fake("--seeds", "1", "--out", "out")[0] == 0
    code, _, err = fake("--seeds", "1", "--out", "out", MATRIX_LR=0.25)
    assert code == 2 and "seed1: ran with MATRIX_LR=0.5, now it is 0.25; choose another --out" in err
    script = tmp_path / "train_gpt.py"
    script.write_text(FAKE + "# changed\n")
    code, _, err = fake("--seeds", "1", "--out", "out")
    assert code == 2 and "made by another script" in err
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_the_default_folder_is_that_of_preset_and_script(fake, tmp_path):
    assert fake("--seeds", "1")[0] == 0
    (tmp_path / "train_gpt.py").write_text(FAKE + "# changed\n")
    assert fake("--seeds", "1")[0] == 0
    assert len(list((tmp_path / "runs").glob("fake-????????/seed1/result.json"))) == 2


def test_a_limit_exceeded_is_a_result_and_said(fake):
    code, out, _ = fake("--seeds", "1,2", CODES={"2": 3})
    assert code == 0 and "NO: too long" in out


FAKE_AUDIT = """
import json, sys
from pathlib import Path
folder = Path(sys.argv[1])
status = "FAIL" if folder.name == "seed2" else "VERIFIED"
told = {"checks": {"D1": {"status": status}}, "verdict": status, "counts": {status: 1}}
told["arguments"] = sys.argv[2:]
(folder / "audit.json").write_text(json.dumps(told))
sys.exit(status == "FAIL")
"""


def test_each_run_is_audited_once_and_a_failed_audit_is_exit_code_1(fake, tmp_path, monkeypatch):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "audit.py").write_text(FAKE_AUDIT)
    monkeypatch.setattr(reproduce.seeds, "ROOT", tmp_path)
    assert fake("--seeds", "3", "--audit", "--out", "other")[0] == 1, "an audit that is not believed"
    monkeypatch.setattr(runs, "follows", lambda *_: True)  # the one of this test is short
    assert fake("--seeds", "1,3", "--audit", "--out", "out")[0] == 0
    told = json.loads((tmp_path / "out" / "seed3" / "audit.json").read_text())
    assert told["arguments"] == ["--seeds", "out/seed1"]  # R4 compares with the seeds before it
    before = everything(tmp_path / "out")
    code, out, _ = fake("--seeds", "1,2,3", "--audit", "--out", "out", "--json")
    assert code == 1 and "seed 2 FAIL (1 FAIL)" in out
    assert [run["audit"] for run in json.loads(out.splitlines()[-1])["runs"]][1] == {
        "verdict": "FAIL",
        "FAIL": 1,
    }
    assert everything(tmp_path / "out").items() >= before.items()


def test_the_scripts_own_words_about_a_wrong_setting(fake):
    code, _, err = fake("--seeds", "1", BROKEN=1)
    assert code == 2 and err.count("\n") == 1 and "MATRIX_LR=none: must be a number" in err


def test_a_two_seed_claim_of_the_real_script(tmp_path):
    """The real command, tiny and three steps long: both seeds run, then again without running.

    TensorBoard follows, and reads the numbers of the results.
    """
    smoke.make_data(tmp_path / "data")
    shutil.copy(smoke.SCRIPT, tmp_path)
    for part in ("harness", "systems"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    stub = "def packed_script(*_):\n    return b'packed', True\n"
    (tmp_path / "harness" / "packing.py").write_text(stub)  # counting code takes long
    environ = smoke.environment(DATA_PATH="data", ITERATIONS=3, VAL_LOSS_EVERY=0, TENSORBOARD_DIR="board")
    command = [sys.executable, TOOL, "--seeds", "1,2", "--json", "--", sys.executable, "train_gpt.py"]
    first, again = (
        subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=PATIENCE)
        for _ in range(2)
    )
    assert (first.returncode, again.returncode) == (0, 0), first.stderr
    assert again.stdout.count("finished before") == 2 and "final val_bpb" not in again.stdout
    found = json.loads(first.stdout.splitlines()[-1])
    assert found == json.loads(again.stdout.splitlines()[-1])
    assert found["seeds"] == [1, 2] and found["std"] > 0 and found["missing"] == ["audit"]
    scores = [run["val_bpb"] for run in found["runs"]]
    assert found["mean"] == pytest.approx(sum(scores) / 2)
    for run in found["runs"]:
        assert (
            run["legal"] and run["steps"] == 3 and len(run["script_sha256"]) == len(run["data_sha256"]) == 64
        )
        log = runs.read_log(next((tmp_path / run["path"] / "logs").glob("*.txt")))
        assert (log.seed, log.data_sha256) == (run["seed"], run["data_sha256"])
        assert log.script_sha256 == run["script_sha256"] != log.environment["source_sha256"]
        points = scalars(tmp_path / "board" / log.name)
        assert points["final/val_bpb"] == [(3, pytest.approx(run["val_bpb"], rel=1e-6))]
        assert [step for step, _ in points["train/train_loss"]] == [1, 2, 3]


# -- submission and README


@pytest.fixture
def site(tmp_path, demo):
    """A folder with a README to fill in and, in runs/, a finished run of the demo: (folder, its record)."""
    (tmp_path / "README.md").write_text(f"# Title\n\n{submission.BEGIN}{submission.END}\n\nrest\n")
    folder = tmp_path / "runs" / "demo"
    (folder / "logs").mkdir(parents=True)
    shutil.copy(DEMO, folder / "result.json")
    shutil.copy(DEMO.with_suffix(".txt"), folder / "logs" / f"{demo.name}.txt")
    shutil.copy(DEMO.with_name(f"{DEMO.stem}_audit.json"), folder / "audit.json")
    return tmp_path, runs.read_run(folder)


def forget_files(path: Path) -> None:
    """Make an audit one that does not tell which files it judged."""
    told = json.loads(path.read_text())
    del told["files"]
    path.write_text(json.dumps(told))


def write(site) -> dict:
    folder, record = site
    published = submission.publish([record], folder / "logs")
    return submission.write(published, {"author": "A. Author", "command": "make demo"}, folder)


def test_a_run_that_tells_no_commit_is_submitted(site):
    """As where the script ran outside of a repository."""
    folder, record = site
    forget_files(record.path / "audit.json")
    result = json.loads((record.path / "result.json").read_text())
    assert result["environment"].pop("commit")
    (record.path / "result.json").write_text(json.dumps(result))
    assert write((folder, runs.read_run(record.path)))["commit"] is None
    assert "; commit unknown." in (folder / "README.md").read_text()


def test_a_submission_is_what_the_logs_say(site):
    told = write(site)
    folder, record = site
    assert json.loads((folder / "submission.json").read_text()) == told
    assert (told["val_bpb"], told["val_loss"]) == (record.val_bpb, record.val_loss)
    assert (told["bytes_total"], told["bytes_code"]) == (record.artifact_bytes, record.code_bytes)
    assert told["seeds"] == [42] and told["seed_results"]["42"]["audit"] == claim.audit_counts(record)
    assert told["script_sha256"] == record.script_sha256 and told["author"] == "A. Author"
    assert told["track"] == "non_record_16mb" and any("not 8 x H100" in r for r in told["non_record_reasons"])
    text = (folder / "README.md").read_text()
    assert text.startswith("# Title") and text.endswith("\n\nrest\n")
    assert f"| 42 | {record.steps} |" in text and f"{record.val_bpb:.5f}" in text and "make demo" in text
    assert DEMO.with_suffix(".txt").read_text().splitlines()[-1] in text.splitlines()
    assert submission.disagreements(folder) == []
    assert (folder / "logs" / "demo_seed42_cpu.txt").is_file()


def test_bytes_are_those_of_the_largest_and_scores_means(trio):
    records = [change(r, artifact_bytes=r.seed * 10, code_bytes=r.seed) for r in trio(2.0, 2.5, 3.0)]
    told = submission.submission(records, {})
    assert (told["val_bpb"], told["val_bpb_std"]) == (2.5, 0.5)
    assert (told["bytes_total"], told["bytes_code"]) == (30, 3)


def test_the_record_track_needs_all_of_it(trio):
    records = trio(2.0, 2.5, 3.0)
    documents = {**records[0].stages["ttt"], "documents": 50_000}
    machine = environment(records[0], device="NVIDIA H100 80GB HBM3", ranks=8, data_sha256="d")
    checks = dict.fromkeys(
        submission.NEEDED, {"status": "VERIFIED"}
    )  # of now, whatever the committed one has
    audit = records[0].audit | {"files": {"result": "0"}, "checks": checks}
    good = [change(record, **machine, stages={"ttt": documents}, audit=audit) for record in records]
    assert submission.not_a_record(good) == []
    partial = audit | {"checks": audit["checks"] | {"E2": {"status": "NOT CHECKED"}, "D1": {}}}
    assert submission.not_a_record([change(good[0], audit=partial), *good[1:]]) == ["not checked: E2, D1"]
    unbound = {key: value for key, value in audit.items() if key != "files"}
    told = submission.not_a_record([change(good[0], audit=unbound), *good[1:]])
    assert told == ["its audit does not tell of which files"]
    assert submission.not_a_record(good[:2]) == ["2 of 3 seeds"]
    assert submission.not_a_record([change(good[0], audit=None), *good[1:]]) == ["not audited"]
    assert len(submission.not_a_record(records)) >= 2


def test_the_checks_that_a_record_needs_are_those_of_the_audit():
    from auditing.checks import ORDER, QUESTIONS

    assert sorted(submission.NEEDED) == sorted({*ORDER} - {*QUESTIONS, "W2"})


def test_an_audit_of_other_files_is_not_believed(site):
    """Each file that it judged, in the run's folder and of the copies that are published."""
    folder, record = site
    (record.path / "ledger.jsonl").write_text("{}")
    hashes = runs.hashes_of_files(record.path, record.result)
    assert sorted(hashes) == ["ledger", "log", "result"]
    edit_json(record.path / "audit.json", "files", hashes)
    assert runs.changed_since_audit(runs.read_run(record.path)) == []
    (record.path / "ledger.jsonl").write_text("{ }")
    assert runs.changed_since_audit(runs.read_run(record.path)) == ["ledger"]
    with pytest.raises(submission.SubmissionError, match="its audit is that of another ledger"):
        submission.check_submittable([runs.read_run(record.path)])
    published = submission.publish([record], folder / "logs")[0]
    assert runs.changed_since_audit(published) == []
    published.path.write_text(published.path.read_text() + "\n")
    assert runs.changed_since_audit(runs.read(published.path)) == ["result"]


@pytest.mark.parametrize(
    "places, told",
    [
        (("environment", "device"), "NVIDIA H100 80GB HBM3"),
        (("environment", "ranks"), 8),
        (("stages", "ttt", "documents"), 50_000),
        (("stages", "quantised", "val_bpb"), 1.05),
    ],
)
def test_a_result_must_say_what_its_log_says(site, places, told):
    _, record = site
    edit_json(record.path / "result.json", *places, told)
    with pytest.raises(runs.ReadError, match=f"says {places[-1]}.* {told}, its log"):
        runs.read_run(record.path)


def edit_json(path: Path, *places_and_value) -> None:
    """Set a value deep in a JSON file."""
    *places, last, value = places_and_value
    whole = inner = json.loads(path.read_text())
    for place in places:
        inner = inner[place]
    inner[last] = value
    path.write_text(json.dumps(whole))


@pytest.mark.parametrize(
    "places",
    [
        ("val_bpb", 2.0),
        ("val_bpb_std", 0.1),
        ("bytes_total", 1),
        ("hardware", "8 x H100"),
        ("non_record", False),
        ("seeds", [42, 43]),
        ("seed_results", "42", "train_seconds", 1.0),
        ("seed_results", "42", "audit", "VERIFIED", 270),
        ("script_sha256", "0" * 64),
        ("invented", 1),
    ],
)
def test_check_finds_what_was_typed_by_hand(site, places):
    write(site)
    edit_json(site[0] / "submission.json", *places)
    found = submission.disagreements(site[0])
    assert found and places[0] in found[0]


def test_check_finds_another_readme_and_another_log(site):
    write(site)
    folder = site[0]
    readme = folder / "README.md"
    text = readme.read_text()
    readme.write_text(text.replace("# Title", "# Another title"))
    assert submission.disagreements(folder) == []  # only the block is ours
    readme.write_text(text.replace("| 42 | 1", "| 42 | 2"))
    assert "README.md" in submission.disagreements(folder)[0]
    readme.write_text(text)
    log = folder / "logs" / "demo_seed42_cpu.txt"
    log.write_text(log.read_text().replace("\ntrain step:20 ", "\ntrain step:21 "))
    with pytest.raises(submission.SubmissionError, match="its audit is that of another log"):
        submission.disagreements(folder)
    forget_files(folder / "logs" / "demo_seed42_cpu_audit.json")
    assert any("log_sha256" in line for line in submission.disagreements(folder))
    edit_json(folder / "logs" / "demo_seed42_cpu.json", "artifact_bytes", 7)
    with pytest.raises(runs.ReadError, match="says artifact_bytes 7, its log"):
        submission.disagreements(folder)
    log.unlink()
    with pytest.raises(submission.SubmissionError, match="demo_seed42_cpu.txt: missing"):
        submission.disagreements(folder)


def test_the_repositorys_own_submission_agrees_with_its_logs():
    assert submission.disagreements() == []


OBJECTIONS = {
    "only a sample was scored": lambda r: {"settings": {**r.settings, "VAL_DOC_FRACTION": 0.5}},
    "ALLOW_ILLEGAL=1": lambda r: {"result": {**r.result, "prequant_ttt": {"epochs": 6}}},
    "did not train a model": lambda r: {"steps": None},
    "write its artifact": lambda r: {"artifact_bytes": None},
    "evaluation took 700": lambda r: {"broken_limits": ("evaluation took 700 s",), "legal": False},
    "not legal": lambda r: {"legal": False},
    "unverified data: no": lambda r: {"result": {**r.result, "unverified_data": "no manifest"}},
    "without its result.json": lambda r: {"form": "log"},
    "audit is that of another run": lambda r: {"audit": {**r.audit, "run": "other"}},
    "audit is that of another script": lambda r: {"audit": {**r.audit, "script_sha256": "0"}},
    "its audit says FAIL: D1, D3": lambda r: {
        "audit": {**r.audit, "checks": {name: {"status": "FAIL"} for name in ("D1", "D3")}}
    },
}


@pytest.mark.parametrize("wanted", OBJECTIONS)
def test_what_may_not_be_submitted(demo, wanted):
    with pytest.raises(submission.SubmissionError, match=wanted):
        submission.check_submittable([change(demo, **OBJECTIONS[wanted](demo))])


def test_a_run_without_audit_may_be_submitted_and_says_so(site):
    folder, record = site
    (record.path / "audit.json").unlink()
    told = write((folder, runs.read_run(record.path)))
    assert "not audited" in told["non_record_reasons"] and told["seed_results"]["42"]["audit"] is None
    assert "seed 42 not audited" in (folder / "README.md").read_text()
    assert submission.disagreements(folder) == []


def test_a_refused_submission_leaves_logs_and_readme_as_they_were(site, monkeypatch, capsys):
    folder, record = site
    write(site)
    before = everything(folder)
    edit_json(record.path / "audit.json", "checks", "D1", "status", "FAIL")
    monkeypatch.setattr(reproduce.seeds, "ROOT", folder)
    code, _, err = call("--from-logs", record.path, "--submission", capsys=capsys)
    assert code == 2 and "audit.json is not believed" in err
    after = everything(folder)
    assert {p: after[p] for p in before if p.parent != record.path} == {
        p: v for p, v in before.items() if p.parent != record.path
    }


def test_settings_that_differ_are_said_as_they_are_set(demo):
    """0 and 1, not False and True."""
    other = change(demo, settings={**demo.settings, "SMEAR_GATE_ENABLED": False})
    assert "SMEAR_GATE_ENABLED 1 and 0" in " ".join(claim._differences(demo, other))
