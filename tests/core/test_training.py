"""Training: steps against hand-written oracles, a warm-up without trace, the clock, the stop rules."""

import dataclasses
import hashlib
import itertools
import json
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from house import packed_loader

SIZES = {
    "vocab_size": 64,
    "train_seq_len": 16,
    "train_batch_tokens": 128,
    "grad_accum_steps": 2,
    "num_layers": 4,
    "model_dim": 32,
    "num_heads": 2,
    "num_kv_heads": 1,
    "mlp_mult": 2.0,
    "rope_dims": 8,
    "num_loops": 1,
    "loop_start": 1,
    "loop_end": 2,
    "parallel_start_layer": 3,
    "max_wallclock_seconds": 0.0,
    "warmup_steps": 0,
    "muon_momentum_warmup_steps": 0,
    "ema_decay": 0.9,
    "train_log_every": 1,
    "eval_seq_len": 16,
    "ttt_eval_seq_len": 16,
    "ttt_chunk_size": 8,
}


def write_shard(path, tokens: np.ndarray) -> None:
    """One shard: 256 little-endian int32 of header, then uint16 tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


@pytest.fixture
def shard(tmp_path):
    """One shard of 2,000 tokens: documents of 23 tokens, each a BOS and one phrase again and again."""
    rng = np.random.default_rng(0)
    phrases = rng.integers(2, 64, size=(5, 22))
    documents = [np.append([1], phrases[i % 5]) for i in range(87)]
    path = tmp_path / "fineweb_train_000000.bin"
    write_shard(path, np.concatenate(documents)[:2000])
    return path


@pytest.fixture
def make_trainer(tg, shard):
    """Function: settings -> a trainer of a freshly initialised model on the shard."""

    def make(**settings: object):
        cfg = tg.Config(**{**SIZES, **settings})
        torch.manual_seed(cfg.seed)
        backends = tg.plain_backends(cfg, tg.CPU)
        _, tokens = tg.micro_batches(cfg, backends, 1)
        loader = packed_loader(tg, [shard], 1, 0, tokens, cfg.train_seq_len)
        return tg.Trainer(cfg, tg.GPT(cfg, backends), loader)

    return make


@pytest.fixture
def run_log(tg, tmp_path):
    """Function: settings -> (a run log in a folder of its own, function that reads its events)."""
    logs = []

    def make(cfg):
        files = tg.LogFiles(tg.CPU)
        named = dataclasses.replace(cfg, artifact_dir=str(tmp_path / "run"), run_id="test")
        log = tg.RunLog(named, tg.CPU, files)
        logs.append(files)

        def events(stage: str) -> list[dict]:
            lines = (log.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            return [event for event in map(json.loads, lines) if event["stage"] == stage]

        return log, events

    yield make
    for log in logs:
        log.close()


@pytest.fixture
def stopwatch(tg, monkeypatch):
    """Function: (trainer, seconds) -> the real stopwatch, by a clock that only the trainer's steps move."""

    def make(trainer, seconds_per_step: float):
        clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
        monkeypatch.setattr(tg, "time", clock)
        original = trainer.step

        def step(*args, **options):
            clock.now += seconds_per_step
            return original(*args, **options)

        monkeypatch.setattr(trainer, "step", step)
        return tg.Stopwatch(tg.CPU)

    return make


