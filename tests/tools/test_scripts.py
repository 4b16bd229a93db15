"""The house in a log: found whole, compared by checksum, and imported beside the repository's."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import scripts  # noqa: E402
from auditing.house import AuditedHouse, moved_imports  # noqa: E402

CORE = '''"""A core."""
BASE = 20


def answer():
    """What needs a part."""
    from systems.part import double

    return double() + 2


def by_name():
    """Needs its harness."""
    import harness.watch, os
    import train_gpt as itself

    return harness.watch.total() + itself.BASE, os
'''
PART = """from train_gpt import (
    BASE,
)

TOLD = 'ä'; from train_gpt import answer


def double():
    return 2 * BASE
"""
WATCH = "import train_gpt\n\n\ndef total():\n    return train_gpt.answer()\n"
HOUSE = {"train_gpt.py": CORE, "systems/part.py": PART, "harness/__init__.py": "", "harness/watch.py": WATCH}
SOURCES = {path: text.encode() for path, text in HOUSE.items()}
CORE_SHA, *_ = HASHES = [scripts.sha256_of(source) for source in SOURCES.values()]
HOUSE_SHA = dict(list(zip(HOUSE, HASHES, strict=True))[1:])


def log_of(house: dict[str, str], head: str = "SEED=1\n") -> str:
    """A log as a run writes it."""
    core, *others = house.items()
    lines = [f"==== {path} sha256:{scripts.sha256_of(text.encode())}\n{text}" for path, text in others]
    rule = scripts.RULE
    return f"{head}{rule}\n{core[1]}\n{rule}\n{''.join(lines)}\n==== end\nIntel\nfinal val_bpb:1\n"


@pytest.mark.parametrize("again", [False, True])
def test_a_log_holds_the_house_that_ran(again):
    """Also a log in which a run that was resumed has written it twice."""
    log = log_of(HOUSE) + (log_of(HOUSE) if again else "")
    assert scripts.logged_house(log, CORE_SHA, HOUSE_SHA) == SOURCES
    assert scripts.logged_house(log.replace("\n==== end", "==== end"), CORE_SHA, HOUSE_SHA) == SOURCES
    left = scripts.LOGGED_SCRIPT.sub("", log)
    assert left.split() == ["SEED=1", "Intel", "final", "val_bpb:1"] * (1 + again)


@pytest.mark.parametrize("path", HOUSE)
def test_a_file_with_another_checksum_is_named(path):
    log = log_of(HOUSE | {path: HOUSE[path] + "# another\n"})
    with pytest.raises(
        scripts.HouseError, match=f"its log holds no {path} with the checksum {'[0-9a-f]' * 64}"
    ):
        scripts.logged_house(log, CORE_SHA, HOUSE_SHA)
    with pytest.raises(scripts.HouseError, match="its log holds no train_gpt.py"):
        scripts.logged_house(log.partition(scripts.RULE)[0], CORE_SHA, HOUSE_SHA)


def test_imports_of_the_house_are_moved_and_lines_stay():
    assert moved_imports(WATCH, "p").startswith("import p.train_gpt as train_gpt\n")
    assert moved_imports("import systems\n", "p") == "import p.systems as systems\n"
    moved = moved_imports(CORE, "p")
    assert "    import p.harness as harness, p.harness.watch, os\n    import p.train_gpt as itself\n" in moved
    assert moved_imports(PART, "p").split("\n")[4] == "TOLD = 'ä'; from p.train_gpt import answer"
    for text in (CORE, PART, WATCH, "from .train_gpt import x\nimport os.path\nfrom train_gptx import y\n"):
        assert moved_imports(text, "p").count("\n") == text.count("\n")
    assert moved_imports(text, "p") == text


def test_the_house_that_ran_never_reaches_the_repositorys(tg, tmp_path):
    house = AuditedHouse(SOURCES, tmp_path)
    other = AuditedHouse(SOURCES | {"train_gpt.py": CORE.replace("20", "1").encode()}, tmp_path)
    assert house.answer() == 42 and house.by_name()[0] == 62 and house.double.__module__.endswith(".part")
    assert other.double() == 2 and house.BASE == 20 and sys.modules["train_gpt"] is tg.core
    with pytest.raises(AttributeError, match="nothing in the script under audit is called GPT"):
        house.GPT  # noqa: B018
    assert not hasattr(house, "harness_of_another")
    house.forget()
    assert not any(name.startswith(house.package) for name in sys.modules)


def test_a_script_that_cannot_be_imported_is_said(tmp_path):
    with pytest.raises(
        scripts.HouseError, match=r"cannot be imported \(ZeroDivisionError: division by zero\)"
    ):
        AuditedHouse({"train_gpt.py": b"1 / 0\n"}, tmp_path)


def test_one_checksum_for_a_script_and_its_house(tmp_path):
    (tmp_path / "harness").mkdir()
    script = tmp_path / "train_gpt.py"
    script.write_text("1\n")
    alone = scripts.hash_on_disk(script)
    assert alone == scripts.sha256_of(b"1\n") == scripts.script_hash(alone, {})
    (tmp_path / "harness" / "watch.py").write_text("2\n")
    whole = scripts.hash_on_disk(script)
    assert whole == scripts.script_hash(alone, {"harness/watch.py": scripts.sha256_of(b"2\n")}) != alone
