"""The reader of runs and logs: published formats, our own, and every way in which a log can be incomplete."""

import json
import random
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import runs  # noqa: E402
from reproducing.bases import BASES, FINEWEB_BYTES  # noqa: E402
from reproducing.seeds import Experiment  # noqa: E402
from scripts import script_hash, sha256_of  # noqa: E402

DEMO = ROOT / "logs" / "demo_seed42_cpu.txt"
PR1868 = ["pr1851_seed42", "pr1868_seed314", "pr1868_seed1234"]  # a support record of PR #1851
LOGS = {
    "pr1493": ["pr1493_seed314", "pr1493_seed42", "pr1493_seed999"],
    "pr1667": ["pr1667_seed0", "pr1667_seed1337", "pr1667_seed42"],
    "pr1851": ["pr1851_seed42"],
    "pr1868": PR1868,
    "pr1868_rerun": [f"pr1868_rerun_seed{seed}" for seed in (42, 314, 1234)],
    "pr1855": [f"pr1855_seed{seed}" for seed in (42, 0, 1234)],
}
# Steps, three scores, bytes and seconds of the evaluation as their descriptions print them.
DESCRIBED = {
    "pr1851_seed42": (4900, 1.06490, 1.07406, 1.06128, 15_952_086, 519.5),
    "pr1868_seed314": (4960, 1.06468, 1.07359, 1.06087, 15_952_419, 525.6),
    "pr1855_seed0": (4932, 1.06545, 1.07407, 1.06125, 15_900_947, 455.1),
    "pr1855_seed1234": (4917, 1.06597, 1.07478, 1.06209, 15_907_550, 470.0),
    "pr1667_seed42": (4843, 1.07227, 1.08262, 1.07221, 15_936_229, 228.8),
    "pr1493_seed42": (4550, 1.08735, 1.09970, 1.08079, 15_991_930, 366.5),
}


@pytest.fixture
def published(published_logs):
    """Function: name of a published log -> what was read of it."""
    return lambda name: runs.read(published_logs / f"{name}.log")


@pytest.mark.parametrize("name", DESCRIBED)
def test_a_published_log_says_what_its_description_says(published, name):
    record = published(name)
    scores = [round(record.stages[stage]["val_bpb"], 5) for stage in ("prequant", "quantised", "ttt")]
    told = (record.steps, *scores, record.artifact_bytes, round(record.eval_seconds, 1))
    assert told == DESCRIBED[name]
    assert record.seed == int(name.partition("_seed")[2]) and record.final_stage == "ttt"
    assert record.form.startswith("pr") and {"script hash", "data hash", "hardware"} <= set(record.missing)
    assert record.model_bytes + record.code_bytes == record.artifact_bytes


def test_the_sliding_score_of_pr1493_is_kept_beside_the_final_one(published):
    record = published("pr1493_seed42")
    assert record.stages["sliding"]["val_bpb"] == 1.08286335 and record.val_bpb == 1.08079352


def test_calibration_counts_as_training(published):
    """The runs that keep 0.5 s for it exceed 600 s, those that keep 8 s do not (why PR #1868 ran again)."""
    record = published("pr1851_seed42")
    assert (record.train_seconds, record.calibrate_seconds) == (599.623, 3.5)
    assert record.legal is False and "calibration took 603.123 s" in record.broken_limits[0]
    assert published("pr1868_rerun_seed42").legal is True


def test_settings_curves_and_versions_are_read(published):
    record = published("pr1868_rerun_seed314")
    assert record.settings["GPTQ_RESERVE_SECONDS"] == 8.0 and record.settings["TTT_ENABLED"] is True
    assert record.environment["torch"] == "2.11.0+cu128" and "versions" not in record.missing
    steps = [event["step"] for event in record.events if event["stage"] == "train"]
    assert steps[:6] == [1, 2, 3, 4, 5, 500] and steps[-1] == 4500
    assert [e["val_bpb"] for e in record.events if e["stage"].startswith("step_")] == [1.1108, 1.0750]


@pytest.mark.parametrize("name", LOGS)
def test_the_built_in_bases_are_the_logs(published, name):
    records = [published(log) for log in LOGS[name]]
    assert [(r.seed, r.val_loss, r.val_bpb) for r in records] == list(BASES[name].scores)
    assert all(abs(r.text_bytes / FINEWEB_BYTES - 1) < 3e-5 for r in records)


