"""Causal attention of short rows on a CPU: products of blocks, and probabilities that are kept.

Torch's own attention computes scores and exponentials again on the way back.
"""

import functools

import torch
from torch import Tensor

ATTENTION_BLOCK = 64  # queries of one product; keys behind the last of them are left out
BLOCK_LENGTHS = range(128, 513)  # of rows: shorter ones gain nothing, longer ones would keep too much
BLOCK_TOKENS = 256  # of all rows together, at least


class CausalAttention(torch.autograd.Function):
    """Causal softmax attention, scale 1/sqrt(d), query head h reading key/value head h // (H/G).

    Queries that read one key/value head are rows of one matrix, H/G of them to a position.
    """

    @staticmethod
    def forward(ctx: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, T, H, d], k and v [B, T, G, d] -> [B, T, H, d]."""
        groups = k.size(2)
        y = q.new_empty(*q.shape[:2], groups, q.size(2) // groups, q.size(3))
        k, v = stacked(k, groups).mul_(q.size(-1) ** -0.5), stacked(v, groups)
        ahead, kept = future(y.size(3), q.dtype), []
        for first in range(0, k.size(1), ATTENTION_BLOCK):
            rows = slice(first, first + ATTENTION_BLOCK)
            block, seen = stacked(q[:, rows], groups), slice(rows.stop)
            p = torch.bmm(block, k[:, seen].mT)
            p[..., first:] += ahead[: p.size(1), : p.size(2) - first]
            torch.softmax(p, -1, out=p)
            y[:, rows] = unstacked(torch.bmm(p, v[:, seen]), y)
            kept += [block, p]
        ctx.save_for_backward(k, v, *kept)
        return y.flatten(2, 3)

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> tuple[Tensor, ...]:
        """Gradients of queries, keys and values; blocks from the last, which sees all keys."""
        (k, v, *kept), groups = ctx.saved_tensors, len(ctx.saved_tensors[0]) // len(dy)
        dq, dk, dv = dy.new_empty(*dy.shape[:2], groups, dy.size(2) // groups, dy.size(3)), None, None
        for first in reversed(range(0, k.size(1), ATTENTION_BLOCK)):
            p, block, rows = kept.pop(), kept.pop(), slice(first, first + ATTENTION_BLOCK)
            part, seen = stacked(dy[:, rows], groups), slice(rows.stop)
            ds = torch.bmm(part, v[:, seen].mT)
            torch.ops.aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
            dq[:, rows] = unstacked(torch.bmm(ds, k[:, seen]), dq)
            for_k, for_v = torch.bmm(ds.mT, block), torch.bmm(p.mT, part)
            if dk is None:
                dk, dv = for_k, for_v
            else:
                dk[:, seen] += for_k
                dv[:, seen] += for_v
        dk *= dy.size(-1) ** -0.5
        dk, dv = (unstacked(x, dq[:, :, :, :1]).flatten(2, 3) for x in (dk, dv))
        return dq.flatten(2, 3), dk, dv


@functools.cache
def future(share: int, dtype: torch.dtype) -> Tensor:
    """What makes keys behind a query impossible in a block [64 share, 64] that begins with the first key."""
    n = ATTENTION_BLOCK
    return torch.full((n, n), -torch.inf, dtype=dtype).triu_(1).repeat_interleave(share, 0)


def stacked(x: Tensor, groups: int) -> Tensor:
    """x [B, T, heads, d] -> a copy [B G, T heads/G, d]: a matrix for each of G key/value heads."""
    batch, length, heads, size = x.shape
    x = x.reshape(batch, length, groups, -1, size).transpose(1, 2)
    return x.clone(memory_format=torch.contiguous_format).view(batch * groups, -1, size)


def unstacked(x: Tensor, like: Tensor) -> Tensor:
    """x [B G, n H/G, d] -> a view [B, n, G, H/G, d], the dimensions but n as of `like`."""
    batch, _, groups, *shape = like.shape
    return x.view(batch, groups, -1, *shape).transpose(1, 2)
