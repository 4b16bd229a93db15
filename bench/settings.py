"""Every setting at, around and far beyond its bounds: refused before the start by name, or a run that works.

    python bench/settings.py [--names SEED,TTT_LR] [--ends] [--json]

Each value is given to a whole run of the script on a tiny model (train, quantise, adapt), in a process of its
own with little memory and time. Ends with exit code 1 where a value gives anything but: exit code 2 and one
line that names the setting before any model is made; or a finished run (exit code 0, or 3 for a limit of the
contest); or, for settings that only make a run longer, a run that is still under way when its time is up.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import prepare_caseops_data as prepare
import train_gpt as tg
from harness import guards, packing
from harness.settings import PRESETS, read_settings

VOCAB = 320
TINY = {
    "CONSOLE": "log",
    "DEVICE": "cpu",
    "CPU_THREADS": "1",
    "DATA_PATH": "data",
    "VOCAB_SIZE": str(VOCAB),
    "TRAIN_SEQ_LEN": "32",
    "TRAIN_BATCH_TOKENS": "128",
    "GRAD_ACCUM_STEPS": "2",
    "NUM_LAYERS": "3",
    "MODEL_DIM": "16",
    "NUM_HEADS": "2",
    "NUM_KV_HEADS": "1",
    "MLP_MULT": "2",
    "ROPE_DIMS": "4",
    "NUM_LOOPS": "1",
    "LOOP_START": "1",
    "LOOP_END": "1",
    "PARALLEL_START_LAYER": "2",
    "GATE_WINDOW": "4",
    "ITERATIONS": "2",
    "WARMUP_STEPS": "0",
    "MAX_WALLCLOCK_SECONDS": "0",
    "EMA_DECAY": "0.5",
    "FLOAT16_MAX_ELEMENTS": "128",
    "GPTQ_CALIBRATION_BATCHES": "1",
    "LQER_ASYM_GROUP": "16",
    "VAL_BATCH_TOKENS": "1024",
    "EVAL_SEQ_LEN": "32",
    "TTT_BATCH_SIZE": "2",
    "TTT_CHUNK_SIZE": "16",
    "TTT_EVAL_SEQ_LEN": "32",
    "TTT_LORA_RANK": "2",
    "TTT_LORA_ALPHA": "4",
    "PHASED_TTT_PREFIX_DOCS": "2",
    "PHASED_TTT_NUM_PHASES": "1",
    "GLOBAL_TTT_CHUNK_TOKENS": "64",
    "GLOBAL_TTT_BATCH_SEQS": "2",
}
COMPANIONS = {  # what gives a setting something to do
    "ATTN_OUT_GATE_ENABLED": {"SPARSE_ATTN_GATE_ENABLED": "0"},
    "ATTN_OUT_GATE_SRC": {"SPARSE_ATTN_GATE_ENABLED": "0", "ATTN_OUT_GATE_ENABLED": "1"},
    "EMBED_LR": {"TIE_EMBEDDINGS": "0"},
    "EVAL_STRIDE": {"SLIDING_WINDOW_ENABLED": "1"},
    "GATED_ATTN_ENABLED": {"SPARSE_ATTN_GATE_ENABLED": "0"},
    "GATED_ATTN_INIT_STD": {"SPARSE_ATTN_GATE_ENABLED": "0", "GATED_ATTN_ENABLED": "1"},
    "GPTQ_RESERVE_SECONDS": {"MAX_WALLCLOCK_SECONDS": "1000000", "ITERATIONS": "1"},
    "GLOBAL_TTT_WARMUP_START_LR": {"GLOBAL_TTT_WARMUP_CHUNKS": "2"},
    "ITERATIONS": {"MAX_WALLCLOCK_SECONDS": "0.7"},
    "LQER_FACTOR_BITS": {"LQER_ASYM_ENABLED": "0"},
    "MAX_WALLCLOCK_SECONDS": {"GPTQ_RESERVE_SECONDS": "0"},
    "SLIDING_WINDOW_ENABLED": {"EVAL_STRIDE": "16"},
    **dict.fromkeys(
        ["TTT_SGD", "TTT_LR", "TTT_EPOCHS", "TTT_MOMENTUM", "TTT_CHUNK_TOKENS"],
        {"TTT_SGD": "1", "TTT_CHUNK_TOKENS": "128", "EVAL_STRIDE": "16"},
    ),
}
ALSO = {  # whose refusal may name another setting: what it stands for or needs
    "PRESET": "",
    "QUANTIZE_ONLY": "MODEL_PATH",
    "TTT_EVAL_ONLY": "QUANTIZED_MODEL_PATH",
}
LONG = {"WARMUP_STEPS", "TTT_EPOCHS", "TTT_GRAD_STEPS", "GLOBAL_TTT_EPOCHS", "GPTQ_CALIBRATION_BATCHES"}
LONG |= {"NUM_LOOPS", "NUM_LAYERS", "MODEL_DIM", "MLP_MULT", "COMPILE_BACKEND"}
NOT_NUMBERS = ["", " ", "x", "nan", "inf", "-inf", "1e999", "0x10", "1,5", "None", "9" * 5000]
SECONDS, GROWTH = 60, 1 << 30  # most that a run may take; address space on top of this process's


def values(field: dataclasses.Field) -> list[str]:
    """Texts worth trying for a setting: its default, bounds and their neighbours, wrong types, extremes."""
    kind, choices = tg.base_type(field.type), get_args(field.type)
    if kind is bool:
        return ["0", "1", "true", "FALSE", "2", "-1", *NOT_NUMBERS]
    if kind is str:
        texts = [*map(str, choices), "", " ", "x", "nan", "x" * 300, "a/b", "..", "é", "-", "a\nb"]
        texts += ["/"] * (field.name != "tensorboard_dir")  # which would be written to
        return [*PRESETS, *texts] if field.name == "preset" else texts
    low, high = choices[1].low, choices[1].high
    tried = [field.default, 0, 1, 2, 7, -1, 1000, 10**6, 2**31, 2**63, 10**30]
    if kind is int:
        ends = [end + step for end in (low, high) if math.isfinite(end) for step in (-2, -1, 0, 1, 2)]
        return [*dict.fromkeys(str(int(v)) for v in [*tried, *ends]), "1.5", *NOT_NUMBERS]
    tried += [0.5, 1.5, 1e-3, 1e-30, 5e-324, 1e30, 1e39, 1.7e308, -1e-9, -1e30]
    for end in (low, high):
        if math.isfinite(end):
            tried += [end, math.nextafter(end, -math.inf), math.nextafter(end, math.inf)]
            tried += [end - 1e-6 * max(1, abs(end)), end + 1e-6 * max(1, abs(end))]
    return [*dict.fromkeys(repr(float(v)) for v in tried), *NOT_NUMBERS]


def make_data(folder: Path) -> None:
    """A CaseOps data set of a few short documents."""
    words = ["the", "model", "reads", "a", "token", "and", "NASA", "scores", "it", "before", "Paris"]
    texts = [" ".join(words[i % 7 :: 1 + i % 3] * (1 + i % 4)).capitalize() + "." for i in range(60)]
    tokenizer = prepare.make_tokenizer("tokenizer.model", prepare.train_tokenizer(texts, VOCAB), True)
    named = [prepare.make_document(f"{text} {i}", f"document {i}") for i, text in enumerate(texts)]
    prepare.prepare(named, tokenizer, folder, 4)


def names_it(name: str, message: str) -> bool:
    """Whether a message names a setting."""
    return name in message or ALSO.get(name, name) in message


def accepted(name: str, text: str) -> bool:
    """Whether a value passes the settings' own checks; if not, with a message that names it."""
    try:
        read_settings(TINY | COMPANIONS.get(name, {}) | {name: text})
    except tg.ConfigError as error:
        assert names_it(name, str(error)), f"{name}={text!r}: {error}"
        return False
    return True


