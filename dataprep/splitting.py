"""Texts cut into words whose tokens do not depend on what is around them, and the tokens of those."""

import functools
import itertools
import struct
from collections.abc import Iterator, Sequence

import numpy as np
import sentencepiece

import lossless_caps
from dataprep import words
from dataprep.shards import BOS_ID

OPERATORS = (lossless_caps.TITLE, lossless_caps.ALLCAPS, lossless_caps.CAPNEXT, lossless_caps.ESC)
SPACE_PIECE = "\u2581"  # how SentencePiece writes a space
ASCII_SPACE = b" \t\n\r\x0c"  # not 0x0B, which normalisers delete
KEPT = 1 << 15  # words that SentencePiece has made tokens of, remembered in some 300 bytes each
LONGEST = 256  # bytes of a word that is remembered
_SPACED = bytes(32 if byte in ASCII_SPACE else byte for byte in range(256))  # to bytes.translate()
_PRINTABLE = bytes(range(0x21, 0x7F))
_QUOTES = "\u2018\u2019\u201c\u201d\u2013\u2014"  # as in words.c
_NEUTRAL = _PRINTABLE.decode() + "".join(OPERATORS) + _QUOTES
_NO_OPERATORS = dict.fromkeys(map(ord, OPERATORS))  # to str.translate()
_NORMAL, _USER_DEFINED, _UNUSED, _BYTE = 1, 4, 5, 6  # SentencePiece's types of pieces
_NORMALISERS, _RULES = (3, 5), 2  # fields of a model: before it encodes, after it decodes; of one, its table
_FIXED = {1: 8, 5: 4}  # bytes of a protocol buffer's values of fixed size, by their kind

Columns = list[np.ndarray]
"""Arrays of equal length: tokens, and where they are counted, the bytes that each carries."""


