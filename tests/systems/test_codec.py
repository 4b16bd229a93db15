"""Codec `ans`, the published format, and files that mean harm: exact, compact, an error at most."""

import hashlib
import io
import json
import os
import pickle
import sys
import tracemalloc
import zipfile

import brotli
import numpy as np
import pytest
import torch

from bench.fuzz_artifact import (
    FORMATS,
    TINY,
    contents,
    format_config,
    fuzz,
    published_artifact,
    small_records,
)

SHAPES = [(0, 5), (5, 0), (1, 1), (1, 300), (300, 1), (16, 7), (65, 33), (200, 64)]


def gaussian_levels(seed: int, rows: int, columns: int, spread: float = 0.0, top: int = 31) -> np.ndarray:
    """Levels as GPTQ leaves them: standard deviation 2.5; `spread` of the columns' log deviations."""
    rng = np.random.Generator(np.random.PCG64(seed))
    scale = 2.5 * np.exp(spread * rng.standard_normal(columns))
    return np.clip(np.rint(rng.standard_normal((rows, columns)) * scale), -top, top).astype(np.int8)


def entropy_bytes(levels: np.ndarray) -> float:
    counts = np.unique(levels, return_counts=True)[1]
    return -(counts * np.log2(counts / counts.sum())).sum() / 8


def round_trip(tg, matrices: list) -> bytes:
    data = tg.encode_levels([levels for levels, _ in matrices], [top for _, top in matrices])
    decoded = tg.decode_levels(data, [(levels.shape, levels.dtype.str, top) for levels, top in matrices])
    for levels, (original, _) in zip(decoded, matrices, strict=True):
        assert levels.dtype == original.dtype and np.array_equal(levels, original)
    return data


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("top", [1, 7, 31, 127])
def test_codec_round_trips_any_levels(tg, shape, top):
    """Uniform over the whole range, extremes, constants and rare outliers."""
    rng = np.random.Generator(np.random.PCG64(shape[0] * 1000 + shape[1] + top))
    uniform = rng.integers(-top - 1, top + 1, shape).astype(np.int8)
    rare = (rng.random(shape) < 0.01) * uniform
    fixed = [np.full(shape, value, np.int8) for value in (0, top, -top - 1)]
    round_trip(tg, [(levels, top) for levels in (uniform, rare.astype(np.int8), *fixed)])


def test_codec_of_matrices_together(tg):
    """Of any shapes and both types, empty ones among them; levels that have no frequency are frequent."""
    rng = np.random.Generator(np.random.PCG64(1))
    matrices = [(rng.integers(-128, 128, shape).astype(np.int8), 127) for shape in SHAPES]
    matrices += [(np.zeros((9, columns), np.int16), 127) for columns in (0, 1, 40)]
    rare = np.where(rng.random((3000, 30)) < 0.03, rng.integers(-128, 128, (3000, 30)), 0)
    round_trip(tg, [*matrices, (rare.astype(np.int8), 127)])


def test_codec_of_nothing(tg):
    assert len(round_trip(tg, [])) == 5  # the state of a coder


def test_codec_bytes_are_the_same_everywhere(tg):
    """Integers in, integers throughout, so that the bytes cannot depend on a machine's floating point."""
    rng = np.random.Generator(np.random.PCG64(7))
    matrices = [rng.integers(-8, 8, (100, 40)).astype(np.int8) for _ in range(2)]
    loud = rng.integers(-60, 61, (150, 30)) // rng.integers(1, 20, 30)
    data = tg.encode_levels([*matrices, loud.astype(np.int8)], [31, 31, 63])
    assert (
        hashlib.sha256(data).hexdigest() == "889482d31ad6cbedacedb849fb7adb3f8f368b4c911d35abbe691cb7d16a68d8"
    )


