"""The files of a run's log, in a folder that is the run's own."""

import contextlib
import io
import itertools
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness.rules import OUTPUTS
from train_gpt import Config, ConfigError, Ranks, RunLog, StepReport, Trainer, Watch, Worker, writing


def numbered(wanted: Path) -> Iterable[Path]:
    """The folder asked for, then name+2, name+3, ..."""
    wanted = wanted if wanted.name else wanted.resolve()
    return itertools.chain([wanted], (wanted.with_name(f"{wanted.name}+{i}") for i in itertools.count(2)))


def new_folder(wanted: Path, outputs: Sequence[str]) -> Path:
    """The folder asked for or, where outputs of an earlier run lie in it, the first free of name+2, ..."""
    for folder in numbered(wanted):
        try:
            (folder / "logs").mkdir(parents=True, exist_ok=True)
            if not any((folder / name).exists() for name in outputs):
                (folder / "metrics.jsonl").touch(exist_ok=False)  # whoever makes it owns the folder
                return folder
        except OSError as error:
            if not isinstance(error, FileExistsError):
                raise ConfigError(f"ARTIFACT_DIR={folder}: cannot write there ({error.strerror})") from None


class LogFiles(Watch):
    """All that a run tells, in logs/<RUN_ID>.txt, and its lines in metrics.jsonl as JSON.

    Rank 0 writes; the other ranks' logs go nowhere. Files that are there already grow.
    """

    def __init__(self, ranks: Ranks, folder: Path | None = None):
        self._is_main, self._folder, self._text, self._metrics = ranks.is_main, folder, None, None

    def see(self, kind: str, **facts: object) -> None:
        """Open the files once the folder is known; write what is told."""
        if kind == "folder":
            self._open(facts["log"], facts["cfg"])
        elif kind == "text":
            self._write(self._text, facts["text"])
        elif kind == "line":
            self._write(self._metrics, json.dumps({"stage": facts["stage"], **facts["values"]}))

    def _open(self, log: RunLog, cfg: Config) -> None:
        text = metrics = Path(os.devnull)
        if self._is_main:
            outputs = [Path(cfg.model_path).name, Path(cfg.quantized_model_path).name, *OUTPUTS]
            log.folder = self._folder or new_folder(log.folder, outputs)
            (log.folder / "result.json").unlink(missing_ok=True)  # of a resumed run: it is made again
            text, metrics = log.folder / "logs" / f"{log.run_id}.txt", log.folder / "metrics.jsonl"
        # A name that is no text in this locale comes as surrogates, and goes into the log as the bytes it is.
        options = {"encoding": "utf-8", "errors": "surrogateescape"}
        self._text, self._metrics = open(text, "a", **options), open(metrics, "a", **options)  # noqa: SIM115

    @staticmethod
    def _write(file: io.TextIOBase, line: str) -> None:
        with writing(file.name):
            print(line, file=file, flush=True)

    def close(self) -> None:
        """Close the files."""
        for file in (self._text, self._metrics):
            if file:
                file.close()


class StepFile(Watch):
    """Every training step, in steps.jsonl: the keys of the log's line `train`, of that step alone.

    Rank 0 writes a step when its numbers have come from the device, which on a GPU is a unit later: nothing
    waits for them here. (There the step at which a run was cut off may be missing once it has been resumed.)
    The log and metrics.jsonl have only some steps, for the ledger binds them line by line.
    """

    def __init__(self, ranks: Ranks):
        self._ranks, self._run, self._worker, self._file = ranks, None, None, None
        self._first, self._seconds = 0, None  # first step of this process; the clock at the last one

    def see(self, kind: str, **facts: object) -> None:
        """Know the run; write the steps that are left once the training is over."""
        if kind == "opened":
            self._run = facts["run"]
        elif kind == "finished" and facts["stage"] == "train" and self._file:
            self._tell(self._worker.reports)
            self.close()

    def unit(self, stage: str, worker: Worker) -> None:
        """Write the steps whose numbers are there."""
        if stage != "train" or not self._ranks.is_main:
            return
        if not self._file:
            self._open(worker)
        self._tell(worker.reports[: len(worker.reports) - self._ranks.on_gpu])

    def _open(self, worker: Trainer) -> None:
        """Begin the file, or go on with it behind the steps that the run was resumed after."""
        self._worker, self._first = worker, worker.steps
        path = self._run.log.folder / "steps.jsonl"
        with writing(path):
            lines = path.read_bytes().splitlines(keepends=True) if self._first > 1 and path.is_file() else []
            self._file = open(path, "wb")  # noqa: SIM115 - `close` closes it
            self._file.writelines(line for line in lines if (_step(line) or self._first) < self._first)
            self._file.flush()
        self._seconds = None if self._first > 1 else 0.0

    def _tell(self, reports: Sequence[StepReport]) -> None:
        for report in reports:
            if report.step < self._first:  # told already, or what stands for a step before the resume
                continue
            self._first, clock, tokens = report.step + 1, self._run.clock.elapsed("train"), 0.0
            if self._seconds is not None:
                tokens = self._run.cfg.train_batch_tokens / max(clock - self._seconds, 1e-9)
            self._seconds = clock
            values = {"step": report.step, "train_loss": report.train_loss, "grad_norm": report.grad_norm}
            values |= {"lr_multiplier": report.lr_multiplier, "train_seconds": clock}
            if not self._ranks.on_gpu:  # there they would say nothing of the step
                values["processor_seconds"] = time.process_time()  # differences count: it runs from the start
            values |= {"tokens_per_second": tokens} if tokens else {}
            with writing(self._file.name):
                self._file.write(json.dumps(values).encode() + b"\n")
                self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()
            self._file = None


def _step(line: bytes) -> int | None:
    """The step of a line; None where it is half a line."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return json.loads(line)["step"]
