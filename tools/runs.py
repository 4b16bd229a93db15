"""Read finished runs: their folders, their logs, and the published logs of the contest up to PR #1868.

    record = read("runs/demo-seed42")     # a run's folder, its result.json, or any log; see `RunRecord`

Published logs lack hashes, hardware and often more: `RunRecord.missing` says what, `RunRecord.notices` what
must not be passed over, as several runs in one log. `logbook/` reads them: the place to add a system.
A file that is empty, cut off, foreign or mixed up raises `ReadError`, a run that has not ended `Unfinished`;
both messages are one line that names the file.
"""

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from auditing.verdict import follows
from logbook import ours
from logbook.lines import LogError, Value, cleaned, once
from logbook.published import is_published, read_published
from scripts import FILE_LINE, LOGGED_SCRIPT, RULE, hash_told, sha256_of
from systems.layout import WITHOUT_EFFECT, strict_json

TRAIN_LIMIT = EVAL_LIMIT = 600.0  # seconds
SIZE_LIMIT = 16_000_000  # decimal bytes, code plus model
LOG_SUFFIXES = (".txt", ".log")  # of our logs, and of the contest's

# What may differ between the runs of one experiment: seed, names, places, and how it is watched.
NAMES_AND_PLACES = {"SEED", "RUN_ID", "ARTIFACT_DIR", "DATA_DIR", "DATA_PATH", "TOKENIZER_PATH", "AUDIT"}
NAMES_AND_PLACES |= {"WANDB_PROJECT", "TENSORBOARD_DIR"}
PUBLISHED_PLACES = NAMES_AND_PLACES | {"LOGFILE", "DATASETS_DIR", "MODEL_PATH", "QUANTIZED_MODEL_PATH"}
PUBLISHED_PLACES |= {"TRAIN_FILES", "VAL_FILES", "VAL_BYTES_FILES", "RANK", "LOCAL_RANK", "IS_MAIN_PROCESS"}

# And what no result depends on: how often a run tells of itself, and what its preset is called.
UNFELT = NAMES_AND_PLACES | WITHOUT_EFFECT | {"PRESET", "TRAIN_LOG_EVERY", "VAL_LOSS_EVERY"}
UNFELT |= {"PREFLIGHT_ONLY", "ALLOW_UNVERIFIED_DATA"}
WITHOUT_TRAINING = ("PREQUANT_ONLY", "QUANTIZE_ONLY", "TTT_EVAL_ONLY")  # then models are inputs

# What the script reads besides its settings: a part of PRESET, and their names in published commands.
ALSO_READ = ("SCALE", "SMEAR_GATE", "SMEAR_GATE_WIDTH", "GATE_WIDTH", "GATE_ATTN_OUT", "GATE_ATTN_SRC")
ALSO_READ += ("PARALLEL_RESIDUAL_START", "FUSED_CE_ENABLED", "DATASETS_DIR", "MUON_WEIGHT_DECAY")
ALSO_READ += ("WARMDOWN_FRACTION", "WARMDOWN_ITERS", "VAL_BATCH_SIZE", "SLIDING_EVAL", "SLIDING_EVAL_STRIDE")
ALSO_READ += ("GPTQ_RESERVE_MS", "MLP_HIDDEN", "EMBEDDING_DIM", "EMBED_DIM", "USE_POLAR_EXPRESS")
ALSO_READ += ("EVAL_ONLY_PATH", "EVAL_ONLY_QUANTIZED_PATH", "PHASED_TTT_ENABLED", "EMA_ENABLED")


class ReadError(ValueError):
    """A run or log that cannot be read; one line with its name."""


class Unfinished(ReadError):
    """A run that has not ended: no result.json yet."""


@dataclass(frozen=True)
class RunRecord:
    """One finished run. What the source does not tell is None, an empty mapping, or named in `missing`."""

    path: Path  # folder or file that was read
    form: str  # "run", "log", or that of a published log, as "pr1851 log" (logbook/families.py)
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
    notices: tuple[str, ...] = ()  # what a reader of the numbers must know
    events: list[dict] = field(repr=False, default_factory=list)  # as in metrics.jsonl
    audit: Mapping | None = field(repr=False, default=None)  # audit.json, where it is believed
    audit_doubt: str = ""  # why it is not
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


