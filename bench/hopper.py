"""What the compiler makes of a training step for a Hopper GPU, where there is none: kernels, bytes, FLOPs.

    python bench/hopper.py [--json] [--kernels] [--tokens N | --chunk LENGTH] [--bandwidth B] [--rate R]

Settings come from the environment, as for train_gpt.py; ATTENTION_BACKEND is torch_varlen unless named. The
model is built of fake tensors (shapes without data) on a pretended H100 (pretended_gpu.py) and goes through
`Backends.move_and_compile` and TorchInductor as in a run; what inductor would launch is counted instead of
launched. It needs g++ and Triton, but no GPU, no CUDA and no CUDA build of torch.

Bytes: what a kernel must move if it reads nothing twice and finds nothing in a cache. A slice counts as large
as it is, a value that stays inside a kernel not at all. Of an operator (a library's or ours) arguments and
results are counted, and what one of ours moves inside; it is one launch, whatever it launches inside.
Attention that is no operator (flex, plain) counts as the kernels it is compiled to.
Floor: of each kernel the larger of bytes / bandwidth and FLOPs / rate. The default rates are measured ones
(3.0 TB/s, 650 TFLOP/s in matrix products, FIELD C2). It is for scale, and shows what is worth fusing; it is
no prediction of a step's time. Not seen here: matrices that inductor pads after timing both on the device.
`--chunk` counts a chunk of test-time training instead: TTT_BATCH_SIZE windows scored and trained on.
"""

import argparse
import dataclasses
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple
from unittest import mock

import pretended_gpu

if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_MIX_ORDER_REDUCTION", "0")  # as `Ranks.from_env` does on a GPU
    try:
        pretended_gpu.load()
    except pretended_gpu.Unavailable as error:
        print(f"bench/hopper.py: {error}", file=sys.stderr)
        sys.exit(2)

import torch  # noqa: E402
from common import environment, mean_context, report, text_row, tg  # noqa: E402
from torch._functorch import config as autograd_config  # noqa: E402
from torch._inductor import config as inductor_config  # noqa: E402
from torch._inductor import ir, scheduler  # noqa: E402
from torch._inductor.compile_fx import compile_fx, compile_fx_inner  # noqa: E402
from torch._inductor.dependencies import MemoryDep, StarDep  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._inductor.virtualized import V  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from train_step import micro_batch  # noqa: E402

from systems.compiled import compiled_losses  # noqa: E402

PRODUCTS, ATTENTION, OURS, OTHER = "matrix products", "attention", "operators of ours", "other operators"
REDUCTIONS, ELEMENTWISE, COPIES = "reductions", "elementwise", "copies and casts"
GROUPS = (PRODUCTS, ATTENTION, OURS, OTHER, REDUCTIONS, ELEMENTWISE, COPIES)
MOVES = r"alias|cat|clone|_to_copy|convert_element_type|copy_?|expand|full|permute|select|slice|split|squeeze"
MOVES += (
    r"|stack|t|transpose|unbind|unsqueeze|_unsafe_view|view|reshape|getitem|constant_pad_nd|as_strided|empty"
)
DECORATION = r"^(aten|prims)\.|\.(default|Tensor|int|Scalar\w*)$"  # of operators' names
FLOPS: dict[str, Callable] = {  # of our operators, from the sizes of their arguments
    "mlp": lambda x, up, down: 4 * math.prod(x) * up[0],
    "mlp_grad": lambda dy, down, *_: 2 * math.prod(dy) * down[1],
    "head_loss": lambda h, weight, targets: 2 * math.prod(h) * weight[0],
    "qkv_norm_rope": lambda *_: 0,
    "qkv_norm_rope_grad": lambda *_: 0,
    "xsa_gate": lambda *_: 0,
    "xsa_gate_grad": lambda *_: 0,
}
INSIDE: dict[str, Callable] = {  # numbers that our operators move besides arguments and results
    "mlp": lambda x, up, down: x[0] * up[0],  # the activations, which the second product reads
    "mlp_grad": lambda dy, down, *_: 2 * math.prod(down),  # a transposed copy, written and read
    "head_loss": lambda h, weight, targets: 2 * h[0] * weight[0],  # the logits, read and overwritten
}


class Kernel(NamedTuple):
    """What is launched at once, or called as an operator."""

    name: str
    group: str
    launches: int
    bytes: int
    flops: float
    what: str  # operator and sizes of its arguments, or the operations fused

    def seconds(self, bandwidth: float, rate: float) -> float:
        """The floor, with bytes/s and FLOP/s."""
        return max(self.bytes / bandwidth, self.flops / rate)


