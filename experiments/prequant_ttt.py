"""Pre-quantisation test-time training (PR #1485): trains on the validation tokens. Illegal; for study only.

    ALLOW_ILLEGAL=1 PRESET=pr1485 python experiments/prequant_ttt.py [--epochs 6] [--lr 5e-4] [--frozen 2]

A run of `train_gpt.py` with the same settings (PRESET=pr1485 is the published system, SCALE=demo makes it
small, QUANTIZE_ONLY=1 MODEL_PATH=FILE starts from a trained model), and one stage more: before the model is
quantised, AdamW takes some passes over the validation stream, its rate a cosine over all steps, its first
blocks frozen. The artifact then knows the text that it is scored on: every target was trained on before it
was scored (C3), so its score means nothing.

The run's folder says so for good: `legal` is false in result.json, `illegal` and `broken_limits` have the
reason, which is what the submission tools go by; the ledger (AUDIT is always on) records the updates, so that
`tools/audit.py` fails D3 and T1. Exit code 3, as for any broken limit; 2 for a mistake (one line), also
without ALLOW_ILLEGAL=1.

Windows and steps are those of the script's global SGD (`BaseTraining`): GLOBAL_TTT_BATCH_SEQS rows of
EVAL_SEQ_LEN tokens a step, gradients averaged over ranks, clipped to GLOBAL_TTT_GRAD_CLIP. No weight decay.
The published run's batches are not known here; SPEC section 6 gives epochs, rate, schedule, frozen blocks.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_gpt as tg  # noqa: E402
from harness.console import console_watch  # noqa: E402
from harness.guards import Guard  # noqa: E402
from harness.ledger import Ledger  # noqa: E402
from harness.logfiles import LogFiles  # noqa: E402
from harness.preflight import Preflight  # noqa: E402
from harness.settings import read_settings  # noqa: E402
from harness.watched import Watches  # noqa: E402

NOTICE = (
    "NOT A LEGAL SCORE (C3): the weights are trained on the validation tokens before these are scored "
    "(PR #1485, closed as invalid)"
)


def freeze(model: tg.GPT, blocks: int) -> list:
    """Keep the gradients of the first blocks zero; returns handles whose `remove` undoes it.

    Their matrices are rows of banks: queries and outputs, keys and values lie L rows apart.
    """
    layers, handles = model.cfg.num_layers, []

    def keep(rows: list[int]):
        def mask(gradient: Tensor) -> Tensor:
            gradient = gradient.clone()
            gradient[rows] = 0
            return gradient

        return mask

    first = list(range(blocks))
    twice = first + [layers + row for row in first]
    rows = {"qo_bank": twice, "kv_bank": twice, "mlp_up_bank": first, "mlp_down_bank": first}
    rows |= {"parallel_post_lambdas": first, "parallel_resid_lambdas": first}
    for name, parameter in model.named_parameters():
        if name in rows:
            handles.append(parameter.register_hook(keep(rows[name])))
    for parameter in model.blocks[:blocks].parameters():
        handles.append(parameter.register_hook(torch.zeros_like))
    return handles


def train_on_validation(
    model: tg.GPT,
    tokens: Tensor,
    cfg: tg.Config,
    options: argparse.Namespace,
    *,
    looping: bool,
    ranks: tg.Ranks,
) -> int:
    """AdamW over the stream [N], `options.epochs` times; the model is changed in place. Returns the steps."""
    handles = freeze(model, options.frozen)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0.0)
    size = cfg.global_ttt_batch_seqs * cfg.eval_seq_len
    documents = cfg.global_ttt_respect_doc_boundaries and not cfg.plain_windows
    training = tg.BaseTraining(model, cfg, documents, looping, ranks)
    last = len(tokens) - 1 - cfg.eval_seq_len  # a window that is not whole is not trained on
    starts = list(range(0, last + 1, size)) * options.epochs
    for step, start in enumerate(starts):
        rate = options.lr * 0.5 * (1 + math.cos(math.pi * step / len(starts)))
        row = tokens[start : start + size + 1]
        training.train(row, optimizer, rate, epochs=1)
    for handle in handles:
        handle.remove()
    return len(starts)


class PrequantRun(tg.Run):
    """A run with the illegal stage before quantisation; it cannot be told to hide it."""

    def __init__(self, *arguments: object, options: argparse.Namespace, ledger: Ledger):
        super().__init__(*arguments)
        self._options, self._ledger, cfg = options, ledger, self.cfg
        tokens = len(self.val.tokens)
        if cfg.eval_seq_len >= tokens:
            raise tg.ConfigError(
                f"EVAL_SEQ_LEN={cfg.eval_seq_len}: must be below the {tokens} validation tokens"
            )
        self.result["illegal"] = NOTICE
        self.log.event("notice", text=NOTICE)

    def quantise(self) -> None:
        """Train on the validation tokens, then quantise."""
        options, documents = self._options, self.val.documents
        spans = [(start, length - 1) for start, length in documents]
        trains = torch.ones(len(spans), dtype=bool)
        part = SimpleNamespace(documents=range(len(spans)), spans=spans, trains=trains)
        with self.clock.stage("train_on_validation"):
            steps = train_on_validation(
                self.model, self.val.tokens, self.cfg, options, looping=self.looping, ranks=self.ranks
            )
            for epoch in range(options.epochs):
                self._ledger.see("trained", part=part, batch_number=0, chunk=epoch)
        facts = {"epochs": options.epochs, "lr": options.lr, "frozen_blocks": options.frozen, "steps": steps}
        self.result["prequant_ttt"] = facts
        self.log.event("trained_on_validation", **facts)
        self.score("prequant_ttt")
        super().quantise()

    def _broken_limits(self, summary: Mapping[str, float]) -> list[str]:
        return [NOTICE, *super()._broken_limits(summary)]

    def finish(self) -> int:
        """Write the result; the last line says again what it is worth."""
        code = super().finish()
        self.log.event("notice", text=NOTICE)
        return code


def parse_arguments(arguments: Sequence[str], environ: Mapping[str, str]) -> argparse.Namespace:
    """Command line. Raises ConfigError, also without ALLOW_ILLEGAL=1."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> None:
            raise tg.ConfigError(message)

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--frozen", metavar="BLOCKS", type=int, default=2)
    options = parser.parse_args(arguments)
    if environ.get("ALLOW_ILLEGAL") != "1":
        told = environ.get("ALLOW_ILLEGAL", "")
        raise tg.ConfigError(f"ALLOW_ILLEGAL={told!r}: must be 1 here: this trains on validation tokens (C3)")
    if options.epochs < 1:
        raise tg.ConfigError(f"--epochs {options.epochs}: must be at least 1")
    if not 0 <= options.lr < math.inf:
        raise tg.ConfigError(f"--lr {options.lr:g}: must be a number, at least 0")
    if options.frozen < 0:
        raise tg.ConfigError(f"--frozen {options.frozen}: must be at least 0")
    return options


