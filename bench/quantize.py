"""Sizes, speed and cost of the quantiser and of its codecs, as one table (or --json).

    python bench/quantize.py [--json] [--weights FULL_SIZE.pt] [--demo DEMO.pt ...] [--quick]

* Codecs on the record's model: 67 matrices after GPTQ. Without --weights (a `final_model.pt` of that size)
  they are drawn with unequal columns as in trained ones; Hessians of correlated, heavy-tailed inputs.
* GPTQ of one layer and the embedding against a plain column-by-column version.
* Quantisation cost of trained demo models (trained first where none is given) at equal total bytes: the
  published recipe with brotli, and FIT_BYTES with ans.
--quick leaves out brotli at full size (minutes) and the demo.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402
from harness.readers import load_weights  # noqa: E402
from systems.ans import decode_levels, encode_levels  # noqa: E402

SPREADS = {"mlp.proj": 0.45, "c_k": 0.15, "c_v": 0.12, "mlp.fc": 0.2}  # of log column deviations, as trained


def full_size_weights(cfg: tg.Config) -> dict[str, torch.Tensor]:
    """Matrices of the record's shapes: Gaussian, with columns (the embedding: means) as after training."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        state = tg.flatten_banks(tg.GPT(cfg).state_dict(), cfg.num_layers)
    weights = {}
    for name, tensor in state.items():
        if tg.scheme_of(name, tensor, cfg).kind != "gptq":
            continue
        spread = next((value for role, value in SPREADS.items() if role in name), 0.0)
        columns = torch.exp(spread * torch.randn(tensor.size(1), generator=generator))
        weights[name] = 0.05 * torch.randn(tensor.shape, generator=generator) * columns
        if name == "tok_emb.weight":
            weights[name] += 0.015 * torch.randn(tensor.size(1), generator=generator)
    return weights


def hessian(columns: int, seed: int) -> torch.Tensor:
    """x^T x of inputs with correlated, heavy-tailed columns."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * columns, columns, generator=generator)
    x = x @ torch.randn(columns, columns, generator=generator) / math.sqrt(columns) + x
    x *= torch.exp(0.8 * torch.randn(columns, generator=generator))
    return x.T @ x


def entropy_bytes(levels: np.ndarray) -> float:
    """Order-0 entropy of a matrix of levels, in bytes, tables not counted."""
    counts = np.unique(levels, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def plain_gptq(weight: torch.Tensor, hessian: torch.Tensor, bits: int, clip: float) -> torch.Tensor:
    """GPTQ without blocks: every column's error goes to all later columns at once."""
    h, w, top = hessian.clone(), weight.clone(), 2 ** (bits - 1) - 1
    step = (clip * w.std(dim=1) / top).half().float()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    order = torch.argsort(h.diagonal(), descending=True)
    w, h = w[:, order], h[order][:, order]
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    levels = torch.empty_like(w)
    for j in range(w.size(1)):
        levels[:, j] = (w[:, j] / step).round().clamp(-top, top)
        error = (w[:, j] - levels[:, j] * step) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
    return levels[:, torch.argsort(order)].to(torch.int8)


def timed(function, *arguments) -> tuple[float, object]:
    """Processor seconds of a call (one thread: company on the machine does not count), and its result."""
    start = time.process_time()
    result = function(*arguments)
    return time.process_time() - start, result


def bench_codecs(weights: dict[str, torch.Tensor], cfg: tg.Config, quick: bool) -> dict[str, float]:
    """Quantise, then code the levels: bits per weight and ratios by codec."""
    inputs = {columns: hessian(columns, columns) for columns in {w.size(1) for w in weights.values()}}
    hessians = {name: inputs[w.size(1)] for name, w in weights.items()}
    records = tg.quantize_state(weights, hessians, cfg)
    matrices = [(r.arrays["q"].numpy(), 2 ** (r.bits - 1) - 1) for r in records.values()]
    count, entropy = sum(m.size for m, _ in matrices), sum(entropy_bytes(m) for m, _ in matrices)
    encode_seconds, data = timed(encode_levels, matrices)
    layout = [(levels.shape, top) for levels, top in matrices]
    decode_seconds, decoded = timed(decode_levels, data, layout)
    assert all(np.array_equal(a, b) for a, (b, _) in zip(decoded, matrices, strict=True))
    result = {
        "weights": count,
        "entropy_bits": 8 * entropy / count,
        "ans_bits": 8 * len(data) / count,
        "ans_over_entropy": len(data) / entropy,
        "encode_seconds": encode_seconds,
        "decode_seconds": decode_seconds,
    }
    if not quick:
        raw = b"".join(levels.tobytes() for levels, _ in matrices)
        for codec in ("brotli", "lzma"):
            seconds, packed = timed(tg.compress, raw, tg.Config(compressor=codec))
            result |= {f"{codec}_bits": 8 * len(packed) / count, f"{codec}_encode_seconds": seconds}
            result[f"{codec}_over_entropy"] = len(packed) / entropy
        result["ans_over_brotli"] = result["ans_bits"] / result["brotli_bits"]
    return result