def test_codec_of_frozen_bytes(tg):
    """These bytes are these levels: a file of today is read by any later version."""
    data = bytes.fromhex("071c012aceb44c9369b30d54c1a68d8c888d6b96f33439d090")
    plain, trellis = tg.decode_levels(data, [((6, 4), "|i1", 7), ((5, 3), "<i2", 127)])
    assert plain.tolist() == [
        [1, 2, 1, -4],
        [3, 1, -2, 2],
        [1, -8, 0, 2],
        [-2, 0, -1, 2],
        [0, -1, -2, -1],
        [0, -1, 4, 3],
    ]
    assert trellis.tolist() == [[-16, -12, -2], [-2, 2, 1], [13, -7, -2], [12, 4, 4], [-3, -9, 1]]


def test_codec_reaches_the_entropy(tg):
    """Columns that are all alike leave nothing to gain: the side information must cost next to nothing."""
    matrices = [(gaussian_levels(seed, 512, 1024), 31) for seed in range(4)]
    assert len(round_trip(tg, matrices)) <= 1.001 * sum(entropy_bytes(levels) for levels, _ in matrices)


def test_codec_uses_unequal_columns(tg):
    """Log deviations spread by 0.3: the ideal gain is known, 0.3^2 / 2 nats at most."""
    matrices = [(gaussian_levels(seed, 512, 1024, 0.3), 31) for seed in range(2)]
    size, entropy = len(round_trip(tg, matrices)), sum(entropy_bytes(levels) for levels, _ in matrices)
    packed = brotli.compress(b"".join(levels.tobytes() for levels, _ in matrices), quality=11, lgwin=24)
    assert 0.97 * entropy < size < 0.99 * entropy
    assert size < 0.98 * len(packed)


def test_codec_keeps_a_bounded_number_of_tables(tg, monkeypatch):
    """Columns of every deviation and mean: a table for each would take memory and time without a bound."""
    made, plain = [], tg.FrequencyTables

    def kept(scales: int) -> object:
        made.append(plain(scales))
        return made[-1]

    monkeypatch.setattr(sys.modules[plain.__module__], "FrequencyTables", kept)
    rng = np.random.Generator(np.random.PCG64(3))
    matrices = []
    for top in (1, 3, 7, 15, 31, 63, 127):
        deviations, means = np.exp(rng.uniform(-3, 5, 2000)), rng.uniform(-16, 16, 2000)
        drawn = np.rint(rng.standard_normal((20, 2000)) * deviations + means)
        matrices.append((np.clip(drawn, -128, 127).astype(np.int8), top))
    round_trip(tg, matrices)
    assert all(tg.MOST_TABLES <= tables.count <= 2 * tg.MOST_TABLES for tables in made)
    bytes_held = sum(array.nbytes for array in vars(made[-1]).values() if isinstance(array, np.ndarray))
    assert bytes_held < 32 << 20


def test_codec_of_random_words_is_refused_or_wrong(tg):
    """Decoding never runs away: as many levels as asked for, or an ArtifactError."""
    rng = np.random.Generator(np.random.PCG64(0))
    refused = 0
    for length in (0, 1, 2, 3, 4, 41, 402, 4002):
        for _ in range(20):
            try:
                tg.decode_levels(rng.bytes(length), [((70, 30), "|i1", 31)])
            except tg.ArtifactError:
                refused += 1
    assert refused >= 150


def test_ans_asks_for_brotli_before_training(tg, monkeypatch):
    tg.check_codec("ans")
    monkeypatch.setitem(sys.modules, "brotli", None)  # as where it is not installed
    with pytest.raises(tg.ConfigError, match="COMPRESSOR=ans: the Python package brotli is not installed"):
        tg.check_codec("ans")


@pytest.fixture(scope="module", params=FORMATS)
def sample(request, tg):
    """(format, records, artifact) of a small model."""
    kind = request.param
    config = format_config(kind)
    records = small_records(config)
    matrices = "trellis" if kind == "trellis" else "gptq"
    assert {record.kind for record in records.values()} == {matrices, "int8_rows", "fp16"}
    assert any(record.correction for record in records.values())
    artifact = published_artifact(records) if kind == "published" else tg.pack_artifact(records, config)
    return kind, records, artifact


