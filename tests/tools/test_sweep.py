"""The sweep: what it refuses, what it does with crashes, signals and company, and a real one of two trials.

Most tests run a stand-in for the script, which writes the files of a run in milliseconds.
"""

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
from test_smoke import environment, make_data

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import sweep  # noqa: E402

# Scores: (MATRIX_LR - 0.03)^2 * 1000 + TTT_LORA_RANK / 100; STAND_IN chooses what goes wrong.
STAND_IN = """
import json, os, sys, time
folder, how = os.environ["ARTIFACT_DIR"], os.environ.get("STAND_IN", "")
rank, lr = int(os.environ.get("TTT_LORA_RANK", 8)), float(os.environ.get("MATRIX_LR", 0.026))
bpb = 1000 * (lr - 0.03) ** 2 + rank / 100
if how == "crash" and rank == 80:
    print("some output")
    sys.exit("stand-in: no luck with rank 80\\n")
with open(folder + "/metrics.jsonl", "w") as file:
    for step in range(0, 30, 10):
        name = f"step_{step}" if step else "untrained"
        print(json.dumps({"stage": name, "val_loss": 1.0, "val_bpb": bpb + 1}), file=file, flush=True)
        time.sleep(0.25 if how == "slow" and rank == 96 else 0)
    if how in ("sleep", "slow") and rank == 96:
        print(os.getpid(), flush=True)
        time.sleep(3600)
stages = {"ttt": {"val_loss": 2 * bpb, "val_bpb": bpb, "seconds": 1.0, "targets": 9}}
over = ["artifact has 16000001 bytes, limit 16000000"] if how == "over" and rank == 64 else []
result = {"run": os.environ["RUN_ID"], "final_stage": "ttt", "stages": stages, "settings": {"SEED": 42},
          "val_bpb": bpb, "val_loss": 2 * bpb, "artifact_bytes": 100, "broken_limits": over}
with open(folder + "/result.json", "w") as file:
    json.dump(result, file)
sys.exit(3 if over else 0)
"""
LR, RANK = "MATRIX_LR=log:0.018:0.04", "TTT_LORA_RANK=64,80,96"


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty folder to work in, with the stand-in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    return tmp_path


def arguments(*sets: str, trials: int = 4, command: str = "stand_in.py", options: str = "") -> list[str]:
    """Command line of a sweep."""
    chosen = [word for text in sets for word in ("--set", text)]
    return [
        *chosen,
        "--trials",
        str(trials),
        "--seed",
        "1",
        "--json",
        *options.split(),
        "--",
        sys.executable,
        *command.split(),
    ]


def run(
    capsys, *sets: str, stand_in: str = "", environ: dict | None = None, code: int = 0, **options
) -> dict:
    """A sweep in this process; its last line."""
    settings = {"PATH": os.environ["PATH"], "STAND_IN": stand_in} | (environ or {})
    assert sweep.main(arguments(*sets, **options), settings) == code, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def start(folder: Path, *sets: str, stand_in: str = "", **options) -> subprocess.Popen:
    """A sweep in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "sweep.py"), *arguments(*sets, **options)],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "STAND_IN": stand_in},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def alive(process: int) -> bool:
    """Whether a process is there and has not ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return " (zombie)" not in Path(f"/proc/{process}/status").read_text()
    return False


