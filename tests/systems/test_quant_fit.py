"""FIT_BYTES and the parts it is made of: shared factors, shortened halves, sensitivities, the search."""

import math

import pytest
import torch

SMALL = {
    "vocab_size": 256,
    "train_seq_len": 32,
    "train_batch_tokens": 512,
    "num_layers": 2,
    "model_dim": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_mult": 2.0,
    "rope_dims": 8,
    "num_loops": 0,
    "parallel_start_layer": 1,
    "float16_max_elements": 1024,
    "eval_seq_len": 32,
    "eval_stride": 16,
    "ttt_eval_seq_len": 48,
}


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian(seed: int, columns: int) -> torch.Tensor:
    x = normal(seed, 3 * columns, columns) * torch.linspace(0.2, 3.0, columns)
    x[:, 1:] += 0.6 * x[:, :-1]
    return x.T @ x


def test_factor_is_the_inverse_root(tg):
    h = hessian(0, 48)
    h[5], h[:, 5] = 0, 0
    order, dead, upper, damping = tg.factorise(h)
    damped = h.double()
    damped[5, 5] = 1
    assert damping == 0.01
    damped += 0.01 * damped.diagonal().mean() * torch.eye(48)
    damped = damped[order][:, order]
    assert dead.nonzero().tolist() == [[5]]
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper.double().T @ upper.double() @ damped, torch.eye(48).double(), atol=1e-3)


@pytest.mark.parametrize("block", [1, 7, 32, 100])
def test_quant_error_is_the_weighted_error(tg, block):
    """The sum of squared column errors over their pivots is tr(E H E^T): checked against the definition."""
    weight, h = normal(1, 20, 90), hessian(2, 90)
    scale = 3.0 * weight.std(dim=1) / 7
    levels, scale, error = tg.gptq(weight, tg.factorise(h), 4, scale, block)
    damped = h.double() + 0.01 * h.diagonal().mean() * torch.eye(90)
    e = weight.double() - levels.double() * scale.double()[:, None]
    assert error == pytest.approx(((e @ damped) * e).sum().item(), rel=1e-4)


def test_quant_report_names_every_matrix(tg):
    cfg = tg.Config(**SMALL)
    flat = {"blocks.0.mlp.fc.weight": normal(0, 128, 64), "attn_scale": torch.ones(64)}
    records = tg.quantize_state(flat, {"blocks.0.mlp.fc.weight": hessian(1, 64)}, cfg)
    report = records["blocks.0.mlp.fc.weight"].report
    assert (report["bits"], report["clip_sigmas"]) == (6, 12.0)
    assert report["weighted_error"] > 0 and report["seconds"] > 0
    assert not records["attn_scale"].report


@pytest.mark.parametrize("mantissa", [0, 1, 4, 9, 10])
def test_quant_short_half(tg, mantissa):
    """Nearest value of so few bits: relative error at most half a step, signs kept, zero stays zero."""
    x = torch.cat([normal(0, 500) * 10.0 ** normal(1, 500).clamp(-3, 3), torch.zeros(2), torch.ones(1)])
    short = tg.short_half(x, mantissa)
    assert short.dtype == torch.float16
    assert not (short.view(torch.int16) & ((1 << (10 - mantissa)) - 1)).any()
    normals = x.abs() > 2.0**-13
    error = (short.double() - x.double()).abs() / x.double().abs()
    assert error[normals].max() <= 2.0 ** -(mantissa + 1) + 2.0**-11
    assert torch.equal(torch.sign(short[normals]).float(), torch.sign(x[normals]))
    assert short[-1] == 1 and not short[500:502].any()


