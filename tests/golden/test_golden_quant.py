"""Golden 07 (GPTQ, int8 rows, low-rank correction, a mixed pass) and 09 (byte shuffle, codecs, names)."""

import hashlib

import numpy as np
import pytest
import torch
from golden_tools import assert_close, beside, cases, model_config, some

# 07_gptq, Q: "at least 99.5% of the entries equal and every difference <= 1"
EQUAL_LEVELS = 0.995
# 07_gptq, Q: "weighted error within 1% of the listed one"
WEIGHTED_ERROR = 0.01
# 07_gptq, mixed: "dequantised samples: 99% within one quantisation step, or exact where Q is equal"
SAMPLES_WITHIN_STEP = 0.99

MIXED = "07_gptq/mixed.json"
SHUFFLE, NAMES = "09_serialization/byte_shuffle.json", "09_serialization/bank_names.json"
GPTQ_CASES = cases("07_gptq/gptq.json", lambda file: file["cases"])
LQER_CASES = cases("07_gptq/lqer.json", lambda file: file["cases"])
GATE_CASES = cases(
    "07_gptq/gate_int8.safetensors", lambda names: [name[:-2] for name in names if name.endswith(".W")]
)
STREAMS = cases(SHUFFLE, lambda file: range(len(file["compress"])))


@pytest.fixture(scope="module")
def gptq_vectors(golden_file):
    return golden_file("07_gptq/gptq.safetensors")


@pytest.fixture(scope="module")
def lqer_vectors(golden_file):
    return golden_file("07_gptq/lqer.safetensors")


@pytest.fixture(scope="module")
def mixed(golden_file):
    return golden_file(MIXED)


@pytest.fixture(scope="module")
def mixed_records(tg, mixed):
    """Our records of the mixed pass, computed once: name -> QuantizedTensor."""
    config = model_config(tg, mixed["model_config"], **mixed["settings"])
    return tg.quantize_state(mixed_state(mixed), mixed_hessians(mixed), config)


def assert_levels(levels: torch.Tensor, expected: torch.Tensor) -> None:
    """At least 99.5 % of the levels equal, none further than one away."""
    assert levels.dtype == torch.int8
    assert levels.shape == expected.shape
    difference = (levels.int() - expected.int()).abs()
    assert difference.max().item() <= 1
    assert (difference == 0).double().mean().item() >= EQUAL_LEVELS


def assert_scale(scale: torch.Tensor, expected: torch.Tensor) -> None:
    """Half-precision values, exact."""
    assert scale.dtype == torch.float16
    assert torch.equal(scale.float(), expected)


@pytest.mark.parametrize("case", GPTQ_CASES)
def test_gptq(tg, golden_file, gptq_vectors, case):
    facts = golden_file("07_gptq/gptq.json")["cases"][case]
    stored = gptq_vectors[f"{case}.W"], gptq_vectors[f"{case}.H"]
    weight, hessian = (tensor.clone() for tensor in stored)
    bits = (facts["clip_range"] + 1).bit_length()
    assert 2 ** (bits - 1) - 1 == facts["clip_range"]
    scale = facts["clip_sigmas"] * weight.std(dim=1) / facts["clip_range"]
    levels, scale, _ = tg.gptq(weight, tg.factorise(hessian), bits, scale)
    assert torch.equal(weight, stored[0]) and torch.equal(hessian, stored[1])
    assert_scale(scale, gptq_vectors[f"{case}.scale"])
    assert_levels(levels, gptq_vectors[f"{case}.Q"])
    error = weight.double() - levels.double() * scale.double()[:, None]
    weighted = ((error @ hessian.double()) * error).sum().item()
    assert abs(weighted - facts["weighted_error"]) <= WEIGHTED_ERROR * facts["weighted_error"]
    assert (levels[:, facts["dead_columns"]] == 0).all()


