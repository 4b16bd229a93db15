"""Presets: every published system by its name, by the settings its log prints, and by its own command."""

import dataclasses
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from house import shuffled_loader
from test_data import random_tokens, write_shard
from test_smoke import VAL_DOCS, VOCAB, documents

import prepare_caseops_data as prepare
from dataprep.checking import check_folder
from dataprep.encoding import Encoder, tokenise_validation
from harness.settings import PRESETS

ROOT = Path(__file__).resolve().parents[2]
LOGS = Path(os.environ.get("PUBLISHED_LOGS", ROOT / "../shared/published_logs"))

# Which preset a published log is of. The first runs of PR #1868 kept back 0.5 s, as PR #1851 did.
PRESET_OF = {"pr1868_seed": "pr1851", "pr1868_rerun": "pr1868"}
PRESET_OF |= {
    name: name
    for name in (
        *("pr1394", "pr1412", "pr1413", "pr1477", "pr1493", "pr1514", "pr1530", "pr1610", "pr1626"),
        *("pr1667", "pr1729", "pr1736", "pr1769", "pr1787", "pr1851", "pr1855"),
    )
}
OTHER_NAMES = {  # printed name -> our setting; those of commands are aliases in the script too
    "smear_gate_width": "gate_window",
    "gate_width": "gate_window",
    "gate_attn_out": "attn_out_gate_enabled",
    "gate_attn_src": "attn_out_gate_src",
    "parallel_residual_start": "parallel_start_layer",
    "fused_ce_enabled": "triton_kernels",
    "embedding_dim": "model_dim",
}
OTHER_THERE = {  # log and setting: trained before PR #1767, whose adaptation the claim is of (pr1787_ttt)
    ("pr1787_seed0", "ttt_weight_decay"): "1.0",
}
OTHER_VALUES = {  # their entropy coder -> ours, and the one fused kernel that a setting of theirs turns off
    ("compressor", "pergroup"): "ans",
    ("fused_ce_enabled", "True"): "loss,mlp,qkv_norm_rope,xsa_gate",
}
OF_THE_RUN = [
    "artifact_dir",
    "data_dir",
    "datasets_dir",
    "default_datasets_dir",
    "distributed",
    "is_main_process",
    "local_rank",
    "logfile",
    "model_path",
    "quantized_model_path",
    "rank",
    "run_id",
    "seed",
    "tokenizer_path",
    "train_files",
    "val_bytes_files",
    "val_files",
    "world_size",
]
NGRAM = [f"ngram_{name}" for name in ("agree_bonus", "base_beta", "open_table_bits", "order_stride")]
NGRAM += [f"ngram_{name}" for name in ("within_beta", "within_threshold", "word_beta", "word_threshold")]
# Printed, and without effect here: the value that was printed everywhere (None: any), and why.
NO_EFFECT = {
    "grad_accum_steps": ("1", "of each of 8 ranks; ours, 8, is of all ranks together"),
    "val_loss_every": (None, "curves while training, off the clock"),
    "rope_train_seq_len": ("2048", "no published script reads it"),
    "head_lr": ("0.008", "of an untied head; here EMBED_LR"),
    "muon_beta2": ("0.95", "of a variant of Muon with second moments; row normalisation has none"),
    "gate_mlp_out": ("False", "a gate that no published run turned on"),
    "etlb_enabled": ("False", "a bias of the logits that no published run turned on"),
    "asymmetric_logit": ("False", "a feature that no published run turned on"),
    "cautious_wd": ("False", "as asymmetric_logit"),
    "gated_attn": ("False", "as asymmetric_logit"),
    "mixed_quant": ("False", "as asymmetric_logit"),
    "n_int6_layers": ("50", "of mixed_quant"),
    "int5_layers_str": ("", "as asymmetric_logit"),
    "loop_layer_bits": ("0", "as asymmetric_logit"),
    "loop_layer_clip_sigmas": ("0.0", "as asymmetric_logit"),
    "untie_loop_mlps": ("False", "as asymmetric_logit"),
    "value_residual": ("False", "as asymmetric_logit"),
    "use_polar_express": ("False", "the coefficients are quintic there"),
    "hessian_clip_lambda": (None, "PR #1412's clips, which its preset is without"),
    "loop_phase2_at": ("0.65", "PR #1412's second loop, which its preset is without"),
    "ngram_tilt_enabled": ("True", "PR #1514's tilt, which its preset is without"),
    **dict.fromkeys(NGRAM, (None, "of ngram_tilt_enabled")),
    "ttt_batch_seqs": ("32", "GLOBAL_TTT_BATCH_SEQS here"),
    "ttt_grad_clip": ("1.0", "GLOBAL_TTT_GRAD_CLIP here"),
    "ttt_freeze_blocks": (None, "2 where nothing adapts (PR #1412), else 0"),
    "ttt_entropy_high": ("2.1", "of an adaptation that PR #1412 did not turn on"),
    "ttt_entropy_low": ("1.75", "as ttt_entropy_high"),
    "ttt_ns_steps": ("3", "as ttt_entropy_high"),
    "ttt_doc_limit": ("0", "no limit"),
    "global_ttt_doc_limit": ("0", "no limit"),
    "ttt_heartbeat_seconds": ("15.0", "lines of a log"),
    "ttt_hash_embed_size": ("0", "off"),
    "ttt_only": ("False", "a stage of its own"),
    "skip_post_train_eval": ("False", "a stage left out"),
    "phased_ttt_enabled": ("True", "PHASED_TTT_PREFIX_DOCS above 0"),
    "eval_only_quantized_path": ("", "QUANTIZED_MODEL_PATH here"),
    "etlb_clip": ("3.0", "as etlb_enabled"),
    "etlb_lr": ("0.05", "as etlb_enabled"),
    "etlb_steps": ("5", "as etlb_enabled"),
    "ttt_hash_embed": (
        "True",
        "of another script, which PR #1493's seed 42 alone ran",
    ),
    "ttt_hash_buckets": ("16384", "as ttt_hash_embed"),
    "ttt_optimizer": ("adam", "AdamW is the only one here"),
    "ttt_eval_batches": ("", "a way to score a part of the data; VAL_DOC_FRACTION here"),
    "ttt_output_dir": ("", "where that script put its scores"),
    "eval_only_path": ("", "QUANTIZED_MODEL_PATH here"),
}