def check(cfg: tg.Config, options: argparse.Namespace) -> None:
    """Refuse settings with which there would be nothing to study."""
    if options.frozen > cfg.num_layers:
        raise tg.ConfigError(f"--frozen {options.frozen}: must be at most NUM_LAYERS={cfg.num_layers}")
    reasons = dict.fromkeys(("prequant_only", "ttt_eval_only"), "the model has to be quantised after")
    reasons |= dict.fromkeys(("preflight_only", "checkpoint_seconds"), "only train_gpt.py itself can do that")
    for name, reason in reasons.items():
        if value := getattr(cfg, name):
            raise tg.ConfigError(f"{name.upper()}={value:g}: must be 0 here, {reason}")


def run(cfg: tg.Config, ranks: tg.Ranks, options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """The run and what watches over it. Exit code as `main`."""
    preflight, ledger = Preflight(cfg, ranks), Ledger(ranks)
    with contextlib.closing(LogFiles(ranks)) as files:
        watch = Watches([files, Guard(preflight), preflight, console_watch(ranks, environ), ledger])
        inputs = cfg, ranks, preflight.backends(), tg.read_sources(), watch
        return tg.execute(PrequantRun(*inputs, options=options, ledger=ledger))


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """A run between two notices. Exit code 3 (not legal), 1 (the run failed) or 2 (a mistake, one line)."""
    is_main = environ.get("RANK", "0") == "0"
    try:
        options = parse_arguments(arguments, environ)
        if is_main:
            print(NOTICE, flush=True)
        cfg = read_settings({name: v for name, v in environ.items() if name != "ALLOW_ILLEGAL"})
        check(cfg, options)
        ranks = tg.Ranks.from_env(cfg, environ)
        return run(dataclasses.replace(cfg, audit=True), ranks, options, environ)
    except tg.UserError as error:
        if environ.get("LOCAL_RANK", "0") == "0":
            print(f"prequant_ttt.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
