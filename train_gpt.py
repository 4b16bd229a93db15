"""Train, quantise and score a 16 MB language model: the parameter-golf contest in one file.

In ten minutes on eight H100s this trains an 11-layer GPT (17 virtual layers by depth recurrence) on CaseOps
text, quantises it with GPTQ + LQER into an artifact of at most 16,000,000 bytes (code plus weights), loads
that artifact into a clean model and scores it in bits per byte, adapting per-document LoRAs only on what has
been scored.

    torchrun --standalone --nproc_per_node=8 train_gpt.py        # the record run: nothing set = PR #1851
    python train_gpt.py                                          # the same on one GPU
    PRESET=demo python train_gpt.py                              # minutes on a laptop's CPU (see `make demo`)
    PRESET=pr1667 SCALE=demo python train_gpt.py                 # another published system at that size
    python train_gpt.py --help [TOPIC] | --show [--json]         # the settings | the resolved ones

A reader can stop at any banner (# ----) and have understood what is above it. harness/ watches over a run,
systems/ has parts that some settings use; copied alone, this file still does the record and the demo.

Shapes: B rows, T tokens of a row, D model dim, H query heads, G key/value heads, d = D/H, F MLP width,
V vocabulary, L physical layers, S skips, r rank. A linear map is y = x W^T with W [out, in], never a bias.
"""

import base64
import bisect
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import lzma
import math
import os
import random
import struct
import sys
import time
import traceback
import warnings
from collections import namedtuple
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_origin

# ---- 1. Constants and errors ---------------------------------------------------------------------------

BOS = 1  # first token of every document, fixed by the tokenizer
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
COUNTED = False  # True in the script as it is counted, which is without what only helps its users
SIZE_LIMIT = 16_000_000  # decimal bytes, code plus model
TRAIN_LIMIT = EVAL_LIMIT = 600.0  # seconds
CONTEST_MICRO_BATCHES = 8  # a step is eight micro-batches, shared by the ranks
SEGMENT_BUCKET = 64  # cu_seqlens is padded to a multiple of this, so that shapes stay few
BARRIER_SECONDS = 3600  # a rank that has not finished a stage so long after another has failed


class UserError(ValueError):
    """A mistake of the user's: reported as one line, exit code 2, nothing lost."""


class RunError(RuntimeError):
    """A run that cannot go on through no setting's fault: one line, exit code 1."""


class ConfigError(UserError):
    """A setting with a wrong name, type, value or combination."""


class DataError(UserError):
    """A shard, sidecar, manifest or tokenizer that is missing, damaged or does not fit the settings."""


class ArtifactError(UserError):
    """A model file that is truncated, corrupted or foreign."""


# ---- 2. Configuration ----------------------------------------------------------------------------------
# Every setting is a field of `Config`: type and range, default, and a line of help (`--help` prints it). Its
# environment variable is the field's name in capitals. Defaults are the record, PR #1851.


class Range(NamedTuple):
    """Allowed interval of a number; `above` excludes the lower end. harness/rules.py looks at it."""

    low: float
    high: float = math.inf
    above: bool = False


Whole = Annotated[int, Range(0, 10**9)]
Count = Annotated[int, Range(1, 10**9)]
Loops = Annotated[int, Range(0, 100)]
Bits = Annotated[int, Range(2, 8)]
Real = Annotated[float, Range(-1e6, 1e6)]
Amount = Annotated[float, Range(0, 1e6)]
Rate = Annotated[float, Range(0, 100)]
Positive = Annotated[float, Range(1e-30, 1e6)]
Share = Annotated[float, Range(0, 1)]
Beta = Annotated[float, Range(0, 0.999999)]
Backend = Literal["auto", "fa3", "fa4", "torch_varlen", "flex", "plain"]


@dataclass(frozen=True)
class Config:
    """All settings of a run, as they were given; `harness/rules.py` refuses impossible ones."""

    # Run
    preset: str = "pr1851"  # base that explicit variables change; --help presets has them
    seed: Annotated[int, Range(0, 2**32 - 1)] = 42  # of initial weights, adapters, VAL_DOC_FRACTION's sample
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA when there is one
    cpu_threads: Annotated[int, Range(0, 1024)] = 0  # threads on a CPU; 0: torch decides; 1: exact repeats
    run_id: str = ""  # name of the run; empty: preset, seed and start time
    artifact_dir: str = ""  # folder of the outputs; empty: runs/<RUN_ID>
    wandb_project: str = ""  # send the log's numbers to this project of Weights & Biases (wandb)
    tensorboard_dir: str = ""  # write them for TensorBoard below this folder (tensorboard)
    checkpoint_seconds: Amount = 0.0  # training or adaptation between two checkpoints; 0: none, no resuming
    resume: bool = True  # go on with the unfinished run of the same command; 0: always begin a new one
    prequant_only: bool = False  # stop after the full-precision evaluation (of MODEL_PATH, if it is there)
    quantize_only: bool = False  # no training: calibrate, quantise and evaluate MODEL_PATH
    ttt_eval_only: bool = False  # no training: evaluate the artifact QUANTIZED_MODEL_PATH
    preflight_only: bool = False  # stop after all checks, the warm-up and its measured speed
    model_path: str = "final_model.pt"  # full-precision weights, an input of the *_ONLY stages
    quantized_model_path: str = "final_model.int6.ptz"  # the artifact, the input of TTT_EVAL_ONLY

    # Speed
    attention_backend: Backend = "auto"  # auto: the first of the others that works on the device
    triton_kernels: str = "loss,mlp,qkv_norm_rope,xsa_gate"  # fused, on CUDA with Triton; 1: all; 0: none
    compile_backend: Literal["auto", "off", "aot_eager", "inductor"] = "auto"  # inductor on CUDA

    # Data
    data_dir: str = "./data/"  # root of the default data layout
    data_path: str = ""  # folder of the shards; empty: the contest's place under DATA_DIR
    tokenizer_path: str = ""  # SentencePiece model; empty: named by the manifest, else the contest's place
    caseops_enabled: bool = True  # lossless-caps text and byte sidecar (PR #1729); 0: plain text
    allow_unverified_data: bool = False  # also data without manifest or at odds with it; recorded
    vocab_size: Annotated[int, Range(4, 65536)] = 8192  # pieces of the tokenizer
    train_seq_len: Count = 2048  # tokens; longer documents are cut into segments of this length
    train_batch_tokens: Count = 786_432  # tokens of one optimiser step, all ranks together
    grad_accum_steps: Count = 8  # micro-batches of a step, shared by the ranks; more ranks than that take one
    plain_windows: bool = False  # no documents: windows, in random order when training (PR #1493)

    # Model
    num_layers: Annotated[int, Range(1, 1000)] = 11  # physical layers
    model_dim: Count = 512  # width of the residual stream
    num_heads: Count = 8  # query heads
    num_kv_heads: Count = 4  # key/value heads (GQA)
    mlp_mult: Positive = 4.0  # MLP width / MODEL_DIM
    tie_embeddings: bool = True  # output matrix = embedding matrix
    logit_softcap: Annotated[float, Range(1e-30, 1000)] = 30.0  # cap * tanh(z / cap) in float32
    rope_base: Positive = 10_000.0  # rotary base
    rope_dims: Whole = 16  # rotated dimensions of each head; 0: all
    rope_yarn: bool = False  # one rotary base for training too, stretched for the longest row evaluated
    ln_scale: bool = True  # scale normed inputs of layer i by 1/sqrt(i+1)
    num_loops: Loops = 2  # extra passes through layers LOOP_START..LOOP_END (depth recurrence)
    loop_start: Whole = 3  # first looped layer
    loop_end: Whole = 5  # last looped layer
    parallel_start_layer: Whole = 8  # decoder layers from here on are parallel; 0: none
    parallel_style: Literal["lanes", "single"] = "lanes"  # two lanes with lambdas, or one stream (PR #1493)
    parallel_final_lane: Literal["mean", "attn", "mlp"] = "mean"  # what of the two lanes goes to the head
    skip_gates_enabled: bool = True  # gated instead of plain skip connections
    xsa_last_n: Whole = 11  # last layers whose heads lose their projection on the token's own value
    smear_gate_enabled: bool = True  # mix the previous token's embedding in (PR #1667)
    smear_bos_mask: bool = True  # not across a document start (PR #1851); 0 reproduces PR #1667's fault
    gate_window: Count = 12  # leading dimensions read by SmearGate and attention gates
    sparse_attn_gate_enabled: bool = True  # one gate per head from GATE_WINDOW inputs (PR #1787)
    sparse_attn_gate_scale: Real = 1.0  # factor inside that gate's sigmoid
    attn_out_gate_enabled: bool = False  # the older gate, 2 sigmoid (PR #1667)
    attn_out_gate_src: Literal["proj", "q"] = "proj"  # what it reads: block input or raw queries
    mudd_width: Whole = 0  # hidden width by which the last layers and the head read earlier streams; 0: off
    gated_attn_enabled: bool = False  # dense gate that reads all of MODEL_DIM

    # Initial values
    qk_gain_init: Annotated[float, Range(-100, 100)] = 5.0  # initial gain of the normed queries
    sparse_attn_gate_init_std: Rate = 0.0  # initial spread of the sparse gate's weights
    gated_attn_init_std: Rate = 0.01  # initial spread of the dense gate's weights
    tied_embed_init_std: Annotated[float, Range(1e-30, 100)] = 0.005  # initial spread of the tied embedding

    # Optimisation
    iterations: Count = 20_000  # most optimiser steps
    max_wallclock_seconds: Amount = 600.0  # training time; 0: no cap, ITERATIONS steps
    gptq_reserve_seconds: Amount = 0.5  # kept back from it for the calibration (PR #1868: 8)
    warmup_steps: Whole = 20  # steps on random tokens before the clock starts, undone afterwards
    warmdown_frac: Share = 0.75  # last part of training in which learning rates fall
    min_lr: Share = 0.1  # floor of the learning-rate factor
    enable_looping_at: Amount = 0.35  # fraction of training at which looping turns on
    matrix_lr: Rate = 0.026  # Muon's learning rate, on the four banks
    muon_momentum: Beta = 0.97  # momentum after its warm-up
    muon_momentum_warmup_start: Beta = 0.92  # momentum at step 0
    muon_momentum_warmup_steps: Whole = 1500  # steps of the linear warm-up
    muon_maxwell: bool = False  # a mix of four momenta instead, fast to slow (modded-nanogpt #340, #357)
    muon_backend_steps: Annotated[int, Range(1, 5)] = 5  # Newton-Schulz steps
    muon_coefficients: Literal["polar_express", "quintic"] = "polar_express"  # their coefficients (PR #1344)
    muon_row_normalize: bool = True  # unit rows before the orthogonalisation (MuonEq-R)
    muon_wd: Rate = 0.095  # decoupled weight decay of the banks
    wd_taper_start_frac: Beta = 0.7  # fraction of training from which it falls linearly (PR #1729)
    wd_taper_final_mult: Share = 1.0  # to this share of MUON_WD at the end; 1: it does not fall
    tied_embed_lr: Rate = 0.03  # AdamW, tied embedding
    embed_lr: Rate = 0.6  # AdamW, embedding and head when TIE_EMBEDDINGS=0
    embed_wd: Rate = 0.085  # weight decay of the embedding
    scalar_lr: Rate = 0.02  # AdamW, all scalar and control tensors
    adam_wd: Rate = 0.02  # their weight decay
    beta1: Beta = 0.9  # AdamW's decay of the mean gradient
    beta2: Beta = 0.95  # AdamW's decay of the mean squared gradient
    adam_eps: Positive = 1e-8  # AdamW's addend in the denominator
    grad_clip_norm: Amount = 0.3  # global gradient norm; 0: no clipping
    clip_global: bool = False  # clip the averaged gradient; 0: each micro-batch's (eight published ranks do)
    ema_decay: Beta = 0.9965  # average of all state, what is evaluated and quantised
    train_log_every: Count = 500  # steps between log lines (the first five are always logged)
    val_loss_every: Whole = 0  # steps between validations, the first before step 1; 0: none while training

    # Quantisation and artifact
    matrix_bits: Bits = 6  # integer bits of the matrices
    embed_bits: Bits = 7  # integer bits of embedding and head
    matrix_clip_sigmas: Positive = 12.85  # clip width in row standard deviations, of no other matrices
    attn_clip_sigmas: Positive = 13.0  # attention matrices
    mlp_clip_sigmas: Positive = 12.0  # MLP matrices
    embed_clip_sigmas: Positive = 15.0  # embedding and head
    gptq_calibration_batches: Count = 16  # batches of TRAIN_BATCH_TOKENS behind the Hessians
    gptq_drift_batches: Whole = 0  # batches by which layers make good what was lost before them; 0: off
    gated_attn_quant_gate: bool = False  # int8 rows for attention-gate weights
    lqer_enabled: bool = True  # low-rank correction of the largest quantisation errors (PR #1797)
    lqer_rank: Count = 4  # its rank
    lqer_top_k: Whole = 3  # number of corrected matrices
    lqer_asym_enabled: bool = True  # int2/int4 factors; 0: symmetric factors of LQER_FACTOR_BITS
    lqer_asym_group: Count = 64  # elements per scale of the right factor
    lqer_factor_bits: Bits = 4  # bits of symmetric factors
    fit_bytes: Whole = 0  # size, code included, to spend where loss is least, not by clips; 0: off
    float16_max_elements: Whole = 65_536  # tensors of at most this size stay float16
    quantizer: Literal["scalar", "trellis"] = "scalar"  # trellis: rows of a column are rounded together
    compressor: Literal["brotli", "lzma", "ans"] = "brotli"  # artifact's codec; a trellis needs ans

    # Evaluation
    val_batch_tokens: Annotated[int, Range(8, 10**9)] = 524_288  # a row has an eighth; it cuts documents
    eval_seq_len: Count = 2048  # tokens; longer documents are cut in the standard evaluation
    val_doc_fraction: Annotated[float, Range(0, 1, above=True)] = 1.0  # below 1: a sample, never a full score
    sliding_window_enabled: bool = False  # score by sliding windows too (PR #1493)
    eval_stride: Count = 64  # targets that a sliding window scores
    audit: bool = False  # write ledger.jsonl, what `tools/audit.py` judges the run by
    ttt_enabled: bool = True  # phased score-first LoRA test-time training
    ttt_sgd: bool = False  # train all weights by SGD on chunks of the stream instead (PR #549, #1493)
    ttt_lr: Rate = 0.005  # its rate, a cosine over the chunks
    ttt_epochs: Count = 3  # its passes over a scored chunk
    ttt_momentum: Beta = 0.9  # its momentum
    ttt_chunk_tokens: Count = 32_768  # its chunks
    ttt_batch_size: Count = 64  # documents adapted side by side
    ttt_chunk_size: Count = 48  # targets scored before each adaptation step
    ttt_chunk_by_length: str = ""  # smaller chunks up to lengths in targets: 256:8,2000:24 (PR #2014)
    ttt_eval_seq_len: Count = 2048  # longest window behind a chunk's end
    ngram_tilt: str = ""  # nats towards what followed the same ORDER tokens before: 16:2.62 (PR #1514)
    ttt_cache_window: Whole = 0  # compute this many tokens anew, cache the keys before; 0: all (exact)
    ttt_lora_rank: Count = 96  # rank of the adapters
    ttt_lora_alpha: Positive = 144.0  # their output is scaled by alpha / rank
    ttt_lora_lr: Rate = 1e-4  # AdamW's learning rate on the adapters
    ttt_beta1: Beta = 0.0  # its decay of the mean gradient
    ttt_beta2: Beta = 0.999  # its decay of the mean squared gradient
    ttt_weight_decay: Rate = 1.0  # its decoupled weight decay
    ttt_grad_steps: Count = 1  # optimiser steps per chunk
    ttt_guard: Amount = 96.0  # nats of evidence, in all, at which a document loses its adapters; 0: off
    ttt_q_lora: bool = True  # adapters on the queries
    ttt_v_lora: bool = True  # adapters on the values
    ttt_k_lora: bool = True  # adapt key projections
    ttt_mlp_lora: bool = True  # adapt MLPs
    ttt_o_lora: bool = True  # adapt output projections
    ttt_warm_start_a: bool = True  # keep the A factors from batch to batch; 0: draw them anew
    phased_ttt_prefix_docs: Whole = 2000  # scored documents after which the last global phase runs; 0: none
    phased_ttt_num_phases: Annotated[int, Range(1, 1000)] = 3  # global phases, evenly spread over the prefix
    global_ttt_lr: Rate = 0.001  # SGD's learning rate on all base weights
    global_ttt_momentum: Beta = 0.9  # its momentum
    global_ttt_epochs: Count = 1  # passes over each chunk
    global_ttt_chunk_tokens: Count = 32_768  # tokens between changes of the learning rate
    global_ttt_batch_seqs: Count = 32  # windows of EVAL_SEQ_LEN per SGD step
    global_ttt_grad_clip: Amount = 1.0  # gradient norm; 0: no clipping
    global_ttt_warmup_chunks: Whole = 0  # chunks of linear learning-rate warm-up
    global_ttt_warmup_start_lr: Rate = 0.0  # where that warm-up starts
    global_ttt_respect_doc_boundaries: bool = True  # attention stays inside documents

    @property
    def head_dim(self) -> int:
        """Width d of one attention head."""
        return self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        """Width F of the MLP."""
        return int(self.mlp_mult * self.model_dim)

    @property
    def data_folder(self) -> Path:
        """Folder of the shards."""
        if self.data_path:
            return Path(self.data_path)
        sets = Path(self.data_dir) / "datasets"
        if not self.caseops_enabled:
            return sets / f"fineweb10B_sp{self.vocab_size}"
        name = f"fineweb10B_sp{self.vocab_size}_lossless_caps_caseops_v1_reserved"
        return sets / f"fineweb10B_sp{self.vocab_size}_caseops" / "datasets" / "datasets" / name

    def as_env(self) -> dict[str, object]:
        """All settings by the names of their environment variables."""
        return {name.upper(): value for name, value in dataclasses.asdict(self).items()}

    def model_settings(self) -> dict[str, object]:
        """The settings that rebuild the model: stored in the artifact."""
        return {name: getattr(self, name) for name in MODEL_SETTINGS}

    @classmethod
    def from_env(cls, environ: Mapping[str, str], presets: Mapping[str, Mapping] | None = None) -> "Config":
        """Defaults, changed by PRESET, changed by explicit variables. Raises ConfigError."""
        presets, preset = presets or PRESETS, environ.get("PRESET", cls.preset)
        if preset not in presets:
            raise ConfigError(f"PRESET={preset!r}: must be one of {', '.join(presets)}")
        values = {"preset": preset, **presets[preset]}
        for field in dataclasses.fields(cls):
            if (name := field.name.upper()) in environ:
                values[field.name] = parse_setting(name, environ[name], field.type)
        return cls(**values)


def base_type(annotation: object) -> type:
    """The plain type of a setting: bool, int, float or str."""
    if get_origin(annotation) is Literal:
        return str
    return get_args(annotation)[0] if get_args(annotation) else annotation


def parse_setting(name: str, text: str, annotation: object) -> object:
    """The value of a setting that is written as text. Raises ConfigError."""
    kind = base_type(annotation)
    try:
        if kind is bool:
            return {"0": False, "1": True, "false": False, "true": True}[text.strip().lower()]
        return kind(os.path.expanduser(text) if name.endswith(("_DIR", "_PATH")) else text)
    except (KeyError, ValueError):
        words = {bool: "0 or 1", int: "a whole number", float: "a number"}[kind]
        raise ConfigError(f"{name}={text!r}: must be {words}") from None


def parse_settings(text: str) -> dict[str, object]:
    """Settings as on a command line, NAME=value with white space between -> values by field."""
    pairs = ((name.lower(), value) for name, value in (pair.split("=") for pair in text.split()))
    return {name: parse_setting(name, value, Config.__annotations__[name]) for name, value in pairs}


_NAMES = [field.name for field in dataclasses.fields(Config)]
# What rebuilds a model. With `fit_bytes`: what made an artifact counts, whatever a re-evaluation sets.
_SHAPE = _NAMES[_NAMES.index("num_layers") : _NAMES.index("gated_attn_enabled") + 1]
MODEL_SETTINGS = ("vocab_size", "train_seq_len", *_SHAPE, "fit_bytes")

