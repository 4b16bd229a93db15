"""Faults that users of other data readers met: leaks, two at once, odd texts, pipes, endings, odd names."""

import gzip
import json
import lzma
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import zstandard
from test_data_prep import change, contents, plain_model, sentences, write_jsonl, write_parquet

import prepare_caseops_data as prepare
from dataprep import encoding, reading, shards, sidecar
from dataprep.checking import check_folder
from dataprep.shards import BusyError, DataError, locked, read_shard, shard_bytes
from systems.layout import file_sha256

VAL, SIZES, TRAIN = (f"fineweb_{split}_000000.bin" for split in ("val", "val_bytes", "train"))


@pytest.fixture(scope="module")
def folding() -> encoding.Tokenizer:
    """One that normalises as the published one does: NFKC, white space joined."""
    return plain_model(add_dummy_prefix=False)


@pytest.fixture
def model(folding, tmp_path) -> Path:
    path = tmp_path / "folding.model"
    path.write_bytes(folding.model)
    return path


def made(texts: list[str], tokenizer: encoding.Tokenizer, out: Path, val_docs: int, **how) -> dict:
    stream = [prepare.make_document(text, f"text {n}") for n, text in enumerate(texts)]
    return prepare.prepare(stream, tokenizer, out, val_docs, **how)


def told_by(capsys, *arguments: object) -> tuple[int, str]:
    """Exit code and standard error of the command line, in this process."""
    capsys.readouterr()
    try:
        code = prepare.main([*map(str, arguments)])
    except SystemExit as left:
        code = left.code
    return code, capsys.readouterr().err


def lengthening(folder: Path, rule: str) -> encoding.Tokenizer:
    """A tokenizer of plain text that rewrites it by a rule: code points, a tab, code points, in hex."""
    path = folder / "rule.tsv"
    path.write_text(f"{rule}\n")
    spaces = {"add_dummy_prefix": False, "remove_extra_whitespaces": False}
    return plain_model(normalization_rule_tsv=str(path), **spaces)._replace(plain=True)


# ---- Leaks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held_out", "trained"),
    [
        ("The o\ufb03ce is closed.", "The office is closed."),
        ("good \uff4e\uff45\uff57\uff53", "good news"),
        ("any\u200bone there", "any one there"),
        ("\u200b", "\u3000\u200b\u200b"),  # BOS alone
    ],
    ids=["ligature", "full-width", "zero-width", "nothing"],
)
def test_data_leak_through_the_tokenizer(folding, tmp_path, held_out, trained):
    """Other texts with a validation document's tokens are dropped: the check of the folder finds none."""
    texts = ["Something to score", held_out, "For training", trained, "More of it", held_out]
    counts = made(texts, folding, tmp_path / "out", 2)["splits"]["train"]
    assert (counts["dropped_token_duplicates"], counts["dropped_duplicates"], counts["documents"]) == (
        1,
        1,
        2,
    )
    assert check_folder(tmp_path / "out")[0] == []


def test_data_leak_counts_of_other_data_are_not_in_the_manifest(folding, tmp_path):
    """Manifests without such leaks are those of before, byte for byte: the demo's hash stands in logs."""
    assert "dropped_token_duplicates" not in made(sentences(9), folding, tmp_path, 3)["splits"]["train"]


# ---- Two at once ------------------------------------------------------------------------------------------


def test_data_folder_lock_lets_one_in(folding, tmp_path, capsys):
    out = tmp_path / "made/out"
    made(sentences(9), folding, out, 3)
    before = contents(out)
    docs, path = write_jsonl(tmp_path / "d.jsonl", sentences(9, seed=1)), tmp_path / "t.model"
    path.write_bytes(folding.model)
    (out / ".unfinished.json").write_text("{}")
    with locked(out):
        code, err = told_by(
            capsys, "--docs", docs, "--sp", path, "--out", out, "--val-docs", 3, "--overwrite"
        )
        told = f"{out}: another process writes there; wait, or choose another --out"
        assert (code, err) == (2, f"prepare_caseops_data.py: error: {told}\n")
        (out / ".unfinished.json").unlink()
        with pytest.raises(BusyError):
            check_folder(out, write_manifest=True)
        assert check_folder(out)[0] == [] and contents(out) == before
    check_folder(out, write_manifest=True)


def test_data_folder_lock_is_not_its_workers(tmp_path):
    """Else it would outlast a preparation that was killed, until the last worker has learnt of it."""
    with locked(tmp_path):
        (descriptor,) = shards._LOCKS
        child = os.fork()
        if not child:
            try:
                os.fstat(descriptor)
            except OSError:
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        os.fstat(descriptor)


