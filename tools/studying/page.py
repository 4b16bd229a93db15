"""What a study says: its JSON as a table and a forest plot."""

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from studying.arms import CONTROL, OTHER_BATCHES
from studying.differences import Difference, paired, summarised

STAGES = {"prequant": "trained", "quantised": "quantised", "ttt": "adapted"}
AT_SECONDS = " at equal seconds"  # of an arm's name: trained as long as the control, not as many steps
EQUAL_SECONDS = 0.01  # arms whose seconds differ by less are at equal seconds already
EQUAL_BYTES = 0.005  # artifacts that differ by more are said


class Row(NamedTuple):
    """An arm against the control."""

    name: str
    source: str
    final: Difference
    percent: Difference
    stages: Mapping[str, Difference]
    seconds: Difference | None  # ratio of the training's seconds
    size: float | None  # mean bytes of the artifact
    unequal: bool  # it differs from the control's

    @property
    def verdict(self) -> str:
        """What the interval of the final difference says."""
        if self.final.half is None:
            return "one pair"
        return "better" if self.final.below_zero else "worse" if self.final.above_zero else "not told apart"


def rows(study: Mapping) -> list[Row]:
    """All arms that share a seed with the control, in their order."""
    arms = {arm["name"]: arm for arm in study["arms"]}
    control = arms[CONTROL]["runs"]
    found = [_row(arm, control) for name, arm in arms.items() if name != CONTROL]
    return [row for row in found if row]


def _row(arm: Mapping, control: Mapping) -> Row | None:
    runs = {seed: run for seed, run in arm["runs"].items() if seed in control}
    if not runs:
        return None
    finals = {seed: run["val_bpb"] for seed, run in runs.items()}
    base = {seed: control[seed]["val_bpb"] for seed in runs}
    percents = [100 * (finals[seed] / base[seed] - 1) for seed in runs]
    stages = {}
    for stage in STAGES:
        both = [s for s, run in runs.items() if stage in run["stages"] and stage in control[s]["stages"]]
        if both:
            values = ({s: of[s]["stages"][stage] for s in both} for of in (runs, control))
            stages[stage] = paired(*values)
    timed = [s for s, run in runs.items() if run["seconds"] and control[s]["seconds"]]
    seconds = summarised([runs[s]["seconds"] / control[s]["seconds"] for s in timed])
    sizes, ours = ([of[s]["artifact_bytes"] for s in runs] for of in (runs, control))
    size = sum(sizes) / len(sizes) if all(sizes) else None
    unequal = bool(size and all(ours) and abs(sum(sizes) / sum(ours) - 1) > EQUAL_BYTES)
    final = paired(finals, base)
    return Row(arm["name"], arm["source"], final, summarised(percents), stages, seconds, size, unequal)


def shown(difference: Difference | None, digits: int = 4, sign: str = "+") -> str:
    """Mean and half the interval."""
    if difference is None:
        return ""
    half = "" if difference.half is None else f" ± {difference.half:.{digits}f}"
    return f"{difference.mean:{sign}.{digits}f}{half}"


def table(study: Mapping) -> str:
    """The study in Markdown."""
    found = rows(study)
    stages = [stage for stage in STAGES if any(stage in row.stages for row in found)]
    heads = ["idea", "source", "val_bpb, less the control's", "in %", "pairs", "verdict"]
    heads += [STAGES[stage] for stage in stages] if len(stages) > 1 else []
    heads += ["training seconds / control's", "bytes"]
    grid = [heads]
    for row in found:
        cells = [row.name, row.source, shown(row.final), shown(row.percent, 2), str(row.final.pairs)]
        cells.append(row.verdict)
        cells += [shown(row.stages.get(stage)) for stage in stages] if len(stages) > 1 else []
        size = "" if row.size is None else f"{row.size:,.0f}{' (not equal)' * row.unequal}"
        grid.append([*cells, shown(row.seconds, 2, ""), size])
    told = [any(column) for column in zip(*grid[1:], strict=True)]  # what is told of no arm has no column
    lines = ["| " + " | ".join(itertools.compress(cells, told)) + " |" for cells in grid]
    lines.insert(1, "|" + "---|" * sum(told))
    return "\n".join(lines) + f"\n\n{_legend(study, found)}\n"


def summary(studies: Sequence[Mapping], kept: Mapping[str, str]) -> str:
    """The README's table: every idea of the studies in one line, and whether it is kept; the rest is not."""
    lines = [
        "| idea | source | val_bpb, less the control's | in % | pairs | study | kept |",
        "|" + "---|" * 7,
    ]
    for study in studies:
        for row in rows(study):
            if row.name.removesuffix(AT_SECONDS) in kept:
                told = [row.name, row.source, shown(row.final), shown(row.percent, 2), str(row.final.pairs)]
                told += [study["study"], kept[row.name.removesuffix(AT_SECONDS)]]
                lines.append("| " + " | ".join(told) + " |")
    return "\n".join(lines) + "\n"


def _legend(study: Mapping, found: Sequence[Row]) -> str:
    control = next(arm for arm in study["arms"] if arm["name"] == CONTROL)["runs"]
    scores = summarised([run["val_bpb"] for run in control.values()])
    sizes = [run["artifact_bytes"] for run in control.values() if run["artifact_bytes"]]
    lines = [
        f"Mean of paired differences ± half the 95 % t interval; a pair has the same weights and batches. "
        f"Control: val_bpb {shown(scores, 4, '')} over {len(control)} seeds"
        + (f", {sum(sizes) / len(sizes):,.0f} bytes" if sizes else "")
        + f"; {study['steps']} steps of {study['batch_tokens']:,} tokens; {study['seconds_are']}.",
        f"Scored on {study['scored_on']}.",
    ]
    chance = next((row.final for row in found if row.name == OTHER_BATCHES), None)
    if chance and chance.sd is not None:
        lines.append(
            f"Two identical arms with different batches differ by a standard deviation of {chance.sd:.4f}."
        )
    return "\n".join(lines)


def forest(study: Mapping) -> bytes:
    """A PNG: each arm's difference with its interval, the control at zero. Raises ImportError."""
    from matplotlib.figure import Figure

    found = rows(study)
    figure = Figure(figsize=(7.5, 1.4 + 0.34 * len(found)), layout="constrained")
    panel = figure.subplots()
    colours = {"better": "#15803d", "worse": "#c2410c"}
    for place, row in enumerate(found):
        colour = colours.get(row.verdict, "#7a8699")
        half = row.percent.half or 0.0
        panel.errorbar(row.percent.mean, place, xerr=half, fmt="o", color=colour, capsize=3)
    panel.axvline(0, color="#7a8699", linewidth=0.8)
    panel.set_yticks(range(len(found)), [f"{row.name} ({row.final.pairs})" for row in found])
    panel.invert_yaxis()
    panel.set(xlabel="val_bpb, % of the control's, with 95 % t interval (pairs)", title=study["study"])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
