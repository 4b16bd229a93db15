"""CaseOps of random Unicode: it comes back, by the letter of its rules, and every byte is counted."""

import random
import sys
import unicodedata

import numpy as np
import pytest
from test_caps import OPERATORS, partition, reference_encode

import lossless_caps
from bench.data_prep import round_trips
from lossless_caps import LosslessCapsError, decode, encode, piece_byte_counts


def characters(*categories: str) -> str:
    """All characters of some categories."""
    every = map(chr, range(sys.maxunicode + 1))
    return "".join(c for c in every if unicodedata.category(c) in categories)


POOLS = [  # and below: any character of any plane
    "aAbBzZ",
    OPERATORS,
    OPERATORS + "aB 1",
    characters("Lt"),
    characters("Mn", "Mc", "Me"),
    "\u0130\u0131\u017f\u1e9e\u00df\ufb01\u2126\u212a\u212bIiKkSs",  # whose other case is ASCII, or longer
    "".join(chr(ord(operator) + step) for operator in OPERATORS for step in (-64, -4, 4, 64)),
    "\0\t\r\n \x7f\x80\u00a0\u200b\u2028\u2581\ufeff\uffff@[`{",
]


def draw_text(rng: random.Random, surrogates: bool) -> str:
    """Parts from several pools, now and then a long one, or one text again and again."""
    parts = []
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        length = rng.choice((1, 2, 3, 8, 30))
        pool = rng.choice([*POOLS, ""])
        chosen = rng.choices(pool, k=length) if pool else map(chr, rng.choices(range(0x110000), k=length))
        parts.append("".join(chosen) * rng.choice((1, 1, 1, 2, 50)))
    text = "".join(parts) * rng.choice((1,) * 60 + (100,))
    return text if surrogates else text.encode("utf-8", "ignore").decode()


@pytest.mark.cases(120)
def test_texts_of_the_bench_come_back(rng):
    """What `bench/data_prep.py` does, many at once too."""
    seed = rng.randrange(10**6)
    print("seed", seed)
    assert round_trips(2000, seed) == 0


@pytest.mark.cases(180)
def test_texts_come_back(rng):
    for _ in range(100):
        text = draw_text(rng, surrogates=True)
        encoded = encode(text)
        assert decode(encoded) == text and encoded == reference_encode(text), ascii(text)


@pytest.mark.cases(180)
def test_bytes_are_counted(rng):
    """However the encoded text is cut into pieces; the fast count of spans is that of the decoder."""
    for _ in range(60):
        text = draw_text(rng, surrogates=False)
        encoded = encode(text)
        pieces = partition(encoded, [rng.randrange(10**6) for _ in range(rng.randrange(12))])
        counts = piece_byte_counts(pieces)
        edges = np.cumsum([0, *(len(piece.encode()) for piece in pieces)])
        spans = np.stack([edges[:-1], edges[1:]], 1)
        assert sum(counts) == len(text.encode()), ascii(text)
        assert lossless_caps.span_byte_counts(encoded.encode(), spans).tolist() == counts, ascii(pieces)


@pytest.mark.cases(120)
def test_texts_that_nobody_encoded(rng):
    """Decoder and byte count refuse the same ones, or agree."""
    for _ in range(300):
        text = "".join(rng.choices(OPERATORS + "aB 1\u00c9", k=rng.randrange(10)))
        pieces = partition(text, [rng.randrange(10) for _ in range(rng.randrange(4))])
        try:
            size = len(decode(text).encode())
        except LosslessCapsError:
            with pytest.raises(LosslessCapsError):
                piece_byte_counts(pieces)
        else:
            assert sum(piece_byte_counts(pieces)) == size, ascii(text)