def warm_up(folder: Path) -> None:
    """One run in this process, so that the forked ones find every module imported."""
    where = os.getcwd()
    try:
        os.chdir(folder)
        with contextlib.redirect_stdout(io.StringIO()):
            assert tg.main([], TINY | {"ARTIFACT_DIR": "warm"}) == 0
    finally:
        os.chdir(where)


def _child(environ: dict[str, str], folder: Path, output: Path) -> None:
    """The run, in a forked process; never returns."""
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + GROWTH
    if "CPU_THREADS" not in environ or environ["CPU_THREADS"] == "1":  # stacks take address space
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    packing.packed_script = lambda *_: (b"packed", True)  # seconds, and the same each time
    guards.command_output = lambda *_: ""
    code = 99
    with contextlib.suppress(BaseException):
        try:
            code = tg.main([], environ)
        except BaseException as error:
            print(f"uncaught {type(error).__name__}: {error}", flush=True)
    os._exit(code)


def attempt(name: str, text: str, folder: Path) -> tuple[str, str]:
    """Run with one setting. Returns how it ended ("refused", "works", "long" or "WRONG") and its output."""
    environ = TINY | COMPANIONS.get(name, {}) | {name: text}
    if not accepted(name, text):  # raises if its message does not name it
        return "refused", ""
    environ = {"ARTIFACT_DIR": tempfile.mkdtemp(dir=folder)} | environ
    output = folder / "output.txt"
    child = os.fork()
    if child == 0:
        _child(environ, folder, output)
    deadline, status = time.monotonic() + SECONDS, None
    while status is None:
        done, found = os.waitpid(child, os.WNOHANG)
        status = found if done else None
        if status is None and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.005)
    said = output.read_text(errors="replace")
    lines = said.splitlines()
    errors = [line for line in lines if line.startswith("train_gpt.py: error: ")]
    code = -1 if status is None else os.waitstatus_to_exitcode(status)
    begun = any(line.startswith("model ") for line in lines)
    if code == 2 and len(errors) == 1 and names_it(name, errors[0]) and not begun:
        return "refused", said
    if code in (0, 3) and lines[-1].startswith(("final ", "passed ")):
        return "works", said
    if status is None and name in LONG and not errors:
        return "long", said
    return "WRONG", f"exit code {code}\n{said}"


