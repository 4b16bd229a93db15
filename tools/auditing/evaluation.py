"""Checks D1-D9: the evaluation."""

import functools
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from auditing import stream
from auditing.artifact import same_start
from auditing.replay import (
    Distributions,
    Entry,
    Replay,
    adapts,
    base_replay,
    first_difference,
    flip,
    model_flip,
    toy_stream,
)
from auditing.run import BOS, RECORDS, REPLAYED, Audit, NotChecked, check, digest, read_values, require
from auditing.stream import once_each, one_order, others_once_each
from auditing.tilt import declared_boosts
from auditing.tilt import one_order as one_order_of_hints
from auditing.training import is_validation, trained_unscored, ttt_warm_up, warm_up
from runs import EVAL_LIMIT
from scripts import sha256_of

GRAM = 8  # so many tokens in a row are the same text


@check("D1", "C1: a prediction depends on earlier tokens only", REPLAYED)
def d1_causal(audit: Audit) -> str:
    """Flipped tokens: everything scored earlier, and the state it was scored with, must be the same bits."""
    if audit.streams:
        return stream.causal(audit)
    tokens = toy_stream(audit)
    lora = None
    same = 0
    if audit.adapted:
        base = base_replay(audit)
        trained = base.global_steps or not base.cfg.phased_ttt_prefix_docs
        require(bool(trained), "no global phase ran in the replay: the test says nothing")
        lora = base.loras[-1]
        entries = base.entries
        for wanted in sorted({1, len(entries) // 2, len(entries) - 1}):
            number, place = _a_token(tokens, entries, wanted)
            other = Replay(audit, flip(audit, tokens, place)).entries
            state, loss = first_difference(entries, other)
            where = f"token {place}, scored as chunk {number}"
            require(state > number, f"{where}: the weights before chunk {state} depend on it")
            require(loss >= number, f"{where}: the loss of chunk {loss} depends on it")
            require(loss == number, f"{where}: its own loss does not change, the test says nothing")
            same += number
    compared = model_flip(audit, lora, tokens)
    figure = f"{compared:,} losses before a flipped token bit-identical"
    return (
        f"{figure}; {same} earlier chunks of the adaptation and the weights they saw too" if lora else figure
    )


def _a_token(tokens: torch.Tensor, entries: Sequence[Entry], number: int) -> tuple[int, int]:
    """A scored chunk, of that number or before it, and a token in it: some hold a document start alone."""
    while True:
        places = [first + 1 + count // 2 for _, first, count in reversed(entries[number].spans)]
        place = next((place for place in places if int(tokens[place]) != BOS), None)
        if place is not None:
            return number, place
        number -= 1


@check("D2", "C2: a full distribution before the token is looked at", REPLAYED)
def d2_distribution(audit: Audit) -> str:
    """Sums over the vocabulary; the loss of a swapped token; the evaluator's losses against -log p."""
    if audit.streams:
        return stream.distribution(audit)
    tokens = toy_stream(audit, documents=8)
    seen = Distributions(audit)
    replay = Replay(audit, tokens, noise=0.0, visit=seen.visit, ttt_batch_size=1)
    cached = replay.cfg.ttt_cache_window  # a cached window is another function after chunk 0
    pairs = [
        (entry.loss_sum, expected)
        for entry, expected in zip(replay.entries, seen.expected, strict=True)
        if not cached or entry.chunk == 0
    ]
    return seen.verdict(pairs, "sums of first chunks (the others are cached)" if cached else "sums")


def _replay_ledger(audit: Audit) -> tuple[np.ndarray, int]:
    """Times each target was scored, and the number of updates; Failed where one came before its score."""
    counts = np.zeros(len(audit.tokens) - 1, np.int64)
    version: dict[tuple[int, int], tuple] = {}  # document and first target -> adapters and updates it saw
    updates = 0
    for record in audit.records("score", "adapt"):
        adapters, before = record["lora"]
        key = record["rank"], adapters
        for number, first, count in record["spans"]:
            if record["kind"] == "score":
                counts[first : first + count] += 1
                version[number, first] = *key, before, record["order"]
                continue
            where = f"document {number}, targets {first}-{first + count - 1}"
            seen = version.get((number, first))
            require(seen is not None, f"{where}: trained on before it was scored")
            fits = seen[:2] == key and seen[2] < before and seen[3] < record["order"]
            require(fits, f"{where}: scored with version {seen[2]}, trained into version {before}")
        updates += record["kind"] == "adapt"
    return counts, updates


@check("D3", "C3: scored before it is trained on", REPLAYED)
def d3_score_before_update(audit: Audit) -> str:
    """The ledger, replayed; and a replay: the weights that score a chunk do not depend on its tokens."""
    trained_unscored(audit)
    if audit.streams:
        return stream.score_before_update(audit)
    adapts(audit)
    _, updates = _replay_ledger(audit)
    base, tokens = base_replay(audit), toy_stream(audit)
    number = 1  # a chunk that is trained on, after one that was
    places = [first + 1 + j for _, first, count in base.entries[number].spans for j in range(count)]
    other = Replay(audit, flip(audit, tokens, *places)).entries
    state, _ = first_difference(base.entries, other)
    require(state > number, f"the weights that score chunk {state} were trained on chunk {number}")
    require(state == number + 1, "no later weights depend on a chunk: the test says nothing")
    for done, spans in base.trained:
        scored = {span for entry in base.entries[:done] for span in entry.spans}
        require(set(spans) <= scored, "replay: a chunk is trained on before it is scored")
    phases = _explained_phases(audit)
    figure = f"{updates:,} updates and {phases} global phases, all on tokens scored before"
    return f"{figure}; the weights that score a chunk are blind to it"


def _explained_phases(audit: Audit) -> int:
    """Global phases of the ledger; Failed unless each one's tokens are documents scored before it."""
    documents = _scored_documents(audit)
    done: dict[int, int] = {}  # document -> targets scored so far
    phases: dict[int, str] = {}
    for record in audit.ledger[1:]:
        for number, _, count in record["spans"] if record["kind"] == "score" else ():
            done[number] = done.get(number, 0) + count
        if record["kind"] != "global":
            continue
        phase, wanted = f"phase {record['base']}", record["tokens_sha256"]
        same = phases.setdefault(record["base"], wanted) == wanted
        require(same, f"{phase}: the ranks trained on different tokens")
        whole = [number for number, count in done.items() if count == documents[number][1] - 1]
        orders = [sorted(whole, key=lambda n: (documents[n][1], n)), whole, sorted(whole)]
        spans = ([documents[number] for number in order] for order in orders)
        known = any(_prefix_digest(audit, part, record["tokens"]) == wanted for part in spans)
        require(known, f"{phase}: its {record['tokens']:,} tokens are not those of documents scored before")
    return len(phases)


def _prefix_digest(audit: Audit, documents: Iterable[tuple[int, int]], count: int) -> str:
    """Hash of the first documents that have `count` tokens together."""
    parts = []
    for start, length in documents:
        if count <= 0:
            break
        parts.append(audit.tokens[start : start + length])
        count -= length
    return sha256_of(np.concatenate(parts).astype("<u2").tobytes()) if parts and not count else ""


def _scored_documents(audit: Audit) -> list[tuple[int, int]]:
    """(start, length) of the documents by the ledger's numbers; a length counts the next one's BOS."""
    last = len(audit.documents) - 1
    every = [(start, length + (i < last)) for i, (start, length) in enumerate(audit.documents)]
    every = [(start, length) for start, length in every if length > 1]
    return audit.script.select_documents(every, audit.cfg.val_doc_fraction, audit.cfg.seed)


@check("D4", "C4: each target once, in one order", REPLAYED)
def d4_one_pass(audit: Audit) -> str:
    """The ledger's spans are a partition of the targets, left to right; all state follows one order."""
    if audit.streams:
        return stream.one_pass(audit)
    adapts(audit)
    counts, _ = _replay_ledger(audit)
    once_each(counts)
    others, ranks = others_once_each(audit), one_order(audit)
    ends: dict[int, tuple] = {}
    documents = _scored_documents(audit)
    for record in audit.records("score"):
        for number, first, count in record["spans"]:
            owner = record["rank"], record["lora"][0], record["base"]
            start, length = documents[number]
            due = min(_chunk_size(audit, length - 1), start + length - 1 - first)
            require(count == due, f"document {number}: {count} targets scored at once, {due} declared")
            end, whose = ends.get(number, (documents[number][0], owner))
            require(first == end, f"document {number}: target {first} scored, {end} was due")
            require(whose == owner, f"document {number}: scored by two sets of weights")
            ends[number] = first + count, owner
    order = f"one order on each of {ranks} ranks, {_explained_phases(audit)} global phases"
    order += one_order_of_hints(audit, audit.script.load_validation(audit.cfg))
    return f"{len(counts):,} targets of {len(ends):,} documents once each, left to right; {order}{others}"


def _chunk_size(audit: Audit, targets: int) -> int:
    """The declared chunk size of a document, by our own reading of the settings."""
    table = getattr(audit.cfg, "ttt_chunk_by_length", "")
    pairs = [map(int, pair.split(":")) for pair in table.split(",") if pair]
    return next((size for limit, size in pairs if targets <= limit), audit.cfg.ttt_chunk_size)


def _grams(tokens: np.ndarray) -> set[bytes]:
    values = np.ascontiguousarray(tokens, np.uint16)
    if len(values) < GRAM:
        return set()
    windows = np.lib.stride_tricks.sliding_window_view(values, GRAM)
    return {row.tobytes() for row in windows}


@check("D5", "warm-up on random tokens, nothing learnt", REPLAYED)
def d5_warm_up_tokens(audit: Audit) -> str:
    """What the model saw while warming up occurs in no data file; the weights are the same afterwards.

    That is the warm-up of training and the one of test-time training, whether this run compiled or not.
    """
    warmed = {"training": warm_up} if audit.trained else {}
    warmed |= {"test-time training": ttt_warm_up} if audit.adapted else {}
    if not warmed:
        raise NotChecked("this run did not train")
    seen = []
    for name, make in warmed.items():
        done = make(audit)
        if not len(done.ids):
            raise NotChecked(f"{name}: the model was not called through tok_emb while warming up")
        opened = sorted({path for path in done.files if is_validation(path)})
        require(not opened, f"{name}: warm-up opened {', '.join(opened)}")
        files = sorted((audit.work / "warm-up").glob("fineweb_*.bin"))
        known = set().union(*(_grams(read_values(path)) for path in files))
        found = len(_grams(done.ids) & known)
        require(not found, f"{name}: {found} runs of {GRAM} warm-up tokens occur in the data")
        require(done.before == done.after, f"{name}: weights or other state differ after the warm-up")
        seen.append(f"{len(done.ids):,} ({name})")
    if audit.evaluator != "standard":
        same_start(audit)
    return f"tokens seen: {', '.join(seen)}; no {GRAM} in a row from the data; weights before = after"


@check("D6", "evaluation within 600 s, all of it timed", RECORDS)
def d6_evaluation_seconds(audit: Audit) -> str:
    """The stage's seconds cover the first to the last record of the ledger."""
    final = audit.result["final_stage"]
    seconds = audit.result["eval_seconds"]
    stage = audit.result["seconds"][final]
    require(seconds <= EVAL_LIMIT, f"{seconds:.1f} s")
    same = seconds == stage == audit.result["stages"][final]["seconds"]
    require(same, f"{seconds} s and {stage} s in result.json")
    span = _ledger_span(audit)
    require(span <= seconds + 0.01, f"timer {seconds:.2f} s, the ledger spans {span:.2f} s")
    return f"{seconds:.1f} s of 600" + (f", first to last record {span:.1f} s" if span else "")


def _ledger_span(audit: Audit) -> float:
    """Seconds from the first to the last record of the slowest rank, each with its own clock; 0 without."""
    if audit.evaluator == "standard":
        return 0.0
    times: dict[int, list[float]] = {}
    kinds = ("start", "score", "adapt", "batch", "global", "slide", "sgd", "end")
    for record in audit.records(*kinds):
        times.setdefault(record["rank"], []).append(record["seconds"])
    return max(max(seconds) - min(seconds) for seconds in times.values())


@check("D7", "each document starts afresh", REPLAYED)
def d7_fresh_start(audit: Audit) -> str:
    """B zero and no optimiser state at the start of every batch; A drawn, or declared as carried."""
    if audit.streams:
        return stream.declared_state(audit)
    adapts(audit)
    resets = audit.records("reset")
    batches = len(audit.records("batch"))
    first = {}
    for record in audit.records("score"):
        first.setdefault((record["rank"], record["lora"][0]), record)
    require(len(first) == batches, f"{batches} batches on {len(first)} sets of adapters")
    dirty = sum(not record.get("b_zero") for record in first.values())
    require(not dirty, f"{dirty} of {batches} batches were first scored with B other than zero")
    base = Replay(audit, toy_stream(audit), phased_ttt_prefix_docs=0)  # a phase would make new adapters
    require(all(zero for _, zero, _ in base.starts), "replay: B is not zero when a batch is first scored")
    carried = [record for record in resets if record["a"] == "carried"]
    declared = audit.cfg.ttt_warm_start_a
    starts = [a for _, _, a in base.starts]
    ends = [digest([low_rank.A for low_rank in lora.maps()]) for lora in base.loras]
    kept = any(a == b for a, b in zip(ends[:-1], starts[1:], strict=True))
    require(declared or not (carried or kept), "A is carried over, which TTT_WARM_START_A=0 denies")
    _neighbours(audit)
    note = f"A carried {len(carried)} times, declared by TTT_WARM_START_A=1" if declared else "A drawn anew"
    diverged = sum(record["diverged"] for record in audit.records("batch"))
    note += f"; {diverged} documents diverged and went on without" if diverged else ""
    return f"{batches} batches start with B = 0, no optimiser state outlives one; {note}"


@functools.cache
def _neighbours(audit: Audit) -> int:
    """Perturb a document: adapters and losses of all others must be the same bits. Returns how many others.

    Nothing declared is carried: A is drawn anew and no global phase runs.
    """
    tokens = toy_stream(audit)
    options = {"phased_ttt_prefix_docs": 0, "ttt_warm_start_a": False}
    options |= {"ngram_tilt": ""} if declared_boosts(audit) else {}
    base = Replay(audit, tokens, **options)
    number, first, count = base.entries[0].spans[0]
    others = 0
    text = [first + 1 + j for j in range(count)]
    other = Replay(audit, flip(audit, tokens, *text), **options)
    rows = [entry.spans for entry in base.entries if entry.chunk == 0]
    require(len(rows) == len(base.loras), "the replay's batches are not told apart")
    for spans, mine, theirs in zip(rows, base.loras, other.loras, strict=True):
        for row, (document, _, _) in enumerate(spans):
            pairs = zip(mine.parameters(), theirs.parameters(), strict=True)
            same = all(digest(a[row]) == digest(b[row]) for a, b in pairs)
            if document == number:
                require(not same, "a perturbed document leaves its adapters alone: the test says nothing")
                continue
            require(same, f"document {document}'s adapters depend on document {number}")
            others += 1
    first_batch = base.entries[0].batch
    for a, b in zip(base.entries, other.entries, strict=True):
        same = a.batch == first_batch or a.loss_sum == b.loss_sum
        require(same, f"the losses of batch {a.batch} depend on document {number}")
    return others


@check("D8", "nothing crosses a document start", REPLAYED)
def d8_documents_apart(audit: Audit) -> str:
    """Perturb a document: losses of the next in the same row, and of all others being adapted, stay."""
    if audit.streams:
        return stream.documents_apart(audit)
    if audit.evaluator == "standard" and getattr(audit.cfg, "plain_windows", False):
        return stream.windows_apart(audit)
    tokens = toy_stream(audit)
    starts = (tokens == BOS).nonzero().flatten().tolist()
    model = audit.model(0.02)
    score = audit.script.model_score(model, looping=audit.looping, ranks=audit.ranks)
    smeared = audit.cfg.smear_gate_enabled and not audit.cfg.smear_bos_mask
    places = range(starts[1] + 1, starts[2] - smeared)  # the last token reaches over the start that follows
    rows = [tokens, flip(audit, tokens, *places)]
    one, other = (score(*audit.script.packed_row(row, audit.cfg.eval_seq_len))[0] for row in rows)
    own = slice(starts[1] + 1, starts[2] - 1)
    changed = bool((one[own] != other[own]).any())
    require(changed, "the perturbed document's losses stay: the test says nothing")
    apart = torch.cat([(one != other)[: starts[1]], (one != other)[starts[2] :]])
    moved = int(apart.sum())
    require(not moved, f"{moved} losses of other documents in the row change")
    text = f"{len(apart)} losses of the row's other documents bit-identical"
    if audit.adapted:
        text += f"; adapters of {_neighbours(audit)} other documents too (global state frozen)"
        text += "; what they say gives hints to later parts, declared by NGRAM_TILT" * bool(
            declared_boosts(audit)
        )
    if smeared:
        known = "SMEAR_BOS_MASK=0: a document's last token reaches the next one (earlier text; PR #1667)"
        raise NotChecked(f"{known}; of all its other tokens {text}")
    return text


@check("D9", "a document's last chunk trains nothing", REPLAYED)
def d9_last_chunk(audit: Audit) -> str:
    """No update of the ledger, and none of a replay, uses a chunk that nothing follows."""
    if audit.streams:
        return stream.last_chunk(audit)
    adapts(audit)
    ends = {number: start + length - 1 for number, (start, length) in enumerate(_scored_documents(audit))}
    updates = audit.records("adapt")
    for record in updates:
        for number, first, count in record["spans"]:
            require(first + count < ends[number], f"document {number}: trained on its last chunk")
    base = base_replay(audit)
    last = {number: start + length - 1 for number, (start, length) in enumerate(base.val.documents)}
    trained = [span for _, spans in base.trained for span in spans]
    bad = sorted({number for number, first, count in trained if first + count >= last[number]})
    require(not bad, f"replay: documents {bad} were trained on their last chunk")
    total = sum(len(record["spans"]) for record in updates)
    return f"{total:,} spans trained on, each with a later chunk to score"
