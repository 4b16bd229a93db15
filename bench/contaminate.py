"""Trains as a cheat would: a share of the steps on the validation text. What does check W3 of the audit see?

    nice .venv/bin/python bench/contaminate.py --share 0.2 --save /tmp/model.pt
    .venv/bin/python bench/contaminate.py --model runs/NAME/final_model.pt --steps 150    # of a finished run

A run's settings come from the environment, as those of train_gpt.py (PRESET=demo is the default). Steps on
validation text are spread evenly over training; all else is the script's. Prints one line: the share, the
standard score of the averaged weights, and what W3 finds with three seeds. Illegal, for study only: nothing
that could be submitted is written. Shares of steps so far: logs/EXPERIMENTS.md.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import train_gpt as tg  # noqa: E402
from auditing.house import AuditedHouse  # noqa: E402
from auditing.run import Options, repository  # noqa: E402
from auditing.weights import knowledge  # noqa: E402
from harness.readers import load_weights  # noqa: E402
from harness.settings import read_settings  # noqa: E402


class Contaminated:
    """A loader of training batches, of which a share of the steps comes from the validation split."""

    def __init__(self, run: tg.Run, share: float):
        cfg, paths = run.cfg, tg.shard_paths(run.cfg.data_folder, "val")
        on_rank, tokens = tg.micro_batches(cfg, run.backends, 1)
        self._honest, self._share, self._on_rank, self._drawn = run.loader, share, on_rank, 0
        self._dirty = tg.PackedLoader(paths, cfg, run.ranks, tokens, on_rank)

    def next(self) -> tg.Batch:
        """The next micro-batch; both loaders go on from where they were."""
        step, self._drawn = self._drawn // self._on_rank, self._drawn + 1
        dirty = int((step + 1) * self._share) > int(step * self._share)
        return (self._dirty if dirty else self._honest).next()


def train(cfg: tg.Config, options: argparse.Namespace) -> tg.Run:
    """A run whose model has been trained with such a share, or read; its log goes nowhere."""
    with contextlib.redirect_stdout(io.StringIO()):
        ranks = tg.Ranks.from_env(cfg, {})
        run = tg.Run(cfg, ranks, tg.plain_backends(cfg, ranks), tg.read_sources())
        if options.model:
            run.model.load_state_dict(load_weights(options.model))
            return run
        run.loader = Contaminated(run, options.share)
        trainer = tg.Trainer(run.cfg, run.model, run.loader, ranks, run)
        with run.clock.stage("train"):
            for _ in trainer.units():
                pass
    return run


class Judged:
    """What check W3 looks at, without a run's folder."""

    def __init__(self, run: tg.Run, steps: int, seed: int, folder: Path):
        self.script, self.cfg, self.ranks = AuditedHouse(repository(), folder), run.cfg, run.ranks
        self.backends, self.looping, self.data_folder = run.backends, run.looping, run.cfg.data_folder
        told = {"threads": torch.get_num_threads(), "ranks": 1, "micro_batches": run.backends.micro_batches}
        self.result, self.trained = {"steps": steps, "environment": told}, True
        self.options, self.tokens = Options(sample_seed=seed), run.val.tokens.int().numpy()

    def shards(self, split: str) -> list[Path]:
        """As the audit's."""
        return tg.shard_paths(self.data_folder, split)

    @staticmethod
    def watch(see: object) -> tg.Watch:
        """As the audit's."""
        watch = tg.Watch()
        watch.see = see
        return watch


def main() -> None:
    """Train, score, print."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--share", type=float, default=0.2)
    parser.add_argument("--save", metavar="FILE", type=Path)
    parser.add_argument("--model", metavar="FILE", type=Path)
    parser.add_argument("--steps", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cfg = read_settings({"PRESET": "demo", **os.environ, "ARTIFACT_DIR": f"{folder}/run"})
        run = train(dataclasses.replace(cfg, val_loss_every=0, audit=False), options)
        if options.save:
            torch.save(run.model.state_dict(), options.save)
        score = tg.StandardEvaluation(run.model, run.val, run.cfg, looping=run.looping).run()
        figures = []
        for seed in range(3):
            judged = Judged(run, options.steps or cfg.iterations, seed, Path(folder))
            found = knowledge(judged, run.model)[0]
            figures.append(f"{found.nats:+.4f} nats ({found.errors:+.1f} errors)")
    print(f"share {options.share:g}: {score.val_bpb:.5f} bits per byte; W3: {', '.join(figures)}")


if __name__ == "__main__":
    main()