def logs() -> list[Path]:
    """Those of the systems that are presets; the folder holds their ancestors' too."""
    return sorted(path for path in LOGS.glob("*.log") if path.name.startswith(tuple(PRESET_OF)))


def printed_settings(path: Path) -> dict[str, str]:
    """Name and text of everything under "Hyperparameters:"; one log has the time before each line."""
    text = re.sub(r"^\d{10}\.\d+ ", "", path.read_text(encoding="utf-8"), flags=re.M)
    block = re.search(r"^Hyperparameters:\n((?:  \w+:.*\n)+)", text, re.M)[1]
    return dict(re.match(r"  (\w+): ?(.*)", line).groups() for line in block.splitlines())


def says(value: object, text: str) -> bool:
    """Whether a log would print a value so."""
    return float(text) == value if type(value) is float else str(value) == text


def test_all_published_logs_are_there():
    if not LOGS.is_dir():
        pytest.skip(f"{LOGS} is not there")
    assert len(logs()) == 28
    assert {next(name for name in PRESET_OF if path.name.startswith(name)) for path in logs()} == set(
        PRESET_OF
    )


@pytest.mark.parametrize("path", logs(), ids=lambda path: path.stem)
def test_preset_has_the_printed_settings(tg, path):
    """Each printed setting is equal, mapped, or listed as without effect; nothing is left over."""
    preset = next(PRESET_OF[name] for name in PRESET_OF if path.name.startswith(name))
    cfg, printed = tg.read_settings({"PRESET": preset}), printed_settings(path)
    assert len(printed) > 75
    for name, text in printed.items():
        if name in OF_THE_RUN:
            continue
        if name in NO_EFFECT:
            assert NO_EFFECT[name][0] in (None, text), name
            continue
        text = OTHER_THERE.get((path.stem, name), OTHER_VALUES.get((name, text), text))
        ours = getattr(cfg, OTHER_NAMES.get(name, name))
        assert says(ours, text), f"{name}: {text} printed, {ours} in {preset}"


