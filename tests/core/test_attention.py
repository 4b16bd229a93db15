"""The attention ladder: every backend against an oracle in float64, how it is called, how one is chosen."""

import os
import runpy
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch

LENGTHS = [1, 7, 0, 12, 1, 3]  # of segments: one-token ones and an empty one among them


def make_inputs(rows: int = 1, tokens: int = 24, dtype=torch.float32) -> list[torch.Tensor]:
    """q, k, v with four query heads on two key heads."""
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(rows, tokens, heads, 8, generator=generator).to(dtype) for heads in (4, 2, 2)]


def make_segments(tg, lengths=LENGTHS, padding: int = 3):
    ends = torch.tensor([0, *lengths]).cumsum(0)
    cu_seqlens = torch.cat([ends, ends[-1].expand(padding)]).int()
    return tg.Segments(cu_seqlens, max(lengths))


def oracle(q, k, v, lengths=None) -> torch.Tensor:
    """Masked softmax in float64, written out."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), 2) for x in (k, v))
    tokens = q.size(1)
    number = torch.arange(len(lengths or [0])).repeat_interleave(torch.tensor(lengths or [tokens]))
    visible = (number[:, None] == number) & torch.ones(tokens, tokens).tril().bool()
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.size(-1) ** 0.5
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)


def results(function, *arguments) -> list[torch.Tensor]:
    """Output and gradients of q, k, v."""
    qkv, rest = arguments[:3], arguments[3:]
    qkv = [x.detach().clone().requires_grad_() for x in qkv]
    y = function(*qkv, *rest)
    weights = torch.arange(y.numel(), dtype=torch.float64).cos().view(y.shape).to(y.device)
    return [
        y.detach().double(),
        *(g.double() for g in torch.autograd.grad((y.double() * weights).sum(), qkv)),
    ]


def assert_same(actual, expected, tolerance: float = 2e-6) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def dense_attention(q, k, v, number=None):
    """What the stand-in modules compute with: traceable, unlike `plain` with its loop over segments."""
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    tokens = q.size(-2)
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if number is not None:
        visible = visible & (number[:, None] == number)
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, visible, enable_gqa=True)
    return y.transpose(-3, -2)


def segment_numbers(cu_seqlens, tokens: int):
    return torch.searchsorted(cu_seqlens, torch.arange(tokens, dtype=torch.int32), right=True)


def choose(tg, backend: str, ranks=None, compiler: str = "") -> str:
    return tg.choose_attention(tg.Config(attention_backend=backend), ranks or tg.CPU, compiler)


def record(calls: list, **call: object) -> None:
    """Keep the arguments of a call; not while torch.compile traces it, which would guard on the list."""
    if not torch.compiler.is_compiling():
        calls.append(call)


@pytest.fixture
def flash(monkeypatch):
    """Stand-ins for FlashAttention 3 and 4 with the real signatures; `calls` holds what they were given.

    Those of 4 are the functions that `bench/fa4.py` compiles for an H100.
    """
    calls = []

    def scores_of(q, k, number):
        """Scaled products [..., H, T, T], and the keys and values' heads repeated by the second result."""
        repeats = q.size(-2) // k.size(-2)
        scores = (
            torch.einsum("...ihd,...jhd->...hij", q, k.repeat_interleave(repeats, -2)) / q.size(-1) ** 0.5
        )
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if number is not None:
            visible &= number[:, None] == number
        return scores.masked_fill(~visible, -torch.inf), repeats

    def forward(q, k, v, *, out, lse, causal=False, return_lse=False, cu_seqlens_q=None, **options):
        assert return_lse
        cu_seqlens_k = options.pop("cu_seqlens_k", None)
        assert cu_seqlens_k is cu_seqlens_q or torch.equal(cu_seqlens_k, cu_seqlens_q)
        limits = (options.pop("max_seqlen_q", None), options.pop("max_seqlen_k", None))
        options |= {} if cu_seqlens_q is None else {"max": limits}
        record(calls, causal=causal, shape=tuple(q.shape), **options)
        number = None if cu_seqlens_q is None else segment_numbers(cu_seqlens_q, len(q))
        out.copy_(dense_attention(q, k, v, number))
        lse.copy_(scores_of(q, k, number)[0].logsumexp(-1))
        return out, lse, None, None, None

    def backward(q, k, v, out, dy, lse, *, dq, dk, dv, causal=False, cu_seqlens_q=None, **_):
        """By hand: inside an operator there is no autograd."""
        assert causal
        number = None if cu_seqlens_q is None else segment_numbers(cu_seqlens_q, len(q))
        scores, repeats = scores_of(q, k, number)
        shares = (scores - lse[..., None]).exp()
        wide = v.repeat_interleave(repeats, -2)
        slopes = torch.einsum("...ihd,...jhd->...hij", dy, wide)
        slopes = shares * (slopes - (dy * out).sum(-1).mT[..., None]) / q.size(-1) ** 0.5
        dq.copy_(torch.einsum("...hij,...jhd->...ihd", slopes, k.repeat_interleave(repeats, -2)))
        for grad, weights, x in ((dk, slopes, q), (dv, shares, dy)):
            whole = torch.einsum("...hij,...ihd->...jhd", weights, x)
            grad.copy_(whole.unflatten(-2, (-1, repeats)).sum(-2))
        return dq, dk, dv

    class FlashAttnVarlenFunc(torch.autograd.Function):
        """As there: torch.compile traces it, and refuses a tensor that is given twice (torch 2.13)."""

        @staticmethod
        def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k):
            number = None if cu_seqlens_q is None else segment_numbers(cu_seqlens_q, len(q))
            y, lse = dense_attention(q, k, v, number), scores_of(q, k, number)[0].logsumexp(-1)
            ctx.save_for_backward(q, k, v, y, lse, cu_seqlens_q)
            return y

        @staticmethod
        def backward(ctx, dy):
            q, k, v, y, lse, cu_seqlens = ctx.saved_tensors
            dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
            backward(q, k, v, y, dy, lse, dq=dq, dk=dk, dv=dv, causal=True, cu_seqlens_q=cu_seqlens)
            return dq, dk, dv, None, None

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, **options):
        record(calls, causal=causal, shape=tuple(q.shape), **options)
        return FlashAttnVarlenFunc.apply(q, k, v, None, None)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, **options
    ):
        assert cu_seqlens_q.dtype == torch.int32
        assert torch.compiler.is_compiling() or torch.equal(cu_seqlens_q, cu_seqlens_k)
        limits = (max_seqlen_q, max_seqlen_k)
        record(calls, causal=causal, shape=tuple(q.shape), max=limits, **options)
        return FlashAttnVarlenFunc.apply(q, k, v, cu_seqlens_q, cu_seqlens_k)

    names = ("flash_attn_interface", "flash_attn", "flash_attn.cute", "flash_attn.cute.interface")
    modules = {name: ModuleType(name) for name in names}
    fa3, package, cute, interface = modules.values()
    fa3.flash_attn_func, fa3.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    interface._flash_attn_fwd, interface._flash_attn_bwd = forward, backward
    package.cute, cute.interface = cute, interface
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.fixture(params=["2.11", "2.13"])
def varlen(monkeypatch, request):
    """A stand-in for torch's varlen_attn (CUDA only) with the signature of a release."""
    from torch.nn.attention import varlen as module

    calls = []

    def compute(q, k, v, cu_seq_q, max_q, window_size):
        record(calls, shape=tuple(q.shape), max=max_q, window=window_size)
        return dense_attention(q, k, v, segment_numbers(cu_seq_q, len(q)))

    def older(
        q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        return compute(q, k, v, cu_seq_q, max_q, window_size)

    def newer(
        q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
    ):
        assert enable_gqa, "refuses fewer key heads unless asked"
        return compute(q, k, v, cu_seq_q, max_q, window_size)

    monkeypatch.setattr(module, "varlen_attn", {"2.11": older, "2.13": newer}[request.param])
    return calls


@pytest.mark.parametrize("backend", ["plain", "torch_varlen", "flex"])
@pytest.mark.parametrize("rows", [1, 3])
def test_padded_rows_equal_the_oracle(tg, backend, rows):
    """The batched form of test-time training: no segments, several rows."""
    qkv = make_inputs(rows)
    assert_same(results(tg.attend, *qkv, None, tg.Backends(backend)), results(oracle, *qkv))


@pytest.mark.parametrize("lengths", [LENGTHS, [24], [1] * 24, [0, 23, 1, 0]])
def test_plain_segments_equal_the_oracle(tg, lengths):
    qkv = make_inputs()
    ours = results(tg.attend, *qkv, make_segments(tg, lengths), tg.Backends())
    assert_same(ours, results(oracle, *qkv, lengths))


@pytest.mark.parametrize("backend", ["fa3", "fa4"])
def test_flash_attention_is_called_as_it_wants(tg, flash, backend):
    segments, qkv = make_segments(tg), make_inputs()
    assert_same(results(tg.attend, *qkv, segments, tg.Backends(backend)), results(oracle, *qkv, LENGTHS))
    assert flash == [{"causal": True, "shape": (24, 4, 8), "max": (12, 12)}]
    rows = make_inputs(rows=3)
    assert_same(results(tg.attend, *rows, None, tg.Backends(backend)), results(oracle, *rows))
    assert flash[1:] == [{"causal": True, "shape": (3, 24, 4, 8)}]


def test_flash_attention_of_a_packed_script(tg, flash, tmp_path):
    """Torch calls what belongs to an operator by the names of its parameters, which packing must leave."""
    cfg, backends = tg.Config(compressor="lzma"), tg.Backends("fa4", "", "", 1)
    packed, _ = tg.packed_script(cfg, backends, tg.read_sources(), False)
    path = tmp_path / "packed.py"
    path.write_bytes(packed)
    module = runpy.run_path(str(path))
    operator = next(value for value in module.values() if getattr(value, "_name", "") == "attention")
    cu_seqlens, limit, _ = make_segments(tg)
    packed_attend = lambda q, k, v: operator(q[0], k[0], v[0], cu_seqlens, limit)[0][None]  # noqa: E731
    qkv = make_inputs()
    assert_same(results(packed_attend, *qkv), results(oracle, *qkv, LENGTHS))


def test_torch_varlen_is_called_as_it_wants(tg, varlen):
    qkv = make_inputs()
    ours = results(tg.attend, *qkv, make_segments(tg), tg.Backends("torch_varlen"))
    assert_same(ours, results(oracle, *qkv, LENGTHS))
    assert varlen == [{"shape": (24, 4, 8), "max": 12, "window": (-1, 0)}]


@pytest.mark.parametrize("lengths", [LENGTHS, [24], [1] * 24])
def test_flex_segments_equal_the_oracle(tg, lengths):
    """Forward only: flex attention has no backward on a CPU."""
    qkv = make_inputs()
    ours = tg.attend(*qkv, make_segments(tg, lengths), tg.Backends("flex"))
    torch.testing.assert_close(ours.double(), oracle(*qkv, lengths), rtol=2e-6, atol=2e-6)


def test_queries_and_keys_follow_the_type_of_the_values(tg):
    q, k, v = make_inputs()
    assert tg.attend(q, k, v.bfloat16(), make_segments(tg), tg.Backends()).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["plain", "fa3", "fa4", "torch_varlen"])
