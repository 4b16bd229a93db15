"""CaseOps text to tokens: SentencePiece models, a faster way to the same tokens, bytes of each token."""

import functools
import io
import re
from array import array
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import sentencepiece

import lossless_caps
from dataprep.reading import Document
from dataprep.shards import BOS_ID, FIRST_OPERATOR_ID, DataError

MAX_TOKEN_BYTES, MAX_VOCAB = 65_535, 65_536  # uint16 values
OPERATORS = (lossless_caps.TITLE, lossless_caps.ALLCAPS, lossless_caps.CAPNEXT, lossless_caps.ESC)
SPACE_PIECE = "\u2581"  # how SentencePiece writes a space
RARE_MARK = "\u2585"  # what SentencePiece writes, in training, for a character that is in no piece
WORDS_KEPT = 1 << 18  # two generations of this many: about 75 MB in each process
LONGEST_WORD_KEPT = 24  # bytes; longer ones seldom come again
CHUNK_BYTES = 1 << 20  # longer documents go through SentencePiece in parts: it takes 100 bytes for each

_PRINTABLE = bytes(range(0x21, 0x7F))
_WORD_ENDS = frozenset(_PRINTABLE)
_WORD_BEGINS = frozenset(_PRINTABLE + b"\xee")  # 0xEE: an operator, if the next byte says so
_LETTERS = frozenset(b"abcdefghijklmnopqrstuvwxyz")
_ASCII_SPACE = " \t\n\r\x0c"  # where bytes.split() cuts, and at 0x0B, which normalisers delete
_PLAIN_WORD = re.compile(rb"(?:[!-~]|\xee\x80[\x81-\x84])+")
_RUNS = re.compile(rb" ?[a-z]+|[^a-z]+")
_SAFE_SPACE = re.compile(rb" (?<=[!-~] )(?=[!-~]|\xee\x80[\x81-\x84])")


class Tokenizer(NamedTuple):
    """A SentencePiece model; `lossless`: one that loses anything is refused; `plain`: of text as it is."""

    file_name: str
    model: bytes
    processor: sentencepiece.SentencePieceProcessor
    lossless: bool
    plain: bool = False


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


