"""Checks A1-A5: the data."""

import contextlib
import itertools
import math
import random
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

import lossless_caps
from auditing.phrases import no_nearer, window_sums
from auditing.run import (
    BOS,
    FEWEST_DOCUMENTS,
    RECOMPUTED,
    SAMPLE_DOCUMENTS,
    Audit,
    NotChecked,
    check,
    read_values,
    require,
    short,
)
from auditing.sets import CONTEST_DOCUMENTS, contest_set
from dataprep.checking import SHARED, too_near
from dataprep.encoding import Encoder, make_tokenizer, most_bytes
from dataprep.fusion import fused, marker_pairs, pairs_of, unfused
from dataprep.leaks import NearIndex, Overlap
from dataprep.reading import Reader, parse_block
from dataprep.sidecar import is_lossless
from scripts import sha256_of

PREFIX_TOKENS = 64  # what counts as the same opening of a document
PASSAGE = 32  # tokens, from anywhere in a document, that count as the same text
AT_ONCE = 1 << 22  # tokens whose passages are looked at together
NAMED = 3  # documents that a verdict names
LONGEST_PIECE = 64  # characters; SentencePiece makes none of more than 16
BETTER, ERRORS = 1.05, 4.0  # bytes a token on validation text by chance: times, and standard errors
CONTEST_TOKENIZERS = {  # SHA-256 of the published SP8192 models, of plain text and of CaseOps: NFKC
    "4e979c92754cc9d7bdebd9dfe5edf3fc0b41b38714b394e4297fa851e3afd516",
    "97754754561f20def5edd99765ca0668f880bd94e67316d54aa10ab25f45cc4d",
}
ADVERSARIAL = (
    *("", " ", "\n\t ", "A", "aB", "NASA's iPhone", "ÄÖÜ ß ẞ İstanbul ı", "e\u0301 E\u0301"),
    *("\u212b \ufb01 \uff21", "\ue001 \ue002x \ue003\ue004 \ue004", "Hello\ue002WORLD", "X\u200dY\ufeff"),
    *("\U0001d518nit \U0001f469\u200d\U0001f467 \U0010ffff", "\uff21\uff22abcABC", "\u2581 \u2581A"),
    *("\x00\x01\x7f", "RTL \u202eABC\u202c", "a" * 70 + "B" * 70, "McDONALD O'Neil USA's UsA"),
)


@check("A1", "validation set whole: documents, tokens, bytes", RECOMPUTED)
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
    contest = documents == CONTEST_DOCUMENTS and contest_set(targets, total)
    note = "" if contest else "; NOT the contest's validation set, by its counts"
    copies = documents - len({audit.tokens[start : start + n].tobytes() for start, n in audit.documents})
    note += f"; {copies:,} documents are copies of others" * (copies > 0)
    note += "; UNVERIFIED by the run itself" if "unverified_data" in audit.result else ""
    return f"{documents:,} documents, {targets:,} targets, {total:,} bytes, all scored{note}"


def _openings(tokens: np.ndarray) -> Iterator[tuple[int, bytes]]:
    """Where each document starts, and its first tokens; of a shorter one all, with where it ends."""
    starts = np.flatnonzero(tokens == BOS)
    for start, end in itertools.pairwise([*starts, len(tokens)]):
        yield start, np.asarray(tokens[start : min(start + PREFIX_TOKENS, end)], np.uint16).tobytes()