def leaves(tree: object, path: str = ""):
    """(path, leaf) of every value in nested dictionaries, lists and tuples."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{path}/{key}")
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from leaves(value, f"{path}/{index}")
    else:
        yield path, tree


def fingerprint(trainer) -> dict[str, str]:
    """A line for every value that training reads or changes: hash, type and shape of tensors."""
    state = {
        "model": dict(trainer.model.state_dict()),
        "muon": trainer.muon.state_dict(),
        "adamw": trainer.adamw.state_dict(),
        "ema": trainer.ema.averages,
        "loader": trainer.loader.state(),
        "looping": trainer.looping,
        "torch_rng": torch.get_rng_state(),
        "numpy_rng": np.random.get_state(),
        "gradients": {name: p.grad is None for name, p in trainer.model.named_parameters()},
    }
    lines = {}
    for path, leaf in leaves(state):
        if isinstance(leaf, torch.Tensor):
            raw = leaf.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            lines[path] = f"{leaf.dtype} {tuple(leaf.shape)} {hashlib.sha256(raw).hexdigest()}"
        else:
            lines[path] = repr(leaf)
    return lines


def parameters(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def train_all(trainer, log, clock, validate=lambda step: None) -> int:
    """All units of a training on its clock, as `Run.stage` lets it work; the number of steps."""
    trainer.run = SimpleNamespace(log=log, clock=clock, validate=lambda step, looping: validate(step))
    with clock.stage("train"):
        for _ in trainer.units():
            pass
    return trainer.steps


def train_some(trainer, steps: int, frac: float = 0.0) -> list[float]:
    return [float(trainer.step(step, frac).train_loss) for step in range(steps)]


# -- the warm-up


@pytest.mark.parametrize("num_loops", [0, 1])
def test_warm_up_leaves_no_trace(make_trainer, num_loops):
    trainer = make_trainer(num_loops=num_loops)
    before = fingerprint(trainer)
    trainer.warm_up(2)
    assert fingerprint(trainer) == before


def test_warm_up_in_the_middle_leaves_no_trace(make_trainer):
    """Here both optimisers hold state, the momentum buffers of Muon among it, and the loader has moved."""
    trainer = make_trainer()
    train_some(trainer, 3)
    before = fingerprint(trainer)
    assert sum("momentum_buffer" in path for path in before) == 4
    assert sum("exp_avg_sq" in path for path in before) > 10
    trainer.warm_up(1)
    after = fingerprint(trainer)
    assert {path: (before.get(path), after[path]) for path in after if after[path] != before.get(path)} == {}
    assert after == before


def test_warm_up_changes_state_before_it_restores_it(make_trainer, monkeypatch):
    """The oracle of the tests above: without the restoration nearly everything differs."""
    trainer = make_trainer()
    train_some(trainer, 1)
    before = fingerprint(trainer)
    monkeypatch.setattr(trainer, "restore", lambda snapshot: None)
    trainer.warm_up(1)
    after = fingerprint(trainer)
    changed = {path.split("/")[1] for path in after if after[path] != before[path]}
    assert changed == {"model", "muon", "adamw", "ema", "looping"}


@pytest.mark.parametrize("steps", [0, 3])
def test_training_after_a_warm_up_is_the_same(make_trainer, steps):
    """Whatever was trained before it, the warm-up changes no later loss and no later weight."""
    plain, warmed = make_trainer(), make_trainer()
    train_some(plain, steps)
    train_some(warmed, steps)
    warmed.warm_up(2)
    assert train_some(warmed, 4) == train_some(plain, 4)
    for name, weight in parameters(plain).items():
        assert torch.equal(weight, parameters(warmed)[name]), name


def test_restored_snapshot_trains_on_as_before(make_trainer):
    """Everything is in the snapshot, the place in the data too; and it is a copy, not a view."""
    trainer = make_trainer()
    train_some(trainer, 2)
    snapshot, before = trainer.snapshot(), fingerprint(trainer)
    losses = train_some(trainer, 3, frac=0.4)
    for _ in range(2):
        trainer.restore(snapshot)
        assert fingerprint(trainer) == before
        assert train_some(trainer, 3, frac=0.4) == losses


def test_warm_up_runs_both_layer_orders(make_trainer, monkeypatch):
    trainer, orders = make_trainer(), []
    losses = trainer.model.losses
    monkeypatch.setattr(
        trainer.model, "losses", lambda *a, looping: orders.append(looping) or losses(*a, looping=looping)
    )
    trainer.warm_up(1)
    assert orders == [False, False, True, True]  # two micro-batches each


# -- one step


def test_loss_falls_on_repeated_data(make_trainer):
    trainer = make_trainer()
    losses = train_some(trainer, 40)
    assert losses[0] == pytest.approx(math.log(64), rel=0.02)
    assert np.mean(losses[-3:]) < 0.5 * losses[0]


def test_loss_falls_with_looping(make_trainer):
    losses = train_some(make_trainer(), 40, frac=0.4)  # looping is on, the learning rate still whole
    assert np.mean(losses[-3:]) < 0.7 * losses[0]


def test_gradients_do_not_depend_on_the_micro_batches(tg, make_trainer):
    """One batch of four documents equals four of one: the mean of means of equal sizes is the mean."""
    rng = np.random.default_rng(1)
    rows = [torch.from_numpy(np.append(rng.integers(2, 64, 32), 1)) for _ in range(4)]
    for row in rows:
        row[0] = 1  # every row a document, and its last target the next one's BOS
    whole = torch.cat([row[:-1] for row in rows] + [torch.tensor([1])])
    gradients = {}
    for accumulation, batch in ((1, [whole]), (4, rows)):
        trainer = make_trainer(grad_accum_steps=accumulation, clip_global=True)  # else each one is clipped
        loss, _ = trainer._accumulate_gradients([tg.packed_row(row, 16) for row in batch])
        gradients[accumulation] = {name: p.grad for name, p in trainer.model.named_parameters()}
        gradients[accumulation]["loss"] = loss
    assert gradients[1].keys() == gradients[4].keys()
    for name, gradient in gradients[1].items():
        if gradient is None:
            assert gradients[4][name] is None, name
        else:
            torch.testing.assert_close(gradients[4][name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_every_parameter_takes_part(make_trainer):
    """Two steps without weight decay: the second reaches what stands behind matrices that begin at zero."""
    trainer = make_trainer(muon_wd=0.0, embed_wd=0.0, adam_wd=0.0)
    before = parameters(trainer)
    train_some(trainer, 2, frac=0.4)
    after = parameters(trainer)
    assert {name for name in before if torch.equal(before[name], after[name])} == set()
    for name in ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank", "skip_weights", "skip_gates"):
        assert (before[name] != after[name]).flatten(1).any(1).all(), name
    for name in ("parallel_resid_lambdas", "parallel_post_lambdas"):
        moved = (before[name] != after[name]).flatten(1).any(1).tolist()
        assert moved == [False, False, False, True], f"{name}: only parallel layers use theirs"


def test_average_by_hand(make_trainer):
    """decay^k of the first weights, and (1 - decay) decay^(k-i) of those after step i."""
    trainer, decay, steps = make_trainer(ema_decay=0.9), 0.9, 4
    states = [{name: value.clone() for name, value in trainer.model.state_dict().items()}]
    for step in range(steps):
        trainer.step(step, 0.0)
        states.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
    for name, average in trainer.ema.averages.items():
        expected = decay**steps * states[0][name].double()
        for i in range(1, steps + 1):
            expected += (1 - decay) * decay ** (steps - i) * states[i][name].double()
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-7, msg=name)


def test_gradients_are_clipped_to_the_norm(make_trainer):
    """AdamW does not see the size of a gradient but Muon's momentum buffer does."""
    buffers = {}
    for clip in (0.0, 1e-3):
        trainer = make_trainer(grad_clip_norm=clip, muon_momentum=0.0, clip_global=True)
        report = trainer.step(0, 0.0)
        state = trainer.muon.state_dict()["state"].values()
        buffers[clip] = torch.cat([entry["momentum_buffer"].float().flatten() for entry in state])
        assert float(report.grad_norm) > 0.1, "the norm that is reported is the one before clipping"
    ratio = float(buffers[0.0].norm() / buffers[1e-3].norm())
    assert ratio == pytest.approx(float(report.grad_norm) / 1e-3, rel=0.01)


