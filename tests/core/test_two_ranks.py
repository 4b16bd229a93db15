"""Two processes (gloo, torchrun) give what one gives: losses, artifact bytes, scores; and a killed rank."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from patience import PATIENCE
from quick_run import QUICK
from test_ranks import free_port, rank_environment
from test_smoke import command, environment, make_data

ONE_NODE = ("--standalone", "--nproc_per_node=2")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Folder with a tiny data set."""
    folder = tmp_path_factory.mktemp("ranks")
    make_data(folder / "data")
    return folder


def launch(
    work: Path, name: str, *options: str, script: Path = QUICK, **settings: object
) -> subprocess.Popen:
    """Start the script, under torchrun if it gets options; its outputs go to the folder `name`."""
    torchrun = ["-m", "torch.distributed.run", *options] if options else []
    return subprocess.Popen(
        [sys.executable, *torchrun, str(script)],
        cwd=work,
        env=environment(DATA_PATH="data", ARTIFACT_DIR=name, **settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ranks(
    work: Path, name: str, count: int = 2, script: Path = QUICK, **settings: object
) -> list[subprocess.CompletedProcess]:
    """The processes of a run as torchrun starts them, but with torch imported (`warm`)."""
    given, port = environment(DATA_PATH="data", ARTIFACT_DIR=name, **settings), free_port()
    return warm.run_together(script, work, [given | rank_environment(n, count, port) for n in range(count)])


def outputs(process: subprocess.Popen, folder: Path) -> tuple[dict, list[float], bytes]:
    """Result, logged training losses and artifact of a run that must end well."""
    console, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    return written(console, folder)


def written(console: str, folder: Path) -> tuple[dict, list[float], bytes]:
    """Result, losses in what was printed, and artifact of a run."""
    result = json.loads((folder / "result.json").read_text())
    lines = [line for line in console.splitlines() if line.startswith("train step:")]
    losses = [float(line.split("train_loss:")[1].split()[0]) for line in lines]
    return result, losses, (folder / "final_model.int6.ptz").read_bytes()


@pytest.fixture(scope="module")
def alone(work):
    """The run of a single process, adapters drawn per batch."""
    process = command(QUICK, work, DATA_PATH="data", ARTIFACT_DIR="alone", TTT_WARM_START_A=0)
    assert process.returncode == 0, process.stderr
    return written(process.stdout, work / "alone")


def assert_same_run(two: tuple, one: tuple) -> None:
    for stage, score in one[0]["stages"].items():
        assert two[0]["stages"][stage]["targets"] == score["targets"]
        assert two[0]["stages"][stage]["val_bpb"] == pytest.approx(score["val_bpb"], rel=1e-4), stage
    assert two[1] == pytest.approx(one[1], rel=1e-4)


def test_two_processes_give_what_one_gives(work, alone):
    two = outputs(launch(work, "two", *ONE_NODE, TTT_WARM_START_A=0), work / "two")
    assert two[0]["environment"]["ranks"] == 2
    assert_same_run(two, alone)
    assert not list(work.glob("two+*"))  # only rank 0 writes


def test_two_nodes_of_one_process(work, alone):
    meeting = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    options = ["--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", meeting]
    other = launch(work, "nodes", *options, TTT_WARM_START_A=0)
    nodes = launch(work, "nodes", *options, TTT_WARM_START_A=0)
    _, errors = other.communicate(timeout=PATIENCE)
    assert other.returncode == 0, errors
    nodes.communicate(timeout=PATIENCE)
    result = json.loads((work / "nodes" / "result.json").read_text())
    assert result["val_bpb"] == pytest.approx(alone[0]["val_bpb"], rel=1e-4)
    assert not list(work.glob("nodes+*"))


def test_given_weights_are_quantised_to_the_same_bytes(work, alone):
    """Same checkpoint, calibrated and quantised by two ranks: the file of one rank, byte for byte."""
    settings = {"QUANTIZE_ONLY": 1, "MODEL_PATH": work / "alone" / "final_model.pt", "TTT_ENABLED": 0}
    for process in ranks(work, "quantised", **settings):
        assert process.returncode == 0, process.stderr
    name = "final_model.int6.ptz"
    assert json.loads((work / "quantised/result.json").read_text())["environment"]["ranks"] == 2
    assert (work / "quantised" / name).read_bytes() == alone[2]


@pytest.mark.parametrize("fit_bytes", [0, 60_000])
def test_trellis_is_the_same_on_any_number_of_ranks(work, alone, fit_bytes):
    """Matrices are rounded together with others: which ones depends on the ranks, their levels must not."""
    settings = {"QUANTIZE_ONLY": 1, "MODEL_PATH": work / "alone" / "final_model.pt", "TTT_ENABLED": 0}
    settings |= {"QUANTIZER": "trellis", "COMPRESSOR": "ans", "FIT_BYTES": fit_bytes}
    settings |= {"GPTQ_DRIFT_BATCHES": int(fit_bytes > 0)}
    artifacts = []
    for count in (1, 2):
        name = f"trellis_{fit_bytes}_{count}"
        for process in ranks(work, name, count, **settings):
            assert process.returncode == 0, process.stderr
        artifacts.append((work / name / "final_model.int6.ptz").read_bytes())
    assert artifacts[0] == artifacts[1]


def rank_process(parent: int, rank: int) -> int | None:
    """Process number of a rank below a torchrun process."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    for child in children:
        try:
            if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
                return int(child)
        except OSError:
            continue
    return None


@pytest.mark.parametrize("stage, line", [("train", "train step:5"), ("ttt", "quantised ")])
def test_killed_rank_ends_the_job(work, alone, stage, line):
    before = {path: path.read_bytes() for path in (work / "alone").rglob("*") if path.is_file()}
    slow = {"ITERATIONS": 4000} if stage == "train" else {"TTT_CHUNK_SIZE": 1, "TTT_GRAD_STEPS": 20}
    job = launch(work, f"killed_{stage}", *ONE_NODE, TRAIN_LOG_EVERY=100, VAL_LOSS_EVERY=0, **slow)
    while not (shown := job.stdout.readline()).startswith(line):
        assert shown, job.stderr.read()[-2000:]
    os.kill(rank_process(job.pid, 1), signal.SIGKILL)
    _, errors = job.communicate(timeout=PATIENCE)
    assert job.returncode != 0
    assert f"rank 0 of 2, stage {stage}" in errors
    assert {path: path.read_bytes() for path in before} == before
    left = {path.name for path in (work / f"killed_{stage}").iterdir()}
    whole = {"logs", "metrics.jsonl", "steps.jsonl"}
    whole |= {"final_model.pt", "final_model.int6.ptz", "train_gpt.packed.py"} if stage == "ttt" else set()
    assert left == whole
