"""Score-first test-time training: the conditions of legality, watched through the evaluator's events."""

import copy
from types import SimpleNamespace

import pytest
import torch
from golden_tools import run_through
from oracle_ttt import plain_ttt, score_batch

from bench import guard

TINY = {
    "vocab_size": 64,
    "num_layers": 2,
    "model_dim": 16,
    "num_heads": 2,
    "num_kv_heads": 1,
    "mlp_mult": 2.0,
    "rope_dims": 4,
    "num_loops": 1,
    "loop_start": 0,
    "loop_end": 1,
    "parallel_start_layer": 0,
    "xsa_last_n": 2,
    "train_seq_len": 32,
    "eval_seq_len": 32,
    "ttt_eval_seq_len": 32,
    "ttt_chunk_size": 8,
    "ttt_batch_size": 4,
    "ttt_lora_rank": 2,
    "ttt_lora_lr": 0.01,
    "phased_ttt_prefix_docs": 6,
    "phased_ttt_num_phases": 2,
    "global_ttt_chunk_tokens": 64,
    "global_ttt_batch_seqs": 1,
    "global_ttt_lr": 0.05,
}
LENGTHS = [23, 5, 40, 9, 61, 2, 17, 33, 8, 50, 1, 12]
BOS_PLACES = [sum(LENGTHS[:i]) for i in range(1, len(LENGTHS))]
SETTINGS = {
    "phased": {},
    "no_phase": {"phased_ttt_prefix_docs": 0},
    "two_steps": {"ttt_grad_steps": 2},
    "rows_not_documents": {"global_ttt_respect_doc_boundaries": False},
    "cached": {"ttt_cache_window": 12},
    "by_length": {"ttt_chunk_by_length": "20:2,40:4"},
    "some_adapters": {"ttt_q_lora": False, "ttt_v_lora": False},
    "tilted": {"ngram_tilt": "1:1.5"},
}


