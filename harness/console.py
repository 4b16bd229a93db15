"""What people see of a run: one live line on a terminal, short sentences elsewhere, a table at the end.

The log's files have every line `stage key:value`; with CONSOLE=log the console has them too.
"""

import contextlib
import math
import shutil
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from harness.settings import console_form
from systems.console import Console, lost_consoles
from train_gpt import EVAL_LIMIT, SIZE_LIMIT, TRAIN_LIMIT, Ranks, Run, Watch, Worker

PAUSE = 10.0  # seconds between two sentences about how far a stage is
REDRAW = 0.1  # seconds between two pictures of the live line
WIDTH = 80  # columns of what is no terminal
SCORES = {  # stage -> what the table of the end calls it, and the stages whose time made it
    "untrained": ("untrained", ("untrained",)),
    "prequant": ("trained", ("train",)),
    "quantised": ("quantised", ("calibrate", "quantise", "fallback", "compress")),
    "sliding": ("sliding windows", ("sliding",)),
    "ttt": ("adapted", ("ttt",)),
}
SILENT = {  # stage that is over -> the work behind it, which tells of no units
    "prequant": "calibrating and quantising",
    "quantise": "packing the code",
}
WORK = {"train": "training", "ttt": "adapting", "sliding": "scoring (sliding windows)"}


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress(Watch):
    """CONSOLE=log: remaining time of a stage, in one line that rewrites itself, and in 50 of the log."""

    def __init__(self, ranks: Ranks):
        self._is_main, self._world_size, self._run = ranks.is_main, ranks.world_size, None
        self._live = Console(sys.stderr) if ranks.is_main and sys.stderr.isatty() else None
        self._begun: dict[str, tuple[float, int]] = {}  # stage -> when it began, and its lines in the log

    def see(self, kind: str, **facts: object) -> None:
        """Know the run, whose log gets the lines; show what is said in words."""
        if kind == "opened":
            self._run = facts["run"]
        elif kind == "text" and facts["said"]:
            self.say(facts["text"])

    def say(self, text: str) -> None:
        """A line on the console of rank 0."""
        if self._is_main:
            print(text, flush=True)

    def saved(self, stage: str) -> None:
        """A stage begins, perhaps within another one."""
        self._begun[stage] = time.perf_counter(), 0

    def unit(self, stage: str, worker: Worker) -> None:
        """Show how much is done."""
        start, shown = self._begun[stage]
        elapsed, share = time.perf_counter() - start, worker.done / worker.total
        left = elapsed / share - elapsed if share else math.inf
        line = f"{stage} {worker.done:.0f}/{worker.total:.0f} elapsed:{elapsed:.0f}s left:{left:.0f}s"
        meter = getattr(worker, "meter", None)  # an evaluation's: of this rank so far
        if meter and meter.tokens:
            line += f" running_loss:{meter.val_loss:.5g}"
        self.show(stage, worker, line, left)
        if int(share * 50) > shown:
            self._begun[stage] = start, int(share * 50)
            self._run.log.text(line)

    def show(self, stage: str, worker: Worker, line: str, left: float) -> None:
        """Rewrite the line on a terminal."""
        if self._live:
            self._live.show_progress(line, worker.done >= worker.total)


