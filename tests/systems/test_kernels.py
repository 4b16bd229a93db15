"""Triton kernels against float64: compiled on CUDA, in the interpreter (bench/interpreter.py) on a CPU."""

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = {"rtol": 2e-5, "atol": 2e-5}

ROOT = Path(__file__).resolve().parents[2]


def logits(rows: int, vocabulary: int, scale: float, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + vocabulary)
    return (torch.randn(rows, vocabulary, generator=generator) * scale).to(DEVICE, dtype)


def exact_cross_entropy(z: torch.Tensor, targets: torch.Tensor, cap: float) -> torch.Tensor:
    """Losses in float64, by formulas that share nothing with the kernel's."""
    capped = cap * torch.tanh(z.double() / cap)
    return capped.logsumexp(-1) - capped.gather(-1, targets[..., None])[..., 0]


def both(tg, z, targets, cap):
    """Losses and gradients of the kernel and of float64."""
    exact = z.detach().double().requires_grad_()
    expected = exact_cross_entropy(exact, targets, cap)
    expected.sum().backward()
    given, losses = z.clone(), torch.full(z.shape[:1], torch.nan, device=DEVICE)
    tg.launch_cross_entropy(given, targets, losses, cap)
    return (losses.double(), given.double()), (expected.detach(), exact.grad)