def documents_stream(seed: int = 0) -> torch.Tensor:
    """Documents of LENGTHS tokens, each starting with BOS."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for length in LENGTHS:
        parts.append(torch.tensor([1]))
        parts.append(torch.randint(2, 64, (length - 1,), generator=generator))
    return torch.cat(parts)


def random_model(tg, config, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = tg.GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def spans_of(kind: str, data: dict) -> list[tuple[int, tuple[int, int]]]:
    """(document number, (first target, targets)) of the documents that an event scores or trains on."""
    if kind not in ("scored", "trained"):
        return []
    part = data["part"]
    active = part.trains.tolist() if kind == "trained" else [True] * len(part.documents)
    rows = zip(part.documents, part.spans, active, strict=True)
    return [(number, span) for number, span, on in rows if on]


class Watch:
    """Per-target history built from the events; fails on the first illegal one."""

    def __init__(self, num_targets: int) -> None:
        self.scored = torch.zeros(num_targets, dtype=torch.int64)
        self.order: list[tuple] = []
        self.trained: set[int] = set()
        self.chunk_losses: list[list[float]] = []
        self.sgd_tokens: list[torch.Tensor] = []
        self.last_chunks: set[tuple[int, int]] = set()
        self.byte_sum, self.chunk_sizes = 0, {TINY["ttt_chunk_size"]}

    def see(self, kind: str, **data) -> None:
        documents = tuple(number for number, _ in spans_of(kind, data))
        self.order.append((kind, data.get("batch_number"), data.get("chunk"), documents))
        if kind == "scored":
            for _, (first, count) in spans_of(kind, data):
                self.scored[first : first + count] += 1
        elif kind == "trained":
            for _, (first, count) in spans_of(kind, data):
                assert count in self.chunk_sizes
                assert (self.scored[first : first + count] == 1).all(), "trained before it was scored"
                self.trained.update(range(first, first + count))
        elif kind == "batch_done":
            self.chunk_losses += [list(chunk) for chunk in data["chunks"]]
            self.byte_sum = data["byte_sum"]
        elif kind == "global_sgd":
            self.sgd_tokens.append(data["tokens"].clone())


def validation(tg, tokens: torch.Tensor):
    return tg.ValidationSet.from_sidecar(tokens, (tokens != 1).long() * (tokens % 5 + 1))


def run(tg, tokens: torch.Tensor, overrides: dict | None = None, seed: int = 7, model=None):
    """(watch, meter, model, validation set) of one evaluation with one byte per token, none for BOS."""
    config = tg.Config(**{**TINY, **(overrides or {})})
    model = model or random_model(tg, config)
    val = validation(tg, tokens)
    watch = Watch(len(tokens) - 1)
    watch.chunk_sizes = {tg.chunk_size(config, targets) for targets in LENGTHS}
    generator = torch.Generator().manual_seed(seed)
    meter = run_through(tg.ScoreFirstTTT, model, val, config, looping=True, generator=generator, watch=watch)
    return watch, meter, model, val


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_target_is_scored_exactly_once(tg, name):
    """C4, and the totals of the meter are those of the stream."""
    watch, meter, _, val = run(tg, documents_stream(), SETTINGS[name])
    assert (watch.scored == 1).all()
    assert meter.tokens == len(watch.scored) == sum(LENGTHS) - 1
    assert meter.bytes == watch.byte_sum == val.target_bytes.sum().item()


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_training_uses_scored_targets_only(tg, name):
    """C3 within documents: `Watch` fails inside the run; here, that something was trained at all."""
    watch, _, _, _ = run(tg, documents_stream(), SETTINGS[name])
    assert len(watch.trained) > 100


def test_global_phase_uses_scored_documents_only(tg):
    """C3 across documents: every token of a phase lies in documents whose targets are all scored by then."""
    tokens = documents_stream()
    config = tg.Config(**TINY)
    val = tg.ValidationSet.from_sidecar(tokens, torch.ones_like(tokens))
    scored = torch.zeros(len(tokens) - 1, dtype=torch.bool)
    phases = []

    def on_event(kind: str, **data) -> None:
        if kind == "scored":
            for first, count in data["part"].spans:
                scored[first : first + count] = True
        if kind == "global_sgd":
            phases.append(data["tokens"])
            finished = [
                tokens[start : start + length].tolist()
                for start, length in val.documents
                if scored[start : start + length - 1].all()
            ]
            assert made_of(data["tokens"].tolist(), finished)

    model, generator = random_model(tg, config), torch.Generator().manual_seed(0)
    watch = SimpleNamespace(see=on_event)
    run_through(tg.ScoreFirstTTT, model, val, config, looping=True, generator=generator, watch=watch)
    assert len(phases) == 2
    assert all(len(tokens) > TINY["global_ttt_chunk_tokens"] for tokens in phases)


def made_of(stream: list[int], documents: list[list[int]]) -> bool:
    """Whether the stream is whole documents one after the other."""
    position = 0
    while position < len(stream):
        fitting = [d for d in documents if stream[position : position + len(d)] == d]
        if not fitting:
            return False
        position += max(len(d) for d in fitting)
    return True


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_last_chunk_is_never_trained_on(tg, name):
    """No update after a document's last chunk: its targets are in no training span."""
    watch, _, _, val = run(tg, documents_stream(), SETTINGS[name])
    for start, length in val.documents:
        targets = length - 1
        size = tg.chunk_size(tg.Config(**TINY | SETTINGS[name]), targets)
        first_of_last = (targets - 1) // size * size
        last = set(range(start + first_of_last, start + targets))
        assert not last & watch.trained
        assert set(range(start, start + first_of_last)) <= watch.trained


def test_scored_comes_before_trained_in_every_chunk(tg):
    """Order of events: each `trained` repeats the `scored` just before it, restricted to longer documents."""
    watch, _, _, _ = run(tg, documents_stream())
    previous = None
    for kind, batch, chunk, documents in watch.order:
        if kind == "trained":
            assert previous is not None and previous[:2] == (batch, chunk)
            assert set(documents) <= set(previous[2])
        elif kind == "scored":
            previous = (batch, chunk, documents)


def test_seed_reproduces(tg):
    tokens = documents_stream()
    first, second = run(tg, tokens), run(tg, tokens)
    assert first[1].loss_sum == second[1].loss_sum
    assert first[0].chunk_losses == second[0].chunk_losses
    assert first[0].order == second[0].order
    for name, weight in first[2].state_dict().items():
        assert torch.equal(weight, second[2].state_dict()[name]), name


