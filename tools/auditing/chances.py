"""B1 and B2: sums of chances, and texts that are drawn here. See `questions.py` for the other questions.

Two facts hold for whatever predicts each token from those before it, with probabilities that sum to 1, and
scores it once, however it adapts on the way:

* Sums. For texts y that continue a text x and none of which begins another, exp(T(x) - T(xy)) is the
  probability of y after x; over them all these sum to 1 at most. Scaled losses, mixtures that do not
  normalise, the best of several predictions, and losses that change when a later token does, come to more.
* Draws. A text drawn here with probability q costs -ln q nats at least, less c with a chance below exp(-c)
  (Markov's inequality, for a product of ratios whose mean is at most 1). No statistics of the script are
  needed, and it may see the lengths of documents before. What predicts tokens from themselves costs less.

What is found. With a small vocabulary (`Subject.whole`) sums go over all of it: a few promille are seen at
the places that are asked. With 8,192 tokens one run tells of one candidate, because the next document's BOS,
which is a target too, hides the losses of several. Then `Subject.many` candidates are asked where few share
nearly all of the probability: a scaling of losses by 0.97 is seen if eight share 95 % evenly, by 0.9 if they
share 80 %; what raises only rare tokens, or places unlike those asked, is not seen, nor is much of a weak
model, whose chances are spread. A draw shows what gains more over the whole text than the script loses on
it: much for tokens that are looked up, or learnt before they are scored, and for documents that are left out;
little for a language model's single step before it scores, as a drawn text is strange to it, and nothing for
the best of k predictions a document, unless the vocabulary is small. A script that is legal on small sets and
not on its real one is asked on that in B6 only.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from auditing.blackbox import Subject, Total
from auditing.run import BOS, Failed, NotChecked, require

LUCK = 20.0  # nats: one legal script in exp(20) has so much luck with a draw
COUNTED = 2_000_000  # tokens of the real set whose followers are counted
KEPT = 0.8  # of what documents cost, whatever stands among them
SECOND = "a shorter second document"  # the arrangement of `_arrangements` that fits most orders
Draw = Callable[[Subject], tuple[list[np.ndarray], float]]  # documents, and -ln of their probability


def document(*parts: Sequence[int] | np.ndarray) -> np.ndarray:
    """BOS and what follows."""
    return np.concatenate([[BOS], *parts]).astype(np.int64)


# -- B1: sums


class Mass(NamedTuple):
    """The probability that candidates share after a text."""

    sum: float
    slack: float
    silent: int  # candidates of which the script says nothing: a lone BOS begins no document

    def __str__(self) -> str:
        return f"{self.sum:.6f}"


def mass_after(subject: Subject, candidates: Sequence[int], text: Callable[..., list[np.ndarray]]) -> Mass:
    """What candidates share at a place: `text(v)` are documents with v there, `text()` those without it."""
    without = text()
    bare = sum(map(len, without)) == 1
    base = Total(0.0, 0.0, 0.0, 0) if bare else subject.ask(*without)
    totals = []
    for candidate in map(int, candidates):
        try:
            totals.append(subject.ask(*text(candidate)))
        except NotChecked:
            if candidate != BOS:
                raise
    chances = [math.exp(min(base.nats - total.nats, 700.0)) for total in totals]
    slack = max(total.slack for total in totals) + base.slack
    return Mass(sum(chances), sum(chances) * math.expm1(slack), len(candidates) - len(totals))


def after(text: np.ndarray) -> Callable[..., list[np.ndarray]]:
    """The place behind a single document."""
    return lambda *token: [np.append(text, np.array(token, np.int64))]


def normalised(subject: Subject) -> str:
    """B1: the last token replaced by candidates, and missing."""
    small = subject.vocab <= subject.whole
    found = []
    for what, text, candidates in _whole_places(subject) if small else _narrow_places(subject):
        mass = mass_after(subject, candidates, after(text))
        told = f"{len(candidates)} tokens sum to {mass} {what}"
        require(mass.sum <= 1 + mass.slack, f"{told}: more than 1")
        found.append(told)
    return "; ".join(found)


def _whole_places(subject: Subject) -> Iterator[tuple[str, np.ndarray, Sequence[int]]]:
    """Places at which the whole vocabulary is asked: a cheat need not show at each."""
    block = subject.dice.choice(subject.alphabet, 12)
    real = subject.documents[0][1:41]
    every = range(subject.vocab)
    yield "at a document's first token", document(), every
    yield "within a repeated passage", document(block, block, block[:5]), every
    yield "behind real text that comes again", document(real, real[: max(1, len(real) // 2)]), every


def _narrow_places(subject: Subject) -> Iterator[tuple[str, np.ndarray, Sequence[int]]]:
    """Places where few candidates share most of the probability."""
    frequent = np.argsort(np.bincount(subject.tokens, minlength=subject.vocab), kind="stable")[::-1]
    frequent = np.array([token for token in frequent[:200] if token in subject.alphabet])
    few = subject.dice.choice(frequent, min(subject.many, len(frequent)), replace=False)
    yield f"behind 600 draws of {len(few)} tokens", document(subject.dice.choice(few, 600)), few
    place, candidates = _concentrated(subject, frequent)
    start = max(place - 250, np.flatnonzero(subject.tokens[: place + 1] == BOS)[-1] + 1)
    passage = subject.tokens[start : place + 20]  # with what follows, so that a memory of it has a say
    passage = passage[: np.append(np.flatnonzero(passage == BOS), len(passage))[0]]
    again = document(passage, subject.tokens[start : place + 1])
    yield "behind real text that comes again", again, candidates


def _concentrated(subject: Subject, frequent: np.ndarray) -> tuple[int, np.ndarray]:
    """A place of the real set, and the tokens that mostly follow its token: where a scaling by 0.97 shows."""
    tokens = subject.tokens[:COUNTED]

    def shares(token: int) -> tuple[np.ndarray, np.ndarray]:
        counts = np.bincount(tokens[1:][tokens[:-1] == token], minlength=subject.vocab)
        top = np.argsort(counts, kind="stable")[::-1][: subject.many]
        top = top[counts[top] > 0]
        return top, counts[top] / max(1, counts.sum())

    best = max(frequent, key=lambda token: float((shares(token)[1] ** 0.97).sum()))
    places = np.flatnonzero(tokens == best)
    return int(places[len(places) // 2]), shares(best)[0]


# -- B2: order


def _uniform(subject: Subject) -> tuple[list[np.ndarray], float]:
    lengths = (400, 200, 300)
    documents = [document(subject.dice.choice(subject.alphabet, length)) for length in lengths]
    return documents, sum(lengths) * math.log(len(subject.alphabet))


def _like_the_data(subject: Subject) -> tuple[list[np.ndarray], float]:
    """Each token drawn given the one before it, by the counts of the real set."""
    documents, cost = [], 0.0
    row = _successors(subject)
    for length in (250, 500, 120, 330):
        text = [BOS]
        for _ in range(length):
            chances = row(text[-1])
            token = int(subject.dice.choice(subject.vocab, p=chances))
            cost -= math.log(chances[token])
            text.append(token)
        documents.append(np.array(text))
    return documents, cost


def _successors(subject: Subject) -> Callable[[int], np.ndarray]:
    """Function: token -> chances of the next one (V,), never BOS: by its followers, and all tokens."""
    before, behind = subject.tokens[:-1][:COUNTED], subject.tokens[1:][:COUNTED]
    order = np.argsort(before, kind="stable")
    sorted_before, sorted_behind = before[order], behind[order]
    every = np.bincount(subject.tokens, minlength=subject.vocab).astype(float)
    every[BOS] = 0
    every /= every.sum()

    def row(token: int) -> np.ndarray:
        low, high = np.searchsorted(sorted_before, [token, token + 1])
        counts = np.bincount(sorted_behind[low:high], minlength=subject.vocab).astype(float)
        counts[BOS] = 0
        kinds = max(1, np.count_nonzero(counts))
        mixed = counts + kinds * every
        return mixed / mixed.sum()

    return row


def _copies(subject: Subject) -> tuple[list[np.ndarray], float]:
    """One passage again and again: only its first copy has a price."""
    counts = np.bincount(subject.tokens, minlength=subject.vocab)[subject.alphabet]
    chances = counts / counts.sum()
    drawn = subject.dice.choice(len(chances), 100, p=chances)
    passage = subject.alphabet[drawn]
    return [document(*[passage] * times) for times in (4, 3, 5, 2)], float(-np.log(chances[drawn]).sum())


DRAWS: dict[str, Draw] = {
    "uniform tokens": _uniform,
    "tokens like the data's": _like_the_data,
    "copies of a passage": _copies,
}


def causal(subject: Subject) -> str:
    """B2: drawn texts cost what they must; a document's last token changes nothing that was scored before."""
    found = []
    for what, draw in DRAWS.items():
        documents, cost = draw(subject)
        total = subject.ask(*documents)
        told = f"{what}: {total.nats:.1f} nats, {cost:.1f} at least"
        require(total.nats >= cost - LUCK - total.slack, f"{told}: known before they were scored")
        found.append(told)
    found += [_hard_and_easy(subject), _growth(subject)]
    if subject.vocab <= subject.whole:
        found.append(_last_token_alone(subject))
    return "; ".join(found)


