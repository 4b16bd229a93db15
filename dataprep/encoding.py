"""CaseOps text to tokens: SentencePiece models, a faster way to the same tokens, bytes of each token."""

import functools
import io
import re
import unicodedata
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import sentencepiece

import lossless_caps
from dataprep import words
from dataprep.reading import Document
from dataprep.shards import BOS_ID, FIRST_OPERATOR_ID, DataError
from dataprep.splitting import (
    OPERATORS,
    SPACE_PIECE,
    Units,
    compiled_model,
    joins_spaces,
    keeps_spaces,
    merges_here,
    splits_at_spaces,
    tokens_and_spans,
)

MAX_TOKEN_BYTES, MAX_VOCAB = 65_535, 65_536  # uint16 values
FIXED_PIECES = 4 + 256  # control pieces and bytes of a tokenizer that is trained here
RARE_MARK = "\u2585"  # what SentencePiece writes, in training, for a character that is in no piece
CHUNK_BYTES = 1 << 20  # longer documents go through SentencePiece in parts: it takes 100 bytes for each

_SAFE_SPACE = re.compile(rb" (?<=[!-~] )(?=[!-~]|\xee\x80[\x81-\x84])")


class Tokenizer(NamedTuple):
    """A SentencePiece model; `lossless`: one that loses anything is refused; `plain`: of text as it is.

    `fused`: shards hold a token for each pair of a space and an operator (`dataprep/fusion.py`).
    """

    file_name: str
    model: bytes
    processor: sentencepiece.SentencePieceProcessor
    lossless: bool
    plain: bool = False
    fused: bool = False


def make_tokenizer(path: str, model: bytes, lossless: bool = False, plain: bool = False) -> Tokenizer:
    """Tokenizer of a serialized SentencePiece model, for CaseOps text unless `plain`.

    Raises:
        DataError: not such a model, or one without BOS 1, a piece for a bare space, and for CaseOps the
            operators at 4-7.
    """
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model or b"\0")
    except RuntimeError as error:
        raise DataError(f"{path}: not a SentencePiece model") from error
    if processor.get_piece_size() > MAX_VOCAB:
        raise DataError(f"{path}: has {processor.get_piece_size()} pieces; shards hold at most {MAX_VOCAB}")
    if processor.bos_id() != BOS_ID:
        raise DataError(f"{path}: its BOS is {processor.bos_id()}; the data format needs {BOS_ID}")
    for token, operator in enumerate(() if plain else OPERATORS, FIRST_OPERATOR_ID):
        if processor.encode(operator) != [token]:
            what = f"U+{ord(operator):04X} is not token {token}"
            raise DataError(f"{path}: not a CaseOps tokenizer: {what}; for text as it is: --plain")
    if not has_space(processor):
        raise DataError(f"{path}: has no piece for a bare space (U+2581)")
    return Tokenizer(path.replace("\\", "/").rpartition("/")[2], model, processor, lossless, plain)


