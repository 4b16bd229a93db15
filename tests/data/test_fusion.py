"""Fused markers: nothing of a text or its bytes is lost, and the check and the audit know them."""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_prep import PUBLISHED, VAL_DOCS, change, edit, run, sentences, write_jsonl

import prepare_caseops_data as prepare
from dataprep import encoding
from dataprep.checking import check_folder
from dataprep.encoding import make_tokenizer
from dataprep.fusion import fused, marker_pairs, pairs_of, unfused
from dataprep.shards import DataError, read_shard
from dataprep.worker import HeldOut, Worker

sys.path.insert(0, str(Path(prepare.__file__).parent / "tools"))

from auditing import data as audit_data  # noqa: E402
from auditing.run import Audit, Failed  # noqa: E402

VAL, BYTES, TRAIN = (f"fineweb_{name}_000000.bin" for name in ("val", "val_bytes", "train"))


def texts(count: int) -> list[str]:
    """Documents that a tokenizer which loses nothing gives back."""
    return [text.replace("\u2581", "").replace("\u200b", "") for text in sentences(count, seed=3)]


@pytest.fixture(scope="module")
def tokenizer() -> encoding.Tokenizer:
    return make_tokenizer("small.model", encoding.train_tokenizer(texts(50), 400), lossless=True)


@pytest.fixture(scope="module")
def pairs(tokenizer) -> dict:
    return marker_pairs(tokenizer.processor)


@pytest.fixture
def folders(tokenizer, tmp_path) -> tuple:
    """The same documents as they are, and fused."""
    for name in ("plain", "fused"):
        stream = [prepare.make_document(text, "") for text in texts(120)]
        own = tokenizer._replace(fused=name == "fused")
        prepare.prepare(stream, own, tmp_path / name, VAL_DOCS)
    return tmp_path / "plain", tmp_path / "fused"


@settings(max_examples=200)
@given(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 6])))
def test_fusion_loses_nothing(kinds):
    """Any stream of spaces, operators and other pieces comes back, with its bytes."""
    pairs = {8: (300, 4), 9: (300, 5), 10: (300, 6)}
    tokens = np.array([(1, 4, 5, 6, 7, 300, 301)[kind] for kind in kinds], np.uint16)
    carried = np.where(tokens < 8, 0, tokens % 7 + 1)
    stored, charges = fused(tokens, pairs, carried)
    assert charges.sum() == carried.sum() and len(stored) == len(charges)
    back, bytes_ = unfused(stored, pairs, charges)
    assert back.tolist() == tokens.tolist() and bytes_.tolist() == carried.tolist()
    left = list(zip(stored[:-1].tolist(), stored[1:].tolist(), strict=True))
    assert not {*left} & {*pairs.values()}, "a pair was left"


def test_fused_data_are_the_same_text_and_bytes(folders, pairs):
    plain, joined = folders
    said = [json.loads((folder / "manifest.json").read_text()) for folder in folders]
    assert pairs_of(said[1]) == pairs and "fused_markers" not in said[0]
    for split in ("val", "train"):
        assert said[0]["splits"][split]["bytes"] == said[1]["splits"][split]["bytes"]
    tokens, carried = unfused(read_shard(joined / VAL), pairs, read_shard(joined / BYTES))
    assert np.array_equal(tokens, read_shard(plain / VAL))
    assert np.array_equal(carried, read_shard(plain / BYTES))
    assert np.array_equal(unfused(read_shard(joined / TRAIN), pairs)[0], read_shard(plain / TRAIN))
    assert len(read_shard(joined / TRAIN)) < 0.97 * len(read_shard(plain / TRAIN))
    assert check_folder(joined)[0] == []


def test_check_knows_fused_tokens(folders, pairs):
    """A byte moved from a pair to its neighbour, or other pairs than the tokenizer's, are found."""
    joined = folders[1]
    place = int(np.flatnonzero(np.isin(read_shard(joined / VAL), list(pairs)))[0])
    before = np.array(read_shard(joined / BYTES))
    change(joined / BYTES, place, int(before[place]) + 1)
    change(joined / BYTES, place + 1, int(before[place + 1]) - 1)
    assert "the sidecar is not that of these tokens" in "\n".join(check_folder(joined)[0])
    edit(joined, "fused_markers", value={"8": [9, 4]})
    assert "fused_markers are not those of the tokenizer" in "\n".join(check_folder(joined)[0])


