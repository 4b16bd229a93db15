"""Quantisation against oracles: rounding, the H norm, degenerate rows, coverage, the artifact round trip."""

import pytest
import torch

SMALL = {
    "vocab_size": 300,
    "num_layers": 2,
    "model_dim": 256,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_mult": 2.0,
    "rope_dims": 16,
    "num_loops": 0,
    "parallel_start_layer": 1,
    "xsa_last_n": 2,
}


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated_hessian(seed: int, columns: int, samples: int = 200) -> torch.Tensor:
    """X^T X of inputs with unequal and correlated columns."""
    x = normal(seed, samples, columns) * torch.linspace(0.1, 3.0, columns)
    x[:, 1:] += 0.7 * x[:, :-1]
    return x.T @ x


def low_rank(tg, a, a_scale, b, b_scale) -> torch.Tensor:
    """The correction A B of packed factors."""
    return tg.apply_scales(a, a_scale) @ tg.apply_scales(b, b_scale)


def gptq(tg, weight, hessian, bits: int, clip_sigmas: float, block: int = 32) -> tuple:
    """Levels and scales of a matrix whose rows are clipped at so many standard deviations."""
    scale = clip_sigmas * weight.std(dim=1) / (2 ** (bits - 1) - 1)
    return tg.gptq(weight, tg.factorise(hessian), bits, scale, block)[:2]


def rounded(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Round-to-nearest levels on given row scales."""
    limit = 2 ** (bits - 1) - 1
    return torch.round(weight / scale.float()[:, None]).clamp(-limit, limit)


def weighted_error(weight: torch.Tensor, levels: torch.Tensor, scale: torch.Tensor, hessian) -> float:
    error = weight.double() - levels.double() * scale.double()[:, None]
    return ((error @ hessian.double()) * error).sum().item()


@pytest.mark.parametrize("bits", [4, 6, 7, 8])
@pytest.mark.parametrize("columns", [16, 200])
def test_identity_hessian_is_round_to_nearest(tg, bits, columns):
    weight = normal(1, 24, columns)
    levels, scale = gptq(tg, weight, torch.eye(columns), bits, 4.0)
    assert torch.equal(levels.float(), rounded(weight, scale, bits))
    expected = 4.0 * weight.std(dim=1) / (2 ** (bits - 1) - 1)
    assert torch.equal(scale, expected.half())


@pytest.mark.parametrize("columns", [32, 128, 129, 300])
@pytest.mark.parametrize("seed", range(3))
def test_gptq_beats_rounding_in_the_hessian_norm(tg, seed, columns):
    weight, hessian = normal(seed, 20, columns), correlated_hessian(seed + 10, columns)
    levels, scale = gptq(tg, weight, hessian, 4, 3.0)
    nearest = rounded(weight, scale, 4)
    assert weighted_error(weight, levels, scale, hessian) < weighted_error(weight, nearest, scale, hessian)


def test_block_size_only_orders_the_work(tg):
    weight, hessian = normal(0, 16, 150), correlated_hessian(1, 150)
    levels, scale = gptq(tg, weight, hessian, 6, 12.0, block=128)
    for block in (1, 32, 150):
        other, same_scale = gptq(tg, weight, hessian, 6, 12.0, block=block)
        assert torch.equal(scale, same_scale)
        assert (levels != other).double().mean().item() <= 0.005


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_constant_rows(tg, value):
    """Rows whose spread is zero have no usable scale: no NaN, and zero rows come back as zero."""
    weight = normal(2, 8, 32)
    weight[3] = value
    levels, scale = gptq(tg, weight, correlated_hessian(3, 32), 6, 12.85)
    restored = levels.float() * scale.float()[:, None]
    assert (scale > 0).all()
    assert torch.isfinite(restored).all()
    assert levels.abs().max() <= 31
    if value == 0.0:
        assert not restored[3].any()
    others = [row for row in range(8) if row != 3]
    assert ((restored - weight)[others].norm() / weight[others].norm()).item() < 0.3


ODD = {  # matrices by name: the rows that keep no deviation, and what may be lost of them
    "one_column": (normal(20, 6, 1), 0.5 / 31),
    "one_weight": (normal(20, 1, 1), 0.5 / 31),
    "alike": (torch.tensor([[0.25] * 8, [-3.0] * 8, [0.1] * 8]), 0.5 / 31),
    "zeros": (torch.zeros(4, 8), 0.0),
    "one_row": (normal(20, 1, 40), 0.5 * 12.85 / 31),
    "largest": (1e4 * normal(20, 4, 40), 0.5 * 12.85 / 31),
    "smallest": (1e-6 * normal(20, 4, 40), 0.5 * 12.85 / 31),
    "below": (1e-9 * normal(20, 4, 40), 1.0),
    "below_float32": (1e-40 * normal(20, 4, 40), 1.0),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ODD)
def test_odd_matrices_are_stored(tg, name):
    """Whatever the row: a scale that is a number above zero, and an error of at most half a step."""
    weight, share = ODD[name]
    factor, cfg = tg.factorise(torch.eye(weight.size(1))), tg.Config()
    record = tg.quantize_tensor(weight, tg.Scheme("gptq", 6, 12.85), factor, cfg)
    scale, error = record.arrays["scale"].float(), (record.dequantize() - weight).abs().amax(1)
    assert scale.isfinite().all() and (scale > 0).all()
    reach = weight.abs().amax(1) if "alike" in name or weight.size(1) == 1 else weight.std(1)
    reach = weight.abs().amax(1) if share == 1.0 else reach
    assert (error <= share * reach * (1 + 2.0**-10) + 2.0**-25).all()


@pytest.mark.parametrize("bits", [2, 6, 8])
def test_scales_above_float16_clip_their_rows(tg, bits):
    """MATRIX_CLIP_SIGMAS allows a million deviations: the scale is float16's largest, not infinite."""
    weight = 6e4 * normal(21, 5, 30).clamp(-1, 1)
    record = tg.quantize_tensor(
        weight, tg.Scheme("gptq", bits, 1e6), tg.factorise(torch.eye(30)), tg.Config()
    )
    assert (record.arrays["scale"] == tg.LARGEST_HALF).all()
    assert record.dequantize().isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-9, 1e-7, 1.0, 1e4, 1e9, 1e30])
