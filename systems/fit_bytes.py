"""Quantisation to a given size (FIT_BYTES).

Rate and distortion: a step of s (in row standard deviations) costs a matrix s^2 of loss, and -log2 s bits per
weight. The least loss at given bytes is where each weight costs the same loss. That leaves one factor on all
steps to be found, by coding the model. The same holds for the columns of a matrix.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from train_gpt import (
    COUNTED,
    CPU,
    GPT,
    Config,
    ConfigError,
    HessianFactor,
    QuantizedTensor,
    Ranks,
    Run,
    Scheme,
    ShuffledLoader,
    factorise_all,
    flatten_banks,
    gather_by_name,
    gptq,
    gptq_report,
    pack_artifact,
    quantize_tensor,
    scheme_of,
    tensors_of_rank,
)

Store = Callable[..., dict[str, QuantizedTensor]]
FIT_SAMPLES, FIT_ROWS = 32, 8  # gradients; training windows behind each
FIT_SLACK, FIT_TRIALS = 2000, 16  # bytes that may be left; trials at most
FIT_REACH, FIT_RANGE = 8, 96.0  # octaves: of steps that all give the same size, so none gives another; of all
FIT_BITS, FIT_TOP = 8, 127
FIT_SCALES, FIT_CONTROLS = 4, 8  # bits of mantissa: GPTQ makes good a rounded scale, nothing a rounded gate


def texts_of_rank(
    loader: ShuffledLoader, count: int, rows: int, ranks: Ranks
) -> Iterator[tuple[int, Tensor]]:
    """Number and ids [rows, T] of each of this rank's texts, of `count`: all draw all, as in `calibrate`."""
    for number in range(count):
        if number % ranks.world_size == ranks.rank:
            yield number, loader.next(rows)[0].to(ranks.device)
        else:
            loader.draw(rows)


def calibrate_gradients(
    model: GPT, cfg: Config, loader: ShuffledLoader, *, looping: bool, ranks: Ranks = CPU
) -> dict[str, Tensor]:
    """Squared norm of each row's gradient of the summed loss, float32 [rows], for every matrix; a mean.

    Targets are drawn from the model's own predictions: then gradients of different tokens do not correlate,
    and the expectation is the sum over tokens of g^2 |x|^2, g the derivative by the row's output. That is the
    curvature of the loss (Fisher); with the targets of the data, the slope that is left in the loss would be
    in it. `loader` is that of a single rank, as in `calibrate`; a sample's draws are the same on every rank.
    """
    generator = torch.Generator(ranks.device)
    state = flatten_banks(dict(model.named_parameters()), cfg.num_layers)
    sums = {
        name: torch.zeros(len(w), dtype=torch.float64, device=w.device)
        for name, w in state.items()
        if w.ndim == 2
    }
    for sample, x in texts_of_rank(loader, FIT_SAMPLES, FIT_ROWS, ranks):
        with ranks.autocast():
            hidden = model.hidden(x, looping=looping)
            logits = model.logits(hidden).float().flatten(0, 1)
        drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=generator.manual_seed(sample))
        F.cross_entropy(logits, drawn[:, 0], reduction="sum").backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for name, gradient in flatten_banks(gradients, cfg.num_layers).items():
            if name in sums:
                sums[name] += gradient.float().square().sum(1)
        model.zero_grad(set_to_none=True)
    ranks.wait_for_all("calibrate")
    return {name: (ranks.sum_(total) / FIT_SAMPLES).float() for name, total in sums.items()}


def short_half(x: Tensor, mantissa: int) -> Tensor:
    """x in float16, rounded to so many bits of mantissa: the others are zeros, which compress to nothing."""
    drop = 10 - mantissa
    bits = x.half().view(torch.int16)
    return ((bits + (1 << drop >> 1)) >> drop << drop).view(torch.float16) if drop else x.half()


