"""Fused head with its loss, and fused MLP, on CUDA with Triton: TRITON_KERNELS.

A fused form is an operator that torch.compile leaves whole. Its Triton kernels are built, and Triton is
imported, when they are first launched. The eager forms in train_gpt.py are what they must agree with.
"""

import functools
import itertools
import os
from collections.abc import Callable

import torch
from torch import Tensor


def operator(schema: str, allocate: Callable, fill: Callable, *gradient: Callable) -> Callable:
    """An operator that torch.compile leaves whole: `allocate` makes its results, `fill` writes them.

    `gradient`: `keep(ctx, inputs, results)` saves what `backward(ctx, *grads)` needs.
    """

    def run(*inputs: object) -> Tensor | tuple[Tensor, ...]:
        results = allocate(*inputs)
        fill(*(results if isinstance(results, tuple) else (results,)), *inputs)
        return results

    name, bracket, rest = schema.partition("(")
    # A script that is loaded twice registers names of its own: a second operator of one name frees the first.
    spaces = (f"pg{n}" for n in itertools.count())
    space = next(space for space in spaces if not hasattr(getattr(torch.ops, space), name))
    operator = torch.library.custom_op(f"{space}::{name}", run, mutates_args=(), schema=bracket + rest)
    operator.register_fake(allocate)
    if gradient:
        keep, backward = gradient
        operator.register_autograd(
            backward, setup_context=lambda ctx, inputs, output: keep(ctx, inputs, output)
        )
    return operator