def test_artifact_of_every_format_is_read(tg, sample):
    kind, records, artifact = sample
    settings, read = tg.read_artifact(artifact, tg.Config())
    assert bool(settings) == (kind != "published")
    assert list(read) == list(records)
    for name, record in records.items():
        assert (read[name].kind, read[name].bits, read[name].shape) == (
            record.kind,
            record.bits,
            record.shape,
        )
        assert read[name].category == record.category
        assert torch.equal(read[name].dequantize(), record.dequantize())


def test_artifact_table_is_what_the_quantiser_makes(tg, sample):
    """Keys, types, dimensions and largest levels of the table are those of the arrays."""
    types = {"|i1": torch.int8, "<i2": torch.int16, "<f2": torch.float16}
    for name, record in sample[1].items():
        told = tg.stored_arrays(name, record.kind, record.bits, record.shape, record.correction)
        told = {array.key: array for array in told}
        assert told.keys() == record.arrays.keys()
        for key, array in record.arrays.items():
            assert (told[key].dims, types[told[key].dtype]) == (tuple(array.shape), array.dtype), (name, key)
            if array.dtype != torch.float16:
                top = told[key].top << (array.dtype == torch.int16)  # a trellis reaches twice as far
                assert -top - 2 <= int(array.min()) and int(array.max()) <= top + 1


def test_artifact_table_has_every_array_once(tg):
    keys = [key for form, (_, arrays) in tg.FORMS.items() for key in arrays if form != "trellis"]
    assert len(set(keys)) == len(keys)
    assert tg.FORMS["trellis"][1] == tg.FORMS["gptq"][1]  # a matrix has one of the two


def test_artifact_fuzz(sample):
    """1,000 damaged files of each format; `bench/fuzz_artifact.py` does 100,000."""
    ends = fuzz(sample[2], 1000, seed=1)
    assert sum(ends.values()) == 1000 and ends["refused"] > 850


def test_artifact_memory_is_bounded(tg, sample):
    """Reading takes at most four times the declared size (and what is needed in any case)."""
    _, records, artifact = sample
    declared = sum(a.numel() * a.element_size() for r in records.values() for a in r.arrays.values())
    contents(artifact)
    tracemalloc.start()
    tg.read_artifact(artifact, tg.Config())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * declared + (1 << 20)


@pytest.mark.parametrize("codec", ["lzma", "brotli"])
def test_published_artifact_of_either_codec(tg, codec):
    config = tg.Config(**TINY, lqer_asym_enabled=False)
    records = small_records(config)
    read = tg.read_published(published_artifact(records, codec))
    assert any(record.correction[:1] == ("sym",) for record in read.values())
    assert all(torch.equal(read[name].dequantize(), r.dequantize()) for name, r in records.items())


def forge(tg, artifact: bytes, change) -> bytes:
    """The artifact with a changed header and a checksum that fits."""
    size = tg.PREFIX.size
    _, version, codec, head_len, _ = tg.PREFIX.unpack_from(artifact)
    cfg = tg.Config(compressor=tg.CODECS[codec])
    header = json.loads(tg.decompress(artifact[size : size + head_len], cfg))
    change(header)
    head = tg.compress(json.dumps(header).encode(), cfg)
    body = head + artifact[size + head_len :]
    return tg.PREFIX.pack(b"PGOLF", version, codec, len(head), hashlib.sha256(body).digest()) + body


