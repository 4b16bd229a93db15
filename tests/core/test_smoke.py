"""The real command from end to end on a tiny data set: every stage, every component, every output file."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import folds
import numpy as np
import pytest
import sentencepiece
import warm
from quick_run import QUICK, stub

import prepare_caseops_data as prepare
from bench.fuzz_artifact import published_artifact
from harness import packing

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "train_gpt.py"
VOCAB = 320
CODE_LIMIT = 31_250  # bytes of the counted code of PR #1851
WORDS = "the model reads a token and NASA scores it before Paris learns from what it has seen"
VAL_DOCS, PHASE_DOCS = 14, (4, 8)

# Small, but nothing is left out: looping, lanes, all gates of the record, GPTQ, LQER, two phases.
TINY = {
    "CONSOLE": "log",
    "DEVICE": "cpu",
    "CPU_THREADS": "1",
    "VOCAB_SIZE": str(VOCAB),
    "TRAIN_SEQ_LEN": "64",
    "TRAIN_BATCH_TOKENS": "256",
    "GRAD_ACCUM_STEPS": "2",
    "NUM_LAYERS": "4",
    "MODEL_DIM": "32",
    "NUM_HEADS": "2",
    "NUM_KV_HEADS": "1",
    "MLP_MULT": "2",
    "ROPE_DIMS": "8",
    "NUM_LOOPS": "1",
    "LOOP_START": "1",
    "LOOP_END": "2",
    "PARALLEL_START_LAYER": "3",
    "ITERATIONS": "6",
    "WARMUP_STEPS": "1",
    "MAX_WALLCLOCK_SECONDS": "0",
    "VAL_LOSS_EVERY": "4",
    "EMA_DECAY": "0.5",
    "FLOAT16_MAX_ELEMENTS": "256",
    "GPTQ_CALIBRATION_BATCHES": "2",
    "LQER_ASYM_GROUP": "16",
    "VAL_BATCH_TOKENS": "2048",
    "EVAL_SEQ_LEN": "64",
    "TTT_BATCH_SIZE": "4",
    "TTT_CHUNK_SIZE": "32",
    "TTT_EVAL_SEQ_LEN": "64",
    "TTT_LORA_RANK": "2",
    "TTT_LORA_ALPHA": "4",
    "PHASED_TTT_PREFIX_DOCS": str(PHASE_DOCS[-1]),
    "PHASED_TTT_NUM_PHASES": str(len(PHASE_DOCS)),
    "GLOBAL_TTT_CHUNK_TOKENS": "128",
    "GLOBAL_TTT_BATCH_SEQS": "2",
}


def documents(count: int) -> list[str]:
    """Texts of capitalised sentences over a small set of words, of many different lengths."""
    rng = random.Random(0)
    words = WORDS.split()
    texts = []
    for _ in range(count):
        sentences = [" ".join(rng.choices(words, k=rng.randint(3, 12))) for _ in range(rng.randint(1, 9))]
        texts.append(" ".join(sentence.capitalize() + "." for sentence in sentences))
    return texts


def make_data(folder: Path) -> Path:
    """A CaseOps data set with its own tokenizer of VOCAB pieces and a manifest."""
    texts = documents(150)
    model = prepare.train_tokenizer(texts, VOCAB)
    named = [prepare.make_document(text, f"document {i}") for i, text in enumerate(texts)]
    tokenizer = prepare.make_tokenizer("tokenizer.model", model, lossless=True)
    prepare.prepare(named, tokenizer, folder, VAL_DOCS)
    return folder


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """One shard: 256 little-endian int32 of header, then uint16 tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


def environment(**settings: object) -> dict[str, str]:
    """A clean environment with the tiny settings and those given."""
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    given = {name: str(value) for name, value in settings.items()}
    return inherited | {"OMP_NUM_THREADS": "1"} | TINY | given


def command(script: Path, folder: Path, **settings: object) -> subprocess.CompletedProcess:
    """Run a script in a folder and a process of its own, in which torch is imported before it starts."""
    return warm.run(script, folder, environment(**settings))


def fresh(script: Path, folder: Path, **settings: object) -> subprocess.CompletedProcess:
    """Run a script as a user does, in a folder."""
    return subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=600,
    )


