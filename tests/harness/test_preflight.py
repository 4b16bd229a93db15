"""Preflight, speed probe, guards and signals: what a run looks at and what it survives."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from patience import PATIENCE
from quick_run import QUICK

from bench.settings import TINY, make_data
from dataprep.shards import BOS_ID, shard_bytes


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("preflight")
    make_data(folder / "data")
    return folder


@pytest.fixture
def run(tg, work, quick_packing, monkeypatch, capfd):
    """Function: settings -> exit code, standard output and error of a run in this process."""
    monkeypatch.chdir(work)

    def start(**settings: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = tg.main([], TINY | {name: str(value) for name, value in settings.items()})
        return code, *capfd.readouterr()

    return start


def event(text: str, stage: str) -> dict[str, str]:
    """Values of a stage's last line."""
    line = [line for line in text.splitlines() if line.startswith(f"{stage} ")][-1]
    return dict(re.findall(r"(\w+):(\S*)", line))


# -- before the run


def test_preflight_refuses_validation_without_bytes(run, work, tmp_path):
    """Documents of white space alone: there is nothing to divide by."""
    shutil.copytree(work / "data", tmp_path / "data")
    (tmp_path / "data/manifest.json").unlink(missing_ok=True)
    for split, value in (("val", BOS_ID), ("val_bytes", 0)):
        path = tmp_path / f"data/fineweb_{split}_000000.bin"
        path.write_bytes(shard_bytes(np.full(3, value)))
    code, _, err = run(DATA_PATH=tmp_path / "data", ALLOW_UNVERIFIED_DATA=1, ARTIFACT_DIR=tmp_path / "out")
    assert code == 2 and err.count("\n") == 1 and "fineweb_val_*: no target has bytes" in err


def test_preflight_only_leaves_nothing(run, work):
    before = sorted(work.rglob("*"))
    code, said, errors = run(PREFLIGHT_ONLY=1, WARMUP_STEPS=2, ARTIFACT_DIR="rehearsed")
    assert (code, errors) == (0, "")
    assert float(event(said, "speed")["predicted_seconds"]) > 0
    assert event(said, "preflight")["hashed"] == "3" and event(said, "passed")
    assert "train step" not in said and sorted(work.rglob("*")) == before


def test_preflight_only_of_an_evaluation_does_not_warm_up(run, work):
    assert run(ARTIFACT_DIR="made", TTT_ENABLED=0)[0] == 0
    settings = {"TTT_EVAL_ONLY": 1, "QUANTIZED_MODEL_PATH": "made/final_model.int6.ptz"}
    code, said, errors = run(PREFLIGHT_ONLY=1, **settings)
    assert (code, errors) == (0, "") and "passed" in said and "speed" not in said


@pytest.mark.parametrize("folder", ["/proc/nothing", "data/manifest.json"])
def test_preflight_writes_where_the_outputs_go(run, folder):
    code, said, error = run(ARTIFACT_DIR=folder)
    assert code == 2 and error.startswith(f"train_gpt.py: error: ARTIFACT_DIR={folder}: cannot write there")
    assert said == ""


def test_preflight_wants_room_for_all_outputs(tg, run, work, monkeypatch):
    room = SimpleNamespace(f_bavail=1000, f_frsize=1024)
    monkeypatch.setattr(tg.os, "statvfs", lambda _: room)
    code, said, error = run(ARTIFACT_DIR="full", AUDIT=1)
    assert code == 2 and len(error.splitlines()) == 1 and said == ""
    for name in ("ARTIFACT_DIR=full", "final_model.pt", "final_model.int6.ptz", "ledger", "1.0 MB are free"):
        assert name in error
    assert not (work / "full").exists()


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"MODEL_DIM": 4096, "NUM_LAYERS": 64}, "MODEL_DIM=4096"),
        ({"TTT_LORA_RANK": 10**6}, "TTT_LORA_RANK=1000000"),
        ({"TRAIN_BATCH_TOKENS": 10**9, "GRAD_ACCUM_STEPS": 1}, "TRAIN_BATCH_TOKENS=1000000000"),
    ],
)
def test_preflight_compares_memory(tg, run, monkeypatch, settings, named):
    monkeypatch.setattr(tg, "free_memory", lambda _: 1 << 30)
    code, said, error = run(**settings)
    assert code == 2 and len(error.splitlines()) == 1 and said == ""
    assert named in error and "1024 MiB are free" in error


