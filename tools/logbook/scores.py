"""The scores of one run: which stage each is of, and which is final."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from logbook import families as table
from logbook.lines import LogError, Value, found, last_line, mixed, one


@dataclass(frozen=True)
class Score:
    """A line with a score, or two of the same name, the second with more digits."""

    name: str
    stage: str
    loss: str  # nats per token, with the digits of the log
    bpb: str
    milliseconds: int | None
    end: int  # of the line in the text


def final_scores(text: str, settings: Mapping[str, Value]) -> tuple[table.Family, dict[str, dict]]:
    """Family, and the stages in their order; the last one is final.

    Raises `LogError` where a stage is missing or twice, or where it is unclear what is final.
    """
    scores = _known(text)
    family = _family(text, scores)
    if not _has_all_digits(scores[-1]):
        raise LogError(f"cut off, without all digits of {scores[-1].name}; {last_line(text)}")
    _check_echoes(text, family, scores[-1])
    _check_what_follows(text[scores[-1].end :], scores[-1])
    stages = _stages(scores, one(text, "targets", table.BEGINNING["targets"]))
    _check_stages(text, family, settings, stages)
    return family, stages


def _known(text: str) -> list[Score]:
    """The whole score lines of known names, those of one name together, in the order of the log."""
    otherwise = [stage for pattern, stage in table.SAID_OTHERWISE.items() if found(text, pattern)]
    scores: dict[str, Score] = {}
    for match in found(text, table.SCORE):
        printed, loss, bpb, tail = match.groups()
        name = _plain(printed)
        time = re.search(r"\b(?:eval_)?time:(\d+)ms(?!\S)", tail)
        if name not in table.STAGE_OF or "time:" in tail and not time:
            continue
        stage = otherwise[0] if otherwise and name in table.INT8 else table.STAGE_OF[name]
        score = Score(name, stage, loss, bpb, int(time[1]) if time else None, match.end())
        untimed = name != printed or re.fullmatch(table.FOUR_DECIMALS, name)
        if time or (untimed and _has_all_digits(score)):
            scores[name] = _together(scores.pop(name, None), score)
    return [*scores.values()]


def _plain(name: str) -> str:
    return name.replace("_exact", "")


def _has_all_digits(score: Score) -> bool:
    """Whether a score is not cut off; nan is not."""
    wanted = 4 if re.fullmatch(table.FOUR_DECIMALS, score.name) else 8
    return len(score.bpb.partition(".")[2]) in (0, wanted)


def _together(before: Score | None, score: Score) -> Score:
    """A score, and the one of the same name before it. Raises `LogError` where they do not agree."""
    if before is None:
        return score
    rough, exact = sorted((before, score), key=lambda line: len(line.bpb))
    fits = _rounds_to(exact.loss, rough.loss) and _rounds_to(exact.bpb, rough.bpb)
    times = {before.milliseconds, score.milliseconds} - {None}
    if not fits or len(times) > 1:
        raise mixed(score.name, before.bpb, score.bpb)
    return replace(exact, milliseconds=min(times, default=None), end=score.end)


def _rounds_to(exact: str, rough: str) -> bool:
    decimals = len(rough.partition(".")[2])
    return exact == rough or abs(float(exact) - float(rough)) <= 0.5000001 * 10**-decimals


def _family(text: str, scores: list[Score]) -> table.Family:
    """The row of the table that a log is of. Raises `LogError` where it is of none."""
    unknown = [match for match in found(text, table.SCORE) if _plain(match[1]) not in table.STAGE_OF]
    if not scores and unknown:
        raise LogError(f"its last score is of no known system: {unknown[-1][0][:80]!r}")
    if not scores:
        raise LogError(f"cut off, without a final score; {last_line(text)}")
    names, stages = {score.name for score in scores}, {score.stage for score in scores}
    fitting = [family for family in table.FAMILIES if names <= family.scores.keys()]
    if not fitting:
        raise LogError(f"has scores of several systems: {', '.join(sorted(names))}")
    return next((family for family in fitting if stages.issuperset(family.needs)), fitting[0])


def _check_echoes(text: str, family: table.Family, final: Score) -> None:
    """Raise `LogError` where lines that repeat the final score or its time are absent, or another run's."""
    for loss, bpb in (match.groups() for match in found(text, table.ADAPTED)):
        if final.stage == "ttt" and not (_rounds_to(final.loss, loss) and _rounds_to(final.bpb, bpb)):
            raise mixed(final.name, bpb, final.bpb)
    if family.end:
        total = one(text, "total_eval_time", family.end)
        if total is None:
            raise LogError(f"cut off, without total_eval_time; {last_line(text)}")
        if not _rounds_to(str((final.milliseconds or 0) / 1000), total):
            raise mixed("the time of evaluation", f"{total} s", f"{final.milliseconds} ms")