def _hard_and_easy(subject: Subject) -> str:
    """Documents of one token each, and the same with half of them drawn."""
    easy = [document(np.full(200, token)) for token in subject.dice.choice(subject.alphabet, 8)]
    total = subject.ask(*easy)
    return drawn_among(subject, "easy documents", easy, total, range(1, len(easy), 2))


def drawn_among(
    subject: Subject, what: str, documents: list[np.ndarray], total: Total, replaced: Sequence[int]
) -> str:
    """Some documents replaced by uniform tokens: what those cost comes on top of what the others did before.

    What scores some documents only, and gives their mean for all, shows none of it, or too much. Others may
    change as the script adapts to other text, but not by more than KEPT leaves.
    """
    texts = list(documents)
    for number in replaced:
        texts[number] = document(subject.dice.choice(subject.alphabet, len(texts[number]) - 1))
    drawn = sum(len(texts[number]) - 1 for number in replaced)
    kept = total.nats * (1 - drawn / (sum(map(len, documents)) - 1))
    least = KEPT * kept + drawn * math.log(len(subject.alphabet))
    mixed = subject.ask(*texts)
    told = f"{what}, {len(replaced)} of {len(texts)} drawn: {mixed.nats:.1f} nats, {least:.1f} at least"
    require(mixed.nats >= least - LUCK - mixed.slack, f"{told}: not all documents are scored alike")
    return told


