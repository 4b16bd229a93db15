"""FlashAttention 4.

It compiles its kernels while it runs, which torch.compile cannot follow. So here it is two operators, made of
the two functions of the package that torch.nn.attention calls too.
"""

import torch
from torch import Tensor

from systems.fa3 import flash_segment_arguments
from systems.kernels import operator
from train_gpt import Segments


def _fa4_options(cu_seqlens: Tensor | None, max_seqlen: int) -> dict[str, object]:
    segments = {} if cu_seqlens is None else flash_segment_arguments(cu_seqlens, max_seqlen)
    return {"causal": True} | segments


def _fa4_forward(
    y: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_seqlen: int
) -> None:
    """Writes y and the logarithms of the rows' sums `lse`."""
    from flash_attn.cute import interface

    options = _fa4_options(cu_seqlens, max_seqlen)
    interface._flash_attn_fwd(q, k, v, out=y, lse=lse, return_lse=True, **options)


def _fa4_backward(dq: Tensor, dk: Tensor, dv: Tensor, *inputs: object) -> None:
    """`inputs`: q, k, v, the result, its gradient, `lse`, segments."""
    from flash_attn.cute import interface

    *tensors, cu_seqlens, max_seqlen = inputs
    interface._flash_attn_bwd(*tensors, dq=dq, dk=dk, dv=dv, **_fa4_options(cu_seqlens, max_seqlen))


def _fa4_keep(ctx: object, inputs: tuple, results: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.max_seqlen = inputs
    ctx.save_for_backward(*tensors, *results)


def _fa4_gradients(ctx: object, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, cu_seqlens, y, lse = ctx.saved_tensors
    return *_fa4_grad(q, k, v, y, dy.contiguous(), lse, cu_seqlens, ctx.max_seqlen), None, None


_fa4 = operator(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, int max_seqlen) -> (Tensor, Tensor)",
    lambda q, *_: (
        q.new_empty(q.shape),
        q.new_empty(*q.shape[:-3], q.size(-2), q.size(-3), dtype=torch.float32),
    ),
    _fa4_forward,
    _fa4_keep,
    _fa4_gradients,
)
_fa4_grad = operator(
    "attention_backward(Tensor q, Tensor k, Tensor v, Tensor y, Tensor dy, Tensor lse, Tensor? cu_seqlens, "
    "int max_seqlen) -> (Tensor, Tensor, Tensor)",
    lambda *inputs: tuple(x.new_empty(x.shape) for x in inputs[:3]),
    _fa4_backward,
)


def fa4_attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
    """`attend` by FlashAttention 4."""
    if segments is None:
        return _fa4(q, k, v, None, 0)[0]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # x[0] would copy the gradient
    return _fa4(q, k, v, segments.cu_seqlens, segments.max_seqlen)[0][None]