def test_each_micro_batch_is_clipped_by_itself(tg, make_trainer):
    """What eight published ranks do: the mean of the clipped gradients, whatever the number of ranks."""
    rng = np.random.default_rng(2)
    rows = [torch.from_numpy(rng.integers(1, high, 65)) for high in (3, 64)]  # gradients of unlike norms
    batches = [tg.packed_row(row, 16) for row in rows]
    singles, norms = [], []
    for batch in batches:
        trainer = make_trainer(grad_accum_steps=1, clip_global=True)
        trainer._accumulate_gradients([batch])
        gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values())))
        singles.append(gradients)
    limit = 0.5 * sum(norms)  # between the two norms: one is clipped, the other is not
    assert min(norms) < limit < max(norms)
    trainer = make_trainer(grad_accum_steps=2, grad_clip_norm=limit)
    _, norm = trainer._accumulate_gradients(batches)
    assert float(norm) == pytest.approx(sum(norms) / 2, rel=1e-5)
    factors = [min(1.0, limit / n) for n in norms]
    for name, p in trainer.model.named_parameters():
        if p.grad is not None:
            expected = sum(f * single[name] for f, single in zip(factors, singles, strict=True)) / 2
            torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("clip_global", [False, True])
@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_gradient_that_is_not_finite_is_not_used(tg, make_trainer, monkeypatch, clip_global, fault):
    """The step does what it does with a gradient of zeros, and reading its report raises."""
    trainers = {}
    for factor in (fault, 0.0):
        trainer = trainers[factor] = make_trainer(clip_global=clip_global)
        train_some(trainer, 2)
        losses = trainer.model.losses
        monkeypatch.setattr(trainer.model, "losses", lambda *a, f=factor, g=losses, **o: g(*a, **o) * f)
        report = trainer.step(2, 0.0)
        if factor:
            with pytest.raises(tg.RunError, match=r"step 3\b.*not finite"):
                report.elapsed()
    spoilt, zeros = (fingerprint(trainers[factor]) for factor in (fault, 0.0))
    assert spoilt == zeros