# A preset is a row of differences from the defaults; explicit variables win over it. The authority for a
# published run is its log (SPEC section 8); harness/settings.py has the other systems.
_DEMO = """
CPU_THREADS=1 DATA_PATH=data/demo VOCAB_SIZE=1024 TRAIN_SEQ_LEN=256 TRAIN_BATCH_TOKENS=4096
GRAD_ACCUM_STEPS=2 NUM_LAYERS=6 MODEL_DIM=128 NUM_HEADS=4 NUM_KV_HEADS=2 MLP_MULT=3 NUM_LOOPS=1 LOOP_START=2
LOOP_END=3 PARALLEL_START_LAYER=4 XSA_LAST_N=6 ITERATIONS=150 MAX_WALLCLOCK_SECONDS=0 WARMUP_STEPS=1
TRAIN_LOG_EVERY=20 MUON_MOMENTUM_WARMUP_STEPS=50 VAL_LOSS_EVERY=150 EMA_DECAY=0.95 FLOAT16_MAX_ELEMENTS=4096
VAL_BATCH_TOKENS=32768 GPTQ_CALIBRATION_BATCHES=4 EVAL_SEQ_LEN=256 TTT_EVAL_SEQ_LEN=256 TTT_BATCH_SIZE=16
TTT_LORA_RANK=8 TTT_LORA_ALPHA=16 TTT_LORA_LR=1e-3 TTT_WARM_START_A=0 PHASED_TTT_PREFIX_DOCS=24
PHASED_TTT_NUM_PHASES=2 GLOBAL_TTT_CHUNK_TOKENS=2048 GLOBAL_TTT_BATCH_SEQS=8 AUDIT=1
"""  # every component, small enough for two CPU cores; adapters begin anew: the score is any number of ranks'
PRESETS: dict[str, dict[str, object]] = {"pr1851": {}, "demo": parse_settings(_DEMO)}
TORCHRUN = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}  # what it sets, and what holds without it
KERNELS = ("loss", "mlp", "qkv_norm_rope", "xsa_gate")


def check_micro_batches(cfg: Config, world_size: int) -> None:
    """Raise ConfigError unless a step of all ranks is equal micro-batches that hold a whole document."""
    total, tokens = cfg.grad_accum_steps, cfg.train_batch_tokens
    if total % world_size and world_size % total:
        raise ConfigError(f"WORLD_SIZE={world_size}: must divide GRAD_ACCUM_STEPS={total} or be its multiple")
    shared = max(total, world_size)
    if tokens % shared or tokens // shared < cfg.train_seq_len:
        least = f"each at least TRAIN_SEQ_LEN={cfg.train_seq_len} tokens (GRAD_ACCUM_STEPS={total})"
        raise ConfigError(f"TRAIN_BATCH_TOKENS={tokens}: must be {shared} equal micro-batches, {least}")


def kernel_names(text: str) -> list[str]:
    """TRITON_KERNELS as a list: 1 means all fused kernels, 0 or nothing none. Raises ConfigError."""
    chosen = {"": [], "0": [], "1": list(KERNELS)}.get(text, text.split(","))
    if not {*chosen} <= {*KERNELS}:
        raise ConfigError(f"TRITON_KERNELS={text!r}: must be 0, 1, or some of {','.join(KERNELS)}")
    return chosen


def layer_order(cfg: Config, looping: bool) -> tuple[list[int], list[int]]:
    """Physical layers of the encoder and decoder halves, in order; looped layers recur (depth recurrence)."""
    layers, first, behind = list(range(cfg.num_layers)), cfg.loop_start, cfg.loop_end + 1
    if looping and cfg.num_loops:
        layers = layers[:first] + layers[first:behind] * (cfg.num_loops + 1) + layers[behind:]
    half = len(layers) // 2
    return layers[:half], layers[half:]


def chunk_size(cfg: Config, targets: int) -> int:
    """Targets of a document of so many that are scored before each adaptation step."""
    if cfg.ttt_chunk_by_length:
        from systems.chunks import chunk_by_length

        return chunk_by_length(cfg, targets)
    return cfg.ttt_chunk_size


# ---- 3. Runtime: the device, the log, the clock --------------------------------------------------------
# Libraries take seconds to load. So harness/ answers `--help`, and what is wrong with the settings, before.

if __name__ == "__main__" and not COUNTED:
    sys.modules.setdefault("train_gpt", sys.modules[__name__])  # what harness/ and systems/ import
    if (Path(__file__).resolve().parent / "harness").is_dir():
        importlib.import_module("harness").answer_early(sys.argv[1:], os.environ)
if not COUNTED and importlib.util.find_spec("systems"):
    import systems.early  # noqa: F401 - of the libraries below, a missing one is said in one line

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adamw import adamw


@dataclass(frozen=True)
class Backends:
    """What the machine answers to the wishes in `Config`; harness/backends.py tries what there is."""

    attention: Literal["fa3", "fa4", "torch_varlen", "flex", "plain"] = "plain"
    kernels: str = ""  # fused kernels in use, with commas between
    compiler: str = ""  # backend of torch.compile; empty: nothing is compiled
    micro_batches: int = 8  # of a step, all ranks together

    def compile(self, function: Callable) -> Callable:
        """The function compiled, itself where nothing is compiled."""
        return torch.compile(function, **self._options) if self.compiler else function

    def move_and_compile(self, model: "GPT", device: torch.device) -> "GPT":
        """Move the model (on CUDA the embedding to bfloat16), and compile its calls, but not its methods."""
        model.to(device)
        if device.type == "cuda":
            model.tok_emb.to(torch.bfloat16)
        if self.kernels not in ("", "eager") and not COUNTED:
            importlib.import_module("systems.attention_kernels")  # operators come before graphs
        if self.compiler:
            model.compile(**self._options)
        return model

    @property
    def _options(self) -> dict[str, object]:
        return {"backend": self.compiler, "fullgraph": True, "dynamic": False}


class Ranks:
    """This process among all: device, precision and every collective (each does nothing alone)."""

    def __init__(self, device: torch.device, rank: int = 0, world_size: int = 1):
        self.device, self.rank, self.world_size = device, rank, world_size
        self.is_main, self.on_gpu = rank == 0, device.type == "cuda"  # rank 0 writes the outputs
        self._store, self._barriers = None, 0
        self.stop_signal, self.stage_handles_stop = 0, False  # the harness sets both

    @classmethod
    def from_env(cls, cfg: Config, environ: Mapping[str, str]) -> "Ranks":
        """Pick the device; join the process group (NCCL, on CPUs gloo) if torchrun started several."""
        rank, local_rank, world_size = (int(environ.get(name, alone)) for name, alone in TORCHRUN.items())
        check_micro_batches(cfg, world_size)
        cuda = cfg.device != "cpu" and torch.cuda.is_available()
        if cfg.device == "cuda" and not cuda:
            raise ConfigError("DEVICE=cuda: torch sees no CUDA device; must be auto or cpu here")
        torch.set_num_threads(cfg.cpu_threads or torch.get_num_threads())
        ranks = cls(torch.device("cuda", local_rank) if cuda else torch.device("cpu"), rank, world_size)
        if ranks.on_gpu:
            torch.cuda.set_device(ranks.device)
            os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")  # fuses too much, spills
            torch.backends.cuda.enable_cudnn_sdp(False)  # plans every shape anew; adaptation has thousands
        if world_size > 1:
            ranks._join("nccl" if ranks.on_gpu else "gloo")
        return ranks

    def _join(self, backend: str) -> None:
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # renamed since
        limit = timedelta(minutes=10)  # a rank that does not answer a collective for so long has failed
        try:
            store, rank, world_size = next(dist.rendezvous("env://", timeout=limit))
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
        except (ValueError, RuntimeError) as error:
            text = f"WORLD_SIZE={self.world_size}: ranks cannot meet ({error}); use torchrun"
            raise ConfigError(text) from None
        self._store = dist.PrefixStore("barrier", store)

    def wait_for_all(self, stage: str) -> None:
        """Wait for the slowest rank: no collective, it may take its time. RunError after an hour."""
        if self.world_size == 1:
            return
        self._barriers += 1
        keys = [f"{self._barriers}/{rank}" for rank in range(self.world_size)]
        self._store.set(keys[self.rank], stage)
        latest = time.monotonic() + BARRIER_SECONDS
        while not self._store.check(keys):
            if time.monotonic() > latest:
                missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
                raise RunError(f"stage {stage}: ranks {missing} have not finished it after an hour")
            time.sleep(0.02)

    def say(self, text: str) -> None:
        """A line on standard error that names the rank."""
        print(f"train_gpt.py: rank {self.rank} of {self.world_size}, {text}", file=sys.stderr, flush=True)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_packed_(self, tensors: Sequence[Tensor]) -> None:
        """Sum many tensors over ranks in place, as one float32 buffer."""
        if self.world_size == 1:
            return
        packed = self.sum_(torch.cat([tensor.flatten().float() for tensor in tensors]))
        for tensor, part in zip(tensors, packed.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def reduce_scatter(self, bank: Tensor) -> "Pending":
        """Start the sum of a bank over ranks; each gets its slice of the first axis, padded with zeros."""
        if self.world_size == 1:
            return Pending(bank)
        per_rank = -(-len(bank) // self.world_size)
        padded = F.pad(bank, [0, 0] * (bank.ndim - 1) + [0, per_rank * self.world_size - len(bank)])
        shard = padded.new_empty(per_rank, *bank.shape[1:])
        return Pending(shard, dist.reduce_scatter_tensor(shard, padded.contiguous(), async_op=True).wait)

    def all_gather(self, shard: Tensor) -> "Pending":
        """Start the inverse of `reduce_scatter`: all slices, still padded."""
        if self.world_size == 1:
            return Pending(shard)
        whole = shard.new_empty(self.world_size * len(shard), *shard.shape[1:])
        return Pending(whole, dist.all_gather_into_tensor(whole, shard.contiguous(), async_op=True).wait)

    def gather(self, item: object) -> list:
        """The objects of all ranks (tensors on the CPU), on every rank."""
        items = [item] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(items, item)
        return items

    def autocast(self) -> contextlib.AbstractContextManager:
        """bfloat16 matrix products on CUDA, plain float32 on a CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu)

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read afterwards is true."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def to_host(self, tensor: Tensor) -> "Pending":
        """Start the copy of a small tensor to the host; what is launched after it does not delay it."""
        if not self.on_gpu:
            return Pending(tensor.clone())
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copy.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return Pending(copy, event.synchronize)

    def put(self, tensor: Tensor) -> Tensor:
        """The tensor on the device. From pinned memory: nothing waits for what was launched before."""
        if not self.on_gpu:
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def send(self, x: Tensor, y: Tensor, segments: "Segments", compiler: str = "") -> "Batch":
        """A batch on the device. All rows of one length share a graph: only the number of segments varies."""
        x, y, cu_seqlens = (self.put(part) for part in (x, y, segments.cu_seqlens))
        if compiler:
            torch._dynamo.mark_dynamic(cu_seqlens, 0)
        return x, y, Segments(cu_seqlens, segments.max_seqlen_bound or segments.max_seqlen)


class Pending(NamedTuple):
    """Result of a collective, or of a copy to the host, that may still be under way."""

    tensor: Tensor
    end: Callable[[], object] | None = None  # returns once the tensor is there

    def wait(self) -> Tensor:
        """The result, once it is there."""
        if self.end:
            self.end()
        return self.tensor


CPU = Ranks(torch.device("cpu"))  # one process without a GPU


def has_part(name: str) -> bool:
    """Whether a file of systems/ stands beside the script, or had to be put into it."""
    return COUNTED or (Path(__file__).resolve().parent / "systems" / f"{name}.py").is_file()


def assign_to_ranks(costs: Sequence[float], world_size: int) -> list[int]:
    """The rank that does each piece of work: the costliest first, each to the rank with the least so far."""
    loads, owners = [0.0] * world_size, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners


@contextlib.contextmanager
def writing(path: object):
    """Name the file of what goes wrong in the block (a full disk): RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror})") from None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it appears whole or not at all: temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def run_name(cfg: Config) -> str:
    """RUN_ID or, without one, a name of preset, seed and time."""
    return cfg.run_id or f"{cfg.preset}-seed{cfg.seed}-{time.strftime('%Y%m%d-%H%M%S')}"


class Watch:
    """What looks on while a run goes. These methods do nothing; those of harness/ keep, record and show."""

    shows = False  # whether it shows the lines of the log in its own way

    def saved(self, stage: str) -> "dict | None":
        """The state from which a stage goes on; None: from its beginning."""

    def unit(self, stage: str, worker: "Worker") -> None:
        """A unit of a stage is done: its state may be kept, and an exception from here ends the run."""

    def see(self, kind: str, **facts: object) -> None:
        """Something has happened."""


class Worker:
    """A stage whose `units()` works and yields after each unit; between two of them it may be cut off."""

    done, total = 0.0, 1.0  # how far it is
    kept_by = ""  # whose `state()` (tensors, plain values) is kept: "rank 0" for all, "each rank" its own
    seconds, stop_requested = 0.0, False  # by which all ranks decide together when "rank 0" keeps it


class RunLog:
    """What a run tells, line by line, on rank 0's console and to the watch. `folder` is for its outputs."""

    def __init__(self, cfg: Config, ranks: Ranks = CPU, watch: Watch | None = None):
        self.is_main, self._watch, self.run_id = ranks.is_main, watch or Watch(), run_name(cfg)
        self.folder = Path(cfg.artifact_dir or Path("runs") / self.run_id)
        self._watch.see("folder", log=self, cfg=cfg)
        if self.is_main:
            if (self.folder / "result.json").exists():
                raise ConfigError(f"ARTIFACT_DIR={self.folder}: holds an earlier run, must be another folder")
            self.folder.mkdir(parents=True, exist_ok=True)

    def text(self, text: str, said: bool = False) -> None:
        """Free text for the files and, where it is said, for whoever reads the console."""
        self._watch.see("text", text=text, said=said)

    def event(self, stage: str, **values: object) -> None:
        """One line `stage key:value ...`."""
        shown = " ".join(f"{k}:{f'{v:.6g}' if isinstance(v, float) else v}" for k, v in values.items())
        self.text(f"{stage} {shown}")
        if self.is_main and not self._watch.shows:
            print(f"{stage} {shown}", flush=True)
        self._watch.see("line", stage=stage, values=values, log=self)


class Stopwatch:
    """Seconds spent in each named stage; a stage inside another stops the outer one's clock meanwhile."""

    def __init__(self, ranks: Ranks):
        self._ranks, self._since = ranks, time.perf_counter()
        self._open: list[str] = []
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str):
        """Count the time inside the block to `name`."""
        self._ranks.synchronize()
        self._charge()
        self._open.append(name)
        yield
        self._ranks.synchronize()
        self._charge()
        self._open.pop()

    def elapsed(self, name: str) -> float:
        """Seconds of a stage so far."""
        self._charge()
        return self.seconds.get(name, 0.0)

    @property
    def current(self) -> str:
        """The stage under way (after an exception: the one that raised it)."""
        return self._open[-1] if self._open else "between stages"

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now


# ---- 4. Data: shards, document segments, the two loaders, the validation set (SPEC section 2) ----------


class Segments(NamedTuple):
    """Documents packed in one row: int32 boundaries 0..T, padded with T; attention stays inside."""

    cu_seqlens: Tensor
    max_seqlen: int
    max_seqlen_bound: int = 0  # a limit of max_seqlen for all rows, so that they share a graph


def shard_paths(folder: Path, split: str) -> list[Path]:
    """Shards of a split ("train", "val" or "val_bytes") in name order."""
    paths = sorted(folder.glob(f"fineweb_{split}_*.bin"))
    return [path for path in paths if split != "val" or "_bytes_" not in path.name]


def read_shard(path: Path) -> np.ndarray:
    """Tokens of a shard, uint16, memory-mapped. Raises DataError unless header and size fit exactly."""
    try:
        header = np.fromfile(path, "<i4", SHARD_HEADER_INTS)
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if len(header) < SHARD_HEADER_INTS or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise DataError(f"{path}: not a shard (need magic {SHARD_MAGIC}, version {SHARD_VERSION})")
    expected = 4 * SHARD_HEADER_INTS + 2 * int(header[2])
    if size != expected:
        raise DataError(f"{path}: {size} bytes, but its header of {header[2]} tokens means {expected}")
    return np.memmap(path, "<u2", "r", 4 * SHARD_HEADER_INTS) if header[2] else np.empty(0, np.uint16)


def check_vocabulary(tokens: np.ndarray | Tensor, vocab_size: int, path: Path) -> None:
    """Raise DataError when a token is not below the vocabulary's size."""
    highest = int(tokens.max()) if len(tokens) else 0
    if highest >= vocab_size:
        raise DataError(f"{path}: holds token {highest}, must be below VOCAB_SIZE={vocab_size}")


def document_segments(
    bos_positions: Sequence[int] | Tensor, total_len: int, max_doc_len: int, bucket: int = SEGMENT_BUCKET
) -> Segments:
    """Segments of a row of `total_len` tokens: one a document, cut every `max_doc_len` tokens (0: never)."""
    boundaries = np.union1d([0, total_len], np.asarray(bos_positions, np.int64))
    if max_doc_len:
        pieces = [np.arange(*ends, max_doc_len) for ends in itertools.pairwise(boundaries)]
        boundaries = np.append(np.concatenate(pieces), total_len)
    padding = -len(boundaries) % bucket
    cu_seqlens = np.pad(boundaries, (0, padding), constant_values=total_len).astype(np.int32)
    bound = min(max_doc_len or total_len, total_len)
    return Segments(torch.from_numpy(cu_seqlens), int(np.diff(boundaries).max()), bound)


def packed_row(tokens: Tensor, max_doc_len: int, plain: bool = False) -> tuple[Tensor, Tensor, Segments]:
    """n+1 tokens -> inputs [1, n], targets [1, n] and the segments of the documents (`plain`: windows)."""
    row = tokens.long()
    bos = [] if plain else (row[:-1] == BOS).nonzero().flatten().cpu()
    return row[None, :-1], row[None, 1:], document_segments(bos, len(row) - 1, max_doc_len)


class PackedLoader:
    """Training batches: consecutive tokens of the shards, in order and cyclic, with document segments.

    Spans of `micro_tokens + 1` tokens are drawn in groups (one a rank, or `group`) from one shard;
    rank r gets the spans r, r + world_size, ... of each: any number of ranks that divides it sees one stream.
    A shard begins at its first BOS; what fills no group at its end is dropped.
    """

    def __init__(self, paths: Sequence[Path], cfg: Config, ranks: Ranks, micro_tokens: int, group: int = 0):
        self.cfg, self._ranks, self._paths = cfg, ranks, list(paths)
        self._span, self._group = micro_tokens + 1, group or ranks.world_size
        self._need = self._group * self._span
        shards = map(read_shard, self._paths)
        largest = max((len(tokens) - self._first_bos(tokens) for tokens in shards), default=0)
        if largest < self._need:
            where = self._paths[0].with_name("fineweb_train_*") if self._paths else "no shards"
            text = f"TRAIN_BATCH_TOKENS takes {self._need} consecutive tokens, the largest has {largest}"
            raise DataError(f"{where}: {text}")
        self._open(0)
        check_vocabulary(self._tokens, cfg.vocab_size, self._paths[0])  # all of it while no clock runs

    @staticmethod
    def _first_bos(tokens: np.ndarray) -> int:
        hits = np.flatnonzero(tokens[: 1 << 20] == BOS)
        hits = hits if len(hits) else np.flatnonzero(tokens == BOS)
        return int(hits[0]) if len(hits) else len(tokens)

    def _open(self, shard: int) -> None:
        self._shard = shard % len(self._paths)
        self._tokens = read_shard(self._paths[self._shard])
        self._cursor, self._taken = self._first_bos(self._tokens), 0

    def next(self) -> tuple[Tensor, Tensor, Segments]:
        """The next micro-batch of this rank: inputs [1, n], targets [1, n], segments."""
        while not self._taken and self._cursor + self._need > len(self._tokens):
            self._open(self._shard + 1)
        start = self._cursor + (self._taken + self._ranks.rank) * self._span
        self._taken += self._ranks.world_size
        if self._taken == self._group:
            self._cursor, self._taken = self._cursor + self._need, 0
        span = self._tokens[start : start + self._span]
        check_vocabulary(span, self.cfg.vocab_size, self._paths[self._shard])
        return packed_row(torch.from_numpy(span.astype(np.int64)), self.cfg.train_seq_len)

    def state(self) -> tuple[int, int, int]:
        """Position: shard number, start of the group in it, spans taken of the group."""
        return self._shard, self._cursor, self._taken

    def load_state(self, state: tuple[int, int, int]) -> None:
        """Go back to a position."""
        self._open(state[0])
        self._cursor, self._taken = state[1:]


