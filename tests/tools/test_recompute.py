"""Scores recomputed by document, steps repeated, memorised validation text: honest, and as a cheat would.

Three tiny runs are made; each test changes a copy of a run's files, all of them alike, as one who knows the
audit would: the records of a cheat agree with each other.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from audited import ARTIFACT, MODEL, Copy, one_house  # noqa: F401 - a fixture
from quick_run import QUICK
from test_codec import forge
from test_smoke import TINY, make_data

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import audit  # noqa: E402
from auditing import phrases, recompute, weights  # noqa: E402
from auditing.run import CONSISTENT, Failed  # noqa: E402
from bench import contaminate  # noqa: E402

SETTINGS = {"AUDIT": 1, "RUN_ID": "tiny", "TTT_BATCH_SIZE": 3, "VAL_LOSS_EVERY": 6}
SETTINGS |= {"TTT_CHUNK_SIZE": 64, "TTT_EVAL_SEQ_LEN": 128, "NUM_LAYERS": 4}


def run(tg, work: Path, name: str, **settings: object) -> None:
    """A tiny run in a folder of that name, in this process."""
    given = TINY | SETTINGS | {"DATA_PATH": work / "data", "ARTIFACT_DIR": work / name} | settings
    assert tg.main([], {key: str(value) for key, value in given.items()}) == 0


@pytest.fixture(scope="module")
def work(tmp_path_factory, tg, quick_packing) -> Path:
    """Folder with data, a run, one of another seed that adapts nothing, and one with windows and SGD."""
    work = tmp_path_factory.mktemp("recompute")
    make_data(work / "data")
    run(tg, work, "run")
    run(tg, work, "other", SEED=7, TTT_ENABLED=0)
    stream = {"TTT_SGD": 1, "SLIDING_WINDOW_ENABLED": 1, "EVAL_STRIDE": 16, "TTT_CHUNK_TOKENS": 256}
    run(tg, work, "sgd", TTT_EVAL_ONLY=1, QUANTIZED_MODEL_PATH=work / "run" / ARTIFACT, **stream)
    shutil.copy(work / "run" / ARTIFACT, work / "sgd")
    return work


@pytest.fixture
def copy(work, tmp_path) -> Copy:
    return Copy(work, tmp_path)


def flatter(copy: Copy, stage: str, factor: float) -> None:
    """Multiply the losses of a stage everywhere."""

    def documents(value):
        value["losses"][stage] = [factor * nats for nats in value["losses"][stage]]

    def result(value):
        for place in [value["stages"][stage], *[value] * (value["final_stage"] == stage)]:
            place["val_loss"] *= factor
            place["val_bpb"] *= factor

    copy.json(copy.run / "documents.json", documents)
    copy.result(result)


# -- E: scores


def test_honest_scores_are_recomputed_to_the_digit(work, tmp_path):
    for name, stages in {"run": ("prequant", "quantised"), "sgd": ("quantised", "sliding")}.items():
        copy = Copy(work, tmp_path / name, name)
        status, evidence = copy.verdict("E1")
        assert status == "VERIFIED" and all(stage in evidence for stage in stages)
        assert evidence.count("of 14 documents within 0e+00") == len(stages)
        status, evidence = copy.verdict("E2")
        assert status == "VERIFIED" and "of 14 documents within 0e+00" in evidence


def test_sampled_scores_are_recomputed_to_the_digit(work, tmp_path):
    copy = Copy(work, tmp_path, "sgd")
    status, evidence = copy.verdict("E1", sample=2, sample_seed=5)
    assert status == "VERIFIED" and "sliding 2 of 14 documents within" in evidence
    assert "(2 drawn by seed 5)" in evidence
    status, evidence = copy.verdict("E2", sample=1, sample_seed=5)
    assert status == "VERIFIED" and "with all before them" in evidence


def test_without_carried_state_drawn_documents_are_adapted_alone(copy):
    """Where A is drawn anew; beside them the same documents, adapted with all others."""
    judged = audit.Audit(copy.run, data=copy.data, sample=3, sample_seed=1)
    judged.artifact_model.cfg = dataclasses.replace(judged.artifact_model.cfg, ttt_warm_start_a=False)
    found, how = recompute.repeat(judged)
    assert found.whole.sum() == 3 and found.counts.sum() == found.counts[found.whole].sum()
    assert how == " (3 drawn by seed 1)"
    judged.options = dataclasses.replace(judged.options, sample=0)
    whole, _ = recompute.repeat(judged)
    judged.close()
    assert whole.whole.all()
    np.testing.assert_allclose(found.nats[found.whole], whole.nats[found.whole], rtol=1e-5)


@pytest.mark.parametrize("part", [100, 1 << 20])
def test_phrases_are_those_of_a_plain_reading(monkeypatch, part):
    """All windows of six tokens within a document, each once a document; a sample of them by their hashes."""
    monkeypatch.setattr(phrases, "PART", part)
    tokens = np.random.default_rng(0).choice(np.arange(1, 6), 3000, p=[0.05, 0.4, 0.3, 0.2, 0.05])
    tokens[0] = 1
    documents = np.split(tokens, np.flatnonzero(tokens == 1))[1:]
    read = [{d[i : i + 6].tobytes() for i in range(1, len(d) - 5)} for d in documents]
    found = phrases.phrases_of(tokens, 1)
    counts = np.bincount(found.documents, minlength=len(documents) + 1)[1:]
    assert counts.tolist() == [*map(len, read)]
    assert len({*found.hashes.tolist()}) == len(set().union(*read))
    some = phrases.phrases_of(tokens, 4)
    assert {*some.hashes.tolist()} < {*found.hashes.tolist()} and len(some.hashes) > 0.2 * len(found.hashes)


@pytest.mark.parametrize("hidden", [0.0, 0.12])
def test_what_was_not_drawn_is_like_what_was(monkeypatch, hidden):
    """Documents of 2 to 2,000 tokens; a score of which the rest is 0.12 nats a target too good is none."""
    dice = np.random.default_rng(0)
    lengths = np.exp(dice.uniform(np.log(3), np.log(2000), 2000)).astype(int)
    before = (lengths - 1) * dice.normal(3, 0.5, len(lengths))
    gains = (lengths - 1) * dice.normal(0.1, 0.05, len(lengths))
    val = types.SimpleNamespace(documents=[(0, int(n)) for n in lengths])
    monkeypatch.setattr(recompute, "validation", lambda seen: val)
    misjudged = 0
    for seed in range(200):
        seen = types.SimpleNamespace(sample_seed=seed)
        drawn = recompute.draw(seen, 16)
        monkeypatch.setattr(recompute, "chosen_documents", lambda seen, stage, drawn=drawn: drawn)
        told = before - gains - hidden * (lengths - 1)
        told[drawn] = (before - gains)[drawn]
        monkeypatch.setattr(recompute, "told_losses", lambda seen, stage: before)
        try:
            recompute._rest_is_alike(seen, "ttt", told)
        except recompute.Failed:
            misjudged += not hidden
        else:
            misjudged += bool(hidden)
    assert misjudged <= (20 if hidden else 0), misjudged


@pytest.mark.parametrize(("check", "stage"), [("E1", "quantised"), ("E1", "prequant"), ("E2", "ttt")])
def test_losses_multiplied_in_all_records(copy, check, stage):
    flatter(copy, stage, 0.99)
    copy.fails(check, f"{stage}: document ")


def test_one_document_made_cheaper_at_anothers_cost(copy):
    """The sum is the run's: only the documents tell."""

    def move(value):
        losses = value["losses"]["quantised"]
        losses[2], losses[3] = losses[2] + 1, losses[3] - 1

    copy.json(copy.run / "documents.json", move)
    copy.fails("E1", "nats in documents.json, recomputed")