class Display(Progress):
    """CONSOLE=auto: the run in words. Nothing here is read by a program; the log's files are."""

    shows = True

    def __init__(self, ranks: Ranks, environ: Mapping[str, str]):
        super().__init__(ranks)
        terminal = ranks.is_main and sys.stdout.isatty() and environ.get("TERM", "") != "dumb"
        self._live = Console(sys.stdout) if terminal else None
        self._colours = terminal and not environ.get("NO_COLOR")
        self._said = self._drawn = -math.inf  # when the last line was said, and the live one drawn
        self._matrices: list[Mapping] = []
        self._limits: list[str] = []
        self._validated = ""  # score and step of the last validation while training
        self._first: dict[str, tuple] = {}  # stage -> clock, tokens, steps and work done at its first unit

    @property
    def width(self) -> int:
        """Columns now: a terminal may be resized at any time. One stays free, at which some would wrap."""
        return shutil.get_terminal_size((WIDTH, 24)).columns - 1 if self._live else WIDTH

    def say(self, text: str) -> None:
        """A line on the console of rank 0, folded on a terminal; elsewhere it stays whole for `grep`."""
        self._said = time.perf_counter()
        if self._live:
            options = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
            folded = (textwrap.wrap(line, max(self.width, 20), **options) for line in text.splitlines())
            text = "\n".join(line for lines in folded for line in lines)
        super().say(text)

    def paint(self, text: str, code: int) -> str:
        """Text in a colour (31 red, 32 green) or bold (1), where that is wanted."""
        return f"\x1b[{code}m{text}\x1b[0m" if self._colours else text

    def see(self, kind: str, **facts: object) -> None:
        """Say what has happened."""
        if kind == "text" and facts["text"].startswith("anchor "):  # its hashes are for who asks for them
            posted = f"python tools/audit.py {self._run.log.folder} --anchor prints it"
            facts = facts | {"text": f"Anchor, to be posted before the score is known: {posted}"}
        super().see(kind, **facts)
        if kind == "line":
            self._line(facts["stage"], facts["values"], facts["log"])
        elif kind == "warm_up" and facts["steps"]:
            done = facts["steps"] - facts["steps_left"]
            self._far("warm-up", done / facts["steps"], [f"step {done} of {facts['steps']}"])
        elif kind == "finished" and facts["stage"] in SILENT:
            self._wait_for(SILENT[facts["stage"]])
        elif kind == "adapting":
            self._wait_for("preparing the adaptation")

    def saved(self, stage: str) -> None:
        """A stage begins, whose first unit may take long."""
        super().saved(stage)
        self._wait_for(_name(stage))

    def show(self, stage: str, worker: Worker, line: str, left: float) -> None:
        """How far a stage is: on a terminal at once, elsewhere from time to time."""
        if not self._is_main:
            return
        meter, steps, parts = getattr(worker, "meter", None), getattr(worker, "steps", 0), []
        tokens = meter.tokens * self._world_size if meter else steps * self._run.cfg.train_batch_tokens
        now = self._run.clock.elapsed(stage)  # without what other stages, as validations, take in between
        start, before, first, done = self._first.setdefault(stage, (now, tokens, steps, worker.done))
        took, did = now, worker.done
        if worker.done > done:  # of a resumed stage the pace since then
            took, did = now - start, worker.done - done
        left = took * (worker.total - worker.done) / did if did else math.inf
        parts += [f"{worker.done:,.0f}/{worker.total:,.0f}"]
        parts += [f"{duration(left)} left"] * math.isfinite(left)
        if meter and meter.tokens:
            parts += [f"loss {meter.val_loss:.3f}", f"val_bpb {meter.val_bpb:.4f} so far"]
        elif (reports := getattr(worker, "reports", [])) and len(reports) == 2 and reports[0].step >= first:
            parts += [f"loss {reports[0].train_loss:.3f}"]  # of a step that has been waited for
            parts += [self._validated] * bool(self._validated)
        if tokens > before and now > start:
            parts += [f"{(tokens - before) / (now - start):,.0f} tokens/s"]
        self._far(_name(stage), worker.done / worker.total, parts)

    def _wait_for(self, work: str) -> None:
        """On a terminal: the live line of work that tells of no units, or not yet."""
        if self._live:
            self._live.show_progress(f"{work} ..."[: self.width], False)

    def _far(self, name: str, share: float, parts: Sequence[str]) -> None:
        now = time.perf_counter()
        if self._live and now - self._drawn >= REDRAW:
            self._drawn, bar = now, ""
            while len(parts) > 1 and len(name) + sum(len(part) + 2 for part in parts) + 5 > self.width:
                parts = parts[:-1]
            if (room := min(self.width - len(f"{name}  {'  '.join(parts)}") - 8, 30)) >= 8:
                bar = f"[{'#' * int(share * room)}{'-' * (room - int(share * room))}] "
            self._live.show_progress(f"{name} {bar}{share:4.0%}  {'  '.join(parts)}"[: self.width], False)
        elif not self._live and share < 1 and now - self._said >= PAUSE:  # at 1 its end is said next
            self.say(f"{name} {share:.0%}: {', '.join(parts)}")

    def _line(self, stage: str, values: Mapping, log: object) -> None:
        if stage == "matrix":
            self._matrices.append(values)
            return
        if self._matrices:
            self.say(matrices_line(self._matrices))
            self._matrices = []
        if stage == "limit":
            self._limits.append(values["text"])
        elif stage == "final":
            for line in self._end(values, log):
                super().say(line)
        elif "val_bpb" in values:
            step = stage.removeprefix("step_") if stage != "untrained" else "0"
            self._validated = f"val_bpb {values['val_bpb']:.3f} at step {step}"
            score = f"val_bpb {values['val_bpb']:.5f}, val_loss {values['val_loss']:.5f}"
            name = SCORES.get(stage, [stage.replace("_", " ")])[0]
            self.say(
                f"{name.capitalize()}: {score}, {values['documents']:,} documents, {values['seconds']:.1f} s"
            )
        elif stage != "train":  # of whose steps `show` tells
            self.say(sentence({"stage": stage, **values}))

    def _end(self, values: Mapping, log: object) -> list[str]:
        score = self.paint(f"{values['val_bpb']:.5f} bits per byte", 1)
        rows = ["", f"{score} (val_bpb), lower is better", ""]
        rows += [*stages_table(self._run), ""]
        kept = values["legal"]
        rows += facts_rows(values, log, self._limits)
        return [self.paint(row, 32 if kept else 31) if row.startswith("legal") else row for row in rows]


