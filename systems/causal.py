"""Causal attention of short rows on a CPU: products of blocks, and probabilities that are kept.

Torch's own attention computes scores and exponentials again on the way back.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

ATTENTION_BLOCK = 64  # queries of one product; keys behind the last of them are left out
KEPT_LENGTHS = range(128, 513)  # of rows: shorter ones gain nothing, longer ones would keep too much


class CausalAttention(torch.autograd.Function):
    """Causal softmax attention, scale 1/sqrt(d), query head h reading key/value head h // (H/G).

    Queries that read one key/value head are rows of one matrix, H/G of them to a position.
    """

    @staticmethod
    def forward(ctx: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, T, H, d], k and v [B, T, G, d] -> [B, T, H, d]."""
        ctx.scale, ctx.groups, kept = q.size(-1) ** -0.5, k.size(2), []
        q, k, v = (stacked(x, ctx.groups) for x in (q, k, v))
        q *= ctx.scale
        n, share, y = ATTENTION_BLOCK, q.size(1) // k.size(1), torch.empty_like(q)
        ahead = q.new_full((n, n), -torch.inf).triu_(1).repeat_interleave(share, 0)
        for rows, first, end in attention_blocks(k.size(1), share):
            p = q[:, rows] @ k[:, :end].mT
            p[..., first:] += ahead[: p.size(1), : end - first]
            torch.softmax(p, -1, out=p)
            y[:, rows] = p @ v[:, :end]
            kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        return unstacked(y, ctx.groups, share)

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> tuple[Tensor, ...]:
        """Gradients of queries, keys and values."""
        q, k, v, *kept = ctx.saved_tensors
        share, dy = q.size(1) // k.size(1), stacked(dy, ctx.groups)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for p, (rows, _, end) in zip(kept, attention_blocks(k.size(1), share), strict=True):
            ds = dy[:, rows] @ v[:, :end].mT
            torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
            dq[:, rows] = ds @ k[:, :end]
            dk[:, :end] += ds.mT @ q[:, rows]
            dv[:, :end] += p.mT @ dy[:, rows]
        dq *= ctx.scale
        return unstacked(dq, ctx.groups, share), unstacked(dk, ctx.groups, 1), unstacked(dv, ctx.groups, 1)


def stacked(x: Tensor, groups: int) -> Tensor:
    """x [B, T, heads, d] -> a copy [B G, T heads/G, d]: a matrix for each of G key/value heads."""
    x = x.unflatten(2, (groups, -1)).transpose(1, 2)
    return x.clone(memory_format=torch.contiguous_format).flatten(0, 1).flatten(1, 2)


def unstacked(x: Tensor, groups: int, share: int) -> Tensor:
    """x [B G, T share, d] of G groups -> [B, T, G share, d]."""
    return x.unflatten(1, (-1, share)).unflatten(0, (-1, groups)).transpose(1, 2).flatten(2, 3)


def attention_blocks(length: int, share: int) -> Iterator[tuple[slice, int, int]]:
    """Blocks of positions: their rows, `share` to a position, the first position and that behind the last."""
    for first in range(0, length, ATTENTION_BLOCK):
        end = min(length, first + ATTENTION_BLOCK)
        yield slice(first * share, end * share), first, end
