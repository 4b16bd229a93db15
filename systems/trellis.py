"""Trellis-coded quantisation (QUANTIZER=trellis): the rows of a column are rounded together.

The levels, at half of the usual distance, belong to four subsets by their remainder modulo 4. A state of 3
bits runs down the rows of a column: it allows the even or the odd levels, and the level that is taken tells
the next state. So a level costs as many bits as one at twice the distance, and the path through the states is
chosen for the least squared error (Viterbi): 8 states take back 1.0 of the 1.53 dB that rounding each weight
by itself wastes (Marcellin and Fischer, IEEE Trans. Comm. 38, 1990; for networks ISO/IEC 15938-17).
"""

import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from systems.ans import SEGMENT
from train_gpt import (
    COUNTED,
    SMALLEST_HALF,
    HessianFactor,
    QuantizedTensor,
    Scheme,
    gptq_columns,
    gptq_report,
    row_scales,
)

LARGEST = 252  # targets are cut to it, levels reach two further: half of one is within int8


def branch_subsets(device: torch.device | None = None) -> Tensor:
    """Subset of the branches into state d: from state d // 2 and from d // 2 + 4, int64 [16]."""
    after = torch.arange(8, device=device)
    before = torch.cat([after // 2, after // 2 + 4])
    return 2 * ((after.repeat(2) ^ before >> 1 ^ before >> 2) & 1) + (before & 1)


def round_by_trellis(targets: Tensor, lengths: Tensor) -> Tensor:
    """The levels on the best path, float32 [rows, lanes].

    Args:
        targets: [rows, lanes], in distances of levels; each lane begins at state 0.
        lengths: the rows of each lane that count, int64 [lanes].
    """
    rows, lanes = targets.shape
    subsets = torch.arange(4.0, device=targets.device).view(1, 4, 1)
    nearest = ((targets.clamp(-LARGEST, LARGEST)[:, None] - subsets) / 4).round_().mul_(4).add_(subsets)
    errors = (targets[:, None] - nearest).square_()
    if int(lengths.min()) < rows:
        errors *= (torch.arange(rows, device=targets.device)[:, None] < lengths)[:, None]
    into = branch_subsets(targets.device)
    branches = errors[:, into].view(rows, 2, 4, 2, lanes)
    # The least error of a path into each state. Only the sums of two branches and their minimum have to wait
    # for the row before; which branch it was, and the way back, are found for all rows afterwards.
    costs = targets.new_full((rows + 1, 8, lanes), math.inf)
    costs[0, 0] = 0
    before, after = costs.view(rows + 1, 2, 4, 1, lanes), costs.view(rows + 1, 4, 2, lanes)
    sums = torch.empty_like(branches[0])
    for branch, old, new in zip(branches.unbind(), before[:-1].unbind(), after[1:].unbind(), strict=True):
        torch.add(branch, old, out=sums)
        torch.minimum(sums[0], sums[1], out=new)
    branches += before[:-1]
    upper = (branches[:, 1] < branches[:, 0]).view(rows, 8, lanes)
    origins = torch.arange(8, device=targets.device).view(1, 8, 1) // 2 + 4 * upper
    path = torch.empty(rows + 1, 1, lanes, dtype=torch.int64, device=targets.device)
    path[rows, 0] = costs[rows].argmin(0)
    for origin, old, new in zip(
        reversed(origins.unbind()), reversed(path[:-1].unbind()), reversed(path[1:].unbind()), strict=True
    ):
        torch.gather(origin, 0, new, out=old)
    taken = into[path[:-1] // 4 * 8 + path[1:]]
    return nearest.gather(1, taken)[:, 0]


def round_columns(columns: Sequence[Tensor]) -> list[Tensor]:
    """Levels of columns of any length, each cut into segments of SEGMENT rows."""
    segments = [segment for column in columns for segment in column.split(SEGMENT)]
    targets = torch.nn.utils.rnn.pad_sequence(segments)
    lengths = torch.tensor([len(segment) for segment in segments], device=targets.device)
    levels = round_by_trellis(targets, lengths).unbind(1)
    levels = torch.cat([lane[: len(segment)] for lane, segment in zip(levels, segments, strict=True)])
    return levels.split([len(column) for column in columns])


def run_together(
    sweeps: Sequence[Generator], round_columns: Callable[[list[Tensor]], Iterable[Tensor]]
) -> list[tuple[Tensor, float]]:
    """What some `gptq_columns` return, whose columns are rounded at the same time."""
    columns, results = {i: next(sweep) for i, sweep in enumerate(sweeps)}, {}
    while columns:
        for i, levels in zip(list(columns), round_columns([*columns.values()]), strict=True):
            try:
                columns[i] = sweeps[i].send(levels)
            except StopIteration as end:
                results[i] = end.value
                del columns[i]
    return [results[i] for i in range(len(sweeps))]


def gptq_by_trellis(
    problems: Sequence[tuple[Tensor, HessianFactor, Tensor]],
) -> list[tuple[Tensor, Tensor, float]]:
    """GPTQ of matrices at once: weight, factor, row scales -> int16 levels, float16 scales, error of each."""
    scales = [scale.clamp_min(SMALLEST_HALF).half() for *_, scale in problems]
    sweeps = [gptq_columns(w, factor, s.float()) for (w, factor, _), s in zip(problems, scales, strict=True)]
    results = run_together(sweeps, round_columns)
    return [(levels, scale, error) for (levels, error), scale in zip(results, scales, strict=True)]


def quantize_matrices(
    matrices: Mapping[str, tuple[Tensor, Scheme, HessianFactor]],
) -> dict[str, QuantizedTensor]:
    """Store matrices as `quantize_tensor` does, by trellis: at half the distance, as many bits."""
    started, records = time.perf_counter(), {}
    problems = [
        (weight, factor, row_scales(weight, scheme) / 2) for weight, scheme, factor in matrices.values()
    ]
    for (name, (weight, scheme, factor)), (levels, scale, error) in zip(
        matrices.items(), gptq_by_trellis(problems), strict=True
    ):
        arrays = {"q": levels, "scale": scale}
        records[name] = QuantizedTensor("trellis", 8, tuple(weight.shape), arrays)
        if not COUNTED:
            records[name].report = gptq_report(scheme, factor, error, started)
    return records