def test_seed_matters(tg):
    """Other adapter draws, other losses: the generator passed is the one used."""
    tokens = documents_stream()
    assert run(tg, tokens, seed=7)[1].loss_sum != run(tg, tokens, seed=8)[1].loss_sum


def test_global_random_state_is_left_alone(tg):
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    run(tg, documents_stream())
    assert torch.equal(torch.rand(3), expected)


def test_adaptation_changes_later_chunks_only(tg):
    """The first chunk is scored before any update: as with a zero learning rate; later ones are not."""
    tokens = documents_stream()
    adapted = run(tg, tokens, {"phased_ttt_prefix_docs": 0})[0].chunk_losses
    frozen = run(tg, tokens, {"phased_ttt_prefix_docs": 0, "ttt_lora_lr": 0.0})[0].chunk_losses
    assert adapted[0] == frozen[0]
    assert adapted[1][0] != frozen[1][0]


@pytest.mark.parametrize("name", ["phased", "rows_not_documents", "tilted"])
@pytest.mark.parametrize("document", [4, 7, 0, 3, 1])
def test_future_token_changes_no_earlier_score(tg, name, document):
    """C1 and C3 end to end, adapters and global SGD included.

    The evaluator processes chunk after chunk of batch after batch. Changing one token may change the chunk
    that holds it as a target and what comes after in that order, nothing before.
    """
    tokens = documents_stream()
    start = sum(LENGTHS[:document])
    position = start + LENGTHS[document] * 2 // 3
    changed = tokens.clone()
    changed[position] = (changed[position] - 2 + 31) % 62 + 2
    before, _, _, val = run(tg, tokens, SETTINGS[name])
    after = run(tg, changed, SETTINGS[name])[0]
    assert before.order == after.order
    steps = [event for event in before.order if event[0] == "scored"]
    chunk = (position - 1 - start) // TINY["ttt_chunk_size"]
    first_affected = next(
        i for i, (_, _, c, documents) in enumerate(steps) if c == chunk and document in documents
    )
    assert first_affected > 0
    assert before.chunk_losses[:first_affected] == after.chunk_losses[:first_affected]
    assert before.chunk_losses[first_affected][0] != after.chunk_losses[first_affected][0]


