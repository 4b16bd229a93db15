"""The record folder: what it holds, that it agrees with itself, and that every changed digit is found."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_smoke as smoke
from test_reproduce import call, edit_json

import prepare_caseops_data as prepare
from harness.settings import PRESETS
from reproducing import checking, folder, techniques
from reproducing.submission import SubmissionError
from runs import read
from scripts import sha256_of

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (42, 314)
NAME = "2026-04-30_Demo_of_PR1851"


def run_folder(place: Path, seed: int) -> Path:
    """The folder that the committed demo run of a seed left; its counted code is of the right size only."""
    stem = ROOT / "logs" / f"demo_seed{seed}_cpu"
    result = json.loads(stem.with_suffix(".json").read_text())
    run = place / f"seed{seed}"
    (run / "logs").mkdir(parents=True)
    shutil.copy(stem.with_suffix(".json"), run / "result.json")
    shutil.copy(stem.with_suffix(".txt"), run / "logs" / f"{result['run']}.txt")
    audit = json.loads(Path(f"{stem}_audit.json").read_text())
    del audit["files"]  # tests change what it judged
    (run / "audit.json").write_text(json.dumps(audit))
    (run / "train_gpt.packed.py").write_bytes(
        b"#" * json.loads((run / "result.json").read_text())["code_bytes"]
    )
    return run


@pytest.fixture
def two_runs(tmp_path, monkeypatch) -> list[Path]:
    """Two seeds of the demo, and the tokenizer of their data."""
    model = tmp_path / "fineweb.model"
    model.write_bytes(b"a tokenizer")
    monkeypatch.setattr(folder, "tokenizer_of", lambda record: model)
    return [run_folder(tmp_path, seed) for seed in SEEDS]


def options(place: Path, runs: list[Path], *more: str) -> list[str]:
    who = ["--author", "A. Author", "--github-id", "author1"]
    return ["--from-logs", *runs, "--submission", "--folder", place, *who, *more]


@pytest.fixture
def made(tmp_path, two_runs, capsys) -> Path:
    """A record folder, copied away from where it was made."""
    first = tmp_path / "track_10min_16mb" / NAME
    code, out, err = call(*options(first, two_runs, "--base", "pr1851"), capsys=capsys)
    assert (code, err) == (2, err) and "scored 151,074,499 bytes" in err and not first.exists()
    code, out, err = call(*options(first, two_runs), capsys=capsys)
    assert (code, err) == (0, "") and "its place is not track_10min_16mb" in out
    return Path(shutil.move(first, tmp_path / "elsewhere" / NAME))


def wrong(place: Path) -> list[str]:
    return [str(f) for f in checking.check_folder(place) if f.status == checking.WRONG]


def test_what_a_folder_holds(made, capsys):
    files = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()}
    evidence = {f"train_seed{seed}{end}" for seed in SEEDS for end in (".log", ".json", "_audit.json")}
    parts = {f"dataprep/{path.name}" for path in (ROOT / "dataprep").glob("*.py")}
    parts |= {
        "dataprep/words.c",
        "systems/__init__.py",
        "systems/console.py",
        "systems/early.py",
        "systems/layout.py",
        "lossless_caps.py",
        "prepare_caseops_data.py",
    }
    parts |= {"requirements.txt", "tokenizers/fineweb.model"}
    assert files == {"README.md", "submission.json", "train_gpt.py"} | evidence | parts
    told = json.loads((made / "submission.json").read_text())
    assert all(told[name] not in ("", None, []) for name in folder.EXPECTED)
    assert (told["date"], told["name"]) == ("2026-04-30", "Demo of PR1851")
    records = [read(made / f"train_seed{seed}.log") for seed in SEEDS]
    assert told["bytes_total"] == max(record.artifact_bytes for record in records)
    text = (made / "README.md").read_text()
    checks = json.loads((made / f"train_seed{SEEDS[0]}_audit.json").read_text())["checks"]
    for part in (
        "# Demo of PR1851\n",
        f"VERIFIED, {checks['D1']['evidence'].partition(' bit-')[0]}",
        r"\|sum - 1\|",
        "PR #1729",
    ):
        assert part in text
    code, out, _ = call("--check-folder", made, capsys=capsys)
    assert code == 0 and f"README.md and {len(files) - 2} files" in out


def test_a_result_that_its_log_contradicts_is_found_without_checksums(made):
    told = json.loads((made / "submission.json").read_text())
    (made / "submission.json").write_text(json.dumps({k: v for k, v in told.items() if k != "files"}))
    edit_json(made / "train_seed42.json", "artifact_bytes", 7)
    assert any("says artifact_bytes 7, its log" in line for line in wrong(made))


def test_a_folder_of_ours_stays_one_without_its_checksums(made):
    path = made / "submission.json"
    whole = path.read_text()
    (made / "tokenizers" / "fineweb.model").write_bytes(b"another tokenizer")
    for lost in ("files", "script_sha256"):
        told = json.loads(whole)
        del told[lost]
        path.write_text(json.dumps(told))
        assert any(line.startswith("DISAGREES       made again") for line in wrong(made)), lost


TOLD = [("val_loss",), ("val_loss_std",), ("bytes_total",), ("bytes_code",), ("bytes_model",)]
TOLD += [("seed_results", "314", "stages", "prequant")]
NAMES = ("val_bpb", "val_loss", "artifact_bytes", "code_bytes", "model_bytes", "steps", "legal")
NAMES += ("train_seconds", "calibrate_seconds", "eval_seconds")
TOLD += [("seed_results", "314", name) for name in NAMES]


def test_without_checksums_each_figure_is_compared_with_the_results(made):
    """Of a folder that says no more that it is ours; and that it is not made again is said."""
    path, readme = made / "submission.json", made / "README.md"
    readme.write_text(readme.read_text().replace(folder.BEGIN, ""))
    lost = ("files", "script_sha256", "seeds")
    told = {name: value for name, value in json.loads(path.read_text()).items() if name not in lost}
    told["seed_results"]["42"]["eval_seconds"] = round(told["seed_results"]["42"]["eval_seconds"], 1)
    path.write_text(json.dumps(told))
    assert wrong(made) == []
    notes = [str(f) for f in checking.check_folder(made) if f.status == checking.NOTE]
    assert any("made again: not done, for submission.json has no checksums" in note for note in notes)
    for places in TOLD:
        value = told
        for place in places:
            value = value[place]
        edit_json(path, *places, not value if value is True else value + 1)
        found = [
            line
            for line in wrong(made)
            if f" {places[-1]} " in line and ("result" in line or "largest" in line)
        ]
        assert found, places
        path.write_text(json.dumps(told))


def test_another_script_in_a_log_is_found_and_a_file_without_checksum_named(made):
    (made / "harness").mkdir()
    (made / "harness" / "mine.py").write_text("")
    log = made / "train_seed42.log"
    assert wrong(made) == []
    notes = [f.detail for f in checking.check_folder(made) if f.status == checking.NOTE]
    assert "submission.json has no checksum of harness/mine.py" in notes
    log.write_text(log.read_text().replace("\nimport ", "\nimport  ", 1))
    for key in (("files", log.name), ("seed_results", "42", "log_sha256")):
        edit_json(made / "submission.json", *key, sha256_of(log))
    assert any("train_seed42.json: its log holds no train_gpt.py" in line for line in wrong(made))


def with_other_digit(text: str, at: int) -> str:
    return f"{text[:at]}{(int(text[at]) + 1) % 10}{text[at + 1 :]}"


def test_every_changed_digit_is_found(made):
    """In every text of the folder, and in several places of README.md and submission.json."""
    tried = 0
    for path in sorted(made.glob("*.*")):
        text = path.read_text(encoding="utf-8")
        begin = text.index("<!--") if path.name == "README.md" else 0  # before it stands what a person wrote
        digits = [found.start() for found in re.finditer(r"\d", text) if found.start() > begin]
        if path.name == "submission.json":
            digits = [
                at
                for at in digits
                if not re.search(r'"(name|github_id)": .*$', text[:at].rpartition("\n")[2])
            ]
        places = 5 if path.name in ("README.md", "submission.json") else 1
        for at in digits[len(digits) // (2 * places) :: len(digits) // places + 1]:
            path.write_text(with_other_digit(text, at), encoding="utf-8")
            assert wrong(made), f"{path.name}: {text[at - 30 : at + 10]!r}"
            tried += 1
        path.write_text(text, encoding="utf-8")
    assert tried > 12 and wrong(made) == []


def test_a_folder_is_written_again_and_keeps_what_was_written_by_hand(made, two_runs, capsys):
    readme = made / "README.md"
    readme.write_text(readme.read_text().replace("# Demo of PR1851\n", "# Demo\n\nMine.\n"))
    (made / "picture.png").write_bytes(b"1")
    assert wrong(made) == []
    assert call(*options(made, two_runs), capsys=capsys)[0] == 0
    assert "# Demo\n\nMine.\n" in readme.read_text() and wrong(made) == []
    code, _, err = call(*options(made, two_runs[:1]), capsys=capsys)
    assert code == 2 and "train_seed314.log: of none of these runs" in err and wrong(made) == []
    readme.write_text("another's")
    code, _, err = call(*options(made, two_runs), capsys=capsys)
    assert code == 2 and "README.md: needs the lines" in err and readme.read_text() == "another's"


def test_a_run_without_commit_is_said_to_be_of_an_unknown_one(made, two_runs, capsys):
    for run in two_runs:
        edit_json(run / "result.json", "environment", "commit", None)
    assert call(*options(made, two_runs), capsys=capsys)[0] == 0
    assert "; commit unknown." in (made / "README.md").read_text() and wrong(made) == []


def test_files_of_something_else_are_not_written_over(tmp_path, two_runs, capsys):
    place = tmp_path / NAME
    place.mkdir()
    for name in ("train_gpt.py", "submission.json", "train_seed42.log"):
        (place / name).write_text("another's")
        code, _, err = call(*options(place, two_runs), capsys=capsys)
        assert (code, [*place.iterdir()]) == (2, [place / name]) and f"{name}: not written by" in err
        assert (place / name).read_text() == "another's"
        (place / name).unlink()


def test_what_was_interrupted_is_written_to_its_end(tmp_path, two_runs, capsys, monkeypatch):
    place, publish = tmp_path / NAME, folder.submission.publish
    monkeypatch.setattr(folder.submission, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert call(*options(place, two_runs), capsys=capsys)[0] == 130 and (place / "train_gpt.py").is_file()
    monkeypatch.setattr(folder.submission, "publish", publish)
    assert call(*options(place, two_runs), capsys=capsys)[0] == 0 and wrong(place) == []


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--submission", "--folder", "2026-04-30_\x1b", "--author", "a", "--github-id", "a"], "be printed"),
        (["--submission", "--folder", NAME, "--author", "a\nb", "--github-id", "a"], "--author 'a\\nb'"),
        (["--folder", NAME], "--folder: is for --submission"),
        (["--submission", "--folder", NAME, "--github-id", "a"], "--author: missing"),
        (["--submission", "--folder", NAME, "--author", "a", "--github-id", " "], "--github-id: missing"),
        (
            ["--submission", "--folder", "2026-02-30_X", "--author", "a", "--github-id", "a"],
            "YYYY-MM-DD_Name",
        ),
        (["--check-folder", "nowhere"], "--check-folder nowhere: no such folder"),
    ],
)
def test_mistakes_are_said_before_a_run_starts(capsys, arguments, wanted):
    seeds = [] if "--check-folder" in arguments else ["--seeds", "1"]
    code, out, err = call(*seeds, *arguments, "--", "no-such-program", "train_gpt.py", capsys=capsys)
    assert (code, out, err.count("\n")) == (2, "", 1) and wanted in err


def test_runs_that_counted_other_code_make_no_folder(two_runs):
    packed = two_runs[1] / "train_gpt.packed.py"
    records = [read(run) for run in two_runs]
    for code, wanted in (
        (b"!" * packed.stat().st_size, "train_gpt.packed.py differ"),
        (b"short", "has 5 bytes, the result says"),
        (None, "holds no train_gpt.packed.py"),
    ):
        packed.unlink() if code is None else packed.write_bytes(code)
        with pytest.raises(SubmissionError, match=wanted):
            folder.counted_script(records)


def test_data_are_prepared_from_a_copy_of_the_folder(two_runs, tmp_path):
    """By its own script, modules and tokenizer, to the same bytes."""
    away = tmp_path / "away"
    texts = [text for text in smoke.documents(40) if len(text) > 20]
    model = prepare.train_tokenizer(texts, smoke.VOCAB)
    docs = tmp_path / "docs.jsonl"
    docs.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name, data in folder.parts_of([read(run) for run in two_runs]).items():
        (away / name).parent.mkdir(parents=True, exist_ok=True)
        (away / name).write_bytes(model if name.startswith("tokenizers/") else data)
    arguments = ["--docs", docs, "--sp", "tokenizers/fineweb.model", "--val-docs", "5", "--out", "data"]
    command = [sys.executable, "prepare_caseops_data.py", *arguments, "--workers", "1"]
    process = subprocess.run(
        command, cwd=away, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    named = [prepare.make_document(text, f"document {i}") for i, text in enumerate(texts)]
    tokenizer = prepare.make_tokenizer("fineweb.model", model)
    prepare.prepare(named, tokenizer, tmp_path / "here", 5)
    for path in (tmp_path / "here").glob("*.*"):
        assert (away / "data" / path.name).read_bytes() == path.read_bytes(), path.name


# -- other people's folders


@pytest.fixture
def published(published_logs, tmp_path) -> Path:
    """A folder like that of PR #1855, with its logs."""
    place = tmp_path / "2026-04-27_Stack_1.0611"
    place.mkdir()
    results, rows = {}, []
    for seed in (42, 0, 1234):
        shutil.copy(published_logs / f"pr1855_seed{seed}.log", place / f"train_seed{seed}.log")
        log = read(place / f"train_seed{seed}.log")
        results[str(seed)] = {"val_bpb": log.val_bpb, "artifact_bytes": log.artifact_bytes}
        rows.append(f"| {seed} | **{log.val_bpb:.5f}** | {log.artifact_bytes:,} |")
    told = {name: "x" for name in folder.EXPECTED} | {"date": "2026-04-27", "seeds": [42, 0, 1234]}
    told |= {"val_bpb": 1.06108, "val_bpb_std": 0.0009, "bytes_total": 15907550, "seed_results": results}
    (place / "submission.json").write_text(json.dumps(told))
    (place / "README.md").write_text("\n".join(["val_bpb: 1.0611 (~15.9 MB), of PR #1797", *rows]))
    (place / "train_gpt.py").write_bytes(b"#" * 31_999)
    return place


