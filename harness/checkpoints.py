"""Checkpoints: a run that was cut off goes on between units of a stage, or between stages.

The manager knows no stage. It keeps what the run and the ledger say of themselves, and with it the state of
the worker under way: rank 0's for all ranks, or each rank's own.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from harness.ledger import Ledger
from harness.stopping import Stopped
from harness.unfinished import CheckpointFolder, UnfinishedRun, lock_folder, read_checkpoint, unlike
from train_gpt import (
    ArtifactError,
    Config,
    ConfigError,
    Ranks,
    RunLog,
    UserError,
    Watch,
    Worker,
    copy_tensors,
)

OUTPUTS_OF = {  # stage -> the file that it leaves: its name, or the setting that has it; the latest first
    "count_bytes": "train_gpt.packed.py",
    "quantise": "quantized_model_path",
    "train": "model_path",
}


class Checkpoints(Watch):
    """Keeps where a run is, and takes it up again.

    `<folder>/checkpoints` holds "run" (what it belongs to, results, clock; within a stage that rank 0 keeps
    for all also the worker's state), "<stage>-<rank>" (a rank's own state), "weights" (changed in a stage).
    `cfg`, `folder` and `ended` (exit code) are those of the run that goes on; `ledger` is kept with it.
    """

    def __init__(self, cfg: Config, ranks: Ranks, sources: Mapping[str, bytes], watches: Sequence[Watch]):
        self.cfg, self.ranks = cfg, ranks
        self.ledger = next((watch for watch in watches if isinstance(watch, Ledger)), None)
        self._pool, self._writing, self._lock = ThreadPoolExecutor(1), None, None
        self._outputs: dict[str, str] = {}  # stage -> SHA-256 of the file that it has left
        self._last_path, self._told, self._told_from = "", None, 0  # metrics.jsonl since the last of "run"
        self._began, self._kept_at = 0.0, 0.0  # when the stage began; its clock at the last checkpoint
        self._epoch, self._epoch_kept = 0, False  # how often the weights were changed; whether just now
        ranks.wait_for_all("start")
        found, refusal = None, ""
        if ranks.is_main:
            try:
                found = UnfinishedRun(cfg, sources)
                self._lock = found.lock
            except UserError as error:
                refusal = str(error)
        if refusal := ranks.gather(refusal)[0]:
            self.close()
            raise ConfigError(refusal)
        facts = (found.folder, found.values, found.damaged, found.identity) if found else None
        self.folder, self._before, self._damaged, self.identity = ranks.gather(facts)[0]
        self.ended = self._before.get("ended")
        if self.ended is not None and ranks.is_main:
            print(f"{self.folder}: this run has ended, see its result.json (RESUME=0: a new one)")
        if self._before:
            self.cfg = dataclasses.replace(cfg, run_id=self._before["run_id"], resume=self._before["resume"])

    def close(self) -> None:
        """Let what is being written be written; free the folder."""
        self._pool.shutdown()
        if self._told:
            self._told.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # -- what happens in the run

    def see(self, kind: str, **facts: object) -> None:
        """Take up what is kept, or keep what has come about."""
        if kind == "inputs":
            self._run = facts["run"]
            self._run.trains = self._before.get("trains", self._run.trains)
        elif kind == "folder":
            self._claim_folder(facts["log"])
        elif kind == "opened":
            self._open()
        elif kind == "finished":
            self._end_stage(facts["stage"])
        elif kind == "global_sgd":
            self._keep_weights(facts["model"], facts["phase"])
        elif kind == "ended":
            self._end(facts["code"])
        elif kind == "failed":
            self._say_last_place()

    def _claim_folder(self, log: RunLog) -> None:
        """Own the run's folder: the same command comes back to it wherever the run is cut off now."""
        self._checkpoints = Path(self.ranks.gather(str(log.folder))[0]) / "checkpoints"
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        self._metrics = self._checkpoints.with_name("metrics.jsonl")
        if self.ranks.is_main:
            self._lock = lock_folder(self._checkpoints) if self._lock is None else self._lock
            # The file is opened here: an evaluation opens nothing that training wrote (check S4).
            self._told = open(self._metrics, "rb")  # noqa: SIM115 - `close` does

    def _open(self) -> None:
        """Go on from the checkpoint in a log that has been opened again, or keep a new run's beginning."""
        run, before, ranks = self._run, self._before, self.ranks
        self._set_aside(self._damaged)
        own = [path.name.partition("-")[0] for path in self._checkpoints.glob("*-*.ckpt")]
        self._own_stages = set(ranks.gather(own)[0])
        if not before:
            self._keep()
            return
        self._cut_metrics(before["metrics"])
        self._told_from = before["metrics"]
        run.stages, run.finished = before["stages"], before["finished"]
        run.result = before["result"] | {"environment": run.result["environment"]}
        run.result["resumed"] = run.result.get("resumed", 0) + 1
        run.clock.seconds |= before["seconds"]
        self._load_ledgers(before["ledgers"])
        self._load_outputs()
        if ranks.is_main:
            for path in [*self._checkpoints.parent.glob(".*.tmp"), *self._checkpoints.glob(".*.tmp")]:
                path.unlink()
        run.log.text(f"resumed {self._checkpoints.parent} {self._place(before)}", said=True)
        if others := unlike(self.identity["places"], before["identity"]["places"]):
            run.log.text(f"resumed with what no number depends on: {'; '.join(others)}", said=True)

    def _output(self, stage: str) -> tuple[Path, bytes]:
        """The file that a stage leaves, and what is in it (nothing where it is missing)."""
        name = OUTPUTS_OF[stage]
        path = self._checkpoints.with_name(Path(getattr(self._run.cfg, name, name)).name)
        return path, path.read_bytes() if path.is_file() else b""

    def _load_outputs(self) -> None:
        """Take the artifact or the weights of a finished stage. A stage whose file is wrong is done again.

        Raises ArtifactError where that stage is the training.
        """
        run, self._outputs = self._run, self._before["outputs"]
        for stage in [stage for stage in OUTPUTS_OF if stage in run.finished]:
            path, data = self._output(stage)
            if hashlib.sha256(data).hexdigest() != self._outputs[stage]:
                text = f"{path}: not what this run wrote"
                if stage == "train":
                    raise ArtifactError(f"{text}, it cannot go on (RESUME=0: a new one)")
                run.log.text(f"{text}, it is made again", said=True)
                run.finished.remove(stage)
            elif stage == "quantise":
                run.artifact = data
                return
            elif stage == "train":
                run.model.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))

    @staticmethod
    def _place(values: Mapping) -> str:
        done = [stage for stage in values["finished"] if stage != "count_bytes"]
        within = f"within {values['stage']} ({values['done']})"
        return within if values["stage"] else f"after {', '.join(done) or 'the start'}"

    def saved(self, stage: str) -> dict | None:
        """The state that the last run left of a stage."""
        before, self._began = self._before, time.monotonic()
        if before and before["stage"] == stage:
            _, state = next(iter(CheckpointFolder(self._checkpoints, "run").readable({})))
            self._cut_metrics(before["metrics"])
            self._load_ledgers(before["ledgers"])  # what has been told since is told again
            self._before, self._kept_at = {}, before["clock"]
            return state
        return self._own_state(stage) if stage in self._own_stages else None

    def unit(self, stage: str, worker: Worker) -> None:
        """Where it is time, or the run is told to stop, keep the worker's state."""
        if not worker.kept_by:
            return
        ranks, for_all = self.ranks, worker.kept_by == "rank 0"
        ranks.stage_handles_stop = True
        # What is kept for all is kept by a clock and signals that all ranks agree on.
        stops = worker.stop_requested if for_all else ranks.stop_signal > 0
        clock = worker.seconds if for_all else time.monotonic() - self._began
        waits = stops or self._epoch_kept
        if waits or clock - self._kept_at >= self.cfg.checkpoint_seconds:
            self._kept_at = clock
            (self._keep if for_all else self._keep_own)(stage, worker, wait=waits)
        if self._epoch_kept:
            self._epoch_kept = False
            ranks.wait_for_all("kept")  # no rank forgets the last weights while another needs them
        if stops:
            raise Stopped(ranks.stop_signal or signal.SIGTERM)

    def _end_stage(self, stage: str) -> None:
        """Note what the stage has left behind, and that it is over."""
        if stage in OUTPUTS_OF and self.ranks.is_main:
            self._outputs[stage] = hashlib.sha256(self._output(stage)[1]).hexdigest()
        self._keep()
        self._kept_at, self._epoch = 0.0, 0
        self.ranks.stage_handles_stop = False
        if self.ranks.stop_signal:
            raise Stopped(self.ranks.stop_signal)

    def _end(self, code: int) -> None:
        """The run has ended: all checkpoints go but for the one that says so."""
        self._finish_write()  # all ranks, before the first of them removes anything
        if self._keep(ended=code):
            main = self.ranks.is_main
            for path in sorted(self._checkpoints.glob("*" if main else f"*-{self.ranks.rank}.*")):
                if not main or str(path) != self._last_path:
                    path.unlink(missing_ok=True)

    def _say_last_place(self) -> None:
        """Name the newest whole checkpoint, which a resumed run may have too."""
        if self._writing:
            self._writing.exception()  # waits for it
        for path in CheckpointFolder(self._checkpoints, "run").paths()[::-1] if self.ranks.is_main else ():
            with contextlib.suppress(ArtifactError):
                place = self._place(read_checkpoint(path)[0])
                text = f"last checkpoint {path} {place}, the same command (RESUME=1) goes on from it"
                return self.ranks.say(text)

    # -- what is kept

    def _keep(self, stage: str = "", worker: Worker | None = None, wait: bool = True, **more: object) -> bool:
        """Write where the run is; in the background, with the worker's state, within a stage.

        All ranks call it, rank 0 writes. False where that failed.
        """
        run, ranks = self._run, self.ranks
        ranks.wait_for_all("keep")  # rank 0 may have had a long ledger to write
        state, ledgers = worker.state() if worker else None, ranks.gather(self._ledger_state())
        if not ranks.is_main:
            return True
        values = self._position() | {
            "identity": self.identity,
            "run_id": run.log.run_id,
            "resume": run.cfg.resume,
            "trains": run.trains,
            "finished": run.finished,
            "stage": stage,
            "done": f"{worker.done:.0f}/{worker.total:.0f}" if worker else "",
            "clock": worker.seconds if worker else 0.0,
            "stages": run.stages,
            "result": run.result,
            "outputs": self._outputs,
            "ledgers": ledgers,
        }
        self._told_from = values["metrics"]
        return self._write("run", values | more, state, wait)

    def _position(self) -> dict[str, object]:
        """Clocks, and the length of metrics.jsonl."""
        self._run.clock.elapsed("")  # brings all seconds up to now
        size = self._metrics.stat().st_size if self.ranks.is_main else 0
        return {"seconds": self._run.clock.seconds, "metrics": size}

    def _keep_own(self, stage: str, worker: Worker, wait: bool) -> None:
        """Write where this rank is in a stage."""
        ledger = self._ledger_state()  # first, so that its clock is none ahead of the stage's
        values = self._owner() | self._position() | {"epoch": self._epoch, "ledger": ledger}
        values["events"] = self._events()
        self._write(f"{stage}-{self.ranks.rank}", values, worker.state(), wait)

    def _owner(self) -> dict[str, object]:
        """What states and weights within a stage belong to."""
        artifact = hashlib.sha256(self._run.artifact).hexdigest()
        return {"artifact": artifact, "world": self.ranks.world_size}

    def _events(self) -> str:
        """Rank 0's lines of metrics.jsonl since the last checkpoint of "run", when the stage before ended."""
        if not self.ranks.is_main:
            return ""
        self._told.seek(self._told_from)
        return self._told.read().decode()

    def _keep_weights(self, model: torch.nn.Module, epoch: int) -> None:
        """Write the weights that a stage has changed; rank 0 does, the ranks' own states follow."""
        self._epoch, self._epoch_kept = epoch, True
        if self.ranks.is_main:
            weights = copy_tensors(dict(model.state_dict()), Tensor.cpu)
            self._write("weights", self._owner() | {"epoch": epoch}, weights, wait=True)

    def _write(self, kind: str, values: dict, tensors: object, wait: bool) -> bool:
        """Write in the background, one at a time. What goes wrong is said, and the run goes on."""
        if self._writing and not wait and not self._writing.done():
            self._run.log.text("checkpoint left out: the one before is still being written", said=True)
            return False
        self._finish_write()
        values = json.loads(json.dumps(values))  # as they are now
        self._writing = self._pool.submit(CheckpointFolder(self._checkpoints, kind).add, values, tensors)
        return not wait or self._finish_write()

    def _finish_write(self) -> bool:
        """Wait for the checkpoint that is being written; False where that failed."""
        writing, self._writing = self._writing, None
        if not writing:
            return True
        if error := writing.exception():
            self._run.log.text(f"checkpoint not written, going on without: {error}", said=True)
            return False
        self._last_path = str(writing.result())
        return True

    # -- what is taken up

    def _own_state(self, stage: str) -> dict | None:
        """The newest state of a stage from which all ranks can go on: of one epoch, with its weights."""
        ranks, run, damaged, ours = self.ranks, self._run, {}, self._owner().items()

        def by_epoch(kind: str) -> dict[int, tuple[dict, dict]]:
            found = [*CheckpointFolder(self._checkpoints, kind).readable(damaged)][::-1]
            return {v["epoch"]: (v, tensors) for v, tensors in found if ours <= v.items()}

        states, weights = by_epoch(f"{stage}-{ranks.rank}"), by_epoch("weights")
        ranks.wait_for_all("kept")
        common = set.intersection({0, *weights}, *map(set, ranks.gather(list(states))))
        self._set_aside(damaged)
        if not common:
            return None
        self._epoch = max(common)
        values, state = states[self._epoch]
        if self._epoch:
            state["weights"] = weights[self._epoch][1]
        if self.ledger:
            self.ledger.load_states([values["ledger"]], values["ledger"]["head"])
        self._cut_metrics(self._told_from)
        if ranks.is_main:
            with open(self._metrics, "a", encoding="utf-8") as file:
                file.write(values["events"])
        run.clock.seconds[stage] = max(ranks.gather(values["seconds"][stage]))
        run.log.text(f"resumed within {stage}", said=True)
        return state

    def _set_aside(self, damaged: Mapping[Path, str]) -> None:
        for path, text in damaged.items():
            with contextlib.suppress(FileNotFoundError):  # another rank has done it
                path.rename(path.with_suffix(".damaged"))
            self._run.log.text(f"{text}; the one before is taken", said=True)

    def _cut_metrics(self, size: int) -> None:
        """Events behind the checkpoint are told again."""
        if self.ranks.is_main:
            os.truncate(self._metrics, min(size, self._metrics.stat().st_size))

    def _ledger_state(self) -> dict[str, object]:
        return self.ledger.state() if self.ledger else {}

    def _load_ledgers(self, states: Sequence[dict]) -> None:
        """Let the ledger go on from what those of all ranks said, however many there were."""
        if self.ledger:
            own = states[self.ranks.rank :: self.ranks.world_size]
            self.ledger.load_states(own, states[0]["head"])
