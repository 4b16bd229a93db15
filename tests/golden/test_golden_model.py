"""Golden folders 01_model (forward, losses, gradients) and 05_virtual_layers (layers, initial values)."""

import json
import math
import re

import pytest
import torch
from golden_tools import (
    GRADIENTS_REL,
    HESSIANS_REL,
    STEP_ABS,
    STEP_FRACTION,
    VALUES_REL,
    assert_close,
    assert_digest,
    cases,
    files,
    model_config,
    some,
    tiny_config,
)

LOOPS = ("loop_off", "loop_on")
ROWS = ("nocu", "cu", "batch2")
MODELS = files("01_model/*.json", without="variants.json")
VARIANTS = cases("01_model/variants.json", lambda file: file["variants"])
LAYER_CASES = cases("05_virtual_layers/virtual_layers.json", lambda found: range(len(found)))
SUGGESTED = [  # section, key and words of tolerances.json before the number, and the test's own
    ("01_model", "values", r"<= (\S+)", VALUES_REL),
    ("01_model", "gradients", r"<= (\S+)", GRADIENTS_REL),
    ("02_ttt_forward", "values", r"<= (\S+)", VALUES_REL),
    ("02_ttt_forward", "gradients", r"<= (\S+)", GRADIENTS_REL),
    ("02_ttt_forward", "after_optimizer_step", r"<= (\S+)", STEP_ABS),
    ("02_ttt_forward", "after_optimizer_step", r"at least (\S+)%", round(100 * STEP_FRACTION, 9)),
    ("08_hessians", None, r"<= (\S+)", HESSIANS_REL),
]
ORTHONORMAL_ABS = 1e-5  # max|W W^T - I| of a float32 QR factor at these sizes
SAMPLING_SIGMAS = 5.0  # random initial values: allowed distance in standard errors


class Case:
    """One golden model with its inputs; builds the row layouts `nocu`, `cu`, `batch2`."""

    def __init__(self, tg, config, weights: dict, inputs: dict) -> None:
        self.model = tg.GPT(config)
        self.model.load_state_dict(weights)
        self.input_ids, self.target_ids = inputs["input_ids"].long(), inputs["target_ids"].long()
        bos = (self.input_ids[0] == 1).nonzero().flatten()
        self.segments = tg.document_segments(bos, self.input_ids.shape[1], config.train_seq_len)
        assert torch.equal(self.segments.cu_seqlens, inputs["cu_seqlens"])

    def rows(self, layout: str) -> tuple:
        """(input_ids, target_ids, segments) of one row layout."""
        if layout == "batch2":
            even = self.input_ids.shape[1] // 2 * 2
            return self.input_ids[:, :even].reshape(2, -1), self.target_ids[:, :even].reshape(2, -1), None
        return self.input_ids, self.target_ids, self.segments if layout == "cu" else None

    def losses(self, loop: str, layout: str) -> torch.Tensor:
        """Per-token losses of one case."""
        input_ids, target_ids, segments = self.rows(layout)
        return self.model.losses(input_ids, target_ids, segments, looping=loop == "loop_on")


@pytest.fixture(scope="module", params=MODELS)
def golden(request, tg, golden_file):
    """(meta, case, outputs, grads) of a full golden model."""
    meta, name = golden_file(request.param), request.param.removesuffix(".json")
    weights, inputs, outputs, grads = (
        golden_file(f"{name}_{part}.safetensors") for part in ("weights", "inputs", "outputs", "grads")
    )
    return meta, Case(tg, model_config(tg, meta["config"]), weights, inputs), outputs, grads


@pytest.fixture(scope="module")
def variants(golden_file):
    """(entries, weights, inputs, outputs) of the one-option-changed models."""
    entries = golden_file("01_model/variants.json")["variants"]
    parts = ("weights", "inputs", "outputs")
    return entries, *(golden_file(f"01_model/variants_{part}.safetensors") for part in parts)


def test_the_folder_has_what_its_manifest_lists(golden_file, golden_dir):
    """A file that is not there leaves out cases of which no test would know."""
    missing = [path for path in golden_file("manifest.json")["files"] if not (golden_dir / path).is_file()]
    if missing:
        pytest.skip(f"{golden_dir} lacks {', '.join(missing)}")


