"""Sizes, speed and cost of the quantiser and of its codecs, as one table (or --json).

    python bench/quantize.py [--json] [--weights FULL_SIZE.pt] [--demo DEMO.pt ...] [--quick]

* Codecs on the record's model: 67 matrices after GPTQ. Without --weights (a `final_model.pt` of that size)
  they are drawn with unequal columns as in trained ones; Hessians of correlated, heavy-tailed inputs.
* GPTQ of one layer and the embedding against a plain column-by-column version.
* Quantisation cost of trained demo models (trained first where none is given) at equal total bytes: the
  published recipe with brotli, and FIT_BYTES with ans.
* QUANTIZER=trellis against scalar: seconds, bytes and error at the record's size; counted code; on the demo
  models coded bytes (scales among them) at equal Hessian-weighted error, and the KL divergence of the
  quantised from the whole model's predictions at equal bytes, code included; so with GPTQ_DRIFT_BATCHES.
--quick leaves out brotli at full size (minutes) and the demo.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402
from harness.packing import packed_script  # noqa: E402
from harness.readers import load_weights  # noqa: E402
from harness.settings import read_settings  # noqa: E402
from systems.ans import decode_levels, encode_levels  # noqa: E402
from systems.drift import LayersInOrder  # noqa: E402
from systems.fit_bytes import FitSearch, calibrate_gradients, fit_matrices  # noqa: E402

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


def code_levels(records: Mapping[str, tg.QuantizedTensor]) -> tuple[bytes, float, float]:
    """The coded levels of some records, and the processor seconds of coding and decoding; checked."""
    arrays = [record.arrays["q"].numpy() for record in records.values()]
    tops = [2 ** (record.bits - 1) - 1 for record in records.values()]
    encode_seconds, data = timed(encode_levels, arrays, tops)
    layout = [(a.shape, a.dtype.str, top) for a, top in zip(arrays, tops, strict=True)]
    decode_seconds, decoded = timed(decode_levels, data, layout)
    assert all(np.array_equal(a, b) for a, b in zip(decoded, arrays, strict=True))
    return data, encode_seconds, decode_seconds


def bench_codecs(weights: dict[str, torch.Tensor], cfg: tg.Config, quick: bool) -> dict[str, float]:
    """Quantise, then code the levels: bits per weight and ratios by codec."""
    inputs = {columns: hessian(columns, columns) for columns in {w.size(1) for w in weights.values()}}
    hessians = {name: inputs[w.size(1)] for name, w in weights.items()}
    records = tg.quantize_state(weights, hessians, cfg)
    matrices = [record.arrays["q"].numpy() for record in records.values()]
    count, entropy = sum(m.size for m in matrices), sum(entropy_bytes(m) for m in matrices)
    data, encode_seconds, decode_seconds = code_levels(records)
    result = {
        "weights": count,
        "entropy_bits": 8 * entropy / count,
        "ans_bits": 8 * len(data) / count,
        "ans_over_entropy": len(data) / entropy,
        "encode_seconds": encode_seconds,
        "decode_seconds": decode_seconds,
    }
    if not quick:
        raw = b"".join(levels.tobytes() for levels in matrices)
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


def bench_trellis(weights: dict[str, torch.Tensor], cfg: tg.Config) -> dict[str, float]:
    """All matrices of the record's size by trellis and not: seconds; bytes saved at equal error."""
    inputs = {columns: hessian(columns, columns) for columns in {w.size(1) for w in weights.values()}}
    hessians, sizes, errors = {name: inputs[w.size(1)] for name, w in weights.items()}, [], []
    for quantizer in ("scalar", "trellis"):
        chosen = dataclasses.replace(cfg, quantizer=quantizer, lqer_enabled=False)
        sweep_seconds, records = timed(tg.quantize_state, weights, hessians, chosen)
        data, encode_seconds, decode_seconds = code_levels(records)
        sizes.append(len(data))
        errors.append(sum(record.report["weighted_error"] for record in records.values()))
    count = sum(weight.numel() for weight in weights.values())
    saved = math.log2(errors[0] / errors[1]) / 2 * count / 8  # bytes that steps of the scalar's error save
    return {
        "trellis_sweep_seconds": sweep_seconds,
        "trellis_encode_seconds": encode_seconds,
        "trellis_decode_seconds": decode_seconds,
        "trellis_full_size_bytes_over_scalar": (sizes[1] - saved) / sizes[0],
        "trellis_full_size_error_ratio": errors[1] / errors[0],
    }


def counted_code(**settings: object) -> int:
    """Bytes of a demo's counted code on a CPU."""
    cfg = read_settings({"PRESET": "demo", **{name: str(value) for name, value in settings.items()}})
    return len(packed_script(cfg, tg.Backends(micro_batches=2), tg.read_sources(), False)[0])


