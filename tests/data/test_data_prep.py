"""Data preparation at scale: word cache, workers, kill -9, bad input, leaks, checks, report, memory."""

import functools
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from patience import PATIENCE, wait_for

import lossless_caps
import prepare_caseops_data as prepare
from bench import data_prep
from bench import encoder as bench_encoder
from dataprep import encoding, leaks, reading, splitting, words, worker
from dataprep import progress as progress_bar
from dataprep.checking import check_folder, joined, report_table, scan_shards
from dataprep.crew import Crew
from dataprep.encoding import Encoder, make_tokenizer, tokenise, tokenise_validation
from dataprep.shards import DataError, read_shard, shard_bytes, shard_paths, write_whole
from dataprep.worker import Worker
from systems.layout import file_sha256

SCRIPT = Path(prepare.__file__)
PUBLISHED = "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
VAL_DOCS = 20


def run(*arguments, **settings) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def sentences(count: int, seed: int = 0) -> list[str]:
    """Documents of made-up English, some with other scripts, odd white space and literal operators."""
    rng = random.Random(seed)
    words = ["the", "Of", "and", "NASA", "iPhone", "river,", "old", "HOUSE.", "(perhaps)", "1234", "don't"]
    words += ["caf\u00e9", "\u4e16\u754c"]
    words += ["\n\n", "", "\ue002", "\u200b", "e\u0301", "a\u00a0b", "\ufb01n", "x\u2581y", "\t", "USB-C"]
    return [" ".join(rng.choices(words, k=rng.randint(20, 200))) for _ in range(count)]


@pytest.fixture(scope="module")
def published(tokenizer_dir) -> encoding.Tokenizer:
    return make_tokenizer(PUBLISHED, (tokenizer_dir / PUBLISHED).read_bytes())


@pytest.fixture(scope="module")
def lossless() -> encoding.Tokenizer:
    texts = [text.replace("\u2581", "") for text in sentences(50)]
    return make_tokenizer("small.model", encoding.train_tokenizer(texts, 400), lossless=True)


