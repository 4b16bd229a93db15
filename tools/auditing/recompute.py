"""Checks E1 and E2: the scores, made again by the repository's evaluators, document by document.

Nothing of the run is believed here but its artifact, which is what is scored. `documents.json` says what each
document cost in the run; together with the totals of result.json it is compared with what comes out here.
"""

import atexit
import contextlib
import copy
import functools
import gc
import itertools
import json
import math
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from auditing.records import read_json
from auditing.run import RECOMPUTED, Audit, Failed, NotChecked, check, require
from auditing.verdict import SAMPLED

BUDGET = 120.0  # seconds up to which a stage is repeated as a whole
SECONDS_HERE = 1e-10  # a target, parameter and pass, on one core of a CPU (the demo: 4 s)
ADAPTING = 20.0  # passes that the adaptation costs, with the demo's windows and chunks
FEWEST = 16  # documents that are drawn at least
ERRORS = 5.0  # standard errors by which a sample of so few may miss the mean of all
MOST_RANKS = 64
DIGITS = 1e-4  # documents.json has so many nats
SAME_BITS = 1e-6  # relative; bfloat16 and float32 never agree so well over a document


class Bounds(NamedTuple):
    """Relative differences that rounding explains: of one document, and of the sum of all."""

    document: float
    total: float

    def of_sum(self, documents: int) -> float:
        """Of the sum of some documents, whose roundings go up and down."""
        return self.total + self.document / math.sqrt(documents)


# A CPU's, with room: the demo's 40 adapted documents came out within 1e-8 with another instruction set
# (logs/EXPERIMENTS.md). A GPU's bfloat16 has 8 bits: 4e-3 of a product; not measured yet, and so wide.
FLOAT32 = {"standard": Bounds(1e-5, 2e-6), "adapted": Bounds(1e-4, 1e-5)}
BFLOAT16 = {"standard": Bounds(5e-3, 1e-3), "adapted": Bounds(2e-2, 3e-3)}


class Losses:
    """Nats and scored targets of each validation document, from what an evaluator's watch is told."""

    def __init__(self, documents: Sequence[tuple[int, int]]):
        self.documents, self._starts = documents, [start for start, _ in documents]
        self.nats, self.counts = np.zeros(len(documents)), np.zeros(len(documents), np.int64)

    def see(self, kind: str, **facts: object) -> None:
        """Take an event: a row, a chunk of adapted documents, or a batch of windows has been scored."""
        if kind == "row":
            self._add(range(facts["start"], facts["end"]), facts["losses"])
        elif kind == "slid":
            spans = [(window.start + window.offset, window.targets) for window in facts["windows"]]
            self._add([first + i for first, count in spans for i in range(count)], facts["losses"])
        elif kind == "scored":
            part, losses = facts["part"], facts["losses"].detach()
            sums = (losses * part.valid.to(losses.device)).sum(1)
            self._add([first for first, _ in part.spans], sums, [count for _, count in part.spans])

    def _add(self, places: Iterable[int], losses: Tensor, counts: Sequence[int] | None = None) -> None:
        owners = np.searchsorted(self._starts, np.asarray(places), "right") - 1
        size = len(self._starts)
        self.nats += np.bincount(owners, losses.double().cpu().flatten().numpy(), size)
        self.counts += np.bincount(owners, counts, size).astype(np.int64)

    @property
    def whole(self) -> np.ndarray:
        """Which documents have been scored to their end."""
        return self.counts == [length - 1 for _, length in self.documents]


# -- what was told, and the comparison


def runs_on_gpu(audit: Audit) -> bool:
    """The run says that it ran on a GPU."""
    return "NVIDIA" in audit.result["environment"]["device"]


def foreign(audit: Audit) -> bool:
    """The run was made on a GPU and is audited without one, or the other way round."""
    return runs_on_gpu(audit) != (audit.ranks.device.type == "cuda")


def bounds(audit: Audit, kind: str) -> Bounds:
    """What rounding explains between the run and here, for a "standard" or an "adapted" score."""
    return (BFLOAT16 if runs_on_gpu(audit) or foreign(audit) else FLOAT32)[kind]


@functools.cache
def validation(audit: Audit):
    """The validation set, read by the repository."""
    return audit.script.load_validation(audit.cfg)


