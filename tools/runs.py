"""Read finished runs: their folders, their logs, and the published logs of the contest (PR #1493 to #1868).

    record = read("runs/demo-seed42")     # a run's folder, its result.json, or any log; see `RunRecord`

Three formats of published logs are known; they differ in a few lines and lack hashes, hardware and often
versions: `RunRecord.missing` says what. A file that is empty, cut off or foreign raises `ReadError`, a run
that has not ended `Unfinished`; both messages are one line that names the file.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scripts import FILE_LINE, LOGGED_SCRIPT, RULE, hash_told, sha256_of

TRAIN_LIMIT = EVAL_LIMIT = 600.0  # seconds
SIZE_LIMIT = 16_000_000  # decimal bytes, code plus model

# What may differ between the runs of one experiment: seed, names, places, and how it is watched.
NAMES_AND_PLACES = {"SEED", "RUN_ID", "ARTIFACT_DIR", "DATA_DIR", "DATA_PATH", "TOKENIZER_PATH", "AUDIT"}
NAMES_AND_PLACES |= {"WANDB_PROJECT", "TENSORBOARD_DIR"}
PUBLISHED_PLACES = NAMES_AND_PLACES | {"LOGFILE", "DATASETS_DIR", "MODEL_PATH", "QUANTIZED_MODEL_PATH"}
PUBLISHED_PLACES |= {"TRAIN_FILES", "VAL_FILES", "VAL_BYTES_FILES", "RANK", "LOCAL_RANK", "IS_MAIN_PROCESS"}

# What the script reads besides its settings: a part of PRESET, and their names in published commands.
ALSO_READ = ("SCALE", "SMEAR_GATE", "SMEAR_GATE_WIDTH", "GATE_WIDTH", "GATE_ATTN_OUT", "GATE_ATTN_SRC")
ALSO_READ += ("PARALLEL_RESIDUAL_START", "FUSED_CE_ENABLED")

Value = bool | int | float | str


class ReadError(ValueError):
    """A run or log that cannot be read; one line with its name."""


class Unfinished(ReadError):
    """A run that has not ended: no result.json yet."""


@dataclass(frozen=True)
class RunRecord:
    """One finished run. What the source does not tell is None, an empty mapping, or named in `missing`."""

    path: Path  # folder or file that was read
    form: str  # "run", "log", "pr1493 log", "pr1667 log" or "pr1851 log"
    name: str
    seed: int | None
    steps: int | None
    final_stage: str  # key of `stages` whose score counts
    stages: Mapping[str, Mapping[str, float]]  # untrained, step_N, prequant, quantised, sliding, ttt
    seconds: Mapping[str, float]  # train, calibrate, quantise, compress and the stages
    artifact_bytes: int | None
    code_bytes: int | None
    model_bytes: int | None
    settings: Mapping[str, Value]  # by the names of the environment variables
    environment: Mapping[str, Value]  # python, torch, device, ranks, commit, source_sha256, data_sha256 ...
    broken_limits: tuple[str, ...]
    legal: bool | None  # limits kept and every target scored; of a published log: its limits
    missing: tuple[str, ...]
    events: list[dict] = field(repr=False, default_factory=list)  # as in metrics.jsonl
    audit: Mapping | None = field(repr=False, default=None)  # audit.json
    result: Mapping = field(repr=False, default_factory=dict)  # result.json, {} of a log

    @property
    def val_loss(self) -> float:
        """Final score in nats per token."""
        return self.stages[self.final_stage]["val_loss"]

    @property
    def val_bpb(self) -> float:
        """Final score in bits per original byte."""
        return self.stages[self.final_stage]["val_bpb"]

    @property
    def nats_per_bit(self) -> float:
        """Nats per token of one bit per byte on this data: ln 2 * bytes per token."""
        return self.val_loss / self.val_bpb

    @property
    def targets(self) -> int | None:
        """Tokens that were scored."""
        return self.stages[self.final_stage].get("targets")

    @property
    def text_bytes(self) -> float | None:
        """Bytes of the text that was scored."""
        return self.targets and self.targets * self.nats_per_bit / math.log(2)

    @property
    def train_seconds(self) -> float | None:
        """Seconds of training."""
        return self.seconds.get("train")

    @property
    def calibrate_seconds(self) -> float | None:
        """Seconds of calibration: training time, it reads training data."""
        return self.seconds.get("calibrate")

    @property
    def eval_seconds(self) -> float | None:
        """Seconds of the final evaluation."""
        return self.seconds.get(self.final_stage)

    @property
    def script_sha256(self) -> str | None:
        """Checksum of the script that ran, with its house."""
        return hash_told(self.environment)

    @property
    def data_sha256(self) -> str | None:
        """Checksum of the data's manifest, which holds those of all shards."""
        return self.environment.get("data_sha256") or None

    @property
    def compared_settings(self) -> dict[str, Value]:
        """The settings that make an experiment."""
        places = NAMES_AND_PLACES if self.form in ("run", "log") else PUBLISHED_PLACES
        return {name: value for name, value in self.settings.items() if name not in places}

    @property
    def settings_sha256(self) -> str:
        """Checksum of `compared_settings`."""
        return _hash(self.compared_settings)


