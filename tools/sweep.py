"""Search settings: many runs of a command, each with other values, kept in one study (Optuna).

    python tools/sweep.py --set MATRIX_LR=log:0.018:0.04 --set TTT_LORA_RANK=64,80,96 --trials 24 -- COMMAND

A variable is `NAME=log:LOW:HIGH`, `lin:LOW:HIGH`, `int:LOW:HIGH` or a list `NAME=a,b,c`. Names, and values at
both ends, are checked against the script's settings (with those of the environment, PRESET for one) before
anything starts. COMMAND is run as it stands, once a trial, with the trial's values in its environment and a
folder of its own (`--out`/trial_0000, ...; console.txt there is its console). Default: `python train_gpt.py`.

    --trials N        trials in all; the same command again goes on where the study stopped, up to this number
    --sampler NAME    tpe (default), random, or grid (lists and int: only; every combination once)
    --metric NAME     what to make small: val_bpb (default, the final score) or another number of result.json:
                      val_loss, artifact_bytes, train_seconds, ..., or of a stage, such as prequant.val_bpb
    --prune           end a trial when a validation while training (VAL_LOSS_EVERY) is worse than the median
    --storage WHERE   sqlite:///FILE or another database's URL, or a journal file (default, in --out); several
                      processes and machines may work on one study at the same time
    --study NAME      (default "sweep")     --out DIR (default runs/<study>)     --seed N, of the random draws
    --json            the last line is one JSON object

The first trial has the values that the settings have now, where they lie in the ranges. A trial that crashes
is recorded as failed, with its last line, and the sweep goes on, unless the first three fail alike: the same
command, or a mended script, then tries their values again. Ctrl-C ends the run under way, whose values
are tried again when the sweep goes on; kill -9 ends it too. At the end: the best settings as a line to paste,
each variable's importance (fANOVA), sweep.png. A run over a limit of the contest never is the best while
there is another.

Exit code 0, 1 (no trial has a score), 2 (a mistake in the command, one line), 128 + signal (stopped).
"""

import argparse
import contextlib
import difflib
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from command import Mistake, Parser, complain, start  # noqa: E402

# What follows may not be installed: `command` says so.
# isort: split
import runs  # noqa: E402
import train_gpt as tg  # noqa: E402
from harness.lineage import SWITCHES, same  # noqa: E402
from harness.settings import read_settings  # noqa: E402
from harness.unread import AFTER_TRAINING, lacking, name_of, needs_of  # noqa: E402
from scripts import hash_on_disk  # noqa: E402
from sweeping.owner import holding, is_gone, myself  # noqa: E402
from sweeping.running import GUARD, Stop, guarded, last_line  # noqa: E402, F401
from systems.layout import as_set, as_variables  # noqa: E402

try:
    import optuna
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from optuna.trial import FrozenTrial, Trial, TrialState

    from sweeping.storage import SweepError, open_storage
except ImportError as error:
    sys.exit(f"sweep.py: error: {error.name} is not installed: pip install -r requirements-dev.txt")

FORMS = "must be log:LOW:HIGH, lin:LOW:HIGH, int:LOW:HIGH or a list a,b,c"
OURS = ("ARTIFACT_DIR", "RUN_ID")  # each trial has its own
TOTALS = ("val_bpb", "val_loss", "artifact_bytes", "code_bytes", "model_bytes")
TOTALS += ("train_seconds", "calibrate_seconds", "eval_seconds")
STAGES, STAGE_KEYS = ("prequant", "quantised", "sliding", "ttt"), ("val_bpb", "val_loss", "seconds")
MOST_FAILURES = 3  # of one kind, before a command that fails every time is given up
FORGIVEN = "forgiven"  # of a study: numbers of failed trials that do not count
MOST_CELLS = 10_000  # of a grid
MOST_COMBINATIONS = 4096  # of the ends of other variables, looked at for one that allows a value