def has_space(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether there is a piece for a bare space."""
    return processor.piece_to_id(SPACE_PIECE) != processor.unk_id()


def train_tokenizer(texts: Iterable[str], vocab_size: int, plain: bool = False, required: str = "") -> bytes:
    """Serialized SentencePiece BPE model that gives back every text without U+2581 unchanged.

    Args:
        texts: original documents; CaseOps is applied here. The same texts give the same bytes.
        vocab_size: pieces, including 4 control pieces, the 4 operators and 256 bytes.
        plain: no CaseOps, no operators. No piece then holds more than one space, its first character:
            the byte tables of plain data count by that.
        required: characters that get a piece however rare they are in the texts.

    Raises:
        DataError: `vocab_size` does not suit the texts. What `texts` raises goes through.
    """
    model, failures = io.BytesIO(), []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts, plain, failures),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            pad_id=0,
            bos_id=BOS_ID,
            eos_id=2,
            unk_id=3,
            user_defined_symbols=[] if plain else list(OPERATORS),
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=not plain,
            **({"required_chars": required} if required else {}),  # an empty one would be in the model too
            max_sentence_length=1 << 30,  # bytes; longer texts would be skipped, there are none
            minloglevel=2,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        reason = str(error).rpartition("] ")[2].strip() or "no training text"
        fixed = FIXED_PIECES + len(OPERATORS) * (not plain)
        if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", reason):
            reason = f"must be at least {least[1]} for these texts"
        elif vocab_size <= fixed:
            reason = f"must be more than the {fixed} control pieces, operators and bytes"
        raise DataError(f"--train-tokenizer {vocab_size}: {reason}") from error
    return model.getvalue()


def _sentences(texts: Iterable[str], plain: bool, failures: list[BaseException]) -> Iterator[str]:
    """What SentencePiece learns from. What ends it early goes to `failures`: it words that in its own way.

    Texts are cut at U+2585: one that holds it would be skipped whole. That character can be in no piece.
    """
    try:
        for text in texts:
            yield from (text if plain else lossless_caps.encode(text)).split(RARE_MARK)
    except (Exception, KeyboardInterrupt) as error:
        failures.append(error)
        raise


class Encoder:
    """Tokens of texts, the same as SentencePiece's own, but made word by word by compiled code (`words.c`).

    Where a model does not allow that (`splits_at_spaces`, `merges_here`), or there is no C compiler,
    documents go through SentencePiece whole: a tenth as fast.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._processor = processor = tokenizer.processor
        spaces_are_clear = joins_spaces(processor) or keeps_spaces(processor)
        splits = spaces_are_clear and splits_at_spaces(processor)
        self.by_words = splits and merges_here(processor) and words.library() is not None
        self._model = compiled_model(processor) if self.by_words else None

    def __reduce__(self) -> tuple:
        """Another process makes its own."""
        return Encoder, (self.tokenizer,)

    @property
    def name(self) -> dict:
        """What makes the tokens, for the manifest."""
        by = "dataprep/words.py" if self.by_words else "sentencepiece"
        return {"name": by, "sentencepiece": sentencepiece.__version__}

    @functools.cached_property
    def _units(self) -> Units:
        return Units(self._processor, self._model, not self.tokenizer.plain, counted=False)

    @functools.cached_property
    def _counted_units(self) -> Units:
        return Units(self._processor, self._model, not self.tokenizer.plain, counted=True)

    def documents(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Tokens, (T,) uint16, of each text (original, UTF-8), with BOS."""
        if not (self.by_words and texts):
            return [self.tokens_alone(text) for text in texts]
        (tokens,), ends = self._units.columns(texts)
        return _split(tokens, ends)

    def counted(self, texts: Sequence[bytes]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokens, (T,) uint16, of each text with BOS, and the original bytes of each, (T,) int64.

        White space that the tokenizer drops at the ends belongs to no token and is not counted. Plain text is
        counted as the evaluation does, by the pieces: not a space at the start of a document.
        """
        if not (self.by_words and texts):
            return [self.counted_alone(text) for text in texts]
        if self.tokenizer.plain:
            return [(tokens, self._plain_counts(tokens)) for tokens in self.documents(texts)]
        (tokens, carried), ends = self._counted_units.columns(texts)
        return [*zip(_split(tokens, ends), _split(carried, ends), strict=True)]

    def tokens_alone(self, text: bytes) -> np.ndarray:
        """`documents` of one text, by SentencePiece alone."""
        encoded = text if self.tokenizer.plain else lossless_caps.encode_utf8(text)
        return self._processor.encode(encoded, out_type="numpy", add_bos=True).astype(np.uint16)

    def counted_alone(self, text: bytes) -> tuple[np.ndarray, np.ndarray]:
        """`counted` of one text, by SentencePiece alone."""
        encoded = text if self.tokenizer.plain else lossless_caps.encode_utf8(text)
        tokens, spans = self.spans(encoded)
        tokens = _with_first(BOS_ID, tokens)
        if self.tokenizer.plain:
            return tokens, self._plain_counts(tokens)
        return tokens, np.append(0, lossless_caps.span_byte_counts(encoded, spans))

    def spans(self, encoded: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n,) and the byte offsets (n, 2) of their surfaces in one CaseOps text (UTF-8)."""
        cuts = [0, *self._cuts(encoded)] if self.by_words else [0, len(encoded)]
        tokens, spans = [np.empty(0, np.int64)], [np.empty((0, 2), np.int64)]
        for start, end in zip(cuts, cuts[1:], strict=False):
            skip = start > 0  # a later part begins with its space; an "a" before it keeps that
            found, offsets = tokens_and_spans(self._processor, b"a" * skip + encoded[start:end])
            tokens.append(found[skip:])
            spans.append(offsets[skip:] + (start - skip))
        return np.concatenate(tokens), np.concatenate(spans)

    def _plain_counts(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of the tokens of one plain document, BOS first, as tables over the pieces count them.

        A byte piece is 1; another its UTF-8 length, a leading space only behind a piece that is text.
        """
        base, space, control = self._piece_bytes
        return base[tokens] + (space[tokens] & ~np.append(True, control[tokens[:-1]]))

    @functools.cached_property
    def _piece_bytes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each piece: bytes without a leading space, has it one, is it no text."""
        p, every = self._processor, range(self._processor.get_piece_size())
        control = np.array([p.is_control(i) or p.is_unknown(i) or p.is_unused(i) for i in every])
        pieces = [p.id_to_piece(i) for i in every]
        space = np.array([piece.startswith(SPACE_PIECE) for piece in pieces]) & ~control
        text = [piece.removeprefix(SPACE_PIECE).encode() for piece in pieces]
        sizes = [1 if p.is_byte(i) else len(text[i]) for i in every]
        return np.array(sizes) * ~control, space, control

    def beginning(self, text: bytes) -> bytes:
        """A text up to its first megabyte or so, where its tokens so far do not depend on the rest."""
        return text[: self._cuts(text)[0]]

    @staticmethod
    def _cuts(encoded: bytes) -> list[int]:
        """Ends of the parts of a long text: spaces between words that stand alone, and its own end."""
        cuts, position = [], CHUNK_BYTES
        while position < len(encoded) and (space := _SAFE_SPACE.search(encoded, position)):
            cuts.append(space.start())
            position = space.start() + CHUNK_BYTES
        return [*cuts, len(encoded)]


def _split(values: np.ndarray, ends: np.ndarray) -> list[np.ndarray]:
    """Parts of values, up to each end."""
    ends = ends.tolist()
    return [values[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def tokenise(processor: sentencepiece.SentencePieceProcessor, texts: Sequence[str]) -> np.ndarray:
    """Tokens, (T,) uint16, of documents, BOS before each, by SentencePiece alone: `Encoder` must equal it."""
    encoded = [lossless_caps.encode(text) for text in texts]
    return np.concatenate(processor.encode(encoded, out_type="numpy", add_bos=True)).astype(np.uint16)


def check_validation(
    tokenizer: Tokenizer, document: Document, tokens: np.ndarray, counts: np.ndarray
) -> bool:
    """Whether the tokens of a validation document decode to it; whether they and their counts can be kept.

    Raises:
        DataError: a token carries more bytes than uint16 can hold, all together more than `most_bytes`, or a
            lossless tokenizer loses something.
    """
    if counts.max(initial=0) > MAX_TOKEN_BYTES:
        raise DataError(
            f"{document.origin}: one token carries {counts.max()} bytes (a run of white space?), "
            f"more than the {MAX_TOKEN_BYTES} that a shard can say"
        )
    charged = int(counts.sum(dtype=np.int64))
    if charged > document.size and charged > most_bytes(document.text):
        raise DataError(
            f"{document.origin}: has {document.size} bytes and would be charged {charged}: "
            "the tokenizer's normaliser makes text longer"
        )
    encoded = document.utf8 if tokenizer.plain else _with_caps(document.utf8)
    whole = tokenizer.plain or charged == document.size
    round_trip = _may_decode(tokenizer.processor, tokens, encoded) and (
        tokenizer.processor.decode(tokens[1:].tolist()).encode("utf-8") == encoded
    )
    if tokenizer.lossless and not (round_trip and whole):
        held = SPACE_PIECE.encode() in encoded
        why = ": it holds U+2581, which SentencePiece takes for a space" if held else ""
        raise DataError(f"{document.origin}: the trained tokenizer does not give this text back{why}")
    return round_trip


def most_bytes(text: str) -> int:
    """The most bytes that a document may be charged: of each character its own, or those of its NFKC form.

    Plain text is counted as it is normalised. The published tokenizers do that by NFKC, in which a few
    characters are longer than they were (one half is three characters, of five bytes instead of two).
    """
    return sum(max(len(c.encode()), len(unicodedata.normalize("NFKC", c).encode())) for c in text)


def _may_decode(processor: sentencepiece.SentencePieceProcessor, tokens: np.ndarray, encoded: bytes) -> bool:
    """Whether tokens may decode to a text at all: that is cheaper to tell than to decode them.

    They do not if it has more bytes that are in no piece, as line ends where those become spaces, than the
    tokens of single bytes can give: three each, for U+FFFD.
    """
    held, is_byte = _held_bytes(processor)
    return len(encoded.translate(None, held)) <= 3 * int(np.count_nonzero(is_byte[tokens]))


@functools.lru_cache(4)
def _held_bytes(processor: sentencepiece.SentencePieceProcessor) -> tuple[bytes, np.ndarray]:
    """The bytes that pieces of text decode to; which pieces are of a single byte, (vocab,) bool."""
    every = range(processor.get_piece_size())
    is_byte = np.array([processor.is_byte(token) for token in every])
    texts = processor.decode([[token] for token in np.flatnonzero(~is_byte).tolist()])
    return bytes({*"".join([" ", *texts]).encode("utf-8")}), is_byte


def tokenise_validation(encoder: Encoder, document: Document) -> tuple[np.ndarray, np.ndarray, bool]:
    """Tokens of one document, the original UTF-8 bytes of each (both (T,) uint16), and: do they decode to it?

    Raises:
        DataError: as `check_validation`.
    """
    tokens, counts = encoder.counted_alone(document.utf8)
    round_trip = check_validation(encoder.tokenizer, document, tokens, counts)
    return tokens, counts.astype(np.uint16), round_trip


def _with_caps(text: bytes) -> bytes:
    """`lossless_caps.encode_utf8`, by compiled code where there is some."""
    return words.caps_of(text) if words.library() else lossless_caps.encode_utf8(text)


def _with_first(first: int, values: np.ndarray) -> np.ndarray:
    return np.concatenate([[first], values]).astype(np.uint16)


def tokenizer_texts(
    documents: Iterator[Document], held_out: set[bytes], limit: int
) -> Generator[str, None, tuple[int, Document | None]]:
    """What a tokenizer may learn from: the first `limit` bytes of documents not in `held_out` (keys).

    Returns:
        how many documents, and the first that does not fit; it and those behind it are left out.
    """
    learnt = 0
    for document in documents:
        if document.key in held_out:
            continue
        limit -= document.size
        if limit < 0:
            return learnt, document
        yield document.text
        learnt += 1
    return learnt, None
