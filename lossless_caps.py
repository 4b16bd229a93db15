"""CaseOps: a reversible transform that moves capital letters into four operator characters (PR #1729).

A tokenizer that sees lower-case text only needs one piece for "the", "The" and "THE". The capitals are kept
as operators of the private use area, so nothing is lost. Over maximal runs of ASCII letters ("words"):

    word        encoded                     rule
    hello       hello                       no capital: unchanged
    Hello       TITLE hello                 first letter upper, the rest (possibly none) lower
    HELLO       ALLCAPS hello               two or more letters, all upper
    heLLo       he CAPNEXT l CAPNEXT l o    any other mix; TITLE stands for a leading capital
    <operator>  ESC <operator>              an operator character that the text itself contains

Everything else is copied; letters outside ASCII end a word. `decode(encode(s)) == s` for every `str`.

The validation score is bits per byte of the *original* text, so `piece_byte_counts` says how many of those
bytes each tokenizer piece carries. It and `decode` share one state machine, `_originals`. Encoding, and
counting bytes of text that was encoded here, work on arrays of UTF-8 bytes (`encode_utf8`,
`span_byte_counts`): data preparation puts tens of gigabytes through them.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

TITLE = "\ue001"
"""The next letter is a capital, the rest of its word is not."""
ALLCAPS = "\ue002"
"""Every letter of the next word is a capital."""
CAPNEXT = "\ue003"
"""The next letter is a capital (inside a word of mixed case)."""
ESC = "\ue004"
"""The next character stands for itself."""

_OPERATORS = TITLE + ALLCAPS + CAPNEXT + ESC
_RUN = re.compile(f"[{_OPERATORS}]|[A-Za-z]+|[^A-Za-z{_OPERATORS}]+")

# In UTF-8 an operator is three bytes, 0xEE 0x80 and one of these; 0xEE begins a character wherever it stands.
_TITLE, _ALLCAPS, _CAPNEXT, _ESC = (operator.encode()[2] for operator in _OPERATORS)
_BETWEEN = b"\xff"  # a byte that no UTF-8 text holds
_SLICE = 1 << 22  # bytes encoded at once: the arrays of a step take about nine times as much


class LosslessCapsError(ValueError):
    """The string cannot be decoded, or its bytes cannot be counted; the message says where and why."""


def encode(text: str) -> str:
    """Replace the capitals of `text` by operators. Never fails; lone surrogates are copied like the rest.

    >>> encode("NASA's iPhone") == f"{ALLCAPS}nasa's i{CAPNEXT}phone"
    True
    """
    return encode_utf8(text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogatepass")


def encode_many(texts: Sequence[bytes]) -> list[bytes]:
    """`encode_utf8` of each text, in one go: several times as fast as one by one when they are short."""
    return encode_utf8(_BETWEEN.join(texts)).split(_BETWEEN) if texts else []


def encode_utf8(data: bytes) -> bytes:
    """`encode` from UTF-8 to UTF-8, without a step of Python for each character or word."""
    parts, start = [], 0
    while start < len(data):
        end = len(data)
        if end - start > _SLICE:  # no word and no operator crosses a space
            end = data.rfind(b" ", start, start + _SLICE) + 1 or end
        parts.append(_encode_slice(data[start:end]))
        start = end
    return b"".join(parts)


def _encode_slice(data: bytes) -> bytes:
    """Only capitals and operators are looked at: an operator is inserted before each that needs one."""
    raw = np.frombuffer(data, np.uint8)
    at, operator = _capitals(raw)
    if b"\xee\x80" in data:
        literal = _operators(raw)
        at = np.concatenate([at, literal])
        order = np.argsort(at)
        at = at[order]
        operator = np.concatenate([operator, np.full(len(literal), _ESC, np.uint8)])[order]
    place = at + 3 * np.arange(len(at))
    encoded = np.empty(len(raw) + 3 * len(at), np.uint8)
    copied = np.ones(len(encoded), bool)
    for offset, byte in enumerate((0xEE, 0x80, operator)):
        encoded[place + offset] = byte
        copied[place + offset] = False
    encoded[copied] = np.frombuffer(data.lower(), np.uint8)  # bytes.lower() knows ASCII letters only
    return encoded.tobytes()


def _capitals(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where an operator goes before a capital, and which: (n,) positions and last bytes.

    A run of capitals decides for itself: it is a whole word of two or more letters (ALLCAPS before the
    first), or its first letter begins a word (TITLE), and every other letter takes CAPNEXT.
    """
    at = np.flatnonzero(raw - np.uint8(ord("A")) < 26)  # unsigned: what is below "A" wraps around
    padded = np.zeros(len(raw) + 2, np.uint8)
    padded[1:-1] = raw
    before, after = padded[at], padded[at + 2]
    first = before - np.uint8(ord("A")) >= 26  # of a run
    begins_word = (before | 32) - np.uint8(ord("a")) >= 26
    ends_word = (after | 32) - np.uint8(ord("a")) >= 26
    starts = np.flatnonzero(first)
    lengths = np.diff(starts, append=len(at))
    whole = begins_word[starts] & ends_word[starts + lengths - 1] & (lengths > 1)
    operator = np.where(begins_word, np.uint8(_TITLE), np.uint8(_CAPNEXT))
    operator[starts[whole]] = _ALLCAPS
    needed = first | ~np.repeat(whole, lengths)
    return at[needed], operator[needed]


