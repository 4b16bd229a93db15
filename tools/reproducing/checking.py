"""Does a record folder agree with itself? For any folder of the contest: names, fields, logs, bytes, README.

What it says is compared as printed: 1.0811 agrees with a log's 1.08107587. Logs that `runs.read` cannot read
are named, and what rests on them cannot be told. A folder written by --folder is also made again from its
results and compared digit by digit.
"""

import datetime
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from reproducing import claim, folder, submission
from reproducing.folder import EXPECTED, REQUIRED
from runs import SIZE_LIMIT, ReadError, RunRecord, log_beside, read, read_log
from scripts import HouseError, logged_house
from systems.layout import strict_json

STATUSES = GOOD, WRONG, UNKNOWN, NOTE = "ok", "DISAGREES", "cannot be told", "note"
SEED_IN_NAME = re.compile(r"(?:seed_?|train)(\d+)")
MOST_DIGITS = 25  # fewer than Decimal computes with
DECIMALS = 4  # of a score that is one: 1.06 may be anything
# What submission.json says of its seeds together, of one seed, and by which name a result has it.
TOTALS = {"val_bpb": "val_bpb", "val_loss": "val_loss", "bytes_total": "artifact_bytes"}
TOTALS |= {"bytes_code": "code_bytes", "bytes_model": "model_bytes"}
OF_SEED = ("val_bpb", "val_loss", "artifact_bytes", "code_bytes", "model_bytes", "steps", "legal")
OF_SEED += ("train_seconds", "calibrate_seconds", "eval_seconds")


class Finding(NamedTuple):
    """What a check found."""

    status: str
    check: str
    detail: str

    def __str__(self) -> str:
        return f"{self.status:14}  {self.check}: {self.detail}"


class Unreadable(NamedTuple):
    """A log that is not understood."""

    path: Path
    reason: str


class Folder:
    """A record folder as it is: submission.json, README, and its logs, read."""

    def __init__(self, path: Path):
        self.path = path
        self.readme = _text(path / "README.md")
        self.told, self.fault = _submission(path / "submission.json")
        self.logs: list[RunRecord] = []
        self.unreadable: list[Unreadable] = []
        self.contradictions: list[str] = []  # logs of ours and the results beside them
        for log in sorted([*path.rglob("*.log"), *path.rglob("*.txt")]):
            if log.name == "requirements.txt":
                continue
            try:
                self.logs.append(self._with_result(read_log(log)))
            except ReadError as error:
                self.unreadable.append(Unreadable(log, str(error).removeprefix(f"{log}: ")))

    def _with_result(self, log: RunRecord) -> RunRecord:
        """What the result beside a log of ours tells, which is more; else the log."""
        try:
            return read(log.path) if log.form == "log" else log
        except ReadError as error:
            self.contradictions.append(str(error))
            return log

    @property
    def ours(self) -> bool:
        """Whether it was written by --folder."""
        told = isinstance(self.told.get("files"), dict) and "script_sha256" in self.told
        return told or submission.BEGIN.strip() in self.readme

    @property
    def seeds(self) -> list[int]:
        """The seeds that submission.json names."""
        seeds = self.told.get("seeds", self.told.get("seed_results"))
        names = [str(seed) for seed in seeds] if isinstance(seeds, list | dict) else []
        return [int(name) for name in names if name.isdecimal() and len(name) < MOST_DIGITS]

    def result(self, seed: int) -> dict:
        """What submission.json says of a seed."""
        return told_of(self.told, seed)

    def logs_of(self, seed: int) -> list[RunRecord]:
        """The logs of a seed, by what they say or by their names."""
        return [log for log in self.logs if log.seed == seed or _seed_named(log.path) == seed]

    @property
    def results(self) -> list[RunRecord]:
        """The results of ours that lie there, one of each seed; none where a seed lacks it."""
        found = [next((log for log in self.logs_of(s) if log.form == "run"), None) for s in self.seeds]
        return [] if None in found else found

    def unread(self, seed: int) -> bool:
        """Whether a log that is not understood may be of this seed."""
        return any(_seed_named(log.path) in (seed, None) for log in self.unreadable)


