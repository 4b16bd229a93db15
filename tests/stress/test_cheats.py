"""Cheats (tests/cheats.py), each judged by the whole audit: exit code 1, and the check that is named fails.

Runs are whole here: with the real counted code, and the adaptation of every altered script.
"""

import json
import re

import audit_damage
import pytest
from audited import Forgery, one_house  # noqa: F401 - a fixture
from cheats import CHEATS, PLACES, Cheat, Workshop

import audit
from harness import packing
from scripts import sha256_of

pack, kept = packing.packed_script, {}


def packed_once(cfg: object, backends: object, house: dict[str, bytes], on_gpu: bool = False) -> tuple:
    """`packed_script`, which takes ten seconds, once for what is packed alike."""
    settings = {name: value for name, value in cfg.as_env().items() if name not in PLACES}
    key = sha256_of(repr([settings, backends, house, on_gpu, has_minifier()]).encode())
    if key not in kept:
        kept[key] = pack(cfg, backends, house, on_gpu)
    return kept[key]


def has_minifier() -> bool:
    """The audit also packs as a machine without it does."""
    try:
        import python_minifier  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("cheats"), packed_once, whole=True)


@pytest.fixture(scope="module", autouse=True)
def packed_cheaply(one_house):  # noqa: F811
    """The code of every run is folded once."""
    with pytest.MonkeyPatch.context() as patch:
        for module in one_house.modules:
            if hasattr(module, "packed_script"):
                patch.setattr(module, "packed_script", packed_once)
        yield


def judged(copy: Forgery) -> tuple[int, dict]:
    """Exit code of the whole audit, and its table."""
    code = audit.main([str(copy.run), "--data", str(copy.data)])
    return code, json.loads((copy.run / "audit.json").read_text())["checks"]


def test_honest_run_is_verified(shop, tmp_path):
    copy = Forgery(shop.folder, tmp_path)
    copy.forge()
    code, _ = judged(copy)
    assert code == 0


@pytest.mark.parametrize("cheat", CHEATS, ids=[cheat.name.replace(" ", "-") for cheat in CHEATS])
def test_cheat_is_found_by_the_whole_audit(shop, tmp_path, cheat: Cheat):
    copy = Forgery(shop.folder, tmp_path)
    cheat.build(shop, copy)
    code, table = judged(copy)
    found = table[cheat.check]
    assert code == 1 and found["status"] == "FAIL" and re.search(cheat.reason, found["evidence"]), found


BOXED = {"S2", "S4", "S5", "T4", "W4"}  # they look at the counted script alone


@pytest.mark.cases(30)
def test_damaged_files(shop, tmp_path, capsys, rng):
    copy = Forgery(shop.folder, tmp_path)
    names = [name for name in audit.ORDER if name[0] != "B" and name not in BOXED]
    audit_damage.judge(copy.run, copy.data, names, capsys, rng)
