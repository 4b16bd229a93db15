"""Rules between settings: what must hold, the settings to name, and what to say where it does not."""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, get_args, get_origin

from train_gpt import (
    TORCHRUN,
    Config,
    ConfigError,
    base_type,
    check_micro_batches,
    chunk_size,
    kernel_names,
    layer_order,
    parse_setting,
)

EXCLUSIVE = (  # settings of which at most one may be on
    ("SPARSE_ATTN_GATE_ENABLED", "ATTN_OUT_GATE_ENABLED", "GATED_ATTN_ENABLED"),
    ("PREQUANT_ONLY", "QUANTIZE_ONLY", "TTT_EVAL_ONLY"),
)
GROWING = ("metrics.jsonl", "steps.jsonl")  # a run's files that grow while it goes
OUTPUTS = (*GROWING, "result.json", "train_gpt.packed.py")  # all its files, but for its models
# And what else is written into its folder, by ledger, checkpoints and tools: no model may have such a name.
TAKEN = {*OUTPUTS, "ledger.jsonl", "documents.json", "audit.json", "submission.json", "checkpoints", "logs"}
TAKEN |= {"report", "console.txt", "", ".", ".."}
MOST_BYTES = 200  # of a name: 255 less what is put before and behind it
MOST_NATS = 80  # of a tilt: float32 holds no more than exp(88)


def check_settings(cfg: Config) -> None:
    """Raise ConfigError where a setting is not possible, or not together with others."""
    for field in dataclasses.fields(cfg):
        _check_value(field.name.upper(), getattr(cfg, field.name), field.type)
    for rules in (_shape_rules, _layer_rules, _other_rules):
        for holds, names, text in rules(cfg):
            if not holds:
                raise ConfigError(f"{' '.join(pair(cfg, name) for name in names.split())}: {text}")
    check_micro_batches(cfg, world_size=1)  # what one rank cannot divide, more cannot either
    chunk_size(cfg, 0)  # TTT_CHUNK_BY_LENGTH is read as if a document were to be scored
    kernel_names(cfg.triton_kernels)


def check_training(cfg: Config) -> None:
    """Raise ConfigError where a run that trains could never do what its settings say."""
    trains = not (cfg.prequant_only or cfg.quantize_only or cfg.ttt_eval_only)
    if trains and cfg.num_loops and cfg.enable_looping_at >= 1:
        text = "the loops would never turn on; must be below 1 (NUM_LOOPS=0 trains without loops)"
        raise ConfigError(f"ENABLE_LOOPING_AT={cfg.enable_looping_at:g}: {text}")


def check_ranks(cfg: Config, environ: Mapping[str, str]) -> None:
    """Raise ConfigError where torchrun's variables are not possible."""
    given = {name: environ.get(name, str(alone)) for name, alone in TORCHRUN.items()}
    for name, text in given.items():
        if not text.isdecimal() or (name == "WORLD_SIZE" and int(text) == 0):
            raise ConfigError(f"{name}={text!r}: must be a whole number, as torchrun sets it")
    rank, local_rank, world_size = map(int, given.values())
    if rank >= world_size:
        raise ConfigError(f"RANK={rank}: must be below WORLD_SIZE={world_size}")
    for name, wrong in (("WORLD_SIZE", world_size > 1), ("LOCAL_RANK", local_rank > 0)):
        if wrong and not {"RANK", "MASTER_ADDR"} <= environ.keys():
            lacks = "without what torchrun sets beside it (RANK, MASTER_ADDR)"
            raise ConfigError(f"{name}={given[name]}: {lacks}; unset {name}, or start with torchrun")
    if local_rank > rank:
        raise ConfigError(f"LOCAL_RANK={local_rank}: must be at most RANK={rank}")
    check_micro_batches(cfg, world_size)


def adapts_documents(cfg: Config) -> bool:
    """Whether the score is that of phased LoRA test-time training."""
    return cfg.ttt_enabled and not (cfg.ttt_sgd or cfg.prequant_only)


def allowed(annotation: object) -> str:
    """What a setting of this type may be, in words."""
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(get_args(annotation))
    words = {bool: "0 or 1", int: "a whole number", float: "a number", str: "text"}[base_type(annotation)]
    if not get_args(annotation) or (bounds := get_args(annotation)[1]).low == -math.inf:
        return words
    lower = f"{words}, {'above' if bounds.above else 'at least'} {bounds.low:.12g}"
    return lower if bounds.high == math.inf else f"{lower}, at most {bounds.high:.12g}"


