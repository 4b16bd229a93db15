"""What bench/hopper.py counts on a GPU that is not there: against hand, formula and the generated code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="pretends a GPU; here is a real one")
ROOT = Path(__file__).resolve().parents[2]
TOKENS = 4096
SIZES = {
    "NUM_LAYERS": 2,
    "NUM_LOOPS": 0,
    "PARALLEL_START_LAYER": 1,
    "XSA_LAST_N": 1,
    "LOOP_START": 0,
    "LOOP_END": 0,
}

# The library has to be loaded before torch, so all of it happens in one process of its own.
SCRIPT = """
import contextlib, io, json, os, re, sys
sys.path.insert(0, "bench")
import pretended_gpu

pretended_gpu.load()
import hopper
import torch
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode

codegen, launched = GraphLowering.codegen, []

def watched(lowered):
    code = codegen(lowered)
    text = getattr(code[0], "value", code[0])
    calls = r"\\.run\\(|extern_kernels\\.\\w+\\(|= torch\\.ops\\.[\\w.]+\\(|workspace_.*\\.sum\\("
    launched.append(len(re.findall(calls, text)))
    return code

GraphLowering.codegen = watched
X, BANK = (1000, 64), (5, 32, 64)
CASES = {
    "whole": lambda x, bank: x * 2,
    "slice": lambda x, bank: x[:, :16] * 2,
    "two slices": lambda x, bank: x[:, :16] * x[:, 16:32],
    "slice twice": lambda x, bank: x[:, :16] * x[:, :16].sin(),
    "inside": lambda x, bank: (x.sin() * 2).cos(),
    "repeated": lambda x, bank: x * x[0],
    "sum": lambda x, bank: x.sum(1),
    "product": lambda x, bank: x @ bank[3].T,
}
result = {"cases": {}, "steps": []}
for name, function in CASES.items():
    counter = hopper.Counter()
    with pretended_gpu.pretended(), FakeTensorMode():
        inputs = [torch.empty(size, device="cuda:0") for size in (X, BANK)]
        run = torch.compile(function, backend=counter, fullgraph=True, dynamic=False)
        (graph,) = counter.run(lambda: run(*inputs))
    result["cases"][name] = [[k.launches, k.bytes, k.flops] for k in graph.kernels]
launched.clear()
for fused in "10":
    os.environ["TRITON_KERNELS"] = fused
    sys.argv = ["hopper.py", "--json", "--kernels", "--tokens", os.environ["TOKENS"]]
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert hopper.main() == 0
    result["steps"].append(json.loads(text.getvalue()))
result["launched"] = launched[:]
os.environ["NUM_LAYERS"] = "many"
with contextlib.redirect_stderr(io.StringIO()) as text:
    result["refused"] = [hopper.guarded(), text.getvalue()]
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def counted():
    """What the script prints."""
    env = {**os.environ, **{name: str(value) for name, value in SIZES.items()}, "TOKENS": str(TOKENS)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def kernels(step: dict, part: str, group: str = "") -> list[dict]:
    return [k for k in step["kernels"][f"{part} before looping"] if group in ("", k["group"])]


@pytest.mark.parametrize(
    "case, numbers",
    [
        ("whole", 2 * 64_000),
        ("slice", 2 * 16_000),
        ("two slices", 3 * 16_000),
        ("slice twice", 2 * 16_000),
        ("inside", 2 * 64_000),
        ("sum", 64_000 + 1000),
        ("product", 64_000 + 32 * 64 + 32_000),  # one matrix of the bank
    ],
)
def test_bytes_are_those_counted_by_hand(counted, case, numbers):
    ((launches, moved, flops),) = counted["cases"][case]
    assert (launches, moved) == (1, 4 * numbers)
    assert flops == (2 * 1000 * 64 * 32 if case == "product" else 0)


def test_a_row_read_besides_the_whole_is_not_counted_twice(counted):
    assert counted["cases"]["repeated"] == [[1, 4 * 2 * 64_000, 0]]


def test_launches_are_those_of_the_generated_code(counted):
    parts = [kernels(step, part) for step in counted["steps"] for part in ("forward", "backward")]
    assert [sum(k["launches"] for k in part) for part in parts] == counted["launched"]


def test_flops_are_those_of_the_formula(tg, counted):
    """All products and ours: 6 a weight and token; gates and XSA's sums are the little more."""
    cfg = tg.Config.from_env({name: str(value) for name, value in SIZES.items()})
    expected = TOKENS * tg.flops_per_token(cfg, False, 0)
    attended = TOKENS * counted["steps"][0]["mean_context"] * 14 * cfg.model_dim * cfg.num_layers
    for step in counted["steps"]:
        parts = [k for part in ("forward", "backward") for k in kernels(step, part)]
        attention = sum(k["flops"] for k in parts if k["group"] == "attention")
        assert attention == pytest.approx(attended)
        assert sum(k["flops"] for k in parts) - attention == pytest.approx(expected, rel=0.002)
        assert "FLOPs unknown, counted as none" not in step


def test_fused_kernels_are_there_as_often_as_used_and_move_less(counted):
    fused, eager = counted["steps"]
    names = [k["what"].split()[0] for part in ("forward", "backward") for k in kernels(fused, part)]
    once = ("xsa_gate", "xsa_gate_grad", "head_loss")  # XSA in the last layer only
    twice = ("mlp", "mlp_grad", "qkv_norm_rope", "qkv_norm_rope_grad", "_varlen_attn")
    uses = {operator: sum(name.split(".")[-1] == operator for name in names) for operator in (*once, *twice)}
    assert uses == dict.fromkeys(once, 1) | dict.fromkeys(twice, 2)
    assert not kernels(eager, "forward", "operators of ours")
    for part in ("forward", "backward"):
        moved = [sum(k["bytes"] for k in kernels(step, part)) for step in (fused, eager)]
        assert moved[0] < moved[1]
    assert fused["saved_gb before looping"] > 0
    sums = [row["gb"] for row in fused["rows"] if row["group"] == "sum"]
    assert sums[2] == pytest.approx(sums[0] + sums[1])


def test_a_wrong_setting_is_one_line(counted):
    code, text = counted["refused"]
    (line,) = text.splitlines()
    assert code == 2
    assert line.startswith("bench/hopper.py: NUM_LAYERS='many'")


def test_without_a_compiler_it_says_so():
    command = [sys.executable, "bench/hopper.py"]
    env = os.environ | {"PATH": "/nowhere"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "bench/hopper.py: needs g++\n")
