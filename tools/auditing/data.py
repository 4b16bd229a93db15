"""Checks A1-A4: the data."""

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import lossless_caps
from auditing.run import BOS, Audit, NotChecked, check, read_values, require
from dataprep.encoding import Encoder, make_tokenizer, tokenise_validation
from dataprep.reading import Reader, parse_block
from scripts import sha256_of

CONTEST_DOCUMENTS = 50_000
PREFIX_TOKENS = 64  # what counts as the same opening of a document
ADVERSARIAL = (
    *("", " ", "\n\t ", "A", "aB", "NASA's iPhone", "ÄÖÜ ß ẞ İstanbul ı", "e\u0301 E\u0301"),
    *("\u212b \ufb01 \uff21", "\ue001 \ue002x \ue003\ue004 \ue004", "Hello\ue002WORLD", "X\u200dY\ufeff"),
    *("\U0001d518nit \U0001f469\u200d\U0001f467 \U0010ffff", "\uff21\uff22abcABC", "\u2581 \u2581A"),
    *("\x00\x01\x7f", "RTL \u202eABC\u202c", "a" * 70 + "B" * 70, "McDONALD O'Neil USA's UsA"),
)


@check("A1", "validation set whole: documents, tokens, bytes")
def a1_validation_is_whole(audit: Audit) -> str:
    """Counts against the manifest, checksums against manifest and ledger, and what was scored."""
    documents, targets = len(audit.documents), len(audit.tokens) - 1
    total = int(audit.sidecar.sum())
    found = {"documents": documents, "tokens": targets + 1, "bytes": total}
    said = audit.manifest.get("splits", {}).get("val", {})
    for key, value in found.items():
        require(said.get(key, value) == value, f"{value:,} {key}, the manifest says {said.get(key):,}")
    if not said:
        require(documents == CONTEST_DOCUMENTS, f"{documents:,} documents without a manifest, must be 50,000")
    files = audit.shards("val") + (audit.shards("val_bytes") if audit.cfg.caseops_enabled else [])
    with contextlib.suppress(NotChecked):
        for name, digest in audit.head["val_sha256"].items():
            path = audit.data_folder / name
            require(path.is_file() and sha256_of(path) == digest, f"{name}: not the file that the run scored")
    for path in files:
        listed = audit.manifest.get("files", {}).get(path.name, {}).get("sha256")
        require(listed in (None, sha256_of(path)), f"{path.name}: another checksum than in the manifest")
    final = audit.result["stages"][audit.result["final_stage"]]
    scored = final["targets"], final["bytes"]
    whole = f"{targets:,} targets and {total:,} bytes"
    require(scored == (targets, total), f"scored {scored[0]:,} and {scored[1]:,} of {whole}")
    note = "" if documents == CONTEST_DOCUMENTS else "; NOT the contest's 50,000 documents"
    note += "; UNVERIFIED by the run itself" if "unverified_data" in audit.result else ""
    return f"{documents:,} documents, {targets:,} targets, {total:,} bytes, all scored{note}"


def _openings(tokens: np.ndarray) -> Iterator[bytes]:
    """The first tokens of each document; of a shorter one all, with where it ends."""
    starts = np.flatnonzero(tokens == BOS)
    for start, end in itertools.pairwise([*starts, len(tokens)]):
        yield np.asarray(tokens[start : min(start + PREFIX_TOKENS, end)], np.uint16).tobytes()


@check("A2", "no validation document among the training documents")
def a2_no_overlap(audit: Audit) -> str:
    """The opening of every validation document is looked for at every document start of every train shard."""
    paths = audit.shards("train")
    if not paths:
        raise NotChecked(f"{audit.data_folder}: no training shards here")
    openings = {opening: number for number, opening in enumerate(_openings(audit.tokens))}
    seen = 0
    for path, tokens in zip(paths, _with_next_start(paths), strict=True):
        listed = audit.manifest.get("files", {}).get(path.name, {}).get("sha256")
        require(listed in (None, sha256_of(path)), f"{path.name}: another checksum than in the manifest")
        for opening in _openings(tokens):
            seen += 1
            where = f"validation document {openings.get(opening)} opens a document of {path.name}"
            require(opening not in openings, where)
    return f"{len(openings):,} openings of {PREFIX_TOKENS} tokens, none among {seen:,} training documents"


