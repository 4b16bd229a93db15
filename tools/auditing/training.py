"""Checks T1-T5: training."""

import contextlib
import dataclasses
import functools
import io
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from auditing.artifact import alone, finished
from auditing.run import (
    BOS,
    RECORDS,
    REPLAYED,
    Audit,
    NotChecked,
    check,
    digest,
    opened,
    read_values,
    require,
    short,
    write_values,
)
from runs import TRAIN_LIMIT
from scripts import sha256_of

NETWORK_MODULES = {"socket", "urllib", "http", "requests", "httpx", "aiohttp", "ftplib", "huggingface_hub"}
UNIX_SOCKET = re.compile(r": socket\.connect (/|b['\"])")  # a path or an abstract name: of this machine
DOWNLOADERS = {"curl", "wget", "git-lfs", "aria2c", "rsync", "scp", "ssh"}


def _small_data(audit: Audit, name: str, scramble: bool) -> Path:
    """A data set of a few documents: the start of the first train shard, validation true or scrambled."""
    folder = audit.work / name
    folder.mkdir(exist_ok=True)
    train = audit.shards("train")
    if not train:
        raise NotChecked(f"{audit.data_folder}: no training shards here")
    write_values(folder / "fineweb_train_000000.bin", read_values(train[0])[:300_000])
    tokens = audit.tokens[: 2 * audit.cfg.train_seq_len + 2000].copy()
    if scramble:
        text = tokens != BOS
        tokens[text] = np.random.default_rng(0).integers(BOS + 1, audit.cfg.vocab_size, text.sum())
    write_values(folder / "fineweb_val_000000.bin", tokens)
    write_values(folder / "fineweb_val_bytes_000000.bin", audit.sidecar[: len(tokens)])
    return folder


def _small_run(audit: Audit, data: Path, see: Callable[..., None] | None = None, **others: object):
    """A run of the script's with the run's settings, few steps and small batches, in a folder of its own."""
    cfg = audit.cfg
    changes = {
        "data_path": str(data),
        "tokenizer_path": str(audit.script.tokenizer_file(cfg).resolve()),
        "artifact_dir": str(data / "run"),
        "train_batch_tokens": cfg.grad_accum_steps * cfg.train_seq_len,
        "iterations": 2,
        "warmup_steps": min(cfg.warmup_steps, 1),
        "max_wallclock_seconds": 0.0,
        "val_loss_every": min(cfg.val_loss_every, 1),
        "gptq_calibration_batches": 1,
        "prequant_only": False,
        "quantize_only": False,
        "ttt_eval_only": False,
        "allow_unverified_data": True,  # these few documents have no manifest
    }
    with contextlib.redirect_stdout(io.StringIO()):
        cfg = dataclasses.replace(cfg, **changes | others)
        return audit.script.Run(cfg, audit.ranks, audit.backends, audit.sources, see and audit.watch(see))


@functools.cache
def _canary(audit: Audit, scramble: bool) -> tuple[str, str]:
    """Hashes of weights and artifact after training and quantising with true or scrambled validation."""
    if not audit.trained:
        raise NotChecked("this run did not train")
    run = _small_run(audit, _small_data(audit, f"canary-{scramble}", scramble))
    with contextlib.redirect_stdout(io.StringIO()):
        run.train()
        weights = digest(run.model.state_dict())
        run.quantise()
    return weights, sha256_of(run.artifact)


def is_validation(name: str) -> bool:
    """The name is that of a file of the validation split."""
    return Path(name).name.startswith("fineweb_val_")


def trained_unscored(audit: Audit) -> None:
    """Raise Failed where the ledger holds an update on targets that no stage had scored before."""
    scored = np.zeros(len(audit.tokens), bool)
    for record in audit.ledger[1:]:
        for *number, first, count in record.get("spans", ()):
            if record["kind"] != "adapt":
                scored[first : first + count] = True
                continue
            where = f"document {number[0]}, targets {first}-{first + count - 1}"
            known = scored[first : first + count].all()
            require(bool(known), f"{where}: trained on before it was scored")