@pytest.mark.parametrize("clip_global", [False, True])
def test_gradient_alone_that_is_not_finite_is_this_ranks(tg, make_trainer, monkeypatch, clip_global):
    """The loss is finite; the message does not look for the fault on another rank."""
    trainer = make_trainer(clip_global=clip_global)
    losses, parameter = trainer.model.losses, trainer.model.smear_lambda
    monkeypatch.setattr(
        trainer.model, "losses", lambda *a, **o: losses(*a, **o) + (0 * parameter.sum()).sqrt()
    )
    report = trainer.step(0, 0.0)
    assert math.isfinite(report.train_loss)
    with pytest.raises(tg.RunError, match="grad_norm nan: not finite .this rank's"):
        report.elapsed()


# -- the loop


def test_looping_turns_on_at_its_fraction(tg, make_trainer, run_log, stopwatch):
    trainer = make_trainer(iterations=10, enable_looping_at=0.35)
    log, events = run_log(trainer.cfg)
    assert train_all(trainer, log, stopwatch(trainer, 1.0)) == 10
    (event,) = events("looping")
    assert event["step"] == 5  # the fifth step starts at 4/10, the fourth at 3/10
    assert event["encoder"] + event["decoder"] == [0, 1, 2, 1, 2, 3]
    assert trainer.looping


def test_looping_follows_the_clock_under_a_cap(tg, make_trainer, run_log, stopwatch):
    trainer = make_trainer(
        iterations=1000, enable_looping_at=0.5, max_wallclock_seconds=10.5, gptq_reserve_seconds=0.5
    )
    log, events = run_log(trainer.cfg)
    train_all(trainer, log, stopwatch(trainer, 1.0))
    # five seconds of ten have passed when step 6 starts (the agreed clock, two steps behind, is extrapolated)
    assert events("looping")[0]["step"] == 6


@pytest.mark.parametrize("num_loops, enable_at", [(0, 0.0), (1, 1.5)])
def test_looping_may_stay_off(tg, make_trainer, run_log, stopwatch, num_loops, enable_at):
    trainer = make_trainer(iterations=3, num_loops=num_loops, enable_looping_at=enable_at)
    log, events = run_log(trainer.cfg)
    train_all(trainer, log, stopwatch(trainer, 1.0))
    assert not trainer.looping and events("looping") == []


def test_schedules_follow_the_step_number_without_a_cap(tg, make_trainer, run_log, stopwatch):
    trainer = make_trainer(iterations=8, warmdown_frac=0.5, min_lr=0.1, train_log_every=1)
    log, events = run_log(trainer.cfg)
    train_all(trainer, log, stopwatch(trainer, 2.0))
    assert [event["lr_multiplier"] for event in events("train")] == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert {event["tokens_per_second"] for event in events("train")} == {64}  # 128 in two seconds


