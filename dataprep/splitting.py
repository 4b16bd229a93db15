"""Texts cut into words whose tokens do not depend on what is around them, and the tokens of those."""

import itertools
from collections.abc import Iterable

import numpy as np
import sentencepiece

import lossless_caps
from dataprep.words import PADDING, Columns, Memory, pack, ragged

OPERATORS = (lossless_caps.TITLE, lossless_caps.ALLCAPS, lossless_caps.CAPNEXT, lossless_caps.ESC)
SPACE_PIECE = "\u2581"  # how SentencePiece writes a space
_PRINTABLE = bytes(range(0x21, 0x7F))
_OPERATORS = "".join(OPERATORS)
_QUOTES = "\u2018\u2019\u201c\u201d\u2013\u2014"  # in UTF-8 three bytes, 0x80 amid, as operators
_NEUTRAL = _PRINTABLE.decode() + _OPERATORS + _QUOTES
ASCII_SPACE = b" \t\n\r\x0c"  # not 0x0B, which normalisers delete
_SPACES = bytes(ord(" ") if byte in ASCII_SPACE else byte for byte in range(256))  # to bytes.translate()
_TEXT_BYTES = 1 << 13  # SentencePiece is half as fast on texts of more than 30 kB


def _table(of: Iterable[int], size: int = 256) -> np.ndarray:
    """Whether a number is one of these, (size,) bool."""
    return np.isin(np.arange(size), [*of])


def _table_of_three(characters: str) -> np.ndarray:
    """Characters whose UTF-8 is three bytes, 0x80 amid, (65536,) bool by the first and the third byte."""
    return _table((c.encode()[0] * 256 + c.encode()[2] for c in characters), 1 << 16)


