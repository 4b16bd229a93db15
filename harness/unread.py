"""Settings without effect, because what would read them is off."""

import re
from collections.abc import Iterator, Mapping

from harness.lineage import same
from train_gpt import Config

READ_WITH = (  # settings, as a pattern -> what must hold for a run to read them; of several rows the first
    ("EVAL_STRIDE", "SLIDING_WINDOW_ENABLED=1 or TTT_SGD=1 and TTT_ENABLED=1"),
    ("TTT_(LR|EPOCHS|MOMENTUM|CHUNK_TOKENS)", "TTT_SGD=1 and TTT_ENABLED=1"),
    (
        "GLOBAL_TTT_(BATCH_SEQS|GRAD_CLIP)",
        "TTT_SGD=1 and TTT_ENABLED=1 or PHASED_TTT_PREFIX_DOCS>0 and TTT_SGD=0 and TTT_ENABLED=1",
    ),
    (
        "GLOBAL_TTT_WARMUP_START_LR",
        "GLOBAL_TTT_WARMUP_CHUNKS>0 and PHASED_TTT_PREFIX_DOCS>0 and TTT_SGD=0 and TTT_ENABLED=1",
    ),
    (
        "GLOBAL_TTT_.*|PHASED_TTT_NUM_PHASES",
        "PHASED_TTT_PREFIX_DOCS>0 and TTT_SGD=0 and TTT_ENABLED=1",
    ),
    ("TTT_SGD", "TTT_ENABLED=1"),
    ("TTT_EVAL_SEQ_LEN", "ROPE_YARN=1 or TTT_SGD=0 and TTT_ENABLED=1"),
    ("PHASED_TTT_.*|TTT_(?!ENABLED|SGD|EVAL_ONLY).*", "TTT_SGD=0 and TTT_ENABLED=1"),
    ("LQER_ASYM_GROUP", "FIT_BYTES=0 and LQER_ENABLED=1 and LQER_ASYM_ENABLED=1"),
    ("LQER_FACTOR_BITS", "FIT_BYTES=0 and LQER_ENABLED=1 and LQER_ASYM_ENABLED=0"),
    ("LQER_(?!ENABLED).*", "FIT_BYTES=0 and LQER_ENABLED=1"),
    ("LQER_ENABLED|(MATRIX|EMBED)_BITS|.*_CLIP_SIGMAS", "FIT_BYTES=0"),
    ("EMBED_LR", "TIE_EMBEDDINGS=0"),
    ("TIED_EMBED_.*", "TIE_EMBEDDINGS=1"),
    ("LOOP_START|LOOP_END|ENABLE_LOOPING_AT", "NUM_LOOPS>0"),
    ("PARALLEL_FINAL_LANE", "PARALLEL_START_LAYER>0 and PARALLEL_STYLE=lanes"),
    ("SMEAR_BOS_MASK", "SMEAR_GATE_ENABLED=1"),
    (
        "GATE_WINDOW",
        "SMEAR_GATE_ENABLED=1 or SPARSE_ATTN_GATE_ENABLED=1 or ATTN_OUT_GATE_ENABLED=1",
    ),
    ("SPARSE_ATTN_GATE_(SCALE|INIT_STD)", "SPARSE_ATTN_GATE_ENABLED=1"),
    ("ATTN_OUT_GATE_SRC", "ATTN_OUT_GATE_ENABLED=1"),
    ("GATED_ATTN_INIT_STD", "GATED_ATTN_ENABLED=1"),
    ("GATED_ATTN_QUANT_GATE", "SPARSE_ATTN_GATE_ENABLED=1 or GATED_ATTN_ENABLED=1"),
    ("WD_TAPER_START_FRAC", "WD_TAPER_FINAL_MULT<1"),
    ("MIN_LR", "WARMDOWN_FRAC>0"),
    ("MUON_MOMENTUM_WARMUP_START", "MUON_MOMENTUM_WARMUP_STEPS>0"),
    ("CLIP_GLOBAL", "GRAD_CLIP_NORM>0"),
    ("GPTQ_RESERVE_SECONDS", "MAX_WALLCLOCK_SECONDS>0"),
)


# What a run without quantisation and adaptation does not read. Of published commands, which name them all,
# nothing is said; nobody would search for their best values.
AFTER_TRAINING = (
    r"PHASED_TTT_.*|GLOBAL_TTT_.*|TTT_(?!EVAL_SEQ_LEN).*|NGRAM_TILT|LQER_.*|GPTQ_(?!RESERVE_SECONDS).*|"
    r"(MATRIX|EMBED)_BITS|.*_CLIP_SIGMAS|COMPRESSOR|QUANTIZER|FIT_BYTES|SLIDING_WINDOW_ENABLED|EVAL_STRIDE"
)


def needs_of(name: str) -> str:
    """What must hold for a run to read a setting; empty if it always does."""
    return next((needs for names, needs in READ_WITH if re.fullmatch(names, name)), "")


def unread(given: Mapping[str, str], base: Mapping[str, str]) -> Iterator[str]:
    """Say of given settings that nothing reads them, with what they lack; `base` has what is not given.

    Nothing is said of a 0, which asks for nothing, of a number that is as without it, and where the user
    himself has switched off what would read a setting.
    """
    without: dict[str, list[str]] = {}
    for name in sorted(given.keys() & {*base, "PHASED_TTT_ENABLED"}):  # other names are not ours
        terms = lacking(needs_of(name), {**base, **given})
        switches = type(getattr(Config, name.lower(), True)) is bool
        asks = not same(given[name], "0") and (switches or not same(given[name], base[name]))
        if terms and asks and not any(_switched_off(term, given) for term in terms):
            without.setdefault(" ".join(terms), []).append(f"{name}={given[name]}")
    for text, named in without.items():
        yield f"{' '.join(named)}: no effect without {text}"


def lacking(needs: str, settled: Mapping[str, str]) -> list[str]:
    """What does not hold of `needs`, with "and" and "or" between; nothing if one of its ways is open.

    Of several ways it is those that lack least.
    """
    ways = [[term for term in way.split(" and ") if not _holds(term, settled)] for way in needs.split(" or ")]
    least = min(map(len, ways))
    return " or ".join(" and ".join(way) for way in ways if len(way) == least).split() if least else []


def name_of(term: str) -> str:
    """The setting that a term is about; the word itself for what is none."""
    return re.split("[=<>]", term)[0]


def _holds(term: str, settled: Mapping[str, str]) -> bool:
    """Whether NAME=value, NAME>0 or NAME<1 holds; it does without a term, and where there is no number."""
    if not term:
        return True
    name, relation, value = re.split("([=<>])", term)
    if relation == "=":
        return same(settled[name], value)
    try:
        return float(settled[name]) > float(value) if relation == ">" else float(settled[name]) < float(value)
    except ValueError:
        return True  # told later, as a mistake


def _switched_off(term: str, given: Mapping[str, str]) -> bool:
    """Whether the user has said himself that what a term needs is to be off."""
    return name_of(term) in given and term.endswith(("_ENABLED=1", ">0"))