def given(environ: Mapping[str, str], settings: Iterable[str]) -> dict[str, str]:
    """The variables of an environment that the script reads: what a command that does the same must have."""
    return {name: environ[name] for name in (*settings, *ALSO_READ) if name in environ}


def config_hash(settings: Mapping[str, object]) -> str:
    """Hash of the settings that make an experiment: all but the seed, names and places."""
    return _hash({name: value for name, value in settings.items() if name not in NAMES_AND_PLACES})


def _hash(settings: Mapping[str, object]) -> str:
    return sha256_of(json.dumps(settings, sort_keys=True).encode())


def read(path: Path | str) -> RunRecord:
    """A run's folder, its result.json (or a copy NAME.json beside NAME.txt), or a log."""
    path = Path(path)
    if path.is_dir():
        return read_run(path)
    if path.suffix == ".txt":  # the result beside a log of ours tells more
        results = (path.with_suffix(".json"), path.parent.parent / "result.json")
        path = next((result for result in results if result.is_file()), path)
    return read_result(path) if path.suffix == ".json" else read_log(path)


def read_run(folder: Path | str) -> RunRecord:
    """The run of a folder, with its events and its audit if there is one.

    Raises `Unfinished` where there is no result.json yet, `ReadError` where files are damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ReadError(f"{folder}: no such folder")
    if not (folder / "result.json").is_file():
        raise Unfinished(f"{folder}: holds no result.json, the run has not ended")
    return read_result(folder / "result.json")


def read_result(path: Path | str) -> RunRecord:
    """A result: `result.json` in its folder, or a copy NAME.json with NAME.txt and NAME_audit.json beside it.

    The log, where there is one, must say the same as the result.
    """
    path = Path(path)
    result = _read_json(path)
    stages, settings = result.get("stages"), result.get("settings")
    if not (isinstance(stages, dict) and isinstance(settings, dict) and result.get("final_stage") in stages):
        raise ReadError(f"{path}: not the result of a run")
    in_folder = path.name == "result.json"
    stem = path.with_name(path.stem)
    audit = path.with_name("audit.json") if in_folder else stem.with_name(f"{stem.name}_audit.json")
    metrics = path.with_name("metrics.jsonl")
    log = path.parent / "logs" / f"{result.get('run')}.txt" if in_folder else path.with_suffix(".txt")
    events = read_events(metrics) if in_folder and metrics.is_file() else []
    if log.is_file():
        logged = read_log(log)
        events = events or logged.events
        final = next(event for event in reversed(logged.events) if event["stage"] == "final")
        for key, value in [("SEED", logged.seed), *final.items()]:
            told = settings.get("SEED") if key == "SEED" else result.get(key, value)
            if _shown(told) != _shown(value):
                raise ReadError(f"{path}: says {key} {told}, its log {log} {value}")
    return RunRecord(
        path=path.parent if in_folder else path,
        form="run",
        audit=_read_json(audit) if audit.is_file() else None,
        events=events,
        missing=_missing(result.get("environment", {}), audit.is_file()),
        **_fields(result),
    )


def _shown(value: Value) -> str:
    """A value as a log shows it."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _fields(result: Mapping) -> dict[str, object]:
    """The fields of a record that result.json holds."""
    final = result["final_stage"]
    seconds = {name: s["seconds"] for name, s in result["stages"].items() if "seconds" in s}
    return {
        "name": result.get("run", ""),
        "seed": result["settings"].get("SEED"),
        "steps": result.get("steps"),
        "final_stage": final,
        "stages": result["stages"],
        "seconds": seconds | result.get("seconds", {}),
        **{key: result.get(key) or None for key in ("artifact_bytes", "code_bytes", "model_bytes")},
        "settings": result["settings"],
        "environment": result.get("environment", {}),
        "broken_limits": tuple(result.get("broken_limits", ())),
        "legal": result.get("legal"),
        "result": result,
    }


