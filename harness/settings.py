"""Settings for people: presets of published systems, older names, help, and names that are almost right."""

import dataclasses
import difflib
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence

import train_gpt
from harness.lineage import VOCABULARY, in_our_names, same
from harness.rules import EXCLUSIVE, check_settings, check_text, check_training
from harness.unread import lacking, name_of, unread
from systems.layout import as_set
from train_gpt import Config, ConfigError

_WINDOWS = {  # PR #1493 and its descendants
    "caseops_enabled": False,
    "plain_windows": True,
    "smear_gate_enabled": False,
    "sparse_attn_gate_enabled": False,
    "parallel_style": "single",
    "parallel_start_layer": 7,
    "qk_gain_init": 5.25,
    "muon_coefficients": "quintic",
    "muon_momentum": 0.99,
    "matrix_lr": 0.022,
    "warmdown_frac": 0.72,
    "min_lr": 0.0,
    "embed_bits": 8,
    "embed_clip_sigmas": 20.0,
    "attn_clip_sigmas": 12.85,
    "mlp_clip_sigmas": 12.85,
    "lqer_enabled": False,
    "gptq_calibration_batches": 64,
    "gptq_reserve_seconds": 12.0,
    "sliding_window_enabled": True,
    "ttt_sgd": True,
}
_LOOPS_45 = _WINDOWS | {  # PR #1394 and what came of it before PR #1493
    "loop_start": 4,
    "enable_looping_at": 0.5,
    "ema_decay": 0.997,
    "matrix_lr": 0.02,
    "muon_wd": 0.085,
    "warmdown_frac": 0.667,
    "qk_gain_init": 4.0,
    "parallel_start_layer": 0,
}
_DOCUMENTS = {  # PR #1530 and its descendants
    "caseops_enabled": False,
    "smear_gate_enabled": False,
    "sparse_attn_gate_enabled": False,
    "min_lr": 0.0,
    "muon_coefficients": "quintic",
    "lqer_enabled": False,
    "gptq_reserve_seconds": 4.0,
    "ttt_weight_decay": 0.5,
    "ttt_lora_alpha": 96.0,
    "ttt_warm_start_a": False,
}
_VARLEN = _DOCUMENTS | {  # PR #1530 itself
    "embed_bits": 8,
    "embed_clip_sigmas": 20.0,
    "attn_clip_sigmas": 12.85,
    "mlp_clip_sigmas": 12.85,
    "matrix_lr": 0.022,
    "warmdown_frac": 0.72,
    "gptq_calibration_batches": 64,
    "gptq_reserve_seconds": 13.0,
    "ttt_chunk_size": 32,
    "phased_ttt_prefix_docs": 0,
}
_GATED = _DOCUMENTS | {  # PR #1736
    "caseops_enabled": True,
    "gated_attn_enabled": True,
    "gated_attn_init_std": 0.005,
    "gated_attn_quant_gate": True,
}
_SYSTEMS = {
    "pr1851": {},
    "pr1868": {"gptq_reserve_seconds": 8.0},
    "best": {  # the record and what has been shown to be better at equal bytes (docs/study.md)
        "gptq_reserve_seconds": 30.0,
        "quantizer": "trellis",
        "compressor": "ans",
        "fit_bytes": 16_000_000,
        "gptq_drift_batches": 4,
        "muon_maxwell": True,
        "mudd_width": 32,
        "ngram_tilt": "16:2.62",
    },
    "one_gpu": {"max_wallclock_seconds": 4800.0, "checkpoint_seconds": 300.0},  # eight times as long
    "pr1855": {
        "mlp_clip_sigmas": 11.5,
        "embed_clip_sigmas": 14.0,
        "warmdown_frac": 0.85,
        "beta2": 0.99,
        "compressor": "ans",
        "ttt_beta2": 0.99,
        "ttt_weight_decay": 0.5,
        "ttt_lora_rank": 80,
        "sparse_attn_gate_scale": 0.5,
        "phased_ttt_prefix_docs": 2500,
        "gated_attn_quant_gate": True,
    },
    "pr1787": {"smear_gate_enabled": False, "lqer_enabled": False, "gated_attn_quant_gate": True},
    "pr1769": _GATED,
    "pr1736": _GATED,
    "pr1729": _DOCUMENTS | {"caseops_enabled": True, "wd_taper_final_mult": 0.5},
    "pr1667": _DOCUMENTS
    | {
        "smear_gate_enabled": True,
        "smear_bos_mask": False,
        "attn_out_gate_enabled": True,
        "qk_gain_init": 5.25,
        "gptq_calibration_batches": 64,
        "gptq_reserve_seconds": 13.0,
        "phased_ttt_prefix_docs": 0,
    },
    "pr1626": _DOCUMENTS,
    "pr1610": _VARLEN
    | {
        "phased_ttt_prefix_docs": 2000,
        "phased_ttt_num_phases": 1,
        "global_ttt_epochs": 3,
        "global_ttt_lr": 0.005,
    },
    "pr1530": _VARLEN,
    "pr1858": _WINDOWS | {"ttt_epochs": 2},
    "pr1493": _WINDOWS,
    "pr1485": _WINDOWS | {"qk_gain_init": 5.0, "ttt_enabled": False, "ttt_sgd": False},
    "pr1514": _LOOPS_45
    | {"loop_start": 3, "parallel_start_layer": 7, "qk_gain_init": 5.0, "muon_momentum": 0.97},
    "pr1477": _LOOPS_45 | {"parallel_start_layer": 7},
    "pr1413": _LOOPS_45 | {"qk_gain_init": 5.0},
    "pr1412": _LOOPS_45
    | {"parallel_start_layer": 7, "ttt_enabled": False, "ttt_lr": 0.0005, "ttt_epochs": 4},
    "pr1394": _LOOPS_45 | {"ttt_enabled": False},
}
WITHOUT = {  # what a preset leaves out of the published system, which is not built here
    "pr1514": "its n-gram tilt",
    "pr1477": "its learned blend of two lanes: blocks from layer 7 on are parallel on one stream",
    "pr1412": "its Hessian-aware clips and the later start of its second loop",
}

