"""QUANTIZER=trellis: the best path, less error at as many bits, the same levels however they are computed."""

import itertools
import math

import numpy as np
import pytest
import torch
from test_quant_fit import hessian, normal

from bench.fuzz_artifact import TINY

# The trellis as papers print it: in each state, subset -> next state; a level's subset is its remainder by 4.
STATES = [
    {0: 0, 2: 1}, {1: 2, 3: 3}, {2: 4, 0: 5}, {3: 6, 1: 7},
    {2: 0, 0: 1}, {3: 2, 1: 3}, {0: 4, 2: 5}, {1: 6, 3: 7},
]  # fmt: skip


def is_path(levels: torch.Tensor, segment: int = 256) -> bool:
    """Whether every column of levels is a path through the states, which begins anew in each segment."""
    for column in levels.T.tolist():
        state = 0
        for row, level in enumerate(column):
            state = state if row % segment else 0
            if level % 4 not in STATES[state]:
                return False
            state = STATES[state][level % 4]
    return True


def next_states(states: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """States after the levels `2 numbers + (states & 1)`."""
    pairs = zip(states, (2 * numbers + states % 2) % 4, strict=True)
    return np.array([STATES[state][subset] for state, subset in pairs])


def test_trellis_takes_the_best_path(tg):
    """Against all paths of six rows: each allowed subset's nearest level, or one beside it."""
    targets = 4 * normal(0, 6, 5)
    levels = tg.round_by_trellis(targets, torch.full((5,), 6))
    assert is_path(levels.int())
    for lane in range(5):
        best = math.inf
        for choices in itertools.product((0, 1), repeat=6):
            state, error = 0, 0.0
            for row, choice in enumerate(choices):
                subset = list(STATES[state])[choice]
                target = float(targets[row, lane])
                error += (target - (4 * round((target - subset) / 4) + subset)) ** 2
                state = STATES[state][subset]
            best = min(best, error)
        assert float((targets[:, lane] - levels[:, lane]).square().sum()) == pytest.approx(best, rel=1e-5)


def conditional_entropy(levels: torch.Tensor) -> float:
    """Bits of a level, given whether it had to be even or odd."""
    state, kinds = np.zeros(levels.size(1), int), [[], []]
    for row in levels.int().numpy():
        for parity in (0, 1):
            kinds[parity] += row[state % 2 == parity].tolist()
        state = next_states(state, row >> 1)
    bits = 0.0
    for values in kinds:
        counts = np.unique(values, return_counts=True)[1]
        bits -= (counts * np.log2(counts / counts.sum())).sum()
    return bits / levels.numel()


@pytest.mark.parametrize("deviation", [2.0, 5.0, 12.0])
def test_trellis_gains_a_decibel(tg, deviation):
    """Gaussian weights at 2, 3.4 and 4.6 bits: 1.0 dB below rounding at equal entropy (0.85 to 1.2 here)."""
    targets = deviation * normal(1, 256, 400)
    levels = tg.round_by_trellis(targets, torch.full((400,), 256))
    error, bits = float((targets - levels).square().mean()), conditional_entropy(levels)
    steps = np.linspace(1.2, 2.8, 33)
    rounded = [(targets / step).round() for step in steps]
    counts = [np.unique(r.numpy(), return_counts=True)[1] / r.numel() for r in rounded]
    entropies = [float(-(p * np.log2(p)).sum()) for p in counts]
    errors = [float((targets - step * r).square().mean()) for step, r in zip(steps, rounded, strict=True)]
    scalar = np.interp(-bits, [-b for b in entropies], errors)
    assert 0.85 < 10 * math.log10(scalar / error) < 1.2


def test_trellis_far_levels_and_short_lanes(tg):
    """Levels stay within what is stored, and what a lane has not does not change what it has."""
    targets = 200 * normal(2, 40, 3)
    levels = tg.round_by_trellis(targets, torch.tensor([40, 17, 1]))
    assert levels.abs().max() <= 255
    alone = tg.round_by_trellis(targets[:17, 1:2], torch.tensor([17]))
    assert torch.equal(levels[:17, 1:2], alone)


def problems(tg, count: int = 4) -> list:
    shapes = [(300, 24), (64, 24), (513, 40), (1, 7)][:count]
    weights = [normal(3 + i, *shape) for i, shape in enumerate(shapes)]
    factors = [tg.factorise(hessian(30 + i, shape[1])) for i, shape in enumerate(shapes)]
    return [(w, f, w.abs().amax(1) / 20) for w, f in zip(weights, factors, strict=True)]


def test_trellis_matrices_do_not_depend_on_their_company(tg):
    """So that any sharing out over ranks gives the same bytes."""
    tasks = problems(tg)
    together = tg.gptq_by_trellis(tasks)
    alone = [tg.gptq_by_trellis([task])[0] for task in tasks]
    for (levels, scale, error), (other, other_scale, other_error) in zip(together, alone, strict=True):
        assert torch.equal(levels, other) and torch.equal(scale, other_scale) and error == other_error
        assert is_path(levels)


def test_trellis_error_is_the_weighted_error_and_smaller(tg):
    weight, h = normal(1, 256, 90), hessian(2, 90)
    factor, scale = tg.factorise(h), 3.0 * weight.std(dim=1) / 7
    levels, stored, error = tg.gptq_by_trellis([(weight, factor, scale / 2)])[0]
    e = weight.double() - levels.double() * stored.double()[:, None]
    damped = h.double() + 0.01 * h.diagonal().mean() * torch.eye(90)
    assert error == pytest.approx(((e @ damped) * e).sum().item(), rel=1e-4)
    assert error < 0.87 * tg.gptq(weight, factor, 4, scale)[2]


@pytest.mark.parametrize("fit", [False, True])
def test_trellis_artifact_round_trip(tg, fit):
    """Records by trellis, with LQER or with column scales, come back as they were."""
    cfg = tg.Config(**TINY | {"float16_max_elements": 256}, compressor="ans", quantizer="trellis")
    model = tg.GPT(cfg)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(number, *parameter.shape))
    flat = tg.flatten_banks(model.state_dict(), cfg.num_layers)
    hessians = {n: hessian(i, t.shape[-1]) for i, (n, t) in enumerate(flat.items()) if t.ndim == 2}
    records = tg.quantize_state(flat, hessians, cfg)
    if fit:
        gradients = {name: torch.ones(len(flat[name])) for name in hessians}
        search = tg.FitSearch(flat, hessians, gradients, cfg, 16_000)
        assert [spare for _, spare in search.trials()][-1] in range(2001)
        records = search.best_records()
    kinds = {record.kind for record in records.values()}
    assert kinds == {"trellis", "int8_rows", "fp16"}
    settings, read = tg.read_artifact(tg.pack_artifact(records, cfg), tg.Config())
    assert (settings["compressor"], settings["quantizer"]) == ("ans", "trellis")
    for name, record in records.items():
        assert (read[name].category, read[name].correction) == (record.category, record.correction)
        assert torch.equal(read[name].dequantize(), record.dequantize())
        if record.kind == "trellis":
            assert is_path(record.arrays["q"])