def replaced(name: str, old: str, new: str):
    def change(place: Path) -> None:
        text = (place / name).read_text()
        assert old in text
        (place / name).write_text(text.replace(old, new))

    return change


CHANGES = {
    "mean: val_bpb 1.06118": replaced("submission.json", "1.06108", "1.06118"),
    "spread: val_bpb_std 0.0008": replaced("submission.json", "0.0009", "0.0008"),
    "seed 0: val_bpb 1.06124614": replaced("submission.json", "1.06124613", "1.06124614"),
    "seed 42: artifact_bytes 15897250": replaced("submission.json", "15897259", "15897250"),
    "bytes: bytes_total 15901919, the largest artifact is 15907550": replaced(
        "submission.json", '"bytes_total": 15907550', '"bytes_total": 15901919'
    ),
    "fields: missing or empty: author": replaced("submission.json", '"author": "x"', '"author": ""'),
    "date: submission.json says April": replaced("submission.json", "2026-04-27", "April"),
    "README: seed 42 1.05989454 is not in it": replaced("README.md", "1.05989", "1.05998"),
    "README: seed 1234: 15907551 bytes": replaced("README.md", "15,907,550", "15,907,551"),
    "code: train_gpt.py has 3 bytes": lambda place: (place / "train_gpt.py").write_bytes(b"abc"),
    "files: missing: README.md": lambda place: (place / "README.md").unlink(),
    "seed 1234: no log": lambda place: (place / "train_seed1234.log").unlink(),
    "train_seed0.log ran with SEED=42": lambda place: shutil.copy(
        place / "train_seed42.log", place / "train_seed0.log"
    ),
    f"val_bpb {10**400}": replaced("submission.json", "1.06108", str(10**400)),
    "seeds: submission.json names no seed: ['9999": replaced(
        "submission.json", "[42, 0, 1234]", f'["{"9" * 5000}"]'
    ),
    "seeds: submission.json names no seed": replaced("submission.json", "[42, 0, 1234]", '"three"'),
    "bytes: at most 16000001, limit 16000000": replaced("submission.json", "15907550", "16000001"),
    "fields: submission.json is not a JSON object": replaced("submission.json", "{", "["),
    "val_bpb 1E-999999999": replaced("submission.json", "1.06108", "1e-999999999"),
    "JSON object (maximum recursion": replaced("submission.json", '"x"', "[" * 100_000 + "]" * 100_000),
    "object (the name 'val_bpb' stands there twice)": replaced(
        "submission.json", '"val_bpb_std":', '"val_bpb": 1.1, "val_bpb_std":'
    ),
}