@pytest.mark.parametrize("stage", [{}, {"QUANTIZE_ONLY": 1, "MODEL_PATH": "given.pt"}])
@pytest.mark.parametrize(
    "settings, named",
    [
        ({"FIT_BYTES": 40_000, "FLOAT16_MAX_ELEMENTS": 10**6}, "FLOAT16_MAX_ELEMENTS=1000000: no matrix has"),
        ({"FIT_BYTES": 10**6}, "FIT_BYTES=1000000: must be at most 78570"),  # with 65,536 of code
        ({"FIT_BYTES": 50_000}, "FIT_BYTES=50000: must be above 50000, what the code alone takes"),
    ],
)
def test_preflight_refuses_sizes_that_cannot_be_fitted(tg, run, work, monkeypatch, settings, named, stage):
    """Before anything is trained, or written."""
    monkeypatch.setattr(tg, "packed_script", lambda *_: (bytes(50_000), True))
    torch.save(tg.GPT(tg.Config.from_env(TINY)).state_dict(), work / "given.pt")
    code, said, error = run(**{"FLOAT16_MAX_ELEMENTS": 64} | settings | stage, ARTIFACT_DIR="unfitted")
    notice, error = error.splitlines()
    assert code == 2 and said == "" and notice.endswith("LQER_ASYM_GROUP=16: no effect without FIT_BYTES=0")
    assert error.startswith("train_gpt.py: error: FIT_BYTES=") and named in error
    assert not (work / "unfitted").exists()


def test_preflight_refuses_more_float16_than_fits(run):
    """Connections as wide as the stream, for which no allocation of bits makes room."""
    wide = {"MODEL_DIM": 256, "MUDD_WIDTH": 256, "FLOAT16_MAX_ELEMENTS": 64, "FIT_BYTES": 40_000}
    code, said, error = run(**wide, ARTIFACT_DIR="unfitted")
    assert (code, said, len(error.splitlines())) == (2, "", 2)  # a notice and the error
    assert "FIT_BYTES=40000 FLOAT16_MAX_ELEMENTS=64: must be at least 7" in error


def test_preflight_fits_nothing_where_nothing_is_quantised(run):
    assert run(FIT_BYTES=10**6, PREQUANT_ONLY=1, ARTIFACT_DIR="unquantised")[0] == 0


NO_SUCH_LENGTH = "NGRAM_TILT=9:2,11:1.5,400:1: no effect of 11 and 400: no document is so long"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"lqer_asym_group": 1024}, ""),
        (
            {"lqer_asym_group": 4096},
            "LQER_ASYM_GROUP=4096: no effect where LQER_RANK times 512 columns is no multiple of it",
        ),
        ({"lqer_asym_group": 4096, "fit_bytes": 10**6}, ""),
        ({"ngram_tilt": "10:2"}, ""),
        ({"ngram_tilt": "9:2,11:1.5,400:1"}, NO_SUCH_LENGTH),
        ({"ttt_sgd": True, "ttt_chunk_tokens": 11}, ""),
        ({"ttt_sgd": True, "ttt_chunk_tokens": 12}, "TTT_CHUNK_TOKENS=12: no effect: the 12 targets are one"),
        ({"ttt_enabled": False, "ttt_sgd": True, "ngram_tilt": "99:2"}, ""),
    ],
)
def test_preflight_says_what_these_data_have_no_room_for(tg, settings, told):
    """A document of ten tokens, with the BOS of the next one behind it, which is a target too."""
    val = tg.ValidationSet.from_sidecar(torch.tensor([1, *[2] * 9, 1, 3, 4]), torch.ones(13))
    found = [*tg.without_effect(tg.Config(**settings), val)]
    assert len(found) == bool(told) and "".join(found).startswith(told)


