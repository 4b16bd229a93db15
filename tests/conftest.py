"""Shared fixtures: the script loaded by path, golden vectors, published tokenizers, tiny configurations."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from bench import interpreter

    interpreter.mend()


def _outside_folder(variable: str, default: str) -> Path:
    """Folder named by an environment variable; tests that need it skip without it, but never in CI."""
    folder = Path(os.environ.get(variable, ROOT / default)).resolve()
    if not folder.is_dir():
        message = f"{variable}={folder} is not a folder"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Folder of the golden vectors (GOLDEN_DIR, default ../shared/golden)."""
    return _outside_folder("GOLDEN_DIR", "../shared/golden")


@pytest.fixture(scope="session")
def tokenizer_dir() -> Path:
    """Folder of the published tokenizers (TOKENIZER_DIR, default ../shared/tokenizer)."""
    return _outside_folder("TOKENIZER_DIR", "../shared/tokenizer")


@pytest.fixture(scope="session")
def golden_json(golden_dir):
    """Function: path below the golden folder -> parsed JSON."""
    return lambda path: json.loads((golden_dir / path).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def golden_tensors(golden_dir):
    """Function: path below the golden folder -> {name: torch tensor}."""
    from safetensors.torch import load_file

    return lambda path: load_file(golden_dir / path)


@pytest.fixture(scope="session")
def tg():
    """The house: everything of `train_gpt.py`, harness/ and systems/ by name."""
    from house import House

    torch.set_num_threads(1)  # the vectors were made on one thread; tests run beside each other
    return House()


@pytest.fixture(scope="session")
def published_logs() -> Path:
    """Folder of the published logs (PUBLISHED_LOGS, default ../shared/published_logs)."""
    return _outside_folder("PUBLISHED_LOGS", "../shared/published_logs")