class TrialFailed(Exception):
    """A trial without a score; the reason."""


class Variable(NamedTuple):
    """A setting that the sweep varies."""

    name: str
    kind: str  # log, lin, int or list
    low: float = 0.0
    high: float = 0.0
    values: tuple[str, ...] = ()

    @property
    def ends(self) -> tuple[str, ...]:
        """What is checked before anything starts: both ends, or all values of a list."""
        return self.values or (self.text(self.low), self.text(self.high))

    @staticmethod
    def text(value: float | str) -> str:
        """A value as the environment variable has it: what is run is what is reported."""
        return f"{value:.6g}" if isinstance(value, float) else str(value)

    def suggest(self, trial: Trial) -> str:
        """The value of a trial."""
        if self.kind == "list":
            return trial.suggest_categorical(self.name, self.values)
        if self.kind == "int":
            return self.text(trial.suggest_int(self.name, int(self.low), int(self.high)))
        return self.text(trial.suggest_float(self.name, self.low, self.high, log=self.kind == "log"))

    def grid(self) -> Sequence[object]:
        """All values, as the sampler names them."""
        return self.values or range(int(self.low), int(self.high) + 1)

    def containing(self, value: object, settle: Callable[[str, str], object]) -> object | None:
        """The sampler's name of a setting's value; None where it lies outside."""
        if self.kind == "list":
            return next((text for text in self.values if settle(self.name, text) == value), None)
        return value if self.low <= value <= self.high else None


# -- the command


def parse_variable(text: str, environ: Mapping[str, str]) -> Variable:
    """`NAME=log:LOW:HIGH`, ... as a variable. Raises SweepError."""
    name, _, rest = text.partition("=")
    defaults = {key: type(value) for key, value in tg.Config().as_env().items()}
    if name not in defaults:
        near = difflib.get_close_matches(name.upper(), defaults, n=1)
        raise SweepError(f"--set {text}: no such setting{f'; did you mean {near[0]}?' if near else ''}")
    if name in OURS:
        raise SweepError(f"--set {text}: {name} is the sweep's own, every trial has another")
    off = (old for old, ours in SWITCHES.items() if ours == name and same(environ.get(old, "1"), "0"))
    if there := name if name in environ else next(off, ""):
        raise SweepError(f"--set {text}: {there}={environ[there]} is set in the environment too; unset it")
    kind, *ends = rest.split(":")
    if kind in ("log", "lin", "int") and len(ends) == 2:
        return _range(text, name, kind, ends, defaults[name])
    values = tuple(value.strip() for value in rest.split(","))
    if len(set(values)) < max(2, len(values)) or not all(values) or ends:
        raise SweepError(f"--set {text}: {FORMS} (two values or more, each once)")
    return Variable(name, "list", values=values)


def _range(text: str, name: str, kind: str, ends: Sequence[str], of: type) -> Variable:
    if of not in (int, float) or (of is int and kind != "int"):
        words = "a whole number, so int:LOW:HIGH or a list" if of is int else "no number, so a list a,b,c"
        raise SweepError(f"--set {text}: {name} is {words}")
    try:
        low, high = (float(int(end)) if kind == "int" else float(end) for end in ends)
    except ValueError:
        raise SweepError(f"--set {text}: {FORMS}") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high and (low > 0 or kind != "log")):
        above = "; LOW must be above 0" if kind == "log" else ""
        raise SweepError(f"--set {text}: LOW must be below HIGH{above}")
    return Variable(name, kind, low, high)


def settle(environ: Mapping[str, str], **values: str) -> tg.Config:
    """The script's settings with these values; SweepError says what is wrong with them."""
    try:
        return read_settings({**environ, **values})
    except tg.UserError as error:
        raise SweepError(str(error)) from None


