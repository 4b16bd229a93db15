"""Other people's record folders: judged without a ledger or a result of ours, by what lies in them.

Rows F are those of `tools/reproduce.py --check-folder`, rows L what logs say against what the contest's data
and limits are (`claims`), rows P what the sources show (`static`); for those nothing of the folder is run.
Rows B ask script and artifact from outside, in the box (`questions`), where --data and an artifact are there.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from auditing import claims, shown, static
from auditing.blackbox import Subject
from auditing.questions import QUESTIONS, answers
from auditing.run import (
    BOS,
    CONSISTENT,
    FAIL,
    NOT_CHECKED,
    VERIFIED,
    AuditError,
    Failed,
    NotChecked,
    Verdict,
    read_values,
    state_of_files,
    verdict_of,
)
from auditing.verdict import EXIT_CODES
from command import Mistake
from reproducing import checking
from runs import RunRecord

SHOWN = 3  # findings of a check that its row shows


class Row(NamedTuple):
    """A line of the table."""

    name: str
    rule: str
    verdict: Verdict


@dataclass(frozen=True)
class Case:
    """A folder to be judged, and what the command gives for it."""

    folder: Path
    script_named: str = ""
    data: Path | None = None  # validation shards, with their sidecar
    fresh: Sequence[Path] = ()
    asked: Sequence[str] = tuple(QUESTIONS)

    @functools.cached_property
    def record(self) -> checking.Folder:
        """submission.json, README and logs."""
        return checking.Folder(self.folder)

    @functools.cached_property
    def script(self) -> Path | None:
        """The script that made the score. Raises Mistake where that is unclear."""
        return static.script_of(self.folder, self.script_named)

    @functools.cached_property
    def stream(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Tokens and original bytes of --data, (N,) each; None without. Raises Mistake."""
        if self.data is None:
            return None
        try:
            tokens, sizes = (_values(self.data, kind) for kind in ("val", "val_bytes"))
        except Failed as reason:
            raise Mistake(f"--data {self.data}: {reason}") from None
        if len(tokens) < 2 or len(tokens) != len(sizes) or tokens[0] != BOS:
            raise Mistake(
                f"--data {self.data}: needs fineweb_val_*.bin and, as long, fineweb_val_bytes_*.bin"
            )
        return tokens, sizes

    @functools.cached_property
    def claim(self) -> claims.Claim:
        """What the folder claims, of the contest's validation set or of that of --data."""
        if self.stream is None:
            return claims.Claim(self.record)
        tokens, sizes = self.stream
        documents = int((tokens == BOS).sum())
        known = claims.ValidationSet("--data", len(tokens) - 1, int(sizes.sum()), documents)
        return claims.Claim(self.record, (known,))

    def artifact(self) -> tuple[Path, RunRecord]:
        """The file that has the bytes of the model of a claimed run, and its log. Raises NotChecked."""
        for log in self.claim.logs:
            for path in sorted(self.folder.rglob("*")):
                if path.is_file() and log.model_bytes == path.stat().st_size and path != self.script:
                    return path, log
        raise NotChecked(
            "no file of the folder has the bytes of the model in its logs: the artifact is not here"
        )

    def subject(self) -> Subject:
        """Script and artifact, to be asked. Raises NotChecked where they cannot be."""
        if self.stream is None:
            raise NotChecked("not asked: needs --data with the validation shards")
        if self.script is None:
            raise NotChecked("not asked: the folder has no train*.py")
        artifact, log = self.artifact()
        tokens, sizes = self.stream
        stage = log.stages[log.final_stage]
        return Subject(
            files=[self.script, artifact],
            tokens=tokens,
            sizes=sizes,
            vocab=int(log.settings.get("VOCAB_SIZE") or tokens.max() + 1),
            claim={key: stage[key] for key in ("val_loss", "val_bpb")},
            tokenizer=next(iter(sorted(self.folder.rglob("*.model"))), None),
            fresh=list(self.fresh),
        )


def _values(data: Path, kind: str) -> np.ndarray:
    found = sorted(data.glob(f"fineweb_{kind}_[0-9]*.bin"))
    return np.concatenate([np.empty(0, np.int64), *(read_values(path).astype(np.int64) for path in found)])


FOLDER_RULES = (
    "name and date",
    "its files, and logs of the right seeds",
    "fields of submission.json",
    "each seed's score and bytes are its log's",
    "mean and spread of the seeds",
    "bytes of the largest artifact",
    "script has the size that the logs say",
    "README says the same",
    "limits that logs exceed",
    "made again from its results",
)
REMARKS = FOLDER_RULES.index("limits that logs exceed")  # the rows L judge them
MADE_AGAIN = FOLDER_RULES.index("made again from its results")  # only of a folder that --folder wrote
STATUS_OF = {
    checking.WRONG: FAIL,
    checking.UNKNOWN: NOT_CHECKED,
    checking.GOOD: CONSISTENT,
    checking.NOTE: CONSISTENT,
}