@pytest.mark.parametrize("case", GATE_CASES)
def test_int8_rows(tg, golden_file, case):
    vectors = golden_file("07_gptq/gate_int8.safetensors")
    levels, scale = tg.round_to_scales(vectors[f"{case}.W"], len(vectors[f"{case}.W"]), -127, 127, 127)
    assert levels.dtype == torch.int8
    assert torch.equal(levels, vectors[f"{case}.q"])
    assert_scale(scale, vectors[f"{case}.scale"])
    assert torch.equal(levels.float() * scale.float()[:, None], vectors[f"{case}.dequant"])


@pytest.mark.parametrize("case", LQER_CASES)
def test_low_rank_factors(tg, golden_file, lqer_vectors, case):
    facts = golden_file("07_gptq/lqer.json")["cases"][case]
    A, B = tg.low_rank_factors(lqer_vectors[f"{case}.E"], facts["rank"])
    expected_A, expected_B = lqer_vectors[f"{case}.A"], lqer_vectors[f"{case}.B"]
    signs = torch.sign((A * expected_A).sum(dim=0))  # each pair of column and row has a free common sign
    # Singular vectors are not in tolerances.json: float32 SVD noise is some 1e-6 over the gap of the values.
    assert_close(A * signs, expected_A, 1e-4)
    assert_close(B * signs[:, None], expected_B, 1e-4)
    residual = (lqer_vectors[f"{case}.E"] - A @ B).norm().item()
    assert residual == pytest.approx(facts["residual_l2_unquantised_factors"], rel=1e-5)


PACKED_KEYS = {  # stored name -> key of the published artifact
    "asym": {"qA": "lqA_a", "sA": "lqAs_a", "qB": "lqB_a", "sB": "lqBs_a"},
    "sym": {"qA": "lqA", "sA": "lqAs", "qB": "lqB", "sB": "lqBs"},
}


def low_rank(tg, a, a_scale, b, b_scale) -> torch.Tensor:
    """The correction A B of packed factors."""
    return tg.apply_scales(a, a_scale) @ tg.apply_scales(b, b_scale)


def assert_packed(packed: dict, vectors: dict, case: str, kind: str) -> None:
    """Levels and half-precision scales exactly as stored, whatever the shape of a single scale."""
    assert set(packed) == set(PACKED_KEYS[kind].values())
    for stored, key in PACKED_KEYS[kind].items():
        expected = vectors[f"{case}.{kind}.{stored}"]
        if stored.startswith("q"):
            assert packed[key].dtype == torch.int8
            assert torch.equal(packed[key], expected)
        else:
            assert_scale(packed[key].reshape(-1), expected)


@pytest.mark.parametrize("case", LQER_CASES)
def test_pack_low_rank(tg, golden_file, lqer_vectors, case):
    facts = golden_file("07_gptq/lqer.json")["cases"][case]
    A, B = lqer_vectors[f"{case}.A"], lqer_vectors[f"{case}.B"]
    packings = {"sym": tg.pack_low_rank(A, B, 0, facts["bits"])}
    if facts["asym_possible"]:
        packings["asym"] = tg.pack_low_rank(A, B, facts["group"], facts["bits"])
    for kind, (correction, packed) in packings.items():
        assert correction == (kind, facts["rank"], facts["group"] if kind == "asym" else 0)
        assert_packed(packed, lqer_vectors, case, kind)
        product = low_rank(tg, *packed.values())
        assert product.dtype == torch.float32
        assert_close(product, lqer_vectors[f"{case}.{kind}.correction"], 1e-6)
        residual = (lqer_vectors[f"{case}.E"] - product).norm().item()
        assert residual == pytest.approx(facts[f"residual_l2_{kind}"], rel=1e-5)


def mixed_state(mixed: dict) -> dict[str, torch.Tensor]:
    """The generated state dict of golden 7.4, checked against the stored hashes."""
    state = {}
    for name, recipe in mixed["state_dict_in_order"].items():
        generator = np.random.Generator(np.random.PCG64(recipe["seed"]))
        values = generator.standard_normal(recipe["shape"], dtype=np.float32) * np.float32(recipe["std"])
        assert hashlib.sha256(values.astype("<f4").tobytes()).hexdigest() == recipe["sha256"], name
        state[name] = torch.from_numpy(values)
    return state