@pytest.mark.parametrize(("section", "key", "words", "ours"), SUGGESTED)
def test_thresholds_are_those_of_the_tolerances_file(golden_file, section, key, words, ours):
    """A folder that suggests a stricter number needs another test; a looser one is met too."""
    suggested = golden_file("tolerances.json")[section]["suggested"]
    told = re.search(words, suggested[key] if key else suggested)
    if not told:
        pytest.skip(f"tolerances.json has no {words!r} for {section}, {key}")
    assert ours >= float(told[1]) if "at least" in words else ours <= float(told[1])


@pytest.mark.parametrize("layout", ROWS)
@pytest.mark.parametrize("loop", LOOPS)
def test_outputs(golden, loop, layout):
    meta, case, outputs, _ = golden
    input_ids, target_ids, segments = case.rows(layout)
    with torch.no_grad():
        hidden = case.model.hidden(input_ids, segments, looping=loop == "loop_on")
        losses = case.losses(loop, layout)
        actual = {"hidden": hidden, "logits": case.model.logits(hidden), "losses": losses}
    actual["mean_loss"] = losses.mean().reshape(1)
    suffix = f".{loop}.{layout}"
    stored = {key.removesuffix(suffix): ref for key, ref in outputs.items() if key.endswith(suffix)}
    for quantity, reference in some(stored, f"*{suffix} in the outputs of this model").items():
        assert_close(actual[quantity], reference, VALUES_REL)
    mean_loss = torch.tensor([meta["mean_loss"][f"{loop}.{layout}"]], dtype=torch.float64)
    assert_close(actual["mean_loss"], mean_loss, VALUES_REL)


def test_embedding_stream(golden):
    _, case, outputs, _ = golden
    assert_close(case.model.embed(case.input_ids), outputs["x0"], VALUES_REL)


def test_layer_lists(tg, golden):
    meta = golden[0]
    lists = tg.layer_order(model_config(tg, meta["config"]), True)
    assert lists == (meta["encoder_indices"], meta["decoder_indices"])


@pytest.mark.parametrize("loop", LOOPS)
def test_gradients(golden, loop):
    meta, case, _, grads = golden
    case.model.zero_grad()
    case.losses(loop, "cu").mean().backward()
    actual = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in case.model.named_parameters()
    }
    digests, prefix = meta["param_grad_digest"][f"{loop}.cu"], f"{loop}.cu/"
    stored = {key.removeprefix(prefix): ref for key, ref in grads.items() if key.startswith(prefix)}
    assert actual.keys() == digests.keys()
    for name, reference in some(stored, f"{prefix}* in the gradients of this model").items():
        assert_close(actual[name], reference, GRADIENTS_REL)
    for name, expected in digests.items():
        assert_digest(actual[name], expected, GRADIENTS_REL)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(tg, variants, name):
    entries, weights, inputs, outputs = variants
    entry = entries[name]
    config = _variant_config(tg, entry, inputs["input_ids"].shape[1])
    case = Case(tg, config, {key: weights[stored] for key, stored in entry["weights"].items()}, inputs)
    with torch.no_grad():
        hidden = case.model.hidden(case.input_ids, case.segments, looping=True)
        actual = {"logits.loop_on.cu": case.model.logits(hidden)}
        for loop in LOOPS:
            for layout in ("cu", "nocu"):
                actual[f"losses.{loop}.{layout}"] = case.losses(loop, layout)
    prefix = f"{name}/"
    stored = {key.removeprefix(prefix): ref for key, ref in outputs.items() if key.startswith(prefix)}
    for key, reference in some(stored, f"{prefix}* in 01_model/variants_outputs.safetensors").items():
        assert_close(actual[key], reference, VALUES_REL)
    for key, mean_loss in entry["mean_loss"].items():
        expected = torch.tensor(mean_loss, dtype=torch.float64)
        assert_close(actual[f"losses.{key}"].mean(), expected, VALUES_REL)
    assert tg.layer_order(config, True) == (entry["encoder_indices"], entry["decoder_indices"])
    assert tg.num_skips(config) == entry["num_skip_weights"]


