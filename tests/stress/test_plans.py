"""Random documents shared out over 1 to 16 ranks: each target once, in the same phases, evenly."""

import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch


def draw_lengths(rng: random.Random) -> list[int]:
    """Lengths of documents as `find_documents` gives them, short ones more often."""
    longest = rng.choice((3, 30, 300))
    return [round(math.exp(rng.uniform(math.log(2), math.log(longest)))) for _ in range(rng.randint(1, 120))]


def draw(tg, rng: random.Random):
    """Settings of a plan."""
    chunk = rng.randint(1, 48)
    chosen = {
        "ttt_batch_size": rng.randint(1, 40),
        "ttt_chunk_size": chunk,
        "ttt_eval_seq_len": chunk + rng.randint(0, 100),
        "phased_ttt_prefix_docs": rng.randint(0, 140),
        "phased_ttt_num_phases": rng.randint(1, 6),
        "ttt_chunk_by_length": f"8:{chunk // 3},40:{chunk // 2}" if chunk > 5 and rng.random() < 0.3 else "",
    }
    print(chosen)
    return tg.Config(**chosen)


def mark_targets(tg, cfg, share, tokens: torch.Tensor, scored: torch.Tensor) -> None:
    """Count every target that a rank scores, and see that its row holds it; a token is its own place."""
    for batch in share:
        size = tg.chunk_size(cfg, batch.targets)
        for chunk in range(-(-batch.targets // size)):
            part = tg.chunk_batch(tokens, batch, chunk, size, cfg.ttt_eval_seq_len)
            end = min((chunk + 1) * size, batch.targets)
            assert part.x.size(1) == min(end, cfg.ttt_eval_seq_len)  # as far back as a window may reach
            places = part.y.gather(1, part.scored)[part.valid]
            spans = [torch.arange(first, first + count) for first, count in part.spans]
            assert torch.equal(places, torch.cat(spans) + 1)
            scored[places - 1] += 1


@pytest.mark.cases(750)
def test_plans_are_the_same_for_any_number_of_ranks(tg, rng):
    """Phases as one rank has them, every document once in each, every target scored once."""
    cfg, lengths, world = draw(tg, rng), draw_lengths(rng), rng.randint(1, 16)
    print(world, lengths)
    starts = itertools.accumulate([0, *(length - 1 for length in lengths[:-1])])
    documents = list(enumerate(zip(starts, lengths, strict=True)))
    batches = tg.ttt_batches(documents, cfg)
    boundaries = tg.phase_boundaries(cfg.phased_ttt_prefix_docs, cfg.phased_ttt_num_phases, len(documents))
    parts, begun = tg.split_at_boundaries(batches, boundaries), 0
    assert len(parts) == len(boundaries) + 1 and [batch for part in parts for batch in part] == batches
    tokens = torch.arange(sum(length - 1 for length in lengths) + 1)
    scored = torch.zeros(len(tokens) - 1, dtype=torch.int64)
    for part, boundary in zip(parts, [*boundaries, len(documents)], strict=True):
        begun += sum(len(batch.documents) for batch in part)
        assert begun >= boundary
        shares = tg.share_documents(part, cfg, world)
        given = [document for share in shares for batch in share for document in batch.documents]
        assert len(shares) == world
        assert sorted(given) == sorted(document for batch in part for document in batch.documents)
        plan = [[batch.documents for batch in batches] for batches in (part, shares[0])]
        assert world > 1 or plan[0] == plan[1]
        for share in shares:
            mark_targets(tg, cfg, share, tokens, scored)
    assert (scored == 1).all()


def costs_of(tg, cfg, share) -> list[float]:
    """What the documents of a rank cost by the rule of `share_documents`; the longest of a batch opens it."""
    lengths, costs = [length for batch in share for _, (_, length) in batch.documents], []
    for place, length in enumerate(sorted(lengths, reverse=True)):
        window, opens = min(length, cfg.ttt_eval_seq_len), place % cfg.ttt_batch_size == 0
        cost = window * (length - window / 2) + opens * 4 * cfg.ttt_eval_seq_len * length
        costs.append(cost / tg.chunk_size(cfg, length - 1))
    return costs


@pytest.mark.cases(750)
def test_plans_are_even(tg, rng):
    """No rank has more to do than an equal part and one document."""
    cfg, lengths, world = draw(tg, rng), draw_lengths(rng), rng.randint(1, 16)
    print(world, lengths)
    documents = [(number, (0, length)) for number, length in enumerate(lengths)]
    shares = tg.share_documents(tg.ttt_batches(documents, cfg), cfg, world)
    costs = [costs_of(tg, cfg, share) for share in shares]
    loads = list(map(sum, costs))
    assert max(loads) <= (sum(loads) / world + max(map(max, filter(None, costs)))) * (1 + 1e-9)


@pytest.mark.cases(750)
def test_pieces_of_work_are_shared_out_evenly(tg, rng):
    """Longest first to whoever has least: at most an equal part and one piece."""
    costs = [rng.choice((0, 1, 10, 100)) * rng.random() for _ in range(rng.randint(0, 60))]
    world = rng.randint(1, 16)
    print(world, costs)
    owners = tg.assign_to_ranks(costs, world)
    loads = [sum(c for c, owner in zip(costs, owners, strict=True) if owner == r) for r in range(world)]
    assert set(owners) <= set(range(world))
    assert max(loads) <= sum(costs) / world + max(costs, default=0) + 1e-9


@pytest.mark.cases(750)
def test_rows_of_the_standard_evaluation_cover_the_stream(tg, rng, monkeypatch):
    """Ranks take rows in turn: every target once."""
    world, length, row = rng.randint(1, 16), rng.randint(2, 400), rng.randint(1, 90)
    print(world, length, row)
    tokens = torch.tensor([1, *rng.choices(range(1, 9), k=length - 1)])
    val, rows = tg.ValidationSet.from_sidecar(tokens, torch.ones_like(tokens)), []
    cfg = SimpleNamespace(val_batch_tokens=8 * row, eval_seq_len=rng.randint(1, 50), plain_windows=False)
    watch = SimpleNamespace(see=lambda kind, **facts: rows.append((facts["start"], facts["end"])))
    monkeypatch.setattr(tg, "model_score", lambda *_, **__: lambda x, y, segments: torch.zeros(y.shape))
    for rank in range(world):
        ranks = SimpleNamespace(rank=rank, world_size=world)
        worker = tg.StandardEvaluation(None, val, cfg, looping=False, ranks=ranks, watch=watch)
        worker.meter.sum_over = lambda ranks: None
        worker.run()
    assert sorted(place for start, end in rows for place in range(start, end)) == list(range(length - 1))
