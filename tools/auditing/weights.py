"""Checks W1-W3 (W4: packed.py): are the weights the outcome of the training that the run describes?

The first steps are repeated always, the whole training with --retrain; and the weights must not know the
validation text better than text of the same kind that the training never reached.
"""

import contextlib
import dataclasses
import functools
import io
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from auditing.recompute import (
    SAME_BITS,
    SECONDS_HERE,
    as_it_ran,
    bounds,
    chosen_documents,
    compare,
    foreign,
    full_precision_model,
    runs_on_gpu,
    standard,
)
from auditing.run import (
    BOS,
    CONSISTENT,
    FEWEST_DOCUMENTS,
    RECOMPUTED,
    ROOT,
    VERIFIED,
    Audit,
    NotChecked,
    Verdict,
    check,
    read_json,
    read_values,
    repository,
    require,
    short,
)
from scripts import CORE, sha256_of
from systems.layout import as_variables

LOGGED_STEPS = 5  # the first steps, of which every run tells loss and gradient
SECONDS = 10.0  # for repeating them; the first two are repeated however long they take
# Of the loss of each step, relative; rounding grows from one to the next.
STEP_BOUNDS = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2)
NORM_FACTOR = 10  # a gradient's norm may differ so much more
SAME_LEVELS = 0.9  # share of the stored numbers that another processor's sums leave as they are
REQUANTISED = 1e-3  # relative difference of scores that so many other levels explain
FURTHEST = 0.5  # relative distance of a stored matrix from the trained one; of another seed's it is 1.4
SPREAD = 0.01  # relative difference of scores that another processor explains (logs/EXPERIMENTS.md: 0.1 %)


SCRIPT = ROOT / CORE

# -- W1


def fresh_run(audit: Audit, name: str, **changes: object):
    """A run of the repository's with the settings of the one under audit, in a folder of the audit's."""
    cfg = dataclasses.replace(
        audit.cfg,
        tokenizer_path=str(audit.script.tokenizer_file(audit.cfg).resolve()),
        artifact_dir=str(audit.work / name),
        prequant_only=False,
        ttt_eval_only=False,
        **{"quantize_only": False, "allow_unverified_data": True} | changes,
    )
    told = audit.result["environment"]["micro_batches"]
    backends = dataclasses.replace(audit.backends, micro_batches=told)
    with contextlib.redirect_stdout(io.StringIO()):
        return audit.script.Run(cfg, audit.ranks, backends, repository())


def trains(audit: Audit) -> None:
    """Raise NotChecked unless the run trained its model."""
    if not audit.trained:
        raise NotChecked("this run did not train")
    if not audit.shards("train"):
        raise NotChecked(f"{audit.data_folder}: no training shards here")


def told_steps(audit: Audit) -> dict[int, dict]:
    """What the run told of its first steps, by number, as far as they can be repeated.

    A clock's fractions of the training are not known to the digit: where they lower the rate, that ends. It
    cannot be lowered before the time is there, with room for a first step that was slower than the others.
    """
    cfg = audit.cfg
    told = {event["step"]: event for event in audit.metrics if event["stage"] == "train"}
    require(1 in told, "metrics.jsonl does not tell the first step of training")
    steps: dict[int, dict] = {}
    for step in range(1, min(LOGGED_STEPS, audit.result["steps"]) + 1):
        event = told.get(step, {})
        if event.get("lr_multiplier", 1) != 1 and cfg.max_wallclock_seconds > 0:
            total = cfg.max_wallclock_seconds - cfg.gptq_reserve_seconds
            latest = min(1.0, LOGGED_STEPS * event["train_seconds"] / total)
            possible = audit.script.lr_multiplier(latest, cfg.warmdown_frac, cfg.min_lr) < 1
            factor = f"step {step}: lr_multiplier {event['lr_multiplier']:.6g}"
            require(
                possible, f"{factor} after {event['train_seconds']:.1f} s of {total:.1f}: it is 1 so early"
            )
            break
        require(step in told, f"metrics.jsonl does not tell step {step}")
        steps[step] = told[step]
    if not steps:
        raise NotChecked("no step can be repeated: all were below the full rate")
    return steps


