"""How fast is phased test-time training, and what does its cached form cost?

    python bench/ttt.py [--json] [--models RUN_DIR...] [--windows 48,96,...] [--repeats 3] [--parts exact,...]

Five parts, each on one thread: `exact` (the evaluator against the plain form of tests/oracle_ttt.py, the
same documents at 512-dim shapes, in turn), `cached` (TTT_CACHE_WINDOW against exact: seconds and FLOPs on
documents of 1,000 tokens and more), `quality` (val_bpb of the cached form, of fewer adapters and of other
chunk sizes on trained demo models; trains three seeds unless given artifacts) and `schedule` (makespan on 8
ranks, simulated).
`compiled` alone uses a GPU where there is one: seconds of the evaluator with and without the compiler, what
compiling took, how many graphs. The last line with --json is one JSON object.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from oracle_ttt import contest_lengths, plain_ttt  # noqa: E402

import train_gpt as tg  # noqa: E402
from harness.readers import read_artifact  # noqa: E402
from harness.settings import read_settings  # noqa: E402
from systems.compiled import warm_up_ttt  # noqa: E402

SHAPE = {"num_layers": 3, "num_loops": 1, "loop_start": 1, "loop_end": 1, "parallel_start_layer": 2}
BY_LENGTH = ("256:8,2000:24", "2047:16", "256:8,512:16,1024:24")  # PR 2014, PR 2067, and one of ours
SHAPE |= {"phased_ttt_prefix_docs": 0, "xsa_last_n": 3}  # 512-dim, 8192 pieces, fewer layers


def median_seconds(functions: dict, repeats: int) -> dict[str, float]:
    """Median seconds of each function, called in turn."""
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def random_validation(lengths, vocab_size: int):
    """Documents of these lengths, random tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, vocab_size, (sum(lengths),), generator=generator)
    tokens[np.cumsum([0, *lengths[:-1]])] = tg.BOS
    return tg.ValidationSet.from_sidecar(tokens, (tokens != tg.BOS).long() * 3)


def random_model(cfg, backends=None):
    """A model none of whose matrices is zero."""
    torch.manual_seed(0)
    model = tg.GPT(cfg, backends or tg.Backends())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def document_losses(model, val, cfg) -> dict[int, float]:
    """Loss sum (nats) of each document by the evaluator."""
    sums: dict[int, float] = {}

    def see(kind: str, **facts: object) -> None:
        if kind == "scored":
            part, losses = facts["part"], facts["losses"].detach().double()
            for row, number in enumerate(part.documents):
                sums[number] = sums.get(number, 0.0) + float(losses[row][part.valid[row]].sum())

    tg.ScoreFirstTTT(model, val, cfg, looping=True, watch=SimpleNamespace(see=see)).run()
    return sums


def exact(repeats: int) -> dict[str, float]:
    """The evaluator against the plain form: seconds and largest relative difference of a document's loss."""
    cfg = tg.Config(**SHAPE, ttt_batch_size=4, ttt_eval_seq_len=256, eval_seq_len=256)
    val = random_validation([60, 90, 130, 170, 210, 260, 310, 420], cfg.vocab_size)
    model = random_model(cfg)
    plain, ours = plain_ttt(tg, model, val, cfg, looping=True), document_losses(model, val, cfg)
    difference = max(abs(ours[number] / plain[number] - 1) for number in plain)
    seconds = median_seconds(
        {
            "plain": lambda: plain_ttt(tg, model, val, cfg, looping=True),
            "exact": lambda: tg.ScoreFirstTTT(model, val, cfg, looping=True).run(),
        },
        repeats,
    )
    return {
        "plain_seconds": seconds["plain"],
        "exact_seconds": seconds["exact"],
        "speedup_exact": seconds["plain"] / seconds["exact"],
        "max_rel_diff": difference,
    }


class Everywhere(contextlib.nullcontext):
    """Stands in for the counter's module tracker, whose hooks fail on inputs that are leaves."""

    parents = frozenset({"Global"})