@pytest.mark.parametrize("vocabulary", [1, 2, 17, 64, 1000, 4096, 5003, 9001])
@pytest.mark.parametrize("scale", [1.0, 60.0, 1e4])
def test_cross_entropy_equals_float64(tg, vocabulary, scale):
    z = logits(3, vocabulary, scale)
    targets = torch.tensor([0, vocabulary - 1, vocabulary // 2], device=DEVICE)
    (losses, grads), (exact, exact_grads) = both(tg, z, targets, 30.0)
    torch.testing.assert_close(losses, exact, **CLOSE)
    torch.testing.assert_close(grads, exact_grads, **CLOSE)


@pytest.mark.parametrize("cap", [0.5, 30.0, 1000.0])
def test_cross_entropy_at_the_saturated_ends(tg, cap):
    """The gradient's factor 1 - tanh^2 keeps its relative accuracy where tanh itself rounds to 1."""
    z = torch.tensor([[3.0, -3.0, 8.0, -8.0, 12.0, -12.0, 0.0, 1e-3]], device=DEVICE) * cap
    targets = torch.tensor([2], device=DEVICE)
    (losses, grads), _ = both(tg, z, targets, cap)
    u = z.double() / cap
    factor = 1 / torch.cosh(u) ** 2
    wrong = (cap * torch.tanh(u)).softmax(-1)
    wrong[0, 2] -= 1
    torch.testing.assert_close(grads, wrong * factor, rtol=1e-4, atol=1e-30)
    assert losses.isfinite().all()


@pytest.mark.parametrize(
    ("value", "cap"), [(1e4, 30.0), (-1e4, 30.0), (3e38, 30.0), (-3e38, 30.0), (-1e6, 1000.0), (3e38, 1000.0)]
)
def test_cross_entropy_of_huge_logits_does_not_overflow(tg, value, cap):
    z = torch.full((2, 33), value, device=DEVICE)
    z[1, :5] *= -1
    targets = torch.tensor([4, 7], device=DEVICE)
    (losses, grads), (exact, _) = both(tg, z, targets, cap)
    torch.testing.assert_close(losses, exact, **CLOSE)
    assert (grads == 0).all()


@pytest.mark.parametrize("shape", [(0,), (1,), (1, 1), (2, 0), (2, 3)])
def test_head_and_cross_entropy_equal_the_eager_twin(tg, shape):
    """Losses, and gradients of hidden states and weights, each target with a weight of its own."""
    generator = torch.Generator().manual_seed(0)
    h = (torch.randn(*shape, 12, generator=generator) * 4).to(DEVICE)
    weight = (torch.randn(130, 12, generator=generator) * 4).to(DEVICE)
    targets = torch.randint(130, shape, generator=generator).to(DEVICE)
    factors = torch.randn(shape, generator=generator).to(DEVICE)
    twin = lambda h, weight, *rest: tg.softcapped_cross_entropy(h @ weight.T, *rest)  # noqa: E731
    results = []
    for function in (tg.fused_cross_entropy, twin):
        leaves = [x.clone().requires_grad_() for x in (h, weight)]
        losses = function(*leaves, targets, 30.0)
        (losses * factors).sum().backward()
        results.append([losses.detach(), *(leaf.grad for leaf in leaves)])
        with torch.no_grad():
            torch.testing.assert_close(function(*leaves, targets, 30.0), results[-1][0])
    close = {"rtol": 2e-2, "atol": 2e-2} if DEVICE == "cuda" else CLOSE
    for fused, eager in zip(*results, strict=True):
        assert fused.shape == eager.shape
        torch.testing.assert_close(fused, eager, **close)


def test_cross_entropy_in_bfloat16(tg):
    """Logits of a training step: bfloat16 in and out, the arithmetic in float32."""
    z = logits(5, 777, 10.0, torch.bfloat16)
    targets = torch.arange(5, device=DEVICE) * 99
    (losses, grads), (exact, exact_grads) = both(tg, z, targets, 30.0)
    torch.testing.assert_close(losses, exact, **CLOSE)
    torch.testing.assert_close(grads, exact_grads, rtol=2**-7, atol=1e-9)


def heads_of(rows, heads, groups, size, half, dtype=torch.float32):
    """Products of a row, gains and rotary tables."""
    generator = torch.Generator().manual_seed(rows + size)
    x = torch.randn(2, rows, (heads + 2 * groups) * size, generator=generator) * 3
    angles = torch.rand(rows, 1, half, generator=generator) * 6
    gain = torch.randn(heads, generator=generator)
    return x.to(DEVICE, dtype), gain.to(DEVICE), angles.cos().to(DEVICE), angles.sin().to(DEVICE)


def eager_heads(tg, x, gain, rope, groups, size):
    widths = [len(gain) * size, groups * size, groups * size]
    q, k, v = (part.unflatten(-1, (-1, size)) for part in x.split(widths, -1))
    q = tg.apply_rope(tg.rms_norm(q), rope) * gain.to(x.dtype)[:, None]
    return q, tg.apply_rope(tg.rms_norm(k), rope), v


def gradients(function, inputs, dtype=None):
    """Results and gradients of a function with several results."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(DEVICE) for y in results]
    sum((y.double() * w).sum() for y, w in zip(results, weights, strict=True)).backward()
    return [part.detach().double() for part in (*results, *(leaf.grad for leaf in leaves))]


def assert_near(ours, theirs, tolerance=2e-5):
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            our, their, rtol=tolerance, atol=tolerance * max(1.0, float(their.abs().max()))
        )


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 2, 1), (5, 2, 1, 8, 4), (33, 4, 2, 16, 4), (40, 3, 3, 12, 2), (3, 8, 4, 64, 8)]
)
def test_heads_equal_float64(tg, sizes):
    """Norm, rotation and gain of queries and keys, heads whose size is no power of two among them."""
    rows, heads, groups, size, half = sizes
    x, gain, *rope = heads_of(*sizes)
    ours = gradients(lambda x, gain: tg.fused_qkv_norm_rope(x, gain, rope, groups), (x, gain))
    exact = [table.double() for table in rope]
    run = lambda x, gain: eager_heads(tg, x, gain, exact, groups, size)  # noqa: E731
    epsilon = torch.finfo(torch.float32).eps
    plain, tg.rms_norm = tg.rms_norm, lambda x: torch.nn.functional.rms_norm(x, (x.size(-1),), eps=epsilon)
    try:
        assert_near(ours, gradients(run, (x, gain), torch.float64))
    finally:
        tg.rms_norm = plain
    assert_near(ours, gradients(lambda x, gain: eager_heads(tg, x, gain, rope, groups, size), (x, gain)))


def test_heads_of_zeros_and_of_nothing(tg):
    """A head of zeros stays zero, with a finite gradient."""
    x, gain, *rope = heads_of(4, 2, 1, 8, 2)
    x[:, 1] = 0
    results = gradients(lambda x, gain: tg.fused_qkv_norm_rope(x, gain, rope, 1), (x, gain))
    assert all(part.isfinite().all() for part in results)
    assert not any(part[:, 1].any() for part in results[:3])
    empty = tg.fused_qkv_norm_rope(x[:0].requires_grad_(), gain, rope, 1)
    assert [part.shape for part in empty] == [(0, 4, 2, 8), (0, 4, 1, 8), (0, 4, 1, 8)]
    sum(part.sum() for part in empty).backward()


def exclude_inputs(rows, heads, groups, size):
    generator = torch.Generator().manual_seed(rows + size)
    shapes = (1, rows, heads, size), (1, rows, groups, size), (1, rows, heads)
    return [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]


def eager_exclude(tg, y, v, gate):
    return tg.exclude_self(y, v) * gate[..., None]


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (5, 2, 1, 8), (33, 4, 2, 16), (40, 3, 3, 12), (3, 8, 4, 64)])
def test_exclusion_and_gate_equal_float64(tg, sizes):
    inputs = exclude_inputs(*sizes)
    ours = gradients(tg.fused_xsa_gate, inputs)
    assert_near(ours, gradients(lambda *x: eager_exclude(tg, *x), inputs, torch.float64))


def test_exclusion_along_a_value_of_zeros(tg):
    """Nothing is taken away, and the gradient of the value is the eager form's (zero)."""
    y, v, gate = exclude_inputs(6, 4, 2, 8)
    v[:, 2:4] = 0
    ours, eager = (gradients(f, (y, v, gate)) for f in (tg.fused_xsa_gate, lambda *x: eager_exclude(tg, *x)))
    assert_near(ours, eager)
    torch.testing.assert_close(ours[0][:, 2:4].float(), (y * gate[..., None])[:, 2:4])
    assert tg.fused_xsa_gate(y[:, :0], v[:, :0], gate[:, :0]).shape == (1, 0, 4, 8)


def exact_mlp(x, up, down):
    h = x @ up.T
    return torch.where(h > 0, h * h, h * h / 4) @ down.T


def mlp_inputs(tokens: int, width: int, hidden: int, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens + width + hidden)
    shapes = (tokens, width), (hidden, width), (width, hidden)
    return [torch.randn(*shape, generator=generator).to(DEVICE, dtype) / shape[1] ** 0.5 for shape in shapes]


def mlp_results(function, inputs, dtype):
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    y = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(DEVICE)
    (y.double() * weights).sum().backward()
    return [y.detach().double(), *(leaf.grad.double() for leaf in leaves)]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 16), (7, 33, 65), (130, 40, 129), (257, 32, 300)])