class TrainedDemo:
    """A trained demo model with what quantisation by FIT_BYTES needs of it."""

    def __init__(self, path: Path):
        self.path, self.cfg = path, read_settings({"PRESET": "demo", "COMPRESSOR": "ans"})
        state = load_weights(path)
        self.flat, self.model = tg.flatten_banks(state, self.cfg.num_layers), self.new_model(state)
        loader = tg.ShuffledLoader(tg.shard_paths(self.cfg.data_folder, "train"), self.cfg)
        self.hessians = tg.calibrate(self.model, self.cfg, loader, looping=True)
        self.gradients = calibrate_gradients(self.model, self.cfg, loader, looping=True)
        self.whole = self.predictions(self.model)

    def new_model(self, state: Mapping[str, torch.Tensor]) -> tg.GPT:
        """A model with some weights."""
        model = tg.GPT(self.cfg)
        model.load_state_dict(state)
        return model

    @torch.no_grad()
    def predictions(self, model: tg.GPT, targets: int = 16_384) -> torch.Tensor:
        """Log probabilities of the next token at some places of the training text."""
        loader = tg.ShuffledLoader(tg.shard_paths(self.cfg.data_folder, "train"), self.cfg, seed=99)
        x, _ = loader.next(targets // self.cfg.train_seq_len)
        hidden = (model.hidden(rows, looping=True) for rows in x.split(4))
        return torch.cat([model.logits(h).float().log_softmax(-1).flatten(0, 1) for h in hidden])

    def search(self, quantizer: str, total: int, drift_batches: int = 0) -> FitSearch:
        """A search that has been gone through; code and model have at most `total` bytes."""
        settings = {"quantizer": quantizer, "fit_bytes": total, "gptq_drift_batches": drift_batches}
        self.model.cfg = cfg = dataclasses.replace(self.cfg, **settings)
        budget = total - counted_code(COMPRESSOR="ans", **{key.upper(): v for key, v in settings.items()})
        search = FitSearch(self.flat, self.hessians, self.gradients, cfg, budget)
        list(search.trials())
        if drift_batches:
            loader = tg.ShuffledLoader(tg.shard_paths(cfg.data_folder, "train"), cfg, seed=1)
            list(search.trials_in_order(LayersInOrder(self.model, loader, looping=True).store))
        return search

    def divergence(self, records: Mapping[str, tg.QuantizedTensor]) -> float:
        """KL divergence of the model that is stored from the whole one, nats per target."""
        stored = self.new_model(tg.dequantize_state(records, self.cfg.num_layers))
        return float((self.whole.exp() * (self.whole - self.predictions(stored))).sum(-1).mean())

    def size_and_error(self, search: FitSearch, quantizer: str, log2_step: float) -> tuple[int, float]:
        """Bytes of levels and scales, and the Hessian-weighted error, of all matrices at a step."""
        clips = {name: 2.0**log2_step * clip for name, clip in search.clips.items()}
        records = fit_matrices(search.problems, clips, quantizer)
        size = len(code_levels(records)[0])
        for key in ("scale", "columns"):
            data = b"".join(record.arrays[key].numpy().tobytes() for record in records.values())
            size += len(tg.compress(tg.byte_shuffle(data), self.cfg))
        return size, sum(record.report["weighted_error"] for record in records.values())

    def compare(self, total: int) -> dict[str, float]:
        """Trellis over scalar: KL and error at equal bytes, bytes at equal error; KL with drift."""
        searches, divergences = {}, {}
        for quantizer in ("scalar", "trellis"):
            searches[quantizer] = self.search(quantizer, total)
            divergences[quantizer] = self.divergence(searches[quantizer].best_records())
        in_order = self.search("trellis", total, self.cfg.gptq_calibration_batches)
        start = searches["scalar"].best[1]
        size, error = self.size_and_error(searches["scalar"], "scalar", start)
        rows = [self.size_and_error(searches["trellis"], "trellis", start - d) for d in (1.0, 0.8, 0.6)]
        sizes, errors = [row[0] for row in rows], [math.log(row[1]) for row in rows]
        return {
            "model": str(self.path),
            "kl_scalar": divergences["scalar"],
            "kl_trellis": divergences["trellis"],
            "kl_in_order": self.divergence(in_order.best_records()),
            "bytes_over_scalar": float(np.interp(math.log(error), errors, sizes)) / size,
            "error_ratio": math.exp(np.interp(-size, [-s for s in sizes], errors)) / error,
        }


def interval(name: str, ratios: list[float]) -> dict[str, float]:
    """The mean of some ratios, and half of its 95 % interval."""
    half = math.nan
    if len(ratios) > 1:
        half = statistics.stdev(ratios) / math.sqrt(len(ratios)) * stats.t.ppf(0.975, len(ratios) - 1)
    return {name: statistics.mean(ratios), f"{name}_half_interval": half}


def compare_trellis(models: list[Path], total: int) -> dict[str, object]:
    """Trellis against scalar on demo models, each by itself and in the mean with its 95 % interval."""
    torch.manual_seed(0)
    rows = [TrainedDemo(path).compare(total) for path in models]
    return {
        **interval("trellis_kl_ratio", [row["kl_trellis"] / row["kl_scalar"] for row in rows]),
        **interval("drift_kl_ratio", [row["kl_in_order"] / row["kl_trellis"] for row in rows]),
        "trellis_bytes_over_scalar": max(row["bytes_over_scalar"] for row in rows),
        "trellis_error_ratio": max(row["error_ratio"] for row in rows),
        "trellis_models": rows,
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
    result = {"fit_bpb_gain": min(gains), "fit_bpb_gain_mean": mean, "fit_bpb_gain_sd": spread, "demo": rows}
    return result | compare_trellis(models, rows[0]["published_bytes"])


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
    result |= bench_trellis(weights, cfg)
    codes = [counted_code(COMPRESSOR="ans", QUANTIZER=quantizer) for quantizer in ("scalar", "trellis")]
    result["trellis_code_bytes"] = codes[1] - codes[0]
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
