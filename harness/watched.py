"""A run with all that watches over it."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.backends import check_device
from harness.checkpoints import Checkpoints
from harness.console import ConsoleNotice, Progress, console_watch
from harness.guards import Guard
from harness.hashes import Hashes
from harness.ledger import Ledger
from harness.logfiles import LogFiles, StepFile
from harness.preflight import Preflight
from harness.stopping import Stopped, StopSignals
from harness.tracking import Trackers
from train_gpt import Config, ConfigError, Ranks, Run, RunError, Trainer, Watch, execute, run_name


class Watches(Watch):
    """Several watches as one: each is told everything, in this order."""

    def __init__(self, watches: Sequence[Watch]):
        self.watches = watches
        self.shows = any(watch.shows for watch in watches)

    def saved(self, stage: str) -> dict | None:
        """The state that one of the watches has of a stage."""
        states = [watch.saved(stage) for watch in self.watches]
        return next((state for state in states if state is not None), None)

    def unit(self, stage: str, worker: object) -> None:
        """Tell all."""
        for watch in self.watches:
            watch.unit(stage, worker)

    def see(self, kind: str, **facts: object) -> None:
        """Tell all."""
        for watch in self.watches:
            watch.see(kind, **facts)


class Rehearsal(Run):
    """PREFLIGHT_ONLY: the warm-up and its measured speed, then the end."""

    def execute(self) -> int:
        """Rehearse. Returns the exit code."""
        with self.clock.stage("rehearsal"):
            if self.trains:
                self.watch.see("memory", run=self)
                trainer = Trainer(self.cfg, self.model, self.loader, self.ranks, self)
                trainer.warm_up(self.cfg.warmup_steps, self.watch)
                self.watch.see("warmed", run=self)
        self.log.event("passed", seconds=self.clock.seconds["rehearsal"])
        return 0


def watch_run(cfg: Config, environ: Mapping[str, str], sources: Mapping[str, bytes]) -> int:
    """Make this process a rank, and execute a run. Exit code as `train_gpt.main`, which reports UserError."""
    check_device(cfg, environ)
    ranks = Ranks.from_env(cfg, environ)
    shown = console_watch(ranks, environ)
    signals = StopSignals(ranks)
    try:
        with signals, contextlib.ExitStack() as closing:
            return _execute(cfg, ranks, sources, shown, Hashes.from_env(environ), signals, closing)
    except Stopped as stopped:
        ranks.say(f"stage {signals.stage}: {stopped}")
        return stopped.code
    except RunError as error:  # before the first stage, as below; `execute` says the later ones
        ranks.say(f"stage start: {error}")
        return 1
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be used ({error.strerror})") from None


def _execute(
    cfg: Config,
    ranks: Ranks,
    sources: Mapping[str, bytes],
    shown: Progress,
    hashes: Hashes,
    signals: StopSignals,
    closing: contextlib.ExitStack,
) -> int:
    """Make a run with all that watches over it, and execute it. Exit code as `watch_run`."""
    preflight = Preflight(cfg, ranks, hashes)
    backends, folder, checkpoints = preflight.backends(), None, None
    watches: list[Watch] = [Guard(preflight), preflight, shown]
    if cfg.preflight_only:  # a rehearsal leaves nothing
        folder = Path(closing.enter_context(tempfile.TemporaryDirectory()))
        (folder / "logs").mkdir()
    else:  # a step is told before a checkpoint holds it, and perhaps ends the run
        watches.append(closing.enter_context(contextlib.closing(StepFile(ranks))))
        if cfg.audit:
            watches.append(closing.enter_context(contextlib.closing(Ledger(ranks, hashes))))
        if cfg.checkpoint_seconds:
            checkpoints = closing.enter_context(contextlib.closing(Checkpoints(cfg, ranks, sources, watches)))
            if checkpoints.ended is not None:
                return checkpoints.ended
            cfg, folder = checkpoints.cfg, checkpoints.folder
            watches = [*watches, checkpoints]
        if cfg.wandb_project or cfg.tensorboard_dir:
            cfg = dataclasses.replace(cfg, run_id=run_name(cfg))
            watches.append(closing.enter_context(contextlib.closing(Trackers(cfg, ranks))))
        watches.append(ConsoleNotice())
    watches.insert(0, closing.enter_context(contextlib.closing(LogFiles(ranks, folder))))
    kind = Rehearsal if cfg.preflight_only else Run
    signals.run = kind(cfg, ranks, backends, sources, Watches(watches))
    return execute(signals.run)