class Graph(NamedTuple):
    """One pass as compiled."""

    backward: bool
    kernels: list[Kernel]
    saved: int  # bytes of the buffers that it makes and hands out: of a forward pass the activations kept
    unknown: set[str]  # operators of ours without a formula in FLOPS


class Stopped(BaseException):
    """Raised instead of what would need the device."""


class Counter:
    """A backend for torch.compile: inductor up to its code, then counting. What it returns raises Stopped."""

    def __init__(self, context: float = 0.0):
        self.context, self.graphs = context, []  # mean number of tokens that a token attends to

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence) -> Callable:
        return compile_fx(graph, inputs, inner_compile=self._count)

    def _count(self, graph: torch.fx.GraphModule, inputs: Sequence, **options: object) -> Callable:
        def stop(lowered: GraphLowering) -> None:
            lowered.codegen()
            self.graphs.append(count(lowered, bool(options.get("is_backward")), self.context))
            raise Stopped

        def run(*_: object) -> None:
            raise Stopped

        run._boxed_call = True
        with mock.patch.object(GraphLowering, "compile_to_module", stop):
            try:
                compile_fx_inner(graph, inputs, **options)
            except Stopped:
                return run

    def run(self, call: Callable[[], object]) -> list[Graph]:
        """The graphs that a call compiles, forward and backward."""
        self.graphs = []
        plain = {"fx_graph_cache": False, "compile_threads": 1, "shape_padding": False}
        with (
            inductor_config.patch(plain),
            autograd_config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False),
        ):
            try:
                call()
            except Stopped:
                return self.graphs
        raise RuntimeError("nothing was compiled")


def count(lowered: GraphLowering, backward: bool, context: float) -> Graph:
    """Every kernel of a lowered graph, and the bytes that it hands out."""
    kernels, unknown = [], set()
    for node in lowered.scheduler.nodes:
        inner = node.node
        if isinstance(node, scheduler.NopKernelSchedulerNode) or isinstance(inner, ir.MultiOutput):
            continue  # launches nothing; results of operators are counted with these
        if node.get_operation_names() <= lowered.scheduler.removed_ops:
            continue  # the end of a sum over columns, which comes with a kernel of mixed order
        if isinstance(node, scheduler.ExternKernelSchedulerNode):
            kernel = count_operator(inner, context, unknown)
        else:
            kernel = count_fused(node)
        kernels.append(kernel)
    made = {name for name in lowered.get_output_names() if name in lowered.name_to_buffer}
    return Graph(backward, kernels, sum(storage(name) for name in made), unknown)


def hint(size: object) -> int:
    """A size as a number."""
    return int(V.graph.sizevars.optimization_hint(size))


def sizes_of(node: ir.IRNode) -> list[int]:
    """The sizes of a tensor."""
    return [hint(size) for size in node.get_size()]


def storage(name: str) -> int:
    """Bytes of a buffer."""
    return hint(V.graph.get_numel(name)) * V.graph.get_dtype(name).itemsize


def view_bytes(node: ir.IRNode) -> int:
    """Bytes of a tensor that an operator takes or gives: of a view what it shows, repetitions once."""
    strides = node.maybe_get_stride() or [1] * len(node.get_size())
    sizes = [n for n, stride in zip(sizes_of(node), strides, strict=True) if stride != 0]
    return math.prod(sizes) * node.get_dtype().itemsize


def count_operator(node: ir.ExternKernel, context: float, unknown: set[str]) -> Kernel:
    """A library's kernel or an operator of ours: bytes of arguments and results."""
    operator = getattr(node, "op_overload", None)
    name = str(operator or node.python_kernel_name).removesuffix(".default")
    tensors = [part for part in flat(node.inputs) if tensor(part)]
    shapes = [sizes_of(part) for part in tensors]
    results = [part for part in flat(getattr(node, "outputs", None) or [node]) if tensor(part)]
    moved = sum(view_bytes(part) for part in tensors + results)
    moved += sum(storage(changed) for changed in node.get_mutation_names())
    group, flops = OTHER, 0.0
    if re.search(r"attn|attention", name):
        products = 5 if "backward" in name else 2  # backward computes the scores once more
        group, flops = ATTENTION, 2.0 * products * math.prod(shapes[0]) * context
    elif re.match(r"pg\d+\.", name):
        group, short = OURS, name.split(".")[1]
        if short in FLOPS:
            flops = float(FLOPS[short](*shapes))
        else:
            unknown.add(short)
        if short in INSIDE:
            moved += INSIDE[short](*shapes) * tensors[0].get_dtype().itemsize
    elif re.search(r"\b(add|b|badd)?mm(\.out)?$", name):
        group, flops = PRODUCTS, 2.0 * math.prod(sizes_of(node)) * shapes[-1][-2]
    return Kernel(node.get_name(), group, 1, moved, flops, f"{name} {' '.join(map(str, shapes))}")


