"""A run as the report needs it: the record of `runs.py`, and what only the model files tell."""

import datetime
import functools
import json
import math
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import runs  # noqa: E402
import train_gpt as tg  # noqa: E402
from harness.readers import load_weights, read_artifact  # noqa: E402
from systems.layout import strict_json  # noqa: E402

LONGEST_LABEL = 24
GROUPS = ("code", "embeddings", "attention", "MLP", "scales", "rest")
ROLES = {  # flat names of matrices in a layer -> role
    "attn.c_q": "Q",
    "attn.c_k": "K",
    "attn.c_v": "V",
    "attn.proj": "attention out",
    "mlp.fc": "MLP up",
    "mlp.proj": "MLP down",
}


class Missing(Exception):
    """A run lacks what a part of the report shows; the reason."""


class MatrixError(NamedTuple):
    """Quantisation error of a stored matrix."""

    layer: int | None  # None: embedding and head
    role: str
    error: float


class Run:
    """A run, finished or not. The properties raise `Missing` for what is not there."""

    def __init__(self, path: Path):
        try:
            self.record = runs.read(path)
        except runs.Unfinished:
            self.record = runs.read_unfinished(path)
        self.folder = path if path.is_dir() else None
        self.name = self.label = path.resolve().name if self.folder else path.stem
        if len(self.label) > LONGEST_LABEL:  # the time of its start, which tells it from others, is the end
            self.label = f"{self.name[:12]}…{self.name[-11:]}"

    @property
    def finished(self) -> bool:
        """Whether there is a result."""
        return bool(self.record.final_stage)

    @property
    def state(self) -> str:
        """Finished, or since when nothing has been heard of it; and what its source does not tell."""
        return "; ".join([self._progress(), *self.told])

    @property
    def told(self) -> list[str]:
        """What must be known of its numbers, and what its source does not tell."""
        told = [*self.record.notices, *self.record.broken_limits]
        return told + [f"not told: {', '.join(self.record.missing)}"] * bool(self.record.missing)

    def _progress(self) -> str:
        if self.finished:
            return "finished"
        silence = time.time() - (self.folder / "metrics.jsonl").stat().st_mtime
        last = self.record.events[-1]["stage"] if self.record.events else "nothing"
        return f"not finished: under way or dead; last event '{last}' {silence / 60:.0f} minutes ago"

    @property
    def parameters(self) -> int | None:
        """Parameters of the model, as logged."""
        return next(
            (event.get("parameters") for event in self.record.events if event["stage"] == "model"), None
        )

    @property
    def ended(self) -> str:
        """When the last file of the run was written."""
        result = self.folder and self.folder / "result.json"
        if not result or not result.is_file():
            return "-"
        return f"{datetime.datetime.fromtimestamp(result.stat().st_mtime):%Y-%m-%d %H:%M}"

    @property
    def by_score(self) -> tuple[bool, float]:
        """The best score comes first, what has none last."""
        return not self.finished, self.record.val_bpb if self.finished else 0.0

    @property
    def scored_text(self) -> tuple[object, ...]:
        """What tells the scored text from another: only scores of the same one can be compared."""
        stage = self.record.stages[self.record.final_stage]
        return tuple(stage.get(key) for key in ("documents", "targets", "bytes"))

    @functools.cached_property
    def steps(self) -> list[dict]:
        """Every training step where the run kept them (steps.jsonl), else those of the log."""
        path = self.folder and self.folder / "steps.jsonl"
        if path and path.is_file() and (told := runs.read_events(path)):
            return told
        return [event for event in self.record.events if event["stage"] == "train"]

    def curve(self, key: str) -> tuple[list[int], list[float], list[float]]:
        """Steps, seconds and values of a key of the training steps."""
        points = [step for step in self.steps if key in step]
        if not points:
            raise Missing(f"no {key} of training steps")
        return (
            [point["step"] for point in points],
            [point["train_seconds"] for point in points],
            [point[key] for point in points],
        )

    def validations(self) -> list[tuple[int, float]]:
        """Step and val_loss of the validations while training."""
        names = ((re.fullmatch(r"step_(\d+)", event["stage"]), event) for event in self.record.events)
        return sorted((int(name[1]), event["val_loss"]) for name, event in names if name)

    def waterfall(self) -> list[tuple[str, float]]:
        """Stages after training with their val_bpb; before that, those of training."""
        stages = self.record.stages
        names = [name for name in ("prequant", "quantised", "sliding", "ttt") if name in stages]
        if not names:
            names = [name for name in stages if name == "untrained" or name.startswith("step_")]
        if not names:
            raise Missing("nothing has been scored yet")
        return [(name, stages[name]["val_bpb"]) for name in names]

    # -- files

    def _file(self, setting: str, default: str) -> Path:
        name = Path(str(self.record.settings.get(setting) or default)).name
        if self.folder is None:
            raise Missing("only a log, without the run's files")
        if not (self.folder / name).is_file():
            raise Missing(f"no file {name} in the run's folder")
        return self.folder / name

    @functools.cached_property
    def blob(self) -> bytes:
        """The artifact's model half."""
        return self._file("QUANTIZED_MODEL_PATH", "final_model.int6.ptz").read_bytes()

    @functools.cached_property
    def tensors(self) -> dict[str, tg.QuantizedTensor]:
        """Stored tensors by name, read by the script's own reader."""
        try:
            return read_artifact(self.blob, tg.Config())[1]
        except tg.UserError as error:
            raise Missing(str(error)) from None

    @functools.cached_property
    def byte_groups(self) -> dict[str, int]:
        """Bytes of GROUPS; their sum is the artifact.

        The compressed size of a stream is exact. Matrices of several groups in one stream share it by the
        entropy of their levels.
        """
        records = self.tensors
        if self.blob.startswith(tg.ARTIFACT_MAGIC):
            header, head = _header(self.blob)
            cfg, index = _codec(self.blob), dict(header["streams"])
            layout = tg.artifact_streams(header["tensors"], cfg)
        else:  # a published file is one stream
            head, index = 0, {"": len(self.blob)}
            layout = {"": [_Part(name, key) for name, r in records.items() for key in r.arrays]}
        groups: Counter = Counter({name: 0.0 for name in GROUPS})
        groups["code"] = self.record.code_bytes or 0
        groups["rest"] = head
        for stream, parts in layout.items():
            bits = [_bits(records[part.name].arrays[part.key].numpy()) for part in parts]
            for part, share in zip(parts, bits, strict=True):
                groups[_group(part.name, part.key)] += index[stream] * share / max(sum(bits), 1e-9)
        whole = {name: math.floor(size) for name, size in groups.items()}
        whole["rest"] += len(self.blob) + groups["code"] - sum(whole.values())
        return whole

    @functools.cached_property
    def matrix_errors(self) -> list[MatrixError]:
        """Of each quantised matrix: norm of what was lost / norm of the matrix, in full precision."""
        try:
            state = load_weights(self._file("MODEL_PATH", "final_model.pt"))
            layers = self.record.settings.get("NUM_LAYERS") or 1 + max(map(_layer, self.tensors))
            flat = tg.flatten_banks(state, int(layers))
        except (tg.UserError, KeyError, ValueError, RuntimeError) as error:
            raise Missing(str(error)) from None
        errors = []
        for name, record in self.tensors.items():
            if record.kind != "fp16":
                weight = flat[name].float()
                if weight.shape != record.shape:
                    raise Missing("final_model.pt and the artifact are of different models")
                lost = float((record.dequantize() - weight).norm() / weight.norm().clamp_min(1e-12))
                layer = _layer(name)
                errors.append(MatrixError(None if layer < 0 else layer, _role(name), lost))
        if not errors:
            raise Missing("no matrix is quantised")
        return errors

    @functools.cached_property
    def weighted_errors(self) -> dict[str, float]:
        """GPTQ's own error tr(E H E^T) of each matrix, as logged."""
        return {e["name"]: e["weighted_error"] for e in self.record.events if e["stage"] == "matrix"}

    @functools.cached_property
    def gains(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each adapted document: targets, loss quantised and after adaptation (nats per token)."""
        if self.folder is None or not (self.folder / "documents.json").is_file():
            raise Missing("no documents.json: the run had AUDIT=0, or has not ended")
        if "ttt" not in self.record.stages:
            raise Missing("no test-time training")
        try:
            found = strict_json((self.folder / "documents.json").read_text(encoding="utf-8"))
            lengths = np.array([length - 1 for _, length in found["documents"]])
            before, after = (np.array(found["losses"][stage]) for stage in ("quantised", "ttt"))
            if not before.shape == after.shape == lengths.shape:
                raise ValueError("documents and losses differ in number")
        except (ValueError, TypeError, KeyError) as error:
            raise Missing(f"documents.json: {error} is missing or damaged") from None
        scored = after > 0  # a sample leaves the others at 0
        lengths, before, after = lengths[scored], before[scored], after[scored]
        return lengths, before / lengths, after / lengths


class _Part(NamedTuple):
    name: str
    key: str


def _header(blob: bytes) -> tuple[dict, int]:
    """Header of our container, and the bytes that it and the prefix take."""
    length = tg.PREFIX.unpack_from(blob)[3]
    packed = blob[tg.PREFIX.size : tg.PREFIX.size + length]
    header = json.loads(tg.decompress(packed, _codec(blob), tg.HEADER_LIMIT))
    return header, tg.PREFIX.size + length


def _codec(blob: bytes) -> tg.Config:
    """Settings with the codec of our container."""
    return tg.Config(compressor=tg.CODECS[tg.PREFIX.unpack_from(blob)[2]])


def _bits(array: np.ndarray) -> float:
    """Bits of an array: by the entropy of its values if they are levels, else as they are stored."""
    if array.dtype != np.int8:
        return 8.0 * array.nbytes
    counts = np.bincount(array.view(np.uint8).ravel())
    counts = counts[counts > 0]
    return float(counts @ np.log2(counts.sum() / counts))


def _group(name: str, key: str) -> str:
    if key in ("scale", "gs", "columns"):
        return "scales"
    if key not in ("q", "gq"):  # corrections, control tensors
        return "rest"
    if name.startswith(("tok_emb", "lm_head")):
        return "embeddings"
    return "attention" if ".attn." in name else "MLP" if ".mlp." in name else "rest"


def _layer(name: str) -> int:
    found = re.match(r"blocks\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _role(name: str) -> str:
    inner = re.sub(r"^blocks\.\d+\.|\.weight$", "", name)
    return ROLES.get(inner, inner)
