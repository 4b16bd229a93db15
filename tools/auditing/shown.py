"""The table as the console shows it: at most 100 columns, what passed in one line for each group."""

import itertools
import textwrap
from collections.abc import Iterable, Iterator

from auditing.run import CHECKS, CONSISTENT, VERIFIED, Verdict, printable

WIDTH = 100
GROUPS = {  # first letter of a check -> what the checks of its group are about
    "A": "data",
    "T": "training",
    "W": "weights",
    "S": "storage",
    "E": "scores",
    "D": "evaluation",
    "B": "black box",
    "R": "report",
}


def folded(text: str, first: int = 0, later: int = 2) -> str:
    """A text in lines of at most WIDTH columns; the first one and the later ones are so far indented."""
    indents = {"initial_indent": " " * first, "subsequent_indent": " " * later}
    return "\n".join(textwrap.wrap(printable(text), WIDTH, break_on_hyphens=False, **indents))


def row(name: str, verdict: Verdict, rule: str) -> str:
    """A check in full: name, status and rule, and below them what was found."""
    return f"{name:3} {verdict.status:<11}  {rule}\n{folded(verdict.evidence, 17, 17)}"


def table_lines(found: Iterable[tuple[str, Verdict]], in_full: bool) -> Iterator[str]:
    """The table, line by line, as the checks come; not in full: of what passed only the names, by group."""
    if in_full:
        yield from (row(name, verdict, CHECKS[name].rule) for name, verdict in found)
        return
    for letter, checks in itertools.groupby(found, key=lambda pair: pair[0][0]):
        group = list(checks)
        passed = {s: " ".join(n for n, v in group if v.status == s) for s in (VERIFIED, CONSISTENT)}
        names = "; ".join(f"{status} {names}" for status, names in passed.items() if names)
        if names:
            yield folded(f"{letter}   {GROUPS[letter]:<11}  {names}", later=17)
        yield from (row(n, v, CHECKS[n].rule) for n, v in group if v.status not in passed)