def flat(inputs: Iterable) -> Iterable:
    """Arguments of an operator, lists of tensors taken apart."""
    for part in inputs:
        yield from flat(part) if isinstance(part, (list, tuple)) else [part]


def tensor(node: object) -> bool:
    """Whether it has sizes: not a scalar, no bundle of several results."""
    layout = node.maybe_get_layout() if isinstance(node, ir.IRNode) else None
    return layout is not None and not isinstance(layout, (ir.MultiOutputLayout, ir.NoneLayout))


def count_fused(node: scheduler.BaseSchedulerNode) -> Kernel:
    """A generated kernel: what it reads from and leaves in memory."""
    parts = list(node.get_nodes())
    made = {buffer.get_name() for part in parts for buffer in part.get_outputs()}
    reads = [d for part in parts for d in part.read_writes.reads if d.name not in made]
    gone = V.graph.removed_buffers | V.graph.inplaced_to_remove
    writes = [d for part in parts for d in part.read_writes.writes if d.name not in gone]
    moved = touched(reads) + touched(writes)
    origins = {origin.target for part in parts if part.node for origin in part.node.get_origins()}
    names = sorted({re.sub(DECORATION, "", str(origin)) for origin in origins})
    group = REDUCTIONS if node.is_reduction() else ELEMENTWISE
    if group == ELEMENTWISE and all(re.fullmatch(MOVES, name.split(".")[0]) for name in names):
        group = COPIES
    launches = 1
    if isinstance(node, scheduler.FusedMixOrderReductions):  # partial sums over columns are added up outside
        launches += len(node.node2.get_nodes())
    what = f"{len(parts)}: {', '.join(names)}"
    return Kernel(node.get_name().split("_")[0], group, launches, moved, 0.0, what)


def touched(deps: Iterable) -> int:
    """Bytes of what is accessed: each slice of a buffer once, together at most the buffer."""
    slices: dict[str, dict[object, int]] = {}
    for dep in deps:
        if isinstance(dep, MemoryDep):
            regular = dep.normalize_with_stride_order()
            slices.setdefault(dep.name, {})[regular.index, regular.size] = dep.numbytes_hint()
        elif isinstance(dep, StarDep):
            slices.setdefault(dep.name, {})["all of it"] = dep.numbytes_hint()
    return sum(min(sum(parts.values()), storage(name)) for name, parts in slices.items())


BEFORE, AFTER = "before looping", "after looping"


def compiled_model(cfg: tg.Config, ranks: tg.Ranks, counter: Counter) -> tg.GPT:
    """A model as in a run, whose compiler counts."""
    backends = dataclasses.replace(tg.plain_backends(cfg, ranks), compiler=counter)
    return backends.move_and_compile(tg.GPT(cfg, backends), ranks.device)


def compile_step(cfg: tg.Config, tokens: int) -> tuple[dict[str, list[Graph]], float]:
    """Forward and backward graph of a micro-batch before and after looping, and the mean context."""
    row = text_row(cfg, tokens)
    counter, compiled = Counter(mean_context(row[2])), {}
    ranks = tg.Ranks(torch.device("cuda", 0))
    with pretended_gpu.pretended(), FakeTensorMode(allow_non_fake_inputs=True):
        model = compiled_model(cfg, ranks, counter)
        for looping in (False, True)[: 1 + bool(cfg.num_loops)]:
            batch = ranks.send(*row, counter)
            graphs = counter.run(partial(micro_batch, model, ranks, batch, looping))
            if [graph.backward for graph in graphs] != [False, True]:
                raise RuntimeError(f"{len(graphs)} graphs instead of a forward and a backward one")
            compiled[AFTER if looping else BEFORE] = graphs
    return compiled, counter.context


def compile_chunk(cfg: tg.Config, length: int) -> tuple[dict[str, list[Graph]], float]:
    """The same of a chunk of test-time training: a whole batch of windows of one length."""
    counter, ranks = Counter((length + 1) / 2), tg.Ranks(torch.device("cuda", 0))
    with pretended_gpu.pretended(), FakeTensorMode(allow_non_fake_inputs=True):
        model, rows = compiled_model(cfg, ranks, counter).requires_grad_(False), cfg.ttt_batch_size
        lora = tg.BatchedLoRA(cfg, rows, tg.lora_slots(cfg, bool(cfg.num_loops))).to(ranks.device)
        lora.use_last(rows)  # as LoRAOptimizer does
        lora.active = torch.ones(rows, dtype=torch.bool, device=ranks.device)
        sizes = (rows, length), (rows, length), (rows, cfg.ttt_chunk_size)
        parts = [torch.zeros(size, dtype=torch.long, device=ranks.device) for size in sizes]

        def chunk() -> None:
            with ranks.autocast():
                losses = compiled_losses(model, *parts, lora, bool(cfg.num_loops))
            losses.sum().backward()

        return {"adapting": counter.run(chunk)}, counter.context


