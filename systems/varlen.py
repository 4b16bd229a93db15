"""Torch's own attention for packed rows."""

from torch import Tensor

from train_gpt import Segments


def varlen_attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """`attend` by torch's own kernels; those of torch 2.11 take fewer key heads unasked."""
    from torch.nn.attention.varlen import varlen_attn

    cu, limit = segments.cu_seqlens, segments.max_seqlen
    grouped = {"enable_gqa": True} if "enable_gqa" in varlen_attn.__kwdefaults__ else {}
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # x[0] would copy the gradient
    return varlen_attn(q, k, v, cu, cu, limit, limit, window_size=(-1, 0), **grouped)[None]