WRONG = {
    "MATRX_LR=log:0.01:0.1": "no such setting; did you mean MATRIX_LR?",
    "MATRIX_LR=log:0:0.1": "LOW must be above 0",
    "MATRIX_LR=lin:0.2:0.1": "LOW must be below HIGH",
    "MATRIX_LR=lin:a:0.1": "must be log:LOW:HIGH",
    "MATRIX_LR=exp:0.1:0.2": "must be log:LOW:HIGH",
    "MATRIX_LR=0.1": "two values or more",
    "MATRIX_LR=0.1,0.1": "each once",
    "MATRIX_LR=0.1,high": "MATRIX_LR='high': must be a number, at least 0",
    "MATRIX_LR=lin:-0.1:0.1": "MATRIX_LR=-0.1: must be a number, at least 0",
    "MIN_LR=lin:0.1:1.5": "MIN_LR=1.5: must be a number, at least 0, at most 1",
    "TTT_LORA_RANK=lin:8:96": "a whole number, so int:LOW:HIGH or a list",
    "TTT_LORA_RANK=int:0:96": "TTT_LORA_RANK=0: must be a whole number, at least 1",
    "TTT_LORA_RANK=int:8:9.5": "must be log:LOW:HIGH",
    "TTT_ENABLED=lin:0:1": "no number, so a list a,b,c",
    "COMPRESSOR=brotli,zip": "must be one of brotli, lzma, ans",
    "NUM_KV_HEADS=4,5": "must be a multiple of NUM_KV_HEADS=5",
    "RUN_ID=a,b": "every trial has another",
    "SEED=1,2": "is set in the environment too",
}


@pytest.mark.parametrize("text, reason", WRONG.items())
def test_a_wrong_variable_is_refused_before_anything_starts(work, capsys, text, reason):
    assert sweep.main(arguments(text), {"SEED": "7", "PATH": os.environ["PATH"]}) == 2
    error = capsys.readouterr().err
    assert error.startswith("sweep.py: error: ") and error.count("\n") == 1 and reason in error
    assert [path.name for path in work.iterdir()] == ["stand_in.py"]


def test_what_nothing_reads_cannot_vary(work, capsys):
    """Unless another variable has values with which it is read."""
    environ = {"PATH": os.environ["PATH"]}
    assert sweep.main(arguments("TTT_EPOCHS=2,3"), environ) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "sweep.py: error: --set TTT_EPOCHS: no effect without TTT_SGD=1"
    assert sweep.main(arguments("TTT_LORA_RANK=8,16"), environ | {"PREQUANT_ONLY": "1"}) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "sweep.py: error: --set TTT_LORA_RANK: no effect with PREQUANT_ONLY=1"
    read = [sweep.Variable(name, "list", values=("0", "1")) for name in ("TTT_EPOCHS", "TTT_SGD")]
    sweep.check_read(read, sweep.settle(environ))


def test_what_is_switched_off_cannot_vary(work, capsys):
    """PHASED_TTT_ENABLED=0 makes the setting 0, whatever a trial says."""
    environ = {"PHASED_TTT_ENABLED": "0", "PATH": os.environ["PATH"]}
    assert sweep.main(arguments("PHASED_TTT_PREFIX_DOCS=10,20"), environ) == 2
    assert "PHASED_TTT_ENABLED=0 is set in the environment too; unset it" in capsys.readouterr().err


MISTAKES = {
    "--metric speed": "--metric speed: must be one of val_bpb,",
    "--metric ttt.bytes": "--metric ttt.bytes: must be one of",
    "--prune": "VAL_LOSS_EVERY=0 must be above 0",
    "--prune --metric artifact_bytes": "compares val_bpb or val_loss",
    "--sampler grid": "MATRIX_LR has a continuous range",
    "--trials 0": "--trials 0: must be at least 1",
    "--study ../x": "must be a name",
    "--storage sqlite:///no/such/folder/a.db": "cannot be opened",
    "--storage oracel://x": "cannot be opened",
    f"--set {LR}": "name each variable once",
}


@pytest.mark.parametrize("options, reason", MISTAKES.items())
def test_a_wrong_option_is_one_line(work, capsys, options, reason):
    assert sweep.main(arguments(LR, options=options), {"PATH": os.environ["PATH"]}) == 2
    error = capsys.readouterr().err
    assert error.startswith("sweep.py: error: ") and error.count("\n") == 1 and reason in error