class ShuffledLoader:
    """Calibration batches: plain windows of TRAIN_SEQ_LEN tokens in a random order, without documents.

    PCG64 draws a phase and a permutation for each shard, then shards by the windows that they have left.
    """

    def __init__(self, paths: Sequence[Path], cfg: Config, seed: int = 0):
        self.cfg, self._paths, self._shards = cfg, paths, [read_shard(path) for path in paths]
        self.rng = np.random.Generator(np.random.PCG64(seed))
        self.reset()
        if not self.left.any():
            raise DataError(f"TRAIN_SEQ_LEN={cfg.train_seq_len}: no training shard holds such a window")

    def reset(self) -> None:
        """Make all windows anew."""
        self.began = self.rng.bit_generator.state  # from which they can be made again
        self._windows, length = [], self.cfg.train_seq_len
        for tokens in self._shards:
            room = min(length - 1, max(0, len(tokens) - length - 1))
            phase = int(self.rng.integers(room + 1)) if room else 0
            count = max(0, (len(tokens) - 1 - phase) // length)
            self._windows.append(phase + self.rng.permutation(count) * length)
        self.left = np.array([len(windows) for windows in self._windows])

    def _draw(self) -> tuple[int, int]:
        """Shard and start of the next window."""
        if not self.left.any():
            self.reset()
        ends = self.left.cumsum()
        shard = int(np.searchsorted(ends, int(self.rng.random() * ends[-1]), "right"))
        self.left[shard] -= 1
        return shard, int(self._windows[shard][self.left[shard]])

    def draw(self, rows: int) -> list[tuple[int, int]]:
        """Shards and starts of the next windows, which are not read: they lie all over the files."""
        return [self._draw() for _ in range(rows)]

    def next(self, rows: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each [rows, TRAIN_SEQ_LEN]."""
        windows = []
        for shard, start in self.draw(rows):
            windows.append(self._shards[shard][start : start + self.cfg.train_seq_len + 1])
            check_vocabulary(windows[-1], self.cfg.vocab_size, self._paths[shard])
        tokens = torch.from_numpy(np.stack(windows).astype(np.int64))
        return tokens[:, :-1], tokens[:, 1:]


def find_documents(tokens: Tensor) -> list[tuple[int, int]]:
    """(start, length) of each document; all but the last end with the next one's BOS as a target.

    So every token after the first BOS is a target exactly once. A lone BOS at the end begins no document.
    """
    starts = (tokens == BOS).nonzero().flatten().tolist()
    ends = [start + 1 for start in starts[1:]] + [len(tokens)] * bool(starts)
    return [(start, end - start) for start, end in zip(starts, ends, strict=True) if end - start > 1]


class ValidationSet(NamedTuple):
    """Validation stream: `tokens` [N], `target_bytes` [N-1] (original bytes of tokens[1:]); whole numbers."""

    tokens: Tensor
    target_bytes: Tensor
    documents: list[tuple[int, int]]

    @classmethod
    def from_sidecar(cls, tokens: Tensor, sidecar: Tensor) -> "ValidationSet":
        """Bytes from the parallel sidecar (CaseOps)."""
        if len(sidecar) != len(tokens):
            raise DataError(f"fineweb_val_bytes_*: {len(sidecar)} entries, must be {len(tokens)}, as tokens")
        return cls(tokens, sidecar[1:], find_documents(tokens))

    @property
    def num_targets(self) -> int:
        """How many tokens are scored."""
        return len(self.tokens) - 1


def _read_stream(folder: Path, split: str) -> Tensor:
    paths = shard_paths(folder, split)
    if not paths:
        raise DataError(f"DATA_PATH={folder}: no fineweb_{split}_*.bin there")
    return torch.from_numpy(np.concatenate([read_shard(path) for path in paths]))


def load_validation(cfg: Config) -> ValidationSet:
    """The validation split with its byte counts. Raises DataError where it is missing or does not fit."""
    folder, tokens = cfg.data_folder, _read_stream(cfg.data_folder, "val")
    check_vocabulary(tokens.numpy(), cfg.vocab_size, folder / "fineweb_val_*")
    if len(tokens) < 2 or tokens[0] != BOS:  # some targets would belong to no document
        raise DataError(f"{folder}/fineweb_val_*: must be at least 2 tokens, the first a BOS ({BOS})")
    if cfg.caseops_enabled:
        return ValidationSet.from_sidecar(tokens, _read_stream(folder, "val_bytes"))
    from systems.plain_text import ByteTables, load_tokenizer

    tables = ByteTables.from_sentencepiece(load_tokenizer(cfg), cfg.vocab_size)
    return ValidationSet(tokens, tables.target_bytes(tokens), find_documents(tokens))


# ---- 5. Attention --------------------------------------------------------------------------------------


def plain_backends(cfg: Config, ranks: Ranks) -> Backends:
    """What the settings ask for, or what packages and device should allow; nothing is tried."""
    attention, compiler, kernels = cfg.attention_backend, cfg.compile_backend, []
    if attention == "auto":
        hopper = ranks.on_gpu and torch.cuda.get_device_capability(ranks.device)[0] == 9
        flash = hopper and importlib.util.find_spec("flash_attn_interface") and has_part("fa3")
        attention = "fa3" if flash else "flex" if ranks.on_gpu else "plain"
    if compiler in ("auto", "off"):
        compiler = "inductor" if ranks.on_gpu and compiler == "auto" else ""
    if ranks.on_gpu and importlib.util.find_spec("triton") and has_part("kernels"):
        kernels = kernel_names(cfg.triton_kernels)
    if not (ranks.on_gpu or compiler) and attention == "plain" and has_part("eager"):
        kernels = ["eager"]
    return Backends(attention, ",".join(kernels), compiler, max(cfg.grad_accum_steps, ranks.world_size))


def attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None, backends: Backends) -> Tensor:
    """Causal softmax attention, scale 1/sqrt(d), query head h reading key/value head h // (H/G).

    q [B, T, H, d], k and v [B, T, G, d] -> [B, T, H, d]. With segments B is 1 and a token sees its own
    segment only. All backends compute the same; `plain` does so on every device, segment after segment.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)
    if backends.attention == "fa3":
        from systems.fa3 import fa3_attend

        return fa3_attend(q, k, v, segments)
    if backends.attention == "fa4":
        from systems.fa4 import fa4_attend

        return fa4_attend(q, k, v, segments)
    if backends.attention == "torch_varlen" and segments is not None:
        from systems.varlen import varlen_attend

        return varlen_attend(q, k, v, segments)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if segments is not None and (backends.attention == "flex" or torch.compiler.is_compiling()):
        return _masked_attend(q, k, v, segments, backends).transpose(1, 2)
    lengths = [q.size(2)] if segments is None else [n for n in segments.cu_seqlens.diff().tolist() if n]
    spans = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
    parts = [F.scaled_dot_product_attention(*span, is_causal=True, enable_gqa=True) for span in spans]
    return torch.cat(parts, 2).transpose(1, 2)


def attend_from(q: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of some queries: q [B, n, H, d] stand at `positions` [B or 1, n] among the T keys."""
    mask = torch.arange(k.size(1), device=k.device) <= positions[:, None, :, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)


def _masked_attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments, backends: Backends) -> Tensor:
    """q, k, v [1, heads, T, d]. `flex` masks in blocks; compiled `plain` has a whole mask, for short rows."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    positions = torch.arange(q.size(2), dtype=torch.int32, device=q.device)
    number = torch.searchsorted(segments.cu_seqlens, positions, right=True)

    def sees(batch: object, head: object, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (number[i] == number[j])

    if backends.attention == "flex":
        mask = create_block_mask(sees, None, None, len(positions), len(positions), device=q.device)
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v, sees(0, 0, positions[:, None], positions), enable_gqa=True)


# ---- 6. Functions that are right on every device; systems/kernels.py has fused forms for CUDA ----------


def softcap(z: Tensor, cap: float) -> Tensor:
    """Soft-capped logits cap * tanh(z / cap) in float32."""
    return cap * torch.tanh(z.float() / cap)


def softcapped_cross_entropy(z: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Cross entropy of soft-capped logits: z [..., V], targets [...] -> nats [...]."""
    losses = F.cross_entropy(softcap(z, cap).flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


def leaky_relu_squared(h: Tensor) -> Tensor:
    """leaky_relu(h, 0.5)^2: h^2 for positive h, h^2/4 for negative."""
    return F.leaky_relu(h, 0.5).square()


def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """XSA: y [B, T, H, d] of each head without its projection on the token's own value v [B, T, G, d]."""
    direction = F.normalize(v, dim=-1, eps=1e-12)[..., None, :]
    grouped = y.unflatten(-2, (v.size(-2), -1))
    return (grouped - (grouped * direction).sum(-1, keepdim=True) * direction).flatten(-3, -2)


# ---- 7. Model (SPEC section 3): one block, one traversal, whatever it is used for ----------------------

Adapt = Callable[[str, Tensor], Tensor | float]  # (role of a projection, its input) -> addend to its output
OnInput = Callable[[str, Tensor], None]  # is told the flat name of each matrix and the input of its product


LayerWeights = namedtuple("LayerWeights", "q k v o up down")  # the matrices of a layer: slices of banks


class BlockContext(NamedTuple):
    """What a block needs besides its input."""

    x0: Tensor  # input of the first block
    weights: LayerWeights
    rope: tuple[Tensor, Tensor]
    segments: Segments | None
    adapt: Adapt | None
    on_input: OnInput | None
    wanted: Tensor | None  # positions [B, n] of which the result is used; None: all
    past: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None  # puts earlier keys and values first


def at_positions(x: Tensor, positions: Tensor | None) -> Tensor:
    """x [B, T, D] at positions [B, n] -> [B, n, D]; x itself where positions is None."""
    return x if positions is None else x.gather(1, positions[..., None].expand(-1, -1, x.size(-1)))


def num_skips(cfg: Config) -> int:
    """Skip connections S: those of the looped order, also while looping is still off."""
    return min(map(len, layer_order(cfg, looping=True)))


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps), in x's type: autocast would leave the residual stream in float32."""
    return F.rms_norm(x, (x.size(-1),)).to(x.dtype)


def rope_tables(cfg: Config, length: int, device: torch.device, first: int = 0) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [T, 1, r/2], of positions first, first + 1, ... in their row."""
    dims, base = cfg.rope_dims or cfg.head_dim, cfg.rope_base
    context = max(cfg.eval_seq_len, cfg.ttt_eval_seq_len)  # One base for all rows, however long they are.
    if cfg.rope_yarn and context > cfg.train_seq_len:
        base *= (context / cfg.train_seq_len) ** (dims / (dims - 2))
    frequencies = base ** (-torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims)
    positions = torch.arange(first, first + length, dtype=torch.float32, device=device)
    angles = positions[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first r dimensions of each head, x [B, T, heads, d]; component j is paired with j + r/2."""
    cos, sin = (table.to(x.dtype) for table in rope)
    half = cos.size(-1)
    a, b, rest = x.split([half, half, x.size(-1) - 2 * half], -1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], -1)


def project(x: Tensor, weight: Tensor, role: str, adapt: Adapt | None) -> Tensor:
    """x W^T, plus what the adapter of this role makes of x."""
    y = F.linear(x, weight)
    return y if adapt is None else y + adapt(role, x)


def project_together(x: Tensor, weights: Mapping[str, Tensor], adapt: Adapt | None) -> list[Tensor]:
    """`project` for several roles of one input: one product, which reads x once."""
    products = F.linear(x, torch.cat(list(weights.values())))
    parts = products.split([len(weight) for weight in weights.values()], -1)
    return [y if adapt is None else y + adapt(role, x) for role, y in zip(weights, parts, strict=True)]


class Attention(nn.Module):
    """Attention of one layer: normed queries and keys, partial rotary, query gain, XSA, one optional gate."""

    def __init__(self, cfg: Config, layer: int, backends: Backends):
        super().__init__()
        self.cfg, self.layer, self.backends = cfg, layer, backends
        self.excludes_self = layer >= cfg.num_layers - cfg.xsa_last_n
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))
        if cfg.sparse_attn_gate_enabled:
            gate = _normal(cfg.sparse_attn_gate_init_std, cfg.num_heads, cfg.gate_window)
            self.attn_gate_w = nn.Parameter(gate)
        elif cfg.gated_attn_enabled:
            self.attn_gate_w = nn.Parameter(_normal(cfg.gated_attn_init_std, cfg.num_heads, cfg.model_dim))
        elif cfg.attn_out_gate_enabled:
            self.attn_gate_proj = _zero_linear(cfg.gate_window, cfg.num_heads)

    def forward(self, n: Tensor, context: BlockContext) -> Tensor:
        """n [B, T, D], the normed and scaled block input -> [B, T, D], or [B, n, D] at wanted positions."""
        wanted, past = context.wanted, context.past
        if context.on_input is not None:
            context.on_input(f"blocks.{self.layer}.attn.c_q.weight", n)
        plain = wanted is None and past is None
        if plain and "qkv_norm_rope" in self.backends.kernels:
            from systems.attention_kernels import fused_heads

            q_flat, q, k, v = fused_heads(n, context, self.q_gain, self.cfg.num_kv_heads)
        else:
            q_flat, q, k, v = self._heads(n, context)
        own_value = at_positions(v.flatten(-2), wanted).unflatten(-1, v.shape[-2:])
        n = at_positions(n, wanted)
        if plain:
            y = attend(q, k, v, context.segments, self.backends)
        else:
            keys, values = (k, v) if past is None else past(k, v)
            positions = torch.arange(k.size(1), device=k.device)[None] if wanted is None else wanted
            y = attend_from(q, positions + keys.size(1) - k.size(1), keys, values)
        y = self._exclude_and_gate(y, own_value, self._gate(n, q_flat)).flatten(-2)
        if context.on_input is not None:
            context.on_input(f"blocks.{self.layer}.attn.proj.weight", y)
        y = F.linear(y, context.weights.o)
        return y if context.adapt is None else y + context.adapt("o", n)

    def _heads(self, n: Tensor, context: BlockContext) -> tuple[Tensor, ...]:
        """Queries before the norm [B, n, H d]; then queries, keys and values [B, n or T, heads, d]."""
        cfg, w, rope, wanted = self.cfg, context.weights, context.rope, context.wanted
        if wanted is None:
            q_flat, k, v = project_together(n, {"q": w.q, "k": w.k, "v": w.v}, context.adapt)
        else:  # queries of the wanted positions only
            k, v = project_together(n, {"k": w.k, "v": w.v}, context.adapt)
            q_flat = project(at_positions(n, wanted), w.q, "q", context.adapt)
            rope = tuple(table[wanted] for table in rope)
        q = q_flat.unflatten(-1, (cfg.num_heads, cfg.head_dim))
        k, v = (x.unflatten(-1, (cfg.num_kv_heads, cfg.head_dim)) for x in (k, v))
        q = apply_rope(rms_norm(q), rope) * self.q_gain.to(q.dtype)[:, None]
        return q_flat, q, apply_rope(rms_norm(k), context.rope), v

    def _gate(self, n: Tensor, q_flat: Tensor) -> Tensor | None:
        """The factor of each head and position [B, T, H], None without a gate."""
        cfg = self.cfg
        if cfg.sparse_attn_gate_enabled:
            z = F.linear(n[..., : cfg.gate_window], self.attn_gate_w)
            return torch.sigmoid(cfg.sparse_attn_gate_scale * z)
        if cfg.gated_attn_enabled:
            return torch.sigmoid(F.linear(n, self.attn_gate_w))
        if cfg.attn_out_gate_enabled:
            source = q_flat if cfg.attn_out_gate_src == "q" else n
            return 2 * torch.sigmoid(self.attn_gate_proj(source[..., : cfg.gate_window]))
        return None

    def _exclude_and_gate(self, y: Tensor, own_value: Tensor, gate: Tensor | None) -> Tensor:
        """XSA, where the layer has it, and the gate; y [B, n, H, d]."""
        if self.excludes_self and gate is not None and "xsa_gate" in self.backends.kernels:
            from systems.attention_kernels import fused_xsa_gate

            return fused_xsa_gate(y, own_value, gate)
        if self.excludes_self:
            y = exclude_self(y, own_value)
        return y if gate is None else y * gate.to(y.dtype)[..., None]


class Block(nn.Module):
    """One layer: an attention and an MLP branch, and three ways of adding them to the residual stream."""

    def __init__(self, cfg: Config, layer: int, backends: Backends):
        super().__init__()
        self.layer, self.backends = layer, backends
        self.norm_scale = 1 / math.sqrt(layer + 1) if cfg.ln_scale else 1.0
        self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.resid_mix = nn.Parameter(torch.stack([torch.ones(cfg.model_dim), torch.zeros(cfg.model_dim)]))
        self.attn = Attention(cfg, layer, backends)

    def _mix(self, x: Tensor, context: BlockContext) -> Tensor:
        mix = self.resid_mix.to(x.dtype)
        return mix[0] * x + mix[1] * context.x0

    def _attention(self, u: Tensor, context: BlockContext) -> Tensor:
        return self.attn_scale.to(u.dtype) * self.attn(rms_norm(u) * self.norm_scale, context)

    def _mlp(self, u: Tensor, context: BlockContext) -> Tensor:
        n, w = rms_norm(u) * self.norm_scale, context.weights
        if context.on_input is None and "mlp" in self.backends.kernels:
            from systems.kernels import fused_mlp

            y = fused_mlp(n, w.up, w.down)
        else:
            hidden = leaky_relu_squared(F.linear(n, w.up))
            y = F.linear(hidden, w.down)
            if context.on_input is not None:
                context.on_input(f"blocks.{self.layer}.mlp.fc.weight", n)
                context.on_input(f"blocks.{self.layer}.mlp.proj.weight", hidden)
        return self.mlp_scale.to(u.dtype) * (y if context.adapt is None else y + context.adapt("mlp", n))

    def serial(self, x: Tensor, context: BlockContext) -> Tensor:
        """Attention, then the MLP on its result."""
        u = self._mix(x, context)
        u = at_positions(u, context.wanted) + self._attention(u, context)
        return u + self._mlp(u, context)

    def single(self, x: Tensor, context: BlockContext) -> Tensor:
        """Attention and MLP side by side on one stream (PR #1493)."""
        u = self._mix(x, context)
        a, u = self._attention(u, context), at_positions(u, context.wanted)
        return u + a + self._mlp(u, context)

    def lanes(self, x: Tensor, y: Tensor, context: BlockContext, keep: Tensor, add: Tensor) -> tuple:
        """Two lanes: attention reads x, the MLP y; `keep` [2] per lane, `add` [source, lane]."""
        a = self._attention(self._mix(x, context), context)
        x, y = (at_positions(lane, context.wanted) for lane in (x, y))
        m = self._mlp(y, context)
        keep, add = keep.to(a.dtype), add.to(a.dtype)
        return tuple(keep[i] * lane + add[0, i] * a + add[1, i] * m for i, lane in enumerate((x, y)))


