"""Any number of ranks gives the same answer, and a rank that dies takes the others with it (gloo on CPUs)."""

import itertools
import os
import random
import signal
import socket
import time
import types
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from golden_tools import run_through, score_standard
from house import House, packed_loader, shuffled_loader
from oracle_ttt import contest_lengths
from patience import PATIENCE
from test_smoke import VOCAB, environment, write_shard
from torch.distributed import distributed_c10d

WORLDS = (2, 4)  # compared with one rank
STEPS = 20
MICRO_BATCHES = 4  # of a step, all ranks together
SIZES = {
    "TRAIN_BATCH_TOKENS": 512,
    "GRAD_ACCUM_STEPS": MICRO_BATCHES,
    "ITERATIONS": STEPS,
    "GPTQ_CALIBRATION_BATCHES": 3,
    "TTT_CHUNK_SIZE": 16,  # many steps, so that adapters do something
}
THREE = {"TRAIN_BATCH_TOKENS": 384, "GRAD_ACCUM_STEPS": 3}  # what three ranks can share
FIT_BUDGET = 16_000  # bytes of the fitted model
LONG, SHORT = (470, 391, 333, 290), (40, 21, 17, 55, 33, 8, 90, 26, 2, 61)  # tokens of validation documents


# -- what each rank does in the tests below; the results are compared afterwards


def stream(count: int, lengths: Callable[[], int], seed: int, factor: int = 3) -> np.ndarray:
    """Documents of `lengths()` tokens in a language that a small model can learn; `factor` is its grammar."""
    rng, tokens = random.Random(seed), []
    while len(tokens) < count:
        tokens.append(1)
        for _ in range(lengths() - 1):
            tokens.append(2 + (factor * tokens[-1] + rng.randint(0, 4)) % (VOCAB - 2))
    return np.array(tokens[:count])


def write_shards(folder: Path) -> None:
    """Three training shards that no number of batches fills; the first begins inside a document."""
    for number, count in enumerate((2000, 1300, 2775)):
        rng = random.Random(number)
        tokens = stream(count, lambda rng=rng: rng.randint(2, 90), seed=number)
        tokens = tokens[1:] if number == 0 else tokens
        write_shard(folder / f"fineweb_train_{number:06}.bin", tokens)


def order_of_documents() -> list[int]:
    return [*SHORT[:4], *LONG[:2], *SHORT[4:], *LONG[2:]]


def validation(tg, factor: int = 3):
    """Documents of LONG and SHORT tokens, mixed, with a made-up number of bytes per token."""
    lengths = iter(order_of_documents())
    tokens = torch.from_numpy(stream(sum(LONG + SHORT), lambda: next(lengths), seed=9, factor=factor))
    return tg.ValidationSet.from_sidecar(tokens, (tokens != 1).long() * (tokens % 5 + 1))


def configure(tg, **settings: object):
    return tg.read_settings(environment(**(SIZES | settings)))


def training(tg, ranks, folder: Path, **settings: object) -> dict:
    """Losses and gradient norms of 20 steps, the weights and their average."""
    cfg = configure(tg, **settings)
    torch.manual_seed(cfg.seed)
    backends, world = tg.plain_backends(cfg, ranks), ranks.world_size
    model = tg.GPT(cfg, backends).to(ranks.device)
    on_rank, micro_tokens = tg.micro_batches(cfg, backends, world)
    paths, group = tg.shard_paths(folder, "train"), world * on_rank
    loader = packed_loader(tg, paths, world, ranks.rank, micro_tokens, cfg.train_seq_len, VOCAB, group=group)
    trainer = tg.Trainer(cfg, model, loader, ranks)
    reports = [trainer.step(step, step / STEPS) for step in range(STEPS)]
    return {
        "loss": torch.tensor([report.train_loss for report in reports], dtype=torch.float64),
        "norm": torch.tensor([report.grad_norm for report in reports], dtype=torch.float64),
        "weights": model.state_dict(),
        "ema": trainer.ema.averages,
    }