def test_a_grid_too_large_is_refused(work, capsys):
    sets = ("SEED=int:0:99999", "TTT_LORA_RANK=1,2")
    assert sweep.main(arguments(*sets, options="--sampler grid"), {"PATH": os.environ["PATH"]}) == 2
    assert "200000 combinations; at most 10000" in capsys.readouterr().err


def test_a_value_that_only_another_variable_allows_is_allowed(work, capsys):
    sets = ("NUM_HEADS=8,12", "MODEL_DIM=512,768")
    result = run(capsys, *sets, trials=4, options="--sampler grid")
    assert result["trials"]["fail"] == 1 and result["trials"]["complete"] == 3  # 512 / 12
    assert "MODEL_DIM=512: must be a multiple of NUM_HEADS=12" in "".join(result["failures"].values())


def test_best_settings_importance_and_picture(work, capsys):
    result = run(capsys, LR, RANK, trials=8, environ={"WARMUP_STEPS": "3", "SCALE": "demo"})
    assert result["trials"] == {"complete": 8, "pruned": 0, "fail": 0, "running": 0}
    best = result["best"]
    scores = [json.loads(path.read_text())["val_bpb"] for path in work.glob("runs/sweep/trial_*/result.json")]
    assert len(scores) == 8 and best["value"] == min(scores)
    assert json.loads((Path(best["folder"]) / "result.json").read_text())["val_bpb"] == min(scores)
    values = " ".join(f"{name}={value}" for name, value in best["values"].items())
    assert best["line"] == f"WARMUP_STEPS=3 SCALE=demo {values} {sys.executable} stand_in.py"
    assert (
        best["value"]
        == 1000 * (float(best["values"]["MATRIX_LR"]) - 0.03) ** 2
        + int(best["values"]["TTT_LORA_RANK"]) / 100
    )
    assert sum(result["importance"].values()) == pytest.approx(1)
    assert result["importance"]["TTT_LORA_RANK"] > 0.5  # 0.32 against at most 0.14
    assert (work / "runs/sweep/sweep.png").read_bytes().startswith(b"\x89PNG")


def test_first_trial_has_the_present_settings(work, capsys):
    result = run(capsys, LR, "TTT_LORA_RANK=64,96", trials=1)
    assert result["best"]["values"] == {"MATRIX_LR": "0.026", "TTT_LORA_RANK": "96"}
    assert result["importance_missing"] == "fewer than two different scores"


def test_present_settings_outside_the_ranges_are_not_tried(work, capsys):
    result = run(capsys, LR, "TTT_LORA_RANK=64,80", trials=2)
    assert result["trials"]["complete"] == 2 and result["best"]["values"]["TTT_LORA_RANK"] in ("64", "80")


def test_a_crashed_trial_is_recorded_and_the_sweep_goes_on(work, capsys):
    result = run(capsys, RANK, stand_in="crash", trials=3, options="--sampler grid")
    assert result["trials"] == {"complete": 2, "pruned": 0, "fail": 1, "running": 0}
    assert list(result["failures"].values()) == ["exit code 1: stand-in: no luck with rank 80"]


def test_no_score_at_all_is_exit_code_1(work, capsys):
    result = run(capsys, RANK, trials=2, command="missing.py", code=1)
    assert result["best"] is None and "missing.py" in list(result["failures"].values())[0]


def test_a_run_over_a_limit_is_never_the_best(work, capsys):
    result = run(capsys, RANK, stand_in="over", trials=3, options="--sampler grid")
    assert result["trials"]["complete"] == 3
    assert result["best"]["values"] == {"TTT_LORA_RANK": "80"} and result["best"]["over_limit"] == []


def test_a_sweep_whose_command_always_fails_ends_and_begins_anew_once_it_is_mended(work, capsys):
    (work / "stand_in.py").write_text("import sys\nsys.exit('wrong since 12:00')")
    assert run(capsys, LR, trials=9, code=1)["trials"]["fail"] == 3
    (work / "stand_in.py").write_text(STAND_IN)
    result = run(capsys, LR, trials=4)
    assert (result["trials"]["fail"], result["trials"]["complete"]) == (0, 4)


