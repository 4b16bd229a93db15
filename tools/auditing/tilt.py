"""The n-gram tilt (NGRAM_TILT): its hints by a plain reading of the rule, and the order of its state."""

import collections
import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from auditing.run import Audit, require

SHARE = 0.8  # declared: docs/audit.md
MOST_TOKENS = 200_000  # that are read plainly


class Followers:
    """What has followed each context so far."""

    def __init__(self):
        self.counts: dict[tuple, dict[int, int]] = collections.defaultdict(dict)
        self.leaders: dict[tuple, int] = {}

    def note(self, context: tuple, token: int) -> None:
        """A token has followed a context; it leads from when no other has come as often."""
        counts = self.counts[context]
        counts[token] = counts.get(token, 0) + 1
        if context not in self.leaders or counts[token] > counts[self.leaders[context]]:
            self.leaders[context] = token

    def hint(self, context: tuple, share: float) -> int | None:
        """The token that leads, if it came in that share of the cases."""
        leader = self.leaders.get(context)
        enough = leader is not None and self.counts[context][leader] >= share * sum(
            self.counts[context].values()
        )
        return leader if enough else None


def plain_hints(
    tokens: np.ndarray, parts: Sequence, boosts: Mapping[int, float], share: float = SHARE
) -> dict[int, tuple[int, float]]:
    """Hint and nats by target, where there is one: token after token, as docs/audit.md has the rule."""
    found: dict[int, tuple[int, float]] = {}
    for order, nats in sorted(boosts.items()):  # a longer context takes the place of a shorter one
        past = Followers()
        for part in parts:
            seen = []
            for start, length in part:
                own, text = Followers(), [int(token) for token in tokens[start : start + length]]
                for i in range(order, length):
                    context = tuple(text[i - order : i])
                    hints = own.hint(context, share), past.hint(context, share)
                    hint = next((hint for hint in hints if hint is not None), None)
                    if hint is not None:
                        found[start + i - 1] = hint, nats
                    own.note(context, text[i])
                    seen.append((context, text[i]))
            for pair in seen:
                past.note(*pair)
    return found


def declared_boosts(audit: Audit) -> dict[int, float]:
    """Nats by length of context, by our own reading of the setting."""
    pairs = (pair.split(":") for pair in getattr(audit.cfg, "ngram_tilt", "").split(",") if pair)
    return {int(order): float(nats) for order, nats in pairs}


def one_order(audit: Audit, val) -> str:
    """D4: each rank has scored part after part; hints of documents drawn from all parts, read plainly.

    Returns the evidence, nothing where no tilt is declared. Raises Failed.
    """
    boosts = declared_boosts(audit)
    if not boosts:
        return ""
    script, cfg = audit.script, audit.artifact_model.cfg
    plan = script.ScoreFirstTTT(audit.artifact_model, val, cfg, looping=audit.looping, ranks=audit.ranks)
    tilt = script.Tilt(plan)
    parts = [[document for batch in part for document in batch.documents] for part in tilt.parts]
    length_of = {number: length for part in parts for number, (_, length) in part}
    part_of = {number: place for place, part in enumerate(parts) for number, _ in part}
    latest: dict[int, int] = {}
    for record in audit.records("score"):
        for number, _, _ in record["spans"]:
            before = latest.setdefault(record["rank"], 0)
            text = f"document {number} of part {part_of[number]} was scored after documents of part {before}"
            require(part_of[number] >= before, f"rank {record['rank']}: {text}")
            latest[record["rank"]] = part_of[number]
    drawn, left = random.Random(audit.sample_seed), MOST_TOKENS
    wanted = set()
    for number in drawn.sample(sorted(part_of), len(part_of)):
        left -= length_of[number]
        if left < 0:
            break
        wanted.add(number)
    tokens = val.tokens.numpy()
    some = [[span for number, span in part if number in wanted] for part in parts]
    boosts |= {2: 1.0}  # of a sample, few long contexts come again
    hints, nats = script.find_hints(tokens, some, boosts, val.num_targets)
    plain = plain_hints(tokens, some, boosts)
    told = {int(place): (int(hints[place]), float(nats[place])) for place in np.flatnonzero(hints >= 0)}
    wrong = [place for place in told.keys() | plain.keys() if not _same(told.get(place), plain.get(place))]
    where = f"target {min(wrong, default=0)}: hint {told.get(min(wrong, default=0))}"
    require(not wrong, f"{where}, read plainly {plain.get(min(wrong, default=0))}")
    own = int((tilt.hints >= 0).sum())
    targets = f"{own:,} of {val.num_targets:,} targets in {len(parts)} parts"
    return f"; hints for {targets}, of some documents {len(plain):,} read plainly"


def _same(one: tuple[int, float] | None, other: tuple[int, float] | None) -> bool:
    return one is not None and other is not None and one[0] == other[0] and abs(one[1] - other[1]) < 1e-6


def hints_at(tilt, first: int, count: int) -> Tensor:
    """Hints and nats of some targets, as the script has them, float32 [count, 2]."""
    places = slice(first, first + count)
    return torch.from_numpy(
        np.stack([np.maximum(tilt.hints[places], 0), tilt.nats[places]], -1).astype("<f4")
    )


def tilted_distributions(p: Tensor, hints: Tensor) -> Tensor:
    """Distributions p [n, V] that favour their hints [n, 2] by e^nats, made to sum to one."""
    favoured = torch.scatter(torch.ones_like(p), 1, hints[:, :1].long(), hints[:, 1:].to(p.dtype).exp())
    return p * favoured / (p * favoured).sum(-1, keepdim=True)
