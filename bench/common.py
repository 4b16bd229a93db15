"""What the measurements share: the script, rows like FineWeb's, clocks, peaks of known GPUs, one table."""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402
from harness.backends import choose_backends  # noqa: E402
from harness.preflight import peak_flops  # noqa: E402

BANDWIDTH = {  # data sheets: bytes/s of memory; the first name that fits counts
    r"H200": 4.8e12,
    r"H100 PCIe": 2.0e12,
    r"H100|GH200": 3.35e12,
    r"B200|B100": 8.0e12,
    r"A100": 2.0e12,
    r"RTX 4090": 1.01e12,
    r"L40S": 0.86e12,
    r"A10\b": 0.6e12,
}
SMALL = {  # sizes of a model that a CPU core runs in seconds
    "cpu_threads": 1,
    "vocab_size": 512,
    "train_seq_len": 256,
    "train_batch_tokens": 4096,
    "num_layers": 4,
    "model_dim": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "num_loops": 1,
    "loop_start": 1,
    "loop_end": 2,
    "parallel_start_layer": 3,
    "eval_seq_len": 256,
    "val_batch_tokens": 8192,
}


def parser(description: str) -> argparse.ArgumentParser:
    """Options of every measurement."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options.add_argument("--repeats", type=int, default=0, help="timed runs (10 on CUDA, 3 on a CPU)")
    return options


def setup(device: str) -> tuple[tg.Config, tg.Ranks, tg.Backends]:
    """Settings from the environment, on a CPU of a small model; the device; the backends chosen for it."""
    cuda = torch.cuda.is_available() and device != "cpu"
    if device == "cuda" and not cuda:
        sys.exit("bench: --device cuda: torch sees no CUDA device")
    small = {} if cuda else {name.upper(): str(value) for name, value in SMALL.items()}
    try:
        cfg = tg.Config.from_env({**small, **os.environ, "DEVICE": "cuda" if cuda else "cpu"})
        ranks = tg.Ranks.from_env(cfg, {})
        return cfg, ranks, choose_backends(cfg, ranks)
    except tg.UserError as error:
        sys.exit(f"bench: error: {error}")


def environment(ranks: tg.Ranks) -> dict[str, object]:
    """Where and with what a number was measured."""
    cuda = ranks.device.type == "cuda"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else [""]
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout
    except OSError:  # a lent machine may have no git
        commit = ""
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{cpu}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "commit": commit.strip(),
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
    }


def peaks(ranks: tg.Ranks) -> tuple[float, float]:
    """Peak FLOP/s and bytes/s by the data sheet; nan where the device is not in the table."""
    name = torch.cuda.get_device_name() if ranks.device.type == "cuda" else ""
    bandwidth = next((rate for pattern, rate in BANDWIDTH.items() if re.search(pattern, name)), math.nan)
    return peak_flops(ranks), bandwidth


def text_row(cfg: tg.Config, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, tg.Segments]:
    """A row of random tokens in documents as long as FineWeb's (median 567, mean 963 tokens, log-normal)."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(2, cfg.vocab_size, (tokens + 1,), generator=generator)
    scale = cfg.train_seq_len / 2048  # shorter documents for shorter rows
    lengths = torch.empty(tokens).log_normal_(math.log(567 * scale), 1.03, generator=generator)
    starts = lengths.clamp_min(2).long().cumsum(0)
    row[0], row[starts[starts < tokens]] = tg.BOS, tg.BOS
    return tg.packed_row(row, cfg.train_seq_len)


def mean_context(segments: tg.Segments) -> float:
    """Mean number of tokens that a token attends to."""
    lengths = segments.cu_seqlens.diff().double()
    return float((lengths * (lengths + 1) / 2).sum() / lengths.sum())


def measure(
    function: Callable[[], object], ranks: tg.Ranks, repeats: int, warm_up: int = 2
) -> dict[str, float]:
    """Milliseconds of a call: median and the spread from the fastest to the slowest."""
    for _ in range(warm_up):
        function()
    times = []
    for _ in range(repeats or (10 if ranks.device.type == "cuda" else 3)):
        ranks.synchronize()
        start = time.perf_counter()
        function()
        ranks.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return {"ms": statistics.median(times), "low": min(times), "high": max(times)}


def report(result: dict, rows: Sequence[dict], as_json: bool) -> None:
    """One JSON object, or a Markdown table of the rows with the environment above it."""
    if as_json:
        print(json.dumps(_finite({**result, "rows": list(rows)}), indent=1))
        return
    for key, value in result.items():
        print(f"{key}: {_cell(value)}")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |")


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}:{_cell(item)}" for key, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _finite(tree: object) -> object:
    """JSON has no nan."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