def _missing(environment: Mapping, audited: bool) -> tuple[str, ...]:
    needs = {"script hash": "source_sha256", "data hash": "data_sha256", "hardware": "device"}
    needs |= {"versions": "torch"}
    absent = [name for name, key in needs.items() if not environment.get(key)]
    return (*absent, *([] if audited else ["audit"]))


def read_events(path: Path | str) -> list[dict]:
    """The events of metrics.jsonl, also of a run under way or a dead one: half a last line is left out."""
    events = []
    lines = _read_text(Path(path)).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            events.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ReadError(f"{path}: line {number} is not JSON") from None
    return events


def read_log(path: Path | str) -> RunRecord:
    """A log: ours (`logs/<RUN_ID>.txt`) or a published one. Raises `ReadError` where it is not whole."""
    path = Path(path)
    text = _read_text(path)
    if not text.strip():
        raise ReadError(f"{path}: empty")
    if "\nHyperparameters:\n" in f"\n{text}":
        return _read_published(path, text)
    if re.match(r"PRESET=\w", text) and f"\n{RULE}\n" in text:
        return _read_ours(path, text)
    raise ReadError(f"{path}: neither a log of train_gpt.py nor a published one")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ReadError(f"{path}: cannot be read ({error.strerror})") from None


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(_read_text(path))
    except ValueError as error:
        raise ReadError(f"{path}: not JSON, or cut off ({error})") from None
    if not isinstance(value, dict):
        raise ReadError(f"{path}: not a JSON object")
    return value


def _cut_off(path: Path, text: str, wanted: str) -> ReadError:
    last = text.rstrip("\n").rpartition("\n")[2][:60]
    return ReadError(f"{path}: cut off, without {wanted}; its last line is {last!r}")


def parse_value(text: str) -> Value:
    """A number, True or False where the text is one, else the text."""
    if text in ("True", "False"):
        return text == "True"
    if re.fullmatch(r"-?\d{1,19}", text):
        return int(text)
    if re.fullmatch(r"-?\d+(\.\d+)?(e[+-]?\d{1,3})?|nan|-?inf", text):
        return float(text)
    return text


# -- our logs


EVENT = re.compile(r"([a-z]\w*) (\w+:.*)")
PAIR = re.compile(r"(\w+):(.*?)(?= \w+:|$)")


def _read_ours(path: Path, text: str) -> RunRecord:
    head, _, rest = text.partition(f"{RULE}\n")
    source, whole, rest = rest.partition(f"\n{RULE}\n")
    if not whole:
        raise _cut_off(path, text, "the end of the script's source")
    settings = _our_settings(head)
    files = rest.partition("\n==== end\n")[0]
    rest = LOGGED_SCRIPT.sub("", f"{RULE}\n{RULE}\n{rest}")  # also where a resumed run logged it once more
    events = [event for line in rest.splitlines() if (event := _event(line))]
    final = next((event for event in reversed(events) if event["stage"] == "final"), None)
    if final is None or not isinstance(final.get("legal"), bool) or not text.endswith("\n"):
        raise _cut_off(path, text, "a whole line `final val_bpb:... legal:...`")
    stages = _scores(events)
    environment = _start(events)
    environment.setdefault("source_sha256", sha256_of(source.encode()))
    environment["house_sha256"] = dict(FILE_LINE.findall(files))
    seconds = {name: stage["seconds"] for name, stage in stages.items()}
    seconds |= {"train": final["train_seconds"], "calibrate": final["calibrate_seconds"]}
    scored = next(name for name in ("ttt", "sliding", "quantised", "prequant") if name in stages)
    return RunRecord(
        path=path,
        form="log",
        name=path.stem,
        seed=settings.get("SEED"),
        steps=None,
        final_stage=scored,
        stages=stages,
        seconds=seconds,
        **{key: final.get(key) or None for key in ("artifact_bytes", "code_bytes", "model_bytes")},
        settings=settings,
        environment=environment,
        broken_limits=tuple(e["text"] for e in events if e["stage"] == "limit"),
        legal=final["legal"],
        missing=("steps", *_missing(environment, False), "digits beyond six"),
        events=events,
    )


