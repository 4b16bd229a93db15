"""The pictures of a report: drawn once by matplotlib, as SVG for the page and PNG for everything else.

The colours drawn with are those of the light page; in the SVG each becomes a CSS variable, which the page
sets for light and dark.
"""

import contextlib
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from reporting.run import GROUPS, ROLES, Missing, Run
from runs import EVAL_LIMIT, SIZE_LIMIT, TRAIN_LIMIT

# CSS variable -> its colour on the light page and on the dark one.
COLOURS = {
    "ink": ("#1f2328", "#e6edf3"),
    "soft": ("#59636e", "#9198a1"),
    "line": ("#d1d9e0", "#3d444d"),
    "c1": ("#0969da", "#58a6ff"),
    "c2": ("#bc4c00", "#f0883e"),
    "c3": ("#1a7f37", "#3fb950"),
    "c4": ("#8250df", "#bc8cff"),
    "c5": ("#bf3989", "#f778ba"),
    "c6": ("#0e7490", "#39c5cf"),
    "c7": ("#9a6700", "#d29922"),
    "c8": ("#57606a", "#8b949e"),
}
SERIES = [light for name, (light, _) in COLOURS.items() if name.startswith("c")]
MARKS = "osD^vP*X"
INK, SOFT, LINE = (COLOURS[name][0] for name in ("ink", "soft", "line"))
WIDTH, HEIGHT = 5.0, 3.3  # inches, of 72 CSS pixels: read unscaled on a phone
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}


def new_figure(height: float = HEIGHT) -> tuple[Figure, Axes]:
    """An empty picture of one panel."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def drawn(draw: Callable[[], Figure]) -> tuple[str, bytes]:
    """SVG to put into a page, and PNG, of a picture."""
    with matplotlib.rc_context(STYLE):
        figure, png, svg = draw(), io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=150, facecolor="white")
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return themed(svg.getvalue()), png.getvalue()


def themed(svg: str) -> str:
    """matplotlib's SVG without prologue, metadata and fixed size, its colours as variables."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"(?s)<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", body)
    box = re.search(r'viewBox="[^"]*"', body)[0]
    body = re.sub(r"<svg[^>]*>", f'<svg {box} role="img">', body, count=1)
    body = re.sub(
        r' id="(figure|axes|patch|line2d|text|matplotlib\.axis|xtick|ytick|legend)[\w.]*"', "", body
    )
    variables = {light: f"var(--{name})" for name, (light, _) in COLOURS.items()}
    return re.sub(r"#[0-9a-f]{6}\b", lambda match: variables.get(match[0], match[0]), body)


def _colour(number: int) -> str:
    return SERIES[number % len(SERIES)]


def _legend(figure: Figure, runs: Sequence[Run]) -> None:
    """Which colour is which run, below the panel; names that are long have a line each."""
    if len(runs) > 1:
        columns = 1 if max(len(run.label) for run in runs) > 12 else 3
        figure.set_figheight(HEIGHT + 0.2 * math.ceil(len(runs) / columns))
        figure.legend(loc="outside lower center", ncols=columns)


def _thousands(value: float, _: object = None) -> str:
    return f"{value:,.0f}"


# -- curves

SMOOTHED = 60  # steps from which a curve of losses is also drawn smoothed