@pytest.fixture(scope="module")
def problem(tg):
    """(config, flat state, Hessians, gradients) of a small model whose matrices matter very unequally."""
    cfg = tg.Config(**SMALL, compressor="ans")
    torch.manual_seed(0)
    model = tg.GPT(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    flat = tg.flatten_banks({k: v.clone() for k, v in model.state_dict().items()}, cfg.num_layers)
    matrices = [name for name, w in flat.items() if tg.scheme_of(name, w, cfg).kind == "gptq"]
    assert len(matrices) > 10
    hessians = {name: hessian(i, flat[name].size(1)) for i, name in enumerate(matrices)}
    gradients = {name: 10.0 ** (i % 4) * normal(i, len(flat[name])) ** 2 for i, name in enumerate(matrices)}
    return cfg, flat, hessians, gradients


def fit(tg, problem, budget: int, cfg=None):
    config, flat, hessians, gradients = problem
    search = tg.FitSearch(flat, hessians, gradients, cfg or config, budget)
    assert 1 <= len(list(search.trials())) <= tg.FIT_TRIALS
    return search.best_records()


def loss(tg, problem, records) -> float:
    """sum_i g_i^2 e_i H e_i^T / tr H: what FIT_BYTES makes small."""
    _, flat, hessians, gradients = problem
    total = 0.0
    for name, h in hessians.items():
        e = flat[name].double() - records[name].dequantize().double()
        total += (gradients[name].double() * ((e @ h.double()) * e).sum(1)).sum().item() / h.trace().item()
    return total


@pytest.mark.parametrize("codec", ["ans", "brotli"])
@pytest.mark.parametrize("budget", [40_000, 48_000, 60_000])
def test_quant_fit_ends_just_below_the_cap(tg, problem, codec, budget):
    cfg = tg.Config(**SMALL, compressor=codec)
    records = fit(tg, problem, budget, cfg)
    artifact = tg.pack_artifact(records, cfg)
    assert budget - tg.FIT_SLACK <= len(artifact) <= budget
    _, read = tg.read_artifact(artifact, tg.Config())
    for name, record in records.items():
        assert torch.equal(read[name].dequantize(), record.dequantize()), name
    assert tg.pack_artifact(fit(tg, problem, budget, cfg), cfg) == artifact


def test_quant_fit_beats_the_published_recipe_at_equal_bytes(tg, problem):
    cfg, flat, hessians, _ = problem
    published = tg.quantize_state(flat, hessians, cfg)
    fitted = fit(tg, problem, len(tg.pack_artifact(published, cfg)))
    assert loss(tg, problem, fitted) < 0.5 * loss(tg, problem, published)


def test_quant_fit_more_bytes_less_loss(tg, problem):
    losses = [loss(tg, problem, fit(tg, problem, budget)) for budget in (36_000, 46_000, 56_000)]
    assert losses == sorted(losses, reverse=True)


def test_quant_fit_clips_follow_the_loss(tg, problem):
    """Sixteen times the gradients: a quarter of the step. No gradients at all: a huge but finite one."""
    _, flat, hessians, gradients = problem
    name = next(iter(hessians))
    factors = {key: tg.factorise(h) for key, h in hessians.items()}
    clips = tg.fit_clips(flat, hessians, factors, gradients)
    louder = tg.fit_clips(flat, hessians, factors, gradients | {name: 16 * gradients[name]})
    silent = tg.fit_clips(flat, hessians, factors, gradients | {name: 0 * gradients[name]})
    assert louder[name] == pytest.approx(clips[name] / 4, rel=1e-6)
    assert all(louder[other] == clips[other] for other in clips if other != name)
    assert clips[name] < silent[name] < 1e30


def test_quant_column_scales_even_out_the_cost(tg):
    """Each column's step is the root of its pivot, up to a common factor and four bits of mantissa."""
    factor = tg.factorise(hessian(3, 64))
    scales = tg.column_scales(factor)
    pivots = torch.empty(64)
    pivots[factor.order] = factor.upper.diagonal()
    ratio = scales / pivots.sqrt()
    assert ratio.max() / ratio.min() < (1 + 2.0**-5) ** 2 + 1e-3
    assert scales.max() / scales.min() > 1.5
    assert torch.equal(tg.column_scales(tg.factorise(torch.eye(8))), torch.ones(8))


def test_quant_column_scales_are_only_units(tg):
    """GPTQ of scaled columns is GPTQ of the problem in other units: same levels, same error."""
    weight, h, columns = normal(5, 12, 40), hessian(6, 40), 2.0 ** torch.randint(-2, 3, (40,))
    scale = 3.0 * (weight / columns).std(dim=1) / 31
    factor = tg.factorise(h)
    units = factor._replace(upper=factor.upper / columns[factor.order])
    levels, _, error = tg.gptq(weight / columns, units, 6, scale)
    e = weight.double() - levels.double() * scale.half().double()[:, None] * columns.double()
    damped = h.double() + 0.01 * h.diagonal().mean() * torch.eye(40)
    assert error == pytest.approx(((e @ damped) * e).sum().item(), rel=1e-4)


def test_quant_fit_never_clips(tg, problem):
    """The largest weight of each row keeps a level of its own."""
    _, flat, hessians, _ = problem
    records = fit(tg, problem, 60_000)
    for name in hessians:
        arrays = records[name].arrays
        weight = flat[name] / arrays["columns"].float()
        assert (weight.abs().amax(1) / arrays["scale"].float()).max() < 127 * (1 + 2.0**-5)


@pytest.mark.parametrize("octave", [1_000, 30_000, 250_000])
@pytest.mark.parametrize("kink", [-3.0, 0.0, 2.5])
@pytest.mark.parametrize("start", [-8.0, 1.0, 9.0])
def test_quant_fit_search_ends_within_the_slack(tg, octave, kink, start):
    """A curve with a kink, as steep as was assumed or far from it: few trials, each between the bounds."""
    asked = []

    def measure(log2_step: float) -> int:
        asked.append(log2_step)
        return int(30_000 * (log2_step - kink) * (3 if log2_step > kink else 1)) + 500

    trials = list(tg.search_step(measure, start, octave))
    assert [step for step, _ in trials] == asked and len(asked) <= tg.FIT_TRIALS
    assert 0 <= trials[-1][1] <= tg.FIT_SLACK
    for i, (step, _) in enumerate(trials[1:], 1):
        assert all(step > old for old, spare in trials[:i] if spare < 0)
        assert all(step < old for old, spare in trials[:i] if spare > 0)


def test_quant_fit_search_gives_up(tg):
    """Ever less is lacking, but some always is: as many trials as there may be, ever coarser."""
    trials = list(tg.search_step(lambda log2_step: -5000 - int(1e4 / (9 + log2_step)), 0.0, 1000.0))
    steps = [step for step, _ in trials]
    assert len(steps) == tg.FIT_TRIALS and steps == sorted(steps) and math.isfinite(steps[-1])


@pytest.mark.parametrize("octave", [1_000, 1_000_000])
@pytest.mark.parametrize("spare", [-5_000, 5_000, 10**7])
def test_quant_fit_search_ends_where_the_size_no_longer_changes(tg, spare, octave):
    """It looks once more, far away in the direction that would help, and that is all."""
    steps = [step for step, _ in tg.search_step(lambda log2_step: spare, 0.0, octave)]
    assert len(steps) <= 3 and steps == sorted(steps, reverse=spare > 0)
    assert abs(steps[-1] - steps[-2]) >= tg.FIT_REACH


@pytest.mark.parametrize("slope", [0, 1, 1000])
@pytest.mark.parametrize("start", [-500.0, 0.0, 500.0])
@pytest.mark.parametrize("spare", [-(10**9), 10**9])
def test_quant_fit_search_keeps_to_steps_that_are_numbers(tg, spare, start, slope):
    """However far a slope leads, a float32 holds the step and its inverse, times any clip width."""
    steps = [step for step, _ in tg.search_step(lambda step: spare + int(slope * step), start, 1.0)]
    assert max(map(abs, steps)) <= tg.FIT_RANGE < 100 and len(steps) <= tg.FIT_TRIALS


@pytest.mark.parametrize("start", [-30.0, -11.0, 0.0, 11.0, 30.0])
def test_quant_fit_search_leaves_a_flat_stretch(tg, start):
    """As fine or as coarse as it gets for many octaves, and between them what is looked for."""

    def measure(log2_step: float) -> int:
        return int(30_000 * min(max(log2_step, -6.0), 6.0)) + 500

    trials = list(tg.search_step(measure, start, 1_000))
    assert 0 <= trials[-1][1] <= tg.FIT_SLACK


def test_quant_fit_says_that_it_cannot(tg, problem):
    with pytest.raises(tg.ConfigError, match=r"FIT_BYTES=0: leaves 900 bytes for the model, too few"):
        fit(tg, problem, 900)


def test_quant_fit_bytes_below_the_code_are_refused_at_once(tg):
    with pytest.raises(tg.ConfigError, match="FIT_BYTES=20000: must be 0 or at least 32768"):
        tg.check_settings(tg.Config(fit_bytes=20_000))


def test_quant_fit_of_next_to_nothing_is_finite(tg, problem):
    records = fit(tg, problem, 4000)
    assert all(record.dequantize().isfinite().all() for record in records.values())


def test_quant_fit_of_more_bytes_than_levels_need(tg, problem):
    """Nothing is left to refine: all that eight bits can hold, below the cap, found at once."""
    cfg, flat, hessians, gradients = problem
    search = tg.FitSearch(flat, hessians, gradients, cfg, 10**6)
    assert len(list(search.trials())) <= 3
    assert len(tg.pack_artifact(search.best_records(), cfg)) < 200_000


class Fixed:
    """A loader that has one batch only."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor):
        self.batch = x, y

    def next(self, rows):
        return self.batch

    def skip(self, rows):
        pass


def test_quant_gradients_are_the_curvature(tg):
    """sum over tokens and targets of p |gradient|^2, by plain autograd; the data's targets play no part."""
    cfg = tg.Config(**SMALL | {"vocab_size": 16})
    torch.manual_seed(1)
    model = tg.GPT(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randint(2, 16, (4, 6))
    found = tg.calibrate_gradients(model, cfg, Fixed(x, torch.full_like(x, 3)), looping=False)
    exact = {name: 0.0 for name in found}
    log_p = model.logits(model.hidden(x, looping=False)).log_softmax(-1)
    for value in log_p.flatten():
        model.zero_grad()
        value.backward(retain_graph=True)
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for name, gradient in tg.flatten_banks(gradients, cfg.num_layers).items():
            if name in exact:
                exact[name] += value.exp().item() * gradient.square().sum(1)
    for name, rows in exact.items():
        assert found[name].sum() == pytest.approx(rows.sum().item(), rel=0.4), name
        if len(rows) > 2 and rows.sum() > 1e-9:
            assert torch.corrcoef(torch.stack([found[name], rows]))[0, 1] > 0.7, name
    total = sum(rows.sum().item() for rows in exact.values())
    assert sum(rows.sum().item() for rows in found.values()) == pytest.approx(total, rel=0.15)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.zero_grad()
    again = tg.calibrate_gradients(model, cfg, Fixed(x, x), looping=False)
    assert all(torch.equal(again[name], rows) for name, rows in found.items())


def test_quant_fit_keeps_control_tensors(tg, problem):
    """Four bits of mantissa on them cost more than all matrices together: eight are kept."""
    _, flat, hessians, _ = problem
    records = fit(tg, problem, 48_000)
    for name, tensor in flat.items():
        if name not in hessians:
            error = (records[name].dequantize() - tensor).abs()
            assert (error <= tensor.abs() * (2.0**-9 + 2.0**-11) + 2.0**-22).all(), name


def sentences(count: int, seed: int) -> torch.Tensor:
    """Rows of 33 tokens: three of four follow the one before by a fixed rule, the others are drawn."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(2, 256, (count, 33), generator=generator).clamp_max(127 + 2)
    known = torch.rand(count, 33, generator=generator) < 0.75
    rule = torch.randperm(254, generator=torch.Generator().manual_seed(0)) + 2
    for t in range(1, 33):
        draws[:, t] = torch.where(known[:, t], rule[draws[:, t - 1] - 2], draws[:, t])
    return draws


@pytest.mark.parametrize("seed", [42, 314, 1234])
def test_quant_fit_loses_less_than_the_published_recipe(tg, seed):
    """A trained model, held-out text, equal bytes (each with its own codec): the whole chain, real losses."""
    cfg = tg.Config(**SMALL, compressor="ans")
    torch.manual_seed(seed)
    model = tg.GPT(cfg)
    optimizer = torch.optim.Adam(model.parameters(), 0.004)
    for step in range(120):
        batch = sentences(32, 1000 * seed + step)
        model.losses(batch[:, :-1], batch[:, 1:], looping=False).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    flat = {
        name: w.detach().clone() for name, w in tg.flatten_banks(model.state_dict(), cfg.num_layers).items()
    }
    text, held_out = sentences(32, seed + 1), sentences(512, seed + 2)
    loader = Fixed(text[:, :-1], text[:, 1:])
    hessians = tg.calibrate(model, cfg, loader, looping=False)
    gradients = tg.calibrate_gradients(model, cfg, loader, looping=False)

    @torch.no_grad()
    def loss(state) -> float:
        model.load_state_dict(state)
        return model.losses(held_out[:, :-1], held_out[:, 1:], looping=False).mean().item()

    whole = loss(tg.restore_banks(flat, cfg.num_layers))
    assert whole < 4.0, "has learnt the rule"
    published = tg.quantize_state(flat, hessians, cfg)
    budget = len(tg.pack_artifact(published, tg.Config(**SMALL)))
    fitted = fit(tg, (cfg, flat, hessians, gradients), budget)
    assert len(tg.pack_artifact(fitted, cfg)) <= budget
    costs = [loss(tg.dequantize_state(r, cfg.num_layers)) - whole for r in (published, fitted)]
    assert costs[1] < 0.5 * costs[0]


def odd_matrices() -> dict[str, torch.Tensor]:
    """Weights that have no deviation, no value but zero, or none that a float16 scale fits."""
    one = normal(8, 6, 40)
    constant, zero_row = one.clone(), one.clone()
    constant[2], zero_row[3] = 0.3, 0
    return {
        "one_column": normal(7, 6, 1),
        "one_row": normal(7, 1, 40),
        "one_weight": normal(7, 1, 1),
        "two_columns_alike": torch.full((6, 2), -0.7),
        "constant_row": constant,
        "zero_row": zero_row,
        "zeros": torch.zeros(6, 40),
        "largest": 30_000 * one.clamp(-2, 2),
        "smallest": 1e-7 * one,
        "subnormal": 1e-40 * one,
    }


@pytest.mark.parametrize("quantizer", ["scalar", "trellis"])
@pytest.mark.parametrize("log2_step", [-90.0, 0.0, 90.0])
@pytest.mark.parametrize("name", odd_matrices())
def test_quant_fit_of_odd_matrices(tg, name, log2_step, quantizer):
    """Finite at any step; at the finest off by half a step of eight bits and a scale of so few bits."""
    weight = odd_matrices()[name]
    factor = tg.factorise(torch.eye(weight.size(1)))
    clips = tg.fit_clips(
        {name: weight}, {name: torch.eye(weight.size(1))}, {name: factor}, {name: weight[:, 0] ** 2}
    )
    assert 0 < clips[name] < math.inf
    problems = {name: tg.FitProblem(weight, torch.eye(weight.size(1)), factor, tg.column_scales(factor))}
    record = tg.fit_matrices(problems, {name: 2.0**log2_step}, quantizer)[name]
    assert all(array.isfinite().all() for array in record.arrays.values() if array.is_floating_point())
    error = (record.dequantize() - weight).abs().amax(1)
    if log2_step < 0:
        smallest = 2.0**-14 if quantizer == "trellis" else 2.0**-15  # a trellis may want an odd level
        assert (error <= (weight.abs().amax(1) * (2.0**-5 + 1 / 254)).clamp_min(smallest)).all()


@pytest.mark.parametrize("damping", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("quantizer", ["scalar", "trellis"])
def test_fit_columns_are_refitted(tg, quantizer, damping):
    """The error is what the records have, and never above that with the scales that the sweep went by.

    Also where a Hessian is not positive, so that it was damped more, and with a column without inputs.
    """
    weight, h = normal(5, 120, 40), hessian(6, 40)
    weight[:, 7] = h[7] = h[:, 7] = 0
    damped = 1e-4 * h.double()  # so small that the 1 of the column without inputs matters
    damped[7, 7] = 1
    if damping > 0.01:
        least = torch.linalg.eigvalsh(damped)[0] + 0.3 * damping * damped.diagonal().mean()
        damped -= least * torch.eye(40)
        damped[7, 7] = 1
    h = damped.float()
    h[7, 7] = 0
    factor = tg.factorise(h)
    problem = tg.FitProblem(weight, h, factor, tg.column_scales(factor))
    damped += damping * damped.diagonal().mean() * torch.eye(40)
    assert factor.damping == pytest.approx(damping)
    gains = []
    for clip_sigmas in (60.0, 250.0, 800.0):
        record = tg.fit_matrices({"m": problem}, {"m": clip_sigmas}, quantizer)["m"]
        old = {**record.arrays, "columns": problem.columns.half()}
        errors = []
        for arrays in (record.arrays, old):
            record.arrays = arrays
            e = weight.double() - record.dequantize().double()
            errors.append(((e @ damped) * e).sum().item())
        assert record.report["weighted_error"] == pytest.approx(errors[0], rel=1e-3)
        gains.append(errors[0] / errors[1])
    assert max(gains) <= 1 and min(gains) < 0.95  # coarse levels leave something to gain


def test_fit_columns_of_least_error(tg, monkeypatch):
    """Without rounding, no other column scales would do better: the slope there is zero."""
    monkeypatch.setattr(tg, "short_half", lambda x, mantissa: x)
    weight, h = normal(7, 50, 12), hessian(8, 12)
    problem = tg.FitProblem(weight, h, tg.factorise(h), torch.ones(12))
    restored = (weight / 0.7).round() * 0.7
    columns, change = problem.refit_columns(restored)
    damped = h + tg.DAMPING * h.diagonal().mean() * torch.eye(12)

    def error(scales: torch.Tensor) -> float:
        e = (weight - restored * scales).double()
        return float(((e @ damped.double()) * e).sum())

    assert error(columns) - error(torch.ones(12)) == pytest.approx(change, rel=1e-3)
    for column in range(12):
        for factor in (0.99, 1.01):
            other = columns.clone()
            other[column] *= factor
            assert error(other) > error(columns)
