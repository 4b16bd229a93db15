"""Data preparation end to end: shards, sidecar, manifest, tokenizer training, every error a user can meet."""

import gzip
import hashlib
import itertools
import json
import lzma
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import PATIENCE

import lossless_caps
import prepare_caseops_data as prepare
from dataprep import demo, reading
from dataprep.checking import check_folder
from dataprep.encoding import OPERATORS, Encoder, tokenise, tokenise_validation, tokenizer_texts
from dataprep.reading import Document
from dataprep.shards import DataFolder

SCRIPT = Path(prepare.__file__)
PUBLISHED = "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
VOCAB = 400

SUBJECTS = [
    "The Fox",
    "NASA",
    "an iPhone",
    "My  Friend McDonald",
    "Pok\u00e9mon \u00c9toile \U0001f600",
    "\tShe",
]
VERBS = ["SAW", "remembered\n\n", "Lost 1234 of", "is near", " (perhaps) Sold "]
OBJECTS = ["the old HOUSE.", "a River\nin Spring. ", "2 USB-C cables!", "GmbH & Co. KG"]
TEXTS = [f"{s} {v} {o}" for s in SUBJECTS for v in VERBS for o in OBJECTS]
VAL_DOCS = 15


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run(*arguments, **settings) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=PATIENCE, **settings)


def make(docs: Path, model: Path, out: Path, *more, val_docs: int = VAL_DOCS) -> dict:
    """Run the program on good input; returns the manifest."""
    result = run("--docs", docs, "--sp", model, "--out", out, "--val-docs", val_docs, *more)
    assert result.returncode == 0, result.stderr
    assert result.stderr == b""
    return json.loads((out / "manifest.json").read_text())


def read_shard(path: Path) -> np.ndarray:
    data = path.read_bytes()
    header = np.frombuffer(data, dtype="<i4", count=256)
    values = np.frombuffer(data, dtype="<u2", offset=1024)
    assert header[:3].tolist() == [20240520, 1, len(values)]
    assert not header[3:].any()
    return values


def read_stream(out: Path, pattern: str) -> np.ndarray:
    return np.concatenate([read_shard(path) for path in sorted(out.glob(pattern))])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def documents(texts: list[str]) -> list[Document]:
    return [prepare.make_document(text, f"text {number}") for number, text in enumerate(texts)]


@pytest.fixture(scope="module")
def docs(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("docs") / "docs.jsonl", TEXTS)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.model"
    path.write_bytes(prepare.train_tokenizer(TEXTS, VOCAB))
    return path


@pytest.fixture(scope="module")
def tokenizer(model):
    return prepare.make_tokenizer("small.model", model.read_bytes(), lossless=True)


@pytest.fixture(scope="module")
def prepared(docs, model, tmp_path_factory) -> Path:
    """Folder of the data set that the program makes of TEXTS."""
    out = tmp_path_factory.mktemp("prepared")
    make(docs, model, out)
    return out


# ---- What is written ---------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_documents(prepared, tokenizer):
    for pattern, texts in (
        ("fineweb_val_0*.bin", TEXTS[:VAL_DOCS]),
        ("fineweb_train_*.bin", TEXTS[VAL_DOCS:]),
    ):
        expected = []
        for text in texts:
            expected += [1, *tokenizer.processor.encode(lossless_caps.encode(text))]
        assert read_stream(prepared, pattern).tolist() == expected


def test_sidecar_charges_every_byte(prepared):
    tokens = read_stream(prepared, "fineweb_val_0*.bin")
    counts = read_stream(prepared, "fineweb_val_bytes_*.bin")
    assert len(tokens) == len(counts)
    starts = np.flatnonzero(tokens == 1)
    assert not counts[starts].any()
    sums = np.add.reduceat(counts.astype(int), starts)
    assert sums.tolist() == [len(text.encode()) for text in TEXTS[:VAL_DOCS]]


