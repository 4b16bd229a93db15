"""train_gpt.py copied alone computes what the house computes, and says in one line what it cannot do."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import warm
from test_smoke import ROOT, SCRIPT, command, environment, fresh, make_data, read_result

FEW = {"ITERATIONS": 3, "VAL_LOSS_EVERY": 2, "AUDIT": 0}  # of the tiny settings, steps enough to loop
ARTIFACT = "final_model.int6.ptz"

# Settings that ask for a part that a script alone lacks: harness/, or which file of systems/.
WATCHED = {
    "CHECKPOINT_SECONDS": 60,
    "WANDB_PROJECT": "mine",
    "TENSORBOARD_DIR": "boards",
    "AUDIT": 1,
    "PREFLIGHT_ONLY": 1,
    "QUANTIZE_ONLY": 1,
    "SCALE": "demo",
}
REPLACED = {
    ("COMPRESSOR", "ans"): "ans",
    ("QUANTIZER", "trellis"): "trellis",
    ("FIT_BYTES", 450_000): "fit_bytes",
    ("GPTQ_DRIFT_BATCHES", 2): "drift",
    ("MUON_MAXWELL", 1): "maxwell",
    ("MUDD_WIDTH", 8): "mudd",
    ("CASEOPS_ENABLED", 0): "plain_text",
    ("PLAIN_WINDOWS", 1): "stream",
    ("SLIDING_WINDOW_ENABLED", 1): "stream",
    ("TTT_SGD", 1): "stream",
    ("TTT_CACHE_WINDOW", 32): "cache",
    ("TTT_CHUNK_BY_LENGTH", "60:8"): "chunks",
    ("NGRAM_TILT", "2:1"): "tilt",
    ("TRITON_KERNELS", "loss"): "kernels",
    ("ATTENTION_BACKEND", "fa3"): "fa3",
    ("ATTENTION_BACKEND", "fa4"): "fa4",
    ("ATTENTION_BACKEND", "torch_varlen"): "varlen",
}
UNASKED = {"attention_kernels", "compiled", "prefetch", "eager", "memory"}  # used if there; two on a CPU
# By harness/, data preparation, eager.py.
TAKEN_ALONG = {"console", "early", "layout", "causal", "heads", "products"}
NO_MATTER = {  # read in harness/ alone, and without effect on what a script alone does
    "RESUME": "nothing is kept from which it could go on",
    "ALLOW_UNVERIFIED_DATA": "no manifest is read",
}
# One process asks for several things. It is given those by a file: of its own variables it has few.
ASK = """
import contextlib, io, json, os, sys
sys.dont_write_bytecode = True
sys.path.insert(0, os.getcwd())
import train_gpt

answers = []
for arguments, environ in json.load(open(os.environ["CASES"])):
    errors, output = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
        code = train_gpt.main(arguments, environ)
    answers.append([code, output.getvalue(), errors.getvalue()])
