"""Launch commands of published systems, and every name that a published script reads: ours, or refused."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest

from harness import lineage

FIELD = Path(os.environ.get("FIELD_DIR", Path(__file__).resolve().parents[2] / "../shared/field"))
OTHERS = {"NCCL_NET", "NCCL_IB_DISABLE", "OMP_NUM_THREADS"}  # read by libraries
# What a command may change of its preset: names, places and stages of a run.
OF_A_RUN = {"preset", "seed", "run_id", "artifact_dir", "data_dir", "data_path", "tokenizer_path"}
OF_A_RUN |= {"model_path", "quantize_only"}
RUNS = {  # record -> the preset with which its command is its system
    "2026-03-19_MixedQuant_Int6Int8_SlidingWindow": "pr1851",  # names nothing but the run
    "2026-04-01_Vocab4096_MLPMult4_WD085": "pr1851",
    "2026-04-08_SP8192_ParallelResid_ScoreFirstTTT": "pr1477",
    "2026-04-10_VarLenAttn": "pr1530",
    "2026-04-13_VarLenAttn_PhasingTTT2000": "pr1610",
    "2026-04-14_MultiPhaseGlobalSGD_PhasedTTT": "pr1626",
    "2026-04-18_PR1626_CaseOps_Taper": "pr1729",
    "2026-04-19_SP8192_CaseOps_GatedAttn_QuantGate_Loop45_PhasedTTT": "pr1736",
    "2026-04-22_SP8192_CaseOps_GatedAttn_QuantGate_Loop45_PhasedTTT_MLPClip12": "pr1769",
    "2026-04-23_SP8192_CaseOps_SparseGate_QuantGate_Loop45_PhasedTTT_PolarNS_MinLR_FusedCE": "pr1787",
    "2026-04-27_SP8192_LQER_SparseGate_BOSSmearFix_9HpStack_1.0611": "pr1855",
    "2026-04-29_SmearGateBOSFix_3Seed_1.06141": "pr1868",
}
LACKS = {  # record -> the names in the line that refuses its command
    "2026-03-17_NaiveBaseline": ["DATA_PATH"],
    "2026-03-18_FP16Embed_WD3600": ["DATA_PATH"],
    "2026-03-18_LowerLR": ["DATA_PATH"],
    "2026-03-19_10L_MixedPrecision": ["DATA_PATH", "INT4_LAYERS"],
    "2026-03-19_Seq2048_FP16Emb_TunedLR": ["DATA_PATH"],
    "2026-03-19_TrainingOptSeq4096": ["DATA_PATH"],
    "2026-03-19_WarmdownQuantization": ["WARMDOWN_ITERS"],
    "2026-03-20_11L_EfficientPartialXSA_FA3_SWA120": ["BIGRAM_VOCAB_SIZE", "SWA_ENABLED"],
    "2026-03-20_11L_XSA4_EMA_Int6_MLP3x_WD04_1.1271": ["BIGRAM_VOCAB_SIZE"],
    "2026-03-23_LeakyReLU_LegalTTT_ParallelMuon": [
        "BIGRAM_VOCAB_SIZE",
        "VE_ENABLED",
        "SWA_ENABLED",
        "LATE_QAT",
    ],
    "2026-03-24_74M_Ternary_UNet_FP8_10L_8192BPE_YaRN_NeoMuon": [
        *("BITNET_GROUP_SIZE", "ACTIVATION", "SOFTCAP_TYPE", "ROPE_TYPE", "CORR_WEIGHT_LR"),
        *("FP_STORAGE", "TEMP_SCALING"),
    ],
    "2026-03-25_ValCalib_GPTQ_XSA_BigramHash3072": ["BIGRAM_VOCAB_SIZE", "TARGET_MB"],
    "2026-03-29_Loader_FullGPTQ_XSA11_BigramHash2816": ["DATA_PATH", "BIGRAM_VOCAB_SIZE"],
    "2026-04-03_MuonEqR_DepthRecurrence_WD090_AllInt6": ["RECUR_LAYERS", "MIXED_QUANT"],
    "2026-04-04_SP4096_DepthRecurrence_ParallelResid_MuonEqR": ["RECUR_LAYERS"],
    "2026-04-06_SP8192_HessianSDClip_ProgressiveRecurrence": ["LOOP_PHASE2_AT", "HESSIAN_CLIP_LAMBDA"],
    "2026-04-09_A2_Muon097_3Seed": ["NGRAM_TILT_ENABLED"],
}
WITHOUT_TILT = {"PRESET": "pr1514", "NGRAM_TILT_ENABLED": "0"}


def rows(name: str) -> list[dict]:
    """The lines of a file of the field's data; none where it is not there."""
    path = FIELD / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def refusal(tg, environ: dict[str, str]) -> str:
    with pytest.raises(tg.ConfigError) as caught:
        tg.read_settings(environ)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def expanded(env: dict[str, str]) -> dict[str, str]:
    """As a shell would have put the seed in."""
    return {name: re.sub(r"\$\{?\w+\}?", "42", value) for name, value in env.items()}