def curve(runs: Sequence[Run], key: str, against: str) -> Figure:
    """train_loss (with the validations while training) or lr_multiplier against steps or seconds."""
    figure, axes = new_figure()
    found, reason = False, ""
    for number, run in enumerate(runs):
        try:
            steps, seconds, values = run.curve(key)
        except Missing as missing:
            reason = str(missing)
            continue
        found = True
        places, colour = {"steps": steps, "seconds": seconds}[against], _colour(number)
        options = {"color": colour, "label": run.label, "marker": "." if len(steps) < 60 else None}
        if key == "train_loss" and len(values) >= SMOOTHED:
            axes.plot(places, values, color=colour, linewidth=0.6, alpha=0.45)
            values = smoothed(values)
        axes.plot(places, values, **options)
        if key == "train_loss":
            checks, record = run.validations(), run.record
            if record.steps and record.train_seconds:
                steps, seconds = [*steps, record.steps], [*seconds, record.train_seconds]
            at = [s if against == "steps" else np.interp(s, steps, seconds) for s, _ in checks]
            losses = [loss for _, loss in checks]
            axes.plot(at, losses, "D", color=colour, markerfacecolor="none", markersize=6)
    if not found:
        raise Missing(reason)
    if key == "train_loss":
        axes.set(title="training loss", ylim=later_losses(runs))
        axes.set_ylabel(f"nats per token (axis from {axes.get_ylim()[0]:.2f})")
    else:
        axes.set(title="learning rate", ylabel="share of its peak", ylim=(0, 1.05))
    axes.set_xlabel("step" if against == "steps" else "seconds of training")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _legend(figure, runs)
    return figure


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Means over a fortieth of all values, less at both ends."""
    window = np.ones(2 * (len(values) // 80) + 3)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def later_losses(runs: Sequence[Run]) -> tuple[float, float] | None:
    """Limits of the axis for what comes after the first five steps, whose losses are far above."""
    later, checks = [], [loss for run in runs for _, loss in run.validations()]
    for run in runs:
        with contextlib.suppress(Missing):
            steps, _, losses = run.curve("train_loss")
            later += [loss for step, loss in zip(steps, losses, strict=True) if step > 5] or losses[-1:]
    if not later:
        return None
    low, high = min(later + checks), max(later + checks)
    margin = 0.06 * (high - low) or 0.01
    return low - margin, high + margin


# -- stages


NAMES = {"prequant": "trained", "quantised": "quantised", "sliding": "sliding", "ttt": "TTT"}


def waterfall(run: Run) -> Figure:
    """val_bpb of the first stage, what each later one changed, and the last."""
    stages = run.waterfall()
    figure, axes = new_figure()
    values = [value for _, value in stages]
    spread = max(max(values) - min(values), 0.002 * max(values))
    floor = min(values) - 0.8 * spread
    ends = [("", stages[0][1])] + stages
    for place, ((_, before), (_, after)) in enumerate(zip(ends, stages, strict=False)):
        first = place == 0
        low, high = (floor, after) if first else sorted((before, after))
        colour = SERIES[7] if first else SERIES[2] if after <= before else SERIES[1]
        axes.bar(place, high - low, bottom=low, width=0.62, color=colour)
        text = f"{after:.4f}" if first else f"{after - before:+.4f}"
        axes.text(place, high + 0.03 * spread, text, ha="center", va="bottom", fontsize=10)
        if not first:
            axes.plot([place - 0.69, place - 0.31], [before, before], color=SOFT, linewidth=0.8)
    last = len(stages)
    if last > 1:
        axes.bar(last, values[-1] - floor, bottom=floor, width=0.62, color=SERIES[0])
        axes.text(
            last, values[-1] + 0.03 * spread, f"{values[-1]:.4f}", ha="center", va="bottom", fontsize=10
        )
        axes.plot([last - 0.69, last - 0.31], [values[-1]] * 2, color=SOFT, linewidth=0.8)
    labels = [NAMES.get(name, name.replace("_", " ")) for name, _ in stages]
    axes.set_xticks(
        range(len(labels) + (last > 1)), labels + ["final" if run.finished else "so far"] * (last > 1)
    )
    axes.set(title=f"{run.label}: val_bpb", ylim=(floor, max(values) + 0.25 * spread))
    axes.set_ylabel(f"bits per byte (axis from {floor:.2f})")
    axes.set_xlim(-0.6, max(last, 3) + 0.6)
    axes.grid(visible=False, axis="x")
    return figure


def stages(runs: Sequence[Run]) -> Figure:
    """val_bpb of several runs through the stages after training."""
    figure, axes = new_figure()
    names = [name for name in NAMES if any(name in run.record.stages for run in runs)]
    if not names:
        raise Missing("no run has come to the end of its training")
    for number, run in enumerate(runs):
        scores = run.record.stages
        places = [place for place, name in enumerate(names) if name in scores]
        values = [scores[names[place]]["val_bpb"] for place in places]
        look = {"color": _colour(number), "marker": MARKS[number % len(MARKS)], "label": run.label}
        axes.plot(places, values, **look)
    axes.set_xticks(range(len(names)), [NAMES[name] for name in names])
    axes.set(title="val_bpb", xlim=(-0.5, len(names) - 0.5))
    axes.set_ylabel(f"bits per byte (axis from {axes.get_ylim()[0]:.2f})")
    _legend(figure, runs)
    return figure


# -- seconds and bytes


def _bars(axes: Axes, rows: Sequence[tuple[str, Mapping[str, float]]], colours: Mapping[str, str]) -> None:
    """Stacked horizontal bars, the first row on top."""
    told = set()
    for place, (_, parts) in enumerate(rows):
        left = 0.0
        for name, width in parts.items():
            label = "" if name in told else name
            told.add(name)
            axes.barh(-place, width, left=left, height=0.55, color=colours[name], label=label)
            left += width
    axes.set_yticks([-place for place in range(len(rows))], [name for name, _ in rows])
    axes.set_ylim(-len(rows) + 0.4, 0.6)
    axes.grid(visible=False, axis="y")


def _limit(axes: Axes, most: float, limit: float, words: str) -> None:
    """A line at the limit, or words where it lies far outside."""
    if most > 0.25 * limit:
        axes.axvline(limit, color=SERIES[1], linestyle="--", linewidth=1.2)
        axes.set_xlim(0, 1.06 * max(most, limit))
        axes.set_xlabel(f"{words} (dashed: limit {limit:,.0f})", loc="right")
    else:
        axes.set_xlabel(f"{words} (limit {limit:,.0f}, far outside)", loc="right")


def clock(runs: Sequence[Run]) -> Figure:
    """Training with calibration, and the final evaluation, against their limits."""
    rows: list[tuple[str, dict[str, float]]] = []
    for run in runs:
        seconds, name = run.record.seconds, f"{run.label}\n" if len(runs) > 1 else ""
        training = {key: seconds[key] for key in ("train", "calibrate") if seconds.get(key)}
        if training:
            rows.append((f"{name}training", training))
        if run.finished and run.record.eval_seconds:
            rows.append((f"{name}evaluation", {"evaluate": run.record.eval_seconds}))
    if not rows:
        raise Missing("no seconds of training or evaluation")
    figure, axes = new_figure(1.3 + 0.55 * len(rows))
    _bars(axes, rows, {"train": SERIES[0], "calibrate": SERIES[3], "evaluate": SERIES[2]})
    _limit(axes, max(sum(parts.values()) for _, parts in rows), min(TRAIN_LIMIT, EVAL_LIMIT), "seconds")
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def sizes(runs: Sequence[Run]) -> Figure:
    """The artifact's bytes by what they hold."""
    rows, reason = [], ""
    for run in runs:
        try:
            rows.append((run.label, run.byte_groups))
        except Missing as missing:
            reason = str(missing)
    if not rows:
        raise Missing(reason)
    figure, axes = new_figure(1.6 + 0.55 * len(rows))
    colours = dict(zip(GROUPS, (SERIES[i] for i in (7, 0, 1, 2, 3, 4)), strict=True))
    _bars(axes, rows, colours)
    if len(rows) == 1:
        axes.set_yticks([])
    _limit(axes, max(sum(parts.values()) for _, parts in rows), SIZE_LIMIT, "bytes")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def _short(value: float) -> str:
    return f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1e3:g} k" if value else "0"


