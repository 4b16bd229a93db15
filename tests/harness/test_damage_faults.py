"""Damaged inputs: refused with the file's name, or the identical data and model (bench/damage.py)."""

import json
from pathlib import Path

import pytest
import torch

from bench import damage


def test_faults_in_every_kind_of_input():
    result = damage.run_damage(360, seed=7)
    assert result["examples"] == [] and result["wrong"] == 0
    assert result["damaged"] == 360 == result["refused"] + result["harmless"]
    kinds = {"train", "val", "sidecar", "tokenizer", "manifest", "weights"}
    assert set(result["kinds"]) == kinds | {f"artifact-{codec}" for codec in damage.tg.CODECS}
    assert all(ends["refused"] >= 20 for ends in result["kinds"].values())


def test_faults_are_the_same_for_a_seed():
    results = [damage.run_damage(45, seed) for seed in (3, 3, 4)]
    assert results[0] == results[1]
    assert results[0]["kinds"] != results[2]["kinds"]


def test_faults_that_are_not_refused_are_counted(tmp_path):
    """A reader that sees no damage, one that crashes and one that does not name the file are all wrong."""

    def careless(path: Path) -> str:
        return str(len(path.read_bytes())) if path.is_file() else "missing"

    def crashing(path: Path) -> str:
        if not path.is_file() or path.read_bytes() != bytes(5000):
            raise RuntimeError("crash")
        return ""

    def nameless(path: Path) -> str:
        if not path.is_file() or path.read_bytes() != bytes(5000):
            raise damage.tg.DataError("something is wrong")
        return ""

    def make(folder: Path) -> dict[str, damage.Target]:
        found = {}
        for reader in (careless, crashing, nameless):
            path = folder / f"{reader.__name__}.bin"
            path.write_bytes(bytes(5000))
            found[reader.__name__] = damage.Target([path], lambda path=path, reader=reader: reader(path))
        return found

    result = damage.run_damage(90, make=make)
    for ends in result["kinds"].values():
        assert ends["refused"] == 0 and ends["wrong"] > 10
        assert ends["wrong"] == ends["damaged"] - ends["harmless"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> tuple[Path, dict[str, damage.Target]]:
    folder = tmp_path_factory.mktemp("inputs")
    return folder, damage.targets(folder)


@pytest.mark.parametrize("kind", ["train", "val", "sidecar"])
def test_faults_of_one_bit_are_seen_by_the_hash(inputs, kind):
    """The lowest bit of a token or byte count in the middle: no header, size or range changes."""
    _, made = inputs
    (path,) = made[kind].files
    whole = path.read_bytes()
    data = bytearray(whole)
    data[1024 + (len(data) - 1024) // 4 * 2] ^= 1
    damage.replace(path, bytes(data))
    try:
        with pytest.raises(damage.tg.DataError) as caught:
            made[kind].load()
        assert any(name in str(caught.value) for name in damage.names(path))
    finally:
        damage.replace(path, whole)
    made[kind].load()


def test_faults_are_recorded_where_unverified_data_are_allowed(inputs, monkeypatch):
    folder, made = inputs
    (path,) = made["train"].files
    whole = path.read_bytes()
    damage.replace(path, whole[:-2] + bytes([whole[-2] ^ 1, whole[-1]]))
    environ = damage.TINY | {"DATA_PATH": str(folder / "data"), "ALLOW_UNVERIFIED_DATA": "1"}
    try:
        _, preflight = damage.read_inputs(environ)
        said = preflight.manifest["unverified"]
        assert path.name in said and "SHA-256" in said
    finally:
        damage.replace(path, whole)


def test_faults_without_a_hash_in_the_manifest_are_not_seen(inputs):
    """What is not covered: a manifest without hashes verifies counts only."""
    folder, made = inputs
    (path,), manifest = made["train"].files, folder / "data" / "manifest.json"
    whole, said = path.read_bytes(), manifest.read_bytes()
    before = made["train"].load()
    bare = json.loads(said)
    for entry in bare["files"].values():
        del entry["sha256"]
    damage.replace(manifest, json.dumps(bare).encode())
    damage.replace(path, whole[:-2] + bytes([whole[-2] ^ 1, whole[-1]]))
    try:
        assert made["train"].load() != before
    finally:
        damage.replace(path, whole)
        damage.replace(manifest, said)


def test_faults_in_weights_that_torch_reads_without_a_word(tg, tmp_path):
    """torch.load does not look at the archive's checksums; `load_weights` does."""
    path = tmp_path / "weights.pt"
    state = {"w": torch.arange(1000.0)}
    torch.save(state, path)
    data = bytearray(path.read_bytes())
    data[data.index(state["w"].numpy().tobytes()) + 2] ^= 1
    path.write_bytes(data)
    assert not torch.equal(torch.load(path, weights_only=True)["w"], state["w"])
    with pytest.raises(tg.ArtifactError, match=r"weights\.pt"):
        tg.load_weights(path)