@pytest.mark.parametrize("storage", ["sqlite:///sweep.db", "shared.journal"])
def test_the_same_storage_goes_on_to_the_total(work, capsys, storage):
    options = f"--storage {storage}"
    assert run(capsys, LR, RANK, trials=2, options=options)["trials"]["complete"] == 2
    assert run(capsys, LR, RANK, trials=5, options=options)["trials"]["complete"] == 5
    assert run(capsys, LR, RANK, trials=5, options=options)["trials"]["complete"] == 5
    assert len(list(work.glob("runs/sweep/trial_*"))) == 5


def values_tried(work: Path) -> list[float]:
    """Scores of all trials: they differ where the values do."""
    return [json.loads(path.read_text())["val_bpb"] for path in work.glob("runs/sweep/trial_*/result.json")]


def test_going_on_does_not_repeat_random_draws(work, capsys):
    for trials in (3, 6):
        run(capsys, LR, trials=trials, options="--sampler random")
    assert len(set(values_tried(work))) == 6


def test_a_grid_is_covered_whatever_the_seeds_of_its_processes(work, capsys):
    for trials, seed in ((3, 5), (5, 6), (9, 7)):
        result = run(capsys, "TTT_LORA_RANK=int:1:7", trials=trials, options=f"--sampler grid --seed {seed}")
    assert result["trials"]["complete"] == 7
    assert sorted(values_tried(work)) == pytest.approx([1000 * 0.004**2 + rank / 100 for rank in range(1, 8)])