def all_values(names: Sequence[str] = (), ends: bool = False) -> list[tuple[str, str]]:
    """Every value of some settings, or of all; with `ends` of a number only the least and largest allowed."""
    fields = {field.name.upper(): field for field in dataclasses.fields(tg.Config)}
    chosen = []
    for name in names or fields:
        texts = values(fields[name])
        if ends and tg.base_type(fields[name].type) in (int, float):
            texts = sorted((text for text in texts if accepted(name, text)), key=float)
            texts = list(dict.fromkeys([*texts[:2], *texts[-2:]]))
        chosen += [(name, text) for text in texts]
    return chosen


def try_all(chosen: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str, str, str]]:
    """(setting, text, end, output) of each setting and text."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "folder"  # a setting may mean the one above
        make_data(folder / "data")
        warm_up(folder)
        for name, text in chosen:
            yield name, text, *attempt(name, text, folder)


def main() -> int:
    """Try all and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--names", help="settings to try, by commas, or NAME: for all from there on")
    parser.add_argument("--ends", action="store_true", help="of numbers only what lies at the bounds")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    names = arguments.names.split(",") if arguments.names else ()
    if arguments.names and arguments.names.endswith(":"):
        every = [field.name.upper() for field in dataclasses.fields(tg.Config)]
        names = every[every.index(arguments.names[:-1]) :]
    chosen, ends, wrong = all_values(names, arguments.ends), Counter(), []
    for name, text, end, said in try_all(chosen):
        ends[end] += 1
        if sum(ends.values()) % 20 == 0 and not arguments.json:
            print(f"{sum(ends.values())}/{len(chosen)} {name}", file=sys.stderr, flush=True)
        if end == "WRONG":
            wrong.append([name, text[:40], said[-600:]])
            print(f"{name}={text[:40]!r}: {said[-600:]}\n", file=sys.stderr, flush=True)
    report = {"values": sum(ends.values()), **ends, "wrong": len(wrong)}
    print(json.dumps(report) if arguments.json else " ".join(f"{k}:{v}" for k, v in report.items()))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