def test_preflight_refuses_chunks_that_no_memory_holds(run):
    settings = {"TTT_CHUNK_SIZE": 10**9, "TTT_EVAL_SEQ_LEN": 10**9, "ARTIFACT_DIR": "unmade"}
    code, said, error = run(**settings)
    assert (code, said, len(error.splitlines())) == (2, "", 1) and "TTT_CHUNK_SIZE=1000000000: take" in error


def test_preflight_counts_parameters_and_adapters_before_they_are_made(tg):
    for settings in ({}, {"TIE_EMBEDDINGS": "0", "NUM_LOOPS": "0"}):
        cfg = tg.Config.from_env(TINY | settings)
        large = [p.numel() for n, p in tg.GPT(cfg).named_parameters() if re.search("bank|tok_emb|lm_head", n)]
        assert tg.bank_parameters(cfg) == sum(large)
        lora = tg.BatchedLoRA(cfg, 2, tg.lora_slots(cfg, looping=True))
        numbers = sum(p.numel() for p in lora.parameters())
        assert cfg.ttt_batch_size == 2 and tg.adapter_bytes(cfg, 9) == 16 * numbers
        many = dataclasses.replace(cfg, ttt_batch_size=200)  # of which nine are trained
        assert tg.adapter_bytes(many, 9) == 4 * 100 * numbers
        assert tg.adapter_bytes(dataclasses.replace(many, ttt_warm_start_a=False), 9) == 16 * numbers * 9 // 2


