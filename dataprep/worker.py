"""What is done to a block of documents, in whichever process: tokens, and what there is to count."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from dataprep.encoding import Encoder, check_validation
from dataprep.fusion import fused, marker_pairs
from dataprep.leaks import NearIndex, document_hashes
from dataprep.reading import Block, Document, Identity, parse_block
from dataprep.shards import FIRST_OPERATOR_ID, OPERATOR_COUNT, DataError

SAMPLED_FIRST, SAMPLED_EVERY = 1000, 1000  # documents that SentencePiece tokenises too
EXAMPLES = 20  # near duplicates and bad documents named in the manifest


class HeldOut(NamedTuple):
    """What training documents are compared with: texts, texts without spaces, tokens, sampled windows."""

    digests: set[bytes]
    keys: set[bytes]
    starts: set[bytes]
    """Of the texts with these keys: where a start is another, the key need not be made."""
    tokens: np.ndarray
    """Hashes of the validation documents' tokens, ascending, (n,) uint64."""
    near: NearIndex
    drop_near: bool


class Result(NamedTuple):
    """What becomes of a block: tokens (uint16, BOS before each document) and what there is to count."""

    tokens: np.ndarray
    token_bytes: np.ndarray
    """Original bytes of each token, of validation documents only."""
    lengths: np.ndarray
    """Tokens of each document."""
    counts: Counter
    bad: list[str]
    notes: list[str]
    near: list[str]
    """Where near duplicates are."""
    held_out: list[Identity]
    """Of the validation documents."""
    refused: list[bytes]
    """Digests of validation documents that shards cannot hold, or the tokenizer not give back."""