def test_the_first_50_000_documents_have_the_known_bytes(published):
    assert all(abs(published(name).text_bytes - FINEWEB_BYTES) < 1 for name in PR1868)


def cuts(size: int, count: int) -> list[int]:
    """Places to cut a file: each third of its last 160 characters but the line's end, and some before."""
    drawn = random.Random(0).sample(range(1, size - 1), count)
    return sorted({*range(size - 160, size - 1, 3), size - 2, *drawn})


@pytest.mark.parametrize("name", ["pr1493_seed42", "pr1667_seed42", "pr1851_seed42", "demo"])
def test_a_log_cut_off_anywhere_is_refused(published_logs, tmp_path, name):
    """No beginning of a log passes for a whole one, and the one line of the error names the file."""
    whole = DEMO if name == "demo" else published_logs / f"{name}.log"
    text, path = whole.read_text(encoding="utf-8"), tmp_path / "cut.txt"
    for size in cuts(len(text), 60):
        path.write_text(text[:size], encoding="utf-8")
        with pytest.raises(runs.ReadError) as error:
            runs.read_log(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, content, wanted",
    [
        ("empty.txt", "", "empty"),
        ("blank.log", "\n\n", "empty"),
        ("other.txt", "step 1 loss 2\n", "neither a log of train_gpt.py nor a published one"),
        ("bytes.log", "\0\1\2\xff", "neither a log"),
        ("list.json", "[1]", "not a JSON object"),
        ("half.json", '{"stages": {', "cut off"),
        ("twice.json", '{"stages": {}, "stages": {"ttt": {}}}', "the name 'stages' stands there twice"),
        ("other.json", '{"stages": 3}', "not the result of a run"),
        (
            "number.json",
            '{"stages": {"ttt": 3}, "settings": {}, "final_stage": "ttt"}',
            "not the result of a run",
        ),
        ("foreign.json", '{"stages": {"ttt": {}}, "final_stage": "ttt"}', "not the result of a run"),
    ],
)
def test_what_is_no_run_is_said(tmp_path, name, content, wanted):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(runs.ReadError, match=wanted):
        runs.read(tmp_path / name)


def test_missing_files_and_unfinished_runs(tmp_path):
    with pytest.raises(runs.ReadError, match="nowhere.log: cannot be read"):
        runs.read(tmp_path / "nowhere.log")
    (tmp_path / "metrics.jsonl").write_text('{"stage": "train", "step": 1}\n{"stage": "tr')
    with pytest.raises(runs.Unfinished, match="has not ended"):
        runs.read(tmp_path)
    assert runs.read_events(tmp_path / "metrics.jsonl") == [{"stage": "train", "step": 1}]
    (tmp_path / "metrics.jsonl").write_text('{"stage": "train", "step": 1, "step": 2}\n')
    with pytest.raises(runs.ReadError, match="line 1 is not JSON .the name 'step' stands there twice"):
        runs.read_events(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text(f"{'[' * 9999}{']' * 9999}\n{{}}\n")
    with pytest.raises(runs.ReadError, match="metrics.jsonl: line 1 is not JSON"):
        runs.read_events(tmp_path / "metrics.jsonl")


def test_our_log_alone_tells_the_same_as_its_result():
    alone, both = runs.read_log(DEMO), runs.read(DEMO)
    assert (alone.form, both.form) == ("log", "run") and both == runs.read(DEMO.with_suffix(".json"))
    for name in ("seed", "final_stage", "artifact_bytes", "code_bytes", "model_bytes", "legal"):
        assert getattr(alone, name) == getattr(both, name), name
    assert alone.val_bpb == pytest.approx(both.val_bpb, rel=5e-6)
    assert alone.compared_settings == both.compared_settings
    assert alone.script_sha256 == both.script_sha256
    assert {"steps", "digits beyond six"} <= set(alone.missing) and both.steps == both.result["steps"]
    assert both.audit["verdict"] == "VERIFIED" and "FAIL" not in both.audit["counts"]


def copied(place: Path) -> tuple[Path, dict]:
    """A copy of the committed demo run, and what its audit says."""
    for end in (".json", ".txt", "_audit.json"):
        shutil.copy(DEMO.with_name(f"{DEMO.stem}{end}"), place)
    return place / DEMO.with_suffix(".json").name, json.loads((place / f"{DEMO.stem}_audit.json").read_text())


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "FAIL"},
        {"counts": {"VERIFIED": 36}},
        {"headline": "VERIFIED: val_bpb 1.000000 is the score of this artifact"},
        {"val_bpb": 1.0},
        {"repository_script_is_the_same": False},
        {"strange_files": ["train_gpt.py"]},
        {"strange_files": None},
        {"checks": {}},
        {"checks": {"A1": "VERIFIED"}},
        {"checks": [7]},
    ],
)
def test_an_audit_whose_verdict_is_not_what_its_rows_come_to_is_as_none(tmp_path, change):
    result, told = copied(tmp_path)
    assert runs.read(result).audit == told and not runs.read(result).notices
    (tmp_path / f"{DEMO.stem}_audit.json").write_text(json.dumps(told | change))
    record = runs.read(result)
    assert record.audit is None and "audit" in record.missing
    assert "is not believed, its verdict is not what its rows come to" in record.notices[0]