class GPT(nn.Module):
    """The language model. Matrices live in banks, one tensor a role, so that Muon treats each as a batch."""

    def __init__(self, cfg: Config, backends: Backends = Backends()):
        super().__init__()
        self.cfg, self.backends = cfg, backends
        layers, dim, skips = cfg.num_layers, cfg.model_dim, num_skips(cfg)
        self.qo_bank = nn.Parameter(torch.cat([_orthogonal(layers, dim, dim), torch.zeros(layers, dim, dim)]))
        self.kv_bank = nn.Parameter(_orthogonal(2 * layers, cfg.num_kv_heads * cfg.head_dim, dim))
        self.mlp_up_bank = nn.Parameter(_orthogonal(layers, cfg.mlp_dim, dim))
        self.mlp_down_bank = nn.Parameter(torch.zeros(layers, dim, cfg.mlp_dim))
        self.skip_weights = nn.Parameter(torch.ones(skips, dim))
        if cfg.skip_gates_enabled:
            self.skip_gates = nn.Parameter(torch.zeros(skips, dim))
        if cfg.parallel_style == "lanes":
            self.parallel_post_lambdas = nn.Parameter(torch.ones(layers, 2, 2))
            self.parallel_resid_lambdas = nn.Parameter(torch.full((layers, 2), 1.1))
        self.tok_emb = nn.Embedding(cfg.vocab_size, dim)
        if "eager" in backends.kernels:
            from systems.eager import EagerBlock, add_skip

            self._add_skip = functools.partial(add_skip, self)
        kind = EagerBlock if "eager" in backends.kernels else Block
        self.blocks = nn.ModuleList(kind(cfg, layer, backends) for layer in range(layers))
        if cfg.tie_embeddings:
            nn.init.normal_(self.tok_emb.weight, std=cfg.tied_embed_init_std)
        else:
            self.lm_head = _zero_linear(dim, cfg.vocab_size)
        if cfg.smear_gate_enabled:
            self.smear_lambda = nn.Parameter(torch.zeros(1))
            self.smear_gate = _zero_linear(cfg.gate_window, 1)
        if cfg.mudd_width:
            from systems.mudd import Mudd

            self.mudd = Mudd(cfg)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Ids [B, T] -> normed embedding [B, T, D]; SmearGate adds a gated share of the previous token's."""
        e = self.tok_emb(input_ids)
        if self.cfg.smear_gate_enabled:
            lam, weight = self.smear_lambda.to(e.dtype), self.smear_gate.weight.to(e.dtype)
            gate = lam * torch.sigmoid(F.linear(e[:, 1:, : self.cfg.gate_window], weight))
            if self.cfg.smear_bos_mask:
                gate = gate * (input_ids[:, 1:, None] != BOS)
            e = torch.cat([e[:, :1], e[:, 1:] + gate * e[:, :-1]], 1)
        return rms_norm(e)

    def weights(self) -> list[LayerWeights]:
        """The matrices of each physical layer. Banks are taken apart once: a gradient is then one stack."""
        layers = self.cfg.num_layers
        banks = (self.qo_bank, self.kv_bank, self.mlp_up_bank, self.mlp_down_bank)
        qo, kv, up, down = (bank.unbind() for bank in banks)
        parts = (qo[:layers], kv[:layers], kv[layers:], qo[layers:], up, down)
        return [LayerWeights(*matrices) for matrices in zip(*parts, strict=True)]

    def hidden(
        self,
        input_ids: Tensor,
        segments: Segments | None = None,
        *,
        looping: bool,
        lora: "BatchedLoRA | None" = None,
        on_input: OnInput | None = None,
        wanted: Tensor | None = None,
        cache: object | None = None,
    ) -> Tensor:
        """The traversal: ids [B, T] -> final normed hidden states [B, T, D], or [B, n, D] at `wanted` [B, n].

        With a cache the ids follow what it holds; the last one that it holds comes first again (SmearGate).
        Encoder outputs are pushed, decoder layers pop them through the skip connections; decoder layers from
        `parallel_start_layer` on are parallel. A slot is the index of a virtual layer, so looped layers have
        one set of adapters for each pass.
        """
        cfg = self.cfg
        first = cache.first if cache else 0
        x = x0 = self.embed(input_ids)[:, first > 0 :]
        rope = rope_tables(cfg, x.size(1), x.device, first)
        encoder, decoder = layer_order(cfg, looping)
        weights, skips, lanes, given = self.weights(), [], None, {}
        for slot, layer in enumerate(encoder + decoder):
            block, step = self.blocks[layer], slot - len(encoder)
            adapt = None if lora is None else lora.at(slot)
            used = wanted if step == len(decoder) - 1 else None
            past = cache and cache.at(slot)
            context = BlockContext(x0, weights[layer], rope, segments, adapt, on_input, used, past)
            parallel = 0 < cfg.parallel_start_layer <= layer
            if cfg.mudd_width:
                x, lanes = self.mudd(layer, parallel and step >= 0, given, x, lanes)
            if step < 0:
                x = block.serial(x, context)
                skips.append(x)
            elif parallel and cfg.parallel_style == "lanes":
                a, m = lanes or (x, x)
                lambdas = self.parallel_resid_lambdas[layer], self.parallel_post_lambdas[layer]
                lanes = block.lanes(self._add_skip(a, skips, step), m, context, *lambdas)
            elif parallel and cfg.parallel_style == "single":
                x = block.single(self._add_skip(x, skips, step), context)
            else:
                x = block.serial(self._add_skip(x, skips, step), context)
        if lanes is not None:
            mean = cfg.parallel_final_lane == "mean"
            x = (lanes[0] + lanes[1]) / 2 if mean else lanes[cfg.parallel_final_lane == "mlp"]
        if cfg.mudd_width:
            x = self.mudd.head(given, x, wanted)
        h = rms_norm(x)
        if on_input is not None:
            on_input("tok_emb.weight" if cfg.tie_embeddings else "lm_head.weight", h)
        return h

    def _add_skip(self, x: Tensor, skips: list[Tensor], step: int) -> Tensor:
        """x with what the skip connection of the decoder's layer `step` brings, where there is one."""
        if not skips or step >= len(self.skip_weights):
            return x
        skip = self.skip_weights[step].to(x.dtype) * skips.pop()
        if not self.cfg.skip_gates_enabled:
            return x + skip
        gate = torch.sigmoid(self.skip_gates[step]).to(x.dtype)
        return gate * x + (1 - gate) * skip

    @property
    def _head_weight(self) -> Tensor:
        return self.tok_emb.weight if self.cfg.tie_embeddings else self.lm_head.weight

    def _head(self, h: Tensor, lora: "BatchedLoRA | None") -> Tensor:
        """Hidden states -> logits before the softcap."""
        return project(h, self._head_weight.to(h.dtype), "head", None if lora is None else lora.at(0))

    def logits(self, h: Tensor, lora: "BatchedLoRA | None" = None) -> Tensor:
        """Soft-capped logits [B, T, V] of hidden states [B, T, D]."""
        return softcap(self._head(h, lora), self.cfg.logit_softcap)

    def losses(
        self,
        input_ids: Tensor,
        target_ids: Tensor,
        segments: Segments | None = None,
        *,
        looping: bool,
        lora: "BatchedLoRA | None" = None,
        scored: Tensor | None = None,
        cache: object | None = None,
        hints: object | None = None,
    ) -> Tensor:
        """Cross entropy (nats) of each target [B, T]; with `scored` [B, n] only at those positions."""
        h = self.hidden(input_ids, segments, looping=looping, lora=lora, wanted=scored, cache=cache)
        target_ids = target_ids if scored is None else target_ids.gather(1, scored)
        if self.cfg.ngram_tilt and hints is not None:
            from systems.tilt import tilted_losses

            return tilted_losses(self, h, target_ids, lora, hints)
        if lora is None and "loss" in self.backends.kernels:
            from systems.kernels import fused_cross_entropy

            return fused_cross_entropy(h, self._head_weight, target_ids, self.cfg.logit_softcap)
        if "eager" in self.backends.kernels:
            from systems.eager import head_loss

            return head_loss(h, self._head_weight, target_ids, self.cfg.logit_softcap, lora)
        return softcapped_cross_entropy(self._head(h, lora), target_ids, self.cfg.logit_softcap)

    def forward(self, *batch: object, **options: object) -> Tensor:
        """`losses`, compiled where `Backends.move_and_compile` compiles."""
        return self.losses(*batch, **options)


def _zero_linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.zeros_(linear.weight)
    return linear


def _normal(std: float, *shape: int) -> Tensor:
    return torch.randn(shape) * std if std else torch.zeros(shape)


def _orthogonal(count: int, rows: int, columns: int) -> Tensor:
    return torch.stack([nn.init.orthogonal_(torch.empty(rows, columns)) for _ in range(count)])


# ---- 8. LoRA adapters for test-time training (PR #1530, #1767) -----------------------------------------

SPLIT_MIX = ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1))  # shifts, factors in int64


class LowRank(nn.Module):
    """One low-rank map per row of the batch: x A^T B^T, A [batch, r, inputs], B [batch, outputs, r]."""

    def __init__(self, batch: int, rank: int, inputs: int, outputs: int):
        super().__init__()
        self.A = nn.Parameter(torch.empty(batch, rank, inputs))
        self.B = nn.Parameter(torch.zeros(batch, outputs, rank))
        self.factors: list[Tensor] = []  # These leaves share the memory of the last rows of A and B.


class BatchedLoRA(nn.Module):
    """Adapters: for each document of a batch one on the head and one per virtual layer and role.

    Roles q, k, v and o read the normed block input, mlp the normed MLP input; alpha / rank scales outputs.
    """

    def __init__(self, cfg: Config, batch: int, slots: int, generator: torch.Generator | None = None):
        super().__init__()
        self.batch, self._generator = batch, generator
        self.active: Tensor | None = None  # Mask [batch] of the rows whose adapters count; None means all.
        self.scale, rank = cfg.ttt_lora_alpha / cfg.ttt_lora_rank, cfg.ttt_lora_rank
        dim, kv_dim = cfg.model_dim, cfg.num_kv_heads * cfg.head_dim
        widths = {"q": dim * cfg.ttt_q_lora, "v": kv_dim * cfg.ttt_v_lora, "k": kv_dim * cfg.ttt_k_lora}
        widths |= {"mlp": dim * cfg.ttt_mlp_lora, "o": dim * cfg.ttt_o_lora}  # A role of width 0 has none.
        self.lm_head_lora = LowRank(batch, rank, dim, cfg.vocab_size)
        for role, width in widths.items():
            if width:
                maps = nn.ModuleList(LowRank(batch, rank, dim, width) for _ in range(slots))
                self.add_module(f"{role}_loras", maps)
        self.draw_A()

    def maps(self) -> Iterable[LowRank]:
        """All adapters, in the order in which their A factors are drawn."""
        return (module for module in self.modules() if isinstance(module, LowRank))

    def draw_A(self) -> None:
        """Draw A uniform in +-1/sqrt(inputs)."""
        for A in (low_rank.A.data for low_rank in self.maps()):
            A.uniform_(-1 / math.sqrt(A.size(-1)), 1 / math.sqrt(A.size(-1)), generator=self._generator)

    def draw_rows(self, seeds: Sequence[int]) -> None:
        """`draw_A`, each row by its seed: SplitMix64 (Steele et al. 2014), equal bits on all devices."""
        first, drawn = torch.tensor(seeds, device=self.lm_head_lora.A.device)[:, None] * SPLIT_MIX[0][1], 0
        for A in (low_rank.A.data for low_rank in self.maps()):
            place = torch.arange(drawn, drawn := drawn + A[0].numel(), 2, device=A.device)
            x = first - 0x61C8864680B583EB * place
            for shift, factor in SPLIT_MIX:
                x = (x ^ (x >> shift & 2 ** (64 - shift) - 1)) * factor
            halves = x.view(torch.int32)[:, : A[0].numel()].reshape(A.shape)
            A.copy_(halves >> 8).mul_(2**-23 / math.sqrt(A.size(-1)))

    def reset_B(self) -> None:
        """Zero all B factors: the adapters add nothing."""
        for low_rank in self.maps():
            low_rank.B.data.zero_()

    def at(self, slot: int) -> "SlotAdapters":
        """The adapters of a virtual layer."""
        return SlotAdapters(self, slot)

    def use_last(self, rows: int) -> list[Tensor]:
        """Compute with the adapters of the last rows only; returns their factors, leaves of the graph."""
        for low_rank in self.maps():
            low_rank.factors = [whole.detach()[-rows:].requires_grad_() for whole in low_rank.parameters()]
        return [factor for low_rank in self.maps() for factor in low_rank.factors]


class SlotAdapters(NamedTuple):
    """The adapters of a virtual layer as a function of role and input."""

    lora: BatchedLoRA
    slot: int

    def get(self, role: str, rows: int) -> tuple[Tensor, Tensor] | None:
        """A [rows, r, i] and scaled B [rows, o, r] of a role, if it has some; of switched off ones zeros."""
        maps = self.lora.lm_head_lora if role == "head" else getattr(self.lora, f"{role}_loras", None)
        if maps is None:
            return None
        maps, active = maps if role == "head" else maps[self.slot], self.lora.active
        A, B = (f if len(f) == rows else f[-rows:] for f in maps.factors or (maps.A, maps.B))
        if active is not None and (A.is_cuda or torch.compiler.is_compiling() or not active[-rows:].all()):
            A, B = (torch.where(active[-rows:, None, None], factor, 0.0) for factor in (A, B))
        return A, B * self.lora.scale

    def __call__(self, role: str, x: Tensor) -> Tensor | float:
        """What is added to a role's product with x [n, T, inputs]."""
        pair = self.get(role, len(x))
        return 0.0 if pair is None else x @ pair[0].mT.to(x.dtype) @ pair[1].mT.to(x.dtype)


class LoRAOptimizer:
    """AdamW on a batch's adapters. Rows of finished documents rest, momentum too, and decay when it ends."""

    def __init__(self, cfg: Config, lora: BatchedLoRA):
        self.cfg, self.lora, self.factors = cfg, lora, lora.use_last(lora.batch)
        self._finished: list[tuple[slice, Tensor]] = []  # rows at rest, and the steps that they have taken
        self._moments = [[torch.zeros_like(factor) for factor in self.factors] for _ in range(2)]
        self._steps = [torch.zeros((), dtype=torch.float32, device=factor.device) for factor in self.factors]

    def drop_finished_rows(self, rows: int) -> None:
        """Leave all but the last rows to rest."""
        self._finished.append((slice(-len(self.factors[0]), -rows), self._steps[0].clone()))
        self.factors = self.lora.use_last(rows)
        self._moments = [[moment[-rows:] for moment in moments] for moments in self._moments]

    def decay_finished_rows(self) -> None:
        """Give A of rows at rest the weight decay of the steps since: their gradient has been 0."""
        keep = 1 - self.cfg.ttt_lora_lr * self.cfg.ttt_weight_decay
        factors = torch.ones(self.lora.batch, 1, 1, device=self._steps[0].device)
        for rows, taken in self._finished:
            factors[rows] = keep ** (self._steps[0] - taken)
        for low_rank in self.lora.maps():
            low_rank.A.data *= factors

    def step(self, loss: Tensor) -> None:
        """One step on the rows in use, down the gradient of a loss (the fused kernel ignores strides)."""
        cfg, gradients = self.cfg, [g.contiguous() for g in torch.autograd.grad(loss, self.factors)]
        settings = {"beta1": cfg.ttt_beta1, "beta2": cfg.ttt_beta2, "eps": 1e-10, "lr": cfg.ttt_lora_lr}
        settings |= {"weight_decay": cfg.ttt_weight_decay, "fused": True, "amsgrad": False, "maximize": False}
        with torch.no_grad():
            adamw(self.factors, gradients, *self._moments, [], self._steps, **settings)


def lora_slots(cfg: Config, looping: bool) -> int:
    """Number of virtual layers, each with its own adapters."""
    return sum(map(len, layer_order(cfg, looping)))


# ---- 9. Optimisers, schedules, EMA (SPEC section 4) ----------------------------------------------------