def test_mlp_equals_float64(tg, sizes):
    inputs = mlp_inputs(*sizes)
    actual, exact = (
        mlp_results(tg.fused_mlp, inputs, torch.float32),
        mlp_results(exact_mlp, inputs, torch.float64),
    )
    tolerance = 2e-2 if DEVICE == "cuda" else 1e-5  # products of float32 use tf32 on CUDA
    for ours, theirs in zip(actual, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


def test_mlp_of_no_tokens(tg):
    x, up, down = mlp_inputs(3, 8, 16)
    empty = x[:0].requires_grad_()
    y = tg.fused_mlp(empty, up.requires_grad_(), down)
    y.sum().backward()
    assert y.shape == (0, 8)
    assert (up.grad == 0).all()


def test_mlp_in_half_precision_with_float32_weights(tg):
    """As in a training step: gradients of the banks arrive in float32."""
    x, up, down = mlp_inputs(65, 64, 96)
    x = x.bfloat16().view(5, 13, 64)
    leaves = [x.requires_grad_(), up.requires_grad_(), down.requires_grad_()]
    tg.fused_mlp(*leaves).float().sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.bfloat16, torch.float32, torch.float32]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact_mlp(*wide).sum().backward()
    for ours, exact in zip(leaves, wide, strict=True):
        torch.testing.assert_close(
            ours.grad.double(), exact.grad, rtol=0.05, atol=0.02 * float(exact.grad.abs().max())
        )