def _variant_config(tg, entry: dict, length: int):
    """The variant's Config; one whose decoder comes back below the lanes is refused, but can be computed.

    The vectors' rotary base is that of the one length that they have: here, of the documents evaluated.
    """
    config = model_config(tg, entry["config"], eval_seq_len=length, ttt_eval_seq_len=length, ttt_chunk_size=1)
    parallel = [layer >= config.parallel_start_layer > 0 for layer in entry["decoder_indices"]]
    if parallel != sorted(parallel):
        with pytest.raises(tg.ConfigError, match="PARALLEL_START_LAYER"):
            tg.check_settings(config)
    return config


@pytest.fixture(scope="module")
def layer_cases(golden_file) -> list[dict]:
    """Cases of 05_virtual_layers, all of them."""
    return golden_file("05_virtual_layers/virtual_layers.json")


def _layer_case_model(tg, case: dict):
    """An ungated model with the case's layers (no lanes: they would forbid some lists) and width."""
    layers = {key: case[key] for key in ("num_layers", "loop_start", "loop_end", "num_loops", "xsa_last_n")}
    config = tiny_config(tg, **layers, model_dim=case["skip_weights_shape"][1])
    return config, tg.GPT(config)


@pytest.mark.parametrize("index", LAYER_CASES)
def test_virtual_layer_lists(tg, layer_cases, index):
    case = layer_cases[index]
    config, model = _layer_case_model(tg, case)
    assert tg.layer_order(config, True) == (case["looped_encoder"], case["looped_decoder"])
    assert tg.layer_order(config, False) == (case["plain_encoder"], case["plain_decoder"])
    assert tg.num_skips(config) == case["num_skip_weights"]
    assert list(model.skip_weights.shape) == case["skip_weights_shape"]
    assert tg.lora_slots(config, False) == case["lora_slots_plain"]
    assert tg.lora_slots(config, True) == case["lora_slots_looped"]


@pytest.mark.parametrize("index", LAYER_CASES)
def test_virtual_layer_behaviour(tg, layer_cases, index):
    """Visit order, s_i and XSA as a run shows them: |n_i| gives s_i, XSA leaves no component along v."""
    case = layer_cases[index]
    _, model = _layer_case_model(tg, case)
    with torch.no_grad():
        model.tok_emb.weight.normal_(generator=torch.Generator().manual_seed(index))
    for looping in (False, True):
        seen = []
        ids = torch.arange(8).remainder(32).reshape(1, 8)
        model.hidden(
            ids, looping=looping, on_input=lambda name, x, seen=seen: seen.append((name, x.detach()))
        )
        visits = [(name, x) for name, x in seen if name.endswith(".attn.c_q.weight")]
        heads = [x for name, x in seen if name.endswith(".attn.proj.weight")]
        order = "looped" if looping else "plain"
        assert [int(name.split(".")[1]) for name, _ in visits] == case[f"{order}_encoder"] + case[
            f"{order}_decoder"
        ]
        for (name, normed), y in zip(visits, heads, strict=True):
            layer = int(name.split(".")[1])
            rms = normed.double().square().mean().sqrt().item()
            assert rms == pytest.approx(case["ln_scale_factor"][layer], rel=1e-4)
            _assert_xsa(model, layer, normed, y, layer in case["xsa_layers"])


