"""A run's numbers elsewhere: Weights & Biases, TensorBoard."""

import contextlib
import importlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from train_gpt import Config, ConfigError, Ranks, UserError, Watch


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