def read_unfinished(folder: Path | str) -> RunRecord:
    """What there is of a run without result.json: one under way, or dead. It has no final stage."""
    folder = Path(folder)
    if not (folder / "metrics.jsonl").is_file():
        raise ReadError(f"{folder}: holds no metrics.jsonl, not the folder of a run")
    events = read_events(folder / "metrics.jsonl")
    logs = sorted((folder / "logs").glob("*.txt"))
    settings = _our_settings(_read_text(logs[0]).partition(f"{RULE}\n")[0]) if logs else {}
    stages, environment = _scores(events), _start(events)
    trained = [event for event in events if event["stage"] == "train"]
    size = next((event for event in events if event["stage"] == "size"), {})
    seconds = {name: stage["seconds"] for name, stage in stages.items()}
    seconds |= {"train": trained[-1]["train_seconds"]} if trained else {}
    return RunRecord(
        path=folder,
        form="run",
        name=logs[0].stem if logs else folder.name,
        seed=settings.get("SEED"),
        steps=trained[-1]["step"] if trained else None,
        final_stage="",
        stages=stages,
        seconds=seconds,
        **{key: size.get(key) for key in ("artifact_bytes", "code_bytes", "model_bytes")},
        settings=settings,
        environment=environment,
        broken_limits=(),
        legal=None,
        missing=("result.json", *_missing(environment, False)),
        events=events,
    )


def _our_settings(head: str) -> dict[str, Value]:
    lines = (line.partition("    # default ")[0].partition("=") for line in head.splitlines())
    return {name: parse_value(value) for name, _, value in lines}


def _scores(events: Iterable[dict]) -> dict[str, dict]:
    return {e["stage"]: e for e in events if {"val_loss", "val_bpb", "targets"} <= e.keys()}


def _start(events: Iterable[dict]) -> dict[str, Value]:
    """The environment that the event of the start tells."""
    starts = [event for event in events if event["stage"] == "start"]
    return {k: v for k, v in starts[-1].items() if k not in ("stage", "run", "folder")} if starts else {}


def _event(line: str) -> dict | None:
    """`stage key:value key:value` as in metrics.jsonl; None for any other line."""
    found = EVENT.fullmatch(line)
    if not found:
        return None
    stage, pairs = found.groups()
    if pairs.startswith("text:"):
        return {"stage": stage, "text": pairs.removeprefix("text:")}
    return {"stage": stage} | {key: parse_value(value) for key, value in PAIR.findall(pairs)}


# -- published logs

# Their names of what we call prequant, quantised, sliding and ttt.
SCORES = {
    "pre-quantization post-ema": "prequant",
    "quantized": "quantised",
    "quantized_sliding_window": "sliding",
    "quantized_ttt": "ttt",
    "quantized_ttt_lora": "ttt",
    "quantized_ttt_phased": "ttt",
}
SCORE = re.compile(r"(?m)^(?:diagnostic )?([\w -]+?) val_loss:([\d.]+) val_bpb:([\d.]+) eval_time:(\d+)ms$")
STEP = re.compile(r"(?m)^(\d+)/\d+ train_loss: ([\d.]+) train_time: ([\d.]+)m tok/s: (\d+)$")
VALIDATION = re.compile(r"(?m)^(\d+)/\d+ val_loss: ([\d.]+) val_bpb: ([\d.]+)$")
# After the adaptation there is a last line with its time; PR #1493's logs end with the score itself.
FORMATS = {
    "quantized_ttt": "pr1493 log",
    "quantized_ttt_lora": "pr1667 log",
    "quantized_ttt_phased": "pr1851 log",
}


def _read_published(path: Path, text: str) -> RunRecord:
    settings = _published_settings(text)
    form, final, stages = _published_scores(path, text, settings)
    code = _number(text, r"^Code size(?: \(compressed\))?: (\d+) bytes$", int)
    size = _number(text, r"^Total submission size quantized\+\w+: (\d+) bytes$", int)
    times = {
        "train": _number(text, r"^stopping_early: wallclock_cap train_time: (\d+)ms ", int, 1000),
        "calibrate": _number(text, r"^GPTQ:collected \d+ Hessians in ([\d.]+)s$", float),
        "quantise": _number(text, r"^GPTQ:quantized in ([\d.]+)s$", float),
        "compress": _number(text, r"^GPTQ:compressed\+saved in ([\d.]+)s$", float),
    }
    seconds = {name: stage["seconds"] for name, stage in stages.items()}
    seconds |= {name: value for name, value in times.items() if value is not None}
    environment = _published_environment(text, settings)
    figures = {"training seconds": times["train"], "calibration seconds": times["calibrate"]}
    figures |= {"artifact bytes": size, "code bytes": code}
    missing = [name for name, value in figures.items() if value is None]
    broken = _broken_limits(seconds, final, size)
    return RunRecord(
        path=path,
        form=form,
        name=str(settings.get("RUN_ID", path.stem)),
        seed=settings.get("SEED"),
        steps=_number(text, r"^stopping_early: .* step: (\d+)/", int),
        final_stage=final,
        stages=stages,
        seconds=seconds,
        artifact_bytes=size,
        code_bytes=code,
        model_bytes=size - code if size and code else None,
        settings=settings,
        environment=environment,
        broken_limits=tuple(broken),
        legal=None if missing else not broken,
        missing=(*missing, *_missing(environment, False)),
        events=_published_events(text),
    )


