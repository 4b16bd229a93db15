"""Settings: the defaults are the record, every variable parses, everything wrong is refused by name."""

import ast
import dataclasses
import difflib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from patience import PATIENCE

from harness.rules import TAKEN
from harness.settings import PRESETS

ROOT = Path(__file__).resolve().parents[2]

# What the published log of PR #1851, seed 42, prints under "Hyperparameters", less paths and names of the
# run, GRAD_ACCUM_STEPS (derived there from 8 ranks) and VAL_LOSS_EVERY (4000 there; off the clock, 0 here).
RECORD = {
    "adam_eps": 1e-08,
    "adam_wd": 0.02,
    "artifact_dir": "",
    "attn_clip_sigmas": 13.0,
    "attn_out_gate_enabled": False,
    "attn_out_gate_src": "proj",
    "beta1": 0.9,
    "beta2": 0.95,
    "caseops_enabled": True,
    "compressor": "brotli",
    "data_dir": "./data/",
    "ema_decay": 0.9965,
    "embed_bits": 7,
    "embed_clip_sigmas": 15.0,
    "embed_lr": 0.6,
    "embed_wd": 0.085,
    "enable_looping_at": 0.35,
    "eval_seq_len": 2048,
    "gate_window": 12,
    "gated_attn_enabled": False,
    "gated_attn_init_std": 0.01,
    "gated_attn_quant_gate": False,
    "global_ttt_batch_seqs": 32,
    "global_ttt_chunk_tokens": 32768,
    "global_ttt_epochs": 1,
    "global_ttt_grad_clip": 1.0,
    "global_ttt_lr": 0.001,
    "global_ttt_momentum": 0.9,
    "global_ttt_respect_doc_boundaries": True,
    "global_ttt_warmup_chunks": 0,
    "global_ttt_warmup_start_lr": 0.0,
    "gptq_calibration_batches": 16,
    "gptq_reserve_seconds": 0.5,
    "grad_clip_norm": 0.3,
    "iterations": 20000,
    "ln_scale": True,
    "logit_softcap": 30.0,
    "loop_end": 5,
    "loop_start": 3,
    "lqer_asym_enabled": True,
    "lqer_asym_group": 64,
    "lqer_enabled": True,
    "lqer_factor_bits": 4,
    "lqer_rank": 4,
    "lqer_top_k": 3,
    "matrix_bits": 6,
    "matrix_clip_sigmas": 12.85,
    "matrix_lr": 0.026,
    "max_wallclock_seconds": 600.0,
    "min_lr": 0.1,
    "mlp_clip_sigmas": 12.0,
    "mlp_mult": 4.0,
    "model_dim": 512,
    "model_path": "final_model.pt",
    "muon_backend_steps": 5,
    "muon_momentum": 0.97,
    "muon_momentum_warmup_start": 0.92,
    "muon_momentum_warmup_steps": 1500,
    "muon_row_normalize": True,
    "muon_wd": 0.095,
    "num_heads": 8,
    "num_kv_heads": 4,
    "num_layers": 11,
    "num_loops": 2,
    "parallel_final_lane": "mean",
    "parallel_start_layer": 8,
    "phased_ttt_num_phases": 3,
    "phased_ttt_prefix_docs": 2000,
    "qk_gain_init": 5.0,
    "quantized_model_path": "final_model.int6.ptz",
    "rope_base": 10000.0,
    "rope_dims": 16,
    "rope_yarn": False,
    "scalar_lr": 0.02,
    "seed": 42,
    "skip_gates_enabled": True,
    "smear_gate_enabled": True,
    "sparse_attn_gate_enabled": True,
    "sparse_attn_gate_init_std": 0.0,
    "sparse_attn_gate_scale": 1.0,
    "tie_embeddings": True,
    "tied_embed_init_std": 0.005,
    "tied_embed_lr": 0.03,
    "train_batch_tokens": 786432,
    "train_log_every": 500,
    "train_seq_len": 2048,
    "ttt_batch_size": 64,
    "ttt_beta1": 0.0,
    "ttt_beta2": 0.999,
    "ttt_chunk_size": 48,
    "ttt_enabled": True,
    "ttt_eval_seq_len": 2048,
    "ttt_grad_steps": 1,
    "ttt_k_lora": True,
    "ttt_lora_lr": 0.0001,
    "ttt_lora_rank": 96,
    "ttt_mlp_lora": True,
    "ttt_o_lora": True,
    "ttt_weight_decay": 1.0,
    "val_batch_tokens": 524288,
    "val_doc_fraction": 1.0,
    "vocab_size": 8192,
    "warmdown_frac": 0.75,
    "warmup_steps": 20,
    "xsa_last_n": 11,
}
# Read outside the published configuration, so its log does not print them: the source of PR #1851 has these.
RECORD |= {
    "ttt_lora_alpha": 144.0,
    "ttt_warm_start_a": True,
    "smear_bos_mask": True,
    "parallel_style": "lanes",
    "muon_coefficients": "polar_express",
    "float16_max_elements": 65536,
}
OURS = {"preset", "device", "cpu_threads", "run_id", "data_path", "tokenizer_path", "grad_accum_steps"}
OURS |= {"attention_backend", "triton_kernels", "compile_backend"}
OURS |= {"sliding_window_enabled", "eval_stride", "ttt_sgd", "ttt_lr", "ttt_epochs", "ttt_momentum"}
OURS |= {
    "ttt_chunk_tokens",
    "ttt_chunk_by_length",
    "ttt_cache_window",
    "ttt_guard",
    "ttt_q_lora",
    "ttt_v_lora",
}
OURS |= {"prequant_only", "quantize_only", "ttt_eval_only", "val_loss_every", "clip_global", "fit_bytes"}
OURS |= {"preflight_only", "wd_taper_start_frac", "wd_taper_final_mult"}
OURS |= {"allow_unverified_data", "audit", "wandb_project", "tensorboard_dir", "plain_windows"}
OURS |= {"checkpoint_seconds", "resume", "quantizer", "gptq_drift_batches", "muon_maxwell", "ngram_tilt"}
OURS |= {"mudd_width"}

