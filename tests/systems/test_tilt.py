"""NGRAM_TILT: hints against a plain reading of the rule, what they may depend on, and the distributions."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ttt import LENGTHS, TINY, documents_stream, random_model, run, validation

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from auditing.tilt import plain_hints  # noqa: E402

BOS = 1
SHORT = {"ngram_tilt": "1:1.5", "ttt_warm_start_a": False}  # contexts of one token come again in a short text


def drawn_stream(seed, documents=12):
    """Documents of few different tokens, some of them in each of three parts and one part empty."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 40, documents)
    tokens = np.concatenate([[BOS, *rng.integers(2, 5, length - 1)] for length in lengths]).astype(np.uint16)
    starts = np.cumsum(lengths) - lengths
    spans = [
        (int(start), int(min(n + 1, len(tokens) - start))) for start, n in zip(starts, lengths, strict=True)
    ]
    spans = [spans[i] for i in rng.permutation(documents)]
    return tokens, [spans[:3], [], spans[3:8], spans[8:]]


@pytest.mark.parametrize("order", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("share", [0.5, 0.8, 1.0])
def test_hints_are_those_of_a_plain_reading(tg, monkeypatch, order, share):
    monkeypatch.setattr("systems.tilt.SHARE", share)
    for seed in range(10):
        tokens, parts = drawn_stream(seed)
        boosts = {order: 1.5, order + 1: 2.5}
        hints, nats = tg.find_hints(tokens, parts, boosts, len(tokens) - 1)
        plain = plain_hints(tokens, parts, boosts, share)
        told = [plain.get(place, (-1, 0.0)) for place in range(len(hints))]
        assert list(zip(hints.tolist(), nats.tolist(), strict=True)) == told
        assert order > 5 or plain


def test_longer_contexts_and_the_own_document_go_first(tg):
    """Of `5 6` the first document tells 7, the last one 8, then 9; only `4 5 6` is told 9."""
    documents = [[BOS, 4, 5, 6, 9], [BOS, 2, 5, 6, 7], [BOS, 3, 5, 6, 8, 5, 6, 2, 4, 5, 6, 2]]
    tokens = np.concatenate(documents).astype(np.uint16)
    starts = np.cumsum([0, *map(len, documents)])
    first, second, last = [(int(start), len(text)) for start, text in zip(starts, documents, strict=False)]
    hints, nats = tg.find_hints(tokens, [[first], [second], [last]], {2: 1.0, 3: 2.0}, len(tokens) - 1)
    told = {int(place - last[0]): (int(hints[place]), float(nats[place])) for place in np.flatnonzero(nats)}
    assert told.pop(-2) == (9, 1.0)  # in the second document
    assert told == {
        6: (8, 1.0),
        9: (6, 1.0),
        10: (9, 2.0),
    }  # At 3 the parts before disagree: 9 and 7, half each.


@pytest.mark.parametrize("part", [0, 2, 3])
def test_a_hint_depends_on_what_was_scored_before_it(tg, part):
    """A changed token changes no hint of its document up to itself, nor of its part's others or before."""
    told = set()
    for seed in range(10):
        tokens, parts = drawn_stream(seed)
        start, length = max(parts[part], key=lambda span: span[1])
        changed, place = tokens.copy(), start + length // 2
        changed[place] = 6
        texts = (tokens, changed)
        one, other = (tg.find_hints(text, parts, {1: 1.0, 2: 2.0}, len(tokens) - 1)[0] for text in texts)
        moved = set(np.flatnonzero(one != other).tolist())
        own = set(range(place, start + length - 1))
        later = {i for spans in parts[part + 1 :] for first, n in spans for i in range(first, first + n - 1)}
        assert moved <= own | later
        told |= {name for name, places in (("own", own), ("later", later)) if moved & places}
    assert told == ({"own", "later"} if part < 3 else {"own"})


def test_hashes_tell_contexts_of_any_length_apart(tg):
    """Each length has a sum of its own: no token outside the context counts, every one inside does."""
    tokens = np.random.default_rng(0).integers(0, 9, 200)
    for order in (1, 2, 3, 6, 7, 16, 100):
        hashes = tg._context_hashes(tokens, order)[order - 1 :]
        contexts = [tokens[i : i + order].tobytes() for i in range(len(hashes))]
        assert (
            len(set(hashes.tolist()))
            == len(set(contexts))
            == len({*zip(hashes.tolist(), contexts, strict=True)})
        )


def test_tilted_distributions_sum_to_one_and_learn_as_before(tg):
    """The losses of all tokens of the vocabulary as targets; gradients are those without a tilt."""
    config = tg.Config(**TINY | SHORT)
    model, x = random_model(tg, config), documents_stream()[None, :12]
    lora = tg.BatchedLoRA(config, 1, tg.lora_slots(config, True), torch.Generator().manual_seed(3))
    with torch.no_grad():
        lora.lm_head_lora.B.normal_(0, 0.1)
    hints = torch.tensor([[7.0, 2.5]] * 6 + [[0.0, 0.0]] * 6)[None]
    every = [model.losses(x, torch.full_like(x, y), looping=True, lora=lora, hints=hints) for y in range(64)]
    plain = [model.losses(x, torch.full_like(x, y), looping=True, lora=lora) for y in range(64)]
    every, plain = torch.cat(every).double(), torch.cat(plain).double()
    assert torch.allclose(torch.exp(-every).sum(0), torch.ones(12).double(), atol=1e-5)
    factor = torch.ones(64, 12).double()
    factor[7, :6] = np.exp(2.5)
    expected = torch.exp(-plain) * factor
    torch.testing.assert_close(torch.exp(-every), expected / expected.sum(0), atol=1e-6, rtol=1e-4)
    gradients = []
    for given in ({}, {"hints": hints}):
        losses = model.losses(x, x.flip(1), looping=True, lora=lora, **given)
        gradients.append(torch.autograd.grad(losses.sum(), list(lora.parameters()), allow_unused=True))
    for one, other in zip(*gradients, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_an_adaptation_learns_the_same_and_scores_what_is_tilted(tg):
    """Adapters and weights are those of a run without a tilt; the losses differ where there are hints."""
    tokens = documents_stream()
    tilted, _, model, val = run(tg, tokens, SHORT)
    plain, _, same, _ = run(tg, tokens, SHORT | {"ngram_tilt": ""})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    evaluation = tg.ScoreFirstTTT(same, val, tg.Config(**TINY | SHORT), looping=True)
    tilt = tg.Tilt(evaluation)
    assert sum(map(len, tilt.parts)) == len(evaluation.batches)
    share = np.mean(tilt.hints >= 0)
    assert 0.05 < share < 0.95
    differ = [one[0] != other[0] for one, other in zip(tilted.chunk_losses, plain.chunk_losses, strict=True)]
    assert sum(differ) > 0


def test_a_tilt_leaves_warm_started_adapters_warm(tg):
    """A tilt of almost nothing changes nothing: what is inherited is renewed at phases only."""
    warm = SHORT | {"ttt_warm_start_a": True, "phased_ttt_prefix_docs": 0}
    scores = [
        run(tg, documents_stream(), warm | {"ngram_tilt": t})[1].val_loss for t in ("", "3:0.000000001")
    ]
    assert scores[1] == pytest.approx(scores[0], rel=1e-7)


def repeated_stream():
    """Documents that say the same sentence again and again."""
    sentence = torch.arange(2, 12).repeat(8)
    return torch.cat([torch.cat([torch.ones(1, dtype=torch.long), sentence[: n - 1]]) for n in LENGTHS])


def test_a_text_that_says_itself_again_costs_less(tg):
    given = {"ngram_tilt": "3:3", "ttt_warm_start_a": False}
    scores = [run(tg, repeated_stream(), settings)[1].val_loss for settings in ({}, given)]
    assert scores[1] < scores[0] - 1


@pytest.mark.parametrize("world_size", [2, 3])
def test_hints_are_those_of_any_number_of_ranks(tg, world_size):
    """Nor do the ranks' shares of a part meet other documents than the part's."""
    config = tg.Config(**TINY | SHORT)
    val = validation(tg, documents_stream())
    model, ranks = random_model(tg, config), tg.Ranks(torch.device("cpu"), world_size - 1, world_size)
    one = tg.Tilt(tg.ScoreFirstTTT(model, val, config, looping=True))
    other = tg.Tilt(tg.ScoreFirstTTT(model, val, config, looping=True, ranks=ranks))
    assert (one.hints == other.hints).all() and one.parts == other.parts
    for part in one.parts:
        shares = tg.share_documents(part, config, world_size)
        shared = sorted(item for share in shares for batch in share for item in batch.documents)
        assert shared == sorted(item for batch in part for item in batch.documents)


@pytest.mark.parametrize(
    "text",
    [
        "16",
        "16:",
        ":1",
        "0:1",
        "16:100",
        "16:1,16:2",
        "016:1,16:2",
        "x:1",
        "16:nan",
        "10001:1",
        ",",
        "16:1,",
        "16:-1",
        "16:0",
        "16:80.1",
        "\u0661\u0666:2",
    ],
)
def test_settings_are_checked(tg, text):
    with pytest.raises(tg.ConfigError, match=r"NGRAM_TILT='.*': must be ORDER:NATS,..."):
        tg.check_settings(tg.Config(ngram_tilt=text))


@pytest.mark.parametrize("order", [18, 19, 20, 21, 9999])
def test_contexts_may_be_longer_than_any_document(tg, order):
    """Of 20 tokens: one of 19 has a token behind it, but stands nowhere else in its document."""
    tokens = np.array([BOS, *[7] * 19] * 2).astype(np.uint16)
    hints, nats = tg.find_hints(tokens, [[(0, 20)], [(20, 20)]], {order: 2.0}, 39)
    assert (hints[38] == 7) == (nats[38] == 2) == (order < 20), "what the first document said"
    assert (hints[:18] == -1).all() and (order < 20 or (hints == -1).all())


def test_the_largest_tilt_is_finite(tg):
    """In float32, where a token that is certain is hinted and another follows, and the other way round."""
    losses, hinted, hits = (torch.tensor(pair) for pair in ([60.0, 60.0], [1e-6, 60.0], [0.0, 1.0]))
    found = tg.tilted(losses, hinted, hits, torch.full((2,), float(tg.MOST_NATS)))
    torch.testing.assert_close(found, torch.tensor([60.0 + tg.MOST_NATS, 0.0]), atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("other", [{"ttt_enabled": False}, {"ttt_sgd": True}])
def test_a_tilt_needs_an_adaptation_by_documents(tg, other):
    with pytest.raises(tg.ConfigError, match="NGRAM_TILT"):
        tg.check_settings(tg.Config(ngram_tilt="16:2.62", **other))
