"""What the host does for a step, a chunk or a batch does not grow with shards, documents or what is past.

Work is counted, not timed: instructions of Python, memory taken meanwhile, calls.
"""

import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_tools import run_through
from test_data import random_tokens, write_shard
from test_ttt import TINY, documents_stream, random_model, validation
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


def instructions(work: Callable[[], object]) -> int:
    """How many instructions of Python the work takes, in all functions that it calls."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def memory(work: Callable[[], object]) -> int:
    """Bytes of Python and of numpy that the work takes at most."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


# -- windows in random order


def windows_by_choice(paths: list[Path], length: int, seed: int, count: int) -> list[tuple[int, int]]:
    """Oracle: shard and start of each window, shards drawn by a list of what all of them have left."""
    shards = [len(path.read_bytes()) // 2 - 512 for path in paths]
    rng, left, drawn = np.random.Generator(np.random.PCG64(seed)), [], []
    while len(drawn) < count:
        if not any(left):
            left = []
            for tokens in shards:
                room = min(length - 1, max(0, tokens - length - 1))
                phase = int(rng.integers(room + 1)) if room else 0
                whole = max(0, (tokens - 1 - phase) // length)
                left.append((phase + rng.permutation(whole) * length).tolist())
        counts = np.array([len(windows) for windows in left], float)
        shard = int(rng.choice(len(left), p=counts / counts.sum()))
        drawn.append((shard, left[shard].pop()))
    return drawn


@pytest.fixture
def many_shards(tmp_path):
    """Function: so many shards of 3 to 300 tokens (of 17 tokens and fewer, none holds a window of 16)."""

    def make(count: int) -> list[Path]:
        paths = [tmp_path / f"fineweb_train_{number:06d}.bin" for number in range(count)]
        for number, path in enumerate(paths):
            write_shard(path, random_tokens(number, 3 + number * 97 % 298))
        return paths

    return make


@pytest.mark.parametrize("count", [2, 3, 8, 61])
def test_windows_are_those_of_a_draw_over_all_shards(tg, many_shards, count):
    """Three times as many as the shards hold: they are made anew."""
    paths, cfg = many_shards(count), tg.Config(train_seq_len=16)
    loader = tg.ShuffledLoader(paths, cfg, seed=5)
    whole = 3 * loader.left[1] + 2
    expected = windows_by_choice(paths, 16, 5, whole)
    for row, (shard, start) in zip(loader.next(whole)[0], expected, strict=True):
        assert row.tolist() == tg.read_shard(paths[shard])[start : start + 16].tolist()


def test_a_window_is_drawn_in_steps_that_hardly_grow_with_the_shards(tg, many_shards):
    """512 shards are eight levels more than 2; a list of what they have left would be 256 times as long."""
    work = {}
    for count in (2, 512):
        loader = tg.ShuffledLoader(many_shards(count), tg.Config(train_seq_len=16))

        work[count] = instructions(lambda loader=loader: loader.draw(20))
    assert 0 < work[512] < 10 * work[2]


def test_no_window_before_a_position_is_drawn_again(tg, many_shards, tmp_path, monkeypatch):
    """A checkpoint's file has the position; a loader goes on from there without a draw, whatever is past."""
    batch = {"train_seq_len": 16, "train_batch_tokens": 128, "grad_accum_steps": 4, "eval_seq_len": 16}
    cfg, paths = tg.Config(plain_windows=True, **batch), many_shards(9)
    loader = tg.WindowLoader(paths, cfg, tg.CPU, 32)
    for _ in range(90):  # more than the shards hold
        loader.next()
    tg.write_checkpoint(tmp_path / "state.ckpt", {}, {"loader": loader.state()})
    following = [loader.next()[0].tolist() for _ in range(40)]
    resumed, draws = tg.WindowLoader(paths, cfg, tg.CPU, 32), []
    draw = tg.ShuffledLoader._draw
    monkeypatch.setattr(tg.ShuffledLoader, "_draw", lambda self: draws.append(1) or draw(self))
    resumed.load_state(tg.read_checkpoint(tmp_path / "state.ckpt")[1]["loader"])
    assert not draws
    assert [resumed.next()[0].tolist() for _ in range(40)] == following and draws


# -- adapters of documents


def split_mix(seed: int, places: range) -> list[int]:
    """Outputs of SplitMix64 in whole numbers (Steele, Lea and Flood, OOPSLA 2014); seeds start far apart."""
    outputs = []
    for place in places:
        z = (seed * 0xBF58476D1CE4E5B9 + place * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        outputs.append(z ^ z >> 31)
    return outputs


def adapters(tg, batch: int, device: str = "cpu"):
    with torch.device(device):
        cfg = tg.Config(**TINY)
        return tg.BatchedLoRA(cfg, batch, tg.lora_slots(cfg, looping=True))


def test_adapters_of_a_document_are_split_mix(tg):
    """Two numbers an output, the upper 24 bits of each half: the map's bound times that, in [-1, 1)."""
    lora, drawn = adapters(tg, 1), []
    lora.draw_rows([42 * 1_000_003 + 17])
    for low_rank in lora.maps():
        before = sum(map(len, drawn))
        outputs = split_mix(42 * 1_000_003 + 17, range(before, before + low_rank.A.numel(), 2))
        halves = [half for z in outputs for half in (z % 2**32, z >> 32)]
        levels = [(half - 2**32 * (half >> 31)) >> 8 for half in halves]
        expected = torch.tensor(levels).float() * (2**-23 / low_rank.A.size(-1) ** 0.5)
        assert torch.equal(low_rank.A.detach().flatten(), expected)
        drawn.append(levels)
    shares = torch.tensor([level / 2**23 for levels in drawn for level in levels])
    assert len(shares.unique()) > 0.99 * len(shares) and abs(shares.mean()) < 4 / (3 * len(shares)) ** 0.5
    assert shares.square().mean() == pytest.approx(1 / 3, rel=0.1)


def test_adapters_of_a_document_are_the_same_in_any_batch(tg):
    """So that the number of ranks does not matter; another document or seed has others in every map."""
    together, alone = adapters(tg, 3), adapters(tg, 1)
    together.draw_rows([8, 5, 7])
    alone.draw_rows([5])
    for ours, theirs in zip(together.maps(), alone.maps(), strict=True):
        assert torch.equal(ours.A[1], theirs.A[0])
        assert not (ours.A[0] == ours.A[1]).any() and not (ours.A[1] == ours.A[2]).any()


class Made(TorchDispatchMode):
    """Keeps device and elements of all that the operators in its block make."""

    def __init__(self):
        super().__init__()
        self.tensors: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.tensors.append((tensor.device.type, tensor.numel()))
        return made

    def largest(self, device: str) -> int:
        return max((size for place, size in self.tensors if place == device), default=0)


def test_adapters_are_drawn_and_zeroed_where_they_are(tg):
    """Nothing passes through the host's memory but the seeds."""
    lora = adapters(tg, 4, "meta")
    with Made() as made:
        lora.draw_rows([1, 2, 3, 4])
        lora.reset_B()
    assert made.largest("meta") == lora.lm_head_lora.B.numel()
    assert made.largest("cpu") <= 4


def test_batches_share_the_memory_of_their_adapters(tg):
    """Without a warm start as with it: what a batch begins with is written over what the last one left."""
    seen, tokens = [], documents_stream()
    cfg = tg.Config(**TINY | {"ttt_warm_start_a": False, "phased_ttt_prefix_docs": 0, "ttt_batch_size": 3})

    def see(kind: str, **facts: object) -> None:
        if kind == "lora_constructed":
            lora = facts["lora"]
            assert not lora.lm_head_lora.B.any()
            seen.append((id(lora), lora.lm_head_lora.A.detach().clone()))

    watch = SimpleNamespace(see=see)
    run_through(
        tg.ScoreFirstTTT, random_model(tg, cfg), validation(tg, tokens), cfg, looping=True, watch=watch
    )
    assert len(seen) == 4 and len({place for place, _ in seen}) == 1
    assert all(not torch.equal(seen[0][1], A) for _, A in seen[1:])


# -- the ledger of a run


def ledger_of(tg, documents: int, tokens: int = 50):
    """A ledger that is not written, of a run on so many documents; the next charge is not its first."""
    ledger = object.__new__(tg.Ledger)
    val = SimpleNamespace(documents=[(tokens * number, tokens) for number in range(documents)])
    ledger._run, ledger.losses = SimpleNamespace(val=val), {}
    ledger.charge("ttt", [0], torch.zeros(1))
    return ledger


def test_losses_are_charged_to_the_documents_that_hold_their_places(tg):
    """Twice to one document in a call, and what was there stays; one of the last place is the last one's."""
    ledger = ledger_of(tg, 6)
    ledger.charge("ttt", [299, 3, 120, 49, 50], torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]))
    ledger.charge("ttt", [100], torch.tensor([32.0]))
    assert ledger.losses["ttt"].tolist() == [10.0, 16.0, 36.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("cost", [instructions, memory])
def test_what_a_chunk_charges_does_not_grow_with_the_documents(tg, cost):
    """A list of the starts would be ten thousand times as long, and a sum for each document as large."""
    places, losses, costs = list(range(0, 640, 10)), torch.ones(64), {}
    for documents in (20, 200_000):
        ledger = ledger_of(tg, documents)
        costs[documents] = cost(lambda ledger=ledger: ledger.charge("ttt", places, losses))
    assert costs[200_000] < 1.5 * costs[20] + 200


# -- the validation set in memory


@pytest.mark.parametrize("caseops", [True, False])
def test_a_validation_token_takes_four_bytes(tg, tmp_path, monkeypatch, caseops):
    """Two for itself and two for its count of bytes; while they are read another copy of neither is made."""
    tokens = random_tokens(0, 400_000, document=1000)
    write_shard(tmp_path / "fineweb_val_000000.bin", tokens)
    write_shard(tmp_path / "fineweb_val_bytes_000000.bin", [3] * len(tokens))
    tables = tg.ByteTables(torch.full((5000,), 3), *torch.zeros(2, 5000, dtype=torch.bool))
    monkeypatch.setattr(tg, "load_tokenizer", lambda cfg: None)
    monkeypatch.setattr(tg.ByteTables, "from_sentencepiece", lambda processor, size: tables)
    cfg, sets = tg.Config(data_path=str(tmp_path), caseops_enabled=caseops), []
    assert memory(lambda: sets.append(tg.load_validation(cfg))) < 5 * len(tokens)
    (val,) = sets
    assert val.tokens.itemsize == val.target_bytes.itemsize == 2
    assert val.tokens.tolist() == tokens and val.target_bytes.tolist() == [3] * (len(tokens) - 1)
