"""What a record folder claims against what its logs print, and both against what the contest's data are.

All of it is the folder's own word: what agrees is CONSISTENT, never VERIFIED. The strongest row is L2: loss
and bits per byte of one score make the bytes of the text, and those of the validation set are known.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from auditing.run import NotChecked, require
from auditing.sets import BYTES_MORE, CUT, SETS, ValidationSet
from logbook.lines import cleaned
from reproducing.checking import Folder, agree
from runs import EVAL_LIMIT, SIZE_LIMIT, TRAIN_LIMIT, RunRecord, log_beside

STEP = 1.0  # seconds: a clock stops training after the step that is under way
LONGEST_LINE = 1000  # characters; a log's figures stand in shorter ones
LUCK = 0.05  # the best of several by chance


class Claim:
    """A folder's claim, and the logs of the runs that it rests on."""

    def __init__(self, record: Folder, sets: Sequence[ValidationSet] = SETS):
        self.record, self.sets = record, sets

    @functools.cached_property
    def logs(self) -> list[RunRecord]:
        """The logs of the claimed scores; all, where no log has one."""
        return [log for log in self.record.logs if self._claims(log)] or self.record.logs

    def _claims(self, log: RunRecord) -> bool:
        told = self.record.told.get("val_bpb")
        if self.record.seeds:
            told = self.record.result(log.seed).get("val_bpb") if log.seed in self.record.seeds else None
            return agree(told, log.val_bpb) or (told is None and log.seed in self.record.seeds)
        return agree(told, log.val_bpb)

    def set_of(self, targets: int) -> ValidationSet | None:
        """The set that has so many targets."""
        return next((s for s in self.sets if -CUT / 10 <= 1 - targets / s.targets <= CUT), None)

    @property
    def timed(self) -> bool:
        """Whether the limits of time are its track's: by the folder it lies in, else by its own word."""
        lies_in = self.record.path.resolve().parent.name
        told = lies_in if lies_in.startswith("track_") else str(self.record.told.get("track"))
        return not told.removeprefix("track_").replace("-", "_").startswith("non_record")

    def need_logs(self) -> None:
        """Raise NotChecked where no log can be read."""
        if not self.logs:
            raise NotChecked("no log that can be read")

    def named(self, log: RunRecord) -> str:
        """The log's path inside the folder."""
        return log.path.relative_to(self.record.path).as_posix()

    @functools.cached_property
    def lines(self) -> list[tuple[str, str]]:
        """(log:line, text) of every log, read or not, without prefixes."""
        paths = [*(log.path for log in self.record.logs), *(log.path for log in self.record.unreadable)]
        return [line for path in sorted(set(paths)) for line in self._lines_of(path)]

    def _lines_of(self, path: Path) -> Iterator[tuple[str, str]]:
        name = path.relative_to(self.record.path).as_posix()
        log = log_beside(path) if path.suffix == ".json" else path
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        for number, line in enumerate(cleaned(text).splitlines(), 1):
            yield f"{name}:{number}", line

    def matching(self, pattern: str) -> list[tuple[str, re.Match]]:
        """(log:line, match) of the whole lines of a form."""
        form = re.compile(pattern, re.I)
        short = ((where, line.strip()) for where, line in self.lines if len(line) < LONGEST_LINE)
        return [(where, match) for where, line in short if (match := form.fullmatch(line))]


