"""What is shown of a run elsewhere: progress on a terminal, Weights & Biases, TensorBoard."""

import contextlib
import dataclasses
import importlib.util
import math
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from train_gpt import CPU, Config, ConfigError, Ranks, RunLog, UserError, run_name


def tracker_module(setting: str, value: str, module: str, package: str) -> object:
    """A module that follows a run. Raises ConfigError where its package is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        reason = f"needs the Python package {package}: pip install {package}"
        raise ConfigError(f"{setting}={value}: {reason}") from None


class TrackedLog(RunLog):
    """A log whose numbers can be watched from elsewhere: Weights & Biases, TensorBoard, or both.

    A number of an event is `stage/key` at the event's step, or at the last one told; validations between
    training steps are `validation/key`. Rank 0 sends. A tracker that fails once is given up, the run goes on.
    """

    def __init__(self, cfg: Config, ranks: Ranks = CPU, *choose: Callable[..., Path]):
        cfg = dataclasses.replace(cfg, run_id=run_name(cfg))
        self._step, self._trackers, self._closing = 0, [], contextlib.ExitStack()
        for setting, start in (("WANDB_PROJECT", self._wandb), ("TENSORBOARD_DIR", self._tensorboard)):
            if (value := getattr(cfg, setting.lower())) and ranks.is_main:
                try:
                    start(cfg)
                except UserError:
                    raise
                except Exception as error:  # whatever a tracker raises: no account, no network, no folder
                    raise ConfigError(f"{setting}={value}: does not start ({error})") from None
        super().__init__(cfg, ranks, *choose)

    def _wandb(self, cfg: Config) -> None:
        wandb = tracker_module("WANDB_PROJECT", cfg.wandb_project, "wandb", "wandb")
        run = wandb.init(project=cfg.wandb_project, name=cfg.run_id, config=cfg.as_env())
        self._closing.callback(run.finish)
        self._trackers.append(lambda numbers, step: run.log(numbers, step=step))

    def _tensorboard(self, cfg: Config) -> None:
        module = "torch.utils.tensorboard"
        module = tracker_module("TENSORBOARD_DIR", cfg.tensorboard_dir, module, "tensorboard")
        writer = module.SummaryWriter(str(Path(cfg.tensorboard_dir) / cfg.run_id), flush_secs=10)
        self._closing.callback(writer.close)

        def send(numbers: Mapping[str, float], step: int) -> None:
            for name, number in numbers.items():
                writer.add_scalar(name, number, step)

        self._trackers.append(send)

    def event(self, stage: str, **values: object) -> None:
        """As `RunLog.event`, and its numbers to the trackers."""
        super().event(stage, **values)
        place = f"{stage}/{values['name']}" if "name" in values else stage
        self._step = values.get("step", self._step)
        if validation := re.fullmatch(r"step_(\d+)", stage):
            place, self._step = "validation", int(validation[1])
        numbers = {
            f"{place}/{k}": v for k, v in values.items() if isinstance(v, (int, float)) and k != "step"
        }
        for tracker in self._trackers[:]:
            try:
                tracker(numbers, self._step)
            except Exception as error:
                self._trackers.remove(tracker)
                super().event("notice", text=f"a tracker failed and is given up: {error}")

    def close(self) -> None:
        """Close the files, end the tracking."""
        super().close()
        with contextlib.suppress(Exception):
            self._closing.close()


class Progress:
    """Rate and remaining time of a stage: one line that rewrites itself on a terminal, 50 in the log."""

    def __init__(self, log: RunLog, stage: str, total: float):
        self._log, self._stage, self._total = log, stage, total
        self._start, self._shown, self._live = time.perf_counter(), 0, log.is_main and sys.stderr.isatty()

    def update(self, done: float, **values: float) -> None:
        """Tell how many of the total are done, with values to show."""
        elapsed = time.perf_counter() - self._start
        share = done / self._total
        shown = " ".join(f"{name}:{value:.5g}" for name, value in values.items())
        left = elapsed / share - elapsed if share else math.inf
        line = f"{self._stage} {done:.0f}/{self._total:.0f} elapsed:{elapsed:.0f}s left:{left:.0f}s {shown}"
        if self._live:
            end = "\n" if done >= self._total else ""
            print(f"\r\x1b[K{line}", end=end, file=sys.stderr, flush=True)
        if int(share * 50) > self._shown:
            self._shown = int(share * 50)
            self._log.text(line)
