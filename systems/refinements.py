"""Refinements of the optimisers (REFINEMENTS), each by its name; without one the steps are the record's.

ema_nesterov    every step starts ahead of where the last one ended, by an average of past moves (2605.25395)
bi_maxwell      Muon's momentum is a mix of a fast and a slow one (modded-nanogpt #340)
row_floor       a row of a bank moves by no less than a share of its own length (modded-nanogpt #328)
cautious_decay  a weight of a bank decays only where the step shrinks it as well (2510.12402)
slow_scalars    AdamW remembers the squared gradients of scalars longer (modded-nanogpt #321)

The published rates are for runs of some 3,000 steps; here they follow EMA_DECAY and MUON_MOMENTUM, which are
set for the length of a run: at the record's they come to the published ones.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from train_gpt import Config, ConfigError, Muon, Trainer

NAMES = ("ema_nesterov", "bi_maxwell", "row_floor", "cautious_decay", "slow_scalars")
AHEAD, FROM, UNTIL = 0.6, 0.15, 0.72  # share of the average move, and the part of training that has it
FAST_SHARE, FASTER = 0.4385, 3.0  # of the fast momentum in the mix; how much shorter it remembers
FLOOR = 0.35  # of a row's length, before the learning rate
SLOW_BETA2 = 0.997


def refinement_names(text: str) -> list[str]:
    """REFINEMENTS as a list. Raises ConfigError."""
    chosen = text.split(",") if text else []
    if not {*chosen} <= {*NAMES} or len({*chosen}) < len(chosen):
        some = f"nothing, or some of {','.join(NAMES)} with commas between"
        raise ConfigError(f"REFINEMENTS={text!r}: must be {some}")
    return chosen


class RefinedMuon(Muon):
    """Muon with refinements; what concerns all parameters is done around a step of the trainer."""

    cfg: Config
    _before: Sequence[Tensor] = ()  # the banks as the step found them

    @torch.no_grad()
    def begin(self, trainer: Trainer, frac: float, factor: float) -> None:
        """Before the gradients of a step at a fraction of training; `factor` is that of the learning rates.

        EMA-Nesterov keeps d <- k d + (1 - k) (x' - x) of each parameter x, which this step makes x'. Here
        comes the part without x', then x <- x + beta d: gradients and step are taken from there.
        """
        self.cfg = trainer.cfg
        if "slow_scalars" in self.cfg.refinements:
            trainer.adamw.param_groups[-1]["betas"] = (self.cfg.beta1, SLOW_BETA2)
        if "ema_nesterov" in self.cfg.refinements:
            beta, keep = AHEAD * factor * (FROM <= frac < UNTIL), self._keep
            for parameter, state in self._stepped(trainer):
                drift = state.setdefault("drift", torch.zeros_like(parameter, dtype=torch.float32))
                ahead = beta * drift
                drift.mul_(keep).sub_(parameter, alpha=1 - keep)
                parameter.add_(ahead)
        if "row_floor" in self.cfg.refinements or "cautious_decay" in self.cfg.refinements:
            self._before = [bank.clone() for bank in self._banks]
            self.param_groups[0]["weight_decay"] = 0.0  # `end` does it

    @torch.no_grad()
    def end(self, trainer: Trainer) -> None:
        """After a step: what needs to know how far it went."""
        for bank, before in zip(self._banks, self._before, strict=False):
            move, rate = bank - before, self.param_groups[0]["lr"]
            if "row_floor" in self.cfg.refinements:
                least = FLOOR * rate * before.norm(dim=-1, keepdim=True)
                move *= (least / move.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_min(1.0)
            decays = before * move < 0 if "cautious_decay" in self.cfg.refinements else 1.0
            bank.copy_(before + move - rate * self.defaults["weight_decay"] * before * decays)
        if "ema_nesterov" in self.cfg.refinements:
            for parameter, state in self._stepped(trainer):
                if "drift" in state:  # not yet behind the first step, of which the beginning is not known
                    state["drift"].add_(parameter, alpha=1 - self._keep)

    @property
    def _banks(self) -> list[nn.Parameter]:
        return self.param_groups[0]["params"]

    @property
    def _keep(self) -> float:
        """What an average move keeps of itself: a third of the horizon of EMA_DECAY."""
        return max(0.0, 1 - 3 * (1 - self.cfg.ema_decay))

    def _stepped(self, trainer: Trainer) -> list[tuple[nn.Parameter, dict]]:
        """Parameters that an optimiser has stepped, and its state of each, which checkpoints hold."""
        parts = (self, trainer.adamw)
        return [(parameter, state) for part in parts for parameter, state in part.state.items() if state]

    def _with_momentum(self, state: dict, gradient: Tensor, group: dict) -> Tensor:
        """The mix of momenta: the slow one is so slow that the mix is as old, in the mean, as one alone."""
        if "bi_maxwell" not in self.cfg.refinements:
            return super()._with_momentum(state, gradient, group)
        forget = 1 - group["momentum"]
        rates = FASTER * forget, forget * (1 - FAST_SHARE) / (1 - FAST_SHARE / FASTER)
        blank = gradient.new_zeros(len(gradient), 2, *gradient.shape[1:])
        fast, slow = state.setdefault("momentum_buffer", blank).unbind(1)
        for buffer, rate in zip((fast, slow), rates, strict=True):
            buffer.lerp_(gradient, rate)
        return gradient.lerp(fast.lerp(slow, 1 - FAST_SHARE), group["momentum"])
