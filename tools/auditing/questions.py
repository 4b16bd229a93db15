"""B1-B6: what an unknown script is asked (`blackbox.Subject`), and what a legal one must answer.

`chances.py` has B1 and B2 and says why. B4 alone finds text that was learnt by heart. Runs of the script with
a large vocabulary: B1 18, B2 8, B3 10, B4 16, B5 1, B6 4; about 70 for B1 and B2 where 16 tokens are all.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from auditing.blackbox import Subject, Total
from auditing.chances import causal, document, drawn_among, normalised
from auditing.run import BOS, VERIFIED, AuditError, NotChecked, Verdict, require, verdict_of
from dataprep.encoding import Encoder, make_tokenizer, tokenise_validation
from dataprep.reading import Document, Reader, make_document, parse_block
from dataprep.shards import DataError
from runs import SIZE_LIMIT

ONE_TOKEN = 40.0  # nats that one token costs at most, or changes in what follows
STANDARD_ERRORS, GROUPS = 5.0, 8
TEXTS = {
    "ASCII": "the cat sat on the mat and saw a dog; it ran away from it, 12 times.",
    "letters of three bytes": "\u0905\u092e\u0930\u0915\u0924 \u6c34\u706b\u6728\u91d1\u571f",
    "capitals": "Paris and NASA met McDonald in OSLO, THEN Went Home",
    "white space": "one  two   three\nfour\n\nfive \t six",
}


# -- B3: bytes


def counted(subject: Subject) -> str:
    """B3: bytes of texts of known size, and of all that was asked before; all targets."""
    known = list(_known_texts(subject))
    for _, documents, sizes in known:
        subject.ask(*documents, sizes=sizes)
    for answer in subject.answers:
        total = answer.total
        require(total.targets == answer.targets, f"{total.targets} of {answer.targets} targets scored")
        told = f"{total.bytes:.1f} bytes charged for {answer.bytes}, in a set of {answer.targets} targets"
        require(total.bytes_are(answer.bytes), told)
    kinds = ", ".join(dict.fromkeys(what for what, _, _ in known))
    return f"{len(subject.answers)} sets have their bytes and targets, among them {kinds}"


def _known_texts(subject: Subject) -> Iterator[tuple[str, list[np.ndarray], np.ndarray | None]]:
    """Name, documents and bytes of each token: of small and of large tokens, and of texts."""
    sizes = np.array([subject.charged(np.array([BOS, token]))[1] for token in subject.alphabet])
    order = subject.alphabet[np.argsort(sizes, kind="stable")]
    yield "small tokens", [document(np.tile(order[: max(1, len(order) // 4)], 3)[:120])], None
    yield "large tokens", [document(np.tile(order[-max(1, len(order) // 4) :], 3)[-120:])], None
    if subject.tokenizer:
        for what, text in TEXTS.items():
            tokens, sizes = tokenised(subject, text)
            yield what, [tokens], sizes
        yield from _in_pieces(subject)


def _in_pieces(subject: Subject) -> Iterator[tuple[str, list[np.ndarray], np.ndarray]]:
    """The same text, as the tokenizer has it and letter by letter: a byte a letter."""
    words = "the cat sat on the mat"
    whole, sizes = tokenised(subject, words)
    processor = encoder_of(subject.tokenizer, subject.charge is not None).tokenizer.processor
    letters = [processor.piece_to_id(letter) for letter in words.replace(" ", "\u2581")]
    yield "a text", [whole], sizes
    if processor.unk_id() not in letters:
        yield "its letters one by one", [document(letters)], np.array([0] + [1] * len(letters))


@functools.cache
def encoder_of(tokenizer: Path, plain: bool) -> Encoder:
    """The encoder of a SentencePiece model."""
    return Encoder(make_tokenizer(tokenizer.name, tokenizer.read_bytes(), plain=plain))


def tokenised(subject: Subject, text: str | Document) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a document, with BOS, and the original bytes of each, by the subject's tokenizer."""
    text = make_document(text, "a text") if isinstance(text, str) else text
    encoder = encoder_of(subject.tokenizer, subject.charge is not None)
    tokens, sizes, _ = tokenise_validation(encoder, text)
    return tokens.astype(np.int64), sizes.astype(np.int64)


# -- B4: fresh text


class Score(NamedTuple):
    """Bits per byte over groups of documents."""

    mean: float
    error: float  # of the mean


def fresh(subject: Subject) -> str:
    """B4: documents of the real set against others of the same kind, in groups of as many."""
    if not subject.fresh:
        raise NotChecked("no documents that no training can have seen (--fresh DOCS)")
    return compared(subject, fresh_documents(subject))