# What else a setting's other value needs, so that the whole makes sense.
COMPANIONS = {
    "TTT_CACHE_WINDOW": {"TTT_CHUNK_SIZE": "2"},
    "ATTN_OUT_GATE_ENABLED": {"SPARSE_ATTN_GATE_ENABLED": "0"},
    "GATED_ATTN_ENABLED": {"SPARSE_ATTN_GATE_ENABLED": "0"},
    "NUM_KV_HEADS": {"NUM_HEADS": "8"},
    "QUANTIZER": {"COMPRESSOR": "ans"},
    "GPTQ_DRIFT_BATCHES": {"FIT_BYTES": "16000000"},
}
OTHER_VALUES = {  # where twice the default is out of range or makes no sense
    "TTT_CHUNK_BY_LENGTH": "256:8,2000:24",
    "NGRAM_TILT": "16:2.62",
    "MUDD_WIDTH": "32",
    "FIT_BYTES": "16000000",
    "TRITON_KERNELS": "loss,mlp",
    "PRESET": "pr1855",
    "LOOP_START": "4",
    "LOOP_END": "4",
    "PARALLEL_START_LAYER": "9",
    "NUM_LAYERS": "12",
    "MATRIX_BITS": "5",
    "EMBED_BITS": "8",
    "LQER_FACTOR_BITS": "2",
    "MUON_BACKEND_STEPS": "3",
    "VOCAB_SIZE": "1024",
    "GPTQ_RESERVE_SECONDS": "8.0",
}


@pytest.fixture(scope="session")
def fields(tg) -> dict[str, dataclasses.Field]:
    """Every setting by its variable's name."""
    return {field.name.upper(): field for field in dataclasses.fields(tg.Config)}


def kind(field: dataclasses.Field) -> type:
    """bool, int, float or str."""
    if get_origin(field.type) is Literal:
        return str
    return get_args(field.type)[0] if get_args(field.type) else field.type


def choices(field: dataclasses.Field) -> tuple[str, ...]:
    return get_args(field.type) if get_origin(field.type) is Literal else ()


def bounds(field: dataclasses.Field) -> tuple[float, float, bool]:
    """Lowest and highest value, and: is the lowest itself excluded?"""
    interval = get_args(field.type)[1]
    return interval.low, interval.high, interval.above


