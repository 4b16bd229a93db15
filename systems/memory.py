"""What saves memory on a CPU: a heap that is kept, no compiler loaded, documents adapted few at a time."""

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from train_gpt import GPT, BatchedLoRA

TRIM_THRESHOLD, MMAP_MAX, HUGE_PAGES = -1, -4, 14  # of mallopt, and advice of madvise
TOKENS = 2048  # whose activations test-time training holds at a time
HEAP, PAGE = 4 << 30, 2 << 20  # bytes: more than such a run needs, of addresses alone; a huge page


def keep_heap() -> None:
    """Let malloc have all tensors in one heap of huge pages that it keeps (glibc on Linux; else nothing).

    Left alone it gives tensors of some MiB back to the kernel and asks for them again at each step, in pages
    of 4 KiB. A system that has no huge pages, or not so many addresses, only keeps what was freed.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, -1)
    if start := libc.malloc(HEAP):
        libc.madvise(-(-start // PAGE) * PAGE, HEAP - PAGE, HUGE_PAGES)
        libc.free(start)


def trim_heap() -> None:
    """Give what is free back to the system, once: the next part of a run has tensors of other sizes."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
        keep_heap()  # the heap's free end has gone back too


def spare_compiler() -> None:
    """Keep torch's optimisers from importing its compiler at their first call: 130 MiB and over a second.

    They do so only to keep their methods out of graphs, and nothing is compiled here. A torch that is built
    otherwise imports it as before.
    """
    optimisers = torch.optim.Optimizer, torch.optim.Adam, torch.optim.SGD
    for method in (method for kind in optimisers for method in vars(kind).values()):
        if inner := getattr(method, "__wrapped__", None):
            inner.__dynamo_disable = inner  # where `torch._disable_dynamo` looks first
    for kind in optimisers[1:]:
        if inner := getattr(kind.step, "__wrapped__", None):
            kind.step = torch.no_grad()(inner)


class LossesByRows(torch.autograd.Function):
    """Losses of adapted documents, some rows at a time, each part with its adapters' gradients at once.

    No document's losses depend on another's adapters, so the activations of one part suffice. The gradients
    are those of sums over rows: what comes back must be one number for all losses of a row, as of their mean.
    """

    @staticmethod
    def forward(
        ctx: object,
        losses: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        lora: BatchedLoRA,
        *factors: Tensor,
    ) -> Tensor:
        """`losses` of inputs [b, T]; A and B by turns have b rows or more, of which the last are used."""
        active, parts = lora.active, []
        ctx.gradients = [torch.zeros_like(factor) for factor in factors]
        for rows in zip(*(x.split(max(1, TOKENS // inputs[0].size(1))) for x in inputs), strict=True):
            start = sum(map(len, parts)) - len(inputs[0])  # from the end
            own = slice(start, start + len(rows[0]) or None)
            leaves = [factor[own].detach().requires_grad_() for factor in factors]
            use_factors(lora, leaves)
            lora.active = None if active is None or active[own].all() else active[own]
            with torch.enable_grad():
                part = losses(*rows)
            gradients = torch.autograd.grad(part, leaves, torch.ones_like(part))
            for whole, gradient in zip(ctx.gradients, gradients, strict=True):
                whole[own] = gradient
            parts.append(part.detach())
        use_factors(lora, factors)
        lora.active = active
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: object, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the factors; where more rows have adapters than losses, theirs are zeros."""
        rows = len(ctx.gradients[0])
        factor = dlosses.new_zeros(rows, 1, 1)
        factor[rows - len(dlosses) :, 0] = dlosses[:, :1]
        return None, None, None, *(gradient * factor for gradient in ctx.gradients)


def use_factors(lora: BatchedLoRA, factors: Sequence[Tensor]) -> None:
    """Let adapters compute with these factors, A and B by turns."""
    for low_rank, *pair in zip(lora.maps(), factors[::2], factors[1::2], strict=True):
        low_rank.factors = pair


def losses_by_rows(
    model: GPT, x: Tensor, y: Tensor, scored: Tensor, lora: BatchedLoRA, looping: bool, **hints: Tensor
) -> Tensor:
    """`GPT.losses` [b, n] of adapted documents [b, T], and gradients for `LoRAOptimizer` alone."""

    def losses(x: Tensor, y: Tensor, scored: Tensor, *parts: Tensor) -> Tensor:
        told = dict(zip(hints, parts, strict=True))
        return model.losses(x, y, looping=looping, lora=lora, scored=scored, **told)

    factors = [factor for low_rank in lora.maps() for factor in low_rank.factors]
    return LossesByRows.apply(losses, (x, y, scored, *hints.values()), lora, *factors)