def compared(subject: Subject, others: Sequence[tuple[np.ndarray, np.ndarray]]) -> str:
    """The real set's documents against others, (tokens, bytes of each): Failed where it has far less."""
    real = list(zip(subject.documents, _split_sizes(subject), strict=True))
    count = min(len(real), len(others)) // GROUPS
    if not count:
        raise NotChecked(f"--fresh: {len(others)} documents, must be {GROUPS} at least")
    chosen = subject.dice.permutation(len(real))[: count * GROUPS]
    here = _grouped(subject, [real[number] for number in chosen])
    there = _grouped(subject, others[: count * GROUPS])
    gap, error = there.mean - here.mean, math.hypot(here.error, there.error)
    told = f"{here.mean:.4f} bits per byte on the real set, {there.mean:.4f} on fresh text"
    told += f" ({GROUPS} groups of {count} documents each): {gap:+.4f}, standard error {error:.4f}"
    require(gap <= STANDARD_ERRORS * error, told)
    return told


def _split_sizes(subject: Subject) -> list[np.ndarray]:
    return np.split(subject.sizes, np.flatnonzero(subject.tokens == BOS)[1:])


def _grouped(subject: Subject, documents: Sequence[tuple[np.ndarray, np.ndarray]]) -> Score:
    scores = []
    for first in range(GROUPS):
        tokens, sizes = zip(*documents[first::GROUPS], strict=True)
        total = subject.ask(*tokens, sizes=np.concatenate(sizes))
        scores.append(total.nats / math.log(2) / total.bytes)
    return Score(float(np.mean(scores)), float(np.std(scores, ddof=1) / math.sqrt(GROUPS)))


def fresh_documents(subject: Subject) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and bytes of the documents of --fresh."""
    if subject.tokenizer is None:
        raise NotChecked("--fresh: no tokenizer is known")
    try:
        parsed = [parse_block(block) for block in Reader([str(path) for path in subject.fresh])]
        return [tokenised(subject, document) for part in parsed for document in part.documents]
    except DataError as error:
        raise AuditError(f"--fresh {error}") from None


# -- B5: files


def self_contained(subject: Subject) -> str:
    """B5: what is read is what is counted, and the validation set with its tokenizer."""
    size = sum(path.stat().st_size for path in subject.files)
    names = ", ".join(path.name for path in subject.files)
    require(size < SIZE_LIMIT, f"{names}: {size:,} bytes")
    if not subject.answers:
        subject.ask(document(subject.dice.choice(subject.alphabet, 50)))
    reached = list(subject.outside)
    require(not reached, f"{len(reached)} that are not counted, the first {(reached or [''])[0]}")
    return f"{names}: {size:,} bytes; nothing else was opened in {len(subject.answers)} runs, no network"


# -- B6: the number


def claimed(subject: Subject) -> str:
    """B6: the score of the real set, in a new place; and that it hangs on the whole of the text."""
    if not subject.claim:
        raise NotChecked("no score is claimed")
    real = subject.ask(subject.tokens, sizes=subject.sizes)
    targets = len(subject.tokens) - 1
    loss, bpb = real.nats / targets, real.nats / math.log(2) / real.bytes
    told = f"val_loss {loss:.8f}, val_bpb {bpb:.8f}, in a new place"
    for name, again in (("val_loss", loss), ("val_bpb", bpb)):
        rounded = real.slack / real.nats
        near = math.isclose(again, subject.claim[name], abs_tol=5e-7, rel_tol=rounded + subject.drift)
        require(near, f"{told}; {name} {subject.claim[name]:.8f} is claimed")
    shorter = subject.ask(subject.tokens[:-1], sizes=subject.sizes[:-1])
    change = abs(real.nats - shorter.nats)
    require(change <= ONE_TOKEN + real.slack, f"{told}; {change:.1f} nats others without its last token")
    return f"{told}; {change:.2f} nats without its last token; {_halves(subject, real)}"


def _halves(subject: Subject, real: Total) -> str:
    """The last half of the documents drawn, and the longest."""
    documents, half = subject.documents, max(1, len(subject.documents) // 2)
    longest = np.argsort([-len(text) for text in documents], kind="stable")[:half].tolist()
    last = list(range(len(documents) - half, len(documents)))
    chosen = {"last documents": last, "longest documents": longest}
    return "; ".join(drawn_among(subject, what, documents, real, part) for what, part in chosen.items())


# -- all


Question = Callable[[Subject], str]
QUESTIONS: Mapping[str, tuple[str, Question]] = {
    "B1": ("C2, from outside: chances sum to 1", normalised),
    "B2": ("C1, C3, C4, from outside: nothing known before", causal),
    "B3": ("bytes of known texts; every target", counted),
    "B4": ("no better than on fresh text", fresh),
    "B5": ("what is read is counted", self_contained),
    "B6": ("the number itself, in a new place", claimed),
}


def answers(subject: Subject, names: Sequence[str] = tuple(QUESTIONS)) -> dict[str, Verdict]:
    """Ask; a FAIL has its figure, and what could not be asked its reason."""
    return {name: verdict_of(lambda name=name: QUESTIONS[name][1](subject), VERIFIED) for name in names}
