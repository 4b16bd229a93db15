"""The CaseOps bijection: examples, round trips, malformed strings, byte accounting."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lossless_caps import ALLCAPS, CAPNEXT, ESC, TITLE, LosslessCapsError, decode, encode, piece_byte_counts

OPERATORS = TITLE + ALLCAPS + CAPNEXT + ESC

ANY_CHARACTER = st.characters(exclude_categories=())  # lone surrogates too
LIKELY = st.sampled_from(OPERATORS + "aAbBzZ \n'1\u00e9\u00c9\u0130\u0131\ufb01\U0001f600")
ANY_TEXT = st.text(LIKELY | ANY_CHARACTER)
UTF8_TEXT = st.text(LIKELY | st.characters(codec="utf-8"))
OPERATOR_TEXT = st.text(st.sampled_from(OPERATORS + "aB \u00c9"), max_size=8)

EXAMPLES = [
    ("", ""),
    ("plain lower case, 123.", "plain lower case, 123."),
    ("Hello World", f"{TITLE}hello {TITLE}world"),
    ("NASA", f"{ALLCAPS}nasa"),
    ("A", f"{TITLE}a"),
    ("AB", f"{ALLCAPS}ab"),
    ("aB", f"a{CAPNEXT}b"),
    ("iPhone", f"i{CAPNEXT}phone"),
    ("GmbH", f"{TITLE}gmb{CAPNEXT}h"),
    ("ABc", f"{TITLE}a{CAPNEXT}bc"),
    ("aBC", f"a{CAPNEXT}b{CAPNEXT}c"),
    ("I'M", f"{TITLE}i'{TITLE}m"),
    ("5PM", f"5{ALLCAPS}pm"),
    ("snake_CASE", f"snake_{ALLCAPS}case"),
    ("NA\u00cfVE", f"{ALLCAPS}na\u00cf{ALLCAPS}ve"),
    ("\u00c9cole \u0130I", f"\u00c9cole \u0130{TITLE}i"),
    (f"x{TITLE}Y", f"x{ESC}{TITLE}{TITLE}y"),
    (ESC + ESC, ESC * 4),
]

MALFORMED = [
    TITLE,
    ALLCAPS,
    CAPNEXT,
    ESC,
    f"a {TITLE}",
    f"a{CAPNEXT}",
    f"{ESC}{ESC}{ESC}",
    f"{TITLE} a",
    f"{TITLE}1",
    f"{CAPNEXT}\u00c9",
    f"a{TITLE}b",
    f"ab{ALLCAPS}cd",
    f"{ESC}a{TITLE}b",
    TITLE + TITLE + "a",
    TITLE + ALLCAPS + "ab",
    CAPNEXT + CAPNEXT + "a",
    CAPNEXT + TITLE + "a",
    CAPNEXT + ESC + "a",
    ALLCAPS + ESC + TITLE,
    TITLE + ESC + "ab",
]


def reference_encode(text: str) -> str:
    """The rules of SPEC section 1 word by word, without regard to speed."""

    def word_or_operator(match: re.Match[str]) -> str:
        word = match[0]
        if word in OPERATORS:
            return ESC + word
        if word == word.lower():
            return word
        if len(word) >= 2 and word == word.upper():
            return ALLCAPS + word.lower()
        if word[1:] == word[1:].lower():
            return TITLE + word.lower()
        first = TITLE + word[0].lower() if word[0].isupper() else word[0]
        return first + "".join(CAPNEXT + c.lower() if c.isupper() else c for c in word[1:])

    return re.sub(f"[A-Za-z]+|[{OPERATORS}]", word_or_operator, text)


def partition(text: str, cuts: list[int]) -> list[str]:
    """Text cut at the given places (modulo its length); equal places give empty pieces."""
    places = sorted(cut % (len(text) + 1) for cut in cuts)
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize(("text", "encoded"), EXAMPLES)
def test_examples(text, encoded):
    assert encode(text) == encoded
    assert decode(encoded) == text


@given(ANY_TEXT)
def test_encode_follows_the_rules(text):
    assert encode(text) == reference_encode(text)


@settings(max_examples=500)
@given(ANY_TEXT)
@example("\ud800A\udfff")
def test_round_trip(text):
    assert decode(encode(text)) == text


@given(ANY_TEXT)
def test_encoded_text_has_no_capitals(text):
    assert not re.search("[A-Z]", encode(text))


@pytest.mark.parametrize("text", ["a" * 1_000_000, "aB" * 300_000, "A" * 1_000_000, OPERATORS * 100_000])
def test_long_words_take_linear_time(text):
    """A pattern that backtracks over such words would run for hours."""
    assert decode(encode(text)) == text


@pytest.mark.parametrize("text", MALFORMED, ids=ascii)
def test_malformed_text_is_refused(text):
    with pytest.raises(LosslessCapsError, match="malformed CaseOps text: .*U\\+"):
        decode(text)
    with pytest.raises(LosslessCapsError, match="malformed CaseOps text"):
        piece_byte_counts(list(text))


def test_error_names_the_place():
    with pytest.raises(LosslessCapsError, match="U\\+0031 at character 3 .*U\\+E001"):
        decode(f"a {TITLE}1")


@settings(max_examples=500)
@given(OPERATOR_TEXT, st.lists(st.integers(0, 8), max_size=4))
def test_decode_and_byte_counts_agree_on_any_string(text, cuts):
    """Strings that `encode` never writes: both refuse them, or both give them the same meaning."""
    try:
        size = len(decode(text).encode())
    except LosslessCapsError:
        with pytest.raises(LosslessCapsError):
            piece_byte_counts(partition(text, cuts))
    else:
        assert sum(piece_byte_counts(partition(text, cuts))) == size


@settings(max_examples=500)
@given(UTF8_TEXT, st.lists(st.integers(0, 1000), max_size=12))
def test_byte_counts_sum_to_utf8_length(text, cuts):
    pieces = partition(encode(text), cuts)
    counts = piece_byte_counts(pieces)
    assert len(counts) == len(pieces)
    assert sum(counts) == len(text.encode())


@given(UTF8_TEXT)
def test_byte_count_of_single_characters(text):
    """Cut into characters: operators 0 (an escaped one 3), everything else its own UTF-8 length."""
    encoded = encode(text)
    expected, escaped = [], False
    for character in encoded:
        is_operator = character in OPERATORS and not escaped
        expected.append(0 if is_operator else len(character.encode()))
        escaped = is_operator and character == ESC
    assert piece_byte_counts(encoded) == expected


def test_byte_counts_carry_state_across_pieces():
    assert piece_byte_counts([ESC, "", TITLE, TITLE, "ab"]) == [0, 0, 3, 0, 2]
    assert piece_byte_counts([]) == []


def test_lone_surrogate_has_no_bytes():
    assert encode("A\ud800") == f"{TITLE}a\ud800"
    with pytest.raises(LosslessCapsError, match="lone surrogate U\\+D800"):
        piece_byte_counts(["a", "\ud800"])