@functools.cache
def cross_entropy_kernel() -> Callable:
    """Losses [N] of logits z [N, V], whose gradients take their place. A program a row."""
    import triton
    import triton.language as tl

    @triton.jit
    def cross_entropy(z, targets, losses, cap, V: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        target = tl.load(targets + row)
        z += row * V
        high = tl.full([BLOCK], -cap, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        own = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):  # each lane keeps a maximum and a sum of its own
            column = start + tl.arange(0, BLOCK)
            inside = column < V
            u = tl.load(z + column, inside, float("-inf")).to(tl.float32) / cap
            e = tl.exp(-2 * tl.abs(u))
            c = tl.where(u < 0, -cap, cap) * (1 - e) / (1 + e)
            own += tl.where(column == target, c, 0.0)
            new = tl.maximum(high, c)
            total = total * tl.exp(high - new) + tl.where(inside, tl.exp(c - new), 0.0)
            high = new
        top = tl.max(high)
        norm = top + tl.log(tl.sum(total * tl.exp(high - top)))
        tl.store(losses + row, norm - tl.sum(own))
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < V
            u = tl.load(z + column, inside, float("-inf")).to(tl.float32) / cap
            e = tl.exp(-2 * tl.abs(u))
            c = tl.where(u < 0, -cap, cap) * (1 - e) / (1 + e)
            wrong = tl.exp(c - norm) - tl.where(column == target, 1.0, 0.0)
            tl.store(z + column, wrong * (4 * e / ((1 + e) * (1 + e))), inside)

    return cross_entropy


def launch_cross_entropy(z: Tensor, targets: Tensor, losses: Tensor, cap: float) -> None:
    """Write the losses [N] of logits z [N, V], and their gradients in the logits' place."""
    rows, vocabulary = z.shape
    block = min(4096, 1 << (vocabulary - 1).bit_length())
    if rows:
        cross_entropy_kernel()[(rows,)](z, targets, losses, cap, vocabulary, block, num_warps=8)


def _head_loss_backward(ctx: object, grads: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    """A factor of a row of dz may as well come after the product, or go to the other factor."""
    h, weight, dz = ctx.saved_tensors
    grads = grads[:, None]
    return (dz @ weight * grads).to(h.dtype), dz.T @ (h * grads).to(h.dtype), None, None


_head_loss = operator(
    "head_loss(Tensor h, Tensor weight, Tensor targets, float cap) -> (Tensor, Tensor)",
    lambda h, weight, *_: (  # size(0), unlike len, may be any number to a graph
        h.new_empty(h.size(0), dtype=torch.float32),
        h.new_empty(h.size(0), len(weight)),
    ),
    lambda losses, dz, h, weight, targets, cap: launch_cross_entropy(
        torch.mm(h, weight.T, out=dz), targets, losses, cap
    ),
    lambda ctx, inputs, results: ctx.save_for_backward(*inputs[:2], results[1]),
    _head_loss_backward,
)


def fused_cross_entropy(h: Tensor, weight: Tensor, targets: Tensor, cap: float) -> Tensor:
    """`softcapped_cross_entropy` of h W^T, h [..., D]; the logits are read once, gradient and all."""
    losses, _ = _head_loss(h.flatten(0, -2).contiguous(), weight.to(h.dtype), targets.flatten(), cap)
    return losses.view(targets.shape)


TILES = {  # M, N, K; warps; stages: of tensor descriptors (Hopper) or of pointers
    True: ((128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (64, 256, 64, 8, 4), (128, 128, 64, 4, 3)),
    False: ((128, 128, 32, 8, 3), (128, 128, 64, 8, 3), (128, 64, 32, 4, 4), (64, 128, 32, 4, 4)),
}


@functools.cache
def matmul_kernel(described: bool) -> Callable:
    """The product of `launch_matmul` with the tiles that are fastest for its N, K and pass.

    Triton times the tiles at the first launch, in the warm-up: the number of rows M is no part of the choice.
    Tiles that need too much shared memory drop out. The choice, which ranks make for themselves, says what a
    program computes; each number is the same sum over k, in the same order.
    """
    import triton
    import triton.language as tl

    def set_blocks(given: dict) -> None:
        for operand, rows in (("a", "BM"), ("b", "BN")) if described else ():
            given[operand].block_shape = [given[rows], given["BK"]]

    timed = TILES[described][: 1 if os.environ.get("TRITON_INTERPRET") == "1" else None]
    blocks = [dict(zip(("BM", "BN", "BK"), tiles, strict=False)) for tiles in timed]
    configs = [triton.Config(b, *t[3:], pre_hook=set_blocks) for b, t in zip(blocks, timed, strict=True)]

    @triton.autotune(configs, key=["N", "K", "BACKWARD"])
    @triton.jit(do_not_specialize=["M"])
    def matmul(a, b, out, hidden, signs, M, N, K: tl.constexpr, BACKWARD: tl.constexpr, DESC: tl.constexpr,
               BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
        across = tl.cdiv(N, BN)
        for turn in tl.range(0, tl.cdiv(tl.cdiv(M, BM) * across, tl.num_programs(0)), flatten=DESC):
            tile = turn * tl.num_programs(0) + tl.program_id(0)
            row = tile // across * BM
            column = tile % across * BN
            acc = tl.zeros([BM, BN], tl.float32)
            for k in range(0, K, BK):
                if DESC:
                    x = a.load([row, k])
                    w = b.load([column, k])
                else:
                    c = k + tl.arange(0, BK)[None]
                    r = row + tl.arange(0, BM)[:, None]
                    x = tl.load(a + r.to(tl.int64) * K + c, (r < M) & (c < K), 0.0)
                    r = column + tl.arange(0, BN)[:, None]
                    w = tl.load(b + r.to(tl.int64) * K + c, (r < N) & (c < K), 0.0)
                acc = tl.dot(x, w.T, acc)
            i = row + tl.arange(0, BM)[:, None]
            j = column + tl.arange(0, BN)[None]
            place = i.to(tl.int64) * N + j
            inside = (i < M) & (j < N)
            words = tl.cdiv(N, 32)  # the signs of 32 numbers lie in a word
            word = column // 32 + tl.arange(0, BN // 32)[None]
            kept = (i < M) & (word < words)
            shift = tl.arange(0, 32)[None, None]
            if BACKWARD:
                root = tl.sqrt(tl.load(hidden + place, inside, 0.0).to(tl.float32))
                bits = (tl.load(signs + i * words + word, kept, 0)[:, :, None] >> shift) & 1
                acc *= root * tl.where(tl.reshape(bits, [BM, BN]) == 1, -1.0, 2.0)
            else:
                bits = tl.reshape((acc < 0).to(tl.int32), [BM, BN // 32, 32]) << shift
                tl.store(signs + i * words + word, tl.sum(bits, 2), kept)
                acc *= acc * tl.where(acc < 0, 0.25, 1.0)
            tl.store(out + place, acc, inside)

    return matmul


def has_descriptors(a: Tensor) -> bool:
    """Whether tiles of a [M, K] may be loaded by tensor descriptors."""
    hopper = a.is_cuda and torch.cuda.get_device_capability(a.device)[0] in (9, 10)
    return hopper and a.element_size() == 2 and a.size(1) % 8 == 0


def launch_matmul(a: Tensor, b: Tensor, out: Tensor, hidden: Tensor, signs: Tensor, backward: bool) -> None:
    """h = a [M, K] b [N, K]^T; written are leaky_relu^2 of h and the signs of h, 32 in a word.

    Backward the product is multiplied by the slope of what forward made of h, `hidden`: 2 h = 2 sqrt(hidden),
    negative h / 2 = -sqrt(hidden). So a bit a number is all that is kept besides what is needed anyway.
    Persistent: each multiprocessor takes one tile after the other.
    """
    (rows, inner), columns, described = a.shape, len(b), has_descriptors(a)
    programs = torch.cuda.get_device_properties(a.device).multi_processor_count if a.is_cuda else 1
    if described:
        from triton.tools.tensor_descriptor import TensorDescriptor

        a, b = (TensorDescriptor.from_tensor(x, [1, 1]) for x in (a, b))  # `set_blocks` knows how large
    if rows:
        grid = lambda m: (min(programs, -(-rows // m["BM"]) * -(-columns // m["BN"])),)  # noqa: E731
        matmul_kernel(described)[grid](a, b, out, hidden, signs, rows, columns, inner, backward, described)


def _mlp_forward(y: Tensor, hidden: Tensor, signs: Tensor, x: Tensor, up: Tensor, down: Tensor) -> None:
    launch_matmul(x, up, hidden, hidden, signs, False)
    torch.mm(hidden, down.T, out=y)


def _mlp_backward(ctx: object, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient before the activation is (dy down) * slope, without storing the product."""
    x, up, down, hidden, signs = ctx.saved_tensors
    dh, (_, trains_up, trains_down) = _mlp_grad(dy.contiguous(), down, hidden, signs), ctx.needs_input_grad
    return dh @ up, dh.T @ x if trains_up else None, dy.T @ hidden if trains_down else None


_mlp = operator(
    "mlp(Tensor x, Tensor up, Tensor down) -> (Tensor, Tensor, Tensor)",
    lambda x, up, down: (
        torch.empty_like(x),
        x.new_empty(x.size(0), len(up)),
        x.new_empty(x.size(0), -(-len(up) // 32), dtype=torch.int32),
    ),
    _mlp_forward,
    lambda ctx, inputs, results: ctx.save_for_backward(*inputs, *results[1:]),
    _mlp_backward,
)
_mlp_grad = operator(
    "mlp_grad(Tensor dy, Tensor down, Tensor hidden, Tensor signs) -> Tensor",
    lambda dy, down, hidden, signs: torch.empty_like(hidden),
    lambda out, dy, down, hidden, signs: launch_matmul(dy, down.T.contiguous(), out, hidden, signs, True),
)


def fused_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """leaky_relu_squared(x up^T) down^T in the type of x [..., D]; the epilogue is part of the product."""
    y, *_ = _mlp(x.flatten(0, -2).contiguous(), up.to(x.dtype), down.to(x.dtype))
    return y.view(x.shape)
