"""MUON_MAXWELL: the mix against a plain sum over all gradients, and through a checkpoint."""

import copy

import pytest
import torch
from test_training import make_trainer, shard  # noqa: F401 - fixtures


def test_maxwell_is_a_mix_as_old_as_one_momentum(tg):
    muon = tg.MaxwellMuon([torch.nn.Parameter(torch.zeros(2, 3, 4))], lr=1.0, momentum=0.9, weight_decay=0.0)
    drawn = torch.Generator().manual_seed(1)
    gradients = [torch.randn(2, 3, 4, generator=drawn) for _ in range(12)]
    mix = [(0.2, 0.8), (0.3, 0.3), (0.3, 0.1), (0.2, 0.033)]
    assert sum(share for share, _ in mix) == pytest.approx(1)
    assert sum(share / rate for share, rate in mix) == pytest.approx(1.03 / 0.1, rel=0.005)
    state = {}
    for count in range(1, 13):
        update = muon._with_momentum(state, gradients[count - 1].clone(), {"momentum": 0.9})
        past = list(enumerate(reversed(gradients[:count])))
        mixed = sum(share * rate * (1 - rate) ** age * g for age, g in past for share, rate in mix)
        torch.testing.assert_close(update, 0.1 * gradients[count - 1] + 0.9 * mixed)


def test_maxwell_of_a_short_memory_is_the_gradient_where_it_forgets_at_once(tg):
    """A momentum that forgets eight times as fast as 0.7 does would forget more than all."""
    muon = tg.MaxwellMuon([torch.nn.Parameter(torch.zeros(1, 2, 2))], lr=1.0, momentum=0.7, weight_decay=0.0)
    state = {}
    for gradient in (torch.ones(1, 2, 2), torch.full((1, 2, 2), 5.0)):
        muon._with_momentum(state, gradient, {"momentum": 0.7})
    torch.testing.assert_close(state["momentum_buffer"][:, 0], torch.full((1, 2, 2), 5.0))


def test_maxwell_goes_through_a_checkpoint(make_trainer):  # noqa: F811
    """A trainer that loads a state goes on, bit for bit, as the one that made it."""
    first, second = (make_trainer(muon_maxwell=True, train_log_every=100) for _ in range(2))
    state = {}
    for step in range(6):
        first.reports = [*first.reports[-1:], first.step(step, step / 10)]
        first.steps = step + 1
        if step == 2:
            state = copy.deepcopy(first.state())
    second.load_state(state)
    for step in (3, 4, 5):
        second.step(step, step / 10)
    for name, parameter in first.model.named_parameters():
        assert torch.equal(parameter, second.model.get_parameter(name)), name


def test_maxwell_trains(make_trainer):  # noqa: F811
    trainer = make_trainer(muon_maxwell=True)
    losses = [trainer.step(step, step / 40).train_loss for step in range(40)]
    assert losses[-1] < 0.6 * losses[0]
