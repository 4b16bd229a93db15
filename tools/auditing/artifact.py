"""Checks S1-S4: the artifact."""

import ast
import dataclasses
import functools
import hashlib
import math
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from auditing import box
from auditing.recompute import runs_on_gpu
from auditing.run import (
    RECOMPUTED,
    REPLAYED,
    Audit,
    NotChecked,
    check,
    digest,
    read_json,
    require,
    short,
    write_values,
)
from auditing.verdict import OTHER_FSTRINGS
from auditing.wrappers import Layer, Unreadable, layers, parse, without_fstrings, words_of_fstrings
from runs import SIZE_LIMIT
from scripts import sha256_of
from systems.layout import as_variables

SECONDS_ALONE = 7200  # an evaluation alone that takes longer hangs


def packed_code(audit: Audit, sources: Mapping[str, bytes]) -> bytes:
    """What the run's own packing makes of a house, for the run's settings and backends."""
    script, told = audit.script, audit.result["environment"]
    settings = {name.lower(): value for name, value in audit.result["settings"].items()}
    artifact = audit.artifact.read_bytes()
    if artifact.startswith(script.ARTIFACT_MAGIC):  # of a run that evaluated one: not its COMPRESSOR's
        settings["compressor"] = script.CODECS[script.PREFIX.unpack_from(artifact)[2]]
        header, _ = script.read_header(artifact, script.Config(compressor=settings["compressor"]))
        trellis = any(kind == "trellis" for _, kind, *_ in header["tensors"])
        settings["quantizer"] = "trellis" if trellis else "scalar"
    cfg = script.Config(**settings)
    names = [field.name for field in dataclasses.fields(script.Backends)]
    backends = script.Backends(**{name: told[name] for name in names})
    ranks = SimpleNamespace(on_gpu="NVIDIA" in told["device"])
    run = SimpleNamespace(sources=sources, cfg=cfg, backends=backends, ranks=ranks)
    return script.Run.packed_code.func(run)[0]


def _packings(audit: Audit) -> Iterator[bytes]:
    """The logged script as it is counted, minified and not."""
    yield packed_code(audit, audit.sources)
    hidden = sys.modules.get("python_minifier")
    sys.modules["python_minifier"] = None  # what a machine without it makes
    try:
        yield packed_code(audit, audit.sources)
    finally:
        sys.modules.pop("python_minifier")
        if hidden:
            sys.modules["python_minifier"] = hidden


def counted_code(audit: Audit) -> Path:
    """The script that is counted. Raises NotChecked where the run made no artifact, Failed where it lacks."""
    packed = audit.artifact and audit.folder / "train_gpt.packed.py"
    require(packed.is_file(), "train_gpt.packed.py: the run wrote none")
    return packed


@check("S1", "code + model < 16,000,000 bytes", RECOMPUTED)
def s1_size(audit: Audit) -> str:
    """Sizes of the files, against the result."""
    packed = counted_code(audit)
    code, model = packed.stat().st_size, audit.artifact.stat().st_size
    require(code + model < SIZE_LIMIT, f"code {code:,} + model {model:,} = {code + model:,} bytes")
    told = audit.result["code_bytes"], audit.result["model_bytes"], audit.result["artifact_bytes"]
    same = told == (code, model, code + model)
    require(same, f"result.json says {told}, the files have {code} and {model}")
    return f"code {code:,} + model {model:,} = {code + model:,}"


@check("S5", "the counted code is the script that ran, packed", REPLAYED)
def s5_code_is_the_script(audit: Audit) -> str:
    """The logged script packed anew, by its own packing.

    Another Python may write the same statements in another way, which is no other script.
    """
    data, packings = counted_code(audit).read_bytes(), []
    for packing in _packings(audit):
        if packing == data:
            return f"{len(data):,} bytes, {short(sha256_of(data))}, as the packing of the logged script"
        packings.append(packing)
    here, there = platform.python_version(), str(audit.result["environment"].get("python"))
    same_minor = here.split(".")[:2] == there.split(".")[:2]
    statements, words = _program(data)
    alike = [] if same_minor else [w for same, w in map(_program, packings) if same == statements]
    require(bool(alike), "train_gpt.packed.py is not the packing of the script in the log")
    how = "in other bytes" if words in alike else f"with {OTHER_FSTRINGS}"
    raise NotChecked(f"the same statements {how}: packed under Python {there}, here is {here}")