@pytest.mark.parametrize("top", [1.5, 7.5, 127])
def test_round_to_scales_of_any_size(tg, scale, top):
    """Half a step of error where float16 has such a scale, and finite numbers where it has none."""
    x = scale * normal(22, 4, 16)
    x[1] = 0
    levels, scales = tg.round_to_scales(x, 4, -int(top + 0.5), int(top), top)
    restored = tg.apply_scales(levels, scales)
    assert scales.isfinite().all() and (scales > 0).all() and restored.isfinite().all()
    assert not restored[1].any()
    if 1e-7 <= scale <= 1e4:
        steps = (x.abs().amax(1) / top).clamp_min(2.0**-24)[:, None]
        assert ((restored - x).abs() <= steps * (0.5 + (top + 1) * 2.0**-10) + 2.0**-25).all()


@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e20])
@pytest.mark.parametrize("shape", [(1, 16), (16, 1), (12, 16)])
def test_low_rank_of_any_size_is_finite(tg, shape, size, group):
    a, b = tg.low_rank_factors(size * normal(23, *shape), 4)
    (_, rank, _), arrays = tg.pack_low_rank(a, b, group, 4)
    assert rank <= min(shape) and low_rank(tg, *arrays.values()).isfinite().all()
    assert all(array.isfinite().all() for array in arrays.values() if array.is_floating_point())


def test_scales_of_trained_rows_are_the_published_ones(tg):
    """Bit for bit clip width times deviation by largest level, with the demo's settings and the record's."""
    for preset in ("demo", "pr1851"):
        cfg = tg.Config(**tg.PRESETS[preset])
        for seed, (sigmas, bits) in enumerate(
            [
                (cfg.matrix_clip_sigmas, cfg.matrix_bits),
                (cfg.attn_clip_sigmas, cfg.matrix_bits),
                (cfg.mlp_clip_sigmas, cfg.matrix_bits),
                (cfg.embed_clip_sigmas, cfg.embed_bits),
            ]
        ):
            weight = 0.05 * normal(30 + seed, 300, cfg.model_dim)
            weight[7] = 0  # a row that nothing has trained
            published = sigmas * weight.std(dim=1) / (2 ** (bits - 1) - 1)
            scales = tg.row_scales(weight, tg.Scheme("gptq", bits, sigmas))
            assert torch.equal(scales, published.clamp_min(tg.SMALLEST_HALF))
            factor = tg.factorise(correlated_hessian(seed, cfg.model_dim))
            levels, halves, _ = tg.gptq(weight, factor, bits, published)
            stored = tg.quantize_tensor(weight, tg.Scheme("gptq", bits, sigmas), factor, cfg).arrays
            assert torch.equal(stored["q"], levels) and torch.equal(stored["scale"], halves)


def test_zero_matrix(tg):
    levels, scale = gptq(tg, torch.zeros(4, 16), torch.zeros(16, 16), 6, 12.85)
    assert not levels.any()
    assert (scale > 0).all()