def table(part: str, kernels: Sequence[Kernel], bandwidth: float, rate: float) -> list[dict]:
    """Rows of a pass: a group each, and their sum."""
    rows = []
    for group in (*GROUPS, "sum"):
        chosen = [kernel for kernel in kernels if group in ("sum", kernel.group)]
        if chosen:
            row = {"pass": part, "group": group, "launches": sum(kernel.launches for kernel in chosen)}
            row["gb"] = sum(kernel.bytes for kernel in chosen) / 1e9
            row["gflop"] = sum(kernel.flops for kernel in chosen) / 1e9
            row["floor_ms"] = 1e3 * sum(kernel.seconds(bandwidth, rate) for kernel in chosen)
            rows.append(row)
    return rows


def settings(environ: dict[str, str]) -> tg.Config:
    """Settings from the environment, for a GPU."""
    named = {"ATTENTION_BACKEND": "torch_varlen"} | {k: v for k, v in environ.items() if v != "auto"}
    return tg.Config.from_env(named | {"DEVICE": "cuda"})


def options() -> argparse.Namespace:
    """The command line."""
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args.add_argument("--tokens", type=int, default=98304, help="tokens of a micro-batch (default 98304)")
    args.add_argument("--chunk", type=int, default=0, help="adapt windows of this length instead of training")
    args.add_argument("--kernels", action="store_true", help="list every kernel and what is fused in it")
    args.add_argument("--bandwidth", type=float, default=3.0, help="TB/s of memory (default 3.0)")
    args.add_argument("--rate", type=float, default=650.0, help="TFLOP/s of products (default 650)")
    chosen = args.parse_args()
    if min(chosen.tokens, chosen.bandwidth, chosen.rate) <= 0:
        args.error("--tokens, --bandwidth and --rate must be positive")
    return chosen


def main() -> int:
    """Compile, count, print."""
    args = options()
    cfg = settings(dict(os.environ))
    size = {"windows": f"{cfg.ttt_batch_size} x {args.chunk}"} if args.chunk else {"tokens": args.tokens}
    compiled, context = compile_chunk(cfg, args.chunk) if args.chunk else compile_step(cfg, args.tokens)
    rates = (1e12 * args.bandwidth, 1e12 * args.rate)
    rows, kernels, totals = [], {}, {}
    result: dict[str, object] = {"pretended": pretended_gpu.H100.name} | size
    result["mean_context"] = context
    result |= {"attention": cfg.attention_backend, "triton_kernels": cfg.triton_kernels}
    result |= {"tb_per_second": args.bandwidth, "tflop_per_second": args.rate}
    for when, graphs in compiled.items():
        for graph in graphs:
            part = f"{'backward' if graph.backward else 'forward'} {when}"
            kernels[part] = graph.kernels
            rows += table(part, graph.kernels, *rates)
        whole = table(f"both {when}", [kernel for graph in graphs for kernel in graph.kernels], *rates)
        rows += whole
        totals[when] = whole[-1] | {"saved_gb": graphs[0].saved / 1e9}
        result[f"saved_gb {when}"] = totals[when]["saved_gb"]
    if AFTER in totals:
        layers = tg.lora_slots(cfg, True) - tg.lora_slots(cfg, False)
        for key in ("launches", "gb", "gflop", "floor_ms", "saved_gb"):
            result[f"{key} per virtual layer"] = (totals[AFTER][key] - totals[BEFORE][key]) / layers
    unknown = sorted(set().union(*(graph.unknown for graphs in compiled.values() for graph in graphs)))
    if unknown:
        result["FLOPs unknown, counted as none"] = ", ".join(unknown)
    if args.kernels and args.json:
        result["kernels"] = {part: [kernel._asdict() for kernel in found] for part, found in kernels.items()}
    report({"benchmark": "hopper", **environment(tg.CPU), **result}, rows, args.json)
    for part, found in kernels.items() if args.kernels and not args.json else ():
        print(f"\n{part}")
        for kernel in found:
            print(f"{kernel.bytes / 1e6:9.1f} MB  {kernel.name:8} {kernel.group:18} {kernel.what}")
    return 0


def guarded() -> int:
    """`main`; what the user can mend is one line and exit code 2."""
    try:
        return main()
    except (tg.UserError, torch._dynamo.exc.TorchDynamoException, ImportError, RuntimeError) as error:
        text = " ".join(str(error).split())[:300] or type(error).__name__
        print(f"bench/hopper.py: {text}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(guarded())