@pytest.mark.parametrize("path", logs(), ids=lambda path: path.stem)
def test_preset_has_the_printed_number_of_parameters(tg, path):
    preset = next(PRESET_OF[name] for name in PRESET_OF if path.name.startswith(name))
    with torch.device("meta"):
        model = tg.GPT(tg.read_settings({"PRESET": preset}))
    printed = re.search(r"\bmodel_params:(\d+)$", path.read_text(encoding="utf-8"), re.M)
    if printed:  # a log of adaptation alone has no such line
        parameters = sum(parameter.numel() for parameter in model.parameters())
        assert int(printed[1]) - parameters == (preset == "pr1477")  # the blend of its lanes, left out here


def test_lists_hold_nothing_that_is_not_printed():
    printed = set().union(*(printed_settings(path) for path in logs()))
    if printed:
        assert printed >= {*OTHER_NAMES, *OF_THE_RUN, *NO_EFFECT}


PR1493 = {  # SPEC section 8, and what a log does not print
    "caseops_enabled": False,
    "plain_windows": True,
    "parallel_style": "single",
    "parallel_start_layer": 7,
    "smear_gate_enabled": False,
    "sparse_attn_gate_enabled": False,
    "lqer_enabled": False,
    "muon_coefficients": "quintic",
    "muon_momentum": 0.99,
    "matrix_lr": 0.022,
    "warmdown_frac": 0.72,
    "min_lr": 0.0,
    "qk_gain_init": 5.25,
    "embed_bits": 8,
    "embed_clip_sigmas": 20.0,
    "attn_clip_sigmas": 12.85,
    "mlp_clip_sigmas": 12.85,
    "gptq_calibration_batches": 64,
    "gptq_reserve_seconds": 12.0,
    "sliding_window_enabled": True,
    "ttt_sgd": True,
}
SPEC_ROWS = {
    "pr1868": {"gptq_reserve_seconds": 8.0},
    "pr1855": {
        "mlp_clip_sigmas": 11.5,
        "embed_clip_sigmas": 14.0,
        "warmdown_frac": 0.85,
        "beta2": 0.99,
        "ttt_beta2": 0.99,
        "ttt_weight_decay": 0.5,
        "ttt_lora_rank": 80,
        "sparse_attn_gate_scale": 0.5,
        "phased_ttt_prefix_docs": 2500,
        "gated_attn_quant_gate": True,
        "compressor": "ans",
    },
    "pr1667": {
        "caseops_enabled": False,
        "sparse_attn_gate_enabled": False,
        "attn_out_gate_enabled": True,
        "attn_out_gate_src": "proj",
        "smear_bos_mask": False,
        "qk_gain_init": 5.25,
        "min_lr": 0.0,
        "lqer_enabled": False,
        "gptq_calibration_batches": 64,
        "gptq_reserve_seconds": 13.0,
        "muon_coefficients": "quintic",
        "phased_ttt_prefix_docs": 0,
        "ttt_weight_decay": 0.5,
        "ttt_lora_alpha": 96.0,
        "ttt_warm_start_a": False,
    },
    "pr1493": PR1493,
    "pr1858": PR1493 | {"ttt_epochs": 2},
    "pr1485": PR1493 | {"qk_gain_init": 5.0, "ttt_enabled": False, "ttt_sgd": False},
}


@pytest.mark.parametrize("preset", SPEC_ROWS)
def test_presets_are_the_rows_of_the_specification(tg, preset):
    expected = tg.Config(**{"preset": preset, **SPEC_ROWS[preset]})
    assert tg.read_settings({"PRESET": preset}) == expected


# -- published commands


