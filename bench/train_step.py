"""Speed of a training step: before and after looping, MFU, memory, and where the time goes.

    python bench/train_step.py [--device cpu] [--json] [--tokens N] [--profile] [--kernels N]

Settings come from the environment, as for train_gpt.py: ATTENTION_BACKEND, TRITON_KERNELS, COMPILE_BACKEND.
On a CPU a small model is measured. MFU: 6 FLOPs a weight and token, 12 D a token and attended token, over the
data sheet's peak.
"""

import re
import sys
import time
from collections import defaultdict

import torch
from common import (
    environment,
    mean_context,
    measure,
    parser,
    peaks,
    report,
    setup,
    text_row,
    tg,
)

from harness.preflight import flops_per_token

GROUPS = {  # kernel names -> what they do; the first that fits counts
    "elementwise, norms and their sums": r"^triton_",  # the compiler's own; names tell what is fused in them
    "attention": r"flash|fmha|attention|cudnn.*sdpa|flex",
    "fused MLP": r"^matmul$|pg0::mlp",
    "heads and gate": r"^(qkv_norm_rope|xsa_gate)$|pg0::(qkv_norm_rope|xsa_gate)",
    "cross entropy": r"^cross_entropy$|pg0::head_loss|log_softmax|nll_loss",
    "matrix products": r"gemm|cutlass|cublas|xmma|nvjet|aten::(mm|bmm|addmm)|splitK|wgmma",
    "communication": r"nccl",
    "optimiser": r"multi_tensor|adam|foreach|lerp",
    "copies": r"memcpy|memset|copy_|aten::(cat|fill_|zero_)",
}


def micro_batch(model: tg.GPT, ranks: tg.Ranks, batch: tg.Batch, looping: bool) -> None:
    """Forward and backward of one micro-batch."""
    with ranks.autocast():
        loss = model(*batch, looping=looping).mean()
    loss.backward()
    model.zero_grad(set_to_none=True)


def shares(step: object, ranks: tg.Ranks, longest: int = 0) -> tuple[dict[str, float], list[list]]:
    """Share of the device's time in each group of kernels; the longest kernels: ms, launches, name."""
    cuda = ranks.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        step()
        ranks.synchronize()
    times, kernels = defaultdict(float), []
    for event in profile.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        group = next((g for g, pattern in GROUPS.items() if re.search(pattern, event.key)), "rest")
        times[group] += spent
        kernels.append([spent / 1e3, event.count, event.key[:100]])
    total = sum(times.values()) or 1.0
    kernels.sort(reverse=True)
    groups = {group: spent / total for group, spent in sorted(times.items(), key=lambda item: -item[1])}
    return groups, kernels[:longest]


class NoLoader:
    """Stands in for the loader where batches are given."""

    def state(self) -> None:
        """No position."""

    def load_state(self, state: None) -> None:
        """Nowhere to go back to."""


def main() -> None:
    """Measure and print."""
    options = parser(__doc__.split("\n")[0])
    options.add_argument(
        "--tokens", type=int, default=0, help="tokens of a micro-batch (default: the settings')"
    )
    options.add_argument(
        "--profile", action="store_true", help="share of time per kernel group (always on CUDA)"
    )
    options.add_argument(
        "--kernels", type=int, default=0, metavar="N", help="the N longest kernels: ms, launches, name"
    )
    args = options.parse_args()
    cfg, ranks, backends = setup(args.device)
    torch.manual_seed(cfg.seed)
    model = backends.move_and_compile(tg.GPT(cfg, backends), ranks.device)
    cuda = ranks.device.type == "cuda"
    tokens = args.tokens or cfg.train_batch_tokens // cfg.grad_accum_steps
    row = text_row(cfg, tokens)
    context, (peak, _) = mean_context(row[2]), peaks(ranks)
    batch, rows = ranks.send(*row, backends.compiler), []
    for looping in (False, True)[: 1 + bool(cfg.num_loops)]:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        micro_batch(model, ranks, batch, looping)
        ranks.synchronize()
        first = time.perf_counter() - start
        timed = measure(
            lambda looping=looping: micro_batch(model, ranks, batch, looping), ranks, args.repeats
        )
        rate = tokens / timed["ms"] * 1e3
        flops = flops_per_token(cfg, looping, context)
        entry = {"part": "after looping" if looping else "before looping", **timed, "tokens_per_second": rate}
        entry |= {
            "tflop_per_second": flops * rate / 1e12,
            "mfu": flops * rate / peak,
            "first_call_seconds": first,
        }
        entry["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9 if cuda else float("nan")
        if cuda or args.profile or args.kernels:
            step = lambda looping=looping: micro_batch(model, ranks, batch, looping)  # noqa: E731
            entry["shares"], longest = shares(step, ranks, args.kernels)
            entry |= {"kernels": longest} if longest else {}
        rows.append(entry)
    trainer = tg.Trainer(cfg, model, NoLoader(), ranks)
    row = [text_row(cfg, tokens, seed) for seed in range(trainer.micro_batches)]
    whole = measure(lambda: trainer.step(0, 0.0, row), ranks, min(args.repeats or 3, 3), 1)
    rest = whole["ms"] - trainer.micro_batches * rows[0]["ms"]
    rows.append({"part": f"whole step of {trainer.micro_batches} micro-batches, before looping", **whole})
    rows.append({"part": "of it clipping, optimisers, average", "ms": rest})
    settings = {
        "tokens": tokens,
        "segments": int((row[0][2].cu_seqlens.diff() > 0).sum()),
        "mean_context": context,
    }
    settings |= {"attention": backends.attention, "triton_kernels": backends.kernels}
    settings["compiler"] = backends.compiler or "off"
    report({"benchmark": "train_step", **environment(ranks), **settings}, rows, args.json)


if __name__ == "__main__":
    sys.exit(main())
