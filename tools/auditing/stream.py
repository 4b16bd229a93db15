"""The conditions of the evaluation where windows slide over the stream, alone or with SGD between chunks.

A stream is scored left to right; its windows are plain rows, so a document is read with what came before it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from auditing.artifact import same_start
from auditing.replay import Distributions, flip, model_flip, toy_stream
from auditing.run import BOS, Audit, digest, require, short
from scripts import sha256_of


class Slide(NamedTuple):
    """A scored batch of windows of a replay: first target, where its targets end, state of all weights."""

    first: int
    end: int
    state: str


class StreamReplay:
    """The script's evaluation of a small stream, watched."""

    def __init__(self, audit: Audit, tokens: Tensor, noise: float = 0.02, visit: Callable | None = None):
        self.audit, self.model, self._visit = audit, audit.model(noise), visit
        self.val = audit.script.ValidationSet.from_sidecar(tokens, (tokens != BOS).long())
        self.cfg = _small_settings(audit)
        self.losses = torch.full((len(tokens) - 1,), torch.nan)
        self.counts = np.zeros(len(tokens) - 1, np.int64)
        self.entries: list[Slide] = []
        self.trained: list[tuple[int, int, int]] = []  # batches scored before, first and last token
        self.start = digest(self.model.state_dict())
        sgd, script = audit.evaluator == "sgd", audit.script
        evaluation = script.ScoreFirstSGD if sgd else script.SlidingEvaluation
        options = {"looping": audit.looping, "ranks": audit.ranks, "watch": audit.watch(self._see)}
        evaluation(self.model, self.val, self.cfg, **options).run()

    def _see(self, kind: str, **data: object) -> None:
        if kind == "slid":
            windows, state = data["windows"], digest(self.model.state_dict())
            spans = [(window.start + window.offset, window.targets) for window in windows]
            for (first, count), losses in zip(spans, data["losses"], strict=True):
                self.losses[first : first + count] = losses
                self.counts[first : first + count] += 1
            self.entries.append(Slide(spans[0][0], sum(spans[-1]), state))
            if self._visit:
                self._visit(self, windows, data["losses"])
        elif kind == "trained_span":
            self.trained.append((len(self.entries), data["first"], data["first"] + len(data["tokens"]) - 1))