def test_manifest(prepared, model):
    manifest = json.loads((prepared / "manifest.json").read_text())
    names = ["fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin", "fineweb_train_000000.bin"]
    assert sorted(contents(prepared)) == sorted([*names, "small.model", "manifest.json"])
    assert manifest["format"] == "parameter-golf-data/1"
    assert manifest["transform"] == "lossless_caps_caseops_v1"
    assert manifest["val_docs"] == VAL_DOCS
    sha256 = hashlib.sha256(model.read_bytes()).hexdigest()
    expected = {"file": "small.model", "sha256": sha256, "vocab_size": VOCAB, "lossless": True}
    assert manifest["tokenizer"] == expected
    assert (prepared / "small.model").read_bytes() == model.read_bytes()
    assert manifest["files"] == {
        name: {
            "tokens": len(read_shard(prepared / name)),
            "sha256": hashlib.sha256((prepared / name).read_bytes()).hexdigest(),
        }
        for name in names
    }
    val = [text.encode() for text in TEXTS[:VAL_DOCS]]
    train = [text.encode() for text in TEXTS[VAL_DOCS:]]
    assert manifest["val_document_sha256"] == [hashlib.sha256(text).hexdigest()[:16] for text in val]
    near = manifest["near_duplicates"]
    assert manifest["bad_documents"] == []

    def operators(pattern: str) -> int:
        return sum(4 <= token <= 7 for token in read_stream(prepared, pattern).tolist())

    assert manifest["splits"] == {
        "train": {
            "documents": len(train),
            "tokens": len(read_stream(prepared, "fineweb_train_*.bin")),
            "bytes": sum(map(len, train)),
            "dropped_duplicates": 0,
            "dropped_space_duplicates": 0,
            "near_duplicates": len(near),
            "dropped_near_duplicates": 0,
            "empty_documents": 0,
            "bad_documents": 0,
            "operator_tokens": operators("fineweb_train_*.bin"),
        },
        "val": {
            "documents": VAL_DOCS,
            "tokens": len(read_stream(prepared, "fineweb_val_0*.bin")),
            "bytes": sum(map(len, val)),
            "uncharged_bytes": 0,
            "round_trip_documents": VAL_DOCS,
            "empty_documents": 0,
            "bad_documents": 0,
            "operator_tokens": operators("fineweb_val_0*.bin"),
        },
    }


def test_plain_data_hold_no_operators(tmp_path):
    """Pieces 4 to 7 of a plain tokenizer are bytes; neither the preparation nor a check counts them."""
    texts = [*TEXTS, "bytes \0 \1 \2 \3"]
    model = prepare.train_tokenizer(texts, VOCAB, plain=True)
    tokenizer = prepare.make_tokenizer("plain.model", model, plain=True)
    manifest = prepare.prepare(documents(texts), tokenizer, tmp_path, VAL_DOCS)
    assert np.isin(read_stream(tmp_path, "fineweb_train_*.bin"), range(4, 8)).any()
    (tmp_path / "manifest.json").unlink()
    for told in (manifest, check_folder(tmp_path, write_manifest=True)[1]):
        assert told["transform"] == "none"
        assert not any(split.get("operator_tokens") for split in told["splits"].values())
        assert [split["operator_share"] for split in told["report"].values()] == [0, 0]


def test_last_line_is_a_summary(docs, model, tmp_path):
    result = run("--docs", docs, "--sp", model, "--out", tmp_path, "--val-docs", VAL_DOCS)
    note, summary = result.stdout.decode().splitlines()
    assert "--val-docs 15 is not the canonical split (50000)" in note
    assert summary.startswith(f"prepared {tmp_path} files:3 train_documents:{len(TEXTS) - VAL_DOCS} ")
    assert f" val_documents:{VAL_DOCS} " in summary


def test_documents_straddle_shards(prepared, tokenizer, tmp_path):
    manifest = prepare.prepare(documents(TEXTS), tokenizer, tmp_path, VAL_DOCS, shard_tokens=100)
    for pattern in ("fineweb_val_0*.bin", "fineweb_val_bytes_*.bin", "fineweb_train_*.bin"):
        sizes = [len(read_shard(path)) for path in sorted(tmp_path.glob(pattern))]
        assert len(sizes) > 2
        assert set(sizes[:-1]) == {100} and 0 < sizes[-1] <= 100
        assert read_stream(tmp_path, pattern).tolist() == read_stream(prepared, pattern).tolist()
    starts = [read_shard(path)[0] for path in tmp_path.glob("fineweb_train_*.bin")]
    assert any(token != 1 for token in starts)
    assert set(manifest["files"]) == {path.name for path in tmp_path.glob("*.bin")}