def need_its_device(audit: Audit) -> None:
    """Raise NotChecked where the counted script is one for a GPU, and none is here to run it."""
    if runs_on_gpu(audit) and audit.ranks.device.type != "cuda":
        raise NotChecked("the counted script is one for a GPU, and there is none here")


def _program(packed: bytes) -> tuple[list[str], str]:
    """A packed script, whatever its spelling: the statements of its wrapper, those of the program within
    without f-strings, and the words of these. What one Python writes into them another may not read.
    """
    try:
        *wrappers, program = layers(packed)
        statements = [*map(_without_payload, wrappers), ast.dump(parse(without_fstrings(program.text)))]
    except Unreadable:
        return [repr(packed)], ""
    return statements, words_of_fstrings(program.text)


def _without_payload(wrapper: Layer) -> str:
    """The statements of a wrapper, but for the longest text in it, which is what it holds."""
    constants = (node for node in ast.walk(wrapper.tree) if isinstance(node, ast.Constant))
    texts = [node for node in constants if isinstance(node.value, str | bytes)]
    for longest in sorted(texts, key=lambda node: len(node.value))[-1:]:
        longest.value = ""
    return ast.dump(wrapper.tree)


class Rerun(NamedTuple):
    """The artifact evaluated by itself: its result, what it did in the box, and the folder that it had."""

    result: dict
    ran: box.Ran
    folder: Path


@functools.cache
def alone(audit: Audit, part: bool = False) -> Rerun:
    """Counted script, artifact, validation files and tokenizer alone in the box.

    `part`: only the start of the validation stream is there, and the windows that slide over it are few.
    """
    need_its_device(audit)
    here = (audit.work / ("part" if part else "alone")).resolve()
    here.mkdir(exist_ok=True)
    packed = counted_code(audit)
    tokenizer = audit.script.tokenizer_file(audit.cfg)
    if part:
        _write_start_of_stream(audit, here)
    for path in [packed, audit.artifact, tokenizer, *([] if part else _validation_files(audit))]:
        (here / path.name).write_bytes(path.read_bytes())
    settings = _settings_alone(audit, part) | {
        "TTT_EVAL_ONLY": True,
        "QUANTIZE_ONLY": False,
        "PREQUANT_ONLY": False,
        "QUANTIZED_MODEL_PATH": audit.artifact.name,
        "DATA_PATH": str(here),
        "TOKENIZER_PATH": tokenizer.name,
        "ARTIFACT_DIR": "out",
        "RUN_ID": "alone",
    }
    environment = as_variables(settings)
    kept = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    environment |= {name: os.environ[name] for name in kept if name in os.environ}
    command = [sys.executable, packed.name]
    ran = box.run(command, here, environment=environment, timeout=SECONDS_ALONE)
    result = here / "out" / "result.json"
    return Rerun(read_json(result) if result.is_file() else {}, ran, here)


def _validation_files(audit: Audit) -> list[Path]:
    return [*audit.shards("val"), *audit.shards("val_bytes")]


def _whole(audit: Audit) -> bool:
    """Whether all is scored again: a script that is not the repository's has nothing else to compare with."""
    return audit.options.full or not audit.known


def _settings_alone(audit: Audit, part: bool) -> dict[str, object]:
    """What is to be done: what would take long is left out, or done on a few documents or windows.

    All else that the counted script does is settled in itself.
    """
    cfg, final = audit.cfg, _whole(audit) or part
    few = {name.upper(): value for name, value in _few_windows(audit).items()} if part else {}
    return few | {
        "SEED": cfg.seed,
        "TTT_ENABLED": cfg.ttt_enabled and (audit.adapted or final),
        "SLIDING_WINDOW_ENABLED": cfg.sliding_window_enabled and final,
        "VAL_DOC_FRACTION": _sample_fraction(audit) if audit.adapted else 1.0,
    }