def _first_steps(audit: Audit, run: object) -> Iterator[tuple[dict, object]]:
    """What the run told of each of its first steps, and that step's report here, while time lasts."""
    trainer, started = (
        audit.script.Trainer(run.cfg, run.model, run.loader, run.ranks, run),
        time.perf_counter(),
    )
    for number, told in told_steps(audit).items():
        step = number - 1
        if step >= 2 and time.perf_counter() - started > SECONDS:
            return
        yield told, trainer.step(step, 0.0 if trainer.capped else step / run.cfg.iterations)


def _compare_steps(audit: Audit, run: object) -> tuple[str, bool]:
    """How many steps were repeated, and how well they agree; whether all bits do, so that sums have the same
    order here. Failed where one told something else.
    """
    worst, steps, apart = 0.0, 0, []
    for told, report in _first_steps(audit, run):
        bound = step_bound(audit, steps + 1)
        steps += 1
        pairs = {
            "train_loss": (report.train_loss, bound),
            "grad_norm": (report.grad_norm, NORM_FACTOR * bound),
        }
        for name, (value, limit) in pairs.items():
            same = math.isclose(told[name], value, rel_tol=limit)
            require(same, f"step {steps}: {name} {told[name]:.7g} in metrics.jsonl, repeated {value:.7g}")
            apart.append(abs(told[name] / value - 1))
            worst = max(worst, apart[-1])
        factor = report.lr_multiplier
        require(
            told["lr_multiplier"] == factor,
            f"step {steps}: lr_multiplier {told['lr_multiplier']}, not {factor}",
        )
    alike = foreign(audit) and worst < SAME_BITS
    require(not alike, f"{steps} steps are those of float32: no GPU's bfloat16")
    text = f"{steps} steps from the seed " + (f"within {worst:.0e}" if worst else "the same to the bit")
    on_cpu = audit.ranks.device.type == "cpu" and audit.result["environment"]["ranks"] == 1
    return text, bool(steps and not worst and on_cpu)


def step_bound(audit: Audit, step: int) -> float:
    """The relative difference of a step's loss that rounding explains, steps from 1."""
    return max(STEP_BOUNDS[step - 1], 10 * bounds(audit, "standard").document * runs_on_gpu(audit))


@functools.cache
def first_steps(audit: Audit) -> tuple[list[str], bool]:
    """What is to be said of the untrained model and the first steps, repeated; whether all bits agree."""
    run, told = fresh_run(audit, "first-steps"), []
    with as_it_ran(audit):
        if "untrained" in audit.result["stages"] and chosen_documents(audit, "untrained") is None:
            found = standard(audit, run.model, looping=False)
            told.append(compare(audit, "untrained", found, bounds(audit, "standard")))
        text, exact = _compare_steps(audit, run)
    return [*told, text], exact


def _quantises_in_time(audit: Audit) -> bool:
    """Calibration and quantisation would take seconds here, by their arithmetic (--full: however long)."""
    tokens = audit.cfg.gptq_calibration_batches * audit.cfg.train_batch_tokens
    seconds = SECONDS_HERE * tokens * sum(p.numel() for p in audit.artifact_model.parameters())
    return not foreign(audit) and (seconds <= 2 * SECONDS or audit.options.full)


def _requantised(audit: Audit, path: Path, exact: bool) -> str:
    """The artifact beside what the repository makes of final_model.pt.

    `exact`: it must be the same bytes, since training was the same to the bit.
    """
    run = fresh_run(audit, "quantised", quantize_only=True, model_path=str(path.resolve()))
    run.result["looping"] = audit.looping
    with contextlib.redirect_stdout(io.StringIO()):
        run.quantise()
    found, blob = run.artifact, audit.artifact.read_bytes()
    if found == blob:
        return f"{path.name} quantised again gives artifact {short(sha256_of(blob))}"
    share = _same_levels(audit, found, blob)
    figure = f"{path.name} quantised again shares {share:.3%} of its numbers with the artifact"
    require(not exact, f"{figure}, though the steps are the same to the bit")
    require(share > SAME_LEVELS, figure)
    here, there = (_loss(audit, model) for model in (audit.model_of(found), audit.artifact_model))
    scores = f"{here:.6f} nats a target, the artifact {there:.6f}"
    require(abs(there / here - 1) <= REQUANTISED, f"{figure}, and scores {scores}")
    return f"{figure}, and scores {scores}"


def _loss(audit: Audit, model: object) -> float:
    """Nats a target of a model, on all validation documents or those that are drawn."""
    found = standard(audit, model, chosen_documents(audit, "quantised"))
    return float(found.nats.sum() / found.counts.sum())