def column_scales(factor: HessianFactor) -> Tensor:
    """Steps of the columns relative to each other, float32 [columns]: finer where an error costs more.

    A step s costs s^2 / 12 U_jj^2 in column j, so that equal costs would need s ~ U_jj. Measured, its root
    does better: Hessians are estimates, and coarse columns lose their small weights.
    """
    pivots = factor.upper.diagonal().log()
    scales = torch.empty_like(pivots)
    scales[factor.order] = ((pivots - pivots.mean()) / 2).exp()
    return short_half(scales.clamp(2.0**-8, 2.0**8), FIT_SCALES).float()


def fit_clips(
    flat: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    factors: Mapping[str, HessianFactor],
    gradients: Mapping[str, Tensor],
) -> dict[str, float]:
    """Clip width of each matrix at which a weight costs one unit of loss (units are left to the caller).

    A uniform error of step s in column j of row i costs g_i^2 s^2 / 12 U_jj^2 (an identity of GPTQ).
    """
    losses = {}
    for name, factor in factors.items():
        columns, free = column_scales(factor), min(1, flat[name].size(1) - 1)  # a single column has no spread
        inputs = hessians[name].diagonal().sum().clamp_min(1e-30)
        rows = (gradients[name] / inputs * (flat[name].float() / columns).var(1, correction=free)).mean()
        losses[name] = float(rows * (columns[factor.order] / factor.upper.diagonal()).square().mean())
    floor = max(losses.values()) * 1e-9 or 1.0
    return {name: max(loss, floor) ** -0.5 for name, loss in losses.items()}


class FitProblem(NamedTuple):
    """A matrix that is to be stored, its Hessian [columns, columns], its factor and `column_scales`."""

    original: Tensor
    hessian: Tensor
    factor: HessianFactor
    columns: Tensor

    def scaled(self, clip_sigmas: float, largest: int) -> tuple[Tensor, HessianFactor, Tensor]:
        """The same problem in units of the columns' scales, at steps so coarse as the clip width says.

        No weight is clipped; `largest` is the largest level.
        """
        weight = self.original.float() / self.columns
        factor = self.factor._replace(upper=self.factor.upper / self.columns[self.factor.order])
        least = weight.abs().amax(1) / largest * (1 + 2.0**-FIT_SCALES)  # rounded, it is still enough
        spread = weight.std(dim=1, correction=min(1, weight.size(1) - 1))
        scale = (clip_sigmas * spread / FIT_TOP).maximum(least)
        return weight, factor, short_half(scale.clamp(2.0**-14, 2.0**15), FIT_SCALES)

    def refit_columns(self, restored: Tensor) -> tuple[Tensor, float]:
        """Column scales of least error for the levels that were chosen, and what they change of tr(E H E^T).

        The old ones where rounding takes all of that back. The error is quadratic in the scales (a normal
        equation); `restored` is the weight as it is stored with the old ones.
        """
        hessian = self.hessian + torch.diag(self.factor.dead.float())  # damped as `factorise` did
        hessian.diagonal().add_(self.factor.damping * hessian.diagonal().mean())
        curvature = ((restored.t() @ restored) * hessian).double()
        slope = (((self.original.float() - restored) @ hessian) * restored).sum(0).double()
        curvature.diagonal().add_(1e-6 * curvature.diagonal().mean() + 1e-30)
        change = torch.linalg.solve(curvature, slope)
        fitted = short_half((self.columns * (1 + change)).clamp(2.0**-8, 2.0**8).float(), FIT_SCALES).float()
        change = (fitted / self.columns - 1).double()
        error = float(change @ (curvature @ change) - 2 * slope @ change)
        return (fitted, error) if error < 0 else (self.columns, 0.0)