@check("A2", "no validation document among the training documents", RECOMPUTED)
def a2_no_overlap(audit: Audit) -> str:
    """The opening of every validation document is looked for at every document start of every train shard.

    A document that is there as a whole breaks the rule. Two may well begin alike, as two licences do, but not
    many; nor may passages from anywhere come again more often than by chance. Documents that are nearly there
    are counted by windows of 16 tokens, as the data preparation does.
    """
    paths = audit.shards("train")
    if not paths:
        raise NotChecked(f"{audit.data_folder}: no training shards here")
    openings: dict[bytes, list[int]] = {}
    for number, (_, opening) in enumerate(_openings(audit.tokens)):
        openings.setdefault(opening, []).append(number)
    passages, found, alike, seen = _passages(audit), set(), set(), 0
    index, near = NearIndex.of_stream(audit.tokens.astype(np.uint16)), Overlap(0, set())
    for path, tokens in zip(paths, _with_next_start(paths), strict=True):
        listed = audit.manifest.get("files", {}).get(path.name, {}).get("sha256")
        require(listed in (None, sha256_of(path)), f"{path.name}: another checksum than in the manifest")
        for start, opening in _openings(tokens):
            seen += 1
            for number in openings.get(opening, ()):
                alike.add(number)
                first, count = audit.documents[number]
                there = tokens[start : start + count]
                whole = np.array_equal(there, audit.tokens[first : first + len(there)])
                require(not whole, f"validation document {number} opens a document of {path.name}")
        found |= _found(tokens, passages)
        part = index.overlap(tokens)
        near = Overlap(near.documents + part.documents, near.held | part.held)
    share = f"{len(alike):,} of {len(audit.documents):,} validation documents open as training documents do"
    require(len(alike) <= 1 + SHARED * len(audit.documents), share)
    again = f"of {len(passages):,} passages of {PASSAGE} tokens {len(found):,} stand in training text"
    require(len(found) <= 1 + SHARED * len(passages), again)
    problem = too_near(near, audit.manifest, len(audit.documents), len(paths))
    require(not problem, problem)
    figure = f"{len(openings):,} openings of {PREFIX_TOKENS} tokens, {len(alike) or 'none'} among {seen:,}"
    others = " (of other documents)" * bool(alike)
    nearly = f"{near.documents:,} training documents near one"
    return f"{figure} training documents{others}; {again}; {nearly}{no_nearer(audit, paths)}"


def _passages(audit: Audit) -> set[bytes]:
    """A passage from anywhere in each validation document that is long enough, where nobody could foresee."""
    dice = random.Random(audit.sample_seed)
    long = [(start + 1, n - 1) for start, n in audit.documents if n > PASSAGE]
    long = dice.sample(long, min(len(long), SAMPLE_DOCUMENTS))
    places = [start + dice.randint(0, count - PASSAGE) for start, count in long]
    return {np.asarray(audit.tokens[place : place + PASSAGE], np.uint16).tobytes() for place in places}


def _found(tokens: np.ndarray, passages: Collection[bytes]) -> set[bytes]:
    """Those of some passages that stand anywhere in a stream."""
    wanted = np.array(
        [window_sums(np.frombuffer(passage, np.uint16), PASSAGE)[0] for passage in passages], np.uint64
    )
    first_bits = np.zeros(1 << 20, bool)
    first_bits[wanted >> np.uint64(44)] = True
    found = set()
    for start in range(0, len(tokens) - PASSAGE + 1, AT_ONCE):
        part = np.asarray(tokens[start : start + AT_ONCE + PASSAGE - 1], np.uint16)
        sums = window_sums(part, PASSAGE)
        likely = np.flatnonzero(first_bits[sums >> np.uint64(44)])
        places = likely[np.isin(sums[likely], wanted)]
        found |= {part[place : place + PASSAGE].tobytes() for place in places.tolist()}
    return found & set(passages)


