"""A run's result, ledger and events, their forms checked: damage is a mistake, and breaks no rule."""

import math
from collections.abc import Mapping
from pathlib import Path

from command import Mistake
from systems.layout import strict_json

NUMBER, SETTING = (int, float), (str, int, float)
RESULT = {  # what every result has, and each check may rely on
    "run": str,
    "val_loss": NUMBER,
    "val_bpb": NUMBER,
    "legal": bool,
    "broken_limits": list,
    "settings": dict,
    "environment": dict,
    "seconds": dict,
}
RESULT |= dict.fromkeys(("artifact_bytes", "code_bytes", "model_bytes"), int)
RESULT |= dict.fromkeys(("train_seconds", "calibrate_seconds", "eval_seconds"), NUMBER)
STAGE = {"val_loss": NUMBER, "val_bpb": NUMBER, "targets": int, "bytes": int}
ENVIRONMENT = {"device": str, "source_sha256": str, "house_sha256": dict, "ranks": int, "micro_batches": int}
MAY_LACK = {"steps": int, "resumed": int, "ledger_sha256": str}
MOST = 2**63  # a whole number beyond it is no figure of a run, and more than a float may hold
LONGEST_NAME = 255  # bytes that a file system lets a name have
KINDS = {str: "text", int: "a whole number", NUMBER: "a number", dict: "an object", list: "a list"}
KINDS |= {bool: "true or false", SETTING: "text or a number"}


class AuditError(Mistake):
    """The command makes no sense, or there is nothing to judge: one line, exit code 2."""


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises AuditError where there is none."""
    try:
        return _object(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AuditError(f"{path}: cannot be read as JSON ({reason})") from None


def _object(text: str) -> dict:
    value = strict_json(text)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def read_result(path: Path) -> dict:
    """The result of a run, with what every check relies on. Raises AuditError where it is another file."""
    if not path.is_file():
        raise AuditError(f"{path.parent}: no result.json there: not the folder of a run that has ended")
    result = read_json(path)
    stages, environment = result.get("stages"), result.get("environment")
    if not isinstance(stages, dict) or not isinstance(stages.get(str(result.get("final_stage"))), dict):
        raise AuditError(f"{path}: not the result of a run")
    if isinstance(environment, dict) and "house_sha256" not in environment:
        text = "made by a script of before the house was rebuilt, it cannot be audited here"
        raise AuditError(f"{path.parent}: {text}")
    _need(path, "", result, RESULT)
    _need(path, "environment ", environment, ENVIRONMENT)
    _need(path, "settings ", result["settings"], {"SEED": int})
    for name in MAY_LACK.keys() & result.keys():
        _need(path, "", result, {name: MAY_LACK[name]})
    for name, stage in stages.items():
        _need(path, f"stages {name} ", stage, STAGE)
    plain = {"settings": SETTING, "seconds": NUMBER}
    for part, kinds in plain.items():
        _need(path, f"{part} ", result[part], dict.fromkeys(result[part], kinds))
    _need_names(path, result)
    _need(path, "house_sha256 ", environment["house_sha256"], dict.fromkeys(environment["house_sha256"], str))
    _need(path, "seconds ", result["seconds"], {result["final_stage"]: NUMBER})
    return result


def _need_names(path: Path, result: Mapping) -> None:
    """Raise AuditError unless what files are called by can be the name of one."""
    run, places = result["run"], result["settings"].items()
    named = run.isprintable() and Path(run).name == run != "" and _longest(run) <= LONGEST_NAME - len(".txt")
    if not named:
        raise AuditError(f"{path}: damaged: run is {_shown(run)}, must be the name of its log")
    for name, value in places:
        if name.endswith(("_PATH", "_DIR")) and _longest(str(value)) > LONGEST_NAME:
            raise AuditError(f"{path}: damaged: settings {name} is {_shown(value)}, must be a path")


def _longest(place: str) -> int:
    """Bytes of the longest name in a path."""
    return max(map(len, place.encode("utf-8", "surrogatepass").split(b"/")))


def check_settings(path: Path, settings: Mapping[str, object], defaults: Mapping[str, object]) -> None:
    """Raise AuditError where a setting is of another kind than its default; others are left alone."""
    kinds = {name: NUMBER if type(value) is float else type(value) for name, value in defaults.items()}
    _need(path, "settings ", settings, {name: kinds[name] for name in kinds.keys() & settings.keys()})


def _need(path: Path, place: str, values: object, kinds: Mapping[str, type | tuple[type, ...]]) -> None:
    """Raise AuditError unless values of these kinds are there, finite and of a size that a run may tell."""
    if not isinstance(values, dict):
        raise AuditError(f"{path}: damaged: {place}is {_shown(values)}, must be an object")
    for name, kind in kinds.items():
        value = values.get(name)
        is_setting = kind == SETTING
        fits = isinstance(value, kind) and (kind is bool or is_setting or type(value) is not bool)
        if fits and isinstance(value, int) and abs(value) > MOST:
            raise AuditError(f"{path}: damaged: {place}{name} is {_shown(value)}, must be within 2^63")
        if not fits or isinstance(value, float) and not (is_setting or math.isfinite(value)):
            raise AuditError(f"{path}: damaged: {place}{name} is {_shown(value)}, must be {KINDS[kind]}")


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)[:60]


def read_lines(path: Path, key: str) -> list[dict]:
    """The records of a ledger (each has a `kind`) or the events of a run (a `stage`), a line each.

    Raises AuditError where a line is none, or the last one is not whole. What the lines say, the checks look
    at: another text that is whole is no damage.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AuditError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not lines:
        raise AuditError(f"{path}: empty, must hold what the run told")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(_object(line))
        except (ValueError, RecursionError) as error:
            raise AuditError(f"{path}: line {number} cannot be read as JSON ({error})") from None
        if not isinstance(records[-1].get(key), str):
            raise AuditError(f"{path}: line {number} is none of a run: it has no {key}")
    return records
