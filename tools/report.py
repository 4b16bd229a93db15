"""One page about a run, or about several by their scores: curves, seconds, bytes, errors, settings, audit.

    python tools/report.py RUN_DIR... [--out DIR]

A run under way or dead is shown as far as it got; what a run lacks is said in its place. Logs, ours and the
published ones, may stand among the folders. Written: report.html, which needs no other file and no network,
and every picture as PNG, into DIR (default: `report` in the folder of a single run, else beside the first).

Exit code 0, or 2 (a mistake in the command, one line).
"""

import argparse
import datetime
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from command import Mistake, Parser, complain, start  # noqa: E402

# What follows may not be installed: `command` says so.
# isort: split
import train_gpt as tg  # noqa: E402
from harness.settings import PRESETS  # noqa: E402

try:
    from matplotlib.figure import Figure

    from reporting import figures, page, parts
    from reporting.run import Missing, Run
except ImportError as error:
    sys.exit(f"report.py: error: {error.name} is not installed: pip install -r requirements-dev.txt")

import runs as reader  # noqa: E402

MOST_RUNS = 8  # as many as there are colours


class Report:
    """Collects the parts of the page and the PNGs."""

    def __init__(self, runs: Sequence[Run]):
        self.runs = runs
        self.pictures: dict[str, bytes] = {}

    def figure(
        self, name: str, what: str, draw: Callable[[], Figure], caption: str, extra: Callable[[], str] = str
    ) -> str:
        """A picture, or in its place what the runs lack."""
        try:
            svg, png = figures.drawn(draw)
            shown = page.figure(svg, what, caption, extra())
        except Missing as reason:
            return page.absent(what, str(reason))
        self.pictures[f"{name}.png"] = png
        return shown

    def switched(self, key: str, what: str, caption: str) -> str:
        """A curve against steps and against seconds, one of which is shown; or what the runs lack."""
        svgs, pngs = {}, {}
        try:
            for against in ("steps", "seconds"):
                draw = functools.partial(figures.curve, self.runs, key, against)
                svgs[against], pngs[f"{key}_{against}.png"] = figures.drawn(draw)
        except Missing as reason:
            return page.absent(what, str(reason))
        self.pictures |= pngs
        return page.switch(key, svgs, what, caption)

    def each(self, name: str, what: str, draw: Callable, caption: str, extra: Callable) -> str:
        """A picture of every run by itself."""
        several = len(self.runs) > 1
        return "".join(
            self.figure(
                f"{name}_{number}" if several else name,
                f"{what} of {run.label}",
                lambda run=run: draw(run),
                caption,
                lambda run=run: extra(run),
            )
            for number, run in enumerate(self.runs, 1)
        )

    def parts(self) -> list[str]:
        """The page from top to bottom."""
        runs = self.runs
        presets = {name: tg.Config(**{"preset": name} | row).as_env() for name, row in PRESETS.items()}
        return [
            parts.head(runs),
            _section("Scores", parts.overview(runs) + self._stages()),
            _section("Training", self._curves()),
            _section("Seconds and bytes", self._limits()),
            _section("Quantisation and test-time training", self._errors() + self._gain()),
            _section("Settings", parts.settings_table(runs, presets)),
            _section("Audit", "".join(parts.audit_table(run, folded=len(runs) > 1) for run in runs)),
        ]

    def _stages(self) -> str:
        what, note = "val_bpb through the stages", "Lower is better."
        if len(self.runs) == 1:
            caption = f"Bits per byte after training, what each later stage changed, and the score. {note}"
            return self.each("stages", what, figures.waterfall, caption, parts.stage_rows)
        rows = "".join(parts.stage_rows(run) for run in self.runs)
        caption = f"Bits per byte after training and after each later stage. {note}"
        return self.figure("stages", what, lambda: figures.stages(self.runs), caption, lambda: rows)

    def _curves(self) -> str:
        thin = any(len(run.steps) >= figures.SMOOTHED for run in self.runs)
        notes = [
            "The first steps lie above." * bool(figures.later_losses(self.runs)),
            "Thin: every step that is known; thick: means of neighbours." * thin,
            "Diamonds: validations while training." * any(run.validations() for run in self.runs),
        ]
        caption = " ".join(filter(None, notes))
        return self.switched("train_loss", "training loss", caption) + self.switched(
            "lr_multiplier", "learning rate", "What all learning rates are multiplied by."
        )

    def _limits(self) -> str:
        bytes_of = (
            "The artifact. Streams are measured; matrices of several kinds in one stream share it by the "
            "entropy of their levels. Rest: control tensors, corrections, header."
        )
        return self.figure(
            "seconds",
            "seconds",
            lambda: figures.clock(self.runs),
            "What the contest's two clocks counted: training with calibration, and the final evaluation.",
            lambda: parts.seconds_rows(self.runs),
        ) + self.figure(
            "bytes", "bytes", lambda: figures.sizes(self.runs), bytes_of, lambda: parts.byte_rows(self.runs)
        )

    def _errors(self) -> str:
        caption = "Norm of what quantisation lost, in percent of the norm of the full-precision matrix."
        return self.each("errors", "quantisation error per layer", figures.errors, caption, parts.error_rows)

    def _gain(self) -> str:
        def means() -> str:
            return "".join(parts.gain_rows(run) for run in self.runs if _has_gains(run))

        caption = (
            "Loss of the quantised model less that while adapting. Points: documents; line: octaves' means."
        )
        return self.figure("gain", "gain by length", lambda: figures.gain(self.runs), caption, means)


def _has_gains(run: Run) -> bool:
    try:
        return bool(len(run.gains))
    except Missing:
        return False


def _section(title: str, content: str) -> str:
    return f'<h2>{title}</h2><div class="grid">{content}</div>'


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line; adds the runs."""
    parser = Parser(__doc__)
    parser.add_argument("paths", metavar="RUN_DIR", type=Path, nargs="+")
    parser.add_argument("--out", metavar="DIR", type=Path)
    options = parser.parse_args(arguments)
    options.paths = [*{path.resolve(): path for path in options.paths}.values()]  # a run twice is one
    if len(options.paths) > MOST_RUNS:
        raise Mistake(f"{len(options.paths)} runs: at most {MOST_RUNS} on one page")
    first = options.paths[0]
    alone = len(options.paths) == 1 and first.is_dir()
    options.out = options.out or (first if alone else first.parent) / "report"
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and the pictures. Exit codes as at the top."""
    try:
        options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        report = Report(sorted((Run(path) for path in options.paths), key=lambda run: run.by_score))
        title = ", ".join(run.name for run in report.runs)
        content = report.parts()
        made = f"Made by tools/report.py, {datetime.datetime.now():%Y-%m-%d %H:%M}."
        options.out.mkdir(parents=True, exist_ok=True)
        for name, png in report.pictures.items():
            tg.write_whole(options.out / name, png)
        tg.write_whole(options.out / "report.html", page.page(title, content, made).encode())
    except (Mistake, reader.ReadError, tg.RunError) as error:
        return complain("report.py", error)
    print(f"Open {options.out / 'report.html'} in a browser; {len(report.pictures)} pictures lie beside it")
    return 0


if __name__ == "__main__":
    start(main)