def check_folder(path: Path) -> list[Finding]:
    """All that can be checked. Raises `SubmissionError` where there is no such folder."""
    if not path.is_dir():
        raise submission.SubmissionError(f"--check-folder {path}: no such folder")
    record = Folder(path)
    return [Finding(*found) for check in CHECKS for found in check(record)]


def passes(findings: Sequence[Finding]) -> bool:
    """Whether nothing disagrees, and no score rests on a log that is not understood."""
    unproven = [f for f in findings if f.status == UNKNOWN and f.check.startswith(("seed", "mean"))]
    return not unproven and all(finding.status != WRONG for finding in findings)


Found = Iterator[tuple[str, str, str]]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _submission(path: Path) -> tuple[dict, str]:
    """submission.json with its numbers as they are printed, {} where it is none; and then why."""
    try:
        told = strict_json(_text(path), parse_float=Decimal)
    except (ValueError, RecursionError) as error:
        return {}, str(error)
    return (told, "") if isinstance(told, dict) else ({}, "another value")


def told_of(told: Mapping, seed: int) -> dict:
    """What submission.json says of a seed; older folders have it under `seeds`."""
    for key in ("seed_results", "seeds"):
        results = told.get(key)
        if isinstance(results, dict) and isinstance(results.get(str(seed)), dict):
            return results[str(seed)]
    return {}


def _seed_named(path: Path) -> int | None:
    found = SEED_IN_NAME.search(path.stem)
    return int(found[1]) if found else None


def _unit(value: object) -> Decimal:
    """One of the last decimal of a number as it is printed; of a score at most a ten-thousandth."""
    exponent = Decimal(str(value)).as_tuple().exponent
    return Decimal(1).scaleb(min(exponent, -DECIMALS))


def _number(value: object) -> Decimal | None:
    """A number as it is printed; None for anything else, and for what is no score of anything (1e-999999)."""
    if isinstance(value, bool) or not isinstance(value, Decimal | int | float):
        return None
    number = Decimal(str(value))
    return number if number.is_finite() and abs(number.adjusted()) < MOST_DIGITS else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def agree(told: object, right: object) -> bool:
    """Whether two scores may be the same number, each rounded as it is printed."""
    one, other = _number(told), _number(right)
    if one is None or other is None:
        return False
    fine, coarse = sorted((_unit(one), _unit(other)))
    return one == other or (fine < coarse and abs(one - other) <= (fine + coarse) / 2)


def _follows(told: object, computed: float, scores: Sequence[Decimal]) -> bool:
    """Whether a printed number may be what was computed, here from rounded scores, there from whole ones."""
    number = _number(told)
    if number is None:
        return False
    return abs(number - Decimal(computed)) <= _unit(number) / 2 + max(map(_unit, scores))


# -- submission.json and a result

Figure = tuple[str, object, object]  # name, what submission.json says, and what the result does


def totals(told: Mapping, result: Mapping) -> Iterator[Figure]:
    """What submission.json says of all its seeds, of which the result is the only one."""
    return ((name, told[name], result.get(key)) for name, key in TOTALS.items() if name in told)


def figures_of_seed(told: Mapping, result: Mapping) -> Iterator[Figure]:
    """What submission.json says of the seed of a result."""
    yield from ((name, told[name], result.get(name)) for name in OF_SEED if name in told)
    stages = told.get("stages", {})
    if not isinstance(stages, dict):
        yield "stages", stages, "an object"
        return
    for name, score in stages.items():
        yield f"stages {name}", score, result["stages"].get(name, {}).get("val_bpb")


def same_figure(figure: Figure) -> bool:
    """Whether a figure may be the result's: scores and seconds as they are printed, all else exactly."""
    name, told, right = figure
    if not name.endswith("_seconds"):
        exact = "bytes" in name or name in ("steps", "legal")
        return type(told) is type(right) and told == right if exact else agree(told, right)
    one, other = _number(told), _number(right)
    if one is None or other is None:
        return False
    return abs(one - other) <= Decimal(1).scaleb(min(one.as_tuple().exponent, 0)) / 2


# -- the checks


