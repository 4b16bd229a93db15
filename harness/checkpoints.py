"""Checkpoints: a run that was cut off goes on between steps, stages or batches of adaptation."""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harness.guards import GuardedRun, GuardedTrainer, Stopped
from train_gpt import (
    OUTPUTS,
    ArtifactError,
    Batch,
    BatchedLoRA,
    BpbMeter,
    Config,
    ConfigError,
    Pending,
    Ranks,
    RunError,
    RunLog,
    ScoreFirstTTT,
    StepReport,
    TTTBatch,
    UserError,
    _copy_tensors,
    _new_folder,
    _numbered,
    shard_paths,
    tokenizer_file,
    write_whole,
)

KEPT_MAGIC = b"PGOLFKP1"


def write_kept(path: Path, values: object, tensors: object = None) -> None:
    """Write a checkpoint: magic, SHA-256 of the rest, `torch.save` of values (as JSON) and tensors."""
    buffer = io.BytesIO()
    torch.save({"values": json.dumps(values), "tensors": tensors}, buffer)
    body = buffer.getbuffer()
    write_whole(path, b"".join([KEPT_MAGIC, hashlib.sha256(body).digest(), body]))


def read_kept(path: Path) -> tuple[dict, object]:
    """Values and tensors (on the CPU) of a checkpoint; nothing in it is executed.

    Raises:
        ArtifactError: not readable, not whole or not one of ours.
    """
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from None
    body = memoryview(blob)[40:]
    if blob[:8] != KEPT_MAGIC or hashlib.sha256(body).digest() != blob[8:40]:
        raise ArtifactError(f"{path}: damaged, not a whole checkpoint")
    try:
        state = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        return json.loads(state["values"]), state["tensors"]
    except Exception:  # a right checksum over something else: torch raises half a dozen types
        raise ArtifactError(f"{path}: not a checkpoint of this script") from None


class Shelf:
    """Checkpoints of one kind in a folder, numbered; the last two are kept."""

    def __init__(self, folder: Path, kind: str):
        self.folder, self.kind = folder, kind

    def paths(self) -> list[Path]:
        """The files, oldest first."""
        return sorted(self.folder.glob(f"{self.kind}.*.ckpt"))

    def add(self, values: object, tensors: object = None) -> Path:
        """Write the next one, then remove all but two. Raises RunError where it cannot be written."""
        paths = self.paths()
        number = int(paths[-1].name.split(".")[-2]) + 1 if paths else 1
        path = self.folder / f"{self.kind}.{number:06}.ckpt"
        write_kept(path, values, tensors)
        for old in self.paths()[:-2]:
            old.unlink()
        return path

    def whole(self, damaged: dict[Path, str]) -> Iterable[tuple[dict, object]]:
        """Values and tensors, newest first; what is damaged is collected with its message."""
        for path in reversed(self.paths()):
            try:
                yield read_kept(path)
            except ArtifactError as error:
                damaged[path] = str(error)