@pytest.fixture(scope="module")
def model(published, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / PUBLISHED
    path.write_bytes(published.model)
    return path


@pytest.fixture(scope="module")
def docs(tmp_path_factory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("docs") / "docs.jsonl", sentences(400))


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(reading, "BLOCK_BYTES", 4000)


# ---- CaseOps on arrays ------------------------------------------------------------------------------------

UTF8 = st.text(
    st.sampled_from("aAbBzZ \n'1\ue001\ue002\ue003\ue004\u00e9\u00c9") | st.characters(codec="utf-8")
)


@settings(max_examples=300)
@given(st.lists(UTF8, max_size=6))
def test_caps_of_many_texts_are_those_of_each(texts):
    many = lossless_caps.encode_many([text.encode() for text in texts])
    assert [encoded.decode() for encoded in many] == [data_prep.encode_by_character(text) for text in texts]
    assert [lossless_caps.decode(encoded.decode()) for encoded in many] == texts


@pytest.mark.parametrize("text", ["aB Cd " * 50, "A" * 90 + " b", "\ue003 \ue004\ue001" * 20, "no space" * 9])
def test_caps_of_slices(monkeypatch, text):
    expected = lossless_caps.encode(text)
    monkeypatch.setattr(lossless_caps, "_SLICE", 16)
    assert lossless_caps.encode(text) == expected == data_prep.encode_by_character(text)


@settings(max_examples=300)
@given(UTF8, st.lists(st.integers(0, 400), max_size=6))
def test_caps_byte_counts_of_spans(text, cuts):
    encoded = lossless_caps.encode(text)
    places = sorted({0, len(encoded), *(cut % (len(encoded) + 1) for cut in cuts)})
    pieces = [encoded[start:end] for start, end in zip(places, places[1:], strict=False)]
    edges = [len(encoded[:place].encode()) for place in places]
    spans = np.array([*zip(edges, edges[1:], strict=False)], np.int64).reshape(-1, 2)
    counts = lossless_caps.span_byte_counts(encoded.encode(), spans)
    assert counts.tolist() == lossless_caps.piece_byte_counts(pieces)


def test_caps_round_trips_of_the_fuzzer(golden_dir):
    assert data_prep.round_trips(20_000, seed=1) == 0
    sample = golden_dir.parent / "corpus" / "sample.jsonl"
    if sample.exists():
        assert data_prep.document_round_trips(str(sample)) == (200, 0)


def test_caps_are_many_times_as_fast_as_a_step_a_character():
    text = " ".join(sentences(40)) * 4
    slow = min(data_prep.cpu_seconds(lambda: data_prep.encode_by_character(text)) for _ in range(3))
    fast = min(data_prep.cpu_seconds(lambda: lossless_caps.encode_utf8(text.encode())) for _ in range(3))
    assert slow > 4 * fast  # the bench measures it on real text; here a busy machine must not fail


# ---- Encoder ----------------------------------------------------------------------------------------------

PARTS = st.sampled_from(
    ["the", "NASA", "iPhone", "12", "don't", "(x)", " ", "  ", "\n", "\t", "\x0b", "\r\n", "\x1c", "\0", "."]
    + [
        "\ue001",
        "\ue004",
        "\u2581",
        "e\u0301",
        "\u0301",
        "\u00b4",
        "\u200b",
        "\ufeff",
        "\ufb01",
        "\u4e16",
        "<s>",
    ]
    + [
        "\u00a0",
        "\u1100\u1161",
        "\U0001f600",
        "\u3000",
        "A\u030a",
        "\u2026",
        "<0x41>",
        "\u2581\u2581",
        "\ue002a",
    ]
)
MIXED = st.lists(PARTS | st.text(st.characters(codec="utf-8"), max_size=3), max_size=30).map("".join)


@pytest.fixture(scope="module")
def plain(tokenizer_dir) -> encoding.Tokenizer:
    path = tokenizer_dir / "fineweb_8192_bpe.model"
    return make_tokenizer(path.name, path.read_bytes(), plain=True)


@pytest.fixture(scope="module")
def encoders(published, lossless, plain) -> list[Encoder]:
    """Of each model; and one that remembers next to nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "KEPT", 8)
        patch.setattr(splitting, "KEPT", 8)
        full = Encoder(published)
        full.documents([b"made now"])
    return [Encoder(published), Encoder(lossless), Encoder(plain), full]


def equals_sentencepiece(encoder: Encoder, text: str) -> None:
    """Tokens of the whole text, and the original bytes of each by the letter of their definition."""
    tokenizer, data = encoder.tokenizer, text.encode()
    encoded = data if tokenizer.plain else lossless_caps.encode(text).encode()
    mapping = tokenizer.processor.encode(encoded, out_type="offset_mapping")
    expected = [encoding.BOS_ID, *mapping["ids"]]
    assert encoder.documents([data])[0].tolist() == expected
    tokens, counts = encoder.counted([data])[0]
    assert tokens.tolist() == expected
    if not tokenizer.plain:
        surfaces = [encoded[start:end].decode() for start, end in mapping["offsets"]]
        assert lossless_caps.piece_byte_counts(surfaces) == counts[1:].tolist()
    with pytest.MonkeyPatch.context() as patch:  # as if the text were long
        patch.setattr(encoding, "CHUNK_BYTES", 8)
        cut = encoder.counted_alone(data)
        assert [values.tolist() for values in cut] == [expected, counts.tolist()]
        cut = encoder.counted([data, b"", data])[2]
        assert [values.tolist() for values in cut] == [expected, counts.tolist()]


@settings(max_examples=200)
@given(MIXED)
@example(" ")
@example("")
@example("a \u0301b")
@example("x\x0b y")
@example("a  b \n c\u2019 \ue001 \u201cd")
def test_data_encoder_equals_sentencepiece(encoders, text):
    for encoder in encoders:
        equals_sentencepiece(encoder, text)


def test_data_encoder_on_generated_texts(encoders):
    generator = random.Random(3)
    texts = [bench_encoder.tokens_text(generator) for _ in range(2000)]
    for encoder in encoders:
        assert encoder.by_words
        assert bench_encoder.unequal([encoder], [text.encode() for text in texts]) == 0


def test_data_encoder_when_hashes_are_the_same(published, monkeypatch):
    """Words are told apart by what they are; a hash only says where they are remembered."""
    monkeypatch.setattr(words, "KEPT", 2)
    texts = [text.encode() for text in sentences(6, seed=9)]
    assert bench_encoder.unequal([Encoder(published)], texts * 2) == 0


def test_data_memory_of_words_of_sentencepiece_is_bounded(published, monkeypatch):
    """Words that compiled code does not take are made once each, until there are too many of them."""
    monkeypatch.setattr(splitting, "KEPT", 40)
    encoder, made = Encoder(published), []
    units = encoder._units
    make = units._made
    monkeypatch.setattr(units, "_made", lambda new: made.append(len(new)) or make(new))
    first, other = (" ".join(f"{c}\u00e9{n}" for n in range(30)).encode() for c in "ab")
    for text in (first, first, other, other, first, first):
        assert encoder.documents([text])[0].tolist() == encoder.tokens_alone(text).tolist()
    assert made == [30, 30, 30]  # the second time others were full, and room was made
    encoder.documents(["\u00e9".encode() * 200])
    assert max(map(len, units._known)) <= splitting.LONGEST


@pytest.mark.parametrize("length", [22, 23, 24, 255, 256, 257, 5000])
def test_data_encoder_on_words_of_any_length(encoders, length):
    """Some are too long to be remembered, or to be merged by compiled code."""
    for text in ("x" * length, "ab" + "-=" * (length // 2), "Of" * (length // 2), "a " + "1" * (length - 1)):
        assert bench_encoder.unequal(encoders, [text.encode(), f"{text} {text}, a".encode()]) == 0


def test_data_encoder_on_the_corpus(published, golden_dir):
    sample = golden_dir.parent / "corpus" / "sample.jsonl"
    if not sample.exists():
        pytest.skip("no corpus")
    texts = [json.loads(line)["text"] for line in sample.read_text(encoding="utf-8").splitlines()]
    encoder = Encoder(published)
    data = [text.encode() for text in texts]
    assert b"".join(encoder.documents(data)) == tokenise(published.processor, texts).tobytes()
    for text, (tokens, counts) in zip(data[:40], encoder.counted(data), strict=False):
        expected = tokenise_validation(encoder, reading.Document(text, ""))
        assert tokens.tolist() == expected[0].tolist() and counts.tolist() == expected[1].tolist()
        assert counts.sum() == len(text)


def plain_model(**settings) -> encoding.Tokenizer:
    import io

    import sentencepiece

    base = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2, "pad_id": 0}
    base |= {"bos_id": 1, "eos_id": 2, "unk_id": 3, "user_defined_symbols": list(encoding.OPERATORS)}
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(100)), model_writer=file, **(base | settings)
    )
    return make_tokenizer("other.model", file.getvalue())


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "unigram", "vocab_size": 315, "add_dummy_prefix": False},
        {"split_by_whitespace": False, "add_dummy_prefix": False},
        {"treat_whitespace_as_suffix": True, "add_dummy_prefix": False},
        {"split_by_unicode_script": False, "add_dummy_prefix": False},
        {"user_defined_symbols": [*encoding.OPERATORS, "he", "ver,"], "add_dummy_prefix": False},
    ],
    ids=lambda value: next(iter(value)),
)
def test_data_encoder_with_models_that_do_not_split(settings):
    tokenizer = plain_model(**settings)
    texts = sentences(60, seed=5)
    assert Encoder(tokenizer).by_words == ("split_by_unicode_script" in settings)
    parts = Encoder(tokenizer).documents([text.encode() for text in texts])
    assert b"".join(parts) == tokenise(tokenizer.processor, texts).tobytes()


def test_an_encoder_that_is_not_sentencepieces_equal_ends_the_run(docs, published, monkeypatch, tmp_path):
    """Each document of the sample goes through SentencePiece as well; the first other is named."""
    monkeypatch.setattr(worker, "SAMPLED_FIRST", VAL_DOCS + 3)
    monkeypatch.setattr(worker, "SAMPLED_EVERY", 100)
    source = reading.Reader([str(docs)])
    manifest = prepare.prepare(source, published, tmp_path / "right", VAL_DOCS)
    assert manifest["encoder"] == {**Encoder(published).name, "equal_documents": VAL_DOCS + 3 + 3}
    right = Encoder.documents

    def wrong(self: Encoder, texts: list[bytes]) -> list[np.ndarray]:
        found = right(self, texts)
        found[280][-1] += 1  # number 300 from 0: the last of the sample
        return found

    monkeypatch.setattr(Encoder, "documents", wrong)
    with pytest.raises(
        DataError, match=r"docs.jsonl line 301: the encoder and SentencePiece give other tokens"
    ):
        prepare.prepare(source, published, tmp_path / "wrong", VAL_DOCS)
    assert not (tmp_path / "wrong").exists()


# ---- Compiled code, and what is done without ---------------------------------------------------------------


def test_compiled_functions_give_what_python_gives(monkeypatch):
    """Keys of documents with every character, CaseOps, windows and hashes of tokens."""
    rng, generator = np.random.default_rng(0), random.Random(5)
    every = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
    texts = [data_prep.random_text(generator) for _ in range(2000)] + [every, ""]
    documents = [reading.make_document(text, "") for text in texts]
    tokens = rng.integers(1, 40, 5000).astype(np.uint16)
    tokens[0] = 1
    starts = np.flatnonzero(tokens == 1)
    assert words.library()
    assert [words.caps_of(d.utf8) for d in documents] == lossless_caps.encode_many(
        [d.utf8 for d in documents]
    )

    def found() -> list:
        windows = leaks.sampled_windows(tokens)
        hashes = leaks.document_hashes(tokens, starts)
        return [[d.key for d in documents], *(values.tolist() for values in (*windows, hashes))]

    compiled = found()
    monkeypatch.setattr(words, "library", lambda: None)
    assert compiled == found() and len(compiled[1]) > 20


def test_prepare_without_a_compiler_gives_the_same(docs, published, tmp_path, monkeypatch, capsys):
    source = reading.Reader([str(docs)])
    with_it = prepare.prepare(source, published, tmp_path / "with", VAL_DOCS)
    assert with_it["encoder"]["name"] == "dataprep/words.py" and capsys.readouterr().out == ""
    monkeypatch.setattr(words, "library", lambda: None)
    without = prepare.prepare(source, published, tmp_path / "without", VAL_DOCS)
    assert without["encoder"]["name"] == "sentencepiece"
    assert "note: no C compiler" in capsys.readouterr().out
    assert {**without, "encoder": 0} == {**with_it, "encoder": 0}


@pytest.fixture
def source_elsewhere(tmp_path, monkeypatch):
    """The C file in a folder of its own, with nothing compiled yet."""
    monkeypatch.setattr(words, "SOURCE", tmp_path / "words.c")
    words.SOURCE.write_bytes(Path(words.__file__).with_suffix(".c").read_bytes())
    words.library.cache_clear()
    yield tmp_path / "__pycache__"
    words.library.cache_clear()


def test_data_compiles_once(source_elsewhere, monkeypatch):
    """What was compiled is loaded without a compiler; what is damaged, or of another source, is made anew."""
    assert words.library()
    (made,) = source_elsewhere.iterdir()
    path = os.environ["PATH"]
    made.write_bytes(b"damaged")  # the one that is loaded lay elsewhere
    monkeypatch.setenv("PATH", "")
    words.library.cache_clear()
    assert words.library() is None
    monkeypatch.setenv("PATH", path)
    words.library.cache_clear()
    assert words.library() and made.read_bytes() != b"damaged"
    monkeypatch.setenv("PATH", "")
    words.library.cache_clear()
    assert words.library()
    monkeypatch.setenv("PATH", path)
    words.SOURCE.write_text(words.SOURCE.read_text() + "\n")
    words.library.cache_clear()
    assert words.library() and len([*source_elsewhere.iterdir()]) == 2


def test_data_compiler_that_fails(source_elsewhere, tmp_path, monkeypatch):
    (tmp_path / "cc").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert words.library() is None and not source_elsewhere.exists()


def test_a_tokenizer_learns_from_documents_of_any_length():
    """SentencePiece leaves out lines of more than 4,192 bytes unless it is told not to."""
    long = " ".join(["qzjv"] * 2000)
    learnt = prepare.train_tokenizer([*sentences(20), long], 350)
    assert learnt != prepare.train_tokenizer(sentences(20), 350)


# ---- Workers, interruption --------------------------------------------------------------------------------


def test_prepare_gives_the_same_for_any_number_of_workers(docs, published, small_blocks, tmp_path):
    manifests = []
    for workers in (1, 2, 5):
        source = reading.Reader([str(docs)])
        out = tmp_path / str(workers)
        manifests.append(
            prepare.prepare(source, published, out, VAL_DOCS, shard_tokens=5000, workers=workers)
        )
    assert len(list((tmp_path / "1").glob("fineweb_train_*"))) > 5
    assert manifests[0] == manifests[1] == manifests[2]
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "5")
    texts = sentences(400)
    expected = tokenise(
        published.processor, [text for text in texts[VAL_DOCS:] if text not in texts[:VAL_DOCS]]
    )
    shards = sorted((tmp_path / "5").glob("fineweb_train_*"))
    assert np.concatenate([read_shard(path) for path in shards]).tolist() == expected.tolist()


KILLED = """
import os, sys, time
sys.path.insert(0, {root!r})
from dataprep import reading, shards
import prepare_caseops_data as prepare
reading.BLOCK_BYTES = 4000
remember, publish = shards.DataFolder.remember, shards.DataFolder.publish
def slowly(step):
    def wrapped(self, *arguments):
        print("step", flush=True)
        os.read(0, 1)  # goes on when told: who kills is never late
        time.sleep(0.004)
        step(self, *arguments)
        time.sleep(0.004)
    return wrapped
shards.DataFolder.remember, shards.DataFolder.publish = slowly(remember), slowly(publish)
sys.exit(prepare.main(sys.argv[1:]))
"""


def test_data_worker_that_is_killed(published, docs, small_blocks):
    """One line instead of a traceback or a wait without end."""
    with (
        Crew(functools.partial(Worker, Encoder(published), None), 2) as crew,
        pytest.raises(DataError, match="a worker process was killed"),
    ):
        for number, _ in crew.map(enumerate(reading.Reader([str(docs)]))):
            if number == 2:
                for process in crew._processes:
                    process.kill()


def commands_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # ended meanwhile
        return b""


@pytest.mark.parametrize("workers", [1, 2])
def test_prepare_goes_on_after_kill_9(docs, model, small_blocks, tmp_path, workers):
    """Killed at any of many moments, then repeated: no partial file ever, and in the end the same bytes."""
    command = [
        "--docs",
        docs,
        "--sp",
        model,
        "--val-docs",
        VAL_DOCS,
        "--shard-tokens",
        2000,
        "--workers",
        workers,
    ]
    program = [sys.executable, "-c", KILLED.format(root=str(SCRIPT.parent))]
    whole, out = tmp_path / "whole", tmp_path / "out"
    made = [*program, *map(str, command), "--out", str(whole)]
    unasked = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": PATIENCE}
    assert subprocess.run(made, **unasked).returncode == 0
    rng, kills, resumed = random.Random(workers), 0, 0
    for _ in range(40):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen([*program, *map(str, command), "--out", str(out)], **pipes)
        for _ in range(rng.randrange(4, 24)):
            line = process.stdout.readline()
            resumed += "goes on after" in line
            if line == "step\n":
                os.write(process.stdin.fileno(), b".")
        time.sleep(rng.random() * 0.008)
        process.send_signal(signal.SIGKILL)
        kills += process.wait(PATIENCE) == -signal.SIGKILL
        process.stdin.close(), process.stdout.close()
        for path in out.glob("*.bin"):
            assert path.read_bytes() == (whole / path.name).read_bytes(), path
        if (out / "manifest.json").exists():
            break
    result = subprocess.run([*program, *map(str, command), "--out", str(out)], **unasked)
    assert result.returncode == 0, result.stderr
    assert contents(out) == contents(whole)
    assert kills >= 3 and resumed >= 2
    wait_for(
        lambda: not any(bytes(out) in commands_of(path) for path in Path("/proc").glob("[0-9]*/cmdline"))
    )


def test_data_progress_says_a_line_a_minute(docs, monkeypatch, capsys):
    """Where stderr is no terminal."""
    clock = iter(range(0, 400, 40))
    monkeypatch.setattr(progress_bar.time, "monotonic", lambda: next(clock))
    reader = reading.Reader([str(docs)])
    progress = progress_bar.Progress(reader.total, lambda: reader.position)
    for block in reader:
        for part in range(3):
            progress.update(10 * part, block.size)
        break
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("documents:10 megabytes:")
    assert " megabytes_per_second:" in lines[0] and " remaining_minutes:" in lines[0]


def test_prepare_full_disk(docs, model, tmp_path):
    """A file that cannot be written whole is named, nothing partial stays, the same command goes on."""
    limit = "import resource, signal, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000)); "
    limit += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); sys.path.insert(0, sys.argv.pop(1)); "
    limit += "import prepare_caseops_data as p; sys.exit(p.main(sys.argv[1:]))"
    big = write_jsonl(tmp_path / "big.jsonl", sentences(2000, seed=3))
    out = tmp_path / "out"
    command = ["--docs", big, "--sp", model, "--out", out, "--val-docs", VAL_DOCS, "--shard-tokens", 300_000]
    program = [sys.executable, "-c", limit, str(SCRIPT.parent), *map(str, command)]
    result = subprocess.run(program, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "fineweb_train_000000.bin: File too large" in result.stderr
    assert not out.exists()
    assert run(*command).returncode == 0


# ---- Bad input --------------------------------------------------------------------------------------------

BAD = {
    "broken JSON": (b'{"text": "cut', "not JSON"),
    "no text": (b'{"body": "x"}', "no text"),
    "encoding": (b'{"text": "\xff"}', "not UTF-8 (byte 0xff at 10)"),
    "surrogate": (b'{"text": "a\\ud800"}', "lone surrogate U+D800"),
    "NUL": (b'{"text": "a\0b"}', "NUL byte at 11"),
}


@pytest.mark.parametrize("kind", BAD)
def test_data_bad_documents_are_skipped_up_to_a_number(published, tmp_path, kind):
    line, words = BAD[kind]
    docs = tmp_path / "d.jsonl"
    good = [json.dumps(f"Document {n}").encode() for n in range(6)]
    docs.write_bytes(b"\n".join([good[0], line, *good[1:4], line, *good[4:]]))
    arguments = (published, tmp_path / "out", 3)
    for allowed in (0, 1):
        with pytest.raises(DataError) as refused:
            prepare.prepare(reading.Reader([str(docs)]), *arguments, max_bad=allowed)
        assert f"{docs} line {2 if not allowed else 6}: " in str(refused.value) and words in str(
            refused.value
        )
        assert not (tmp_path / "out").exists()
    manifest = prepare.prepare(reading.Reader([str(docs)]), *arguments, max_bad=2)
    assert [message.split(": ")[0] for message in manifest["bad_documents"]] == [
        f"{docs} line {n}" for n in (2, 6)
    ]
    val, train = manifest["splits"]["val"], manifest["splits"]["train"]
    assert (val["documents"], val["bad_documents"]) == (2, 1)  # a broken document keeps its place
    assert (train["documents"], train["bad_documents"]) == (4, 1)


def test_data_remarks_on_harmless_input(model, tmp_path):
    docs = tmp_path / "d.jsonl"
    docs.write_bytes(b'\xef\xbb\xbf"First"\n"Second \\u0000"\n""\n"Third"\n')
    result = run("--docs", docs, "--sp", model, "--out", tmp_path / "out", "--val-docs", 2)
    assert result.returncode == 0 and result.stderr == ""
    assert f"note: {docs} line 1: byte order mark removed" in result.stdout
    assert f"note: {docs} line 3: empty document left out" in result.stdout
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    val = manifest["splits"]["val"]
    assert val["documents"] == 2 and val["bytes"] + val["uncharged_bytes"] == len("First" + "Second \0")
    assert manifest["splits"]["train"]["empty_documents"] == 1


def test_data_of_several_files_and_parquet(published, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table
    texts = sentences(60)
    first, second, third = texts[:20], texts[20:40], texts[40:]
    paths = [write_jsonl(tmp_path / "a.jsonl", first), tmp_path / "b.jsonl.gz", tmp_path / "c.parquet"]
    paths[1].write_bytes(gzip.compress("".join(json.dumps(text) + "\n" for text in second).encode()))
    parquet.write_table(table({"text": third, "id": range(20)}), paths[2], row_group_size=7)
    one = write_jsonl(tmp_path / "one.jsonl", texts)
    manifest = prepare.prepare(reading.Reader([*map(str, paths)]), published, tmp_path / "several", 10)
    assert prepare.prepare(reading.Reader([str(one)]), published, tmp_path / "one", 10) == manifest
    assert contents(tmp_path / "several") == contents(tmp_path / "one")
    parquet.write_table(table({"body": ["x", None]}), paths[2])
    with pytest.raises(DataError, match=r"c\.parquet.*no column 'text' among body"):
        list(reading.Reader([str(paths[2])]))
    paths[2].write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"c\.parquet: cannot be read"):
        list(reading.Reader([str(paths[2])]))
    parquet.write_table(table({"text": ["x", None]}), paths[2])
    with pytest.raises(DataError, match=r"c\.parquet line 2: no text"):
        prepare.prepare(reading.Reader([str(one), str(paths[2])]), published, tmp_path / "null", 10)


PARQUET_TEXTS = ["", "Caf\u00e9", "\ue002 x", "Two\nlines"]
PARQUET_KINDS = ["string", "large_string", "string_view", "binary", "large_binary", "binary_view"]


def write_parquet(path: Path, *columns: object) -> Path:
    """A Parquet file whose columns are all called `text`."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_arrays(columns, names=["text"] * len(columns)), path)
    return path


@pytest.mark.parametrize("kind", [*PARQUET_KINDS, "dictionary of string", "dictionary of binary"])
def test_data_of_every_text_column_of_parquet(tmp_path, kind):
    arrow = pytest.importorskip("pyarrow")
    name = kind.removeprefix("dictionary of ")
    column = arrow.array(PARQUET_TEXTS, "string").cast(getattr(arrow, name)())
    path = write_parquet(tmp_path / "t.parquet", column if name == kind else column.dictionary_encode())
    (block,) = reading.Reader([str(path)])
    assert [document.text for document in reading.parse_block(block).documents] == PARQUET_TEXTS


def test_data_of_a_parquet_column_of_fixed_size(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    path = write_parquet(tmp_path / "t.parquet", arrow.array([b"one", None, b"two"], arrow.binary(3)))
    (block,) = reading.Reader([str(path)])
    parsed = reading.parse_block(block)
    assert [document.text for document in parsed.documents] == ["one", "two"]
    assert [message.partition(";")[0] for message in parsed.bad] == [f"{path} line 2: no text"]


@pytest.mark.parametrize(
    "kind", ["null", "int64", "double", "bool", "list<", "struct<", "timestamp[s]", "date32"]
)
def test_data_of_other_parquet_columns_are_refused(tmp_path, kind):
    arrow = pytest.importorskip("pyarrow")
    kinds = {
        "list<": arrow.list_(arrow.string()),
        "struct<": arrow.struct([("text", arrow.string())]),
        "timestamp[s]": arrow.timestamp("s"),
    }
    column = arrow.array([None, None], kinds.get(kind, kind))
    path = write_parquet(tmp_path / "t.parquet", column)
    with pytest.raises(DataError) as refused:
        list(reading.Reader([str(path)]))
    told = str(refused.value)
    assert told.startswith(f"{path}: cannot be read: column 'text' is of type {kind.partition('[')[0]}")
    assert "must be one of string, " in told and "\n" not in told


def test_data_of_parquet_that_are_no_utf8(published, tmp_path):
    """Named with row and place, and counted, as in a JSON line; a string column may hold them too."""
    arrow = pytest.importorskip("pyarrow")
    for kind in ("binary", "string"):
        column = arrow.array([*(b"Row %d" % n for n in range(5)), b"ab\xff", b"Row 6"]).view(kind)
        path = str(write_parquet(tmp_path / "t.parquet", column))
        told = f"{path} line 6: not UTF-8 (byte 0xff at 2)"
        with pytest.raises(DataError) as refused:
            prepare.prepare(reading.Reader([path]), published, tmp_path / "out", 2)
        assert str(refused.value) == f"{told} (more than --max-bad 0)"
        manifest = prepare.prepare(reading.Reader([path]), published, tmp_path / kind, 2, max_bad=1)
        assert manifest["bad_documents"] == [told] and manifest["splits"]["train"]["documents"] == 4


def test_data_of_parquet_with_two_text_columns(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    path = write_parquet(tmp_path / "t.parquet", arrow.array(["a"]), arrow.array(["b"]))
    with pytest.raises(DataError, match=r"t\.parquet: cannot be read: more than one column 'text' among"):
        list(reading.Reader([str(path)]))


# ---- Leaks ------------------------------------------------------------------------------------------------


def test_data_leaks_are_dropped_and_counted(published, tmp_path):
    rng = random.Random(8)
    words = [f"{a}{b}{c}" for a in "bcdfgl" for b in "aeiou" for c in ("ft", "rt", "sk", "m")]
    texts = [" ".join(rng.choices(words, k=400)) for _ in range(40)]
    val, train = texts[:10], texts[10:]
    near = [
        val[0] + " And A Little More",
        " ".join(val[1].split()[:330]),
        train[0] + " " + val[2] + " " + train[1],
    ]
    far = [" ".join(val[3].split()[:60] + train[3].split()), " ".join(val[4].split()[:10])]
    leaks_in = [val[5], val[6].replace(" ", "\n\n", 3), "\u00a0" + val[7] + " ", *near, *far]
    stream = [prepare.make_document(t, f"text {n}") for n, t in enumerate([*val, *train, *leaks_in])]
    manifest = prepare.prepare(stream, published, tmp_path / "kept", 10)
    counts = manifest["splits"]["train"]
    assert counts["dropped_duplicates"] == 1 and counts["dropped_space_duplicates"] == 2
    assert counts["near_duplicates"] == 3 and counts["dropped_near_duplicates"] == 0
    assert manifest["near_duplicates"] == ["text 43", "text 44", "text 45"]
    assert counts["documents"] == len(train) + len(near) + len(far)
    manifest = prepare.prepare(stream, published, tmp_path / "dropped", 10, drop_near=True)
    counts = manifest["splits"]["train"]
    assert counts["dropped_near_duplicates"] == 3 and counts["documents"] == len(train) + len(far)
    tokens = read_shard(tmp_path / "dropped/fineweb_train_000000.bin")
    assert tokens.tolist() == tokenise(published.processor, [*train, *far]).tolist()
    assert counts["bytes"] == sum(len(text.encode()) for text in [*train, *far])


def test_data_windows_do_not_depend_on_slices_or_neighbours(monkeypatch):
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 300, 5000).astype(np.uint16)
    tokens[np.sort(rng.choice(5000, 40, replace=False))] = 1
    tokens[0] = 1
    whole = leaks.sampled_windows(tokens)
    starts = np.flatnonzero(tokens == 1)
    alone = [leaks.sampled_windows(part) for part in np.split(tokens, starts[1:])]
    assert np.concatenate([part.hashes for part in alone]).tolist() == whole.hashes.tolist()
    assert [n for n, part in enumerate(alone) for _ in part.hashes] == whole.documents.tolist()
    assert 0.03 < len(whole.hashes) / len(tokens) < 0.09
    monkeypatch.setattr(leaks, "_SLICE", 64)
    assert leaks.sampled_windows(tokens).hashes.tolist() == whole.hashes.tolist()


# ---- Check, report ----------------------------------------------------------------------------------------


@pytest.fixture
def folder(published, tmp_path) -> Path:
    """A prepared folder of several shards."""
    stream = [prepare.make_document(text, "") for text in sentences(120, seed=2)]
    prepare.prepare(stream, published, tmp_path / "set", VAL_DOCS, shard_tokens=3000)
    return tmp_path / "set"


def change(path: Path, place: int, value: int) -> None:
    """Replace one value of a shard."""
    values = np.array(read_shard(path))
    values[place] = value
    path.write_bytes(shard_bytes(values))


def edit(folder: Path, *keys: str, value: object) -> None:
    part = manifest = json.loads((folder / "manifest.json").read_text())
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))


