"""What followed the same tokens before: n-gram tilt of scored distributions (NGRAM_TILT; PR #1514, #2018).

A text says again what it or another one has said: notices, quotations, refrains. NGRAM_TILT=ORDER:NATS,...
Where the last ORDER tokens stood somewhere before, the token h that followed them there most often is a hint,
if it did so in at least SHARE of the cases. The model's distribution p is then tilted towards it by b = NATS:

    p'(a) = p(a) exp(b [a = h]) / Z,   Z = 1 + p(h) (exp(b) - 1)

which sums to one whatever h is, and h is known before the target is looked at. The state is what has been
scored: a document sees its own tokens and the documents of earlier parts of the plan. Ranks wait for each
other between two parts, and a part's documents do not see each other, so the hints are those of any number of
ranks. They are found for all targets at once, but each depends on what stands before it only. What is learnt
from is not tilted.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from train_gpt import (
    GPT,
    BatchedLoRA,
    ChunkBatch,
    Ranks,
    ScoreFirstTTT,
    Span,
    softcap,
    softcapped_cross_entropy,
    split_at_boundaries,
)

SHARE = 0.8  # of the places where a context stood before, at which the leading token must have followed
WAVES = 8  # parts of the documents behind the last global phase
FACTOR = 0x9E3779B97F4A7C15  # odd: what a hash of k tokens is multiplied with for one token more


def boosts_of(text: str) -> dict[int, float]:
    """Nats of each order that NGRAM_TILT names; none if it is empty."""
    pairs = (pair.split(":") for pair in text.split(",") if pair)
    return {int(order): float(nats) for order, nats in pairs}


def _context_hashes(tokens: np.ndarray, order: int) -> np.ndarray:
    """A hash of the `order` tokens that end at each place (uint64 [n]); the first places lack some.

    The sum of FACTOR^i (token + 1) over the tokens i places back, modulo 2^64, made from sums of 1, 2, 4, ...
    """
    block, total, size, have = tokens.astype(np.uint64) + np.uint64(1), np.zeros(len(tokens), np.uint64), 1, 0
    while True:
        if order & size:
            total[have:] += block[: max(0, len(block) - have)] * np.uint64(pow(FACTOR, have, 1 << 64))
            have += size
        if have == order:
            return total
        block[size:] += block[:-size] * np.uint64(pow(FACTOR, size, 1 << 64))
        size *= 2


def _leaders(begins: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """In each run of places: token that came most often at those before, how often, and how many there were.

    A run begins where `begins` [m] is true; its first place has no leader (-1). Of equals the first leads.
    """
    places, run = np.arange(len(tokens)), np.cumsum(begins)
    pairs = run << 16 | tokens
    by_pair = np.argsort(pairs, kind="stable")
    new = np.diff(pairs[by_pair], prepend=-1) != 0
    times = np.empty_like(places)  # that a place's token has come in its run, this time included
    times[by_pair] = places - np.maximum.accumulate(np.where(new, places, 0)) + 1
    best = np.maximum.accumulate((run << 32) + times) - (run << 32)
    before = np.append(0, best[:-1]) * ~begins
    leader = np.maximum.accumulate(np.where(times > before, places, 0))
    first = np.maximum.accumulate(np.where(begins, places, 0))
    return np.where(begins, -1, tokens[np.append(0, leader[:-1])]), before, places - first


def _recurring(
    tokens: np.ndarray, ends: np.ndarray, lengths: np.ndarray, order: int
) -> tuple[np.ndarray, np.ndarray]:
    """Places of a text where a context ends that ends elsewhere too, by context and then by place.

    The text is documents of `lengths` that end at `ends`; contexts and what follows them lie inside one.
    Returns the places, and at which of them another context begins. Contexts are told apart by what is left
    of 64 bits beside the place: of 48 million, with 38 bits, some four thousand pairs are taken for one.
    """
    bits = np.uint64(int(ends[-1]).bit_length())
    keys = _context_hashes(tokens, order)
    keys *= np.uint64(FACTOR)  # its high bits are what is kept: they hang on all tokens
    keys >>= bits
    keys <<= bits
    keys += np.arange(len(keys), dtype=np.uint64)
    inside = np.ones(len(keys), bool)
    inside[ends - 1] = False
    for back in range(order - 1):
        inside[(ends - lengths + back)[lengths > back]] = False
    keys = keys[inside]
    keys.sort()
    context = keys >> bits
    begins = np.append(True, context[1:] != context[:-1])[: len(keys)]  # of no keys too
    again = ~(begins & np.append(begins[1:], True)[: len(keys)])
    places = (keys[again] & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
    return places, begins[again]


def find_hints(
    tokens: np.ndarray, parts: Sequence[Sequence[Span]], boosts: Mapping[int, float], targets: int
) -> tuple[np.ndarray, np.ndarray]:
    """The hint at each target of a stream (int32, -1: none) and its boost in nats (float32, 0 without one).

    Documents are scored part by part. A longer context goes before a shorter one, and what followed it in the
    document itself before what followed it in earlier parts.
    """
    hints, nats = np.full(targets, -1, np.int32), np.zeros(targets, np.float32)
    spans = [span for part in parts for span in part]
    starts, lengths = np.array(spans).T
    text, ends = np.concatenate([tokens[start : start + n] for start, n in spans]), np.cumsum(lengths)
    number = np.repeat(np.arange(len(parts)), [len(part) for part in parts])  # of each document's part
    for order, boost in sorted(boosts.items()):
        places, new = _recurring(text, ends, lengths, order)
        if not len(places):
            continue
        document = np.searchsorted(ends, places, "right")
        following = text[places + 1].astype(np.int64)
        began = new | (np.diff(number[document], prepend=-1) != 0)  # the first of its part in a context
        before = np.maximum.accumulate(np.where(began, np.arange(len(new)), 0))
        past = (values[before] for values in _leaders(new, following))
        own = _leaders(new | (np.diff(document, prepend=-1) != 0), following)
        scored = places + (starts - (ends - lengths))[document]
        for leader, times, seen in (past, own):
            found = (leader >= 0) & (times >= SHARE * seen)
            hints[scored[found]], nats[scored[found]] = leader[found], boost
    return hints, nats


class Tilt:
    """The plan of an adaptation in its parts, and the hints that follow from it."""

    def __init__(self, plan: ScoreFirstTTT):
        phases, val = plan.boundaries, plan.val
        first, documents = max(phases, default=0), sum(len(batch.documents) for batch in plan.batches)
        waves = [first + (documents - first) * wave // WAVES for wave in range(1, WAVES)]
        self.parts = split_at_boundaries(plan.batches, [*phases, *waves])
        spans = [[span for batch in part for _, span in batch.documents] for part in self.parts]
        boosts, tokens = boosts_of(plan.cfg.ngram_tilt), val.tokens.numpy()
        self.hints, self.nats = find_hints(tokens, spans, boosts, val.num_targets)

    def hints_of(self, part: ChunkBatch, ranks: Ranks) -> Tensor:
        """Hints of a chunk and their boosts, float32 [B, n, 2]."""
        first = np.array([first for first, _ in part.spans])
        places = np.minimum(first[:, None] + np.arange(part.scored.size(1)), len(self.hints) - 1)
        pairs = np.stack([np.maximum(self.hints[places], 0), self.nats[places]], -1, dtype=np.float32)
        return ranks.put(torch.from_numpy(pairs))


def tilted(losses: Tensor, hint_losses: Tensor, hits: Tensor, boosts: Tensor) -> Tensor:
    """-log p' of targets with -log p = `losses`, hints with -log p = `hint_losses`; `hits`: they are one."""
    return losses + torch.log1p(torch.exp(-hint_losses) * torch.expm1(boosts)) - boosts * hits