def file_digest(path: Path, blocks: int = 64, size: int = 1 << 16) -> str:
    """Hash of a file's size and bytes (all up to 4 MiB, else blocks spread over it); empty: no file."""
    if not path.is_file():
        return ""
    length = path.stat().st_size
    digest = hashlib.sha256(str(length).encode())
    with open(path, "rb") as file:
        for block in range(blocks):
            file.seek(block * max(size, (length - size) // (blocks - 1)))
            digest.update(file.read(size))
    return digest.hexdigest()


class KeptTrainer(GuardedTrainer):
    """A trainer that hands its state to the run every CHECKPOINT_SECONDS, and takes it up again.

    Rank 0's clock, which travels with the gradients, turns negative once that rank is told to stop: so all
    ranks keep the state behind the same step and leave.
    """

    def __init__(self, run: "KeptRun", *arguments: object):
        super().__init__(*arguments)
        self._run, self._reports, self._kept_at = run, [], 0.0

    def warm_up(self, steps: int) -> None:
        """As the trainer's; then go on from the checkpoint where there is one."""
        super().warm_up(steps)
        if self._run.trainer_state:
            self.load_kept(self._run.trainer_state)
            self._run.begin_at_checkpoint()
        self.ranks.polls = True

    def step(
        self, step: int, frac: float, batches: Sequence[Batch] | None = None, elapsed: float = 0.0
    ) -> StepReport:
        """As the trainer's; before it, where it is time, the state behind the last step is kept."""
        if batches is not None:  # the warm-up's
            return super().step(step, frac, batches, elapsed)
        agreed = self._reports[0].elapsed if len(self._reports) > 1 else 0.0  # the clock of all ranks
        if agreed < 0 or agreed - self._kept_at >= self.cfg.checkpoint_seconds:
            self._kept_at = agreed
            self._run.keep(self.kept(step), wait=agreed < 0)
        if agreed < 0:
            raise Stopped(self.ranks.told or signal.SIGTERM)
        report = super().step(step, frac, batches, -1 - elapsed if self.ranks.told else elapsed)
        self._reports = [*self._reports[-1:], report]
        return report

    def kept(self, step: int) -> dict:
        """All that step number `step` (at least 2) depends on: rank 0's, on the CPU. Raises if not finite."""
        clocks = [max(report.elapsed, -1 - report.elapsed) for report in self._reports]
        state = self.snapshot() | {"step": step, "clocks": clocks, "rng": torch.get_rng_state()}
        banks = self.muon.param_groups[0]["params"]
        for number, entry in state["muon"]["state"].items():
            whole = self.ranks.all_gather(entry["momentum_buffer"]).wait()
            entry["momentum_buffer"] = whole[: len(banks[number])]
        return _copy_tensors(state, Tensor.cpu) if self.ranks.is_main else {}

    def load_kept(self, state: dict) -> None:
        """Go back to a state of `kept`, whatever the number of ranks was."""
        ranks, banks = self.ranks, self.muon.param_groups[0]["params"]
        for number, entry in state["muon"]["state"].items():
            whole, per_rank = entry["momentum_buffer"], -(-len(banks[number]) // ranks.world_size)
            padding = whole.new_zeros(per_rank * ranks.world_size - len(whole), *whole.shape[1:])
            entry["momentum_buffer"] = torch.cat([whole, padding]).split(per_rank)[ranks.rank]
        torch.set_rng_state(state["rng"])
        self.restore(state | {"ema": _copy_tensors(state["ema"], lambda tensor: tensor.to(ranks.device))})
        measured = [Pending(torch.tensor([0.0, 0.0, clock, 0.0]), None) for clock in state["clocks"]]
        self._reports = [StepReport(state["step"], values, 1.0, 0.0, self.looping) for values in measured]
        self._kept_at = state["clocks"][0]
        self.position = state["step"], self._kept_at, self._reports[1]


class KeptTTT(ScoreFirstTTT):
    """Test-time training that keeps where it is between batches, each rank for itself.

    A resumed one walks through the same batches and phases, without computing, up to where it was.
    """

    def __init__(self, run: "KeptRun", *arguments: object, **options: object):
        super().__init__(*arguments, **options)
        self._run, self._before, self._told = run, run.ttt_state, self._on_event
        self._done, self._phases, self._reusable, self._kept_at = 0, 0, None, time.monotonic()
        if self._before:
            self._on_event = lambda kind, **data: None

    def _passed(self) -> bool:
        """Count a batch or a phase. True where it was done before; behind the last one all is as it was."""
        self._done += 1
        if not self._before:
            return False
        if self._done == self._before[0]["done"]:
            self._restore(*self._before)
        return True

    def _restore(self, values: dict, tensors: dict) -> None:
        self.meter.add_sums(*values["sums"])
        self.diverged, self._constructed = values["diverged"], values["constructed"]
        self._generator.set_state(tensors["generator"])
        for low_rank, a in zip(self._reusable.maps() if self._reusable else (), tensors["a"], strict=True):
            low_rank.A.data.copy_(a)
        if self._reusable and tensors["active"] is not None:
            self._reusable.active = tensors["active"].to(self.ranks.device)
        self._on_event, self._before = self._told, None
        self._run.load_ledger(values["ledger"])

    def _keep(self, wait: bool = False) -> None:
        reusable = self._reusable
        values = {
            "done": self._done,
            "phases": self._phases,
            "sums": [self.meter.loss_sum, self.meter.bytes, self.meter.tokens],
            "diverged": self.diverged,
            "constructed": self._constructed,
        }
        tensors = {
            "generator": self._generator.get_state(),
            "a": [low_rank.A.detach().cpu().clone() for low_rank in reusable.maps()] if reusable else [],
            "active": reusable.active.cpu() if reusable and reusable.active is not None else None,
        }
        self._run.keep_ttt(values, tensors, wait)
        self._kept_at = time.monotonic()

    def _adapters(self, batch: TTTBatch, reusable: BatchedLoRA | None) -> BatchedLoRA | None:
        self._reusable = reusable
        return None if self._before else super()._adapters(batch, reusable)

    def _score_batch(self, batch: TTTBatch, lora: BatchedLoRA | None) -> None:
        if not self._passed():
            super()._score_batch(batch, lora)
            told = self.ranks.told
            if told or time.monotonic() - self._kept_at >= self.cfg.checkpoint_seconds:
                self._keep(wait=bool(told))
            if told:
                raise Stopped(told)

    def _global_phase(self, phase: int, boundary: int, done: Sequence[TTTBatch]) -> None:
        self._phases, self._reusable = phase, None  # new adapters follow
        if not self._passed():
            super()._global_phase(phase, boundary, done)
            self._run.keep_weights(phase)
            self._keep(wait=True)
            self.ranks.wait_for_all("kept")  # no rank forgets the phase before while another is still there


class KeptRun(GuardedRun):
    """A run that writes checkpoints and goes on from them.

    `<folder>/checkpoints` holds three kinds: "run" (settings and hashes that it belongs to, results, clock
    and, while it trains, the trainer), "ttt-<rank>" (scores and ledger so far), "phase" (weights after one).
    """

    trainer_state = ttt_state = lock = None
    last_checkpoint = ""

    def __init__(self, cfg: Config, ranks: Ranks, source: bytes):
        self._asked, self._pool, self._writing = cfg, ThreadPoolExecutor(1), None
        self._before: dict = {}  # what the checkpoint says that the run goes on from
        self._damaged: dict[Path, str] = {}
        self._outputs: dict[str, str] = {}  # finished output files -> SHA-256
        try:
            super().__init__(cfg, ranks, source)
        except BaseException:
            self._release()
            raise

    def _release(self) -> None:
        self._pool.shutdown()  # what is being written is not given up
        if self.lock is not None:
            os.close(self.lock)

    # -- which run the command goes on with

    def _exists(self, field: str) -> Path | None:
        """As Run's; what this command's unfinished run has trained is not what PREQUANT_ONLY=1 evaluates."""
        path = super()._exists(field)
        if path and self.cfg.prequant_only and self.cfg.resume:
            values, _ = next(Shelf(path.parent / "checkpoints", "run").whole({}), ({}, None))
            path = None if values and "ended" not in values else path
        return path

    def _open_log(self, cfg: Config, ranks: Ranks, *_: object) -> RunLog:
        """The log of the run that is to go on, or of a new one."""
        folder, refusal = None, ""
        ranks.wait_for_all("start")
        if ranks.is_main:
            self.identity = self._identity()
            try:
                folder = self._find() if cfg.resume else None
            except UserError as error:
                refusal = str(error)
        if refusal := ranks.gather(refusal)[0]:
            raise ConfigError(refusal)
        self._before, self.trainer_state = self._spread(self._before, self.trainer_state)
        if self._before:
            cfg = dataclasses.replace(cfg, run_id=self._before["run"])
            self.cfg = dataclasses.replace(self.cfg, resume=self._before["resume"])
        if "ended" in self._before:
            return RunLog(cfg, Ranks(ranks.device, 1))  # nothing is written
        log = super()._open_log(cfg, ranks, lambda *wanted: folder or _new_folder(*wanted))
        self.shelves = Path(ranks.gather(str(log.folder))[0]) / "checkpoints"
        self.shelves.mkdir(parents=True, exist_ok=True)
        if ranks.is_main:
            self.lock = _locked(self.shelves) if self.lock is None else self.lock
        return log

    def _spread(self, values: dict, tensors: object) -> tuple[dict, object]:
        """Rank 0's values and tensors, on every rank."""
        if self.ranks.world_size == 1:
            return values, tensors
        buffer = io.BytesIO()
        torch.save({"values": json.dumps(values), "tensors": tensors}, buffer)
        state = torch.load(io.BytesIO(self._share(buffer.getvalue())), map_location="cpu", weights_only=True)
        return json.loads(state["values"]), state["tensors"]

    def _share(self, data: bytes) -> bytes:
        """Rank 0's bytes, on every rank."""
        ranks, length = self.ranks, self.ranks.gather(len(data))[0]
        if ranks.world_size == 1 or not length:
            return data if ranks.is_main else b""
        buffer = torch.zeros(length, dtype=torch.uint8, device=ranks.device)
        if ranks.is_main:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return ranks.sum_(buffer).cpu().numpy().tobytes()

    def _identity(self) -> dict[str, object]:
        """What the result of a run depends on: settings, hashes of script, data and given files."""
        cfg, settings = self.cfg, self._asked.as_env()
        del settings["RESUME"]
        splits = ["train"] * (self.trains or cfg.quantize_only) + ["val", "val_bytes"]
        files = [path for split in splits for path in shard_paths(cfg.data_folder, split)]
        files += [cfg.data_folder / "manifest.json", tokenizer_file(cfg), self.artifact, self.checkpoint]
        known = {str(path): file_digest(path) for path in files if path}
        return {"settings": settings, "files": known, "script": hashlib.sha256(self.source).hexdigest()}

    def _find(self) -> Path | None:
        """The folder to go on in: the one named or, without a name, that of the newest unfinished run."""
        cfg = self._asked
        if not (cfg.artifact_dir or cfg.run_id):
            kept = [path for path in Path("runs").glob("*/checkpoints") if path.is_dir()]
            kept.sort(key=lambda path: -path.stat().st_mtime)
            return next((path.parent for path in kept if self._take(path, named=False)), None)
        wanted = Path(cfg.artifact_dir or Path("runs") / cfg.run_id)
        there = [folder / "checkpoints" for folder in itertools.takewhile(Path.exists, _numbered(wanted))]
        kept = [path for path in there if path.is_dir()]
        return kept[-1].parent if kept and self._take(kept[-1], named=True) else None

    def _take(self, kept: Path, named: bool) -> bool:
        """Lock a folder and take its newest checkpoint, if that is this command's.

        Raises ConfigError where a folder that was named holds an unfinished run that cannot go on.
        """
        lock, damaged = _locked(kept), {}
        values, tensors = (
            next(Shelf(kept, "run").whole(damaged), ({}, None)) if lock is not None else ({}, None)
        )
        unlike = self._differences(values["identity"]) if values else []
        if (
            named
            and lock is not None
            and not values
            and not damaged
            and _begin_again(kept.parent, self._asked)
        ):
            self.lock = lock
            return True
        if values and not unlike and (named or "ended" not in values):
            self.lock, self._before, self.trainer_state, self._damaged = lock, values, tensors, damaged
            return True
        reason = "; ".join(damaged.values()) if lock is not None else "another process is at work there"
        if lock is not None:
            os.close(lock)
        reason = f"begun with other settings or data: {'; '.join(unlike[:6])}" if unlike else reason
        if named and reason and "ended" not in values:
            raise ConfigError(f"{kept.parent}: this run cannot go on, {reason} (RESUME=0 begins a new one)")
        return False

    def _differences(self, then: Mapping) -> list[str]:
        now, rows = self.identity, []
        for name, value in now["settings"].items():
            other = then["settings"].get(name)
            rows += [f"{name}={value} there {other}"] * (value != other)
        for name in sorted(now["files"].keys() | then["files"].keys()):
            rows += [f"{name} differs"] * (now["files"].get(name) != then["files"].get(name))
        return rows + ["train_gpt.py differs"] * (now["script"] != then["script"])

    def _log_head(self) -> None:
        """As the run's. A resumed run has it in its log again; events behind the checkpoint are cut off."""
        if "ended" in self._before:
            return
        super()._log_head()
        self._set_aside(self._damaged)
        before = self._before
        if not before:
            self.keep()
            return
        self._cut_metrics(before["metrics"])
        self.stages, self._outputs = before["stages"], before["outputs"]
        self.result = before["result"] | {"environment": self.result["environment"]}
        self.result["resumed"] = self.result.get("resumed", 0) + 1
        self.watch.seconds |= before["seconds"]
        self.load_ledger(*before["ledgers"][self.ranks.rank :: self.ranks.world_size])
        if self.ranks.is_main:
            for path in [*self.log.folder.glob(".*.tmp"), *self.shelves.glob(".*.tmp")]:
                path.unlink()
        where = self._place(before, self.trainer_state)
        self.log.text(f"resumed {self.log.folder} {where}", console=True)

    @staticmethod
    def _place(values: Mapping[str, Mapping], trainer: Mapping | None) -> str:
        trained = "steps" in values["result"] and "prequant" not in values["stages"]
        done = ", ".join([*values["stages"], *["training"] * trained]) or "the start"
        return f"at step {trainer['step']}" if trainer else f"after {done}"

    def _what_is_kept(self) -> str:
        """What a failure's message adds: the newest whole checkpoint, which a resumed run too may have."""
        for path in Shelf(self.shelves, "run").paths()[::-1] if self.ranks.is_main else ():
            with contextlib.suppress(ArtifactError):
                values, trainer = read_kept(path)
                place = self._place(values, trainer)
                return f"; last checkpoint {path} {place}, the same command (RESUME=1) goes on from it"
        return ""

    def _set_aside(self, damaged: Mapping[Path, str]) -> None:
        for path, text in damaged.items():
            path.rename(path.with_suffix(".damaged"))
            self.log.text(f"{text}; the one before is taken", console=True)

    def begin_at_checkpoint(self) -> None:
        """The trainer's state has been taken up; events told on the way there have been told before."""
        self.trainer_state = None
        self._cut_metrics(self._before["metrics"])

    def _cut_metrics(self, size: int) -> None:
        if self.ranks.is_main:
            os.truncate(self._metrics, min(size, self._metrics.stat().st_size))

    @property
    def _metrics(self) -> Path:
        return self.log.folder / "metrics.jsonl"

    # -- what is kept

    def keep(self, tensors: dict | None = None, wait: bool = True, **more: object) -> bool:
        """Write where the run is; in the background, with the trainer's state, while it trains.

        All ranks call it, rank 0 writes. False where that failed.
        """
        self.ranks.wait_for_all("keep")  # rank 0 may have had a long ledger to write
        ledgers = self.ranks.gather(self._ledger_state())
        values = self._position() | {
            "identity": self.identity if self.ranks.is_main else {},
            "run": self.log.run_id,
            "folder": str(self.log.folder),
            "resume": self.cfg.resume,
            "stages": self.stages,
            "result": self.result,
            "outputs": self._outputs,
            "ledgers": ledgers,
        }
        return not self.ranks.is_main or self._write("run", values | more, tensors, wait)

    def _position(self) -> dict[str, object]:
        """Clocks, and the length of metrics.jsonl."""
        self.watch.elapsed("train")  # brings all seconds up to now
        size = self._metrics.stat().st_size if self.ranks.is_main else 0
        return {"seconds": self.watch.seconds, "metrics": size}

    def _write(self, kind: str, values: dict, tensors: object, wait: bool) -> bool:
        """Write in the background, one at a time. What goes wrong is said, and the run goes on."""
        if self._writing and not wait and not self._writing.done():
            self.log.text("checkpoint left out: the one before is still being written", console=True)
            return False
        self._settle()
        values = json.loads(json.dumps(values))  # as they are now
        self._writing = self._pool.submit(Shelf(self.shelves, kind).add, values, tensors)
        return not wait or self._settle()

    def _settle(self) -> bool:
        """Wait for the checkpoint that is being written; False where that failed."""
        writing, self._writing = self._writing, None
        if not writing:
            return True
        if error := writing.exception():
            self.log.text(f"checkpoint not written, going on without: {error}", console=True)
            return False
        self.last_checkpoint = str(writing.result())
        return True

    def keep_ttt(self, values: dict, tensors: dict, wait: bool) -> None:
        """Write where this rank's adaptation is."""
        values |= {"artifact": self._artifact_digest(), "world": self.ranks.world_size}
        self._told.seek(self._ttt_events)
        values |= {"ledger": self._ledger_state(), "events": self._told.read().decode()} | self._position()
        self._write(f"ttt-{self.ranks.rank}", values, tensors, wait)

    def keep_weights(self, phase: int) -> None:
        """Write the weights that a phase has left behind; rank 0 does."""
        if self.ranks.is_main:
            values = {"phase": phase, "artifact": self._artifact_digest()}
            weights = _copy_tensors(dict(self.model.state_dict()), Tensor.cpu)
            self._write("phase", values, weights, wait=True)

    def _artifact_digest(self) -> str:
        return hashlib.sha256(self.blob).hexdigest()

    def _ledger_state(self) -> dict[str, object]:
        if not self.ledger:
            return {}
        ledger, clock = self.ledger, time.perf_counter() - self.ledger.start
        accesses = [[*key, when] for key, when in list(ledger.accesses.items())]
        state = {"records": list(ledger.records), "order": ledger.order}
        state |= {"base": ledger.base, "lora": list(ledger.lora)}
        losses = {stage: sums.tolist() for stage, sums in ledger.losses.items()}
        return state | {"losses": losses, "clock": clock, "accesses": accesses}

    def load_ledger(self, *states: dict) -> None:
        """Give the ledger back its records, its counters and its clock, and what was opened before.

        Behind this rank's state may stand those of ranks that are gone: their records and losses join in.
        """
        if not (self.ledger and states):
            return
        ledger, (own, *_) = self.ledger, states
        ledger.order, ledger.base, ledger.lora = own["order"], own["base"], own["lora"]
        ledger.start = time.perf_counter() - own["clock"]
        ledger.records, ledger.losses = [], {}
        for state in states:
            ledger.records += state["records"]
            for stage, sums in state["losses"].items():
                ledger.losses[stage] = ledger.losses.get(stage, 0.0) + np.array(sums)
            for *key, when in state["accesses"]:
                ledger.accesses.setdefault(tuple(key), when)

    # -- the stages, each once

    def new_trainer(self, *arguments: object) -> KeptTrainer:
        """A trainer that keeps its state."""
        return KeptTrainer(self, *arguments)

    def score_ttt(self, *arguments: object, **options: object) -> BpbMeter:
        """Test-time training that keeps its state."""
        return KeptTTT(self, *arguments, **options).run()

    def _output(self, field: str) -> bytes:
        """Contents of a finished output file, on every rank; nothing where there is none, or another."""
        path, blob = self.log.folder / Path(getattr(self.cfg, field)).name, b""
        if self.ranks.is_main and path.name in self._outputs:
            blob = path.read_bytes() if path.is_file() else b""
            if hashlib.sha256(blob).hexdigest() != self._outputs[path.name]:
                self.log.text(f"{path}: not what this run wrote", console=True)
                blob = b""
        return self._share(blob)

    def _note_output(self, field: str) -> None:
        path = self.log.folder / Path(getattr(self.cfg, field)).name
        if self.ranks.is_main:
            self._outputs[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()

    def _stop_polling(self) -> None:
        """The end of a stage that looked for signals itself."""
        self.keep()
        self.ranks.polls = False
        if self.ranks.told:
            raise Stopped(self.ranks.told)

    def train(self) -> None:
        """Train, or take the weights that are there."""
        if "steps" not in self.result:
            super().train()
            self._note_output("model_path")
            self._stop_polling()
        elif not self._output("quantized_model_path"):
            blob = self._output("model_path")
            if not blob:
                path = self.log.folder / Path(self.cfg.model_path).name
                raise ArtifactError(f"{path}: not what this run wrote, it cannot go on (RESUME=0: a new one)")
            self.model.load_state_dict(torch.load(io.BytesIO(blob), weights_only=True))

    def evaluate(self, stage: str, looping: bool | None = None) -> None:
        """Standard evaluation, if it has not been made."""
        if stage not in self.stages:
            super().evaluate(stage, looping)

    def record(self, stage: str, meter: BpbMeter, documents: Sequence[tuple[int, int]]) -> None:
        """As GuardedRun's; what has been scored is kept (a stage that polls keeps more, by itself)."""
        super().record(stage, meter, documents)
        if not self.ranks.polls:
            self.keep()

    def quantise(self) -> Path:
        """Make the artifact, or take the one that is there."""
        if blob := self._output("quantized_model_path"):
            self.blob = blob
            return self.log.folder / Path(self.cfg.quantized_model_path).name
        path = super().quantise()
        self._note_output("quantized_model_path")
        self.keep()
        return path

    def count_bytes(self) -> None:
        """Pack the script, if that has not been done."""
        if "code_bytes" not in self.result or not (self.log.folder / "train_gpt.packed.py").is_file():
            super().count_bytes()

    def adapt(self) -> None:
        """Test-time training, from where it was."""
        if "ttt" not in self.stages:
            self._find_ttt()
            self.ranks.polls = True
            # opened here, as the evaluation itself opens nothing that training wrote (check S4 of the audit)
            with open(self._metrics if self.ranks.is_main else os.devnull, "rb") as self._told:
                super().adapt()
            self._stop_polling()

    def _find_ttt(self) -> None:
        """Take the newest states from which all ranks can go on: of one phase, with its weights."""
        ranks, damaged, artifact = self.ranks, {}, self._artifact_digest()
        self._ttt_events = self._metrics.stat().st_size if ranks.is_main else 0
        ours = {"artifact": artifact, "world": ranks.world_size}.items()
        states = Shelf(self.shelves, f"ttt-{ranks.rank}").whole(damaged)
        states = {state[0]["phases"]: state for state in [*states][::-1] if ours <= state[0].items()}
        weights = Shelf(self.shelves, "phase").whole(damaged) if ranks.is_main else []
        weights = {values["phase"]: w for values, w in weights if values["artifact"] == artifact}
        ranks.wait_for_all("kept")
        common = set.intersection({0, *ranks.gather(list(weights))[0]}, *map(set, ranks.gather(list(states))))
        self._set_aside(damaged)
        if not common:
            return
        phase = max(common)
        self.ttt_state = values, _ = states[phase]
        if phase:
            self.model.load_state_dict(self._spread({}, weights.get(phase))[1])
        if ranks.is_main:
            with open(self._metrics, "a", encoding="utf-8") as file:
                file.write(values["events"])
        self.watch.seconds["ttt"] = max(ranks.gather(values["seconds"]["ttt"]))
        self.log.text(f"resumed ttt after {values['sums'][2]:.0f} targets of rank 0", console=True)

    def execute(self) -> int:
        """All stages that are left; then the checkpoints go, but for the one that says that all is done."""
        if "ended" in self._before:
            if self.ranks.is_main:
                print(
                    f"{self._before['folder']}: this run has ended, see its result.json (RESUME=0: a new one)"
                )
            return self._before["ended"]
        try:
            code = super().execute()
            self._settle()  # all ranks, before the first of them removes anything
            if self.keep(ended=code):
                main = self.ranks.is_main
                for path in sorted(self.shelves.glob("*" if main else f"ttt-{self.ranks.rank}.*")):
                    if not main or str(path) != self.last_checkpoint:
                        path.unlink(missing_ok=True)
            return code
        except RunError as error:  # a loss that is not finite, say
            self._settle()
            raise RunError(f"{error}{self._what_is_kept()}") from None
        finally:
            self._release()


def _locked(folder: Path) -> int | None:
    """Lock a folder for as long as this process lives; None where another process has it."""
    import fcntl

    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _begin_again(folder: Path, cfg: Config) -> bool:
    """Clear a folder in which a run was cut off before its first checkpoint; False where it made outputs."""
    names = Path(cfg.model_path).name, Path(cfg.quantized_model_path).name, *OUTPUTS[1:]
    if any((folder / name).exists() for name in names):
        return False
    for path in [folder / OUTPUTS[0], *(folder / "logs").glob("*.txt"), *folder.glob(".*.tmp")]:
        path.unlink(missing_ok=True)
    return True
