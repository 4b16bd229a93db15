"""Comparison helpers of the golden tests. Thresholds quote golden/tolerances.json, key "suggested"."""

from types import SimpleNamespace

import torch

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
    worker.score = score
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