def told_losses(audit: Audit, stage: str) -> np.ndarray | None:
    """Nats of each document in documents.json; None where the run wrote none (AUDIT=0).

    Failed where it has other documents than the data, or another sum than the stage's in result.json.
    """
    path = audit.folder / "documents.json"
    if not path.is_file():
        return None
    told, documents = read_json(path), validation(audit).documents
    same = told["documents"] == [list(span) for span in documents]
    require(
        same, f"documents.json lists {len(told['documents'])} documents, not the {len(documents)} of the data"
    )
    require(stage in told["losses"], f"documents.json has no losses of stage {stage}")
    losses, score = np.array(told["losses"][stage], np.float64), audit.result["stages"][stage]
    require(losses.shape == (len(documents),), f"documents.json: {losses.shape} losses of stage {stage}")
    nats, total = float(losses.sum()), score["val_loss"] * score["targets"]
    agree = math.isclose(nats, total, rel_tol=1e-9, abs_tol=DIGITS * len(losses))
    require(agree, f"{stage}: documents.json sums to {nats:.4f} nats, result.json says {total:.4f}")
    return losses


def compare(audit: Audit, stage: str, found: Losses, bound: Bounds) -> str:
    """What the run says of a stage beside what was found here. Raises Failed with the worst document."""
    told, done = told_losses(audit, stage), np.flatnonzero(found.whole)
    worst = 0.0
    if told is not None:
        require(len(done) > 0, f"{stage}: no document was scored here")
        apart = np.abs(told - found.nats)[done]
        shares = np.maximum(apart - DIGITS, 0) / found.nats[done]
        number, worst = done[shares.argmax()], float(shares.max())
        values = f"{told[number]:.4f} nats in documents.json, recomputed {found.nats[number]:.4f}"
        require(worst <= bound.document, f"{stage}: document {number} cost {values}")
        same = foreign(audit) and worst < SAME_BITS
        require(not same, f"{stage}: {len(done)} documents cost what float32 gives: no GPU's bfloat16")
        sums, limit = (float(nats[done].sum()) for nats in (told, found.nats)), bound.of_sum(len(done))
        _near(f"{stage}: {len(done)} documents cost", *sums, limit)
    elif not found.whole.all():
        raise NotChecked(
            "the run wrote no documents.json (AUDIT=1): a sample has nothing to be compared with"
        )
    if not found.whole.all():
        rest = _rest_is_alike(audit, stage, told)
        return f"{stage} {len(done)} of {len(found.documents)} documents within {worst:.0e}{rest}"
    return f"{stage} {_same_totals(audit, stage, found, bound)} within {worst:.0e}"


def _rest_is_alike(audit: Audit, stage: str, told: np.ndarray) -> str:
    """Raise Failed where a target costs less in all documents than those that were drawn let expect.

    Adapted and sliding scores are looked at beside the quantised ones of the same documents, from which they
    differ by about as much in each. Documents are drawn by their targets, so the mean of those drawn is that
    of all targets.
    """
    drawn = chosen_documents(audit, stage)
    if drawn is None or len(drawn) < FEWEST:
        return ""
    targets = np.array([max(length - 1, 1) for _, length in validation(audit).documents])
    costs = told - (told_losses(audit, "quantised") if stage in ("sliding", "ttt") else 0.0)
    each = costs[drawn] / targets[drawn]
    error = max(float(each.std(ddof=1)) / math.sqrt(len(drawn)), DIGITS)
    every, here = float(costs.sum() / targets.sum()), float(each.mean())
    figure = f"{every:+.4f} nats a target in all, {here:+.4f} +/- {error:.4f} in those drawn"
    require(here - every <= ERRORS * error, f"{stage}: {figure}: what was not repeated is too good")
    return f", {figure}"


def _near(what: str, told: float, found: float, limit: float) -> None:
    """Raise Failed unless two sums are the same but for rounding."""
    same = math.isclose(told, found, rel_tol=limit)
    require(same, f"{what} {told:.4f} nats in documents.json, recomputed {found:.4f}")


def _same_totals(audit: Audit, stage: str, found: Losses, bound: Bounds) -> str:
    """Scores of a whole stage; its targets and bytes are those of the data."""
    told, val = audit.result["stages"][stage], validation(audit)
    targets, size, nats = val.num_targets, int(val.target_bytes.sum()), float(found.nats.sum())
    counted = told["targets"], told["bytes"], told["documents"]
    expected = targets, size, len(val.documents)
    require(counted == expected, f"{stage}: targets, bytes, documents {counted}, the data have {expected}")
    scores = {"val_loss": nats / targets, "val_bpb": nats / math.log(2) / size}
    for name, score in scores.items():
        same = math.isclose(told[name], score, rel_tol=bound.total)
        require(same, f"{stage}: {name} {told[name]:.8f} in result.json, recomputed {score:.8f}")
    apart = f", {told['val_bpb']:.6f} in result.json," * (abs(told["val_bpb"] - scores["val_bpb"]) > 5e-7)
    return f"{scores['val_bpb']:.6f}{apart} of {len(val.documents)} documents"


