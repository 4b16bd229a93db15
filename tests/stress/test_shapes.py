"""Random model settings: refused in one line that names a variable, or a model that computes and is kept."""

import random

import pytest
import torch
from test_ttt import random_model

from bench.settings import TINY

SWITCHES = """
    TIE_EMBEDDINGS ROPE_YARN LN_SCALE SKIP_GATES_ENABLED SMEAR_GATE_ENABLED SMEAR_BOS_MASK PLAIN_WINDOWS
    GATED_ATTN_QUANT_GATE LQER_ENABLED LQER_ASYM_ENABLED
"""
CHOICES = {
    **dict.fromkeys(SWITCHES.split(), (0, 1)),
    "VOCAB_SIZE": (4, 5, 33, 64, 100),
    "TRAIN_SEQ_LEN": (1, 2, 7, 16, 32),
    "NUM_LAYERS": (1, 2, 3, 4, 5, 7),
    "MLP_MULT": (0.13, 0.5, 1, 2.7, 4),
    "LOGIT_SOFTCAP": (0.5, 5, 30, 1000),
    "ROPE_BASE": (0.5, 1, 100, 10_000),
    "ROPE_DIMS": (0, 0, 2, 4, 6),
    "NUM_LOOPS": (0, 1, 2, 3),
    "LOOP_START": range(4),
    "LOOP_END": range(5),
    "PARALLEL_START_LAYER": range(7),
    "PARALLEL_STYLE": ("lanes", "single"),
    "PARALLEL_FINAL_LANE": ("mean", "attn", "mlp"),
    "XSA_LAST_N": (0, 1, 2, 5, 11),
    "GATE_WINDOW": (1, 3, 4, 8),
    "MUDD_WIDTH": (0, 0, 1, 3),
    "SPARSE_ATTN_GATE_SCALE": (-2, 0, 0.5, 1),
    "ATTN_OUT_GATE_SRC": ("proj", "q"),
    "QK_GAIN_INIT": (-1, 0, 1, 5),
    "FLOAT16_MAX_ELEMENTS": (0, 64, 300, 65_536),
    "MATRIX_BITS": range(2, 9),
    "EMBED_BITS": range(2, 9),
    "LQER_RANK": (1, 2, 4, 9),
    "LQER_TOP_K": (0, 1, 3, 50),
    "LQER_ASYM_GROUP": (1, 3, 16, 64),
    "COMPRESSOR": ("brotli", "lzma", "ans"),
}
GATES = ("SPARSE_ATTN_GATE_ENABLED", "ATTN_OUT_GATE_ENABLED", "GATED_ATTN_ENABLED")
WRONG = {  # what a shape must not be, now and then
    "MODEL_DIM": (1, 7, 10, 12),
    "NUM_HEADS": (3, 5),
    "NUM_KV_HEADS": (3, 4, 5),
    "ROPE_DIMS": (1, 3, 64),
    "GATE_WINDOW": (0, 100),
    "LOOP_END": (0, 9),
    "LOOP_START": (5,),
    "MLP_MULT": (0.001, 0),
    "MATRIX_BITS": (1, 9),
    **dict.fromkeys(GATES, (0, 1)),
}


def draw(tg, rng: random.Random):
    """A model's settings, or None where they were refused as they must be."""
    heads, groups = rng.choice((1, 2, 3)), rng.choice((1, 2))
    shape = {"NUM_KV_HEADS": groups, "NUM_HEADS": heads * groups}
    shape["MODEL_DIM"] = heads * groups * rng.choice((2, 4, 6, 8))
    chosen = shape | {name: rng.choice(values) for name, values in CHOICES.items()}
    gate = rng.choice((None, *GATES))
    chosen |= {name: int(name == gate) for name in GATES}
    chosen["LOOP_END"] = min(chosen["LOOP_END"], chosen["NUM_LAYERS"] - 1)
    chosen["LOOP_START"] = min(chosen["LOOP_START"], chosen["LOOP_END"])
    if rng.random() < 0.25:
        chosen |= {name: rng.choice(WRONG[name]) for name in rng.sample(sorted(WRONG), 2)}
    print(*(f"{name}={value}" for name, value in chosen.items()))
    try:
        return tg.read_settings(TINY | {name: str(value) for name, value in chosen.items()})
    except tg.ConfigError as error:
        assert "\n" not in str(error) and any(name in str(error) for name in chosen)
        return None


@pytest.mark.cases(960)
def test_shapes_compute(tg, float64, rng):
    """Documents in one packed row have the losses that each has alone, and every gradient is finite."""
    if (cfg := draw(tg, rng)) is None:
        return
    looping, model = rng.random() < 0.5, random_model(tg, cfg, rng.randrange(1000))
    lengths = [rng.randint(1, cfg.train_seq_len) for _ in range(rng.randint(1, 5))]
    row = torch.tensor([rng.randrange(2, cfg.vocab_size) for _ in range(sum(lengths) + 1)])
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    row[starts] = 1
    x, y, segments = tg.packed_row(row, cfg.train_seq_len, cfg.plain_windows)
    packed = model.losses(x, y, segments, looping=looping)
    packed.mean().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert packed.isfinite().all() and all(grad.isfinite().all() for grad in grads)
    # By design rows of windows have no documents, and PR #1667's SmearGate leaks.
    leaks = cfg.smear_gate_enabled and not cfg.smear_bos_mask
    if cfg.plain_windows or leaks:
        return
    parts = [part.split(lengths, 1) for part in (x, y)]
    alone = [model.losses(*part, looping=looping) for part in zip(*parts, strict=True)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.cases(480)
def test_shapes_are_kept(tg, rng):
    """Banks taken apart and put together, and the model that knows nothing but the artifact."""
    if (cfg := draw(tg, rng)) is None:
        return
    state = random_model(tg, cfg, rng.randrange(1000)).state_dict()
    flat = tg.flatten_banks(state, cfg.num_layers)
    restored = tg.restore_banks(flat, cfg.num_layers)
    assert restored.keys() == state.keys()
    assert all(torch.equal(restored[name], tensor) for name, tensor in state.items())
    hessians = {name: torch.eye(tensor.size(-1)) for name, tensor in flat.items() if tensor.ndim == 2}
    records = tg.quantize_state(flat, hessians, cfg)
    settings, read = tg.read_artifact(tg.pack_artifact(records, cfg), tg.Config())
    assert settings == cfg.model_settings() | {"compressor": cfg.compressor, "quantizer": "scalar"}
    model = tg.GPT(tg.Config(**settings))
    model.load_state_dict(tg.dequantize_state(read, cfg.num_layers))
    for name, record in records.items():
        assert all(torch.equal(read[name].arrays[key], array) for key, array in record.arrays.items()), name
    for name, tensor in tg.dequantize_state(records, cfg.num_layers).items():
        assert tensor.isfinite().all(), name
        # Equal arrays: MKL rounds a product of other strides otherwise.
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
