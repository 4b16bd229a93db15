"""Test-time training on random documents against its plain form."""

import copy
import random

import pytest
import torch
from oracle_ttt import plain_ttt
from test_ttt import TINY, document_losses, random_model, validation


def stream(rng: random.Random, lengths: list[int]) -> torch.Tensor:
    """Documents of these lengths, each starting with BOS."""
    return torch.tensor([token for n in lengths for token in (1, *rng.choices(range(2, 64), k=n - 1))])


def draw(rng: random.Random, documents: int) -> dict[str, object]:
    """Settings of an evaluation; the plain form knows no guard, no cache and one chunk size."""
    batch, chunk = rng.choice((1, 2, 3, 5, 9)), rng.randint(1, 16)
    loops, end = rng.choice((0, 1, 1, 2)), rng.randint(0, 1)
    chosen = {
        "num_loops": loops,
        "loop_end": end,
        "parallel_start_layer": rng.choice((0, end + 1)),
        "parallel_style": rng.choice(("lanes", "single")),
        "ttt_batch_size": batch,
        "ttt_chunk_size": chunk,
        "ttt_eval_seq_len": max(chunk, rng.choice((1, 8, 20, 32, 100))),
        "ttt_lora_rank": rng.randint(1, 3),
        "ttt_lora_alpha": rng.choice((0.5, 2.0)),  # larger ones make chaos of rounding errors
        "ttt_lora_lr": rng.choice((0.0, 1e-3, 0.01 if chunk > 1 else 1e-4)),
        "ttt_beta2": rng.choice((0.9, 0.999)),
        "ttt_weight_decay": rng.choice((0.0, 1.0, 30.0)),
        "ttt_guard": 0.0,
        "val_doc_fraction": rng.choice((1.0, 1.0, 0.6)),
        "phased_ttt_prefix_docs": rng.choice((0, 1, documents // 2, documents, documents + 5)),
        "phased_ttt_num_phases": rng.randint(1, 5),
        "global_ttt_epochs": rng.randint(1, 2),
        "global_ttt_respect_doc_boundaries": rng.random() < 0.7,
        "seed": rng.randrange(100),
    }
    chosen |= {f"ttt_{role}_lora": rng.random() < 0.8 for role in ("q", "k", "v", "o", "mlp")}
    if batch == 1 or documents // batch < 2:  # no batch inherits rows whose momentum rests here, not there
        chosen["ttt_beta1"] = rng.choice((0.0, 0.5))
    return chosen


@pytest.mark.cases(270)
def test_adaptation_is_that_of_the_plain_form(tg, float64, rng):
    """Losses document by document: no padding, finished rows dropped, the last layer at the chunk only."""
    lengths = [rng.choice((1, 2, rng.randint(1, 20), rng.randint(1, 60))) for _ in range(rng.randint(1, 12))]
    lengths[-1] = max(lengths[-1], 2)  # a lone BOS at the end is no document
    settings = draw(rng, len(lengths))
    print(lengths, settings)
    cfg = tg.Config(**TINY | settings)
    model, val = random_model(tg, cfg, rng.randrange(1000)), validation(tg, stream(rng, lengths))
    expected = plain_ttt(tg, copy.deepcopy(model), val, cfg, looping=cfg.num_loops > 0)
    actual = document_losses(tg, model, val, cfg, looping=cfg.num_loops > 0)
    # A token that sees itself only: many gradients are zero but for rounding, and AdamW steps by their signs.
    assert actual == pytest.approx(expected, rel=1e-6 if cfg.ttt_chunk_size > 1 else 1e-3)