@pytest.mark.parametrize("row", rows("commands.jsonl"), ids=lambda row: row["record"][:40])
def test_published_command_is_its_system_or_names_what_is_lacking(tg, capsys, row):
    record, env = row["record"], row["env"]
    if any("$" in value for value in env.values()):
        assert "a variable that no shell has put in" in refusal(tg, env)
    if record in LACKS:
        message = refusal(tg, expanded(env))
        assert re.findall(r"(?:^|, )([A-Z0-9_]+)='", message) == LACKS[record], message
        return
    capsys.readouterr()
    cfg, preset = (tg.read_settings({"PRESET": RUNS[record]} | given) for given in (expanded(env), {}))
    named = {field for field in OF_A_RUN if getattr(cfg, field) != getattr(preset, field)}
    assert cfg == dataclasses.replace(preset, **{field: getattr(cfg, field) for field in named})
    assert cfg.quantize_only == ("EVAL_ONLY_PATH" in env)
    places = {env.get(name, "") for name in ("DATASETS_DIR", "DATA_PATH")} - {""}
    assert places <= {cfg.data_path}
    notices = capsys.readouterr().err
    assert ("EVAL_ONLY_PATH=" in notices) == cfg.quantize_only


def test_every_command_has_an_outcome():
    records = {row["record"] for row in rows("commands.jsonl")}
    assert records in (set(), {*RUNS, *LACKS})


def test_every_name_that_a_published_script_reads_is_decided(tg):
    ours = {field.name.upper() for field in dataclasses.fields(tg.Config)}
    read = set().union(*(row["settings"] for row in rows("settings_read.jsonl")))
    read |= set().union(*(row["env"] for row in rows("commands.jsonl")))
    assert read - ours - lineage.VOCABULARY - OTHERS == set()


def test_no_name_is_decided_twice():
    parts = [lineage.ALIASES, lineage.FORMS, lineage.SWITCHES, lineage.HARMLESS, lineage.LACKING]
    names = [name for part in parts for name in part]
    assert len(names) == len({*names})


@pytest.mark.parametrize("feature", lineage.FEATURES, ids=lambda feature: feature.switches.split()[0])
def test_a_feature_is_refused_when_on_and_says_nothing_when_off(tg, capsys, feature):
    ours = tg.Config().as_env()
    details = dict.fromkeys(feature.details.split(), "9")
    for switch in [name for name in feature.switches.split() if name not in ours]:
        message = refusal(tg, {switch: "9"} | details)
        assert message.startswith(f"{switch}='9' ({feature.text}; must be ") and message.endswith(
            ": not built here"
        )
        for off in ("", *feature.off):
            assert tg.read_settings({switch: off} | details) == tg.Config()
    if feature.usual:
        assert refusal(tg, details).startswith(f"{next(iter(details))}='9' ({feature.text}; must be unset)")
    elif details:
        assert tg.read_settings(details) == tg.Config()
    assert capsys.readouterr().err == ""


