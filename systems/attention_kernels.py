"""Fused forms of what stands around the attention, on CUDA with Triton; see systems/kernels.py."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from systems.kernels import operator
from train_gpt import BlockContext, project_together


@functools.cache
def qkv_norm_rope_kernel() -> Callable:
    """A program a head and ROWS tokens: queries and keys normed and turned, queries scaled, values copied."""
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["M", "T"])
    def qkv_norm_rope(x, gain, cos, sin, q, k, v, dx, dgain, M, T, H: tl.constexpr, G: tl.constexpr,
                      D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
                      BACKWARD: tl.constexpr):  # fmt: skip
        head = tl.program_id(1)
        token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        row = token.to(tl.int64)
        column = tl.arange(0, WIDTH)[None]
        inside = (row < M) & (column < D)
        x += row * (H + 2 * G) * D + head * D
        dx += row * (H + 2 * G) * D + head * D
        if head < H:
            side = q + (row * H + head) * D
        elif head < H + G:
            side = k + (row * G + head - H) * D
        else:
            side = v + (row * G + head - H - G) * D
        if head >= H + G:
            if BACKWARD:
                tl.store(dx + column, tl.load(side + column, inside), inside)
            else:
                tl.store(side + column, tl.load(x + column, inside), inside)
        else:
            turned = inside & (column < 2 * HALF)
            table = token % T * HALF + column % HALF
            c = tl.load(cos + table, turned, 1.0).to(tl.float32)
            s = tl.load(sin + table, turned, 0.0).to(tl.float32) * tl.where(column < HALF, 1.0, -1.0)
            partner = tl.where(column < HALF, column + HALF, column - HALF)
            factor = tl.load(gain + head, head < H, 1.0).to(tl.float32)
            value = tl.load(x + column, inside, 0.0).to(tl.float32)
            scale = 1 / tl.sqrt(tl.sum(value * value, 1, True) / D + 1.1920928955078125e-07)
            if BACKWARD:
                u = tl.load(side + column, inside, 0.0).to(tl.float32) * c
                u -= tl.load(side + partner, turned, 0.0).to(tl.float32) * s
                value *= scale
                dot = tl.sum(u * value, 1, True)
                tl.store(dx + column, factor * scale * (u - value * dot / D), inside)
                if head < H:
                    tl.store(dgain + row * H + head, dot, row < M)
            else:
                other = tl.load(x + partner, turned, 0.0).to(tl.float32)
                tl.store(side + column, (value * c + other * s) * scale * factor, inside)

    return qkv_norm_rope


def launch_qkv_norm_rope(
    x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, q: Tensor, k: Tensor, v: Tensor, *grads: Tensor
) -> None:
    """Products x [N, (H + 2G) D] <-> heads q [N, H, D], k and v [N, G, D]; cos and sin [T, r/2], gain [H].

    Forward q, k and v are written; backward they are gradients, and those of x and gain [N, H] are written.
    """
    rows, groups, size = v.shape
    sizes = rows, len(cos), len(gain), groups, size, cos.size(1), 32, 1 << (size - 1).bit_length()
    if rows:
        grid = (-(-rows // 32), len(gain) + 2 * groups)
        qkv_norm_rope_kernel()[grid](x, gain, cos, sin, q, k, v, *(grads or (x, gain)), *sizes, bool(grads))


def _qkv_norm_rope_backward(ctx: object, *grads: Tensor) -> tuple[Tensor | None, ...]:
    dx, dgain = _qkv_norm_rope_grad(*ctx.saved_tensors, *(grad.contiguous() for grad in grads))
    return dx, dgain.sum(0).to(ctx.saved_tensors[1].dtype), None, None, None


_qkv_norm_rope = operator(
    "qkv_norm_rope(Tensor x, Tensor gain, Tensor cos, Tensor sin, int groups) -> (Tensor, Tensor, Tensor)",
    lambda x, gain, cos, sin, groups: tuple(
        x.new_empty(x.size(0), n, x.size(1) // (len(gain) + 2 * groups)) for n in (len(gain), groups, groups)
    ),
    lambda q, k, v, x, gain, cos, sin, groups: launch_qkv_norm_rope(x, gain, cos, sin, q, k, v),
    lambda ctx, inputs, results: ctx.save_for_backward(*inputs[:4]),
    _qkv_norm_rope_backward,
)
_qkv_norm_rope_grad = operator(
    "qkv_norm_rope_grad(Tensor x, Tensor gain, Tensor cos, Tensor sin, Tensor dq, Tensor dk, Tensor dv)"
    " -> (Tensor, Tensor)",
    lambda x, gain, *_: (torch.empty_like(x), x.new_empty(x.size(0), len(gain), dtype=torch.float32)),
    lambda dx, dgain, *inputs: launch_qkv_norm_rope(*inputs, dx, dgain),
)


def fused_qkv_norm_rope(
    x: Tensor, gain: Tensor, rope: tuple[Tensor, Tensor], groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One product of all roles [B, T, (H + 2G) D] -> normed, rotated queries times gain, keys, and values."""
    tables = (table.to(x.dtype).flatten(1) for table in rope)
    parts = _qkv_norm_rope(x.flatten(0, -2).contiguous(), gain.to(x.dtype), *tables, groups)
    return tuple(part.unflatten(0, x.shape[:-1]) for part in parts)