def _begins(table: np.ndarray, raw: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Whether a character of a `_table_of_three` begins at each of these places, (n,) bool."""
    return table[raw[at] * np.uint16(256) + raw[at + 2]] & (raw[at + 1] == 0x80)


_IS_PRINTABLE = _table(_PRINTABLE)
_ENDS_WORD, _BEGINS_WORD = map(_table_of_three, (_QUOTES, _QUOTES + _OPERATORS))
_IN_WORD = _table_of_three(_QUOTES + _OPERATORS.replace(lossless_caps.ESC, ""))  # ESC is with what it escapes


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


def inner_cuts(processor: sentencepiece.SentencePieceProcessor, neutral: str) -> np.ndarray:
    """Where a word of neutral characters may be cut: (256, 256) bool by the bytes before and after the place.

    Characters that are neighbours in no piece are joined by no merge. Without a piece for each byte nothing
    may be cut: what is in no piece is then one token with what is in none beside it.
    """
    cut = np.zeros((256, 256), bool)
    if processor.piece_to_id("<0x00>") != processor.unk_id():
        firsts, lasts = ([character.encode()[place] for character in neutral] for place in (0, -1))
        cut[np.ix_(lasts, firsts)] = True
    pairs = set()
    for token in range(processor.get_piece_size()):
        if not (processor.is_byte(token) or processor.is_control(token) or processor.is_unknown(token)):
            pairs.update(itertools.pairwise(processor.id_to_piece(token)))
    for before, after in pairs:
        if before in neutral and after in neutral:
            cut[before.encode()[-1], after.encode()[0]] = False
    return cut


def _comma(processor: sentencepiece.SentencePieceProcessor, cut: np.ndarray, neutral: str) -> int:
    """A byte that is one token wherever it stands between words of neutral characters; 0 if there is none."""
    firsts, lasts = ([character.encode()[place] for character in neutral] for place in (0, -1))
    fits = (byte for byte in reversed(_PRINTABLE) if cut[byte, firsts].all() and cut[lasts, byte].all())
    return next((byte for byte in fits if len(processor.encode(chr(byte))) == 1), 0)


class Units:
    """Tokens of many texts by their words: of each word once, as long as it is remembered.

    A text is cut at its white space wherever a neutral character is on both sides of it: what is between has
    the same tokens wherever it stands (`splits_at_spaces`). It is looked up with one space before it, but for
    the first of a text. What is not remembered is cut further at `inner_cuts`, and only what is new there
    too goes through SentencePiece.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, counted: bool) -> None:
        """`counted`: the bytes of CaseOps text that each token carries are a second column."""
        self._processor, self._counted = processor, counted
        self._joins = joins_spaces(processor)
        kept = [c for c in "\t\n\r" if processor.normalize(f"a{c}a{c}{c}a") == f"a{c}a{c}{c}a"]
        neutral = "".join([*_NEUTRAL, *kept])
        self._cut = inner_cuts(processor, neutral)
        self._comma = _comma(processor, self._cut, neutral)
        self._simple = _table(b" " + _PRINTABLE + "".join(kept).encode())
        types = [np.uint16, *[np.int64] * counted]
        self._words, self._parts = Memory(self._of_words, types), Memory(self._of_parts, types)

    def columns(self, texts: list[bytes]) -> tuple[Columns, np.ndarray]:
        """Columns of all texts, and how many tokens (n,) each has."""
        joined = b"\xff" + b"\xff".join(texts) + b"\xff" + bytes(PADDING)
        raw = np.frombuffer(joined, np.uint8)
        edges = np.flatnonzero(raw == 0xFF)
        gaps, ends = self._gaps(raw, joined.translate(_SPACES) if self._joins else joined)
        if self._joins:
            raw = raw.copy()
            raw[ends - 1] = ord(" ")
        starts = np.sort(np.concatenate([ends - 1, edges[:-1] + 1]), kind="stable")
        ends = np.sort(np.concatenate([gaps, edges[1:]]), kind="stable")
        firsts = np.searchsorted(starts, edges[:-1] + 1)
        places, counts = self._words.find(raw, starts, ends - starts)
        columns = self._words.take(places, counts)
        if self._counted:  # a token that begins with a space carries all white space of the gap before it
            more = starts[1:] - ends[:-1]
            more[firsts[1:] - 1] = 0
            wider = np.flatnonzero(more)
            columns[1][(np.cumsum(counts) - counts)[wider + 1]] += more[wider]
        return columns, np.add.reduceat(counts, firsts)

    def _gaps(self, raw: np.ndarray, spaced: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Starts and ends of the white space at which texts are cut; it is b" " in `spaced`."""
        at = np.flatnonzero(np.frombuffer(spaced, np.uint8) == ord(" "))
        starts, ends = at, at + 1
        if self._joins and len(at):  # runs of it
            first = np.diff(at, prepend=-1) != 1
            starts, ends = at[first], at[np.append(first[1:], True)] + 1
        before, after = _IS_PRINTABLE[raw[starts - 1]], _IS_PRINTABLE[raw[ends]]
        odd = np.flatnonzero(~before)
        before[odd] = _begins(_ENDS_WORD, raw, starts[odd] - 3)
        odd = np.flatnonzero(~after)
        after[odd] = _begins(_BEGINS_WORD, raw, ends[odd])
        return starts[before & after], ends[before & after]

    def _of_words(
        self, raw: np.ndarray, starts: np.ndarray, lengths: np.ndarray
    ) -> tuple[Columns, np.ndarray]:
        """Columns and counts of words, by their parts; a word that is not simple is its own only part."""
        raw, starts = pack(raw, starts, lengths)
        size = len(raw) - PADDING
        simple = ~np.logical_or.reduceat(self._other(raw), starts)
        begins = np.zeros(size, bool)
        begins[1:] = self._cut.ravel()[raw[: size - 1] * np.uint16(256) + raw[1:size]]
        begins &= np.repeat(simple, lengths)
        begins[starts] = True
        begins = np.flatnonzero(begins)
        places, counts = self._parts.find(raw, begins, np.diff(begins, append=size))
        return self._parts.take(places, counts), np.add.reduceat(counts, np.searchsorted(begins, starts))

    def _other(self, packed: np.ndarray) -> np.ndarray:
        """Bytes that are of no neutral character, or of ESC, and no space, (n,) bool."""
        other = ~self._simple[packed[:-PADDING]]
        long = np.flatnonzero(other)
        long = long[_begins(_IN_WORD, packed, long)]
        for offset in range(3):
            other[long + offset] = False
        return other

    def _of_parts(
        self, raw: np.ndarray, starts: np.ndarray, lengths: np.ndarray
    ) -> tuple[Columns, np.ndarray]:
        """Columns and counts of parts by SentencePiece: of simple ones, many at a time."""
        raw, starts = pack(raw, starts, lengths)
        other = self._other(raw) | (raw[:-PADDING] == self._comma)
        alone = np.logical_or.reduceat(other, starts) | (raw[starts + lengths - 1] == ord(" "))
        alone |= self._comma == 0
        counts = np.empty(len(starts), np.int64)
        found = []
        for chosen, tokens_of in ((~alone, self._of_many), (alone, self._of_each)):
            if chosen.any():
                columns, counts[chosen] = tokens_of(*pack(raw, starts[chosen], lengths[chosen]))
                found.append(columns)
        order = np.argsort(alone, kind="stable")
        places = np.empty(len(starts), np.int64)
        places[order] = np.cumsum(counts[order]) - counts[order]
        index = ragged(places, counts)
        return [np.concatenate(column)[index] for column in zip(*found, strict=True)], counts

    def _of_many(self, packed: np.ndarray, starts: np.ndarray) -> tuple[Columns, np.ndarray]:
        """Of simple parts: texts of many, a comma before each."""
        text = np.insert(packed[:-PADDING], starts, self._comma).tobytes()
        commas = starts + np.arange(len(starts))
        cuts = commas[np.flatnonzero(np.diff(commas // _TEXT_BYTES, prepend=-1))].tolist()
        cuts = zip(cuts, [*cuts[1:], len(text)], strict=True)
        columns, _ = self._sentencepiece([text[start:end] for start, end in cuts])
        comma = columns[0] == self._processor.encode(chr(self._comma))[0]
        counts = np.diff(np.flatnonzero(comma), append=len(comma)) - 1
        return [column[~comma] for column in columns], counts

    def _of_each(self, packed: np.ndarray, starts: np.ndarray) -> tuple[Columns, np.ndarray]:
        """Of any parts, one by one; an "a" before a space keeps that."""
        data, cuts = packed.tobytes(), [*starts.tolist(), len(packed) - PADDING]
        texts = [data[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
        led = np.array([text.startswith(b" ") for text in texts])
        columns, counts = self._sentencepiece(
            [b"a" * skip + text for skip, text in zip(led.tolist(), texts, strict=True)]
        )
        kept = np.ones(len(columns[0]), bool)
        kept[(np.cumsum(counts) - counts)[led]] = False
        return [column[kept] for column in columns], counts - led

    def _sentencepiece(self, texts: list[bytes]) -> tuple[Columns, np.ndarray]:
        """Of whole texts, by SentencePiece."""
        if not self._counted:
            tokens = self._processor.encode(texts, out_type="numpy")
            return [np.concatenate(tokens)], np.array([*map(len, tokens)])
        found = self._processor.encode(texts, out_type="offset_mapping")
        flat = itertools.chain.from_iterable
        tokens = np.array([*flat(mapping["ids"] for mapping in found)], np.uint16)
        spans = np.array([*flat(mapping["offsets"] for mapping in found)], np.int64).reshape(-1, 2)
        counts = np.array([len(mapping["ids"]) for mapping in found])
        sizes = np.array([*map(len, texts)])
        spans += np.repeat(np.cumsum(sizes) - sizes, counts)[:, None]
        return [tokens, lossless_caps.span_byte_counts(b"".join(texts), spans)], counts