def _check_what_follows(rest: str, final: Score) -> None:
    """Raise `LogError` where another score stands after the last one that is known and whole."""
    for match in found(rest, table.ANY_SCORE):
        line = match[0].strip()[:80]
        name = re.split(r" (?:stride|val_loss):", line.removeprefix("diagnostic "))[0]
        if _plain(name) in table.STAGE_OF:
            raise LogError(f"cut off, without the end of {line!r}")
        if final.stage != "ttt" and re.fullmatch(table.ADAPTS, match[0]):
            raise LogError(f"cut off, without the score of ttt; {last_line(rest)}")
        if not _rounds_to(final.bpb, match[1]):
            raise LogError(f"has a score after {final.name} that is not known: {line!r}")


def _stages(scores: list[Score], targets: str | None) -> dict[str, dict]:
    """Stages by name, in order. Raises `LogError` where one comes twice, or after one that follows it."""
    stages: dict[str, dict] = {}
    for score in scores:
        stage = {"val_loss": float(score.loss), "val_bpb": float(score.bpb)}
        if not all(0 < figure < 1e9 for figure in stage.values()):
            raise LogError(f"its score {score.name} is {score.loss} nats, {score.bpb} bits")
        if any(stage.items() <= other.items() for other in stages.values()):
            continue  # a score before it once more, by another name
        late = [name for name in stages if _rank(name) >= _rank(score.stage)]
        if late:
            raise LogError(f"says {score.name} after the score of {late[0]}: what is final is unclear")
        stage |= {"seconds": score.milliseconds / 1000} if score.milliseconds else {}
        stages[score.stage] = stage | ({"targets": int(targets)} if targets else {})
    return stages


def _rank(stage: str) -> int:
    return table.STAGES.index(stage)


def _check_stages(text: str, family: table.Family, settings: Mapping, stages: Mapping) -> None:
    """Raise `LogError` where a stage is missing that the run scored, or is there and was not to be scored."""
    needed = [stage for name, stage in table.SWITCHES.items() if settings.get(name) is True]
    needed += () if found(text, table.ONLY_SCORES) else family.needs
    needed += ["ttt"] if found(text, table.ADAPTS) else []
    absent = [stage for stage in table.STAGES if stage in needed and stage not in stages]
    if absent:
        raise LogError(f"cut off, without the score of {', '.join(absent)}; {last_line(text)}")
    for name, stage in table.SWITCHES.items():
        if stage in stages and family.switched and has_block(text) and not settings.get(name):
            raise LogError(f"has a score of {stage} without {name} among its settings")


def has_block(text: str) -> bool:
    """Whether a run prints all its settings."""
    return bool(found(text, table.BEGINNING["settings"]))


def check_source(source: str, final: str) -> tuple[bool, str]:
    """Whether a text holds the source of a script that prints scores, and one of them later than the final.

    Raises `LogError` where that is so and the final score is only that of the artifact as it was read back.
    """
    names = re.findall(table.SCORE_IN_SOURCE, source)
    stages = {name: table.STAGE_OF.get(_plain(name), table.STAGES[0]) for name in names}
    more = next((name for name, stage in stages.items() if _rank(stage) > _rank(final)), "")
    if more and final == "quantised":
        raise LogError(f"cut off: the score of {final} is its last, and its script prints {more} too")
    return bool(names), more