def test_defaults_of_a_presets_script_leave_it_as_it_is(tg):
    """What its own script would have done anyway; but for patterns, which were not extracted whole."""
    scripts = {row["script"]: row["settings"] for row in rows("settings_read.jsonl")}
    for record, preset in RUNS.items():
        given = scripts.get(record, {}) if preset != "pr1851" else {}
        names = (lineage.LACKING | {*lineage.HARMLESS}) - {
            "CONTROL_TENSOR_NAME_PATTERNS",
            *tg.Config().as_env(),
        }
        names -= {"INT8_KEEP_FLOAT_FP32_NAME_PATTERNS", "TRAIN_FILES", "VAL_FILES"}
        given = {name: given[name] for name in names & given.keys()}
        assert tg.read_settings({"PRESET": preset} | given) == tg.read_settings({"PRESET": preset}), record


def test_late_quantisation_is_on_by_its_threshold(tg):
    """In a script of March 2026 it has no switch; 0 is off."""
    assert refusal(tg, {"QAT_ENABLED": "0", "LATE_QAT_THRESHOLD": "0.15"}).startswith(
        "LATE_QAT_THRESHOLD='0.15'"
    )
    assert tg.read_settings({"QAT_ENABLED": "0", "LATE_QAT_THRESHOLD": "0"}) == tg.Config()


@pytest.mark.parametrize(
    "environ, changed",
    [
        ({"GPTQ_RESERVE_MS": "14000"}, {"gptq_reserve_seconds": 14.0}),
        ({"GPTQ_RESERVE_MS": "8000", "GPTQ_RESERVE_SECONDS": "8.0"}, {"gptq_reserve_seconds": 8.0}),
        ({"MLP_HIDDEN": "992"}, {"mlp_mult": 1.9375}),
        ({"MLP_HIDDEN": "0"}, {}),
        ({"EMBEDDING_DIM": "512"}, {}),
        ({"WARMDOWN_ITERS": "0"}, {"warmdown_frac": 0.0}),
        (
            {"WARMDOWN_ITERS": "3000", "ITERATIONS": "9000", "MAX_WALLCLOCK_SECONDS": "0"},
            {"warmdown_frac": 1 / 3, "iterations": 9000, "max_wallclock_seconds": 0.0},
        ),
        ({"USE_POLAR_EXPRESS": "0"}, {"muon_coefficients": "quintic"}),
        ({"PARALLEL_RESIDUAL_START": "-1"}, {"parallel_start_layer": 0}),
        ({"PARALLEL_RESIDUAL_START": "7"}, {"parallel_start_layer": 7, "parallel_style": "single"}),
        ({"FUSED_CE_ENABLED": "0"}, {"triton_kernels": "mlp,qkv_norm_rope,xsa_gate"}),
        ({"FUSED_CE_ENABLED": "True", "TRITON_KERNELS": "loss,mlp"}, {"triton_kernels": "loss,mlp"}),
        ({"DATASETS_DIR": "some/where"}, {"data_path": "some/where"}),
        ({"EMA_ENABLED": "1"}, {}),
        ({"EMA_ENABLED": "0", "EMA_DECAY": "0.997"}, {"ema_decay": 0.0}),
        ({"PHASED_TTT_ENABLED": "0", "PHASED_TTT_PREFIX_DOCS": "2000"}, {"phased_ttt_prefix_docs": 0}),
        ({"PHASED_TTT_ENABLED": "True"}, {}),
        ({"EVAL_ONLY_PATH": ""}, {}),
        ({"EVAL_ONLY_PATH": "x.pt"}, {"model_path": "x.pt", "quantize_only": True}),
        ({"EVAL_ONLY_QUANTIZED_PATH": "x"}, {"quantized_model_path": "x", "ttt_eval_only": True}),
        ({"GATED_ATTN_ENABLED": "1"}, {"gated_attn_enabled": True, "sparse_attn_gate_enabled": False}),
        ({"EVAL_BATCH_SEQS": "64"}, {}),
        ({"HEAD_LR": "0.01"}, {}),
    ],
)
def test_names_and_forms_of_published_commands(tg, environ, changed):
    assert tg.read_settings(environ) == dataclasses.replace(tg.Config(), **changed)


