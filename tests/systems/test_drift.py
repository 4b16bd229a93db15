"""GPTQ_DRIFT_BATCHES: layers are stored in their order, each against what is stored before it."""

import copy
import dataclasses

import pytest
import torch
from test_quant_fit import SMALL, normal

LOOPED = SMALL | {"num_loops": 1, "loop_start": 0, "loop_end": 0, "parallel_start_layer": 0}


class Windows:
    """A loader of random windows."""

    def __init__(self, cfg):
        self.cfg, self._generator, self.rows = cfg, torch.Generator().manual_seed(3), []

    def next(self, rows):
        self.rows.append(rows)
        ids = torch.randint(
            2, self.cfg.vocab_size, (rows, self.cfg.train_seq_len + 1), generator=self._generator
        )
        return ids[:, :-1], ids[:, 1:]

    def draw(self, rows):
        self.next(rows)


@pytest.fixture(scope="module")
def model(tg):
    """A model of two layers, the first visited twice, whose branches all matter."""
    cfg = tg.Config(**LOOPED, compressor="ans", fit_bytes=40_000, gptq_drift_batches=4)
    tg.check_settings(cfg)
    torch.manual_seed(0)
    model = tg.GPT(cfg, tg.Backends(micro_batches=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.08 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def search(tg, model):
    """The search for the step, gone through."""
    cfg = dataclasses.replace(model.cfg, gptq_calibration_batches=4)
    hessians = tg.calibrate(model, cfg, Windows(cfg), looping=True)
    flat = tg.flatten_banks(model.state_dict(), cfg.num_layers)
    gradients = {name: torch.ones(len(w)) for name, w in flat.items() if w.ndim == 2}
    search = tg.FitSearch(flat, hessians, gradients, cfg, cfg.fit_bytes)
    assert list(search.trials())[-1][1] in range(tg.FIT_SLACK + 1)
    return search


def shifted(model):
    """The model with other weights in its first layer's attention: what comes later has drifted."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.qo_bank[0] += 0.05 * normal(1, *other.qo_bank[0].shape)
    return other


def test_drift_inputs_are_those_of_every_visit(tg, model):
    ids, told = Windows(model.cfg).next(4)[0], []
    model.hidden(ids, looping=True, on_input=lambda name, x: told.append((name, x.flatten(0, 1))))
    for name, visits in (("blocks.0.attn.proj.weight", 2), ("blocks.1.mlp.proj.weight", 1)):
        wanted = [x for matrix, x in told if matrix == name]
        found = tg.inputs_of(model, ids, name, visits, looping=True)
        assert len(wanted) == len(found) == visits and all(map(torch.equal, wanted, found))


def test_drift_of_nothing_corrects_nothing(tg, model):
    layers = tg.LayersInOrder(model, Windows(model.cfg), looping=True)
    name = "blocks.1.mlp.fc.weight"
    transform, hessian, factor = layers._drift(model, name, 1)
    assert torch.allclose(transform, torch.eye(64), atol=2e-4)
    cfg = dataclasses.replace(model.cfg, gptq_calibration_batches=4)
    counted = tg.calibrate(model, cfg, Windows(cfg), looping=True)[name]
    assert torch.allclose(hessian / hessian.trace(), counted / counted.trace(), rtol=1e-4, atol=1e-9)
    assert torch.equal(factor.upper, tg.factorise(hessian).upper)


@pytest.mark.parametrize("name, visits", [("blocks.0.mlp.fc.weight", 2), ("blocks.1.attn.c_q.weight", 1)])
def test_drift_is_made_good_by_least_squares(tg, model, name, visits):
    """On the texts themselves the outputs come nearer to the whole model's, near to the least possible."""
    other = shifted(model)
    layers = tg.LayersInOrder(model, Windows(model.cfg), looping=True)
    transform, _, _ = layers._drift(other, name, visits)
    loader = Windows(model.cfg)
    texts = [loader.next(8)[0] for _ in range(8)]
    whole, drifted = (
        torch.cat([x for ids in texts for x in tg.inputs_of(m, ids, name, visits, looping=True)]).double()
        for m in (model, other)
    )
    weight = normal(2, 10, whole.size(1)).double()
    wanted = whole @ weight.T
    least = wanted - drifted @ torch.linalg.lstsq(drifted, wanted).solution
    errors = [
        error.square().sum().item()
        for error in (wanted - drifted @ weight.T, wanted - drifted @ (weight @ transform.double()).T, least)
    ]
    assert errors[2] <= errors[1] < 1.05 * errors[2] and errors[1] < 0.9 * errors[0], errors


@pytest.mark.parametrize("quantizer", ["scalar", "trellis"])
def test_drift_correction_brings_the_model_nearer(tg, model, search, quantizer, monkeypatch):
    """At the same steps: the final hidden states, of other texts; every tensor is stored, of every form."""
    cfg = dataclasses.replace(model.cfg, quantizer=quantizer, gptq_drift_batches=16)
    step = search.best[1] - 3 - (quantizer == "trellis")  # so fine that errors add up
    clips = {name: 2.0**step * clip for name, clip in search.clips.items()}
    others = {name: search._store(name) for name in search.flat if name not in search.problems}
    plain = others | tg.fit_matrices(search.problems, clips, quantizer)
    monkeypatch.setattr(model, "cfg", cfg)
    layers = tg.LayersInOrder(model, Windows(cfg), looping=True)
    in_order = layers.store(others, search.problems, clips)
    assert in_order.keys() == plain.keys() == search.flat.keys()
    ids = torch.randint(2, 256, (32, 32), generator=torch.Generator().manual_seed(9))
    wanted, errors = model.hidden(ids, looping=True), []
    for records in (plain, in_order):
        stored = tg.GPT(cfg)
        stored.load_state_dict(tg.dequantize_state(records, cfg.num_layers))
        errors.append((stored.hidden(ids, looping=True) - wanted).square().mean().item())
    assert errors[1] < 0.95 * errors[0], errors


def test_drift_search_goes_on_from_the_step_found(tg, model, search):
    """Trials in order end below the cap; where none does, what fitted before is kept."""
    plain, search = search.best, copy.copy(search)
    search.cfg = model.cfg
    asked = []

    def store(others, problems, clips):
        name = next(iter(clips))
        asked.append(clips[name] / search.clips[name])
        return others | tg.fit_matrices(problems, clips, "scalar")

    trials = list(search.trials_in_order(store))
    assert [step for step, _ in trials] == [plain[1]] and asked == [pytest.approx(2.0 ** plain[1])]
    assert search.best[:2] == plain[:2]
    search.budget = 2_000  # nothing fits any more
    list(search.trials_in_order(store))
    assert search.best[0] >= 0 and search.best[1] == plain[1]


def test_drift_batches_are_all_drawn_by_every_rank(tg, model):
    loaders = []
    for world_size, rank in ((1, 0), (2, 0), (2, 1)):
        ranks = tg.Ranks(torch.device("cpu"), rank, world_size)
        loaders.append(Windows(model.cfg))
        tg.LayersInOrder(model, loaders[-1], looping=True, ranks=ranks)
    assert [sum(loader.rows) for loader in loaders] == [4 * 16] * 3


def test_drift_of_texts_that_two_ranks_share_is_that_of_all(tg, model):
    """The sums are of both ranks' texts, and so is their number: the same bits as one rank has."""
    other, name = shifted(model), "blocks.1.attn.c_q.weight"

    def drift(ranks, sum_):
        layers = tg.LayersInOrder(model, Windows(model.cfg), looping=True, ranks=ranks)
        ranks.sum_, ranks.wait_for_all = sum_, lambda stage: None
        transform, hessian, factor = layers._drift(other, name, 1)
        return transform, hessian, factor.upper

    first, second = (tg.Ranks(torch.device("cpu"), rank, 2) for rank in (0, 1))
    sums: list[torch.Tensor] = []
    drift(first, lambda total: sums.append(total) or total)
    together = drift(second, lambda total: total + sums.pop(0))
    alone = drift(tg.Ranks(torch.device("cpu")), lambda total: total)
    assert all(map(torch.equal, together, alone))


def test_drift_correction_needs_fit_bytes(tg, monkeypatch):
    with pytest.raises(tg.ConfigError, match="GPTQ_DRIFT_BATCHES=4: needs FIT_BYTES"):
        tg.check_settings(tg.Config(gptq_drift_batches=4))
    monkeypatch.setattr(tg, "has_part", lambda name: name != "drift")
    with pytest.raises(tg.ConfigError, match=r"GPTQ_DRIFT_BATCHES=4: needs systems/drift\.py"):
        tg.check_systems(tg.Config(gptq_drift_batches=4, fit_bytes=40_000, compressor="ans"))