def final_values(output: str) -> dict[str, str]:
    """Values of the last line `final key:value key:value ...`."""
    last = output.rstrip("\n").rpartition("\n")[2]
    stage, *pairs = last.split()
    assert stage == "final", last
    return dict(pair.split(":", 1) for pair in pairs)


def read_result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("smoke") / "data")


@pytest.fixture(scope="module")
def finished(data):
    """The same run twice in one folder, the second with a stub for its code: (folder, outputs, processes)."""
    work = data.parent
    settings = {"DATA_PATH": "data", "ARTIFACT_DIR": "run", "RUN_ID": "tiny"}
    first = fresh(SCRIPT, work, **settings)
    before = {path: path.read_bytes() for path in (work / "run").rglob("*") if path.is_file()}
    second = command(QUICK, work, **settings)
    assert {path: path.read_bytes() for path in before} == before, (
        "a second run changed the first one's files"
    )
    return work, (work / "run", work / "run+2"), (first, second)


@pytest.fixture
def fold_once(monkeypatch):
    """In this process, each counted code is folded once."""
    folds.fold_once(monkeypatch, packing)


@pytest.fixture
def in_process(tg, request, monkeypatch, capsys):
    """Function: folder and settings -> exit code and standard output of a run inside this process.

    Its counted code is a stub, but for tests that look at it: these use `fold_once`.
    """
    if "fold_once" not in request.fixturenames:
        monkeypatch.setattr(tg, "packed_script", stub)

    def run(folder: Path, **settings: object) -> tuple[int, str]:
        monkeypatch.chdir(folder)
        code = tg.main([], environment(**settings))
        return code, capsys.readouterr().out

    return run


# -- the whole run


def test_exit_code_and_clean_stderr(finished):
    for process in finished[2]:
        assert process.returncode == 0, process.stderr
        assert process.stderr == ""


def test_last_line_and_result_agree(finished):
    _, folders, processes = finished
    for folder, process in zip(folders, processes, strict=True):
        result, final = read_result(folder), final_values(process.stdout)
        names = "val_bpb val_loss artifact_bytes code_bytes model_bytes train_seconds calibrate_seconds"
        assert list(final) == [*names.split(), "eval_seconds", "legal"]
        for name in ("val_bpb", "val_loss"):
            assert float(final[name]) == pytest.approx(result[name], rel=1e-5)
        for name in ("artifact_bytes", "code_bytes", "model_bytes"):
            assert int(final[name]) == result[name] > 0
        assert final["legal"] == "True" and result["legal"] is True
        assert result["final_stage"] == "ttt"
        assert result["steps"] == 6


def test_every_stage_scores_every_target_and_byte(finished):
    work, (folder, _), _ = finished
    stages, manifest = read_result(folder)["stages"], json.loads((work / "data/manifest.json").read_text())
    assert set(stages) == {"untrained", "step_4", "prequant", "quantised", "ttt"}
    val = manifest["splits"]["val"]
    for name, stage in stages.items():
        assert stage["targets"] == val["tokens"] - 1, name
        assert stage["bytes"] == val["bytes"], name
        bits = stage["val_loss"] / math.log(2) * stage["targets"] / stage["bytes"]
        assert stage["val_bpb"] == pytest.approx(bits, rel=1e-12), name
    assert stages["untrained"]["val_loss"] == pytest.approx(math.log(VOCAB), rel=0.01)
    assert stages["prequant"]["val_loss"] < stages["untrained"]["val_loss"] - 0.1
    assert stages["quantised"]["val_loss"] == pytest.approx(stages["prequant"]["val_loss"], abs=0.05)
    assert len({stage["val_loss"] for stage in stages.values()}) == len(stages)


def test_all_files_are_there(finished):
    _, folders, _ = finished
    expected = {
        "final_model.pt",
        "final_model.int6.ptz",
        "train_gpt.packed.py",
        "metrics.jsonl",
        "steps.jsonl",
        "result.json",
        "logs/tiny.txt",
    }
    for folder in folders:
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert files == expected


