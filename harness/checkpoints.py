"""Checkpoints: a run that was cut off goes on between units of a stage, or between stages.

The manager knows no stage. It keeps what the run and the other watches say of themselves, and with it the state
of the worker under way: rank 0's for all ranks, or each rank's own.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from harness.guards import Stopped
from harness.ledger import Ledger
from harness.unfinished import CheckpointFolder, UnfinishedRun, lock_folder, read_checkpoint
from train_gpt import (
    ArtifactError,
    Config,
    ConfigError,
    Ranks,
    Run,
    UserError,
    Watch,
    Worker,
    copy_tensors,
)


class Checkpoints(Watch):
    """Keeps where a run is, and takes it up again.

    `<folder>/checkpoints` holds "run" (what it belongs to, results, clock and, within a stage that rank 0 keeps
    for all, the worker's state), "<stage>-<rank>" (a rank's own state) and "weights" (changed within a stage).
    `cfg`, `folder` and `ended` (exit code) are those of the run that goes on; `ledger` is kept with it.
    """

    def __init__(self, cfg: Config, ranks: Ranks, sources: Mapping[str, bytes], watches: Sequence[Watch]):
        self.cfg, self.ranks = cfg, ranks
        self.ledger = next((watch for watch in watches if isinstance(watch, Ledger)), None)
        self._pool, self._writing, self._lock, self._run = ThreadPoolExecutor(1), None, None, None
        self._kept_at, self._last_path, self._epoch_kept = 0.0, "", False
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
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # -- what happens in the run

    def see(self, kind: str, **facts: object) -> None:
        """Take up what is kept, or keep what has come about."""
        run = facts.get("run")
        if kind == "inputs" and self._before:
            run.trains = self._before["trains"]
        elif kind == "opened":
            self._open(run)
        elif kind == "finished":
            self._end_stage(run)
        elif kind == "global_sgd":
            self._keep_weights(facts["model"], facts["phase"])
        elif kind == "ended":
            self._end(facts["code"])
        elif kind == "failed":
            self._say_last_place()

    def _open(self, run: Run) -> None:
        """Go on from the checkpoint in a log that has been opened again, or keep the beginning of a new run."""
        self._run, before = run, self._before
        folder = Path(self.ranks.gather(str(run.log.folder))[0])
        self._checkpoints = folder / "checkpoints"
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        if self.ranks.is_main and self._lock is None:
            self._lock = lock_folder(self._checkpoints)
        if self.ranks.is_main:
            self._set_aside(self._damaged)
        if not before:
            self._keep()
            return
        self._cut_metrics(before["metrics"])
        run.stages, run.finished = before["stages"], before["finished"]
        run.result = before["result"] | {"environment": run.result["environment"]}
        run.result["resumed"] = run.result.get("resumed", 0) + 1
        run.clock.seconds |= before["seconds"]
        self._load_ledger(before["ledgers"][self.ranks.rank :: self.ranks.world_size])
        self._load_outputs(folder)
        if self.ranks.is_main:
            for path in [*folder.glob(".*.tmp"), *self._checkpoints.glob(".*.tmp")]:
                path.unlink()
        run.log.text(f"resumed {folder} {self._place(before)}", console=True)

    def _load_outputs(self, folder: Path) -> None:
        """The weights or the artifact that a finished stage has left. Raises ArtifactError where they are not."""
        run, outputs = self._run, self._before["outputs"]
        for stage, field in (("quantise", "quantized_model_path"), ("train", "model_path")):
            if stage in run.finished:
                path = folder / Path(getattr(run.cfg, field)).name
                data = path.read_bytes() if path.is_file() else b""
                if hashlib.sha256(data).hexdigest() != outputs.get(path.name):
                    text = f"{path}: not what this run wrote, it cannot go on (RESUME=0: a new one)"
                    raise ArtifactError(text)
                if stage == "quantise":
                    run.artifact = data
                else:
                    run.model.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
                return

    @staticmethod
    def _place(values: Mapping) -> str:
        done = [stage for stage in values["finished"] if stage != "count_bytes"]
        return f"within {values['stage']}" if values["stage"] else f"after {', '.join(done) or 'the start'}"

    def saved(self, stage: str) -> dict | None:
        """The state that the last run left of a stage."""
        before, self._kept_at = self._before, time.monotonic()
        if before and before["stage"] == stage and stage not in self._run.finished:
            _, state = next(iter(CheckpointFolder(self._checkpoints, "run").readable({})))
            self._cut_metrics(before["metrics"])
            self._before, self._kept_at = {}, before["clock"]
            return state
        return self._own_state(stage)

    def unit(self, stage: str, worker: Worker) -> None:
        """Where it is time, or the run is told to stop, keep the worker's state."""
        if not worker.kept_by:
            return
        self.ranks.stage_handles_stop = True
        if worker.kept_by == "rank 0":  # by the clock and the signals that all ranks agree on
            stops = worker.stop_requested
            if stops or worker.seconds - self._kept_at >= self.cfg.checkpoint_seconds:
                self._kept_at = worker.seconds
                self._keep(stage, worker, wait=stops)
        else:
            stops, epoch = self.ranks.stop_signal > 0, self._epoch_kept
            if stops or epoch or time.monotonic() - self._kept_at >= self.cfg.checkpoint_seconds:
                self._keep_own(stage, worker, wait=stops or epoch)
            if epoch:
                self._epoch_kept = False
                self.ranks.wait_for_all("kept")  # no rank forgets the last weights while another needs them
        if stops:
            raise Stopped(self.ranks.stop_signal or 15)

    def _end_stage(self, run: Run) -> None:
        self._keep()
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
        self._finish_write()
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
            "clock": worker.seconds if worker else 0.0,
            "stages": run.stages,
            "result": run.result,
            "outputs": self._outputs(),
            "ledgers": ledgers,
        }
        return self._write("run", values | more, state, wait)

    def _outputs(self) -> dict[str, str]:
        """SHA-256 of the files that finished stages have left."""
        run, files = self._run, {"train": "model_path", "quantise": "quantized_model_path"}
        paths = [run.output(field) for stage, field in files.items() if stage in run.finished]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    def _position(self) -> dict[str, object]:
        """Clocks, and the length of metrics.jsonl."""
        self._run.clock.elapsed("train")  # brings all seconds up to now
        size = self._metrics.stat().st_size if self.ranks.is_main else 0
        return {"seconds": self._run.clock.seconds, "metrics": size}

    def _keep_own(self, stage: str, worker: Worker, wait: bool) -> None:
        """Write where this rank is in a stage."""
        values = {"artifact": self._artifact_digest(), "world": self.ranks.world_size} | self._position()
        values |= {"ledger": self._ledger_state(), "events": self._events()}
        self._write(f"{stage}-{self.ranks.rank}", values, worker.state(), wait)
        self._kept_at = time.monotonic()

    def _events(self) -> str:
        """Rank 0's lines of metrics.jsonl since the stage began."""
        if not self.ranks.is_main:
            return ""
        self._told.seek(self._told_from)
        return self._told.read().decode()

    def _keep_weights(self, model: torch.nn.Module, epoch: int) -> None:
        """Write the weights that a stage has changed; rank 0 does, the ranks' own states follow."""
        self._epoch_kept = True
        if self.ranks.is_main:
            values = {"epoch": epoch, "artifact": self._artifact_digest()}
            self._write("weights", values, copy_tensors(dict(model.state_dict()), Tensor.cpu), wait=True)

    def _artifact_digest(self) -> str:
        return hashlib.sha256(self._run.artifact).hexdigest()

    def _write(self, kind: str, values: dict, tensors: object, wait: bool) -> bool:
        """Write in the background, one at a time. What goes wrong is said, and the run goes on."""
        if self._writing and not wait and not self._writing.done():
            self._run.log.text("checkpoint left out: the one before is still being written", console=True)
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
            self._run.log.text(f"checkpoint not written, going on without: {error}", console=True)
            return False
        self._last_path = str(writing.result())
        return True

    # -- what is taken up

    def _own_state(self, stage: str) -> dict | None:
        """The newest state of a stage from which all ranks can go on: of one epoch, with its weights."""
        ranks, damaged, artifact, run = self.ranks, {}, self._artifact_digest(), self._run
        if ranks.is_main:
            self._told_from = self._metrics.stat().st_size
            # The file is opened here: the evaluation itself opens nothing that training wrote (check S4).
            self._told = open(self._metrics, "rb")  # noqa: SIM115 - closed with the process
        ours = {"artifact": artifact, "world": ranks.world_size}.items()
        states = [*CheckpointFolder(self._checkpoints, f"{stage}-{ranks.rank}").readable(damaged)]
        by_epoch = {state["epoch"]: (v, state) for v, state in states[::-1] if ours <= v.items()}
        weights = CheckpointFolder(self._checkpoints, "weights").readable(damaged) if any(by_epoch) else []
        weights = {v["epoch"]: w for v, w in weights if v["artifact"] == artifact}
        ranks.wait_for_all("kept")
        common = set.intersection({0, *weights}, *map(set, ranks.gather(list(by_epoch))))
        self._set_aside(damaged)
        if not common:
            return None
        values, state = by_epoch[max(common)]
        if max(common):
            state["weights"] = weights[max(common)]
        self._load_ledger([values["ledger"]] if values["ledger"] else [])
        if ranks.is_main:
            with open(self._metrics, "a", encoding="utf-8") as file:
                file.write(values["events"])
        run.clock.seconds[stage] = max(ranks.gather(values["seconds"][stage]))
        run.log.text(f"resumed within {stage}", console=True)
        return state

    def _set_aside(self, damaged: Mapping[Path, str]) -> None:
        for path, text in damaged.items():
            with contextlib.suppress(FileNotFoundError):  # another rank has done it
                path.rename(path.with_suffix(".damaged"))
            self._run.log.text(f"{text}; the one before is taken", console=True)

    def _cut_metrics(self, size: int) -> None:
        """Events behind the checkpoint are told again."""
        if self.ranks.is_main:
            os.truncate(self._metrics, min(size, self._metrics.stat().st_size))

    @property
    def _metrics(self) -> Path:
        return self._run.log.folder / "metrics.jsonl"

    def _ledger_state(self) -> dict[str, object]:
        return self.ledger.state() if self.ledger else {}

    def _load_ledger(self, states: Sequence[dict]) -> None:
        if self.ledger:
            self.ledger.load_states(states)