def as_text(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def other_value(name: str, field: dataclasses.Field) -> str:
    """A legal value that is not the default."""
    if name in OTHER_VALUES:
        return OTHER_VALUES[name]
    if choices(field):
        return next(choice for choice in choices(field) if choice != field.default)
    if kind(field) is bool:
        return as_text(not field.default)
    if kind(field) is str:
        return "some/where" if name.endswith(("DIR", "PATH")) else "some-name"
    low, high, _ = bounds(field)
    doubled = 2 * field.default if field.default else 2 if kind(field) is int else 0.5
    return as_text(doubled if low <= doubled <= high else field.default / 2)


def refusal(tg, environ: dict[str, str]) -> str:
    """The message with which an environment is refused."""
    with pytest.raises(tg.ConfigError) as caught:
        tg.read_settings(environ)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- the record and the presets


def test_defaults_are_the_record(tg):
    cfg = tg.Config()
    assert {name: getattr(cfg, name) for name in RECORD} == RECORD
    types = {name: type(value) for name, value in RECORD.items()}
    assert {name: type(getattr(cfg, name)) for name in RECORD} == types


def test_every_setting_is_in_the_table_or_ours(fields):
    """A new setting must say which of the two it is."""
    assert {name.lower() for name in fields} == RECORD.keys() | OURS


def test_empty_environment_is_the_record(tg):
    assert tg.read_settings({}) == tg.Config()
    assert tg.read_settings({"PRESET": "pr1851"}) == tg.Config()


def test_micro_batches_of_the_record(tg):
    """Eight micro-batches a step, shared by up to eight ranks; of more ranks each has one."""
    cfg, shared = tg.Config(), {}
    for world in (1, 2, 4, 8, 16):
        tg.check_micro_batches(cfg, world)
        backends = tg.plain_backends(cfg, tg.Ranks(torch.device("cpu"), world_size=world))
        shared[world], tokens = tg.micro_batches(cfg, backends, world)
        assert shared[world] * world * tokens == cfg.train_batch_tokens
    assert shared == {1: 8, 2: 4, 4: 2, 8: 1, 16: 1}


def test_every_preset_builds(tg):
    for preset, values in PRESETS.items():
        cfg = tg.read_settings({"PRESET": preset})
        assert cfg.preset == preset
        assert {name: getattr(cfg, name) for name in values} == values
        assert tg.micro_batches(cfg, tg.plain_backends(cfg, tg.CPU), 1)[0] == cfg.grad_accum_steps


def test_demo_preset_has_every_component(tg):
    cfg = tg.read_settings({"PRESET": "demo"})
    assert cfg.num_loops and cfg.parallel_start_layer and cfg.lqer_enabled and cfg.ttt_enabled
    assert cfg.skip_gates_enabled and cfg.smear_gate_enabled and cfg.sparse_attn_gate_enabled
    assert cfg.phased_ttt_num_phases > 1 and cfg.xsa_last_n and cfg.caseops_enabled


def test_script_alone_knows_the_record_and_the_demo(tg):
    """`Config.from_env` is what a script without harness/ has: no other systems, no search for typos."""
    names = ("pr1851", "demo")
    for preset in names:
        given = {"PRESET": preset, "SEED": "7"}
        assert tg.Config.from_env(given) == tg.read_settings(given)
    with pytest.raises(tg.ConfigError, match="PRESET='pr1855': must be one of pr1851, demo"):
        tg.Config.from_env({"PRESET": "pr1855"})
    assert tg.Config.from_env({"TTT_LORA_RNAK": "1"}) == tg.Config()


def test_explicit_variables_win_over_the_preset(tg, fields):
    for preset, values in PRESETS.items():
        for changed in values:
            name = changed.upper()
            given = {name: as_text(fields[name].default)}
            assert given.keys().isdisjoint({"PRESET"})
            try:
                cfg = tg.read_settings({"PRESET": preset, **given})
            except tg.ConfigError as error:  # one default alone need not fit the preset's other values
                assert not re.search(r"must be (a number|a whole|0 or 1|one of)", str(error))
            else:
                assert getattr(cfg, changed) == fields[name].default, (preset, name)


def test_one_explicit_variable_keeps_the_rest_of_the_preset(tg):
    cfg = tg.read_settings({"PRESET": "pr1855", "TTT_LORA_RANK": "16"})
    assert cfg == dataclasses.replace(tg.read_settings({"PRESET": "pr1855"}), ttt_lora_rank=16)


@pytest.mark.parametrize("preset", ["", "PR1851", "pr1850", "record"])
def test_unknown_preset(tg, preset):
    message = refusal(tg, {"PRESET": preset})
    assert f"PRESET={preset!r}" in message
    assert all(known in message for known in PRESETS)


# -- parsing


def test_every_default_parses_to_itself(tg, fields):
    environ = {name: as_text(field.default) for name, field in fields.items()}
    assert tg.read_settings(environ) == tg.Config()
    for name, field in fields.items():
        value = getattr(tg.read_settings({name: as_text(field.default)}), field.name)
        assert value == field.default and type(value) is type(field.default), name


def test_every_variable_changes_its_setting(tg, fields):
    for name, field in fields.items():
        text = other_value(name, field)
        cfg = tg.read_settings(COMPANIONS.get(name, {}) | {name: text})
        value = getattr(cfg, field.name)
        assert type(value) is kind(field), name
        assert as_text(value) == text and value != field.default, name


def test_booleans_have_four_spellings(tg, fields):
    for name, field in fields.items():
        if kind(field) is not bool or name.endswith("_ONLY"):
            continue
        for text, value in {"0": False, "1": True, "false": False, "True": True}.items():
            environ = (COMPANIONS.get(name, {}) if value else {}) | {name: text}
            assert getattr(tg.read_settings(environ), field.name) is value


@pytest.mark.parametrize(
    "text", ["", " ", "abc", "nan", "inf", "-inf", "1e999", "None", "1,5", "0x10", "--1"]
)
def test_what_is_no_number_is_refused_everywhere(tg, fields, text):
    for name, field in fields.items():
        if kind(field) is str:
            continue
        message = refusal(tg, {name: text})
        assert message.startswith(f"{name}="), message
        if kind(field) is bool:
            assert repr(text) in message and "0 or 1" in message
        elif kind(field) is int:
            assert repr(text) in message and "a whole number" in message
        else:
            shown = repr(text) if text not in ("nan", "inf", "-inf", "1e999") else str(float(text))
            assert shown in message and "a number" in message


@pytest.mark.parametrize("text", ["1.5", "1e3", "2.0"])
def test_whole_numbers_are_whole(tg, fields, text):
    for name, field in fields.items():
        if kind(field) is int:
            assert refusal(tg, {name: text}).startswith(f"{name}={text!r}: must be a whole number")


@pytest.mark.parametrize("text", ["2", "-1", "yes", "on", "TRUE!"])
def test_booleans_are_boolean(tg, fields, text):
    for name, field in fields.items():
        if kind(field) is bool:
            assert refusal(tg, {name: text}) == f"{name}={text!r}: must be 0 or 1"


def test_out_of_range_is_refused_with_the_range(tg, fields):
    for name, field in fields.items():
        if kind(field) in (bool, str):
            continue
        low, high, excluded = bounds(field)
        step = 1 if kind(field) is int else 1e-3
        outside = [low if excluded else low - step] * (low > -math.inf)
        outside += [low - 10**6] * (low > -math.inf) + [high + step] * (high < math.inf)
        for value in outside:
            message = refusal(tg, {name: as_text(value)})
            assert message.startswith(f"{name}={kind(field)(value)!r}: must be "), message
            assert "above" in message if excluded else "at least" in message
            ends = [end for end in (low, high) if math.isfinite(end)]
            written = [str(int(end)) if float(end).is_integer() else repr(end) for end in ends]
            assert set(written) <= set(re.findall(r"[^ ,]+", message)), message


def test_reserve_beyond_the_budget_is_refused_with_both_written_whole(tg):
    message = refusal(tg, {"MAX_WALLCLOCK_SECONDS": "1000000", "GPTQ_RESERVE_SECONDS": "1e6"})
    assert message == "GPTQ_RESERVE_SECONDS=1000000: must be below MAX_WALLCLOCK_SECONDS=1000000"


def test_ends_of_the_range_are_allowed(tg, fields):
    """As far as the setting alone goes: what other settings say about it is a message of another form."""
    for name, field in fields.items():
        if kind(field) in (bool, str):
            continue
        low, high, excluded = bounds(field)
        for value in {low, high}:
            if math.isfinite(value) and not (excluded and value == low):
                try:
                    cfg = tg.read_settings({name: as_text(kind(field)(value))})
                except tg.ConfigError as error:
                    assert not re.match(rf"{name}=\S+: must be a(t least)? (whole )?number", str(error))
                else:
                    assert getattr(cfg, field.name) == value


def test_unknown_choice_is_refused_with_the_choices(tg, fields):
    for name, field in fields.items():
        for wrong in ("", "zebra", as_text(field.default).upper()) if choices(field) else ():
            message = refusal(tg, {name: wrong})
            assert message == f"{name}={wrong!r}: must be one of {', '.join(choices(field))}"


@given(st.data())
def test_any_text_is_either_a_value_or_refused_by_name(tg, fields, data):
    name = data.draw(st.sampled_from(sorted(fields)))
    text = data.draw(st.text(max_size=8) | st.integers().map(str) | st.floats().map(str))
    try:
        cfg = tg.read_settings({name: text})
    except tg.ConfigError as error:
        assert name in str(error) or "PRESET" in str(error) or "must be" in str(error)
    else:
        value = getattr(cfg, fields[name].name)
        assert isinstance(value, kind(fields[name]))
        assert kind(fields[name]) is not float or math.isfinite(value)


def test_values_of_a_wrong_type_are_refused_in_the_constructor(tg, fields):
    """Presets and artifacts do not pass through text."""
    wrong = {bool: [1, "1", None], int: [1.0, True, "1", None], float: [True, "1", None], str: [1, None]}
    for field in fields.values():
        for value in wrong[kind(field)]:
            with pytest.raises(tg.ConfigError, match=field.name.upper()):
                tg.check_settings(tg.Config(**{field.name: value}))


@pytest.mark.parametrize("name", ["SEED", "CPU_THREADS"])
def test_number_that_torch_cannot_hold_is_refused(tg, name):
    assert name in refusal(tg, {name: str(2**64)})


@pytest.mark.parametrize("name", ["MODEL_PATH", "QUANTIZED_MODEL_PATH"])
@pytest.mark.parametrize("path", ["", "."])
def test_output_file_needs_a_name(tg, name, path):
    """The outputs have the names of these paths: without one a run would fail after its training."""
    assert name in refusal(tg, {name: path})


@pytest.mark.parametrize("name", ["MODEL_PATH", "QUANTIZED_MODEL_PATH"])
@pytest.mark.parametrize("path", [*sorted(TAKEN), "a/ledger.3.jsonl", "\U00020000" * 90])
def test_output_file_is_none_of_the_others(tg, name, path):
    """Which would be overwritten, or overwrite it, after the training."""
    assert name in refusal(tg, {name: path})


def test_every_file_of_a_run_has_a_name_that_no_model_may_have():
    """Names of files in the sources of harness/ and of the tools that write into a run's folder."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "harness").glob("*.py")]
    texts += [(ROOT / "tools" / name).read_text(encoding="utf-8") for name in ("audit.py", "sweep.py")]
    written = set(re.findall(r"""["'/]([a-z_]+\.(?:jsonl|json|txt))["']""", "\n".join(texts)))
    assert written - {"manifest.json", "requirements-dev.txt"} <= TAKEN


@pytest.mark.parametrize("run_id", ["a/b", "../elsewhere", "/absolute", ".", "..", "\U00020000" * 90])
def test_run_id_is_a_name_and_no_path(tg, run_id):
    assert "RUN_ID" in refusal(tg, {"RUN_ID": run_id})


# -- names


def single_typos(name: str) -> set[str]:
    """The name with one letter lost, doubled or replaced, or with two neighbours swapped."""
    typos = set()
    for i, letter in enumerate(name):
        typos |= {name[:i] + name[i + 1 :], name[:i] + letter + name[i:]}
        typos.add(name[:i] + ("X" if letter != "X" else "Y") + name[i + 1 :])
        typos.add(name[:i] + name[i + 1 : i + 2] + letter + name[i + 2 :])
    return typos


def test_single_typos_are_refused(tg, fields, every: int = 4):
    """With the value and with a nearest name (of two as near ones either will do). All: `make stress`."""
    for number, name in enumerate(fields):
        if len(name) < 8:
            continue
        for typo in sorted(single_typos(name) - fields.keys())[number % every :: every]:
            message = refusal(tg, {typo: "7"})
            assert message.startswith(f"{typo}='7': no such setting; did you mean ")
            suggested = re.search(r"did you mean (\w+)\?", message)[1]
            if suggested != name:

                def likeness(other: str, typo: str = typo) -> float:
                    return difflib.SequenceMatcher(None, typo, other).ratio()

                assert likeness(suggested) >= min(likeness(name), 0.86), (typo, suggested)


@pytest.mark.parametrize(
    "typo, name",
    [
        ("TTT_LORA_RNAK", "TTT_LORA_RANK"),
        ("MATIRX_LR", "MATRIX_LR"),
        ("ITERATION", "ITERATIONS"),
        ("NUMLAYERS", "NUM_LAYERS"),
        ("VOCABSIZE", "VOCAB_SIZE"),
        ("MAX_WALL_CLOCK_SECONDS", "MAX_WALLCLOCK_SECONDS"),
        ("QUANTISE_ONLY", "QUANTIZE_ONLY"),
        ("WARM_UP_STEPS", "WARMUP_STEPS"),
        ("LORA_RANK_TTT_", None),
    ],
)
def test_typos(tg, typo, name):
    if name is None:
        assert tg.read_settings({typo: "1"}) == tg.Config()
    else:
        assert f"did you mean {name}?" in refusal(tg, {typo: "1"})


@pytest.mark.parametrize("typo, name", [("PRESTE", "PRESET"), ("PRESETS", "PRESET"), ("MIN_RL", "MIN_LR")])
def test_typos_of_short_names(tg, typo, name):
    """PRESTE=demo must not start the record run."""
    assert f"did you mean {name}?" in refusal(tg, {typo: "demo"})


@pytest.mark.parametrize(
    "name",
    [
        "TTT_LORA_DROPOUT",
        "GLOBAL_TTT_FOO",
        "PHASED_TTT_X",
        "GPTQ_ACT_ORDER",
        "LQER_X",
        "MUON_NS_DTYPE",
        "SMEAR_X",
    ],
)
def test_unknown_names_of_our_families_are_refused(tg, name):
    """And no setting of another meaning is suggested."""
    assert refusal(tg, {name: "1"}) == f"{name}='1': no such setting; must be unset; see --help"


UNRELATED = re.findall(
    r"\S+",
    """
    PATH HOME SHELL USER LOGNAME PWD OLDPWD LANG LC_ALL TERM EDITOR TMPDIR HOSTNAME DISPLAY TZ SHLVL
    XDG_DATA_DIRS XDG_DATA_HOME XDG_RUNTIME_DIR SSH_AUTH_SOCK VIRTUAL_ENV CONDA_PREFIX PYTHONPATH
    PYTHONHASHSEED LD_LIBRARY_PATH LD_PRELOAD CUDA_VISIBLE_DEVICES CUDA_HOME CUDA_LAUNCH_BLOCKING
    CUBLAS_WORKSPACE_CONFIG NVIDIA_VISIBLE_DEVICES NCCL_NET NCCL_DEBUG NCCL_IB_DISABLE OMP_NUM_THREADS
    MKL_NUM_THREADS RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK ROLE_NAME
    MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID TORCHELASTIC_MAX_RESTARTS TORCHINDUCTOR_CACHE_DIR
    TORCH_HOME TORCH_DISTRIBUTED_DEBUG TRITON_CACHE_DIR HF_HOME HF_TOKEN TOKENIZERS_PARALLELISM
    WANDB_MODE WANDB_ENTITY SLURM_JOB_ID SLURM_NTASKS SLURM_PROCID CI GITHUB_RUN_ID GITHUB_ACTIONS
    KUBERNETES_SERVICE_HOST DEBIAN_FRONTEND LESSOPEN COLORTERM NODE_OPTIONS JAVA_HOME GOPATH MODEL_NAME
    MODEL MODELS DATA DATASET DATA_ROOT OUTPUT_DIR LOG_DIR BATCH_SIZE LR EPOCHS DEBUG _ PS1
    A
    PARALLEL_SEQ PARALLEL_PID PARALLEL_JOBSLOT PARALLEL_TMP PARALLEL_HOME PARALLEL_SHELL
    """,
)


@pytest.mark.parametrize("name", UNRELATED)
def test_unrelated_variables_are_ignored(tg, name):
    """The last row is what GNU parallel sets for every job: sweeps are run with it."""
    assert tg.read_settings({name: "anything"}) == tg.Config()


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, ["8 tasks, each is a run of its own: torchrun"]),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, []),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "3"}, []),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "WORLD_SIZE": "8"}, []),
        ({"SLURM_NTASKS": "8"}, []),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, ["2 tasks, each is a run of its own"]),
    ],
)
def test_tasks_without_torchrun_are_said(tg, capsys, environ, said):
    tg.read_settings(environ)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(said) and all(words in line for words, line in zip(said, lines, strict=True))