def documents_and_targets(claim: Claim) -> str:
    """Documents and targets that the logs print, of a set that is known."""
    claim.need_logs()
    told = claim.matching(
        r"(?:[a-z_]+(?: val_loss:\S+ val_bpb:\S+ |: ?))?(?:(?:total|val)_docs|documents|docs):(\d[\d,_]*)\b.*"
    )
    whole = claim.sets[0].documents
    for where, match in told:
        count = int(re.sub("[,_]", "", match[1]))
        require(count >= whole, f"{where}: {count:,} documents, the validation set has {whole:,}")
    found = {log.targets for log in claim.logs}
    if None in found:
        raise NotChecked("its logs do not say how many targets were scored")
    sets = {targets: claim.set_of(targets) for targets in sorted(found)}
    strange = [f"{targets:,}" for targets, known in sets.items() if known is None]
    if strange:
        require(claim.sets is SETS, f"{', '.join(strange)} targets, the set has {claim.sets[0].targets:,}")
        raise NotChecked(f"{', '.join(strange)} targets, of no validation set that is known here")
    counts = f"{whole:,} documents" if told else "documents not printed"
    return f"{counts}; " + ", ".join(f"{n:,} targets as {known.name} has" for n, known in sets.items())


def implied_bytes(claim: Claim) -> str:
    """The bytes that loss, bits per byte and targets make, of every stage that was scored."""
    claim.need_logs()
    shown = []
    for log in claim.logs:
        for name, stage in log.stages.items():
            targets = stage.get("targets") or log.targets
            if not targets or name.startswith(("untrained", "step_")):
                continue
            made = targets * stage["val_loss"] / math.log(2) / stage["val_bpb"]
            right = (claim.set_of(targets) or claim.sets[0]).bytes
            digits = sum(_half_unit(stage[key]) / stage[key] for key in ("val_loss", "val_bpb"))
            told = f"{claim.named(log)}: {name} makes {made:,.0f} bytes, {made / right - 1:+.2%} of {right:,}"
            require(-CUT - digits <= made / right - 1 <= BYTES_MORE + digits, told)
            shown.append(made)
    if not shown:
        raise NotChecked("its logs do not say how many targets were scored")
    return f"{min(shown):,.0f} to {max(shown):,.0f} bytes by {len(shown)} scores of the logs"


def _half_unit(value: float) -> float:
    """Half of the last decimal of a number as a log printed it."""
    return 0.5 * 10.0 ** -len(repr(value).partition(".")[2])


def training_seconds(claim: Claim) -> str:
    """Training, and with calibration, which reads training data (#677)."""
    claim.need_logs()
    times = [log.train_seconds for log in claim.logs if log.train_seconds is not None]
    longest = max(times, default=0.0)
    _within(claim, longest, TRAIN_LIMIT + STEP, f"trained for {longest:.1f} s, limit {TRAIN_LIMIT:g}")
    if len(times) < len(claim.logs):
        raise NotChecked("not every log says for how long it trained")
    both = max(log.train_seconds + (log.calibrate_seconds or 0.0) for log in claim.logs)
    told = f"training at most {longest:.1f} s, with the calibration that is logged {both:.1f} s"
    if both > TRAIN_LIMIT + STEP:  # accepted before the ruling and after it, so a person has to judge
        raise NotChecked(f"{told}: it reads training data (#677)")
    return told


def evaluation_seconds(claim: Claim) -> str:
    """The evaluation that gives the score."""
    claim.need_logs()
    times = [log.eval_seconds for log in claim.logs]
    if None in times:
        raise NotChecked("not every log says how long its evaluation took")
    _within(claim, max(times), EVAL_LIMIT, f"evaluation took {max(times):.1f} s, limit {EVAL_LIMIT:g}")
    return f"at most {max(times):.1f} s"


def _within(claim: Claim, seconds: float, limit: float, told: str) -> None:
    """Raise Failed over a limit of time, or NotChecked where the folder's track has none."""
    if seconds > limit and not claim.timed:
        raise NotChecked(f"{told}; of a non-record folder, which may take longer")
    require(seconds <= limit, told)