def test_totals_alone_made_better(copy):
    def total(value):
        for place in (value, value["stages"]["ttt"]):
            place["val_loss"] *= 0.999

    copy.result(total)
    copy.fails("E2", "result.json says")
    (copy.run / "documents.json").unlink()
    copy.fails("E2", "val_loss")
    status, evidence = copy.verdict("E1", sample=1)
    assert status == "NOT CHECKED" and "documents.json" in evidence


def test_documents_left_out(copy):
    def halve(value):
        value["documents"] = value["documents"][::2]
        value["losses"] = {stage: losses[::2] for stage, losses in value["losses"].items()}

    copy.json(copy.run / "documents.json", halve)
    copy.fails("E1", "documents.json lists 7 documents, not the 14")


def test_artifact_of_another_seed(copy):
    shutil.copy(copy.original.with_name("other") / ARTIFACT, copy.run)
    copy.fails("E1", "quantised: document ")
    copy.fails("W1", "of its numbers with the artifact")


def test_a_run_on_a_cpu_that_claims_a_gpu(copy):
    """Its losses and its first steps are those of float32."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    copy.result(lambda value: value["environment"].update(device="NVIDIA H100 80GB HBM3"))
    for name in ("E1", "E2", "W1"):
        copy.fails(name, "no GPU's bfloat16")


def test_two_ranks_are_threads_here(work, tmp_path):
    """Their sums are those of one; a rank that fails ends the others."""
    judged = audit.Audit(Copy(work, tmp_path).run, data=work / "data")
    seen = []
    recompute.on_ranks(
        judged, 2, lambda ranks: seen.append(float(ranks.sum_(torch.tensor(1.0 + ranks.rank))))
    )
    assert seen == [3.0, 3.0]

    def fail(ranks):
        if ranks.rank:
            raise Failed("rank 1")
        ranks.wait_for_all("a stage that the other never reaches")

    with pytest.raises(Failed, match="rank 1"):
        recompute.on_ranks(judged, 2, fail)
    judged.close()


def test_the_adaptation_goes_on_in_the_background(copy, monkeypatch, tmp_path):
    """The other process imports nothing of the folder that the audit is called in."""
    (tmp_path / "json.py").write_text("raise SystemExit('a module of the run was imported')")
    monkeypatch.chdir(tmp_path)
    judged = audit.Audit(copy.run, data=copy.data)
    with recompute.in_background(judged):
        status, evidence = audit.judge(judged, ["E2"])["E2"]
    judged.close()
    assert status == "VERIFIED" and "of 14 documents within 0e+00" in evidence


def test_a_sample_is_lowered_by_what_rounding_allows_a_document(copy):
    flatter(copy, "quantised", 1 - 8e-6)
    copy.fails("E1", "documents cost 4", sample=13)


# -- W: weights


def test_honest_weights(copy):
    status, evidence = copy.verdict("W1")
    assert status == "VERIFIED" and "5 steps from the seed the same to the bit" in evidence
    assert "untrained" in evidence and f"{MODEL} quantised again gives artifact" in evidence
    status, evidence = copy.verdict("W3")
    assert status == "VERIFIED" and "training never reached" in evidence
    assert copy.verdict("W2").status == "NOT CHECKED"


def edit_events(copy: Copy, change) -> None:
    """Change the events of training steps."""
    path = copy.run / "metrics.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    change([event for event in events if event["stage"] == "train"])
    path.write_text("".join(json.dumps(event) + "\n" for event in events))


@pytest.mark.parametrize(("key", "step", "factor"), [("train_loss", 0, 0.999), ("grad_norm", 1, 1.01)])
def test_a_first_steps_figure_edited(copy, key, step, factor):
    edit_events(copy, lambda steps: steps[step].update({key: factor * steps[step][key]}))
    copy.fails("W1", f"step {step + 1}: {key}")


def test_no_step_is_repeated_of_a_clock_that_says_so(copy):
    """Under a clock only steps at the full rate can be repeated; a run that tells of none proves nothing."""
    copy.result(lambda value: value["settings"].update(MAX_WALLCLOCK_SECONDS=1000.0, WARMDOWN_FRAC=1.0))
    edit_events(copy, lambda steps: steps[0].update(lr_multiplier=0.999))
    assert copy.verdict("W1") == ("NOT CHECKED", "no step can be repeated: all were below the full rate")


def test_training_again_takes_no_weights_and_no_variables(copy, monkeypatch):
    """Settings by which a run would not train, and names that are none of the script's."""
    copy.result(lambda value: value["settings"].update(PREQUANT_ONLY=True, PYTHONPATH="evil"))
    started = []
    monkeypatch.setattr(weights.subprocess, "run", lambda command, **options: started.append(options))
    judged = audit.Audit(copy.run, data=copy.data)
    with pytest.raises(AttributeError):  # nothing ran
        weights._train_again(judged)
    judged.close()
    environment = started[0]["env"]
    assert environment["PREQUANT_ONLY"] == environment["QUANTIZE_ONLY"] == environment["TTT_EVAL_ONLY"] == "0"
    assert environment.get("PYTHONPATH") != "evil" and started[0]["cwd"] == judged.work