_DEMO = train_gpt.PRESETS["demo"]
_DEMO_PLAIN = {"data_path": "data/demo_plain", "gptq_calibration_batches": 16}
_DEMO_WINDOWS = _DEMO_PLAIN | {"ttt_chunk_tokens": 2048}
_DEMO_LORA = {"ttt_lora_alpha": 8.0}
_DEMO_SIZES = {  # where a system's own sizes are others than the record's, those of its demo are too
    "best": {"fit_bytes": 475_000},  # as many as the record's demo has
    "pr1855": {"ttt_lora_rank": 7, "phased_ttt_prefix_docs": 30},
    **dict.fromkeys(("pr1769", "pr1736", "pr1729"), _DEMO_LORA),
    "pr1626": _DEMO_LORA | {"data_path": "data/demo_plain"},
    "pr1610": _DEMO_LORA | _DEMO_PLAIN | {"phased_ttt_num_phases": 1},
    **dict.fromkeys(("pr1667", "pr1530"), _DEMO_LORA | _DEMO_PLAIN | {"phased_ttt_prefix_docs": 0}),
    **dict.fromkeys(("pr1858", "pr1493", "pr1485", "pr1514", "pr1477", "pr1412"), _DEMO_WINDOWS),
    **dict.fromkeys(("pr1413", "pr1394"), _DEMO_WINDOWS | {"parallel_start_layer": 0}),
}
_STUDY = _DEMO | train_gpt.parse_settings(
    """DATA_PATH=data/study/confirm1 VOCAB_SIZE=8192 TRAIN_SEQ_LEN=512 EVAL_SEQ_LEN=512 TTT_EVAL_SEQ_LEN=512
    ITERATIONS=256 MUON_MOMENTUM_WARMUP_STEPS=80 VAL_LOSS_EVERY=0 TRAIN_LOG_EVERY=64 EMA_DECAY=0.97
    TTT_BATCH_SIZE=32 TTT_CHUNK_SIZE=96 PHASED_TTT_PREFIX_DOCS=160 GLOBAL_TTT_CHUNK_TOKENS=8192 AUDIT=0"""
)  # a vocabulary as the record's, real prose, a million tokens
PRESETS: dict[str, dict[str, object]] = {
    **_SYSTEMS,
    **{f"{name}-study": row | _STUDY for name, row in _SYSTEMS.items() if row.get("caseops_enabled", True)},
    "best-study": _SYSTEMS["best"]
    | _STUDY  # bytes: about as many as the record has there; a small model gains most by short contexts
    | {"fit_bytes": 955_000, "ngram_tilt": "8:5.6,4:4,2:3"},
    **{f"{name}-demo": row | _DEMO | _DEMO_SIZES.get(name, {}) for name, row in _SYSTEMS.items()},
    "demo": _DEMO,
}
# Settings of a preset -> what they are when off, and what they need.
NEEDS = {
    "QUANTIZER": ("scalar", "COMPRESSOR=ans"),
    "GPTQ_DRIFT_BATCHES": ("0", "FIT_BYTES>0"),
    "NGRAM_TILT": ("", "TTT_SGD=0 and TTT_ENABLED=1"),
}