def test_log_holds_source_settings_and_console(finished):
    _, (folder, _), (process, _) = finished
    log = (folder / "logs" / "tiny.txt").read_text(encoding="utf-8")
    assert SCRIPT.read_text(encoding="utf-8") in log
    for name, value in TINY.items():
        if name not in ("CONSOLE", "MLP_MULT", "MAX_WALLCLOCK_SECONDS", "TTT_LORA_ALPHA"):
            assert f"\n{name}={value}" in f"\n{log}"
    assert "\nMLP_MULT=2.0    # default 4.0\n" in log
    for line in process.stdout.splitlines():
        assert f"{line}\n" in log


def test_metrics_are_the_console_events(finished):
    _, (folder, _), (process, _) = finished
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    console = [line.split()[0] for line in process.stdout.splitlines()]
    assert [event["stage"] for event in events] == console
    for stage in ("start", "model", "looping", "saved", "artifact", "size", "ttt_phase", "final"):
        assert stage in console
    assert console.count("ttt_phase") == len(PHASE_DOCS)
    assert all(event["sgd_steps"] > 0 for event in events if event["stage"] == "ttt_phase")
    artifact = next(event for event in events if event["stage"] == "artifact")
    assert artifact["gptq_(int6)"] > 0 and artifact["passthrough_(float16)"] > 0
    assert sum(count for key, count in artifact.items() if key.endswith("+lqer_asym")) == 3


def test_sizes_are_those_of_the_files(finished):
    for folder in finished[1]:
        result = read_result(folder)
        assert result["code_bytes"] == (folder / "train_gpt.packed.py").stat().st_size <= CODE_LIMIT
        assert result["model_bytes"] == (folder / "final_model.int6.ptz").stat().st_size
        assert result["artifact_bytes"] == result["code_bytes"] + result["model_bytes"]


def test_same_run_again_gives_the_same_numbers_elsewhere(finished):
    _, (first, second), _ = finished
    kept = ("val_loss", "val_bpb", "targets", "bytes")
    scores = [
        {name: {key: stage[key] for key in kept} for name, stage in read_result(folder)["stages"].items()}
        for folder in (first, second)
    ]
    assert scores[0] == scores[1]
    name = "final_model.int6.ptz"
    assert (first / name).read_bytes() == (second / name).read_bytes()


# -- one stage alone


@pytest.fixture(scope="module")
def eval_data(finished, tmp_path_factory) -> Path:
    """The data set without its training shards: evaluation must not need them."""
    folder = tmp_path_factory.mktemp("eval") / "data"
    shutil.copytree(finished[0] / "data", folder)
    for path in folder.glob("fineweb_train_*.bin"):
        path.unlink()
    return folder


@pytest.mark.usefixtures("fold_once")
def test_artifact_alone_gives_the_score(tg, finished, eval_data, in_process):
    """And the settings that its counted code was folded with: else it would be folded anew here."""
    _, (folder, _), _ = finished
    made = tg.read_settings(environment()), tg.Backends("plain", "eager", "", 2), tg.read_sources(), False
    text = folds.unfolded((folder / "train_gpt.packed.py").read_bytes())
    folds.FOLDED[folds.key_of(packing, *made)] = text, True
    known = len(folds.FOLDED)
    code, output = in_process(
        eval_data.parent,
        DATA_PATH=eval_data,
        ARTIFACT_DIR="again",
        TTT_EVAL_ONLY=1,
        QUANTIZED_MODEL_PATH=folder / "final_model.int6.ptz",
    )
    assert code == 0 and final_values(output)
    first, again = read_result(folder), read_result(eval_data.parent / "again")
    assert set(again["stages"]) == {"quantised", "ttt"}
    for stage in again["stages"]:
        assert again["stages"][stage]["val_bpb"] == first["stages"][stage]["val_bpb"]
    assert again["artifact_bytes"] == first["artifact_bytes"] and len(folds.FOLDED) == known


def test_artifact_knows_the_sizes_of_its_model(finished, eval_data, in_process):
    """The shape settings come from the artifact, not from the environment."""
    _, (folder, _), _ = finished
    in_process(
        eval_data.parent,
        DATA_PATH=eval_data,
        ARTIFACT_DIR="other_shape",
        TTT_EVAL_ONLY=1,
        TTT_ENABLED=0,
        QUANTIZED_MODEL_PATH=folder / "final_model.int6.ptz",
        NUM_LAYERS=5,
        MODEL_DIM=64,
        NUM_LOOPS=0,
        SMEAR_GATE_ENABLED=0,
    )
    again = read_result(eval_data.parent / "other_shape")
    assert again["val_bpb"] == read_result(folder)["stages"]["quantised"]["val_bpb"]


