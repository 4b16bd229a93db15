"""The compiled step: no graph breaks, no recompilation after the warm-up, the same numbers, no trace left."""

import copy
import dataclasses
import types

import numpy as np
import pytest
import torch
from golden_tools import run_through
from house import packed_loader
from test_attention import flash  # noqa: F401 - a fixture
from test_training import SIZES as TRAINING_SIZES
from test_training import fingerprint, write_shard
from test_ttt import TINY, documents_stream, random_model, validation

SIZES = TRAINING_SIZES | {"eval_stride": 16}


@pytest.fixture
def shard(tmp_path):
    """6,000 tokens: long documents and short ones in turn, so that rows have few or many segments."""
    rng = np.random.default_rng(0)
    lengths = ([90] * 6 + [2] * 300) * 5
    documents = [np.append([1], rng.integers(2, 64, size=n)) for n in lengths]
    path = tmp_path / "fineweb_train_000000.bin"
    write_shard(path, np.concatenate(documents)[:6000])
    return path


@pytest.fixture
def make_trainer(tg, shard):
    """Function: compiler, attention, settings -> a trainer on the shard."""

    def make(compiler: str, attention: str = "plain", **settings: object):
        torch._dynamo.reset()
        sizes = SIZES | {"train_batch_tokens": 512, "val_batch_tokens": 2048, "train_seq_len": 32}
        cfg = tg.Config(**sizes | settings)
        backends = tg.Backends(attention, "", compiler, cfg.grad_accum_steps)
        torch.manual_seed(cfg.seed)
        model = backends.move_and_compile(tg.GPT(cfg, backends), tg.CPU.device)
        _, tokens = tg.micro_batches(cfg, backends, 1)
        return tg.Trainer(cfg, model, packed_loader(tg, [shard], 1, 0, tokens, cfg.train_seq_len))

    return make


def random_row(tg, cfg, tokens: int):
    return tg.random_row(cfg, tokens, cfg.train_seq_len, torch.Generator().manual_seed(0))


def losses_of(trainer, fracs) -> list[float]:
    return [trainer.step(step, frac).train_loss for step, frac in enumerate(fracs)]


def test_compiled_training_is_the_same_and_never_recompiles(tg, make_trainer, shard, flash):  # noqa: F811
    """Both layer orders, rows of few and of many segments, an evaluation; the warm-up leaves no trace.

    The compiled trainer uses (a stand-in for) FlashAttention 3, which is told the longest segment.
    """
    fracs = [0.0] * 3 + [0.5] * 3
    sizes = {"num_layers": 2, "loop_start": 0, "loop_end": 0, "parallel_start_layer": 1}
    expected = losses_of(make_trainer("", **sizes), fracs)
    trainer = make_trainer("aot_eager", "fa3", **sizes)
    before = fingerprint(trainer)
    trainer.warm_up(1)
    assert fingerprint(trainer) == before
    graphs = tg.compiled_graphs()
    assert graphs > 0
    row = torch.from_numpy(tg.read_shard(shard)[:257].astype(np.int64))
    with torch.compiler.set_stance("fail_on_recompile"):
        actual = losses_of(trainer, fracs)
        tg.model_score(trainer.model, looping=True, ranks=trainer.ranks)(*tg.packed_row(row, 16))
    assert tg.compiled_graphs() == graphs
    assert actual == pytest.approx(expected, rel=1e-4)


def test_rows_differ_in_their_segments(make_trainer):
    """The test above would prove little if all batches had cu_seqlens of one size."""
    trainer = make_trainer("")
    batches = [trainer.loader.next()[2] for _ in range(12)]
    assert len({len(segments.cu_seqlens) for segments in batches}) > 1
    assert len({segments.max_seqlen for segments in batches}) > 1
    assert {segments.max_seqlen_bound for segments in batches} == {32}


