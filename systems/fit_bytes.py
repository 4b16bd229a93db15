"""Quantisation to a given size (FIT_BYTES)."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from train_gpt import (
    CPU,
    GPT,
    Config,
    ConfigError,
    HessianFactor,
    QuantizedTensor,
    Ranks,
    RunLog,
    Scheme,
    ShuffledLoader,
    factorise,
    flatten_banks,
    pack_artifact,
    quantize_state,
    scheme,
    short_half,
)

# Rate and distortion: a step of s (in row standard deviations) costs a matrix s^2 of loss, and -log2 s bits
# per weight. The least loss at given bytes is where each weight costs the same loss, so one factor on all
# steps is left, and it is found by coding the model. The same holds for the columns of a matrix.

FIT_SAMPLES, FIT_ROWS = 32, 8  # gradients; training windows behind each
FIT_SLACK, FIT_TRIALS = 2000, 16  # bytes that may be left
FIT_SCALES, FIT_CONTROLS = 4, 8  # bits of mantissa: GPTQ makes good a rounded scale, nothing a rounded gate


def calibrate_gradients(
    model: GPT, cfg: Config, loader: ShuffledLoader, *, looping: bool, ranks: Ranks = CPU
) -> dict[str, Tensor]:
    """Squared norm of each row's gradient of the summed loss, float32 [rows], for every matrix; a mean.

    Targets are drawn from the model's own predictions: then gradients of different tokens do not correlate,
    and the expectation is the sum over tokens of g^2 |x|^2, g the derivative by the row's output. That is the
    curvature of the loss (Fisher); with the data's targets the slope that is left in the loss would be in it.
    `loader` is that of a single rank, as in `calibrate`; a sample's draws are the same on every rank.
    """
    generator = torch.Generator(ranks.device)
    state = flatten_banks(dict(model.named_parameters()), cfg.num_layers)
    sums = {name: torch.zeros(len(w), device=w.device) for name, w in state.items() if w.ndim == 2}
    for sample in range(FIT_SAMPLES):
        if sample % ranks.world_size != ranks.rank:
            loader.skip(FIT_ROWS)
            continue
        x, _ = loader.next(FIT_ROWS)
        with ranks.autocast():
            hidden = model.hidden(x.to(ranks.device), looping=looping)
            logits = model.logits(hidden).float().flatten(0, 1)
        drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=generator.manual_seed(sample))
        F.cross_entropy(logits, drawn[:, 0], reduction="sum").backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for name, gradient in flatten_banks(gradients, cfg.num_layers).items():
            if name in sums:
                sums[name] += gradient.float().square().sum(1)
        model.zero_grad(set_to_none=True)
    ranks.wait_for_all("calibrate")
    return {name: ranks.sum_(total) / FIT_SAMPLES for name, total in sums.items()}


def column_scales(factor: HessianFactor, mantissa: int) -> Tensor:
    """Steps of the columns relative to each other, float32 [columns]: finer where an error costs more.

    A step s costs s^2 / 12 U_jj^2 in column j, so that equal costs would need s ~ U_jj. Measured, its root
    does better: Hessians are estimates, and coarse columns lose their small weights.
    """
    pivots = factor.upper.diagonal().log()
    scales = torch.empty_like(pivots)
    scales[factor.order] = ((pivots - pivots.mean()) / 2).exp()
    return short_half(scales.clamp(2.0**-8, 2.0**8), mantissa).float()


def fit_clips(
    flat: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    factors: Mapping[str, HessianFactor],
    gradients: Mapping[str, Tensor],
) -> dict[str, float]:
    """Clip width of each matrix at which a weight costs one unit of loss (units are left to the caller).

    A uniform error of step s in column j of row i costs g_i^2 s^2 / 12 U_jj^2 (GPTQ's own identity).
    """
    losses = {}
    for name, (order, _, upper, _) in factors.items():
        columns = column_scales(factors[name], FIT_SCALES)
        inputs = hessians[name].diagonal().sum().clamp_min(1e-30)
        rows = (gradients[name] / inputs * (flat[name].float() / columns).var(1)).mean()
        losses[name] = float(rows * (columns[order] / upper.diagonal()).square().mean())
    floor = max(losses.values()) * 1e-9 or 1.0
    return {name: max(loss, floor) ** -0.5 for name, loss in losses.items()}


def fit_state(
    flat: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    cfg: Config,
    budget: int,
    log: "RunLog",
    ranks: Ranks = CPU,
) -> dict[str, QuantizedTensor]:
    """Store every tensor so that the artifact has at most `budget` bytes, if it can be at most 2,000 less.

    Raises ConfigError when no step is coarse enough.
    """
    schemes = {
        name: scheme(name, tensor, cfg)._replace(mantissa=FIT_CONTROLS) for name, tensor in flat.items()
    }
    matrices = {name: flat[name] for name, how in schemes.items() if how.kind == "gptq"}
    eye = {
        name: torch.eye(w.size(1), device=w.device) for name, w in matrices.items() if name not in hessians
    }
    hessians = {name: (hessians | eye)[name] for name in matrices}
    unique = {id(hessian): hessian for hessian in hessians.values()}
    unique = {key: factorise(hessian) for key, hessian in unique.items()}
    factors = {name: unique[id(hessian)] for name, hessian in hessians.items()}
    clips, weights = fit_clips(flat, hessians, factors, gradients), sum(w.numel() for w in matrices.values())
    bits = sum(w.numel() * math.log2(525 / clips[name]) for name, w in matrices.items()) / weights
    power, bounds = bits - 8 * budget / weights, [-math.inf, math.inf]  # 525 = 127 sqrt(2 pi e)
    slope, last, best = weights / 8, None, None
    for trial in range(FIT_TRIALS):
        for name in matrices:
            schemes[name] = Scheme("gptq", 8, 2.0**power * clips[name], FIT_SCALES)
        records = quantize_state(flat, factors, cfg, None, ranks, schemes)
        size = len(pack_artifact(records, cfg)) if ranks.is_main else 0
        ranks.wait_for_all("fit")
        left = budget - ranks.gather(size)[0]
        log.event("fit", trial=trial, clip_factor=2.0**power, bytes_left=left)
        if left >= 0 and (best is None or left < best[0]):
            best = left, records
        if 0 <= left <= FIT_SLACK:
            break
        bounds[left > 0] = power
        if last and abs(left - last[1]) > abs(power - last[0]) * weights / 80:  # as steep as it was found
            slope = (left - last[1]) / (power - last[0])
        last = power, left
        power -= (left - FIT_SLACK / 2) / slope
        if not bounds[0] < power < bounds[1]:
            power = sum(bounds) / 2
    if best is None:
        raise ConfigError(f"FIT_BYTES={cfg.fit_bytes}: leaves {budget} bytes for the model, too few")
    return best[1]