def test_the_mlp_has_as_many_hidden_units_as_asked_for(tg):
    for hidden in range(2, 700, 29):
        for width in ("24", "56", "104"):
            environ = {"MODEL_DIM": width, "NUM_HEADS": "4", "ROPE_DIMS": "2", "MLP_HIDDEN": str(hidden)}
            assert tg.read_settings(environ).mlp_dim == hidden


@pytest.mark.parametrize(
    "environ, words",
    [
        ({"GPTQ_RESERVE_MS": "soon"}, ["GPTQ_RESERVE_MS='soon'", "a number"]),
        ({"GPTQ_RESERVE_MS": "8000", "GPTQ_RESERVE_SECONDS": "4"}, ["GPTQ_RESERVE_MS='8000'", "'4'", "same"]),
        ({"DATASETS_DIR": "a", "DATA_PATH": "A"}, ["DATASETS_DIR='a'", "DATA_PATH", "'A'", "the same"]),
        ({"EVAL_ONLY_PATH": "a", "MODEL_PATH": "b"}, ["EVAL_ONLY_PATH='a'", "MODEL_PATH", "'b'"]),
        ({"EVAL_ONLY_PATH": "a", "PREQUANT_ONLY": "1"}, ["PREQUANT_ONLY=1 QUANTIZE_ONLY=1", "exclude"]),
        ({"WARMDOWN_ITERS": "3600"}, ["WARMDOWN_ITERS='3600'", "MAX_WALLCLOCK_SECONDS", "WARMDOWN_FRAC"]),
        ({"PARALLEL_RESIDUAL_START": "0"}, ["PARALLEL_RESIDUAL_START='0'", "-1", "above 0"]),
        ({"FUSED_CE_ENABLED": "1", "TRITON_KERNELS": "mlp"}, ["FUSED_CE_ENABLED='1'", "loss,mlp", "'mlp'"]),
        ({"SMEAR_GATE": "on"}, ["SMEAR_GATE='on'", "0 or 1"]),
        ({"SCLAE": "demo"}, ["SCLAE='demo'", "did you mean SCALE?"]),
        ({"EMBEDDING_DIM": "256"}, ["EMBEDDING_DIM='256'", "MODEL_DIM=512"]),
        (
            {"PHASED_TTT_ENABLED": "1", "PRESET": "pr1530"},
            ["PHASED_TTT_ENABLED='1'", "PHASED_TTT_PREFIX_DOCS"],
        ),
        ({"PHASED_TTT_ENABLED": "yes"}, ["PHASED_TTT_ENABLED='yes'", "0 or 1"]),
        ({"TIE_EMBEDDINGS": "0", "HEAD_LR": "0.01"}, ["HEAD_LR='0.01'", "EMBED_LR"]),
        ({"ARTIFACT_DIR": "runs/x${SEED}"}, ["ARTIFACT_DIR='runs/x${SEED}'", "no shell"]),
        ({"GATED_ATTN_ENABLED": "1", "ATTN_OUT_GATE_ENABLED": "1"}, ["exclude each other"]),
        ({"SWA_ENABELD": "1"}, ["did you mean SWA_ENABLED?"]),
    ],
)
def test_what_cannot_be_put_into_ours_is_refused(tg, environ, words):
    message = refusal(tg, environ)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "environ, notice",
    [
        (
            {"GATED_ATTN_ENABLED": "1"},
            "SPARSE_ATTN_GATE_ENABLED=1 of PRESET=pr1851 gives way to GATED_ATTN_ENABLED=1",
        ),
        (
            {"PRESET": "pr1667", "SPARSE_ATTN_GATE_ENABLED": "1"},
            "ATTN_OUT_GATE_ENABLED=1 of PRESET=pr1667 gives way to SPARSE_ATTN_GATE_ENABLED=1",
        ),
        ({"EVAL_BATCH_SEQS": "32"}, f"EVAL_BATCH_SEQS=32: {lineage.HARMLESS['EVAL_BATCH_SEQS']}"),
        ({"TTT_LR": "0.002"}, "TTT_LR=0.002: no effect without TTT_SGD=1"),
        ({"PHASED_TTT_ENABLED": "0"}, "PHASED_TTT_ENABLED=0: PHASED_TTT_PREFIX_DOCS=0"),
        (
            {"PHASED_TTT_ENABLED": "1", "PRESET": "pr1493"},
            "PHASED_TTT_ENABLED=1: no effect without TTT_SGD=0",
        ),
        (
            {"FIT_BYTES": "9000000", "LQER_RANK": "2", "EMBED_BITS": "6"},
            "EMBED_BITS=6 LQER_RANK=2: no effect without FIT_BYTES=0",
        ),
        ({"EVAL_STRIDE": "32"}, "EVAL_STRIDE=32: no effect without SLIDING_WINDOW_ENABLED=1 or TTT_SGD=1"),
        ({"EMBED_LR": "0.5", "TIED_EMBED_LR": "0.02"}, "EMBED_LR=0.5: no effect without TIE_EMBEDDINGS=0"),
        (
            {"PRESET": "pr1394", "GLOBAL_TTT_BATCH_SEQS": "8"},
            "GLOBAL_TTT_BATCH_SEQS=8: no effect without TTT_ENABLED=1",
        ),
        (
            {"PRESET": "best", "FIT_BYTES": "0"},
            "GPTQ_DRIFT_BATCHES=4 of PRESET=best gives way to FIT_BYTES=0",
        ),
        ({"PRESET": "best", "TTT_SGD": "1"}, "NGRAM_TILT=16:2.62 of PRESET=best gives way to TTT_SGD=1"),
        ({"ttt_enabled": "0"}, "ttt_enabled=0: not read; did you mean TTT_ENABLED?"),
        ({"EVAL_ONLY_PATH": "x"}, "EVAL_ONLY_PATH=x: MODEL_PATH=x QUANTIZE_ONLY=1"),
        (WITHOUT_TILT, "PRESET=pr1514: without its n-gram tilt (not built here)"),
        (WITHOUT_TILT | {"SCALE": "demo"}, "PRESET=pr1514: without its n-gram tilt (not built here)"),
    ],
)
def test_what_is_taken_otherwise_is_said(tg, capsys, environ, notice):
    tg.read_settings(environ)
    assert capsys.readouterr().err == f"train_gpt.py: notice: {notice}\n"


