"""Sliding windows and score-first SGD: each target once, with its context, before it is trained on."""

import copy
from types import SimpleNamespace

import pytest
import torch
from golden_tools import run_through
from test_ttt import TINY, documents_stream, random_model, validation

SETTINGS = {**TINY, "eval_stride": 8, "val_batch_tokens": 1024, "ttt_chunk_tokens": 64, "ttt_epochs": 2}
SETTINGS |= {"ttt_lr": 0.05, "smear_gate_enabled": True}


def setup(tg, **settings):
    config = tg.Config(**{**SETTINGS, **settings})
    return config, random_model(tg, config), validation(tg, documents_stream())


def slide(tg, model, val, config, ranks=None):
    """What a rank scores of the whole stream, by sliding windows."""
    meter, worker = (
        tg.BpbMeter(),
        tg.SlidingEvaluation(model, val, config, looping=True, ranks=ranks or tg.CPU),
    )
    for _ in worker.slide(0, val.num_targets, meter):
        pass
    return meter


@pytest.mark.parametrize(
    ("first", "end"), [(0, 5), (0, 32), (0, 33), (0, 260), (64, 128), (192, 259), (3, 40)]
)
@pytest.mark.parametrize("stride", [1, 8, 32])
def test_windows_score_each_target_once_with_full_context(tg, first, end, stride):
    windows, seen = tg.sliding_windows(first, end, 32, stride), []
    for window in windows:
        scored = range(window.start + window.offset, window.start + window.length)
        assert len(scored) == window.targets and window.length <= 32
        assert window.length == 32 or window.start == 0
        assert window.start == 0 or window.targets <= stride
        seen += scored
    assert seen == list(range(first, end))


def test_sliding_losses_are_those_of_each_window_alone(tg):
    """Target by target against the model run on the 32 inputs before it, and the tail is scored."""
    config, model, val = setup(tg, eval_stride=1)
    meter = slide(tg, model, val, config)
    total = 0.0
    with torch.no_grad():
        for target in range(val.num_targets):
            start = max(0, min(target - 31, val.num_targets - 32)) if target >= 32 else 0
            row = val.tokens[start : start + 33 if target < 32 else target + 2].long()
            losses = model.losses(row[None, :-1], row[None, 1:], looping=True)
            total += float(losses[0, target - start])
    assert (meter.tokens, meter.bytes) == (val.num_targets, float(val.target_bytes.sum()))
    assert meter.loss_sum == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("stride", [4, 8, 32])
def test_batches_do_not_change_the_score(tg, stride):
    config, model, val = setup(tg, eval_stride=stride)
    alone = tg.Config(**{**SETTINGS, "eval_stride": stride, "val_batch_tokens": 8})
    many, one = (slide(tg, model, val, settings) for settings in (config, alone))
    assert many.loss_sum == pytest.approx(one.loss_sum, rel=1e-5)


def test_ranks_share_the_windows(tg):
    config, model, val = setup(tg)
    whole = slide(tg, model, val, config)
    parts = [tg.Ranks(torch.device("cpu"), rank, 3) for rank in range(3)]
    meters = [slide(tg, model, val, config, rank) for rank in parts]
    assert sum(meter.tokens for meter in meters) == whole.tokens
    assert sum(meter.loss_sum for meter in meters) == pytest.approx(whole.loss_sum, rel=1e-6)


def test_sgd_scores_a_chunk_before_it_trains_on_it(tg):
    """By the events, and by the losses: tokens of a chunk do not change what the chunks up to it score."""
    config, model, val = setup(tg)
    events = []
    meter = run_through(
        tg.ScoreFirstSGD,
        copy.deepcopy(model),
        val,
        config,
        looping=True,
        watch=SimpleNamespace(see=lambda kind, **data: events.append((kind, data))),
    )
    assert meter.tokens == val.num_targets and meter.bytes == float(val.target_bytes.sum())
    kinds = [(kind, data["chunk"]) for kind, data in events if kind.endswith("_span")]
    chunks = -(-val.num_targets // 64)
    expected = [(kind, chunk) for chunk in range(chunks) for kind in ("scored_span", "trained_span")]
    assert kinds == expected[:-1]  # nothing is trained after the last chunk
    spans = [(data["first"], data["end"]) for kind, data in events if kind == "scored_span"]
    assert spans == [(n * 64, min(n * 64 + 64, val.num_targets)) for n in range(chunks)]


def test_sgd_trains_on_scored_tokens_only(tg):
    """A changed token of the third chunk changes its score and the later ones, no earlier one."""
    config, model, val = setup(tg)

    def scores(tokens: torch.Tensor) -> list[float]:
        worker = tg.ScoreFirstSGD(copy.deepcopy(model), validation(tg, tokens), config, looping=True)
        totals = [0.0, *(worker.meter.loss_sum for _ in worker.units())]
        return [after - before for before, after in zip(totals, totals[1:], strict=False)]

    tokens = documents_stream()
    place = next(i for i in range(140, 190) if tokens[i] != 1)
    other = tokens.clone()
    other[place] = tokens[place] % 60 + 2
    before, after = scores(tokens), scores(other)
    assert before[:2] == after[:2]
    assert all(a != b for a, b in zip(before[2:], after[2:], strict=True))


def test_sgd_learns(tg):
    """A stream that repeats itself costs less once its first chunks are trained on."""
    config, model, _ = setup(tg, ttt_lr=0.2)
    val = validation(tg, documents_stream()[:65].repeat(6))
    still = slide(tg, model, val, config)
    meter = run_through(tg.ScoreFirstSGD, model, val, config, looping=True)
    assert meter.val_bpb < still.val_bpb - 0.05


def test_stride_is_checked(tg):
    with pytest.raises(tg.ConfigError, match="EVAL_STRIDE=33: must be at most EVAL_SEQ_LEN=32"):
        tg.check_settings(tg.Config(**{**SETTINGS, "eval_stride": 33, "sliding_window_enabled": True}))
    assert tg.Config(**{**SETTINGS, "eval_stride": 33}).eval_stride == 33


def test_a_chunk_too_short_to_train_on_is_refused(tg):
    """SGD takes whole windows: with less it would score, and never learn."""
    with pytest.raises(tg.ConfigError, match="TTT_CHUNK_TOKENS=31: must be at least EVAL_SEQ_LEN=32 "):
        tg.check_settings(tg.Config(**{**SETTINGS, "ttt_chunk_tokens": 31, "ttt_sgd": True}))
    assert tg.Config(**{**SETTINGS, "ttt_chunk_tokens": 31}).ttt_chunk_tokens == 31
    config, model, val = setup(tg, ttt_chunk_tokens=32, ttt_sgd=True)
    steps, whole = [], tg.BaseTraining.train

    def spy(*arguments, **options):
        steps.append(len(norms := whole(*arguments, **options)))
        return norms

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tg.BaseTraining, "train", spy)
        run_through(tg.ScoreFirstSGD, model, val, config, looping=True)
    assert set(steps) == {config.ttt_epochs}