def cached(windows: list[int], repeats: int) -> dict[str, float]:
    """Seconds and FLOPs of the exact form over the cached one's, documents from 1,000 tokens on.

    Every sixth of them by length, 256-dim shapes, windows of 2,048.
    """
    cfg = tg.Config(**SHAPE, model_dim=256, vocab_size=1024, ttt_batch_size=4, ttt_lora_rank=16)
    long = sorted(length for length in contest_lengths() if length >= 1000)
    lengths = [long[len(long) * i // 6] for i in range(1, 6)]
    val, model = random_validation(lengths, cfg.vocab_size), random_model(cfg)
    forms = {str(w): dataclasses.replace(cfg, ttt_cache_window=w) for w in [0, *windows]}
    flops = {}
    for name, form in forms.items():
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = Everywhere()
        with counter:
            tg.ScoreFirstTTT(model, val, form, looping=True).run()
        flops[name] = counter.get_total_flops()
    runs = {
        name: lambda form=form: tg.ScoreFirstTTT(model, val, form, looping=True).run()
        for name, form in forms.items()
    }
    seconds = median_seconds(runs, repeats)
    result = {"cached_lengths": lengths}
    for w in windows:
        result[f"speedup_cached_{w}"] = seconds["0"] / seconds[str(w)]
        result[f"flops_ratio_{w}"] = flops["0"] / flops[str(w)]
    return result


def compiled(repeats: int) -> dict[str, object]:
    """Seconds of eager over compiled evaluation, the same documents in turn; graphs and what they cost.

    On CUDA the record's model and 64 documents from the middle of the contest's lengths, two of 8,000 tokens
    among them; else a model of one layer.
    """
    cuda = torch.cuda.is_available()
    small = {"model_dim": 64, "vocab_size": 512, "num_layers": 1, "num_loops": 0, "loop_end": 0}
    small |= {
        "num_heads": 4,
        "num_kv_heads": 2,
        "ttt_lora_rank": 4,
        "ttt_batch_size": 8,
        "parallel_start_layer": 0,
        "xsa_last_n": 1,
    }
    settings = {"COMPILE_BACKEND": "auto" if cuda else "inductor"} | dict(os.environ)
    cfg = read_settings(settings)
    cfg = dataclasses.replace(cfg, phased_ttt_prefix_docs=0, **({} if cuda else small))
    ranks = tg.Ranks.from_env(cfg, {})
    backends = tg.plain_backends(cfg, ranks)
    lengths = [*sorted(contest_lengths())[20_000:30_000:162], 8000, 8000] if cuda else [60, 70, 110, 160]
    val = random_validation(lengths, cfg.vocab_size)
    model = backends.move_and_compile(random_model(cfg, backends), ranks.device)
    start = time.perf_counter()
    graphs = warm_up_ttt(model, cfg, [cfg.ttt_chunk_size], True, ranks)
    result = {"compiled_graphs": graphs, "compile_seconds": time.perf_counter() - start}
    eager, before, sums = dataclasses.replace(backends, compiler=""), tg.compiled_graphs(), {}

    def run(name: str, which: tg.Backends) -> None:
        model.backends = which
        sums[name] = tg.ScoreFirstTTT(model, val, cfg, looping=True, ranks=ranks).run().loss_sum
        ranks.synchronize()

    runs = {"eager": lambda: run("eager", eager), "compiled": lambda: run("compiled", backends)}
    seconds = median_seconds(runs, repeats)
    return result | {
        "compiled_device": torch.cuda.get_device_name() if cuda else "CPU",
        "eager_seconds": seconds["eager"],
        "compiled_seconds": seconds["compiled"],
        "speedup_compiled": seconds["eager"] / seconds["compiled"],
        "compiled_rel_diff": abs(sums["compiled"] / sums["eager"] - 1),
        "recompiled": tg.compiled_graphs() - before,
    }


def padding(world: int = 8) -> dict[str, float]:
    """Share of window tokens, and of scored places, that are padding, on the contest's lengths.

    `adapter_padding` is the share of rows computed for adapters at rest where the chunks are compiled.
    """
    cfg, lengths = tg.Config(), contest_lengths()
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    batches = tg.ttt_batches(list(enumerate(zip(starts, lengths, strict=True))), cfg)
    boundaries = tg.phase_boundaries(cfg.phased_ttt_prefix_docs, cfg.phased_ttt_num_phases, len(lengths))
    real, width, places, targets, resting = 0, 0, 0, 0, 0
    for part in tg.split_at_boundaries(batches, boundaries):
        for batch in itertools.chain.from_iterable(tg.share_documents(part, cfg, world)):
            ends = [length - 1 for _, (_, length) in batch.documents]
            rows = len(ends)
            for chunk in range(-(-ends[-1] // cfg.ttt_chunk_size)):
                limits = [end for end in ends if chunk * cfg.ttt_chunk_size < end]
                windows = [
                    tg.chunk_window(chunk, end, cfg.ttt_chunk_size, cfg.ttt_eval_seq_len) for end in limits
                ]
                widest = max(window.length for window in windows)
                rows = len(limits) if len(limits) <= rows * 7 // 8 else rows
                real += sum(window.length for window in windows)
                width += widest * len(limits)
                resting += widest * (rows - len(limits))
                targets += sum(window.targets for window in windows)
                places += cfg.ttt_chunk_size * len(limits)
    return {
        "window_padding": 1 - real / width,
        "scored_padding": 1 - targets / places,
        "adapter_padding": resting / (width + resting),
    }


def demo_models(folder: Path) -> list[Path]:
    """Artifacts of three demo runs, trained here if they are not there yet."""
    paths = []
    for seed in (42, 1, 2):
        run = folder / f"seed{seed}"
        paths.append(run / "final_model.int6.ptz")
        if not paths[-1].exists():
            settings = {"PRESET": "demo", "SEED": str(seed), "TTT_ENABLED": "0", "ARTIFACT_DIR": str(run)}
            command = [sys.executable, str(ROOT / "train_gpt.py")]
            subprocess.run(
                command, cwd=ROOT, env=os.environ | settings, check=True, stdout=subprocess.DEVNULL
            )
    return paths


def quality(models: list[Path], windows: list[int]) -> dict[str, float]:
    """Mean change of val_bpb against the exact form, and each model's; seconds against the exact form's."""
    variants = {"exact": {}} | {f"window_{w}": {"ttt_cache_window": w} for w in windows}
    variants |= {"no_qv": {"ttt_q_lora": False, "ttt_v_lora": False}}
    variants |= {f"chunk_{n}": {"ttt_chunk_size": n} for n in (16, 24, 96)}
    variants |= {f"chunk_by_length_{n}": {"ttt_chunk_by_length": text} for n, text in enumerate(BY_LENGTH)}
    scores, seconds = {name: [] for name in variants}, {name: [] for name in variants}
    for path in models:
        settings, records = read_artifact(path.read_bytes(), tg.Config())
        cfg = dataclasses.replace(read_settings({"PRESET": "demo"}), **settings)
        state = tg.dequantize_state(records, cfg.num_layers)
        val = tg.load_validation(cfg)
        for name, change in variants.items():
            model = tg.GPT(cfg)
            model.load_state_dict(state)
            start = time.perf_counter()
            meter = tg.ScoreFirstTTT(model, val, dataclasses.replace(cfg, **change), looping=True).run()
            seconds[name].append(time.perf_counter() - start)
            scores[name].append(meter.val_bpb)
            took = f"seconds:{seconds[name][-1]:.1f}"
            print(f"quality {path.parent.name} {name} val_bpb:{meter.val_bpb:.6f} {took}", flush=True)
    result = {"exact_bpb": scores["exact"]}
    for name in list(variants)[1:]:
        deltas = [b - a for a, b in zip(scores["exact"], scores[name], strict=True)]
        ratios = [a / b for a, b in zip(seconds["exact"], seconds[name], strict=True)]
        result[f"bpb_delta_{name}"] = deltas
        result[f"demo_speedup_{name}"] = statistics.median(ratios)
    return result


# -- the schedule, simulated

# From FIELD C3, for the published steps on an H100: the first batch, 2,024 steps of 64 rows of 2,048 tokens,
# took about 200 s; the last 48,000 documents, 1,460 steps and 71 M window tokens a rank, about 95 s.
HOPPER = (0.043, 4.3e-7)  # seconds of a step, and of a token of its windows


def step_seconds() -> tuple[float, float]:
    """Measured seconds of a chunk's step: a constant, and for each token of a window (least squares)."""
    cfg = tg.Config(**SHAPE, ttt_batch_size=4, ttt_lora_rank=16)
    model, points = random_model(cfg), []
    for rows, length in ((1, 49), (1, 300), (2, 400), (4, 300), (4, 600)):
        lora = tg.BatchedLoRA(cfg, rows, tg.lora_slots(cfg, True), torch.Generator().manual_seed(0))
        optimizer = tg.LoRAOptimizer(cfg, lora)
        x = torch.randint(2, cfg.vocab_size, (rows, length))
        scored = torch.arange(length - 48, length).expand(rows, -1)

        def step(x=x, scored=scored, lora=lora, optimizer=optimizer) -> None:
            optimizer.step(model.losses(x, x, looping=True, lora=lora, scored=scored).sum())

        step()
        points.append((rows * length, median_seconds({"": step}, 5)[""]))
    slope, constant = np.polyfit(*zip(*points, strict=True), 1)
    return max(float(constant), 0.0), float(slope)


def batch_seconds(lengths, cfg, constant: float, slope: float, drops: bool) -> float:
    """Seconds of documents side by side; published steps compute TTT_BATCH_SIZE rows until the last ends."""
    if not drops:
        lengths = [max(lengths)] * cfg.ttt_batch_size
    chunks = [-(-(length - 1) // cfg.ttt_chunk_size) for length in lengths]
    total = max(chunks) * constant
    for length, count in zip(lengths, chunks, strict=True):
        ends = np.minimum(np.arange(1, count + 1) * cfg.ttt_chunk_size, length - 1)
        total += slope * float(np.minimum(ends, cfg.ttt_eval_seq_len).sum())
    return total


def published_makespan(batches, boundaries, world: int, seconds) -> float:
    """Ranks pull the next batch; when the completed documents reach a boundary, all wait for all."""
    free, done, left, queue = [0.0] * world, 0, list(boundaries), [*batches]
    finished: list[tuple[float, int]] = []
    while queue:
        rank = free.index(min(free))
        now = free[rank]
        done = sum(count for end, count in finished if end <= now)
        if left and done >= left[0]:
            left.pop(0)
            free = [max(free)] * world
            continue
        batch = queue.pop(0)
        free[rank] = now + seconds(batch)
        finished.append((free[rank], len(batch.documents)))
    return max(free)


def schedule(world: int = 8) -> dict[str, float]:
    """Our makespan over the published policy's: with our steps for both, and with its own (no row leaves)."""
    cfg, lengths = tg.Config(), contest_lengths()
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    batches = tg.ttt_batches(list(enumerate(zip(starts, lengths, strict=True))), cfg)
    boundaries = tg.phase_boundaries(cfg.phased_ttt_prefix_docs, cfg.phased_ttt_num_phases, len(lengths))
    parts = tg.split_at_boundaries(batches, boundaries)
    constant, slope = step_seconds()
    models = {"cpu": (constant, slope), "hopper": HOPPER}
    result = {"step_seconds": constant, "token_seconds": slope}
    for name, (a, b) in models.items():

        def cost(batch, drops=True, a=a, b=b) -> float:
            return batch_seconds([length for _, (_, length) in batch.documents], cfg, a, b, drops)

        ours = sum(
            max(sum(map(cost, share)) for share in tg.share_documents(part, cfg, world)) for part in parts
        )
        equal = sum(map(cost, batches)) / world
        pulled = published_makespan(batches, boundaries, world, cost)
        published = published_makespan(batches, boundaries, world, lambda batch: cost(batch, drops=False))
        result |= {
            f"makespan_over_equal_{name}": ours / equal,
            f"makespan_ratio_same_steps_{name}": ours / pulled,
            f"makespan_ratio_{name}": ours / published,
        }
    result["makespan_ratio"] = result["makespan_ratio_cpu"]
    return result


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--models", nargs="*", type=Path, help="artifacts of trained demo models")
    parser.add_argument("--windows", default="48,96,144,192", help="TTT_CACHE_WINDOW values to try")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each form, in turn")
    parser.add_argument("--parts", default="exact,cached,quality,schedule,compiled", help="what to run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    windows, result = [int(text) for text in arguments.windows.split(",")], {}
    for part in arguments.parts.split(","):
        if part == "exact":
            figures = exact(arguments.repeats)
        elif part == "cached":
            figures = cached(windows, arguments.repeats)
        elif part == "compiled":
            figures = compiled(arguments.repeats)
        elif part == "quality":
            figures = quality(arguments.models or demo_models(ROOT / "runs" / "bench_ttt"), windows)
        else:
            figures = schedule() | padding()
        result |= figures
        print(part, " ".join(f"{name}:{value}" for name, value in figures.items()), flush=True)
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
