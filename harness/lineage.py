"""The names that published scripts of the lineage read, and what each of them is here.

A name of a published command is one of our settings, another name or form of one (`ALIASES`, `FORMS`,
`SWITCHES`), without effect here (`HARMLESS`), or a feature that this script lacks (`FEATURES`): then only the
values that leave the feature off are accepted. No name is dropped in silence.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from harness.rules import check_text
from train_gpt import KERNELS, TORCHRUN, Config, ConfigError, kernel_names

ALIASES = {  # names in published commands and logs -> ours
    "SMEAR_GATE": "SMEAR_GATE_ENABLED",
    "SMEAR_GATE_WIDTH": "GATE_WINDOW",
    "GATE_WIDTH": "GATE_WINDOW",
    "GATE_ATTN_OUT": "ATTN_OUT_GATE_ENABLED",
    "GATE_ATTN_SRC": "ATTN_OUT_GATE_SRC",
    "DATASETS_DIR": "DATA_PATH",
    "MUON_WEIGHT_DECAY": "MUON_WD",
    "WARMDOWN_FRACTION": "WARMDOWN_FRAC",
    "VAL_BATCH_SIZE": "VAL_BATCH_TOKENS",
    "SLIDING_EVAL": "SLIDING_WINDOW_ENABLED",
    "SLIDING_EVAL_STRIDE": "EVAL_STRIDE",
}
VALUES = {  # settings and their values in published commands -> ours, and what is to be said of it
    ("COMPRESSOR", "pergroup"): ("ans", "this script's entropy coder (no lrzip needed)"),
    ("TRITON_KERNELS", "1"): (Config.triton_kernels, ""),
}
SWITCHES = {  # what switches a part on and off -> our setting, which is 0 where the part is off
    "PHASED_TTT_ENABLED": "PHASED_TTT_PREFIX_DOCS",
    "EMA_ENABLED": "EMA_DECAY",
}
HARMLESS = {  # names without effect here, and why
    "EVAL_BATCH_SEQS": "rows scored side by side, of which no score depends",
    "SLIDING_BATCH_SIZE": "windows scored side by side, of which no score depends",
    "TTT_OUTPUT_DIR": "ARTIFACT_DIR has all outputs",
    "TTT_HEARTBEAT_SECONDS": "the log has a line of progress without it",
    "CHURN_LOG_EVERY": "that line of the log is not written here",
}


class Feature(NamedTuple):
    """What this script lacks. `switches` ask for it, unless they have a value of `off` or none.

    `details` say how: nothing while a switch is off. Where no switch is given, a detail above 0 asks for the
    feature if published scripts had it on by themselves (`usual`). A switch of ours may itself be on.
    """

    text: str
    switches: str
    off: tuple[str, ...] = ("0",)
    details: str = ""
    usual: bool = False


_NGRAM = "NGRAM_AGREE_BONUS NGRAM_BASE_BETA NGRAM_OPEN_TABLE_BITS NGRAM_ORDER_STRIDE NGRAM_WITHIN_BETA"
_NGRAM += " NGRAM_WITHIN_THRESHOLD NGRAM_WORD_BETA NGRAM_WORD_THRESHOLD"
_TVERSKY = "TVERSKY_MEMBERSHIP TVERSKY_NUM_FEATURES TVERSKY_FEATURE_POOLS"
_PATTERNS = "CONTROL_TENSOR_NAME_PATTERNS INT8_KEEP_FLOAT_FP32_NAME_PATTERNS FP16_KEEP_NAME_PATTERNS"
FEATURES = (
    # Model
    Feature("BigramHash embeddings", "BIGRAM_VOCAB_SIZE BIGRAM_HASH", details="BIGRAM_DIM", usual=True),
    Feature("trigram embeddings", "TRIGRAM"),
    Feature("value embeddings", "VE_ENABLED", details="VE_DIM VE_LAYERS", usual=True),
    Feature("value residuals", "VALUE_RESIDUAL"),
    Feature("the attention gate of March 2026", "GATED_ATTENTION"),
    Feature("the attention gate of PR #1514", "GATED_ATTN"),
    Feature("a gate on the MLP's output", "GATE_MLP_OUT"),
    Feature("DTG", "DTG_ENABLED"),
    Feature("the ternary network's SmearGate", "SMEAR"),
    Feature("another slope of leaky ReLU", "NEGATIVE_SLOPE", ("0.5",)),
    Feature("asymmetric caps of the logits", "ASYMMETRIC_LOGIT"),
    Feature("loops from a step on; LOOP_START here", "RECUR_LAYERS", (), "RECUR_START_STEP", True),
    Feature("a second switch for the loops (PR #1412)", "LOOP_PHASE2_AT", ()),
    Feature("another length for YaRN; TRAIN_SEQ_LEN here", "ROPE_TRAIN_SEQ_LEN", ("2048",)),
    Feature("ternary weights", "BITNET_GROUP_SIZE"),
    Feature("another kind of attention", "ATTN_PROJ_TYPE", ("standard",), _TVERSKY),
    Feature("another kind of head", "LOGIT_HEAD_TYPE", ("standard",), _TVERSKY),
    Feature("differential attention", "DIFF_ATTN"),
    Feature("groups in the MLP", "MLP_GROUPS"),
    Feature("another activation", "ACTIVATION", ()),
    Feature("another cap of the logits", "SOFTCAP_TYPE", ("tanh",)),
    Feature("a refiner behind the head", "REFINER", details="REFINER_KERNEL"),
    Feature("another rotary embedding; ROPE_YARN here", "ROPE_TYPE", (), "YARN_MAX_LEN"),
    Feature("recurrence of all layers", "TRAINING_DEPTH_RECURRENCE EVAL_DEPTH_RECURRENCE"),
    # Optimisation
    Feature("averaging of late weights", "SWA_ENABLED", details="SWA_EVERY SWA_START_FRAC", usual=True),
    Feature("averaging of the last checkpoints", "LAWA_ENABLED", details="LAWA_K LAWA_FREQ"),
    Feature("multi-token prediction", "MTP_NUM_HEADS MTP_HEADS", details="MTP_LOSS_WEIGHT"),
    Feature("a rate of the untied head; EMBED_LR here", "TIE_EMBEDDINGS", ("1",), "HEAD_LR"),
    Feature("untying the head while training", "UNTIE_AT_FRACTION"),
    Feature("second moments in Muon", "MUON_BETA2", ("0.95",)),
    Feature("cautious weight decay", "CAUTIOUS_WD"),
    Feature("one decay of all weights; MUON_WD, ADAM_WD and EMBED_WD here", "WEIGHT_DECAY", ()),
    Feature("another optimiser of the matrices", "MATRIX_OPTIMIZER", ("muon",), "ADAM_LR"),
    Feature("a rate of correction weights", "CORR_WEIGHT_LR", ()),
    Feature("a schedule of the batch", "BATCH_TOKENS_START", details="BATCH_SCHEDULE_FRACTION"),
    Feature("a schedule of the context", "SEQ_LEN_START", details="SEQ_SCHEDULE_FRACTION"),
    Feature("another mode of the compiler; COMPILE_BACKEND here", "COMPILE_MODE", ("default",)),
    # Quantisation
    Feature("quantisation-aware training", "QAT_ENABLED"),
    Feature("quantisation late in training", "LATE_QAT", ("0",), "QAT_THRESHOLD LATE_QAT_THRESHOLD", True),
    Feature("bits that differ by layer", "MIXED_QUANT", details="N_INT6_LAYERS"),
    Feature("int4 layers", "INT4_LAYERS", (), "INT4_STEP", True),
    Feature("int5 layers", "INT5_LAYERS", ()),
    Feature("another storage of weights", "FP_STORAGE"),
    Feature("quantisation without GPTQ", "USE_GPTQ GPTQ_ENABLED", ("1",)),
    Feature("another damping of GPTQ", "GPTQ_DAMP", ("0.01",)),
    Feature("other blocks of GPTQ", "GPTQ_BLOCK_SIZE", ("128",)),
    Feature(
        "another calibration; GPTQ_CALIBRATION_BATCHES here", "GPTQ_CALIB_BATCHES GPTQ_CALIB_SAMPLES", ()
    ),
    Feature("Hessian-aware clips (PR #1412)", "HESSIAN_CLIP_LAMBDA"),
    Feature("another range of levels; MATRIX_BITS here", "QUANT_CLIP_RANGE", ("31",)),
    Feature("pruning to a size; FIT_BYTES here", "TARGET_MB", ()),
    Feature("tensors by patterns of their names", _PATTERNS, ()),
    # Evaluation
    Feature("the n-gram tilt by these names; NGRAM_TILT here", "NGRAM_TILT_ENABLED", details=_NGRAM),
    Feature("a bias fitted to the logits", "ETLB_ENABLED", details="ETLB_CLIP ETLB_LR ETLB_STEPS"),
    Feature("a fitted temperature", "TEMP_SCALING"),
    Feature("a limit of validation tokens; VAL_DOC_FRACTION here", "VAL_MAX_TOKENS"),
    Feature("adaptation of some documents; VAL_DOC_FRACTION here", "TTT_DOC_LIMIT"),
    Feature("adaptation of some batches; VAL_DOC_FRACTION here", "TTT_EVAL_BATCHES", ()),
    Feature("a limit of a phase's documents; PHASED_TTT_PREFIX_DOCS here", "GLOBAL_TTT_DOC_LIMIT"),
    Feature("blocks that do not adapt", "TTT_FREEZE_BLOCKS"),
    Feature("another clip in adaptation; GLOBAL_TTT_GRAD_CLIP here", "TTT_GRAD_CLIP", ("1.0",)),
    Feature("another batch in adaptation; GLOBAL_TTT_BATCH_SEQS here", "TTT_BATCH_SEQS", ("32",)),
    Feature("another optimiser of adapters", "TTT_OPTIMIZER", ("adam",)),
    Feature("adaptation that does nothing; TTT_ENABLED=0 here", "TTT_DEBUG_BYPASS"),
    Feature("adaptation alone; TTT_EVAL_ONLY here", "TTT_ONLY TTT_ONLY_EVAL"),
    Feature("an end after training; PREQUANT_ONLY here", "SKIP_POST_TRAIN_EVAL"),
    Feature("shards by patterns; DATA_PATH here", "TRAIN_FILES VAL_FILES", ()),
)
_SETTINGS = {name.upper() for name in Config.__annotations__}
Settled = Mapping[str, str]  # all our settings as text: as given, of the preset, or the default


def same(one: str, other: str) -> bool:
    """Whether two texts are one value of a setting: 1.0 and 1, True and 1."""
    numbers = {"true": "1", "false": "0"}
    one, other = (numbers.get(text.strip().lower(), text) for text in (one, other))
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


def _number(name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise ConfigError(f"{name}={value!r}: must be a number, at least 0")
    return number


def _milliseconds(name: str, value: str, settled: Settled) -> dict[str, str]:
    return {"GPTQ_RESERVE_SECONDS": f"{_number(name, value) / 1000:.12g}"}


def _hidden_units(name: str, value: str, settled: Settled) -> dict[str, str]:
    """MLP_HIDDEN of March 2026: the width of the MLP itself; 0 leaves it to MLP_MULT."""
    hidden, width = _number(name, value), max(1.0, _number("MODEL_DIM", settled["MODEL_DIM"]))
    mult = hidden / width
    if int(mult * width) < hidden:  # by rounding
        mult = math.nextafter(mult, math.inf)
    return {"MLP_MULT": str(mult)} if hidden else {}


def _as_wide_as_the_model(name: str, value: str, settled: Settled) -> dict[str, str]:
    if not same(value, width := settled["MODEL_DIM"]):
        raise ConfigError(f"{name}={value!r}: must be MODEL_DIM={width}; no projection is built here")
    return {}


def _steps_of_warmdown(name: str, value: str, settled: Settled) -> dict[str, str]:
    """WARMDOWN_ITERS of March 2026: steps, which are a share of training where their number is fixed."""
    steps, iterations = _number(name, value), _number("ITERATIONS", settled["ITERATIONS"])
    if steps and not same(settled["MAX_WALLCLOCK_SECONDS"], "0"):
        text = "steps are no share of training while MAX_WALLCLOCK_SECONDS caps it; must be WARMDOWN_FRAC"
        raise ConfigError(f"{name}={value!r}: {text}")
    return {"WARMDOWN_FRAC": str(min(1.0, steps / max(1.0, iterations)))}


def _parallel_from(name: str, value: str, settled: Settled) -> dict[str, str]:
    """PARALLEL_RESIDUAL_START (PR #1412, #1514), blocks on one stream: -1 is none, and 0 would be all."""
    if same(value, "-1"):
        return {"PARALLEL_START_LAYER": "0"}
    if not value.strip().isdecimal() or same(value, "0"):
        raise ConfigError(f"{name}={value!r}: must be -1, or a whole number above 0")
    return {"PARALLEL_START_LAYER": value, "PARALLEL_STYLE": "single"}


def _coefficients(name: str, value: str, settled: Settled) -> dict[str, str]:
    return {"MUON_COEFFICIENTS": "polar_express" if _is_on(name, value) else "quintic"}


def _fused_loss(name: str, value: str, settled: Settled) -> dict[str, str]:
    """FUSED_CE_ENABLED (PR #1787): one of our fused kernels; the others stay as they are."""
    kernels = kernel_names(settled["TRITON_KERNELS"])
    if ("loss" in kernels) == (fused := _is_on(name, value)):
        return {}
    chosen = [kernel for kernel in KERNELS if (fused if kernel == "loss" else kernel in kernels)]
    return {"TRITON_KERNELS": ",".join(chosen) or "0"}


def _model_to_evaluate(name: str, value: str, settled: Settled) -> dict[str, str]:
    """EVAL_ONLY_PATH (PR #1530): no training, a saved model is quantised and evaluated."""
    return {"MODEL_PATH": value, "QUANTIZE_ONLY": "1"}


def _artifact_to_evaluate(name: str, value: str, settled: Settled) -> dict[str, str]:
    """EVAL_ONLY_QUANTIZED_PATH (PR #1610): an artifact is evaluated."""
    return {"QUANTIZED_MODEL_PATH": value, "TTT_EVAL_ONLY": "1"}


Form = Callable[[str, str, Settled], dict[str, str]]  # name, value, settings -> what it sets of ours
FORMS: dict[str, Form] = {  # names in published commands whose values have another form
    "GPTQ_RESERVE_MS": _milliseconds,
    "MLP_HIDDEN": _hidden_units,
    "EMBEDDING_DIM": _as_wide_as_the_model,
    "EMBED_DIM": _as_wide_as_the_model,
    "WARMDOWN_ITERS": _steps_of_warmdown,
    "PARALLEL_RESIDUAL_START": _parallel_from,
    "USE_POLAR_EXPRESS": _coefficients,
    "FUSED_CE_ENABLED": _fused_loss,
    "EVAL_ONLY_PATH": _model_to_evaluate,
    "EVAL_ONLY_QUANTIZED_PATH": _artifact_to_evaluate,
}
TRANSLATED = (*ALIASES, *FORMS, *SWITCHES)  # other names and forms of our settings
LACKING = {name for feature in FEATURES for name in f"{feature.switches} {feature.details}".split()}
VOCABULARY = {*TRANSLATED, *HARMLESS, *LACKING, *TORCHRUN} - _SETTINGS


def _is_on(name: str, value: str) -> bool:
    if not (same(value, "0") or same(value, "1")):
        raise ConfigError(f"{name}={value!r}: must be 0 or 1")
    return same(value, "1")


def refuse_unexpanded(environ: Mapping[str, str]) -> None:
    """Raise ConfigError for a value that still names a variable, as `SEED=$SEED` between single quotes."""
    for name in sorted(environ.keys() & (_SETTINGS | VOCABULARY)):
        if re.search(r"\$(\w|\{\w+\})", environ[name]):
            text = "a variable that no shell has put in; must be its value"
            raise ConfigError(f"{name}={environ[name]!r}: {text}")


def refuse_lacking(given: Mapping[str, str], settled: Settled) -> None:
    """Raise ConfigError that names every feature which is asked for and not built here."""
    asked = [*_older_data(settled), *filter(None, (_asked(feature, given, settled) for feature in FEATURES))]
    if asked:
        raise ConfigError(f"{', '.join(asked)}: not built here")


def _asked(feature: Feature, given: Mapping[str, str], settled: Settled) -> str:
    """The variable that asks for a feature, as a user would write it, with what it must be; or nothing."""
    switches = {name: settled[name] for name in feature.switches.split() if name in settled}
    on = [name for name, value in switches.items() if not any(same(value, off) for off in ("", *feature.off))]
    allowed = " or ".join(feature.off) or "unset"
    if _SETTINGS & {*on} or (feature.usual and not switches):
        on = [name for name in feature.details.split() if given.get(name) and not same(given[name], "0")]
        allowed = "unset"
    return f"{on[0]}={settled[on[0]]!r} ({feature.text}; must be {allowed})" if on else ""


def _older_data(settled: Settled) -> Iterator[str]:
    """The plain text of the first systems, by the contest's name for its folder."""
    plain = re.search(r"fineweb10B_sp(\d+)/*$", settled["DATA_PATH"])
    if plain and plain[1] != "8192" and same(settled["CASEOPS_ENABLED"], "1"):
        own = f"CASEOPS_ENABLED=0 VOCAB_SIZE={plain[1]}"
        text = f"the systems on plain text of {plain[1]} pieces; another system on it needs {own}"
        yield f"DATA_PATH={settled['DATA_PATH']!r} ({text})"


def in_our_names(given: dict[str, str], base: Settled) -> list[str]:
    """Put the names and forms of published commands into ours, in place; returns what is to be said of it.

    Raises:
        ConfigError: an older name beside the present one with another value, a value that cannot be put into
            ours, or a feature that this script lacks.
    """
    refuse_unexpanded(given)
    notices = [f"{name}={given[name]}: {why}" for name, why in HARMLESS.items() if given.get(name)]
    for old in [name for name in ALIASES if name in given]:
        check_text(old, given[old], Config.__annotations__[ALIASES[old].lower()])
        _set(given, old, {ALIASES[old]: given[old]})
    for (name, text), (ours, why) in VALUES.items():
        if given.get(name) == text:
            given[name] = ours
            notices += [f"{name}={text}: {name}={ours}, {why}"] * bool(why)
    refuse_lacking(given, {**base, **given})
    for old in [name for name in FORMS if given.get(name)]:
        made = FORMS[old](old, given[old], {**base, **given})
        words = " ".join(f"{name}={value}" for name, value in made.items())
        notices += [f"{old}={given[old]}: {words}"] * bool(made)
        _set(given, old, made)
    notices += _switch(given, base)
    for name in VOCABULARY - {*TORCHRUN}:
        given.pop(name, None)
    return notices


def _set(given: dict[str, str], old: str, made: Mapping[str, str]) -> None:
    """Set what an older name stands for; it may not contradict what else is given."""
    for name, value in made.items():
        if not same(given.setdefault(name, value), value):
            clash = f"stands for {name}={value}, which is {given[name]!r}: must be the same or unset"
            raise ConfigError(f"{old}={given[old]!r}: {clash}")


def _switch(given: dict[str, str], base: Settled) -> Iterator[str]:
    """Let what is switched off be 0, whatever else is said of it; what is switched on must not be 0."""
    for old, name in SWITCHES.items():
        if not given.get(old):
            continue
        is_zero = same({**base, **given}[name], "0")
        if _is_on(old, given[old]) and is_zero:
            raise ConfigError(f"{old}={given[old]!r}: needs {name}, which is 0; must be above 0")
        if not _is_on(old, given[old]) and not is_zero:
            given[name] = "0"
            yield f"{old}={given[old]}: {name}=0"
