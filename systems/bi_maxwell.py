"""Muon with a mix of two momenta, a fast and a slow one (MUON_BI_MAXWELL; modded-nanogpt #340).

One momentum remembers each gradient by one rate: what is recent enough to be true of the weights as they are
is too little to average out the noise of batches. A mix can have both. Of the published mix this keeps the
share of the fast one; it forgets three times as fast as MUON_MOMENTUM, and the slow one so slowly that the
mix is as old, in the mean, as one momentum alone. So it needs no rate of its own.
"""

from torch import Tensor

from train_gpt import Muon

FAST_SHARE, FASTER = 0.4385, 3.0  # of the fast momentum in the mix; how much faster it forgets


class BiMaxwellMuon(Muon):
    """Muon whose momentum buffer is two averages of the gradients, bfloat16 [matrices, 2, rows, columns]."""

    def _with_momentum(self, state: dict, gradient: Tensor, group: dict) -> Tensor:
        """The gradient with what both momenta have of earlier ones (Nesterov)."""
        forget = 1 - group["momentum"]
        blank = gradient.new_zeros(len(gradient), 2, *gradient.shape[1:])
        fast, slow = state.setdefault("momentum_buffer", blank).unbind(1)
        fast.lerp_(gradient, FASTER * forget)
        slow.lerp_(gradient, forget * (1 - FAST_SHARE) / (1 - FAST_SHARE / FASTER))
        return gradient.lerp(fast.lerp(slow, 1 - FAST_SHARE), group["momentum"])