# -- evaluators, as a whole or in part


@contextlib.contextmanager
def as_it_ran(audit: Audit) -> Iterator[None]:
    """With as many threads as the run had: on its processor sums have its order, and so its bits."""
    before, told = torch.get_num_threads(), audit.result["environment"].get("threads")
    if type(told) is int and 0 < told <= 4 * (os.cpu_count() or 1):
        torch.set_num_threads(told)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def part_of(audit: Audit, number: int, parts: int):
    """This process as rank `number` of `parts` that are not there: it does their share and waits for none."""
    ranks = copy.copy(audit.ranks)
    ranks.rank, ranks.world_size = number, parts
    ranks.wait_for_all, ranks.sum_ = lambda stage: None, lambda tensor: tensor
    return ranks


class Shared:
    """What ranks that are threads of one process put down for each other."""

    def __init__(self, count: int):
        self.barrier, self.items = threading.Barrier(count), [None] * count


def beside(audit: Audit, number: int, shared: Shared):
    """This thread as one of several ranks; the others are threads too, each with a model of its own."""
    ranks = copy.copy(audit.ranks)
    ranks.rank, ranks.world_size = number, len(shared.items)

    def gather(item: object) -> list:
        shared.items[number] = item
        shared.barrier.wait()
        items = list(shared.items)
        shared.barrier.wait()  # nobody puts down the next one before all have read this one
        return items

    def sum_(tensor: Tensor) -> Tensor:
        return tensor.copy_(functools.reduce(torch.add, gather(tensor.clone())))

    ranks.gather, ranks.sum_, ranks.wait_for_all = gather, sum_, gather
    return ranks


def on_ranks(audit: Audit, count: int, work: Callable[[object], None]) -> None:
    """Do work(ranks) on each of `count` ranks, in threads; raises what the first of them raises."""
    if count == 1:
        return work(audit.ranks)
    shared, errors = Shared(count), []

    def run(number: int) -> None:
        try:
            work(beside(audit, number, shared))
        except Exception as error:
            errors.append(error)
            shared.barrier.abort()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    real = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    if errors:
        raise (real or errors)[0]
    return None


def draw(audit: Audit, count: int) -> list[int]:
    """Numbers of so many validation documents, by a seed that the run could not know.

    The chance of a document is by its targets, as what it can hide is: of keys u^(1/targets) the largest are
    taken (Efraimidis and Spirakis, 2006).
    """
    dice = random.Random(audit.sample_seed)
    keys = [dice.random() ** (1 / max(length - 1, 1)) for _, length in validation(audit).documents]
    return sorted(sorted(range(len(keys)), key=keys.__getitem__, reverse=True)[:count])


def seconds_here(audit: Audit, stage: str) -> float:
    """About how long a stage takes: on a GPU what it took the run's, on a CPU by model, targets and passes.

    A CPU under load takes longer, so what a run on one needed says little.
    """
    if audit.ranks.device.type == "cuda":
        return float(audit.result["stages"][stage]["seconds"]) * audit.result["environment"]["ranks"]
    cfg, passes = audit.artifact_model.cfg, 1.0
    if stage == "sliding" or stage == "ttt" and cfg.ttt_sgd:
        passes = cfg.eval_seq_len / cfg.eval_stride + 3 * cfg.ttt_epochs * (stage == "ttt")
    elif stage == "ttt":
        passes = ADAPTING
    parameters = sum(parameter.numel() for parameter in audit.artifact_model.parameters())
    return SECONDS_HERE * parameters * validation(audit).num_targets * passes


def chosen_documents(audit: Audit, stage: str) -> list[int] | None:
    """The documents of which a stage is repeated; None for all, the rule where that takes two minutes."""
    if audit.options.sample and not audit.options.full:
        return draw(audit, audit.options.sample)
    seconds, total = seconds_here(audit, stage), len(validation(audit).documents)
    if audit.options.full or seconds <= BUDGET:
        return None
    if foreign(audit):
        device = audit.result["environment"]["device"]
        text = f"ran on {device}, and takes about {seconds:.0f} s here"
        raise NotChecked(f"stage {stage} {text}: --sample N repeats N documents, --full all")
    return draw(audit, max(FEWEST, int(total * BUDGET / seconds)))