def test_packed_script_alone_gives_the_score(finished, eval_data, tmp_path):
    """Whatever is set that it does not read: all but places, seed and stages is constant in it."""
    _, (folder, _), _ = finished
    shutil.copy(folder / "train_gpt.packed.py", tmp_path)
    process = fresh(
        tmp_path / "train_gpt.packed.py",
        tmp_path,
        DATA_PATH=eval_data,
        ARTIFACT_DIR="packed",
        TTT_EVAL_ONLY=1,
        QUANTIZED_MODEL_PATH=folder / "final_model.int6.ptz",
        **{"NUM_LAYERS": 9, "COMPRESSOR": "ans", "SLIDING_WINDOW_ENABLED": 1, "CASEOPS_ENABLED": 0},
    )
    assert process.returncode == 0, process.stderr.splitlines()[-1]  # a traceback would show all the code
    assert read_result(tmp_path / "packed")["val_bpb"] == read_result(folder)["val_bpb"]
    assert (tmp_path / "packed/train_gpt.packed.py").read_bytes() == (
        tmp_path / "train_gpt.packed.py"
    ).read_bytes(), "a packed script must count itself"


@pytest.mark.usefixtures("fold_once")
def test_fitted_artifact_of_levels_gives_the_score_alone(tg, finished, eval_data, in_process, tmp_path):
    """FIT_BYTES and ans: below the cap by at most 2,000, and the packed script needs nothing else."""
    work, (folder, _), _ = finished
    settings = {"FIT_BYTES": 48_500, "COMPRESSOR": "ans", "TTT_ENABLED": 0}
    in_process(
        work,
        **settings,
        DATA_PATH="data",
        ARTIFACT_DIR="fitted",
        QUANTIZE_ONLY=1,
        MODEL_PATH=folder / "final_model.pt",
    )
    first = read_result(work / "fitted")
    assert 46_500 <= first["artifact_bytes"] <= 48_500
    log = (work / "fitted" / "metrics.jsonl").read_text(encoding="utf-8")
    assert '"stage": "matrix"' in log and '"stage": "fit"' in log
    artifact = work / "fitted" / "final_model.int6.ptz"
    evaluation = {"DATA_PATH": eval_data, "TTT_EVAL_ONLY": 1, "TTT_ENABLED": 0}
    in_process(work, **evaluation, ARTIFACT_DIR="refitted", QUANTIZED_MODEL_PATH=artifact)
    again = read_result(work / "refitted")
    made = {name.lower(): value for name, value in first["settings"].items()}
    counted, _ = tg.packed_script(
        tg.Config(**made), tg.Backends("plain", "eager", "", 2), tg.read_sources(), False
    )
    assert again["code_bytes"] == len(counted), "the code that makes such an artifact, whatever is set now"
    shutil.copy(work / "fitted" / "train_gpt.packed.py", tmp_path)
    shutil.copy(artifact, tmp_path)
    process = command(tmp_path / "train_gpt.packed.py", tmp_path, **evaluation, ARTIFACT_DIR="packed")
    assert process.returncode == 0, process.stderr.splitlines()[-1]
    assert read_result(tmp_path / "packed")["val_bpb"] == first["val_bpb"]


@pytest.mark.usefixtures("fold_once")
def test_an_evaluated_artifact_brings_its_settings(tg, finished, eval_data, in_process):
    """Whatever is set now: to the log, and to the counted code, which is what its run would have."""
    work, (folder, _), _ = finished
    evaluation = {"DATA_PATH": eval_data, "TTT_EVAL_ONLY": 1, "TTT_ENABLED": 0, "NUM_LAYERS": 6}
    artifact = folder / "final_model.int6.ptz"
    in_process(work, **evaluation, ARTIFACT_DIR="other", RUN_ID="other", QUANTIZED_MODEL_PATH=artifact)
    again = read_result(work / "other")
    made = {name.lower(): value for name, value in again["settings"].items()}
    assert made["num_layers"] == 4 and "\nNUM_LAYERS=4 " in (work / "other/logs/other.txt").read_text()
    packed = tg.packed_script(
        tg.Config(**made), tg.Backends("plain", "eager", "", 2), tg.read_sources(), False
    )
    assert again["code_bytes"] == len(packed[0])


