"""The lines of our own logs, and whether they are of one whole run. Raises `LogError` where they are not."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath

from logbook.lines import LogError, Value, parse_value
from logbook.published import begins_run
from scripts import RULE
from systems.layout import WITHOUT_EFFECT

SETTING = re.compile(r"(?m)^([A-Z][A-Z0-9_]*)=(.*?)(?:    # default .*)?$")
EVENT = re.compile(r"([a-z]\w*) (\w+:.*)")
PAIR = re.compile(r"(\w+):(.*?)(?= \w+:|$)")
SHOWN = re.compile(r"(?m)^(?:start run:(\S+) folder:(.*?) python:|Run (\S+), folder (.*?)\s*$)")
BYTES = ("artifact_bytes", "code_bytes", "model_bytes")
SECONDS = ("train_seconds", "calibrate_seconds")
NEAR = 1e-5  # relative: seconds have six digits


def console(text: str) -> str:
    """Where the log of a run is of which a text is what its console showed; empty where it is none."""
    start = SHOWN.search(text)
    run, folder = [part for part in start.groups() if part is not None] if start else ("", "")
    return f"{folder}/logs/{run}.txt" if run else ""


def is_ours(text: str) -> bool:
    """Whether a text begins as our logs do."""
    return bool(re.match(r"PRESET=\w", text)) and f"\n{RULE}\n" in text


def settings_of(head: str) -> dict[str, Value]:
    """The settings that stand before the script."""
    return {name: parse_value(value) for name, value in SETTING.findall(head)}


def events_of(text: str) -> list[dict]:
    """The lines `stage key:value key:value` of a log, here without its script, as in metrics.jsonl."""
    return [event for line in text.splitlines() if (event := _event(line))]


def _event(line: str) -> dict | None:
    found = EVENT.fullmatch(line)
    if not found:
        return None
    stage, pairs = found.groups()
    if pairs.startswith("text:"):
        return {"stage": stage, "text": pairs.removeprefix("text:")}
    return {"stage": stage} | {key: parse_value(value) for key, value in PAIR.findall(pairs)}


def scores_of(events: Iterable[dict]) -> dict[str, dict]:
    """The whole scores by stage; of one that was scored twice, as a resumed run may, the last."""
    keys = ("val_loss", "val_bpb", "targets", "seconds")
    return {e["stage"]: e for e in events if all(isinstance(e.get(key), int | float) for key in keys)}


def environment_of(events: Iterable[dict]) -> dict[str, Value]:
    """The environment that the event of the start tells."""
    start = last(events, "start")
    return {key: value for key, value in start.items() if key not in ("stage", "run", "folder")}


def last(events: Iterable[dict], stage: str) -> dict:
    """The last event of a stage, {} without one."""
    return next((event for event in reversed([*events]) if event["stage"] == stage), {})


def shown(value: Value | None) -> str:
    """A value as a log shows it."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def check_one_run(text: str, settings: Mapping[str, Value], finals: int) -> None:
    """Raise `LogError` where a log, here without its script, has lines of several runs."""
    if finals > 1 or f"\n{RULE}\n" in text or begins_run(text):
        raise LogError("holds several runs, or parts of them")
    for name, value in SETTING.findall(text):
        known = name in settings and name not in WITHOUT_EFFECT  # a run that goes on may have others
        if known and settings[name] != parse_value(value):
            raise LogError(f"holds several runs, of {name}={value} and {settings[name]}")


def check_final(events: Sequence[dict], stage: Mapping) -> None:
    """Raise `LogError` where the last line is not what the lines before it say; `stage` is what counts."""
    final, size, artifact = (last(events, name) for name in ("final", "size", "artifact"))
    same = {"val_bpb": "val_bpb", "val_loss": "val_loss", "eval_seconds": "seconds"}
    unlike = [name for name, key in same.items() if shown(final.get(name, "")) != shown(stage.get(key))]
    unlike += sorted({*BYTES, *SECONDS} - final.keys())
    unlike += [name for name in BYTES if size and name in final and size.get(name) != final[name]]
    if artifact and "calibrate_seconds" in final:
        told = shown(artifact.get("calibrate_seconds"))
        unlike += ["calibrate_seconds"] * (told != shown(final["calibrate_seconds"]))
    if unlike:
        raise LogError(f"lines are lost, {', '.join(unlike)} of its last line stands nowhere else")
    _check_figures(final)
    trained = next((e["train_seconds"] for e in reversed(events) if "train_seconds" in e and "step" in e), 0)
    if trained > final["train_seconds"] * (1 + NEAR):
        raise LogError(f"holds several runs: {trained} s of training, then {final['train_seconds']}")
    folders = [str(event["folder"]) for event in events if "folder" in event]  # a resumed run may have moved
    file = str(artifact.get("file", ""))
    if folders and file and PurePath(file).parent not in map(PurePath, folders):
        raise LogError(f"holds several runs, in {folders[-1]} and of {file}")
    broken = any(event["stage"] == "limit" for event in events)
    if final["legal"] != (not broken and final["artifact_bytes"] > 0):
        raise LogError(f"says legal:{final['legal']}, and its lines of limits another thing")


def _check_figures(final: Mapping) -> None:
    """Raise `LogError` where a figure is none, or the artifact is not the sum of its parts."""
    for name in (*BYTES, *SECONDS):
        kind = int if name in BYTES else int | float
        if not isinstance(final[name], kind) or not 0 <= final[name] < math.inf:
            raise LogError(f"says {name}:{final[name]} in its last line")
    whole, code, model = (final[name] for name in BYTES)
    if whole != code + model:
        raise LogError(f"says artifact_bytes:{whole}, and {code} + {model} of code and model")
