"""README.md and docs/: short enough, complete, and what they name exists."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train_gpt
from harness import lineage, packing, settings

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import audit  # noqa: E402
from auditing import shown  # noqa: E402
from auditing.questions import QUESTIONS  # noqa: E402

README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
HOUSE = "harness|systems|tools|dataprep|experiments|bench|tests|docs"
# Variables that are no settings: of Make, Slurm, trackers, inductor, tests, data preparation, an experiment.
ALSO_READ = {
    "RUN_DIR",
    "PYTHON",
    "SLURM_JOB_ID",
    "SLURM_JOB_NODELIST",
    "WANDB_MODE",
    "TORCHINDUCTOR_MIX_ORDER_REDUCTION",
    "HF_ENDPOINT",
    "ALLOW_ILLEGAL",
}
ALSO_READ |= {"GOLDEN_DIR", "TOKENIZER_DIR", "PUBLISHED_LOGS", "SCALE", *lineage.VOCABULARY}
ALSO_READ |= {"CONSOLE", "VERIFY", "XDG_CACHE_HOME", "NO_COLOR", "TERM", "STRESS_SEED", "STRESS_CASES"}
NO_VARIABLES = {"NO_EFFECT"}  # a table of a test
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[str]:
    """What stands between lines of three backquotes."""
    return re.findall(r"^```\n(.*?)^```$", read(page), re.S | re.M)


def code(page: Path) -> list[str]:
    """Commands, names of files and settings: the lines of the blocks, and what stands between backquotes."""
    prose = re.sub(r"^```\n.*?^```$", "", read(page), flags=re.S | re.M)
    return [*"\n".join(blocks(page)).splitlines(), *re.findall(r"`([^`\n]+)`", prose)]


def anchors(page: Path) -> set[str]:
    """The places on a page that a link can name, as GitHub makes them of its headings."""
    titles = re.findall(r"^#+ (.*)$", read(page), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_short():
    assert len(read(README).splitlines()) < 250


def test_the_drawing_fits():
    (drawing,) = (block for block in blocks(README) if "+--" in block)
    assert max(map(len, drawing.splitlines())) <= 100


@pages
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if not re.match(r"https?://", target):
            path, _, anchor = target.partition("#")
            place = (page.parent / path).resolve() if path else page
            assert place.exists(), target
            assert not anchor or anchor in anchors(place), target


def test_every_page_can_be_found_from_the_readme():
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", read(README)))
    assert linked == {f"docs/{page.name}" for page in PAGES[1:]}


@pages
def test_every_make_target_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.M))
    named = {found[1] for line in code(page) if (found := re.search(r"(?:^|or: )make ([a-z-]+)", line))}
    assert named <= targets


def test_make_help_fits_a_terminal():
    told = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    assert "  help        this list" in told and max(map(len, told)) < 80


@pages
def test_every_file_that_is_named_exists(page):
    """Scripts by their names, all else of the house by its path; outputs of a run are not meant."""
    for line in code(page):
        for path in re.findall(rf"(?<![\w/])(?:{HOUSE})/[\w./]*", line):
            assert (ROOT / path.rstrip(".")).exists(), line
        for name in re.findall(r"(?<![\w/.])\w+\.py\b", line):
            assert (ROOT / name).is_file() or (ROOT / "experiments" / name).is_file(), line


@pages
def test_every_option_exists(page):
    """What stands behind a script on a command line, up to a lone `--`, occurs in its source."""
    for line in code(page):
        found = re.search(r"(?:^|\s)([\w/]+\.py)\b(.*)", line.partition("  #")[0])
        if found and (ROOT / found[1]).is_file():
            sources = [ROOT / found[1], *(ROOT / "harness").glob("*.py")]
            text = "".join(map(read, sources if found[1] == "train_gpt.py" else sources[:1]))
            options = re.findall(r"(?<!\S)\[?(--[a-z][a-z-]*)", found[2].partition(" -- ")[0])
            assert all(f'"{option}"' in text for option in options), line


def test_everything_has_its_place_on_the_map():
    section = read(README).partition("## What is where")[2].partition("\n## ")[0]
    rows = [row.split(" | ")[0] for row in section.splitlines() if row.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert all((ROOT / name).exists() for name in named)
    scripts = {path.name for path in ROOT.glob("*.py")}
    folders = {f"{path.parent.name}/" for path in ROOT.glob("[!.]*/*.py")}
    assert scripts | folders <= named


@pages
def test_every_variable_that_is_named_exists(page):
    known = {field.name.upper() for field in dataclasses.fields(train_gpt.Config)} | ALSO_READ | NO_VARIABLES
    for line in code(page):
        named = set(re.findall(r"\b[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+\b", line))
        assert named | set(re.findall(r"\b([A-Z]{3,})=", line)) <= known, line


def test_the_settings_page_names_every_preset():
    head = read(ROOT / "docs" / "settings.md").partition("`SCALE=demo`")[0]
    named = set(re.findall(r"`([a-z]\w+)`", head))
    assert named == {name for name in settings.PRESETS if not name.endswith(("-demo", "-study"))}


def test_the_systems_page_has_every_published_preset():
    """Once, and with what it leaves out."""
    rows = re.findall(r"^\| `(pr\d+)` \|(.*)\|$", read(ROOT / "docs" / "systems.md"), re.M)
    published = [name for name in settings.PRESETS if re.fullmatch(r"pr\d+", name)]
    assert sorted(name for name, _ in rows) == sorted(published)
    cells = {name: row.split(" | ")[-1].strip() for name, row in rows}
    assert {name: cells[name] for name in settings.WITHOUT} == settings.WITHOUT


def test_the_page_on_bytes_names_what_a_folded_script_reads():
    section = read(ROOT / "docs" / "bytes.md").partition("still reads")[2].partition("\n## ")[0]
    named = {name.lower() for row in section.splitlines() for name in re.findall(r"`([A-Z_]+)`", row)}
    configs = (train_gpt.Config(), train_gpt.Config(sliding_window_enabled=True, ttt_sgd=True))
    assert named == set().union(*(packing.run_time_settings(cfg, on_gpu=False) for cfg in configs))


def test_the_page_on_the_audit_has_every_check():
    rows = re.findall(r"^\| ([A-Z]\d) \|", read(ROOT / "docs" / "audit.md"), re.M)
    assert sorted(rows, key=audit.ORDER.index) == audit.ORDER


def test_lines_of_the_audit_page_are_those_of_the_committed_audit():
    told = json.loads(read(ROOT / "logs" / "demo_seed42_cpu_audit.json"))
    checks, page = told["checks"], read(ROOT / "docs" / "audit.md")
    found = {name: audit.Verdict(entry["status"], entry["evidence"]) for name, entry in checks.items()}
    table = "\n".join(shown.table_lines(found.items(), in_full=False))
    assert f"```\n{table}\n...\n{shown.folded(told['headline'])}\n```" in page
    in_full = re.findall(r"(?m)^([A-Z]\d)  (?:VERIFIED|CONSISTENT|NOT CHECKED) ", page)
    assert len(in_full) > 5
    assert all(shown.row(name, found[name], checks[name]["rule"]) in page for name in in_full)
    asked = set(audit.ORDER) - set(QUESTIONS)
    assert f"{len(asked)} checks" in read(README) and checks.keys() <= asked  # a check may be newer


def test_the_glossary_knows_every_word_of_a_log():
    """Stages and keys of the committed demo run; lines of progress have other forms."""
    log = read(ROOT / "logs" / "demo_seed42_cpu.txt")
    known = set(re.findall(r"`(\w+)`", read(ROOT / "docs" / "glossary.md"))) | {"step_N"}
    lines = re.findall(r"^(\w+) (\w+:\S.*)$", log[log.index("\nstart run:") :], re.M)
    assert len(lines) > 20
    for stage, values in lines:
        keys = set(re.findall(r"(?:^| )([a-z]\w*):", values))
        assert {stage, *keys} - known <= {"lqer_asym"}, (stage, values)