def test_published_artifact_gives_the_score(tg, finished, eval_data, in_process):
    """The look-alike of a published file, with the settings of its run in the environment."""
    _, (folder, _), _ = finished
    _, records = tg.read_artifact((folder / "final_model.int6.ptz").read_bytes(), tg.Config())
    (eval_data.parent / "published.ptz").write_bytes(published_artifact(records))
    in_process(
        eval_data.parent,
        DATA_PATH=eval_data,
        ARTIFACT_DIR="published",
        TTT_EVAL_ONLY=1,
        TTT_ENABLED=0,
        QUANTIZED_MODEL_PATH="published.ptz",
    )
    again = read_result(eval_data.parent / "published")
    assert again["val_bpb"] == read_result(folder)["stages"]["quantised"]["val_bpb"]


def test_quantising_the_checkpoint_gives_the_same_artifact(finished, in_process):
    work, (folder, _), _ = finished
    code, _ = in_process(
        work,
        DATA_PATH="data",
        ARTIFACT_DIR="requantised",
        QUANTIZE_ONLY=1,
        TTT_ENABLED=0,
        MODEL_PATH=folder / "final_model.pt",
    )
    assert code == 0
    name = "final_model.int6.ptz"
    assert (work / "requantised" / name).read_bytes() == (folder / name).read_bytes()
    result, first = read_result(work / "requantised"), read_result(folder)
    assert result["final_stage"] == "quantised"
    for stage in ("prequant", "quantised"):
        assert result["stages"][stage]["val_bpb"] == first["stages"][stage]["val_bpb"]


def test_input_is_found_in_the_folder_of_the_run(finished, in_process):
    """QUANTIZE_ONLY=1 ARTIFACT_DIR=run reads run/final_model.pt and writes beside it."""
    work, (folder, _), _ = finished
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, output = in_process(work, DATA_PATH="data", ARTIFACT_DIR="run", QUANTIZE_ONLY=1, TTT_ENABLED=0)
    assert code == 0 and "folder:run+3 " in output
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_prequant_only_evaluates_a_checkpoint(finished, eval_data, in_process):
    _, (folder, _), _ = finished
    code, _ = in_process(
        eval_data.parent,
        DATA_PATH=eval_data,
        ARTIFACT_DIR="prequant",
        PREQUANT_ONLY=1,
        MODEL_PATH=folder / "final_model.pt",
    )
    assert code == 0
    result = read_result(eval_data.parent / "prequant")
    assert set(result["stages"]) == {"prequant"}
    assert result["val_bpb"] == read_result(folder)["stages"]["prequant"]["val_bpb"]
    assert "steps" not in result and not (eval_data.parent / "prequant/final_model.int6.ptz").exists()


def test_score_without_an_artifact_is_not_legal(finished, eval_data, in_process):
    """`legal` says that the number may be submitted; a full-precision score may not."""
    _, (folder, _), _ = finished
    in_process(
        eval_data.parent,
        DATA_PATH=eval_data,
        ARTIFACT_DIR="no_artifact",
        PREQUANT_ONLY=1,
        MODEL_PATH=folder / "final_model.pt",
    )
    result = read_result(eval_data.parent / "no_artifact")
    assert result["artifact_bytes"] == 0 and result["legal"] is False


def test_prequant_only_trains_without_a_checkpoint(data, in_process, tmp_path):
    code, told = in_process(tmp_path, DATA_PATH=data, ARTIFACT_DIR="run", PREQUANT_ONLY=1, ITERATIONS=1)
    assert "notice text:legal:False, for there is no artifact (PREQUANT_ONLY=1)" in told
    assert code == 0
    result = read_result(tmp_path / "run")
    assert result["steps"] == 1 and result["final_stage"] == "prequant"
    assert not (tmp_path / "run/final_model.int6.ptz").exists()


