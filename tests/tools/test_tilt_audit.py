"""The audit of a run with NGRAM_TILT: what passes, and what finds hints that are not legal."""

import contextlib
import sys
from pathlib import Path

import numpy as np
import pytest
from audited import Forgery
from cheats import Workshop
from quick_run import stub

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import audit  # noqa: E402

CHECKS = ["D1", "D2", "D3", "D4", "D7", "D8", "D9", "E2"]


@pytest.fixture(scope="module")
def tilted(tmp_path_factory) -> Forgery:
    """An honest run whose adapted score is tilted."""
    folder = tmp_path_factory.mktemp("tilted")
    shop = Workshop(folder / "shop", stub)
    copy = Forgery(shop.folder, folder / "copy")
    shop.altered(copy, adapts=True, NGRAM_TILT="3:2.5,2:1.5", TTT_WARM_START_A=0)
    return copy


def judged(copy: Forgery, names: list[str], **other: object) -> dict[str, audit.Verdict]:
    """Verdicts of some checks, by a house of which some functions of systems/tilt.py are others."""
    with contextlib.closing(audit.Audit(copy.run, data=copy.data)) as one:
        module = next(module for module in one.script.modules if "find_hints" in vars(module))
        for name, value in other.items():
            setattr(module, name, value(getattr(module, name)))
        return audit.judge(one, names)


def test_honest_run_passes(tilted):
    verdicts = judged(tilted, CHECKS)
    assert {verdict.status for verdict in verdicts.values()} == {"VERIFIED"}, audit.table(verdicts)
    assert "of them tilted" in verdicts["D2"].evidence and ", 0 of them" not in verdicts["D2"].evidence
    assert "read plainly" in verdicts["D4"].evidence and "hints for 0 of" not in verdicts["D4"].evidence
    assert "declared by NGRAM_TILT" in verdicts["D8"].evidence


def fails(verdicts: dict[str, audit.Verdict], text: str) -> None:
    (verdict,) = verdicts.values()
    assert verdict.status == "FAIL" and text in verdict.evidence, verdict


def from_the_future(leaders):
    """The token that leads at the places of a run that come later."""

    def later(begins: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ends = np.append(begins[1:], True)
        return tuple(values[::-1] for values in leaders(ends[::-1], tokens[::-1]))

    return later


@pytest.mark.parametrize("check, text", [("D1", "depends on it"), ("D4", "read plainly"), ("E2", "ttt:")])
def test_hints_from_the_future_are_found(tilted, check, text):
    fails(judged(tilted, [check], _leaders=from_the_future), text)


@pytest.mark.parametrize("check, text", [("D2", "differs from -log p"), ("E2", "ttt:")])
def test_distributions_that_do_not_sum_to_one_are_found(tilted, check, text):
    fails(
        judged(tilted, [check], tilted=lambda _: lambda losses, _, hits, boosts: losses - boosts * hits), text
    )


def test_state_that_is_not_in_the_order_of_scoring_is_found(tilted):
    """As where a rank hands on what another one has not scored."""

    def backwards(kind):
        class Backwards(kind):
            def __init__(self, plan):
                super().__init__(plan)
                self.parts = self.parts[::-1]

        return Backwards

    fails(judged(tilted, ["D4"], Tilt=backwards), "was scored after documents of part")


def test_documents_of_one_part_that_see_each_other_are_found(tilted):
    """Side by side on several ranks, none of them is before the other."""

    def joined(find):
        return lambda tokens, parts, *rest: find(tokens, [[span] for part in parts for span in part], *rest)

    fails(judged(tilted, ["D4"], find_hints=joined), "read plainly")
