"""Read one run from a published log. Raises `LogError` rather than tell numbers of two runs."""

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from logbook import families as table
from logbook.lines import LogError, Value, found, mixed, once, one, parse_value
from logbook.scores import check_source, final_scores, has_block


@dataclass(frozen=True)
class Reading:
    """What a log tells of one run; fields as those of `runs.RunRecord`."""

    form: str
    seed: int | None
    steps: int | None
    final_stage: str
    stages: dict[str, dict[str, float]]
    seconds: dict[str, float]
    artifact_bytes: int | None
    code_bytes: int | None
    model_bytes: int | None
    settings: dict[str, Value]
    environment: dict[str, Value]
    missing: tuple[str, ...]
    notices: tuple[str, ...]
    events: list[dict]


@dataclass(frozen=True)
class Part:
    """The text of one run in a log."""

    before: str  # from the last figure of the run before: its errors, the source of the script that follows
    text: str
    line: int  # its first line in the log


def begins_run(text: str) -> bool:
    """Whether a run of a system of `families.py` begins in a text, here without prefixes."""
    return bool(found(text, *(table.BEGINNING[name] for name in ("settings", "scorer", "targets", "seed"))))


def is_published(text: str) -> bool:
    """Whether a text, here without prefixes, has a line of such a run."""
    return begins_run(text) or bool(found(text, table.SCORE))


def read_published(text: str) -> Reading:
    """The run of a log, here without prefixes; of several runs the last whole one, with a notice.

    Raises `LogError` where it is cut off, or where lines of several runs may be mixed.
    """
    text, times = once(text)
    parts = _split(text)
    reading = _read_run(parts[0]) if len(parts) == 1 else _last_whole(parts)
    told = [f"every line stands there {times} times"] * (times > 1)
    return replace(reading, notices=(*told, *reading.notices))


# -- several runs in a log


def _split(text: str) -> list[Part]:
    """The runs of a log. One begins where a line of the beginning comes again, or after a step or score."""
    begins = _beginnings(text)
    ends = [match.end() for match in found(text, *table.LATER)]
    parts = []
    for last, begin, end in zip([0, *begins], begins, [*begins[1:], len(text)], strict=False):
        before = max([last, *(place for place in ends if place <= begin)])
        parts.append(Part(text[before:begin], text[begin:end], text.count("\n", 0, begin) + 1))
    return parts


def _beginnings(text: str) -> list[int]:
    """Where the runs begin; the first at 0. A line that is doubled where it stands is no beginning."""
    marks = [(match.start(), "") for match in found(text, *table.LATER)]
    for name, pattern in table.BEGINNING.items():
        matches = found(text, pattern)
        doubled = {first.end() + 1 for first, second in itertools.pairwise(matches) if first[0] == second[0]}
        marks += [(match.start(), name) for match in matches if match.start() not in doubled]
    begins, seen, later = [0], set(), False
    for place, name in sorted(marks):
        if name and (later or name in seen):
            begins.append(place)
            seen, later = set(), False
        seen.add(name)
        later = later or not name
    return begins


def _last_whole(parts: list[Part]) -> Reading:
    """The last run that is whole. Raises `LogError` unless it is clear that the others are apart from it."""
    results = [_read_or_error(part) for part in parts]
    chosen, count = len(parts) - 1, f"holds {len(parts)} runs"
    if isinstance(results[chosen], LogError) and not found(parts[chosen].text, table.SCORE):
        chosen -= 1  # what has not scored anything yet has no part in the scores before it
    reading, part = results[chosen], parts[chosen]
    if isinstance(reading, LogError):
        raise LogError(f"{count}, and that of line {part.line} is not whole: {reading}")
    for result, other, following in zip(results[:chosen], parts, parts[1:], strict=False):
        died = found(following.before, table.DIED)
        if isinstance(result, LogError) and not died and not _has_all_its_steps(part):
            raise LogError(f"{count}; that of line {other.line} had not ended when the next began")
        if not _tells(other) <= _tells(part):
            raise LogError(f"{count}; what that of line {part.line} says of itself stands elsewhere")
    told = f"{count}; read is the last whole one, from line {part.line}"
    return replace(reading, notices=(told, *reading.notices))


def _read_or_error(part: Part) -> Reading | LogError:
    try:
        return _read_run(part)
    except LogError as error:
        return error


def _tells(part: Part) -> set[str]:
    """In which ways a run says what it is."""
    return {name for name in ("settings", "scorer", "seed") if found(part.text, table.BEGINNING[name])}


def _has_all_its_steps(part: Part) -> bool:
    """Whether a run's steps go from its first to its last without a gap, so that none are another's."""
    steps = [int(match[1]) for match in found(part.text, table.STEP)]
    later = [step for step in dict.fromkeys(steps) if step > 10]
    return steps[:1] == [1] and later == [later[0] * (n + 1) for n in range(len(later))]


# -- one run