def test_int8_rows_of_zero(tg):
    weight = normal(4, 3, 12)
    weight[1] = 0
    levels, scale = tg.round_to_scales(weight, len(weight), -127, 127, 127)
    restored = levels.float() * scale.float()[:, None]
    assert (scale > 0).all()
    assert torch.isfinite(restored).all()
    assert not restored[1].any()
    assert (restored - weight).abs().max().item() <= weight.abs().max().item() / 127


def test_dead_columns_become_zero(tg):
    hessian = correlated_hessian(5, 40)
    hessian[7], hessian[:, 7] = 0, 0
    levels, _ = gptq(tg, normal(6, 10, 40), hessian, 6, 12.0)
    assert not levels[:, 7].any()
    assert levels[:, 8].any()


def test_low_rank_factors_are_the_best(tg):
    """Rank 3 of a rank-3 matrix plus noise leaves the remaining singular values (Eckart-Young)."""
    error = normal(7, 30, 3) @ normal(8, 3, 50) + 0.01 * normal(9, 30, 50)
    A, B = tg.low_rank_factors(error, 3)
    assert A.shape == (30, 3) and B.shape == (3, 50)
    rest = torch.linalg.svdvals(error)[3:].square().sum().sqrt().item()
    assert (error - A @ B).norm().item() == pytest.approx(rest, rel=1e-4)


def test_low_rank_factors_of_a_thin_matrix(tg):
    """No more rank than singular values."""
    A, B = tg.low_rank_factors(normal(10, 2, 9), 4)
    assert A.shape == (2, 2) and B.shape == (2, 9)


@pytest.mark.parametrize("kind", ["asym", "sym"])
def test_packed_correction_lowers_the_error(tg, kind):
    error = normal(11, 40, 4) @ normal(12, 4, 64) + 0.5 * normal(13, 40, 64)
    A, B = tg.low_rank_factors(error, 4)
    _, packed = tg.pack_low_rank(A, B, 64 if kind == "asym" else 0, 4)
    assert (error - low_rank(tg, *packed.values())).norm() < 0.8 * error.norm()


@pytest.mark.parametrize("kind", ["asym", "sym"])
def test_packed_zero_correction_is_zero(tg, kind):
    A, B = torch.zeros(8, 4), torch.zeros(4, 64)
    correction, packed = tg.pack_low_rank(A, B, 64 if kind == "asym" else 0, 4)
    assert correction == (kind, 4, 64 if kind == "asym" else 0)
    assert not low_rank(tg, *packed.values()).any()


@pytest.fixture(scope="module")
def quantised(tg):
    """(config, flat state, records) of a small model with random weights and Hessians of random inputs."""
    config = tg.Config(**SMALL, gated_attn_quant_gate=True)
    model = tg.GPT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    flat = tg.flatten_banks(model.state_dict(), config.num_layers)
    hessians = {
        name: correlated_hessian(seed, tensor.shape[1])
        for seed, (name, tensor) in enumerate(flat.items())
        if tensor.ndim == 2 and tensor.shape[1] >= 128
    }
    return config, flat, tg.quantize_state(flat, hessians, config)


def test_every_tensor_has_a_scheme(tg, quantised):
    config, flat, records = quantised
    assert list(records) == list(flat)
    kinds = {name: tg.scheme_of(name, tensor, config) for name, tensor in flat.items()}
    assert {scheme.kind for scheme in kinds.values()} == {"gptq", "int8_rows", "fp16"}
    assert kinds["tok_emb.weight"] == tg.Scheme("gptq", config.embed_bits, config.embed_clip_sigmas)
    assert kinds["blocks.0.mlp.fc.weight"] == tg.Scheme("gptq", config.matrix_bits, config.mlp_clip_sigmas)
    assert kinds["blocks.1.attn.c_q.weight"].kind == "fp16"  # 65,536 elements: the largest that stays
    assert kinds["blocks.1.attn.attn_gate_w"].kind == "int8_rows"
    for name, record in records.items():
        assert record.dequantize().shape == flat[name].shape


def test_default_model_needs_no_other_scheme(tg):
    """Every large matrix of the record's model goes through GPTQ with the clip of its place."""
    config = tg.Config()
    large = (512, 512)
    clips = {
        "blocks.10.attn.c_q.weight": (6, 13.0),
        "blocks.0.attn.proj.weight": (6, 13.0),
        "blocks.3.mlp.proj.weight": (6, 12.0),
        "tok_emb.weight": (7, 15.0),
        "another.weight": (6, 12.85),
    }
    for name, (bits, clip) in clips.items():
        assert tg.scheme_of(name, torch.empty(large), config) == tg.Scheme("gptq", bits, clip)
    assert tg.scheme_of("blocks.0.attn_scale", torch.empty(512), config).kind == "fp16"


