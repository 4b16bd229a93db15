"""A run that is cut off anywhere goes on and ends with the same bytes and scores; what cannot is refused."""

import errno
import fcntl
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from quick_run import QUICK
from test_smoke import environment, make_data

from bench.faults import FULL, OUTPUTS, Bench, contents, difference, durations, full_disk, kill_chain, unwhole

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import runs  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_packing")
# A checkpoint before every step and after every batch; warm-started adapters, the harder case.
KEPT = {"CHECKPOINT_SECONDS": "1e-9", "AUDIT": "1", "TTT_CHUNK_SIZE": "32"}


class Killed(BaseException):
    """Stands for SIGKILL inside this process."""


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A working folder with a data set."""
    folder = tmp_path_factory.mktemp("resume")
    make_data(folder / "data")
    return folder


@pytest.fixture
def processes() -> dict[str, str]:
    """Settings of real processes."""
    return environment(DATA_PATH="data", **KEPT | {"CHECKPOINT_SECONDS": "0.02"})


@pytest.fixture
def run(tg, work, monkeypatch, capfd):
    """Function: name of the output folder, settings -> exit code, standard output and error."""
    monkeypatch.chdir(work)

    def start(name: str, **settings: object) -> tuple[int, str, str]:
        capfd.readouterr()
        given = {"DATA_PATH": "data", "ARTIFACT_DIR": name, "RUN_ID": name and "tiny"} | KEPT | settings
        return tg.main([], environment(**given)), *capfd.readouterr()

    return start


@pytest.fixture(scope="module")
def reference(tg, work, quick_packing) -> dict[str, object]:
    """What the undisturbed run made; its folder is `undisturbed`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        settings = KEPT | {"DATA_PATH": "data", "ARTIFACT_DIR": "undisturbed", "RUN_ID": "tiny"}
        assert tg.main([], environment(**settings)) == 0
    return contents(work / "undisturbed")


@pytest.fixture
def cut_off(tg, monkeypatch, run):
    """Function: start a run and kill it before (or after) the n-th call of a method, or write of a file."""

    def start(name: str, target: str, count: int, after: bool = False, **settings: object) -> None:
        with monkeypatch.context() as patch:
            owner, _, method = target.rpartition(".")
            owner = getattr(tg, owner) if owner[0].isupper() else tg
            wanted, method = ("", method) if owner is not tg else (target, "write_whole")
            original, left = getattr(owner, method), [count]

            def counted(*arguments: object, **options: object) -> object:
                if not wanted or wanted in str(arguments[0]):
                    left[0] -= 1
                    if left[0] == 0 and not after:
                        raise Killed
                value = original(*arguments, **options)
                if left[0] == 0:
                    raise Killed
                return value

            patch.setattr(owner, method, counted)
            with pytest.raises(Killed):
                pytest.fail(f"{target} was not reached: {run(name, **settings)}")

    return start


# -- kills


PLACES = [  # what is being done for the n-th time when the run is killed: before it, or behind it
    ("Guard._opened", 1, False),
    ("Trainer.state", 1, False),
    ("Trainer.step", 8, False),  # two of them are the warm-up's
    ("final_model.pt", 1, False),
    ("final_model.pt", 1, True),
    ("Run.score", 1, False),
    ("Run.quantise", 1, False),
    ("final_model.int6.ptz", 1, False),
    ("final_model.int6.ptz", 1, True),
    ("train_gpt.packed.py", 1, True),
    ("ScoreFirstTTT._score_batch", 1, True),
    ("ScoreFirstTTT._global_phase", 1, True),
    ("Checkpoints._keep_weights", 1, True),
    ("ScoreFirstTTT._score_batch", 2, False),
    ("ScoreFirstTTT._score_batch", 1, True),
    ("Run.finish", 1, False),
    ("result.json", 1, True),
    ("ledger.jsonl", 1, True),
]


def steps_of(folder: Path) -> list[tuple]:
    """What steps.jsonl tells of the steps, but for clock and speed."""
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return [
        tuple(step[key] for key in ("step", "train_loss", "grad_norm", "lr_multiplier")) for step in steps
    ]


