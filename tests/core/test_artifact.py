"""The artifact container: reproducible, self-describing, and no damaged file is ever taken for weights."""

import hashlib
import lzma
import random
import subprocess
import sys

import brotli
import pytest
import torch
from patience import PATIENCE

from bench.fuzz_artifact import TINY, small_records

CODECS = ["brotli", "lzma", "ans"]


@pytest.fixture(scope="module", params=CODECS)
def packed(request, tg):
    """(config, records, artifact bytes) for each codec."""
    config = tg.Config(**TINY, compressor=request.param)
    records = small_records(config)
    return config, records, tg.pack_artifact(records, config)


def same(records: dict, others: dict) -> bool:
    return list(records) == list(others) and all(
        record.category == others[name].category
        and set(record.arrays) == set(others[name].arrays)
        and all(torch.equal(array, others[name].arrays[key]) for key, array in record.arrays.items())
        for name, record in records.items()
    )


def test_round_trip(tg, packed):
    config, records, artifact = packed
    settings, unpacked = tg.read_artifact(artifact, tg.Config())
    assert same(records, unpacked)
    of_tensors = {"float16_max_elements", "gated_attn_quant_gate"}  # each tensor's entry tells them
    assert settings == {key: getattr(config, key) for key in settings}
    assert TINY.keys() - settings.keys() == of_tensors
    assert isinstance(artifact, bytes)


def test_settings_that_are_not_a_models(tg, packed, monkeypatch):
    """An artifact decides what the model is, not how it is evaluated."""
    config, records, _ = packed
    monkeypatch.setattr(tg, "MODEL_SETTINGS", (*tg.MODEL_SETTINGS, "ttt_lora_lr"))
    forged = tg.pack_artifact(records, config)
    monkeypatch.undo()
    with pytest.raises(tg.ArtifactError, match="settings that no model has"):
        tg.read_artifact(forged, tg.Config())


def test_same_weights_same_bytes(tg, packed):
    config, _, artifact = packed
    assert tg.pack_artifact(small_records(config), config) == artifact


def test_other_weights_other_bytes(tg, packed):
    config, records, artifact = packed
    name = next(iter(records))
    changed = small_records(config)
    changed[name].arrays[""].view(-1)[0] += 1
    assert tg.pack_artifact(changed, config) != artifact


def test_size_is_what_is_counted(tg, packed, tmp_path):
    """The bytes are the file: nothing is added on the way to the disk, and compression does compress."""
    _, records, artifact = packed
    path = tmp_path / "final_model.int6.ptz"
    path.write_bytes(artifact)
    raw = sum(array.numel() * array.element_size() for r in records.values() for array in r.arrays.values())
    assert path.stat().st_size == len(artifact) < raw + 8192


def test_truncated_everywhere(tg, packed):
    _, _, artifact = packed
    for length in range(0, len(artifact), 97):
        with pytest.raises(tg.ArtifactError):
            tg.read_artifact(artifact[:length], tg.Config())
    with pytest.raises(tg.ArtifactError):
        tg.read_artifact(artifact[:-1], tg.Config())


def test_flipped_bits(tg, packed):
    """200 places over the whole file, the header's first 64 bytes among them."""
    _, _, artifact = packed
    rng = random.Random(0)
    places = [*range(64), *(rng.randrange(64, len(artifact)) for _ in range(136))]
    for place in places:
        damaged = bytearray(artifact)
        damaged[place] ^= 1 << rng.randrange(8)
        with pytest.raises(tg.ArtifactError):
            tg.read_artifact(bytes(damaged), tg.Config())


def test_damage_behind_a_right_checksum(tg, packed):
    """A forged checksum reaches the parser: it may succeed or raise ArtifactError, nothing else."""
    _, _, artifact = packed
    size = tg.PREFIX.size
    rng = random.Random(1)
    refused = 0
    for _ in range(200):
        body = bytearray(artifact[size:])
        place = rng.randrange(min(len(body), 600))
        body[place] ^= 1 << rng.randrange(8)
        prefix = artifact[: size - 32] + hashlib.sha256(body).digest()
        try:
            tg.read_artifact(prefix + bytes(body), tg.Config())
        except tg.ArtifactError:
            refused += 1
    assert refused > 100


def test_trailing_bytes(tg, packed):
    _, _, artifact = packed
    with pytest.raises(tg.ArtifactError):
        tg.read_artifact(artifact + b"\0", tg.Config())


@pytest.mark.parametrize(
    "foreign",
    [
        b"",
        b"\0" * 4096,
        b"PK\x03\x04" + b"\0" * 200,
        b"BSHF\x02" + b"a" * 300,
        b"#!/bin/sh\nexit 1\n",
        b"\xff" * 70,
    ],
    ids=["empty", "zeros", "zip", "byte_shuffled", "script", "ones"],
)
def test_foreign_file(tg, foreign):
    with pytest.raises(tg.ArtifactError):
        tg.read_artifact(foreign, tg.Config())


def test_other_version_is_named(tg, packed):
    """The first bytes say what the file is; the message says so instead of an unpacking error."""
    with pytest.raises(tg.ArtifactError, match="."):
        tg.read_artifact(b"not an artifact at all, but long enough to hold a header" * 20, tg.Config())


def test_error_is_a_value_error(tg):
    assert issubclass(tg.ArtifactError, ValueError)


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", [0, 1, 2, 5, 64, 1001])
def test_byte_shuffle_round_trip(tg, stride, length):
    data = random.Random(length).randbytes(length)
    shuffled = tg.byte_shuffle(data, stride)
    assert tg.byte_unshuffle(shuffled) == data
    assert sorted(shuffled[len(shuffled) - length :]) == sorted(data)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("data", [b"", b"a", b"abc" * 5000], ids=["empty", "one", "repeated"])
def test_codec_round_trip(tg, codec, data):
    cfg = tg.Config(compressor=codec)
    compressed = tg.compress(data, cfg)
    assert tg.decompress(compressed, cfg) == data
    assert len(data) < 100 or len(compressed) < len(data) / 10


@pytest.mark.parametrize("codec", CODECS)
def test_damaged_stream_is_an_error(tg, codec):
    """Cut off, it is an ArtifactError; changed, it may be one of the codec, of which the reader makes one."""
    cfg = tg.Config(compressor=codec)
    compressed = bytearray(tg.compress(bytes(range(256)) * 8, cfg))
    with pytest.raises(tg.ArtifactError):
        tg.decompress(bytes(compressed[:-3]), cfg)
    compressed[len(compressed) // 2] ^= 0xFF
    with pytest.raises((tg.ArtifactError, lzma.LZMAError, brotli.error)):
        tg.decompress(bytes(compressed[:-3]), cfg)


@pytest.mark.parametrize("codec", ["brotli", "lzma"])
def test_packed_code_runs(tg, tmp_path, codec):
    """The counted wrapper is a script that behaves as its source, and is not wrapped again."""
    cfg = tg.Config(compressor=codec)
    source = b"import sys\n\n\ndef add(left, right=0, scale=1):\n    return (left + right) * scale\n\n"
    source += b'\nif __name__ == "__main__":\n    print(add(19, 2, scale=2), sys.argv[1])\n'
    path = tmp_path / "train_gpt.packed.py"
    wrapper = tg.wrap(source, cfg)
    path.write_bytes(wrapper)
    result = subprocess.run(
        [sys.executable, str(path), "x"], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (result.returncode, result.stdout) == (0, "42 x\n"), result.stderr
    assert tg.packed_script(cfg, tg.Backends(), {"train_gpt.py": wrapper})[0] == wrapper
