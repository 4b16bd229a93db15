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
bytes each tokenizer piece carries. It and `decode` share one state machine, `_originals`.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

TITLE = "\ue001"
"""The next letter is a capital, the rest of its word is not."""
ALLCAPS = "\ue002"
"""Every letter of the next word is a capital."""
CAPNEXT = "\ue003"
"""The next letter is a capital (inside a word of mixed case)."""
ESC = "\ue004"
"""The next character stands for itself."""

_OPERATORS = TITLE + ALLCAPS + CAPNEXT + ESC
_CHANGED = re.compile(f"[A-Z][A-Za-z]*|[{_OPERATORS}]")
_CAPITAL = re.compile("[A-Z]")
_RUN = re.compile(f"[{_OPERATORS}]|[A-Za-z]+|[^A-Za-z{_OPERATORS}]+")


class LosslessCapsError(ValueError):
    """The string cannot be decoded, or its bytes cannot be counted; the message says where and why."""


def encode(text: str) -> str:
    """Replace the capitals of `text` by operators. Never fails; lone surrogates are copied like the rest.

    >>> encode("NASA's iPhone") == f"{ALLCAPS}nasa's i{CAPNEXT}phone"
    True
    """
    return _CHANGED.sub(_encode_match, text)


def _encode_match(match: re.Match[str]) -> str:
    """Encoded form of an operator, or of a word from its first capital on."""
    word = match[0]
    if word in _OPERATORS:
        return ESC + word
    start = match.start()
    if start and "a" <= match.string[start - 1] <= "z":  # lower-case letters before it: the word is mixed
        return _CAPITAL.sub(_capnext, word)
    if len(word) > 1 and word.isupper():
        return ALLCAPS + word.lower()
    return TITLE + word[0].lower() + _CAPITAL.sub(_capnext, word[1:])


def _capnext(match: re.Match[str]) -> str:
    return CAPNEXT + match[0].lower()


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