@pytest.fixture
def tiled(tg, monkeypatch):
    """Function: whether by descriptors, tiles -> those are all that there are."""
    made = tg.matmul_kernel

    def use(described: bool, *tiles: tuple[int, ...]) -> None:
        monkeypatch.setattr(tg, "TILES", {described: tiles})
        monkeypatch.setattr(tg, "has_descriptors", lambda a: described)
        made.cache_clear()

    yield use
    made.cache_clear()


@pytest.mark.parametrize("described", [False, True])
def test_tiles_do_not_matter(tg, tiled, described):
    """Pointers or tensor descriptors (Hopper), small tiles that do not divide the sizes."""
    if DEVICE == "cuda" and described and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("tensor descriptors need Hopper")
    tiled(described, (32, 64, 16, 4, 2) if described else (16, 32, 16, 4, 2))
    close = {"rtol": 2e-2, "atol": 2e-2} if DEVICE == "cuda" else CLOSE
    a, b, _ = mlp_inputs(50, 24, 72)
    h, hidden = a @ b.T, torch.full((50, 72), torch.nan, device=DEVICE)
    signs = torch.zeros(50, 3, dtype=torch.int32, device=DEVICE)
    tg.launch_matmul(a, b, hidden, hidden, signs, False)
    torch.testing.assert_close(hidden, tg.leaky_relu_squared(h), **close)
    bits = (signs[..., None] >> torch.arange(32, device=DEVICE)) & 1
    clear = h.abs() > (1e-2 if DEVICE == "cuda" else 0)  # tf32 may turn the sign of what is nearly zero
    assert torch.equal((bits.flatten(1)[:, :72] == 1)[clear], (h < 0)[clear])
    out, grads = torch.full_like(hidden, torch.nan), torch.randn_like(a)
    tg.launch_matmul(grads, b, out, hidden, signs, True)
    torch.testing.assert_close(out, (grads @ b.T) * torch.where(h > 0, 2 * h, h / 2), **close)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")
def test_all_tiles_give_the_same_numbers_on_a_gpu(tg, tiled):
    """At the record's widths; a choice by time must not change a run's numbers."""
    generator, all_tiles = torch.Generator(DEVICE).manual_seed(0), tg.TILES
    shapes = (3000, 512), (2048, 512), (3000, 2048)
    a, b, hidden = (torch.rand(s, generator=generator, device=DEVICE).bfloat16() - 0.3 for s in shapes)
    described = tg.has_descriptors(a)
    for backward in (False, True):
        results = []
        for tiles in all_tiles[described]:
            tiled(described, tiles)
            out = torch.empty_like(hidden)
            signs = torch.arange(3000 * 64, dtype=torch.int32, device=DEVICE).view(3000, 64) * 77_777
            tg.launch_matmul(a, b, out, hidden.abs(), signs, backward)
            results.append((out, signs))
        for out, signs in results[1:]:
            assert torch.equal(out, results[0][0]) and torch.equal(signs, results[0][1])