def test_backends_survive_compilation_whole(tg, flash, varlen, backend):
    """One graph, which serves any number of segments, forward and backward."""
    torch._dynamo.reset()
    compiled = torch.compile(tg.attend, backend="aot_eager", fullgraph=True, dynamic=False)
    for lengths in (LENGTHS, [24], [5, 19]):
        segments, qkv = make_segments(tg, lengths, padding=len(lengths)), make_inputs()
        segments = segments._replace(max_seqlen=24)
        torch._dynamo.mark_dynamic(segments.cu_seqlens, 0)
        with torch.compiler.set_stance("default" if lengths is LENGTHS else "fail_on_recompile"):
            ours = results(compiled, *qkv, segments, tg.Backends(backend))
        assert_same(ours, results(oracle, *qkv, lengths))
    rows = make_inputs(rows=2)
    assert_same(results(compiled, *rows, None, tg.Backends(backend)), results(oracle, *rows))


@pytest.mark.parametrize("backend", ["fa3", "fa4", "torch_varlen", "flex"])
def test_backend_that_cannot_work_is_one_line(tg, capsys, backend):
    code = tg.main([], {"PRESET": "demo", "ATTENTION_BACKEND": backend, "DEVICE": "cpu"})
    output = capsys.readouterr()
    assert code == 2
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert f"ATTENTION_BACKEND={backend}: it needs {tg.ATTENTION[backend]}" in output.err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("backend", ["fa3", "fa4", "torch_varlen", "flex"])
def test_backends_of_a_gpu_equal_the_oracle(tg, backend):
    """At the record's heads, compiled as in a run; segments of one token, empty ones, a whole window."""
    try:
        choose(tg, backend, tg.Ranks(torch.device("cuda")), "inductor")
    except tg.ConfigError as error:
        pytest.skip(str(error))
    lengths = [1, 2048, 0, 77, 128, 129, 1, 640]
    generator, tokens = torch.Generator().manual_seed(0), sum(lengths)
    segments = make_segments(tg, lengths)
    segments = segments._replace(cu_seqlens=segments.cu_seqlens.cuda())
    compiled = torch.compile(tg.attend, fullgraph=True, dynamic=False)
    for rows, part, spans in ((1, segments, lengths), (5, None, None)):
        shapes = [(rows, tokens if part else 300, heads, 64) for heads in (8, 4, 4)]
        qkv = [torch.randn(shape, generator=generator).bfloat16().cuda() for shape in shapes]
        expected = results(oracle, *(x.cpu() for x in qkv), spans)
        for ours, exact in zip(results(compiled, *qkv, part, tg.Backends(backend)), expected, strict=True):
            assert torch.dist(ours.cpu(), exact) < 0.01 * exact.norm()


