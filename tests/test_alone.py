"""train_gpt.py without harness/ and systems/ beside it: what it cannot do then is said in one line."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
import test_smoke as smoke

SCRIPT = Path(__file__).resolve().parents[1] / "train_gpt.py"
PARTS = {  # setting -> the part of systems/ that it needs
    "COMPRESSOR=ans": "ans",
    "FIT_BYTES=16000000": "fit_bytes",
    "CASEOPS_ENABLED=0": "plain_text",
    "PLAIN_WINDOWS=1": "stream",
    "SLIDING_WINDOW_ENABLED=1": "stream",
    "TTT_SGD=1": "stream",
    "TTT_CACHE_WINDOW=64": "cache",
    "TTT_CHUNK_BY_LENGTH=256:8": "chunks",
    "ATTENTION_BACKEND=fa4": "fa4",
    "ATTENTION_BACKEND=torch_varlen": "varlen",
}
FASTER = {"kernels", "attention_kernels", "compiled"}  # what a run goes without where they are not there
WATCHED = ("SCALE=demo", "AUDIT=1", "CHECKPOINT_SECONDS=5", "PREFLIGHT_ONLY=1", "QUANTIZE_ONLY=1")
WATCHED += ("WANDB_PROJECT=name", "TENSORBOARD_DIR=board")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The script as a module, copied into an empty folder."""
    copied = shutil.copy(SCRIPT, tmp_path_factory.mktemp("alone"))
    spec = importlib.util.spec_from_file_location("train_gpt_alone", copied)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def refusal(alone, capsys, arguments=(), **environ) -> str:
    """The line of an end with exit code 2."""
    assert alone.main(list(arguments), {"PRESET": "demo", **environ}) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("setting", PARTS)
def test_a_part_that_is_not_there_is_named(alone, capsys, setting):
    name, _, value = setting.partition("=")
    assert f"needs systems/{PARTS[setting]}.py" in refusal(alone, capsys, **{name: value})


def test_every_part_has_its_check():
    asked = re.findall(r"from systems\.(\w+) import", SCRIPT.read_text(encoding="utf-8"))
    assert set(asked) - FASTER == set(PARTS.values())


@pytest.mark.parametrize("setting", WATCHED)
def test_what_only_the_harness_does_is_refused(alone, capsys, setting):
    name, _, value = setting.partition("=")
    assert refusal(alone, capsys, **{name: value}).endswith(f"{setting}: needs harness/ beside train_gpt.py")


def test_arguments_need_the_harness(alone, capsys):
    assert "--show: needs harness/" in refusal(alone, capsys, ["--show"])


def test_a_model_file_needs_the_harness(alone, capsys, tmp_path):
    """PREQUANT_ONLY=1 trains where there is no MODEL_PATH, and reads it where there is one."""
    smoke.make_data(tmp_path / "data")
    (tmp_path / "model.pt").write_bytes(b"")
    environ = smoke.environment(
        PREQUANT_ONLY=1, DATA_PATH=tmp_path / "data", MODEL_PATH=tmp_path / "model.pt"
    )
    assert "model.pt: needs harness/" in refusal(alone, capsys, **environ)