@pytest.mark.skipif(DEVICE == "cuda", reason="a clock of its own")
def test_tiles_are_chosen_by_time_once_for_all_numbers_of_rows(tg, tiled, monkeypatch):
    """Of those that can be built the fastest, for each product and pass; the warm-up meets all of these."""
    from triton.runtime.errors import OutOfResources

    tiles = (16, 32, 16, 1, 1), (32, 32, 16, 1, 1), (64, 32, 16, 1, 1)
    tiled(False, *tiles)
    monkeypatch.setenv("TRITON_INTERPRET", "true")  # Triton still interprets, we do as on a GPU
    kernel, timed = tg.matmul_kernel(False), []

    def milliseconds(call, quantiles):
        call()
        timed.append(len(timed) % 3)
        if timed[-1] == 1:
            raise OutOfResources(2, 1, "shared memory")
        return [(3.0, 1.0, 2.0)[timed[-1]]] * 3

    kernel._do_bench = milliseconds
    for rows in (50, 1, 700):
        a, b, down = mlp_inputs(rows, 24, 72)
        leaves = [x.requires_grad_() for x in (a, b, down)]
        y = tg.fused_mlp(*leaves)
        torch.testing.assert_close(y, tg.leaky_relu_squared(a @ b.T) @ down.T, **CLOSE)
        y.sum().backward()
        assert kernel.best_config.kwargs == {"BM": 64, "BN": 32, "BK": 16}
    assert timed == [0, 1, 2] * 2
    assert "M" not in kernel.keys