def check_ends(variables: Sequence[Variable], environ: Mapping[str, str]) -> None:
    """Every end and value must be possible with the other settings, or with some ends of other variables."""
    for variable in variables:
        others = [other for other in variables if other is not variable]
        for end in variable.ends:
            errors = []
            corners = itertools.product(*([None, *other.ends] for other in others))
            for corner in itertools.islice(corners, MOST_COMBINATIONS):
                names = (other.name for other in others)
                chosen = {n: value for n, value in zip(names, corner, strict=True) if value is not None}
                try:
                    settle(environ, **chosen, **{variable.name: end})
                    break
                except SweepError as error:
                    errors.append(error)
            else:
                raise errors[0]


def check_read(variables: Sequence[Variable], base: tg.Config) -> None:
    """Something must read each variable, with the settings as they are or with another variable's values."""
    names = {variable.name for variable in variables}
    settled = as_variables(base.as_env())
    for variable in variables:
        if base.prequant_only and re.fullmatch(AFTER_TRAINING, variable.name):
            raise SweepError(f"--set {variable.name}: no effect with PREQUANT_ONLY=1")
        terms = lacking(needs_of(variable.name), settled)
        if terms and not names & set(map(name_of, terms)):
            raise SweepError(f"--set {variable.name}: no effect without {' '.join(terms)}")


def check_metric(metric: str) -> None:
    """Refuse what no result.json holds."""
    stage, _, key = metric.rpartition(".")
    if metric not in TOTALS and not (stage in STAGES and key in STAGE_KEYS):
        stages = f"STAGE.{'|'.join(STAGE_KEYS)} (STAGE {', '.join(STAGES)})"
        raise SweepError(f"--metric {metric}: must be one of {', '.join(TOTALS)} or {stages}")


def check_pruning(metric: str, cfg: tg.Config) -> None:
    """Pruning needs validations while training, of the metric that is made small."""
    if metric.rpartition(".")[2] not in ("val_bpb", "val_loss"):
        raise SweepError(f"--prune: compares val_bpb or val_loss, not --metric {metric}")
    if not 0 < cfg.val_loss_every < cfg.iterations:
        wanted = f"above 0 and below ITERATIONS={cfg.iterations}"
        raise SweepError(f"--prune: VAL_LOSS_EVERY={cfg.val_loss_every} must be {wanted}: set it")


def parse_arguments(arguments: Sequence[str], environ: Mapping[str, str]) -> argparse.Namespace:
    """Command line, checked; adds `variables`, `command`, `environ` and the settings `base`."""
    parser = Parser(__doc__)
    parser.add_argument("--set", action="append", default=[], dest="sets", metavar="NAME=RANGE")
    parser.add_argument("--trials", type=int, required=True)
    parser.add_argument("--sampler", choices=("tpe", "grid", "random"), default="tpe")
    parser.add_argument("--metric", default="val_bpb")
    parser.add_argument("--prune", action="store_true")
    parser.add_argument("--storage", default="")
    parser.add_argument("--study", default="sweep")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--json", action="store_true")
    own, command = list(arguments), [sys.executable, str(ROOT / "train_gpt.py")]
    if "--" in own:
        cut = own.index("--")
        own, command = own[:cut], own[cut + 1 :]
    options = parser.parse_args(own)
    options.command, options.environ = command, environ
    options.out = options.out or Path("runs") / options.study
    check_options(options)
    options.variables = [parse_variable(text, environ) for text in options.sets]
    names = [variable.name for variable in options.variables]
    if not names or len(set(names)) < len(names):
        raise SweepError("--set: name each variable once" if names else "--set is missing: what shall vary?")
    options.base = settle(environ)
    check_ends(options.variables, environ)
    check_read(options.variables, options.base)
    check_metric(options.metric)
    if options.prune:
        check_pruning(options.metric, options.base)
    if options.sampler == "grid":
        options.trials = min(options.trials, grid_cells(options.variables))
    return options


