"""Pre-quantisation TTT (experiments/prequant_ttt.py): what it trains, and that no tool takes it for legal."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm
from test_ppm import tiny_model
from test_presets import plain_data  # noqa: F401 - a fixture
from test_smoke import environment

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT / "tools")]

import prequant_ttt as prequant  # noqa: E402

import audit  # noqa: E402
import runs  # noqa: E402
from reproducing.submission import SubmissionError, check_submittable  # noqa: E402

SCRIPT = ROOT / "experiments" / "prequant_ttt.py"


def experiment(folder: Path, *arguments: str, **settings: object) -> subprocess.CompletedProcess:
    settings = {"ARTIFACT_DIR": "run", "DATA_PATH": "data", **settings}
    return warm.run(SCRIPT, folder, environment(**settings), *arguments)


# -- the stage


def stream(tg, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 40, (count,), generator=generator, dtype=torch.int32)
    tokens[::37] = tg.BOS
    return tokens


def options(**changes) -> argparse.Namespace:
    return argparse.Namespace(**({"epochs": 6, "lr": 5e-4, "frozen": 2} | changes))


def changed(before: dict, model) -> dict[str, torch.Tensor]:
    """Where each parameter has changed."""
    return {name: before[name] != parameter for name, parameter in model.named_parameters()}


def test_prequant_leaves_the_first_blocks_alone(tg):
    model = tiny_model(tg, global_ttt_batch_seqs=2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    steps = prequant.train_on_validation(
        model, stream(tg, 100), model.cfg, options(frozen=2, epochs=2), looping=True, ranks=tg.CPU
    )
    assert steps == 2 * 3, "6 windows of 16, two a step, the tail left out"
    moved, layers = changed(before, model), model.cfg.num_layers
    for name in ("qo_bank", "kv_bank"):
        assert moved[name].flatten(1).any(1).tolist() == [False, False, True] * 2, name
    for name in ("mlp_up_bank", "mlp_down_bank", "parallel_post_lambdas", "parallel_resid_lambdas"):
        assert moved[name].flatten(1).any(1).tolist() == [False, False, True], name
    assert layers == 3 and moved["tok_emb.weight"].any() and moved["smear_gate.weight"].any()
    in_blocks = {name: bool(where.any()) for name, where in moved.items() if name.startswith("blocks.")}
    assert in_blocks == {name: name.startswith("blocks.2.") for name in in_blocks} and len(in_blocks) >= 9


def test_prequant_frees_the_model_again(tg):
    model = tiny_model(tg, global_ttt_batch_seqs=2)
    prequant.train_on_validation(
        model, stream(tg, 60), model.cfg, options(frozen=3, epochs=1), looping=True, ranks=tg.CPU
    )
    model.losses(torch.arange(2, 18)[None], torch.arange(3, 19)[None], looping=True).sum().backward()
    assert model.qo_bank.grad[:2].abs().sum() > 0, "a hook is left over"


def test_prequant_is_adamw_with_a_cosine(tg):
    """Against a loop written out: one window a step, no frozen block, gradients clipped."""
    tokens = stream(tg, 16 * 3 + 1 + 5)
    model, plain = (tiny_model(tg, global_ttt_batch_seqs=1) for _ in range(2))
    prequant.train_on_validation(
        model, tokens, model.cfg, options(frozen=0, epochs=2, lr=1e-2), looping=True, ranks=tg.CPU
    )
    optimizer = torch.optim.AdamW(plain.parameters(), 1e-2, weight_decay=0.0)
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 + torch.cos(torch.tensor(step / 6 * torch.pi, dtype=float)).item()) / 2
        row = tokens[step % 3 * 16 :][:17]
        x, y, segments = tg.packed_row(row, 16)
        optimizer.zero_grad()
        plain.losses(x, y, segments, looping=True).mean().backward()
        for parameter in plain.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)


# -- the run


@pytest.fixture(scope="module")
def work(plain_data) -> Path:  # noqa: F811
    """Folder with plain data and a run of PR #1485's system at tiny size: the score is of sliding windows."""
    folder = plain_data.parent
    settings = {"PRESET": "pr1485", "EVAL_STRIDE": 16, "VAL_LOSS_EVERY": 0, "AUDIT": 0}
    process = experiment(folder, "--epochs", "3", "--lr", "2e-3", ALLOW_ILLEGAL=1, **settings)
    (folder / "console.txt").write_text(process.stdout)
    assert process.returncode == 3, process.stderr
    return folder


def test_prequant_says_first_and_last_that_it_is_not_legal(work):
    lines = (work / "console.txt").read_text().splitlines()
    assert lines[0] == prequant.NOTICE and lines[-1] == f"notice text:{prequant.NOTICE}"
    assert lines[-2].startswith("final val_bpb:") and lines[-2].endswith("legal:False")
    log = next((work / "run" / "logs").glob("*.txt")).read_text()
    assert log.splitlines()[-1] == lines[-1]


def test_prequant_result_is_not_legal_and_knows_the_text(work):
    result = json.loads((work / "run" / "result.json").read_text())
    assert result["legal"] is False and result["broken_limits"] == [prequant.NOTICE]
    assert result["final_stage"] == "sliding"
    stages = result["stages"]
    assert stages["prequant_ttt"]["val_bpb"] < 0.95 * stages["prequant"]["val_bpb"], "it has learnt nothing"
    assert stages["quantised"]["val_bpb"] < 0.95 * stages["prequant"]["val_bpb"], "the artifact has not"
    facts = result["prequant_ttt"]
    assert (facts["epochs"], facts["lr"], facts["frozen_blocks"]) == (3, 2e-3, 2) and facts["steps"] > 3


