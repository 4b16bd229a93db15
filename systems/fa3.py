"""FlashAttention 3."""

from torch import Tensor

from train_gpt import Segments


def flash_segment_arguments(cu_seqlens: Tensor, max_seqlen: int) -> dict[str, object]:
    """Segments in the words of FlashAttention. A tensor that occurred twice could not be traced: a view."""
    ends = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens.view(-1)}
    return ends | {"max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen}


def fa3_attend(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
    """`attend` by FlashAttention 3."""
    import flash_attn_interface as flash

    if segments is None:
        y = flash.flash_attn_func(q, k, v, causal=True)
    else:
        limits = flash_segment_arguments(segments.cu_seqlens, segments.max_seqlen)
        packed = (x.flatten(0, 1) for x in (q, k, v))  # x[0] would copy the gradient
        y = flash.flash_attn_varlen_func(*packed, causal=True, **limits)
    return (y[0] if isinstance(y, tuple) else y).view(q.shape)  # some releases return more than y