PR1855_LINE = """DATA_DIR=./data VOCAB_SIZE=8192
DATA_PATH=./data/datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved
TOKENIZER_PATH=./data/tokenizers/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model CASEOPS_ENABLED=1
ITERATIONS=20000 MAX_WALLCLOCK_SECONDS=600 PHASED_TTT_ENABLED=1 PHASED_TTT_PREFIX_DOCS=2500
PHASED_TTT_NUM_PHASES=3 EMBED_BITS=7 MATRIX_LR=0.026 MIN_LR=0.1 MLP_CLIP_SIGMAS=11.5 ATTN_CLIP_SIGMAS=13.0
EMBED_CLIP_SIGMAS=14.0 GRAD_CLIP_NORM=0.3 TTT_CHUNK_SIZE=48 WARMUP_STEPS=20 MUON_BACKEND_STEPS=5
GLOBAL_TTT_MOMENTUM=0.9 WARMDOWN_FRAC=0.85 BETA2=0.99 TTT_BETA2=0.99 TTT_WEIGHT_DECAY=0.5 TTT_LORA_RANK=80
SPARSE_ATTN_GATE_SCALE=0.5 GPTQ_RESERVE_SECONDS=0.5 GPTQ_CALIBRATION_BATCHES=16 VAL_LOSS_EVERY=0
GATED_ATTN_QUANT_GATE=1 SPARSE_ATTN_GATE_ENABLED=1 GATE_WINDOW=12 SMEAR_GATE_ENABLED=1 LQER_ENABLED=1
LQER_ASYM_ENABLED=1 LQER_RANK=4 LQER_FACTOR_BITS=4 LQER_ASYM_GROUP=64 LQER_TOP_K=3 FUSED_CE_ENABLED=1
COMPRESSOR=pergroup NCCL_NET=Socket SEED=42"""
PR1868_LINE = """SEED=42 CASEOPS_ENABLED=1 EMBED_BITS=7 SMEAR_GATE_ENABLED=1 SPARSE_ATTN_GATE_ENABLED=1
MIN_LR=0.1 EMBED_CLIP_SIGMAS=15.0 MLP_CLIP_SIGMAS=12.0 GPTQ_RESERVE_SECONDS=8.0 PHASED_TTT_NUM_PHASES=3"""
PR1667_LINE = """SMEAR_GATE=1 SMEAR_GATE_WIDTH=12 GATE_ATTN_OUT=1 GATE_ATTN_SRC=proj GATE_WIDTH=12
QK_GAIN_INIT=5.25 TTT_ENABLED=1"""
PR1493_LINE = "SEED=42 QK_GAIN_INIT=5.25 TTT_ENABLED=1 TTT_LR=0.005 TTT_EPOCHS=3"
PR1858_LINE = "SEED=42 TTT_CHUNK_SIZE=48"


@pytest.mark.parametrize(
    "line, preset, same_as",
    [
        (PR1868_LINE, "", "pr1868"),
        (PR1855_LINE, "", "pr1855"),
        (PR1855_LINE, "pr1855", "pr1855"),
        (PR1667_LINE, "pr1667", "pr1667"),
        (PR1493_LINE, "pr1858", "pr1493"),
        (PR1493_LINE, "pr1493", "pr1493"),
        (PR1858_LINE, "pr1858", "pr1858"),
    ],
)
def test_published_command_is_the_preset(tg, line, preset, same_as):
    environ = dict(word.split("=", 1) for word in shlex.split(line)) | ({"PRESET": preset} if preset else {})
    cfg = tg.read_settings(environ)
    places = ("preset", "data_dir", "data_path", "tokenizer_path")
    kept = {name: getattr(cfg, name) for name in places}
    assert cfg == dataclasses.replace(tg.read_settings({"PRESET": same_as}), **kept)


def test_notices_of_the_long_command(tg, capsys):
    """What is mapped is said once, on stderr, whatever the rank count."""
    environ = dict(word.split("=", 1) for word in shlex.split(PR1855_LINE))
    for rank, lines in ("0", 1), ("1", 0):
        assert tg.main(["--show"], environ | {"LOCAL_RANK": rank}) == 0
        captured = capsys.readouterr()
        assert "\nCOMPRESSOR=ans    # default 'brotli'\n" in captured.out
        assert len(captured.err.splitlines()) == lines
        if lines:
            assert "notice: COMPRESSOR=pergroup: COMPRESSOR=ans" in captured.err


