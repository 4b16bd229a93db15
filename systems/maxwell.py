"""Muon with a mix of four momenta, from a fast to a slow one (MUON_MAXWELL; modded-nanogpt #340, #357).

One momentum remembers each gradient by one rate: what is recent enough to be true of the weights as they are
is too little to average out the noise of batches. A mix can have both. Its rates of forgetting are those of
MUON_MOMENTUM times a factor each, and its shares are such that it is as old, in the mean, as one momentum
alone (1.03 times). So it needs no rate of its own.
"""

import torch
from torch import Tensor

from train_gpt import Muon

MIX = ((0.2, 8.0), (0.3, 3.0), (0.3, 1.0), (0.2, 0.33))  # share of a momentum, how much faster it forgets


class MaxwellMuon(Muon):
    """Muon whose momentum buffer is averages of gradients, bfloat16 [matrices, momenta, rows, columns]."""

    def _with_momentum(self, state: dict, gradient: Tensor, group: dict) -> Tensor:
        """The gradient with what all momenta have of earlier ones (Nesterov)."""
        forget = 1 - group["momentum"]
        if not state:
            state["momentum_buffer"] = gradient.new_zeros(len(gradient), len(MIX), *gradient.shape[1:])
        mixed = torch.zeros_like(gradient, dtype=torch.float32)
        for momentum, (share, faster) in zip(state["momentum_buffer"].unbind(1), MIX, strict=True):
            mixed.add_(momentum.lerp_(gradient, min(1.0, faster * forget)), alpha=share)
        return gradient.lerp(mixed.to(gradient.dtype), group["momentum"])