def _with_next_start(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    """Tokens of each shard and what follows in the next: a document may run on across the end."""
    for path, following in itertools.zip_longest(paths, paths[1:]):
        tokens = read_values(path)
        rest = read_values(following)[:PREFIX_TOKENS] if following else tokens[:0]
        bos = np.flatnonzero(rest == BOS)
        yield np.concatenate([tokens, rest[: bos[0]] if len(bos) else rest])


@check("A3", "bytes charged = UTF-8 bytes of the original text")
def a3_bytes(audit: Audit) -> str:
    """BOS carries none; each document's sum is the size of its text, decoded or (--docs) original."""
    starts = [start for start, _ in audit.documents]
    entries, tokens = len(audit.sidecar), len(audit.tokens)
    require(entries == tokens, f"{entries:,} byte counts for {tokens:,} tokens")
    charging = np.count_nonzero(audit.sidecar[starts])
    require(not charging, f"{charging} BOS tokens carry bytes")
    if audit.docs:
        return _recount(audit)
    sizes = [(len(text.encode()), charged) for text, charged in audit.texts]
    text_bytes, charged = (sum(column) for column in zip(*sizes, strict=True))
    flattered = sum(charged > size for size, charged in sizes)
    figure = f"{charged:,} bytes charged, {text_bytes:,} decoded in {len(sizes):,} documents"
    uncharged = audit.manifest.get("splits", {}).get("val", {}).get("uncharged_bytes", "unknown")
    notes = f"uncharged bytes: {uncharged}"
    if audit.manifest.get("tokenizer", {}).get("lossless"):
        require(charged == text_bytes and not flattered, f"{figure}; {flattered} charged too many")
        return f"{figure}; {notes}; tokenizer lossless"
    if flattered:
        raise NotChecked(
            f"{figure}: LOSSY tokenizer, {flattered} documents charge more; give --docs; {notes}"
        )
    return f"{figure}; {notes}; LOSSY tokenizer"


def _recount(audit: Audit) -> str:
    """Tokens and bytes of the validation documents made anew from the original texts."""
    path = audit.script.tokenizer_file(audit.cfg)
    encoder = Encoder(make_tokenizer(str(path), path.read_bytes()))
    documents = (document for block in Reader([audit.docs]) for document in parse_block(block).documents)
    place = charged = original = 0
    for document in itertools.islice(documents, audit.manifest.get("val_docs")):
        if document.size and place < len(audit.tokens):
            tokens, counts, _ = tokenise_validation(encoder, document)
            span = slice(place, place + len(tokens))
            same = np.array_equal(audit.tokens[span], tokens)
            require(same, f"{document.origin}: has other tokens than the shards from token {place:,} on")
            require(np.array_equal(audit.sidecar[span], counts), f"{document.origin}: carries other bytes")
            place += len(tokens)
            charged += int(counts.sum())
            original += document.size
    found = len(audit.tokens)
    require(place == found, f"the documents have {place:,} tokens, the shards {found:,}")
    return f"{charged:,} bytes recounted from {audit.docs}, {original - charged:,} of the originals uncharged"


@check("A4", "text transform is a bijection")
def a4_round_trip(audit: Audit) -> str:
    """decode(encode(text)) == text for documents and hostile Unicode; the texts against the manifest."""
    if not audit.cfg.caseops_enabled:
        return "plain text, no transform (CASEOPS_ENABLED=0)"
    texts = [text for text, _ in audit.texts]
    for text in [*texts, *ADVERSARIAL]:
        back = lossless_caps.decode(lossless_caps.encode(text))
        require(back == text, f"{text[:30]!r} comes back as {back[:30]!r}")
    digests = [sha256_of(text.encode())[:16] for text in texts]
    listed = Counter(audit.manifest.get("val_document_sha256", []))
    lossless = audit.manifest.get("tokenizer", {}).get("lossless")
    if lossless and listed:
        strange = (Counter(digests) - listed).total()
        require(not strange, f"{strange} of {len(texts)} decoded documents are not in the manifest")
    proof = (
        f"{len(texts):,} hashes as in the manifest" if lossless and listed else "LOSSY tokenizer or no hashes"
    )
    return f"{len(texts):,} documents and {len(ADVERSARIAL)} hostile strings come back; {proof}"