def _name(record: Folder) -> Found:
    try:
        date, _ = folder.named(record.path)
    except submission.SubmissionError as error:
        yield WRONG, "name", str(error)
        return
    told = record.told.get("date")
    try:
        day = datetime.datetime.fromisoformat(str(told)).date().isoformat()
    except ValueError:
        yield WRONG, "date", f"submission.json says {told}, must be YYYY-MM-DD"
        return
    status = GOOD if day == date else WRONG if record.ours else NOTE
    yield status, "date", f"submission.json says {told}, the folder's name {date}"


def _files(record: Folder) -> Found:
    needed = ("README.md", "submission.json", "train_gpt.py")
    missing = [name for name in needed if not (record.path / name).is_file()]
    missing += [] if record.logs or record.unreadable else ["a log"]
    yield (
        (WRONG, "files", f"missing: {', '.join(missing)}") if missing else (GOOD, "files", ", ".join(needed))
    )
    for contradiction in record.contradictions:
        yield WRONG, "logs", contradiction
    for log in record.logs:
        yield from _source(log)
    for log in record.unreadable:
        yield UNKNOWN, "logs", f"{log.path.relative_to(record.path)}: {log.reason}"
    for log in record.logs:
        name = _seed_named(log.path)
        if name is not None and name in record.seeds and name != log.seed:
            yield WRONG, "logs", f"{log.path.relative_to(record.path)} ran with SEED={log.seed}"


def _source(log: RunRecord) -> Found:
    """The script in a log of ours against the checksums that the result beside it has."""
    told = log.environment
    if log.form != "run" or not told.get("source_sha256"):
        return
    try:
        logged_house(_text(log_beside(log.path)), told["source_sha256"], told.get("house_sha256", {}))
    except HouseError as error:
        yield WRONG, "logs", f"{log.path.name}: {error}"


def _fields(record: Folder) -> Found:
    if not record.told:
        yield WRONG, "fields", f"submission.json is not a JSON object ({record.fault or 'an empty one'})"
        return
    absent = [name for name in EXPECTED if record.told.get(name) in ("", None, [], {})]
    required = [name for name in absent if name in REQUIRED]
    if required:
        yield WRONG, "fields", f"missing or empty: {', '.join(required)}"
    elif absent:
        yield NOTE, "fields", f"without {', '.join(absent)}, which most folders have"
    else:
        yield GOOD, "fields", ", ".join(EXPECTED)


def _seeds(record: Folder) -> Found:
    """Of each seed: a log, its score, its bytes."""
    if record.told.get("seeds") and not record.seeds:
        yield WRONG, "seeds", f"submission.json names no seed: {record.told['seeds']}"
    for seed in record.seeds:
        logs, told = record.logs_of(seed), record.result(seed)
        check = f"seed {seed}"
        if not logs:
            status = UNKNOWN if record.unread(seed) else WRONG
            yield status, check, "no log that can be read" if record.unread(seed) else "no log"
            continue
        for key, value_of, same in (
            ("val_bpb", lambda log: log.val_bpb, agree),
            ("val_loss", lambda log: log.val_loss, agree),
            ("artifact_bytes", lambda log: log.artifact_bytes, lambda a, b: a == b),
        ):
            values = [value_of(log) for log in logs if value_of(log) is not None]
            if key not in told or not values:
                continue
            good = any(same(told[key], value) for value in values)
            bad = UNKNOWN if record.unread(seed) else WRONG
            logged = ", ".join(map(str, values))
            yield (GOOD if good else bad), check, f"{key} {told[key]}, its logs {logged}"
        yield from _result(record, seed)


def _result(record: Folder, seed: int) -> Found:
    """Of a seed: all that its result tells too, where one of ours lies there."""
    told = record.result(seed)
    tried = [[*figures_of_seed(told, log.result)] for log in record.logs_of(seed) if log.form == "run"]
    if not told or not tried:
        return
    apart = min(([f for f in figures if not same_figure(f)] for figures in tried), key=len)
    for name, value, right in apart:
        status = UNKNOWN if record.unread(seed) else WRONG
        yield status, f"seed {seed}", f"{name} {value}, its result {right}"
    if not apart:
        yield GOOD, f"seed {seed}", f"{len(tried[0])} figures are those of its result"