def fit_matrices(
    problems: Mapping[str, FitProblem], clips: Mapping[str, float], quantizer: str
) -> dict[str, QuantizedTensor]:
    """Store matrices with column scales, at the steps that the clip widths tell, by QUANTIZER."""
    started, trellis = time.perf_counter(), quantizer == "trellis"
    scaled = [problem.scaled(clips[name], FIT_TOP << trellis) for name, problem in problems.items()]
    if trellis:
        from systems.trellis import gptq_by_trellis

        solved = gptq_by_trellis(scaled)
    else:
        solved = [gptq(weight, factor, FIT_BITS, scale) for weight, factor, scale in scaled]
    records = {}
    for (name, problem), (levels, scale, error) in zip(problems.items(), solved, strict=True):
        arrays = {"q": levels, "scale": scale, "columns": problem.columns.half()}
        kind, shape = "trellis" if trellis else "gptq", tuple(problem.original.shape)
        record = records[name] = QuantizedTensor(kind, FIT_BITS, shape, arrays, ("columns", 0, 0))
        columns, change = problem.refit_columns(record.dequantize())
        record.arrays = {key: array.cpu() for key, array in (arrays | {"columns": columns.half()}).items()}
        if not COUNTED:
            scheme = Scheme("gptq", FIT_BITS, clips[name])
            record.report = gptq_report(scheme, problem.factor, error + change, started)
    return records


def search_step(
    measure: Callable[[float], int], log2_step: float, bytes_per_octave: float
) -> Iterator[tuple[float, int]]:
    """Look for the step at which 0 to FIT_SLACK bytes are spare; yields each trial (log2_step, spare_bytes).

    `measure` says how many bytes are spare at a step: the coarser the step, the more. A trial aims at half
    the slack by the slope between the last two, or lies midway between the bounds where that leads beyond.
    Where the size stays the same, the next one lies far away, and is the last if even that changes nothing.
    """
    too_fine, fits, slope, last = -FIT_RANGE, FIT_RANGE, bytes_per_octave, None
    log2_step = min(max(log2_step, too_fine), fits)
    for _ in range(FIT_TRIALS):
        spare_bytes = measure(log2_step)
        yield log2_step, spare_bytes
        if spare_bytes > 0:
            fits = log2_step
        else:
            too_fine = log2_step
        if 0 <= spare_bytes <= FIT_SLACK or too_fine >= fits:
            return
        aim = (spare_bytes - FIT_SLACK / 2) / slope
        if last:
            run, rise = log2_step - last[0], spare_bytes - last[1]
            if not rise and abs(run) >= FIT_REACH and FIT_RANGE in (fits, -too_fine):
                return
            slope = rise / run if abs(rise) > abs(run) * bytes_per_octave / 10 else slope
            aim = (spare_bytes - FIT_SLACK / 2) / slope if rise else math.copysign(FIT_REACH, spare_bytes)
        last = log2_step, spare_bytes
        log2_step -= aim
        if not too_fine < log2_step < fits:
            log2_step = (too_fine + fits) / 2