def _small_settings(audit: Audit):
    """The run's settings with a short window, a few windows side by side and chunks of two windows."""
    cfg = audit.artifact_model.cfg
    window = min(cfg.ttt_chunk_size, cfg.eval_seq_len)
    return dataclasses.replace(
        cfg,
        eval_seq_len=window,
        eval_stride=max(1, min(cfg.eval_stride, window // 4)),
        val_batch_tokens=8 * 4 * window,
        ttt_chunk_tokens=2 * window,
        global_ttt_chunk_tokens=window,
        global_ttt_batch_seqs=1,
    )


@functools.cache
def _base(audit: Audit) -> StreamReplay:
    """The replay that others are compared with."""
    return StreamReplay(audit, toy_stream(audit))


def _place(tokens: Tensor, share: float) -> int:
    """A token of a text, no document start, about that far into the stream."""
    place = int(share * len(tokens))
    return place - 1 if int(tokens[place]) == BOS else place


def causal(audit: Audit) -> str:
    """D1: with a token flipped, all losses before it are the same bits, and so is the state they saw."""
    base, tokens, same = _base(audit), toy_stream(audit), 0
    for share in (0.2, 0.5, 0.9):
        place = _place(tokens, share)
        other = StreamReplay(audit, flip(audit, tokens, place))
        for number, (mine, theirs) in enumerate(zip(base.entries, other.entries, strict=True)):
            blind = mine.state == theirs.state or mine.first >= place
            require(blind, f"token {place}: the weights before batch {number} depend on it")
        moved = (base.losses != other.losses).nonzero().flatten().tolist()
        first = min(moved, default=len(base.losses))
        require(first >= place - 1, f"token {place}: the loss of target {first} depends on it")
        require(first == place - 1, f"token {place}: its own loss does not change, the test says nothing")
        same += first
    compared = model_flip(audit, None, tokens)
    figure = f"{compared:,} losses before a flipped token bit-identical"
    return f"{figure}; {same} of the evaluation and the weights they saw too"


def distribution(audit: Audit) -> str:
    """D2: full distributions at the targets of every window."""
    seen, pairs = Distributions(audit), []

    def visit(replay: StreamReplay, windows: Sequence, losses: Tensor) -> None:
        for window, row in zip(windows, losses, strict=True):
            tokens = replay.val.tokens[window.start : window.start + window.length + 1]
            pairs.append((float(row.double().sum()), seen.look(replay.model, tokens, window.targets)))

    StreamReplay(audit, toy_stream(audit), noise=0.0, visit=visit)
    return seen.verdict(pairs, "sums")


def score_before_update(audit: Audit) -> str:
    """D3: every trained chunk of the ledger was scored by the version before; a replay is blind to it."""
    base = _base(audit)
    if audit.evaluator == "sliding":
        _untouched(audit)
        return "nothing is trained: the weights are the artifact's before and after, and so in a replay"
    _, versions = replay_ledger(audit)
    updates = trained_chunks(audit)
    for record in updates:
        first, end = record["first"], record["first"] + record["tokens"] - 1
        seen, where = versions[first:end], f"targets {first:,}-{end - 1:,}"
        require(bool((seen >= 0).all()), f"{where}: trained on before they were scored")
        require(bool((seen < record["base"]).all()), f"{where}: scored by weights that were trained on them")
        tokens = audit.tokens[first : end + 1].astype("<u2").tobytes()
        same = sha256_of(tokens) == record["tokens_sha256"]
        require(same, f"{where}: trained on other tokens than those scored")
    for done, first, end in base.trained:
        scored = max(slide.end for slide in base.entries[:done]) if done else 0
        require(end <= scored, f"replay: targets {first}-{end - 1} are trained on, scored are {scored}")
    require(bool(base.trained), "nothing was trained in the replay: the test says nothing")
    size = base.cfg.ttt_chunk_tokens
    tokens = toy_stream(audit)
    places = [place for place in range(size + 1, 2 * size + 1) if int(tokens[place]) != BOS]
    other = StreamReplay(audit, flip(audit, tokens, *places))
    pairs = zip(base.entries, other.entries, strict=True)
    first = min((mine.first for mine, theirs in pairs if mine.state != theirs.state), default=None)
    require(first is not None, "no later weights depend on a chunk: the test says nothing")
    require(first >= 2 * size, f"the weights that score target {first} were trained on its chunk")
    blind = "the weights that score a chunk are blind to it"
    return f"{len(updates):,} updates, each on tokens scored before; {blind}"


def replay_ledger(audit: Audit) -> tuple[np.ndarray, np.ndarray]:
    """Times each target was scored, and the newest version of the weights that scored it (-1: none)."""
    return _versions(audit, audit.records("slide"))


def _versions(audit: Audit, slides: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    counts = np.zeros(len(audit.tokens) - 1, np.int64)
    versions = np.full(len(counts), -1)
    for record in slides:
        for first, count in record["spans"]:
            counts[first : first + count] += 1
            versions[first : first + count] = np.maximum(versions[first : first + count], record["base"])
    return counts, versions


def trained_chunks(audit: Audit) -> list[dict]:
    """The updates of the ledger, one for all ranks; Failed where ranks trained on different tokens."""
    updates: dict[int, dict] = {}
    facts = ("first", "tokens", "tokens_sha256", "steps")
    for record in audit.records("sgd"):
        known = updates.setdefault(record["base"], record)
        same = all(known[fact] == record[fact] for fact in facts)
        require(same, f"update {record['base']}: the ranks trained on different tokens")
    return list(updates.values())


def _untouched(audit: Audit) -> None:
    """Raise Failed unless the weights are the same after an evaluation that trains nothing."""
    hashes = {record["model_sha256"] for record in audit.records("start", "end")}
    require(bool(audit.records("end")), "the ledger does not say how the evaluation ended")
    require(len(hashes) == 1, f"weights {' and '.join(map(short, sorted(hashes)))} before and after")
    base = _base(audit)
    states = {slide.state for slide in base.entries} | {digest(base.model.state_dict())}
    require(states == {base.start}, "replay: the weights change from window to window")


def once_each(counts: np.ndarray) -> None:
    """Raise Failed unless every target was scored exactly once."""
    twice, never = int((counts > 1).sum()), int((counts == 0).sum())
    require(not twice and not never, f"{twice:,} targets scored more than once, {never:,} never")


def others_once_each(audit: Audit) -> str:
    """As `once_each`, for windows that slid in a stage of their own before the one that gives the score."""
    slides: dict[str, list[dict]] = {}
    for record in audit.ledger[1:]:
        if record["kind"] == "slide" and record["stage"] != audit.result["final_stage"]:
            slides.setdefault(record["stage"], []).append(record)
    for records in slides.values():
        once_each(_versions(audit, records)[0])
    return "".join(f"; once each in stage {stage} too" for stage in slides)


def one_order(audit: Audit) -> int:
    """Failed unless each rank's records are without gaps and their versions never fall; number of ranks."""
    last: dict[int, tuple[int, int]] = {}
    for record in audit.ledger[1:]:
        place = record["order"], record["base"]
        before = last.get(record["rank"], (-1, 0))
        follows = place[0] == before[0] + 1 and place[1] >= before[1]
        require(follows, f"rank {record['rank']}: record {place[0]} is out of order")
        last[record["rank"]] = place
    return len(last)


def one_pass(audit: Audit) -> str:
    """D4: the spans are a partition of the targets; versions of the weights follow the stream."""
    counts, versions = replay_ledger(audit)
    once_each(counts)
    once_each(_base(audit).counts)
    others, ranks = others_once_each(audit), one_order(audit)
    falls = np.flatnonzero(np.diff(versions) < 0)
    where = f"target {falls[0] + 1:,} was scored by older weights than the one before" if len(falls) else ""
    require(not where, where)
    done = f"{len(set(versions.tolist())):,} versions of the weights"
    order = f"one order on each of {ranks} ranks"
    return f"{len(counts):,} targets once each, left to right by {done}; {order}{others}"


def declared_state(audit: Audit) -> str:
    """D7: what goes from document to document is declared: the weights with TTT_SGD=1, else nothing."""
    same_start(audit)
    base = _base(audit)
    require(base.entries[0].state == base.start, "replay: the weights change before anything is scored")
    if audit.evaluator == "sliding":
        _untouched(audit)
        return "no adapters; nothing is learnt, the artifact's weights score all"
    first = min(record["base"] for record in audit.records("slide"))
    require(first == 0, f"the first target was scored after {first} updates")
    again = StreamReplay(audit, toy_stream(audit))
    require(
        again.entries == base.entries, "a second replay finds other weights: something outlives the first"
    )
    return "no adapters; weights that learn chunk by chunk go through the stream, declared by TTT_SGD=1"


def documents_apart(audit: Audit) -> str:
    """D8: perturb a document with the weights frozen: only what its windows see may change, later targets."""
    cfg, script = _small_settings(audit), audit.script

    def losses(row: Tensor) -> Tensor:
        found = torch.zeros(len(row) - 1)

        def see(kind: str, **facts: object) -> None:
            slid = zip(facts["windows"], facts["losses"], strict=True) if kind == "slid" else ()
            for window, part in slid:
                found[window.start + window.offset : window.start + window.length] = part

        val = script.ValidationSet.from_sidecar(row, (row != BOS).long())
        options = {"looping": audit.looping, "ranks": audit.ranks, "watch": audit.watch(see)}
        script.SlidingEvaluation(audit.model(0.02), val, cfg, **options).run()
        return found

    return _apart(audit, losses, lambda end: end + cfg.eval_seq_len)


def windows_apart(audit: Audit) -> str:
    """D8 of the standard evaluation where it has windows side by side, no documents (PLAIN_WINDOWS=1)."""
    window, script = audit.cfg.eval_seq_len, audit.script

    def losses(row: Tensor) -> Tensor:
        score = script.model_score(audit.model(0.02), looping=audit.looping, ranks=audit.ranks)
        return score(*script.packed_row(row, window, True))[0]

    return _apart(audit, losses, lambda end: -(-end // window) * window)


def _apart(audit: Audit, losses: Callable[[Tensor], Tensor], reach: Callable[[int], int]) -> str:
    """Perturb a document that ends at `end`: losses from its start to `reach(end)` may change, no others."""
    tokens = toy_stream(audit)
    starts = (tokens == BOS).nonzero().flatten().tolist()
    places = range(starts[1] + 1, starts[2])
    changed = (losses(tokens) != losses(flip(audit, tokens, *places))).nonzero().flatten()
    require(len(changed) > 0, "the perturbed document's losses stay: the test says nothing")
    low, high = int(changed.min()), int(changed.max())
    require(low >= starts[1], f"target {low} of an earlier document changes")
    limit = min(reach(starts[2]), len(tokens) - 1)
    require(high < limit, f"target {high} changes, more than a window after the document")
    later = int((changed >= starts[2]).sum())
    apart = low + len(tokens) - 1 - limit
    note = f"{later} later losses within a window change: plain rows read what came before, declared"
    return f"{apart} losses before it and beyond a window bit-identical; {note}"


def last_chunk(audit: Audit) -> str:
    """D9: no update uses the end of the stream, after which nothing is scored."""
    base, targets = _base(audit), len(audit.tokens) - 1
    late = [span for span in base.trained if span[2] >= base.val.num_targets]
    require(not late, "replay: the last chunk was trained on")
    if audit.evaluator == "sliding":
        _untouched(audit)
        return "nothing is trained"
    updates = trained_chunks(audit)
    ends = max(record["first"] + record["tokens"] - 1 for record in updates)
    require(ends < targets, f"targets up to {ends:,} of {targets:,} were trained on")
    return f"{len(updates):,} chunks trained on, each with a later one to score"