def _scores(record: Folder) -> list[tuple[int, Decimal | None]]:
    """Each seed's score: as submission.json says, else as its only log says."""
    scores = []
    for seed in record.seeds:
        logs = record.logs_of(seed)
        told = record.result(seed).get("val_bpb", logs[0].val_bpb if len(logs) == 1 else None)
        scores.append((seed, _number(told)))
    return scores


def _mean(record: Folder) -> Found:
    scores = [score for _, score in _scores(record) if score is not None]
    if not record.seeds:
        yield from _mean_of_logs(record)
        return
    if not scores or len(scores) < len(record.seeds):
        yield UNKNOWN, "mean", "not every seed has a score"
        return
    yield from _losses(record)
    mean, deviation = claim.mean_and_std([float(score) for score in scores])
    told = record.told.get("val_bpb")
    good = _follows(told, mean, scores)
    yield (GOOD if good else WRONG), "mean", f"val_bpb {told}, of the seeds {mean:.8f}"
    spread = record.told.get("val_bpb_std")
    if deviation is None or spread is None:
        return
    population = statistics.pstdev(map(float, scores))
    if _follows(spread, deviation, scores):
        yield GOOD, "spread", f"val_bpb_std {spread}, sample standard deviation {deviation:.5f}"
    elif _follows(spread, population, scores):
        yield NOTE, "spread", f"val_bpb_std {spread} is the population's, the sample's is {deviation:.5f}"
    else:
        yield WRONG, "spread", f"val_bpb_std {spread}, sample {deviation:.5f}, population {population:.5f}"


def _losses(record: Folder) -> Found:
    """Mean and spread of the losses, where results of ours tell those of all seeds."""
    losses = [log.val_loss for log in record.results]
    computed = zip(("val_loss", "val_loss_std"), claim.mean_and_std(losses) if losses else (), strict=False)
    for name, value in computed:
        told = record.told.get(name)
        if told is not None and value is not None:
            good = _follows(told, value, [*map(_number, losses)])
            yield (GOOD if good else WRONG), "mean", f"{name} {told}, of the results {value:.8f}"


def _mean_of_logs(record: Folder) -> Found:
    """Of a folder that names no seeds, as those of March: its score is the mean of its logs, or one's."""
    told, scores = record.told.get("val_bpb"), [bpb for _, bpb in {(r.seed, r.val_bpb) for r in record.logs}]
    if told is None or not scores:
        yield UNKNOWN, "mean", f"val_bpb {told}, and {len(scores)} logs that can be read"
        return
    one = next((log.path.name for log in record.logs if agree(told, log.val_bpb)), None)
    mean, _ = claim.mean_and_std(scores)
    good = _follows(told, mean, [*map(_number, scores)])
    status = GOOD if good else NOTE if one else UNKNOWN if record.unreadable else WRONG
    of_one = f", that of {one}" * (one is not None)
    yield status, "mean", f"val_bpb {told}{of_one}; the mean of {len(scores)} logs is {mean:.8f}"


def _bytes(record: Folder) -> Found:
    """The worst case over the seeds: the largest artifact of the logs."""
    sizes = {log.artifact_bytes for log in record.logs if log.artifact_bytes}
    sizes |= {_whole(record.result(seed).get("artifact_bytes")) for seed in record.seeds} - {None}
    claims = {key: record.told[key] for key in ("bytes_total", "artifact_bytes_max") if key in record.told}
    for key, value in claims.items() if sizes else ():
        good = value == max(sizes)
        yield (GOOD if good else WRONG), "bytes", f"{key} {value}, the largest artifact is {max(sizes)}"
    worst = max(record.results, key=lambda log: log.artifact_bytes or 0, default=None)
    for figure in totals(record.told, worst.result) if worst else ():
        if figure[0] in ("bytes_code", "bytes_model"):
            status = GOOD if same_figure(figure) else WRONG
            yield status, "bytes", f"{figure[0]} {figure[1]}, of the largest artifact {figure[2]}"
    largest = max(sizes | ({*map(_whole, claims.values())} - {None}), default=None)
    if largest is None:
        yield UNKNOWN, "bytes", "neither logs nor submission.json tell"
    else:
        kept = largest <= SIZE_LIMIT
        yield (GOOD if kept else WRONG), "bytes", f"at most {largest}, limit {SIZE_LIMIT}"