def check_text(name: str, text: str, annotation: object) -> None:
    """Raise ConfigError, saying all that is allowed, where a setting cannot be read."""
    try:
        parse_setting(name, text, annotation)
    except ConfigError:
        raise ConfigError(f"{name}={text!r}: must be {allowed(annotation)}") from None


def _check_value(name: str, value: object, annotation: object) -> None:
    kind = base_type(annotation)
    fits = isinstance(value, kind) if kind is not float else isinstance(value, (int, float))
    if fits and kind in (int, float):
        low, high, above = get_args(annotation)[1]
        fits = not isinstance(value, bool) and math.isfinite(value) and low <= value <= high
        fits = fits and not (above and value == low)
    if fits and get_origin(annotation) is Literal:
        fits = value in get_args(annotation)
    if not fits:
        raise ConfigError(f"{name}={value!r}: must be {allowed(annotation)}")


def pair(cfg: Config, name: str) -> str:
    """A setting as a user would write it: NAME=value."""
    value = getattr(cfg, name.lower())
    shown = (
        f"{value:.12g}" if isinstance(value, float) else repr(value) if value.__class__ is str else int(value)
    )
    return f"{name}={shown}"


# Later rules rely on earlier ones.


def _shape_rules(cfg: Config) -> Iterable[tuple[bool, str, str]]:
    heads = f"{cfg.head_dim} (MODEL_DIM / NUM_HEADS)"
    chunk = f"{pair(cfg, 'EVAL_SEQ_LEN')} (a chunk is whole windows)"
    yield cfg.model_dim % cfg.num_heads == 0, "MODEL_DIM", f"must be a multiple of {pair(cfg, 'NUM_HEADS')}"
    yield (
        cfg.num_heads % cfg.num_kv_heads == 0,
        "NUM_HEADS",
        f"must be a multiple of {pair(cfg, 'NUM_KV_HEADS')}",
    )
    yield (
        cfg.head_dim % 2 == 0,
        "MODEL_DIM NUM_HEADS",
        f"a head has {heads} dimensions, must be even (rotary pairs)",
    )
    fits = cfg.rope_dims <= cfg.head_dim and cfg.rope_dims % 2 == 0
    yield fits, "ROPE_DIMS", f"must be even and at most {heads}"
    rotated = (cfg.rope_dims or cfg.head_dim) > 2
    yield rotated or not cfg.rope_yarn, "ROPE_DIMS", "ROPE_YARN=1 needs more than 2 rotated dimensions"
    for name in ("GATE_WINDOW", "MUDD_WIDTH"):
        fits = getattr(cfg, name.lower()) <= cfg.model_dim
        yield fits, name, f"must be at most {pair(cfg, 'MODEL_DIM')}"
    yield cfg.mlp_dim >= 2, "MLP_MULT", "must leave the MLP at least 2 hidden units (rows need a deviation)"
    limit, adapts = cfg.ttt_eval_seq_len, adapts_documents(cfg)
    fits = not adapts or cfg.ttt_chunk_size <= limit
    yield fits, "TTT_CHUNK_SIZE", f"must be at most {pair(cfg, 'TTT_EVAL_SEQ_LEN')}"
    phases = adapts and cfg.phased_ttt_prefix_docs
    fits = not phases or cfg.global_ttt_chunk_tokens >= cfg.eval_seq_len
    yield fits, "GLOBAL_TTT_CHUNK_TOKENS", f"must be at least {chunk}"
    fits = not (adapts and cfg.ttt_cache_window) or cfg.ttt_chunk_size <= cfg.ttt_cache_window <= limit
    limits = f"{pair(cfg, 'TTT_CHUNK_SIZE')} to {pair(cfg, 'TTT_EVAL_SEQ_LEN')}"
    yield fits, "TTT_CACHE_WINDOW", f"must be 0 or {limits}"
    slides = cfg.sliding_window_enabled or cfg.ttt_sgd
    fits = not slides or cfg.eval_stride <= cfg.eval_seq_len
    yield fits, "EVAL_STRIDE", f"must be at most {pair(cfg, 'EVAL_SEQ_LEN')}"
    fits = not cfg.ttt_sgd or cfg.ttt_chunk_tokens >= cfg.eval_seq_len
    yield fits, "TTT_CHUNK_TOKENS", f"must be at least {chunk}"