def felt_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings that the result of an experiment depends on, the seed aside."""
    given = {"MODEL_PATH", "QUANTIZED_MODEL_PATH"} if any(map(settings.get, WITHOUT_TRAINING)) else set()
    return {name: value for name, value in settings.items() if name not in UNFELT - given}


def _hash(settings: Mapping[str, object]) -> str:
    return sha256_of(json.dumps(settings, sort_keys=True).encode())


def read(path: Path | str) -> RunRecord:
    """A run's folder, its result.json (or a copy NAME.json beside its log), or a log.

    Raises `ReadError` where there is no such thing, or only with numbers that may be wrong.
    """
    path = Path(path)
    if path.is_dir():
        return read_run(path)
    if path.suffix in LOG_SUFFIXES:  # the result beside a log of ours tells more
        results = (path.with_suffix(".json"), path.parent.parent / "result.json")
        path = next((result for result in results if result.is_file()), path)
    return read_result(path) if path.suffix == ".json" else read_log(path)


def log_beside(result: Path) -> Path:
    """The log of a copied result: NAME.txt, or NAME.log in a record folder."""
    logs = [result.with_suffix(suffix) for suffix in LOG_SUFFIXES]
    return next((log for log in logs if log.is_file()), logs[0])


def read_run(folder: Path | str) -> RunRecord:
    """The run of a folder, with its events and its audit if there is one.

    Raises `Unfinished` where there is no result.json yet, `ReadError` where files are damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ReadError(f"{folder}: no such folder")
    if not (folder / "result.json").is_file():
        if not (folder / "metrics.jsonl").is_file() and any(folder.iterdir()):
            raise Unfinished(f"{folder}: no run's folder, without result.json; name its logs one by one")
        raise Unfinished(f"{folder}: holds no result.json, the run has not ended")
    return read_result(folder / "result.json")


def read_result(path: Path | str) -> RunRecord:
    """A result: `result.json` in its folder, or a copy NAME.json with its log and NAME_audit.json beside it.

    The log, where there is one, must say the same as the result. An audit whose verdict is not what its own
    rows come to is as if there were none, with a notice.
    """
    path = Path(path)
    result = _read_json(path)
    stages, settings = result.get("stages"), result.get("settings")
    scored = isinstance(stages, dict) and all(isinstance(stage, dict) for stage in stages.values())
    if not (scored and isinstance(settings, dict) and result.get("final_stage") in stages):
        raise ReadError(f"{path}: not the result of a run")
    in_folder = path.name == "result.json"
    stem = path.with_name(path.stem)
    audit = path.with_name("audit.json") if in_folder else stem.with_name(f"{stem.name}_audit.json")
    metrics = path.with_name("metrics.jsonl")
    log = path.parent / "logs" / f"{result.get('run')}.txt" if in_folder else log_beside(path)
    events = read_events(metrics) if in_folder and metrics.is_file() else []
    if log.is_file():
        logged = read_log(log)
        events = events or logged.events
        for key, told, value in _told_twice(result, logged):
            if ours.shown(told) != ours.shown(value):
                raise ReadError(f"{path}: says {key} {told}, its log {log} {value}")
    judged = _read_json(audit) if audit.is_file() else None
    doubt = ""
    if judged is not None and not follows(judged, result):
        doubt = f"{audit.name} is not believed, its verdict is not what its rows come to: audit it again"
        judged = None
    return _checked(
        path=path.parent if in_folder else path,
        form="run",
        audit=judged,
        events=events,
        missing=_missing(result.get("environment", {}), judged is not None),
        audit_doubt=doubt,
        notices=(doubt,) if doubt else (),
        **_fields(result),
    )


def _told_twice(result: Mapping, logged: RunRecord) -> Iterator[tuple[str, object, object]]:
    """What both a result and its log tell: name, and what each says."""
    yield "SEED", result["settings"].get("SEED"), logged.seed
    for key, value in ours.last(logged.events, "final").items():
        yield key, result.get(key, value), value
    environment = {key: told for key, told in result.get("environment", {}).items() if told is not None}
    for key, value in ours.environment_of(logged.events).items():
        yield key, environment.get(key, value), value
    for name, score in result["stages"].items():
        for key, value in ours.last(logged.events, name).items():
            yield f"{key} of {name}", score.get(key, value), value