def test_exceeded_limit_is_exit_code_3_with_outputs(finished, eval_data, in_process):
    _, (folder, _), _ = finished
    code, output = in_process(
        eval_data.parent,
        DATA_PATH=eval_data,
        ARTIFACT_DIR="sample",
        TTT_EVAL_ONLY=1,
        QUANTIZED_MODEL_PATH=folder / "final_model.int6.ptz",
        VAL_DOC_FRACTION=0.5,
    )
    assert code == 3
    assert final_values(output)["legal"] == "False"
    result = read_result(eval_data.parent / "sample")
    assert result["legal"] is False and "VAL_DOC_FRACTION=0.5" in " ".join(result["broken_limits"])
    assert 0 < result["stages"]["ttt"]["targets"] < read_result(folder)["stages"]["ttt"]["targets"]


# -- a run that ends before its loops turn on


@pytest.fixture(scope="module")
def unlooped(data, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A run of two steps whose loops would turn on in a third one: its folder, and the process."""
    work = tmp_path_factory.mktemp("unlooped")
    settings = {"ITERATIONS": 2, "ENABLE_LOOPING_AT": 0.6, "TTT_LORA_LR": 0.01, "RUN_ID": "tiny"}
    process = command(SCRIPT, work, DATA_PATH=data, ARTIFACT_DIR="run", **settings)
    assert process.returncode == 0, process.stderr
    return work, process


def test_what_was_trained_without_loops_is_scored_without_them(unlooped, data, in_process, tmp_path):
    """And its artifact too, by the script, by the counted one, and from its weights where that is said."""
    work, process = unlooped
    assert "training ended before the loops turned on" in process.stdout
    first = read_result(work / "run")
    assert first["looping"] is False and "looping" not in process.stdout.split("prequant")[1]
    artifact = {"QUANTIZED_MODEL_PATH": work / "run/final_model.int6.ptz", "DATA_PATH": data}
    assert in_process(tmp_path, **artifact, TTT_EVAL_ONLY=1, ARTIFACT_DIR="again")[0] == 0
    shutil.copy(work / "run/train_gpt.packed.py", tmp_path)
    alone = command(
        tmp_path / "train_gpt.packed.py", tmp_path, **artifact, TTT_EVAL_ONLY=1, ARTIFACT_DIR="alone"
    )
    assert alone.returncode == 0, alone.stderr.splitlines()[-1]
    for name in ("again", "alone"):
        stages = read_result(tmp_path / name)["stages"]
        for stage in ("quantised",) if name == "again" else ("quantised", "ttt"):
            assert stages[stage]["val_bpb"] == first["stages"][stage]["val_bpb"], (name, stage)
    weights = {"MODEL_PATH": work / "run/final_model.pt", "DATA_PATH": data, "QUANTIZE_ONLY": 1}
    in_process(tmp_path, **weights, TTT_ENABLED=0, ENABLE_LOOPING_AT=1, ARTIFACT_DIR="weights")
    name = "final_model.int6.ptz"
    assert (tmp_path / "weights" / name).read_bytes() == (work / "run" / name).read_bytes()


def test_what_was_trained_with_loops_is_scored_with_them(finished, eval_data, in_process, tmp_path):
    """Whatever ENABLE_LOOPING_AT says to a re-evaluation: the artifact knows."""
    first = read_result(finished[0] / "run")
    assert first["looping"] is True
    artifact = {"QUANTIZED_MODEL_PATH": finished[0] / "run/final_model.int6.ptz", "DATA_PATH": eval_data}
    settings = {"TTT_EVAL_ONLY": 1, "TTT_ENABLED": 0, "ENABLE_LOOPING_AT": 1, "ARTIFACT_DIR": "again"}
    assert in_process(tmp_path, **artifact, **settings)[0] == 0
    again = read_result(tmp_path / "again")["stages"]["quantised"]
    assert again["val_bpb"] == first["stages"]["quantised"]["val_bpb"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"TTT_EVAL_ONLY": 1, "QUANTIZED_MODEL_PATH": "final_model.int6.ptz"},
            "TTT_EVAL_ONLY=1: the model is as its artifact says, with LOGIT_SOFTCAP=30.0 (here 20.0)",
        ),
        (
            {"QUANTIZE_ONLY": 1, "MODEL_PATH": "final_model.pt"},
            "result.json beside it says that it was trained with LOGIT_SOFTCAP=30.0 (here 20.0)",
        ),
    ],
)
def test_settings_of_another_model_are_named(finished, data, in_process, tmp_path, given, said):
    """Some leave no trace in the shapes of its tensors, and give another score or none of their own."""
    given = {k: finished[0] / "run" / v if k.endswith("_PATH") else v for k, v in given.items()}
    common = {"TTT_ENABLED": 0, "DATA_PATH": data, "ARTIFACT_DIR": "again"}
    assert said in in_process(tmp_path, **common, **given, LOGIT_SOFTCAP=20)[1]
    assert "(here " not in in_process(tmp_path, **common, **given)[1]


def test_loops_that_cannot_turn_on_are_refused(tg, data, in_process, tmp_path, capsys):
    settings = {"DATA_PATH": data, "ARTIFACT_DIR": "run", "ENABLE_LOOPING_AT": 1}
    assert in_process(tmp_path, **settings)[0] == 2 and not (tmp_path / "run").exists()
    assert in_process(tmp_path, **settings, NUM_LOOPS=0, PREFLIGHT_ONLY=1)[0] == 0


# -- other components


def test_lzma_artifact_holds_the_same_model(finished, in_process, tmp_path):
    work, (folder, _), _ = finished
    code, _ = in_process(
        tmp_path,
        DATA_PATH=work / "data",
        ARTIFACT_DIR="lzma",
        QUANTIZE_ONLY=1,
        TTT_ENABLED=0,
        COMPRESSOR="lzma",
        MODEL_PATH=folder / "final_model.pt",
    )
    assert code == 0
    assert (tmp_path / "lzma/final_model.int6.ptz").read_bytes() != (
        folder / "final_model.int6.ptz"
    ).read_bytes()
    assert read_result(tmp_path / "lzma")["val_bpb"] == read_result(folder)["stages"]["quantised"]["val_bpb"]


def test_untied_embeddings(data, in_process, tmp_path):
    code, _ = in_process(tmp_path, DATA_PATH=data, ARTIFACT_DIR="run", TIE_EMBEDDINGS=0, ITERATIONS=3)
    assert code == 0
    stages = read_result(tmp_path / "run")["stages"]
    assert stages["prequant"]["val_loss"] < stages["untrained"]["val_loss"] - 0.05
    assert stages["quantised"]["val_loss"] == pytest.approx(stages["prequant"]["val_loss"], abs=0.05)
    assert set(stages) == {"untrained", "prequant", "quantised", "ttt"}


def test_plain_text_counts_its_own_bytes(data, in_process, tmp_path):
    """CASEOPS_ENABLED=0: no sidecar, no manifest; the bytes come from the tokenizer's pieces."""
    texts = documents(60)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(data / "tokenizer.model"))
    plain = tmp_path / "plain"
    plain.mkdir()
    for split, part in (("val", texts[:10]), ("train", texts[10:])):
        tokens = [token for text in part for token in [1, *processor.encode(text)]]
        write_shard(plain / f"fineweb_{split}_000000.bin", np.array(tokens))
    settings = {"DATA_PATH": plain, "TOKENIZER_PATH": data / "tokenizer.model", "CASEOPS_ENABLED": 0}
    code, output = in_process(tmp_path, ARTIFACT_DIR="run", ITERATIONS=1, **settings)
    assert code == 0
    assert f"{plain} has no manifest.json" in output
    stages = read_result(tmp_path / "run")["stages"]
    assert stages["ttt"]["bytes"] == sum(len(text.encode()) for text in texts[:10])


def test_unverified_data_are_named_in_the_result(data, in_process, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    (copy / "manifest.json").unlink()
    settings = {"DATA_PATH": copy, "TOKENIZER_PATH": copy / "tokenizer.model", "ALLOW_UNVERIFIED_DATA": 1}
    code, output = in_process(tmp_path, ARTIFACT_DIR="run", ITERATIONS=1, **settings)
    assert code == 0
    assert read_result(tmp_path / "run")["unverified_data"] == f"{copy}/manifest.json: missing"
    assert "unverified data: " in output