def test_every_alias_sets_its_setting(tg):
    other = {"GATE_ATTN_SRC": "q", "GATE_ATTN_OUT": "1", "SMEAR_GATE": "0"}
    other |= {"SLIDING_EVAL": "1", "MUON_WEIGHT_DECAY": "0.5", "WARMDOWN_FRACTION": "0.5"}
    for old, name in tg.ALIASES.items():
        text = other.get(old, "9")
        environ = {"SPARSE_ATTN_GATE_ENABLED": "0", old: text}
        value = getattr(tg.read_settings(environ), name.lower())
        assert str(int(value) if isinstance(value, bool) else value) == text
        assert value != getattr(tg.Config(), name.lower())


@pytest.mark.parametrize(
    "environ, words",
    [
        ({"GATE_WIDTH": "12", "SMEAR_GATE_WIDTH": "8"}, ["GATE_WIDTH=", "GATE_WINDOW", "'8'", "the same"]),
        ({"SMEAR_GATE": "1", "SMEAR_GATE_ENABLED": "0"}, ["SMEAR_GATE='1'", "SMEAR_GATE_ENABLED", "'0'"]),
        ({"SCALE": "small"}, ["SCALE='small'", "full, demo"]),
        ({"GATE_ATTN_OUT": "2"}, ["GATE_ATTN_OUT='2'", "0 or 1"]),
        ({"COMPRESSOR": "lrzip"}, ["COMPRESSOR='lrzip'", "brotli, lzma, ans"]),
        ({"PRESET": "pr1666", "SCALE": "demo"}, ["PRESET='pr1666'", "pr1667"]),
    ],
)
def test_wrong_older_names_are_refused(tg, environ, words):
    with pytest.raises(tg.ConfigError) as caught:
        tg.read_settings(environ)
    assert all(word in str(caught.value) for word in words), caught.value


# -- the demo's sizes


SIZES = [
    "data_path",
    "vocab_size",
    "train_seq_len",
    "train_batch_tokens",
    "grad_accum_steps",
    "num_layers",
    "model_dim",
    "num_heads",
    "num_kv_heads",
    "mlp_mult",
    "num_loops",
    "loop_start",
    "loop_end",
    "parallel_start_layer",
    "xsa_last_n",
    "iterations",
    "max_wallclock_seconds",
    "warmup_steps",
    "muon_momentum_warmup_steps",
    "train_log_every",
    "val_loss_every",
    "ema_decay",
    "float16_max_elements",
    "gptq_calibration_batches",
    "val_batch_tokens",
    "eval_seq_len",
    "ttt_eval_seq_len",
    "ttt_batch_size",
    "ttt_lora_rank",
    "ttt_lora_alpha",
    "ttt_lora_lr",
    "ttt_warm_start_a",
    "phased_ttt_prefix_docs",
    "phased_ttt_num_phases",
    "global_ttt_chunk_tokens",
    "global_ttt_batch_seqs",
    "ttt_chunk_tokens",
    "cpu_threads",
    "audit",
    "preset",
    "fit_bytes",
]


@pytest.mark.parametrize("preset", [name for name in PRESETS if f"{name}-demo" in PRESETS])
def test_demo_scale_changes_sizes_only(tg, preset):
    full, demo = (tg.read_settings({"PRESET": preset} | extra) for extra in ({}, {"SCALE": "demo"}))
    assert demo.preset == f"{preset}-demo"
    for field in dataclasses.fields(full):
        if field.name not in SIZES:
            assert getattr(full, field.name) == getattr(demo, field.name), field.name
    assert Path(demo.data_path).name == ("demo" if demo.caseops_enabled else "demo_plain")
    for name in ("phased_ttt_prefix_docs", "parallel_start_layer", "fit_bytes"):
        assert bool(getattr(full, name)) == bool(getattr(demo, name)), name
    scaled = [cfg.ttt_lora_alpha == cfg.ttt_lora_rank for cfg in (full, demo)]
    assert scaled[0] == scaled[1]