CHANGES = {
    "metric": ((LR,), {"options": "--metric val_loss"}, "began with --metric val_bpb"),
    "variable": ((RANK,), {}, "began with --set ['MATRIX_LR=log:0.018:0.04']"),
    "setting": ((LR,), {"environ": {"MUON_WD": "0.1"}}, "began with MUON_WD=0.095, not 0.1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_question_needs_another_study(work, capsys, change):
    run(capsys, LR, trials=1)
    sets, options, reason = CHANGES[change]
    environ = {"PATH": os.environ["PATH"], **options.pop("environ", {})}
    assert sweep.main(arguments(*sets, **options), environ) == 2
    assert reason in capsys.readouterr().err


def test_a_changed_script_needs_another_study(work, capsys):
    run(capsys, LR, trials=1)
    (work / "stand_in.py").write_text(STAND_IN + "\n")
    assert sweep.main(arguments(LR), {"PATH": os.environ["PATH"]}) == 2
    assert "began with another script" in capsys.readouterr().err


def test_pruning_ends_what_is_worse_than_the_median(work, capsys):
    settings = {"VAL_LOSS_EVERY": "10", "ITERATIONS": "30"}
    ranks = "TTT_LORA_RANK=1,2,3,4,96"  # in this order; 96 would sleep for an hour
    result = run(capsys, ranks, stand_in="slow", trials=5, options="--prune --sampler grid", environ=settings)
    order = [
        path.name for path in sorted(work.glob("runs/sweep/trial_*")) if not (path / "result.json").exists()
    ]
    assert result["trials"]["pruned"] == 1 and len(order) == 1
    assert result["best"]["values"] == {"TTT_LORA_RANK": "1"}


def test_ctrl_c_ends_the_run_and_its_values_are_tried_again(work, capsys):
    process = start(work, "TTT_LORA_RANK=96,95", stand_in="sleep", trials=2, options="--sampler grid")
    console = wait_for(lambda: next((p for p in work.glob("runs/*/*/console.txt") if p.read_text()), None))
    child = int(console.read_text())
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and "Traceback" not in errors
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    assert "stopped; the same command goes on" in output
    result = run(capsys, "TTT_LORA_RANK=96,95", trials=2, options="--sampler grid")
    assert result["trials"] == {"complete": 2, "pruned": 0, "fail": 0, "running": 0}
    assert result["best"]["values"] == {"TTT_LORA_RANK": "95"}


def test_a_killed_sweep_is_taken_up_and_two_processes_share_a_study(work, capsys):
    process = start(
        work, "TTT_LORA_RANK=96,90,91,92,93,94,95", stand_in="sleep", trials=7, options="--sampler grid"
    )
    console = wait_for(lambda: next((p for p in work.glob("runs/*/*/console.txt") if p.read_text()), None))
    process.kill()
    process.communicate()
    wait_for(lambda: not alive(int(console.read_text())))
    both = [
        start(work, "TTT_LORA_RANK=96,90,91,92,93,94,95", trials=7, options="--sampler grid")
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=PATIENCE) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    results = [json.loads(output.splitlines()[-1]) for output, _ in outputs]
    assert max(result["trials"]["complete"] for result in results) == 7
    last = run(capsys, "TTT_LORA_RANK=96,90,91,92,93,94,95", trials=7, options="--sampler grid")
    assert last["trials"] == {"complete": 7, "pruned": 0, "fail": 0, "running": 0}
    assert last["best"]["values"] == {"TTT_LORA_RANK": "90"}


def test_guard_kills_what_does_not_end_when_told():
    quiet = {"stdout": subprocess.PIPE, "start_new_session": True}
    stubborn = subprocess.Popen(["sh", "-c", "trap '' TERM; echo; sleep 3600"], **quiet)
    stubborn.stdout.readline()
    guard = subprocess.Popen(
        ["sh", "-c", sweep.GUARD, "guard", str(stubborn.pid), "1"], stdin=subprocess.PIPE
    )
    with pytest.raises(subprocess.TimeoutExpired):
        stubborn.wait(2)  # as long as the pipe is open nothing happens
    guard.stdin.close()
    assert stubborn.wait(PATIENCE) == -signal.SIGKILL and guard.wait(PATIENCE) == 0


RANKS = """
import os, time
os.write(1, f"{os.getpid()}\\n".encode())  # at once: the ranks share the console
time.sleep(3600)
"""


def test_kill_9_ends_the_ranks_of_torchrun_too(work):
    """Whose processes are sessions of their own, which no signal to the run's group reaches."""
    (work / "ranks.py").write_text(RANKS)
    torchrun = "-m torch.distributed.run --nproc-per-node 2 ranks.py"
    process = start(work, "TTT_LORA_RANK=8,9", trials=1, command=torchrun)
    console = wait_for(lambda: next(iter(work.glob("runs/*/*/console.txt")), None))
    ranks = wait_for(lambda: len(pids := re.findall(r"^\d+$", console.read_text(), re.M)) == 2 and pids)
    assert all(alive(int(rank)) for rank in ranks)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(alive(int(rank)) for rank in ranks))


def test_a_real_sweep_of_the_script(work):
    make_data(work / "data")
    tiny = environment(DATA_PATH="data", ITERATIONS=2, VAL_LOSS_EVERY=0, WARMUP_STEPS=0, PREQUANT_ONLY=1)
    options = ["--set", LR, "--trials", "2", "--metric", "prequant.val_bpb", "--json"]
    process = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "sweep.py"), *options],
        cwd=work,
        env=tiny,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout.splitlines()[-1])
    assert result["trials"]["complete"] == 2
    for folder in work.glob("runs/sweep/trial_*"):
        outcome = json.loads((folder / "result.json").read_text())
        assert outcome["run"] == f"sweep_{folder.name}"
        assert (
            f"trial {int(folder.name[-4:])} MATRIX_LR={outcome['settings']['MATRIX_LR']:.6g}: "
            in process.stdout
        )
    best = json.loads((work / result["best"]["folder"] / "result.json").read_text())
    assert best["stages"]["prequant"]["val_bpb"] == result["best"]["value"]