def test_missing_package_is_named(tg):
    with pytest.raises(tg.ConfigError, match="FlashAttention 3.*No module named 'flash_attn_interface'"):
        choose(tg, "fa3")


def test_backend_that_computes_something_else_is_refused(tg, flash, monkeypatch):
    interface = sys.modules["flash_attn_interface"]
    monkeypatch.setattr(interface, "flash_attn_varlen_func", lambda q, k, v, **options: q + k.sum() + v.sum())
    with pytest.raises(tg.ConfigError, match="ATTENTION_BACKEND=fa3: .*results are wrong"):
        choose(tg, "fa3")


def test_backend_that_is_installed_and_not_used_is_noted(tg, flash, monkeypatch):
    """The automatic choice passes over what does not work; a slower run should not be a riddle."""

    def notices(chosen: str) -> list[str]:
        return tg.unused_attention(tg.Config(), tg.Backends(chosen), tg.CPU)

    assert notices("plain") == []  # both work
    interface = sys.modules["flash_attn.cute.interface"]
    monkeypatch.setattr(interface, "_flash_attn_bwd", lambda *tensors, dq, dk, dv, **options: None)
    assert notices("fa4") == []
    wrong = "attention fa4 is installed and not used: RuntimeError: its results are wrong"
    assert notices("torch_varlen") == [wrong]
    monkeypatch.setattr(sys.modules["flash_attn_interface"], "flash_attn_varlen_func", None)
    assert notices("fa3") == []
    assert [text.split()[1] for text in notices("flex")] == ["fa3", "fa4"]
    for name in [name for name in sys.modules if name.startswith("flash_attn")]:
        monkeypatch.delitem(sys.modules, name)
    assert notices("plain") == []