def _same_levels(audit: Audit, one: bytes, other: bytes) -> float:
    """Share of the stored numbers of two artifacts that are the same; 0 where they hold other tensors."""
    records = [audit.script.read_artifact(blob, audit.cfg)[1] for blob in (one, other)]
    arrays = [
        {(name, key): array for name, record in part.items() for key, array in record.arrays.items()}
        for part in records
    ]
    if [(k, a.shape) for k, a in arrays[0].items()] != [(k, a.shape) for k, a in arrays[1].items()]:
        return 0.0
    same = sum(int((array == arrays[1][place]).sum()) for place, array in arrays[0].items())
    return same / sum(array.numel() for array in arrays[0].values())


def _near(audit: Audit) -> str:
    """The artifact's matrices beside those of final_model.pt: apart by what a few bits cost, no more."""
    trained, stored = full_precision_model(audit).state_dict(), audit.artifact_model.state_dict()
    require(trained.keys() == stored.keys(), "final_model.pt has other tensors than the artifact")
    distances = {
        name: float((stored[name].float() - tensor.float()).norm() / tensor.float().norm().clamp_min(1e-9))
        for name, tensor in trained.items()
    }
    name = max(distances, key=distances.get)
    figure = f"{name} is {distances[name]:.2f} of its norm away from final_model.pt"
    require(distances[name] < FURTHEST, f"the artifact is another model's: {figure}")
    return f"at most {figure}"


@check("W1", "first training steps repeated; artifact is final_model.pt quantised", RECOMPUTED)
def w1_first_steps(audit: Audit) -> str | Verdict:
    """Initial weights, first steps and quantisation, repeated, against what the run told.

    Only CONSISTENT where the artifact was not made again: the steps alone say nothing of it.
    """
    trains(audit)
    told, exact = first_steps(audit)
    path = audit.folder / Path(audit.cfg.model_path).name
    with as_it_ran(audit):
        again = path.is_file() and _quantises_in_time(audit)
        if path.is_file():
            last = _requantised(audit, path, exact) if again else _near(audit)
        else:
            last = f"no {path.name}: where the artifact comes from is not known"
    return Verdict(VERIFIED if again else CONSISTENT, "; ".join([*told, last]))


# -- W2