def _published_scores(path: Path, text: str, settings: Mapping) -> tuple[str, str, dict[str, dict]]:
    """Format, name of the final stage, and the stages. Raises `ReadError` where one of them is missing."""
    targets = _number(text, r"^val_tokens: (\d+)$", int)
    stages, form = {}, "pr1851 log"
    for name, loss, bpb, milliseconds in SCORE.findall(text):
        if name in SCORES:
            form = FORMATS.get(name, form)
            stage = {"val_loss": float(loss), "val_bpb": float(bpb), "seconds": int(milliseconds) / 1000}
            stages[SCORES[name]] = stage | ({"targets": targets} if targets else {})
    evaluators = {"TTT_ENABLED": "ttt", "SLIDING_WINDOW_ENABLED": "sliding"}
    chosen = [stage for name, stage in evaluators.items() if settings.get(name)] + ["quantised"]
    absent = [stage for stage in ("prequant", *reversed(chosen)) if stage not in stages]
    timed = form == "pr1493 log" or re.search(r"(?m)^total_eval_time:[\d.]+s$", text)
    if absent or not timed or not text.endswith("\n"):
        raise _cut_off(path, text, f"the score of {', '.join(absent)}" if absent else "a whole last line")
    return form, chosen[0], stages


def _published_settings(text: str) -> dict[str, Value]:
    block = f"\n{text}".partition("\nHyperparameters:\n")[2]
    lines = re.match(r"(?:  \w+:.*\n)*", block)[0].splitlines()
    pairs = (line.strip().partition(":") for line in lines)
    return {name.upper(): parse_value(value.strip()) for name, _, value in pairs}


def _published_environment(text: str, settings: Mapping[str, Value]) -> dict[str, Value]:
    python = re.search(r"(?m)^Running Python (\S+)", text)
    torch = re.search(r"(?m)^Running PyTorch (\S+)", text)
    uncompressed = _number(text, r"^Code size(?: \(uncompressed\))?: (\d+) bytes$", int)
    told = {
        "python": python and python[1],
        "torch": torch and torch[1],
        "ranks": settings.get("WORLD_SIZE"),
        "source_bytes": uncompressed,
        "train_shards": _number(text, r"^train_shards: (\d+)$", int),
    }
    return {name: value for name, value in told.items() if value}


def _broken_limits(seconds: Mapping[str, float], final: str, size: int | None) -> list[str]:
    """The limits of the contest that a run exceeded; calibration is training time."""
    training = seconds.get("train", 0.0) + seconds.get("calibrate", 0.0)
    checks = {
        f"training and calibration took {training:.1f} s, limit {TRAIN_LIMIT:g}": training > TRAIN_LIMIT,
        f"evaluation took {seconds[final]:.1f} s, limit {EVAL_LIMIT:g}": seconds[final] > EVAL_LIMIT,
        f"artifact has {size} bytes, limit {SIZE_LIMIT}": (size or 0) > SIZE_LIMIT,
    }
    return [reason for reason, broken in checks.items() if broken]


def _published_events(text: str) -> list[dict]:
    events = []
    for step, loss, minutes, rate in STEP.findall(text):
        figures = {"train_loss": float(loss), "train_seconds": round(60 * float(minutes), 1)}
        events.append({"stage": "train", "step": int(step), **figures, "tokens_per_second": int(rate)})
    for step, loss, bpb in VALIDATION.findall(text):
        name = f"step_{step}" if int(step) else "untrained"
        events.append({"stage": name, "val_loss": float(loss), "val_bpb": float(bpb)})
    return events


def _number(text: str, pattern: str, kind: type, divisor: int = 1) -> float | None:
    found = re.search(pattern, text, re.M)
    if not found:
        return None
    return kind(found[1]) / divisor if divisor > 1 else kind(found[1])