def _layer_rules(cfg: Config) -> Iterable[tuple[bool, str, str]]:
    fits = not cfg.num_loops or cfg.loop_start <= cfg.loop_end < cfg.num_layers
    text = f"need LOOP_START <= LOOP_END < {pair(cfg, 'NUM_LAYERS')}"
    yield fits, "LOOP_START LOOP_END", text
    for looping in (False, True):
        decoder = layer_order(cfg, looping)[1]
        parallel = [layer >= cfg.parallel_start_layer > 0 for layer in decoder]
        comes_back = True in parallel and not all(parallel[parallel.index(True) :])
        text = f"the decoder {decoder} comes back below it after the lanes split; must be 0 or above"
        yield not comes_back, "PARALLEL_START_LAYER", f"{text} {pair(cfg, 'LOOP_END')}"


def _other_rules(cfg: Config) -> Iterable[tuple[bool, str, str]]:
    name = re.fullmatch(r"(\w[\w.+-]{0,99})?", cfg.run_id) and len(os.fsencode(cfg.run_id)) <= MOST_BYTES
    yield bool(name), "RUN_ID", f"must be a name of letters, digits and . _ + -, at most {MOST_BYTES} bytes"
    files = [Path(path).name for path in (cfg.model_path, cfg.quantized_model_path)]
    for setting, file in zip(("MODEL_PATH", "QUANTIZED_MODEL_PATH"), files, strict=True):
        taken = file in TAKEN or re.fullmatch(r"ledger\.\d+\.jsonl", file)
        fits = len(file) <= 99 and len(os.fsencode(file)) <= MOST_BYTES
        yield fits and not taken, setting, "must name a file of its own, none that a run writes besides"
    fits = files[0] != files[1]
    yield fits, "MODEL_PATH QUANTIZED_MODEL_PATH", "must end in two names of files"
    seconds, reserve = cfg.max_wallclock_seconds, cfg.gptq_reserve_seconds
    fits = not 0 < seconds < reserve + 0.001
    yield fits, "GPTQ_RESERVE_SECONDS", f"must be below {pair(cfg, 'MAX_WALLCLOCK_SECONDS')}"
    fits, least = (
        cfg.fit_bytes == 0 or cfg.fit_bytes >= 1 << 15,
        f"at least {1 << 15} (most of it is code)",
    )
    yield fits, "FIT_BYTES", f"must be 0 or {least}"
    fits = not cfg.gptq_drift_batches or cfg.fit_bytes > 0
    yield fits, "GPTQ_DRIFT_BATCHES", "needs FIT_BYTES (clip widths and LQER do not know the order of layers)"
    coded = cfg.quantizer == "scalar" or cfg.compressor == "ans"
    yield coded, "QUANTIZER COMPRESSOR", "a trellis needs COMPRESSOR=ans (levels are coded by its states)"
    text = "must be 1 where TTT_ENABLED=0, TTT_SGD=1 or PREQUANT_ONLY=1: all documents are scored"
    adapts = adapts_documents(cfg)
    yield cfg.val_doc_fraction == 1 or adapts, "VAL_DOC_FRACTION", text
    pairs = re.findall(r"([0-9]{1,4}):([0-9]{1,2}(?:\.[0-9]+)?)(?:,|$)", cfg.ngram_tilt)
    again, orders = ",".join(map(":".join, pairs)), {int(order) for order, _ in pairs}
    fits = again == cfg.ngram_tilt and len(orders) == len(pairs) and 0 not in orders
    fits = fits and all(0 < float(nats) <= MOST_NATS for _, nats in pairs)
    text = "must be ORDER:NATS,... such as 16:2.62,8:1.5: tokens of context, each number once"
    yield fits, "NGRAM_TILT", f"{text}; nats above 0 and at most {MOST_NATS}; empty: off"
    text = "needs TTT_ENABLED=1 and TTT_SGD=0: the adaptation by documents is what is tilted; empty: off"
    yield not cfg.ngram_tilt or cfg.prequant_only or adapts, "NGRAM_TILT", text
    for names in EXCLUSIVE:
        chosen = [name for name in names if getattr(cfg, name.lower())]
        yield len(chosen) < 2, " ".join(chosen), "exclude each other: set at most one"