def test_preflight_knows_a_process_limit(tg):
    """`ulimit -v` is what a MemoryError would come from."""
    child = os.fork()
    if child == 0:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))
        limited = tg.free_memory(tg.CPU)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (64 << 20),) * 2)
        os._exit(0 if 0 < tg.free_memory(tg.CPU) <= 64 << 20 < limited else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_preflight_tries_the_gpu(tg, monkeypatch):
    """Without one: a GPU that this torch has no kernels for, and one that computes."""
    for name, value in {
        "get_device_name": "NVIDIA Old",
        "get_device_capability": (5, 0),
        "device_count": 8,
        "get_arch_list": ["sm_80", "sm_90"],
    }.items():
        monkeypatch.setattr(tg.torch.cuda, name, lambda value=value: value)
    cfg, ranks = tg.Config.from_env(TINY | {"DATA_PATH": "/nowhere"}), tg.Ranks(torch.device("cpu"))
    ranks.device = SimpleNamespace(type="cuda")
    ranks.on_gpu = True
    real, ones = torch.ones, lambda *shape, dtype, **_: real(*shape, dtype=dtype)
    monkeypatch.setattr(tg.torch, "ones", ones)
    assert tg.Preflight(cfg, ranks).facts == {"gpu": "NVIDIA Old", "gpus": 8, "capability": "5.0"}

    def no_kernel(*_, **__):
        raise RuntimeError("no kernel image is available\nand a page of advice")

    for broken, words in ((no_kernel, "no kernel image"), (lambda *_, **__: real(64, 64) / 2, "is wrong")):
        monkeypatch.setattr(tg.torch, "ones", broken)
        with pytest.raises(tg.ConfigError, match=f"DEVICE=cuda: NVIDIA Old .*{words}.*sm_80, sm_90"):
            tg.Preflight(cfg, ranks)


@pytest.fixture
def usable(tg, monkeypatch):
    """Function: settings, compiler and kernels that a machine allows -> backends that are left, notices."""

    def choose(asked: dict[str, str], compiler: str = "", kernels: str = "") -> tuple:
        cfg, plain = tg.Config.from_env(TINY | asked), tg.Backends(kernels=kernels, compiler=compiler)
        monkeypatch.setattr(tg, "plain_backends", lambda *_: plain)
        preflight = tg.Preflight(cfg, tg.CPU)
        return preflight.backends(), preflight.notices

    return choose


def test_a_rank_whose_device_is_not_there_is_refused(tg, monkeypatch):
    monkeypatch.setattr(tg.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tg.torch.cuda, "device_count", lambda: 2)
    for cfg, rank in ((tg.Config(), "1"), (tg.Config(device="cpu"), "2")):
        tg.check_device(cfg, {"LOCAL_RANK": rank})
    with pytest.raises(tg.ConfigError, match="^LOCAL_RANK=2: this machine has 2 CUDA devices$"):
        tg.check_device(tg.Config(), {"LOCAL_RANK": "2"})


def test_compiler_that_fails_is_given_up_or_refused(tg, run, usable, monkeypatch):
    monkeypatch.setattr(tg, "try_compiler", lambda *_: "no g++")
    code, said, error = run(COMPILE_BACKEND="aot_eager")
    assert (code, said) == (2, "")
    assert error == "train_gpt.py: error: COMPILE_BACKEND=aot_eager: does not work here (no g++)\n"
    backends, notices = usable({}, "inductor")
    assert (backends.compiler, notices) == ("", ["nothing is compiled, which is slow: no g++"])


def test_what_is_wrong_with_a_compiler_is_said_in_a_line(tg, monkeypatch):
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    for compiler in ("aot_eager", "eager"):
        assert tg.try_compiler(compiler, tg.CPU) == ""
    monkeypatch.setattr(config.cpp, "cxx", ("/nowhere/g++",))
    torch.compiler.reset()
    with fresh_cache():
        wrong = tg.try_compiler("inductor", tg.CPU)
    assert wrong and len(wrong) <= 200 and len(wrong.splitlines()) == 1
    monkeypatch.setattr(tg.Backends, "compile", lambda self, function: lambda x: x.sum())
    assert tg.try_compiler("eager", tg.CPU) == "its results are wrong"


def test_kernel_that_fails_is_left_out_or_refused(tg, usable, monkeypatch):
    monkeypatch.setattr(tg, "try_kernels", lambda *_: {"mlp": "bad PTX"})
    every = ",".join(tg.kernel_names("1"))
    backends, notices = usable({"TRITON_KERNELS": "1"}, kernels=every)
    assert backends.kernels == ",".join(name for name in tg.kernel_names("1") if name != "mlp")
    assert notices == ["fused kernel mlp is not used: bad PTX"]
    asked = {"TRITON_KERNELS": "loss,qkv_norm_rope"}
    assert usable(asked, kernels="loss,qkv_norm_rope")[0].kernels == "loss,qkv_norm_rope"
    with pytest.raises(tg.ConfigError, match="TRITON_KERNELS=loss,mlp: mlp: bad PTX"):
        usable({"TRITON_KERNELS": "loss,mlp"}, kernels="loss,mlp")


@pytest.mark.parametrize("asked, goes_on", [("auto", True), ("aot_eager", False)])
def test_model_that_the_compiler_fails_on_is_trained_without(tg, work, monkeypatch, asked, goes_on):
    monkeypatch.chdir(work)
    cfg, folder = tg.Config.from_env(TINY | {"COMPILE_BACKEND": asked}), work / f"compiled-{asked}"
    folder.mkdir()
    (folder / "logs").mkdir()
    watches = tg.Watches([files := tg.LogFiles(tg.CPU, folder), guard := tg.Guard(tg.Preflight(cfg, tg.CPU))])
    run = tg.Run(cfg, tg.CPU, tg.Backends("plain", "", "aot_eager", 2), {"train_gpt.py": b""}, watches)

    def fit(cfg, model, ranks):
        if model.backends.compiler:
            raise RuntimeError("inductor: a bug\nand its trace")
        return model.backends

    assert run.model._compiled_call_impl is not None
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(tg, "fit_memory", fit)
        patch.setattr(run.ranks, "on_gpu", True)  # for the guard alone
        if not goes_on:
            with pytest.raises(RuntimeError, match="a bug"):
                guard.see("memory", run=run)
            return
        guard.see("memory", run=run)
    assert run.model._compiled_call_impl is None and run.backends.compiler == ""
    assert run.result["environment"]["compiler"] == ""
    assert all(torch.equal(before[name], tensor) for name, tensor in run.model.state_dict().items())
    notice = (
        "notice text:the model is not compiled, which is slow: RuntimeError: inductor: a bug and its trace"
    )
    assert notice in (folder / "logs" / f"{run.log.run_id}.txt").read_text()
    assert run.train() is None and run.result["steps"] == cfg.iterations
    files.close()


def test_notices_of_the_machine_are_in_the_log(tg, run, monkeypatch):
    whole = tg.Preflight.backends

    def noting(self: object) -> object:
        self.notices.append("no compiler today")
        return whole(self)

    monkeypatch.setattr(tg.Preflight, "backends", noting)
    code, said, _ = run(PREFLIGHT_ONLY=1)
    assert code == 0 and "\nnotice text:no compiler today\n" in said


# -- speed


def speed(tg, pace: list[float], **settings: str) -> tuple[dict, list[str]]:
    """The speed event and the notices of given seconds a step."""
    cfg, lines = tg.Config.from_env(TINY | settings), []
    log = SimpleNamespace(event=lambda stage, **values: lines.append((stage, values)))
    preflight = tg.Preflight(cfg, tg.CPU)
    preflight.pace = pace
    preflight.log_speed(log, tg.Backends())
    return dict(lines).get("speed"), [values["text"] for stage, values in lines if stage == "notice"]


def test_preflight_predicts_steps_of_a_budget(tg):
    budget = {"MAX_WALLCLOCK_SECONDS": "101", "GPTQ_RESERVE_SECONDS": "1", "ITERATIONS": "999999"}
    said, _ = speed(tg, [0.1, 0.2], ENABLE_LOOPING_AT="0.4", WARMUP_STEPS="9", **budget)
    assert said["predicted_steps"] == 400 + 300
    said, _ = speed(tg, [0.1, 0.2], ENABLE_LOOPING_AT="2", WARMUP_STEPS="9", **budget)
    assert said["predicted_steps"] == 1000
    said, _ = speed(tg, [0.1, 0.3], ENABLE_LOOPING_AT="0.5", ITERATIONS="10", WARMUP_STEPS="9")
    assert said["predicted_seconds"] == pytest.approx(2.0)
    assert speed(tg, []) == (None, [])


def test_preflight_warns_of_a_slow_machine_that_it_knows(tg, monkeypatch):
    cfg = tg.Config.from_env(TINY)
    work = tg.flops_per_token(cfg, False, cfg.train_seq_len / 4) * cfg.train_batch_tokens
    assert speed(tg, [1.0])[1] == []  # a CPU: nothing is known of it
    monkeypatch.setattr(tg, "peak_flops", lambda _: 1e12)
    said, notices = speed(tg, [work / (0.25 * 1e12)])
    assert said["mfu"] == pytest.approx(0.25) and notices == []
    said, notices = speed(tg, [work / (0.05 * 1e12)])
    assert said["mfu"] == pytest.approx(0.05) and "5.0%" in notices[0]


def test_preflight_measures_inside_the_warm_up(run, tg, monkeypatch):
    """No step more than the warm-up's, and training goes on as without it."""
    steps, step = [], tg.Trainer.step

    def counted(self, *arguments, **options):
        steps.append(arguments[1])
        return step(self, *arguments, **options)

    monkeypatch.setattr(tg.Trainer, "step", counted)
    bare = run(ARTIFACT_DIR="bare", WARMUP_STEPS=0, PREQUANT_ONLY=1, TIED_EMBED_INIT_STD=0.01)[1]
    assert len(steps) == 2 and "speed " not in bare
    measured = run(ARTIFACT_DIR="measured", WARMUP_STEPS=3, PREQUANT_ONLY=1, TIED_EMBED_INIT_STD=0.01)[1]
    assert len(steps) == 2 + 2 * 3 + 2
    assert (
        event(measured, "speed")
        and event(bare, "prequant")["val_loss"] == event(measured, "prequant")["val_loss"]
    )


# -- quantisation


def test_preflight_guard_dampens_a_hessian_that_is_not_definite(tg):
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    singular = tg.factorise(x.T @ x)
    assert singular.damping == tg.DAMPING  # what GPTQ always adds is enough
    values = torch.tensor([4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, -0.5])
    q = torch.linalg.qr(torch.randn(8, 8))[0]
    bad = q @ torch.diag(values) @ q.T
    factor = tg.factorise(bad)
    assert factor.damping > tg.DAMPING and factor.damping == pytest.approx(
        1.0
    )  # the first of 0.1, 1 above 0.32
    damped = bad + factor.damping * bad.diagonal().mean() * torch.eye(8)
    inverse = torch.linalg.inv(damped)[factor.order][:, factor.order]
    torch.testing.assert_close(factor.upper.T @ factor.upper, inverse, rtol=1e-3, atol=1e-4)
    scheme = tg.Scheme("gptq", 6, 12.0)
    weight = torch.randn(4, 8)
    assert tg.quantize_tensor(weight, scheme, factor, tg.Config()).report["damping"] == factor.damping
    good = tg.quantize_tensor(weight, scheme, singular, tg.Config())
    assert "damping" not in good.report
    with pytest.raises(tg.RunError, match="Hessian"):
        tg.factorise(torch.full((4, 4), torch.nan))


def test_preflight_guard_leaves_a_good_factor_alone(tg):
    """Bit for bit what one Cholesky of the damped Hessian gives."""
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    hessian = x.T @ x
    factor = tg.factorise(hessian)
    h = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(16)
    h = h[factor.order][:, factor.order]
    root = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    assert torch.equal(factor.upper, torch.linalg.solve_triangular(root, torch.eye(16), upper=True))


@pytest.fixture(scope="module")
def unlimited(tg, work, quick_packing):
    """Artifact of a run that nothing limits."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as said:
        patch.chdir(work)
        assert tg.main([], TINY | {"ARTIFACT_DIR": "unlimited", "TTT_ENABLED": "0"}) == 0
    assert "fallback" not in said.getvalue()
    return (work / "unlimited" / "final_model.int6.ptz").read_bytes()


def result_of(work: Path, folder: str) -> dict:
    return json.loads((work / folder / "result.json").read_text())


@pytest.mark.parametrize("bad", [1e6, float("inf"), float("nan")])
def test_guard_refuses_weights_that_no_scheme_stores(tg, run, work, monkeypatch, bad):
    """A row of the embedding that the text never uses shows in no score, but would in the artifact."""
    state = tg.GPT(tg.Config.from_env(TINY)).state_dict()
    state["tok_emb.weight"][-1, 0] = 1e6  # what is not finite, a checkpoint's reader refuses
    torch.save(state, work / "given.pt")
    if bad != 1e6:
        monkeypatch.setattr(tg.Run, "score", lambda run, *_, **__: run.model.tok_emb.weight.data.fill_(bad))
    code, _, error = run(QUANTIZE_ONLY=1, MODEL_PATH="given.pt", ARTIFACT_DIR="unstored", TTT_ENABLED=0)
    assert code == 1 and len(error.splitlines()) == 1
    assert "tok_emb.weight holds values that are not finite, or above 65504: they cannot be stored" in error
    assert not (work / "unstored" / "final_model.int6.ptz").exists()


def test_preflight_guard_makes_a_large_artifact_smaller(tg, run, work, unlimited, monkeypatch):
    monkeypatch.setattr(tg, "SIZE_LIMIT", len(unlimited) - 100)
    code, said, _ = run(ARTIFACT_DIR="smaller", TTT_ENABLED=0)
    blob = (work / "smaller" / "final_model.int6.ptz").read_bytes()
    assert code == 0 and len(blob) + len(b"packed") <= len(unlimited) - 100
    result = result_of(work, "smaller")
    assert result["legal"] and result["fallback"]["clip_factor"] > 1 and result["model_bytes"] == len(blob)
    assert int(event(said, "fallback")["bytes_left"]) >= 0
    tried = [line for line in said.splitlines() if line.startswith("fallback ")]
    assert "bytes_left:-" in tried[0] and tg.read_artifact(blob, tg.Config())


def test_preflight_guard_makes_an_artifact_smaller_that_says_as_much(tg, run, work, monkeypatch):
    """Of a model that was trained without its loops, the smaller one says so too."""
    settings = {"ITERATIONS": 1, "TTT_ENABLED": 0}
    assert run(ARTIFACT_DIR="unlooped", **settings)[0] == 0
    monkeypatch.setattr(tg, "SIZE_LIMIT", (work / "unlooped/final_model.int6.ptz").stat().st_size - 100)
    assert run(ARTIFACT_DIR="unlooped_smaller", **settings)[0] == 0
    for name in ("unlooped", "unlooped_smaller"):
        assert result_of(work, name)["looping"] is False
        blob = (work / name / "final_model.int6.ptz").read_bytes()
        assert tg.read_artifact(blob, tg.Config())[0]["enable_looping_at"] == 1
    assert "fallback" in result_of(work, "unlooped_smaller")


def test_preflight_guard_keeps_an_artifact_that_no_rung_makes_fit(tg, run, work, unlimited, monkeypatch):
    monkeypatch.setattr(tg, "SIZE_LIMIT", 1000)
    code, said, _ = run(ARTIFACT_DIR="hopeless", TTT_ENABLED=0)
    assert code == 3 and (work / "hopeless" / "final_model.int6.ptz").read_bytes() == unlimited
    assert said.count("\nfallback ") == 1 + len(tg.FALLBACK) and "fallback" not in result_of(work, "hopeless")
    assert "limit text:artifact has" in said


def test_preflight_guard_leaves_an_artifact_that_fits_alone(tg, run, work, unlimited, monkeypatch):
    monkeypatch.setattr(tg, "SIZE_LIMIT", len(unlimited) + len(b"packed"))
    code, said, _ = run(ARTIFACT_DIR="exact", TTT_ENABLED=0)
    assert code == 0 and "fallback" not in said
    assert (work / "exact" / "final_model.int6.ptz").read_bytes() == unlimited


# -- what is not finite


@pytest.mark.parametrize("own, words", [(torch.nan, "this rank's"), (3.0, "another rank's")])
def test_preflight_guard_says_whose_loss_was_not_finite(tg, own, words):
    measured = tg.Pending(torch.tensor([torch.nan, torch.nan, 1.0, 0.0, own]), None)
    with pytest.raises(tg.RunError, match=f"step 7: .*not finite .{words}"):
        tg.StepReport(7, measured, 1.0, 0.9, False).elapsed()


def test_preflight_guard_stops_at_a_score_that_is_not_finite(tg, run, monkeypatch):
    """The last update may overflow after the last loss that was looked at."""
    monkeypatch.setattr(tg.BpbMeter, "val_loss", property(lambda _: torch.nan))
    code, said, errors = run(ARTIFACT_DIR="overflown", TTT_ENABLED=0)
    assert code == 1 and errors.count("\n") == 1
    assert "stage between stages: prequant: val_loss nan: not finite" in errors and "artifact " not in said


@pytest.mark.parametrize("max_elements", [0, 10**9])
def test_preflight_control_tensors_stay_float16_at_any_size(tg, max_elements):
    """FLOAT16_MAX_ELEMENTS=0 once ended a run after its training: gates have no Hessian."""
    cfg = tg.Config.from_env(TINY | {"FLOAT16_MAX_ELEMENTS": str(max_elements)})
    flat = tg.flatten_banks(tg.GPT(cfg).state_dict(), cfg.num_layers)
    kinds = {name: tg.scheme_of(name, tensor, cfg).kind for name, tensor in flat.items()}
    matrices = {name for name in flat if re.search(r"attn\.(c_\w|proj)\.|mlp\.|tok_emb", name)}
    assert {name for name, kind in kinds.items() if kind == "gptq"} == (set() if max_elements else matrices)


# -- signals


def start(work: Path, folder: str, *launcher: str, **settings: object) -> subprocess.Popen:
    """A run in a process of its own that trains for a long time."""
    inherited = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    endless = {
        "ITERATIONS": "1000000",
        "TRAIN_LOG_EVERY": "100",
        "ARTIFACT_DIR": folder,
        "OMP_NUM_THREADS": "1",
    }
    environ = (
        inherited
        | {"OMP_NUM_THREADS": "1"}
        | TINY
        | endless
        | {name: str(value) for name, value in settings.items()}
    )
    command = [sys.executable, *launcher, str(QUICK)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=work, env=environ, **pipes)


def wait_for(job: subprocess.Popen, beginning: str) -> None:
    while not (shown := job.stdout.readline()).startswith(beginning):
        assert shown, job.stderr.read()[-2000:]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_preflight_guard_leaves_cleanly_when_told(work, number, code):
    folder = f"told{code}"
    job = start(work, folder)
    wait_for(job, "train step:5")
    job.send_signal(number)
    _, errors = job.communicate(timeout=PATIENCE)
    assert job.returncode == code, errors
    said = f"train_gpt.py: rank 0 of 1, stage train: told to stop ({number.name})"
    assert errors.splitlines() == [said]
    assert {path.name for path in (work / folder).iterdir()} == {"logs", "metrics.jsonl", "steps.jsonl"}
    for line in (work / folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_preflight_guard_leaves_two_ranks_when_torchrun_is_told(work):
    job = start(work, "told_ranks", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    wait_for(job, "train step:5")
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=PATIENCE)
    assert job.returncode != 0 and "SIGKILL" not in errors  # by which torchrun ends what is left after 30 s
    assert re.search(r"rank \d of 2, stage train: told to stop \(SIGTERM\)", errors)
    assert {path.name for path in (work / "told_ranks").iterdir()} == {"logs", "metrics.jsonl", "steps.jsonl"}


@pytest.mark.parametrize("handled, twice, code", [(False, False, 7), (True, False, 8), (True, True, 143)])
def test_preflight_guard_signal_is_raised_noted_or_final(tg, handled, twice, code):
    """Raised at once; only noted for a stage that looks for it; a second one ends the process there."""
    child = os.fork()
    if child == 0:
        ranks = tg.Ranks(torch.device("cpu"))
        ranks.stage_handles_stop = handled
        try:
            with tg.StopSignals(ranks):
                for _ in range(1 + twice):
                    os.kill(os.getpid(), signal.SIGTERM)
            os._exit(8 if ranks.stop_signal == signal.SIGTERM else 1)
        except tg.Stopped as stopped:
            os._exit(7 if stopped.code == 143 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code


STUCK = """
import ctypes, os, sys, threading, time
sys.path.insert(0, {root!r})
import torch
from harness.stopping import StopSignals
from train_gpt import Ranks

def tell():
    while mutex.raw[:4] != bytes([2, 0, 0, 0]):  # what glibc writes there when somebody waits
        time.sleep(0.01)
    os.kill(os.getpid(), {number})

mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
with StopSignals(Ranks(torch.device("cpu")), patience=0.2):
    threading.Thread(target=tell, daemon=True).start()
    lock(mutex)  # as in a collective whose other rank is dead: no instruction of Python follows
"""


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_preflight_guard_leaves_a_call_that_does_not_return(number, code):
    script = STUCK.format(root=str(QUICK.parents[1]), number=int(number))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    said = f"rank 0 of 1, stage start: told to stop ({number.name}), amid a call that does not return"
    assert (done.returncode, done.stderr.splitlines()) == (code, [f"train_gpt.py: {said}"])


def test_preflight_guard_has_patience_with_a_run_that_ends(tg, capfd):
    """A signal that has been handled, and one behind which the run leaves, end nothing by force."""
    before = signal.set_wakeup_fd(-1)
    ranks = tg.Ranks(torch.device("cpu"))
    with pytest.raises(tg.Stopped), tg.StopSignals(ranks, patience=0.5) as signals:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 1)  # the handler runs before this returns
        finally:
            signals._thread.join(1.0)  # it would have ended this process
    assert signal.set_wakeup_fd(before) == -1
    assert not signals._thread.is_alive() and not capfd.readouterr().err


def test_preflight_guard_gives_the_handlers_back(run):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert run(VOCAB_SIZE=999)[0] == 2
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