def test_untied_embedding_needs_no_hessian(tg, quantised):
    """Its inputs are one-hot: every row weighs the same, which is rounding to nearest."""
    config = tg.Config(**SMALL, tie_embeddings=False, lqer_enabled=False)
    embedding = quantised[1]["tok_emb.weight"]
    arrays = tg.quantize_state({"tok_emb.weight": embedding}, {}, config)["tok_emb.weight"].arrays
    assert torch.equal(arrays["q"].float(), rounded(embedding, arrays["scale"], config.embed_bits))


def test_correction_goes_to_the_largest_errors(quantised):
    config, flat, records = quantised
    corrected = {name for name, record in records.items() if "+lqer" in record.category}
    assert len(corrected) == config.lqer_top_k
    errors = {}
    for name, record in records.items():
        if "q" in record.arrays:
            base = record.arrays["q"].float() * record.arrays["scale"].float()[:, None]
            errors[name] = (flat[name] - base).norm().item()
            final = (flat[name] - record.dequantize()).norm().item()
            assert (
                final < errors[name] if name in corrected else final == pytest.approx(errors[name], rel=1e-6)
            )
    assert corrected == set(sorted(errors, key=errors.get)[-config.lqer_top_k :])


def test_state_is_untouched(tg, quantised):
    config, flat, _ = quantised
    small = {name: tensor for name, tensor in flat.items() if tensor.numel() <= 65536}
    before = {name: tensor.clone() for name, tensor in small.items()}
    tg.quantize_state(small, {}, config)
    for name, tensor in small.items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("codec", ["brotli", "lzma", "ans"])
def test_artifact_keeps_every_array(tg, quantised, codec):
    """Quantise, pack, unpack, dequantise: the same numbers, whatever the codec."""
    config, flat, records = quantised
    config = tg.Config(**SMALL, gated_attn_quant_gate=True, compressor=codec)
    settings, unpacked = tg.read_artifact(tg.pack_artifact(records, config), tg.Config())
    for key, value in SMALL.items():
        assert settings[key] == value, key
    assert list(unpacked) == list(flat)
    for name, record in records.items():
        assert unpacked[name].category == record.category
        assert set(unpacked[name].arrays) == set(record.arrays)
        for key, array in record.arrays.items():
            other = unpacked[name].arrays[key]
            assert other.dtype == array.dtype and torch.equal(other, array), (name, key)
        assert torch.equal(unpacked[name].dequantize(), record.dequantize()), name


def test_artifact_rebuilds_the_model(tg, quantised):
    config, _, records = quantised
    settings, unpacked = tg.read_artifact(tg.pack_artifact(records, config), tg.Config())
    model = tg.GPT(tg.Config(**settings))
    flat = {name: record.dequantize() for name, record in unpacked.items()}
    model.load_state_dict(tg.restore_banks(flat, settings["num_layers"]))
    ids = torch.randint(0, SMALL["vocab_size"], (1, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        losses = model.losses(ids[:, :-1], ids[:, 1:], looping=False)
    assert torch.isfinite(losses).all()


def test_hessian_collector_sums_inputs(tg):
    """Sum of x^T x over batches and positions, divided by batches; K and V share Q's."""
    collector = tg.HessianCollector()
    inputs = [normal(seed, 2, 5, 8) for seed in range(3)]
    for x in inputs:
        collector.on_input("blocks.0.attn.c_q.weight", x)
    flat = torch.cat([x.reshape(-1, 8) for x in inputs])
    hessians = collector.hessians(3)
    assert torch.allclose(hessians["blocks.0.attn.c_q.weight"], flat.T @ flat / 3, rtol=1e-5, atol=1e-5)
    for name in ("c_k", "c_v"):
        assert torch.equal(hessians[f"blocks.0.attn.{name}.weight"], hessians["blocks.0.attn.c_q.weight"])


def test_hessians_cover_every_quantised_tensor(tg, quantised):
    config, flat, _ = quantised
    model = tg.GPT(config)
    collector = tg.HessianCollector()
    ids = torch.randint(0, SMALL["vocab_size"], (1, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.logits(model.hidden(ids, looping=False, on_input=collector.on_input))
    needed = {name for name, tensor in flat.items() if tg.scheme_of(name, tensor, config).kind == "gptq"}
    assert needed <= set(collector.hessians(1)) | {"tok_emb.weight"}