def test_this_environment_is_accepted(tg, fields):
    """Whatever this machine has set, as far as it is none of our names."""
    environ = {name: value for name, value in os.environ.items() if name not in fields}
    assert tg.read_settings(environ) == tg.Config()


# -- combinations


@pytest.mark.parametrize(
    "names",
    [
        ("SPARSE_ATTN_GATE_ENABLED", "ATTN_OUT_GATE_ENABLED"),
        ("SPARSE_ATTN_GATE_ENABLED", "GATED_ATTN_ENABLED"),
        ("ATTN_OUT_GATE_ENABLED", "GATED_ATTN_ENABLED"),
        ("SPARSE_ATTN_GATE_ENABLED", "ATTN_OUT_GATE_ENABLED", "GATED_ATTN_ENABLED"),
        ("PREQUANT_ONLY", "QUANTIZE_ONLY"),
        ("PREQUANT_ONLY", "TTT_EVAL_ONLY"),
        ("QUANTIZE_ONLY", "TTT_EVAL_ONLY"),
    ],
)
def test_exclusive_settings(tg, names):
    for alone in names:
        cfg = tg.read_settings({alone: "1"})
        assert [name for name in names if getattr(cfg, name.lower())] == [alone]
    message = refusal(tg, dict.fromkeys(names, "1"))
    assert all(f"{name}=1" in message for name in names) and "exclude each other" in message


