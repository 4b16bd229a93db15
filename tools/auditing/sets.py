"""The contest's validation sets: how many documents, targets and bytes they have."""

from collections.abc import Sequence
from typing import NamedTuple

CONTEST_DOCUMENTS = 50_000


class ValidationSet(NamedTuple):
    """A validation set by one tokenizer."""

    name: str
    targets: int  # as scripts print it, most of them cut to whole rows
    bytes: int
    documents: int = CONTEST_DOCUMENTS


# Of the first 50,000 documents, from published logs; the baseline of 17 March scored another set.
SETS = (
    ValidationSet("CaseOps SP8192", 47_853_343, 151_074_499),
    ValidationSet("SP8192", 40_540_160, 151_078_222),
    ValidationSet("SP4096", 45_508_608, 151_074_053),
    ValidationSet("SP4096", 45_514_752, 151_074_924),
    ValidationSet("SP1024", 62_021_632, 151_080_363),
    ValidationSet("SP1024 of 17 March", 63_779_840, 155_769_746),
)
CUT = 1e-3  # of the targets: a row that is left out at the end
BYTES_MORE = 2e-4  # relative: white space at the ends of documents, a score of all targets beside a cut count


def contest_set(targets: int, size: int, sets: Sequence[ValidationSet] = SETS) -> ValidationSet | None:
    """The contest's validation set that has so many targets and bytes; None where none has."""
    near = (s for s in sets if abs(1 - targets / s.targets) <= CUT and abs(1 - size / s.bytes) <= BYTES_MORE)
    return next(near, None)