def test_data_folder_lock_leaves_no_empty_folders(tmp_path):
    with pytest.raises(DataError), locked(tmp_path / "a/b"):
        raise DataError("refused")
    with locked(tmp_path / "c/d"):
        (tmp_path / "c/note").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["c", "note"]


# ---- Odd texts --------------------------------------------------------------------------------------------


def test_data_check_of_letters_that_are_not_ascii(folding, tmp_path):
    """They carry more bytes than the letters of their pieces: that is right, with a manifest or without."""
    wide = "".join(chr(ord(letter) + 0xFEE0) for letter in "news")
    made([f"{wide} {n}" for n in range(60)], folding, tmp_path / "wide", 50)
    made([f"e\ufb03cient o\ufb03ce {n}" for n in range(60)], folding, tmp_path / "ligatures", 50)
    assert check_folder(tmp_path / "wide")[0] == check_folder(tmp_path / "ligatures")[0] == []
    (tmp_path / "wide/manifest.json").unlink()
    assert check_folder(tmp_path / "wide", write_manifest=True)[0] == []
    beside = tmp_path / "ligatures/fineweb_val_bytes_000000.bin"
    beside.write_bytes(shard_bytes(np.roll(read_shard(beside), 1)))
    assert "the sidecar is not that of these tokens" in "\n".join(check_folder(tmp_path / "ligatures")[0])


def retold(folder: Path, name: str, values: np.ndarray) -> None:
    """Another shard, and a manifest that tells of it, as one who knows the checks would write it."""
    (folder / name).write_bytes(shard_bytes(values))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"tokens": len(values), "sha256": file_sha256(folder / name)}
    for split in ("train", "val"):
        tokens = read_shard(folder / f"fineweb_{split}_000000.bin")
        manifest["splits"][split] |= {"tokens": len(tokens), "documents": int((tokens == 1).sum())}
    manifest["splits"]["val"]["bytes"] = int(read_shard(folder / SIZES).sum())
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def small() -> encoding.Tokenizer:
    """A lossless one, of few pieces: many characters are bytes."""
    texts = [text.replace("\u2581", "") for text in sentences(50)]
    return encoding.make_tokenizer("small.model", encoding.train_tokenizer(texts, 400), lossless=True)


def test_data_check_of_every_byte_where_the_tokenizer_loses_nothing(small, tmp_path):
    """One byte more for one full stop of all; literal operators and characters of several bytes are right."""
    texts = [text.replace("\u2581", "") + " \ue001\ue004\ue003x." for text in sentences(60)]
    made(texts, small, tmp_path / "set", 50)
    assert check_folder(tmp_path / "set")[0] == []
    tokens, values = (np.array(read_shard(tmp_path / "set" / name)) for name in (VAL, SIZES))
    stops = np.flatnonzero(tokens == small.processor.piece_to_id("."))
    place = stops[stops > np.flatnonzero(tokens == 1)[7]][0]
    values[place] += 1
    retold(tmp_path / "set", SIZES, values)
    (problem,) = check_folder(tmp_path / "set")[0]
    said = (
        f"1 of {(tokens != 1).sum()} tokens carry other bytes than their pieces hold, the first in validation"
    )
    assert f"{said} document 7" in problem


def test_data_check_of_parts_of_the_stream(small, tmp_path, monkeypatch):
    """However it is cut, the same is found."""
    texts = [text.replace("\u2581", "") for text in sentences(30)]
    made(texts, small, tmp_path / "set", 20)
    tokens, values = (np.array(read_shard(tmp_path / "set" / name)) for name in (VAL, SIZES))
    values[np.flatnonzero(tokens == 1)[12] + 5] += 1
    pieces = sidecar.pieces_of(small.processor)
    whole = sidecar.odd_tokens(tokens, values, pieces, True)
    monkeypatch.setattr(sidecar, "CHUNK_TOKENS", 300)
    assert whole == sidecar.odd_tokens(tokens, values, pieces, True) and (whole.wrong, whole.first) == (1, 12)


def test_data_check_of_spaces_counted_twice(folding, tmp_path):
    """Also where a tokenizer normalises, so that some spaces do stand for more; of a set of nobody's."""
    made([f"{text} and so on" for text in sentences(60)], folding, tmp_path / "set", 50)
    (tmp_path / "set/manifest.json").unlink()
    tokens, values = (np.array(read_shard(tmp_path / "set" / name)) for name in (VAL, SIZES))
    spaced = sidecar.pieces_of(folding.processor).spaced[tokens]
    (tmp_path / "set" / SIZES).write_bytes(shard_bytes(values + spaced))
    found = "\n".join(check_folder(tmp_path / "set", write_manifest=True)[0])
    assert "pieces that begin with a space carry more than that" in found