def _operators(raw: np.ndarray) -> np.ndarray:
    """Positions of the operator characters in UTF-8 text, (n,)."""
    at = np.flatnonzero(raw[:-2] == 0xEE)
    return at[(raw[at + 1] == 0x80) & (raw[at + 2] >= _TITLE) & (raw[at + 2] <= _ESC)]


def span_byte_counts(encoded: bytes, spans: np.ndarray) -> np.ndarray:
    """`piece_byte_counts` for text that `encode_utf8` wrote, without a step of Python for each piece.

    Args:
        encoded: the whole text, UTF-8.
        spans: (n, 2) byte offsets of the pieces' surfaces, each at a character's edge.

    Returns:
        (n,) int64 original UTF-8 bytes that each piece carries.
    """
    raw = np.frombuffer(encoded, np.uint8)
    operators = _operators(raw)
    carried = np.ones(len(raw), np.uint8)
    for offset in range(3):
        carried[operators + offset] = 0
    literal = -1
    for at in operators[raw[operators + 2] == _ESC].tolist():
        if at != literal:  # this ESC is not itself escaped, so what follows is
            literal = at + 3
            carried[literal : literal + 3] = 1
    before = np.zeros(len(raw) + 1, np.int64)
    np.cumsum(carried, out=before[1:])
    return before[spans[:, 1]] - before[spans[:, 0]]


def decode(text: str) -> str:
    """Inverse of `encode`.

    Also takes strings that `encode` would have written differently, as long as they have one meaning: a
    capital stays a capital, CAPNEXT may stand at the start of a word, ESC may stand before any character.

    Raises:
        LosslessCapsError: an operator has nothing to act on (at the end, before a non-letter), or stands
            inside a word where it cannot, or two operators meet that do not combine.
    """
    return "".join(_originals([text]))


def piece_byte_counts(surfaces: Iterable[str]) -> list[int]:
    """Original UTF-8 bytes that each of the consecutive `surfaces` carries; they sum to those of the text.

    Operators carry 0 bytes, an escaped operator its own 3, a letter 1, any other character its UTF-8 length.

    Args:
        surfaces: parts of one encoded string in order, cut anywhere, empty ones allowed. What the tokenizer
            left out at the ends of the string belongs to no surface and is not counted.

    Raises:
        LosslessCapsError: the joined surfaces cannot be decoded, or hold a lone surrogate (no UTF-8 form).
    """
    try:
        return [len(original.encode("utf-8")) for original in _originals(surfaces)]
    except UnicodeEncodeError as error:
        surrogate = f"U+{ord(error.object[error.start]):04X}"
        raise LosslessCapsError(f"lone surrogate {surrogate} has no UTF-8 bytes to count") from error


@dataclass(slots=True)
class _State:
    """What the decoder remembers between two runs of characters."""

    position: int = 0
    """Characters read so far."""
    in_word: bool = False
    """The last character was a letter."""
    all_caps: bool = False
    """The word that is open was announced by ALLCAPS."""
    waiting: str = ""
    """Operators read that still have to meet their letter, or ESC that has to meet its character."""

    def refuse(self, character: str, reason: str) -> LosslessCapsError:
        where = f"U+{ord(character):04X} at character {self.position}"
        return LosslessCapsError(f"malformed CaseOps text: {where} {reason}")


def _originals(surfaces: Iterable[str]) -> Iterator[str]:
    """Original text of each surface; the one state machine behind decoding and byte counting."""
    state = _State()
    for surface in surfaces:
        original = []
        for run in _RUN.findall(surface):
            if state.waiting.endswith(ESC):
                original.append(_escaped(state, run[0]))
                state.position += 1
                run = run[1:]
            if run:
                original.append(_step(state, run))
                state.position += len(run)
        yield "".join(original)
    if state.waiting:
        raise LosslessCapsError(f"malformed CaseOps text: it ends after U+{ord(state.waiting[-1]):04X}")


def _escaped(state: _State, character: str) -> str:
    """Take the character after ESC. A letter belongs to a word, anything else ends it."""
    state.waiting = ""
    state.in_word = character.isascii() and character.isalpha()
    state.all_caps = state.all_caps and state.in_word
    return character


def _step(state: _State, run: str) -> str:
    """Take one operator, run of letters or run of other characters; returns what it means."""
    if run in _OPERATORS:
        _operator(state, run)
        return ""
    if not (run.isascii() and run.isalpha()):
        if state.waiting:
            raise state.refuse(run[0], f"stands where U+{ord(state.waiting[-1]):04X} needs a letter")
        state.in_word = state.all_caps = False
        return run
    waiting, state.waiting, state.in_word = state.waiting, "", True
    if state.all_caps or waiting.startswith(ALLCAPS):
        state.all_caps = True
        return run.upper()
    return run[0].upper() + run[1:] if waiting else run


def _operator(state: _State, operator: str) -> None:
    """Take one operator. Only CAPNEXT may follow a waiting one, and only TITLE or ALLCAPS."""
    if operator == CAPNEXT:
        if state.waiting.endswith(CAPNEXT):
            raise state.refuse(operator, "repeats itself")
    elif state.waiting:
        raise state.refuse(operator, f"follows U+{ord(state.waiting[-1]):04X}, which needs a letter")
    elif operator != ESC and state.in_word:
        raise state.refuse(operator, "stands inside a word")
    state.waiting += operator