def bench_gptq(weights: dict[str, torch.Tensor], cfg: tg.Config) -> dict[str, float]:
    """The matrices of one layer and the embedding: ours against the plain version."""
    plain = ours = 0.0
    equal = []
    shared = {}
    for name, weight in weights.items():
        if not name.startswith(("blocks.4.", "tok_emb")):
            continue
        scheme, columns = tg.scheme_of(name, weight, cfg), weight.size(1)
        role = "qkv" if "attn.c_" in name else name
        h = hessian(columns, columns)
        seconds, expected = timed(plain_gptq, weight, h, scheme.bits, scheme.clip_sigmas)
        plain += seconds
        if role not in shared:
            seconds, shared[role] = timed(tg.factorise, h)
            ours += seconds
        seconds, record = timed(tg.quantize_tensor, weight, scheme, shared[role], cfg)
        ours += seconds
        equal.append((record.arrays["q"] == expected).double().mean().item())
    return {"gptq_seconds": ours, "gptq_plain_seconds": plain, "gptq_speedup": plain / ours} | {
        "gptq_equal_levels": min(equal)
    }


def run_demo(folder: Path, **settings: object) -> dict:
    """result.json of a run of the script."""
    environ = os.environ | {"PRESET": "demo", "ARTIFACT_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    environ |= {name: str(value) for name, value in settings.items()}
    subprocess.run([sys.executable, "train_gpt.py"], cwd=ROOT, env=environ, check=True, capture_output=True)
    return json.loads((folder / "result.json").read_text())


def bench_fit(models: list[Path], folder: Path) -> dict[str, object]:
    """Quantised val_bpb of demo models: the published recipe, and FIT_BYTES at the same total."""
    if not models:
        run_demo(folder / "trained", PREQUANT_ONLY=1, VAL_LOSS_EVERY=0)
        models = [folder / "trained" / "final_model.pt"]
    rows = []
    for number, model in enumerate(models):
        common = {"QUANTIZE_ONLY": 1, "TTT_ENABLED": 0, "MODEL_PATH": model.resolve()}
        published = run_demo(folder / f"published{number}", **common)
        total = published["artifact_bytes"]
        fitted = run_demo(folder / f"fitted{number}", **common, FIT_BYTES=total, COMPRESSOR="ans")
        prequant = published["stages"]["prequant"]["val_bpb"]
        rows.append(
            {
                "model": str(model),
                "prequant_bpb": prequant,
                "published_bytes": total,
                "published_cost_bpb": published["val_bpb"] - prequant,
                "fit_bytes": fitted["artifact_bytes"],
                "fit_cost_bpb": fitted["val_bpb"] - prequant,
            }
        )
    gains = [row["published_cost_bpb"] - row["fit_cost_bpb"] for row in rows]
    spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
    mean = statistics.mean(gains)
    return {"fit_bpb_gain": min(gains), "fit_bpb_gain_mean": mean, "fit_bpb_gain_sd": spread, "demo": rows}


def main() -> int:
    """Run all parts and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--weights", type=Path, help="full-precision model of the record's size")
    parser.add_argument("--demo", type=Path, nargs="*", default=[], help="trained demo models")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cfg = tg.Config()
    weights = full_size_weights(cfg)
    if arguments.weights:
        flat = tg.flatten_banks(load_weights(arguments.weights), cfg.num_layers)
        weights = {name: flat[name].float() for name in weights}
    result = bench_codecs(weights, cfg, arguments.quick) | bench_gptq(weights, cfg)
    if not arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            result |= bench_fit(arguments.demo, Path(folder))
    if arguments.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:24}", f"{value:.4f}" if isinstance(value, float) else value)
    return 0


if __name__ == "__main__":
    sys.exit(main())