@pytest.mark.parametrize("frac, kept", [(0.7, 1.0), (0.85, 0.75), (1.0, 0.5)])
def test_decay_of_the_banks_tapers_late(make_trainer, frac, kept):
    """Full to 70 % of training, then on a line to a half (PR #1729): what a step takes from a bank."""
    moved = []
    for taper in ({}, {"wd_taper_start_frac": 0.7, "wd_taper_final_mult": 0.5}):
        trainer = make_trainer(muon_wd=0.5, min_lr=1.0, **taper)
        before = trainer.model.qo_bank.detach().clone()
        trainer.step(0, frac)
        moved.append(trainer.model.qo_bank.detach() - before)
    spared = trainer.cfg.matrix_lr * 0.5 * (1 - kept) * before
    torch.testing.assert_close(moved[1] - moved[0], spared, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seconds_per_step, steps", [(1.0, 10), (3.0, 4), (4.0, 3)])
def test_cap_stops_within_one_step(tg, make_trainer, run_log, stopwatch, seconds_per_step, steps):
    """Ten seconds are left for training: the step that crosses them is the last."""
    trainer = make_trainer(iterations=1000, max_wallclock_seconds=10.5, gptq_reserve_seconds=0.5)
    log, _ = run_log(trainer.cfg)
    clock = stopwatch(trainer, seconds_per_step)
    assert train_all(trainer, log, clock) == steps
    assert 10 <= clock.seconds["train"] < 10 + seconds_per_step


@pytest.mark.parametrize("seconds, rates", [(100.0, [1]), (5.5, [1, 0.6]), (3.5, [1, 0.86, 0.4])])
def test_the_first_steps_go_by_the_clock_too(tg, make_trainer, run_log, stopwatch, seconds, rates):
    """Ten seconds: one step that takes longer is the only one; rates and loops follow from the second on."""
    settings = {"max_wallclock_seconds": 10.5, "gptq_reserve_seconds": 0.5, "enable_looping_at": 0.35}
    trainer = make_trainer(iterations=1000, warmdown_frac=0.75, train_log_every=1, **settings)
    log, events = run_log(trainer.cfg)
    assert train_all(trainer, log, stopwatch(trainer, seconds)) == len(rates)
    assert [event["lr_multiplier"] for event in events("train")] == pytest.approx(rates, abs=0.01)
    assert trainer.looping == (len(rates) > 1)


@pytest.mark.parametrize("first", [1.0, 20.0])
def test_a_slow_first_step_is_no_measure_of_the_others(make_trainer, first):
    """It may compile: the clock, two steps late, is carried on by what the steps behind it took."""
    trainer = make_trainer(iterations=1000, max_wallclock_seconds=60.0, gptq_reserve_seconds=0.0)
    trainer.first = first
    for step in range(4, 30):
        trainer.steps, trainer.seconds = step, first + (step - 3)  # seconds of the steps that are told
        assert trainer._fraction() == pytest.approx((first + step - 1) / 60.0)


def test_a_lines_clock_is_read_when_its_step_has_ended(tg, make_trainer, run_log, stopwatch, monkeypatch):
    """Reading the step's loss waits for the device; what is read before would say nothing of the step."""
    trainer = make_trainer(iterations=2)
    log, events = run_log(trainer.cfg)
    order, clock, elapsed = [], stopwatch(trainer, 1.0), tg.StepReport.elapsed
    monkeypatch.setattr(tg.StepReport, "elapsed", lambda report: order.append("ended") or elapsed(report))
    monkeypatch.setattr(clock, "elapsed", lambda name: order.append("read") or 1.0)
    train_all(trainer, log, clock)
    assert order[:3] == ["read", "ended", "read"], "the first goes with the gradients"


def test_training_resumed_at_its_end_ends(tg, make_trainer, run_log):
    """A run told to stop in the last two steps: by its agreed clock there is no step left to make."""
    trainer = make_trainer(max_wallclock_seconds=5.0, gptq_reserve_seconds=0.0)
    trainer.steps, trainer.seconds, trainer.reports = 4, 3.0, [trainer.step(3, 0.0)]
    log, events = run_log(trainer.cfg)
    assert train_all(trainer, log, tg.Stopwatch(tg.CPU)) == 4
    assert not events("train")
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, trainer.ema.averages[name])