def test_a_row_of_an_audit_changed_alone_is_noticed(tmp_path):
    result, told = copied(tmp_path)
    for status in ("FAIL", "NOT CHECKED", "fine"):
        told["checks"]["E2"]["status"] = status
        (tmp_path / f"{DEMO.stem}_audit.json").write_text(json.dumps(told))
        assert runs.read(result).audit is None, status


def test_the_log_of_a_resumed_run_tells_its_script_twice(tmp_path):
    text, log = DEMO.read_text(encoding="utf-8"), tmp_path / "resumed.txt"
    head, source, rest = text.split(f"{runs.RULE}\n")
    cut = rest.index("\ntrain step:100 ") + 1
    parts = head, source, rest[:cut] + head, source, rest[cut:]
    log.write_text(f"{runs.RULE}\n".join(parts))
    assert runs.read_log(log).events == runs.read_log(DEMO).events


def test_the_house_in_a_log_is_part_of_the_script(tmp_path):
    """Its lines are no events, and it has the checksum that the result of the same run has."""
    text, log = DEMO.read_text(encoding="utf-8"), tmp_path / "house.txt"
    head, source, rest = text.split(f"{runs.RULE}\n")
    rest = rest.partition("==== end\n")[2]  # without the house of that run
    house = {"harness/a.py": '"""\nstep loss:1\n"""\n', "systems/b.py": "final legal:0\n"}
    digests = {path: sha256_of(text.encode()) for path, text in house.items()}
    files = "".join(f"==== {path} sha256:{digests[path]}\n{text}" for path, text in house.items())
    log.write_text(f"{runs.RULE}\n".join([head, source, f"{files}==== end\n{rest}"]))
    record = runs.read_log(log)
    assert record.events == runs.read_log(DEMO).events
    core = sha256_of(source.removesuffix("\n").encode())
    assert record.script_sha256 == script_hash(core, digests) != core


