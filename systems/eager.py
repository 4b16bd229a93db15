"""The model on a CPU without a compiler: own autograd functions, which need fewer passes over memory.

They compute what the plain forms of train_gpt.py say, in another order of rounding. Three things make them
faster: products by oneDNN (on some processors twice as fast as torch's own), scales of a branch that go into
its small matrix instead of its large result, and gradients by formula, in place. Each function computes the
gradients that are asked for: test-time training freezes the weights.
"""

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from systems.causal import BLOCK_LENGTHS, BLOCK_TOKENS, CausalAttention
from systems.heads import ExcludeAndGate, NormedHeads, inverse_rms, rotation
from systems.memory import keep_heap, spare_compiler
from systems.products import product, products, weight_gradient
from train_gpt import GPT, BatchedLoRA, Block, BlockContext, Segments, SlotAdapters, at_positions, attend_from

MLP_BLOCK = 512  # tokens: three of its tensors fit into a core's cache

keep_heap()
spare_compiler()


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


def token_blocks(x: Tensor, y: Tensor | None) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """Streams [..., D] in blocks [MLP_BLOCK or fewer, D]; as many times None for a y that is None."""
    blocks = x.flatten(0, -2).split(MLP_BLOCK)
    return blocks, [None] * len(blocks) if y is None else y.flatten(0, -2).split(MLP_BLOCK)


class ReluSquaredMLP(torch.autograd.Function):
    """leaky_relu(x U^T, 0.5)^2 D^T, plus `add`, MLP_BLOCK tokens at a time: what is wide stays in the cache.

    Kept is the leaky ReLU: it has the sign of its input.
    """

    @staticmethod
    def forward(ctx: object, x: Tensor, up: Tensor, down: Tensor, add: Tensor | None) -> Tensor:
        """x [..., D], up [F, D], down [D, F], add [..., D] -> [..., D]."""
        kept, parts = [], []
        for rows, part in zip(*token_blocks(x, add), strict=True):
            kept.append(product(rows, up, slope=0.5))
            parts.append(product(kept[-1].square(), down, add=part))
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, up, down, *kept)
        return torch.cat(parts).view(x.shape)

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The derivative of the square, 2 leaky, has its 2 in the small matrix."""
        (x, up, down, *kept), needs = ctx.saved_tensors, ctx.needs_input_grad
        double, dx, dup, ddown = (2 * down).mT, [], None, None
        for part, rows, leaky in zip(*token_blocks(dy, x), kept, strict=True):
            dh = product(part, double).mul_(leaky)
            dh = torch.ops.aten.leaky_relu_backward(dh, leaky, 0.5, False)
            dx.append(product(dh, up.mT) if needs[0] else None)
            dup = weight_gradient(dh, rows, dup) if needs[1] else None
            ddown = weight_gradient(part, leaky.square(), ddown) if needs[2] else None
        return torch.cat(dx).view(dy.shape) if needs[0] else None, dup, ddown, dy if needs[3] else None


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
            grads += [factor_gradient(c, dy, x) if needs[i] else None, c * dy if needs[i + 1] else None]
        return tuple(grads)


def factor_gradient(c: Tensor, dy: Tensor, x: Tensor) -> Tensor:
    """The sum of dy x [..., D] over all places where a factor c [D] or [] is the same."""
    return (dy * x).sum_to_size(c.shape) if c.ndim else torch.dot(dy.flatten(), x.flatten())


def add_skip(model: GPT, x: Tensor, skips: list[Tensor], step: int) -> Tensor:
    """`GPT._add_skip`, in which gate and weight are one factor of the skipped stream [..., D]."""
    if not skips or step >= len(model.skip_weights):
        return x
    weight, skip = model.skip_weights[step], skips.pop()
    if not model.cfg.skip_gates_enabled:
        return x + weight * skip
    gate = torch.sigmoid(model.skip_gates[step])
    return WeightedSum.apply(gate, x, (1 - gate) * weight, skip)


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


class Adapted(torch.autograd.Function):
    """What adapters of several roles make of x, added to y: one product each way for all of them."""

    @staticmethod
    def forward(
        ctx: object, y: Tensor, x: Tensor, scale: Tensor | None, starts: tuple[int, ...], *pairs: Tensor
    ) -> Tensor:
        """y [b, T, o], x [b, T, i] -> y + x A^T B^T; A [b, r, i] and B [b, n, r] by turns.

        Each B is for the n outputs from its start on. `scale` [o] goes into B.
        """
        As, Bs, rank, ctx.places = pairs[::2], pairs[1::2], pairs[0].size(1), []
        A, B = torch.cat(As, 1) if len(As) > 1 else As[0], y.new_zeros(len(y), y.size(-1), rank * len(As))
        for i, (start, factor) in enumerate(zip(starts, Bs, strict=True)):
            ctx.places.append((slice(start, start + factor.size(1)), slice(i * rank, (i + 1) * rank)))
            B[:, *ctx.places[-1]] = factor
        raw, B = B, B if scale is None else B * scale[:, None]
        narrow = products(x, A.mT)
        ctx.save_for_backward(x, A, B, narrow, scale, raw if ctx.needs_input_grad[2] else None)
        return torch.baddbmm(y, narrow, B.mT)

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of y, x, scale and the factors."""
        x, A, B, narrow, scale, raw = ctx.saved_tensors
        dnarrow, dB, dscale = products(dy, B), products(dy.mT, narrow), None
        if raw is not None:
            dscale = (dB * raw).sum((0, 2))
        dA, dB = products(dnarrow.mT, x), dB if scale is None else dB.mul_(scale[:, None])
        dx = products(dnarrow, A) if ctx.needs_input_grad[1] else None
        pairs = ((dA[:, columns], dB[:, rows, columns]) for rows, columns in ctx.places)
        return dy, dx, dscale, None, *itertools.chain.from_iterable(pairs)