def hashes_of_files(path: Path, result: Mapping) -> dict[str, str]:
    """SHA-256 of what an audit judges: a run's result, log, ledger, artifact and counted script, by role.

    Of a copy NAME.json only result and log are there.
    """
    if path.is_dir():
        artifact = Path(str(result.get("settings", {}).get("QUANTIZED_MODEL_PATH", ""))).name
        files = {"result": path / "result.json", "log": path / "logs" / f"{result.get('run')}.txt"}
        files |= {"ledger": path / "ledger.jsonl", "script": path / "train_gpt.packed.py"}
        files |= {"artifact": path / artifact}
    else:
        files = {"result": path, "log": log_beside(path)}
    return {role: sha256_of(file) for role, file in files.items() if file.is_file()}


def changed_since_audit(record: RunRecord) -> list[str]:
    """Roles of the files that are not those that the run's audit judged."""
    told = (record.audit or {}).get("files", {})
    here = hashes_of_files(record.path, record.result) if told else {}
    return [role for role, value in here.items() if told.get(role) != value]


def _checked(**fields: object) -> RunRecord:
    """A record with figures that are numbers, and with a notice where its name says another seed.

    Raises `ReadError` where a score is no positive number, or a time or a size, which NaN would keep within
    every limit, is a negative one or none.
    """
    record = RunRecord(**fields)
    for name, stage in record.stages.items():
        for key in ("val_loss", "val_bpb"):
            score = stage.get(key) if name == record.final_stage else stage.get(key, 1)
            if not isinstance(score, int | float) or not 0 < score <= sys.float_info.max:
                raise ReadError(f"{record.path}: its score {key} of {name} is {str(score)[:60]}")
    sizes = {name: getattr(record, name) or 0 for name in ("artifact_bytes", "code_bytes", "model_bytes")}
    for name, value in {**{f"seconds of {name}": s for name, s in record.seconds.items()}, **sizes}.items():
        if not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
            raise ReadError(f"{record.path}: its {name} are {str(value)[:60]}")
    named = re.findall(r"(?i)(?<!\d)seed[ _-]?(\d+)", record.path.name)
    seed = int(named[-1]) if named else record.seed
    if record.seed == seed:
        return record
    told = f"its name says seed {seed}, its run had {record.seed}"
    if record.seed is None:
        record, told = replace(record, seed=seed), f"its seed, {seed}, is told by its name only"
    return replace(record, notices=(*record.notices, told))


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
    text = _read_text(Path(path))
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            events.append(strict_json(line))
        except (ValueError, RecursionError) as error:
            if number < len(lines) or text.endswith("\n"):
                raise ReadError(f"{path}: line {number} is not JSON ({error})") from None
    return events


def read_log(path: Path | str) -> RunRecord:
    """A log: ours (`logs/<RUN_ID>.txt`) or a published one. Raises `ReadError` where it is not whole."""
    path = Path(path)
    text = _read_text(path)
    if not text.strip():
        raise ReadError(f"{path}: empty")
    whole = ours.is_ours(text)
    text = text if whole else cleaned(text)  # nothing in a script that was logged may pass for a prefix
    if whole or ours.is_ours(text):
        return _read_ours(path, text)
    if log := ours.console(text):
        raise ReadError(f"{path}: lacks the beginning of a log, as what a console showed; the log is {log}")
    if is_published(text):
        return _read_published(path, text)
    raise ReadError(f"{path}: neither a log of train_gpt.py nor a published one")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ReadError(f"{path}: cannot be read ({error.strerror})") from None


def _read_json(path: Path) -> dict:
    text = _read_text(path)
    try:
        value = strict_json(text)
    except (ValueError, RecursionError) as error:
        raise ReadError(f"{path}: not JSON, or cut off ({error})") from None
    if not isinstance(value, dict):
        raise ReadError(f"{path}: not a JSON object")
    return value


def _cut_off(path: Path, text: str, wanted: str) -> ReadError:
    last = text.rstrip("\n").rpartition("\n")[2][:60]
    return ReadError(f"{path}: cut off, without {wanted}; its last line is {last!r}")