def exact_training(tg, ranks, folder: Path, **settings: object) -> dict:
    """The same with Muon in float32.

    In bfloat16 a sum in another order (1e-8) is, where it falls between two numbers, a step of 0.4 %, which
    the orthogonalisation spreads over the matrix: after 20 steps weights differ by 1 %, losses by 1e-4. That
    is the arithmetic, not the ranks; here nothing may hide behind it.
    """
    with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.float):
        return training(tg, ranks, folder, **settings)


def exact_adaptation(tg, ranks, weights: dict, val, **settings: object) -> dict:
    """The same in float64: only the rope tables, at another place of a row, still round (5e-8)."""
    torch.set_default_dtype(torch.float64)
    try:
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            return adaptation(tg, ranks, weights, val, **settings)
    finally:
        torch.set_default_dtype(torch.float32)


def load_model(tg, cfg, weights: dict):
    model = tg.GPT(cfg)
    model.load_state_dict(weights)
    return model


def adaptation(tg, ranks, weights: dict, val, **settings: object) -> dict:
    """Score of test-time training, what this rank scored of it, and what the phases trained on."""
    cfg, scored, phases = configure(tg, **settings), [], []

    def on_event(kind: str, **data: object) -> None:
        if kind == "scored":
            part = data["part"]
            for number, span in zip(part.documents, part.spans, strict=True):
                scored.append((len(phases), number, data["chunk"], *span))
        elif kind == "global_sgd":
            phases.append(data["tokens"].tolist())

    model = load_model(tg, cfg, weights)
    watch = types.SimpleNamespace(see=on_event)
    meter = run_through(tg.ScoreFirstTTT, model, val, cfg, looping=True, ranks=ranks, watch=watch)
    totals = {"val_bpb": meter.val_bpb, "tokens": meter.tokens, "bytes": meter.bytes}
    return totals | {"scored": scored, "phases": phases, "weights": model.state_dict()}


def everything(tg, ranks, folder: Path) -> dict:
    """Every stage on this rank; after training, all worlds go on from the weights of one rank."""
    cfg = configure(tg)
    result = {"train": exact_training(tg, ranks, folder)}
    if ranks.world_size <= 2:
        result["clip_global"] = exact_training(tg, ranks, folder, CLIP_GLOBAL=1)
        result["maxwell"] = exact_training(tg, ranks, folder, MUON_MAXWELL=1, MUDD_WIDTH=3)
    if ranks.world_size == 1:
        result["three"] = exact_training(tg, ranks, folder, **THREE)
    if ranks.world_size != 2:
        result["bfloat16"] = training(tg, ranks, folder)
    if ranks.world_size == 1:
        torch.save(result["train"]["ema"], folder / "weights.pt")
    weights = torch.load(folder / "weights.pt")
    model = load_model(tg, cfg, weights)
    windows = shuffled_loader(tg, tg.shard_paths(folder, "train"), 1, 0, cfg.train_seq_len, VOCAB)
    result["hessians"] = tg.calibrate(model, cfg, windows, looping=True, ranks=ranks)
    if ranks.world_size == 1:
        torch.save(result["hessians"], folder / "hessians.pt")
    flat, hessians = tg.flatten_banks(weights, cfg.num_layers), torch.load(folder / "hessians.pt")
    result["artifact"] = tg.pack_artifact(tg.quantize_state(flat, hessians, cfg, ranks=ranks), cfg)
    result["gradients"] = tg.calibrate_gradients(model, cfg, windows, looping=True, ranks=ranks)
    if ranks.world_size == 1:
        torch.save(result["gradients"], folder / "gradients.pt")
    gradients = torch.load(folder / "gradients.pt")
    search = tg.FitSearch(flat, hessians, gradients, cfg, FIT_BUDGET, ranks)
    result["trials"] = list(search.trials())
    result["fitted"] = tg.pack_artifact(search.best_records(), cfg)
    score = tg.model_score(model, looping=True, ranks=ranks)
    meter = score_standard(tg, score, validation(tg), 128, cfg.eval_seq_len, ranks=ranks)
    result["standard"] = {"val_bpb": meter.val_bpb, "tokens": meter.tokens, "bytes": meter.bytes}
    result["warm"] = adaptation(tg, ranks, weights, validation(tg))
    unknown = validation(tg, factor=1)  # another grammar: much to learn, so that a wrong adapter would show
    fresh = {"TTT_WARM_START_A": 0, "TTT_LORA_LR": 0.001}
    result["cold"] = exact_adaptation(tg, ranks, weights, unknown, **fresh)
    result["tilted"] = exact_adaptation(tg, ranks, weights, unknown, NGRAM_TILT="2:1,1:0.5", **fresh)
    still = adaptation(tg, ranks, weights, unknown, TTT_LORA_LR=0) if ranks.world_size == 1 else {}
    result["gain"] = still.get("val_bpb", 0) - result["cold"]["val_bpb"]
    return result