def _name(stage: str) -> str:
    """What a stage does, in words."""
    return WORK.get(stage, f"scoring {SCORES.get(stage, [stage.replace('_', ' ')])[0]}")


def matrices_line(matrices: Sequence[Mapping]) -> str:
    """How many matrices were quantised, to how many bits, and the three with the largest errors."""
    bits = Counter(matrix["bits"] for matrix in matrices)
    to = ", ".join(f"{bits[b]} to {b} bits" for b in sorted(bits))
    worst = sorted(matrices, key=lambda matrix: -matrix["weighted_error"])[:3]
    names = [matrix["name"].removeprefix("blocks.").removesuffix(".weight") for matrix in worst]
    errors = (f"{n} {m['weighted_error']:.0f}" for n, m in zip(names, worst, strict=True))
    return f"Matrices: {to}; largest weighted errors {', '.join(errors)}"


def stages_table(run: Run) -> list[str]:
    """Score of each stage that was scored, how far it is from the one before, and what it took."""
    rows, last = [f"{'':<17}{'val_bpb':>9}{'change':>11}{'seconds':>10}"], math.nan
    for stage, (name, parts) in SCORES.items():
        if stage in run.stages:
            score, seconds = run.stages[stage]["val_bpb"], sum(run.clock.seconds.get(p, 0.0) for p in parts)
            change = f"{score - last:+.5f}" if math.isfinite(last) else ""
            rows.append(f"{name:<17}{score:>9.5f}{change:>11}{seconds:>10.1f}")
            last = score
    return rows


def facts_rows(values: Mapping, log: object, broken: Sequence[str]) -> list[str]:
    """Bytes, limits, what `legal` means, and where to look next, of a run's last line."""
    size, trained = values["artifact_bytes"], values["train_seconds"] + values["calibrate_seconds"]
    parts = f"{values['code_bytes']:,} code + {values['model_bytes']:,} model"
    made = f"{size:,} = {parts}, {SIZE_LIMIT - size:,} left of {SIZE_LIMIT:,}" if size else "no artifact"
    times = f"training {trained:.1f} of {TRAIN_LIMIT:g} s, evaluation {values['eval_seconds']:.1f} of"
    limits = [f"broken: {reason}" for reason in broken] or [f"kept: {times} {EVAL_LIMIT:g} s"]
    legal = "True: limits kept, every target scored, an artifact made"
    if not values["legal"]:
        legal = "False: a limit is broken" if broken else "False: there is no artifact"
    rows = [("bytes", made), *(("limits", limit) for limit in limits), ("legal", legal)]
    rows += [("", "(the script's own word; tools/audit.py judges the number)")]
    rows += [("log", f"{log.folder}/logs/{log.run_id}.txt")]
    rows += [("next", f"make report RUN_DIR={log.folder}")]
    rows += [("", f"make audit RUN_DIR={log.folder}")] * bool(size)  # which judges an artifact
    return [f"{name:<8}{text}" for name, text in rows]