# -- our logs


def _read_ours(path: Path, text: str) -> RunRecord:
    head, _, rest = text.partition(f"{RULE}\n")
    source, whole, rest = rest.partition(f"\n{RULE}\n")
    times = once(text)[1]
    if times > 1:
        raise ReadError(f"{path}: every line stands there {times} times; a log has each once")
    if not whole:
        raise _cut_off(path, text, "the end of the script's source")
    settings = ours.settings_of(head)
    files = rest.partition("\n==== end\n")[0]
    rest = LOGGED_SCRIPT.sub("", f"{RULE}\n{RULE}\n{rest}")  # also where a resumed run logged it once more
    events = ours.events_of(rest)
    finals = [event for event in events if event["stage"] == "final"]
    if not finals or not isinstance(finals[-1].get("legal"), bool):
        raise _cut_off(path, text, "a whole line `final val_bpb:... legal:...`")
    stages, final = ours.scores_of(events), finals[-1]
    scored = next((name for name in ("ttt", "sliding", "quantised", "prequant") if name in stages), "")
    try:
        ours.check_one_run(f"{head}{rest}", settings, len(finals))
        ours.check_final(events, stages.get(scored, {}))
    except LogError as error:
        raise ReadError(f"{path}: {error}") from None
    environment = ours.environment_of(events)
    environment.setdefault("source_sha256", sha256_of(source.encode()))
    environment["house_sha256"] = dict(FILE_LINE.findall(files))
    seconds = {name: stage["seconds"] for name, stage in stages.items()}
    seconds |= {"train": final["train_seconds"], "calibrate": final["calibrate_seconds"]}
    return _checked(
        path=path,
        form="log",
        name=path.stem,
        seed=_seed(path, settings),
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


def _seed(path: Path, settings: Mapping[str, Value]) -> int:
    """The seed among the settings of a log. Raises `ReadError` where it is no number, or lost."""
    seed = settings.get("SEED")
    if not isinstance(seed, int):
        raise ReadError(f"{path}: its seed is {str(seed)[:60]!r}, no number")
    return seed


def read_unfinished(folder: Path | str) -> RunRecord:
    """What there is of a run without result.json: one under way, or dead. It has no final stage."""
    folder = Path(folder)
    if not (folder / "metrics.jsonl").is_file():
        raise ReadError(f"{folder}: holds no metrics.jsonl, not the folder of a run")
    events = read_events(folder / "metrics.jsonl")
    logs = sorted((folder / "logs").glob("*.txt"))
    settings = ours.settings_of(_read_text(logs[0]).partition(f"{RULE}\n")[0]) if logs else {}
    stages, environment = ours.scores_of(events), ours.environment_of(events)
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


# -- published logs


def _read_published(path: Path, text: str) -> RunRecord:
    try:
        reading = read_published(text)
    except ValueError as error:  # LogError, or a number with thousands of digits
        raise ReadError(f"{path}: {error}") from None
    broken = _broken_limits(reading.seconds, reading.final_stage, reading.artifact_bytes)
    untold = [name for name in reading.missing if name.endswith(("seconds", "bytes"))]
    told = vars(reading) | {"missing": (*reading.missing, *_missing(reading.environment, False))}
    return _checked(
        path=path,
        name=str(reading.settings.get("RUN_ID", path.stem)),
        broken_limits=tuple(broken),
        legal=False if broken else None if untold else True,
        **told,
    )


def _broken_limits(seconds: Mapping[str, float], final: str, size: int | None) -> list[str]:
    """The limits of the contest that a run exceeded; calibration is training time."""
    training, evaluation = seconds.get("train", 0.0) + seconds.get("calibrate", 0.0), seconds.get(final, 0.0)
    checks = {
        f"training and calibration took {training:.3f} s, limit {TRAIN_LIMIT:g}": training > TRAIN_LIMIT,
        f"evaluation took {evaluation:.3f} s, limit {EVAL_LIMIT:g}": evaluation > EVAL_LIMIT,
        f"artifact has {size} bytes, limit {SIZE_LIMIT}": (size or 0) > SIZE_LIMIT,
    }
    return [reason for reason, broken in checks.items() if broken]