def test_stream_that_fills_its_shards_exactly(prepared, tokenizer, tmp_path):
    size = len(read_stream(prepared, "fineweb_train_*.bin"))
    prepare.prepare(documents(TEXTS), tokenizer, tmp_path, VAL_DOCS, shard_tokens=size)
    assert len(list(tmp_path.glob("fineweb_train_*.bin"))) == 1


def test_duplicates_and_empty_documents(model, tmp_path):
    texts = ["First Doc", "", "Second Doc", "Train One", "Second Doc", "", "First Doc", "Train one"]
    manifest = make(write_jsonl(tmp_path / "d.jsonl", texts), model, tmp_path / "out", val_docs=3)
    train, val = manifest["splits"]["train"], manifest["splits"]["val"]
    assert (val["documents"], val["empty_documents"]) == (2, 1)
    assert (train["documents"], train["dropped_duplicates"], train["empty_documents"]) == (2, 2, 1)
    assert train["bytes"] == len("Train One" + "Train one")
    assert len(manifest["val_document_sha256"]) == 2
    assert (read_stream(tmp_path / "out", "fineweb_train_*.bin") == 1).sum() == 2


def test_bare_strings_and_blank_lines(prepared, model, tmp_path):
    lines = [json.dumps(text, ensure_ascii=False) for text in TEXTS]
    (tmp_path / "d.jsonl").write_text("\n  \n".join(lines) + "\n\n", encoding="utf-8")
    make(tmp_path / "d.jsonl", model, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(prepared)


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".xz", lzma.compress),
        (".gz", gzip.compress),
        (".zst", zstandard.compress),
        (".zst", lambda data: zstandard.compress(data[:777]) + zstandard.compress(data[777:])),
    ],
    ids=["xz", "gz", "zst", "zst-frames"],
)
def test_compressed_input(docs, prepared, model, tmp_path, suffix, compress):
    packed = tmp_path / f"docs.jsonl{suffix}"
    packed.write_bytes(compress(docs.read_bytes()))
    make(packed, model, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(prepared)


def packed_lines(path: Path, data: bytes) -> list[bytes]:
    path.write_bytes(data)
    return [line for block in reading.Reader([str(path)]) for line in block.lines]


PACK = {
    "xz": lzma.compress,
    "gz": gzip.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


@pytest.mark.parametrize("chunk", [1, 7, 1 << 15])
@pytest.mark.parametrize(
    ("suffix", "zeros"),
    [("xz", 0), ("xz", 4), ("xz", 40_000), ("gz", 0), ("gz", 3), ("gz", 40_000), ("zst", 0)],
)
def test_every_stream_of_a_compressed_file_is_read(tmp_path, monkeypatch, suffix, zeros, chunk):
    """Lines run on across streams; zeros may stand behind each."""
    monkeypatch.setattr(reading, "READ_BYTES", chunk)
    parts = [b'"a"\n"b', b"", b'c"\n', b'"d"\n"e"']
    packed = b"".join(PACK[suffix](part) + bytes(zeros) for part in parts)
    assert packed_lines(tmp_path / f"d.{suffix}", packed) == [b'"a"\n', b'"bc"\n', b'"d"\n', b'"e"']


DAMAGE = {
    "header": lambda stream: b"?" + stream[1:],
    "middle": lambda stream: stream[:-20] + bytes([stream[-20] ^ 0x55]) + stream[-19:],
    "cut": lambda stream: stream[:-3],
    "rubbish": lambda stream: stream + b"rubbish",
    "one byte": lambda stream: stream + b"\x01",
    "zeros": lambda stream: stream + bytes(3),
}


@pytest.mark.parametrize(
    ("suffix", "damage"), [pair for pair in itertools.product(PACK, DAMAGE) if pair != ("gz", "zeros")]
)
def test_damage_behind_the_first_stream_is_no_end(tmp_path, suffix, damage):
    """Half of the documents must not be taken for all."""
    first, second = (PACK[suffix](b"".join(b'"%d"\n' % n for n in range(k, k + 90))) for k in (100, 200))
    for packed in (first + DAMAGE[damage](second), first + DAMAGE[damage](second) + first):
        with pytest.raises(prepare.DataError, match=rf"d\.{suffix} after line \d+: cannot be read: "):
            packed_lines(tmp_path / f"d.{suffix}", packed)


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_file_without_a_stream(tmp_path, suffix):
    with pytest.raises(prepare.DataError, match=rf"d\.{suffix}: cannot be read: "):
        packed_lines(tmp_path / f"d.{suffix}", b"")
    assert packed_lines(tmp_path / f"d.{suffix}", PACK[suffix](b"")) == []


def test_reason_of_several_lines_is_told_in_one(tmp_path, monkeypatch):
    """Arrow's, for one."""

    def broken(file):
        raise OSError("Invalid data\n  in a page.\n")

    monkeypatch.setitem(reading._OPENERS, ".xz", broken)
    with pytest.raises(prepare.DataError) as refused:
        packed_lines(tmp_path / "d.xz", b"")
    assert str(refused.value) == f"{tmp_path}/d.xz: cannot be read: Invalid data in a page."


def test_standard_input(docs, prepared, model, tmp_path):
    result = run("--docs", "-", "--sp", model, "--out", tmp_path, "--val-docs", 15, input=docs.read_bytes())
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path) == contents(prepared)


def test_tokenizer_that_normalises(tokenizer_dir, tmp_path):
    """Bytes that the published tokenizer charges to no token are reported, and that it is not lossless."""
    texts = ["  Two spaces before and one after ", "No loss here", "Two\nLines", "For training"]
    docs = write_jsonl(tmp_path / "d.jsonl", texts)
    manifest = make(docs, tokenizer_dir / PUBLISHED, tmp_path / "out", val_docs=3)
    val = manifest["splits"]["val"]
    assert val["uncharged_bytes"] == 3
    assert val["bytes"] + val["uncharged_bytes"] == sum(len(text.encode()) for text in texts[:3])
    assert val["bytes"] == read_stream(tmp_path / "out", "fineweb_val_bytes_*.bin").sum()
    assert val["round_trip_documents"] == 1
    assert manifest["tokenizer"]["lossless"] is False


# ---- Trained tokenizers ------------------------------------------------------------------------------------


def test_layout_of_a_trained_tokenizer(tokenizer):
    processor = tokenizer.processor
    assert processor.get_piece_size() == VOCAB
    first = [processor.id_to_piece(token) for token in range(8)]
    assert first == ["<pad>", "<s>", "</s>", "<unk>", "\ue001", "\ue002", "\ue003", "\ue004"]
    assert [processor.is_byte(token) for token in range(7, 265)] == [False] + [True] * 256 + [False]
    pieces = [processor.id_to_piece(token) for token in range(VOCAB)]
    assert "\u2581" in pieces
    assert [piece for piece in pieces[8:] if set(piece) & set("\ue001\ue002\ue003\ue004")] == []
    digits = [piece for piece in pieces[264:] if any(map(str.isdigit, piece))]
    assert all(len(piece) == 1 for piece in digits)


@settings(max_examples=300)
@given(st.text(st.sampled_from("aAB \n\t\r\0\ue001\ue004\u2585\u3000<s>") | st.characters(codec="utf-8")))
def test_trained_tokenizer_gives_every_text_back(tokenizer, text):
    document = prepare.make_document(text.replace("\u2581", ""), "text")
    tokens, counts, round_trip = tokenise_validation(Encoder(tokenizer), document)
    assert round_trip
    assert lossless_caps.decode(tokenizer.processor.decode(tokens[1:].tolist())) == document.text
    assert counts.sum() == document.size


def test_training_a_tokenizer_is_deterministic_and_sees_no_validation_text(docs, tmp_path):
    outs = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    other = write_jsonl(
        tmp_path / "other.jsonl", ["zzz QQQ " * 50] * VAL_DOCS + TEXTS[VAL_DOCS:] + ["zzz QQQ " * 50]
    )
    for path, out in zip([docs, docs, other], outs, strict=True):
        result = run("--docs", path, "--train-tokenizer", VOCAB, "--out", out, "--val-docs", VAL_DOCS)
        assert result.returncode == 0, result.stderr
        assert result.stderr == b""
    assert contents(outs[0]) == contents(outs[1])
    assert (outs[2] / "tokenizer.model").read_bytes() == (outs[0] / "tokenizer.model").read_bytes()
    assert json.loads((outs[0] / "manifest.json").read_text())["tokenizer"]["lossless"] is True


def test_a_tokenizer_learns_from_texts_with_sentencepieces_own_mark():
    """SentencePiece skips a sentence that holds U+2585; the text around it counts as if it stood alone."""
    around, rest = ["qzj qzj qzjv", " wxk wxk wxkq"], TEXTS[:20]
    learnt = prepare.train_tokenizer(["\u2585".join(around), *rest], 350)
    assert learnt == prepare.train_tokenizer([*around, *rest], 350)
    assert learnt != prepare.train_tokenizer(rest, 350)


@pytest.mark.parametrize(
    "reason", [prepare.DataError("d.jsonl line 9: not JSON"), KeyboardInterrupt()], ids=repr
)
@pytest.mark.parametrize("before", [0, 1, 30])
def test_what_ends_the_texts_of_a_tokenizer_goes_through(reason, before):
    """SentencePiece would word it in several lines, and take Ctrl-C for a mistake."""

    def texts():
        yield from TEXTS[:before]
        raise reason

    with pytest.raises(type(reason)) as ended:
        prepare.train_tokenizer(texts(), VOCAB)
    assert ended.value is reason


def test_texts_that_a_tokenizer_does_not_learn_from_are_named(docs, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "TOKENIZER_TRAINING_BYTES", sum(len(text.encode()) for text in TEXTS[2:5]))
    blocks = reading.Reader([str(docs)])
    assert list(prepare.training_texts(blocks, 2, 0)) == TEXTS[2:5]
    line = f"here 3 documents; {docs} line 6 and all that follows is left out\n"
    assert capsys.readouterr().out.endswith(line)
    monkeypatch.undo()
    assert list(prepare.training_texts(blocks, 2, 0)) == TEXTS[2:]
    assert capsys.readouterr().out == ""


def test_tokenizer_texts_stop_at_the_limit():
    training = documents(["1234", "v a l", "123456", "7"])
    held_out = {document.key for document in documents(["val"])}
    assert list(tokenizer_texts(iter(training), held_out, 10)) == ["1234", "123456"]


# ---- The output folder -------------------------------------------------------------------------------------


def test_same_data_again_is_no_error(docs, prepared, model):
    before = contents(prepared)
    make(docs, model, prepared)
    assert contents(prepared) == before


def test_other_data_is_refused_then_overwritten(docs, model, tokenizer, tmp_path):
    out = tmp_path / "out"
    prepare.prepare(documents(TEXTS), tokenizer, out, VAL_DOCS, shard_tokens=100)
    before = contents(out)
    result = run("--docs", docs, "--sp", model, "--out", out, "--val-docs", VAL_DOCS)
    assert_refused(result, "is of another data set", "--overwrite")
    assert contents(out) == before
    make(docs, model, out, "--overwrite")
    assert sorted(path.name for path in out.glob("*.bin")) == [
        "fineweb_train_000000.bin",
        "fineweb_val_000000.bin",
        "fineweb_val_bytes_000000.bin",
    ]


def test_shards_beyond_the_new_ones_are_refused(tokenizer, tmp_path):
    """All new shards are there already, but the folder holds more: its manifest must not be replaced."""
    fewer = TEXTS[: VAL_DOCS + 20]
    size = len(tokenise(tokenizer.processor, fewer[VAL_DOCS:]))
    prepare.prepare(documents(TEXTS), tokenizer, tmp_path, VAL_DOCS, shard_tokens=size)
    before = contents(tmp_path)
    with pytest.raises(prepare.DataError, match="fineweb_train_000001.bin: is of another data set"):
        prepare.prepare(documents(fewer), tokenizer, tmp_path, VAL_DOCS, shard_tokens=size)
    assert contents(tmp_path) == before


def test_unknown_shards_are_refused(docs, model, tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"precious")
    result = run("--docs", docs, "--sp", model, "--out", tmp_path, "--val-docs", VAL_DOCS)
    assert_refused(result, "weights.bin", "is no file of a data set")
    result = run("--docs", docs, "--sp", model, "--out", tmp_path, "--val-docs", VAL_DOCS, "--overwrite")
    assert_refused(result, "weights.bin", "is no file of a data set")
    assert contents(tmp_path) == {"weights.bin": b"precious"}


def test_other_tokenizer_is_not_replaced(docs, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"precious")
    result = run("--docs", docs, "--train-tokenizer", VOCAB, "--out", tmp_path, "--val-docs", VAL_DOCS)
    assert_refused(result, "tokenizer.model", "--overwrite")
    assert contents(tmp_path) == {"tokenizer.model": b"precious"}


@pytest.mark.parametrize("interruption", [prepare.DataError("bad line"), KeyboardInterrupt()], ids=repr)
def test_a_run_that_ends_early_leaves_nothing_or_whole_shards(tokenizer, tmp_path, monkeypatch, interruption):
    """No whole training shard: nothing is left. Else the shards stay, and the same job goes on after them."""
    expected = prepare.prepare(documents(TEXTS), tokenizer, tmp_path / "whole", VAL_DOCS, shard_tokens=300)
    publish, out = DataFolder.publish, tmp_path / "out"
    for fatal in ("fineweb_train_000000.bin", "fineweb_train_000003.bin"):

        def broken(self, name, *data, fatal=fatal):
            if name == fatal:
                raise interruption
            publish(self, name, *data)

        monkeypatch.setattr(reading, "BLOCK_BYTES", 100)
        monkeypatch.setattr(DataFolder, "publish", broken)
        with pytest.raises(type(interruption)):
            prepare.prepare(documents(TEXTS), tokenizer, out, VAL_DOCS, shard_tokens=300)
        if fatal == "fineweb_train_000000.bin":
            assert not out.exists()
    assert len(list(out.glob("fineweb_train_*.bin"))) == 3 and (out / ".unfinished.json").exists()
    with pytest.raises(prepare.DataError, match="unfinished data set with --shard-tokens 300, not 301"):
        prepare.prepare(documents(TEXTS), tokenizer, out, VAL_DOCS, shard_tokens=301)
    with pytest.raises(prepare.DataError, match="unfinished data set of other documents"):
        prepare.prepare(documents(TEXTS[::-1]), tokenizer, out, VAL_DOCS, shard_tokens=300)
    monkeypatch.setattr(DataFolder, "publish", publish)
    assert prepare.prepare(documents(TEXTS), tokenizer, out, VAL_DOCS, shard_tokens=300) == expected
    assert contents(out) == contents(tmp_path / "whole")


# ---- Errors ------------------------------------------------------------------------------------------------


def assert_refused(result: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2 and one line on stderr that holds every one of `words`."""
    error = result.stderr.decode()
    assert result.returncode == 2, error
    assert error.startswith("prepare_caseops_data.py: error: ")
    assert error.count("\n") == 1 and error.endswith("\n")
    for word in words:
        assert word in error


GOOD = b'{"text": "Good"}\n'

BAD_LINES = {
    "broken JSON": (b'{"text": "cut', ["line 3", "not JSON"]),
    "other JSON": (b"[1, 2]", ["line 3", "the text is of type list"]),
    "no text": (b'{"body": "x"}', ["line 3", "no text"]),
    "null": (b'{"text": null}', ["line 3", "no text"]),
    "number": (b'{"text": 7}', ["line 3", "the text is of type int"]),
    "surrogate": (b'{"text": "a\\ud800"}', ["line 3", "lone surrogate U+D800 at character 1"]),
    "encoding": (b'{"text": "\xff"}', ["line 3", "not UTF-8 (byte 0xff at 10)"]),
    "nesting": (b"[" * 100_000, ["line 3", "not JSON"]),
}


@pytest.mark.parametrize("val_docs", [1, 3], ids=["in-training", "in-validation"])
@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_line(model, tmp_path, kind, val_docs):
    line, words = BAD_LINES[kind]
    docs = tmp_path / "bad.jsonl"
    docs.write_bytes(GOOD + GOOD + line + b"\n" + GOOD)
    out = tmp_path / "out"
    assert_refused(
        run("--docs", docs, "--sp", model, "--out", out, "--val-docs", val_docs), str(docs), *words
    )
    assert not out.exists() or contents(out) == {}


@pytest.mark.parametrize("suffix", ["xz", "gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_damaged_archive(docs, model, tmp_path, suffix, damage):
    compress = {"xz": lzma.compress, "gz": gzip.compress, "zst": zstandard.compress}[suffix]
    data = compress(docs.read_bytes())
    packed = tmp_path / f"docs.jsonl.{suffix}"
    packed.write_bytes(data[:-20] if damage == "cut" else b"not an archive")
    result = run("--docs", packed, "--sp", model, "--out", tmp_path / "out", "--val-docs", VAL_DOCS)
    assert_refused(result, str(packed), "cannot be read")
    assert not (tmp_path / "out").exists() or contents(tmp_path / "out") == {}


def test_too_few_documents(docs, model, tmp_path):
    for val_docs in (len(TEXTS), 50_000):
        result = run("--docs", docs, "--sp", model, "--out", tmp_path / "out", "--val-docs", val_docs)
        assert_refused(result, f"--val-docs {val_docs}", f"the input has {len(TEXTS)}")
    assert not (tmp_path / "out").exists()


def test_no_training_document_left(model, tmp_path):
    docs = write_jsonl(tmp_path / "d.jsonl", ["Same", "Same", ""])
    result = run("--docs", docs, "--sp", model, "--out", tmp_path / "out", "--val-docs", 1)
    assert_refused(result, "nothing to train on")
    result = run("--docs", docs, "--train-tokenizer", VOCAB, "--out", tmp_path / "out", "--val-docs", 1)
    assert_refused(result, f"--train-tokenizer {VOCAB}", "no training text")
    assert not (tmp_path / "out").exists()


def test_no_validation_document_left(model, tmp_path):
    docs = write_jsonl(tmp_path / "d.jsonl", ["", "", "For training"])
    result = run("--docs", docs, "--sp", model, "--out", tmp_path / "out", "--val-docs", 2)
    assert_refused(result, "--val-docs 2", "empty")
    assert not (tmp_path / "out").exists()


def test_missing_files(docs, model, tmp_path):
    out = tmp_path / "out"
    missing = tmp_path / "missing"
    assert_refused(run("--docs", missing, "--sp", model, "--out", out), str(missing), "No such file")
    assert_refused(run("--docs", docs, "--sp", missing, "--out", out), str(missing), "No such file")
    assert_refused(run("--docs", tmp_path, "--sp", model, "--out", out), str(tmp_path), "directory")
    assert_refused(run("--docs", docs, "--sp", tmp_path, "--out", out), str(tmp_path), "directory")
    result = run("--docs", docs, "--sp", model, "--out", docs, "--val-docs", VAL_DOCS)
    assert_refused(result, str(docs), "exists")
    assert not out.exists()


def train_plain(path: Path, texts: list[str] = TEXTS, **settings) -> None:
    """Write a small SentencePiece model that differs from ours by `settings`."""
    base = {"vocab_size": 330, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    base |= {
        "user_defined_symbols": list(OPERATORS),
        "pad_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "unk_id": 3,
    }
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, **(base | settings)
        )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"user_defined_symbols": []}, ["not a CaseOps tokenizer", "U+E001 is not token 4"]),
        ({"user_defined_symbols": list(OPERATORS[::-1])}, ["U+E001 is not token 4"]),
        ({"bos_id": 2, "eos_id": 1}, ["its BOS is 2", "needs 1"]),
        (
            {"texts": ["abcdefgh" * 9], "vocab_size": 275, "add_dummy_prefix": False},
            ["no piece for a bare space"],
        ),
    ],
    ids=["no-operators", "other-order", "bos", "space"],
)
def test_wrong_tokenizer(docs, tmp_path, settings, words):
    path = tmp_path / "wrong.model"
    train_plain(path, **settings)
    result = run("--docs", docs, "--sp", path, "--out", tmp_path / "out", "--val-docs", VAL_DOCS)
    assert_refused(result, str(path), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", [b"", b"no model" * 100, b"\0"], ids=["empty", "text", "zero"])
def test_tokenizer_that_is_no_model(docs, tmp_path, data):
    path = tmp_path / "wrong.model"
    path.write_bytes(data)
    result = run("--docs", docs, "--sp", path, "--out", tmp_path / "out", "--val-docs", VAL_DOCS)
    assert_refused(result, str(path), "not a SentencePiece model")


@pytest.mark.parametrize(("vocab", "words"), [(300, ["must be at least"]), (60_000, ["too high"])])
def test_vocabulary_that_does_not_suit_the_text(docs, tmp_path, vocab, words):
    out = tmp_path / "out"
    result = run("--docs", docs, "--train-tokenizer", vocab, "--out", out, "--val-docs", VAL_DOCS)
    assert_refused(result, f"--train-tokenizer {vocab}", *words)
    assert not out.exists()


def test_token_with_too_many_bytes(tokenizer_dir, tmp_path):
    """The published tokenizer makes one token of any run of white space."""
    texts = ["Good", "Space" + " " * 65_535 + "Man", "Too much" + " " * 65_536 + "Space", "For training"]
    docs = write_jsonl(tmp_path / "d.jsonl", texts)
    result = run(
        "--docs", docs, "--sp", tokenizer_dir / PUBLISHED, "--out", tmp_path / "out", "--val-docs", 3
    )
    assert_refused(result, f"{docs} line 3", "65536 bytes", "65535")
    assert not (tmp_path / "out").exists()


def test_text_that_a_trained_tokenizer_cannot_give_back(tmp_path):
    docs = write_jsonl(tmp_path / "d.jsonl", ["Good", "Bad \u2581 bar", *TEXTS])
    result = run("--docs", docs, "--train-tokenizer", VOCAB, "--out", tmp_path / "out", "--val-docs", 2)
    assert_refused(result, f"{docs} line 2", "U+2581")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--docs FILE and --out DIR are required"]),
        (["--docs", "d.jsonl"], ["--docs FILE and --out DIR are required"]),
        (["--docs", "d.jsonl", "--out", "o"], ["--sp MODEL or --train-tokenizer VOCAB"]),
        (["--docs", "d", "--out", "o", "--sp", "m", "--train-tokenizer", "512"], ["not allowed with"]),
        (["--demo", "--docs", "d.jsonl"], ["--docs", "not allowed with --demo"]),
        (["--demo", "--sp", "m"], ["--sp", "not allowed with"]),
        (
            ["--docs", "-", "--out", "o", "--train-tokenizer", "512"],
            ["--docs -", "reads the documents twice"],
        ),
        (["--docs", "d", "--out", "o", "--train-tokenizer", "65537"], ["65537", "at most 65536"]),
        (["--docs", "d", "--out", "o", "--sp", "m", "--val-docs", "0"], ["--val-docs", "'0'", "at least 1"]),
        (["--demo", "--val-docs", "many"], ["--val-docs", "'many'", "whole number"]),
        (["--demo", "--shards", "3"], ["--shards: only with --download"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_command_line(tmp_path, arguments, words):
    assert_refused(run(*arguments, cwd=tmp_path), *words)
    assert contents(tmp_path) == {}


# ---- Demo --------------------------------------------------------------------------------------------------


def test_demo_is_made_of_real_text_and_reproducible(tmp_path):
    first = run("--demo", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stderr == b""
    second = run("--demo", "--out", tmp_path / "again", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    made = tmp_path / "data/demo"
    assert contents(made) == contents(tmp_path / "again")
    manifest = json.loads((made / "manifest.json").read_text())
    train, val = manifest["splits"]["train"], manifest["splits"]["val"]
    assert manifest["tokenizer"]["vocab_size"] == 1024
    assert manifest["tokenizer"]["lossless"] is True
    assert 1_500_000 < train["bytes"] < 4_000_000
    assert val["documents"] == demo.DEMO_VAL_DOCS
    assert val["uncharged_bytes"] == 0
    assert 80_000 < val["bytes"] < 160_000
    processor = sentencepiece.SentencePieceProcessor(model_file=str(made / "tokenizer.model"))
    tokens = read_stream(made, "fineweb_val_0*.bin")
    documents = np.split(tokens, np.flatnonzero(tokens == 1)[1:])
    texts = [lossless_caps.decode(processor.decode(document.tolist())) for document in documents]
    assert texts == [document.text for document in demo.demo_documents()[: demo.DEMO_VAL_DOCS]]
    log = json.loads((SCRIPT.parent / "logs/demo_seed42_cpu.json").read_text())  # of a run on these data
    assert (
        hashlib.sha256((made / "manifest.json").read_bytes()).hexdigest() == log["environment"]["data_sha256"]
    )


def test_demo_documents_are_the_same_under_every_python():
    """They are a file's; Python's own documentation differs from one version to the next."""
    texts = demo.demo_documents()
    digest = hashlib.sha256("".join(f"{document.origin} {document.text}" for document in texts).encode())
    assert (len(texts), digest.hexdigest()[:16]) == (500, "65e3693e3eea53a6")