@pytest.mark.parametrize("compiler", ["", "aot_eager"])
def test_backend_that_works_is_taken(tg, flash, compiler):
    for backend in ("fa3", "fa4", "plain"):
        assert choose(tg, backend, compiler=compiler) == backend


@pytest.mark.parametrize("works", ["fa3", "fa4", "torch_varlen", "flex", "plain"])
def test_auto_takes_the_best_that_works(tg, monkeypatch, works):
    order, tried = list(tg.ATTENTION), []

    def attempt(backend, cfg, ranks, compiler):
        tried.append(backend)
        if order.index(backend) < order.index(works):
            raise ImportError("not here")

    monkeypatch.setattr(tg, "try_attention", attempt)
    assert choose(tg, "auto", SimpleNamespace(on_gpu=True)) == works
    assert tried == order[: order.index(works) + 1]


def test_auto_is_plain_and_eager_on_a_cpu(tg):
    for choose_all in (tg.choose_backends, tg.plain_backends):
        assert choose_all(tg.Config(), tg.CPU) == tg.Backends("plain", "eager", "", 8)


GPU = SimpleNamespace(on_gpu=True, device=torch.device("cuda", 0), world_size=16)
ALL_KERNELS = "loss,mlp,qkv_norm_rope,xsa_gate"