def check_options(options: argparse.Namespace) -> None:
    """What does not depend on the variables."""
    if not options.command:
        raise SweepError("nothing stands behind --: name the command that makes a run")
    if not shutil.which(options.command[0]):
        raise SweepError(f"{options.command[0]}: no such command")
    if options.trials < 1:
        raise SweepError(f"--trials {options.trials}: must be at least 1")
    if not re.fullmatch(r"\w[\w.+-]*", options.study):
        raise SweepError(f"--study {options.study!r}: must be a name of letters, digits and . _ + -")
    if taken := [name for name in OURS if name in options.environ]:
        raise SweepError(f"{taken[0]} is set: every trial has a folder and a name of its own, see --out")


def grid_cells(variables: Sequence[Variable]) -> int:
    """Number of combinations; a continuous range has no end of them."""
    for variable in variables:
        if variable.kind in ("log", "lin"):
            raise SweepError(f"--sampler grid: {variable.name} has a continuous range; give int: or a list")
    cells = math.prod(len(variable.grid()) for variable in variables)
    if cells > MOST_CELLS:
        raise SweepError(f"--sampler grid: {cells} combinations; at most {MOST_CELLS}")
    return cells


# -- the study


def open_study(options: argparse.Namespace) -> optuna.Study:
    """The study of that name: made with its first trial, or one of the same question to go on with."""
    settings, question = options.base.as_env(), question_of(options)
    storage = open_storage(options.storage, options.out, lambda: Stop.signal > 0)
    options_of_study = {"sampler": sampler(options), "pruner": optuna.pruners.MedianPruner(4)}
    try:
        study = optuna.create_study(storage=storage, study_name=options.study, **options_of_study)
    except optuna.exceptions.DuplicatedStudyError:
        study = optuna.load_study(storage=storage, study_name=options.study, **options_of_study)
        _check_question(study, question)
        if failed := all_failed(study):
            study.set_user_attr("question", question)
            study.set_user_attr(FORGIVEN, [trial.number for trial in failed])
            for trial in failed:
                study.enqueue_trial(trial.params)
            print(f"all {len(failed)} trials of the study have failed: their values are tried again")
        if options.seed is not None:  # not the same draws once more
            options.seed += len(study.trials)
            study.sampler = sampler(options)
        return study
    names = [variable.name for variable in options.variables]
    if options.sampler == "grid":
        for cell in itertools.product(*(variable.grid() for variable in options.variables)):
            study.enqueue_trial(dict(zip(names, cell, strict=True)))
    else:
        now = [v.containing(settings[v.name], _value_of(options.base)) for v in options.variables]
        if None not in now:
            study.enqueue_trial(dict(zip(names, now, strict=True)))
    study.set_user_attr("question", question)
    return study


def question_of(options: argparse.Namespace) -> dict[str, object]:
    """What all trials of a study must have in common: variables, metric, other settings, the script."""
    places = runs.NAMES_AND_PLACES - {"SEED"} | {variable.name for variable in options.variables}
    settings = {name: value for name, value in options.base.as_env().items() if name not in places}
    scripts = [Path(word) for word in options.command if word.endswith(".py") and Path(word).is_file()]
    digest = hash_on_disk(scripts[0]) if scripts else ""
    return {
        "set": sorted(options.sets),
        "metric": options.metric,
        "sampler": "grid" if options.sampler == "grid" else "tpe or random",
        "script": digest,
        "settings": settings,
    }


def _value_of(base: tg.Config) -> Callable[[str, str], object]:
    environ = as_variables(base.as_env())
    return lambda name, text: settle(environ | {name: text}).as_env()[name]