def leak(folder: Path) -> None:
    """Put a validation document over the beginning of the second training shard."""
    val, path = read_shard(folder / "fineweb_val_000000.bin"), folder / "fineweb_train_000001.bin"
    document = val[: np.flatnonzero(val == 1)[1] + 1]
    values = np.array(read_shard(path))
    values[50 : 50 + len(document)] = document
    path.write_bytes(shard_bytes(values))
    (folder / "manifest.json").unlink()


VAL0, BYTES0, TRAIN0, TRAIN1 = (
    f"fineweb_{name}.bin" for name in ("val_000000", "val_bytes_000000", "train_000000", "train_000001")
)
FAULTS = {
    "flipped": (lambda f: change(f / TRAIN1, 7, 99), [TRAIN1, "SHA-256"]),
    "truncated": (lambda f: (f / TRAIN1).write_bytes((f / TRAIN1).read_bytes()[:-2]), [TRAIN1, "bytes, but"]),
    "foreign": (lambda f: (f / TRAIN1).write_bytes(b"x" * 2000), [TRAIN1, "not a shard"]),
    "missing": (lambda f: (f / TRAIN1).unlink(), [TRAIN1, "is missing"]),
    "extra": (
        lambda f: (f / "fineweb_train_000099.bin").write_bytes((f / TRAIN0).read_bytes()),
        ["without gaps", "fineweb_train_000099.bin: is not in the manifest"],
    ),
    "no sidecar": (lambda f: (f / BYTES0).unlink(), [BYTES0, "is missing"]),
    "short sidecar": (
        lambda f: (f / BYTES0).write_bytes(shard_bytes(np.zeros(5))),
        ["5 entries for the 3000"],
    ),
    "BOS charged": (lambda f: change(f / BYTES0, 0, 3), ["charges bytes to BOS"]),
    "shifted sidecar": (
        lambda f: (f / BYTES0).write_bytes(shard_bytes(np.roll(read_shard(f / BYTES0), 1))),
        ["the sidecar is not that of these tokens"],
    ),
    "byte total": (lambda f: edit(f, "splits", "val", "bytes", value=7), ["charges", "manifest says 7"]),
    "documents": (lambda f: edit(f, "splits", "train", "documents", value=7), ["train documents", "says 7"]),
    "first token": (lambda f: change(f / TRAIN0, 0, 9), ["does not begin with BOS"]),
    "vocabulary": (lambda f: change(f / TRAIN0, 5, 9000), ["token 9000", "8192"]),
    "tokenizer": (lambda f: (f / PUBLISHED).write_bytes(b"x"), [PUBLISHED, "is not the tokenizer"]),
    "no tokenizer": (lambda f: (f / PUBLISHED).unlink(), ["tokenizer is missing"]),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), ["no manifest.json", "--write-manifest"]),
    "bad manifest": (lambda f: (f / "manifest.json").write_text("[1]"), ["not a manifest"]),
    "unfinished": (
        lambda f: (f / ".unfinished.json").write_text("{}"),
        ["was not finished", "repeat the command"],
    ),
    "leak": (leak, ["1 of 20 validation documents are training documents too"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_data_check_finds(folder, fault):
    assert check_folder(folder)[0] == []
    damage, words = FAULTS[fault]
    damage(folder)
    found = "\n".join(check_folder(folder)[0])
    for word in words:
        assert word in found
    assert all("prepare_caseops_data.py --" in line or "repeat" in line for line in found.splitlines())


def test_data_check_on_the_command_line(folder):
    result = run("--check", folder, "--report")
    assert result.returncode == 0 and result.stdout.endswith(f"checked {folder} problems:0\n")
    assert "document_tokens_p50" in result.stdout
    before = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").unlink()
    result = run("--check", folder)
    assert result.returncode == 2 and "problem: " in result.stdout
    assert run("--check", folder, "--write-manifest").returncode == 0
    assert run("--check", folder).returncode == 0
    manifest, made = json.loads((folder / "manifest.json").read_text()), json.loads(before)
    assert manifest["files"] == made["files"] and manifest["origin"] == "scanned"
    assert manifest["report"]["val"] == made["report"]["val"]
    assert run("--check", folder / "nowhere").stderr.endswith("nowhere: no such folder\n")


def test_data_report_says_what_the_data_are(folder, published):
    texts = sentences(120, seed=2)
    manifest = json.loads((folder / "manifest.json").read_text())
    lengths = sorted(len(tokenise(published.processor, [text])) for text in texts[:VAL_DOCS])
    said = manifest["report"]["val"]["document_tokens"]
    assert said == {
        "min": lengths[0],
        "p1": lengths[0],
        "p10": lengths[1],
        "p50": lengths[9],
        "p90": lengths[17],
        "p99": lengths[19],
        "max": lengths[19],
    }
    counts = manifest["splits"]["val"]
    assert manifest["report"]["val"]["bytes_per_token"] == round(counts["bytes"] / counts["tokens"], 6)
    size = sum(len(text.encode()) for text in texts[:VAL_DOCS])
    assert counts["bytes"] + counts["uncharged_bytes"] == size
    table = report_table(manifest)
    assert f"{counts['tokens']:,}" in table and f"{counts['uncharged_bytes']:,}" in table


def test_data_scan_of_documents_across_chunks_and_shards(tmp_path, monkeypatch):
    """However the tokens are cut and however many processes read them: also where a shard begins none."""
    rng = np.random.default_rng(0)
    lengths = [1, 1, 300, 2, *rng.integers(1, 90, 40)]
    documents = [np.append(np.uint16(1), rng.integers(2, 300, n - 1, np.uint16)) for n in lengths]
    tokens = np.concatenate([np.array([7, 8], np.uint16), *documents])  # of a document begun before
    found = []
    for size, chunk, workers in ((10**6, 10**6, 1), (40, 37, 1), (40, 37, 2)):
        folder = tmp_path / f"{size} {workers}"
        folder.mkdir()
        for number, start in enumerate(range(0, len(tokens), size)):
            shard = folder / f"fineweb_train_{number:06d}.bin"
            shard.write_bytes(shard_bytes(tokens[start : start + size]))
        monkeypatch.setattr("dataprep.scanning.CHUNK_TOKENS", chunk)
        paths = shard_paths(folder, "train")
        shards = scan_shards(paths, workers)
        found.append(joined(shards[path.name].scan for path in paths))
        assert [shards[path.name].sha256 for path in paths] == [*map(file_sha256, paths)]
    for scan in found:
        assert scan.counts == {**found[0].counts, "documents": len(lengths), "tokens": len(tokens)}
        assert (scan.first, scan.highest, scan.lengths) == (7, tokens.max(), Counter(lengths))
        assert scan.hashes.tolist() == found[0].hashes.tolist()
    assert len(set(found[0].hashes.tolist())) == len({document.tobytes() for document in documents})


def test_data_files_appear_whole(tmp_path, monkeypatch):
    """A write that fails leaves the old file and no temporary one, and names the file."""
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_whole(path, b"new")
    assert error.value.filename == str(path)
    assert contents(tmp_path) == {"file.bin": b"old"}


# ---- Memory -----------------------------------------------------------------------------------------------


def resident_kb(pid: int) -> int:
    """Memory of a process and its descendants, shared pages counted once."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    lines = [line.split() for line in rollup.splitlines()]
    own = sum(int(line[1]) for line in lines if line[0] == "Pss:")
    return own + sum(resident_kb(int(child)) for child in children)


def test_prepare_document_of_30_mb_in_bounded_memory(model, tmp_path):
    """Large documents in both splits, two workers: the processes together stay below 1 GB."""
    text = " ".join(sentences(400, seed=7))
    big = text * (30_000_000 // len(text.encode()) + 1)
    docs = tmp_path / "big.jsonl"
    with open(docs, "w") as file:
        for document in ("Small one.", big[: len(big) // 50], big, "Small other.", big[: len(big) // 8]):
            file.write(json.dumps({"text": document}) + "\n")
    command = ["--docs", docs, "--sp", model, "--out", tmp_path / "out", "--val-docs", 2, "--workers", 2]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident_kb(process.pid))
        time.sleep(0.1)
    assert process.returncode == 0, process.stderr.read()
    process.stderr.close()
    print(f"peak_mb:{peak / 1e3:.0f}")
    assert 200_000 < peak < 1_000_000
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    size = len(big.encode()) + len("Small other.") + len(big[: len(big) // 8].encode())
    assert manifest["splits"]["train"]["bytes"] == size