def adapted(
    y: Tensor, x: Tensor, adapt: SlotAdapters | None, widths: Mapping[str, int], scale: Tensor | None = None
) -> Tensor:
    """y [b, T, o] plus what the adapters of roles, side by side in y by their widths, make of x.

    `scale` [o] is a factor of what they make.
    """
    pairs, starts, start = [], [], 0
    for role, width in widths.items():
        if adapt is not None and (pair := adapt.get(role, len(x))) is not None:
            pairs += pair
            starts.append(start)
        start += width
    return Adapted.apply(y, x, scale, tuple(starts), *pairs) if pairs else y


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
        narrow, losses = None if A is None else products(h, A.mT), torch.empty_like(h[..., 0])
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
            dnarrow = products(wide, B).mul_(factor)
            dh, dA, dB = dh.baddbmm_(dnarrow, A), products(dnarrow.mT, h), products(wide.mT, narrow * factor)
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
    if q.size(1) in BLOCK_LENGTHS and q.size(0) * q.size(1) >= BLOCK_TOKENS:
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
        cfg, gain, rope = self.attn.cfg, self.attn.q_gain, context.rope
        heads, groups, each = cfg.num_heads, cfg.num_kv_heads, (-1, cfg.head_dim)
        ones = gain.new_ones(groups)
        if used is n:
            x = self._products(n, context, "qkv")
            tables = rotation(*rope, heads + groups)
            gains, sizes = torch.cat([gain, ones]), (heads, groups)
            parts = NormedHeads.apply(x.unflatten(-1, each), gains, *tables, sizes)
            return x[..., : heads * cfg.head_dim], *parts
        x = self._products(n, context, "kv").unflatten(-1, each)
        k, v = NormedHeads.apply(x, ones, *rotation(*rope, groups), (groups,))
        q_flat = self._products(used, context, "q")
        tables = rotation(*(table[context.wanted] for table in rope), heads)
        q, _ = NormedHeads.apply(q_flat.unflatten(-1, each), gain, *tables, (heads,))
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
