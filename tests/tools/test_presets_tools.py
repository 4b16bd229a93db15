"""`make systems`: what it says of the runs that it is given."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from test_presets import SPEC_ROWS  # noqa: E402

import all_systems  # noqa: E402
import readme_settings  # noqa: E402
from marked import MarkError  # noqa: E402
from runs import RunRecord  # noqa: E402


def record(statuses: dict[str, str], **stages: float) -> RunRecord:
    """A finished run with an audit and the scores of its stages."""
    checks = {name: {"status": status} for name, status in statuses.items()}
    fields = dict.fromkeys(RunRecord.__dataclass_fields__)
    scored = {name: {"val_bpb": bpb, "val_loss": 2 * bpb} for name, bpb in stages.items()}
    given = {
        "final_stage": list(stages)[-1],
        "stages": scored,
        "seconds": {"train": 1.0},
        "audit": {"checks": checks},
    }
    return RunRecord(**fields | given | {"environment": {"source_sha256": "0"}, "settings": {}})


def test_systems_are_the_presets(tg):
    assert {system.preset for system in all_systems.SYSTEMS} == {"pr1851", *SPEC_ROWS}
    assert [system.preset for system in all_systems.SYSTEMS if system.illegal] == ["pr1485"]


@pytest.mark.parametrize(
    "preset, statuses, expected",
    [
        ("pr1667", {"D3": "VERIFIED", "D7": "NOT CHECKED"}, True),
        ("pr1667", {"D3": "VERIFIED", "A2": "FAIL"}, False),
        ("pr1485", {"D3": "FAIL", "T1": "FAIL", "A2": "VERIFIED"}, True),
        ("pr1485", {"D3": "CONSISTENT", "T1": "FAIL"}, False),
        ("pr1485", {"D3": "NOT CHECKED"}, False),
        ("pr1851", {}, False),
    ],
)
def test_systems_are_judged_by_the_audit(preset, statuses, expected):
    """The illegal one must fail C3, no other may fail anything, and none goes without an audit."""
    system = next(system for system in all_systems.SYSTEMS if system.preset == preset)
    row = all_systems.row(system, record(statuses, quantised=2.5, ttt=2.25))
    assert row["as_expected"] is expected
    line = all_systems.table({"systems": [row]}).splitlines()[2]
    assert "| 2.2500 |" in line and f"`{preset}`" in line
    assert all(name in line for name, status in statuses.items() if status in ("FAIL", "NOT CHECKED"))


def test_published_scores_are_means():
    assert all_systems.published("pr1855") == "1.06108 (3 seeds)"
    assert all_systems.published("pr1851") == "1.06128 (1 seed)"
    assert all_systems.published("pr1485") == "none that counts"


def test_the_page_has_the_committed_table():
    tool = all_systems
    if not tool.RESULT.is_file():
        pytest.skip(f"{tool.RESULT.name}: not run yet")
    result = json.loads(tool.RESULT.read_text(encoding="utf-8"))
    text = (ROOT / tool.PAGE).read_text(encoding="utf-8")
    assert tool.BEGIN + tool.table(result) + tool.END in text


def test_a_table_without_its_place_on_the_page_is_said(tmp_path, monkeypatch):
    """Nothing but the table changes; a page that has lost the marks stays as it is."""
    tool = all_systems
    page = tmp_path / tool.PAGE
    (tmp_path / "logs").mkdir()
    page.parent.mkdir()
    monkeypatch.setattr(tool, "RESULT", tmp_path / "logs" / "table.json")
    monkeypatch.setattr(tool, "table", lambda result: f"{result['cell']}\n")
    page.write_text(f"before\n{tool.BEGIN}old\n{tool.END}\nafter\n")
    tool.write({"cell": r"\1"})
    assert page.read_text() == f"before\n{tool.BEGIN}\\1\n{tool.END}\nafter\n"
    for text in ("", tool.END + tool.BEGIN, 2 * (tool.BEGIN + tool.END)):
        page.write_text(text)
        with pytest.raises(MarkError, match="systems.md: needs the lines <!-- .* once"):
            tool.write({"cell": "1"})
        assert page.read_text() == text and json.loads(tool.RESULT.read_text()) == {"cell": "1"}


def test_a_page_without_a_place_for_the_settings_is_out_of_date(tmp_path, monkeypatch, capsys):
    assert readme_settings.main(["--check"]) == 0
    monkeypatch.setattr(readme_settings, "ROOT", tmp_path)
    page = tmp_path / readme_settings.PAGE
    page.parent.mkdir()
    marks = readme_settings.BEGIN + readme_settings.END
    for text, reason in (("", "needs the lines"), (marks, "out of date")):
        page.write_text(text)
        assert readme_settings.main(["--check"]) == 1 and reason in capsys.readouterr().err
    assert readme_settings.main([]) == 0 == readme_settings.main(["--check"])