def _code(record: Folder) -> Found:
    """The script in the folder against what the logs say of the code, counted or as source."""
    script = record.path / "train_gpt.py"
    if not script.is_file() or not record.logs:
        return
    size, fitting, others = script.stat().st_size, set(), []
    for log in record.logs:
        sizes = {"counted": log.code_bytes, "uncompressed": log.environment.get("source_bytes")}
        match = next((name for name, value in sizes.items() if value == size), None)
        if match:
            fitting.add(log.seed)
            yield GOOD, "code", f"{size} bytes, {match} in {log.path.name}"
        else:
            others.append((log, sizes))
    for log, sizes in others:
        shown = ", ".join(f"{value} {name}" for name, value in sizes.items() if value) or "nothing"
        status = NOTE if log.seed in fitting else WRONG if any(sizes.values()) else UNKNOWN
        yield status, "code", f"train_gpt.py has {size} bytes, {log.path.name} says {shown}"


NUMBER = re.compile(r"(?<![\w.])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")


def _numbers(text: str) -> list[str]:
    return [number.replace(",", "") for number in NUMBER.findall(text)]


def _readme(record: Folder) -> Found:
    """Scores of README against submission.json; artifacts in rows of a seed against its logs."""
    if not record.readme:
        return
    numbers = [n for n in _numbers(record.readme) if len(n.partition(".")[2]) >= DECIMALS]
    wanted = [
        ("val_bpb", record.told.get("val_bpb")),
        *((f"seed {s}", score) for s, score in _scores(record)),
    ]
    for what, value in wanted:
        if value is not None:
            good = any(agree(Decimal(number), value) for number in numbers)
            yield (GOOD if good else WRONG), "README", f"{what} {value} {'is' if good else 'is not'} in it"
    for seed in record.seeds:
        known = {log.artifact_bytes for log in record.logs_of(seed)}
        known |= {log.model_bytes for log in record.logs_of(seed)}
        known |= {_whole(record.result(seed).get("artifact_bytes"))}
        for row in re.findall(rf"(?m)^\|[ *]*{seed}[ *]*\|.*$", record.readme):
            sizes = {int(n) for n in _numbers(row) if n.isdigit() and SIZE_LIMIT * 0.9 < int(n) <= SIZE_LIMIT}
            for size in sizes - known if known - {None} else ():
                yield WRONG, "README", f"seed {seed}: {size} bytes, of no log of this seed"


def _remarks(record: Folder) -> Found:
    """Limits of the contest that a log exceeds, and why a folder of ours is no record: no disagreements."""
    for log in record.logs:
        for limit in log.broken_limits:
            yield NOTE, "limits", f"{log.path.name}: {limit}"
    if record.told.get("non_record"):
        yield NOTE, "track", f"{record.told.get('track')}, {record.told.get('non_record_reasons')}"


def _made_again(record: Folder) -> Found:
    """A folder of ours: submission.json and README made again from the results, and every file's checksum."""
    if not record.ours:
        if any(log.form in ("run", "log") for log in record.logs):
            lacks = f"submission.json has no checksums of the files, README.md no {submission.BEGIN.strip()}"
            yield NOTE, "made again", f"not done, for {lacks}"
        return
    if not isinstance(record.told.get("files"), dict):
        yield WRONG, "made again", "submission.json has no checksums of the files"
        return
    named = {*record.told["files"], "README.md", "submission.json"}
    files = (path for path in sorted(record.path.rglob("*")) if path.is_file())
    others = [name for path in files if (name := path.relative_to(record.path).as_posix()) not in named]
    if others:
        more = f" and {len(others) - 3} more" * (len(others) > 3)
        yield NOTE, "files", f"submission.json has no checksum of {', '.join(others[:3])}{more}"
    try:
        found = submission.disagreements(record.path, folder.claim_of, folder.page)
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:  # values of any kind
        found = [f"cannot be made again: {error}"]
    for line in found:
        yield WRONG, "made again", line
    if not found:
        yield GOOD, "made again", f"submission.json, README.md and {len(record.told['files'])} files"


CHECKS: Sequence = (
    _name, _files, _fields, _seeds, _mean, _bytes, _code, _readme, _remarks, _made_again,
)  # fmt: skip