def standard(
    audit: Audit, model: object, chosen: Sequence[int] | None = None, *, val=None, looping: bool | None = None
) -> Losses:
    """The standard evaluation of a model: of all rows, or of those in which the chosen documents lie.

    It is that of the validation set, with loops as the artifact has them, unless others are given.
    """
    val, script = val or validation(audit), audit.script
    found, size = Losses(val.documents), model.cfg.val_batch_tokens // script.CONTEST_MICRO_BATCHES
    parts = [audit.ranks]
    if chosen is not None:
        spans = [val.documents[number] for number in chosen]
        rows = {row for start, n in spans for row in range(start // size, (start + n - 2) // size + 1)}
        parts = [part_of(audit, row, -(-val.num_targets // size)) for row in sorted(rows)]
    options = {"looping": audit.looping if looping is None else looping, "watch": audit.watch(found.see)}
    for ranks in parts:
        script.StandardEvaluation(model, val, model.cfg, ranks=ranks, **options).run()
    return found


def sliding(audit: Audit, model: object, chosen: Sequence[int] | None) -> Losses:
    """Sliding windows over all of the stream, or those that score the chosen documents."""
    val, script, cfg = validation(audit), audit.script, model.cfg
    found, wanted = Losses(val.documents), np.full(val.num_targets, chosen is None)
    for start, length in (val.documents[number] for number in chosen or ()):
        wanted[start : start + length - 1] = True
    options = {"looping": audit.looping, "watch": audit.watch(found.see), "ranks": audit.ranks}
    evaluation, parts = script.SlidingEvaluation(model, val, cfg, **options), []
    for window in script.sliding_windows(0, val.num_targets, cfg.eval_seq_len, cfg.eval_stride):
        first, end = window.start + window.offset, window.start + window.length
        if wanted[first:end].any():  # neighbours are one part
            begin = parts.pop()[0] if parts and parts[-1][1] == first else first
            parts.append((begin, end))
    for first, end in parts:
        for _ in evaluation.slide(first, end, script.BpbMeter()):
            pass
    return found


# -- E1


def full_precision_model(audit: Audit):
    """The model of the run's final_model.pt; None where the run's folder has none.

    Failed where that does not fit the run's settings.
    """
    path = audit.folder / Path(audit.cfg.model_path).name
    if not path.is_file():
        return None
    model = audit.script.GPT(audit.cfg, audit.backends)
    try:
        model.load_state_dict(audit.script.load_weights(path))
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise Failed(f"{path.name}: {' '.join(str(error).split())[:200]}") from None
    return audit.backends.move_and_compile(model, audit.ranks.device)


@check("E1", "standard scores recomputed, by document", RECOMPUTED)
def e1_standard(audit: Audit) -> str:
    """Artifact and final_model.pt, scored by the repository's evaluators, against documents and totals."""
    stages, told = audit.result["stages"], []
    _is_told(audit, "sliding", audit.cfg.sliding_window_enabled)
    _is_told(audit, "quantised", True)
    for stage, evaluate in (("prequant", standard), ("quantised", standard), ("sliding", sliding)):
        if stage not in stages:
            continue
        model = full_precision_model(audit) if stage == "prequant" else audit.artifact_model
        if model is None:
            told.append("no final_model.pt: prequant not recomputed")
            continue
        with as_it_ran(audit):
            chosen = chosen_documents(audit, stage)
            found = evaluate(audit, model, chosen)
        told.append(compare(audit, stage, found, bounds(audit, "standard")) + _drawn(audit, chosen))
    require(bool(told), "result.json has no standard score")
    return "; ".join(told)


def _is_told(audit: Audit, stage: str, asked_for: bool) -> None:
    """Raise Failed where the settings ask for a score that the result has not: the run's is the last one."""
    called = asked_for and not audit.cfg.prequant_only
    lacks = f"the settings ask for stage {stage}, the result has {', '.join(audit.result['stages'])}"
    require(stage in audit.result["stages"] or not called, lacks)


def _drawn(audit: Audit, chosen: Sequence[int] | None) -> str:
    return "" if chosen is None else f" ({len(chosen)}{SAMPLED}{audit.sample_seed})"


# -- E2


def _sampling(script: object, starts: set[int], finished: Callable[[], bool]) -> type:
    """Test-time training that adapts some documents only, those that start there.

    Where A factors are carried from batch to batch, a document's score depends on all before it in its
    rank's queue: they are adapted too, until the last of the wanted ones is done.
    """

    class Sampled(script.ScoreFirstTTT):
        def _wanted(self, batch: object) -> list:
            if self.cfg.ttt_warm_start_a:
                return [] if finished() else batch.documents
            return [document for document in batch.documents if document[1][0] in starts]

        def _adapters(self, batch: object):
            return (
                super()._adapters(batch._replace(documents=wanted))
                if (wanted := self._wanted(batch))
                else None
            )

        def _score_batch(self, batch: object, lora: object, size: int) -> None:
            if lora is not None:
                super()._score_batch(batch._replace(documents=self._wanted(batch)), lora, size)

        def _global_phase(self, done: Sequence) -> None:
            if not finished():  # all ranks have been waited for: they know the same
                super()._global_phase(done)

    return Sampled


def repeat(audit: Audit) -> tuple[Losses, str]:
    """The adaptation, done again on as many ranks as the run had; and what was repeated, in words."""
    chosen, val = chosen_documents(audit, "ttt"), validation(audit)
    found, cfg, script = Losses(val.documents), audit.artifact_model.cfg, audit.script
    count = audit.result["environment"]["ranks"]
    require(type(count) is int and 0 < count <= MOST_RANKS, f"result.json says {count!r} ranks")
    spans = [val.documents[number] for number in chosen or ()]
    kind, units = script.ScoreFirstTTT, None
    if cfg.ttt_sgd:
        kind = script.ScoreFirstSGD
        if chosen is not None:
            units = -(-max(start + length - 1 for start, length in spans) // cfg.ttt_chunk_tokens)
    elif chosen is not None:
        kind = _sampling(script, {start for start, _ in spans}, lambda: bool(found.whole[chosen].all()))

    def work(ranks: object) -> None:
        options = {"looping": audit.looping, "ranks": ranks, "watch": audit.watch(found.see)}
        for _ in itertools.islice(kind(audit.model(), val, cfg, **options).units(), units):
            pass

    with as_it_ran(audit):
        on_ranks(audit, count, work)
    queue = cfg.ttt_sgd or cfg.ttt_warm_start_a
    return found, _drawn(audit, chosen) + ", with all before them" * bool(queue and chosen is not None)


def _inputs(audit: Audit) -> str:
    """What another process needs to look at the same run in the same way."""
    told = audit.options
    options = {"full": told.full, "sample": told.sample, "sample_seed": audit.sample_seed}
    return json.dumps({"folder": str(audit.folder), "data": str(audit.data_folder), "options": options})


def child(text: str) -> None:
    """Another process's part: repeat the adaptation, print the losses as JSON."""
    atexit.register(gc.freeze)  # else Python looks for garbage in all of torch when it ends: 0.5 s
    told = json.loads(text)
    audit = Audit(Path(told["folder"]), data=Path(told["data"]), **told["options"])
    with contextlib.closing(audit):
        try:
            found, how = repeat(audit)
            outcome = {"nats": found.nats.tolist(), "counts": found.counts.tolist(), "how": how}
        except NotChecked as reason:
            outcome = {"reason": str(reason)}
    print(json.dumps(outcome))


START = """
import sys
sys.path.insert(0, sys.argv[1])
from auditing import recompute
recompute.child(sys.argv[2])
"""


@contextlib.contextmanager
def in_background(audit: Audit) -> Iterator[None]:
    """Repeat the adaptation in another process while other checks go on; it ends with the block."""
    if "ttt" not in audit.result["stages"]:
        yield
        return
    tools = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-P", "-c", START, tools, _inputs(audit)]  # not the modules of where we are
    with (
        open(audit.work / "adapted.err", "wb") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        audit.adaptation = process
        try:
            yield
        finally:
            process.kill()


def _outcome(audit: Audit) -> tuple[Losses, str]:
    """What the process in the background found or, where there is none, what is found now."""
    process = getattr(audit, "adaptation", None)
    if process is None:
        return repeat(audit)
    lines = process.communicate()[0].decode().splitlines()
    if process.returncode:
        errors = (audit.work / "adapted.err").read_text(errors="replace").strip().splitlines()
        raise RuntimeError((errors or [f"exit code {process.returncode}"])[-1])
    outcome: Mapping = json.loads(lines[-1])
    if "reason" in outcome:
        raise NotChecked(outcome["reason"])
    found = Losses(validation(audit).documents)
    found.nats, found.counts = np.array(outcome["nats"]), np.array(outcome["counts"])
    return found, outcome["how"]


@check("E2", "adapted score recomputed, by document", RECOMPUTED)
def e2_adapted(audit: Audit) -> str:
    """The adaptation repeated by the repository's evaluator, against documents and totals."""
    _is_told(audit, "ttt", audit.cfg.ttt_enabled)
    if "ttt" not in audit.result["stages"]:
        raise NotChecked(f"nothing adapts: stage {audit.result['final_stage']} gives the score")
    found, how = _outcome(audit)
    ranks = audit.result["environment"]["ranks"]
    return compare(audit, "ttt", found, bounds(audit, "adapted")) + how + f" on {ranks} ranks" * (ranks > 1)