@pytest.mark.parametrize(
    ("settings", "capability", "packages", "expected"),
    [
        ({}, 9, {"flash_attn_interface", "triton"}, ("fa3", ALL_KERNELS, "inductor", 16)),
        ({}, 8, {"flash_attn_interface", "triton"}, ("flex", ALL_KERNELS, "inductor", 16)),
        ({}, 9, {"triton"}, ("flex", ALL_KERNELS, "inductor", 16)),
        ({}, 9, {"flash_attn_interface", "triton", "alone"}, ("flex", "", "inductor", 16)),
        ({"attention_backend": "fa4"}, 9, set(), ("fa4", "", "inductor", 16)),
        (
            {"triton_kernels": "mlp,loss", "compile_backend": "off", "grad_accum_steps": 32},
            9,
            {"triton"},
            ("flex", "mlp,loss", "", 32),
        ),
        (
            {"triton_kernels": "0", "compile_backend": "aot_eager"},
            9,
            {"triton"},
            ("flex", "", "aot_eager", 16),
        ),
    ],
)
def test_the_script_alone_chooses_by_what_is_there(tg, monkeypatch, settings, capability, packages, expected):
    """Without harness/ nothing is tried: device, packages and settings decide; kernels are in systems/."""
    monkeypatch.setattr(tg, "has_part", lambda name: "alone" not in packages)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (capability, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in packages else None)
    assert tg.plain_backends(tg.Config(**settings), GPU) == tg.Backends(*expected)


def test_wishes_are_met_on_a_cpu_too(tg):
    cfg = tg.Config(attention_backend="flex", compile_backend="aot_eager", triton_kernels="1")
    assert tg.plain_backends(cfg, tg.CPU) == tg.Backends("flex", "", "aot_eager", 8)


@pytest.mark.parametrize(
    ("text", "names"), [("", []), ("0", []), ("1", ALL_KERNELS.split(",")), ("mlp", ["mlp"])]
)
def test_names_of_kernels(tg, text, names):
    assert tg.kernel_names(text) == names
    assert tg.Config().triton_kernels == ALL_KERNELS


def test_where_no_attention_works_the_run_ends(tg, monkeypatch):
    """Not with no backend at all, which would be found in the middle of the model."""
    monkeypatch.setattr(tg, "try_attention", lambda *_: 1 / 0)
    with pytest.raises(tg.ConfigError, match=r"ATTENTION_BACKEND=plain: .*ZeroDivisionError"):
        choose(tg, "auto", SimpleNamespace(on_gpu=True))


def test_on_a_gpu_sums_of_both_orders_are_not_fused(tg, monkeypatch):
    """Such a kernel took 6.4 ms of a micro-batch's 91 on an H200 (torch 2.11); the user's own wish counts."""
    name = "TORCHINDUCTOR_MIX_ORDER_REDUCTION"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    for before, after in ((None, "0"), ("1", "1")):
        monkeypatch.setenv(name, before or "")
        if before is None:
            monkeypatch.delenv(name)
        tg.Ranks.from_env(tg.Config(), {})
        assert os.environ[name] == after
