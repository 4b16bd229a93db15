"""The own autograd functions of a CPU compute what the plain forms say, and so do models made of them."""

import dataclasses

import pytest
import torch
from golden_tools import run_through
from torch.autograd import gradcheck

MODELS = {
    "demo": {},
    "single": {"parallel_style": "single"},
    "serial, plain skips, XSA in some layers": {
        "parallel_start_layer": 0,
        "skip_gates_enabled": False,
        "xsa_last_n": 2,
    },
    "gate of queries": {
        "sparse_attn_gate_enabled": False,
        "attn_out_gate_enabled": True,
        "attn_out_gate_src": "q",
    },
    "no gate": {"sparse_attn_gate_enabled": False},
    "own head, all dimensions turned": {"tie_embeddings": False, "rope_dims": 0},
}


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Float64, away from the kink of the leaky ReLU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [numbers(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def heads(tg, x, gain, back=False):
    """Norm, gain and rotation of three of four heads of six dimensions, four of them turned."""
    angles = numbers(5, 1, 2, seed=9)
    return tg.NormedHeads.apply(x, gain, *tg.rotation(angles.cos(), angles.sin(), 3), (2, 1))


FUNCTIONS = {  # what is differentiated, and the shapes of its inputs
    "Linear": (lambda tg, x, w: tg.Linear.apply(x, w, None), (2, 3, 4), (5, 4)),
    "Linear, added": (lambda tg, *inputs: tg.Linear.apply(*inputs), (2, 3, 4), (5, 4), (2, 3, 5)),
    "ReluSquaredMLP": (
        lambda tg, *inputs: tg.ReluSquaredMLP.apply(*inputs),
        (2, 3, 4),
        (6, 4),
        (4, 6),
        (2, 3, 4),
    ),
    "WeightedSum": (lambda tg, *inputs: tg.WeightedSum.apply(*inputs), (4,), (2, 3, 4), (), (2, 3, 4)),
    "ScaledNorm": (lambda tg, x: tg.ScaledNorm.apply(x, 0.7), (2, 3, 4)),
    "NormedHeads": (heads, (2, 5, 4, 6), (3,)),
    "ExcludeAndGate": (
        lambda tg, *inputs: tg.ExcludeAndGate.apply(*inputs),
        (2, 3, 4, 5),
        (2, 3, 2, 5),
        (2, 3, 4),
    ),
    "CausalAttention": (
        lambda tg, *inputs: tg.CausalAttention.apply(*inputs),
        (2, 5, 4, 3),
        (2, 5, 2, 3),
        (2, 5, 2, 3),
    ),
    "Adapted": (
        lambda tg, y, x, *pair: tg.Adapted.apply(y, x, None, (0,), *pair),
        (2, 3, 5),
        (2, 3, 4),
        (2, 2, 4),
        (2, 5, 2),
    ),
    "Adapted, two roles": (
        lambda tg, y, x, scale, *pairs: tg.Adapted.apply(y, x, scale, (1, 4), *pairs),
        (2, 3, 6),
        (2, 3, 4),
        (6,),
        (2, 2, 4),
        (2, 3, 2),
        (2, 2, 4),
        (2, 2, 2),
    ),
    "SoftcappedHead": (
        lambda tg, h, w: tg.SoftcappedHead.apply(h, w, torch.tensor([[0, 6, 3]] * 2), 3.0, None, None),
        (2, 3, 4),
        (7, 4),
    ),
    "SoftcappedHead, adapted": (
        lambda tg, h, w, *ab: tg.SoftcappedHead.apply(h, w, torch.tensor([[0, 6, 3]] * 2), 3.0, *ab),
        (2, 3, 4),
        (7, 4),
        (2, 2, 4),
        (2, 7, 2),
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients(tg, name):
    """All at once, and each alone: what is frozen costs no gradient and disturbs none."""
    function, *shapes = FUNCTIONS[name]
    inputs = leaves(*shapes)
    assert gradcheck(lambda *x: function(tg, *x), inputs, fast_mode=True)
    for alone in range(len(inputs)):
        frozen = [x.detach().requires_grad_(i == alone) for i, x in enumerate(inputs)]
        assert gradcheck(lambda *x: function(tg, *x), frozen, fast_mode=True)


@pytest.mark.parametrize("rows", [300, 512], ids=["last block short", "whole blocks"])
def test_head_by_blocks_is_the_plain_loss(tg, rows):
    h, weight = leaves((1, rows, 8), (40, 8))
    targets = torch.arange(rows)[None] % 40
    ours = tg.head_loss(h, weight, targets, 5.0, None)
    plain = tg.softcapped_cross_entropy(h @ weight.mT, targets, 5.0)
    torch.testing.assert_close(ours, plain.double(), rtol=0, atol=2e-6)
    factors = numbers(1, rows, seed=5)
    for a, b in zip(
        *(torch.autograd.grad((x * factors).sum(), (h, weight)) for x in (ours, plain)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_largest_softcap_rounds_no_loss(tg):
    """In float32, of logits that it leaves as they are nearly: what preflight allows, every form can do."""
    with pytest.raises(tg.ConfigError, match="LOGIT_SOFTCAP=1000.1: must be"):
        tg.check_settings(tg.Config(logit_softcap=1000.1))
    torch.manual_seed(0)
    h, weight, targets = torch.randn(1, 99, 64), torch.randn(300, 64) / 8, torch.randint(300, (1, 99))
    z = h.double() @ weight.double().mT
    exact = tg.softcapped_cross_entropy(z, targets, 1000.0)
    found = tg.head_loss(h, weight, targets, 1000.0, None)
    assert (found.mean() - exact.mean()).abs() < 1e-5 and (found - exact).abs().max() < 5e-4


@pytest.mark.parametrize("length", [40, 64, 150, 256])
def test_attention_by_blocks_is_the_plain_one(tg, length):
    """Result and gradients, of heads that lie in a wider tensor; gradients come back in any layout."""
    x, v = leaves((3, length, 9, 8), (3, length, 3, 8))
    dy = numbers(3, 6, length, 8, seed=5).transpose(1, 2)
    own = tg.CausalAttention.apply(*x.split([6, 3], 2), v)
    q, k = x.split([6, 3], 2)
    plain = tg.attend(q, k, v, None, tg.Backends())
    for a, b in zip(*([y, *torch.autograd.grad(y, (x, v), dy)] for y in (own, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("rows", "length"), [(2, 127), (2, 128), (1, 255), (1, 256), (1, 512), (1, 513)])
def test_which_rows_are_attended_in_blocks(tg, rows, length):
    """Not very short or very long ones, nor a few tokens alone: where it is faster, and worth its memory."""
    q, v = (torch.randn(rows, length, heads, 4, requires_grad=True) for heads in (2, 1))
    y = tg._causal(q, v, v)
    assert ("CausalAttention" in str(y.grad_fn)) == (128 <= length <= 512 and rows * length >= 256)
    with torch.no_grad():
        torch.testing.assert_close(tg._causal(q, v, v), y)
    plain = torch.nn.functional.scaled_dot_product_attention
    heads_first = (x.transpose(1, 2) for x in (q, v, v))
    torch.testing.assert_close(y, plain(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2))


@pytest.mark.parametrize("onednn", [False, True])
def test_products_of_any_layout_are_right(tg, monkeypatch, onednn):
    """Parts of wider matrices and transposed ones, in single precision, as oneDNN and MKL take them."""
    from systems import products

    monkeypatch.setattr(products, "by_onednn", lambda: onednn)
    wide, weight, add = (numbers(*shape).float() for shape in ((6, 40), (9, 16), (6, 9)))
    for x in (wide[:, :16], wide[:, 3:19], wide[:, ::2][:, :16], wide[:, :16].mT.contiguous().mT):
        for w in (weight, weight.mT.contiguous().mT, numbers(9, 40).float()[:, 5:21]):
            torch.testing.assert_close(tg.product(x, w), x @ w.mT)
            torch.testing.assert_close(tg.product(x, w, add=add), x @ w.mT + add)
            expected = torch.nn.functional.leaky_relu(x @ w.mT, 0.5)
            torch.testing.assert_close(tg.product(x, w, slope=0.5), expected)
    for dy, x in ((wide, add), (add, wide)):
        torch.testing.assert_close(tg.weight_gradient(dy, x), dy.mT @ x)
        total = torch.ones(dy.size(1), x.size(1))
        torch.testing.assert_close(tg.weight_gradient(dy, x, total.clone()), total + dy.mT @ x)
    for a, b in ((numbers(3, 9, 5), numbers(3, 5, 2)), (numbers(3, 5, 9).mT, numbers(3, 7, 5).mT)):
        torch.testing.assert_close(tg.products(a, b), a @ b)  # a narrow result and a wide one


def pair(tg, **settings):
    """The same model in float64, plain and of own functions; no matrix is zero."""
    cfg = dataclasses.replace(tg.Config.from_env({"PRESET": "demo"}), **settings)
    models = []
    for kernels in ("", "eager"):
        torch.manual_seed(1)
        model = tg.GPT(cfg, tg.Backends(kernels=kernels)).double()
        with torch.no_grad():
            for i, parameter in enumerate(model.parameters()):
                parameter.add_(0.1 * numbers(*parameter.shape, seed=i))
        models.append(model)
    assert type(models[1].blocks[0]) is tg.EagerBlock and type(models[0].blocks[0]) is tg.Block
    return cfg, models


def same(ours, plain, tolerance=1e-5):
    """Tensors equal up to the single precision in which the plain loss is computed."""
    for a, b in zip(ours, plain, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.dist(a, b) <= tolerance * (1e-9 + b.norm())


@pytest.mark.parametrize("name", MODELS)
def test_models_are_the_same(tg, name):
    """Losses and all gradients; documents of one length after another, and rows without documents."""
    cfg, models = pair(tg, **MODELS[name])
    tokens = torch.randint(2, 1000, (141,), generator=torch.Generator().manual_seed(0))
    tokens[[0, 30, 60, 90, 107]] = tg.BOS
    x, y, segments = tg.packed_row(tokens, 30)
    for part in (segments, None):
        results = []
        for model in models:
            losses = model.losses(x, y, part, looping=True)
            results.append(
                [losses, *torch.autograd.grad(losses.mean(), model.parameters(), allow_unused=True)]
            )
        same(*reversed(results))


@pytest.mark.parametrize("switched_off", [False, True])
def test_adapters_are_the_same(tg, switched_off):
    """Adapters' gradients with frozen weights, scored places only; adapters that are off may be infinite."""
    cfg, models = pair(tg, ttt_k_lora=False)
    lora = tg.BatchedLoRA(cfg, 3, tg.lora_slots(cfg, True), torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for i, parameter in enumerate(lora.parameters()):
            parameter.add_(0.1 * numbers(*parameter.shape, seed=i))
            parameter[1] = torch.inf if switched_off else parameter[1]
    lora.active = torch.tensor([True, not switched_off, True])
    x = torch.randint(2, 1000, (3, 40), generator=torch.Generator().manual_seed(0))
    results = []
    for model in models:
        model.requires_grad_(False)
        losses = model.losses(x, x, looping=True, lora=lora, scored=torch.arange(30, 40).expand(3, -1))
        assert losses.isfinite().all()
        kept = 0 if switched_off else slice(None)
        gradients = torch.autograd.grad(losses[kept].sum(), list(lora.parameters()))
        results.append([losses, *(gradient[kept] for gradient in gradients)])
    same(*reversed(results))


def test_calibration_sees_the_same_inputs(tg):
    cfg, models = pair(tg)
    x, _, segments = tg.random_row(cfg, 50, 30, torch.Generator().manual_seed(0))
    seen = []
    for model in models:
        inputs = {}
        model.hidden(
            x, segments, looping=True, on_input=lambda name, n, seen=inputs: seen.setdefault(name, n)
        )
        seen.append(inputs)
    assert list(seen[0]) == list(seen[1])
    same(seen[1].values(), seen[0].values(), 1e-9)


def test_cached_keys_are_the_same(tg):
    """Test-time training with TTT_CACHE_WINDOW, which puts keys and values before the new ones."""
    cfg, models = pair(tg, ttt_cache_window=24, ttt_chunk_size=12, phased_ttt_prefix_docs=0)
    lengths = [60, 41, 33]
    tokens = torch.randint(2, 1000, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    tokens[[0, 60, 101]] = tg.BOS
    val = tg.ValidationSet.from_sidecar(tokens, torch.ones_like(tokens))
    scores = [
        run_through(tg.ScoreFirstTTT, model.float(), val, cfg, looping=True).val_loss for model in models
    ]
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)


@pytest.mark.parametrize(
    ("on_gpu", "settings", "there", "kernels"),
    [
        (False, {}, True, "eager"),
        (False, {}, False, ""),
        (False, {"compile_backend": "inductor"}, True, ""),
        (False, {"compile_backend": "aot_eager"}, True, ""),
        (True, {"triton_kernels": "0", "compile_backend": "off", "attention_backend": "plain"}, True, ""),
    ],
)
def test_where_they_are_used(tg, monkeypatch, on_gpu, settings, there, kernels):
    """On a CPU without a compiler, where the file stands beside the script."""
    monkeypatch.setattr(tg, "has_part", lambda name: there)
    ranks = tg.Ranks(torch.device("cuda" if on_gpu else "cpu"))
    assert tg.plain_backends(tg.Config(**settings), ranks).kernels == kernels
