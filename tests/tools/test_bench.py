"""The measurements run on a CPU: their numbers add up, the suite has a plan, a peer is run as a black box."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import test_smoke as smoke
import torch

ROOT = Path(__file__).resolve().parents[2]

PEER = """
import os
import re
import torch
from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

torch.manual_seed(0)
q, k, v = (torch.randn(1, 12, heads, 8) for heads in (4, 2, 2))
cu = torch.tensor([0, 5, 12, 12], dtype=torch.int32)
packed = flash_attn_varlen_func(
    q[0], k[0], v[0], cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=7, max_seqlen_k=7, causal=True,
    window_size=(-1, -1),
)
for part in (slice(0, 5), slice(5, 12)):
    alone = flash_attn_func(q[:, part], k[:, part], v[:, part], causal=True)
    assert torch.allclose(packed[part], alone[0], atol=1e-5)
assert os.environ["CASEOPS_ENABLED"] == "1" and os.environ["MODEL_DIM"] == "64"
steps, batch = int(os.environ["ITERATIONS"]), int(os.environ["TRAIN_BATCH_TOKENS"])
seconds = 0.0
for step in range(1, steps + 1):
    if step == steps // 2 + 1:
        print(f"layer_loop:enabled step:{steps // 2} frac:0.500 encoder:[0] decoder:[1]")
    seconds += 3.0 if step > steps // 2 else 2.0
    rate = batch * step / seconds
    print(f"{step}/{steps} train_loss: {9 - step / 10:.4f} train_time: 0.0m tok/s: {rate:.2f}")
print("peak memory allocated: 41709 MiB reserved: 47026 MiB")
print("diagnostic quantized val_loss:2.35058660 val_bpb:1.07405660 eval_time:63234ms")
while os.environ["PEER_WAITS"]:
    pass
"""


def load(name: str):
    """A script of bench/ as a module."""
    sys.path.insert(0, str(ROOT / "bench"))
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command: object, **environ: str) -> str:
    """Output of a command; fails with its messages."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environ}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A synthetic data set."""
    folder = tmp_path_factory.mktemp("data")
    sizes = ("--tokens", 50_000, "--val-tokens", 3000, "--vocab", 512)
    run(sys.executable, "bench/synthetic.py", "--out", folder, *sizes)
    return folder


def test_train_step_prints_one_json_object():
    result = json.loads(
        run(sys.executable, "bench/train_step.py", "--device", "cpu", "--json", "--repeats", 1)
    )
    before, after, whole, _ = result["rows"]
    assert [before["part"], after["part"]] == ["before looping", "after looping"]
    assert before["tokens_per_second"] == pytest.approx(1e3 * result["tokens"] / before["ms"])
    assert before["mfu"] is None  # a CPU has no data sheet here
    assert whole["ms"] > before["ms"]
    assert result["attention"] == "plain"


def test_flops_are_those_of_the_record(tg):
    """FIELD C2 derives 215.5 M (11 layers) and 319.3 M (17) of weights, 45 M and 70 M of attention."""
    cfg = tg.Config()
    assert tg.flops_per_token(cfg, False, 0) == pytest.approx(215.5e6, rel=1e-3)
    assert tg.flops_per_token(cfg, True, 0) == pytest.approx(319.3e6, rel=1e-3)
    assert tg.flops_per_token(cfg, False, 667) == pytest.approx(260e6, rel=5e-3)
    assert tg.flops_per_token(cfg, True, 667) == pytest.approx(389e6, rel=5e-3)


def test_rows_look_like_text(tg):
    common = load("common")
    cfg = tg.Config()
    _, _, segments = common.text_row(cfg, 98_304)
    lengths = segments.cu_seqlens.diff()
    assert 80 < int((lengths > 0).sum()) < 180
    assert segments.max_seqlen_bound == 2048
    assert common.mean_context(tg.Segments(torch.tensor([0, 1, 4]), 3)) == (1 + 6) / 4


def test_every_kernel_compiles_for_hopper_and_ampere_without_spilling():
    pytest.importorskip("triton")
    output = run(sys.executable, "bench/kernels.py", "--compile-only", "--json", TRITON_INTERPRET="0")
    rows = json.loads(output)["rows"]
    assert {row["arch"] for row in rows} == {80, 89, 90}
    assert all(row["spilled"] == 0 for row in rows)
    assert all(row["shared"] <= (227 if row["arch"] == 90 else 99) * 1024 for row in rows)
    assert [row["wgmma"] for row in rows if row["kernel"] == "matmul" and row["arch"] == 90] == [True] * 2


