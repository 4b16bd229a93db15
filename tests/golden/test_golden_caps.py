"""CaseOps against the golden vectors (section 10, and the shard format of section 6.1)."""

import hashlib

import numpy as np
import pytest
from golden_tools import some, tokenizer_model

from dataprep.encoding import OPERATORS, Encoder, make_tokenizer, tokenise, tokenise_validation
from dataprep.reading import make_document
from dataprep.shards import BOS_ID, SHARD_HEADER_INTS, TRAIN_SHARD, DataFolder, ShardWriter
from lossless_caps import LosslessCapsError, decode, encode, piece_byte_counts


@pytest.fixture(scope="module")
def cases(golden_file):
    return some(golden_file("10_caseops/cases.jsonl"), "lines of 10_caseops/cases.jsonl")


@pytest.fixture(scope="module")
def decode_cases(golden_file):
    return golden_file("10_caseops/decode_cases.jsonl")


@pytest.fixture(scope="module")
def meta(golden_file):
    return golden_file("10_caseops/meta.json")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir, meta):
    model = tokenizer_model(tokenizer_dir, meta)
    return make_tokenizer(model.name, model.read_bytes())


@pytest.fixture(scope="module")
def mappings(cases, tokenizer):
    return [tokenizer.processor.encode(case["encoded"], out_type="offset_mapping") for case in cases]


def test_encode(cases, meta):
    assert len(cases) == meta["cases"]
    assert [case["id"] for case in cases if encode(case["text"]) != case["encoded"]] == []


def test_decode(cases):
    assert [case["id"] for case in cases if decode(case["encoded"]) != case["text"]] == []


def test_byte_counts_of_given_surfaces(cases):
    assert [c["id"] for c in cases if piece_byte_counts(c["surfaces"]) != c["byte_counts"]] == []


def test_unusual_strings_decode(decode_cases):
    unusual = [case for case in decode_cases if not case.get("error")]
    for case in some(unusual, "case of 10_caseops/decode_cases.jsonl without an error"):
        assert decode(case["encoded"]) == case["decoded"], ascii(case)
        assert (encode(case["decoded"]) == case["encoded"]) == case["reencodes_to_same"], ascii(case)
        assert piece_byte_counts([case["encoded"]]) == [case["byte_counts_single_piece"]], ascii(case)


def test_malformed_strings_raise(decode_cases):
    malformed = [case for case in decode_cases if case.get("error")]
    for case in some(malformed, "case of 10_caseops/decode_cases.jsonl with an error"):
        assert case["byte_counts_error"]
        with pytest.raises(LosslessCapsError):
            decode(case["encoded"])
        with pytest.raises(LosslessCapsError):
            piece_byte_counts([case["encoded"]])


def test_published_tokenizer(meta, tokenizer):
    expected = meta["tokenizer"]
    assert hashlib.sha256(tokenizer.model).hexdigest() == expected["sha256"]
    processor = tokenizer.processor
    assert processor.get_piece_size() == expected["vocab_size"]
    ids = [processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id()]
    assert ids == [expected[name] for name in ("pad_id", "bos_id", "eos_id", "unk_id")]
    operators = {f"U+{ord(operator):04X}": processor.piece_to_id(operator) for operator in OPERATORS}
    assert operators == expected["operator_ids"]


def test_token_ids(cases, mappings):
    wrong = [c["id"] for c, m in zip(cases, mappings, strict=True) if m["ids"] != c["token_ids"]]
    assert wrong == []


def test_surfaces(cases, mappings):
    wrong = []
    for case, mapping in zip(cases, mappings, strict=True):
        surfaces = [case["encoded"][start:end] for start, end in mapping["offsets"]]
        if surfaces != case["surfaces"]:
            wrong.append(case["id"])
    assert wrong == []


def test_validation_documents(cases, tokenizer, meta):
    """The whole path of a validation document: BOS and ids, 0 and byte counts, whether it comes back."""
    encoder = Encoder(tokenizer)
    charged_fully = round_trips = 0
    for case in cases:
        document = make_document(case["text"], case["id"])
        tokens, counts, round_trip = tokenise_validation(encoder, document)
        assert tokens.tolist() == [BOS_ID, *case["token_ids"]], case["id"]
        assert counts.tolist() == [0, *case["byte_counts"]], case["id"]
        assert round_trip == (case["decoded_tokens"] == case["encoded"]), case["id"]
        assert document.size == case["utf8_len"], case["id"]
        assert (counts.sum() == document.size) == case["sum_equals_utf8_len"], case["id"]
        charged_fully += counts.sum() == document.size
        round_trips += round_trip
    assert charged_fully == meta["cases_sum_equals_utf8_len"]
    assert round_trips == meta["cases_token_decode_equals_encoded"]


def test_training_documents(cases, tokenizer):
    expected = [token for case in cases for token in (BOS_ID, *case["token_ids"])]
    assert tokenise(tokenizer.processor, [case["text"] for case in cases]).tolist() == expected
    parts = Encoder(tokenizer).documents([case["text"].encode() for case in cases])
    assert np.frombuffer(b"".join(parts), np.uint16).tolist() == expected


def test_shard_format(golden_dir, tmp_path):
    """A shard written from the tokens of a golden one is the same file."""
    shards = sorted((golden_dir / "06_data/shards").glob("*.bin"))
    for number, shard in enumerate(some(shards, "06_data/shards/*.bin")):
        tokens = np.frombuffer(shard.read_bytes(), dtype="<u2", offset=4 * SHARD_HEADER_INTS)
        folder = DataFolder(tmp_path / str(number), overwrite=False)
        writer = ShardWriter(folder, TRAIN_SHARD, len(tokens) + 1)
        writer.add(tokens)
        writer.flush()
        assert (folder.path / "fineweb_train_000000.bin").read_bytes() == shard.read_bytes(), shard.name