def test_operators_are_registered_properly(tg):
    """Schemas, fake results and autograd registration, checked by torch itself."""
    z, targets = logits(3, 20, 5.0), torch.tensor([0, 3, 19], device=DEVICE)
    x, up, down = (t.requires_grad_() for t in mlp_inputs(6, 8, 16))
    for train in (False, True):
        h, weight = (part.requires_grad_(train) for part in (z.detach(), logits(20, 20, 1.0)))
        torch.library.opcheck(tg._head_loss, (h, weight, targets, 30.0))
    torch.library.opcheck(tg._mlp, (x, up, down))
    signs = torch.tensor([[5], [-1], [0], [7], [8], [9]], dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(tg._mlp_grad, (x.detach(), down.detach(), torch.rand(6, 16, device=DEVICE), signs))
    qkv, gain, *rope = heads_of(3, 2, 1, 8, 2)
    qkv, tables = qkv.flatten(0, 1), [table.flatten(1) for table in rope]
    torch.library.opcheck(tg._qkv_norm_rope, (qkv.requires_grad_(), gain.requires_grad_(), *tables, 1))
    parts = tg._qkv_norm_rope(qkv.detach(), gain.detach(), *tables, 1)
    torch.library.opcheck(tg._qkv_norm_rope_grad, (qkv.detach(), gain.detach(), *tables, *parts))
    y, v, gate = (part[0] for part in exclude_inputs(5, 2, 1, 8))
    torch.library.opcheck(tg._xsa_gate_grad, (y, v, gate, y.clone()))
    torch.library.opcheck(tg._xsa_gate, (y.requires_grad_(), v.requires_grad_(), gate.requires_grad_()))


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_operators_survive_compilation_whole(tg, backend):
    """One graph without a break, forward and backward the same as outside of it."""

    def step(x, up, down, head, targets):
        return tg.fused_cross_entropy(tg.fused_mlp(x, up, down), head, targets, 30.0).mean()

    inputs = [*mlp_inputs(6, 8, 16), logits(11, 8, 1.0)]
    targets = torch.tensor([0, 3, 10, 1, 2, 9], device=DEVICE)
    results = []
    for function in (step, torch.compile(step, backend=backend, fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        loss = function(*leaves, targets)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize("looping", [False, True])
def test_model_with_kernels_equals_the_eager_model(tg, looping):
    """The whole model, losses and every gradient, with fused kernels in place of their eager twins."""
    cfg = tg.Config(
        vocab_size=50,
        num_layers=4,
        model_dim=16,
        num_heads=2,
        num_kv_heads=1,
        mlp_mult=2.0,
        rope_dims=4,
        num_loops=1,
        loop_start=1,
        loop_end=2,
        parallel_start_layer=3,
        gate_window=4,
    )
    tokens = torch.randint(2, 50, (20,), generator=torch.Generator().manual_seed(0))
    tokens[[0, 7, 8]] = tg.BOS
    x, y, segments = tg.packed_row(tokens, 16)
    results = []
    for kernels in ("", ",".join(tg.KERNELS)):
        torch.manual_seed(0)
        model = tg.GPT(cfg, tg.Backends(kernels=kernels)).to(DEVICE)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        batch = tg.Ranks(torch.device(DEVICE)).send(x, y, segments)
        losses = model.losses(*batch, looping=looping)
        losses.mean().backward()
        results.append([losses.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None])
    for eager, fused in zip(*results, strict=True):
        tolerance, near_zero = (2e-2, 1e-6) if DEVICE == "cuda" else (1e-4, 0.0)  # sums in tf32 cancel
        largest = tolerance * float(eager.abs().max()) + near_zero
        torch.testing.assert_close(fused, eager, rtol=tolerance, atol=largest)


BUILDERS = ("cross_entropy_kernel", "matmul_kernel", "qkv_norm_rope_kernel", "xsa_gate_kernel")
BROKEN = {
    "loss": ("tl.where(column == target, 1.0, 0.0)", "tl.where(column == target, 1.1, 0.0)"),
    "mlp": ("== 1, -1.0, 2.0)", "== 1, -2.0, 2.0)"),
    "qkv_norm_rope": ("u -= tl.load(side + partner", "u += tl.load(side + partner"),
    "xsa_gate": ("turn -= dot * grad + along * own", "turn -= dot * grad"),
}
BROKEN_GAIN = ("tl.store(dgain + row * H + head, dot,", "tl.store(dgain + row * H + head, -dot,")
SINGLE = {"model_dim": 64, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 200, "mlp_mult": 2.0}


@pytest.fixture
def tried(tg, monkeypatch, tmp_path):
    """Function: a change of the kernels' text, settings -> what is wrong with which kernel."""

    def try_them(before: str = "", after: str = "", **settings) -> dict[str, str]:
        if before:
            texts = [path.read_text() for path in (ROOT / "systems").glob("*kernels.py")]
            (text,) = (text for text in texts if before in text)
            assert text.count(before) == 1
            path = tmp_path / "changed.py"
            path.write_text(text.replace(before, after))
            spec = importlib.util.spec_from_file_location("changed", path)
            changed = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, "changed", changed)
            spec.loader.exec_module(changed)
            for name in BUILDERS:
                if hasattr(changed, name):
                    monkeypatch.setattr(tg, name, getattr(changed, name))
        return tg.try_kernels(tg.Config(**SINGLE | settings), tg.Ranks(torch.device(DEVICE)))

    return try_them


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sparse_attn_gate_enabled": False, "gated_attn_enabled": True},
        {"tie_embeddings": False, "xsa_last_n": 0, "smear_gate_enabled": False},
        {"parallel_style": "single", "plain_windows": True, "rope_dims": 0},
    ],
)
def test_kernels_that_work_pass_the_trial_at_the_start(tried, settings):
    assert tried(**settings) == {}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_kernel_is_found_at_the_start(tried, name):
    """A wrong sign, slope or factor in one backward pass: that kernel is named, no other."""
    assert tried(*BROKEN[name]) == {name: "its results are wrong"}