def test_a_published_folder_agrees_with_itself(published):
    found = {(f.status, f.check) for f in checking.check_folder(published)}
    assert wrong(published) == []
    assert {(checking.NOTE, "spread"), (checking.GOOD, "code"), (checking.GOOD, "seed 1234")} <= found


@pytest.mark.parametrize("wanted", CHANGES)
def test_what_disagrees_is_named(published, wanted, capsys):
    CHANGES[wanted](published)
    code, out, _ = call("--check-folder", published, capsys=capsys)
    lines = [line for line in out.splitlines() if line.startswith(checking.WRONG)]
    assert code == 1 and any(wanted in line for line in lines), out


@pytest.mark.parametrize(
    ("score", "status"),
    [(1.06108, checking.GOOD), (1.06125, checking.NOTE), (1.06209, checking.NOTE), (1.06, checking.WRONG)],
)
def test_without_seeds_the_score_is_that_of_the_logs(published, score, status):
    """Their mean, or that of one, which is said."""
    told = {key: "x" for key in folder.REQUIRED} | {"date": "2026-04-27T10:00:00Z", "val_bpb": score}
    (published / "submission.json").write_text(json.dumps(told))
    found = checking.check_folder(published)
    assert [f.status for f in found if f.check == "mean"] == [status]


def test_what_rests_on_a_log_that_is_not_understood_cannot_be_told(published, capsys):
    (published / "train_seed0.log").write_text("another format\n")
    found = checking.check_folder(published)
    assert wrong(published) == []
    assert any((f.status, f.check) == (checking.UNKNOWN, "seed 0") for f in found)
    assert call("--check-folder", published, capsys=capsys)[0] == 1  # for a score is not proved


def test_each_preset_has_its_techniques(tg):
    """No technique asks for a setting that is not there."""
    told = {name: tg.read_settings({"PRESET": name}).as_env() for name in PRESETS}
    texts = {name: "\n".join(techniques.technique_table(settings)) for name, settings in told.items()}
    record, windows = texts["pr1851"], texts["pr1493"]
    assert "layers 3 to 5 repeated 2 x from 35% of training | [PR #1344]" in record
    for part, on in (("CaseOps", True), ("masked at document starts", True), ("Score-first SGD", False)):
        assert (part in record, part in windows) == (on, not on)
    assert "8 s of the training time" in texts["pr1868"] and "ANS" in texts["pr1855"]
    assert any("[PR #1797]" in line and "LQER" in line for line in techniques.credits(told["pr1851"]))