def test_peer_is_run_as_a_black_box(data, tmp_path):
    """A B, the log of each is read, a script that goes on after its training is ended."""
    script = tmp_path / "peer.py"
    script.write_text(PEER)
    options = {"--script": script, "--steps": 8, "--rounds": 1, "--out": tmp_path / "out"}
    command = ["bench/peer.py", "--json", *(word for option in options.items() for word in option)]
    command += ["--env", "TRAIN_BATCH_TOKENS=1024", "--env", "GRAD_ACCUM_STEPS=2"]
    where = {"DATA_PATH": str(data), "TOKENIZER_PATH": str(data / "tokenizer.model"), "PEER_WAITS": "1"}
    where["ALLOW_UNVERIFIED_DATA"] = "1"
    result = json.loads(run(sys.executable, *command, **where))
    rows = {row["number"]: row for row in result["rows"]}
    assert rows["before_ms_per_step"]["theirs"] == pytest.approx(2000, rel=1e-3)
    assert rows["after_ms_per_step"]["theirs"] == pytest.approx(3000, rel=1e-3)
    ours = rows["before_tokens_per_second"]
    assert ours["ours / theirs"] == pytest.approx(ours["ours"] / 512)
    assert result["last_loss_theirs"] == 8.2
    assert 0 < result["last_loss_ours"] < 6.3
    runs = json.loads((tmp_path / "out" / "runs.json").read_text())["runs"]
    assert runs["ours"][0]["losses"]["1"] == pytest.approx(6.238, abs=0.1)  # ln 512


def test_logs_of_published_runs_are_read():
    peer = load("peer")
    log = (
        "500/20000 train_loss: 2.5698 train_time: 0.8m tok/s: 8216992\n"
        "2000/20000 train_loss: 2.6634 train_time: 3.2m tok/s: 8157405\n"
        "layer_loop:enabled step:2173 frac:0.350 encoder:[0] decoder:[5]\n"
        "2500/20000 train_loss: 2.5534 train_time: 4.3m tok/s: 7653758\n"
        "4500/20000 train_loss: 2.2778 train_time: 9.1m tok/s: 6516065\n"
        "peak memory allocated: 41709 MiB reserved: 47026 MiB\n"
        "diagnostic quantized val_loss:2.35058660 val_bpb:1.07405660 eval_time:63234ms\n"
    )
    read = peer.read_log(log, 786_432)
    assert read["before_ms_per_step"] == pytest.approx(96.6, abs=0.1)  # FIELD C1: 96.4 / 142.9
    assert read["after_ms_per_step"] == pytest.approx(143.1, abs=0.3)
    assert read["peak_memory_mib"] == 41709
    assert read["scores"] == {"diagnostic quantized": 1.0740566}


def test_false_alarms_of_the_guard_are_told(tg, quick_packing, tmp_path, monkeypatch, capsys):
    """Of a finished run, whose documents must be long enough; a folder that is none is one line."""
    guard = load("guard")
    smoke.make_data(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    settings = {"DATA_PATH": "data", "ARTIFACT_DIR": "run", "PREQUANT_ONLY": 1, "ITERATIONS": 1}
    assert tg.main([], smoke.environment(**settings)) == 0
    monkeypatch.setattr(guard, "SIZES", (1, 8))
    for folder, message in (
        ("nowhere", "must be a finished run"),
        ("run", "has no document of more than 300"),
    ):
        monkeypatch.setattr(sys, "argv", ["guard.py", folder])
        capsys.readouterr()
        assert guard.main() == 2 and message in (said := capsys.readouterr().err) and said.count("\n") == 1
    monkeypatch.setattr(guard, "SHORTEST", 40)
    monkeypatch.setattr(sys, "argv", ["guard.py", "--json", "run"])
    assert guard.main() == 0
    told = json.loads(capsys.readouterr().out)
    assert told["documents"] > 10 and 5 < told["mean"] < 6.5 and told["limit"] == 96
    one, eight = told["rows"]
    assert (one["chunk"], eight["chunk"]) == (1, 8) and one["taken"] == eight["taken"] == 0
    assert one["noise_largest"] > eight["noise_largest"] > 30 and one["noise_taken"] == 0


def test_suite_prints_its_plan(tmp_path):
    none = tmp_path / "none"
    plan = run("bash", "bench/gpu_suite.sh", "--dry-run", OUT=str(none), WORK=str(none))
    steps = re.findall(r"^(\w+) \(at most \d+ s\): ", plan, re.M)
    wanted = "machine run step tests kernels ttt best peer variants each_kernel memory peer_again"
    assert steps == wanted.split() and not none.exists()


def test_suite_goes_on_after_a_failure(tmp_path):
    out = {"OUT": str(tmp_path / "out"), "WORK": str(tmp_path), "STEPS": "machine step memory"}
    out |= {"DATA_PATH": str(tmp_path), "DEVICE": "cuda", "TOTAL": "500"}
    out |= {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    printed = run("bash", "bench/gpu_suite.sh", **out)
    assert [line.split(":")[0] for line in printed.splitlines()] == ["machine", "step", "memory"]
    assert "step: exit 1" in printed and "memory: exit 2" in printed
    assert "torch sees no CUDA device" in (tmp_path / "logs" / "step.txt").read_text()
    with tarfile.open(tmp_path / "out" / "logs.tgz") as kept:
        assert {"logs/step.txt", "logs/summary.txt"} <= set(kept.getnames())


def test_suite_keeps_to_its_time(tmp_path):
    """What a lent machine has not the time for is said, not begun."""
    out = {"OUT": str(tmp_path / "out"), "WORK": str(tmp_path), "DATA_PATH": str(tmp_path), "TOTAL": "16"}
    printed = run("bash", "bench/gpu_suite.sh", **out, STEPS="step memory", DEVICE="cpu")
    assert printed.splitlines() == ["step: no time left", "memory: no time left"]