def tilted_losses(model: GPT, h: Tensor, targets: Tensor, lora: BatchedLoRA, hints: Tensor) -> Tensor:
    """Losses [B, n] of hidden states [B, n, D] with hints [B, n, 2]; their gradient is that without hints."""
    tokens, boosts, cap = hints[..., 0].long(), hints[..., 1], model.cfg.logit_softcap
    if "eager" in model.backends.kernels:
        from systems.eager import head_loss

        losses = head_loss(h, model._head_weight, targets, cap, lora)
        with torch.no_grad():  # two logits of a position say how far the hint's loss is from the target's
            z = softcap(logits_of(model, h, torch.stack([targets, tokens], -1), lora), cap)
            hint_losses = losses + z[..., 0] - z[..., 1]
    else:
        z = model._head(h, lora)
        losses = softcapped_cross_entropy(z, targets, cap)
        with torch.no_grad():
            hint_losses = softcapped_cross_entropy(z, tokens, cap)
    with torch.no_grad():
        more = tilted(torch.zeros_like(hint_losses), hint_losses, targets == tokens, boosts)
    return losses + more


def logits_of(model: GPT, h: Tensor, tokens: Tensor, lora: BatchedLoRA) -> Tensor:
    """Logits [B, n, k] before the softcap of some tokens [B, n, k] alone, of hidden states [B, n, D]."""
    z = (h[..., None, :] * model._head_weight[tokens]).sum(-1)
    A, B = lora.at(0).get("head", len(h))
    rows = B[torch.arange(len(h))[:, None, None], tokens]
    return z + ((h @ A.mT)[..., None, :] * rows).sum(-1)
