"""Marker-pair fusion (PR #2109): a space and the capital's operator behind it become one token.

Nearly every capital begins a word, so CaseOps text is full of the tokens (space, TITLE), (space, ALLCAPS) and
(space, CAPNEXT). Each pair becomes one of the pieces of bytes 0, 1 and 2, which no text has. The second of a
pair is never the first of another, so pairs do not overlap: what `fused` makes, `unfused` takes back, token
for token and byte for byte. An operator carries no bytes of text, so a pair's are those of its space.
"""

from collections.abc import Mapping

import numpy as np
import sentencepiece

from dataprep.shards import FIRST_OPERATOR_ID, DataError
from dataprep.splitting import SPACE_PIECE

FUSED_OPERATORS = 3  # TITLE, ALLCAPS, CAPNEXT; ESC stands before an operator of the text, not before a word
Pairs = Mapping[int, tuple[int, int]]


def marker_pairs(processor: sentencepiece.SentencePieceProcessor) -> Pairs:
    """The fused tokens of a CaseOps tokenizer: token -> (space, operator).

    Raises:
        DataError: it has no pieces for single bytes, or none for a bare space.
    """
    pieces, space = [f"<0x{byte:02X}>" for byte in range(FUSED_OPERATORS)], processor.piece_to_id(SPACE_PIECE)
    tokens = [processor.piece_to_id(piece) for piece in pieces]
    if space == processor.unk_id() or not all(map(processor.is_byte, tokens)):
        raise DataError(f"--fuse-markers: the tokenizer has no pieces {', '.join(pieces)} and a bare space")
    return {token: (space, FIRST_OPERATOR_ID + number) for number, token in enumerate(tokens)}


def fused(tokens: np.ndarray, pairs: Pairs, carried: np.ndarray | None = None) -> tuple:
    """Tokens (T,) uint16 with their pairs fused, and the bytes that each carries, where they are given.

    Raises:
        DataError: a fused token is there already, or an operator of a pair carries bytes.
    """
    if np.isin(tokens, list(pairs)).any():
        raise DataError("holds a byte 0, 1 or 2, which --fuse-markers needs for itself")
    kept, result = np.ones(len(tokens), bool), tokens.copy()
    for token, (space, operator) in pairs.items():
        first = np.flatnonzero((tokens[:-1] == space) & (tokens[1:] == operator))
        result[first], kept[first + 1] = token, False
    if carried is not None:
        if carried[~kept].any():
            raise DataError("an operator behind a space carries bytes: --fuse-markers would lose them")
        carried = carried[kept]
    return result[kept], carried


def unfused(tokens: np.ndarray, pairs: Pairs, carried: np.ndarray | None = None) -> tuple:
    """The inverse of `fused`: tokens and their bytes, each pair's with its space."""
    first, second = np.arange(1 << 16, dtype=np.uint16), np.zeros(1 << 16, np.uint16)
    for token, pair in pairs.items():
        first[token], second[token] = pair
    place = np.flatnonzero(second[tokens]) + 1
    carried = None if carried is None else np.insert(carried, place, 0)
    return np.insert(first[tokens], place, second[tokens[place - 1]]), carried


def pairs_of(manifest: Mapping) -> Pairs:
    """The fused tokens that a manifest tells of, {} where there are none."""
    return {int(token): tuple(pair) for token, pair in manifest.get("fused_markers", {}).items()}
