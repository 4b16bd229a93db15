"""All checks, in the order in which they are carried out; each module registers its own on import."""

from auditing import (  # noqa: F401
    artifact,
    chain,
    data,
    evaluation,
    outside,
    packed,
    recompute,
    report,
    surroundings,
    training,
    weights,
)
from auditing.questions import QUESTIONS
from auditing.run import CHECKS, Audit
from auditing.shown import GROUPS

ORDER = sorted(CHECKS, key=lambda name: ([*GROUPS].index(name[0]), name))


def asked_of(audit: Audit) -> list[str]:
    """Names of the checks that a run is judged by."""
    return [name for name in ORDER if name not in QUESTIONS or outside.asked(audit)]