def test_data_check_of_documents_that_are_nearly_held_out(small, tmp_path):
    """With a word changed here and there: more than the manifest tells of, or of too many documents."""
    texts = [text.replace("\u2581", "") for text in sentences(40)]
    manifest = made(texts, small, tmp_path / "set", 20)
    assert manifest["splits"]["train"]["near_duplicates"] == 0 and check_folder(tmp_path / "set")[0] == []
    val, train = (np.array(read_shard(tmp_path / "set" / name)) for name in (VAL, TRAIN))
    changed = np.where((np.arange(len(val)) % 40 == 39) & (val != 1), 300, val)
    second = np.flatnonzero(val == 1)[1]
    for leaked, count in ((changed[:second], "1"), (changed, "1[0-9]")):
        retold(tmp_path / "set", TRAIN, np.concatenate([train, leaked]))
        (problem,) = check_folder(tmp_path / "set")[0]
        said = f": {count} training documents are near validation documents, the manifest says 0"
        assert re.search(said, problem) and "--drop-near-duplicates" in problem
    manifest = json.loads((tmp_path / "set/manifest.json").read_text())
    del manifest["splits"]["train"]["near_duplicates"]
    (tmp_path / "set/manifest.json").write_text(json.dumps(manifest))
    (problem,) = check_folder(tmp_path / "set")[0]
    assert re.search("training documents hold the half of 1[0-9] of 20 validation documents", problem)


Unfit = tuple[str, encoding.Tokenizer, str]


def unfit(kind: str, folding: encoding.Tokenizer, small: encoding.Tokenizer) -> Unfit:
    """A text that shards cannot hold or a tokenizer not give back, such a tokenizer, what is said of it."""
    if kind == "long token":
        return "a" + " " * 70_000 + "b", folding, "one token carries 70001 bytes"
    return "x \u2581 y", small, "it holds U+2581"


