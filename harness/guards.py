"""What watches over a run: signals, speed, an artifact that is too large."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from harness.backends import unused_attention
from harness.preflight import Preflight
from train_gpt import (
    _NAMES,
    CPU,
    GPT,
    SIZE_LIMIT,
    BpbMeter,
    Config,
    ConfigError,
    Ranks,
    Run,
    RunError,
    RunLog,
    StepReport,
    Trainer,
    UserError,
    _run,
    factorise,
    one_line,
    pack_artifact,
    quantize_state,
    write_whole,
)


class Stopped(BaseException):
    """SIGTERM or SIGINT: everything is left whole; exit code 128 + number."""

    stage = "start"

    def __init__(self, number: int):
        super().__init__(f"told to stop ({signal.Signals(number).name})")
        self.code = 128 + number


FALLBACK = [(1.03, True), *((factor, False) for factor in (1.03, 1.1, 1.25, 1.5, 2.0))]  # clips, LQER


def fall_back(
    flat: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    cfg: Config,
    budget: int,
    blob: bytes,
    log: RunLog,
    ranks: Ranks = CPU,
) -> tuple[bytes, dict[str, object]]:
    """An artifact of at most `budget` bytes: coarser and coarser steps, then without correction.

    `blob`, which is too large, comes back where nothing fits. Returns with it what to say of it.
    """
    log.event("fallback", bytes_left=budget - len(blob))
    factors = {id(hessian): factorise(hessian) for hessian in hessians.values()}
    shared = {name: factors[id(hessian)] for name, hessian in hessians.items()}
    for factor, lqer in FALLBACK:
        if lqer > cfg.lqer_enabled:
            continue
        clips = {name: factor * getattr(cfg, name) for name in _NAMES if name.endswith("_clip_sigmas")}
        rung = dataclasses.replace(cfg, lqer_enabled=lqer, **clips)
        records = quantize_state(flat, shared, rung, None, ranks)
        ranks.wait_for_all("fall back")
        smaller = ranks.gather(pack_artifact(records, rung) if ranks.is_main else b"")[0]
        said = {"clip_factor": factor, "lqer": int(lqer)}
        log.event("fallback", bytes_left=budget - len(smaller), **said)
        if len(smaller) <= budget:
            return smaller, {"fallback": said}
    return blob, {}


class GuardedTrainer(Trainer):
    """Measures the warm-up: `pace`, seconds of a step at the last ten or half of them, by layer order."""

    warmed: Callable[["GuardedTrainer"], None] | None = None  # called after the warm-up, off the clock

    def warm_up(self, steps: int) -> None:
        """As Trainer's."""
        self.pace: list[float] = []
        self._turn, self._steps, self._timed = 0, steps, min(10, (steps + 1) // 2)
        super().warm_up(steps)
        self._steps = 0
        if self.warmed:
            self.warmed(self)

    _steps = 0  # of a warm-up under way

    def step(self, *arguments: object, **options: object) -> StepReport:
        """As Trainer's."""
        if not self._steps:
            return super().step(*arguments, **options)
        if self._turn == self._steps - self._timed:
            self.ranks.synchronize()
            self._start = time.perf_counter()
        report = super().step(*arguments, **options)
        self._turn += 1
        if self._turn == self._steps:
            self.ranks.synchronize()
            self.pace.append((time.perf_counter() - self._start) / self._timed)
            self._turn = 0
        return report


class GuardedRun(Run):
    """A run with all that watches over it and that the counted code of the same run does without.

    Preflight before and speed after the warm-up, the contents of the files, the ladder of smaller artifacts,
    signals. None of it changes what a run that passes computes.
    """

    new_trainer = GuardedTrainer

    def __init__(self, cfg: Config, ranks: Ranks, source: bytes):
        self.preflight = Preflight(cfg, ranks)
        super().__init__(self.preflight.usable(cfg), ranks, source)

    def _first_model(self) -> GPT:
        check, cfg = self.preflight, self.cfg
        splits = ["train"] if self.trains or cfg.quantize_only else []
        check.check_hashes(self.manifest, splits, wait=not self.trains)
        if not self.artifact:
            check.check_memory(cfg, self.trains, self.val)
        model = super()._first_model()
        if self.artifact:  # knows its own sizes
            check.check_memory(model.cfg, False, self.val)
        check.check_disk(self.trains, self.val.num_targets)
        return model

    def _open_log(self, cfg: Config, ranks: Ranks, *choose: Callable[..., Path]) -> RunLog:
        if not cfg.preflight_only:
            return super()._open_log(cfg, ranks, *choose)
        self._scratch = tempfile.TemporaryDirectory()  # a rehearsal leaves nothing
        return RunLog(dataclasses.replace(cfg, artifact_dir=self._scratch.name), ranks)

    def _log_head(self) -> None:
        super()._log_head()
        facts, ranks, notices = self.preflight.facts, self.ranks, self.preflight.notices
        self.log.event("preflight", **facts)
        if self.preflight.cfg.attention_backend == "auto" and ranks.on_gpu:
            notices += unused_attention(self.cfg, ranks)
        for text in notices:
            self.log.event("notice", text=text)
        if facts.get("gpus", 0) > ranks.world_size:
            start = f"torchrun --standalone --nproc_per_node={facts['gpus']} train_gpt.py"
            self.log.event("notice", text=f"{ranks.world_size} of {facts['gpus']} GPUs used; all: {start}")
        if importlib.util.find_spec("python_minifier") is None:
            self.log.event("notice", text="python-minifier is missing: the code will count in full")

    def _prepare_training(self) -> Trainer:
        trainer = super()._prepare_training()
        trainer.warmed = self._warmed
        return trainer

    def _fit_memory(self) -> None:
        """As Run's; a model that the compiler fails on is trained without it, unless it was asked for."""
        try:
            super()._fit_memory()
        except Exception as error:  # compilers raise anything
            asked = self.preflight.cfg.compile_backend != "auto" or isinstance(error, (UserError, RunError))
            if asked or not self.ranks.compiler:
                raise
            self.log.event("notice", text=f"the model is not compiled, which is slow: {one_line(error)}")
            self.ranks.stop_compiling()
            self.result["environment"]["compiler"] = "off"
            self.model = self.new_model(self.cfg)
            super()._fit_memory()

    def _warmed(self, trainer: GuardedTrainer) -> None:
        self.preflight.wait_for_hashes()
        self.preflight.log_speed(trainer.pace, self.log, trainer.cfg)

    def quantise(self) -> Path:
        """As Run's; an artifact over the limit is made again, smaller."""
        path, cfg, ranks = super().quantise(), self.cfg, self.ranks
        tensors, self.quantised = self.quantised, None
        if cfg.fit_bytes or len(self.blob) <= SIZE_LIMIT - (1 << 16):  # more than any code
            return path
        code = len(self._packed_code[0]) if ranks.is_main else 0
        budget = SIZE_LIMIT - ranks.gather(code)[0]
        if len(self.blob) > budget:
            with self.watch.stage("fallback"):
                self.blob, rung = fall_back(*tensors, cfg, budget, self.blob, self.log, ranks)
            self.result |= rung
            if ranks.is_main:
                write_whole(path, self.blob)
        return path

    def adapt(self) -> None:
        """As Run's; forms of a batch that no graph fitted, so that they ran eagerly, are counted and said."""
        eager, forward = set(), self.model.forward

        def noted(*batch: object, **options: object) -> Tensor:
            if not torch.compiler.is_compiling():  # a graph leaves this out
                eager.add(batch[0].shape)
            return forward(*batch, **options)

        self.model.forward = noted  # a hook would take the graph apart
        super().adapt()
        del self.model.forward
        counts = self.ranks.gather(len(eager))
        if self.ranks.compiler:
            self.log.event("graphs", eager_shapes=sum(counts))

    def record(self, stage: str, meter: BpbMeter, documents: Sequence[tuple[int, int]]) -> None:
        """As Run's; a score that is not finite ends the run."""
        super().record(stage, meter, documents)
        if not math.isfinite(meter.val_loss):
            raise RunError(f"{stage}: val_loss {meter.val_loss}: not finite")

    def execute(self) -> int:
        """As Run's, or the rehearsal alone."""
        try:
            if not self.cfg.preflight_only:
                return super().execute()
            with self.watch.stage("rehearsal"):
                if self.trains:
                    self._prepare_training().warm_up(self.cfg.warmup_steps)
        except Stopped as stopped:
            stopped.stage = self.watch.current
            raise
        self.log.event("passed", seconds=self.watch.seconds["rehearsal"])
        return 0


@contextlib.contextmanager
def _signals(ranks: Ranks):
    """SIGTERM (torchrun's, when another rank has failed) and SIGINT raise Stopped; a second one ends all.

    A stage that sets `ranks.polls` looks at `ranks.told` instead and raises it where it likes.
    """

    def handle(number: int, _: object) -> None:
        if ranks.told:
            os._exit(128 + number)
        ranks.told = number
        if not ranks.polls:
            raise Stopped(number)

    handlers = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_guarded(cfg: Config, ranks: Ranks, source: bytes) -> int:
    """Execute a run under guard; exit code as `main`."""
    try:
        with _signals(ranks):
            from harness.checkpoints import KeptRun

            keeps = cfg.checkpoint_seconds and not cfg.preflight_only
            return _run(cfg, ranks, source, KeptRun if keeps else GuardedRun)
    except Stopped as stopped:
        ranks.say(f"stage {stopped.stage}: {stopped}")
        return stopped.code
    except RunError as error:  # before the first stage, as below; `_run` says the later ones
        ranks.say(f"stage start: {error}")
        return 1
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be used ({error.strerror})") from None