def test_recompilation_is_counted(tg, make_trainer):
    trainer = make_trainer("aot_eager", num_layers=2, num_loops=0, parallel_start_layer=0)
    counts = [tg.compiled_graphs()]
    for tokens in (32, 32, 40):
        with torch.no_grad():
            row = random_row(tg, trainer.cfg, tokens)
            trainer.model(*trainer.ranks.send(*row, "aot_eager"), looping=False)
        counts.append(tg.compiled_graphs())
    assert [count - counts[0] for count in counts] == [0, 1, 1, 2]


def test_tail_of_a_stream_is_scored_without_a_graph_of_its_own(tg, make_trainer):
    trainer = make_trainer("aot_eager")
    score = tg.model_score(trainer.model, looping=False, ranks=trainer.ranks)
    rows = [random_row(tg, trainer.cfg, tokens) for tokens in (32, 32, 9)]
    score(*rows[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        actual = [score(*row) for row in rows]
    for row, losses in zip(rows, actual, strict=True):
        expected = trainer.model.losses(*row, looping=False)
        torch.testing.assert_close(losses, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("fused", ["0", "1"])
def test_inductor_trains_the_model_whole_on_a_gpu(tg, fused):
    """The compiler of a real run, with and without fused kernels: one graph, gradients as in eager mode."""
    cfg = tg.Config(**SIZES | {"model_dim": 128, "train_seq_len": 64, "triton_kernels": fused})
    ranks = tg.Ranks(torch.device("cuda"))
    backends = tg.choose_backends(cfg, ranks)
    assert backends.compiler == "inductor"
    torch.manual_seed(0)
    model = backends.move_and_compile(tg.GPT(cfg, backends), ranks.device)
    results = []
    for call in (model, model.losses):
        model.zero_grad()
        with ranks.autocast():
            loss = call(*ranks.send(*random_row(tg, cfg, 1024), "inductor"), looping=True).mean()
        loss.backward()
        results.append(
            torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
        )
    assert (results[0] - results[1]).norm() < 0.05 * results[1].norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_hessians_of_a_gpu_are_those_of_a_cpu(tg):
    """Sums of products by TF32, which is given back afterwards."""
    cfg = tg.Config(**SIZES | {"gptq_calibration_batches": 2})
    rows = torch.randint(2, cfg.vocab_size, (4096, cfg.train_seq_len + 1))
    results = []
    for device in ("cpu", "cuda"):
        loader = types.SimpleNamespace(next=lambda count: (rows[:count, :-1], rows[:count, 1:]))
        ranks = tg.Ranks(torch.device(device))
        torch.manual_seed(0)
        model = tg.Backends().move_and_compile(tg.GPT(cfg), ranks.device)
        results.append(tg.calibrate(model, cfg, loader, looping=True, ranks=ranks))
    assert torch.get_float32_matmul_precision() == "highest"
    for name, expected in results[0].items():
        assert torch.dist(results[1][name].cpu(), expected) < 0.02 * expected.norm(), name


def test_compiled_newton_schulz_is_the_same(tg, make_trainer):
    matrices = torch.randn(2, 8, 24)
    ours = make_trainer("aot_eager").muon._orthogonalise(matrices, tg.POLAR_EXPRESS, 5)
    torch.testing.assert_close(ours, tg.newton_schulz(matrices))


# -- test-time training

SMALL_TTT = TINY | {"num_layers": 1, "num_loops": 0, "loop_end": 0, "xsa_last_n": 1, "ttt_batch_size": 6}
SMALL_TTT |= {"ttt_q_lora": False, "ttt_v_lora": False, "ttt_o_lora": False}


def compiled_model(tg, cfg, kernels: str = ""):
    """The random model as `Backends` make it, compiled."""
    backends, plain = tg.Backends(kernels=kernels, compiler="aot_eager"), random_model(tg, cfg)
    model = tg.GPT(cfg, backends)
    model.load_state_dict(plain.state_dict())
    return backends.move_and_compile(model, tg.CPU.device)


@pytest.mark.parametrize("fused, tilt", [(False, ""), (False, "1:1.5"), (True, "")])
def test_compiled_adaptation_is_the_same_and_never_recompiles(tg, fused, tilt):
    """Three graphs for any number of rows and tokens; warming them up leaves the weights as they were."""
    if fused:
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("Triton's interpreter runs the kernels on a CPU's tensors, a GPU does not")
    cfg = tg.Config(**SMALL_TTT, ngram_tilt=tilt)
    val = validation(tg, documents_stream())
    expected = run_through(tg.ScoreFirstTTT, random_model(tg, cfg), val, cfg, looping=False)
    model = compiled_model(tg, cfg, ",".join(tg.KERNELS) if fused else "")
    before = copy.deepcopy(model.state_dict())
    assert tg.warm_up_ttt(model, cfg, [cfg.ttt_chunk_size], False, tg.CPU) == 3
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    graphs = tg.compiled_graphs()
    with torch.compiler.set_stance("fail_on_recompile"):
        actual = run_through(tg.ScoreFirstTTT, model, val, cfg, looping=False)
    assert tg.compiled_graphs() == graphs
    assert (actual.tokens, actual.bytes) == (expected.tokens, expected.bytes)
    assert actual.loss_sum == pytest.approx(expected.loss_sum, rel=1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adaptation_computes_no_gradients_of_base_weights(tg, monkeypatch):
    """A compiled backward pass computes all that may be wanted: of the weights nothing is, but by phases."""
    cfg = tg.Config(**SMALL_TTT)
    model, seen = random_model(tg, cfg), []
    whole = tg.GPT.losses

    def watch(self, *inputs, **options):
        if options.get("lora") is not None:
            seen.append({p.requires_grad for p in self.parameters()})
        return whole(self, *inputs, **options)

    monkeypatch.setattr(tg.GPT, "losses", watch)
    run_through(tg.ScoreFirstTTT, model, validation(tg, documents_stream()), cfg, looping=False)
    assert len(seen) > 5
    assert all(wanted == {False} for wanted in seen)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.fixture
def make_run(tg, tmp_path, monkeypatch):
    """Function: settings -> a run with a tiny compiled model and no data; its log's graphs and notices."""

    def make(watch=None, **settings: object):
        monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: None)
        cfg = tg.Config(**SMALL_TTT | settings)
        run, said = object.__new__(tg.Run), []
        run.cfg, run.ranks, run.stages, run.result = cfg, tg.CPU, {}, {"looping": False}
        run.val, run.clock = validation(tg, documents_stream()), tg.Stopwatch(tg.CPU)
        run.watch, run.model = watch or tg.Watch(), compiled_model(tg, cfg)
        run.log = types.SimpleNamespace(
            event=lambda stage, **values: said.append(values) if stage in ("graphs", "notice") else None
        )
        return run, said

    return make


@pytest.fixture
def eager_shapes(tg, monkeypatch):
    """The shapes [rows, tokens] of all calls of `losses` that no graph does."""
    shapes, losses = [], tg.GPT.losses

    def noted(self, x, *rest, **options):
        if not torch.compiler.is_compiling():  # a graph leaves this out
            shapes.append(tuple(x.shape))
        return losses(self, x, *rest, **options)

    monkeypatch.setattr(tg.GPT, "losses", noted)
    return shapes


def test_phases_without_boundaries_are_compiled(tg, eager_shapes):
    """Two graphs of chunks, one of rows; the phases of another stream then run in it, and learn the same."""
    cfg = tg.Config(**SMALL_TTT | {"global_ttt_respect_doc_boundaries": False, "global_ttt_batch_seqs": 2})
    val, plain = validation(tg, documents_stream()), random_model(tg, cfg)
    expected = run_through(tg.ScoreFirstTTT, plain, val, cfg, looping=False)
    model = compiled_model(tg, cfg)
    torch.compiler.reset()
    assert tg.warm_up_ttt(model, cfg, [cfg.ttt_chunk_size], False, tg.CPU) == 3
    eager_shapes.clear()
    steps, train = [], tg.BaseTraining.train

    def spy(*arguments, **options):
        before = len(eager_shapes)
        steps.append(len(norms := train(*arguments, **options)))
        assert len(eager_shapes) == before, "a phase has run without its graph"
        return norms

    with torch.compiler.set_stance("fail_on_recompile"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tg.BaseTraining, "train", spy)
        actual = run_through(tg.ScoreFirstTTT, model, val, cfg, looping=False)
    assert sum(steps) > 1
    assert actual.loss_sum == pytest.approx(expected.loss_sum, rel=1e-5)
    torch.testing.assert_close(model.qo_bank, plain.qo_bank, rtol=1e-4, atol=1e-6)


STREAM = {"eval_stride": 8, "val_batch_tokens": 1024, "ttt_chunk_tokens": 96, "ttt_epochs": 2, "ttt_lr": 0.05}


@pytest.mark.parametrize(("stage", "graphs"), [("sliding", 1), ("ttt", 2)])
def test_windows_on_the_stream_are_compiled(tg, make_run, eager_shapes, stage, graphs):
    """All but windows of other forms: the stream's first, which scores all, and its last, with what is left.

    The graphs are made on random tokens before the stage, which makes none; batches that lack rows fit too.
    """
    run, said = make_run(**SMALL_TTT | STREAM)
    kind = tg.ScoreFirstSGD if stage == "ttt" else tg.SlidingEvaluation
    plain = random_model(tg, run.cfg)
    expected = run_through(kind, plain, run.val, run.cfg, looping=False)
    torch.compiler.reset()
    score = run.score

    def watched(*arguments):
        eager_shapes.clear()
        torch._dynamo.config.patch(error_on_recompile=True)(score)(*arguments)

    run.score = watched
    tg.score_stream(run, stage)
    assert [values.get(f"{stage}_warm_up") for values in said if "val_loss" not in values] == [graphs]
    assert eager_shapes == [(1, 32), (1, 32)]
    assert run.stages[stage]["val_loss"] == pytest.approx(expected.val_loss, rel=1e-5)
    torch.testing.assert_close(run.model.qo_bank, plain.qo_bank, rtol=1e-4, atol=1e-6)


def test_a_stage_behind_another_is_compiled_too(tg, make_run, monkeypatch):
    """What the first one leaves, "no more graphs", holds for itself alone."""
    stance = torch.compiler.set_stance
    run, said = make_run(**SMALL_TTT | STREAM)
    monkeypatch.setattr(torch.compiler, "set_stance", stance)
    with stance("default"):
        for stage in ("sliding", "ttt"):
            tg.score_stream(run, stage)
    graphs = {name: n for values in said for name, n in values.items() if name.endswith("_warm_up")}
    assert graphs == {"sliding_warm_up": 1, "ttt_warm_up": 2}


def test_shapes_that_no_graph_fits_are_counted(tg, monkeypatch, make_run):
    """Chunks of two sizes, of which the warm-up sees one: the other's shapes are all that run eagerly."""
    seen = {4: set(), 8: set()}
    warm_up_ttt, compiled_losses, stance = tg.warm_up_ttt, tg.compiled_losses, torch.compiler.set_stance
    guard = object.__new__(tg.Guard)
    watch = types.SimpleNamespace(
        saved=lambda stage: None,
        unit=lambda *_: None,
        see=lambda kind, **facts: {"adapting": guard._adapting, "adapted": guard._adapted}.get(
            kind, lambda run: None
        )(facts.get("run")),
    )
    run, said = make_run(watch, ttt_chunk_by_length="12:4")
    monkeypatch.setattr(torch.compiler, "set_stance", stance)

    def noted(model, x, y, scored, lora, looping):
        seen[scored.size(1)].add((len(lora.lm_head_lora.factors[0]), x.size(1)))
        return compiled_losses(model, x, y, scored, lora, looping)

    def warm_up(model, cfg, sizes, *rest):
        assert sizes == {4, 8}
        graphs = warm_up_ttt(model, cfg, [8], *rest)
        monkeypatch.setattr(tg, "compiled_losses", noted)
        return graphs

    monkeypatch.setattr(tg, "warm_up_ttt", warm_up)
    with torch.compiler.set_stance("default"):
        run.adapt_documents()
    assert [values.get("ttt_warm_up", values.get("eager_shapes")) for values in said] == [3, len(seen[4])]
    assert len(seen[4]) > 1 and len(seen[8]) > 1
    expected = run_through(tg.ScoreFirstTTT, random_model(tg, run.cfg), run.val, run.cfg, looping=False)
    assert run.stages["ttt"]["val_loss"] == pytest.approx(expected.val_loss, rel=1e-5)


def test_adaptation_that_cannot_be_compiled_runs_without(tg, monkeypatch, make_run):
    """The reason is in the log, nothing else changes."""

    def refuse(*_: object) -> int:
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(tg, "warm_up_ttt", refuse)
    run, said = make_run()
    tg.compile_adaptation(run, [(0, 9)])
    assert run.model.backends.compiler == ""
    assert said == [{"text": "stage ttt is not compiled (RuntimeError: no compiler here)"}]


def test_prefetched_batches_and_positions_are_those_of_the_loader(tg, shard):
    """Also after going back, which throws away what lies ready."""
    plain, ahead = (packed_loader(tg, [shard], 1, 0, 64, 16) for _ in range(2))
    ahead = tg.Prefetched(ahead)
    remembered = None
    for turn in range(120):  # more than the shard holds
        assert ahead.state() == plain.state()
        if turn == 7:
            remembered = plain.state()
        if turn == 20:
            plain.load_state(remembered)
            ahead.load_state(remembered)
        for ours, theirs in zip(ahead.next()[:2], plain.next()[:2], strict=True):
            assert torch.equal(ours, theirs)


def test_error_of_a_prefetched_batch_reaches_the_trainer(tg, shard):
    loader = packed_loader(tg, [shard], 1, 0, 64, 16)
    loader.cfg = dataclasses.replace(loader.cfg, vocab_size=2)
    ahead = tg.Prefetched(loader)
    with pytest.raises(tg.DataError, match="must be below VOCAB_SIZE=2"):
        ahead.next()


class Small(torch.nn.Module):
    """A model that runs out of memory on rows longer than `limit`."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit, self.weight, self.seen = limit, torch.nn.Parameter(torch.ones(3)), []

    def forward(self, x, y, segments, *, looping):
        self.seen.append((x.size(1), looping))
        if x.size(1) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.weight.sum() * x


@pytest.mark.parametrize(("limit", "steps"), [(10**9, 8), (300, 8), (255, 16), (100, 32)])
def test_micro_batches_shrink_until_they_fit(tg, monkeypatch, limit, steps):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    cfg = dataclasses.replace(tg.Config(**SIZES), train_batch_tokens=2048, grad_accum_steps=8)
    model = Small(limit)
    model.backends = tg.Backends("flex", "mlp")
    assert tg.fit_memory(cfg, model, tg.CPU) == tg.Backends("flex", "mlp", micro_batches=steps)
    assert model.seen[-2:] == [(2048 // steps, True), (2048 // steps, False)]
    assert model.weight.grad is None


def test_memory_for_no_micro_batch_is_an_error(tg, monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    cfg, model = tg.Config(**SIZES), Small(1)
    model.backends = tg.plain_backends(cfg, tg.CPU)
    with pytest.raises(tg.ConfigError, match="TRAIN_BATCH_TOKENS=128: must be 16 equal micro-batches"):
        tg.fit_memory(cfg, model, tg.CPU)
