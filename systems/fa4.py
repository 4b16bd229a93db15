"""FlashAttention 4."""

import torch
from torch import Tensor

from train_gpt import Segments, _keep, _limits, _operator

# FlashAttention 4 compiles its kernels while it runs, which torch.compile cannot follow: here it is two
# operators, made of the functions that torch.nn.attention too takes from the package.


def _fa4_forward(y: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *segments: object) -> None:
    """`segments`: boundaries or None, limit of their lengths. `lse`: logarithms of the rows' sums."""
    from flash_attn.cute import interface

    options = {"causal": True, "return_lse": True} | _limits(*segments)
    interface._flash_attn_fwd(q, k, v, out=y, lse=lse, **options)


def _fa4_backward(dq: Tensor, dk: Tensor, dv: Tensor, *inputs: object) -> None:
    """`inputs`: q, k, v, the result, its gradient, `lse`, segments."""
    from flash_attn.cute import interface

    *tensors, cu_seqlens, limit = inputs
    options = {"causal": True} | _limits(cu_seqlens, limit)
    interface._flash_attn_bwd(*tensors, dq=dq, dk=dk, dv=dv, **options)


_fa4 = _operator(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, int limit) -> (Tensor, Tensor)",
    lambda q, *_: (
        q.new_empty(q.shape),
        q.new_empty(*q.shape[:-3], q.size(-2), q.size(-3), dtype=torch.float32),
    ),
    _fa4_forward,
)
_fa4_grad = _operator(
    "attention_backward(Tensor q, Tensor k, Tensor v, Tensor y, Tensor dy, Tensor lse, Tensor? cu_seqlens, "
    "int limit) -> (Tensor, Tensor, Tensor)",
    lambda *inputs: tuple(x.new_empty(x.shape) for x in inputs[:3]),
    _fa4_backward,
)


def _fa4_keep(ctx: object, *tensors: object) -> None:
    *before, ctx.limit = tensors[:5]
    _keep(ctx, *before, *tensors[5:])


def _fa4_gradients(ctx: object, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, cu_seqlens, y, lse = ctx.saved_tensors
    return *_fa4_grad(q, k, v, y, dy.contiguous(), lse, cu_seqlens, ctx.limit), None, None


_fa4.register_autograd(
    _fa4_gradients, setup_context=lambda ctx, inputs, output: _fa4_keep(ctx, *inputs, *output)
)


def fa4_attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
    """FlashAttention 4."""
    if segments is None:
        return _fa4(q, k, v, None, 0)[0]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return _fa4(q, k, v, segments.cu_seqlens, segments.max_seqlen)[0][None]