# -- quantisation and adaptation


def errors(run: Run) -> Figure:
    """Relative error of each matrix, by layer."""
    found = run.matrix_errors
    figure, axes = new_figure(HEIGHT + 0.5)
    roles = [role for role in (*ROLES.values(), "tok_emb", "lm_head") if any(e.role == role for e in found)]
    layers = max((e.layer for e in found if e.layer is not None), default=0)
    for number, role in enumerate(roles):
        points = [(e.layer, 100 * e.error) for e in found if e.role == role]
        look = {"color": _colour(number), "label": role, "marker": MARKS[number % len(MARKS)]}
        if points[0][0] is None:
            axes.plot([layers + 1], [points[0][1]], linestyle="none", **look)
        else:
            axes.plot(*zip(*points, strict=True), **look)
    outside = any(e.layer is None for e in found)
    ticks = list(range(0, layers + 1, 1 + layers // 14))
    axes.set_xticks(ticks + [layers + 1] * outside, [str(i) for i in ticks] + ["emb"] * outside)
    axes.set(title=f"{run.label}: lost by quantisation", xlabel="layer", ylabel="% of the matrix's norm")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def gain(runs: Sequence[Run]) -> Figure:
    """What adaptation gained on each document, by its length, with the mean of each octave."""
    figure, axes = new_figure()
    found, reason = False, ""
    for number, run in enumerate(runs):
        try:
            lengths, before, after = run.gains
        except Missing as missing:
            reason = str(missing)
            continue
        found, colour = True, _colour(number)
        if len(lengths) <= 3000:
            axes.plot(lengths, before - after, ".", color=colour, alpha=0.35)
        at, mean = octaves(lengths, before - after)
        axes.plot(at, mean, "o-", color=colour, label=run.label)
    if not found:
        raise Missing(reason)
    axes.axhline(0, color=SOFT, linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
    axes.set(title="gain of test-time training", xlabel="tokens of the document", ylabel="nats per token")
    _legend(figure, runs)
    return figure


def octaves(lengths: np.ndarray, gains: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Middle of each octave of lengths and the mean gain of its tokens."""
    octave = np.floor(np.log2(lengths)).astype(int)
    present = np.unique(octave)
    means = [np.average(gains[octave == o], weights=lengths[octave == o]) for o in present]
    return 2.0 ** (present + 0.5), np.array(means)
