"""Cheats (tests/cheats.py), each judged by the check that must find it; all of the audit: tests/stress."""

import contextlib
import random
import re
import sys
from collections import Counter
from pathlib import Path

import audit_damage
import pytest
from audited import Forgery, one_house  # noqa: F401 - a fixture
from cheats import CHEATS, Cheat, Workshop
from quick_run import stub

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import audit  # noqa: E402
from auditing import box  # noqa: E402

BOXED = {"S4", "W4"}  # they run the counted script


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("cheats"), stub)


@pytest.fixture
def copy(shop, tmp_path) -> Forgery:
    return Forgery(shop.folder, tmp_path)


def found(copy: Forgery, names: list[str]) -> dict[str, audit.Verdict]:
    with contextlib.closing(audit.Audit(copy.run, data=copy.data)) as judged:
        return audit.judge(judged, names)


def test_there_are_enough_cheats():
    counts = Counter(cheat.group for cheat in CHEATS)
    assert counts["script"] >= 15 and counts["records"] >= 10 and counts["data"] >= 8, counts
    assert counts["artifact"] >= 6 and counts["environment"] >= 4, counts
    assert len({cheat.name for cheat in CHEATS}) == len(CHEATS)


def test_honest_run_passes_what_finds_the_cheats_and_forging_nothing_changes_nothing(copy):
    names = {cheat.check for cheat in CHEATS} - BOXED  # whose counted script is a stub here
    copy.forge()
    verdicts = found(copy, sorted({*names, "R1", "R2", "R3", "R4"}))
    assert {v.status for v in verdicts.values()} <= {"VERIFIED", "CONSISTENT"}, audit.table(verdicts)


@pytest.mark.parametrize("cheat", CHEATS, ids=[cheat.name.replace(" ", "-") for cheat in CHEATS])
def test_cheat_is_found(shop, copy, cheat: Cheat):
    if cheat.check in BOXED and (reason := box.available()):
        pytest.skip(reason)
    cheat.build(shop, copy)
    status, evidence = found(copy, [cheat.check])[cheat.check]
    assert status == "FAIL" and re.search(cheat.reason, evidence), f"{cheat.check} {status}: {evidence}"


# Cheap ones that read all files between them; more of them, and more cases: tests/stress.
LOOKING = ["A1", "A2", "A3", "A4", "T2", "S1", "E1", "D4", "D6", "R1", "R2", "R3", "R4", "R5"]


@pytest.mark.parametrize("number", range(20))
def test_damaged_files_are_a_fail_or_one_line(copy, capsys, number):
    audit_damage.judge(copy.run, copy.data, LOOKING, capsys, random.Random(number))