@pytest.mark.parametrize("kind", ["long token", "U+2581"])
def test_data_of_unfit_validation_documents_count_as_bad(folding, small, tmp_path, monkeypatch, kind):
    """Also where the preparation goes on after an interruption: what is skipped is held out nowhere."""
    text, tokenizer, words = unfit(kind, folding, small)
    good = [document.replace("\u2581", "") for document in sentences(40)]
    texts = [*good[:3], text, *good[3:20], text, *good[20:]]
    with pytest.raises(DataError, match=rf"text 3: .*{words.replace('+', '.')}.*more than --max-bad 0"):
        made(texts, tokenizer, tmp_path / "refused", 6)
    manifest = made(texts, tokenizer, tmp_path / "whole", 6, max_bad=1, shard_tokens=500)
    val, train = manifest["splits"]["val"], manifest["splits"]["train"]
    assert (val["documents"], val["bad_documents"], train["documents"]) == (5, 1, 36)
    assert len(manifest["bad_documents"]) == 1 and len(manifest["val_document_sha256"]) == 5

    monkeypatch.setattr(reading, "BLOCK_BYTES", 2000)
    remember, calls = shards.DataFolder.remember, []

    def interrupted(self, state):
        remember(self, state)
        calls.append(state.get("blocks", 0))
        if calls[-1] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(shards.DataFolder, "remember", interrupted)
    for _ in range(2):
        try:
            made(texts, tokenizer, tmp_path / "resumed", 6, max_bad=1, shard_tokens=500)
        except KeyboardInterrupt:
            continue
    assert 2 in calls and contents(tmp_path / "resumed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("plain", [False, True])
def test_data_of_white_space_alone_cannot_be_scored(folding, tmp_path, plain):
    tokenizer = folding._replace(plain=plain)
    with pytest.raises(DataError, match=r"--val-docs 2: .* no bytes to score"):
        made(["\u00a0", "\u200b", *sentences(3)], tokenizer, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()
    made(["a", "b", *sentences(3)], folding, tmp_path / "out", 2)
    for place in (1, 3):
        change(tmp_path / "out/fineweb_val_bytes_000000.bin", place, 0)
    assert "no bytes to score" in "\n".join(check_folder(tmp_path / "out")[0])


@pytest.mark.parametrize("plain", [False, True])
def test_reading_texts_without_a_space_for_a_tokenizer(tmp_path, capsys, plain):
    rng = random.Random(0)
    texts = ["".join(chr(0x4E00 + rng.randrange(100)) for _ in range(100)) for _ in range(30)]
    docs, out = write_jsonl(tmp_path / "d.jsonl", texts), tmp_path / "out"
    options = ["--train-tokenizer", 400, "--out", out, "--val-docs", 5, *["--plain"] * plain]
    assert told_by(capsys, "--docs", docs, *options) == (0, "")
    model = (out / "tokenizer.model").read_bytes()
    tokenizer = encoding.make_tokenizer("t", model, plain=plain)
    assert tokenizer.processor.decode(tokenizer.processor.encode("a b")) == "a b"


def test_data_charged_more_than_they_have_are_refused(tmp_path, capsys):
    """The bytes of plain text are those that its tokens spell: a normaliser must not make them more."""
    tokenizer = lengthening(tmp_path, "65\t65 65 65 65")
    model, docs = tmp_path / "longer.model", write_jsonl(tmp_path / "docs.jsonl", ["no", "here it is", "x"])
    model.write_bytes(tokenizer.model)
    code, error = told_by(
        capsys, "--docs", docs, "--sp", model, "--out", tmp_path / "out", "--val-docs", 2, "--plain"
    )
    assert code == 2 and "docs.jsonl line 2: has 10 bytes and would be charged 16" in error
    assert not [*(tmp_path / "out").glob("*.bin")]


def test_tokenizer_with_rules_is_not_lossless_whatever_they_are_about(tmp_path, small):
    assert "t" not in sidecar.HOSTILE and not sidecar.is_lossless(lengthening(tmp_path, "74\t54").processor)
    assert sidecar.is_lossless(small.processor)


def test_data_that_nfkc_makes_longer(folding, tmp_path):
    """As the published tokenizers do: one half is five bytes instead of two. In sum no text may gain."""
    plain, texts = folding._replace(plain=True), ["a \u00bd b", "  two spaces  ", *sentences(10)]
    manifest = made(texts, plain, tmp_path / "data", 2)
    val = manifest["splits"]["val"]
    assert (val["overcharged_bytes"], val["overcharged_documents"], val["uncharged_bytes"]) == (3, 1, 4)
    assert val["bytes"] == sum(len(text.encode()) for text in texts[:2]) + 3 - 4
    assert val["bytes"] == read_shard(tmp_path / "data" / SIZES).sum()
    with pytest.raises(DataError, match="--val-docs 1: these documents would be charged 3 bytes more"):
        made(texts, plain, tmp_path / "sum", 1)


# ---- Files and pipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "vocab, said", [(3, "more than the 264 control"), (266, "at least [0-9]+ for these")]
)
def test_a_tokenizer_of_too_few_pieces_says_how_many_it_takes(vocab, said):
    with pytest.raises(DataError, match=f"^--train-tokenizer {vocab}: must be {said}"):
        encoding.train_tokenizer(["a few words and letters"] * 40, vocab)


def test_reading_twice_from_a_pipe_is_refused(tmp_path, capsys):
    def refused(*arguments: object) -> str:
        with pytest.raises(SystemExit) as left:
            prepare.parse_arguments([*map(str, arguments), "--out", str(tmp_path / "out")])
        err = capsys.readouterr().err
        assert left.value.code == 2 and err.count("\n") == 1
        return err

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    told = f"--docs {pipe}: --train-tokenizer reads the documents twice and needs a file"
    assert told in refused("--docs", pipe, "--train-tokenizer", 400)
    for twice in (pipe, "-", "docs.jsonl"):
        told = f"--docs {twice}: is named 2 times"
        assert told in refused("--docs", twice, twice, "--sp", "m")
    assert "--workers 99999: must be at most" in refused("--docs", "d", "--sp", "m", "--workers", 99_999)


def test_reading_a_standard_input_that_is_closed(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(DataError, match="^standard input: cannot be read: it is closed$"):
        list(reading.Reader(["-"]))


LINES = b"".join(json.dumps({"text": f"Document {n}"}).encode() + b"\n" for n in range(9))


@pytest.mark.parametrize(
    "pack", [gzip.compress, lzma.compress, zstandard.ZstdCompressor().compress], ids=["gz", "xz", "zst"]
)
@pytest.mark.parametrize("name", ["docs", "docs.JSONL.GZ", "docs.zst"])
def test_reading_what_a_file_is_and_not_what_it_is_called(tmp_path, name, pack):
    path = tmp_path / name
    path.write_bytes(pack(LINES))
    assert b"".join(line for block in reading.Reader([str(path)]) for line in block.lines) == LINES


def test_reading_an_ending_in_capitals(tmp_path):
    """A skippable frame comes first: the beginning does not tell."""
    path = tmp_path / "DOCS.JSONL.ZST"
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    path.write_bytes(skipped + zstandard.ZstdCompressor().compress(LINES))
    assert b"".join(line for block in reading.Reader([str(path)]) for line in block.lines) == LINES


def test_reading_a_long_window_names_the_remedy(tmp_path):
    settings = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    stream = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    path = tmp_path / "d.jsonl.zst"
    path.write_bytes(stream.compress(LINES) + stream.flush())
    with pytest.raises(DataError, match=r"zst: cannot be read: .*zstd -d --long=31"):
        list(reading.Reader([str(path)]))


@pytest.mark.parametrize("blank", [b"", b"\n", b"  \r\n"])
def test_reading_a_byte_order_mark_before_a_blank_line(tmp_path, blank):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + blank + LINES)
    (block,) = reading.Reader([str(path)])
    first, rest = block.split(2)
    parsed = reading.parse_block(first)
    assert block.documents == 9 and rest.documents == 7 and parsed.bad == []
    assert [document.text for document in parsed.documents] == ["Document 0", "Document 1"]


def test_reading_a_damaged_parquet_page(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    table = arrow.table({"text": ["The quick fox"] * 3})
    parquet.write_table(
        table,
        path,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
        write_statistics=False,
    )
    data = path.read_bytes()
    path.write_bytes(data.replace(b"quick", b"quack", 1))
    assert path.read_bytes() != data
    with pytest.raises(DataError, match=r"parquet: cannot be read: .*(CRC|checksum)"):
        list(reading.Reader([str(path)]))


def test_reading_a_parquet_column_whose_name_is_no_utf8(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    parquet.write_table(arrow.table({"text": ["a"], "NAME": [1]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"NAME", b"N\xffME"))
    with pytest.raises(DataError, match=r"t\.parquet: cannot be read: .*codec can't decode byte 0xff"):
        list(reading.Reader([str(path)]))


def test_reading_parquet_decimals_is_refused(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    path = write_parquet(tmp_path / "t.parquet", arrow.array([None], arrow.decimal128(5, 2)))
    with pytest.raises(
        DataError, match=r"column 'text' is of type decimal128\(5, 2\), must be one of string"
    ):
        list(reading.Reader([str(path)]))


# ---- Names of folders -------------------------------------------------------------------------------------


def test_data_in_a_folder_whose_name_is_not_utf8(folding, tmp_path, tg):
    """SentencePiece takes no such path, so it is handed the model itself: preparation, check and run."""
    out = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        out.mkdir()
    except OSError:
        pytest.skip("this file system has no such names")
    size = folding.processor.get_piece_size()
    made(sentences(9), folding, out, 3)
    assert check_folder(out)[0] == []
    cfg = tg.read_settings({"DATA_PATH": str(out), "VOCAB_SIZE": str(size)})
    assert tg.load_tokenizer(cfg).get_piece_size() == size
    (out / folding.file_name).write_bytes(b"")
    with pytest.raises(tg.DataError, match="not a SentencePiece model"):
        tg.load_tokenizer(cfg)


def test_home_stands_for_a_tilde_that_no_shell_has_replaced(tg, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cfg = tg.read_settings({"ARTIFACT_DIR": "~/x", "DATA_DIR": "~/data", "TTT_LR": "0.5"})
    assert (cfg.artifact_dir, cfg.data_dir) == ("/home/me/x", "/home/me/data")
    options = prepare.parse_arguments(["--docs", "~/d", "-", "--sp", "~/m", "--out", "~/o"])
    assert (options.docs, options.sp, options.out) == (["/home/me/d", "-"], "/home/me/m", Path("/home/me/o"))
    assert prepare.parse_arguments(["--check", "~/o"]).check == Path("/home/me/o")


def test_pieces_of_letters_have_a_bound_of_their_own():
    """Where a tokenizer normalises: 1 in 100 of them, whatever all the tokens together may carry."""
    few = sidecar.Odd(
        tokens=100_000, spaced=0, letters=50_000, wrong=500, wrong_letters=500, blocks=0, spaces=0, first=3
    )
    assert few.problem(lossless=False) == ""
    many = few._replace(wrong=501, wrong_letters=501)
    assert many.problem(lossless=False) == "501 of 50000 pieces of letters carry other bytes than those"