class Worker:
    """Pure functions of a block; what they need is made once for each process."""

    def __init__(self, encoder: Encoder, held_out: HeldOut | None) -> None:
        self._encoder, self._held_out = encoder, held_out
        tokenizer = encoder.tokenizer
        self._pairs = marker_pairs(tokenizer.processor) if tokenizer.fused else {}

    def __call__(self, block: Block) -> Result:
        """Result of a block: of training where there is something held out, else of validation.

        Raises:
            DataError: the encoder's word on a sampled document is not SentencePiece's.
        """
        documents, bad, notes = parse_block(block)
        numbered = enumerate(documents, block.before)
        self._sample = {d.origin for n, d in numbered if n < SAMPLED_FIRST or n % SAMPLED_EVERY == 0}
        filled = [document for document in documents if document.utf8]
        notes += [f"{d.origin}: empty document left out" for d in documents if not d.utf8]
        result = self._validation(filled) if self._held_out is None else self._training(filled)
        operators = 0
        if not self._encoder.tokenizer.plain:  # there the same numbers are of other pieces
            operators = np.count_nonzero(result.tokens - np.uint16(FIRST_OPERATOR_ID) < OPERATOR_COUNT)
        bad += result.bad
        counts = Counter(
            result.counts,
            empty_documents=len(documents) - len(filled),
            bad_documents=len(bad),
            documents=len(result.lengths),
            tokens=len(result.tokens),
            operator_tokens=int(operators),
        )
        return result._replace(counts=counts, bad=bad, notes=notes)

    def _validation(self, documents: list[Document]) -> Result:
        tokens, token_bytes, counts, bad, kept, refused = [], [], Counter(), [], [], []
        found = self._encoder.counted([document.utf8 for document in documents])
        for document, (own, carried) in zip(documents, found, strict=True):
            try:
                round_trip = check_validation(self._encoder.tokenizer, document, own, carried)
                stored, charges = self._stored(document, own, carried)
            except DataError as error:
                bad.append(str(error))
                refused.append(document.digest)
                continue
            kept.append(document)
            if document.origin in self._sample:
                counts["sampled_documents"] += self._sampled(document, own, carried)
            tokens.append(stored)
            token_bytes.append(charges.astype(np.uint16))
            charged = int(charges.sum(dtype=np.int64))
            counts.update(  # each document by itself: what one lacks must not hide what another has too much
                bytes=charged,
                uncharged_bytes=max(document.size - charged, 0),
                overcharged_bytes=max(charged - document.size, 0),
                overcharged_documents=charged > document.size,
                round_trip_documents=round_trip,
            )
        own = [document.identity for document in kept], refused
        return Result(_joined(tokens), _joined(token_bytes), _lengths(tokens), counts, bad, [], [], *own)

    def _training(self, documents: list[Document]) -> Result:
        own, counts, bad = [], Counter(), []
        for document in documents:
            if document.start not in self._held_out.starts or document.key not in self._held_out.keys:
                own.append(document)
            elif document.digest in self._held_out.digests:
                counts["dropped_duplicates"] += 1
            else:
                counts["dropped_space_duplicates"] += 1
        found = self._encoder.documents([document.utf8 for document in own])
        pairs = zip(own, found, strict=True)
        counts["sampled_documents"] = sum(self._sampled(d, t) for d, t in pairs if d.origin in self._sample)
        kept, tokens = own, found
        if self._pairs:
            kept, tokens = self._fused(own, found, bad)
        stream, lengths = _joined(tokens), _lengths(tokens)
        same = self._same_tokens(stream, lengths)
        counts["dropped_token_duplicates"] = len(same)
        if same:
            _remove(same, kept, tokens)
            stream, lengths = _joined(tokens), _lengths(tokens)
        near = self._held_out.near.near(stream)
        origins = [kept[number].origin for number in near]
        counts["near_duplicates"] = len(near)
        if self._held_out.drop_near and near:
            _remove(near, kept, tokens)
            stream, lengths = _joined(tokens), _lengths(tokens)
            counts["dropped_near_duplicates"] = len(near)
        counts["bytes"] = sum(document.size for document in kept)
        nothing = np.empty(0, np.uint16)
        return Result(stream, nothing, lengths, counts, bad, [], origins, [], [])

    def _fused(self, documents: list[Document], found: list[np.ndarray], bad: list[str]) -> tuple[list, list]:
        """Documents and their tokens, fused; without those that cannot be, whose messages go to `bad`."""
        kept, tokens = [], []
        for document, encoded in zip(documents, found, strict=True):
            try:
                tokens.append(self._stored(document, encoded)[0])
                kept.append(document)
            except DataError as error:
                bad.append(str(error))
        return kept, tokens

    def _stored(self, document: Document, tokens: np.ndarray, carried: np.ndarray | None = None) -> tuple:
        """What shards hold of a document: its tokens and their bytes, fused where that is asked for."""
        if not self._pairs:
            return tokens, carried
        try:
            return fused(tokens, self._pairs, carried)
        except DataError as error:
            raise DataError(f"{document.origin}: {error}") from None

    def _same_tokens(self, stream: np.ndarray, lengths: np.ndarray) -> list[int]:
        """Numbers of the documents in a stream whose tokens are those of a validation document."""
        found = document_hashes(stream, np.cumsum(lengths) - lengths)
        known = self._held_out.tokens
        place = np.minimum(np.searchsorted(known, found), len(known) - 1)
        return np.flatnonzero(known[place] == found).tolist()

    def _sampled(self, document: Document, tokens: np.ndarray, carried: np.ndarray | None = None) -> bool:
        """Have SentencePiece make a document's tokens too. DataError if these, or their bytes, are others.

        Of a long document that is asked of its beginning: SentencePiece takes 100 bytes for each of a text.
        """
        encoder = self._encoder
        if not encoder.by_words:
            return False
        text = encoder.beginning(document.utf8)
        if carried is None:
            pairs = [(tokens, encoder.tokens_alone(text))]
        else:
            pairs = zip((tokens, carried), encoder.counted_alone(text), strict=True)
        cut = len(text) < document.size
        same = all(np.array_equal(own[: len(alone)] if cut else own, alone) for own, alone in pairs)
        if not same:
            what = "the encoder and SentencePiece give other tokens"
            raise DataError(f"{document.origin}: {what}; this is a fault of the program")
        return True


def _remove(numbers: list[int], *lists: list) -> None:
    """Take the items of ascending numbers out of lists."""
    for number in reversed(numbers):
        for items in lists:
            del items[number]


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.uint16), *parts])


def _lengths(parts: list[np.ndarray]) -> np.ndarray:
    return np.array([len(part) for part in parts], np.int64)