def _assert_xsa(model, layer: int, normed: torch.Tensor, y: torch.Tensor, excluded: bool) -> None:
    """Head outputs y [1, T, D] have no component along their own value vector exactly where XSA acts."""
    weight = model.kv_bank[model.kv_bank.shape[0] // 2 + layer]
    v = (normed @ weight.T).unflatten(-1, (2, -1)).repeat_interleave(2, dim=-2)
    v_unit = torch.nn.functional.normalize(v, dim=-1)
    along = (y.unflatten(-1, (4, -1)) * v_unit).sum(-1).abs()
    if excluded:
        assert along.max() <= 1e-5 * v.norm(dim=-1).max()
    else:  # the first token attends to itself alone: y = v
        assert torch.allclose(along[0, 0], v.norm(dim=-1)[0, 0], rtol=1e-5)


@pytest.fixture(scope="module")
def initial(tg, golden_file):
    """(config, {name: tensor} of a fresh model, {name: expected})."""
    meta = golden_file("05_virtual_layers/initial_values.json")
    torch.manual_seed(5)
    config = model_config(tg, meta["config"])
    return config, {name: p.detach() for name, p in tg.GPT(config).named_parameters()}, meta["parameters"]


def test_initial_values(initial):
    config, parameters, expected = initial
    assert parameters.keys() == expected.keys()
    for name, entry in expected.items():
        tensor = parameters[name]
        assert list(tensor.shape) == entry["shape"], name
        if "values" in entry:
            assert sorted(set(tensor.flatten().tolist())) == entry["values"], name
        for part in entry.get("slices", ()):
            _assert_slice(tensor[part["first"] : part["last"] + 1], part["kind"])
        if "std" in entry:
            std = config.tied_embed_init_std if config.tie_embeddings else 1.0
            _assert_normal(tensor, std)
            assert abs(entry["std"] - std) < SAMPLING_SIGMAS * std / math.sqrt(2 * tensor.numel())
    for layer in range(config.num_layers):
        keep, embedded = parameters[f"blocks.{layer}.resid_mix"]
        assert (keep == 1).all() and not embedded.any()


def _assert_slice(matrices: torch.Tensor, kind: str) -> None:
    """Every matrix of a bank slice is zero, or orthonormal on the named side, and no two are alike."""
    if kind == "zero":
        assert not matrices.any()
        return
    if kind == "orthonormal_columns":
        matrices = matrices.mT
    else:
        assert kind == "orthonormal_rows"
    gram = matrices.double() @ matrices.double().mT
    assert (gram - torch.eye(gram.shape[-1])).abs().max() <= ORTHONORMAL_ABS
    assert len({json.dumps(matrix.flatten()[:8].tolist()) for matrix in matrices}) == len(matrices)


def _assert_normal(tensor: torch.Tensor, std: float) -> None:
    """Mean 0 and the given standard deviation within sampling error."""
    values = tensor.double()
    assert values.mean().abs().item() < SAMPLING_SIGMAS * std / math.sqrt(values.numel())
    assert abs(values.std().item() - std) < SAMPLING_SIGMAS * std / math.sqrt(2 * values.numel())


def test_initial_values_untied(tg, golden_file):
    meta = golden_file("05_virtual_layers/initial_values.json")
    torch.manual_seed(6)
    model = tg.GPT(model_config(tg, meta["config"], tie_embeddings=False))
    _assert_normal(model.tok_emb.weight.detach(), 1.0)
    assert not model.lm_head.weight.any()


def test_initial_embedding_std_follows_its_setting(tg, golden_file):
    meta = golden_file("05_virtual_layers/initial_values.json")
    torch.manual_seed(7)
    settings = {"tied_embed_init_std": 0.02, "qk_gain_init": 2.5, "tie_embeddings": True}
    config = model_config(tg, meta["config"], **settings)
    model = tg.GPT(config)
    _assert_normal(model.tok_emb.weight.detach(), 0.02)
    for layer in range(config.num_layers):
        assert model.get_parameter(f"blocks.{layer}.attn.q_gain").tolist() == [2.5] * config.num_heads


@pytest.mark.parametrize("loop", LOOPS)
def test_trace(tg, golden, monkeypatch, loop):
    """Output of every virtual layer: l2 norm, first components at the last position, both lanes apart."""
    facts, case, _, _ = golden
    outputs = []
    for rule in ("serial", "lanes"):
        original = getattr(tg.Block, rule)

        def recorded(block, *arguments, original=original):
            outputs.append((block.layer, original(block, *arguments)))
            return outputs[-1][1]

        monkeypatch.setattr(tg.Block, rule, recorded)
    input_ids, _, segments = case.rows("cu")
    with torch.no_grad():
        case.model.hidden(input_ids, segments, looping=loop == "loop_on")
    for (layer, output), expected in zip(outputs, facts["trace"][f"{loop}.cu"], strict=True):
        assert layer == expected["layer"]
        assert isinstance(output, tuple) == (expected["kind"] == "parallel")
        lanes = {"_lane0": output[0], "_lane1": output[1]} if isinstance(output, tuple) else {"": output}
        for suffix, lane in lanes.items():
            prefix = f"{suffix[1:]}_" if suffix else ""
            assert lane.double().norm().item() == pytest.approx(expected[f"l2{suffix}"], rel=VALUES_REL)
            assert_close(lane[0, -1, :4], torch.tensor(expected[f"{prefix}first4"]), VALUES_REL)