@pytest.mark.parametrize(
    "environ, words",
    [
        ({"MODEL_DIM": "510"}, ["MODEL_DIM=510", "NUM_HEADS=8"]),
        ({"NUM_KV_HEADS": "3"}, ["NUM_HEADS=8", "NUM_KV_HEADS=3"]),
        ({"NUM_KV_HEADS": "16"}, ["NUM_HEADS=8", "NUM_KV_HEADS=16"]),
        ({"MODEL_DIM": "24", "GATE_WINDOW": "8"}, ["MODEL_DIM=24 NUM_HEADS=8", "has 3", "even"]),
        ({"ROPE_DIMS": "15"}, ["ROPE_DIMS=15", "even", "64"]),
        ({"ROPE_DIMS": "66"}, ["ROPE_DIMS=66", "at most 64"]),
        ({"ROPE_DIMS": "2", "ROPE_YARN": "1"}, ["ROPE_DIMS=2", "ROPE_YARN=1"]),
        ({"GATE_WINDOW": "513"}, ["GATE_WINDOW=513", "MODEL_DIM=512"]),
        ({"MUDD_WIDTH": "513"}, ["MUDD_WIDTH=513", "MODEL_DIM=512"]),
        ({"MLP_MULT": "0.001"}, ["MLP_MULT=0.001"]),
        ({"MLP_MULT": "0.002"}, ["MLP_MULT=0.002", "at least 2 hidden units"]),
        ({"TTT_CHUNK_SIZE": "4096"}, ["TTT_CHUNK_SIZE=4096", "TTT_EVAL_SEQ_LEN=2048"]),
        (
            {"TRITON_KERNELS": "mlp,head"},
            ["TRITON_KERNELS='mlp,head'", "0, 1, or some of loss,mlp,qkv_norm_rope,xsa_gate"],
        ),
        ({"LOOP_END": "11"}, ["LOOP_END=11", "NUM_LAYERS=11"]),
        ({"LOOP_START": "6"}, ["LOOP_START=6", "LOOP_END=5"]),
        ({"PARALLEL_START_LAYER": "5"}, ["PARALLEL_START_LAYER=5", "LOOP_END=5"]),
    ],
)
def test_sizes_that_do_not_fit(tg, environ, words):
    message = refusal(tg, environ)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "settings, world, words",
    [
        ({"train_batch_tokens": 786_433}, 1, ["TRAIN_BATCH_TOKENS=786433", " 8 "]),
        (
            {"train_batch_tokens": 1000, "train_seq_len": 100, "grad_accum_steps": 3},
            1,
            ["TRAIN_BATCH_TOKENS=1000", " 3 "],
        ),
        ({"train_batch_tokens": 1024}, 1, ["TRAIN_BATCH_TOKENS=1024", "TRAIN_SEQ_LEN=2048"]),
        ({}, 3, ["WORLD_SIZE=3", "GRAD_ACCUM_STEPS=8"]),
        ({}, 7, ["WORLD_SIZE=7"]),
        ({"grad_accum_steps": 4}, 6, ["WORLD_SIZE=6", "GRAD_ACCUM_STEPS=4"]),
        (
            {"train_batch_tokens": 700, "train_seq_len": 10, "grad_accum_steps": 1},
            3,
            ["TRAIN_BATCH_TOKENS=700", " 3 "],
        ),
    ],
)
def test_batch_that_does_not_divide(tg, settings, world, words):
    with pytest.raises(tg.ConfigError) as caught:
        tg.check_micro_batches(tg.Config(**settings), world)
    assert all(word in str(caught.value) for word in words), caught.value