assert "harness" not in sys.modules and "systems" not in sys.modules
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a copy of the script and a data set, and nothing else."""
    work = tmp_path_factory.mktemp("alone")
    make_data(work / "data")
    shutil.copy(SCRIPT, work)
    return work


@pytest.fixture(scope="module")
def finished(folder) -> Path:
    """The outputs of the demo, run by the script alone; `audit`, which the preset has on, is passed over."""
    settings = FEW | {"PRESET": "demo", "DATA_PATH": "data", "ARTIFACT_DIR": "run"}
    del settings["AUDIT"]
    process = fresh(folder / "train_gpt.py", folder, **settings)
    assert (process.returncode, process.stderr) == (0, "")
    assert "notice text:code not minified" in process.stdout
    return folder / "run"


def scores(folder: Path) -> dict[str, list]:
    """What each stage of a run scored."""
    stages, kept = read_result(folder)["stages"], ("val_loss", "val_bpb", "documents", "targets", "bytes")
    return {name: [stage[key] for key in kept] for name, stage in stages.items()}


def house(tg, work: Path, monkeypatch, name: str, **settings: object) -> Path:
    """Outputs of a run of the whole house in this process; what it counts is of other tests.

    Without systems/eager.py, which computes the same in another order of rounding.
    """
    monkeypatch.chdir(work)
    monkeypatch.setattr(tg, "has_part", lambda part: part != "eager")
    assert tg.main([], environment(**FEW | settings, DATA_PATH="data", ARTIFACT_DIR=name)) == 0
    return work / name


# -- the same digits


@pytest.mark.usefixtures("quick_packing")
def test_demo_alone_is_the_demo(tg, folder, finished, monkeypatch):
    """Trained, quantised, packed, scored and adapted: all digits, and the artifact byte for byte."""
    whole = house(tg, folder, monkeypatch, "demo_house", PRESET="demo")
    assert set(scores(finished)) == {"untrained", "step_2", "prequant", "quantised", "ttt"}
    assert scores(finished) == scores(whole)
    assert (finished / ARTIFACT).read_bytes() == (whole / ARTIFACT).read_bytes()
    assert read_result(finished)["final_stage"] == "ttt" and read_result(finished)["steps"] == 3
    files = {path.name for path in finished.iterdir()}
    assert files == {"final_model.pt", ARTIFACT, "train_gpt.packed.py", "result.json"}


@pytest.mark.usefixtures("quick_packing")
def test_record_alone_is_the_record(tg, folder, monkeypatch):
    process = command(folder / "train_gpt.py", folder, **FEW, DATA_PATH="data", ARTIFACT_DIR="record")
    assert (process.returncode, process.stderr) == (0, "")
    whole = house(tg, folder, monkeypatch, "record_house")
    assert scores(folder / "record") == scores(whole)
    assert (folder / "record" / ARTIFACT).read_bytes() == (whole / ARTIFACT).read_bytes()


def test_what_it_counts_gives_the_score(folder, finished, tmp_path):
    """The packed script, written without harness/, is larger, and enough for the score."""
    packed = tmp_path / "train_gpt.packed.py"
    shutil.copy(finished / "train_gpt.packed.py", packed)
    result = read_result(finished)
    assert result["code_bytes"] == packed.stat().st_size and result["legal"] is True
    given = {"DATA_PATH": folder / "data", "TTT_EVAL_ONLY": 1, "QUANTIZED_MODEL_PATH": finished / ARTIFACT}
    process = command(packed, tmp_path, PRESET="demo", ARTIFACT_DIR="again", **given)
    assert process.returncode == 0, process.stderr.splitlines()[-1]
    assert scores(tmp_path / "again") == {name: scores(finished)[name] for name in ("quantised", "ttt")}


def test_parts_of_systems_work_without_harness(folder, finished, tmp_path):
    """Another codec stores the same model; nothing of harness/ is needed for that.

    The functions of systems/eager.py then round in another order: three steps later by less than 1e-4.
    """
    shutil.copy(SCRIPT, tmp_path)
    shutil.copytree(ROOT / "systems", tmp_path / "systems", ignore=shutil.ignore_patterns("__pycache__"))
    settings = FEW | {"PRESET": "demo", "COMPRESSOR": "ans", "TTT_ENABLED": 0, "DATA_PATH": folder / "data"}
    process = command(tmp_path / "train_gpt.py", tmp_path, ARTIFACT_DIR="run", **settings)
    assert (process.returncode, process.stderr) == (0, "")
    for stage in ("untrained", "prequant", "quantised"):
        ours, plain = scores(tmp_path / "run")[stage], scores(finished)[stage]
        assert ours[2:] == plain[2:] and ours[0] == pytest.approx(plain[0], rel=1e-4) and ours[0] != plain[0]


# -- what is not there


@pytest.fixture
def ask(folder, tmp_path):
    """Function: [(arguments, settings)] -> the one line of each, all of which must be refused."""

    def run(cases: list[tuple[list[str], dict]]) -> list[str]:
        given = [(arguments, environment(PRESET="demo", DATA_PATH="data") | e) for arguments, e in cases]
        (tmp_path / "ask.py").write_text(ASK)
        (tmp_path / "cases.json").write_text(json.dumps(given))
        before = sorted(folder.rglob("*"))
        done = warm.run(tmp_path / "ask.py", folder, environment(CASES=tmp_path / "cases.json"))
        assert done.returncode == 0, done.stderr
        assert sorted(folder.rglob("*")) == before, "a refused run has left something"
        lines = []
        for code, output, errors in json.loads(done.stdout):
            assert (code, output, len(errors.splitlines())) == (2, "", 1), errors
            lines.append(errors.removeprefix("train_gpt.py: error: ").rstrip("\n"))
        return lines

    return run


def text_settings(settings: dict) -> dict[str, str]:
    return {name: str(value) for name, value in settings.items()}


def test_what_harness_does_is_refused_by_name(ask):
    flags = [["--help"], ["-h"], ["--show"], ["--show", "--json"]]
    cases = [([], text_settings({name: value})) for name, value in WATCHED.items()]
    lines = ask([*cases, *((flag, {}) for flag in flags)])
    named = [f"{name}={value}" for name, value in WATCHED.items()] + [" ".join(flag) for flag in flags]
    assert lines == [f"{name}: needs harness/ beside train_gpt.py" for name in named]


def test_what_systems_do_is_refused_by_name(ask):
    lines = ask([([], text_settings(dict([pair]))) for pair in REPLACED])
    for ((name, value), part), line in zip(REPLACED.items(), lines, strict=True):
        assert line == f"{name}={value}: needs systems/{part}.py beside train_gpt.py"


def test_files_that_only_harness_reads_are_refused_by_name(ask, folder, finished):
    """Weights given to be evaluated, an artifact of another script, one whose codec is not there."""
    (folder / "foreign.ptz").write_bytes(b"\x0b not an artifact" * 100)
    lines = ask(
        [
            ([], {"PRESET": "pr1855"}),
            ([], {"PREQUANT_ONLY": "1", "MODEL_PATH": "run/final_model.pt"}),
            ([], {"TTT_EVAL_ONLY": "1", "QUANTIZED_MODEL_PATH": "foreign.ptz"}),
        ]
    )
    assert lines == [
        "PRESET='pr1855': must be one of pr1851, demo",
        "MODEL_PATH=run/final_model.pt: needs harness/ beside train_gpt.py to be read",
        "QUANTIZED_MODEL_PATH=foreign.ptz: not an artifact of this script",
    ]


def test_mistakes_are_found_alone_too(ask):
    """The checks of the settings and of the data's headers are in the script itself."""
    cases = {
        "SEED='x'": {"SEED": "x"},
        "TRAIN_BATCH_TOKENS=257": {"TRAIN_BATCH_TOKENS": "257"},
        "DATA_PATH=elsewhere": {"DATA_PATH": "elsewhere"},
        "VOCAB_SIZE=300": {"VOCAB_SIZE": "300"},
        "QUANTIZED_MODEL_PATH=no.ptz": {"TTT_EVAL_ONLY": "1", "QUANTIZED_MODEL_PATH": "no.ptz"},
    }
    for line, word in zip(ask([([], e) for e in cases.values()]), cases, strict=True):
        assert word in line


# -- the lists above are whole


def test_every_part_of_systems_is_asked_for():
    parts = {path.stem for path in (ROOT / "systems").glob("*.py")} - {"__init__"}
    texts = [path.read_text(encoding="utf-8") for path in (SCRIPT, ROOT / "systems" / "fit_bytes.py")]
    imported = set(re.findall(r"from systems\.(\w+) import", "".join(texts)))
    assert parts - TAKEN_ALONG == imported == {*REPLACED.values(), *UNASKED}


def test_settings_that_only_harness_reads_are_refused_or_of_no_matter(tg):
    """Such a setting would do nothing in a script alone, and nobody would know."""
    read = set()
    for path in (SCRIPT, *(ROOT / "systems").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] in ("cfg", "self"):
                read.add(node.attr.upper())
    files = {"MODEL_PATH", "QUANTIZED_MODEL_PATH"}  # read by name in `find_file`
    unread = set(tg.Config().as_env()) - read - files
    assert unread - NO_MATTER.keys() == WATCHED.keys() - {"SCALE", "QUANTIZE_ONLY"}
