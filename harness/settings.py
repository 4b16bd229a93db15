"""Settings for people: presets of published systems, older names, help, and names that are almost right."""

import dataclasses
import difflib
import re
import sys
from collections.abc import Mapping, Sequence

import train_gpt
from harness.rules import allowed, check_settings, check_text
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
_SYSTEMS = {
    "pr1851": {},
    "pr1868": {"gptq_reserve_seconds": 8.0},
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
    "pr1667": {
        "caseops_enabled": False,
        "smear_bos_mask": False,
        "sparse_attn_gate_enabled": False,
        "attn_out_gate_enabled": True,
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
    "pr1858": _WINDOWS | {"ttt_epochs": 2},
    "pr1493": _WINDOWS,
    "pr1485": _WINDOWS | {"qk_gain_init": 5.0, "ttt_enabled": False, "ttt_sgd": False},
}


_DEMO = train_gpt.PRESETS["demo"]
_DEMO_PLAIN = {"data_path": "data/demo_plain", "gptq_calibration_batches": 16}
_DEMO_WINDOWS = _DEMO_PLAIN | {"ttt_chunk_tokens": 2048}
_DEMO_SIZES = {  # where a system's own sizes are others than the record's, those of its demo are too
    "pr1855": {"ttt_lora_rank": 7, "phased_ttt_prefix_docs": 30},
    "pr1667": _DEMO_PLAIN | {"ttt_lora_alpha": 8.0, "phased_ttt_prefix_docs": 0},
    **dict.fromkeys(("pr1858", "pr1493", "pr1485"), _DEMO_WINDOWS),
}
PRESETS: dict[str, dict[str, object]] = {
    **_SYSTEMS,
    **{f"{name}-demo": row | _DEMO | _DEMO_SIZES.get(name, {}) for name, row in _SYSTEMS.items()},
    "demo": _DEMO,
}


ALIASES = {  # names in published commands and logs -> ours
    "SMEAR_GATE": "SMEAR_GATE_ENABLED",
    "SMEAR_GATE_WIDTH": "GATE_WINDOW",
    "GATE_WIDTH": "GATE_WINDOW",
    "GATE_ATTN_OUT": "ATTN_OUT_GATE_ENABLED",
    "GATE_ATTN_SRC": "ATTN_OUT_GATE_SRC",
    "PARALLEL_RESIDUAL_START": "PARALLEL_START_LAYER",
    "FUSED_CE_ENABLED": "TRITON_KERNELS",
}


UNREAD = ("PHASED_TTT_ENABLED", "ROPE_TRAIN_SEQ_LEN")  # of published commands and logs, read by no script


def read_settings(environ: Mapping[str, str]) -> Config:
    """The settings of a run: those of `Config.from_env`, by older names too, and never by a mistyped one.

    Raises:
        ConfigError: as `Config.from_env` and `translate`, or a name that is almost one of ours.
    """
    given = translate(environ)
    _refuse_unknown_names(given, [field.name.upper() for field in dataclasses.fields(Config)])
    for field in dataclasses.fields(Config):
        if (name := field.name.upper()) in given:
            check_text(name, given[name], field.type)
    cfg = Config.from_env(given, PRESETS)
    check_settings(cfg)
    return cfg


def translate(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment in our names: older ones of published commands, and SCALE as part of PRESET.

    Rank 0 of a machine says on stderr what is taken for something else or for nothing.

    Raises:
        ConfigError: an older name beside the present one with another value, or a SCALE that is none.
    """
    given, notices = dict(environ), []
    for old, name in ALIASES.items():
        if old in given:
            value = given.pop(old)
            if given.setdefault(name, value) != value:
                clash = f"another name of {name}, which is {given[name]!r}: must be the same or unset"
                raise ConfigError(f"{old}={value!r}: {clash}")
    if given.get("COMPRESSOR") == "pergroup":
        given["COMPRESSOR"] = "ans"
        notices.append("COMPRESSOR=pergroup: COMPRESSOR=ans, this script's entropy coder (no lrzip needed)")
    if given.get("TRITON_KERNELS") == "1":
        given["TRITON_KERNELS"] = Config.triton_kernels
    notices += [f"{name}={given.pop(name)}: no published script reads it" for name in UNREAD if name in given]
    scale = given.pop("SCALE", "full")
    if scale not in ("full", "demo"):
        raise ConfigError(f"SCALE={scale!r}: must be one of full, demo")
    preset = given.get("PRESET", Config.preset)
    if scale == "demo" and f"{preset}-demo" in PRESETS:
        given["PRESET"] = f"{preset}-demo"
    if environ.get("LOCAL_RANK", "0") == "0":
        for notice in notices:
            print(f"train_gpt.py: notice: {notice}", file=sys.stderr)
    return given


# Variables with these beginnings are ours, so an unknown one is a mistake.
FAMILIES = re.compile("(TTT|GLOBAL_TTT|PHASED_TTT|GPTQ|LQER|MUON|SMEAR|SPARSE_ATTN|GATED_ATTN|ATTN_OUT|XSA)_")


def _refuse_unknown_names(environ: Mapping[str, str], known: Sequence[str]) -> None:
    for name in sorted(environ.keys() - set(known)):
        cutoff = 0.0 if FAMILIES.match(name) else 0.86
        swapped = [other for other in known if sorted(other) == sorted(name)]
        near = swapped or difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
        if near and name.isupper():
            meant = f"did you mean {near[0]}? (unset it or see --help)"
            raise ConfigError(f"{name}={environ[name]!r}: no such setting; {meant}")


def setting_comments(source: str) -> dict[str, str]:
    """Help text of each setting: the comments behind the fields in the script's source."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))


def settings_table(source: str) -> str:
    """The table of `--help`; a packed script has lost its comments."""
    comments = setting_comments(source)
    rows = []
    for field in dataclasses.fields(Config):
        default = int(field.default) if isinstance(field.default, bool) else field.default
        help_text = comments.get(field.name, "")
        rows.append(f"  {field.name.upper()}={default}\n      {help_text} [{allowed(field.type)}]")
    return "\n".join(rows)


def help_text(source: str) -> str:
    """What `--help` prints, by the source of train_gpt.py."""
    presets = f"Settings, as environment variables (PRESET one of {', '.join(PRESETS)}):"
    return f"{train_gpt.__doc__}\n{presets}\n\n{settings_table(source)}"


def show_settings(cfg: Config) -> str:
    """The resolved settings, one a line; what differs from the default is marked with its default."""
    rows = []
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        mark = "" if value == field.default else f"    # default {field.default!r}"
        rows.append(f"{field.name.upper()}={int(value) if isinstance(value, bool) else value}{mark}")
    return "\n".join(rows)