def test_batch_that_does_not_divide_is_seen_before_data_are(tg, capsys):
    """--show resolves everything that a run would; a batch that cannot be run is no resolved setting."""
    assert tg.main(["--show"], {"TRAIN_BATCH_TOKENS": "786433"}) == 2
    assert "TRAIN_BATCH_TOKENS=786433" in capsys.readouterr().err


def test_global_chunk_shorter_than_a_window_is_refused(tg):
    """It would hold no window: the phases would train nothing and say nothing."""
    message = refusal(tg, {"GLOBAL_TTT_CHUNK_TOKENS": "2000"})
    assert "GLOBAL_TTT_CHUNK_TOKENS=2000" in message and "EVAL_SEQ_LEN" in message


def test_sgd_chunk_shorter_than_a_window_is_refused(tg):
    """It would hold no window either; without TTT_SGD=1 it is not used."""
    message = refusal(tg, {"TTT_CHUNK_TOKENS": "2000", "TTT_SGD": "1"})
    assert "TTT_CHUNK_TOKENS=2000" in message and "EVAL_SEQ_LEN=2048" in message
    tg.read_settings({"TTT_CHUNK_TOKENS": "2000"})


@pytest.mark.parametrize("evaluator", [{"TTT_ENABLED": "0"}, {"TTT_SGD": "1"}])
def test_sample_of_documents_that_nothing_would_take_is_refused(tg, evaluator):
    """All would be scored, and the result would say that it was a sample."""
    assert "VAL_DOC_FRACTION=0.5: must be 1" in refusal(tg, {"VAL_DOC_FRACTION": "0.5"} | evaluator)
    tg.read_settings({"VAL_DOC_FRACTION": "0.5"})
    tg.read_settings(evaluator)


def test_config_is_frozen(tg, fields):
    cfg = tg.Config()
    for field in fields.values():
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(cfg, field.name, field.default)


# -- the command line


def test_show_json(tg, fields, capsys):
    assert tg.main(["--show", "--json"], {"PRESET": "pr1855", "SEED": "7", "TTT_K_LORA": "0"}) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown.keys() == {"preset", "settings"}
    assert shown["preset"] == "pr1855"
    assert list(shown["settings"]) == list(fields)
    cfg = tg.read_settings({"PRESET": "pr1855", "SEED": "7", "TTT_K_LORA": "0"})
    assert {name.lower(): value for name, value in shown["settings"].items()} == dataclasses.asdict(cfg)