SCALES = ("full", "demo", "study")
NO_SETTINGS = {  # variable that changes no number of a run, or only which preset is meant -> values, help
    "SCALE": (
        SCALES,
        "full: as published; demo, study: the same system at the demo's or a study's size and data",
    ),
    "CONSOLE": (("auto", "log"), "auto: the run in words, live on a terminal; log: the lines of the log"),
    "VERIFY": (("0", "1"), "1: hash all data files again, not only those that changed since the last start"),
}


def given_settings(environ: Mapping[str, str]) -> Config:
    """The settings of a run: those of `Config.from_env`, by older names too, and never by a mistyped one.

    Raises ConfigError: as `Config.from_env` and `translate`, or a name that is almost one of ours.
    """
    given = translate(environ)
    _refuse_unknown_names(given, [*Config().as_env(), *NO_SETTINGS])
    console_form(given)  # mistakes are met here, before a rank is made
    verifies(given)
    for field in dataclasses.fields(Config):
        if (name := field.name.upper()) in given:
            check_text(name, given[name], field.type)
    cfg = Config.from_env(given, PRESETS)
    try:
        check_settings(cfg)
    except ConfigError as error:
        row = {name.upper() for name in PRESETS[cfg.preset]} - given.keys()
        theirs = [name for name in re.findall(r"\b([A-Z]\w+)=", str(error)) if name in row]
        of_preset = f" ({' and '.join(dict.fromkeys(theirs))} as PRESET={cfg.preset} has it)" * bool(theirs)
        raise ConfigError(f"{error}{of_preset}") from None
    check_training(cfg)
    return cfg


def read_settings(environ: Mapping[str, str]) -> Config:
    """The same with the places of data and tokenizer. Also raises DataError, as `find_data`."""
    from harness.manifest import find_data  # which needs torch

    return find_data(given_settings(environ))


