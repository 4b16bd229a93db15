"""Golden 12: phased score-first test-time training end to end, two runs."""

from types import SimpleNamespace

import pytest
import torch
from golden_tools import assert_close, assert_digest, digest, files, model_config, run_through, some
from house import plain_validation

# 12_phased_ttt: "running loss and final val_loss/val_bpb within 1e-4 absolute; token and byte counts exact"
ABSOLUTE = 1e-4
# 12_phased_ttt: "weights after each phase: l2 of the change (delta_l2) within 1%"
DELTA = 0.01

RUNS = files("12_phased_ttt/*.json")
DROPPED_SETTINGS = ("ttt_optimizer", "ttt_eval_batches")  # dead in ours: one optimiser, no log filter
GOLDEN_KINDS = ("start", "lora_constructed", "lora_reset", "batch_done", "global_sgd")


def build_val(tg, golden: dict, tokens: dict[str, torch.Tensor]):
    if golden["byte_source"] == "sidecar":
        return tg.ValidationSet.from_sidecar(tokens["val_tokens"].long(), tokens["val_bytes"].long())
    tables = tg.ByteTables(
        tokens["lut.base_bytes"].long(),
        tokens["lut.has_leading_space"].bool(),
        tokens["lut.is_boundary"].bool(),
    )
    return plain_validation(tg, tokens["val_tokens"].long(), tables)


class EventLog:
    """Keeps the golden events in order, with weights and adapter norms as they were at that moment."""

    def __init__(self, initial: dict[str, torch.Tensor]) -> None:
        self.initial = initial
        self.events: list[SimpleNamespace] = []

    def see(self, kind: str, **data) -> None:
        if kind not in GOLDEN_KINDS:
            return
        event = SimpleNamespace(kind=kind, **data)
        if kind == "lora_reset":
            squares = [low_rank.A.detach().double().square().sum() for low_rank in data["lora"].maps()]
            event.a_l2 = float(sum(squares)) ** 0.5
        if kind == "batch_done":
            event.lora_l2 = {name: tensor.detach().norm().item() for name, tensor in lora_state(data["lora"])}
        if kind == "global_sgd":
            event.weights = {
                name: value.detach().clone() for name, value in data["model"].state_dict().items()
            }
        self.events.append(event)

    def of(self, kind: str) -> list[SimpleNamespace]:
        return [event for event in self.events if event.kind == kind]


def lora_state(lora) -> list[tuple[str, torch.Tensor]]:
    return list(lora.state_dict().items())


@pytest.fixture(scope="module", params=RUNS)
def run(request, tg, golden_file):
    """One golden run executed once: golden JSON, our validation set, events and final meter."""
    golden = golden_file(request.param)
    weights = golden_file("12_phased_ttt/weights.safetensors")
    settings = {key: value for key, value in golden["settings"].items() if key not in DROPPED_SETTINGS}
    config = model_config(tg, golden["config"], **settings)
    model = tg.GPT(config)
    model.load_state_dict(weights)
    val = build_val(tg, golden, golden_file("12_phased_ttt/tokens.safetensors"))
    log = EventLog(weights)
    meter = run_through(
        tg.ScoreFirstTTT,
        model,
        val,
        config,
        looping=golden["looping_active"],
        generator=torch.Generator().manual_seed(golden["seed_before_call"]),
        watch=log,
    )
    return SimpleNamespace(
        name=request.param.removesuffix(".json"),
        golden=golden,
        config=config,
        val=val,
        log=log,
        meter=meter,
    )


def golden_events(run, kind: str) -> list[dict]:
    """The stored events of a kind; every run has them, but for a global phase."""
    found = [event for event in run.golden["events"] if event["event"] == kind]
    return some(found, f"{kind} in the events of {run.name}.json")


def test_documents(run):
    assert len(run.val.tokens) == run.golden["num_val_tokens"]
    assert [list(document) for document in run.val.documents] == run.golden["docs"]


def test_boundaries(tg, run):
    expected = golden_events(run, "start")[0]["boundaries"]
    assert list(run.log.of("start")[0].boundaries) == expected
    settings = run.golden["settings"]
    boundaries = tg.phase_boundaries(
        settings["phased_ttt_prefix_docs"], settings["phased_ttt_num_phases"], len(run.golden["docs"])
    )
    assert list(boundaries) == expected


def test_order_of_events(run):
    assert [event.kind for event in run.log.events] == [event["event"] for event in run.golden["events"]]


def test_adapters_constructed(run):
    actual = [(event.index, event.batch) for event in run.log.of("lora_constructed")]
    assert actual == [(event["index"], event["batch"]) for event in golden_events(run, "lora_constructed")]


