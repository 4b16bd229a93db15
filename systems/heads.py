"""Own autograd functions of systems/eager.py for heads: norm with rotation, XSA with the gate."""

import functools

import torch
from torch import Tensor


def inverse_rms(x: Tensor) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of each vector, x [..., D] -> [..., 1], with the eps of F.rms_norm."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return square.div_(x.size(-1)).add_(torch.finfo(x.dtype).eps).rsqrt_()


class NormedHeads(torch.autograd.Function):
    """Heads to unit mean square, times their gain, then rotated; `tables` are of `rotation`.

    Heads without a gain, the last ones, stay as they are. Kept is the input, of which the values are a part
    and which lives as long as they do.
    """

    @staticmethod
    def forward(
        ctx: object, x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, sizes: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        """x [..., heads, d], gain [heads, or fewer] -> parts [..., size, d] of the heads."""
        heads, rest = x.split([len(gain), x.size(-2) - len(gain)], -2)
        factor = inverse_rms(heads)
        ctx.save_for_backward(x, factor, gain, cos, sin)
        y = rotate_(heads * (factor * gain[:, None]), cos, sin)
        return *y.split(sizes, -2), rest

    @staticmethod
    def backward(ctx: object, *parts: Tensor) -> tuple[Tensor | None, ...]:
        """Turned back, scaled, and without what lies along the normed head."""
        x, factor, gain, cos, sin = ctx.saved_tensors
        dx = torch.cat(parts, -2)
        turned, x = (heads[..., : len(gain), :] for heads in (dx, x))
        rotate_(turned, cos, sin, back=True)
        dots = (turned * x).sum(-1, keepdim=True).mul_(factor)  # with the normed heads
        dgain = dots.flatten(0, -3).sum(0)[..., 0] if ctx.needs_input_grad[1] else None
        turned.addcmul_(dots.mul_(factor).div_(-x.size(-1)), x).mul_(factor * gain[:, None])
        return dx, dgain, None, None, None


@functools.lru_cache(maxsize=1)  # all layers of a pass have one rope; tensors are told apart by identity
def rotation(cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Factors [..., heads, r] of what is turned and of its partner; cos and sin [..., 1, r/2].

    As large as the heads, so that multiplying by them is one pass over memory.
    """
    cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, -sin], -1)
    shape = (*cos.shape[:-2], heads, cos.size(-1))
    return cos.expand(shape).contiguous(), sin.expand(shape).contiguous()


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """x [..., heads, d] turned by the tables of `rotation`, or turned back, in place."""
    turned = x[..., : cos.size(-1)]
    partner = torch.cat(turned.chunk(2, -1)[::-1], -1)
    turned.mul_(cos).addcmul_(partner, sin, value=-1 if back else 1)
    return x


class ExcludeAndGate(torch.autograd.Function):
    """XSA and the gate: (y - (y v) v / |v|^2) g for each head, v the token's own value."""

    @staticmethod
    def forward(ctx: object, y: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        """y [..., H, d], v [..., G, d], gate [..., H] -> [..., H, d]."""
        grouped, gates, own = by_group(y, gate, v)
        length = torch.linalg.vector_norm(own[..., :1, :], dim=-1, keepdim=True)
        inverse = length.clamp_min_(1e-12).square_().reciprocal_()
        share = (grouped * own).sum(-1, keepdim=True).mul_(inverse)
        ctx.save_for_backward(y, v, gate, inverse, share)
        return torch.addcmul(grouped, share, own, value=-1).mul_(gates).view(y.shape)

    @staticmethod
    def backward(ctx: object, dz: Tensor) -> tuple[Tensor | None, ...]:
        """The projection is symmetric: dy is to dz as z to y."""
        y, v, gate, inverse, share = ctx.saved_tensors
        y, gates, own = by_group(y, gate, v)
        dz = dz.view(y.shape)
        along, dgate = (dz * own).sum(-1, keepdim=True), None
        if ctx.needs_input_grad[2]:
            dgate = (dz * y).sum(-1, keepdim=True).addcmul_(share, along, value=-1).view(gate.shape)
        along.mul_(inverse)
        dy = torch.addcmul(dz, along, own, value=-1).mul_(gates)
        along.mul_(gates)
        dv = (along * y).addcmul_(share * gates, dz).sum(-2)
        dv.addcmul_((share * along).sum(-2), v, value=-2).neg_()
        return dy.flatten(-3, -2), dv, dgate


def by_group(y: Tensor, gate: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y [..., H, d] as [..., G, H/G, d], its gates [..., G, H/G, 1], and for each head its value v again."""
    groups = v.size(-2)
    y = y.unflatten(-2, (groups, -1))
    return y, gate.unflatten(-1, (groups, -1))[..., None], v[..., None, :].expand_as(y).contiguous()