@pytest.mark.parametrize("preset", [name for name in PRESETS if f"{name}-study" in PRESETS])
def test_study_scale_is_the_same_system(tg, preset):
    """With a vocabulary as the record's, on real text; a system of plain text has no such scale."""
    demo, study = (tg.Config(**PRESETS[f"{preset}-{scale}"]) for scale in ("demo", "study"))
    for field in dataclasses.fields(demo):
        if field.name not in (*SIZES, "ttt_chunk_size", "ngram_tilt"):  # contexts for a small model
            assert getattr(demo, field.name) == getattr(study, field.name), field.name
    assert (study.vocab_size, study.data_path) == (8192, "data/study/confirm1")
    with pytest.raises(tg.ConfigError, match="SCALE=study PRESET=pr1493: a study has CaseOps text"):
        tg.read_settings({"PRESET": "pr1493", "SCALE": "study"})


def test_best_is_the_record_and_what_was_shown_to_be_better(tg):
    best, record = tg.Config(**PRESETS["best"]), tg.Config()
    names = {f.name for f in dataclasses.fields(best) if getattr(best, f.name) != getattr(record, f.name)}
    stored = {"gptq_reserve_seconds", "quantizer", "compressor", "fit_bytes", "gptq_drift_batches"}
    assert names == stored | {"muon_maxwell", "mudd_width", "ngram_tilt"}
    assert best.fit_bytes == tg.SIZE_LIMIT
    tg.check_settings(best)


def test_demo_scale_of_the_record_is_the_demo(tg):
    scaled, demo = (tg.read_settings(e) for e in ({"SCALE": "demo"}, {"PRESET": "demo"}))
    assert dataclasses.replace(scaled, preset="demo") == demo
    assert tg.read_settings({"PRESET": "demo", "SCALE": "demo"}) == demo
    assert tg.read_settings({"SCALE": "full"}) == tg.Config()


# -- plain windows


@pytest.fixture
def shards(tmp_path) -> list[Path]:
    paths = [tmp_path / f"fineweb_train_{number:06d}.bin" for number in range(2)]
    for number, path in enumerate(paths):
        write_shard(path, random_tokens(number, 1500 + 300 * number))
    return paths