@pytest.mark.parametrize(
    "environ",
    [
        {"TTT_ENABLED": "0", "TTT_LORA_RANK": "8", "TTT_LR": "0.01"},
        {"PHASED_TTT_PREFIX_DOCS": "0", "GLOBAL_TTT_LR": "0.01"},
        {"LQER_ENABLED": "0", "LQER_RANK": "2"},
        {"PRESET": "pr1493", "PHASED_TTT_PREFIX_DOCS": "0"},
    ],
)
def test_what_the_user_has_switched_off_himself_is_not_said(tg, capsys, environ):
    tg.read_settings(environ)
    assert capsys.readouterr().err == ""


def test_a_path_is_no_mistyped_number(tg, capsys):
    """MODEL_DIR is set on many a cluster; with a number for a value it is one."""
    tg.read_settings({"MODEL_DIR": "/models"})
    assert capsys.readouterr().err == ""
    assert "did you mean MODEL_DIM?" in refusal(tg, {"MODEL_DIR": "512"})


@pytest.mark.parametrize("environ", [{"NUM_THREADS": "8"}, {"NUM_WORKERS": "4"}, {"DATA_HOME": "/x"}])
def test_other_tools_variables_are_none_of_ours(tg, capsys, environ):
    tg.read_settings(environ)
    assert capsys.readouterr().err == ""


def test_no_other_word_is_suggested(tg):
    assert refusal(tg, {"TTT_HOME": "x"}) == "TTT_HOME='x': no such setting; must be unset; see --help"
    assert "did you mean" not in refusal(tg, {"MUON_HEADS": "8"})