def test_a_run_that_quantised_given_weights_did_not_train(copy):
    copy.result(lambda value: value["settings"].update(QUANTIZE_ONLY=True))
    assert copy.verdict("W2", retrain=True) == ("NOT CHECKED", "this run did not train")


def test_another_seed_told(copy):
    copy.result(lambda value: value["settings"].update(SEED=7))
    copy.fails("W1", "untrained: document ")


def test_model_of_another_seed(copy):
    shutil.copy(copy.original.with_name("other") / MODEL, copy.run)
    copy.fails("E1", "prequant: document ")
    copy.fails("W1", "of its numbers with the artifact")


def test_artifact_trained_further(copy):
    """On whatever: it is not the quantised model any more. Scores were made anew, so they agree."""
    judged = audit.Audit(copy.run, data=copy.data)
    _, records = judged.script.unpack_artifact(judged.artifact.read_bytes(), judged.cfg)
    for record in records.values():
        if record.kind == "gptq":
            record.arrays["q"] = (
                (record.arrays["q"] + torch.randint(-1, 2, record.shape)).clamp(-31, 31).to(torch.int8)
            )
    blob = judged.script.pack_artifact(records, judged.cfg)
    judged.close()
    (copy.run / ARTIFACT).write_bytes(blob)
    copy.fails("W1", "of its numbers with the artifact")