def folder_rows(case: Case) -> Iterator[Row]:
    """What --check-folder finds, one row a check."""
    for number, (rule, look) in enumerate(zip(FOLDER_RULES, checking.CHECKS, strict=True)):
        if number != REMARKS and (number != MADE_AGAIN or case.record.ours):
            yield Row(
                f"F{number + 1}", rule, verdict_of(lambda look=look: _summed(look(case.record)), CONSISTENT)
            )


def _summed(findings: Iterator[tuple[str, str, str]]) -> Verdict:
    """The worst of some findings, with what they say. Raises NotChecked where there are none."""
    found = [checking.Finding(*finding) for finding in findings]
    worst = next((status for status in STATUS_OF if any(f.status == status for f in found)), None)
    if worst is None:
        raise NotChecked("submission.json says nothing of it")
    texts = [f"{f.check}: {f.detail}" for f in found if f.status == worst]
    more = f" and {len(texts) - SHOWN} more" * (len(texts) > SHOWN)
    return Verdict(STATUS_OF[worst], "; ".join(texts[:SHOWN]) + more)


def claim_rows(case: Case) -> Iterator[Row]:
    """The claims against the logs."""
    for name, rule, look in claims.CLAIMS:
        yield Row(name, rule, verdict_of(lambda look=look: look(case.claim), CONSISTENT))


def static_rows(case: Case) -> Iterator[Row]:
    """What the sources show."""
    program = static.Program(case.folder, case.script, case.record.logs) if case.script else None
    for rule in static.RULES:
        without = Verdict(NOT_CHECKED, "the folder has no train*.py")
        found = verdict_of(lambda rule=rule: static.judged(rule, program), CONSISTENT) if program else without
        yield Row(rule.name, rule.rule, found)


def asked_rows(case: Case) -> Iterator[Row]:
    """What script and artifact answer in the box, or one row that says why they were not asked."""
    try:
        subject = case.subject()
    except NotChecked as reason:
        yield Row("B", "asked from outside, in the box", Verdict(NOT_CHECKED, str(reason)))
        return
    for name in case.asked:
        yield Row(name, QUESTIONS[name][0], answers(subject, [name])[name])


def rows(case: Case) -> Iterator[Row]:
    """The table of a folder, row by row. Raises AuditError or Mistake where there is none to judge."""
    if not case.folder.is_dir():
        raise AuditError(f"--folder {case.folder}: no such folder")
    if not any(case.folder.iterdir()):
        raise AuditError(f"--folder {case.folder}: empty")
    state_of_files(case.folder)  # refuses links, and what may never end
    for part in (folder_rows, claim_rows, static_rows, asked_rows):
        yield from part(case)


ANSWERED = {"P2", "P6"}  # what the folder lacks the files for, B3 and B4 tell from outside


def outcome(case: Case, found: Sequence[Row]) -> tuple[str, str]:
    """FAIL, CONSISTENT or VERIFIED, and the headline that explains it.

    VERIFIED needs every question answered, nothing to look at, and one claimed run, whose artifact is here.
    """
    told = case.record.told.get("val_bpb")
    number = f"val_bpb {told}" if told is not None else "its score"
    names = {s: [row.name for row in found if row.verdict.status == s] for s in (FAIL, NOT_CHECKED, VERIFIED)}
    if names[FAIL]:
        itself = all(name.startswith("F") for name in names[FAIL])
        what = "the folder disagrees with itself" if itself else f"{number} is not to be believed"
        return FAIL, f"{FAIL}: {what}: {', '.join(names[FAIL])}"
    answered = names[VERIFIED] == [*QUESTIONS] and {*names[NOT_CHECKED]} <= ANSWERED
    if answered and len(case.claim.logs) == 1:
        return (
            VERIFIED,
            f"{VERIFIED}: {number} is what script and artifact score here; training by its records",
        )
    open_ = f"; to look at: {', '.join(names[NOT_CHECKED])}" * bool(names[NOT_CHECKED])
    return CONSISTENT, f"{CONSISTENT}: {number} rests on the folder's own word{open_}"


def main(case: Case) -> int:
    """Print table and headline. Exit code 0, 1 or 3; raises Mistake."""
    found = []
    for row in rows(case):
        print(shown.row(row.name, row.verdict, row.rule), flush=True)
        found.append(row)
    verdict, headline = outcome(case, found)
    print(shown.folded(headline))
    return EXIT_CODES[verdict]