def test_resume_of_a_run_killed_at_eighteen_places(work, reference, cut_off, run):
    for target, count, after in PLACES:
        cut_off("chain", target, count, after)
        assert unwhole(work / "chain", reference) == [], target
    code, output, errors = run("chain")
    assert (code, errors) == (0, "")
    assert difference(work / "chain", reference) == []
    resumed = json.loads((work / "chain/result.json").read_text())["resumed"]
    assert 5 <= resumed <= len(PLACES), "those after which a checkpoint was written"
    left = [path.name for path in (work / "chain/checkpoints").iterdir()]
    assert len(left) == 1 and left[0].startswith("run."), "only the mark of the end stays"
    assert len(list((work / "chain/logs").iterdir())) == 1
    steps, undisturbed = (steps_of(work / name) for name in ("chain", "undisturbed"))
    assert steps == undisturbed and len(steps) == reference["steps"]


def test_what_a_run_without_a_checkpoint_has_begun_is_cleared(tg, tmp_path):
    """Files that grow from the start on are no outputs; weights are."""
    for name in ("metrics.jsonl", "steps.jsonl"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "final_model.pt").write_text("")
    assert not tg.clear_beginning(tmp_path, tg.Config())
    (tmp_path / "final_model.pt").unlink()
    assert tg.clear_beginning(tmp_path, tg.Config()) and list(tmp_path.iterdir()) == []


def test_resume_repeats_no_work(work, reference, cut_off, run):
    cut_off("late", "Run.finish", 1)
    code, output, _ = run("late")
    stages = [line.split()[0] for line in output.splitlines()]
    assert code == 0 and stages == ["start", "preflight", "resumed", "final"]
    assert difference(work / "late", reference) == []


STREAM = {"SLIDING_WINDOW_ENABLED": "1", "TTT_SGD": "1", "TTT_CHUNK_TOKENS": "512", "EVAL_STRIDE": "32"}


def test_resume_does_not_slide_or_train_by_sgd_again(tg, work, cut_off, run, monkeypatch):
    """PRESET=pr1493's two stages: each is kept when it has been scored, with what the ledger says of it."""
    assert run("stream-undisturbed", **STREAM)[0] == 0
    reference, calls = contents(work / "stream-undisturbed"), []
    assert {row["kind"] for row in reference["ledger"]} == {"start", "slide", "end", "sgd"}
    score = tg.Run.score

    def counted(self: object, stage: str, *arguments: object, **options: object) -> None:
        calls.extend([stage] * (stage in ("sliding", "ttt")))
        score(self, stage, *arguments, **options)

    monkeypatch.setattr(tg.Run, "score", counted)
    cut_off("stream", "Run.record", 6, **STREAM)  # untrained, step_4, prequant, quantised, sliding, ttt
    assert calls == ["sliding", "ttt"]
    cut_off("stream", "Run.finish", 1, **STREAM)
    assert calls[2:] == ["ttt"], "it was cut off, so it began again; nothing was slid again"
    assert run("stream", **STREAM)[0] == 0 and not calls[3:]
    assert difference(work / "stream", reference) == []


def test_a_result_is_there_when_all_other_files_are(work, cut_off):
    """Who finds result.json takes the run for finished: report, sweep, reproduce."""
    cut_off("unfinished", "ledger.jsonl", 1)
    assert (work / "unfinished/documents.json").exists() and not (work / "unfinished/result.json").exists()


@pytest.mark.parametrize("ranks, kills", [(1, 2), (2, 1)])
def test_resume_after_sigkill(work, processes, ranks, kills):
    """The real thing: processes killed at random moments, on two ranks sometimes only one of them."""
    bench, name = Bench(work, processes, ranks, QUICK), f"killed-{ranks}"
    outcome = bench.run(f"{name}-undisturbed")
    assert outcome.code == 0, outcome.errors
    found = contents(work / f"{name}-undisturbed")
    for number in range(5):  # where the machine is less busy than it was, a run may end before its kill
        rng = random.Random(ranks + 10 * number)
        counts = kill_chain(bench, f"{name}-{number}", kills, found, durations(outcome), rng)
        assert counts["identical"] == counts["kills"] and not counts["wrong"]
        if counts["kills"]:
            return
    pytest.fail("no run was killed")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("place", ["Trainer.step", "Run.score", "ScoreFirstTTT._score_batch"])