def test_adapter_draws(tg, run, golden_file):
    """The same generator, drawn from by the same constructions in order, gives every stored A."""
    stored = golden_file(f"{run.name}_lora_A.safetensors")
    generator = torch.Generator().manual_seed(run.golden["seed_before_call"])
    slots = tg.lora_slots(run.config, run.golden["looping_active"])
    drawn = {}
    for event in run.log.of("lora_constructed"):
        lora = tg.BatchedLoRA(run.config, event.batch, slots, generator)
        for name, tensor in lora_state(lora):
            if name.endswith(".A"):
                drawn[f"lora{event.index}/{name}"] = tensor
            else:
                assert not tensor.any()
    assert drawn.keys() == stored.keys()
    assert [name for name, tensor in drawn.items() if not torch.equal(tensor, stored[name])] == []


def test_adapter_norm_at_reset(run):
    """Untrained at the first reset (so the run drew the stored A), trained and kept at the later ones."""
    for event, expected in zip(run.log.of("lora_reset"), golden_events(run, "lora_reset"), strict=True):
        assert event.a_l2 == pytest.approx(expected["l2_A"], rel=ABSOLUTE)


def test_batches(run):
    for event, expected in zip(run.log.of("batch_done"), golden_events(run, "batch_done"), strict=True):
        assert event.batch_number + 1 == expected["batch_number"]  # golden 12 counts batches from one
        assert event.token_count == expected["token_count"]
        assert event.byte_sum == expected["byte_sum"]
        running_loss = event.loss_sum / event.token_count
        assert abs(running_loss - expected["running_loss"]) <= ABSOLUTE
        running_bpb = running_loss / 0.6931471805599453 * event.token_count / event.byte_sum
        assert abs(running_bpb - expected["running_bpb"]) <= ABSOLUTE


def test_chunk_sums(run):
    for event, expected in zip(run.log.of("batch_done"), golden_events(run, "batch_done"), strict=True):
        for chunk, stored in zip(event.chunks, expected["chunks"], strict=True):
            assert list(chunk[1:]) == stored[1:]
            assert abs(chunk[0] - stored[0]) <= ABSOLUTE * stored[2]


def test_adapter_norms_after_batch(run):
    """Every adapter update of a batch shows in these norms; B is all learned."""
    for event, expected in zip(run.log.of("batch_done"), golden_events(run, "batch_done"), strict=True):
        for name, l2 in expected["lora_l2"].items():
            assert event.lora_l2[name] == pytest.approx(l2, rel=DELTA), name


def test_global_sgd_steps(run):
    for event, expected in zip(run.log.of("global_sgd"), golden_events(run, "global_sgd"), strict=True):
        assert event.phase == expected["phase"]
        assert len(event.tokens) == expected["tokens"]
        assert event.tokens.sum().item() == expected["token_sum"]
        assert event.tokens[:5].tolist() == expected["first5"]
        assert event.tokens[-5:].tolist() == expected["last5"]
        assert len(event.grad_norms) == len(event.lr_used) == expected["steps"]
        assert list(event.lr_used) == pytest.approx(expected["lr_used"], rel=1e-12, abs=1e-18)
        # No threshold is suggested for the norms; float32 noise of gradients is 1e-5 (01_model).
        assert list(event.grad_norms) == pytest.approx(expected["grad_norms"], rel=1e-3)


def test_weights_after_phase(run, golden_file):
    stored = golden_file(f"{run.name}_weights_after.safetensors")
    for event, expected in zip(run.log.of("global_sgd"), golden_events(run, "global_sgd"), strict=True):
        assert set(event.weights) == set(expected["weights_after"])
        for name, weight in event.weights.items():
            assert_digest(weight, expected["weights_after"][name], 1e-5)
            change = digest(weight - run.log.initial[name])["l2"]
            # A change of a few float32 steps of the weight itself is known to half such a step an element.
            rounding = 2**-24 * run.log.initial[name].abs().max().item() * weight.numel() ** 0.5
            assert (
                abs(change - expected["delta_l2"][name]) <= DELTA * expected["delta_l2"][name] + rounding
            ), name
        for key in stored:
            if key.startswith(f"phase{event.phase}/"):
                assert_close(event.weights[key.split("/", 1)[1]], stored[key], 1e-5)
    phases = {f"phase{event.phase}" for event in run.log.of("global_sgd")}
    assert {key.split("/")[0] for key in stored} == phases


def test_final_score(run):
    last = golden_events(run, "batch_done")[-1]
    assert run.meter.tokens == last["token_count"]
    if run.config.val_doc_fraction == 1:  # all targets behind the first BOS
        assert run.meter.tokens == run.golden["num_val_tokens"] - 1 - run.golden["docs"][0][0]
    assert run.meter.bytes == last["byte_sum"]
    assert abs(run.meter.val_loss - run.golden["val_loss"]) <= ABSOLUTE
    assert abs(run.meter.val_bpb - run.golden["val_bpb"]) <= ABSOLUTE
