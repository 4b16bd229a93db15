"""Live tracking: the numbers of a run in TensorBoard and in Weights & Biases, and runs without them."""

import dataclasses
import functools
import importlib
import json
import os
import sys
import types

import pytest

EVENTS = [
    ("train", {"step": 1, "train_loss": 6.5, "tokens_per_second": 100.0}),
    ("train", {"step": 20, "train_loss": 4.5}),
    ("step_24", {"val_loss": 4.25, "val_bpb": 2.5}),
    ("matrix", {"name": "tok_emb.weight", "bits": 7, "weighted_error": 1.5}),
    ("saved", {"file": "final_model.pt"}),
    ("final", {"val_bpb": 2.25, "legal": True}),
]
POINTS = {  # name -> (step, value)
    "train/train_loss": [(1, 6.5), (20, 4.5)],
    "train/tokens_per_second": [(1, 100.0)],
    "validation/val_loss": [(24, 4.25)],
    "validation/val_bpb": [(24, 2.5)],
    "matrix/tok_emb.weight/bits": [(24, 7.0)],
    "matrix/tok_emb.weight/weighted_error": [(24, 1.5)],
    "final/val_bpb": [(24, 2.25)],
    "final/legal": [(24, 1.0)],
}


@pytest.fixture
def settings(tg, tmp_path):
    """Function: settings of a run in the temporary folder, changed by those given."""
    base = tg.Config(artifact_dir=str(tmp_path / "run"), run_id="watched")
    return lambda **changes: dataclasses.replace(base, **changes)


@pytest.fixture
def wandb(monkeypatch):
    """A module that stands in for `wandb`, and the list of what it was told."""
    told = []
    run = types.SimpleNamespace(
        log=lambda numbers, step: told.append((step, numbers)), finish=lambda: told.append("finished")
    )
    module = types.ModuleType("wandb")
    module.init = lambda **options: told.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    return told


def send(tg, cfg, *trackers) -> None:
    """Tell all events to the files of a log, and to trackers behind them."""
    files = tg.LogFiles(tg.CPU)
    log = tg.RunLog(cfg, watch=tg.Watches([files, *trackers]))
    for stage, values in EVENTS:
        log.event(stage, **values)
    for watch in (files, *trackers):
        watch.close()


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """What the real TensorBoard reads from a folder."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_shows_every_number_at_its_step(tg, settings, tmp_path):
    cfg = settings(tensorboard_dir=str(tmp_path / "board"))
    send(tg, cfg, tg.Trackers(cfg, tg.CPU))
    assert scalars(tmp_path / "board" / "watched") == POINTS


def test_wandb_is_told_the_same(tg, settings, wandb):
    cfg = settings(wandb_project="golf")
    send(tg, cfg, tg.Trackers(cfg, tg.CPU))
    start, *sent, end = wandb
    assert (start["project"], start["name"], start["config"]) == ("golf", "watched", cfg.as_env())
    points = {}
    for step, numbers in sent:
        for name, value in numbers.items():
            points.setdefault(name, []).append((step, value))
    assert points == POINTS and end == "finished"


def test_the_log_itself_is_as_without_tracking(tg, settings, wandb, tmp_path):
    cfg = settings(wandb_project="golf")
    send(tg, cfg, tg.Trackers(cfg, tg.CPU))
    send(tg, settings(artifact_dir=str(tmp_path / "plain")))
    for name in ("metrics.jsonl", "logs/watched.txt"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_only_rank_0_tracks(tg, settings, wandb):
    cfg, other = settings(wandb_project="golf"), tg.Ranks(tg.torch.device("cpu"), rank=1, world_size=2)
    send(tg, cfg, tg.Trackers(cfg, other))
    assert not wandb


def test_a_tracker_that_fails_is_given_up_and_said_once(tg, settings, wandb, tmp_path, monkeypatch):
    cfg = settings(wandb_project="golf")
    trackers = tg.Trackers(cfg, tg.CPU)

    def fail(numbers, step):
        raise OSError("no route to host")

    monkeypatch.setattr(trackers, "_send", [fail, *trackers._send])
    send(tg, cfg, trackers)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    notices = [json.loads(line)["text"] for line in lines if '"notice"' in line]
    assert len(notices) == 1 and "no route to host" in notices[0]
    numbers = [stage for stage, _ in EVENTS if stage != "saved"]
    assert len(wandb) == len(numbers) + 2  # the other one was told everything


@pytest.mark.parametrize(
    "setting, module, package",
    [
        ("WANDB_PROJECT", "wandb", "wandb"),
        ("TENSORBOARD_DIR", "torch.utils.tensorboard", "tensorboard"),
    ],
)
def test_a_missing_package_is_named_before_a_folder_is_made(
    tg, settings, tmp_path, monkeypatch, setting, module, package
):
    real = importlib.import_module

    def without(name, *arguments):
        if name == module:
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(tg.ConfigError, match=rf"^{setting}=here: .*pip install {package}$"):
        tg.Trackers(settings(**{setting.lower(): "here"}), tg.CPU)
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_start_is_a_mistake_of_the_users(tg, settings, tmp_path, wandb, monkeypatch):
    def refuse(**options):
        raise RuntimeError("api_key not configured")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(tg.ConfigError, match="^WANDB_PROJECT=golf: does not start .api_key"):
        tg.Trackers(settings(wandb_project="golf"), tg.CPU)
    assert not (tmp_path / "run").exists()


def test_all_ledgers_of_a_process_share_one_audit_hook(tg, monkeypatch):
    """None can be taken out again, each slows every import, `open` and `id`; the newest ledger is told."""
    hooks = []
    monkeypatch.setattr(tg.Ledger, "_hook", staticmethod(functools.cache(tg.Ledger._hook.__wrapped__)))
    monkeypatch.setattr(sys, "addaudithook", hooks.append)
    ledgers = [tg.Ledger(tg.CPU) for _ in range(5)]
    (hook,) = hooks
    for event in ("open", "builtins.id", "socket.connect"):
        hook(event, ("/name", "/name", os.O_RDONLY))
    assert [[*ledger.accesses] for ledger in ledgers] == [[]] * 4 + [
        [("between stages", "read", "/name"), ("between stages", "network", "socket.connect /name")]
    ]
