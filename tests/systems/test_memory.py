"""A run on a CPU keeps its memory and does not load torch's compiler. Each in a process of its own."""

import platform
import subprocess
import sys

import pytest
from house import ROOT

FAULTS = """
import resource, torch
import train_gpt
from systems import memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(8 << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
plain = faults()
memory.keep_heap()
faults()
print(plain, faults())
"""
TRIMMED = """
import re, torch
import train_gpt
from systems import memory
def resident():
    return int(re.search(r"VmRSS:\\s*(\\d+)", open("/proc/self/status").read())[1]) // 1024
memory.keep_heap()
tensors = [torch.ones(8 << 18) for _ in range(40)]
kept = tensors[::8]
del tensors
held = resident()
from harness.guards import Guard
Guard(None).see("finished", stage="quantised", run=None)
print(held - resident())
"""
COMPILER = """
import sys, torch
from types import SimpleNamespace
import train_gpt as tg
sizes = {"PRESET": "demo", "TRAIN_BATCH_TOKENS": "256", "TTT_CHUNK_SIZE": "24", "EVAL_SEQ_LEN": "32"}
cfg = tg.Config.from_env(sizes | {"PHASED_TTT_PREFIX_DOCS": "2", "GLOBAL_TTT_CHUNK_TOKENS": "64"})
loader = SimpleNamespace(state=lambda: None, load_state=lambda state: None)
trainer = tg.Trainer(cfg, tg.GPT(cfg, tg.plain_backends(cfg, tg.CPU)), loader)
trainer.warm_up(1)
trainer.muon.load_state_dict(trainer.muon.state_dict())
tokens = torch.randint(tg.BOS + 1, 1000, (201,))
tokens[::50] = tg.BOS
val = tg.ValidationSet.from_sidecar(tokens, torch.ones_like(tokens))
print(tg.ScoreFirstTTT(trainer.model, val, cfg, looping=True).run().tokens)
print("torch._dynamo" in sys.modules)
"""


def printed(program: str) -> str:
    """What a program prints that imports from the house."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_freed_tensors_are_not_asked_for_again():
    """Twenty tensors of 8 MiB, one after the other: 2,048 pages each from a malloc that gives them back."""
    plain, kept = map(int, printed(FAULTS).split())
    if plain < 1000:
        pytest.skip("this C library keeps what is freed by itself")
    assert kept < 100


def test_what_lies_between_tensors_goes_back_when_a_part_of_a_run_ends():
    """Of forty tensors of 8 MiB five are kept, here and there."""
    if "glibc" not in platform.libc_ver():
        pytest.skip("another C library has no malloc_trim")
    assert int(printed(TRIMMED)) > 200


def test_training_and_adaptation_do_not_load_the_compiler():
    """Torch's optimisers would: 130 MiB, and over a second."""
    assert printed(COMPILER).split()[1:] == ["False"]


def test_stepping_makes_no_graph(tg):
    """What stands in for torch's wrapper of a step: gradients are off in it, and on behind it."""
    from systems.memory import spare_compiler

    spare_compiler()
    x = tg.torch.ones(3, requires_grad=True)
    for kind in (tg.torch.optim.AdamW, tg.torch.optim.SGD):
        x.grad = tg.torch.ones(3)
        kind([x], lr=0.1).step()
        assert x.is_leaf and x.requires_grad and tg.torch.is_grad_enabled()
    assert float(x.detach()[0]) < 0.9


@pytest.mark.parametrize("adapters", [5, 7])
def test_documents_some_at_a_time_learn_as_all_at_once(tg, monkeypatch, adapters):
    """Losses and gradients of five documents, two at a time; also where more rows have adapters, one of
    them switched off."""
    from systems import memory

    torch = tg.torch
    cfg = tg.Config.from_env({"PRESET": "demo"})
    torch.manual_seed(0)
    model = tg.GPT(cfg, tg.plain_backends(cfg, tg.CPU)).requires_grad_(False)
    lora = tg.BatchedLoRA(cfg, adapters, tg.lora_slots(cfg, True))
    for parameter in (*model.parameters(), *(low_rank.B for low_rank in lora.maps())):
        parameter.data.add_(0.02 * torch.randn(parameter.shape))
    lora.active = torch.ones(adapters, dtype=torch.bool)
    lora.active[-2] = False
    x, y = torch.randint(3, 1000, (2, 5, 40))
    scored, trains = torch.arange(20, 40).expand(5, -1), torch.tensor([1, 0, 1, 1, 1.0])
    results = []
    for tokens in (100, None):
        monkeypatch.setattr(memory, "TOKENS", tokens or memory.TOKENS)
        factors = lora.use_last(adapters)
        if tokens:
            losses = memory.losses_by_rows(model, x, y, scored, lora, True)
        else:
            losses = model.losses(x, y, looping=True, lora=lora, scored=scored)
        results.append([losses, *torch.autograd.grad((losses.mean(1) * trains).sum(), factors)])
    assert float(results[0][1].abs().sum()) > 0
    for some, every in zip(*results, strict=True):
        torch.testing.assert_close(some, every, rtol=1e-4, atol=1e-6)
    assert [factor for low_rank in lora.maps() for factor in low_rank.factors] == factors