class FitSearch:
    """Stores a state dict so that its artifact has at most `budget` bytes, and if it can FIT_SLACK less."""

    def __init__(
        self,
        flat: Mapping[str, Tensor],
        hessians: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        cfg: Config,
        budget: int,
        ranks: Ranks = CPU,
        looping: bool = True,
    ):
        self.flat, self.cfg, self.budget, self.ranks, self.looping = flat, cfg, budget, ranks, looping
        self.schemes = {name: scheme_of(name, tensor, cfg) for name, tensor in flat.items()}
        self.matrices = {name: w for name, w in flat.items() if self.schemes[name].kind == "gptq"}
        if not cfg.tie_embeddings:  # as in `quantize_state`
            width, device = flat["tok_emb.weight"].size(1), flat["tok_emb.weight"].device
            hessians = {"tok_emb.weight": torch.eye(width, device=device), **hessians}
        self.num_weights = sum(w.numel() for w in self.matrices.values())
        hessians = {name: hessians[name] for name in self.matrices}
        factors = factorise_all(hessians)
        self.clips = fit_clips(flat, hessians, factors, gradients)
        self.problems = {
            name: FitProblem(w, hessians[name], factors[name], column_scales(factors[name]))
            for name, w in self.matrices.items()
        }
        self.store_in_order: Store | None = None  # `LayersInOrder.store`
        self.best: tuple[int, float, dict[str, QuantizedTensor]] | None = None  # spare bytes, step, tensors

    def trials(self) -> Iterator[tuple[float, int]]:
        """Search for the step; yields log2 of the factor on all clip widths, and the bytes that it spares."""
        bits = sum(w.numel() * math.log2(525 / self.clips[name]) for name, w in self.matrices.items())
        start = bits / self.num_weights  # 525 = 127 sqrt(2 pi e), by a Gaussian's entropy
        start -= 8 * self.budget / self.num_weights
        start -= self.cfg.quantizer == "trellis"  # whose levels are at half the distance for as many bits
        return self._search(start)

    def trials_in_order(self, store: Store) -> Iterator[tuple[float, int]]:
        """Search on from the step that was found, with `LayersInOrder.store`, which corrects the layers."""
        plain, self.store_in_order, self.best = self.best, store, None
        yield from self._search(plain[1])
        self.best = self.best or plain

    def _search(self, log2_step: float) -> Iterator[tuple[float, int]]:
        return search_step(self._measure, log2_step, self.num_weights / 8)

    def best_records(self) -> dict[str, QuantizedTensor]:
        """The stored tensors of the trial that spared the fewest bytes. Raises ConfigError if none fitted."""
        if self.best is None:
            left = f"leaves {self.budget} bytes for the model, too few"
            raise ConfigError(f"FIT_BYTES={self.cfg.fit_bytes}: {left}")
        return self.best[2]

    def _measure(self, log2_step: float) -> int:
        """Spare bytes at a step."""
        records = self._stored({name: 2.0**log2_step * clip for name, clip in self.clips.items()})
        size = len(pack_artifact(records, self.cfg, self.looping)) if self.ranks.is_main else 0
        self.ranks.wait_for_all("fit")
        spare_bytes = self.budget - self.ranks.gather(size)[0]
        if spare_bytes >= 0 and (self.best is None or spare_bytes < self.best[0]):
            self.best = spare_bytes, log2_step, records
        return spare_bytes

    def _stored(self, clips: Mapping[str, float]) -> dict[str, QuantizedTensor]:
        """All tensors, at the clip widths of the matrices; on every rank."""
        if self.cfg.gptq_drift_batches and self.store_in_order:
            others = {name: self._store(name) for name in self.flat if name not in self.problems}
            records = self.store_in_order(others, self.problems, clips)
            return {name: records[name] for name in self.flat}
        mine = tensors_of_rank(self.flat, self.ranks)
        problems = {name: self.problems[name] for name in mine if name in self.problems}
        records = fit_matrices(problems, clips, self.cfg.quantizer)
        records |= {name: self._store(name) for name in mine if name not in problems}
        return gather_by_name(records, self.flat, self.ranks)

    def _store(self, name: str) -> QuantizedTensor:
        """A tensor that is no matrix of weights."""
        record = quantize_tensor(self.flat[name], self.schemes[name], None, self.cfg)
        if record.kind == "fp16":
            record.arrays = {"": short_half(self.flat[name], FIT_CONTROLS)}
        record.arrays = {key: array.cpu() for key, array in record.arrays.items()}
        return record


def fit_run(
    run: Run, flat: Mapping[str, Tensor], hessians: Mapping[str, Tensor], loader: ShuffledLoader
) -> dict[str, QuantizedTensor]:
    """The stored tensors of a run whose artifact and code have at most FIT_BYTES; the trials are logged."""
    cfg, ranks = run.cfg, run.ranks
    options = {"looping": run.looping, "ranks": ranks}
    with run.clock.stage("calibrate"):
        gradients = calibrate_gradients(run.model, cfg, loader, **options)
    code = len(run.packed_code[0]) if ranks.is_main else 0
    budget = cfg.fit_bytes - ranks.gather(code)[0]
    search = FitSearch(flat, hessians, gradients, cfg, budget, ranks, run.looping)

    def follow(trials: Iterable[tuple[float, int]]) -> None:
        for trial, (log2_step, spare_bytes) in enumerate(trials):
            run.log.event("fit", trial=trial, clip_factor=2.0**log2_step, bytes_left=spare_bytes)

    follow(search.trials())
    if cfg.gptq_drift_batches and search.best:
        from systems.drift import LayersInOrder

        with run.clock.stage("calibrate"):  # it reads training text
            follow(search.trials_in_order(LayersInOrder(run.model, loader, **options).store))
    return search.best_records()
