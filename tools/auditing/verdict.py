"""What the verdicts of all checks come to: the headline, and the exit code."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from auditing.sets import contest_set

if TYPE_CHECKING:
    from auditing.run import Audit

STATUSES = VERIFIED, CONSISTENT, NOT_CHECKED, FAIL = "VERIFIED", "CONSISTENT", "NOT CHECKED", "FAIL"

# The number: data and bytes, size, the counted files alone, and the score itself, made again by a Python that
# lets no other code in.
CARRIES = ("A1", "A3", "S1", "S2", "S6", "E1")
CONDITIONS = ("D1", "D2")  # where nothing adapts; else all four
TRAINED, RETRAINED = ("W1", "W3", "W4"), "W2"
RECORDED = ("R5",)  # what cannot be made again must at least be told by a chain
OTHER_FSTRINGS = "other words in f-strings"  # of S5: what they hold is not known
SAMPLED = " drawn by seed "  # of E1 and E2: they repeated some documents
EXIT_CODES = {VERIFIED: 0, FAIL: 1, CONSISTENT: 3}


class Verdict(NamedTuple):
    """What a check found."""

    status: str  # of STATUSES
    evidence: str


class Kept(NamedTuple):
    """As much of an audit as its verdict needs, from its audit.json and the result of the run."""

    result: Mapping
    evaluator: str
    strange_files: Sequence[str]

    @property
    def known(self) -> bool:
        """The house that ran, as it says, is the repository's."""
        return not self.strange_files


def evaluator_of(final: str, sgd: bool) -> str:
    """What gives the score of a final stage: lora, sgd, sliding or standard."""
    if final == "ttt":
        return "sgd" if sgd else "lora"
    return "sliding" if final == "sliding" else "standard"


def carries(audit: "Audit | Kept") -> list[str]:
    """Names of the checks that carry the number: each must be VERIFIED."""
    order = ["D3", "D4"] * (audit.evaluator != "standard")
    adapted = ["E2"] * (audit.evaluator in ("lora", "sgd"))
    return [*CARRIES, *adapted, *CONDITIONS, *order, *TRAINED]


def _retrained(verdicts: Mapping[str, Verdict]) -> bool:
    return verdicts[RETRAINED].status == VERIFIED


def missing(audit: "Audit | Kept", verdicts: Mapping[str, Verdict]) -> list[str]:
    """What stands between the number and VERIFIED, in words.

    Weights that a training by the repository's script has given again need no word about the script that ran:
    its score was then made by code which is known to be legal.
    """
    again = _retrained(verdicts)
    excused = {*CONDITIONS, "D3", "D4", *TRAINED} if again else set()
    open_ = [name for name in carries(audit) if verdicts[name].status != VERIFIED and name not in excused]
    open_ += [name for name in RECORDED if verdicts[name].status == NOT_CHECKED]
    if OTHER_FSTRINGS in verdicts["S5"].evidence:  # which may hold any code
        open_.append("S5")
    words = [f"{name} {verdicts[name].status}" for name in open_]
    return words + [f"script unknown ({', '.join(audit.strange_files)})"] * (not audit.known and not again)


def counted(verdicts: Mapping[str, Verdict]) -> dict[str, int]:
    """How many checks have each status; a status that none has is left out."""
    found = Counter(verdict.status for verdict in verdicts.values())
    return {status: found[status] for status in STATUSES if found[status]}


def worst(verdicts: Mapping[str, Verdict]) -> str:
    """FAIL, VERIFIED where every one is, else CONSISTENT: of some checks, not of the number."""
    found = {verdict.status for verdict in verdicts.values()}
    return FAIL if FAIL in found else VERIFIED if found == {VERIFIED} else CONSISTENT


def outcome(audit: "Audit | Kept", verdicts: Mapping[str, Verdict]) -> tuple[str, str]:
    """VERIFIED, CONSISTENT or FAIL, and the headline that explains it."""
    failed = [name for name, verdict in verdicts.items() if verdict.status == FAIL]
    number = f"val_bpb {audit.result['val_bpb']:.6f}"
    if failed:
        return FAIL, f"{FAIL}: {number} is not to be believed: {', '.join(failed)}"
    without = missing(audit, verdicts)
    if without:
        return CONSISTENT, f"{CONSISTENT}: {number} rests on its own word: {'; '.join(without)}"
    training = (
        "the whole training repeated"
        if _retrained(verdicts)
        else ("training by its records, of which the beginning was repeated (--retrain: all of it)")
    )
    made = verdicts["E1" if audit.evaluator in ("standard", "sliding") else "E2"].evidence
    which = "of which a sample was made" if SAMPLED in made else "made"
    again = f"{number} is the score of this artifact, {which} again here ({made})"
    return VERIFIED, f"{VERIFIED}: {again}{_whose_text(audit)}; {training}"


def _whose_text(audit: "Audit | Kept") -> str:
    """A warning, where the text that was scored cannot be the contest's."""
    stage = audit.result["stages"][audit.result["final_stage"]]
    return "" if contest_set(stage["targets"], stage["bytes"]) else "; NOT of the contest's validation set"


def follows(told: Mapping, result: Mapping) -> bool:
    """Whether what an audit.json says of a run as a whole is what its own rows come to."""
    try:
        verdicts = {name: Verdict(row["status"], row["evidence"]) for name, row in told["checks"].items()}
        evaluator = evaluator_of(result["final_stage"], result["settings"].get("TTT_SGD", False))
        kept = Kept({**result, "val_bpb": told["val_bpb"]}, evaluator, told["strange_files"])
        said = told["verdict"], told["headline"], told["counts"], told["repository_script_is_the_same"]
        return said == (*outcome(kept, verdicts), counted(verdicts), kept.known)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):  # values of any kind
        return False