def forgeries():
    """Headers that would take memory or time, by name."""

    def tensor(place: int, value: object):
        return lambda header: header["tensors"][0].__setitem__(place, value)

    def named(header: dict, name: str) -> list:
        return next(entry for entry in header["tensors"] if entry[0] == name)

    def matrix(place: int, value: object):
        return lambda header: named(header, "blocks.0.mlp.fc.weight").__setitem__(place, value)

    def setting(name: str, value: object):
        return lambda header: header["model"].__setitem__(name, value)

    return {
        "huge_shape": tensor(3, [10**6, 10**6]),
        "huge_bits": tensor(2, 10**9),
        "negative": tensor(3, [-1, 5]),
        "float": tensor(3, [2.5, 5]),
        "bool": tensor(3, [True, 5]),
        "above_eight_bits": matrix(2, 9),
        "one_bit": matrix(2, 1),
        "float16_of_eight_bits": tensor(2, 8),
        "rows_of_six_bits": lambda header: named(header, "blocks.0.attn.attn_gate_w").__setitem__(2, 6),
        "empty_matrices": lambda header: header["tensors"].extend(
            [f"e{i}", "gptq", 6, shape, []] for i, shape in enumerate([[0, 5], [5, 0]] * 5000)
        ),
        "unknown_matrix": lambda header: header["tensors"].append(["wide", "gptq", 6, [16, 10**6], []]),
        "missing_tensor": lambda header: header["tensors"].pop(),
        "narrow_bank": lambda header: named(header, "blocks.1.mlp.proj.weight").__setitem__(3, [32, 63]),
        "fewer_skips": tensor(3, [1, 31]),
        "other_model": setting("tie_embeddings", False),
        "columns_with_a_rank": matrix(4, ["columns", 4, 0]),
        "rank_of_nothing": matrix(4, ["sym", 0, 0]),
        "more_rank_than_columns": matrix(4, ["sym", 33, 0]),
        "group_of_no_use": matrix(4, ["sym", 4, 64]),
        "dimensions": tensor(3, [1] * 40),
        "kind": tensor(1, "pickle"),
        "name": tensor(0, ["a"]),
        "correction": tensor(4, ["asym", 10**12, 1]),
        "group": tensor(4, ["asym", 4, 0]),
        "twice": lambda header: header["tensors"].append(header["tensors"][0]),
        "layers": setting("num_layers", 10**9),
        "loops": setting("num_loops", 10**12),
        "width": setting("model_dim", 10**6),
        "vocabulary": setting("vocab_size", 10**9),
        "mlp": setting("mlp_mult", 1e12),
        "nested": lambda header: header.update(model={"a": json.loads("[" * 900 + "]" * 900)}),
        "streams": lambda header: header["streams"].reverse(),
        "lengths": lambda header: header["streams"][0].__setitem__(1, -5),
    }


@pytest.fixture
def nothing_decoded(tg, monkeypatch):
    """Whoever gets to the decoding fails: a file that is refused costs no more than its header."""
    monkeypatch.setattr(tg, "unpack_artifact", lambda *_: pytest.fail("decoded"))