def translate(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment in our names: those of published commands too, and SCALE as part of PRESET.

    What a preset switched on gives way to what a variable switches on. Rank 0 of a machine says on stderr
    what is taken for something else or for nothing.

    Raises:
        ConfigError: as `in_our_names`, or a SCALE that is none.
    """
    given = dict(environ)
    scale = given.pop("SCALE", "full")
    if scale not in SCALES:
        raise ConfigError(f"SCALE={scale!r}: must be one of {', '.join(SCALES)}")
    preset = given.get("PRESET", Config.preset)
    size = preset.rpartition("-")[2]
    if f"{preset}-{scale}" in PRESETS:
        given["PRESET"] = f"{preset}-{scale}"
    elif preset in PRESETS and scale not in ("full", size):
        if size in SCALES:
            raise ConfigError(f"SCALE={scale} PRESET={preset}: that preset has a size of its own")
        raise ConfigError(
            f"SCALE={scale} PRESET={preset}: a study has CaseOps text; must be a system of such text"
        )
    row = Config(**PRESETS.get(given.get("PRESET", preset), {}))
    base = {name: str(value) for name, value in row.as_env().items()}
    left_out = WITHOUT.get(preset.removesuffix("-demo"))
    notices = [f"PRESET={preset}: without {left_out} (not built here)"] * bool(left_out)
    notices += [
        *in_our_names(given, base),
        *_give_way(given, base, preset),
        *unread({**environ, **given}, base),
    ]
    notices += [*_in_lower_case(environ), *_alone_among_tasks(environ)]
    if environ.get("LOCAL_RANK", "0") == "0":
        for notice in notices:
            print(f"train_gpt.py: notice: {notice}", file=sys.stderr)
    return given


def verifies(environ: Mapping[str, str]) -> bool:
    """Whether VERIFY asks that all data files be hashed, also those remembered. Raises ConfigError."""
    if (wish := environ.get("VERIFY", "0")) not in ("0", "1"):
        raise ConfigError(f"VERIFY={wish!r}: must be 0 or 1")
    return wish == "1"


def console_form(environ: Mapping[str, str]) -> str:
    """What CONSOLE asks for: "auto" or "log". Raises ConfigError.

    A path is not meant for us: the first process of a container often leaves CONSOLE=/dev/console behind.
    """
    form = environ.get("CONSOLE", "auto")
    if form not in ("auto", "log") and "/" not in form:
        raise ConfigError(f"CONSOLE={form!r}: must be one of auto, log")
    return "log" if form == "log" else "auto"


def _give_way(given: dict[str, str], base: Mapping[str, str], preset: str) -> Iterator[str]:
    """Switch off what a preset has on and a variable excludes, or takes away what it needs."""
    for names in EXCLUSIVE:
        wanted = [name for name in names if same(given.get(name, "0"), "1")]
        for name in names:
            if wanted and name not in given and same(base[name], "1"):
                given[name] = "0"
                yield f"{name}=1 of PRESET={preset} gives way to {wanted[0]}=1"
    for name, (off, needs) in NEEDS.items():
        if name not in given and not same(base[name], off) and (terms := lacking(needs, {**base, **given})):
            given[name] = off
            others = [other for other in dict.fromkeys(map(name_of, terms)) if other in given]
            wrong = [f"{other}={given[other]}" for other in others]
            yield f"{name}={base[name]} of PRESET={preset} gives way to {' '.join(wrong)}"


def _in_lower_case(environ: Mapping[str, str]) -> Iterator[str]:
    """Say of our names in lower case that they are not read, unless the right one is there too."""
    ours = {*Config().as_env(), *VOCABULARY, *NO_SETTINGS} - environ.keys()
    for name in sorted(environ):
        if name.upper() in ours:
            yield f"{name}={environ[name]}: not read; did you mean {name.upper()}?"


# How many tasks a batch system has started, and which of them this is.
TASKS = {"SLURM_STEP_NUM_TASKS": "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK"}


def _alone_among_tasks(environ: Mapping[str, str]) -> Iterator[str]:
    """Say of several tasks that torchrun has not made ranks that each is a run of its own."""
    for count, number in TASKS.items():
        tasks = environ.get(count, environ.get("SLURM_NTASKS", "1"))
        first = environ.get(number) == "0" and "WORLD_SIZE" not in environ
        if first and tasks.isdecimal() and int(tasks) > 1:
            yield f"{tasks} tasks, each is a run of its own: torchrun makes one of them (docs/ranks.md)"


# Variables with these beginnings are ours, so an unknown one is a mistake.
FAMILIES = re.compile(
    "((GLOBAL_|PHASED_)?TTT|GPTQ|LQER|MUON|SMEAR|SPARSE_ATTN|GATED_ATTN|ATTN_OUT|XSA|NGRAM|MUDD)_"
)


ELSEWHERE = {"NUM_THREADS"}  # a variable of other tools that is no slip of ours (NUM_HEADS)


def nearest_name(name: str, names: Collection[str]) -> str | None:
    """The name that was meant, if any: the same letters, or so few others that it is no other word."""
    likely = [other for other in names if abs(len(other) - len(name)) <= 1 + len(name) // 16]
    letters = [other for other in likely if sorted(other) == sorted(name)]
    return next(iter(letters or difflib.get_close_matches(name, likely, n=1, cutoff=0.86)), None)


def _refuse_unknown_names(environ: Mapping[str, str], known: Sequence[str]) -> None:
    for name in sorted(environ.keys() - set(known) - VOCABULARY - ELSEWHERE):
        near = nearest_name(name, known) or nearest_name(name, sorted(VOCABULARY))
        if near and "/" in environ[name] and type(getattr(Config, near.lower(), "")) is not str:
            continue  # a path, as MODEL_DIR of many a cluster, is not meant as MODEL_DIM
        if name.isupper() and (near or FAMILIES.match(name)):
            meant = f"did you mean {near}? (unset it or see --help)" if near else "must be unset; see --help"
            raise ConfigError(f"{name}={environ[name]!r}: no such setting; {meant}")


def show_settings(cfg: Config) -> str:
    """The resolved settings, one a line; what differs from the default is marked with its default."""
    rows = []
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        value, default = as_set(value), as_set(field.default)
        mark = "" if value == default else f"    # default {default!r}"
        rows.append(f"{field.name.upper()}={value}{mark}")
    return "\n".join(rows)
