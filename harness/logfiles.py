"""The files of a run's log, in a folder that is the run's own."""

import io
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness.rules import OUTPUTS
from train_gpt import Config, ConfigError, Ranks, RunLog, Watch, writing


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
