"""Whole runs on a GPU that is not there (bench/rehearse.py): devices, types, kernels, ranks, checkpoints."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm
from quick_run import QUICK

from bench.settings import TINY, make_data

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"MODEL_DIM": "64", "TRAIN_BATCH_TOKENS": "64", "OMP_NUM_THREADS": "1"}  # each program is interpreted
CUDA = {"DEVICE": "cuda", "ATTENTION_BACKEND": "plain", "COMPILE_BACKEND": "off"}
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build has kernels of its own"),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rehearse")
    make_data(folder / "data")
    return folder


def command(*launcher: str) -> list[str]:
    return [sys.executable, *launcher, str(ROOT / "bench" / "rehearse.py")]


def rehearse(work: Path, name: str, *launcher: str, script=(QUICK,), **settings: object) -> tuple[str, dict]:
    """What a run prints, and its result.json."""
    env = os.environ | TINY | SIZES | CUDA | {key: str(value) for key, value in settings.items()}
    env |= {"ARTIFACT_DIR": str(work / name)}
    words = [*command(*launcher), *script]
    done = subprocess.run(words, cwd=work, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((work / name / "result.json").read_text())


@pytest.fixture(scope="module")
def plain(work) -> dict:
    return rehearse(work, "plain", TRITON_KERNELS=0)[1]


def test_run_on_cuda_scores_as_on_a_cpu(work, plain):
    """bfloat16 products and a bfloat16 embedding instead of float32 everywhere."""
    done = warm.run(QUICK, work, TINY | SIZES | {"ARTIFACT_DIR": str(work / "cpu")})
    assert done.returncode == 0, done.stderr
    expected = json.loads((work / "cpu" / "result.json").read_text())
    assert plain["environment"]["device"] == "NVIDIA H100 80GB HBM3"
    assert plain["val_bpb"] != expected["val_bpb"]
    for stage, values in expected["stages"].items():
        assert abs(plain["stages"][stage]["val_bpb"] - values["val_bpb"]) < 0.005
    weights = torch.load(work / "plain" / "final_model.pt")
    assert {tensor.dtype for name, tensor in weights.items() if "emb" not in name} == {torch.float32}
    assert weights["tok_emb.weight"].dtype == torch.bfloat16


def test_kernels_pass_their_trial_and_serve_a_whole_run(work, plain):
    """All four, in training, evaluation and adaptation, with autocast's types."""
    said, result = rehearse(work, "kernels", AUDIT=1, script=())
    assert "fused kernel" not in said
    assert result["environment"]["kernels"] == "loss,mlp,qkv_norm_rope,xsa_gate"
    for stage, values in plain["stages"].items():
        assert abs(result["stages"][stage]["val_bpb"] - values["val_bpb"]) < 0.005
    (work / "alone").mkdir()
    shutil.copy(work / "kernels" / "train_gpt.packed.py", work / "alone")
    env = os.environ | {"ARTIFACT_DIR": "run", "OMP_NUM_THREADS": "1", "DATA_PATH": str(work / "data")}
    env |= {"TTT_EVAL_ONLY": "1", "QUANTIZED_MODEL_PATH": str(work / "kernels" / "final_model.int6.ptz")}
    alone = [*command(), "train_gpt.packed.py"]
    done = subprocess.run(alone, cwd=work / "alone", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = json.loads((work / "alone" / "run" / "result.json").read_text())["stages"]
    for stage in ("quantised", "ttt"):  # its kernels' gradients are another test's (test_packing.py)
        assert counted[stage]["val_bpb"] == result["stages"][stage]["val_bpb"], (
            "the counted script does the same"
        )


def test_two_ranks_on_cuda_score_as_one(work, plain):
    """Gradients of the banks travel in bfloat16 there."""
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"
    _, result = rehearse(work, "two", *launcher, TRITON_KERNELS=0)
    assert result["environment"]["ranks"] == 2
    assert abs(result["val_bpb"] - plain["val_bpb"]) < 0.002


def test_a_run_on_cuda_goes_on_where_it_was_stopped(work):
    """Weights, momenta and averages come back from the CPU to the device they were on."""
    settings = {"TRITON_KERNELS": 0, "ITERATIONS": 12, "CHECKPOINT_SECONDS": 0.05}
    _, whole = rehearse(work, "whole", **settings)
    env = os.environ | TINY | SIZES | CUDA | {key: str(value) for key, value in settings.items()}
    env |= {"ARTIFACT_DIR": str(work / "stopped")}
    with subprocess.Popen([*command(), QUICK], cwd=work, env=env, stdout=subprocess.PIPE, text=True) as run:
        next(line for line in run.stdout if line.startswith("train step:5"))
        run.send_signal(signal.SIGTERM)
        run.communicate()
    assert run.returncode == 143
    said, result = rehearse(work, "stopped", **settings)
    assert "resumed" in said and "within train" in said
    assert result["val_bpb"] == whole["val_bpb"]