def test_validation_and_warm_up_are_off_the_clock(tg, make_trainer, run_log, stopwatch):
    trainer = make_trainer(
        iterations=1000,
        max_wallclock_seconds=10.0,
        gptq_reserve_seconds=0.0,
        val_loss_every=2,
        warmup_steps=1,
    )
    log, _ = run_log(trainer.cfg)
    clock, validated = stopwatch(trainer, 1.0), []

    def validate(step: int) -> None:
        validated.append(step)
        with clock.stage("validation"):
            tg.time.now += 1e6

    assert train_all(trainer, log, clock, validate) == 10
    assert validated == [0, 2, 4, 6, 8]
    assert clock.seconds == {"train": 10, "validation": 5e6}


def test_real_clock_and_real_cap(tg, make_trainer, run_log):
    """Half a second, or twenty steps where this machine is slow now; over it by steps, whatever they take."""
    first, times = make_trainer(iterations=100), []
    for number in range(3):  # the first one imports libraries
        first.step(number, 0.0)
        times.append(time.perf_counter())
    cap = max(0.5, 20 * (times[-1] - times[-2]))
    trainer = make_trainer(iterations=100_000, max_wallclock_seconds=cap + 0.25, gptq_reserve_seconds=0.25)
    log, _ = run_log(trainer.cfg)
    watch, step, times = tg.Stopwatch(tg.CPU), trainer.step, []

    def timed(*arguments: object, **options: object) -> object:
        times.append(time.perf_counter())
        return step(*arguments, **options)

    trainer.step = timed
    steps = train_all(trainer, log, watch)
    longest = max(later - earlier for earlier, later in itertools.pairwise([*times, time.perf_counter()]))
    assert 1 < steps < 100_000
    known = (steps - 2) / steps  # the last two steps are taken to be as long as those before them
    assert cap * known <= watch.seconds["train"] < cap + 3 * longest


def test_cap_without_room_for_a_step_is_refused(tg):
    """A reserve that eats the whole cap would train nothing."""
    with pytest.raises(tg.ConfigError, match="GPTQ_RESERVE_SECONDS"):
        tg.check_settings(tg.Config(**{**SIZES, "max_wallclock_seconds": 5.0, "gptq_reserve_seconds": 8.0}))


def test_zero_reserve_and_zero_cap_train_all_steps(tg, make_trainer, run_log, stopwatch):
    trainer = make_trainer(iterations=3, max_wallclock_seconds=0.0, gptq_reserve_seconds=8.0)
    log, _ = run_log(trainer.cfg)
    assert train_all(trainer, log, stopwatch(trainer, 1e9)) == 3


def test_model_holds_the_averages_afterwards(tg, make_trainer, run_log, stopwatch):
    trainer = make_trainer(iterations=3)
    log, _ = run_log(trainer.cfg)
    train_all(trainer, log, stopwatch(trainer, 1.0))
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, trainer.ema.averages[name]), name


@pytest.mark.parametrize("step", [1, 3])
def test_loss_that_is_not_finite_stops_the_run(tg, make_trainer, run_log, stopwatch, step, monkeypatch):
    trainer = make_trainer(iterations=10)
    log, _ = run_log(trainer.cfg)
    original = trainer.step

    def poisoned(number: int, frac: float, **options):
        if number == step - 1:
            with torch.no_grad():
                trainer.model.tok_emb.weight[5:9] = math.nan
        return original(number, frac, **options)

    monkeypatch.setattr(trainer, "step", poisoned)
    with pytest.raises(tg.RunError, match=rf"step {step}\b.*not finite"):
        train_all(trainer, log, stopwatch(trainer, 1.0))


@pytest.mark.parametrize("log_every", [4, 500])
def test_loss_that_is_not_finite_never_reaches_the_averages(
    tg, make_trainer, run_log, stopwatch, log_every, monkeypatch
):
    """Between two log lines, too, and in the last step: such weights must not be saved as a result."""
    trainer = make_trainer(iterations=10, train_log_every=log_every)
    log, _ = run_log(trainer.cfg)
    original = trainer.step

    def poisoned(number: int, frac: float, **options):
        if number == 8:
            with torch.no_grad():
                trainer.model.tok_emb.weight[5:9] = math.nan
        return original(number, frac, **options)

    monkeypatch.setattr(trainer, "step", poisoned)
    with pytest.raises(tg.RunError, match="not finite"):
        train_all(trainer, log, stopwatch(trainer, 1.0))