def three(tg, ranks, folder: Path) -> dict:
    """Training on three ranks."""
    return {"train": exact_training(tg, ranks, folder, **THREE)}


def vanish(tg, ranks, folder: Path) -> dict:
    """Rank 1 ends without a word while rank 0 waits for it; what rank 0 says of it, and when."""
    tg.BARRIER_SECONDS = 2
    if ranks.rank == 1:
        os._exit(0)
    start = time.monotonic()
    with pytest.raises(tg.RunError) as raised:
        ranks.wait_for_all("ttt")
    ranks.close = lambda: None  # the others are gone
    return {"message": str(raised.value), "seconds": time.monotonic() - start}


def slow_rank(tg, ranks, folder: Path) -> dict:
    """Rank 1 works longer than a collective may take, then both meet twice."""
    distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    time.sleep(3 * ranks.rank)
    ranks.wait_for_all("ttt")
    ranks.wait_for_all("ttt")
    distributed_c10d._set_pg_timeout(timedelta(seconds=PATIENCE))
    return {"gathered": ranks.gather(ranks.rank)}


# -- starting ranks


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    return {name: str(value) for name, value in values.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _rank_main(rank: int, world: int, port: int, job: Callable[..., dict], folder: Path) -> None:
    signal.alarm(PATIENCE)  # ends a rank that waits for ever
    tg = House()
    torch.set_num_threads(1)
    os.environ.update(rank_environment(rank, world, port))
    ranks = tg.Ranks.from_env(configure(tg, GRAD_ACCUM_STEPS=1, TRAIN_BATCH_TOKENS=768), os.environ)
    torch.save(job(tg, ranks, folder), folder / f"{job.__name__}_{world}_{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def run_ranks(world: int, job: Callable[..., dict], folder: Path, results: int | None = None) -> list[dict]:
    """What `job(tg, ranks, folder)` returns on each of `world` processes (the first `results` of them)."""
    mp.set_forkserver_preload(["house", "torch._dynamo", __name__])  # imported once for all ranks
    arguments = world, free_port(), job, folder
    mp.start_processes(_rank_main, arguments, nprocs=world, start_method="forkserver")
    paths = [folder / f"{job.__name__}_{world}_{rank}.pt" for rank in range(results or world)]
    return [torch.load(path, weights_only=False) for path in paths]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_shards(folder)
    return folder


@pytest.fixture(scope="module")
def alone(tg, shards) -> dict:
    """Every stage in one process."""
    return everything(tg, tg.CPU, shards)


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world} ranks")
def results(request, alone, shards) -> list[dict]:
    """Every stage on several ranks."""
    return run_ranks(request.param, everything, shards)


@pytest.fixture(scope="module")
def three_ranks(shards) -> list[dict]:
    return run_ranks(3, three, shards)


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12))