def sentence(line: Mapping) -> str:
    """A line of the log in words; key by key where there are none for it, or a key that they need is not."""
    with contextlib.suppress(KeyError):
        if line["stage"] in SENTENCES:
            return SENTENCES[line["stage"]](line)
    shown = (f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items() if k != "stage")
    return f"{line['stage'].capitalize()}: {', '.join(shown)}"


def start_lines(line: Mapping) -> str:
    """The run, its folder (by which tools/logbook/ours.py knows it again), and what it runs on."""
    on = f"{line['device']}, ranks {line['ranks']}, threads {line['threads']}, attention {line['attention']}"
    by = f"python {line['python']}, torch {line['torch']}"
    return f"Run {line['run']}, folder {line['folder']}\nOn {on}\nWith {by}"


def preflight_line(line: Mapping) -> str:
    """What was checked, and what is needed of what there is."""
    parts = [f"{line['hashed']} of {line['files']} files hashed"] if "files" in line else []
    for name in ("memory", "disk"):
        if f"{name}_need_mb" in line:
            parts.append(f"{name} {line[f'{name}_need_mb']:,.0f} of {line[f'{name}_free_mb']:,.0f} MB")
    return f"Checked: {', '.join(parts) or 'settings and data'}"


SENTENCES = {  # stage -> sentence of its line
    "start": start_lines,
    "preflight": preflight_line,
    "speed": lambda v: (
        f"Speed: {v['step_ms']:,.0f} ms a step, {v['looping_step_ms']:,.0f} ms with loops; training takes "
        + (f"{v['predicted_steps']:,} steps" if "predicted_steps" in v else duration(v["predicted_seconds"]))
    ),
    "model": lambda v: (
        f"Model: {v['parameters']:,} parameters, {v['layers']} layers ({v['virtual_layers']} with loops)"
    ),
    "looping": lambda v: f"Loops are on from step {v['step']}",
    "saved": lambda v: f"Trained in {v['train_seconds']:.1f} s: {v['file']}",
    "artifact": lambda v: f"Artifact: {v['model_bytes']:,} bytes, {v['file']}",
    "size": lambda v: f"Size: {v['artifact_bytes']:,} bytes with the code, at most {v['limit']:,}",
    "ttt_phase": lambda v: (
        f"Adapted the base weights: phase {v['phase']}, {v['tokens']:,} tokens, {v['sgd_steps']} steps"
    ),
    "notice": lambda v: f"Notice: {v['text']}",
    "passed": lambda v: f"Passed: everything that can be checked before a run ({v['seconds']:.1f} s)",
}


class ConsoleNotice(Watch):
    """Says in the log of a run that a console is given up: a broken pipe, a full disk, a closed terminal.

    It stands behind all other watches, so that they have the event that met the fault before the notice.
    """

    def __init__(self):
        self._said: list[str] = []

    def see(self, kind: str, **facts: object) -> None:
        """Look after each event but the last one, behind which nothing stands."""
        lost = [name for name in lost_consoles() if name not in self._said]
        if kind == "line" and facts["stage"] != "final" and lost:
            self._said += lost
            facts["log"].event("notice", text=f"given up, the run goes on without: {', '.join(lost)}")


def console_watch(ranks: Ranks, environ: Mapping[str, str]) -> Progress:
    """The watch that shows a run to people, as CONSOLE asks. Raises ConfigError."""
    return Display(ranks, environ) if console_form(environ) == "auto" else Progress(ranks)