def _with_next_start(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    """Tokens of each shard and what follows in the next: a document may run on across the end."""
    for path, following in itertools.zip_longest(paths, paths[1:]):
        tokens = read_values(path)
        rest = read_values(following)[:PREFIX_TOKENS] if following else tokens[:0]
        bos = np.flatnonzero(rest == BOS)
        yield np.concatenate([tokens, rest[: bos[0]] if len(bos) else rest])


@check("A3", "bytes charged = UTF-8 bytes of the original text", RECOMPUTED)
def a3_bytes(audit: Audit) -> str:
    """BOS carries none; each document's sum is the size of its text, decoded or (--docs) original."""
    starts = [start for start, _ in audit.documents]
    entries, tokens = len(audit.sidecar), len(audit.tokens)
    require(entries == tokens, f"{entries:,} byte counts for {tokens:,} tokens")
    charging = np.count_nonzero(audit.sidecar[starts])
    require(not charging, f"{charging} BOS tokens carry bytes")
    if audit.options.docs:
        return _recount(audit)
    sizes = [(len(text.encode()), charged) for text, charged in audit.texts]
    text_bytes, charged = (sum(column) for column in zip(*sizes, strict=True))
    flattered = sum(charged > size for size, charged in sizes)
    figure = f"{charged:,} bytes charged, {text_bytes:,} decoded in {len(sizes):,} documents"
    uncharged = audit.manifest.get("splits", {}).get("val", {}).get("uncharged_bytes", "unknown")
    notes = f"uncharged bytes: {uncharged}"
    told = audit.manifest.get("tokenizer", {}).get("lossless")
    right = charged == text_bytes and not flattered
    require(right or not told, f"{figure}; {flattered} charged too many")
    if flattered:
        raise NotChecked(
            f"{figure}: LOSSY tokenizer, {flattered} documents charge more; give --docs; {notes}"
        )
    processor = audit.script.load_tokenizer(audit.cfg)
    if is_lossless(processor):
        return f"{figure}; {notes}; tokenizer lossless"
    if _of_the_contest(audit):
        return f"{figure}; {notes}; LOSSY tokenizer, the contest's"
    if not audit.cfg.caseops_enabled:  # whose bytes are those of the original letters, however they are spelt
        longer = sum(_lengthens(processor, text) for text, _ in audit.texts)
        require(not longer, f"{figure}; {longer} are longer when encoded and decoded again: so were these")
    raise NotChecked(
        f"{figure}: LOSSY tokenizer, not the contest's, so the originals may be shorter; give --docs; {notes}"
    )


def _of_the_contest(audit: Audit) -> bool:
    """Whether the tokenizer is one that the contest's data are made with, or the counts are those of such."""
    if sha256_of(audit.script.tokenizer_file(audit.cfg)) in CONTEST_TOKENIZERS:
        return True
    counts = len(audit.tokens) - 1, int(audit.sidecar.sum())
    return len(audit.documents) == CONTEST_DOCUMENTS and contest_set(*counts) is not None


def _lengthens(processor: sentencepiece.SentencePieceProcessor, text: str) -> bool:
    """Whether a decoded text, encoded and decoded again, is longer.

    It may come back as another one without harm (a few sequences of accents take NFKC by SentencePiece two
    times), and so it does where a piece is unknown, which is decoded to a mark between spaces.
    """
    tokens = processor.encode(text)
    longer = len(processor.decode(tokens).encode()) > len(text.encode())
    return longer and processor.unk_id() not in tokens


def _encoder(audit: Audit) -> Encoder:
    """What makes tokens of texts, by the run's tokenizer."""
    path = audit.script.tokenizer_file(audit.cfg)
    return Encoder(make_tokenizer(str(path), path.read_bytes(), plain=not audit.cfg.caseops_enabled))


def _recount(audit: Audit) -> str:
    """Tokens and bytes of the validation documents made anew from the original texts."""
    encoder = _encoder(audit)
    documents = (
        document for block in Reader([audit.options.docs]) for document in parse_block(block).documents
    )
    place = charged = original = over = 0
    longer, refused = [], []
    pairs = pairs_of(audit.manifest)
    for document in itertools.islice(documents, audit.manifest.get("val_docs")):
        if document.size and place < len(audit.tokens):
            tokens, counts = encoder.counted_alone(document.utf8)
            if pairs:
                tokens, counts = fused(tokens, pairs, counts)
            span = slice(place, place + len(tokens))
            same = np.array_equal(audit.tokens[span], tokens)
            require(same, f"{document.origin}: has other tokens than the shards from token {place:,} on")
            require(np.array_equal(audit.sidecar[span], counts), f"{document.origin}: carries other bytes")
            place += len(tokens)
            own = int(counts.sum(dtype=np.int64))
            charged += own
            original += document.size
            if own > document.size:
                over += own - document.size
                longer.append(f"{document.origin}: {own:,} for {document.size:,}")
                refused += longer[-1:] if own > most_bytes(document.text) else []
    found = len(audit.tokens)
    require(place == found, f"the documents have {place:,} tokens, the shards {found:,}")
    sums = f"{charged:,} bytes charged, the originals have {original:,}"
    named = refused or longer
    which = f"charged more than they have: {len(named):,} documents ({'; '.join(named[:NAMED])})"
    require(not refused and charged <= original, f"{sums}; {which}")
    uncharged = f"{original - charged + over:,} of the originals uncharged"
    note = f"; NFKC adds {over:,} bytes; {which}" if longer else ""
    return f"{charged:,} bytes recounted from {audit.options.docs}, {uncharged}{note}"


@check("A4", "text transform is a bijection", RECOMPUTED)
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
    if is_lossless(audit.script.load_tokenizer(audit.cfg)):
        _encoded_again(audit)
        proof += ", and are encoded to the tokens of the shards"
    return f"{len(texts):,} documents and {len(ADVERSARIAL)} hostile strings come back; {proof}"


def _encoded_again(audit: Audit) -> None:
    """Raise Failed where a decoded document has other tokens than the shards.

    A tokenizer whose pieces were given longer texts afterwards decodes to more bytes, and encodes otherwise.
    """
    encoder, pairs = _encoder(audit), pairs_of(audit.manifest)
    for (start, length), (text, _) in zip(audit.drawn_documents, audit.texts, strict=True):
        tokens = encoder.tokens_alone(text.encode())
        tokens = fused(tokens, pairs)[0] if pairs else tokens
        same = np.array_equal(audit.tokens[start : start + length], tokens)
        require(same, f"the document at token {start:,} has other tokens when its text is encoded again")


def _bytes_per_token(audit: Audit, tokens: np.ndarray) -> np.ndarray:
    """Bytes of text that a token stands for, of documents of a stream: a sample. (documents,)"""
    processor = audit.script.load_tokenizer(audit.cfg)
    decode = lossless_caps.decode if audit.cfg.caseops_enabled else str
    fusion = pairs_of(audit.manifest)
    pairs = [(a + 1, b) for a, b in itertools.pairwise([*np.flatnonzero(tokens == BOS), len(tokens)])]
    found = []
    for first, end in random.Random(audit.sample_seed).sample(pairs, min(len(pairs), 1000)):
        with contextlib.suppress(lossless_caps.LosslessCapsError):  # a document that a shard cuts off
            spelt = unfused(tokens[first:end], fusion)[0].tolist()
            size = len(decode(processor.decode(spelt)).encode())
            found += [size / (end - first)] if end > first else []
    return np.array(found)


@check("A5", "the tokenizer holds no validation text", RECOMPUTED)
def a5_tokenizer(audit: Audit) -> str:
    """The manifest's; no piece is long, and validation text takes as many tokens a byte as training text."""
    model = audit.script.tokenizer_file(audit.cfg)
    listed, found = audit.manifest.get("tokenizer", {}).get("sha256"), sha256_of(model)
    require(listed in (None, found), f"{model.name}: another checksum than in the manifest")
    processor = audit.script.load_tokenizer(audit.cfg)
    fusion = pairs_of(audit.manifest)
    require(not fusion or fusion == marker_pairs(processor), "fused_markers are not the tokenizer's")
    every = range(processor.get_piece_size())
    longest, token = max((max(len(processor.id_to_piece(t)), len(processor.decode([t]))), t) for t in every)
    require(longest <= LONGEST_PIECE, f"piece {token} has {longest:,} characters: text that nobody counts")
    paths = audit.shards("train")
    if not paths:
        raise NotChecked(f"{audit.data_folder}: no training shards here")
    path = random.Random(audit.sample_seed).choice(paths)
    ours, theirs = (_bytes_per_token(audit, stream) for stream in (audit.tokens, read_values(path)))
    if min(len(ours), len(theirs)) < FEWEST_DOCUMENTS:
        raise NotChecked(f"{len(ours)} and {len(theirs)} documents are too few for a spread")
    error = math.sqrt(sum(ratios.var(ddof=1) / len(ratios) for ratios in (ours, theirs)))
    figure = f"{ours.mean():.3f} bytes a token in {len(ours):,} validation documents, {theirs.mean():.3f} in"
    figure += f" {len(theirs):,} of training"
    known = ours.mean() > BETTER * theirs.mean() and ours.mean() - theirs.mean() > ERRORS * error
    require(not known, f"made for validation text: {figure}")
    return f"{figure}; no piece of more than {longest} characters; tokenizer {short(found)}"