@check("T1", "no validation data in training", REPLAYED)
def t1_no_validation_in_training(audit: Audit) -> str:
    """The run's path log, and: scrambled validation data must give the same weights, bit for bit."""
    with contextlib.suppress(NotChecked):
        trained_unscored(audit)  # not by the script itself
    honest, scrambled = _canary(audit, False)[0], _canary(audit, True)[0]
    require(honest == scrambled, "weights depend on the validation tokens: scrambled ones give others")
    proof = f"weights {short(honest)} with true and scrambled validation data"
    files = [name for _, name, _ in audit.accesses("read", "train") if is_validation(name)]
    require(not files, f"opened while training: {', '.join(files)}")
    early = {name for stage, name, _ in audit.accesses("read") if is_validation(name)}
    curves = f", VAL_LOSS_EVERY={audit.cfg.val_loss_every}" if audit.cfg.val_loss_every else ""
    note = f"{len(early)} read at the start to be checked{curves}"
    return f"{proof}; no validation file opened while training ({note})"


@check("T2", "training and calibration within 600 s", RECORDS)
def t2_training_seconds(audit: Audit) -> str:
    """The stopwatch's seconds in result and events; R5 has those of the ledger."""
    if not audit.trained:
        raise NotChecked("this run did not train")
    seconds = audit.result["seconds"]
    training, calibration = seconds["train"], seconds.get("calibrate", 0.0)
    require(min(training, calibration) >= 0, f"training {training} s, calibration {calibration} s: below 0")
    total = training + calibration
    require(total <= TRAIN_LIMIT, f"training {training:.1f} s + calibration {calibration:.1f} s > 600")
    told = {event["train_seconds"] for event in audit.metrics if event["stage"] == "saved"}
    steps = [event["train_seconds"] for event in audit.metrics if event["stage"] == "train"]
    summary = audit.result["train_seconds"]
    agree = told == {training} and summary == training and max(steps, default=0.0) <= training
    require(agree, f"result.json says {training} and {summary} s, the events {sorted(told)} s")
    told = {event["calibrate_seconds"] for event in audit.metrics if event["stage"] == "artifact"}
    summary = audit.result["calibrate_seconds"]
    agree = told <= {calibration} and summary == calibration
    require(
        agree, f"calibration: result.json says {calibration} and {summary} s, the events {sorted(told)} s"
    )
    return f"training {training:.1f} s + calibration {calibration:.2f} s = {total:.1f} s of 600"


def _dice() -> list[object]:
    """State of all random generators."""
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return [torch.get_rng_state(), random.getstate(), np.random.get_state(), *cuda]


class WarmUp(NamedTuple):
    """What a warm-up did: state before and after, ids that the model saw, data files opened."""

    before: str
    after: str
    ids: np.ndarray
    files: list[str]


def _watched(model: torch.nn.Module, state: Callable[[], str], act: Callable[[], None]) -> WarmUp:
    """Do it and look on."""
    seen: list[Tensor] = []
    before = state()
    with (
        model.tok_emb.register_forward_pre_hook(lambda _, ids: seen.append(ids[0].cpu())),
        opened().watch() as files,
    ):
        act()
    data = [name for name in files if name.endswith(".bin")]
    ids = torch.cat([part.flatten() for part in seen]).numpy() if seen else np.empty(0, np.int64)
    return WarmUp(before, state(), ids, data)


@functools.cache
def warm_up(audit: Audit) -> WarmUp:
    """Warm up a fresh trainer on a small data set and look at everything that it could have changed."""
    if not audit.trained:
        raise NotChecked("this run did not train")
    run = _small_run(audit, _small_data(audit, "warm-up", scramble=False))
    trainer = audit.script.Trainer(run.cfg, run.model, run.loader, run.ranks, run)

    def state() -> str:
        parts = [trainer.model, trainer.muon, trainer.adamw]
        switches = trainer.loader.state(), trainer.looping, trainer.model.training
        return digest([part.state_dict() for part in parts], trainer.ema.averages, switches, _dice())

    return _watched(run.model, state, lambda: trainer.warm_up(1))


