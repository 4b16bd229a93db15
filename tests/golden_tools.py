"""What the golden tests share: a folder of vectors, the cases that it has, and comparisons.

Any folder of the format of golden/README.md can be tested (GOLDEN_DIR): cases, names, counts and sizes are
the folder's, and what it lacks is skipped by name. Thresholds quote golden/tolerances.json, key "suggested".
"""

import hashlib
import json
import os
import posixpath
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# 01_model and 02_ttt_forward, values: "max|x-ref| <= 2e-5 * max|ref| per tensor"
VALUES_REL = 2e-5
# 01_model and 02_ttt_forward, gradients: "max|x-ref| <= 1e-4 * max|ref| per tensor"
GRADIENTS_REL = 1e-4
# 02_ttt_forward, after_optimizer_step: "max|x-ref| <= 1e-6 for at least 99.9% of the elements; the rest may
# differ by 2*lr (sign of a gradient close to zero)"
STEP_ABS = 1e-6
STEP_FRACTION = 0.999
# 08_hessians: "max|x-ref| <= 1e-5 * max|ref| per matrix"
HESSIANS_REL = 1e-5


def outside_folder(variable: str, default: str) -> Path:
    """Folder named by an environment variable, whether it is there or not."""
    return Path(os.environ.get(variable, ROOT / default)).resolve()


def golden_folder() -> Path:
    """Folder of the golden vectors."""
    return outside_folder("GOLDEN_DIR", "../shared/golden")


class Stored(dict):
    """Part of a golden file: reading a key that it lacks skips the test by name."""

    def __init__(self, file: str, items: dict) -> None:
        super().__init__(items)
        self.file = file

    def __missing__(self, key: str) -> None:
        pytest.skip(f"{self.file} has no {key!r}")


def read_golden(folder: Path, path: str):
    """What a golden file holds: JSON, a list of JSON lines, or tensors by name."""
    if not (folder / path).is_file():
        pytest.skip(f"{path} is not in {folder}")
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return Stored(path, load_file(folder / path))
    text, part = (folder / path).read_text(encoding="utf-8"), lambda items: Stored(path, items)
    if path.endswith(".jsonl"):
        return [json.loads(line, object_hook=part) for line in text.splitlines()]
    return json.loads(text, object_hook=part)


def cases(path: str, find: Callable[..., Iterable] = list, what: str = "cases") -> list:
    """Parameters of a test: what `find` gives of a golden file, or one placeholder that is skipped by name.

    Without the folder the fixtures decide: they skip, in CI they fail.
    """
    folder = golden_folder()
    try:
        return list(find(read_golden(folder, path))) or none_of(f"{path} has no {what}")
    except pytest.skip.Exception as missing:
        return none_of(missing.msg) if folder.is_dir() else [None]


def paths(pattern: str, without: str = "") -> list[str]:
    """The golden files that a pattern names, but for the name `without`."""
    folder = golden_folder()
    found = sorted(path for path in folder.glob(pattern) if path.name != without)
    return [path.relative_to(folder).as_posix() for path in found]


def files(pattern: str, without: str = "") -> list:
    """Parameters of a test: the golden files that a pattern names, as `cases` gives cases."""
    folder = golden_folder()
    missing = none_of(f"no {pattern} in {folder}") if folder.is_dir() else [None]
    return paths(pattern, without) or missing


def none_of(reason: str) -> list:
    """The placeholder of a test without cases."""
    return [pytest.param(None, id="none", marks=pytest.mark.skip(reason=reason))]


def some(found, what: str):
    """The cases found, of which there must be one: a loop over none would pass and say nothing."""
    if not found:
        pytest.skip(f"no {what} in {golden_folder()}")
    return found


def tokenizer_model(folder: Path, meta: dict) -> Path:
    """The published tokenizer that 10_caseops/meta.json was made with."""
    wanted = meta["tokenizer"]["sha256"]
    for path in folder.glob("*.model"):
        if hashlib.sha256(path.read_bytes()).hexdigest() == wanted:
            return path
    pytest.skip(f"no tokenizer in {folder} has the SHA-256 of 10_caseops/meta.json, {wanted}")


