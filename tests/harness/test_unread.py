"""Settings that a run does not read: what is said of them, and that they change nothing."""

import dataclasses
import json
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from bench.settings import TINY, make_data
from harness import unread

SWITCHES = {  # what is off in a run -> its switches; together, every row of the table is tried
    "loops, lanes, gates, caps": {
        "NUM_LOOPS": "0",
        "PARALLEL_START_LAYER": "0",
        "SMEAR_GATE_ENABLED": "0",
        "GRAD_CLIP_NORM": "0",
        "SPARSE_ATTN_GATE_ENABLED": "0",
        "LQER_ENABLED": "0",
        "PHASED_TTT_PREFIX_DOCS": "0",
        "TIE_EMBEDDINGS": "1",
        "WARMDOWN_FRAC": "0",
        "MUON_MOMENTUM_WARMUP_STEPS": "0",
    },
    "clips, documents": {
        "TIE_EMBEDDINGS": "0",
        "FIT_BYTES": "40000",
        "TTT_SGD": "1",
        "TTT_CHUNK_TOKENS": "64",
        "EVAL_STRIDE": "8",
    },
    "adaptation, packed factors": {"TTT_ENABLED": "0", "LQER_ASYM_ENABLED": "0", "EVAL_STRIDE": "8"},
}


def unread_names(tg, switches: dict[str, str]) -> list[str]:
    settled = {name: str(value) for name, value in tg.Config.from_env(TINY | switches).as_env().items()}
    return [name for name in settled if unread.lacking(unread.needs_of(name), settled)]


def other_value(field: dataclasses.Field, value: object) -> str:
    """Another value that is allowed, and no 0, of which nothing is said."""
    if get_origin(field.type) is Literal:
        return next(choice for choice in get_args(field.type) if choice != value)
    if isinstance(value, float):
        return str(value / 2 + 0.01)
    if isinstance(value, str):
        return "9:1"
    return str(int(not value) if isinstance(value, bool) else value - 1 if value > 1 else value + 1)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unread")
    make_data(folder / "data")
    return folder


@pytest.mark.parametrize("off", SWITCHES)
def test_what_is_not_read_changes_nothing(tg, work, quick_packing, monkeypatch, capfd, off):
    """Two runs, of which one has another value of every setting that its switches leave unread."""
    monkeypatch.chdir(work)
    names = unread_names(tg, SWITCHES[off])
    cfg = tg.Config.from_env(TINY | SWITCHES[off])
    fields = {field.name.upper(): field for field in dataclasses.fields(cfg)}
    others = {name: other_value(fields[name], getattr(cfg, name.lower())) for name in names}
    found = []
    for number, more in enumerate(({}, others)):
        folder = f"{off.partition(',')[0]}-{number}"
        code = tg.main([], TINY | SWITCHES[off] | more | {"ARTIFACT_DIR": folder})
        said = capfd.readouterr()
        assert code == 0, said.err
        stages = json.loads(Path(folder, "result.json").read_text())["stages"]
        found.append({name: stage["val_bpb"] for name, stage in stages.items() if "val_bpb" in stage})
    assert len(names) > 5 and found[0] == found[1] and len(found[0]) > 1


def test_the_runs_above_try_every_row(tg):
    tried = {unread.needs_of(name) for switches in SWITCHES.values() for name in unread_names(tg, switches)}
    assert {needs for _, needs in unread.READ_WITH} - tried <= {
        "MAX_WALLCLOCK_SECONDS>0"
    }  # TINY is without it