@functools.cache
def ttt_warm_up(audit: Audit) -> WarmUp:
    """Warm up a fresh model's test-time training as a run that compiles does; eagerly, in short windows."""
    compile_adaptation = getattr(audit.script, "compile_adaptation", None)
    if compile_adaptation is None:
        raise NotChecked("the script has no warm-up of test-time training called compile_adaptation")
    cfg = audit.cfg
    window = max(2 * cfg.ttt_chunk_size, cfg.ttt_cache_window)
    short = {
        "ttt_batch_size": min(cfg.ttt_batch_size, 4),
        "ttt_eval_seq_len": min(cfg.ttt_eval_seq_len, window),
    }
    events = []

    def see(kind: str, **facts: object) -> None:
        if kind == "line":
            events.append(facts["values"])

    run = _small_run(audit, _small_data(audit, "warm-up", scramble=False), see, **short)
    model = run.model

    def state() -> str:
        gradients = [parameter.grad for parameter in model.parameters()]
        return digest(model.state_dict(), gradients, model.training, _dice())

    def act() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            compile_adaptation(run, run.val.documents)

    with torch.compiler.set_stance("default"):
        done = _watched(model, state, act)
    if "ttt_warm_up" not in events[-1]:
        raise NotChecked(f"the warm-up of test-time training failed: {events[-1].get('text')}")
    return done


@check("T3", "warm-up leaves no trace", REPLAYED)
def t3_warm_up_restores(audit: Audit) -> str:
    """Model, both optimisers, EMA, loader and random generators have the same hash before and after."""
    done = warm_up(audit)
    require(done.before == done.after, f"state {short(done.before)} before, {short(done.after)} after")
    return f"model, optimisers, EMA, loader, random state: {short(done.before)} before and after"


@check("T4", "no network", RECORDS)
def t4_no_network(audit: Audit) -> str:
    """Imports of the script, the connections that Python's audit hook saw during the run, and the box."""
    imported = sorted(audit.imports & NETWORK_MODULES)
    require(not imported, f"the script imports {', '.join(imported)}")
    accesses = [f"{stage}: {name}" for stage, name, _ in audit.accesses("network")]
    local = [told for told in accesses if UNIX_SOCKET.search(told)]
    connections = [told for told in accesses if told not in local]
    require(not connections, f"{len(connections)} connections, the first in {(connections or [''])[0]}")
    children = sorted({Path(name).name for _, name, _ in audit.accesses("process")})
    require(not DOWNLOADERS & set(children), f"started {', '.join(children)}")
    again = alone(audit)
    sockets = [name for name in again.ran.refused if name.startswith("network ")]
    require(not sockets, f"the evaluation alone wanted {', '.join(sockets)}")
    ranks = audit.head["environment"]["ranks"]
    boxed = "; none wanted in the box" if finished(again) else ""
    note = "" if ranks == 1 else f" ({ranks} ranks talk through torch.distributed: not seen by the hook)"
    note += f"; {len(local)} within this machine ({local[0]})" if local else ""
    return f"no network module, 0 connections, child processes: {', '.join(children) or 'none'}{note}{boxed}"


@check("T5", "calibration on training data only", REPLAYED)
def t5_calibration(audit: Audit) -> str:
    """Files opened by the calibration, and: scrambled validation data must give the same artifact."""
    honest, scrambled = _canary(audit, False)[1], _canary(audit, True)[1]
    require(honest == scrambled, "the artifact depends on the validation tokens")
    files = [Path(name).name for _, name, _ in audit.accesses("read", "calibrate", "quantise", "compress")]
    require(not any(map(is_validation, files)), f"opened while quantising: {', '.join(sorted(set(files)))}")
    return f"artifact {short(honest)} with true and scrambled validation data; no validation file opened"