def test_check_takes_pairs_apart(tokenizer_dir, tmp_path):
    """A tokenizer that joins white space: the space of a pair may carry more, a byte piece may not."""
    published = make_tokenizer(PUBLISHED, (tokenizer_dir / PUBLISHED).read_bytes())
    stream = [prepare.make_document(f"number {n}" + " the old river saw it  Big" * 40, "") for n in range(40)]
    prepare.prepare(stream, published._replace(fused=True), tmp_path / "set", VAL_DOCS)
    edit(tmp_path / "set", "origin", value="scanned")  # or it would be believed: it is as it was prepared
    problems = [line for line in check_folder(tmp_path / "set")[0] if "sidecar" in line]
    assert problems == [] and (read_shard(tmp_path / "set" / BYTES) == 2).any()


def test_a_text_with_the_bytes_of_fused_tokens_is_refused(tokenizer):
    near = SimpleNamespace(near=lambda tokens: [])
    held_out = HeldOut(set(), set(), set(), np.zeros(1, np.uint64), near, False)
    for held in (None, held_out):
        worker = Worker(encoding.Encoder(tokenizer._replace(fused=True)), held)
        documents = [prepare.make_document(text, text[:4]) for text in ("good text", "bad\x01text")]
        result = worker(prepare.Block("", 0, documents))
        assert result.counts["documents"] == 1 and result.counts["bad_documents"] == 1
        assert result.bad == ["bad\x01: holds a byte 0, 1 or 2, which --fuse-markers needs for itself"]
    with pytest.raises(DataError, match="operator behind a space carries bytes"):
        fused(np.array([300, 4], np.uint16), {8: (300, 4)}, np.array([1, 3]))


def test_audit_recounts_fused_documents(folders, tokenizer, tmp_path):
    """A3 makes tokens and bytes anew from the texts; A5 compares the pairs with the tokenizer."""
    joined, docs = folders[1], write_jsonl(tmp_path / "docs.jsonl", texts(120))
    model = tmp_path / "small.model"
    model.write_bytes(tokenizer.model)
    manifest = json.loads((joined / "manifest.json").read_text())
    script = SimpleNamespace(tokenizer_file=lambda cfg: model)
    facts = {"cfg": SimpleNamespace(caseops_enabled=True), "script": script, "manifest": manifest}
    facts |= {"options": SimpleNamespace(docs=str(docs))}
    facts |= {"tokens": read_shard(joined / VAL), "sidecar": read_shard(joined / BYTES)}
    assert "0 of the originals uncharged" in audit_data._recount(SimpleNamespace(**facts))
    manifest.pop("fused_markers")
    with pytest.raises(Exception, match="other tokens than the shards"):
        audit_data._recount(SimpleNamespace(**facts))


def test_audit_reads_fused_documents(folders, tokenizer, tmp_path):
    """A3 to A5 decode them to the whole text with all its bytes; without the pairs, to another one."""
    joined, model = folders[1], tmp_path / "small.model"
    model.write_bytes(tokenizer.model)
    manifest = json.loads((joined / "manifest.json").read_text())
    tokens = np.array(read_shard(joined / VAL), np.int64)
    bounds = [*np.flatnonzero(tokens == 1).tolist(), len(tokens)]
    documents = [(start, end - start) for start, end in itertools.pairwise(bounds)]
    tools = {"tokenizer_file": lambda cfg: model, "load_tokenizer": lambda cfg: tokenizer.processor}
    facts = {"cfg": SimpleNamespace(caseops_enabled=True), "script": SimpleNamespace(**tools)}
    facts |= {"manifest": manifest, "tokens": tokens, "sidecar": read_shard(joined / BYTES), "sample_seed": 1}
    facts |= {"options": SimpleNamespace(docs=""), "documents": documents, "drawn_documents": documents}
    audit = SimpleNamespace(**facts, shards=lambda split: [joined / TRAIN])
    audit.texts = Audit.texts.func(audit)
    assert [text for text, _ in audit.texts] == texts(120)[:VAL_DOCS]
    assert "tokenizer lossless" in audit_data.a3_bytes(audit)
    assert f"{VAL_DOCS} hashes as in the manifest" in audit_data.a4_round_trip(audit)
    assert "bytes a token" in audit_data.a5_tokenizer(audit)
    manifest["fused_markers"] = {"8": [9, 4]}
    with pytest.raises(Failed, match="fused_markers are not the tokenizer's"):
        audit_data.a5_tokenizer(audit)


def test_fuse_markers_is_for_making_caseops_data(tmp_path):
    refused = run("--fuse-markers", "--plain", "--docs", "x", "--out", tmp_path, "--sp", "m")
    assert refused.returncode == 2 and "not allowed with --plain" in refused.stderr
    assert run("--check", tmp_path, "--fuse-markers").returncode == 2