def _check_question(study: optuna.Study, question: Mapping[str, object]) -> None:
    """Trials of another question must not be mixed with these."""
    for _ in range(300):  # whoever has just made the study writes it, after the grid
        asked = study.user_attrs.get("question")
        if asked:
            break
        time.sleep(0.2)
    else:
        raise SweepError(f"--study {study.study_name}: is not one of this program's; choose another name")
    begun = f"--study {study.study_name}: began with"
    for key in ("set", "metric", "sampler"):
        if asked[key] != question[key]:
            raise SweepError(f"{begun} --{key} {asked[key]}; choose another --study")
    if all_failed(study):
        return  # what was wrong with the script or its settings may be mended now
    if asked["script"] != question["script"]:
        raise SweepError(f"{begun} another script (sha256 {asked['script'][:12]}); choose another --study")
    for name in sorted(asked["settings"].keys() | question["settings"].keys()):
        was, now = asked["settings"].get(name), question["settings"].get(name)
        if was != now:
            shown = [as_set(was), as_set(now)]
            raise SweepError(f"{begun} {name}={shown[0]}, not {shown[1]}; choose another --study")


def sampler(options: argparse.Namespace) -> optuna.samplers.BaseSampler:
    """The sampler; a third of the trials, 4 to 10, are random before TPE models them."""
    if options.sampler != "tpe":  # a grid's combinations wait in the study, `open_study`
        return optuna.samplers.RandomSampler(seed=options.seed)
    startup = min(10, max(4, options.trials // 3))
    return optuna.samplers.TPESampler(n_startup_trials=startup, seed=options.seed)


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that count: with a score, pruned, running, or failed by themselves, not stopped.

    Those of a study in which all had failed count no more when it goes on.
    """
    failed, waiting = TrialState.FAIL, TrialState.WAITING
    trials, forgiven = study.get_trials(deepcopy=False), study.user_attrs.get(FORGIVEN, ())
    made = (t for t in trials if t.state not in (failed, waiting) or "error" in t.user_attrs)
    return [trial for trial in made if trial.number not in forgiven]


def all_failed(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that count, where all of them have failed, else none."""
    trials = counted(study)
    return trials if all(trial.state == TrialState.FAIL for trial in trials) else []


def same_failure(study: optuna.Study) -> str:
    """The failure of the first trials where all so far, three or more, have failed alike; numbers aside."""
    failures = [trial.user_attrs["error"] for trial in all_failed(study)]
    alike = {re.sub(r"[-+.\d]+(e[-+]?\d+)?", "#", failure) for failure in failures}
    return failures[-1] if len(failures) >= MOST_FAILURES and len(alike) == 1 else ""


def take_up(study: optuna.Study, out: Path) -> None:
    """Trials whose sweep is gone are closed, and their values tried again."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        folder = Path(trial.user_attrs.get("folder", ""))
        if not is_gone(trial.user_attrs, [folder, out / folder.name]):
            continue
        faster = (ValueError, optuna.exceptions.UpdateFinishedTrialError)  # another process of the sweep
        with contextlib.suppress(*faster):
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params)


# -- a trial


class Sweep:
    """Runs the trials of a study, one after another."""

    def __init__(self, options: argparse.Namespace, study: optuna.Study):
        self.options, self.study, self.stop = options, study, Stop()

    def run(self) -> None:
        """Trials until the study has as many as asked for, or a signal came."""
        started = len(counted(self.study))
        goal = f"{self.options.metric} of {shlex.join(self.options.command)}"
        print(f"study {self.study.study_name}, {goal}: {started} of {self.options.trials} trials", flush=True)
        with self.stop.listening():
            while not self.stop.signal:
                take_up(self.study, self.options.out)
                trials = self.study.get_trials(deepcopy=False)
                waiting = any(trial.state == TrialState.WAITING for trial in trials)
                if failure := same_failure(self.study):
                    print(
                        f"{MOST_FAILURES} trials have failed alike and none has a score, stopped: {failure}"
                    )
                    break
                if len(counted(self.study)) >= self.options.trials or (
                    self.options.sampler == "grid" and not waiting
                ):
                    break
                try:
                    self.study.optimize(self.objective, n_trials=1, catch=(TrialFailed,))
                except KeyboardInterrupt:
                    break

    def objective(self, trial: Trial) -> float:
        """Run one trial and return what is made small."""
        earlier = [other for other in counted(self.study) if other.number < trial.number]
        values = {variable.name: variable.suggest(trial) for variable in self.options.variables}
        if len(earlier) >= self.options.trials:  # without "error" it does not count
            self.study.enqueue_trial(trial.params)
            raise TrialFailed("another process has taken the last one")
        about = myself()
        for key, value in {**about, "values": values}.items():
            trial.set_user_attr(key, value)
        start, outcome = time.perf_counter(), "stopped"
        try:
            value = self._score(trial, values, about)
            over = " (over a limit)" if trial.user_attrs["over_limit"] else ""
            outcome = f"{self.options.metric} {value:.6g}{over}"
            return value
        except optuna.TrialPruned as pruned:
            outcome = f"pruned, {pruned}"
            raise
        except TrialFailed as failure:
            outcome = f"failed, {failure}"
            trial.set_user_attr("error", str(failure))
            raise
        except KeyboardInterrupt:
            self.study.enqueue_trial(trial.params)
            raise
        finally:
            seconds = time.perf_counter() - start
            trial.set_user_attr("seconds", round(seconds, 3))
            shown = " ".join(f"{name}={value}" for name, value in values.items())
            print(f"trial {trial.number} {shown}: {outcome}, {seconds:.0f} s", flush=True)

    def _score(self, trial: Trial, values: Mapping[str, str], owner: Mapping[str, object]) -> float:
        try:
            settle(self.options.environ, **values)
        except SweepError as error:
            raise TrialFailed(str(error)) from None
        folder = self._folder(trial)
        trial.set_user_attr("folder", str(folder))
        with holding(folder, owner):
            code = self._execute(trial, folder, values)
        if code not in (0, 3):  # 3: a limit of the contest is exceeded
            name = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
            raise TrialFailed(f"{name}: {last_line(folder / 'console.txt')}")
        try:
            record = runs.read_run(folder)
        except runs.ReadError as error:
            raise TrialFailed(str(error)) from None
        over = [limit for limit in record.broken_limits if not limit.startswith("VAL_DOC_FRACTION")]
        trial.set_user_attr("over_limit", over)
        trial.set_constraint("limits", len(over))  # TPE looks elsewhere
        return measured(record, self.options.metric)

    def _folder(self, trial: Trial) -> Path:
        """A new folder; where an earlier study of that name has left one, the first free name+N."""
        wanted = self.options.out / f"trial_{trial.number:04d}"
        for number in itertools.count(1):
            folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}+{number}")
            try:
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                continue
            except OSError as error:
                raise SweepError(f"--out {self.options.out}: cannot write there ({error.strerror})") from None

    def _execute(self, trial: Trial, folder: Path, values: Mapping[str, str]) -> int:
        """The command with the trial's values; returns its exit code, or raises why it was ended."""
        name = f"{self.options.study}_{folder.name}"
        environ = {**self.options.environ, **values, "ARTIFACT_DIR": str(folder), "RUN_ID": name}
        with open(folder / "console.txt", "wb") as console:
            try:
                process = subprocess.Popen(
                    self.options.command,
                    env=environ,
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is for the sweep, which ends the run and its ranks
                )
            except OSError as error:
                raise SweepError(f"{self.options.command[0]}: cannot be started ({error.strerror})") from None
            with guarded(process):
                reported: set[int] = set()
                while process.poll() is None:
                    if self.stop.signal:
                        raise KeyboardInterrupt
                    if worse := self._report(trial, folder, reported):
                        raise optuna.TrialPruned(worse)
                    time.sleep(0.2)
        self._report(trial, folder, reported)  # the last ones are what later trials are compared with
        return process.returncode

    def _report(self, trial: Trial, folder: Path, reported: set[int]) -> str:
        """Tell the study of new validations; returns the one that is too bad to go on, if there is one."""
        if not self.options.prune:
            return ""
        for step, value in validations(folder, self.options.metric.rpartition(".")[2]):
            if step not in reported:
                reported.add(step)
                trial.report(value, step)
                if trial.should_prune():
                    return f"{value:.6g} at step {step}"
        return ""


def validations(folder: Path, key: str) -> Iterator[tuple[int, float]]:
    """Step and score of each validation so far, the one before step 1 left out (the same for all trials)."""
    events = []
    with contextlib.suppress(runs.ReadError):  # not there yet
        events = runs.read_events(folder / "metrics.jsonl")
    for event in events:
        step = re.fullmatch(r"step_(\d+)", event["stage"])
        if step and math.isfinite(event[key]):
            yield int(step[1]), event[key]


def measured(record: runs.RunRecord, metric: str) -> float:
    """A number of result.json by its name, `stage.key` for one of a stage."""
    stage, _, key = metric.rpartition(".")
    value = (record.stages.get(stage, {}) if stage else record.result).get(key)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TrialFailed(f"result.json has {metric} {value}")
    return float(value)


# -- the result


def completed(study: optuna.Study) -> list[FrozenTrial]:
    """Trials with a score, best first; those over a limit of the contest come last."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(trials, key=lambda trial: (bool(trial.user_attrs.get("over_limit")), trial.value))


def importances(study: optuna.Study) -> tuple[dict[str, float], str]:
    """Share of each variable in the variance of the score (fANOVA), or nothing and why."""
    values = {trial.value for trial in completed(study)}
    if len(values) < 2:
        return {}, "fewer than two different scores"
    try:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (ValueError, RuntimeError) as error:
        return {}, " ".join(str(error).split())
    return {name: float(share) for name, share in shares.items()}, ""


def summary(options: argparse.Namespace, study: optuna.Study) -> dict:
    """What `--json` prints."""
    trials = counted(study)
    states = ("COMPLETE", "PRUNED", "FAIL", "RUNNING")
    result = {
        "study": study.study_name,
        "metric": options.metric,
        "trials": {state.lower(): sum(t.state.name == state for t in trials) for state in states},
        "failures": {t.number: t.user_attrs.get("error", "") for t in trials if t.state == TrialState.FAIL},
        "best": None,
    }
    done = completed(study)
    if done:
        best = done[0]
        values = best.user_attrs["values"]
        pairs = [*_given(options).items(), *values.items()]
        result["best"] = {
            "value": best.value,
            "trial": best.number,
            "values": values,
            "folder": best.user_attrs["folder"],
            "over_limit": best.user_attrs["over_limit"],
            "line": shlex.join(f"{name}={value}" for name, value in pairs)
            + f" {shlex.join(options.command)}",
        }
        result["importance"], result["importance_missing"] = importances(study)
    return result


def _given(options: argparse.Namespace) -> dict[str, str]:
    """Settings of the environment, preset first: the line to paste needs them too."""
    return runs.given(options.environ, [*options.base.as_env(), "OMP_NUM_THREADS"])


def show(result: Mapping[str, object]) -> None:
    """The summary for people."""
    counts = ", ".join(f"{count} {state}" for state, count in result["trials"].items() if count)
    print(f"\nstudy {result['study']}: {counts}")
    for number, error in result["failures"].items():
        print(f"  trial {number} failed: {error}")
    best = result["best"]
    if not best:
        return
    over = f" (every run is over a limit: {best['over_limit'][0]})" if best["over_limit"] else ""
    print(f"best {result['metric']} {best['value']:.6g}, trial {best['trial']}, {best['folder']}{over}")
    print(f"  {best['line']}")
    shares = [f"{name} {share:.2f}" for name, share in result["importance"].items()]
    missing = f"cannot be computed: {result['importance_missing']}"
    print(f"importance {', '.join(shares) if shares else missing}")
    print(f"picture {result['picture']}")


GREY, ACCENT = "#7a8699", "#c2410c"


def draw(options: argparse.Namespace, study: optuna.Study, shares: Mapping[str, float]) -> bytes:
    """A PNG: scores in the order of the trials, importance, and the score against each variable."""
    columns = min(3, max(2, len(options.variables)))
    rows = 1 + -(-len(options.variables) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * rows), layout="constrained")
    history, bars, *rest = figure.subplots(rows, columns, squeeze=False).flatten()
    ranked = completed(study)
    _draw_history(history, ranked, study.study_name, options.metric)
    bars.barh(list(shares)[::-1], list(shares.values())[::-1], color=GREY)
    bars.set(title="importance" if shares else "importance: cannot be computed", xlim=(0, 1))
    panels = rest[columns - 2 :]
    for variable, panel in zip(options.variables, panels, strict=False):
        _draw_variable(panel, variable, ranked, options.metric)
    for spare in (*rest[: columns - 2], *panels[len(options.variables) :]):
        spare.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _draw_history(panel: Axes, ranked: Sequence[FrozenTrial], name: str, metric: str) -> None:
    best, over = ranked[0], [bool(trial.user_attrs["over_limit"]) for trial in ranked]
    for filled in (True, False):
        part = [trial for trial, is_over in zip(ranked, over, strict=True) if is_over != filled]
        face, label = (GREY, "trial") if filled else ("none", "over a limit")
        if part:
            numbers, values = [t.number for t in part], [t.value for t in part]
            panel.plot(numbers, values, "o", color=GREY, markerfacecolor=face, label=label)
    fair = sorted((t.number, t.value) for t, is_over in zip(ranked, over, strict=True) if is_over == over[0])
    lowest = list(itertools.accumulate((value for _, value in fair), min))
    panel.step([number for number, _ in fair], lowest, where="post", label="best so far")
    panel.plot(best.number, best.value, "*", color=ACCENT, markersize=13, label=f"trial {best.number}")
    panel.set(xlabel="trial", ylabel=metric, title=name)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.legend(fontsize=8)


def _draw_variable(panel: Axes, variable: Variable, ranked: Sequence[FrozenTrial], metric: str) -> None:
    texts = [trial.user_attrs["values"][variable.name] for trial in ranked]
    places = [variable.values.index(text) if variable.values else float(text) for text in texts]
    panel.plot(places, [trial.value for trial in ranked], "o", color=GREY)
    panel.plot(places[0], ranked[0].value, "*", color=ACCENT, markersize=13)
    if variable.values:
        panel.set_xticks(range(len(variable.values)), variable.values)
        panel.set_xlim(-0.5, len(variable.values) - 0.5)
    elif variable.kind == "log":
        panel.set_xscale("log")
        steps = [variable.low * (variable.high / variable.low) ** (i / 3) for i in range(4)]
        panel.set_xticks(steps, [f"{step:.2g}" for step in steps])
        panel.minorticks_off()
    panel.set(xlabel=variable.name, ylabel=metric)


def main(arguments: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """Run the sweep, print what came of it. Exit codes as at the top."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    try:
        options = parse_arguments(sys.argv[1:] if arguments is None else arguments, environ)
        study = open_study(options)
        sweep = Sweep(options, study)
        sweep.run()
        result = summary(options, study)
        if result["best"]:
            picture = options.out / "sweep.png"
            tg.write_whole(picture, draw(options, study, result["importance"]))
            result["picture"] = str(picture)
    except Mistake as error:
        return complain("sweep.py", error)
    show(result)
    if sweep.stop.signal:
        print("stopped; the same command goes on")
    if options.json:
        print(json.dumps(result))
    return 128 + sweep.stop.signal if sweep.stop.signal else int(result["best"] is None)


if __name__ == "__main__":
    start(main)
