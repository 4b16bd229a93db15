"""Checkpoint files, and the unfinished run that a command goes on with."""

import fcntl
import hashlib
import io
import itertools
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from harness.logfiles import numbered
from harness.rules import GROWING, OUTPUTS
from systems.layout import WITHOUT_EFFECT, as_set
from systems.plain_text import tokenizer_file
from train_gpt import (
    ArtifactError,
    Config,
    ConfigError,
    find_file,
    shard_paths,
    write_whole,
)

MAGIC = b"PGOLFKP1"
MOST_TOLD = 3  # of the unfinished runs that are passed over


def write_checkpoint(path: Path, values: object, tensors: object = None) -> None:
    """Write a checkpoint: magic, SHA-256 of the rest, `torch.save` of values (as JSON) and tensors."""
    buffer = io.BytesIO()
    torch.save({"values": json.dumps(values), "tensors": tensors}, buffer)
    body = buffer.getbuffer()
    write_whole(path, b"".join([MAGIC, hashlib.sha256(body).digest(), body]))


def read_checkpoint(path: Path) -> tuple[dict, object]:
    """Values and tensors (on the CPU) of a checkpoint; nothing in it is executed.

    Raises:
        ArtifactError: not readable, not whole or not one of ours.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from None
    body = memoryview(data)[40:]
    if data[:8] != MAGIC or hashlib.sha256(body).digest() != data[8:40]:
        raise ArtifactError(f"{path}: damaged, not a whole checkpoint")
    try:
        state = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        return json.loads(state["values"]), state["tensors"]
    except Exception:  # a right checksum over something else: torch raises half a dozen types
        raise ArtifactError(f"{path}: not a checkpoint of this script") from None


class CheckpointFolder:
    """Checkpoints of one kind in a folder, numbered; the last two are kept."""

    def __init__(self, folder: Path, kind: str):
        self.folder, self.kind = folder, kind

    def paths(self) -> list[Path]:
        """The files, oldest first."""
        return sorted(self.folder.glob(f"{self.kind}.*.ckpt"))

    def add(self, values: object, tensors: object = None) -> Path:
        """Write the next one, then remove all but two. Raises RunError where it cannot be written."""
        paths = self.paths()
        number = int(paths[-1].name.split(".")[-2]) + 1 if paths else 1
        path = self.folder / f"{self.kind}.{number:06}.ckpt"
        write_checkpoint(path, values, tensors)
        for old in self.paths()[:-2]:
            old.unlink()
        return path

    def readable(self, damaged: dict[Path, str]) -> Iterable[tuple[dict, object]]:
        """Values and tensors, newest first; what is damaged is collected with its message."""
        for path in reversed(self.paths()):
            try:
                yield read_checkpoint(path)
            except ArtifactError as error:
                damaged[path] = str(error)


def file_digest(path: Path, blocks: int = 64, size: int = 1 << 16) -> str:
    """Hash of a file's size and bytes (all up to 4 MiB, else blocks spread over it); empty: no file."""
    if not path.is_file():
        return ""
    length = path.stat().st_size
    digest = hashlib.sha256(str(length).encode())
    with open(path, "rb") as file:
        for block in range(blocks):
            file.seek(block * max(size, (length - size) // (blocks - 1)))
            digest.update(file.read(size))
    return digest.hexdigest()


def lock_folder(folder: Path) -> int | None:
    """Lock a folder for as long as this process lives; None where another process has it."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def clear_beginning(folder: Path, cfg: Config) -> bool:
    """Clear a folder in which a run was cut off before its first checkpoint; False where it made outputs."""
    names = {Path(cfg.model_path).name, Path(cfg.quantized_model_path).name, *OUTPUTS} - {*GROWING}
    if any((folder / name).exists() for name in names):
        return False
    for path in [
        *(folder / name for name in GROWING),
        *(folder / "logs").glob("*.txt"),
        *folder.glob(".*.tmp"),
    ]:
        path.unlink(missing_ok=True)
    return True


def unlike(now: Mapping[str, object], then: Mapping[str, object]) -> list[str]:
    """The settings that are others than they were, each with both values."""
    rows = []
    for name, value in now.items():
        here, there = as_set(value), as_set(then.get(name))
        if here != there:
            rows.append(f"{name}={here} there {'nothing' if there == '' else there}")
    return rows


class UnfinishedRun:
    """Which unfinished run a command goes on with: its folder, locked, and its newest whole checkpoint."""

    def __init__(self, cfg: Config, sources: Mapping[str, bytes]):
        self.cfg, self.folder, self.lock = cfg, None, None
        self._passed_over: list[str] = []  # unfinished runs without a name, and why they are left as they are
        self.values: dict = {}
        self.damaged: dict[Path, str] = {}
        self.files: dict[str, Path] = {}  # name in the identity -> where it lies now
        self.identity = self._identity(sources)
        if cfg.resume:
            self._find()

    def _identity(self, sources: Mapping[str, bytes]) -> dict[str, object]:
        """What the result of a run depends on: settings, hashes of the house, the data and given files.

        Files go by what they are for, not by where they lie; a device by what it comes to. "places" has the
        settings that no number depends on: they may be others.
        """
        cfg, env = self.cfg, self.cfg.as_env()
        inputs = ["quantized_model_path"] * cfg.ttt_eval_only + ["model_path"] * cfg.quantize_only
        model = find_file(cfg, "model_path", needed=False) if cfg.prequant_only else None
        if model and not self._is_unfinished(model.parent):
            inputs.append("model_path")
        splits = ["train"] * (cfg.quantize_only or not inputs) + ["val", "val_bytes"]
        shards = [path for split in splits for path in shard_paths(cfg.data_folder, split)]
        self.files = {path.name: path for path in (*shards, cfg.data_folder / "manifest.json")}
        self.files["tokenizer"] = tokenizer_file(cfg)
        given = {name.upper(): find_file(cfg, name, needed=False) for name in inputs}
        self.files |= {name: path for name, path in given.items() if path}
        known = {name: hashlib.sha256(text).hexdigest() for name, text in sources.items()}
        known |= {name: file_digest(path) for name, path in self.files.items()}
        settings = {name: value for name, value in env.items() if name not in WITHOUT_EFFECT}
        settings["DEVICE"] = "cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu"
        outputs = {"MODEL_PATH", "QUANTIZED_MODEL_PATH"} - given.keys()
        settings |= {name: Path(env[name]).name for name in sorted(outputs)}
        places = {name: env[name] for name in sorted(WITHOUT_EFFECT - {"RESUME"})}
        return {"settings": settings, "files": known, "places": places}

    @staticmethod
    def _is_unfinished(folder: Path) -> bool:
        """Whether a folder's outputs are those of a run that is still to go on: none of them is an input."""
        values, _ = next(iter(CheckpointFolder(folder / "checkpoints", "run").readable({})), ({}, None))
        return bool(values) and "ended" not in values

    def _find(self) -> None:
        """Claim the folder that is named or, without a name, that of the newest unfinished run."""
        cfg = self.cfg
        if not (cfg.artifact_dir or cfg.run_id):
            folders = [path for path in Path("runs").glob("*/checkpoints") if path.is_dir()]
            folders.sort(key=lambda path: -path.stat().st_mtime)
            any(self._claim(path, named=False) for path in folders)
            for text in self._passed_over[:MOST_TOLD] if self.folder is None else ():
                print(f"train_gpt.py: notice: {text}", file=sys.stderr)
            return
        wanted = Path(cfg.artifact_dir or Path("runs") / cfg.run_id)
        there = [folder / "checkpoints" for folder in itertools.takewhile(Path.exists, numbered(wanted))]
        folders = [path for path in there if path.is_dir()]
        if folders:
            self._claim(folders[-1], named=True)

    def _claim(self, folder: Path, named: bool) -> bool:
        """Lock a folder and take its newest checkpoint, if that is this command's.

        Raises ConfigError where a folder that was named holds an unfinished run that cannot go on.
        """
        lock, damaged, values = lock_folder(folder), {}, {}
        if lock is not None:
            values, _ = next(iter(CheckpointFolder(folder, "run").readable(damaged)), ({}, None))
        others = self._differences(values["identity"], named) if values else []
        begun = named and lock is not None and not (values or damaged)
        if (begun and clear_beginning(folder.parent, self.cfg)) or (
            values and not others and (named or "ended" not in values)
        ):
            self.folder, self.lock, self.values, self.damaged = folder.parent, lock, values, damaged
            return True
        reason = "; ".join(damaged.values()) if lock is not None else "another process is at work there"
        if lock is not None:
            os.close(lock)
        reason = f"begun with other settings or data: {'; '.join(others[:6])}" if others else reason
        if named and reason and "ended" not in values:
            raise ConfigError(f"{folder.parent}: this run cannot go on, {reason} (RESUME=0 begins a new one)")
        if lock is not None and reason and "ended" not in values:
            self._passed_over.append(f"{folder.parent}: unfinished, left as it is, {reason}")
        return False

    def _differences(self, then: Mapping, named: bool) -> list[str]:
        now, files = self.identity, self.identity["files"]
        rows = unlike(now["settings"], then["settings"])
        if not named:  # whoever gave a run a name goes on with it by its name
            names = ("RUN_ID", "ARTIFACT_DIR")
            rows += unlike(dict.fromkeys(names, ""), then.get("places", {}))
        for name in sorted(files.keys() | then["files"].keys()):
            differs = files.get(name) != then["files"].get(name)
            rows += [f"{self.files.get(name, name)} differs"] * differs
        return rows
