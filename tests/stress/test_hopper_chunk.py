"""A chunk of test-time training, compiled for a GPU that is not there: it takes half a minute."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_hopper import SIZES

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="pretends a GPU; here is a real one")
ROOT = Path(__file__).resolve().parents[2]


def test_a_chunk_of_test_time_training_is_counted():
    """One graph each way for changing sizes, by our operators where all positions of a layer are wanted."""
    names = ("TTT_V_LORA", "TTT_K_LORA", "TTT_MLP_LORA", "TTT_O_LORA")
    env = {**os.environ, **{name: str(value) for name, value in SIZES.items()}, "TRITON_KERNELS": "1"}
    command = [sys.executable, "bench/hopper.py", "--json", "--kernels", "--chunk", "256"]
    env |= dict.fromkeys(names, "0")  # half the time
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    passes = json.loads(done.stdout)["kernels"]
    assert set(passes) == {"forward adapting", "backward adapting"}
    names = [k["what"].split()[0].split(".")[-1] for part in passes.values() for k in part]
    wanted = {"mlp": 2, "mlp_grad": 2, "qkv_norm_rope": 1, "qkv_norm_rope_grad": 1, "head_loss": 0}
    assert {name: names.count(name) for name in wanted} == wanted
