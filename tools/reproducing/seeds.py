"""Run one command for several seeds, one folder each; what is finished is not run again."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from runs import NAMES_AND_PLACES, RunRecord, Unfinished, changed_since_audit, given, read_run
from scripts import hash_on_disk
from systems.layout import as_set

ROOT = Path(__file__).resolve().parents[2]
# What a run resolves by itself: the device's choices and the micro-batches that fit into its memory.
RESOLVED = {"DEVICE", "ATTENTION_BACKEND", "TRITON_KERNELS", "COMPILE_BACKEND", "GRAD_ACCUM_STEPS"}


class RunFailed(Exception):
    """A command that ended without a result; the message, and its exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


class SeedError(ValueError):
    """A command that makes no sense, or runs that do not fit it; one line."""


class Experiment(NamedTuple):
    """A command, its script and house, the environment without a seed, the settings that these make of it."""

    command: tuple[str, ...]
    environ: Mapping[str, str]
    script: Path
    script_sha256: str
    settings: Mapping[str, object]

    @property
    def explicit(self) -> dict[str, str]:
        """The variables that are set by hand and make the experiment."""
        known = given(self.environ, self.settings)
        return {name: value for name, value in known.items() if name not in NAMES_AND_PLACES}

    @property
    def shown(self) -> str:
        """The command as one would type it, SEED left out."""
        return " ".join([*(f"{name}={value}" for name, value in self.explicit.items()), *self.command])

    @property
    def default_folder(self) -> Path:
        """Where its runs go: a folder for each preset and script, so that a changed script starts anew."""
        return Path("runs") / f"{self.settings['PRESET']}-{self.script_sha256[:8]}"


def plan(command: Sequence[str], environ: Mapping[str, str], preset: str = "") -> Experiment:
    """Ask a command's script what its settings will be. Raises `SeedError` with the script's own words."""
    scripts = [Path(part) for part in command if part.endswith(".py") and Path(part).is_file()]
    if not scripts:
        raise SeedError(f"-- {' '.join(command)}: names no Python script that exists")
    if not shutil.which(command[0]):
        raise SeedError(f"-- {' '.join(command)}: {command[0]} is no program")
    managed = ("SEED", "RUN_ID", "ARTIFACT_DIR")
    environ = {name: value for name, value in environ.items() if name not in managed}
    if preset:
        environ["PRESET"] = preset
    asked = [sys.executable, str(scripts[0]), "--show", "--json"]
    answer = subprocess.run(asked, env=environ, capture_output=True, text=True)
    try:
        settings = json.loads(answer.stdout.splitlines()[-1])["settings"]
    except (ValueError, IndexError, KeyError, TypeError):
        reason = (answer.stderr.strip() or "no answer").splitlines()[-1]
        raise SeedError(f"{scripts[0]} --show --json: {reason}") from None
    return Experiment(tuple(command), environ, scripts[0], hash_on_disk(scripts[0]), settings)


def finished(experiment: Experiment, folder: Path) -> RunRecord | None:
    """The finished run in a seed's folder, or in one of the folders NAME+2, ... that follow a crash.

    Raises `SeedError` where it is of another script or other settings.
    """
    for path in sorted(folder.parent.glob(f"{folder.name}*")):
        if path != folder and not path.name.startswith(f"{folder.name}+"):
            continue
        try:
            record = read_run(path)
        except Unfinished:
            continue
        if record.script_sha256 != experiment.script_sha256:
            raise SeedError(f"{path}: made by another script than {experiment.script}; choose another --out")
        for name, value in experiment.settings.items():
            told = record.settings.get(name)
            if name not in NAMES_AND_PLACES | RESOLVED and told != value:
                was, now = as_set(told), as_set(value)
                raise SeedError(f"{path}: ran with {name}={was}, now it is {now}; choose another --out")
        return record
    return None


def run_seed(experiment: Experiment, folder: Path, seed: int) -> RunRecord:
    """Run the command for a seed. Exit code 3, a limit exceeded, is a result too."""
    own = {"SEED": str(seed), "RUN_ID": f"{folder.parent.name}-{folder.name}", "ARTIFACT_DIR": str(folder)}
    code = subprocess.run(experiment.command, env={**experiment.environ, **own}).returncode
    record = finished(experiment, folder) if code in (0, 3) else None
    if record is None:
        reason = f"exit code {code}" if code else "no result.json"
        raise RunFailed(f"seed {seed}: {experiment.shown}: {reason}; the same command goes on here", code)
    return record


def run_missing(experiment: Experiment, folder: Path, seeds: Sequence[int], audit: bool) -> list[RunRecord]:
    """All seeds: those that are finished already, and the others run one after another; each is audited."""
    records = []
    for seed in seeds:
        path = folder / f"seed{seed}"
        record = finished(experiment, path)
        if record is None:
            print(f"reproduce: seed {seed}: {experiment.shown}", flush=True)
            record = run_seed(experiment, path, seed)
        else:
            print(f"reproduce: seed {seed}: finished before, {record.path}", flush=True)
        if audit and (record.audit is None or changed_since_audit(record)):
            judge = [sys.executable, ROOT / "tools" / "audit.py", record.path]
            others = ["--seeds", *(other.path for other in records)] if records else []
            code = subprocess.run([*judge, *others]).returncode
            if code == 2:
                raise RunFailed(f"seed {seed}: tools/audit.py {record.path}: exit code 2", code)
            record = read_run(record.path)
        records.append(record)
    return records
