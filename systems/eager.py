"""The model on a CPU without a compiler: own autograd functions, which need fewer passes over memory.

They compute what the plain forms of train_gpt.py say, in another order of rounding. Three things make them
faster: products by oneDNN (on some processors twice as fast as torch's own), scales of a branch that go into
its small matrix instead of its large result, and gradients by formula, in place. Each function computes the
gradients that are asked for: test-time training freezes the weights.
"""

import functools
import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from systems.causal import KEPT_LENGTHS, CausalAttention
from systems.memory import keep_heap, spare_compiler
from train_gpt import BatchedLoRA, Block, BlockContext, Segments, SlotAdapters, at_positions, attend_from

keep_heap()
spare_compiler()


def product(x: Tensor, weight: Tensor, *, add: Tensor | None = None, slope: float = 1.0) -> Tensor:
    """x [..., i] times weight [o, i] transposed, plus `add` [..., o] or through a leaky ReLU; no gradient."""
    if x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # Of matrices that are neither whole nor wholly transposed oneDNN makes a hundred times the work.
        x, weight = (m if m.is_contiguous() or m.mT.is_contiguous() else m.contiguous() for m in (x, weight))
        linear = torch.ops.mkldnn._linear_pointwise
        if add is not None:
            return linear.binary(x, add, weight, None, "add")
        return linear(x, weight, None, "none" if slope == 1 else "leaky_relu", [slope], "")
    y = F.linear(x, weight)
    return F.leaky_relu(y, slope) if add is None else y + add


def weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """The sum of outer products dy [..., o] x [..., i] over all positions -> [o, i]."""
    dy, x = dy.flatten(0, -2).mT, x.flatten(0, -2).mT
    return product(x, dy).mT if len(dy) > len(x) else product(dy, x)  # the wider one is laid out anew


class Linear(torch.autograd.Function):
    """x W^T, plus `add` where it is given."""

    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor, add: Tensor | None) -> Tensor:
        """x [..., i], weight [o, i], add [..., o] -> [..., o]."""
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight, add=add)

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of what needs one."""
        (x, weight), (for_x, for_weight, for_add) = ctx.saved_tensors, ctx.needs_input_grad
        dx = product(dy, weight.mT) if for_x else None
        return dx, weight_gradient(dy, x) if for_weight else None, dy if for_add else None


class ReluSquaredMLP(torch.autograd.Function):
    """leaky_relu(x U^T, 0.5)^2 D^T, plus `add`. Kept is the leaky ReLU: it has the sign of its input."""

    @staticmethod
    def forward(ctx: object, x: Tensor, up: Tensor, down: Tensor, add: Tensor | None) -> Tensor:
        """x [..., D], up [F, D], down [D, F], add [..., D] -> [..., D]."""
        leaky = product(x, up, slope=0.5)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, up, down, leaky)
        return product(leaky.square(), down, add=add)

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The derivative of the square, 2 leaky, has its 2 in the small matrix."""
        (x, up, down, leaky), needs = ctx.saved_tensors, ctx.needs_input_grad
        dh = product(dy, (2 * down).mT).mul_(leaky)
        dh = torch.ops.aten.leaky_relu_backward(dh, leaky, 0.5, False)
        dx = product(dh, up.mT) if needs[0] else None
        dup = weight_gradient(dh, x) if needs[1] else None
        ddown = weight_gradient(dy, leaky.square()) if needs[2] else None
        return dx, dup, ddown, dy if needs[3] else None


class WeightedSum(torch.autograd.Function):
    """The sum of c x over pairs of a vector c [D] or a number c [] and a stream x [..., D]."""

    @staticmethod
    def forward(ctx: object, *pairs: Tensor) -> Tensor:
        """c_1, x_1, c_2, x_2, ... -> [..., D]."""
        ctx.save_for_backward(*pairs)
        y = pairs[0] * pairs[1]
        for c, x in zip(pairs[2::2], pairs[3::2], strict=True):
            y.addcmul_(c, x)
        return y

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of what needs one."""
        grads, needs = [], ctx.needs_input_grad
        for i in range(0, len(needs), 2):
            c, x = ctx.saved_tensors[i : i + 2]
            grads += [(dy * x).sum_to_size(c.shape) if needs[i] else None, c * dy if needs[i + 1] else None]
        return tuple(grads)


def inverse_rms(x: Tensor) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of each vector, x [..., D] -> [..., 1], with the eps of F.rms_norm."""
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
    return square.div_(x.size(-1)).add_(torch.finfo(x.dtype).eps).rsqrt_()


