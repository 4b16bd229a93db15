"""Optimisers without golden data: coverage, singular values, determinism, schedule points by hand."""

import pytest
import torch

TINY = {
    "vocab_size": 96,
    "num_layers": 4,
    "model_dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_mult": 2.0,
    "rope_dims": 4,
    "train_seq_len": 64,
    "num_loops": 1,
    "loop_start": 1,
    "loop_end": 2,
    "parallel_start_layer": 3,
    "xsa_last_n": 4,
}
VARIANTS = {
    "default": {},
    "untied": {"tie_embeddings": False},
    "attn_out_gate": {"sparse_attn_gate_enabled": False, "attn_out_gate_enabled": True},
    "gated_attn": {"sparse_attn_gate_enabled": False, "gated_attn_enabled": True},
    "no_smear_no_skip_gates": {"smear_gate_enabled": False, "skip_gates_enabled": False},
    "no_loops": {"num_loops": 0},
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_every_parameter_is_in_exactly_one_group(tg, variant):
    config = tg.Config(**{**TINY, **VARIANTS[variant]})
    model = tg.GPT(config)
    table = tg.parameter_table(config, model)
    assert set(table) == {name for name, _ in model.named_parameters()}
    assert {group["optimizer"] for group in table.values()} <= {
        "muon",
        "adamw_tok",
        "adamw_head",
        "adamw_scalar",
    }
    banks = {name for name, group in table.items() if group["optimizer"] == "muon"}
    assert banks == {"qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank"}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_optimizers_hold_every_parameter_once(tg, variant):
    """What the trainer steps, not only what the table says."""
    config = tg.Config(**{**TINY, **VARIANTS[variant]})
    model = tg.GPT(config)
    trainer = tg.Trainer(config, model, loader=None)
    optimizers = (trainer.muon, trainer.adamw)
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in model.parameters()}


def test_optimizers_do_what_the_table_says(tg, monkeypatch):
    """Every number of a row reaches its optimiser: none is told a second time elsewhere."""
    config, original = tg.Config(**TINY), tg.parameter_table

    def changed(*arguments) -> dict:
        table = {name: dict(row) for name, row in original(*arguments).items()}
        for row in table.values():
            row |= {"lr": 2 * row["lr"], "weight_decay": 0.5}
            if row["optimizer"] == "muon":
                row |= {"momentum": 0.25, "row_normalize": False, "steps": 3}
            else:
                row |= {"betas": [0.5, 0.25], "eps": 0.125}
        return table

    monkeypatch.setattr(tg, "parameter_table", changed)
    trainer = tg.Trainer(config, model := tg.GPT(config), loader=None)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    table, seen = changed(config, model), 0
    for optimizer in (trainer.muon, trainer.adamw):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                row, seen = table[names[id(parameter)]], seen + 1
                told = row.keys() - {"optimizer", "steps"}
                assert {key: group[key] for key in told} == {key: row[key] for key in told}
    assert seen == len(table) and len(trainer.muon._coefficients) == 3


def scalar_polynomial(tg, values: torch.Tensor) -> torch.Tensor:
    """What the steps do to singular values in exact arithmetic: s -> a s + b s^3 + c s^5, five times."""
    for a, b, c in tg.POLAR_EXPRESS:
        values = a * values + b * values**3 + c * values**5
    return values


@pytest.mark.parametrize("shape", [(64, 64), (48, 160), (160, 48), (3, 64, 96), (2, 128, 32)])
@pytest.mark.parametrize("seed", range(3))
def test_newton_schulz_singular_values(tg, shape, seed):
    """In a band around one, with the input's singular vectors; as in exact arithmetic up to bfloat16.

    Five steps lift singular values from 1e-3 of the Frobenius norm; a square matrix may have smaller ones.
    """
    G = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()
    out = tg.newton_schulz(G.float()).double()
    assert out.shape == G.shape
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    exact = scalar_polynomial(tg, S / S.norm(dim=-1, keepdim=True))
    large = S / S.norm(dim=-1, keepdim=True) > 1e-3
    assert large.double().mean() > 0.9
    assert exact[large].min() > 0.85 and exact.max() < 1.15
    along = (U.mT @ out @ Vh.mT).diagonal(dim1=-2, dim2=-1)
    assert along[large].min() > 0.75 and torch.linalg.svdvals(out).max() < 1.25
    expected = U @ torch.diag_embed(exact) @ Vh
    assert ((out - expected).norm() / expected.norm()).item() <= 0.12  # as golden 03 allows for bfloat16