def test_show_ends_quietly_when_nobody_reads_on(tg, monkeypatch):
    """As behind `| head`: neither the text itself nor what Python writes at its end meets a broken pipe."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert tg.main(["--show"], {}) == 0
        print("more", flush=True)
        monkeypatch.undo()


def test_show_marks_what_is_not_the_default(tg, fields, capsys):
    assert tg.main(["--show"], {"PRESET": "pr1868", "SEED": "7"}) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("=")[0] for line in lines] == list(fields)
    marked = [line.split() for line in lines if "# default" in line]
    assert [row[0] for row in marked] == ["PRESET=pr1868", "SEED=7", "GPTQ_RESERVE_SECONDS=8.0"]
    assert [row[-1] for row in marked] == ["'pr1851'", "42", "0.5"]


def test_shown_settings_are_an_environment(tg, capsys):
    """What --show prints can be set again and gives the same run."""
    environ = {"PRESET": "pr1667", "NUM_LOOPS": "1"}
    tg.main(["--show"], environ)
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.endswith(("True", "False"))], "0 and 1, as they are set"
    again = dict(line.partition("    #")[0].split("=", 1) for line in lines)
    assert tg.read_settings(again) == tg.read_settings(environ)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_setting_with_help(tg, fields, capsys, flag):
    assert tg.main([flag, "all"], {"PRESET": "nonsense", "SEED": "x"}) == 0
    output = capsys.readouterr().out
    lines = output.splitlines()
    listed = {}
    for line, below in zip(lines, lines[1:], strict=False):
        if match := re.fullmatch(r"  ([A-Z][A-Z0-9_]*)=(.*)", line):
            text = re.fullmatch(r"      (.*) \[(.+)\]", below)
            assert text and re.search(r"\w\w", text[1]), f"{match[1]} has no help: {below!r}"
            listed[match[1]] = match[2]
    settings = {name: as_text(field.default) for name, field in fields.items()}
    assert listed == settings | {"SCALE": "full", "CONSOLE": "auto", "VERIFY": "0"}
    assert all(preset in output for preset in PRESETS)
    assert tg.core.__doc__.strip().splitlines()[0] in output


def test_help_by_topics_has_every_setting_once(tg, fields, capsys):
    """Alone it has the ten that are changed first, and names the topics."""
    assert tg.main(["--help"], {}) == 0
    said = capsys.readouterr().out
    assert re.findall(r"(?m)^  ([A-Z][A-Z0-9_]*)=", said) == [*tg.FIRST] and len(tg.FIRST) == 10
    topics, found = re.findall(r"(?m)^  ([a-z]+) +\d+ settings", said), []
    for topic in topics[:-1]:
        assert tg.main(["--help", topic], {}) == 0
        found += re.findall(r"(?m)^  ([A-Z][A-Z0-9_]*)=", capsys.readouterr().out)
    assert topics[-1] == "all" and sorted(found) == sorted([*fields, "SCALE", "CONSOLE", "VERIFY"])
    assert tg.main(["-h", "matrix_lr"], {}) == 0
    assert "  MATRIX_LR=0.026" in capsys.readouterr().out.splitlines()
    assert tg.main(["--help", "SMEAR_BOS_MASK"], {}) == 0
    assert capsys.readouterr().out.endswith("\n      read only with SMEAR_GATE_ENABLED=1\n")
    assert tg.main(["--help", "QUANTIZER"], {}) == 0
    assert capsys.readouterr().out.endswith("\n      other than scalar only with COMPRESSOR=ans\n")


def test_help_on_presets_tells_what_each_changes(tg, capsys):
    """The record is what nothing set means; a demo's size is another matter than what a system is."""
    assert tg.main(["--help", "presets"], {}) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[:2] == "  ")
    assert [*said] == [name for name in PRESETS if not name.endswith(("-demo", "-study"))]
    assert said["pr1851"] == "the record, where nothing is set"
    assert said["pr1868"] == "GPTQ_RESERVE_SECONDS=8.0"
    changed = [field for field, value in PRESETS["pr1514"].items() if value != getattr(tg.Config, field)]
    assert said["pr1514"] == f"{len(changed)} settings are not the record's; without its n-gram tilt"


def test_help_leaves_out_what_is_for_readers_of_the_source(tg, capsys):
    assert "\n\nA reader can stop at any banner" in tg.core.__doc__
    for arguments in (["--help"], ["--help", "all"]):
        assert tg.main(arguments, {}) == 0
        said = capsys.readouterr().out
        assert "A reader" not in said and "Shapes:" not in said and "--show [--json]" in said


@pytest.mark.parametrize(
    ("topic", "said"),
    [
        ("nothing", "must be one of run speed "),
        ("evaluatoin", "did you mean EVALUATION?"),
        ("MATRX_LR", "did you mean MATRIX_LR?"),
        ("--show", "--help --show"),
    ],
)
def test_help_on_what_is_no_topic_is_one_line(tg, capsys, topic, said):
    assert tg.main(["--help", topic], {}) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and said in captured.err


@pytest.mark.parametrize(
    "arguments", [["--shwo"], ["demo"], ["--show", "--yaml"], ["SEED=1"], ["--preset", "demo"]]
)
def test_unknown_argument(tg, arguments, capsys):
    assert tg.main(arguments, {}) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert any(argument in captured.err for argument in arguments) and "--help" in captured.err


