"""Each kernel against its eager form, the compiled eager form and the roofline; tiles and backends compared.

    python bench/kernels.py [--device cpu] [--json] [--only NAME] [--tokens N]
    python bench/kernels.py --compile-only [--every-tile]     # no GPU: registers, spills, shared memory

The roofline is the longer of FLOPs / peak and bytes / bandwidth of the data sheet, `of_roof` its share of the
time. On a CPU the eager forms of a small model are timed; Triton kernels and GPU backends need CUDA.
"""

import math
import re
import subprocess
import sys
import tempfile

import torch
import torch.nn.functional as F
from common import environment, mean_context, measure, parser, peaks, report, setup, text_row, tg

from harness.backends import ATTENTION
from systems import attention_kernels, kernels


class Bench:
    """Times functions and sets them beside the roofline."""

    def __init__(self, args: object):
        self.args = args
        self.cfg, self.ranks, _ = setup(args.device)
        self.cuda = self.ranks.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.tokens = args.tokens or self.cfg.train_batch_tokens // self.cfg.grad_accum_steps
        self.flop_rate, self.bandwidth = peaks(self.ranks)
        self.rows: list[dict] = []

    def random(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Normal numbers that want a gradient."""
        x = torch.randn(shape, device=self.ranks.device, dtype=self.dtype) * scale
        return x.requires_grad_()

    def time(self, name: str, form: str, function, inputs=(), flops: float = 0, moved: float = 0) -> None:
        """A row for the forward pass and, given inputs to differentiate by, one for both passes."""
        if self.args.only and self.args.only not in name:
            return

        def both() -> None:
            y = function()
            torch.autograd.grad(y, inputs, torch.ones_like(y))

        with torch.no_grad():
            self._row(name, form, "forward", function, flops, moved)
        if inputs:
            self._row(name, form, "forward + backward", both, 3 * flops, 3 * moved)

    def _row(self, name: str, form: str, passes: str, function, flops: float, moved: float) -> None:
        row = {"kernel": name, "form": form, "passes": passes}
        try:
            row |= measure(function, self.ranks, self.args.repeats)
        except Exception as error:  # one that does not work must not hide the others
            self.rows.append(row | {"error": f"{type(error).__name__}: {error}".split("\n")[0][:120]})
            return
        roof = 1e3 * max(flops / self.flop_rate, moved / self.bandwidth)
        self.rows.append(row | {"roof_ms": roof, "of_roof": roof / row["ms"]})

    def forms(self, name: str, eager, fused, inputs, flops: float, moved: float) -> None:
        """The eager form, what the compiler makes of it, and the kernel."""
        self.time(name, "eager", eager, inputs, flops, moved)
        if self.cuda:  # the kernel of the loss computes the gradient in the forward pass
            compiled = torch.compile(eager, fullgraph=True, dynamic=False)
            self.time(name, "compiled", compiled, inputs, flops, moved)
            self.time(name, "triton", fused, inputs, flops, moved)

    def cross_entropy(self) -> None:
        """Head and loss: the logits written once and read once, the gradient in their place."""
        h, weight = (self.random(n, self.cfg.model_dim) for n in (self.tokens, self.cfg.vocab_size))
        targets = torch.randint(self.cfg.vocab_size, (self.tokens,), device=self.ranks.device)
        cap = self.cfg.logit_softcap
        eager = lambda: tg.softcapped_cross_entropy(h @ weight.T, targets, cap)  # noqa: E731
        fused = lambda: kernels.fused_cross_entropy(h, weight, targets, cap)  # noqa: E731
        flops, moved = 2 * h.numel() * len(weight), 2 * self.tokens * len(weight) * h.element_size()
        self.forms("head and cross entropy", eager, fused, [h, weight], flops, moved)

    def heads(self) -> None:
        """Norm, rotation and gain of queries and keys; then exclusion of the own value, and the gate."""
        cfg = self.cfg
        groups, size = cfg.num_kv_heads, cfg.head_dim
        products = self.random(1, self.tokens, (cfg.num_heads + 2 * groups) * size)
        rope, gain = tg.rope_tables(cfg, self.tokens, self.ranks.device), self.random(cfg.num_heads)

        def eager() -> torch.Tensor:
            q, k, v = products.unflatten(-1, (-1, size)).split([cfg.num_heads, groups, groups], -2)
            q, k = (tg.apply_rope(tg.rms_norm(part), rope) for part in (q, k))
            return torch.cat([q * gain[:, None], k, v], -2)

        fused = lambda: torch.cat(attention_kernels.fused_qkv_norm_rope(products, gain, rope, groups), -2)  # noqa: E731
        self.forms("heads (and a cat)", eager, fused, [products, gain], 0, 2 * products.nbytes)
        y, v = (self.random(1, self.tokens, n, size) for n in (cfg.num_heads, groups))
        gate = self.random(1, self.tokens, cfg.num_heads)
        eager_gate = lambda: tg.exclude_self(y, v) * gate[..., None]  # noqa: E731
        fused_gate = lambda: attention_kernels.fused_xsa_gate(y, v, gate)  # noqa: E731
        moved = 2 * y.nbytes + v.nbytes
        self.forms("exclusion and gate", eager_gate, fused_gate, [y, v, gate], 0, moved)

    def mlp(self) -> None:
        """Up-projection, leaky-ReLU^2, down-projection."""
        width, hidden = self.cfg.model_dim, self.cfg.mlp_dim
        x, up, down = self.random(self.tokens, width), self.random(hidden, width), self.random(width, hidden)
        eager = lambda: F.linear(tg.leaky_relu_squared(F.linear(x, up)), down)  # noqa: E731
        moved = 2 * x.nbytes + 2 * self.tokens * hidden * x.element_size()
        fused = lambda: kernels.fused_mlp(x, up, down)  # noqa: E731
        self.forms("mlp", eager, fused, [x, up, down], 4 * self.tokens * width * hidden, moved)

    def tiles(self) -> None:
        """The fused product with other tiles, and a plain product of the same sizes."""
        a, b = (self.random(n, self.cfg.model_dim).detach() for n in (self.tokens, self.cfg.mlp_dim))
        flops, stored = 2 * self.tokens * b.numel(), self.tokens * len(b) * a.element_size()
        self.time("up-projection", "library, no epilogue", lambda: a @ b.T, (), flops, a.nbytes + stored)
        if not self.cuda:
            return
        out, past = (torch.rand(self.tokens, len(b), device=a.device, dtype=a.dtype) for _ in range(2))
        signs = torch.zeros(self.tokens, -(-len(b) // 32), dtype=torch.int32, device=a.device)
        described, all_tiles = kernels.has_descriptors(a), kernels.TILES[kernels.has_descriptors(a)]
        for backward in (False, True):
            run = lambda back=backward: kernels.launch_matmul(a, b, out, past, signs, back)  # noqa: E731
            run()
            best = kernels.matmul_kernel(described).best_config.all_kwargs()
            for tiles in all_tiles:
                kernels.TILES[described] = (tiles,)
                kernels.matmul_kernel.cache_clear()
                names = ("BM", "BN", "BK", "num_warps", "num_stages")
                chosen = dict(zip(names, tiles, strict=True)).items() <= best.items()
                form = f"{'descriptors' if described else 'pointers'} {tiles}{' (chosen)' * chosen}"
                name = f"matmul {'backward' if backward else 'forward'}"
                self.time(name, form, run, (), flops, a.nbytes + (2 if backward else 1) * stored)
            kernels.TILES[described] = all_tiles
            kernels.matmul_kernel.cache_clear()

    def attention(self) -> None:
        """Every backend that works, on packed documents and on padded rows."""
        cfg, (*_, segments) = self.cfg, text_row(self.cfg, self.tokens)
        *_, placed = self.ranks.send(*text_row(cfg, self.tokens))
        heads = (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)
        packed = [self.random(1, self.tokens, n, cfg.head_dim) for n in heads]
        length = min(cfg.ttt_eval_seq_len, self.tokens)
        padded = [self.random(self.tokens // length, length, n, cfg.head_dim) for n in heads]
        per_pair, moved = 4 * cfg.model_dim * self.tokens, sum(x.nbytes for x in packed) + packed[0].nbytes
        for backend in ATTENTION if self.cuda else ["plain"]:
            function = tg.attend
            if backend == "flex":  # only its compiled form is a fused kernel
                function = torch.compile(tg.attend, fullgraph=True, dynamic=False)
            chosen = tg.Backends(backend)
            run = lambda f=function, b=chosen: f(*packed, placed, b)  # noqa: E731
            self.time("attention, packed", backend, run, packed, per_pair * mean_context(segments), moved)
            run = lambda f=function, b=chosen: f(*padded, None, b)  # noqa: E731
            self.time("attention, padded", backend, run, padded, per_pair * (length + 1) / 2, moved)

    def projections(self) -> None:
        """Queries, keys and values by three products or one."""
        width, kv = self.cfg.model_dim, self.cfg.num_kv_heads * self.cfg.head_dim
        x, weights = self.random(self.tokens, width), [self.random(n, width) for n in (width, kv, kv)]
        flops, moved = 2 * self.tokens * width * (width + 2 * kv), 2 * x.nbytes * (1 + kv / width)
        three = lambda: torch.cat([F.linear(x, w) for w in weights], -1)  # noqa: E731
        self.time("qkv", "three products (and a cat)", three, [x, *weights], flops, moved)
        self.time("qkv", "one product", lambda: F.linear(x, torch.cat(weights)), [x, *weights], flops, moved)

    def norms(self) -> None:
        """Residual mix, norm and scale: what lies between the products."""
        x, x0 = (self.random(self.tokens, self.cfg.model_dim) for _ in range(2))
        mix = self.random(2, self.cfg.model_dim)
        eager = lambda: tg.rms_norm(mix[0] * x + mix[1] * x0) * 0.5  # noqa: E731
        self.time("mix and norm", "eager", eager, [x, x0], 0, 3 * x.nbytes)
        if self.cuda:
            self.time("mix and norm", "compiled", torch.compile(eager), [x, x0], 0, 3 * x.nbytes)

    def gates(self) -> None:
        """The sparse attention gate: a product with 12 inputs and 8 outputs, or a sum that can be fused."""
        x, window = self.random(1, self.tokens, self.cfg.model_dim), self.cfg.gate_window
        weight = self.random(self.cfg.num_heads, window)
        product = lambda: torch.sigmoid(F.linear(x[..., :window], weight))  # noqa: E731
        summed = lambda: torch.sigmoid((x[..., None, :window] * weight).sum(-1))  # noqa: E731
        for form, function in (("product", product), ("sum", summed)):
            compiled = torch.compile(function, fullgraph=True, dynamic=False) if self.cuda else function
            self.time(
                "attention gate", form, compiled, [x, weight], 0, self.tokens * window * x.element_size()
            )

    def newton_schulz(self) -> None:
        """Orthogonalisation of the four banks; symmetric products could save at most half of its products."""
        cfg, kv = self.cfg, self.cfg.num_kv_heads * self.cfg.head_dim
        layers, width, hidden = cfg.num_layers, cfg.model_dim, cfg.mlp_dim
        for shape in ((2 * layers, width, width), (2 * layers, kv, width), (layers, hidden, width)):
            bank = self.random(*shape).detach()
            short, long = sorted(shape[1:])
            flops = 5 * shape[0] * (4 * short**2 * long + 2 * short**3)
            self.time(f"newton-schulz {shape}", "eager", lambda b=bank: tg.newton_schulz(b), (), flops, 0)
            if self.cuda:
                compiled = torch.compile(tg.newton_schulz, fullgraph=True, dynamic=False)
                self.time(f"newton-schulz {shape}", "compiled", lambda b=bank, f=compiled: f(b), (), flops, 0)


def compile_one(kernel: object, arch: int, types: dict[str, str], constants: dict, **options: int) -> dict:
    """Compile a Triton kernel for a GPU that is not here: registers, spilled bytes, shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = types | dict.fromkeys(constants, "constexpr")
    names, unknown = list(types), ("targets", "cap", "M", "T")
    aligned = [n for n in names if n not in unknown and not types[n].startswith("tensordesc")]
    source = ASTSource(
        kernel,
        types,
        {(names.index(n),): value for n, value in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned if n not in constants},
    )
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(built.asm["ptx"])
        file.flush()
        target = f"-arch=sm_{arch}{'a' * (arch == 90)}"
        command = [triton.knobs.nvidia.ptxas.path, "-v", target, file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True).stderr
    row = {"kernel": kernel.__name__, "arch": arch, **constants, **options, "shared": built.metadata.shared}
    for key, pattern in (("registers", r"Used (\d+)"), ("spilled", r"(\d+) bytes spill st")):
        row[key] = int(re.search(pattern, said)[1])
    return row | {"wgmma": "wgmma" in built.asm["ptx"]}


def compile_rowwise() -> list[dict]:
    """The kernels that work on rows, as they are launched at the record's sizes, both passes."""
    logits = {"z": "*bf16", "targets": "*i64", "losses": "*fp32", "cap": "fp32"}
    heads = dict.fromkeys(("x", "gain", "cos", "sin", "q", "k", "v", "dx"), "*bf16")
    heads |= {"dgain": "*fp32", "M": "i32", "T": "i32"}
    gated = dict.fromkeys(("y", "v", "gate", "dz", "out", "dv", "dgate"), "*bf16") | {"M": "i32"}
    turned = {"H": 8, "G": 4, "D": 64, "HALF": 8, "ROWS": 32, "WIDTH": 64}
    straight = {name: size for name, size in turned.items() if name != "HALF"}
    constants = {"V": 8192, "BLOCK": 4096}
    rows = [compile_one(kernels.cross_entropy_kernel(), 90, logits, constants, num_warps=8)]
    for back in (False, True):
        way = {"BACKWARD": back}
        rows.append(
            compile_one(attention_kernels.qkv_norm_rope_kernel(), 90, heads, turned | way, num_warps=4)
        )
        rows.append(compile_one(attention_kernels.xsa_gate_kernel(), 90, gated, straight | way, num_warps=4))
    return rows


def compile_only(every_tile: bool) -> list[dict]:
    """Compile the Triton kernels for GPUs that are not here: as they are launched, or with all tiles."""
    rows = compile_rowwise()
    for arch, described in ((90, True), (89, False), (80, False)):
        for bm, bn, bk, warps, stages in kernels.TILES[described][: None if every_tile else 1]:
            operands = {name: f"tensordesc<bf16[{size},{bk}]>" for name, size in (("a", bm), ("b", bn))}
            types = operands if described else dict.fromkeys("ab", "*bf16")
            types |= {"out": "*bf16", "hidden": "*bf16", "signs": "*i32", "M": "i32", "N": "i32"}
            for backward in (False, True):
                constants = {"K": 512, "BACKWARD": backward, "DESC": described}
                constants |= {"BM": bm, "BN": bn, "BK": bk}
                options = {"num_warps": warps, "num_stages": stages}
                kernel = kernels.matmul_kernel(described).fn  # what is timed
                rows.append(compile_one(kernel, arch, types, constants, **options))
    return rows


def main() -> None:
    """Measure and print."""
    options = parser(__doc__.split("\n")[0])
    options.add_argument("--only", default="", help="measure what has this in its name")
    options.add_argument(
        "--tokens", type=int, default=0, help="tokens of a micro-batch (default: the settings')"
    )
    options.add_argument(
        "--compile-only", action="store_true", help="compile for other GPUs, measure nothing"
    )
    options.add_argument(
        "--every-tile", action="store_true", help="with --compile-only: all tiles of the product"
    )
    args = options.parse_args()
    if args.compile_only:
        report({"benchmark": "kernels, compiled only"}, compile_only(args.every_tile), args.json)
        return
    torch.manual_seed(0)
    bench = Bench(args)
    parts = (bench.cross_entropy, bench.heads, bench.mlp, bench.tiles, bench.attention)
    for part in (*parts, bench.projections, bench.norms, bench.gates, bench.newton_schulz):
        part()
    result = {"benchmark": "kernels", **environment(bench.ranks), "tokens": bench.tokens}
    ceiling = {"peak_flops": bench.flop_rate, "bandwidth": bench.bandwidth}
    report(result | ({} if math.isnan(bench.bandwidth) else ceiling), bench.rows, args.json)


if __name__ == "__main__":
    sys.exit(main())