def test_newton_schulz_of_a_bank_is_each_matrix_alone(tg):
    bank = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(5))
    together = tg.newton_schulz(bank)
    for matrix, alone in zip(together, bank, strict=True):
        distance = (matrix.float() - tg.newton_schulz(alone).float()).norm() / matrix.float().norm()
        assert distance.item() <= 0.02


def test_newton_schulz_ignores_scale_and_survives_zero(tg):
    G = torch.randn(16, 24, generator=torch.Generator().manual_seed(6))
    assert torch.equal(tg.newton_schulz(G * 2.0**20), tg.newton_schulz(G))
    assert torch.equal(tg.newton_schulz(torch.zeros(8, 8)).float(), torch.zeros(8, 8))


def muon_run(tg, steps: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    param = torch.nn.Parameter(torch.randn(4, 24, 16, generator=generator))
    optimizer = tg.Muon([param], lr=0.02, momentum=0.9, weight_decay=0.1)
    for _ in range(steps):
        param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return param.detach(), optimizer.state[param]["momentum_buffer"]


def test_muon_is_deterministic(tg):
    first, second = muon_run(tg), muon_run(tg)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_muon_moves_downhill(tg):
    """On |P - T|^2 the distance falls at every step by about lr * sqrt(rank) until it is small."""
    target = torch.randn(16, 16, generator=torch.Generator().manual_seed(3))
    param = torch.nn.Parameter(torch.zeros(1, 16, 16))
    optimizer = tg.Muon([param], lr=0.1, momentum=0.0, weight_decay=0.0)
    distances = []
    for _ in range(8):
        loss = (param - target).square().sum()
        distances.append(loss.item())
        param.grad = torch.autograd.grad(loss, param)[0]
        optimizer.step()
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.9 * distances[0]


def test_muon_decays_weights_by_lr_times_decay(tg):
    param = torch.nn.Parameter(torch.full((1, 4, 4), 2.0))
    optimizer = tg.Muon([param], lr=0.5, momentum=0.9, weight_decay=0.1)
    param.grad = torch.zeros(1, 4, 4)
    optimizer.step()
    assert torch.allclose(param.detach(), torch.full((1, 4, 4), 1.9))


@pytest.mark.parametrize(
    ("frac", "warmdown_frac", "min_lr", "expected"),
    [
        (0.0, 0.75, 0.1, 1.0),
        (0.2499, 0.75, 0.1, 1.0),
        (0.25, 0.75, 0.1, 1.0),
        (0.625, 0.75, 0.1, 0.5),
        (0.99, 0.75, 0.1, 0.1),
        (1.0, 0.75, 0.1, 0.1),
        (1.2, 0.75, 0.1, 0.1),
        (1.0, 0.75, 0.0, 0.0),
        (0.9, 0.0, 0.1, 1.0),
        (0.5, 1.0, 0.0, 0.5),
    ],
)
def test_lr_multiplier_points(tg, frac, warmdown_frac, min_lr, expected):
    assert tg.lr_multiplier(frac, warmdown_frac, min_lr) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "warmup_steps", "expected"),
    [(0, 1500, 0.92), (750, 1500, 0.945), (1500, 1500, 0.97), (9000, 1500, 0.97), (0, 0, 0.97)],
)
def test_muon_momentum_points(tg, step, warmup_steps, expected):
    assert tg.muon_momentum(step, 0.92, 0.97, warmup_steps) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("shape", "expected"), [((8, 8), 1.0), ((4, 32, 8), 2.0), ((4, 8, 32), 1.0)])
def test_update_scale(tg, shape, expected):
    assert tg.update_scale(shape) == expected


def test_ema_of_a_constant_is_the_constant(tg):
    state = {"a": torch.randn(5, generator=torch.Generator().manual_seed(0))}
    ema = tg.EMA(state, 0.9965)
    for _ in range(10):
        ema.update(state)
    assert torch.allclose(ema.averages["a"], state["a"], rtol=1e-6)


def test_ema_weights_follow_the_geometric_series(tg):
    """After n updates from 0 to 1 the average is 1 - decay^n."""
    ema = tg.EMA({"a": torch.zeros(1)}, 0.9)
    for _ in range(7):
        ema.update({"a": torch.ones(1)})
    assert ema.averages["a"].item() == pytest.approx(1 - 0.9**7, rel=1e-6)
