"""Shorter ways of data preparation lead to the same: starts, spans from tokens, what cannot decode."""

import random

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

import lossless_caps
from bench import encoder as bench_encoder
from dataprep import encoding, splitting
from dataprep.demo import demo_documents
from dataprep.encoding import Encoder
from dataprep.reading import Document

SPACES = [
    *("", " ", "\n", "\t \r\n", "\x0b", "\x1c", "\u0085", "\u00a0", "\u1680"),
    *("\u2009", "\u2028", "\u3000"),
]
WORDS = ["the", "old", "river", "\u00e9t\u00e9", "\u4e16\u754c", "\u2581", "\u200b", "\ue001", "\U0001f600"]


@pytest.fixture(scope="module")
def texts() -> list[bytes]:
    """What tokenizers get wrong, and text as it is found."""
    generator = random.Random(11)
    made = [bench_encoder.tokens_text(generator).encode() for _ in range(1500)]
    return [*made, *(document.utf8[:3000] for document in demo_documents()[:20])]


@pytest.fixture(scope="module")
def processors(tokenizer_dir, texts) -> list[sentencepiece.SentencePieceProcessor]:
    """Two that normalise, one that does not and has single bytes, one that knows few characters."""
    names = "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model", "fineweb_8192_bpe.model"
    published = [sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_dir / name)) for name in names]
    made = encoding.train_tokenizer((text.decode() for text in texts[-20:]), 500)
    return [*published, sentencepiece.SentencePieceProcessor(model_proto=made)]


def test_spans_from_tokens_are_sentencepieces_own(processors, texts):
    for processor in processors:
        told = 0
        for text in lossless_caps.encode_many(texts):
            normal = processor.normalize(text).replace(splitting.SPACE_PIECE.encode(), b" ")
            told += splitting._places(text, normal) is not None
            tokens, spans = splitting.tokens_and_spans(processor, text)
            own = processor.encode(text, out_type="offset_mapping")
            assert tokens.tolist() == [*own["ids"]], text
            assert spans.tolist() == [[*span] for span in own["offsets"]], text
        assert 100 < told < len(texts)  # both ways were gone


def test_spans_where_characters_are_unknown():
    """Without pieces for single bytes an unknown character has no text of its own: SentencePiece is asked."""
    import io

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the old river saw it"] * 20), model_writer=file, model_type="bpe",
        vocab_size=40, add_dummy_prefix=False, minloglevel=2,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    for text in (b"the old river", "the \u4e16\u754c river".encode(), b"QX", b""):
        tokens, spans = splitting.tokens_and_spans(processor, text)
        own = processor.encode(text, out_type="offset_mapping")
        assert tokens.tolist() == [*own["ids"]] and spans.tolist() == [[*span] for span in own["offsets"]]


@given(st.lists(st.sampled_from(WORDS), max_size=60), st.randoms(use_true_random=False))
@example(["the"] * 200, random.Random(1))
def test_texts_that_differ_in_white_space_have_one_start(words, generator):
    one, other = (
        "".join(word + generator.choice(SPACES) * generator.randrange(1, 90) for word in words)
        for _ in range(2)
    )
    one, other = Document(one.encode(), ""), Document(other.encode(), "")
    assert one.key == other.key and one.start == other.start
    assert one.start == Document(" ".join(one.text.split()).encode(), "").start
    assert len(one.start) <= 32


def test_starts_tell_texts_apart():
    documents = [Document(f"{number} and the rest".encode(), "") for number in range(50)]
    documents += [Document(chr(0x4E00 + 97 * number).encode(), "") for number in range(50)]
    assert len({document.start for document in documents}) > 90


def test_what_cannot_decode_does_not(processors, texts):
    """Never said of tokens that decode to their text; said of many texts where the model has no line ends."""
    for processor in processors:
        said = wrong = 0
        for text in lossless_caps.encode_many(texts):
            tokens = processor.encode(text, out_type="numpy", add_bos=True)
            may = encoding._may_decode(processor, tokens, text)
            said += not may
            wrong += not may and processor.decode(tokens[1:].tolist()).encode() == text
        assert wrong == 0
        assert said > 20 or processor is processors[-1]


def test_equal_scores_are_left_to_sentencepiece(processors):
    """Symbols are numbered by their scores: pieces of one score would be merged in an order of their own."""
    model = processors[-1].serialized_model_proto()
    assert splitting.merges_here(processors[-1])
    pieces = [text for text, _, kind in splitting.pieces_of_model(model) if kind == 1 and len(text) > 1]
    first, second = (model.index(b"\x15", model.index(piece.encode())) + 1 for piece in pieces[:2])
    tied = model[:second] + model[first : first + 4] + model[second + 4 :]
    processor = sentencepiece.SentencePieceProcessor(model_proto=tied)
    assert not splitting.merges_here(processor)
    assert not Encoder(encoding.make_tokenizer("tied.model", tied)).by_words


def test_all_documents_are_selected_without_a_sample(tg, monkeypatch):
    """Of none too."""
    assert tg.select_documents([], 1, 0) == []
    monkeypatch.setattr(random, "Random", None)
    assert tg.select_documents([(0, 5), (5, 7)], 1.0, 0) == [(0, 5), (5, 7)]