def beside(path: str, reference: str) -> str:
    """Path below the golden folder of what a golden file refers to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), reference))


def shard_folder(golden_file) -> Path:
    """The folder of all shards that section 6 lists."""
    path = "06_data/shards.json"
    listed = [*golden_file(path)["train"], *golden_file(path)["val"]]
    for name in (shard[kind] for shard in listed for kind in ("file", "sidecar") if kind in shard):
        if not (golden_folder() / beside(path, name)).is_file():
            pytest.skip(f"{beside(path, name)} is not in {golden_folder()}")
    return golden_folder() / "06_data" / "shards"


def tiny_config(tg, **settings):
    """Config of an ungated, unlooped model for vectors that come without one; `settings` win."""
    off = ("smear_gate_enabled", "sparse_attn_gate_enabled", "attn_out_gate_enabled", "gated_attn_enabled")
    sizes = {"vocab_size": 32, "num_layers": 2, "model_dim": 16, "num_heads": 4, "num_kv_heads": 2}
    plain = {"rope_dims": 4, "mlp_mult": 2.0, "num_loops": 0, "parallel_start_layer": 0}
    return tg.Config(**{**dict.fromkeys(off, False), **sizes, **plain, **settings})


def model_config(tg, golden_config: dict, **overrides):
    """`tg.Config` from a golden `config` object; `overrides` win. A key that is no field fails loudly."""
    return tg.Config(**{**golden_config, **overrides})


def run_through(kind: type, *arguments: object, **options: object):
    """Meter of a whole evaluation."""
    return kind(*arguments, **options).run()


def score_standard(tg, score, val, row_tokens: int, max_doc_len: int, ranks=None, plain: bool = False):
    """Meter of the standard evaluation with another `score` than that of a model."""
    sizes = {"val_batch_tokens": 8 * row_tokens, "eval_seq_len": max_doc_len, "plain_windows": plain}
    worker = tg.StandardEvaluation(None, val, SimpleNamespace(**sizes), looping=False, ranks=ranks or tg.CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tg, "model_score", lambda *_, **__: score)
        return worker.run()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, rel: float) -> None:
    """Same shape and max|actual - expected| <= rel * max|expected| (zeros must be met exactly)."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    difference = (actual.detach().double() - expected.double()).abs()
    if difference.numel() == 0:
        return
    worst, bound = difference.max().item(), rel * expected.double().abs().max().item()
    at = [int(i) for i in torch.unravel_index(difference.argmax(), expected.shape)]
    assert worst <= bound, f"max|x-ref| = {worst:.3e} at {at}, allowed {bound:.3e} (rel {rel:g})"


def digest(tensor: torch.Tensor) -> dict:
    """Golden digest `{shape, sum, l2, absmax}`, accumulated in float64."""
    values = tensor.detach().double()
    absmax = values.abs().max().item() if values.numel() else 0.0
    return {
        "shape": list(values.shape),
        "sum": values.sum().item(),
        "l2": values.square().sum().sqrt().item(),
        "absmax": absmax,
    }


def assert_digest(tensor: torch.Tensor, expected: dict, rel: float) -> None:
    """Compares with a stored digest as an error of relative l2 size `rel` would allow.

    |x - ref|_2 <= rel * |ref|_2 bounds the l2 norms by rel * l2 and, by Cauchy-Schwarz, the sums by
    rel * sqrt(n) * l2: sums of many cancelling terms have no relative accuracy of their own.
    """
    actual = digest(tensor)
    assert actual["shape"] == list(expected["shape"]), f"shape {actual['shape']} != {expected['shape']}"
    bounds = {
        "sum": rel * tensor.numel() ** 0.5 * expected["l2"],
        "l2": rel * expected["l2"],
        "absmax": rel * expected["absmax"],
    }
    for key, bound in bounds.items():
        error = abs(actual[key] - expected[key])
        assert error <= bound, f"{key} {actual[key]!r}, expected {expected[key]!r} within {bound:.3e}"