POLAR_EXPRESS = (  # PR #1344: a different cubic-quintic step each time, tuned to five steps
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
QUINTIC = ((3.4445, -4.775, 2.0315),) * 5  # the classic Muon coefficients


def newton_schulz(
    matrices: Tensor, coefficients: Sequence[tuple[float, float, float]] = POLAR_EXPRESS, steps: int = 5
) -> Tensor:
    """Orthogonalise matrices [..., rows, columns] in bfloat16: X <- a X + (b A + c A A) X, A = X X^T."""
    x = matrices.bfloat16()
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in coefficients[:steps]:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def update_scale(shape: Sequence[int]) -> float:
    """Factor of Muon's learning rate for matrices [..., rows, columns]: sqrt(max(1, rows / columns))."""
    return math.sqrt(max(1.0, shape[-2] / shape[-1]))


class Muon(torch.optim.Optimizer):
    """Momentum, row normalisation, orthogonalisation, decoupled weight decay, on banks of matrices.

    Gradient and momentum buffer are bfloat16, the parameter is float32: M <- mu M + g, U = g + mu M
    (Nesterov), rows of U to unit length (MuonEq-R), Newton-Schulz, p <- p (1 - lr wd) - lr scale U.
    """

    def __init__(self, params: Iterable, ranks: Ranks = CPU, backends: Backends = Backends(), **group):
        """`group`: lr, momentum, weight_decay, and what shall be otherwise than here."""
        group = {"coefficients": POLAR_EXPRESS, "steps": 5, "nesterov": True, "row_normalize": True} | group
        self._coefficients = tuple(group.pop("coefficients"))[: group.pop("steps")]
        super().__init__(params, group)
        self._ranks, self._orthogonalise = ranks, backends.compile(newton_schulz)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every bank that has a gradient, by the mean of the ranks' gradients."""
        self.apply(self.reduce_gradients())

    @torch.no_grad()
    def reduce_gradients(self) -> list[tuple[nn.Parameter, Pending]]:
        """Start the sums of all banks' gradients: bank and this rank's slice. bfloat16 between GPUs."""
        banks = [bank for group in self.param_groups for bank in group["params"] if bank.grad is not None]
        half = self._ranks.on_gpu
        return [(b, self._ranks.reduce_scatter(b.grad.bfloat16() if half else b.grad)) for b in banks]

    @torch.no_grad()
    def apply(self, slices: Sequence, factor: float | Tensor = 1.0, finite: bool | Tensor = True) -> None:
        """Orthogonalise this rank's slices, scaled by `factor`; one bank's update travels under the next."""
        group, updates = self.param_groups[0], []
        for bank, pending in slices:
            gradient = pending.wait() * (factor / self._ranks.world_size)
            if finite is not True:
                gradient = torch.where(finite, gradient, 0)
            updates.append((bank, self._ranks.all_gather(self._direction(bank, gradient, group))))
        for bank, pending in updates:
            bank.mul_(1 - group["lr"] * group["weight_decay"])
            bank.add_(pending.wait()[: len(bank)], alpha=-group["lr"] * update_scale(bank.shape))

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, which casts state to the parameter's type: the buffers go back to bfloat16, exactly."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["momentum_buffer"] = state["momentum_buffer"].bfloat16()

    def _direction(self, bank: nn.Parameter, gradient: Tensor, group: dict) -> Tensor:
        """The orthogonalised update of this rank's slice of a bank."""
        update = self._with_momentum(self.state[bank], gradient.bfloat16(), group)
        if group["row_normalize"]:
            update = update / update.float().norm(dim=-1, keepdim=True).clamp_min(1e-7).bfloat16()
        return self._orthogonalise(update, self._coefficients, len(self._coefficients))

    def _with_momentum(self, state: dict, gradient: Tensor, group: dict) -> Tensor:
        """The gradient with what the momentum buffer has of earlier ones (Nesterov)."""
        buffer = state.setdefault("momentum_buffer", torch.zeros_like(gradient))
        buffer.mul_(group["momentum"]).add_(gradient)
        return gradient.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer


def parameter_table(cfg: Config, model: GPT) -> dict[str, dict]:
    """Optimiser, learning rate and decay of every parameter, by name; each has exactly one row.

    The four banks go to Muon, largest first; all else to AdamW, control tensors with the scalar rates.
    """
    shapes = {name: p.shape for name, p in model.named_parameters()}
    banks = sorted((n for n in shapes if n.endswith("_bank")), key=lambda n: -shapes[n].numel())
    muon = {"optimizer": "muon", "lr": cfg.matrix_lr, "weight_decay": cfg.muon_wd}
    muon |= {"momentum": cfg.muon_momentum, "row_normalize": cfg.muon_row_normalize}
    muon["steps"] = cfg.muon_backend_steps
    adam = {"betas": [cfg.beta1, cfg.beta2], "eps": cfg.adam_eps}
    rate = cfg.tied_embed_lr if cfg.tie_embeddings else cfg.embed_lr
    embed = {"lr": rate, "weight_decay": cfg.embed_wd} | adam
    scalar = {"optimizer": "adamw_scalar", "lr": cfg.scalar_lr, "weight_decay": cfg.adam_wd} | adam
    table = dict.fromkeys(banks, muon)
    table["tok_emb.weight"] = {"optimizer": "adamw_tok"} | embed
    if not cfg.tie_embeddings:
        table["lm_head.weight"] = {"optimizer": "adamw_head"} | embed
    rest = [name for name in shapes if name not in table]  # sorted in the published order
    rest.sort(key=lambda name: (not name.startswith("blocks."), name == "smear_lambda"))
    return table | {name: scalar for name in rest}


def lr_multiplier(frac: float, warmdown_frac: float, min_lr: float) -> float:
    """Learning-rate factor at a fraction of training: 1, then linear to 0 at the end, with a floor."""
    return 1.0 if warmdown_frac <= 0 or frac < 1 - warmdown_frac else max((1 - frac) / warmdown_frac, min_lr)


def muon_momentum(step: int, start: float, end: float, warmup_steps: int) -> float:
    """Muon's momentum: linear from start to end over the warm-up."""
    share = min(step / warmup_steps, 1.0) if warmup_steps else 1.0
    return (1 - share) * start + share * end


class EMA:
    """Exponential moving average of all state in float32, started at the state it is given."""

    def __init__(self, state: Mapping[str, Tensor], decay: float):
        self.decay = decay
        self.averages = {name: tensor.detach().float().clone() for name, tensor in state.items()}

    @torch.no_grad()
    def update(self, state: Mapping[str, Tensor]) -> None:
        """average <- decay * average + (1 - decay) * state."""
        current = [state[name].detach().float() for name in self.averages]
        torch._foreach_lerp_(list(self.averages.values()), current, 1 - self.decay)

    def cast_like(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The averages, rounded once to the type of each tensor of the state."""
        return {name: average.to(state[name].dtype) for name, average in self.averages.items()}


# ---- 10. Training --------------------------------------------------------------------------------------

Batch = tuple[Tensor, Tensor, Segments]


class StepReport(NamedTuple):
    """What a training step did. Reading loss, norm or clock waits for this step, not for later ones."""

    step: int  # counted from 1
    measured: Pending  # loss, gradient norm, rank 0's clock, stop requests; of this rank: loss + norm
    lr_multiplier: float
    muon_momentum: float
    looping: bool

    @property
    def train_loss(self) -> float:
        """Mean loss of the step's tokens, nats."""
        return float(self.measured.wait()[0])

    @property
    def grad_norm(self) -> float:
        """Gradient norm before clipping; the mean over micro-batches unless CLIP_GLOBAL=1."""
        return float(self.measured.wait()[1])

    @property
    def stop_requested(self) -> bool:
        """Whether any rank had been told to stop when the step began."""
        return float(self.measured.wait()[3]) > 0

    def elapsed(self) -> float:
        """Rank 0's training time when the step began, seconds. Raises RunError unless all is finite."""
        finite = torch.isfinite(self.measured.wait())
        if not finite.all():
            values = f"train_loss {self.train_loss}, grad_norm {self.grad_norm}: not finite"
            where = "another rank's" if finite[4] else "this rank's"
            raise RunError(f"step {self.step}: {values} ({where}), its gradient was not used, stopped")
        return float(self.measured.wait()[2])


def micro_batches(cfg: Config, backends: Backends, world_size: int) -> tuple[int, int]:
    """Micro-batches of a step on each rank, and the tokens of one."""
    on_rank = max(1, backends.micro_batches // world_size)
    return on_rank, cfg.train_batch_tokens // (on_rank * world_size)


class Trainer(Worker):
    """Model, loader, optimisers, EMA. `run` has the log, the clock, and `validate(step, looping)`."""

    kept_by = "rank 0"

    def __init__(self, cfg: Config, model: GPT, loader: PackedLoader, ranks: Ranks = CPU, run: "Run" = None):
        self.cfg, self.model, self.loader, self.ranks, self.run = cfg, model, loader, ranks, run
        if ranks.on_gpu and has_part("prefetch"):
            from systems.prefetch import Prefetched

            self.loader = Prefetched(loader)
        self.looping = False
        self.micro_batches, self.micro_tokens = micro_batches(cfg, model.backends, ranks.world_size)
        self.steps, self.first = 0, 0.0  # done; rank 0's clock behind the first, `seconds` one before
        self.reports: list[StepReport] = []  # of the last two steps
        self.capped = cfg.max_wallclock_seconds > 0
        self.total = cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds if self.capped else cfg.iterations
        parameters = dict(model.named_parameters())
        groups = {}
        for name, row in parameter_table(cfg, model).items():
            group = {"params": []} | row
            groups.setdefault(group.pop("optimizer"), group)["params"].append(parameters[name])
        coefficients = {"polar_express": POLAR_EXPRESS, "quintic": QUINTIC}[cfg.muon_coefficients]
        options, kind = {"coefficients": coefficients, "ranks": ranks, "backends": model.backends}, Muon
        if cfg.muon_maxwell:
            from systems.maxwell import MaxwellMuon

            kind = MaxwellMuon
        self.muon = kind(**groups.pop("muon"), **options)
        self.adamw = torch.optim.AdamW(list(groups.values()), fused=True)
        self._small = [p for group in groups.values() for p in group["params"]]  # averaged as one buffer
        for group in self._groups():
            group["base_lr"] = group["lr"]
        self.ema = EMA(model.state_dict(), cfg.ema_decay)

    def _groups(self) -> list[dict]:
        return self.muon.param_groups + self.adamw.param_groups

    def step(self, step: int, frac: float, batches: Sequence = None, elapsed: float = 0.0) -> StepReport:
        """Step number `step` at a fraction of training; batches come from the loader unless given.

        Rank 0's `elapsed` travels with the gradients, so that all ranks decide by one clock. A gradient that
        is not finite is replaced by zeros; reading the report stops all.
        """
        cfg = self.cfg
        self.looping = self.looping or (cfg.num_loops > 0 and frac >= cfg.enable_looping_at)
        factor = lr_multiplier(frac, cfg.warmdown_frac, cfg.min_lr)
        limits = cfg.muon_momentum_warmup_start, cfg.muon_momentum, cfg.muon_momentum_warmup_steps
        momentum = muon_momentum(step, *limits)
        for group in self._groups():
            group["lr"] = group["base_lr"] * factor
        self.muon.param_groups[0]["momentum"] = momentum
        if cfg.wd_taper_final_mult != 1:
            late = max(0.0, frac - cfg.wd_taper_start_frac) / (1 - cfg.wd_taper_start_frac)
            decay = self.muon.defaults["weight_decay"] * (1 - late * (1 - cfg.wd_taper_final_mult))
            self.muon.param_groups[0]["weight_decay"] = decay
        loss, norm = self._accumulate_gradients(batches)
        clock = torch.full_like(loss, elapsed if self.ranks.is_main else 0.0)
        stop = torch.full_like(loss, float(self.ranks.stop_signal > 0))
        measured = torch.stack([loss, norm, clock, stop])
        slices, scale = self._exchange_gradients(measured)
        measured = torch.cat([measured, (loss + norm)[None]])
        finite = torch.isfinite(measured).all()
        for parameter in (p for p in self._small if p.grad is not None):
            parameter.grad = torch.where(finite, parameter.grad, 0)
        self.adamw.step()
        self.muon.apply(slices, scale, finite)
        self.model.zero_grad(set_to_none=True)
        self.ema.update(self.model.state_dict())
        return StepReport(step + 1, self.ranks.to_host(measured), factor, momentum, self.looping)

    def _accumulate_gradients(self, batches: Sequence[Batch] | None) -> tuple[Tensor, Tensor]:
        """Leave the mean gradient of the rank's micro-batches in `.grad`; return mean loss and gradient norm.

        Each micro-batch is clipped by itself, as on each of eight published ranks, so that the number of
        ranks does not matter; with CLIP_GLOBAL=1 none is.
        """
        limit = math.inf if self.cfg.clip_global else self.cfg.grad_clip_norm or math.inf
        loss_sum, norm_sum = torch.zeros(2, device=self.ranks.device)
        sums: list[Tensor] = []
        for micro in range(self.micro_batches):
            x, y, segments = self.loader.next() if batches is None else batches[micro]
            with self.ranks.autocast():
                batch = self.ranks.send(x, y, segments, self.model.backends.compiler)
                losses = self.model(*batch, looping=self.looping)
            loss = losses.mean()
            loss.backward()
            loss_sum += loss.detach()
            norm_sum += nn.utils.clip_grad_norm_(self.model.parameters(), limit)
            used = [p for p in self.model.parameters() if p.grad is not None]
            if sums:
                torch._foreach_add_(sums, [p.grad for p in used])
            sums = sums or [p.grad for p in used]
            self.model.zero_grad(set_to_none=True)
        torch._foreach_div_(sums, self.micro_batches)
        for parameter, gradient in zip(used, sums, strict=True):
            parameter.grad = gradient
        return loss_sum / self.micro_batches, norm_sum / self.micro_batches

    @torch.no_grad()
    def _exchange_gradients(self, measured: Tensor) -> tuple[list, Tensor | float]:
        """Average gradients and measured values; returns slices of banks and a clip factor for them."""
        ranks, slices = self.ranks, self.muon.reduce_gradients()  # under way while small ones are packed
        small = [p.grad for p in self._small if p.grad is not None]
        ranks.sum_packed_([*small, measured])
        if ranks.world_size > 1:
            torch._foreach_div_(small, ranks.world_size)
            measured[:2] /= ranks.world_size
        if not self.cfg.clip_global:
            return slices, 1.0
        squares = ranks.sum_(sum(pending.wait().float().square().sum() for _, pending in slices))
        measured[1] = torch.sqrt(squares / ranks.world_size**2 + sum(g.float().square().sum() for g in small))
        scale = ((self.cfg.grad_clip_norm or math.inf) / (measured[1] + 1e-6)).clamp_max(1.0)
        torch._foreach_mul_(small, scale)
        return slices, scale

    def warm_up(self, steps: int, watch: Watch | None = None) -> None:
        """Run every graph `steps` times on random tokens, then restore all state as it was."""
        before, cfg, watch = self.snapshot(), self.cfg, watch or Watch()
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng([self.ranks.device] if self.ranks.on_gpu else []):
            for frac in (0.0, 1.0)[: 1 + bool(cfg.num_loops)]:
                for step in range(steps):
                    watch.see("warm_up", steps_left=steps - step, steps=steps)
                    micro = range(self.micro_batches)
                    rows = [random_row(cfg, self.micro_tokens, cfg.train_seq_len, generator) for _ in micro]
                    self.step(0, frac, rows)
                watch.see("warm_up", steps_left=0, steps=steps)
            if self.model.backends.compiler and steps:
                length = cfg.val_batch_tokens // CONTEST_MICRO_BATCHES
                score = model_score(self.model, looping=cfg.num_loops > 0, ranks=self.ranks)
                score(*random_row(cfg, length, cfg.eval_seq_len, generator))
        self.restore(before)

    def units(self) -> Iterable[None]:
        """Train until clock or number of steps is used up, then put the average into the model."""
        cfg, run, compiled = self.cfg, self.run, self.model.backends.compiler
        graphs = compiled_graphs() if compiled else 0
        while self.steps < cfg.iterations and (frac := self._fraction()) < 1:
            if cfg.val_loss_every and self.steps % cfg.val_loss_every == 0:
                run.validate(self.steps, self.looping)
            was_looping = self.looping
            report = self.step(self.steps, frac, elapsed=run.clock.elapsed("train"))
            self.steps, self.reports = self.steps + 1, [*self.reports[-1:], report]
            if self.looping and not was_looping:
                encoder, decoder = layer_order(cfg, looping=True)
                run.log.event("looping", step=self.steps, encoder=encoder, decoder=decoder)
            if self.steps <= 5 or self.steps % cfg.train_log_every == 0:
                self._log_step(report)
            if len(self.reports) == 2:
                self.seconds, self.stop_requested = self.reports[0].elapsed(), self.reports[0].stop_requested
            if self.capped and self.steps <= 3:  # The clock of the reports says too little.
                self.seconds = self.ranks.gather(run.clock.elapsed("train"))[0]
                self.first = self.first or self.seconds
            self.done = self.seconds if self.capped else self.steps
            yield
        for report in self.reports:
            report.elapsed()  # raises if the step was not finite
        if compiled:
            memory, again = torch.cuda.max_memory_allocated() >> 20, compiled_graphs() - graphs
            run.log.event("graphs", warm_up=graphs, recompiled=again, peak_memory_mib=memory)
        self.model.load_state_dict(self.ema.cast_like(self.model.state_dict()))

    def _fraction(self) -> float:
        """Share of the training that is over: of the steps or, by the clock of all ranks, of the time."""
        # From step 4 on the clock is two steps late. They last as others do; the first may have compiled.
        late = 2 * (self.seconds - self.first) / (self.steps - 3) if self.steps > 3 else 0.0
        return (self.seconds + late) / self.total if self.capped else self.steps / self.cfg.iterations

    def _log_step(self, report: StepReport) -> None:
        report.elapsed()  # waits for the end of the step; raises if it was not finite
        elapsed = self.run.clock.elapsed("train")
        values = {"train_loss": report.train_loss, "grad_norm": report.grad_norm}
        values |= {"lr_multiplier": report.lr_multiplier, "train_seconds": elapsed}
        speed = report.step * self.cfg.train_batch_tokens / elapsed
        self.run.log.event("train", step=report.step, **values, tokens_per_second=speed)

    def state(self) -> dict:
        """All that later steps depend on, on the CPU; the same on all ranks, which call this together."""
        state = self.snapshot() | {"step": self.steps, "first": self.first, "rng": torch.get_rng_state()}
        state["clocks"] = [report.elapsed() for report in self.reports]
        banks = self.muon.param_groups[0]["params"]
        for number, entry in state["muon"]["state"].items():
            entire = self.ranks.all_gather(entry["momentum_buffer"]).wait()
            entry["momentum_buffer"] = entire[: len(banks[number])]
        return copy_tensors(state, Tensor.cpu)

    def load_state(self, state: dict) -> None:
        """Go on from a state, whatever the number of ranks was that made it."""
        ranks, banks = self.ranks, self.muon.param_groups[0]["params"]
        for number, entry in state["muon"]["state"].items():
            entire, per_rank = entry["momentum_buffer"], -(-len(banks[number]) // ranks.world_size)
            padding = entire.new_zeros(per_rank * ranks.world_size - len(entire), *entire.shape[1:])
            entry["momentum_buffer"] = torch.cat([entire, padding]).split(per_rank)[ranks.rank]
        torch.set_rng_state(state["rng"])
        self.restore(state | {"ema": copy_tensors(state["ema"], lambda tensor: tensor.to(ranks.device))})
        measured = [Pending(torch.tensor([0.0, 0.0, clock, 0.0, 0.0])) for clock in state["clocks"]]
        self.reports = [StepReport(state["step"], values, 1.0, 0.0, self.looping) for values in measured]
        self.steps, self.first, self.seconds = state["step"], state["first"], state["clocks"][0]

    def snapshot(self) -> dict:
        """A copy of everything that a step changes."""
        state = {"model": self.model, "muon": self.muon, "adamw": self.adamw}
        copies = {name: copy_tensors(part.state_dict()) for name, part in state.items()}
        averages = copy_tensors(self.ema.averages)
        return copies | {"ema": averages, "looping": self.looping, "loader": self.loader.state()}

    def restore(self, snapshot: dict) -> None:
        """Go back to a snapshot (optimisers keep the tensors that they are given, so they get copies)."""
        self.model.load_state_dict(snapshot["model"])
        self.muon.load_state_dict(copy_tensors(snapshot["muon"]))
        self.adamw.load_state_dict(copy_tensors(snapshot["adamw"]))
        self.ema.averages = copy_tensors(snapshot["ema"])
        self.looping = snapshot["looping"]
        self.loader.load_state(snapshot["loader"])


def random_row(cfg: Config, tokens: int, max_doc_len: int, generator: torch.Generator) -> Batch:
    """A row of random tokens in the form of a batch."""
    row = torch.randint(BOS, cfg.vocab_size, (tokens + 1,), generator=generator)
    return packed_row(row, max_doc_len, cfg.plain_windows)


def compiled_graphs() -> int:
    """How many graphs have been compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def copy_tensors(tree: object, copy: Callable[[Tensor], Tensor] = Tensor.clone) -> object:
    if isinstance(tree, Tensor):
        return copy(tree)
    if isinstance(tree, dict):
        return {key: copy_tensors(value, copy) for key, value in tree.items()}
    return [copy_tensors(item, copy) for item in tree] if isinstance(tree, list) else tree


# ---- 11. Quantisation (SPEC section 5): Hessians, GPTQ, LQER -------------------------------------------

BANKS = {  # bank -> the flat names of its slices, in the order of the bank's halves
    "qo_bank": ("attn.c_q.weight", "attn.proj.weight"),
    "kv_bank": ("attn.c_k.weight", "attn.c_v.weight"),
    "mlp_up_bank": ("mlp.fc.weight",),
    "mlp_down_bank": ("mlp.proj.weight",),
}


def flatten_banks(state: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """State dict with banks -> one entry per matrix, `blocks.{i}.attn.c_q.weight` and so on."""
    flat = {}
    for name, tensor in state.items():
        if name not in BANKS:
            flat[name] = tensor
        for layer, (half, member) in itertools.product(range(num_layers), enumerate(BANKS.get(name, ()))):
            flat[f"blocks.{layer}.{member}"] = tensor[half * num_layers + layer]
    return flat


def restore_banks(flat: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """The inverse of `flatten_banks`."""
    state = dict(flat)
    for bank, members in BANKS.items():
        slices = [state.pop(f"blocks.{layer}.{member}") for member in members for layer in range(num_layers)]
        state[bank] = torch.stack(slices)
    return state


class HessianCollector:
    """Sums x^T x of projections' inputs over tokens, batches and visits; float64: the same on any ranks."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}

    def on_input(self, name: str, x: Tensor) -> None:
        """Add the inputs x [..., n] of a projection."""
        rows = x.detach().flatten(0, -2).float()
        self._sums[name] = self._sums.get(name, 0) + (rows.mT @ rows).double()

    def hessians(self, num_batches: int, ranks: Ranks = CPU) -> dict[str, Tensor]:
        """The sums over all ranks, divided by the number of batches. K and V share the Hessian of Q."""
        hessians = {name: (ranks.sum_(x) / num_batches).float() for name, x in self._sums.items()}
        return {name.replace("c_q", c): h for name, h in hessians.items() for c in ("c_q", "c_k", "c_v")}


@torch.no_grad()
def calibrate(
    model: GPT, cfg: Config, loader: ShuffledLoader, *, looping: bool, ranks: Ranks = CPU
) -> dict[str, Tensor]:
    """Hessians over GPTQ_CALIBRATION_BATCHES batches: all ranks draw all of them and read in turn."""
    collector = HessianCollector()
    on_rank, tokens = micro_batches(cfg, model.backends, ranks.world_size)
    rows = tokens // cfg.train_seq_len
    if ranks.on_gpu:  # TF32 is eight times as fast, and the bfloat16 inputs are exact in it
        torch.set_float32_matmul_precision("high")
    for micro in range(cfg.gptq_calibration_batches * on_rank * ranks.world_size):
        if micro % ranks.world_size != ranks.rank:
            loader.draw(rows)
            continue
        x, _ = loader.next(rows)
        with ranks.autocast():
            model.hidden(x.to(ranks.device), looping=looping, on_input=collector.on_input)
    torch.set_float32_matmul_precision("highest")
    ranks.wait_for_all("calibrate")
    return collector.hessians(cfg.gptq_calibration_batches, ranks)


# How tensors are stored: quantiser, artifact and readers go by this table. A tensor has one of the first four
# forms; a matrix of GPTQ may have one of the others on top of it, its correction. An array has a letter for
# each dimension (rows, columns, k the rank, groups) and its largest level: -1 by the bits, 0 if float16.
FORMS = {  # form -> its name in published artifacts, its arrays by key
    "fp16": ("passthrough (float16)", {"": ("", 0)}),  # of any shape
    "int8_rows": ("gate_int8_row", {"gq": ("rc", 127), "gs": ("r", 0)}),
    "gptq": ("gptq (int{})", {"q": ("rc", -1), "scale": ("r", 0)}),
    "trellis": ("trellis (int{})", {"q": ("rc", -1), "scale": ("r", 0)}),
    "columns": ("+columns", {"columns": ("c", 0)}),
    "asym": ("+lqer_asym", {"lqA_a": ("rk", 1), "lqAs_a": ("", 0), "lqB_a": ("kc", 7), "lqBs_a": ("g", 0)}),
    "sym": ("+lqer", {"lqA": ("rk", 127), "lqAs": ("r", 0), "lqB": ("kc", 127), "lqBs": ("k", 0)}),
}


@dataclass
class QuantizedTensor:
    """A stored tensor: its form, its arrays by key, and what the log says of its quantisation."""

    kind: str  # "fp16", "int8_rows", "gptq" or "trellis"
    bits: int
    shape: tuple[int, ...]
    arrays: dict[str, Tensor]
    correction: tuple[str, int, int] | tuple[()] = ()  # form, rank and size of a group
    report: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def forms(self) -> tuple[str, ...]:
        """The form of the tensor and that of its correction."""
        return self.kind, *self.correction[:1]

    @property
    def category(self) -> str:
        """The name of the form in published artifacts."""
        return "".join(FORMS[form][0] for form in self.forms).format(self.bits)

    def dequantize(self) -> Tensor:
        """The float32 tensor that the model gets."""
        base, *correction = ([self.arrays[key] for key in FORMS[form][1]] for form in self.forms)
        if self.kind == "fp16":
            return base[0].float()
        weight = apply_scales(*base)
        if "columns" in self.forms:
            return weight * correction[0][0].float()
        for a, a_scale, b, b_scale in correction:
            weight = weight + apply_scales(a, a_scale) @ apply_scales(b, b_scale)
        return weight


class Scheme(NamedTuple):
    """How a tensor is to be stored: form, and for GPTQ the bits and the clip width in row deviations."""

    kind: Literal["gptq", "int8_rows", "fp16"]
    bits: int = 16
    clip_sigmas: float = 0.0


def scheme_of(name: str, tensor: Tensor, cfg: Config) -> Scheme:
    """The scheme of a tensor by its flat name and size."""
    if cfg.gated_attn_quant_gate and name.endswith(".attn_gate_w") and 32 <= tensor.numel() <= 8192:
        return Scheme("int8_rows", 8)
    projection = tensor.ndim == 2 and name.endswith(".weight") and "gate" not in name
    if tensor.numel() <= cfg.float16_max_elements or not projection:
        return Scheme("fp16")
    if "tok_emb" in name or "lm_head" in name:
        return Scheme("gptq", cfg.embed_bits, cfg.embed_clip_sigmas)
    by_role = {".mlp.": cfg.mlp_clip_sigmas, ".attn.": cfg.attn_clip_sigmas}
    sigmas = next((value for role, value in by_role.items() if role in name), cfg.matrix_clip_sigmas)
    return Scheme("gptq", cfg.matrix_bits, sigmas)


SMALLEST_HALF, LARGEST_HALF = 2.0**-24, 65504.0  # in float16 a scale below is 0, and one above infinite
DAMPING = 0.01


class HessianFactor(NamedTuple):
    """What GPTQ needs of a Hessian: columns by falling diagonal; in that order H^-1 = U^T U, U upper."""

    order: Tensor
    dead: Tensor  # columns whose inputs were always zero
    upper: Tensor
    damping: float = DAMPING  # what was added to the diagonal, in means of the diagonal


def factorise(hessian: Tensor) -> HessianFactor:
    """Damp, sort and factorise a Hessian [n, n]; damp tenfold while that fails, to 10^7 times (RunError)."""
    h = hessian.float().clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    mean, damping = h.diagonal().mean(), DAMPING
    h.diagonal().add_(damping * mean)
    order = torch.argsort(h.diagonal(), descending=True)
    h = h[order][:, order]
    while (cholesky := torch.linalg.cholesky_ex(h.flip(0, 1))).info:
        if damping > 1e4:
            raise RunError(f"calibration: a Hessian cannot be factorised (mean of its diagonal {mean:g})")
        h.diagonal().add_(9 * damping * mean)
        damping *= 10
    root = cholesky.L.flip(0, 1)  # upper, H = root root^T, so that U = root^-1
    identity = torch.eye(len(h), device=h.device)
    return HessianFactor(order, dead, torch.linalg.solve_triangular(root, identity, upper=True), damping)


def factorise_all(hessians: Mapping[str, Tensor | HessianFactor]) -> dict[str, HessianFactor]:
    """The factor of each matrix; a Hessian that several matrices share is factorised once."""
    distinct = {id(hessian): hessian for hessian in hessians.values()}
    factors = {key: factorise(h) if isinstance(h, Tensor) else h for key, h in distinct.items()}
    return {name: factors[id(hessian)] for name, hessian in hessians.items()}


def gptq_columns(
    weight: Tensor, factor: HessianFactor, step: Tensor, block: int = 32
) -> Generator[Tensor, Tensor, tuple[Tensor, float]]:
    """GPTQ (arXiv 2210.17323) of a weight [rows, columns] at given steps of the rows [rows].

    Columns go by falling diagonal of the Hessian: each is yielded in steps, and its levels are wanted. The
    rounding error of each is spread over the later ones: in its block as they are read, behind the block as
    one matrix product. Columns lie as rows here, which reads whole ones. Returns int16 levels [rows,
    columns] and the error tr(E H E^T), H damped.
    """
    order, dead, upper, _ = factor
    w = weight.float().t()[order]
    w[dead[order]] = 0
    levels, errors, pivots = torch.empty_like(w), torch.empty_like(w), upper.diagonal().tolist()
    for start in range(0, len(w), block):
        end = min(start + block, len(w))
        for j in range(start, end):
            column = torch.addmv(w[j], errors[start:j].t(), upper[start:j, j], alpha=-1)
            levels[j] = yield torch.div(column, step)
            torch.addcmul(column, levels[j], step, value=-1, out=errors[j]).div_(pivots[j])
        w[end:].addmm_(upper[start:end, end:].t(), errors[start:end], alpha=-1)
    return levels[order.argsort()].to(torch.int16).t().contiguous(), float(errors.double().square().sum())


def gptq(
    weight: Tensor, factor: HessianFactor, bits: int, scale: Tensor, block: int = 32
) -> tuple[Tensor, Tensor, float]:
    """GPTQ that rounds each weight by itself, at row scales [rows]: int8 levels, float16 scales, error."""
    top, scale = 2 ** (bits - 1) - 1, scale.clamp_min(SMALLEST_HALF).half()
    sweep, levels = gptq_columns(weight, factor, scale.float(), block), None
    try:
        while True:
            levels = sweep.send(levels).round_().clamp_(-top, top)
    except StopIteration as end:
        return end.value[0].to(torch.int8), scale, end.value[1]


def row_scales(weight: Tensor, scheme: Scheme) -> Tensor:
    """GPTQ's scale of each row by its deviation, or by its largest value where that is 0; float32 [rows]."""
    spread = scheme.clip_sigmas * weight.float().std(dim=1, correction=min(1, weight.size(1) - 1))
    spread = spread.where(spread > 0, weight.float().abs().amax(1))
    return (spread / (2 ** (scheme.bits - 1) - 1)).clamp(SMALLEST_HALF, LARGEST_HALF)


def round_to_scales(x: Tensor, runs: int, low: int, high: int, top: float) -> tuple[Tensor, Tensor]:
    """Int8 levels low..high of x; a float16 scale for each of `runs` runs, whose largest value is `top`."""
    values = x.float().reshape(runs, -1)
    scale = (values.abs().amax(1) / top).clamp(SMALLEST_HALF, LARGEST_HALF).half()
    return (values / scale.float()[:, None]).round().clamp(low, high).to(torch.int8).view(x.shape), scale


def apply_scales(levels: Tensor, scale: Tensor) -> Tensor:
    """The inverse of `round_to_scales`, float32."""
    return (levels.float().view(scale.numel(), -1) * scale.float().view(-1, 1)).view(levels.shape)


def low_rank_factors(error: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-r approximation A B of an error matrix: A = U S [rows, r], B = V^T [r, columns]."""
    u, s, vh = torch.linalg.svd(error.float(), full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def pack_low_rank(a: Tensor, b: Tensor, group: int, bits: int) -> tuple[tuple, dict[str, Tensor]]:
    """The correction A B as a record keeps it: (form, rank, group), and its arrays.

    If `group` divides B, A is in int2 with one scale, B in int4 with a scale per `group` values (PR #1797).
    Otherwise, or if it is 0, both are in integers of `bits`, with one scale per row.
    """
    if group and b.numel() % group == 0:
        form, (levels, scale) = "asym", round_to_scales(a, 1, -2, 1, 1.5)
        arrays = levels, scale[0], *round_to_scales(b, b.numel() // group, -8, 7, 7.5)
    else:
        form, group, top = "sym", 0, 2 ** (bits - 1) - 1
        arrays = *round_to_scales(a, len(a), -top, top, top), *round_to_scales(b, len(b), -top, top, top)
    return (form, len(b), group), dict(zip(FORMS[form][1], arrays, strict=True))


def quantize_tensor(x: Tensor, scheme: Scheme, factor: HessianFactor | None, cfg: Config) -> QuantizedTensor:
    """Store one tensor by its scheme; GPTQ needs the factor of its Hessian, and clips rows (PR #1394)."""
    started, report, arrays = time.perf_counter(), {}, [x.half()]
    if scheme.kind == "gptq":
        *arrays, error = gptq(x, factor, scheme.bits, row_scales(x, scheme))
        if not COUNTED:
            report = gptq_report(scheme, factor, error, started)
    elif cfg.gated_attn_quant_gate and scheme.kind == "int8_rows":
        arrays = round_to_scales(x, len(x), -127, 127, 127)
    keyed = dict(zip(FORMS[scheme.kind][1], arrays, strict=True))
    return QuantizedTensor(scheme.kind, scheme.bits, tuple(x.shape), keyed, report=report)


def gptq_report(scheme: Scheme, factor: HessianFactor, error: float, started: float) -> dict[str, float]:
    """What the log says of a matrix."""
    damping = {"damping": factor.damping} if factor.damping > DAMPING else {}
    report = {"bits": scheme.bits, "clip_sigmas": scheme.clip_sigmas, "weighted_error": error}
    return report | damping | {"seconds": time.perf_counter() - started}


def tensors_of_rank(flat: Mapping[str, Tensor], ranks: Ranks) -> list[str]:
    """The tensors that this rank quantises: all are shared out by the cost of GPTQ."""
    owners = assign_to_ranks([tensor.numel() * tensor.size(-1) for tensor in flat.values()], ranks.world_size)
    return [name for name, owner in zip(flat, owners, strict=True) if owner == ranks.rank]


def gather_by_name(part: Mapping[str, object], order: Iterable[str], ranks: Ranks) -> dict[str, object]:
    """What all ranks have for their tensors, as one dictionary in a given order of names, on every rank."""
    ranks.wait_for_all("quantise")
    union = {name: value for part in ranks.gather(part) for name, value in part.items()}
    return {name: union[name] for name in order if name in union}


def quantize_state(
    flat: dict[str, Tensor], hessians: dict[str, Tensor | HessianFactor], cfg: Config, ranks: Ranks = CPU
) -> dict[str, QuantizedTensor]:
    """Store every tensor of a flat state dict, then correct the worst matrices (LQER): on all ranks' CPUs."""
    mine = tensors_of_rank(flat, ranks)
    schemes = {name: scheme_of(name, flat[name], cfg) for name in mine}
    if not cfg.tie_embeddings:  # the inputs of an untied embedding are one-hot: all columns weigh the same
        width, device = flat["tok_emb.weight"].size(1), flat["tok_emb.weight"].device
        hessians = {"tok_emb.weight": torch.eye(width, device=device), **hessians}
    factors = factorise_all({name: hessians[name] for name in mine if schemes[name].kind == "gptq"})
    records = {}
    if cfg.quantizer == "trellis":
        from systems.trellis import quantize_matrices

        records = quantize_matrices({name: (flat[name], schemes[name], factors[name]) for name in factors})
    for name in (name for name in mine if name not in records):
        records[name] = quantize_tensor(flat[name], schemes[name], factors.get(name), cfg)
    if cfg.lqer_enabled:
        errors = {name: flat[name].float() - records[name].dequantize() for name in factors}
        norms = gather_by_name({name: float(error.norm()) for name, error in errors.items()}, flat, ranks)
        for name in sorted(norms, key=lambda name: -norms[name])[: cfg.lqer_top_k]:
            if name in errors:
                group = cfg.lqer_asym_group * cfg.lqer_asym_enabled
                a, b = low_rank_factors(errors[name], cfg.lqer_rank)
                records[name].correction, arrays = pack_low_rank(a, b, group, cfg.lqer_factor_bits)
                records[name].arrays |= arrays
    for record in records.values():
        record.arrays = {key: array.cpu() for key, array in record.arrays.items()}
    return gather_by_name(records, flat, ranks)


def dequantize_state(records: Mapping[str, QuantizedTensor], num_layers: int) -> dict[str, Tensor]:
    """The model's state dict of stored tensors."""
    return restore_banks({name: record.dequantize() for name, record in records.items()}, num_layers)


# ---- 12. Artifact: a container without anything executable ---------------------------------------------
# magic, version, codec (1 byte each after the magic) | header length u32 | sha256 of what follows | header:
# compressed JSON (model settings; name, kind, bits, shape, correction of each tensor; key and packed length
# of each stream) | streams: all arrays of one key, concatenated in the tensors' order and compressed. With
# the codec "ans" all arrays of levels are one stream, LEVELS, and the rest is compressed by brotli.

ARTIFACT_MAGIC, ARTIFACT_VERSION = b"PGOLF", 1
CODECS, LEVELS = ("brotli", "lzma", "ans"), "levels"
HEADER_LIMIT = 1 << 20  # bytes: a thousand layers take 0.6 MB
PREFIX, SHUFFLE_MAGIC = struct.Struct("<5sBBI32s"), b"BSHF"


def byte_shuffle(data: bytes, stride: int = 2) -> bytes:
    """Group the bytes at 0, s, 2s, ..., then 1, 1+s, ...; data shorter than s stay as they are."""
    if stride <= 1 or len(data) < stride:
        return data
    return SHUFFLE_MAGIC + bytes([stride]) + b"".join(data[i::stride] for i in range(stride))


def byte_unshuffle(data: bytes) -> bytes:
    """The inverse of `byte_shuffle`; data without its header are returned as they are."""
    if not data.startswith(SHUFFLE_MAGIC) or len(data) < 5:
        return data
    stride, body = max(data[4], 1), np.frombuffer(data, np.uint8, offset=5)
    out = np.empty_like(body)
    for i, part in enumerate(np.array_split(body, stride)):
        out[i::stride] = part
    return out.tobytes()


def check_codec(codec: str) -> None:
    """Raise ConfigError where a package that a codec needs is not installed."""
    package = "brotli" if codec == "ans" else codec
    if not importlib.util.find_spec(package):
        raise ConfigError(f"COMPRESSOR={codec}: the Python package {package} is not installed")


def compress(data: bytes, cfg: Config) -> bytes:
    """Compress bytes at the best setting of the codec. With "ans" what are no levels is left to brotli."""
    if cfg.compressor == "lzma":
        options = {"preset": 9 | lzma.PRESET_EXTREME, "dict_size": max(4096, len(data))}
        return lzma.compress(data, filters=[{"id": lzma.FILTER_LZMA2, **options}])
    import brotli

    return brotli.compress(data, quality=11, lgwin=24)


def decompress(data: bytes, cfg: Config, limit: int = 1 << 30) -> bytes:
    """The inverse of `compress`. ArtifactError, or the codec's, for damage or more than `limit` bytes."""
    if cfg.compressor == "lzma":
        decoder = lzma.LZMADecompressor(memlimit=2 * limit + (1 << 24))
        out = decoder.decompress(data, limit + 1)
        complete = decoder.eof and not decoder.unused_data
    else:
        import brotli

        decoder = brotli.Decompressor()
        out = decoder.process(data, output_buffer_limit=limit + 1)
        complete = decoder.is_finished()
    if not COUNTED and (not complete or len(out) > limit):
        raise ArtifactError(f"damaged {cfg.compressor} stream (cut off, or above {limit} bytes)")
    return out


class StoredArray(NamedTuple):
    """One array of a stored tensor, and its place in the artifact."""

    name: str  # of its tensor
    key: str
    dtype: str
    dims: tuple[int, ...]
    top: int  # largest level

    @property
    def size(self) -> int:
        """Bytes before compression."""
        return math.prod(self.dims) * int(self.dtype[2])


def stored_arrays(
    name: str, kind: str, bits: int, shape: Sequence[int], correction: Sequence
) -> Iterator[StoredArray]:
    """The arrays of a stored tensor by its entry in the header."""
    rank, group = correction[1:] or (0, 0)
    counts = (*shape, rank, rank * shape[-1] // (group or 1)) if kind != "fp16" else ()
    sizes = dict(zip("rckg", counts, strict=False))
    for form in (kind, *correction[:1]):
        for key, (letters, top) in FORMS[form][1].items():
            dims = tuple(sizes[letter] for letter in letters) if key else tuple(shape)
            trellis, top = kind == "trellis" and top < 0, top if top >= 0 else 2 ** (bits - 1) - 1
            yield StoredArray(name, key, "<i2" if trellis else "|i1" if top else "<f2", dims, top)


def artifact_streams(tensors: Iterable[Sequence], cfg: Config) -> dict[str, list[StoredArray]]:
    """Streams of an artifact, each with the arrays that it holds, by the header's list of tensors."""
    streams: dict[str, list[StoredArray]] = {}
    for part in itertools.chain.from_iterable(stored_arrays(*entry) for entry in tensors):
        levels = cfg.compressor == "ans" and part.dtype != "<f2"
        streams.setdefault(LEVELS if levels else part.key, []).append(part)
    return streams


def pack_artifact(records: Mapping[str, QuantizedTensor], cfg: Config, looping: bool = True) -> bytes:
    """Stored tensors and the settings that rebuild the model -> the artifact. Same weights, same bytes."""
    never = {} if looping and cfg.enable_looping_at < 1 or not cfg.num_loops else {"enable_looping_at": 1.0}
    tensors = [[name, r.kind, r.bits, [*r.shape], [*r.correction]] for name, r in records.items()]
    packed = {}
    for stream, parts in artifact_streams(tensors, cfg).items():
        arrays = [records[p.name].arrays[p.key].cpu().numpy().astype(p.dtype) for p in parts]
        if cfg.compressor == "ans" and stream == LEVELS:
            from systems.ans import encode_levels

            packed[stream] = encode_levels(arrays, [part.top for part in parts])
        else:
            data = b"".join(array.tobytes() for array in arrays)
            packed[stream] = compress(byte_shuffle(data, arrays[0].itemsize), cfg)
    index = [[stream, len(data)] for stream, data in packed.items()]
    header = {"model": cfg.model_settings() | never, "tensors": tensors, "streams": index}
    head = compress(json.dumps(header, separators=(",", ":")).encode(), cfg)
    body = head + b"".join(packed.values())
    codec, digest = CODECS.index(cfg.compressor), hashlib.sha256(body).digest()
    return PREFIX.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, codec, len(head), digest) + body


def codec_of(artifact: bytes) -> str:
    """The codec of an artifact. Raises ArtifactError unless the file is whole and of a known version."""
    if len(artifact) < PREFIX.size or not artifact.startswith(ARTIFACT_MAGIC):
        raise ArtifactError("not an artifact of this script")
    _, version, codec, _, digest = PREFIX.unpack_from(artifact)
    if version != ARTIFACT_VERSION or codec >= len(CODECS):
        raise ArtifactError(f"artifact version {version}, codec {codec}: not known to this script")
    if hashlib.sha256(memoryview(artifact)[PREFIX.size :]).digest() != digest:
        raise ArtifactError("artifact is truncated or corrupted (checksum differs)")
    return CODECS[codec]


def read_header(artifact: bytes, cfg: Config) -> tuple[dict[str, object], int]:
    """The header of an artifact, and where its streams begin."""
    start = PREFIX.size + PREFIX.unpack_from(artifact)[3]
    return json.loads(decompress(artifact[PREFIX.size : start], cfg, HEADER_LIMIT)), start


def unpack_artifact(artifact: bytes, cfg: Config) -> tuple[dict[str, object], dict[str, QuantizedTensor]]:
    """The artifact -> model settings and codec, stored tensors. harness/readers.py judges headers first."""
    if not COUNTED:  # the counted script has one codec and one model
        cfg = dataclasses.replace(cfg, compressor=codec_of(artifact))
    header, start = read_header(artifact, cfg)
    records = {e[0]: QuantizedTensor(e[1], e[2], tuple(e[3]), {}, tuple(e[4])) for e in header["tensors"]}
    streams = artifact_streams(header["tensors"], cfg)
    for (stream, parts), (_, length) in zip(streams.items(), header["streams"], strict=True):
        data, start = artifact[start : start + length], start + length
        for part, array in zip(parts, _unpack_stream(data, stream, parts, cfg), strict=True):
            records[part.name].arrays[part.key] = torch.from_numpy(array)
    quantizer = "trellis" if "trellis" in {record.kind for record in records.values()} else "scalar"
    return header["model"] | {"compressor": cfg.compressor, "quantizer": quantizer}, records


def _unpack_stream(data: bytes, stream: str, parts: list[StoredArray], cfg: Config) -> Iterator[np.ndarray]:
    """The arrays of a stream, each in memory of its own."""
    if cfg.compressor == "ans" and stream == LEVELS:
        from systems.ans import decode_levels

        yield from decode_levels(data, [(part.dims, part.dtype, part.top) for part in parts])
        return
    size = sum(part.size for part in parts)
    shuffled = parts[0].dtype != "|i1" and size > 1
    data = decompress(data, cfg, size + 5 * shuffled)
    data = byte_unshuffle(data) if shuffled else data
    if not COUNTED and len(data) != size:
        raise ArtifactError("artifact streams do not fit its tensors")
    start = 0
    for part in parts:
        yield np.frombuffer(data, part.dtype, math.prod(part.dims), start).reshape(part.dims).copy()
        start += part.size


# ---- 13. Evaluation (SPEC section 6): standard, and phased score-first LoRA test-time training ---------


class BpbMeter:
    """Sums of losses (nats), targets and original bytes in float64. The only place that knows ln 2."""

    def __init__(self):
        self.loss_sum = self.tokens = self.bytes = 0.0

    @property
    def sums(self) -> tuple[float, float, float]:
        """Losses, bytes and targets, as `add_sums` takes them."""
        return self.loss_sum, self.bytes, self.tokens

    def add_sums(self, loss_sum: float, byte_sum: float, tokens: float) -> None:
        """Add sums over targets."""
        self.loss_sum += loss_sum
        self.bytes += byte_sum
        self.tokens += tokens

    def add(self, losses: Tensor, byte_counts: Tensor) -> None:
        """Add the losses of targets and the bytes that they stand for."""
        self.add_sums(float(losses.double().sum()), float(byte_counts.sum()), float(losses.numel()))

    def sum_over(self, ranks: Ranks) -> None:
        """Add up the sums of all ranks, once the slowest has got here."""
        ranks.wait_for_all("score")
        sums = torch.tensor(self.sums, dtype=torch.float64, device=ranks.device)
        self.loss_sum, self.bytes, self.tokens = ranks.sum_(sums).tolist()

    @property
    def val_loss(self) -> float:
        """Nats per target."""
        return self.loss_sum / self.tokens

    @property
    def val_bpb(self) -> float:
        """Bits per original byte."""
        return self.val_loss / math.log(2) * self.tokens / self.bytes


class Evaluation(Worker):
    """A worker that scores. Its meter has the sums of this rank and, behind the last unit, those of all."""

    def __init__(
        self, model: GPT, val: ValidationSet, cfg: Config, *, looping: bool, ranks=CPU, watch: Watch = None
    ):
        self.model, self.val, self.cfg, self.looping, self.ranks = model, val, cfg, looping, ranks
        self.watch, self.meter, self.total = watch or Watch(), BpbMeter(), val.num_targets

    def run(self) -> BpbMeter:
        """Do all units, unwatched."""
        for _ in self.units():
            pass
        return self.meter


def model_score(model: GPT, *, looping: bool, ranks: Ranks = CPU) -> Callable[..., Tensor]:
    """The model as a function that returns losses. Rows of other lengths than the first are not compiled."""
    length = 0

    @torch.no_grad()
    def score(x: Tensor, y: Tensor, segments: Segments) -> Tensor:
        nonlocal length
        length = length or x.size(1)
        run = model if x.size(1) == length else model.losses
        with ranks.autocast():
            return run(*ranks.send(x, y, segments, model.backends.compiler), looping=looping).cpu()

    return score


class StandardEvaluation(Evaluation):
    """Every target once, in rows of VAL_BATCH_TOKENS / 8 that ranks take in turn. A unit is a row."""

    def units(self) -> Iterable[None]:
        """Score row after row."""
        score = model_score(self.model, looping=self.looping, ranks=self.ranks)
        cfg, val, targets = self.cfg, self.val, self.cfg.val_batch_tokens // CONTEST_MICRO_BATCHES
        for start in range(self.ranks.rank * targets, val.num_targets, self.ranks.world_size * targets):
            end = min(start + targets, val.num_targets)
            losses = score(*packed_row(val.tokens[start : end + 1], cfg.eval_seq_len, cfg.plain_windows))
            self.meter.add(losses, val.target_bytes[start:end])
            self.watch.see("row", start=start, end=end, losses=losses)
            self.done = end
            yield
        self.meter.sum_over(self.ranks)


# The plan of test-time training: documents -> batches -> chunks -> phases, all of it pure functions.
Span = tuple[int, int]  # where a document starts in the stream, and its tokens
Document = tuple[int, Span]  # its number comes first


class TTTBatch(NamedTuple):
    """Documents adapted side by side, by ascending length; batches are numbered that way too."""

    index: int
    documents: list[Document]

    @property
    def targets(self) -> int:
        """Targets of the longest document."""
        return self.documents[-1][1][1] - 1


# Window of a chunk inside its document: first input, inputs, offset of the scored ones, and their number.
ChunkWindow = namedtuple("ChunkWindow", "start length offset targets")


def select_documents(documents: Sequence[Span], fraction: float, seed: int) -> list[Span]:
    """A random sample of the documents, in their order; all of them for fraction 1."""
    ids, count = range(len(documents)), max(1, round(len(documents) * fraction))
    return [documents[i] for i in (ids if fraction >= 1 else sorted(random.Random(seed).sample(ids, count)))]


def ttt_batches(documents: Sequence[Document], cfg: Config, first: int = 0) -> list[TTTBatch]:
    """Batches of documents of similar length, numbered by ascending length from `first`; longest first."""
    by_length, size = sorted(documents, key=lambda document: document[1][1]), cfg.ttt_batch_size
    parts = [by_length]
    if cfg.ttt_chunk_by_length:
        from systems.chunks import chunk_groups

        parts = chunk_groups(by_length, cfg)
    batches = [part[start : start + size] for part in parts for start in range(0, len(part), size)]
    return sorted(itertools.starmap(TTTBatch, enumerate(batches, first)), key=lambda batch: -batch.targets)


def phase_boundaries(prefix_docs: int, num_phases: int, num_docs: int) -> list[int]:
    """Numbers of scored documents at which the base weights are trained; a phase without new ones is none."""
    return sorted({min(prefix_docs, num_docs) * (i + 1) // num_phases for i in range(num_phases)} - {0})


def chunk_window(chunk: int, targets: int, size: int, max_window: int, uncached: int = 0) -> ChunkWindow:
    """The inputs that score a chunk: at most `max_window`, up to its end, none before place `uncached`."""
    first, end = chunk * size, min((chunk + 1) * size, targets)
    start = max(uncached, end - max_window)
    return ChunkWindow(start, end - start, first - start, end - first)


def share_documents(batches: Sequence[TTTBatch], cfg: Config, world_size: int) -> list[list[TTTBatch]]:
    """The documents of a phase's batches, shared out over the ranks by cost and there in batches again.

    The longest go first, each to the rank with the least to do. A document costs the tokens of its windows;
    one that starts a batch also four full windows a step, for what a step takes with hardly a row left.
    """
    loads, shares = [0.0] * world_size, [[] for _ in range(world_size)]
    full, documents = cfg.ttt_eval_seq_len, [item for batch in batches for item in batch.documents]
    for document in sorted(documents, key=lambda item: -item[1][1]):
        rank, length = loads.index(min(loads)), document[1][1]
        opens = len(shares[rank]) % cfg.ttt_batch_size == 0
        window = min(length, full)
        cost = window * (length - window / 2) + opens * 4 * full * length
        loads[rank] += cost / chunk_size(cfg, length - 1)
        shares[rank].append(document)
    first = min((batch.index for batch in batches), default=0)
    return [ttt_batches(sorted(share), cfg, first) for share in shares]


def split_at_boundaries(batches: Sequence[TTTBatch], boundaries: Sequence[int]) -> list[list[TTTBatch]]:
    """The batches up to each boundary of scored documents, one list a phase, and the rest."""
    parts, scored = [[] for _ in [*boundaries, 0]], 0
    for batch in batches:
        parts[bisect.bisect(boundaries, scored)].append(batch)
        scored += len(batch.documents)
    return parts


class ChunkBatch(NamedTuple):
    """One chunk of the documents of a batch that reach it (the last, longest rows), as the model reads it."""

    documents: list[int]  # document numbers, one a row
    x: Tensor  # inputs [B, T]
    y: Tensor  # targets [B, T]; T one less than of the inputs where they begin with the last cached token
    scored: Tensor  # positions of the chunk's targets [B, chunk_size]
    valid: Tensor  # which of them exist [B, chunk_size]
    trains: Tensor  # documents with a later chunk [B]: the only ones that may learn from this one
    spans: list[Span]  # per document: first scored target in the stream, and number of targets


def chunk_batch(
    tokens: Tensor, batch: TTTBatch, chunk: int, size: int, max_window: int, first: int = 0
) -> ChunkBatch:
    """Gather the windows of a chunk of `size` targets; tokens before place `first` are cached."""
    alive = [(number, span) for number, span in batch.documents if chunk * size < span[1] - 1]
    windows = [chunk_window(chunk, length - 1, size, max_window, first) for _, (_, length) in alive]
    lead = int(first > 0)
    x = torch.zeros(len(alive), lead + max(window.length for window in windows), dtype=torch.long)
    y, spans = torch.zeros_like(x[:, lead:]), []
    for row, ((_, (start, _)), window) in enumerate(zip(alive, windows, strict=True)):
        part = tokens[start + window.start - lead : start + window.start + window.length + 1]
        x[row, : len(part) - 1], y[row, : window.length] = part[:-1], part[lead + 1 :]
        spans.append((start + window.start + window.offset, window.targets))
    within = torch.arange(size)
    scored = (torch.tensor([w.offset for w in windows])[:, None] + within).clamp_max(y.size(1) - 1)
    valid = within < torch.tensor([w.targets for w in windows])[:, None]
    trains = torch.tensor([(chunk + 1) * size < length - 1 for _, (_, length) in alive])
    return ChunkBatch([number for number, _ in alive], x, y, scored, valid, trains, spans)


class ScoreFirstTTT(Evaluation):
    """Phased score-first LoRA test-time training (PR #1530, #1610, #1626, #1767).

    Every chunk is scored with the weights as they are and only then trained on. Documents go longest first,
    a batch side by side; at a phase's boundary the base weights are trained by SGD on the first documents
    scored, and new adapters are made. A unit is a batch or a global phase. The model is changed in place.
    """

    kept_by = "each rank"
    slack = 3.0  # nats a target that a document may become harder, for good, without any harm

    def __init__(self, *arguments: object, generator: torch.Generator | None = None, **options: object):
        super().__init__(*arguments, **options)
        val, cfg = self.val, self.cfg
        self._generator = generator or torch.Generator(self.ranks.device).manual_seed(cfg.seed)
        documents = select_documents(val.documents, cfg.val_doc_fraction, cfg.seed)
        self.total = len(documents) / self.ranks.world_size
        self.batches = ttt_batches(list(enumerate(documents)), cfg)
        phases = cfg.phased_ttt_prefix_docs, cfg.phased_ttt_num_phases
        self.boundaries = phase_boundaries(*phases, len(documents))
        self.phases = self.diverged = self._constructed = self._batches = 0  # batches: in the current phase
        self._reusable: BatchedLoRA | None = None  # Memory and, with a warm start, A go from batch to batch.

    def units(self) -> Iterable[None]:
        """Score and adapt all documents, from where the state says on."""
        if not self.phases + self._batches:
            self.watch.see("start", boundaries=self.boundaries)
        parts = split_at_boundaries(self.batches, self.boundaries)
        if self.cfg.ngram_tilt:
            from systems.tilt import Tilt

            self.tilt = Tilt(self)
            parts = self.tilt.parts
        while self.phases < len(parts):
            if self.cfg.ttt_warm_start_a and self._reusable is None:
                self._reusable = self._new_lora(range(self.cfg.ttt_batch_size))
            mine = share_documents(parts[self.phases], self.cfg, self.ranks.world_size)[self.ranks.rank]
            for batch in mine[self._batches :]:
                self._score_batch(batch, self._adapters(batch), chunk_size(self.cfg, batch.targets))
                self._batches += 1
                self.done += len(batch.documents)
                yield
            self.ranks.wait_for_all("ttt")
            self.phases, self._batches = self.phases + 1, 0
            if self.phases <= len(self.boundaries):
                self._reusable = None
                self._global_phase([batch for part in parts[: self.phases] for batch in part])
                yield
        self.model.requires_grad_(True)
        self.meter.sum_over(self.ranks)

    def state(self) -> dict[str, object]:
        """Where this rank is between two units: everything but the weights that a phase has left behind."""
        lora = self._reusable if self.cfg.ttt_warm_start_a else None
        active = None if lora is None else lora.active
        return {
            "place": [self.phases, self._batches, self.done, self.diverged, self._constructed],
            "sums": list(self.meter.sums),
            "generator": self._generator.get_state(),
            "A": [] if lora is None else [low_rank.A.detach().cpu().clone() for low_rank in lora.maps()],
            "active": None if active is None else active.cpu(),
        }

    def load_state(self, state: Mapping) -> None:
        """Go on from a state of a run with as many ranks; its "weights", where it has them, are loaded."""
        self.phases, self._batches, self.done, self.diverged, self._constructed = state["place"]
        self.meter.add_sums(*state["sums"])
        if state["A"]:
            lora = self._reusable = self._make_lora(self.cfg.ttt_batch_size)
            for low_rank, A in zip(lora.maps(), state["A"], strict=True):
                low_rank.A.data.copy_(A)
            lora.active = None if (active := state["active"]) is None else active.to(self.ranks.device)
        self._generator.set_state(state["generator"])
        if "weights" in state:
            self.model.load_state_dict(state["weights"])

    def _adapters(self, batch: TTTBatch) -> BatchedLoRA:
        """Adapters with B zero; A of the last full batch (warm start), or of the seed and the document."""
        if not self.cfg.ttt_warm_start_a or len(batch.documents) < self.cfg.ttt_batch_size:
            return self._new_lora(batch.documents)
        lora = self._reusable
        if lora.active is not None and not bool(lora.active.all()):
            lora.draw_A()  # No document inherits factors that have diverged.
        self.watch.see("lora_reset", lora=lora)
        lora.reset_B()
        return lora

    def _make_lora(self, batch: int) -> BatchedLoRA:
        with self.ranks.device:
            return BatchedLoRA(self.cfg, batch, lora_slots(self.cfg, self.looping), self._generator)

    def _new_lora(self, documents: Sequence[Document] | range) -> BatchedLoRA:
        lora, fresh = self._reusable, not self.cfg.ttt_warm_start_a
        if not fresh or lora is None or lora.batch != len(documents):
            lora = self._make_lora(len(documents))
        if fresh:
            self._reusable = lora
            lora.draw_rows([self.cfg.seed * 1_000_003 + number for number, _ in documents])
            lora.reset_B()
        self.watch.see("lora_constructed", index=self._constructed, batch=lora.batch, lora=lora)
        self._constructed += 1
        return lora

    def _score_batch(self, batch: TTTBatch, lora: BatchedLoRA, size: int) -> None:
        """Score and adapt the documents of a batch by chunks of `size` targets."""
        self.model.requires_grad_(False)  # A compiled backward pass would compute all that may be wanted.
        cfg, optimizer, cache, first = self.cfg, LoRAOptimizer(self.cfg, lora), None, 0
        if cfg.ttt_cache_window:
            from systems.cache import KeyValueCache

            cache = KeyValueCache()
        rows, sums = lora.batch, []
        evidence = torch.zeros(3, rows, device=self.ranks.device)  # Losses, targets, nats of harm.
        lora.active = torch.ones_like(evidence[0], dtype=torch.bool)
        for chunk in range(-(-batch.targets // size)):
            if cfg.ttt_cache_window:
                first = cache.advance((chunk + 1) * size, cfg)
            part = chunk_batch(self.val.tokens, batch, chunk, size, cfg.ttt_eval_seq_len, first)
            if len(part.documents) <= rows * 7 // 8:
                rows = len(part.documents)
                optimizer.drop_finished_rows(rows)
            event = {"batch_number": batch.index, "chunk": chunk, "part": part}
            learns = bool(part.trains.any())
            with torch.set_grad_enabled(learns):
                losses = self._losses(part, lora, cache)
            sums.append(self._sums(part, losses, evidence, chunk, lora))
            self.watch.see("scored", losses=losses, **event)
            if learns:
                self.watch.see("trained", **event)
                self._adapt(part, optimizer, losses, cache)
        if cfg.ttt_warm_start_a:
            optimizer.decay_finished_rows()  # The next batch inherits A.
        lora.use_last(lora.batch)
        chunks = [[float(loss_sum), byte_sum, tokens] for loss_sum, byte_sum, tokens in sums]
        for chunk in chunks:
            self.meter.add_sums(*chunk)
        diverged = int((~lora.active).sum())
        self.diverged += diverged
        totals = dict(zip(("loss_sum", "byte_sum", "token_count"), self.meter.sums, strict=True))
        facts = totals | {"chunks": chunks, "lora": lora, "batch": batch, "diverged": diverged}
        self.watch.see("batch_done", batch_number=batch.index, **facts)

    def _sums(
        self, part: ChunkBatch, losses: Tensor, evidence: Tensor, chunk: int, lora: BatchedLoRA
    ) -> tuple[Tensor, int, int]:
        """Loss, bytes and targets of a chunk. Adapters of documents that have come to harm are switched off.

        Harm is TTT_GUARD nats of evidence: what targets in a row cost above the document's mean so far and
        the slack (a cumulative sum, so chunks may have any size). What is scored stays as it is.
        """
        valid, rows = self.ranks.put(part.valid), len(part.documents)
        scored, targets = losses.detach() * valid, valid.sum(1)
        loss_sum, before, harm = evidence[:, -rows:]
        if self.cfg.ttt_guard and chunk and (going := int(part.trains.sum())):  # The last rows go on.
            harm.add_(scored.sum(1) - targets * (loss_sum / before + self.slack)).clamp_(min=0)
            lora.active = lora.active.clone()  # The graph of the losses holds the old mask.
            lora.active[-going:] &= harm[-going:] <= self.cfg.ttt_guard
        evidence[:2, -rows:] += torch.stack([scored.sum(1), targets])
        byte_sum = sum(int(self.val.target_bytes[start : start + n].sum()) for start, n in part.spans)
        return scored.double().sum(), byte_sum, int(part.valid.sum())

    def _losses(self, part: ChunkBatch, lora: BatchedLoRA, cache: object | None) -> Tensor:
        x, y, scored = (self.ranks.put(tensor) for tensor in (part.x, part.y, part.scored))
        tip = {"hints": self.tilt.hints_of(part, self.ranks)} if self.cfg.ngram_tilt else {}
        with self.ranks.autocast():
            if self.model.backends.compiler and torch.is_grad_enabled() and not cache:
                from systems.compiled import compiled_losses

                return compiled_losses(self.model, x, y, scored, lora, self.looping, **tip)
            if "eager" in self.model.backends.kernels and torch.is_grad_enabled() and not cache:
                from systems.memory import losses_by_rows

                return losses_by_rows(self.model, x, y, scored, lora, self.looping, **tip)
            return self.model.losses(x, y, looping=self.looping, lora=lora, scored=scored, cache=cache, **tip)

    def _adapt(self, part: ChunkBatch, optimizer: LoRAOptimizer, losses: Tensor, cache: object) -> None:
        """Optimiser steps on a scored chunk; the first takes the gradient of the scoring pass itself."""
        trains = self.ranks.put(part.trains)
        for step in range(self.cfg.ttt_grad_steps):
            losses = self._losses(part, optimizer.lora, cache) if step else losses
            optimizer.step(torch.where(trains, losses.mean(1), 0.0).sum())

    def _global_phase(self, done: Sequence[TTTBatch]) -> None:
        """Train the base weights on the first scored documents, shortest batches first."""
        scored = [span for batch in sorted(done) for _, span in batch.documents]
        scored = scored[: self.boundaries[self.phases - 1]]
        tokens = torch.cat([self.val.tokens[start : start + length] for start, length in scored])
        norms, rates = global_sgd(self.model, tokens, self.cfg, looping=self.looping, ranks=self.ranks)
        facts = {"tokens": tokens, "grad_norms": norms, "lr_used": rates, "model": self.model}
        self.watch.see("global_sgd", phase=self.phases, **facts)


def cosine_rate(peak: float, step: int, steps: int) -> float:
    """From the peak at step 0 along a cosine to 0 at the last of `steps` steps."""
    return peak * 0.5 * (1 + math.cos(math.pi * (step / max(steps - 1, 1))))


def global_sgd_lr(chunk: int, num_chunks: int, cfg: Config) -> float:
    """Learning rate of a chunk: linear warm-up, then a cosine to 0 at the last chunk."""
    warmup = min(cfg.global_ttt_warmup_chunks, num_chunks - 1)
    if chunk < warmup:
        share, start = chunk / max(warmup - 1, 1), cfg.global_ttt_warmup_start_lr
        return start + share * (cfg.global_ttt_lr - start)
    return cosine_rate(cfg.global_ttt_lr, chunk - warmup, num_chunks - warmup)


def global_sgd(
    model: GPT, tokens: Tensor, cfg: Config, *, looping: bool, ranks: Ranks = CPU
) -> tuple[list[float], list[float]]:
    """A phase of SGD over scored tokens [n+1] but for the last chunk: norm and rate of each step."""
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), cfg.global_ttt_lr, cfg.global_ttt_momentum)
    training = BaseTraining(model, cfg, cfg.global_ttt_respect_doc_boundaries, looping, ranks)
    size, norms, rates = cfg.global_ttt_chunk_tokens, [], []
    num_chunks = -(-(len(tokens) - 1) // size)
    for chunk in range(num_chunks - 1):
        rate, row = global_sgd_lr(chunk, num_chunks, cfg), tokens[chunk * size : (chunk + 1) * size + 1]
        norms += training.train(row, optimizer, rate, cfg.global_ttt_epochs)
        rates += [rate] * (len(norms) - len(rates))
    return [float(norm) for norm in norms], rates


class BaseTraining:
    """Trains all base weights on windows of EVAL_SEQ_LEN scored tokens, which the ranks share."""

    def __init__(self, model: GPT, cfg: Config, by_document: bool, looping: bool, ranks: Ranks):
        self.model, self.cfg, self.ranks = model, cfg, ranks
        self.by_document, self.looping = by_document, looping

    def train(self, tokens: Tensor, optimizer: torch.optim.SGD, rate: float, epochs: int) -> list[Tensor]:
        """Go over the whole windows of tokens [n+1] some times; returns each step's norm before clipping."""
        optimizer.param_groups[0]["lr"] = rate
        cfg, parameters, window = self.cfg, list(self.model.parameters()), self.cfg.eval_seq_len
        norms, windows = [], (len(tokens) - 1) // window
        for start in list(range(0, windows, cfg.global_ttt_batch_seqs)) * epochs:
            count = window * min(cfg.global_ttt_batch_seqs, windows - start)
            part, lead = self._part(tokens[start * window : start * window + count + 1])
            if len(part) > 1 + lead:
                (self.losses(part, lead).sum() / count).backward()
            for parameter in parameters:  # A rank without windows still takes part in the sum.
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self.ranks.sum_packed_([parameter.grad for parameter in parameters])
            norms.append(nn.utils.clip_grad_norm_(parameters, cfg.global_ttt_grad_clip or math.inf))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norms

    def _part(self, row: Tensor) -> tuple[Tensor, int]:
        """This rank's part, cut between segments or windows; 1 if the token before is in it (SmearGate)."""
        starts, ranks = range(0, len(row), self.cfg.eval_seq_len), self.ranks
        if self.by_document:
            starts = packed_row(row, self.cfg.eval_seq_len)[2].cu_seqlens.tolist()
        even = ((len(row) - 1) * (ranks.rank + i) // ranks.world_size for i in (0, 1))
        low, high = (starts[bisect.bisect_left(starts, cut)] for cut in even)
        lead = int(self.by_document and 0 < low < high)
        return row[low - lead : high + 1], lead

    def losses(self, tokens: Tensor, lead: int = 0) -> Tensor:
        """Losses of consecutive windows [n+1] behind `lead` tokens: one row of segments, or plain rows."""
        model, ranks, window = self.model, self.ranks, self.cfg.eval_seq_len
        x, y, segments = packed_row(tokens[lead:], window)
        if lead:  # a segment of its own
            x, y = (torch.cat([tokens[None, :1].to(part), part], 1) for part in (x, y))
            segments = segments._replace(cu_seqlens=F.pad(segments.cu_seqlens + 1, (1, 0)))
        with ranks.autocast():
            if not self.by_document:
                x, y = (ranks.put(part.view(-1, window)) for part in (x, y))
                return (model if model.backends.compiler else model.losses)(x, y, looping=self.looping)
            batch = ranks.send(x, y, segments, model.backends.compiler)
            if not model.backends.compiler:
                return model.losses(*batch, looping=self.looping)[:, lead:]
            for tensor in batch[:2]:
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
            return model(*batch, looping=self.looping)[:, lead:]


# ---- 14. Main: the stages of a run ---------------------------------------------------------------------


class Run:
    """One run: settings, device, log, clock, and what was measured. `sources`: files of the house."""

    def __init__(self, cfg: Config, ranks: Ranks, backends: Backends, sources: Mapping, watch: Watch = None):
        self.cfg, self.ranks, self.backends, self.sources = cfg, ranks, backends, sources
        self.watch, self.clock = watch or Watch(), Stopwatch(ranks)
        if not COUNTED:
            check_codec(cfg.compressor)  # missing: said before training, not after it
        self.stages: dict[str, dict[str, float]] = {}
        self.result: dict[str, object] = {}
        self.finished: list[str] = []  # stages that are over, and were perhaps before this run was resumed
        self.artifact, self.trains = b"", not (cfg.quantize_only or cfg.ttt_eval_only)
        if cfg.prequant_only and not COUNTED:
            self.trains = find_file(cfg, "model_path", needed=False) is None
        self.watch.see("inputs", run=self)  # a resumed run knows what it began with
        artifact = find_file(cfg, "quantized_model_path") if cfg.ttt_eval_only else None
        checkpoint = None if artifact or self.trains else find_file(cfg, "model_path")
        self.watch.see("data", run=self)
        self.val = load_validation(cfg)  # read to be checked; no model sees it before its evaluation
        self.watch.see("sizes", run=self)
        self.model = self._first_model(artifact, checkpoint)
        self.watch.see("model", run=self)
        self.log = RunLog(self.cfg, ranks, self.watch)
        self.watch.see("opened", run=self)

    def _first_model(self, artifact: Path | None, checkpoint: Path | None) -> GPT:
        """The model that the run starts with: fresh, of a checkpoint, or of an artifact."""
        if artifact:
            self.artifact = artifact.read_bytes()
            model = self.model_of_artifact(artifact)
            self.cfg = model.cfg  # what made the artifact is what the counted code needs
            return model
        if checkpoint and not COUNTED:
            if "harness/readers.py" not in self.sources:
                raise ConfigError(f"MODEL_PATH={checkpoint}: needs harness/ beside train_gpt.py to be read")
            from harness.readers import model_of_checkpoint

            return model_of_checkpoint(self, checkpoint)
        self.loader = self.new_loader()
        return self.new_model(self.cfg)

    def new_loader(self) -> PackedLoader:
        """The training batches of this rank, from the first on."""
        cfg, ranks, paths = self.cfg, self.ranks, shard_paths(self.cfg.data_folder, "train")
        on_rank, tokens = micro_batches(cfg, self.backends, ranks.world_size)
        if cfg.plain_windows:
            from systems.stream import WindowLoader

            return WindowLoader(paths, cfg, ranks, tokens)
        return PackedLoader(paths, cfg, ranks, tokens, on_rank * ranks.world_size)

    def new_model(self, cfg: Config) -> GPT:
        """A freshly initialised model."""
        torch.manual_seed(cfg.seed)
        return self.backends.move_and_compile(GPT(cfg, self.backends), self.ranks.device)

    @property
    def looping(self) -> bool:
        """Whether the model is scored with its loops: as it was trained."""
        return self.result.get("looping", self.cfg.num_loops > 0 and self.cfg.enable_looping_at < 1)

    def once(self, stage: str, work: Callable[[], object]) -> None:
        """Do a stage, unless it was done before the run was resumed."""
        if stage not in self.finished:
            work()
            self.finished.append(stage)
            self.watch.see("finished", stage=stage, run=self)

    def stage(self, name: str, worker: Worker) -> None:
        """Let a worker do a stage on the clock, from where a saved state left it."""
        if (state := self.watch.saved(name)) is not None:
            worker.load_state(state)
            self.watch.see("loaded", stage=name)  # only from here on is it timed
        with self.clock.stage(name):
            for _ in worker.units():
                self.watch.unit(name, worker)

    def train(self) -> None:
        """Train from scratch, save the average of the weights."""
        parameters = sum(p.numel() for p in self.model.parameters())
        slots = lora_slots(self.cfg, looping=True)
        self.log.event("model", parameters=parameters, layers=self.cfg.num_layers, virtual_layers=slots)
        self.watch.see("memory", run=self)
        trainer = Trainer(self.cfg, self.model, self.loader, self.ranks, self)
        trainer.warm_up(self.cfg.warmup_steps, self.watch)
        self.ranks.wait_for_all("warm-up")
        self.watch.see("warmed", run=self)
        self.stage("train", trainer)
        self.result |= {"steps": trainer.steps, "looping": trainer.looping}
        if self.ranks.is_main:
            torch.save(copy_tensors(dict(self.model.state_dict()), Tensor.cpu), buffer := io.BytesIO())
            write_whole(self.output("model_path"), buffer.getvalue())
        seconds = self.clock.seconds["train"]
        self.log.event("saved", file=str(self.output("model_path")), train_seconds=seconds)

    def validate(self, step: int, looping: bool) -> None:
        """Evaluate between two training steps, unless that was done before the run was resumed."""
        name = f"step_{step}" if step else "untrained"
        if name not in self.stages:
            self.score(name, looping=looping)

    def output(self, field: str) -> Path:
        """The run's own file of a setting that names one."""
        return self.log.folder / Path(getattr(self.cfg, field)).name

    def score(self, stage: str, kind=StandardEvaluation, looping: bool | None = None, documents=None) -> None:
        """Let an evaluation do a stage, and record the score of all documents, or of those given."""
        looping, documents = self.looping if looping is None else looping, documents or self.val.documents
        work = kind(self.model, self.val, self.model.cfg, looping=looping, ranks=self.ranks, watch=self.watch)
        self.stage(stage, work)
        self.record(stage, work.meter, documents)

    def record(self, stage: str, meter: BpbMeter, documents: Sequence[tuple[int, int]]) -> None:
        """Keep and log a score; a target scored twice or not at all is a fault of the evaluator."""
        targets = sum(length - 1 for _, length in documents)
        byte_sum = sum(int(self.val.target_bytes[start : start + n - 1].sum()) for start, n in documents)
        if (meter.tokens, meter.bytes) != (targets, byte_sum):
            counts = f"{meter.tokens:.0f} targets, {meter.bytes:.0f} bytes"
            raise RunError(f"{stage}: {counts} scored of {targets}, {byte_sum}")
        facts = {"val_loss": meter.val_loss, "val_bpb": meter.val_bpb, "documents": len(documents)}
        facts |= {"targets": targets, "bytes": int(meter.bytes), "seconds": self.clock.seconds[stage]}
        self.stages[stage] = facts
        self.log.event(stage, **self.stages[stage])
        if not math.isfinite(meter.val_loss):
            raise RunError(f"{stage}: val_loss {meter.val_loss}: not finite")

    def quantise(self) -> None:
        """Calibrate, quantise, write the artifact."""
        cfg, ranks, seconds = self.cfg, self.ranks, self.clock.seconds
        with self.clock.stage("calibrate"):
            loader = ShuffledLoader(shard_paths(cfg.data_folder, "train"), cfg)
            hessians = calibrate(self.model, cfg, loader, looping=self.looping, ranks=ranks)
        flat = flatten_banks(self.model.state_dict(), cfg.num_layers)
        with self.clock.stage("quantise"):
            if cfg.fit_bytes:
                from systems.fit_bytes import fit_run

                records = fit_run(self, flat, hessians, loader)
            else:
                records = quantize_state(flat, hessians, cfg, ranks)
        for name, record in records.items():
            if record.report:
                self.log.event("matrix", name=name, **record.report)
        with self.clock.stage("compress"):
            artifact = pack_artifact(records, cfg, self.looping) if ranks.is_main else b""
            ranks.wait_for_all("compress")
            self.artifact = ranks.gather(artifact)[0]
        self.watch.see("artifact", run=self, flat=flat, hessians=hessians)
        if ranks.is_main:
            write_whole(self.output("quantized_model_path"), self.artifact)
        kinds = [record.category for record in records.values()]
        counts = {kind.replace(" ", "_"): kinds.count(kind) for kind in sorted(set(kinds))}
        counts |= {f"{name}_seconds": seconds[name] for name in ("calibrate", "quantise", "compress")}
        path = self.output("quantized_model_path")
        self.log.event("artifact", file=str(path), model_bytes=len(self.artifact), **counts)

    def model_of_artifact(self, path: Path) -> GPT:
        """A clean model that knows nothing but the bytes of the artifact."""
        try:
            read = unpack_artifact
            if not COUNTED and "harness/readers.py" in self.sources:
                from harness.readers import read_artifact as read
            settings, records = read(self.artifact, self.cfg)
            loops = settings.get("num_loops", self.looping)  # A published one does not say it.
            self.result["looping"] = bool(loops and not settings.pop("enable_looping_at", 0))
            model = self.new_model(self.cfg if COUNTED else dataclasses.replace(self.cfg, **settings))
            model.load_state_dict(dequantize_state(records, model.cfg.num_layers))
        except Exception as error:  # a foreign header may break anything
            reason = " ".join(str(error).split())[:200]
            raise ArtifactError(f"QUANTIZED_MODEL_PATH={path}: {reason}") from None
        if model.cfg.vocab_size != self.cfg.vocab_size:
            raise ConfigError(f"VOCAB_SIZE={self.cfg.vocab_size}: {path} was made for {model.cfg.vocab_size}")
        return model

    @functools.cached_property
    def packed_code(self) -> tuple[bytes, bool]:
        """The script as it is counted, and whether it was minified. The counted script is just that."""
        source = self.sources["train_gpt.py"]
        if COUNTED:
            return source, True
        if "harness/packing.py" in self.sources:
            from harness.packing import packed_script

            return packed_script(self.cfg, self.backends, self.sources, self.ranks.on_gpu)
        text = base64.b85encode(lzma.compress(source, preset=9))
        return b"import base64,lzma\nexec(lzma.decompress(base64.b85decode(%r)))\n" % text, False

    def count_bytes(self) -> None:
        """The sizes that the contest counts; writes the packed script."""
        if not self.ranks.is_main:
            return
        packed, minified = self.packed_code
        write_whole(self.log.folder / "train_gpt.packed.py", packed)
        if not minified:
            self.log.event("notice", text="code not minified: python-minifier or harness/ is missing")
        sizes = {"code_bytes": len(packed), "model_bytes": len(self.artifact)}
        sizes = {"artifact_bytes": sum(sizes.values())} | sizes
        self.result |= sizes
        self.log.event("size", **sizes, limit=SIZE_LIMIT)

    def adapt_documents(self) -> None:
        """Phased score-first LoRA test-time training: the contest score."""
        cfg = self.model.cfg
        documents = select_documents(self.val.documents, cfg.val_doc_fraction, cfg.seed)
        self.watch.see("adapting", run=self)  # a watch that changes `forward` does so before it is compiled
        if self.model.backends.compiler and has_part("compiled"):
            from systems.compiled import compile_adaptation

            compile_adaptation(self, documents)
        else:
            self.model.backends = dataclasses.replace(self.model.backends, compiler="")
        self.score("ttt", ScoreFirstTTT, documents=documents)
        self.watch.see("adapted", run=self)

    def finish(self) -> int:
        """Write result.json and the final line; exit code 3 when a limit of the contest is exceeded."""
        final = next(name for name in ("ttt", "sliding", "quantised", "prequant") if name in self.stages)
        seconds = self.clock.seconds
        summary = {key: self.stages[final][key] for key in ("val_bpb", "val_loss")}
        summary |= {key: self.result.get(key, 0) for key in ("artifact_bytes", "code_bytes", "model_bytes")}
        summary |= {f"{stage}_seconds": seconds.get(stage, 0.0) for stage in ("train", "calibrate")}
        summary["eval_seconds"] = seconds[final]
        broken = self._broken_limits(summary)
        summary["legal"] = not broken and summary["artifact_bytes"] > 0
        extra = {"broken_limits": broken, "stages": self.stages, "seconds": seconds}
        if not COUNTED:
            extra["settings"] = self.model.cfg.as_env()
        self.watch.see("result", run=self)
        result = {"run": self.log.run_id, "final_stage": final, **summary, **self.result, **extra}
        if self.ranks.is_main:  # the last file: where it is, all are
            write_whole(self.log.folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())
        for reason in broken:
            self.log.event("limit", text=reason)
        self.log.event("final", **summary)
        return 3 if broken else 0

    def _broken_limits(self, summary: Mapping[str, float]) -> list[str]:
        size, evaluation = summary["artifact_bytes"], summary["eval_seconds"]
        fraction = self.cfg.val_doc_fraction
        training = summary["train_seconds"] + summary["calibrate_seconds"]
        limits = {
            f"training and calibration took {training:.1f} s, limit {TRAIN_LIMIT:g}": training > TRAIN_LIMIT,
            f"evaluation took {evaluation:.1f} s, limit {EVAL_LIMIT:g}": evaluation > EVAL_LIMIT,
            f"artifact has {size} bytes, limit {SIZE_LIMIT}": size > SIZE_LIMIT,
            f"VAL_DOC_FRACTION={fraction:g}: only a sample was scored": fraction < 1,
        }
        return [reason for reason, exceeded in limits.items() if exceeded]

    def execute(self) -> int:
        """All stages asked for, in order. Returns the exit code."""
        cfg = self.cfg
        if self.trains:
            self.once("train", self.train)
        if not cfg.ttt_eval_only:
            self.once("prequant", lambda: self.score("prequant"))
            if cfg.prequant_only:
                return self.finish()
            self.once("quantise", self.quantise)
            self.model = self.model_of_artifact(self.output("quantized_model_path"))
        self.once("count_bytes", self.count_bytes)
        self.once("quantised", lambda: self.score("quantised"))
        if cfg.sliding_window_enabled or cfg.ttt_sgd:
            from systems.stream import score_stream
        if cfg.sliding_window_enabled:
            self.once("sliding", lambda: score_stream(self, "sliding"))
        if cfg.ttt_enabled:
            self.once("ttt", lambda: score_stream(self, "ttt") if cfg.ttt_sgd else self.adapt_documents())
        return self.finish()


def check_systems(cfg: Config) -> None:
    """Raise ConfigError where a setting asks for a part of systems/ that does not stand beside the script."""
    parts = "plain_windows:stream sliding_window_enabled:stream ttt_sgd:stream fit_bytes:fit_bytes"
    parts += " gptq_drift_batches:drift ttt_cache_window:cache ttt_chunk_by_length:chunks ngram_tilt:tilt"
    parts += " muon_maxwell:maxwell mudd_width:mudd caseops_enabled:plain_text quantizer:trellis"
    pairs = (pair.split(":") for pair in parts.split())
    needed = {name: part for name, part in pairs if getattr(cfg, name) != getattr(Config, name)}
    chosen = {"ans": "ans", "fa3": "fa3", "fa4": "fa4", "torch_varlen": "varlen"}
    needed |= {name: chosen.get(getattr(cfg, name)) for name in ("compressor", "attention_backend")}
    needed["triton_kernels"] = cfg.triton_kernels not in ("", "0", Config.triton_kernels) and "kernels"
    for name, part in needed.items():
        if part and not has_part(part):
            shown = value if isinstance(value := getattr(cfg, name), str) else int(value)
            raise ConfigError(f"{name.upper()}={shown}: needs systems/{part}.py beside train_gpt.py")


def find_file(cfg: Config, field: str, needed: bool = True) -> Path | None:
    """The input file of a setting, as given or in ARTIFACT_DIR. Raises ConfigError."""
    given = Path(getattr(cfg, field))
    found = next(filter(os.path.isfile, (given, Path(cfg.artifact_dir) / given)), None)
    if needed and found is None:
        raise ConfigError(f"{field.upper()}={given}: no such file, nor in ARTIFACT_DIR={cfg.artifact_dir!r}")
    return found


def execute(run: Run) -> int:
    """All stages of a run; what ends it early is said with rank and stage. Exit code as `main`."""
    ranks = run.ranks
    try:
        code = run.execute()
        run.watch.see("ended", code=code)
        ranks.wait_for_all("end")  # torchrun ends all ranks when one has left with another code than 0
        if ranks.world_size > 1:
            dist.destroy_process_group()
        return code
    except (OSError, RuntimeError) as error:
        if not isinstance(error, (RunError, OSError)):
            traceback.print_exc()
        ranks.say(f"stage {run.clock.current}: {error}")
        run.watch.see("failed", error=error)
        return 1


def read_sources() -> dict[str, bytes]:
    """The script and, where they stand beside it, all files of harness/ and systems/, by name."""
    script = Path(__file__).resolve()
    paths = sorted((*script.parent.glob("harness/*.py"), *script.parent.glob("systems/*.py")))
    house = {f"{path.parent.name}/{path.name}": path.read_bytes() for path in paths}
    return {"train_gpt.py": script.read_bytes(), **house}


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Command line. Exit code 0, 1 (failed), 2 (a user's mistake), 3 (a limit exceeded), 128 + signal."""
    try:
        if not COUNTED:
            sources = read_sources()
            if any(name.startswith("harness/") for name in sources):
                from harness import main as watched

                return watched(arguments, environ, sources)
            check_alone(arguments, environ)
            check_systems(Config.from_env(environ))
        else:
            sources = {"train_gpt.py": Path(__file__).read_bytes()}
        cfg = Config.from_env(environ)
        ranks = Ranks.from_env(cfg, environ)
        return execute(Run(cfg, ranks, Backends() if COUNTED else plain_backends(cfg, ranks), sources))
    except UserError as error:
        if environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(2)  # torchrun ends this rank meanwhile, if rank 0 has met the same mistake
        print(f"train_gpt.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def check_alone(arguments: Sequence[str], environ: Mapping[str, str]) -> None:
    """Refuse what a script without harness/ beside it cannot do. Raises ConfigError."""
    watched = "CHECKPOINT_SECONDS WANDB_PROJECT TENSORBOARD_DIR AUDIT PREFLIGHT_ONLY QUANTIZE_ONLY SCALE"
    asked = [name for name in watched.split() if environ.get(name, "0") not in ("", "0", "false")]
    if arguments or asked:
        text = " ".join([*arguments, *(f"{name}={environ[name]}" for name in asked)])
        raise ConfigError(f"{text}: needs harness/ beside train_gpt.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