def test_resume_after_a_signal(tg, work, reference, run, monkeypatch, number, code, place):
    """Told to stop: the state is kept and nothing is computed twice."""
    owner, method = place.split(".")
    original, calls, name = getattr(getattr(tg, owner), method), [], f"{method}-{code}"

    def told(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == {"step": 4, "score": 2, "_score_batch": 2}[method]:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    monkeypatch.setattr(getattr(tg, owner), method, told)
    ended, output, errors = run(name, CHECKPOINT_SECONDS=1000)
    assert ended == code and f"told to stop ({number.name})" in errors
    done = len(calls)
    ended, output, _ = run(name, CHECKPOINT_SECONDS=1000)
    assert ended == 0 and "resumed" in output
    again = {"step": 2, "score": 0, "_score_batch": 0}[method]  # its warm-up
    whole = {"step": 2 + 6, "score": 5, "_score_batch": 4}[method]
    assert len(calls) - again == whole > done
    assert difference(work / name, reference) == []


def test_a_rank_removes_what_it_is_still_writing_at_the_end(tg, tmp_path):
    checkpoints = object.__new__(tg.Checkpoints)
    checkpoints.ranks, checkpoints._checkpoints = SimpleNamespace(is_main=False, rank=1), tmp_path
    checkpoints._keep = lambda ended: ended == 0

    def write() -> Path:
        time.sleep(0.3)
        return tg.CheckpointFolder(tmp_path, "ttt-1").add({})

    checkpoints._writing = ThreadPoolExecutor(1).submit(write)
    checkpoints._end(0)
    assert list(tmp_path.iterdir()) == []


def test_state_is_that_of_any_number_of_ranks(tg):
    """Muon's momentum is cut among ranks: what two keep one takes up, and the other way round."""
    cfg = tg.Config(**{k.lower(): v for k, v in SMALL.items()}, checkpoint_seconds=1.0)

    class Loader:
        def state(self):
            return 0, 0, 0

        def load_state(self, state):
            assert state == (0, 0, 0)

    def trainer(rank: int, world: int):
        torch.manual_seed(0)
        ranks = tg.Ranks(torch.device("cpu"), rank, world)
        return tg.Trainer(cfg, tg.GPT(cfg, tg.Backends()), Loader(), ranks)

    one = trainer(0, 1)
    for bank in one.muon.param_groups[0]["params"]:
        one.muon.state[bank]["momentum_buffer"] = torch.randn_like(bank).bfloat16()
    clock = tg.Pending(torch.tensor([0.0, 0.0, 1.5, 0.0, 0.0]), None)
    one.steps, one.reports = 2, [tg.StepReport(i, clock, 1.0, 0.0, False) for i in (1, 2)]
    entire, shards = one.state(), []
    for rank in range(2):
        other = trainer(rank, 2)
        other.load_state(tg.copy_tensors(entire))
        assert (other.steps, other.seconds, len(other.reports)) == (2, 1.5, 2)
        shards.append([state["momentum_buffer"] for state in other.muon.state.values()])
    for bank, parts in zip(one.muon.state, zip(*shards, strict=True), strict=True):
        joined = torch.cat(parts)[: len(bank)]
        assert torch.equal(joined, one.muon.state[bank]["momentum_buffer"])
    gathered = iter(list(zip(*shards, strict=True)))
    other.ranks.all_gather = lambda shard: tg.Pending(torch.cat(next(gathered)), None)
    assert contents_of(other.state()) == contents_of(entire)


def contents_of(tree: object) -> object:
    """A state in a form that can be compared."""
    if isinstance(tree, dict):
        return {key: contents_of(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [contents_of(value) for value in tree]
    return (tree.shape, tree.flatten().tolist()) if isinstance(tree, torch.Tensor) else tree


def test_resume_within_adaptation_reads_nothing_that_training_wrote(work, reference, cut_off, run):
    """Check S4 of the audit: what a resumed run takes up is read before its evaluation begins."""
    cut_off("within", "ScoreFirstTTT._score_batch", 4)
    code, output, _ = run("within")
    assert code == 0 and "\nresumed within ttt\n" in output
    assert difference(work / "within", reference) == []
    close = json.loads((work / "within/ledger.jsonl").read_text().splitlines()[-1])
    written = {Path(name).name.strip(".") for _, kind, name, _ in close["accesses"] if kind == "write"}
    read = {
        Path(name).name for stage, kind, name, _ in close["accesses"] if kind == "read" and stage == "ttt"
    }
    assert "metrics.jsonl" in written and not {name.removesuffix(".tmp") for name in written} & read


ONLY = {
    "QUANTIZE_ONLY": ("MODEL_PATH", "final_model.pt", ["Run.score", "Run.quantise", "Run.adapt_documents"]),
    "TTT_EVAL_ONLY": (
        "QUANTIZED_MODEL_PATH",
        "final_model.int6.ptz",
        ["Run.count_bytes", "Run.adapt_documents", "ScoreFirstTTT._global_phase"],
    ),
}


@pytest.mark.parametrize("only", ONLY)
def test_resume_of_a_run_that_begins_later(work, reference, cut_off, run, only):
    """With another run's weights or artifact: cut off before each stage, it ends with that run's scores."""
    setting, file, places = ONLY[only]
    settings = {only: 1, setting: f"undisturbed/{file}"}
    for place in places:
        cut_off(only, place, 1, **settings)
    code, output, errors = run(only, **settings)
    assert (code, errors) == (0, "") and f"resumed {only} after" in output
    result = json.loads((work / only / "result.json").read_text())
    assert result["val_bpb"] == reference["val_bpb"] and "train" not in result["seconds"]
    made = work / only / "final_model.int6.ptz"
    assert made.exists() == (only == "QUANTIZE_ONLY") and not (work / only / "final_model.pt").exists()
    if made.exists():
        assert made.read_bytes() == (work / "undisturbed/final_model.int6.ptz").read_bytes()


# -- which run goes on


def test_finished_run_is_not_made_again(work, reference, run):
    before = {p: p.read_bytes() for p in (work / "undisturbed").rglob("*") if p.is_file()}
    code, output, errors = run("undisturbed")
    assert (code, errors) == (0, "") and output.startswith("undisturbed: this run has ended")
    assert {p: p.read_bytes() for p in (work / "undisturbed").rglob("*") if p.is_file()} == before
    assert not (work / "undisturbed+2").exists()


def test_resume_0_begins_a_new_run(work, cut_off, run):
    cut_off("twice", "Run.quantise", 1)
    code, output, _ = run("twice", RESUME=0, TTT_ENABLED=0)
    assert code == 0 and "resumed" not in output
    assert (work / "twice+2/result.json").is_file() and not (work / "twice/result.json").exists()


def test_resume_finds_the_unfinished_run_without_a_name(work, reference, cut_off, run):
    cut_off("", "Run.quantise", 1, RUN_ID="")
    folder, *others = (work / "runs").iterdir()
    assert not others
    cut_off("", "Trainer.step", 1, RUN_ID="named", SEED=7, PREQUANT_ONLY=1, ITERATIONS=1)
    code, output, errors = run("", RUN_ID="", SEED=7, PREQUANT_ONLY=1, ITERATIONS=1)
    assert code == 0 and "resumed" not in output, "another command's run is left alone, and one with a name"
    others = [line.partition(" other settings or data: ") for line in sorted(errors.splitlines())]
    assert others[0][0] == "train_gpt.py: notice: runs/named: unfinished, left as it is, begun with"
    assert others[0][2] == "RUN_ID= there named" and others[1][2].startswith("SEED=7 there 42; ")
    code, output, _ = run("", RUN_ID="")
    assert code == 0 and f"resumed {folder.relative_to(work)}" in output
    assert difference(folder, reference) == []


def test_resume_of_a_run_that_only_trains(work, cut_off, run):
    """PREQUANT_ONLY=1 evaluates the MODEL_PATH that is there, but not what its unfinished run has left."""
    settings = {"PREQUANT_ONLY": 1, "VAL_LOSS_EVERY": 0}
    cut_off("only", "Run.score", 1, **settings)
    code, output, errors = run("only", **settings)
    assert code == 0 and "resumed only after train\n" in output and "train step" not in output, errors
    assert json.loads((work / "only/result.json").read_text())["steps"] == 6
    code, output, _ = run("only", **settings)  # now it is there
    assert code == 0 and "prequant val_loss" in output and (work / "only+2/result.json").is_file()


def test_resume_with_other_settings_script_or_data_is_refused(tg, work, cut_off, run, monkeypatch):
    shutil.copytree(work / "data", work / "copy")
    cut_off("fixed", "Trainer.step", 6, DATA_PATH="copy")
    before = {p: p.read_bytes() for p in (work / "fixed").rglob("*") if p.is_file()}
    code, output, errors = run("fixed", DATA_PATH="copy", MATRIX_LR=0.5, SEED=1)
    assert (code, output, len(errors.splitlines())) == (2, "", 1)
    assert "SEED=1 there 42; MATRIX_LR=0.5 there 0.026" in errors and "RESUME=0" in errors
    sources = tg.read_sources() | {"systems/cache.py": b"changed"}
    with monkeypatch.context() as patch:
        patch.setattr(tg, "read_sources", lambda: sources)
        code, output, errors = run("fixed", DATA_PATH="copy")
    assert (code, output) == (2, "") and "other settings or data: systems/cache.py differs (" in errors
    manifest = json.loads((work / "copy/manifest.json").read_text())
    (work / "copy/manifest.json").write_text(json.dumps(manifest))
    code, output, errors = run("fixed", DATA_PATH="copy")
    assert (code, output) == (2, "") and "copy/manifest.json differs" in errors
    assert {p: p.read_bytes() for p in (work / "fixed").rglob("*") if p.is_file()} == before


def test_resume_with_what_no_number_depends_on(work, reference, cut_off, run, monkeypatch):
    """Places by other names, other threads, trackers and times between checkpoints: it is the same run."""
    cut_off("", "Trainer.step", 6, RUN_ID="")
    folder = max((work / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    (work / "elsewhere").mkdir()
    (work / "data").rename(work / "elsewhere/moved")
    folder.rename(work / "elsewhere/other")
    monkeypatch.chdir(work / "elsewhere")
    others = {"DATA_PATH": "./moved/", "DEVICE": "auto", "CPU_THREADS": 0, "CHECKPOINT_SECONDS": 1e-8}
    code, output, errors = run(f"{work}/elsewhere/./other", RUN_ID="", **others)
    (work / "elsewhere/moved").rename(work / "data")
    assert code == 0 and "resumed" in output, errors
    told = "resumed with what no number depends on: ARTIFACT_DIR="
    assert told in output and "DATA_PATH=./moved/ there data; DEVICE=auto there cpu" in output
    assert difference(work / "elsewhere/other", reference) == []
    assert runs.read(work / "elsewhere/other").val_bpb == reference["val_bpb"], "its log can be read"


def test_resume_of_a_run_at_work_is_refused(work, cut_off, run):
    cut_off("busy", "Trainer.step", 6)
    lock = os.open(work / "busy/checkpoints", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    code, output, errors = run("busy")
    os.close(lock)
    assert (code, output) == (2, "") and "another process is at work there" in errors


# -- damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_resume_takes_the_one_before_a_damaged_checkpoint(work, reference, cut_off, run):
    cut_off("damaged", "Trainer.step", 7)
    newest = sorted((work / "damaged/checkpoints").glob("run.*"))[-1]
    flip(newest)
    cut_off("damaged", "ScoreFirstTTT._score_batch", 4)
    for kind in ("run.*", "ttt-0.*", "weights.*"):
        flip(sorted((work / "damaged/checkpoints").glob(kind))[-1])
    code, output, _ = run("damaged")
    assert code == 0 and output.count("damaged, not a whole checkpoint; the one before is taken") == 3
    assert difference(work / "damaged", reference) == []


def test_resume_without_a_whole_checkpoint_is_refused(work, cut_off, run):
    cut_off("spoilt", "Trainer.step", 7)
    for path in (work / "spoilt/checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    code, output, errors = run("spoilt")
    assert (code, output, len(errors.splitlines())) == (2, "", 1)
    for path in (work / "spoilt/checkpoints").iterdir():
        assert f"spoilt/checkpoints/{path.name}: damaged" in errors


def test_resume_with_damaged_outputs(work, reference, cut_off, run):
    """The artifact is made again from the weights; other weights than the run's are refused."""
    cut_off("outputs", "Run.adapt_documents", 1)
    flip(work / "outputs/final_model.int6.ptz")
    cut_off("outputs", "Run.adapt_documents", 1)
    assert (work / "outputs/final_model.int6.ptz").read_bytes() == (
        work / "undisturbed/final_model.int6.ptz"
    ).read_bytes()
    for name in OUTPUTS[:2]:
        flip(work / "outputs" / name)
    code, _, errors = run("outputs")
    assert code == 2 and "outputs/final_model.pt: not what this run wrote" in errors


@pytest.mark.parametrize("content", [{"values": "{}"}, [1, 2], {"values": {}, "tensors": None}, "text"])
def test_foreign_checkpoint_with_a_right_checksum(tg, tmp_path, content):
    path = tmp_path / "run.000001.ckpt"
    tg.write_checkpoint(path, {"a": 1.5}, {"b": torch.ones(2)})
    assert tg.read_checkpoint(path)[0] == {"a": 1.5}
    torch.save(content, tmp_path / "body")
    body = (tmp_path / "body").read_bytes()
    path.write_bytes(tg.MAGIC + tg.hashlib.sha256(body).digest() + body)
    with pytest.raises(tg.ArtifactError, match=r"run\.000001\.ckpt: not a checkpoint of this script"):
        tg.read_checkpoint(path)


# -- full disk


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_faults_name_the_file(tg, tmp_path, monkeypatch, call):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "final_model.pt"
    path.write_bytes(b"earlier")
    monkeypatch.setattr(tg.os, call, full)
    with pytest.raises(tg.RunError, match="final_model.pt: cannot be written .No space left on device"):
        tg.write_whole(path, b"later")
    assert [p.name for p in tmp_path.iterdir()] == ["final_model.pt"] and path.read_bytes() == b"earlier"


def test_full_disk_faults_before_the_first_stage(tg, run, monkeypatch):
    """The log's head does not fit: one line, as later."""

    def full(file: object, line: str) -> None:
        with tg.writing(file.name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tg.LogFiles, "_write", staticmethod(full))
    line = "rank 0 of 1, stage start: headless/logs/tiny.txt: cannot be written (No space left on device)"
    assert run("headless") == (1, "", f"train_gpt.py: {line}\n")


def test_checkpoint_faults_do_not_end_the_run(tg, work, reference, run, monkeypatch):
    """No checkpoint can be written: said each time, and the run is what it would have been."""

    def full(path: Path, *_: object) -> None:
        raise tg.RunError(f"{path}: cannot be written (No space left on device)")

    monkeypatch.setattr(tg, "write_checkpoint", full)
    code, output, errors = run("without")
    assert (code, errors) == (0, "")
    assert output.count("checkpoint not written, going on without: ") > 10
    assert difference(work / "without", reference) == []


def test_loss_that_is_not_finite_names_the_checkpoint_to_go_on_from(tg, work, reference, run, monkeypatch):
    """Also where it was resumed and has none of its own yet; then the run ends as if nothing had been."""
    whole, left = tg.Trainer._accumulate_gradients, [0]

    def spoilt(trainer: object, batches: object) -> tuple:
        loss, norm = whole(trainer, batches)
        left[0] -= batches is None  # the warm-up's steps do not count
        return (loss * torch.nan if left[0] == 0 else loss), norm

    monkeypatch.setattr(tg.Trainer, "_accumulate_gradients", spoilt)
    found = []
    for count in (5, 1):
        left[0] = count
        code, output, errors = run("nan")
        failed, last = errors.splitlines()
        step = re.fullmatch(r"train_gpt.py: rank 0 of 1, stage train: step (\d+): .* stopped", failed)[1]
        found.append(re.search(r"last checkpoint (\S+) within train \((\d+)/6\), .*RESUME=1", last).groups())
        path, kept = found[-1]
        assert code == 1 and tg.read_checkpoint(Path(path))[1]["step"] == int(kept) < int(step)
    assert f"resumed nan within train ({kept}/6)\n" in output and found[0] == found[1]
    code, output, errors = run("nan")
    assert (code, errors) == (0, "") and f"resumed nan within train ({kept}/6)\n" in output
    assert difference(work / "nan", reference) == []


def test_full_disk_faults_of_a_run(work, processes, monkeypatch):
    """A write of the artifact fails half-way in a real process; then it goes on."""
    monkeypatch.setattr("bench.faults.FULL", [FULL[3]])
    assert full_disk(work, processes, 1, QUICK) == {"full": 1, "lost": 0}


SMALL = {
    "VOCAB_SIZE": 64,
    "NUM_LAYERS": 3,
    "MODEL_DIM": 16,
    "NUM_HEADS": 2,
    "NUM_KV_HEADS": 1,
    "ROPE_DIMS": 4,
    "LOOP_START": 1,
    "LOOP_END": 1,
    "PARALLEL_START_LAYER": 2,
    "TRAIN_SEQ_LEN": 32,
    "TRAIN_BATCH_TOKENS": 256,
    "EVAL_SEQ_LEN": 32,
}
