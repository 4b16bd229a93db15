"""Published runs to compare with, taken from their logs (8 x H100; tests/tools/test_reproduce.py checks it).

PR #1868 is a support record of PR #1851: its three seeds are PR #1851's own log (42) and two repetitions by
another person (314, 1234). Its re-run keeps 8 s for the calibration. PR #1493's seed 42 ran another script,
with TTT_HASH_EMBED=True: a mixed set. Of PR #1858 there is no log; four decimals stand in its description.
"""

from collections.abc import Sequence
from typing import NamedTuple

from runs import RunRecord

FINEWEB_BYTES = 151_074_499  # of the first 50,000 documents; logs of plain SP8192 say 3,723 more


class Base(NamedTuple):
    """Runs to compare with. `scores`: (seed, val_loss in nats per token or None, val_bpb)."""

    name: str
    title: str
    scores: tuple[tuple[int, float | None, float], ...]
    text_bytes: float | None


def base_of(records: Sequence[RunRecord]) -> Base:
    """The base that a set of runs makes."""
    scores = tuple((record.seed, record.val_loss, record.val_bpb) for record in records)
    names = ", ".join(str(record.path) for record in records)
    return Base(names, f"{len(records)} runs ({names})", scores, records[0].text_bytes)


PUBLISHED = {
    "pr1493": (
        "PR #1493",
        (314, 2.79241542, 1.08103103),
        (42, 2.79180191, 1.08079352),
        (999, 2.79281076, 1.08118408),
    ),
    "pr1667": (
        "PR #1667",
        (0, 2.76751616, 1.07139175),
        (1337, 2.76539833, 1.07057187),
        (42, 2.76962517, 1.07220821),
    ),
    "pr1851": ("PR #1851", (42, 2.32247803, 1.06128183)),
    "pr1868": (
        "PR #1868",
        (42, 2.32247803, 1.06128183),
        (314, 2.32157310, 1.06086831),
        (1234, 2.32449303, 1.06220261),
    ),
    "pr1868_rerun": (
        "PR #1868, re-run",
        (42, 2.32149556, 1.06083288),
        (314, 2.32165882, 1.06090748),
        (1234, 2.32511706, 1.06248776),
    ),
    "pr1855": (
        "PR #1855",
        (42, 2.31944212, 1.05989454),
        (0, 2.32239991, 1.06124613),
        (1234, 2.32423994, 1.06208695),
    ),
    "pr1858": ("PR #1858 (four decimals)", (42, None, 1.0806), (314, None, 1.0810), (999, None, 1.0814)),
}
BASES = {name: Base(name, title, scores, FINEWEB_BYTES) for name, (title, *scores) in PUBLISHED.items()}
