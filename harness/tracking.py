"""How far a run is, on the terminal and elsewhere: progress, Weights & Biases, TensorBoard."""

import contextlib
import importlib
import math
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from systems.console import Console, lost_consoles
from train_gpt import Config, ConfigError, Ranks, Run, UserError, Watch, Worker


class Progress(Watch):
    """Rate and remaining time of a stage: one line that rewrites itself on a terminal, 50 in the log."""

    def __init__(self, ranks: Ranks):
        self._live = Console(sys.stderr) if ranks.is_main and sys.stderr.isatty() else None
        self._run: Run | None = None
        self._begun: dict[str, tuple[float, int]] = {}  # stage -> when it began, and its lines in the log

    def see(self, kind: str, **facts: object) -> None:
        """Know the run, whose log gets the lines."""
        if kind == "opened":
            self._run = facts["run"]

    def saved(self, stage: str) -> None:
        """A stage begins, perhaps within another one."""
        self._begun[stage] = time.perf_counter(), 0

    def unit(self, stage: str, worker: Worker) -> None:
        """Show how much is done."""
        start, shown = self._begun[stage]
        elapsed, share = time.perf_counter() - start, worker.done / worker.total
        left = elapsed / share - elapsed if share else math.inf
        line = f"{stage} {worker.done:.0f}/{worker.total:.0f} elapsed:{elapsed:.0f}s left:{left:.0f}s"
        meter = getattr(worker, "meter", None)  # an evaluation's: of this rank so far
        if meter and meter.tokens:
            line += f" running_loss:{meter.val_loss:.5g}"
        if self._live:
            self._live.show_progress(line, share >= 1)
        if int(share * 50) > shown:
            self._begun[stage] = start, int(share * 50)
            self._run.log.text(line)


class ConsoleNotice(Watch):
    """Says in the log of a run that a console is given up: a broken pipe, a full disk, a closed terminal.

    It stands behind all other watches, so that they have the event that met the fault before the notice.
    """

    def __init__(self):
        self._said: list[str] = []

    def see(self, kind: str, **facts: object) -> None:
        """Look after each event but the last one, behind which nothing stands."""
        lost = [name for name in lost_consoles() if name not in self._said]
        if kind == "line" and facts["stage"] != "final" and lost:
            self._said += lost
            facts["log"].event("notice", text=f"given up, the run goes on without: {', '.join(lost)}")


def tracker_module(setting: str, value: str, module: str, package: str) -> object:
    """A module that follows a run. Raises ConfigError where its package is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        reason = f"needs the Python package {package}: pip install {package}"
        raise ConfigError(f"{setting}={value}: {reason}") from None


class Trackers(Watch):
    """The numbers of a run's events, sent to Weights & Biases, TensorBoard, or both.

    A number of an event is `stage/key` at the event's step, or at the last one told; validations between
    training steps are `validation/key`. Rank 0 sends. A tracker that fails once is given up, the run goes on.
    """

    def __init__(self, cfg: Config, ranks: Ranks):
        self._step, self._send, self._closing = 0, [], contextlib.ExitStack()
        for setting, start in (("WANDB_PROJECT", self._wandb), ("TENSORBOARD_DIR", self._tensorboard)):
            if (value := getattr(cfg, setting.lower())) and ranks.is_main:
                try:
                    self._send.append(start(cfg))
                except UserError:
                    raise
                except Exception as error:  # whatever a tracker raises: no account, no network, no folder
                    raise ConfigError(f"{setting}={value}: does not start ({error})") from None

    def _wandb(self, cfg: Config) -> Callable:
        wandb = tracker_module("WANDB_PROJECT", cfg.wandb_project, "wandb", "wandb")
        run = wandb.init(project=cfg.wandb_project, name=cfg.run_id, config=cfg.as_env())
        self._closing.callback(run.finish)
        return lambda numbers, step: run.log(numbers, step=step)

    def _tensorboard(self, cfg: Config) -> Callable:
        module = "torch.utils.tensorboard"
        module = tracker_module("TENSORBOARD_DIR", cfg.tensorboard_dir, module, "tensorboard")
        writer = module.SummaryWriter(str(Path(cfg.tensorboard_dir) / cfg.run_id), flush_secs=10)
        self._closing.callback(writer.close)

        def send(numbers: Mapping[str, float], step: int) -> None:
            for name, number in numbers.items():
                writer.add_scalar(name, number, step)

        return send

    def see(self, kind: str, **facts: object) -> None:
        """Send the numbers of a line of the log."""
        if kind != "line":
            return
        stage, values = facts["stage"], facts["values"]
        place = f"{stage}/{values['name']}" if "name" in values else stage
        self._step = values.get("step", self._step)
        if validation := re.fullmatch(r"step_(\d+)", stage):
            place, self._step = "validation", int(validation[1])
        numbers = {
            f"{place}/{k}": v for k, v in values.items() if isinstance(v, (int, float)) and k != "step"
        }
        for send in self._send[:] if numbers else ():
            try:
                send(numbers, self._step)
            except Exception as error:
                self._send.remove(send)
                facts["log"].event("notice", text=f"a tracker failed and is given up: {error}")

    def close(self) -> None:
        """End the tracking."""
        with contextlib.suppress(Exception):
            self._closing.close()