def refused(path: Path, text: str, wanted: str) -> None:
    """That a log is refused in one line which names it."""
    path.write_text(text, encoding="utf-8")
    with pytest.raises(runs.ReadError, match=wanted) as error:
        runs.read_log(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_logs_of_two_runs_in_one_file_are_refused(published_logs, tmp_path):
    """Whole or not: settings of the one would be told with the score of the other."""
    path, other = tmp_path / "both.txt", DEMO.with_name("demo_seed314_cpu.txt").read_text(encoding="utf-8")
    text = DEMO.read_text(encoding="utf-8")
    refused(path, text + other, "holds several runs")
    refused(path, text[: text.index("\nfinal ") + 1] + other, "of SEED=314 and 42")
    refused(path, text[:20_000] + "\n" + other, "holds several runs")  # dead while it logged its script
    one, other = (published_logs / f"{name}.log" for name in ("pr1851_seed42", "pr1868_seed314"))
    one, other = one.read_text(encoding="utf-8"), other.read_text(encoding="utf-8")
    line = next(line for line in other.splitlines(keepends=True) if line.startswith("quantized_ttt"))
    refused(path, one + line, "says quantized_ttt_phased twice")


@pytest.mark.parametrize(
    "lost, wanted",
    [
        (r"ttt val_loss:.*\n", "val_bpb, val_loss, eval_seconds of its last line stands nowhere else"),
        (r"(ttt|quantised|prequant) val_loss:.*\n", "stands nowhere else"),
        (r"(?<=\nfinal ).*(?=legal:)", "val_bpb, val_loss, eval_seconds, artifact_bytes, calibrate_seconds"),
        (r"(?<=\nSEED=42)\n", "its seed is '42DEVICE=auto', no number"),
        (r"SEED=42\n", "its seed is 'None', no number"),
        (r"(?s)^.*?(?=\nstart run:)", "lacks the beginning of a log.*the log is runs/demo.*-seed42.txt"),
    ],
)
def test_lines_lost_from_our_log_are_noticed(tmp_path, lost, wanted):
    """Not the quantised score for that of the adaptation, and no KeyError."""
    text, count = re.subn(lost, "", DEMO.read_text(encoding="utf-8"))
    assert count
    refused(tmp_path / "lost.txt", text, wanted)


@pytest.mark.parametrize(
    "name, value, wanted",
    [
        ("artifact_bytes", "405468", "artifact_bytes of its last line stands nowhere"),
        ("calibrate_seconds", "0.37351", "calibrate_seconds of its last line"),
        ("train_seconds", "0.899", r"[\d.]+ s of training, then 0.899"),
        ("train_seconds", "nan", "says train_seconds:nan in its last line"),
        ("legal", "False", "says legal:False"),
    ],
)
def test_a_last_line_that_the_lines_before_it_contradict_is_refused(tmp_path, name, value, wanted):
    before, _, end = DEMO.read_text(encoding="utf-8").rpartition("\nfinal ")
    end, count = re.subn(rf" {name}:\S+", f" {name}:{value}", end)
    assert count == 1
    refused(tmp_path / "other.txt", f"{before}\nfinal {end}", wanted)


def test_the_end_of_another_run_is_refused(tmp_path):
    one, other = (DEMO.with_name(f"demo_seed{seed}_cpu.txt").read_text("utf-8") for seed in (314, 42))
    start = "\nartifact file:"
    wanted = "and of runs/|several runs: .* s of training, then"  # whichever shows first in these two logs
    refused(tmp_path / "a.txt", one.partition(start)[0] + start + other.partition(start)[2], wanted)


def test_lines_lost_from_a_published_log_are_noticed(published_logs, tmp_path):
    for name, wanted in (("pr1493", "a score of ttt without TTT_ENABLED"), ("pr1851", "'lost val_loss:")):
        text = (published_logs / f"{name}_seed42.log").read_text(encoding="utf-8")
        text = text.replace("  ttt_enabled: True\n", "").replace("quantized_ttt_phased", "lost")
        refused(tmp_path / "lost.log", text, wanted)


def test_half_a_stage_is_none(tmp_path):
    """A score whose line was cut off and run into the next, which does not count."""
    text, path = DEMO.read_text(encoding="utf-8"), tmp_path / "half.txt"
    path.write_text(re.sub(r"(prequant val_loss:.* targets:\d+) .*\n", r"\1", text))
    assert "prequant" not in runs.read_log(path).stages


@pytest.mark.parametrize("key", ["val_bpb", "artifact_bytes"])
def test_a_number_that_no_float_holds_is_refused(tmp_path, key):
    result = json.loads(DEMO.with_suffix(".json").read_text()) | {key: 10**400}
    result["stages"]["ttt"] |= {key: 10**400}
    (tmp_path / "huge.json").write_text(json.dumps(result))
    with pytest.raises(runs.ReadError, match=f"huge.json: its (score )?{key} .{{2,9}} 1000+$"):
        runs.read(tmp_path / "huge.json")


@pytest.mark.parametrize("name", ["demo", "demo.v2"])
@pytest.mark.parametrize("key, value", [("val_bpb", 2.2), ("artifact_bytes", 1), ("legal", False)])
def test_a_result_that_its_log_contradicts_is_refused(tmp_path, key, value, name):
    result = json.loads(DEMO.with_suffix(".json").read_text())
    (tmp_path / f"{name}.json").write_text(json.dumps(result | {key: value}))
    (tmp_path / f"{name}.txt").write_bytes(DEMO.read_bytes())
    with pytest.raises(runs.ReadError, match=f"says {key} {value}, its log .*{name}.txt"):
        runs.read(tmp_path / f"{name}.json")


def test_a_command_to_paste_has_all_that_the_script_reads(tg):
    """Also SCALE, without which PRESET is another, and the names in published commands."""
    assert {*runs.ALSO_READ} == {"SCALE", *tg.TRANSLATED}
    environ = {"SCALE": "demo", "PATH": "/bin", "SEED": "1", "SMEAR_GATE": "1", "PRESET": "pr1667"}
    shown = Experiment(("run.py",), environ, Path("run.py"), "", tg.Config().as_env()).shown
    assert shown == "PRESET=pr1667 SCALE=demo SMEAR_GATE=1 run.py"