def path_levels(numbers: np.ndarray) -> np.ndarray:
    """Levels int16 [rows, columns] that have these numbers among those that the states of a path allow."""
    levels, states = np.zeros(numbers.shape, np.int16), np.zeros(numbers.shape[1], int)
    for row, chosen in enumerate(numbers):
        states = states if row % 256 else np.zeros_like(states)
        levels[row] = 2 * chosen + (states & 1)
        states = next_states(states, chosen)
    return levels


def coded(tg, matrices: list[np.ndarray]) -> bytes:
    """Coded levels, which are decoded and compared."""
    data = tg.encode_levels(matrices, [127] * len(matrices))
    decoded = tg.decode_levels(data, [(levels.shape, "<i2", 127) for levels in matrices])
    assert all(np.array_equal(a, b) for a, b in zip(decoded, matrices, strict=True))
    return data


def test_trellis_codec_takes_any_path(tg):
    """Random paths of any shape, far levels among them; as many bytes as their entropy and little more."""
    rng = np.random.default_rng(0)
    matrices = []
    for rows, columns, spread in ((1, 1, 3), (700, 3, 40), (257, 20, 0.3), (256, 300, 4)):
        numbers = np.clip(np.rint(spread * rng.standard_normal((rows, columns))), -128, 127)
        matrices.append(path_levels(numbers.astype(int)))
    bits = sum(m.size * math.log2(s * 4.133) for m, s in zip(matrices[1::2], (40, 4), strict=True))
    assert len(coded(tg, matrices)) < 1.02 * bits / 8 + 2000


@pytest.mark.parametrize("number", [-1, 1])
def test_trellis_codec_of_quiet_columns(tg, number):
    """Zeros for so long that no other level is expected, then one, whose state allows odd ones only."""
    numbers = np.zeros((256, 40), int)
    numbers[200] = number
    levels = path_levels(numbers)
    assert (levels[201:] % 2).any()
    assert len(coded(tg, [levels])) < 2000


def test_trellis_needs_the_codec(tg, monkeypatch):
    with pytest.raises(tg.ConfigError, match="QUANTIZER='trellis' COMPRESSOR='brotli': a trellis needs"):
        tg.check_settings(tg.Config(quantizer="trellis"))
    tg.check_settings(tg.Config(quantizer="trellis", compressor="ans"))
    monkeypatch.setattr(tg, "has_part", lambda name: name != "trellis")
    with pytest.raises(tg.ConfigError, match="QUANTIZER=trellis: needs systems/trellis.py"):
        tg.check_systems(tg.Config(quantizer="trellis", compressor="ans"))