def sizes(claim: Claim) -> str:
    """Model by the logs and the script as it lies in the folder; or what the logs count."""
    claim.need_logs()
    told = max((log.artifact_bytes for log in claim.logs if log.artifact_bytes), default=None)
    if told is None:
        raise NotChecked("its logs do not say the bytes of the artifact")
    models = [log.model_bytes for log in claim.logs if log.model_bytes]
    script = claim.record.path / "train_gpt.py"
    shown = f"{told:,} bytes by the logs"
    if models and script.is_file():  # a log may count the source of a script that is shipped packed
        shipped = max(models) + script.stat().st_size
        shown, told = f"{shown}, {shipped:,} with the script in the folder", min(told, shipped)
    require(told < SIZE_LIMIT, f"{shown}, limit {SIZE_LIMIT:,}")
    return shown


def chosen_runs(claim: Claim) -> str:
    """Whether the claimed runs are the best of more that the folder has logs of."""
    claim.need_logs()
    every = sorted({(log.val_bpb, log.seed, log.form) for log in claim.record.logs})
    taken = sorted({(log.val_bpb, log.seed, log.form) for log in claim.logs})
    held = [notice for log in claim.logs for notice in log.notices if notice.startswith("holds ")]
    told = f"{len(taken)} of the {len(every)} runs that it has logs of"
    if len(taken) < len(every) and taken == every[: len(taken)]:
        luck = 1 / math.comb(len(every), len(taken))
        require(luck > LUCK, f"claims the best {told}")
        raise NotChecked(f"claims the best {told}, by chance once in {1 / luck:.0f}")
    if held:
        raise NotChecked(f"claims {told}; {held[0]}")
    return f"claims {told}" + ", not the best" * (len(taken) < len(every))


EARLY = r"(?:\[?pre[-_ ]?quant\w*[-_ ]?(?:ttt|adapt)\w*|(?:ttt|adapt)\w*[-_ ]pre[-_]?quant\w*)\b"


def adaptation_first(claim: Claim) -> str:
    """Lines and settings that say that the model was adapted to the validation set before it was scored."""
    on = claim.matching(rf"{EARLY}\w*(?:enabled)?: ?(?:true|1)") + claim.matching(
        rf"{EARLY}.*(?:epoch|step|loss).*"
    )
    on = [(where, match) for where, match in on if not re.search(r"(?i):\s*(?:false|0)\b", match[0])]
    require(not on, "; ".join(f"{where} says {match[0].strip()[:60]!r}" for where, match in on[:3]))
    claim.need_logs()
    return "no line of the logs says so"


PASS = r".*?\b(pass|epoch|round|attempt|try)[ _:=#]*(\d+)\b.*?\bval_?bpb[:= ]+(\d+\.\d+).*"


def single_pass(claim: Claim) -> str:
    """Several scores of the validation set by the same means, of which the last or the least is claimed."""
    found = claim.matching(PASS)
    scores: dict[tuple[str, str], dict[int, str]] = {}
    for where, match in found:
        log = where.rpartition(":")[0]
        scores.setdefault((log, match[1].lower()), {})[int(match[2])] = match[3]
    for (log, word), several in scores.items():
        if len(several) < 2:
            continue
        told = f"{log}: {len(several)} scores, {word} {min(several)} to {max(several)}"
        best = min(several.values(), key=float)
        claimed = [claim.record.told.get("val_bpb"), *(log.val_bpb for log in claim.logs)]
        require(
            not any(agree(value, float(best)) for value in claimed), f"{told}; claimed is the best, {best}"
        )
        raise NotChecked(told)
    claim.need_logs()
    return "no log has scores of several passes"


CLAIMS: Sequence[tuple[str, str, Callable[[Claim], str]]] = (
    ("L1", "validation set whole: documents, targets", documents_and_targets),
    ("L2", "bytes: those that the scores imply are the set's", implied_bytes),
    ("L3", "600 s of training", training_seconds),
    ("L4", "600 s of evaluation", evaluation_seconds),
    ("L5", "16,000,000 bytes", sizes),
    ("L6", "the runs were not chosen by their scores", chosen_runs),
    ("L7", "nothing adapts before it is scored", adaptation_first),
    ("L8", "one pass over the validation set", single_pass),
)
