"""Are the bytes of a sidecar those of its tokens? Every token of every document, by the tokenizer's pieces.

A piece holds its UTF-8 bytes: an operator none, or 3 where ESC makes it a character of the text; of the byte
pieces of one character the last one carries all. A tokenizer that gives every text back leaves no room beside
that, but for U+2581, which SentencePiece takes for a space. One that normalises hides what a text was: a run
of white space is one space in the tokens, and a full-width letter or digit (three bytes) or a mathematical
one (four) is ASCII. So there a piece that begins with a space may carry more, and a few others too.
"""

from typing import NamedTuple

import numpy as np
import sentencepiece

from dataprep.shards import BOS_ID, FIRST_OPERATOR_ID, OPERATOR_COUNT, document_parts
from dataprep.splitting import OPERATORS, SPACE_PIECE, rewrites

ODD_BYTES_ALLOWED = 0.02  # share of tokens that may carry other bytes, where the tokenizer normalises
ODD_LETTERS_ALLOWED = 0.01  # and of pieces of lower-case letters alone, which few texts write otherwise
SPACES_ALLOWED = 1 / 3  # of the pieces with a space may stand for more white space (of web text: 2 %)
ODD_ALLOWED = 20  # tokens, however few there are: of fewer, nothing can be said
CHUNK_TOKENS = 1 << 22
ESC = FIRST_OPERATOR_ID + OPERATOR_COUNT - 1
HOSTILE = " \ufb01 \uff21\uff22\uff11  e\u0301\u00e9 \u00bd\u2026 \u3000x\n\n\ty\u200b\r\n z\u00a0\U0001d518 "


class Pieces(NamedTuple):
    """Of every token, (65536,): the bytes that it holds, and what kind it is of."""

    sizes: np.ndarray  # int64
    ascii: np.ndarray  # bytes of its ASCII characters but for a leading space; 0 where it has others
    spaced: np.ndarray  # begins with a space
    byte: np.ndarray  # stands for one byte
    known: np.ndarray  # is text
    letters: np.ndarray  # is lower-case letters alone


class Odd(NamedTuple):
    """How many tokens carry what their pieces do not hold."""

    tokens: int  # that were looked at
    spaced: int  # of these begin with a space
    letters: int  # are lower-case letters alone
    wrong: int  # carry what nothing explains
    wrong_letters: int  # of the letters
    blocks: int  # may be U+2581
    spaces: int  # may stand for more white space
    first: int  # document, from 0, of the first one that is wrong; -1: none

    def problem(self, lossless: bool) -> str:
        """What is wrong with the sidecar, "" where nothing is."""
        allowed = 0 if lossless else max(ODD_BYTES_ALLOWED * self.tokens, ODD_ALLOWED)
        if self.wrong > allowed:
            found = f"{self.wrong} of {self.tokens} tokens carry other bytes than their pieces hold"
            return f"{found}, the first in validation document {self.first}"
        if self.wrong_letters > max(ODD_LETTERS_ALLOWED * self.letters, ODD_ALLOWED):
            return f"{self.wrong_letters} of {self.letters} pieces of letters carry other bytes than those"
        more, share = (self.blocks, 1e-4) if lossless else (self.spaces, SPACES_ALLOWED)
        if more > max(share * self.spaced, ODD_ALLOWED):
            return f"{more} of {self.spaced} pieces that begin with a space carry more than that"
        return ""


def is_lossless(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether the tokenizer has no rules to rewrite text by, and gives back all that normalisers change."""
    return not rewrites(processor) and processor.decode(processor.encode(HOSTILE)) == HOSTILE


def pieces_of(processor: sentencepiece.SentencePieceProcessor) -> Pieces:
    """What the pieces of a CaseOps tokenizer hold."""
    found = Pieces(*(np.zeros(1 << 16, kind) for kind in (np.int64, np.int64, bool, bool, bool, bool)))
    for token in range(processor.get_piece_size()):
        if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
            continue
        text = processor.id_to_piece(token).replace(SPACE_PIECE, " ")
        found.known[token], found.byte[token] = True, processor.is_byte(token)
        found.sizes[token] = 1 if found.byte[token] else len(text.encode()) * (text not in OPERATORS)
        found.spaced[token] = text.startswith(" ")
        rest = text.removeprefix(" ")
        found.ascii[token] = len(rest) * (rest.isascii() and not found.byte[token])
        found.letters[token] = text.isascii() and text.isalpha() and text.islower()
    return found


def odd_tokens(tokens: np.ndarray, carried: np.ndarray, pieces: Pieces, lossless: bool) -> Odd:
    """Look at a validation stream, (T,) uint16, and its sidecar, (T,) uint16, BOS before each document."""
    counts, first, documents = np.zeros(7, np.int64), -1, 0
    for start, end in document_parts(tokens, CHUNK_TOKENS):
        part, bytes_ = tokens[start:end], np.asarray(carried[start:end], np.int64)
        wrong, blocks, spaces = _judged(part, bytes_, pieces, lossless)
        letters = pieces.letters[part]
        kinds = pieces.known[part], pieces.spaced[part], letters, wrong, wrong & letters, blocks, spaces
        counts += [np.count_nonzero(kind) for kind in kinds]
        if first < 0 and wrong.any():
            first = documents + int(np.count_nonzero(part[: wrong.argmax() + 1] == BOS_ID)) - 1
        documents += int(np.count_nonzero(part == BOS_ID))
    return Odd(*counts.tolist(), first)


def _judged(tokens: np.ndarray, carried: np.ndarray, pieces: Pieces, lossless: bool) -> tuple:
    """Which tokens are wrong, which may be U+2581, which may stand for more white space, each (T,) bool."""
    sizes, known = pieces.sizes[tokens].copy(), pieces.known[tokens]
    before = np.concatenate([[0], tokens[:-1]])
    literal = (tokens - np.uint16(FIRST_OPERATOR_ID) < OPERATOR_COUNT) & (before == ESC) & (carried == 3)
    sizes[literal] = 3
    more = carried - sizes
    differs = (more != 0) & known & ~pieces.byte[tokens]
    spaced = pieces.spaced[tokens] & differs & (more > 0)
    blocks = spaced & (more == 2)
    wrong = differs & ~blocks if lossless else differs & ~spaced
    if not lossless:
        plain = pieces.ascii[tokens]
        wrong &= (plain == 0) | (carried != 3 * plain) & (carried != 4 * plain)
    return wrong | _wrong_runs(pieces.byte[tokens], carried, lossless), blocks, spaced


def _wrong_runs(byte: np.ndarray, carried: np.ndarray, lossless: bool) -> np.ndarray:
    """The first token of each run of byte pieces that does not carry as many bytes as it is long."""
    starts = np.flatnonzero(np.diff(byte, prepend=False) & byte)
    wrong = np.zeros(len(byte), bool)
    if len(starts):
        ends = np.flatnonzero(np.diff(byte, append=False) & byte) + 1
        sums = np.concatenate([[0], np.cumsum(carried)])
        found, held = sums[ends] - sums[starts], ends - starts
        wrong[starts] = (found != held) & (lossless | (found != 3 * held) & (found != 4 * held))
    return wrong