def test_documents_do_not_leak_into_each_other(tg):
    """Fresh adapters per batch of one document, no phase: every other document scores the same."""
    overrides = {"phased_ttt_prefix_docs": 0, "ttt_batch_size": 1, "ttt_warm_start_a": False}
    tokens = documents_stream()
    changed = tokens.clone()
    position = sum(LENGTHS[:4]) + 5  # in the longest document: the first batch of all
    changed[position] = (changed[position] - 2 + 31) % 62 + 2
    first, second = (run(tg, stream, overrides)[0].chunk_losses for stream in (tokens, changed))
    chunks = -(-LENGTHS[4] // TINY["ttt_chunk_size"])
    assert first[:chunks] != second[:chunks]
    assert first[chunks:] == second[chunks:]
    # A kept from batch to batch carries what the first document taught to later ones: the test can see it.
    overrides["ttt_warm_start_a"] = True
    first, second = (run(tg, stream, overrides)[0].chunk_losses for stream in (tokens, changed))
    assert first[chunks:] != second[chunks:]


def by_hand(tg, tokens: torch.Tensor, config) -> list[float]:
    """Chunk losses of one document, written out: score the window, then step on the chunk's mean loss."""
    model = random_model(tg, config)
    generator = torch.Generator().manual_seed(7)
    lora = tg.BatchedLoRA(config, 1, tg.lora_slots(config, True), generator)
    betas, decay = (config.ttt_beta1, config.ttt_beta2), config.ttt_weight_decay
    optimizer = torch.optim.AdamW(lora.parameters(), config.ttt_lora_lr, betas, 1e-10, decay)
    size, targets, scores = config.ttt_chunk_size, len(tokens) - 1, []
    for first in range(0, targets, size):
        end = min(first + size, targets)
        start = max(0, end - config.ttt_eval_seq_len)
        x, y = tokens[None, start:end], tokens[None, start + 1 : end + 1]
        for step in range(config.ttt_grad_steps):
            losses = model.losses(x, y, looping=True, lora=lora)[0, first - start :]
            if step == 0:
                scores.append(losses.double().sum().item())
            if end < targets:
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
    return scores


@pytest.mark.parametrize("grad_steps", [1, 2])
def test_one_long_document_by_hand(tg, grad_steps):
    tokens = torch.ones(80, dtype=torch.int64)
    tokens[1:] = torch.randint(2, 64, (79,), generator=torch.Generator().manual_seed(4))
    overrides = {"phased_ttt_prefix_docs": 0, "ttt_batch_size": 1, "ttt_lora_lr": 0.001}
    chunks = {n: run(tg, tokens, {**overrides, "ttt_grad_steps": n})[0].chunk_losses for n in (1, 2)}
    expected = by_hand(tg, tokens, tg.Config(**{**TINY, **overrides, "ttt_grad_steps": grad_steps}))
    # With beta1 = 0 a step is the gradient's sign: rounding of gradients near zero grows from chunk to chunk.
    assert [loss for loss, _, _ in chunks[grad_steps]] == pytest.approx(expected, rel=1e-4)
    assert chunks[3 - grad_steps][-1][0] != pytest.approx(expected[-1], rel=1e-3)


def test_base_weights_change_in_phases_only(tg):
    tokens = documents_stream()
    config = tg.Config(**{**TINY, "phased_ttt_prefix_docs": 0})
    model = random_model(tg, config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(tg, tokens, {"phased_ttt_prefix_docs": 0}, model=model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    phased = random_model(tg, config)
    run(tg, tokens, model=phased)
    assert any(not torch.equal(value, before[name]) for name, value in phased.state_dict().items())


def test_one_document_alone(tg):
    """A stream shorter than a batch and a chunk, with fewer documents than phases, is scored to the end."""
    tokens = torch.tensor([1, 5, 6, 7, 8])
    watch, meter, _, _ = run(tg, tokens)
    assert meter.tokens == 4 and (watch.scored == 1).all()
    assert not watch.trained


def test_target_of_a_final_bos_is_scored(tg):
    tokens = torch.tensor([1, 5, 6, 7, 8, 9, 10, 11, 12, 13, 1])
    watch, meter, _, val = run(tg, tokens, {"phased_ttt_prefix_docs": 0})
    assert [tuple(document) for document in val.documents] == [(0, 11)]
    assert meter.tokens == 10 and (watch.scored == 1).all()


@pytest.mark.parametrize("prefix_docs", [0, 3, 12, 500])
@pytest.mark.parametrize("num_phases", [1, 2, 3, 5, 40])
def test_phase_boundaries(tg, prefix_docs, num_phases):
    """Evenly spread over the prefix; the base weights never learn twice from the same documents in a row."""
    boundaries = tg.phase_boundaries(prefix_docs, num_phases, 12)
    prefix = min(prefix_docs, 12)
    assert boundaries == sorted({prefix * (k + 1) // num_phases for k in range(num_phases)} - {0})
    assert len({*boundaries}) == len(boundaries) == min(num_phases, prefix)


def test_batches_hold_every_document_once(tg):
    tokens = documents_stream()
    documents = tg.find_documents(tokens)
    batches = tg.ttt_batches(list(enumerate(documents)), tg.Config(ttt_batch_size=5))
    numbers = [number for batch in batches for number, _ in batch.documents]
    assert sorted(numbers) == list(range(len(documents)))
    longest = [max(length for _, (_, length) in batch.documents) for batch in batches]
    assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize("pred_len", [1, 7, 8, 9, 31, 32, 33, 100])
def test_windows_tile_a_document(tg, pred_len):
    """The chunks' targets are every position once; a window never reaches beyond its chunk."""
    seen = []
    for chunk in range(-(-pred_len // 8)):
        window = tg.chunk_window(chunk, pred_len, 8, 32)
        first = window.start + window.offset
        assert window.start >= 0 and window.length <= 32
        assert first + window.targets == window.start + window.length
        seen += range(first, first + window.targets)
    assert seen == list(range(pred_len))


@pytest.mark.parametrize(("chunk", "expected"), [(0, 0.001), (2, 0.0005), (4, 0.0)])
def test_global_sgd_lr_is_a_cosine(tg, chunk, expected):
    config = tg.Config(**{**TINY, "global_ttt_lr": 0.001, "global_ttt_warmup_chunks": 0})
    assert tg.global_sgd_lr(chunk, 5, config) == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_global_sgd_warms_up(tg):
    overrides = {"global_ttt_lr": 0.004, "global_ttt_warmup_chunks": 3, "global_ttt_warmup_start_lr": 0.002}
    config = tg.Config(**{**TINY, **overrides})
    rates = [tg.global_sgd_lr(chunk, 8, config) for chunk in range(4)]
    assert rates == pytest.approx([0.002, 0.003, 0.004, 0.004], rel=1e-12)


def test_global_sgd_lowers_the_loss(tg):
    config = tg.Config(**{**TINY, "global_ttt_lr": 0.05, "global_ttt_epochs": 6})
    model = random_model(tg, config)
    tokens = documents_stream()[:129]
    x, y = tokens[None, :64], tokens[None, 1:65]

    def loss() -> float:
        with torch.no_grad():
            return model.losses(x, y, looping=True).mean().item()

    before = loss()
    grad_norms, rates = tg.global_sgd(model, tokens, config, looping=True)
    assert len(grad_norms) == len(rates) == 12  # one of two chunks, two rows, six epochs
    assert loss() < before


def test_global_sgd_skips_a_single_chunk(tg):
    """The last chunk is never trained, so one chunk alone changes nothing."""
    config = tg.Config(**TINY)
    model = random_model(tg, config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grad_norms, rates = tg.global_sgd(model, documents_stream()[:60], config, looping=True)
    assert len(grad_norms) == len(rates) == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


# -- a rank that is cut off goes on


def place_of(worker) -> tuple:
    """Everything that the end of an evaluation leaves behind."""
    weights = {name: value.clone() for name, value in worker.model.state_dict().items()}
    return worker.meter.sums, worker.diverged, worker.done, weights


@pytest.mark.parametrize("settings", [{"ttt_warm_start_a": True}, {"ttt_warm_start_a": False}, "ruinous"])
def test_resuming_after_any_unit_gives_the_same_digits(tg, tmp_path, settings):
    """The state goes through a file; a fresh worker on the artifact's weights does only what is left."""
    settings = RUINOUS | {"phased_ttt_prefix_docs": 6} if settings == "ruinous" else settings
    config, val = tg.Config(**TINY | settings), validation(tg, documents_stream())

    def new_worker() -> tuple:
        events, model = [], random_model(tg, config)
        watch = SimpleNamespace(see=lambda kind, **data: events.append((kind, data.get("index"))))
        return tg.ScoreFirstTTT(model, val, config, looping=True, watch=watch), events

    whole, expected_events = new_worker()
    units = sum(1 for _ in whole.units())
    assert units == 3 + 2  # batches of four documents, and global phases
    for cut in range(1, units + 1):
        first, events = new_worker()
        work = first.units()
        for _ in range(cut):
            next(work)
        state = first.state() | ({"weights": first.model.state_dict()} if first.phases else {})
        torch.save(state, tmp_path / "state")
        work.close()
        second, later_events = new_worker()
        second.load_state(torch.load(tmp_path / "state", weights_only=True))
        assert sum(1 for _ in second.units()) == units - cut
        assert events + later_events == expected_events, "nothing is done twice, or left out"
        *found, weights = place_of(second)
        *expected, expected_weights = place_of(whole)
        assert found == expected
        assert all(torch.equal(weights[name], value) for name, value in expected_weights.items()), cut


def test_gradients_of_any_layout_give_the_same_step(tg):
    """The fused kernel reads memory in order: gradients that are views (sums, transposes) are laid out."""
    config, results = tg.Config(**TINY), []
    for transposed in (False, True):
        lora = tg.BatchedLoRA(config, 3, 2, torch.Generator().manual_seed(0))
        optimizer = tg.LoRAOptimizer(config, lora)
        factors = [f.mT.contiguous().mT if transposed else f for f in optimizer.factors]
        optimizer.step(sum((f * torch.arange(f.size(-1))).sum() + f.sum() for f in factors))
        results.append([factor.detach().clone() for factor in optimizer.factors])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) and torch.isfinite(one).all()


def test_rows_that_were_dropped_rest(tg):
    """Neither they nor their moments change; the others step as torch's AdamW on them alone would."""
    config, drops = tg.Config(**TINY | {"ttt_beta1": 0.5}), (4, 4, 3, 1, 1)
    lora = tg.BatchedLoRA(config, 4, 2, torch.Generator().manual_seed(0))
    optimizer, rows = tg.LoRAOptimizer(config, lora), 4
    alone = [
        p.detach()[-1:].clone().requires_grad_() for low_rank in lora.maps() for p in low_rank.parameters()
    ]
    options = (config.ttt_beta1, config.ttt_beta2), 1e-10, config.ttt_weight_decay
    reference = torch.optim.AdamW(alone, config.ttt_lora_lr, *options, fused=True)
    for step, left in enumerate(drops):
        before = [parameter.detach().clone() for parameter in lora.parameters()]
        if left < rows:
            optimizer.drop_finished_rows(rows := left)
        optimizer.step(sum(((f + step + 1) ** 2).sum() for f in optimizer.factors))
        reference.zero_grad()
        sum(((f + step + 1) ** 2).sum() for f in alone).backward()
        reference.step()
        for old, parameter in zip(before, lora.parameters(), strict=True):
            assert torch.equal(parameter[: 4 - rows], old[: 4 - rows])
            assert (parameter[4 - rows :] != old[4 - rows :]).any()
    ours = [p for low_rank in lora.maps() for p in low_rank.parameters()]
    assert all(torch.equal(p[-1:], one) for p, one in zip(ours, alone, strict=True))


# -- less work, the same losses


def document_losses(tg, model, val, config, looping: bool = True) -> dict[int, float]:
    """Loss sums by document number, re-computed from the events of the evaluator."""
    sums, chunk_losses = {}, []
    evaluator = tg.ScoreFirstTTT(model, val, config, looping=looping)
    losses_of = evaluator._losses

    def losses(*arguments):
        chunk_losses.append(losses_of(*arguments))
        return chunk_losses[-1]

    def on_event(kind: str, **data: object) -> None:
        if kind == "scored":
            part, values = data["part"], chunk_losses[-1].detach().double()
            for row, number in enumerate(part.documents):
                sums[number] = sums.get(number, 0.0) + float(values[row][part.valid[row]].sum())

    evaluator._losses, evaluator.watch = losses, SimpleNamespace(see=on_event)
    meter = evaluator.run()
    assert sum(sums.values()) == pytest.approx(meter.loss_sum, rel=1e-12)
    return sums


@pytest.mark.parametrize("lanes", [0, 1])
@pytest.mark.parametrize("style", ["lanes", "single"])
def test_losses_are_those_of_the_plain_form(tg, float64, style, lanes):
    """Head, loss and last layer at the chunk only, finished rows dropped, no padding."""
    looping = {"num_loops": 0, "parallel_start_layer": lanes, "parallel_style": style}
    gate = {"sparse_attn_gate_enabled": False, "attn_out_gate_enabled": True, "attn_out_gate_src": "q"}
    config = tg.Config(**{**TINY, **looping, **(gate if lanes else {})})
    model, val = random_model(tg, config), validation(tg, documents_stream())
    expected = plain_ttt(tg, copy.deepcopy(model), val, config, looping=True)
    actual = document_losses(tg, model, val, config)
    assert actual == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("window", "rate"), [(32, 0.01), (8, 0.0), (12, 0.0)])
def test_cache_is_exact_where_nothing_it_holds_has_changed(tg, window, rate):
    """As long as a document: nothing is cached. Adapters that do not learn: all would be the same anew."""
    settings = {"ttt_cache_window": window, "ttt_lora_lr": rate}
    tokens = torch.cat([part for part in documents_stream().tensor_split(BOS_PLACES) if len(part) <= 32])
    model, val = random_model(tg, tg.Config(**TINY)), validation(tg, tokens)
    exact = tg.Config(**{**TINY, "ttt_lora_lr": rate})
    expected = document_losses(tg, copy.deepcopy(model), val, exact)
    cached = document_losses(tg, model, val, tg.Config(**{**TINY, **settings}))
    assert cached == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("cache_window", [0, 8, 20, 32])
def test_losses_reach_back_as_far_as_the_window(tg, cache_window):
    """One layer: the last chunk's losses depend on the 32 tokens behind its end and on no earlier one."""
    one_layer = {"num_layers": 1, "num_loops": 0, "loop_end": 0, "xsa_last_n": 1, "ttt_lora_lr": 0.0}
    cache = {"ttt_cache_window": cache_window, "phased_ttt_prefix_docs": 0, "smear_gate_enabled": False}
    settings = one_layer | cache
    model = random_model(tg, tg.Config(**{**TINY, **settings}))
    tokens = torch.randint(2, 64, (73,), generator=torch.Generator().manual_seed(3))
    tokens[0] = 1

    def last_loss(changed: int | None) -> float:
        stream = tokens.clone()
        if changed is not None:
            stream[changed] = tokens[changed] % 60 + 2
        return run(tg, stream, settings, model=model)[0].chunk_losses[-1][0]

    unchanged = last_loss(None)
    assert [last_loss(place) == unchanged for place in (30, 39)] == [True, True]
    assert [last_loss(place) == unchanged for place in (40, 41, 60)] == [False] * 3


# -- smaller chunks for short documents


BY_LENGTH = {"ttt_chunk_by_length": "8:2,22:3", "phased_ttt_prefix_docs": 0, "ttt_warm_start_a": False}


def test_chunks_by_length_are_those_of_a_run_with_that_size(tg):
    """Document by document: up to 8 targets chunks of 2, up to 22 of 3, else TTT_CHUNK_SIZE."""
    config = tg.Config(**TINY | BY_LENGTH)
    model, val = random_model(tg, config), validation(tg, documents_stream())
    actual = document_losses(tg, model, val, config)
    expected = {}
    for size, low, high in ((2, 0, 8), (3, 8, 22), (8, 22, 1000)):
        alone = tg.Config(**TINY | BY_LENGTH | {"ttt_chunk_by_length": "", "ttt_chunk_size": size})
        losses = document_losses(tg, model, val, alone)
        for number, (_, length) in enumerate(val.documents):
            if low < length - 1 <= high:
                expected[number] = losses[number]
    assert expected.keys() == actual.keys()
    # Equal in float64; rounding in batches of other rows turns steps that are the sign of almost nothing.
    assert actual == pytest.approx(expected, rel=1e-4)
    sizes = [tg.chunk_size(config, targets) for targets in (1, 8, 9, 22, 23, 10**6)]
    assert sizes == [2, 2, 3, 3, 8, 8]


@pytest.mark.parametrize("world", [1, 2])
def test_documents_of_a_batch_have_chunks_of_one_size(tg, world):
    config = tg.Config(**TINY | BY_LENGTH)
    documents = list(enumerate(tg.find_documents(documents_stream())))
    batches = tg.ttt_batches(documents, config)
    shares = tg.share_documents(batches, config, world)
    assert world > 1 or shares == [batches]
    for share in shares:
        assert sorted(batch.index for batch in share) == list(range(len(share)))
        for batch in share:
            assert len({tg.chunk_size(config, length - 1) for _, (_, length) in batch.documents}) == 1
    given = [document for share in shares for batch in share for document in batch.documents]
    assert sorted(given) == documents


@pytest.mark.parametrize(
    "text", ["8", "8:2,", "8:2,8:4", "8:4,16:2", "0:2", "8:0", "8:9", "8:2:1", "a:b", "9:2,8:3"]
)
def test_chunks_by_length_are_checked(tg, text):
    with pytest.raises(tg.ConfigError, match=r"TTT_CHUNK_BY_LENGTH='.*': must be LENGTH:CHUNK,.* below"):
        tg.check_settings(tg.Config(**TINY, ttt_chunk_by_length=text))


# -- adapters that do harm


RUINOUS = {"ttt_lora_lr": 100.0, "phased_ttt_prefix_docs": 0, "ttt_warm_start_a": True}


def test_document_that_diverges_goes_on_without_adapters(tg):
    """From the chunk after the rise on its losses are those of the weights alone; nothing is scored again."""
    settings, still = {**RUINOUS, "ttt_guard": 2.0}, {"ttt_lora_lr": 0.0, "phased_ttt_prefix_docs": 0}
    val = validation(tg, documents_stream())

    def chunk_losses(settings: dict) -> tuple[list[tuple], int]:
        config, found = tg.Config(**{**TINY, **settings}), []
        evaluator = tg.ScoreFirstTTT(random_model(tg, config), val, config, looping=True)
        inner = evaluator._losses

        def losses(part, *rest):
            values = inner(part, *rest)
            for row, number in enumerate(part.documents):
                chunk = values[row].detach()[part.valid[row]]
                found.append((number, float(chunk.sum()), len(chunk), bool(part.trains[row])))
            return values

        evaluator._losses = losses
        evaluator.run()
        return found, evaluator.diverged

    (ruined, diverged), (plain, _) = chunk_losses(settings), chunk_losses(still)
    assert [chunk[0] for chunk in ruined] == [chunk[0] for chunk in plain]  # each chunk once, in order
    assert 0 < diverged <= len(LENGTHS)
    so_far, off = {}, set()
    for (number, loss, targets, trains), (_, without, _, _) in zip(ruined, plain, strict=True):
        before, count, harm = so_far.get(number, (0.0, 0, 0.0))
        if number in off:
            assert loss == pytest.approx(without, rel=1e-5)
        if count:
            harm = max(0.0, harm + loss - targets * (before / count + 3))
        if harm > 2 and trains:
            off.add(number)
        so_far[number] = before + loss, count + targets, harm
    assert len(off) == diverged


SIZES = (1, 2, 5, 8, 24, 48, 72)


@pytest.mark.parametrize("size", SIZES)
def test_noise_takes_no_adapters(tg, size):
    """Losses as a model without harm has them, and worse."""
    assert guard.judge(guard.invented(seed=size), size, tg.Config())[0].all()


@pytest.mark.parametrize("size", SIZES)
def test_harm_is_found_within_a_few_targets_whatever_the_chunks(tg, size):
    """10 nats more from some target on, 7 of them evidence: 15 targets, and a chunk is judged whole."""
    first = -(-200 // size) * size
    losses = torch.full([3, first + 500], 3.3)
    losses[1:, first:] += 10
    losses[2, first + -(-15 // size) * size :] -= 10  # what follows does not matter any more
    assert guard.judge(losses, size, tg.Config())[0].tolist() == [True, False, False]


def test_the_last_chunk_takes_no_adapters(tg):
    """They are not used again, and the next batch would draw its A anew."""
    losses = torch.full([2, 48 * 3 + 2], 3.3)
    losses[:, -2:] = 200.0
    assert guard.judge(losses, 48, tg.Config())[0].all()
    assert not guard.judge(losses, 1, tg.Config())[0].any()


def test_finished_documents_decay_as_in_the_plain_form(tg):
    """Their A goes to the next batch (warm start), and the rows that are dropped are not stepped any more."""
    settings = {"ttt_weight_decay": 20.0, "ttt_lora_lr": 5e-3, "phased_ttt_prefix_docs": 0, "ttt_guard": 0.0}
    config = tg.Config(**TINY | settings | {"ttt_warm_start_a": True})
    model, val = random_model(tg, config), validation(tg, documents_stream())
    (batch, *_) = tg.ttt_batches(list(enumerate(val.documents)), config)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    evaluator = tg.ScoreFirstTTT(model, val, config, looping=True, generator=generators[0])
    ours = evaluator._new_lora(range(config.ttt_batch_size))
    plain = tg.BatchedLoRA(config, config.ttt_batch_size, tg.lora_slots(config, True), generators[1])
    assert len(batch.documents) == config.ttt_batch_size and batch.documents[0][1][1] < batch.targets - 20
    evaluator._score_batch(batch, ours, config.ttt_chunk_size)
    score_batch(tg, model, val, config, batch.documents, plain, True, {})
    for mine, theirs in zip(ours.maps(), plain.maps(), strict=True):
        torch.testing.assert_close(mine.A, theirs.A, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("warm", [False, True])
def test_guard_limits_the_damage(tg, warm):
    """A rate that ruins every document: worse than no adapters, better than without the guard."""
    settings = RUINOUS | {"ttt_lora_lr": 100.0, "ttt_warm_start_a": warm}
    guarded = run(tg, documents_stream(), settings)[1]
    unguarded = run(tg, documents_stream(), settings | {"ttt_guard": 0.0})[1]
    plain = run(tg, documents_stream(), {"ttt_lora_lr": 0.0, "phased_ttt_prefix_docs": 0})[1]
    assert plain.val_bpb < guarded.val_bpb
    assert guarded.val_bpb < 6 and not unguarded.val_bpb <= guarded.val_bpb
