"""Every setting below, at and beyond its bounds: refused before the start by name, or really usable."""

import dataclasses
import random

import pytest

from bench import settings

FIELDS = {field.name.upper(): field for field in dataclasses.fields(settings.tg.Config)}


@pytest.mark.parametrize("name", FIELDS)
def test_every_value_is_a_value_or_refused_by_name(name):
    ends = {text: settings.accepted(name, text) for text in settings.values(FIELDS[name])}
    assert any(ends.values())
    if settings.tg.base_type(FIELDS[name].type) is not str:
        assert not any(ends[text] for text in settings.NOT_NUMBERS), ends


@pytest.mark.parametrize(
    "name",
    ["NUM_LAYERS", "MODEL_DIM", "TRAIN_BATCH_TOKENS", "TTT_LORA_RANK", "MLP_MULT", "PHASED_TTT_NUM_PHASES"],
)
def test_numbers_have_an_upper_end(name):
    assert not settings.accepted(name, "1" + "0" * 30)


def test_settings_of_a_run_are_usable_or_refused_before_it():
    """Whole runs in processes of their own: a sample of what `bench/settings.py` does for all."""
    rng = random.Random(0)
    wanted = {name: rng.choice(settings.values(field)) for name, field in FIELDS.items()}
    chosen = dict(rng.sample(sorted(wanted.items()), 5))
    chosen |= {"FLOAT16_MAX_ELEMENTS": "0", "MODEL_PATH": "..", "MODEL_DIM": "1000000", "TTT_LR": "1000000.0"}
    chosen |= {"TRAIN_BATCH_TOKENS": "786432", "TTT_BATCH_SIZE": "1000000000", "QK_GAIN_INIT": "1000000.0"}
    chosen |= {"GATED_ATTN_INIT_STD": "100.0", "TIED_EMBED_INIT_STD": "100.0"}
    ends = {(name, text): end for name, text, end, _ in settings.try_all(list(chosen.items()))}
    assert {key: end for key, end in ends.items() if end == "WRONG"} == {}
    for name in ("MODEL_PATH", "MODEL_DIM", "TRAIN_BATCH_TOKENS", "TTT_BATCH_SIZE", "QK_GAIN_INIT"):
        assert ends[name, chosen[name]] == "refused"
    for name in ("FLOAT16_MAX_ELEMENTS", "GATED_ATTN_INIT_STD", "TIED_EMBED_INIT_STD"):
        assert ends[name, chosen[name]] == "works"
