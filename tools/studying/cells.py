"""The runs of a study: which there are, which are finished, how the others are made by several at once."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import train_gpt as tg
from command import ROOT, Mistake
from dataprep.shards import MANIFEST, BusyError, locked
from harness.lineage import VOCABULARY
from harness.settings import read_settings
from harness.unread import lacking, needs_of
from reproducing.seeds import Experiment, finished
from runs import RunRecord
from scripts import hash_on_disk
from studying.arms import NOISE, OTHER_BATCHES, Arm, folder_of
from studying.page import AT_SECONDS, STAGES
from sweeping.running import Stop, guarded, last_line
from systems.layout import as_variables

SCRIPT = ROOT / "train_gpt.py"
CONFIRM_SEED = 100  # seeds of confirmation begin behind it
NOISE_NAMES = {arm.name for arm in NOISE}
KNOWN = {*tg.Config().as_env(), *VOCABULARY, "SCALE"}  # settings that an arm may have
CONTROLS_FILE = {  # what an arm may go on from: its switch, its setting, the file
    "model": ("QUANTIZE_ONLY", "MODEL_PATH", "final_model.pt"),
    "artifact": ("TTT_EVAL_ONLY", "QUANTIZED_MODEL_PATH", "final_model.int6.ptz"),
}


class Place:
    """Where a study lies, its kind, its seeds' numbers, the environment that all its runs have."""

    def __init__(
        self, folder: Path, data: Path, kind: str, numbers: Sequence[int], environ: Mapping[str, str]
    ):
        self.folder, self.data, self.kind, self.numbers, self.environ = folder, data, kind, numbers, environ
        self.script, self._known = hash_on_disk(SCRIPT), {}

    def data_folder(self, number: int, variant: str) -> Path:
        """Data of a seed's number, in another form where there is a variant. Raises Mistake."""
        folder = folder_of(self.data, self.kind, number, variant)
        if not (folder / MANIFEST).is_file():
            fused = " --fused" * (variant == "fused")
            raise Mistake(f"{folder}: no data; make them: python tools/study.py --prepare --docs FILE{fused}")
        return folder

    def settings(self, environ: Mapping[str, str]) -> dict[str, object]:
        """The settings that an environment comes to. Raises Mistake in the script's own words."""
        key = tuple(sorted(environ.items()))
        if key not in self._known:
            try:
                with contextlib.redirect_stderr(io.StringIO()):  # its notices come again with the run
                    self._known[key] = read_settings(environ).as_env()
            except tg.UserError as error:
                raise Mistake(str(error)) from None
        return self._known[key]