def splits_at_spaces(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether the tokens of words joined by single spaces are those of the words, one after the other.

    So it is for a BPE model in which no piece goes on over a space: merges then stay inside " word". Further
    the normaliser must leave printable ASCII, operators and single spaces between them alone, and add no
    prefix.
    """
    pieces = [processor.id_to_piece(token) for token in range(processor.get_piece_size())]
    scores = [processor.get_score(token) for token in range(len(pieces))]
    if any(SPACE_PIECE in piece.lstrip(SPACE_PIECE) or " " in piece for piece in pieces):
        return False
    if any(score != int(score) for score in scores):  # BPE counts its merges; a unigram model has logarithms
        return False
    words = [*map(chr, _PRINTABLE), *OPERATORS]
    text = " ".join(a + b for a in words for b in words)
    same = processor.normalize(text) == text.replace(" ", SPACE_PIECE)
    return same and processor.encode("a", out_type=str) == ["a"]


def joins_spaces(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether the normaliser makes one space of a run of ASCII white space, none at the ends of a text."""
    runs = [*_ASCII_SPACE, "\r\n", " \n\n\t "]
    text = "".join(f"{run}a" for run in runs) + "\n "
    return processor.normalize(text) == SPACE_PIECE.join("a" * len(runs))


def splits_at_letters(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether no piece of printable ASCII holds a lower-case letter beside anything but a leading space."""
    pieces = (processor.id_to_piece(token) for token in range(processor.get_piece_size()))
    mixed = re.compile(r"[a-z][!-`{-~]|[!-`{-~][a-z]")
    with_bytes = processor.piece_to_id("<0x00>") != processor.unk_id()
    return with_bytes and not any(mixed.search(p) for p in pieces if not re.fullmatch("<.*>", p))


class _Kept(dict):
    """Tokens (bytes of uint16) by text, made when asked for. When full, what was not used of late goes."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        super().__init__()
        self._encode = processor.encode
        self._old: dict[bytes, bytes | None] = {}

    def __missing__(self, text: bytes) -> bytes | None:
        tokens = self._old.get(text) or self._make(text)
        if len(text) <= LONGEST_WORD_KEPT:
            if len(self) >= WORDS_KEPT:
                self._old = dict(self)
                self.clear()
            self[text] = tokens
        return tokens


class _Runs(_Kept):
    """Tokens of a run of letters, or of other characters, in a word (the first with its space)."""

    def _make(self, run: bytes) -> bytes:
        before = b"a" if run[0] not in _LETTERS else b"!"  # one token that the run does not merge with
        return array("H", self._encode(before + run)[1:]).tobytes()


class _Words(_Kept):
    """Tokens of " word" by word; None for one that cannot stand alone."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        super().__init__(processor)
        self._runs = _Runs(processor) if splits_at_letters(processor) else None

    def _make(self, word: bytes) -> bytes | None:
        if not _stands_alone(word):
            return None
        if self._runs is not None and _PLAIN_WORD.fullmatch(word):
            return b"".join(map(self._runs.__getitem__, _RUNS.findall(b" " + word)))
        return array("H", self._encode(b"a " + word)[1:]).tobytes()


def _stands_alone(word: bytes) -> bool:
    """It begins with printable ASCII or an operator, ends with ASCII: no rule reaches over its spaces."""
    if not word or word[-1] not in _WORD_ENDS or word[0] not in _WORD_BEGINS:
        return False
    return word[0] != 0xEE or (word[1] == 0x80 and 0x81 <= word[2] <= 0x84)


def _index_of_none(parts: list[bytes | None], start: int) -> int:
    try:
        return parts.index(None, start)
    except ValueError:
        return len(parts)


class Encoder:
    """Tokens of texts. The same as SentencePiece's own, but each word goes through SentencePiece once.

    Text repeats its words, so that a dictionary answers for nearly all of them, several times as fast. Where
    a model does not allow it (`splits_at_spaces`) documents go through SentencePiece whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._processor = tokenizer.processor
        by_words = not tokenizer.plain and splits_at_spaces(tokenizer.processor)
        self._words = _Words(tokenizer.processor) if by_words else None
        self._separator = None if joins_spaces(tokenizer.processor) else b" "

    def documents(self, texts: Sequence[bytes]) -> list[bytes]:
        """Tokens of each text (original, UTF-8), with BOS, as bytes of uint16."""
        bos = array("H", [BOS_ID]).tobytes()
        encoded = texts if self.tokenizer.plain else lossless_caps.encode_many(texts)
        return [bos + self.tokens(text) for text in encoded]

    def tokens(self, encoded: bytes) -> bytes:
        """Tokens of one CaseOps text (UTF-8), as bytes of uint16."""
        if self._words is None:
            return self._plain(encoded)
        cuts = self._cuts(encoded)
        parts = [self._by_words(encoded[: cuts[0]], inner=False)]
        for start, end in zip(cuts, cuts[1:], strict=False):
            parts.append(self._by_words(encoded[start + 1 : end], inner=True))
        return b"".join(parts)

    def spans(self, encoded: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n,) and the byte offsets (n, 2) of their surfaces in one CaseOps text (UTF-8)."""
        cuts = [0, *self._cuts(encoded)] if self._words is not None else [0, len(encoded)]
        tokens, spans = [np.empty(0, np.int64)], [np.empty((0, 2), np.int64)]
        for start, end in zip(cuts, cuts[1:], strict=False):
            skip = start > 0  # a later part begins with its space; an "a" before it keeps that
            mapping = self._processor.encode(b"a" * skip + encoded[start:end], out_type="offset_mapping")
            tokens.append(np.array(mapping["ids"][skip:], np.int64))
            offsets = np.array(mapping["offsets"][skip:], np.int64).reshape(-1, 2)
            spans.append(offsets + (start - skip))
        return np.concatenate(tokens), np.concatenate(spans)

    def plain_counts(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of the tokens of one plain document, as tables over the pieces count them.

        A byte piece is 1; another its UTF-8 length, a leading space only behind a piece that is text.
        """
        base, space, control = self._piece_bytes
        before = np.concatenate([[True], control[tokens[:-1]]])
        return base[tokens] + (space[tokens] & ~before)

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

    @staticmethod
    def _cuts(encoded: bytes) -> list[int]:
        """Ends of the parts of a long text: spaces between words that stand alone, and its own end."""
        cuts, position = [], CHUNK_BYTES
        while position < len(encoded) and (space := _SAFE_SPACE.search(encoded, position)):
            cuts.append(space.start())
            position = space.start() + CHUNK_BYTES
        return [*cuts, len(encoded)]

    def _by_words(self, text: bytes, inner: bool) -> bytes:
        """Tokens of a text; `inner`: a space went before it."""
        words = text.split(b" " if b"\x0b" in text else self._separator)
        parts = list(map(self._words.__getitem__, words))
        if not inner and parts:
            parts[0] = None  # no space before it
        done, position = [], 0
        while (bad := _index_of_none(parts, position)) < len(parts):
            start, end = max(bad - 1, position), bad + 1
            while end < len(parts) and (parts[end - 1] is None or parts[end] is None):
                end += 1
            segment = b" ".join(words[start:end])
            done += parts[position:start]
            done.append(self._plain(b"a " + segment)[2:] if inner or start else self._plain(segment))
            position = end
        return b"".join([*done, *parts[position:]])

    def _plain(self, encoded: bytes) -> bytes:
        return self._processor.encode(encoded, out_type="numpy").astype(np.uint16).tobytes()


def tokenise(processor: sentencepiece.SentencePieceProcessor, texts: Sequence[str]) -> np.ndarray:
    """Tokens, (T,) uint16, of documents, BOS before each, by SentencePiece alone: `Encoder` must equal it."""
    encoded = [lossless_caps.encode(text) for text in texts]
    return np.concatenate(processor.encode(encoded, out_type="numpy", add_bos=True)).astype(np.uint16)


def tokenise_validation(encoder: Encoder, document: Document) -> tuple[np.ndarray, np.ndarray, bool]:
    """Tokens of one document, the original UTF-8 bytes of each (both (T,) uint16), and: do they decode to it?

    White space that the tokenizer drops at the ends belongs to no token and is not counted. Plain text is
    counted as the evaluation does, by the pieces: not a space at the start of a document.

    Raises:
        DataError: a token carries more bytes than uint16 can hold, or a lossless tokenizer loses something.
    """
    if encoder.tokenizer.plain:
        encoded = document.utf8
        tokens, spans = encoder.spans(encoded)
        counts = encoder.plain_counts(tokens)
    else:
        encoded = lossless_caps.encode_utf8(document.utf8)
        tokens, spans = encoder.spans(encoded)
        counts = lossless_caps.span_byte_counts(encoded, spans)
    if counts.max(initial=0) > MAX_TOKEN_BYTES:
        raise DataError(
            f"{document.origin}: one token carries {counts.max()} bytes (a run of white space?), "
            f"more than the {MAX_TOKEN_BYTES} that a shard can say"
        )
    tokenizer = encoder.tokenizer
    whole = tokenizer.plain or counts.sum() == document.size
    round_trip = tokenizer.processor.decode(tokens.tolist()).encode("utf-8") == encoded
    if tokenizer.lossless and not (round_trip and whole):
        held = SPACE_PIECE.encode() in encoded
        why = ": it holds U+2581, which SentencePiece takes for a space" if held else ""
        raise DataError(f"{document.origin}: the trained tokenizer does not give this text back{why}")
    return _with_first(BOS_ID, tokens), _with_first(0, counts), round_trip


def _with_first(first: int, values: np.ndarray) -> np.ndarray:
    return np.concatenate([[first], values]).astype(np.uint16)


def tokenizer_texts(
    documents: Iterator[Document], held_out: set[bytes], limit: int
) -> Generator[str, None, Document | None]:
    """What a tokenizer may learn from: the first `limit` bytes of documents not in `held_out` (keys).

    Returns:
        the first document that does not fit; it and those behind it are left out.
    """
    for document in documents:
        if document.key in held_out:
            continue
        limit -= document.size
        if limit < 0:
            return document
        yield document.text
    return None
