"""Checks B1-B6 of a run: its counted script, asked from outside (`questions.py`) where nobody knows it.

Of a script that is the repository's, the evaluation made again (E1, E2) and the replays (D1-D9) say more; it
is asked where --blackbox or --fresh want it.
"""

import functools

from auditing.blackbox import Subject, subject_of
from auditing.questions import QUESTIONS, Question
from auditing.run import RECOMPUTED, Audit, check


@functools.cache
def _subject(audit: Audit) -> Subject:
    """One for all questions: each remembers what the others have asked."""
    return subject_of(audit)


def asked(audit: Audit) -> bool:
    """Whether the run's script is asked from outside."""
    return not audit.known or audit.options.blackbox or bool(audit.options.fresh)


def _register(name: str, rule: str, question: Question) -> None:
    def ask(audit: Audit) -> str:
        return question(_subject(audit))

    check(name, rule, RECOMPUTED)(ask)


for _name, (_rule, _question) in QUESTIONS.items():
    _register(_name, _rule, _question)