def peak_of(call) -> int:
    """Most bytes that a call holds at a time."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("nothing_decoded")
@pytest.mark.parametrize("forgery", forgeries())
def test_forged_artifact_is_refused(tg, forgery):
    """By its header alone, in little more memory than that needs."""
    config = tg.Config(**TINY, compressor="ans")
    artifact = forge(tg, tg.pack_artifact(small_records(config), config), forgeries()[forgery])
    header = len(json.dumps(tg.read_header(artifact, config)[0]))

    def refused() -> None:
        with pytest.raises(tg.ArtifactError) as caught:
            tg.read_artifact(artifact, tg.Config())
        assert len(str(caught.value)) < 400

    assert peak_of(refused) < 30 * header + (1 << 20)


@pytest.mark.usefixtures("nothing_decoded")
def test_forged_header_of_any_length_is_not_parsed(tg):
    """A hundred thousand tensors are more than any model has."""
    config = tg.Config(**TINY, compressor="ans")
    entries = [[f"e{i}", "fp16", 16, [1], []] for i in range(60_000)]
    artifact = tg.pack_artifact(small_records(config), config)
    with pytest.raises(tg.ArtifactError, match=f"above {tg.HEADER_LIMIT} bytes"):
        tg.read_artifact(forge(tg, artifact, lambda h: h["tensors"].extend(entries)), tg.Config())


@pytest.mark.parametrize(
    "settings",
    [
        TINY,
        TINY | {"tie_embeddings": False, "parallel_style": "single", "skip_gates_enabled": False},
        TINY | {"sparse_attn_gate_enabled": False, "gated_attn_enabled": True, "smear_gate_enabled": False},
        TINY | {"sparse_attn_gate_enabled": False, "attn_out_gate_enabled": True, "mlp_mult": 1.7},
        TINY | {"num_layers": 1, "parallel_start_layer": 0},  # without a skip: a tensor of no rows
        TINY | {"num_layers": 5, "num_loops": 3, "loop_start": 1, "loop_end": 2, "parallel_start_layer": 0},
    ],
)
def test_shapes_that_are_compared_are_the_models(tg, settings):
    """As of a model that is made, and no random number is drawn for them."""
    config = tg.Config(**settings)
    made = tg.flatten_banks(tg.GPT(config).state_dict(), config.num_layers)
    state = torch.get_rng_state()
    assert tg.model_shapes(config) == {name: tuple(tensor.shape) for name, tensor in made.items()}
    assert torch.equal(torch.get_rng_state(), state)
    artifact = tg.pack_artifact(small_records(config), config)
    assert tg.read_artifact(artifact, tg.Config())[1].keys() == made.keys()


def test_longest_header_may_be_read(tg):
    """That of a thousand layers, the most that NUM_LAYERS allows, with corrections on every matrix."""
    config = tg.Config(**TINY | {"num_layers": 1000, "model_dim": 16, "parallel_start_layer": 0})
    entries = [
        [name, "gptq", 6, shape, ["asym", 4, 64]] if len(shape) == 2 else [name, "fp16", 16, shape, []]
        for name, shape in tg.model_shapes(config).items()
    ]
    assert len(json.dumps([config.model_settings(), entries])) < 0.9 * tg.HEADER_LIMIT


@pytest.mark.parametrize("size", [10**6, 5 * 10**8])
def test_artifact_bombs_are_not_unpacked(tg, size):
    """Half a gigabyte of zeros in 100 kB: reading stops at the declared size."""
    encoder = brotli.Compressor(quality=1)
    bomb = b"".join(encoder.process(bytes(10**6)) for _ in range(size // 10**6)) + encoder.finish()
    assert len(bomb) < 10**5
    tracemalloc.start()
    with pytest.raises(tg.ArtifactError, match="above 5000 bytes"):
        tg.decompress(bomb, tg.Config(), 5000)
    with pytest.raises(tg.ArtifactError):
        tg.read_artifact(bomb, tg.Config())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20


def packed_archive(tg, data: bytes) -> bytes:
    return brotli.compress(tg.byte_shuffle(data), quality=1)


def test_published_tensor_larger_than_its_bytes(tg):
    buffer = io.BytesIO()
    torch.save(
        {"w": {"a": torch.zeros(1).half().expand(10**10)}, "m": {"a": "passthrough (float16)"}}, buffer
    )
    with pytest.raises(tg.ArtifactError, match="larger than their bytes"):
        tg.read_artifact(packed_archive(tg, buffer.getvalue()), tg.Config())


def repacked(data: bytes, listed: bytes | None = None, more: int = 0) -> bytes:
    """An archive of `torch.save` with another list of tensors, and with so many empty members more."""
    hostile = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(hostile, "w") as new:
        for name in old.namelist():
            new.writestr(name, listed if listed and name.endswith("data.pkl") else old.read(name))
        for number in range(more):
            new.writestr(f"archive/data/{number + 1000}", b"")
    return hostile.getvalue()


def nested_tuples(depth: int) -> bytes:
    """Pickle of a dictionary with one key, a tuple that holds a tuple twice, and so on."""
    keys = b"X\1\0\0\0a\x85q\0" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(depth))
    return b"\x80\2}X\1\0\0\0w}sX\1\0\0\0m}" + keys + b"X\1\0\0\0bss."


@pytest.mark.parametrize("fault", ["shared", "members", "tuples", "object", "storage"])
def test_published_archive_that_grows_is_refused_before_it_is_loaded(tg, monkeypatch, tmp_path, fault):
    """Thousands of views of one array, of members, keys that take for ever, an object of another kind."""
    buffer, count = io.BytesIO(), 10_000 if fault == "shared" else 1
    array = torch.zeros(0).half()
    views = {f"tensor{i}": array.view(0) for i in range(count)}
    torch.save({"w": views, "m": dict.fromkeys(views, "passthrough (float16)")}, buffer)
    data = buffer.getvalue()
    if fault == "members":
        data = repacked(data, more=tg.MOST_MEMBERS)
    elif fault != "shared":
        listed = {
            "tuples": nested_tuples(60),
            "object": pickle.dumps({"w": {}, "m": bytearray(5)}, protocol=2),
            "storage": b"\x80\2}X\1\0\0\0mctorch\nUntypedStorage\nJ\xff\xff\xff\x7f\x85Rs.",
        }
        data = repacked(data, listed[fault])
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(tg.ArtifactError):
        tg.read_artifact(packed_archive(tg, data), tg.Config())
    (tmp_path / "weights.pt").write_bytes(data)
    if fault != "members":  # a checkpoint is as large as its members; they are compared with its size
        with pytest.raises(tg.ArtifactError, match="not a checkpoint that holds tensors"):
            tg.load_weights(tmp_path / "weights.pt")


def test_checkpoint_larger_than_its_bytes(tg, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(1).expand(10**12)}, path)
    with pytest.raises(tg.ArtifactError, match="not a checkpoint that holds tensors"):
        tg.load_weights(path)


def test_checkpoint_of_a_state_dict_is_read(tg, tmp_path):
    """Parameters and metadata too, as `torch.save(model.state_dict())` writes them."""
    path, layer = tmp_path / "weights.pt", torch.nn.Linear(3, 2)
    for state in (layer.state_dict(), dict(layer.named_parameters())):
        torch.save(state, path)
        read = tg.load_weights(path)
        assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in read)


def test_published_archive_runs_no_code(tg, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    buffer, hostile = io.BytesIO(), io.BytesIO()
    torch.save({"w": {}, "m": {}}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(hostile, "w") as new:
        for name in old.namelist():
            payload = pickle.dumps({"w": {}, "m": Payload()}, protocol=2)
            new.writestr(name, payload if name.endswith("data.pkl") else old.read(name))
    for data in (hostile.getvalue(), pickle.dumps(Payload())):
        with pytest.raises(tg.ArtifactError):
            tg.read_artifact(packed_archive(tg, data), tg.Config())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fault", ["crc", "dtype", "unknown", "missing", "surplus", "scheme", "list"])
def test_published_artifact_with_a_fault(tg, fault):
    records = small_records(tg.Config(**TINY))
    if fault == "crc":
        data = bytearray(tg.byte_unshuffle(brotli.decompress(published_artifact(records))))
        levels = records["tok_emb.weight"].arrays["q"].numpy().tobytes()
        data[data.index(levels)] ^= 1
        with pytest.raises(tg.ArtifactError, match="damaged archive"):
            tg.read_published(packed_archive(tg, bytes(data)))
        return
    content = {"w": {"a": torch.ones(3).half()}, "m": {"a": "passthrough (float16)"}}
    if fault == "dtype":
        content["w"]["a"] = torch.ones(3)
    elif fault == "unknown":
        content["m"]["a"] = "gptq (int99)"
    elif fault == "missing":
        content["w"] = {}
    elif fault == "surplus":
        content["w"]["b"] = torch.ones(1).half()
    elif fault == "scheme":
        content["m"]["a"] = "gptq (int6)"
    else:
        content = [content]
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with pytest.raises(tg.ArtifactError):
        tg.read_published(packed_archive(tg, buffer.getvalue()))