def fused_heads(n: Tensor, context: BlockContext, gain: Tensor, groups: int) -> tuple[Tensor, ...]:
    """What `Attention._heads` makes of all positions of n [B, T, D], by one product and one kernel."""
    w = context.weights
    if context.adapt is None:
        products = F.linear(n, torch.cat([w.q, w.k, w.v]))
    else:
        products = torch.cat(project_together(n, {"q": w.q, "k": w.k, "v": w.v}, context.adapt), -1)
    return products[..., : len(w.q)], *fused_qkv_norm_rope(products, gain, context.rope, groups)


@functools.cache
def xsa_gate_kernel() -> Callable:
    """A program a key/value head and ROWS tokens: all query heads of the group lose what lies along v."""
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["M"])
    def xsa_gate(y, v, gate, dz, out, dv, dgate, M, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
                 ROWS: tl.constexpr, WIDTH: tl.constexpr, BACKWARD: tl.constexpr):  # fmt: skip
        group = tl.program_id(1)
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        column = tl.arange(0, WIDTH)[None]
        inside = (row < M) & (column < D)
        at = (row * G + group) * D + column
        away = tl.load(v + at, inside, 0.0).to(tl.float32)
        length = tl.maximum(tl.sqrt(tl.sum(away * away, 1, True)), 1e-12)
        away /= length
        turn = tl.zeros([ROWS, WIDTH], tl.float32)
        for i in range(H // G):
            head = row * H + group * (H // G) + i
            place = head * D + column
            own = tl.load(y + place, inside, 0.0).to(tl.float32)
            dot = tl.sum(own * away, 1, True)
            factor = tl.load(gate + head, row < M, 0.0).to(tl.float32)
            rest = own - dot * away
            if BACKWARD:
                grad = tl.load(dz + place, inside, 0.0).to(tl.float32)
                tl.store(dgate + head, tl.sum(grad * rest, 1, True), row < M)
                grad *= factor
                along = tl.sum(grad * away, 1, True)
                tl.store(out + place, grad - along * away, inside)
                turn -= dot * grad + along * own
            else:
                tl.store(out + place, rest * factor, inside)
        if BACKWARD:
            tl.store(dv + at, (turn - tl.sum(turn * away, 1, True) * away) / length, inside)

    return xsa_gate


def launch_xsa_gate(y: Tensor, v: Tensor, gate: Tensor, out: Tensor, *grads: Tensor) -> None:
    """y [N, H, D], v [N, G, D], gate [N, H] -> out; given dz, and room for those of v and gate: dy."""
    rows, groups, size = v.shape
    sizes = rows, y.size(1), groups, size, 32, 1 << (size - 1).bit_length()
    dz, dv, dgate = grads or (y, v, gate)
    if rows:
        grid = (-(-rows // 32), groups)
        xsa_gate_kernel()[grid](y, v, gate, dz, out, dv, dgate, *sizes, bool(grads))


_xsa_gate = operator(
    "xsa_gate(Tensor y, Tensor v, Tensor gate) -> Tensor",
    lambda y, v, gate: torch.empty_like(y),
    lambda out, y, v, gate: launch_xsa_gate(y, v, gate, out),
    lambda ctx, inputs, results: ctx.save_for_backward(*inputs),
    lambda ctx, dz: _xsa_gate_grad(*ctx.saved_tensors, dz.contiguous()),
)
_xsa_gate_grad = operator(
    "xsa_gate_grad(Tensor y, Tensor v, Tensor gate, Tensor dz) -> (Tensor, Tensor, Tensor)",
    lambda y, v, gate, dz: (torch.empty_like(y), torch.empty_like(v), torch.empty_like(gate)),
    lambda dy, dv, dgate, y, v, gate, dz: launch_xsa_gate(y, v, gate, dy, dz, dv, dgate),
)


def fused_xsa_gate(y: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """XSA and gate: y [B, T, H, D] without its part along v [B, T, G, D], times gate [B, T, H]."""
    parts = (part.flatten(0, 1).contiguous() for part in (y, v, gate.to(y.dtype)))
    return _xsa_gate(*parts).view(y.shape)