class Cell:
    """One run of a study: an arm with a seed; the control's run of that seed is what it may go on from."""

    def __init__(self, place: Place, arm: Arm, number: int, control: "Cell | None" = None):
        self.place, self.arm, self.number, self.control = place, arm, number, control
        self.folder = place.folder / arm.folder / f"seed{number}"
        self.result, self.failure, self._record = self.folder / "run", "", None
        other = place.numbers[(place.numbers.index(number) + 1) % len(place.numbers)]
        data = place.data_folder(other if arm.name == OTHER_BATCHES else number, arm.data)
        seed = number + CONFIRM_SEED * (place.kind == "confirm")
        self.environ = {**place.environ, **arm.settings, "DATA_PATH": str(data), "SEED": str(seed)}
        if arm.start:
            switch, name, file = CONTROLS_FILE[arm.start]
            self.environ |= {switch: "1", name: str(control.result / file)}
        self.settings = place.settings(self.environ)
        self._refuse_without_effect()
        self.environ |= {"ARTIFACT_DIR": str(self.result), "RUN_ID": f"{self.folder.parent.name}-{number}"}

    def _refuse_without_effect(self) -> None:
        """Raise Mistake for an arm that would be the control once more under another name."""
        arm = self.arm
        if unknown := [name for name in arm.settings if name not in KNOWN]:
            raise Mistake(f"arm {arm.name}: {unknown[0]} is no setting of a run (train_gpt.py --help)")
        settled = as_variables(tg.Config().as_env() | self.settings)
        lacks = {name: lacking(needs_of(name), settled) for name in arm.settings}
        if lacks and all(lacks.values()):
            name, terms = next(iter(lacks.items()))
            raise Mistake(f"arm {arm.name}: {name} has no effect without {' '.join(terms)}")
        same = self.control and not arm.data and self.settings == self.control.settings
        if same and arm.name not in NOISE_NAMES:
            raise Mistake(f"arm {arm.name}: its settings are the control's, so nothing would be compared")

    @property
    def record(self) -> RunRecord | None:
        """The finished run. Raises SeedError where it is of another script or other settings."""
        if self._record is None and (self.result / "result.json").is_file():
            command = (sys.executable, str(SCRIPT))
            made_by = Experiment(command, self.environ, SCRIPT, self.place.script, self.settings)
            self._record = finished(made_by, self.result)
        return self._record

    @property
    def settled(self) -> bool:
        """Whether nothing is left to be done here."""
        if self.control and self.arm.start and self.control.failure and not self.failure:
            self.failure = "the control's run, from which it goes on, has failed"
        return bool(self.failure) or self.record is not None

    def attempt(self) -> bool:
        """Run it, unless it is settled, must wait for the control's, or is another's. Whether it ran."""
        if self.settled or (self.arm.start and self.control.record is None):
            return False
        try:
            with locked(self.folder):
                if self.record is None:  # nobody was faster
                    shutil.rmtree(self.result, ignore_errors=True)  # what a dead run has left
                    self._run()
        except BusyError:
            return False
        return True

    def _run(self) -> None:
        began, console = time.monotonic(), self.folder / "console.txt"
        quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "start_new_session": True}
        with open(console, "wb") as output:
            command = [sys.executable, str(SCRIPT)]
            process = subprocess.Popen(command, env=self.environ, stdout=output, **quiet)
            with guarded(process):
                while process.poll() is None:
                    if Stop.signal:
                        return
                    time.sleep(0.1)
        if process.returncode not in (0, 3) or self.record is None:  # 3: a limit of the contest
            self.failure = f"exit code {process.returncode}: {last_line(console)}"
        told = self.failure or f"val_bpb {self.record.val_bpb:.5f}"
        print(f"{self.arm.name}, seed {self.number}: {told}, {time.monotonic() - began:.0f} s", flush=True)

    def summary(self) -> dict:
        """What the study keeps of the finished run."""
        record = self.record
        stages = {name: stage["val_bpb"] for name, stage in record.stages.items() if name in STAGES}
        facts = {"val_bpb": record.val_bpb, "stages": stages, "artifact_bytes": record.artifact_bytes}
        seconds = None if self.arm.start else training_seconds(record)
        return facts | {"seconds": seconds, "steps": record.steps}


def processor_clock(record: RunRecord) -> list[float]:
    """The processor's seconds behind each training step; empty of a run on a GPU."""
    path = record.path / "steps.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    clock = [json.loads(line).get("processor_seconds") for line in lines]
    return [] if None in clock else clock


def training_seconds(record: RunRecord) -> float | None:
    """Seconds of a training: of the processor or, on a GPU, of the clock. None: it was too short.

    The processor's clock is read behind each step, so the first step counts as the mean of the others.
    """
    clock = processor_clock(record)
    if not clock:
        return record.train_seconds
    return (clock[-1] - clock[0]) * len(clock) / (len(clock) - 1) if len(clock) > 1 else None


def cells_of(place: Place, arms: Sequence[Arm]) -> list[Cell]:
    """All runs, seed after seed, so that whole pairs come first; the first arm is the control."""
    found = []
    for number in place.numbers:
        control = Cell(place, arms[0], number)
        found += [control, *(Cell(place, arm, number, control) for arm in arms[1:])]
    return found


def run_all(cells: Sequence[Cell], jobs: int, until: float) -> None:
    """Run what is missing, `jobs` at once, beside other processes; begin nothing after `until`."""
    errors: list[Exception] = []

    def work() -> None:
        try:
            while not (Stop.signal or errors) and time.monotonic() < until:
                if any(cell.attempt() for cell in cells):
                    continue
                if all(cell.settled for cell in cells):
                    return
                time.sleep(0.3)  # the others are under way elsewhere
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():  # signals are taken between two joins
            thread.join(0.2)
    if errors:
        raise errors[0]


def same_seconds(cells: Sequence[Cell], ratios: Mapping[str, float]) -> list[Arm]:
    """Arms once more, with steps for as long as the control trains; `ratios` of their seconds to its."""
    first = {cell.arm.name: cell for cell in reversed(cells)}
    steps = {
        name: max(1, round(first[name].settings["ITERATIONS"] / ratio)) for name, ratio in ratios.items()
    }
    return [
        first[name].arm._replace(
            name=name + AT_SECONDS, settings={**first[name].arm.settings, "ITERATIONS": str(many)}
        )
        for name, many in steps.items()
    ]
