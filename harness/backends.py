"""What the machine can do: attention backends, kernels and the compiler are tried, memory is fitted."""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Mapping

import torch
from torch import Tensor

from systems.compiled import one_line
from train_gpt import (
    GPT,
    Backends,
    Config,
    ConfigError,
    Ranks,
    Segments,
    attend,
    check_micro_batches,
    kernel_names,
    micro_batches,
    plain_backends,
    random_row,
)

ATTENTION = {  # backends, the best first, and what each needs
    "fa3": "FlashAttention 3 (build hopper/ of Dao-AILab/flash-attention) and a Hopper GPU",
    "fa4": "FlashAttention 4 (pip install --pre flash-attn-4) and a Hopper or Blackwell GPU",
    "torch_varlen": "torch 2.11 and a GPU of capability 8.0",
    "flex": "a GPU",
    "plain": "a device that computes",
}


def check_device(cfg: Config, environ: Mapping[str, str]) -> None:
    """Raise ConfigError where torchrun's LOCAL_RANK names a device that is not there."""
    if cfg.device == "cpu" or not torch.cuda.is_available():
        return
    local_rank, devices = int(environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_rank >= devices:
        raise ConfigError(f"LOCAL_RANK={local_rank}: this machine has {devices} CUDA devices")


def try_attention(backend: str, cfg: Config, ranks: Ranks, compiler: str = "") -> None:
    """Forward and backward of a short row of the model's heads beside `plain`. Raises whatever it meets."""
    dtype, run = torch.bfloat16 if ranks.on_gpu else torch.float32, attend
    if compiler:
        torch.compiler.reset()  # a limited number of forms is compiled for each function
        run = torch.compile(attend, backend="aot_eager", fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    heads = cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads
    qkv = [torch.randn(1, 32, n, cfg.head_dim, generator=generator).to(ranks.device, dtype) for n in heads]
    cu_seqlens = torch.tensor([0, 1, 20, 32, 32], dtype=torch.int32, device=ranks.device)
    for segments in (None, Segments(cu_seqlens, 32)):
        results = []
        for function, name in ((attend, "plain"), (run, backend)):
            inputs = [x.detach().requires_grad_() for x in qkv]
            y = function(*inputs, segments, Backends(name))
            parts = [y, *torch.autograd.grad(y.square().sum(), inputs)]
            results.append(torch.cat([part.flatten().float() for part in parts]))
        if not torch.dist(*results) < 0.03 * results[0].norm():
            raise RuntimeError("its results are wrong")


def choose_attention(cfg: Config, ranks: Ranks, compiler: str = "") -> str:
    """The backend asked for, or the first that works. Raises ConfigError where none does."""
    wanted = cfg.attention_backend
    if wanted == "auto" and not ranks.on_gpu:
        return "plain"
    for backend in ATTENTION if wanted == "auto" else [wanted]:
        try:
            try_attention(backend, cfg, ranks, compiler)
            return backend
        except Exception as error:  # foreign libraries raise anything
            if wanted != "auto" or backend == "plain":  # the last
                needs = f"it needs {ATTENTION[backend]}"
                raise ConfigError(f"ATTENTION_BACKEND={backend}: {needs} ({one_line(error)})") from None


def choose_backends(cfg: Config, ranks: Ranks) -> Backends:
    """What the settings ask for, with attention that has been tried."""
    backends = plain_backends(cfg, ranks)
    return dataclasses.replace(backends, attention=choose_attention(cfg, ranks, backends.compiler))


def unused_attention(cfg: Config, backends: Backends, ranks: Ranks) -> list[str]:
    """What is wrong with attention backends that are installed and better than the one that was chosen."""
    texts = []
    for name, module in (("fa3", "flash_attn_interface"), ("fa4", "flash_attn.cute")):
        if name == backends.attention:
            break
        with contextlib.suppress(ImportError):
            if importlib.util.find_spec(module):
                try:
                    try_attention(name, cfg, ranks, backends.compiler)
                except Exception as error:  # foreign libraries raise anything
                    texts.append(f"attention {name} is installed and not used: {one_line(error)}")
    return texts


def try_compiler(compiler: str, ranks: Ranks) -> str:
    """What is wrong with the compiler (no C compiler, say); empty: nothing. One small graph, both passes."""
    x = torch.linspace(-1, 1, 100, device=ranks.device).requires_grad_()
    try:
        Backends(compiler=compiler).compile(lambda x: x.sin().square().sum())(x).backward()
    except Exception as error:  # compilers raise anything
        return one_line(error)
    right = torch.allclose(x.grad, (2 * x).sin(), atol=1e-4)
    return "" if right else "its results are wrong"


def try_kernels(cfg: Config, ranks: Ranks) -> dict[str, str]:
    """What is wrong with the fused kernels asked for, by name; those that work are not in it.

    Losses and gradients of one layer of the model's widths on 200 random tokens must be hardly further from
    float32's than those of the eager forms in the run's precision.
    """
    sizes = {"num_layers": 1, "num_loops": 0, "parallel_start_layer": 0, "xsa_last_n": 1}
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(cfg.seed)  # the same verdict at every start
    model = GPT(dataclasses.replace(cfg, **sizes)).to(ranks.device)
    batch = ranks.send(*random_row(cfg, 200, 50, generator))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(ranks.device))

    def results(kernels: str) -> list[Tensor]:
        for part in (model, model.blocks[0], model.blocks[0].attn):
            part.backends = Backends(kernels=kernels)
        model.zero_grad()
        losses = model.losses(*batch, looping=False)
        losses.mean().backward()
        gradients = [p.grad.float() for p in model.parameters() if p.grad is not None]
        return [losses.detach(), *(gradient for gradient in gradients if gradient.numel() > 1)]

    exact, wrong = results(""), {}
    Backends().move_and_compile(model, ranks.device)
    with ranks.autocast():
        eager, theirs = _pooled(results(""), exact), _pooled(exact, exact)
        limits = [0.02 * x.norm() + 3 * torch.dist(x, y) for x, y in zip(theirs, eager, strict=True)]
        for kernel in kernel_names(cfg.triton_kernels):
            try:
                ours = _pooled(results(kernel), exact)
                if not all(torch.dist(x, y) <= most for x, y, most in zip(theirs, ours, limits, strict=True)):
                    wrong[kernel] = "its results are wrong"
            except Exception as error:  # neither Triton nor its compilers say what they may raise
                wrong[kernel] = one_line(error)
    from systems.kernels import matmul_kernel

    matmul_kernel.cache_clear()  # tiles that were timed with 200 rows are not the run's
    return wrong


def _pooled(parts: list[Tensor], exact: list[Tensor]) -> list[Tensor]:
    """Tensors of few numbers as one, each by the scale of the exact one: by chance some alone is far off."""
    pairs = list(zip(parts, exact, strict=True))
    short = [(x / y.norm()).nan_to_num(0, 0, 0).flatten() for x, y in pairs if y.numel() < 64]
    return [x for x, y in pairs if y.numel() >= 64] + ([torch.cat(short)] if short else [])


def fit_memory(cfg: Config, model: GPT, ranks: Ranks) -> Backends:
    """The model's backends with micro-batches doubled until one fits into the device's memory.

    Tries forward and backward of both layer orders on random tokens, while as much is set aside as gradients,
    optimisers and average will take. What is compiled here is compiled before any rank waits for another.
    Raises ConfigError when the step cannot be divided any further.
    """
    generator, backends = torch.Generator().manual_seed(0), model.backends
    state = 40 * sum(parameter.numel() for parameter in model.parameters())
    aside = []
    while True:
        _, tokens = micro_batches(cfg, backends, ranks.world_size)
        try:
            aside.append(torch.empty(state, dtype=torch.uint8, device=ranks.device))
            for looping in (True, False)[not cfg.num_loops :]:
                row = random_row(cfg, tokens, cfg.train_seq_len, generator)
                batch = ranks.send(*row, backends.compiler)
                with ranks.autocast():
                    model(*batch, looping=looping).mean().backward()
            fits = True
        except torch.OutOfMemoryError:
            fits = False
        aside.clear()
        model.zero_grad(set_to_none=True)
        ranks.wait_for_all("compile")
        if all(ranks.gather(fits)):
            return backends
        torch.compiler.reset()
        torch.cuda.empty_cache()
        backends = dataclasses.replace(backends, micro_batches=2 * backends.micro_batches)
        check_micro_batches(cfg, backends.micro_batches)  # as if that many ranks had one each