# -- data


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_share_one_token_stream(tg, shards, world):
    """Step by step the spans of all ranks are those cut by hand from the shards, across their ends."""
    paths, span, steps, group = tg.shard_paths(shards, "train"), 65, 40, 8
    loaders = [packed_loader(tg, paths, world, r, span - 1, 64, VOCAB, group) for r in range(world)]
    seen = []
    for _ in range(steps * group // world):
        for loader in loaders:
            x, y, _ = loader.next()
            seen.append(torch.cat([x[0], y[0, -1:]]))
    expected = []
    for path in itertools.cycle(paths):
        tokens = np.fromfile(path, "<u2", offset=1024)
        tokens = torch.from_numpy(tokens[np.flatnonzero(tokens == 1)[0] :].astype(np.int64))
        whole = len(tokens) // (group * span) * group * span
        expected += tokens[:whole].split(span)
        if len(expected) >= len(seen):
            break
    assert torch.equal(torch.stack(seen), torch.stack(expected[: len(seen)]))
    assert len({loader.state() for loader in loaders}) == 1


# -- training


def check_training(results: list[dict], single: dict) -> None:
    """Losses and gradient norms of every step and the averaged weights are those of one rank."""
    assert single["loss"][-3:].mean() < single["loss"][:3].mean() - 0.5, "nothing was learnt: too weak a test"
    for result in results:
        for name in ("loss", "norm"):
            torch.testing.assert_close(result[name], single[name], rtol=1e-4, atol=0)
        assert result["ema"].keys() == single["ema"].keys()
        for name, average in single["ema"].items():
            torch.testing.assert_close(result["ema"][name], average, rtol=0, atol=1e-4, msg=name)


def test_training_does_not_depend_on_the_ranks(results, alone):
    check_training([result["train"] for result in results], alone["train"])


def test_training_on_three_ranks(three_ranks, alone):
    check_training([result["train"] for result in three_ranks], alone["three"])


@pytest.mark.parametrize("results", [2], indirect=True, ids=["2 ranks"])
def test_training_with_one_clip_for_all(results, alone):
    single = alone["clip_global"]
    check_training([result["clip_global"] for result in results], single)
    assert not torch.allclose(single["loss"], alone["train"]["loss"], rtol=1e-3), "CLIP_GLOBAL does nothing"


@pytest.mark.parametrize("results", [2], indirect=True, ids=["2 ranks"])
def test_training_with_four_momenta(results, alone):
    single = alone["maxwell"]
    check_training([result["maxwell"] for result in results], single)
    assert not torch.allclose(single["loss"], alone["train"]["loss"], rtol=2e-4), "they do nothing"


@pytest.mark.parametrize("results", [4], indirect=True, ids=["4 ranks"])
def test_training_in_bfloat16(results, alone):
    """Muon as it is: the bounds are those of its rounding (see `exact_training`)."""
    single = alone["bfloat16"]
    for result in results:
        torch.testing.assert_close(result["bfloat16"]["loss"], single["loss"], rtol=1e-3, atol=0)
        for name, average in single["ema"].items():
            assert relative_difference(result["bfloat16"]["ema"][name], average) < 0.1, name


def test_ranks_hold_the_same_weights(results, three_ranks):
    """Bit by bit: what differs by a rounding error would drift apart."""
    for those in (results, three_ranks):
        for kind, result in itertools.product(("weights", "ema"), those[1:]):
            for name, value in those[0]["train"][kind].items():
                assert torch.equal(result["train"][kind][name], value), name


# -- calibration, quantisation, standard evaluation


def test_hessians_do_not_depend_on_the_ranks(results, alone):
    for result in results:
        assert result["hessians"].keys() == alone["hessians"].keys()
        for name, hessian in alone["hessians"].items():
            assert hessian.diagonal().min() > 0, name
            assert relative_difference(result["hessians"][name], hessian) < 1e-5, name


def test_artifact_is_the_same_bytes(results, alone):
    assert [result["artifact"] == alone["artifact"] for result in results] == [True] * len(results)


def test_gradients_do_not_depend_on_the_ranks(results, alone):
    for result in results:
        assert result["gradients"].keys() == alone["gradients"].keys()
        for name, rows in alone["gradients"].items():
            assert rows.max() > 0, name
            assert relative_difference(result["gradients"][name], rows) < 1e-4, name


def test_fitted_artifact_is_the_same_bytes(results, alone):
    assert FIT_BUDGET - 2000 <= len(alone["fitted"]) <= FIT_BUDGET
    assert [result["fitted"] == alone["fitted"] for result in results] == [True] * len(results)


def test_standard_score_does_not_depend_on_the_ranks(results, alone):
    single = alone["standard"]
    assert single["tokens"] == sum(LONG + SHORT) - 1
    for result in results:
        assert result["standard"]["val_bpb"] == pytest.approx(single["val_bpb"], rel=0, abs=1e-6)
        assert (result["standard"]["tokens"], result["standard"]["bytes"]) == (
            single["tokens"],
            single["bytes"],
        )


@pytest.mark.parametrize("bos_mask", [True, False])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_a_phases_losses_do_not_depend_on_the_ranks(tg, world, bos_mask):
    """Also of a document that is cut at a rank's border: SmearGate reads the token before."""
    cfg = configure(tg, EVAL_SEQ_LEN=32, SMEAR_BOS_MASK=int(bos_mask))
    torch.manual_seed(0)
    model = tg.GPT(cfg).requires_grad_(False)
    for parameter in (model.smear_lambda, model.smear_gate.weight):
        parameter.data.normal_()
    tokens = torch.randint(2, VOCAB, (8 * 32 + 1,), generator=torch.Generator().manual_seed(1))
    tokens[[0, 150, 170]] = tg.BOS
    found = []
    for rank in range(world):
        training = tg.BaseTraining(model, cfg, True, True, tg.Ranks(torch.device("cpu"), rank, world))
        part, lead = training._part(tokens)
        if len(part) > 1 + lead:
            found.append(training.losses(part, lead))
    alone = tg.BaseTraining(model, cfg, True, True, tg.CPU).losses(tokens)
    torch.testing.assert_close(torch.cat(found, 1), alone)


# -- sharing out work


def test_assignment_to_ranks_is_near_the_best_there_is(tg):
    """Against all ways to share: the makespan of longest-first is at most 4/3 - 1/(3 ranks) of the least."""
    rng, world = random.Random(0), 3
    for _ in range(20):
        costs = [rng.choice([1, 2, 3, 5, 8, 30]) * rng.random() for _ in range(7)]
        owners = tg.assign_to_ranks(costs, world)
        assert len(owners) == len(costs) and set(owners) <= set(range(world))
        least = min(makespan(costs, way, world) for way in itertools.product(range(world), repeat=len(costs)))
        assert makespan(costs, owners, world) <= (4 / 3 - 1 / (3 * world)) * least * (1 + 1e-9)


def makespan(costs, owners, world: int) -> float:
    return max(sum(c for c, owner in zip(costs, owners, strict=True) if owner == r) for r in range(world))


def test_assignment_to_ranks_at_the_edges(tg):
    assert tg.assign_to_ranks([], 4) == []
    assert tg.assign_to_ranks([2.0, 1.0], 1) == [0, 0]
    assert sorted(tg.assign_to_ranks([1.0] * 8, 8)) == list(range(8))
    assert tg.assign_to_ranks([0.0, 7.0], 2) in ([0, 1], [1, 0])


def windows_cost(lengths, cfg) -> float:
    """Tokens that the windows of documents side by side hold, chunk by chunk, and a constant per step."""
    total, steps = 0, 0
    for length in lengths:
        chunks = -(-(length - 1) // cfg.ttt_chunk_size)
        ends = np.minimum(np.arange(1, chunks + 1) * cfg.ttt_chunk_size, length - 1)
        total += int(np.minimum(ends, cfg.ttt_eval_seq_len).sum())
        steps = max(steps, len(ends))
    return total + 4 * cfg.ttt_eval_seq_len * steps


@pytest.fixture(scope="module")
def contest(tg):
    """Settings of the record and the batches of each phase for the contest's lengths."""
    cfg, lengths = tg.Config(), contest_lengths()
    documents = list(zip(itertools.accumulate([0, *lengths[:-1]]), lengths, strict=True))
    batches = tg.ttt_batches(list(enumerate(documents)), cfg)
    boundaries = tg.phase_boundaries(cfg.phased_ttt_prefix_docs, cfg.phased_ttt_num_phases, len(documents))
    return cfg, tg.split_at_boundaries(batches, boundaries)


@pytest.mark.parametrize("world", [1, 2, 3, 8, 16])
def test_a_phase_is_shared_out_whole(tg, contest, world):
    """Every document once, in full batches of similar length, the longest first; one rank keeps the plan."""
    cfg, parts = contest
    assert sum(len(batch.documents) for part in parts for batch in part) == 50_000
    for part in parts:
        shares = tg.share_documents(part, cfg, world)
        assert len(shares) == world
        for share in shares:
            lengths = [[length for _, (_, length) in batch.documents] for batch in share]
            assert all(batch == sorted(batch) for batch in lengths)
            assert sum(len(batch) < cfg.ttt_batch_size for batch in lengths) <= 1
            assert all(later[-1] <= earlier[-1] for earlier, later in itertools.pairwise(lengths))
        given = sorted(document for share in shares for batch in share for document in batch.documents)
        assert given == sorted(document for batch in part for document in batch.documents)
        assert world > 1 or shares == [part]


def load(batches, cfg) -> float:
    """Cost of a rank's batches."""
    return sum(windows_cost([length for _, (_, length) in batch.documents], cfg) for batch in batches)


@pytest.mark.parametrize("world", [2, 4, 8, 16])
def test_ranks_have_equally_much_to_do(tg, contest, world):
    """The slowest against an equal part; steps that ranks repeat, for batches of their own, are the rest."""
    cfg, parts = contest
    for number, part in enumerate(parts):
        slowest = max(load(share, cfg) for share in tg.share_documents(part, cfg, world))
        assert slowest * world <= (1.06 if number else 1.3) * load(part, cfg), number


def test_sharing_documents_beats_sharing_batches(tg, contest):
    """Eight ranks, whole batches to whoever has least to do: the phases of long documents end much later."""
    cfg, parts = contest
    for number, part in enumerate(parts):
        owners = tg.assign_to_ranks([load([batch], cfg) for batch in part], 8)
        shares = [[b for b, owner in zip(part, owners, strict=True) if owner == rank] for rank in range(8)]
        ours = max(load(share, cfg) for share in tg.share_documents(part, cfg, 8))
        limit = 0.85 if number < len(parts) - 1 else 1.01
        assert ours <= limit * max(load(share, cfg) for share in shares), number


# -- test-time training


def check_adaptation(ranks: list[dict], single: dict, tolerance: float) -> None:
    """The same plan, each target once whoever scores it, the same phases, nearly the same score."""
    plan = sorted(item for rank in ranks for item in rank["scored"])
    assert plan == sorted(single["scored"])
    targets = sorted(first + i for *_, first, count in plan for i in range(count))
    assert targets == list(range(sum(LONG + SHORT) - 1))
    assert [len(tokens) > 256 for tokens in single["phases"]] == [True, True], "phases without a step"
    for rank in ranks:
        assert rank["phases"] == single["phases"]
        assert rank["tokens"] == single["tokens"] and rank["bytes"] == single["bytes"]
        assert rank["val_bpb"] == pytest.approx(single["val_bpb"], rel=0, abs=tolerance)
        assert all(torch.equal(rank["weights"][name], value) for name, value in ranks[0]["weights"].items())


def test_adaptation_with_fresh_adapters(results, alone):
    single = alone["cold"]
    assert alone["gain"] > 0.01, "the adapters did nothing: too weak a test"
    check_adaptation([result["cold"] for result in results], single, 2e-7)


def test_adaptation_that_is_tilted(results, alone):
    """The hints are those of any number of ranks, and do something."""
    assert abs(alone["tilted"]["val_bpb"] - alone["cold"]["val_bpb"]) > 1e-3
    check_adaptation([result["tilted"] for result in results], alone["tilted"], 2e-7)


def test_adaptation_with_warm_start(results, alone):
    """What differs is only which A factors a document inherits."""
    check_adaptation([result["warm"] for result in results], alone["warm"], 1e-4)


def test_long_documents_are_spread_over_the_ranks(results):
    """The four longest documents are one batch, which no rank works off alone."""
    numbers = {number for number, length in enumerate(order_of_documents()) if length >= min(LONG)}
    owners = [{number for _, number, *_ in rank["cold"]["scored"]} & numbers for rank in results]
    assert min(map(len, owners)) > 0


# -- waiting, and ranks that die


def test_missing_rank_is_named(shards):
    """Where torchrun does not end the others: who waits for the dead says so after a while and ends."""
    (result,) = run_ranks(2, vanish, shards, results=1)
    assert "stage ttt" in result["message"] and "ranks [1]" in result["message"]
    assert result["seconds"] >= 2


def test_slow_rank_is_waited_for(shards):
    """Work longer than the limit of a collective is no failure."""
    assert [result["gathered"] for result in run_ranks(2, slow_rank, shards)] == [[0, 1], [0, 1]]