def window_settings(tg, **settings: int):
    batch = {"train_seq_len": 32, "train_batch_tokens": 512, "grad_accum_steps": 4, "eval_seq_len": 32}
    return tg.Config(**batch | {"plain_windows": True} | settings)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_window_loader_is_one_stream_for_any_number_of_ranks(tg, shards, world):
    """The windows of the calibration's loader (golden vectors), in its order, each a segment."""
    cfg = window_settings(tg)
    oracle = shuffled_loader(tg, shards, 1, 0, 32)
    cpu = torch.device("cpu")
    loaders = [tg.WindowLoader(shards, cfg, tg.Ranks(cpu, rank, world), 128) for rank in range(world)]
    for _ in range(60 // world):  # more than the shards hold: they are drawn anew
        for loader in loaders:
            x, y, segments = loader.next()
            inputs, targets = oracle.next(4)
            assert x.tolist() == [inputs.flatten().tolist()] and y.tolist() == [targets.flatten().tolist()]
            assert segments.cu_seqlens[:6].tolist() == [0, 32, 64, 96, 128, 128]
            assert segments.max_seqlen == segments.max_seqlen_bound == 32


def test_window_loader_goes_back(tg, shards):
    loader = tg.WindowLoader(shards, window_settings(tg), tg.CPU, 128)
    for _ in range(7):
        loader.next()
    state = loader.state()
    following = [loader.next()[0].tolist() for _ in range(3)]
    loader.load_state(state)
    assert [loader.next()[0].tolist() for _ in range(3)] == following
    fresh = tg.WindowLoader(shards, window_settings(tg), tg.CPU, 128)
    fresh.load_state(state)
    assert fresh.next()[0].tolist() == following[0]


def test_window_loader_takes_whole_windows(tg, shards):
    with pytest.raises(tg.ConfigError, match=r"TRAIN_BATCH_TOKENS=516: .*4 micro-batches.*TRAIN_SEQ_LEN=32"):
        tg.WindowLoader(shards, window_settings(tg, train_batch_tokens=516), tg.CPU, 129)


def test_plain_rows_do_not_know_documents(tg):
    tokens = torch.tensor(random_tokens(0, 101))
    x, y, segments = tg.packed_row(tokens, 32, plain=True)
    assert (x.tolist(), y.tolist()) == ([tokens[:-1].tolist()], [tokens[1:].tolist()])
    assert segments.cu_seqlens[:6].tolist() == [0, 32, 64, 96, 100, 100]
    assert tg.packed_row(tokens, 32)[2].cu_seqlens.tolist() != segments.cu_seqlens.tolist()


# -- plain data


def test_plain_bytes_are_those_of_the_evaluation(tg, tokenizer_dir):
    """Published plain tokenizer: what preparation charges each token is what `ByteTables` charges it."""
    path = tokenizer_dir / "fineweb_8192_bpe.model"
    tokenizer = prepare.make_tokenizer(path.name, path.read_bytes(), plain=True)
    texts = [*documents(20), "  Two  spaces\n\tand Ünïcode \u2028 \U0001f600 ①", "x"]
    tables = tg.ByteTables.from_sentencepiece(tokenizer.processor, 8192)
    for text in texts:
        document = prepare.make_document(text, "text")
        tokens, counts, _ = tokenise_validation(Encoder(tokenizer), document)
        assert tokens[0] == 1 and counts[0] == 0
        assert counts[1:].tolist() == tables.target_bytes(torch.from_numpy(tokens.astype(int))).tolist()
        assert counts.sum() > 0 and tokens[1:].tolist() == tokenizer.processor.encode(text)


def test_plain_tokenizer_has_no_operators_and_single_spaces(tg):
    """Indented text comes back, and a piece of several spaces, which the tables overcharge, is not made."""
    texts = [text.replace(". ", ".\n        ") for text in documents(60)]
    model = prepare.train_tokenizer(texts, VOCAB, plain=True)
    tokenizer = prepare.make_tokenizer("t.model", model, lossless=True, plain=True)
    pieces = [tokenizer.processor.id_to_piece(token) for token in range(VOCAB)]
    assert not any("\u2581" in piece[1:] or "\ue001" in piece for piece in pieces)
    for text in texts:
        document = prepare.make_document(text, "text")
        _, counts, round_trip = tokenise_validation(Encoder(tokenizer), document)
        assert round_trip and counts.sum() == len(text.encode())
    with pytest.raises(prepare.DataError, match="not a CaseOps tokenizer"):
        prepare.make_tokenizer("t.model", model)


# -- whole runs


@pytest.fixture(scope="module")
def plain_data(tmp_path_factory) -> Path:
    """A plain data set with its own tokenizer."""
    folder = tmp_path_factory.mktemp("plain") / "data"
    texts = documents(150)
    model = prepare.train_tokenizer(texts, VOCAB, plain=True)
    tokenizer = prepare.make_tokenizer("tokenizer.model", model, lossless=True, plain=True)
    named = [prepare.make_document(text, f"document {i}") for i, text in enumerate(texts)]
    manifest = prepare.prepare(named, tokenizer, folder, VAL_DOCS)
    assert manifest["transform"] == "none" and manifest["splits"]["val"]["uncharged_bytes"] == 0
    return folder


def test_plain_data_are_recognised_without_their_manifest(plain_data, tmp_path):
    folder = shutil.copytree(plain_data, tmp_path / "data")
    written = (folder / "manifest.json").read_text()
    (folder / "manifest.json").unlink()
    problems, manifest = check_folder(folder, write_manifest=True)
    assert not problems and manifest["transform"] == "none"
    assert manifest["splits"]["val"]["bytes"] == json.loads(written)["splits"]["val"]["bytes"]


def test_plain_demo_data_have_a_place_of_their_own(tg):
    options = prepare.parse_arguments(["--demo", "--plain"])
    assert str(options.out) == tg.read_settings({"PRESET": "pr1667", "SCALE": "demo"}).data_path
    assert prepare.parse_arguments(["--demo"]).out != options.out