class ScaledNorm(torch.autograd.Function):
    """x over the root of its mean square, times a number. Kept is the result, which a product keeps too."""

    @staticmethod
    def forward(ctx: object, x: Tensor, scale: float) -> Tensor:
        """x [..., D] -> [..., D]."""
        factor = inverse_rms(x).mul_(scale)
        y = x * factor
        ctx.save_for_backward(y, factor)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> tuple[Tensor, None]:
        """What lies along the result goes, as its length is given."""
        y, factor = ctx.saved_tensors
        along = (dy * y).sum(-1, keepdim=True).div_(-y.size(-1) * ctx.scale**2)
        return torch.addcmul(dy, along, y).mul_(factor), None


class NormedHeads(torch.autograd.Function):
    """Heads to unit mean square, times their gain, then rotated; `tables` are of `rotation`.

    Kept is the input, which lies in the product with the values and lives as long as they do.
    """

    @staticmethod
    def forward(ctx: object, x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
        """x [..., heads, d] (of a wider product), gain [heads] -> [..., heads, d]."""
        factor = inverse_rms(x)
        ctx.save_for_backward(x, factor, gain, cos, sin)
        ctx.half = half
        return rotate(x * (factor * gain[:, None]), cos, sin, half)

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Turned back, scaled, and without what lies along the normed head."""
        x, factor, gain, cos, sin = ctx.saved_tensors
        turned = rotate(dy, cos, sin, ctx.half, back=True)
        dots = (turned * x).sum(-1, keepdim=True).mul_(factor)  # with the normed heads
        dgain = dots.flatten(0, -3).sum(0)[..., 0] if ctx.needs_input_grad[1] else None
        dx = turned.addcmul_(dots.mul_(factor).div_(-x.size(-1)), x).mul_(factor * gain[:, None])
        return dx, dgain, None, None, None


@functools.lru_cache(maxsize=1)  # all layers of a pass have one rope; tensors are told apart by identity
def rotation(cos: Tensor, sin: Tensor, heads: int, size: int) -> tuple[Tensor, Tensor, int]:
    """Factors [..., heads, d] of a head and of its partner, and half the rotation; cos and sin [..., 1, r/2].

    As large as the heads, so that multiplying by them is one pass over memory that lies in one piece.
    """
    half = cos.size(-1)
    rest = cos.new_zeros(1).expand(*cos.shape[:-1], size - 2 * half)
    cos, sin = torch.cat([cos, cos, rest + 1], -1), torch.cat([sin, -sin, rest], -1)
    shape = (*cos.shape[:-2], heads, size)
    return cos.expand(shape).contiguous(), sin.expand(shape).contiguous(), half


def rotate(x: Tensor, cos: Tensor, sin: Tensor, half: int, back: bool = False) -> Tensor:
    """x [..., heads, d] turned by the tables of `rotation`, or turned back."""
    a, b, rest = x.split([half, half, x.size(-1) - 2 * half], -1)
    partner = torch.cat([b, a, rest], -1)
    return (x * cos).addcmul_(partner, sin, value=-1 if back else 1)


class ExcludeAndGate(torch.autograd.Function):
    """XSA and the gate: (y - (y v) v / |v|^2) g for each head, v the token's own value."""

    @staticmethod
    def forward(ctx: object, y: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        """y [..., H, d], v [..., G, d], gate [..., H] -> [..., H, d]."""
        own, v = v, repeated(v, y)
        inverse = torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp_min_(1e-12).square_().reciprocal_()
        share = (y * v).sum(-1, keepdim=True).mul_(inverse)
        ctx.save_for_backward(y, own, gate, inverse, share)
        return torch.addcmul(y, share, v, value=-1).mul_(gate[..., None])

    @staticmethod
    def backward(ctx: object, dz: Tensor) -> tuple[Tensor | None, ...]:
        """The projection is symmetric: dy is to dz as z to y."""
        y, v, gate, inverse, share = ctx.saved_tensors
        groups, v = v.size(-2), repeated(v, y)
        along, own = (dz * v).sum(-1, keepdim=True), (dz * y).sum(-1, keepdim=True)
        dgate = own.addcmul_(share, along, value=-1)[..., 0] if ctx.needs_input_grad[2] else None
        gate = gate[..., None]
        along.mul_(inverse)
        dy = torch.addcmul(dz, along, v, value=-1).mul_(gate)
        dv = torch.addcmul(along * y, share, dz)
        dv.addcmul_(share * along, v, value=-2).mul_(gate)
        return dy, dv.unflatten(-2, (groups, -1)).sum(-2).neg_(), dgate


def repeated(v: Tensor, y: Tensor) -> Tensor:
    """v [..., G, d] -> [..., H, d] for the heads of y [..., H, d]: passes over equal shapes are faster."""
    return v.repeat_interleave(y.size(-2) // v.size(-2), -2)


class Adapted(torch.autograd.Function):
    """What adapters make of x, added to y."""

    @staticmethod
    def forward(ctx: object, y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """y [b, T, o], x [b, T, i], A [b, r, i], B [b, o, r] -> y + x A^T B^T."""
        narrow = x @ A.mT
        ctx.save_for_backward(x, A, B, narrow)
        return torch.baddbmm(y, narrow, B.mT)

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> tuple[Tensor, ...]:
        """Gradients of all four."""
        x, A, B, narrow = ctx.saved_tensors
        dnarrow = dy @ B
        return dy, dnarrow @ A, dnarrow.mT @ x, dy.mT @ narrow


def adapted(
    y: Tensor, x: Tensor, adapt: SlotAdapters | None, widths: Mapping[str, int], scale: Tensor | None = None
) -> Tensor:
    """y [b, T, o] plus what the adapters of roles, side by side in y by their widths, make of x.

    Those of all roles are one product each way. `scale` [o] goes into the small factor B.
    """
    As, Bs, start = [], [], 0
    for role, width in widths.items():
        if adapt is not None and (pair := adapt.get(role, len(x))) is not None:
            As.append(pair[0])
            Bs.append(F.pad(pair[1], (0, 0, start, y.size(-1) - start - width)))
        start += width
    if not As:
        return y
    A, B = (parts[0] if len(parts) == 1 else torch.cat(parts, dim) for parts, dim in ((As, 1), (Bs, 2)))
    return Adapted.apply(y, x, A, B if scale is None else B * scale[:, None])


class SoftcappedHead(torch.autograd.Function):
    """Cross entropy of soft-capped logits, with the gradient of the logits made beside it, block by block.

    What a loss is multiplied with on the way back goes to the hidden states, not to the wide logits.
    """

    @staticmethod
    def forward(
        ctx: object, h: Tensor, weight: Tensor, targets: Tensor, cap: float, A: Tensor | None, B: Tensor
    ) -> Tensor:
        """h [b, n, D], weight [V, D], targets [b, n], adapters A [b, r, D] and B [b, V, r] -> nats [b, n]."""
        wide = h.new_empty(*targets.shape, len(weight)) if any(ctx.needs_input_grad) else None
        narrow, losses = None if A is None else h @ A.mT, torch.empty_like(h[..., 0])
        rows = 256 if A is None else targets.size(1)  # logits of so many tokens stay in the cache
        parts = (h, targets[..., None], losses[..., None], *([] if wide is None else [wide]))
        scaled = weight * (2 / cap)  # tanh(u) is 2 sigmoid(2 u) - 1, and the softmax does not see the 1
        for i, (x, own, loss, *gradient) in enumerate(
            zip(*(part.flatten(0, 1).split(rows) for part in parts), strict=True)
        ):
            z = product(x, scaled)
            s = (z if A is None else z.addmm_(narrow[i], B[i].mT, alpha=2 / cap)).sigmoid_()
            logits = s * (2 * cap)
            p = torch.softmax(logits, -1, out=gradient[0] if gradient else None)
            # The norm by the most probable token: the target's probability may be too small for a number.
            norm = logits.amax(-1, keepdim=True).sub_(p.amax(-1, keepdim=True).log_())
            torch.sub(norm, logits.gather(1, own), out=loss)
            if gradient:  # of the logits, without the 4 of a derivative 4 s (1 - s)
                p.scatter_add_(1, own, torch.full_like(loss, -1.0)).mul_(s.addcmul_(s, s, value=-1))
        ctx.save_for_backward(h, weight, A, B, narrow, wide)
        return losses

    @staticmethod
    def backward(ctx: object, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states, weight and adapters."""
        h, weight, A, B, narrow, wide = ctx.saved_tensors
        factor, dA, dB = 4 * dlosses[..., None], None, None
        dh = product(wide, weight.mT).mul_(factor)
        dweight = weight_gradient(wide, h * factor) if ctx.needs_input_grad[1] else None
        if A is not None:
            dnarrow = (wide @ B).mul_(factor)
            dh, dA, dB = dh.baddbmm_(dnarrow, A), dnarrow.mT @ h, wide.mT @ (narrow * factor)
        return dh, dweight, None, None, dA, dB


def head_loss(h: Tensor, weight: Tensor, targets: Tensor, cap: float, lora: BatchedLoRA | None) -> Tensor:
    """Hidden states [B, T, D], head [V, D], targets [B, T] -> nats [B, T]."""
    pair = (None, None) if lora is None else lora.at(0).get("head", len(h))
    return SoftcappedHead.apply(h, weight, targets, cap, *pair)


def attend_segments(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None) -> Tensor:
    """`attend`; segments of one length that follow each other are one call."""
    if segments is None:
        return _causal(q, k, v)
    runs = itertools.groupby(n for n in segments.cu_seqlens.diff().tolist() if n)
    runs = [(length, length * len(list(run))) for length, run in runs]
    spans = zip(*(x.split([total for _, total in runs], 1) for x in (q, k, v)), strict=True)
    parts = (
        _causal(*(x.view(-1, length, *x.shape[2:]) for x in span)).reshape(1, total, *q.shape[2:])
        for (length, total), span in zip(runs, spans, strict=True)
    )
    return torch.cat(list(parts), 1)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.requires_grad and q.size(1) in KEPT_LENGTHS:
        return CausalAttention.apply(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


class EagerBlock(Block):
    """A layer of own functions; `Block` and `Attention` say what it computes."""

    def _mix(self, x: Tensor, context: BlockContext) -> Tensor:
        return WeightedSum.apply(self.resid_mix[0], x, self.resid_mix[1], context.x0)

    def _attention(self, u: Tensor, context: BlockContext, add: Tensor | None = None) -> Tensor:
        """The attention branch of a stream u [B, T, D], plus `add` [B, T, D] (of the wanted positions)."""
        attn, wanted, past = self.attn, context.wanted, context.past
        n = ScaledNorm.apply(u, self.norm_scale)
        if context.on_input is not None:
            context.on_input(f"blocks.{self.layer}.attn.c_q.weight", n)
        used = at_positions(n, wanted)
        q_flat, q, k, v = self._heads(n, used, context)
        own = at_positions(v.flatten(-2), wanted).unflatten(-1, v.shape[-2:])
        if wanted is None and past is None:
            y = attend_segments(q, k, v, context.segments)
        else:
            keys, values = (k, v) if past is None else past(k, v)
            positions = torch.arange(k.size(1))[None] if wanted is None else wanted
            y = attend_from(q, positions + keys.size(1) - k.size(1), keys, values)
        gate = attn._gate(used, q_flat)
        if attn.excludes_self and gate is not None:
            y = ExcludeAndGate.apply(y, own, gate).flatten(-2)
        else:
            y = attn._exclude_and_gate(y, own, gate).flatten(-2)
        if context.on_input is not None:
            context.on_input(f"blocks.{self.layer}.attn.proj.weight", y)
        y = Linear.apply(y, self.attn_scale[:, None] * context.weights.o, add)
        return adapted(y, used, context.adapt, {"o": y.size(-1)}, self.attn_scale)

    def _heads(self, n: Tensor, used: Tensor, context: BlockContext) -> tuple[Tensor, ...]:
        """Raw queries [B, n, H d] of the inputs used; queries; of all inputs keys, values [B, T, G, d]."""
        cfg, gain, groups, rope = self.attn.cfg, self.attn.q_gain, self.attn.cfg.num_kv_heads, context.rope
        gain = torch.cat([gain, gain.new_ones(groups)])
        if used is n:
            x = self._products(n, context, "qkv").unflatten(-1, (-1, cfg.head_dim))
            heads, v = x.split([len(gain), groups], -2)
            normed = NormedHeads.apply(heads, gain, *rotation(*rope, len(gain), cfg.head_dim))
            q, k = normed.split([cfg.num_heads, groups], -2)
            return x[..., : cfg.num_heads, :].flatten(-2), q, k, v
        k, v = self._products(n, context, "kv").unflatten(-1, (-1, cfg.head_dim)).split(groups, -2)
        k = NormedHeads.apply(k, gain[-groups:], *rotation(*rope, groups, cfg.head_dim))
        q_flat = self._products(used, context, "q")
        tables = rotation(*(table[context.wanted] for table in rope), cfg.num_heads, cfg.head_dim)
        q = NormedHeads.apply(q_flat.unflatten(-1, (-1, cfg.head_dim)), gain[:-groups], *tables)
        return q_flat, q, k, v

    def _products(self, n: Tensor, context: BlockContext, roles: str) -> Tensor:
        """The products of some roles side by side."""
        weights = {role: getattr(context.weights, role) for role in roles}
        y = Linear.apply(n, torch.cat(list(weights.values())), None)
        return adapted(y, n, context.adapt, {role: len(weight) for role, weight in weights.items()})

    def _mlp(self, u: Tensor, context: BlockContext, add: Tensor | None = None) -> Tensor:
        """The MLP branch of a stream u [B, T, D], plus `add` [B, T, D]."""
        n, w = ScaledNorm.apply(u, self.norm_scale), context.weights
        if context.on_input is not None:
            context.on_input(f"blocks.{self.layer}.mlp.fc.weight", n)
            hidden = product(n, w.up, slope=0.5).square()
            context.on_input(f"blocks.{self.layer}.mlp.proj.weight", hidden)
        y = ReluSquaredMLP.apply(n, w.up, self.mlp_scale[:, None] * w.down, add)
        return adapted(y, n, context.adapt, {"mlp": y.size(-1)}, self.mlp_scale)

    def serial(self, x: Tensor, context: BlockContext) -> Tensor:
        """Attention, then the MLP on its result."""
        u = self._mix(x, context)
        u = self._attention(u, context, at_positions(u, context.wanted))
        return self._mlp(u, context, u)

    def single(self, x: Tensor, context: BlockContext) -> Tensor:
        """Attention and MLP side by side on one stream (PR #1493)."""
        u = self._mix(x, context)
        kept = at_positions(u, context.wanted)
        return self._mlp(kept, context, self._attention(u, context, kept))

    def lanes(self, x: Tensor, y: Tensor, context: BlockContext, keep: Tensor, add: Tensor) -> tuple:
        """Two lanes: attention reads x, the MLP y; `keep` [2] per lane, `add` [source, lane]."""
        a = self._attention(self._mix(x, context), context)
        x, y = (at_positions(lane, context.wanted) for lane in (x, y))
        m = self._mlp(y, context)
        lanes = enumerate((x, y))
        return tuple(WeightedSum.apply(keep[i], lane, add[0, i], a, add[1, i], m) for i, lane in lanes)