def test_artifact_that_lies_about_its_size(tg, copy):
    """The audit reads it as a run does: its header is judged before anything is decoded."""
    forged = forge(tg, (copy.run / ARTIFACT).read_bytes(), lambda h: h["tensors"][0].__setitem__(3, [9, 9]))
    (copy.run / ARTIFACT).write_bytes(forged)
    status, evidence = copy.verdict("S3")
    assert status == "FAIL" and "ArtifactError: artifact " in evidence


def test_training_repeated(copy, monkeypatch):
    monkeypatch.setattr(weights, "SCRIPT", QUICK)
    status, evidence = copy.verdict("W2", retrain=True)
    assert status == "VERIFIED" and "the same artifact" in evidence


def test_training_repeated_gives_another_artifact(copy, monkeypatch):
    """It fails on the same kind of processor; on another it is believed as far as the score agrees."""
    monkeypatch.setattr(weights, "_train_again", lambda judged: copy.original.with_name("other"))
    copy.fails("W2", "on the same kind of processor", retrain=True)
    copy.result(lambda value: value["environment"].update(device="another"))
    monkeypatch.setattr(weights, "SPREAD", 0.2)
    assert copy.verdict("W2", retrain=True).status == CONSISTENT
    monkeypatch.setattr(weights, "SPREAD", 1e-9)
    copy.fails("W2", "trained again", retrain=True)


def test_a_clock_cannot_be_repeated(copy):
    copy.result(lambda value: value["settings"].update(MAX_WALLCLOCK_SECONDS=5.0))
    status, evidence = copy.verdict("W2", retrain=True)
    assert status == "NOT CHECKED" and "MAX_WALLCLOCK_SECONDS=5" in evidence


# -- W3


def test_ngrams_are_a_distribution():
    """Of the third token behind any two, known or not."""
    ngrams = weights.Ngrams(np.array([1, 2, 3, 1, 2, 4, 1, 2, 3]), 5)
    for first in ([1, 2], [4, 4], [3, 1]):
        losses = [ngrams.losses(np.array([*first, last]))[0] for last in range(5)]
        assert np.exp(-np.array(losses)).sum() == pytest.approx(1)
    assert ngrams.losses(np.array([1, 2, 3]))[0] < ngrams.losses(np.array([1, 2, 4]))[0]


def test_knowledge_is_told_apart_from_difficulty():
    """Validation text that is harder for n-grams as well is no better and no worse known."""
    dice = np.random.default_rng(0)
    hard, noise = dice.normal(5, 0.5, 200), dice.normal(0, 0.1, 200)
    rows = np.stack([0.8 * hard + noise, hard, np.full(200, 300.0)], 1)
    ours, theirs = rows[rows[:, 1] > 5], rows[rows[:, 1] <= 5]
    assert abs(weights.compare_knowledge(ours, theirs).errors) < 3
    known = ours - [0.2, 0, 0]
    assert weights.compare_knowledge(known, theirs).nats == pytest.approx(0.2, abs=0.05)
    assert weights.compare_knowledge(known, theirs).errors > weights.ERRORS


def test_weights_trained_on_validation_text(copy):
    """All steps on it: the audit's own measure of an artifact, on a model that is not one."""
    settings = {
        "ITERATIONS": "36",
        "ARTIFACT_DIR": str(copy.run / "dirty"),
        "DATA_PATH": str(copy.data),
    }
    cfg = contaminate.read_settings(TINY | settings)
    trained = contaminate.train(cfg, argparse.Namespace(model=None, share=1.0))
    judged = audit.Audit(copy.run, data=copy.data)
    judged.artifact_model.load_state_dict(trained.model.state_dict())
    found = audit.judge(judged, ["W3"])["W3"]
    judged.close()
    assert found.status == "FAIL" and "better known" in found.evidence, found
