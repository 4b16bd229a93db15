"""Light dynamic connections from layer to layer (MUDD_WIDTH; 2502.12170, modded-nanogpt #259, #315).

A residual stream is all that a late layer knows of earlier ones, added up in shares that are the same for
each token. Here both lanes of the last layers, and the head, also read the stream as it entered each layer,
in shares that a small network makes of their own value at that token. All shares are 0 at first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_gpt import Config, at_positions, rms_norm

READING = 2  # last layers whose lanes read, where they have two
PACE = 0.1  # of other scalars' steps: where shares take such steps, the first ones throw the model off course


class Mudd(nn.Module):
    """Shares of what entered each layer, for the head and for the lanes of the last layers that have some."""

    def __init__(self, cfg: Config):
        super().__init__()
        width, sources = cfg.mudd_width, cfg.num_layers
        lanes = cfg.parallel_style == "lanes" and cfg.parallel_start_layer > 0
        self._first = max(sources - READING, cfg.parallel_start_layer) if lanes else sources
        readers = 2 * max(0, sources - self._first) + 1
        self.inner = nn.Parameter(nn.init.orthogonal_(torch.empty(width, cfg.model_dim)))
        self.outer = nn.Parameter(torch.zeros(readers, sources, width))
        self.bias = nn.Parameter(torch.zeros(readers, sources))

    def forward(
        self,
        layer: int,
        parallel: bool,
        given: dict[int, Tensor],
        x: Tensor,
        lanes: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The stream x, or its lanes, with what they read before a layer; each [B, T, D].

        Args:
            layer: that they enter, whose place in `given` is set.
            parallel: its attention and MLP are side by side; by PARALLEL_STYLE they have a lane each.
            given: what entered the layers below [B, T, D], where they recur the last time.
        """
        given[layer] = x if lanes is None else (lanes[0] + lanes[1]) / 2
        if not parallel or layer < self._first:
            return x, lanes
        readers = enumerate(lanes or (x, x), 2 * (layer - self._first))
        return x, tuple(self._read(number, lane, [*given.values()]) for number, lane in readers)

    def head(self, given: dict[int, Tensor], x: Tensor, wanted: Tensor | None) -> Tensor:
        """What goes to the head, x [B, T, D], or [B, n, D] at `wanted` [B, n], with what it reads."""
        return self._read(-1, x, [at_positions(source, wanted) for source in given.values()])

    def _read(self, number: int, x: Tensor, sources: list[Tensor]) -> Tensor:
        """A stream with its shares of the sources added."""
        # AdamW moves every weight by the same step: the width must not say how far that moves a share.
        hidden = F.gelu(F.linear(rms_norm(x), self.inner)) * len(self.inner) ** -0.5
        outer, bias = (weight[number, : len(sources)] for weight in (self.outer, self.bias))
        shares = F.linear(hidden, outer, bias) * PACE
        for source, share in zip(sources, shares.split(1, -1), strict=True):
            x = torch.addcmul(x, source, share.to(x.dtype))
        return x