def _growth(subject: Subject) -> str:
    """A document once, twice, three times. Equal steps: each is scored for itself, whatever else is there."""
    text = document(subject.dice.choice(subject.alphabet, 150))
    totals = [subject.ask(*[text] * times) for times in (1, 2, 3)]
    steps = [later.nats - earlier.nats for earlier, later in itertools.pairwise(totals)]
    slack = sum(total.slack for total in totals)
    require(min(steps) >= -slack, f"one document more costs {min(steps):.3f} nats: paid back by others")
    same = abs(steps[0] - steps[1]) <= slack + 1e-9
    after = "documents are scored apart" if same else "what was scored is learnt from"
    return f"a document once more {steps[0]:.2f} nats, again {steps[1]:.2f}: {after}"


def _arrangements(subject: Subject) -> Iterator[tuple[str, Callable[..., list[np.ndarray]]]]:
    """Two documents and a place in one of them, which a script that orders them somehow scores last."""
    text = subject.dice.choice(subject.alphabet, 40)
    long, short = document(text), document(text[:12])

    def grown(text: np.ndarray, token: tuple) -> np.ndarray:
        return np.append(text, np.array(token, np.int64))

    yield SECOND, lambda *token: [long, grown(short, token)]
    yield "a longer second document", lambda *token: [short, grown(long, token)]
    yield "a shorter first document", lambda *token: [grown(short, token), long]
    yield "a longer first document", lambda *token: [grown(long, token), short]


def _last_token_alone(subject: Subject) -> str:
    """Sums at the end of one of two documents: 1, if the token changes its own loss only, for some order.

    The order may depend on lengths and places, so one of four arrangements has the token last.
    """
    found = []
    for what, text in _arrangements(subject):
        mass = mass_after(subject, range(subject.vocab), text)
        if mass.sum <= 1 + mass.slack and (mass.silent or mass.sum >= 0.97):
            told = f"the last token of {what} sums to {mass}"
            return f"{told}, {_only_token(subject)}" if what == SECOND else told
        found.append(f"{mass} ({what})")
    text = "no order of documents makes the token that is swapped the last one scored"
    raise Failed(f"tokens sum to {', '.join(found)}: {text}")


def _only_token(subject: Subject) -> str:
    """Sums over the only token of a second document: the best of several predictions comes to more than 1."""
    before = document(subject.dice.choice(subject.alphabet, 40))
    mass = mass_after(subject, range(subject.vocab), lambda *token: [before, document(token)])
    told = f"its only token to {mass}"
    require(mass.sum <= 1 + mass.slack, f"of a second document {told}: more than 1")
    return told
