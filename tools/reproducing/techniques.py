"""The techniques of a run by its settings, each with the pull requests of the contest that it comes from."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

PULL = "https://github.com/openai/parameter-golf/pull"


class Technique(NamedTuple):
    """`text` has settings in braces. `pulls`: where it comes from, the first one first; none: from here."""

    text: str
    pulls: tuple[int, ...]
    is_on: Callable[[Mapping], bool]


def _always(told: Mapping) -> bool:
    return True


def _parallel(told: Mapping) -> bool:
    return 0 < told["PARALLEL_START_LAYER"] < told["NUM_LAYERS"]


def _lora(told: Mapping) -> bool:
    return told["TTT_ENABLED"] and not told["TTT_SGD"]


TECHNIQUES = (
    Technique(
        "CaseOps, capitals as operators, bytes by sidecar", (1729, 1736), lambda s: s["CASEOPS_ENABLED"]
    ),
    Technique("Packed documents, attention inside a document", (1530,), lambda s: not s["PLAIN_WINDOWS"]),
    Technique("LeakyReLU squared in the MLP, {MLP_MULT:g} wide", (493,), _always),
    Technique("Partial rotary embeddings, {ROPE_DIMS} dimensions", (315,), lambda s: s["ROPE_DIMS"] > 0),
    Technique("Layerwise scale of the norms", (315,), lambda s: s["LN_SCALE"]),
    Technique("Gated skips between encoder and decoder", (289,), lambda s: s["SKIP_GATES_ENABLED"]),
    Technique("XSA in the last {XSA_LAST_N} of {NUM_LAYERS} layers", (478,), lambda s: s["XSA_LAST_N"] > 0),
    Technique(
        "Depth recurrence, layers {LOOP_START} to {LOOP_END} repeated {NUM_LOOPS} x "
        "from {ENABLE_LOOPING_AT:.0%} of training",
        (1344,),
        lambda s: s["NUM_LOOPS"] > 0,
    ),
    Technique(
        "Two lanes from layer {PARALLEL_START_LAYER}",
        (1530,),
        lambda s: _parallel(s) and s["PARALLEL_STYLE"] == "lanes",
    ),
    Technique(
        "Attention and MLP side by side from layer {PARALLEL_START_LAYER}",
        (1412, 1493),
        lambda s: _parallel(s) and s["PARALLEL_STYLE"] == "single",
    ),
    Technique("SmearGate", (1667,), lambda s: s["SMEAR_GATE_ENABLED"]),
    Technique(
        "SmearGate masked at document starts",
        (1851,),
        lambda s: s["SMEAR_GATE_ENABLED"] and s["SMEAR_BOS_MASK"],
    ),
    Technique(
        "Sparse attention gates on {GATE_WINDOW} inputs", (1787,), lambda s: s["SPARSE_ATTN_GATE_ENABLED"]
    ),
    Technique("Gates on the attention's output", (1667,), lambda s: s["ATTN_OUT_GATE_ENABLED"]),
    Technique("Gated attention", (1736,), lambda s: s["GATED_ATTN_ENABLED"]),
    Technique("Muon with normalised rows (MuonEq-R)", (1260,), lambda s: s["MUON_ROW_NORMALIZE"]),
    Technique(
        "Polar Express coefficients, {MUON_BACKEND_STEPS} steps",
        (1344, 1787),
        lambda s: s["MUON_COEFFICIENTS"] == "polar_express",
    ),
    Technique("Floor of the learning rate, {MIN_LR:g}", (1787,), lambda s: s["MIN_LR"] > 0),
    Technique("Moving average of the weights, {EMA_DECAY:g}", (287,), lambda s: s["EMA_DECAY"] > 0),
    Technique(
        "{GPTQ_RESERVE_SECONDS:g} s of the training time kept for the calibration",
        (1868,),
        lambda s: s["GPTQ_RESERVE_SECONDS"] >= 1 and s["MAX_WALLCLOCK_SECONDS"] > 0,
    ),
    Technique("GPTQ with scales by standard deviation (SDClip)", (1394,), lambda s: s["FIT_BYTES"] == 0),
    Technique("FIT_BYTES, steps by what an error costs the loss", (), lambda s: s["FIT_BYTES"] > 0),
    Technique(
        "Layers in order, each against what is stored (Qronos)",
        (),
        lambda s: s.get("GPTQ_DRIFT_BATCHES", 0) > 0,
    ),
    Technique(
        "Embeddings in {EMBED_BITS} bits", (1586,), lambda s: s["FIT_BYTES"] == 0 and s["EMBED_BITS"] == 7
    ),
    Technique("Attention gates in 8 bits by row", (1736,), lambda s: s["GATED_ATTN_QUANT_GATE"]),
    Technique(
        "LQER, rank {LQER_RANK} on {LQER_TOP_K} matrices",
        (1797,),
        lambda s: s["FIT_BYTES"] == 0 and s["LQER_ENABLED"],
    ),
    Technique("Entropy coder of levels by columns (ANS)", (), lambda s: s["COMPRESSOR"] == "ans"),
    Technique("Score-first LoRA test-time training, rank {TTT_LORA_RANK}", (1530,), _lora),
    Technique(
        "Global SGD in {PHASED_TTT_NUM_PHASES} phases on {PHASED_TTT_PREFIX_DOCS} scored documents",
        (1610, 1626),
        lambda s: _lora(s) and s["PHASED_TTT_PREFIX_DOCS"] > 0,
    ),
    Technique("LoRA matrix A kept warm", (1767,), lambda s: _lora(s) and s["TTT_WARM_START_A"]),
    Technique(
        "Smaller chunks for short documents, {TTT_CHUNK_BY_LENGTH}",
        (2014, 2067),
        lambda s: _lora(s) and bool(s["TTT_CHUNK_BY_LENGTH"]),
    ),
    Technique(
        "Token n-gram tilt in closed form, {NGRAM_TILT}",
        (1514, 2018),
        lambda s: _lora(s) and bool(s["NGRAM_TILT"]),
    ),
    Technique(
        "Score-first SGD, {TTT_EPOCHS} epochs a chunk",
        (549, 1413),
        lambda s: s["TTT_ENABLED"] and s["TTT_SGD"],
    ),
)


def techniques(settings: Mapping) -> list[tuple[str, tuple[int, ...]]]:
    """What is on in a run: text and pull requests. A setting that an older script lacked is off."""
    told = defaultdict(int, settings)
    return [(one.text.format(**told), one.pulls) for one in TECHNIQUES if one.is_on(told)]


def link(pull: int) -> str:
    """Markdown for a pull request."""
    return f"[PR #{pull}]({PULL}/{pull})"


def technique_table(settings: Mapping) -> list[str]:
    """Markdown: a row for each technique that is on."""
    rows = [
        f"| {text} | {', '.join(map(link, pulls)) or 'this script'} |" for text, pulls in techniques(settings)
    ]
    return ["| technique | from |", "| --- | --- |", *rows]


def credits(settings: Mapping) -> Sequence[str]:
    """Markdown: a line for each pull request that a run builds on, with what it gave."""
    given: dict[int, list[str]] = defaultdict(list)
    for text, pulls in techniques(settings):
        for pull in pulls:
            given[pull].append(text)
    return [f"* {link(pull)}: {'; '.join(texts)}." for pull, texts in sorted(given.items())]