def _train_again(audit: Audit) -> Path:
    """The folder of a run of the repository's script with the same settings, up to the standard score."""
    folder, ranks = audit.work / "retrained", audit.result["environment"]["ranks"]
    settings = audit.run_settings().as_env() | {  # no other names: PYTHONPATH would be one
        "DATA_PATH": audit.data_folder.resolve(),
        "TOKENIZER_PATH": audit.script.tokenizer_file(audit.cfg).resolve(),
        "ARTIFACT_DIR": folder,
        "RUN_ID": "retrained",
        "ALLOW_UNVERIFIED_DATA": 1,
    }
    off = "AUDIT TTT_ENABLED SLIDING_WINDOW_ENABLED VAL_LOSS_EVERY CHECKPOINT_SECONDS PREFLIGHT_ONLY "
    off += "QUANTIZE_ONLY PREQUANT_ONLY TTT_EVAL_ONLY"  # which take weights that are there
    settings |= dict.fromkeys(off.split(), 0) | {"WANDB_PROJECT": "", "TENSORBOARD_DIR": ""}
    environment = as_variables(settings)
    launcher = (
        ["-P", "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks > 1
        else []
    )
    command = [sys.executable, *launcher, str(SCRIPT)]
    options = {"env": os.environ | environment, "cwd": audit.work, "capture_output": True, "text": True}
    done = subprocess.run(command, check=False, **options)
    if not (folder / "result.json").is_file():
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise NotChecked(f"the training could not be repeated here: {last[:200]}")
    return folder


@check("W2", "the whole training repeated (--retrain)", RECOMPUTED)
def w2_retrained(audit: Audit) -> str | Verdict:
    """Trained and quantised again from settings and data, the artifact must be the same bytes."""
    trains(audit)
    cap = audit.cfg.max_wallclock_seconds
    if cap:
        raise NotChecked(
            f"a clock ended the training (MAX_WALLCLOCK_SECONDS={cap:g}): no other run repeats it"
        )
    if not audit.options.retrain:
        raise NotChecked(
            "only --retrain trains again: that the weights are this training's is the run's word"
        )
    folder = _train_again(audit)
    again, told = read_json(folder / "result.json"), audit.result["environment"]
    ours, theirs = (folder / audit.artifact.name).read_bytes(), audit.artifact.read_bytes()
    if ours == theirs:
        return f"trained again from settings and data: the same artifact {short(sha256_of(ours))}"
    here = {name: again["environment"].get(name) for name in ("device", "torch", "threads", "ranks")}
    other = [
        f"{name} {value}, there {told.get(name)}" for name, value in here.items() if told.get(name) != value
    ]
    checksums = f"artifact {short(sha256_of(ours))}, the run's is {short(sha256_of(theirs))}"
    require(bool(other), f"trained again on the same kind of processor: {checksums}")
    before, after = (result["stages"]["quantised"]["val_bpb"] for result in (audit.result, again))
    figure = f"quantised {after:.5f} trained again, {before:.5f} in the run (here {', '.join(other)})"
    require(abs(after / before - 1) < SPREAD, figure)
    return Verdict(CONSISTENT, f"{figure}: other bits, the same within {SPREAD:.0%}")


# -- W3

CUT = 1024  # tokens of a document that are looked at
LOOKED_AT = 60_000  # tokens of either kind, of a model of up to 8 M parameters; of larger ones fewer
REFERENCE_TOKENS = 3_000_000  # of training text, of which the n-gram model is made
LEAST = 0.1  # nats a target: with honest weights samples of a text differ by 0.07 (logs/EXPERIMENTS.md)
ERRORS = 4.0  # standard errors beyond which a difference is no chance: once in 30,000 honest runs
PRIORS = (30.0, 10.0)  # weight of the shorter context's distribution in counts, for bigrams and trigrams


class Ngrams:
    """A trigram model with Dirichlet smoothing, of the training text: how hard a text is for anybody."""

    def __init__(self, tokens: np.ndarray, vocabulary: int):
        self._size, tokens = vocabulary, tokens.astype(np.int64)
        self._ones = np.bincount(tokens, minlength=vocabulary)
        self._counts = [np.unique(keys, return_counts=True) for keys in self._keys(tokens)]

    def _keys(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        pairs = tokens[:-1] * self._size + tokens[1:]
        return pairs, pairs[:-1] * self._size + tokens[2:]

    def _count(self, order: int, keys: np.ndarray) -> np.ndarray:
        known, counts = self._counts[order]
        places = np.searchsorted(known, keys).clip(max=len(known) - 1)
        return np.where(known[places] == keys, counts[places], 0)

    def losses(self, tokens: np.ndarray) -> np.ndarray:
        """-log p of tokens[2:], nats."""
        tokens = tokens.astype(np.int64)
        pairs, triples = self._keys(tokens)
        one = (self._ones[tokens[2:]] + 1) / (self._ones.sum() + self._size)
        two = (self._count(0, pairs[1:]) + PRIORS[0] * one) / (self._ones[tokens[1:-1]] + PRIORS[0])
        return -np.log((self._count(1, triples) + PRIORS[1] * two) / (self._count(0, pairs[:-1]) + PRIORS[1]))


def _reached(audit: Audit) -> list[int] | None:
    """Tokens of each training shard that the loader had read when training ended.

    None where it had read all of them, or reads at random, or where another run trained.
    """
    if not audit.trained or audit.cfg.plain_windows:
        return None
    cfg, told = audit.cfg, audit.result["environment"]
    on_rank, tokens = audit.script.micro_batches(
        cfg, dataclasses.replace(audit.backends, micro_batches=told["micro_batches"]), told["ranks"]
    )
    steps, need, reached = audit.result["steps"], on_rank * told["ranks"] * (tokens + 1), []
    for path in audit.shards("train"):
        values = read_values(path)
        first = int(np.flatnonzero(values == BOS)[0])
        here = min(steps, (len(values) - first) // need)
        steps -= here
        reached.append(first + here * need if steps == 0 else len(values))
    return None if steps else reached


def documents_of(tokens: np.ndarray, most: int, seed: int) -> list[np.ndarray]:
    """Documents of a stream, cut off at CUT tokens, drawn without order until they have `most` tokens."""
    starts = np.flatnonzero(tokens == BOS)
    ends = np.minimum([*starts[1:], len(tokens)], starts + CUT)
    chosen, total = [], 0
    for number in np.random.default_rng(seed).permutation(len(starts)):
        part = np.asarray(tokens[starts[number] : ends[number]])
        if len(part) > 2 and total + len(part) <= most:
            chosen.append(part)
            total += len(part)
    return chosen


class Knowledge(NamedTuple):
    """How much better validation text is known than other text of its difficulty."""

    nats: float  # a target, of the mean
    errors: float  # the same in standard errors


def compare_knowledge(ours: np.ndarray, theirs: np.ndarray) -> Knowledge:
    """`ours` and `theirs` [documents, 3]: mean loss, mean loss of the n-gram model, targets.

    A line through `theirs` says which loss to expect of a document that is so hard for n-grams; long
    documents count more, up to the spread that documents have among each other.
    """
    weights = [part[:, 2] / (part[:, 2] + 100) for part in (ours, theirs)]
    design = np.stack([np.ones(len(theirs)), theirs[:, 1]], 1)
    root = np.sqrt(weights[1])[:, None]
    line = np.linalg.lstsq(design * root, theirs[:, 0] * root[:, 0], rcond=None)[0]
    rest = [part[:, 0] - line[0] - line[1] * part[:, 1] for part in (ours, theirs)]
    means = [np.average(values, weights=w) for values, w in zip(rest, weights, strict=True)]
    errors = [
        (w**2 * (values - mean) ** 2).sum() / w.sum() ** 2
        for values, mean, w in zip(rest, means, weights, strict=True)
    ]
    nats = float(means[1] - means[0])
    return Knowledge(nats, nats / math.sqrt(sum(errors)))


def measured(audit: Audit, model: object, ngrams: Ngrams, documents: Sequence[np.ndarray]) -> np.ndarray:
    """[documents, 3] for `compare_knowledge`."""
    stream = np.concatenate(documents).astype(np.int64)
    tokens = torch.from_numpy(stream)
    val = audit.script.ValidationSet.from_sidecar(tokens, torch.zeros_like(tokens))
    found = standard(audit, model, val=val)
    hard = np.concatenate([np.zeros(1), ngrams.losses(stream)])  # of each target but for the first
    sums = np.add.reduceat(hard, [start for start, _ in val.documents])
    return np.stack([found.nats / found.counts, sums / found.counts, found.counts], 1)


def knowledge(audit: Audit, model: object) -> tuple[Knowledge, int, int, str]:
    """What a model knows of the validation text; documents of either kind, and what the others are."""
    seed, reached, paths = audit.sample_seed, _reached(audit), audit.shards("train")
    shards = [read_values(path) for path in paths]
    rest = [values[first:] for values, first in zip(shards, reached or [], strict=False)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    most = min(LOOKED_AT, int(LOOKED_AT * 8e6 / parameters))
    theirs, kind = [], "training never reached"
    if reached:
        unread = [values[np.argmax(values == BOS) :] for values in rest if (values == BOS).any()]
        theirs = documents_of(np.concatenate(unread), most, seed) if unread else []
    if len(theirs) < FEWEST_DOCUMENTS:
        theirs, kind = documents_of(np.concatenate(shards), most, seed), "of the training text"
    ours = documents_of(audit.tokens, most, seed)
    if min(len(ours), len(theirs)) < FEWEST_DOCUMENTS:
        raise NotChecked(f"{len(ours)} and {len(theirs)} documents are too few for a spread")
    read = [values[:end] for values, end in zip(shards, reached or map(len, shards), strict=True)]
    ngrams = Ngrams(np.concatenate(read)[:REFERENCE_TOKENS], audit.cfg.vocab_size)
    with as_it_ran(audit):
        found = [measured(audit, model, ngrams, documents) for documents in (ours, theirs)]
    return compare_knowledge(*found), len(ours), len(theirs), kind


@check("W3", "validation text no better known than unseen text", RECOMPUTED)
def w3_not_memorised(audit: Audit) -> str:
    """The artifact's losses beside those of n-grams, on validation documents and on others."""
    if not audit.shards("train"):
        raise NotChecked(f"{audit.data_folder}: no training shards here")
    found, ours, theirs, kind = knowledge(audit, audit.artifact_model)
    figure = f"{found.nats:+.3f} nats a target ({found.errors:+.1f} standard errors)"
    which = f"{ours} validation documents against {theirs} {kind}"
    known = found.errors >= ERRORS and found.nats >= LEAST
    require(not known, f"validation text is better known by {figure}: {which}")
    return f"advantage on validation text {figure}, {which}"
