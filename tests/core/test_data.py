"""Shards, loaders and validation sets on synthetic shards: every stream against a plain list of tokens."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from house import packed_loader, shuffled_loader

BOS = 1
WORLDS = [1, 2, 4, 8]


def write_shard(path, tokens, *, magic: int = 20240520, version: int = 1, count: int | None = None) -> None:
    """A shard file: 256 little-endian int32 of header, then uint16 tokens. The keywords make it wrong."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


def random_tokens(seed: int, length: int, document: int = 40) -> list[int]:
    """`length` tokens of 2.., with a BOS at 0 and about every `document` tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, 5000, size=length)
    tokens[rng.random(length) < 1 / document] = BOS
    tokens[0] = BOS
    return tokens.tolist()


@pytest.fixture
def train_shards(tmp_path):
    """Three shards; the second starts in the middle of a document. (folder, list of token lists)."""
    shards = [random_tokens(seed, length) for seed, length in enumerate((1000, 1500, 1200))]
    shards[1][0:9] = range(2, 11)
    shards[1][9] = BOS
    for number, tokens in enumerate(shards):
        write_shard(tmp_path / f"fineweb_train_{number:06d}.bin", tokens)
    return tmp_path, shards


def packed_stream(shards: list[list[int]], span: int, calls: int) -> list[list[int]]:
    """Oracle: global spans in order; a shard begins at its first BOS, its short remainder is dropped."""
    spans, number, cursor = [], 0, shards[0].index(BOS)
    for _ in range(calls):
        while cursor + span > len(shards[number]):
            number = (number + 1) % len(shards)
            cursor = shards[number].index(BOS)
        spans.append(shards[number][cursor : cursor + span])
        cursor += span
    return spans


def test_read_shard_returns_the_tokens(tg, tmp_path):
    tokens = [0, 1, 65535, 8191]
    write_shard(tmp_path / "fineweb_train_000000.bin", tokens)
    read = tg.read_shard(tmp_path / "fineweb_train_000000.bin")
    assert read.dtype == np.uint16
    assert read.tolist() == tokens


@pytest.mark.parametrize(
    "fault",
    [
        {"magic": 20240521},
        {"version": 2},
        {"count": 9},
        {"count": 11},
        {"count": -1},
        {"count": 2**31 - 1},
    ],
)
def test_bad_shard_is_refused_by_name(tg, tmp_path, fault):
    path = tmp_path / "fineweb_train_000007.bin"
    write_shard(path, list(range(10)), **fault)
    with pytest.raises(tg.DataError, match="fineweb_train_000007.bin"):
        tg.read_shard(path)


@pytest.mark.parametrize("size", [0, 3, 1023, 1024, 1043])
def test_truncated_shard_is_refused_by_name(tg, tmp_path, size):
    path = tmp_path / "fineweb_train_000003.bin"
    write_shard(path, list(range(10)))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(tg.DataError, match="fineweb_train_000003.bin"):
        tg.read_shard(path)


def test_missing_shard_is_refused_by_name(tg, tmp_path):
    with pytest.raises(tg.DataError, match="fineweb_train_000042.bin"):
        tg.read_shard(tmp_path / "fineweb_train_000042.bin")


@pytest.mark.parametrize("missing", ["train", "val", "val_bytes"])
def test_folder_without_shards_is_refused_by_name(tg, tmp_path, missing):
    for split in {"train", "val", "val_bytes"} - {missing}:
        write_shard(tmp_path / f"fineweb_{split}_000000.bin", [BOS, 5, 6])
    with pytest.raises(tg.DataError, match=f"{tmp_path}.*fineweb_{missing}_"):
        tg.check_data(tg.Config(data_path=str(tmp_path)))


def test_loaders_without_shards_are_refused(tg):
    with pytest.raises(tg.DataError):
        packed_loader(tg, [], 1, 0, 63, 64)
    with pytest.raises(tg.DataError):
        shuffled_loader(tg, [], 1, 0, 64)


def test_shard_paths_are_sorted_and_disjoint(tg, tmp_path):
    names = ["fineweb_val_000001.bin", "fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin"]
    names += ["fineweb_train_000010.bin", "fineweb_train_000002.bin", "notes.txt"]
    for name in names:
        write_shard(tmp_path / name, [BOS])
    found = {
        split: [p.name for p in tg.shard_paths(tmp_path, split)] for split in ("train", "val", "val_bytes")
    }
    assert found == {
        "train": ["fineweb_train_000002.bin", "fineweb_train_000010.bin"],
        "val": ["fineweb_val_000000.bin", "fineweb_val_000001.bin"],
        "val_bytes": ["fineweb_val_bytes_000000.bin"],
    }


@pytest.mark.parametrize("world", WORLDS)
def test_union_over_ranks_is_one_stream(tg, train_shards, world):
    """Whatever the world size, the ranks' spans side by side are the same consecutive tokens."""
    folder, shards = train_shards
    span, calls = 320, 12
    loaders = [
        packed_loader(tg, tg.shard_paths(folder, "train"), world, rank, span // world - 1, 64)
        for rank in range(world)
    ]
    for expected in packed_stream(shards, span, calls):
        union = []
        for loader in loaders:
            x, y, _ = loader.next()
            assert torch.equal(x[0, 1:], y[0, :-1])
            union += [*x[0].tolist(), y[0, -1].item()]
        assert union == expected


@pytest.mark.parametrize("world", WORLDS)
def test_grouped_stream_does_not_depend_on_the_ranks(tg, train_shards, world):
    """Groups of eight spans, whoever takes them: the ends of the shards are dropped alike."""
    folder, shards = train_shards
    paths, span, turns = tg.shard_paths(folder, "train"), 40, 8 // world
    loaders = [packed_loader(tg, paths, world, rank, span - 1, 64, group=8) for rank in range(world)]
    for expected in packed_stream(shards, 8 * span, 12):
        union = []
        for _ in range(turns):
            loaders = [after_a_resume(tg, paths, loader, world, r) for r, loader in enumerate(loaders)]
            rows = [loader.next() for loader in loaders]
            union += [token for x, y, _ in rows for token in [*x[0].tolist(), y[0, -1].item()]]
        assert union == expected


def after_a_resume(tg, paths, loader, world: int, rank: int):
    """A new loader at the place of another, in the middle of a group, too."""
    fresh = packed_loader(tg, paths, world, rank, 39, 64, group=8)
    fresh.load_state(loader.state())
    return fresh


def test_packed_segments_start_at_documents(tg, train_shards):
    folder, _ = train_shards
    loader = packed_loader(tg, tg.shard_paths(folder, "train"), 1, 0, 255, 32)
    for _ in range(8):
        x, _, segments = loader.next()
        boundaries = segments.cu_seqlens.tolist()
        assert len(boundaries) % 64 == 0
        starts = set(boundaries[: boundaries.index(255)])
        bos = {position for position, token in enumerate(x[0].tolist()) if token == BOS}
        assert bos | {0} <= starts
        lengths = [end - begin for begin, end in zip(boundaries, boundaries[1:], strict=False)]
        assert segments.max_seqlen == max(lengths) <= 32
        assert sum(lengths) == 255


@pytest.mark.parametrize("world", [1, 4])
def test_span_larger_than_every_shard_is_refused(tg, train_shards, world):
    """The published loader never returns here; ours names the folder, the need and what there is."""
    folder, shards = train_shards
    largest = max(len(tokens) - tokens.index(BOS) for tokens in shards)
    with pytest.raises(tg.DataError, match=f"{folder}.* {1600 + world} .* {largest}$"):
        packed_loader(tg, tg.shard_paths(folder, "train"), world, 0, 1600 // world, 64)
    exact = (largest - largest % world) // world - 1
    packed_loader(tg, tg.shard_paths(folder, "train"), world, 0, exact, 64).next()


def test_span_is_measured_from_the_first_bos(tg, tmp_path):
    """A shard as long as the span is no use when its first document starts late."""
    write_shard(tmp_path / "fineweb_train_000000.bin", [7] * 60 + random_tokens(0, 40))
    with pytest.raises(tg.DataError):
        packed_loader(tg, tg.shard_paths(tmp_path, "train"), 1, 0, 63, 64)


def test_shard_without_a_document_is_never_opened_forever(tg, tmp_path):
    """A train shard holding only the middle of a document gives no batch of its own and does not hang."""
    write_shard(tmp_path / "fineweb_train_000000.bin", random_tokens(0, 100))
    write_shard(tmp_path / "fineweb_train_000001.bin", [7] * 100)
    loader = packed_loader(tg, tg.shard_paths(tmp_path, "train"), 1, 0, 49, 64)
    first = [loader.next()[0].tolist() for _ in range(2)]
    again = [loader.next()[0][0, 0].item() for _ in range(4)]
    assert len({tuple(row[0]) for row in first}) == 2
    assert set(again) <= {first[0][0][0], first[1][0][0], 7}


def test_shuffled_ranks_share_no_window(tg, tmp_path):
    """Until a reset every window of every shard comes once, over all ranks together."""
    for number in range(4):
        write_shard(tmp_path / f"fineweb_train_{number:06d}.bin", random_tokens(number, 400))
    seen = []
    for rank in range(2):
        loader = shuffled_loader(tg, tg.shard_paths(tmp_path, "train"), 2, rank, 32)
        x, y = loader.next(20)
        assert torch.equal(x[:, 1:], y[:, :-1])
        seen += [tuple(row) for row in x.tolist()]
    assert len(set(seen)) == len(seen) == 40


def test_shuffled_loader_without_a_shard_for_a_rank(tg, tmp_path):
    """Fewer shards than ranks is refused, or served; it must not fail inside the random generator."""
    write_shard(tmp_path / "fineweb_train_000000.bin", random_tokens(0, 400))
    try:
        x, _ = shuffled_loader(tg, tg.shard_paths(tmp_path, "train"), 2, 1, 32).next(3)
    except tg.DataError as error:
        assert "TRAIN_SEQ_LEN=32" in str(error)
    else:
        assert x.shape == (3, 32)


def test_windows_of_other_ranks_are_not_read(tg, tmp_path):
    """What a rank skips it draws, and that is all: each read is a place of its own on the disk."""
    path = tmp_path / "fineweb_train_000000.bin"
    write_shard(path, random_tokens(0, 400))
    one, other = (shuffled_loader(tg, [path], 1, 0, 32) for _ in range(2))
    one.next(4)
    other._shards = None
    other.draw(4)
    other._shards = one._shards
    assert torch.equal(one.next(3)[0], other.next(3)[0])


def test_document_straddling_shards_is_one_document(tg, tmp_path):
    tokens = [BOS, 5, 6, 7, BOS, *range(10, 30), BOS, 8, 9]
    sidecar = [0 if token == BOS else token % 7 for token in tokens]
    for number, cut in enumerate((slice(0, 12), slice(12, None))):
        write_shard(tmp_path / f"fineweb_val_{number:06d}.bin", tokens[cut])
        write_shard(tmp_path / f"fineweb_val_bytes_{number:06d}.bin", sidecar[cut])
    val = load_validation(tg, tmp_path)
    assert val.tokens.tolist() == tokens
    assert val.target_bytes.tolist() == sidecar[1:]
    assert [tuple(document) for document in val.documents] == [(0, 5), (4, 22), (25, 3)]


def load_validation(tg, folder):
    """Validation set of a data folder with a byte sidecar."""
    return tg.load_validation(tg.Config(data_path=str(folder), vocab_size=256))


@pytest.mark.parametrize("entries", [5, 7])
def test_sidecar_of_another_length_is_refused_by_name(tg, tmp_path, entries):
    for split in ("train", "val"):
        write_shard(tmp_path / f"fineweb_{split}_000000.bin", [BOS, 5, 6, 7, 8, 9])
    write_shard(tmp_path / "fineweb_val_bytes_000000.bin", [0, 1, 1, 1, 1, 1, 1][:entries])
    with pytest.raises(tg.DataError, match=f"fineweb_val_bytes_.*{entries} entries"):
        load_validation(tg, tmp_path)
    with pytest.raises(tg.DataError, match=f"{tmp_path}/fineweb_val_bytes_.*{entries} entries"):
        tg.check_data(tg.Config(data_path=str(tmp_path), vocab_size=256))


@pytest.mark.parametrize("tokens", [[5, 6, BOS, 7, 8], [5, 6, 7]])
def test_validation_that_begins_inside_a_document_is_refused(tg, tmp_path, tokens):
    """Its first targets belong to no document: found before training, not by the count of its scores."""
    write_shard(tmp_path / "fineweb_val_000000.bin", tokens)
    write_shard(tmp_path / "fineweb_val_bytes_000000.bin", tokens)
    with pytest.raises(tg.DataError, match="fineweb_val_.*must be .*, the first a BOS"):
        load_validation(tg, tmp_path)


def test_token_beyond_the_vocabulary_is_refused(tg, tmp_path):
    write_shard(tmp_path / "fineweb_val_000000.bin", [BOS, 5, 256])
    write_shard(tmp_path / "fineweb_val_bytes_000000.bin", [0, 1, 1])
    with pytest.raises(tg.DataError, match="256.*VOCAB_SIZE=256"):
        load_validation(tg, tmp_path)


def test_sidecar_tensor_of_another_length_is_refused(tg):
    with pytest.raises(tg.DataError, match="4.*3|3.*4"):
        tg.ValidationSet.from_sidecar(torch.tensor([1, 5, 6, 7]), torch.tensor([0, 1, 1]))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("max_doc_len", [0, 16, 64])
def test_segments_cover_the_span(tg, length, max_doc_len):
    """Boundaries rise from 0 to the length, segments stay within the limit and starts are kept."""
    bos = [position for position in (0, 1, 30, 100, 199) if position < length]
    segments = tg.document_segments(bos, length, max_doc_len)
    boundaries = segments.cu_seqlens.tolist()
    used = boundaries[: boundaries.index(length) + 1]
    assert used[0] == 0 and used == sorted(set(used))
    assert set(boundaries[len(used) :]) <= {length}
    assert set(bos) <= set(used)
    lengths = [end - begin for begin, end in zip(used, used[1:], strict=False)]
    assert segments.max_seqlen == max(lengths)
    assert not max_doc_len or max(lengths) <= max_doc_len


def test_unverified_data_are_used_when_asked_for(tg, tmp_path, monkeypatch):
    """Without a manifest the folder is refused, or used and the reason kept for the result."""
    for split in ("train", "val", "val_bytes"):
        write_shard(tmp_path / f"fineweb_{split}_000000.bin", [BOS if split != "val_bytes" else 0, 5, 6])
    monkeypatch.setattr(tg, "load_tokenizer", lambda cfg: None)
    settings = {"data_path": str(tmp_path), "vocab_size": 256}
    with pytest.raises(tg.DataError, match="manifest.json: missing.*ALLOW_UNVERIFIED_DATA=1"):
        tg.check_data(tg.Config(**settings))
    manifest = tg.check_data(tg.Config(**settings, allow_unverified_data=True))
    assert manifest == {"unverified": f"{tmp_path}/manifest.json: missing"}


@pytest.mark.parametrize("key, said, holds", [("tokens", 4, 3), ("bytes", 12, 11)])
def test_split_at_odds_with_the_manifest_is_used_when_asked_for(tg, tmp_path, monkeypatch, key, said, holds):
    """Tokens and original bytes of validation: refused in one way, and used in one way."""
    values = {"train": [BOS, 5, 6], "val": [BOS, 5, 6], "val_bytes": [0, 5, 6]}
    for split, part in values.items():
        write_shard(tmp_path / f"fineweb_{split}_000000.bin", part)
    files = {f"fineweb_{split}_000000.bin": {"tokens": 3} for split in values}
    val = {"tokens": 3, "bytes": 11} | {key: said}
    manifest = {"transform": "lossless_caps_caseops_v1", "files": files, "splits": {"val": val}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(tg, "load_tokenizer", lambda cfg: None)
    cfg = tg.Config(data_path=str(tmp_path), vocab_size=256)
    told = rf"fineweb_val_.*: {holds} {key}, .*manifest.json says {said}"
    with pytest.raises(tg.DataError, match=f"{told}; .*ALLOW_UNVERIFIED_DATA=1 overrides"):
        tg.check_data(cfg)
    asked = dataclasses.replace(cfg, allow_unverified_data=True)
    assert re.search(told, tg.check_data(asked)["unverified"])
    assert tg.load_validation(asked).target_bytes.tolist() == [5, 6]