def mixed_hessians(mixed: dict) -> dict[str, torch.Tensor]:
    """The generated Hessians of golden 7.4 (exact integers), checked against the stored hashes."""
    hessians = {}
    for name, recipe in mixed["hessians"].items():
        generator = np.random.Generator(np.random.PCG64(recipe["seed"]))
        x = generator.integers(-8, 9, size=(recipe["samples"], recipe["cols"]))
        x = x * generator.integers(1, 5, size=recipe["cols"])
        mixed_columns = np.arange(3, recipe["cols"], 3)
        before = x.copy()
        x[:, mixed_columns] += before[:, mixed_columns - 1]
        x[:, recipe["dead_columns"]] = 0
        hessian = (x.T @ x).astype(np.float32)
        assert hashlib.sha256(hessian.astype("<f4").tobytes()).hexdigest() == recipe["sha256"], name
        hessians[name] = torch.from_numpy(hessian)
    return hessians


def test_mixed_categories(mixed, mixed_records):
    assert {name: record.category for name, record in mixed_records.items()} == mixed["categories"]


def test_mixed_result_names(mixed, mixed_records):
    results = {
        f"{name}.{key}" if key else name: array
        for name, record in mixed_records.items()
        for key, array in record.arrays.items()
    }
    assert set(results) == set(mixed["result_names"])
    for name, facts in mixed["result_names"].items():
        assert results[name].numel() == int(np.prod(facts["shape"])), name
        assert str(results[name].dtype) == f"torch.{facts['dtype']}", name


def test_mixed_arrays(golden_file, mixed_records):
    """Levels and scales of the base quantisation; the low-rank arrays depend on the free sign of the SVD."""
    vectors = golden_file("07_gptq/mixed.safetensors")
    compared = 0
    for name, record in mixed_records.items():
        for key, array in record.arrays.items():
            stored = vectors.get(f"{name}.{key}" if key else name)
            if stored is None or key.startswith("lq"):
                continue
            compared += 1
            if key == "q":
                assert_levels(array, stored)
            elif array.dtype == torch.int8:
                assert torch.equal(array, stored), (name, key)
            else:
                assert_scale(array.reshape(stored.shape), stored)
    assert some(compared, "levels in 07_gptq/mixed.safetensors") == sum(".lq" not in key for key in vectors)


def test_mixed_low_rank_arrays(golden_file, mixed_records):
    """Symmetric packing only mirrors a flipped sign of the SVD; its noise may move single roundings."""
    vectors = golden_file("07_gptq/mixed.safetensors")
    names = [key.removesuffix(".lqA") for key in vectors if key.endswith(".lqA")]
    for name in some(names, "*.lqA in 07_gptq/mixed.safetensors"):
        arrays = mixed_records[name].arrays
        for key in ("lqAs", "lqBs"):
            assert arrays[key].dtype == torch.float16
            assert_close(arrays[key].float(), vectors[f"{name}.{key}"], 2**-10)  # one half-precision step
        signs = torch.sign((arrays["lqA"].int() * vectors[f"{name}.lqA"].int()).sum(dim=0))
        assert_levels((arrays["lqA"] * signs).to(torch.int8), vectors[f"{name}.lqA"])
        assert_levels((arrays["lqB"] * signs[:, None]).to(torch.int8), vectors[f"{name}.lqB"])


def test_mixed_dequantised(mixed, mixed_records):
    for name, facts in some(mixed["dequantised"], "dequantised tensors in 07_gptq/mixed.json").items():
        record = mixed_records[name]
        values = record.dequantize()
        assert values.dtype == torch.float32
        assert list(values.shape) == facts["shape"]
        sample = values.flatten()[:: facts["sample_stride"]]
        expected = torch.tensor(facts["sample"])
        assert sample.shape == expected.shape, name
        if "q" in record.arrays:
            steps = record.arrays["scale"].float()[:, None].expand(values.shape).flatten()
            within = (sample - expected).abs() <= steps[:: facts["sample_stride"]]
            assert within.double().mean().item() >= SAMPLES_WITHIN_STEP, name
            assert values.norm().item() == pytest.approx(facts["l2"], rel=1e-3), name
        elif len(expected):
            assert torch.equal(sample, expected), name