def test_prequant_fails_the_audit_on_c3(work, capsys):
    judged = audit.Audit(work / "run")
    verdicts = audit.judge(judged, ["A1", "T1", "S1", "S2", "D3", "R2"])
    judged.close()
    statuses = {name: verdict.status for name, verdict in verdicts.items()}
    failed = {"T1", "D3"}  # and the rest, which has no part in it, is judged as ever
    assert {name for name, status in statuses.items() if status == "FAIL"} == failed
    for name in ("T1", "D3"):
        assert "trained on before it was scored" in verdicts[name].evidence
    assert audit.main([str(work / "run"), "--only", "D3"]) == 1
    assert "C3: scored before it is trained on" in capsys.readouterr().out


def test_prequant_audit_passes_the_same_ledger_without_the_illegal_updates(work, tmp_path):
    """It is these records that the rule goes by: without them the two checks have nothing against the run."""
    shutil.copytree(work / "run", tmp_path / "run")
    path = tmp_path / "run" / "ledger.jsonl"
    lines = path.read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["kind"] != "adapt"]
    assert len(lines) - len(kept) == 3, "one record an epoch"
    path.write_text("\n".join(kept) + "\n")
    judged = audit.Audit(tmp_path / "run", data=work / "data")
    verdicts = audit.judge(judged, ["T1", "D3"])
    judged.close()
    assert not any("trained on before" in verdict.evidence for verdict in verdicts.values())
    assert verdicts["T1"].status == "VERIFIED"


def test_prequant_is_refused_by_the_submission_tools(work, tmp_path):
    """By what its result says; and still when the word for it is taken out."""
    for name in (None, "illegal"):
        shutil.copytree(work / "run", tmp_path / str(name))
        path = tmp_path / str(name) / "result.json"
        result = json.loads(path.read_text())
        result.pop(name, None)
        path.write_text(json.dumps(result))
        with pytest.raises(SubmissionError, match="not legal|NOT A LEGAL SCORE"):
            check_submittable([runs.read(tmp_path / str(name))])


@pytest.mark.usefixtures("quick_packing")
def test_prequant_starts_from_a_trained_model(work, monkeypatch, capsys):
    settings = {"QUANTIZE_ONLY": 1, "MODEL_PATH": "run/final_model.pt", "ARTIFACT_DIR": "again"}
    settings |= {"PRESET": "pr1485", "SLIDING_WINDOW_ENABLED": 0, "DATA_PATH": "data", "ALLOW_ILLEGAL": 1}
    monkeypatch.chdir(work)
    assert prequant.main(["--epochs", "1", "--lr", "0"], environment(**settings)) == 3, capsys.readouterr()
    stages = json.loads((work / "again" / "result.json").read_text())["stages"]
    assert stages["prequant_ttt"]["val_loss"] == stages["prequant"]["val_loss"], "a rate of 0 changes nothing"
    first = json.loads((work / "run" / "result.json").read_text())["stages"]
    assert stages["prequant"]["val_loss"] == first["prequant"]["val_loss"]


@pytest.mark.parametrize(
    ("arguments", "settings", "reason"),
    [
        ([], {}, "ALLOW_ILLEGAL='': must be 1 here"),
        ([], {"ALLOW_ILLEGAL": "yes"}, "ALLOW_ILLEGAL='yes': must be 1 here"),
        (["--epochs", "0"], {"ALLOW_ILLEGAL": "1"}, "--epochs 0: must be at least 1"),
        (["--lr", "nan"], {"ALLOW_ILLEGAL": "1"}, "--lr nan: must be a number, at least 0"),
        (["--frozen", "5"], {"ALLOW_ILLEGAL": "1"}, "--frozen 5: must be at most NUM_LAYERS=4"),
        (["--frozen", "-1"], {"ALLOW_ILLEGAL": "1"}, "--frozen -1: must be at least 0"),
        ([], {"ALLOW_ILLEGAL": "1", "PREQUANT_ONLY": "1"}, "PREQUANT_ONLY=1: must be 0 here"),
        ([], {"ALLOW_ILLEGAL": "1", "TTT_EVAL_ONLY": "1"}, "TTT_EVAL_ONLY=1: must be 0 here"),
        ([], {"ALLOW_ILLEGAL": "1", "PREFLIGHT_ONLY": "1"}, "PREFLIGHT_ONLY=1: must be 0 here"),
        ([], {"ALLOW_ILLEGAL": "1", "PRESET": "one_gpu"}, "CHECKPOINT_SECONDS=300: must be 0 here"),
        ([], {"ALLOW_ILLEGAL": "1", "NUM_LAYER": "4"}, "NUM_LAYER='4': no such setting"),
        (["--what"], {"ALLOW_ILLEGAL": "1"}, "unrecognized arguments: --what"),
    ],
)
def test_prequant_mistakes_are_one_line_and_leave_nothing(
    tmp_path, capsys, monkeypatch, arguments, settings, reason
):
    monkeypatch.chdir(tmp_path)
    assert prequant.main(arguments, environment(**settings)) == 2
    error = capsys.readouterr().err
    assert error.startswith("prequant_ttt.py: error: ") and reason in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == []
