"""The model itself: causality, document isolation, adapters, losses, names, sizes (no golden data)."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

BOS = 1
EXACT = 1e-6  # same shapes, same kernels: an unaffected position is bit-identical or within one rounding
ROUNDING = 2e-5  # other shapes (a document alone, one row of a batch): float32 noise, relative to the largest
TINY = {
    "vocab_size": 48,
    "num_layers": 6,
    "model_dim": 24,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_mult": 2.0,
    "rope_dims": 4,
    "train_seq_len": 32,
    "qk_gain_init": 1.5,
    "loop_start": 2,
    "loop_end": 3,
    "parallel_start_layer": 4,
    "xsa_last_n": 4,
    "gate_window": 8,
    "ttt_lora_rank": 3,
    "ttt_lora_alpha": 6.0,
}
NO_SPARSE = {"sparse_attn_gate_enabled": False}
OPTIONS = {
    "record": {},
    "no_loops": {"num_loops": 0},
    "no_lanes": {"parallel_start_layer": 0},
    "single_stream": {"parallel_style": "single"},
    "lane_attn": {"parallel_final_lane": "attn"},
    "lane_mlp": {"parallel_final_lane": "mlp"},
    "out_gate_proj": {**NO_SPARSE, "attn_out_gate_enabled": True},
    "out_gate_q": {**NO_SPARSE, "attn_out_gate_enabled": True, "attn_out_gate_src": "q"},
    "dense_gate": {**NO_SPARSE, "gated_attn_enabled": True},
    "no_gates": {**NO_SPARSE, "smear_gate_enabled": False, "skip_gates_enabled": False},
    "no_bos_mask": {"smear_bos_mask": False},
    "untied": {"tie_embeddings": False},
    "full_rope": {"rope_dims": 0},
    "yarn": {"rope_yarn": True, "train_seq_len": 16},
    "mudd": {"mudd_width": 3},
}
GATES = ("sparse_attn_gate_enabled", "attn_out_gate_enabled", "gated_attn_enabled")


def tiny_model(tg, seed: int = 0, **overrides):
    """A tiny model in which every parameter is random, so that no zero-initialised part is idle."""
    model = tg.GPT(tg.Config(**{**TINY, **overrides}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bank"):
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
            elif name in ("tok_emb.weight", "lm_head.weight"):
                parameter.copy_(noise)
            else:
                parameter.add_(0.4 * noise)
    return model


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids without BOS (2 .. vocab_size - 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, TINY["vocab_size"], shape, generator=generator)


def row_of_documents(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, list[int]]:
    """(one row [1, sum] of documents that start with BOS, their starts)."""
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    row = random_tokens(1, sum(lengths), seed=seed)
    row[0, starts] = BOS
    return row, starts


def random_adapters(tg, config, batch: int, looping: bool, seed: int = 0):
    """Adapters whose B is random instead of zero."""
    generator = torch.Generator().manual_seed(seed)
    lora = tg.BatchedLoRA(config, batch, tg.lora_slots(config, looping), generator)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if name.endswith(".B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return lora


def assert_near(actual: torch.Tensor, expected: torch.Tensor, rel: float = ROUNDING) -> None:
    """max|actual - expected| <= rel * max|expected|, shapes equal."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= rel * expected.abs().max()


# ---- causality


@pytest.mark.parametrize("looping", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_causality(tg, option, looping):
    """Row p has another token at p: every loss before p stays, the one at p changes, for every p at once."""
    model, length = tiny_model(tg, **OPTIONS[option]), 20
    rows = random_tokens(1, length).repeat(length, 1)
    targets = random_tokens(1, length, seed=1).repeat(length, 1)
    changed = rows.clone()
    changed.diagonal().copy_(torch.where(rows.diagonal() == 5, 6, 5))
    changed[7, 7] = BOS
    with torch.no_grad():
        difference = (
            model.losses(changed, targets, looping=looping) - model.losses(rows, targets, looping=looping)
        ).abs()
    assert difference.tril(-1).max() <= EXACT  # row p, columns t < p
    assert difference.diagonal().min() > 10 * EXACT


def test_causality_with_adapters(tg):
    model, length = tiny_model(tg), 16
    rows = random_tokens(1, length).repeat(length, 1)
    changed = rows.clone()
    changed.diagonal().add_(1).remainder_(TINY["vocab_size"])
    lora = random_adapters(tg, model_settings(tg), 1, looping=True)
    lora = expanded(tg, model_settings(tg), lora, length)
    with torch.no_grad():
        before, after = (model.losses(ids, rows, looping=True, lora=lora) for ids in (rows, changed))
    difference = (after - before).abs()
    assert difference.tril(-1).max() <= EXACT
    assert difference.diagonal().min() > 10 * EXACT


def model_settings(tg, **overrides):
    """Config of `tiny_model`."""
    return tg.Config(**{**TINY, **overrides})


def expanded(tg, config, lora, batch: int):
    """The one adapter row of `lora` repeated for a batch."""
    wide = tg.BatchedLoRA(config, batch, tg.lora_slots(config, True))
    wide.load_state_dict({name: tensor.repeat(batch, 1, 1) for name, tensor in lora.state_dict().items()})
    return wide


@pytest.mark.parametrize("position", [3, 11, 12, 25])
def test_causality_with_segments(tg, position):
    """A changed token reaches later positions of its own document only."""
    model = tiny_model(tg)
    row, starts = row_of_documents([11, 9, 1, 13])
    changed = row.clone()
    changed[0, position] = row[0, position] + 1 if row[0, position] < 40 else 7
    segments = tg.document_segments(starts, row.shape[1], 32)
    with torch.no_grad():
        before, after = (model.losses(ids, row, segments, looping=True)[0] for ids in (row, changed))
    difference = (after - before).abs()
    end = min([start for start in starts if start > position], default=row.shape[1])
    assert difference[:position].max() <= EXACT
    assert difference[end:].numel() == 0 or difference[end:].max() <= EXACT
    assert difference[position:end].min() > EXACT


# ---- documents in a packed row


@pytest.mark.parametrize("looping", [False, True])
@pytest.mark.parametrize("option", [name for name in OPTIONS if name not in ("no_bos_mask", "yarn")])
def test_packed_documents_equal_each_alone(tg, option, looping):
    model = tiny_model(tg, **OPTIONS[option])
    lengths = [9, 1, 14, 2, 6]
    row, starts = row_of_documents(lengths)
    targets = random_tokens(1, row.shape[1], seed=1)
    segments = tg.document_segments(starts, row.shape[1], 32)
    with torch.no_grad():
        packed = model.losses(row, targets, segments, looping=looping)
        spans = [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        alone = [model.losses(row[:, span], targets[:, span], looping=looping) for span in spans]
        unsegmented = model.losses(row, targets, looping=looping)
    assert_near(packed, torch.cat(alone, dim=1))
    assert (unsegmented - packed).abs().max() > 0.01  # the documents would see each other otherwise


def test_a_row_may_start_inside_a_document(tg):
    model = tiny_model(tg)
    row = random_tokens(1, 20)
    row[0, 8] = BOS
    segments = tg.document_segments([8], 20, 32)
    with torch.no_grad():
        packed = model.losses(row, row, segments, looping=True)
        alone = [model.losses(part, part, looping=True) for part in (row[:, :8], row[:, 8:])]
    assert_near(packed, torch.cat(alone, dim=1))


def test_padding_of_cu_seqlens_changes_nothing(tg):
    model = tiny_model(tg)
    row, starts = row_of_documents([9, 12])
    segments = [tg.document_segments(starts, 21, 32, bucket=bucket) for bucket in (1, 64)]
    assert [len(segment.cu_seqlens) for segment in segments] == [3, 64]
    with torch.no_grad():
        tight, padded = (model.losses(row, row, segment, looping=True) for segment in segments)
    assert (tight - padded).abs().max() <= EXACT


def test_long_document_without_smear_gate_equals_its_pieces_alone(tg):
    model = tiny_model(tg, smear_gate_enabled=False)
    row, _ = row_of_documents([30])
    segments = tg.document_segments([0], 30, 12)
    assert segments.cu_seqlens.unique().tolist() == [0, 12, 24, 30]
    with torch.no_grad():
        packed = model.losses(row, row, segments, looping=True)
        alone = [model.losses(part, part, looping=True) for part in row.split(12, dim=1)]
    assert_near(packed, torch.cat(alone, dim=1))


def test_smear_gate_alone_crosses_the_cut_of_a_long_document(tg):
    """The last token before a cut reaches the next piece (by the smear gate), the one before it does not."""
    model = tiny_model(tg)
    row, _ = row_of_documents([30])
    segments = tg.document_segments([0], 30, 12)
    with torch.no_grad():
        base = model.losses(row, row, segments, looping=True)[0]
        reached = []
        for position in (10, 11):
            changed = row.clone()
            changed[0, position] = row[0, position] % 40 + 3
            after = model.losses(changed, row, segments, looping=True)[0]
            reached.append((after - base).abs()[12:24].max().item())
    assert reached[0] <= EXACT < 10 * EXACT < reached[1]


# ---- smear gate


@pytest.mark.parametrize("masked", [True, False])
def test_smear_bos_mask(tg, masked):
    """x_t = rms(e_t + g_t e_{t-1}), g_t = 0 at BOS unless the mask is off (the fault of PR #1667)."""
    model = tiny_model(tg, smear_bos_mask=masked)
    row, starts = row_of_documents([5, 2, 6])
    with torch.no_grad():
        actual = model.embed(row)[0]
        e = model.tok_emb.weight[row[0]].double()
        gate = model.get_parameter("smear_gate.weight")[0].double()
        for t in range(1, row.shape[1]):
            g = model.smear_lambda.double() * torch.sigmoid(e[t, : len(gate)] @ gate)
            smeared = e[t] if masked and t in starts else e[t] + g * e[t - 1]
            expected = smeared / (smeared.square().mean() + torch.finfo(torch.float32).eps).sqrt()
            assert (actual[t] - expected).abs().max() < 1e-5
            if t in starts:
                plain = e[t] / e[t].square().mean().sqrt()
                assert ((actual[t] - plain).abs().max() < 1e-5) == masked


def test_without_bos_mask_documents_are_not_isolated(tg):
    """The isolation test above can fail: it does for the published fault."""
    model = tiny_model(tg, smear_bos_mask=False)
    row, starts = row_of_documents([9, 9])
    segments = tg.document_segments(starts, 18, 32)
    with torch.no_grad():
        packed = model.losses(row, row, segments, looping=True)
        alone = model.losses(row[:, 9:], row[:, 9:], looping=True)
    assert (packed[:, 9:] - alone).abs().max() > 0.001


# ---- one forward, no hidden state


@pytest.mark.parametrize("option", ["record", "yarn"])
def test_a_forward_leaves_no_trace(tg, option):
    """Neither the other loop setting, nor a longer row, nor a tap changes what comes after it."""
    model = tiny_model(tg, **OPTIONS[option])
    short, long = random_tokens(2, 20), random_tokens(1, 40)
    with torch.no_grad():
        first = model.losses(short, short, looping=True)
        model.losses(short, short, looping=False)
        model.losses(long, long, looping=True)
        again = model.losses(short, short, looping=True)
        hidden = model.hidden(short, looping=True)
        tapped = model.hidden(short, looping=True, on_input=lambda name, x: None)
    assert torch.equal(first, again)
    assert torch.equal(hidden, tapped)


@pytest.mark.parametrize(
    ("evaluated", "adapted", "stretch"), [(16, 16, 1), (16, 12, 1), (32, 16, 2), (8, 48, 3)]
)
def test_yarn_has_one_base_told_by_the_contexts(tg, evaluated, adapted, stretch):
    """The longest documents evaluated, over those trained on, stretch it in rows of any length."""
    contexts = {"train_seq_len": 16, "eval_seq_len": evaluated, "ttt_eval_seq_len": adapted}
    config = tg.Config(rope_yarn=True, rope_dims=4, rope_base=100.0, **contexts)
    for length in (1, 16, 17, 500):
        cos, sin = tg.rope_tables(config, length, torch.device("cpu"))
        angles = torch.arange(length)[:, None] * torch.tensor([1.0, (100.0 * stretch**2) ** -0.5])
        torch.testing.assert_close(cos[:, 0], angles.cos(), atol=1e-4, rtol=0)
        torch.testing.assert_close(sin[:, 0], angles.sin(), atol=1e-4, rtol=0)


def test_yarn_scores_a_document_alike_in_any_row(tg):
    contexts = {"train_seq_len": 16, "eval_seq_len": 24, "ttt_eval_seq_len": 24}
    model, ids = tiny_model(tg, rope_yarn=True, **contexts), random_tokens(1, 61)
    with torch.no_grad():
        for places in ([0, 20, 40, 60], [0, 20, 60]):
            row, segments = ids[:, : places[-1]], tg.Segments(torch.tensor(places, dtype=torch.int32), 40)
            together = model.losses(row, ids[:, 1 : places[-1] + 1], segments, looping=True)
            alone = model.losses(ids[:, :20], ids[:, 1:21], looping=True)
            torch.testing.assert_close(together[:, :20], alone)


def test_looping_changes_the_result(tg):
    model, ids = tiny_model(tg), random_tokens(1, 16)
    with torch.no_grad():
        off, on = (model.losses(ids, ids, looping=looping) for looping in (False, True))
    assert (on - off).abs().max() > 0.01


@pytest.mark.parametrize("silent", ["qo_bank", "mlp_down_bank", None])
def test_single_stream_parallel_layers(tg, silent):
    """Side by side, both branches read the same input; where one is silent, serial layers do the same."""
    model = tiny_model(tg, parallel_style="single")
    serial = tiny_model(tg, parallel_start_layer=0)
    assert not serial.load_state_dict(model.state_dict(), strict=False).unexpected_keys
    ids, first = random_tokens(1, 16), TINY["parallel_start_layer"]
    inputs: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        if silent:
            for bank in (model.get_parameter(silent), serial.get_parameter(silent)):
                bank[-(TINY["num_layers"] - first) :].zero_()  # output and down matrices of layers 4 and 5
        parallel = model.hidden(ids, looping=True, on_input=inputs.__setitem__)
        difference = (parallel - serial.hidden(ids, looping=True)).abs().max()
    assert difference <= EXACT if silent else difference > 0.01
    for layer in range(TINY["num_layers"]):
        same = torch.equal(inputs[f"blocks.{layer}.attn.c_q.weight"], inputs[f"blocks.{layer}.mlp.fc.weight"])
        assert same == (layer >= first)


# ---- adapters


@pytest.mark.parametrize("looping", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_zero_b_is_bitwise_the_plain_model(tg, option, looping):
    config = model_settings(tg, **OPTIONS[option])
    model, ids = tiny_model(tg, **OPTIONS[option]), random_tokens(3, 24)
    lora = tg.BatchedLoRA(config, 3, tg.lora_slots(config, looping))
    with torch.no_grad():
        plain = model.losses(ids, ids, looping=looping)
        adapted = model.losses(ids, ids, looping=looping, lora=lora)
    assert torch.equal(adapted, plain)


@pytest.mark.parametrize("kind", ["lm_head_lora", "q_loras", "v_loras", "k_loras", "mlp_loras", "o_loras"])
def test_every_adapter_takes_part(tg, kind):
    """A nonzero B in any slot of any kind changes the losses; reset_B takes all of it back."""
    config = model_settings(tg)
    model, ids = tiny_model(tg), random_tokens(1, 12)
    slots = tg.lora_slots(config, True)
    lora = tg.BatchedLoRA(config, 1, slots, torch.Generator().manual_seed(0))
    names = [f"{kind}.B"] if kind == "lm_head_lora" else [f"{kind}.{slot}.B" for slot in range(slots)]
    with torch.no_grad():
        plain = model.losses(ids, ids, looping=True)
        for name in names:
            lora.get_parameter(name).fill_(0.5)
            assert (model.losses(ids, ids, looping=True, lora=lora) - plain).abs().max() > 1e-4, name
            lora.reset_B()
            assert torch.equal(model.losses(ids, ids, looping=True, lora=lora), plain), name


def test_adapter_rows_are_independent(tg):
    config = model_settings(tg)
    model, ids = tiny_model(tg), random_tokens(3, 20)
    lora = random_adapters(tg, config, 3, looping=True)
    with torch.no_grad():
        before = model.losses(ids, ids, looping=True, lora=lora)
        for row in range(3):
            single = tg.BatchedLoRA(config, 1, tg.lora_slots(config, True))
            single.load_state_dict(
                {name: tensor[row : row + 1] for name, tensor in lora.state_dict().items()}
            )
            one = ids[row : row + 1]
            assert_near(before[row : row + 1], model.losses(one, one, looping=True, lora=single))
        for parameter in lora.parameters():
            parameter[1].mul_(-2).add_(0.1)
        changed = ids.clone()
        changed[1] = random_tokens(20, seed=9)
        after = model.losses(changed, ids, looping=True, lora=lora)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert (after[1] - before[1]).abs().min() > EXACT


def test_adapter_scale_is_alpha_over_rank(tg):
    """Twice alpha with half of every B is the same adapter."""
    model, ids = tiny_model(tg), random_tokens(2, 10)
    lora = random_adapters(tg, model_settings(tg), 2, looping=True)
    double_config = model_settings(tg, ttt_lora_alpha=2 * TINY["ttt_lora_alpha"])
    double = tg.BatchedLoRA(double_config, 2, tg.lora_slots(double_config, True))
    halved = {name: t / 2 if name.endswith(".B") else t for name, t in lora.state_dict().items()}
    double.load_state_dict(halved)
    with torch.no_grad():
        expected = model.losses(ids, ids, looping=True, lora=lora)
        assert_near(model.losses(ids, ids, looping=True, lora=double), expected)


# ---- head and losses


@pytest.mark.parametrize("adapted", [False, True])
def test_scored_positions_equal_the_full_losses(tg, adapted):
    model, ids, targets = tiny_model(tg), random_tokens(3, 24), random_tokens(3, 24, seed=1)
    lora = random_adapters(tg, model_settings(tg), 3, looping=True) if adapted else None
    scored = torch.stack(
        [torch.randperm(24, generator=torch.Generator().manual_seed(row))[:7] for row in range(3)]
    )
    with torch.no_grad():
        full = model.losses(ids, targets, looping=True, lora=lora)
        some = model.losses(ids, targets, looping=True, lora=lora, scored=scored)
    assert some.dtype == torch.float32
    assert_near(some, full.gather(1, scored), EXACT)


def test_scored_gradients_equal_those_of_the_full_losses(tg):
    model, ids, targets = tiny_model(tg), random_tokens(2, 16), random_tokens(2, 16, seed=1)
    scored = torch.tensor([[0, 5, 15], [7, 8, 9]])
    grads = []
    for losses in (
        model.losses(ids, targets, looping=True, scored=scored),
        model.losses(ids, targets, looping=True).gather(1, scored),
    ):
        grads.append(
            torch.autograd.grad(losses.sum(), [model.tok_emb.weight, model.qo_bank, model.mlp_up_bank])
        )
    for actual, expected in zip(*grads, strict=True):
        assert_near(actual, expected)


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("cap", [5.0, 30.0])
def test_softcap_formulas_agree(tg, cap, scale):
    """cap tanh(z/cap) = 2 cap sigmoid(2z/cap) - cap, in the logits, the losses and the gradients."""
    model, ids = tiny_model(tg, logit_softcap=cap), random_tokens(2, 12)
    targets = random_tokens(2, 12, seed=1)
    with torch.no_grad():
        model.tok_emb.weight.mul_(scale)
    hidden = model.hidden(ids, looping=True)
    raw = hidden.double() @ model.tok_emb.weight.double().T
    by_sigmoid = 2 * cap * torch.sigmoid(2 * raw / cap) - cap
    assert_near(model.logits(hidden).double(), by_sigmoid)
    by_tanh = cap * torch.tanh(raw / cap)
    losses = model.losses(ids, targets, looping=True)
    oracle = functional.cross_entropy(by_tanh.flatten(0, 1), targets.flatten(), reduction="none").view(2, 12)
    assert torch.isfinite(losses).all()
    assert_near(losses.double(), oracle)
    without_constant = 2 * cap * torch.sigmoid(2 * raw / cap)
    shifted = functional.cross_entropy(without_constant.flatten(0, 1), targets.flatten(), reduction="none")
    assert_near(losses.double().flatten(), shifted)
    parameters = [model.tok_emb.weight, model.mlp_up_bank]
    for actual, expected in zip(
        torch.autograd.grad(losses.mean(), parameters, retain_graph=True),
        torch.autograd.grad(oracle.mean(), parameters),
        strict=True,
    ):
        assert_near(actual, expected, 1e-4)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("option", ["record", "untied"])
def test_full_distribution_sums_to_one(tg, option, adapted):
    """Condition C2: exp(-loss) over all possible targets is a distribution at every position."""
    config = model_settings(tg, **OPTIONS[option])
    model, length = tiny_model(tg, **OPTIONS[option]), 9
    ids = random_tokens(1, length).repeat(config.vocab_size, 1)
    targets = torch.arange(config.vocab_size)[:, None].repeat(1, length)
    lora = None
    if adapted:
        lora = expanded(tg, config, random_adapters(tg, config, 1, looping=True), config.vocab_size)
    with torch.no_grad():
        total = model.losses(ids, targets, looping=True, lora=lora).double().neg().exp().sum(dim=0)
    assert (total - 1).abs().max() < 1e-5


# ---- layer lists


def test_record_layer_lists(tg):
    config = tg.Config()
    assert tg.layer_order(config, True) == ([0, 1, 2, 3, 4, 5, 3, 4], [5, 3, 4, 5, 6, 7, 8, 9, 10])
    assert tg.layer_order(config, False) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 10])
    assert tg.num_skips(config) == 8
    assert (tg.lora_slots(config, True), tg.lora_slots(config, False)) == (17, 11)


@given(data=st.data())
def test_layer_lists_visit_every_layer(tg, data):
    layers = data.draw(st.integers(1, 14), label="num_layers")
    start = data.draw(st.integers(0, layers - 1), label="loop_start")
    end = data.draw(st.integers(start, layers - 1), label="loop_end")
    loops = data.draw(st.integers(0, 4), label="num_loops")
    config = model_settings(
        tg, num_layers=layers, loop_start=start, loop_end=end, num_loops=loops, parallel_start_layer=0
    )
    for looping in (False, True):
        encoder, decoder = tg.layer_order(config, looping)
        order, repeats = encoder + decoder, loops + 1 if looping else 1
        assert len(encoder) == len(order) // 2
        assert [order.count(i) for i in range(layers)] == [
            repeats if start <= i <= end else 1 for i in range(layers)
        ]
        assert all(b - a == 1 or (a, b) == (end, start) for a, b in itertools.pairwise(order))
        assert tg.lora_slots(config, looping) == len(order)
    assert tg.num_skips(config) == min(map(len, tg.layer_order(config, loops > 0)))


# ---- refused settings


@pytest.mark.parametrize("pair", list(itertools.combinations(GATES, 2)), ids="+".join)
def test_two_attention_gates_are_refused(tg, pair):
    with pytest.raises(tg.ConfigError) as error:
        tg.check_settings(tg.Config(**{gate: gate in pair for gate in GATES}))
    assert all(gate.upper() in str(error.value) for gate in pair)


def test_each_attention_gate_alone_is_accepted(tg):
    for chosen in (*GATES, None):
        config = tg.Config(**{gate: gate == chosen for gate in GATES})
        assert [gate for gate in GATES if getattr(config, gate)] == ([chosen] if chosen else [])


def test_decoder_returning_below_the_lanes_is_refused(tg):
    with pytest.raises(tg.ConfigError, match="PARALLEL_START_LAYER"):
        tg.check_settings(model_settings(tg, parallel_start_layer=3))
    assert model_settings(tg, parallel_start_layer=3, num_loops=0).parallel_start_layer == 3


# ---- names and sizes (SPEC section 3)


def meta_shapes(tg, **overrides) -> dict[str, tuple[int, ...]]:
    """State-dict names and shapes of the model at the defaults plus overrides, without memory."""
    with torch.device("meta"):
        model = tg.GPT(tg.Config(**overrides))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def record_shapes() -> dict[str, tuple[int, ...]]:
    """SPEC section 3: V 8192, D 512, L 11, H 8, K*d 256, F 2048, S 8."""
    shapes = {
        "tok_emb.weight": (8192, 512),
        "qo_bank": (22, 512, 512),
        "kv_bank": (22, 256, 512),
        "mlp_up_bank": (11, 2048, 512),
        "mlp_down_bank": (11, 512, 2048),
        "skip_weights": (8, 512),
        "skip_gates": (8, 512),
        "parallel_post_lambdas": (11, 2, 2),
        "parallel_resid_lambdas": (11, 2),
        "smear_gate.weight": (1, 12),
        "smear_lambda": (1,),
    }
    block = {"attn.q_gain": (8,), "attn.attn_gate_w": (8, 12), "attn_scale": (512,), "mlp_scale": (512,)}
    for layer in range(11):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
        shapes[f"blocks.{layer}.resid_mix"] = (2, 512)
    return shapes


def without(shapes: dict, *parts: str) -> dict:
    """Shapes less the names that contain one of the parts."""
    return {name: shape for name, shape in shapes.items() if not any(part in name for part in parts)}


def test_record_state_dict(tg):
    assert meta_shapes(tg) == record_shapes()


def test_record_parameter_count(tg):
    with torch.device("meta"):
        model = tg.GPT(tg.Config())
    assert sum(parameter.numel() for parameter in model.parameters()) == 35_945_671
    assert dict(model.named_parameters()).keys() == record_shapes().keys()


def test_state_dict_of_the_options(tg):
    record = record_shapes()
    assert meta_shapes(tg, tie_embeddings=False) == {**record, "lm_head.weight": (8192, 512)}
    assert meta_shapes(tg, skip_gates_enabled=False) == without(record, "skip_gates")
    assert meta_shapes(tg, smear_gate_enabled=False) == without(record, "smear_")
    ungated = without(record, "attn_gate_w")
    assert meta_shapes(tg, sparse_attn_gate_enabled=False) == ungated
    out_gate = {f"blocks.{layer}.attn.attn_gate_proj.weight": (8, 12) for layer in range(11)}
    assert meta_shapes(tg, **OPTIONS["out_gate_q"]) == {**ungated, **out_gate}
    dense = {f"blocks.{layer}.attn.attn_gate_w": (8, 512) for layer in range(11)}
    assert meta_shapes(tg, **OPTIONS["dense_gate"]) == {**ungated, **dense}


def test_adapter_names(tg):
    config = tg.Config()
    with torch.device("meta"):
        lora = tg.BatchedLoRA(config, 2, tg.lora_slots(config, True))
    shapes = {name: tuple(tensor.shape) for name, tensor in lora.state_dict().items()}
    expected = {"lm_head_lora.A": (2, 96, 512), "lm_head_lora.B": (2, 8192, 96)}
    widths = {"q": 512, "k": 256, "v": 256, "o": 512, "mlp": 512}
    for (kind, width), slot in itertools.product(widths.items(), range(17)):
        expected[f"{kind}_loras.{slot}.A"] = (2, 96, 512)
        expected[f"{kind}_loras.{slot}.B"] = (2, width, 96)
    assert shapes == expected
