"""MUDD_WIDTH: shares against a sum token by token, nothing at the start, whichever way the model is used."""

import pytest
import torch
from test_model import random_adapters, random_tokens, tiny_model
from test_training import make_trainer, shard  # noqa: F401 - fixtures

WIDE = {"mudd_width": 3}


def random_mudd(tg, **settings):
    """Connections with random weights, in double precision."""
    sizes = {"num_layers": 4, "parallel_start_layer": 1, "model_dim": 6, "mudd_width": 5}
    mudd = tg.Mudd(tg.Config(**sizes | settings)).double()
    generator = torch.Generator().manual_seed(3)
    for parameter in mudd.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return mudd


def shares_of(mudd, number: int, x: torch.Tensor) -> list[float]:
    """Shares of one token's stream, by the formula."""
    hidden = mudd.inner @ (x / (x.square().mean() + torch.finfo(x.dtype).eps).sqrt())
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5)) / 5**0.5
    return (0.1 * (mudd.outer[number] @ hidden + mudd.bias[number])).tolist()


def test_streams_and_head_read_what_entered_the_layers(tg):
    mudd, drawn = random_mudd(tg), torch.Generator().manual_seed(4)
    given, entering = {}, [torch.randn(2, 3, 6, generator=drawn, dtype=torch.float64) for _ in range(3)]
    lanes = None
    for layer, x in enumerate(entering):  # the lanes split where layer 2 of 4 begins, which reads already
        x, lanes = mudd(layer, layer > 0, given, x, lanes)
        assert x is entering[layer] is given[layer]
        assert (lanes is None) == (layer < 2)
    for number, lane in enumerate(lanes):
        for place in ((0, 0), (1, 2)):
            shares = shares_of(mudd, number, entering[2][place])
            expected = entering[2][place] + sum(
                share * x[place] for share, x in zip(shares, entering, strict=False)
            )
            torch.testing.assert_close(lane[place], expected)
    _, again = mudd(3, True, given, entering[2], lanes)
    torch.testing.assert_close(given[3], (lanes[0] + lanes[1]) / 2)
    place, sources = (1, 1), [*given.values()]
    for number, (before, lane) in enumerate(zip(lanes, again, strict=True), 2):
        shares = shares_of(mudd, number, before[place])
        expected = before[place] + sum(share * x[place] for share, x in zip(shares, sources, strict=True))
        torch.testing.assert_close(lane[place], expected)
    wanted = torch.tensor([[2, 0], [1, 1]])
    last = torch.randn(2, 2, 6, generator=drawn, dtype=torch.float64)  # of the last layer, at some positions
    head = mudd.head(given, last, wanted)
    shares = shares_of(mudd, 4, last[0, 1])
    expected = last[0, 1] + sum(share * x[0, 0] for share, x in zip(shares, sources, strict=True))
    torch.testing.assert_close(head[0, 1], expected)


def test_a_layer_that_comes_again_is_read_as_it_was_last(tg):
    mudd, given = random_mudd(tg), {}
    first, second = (torch.full((1, 1, 6), value, dtype=torch.float64) for value in (1.0, 2.0))
    mudd(0, False, given, first, None)
    mudd(1, False, given, first, None)
    mudd(1, False, given, second, None)
    assert [*given] == [0, 1]
    assert given[1] is second


@pytest.mark.parametrize("looping", [False, True])
def test_it_begins_as_the_model_without(tg, looping):
    """The same weights drawn, the same digits: pairs of a study differ by nothing else."""
    ids, losses = random_tokens(2, 24), []
    for width in (0, 3):
        torch.manual_seed(5)
        plain = tiny_model(tg).cfg
        model = tg.GPT(tg.dataclasses.replace(plain, mudd_width=width))
        losses.append(model.losses(ids, ids, looping=looping))
    assert torch.equal(*losses)


@pytest.mark.parametrize("backends", ["", "eager"], ids=["plain", "eager"])
@pytest.mark.parametrize("adapted", [False, True])
def test_scored_positions_equal_the_full_losses(tg, backends, adapted):
    model, ids, targets = tiny_model(tg, **WIDE), random_tokens(3, 24), random_tokens(3, 24, seed=1)
    eager = tg.GPT(model.cfg, tg.Backends(kernels=backends))
    eager.load_state_dict(model.state_dict())
    lora = random_adapters(tg, model.cfg, 3, looping=True) if adapted else None
    scored = torch.tensor([[3, 22, 7], [0, 1, 2], [23, 23, 5]])
    with torch.no_grad():
        full = model.losses(ids, targets, looping=True, lora=lora)
        some = eager.losses(ids, targets, looping=True, lora=lora, scored=scored)
    torch.testing.assert_close(some, full.gather(1, scored), rtol=0, atol=2e-5)


@pytest.mark.parametrize("looping", [False, True])
def test_later_tokens_change_nothing_before_them(tg, looping):
    model, ids = tiny_model(tg, **WIDE), random_tokens(1, 20)
    changed = ids.clone()
    changed[0, 12:] = random_tokens(8, seed=7)
    with torch.no_grad():
        one, other = (model.hidden(x, looping=looping) for x in (ids, changed))
    assert torch.equal(one[:, :12], other[:, :12])
    assert (one[:, 12:] != other[:, 12:]).any()


def test_one_graph_compiles(tg):
    model, ids = tiny_model(tg, **WIDE), random_tokens(2, 24)
    compiled = torch.compile(model.losses, backend="aot_eager", fullgraph=True, dynamic=False)
    grads = []
    for function in (model.losses, compiled):
        model.zero_grad()
        function(ids, ids, looping=True).mean().backward()
        grads.append([p.grad.clone() for p in model.mudd.parameters()])
    for plain, ours in zip(*grads, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-7)


def test_it_trains_by_the_scalars_optimiser(tg, make_trainer):  # noqa: F811
    trainer = make_trainer(**WIDE, parallel_start_layer=1, num_layers=3, num_loops=0)
    losses = [trainer.step(step, step / 40).train_loss for step in range(40)]
    assert losses[-1] < 0.6 * losses[0]
    table = tg.parameter_table(trainer.cfg, trainer.model)
    for name, parameter in trainer.model.mudd.named_parameters():
        assert table[f"mudd.{name}"]["optimizer"] == "adamw_scalar"
        assert parameter.abs().max() > 0


def test_it_is_stored_in_float16_whatever_its_size(tg):
    cfg = tg.Config(mudd_width=256)
    for name, parameter in tg.Mudd(cfg).named_parameters():
        assert tg.scheme_of(f"mudd.{name}", parameter, cfg).kind == "fp16"


@pytest.mark.parametrize(
    ("settings", "readers"),
    [
        ({}, 5),
        ({"parallel_start_layer": 5}, 3),
        ({"parallel_start_layer": 6}, 1),
        ({"parallel_start_layer": 9}, 1),
        ({"parallel_start_layer": 0}, 1),
        ({"parallel_style": "single"}, 1),
    ],
)
def test_layers_without_two_lanes_are_read_but_do_not_read(tg, settings, readers):
    """There are weights for two lanes of each layer that has them, and for the head; all of them learn."""
    model, ids = tiny_model(tg, **WIDE, **settings), random_tokens(2, 24)
    model.losses(ids, ids, looping=True).mean().backward()
    assert (model.mudd.bias.grad.abs().amax(1) > 0).tolist() == [True] * readers