@pytest.mark.parametrize("gate_quant", [True, False])
def test_small_model_categories(tg, golden_file, mixed, gate_quant):
    expected = mixed["all_small_model"][f"categories_gate_quant_{'on' if gate_quant else 'off'}"]
    weights = beside(MIXED, mixed["all_small_model"]["weights"])
    golden = golden_file(weights.replace("_weights.safetensors", ".json"))["config"]
    settings = {**mixed["settings"], "gated_attn_quant_gate": gate_quant}
    config = model_config(tg, golden, **settings)
    records = tg.quantize_state(tg.flatten_banks(golden_file(weights), golden["num_layers"]), {}, config)
    assert {name: record.category for name, record in records.items()} == expected


def test_byte_shuffle(tg, golden_file):
    for case in some(golden_file(SHUFFLE)["shuffle"], f"cases of {SHUFFLE}, shuffle"):
        data = bytes.fromhex(case["input_hex"])
        shuffled = tg.byte_shuffle(data, case["stride"])
        if case["output_hex"] is not None:
            assert shuffled.hex() == case["output_hex"]
        assert shuffled.hex().startswith(case["first_bytes_hex"])
        assert (tg.byte_unshuffle(shuffled) == data) == case["unshuffled_equals_input"]


def test_byte_unshuffle_edges(tg, golden_file):
    for case in some(golden_file(SHUFFLE)["unshuffle_edge"], f"cases of {SHUFFLE}, unshuffle_edge"):
        assert tg.byte_unshuffle(bytes.fromhex(case["input_hex"])).hex() == case["unshuffle_output_hex"]


@pytest.mark.parametrize("number", STREAMS)
def test_decompress(tg, golden_file, number):
    """Foreign streams decode; ours need not be the same bytes, only come back whole."""
    case = golden_file(SHUFFLE)["compress"][number]
    cfg = tg.Config(compressor=case["compressor"])
    shuffled = tg.decompress(bytes.fromhex(case["compressed_hex"]), cfg)
    assert shuffled.hex() == case["decompresses_to_shuffled_hex"]
    payload = bytes.fromhex(case["payload_hex"])
    assert tg.byte_unshuffle(shuffled) == payload
    again = tg.compress(tg.byte_shuffle(payload), cfg)
    assert tg.byte_unshuffle(tg.decompress(again, cfg)) == payload


def test_bank_names(tg, golden_file):
    golden = golden_file(NAMES)
    state = golden_file(beside(NAMES, golden["weights"]))
    ordered = {name: state[name] for name in state_order(golden)}
    flat = tg.flatten_banks(ordered, golden["num_layers"])
    assert list(flat) == golden["order_of_names"]
    for name, facts in golden["flat"].items():
        assert list(flat[name].shape) == facts["shape"]
        assert flat[name].double().sum().item() == pytest.approx(facts["sum"], rel=1e-12, abs=1e-12)
        if facts.get("from"):
            bank, row = facts["from"]
            assert torch.equal(flat[name], state[bank][row])
        else:
            assert torch.equal(flat[name], state[name])


def state_order(golden: dict) -> list[str]:
    """State-dict order: the banks where their slices appear first, every other name in place."""
    names = [facts["from"][0] if facts.get("from") else name for name, facts in golden["flat"].items()]
    return list(dict.fromkeys(names))


def test_model_order_is_the_published_order(tg, golden_file):
    """The model's own state dict flattens to the published iteration order."""
    golden = golden_file(NAMES)
    stored = golden_file(beside(NAMES, golden["weights"].replace("_weights.safetensors", ".json")))
    model = tg.GPT(model_config(tg, stored["config"]))
    assert list(tg.flatten_banks(model.state_dict(), golden["num_layers"])) == golden["order_of_names"]


def test_restore_banks(tg, golden_file):
    golden = golden_file(NAMES)
    num_layers, state = golden["num_layers"], golden_file(beside(NAMES, golden["weights"]))
    restored = tg.restore_banks(tg.flatten_banks(state, num_layers), num_layers)
    assert set(restored) == set(state)
    for name, tensor in state.items():
        assert torch.equal(restored[name], tensor), name