def test_settings_as_arguments_are_said_to_be_variables(tg, capsys):
    assert tg.main(["SEED=1", "--show"], {}) == 2
    assert "settings are environment variables: SEED=1 python train_gpt.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "environ", "code", "said"),
    [
        ("--help", {"SEED": "x"}, 0, "  PRESET=pr1851"),
        ("--help evaluation", {}, 0, "  EVAL_STRIDE=64"),
        ("--help nothing", {}, 2, "--help nothing: must be one of run speed "),
        ("--shwo", {}, 2, "--shwo: unknown, must be --help [TOPIC]"),
        ("", {"PRESET": "nonsense"}, 2, "PRESET='nonsense': must be one of pr1851, "),
        ("--show", {"SEEED": "1"}, 2, "SEEED='1': no such setting; did you mean SEED?"),
        ("", {"ITERATIONS": "many"}, 2, "ITERATIONS='many': must be a whole number, at least 1"),
        ("", {"TTT_LORA_RANK": "0"}, 2, "TTT_LORA_RANK=0: must be a whole number, at least 1"),
        ("", {"LOOP_END": "11"}, 2, "need LOOP_START <= LOOP_END < NUM_LAYERS=11"),
        ("", {"TTT_CHUNK_BY_LENGTH": "256"}, 2, "TTT_CHUNK_BY_LENGTH='256': must be LENGTH:CHUNK"),
        ("", {"TRITON_KERNELS": "mpl"}, 2, "TRITON_KERNELS='mpl': must be 0, 1, or some of"),
        ("", {"WORLD_SIZE": "0"}, 2, "WORLD_SIZE='0': must be a whole number"),
        ("", {"CONSOLE": "loud"}, 2, "CONSOLE='loud': must be one of auto, log"),
        ("--show", {}, 5, ""),  # nothing is wrong: the libraries are needed
    ],
)
def test_help_and_mistakes_are_said_before_the_libraries_are_loaded(tmp_path, arguments, environ, code, said):
    """To load them takes seconds."""
    for library in ("numpy", "torch"):
        (tmp_path / f"{library}.py").write_text("import os\nos._exit(5)\n")
    command = [sys.executable, str(ROOT / "train_gpt.py"), *arguments.split()]
    environ = {"PYTHONPATH": str(tmp_path), "CONSOLE": "auto"} | environ
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code and said in (done.stderr if code else done.stdout)
    assert code != 2 or (len(done.stderr.splitlines()), done.stdout) == (1, "")


def test_json_alone_starts_no_run(tg, capsys):
    assert tg.main(["--json"], {"DATA_PATH": "/nowhere"}) == 2
    assert "--json" in capsys.readouterr().err


def test_config_error_is_one_line_and_code_2(tg, capsys):
    assert tg.main(["--show"], {"ITERATIONS": "many"}) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (
        captured.err
        == "train_gpt.py: error: ITERATIONS='many': must be a whole number, at least 1, at most 1000000000\n"
    )


# -- the source


def house_trees() -> dict[str, ast.Module]:
    """The syntax trees of the script and of what stands beside it, by file."""
    files = [
        ROOT / "train_gpt.py",
        *(p for part in ("harness", "systems") for p in (ROOT / part).glob("*.py")),
    ]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in files}


def test_every_setting_is_read(fields):
    """No dead settings: each is an attribute of a configuration, read by something other than a check."""
    read = set()

    def visit(node: ast.AST, inside: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            inside = node.name
        if inside.startswith("_check") or inside == "__post_init__":
            return
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = (
                node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            )
            if owner in ("cfg", "self"):
                read.add(node.attr)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    for tree in house_trees().values():
        visit(tree, "")
    assert {name.lower() for name in fields} - read == set()


READS = ("os.environ", "os.getenv")


def test_environment_is_read_in_main_only():
    """Importing, and every function but the entry, must be independent of the environment.

    What Triton reads for itself, whether its kernels are interpreted, the kernels must ask too; and which
    rank says that a library is missing, is asked where nothing else can be imported. Inductor, which has no
    setting for it, is told by a default, and only once a GPU is taken.
    """
    uses = []
    for name, tree in house_trees().items():
        for node in ast.walk(tree):
            calls = [child for child in ast.iter_child_nodes(node) if ast.unparse(child) in READS]
            uses += [(name, ast.unparse(node)) for _ in calls]
    allowed = [("systems/early.py", "os.environ.get"), ("systems/kernels.py", "os.environ.get")]
    early = "importlib.import_module('harness').answer_early(sys.argv[1:], os.environ)"
    allowed += [("train_gpt.py", entry) for entry in (early, "main(sys.argv[1:], os.environ)")]
    allowed.append(("train_gpt.py", "os.environ.setdefault"))
    assert sorted(uses) == sorted(allowed), uses
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    assert source.count('os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", ') == 1
    source = (ROOT / "systems/kernels.py").read_text(encoding="utf-8")
    assert source.count('os.environ.get("TRITON_INTERPRET")') == 1


def test_import_has_no_side_effect(tmp_path):
    """In a hostile environment: nothing is read, written, printed, started or initialised."""
    program = f"""
import os, random, sys
import numpy, torch
before = set(sys.modules)
state = (dict(os.environ), torch.get_num_threads(), torch.get_default_dtype(), random.getstate(), sys.path[:])
rng = torch.get_rng_state()
import importlib.util
spec = importlib.util.spec_from_file_location("train_gpt", {str(ROOT / "train_gpt.py")!r})
module = importlib.util.module_from_spec(spec)
sys.modules["train_gpt"] = module
spec.loader.exec_module(module)
after = (dict(os.environ), torch.get_num_threads(), torch.get_default_dtype(), random.getstate(), sys.path[:])
assert after == state
assert torch.equal(torch.get_rng_state(), rng)
assert not torch.cuda.is_initialized()
assert not (torch.distributed.is_available() and torch.distributed.is_initialized())
heavy = ("triton", "sentencepiece", "brotli", "python_minifier", "flash_attn")
loaded = [m for m in set(sys.modules) - before if m.split(".")[0].startswith(heavy)]
assert not loaded, loaded
"""
    hostile = {
        "PRESET": "nonsense",
        "SEED": "x",
        "WORLD_SIZE": "0",
        "RANK": "99",
        "LOCAL_RANK": "99",
        "TTT_LORA_RNAK": "1",
        "DATA_PATH": "/nowhere",
        "CUDA_VISIBLE_DEVICES": "77",
        "OMP_NUM_THREADS": "1",
        "PATH": "",
    }
    process = subprocess.run(
        [sys.executable, "-B", "-c", program],
        cwd=tmp_path,
        env=hostile,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