def _few_windows(audit: Audit) -> dict[str, int]:
    """Settings with which five windows of the stream show all that slides, learns and is scored."""
    window = audit.cfg.eval_seq_len
    return {"eval_stride": max(audit.cfg.eval_stride, window // 2), "ttt_chunk_tokens": 2 * window}


def _write_start_of_stream(audit: Audit, folder: Path) -> None:
    count = 5 * audit.cfg.eval_seq_len + 1
    write_values(folder / "fineweb_val_000000.bin", audit.tokens[:count])
    if audit.cfg.caseops_enabled:
        write_values(folder / "fineweb_val_bytes_000000.bin", audit.sidecar[:count])


def _sample_fraction(audit: Audit) -> float:
    """The share of the documents that is adapted again: three of them, or all."""
    return audit.cfg.val_doc_fraction if _whole(audit) else min(1.0, 3 / len(audit.documents))


@check("S2", "script + artifact + validation files suffice", RECOMPUTED)
def s2_alone(audit: Audit) -> str:
    """The score of the artifact in a folder of its own, against the run's and against the logged script's."""
    rerun = _ran(alone(audit))
    near = functools.partial(math.isclose, rel_tol=max(audit.tolerance, 1e-9))
    before, again = (r["stages"]["quantised"]["val_bpb"] for r in (audit.result, rerun.result))
    require(near(before, again), f"quantised val_bpb {again:.8f} alone, {before:.8f} in the run")
    figure = f"quantised val_bpb {again:.6f} as in the run"
    final = audit.result["final_stage"]
    if final in ("quantised", "prequant"):
        return f"{figure}; training data and run folder refused"
    expected, again, what = _scores(audit, rerun)
    require(near(again, expected), f"{final} val_bpb {again:.8f} alone, {expected:.8f} {what}")
    return f"{figure}, {final} {again:.6f} {what}; training data and run folder refused"


def finished(again: Rerun) -> bool:
    """The evaluation came to its end."""
    return again.ran.code in (0, 3) and "quantised" in again.result.get("stages", {})


def _ran(again: Rerun) -> Rerun:
    error = (again.ran.errors.strip().splitlines() or [""])[-1][:200]
    ended = f"no end after {SECONDS_ALONE} s" if again.ran.timed_out else f"exit code {again.ran.code}"
    require(finished(again), f"{ended}: {error}")
    return again


def _scores(audit: Audit, rerun: Rerun) -> tuple[float, float, str]:
    """The final score that is expected, the one found alone, and what they are scores of."""
    final, script = audit.result["final_stage"], audit.script
    options = {"looping": audit.looping, "ranks": audit.ranks}
    if _whole(audit):
        expected, what = audit.result["stages"][final]["val_bpb"], "as in the run"
    elif audit.streams:
        rerun, here = _ran(alone(audit, part=True)), audit.work / "part"
        tokenizer = audit.script.tokenizer_file(audit.cfg).resolve()  # no manifest here names it
        changes = _few_windows(audit) | {"data_path": str(here), "tokenizer_path": str(tokenizer)}
        cfg = dataclasses.replace(audit.artifact_model.cfg, **changes)
        evaluation = script.ScoreFirstSGD if audit.evaluator == "sgd" else script.SlidingEvaluation
        expected = evaluation(audit.model(), script.load_validation(cfg), cfg, **options).run().val_bpb
        what = f"on {5 * cfg.eval_seq_len:,} targets as the logged script"
    else:
        cfg = dataclasses.replace(audit.artifact_model.cfg, val_doc_fraction=_sample_fraction(audit))
        val = script.load_validation(audit.cfg)
        expected = script.ScoreFirstTTT(audit.model(), val, cfg, **options).run().val_bpb
        what = f"on {min(3, len(audit.documents))} documents as the logged script"
    return expected, rerun.result["stages"][final]["val_bpb"], what


@check("S3", "weights survive storage bit for bit", REPLAYED)
def s3_decodes_exactly(audit: Audit) -> str:
    """unpack(artifact) packs to the same bytes, and unpack(pack(tensors)) gives the same tensors."""
    blob = audit.artifact.read_bytes()
    settings, records = audit.script.read_artifact(blob, audit.cfg)
    cfg = dataclasses.replace(audit.cfg, **settings)
    again = audit.script.pack_artifact(records, cfg)
    require(again == blob, f"packed again it has {len(again):,} other bytes than the {len(blob):,}")
    stored = sum(array.numel() for record in records.values() for array in record.arrays.values())
    generator = torch.Generator().manual_seed(0)
    for record in records.values():  # other values than those that may have been chosen to survive
        for key, array in record.arrays.items():
            dice = torch.randint(-2, 2, array.shape, generator=generator)
            record.arrays[key] = dice.to(array.dtype) if array.dtype == torch.int8 else array
    back = audit.script.read_artifact(audit.script.pack_artifact(records, cfg), cfg)[1]
    same = all(digest(records[name].arrays) == digest(back[name].arrays) for name in records)
    require(same and list(back) == list(records), "other tensors come back than were packed")
    return f"{len(records)} tensors, {stored:,} values decode and encode to the same {len(blob):,} bytes"


@check("S4", "evaluation reads nothing else that training wrote", RECOMPUTED)
def s4_nothing_else_read(audit: Audit) -> str:
    """Path logs of the run's evaluation and the clean one, and the weights that adaptation began with."""
    final = audit.result["final_stage"]
    written = {re.sub(r"^\.(.*)\.tmp$", r"\1", Path(name).name) for _, name, _ in audit.accesses("write")}
    taken = {Path(name).name for _, name, _ in audit.accesses("read", "quantised", final)}
    leaked = (written & taken) - {audit.artifact.name}
    require(not leaked, f"read by the run's evaluation: {', '.join(sorted(leaked))}")
    start = ""
    if audit.evaluator != "standard":
        same_start(audit)
        start = "evaluation began with the artifact's weights; "
    reruns = [
        _ran(alone(audit)),
        *([_ran(alone(audit, part=True))] if audit.streams and not _whole(audit) else []),
    ]
    refused = sorted({name for again in reruns for name in again.ran.refused})
    require(not refused, f"the evaluation alone wanted {', '.join(refused)[:200]}")
    inside, outside = _read(reruns)
    require(not outside, f"the evaluation alone read {', '.join(outside)[:200]}: of no installed library")
    free = "; the tokenizer is not counted" * (audit.script.tokenizer_file(audit.cfg).name in inside)
    return f"{start}alone it read {', '.join(inside)}, says the kernel{free}"


def _read(reruns: Sequence[Rerun]) -> tuple[list[str], list[str]]:
    """Names of the files that evaluations read in their own folders, and paths of those elsewhere."""
    inside, outside = set(), set()
    for again in reruns:
        for path in map(Path, again.ran.opened):
            own = path.is_relative_to(again.folder)
            (inside if own else outside).add(path.name if own else str(path))
    return sorted(inside), sorted(outside)


def same_start(audit: Audit) -> None:
    """Raise Failed unless the ledger's hash of the weights before adaptation is that of the artifact's."""
    found = {record["model_sha256"] for record in audit.records("start")}
    state = audit.artifact_model.state_dict()
    rounded = state | {"tok_emb.weight": state["tok_emb.weight"].bfloat16()}  # as a CUDA device holds it
    expected = [_state_digest(state), _state_digest(rounded)]
    same = len(found) == 1 and found <= set(expected)
    figure = f"evaluation began with weights {short(min(found))}"
    require(same, f"{figure}, the artifact's are {short(expected[0])}")


def _state_digest(state: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in state.items():
        total.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return total.hexdigest()