@functools.lru_cache(4)
def splits_at_spaces(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether the tokens of words joined by single spaces are those of the words, one after the other.

    So it is for a BPE model in which no piece goes on over a space: merges then stay inside " word". Further
    the normaliser must leave `_NEUTRAL` characters and single spaces between them alone, and add no prefix.
    """
    pieces = [processor.id_to_piece(token) for token in range(processor.get_piece_size())]
    scores = [processor.get_score(token) for token in range(len(pieces))]
    if any(SPACE_PIECE in piece.lstrip(SPACE_PIECE) or " " in piece for piece in pieces):
        return False
    if any(score != int(score) for score in scores):  # BPE counts its merges; a unigram model has logarithms
        return False
    text = " ".join(a + b for a in _NEUTRAL for b in _NEUTRAL)
    same = processor.normalize(text) == text.replace(" ", SPACE_PIECE)
    return same and processor.encode("a", out_type=str) == ["a"]


def joins_spaces(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether the normaliser makes one space of a run of ASCII white space, none at the ends of a text."""
    runs = [*ASCII_SPACE.decode(), "\r\n", " \n\n\t "]
    text = "".join(f"{run}a" for run in runs) + "\n "
    return processor.normalize(text) == SPACE_PIECE.join("a" * len(runs))


def keeps_spaces(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether the normaliser leaves every space where it is, at the ends of a text too."""
    return processor.normalize("  a  a ") == "  a  a ".replace(" ", SPACE_PIECE)


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """An integer of a protocol buffer message, and where it ends."""
    value = shift = 0
    while message[at] > 127:
        value |= (message[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return value | message[at] << shift, at + 1


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Numbers and values of the fields of a protocol buffer message; fixed ones as their bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 in _FIXED:
            size = _FIXED[key & 7]
        else:
            size, at = _varint(message, at)
        if key & 7:
            yield key >> 3, message[at : at + size]
            at += size
        else:
            yield key >> 3, size


@functools.lru_cache(4)
def pieces_of_model(model: bytes) -> list[tuple[str, float, int]]:
    """Text, score and type of each piece of a serialized SentencePiece model; the library tells no types."""
    pieces = []
    for number, value in _fields(model):
        if number == 1:
            own = {1: b"", 2: bytes(4), 3: _NORMAL} | dict(_fields(value))
            pieces.append((own[1].decode(), *struct.unpack("<f", own[2]), own[3]))
    return pieces


def rewrites(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether the model has rules by which it rewrites characters, when it encodes or when it decodes.

    Only its own table of them tells: no sample of texts has what any rule may be about.
    """
    specs = [dict(_fields(v)) for n, v in _fields(processor.serialized_model_proto()) if n in _NORMALISERS]
    return any(spec.get(_RULES) for spec in specs)


def merges_here(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether `words.c` merges as SentencePiece does.

    User-defined pieces must be characters, none be unused, and no two that are merged have the same score.
    """
    pieces = pieces_of_model(processor.serialized_model_proto())
    scores = [score for text, score, kind in pieces if kind == _NORMAL and len(text) > 1]
    others = any(kind == _UNUSED or (kind == _USER_DEFINED and len(text) > 1) for text, _, kind in pieces)
    return not others and len({*scores}) == len(scores)


def compiled_model(processor: sentencepiece.SentencePieceProcessor) -> words.Model:
    """A model as `words.c` takes it.

    Two neighbours may merge if their texts, joined, are a piece; the higher its score, the earlier, and the
    lower its symbol. A piece has a merge for each way to cut it into pieces, or characters that are in none:
    ASCII ones, which are tokens of one byte. Words with any other character that is in none are left to
    SentencePiece.
    """
    pieces = pieces_of_model(processor.serialized_model_proto())
    order = sorted(range(len(pieces)), key=lambda token: -pieces[token][1])  # of its symbols
    known, normal, bytes_ = (
        {pieces[token][0]: symbol for symbol, token in enumerate(order) if pieces[token][2] in kinds}
        for kinds in ((_NORMAL, _USER_DEFINED), (_NORMAL,), (_BYTE,))
    )
    kept = [c for c in "\t\n\r" if processor.normalize(f"a{c}a{c}{c}a") == f"a{c}a{c}{c}a"]
    tables = {name: np.full(256, -1, np.int32) for name in ("ascii", "quotes", "operators")}
    tokens = np.append(order, np.zeros(256)).astype(np.uint16)
    for character in [*_PRINTABLE.decode(), *kept]:
        code = ord(character)
        tables["ascii"][code] = known.get(character, -1)
        if character not in known and bytes_:
            tables["ascii"][code] = normal[character] = len(pieces) + code
            tokens[len(pieces) + code] = tokens[bytes_[f"<0x{code:02X}>"]]
    tables["ascii"][ord(" ")] = known.get(SPACE_PIECE, -1)
    for name, characters in (("quotes", _QUOTES), ("operators", OPERATORS)):
        for character in characters:
            tables[name][character.encode()[2]] = known.get(character, -1)
    tables["operators"][lossless_caps.ESC.encode()[2]] = -1  # what it stands before carries bytes
    merges = [
        (normal[text[:cut]] << words.SYMBOL_BITS | normal[text[cut:]]) << words.SYMBOL_BITS | made
        for made, (text, _, kind) in enumerate(pieces[token] for token in order)
        for cut in range(1, len(text) * (kind == _NORMAL))
        if text[:cut] in normal and text[cut:] in normal
    ]
    sizes = np.zeros(len(pieces), np.uint16)
    for text, symbol in known.items():
        sizes[order[symbol]] = len(text.replace(SPACE_PIECE, " ").translate(_NO_OPERATORS).encode())
    sizes[[order[symbol] for symbol in bytes_.values()]] = 1
    tables |= {"tokens": tokens, "sizes": sizes}
    return words.Model(tables, np.array(merges, np.uint64), joins_spaces(processor), BOS_ID)


def tokens_and_spans(
    processor: sentencepiece.SentencePieceProcessor, text: bytes
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (n,) and the byte offsets (n, 2) of their surfaces, both int64, by SentencePiece.

    Its own offsets take nearly as long as its tokens. Where its normaliser leaves all characters but white
    space as they are, they follow from the tokens and are not asked for.
    """
    normal = processor.normalize(text).replace(SPACE_PIECE.encode(), b" ")
    if (places := _places(text, normal)) is not None:
        tokens = processor.encode(text, out_type="numpy").astype(np.int64)
        sizes, is_byte = _piece_sizes(processor)
        ends = np.cumsum(sizes[tokens])
        if len(ends) and ends[-1] == len(normal):  # not where a character is unknown: that piece has no text
            if is_byte[tokens].any():  # of the byte pieces of one character the last carries all
                raw = np.frombuffer(normal + b"\0", np.uint8)
                for _ in range(3):
                    ends -= raw[ends] & 0xC0 == 0x80
            spans = np.empty((len(ends), 2), np.int64)
            spans[0, 0], spans[:, 1] = places[0], places[ends]
            spans[1:, 0] = spans[:-1, 1]
            return tokens, spans
    mapping = processor.encode(text, out_type="offset_mapping")
    flat = itertools.chain.from_iterable(mapping["offsets"])
    tokens = np.array(mapping["ids"], np.int64)
    return tokens, np.fromiter(flat, np.int64, 2 * len(tokens)).reshape(-1, 2)


def _places(text: bytes, normal: bytes) -> np.ndarray | None:
    """Where in a text the bytes of its normalised form come from, and its end, (n + 1,) int64.

    A space there comes from the first byte of the white space that it stands for. None where the normaliser
    changes more than white space.
    """
    if normal == text:
        return np.arange(len(text) + 1)
    start, end = len(text) - len(text.lstrip(ASCII_SPACE)), len(text.rstrip(ASCII_SPACE))
    spaced = np.frombuffer(text.translate(_SPACED), np.uint8)[start:end]
    kept = spaced != ord(" ")
    kept[1:] |= kept[:-1]
    places = np.flatnonzero(kept)
    return np.append(places + start, end) if spaced[places].tobytes() == normal else None


@functools.lru_cache(4)
def _piece_sizes(processor: sentencepiece.SentencePieceProcessor) -> tuple[np.ndarray, np.ndarray]:
    """Of each piece: bytes of normalised text that it takes, 0 if it is no text (int64); is it one byte?"""
    texts, _, kinds = zip(*pieces_of_model(processor.serialized_model_proto()), strict=True)
    kinds = np.array(kinds)
    sizes = np.array([len(text.replace(SPACE_PIECE, " ").encode()) for text in texts])
    sizes[~np.isin(kinds, (_NORMAL, _USER_DEFINED))] = 0
    sizes[kinds == _BYTE] = 1
    return sizes, kinds == _BYTE


class Units:
    """Tokens of many texts by their words.

    A text is cut at its white space wherever a neutral character is on both sides of it: what is between
    has the same tokens wherever it stands (`splits_at_spaces`). A word begins with one space, but for the
    first of a text. One of neutral characters alone is merged in `words.c`, others go through SentencePiece.
    """

    def __init__(
        self,
        processor: sentencepiece.SentencePieceProcessor,
        model: words.Model,
        caps: bool,
        counted: bool,
    ) -> None:
        """`caps`: of CaseOps text; `counted`: the bytes of it that each token carries are a second column."""
        self._processor, self._model, self._caps, self._counted = processor, model, caps, counted
        self._known: dict[bytes, Columns] = {}

    def columns(self, texts: Sequence[bytes]) -> tuple[Columns, np.ndarray]:
        """Columns of all texts (original, UTF-8) with a BOS before each, and the end (n,) of each in them."""
        raw = words.joined(texts)
        raw = words.caps(raw) if self._caps else raw
        columns, ends, missing = self._model.encode(raw, self._counted)
        if len(missing):
            places, more = missing.T[2:]
            found = self._others([raw[s : s + n].tobytes() for s, n in missing[:, :2].tolist()])
            counts = np.array([len(tokens) for tokens, *_ in found])
            added = [np.concatenate(column) for column in zip(*found, strict=True)]
            if self._counted:  # a token that begins with a space carries all white space that was there
                wider = np.flatnonzero(more)
                added[1][(np.cumsum(counts) - counts)[wider]] += more[wider]
            at = np.repeat(places, counts)
            columns = [np.insert(own, at, new) for own, new in zip(columns, added, strict=True)]
            ends = ends + np.cumsum(np.bincount(np.searchsorted(ends, places), counts, len(ends))).astype(int)
        return columns, ends

    def _others(self, texts: list[bytes]) -> list[Columns]:
        """Columns of words by SentencePiece, which makes those of each once, as long as it is remembered."""
        found = {text: self._known.get(text) for text in texts}
        new = [text for text, columns in found.items() if columns is None]
        if new:
            found.update(zip(new, self._made(new), strict=True))
            if len(self._known) + len(new) > KEPT:
                self._known.clear()
            self._known.update((text, found[text]) for text in new if len(text) <= LONGEST)
        return [found[text] for text in texts]

    def _made(self, texts: list[bytes]) -> list[Columns]:
        """Columns of words by SentencePiece; an "a" before a space keeps that."""
        led = [text.startswith(b" ") for text in texts]
        texts = [b"a" * skip + text for skip, text in zip(led, texts, strict=True)]
        if not self._counted:
            made = self._processor.encode(texts, out_type="numpy", num_threads=1)
            return [[tokens[skip:].astype(np.uint16)] for skip, tokens in zip(led, made, strict=True)]
        columns = []
        for skip, text in zip(led, texts, strict=True):
            tokens, spans = tokens_and_spans(self._processor, text)
            columns.append(
                [tokens[skip:].astype(np.uint16), lossless_caps.span_byte_counts(text, spans[skip:])]
            )
        return columns