@pytest.mark.parametrize("heads", [2, 8])
def test_a_wrong_gradient_of_few_numbers_is_found_at_the_start(tried, heads):
    """Those of the gains are judged together with other short ones."""
    wrong = {"qkv_norm_rope": "its results are wrong"}
    assert tried(*BROKEN_GAIN, num_heads=heads, num_kv_heads=heads // 2, rope_dims=8) == wrong


def test_only_kernels_that_are_asked_for_are_tried(tried):
    assert tried(*BROKEN["mlp"], triton_kernels="loss,xsa_gate") == {}


def test_a_kernel_that_cannot_be_built_is_found_at_the_start(tried):
    wrong = tried("at = (row * G + group)", "at = (row * unknown + group)")
    assert list(wrong) == ["xsa_gate"]
    assert "unknown" in wrong["xsa_gate"]  # a real compiler prints the kernel first, and its cause last
    assert len(wrong["xsa_gate"]) <= 200


class Recorder:
    """Stands in for a kernel: keeps the arguments of its launches."""

    def __init__(self, kernel):
        while not inspect.isfunction(kernel):
            kernel = kernel.fn
        self.names = list(inspect.signature(kernel).parameters.values())
        self.launches = []

    def __getitem__(self, grid):
        return lambda *values, **options: self.launches.append(
            [v for p, v in zip(self.names, values, strict=False) if "constexpr" in str(p.annotation)]
            + [options]
        )


def test_number_of_rows_is_no_constant_of_a_kernel(tg, monkeypatch):
    """Adaptation has thousands of numbers of rows; a kernel is built once for all of them."""
    recorders = {}
    for name in BUILDERS:
        made = getattr(tg, name)(*[False] * (name == "matmul_kernel"))
        recorders[name] = recorder = Recorder(made)
        monkeypatch.setattr(tg, name, lambda *_, recorder=recorder: recorder)
    for rows in (1, 7, 1024, 50_000):
        x, up, down = (torch.empty(*shape, device=DEVICE) for shape in ((rows, 8), (16, 8), (8, 16)))
        tg.fused_mlp(x, up, down)
        targets = torch.zeros(rows, dtype=torch.long, device=DEVICE)
        tg.fused_cross_entropy(x, up, targets, 30.0)
        rope = [torch.empty(rows, 1, 2, device=DEVICE)] * 2
        q, _, v = tg.fused_qkv_norm_rope(x[None], torch.empty(2, device=DEVICE), rope, 1)
        tg.fused_xsa_gate(q, v[..., :1, :], torch.empty(1, rows, 2, device=DEVICE))
    for name, recorder in recorders.items():
        assert len(recorder.launches) == 4, name
        assert all(launch == recorder.launches[0] for launch in recorder.launches), name


def test_triton_is_imported_by_the_first_kernel_only(tg):
    """A machine without it trains by the eager forms."""
    code = "import sys, train_gpt; train_gpt.GPT(train_gpt.Config(num_layers=1, num_loops=0)); "
    code += "print('triton' in sys.modules or 'triton.language' in sys.modules)"
    folder = Path(tg.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_one_product_for_queries_keys_and_values(tg, monkeypatch):
    """CUDA computes the three roles of an input by one product, with adapters or without."""
    x, weights = torch.randn(2, 5, 8), {role: torch.randn(n, 8) for role, n in (("q", 8), ("k", 4), ("v", 4))}
    for adapt in (None, lambda role, x: x[..., :1] * len(weights[role])):
        three = tg.project_together(x, weights, adapt)
        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "is_cuda", True)
            one = tg.project_together(x, weights, adapt)
        for ours, theirs in zip(one, three, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_script_loaded_twice_leaves_the_operators_of_the_first(tg):
    """An operator registered anew under the same name would free the old one's, which is still called."""
    names = [tg._mlp._qualname, tg._mlp_grad._qualname]
    spec = importlib.util.spec_from_file_location("kernels_again", ROOT / "systems/kernels.py")
    again = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = again
    try:
        spec.loader.exec_module(again)
    finally:
        del sys.modules[spec.name]
    assert not set(names) & {again._mlp._qualname, again._mlp_grad._qualname}
    generator = torch.Generator().manual_seed(0)
    shapes, tolerance = ((4, 8), (16, 8), (8, 16)), 2e-2 if DEVICE == "cuda" else 1e-4
    x, up, down = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in shapes)
    for script in (tg, again, tg):
        expected = tg.leaky_relu_squared(x @ up.T) @ down.T
        largest = tolerance * float(expected.abs().max())
        torch.testing.assert_close(script.fused_mlp(x, up, down), expected, rtol=tolerance, atol=largest)