def _read_run(part: Part) -> Reading:
    """What the text of one run tells. Raises `LogError` where it is not whole, or not of one run."""
    text = part.text
    begun = {name: one(text, name, pattern) for name, pattern in table.BEGINNING.items()}
    figures = {name: one(text, name, pattern) for name, pattern in table.FIGURES.items()}
    _check_steps(text)
    settings = _settings(text)
    if begun["seed"] and str(settings.get("SEED")) != begun["seed"]:
        raise mixed("seed", settings.get("SEED"), begun["seed"])
    family, stages = final_scores(text, settings)
    final = [*stages][-1]
    seconds = {name: stage["seconds"] for name, stage in stages.items() if "seconds" in stage}
    seconds |= {"train": int(figures["train"]) / 1000} if figures["train"] else {}
    seconds |= {name: float(figures[name]) for name in ("calibrate", "quantise", "compress") if figures[name]}
    steps = figures["steps"] or _all_steps(text)
    told = [
        *_untold(text, {**figures, "steps": steps}, seconds, final),
        *["settings"] * (len(settings) < 2),
    ]
    sourced, more = check_source(part.before + text, final)
    if not family.end and not sourced and not (family.switched and has_block(text)):
        told.append("whether another evaluation followed")
    return Reading(
        form=family.form,
        seed=_seed(settings),
        steps=steps and int(steps),
        final_stage=final,
        stages=stages,
        seconds=seconds,
        **_sizes(figures),
        settings=settings,
        environment=_environment(begun, figures, settings),
        missing=tuple(told),
        notices=tuple(_notices(stages, more)),
        events=_events(text),
    )


def _check_steps(text: str) -> None:
    """Raise `LogError` where steps go back, or come twice with other figures."""
    said: dict[str, str] = {}
    before = 0
    for match in found(text, table.STEP, table.VALIDATION, table.FIGURES["steps"]):
        kind = match[0].partition("loss")[0]  # step and what was measured
        if before > int(match[1]):
            raise LogError(f"says step {match[1]} after step {before}: lines of several runs")
        if said.setdefault(kind, match[0]) != match[0]:
            raise mixed(f"step {match[1]}", repr(said[kind][:60]), repr(match[0][:60]))
        before = int(match[1])


def _settings(text: str) -> dict[str, Value]:
    """The settings that a run prints, by the names of the environment variables.

    A block of them goes on behind foreign lines. Raises `LogError` where it says one twice.
    """
    head = text[: min((match.start() for match in found(text, *table.LATER)), default=len(text))]
    block = found(head, table.BEGINNING["settings"])
    if block:
        head = re.split(rf"(?m)^{table.RULE}$", head[block[0].end() :], maxsplit=1)[0]
        pairs = [(match[1], match[2].strip()) for match in found(head, table.SETTING)]
        pairs += [pair for match in found(head, table.PAIRS) for pair in re.findall(r"(\w+)=(\S*)", match[0])]
    else:
        pairs = [pair for match in found(head, table.TOLD) for pair in re.findall(r"(\w+):(\S+)", match[0])]
    settings: dict[str, str] = {}
    for name, told in pairs:
        if settings.setdefault(name.upper(), told) != told:
            raise mixed(name, settings[name.upper()], told)
    return {name: parse_value(told) for name, told in settings.items()}


def _seed(settings: Mapping[str, Value]) -> int | None:
    seed = settings.get("SEED")
    if not isinstance(seed, int | None):
        raise LogError(f"its seed is {str(seed)[:60]!r}, no number")
    return seed


def _all_steps(text: str) -> str | None:
    """The steps of a run that no clock stopped."""
    last = found(text, table.VALIDATION)[-1:]
    return last[0][1] if last and last[0][1] == last[0][2] else None


def _sizes(figures: Mapping[str, str | None]) -> dict[str, int | None]:
    """Bytes of artifact, code and model. Raises `LogError` where the first is not the sum of the others."""
    told = {name: figures[f"{name} bytes"] for name in ("artifact", "code", "model")}
    size, code, model = (told[name] and int(told[name]) for name in told)
    if size and code and model and size != code + model:
        raise mixed("the bytes of the artifact", size, f"{code} + {model}")
    if size and code:
        model = size - code
    return {"artifact_bytes": size, "code_bytes": code, "model_bytes": model}


def _environment(begun: Mapping, figures: Mapping, settings: Mapping) -> dict[str, Value]:
    told = {
        "python": begun["python"],
        "torch": begun["torch"],
        "ranks": settings.get("WORLD_SIZE"),
        "source_bytes": figures["source bytes"] and int(figures["source bytes"]),
        "train_shards": begun["train_shards"] and int(begun["train_shards"]),
    }
    return {name: figure for name, figure in told.items() if figure}


def _untold(text: str, figures: Mapping, seconds: Mapping, final: str) -> Iterator[str]:
    """The figures that a log does not tell."""
    if "train" not in seconds:
        yield "training seconds"
    if "calibrate" not in seconds and (found(text, table.CALIBRATES) or "train" not in seconds):
        yield "calibration seconds"
    if final not in seconds:
        yield "evaluation seconds"
    yield from (name for name in ("artifact bytes", "code bytes", "steps") if figures[name] is None)


def _notices(stages: Mapping[str, Mapping[str, float]], more: str) -> Iterator[str]:
    """What must not be passed over in silence."""
    final = [*stages][-1]
    scored = [name for name in stages if name != "prequant"]
    best = min(scored, key=lambda name: stages[name]["val_bpb"], default=final)
    if best != final:
        scores = [f"{stages[name]['val_bpb']:.5f} of {name}" for name in (final, best)]
        yield f"its last score, {scores[0]}, is worse than {scores[1]}"
    if more:
        yield f"its script can print {more} too, which is not there"


def _events(text: str) -> list[dict]:
    """Steps and validations, as in metrics.jsonl of a run."""
    events = []
    for step, loss, time, unit in (match.groups() for match in found(text, table.STEP)):
        seconds = round(float(time) * (60 if unit == "m" else 0.001), 1) if time else None
        event = {"stage": "train", "step": int(step), "train_loss": float(loss), "train_seconds": seconds}
        events += [event] * (seconds is not None)
    for step, _, loss, bpb in (match.groups() for match in found(text, table.VALIDATION)):
        name = f"step_{step}" if int(step) else "untrained"
        events.append({"stage": name, "val_loss": float(loss), "val_bpb": float(bpb)})
    return events
