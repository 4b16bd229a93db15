"""REFINEMENTS: each against a plain oracle, all of them through a checkpoint, and what is refused."""

import copy
import itertools

import pytest
import torch
from test_training import make_trainer, shard  # noqa: F401 - fixtures

ALL = "ema_nesterov,bi_maxwell,row_floor,cautious_decay,slow_scalars"


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("frac, beta", [(0.25, 0.6), (0.5, 0.4), (0.1, 0.0), (0.8, 0.0)])
def test_ema_nesterov_starts_ahead_by_the_average_move(make_trainer, frac, beta):  # noqa: F811
    """From x + beta m, with m' = k m + (1 - k)(x' - x); the first move is lost. k is 0.7 at EMA_DECAY=0.9."""
    trainer = make_trainer(refinements="ema_nesterov")
    passed = [weights(trainer)]
    for step, earlier in enumerate([0.0, 0.1, 0.2, 0.3]):
        trainer.step(step, earlier)
        passed.append(weights(trainer))
    trainer.muon.begin(trainer, frac, min(1.0, (1 - frac) / 0.75))
    for name, parameter in trainer.model.named_parameters():
        mean = torch.zeros_like(parameter)
        for begin, end in itertools.pairwise(passed[1:]):
            mean = 0.7 * mean + 0.3 * (end[name] - begin[name])
        torch.testing.assert_close(parameter, passed[-1][name] + beta * mean, rtol=1e-6, atol=1e-7)
        assert beta == 0 or mean.abs().max() > 1e-5 or not parameter.abs().max()


def test_bi_maxwell_is_a_mix_as_old_as_one_momentum(tg):
    muon = tg.RefinedMuon([torch.nn.Parameter(torch.zeros(2, 3, 4))], lr=1.0, momentum=0.9, weight_decay=0.0)
    muon.cfg = tg.Config(refinements="bi_maxwell")
    drawn = torch.Generator().manual_seed(1)
    gradients = [torch.randn(2, 3, 4, generator=drawn) for _ in range(12)]
    slow = 0.1 * 0.5615 / (1 - 0.4385 / 3)
    mean_age = 0.4385 / 0.3 + 0.5615 / slow
    assert mean_age == pytest.approx(1 / 0.1)
    state = {}
    for count in range(1, 13):
        update = muon._with_momentum(state, gradients[count - 1].clone(), {"momentum": 0.9})
        past = list(enumerate(reversed(gradients[:count])))
        mixed = sum(0.4385 * 0.3 * 0.7**age * g + 0.5615 * slow * (1 - slow) ** age * g for age, g in past)
        torch.testing.assert_close(update, 0.1 * gradients[count - 1] + 0.9 * mixed)


def one_step(make_trainer, refinements: str, scale: float) -> tuple:  # noqa: F811
    """Weights of the banks before a step and after one without decay, and after a refined one."""
    trainers = make_trainer(muon_wd=0.0), make_trainer(muon_wd=0.5, refinements=refinements)
    for trainer in trainers:
        drawn = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for bank in trainer.muon.param_groups[0][
                "params"
            ]:  # some begin at zero, and others without slope
                bank.copy_(0.1 * torch.randn(bank.shape, generator=drawn))
            trainer.model.kv_bank.mul_(scale)
    before = trainers[0].model.kv_bank.detach().clone()
    for trainer in trainers:
        trainer.step(0, 0.0)
    return before, *(trainer.model.kv_bank.detach() for trainer in trainers)


def test_cautious_decay_goes_only_where_the_step_goes(make_trainer):  # noqa: F811
    before, plain, refined = one_step(make_trainer, "cautious_decay", 1.0)
    rate = make_trainer().cfg.matrix_lr
    shrinks = before * (plain - before) < 0
    expected = torch.where(shrinks, plain - rate * 0.5 * before, plain)
    torch.testing.assert_close(refined, expected)
    assert 0.2 < shrinks.float().mean() < 0.8


@pytest.mark.parametrize("scale, floored", [(0.1, False), (30.0, True)])
def test_row_floor_moves_long_rows_enough(make_trainer, scale, floored):  # noqa: F811
    before, plain, refined = one_step(make_trainer, "row_floor", scale)
    rate = make_trainer().cfg.matrix_lr
    move = refined + rate * 0.5 * before - before
    ratio = move.norm(dim=-1) / before.norm(dim=-1) / rate
    assert (ratio > 0.3499).all()
    if not floored:
        torch.testing.assert_close(move, plain - before, rtol=1e-4, atol=1e-6)
    else:
        torch.testing.assert_close(ratio, torch.full_like(ratio, 0.35), rtol=1e-3, atol=0)


def test_slow_scalars_leaves_the_embedding(make_trainer):  # noqa: F811
    trainer = make_trainer(refinements="slow_scalars")
    trainer.step(0, 0.0)
    betas = {len(group["params"]): group["betas"] for group in trainer.adamw.param_groups}
    assert [tuple(betas[count]) for count in sorted(betas)] == [(0.9, 0.95), (0.9, 0.997)]


def test_refinements_go_through_a_checkpoint(make_trainer):  # noqa: F811
    """A trainer that loads a state goes on, bit for bit, as the one that made it."""
    fractions = [0.0, 0.2, 0.3, 0.4, 0.5, 0.6]
    first, second = (make_trainer(refinements=ALL, train_log_every=100) for _ in range(2))
    state = {}
    for step, frac in enumerate(fractions):
        first.reports = [*first.reports[-1:], first.step(step, frac)]
        first.steps = step + 1
        if step == 2:
            state = copy.deepcopy(first.state())
    second.load_state(state)
    for step, frac in list(enumerate(fractions))[3:]:
        second.step(step, frac)
    for name, parameter in first.model.named_parameters():
        assert torch.equal(parameter, second.model.get_parameter(name)), name


def test_refinements_train(make_trainer):  # noqa: F811
    trainer = make_trainer(refinements=ALL)
    losses = [trainer.step(step, step / 40).train_loss for step in range(40)]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("text", ["nesterov", "bi_maxwell,bi_maxwell", "bi_maxwell,", " "])
def test_other_refinements_are_refused(tg, text):
    with pytest.raises(tg.ConfigError, match=r"REFINEMENTS=.*some of ema_nesterov,bi_maxwell,.*between"):
        tg.check_settings(tg.Config(refinements=text))
