"""The audit: an honest run passes every check; each check catches the rule that is broken on purpose.

One tiny run is made; each test breaks a copy of its files, script or data, and wants FAIL and the reason.
"""

import base64
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import folds
import numpy as np
import pytest
import sentencepiece
from audited import ARTIFACT, CODE, Copy, one_house  # noqa: F401 - a fixture
from cheats import CHEATS
from quick_run import QUICK
from test_smoke import command, environment, make_data
from test_two_ranks import ranks

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import audit  # noqa: E402
import lossless_caps  # noqa: E402
from auditing import box, data, packed, questions, shown, surroundings  # noqa: E402
from auditing import run as auditing_run  # noqa: E402
from auditing.blackbox import subject_of  # noqa: E402
from auditing.verdict import OTHER_FSTRINGS  # noqa: E402
from harness import packing  # noqa: E402
from harness.hashes import Hashes  # noqa: E402

PASSES = {"VERIFIED", "CONSISTENT"}
HERE = [name for name in audit.ORDER if name[0] not in "BEW"]  # the others have tests of their own
FIRST_PIECE = 264  # after control pieces, operators and bytes
# 14 documents: two full batches after the last phase; most are of several chunks.
SETTINGS = {"AUDIT": 1, "TTT_BATCH_SIZE": 3, "TTT_CHUNK_SIZE": 32}


@pytest.fixture(scope="module")
def run(tg, tmp_path_factory):
    """Function: name, settings -> the folder of an audited run made in this process, beside its data."""
    work = tmp_path_factory.mktemp("audit")
    make_data(work / "data")

    def start(name: str, **settings: object) -> Path:
        given = SETTINGS | {"DATA_PATH": "data", "ARTIFACT_DIR": name, "RUN_ID": "tiny"} | settings
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(work)
            folds.fold_once(patch, packing)
            assert tg.main([], environment(**given)) == 0
        return work / name

    return start


@pytest.fixture(scope="module")
def honest(run) -> Path:
    """Folder with a data set and an audited run on it."""
    return run("run").parent


@pytest.fixture(scope="module")
def streams(honest, run) -> Path:
    """The same folder with two runs more of its artifact: sliding windows, and SGD between them."""
    common = {"TTT_EVAL_ONLY": 1, "QUANTIZED_MODEL_PATH": f"run/{ARTIFACT}", "SLIDING_WINDOW_ENABLED": 1}
    common |= {"EVAL_STRIDE": 16, "TTT_CHUNK_TOKENS": 256}
    for name, settings in {"sliding": {"TTT_ENABLED": 0}, "sgd": {"TTT_SGD": 1}}.items():
        shutil.copy(honest / "run" / ARTIFACT, run(name, **common | settings))
    return honest


@pytest.fixture
def copy(honest, tmp_path) -> Copy:
    return Copy(honest, tmp_path)


@pytest.fixture
def sgd(streams, tmp_path) -> Copy:
    return Copy(streams, tmp_path, "sgd")


@pytest.fixture
def sliding(streams, tmp_path) -> Copy:
    return Copy(streams, tmp_path, "sliding")


def passed(verdicts: dict[str, audit.Verdict]) -> None:
    """All of them are VERIFIED or CONSISTENT."""
    assert {verdict.status for verdict in verdicts.values()} <= PASSES, audit.table(verdicts)


def records_of(records: list[dict], *kinds: str) -> list[dict]:
    return [record for record in records if record["kind"] in kinds]


# -- the honest run


def test_honest_run_passes_every_check(honest, capsys, monkeypatch):
    monkeypatch.setattr(folds, "FOLDED", {})  # S5 packs anew
    for name in surroundings.HOOKS:
        monkeypatch.delenv(name, raising=False)
    assert audit.main([str(honest / "run"), "--all"]) == 0
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 100
    saved = json.loads((honest / "run" / "audit.json").read_text())
    order = [name for name in audit.ORDER if name[0] != "B"]  # which are asked of unknown scripts
    others = {name for name, entry in saved["checks"].items() if entry["status"] not in PASSES}
    assert others == {"W2"} and saved["checks"]["W2"]["status"] == "NOT CHECKED"
    assert list(saved["checks"]) == order and sum(saved["counts"].values()) == len(order)
    assert saved["verdict"] == "VERIFIED" and saved["repository_script_is_the_same"] is True
    whole = re.sub(r"\n +", " ", table)
    for name, entry in saved["checks"].items():
        assert f"\n{name}  {entry['status']:<11}  {entry['rule']} {entry['evidence']}\n" in f"\n{whole}"


def test_every_check_is_broken_by_a_test():
    """Or by a cheat; those that ask from outside have test_blackbox.py."""
    texts = (path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    broken = {name for text in texts for name in re.findall(r"\.fails\(\s*\"([A-Z]\d)\"", text)}
    broken |= {cheat.check for cheat in CHEATS}
    assert broken == set(audit.ORDER) - set(questions.QUESTIONS)


def test_run_without_an_artifact_is_not_checked(copy):
    """As one with PREQUANT_ONLY=1 is: it breaks no rule, and its number is no submission's."""
    (copy.run / ARTIFACT).unlink()
    (copy.run / "train_gpt.packed.py").unlink()
    for name in ("S1", "S2", "S5", "E1"):
        assert copy.verdict(name) == ("NOT CHECKED", f"{ARTIFACT}: the run made no artifact")


def test_run_without_a_ledger_is_not_called_legal(copy):
    (copy.run / "ledger.jsonl").unlink()
    for name in ("D3", "D4", "D7", "D9", "T4"):
        assert copy.verdict(name) == ("NOT CHECKED", "the run wrote no ledger.jsonl (AUDIT=1)")


@pytest.mark.parametrize("name", ["sliding", "sgd"])
def test_honest_runs_on_the_stream_pass_every_check(streams, name):
    """But for what is said of training: these runs evaluate an artifact."""
    judged = audit.Audit(streams / name)
    verdicts = audit.judge(judged, HERE)
    judged.close()
    untrained = {check for check, verdict in verdicts.items() if "this run did not train" in verdict.evidence}
    assert untrained == {"T1", "T2", "T3", "T5", "D5"}
    passed({check: verdicts[check] for check in verdicts.keys() - untrained})
    assert re.search(r"on 320 targets as the logged script", verdicts["S2"].evidence)
    learns = {"sliding": "nothing is trained", "sgd": "4 updates, each on tokens scored before"}[name]
    assert learns in verdicts["D3"].evidence


def cut_off(folder: Path, change: str) -> Path:
    """A script that runs the real one, changed so that it is cut off somewhere."""
    start = f"import os, sys\nsys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}\nimport train_gpt\n"
    start += "from harness.checkpoints import Checkpoints\nfrom quick_run import packing, stub\n"
    (folder / "cut_off.py").write_text(f"{start}{change}\ntrain_gpt.main([], os.environ)\n")
    return folder / "cut_off.py"


def test_honest_run_that_was_resumed_and_watched_passes_every_check(honest, tmp_path):
    """Checkpoints after every batch, killed in the adaptation; the audit adds nothing to its TensorBoard.

    What it takes to read the checkpoint is in no stage's seconds, nor in the span of the ledger.
    """
    code = f"packing.packed_script = lambda *_: (open({str(honest / 'run' / CODE)!r}, 'rb').read(), True)"
    keep = f"{code}\nkept = Checkpoints._keep_weights\nCheckpoints._keep_weights = "
    script = cut_off(tmp_path, f"{keep}lambda *arguments: (kept(*arguments), os._exit(9))")
    settings = SETTINGS | {"CHECKPOINT_SECONDS": 1e-9, "TENSORBOARD_DIR": "board", "ARTIFACT_DIR": "run"}
    settings |= {"DATA_PATH": honest / "data", "RUN_ID": "tiny"}
    assert command(script, tmp_path, **settings).returncode == 9
    slow = "load = train_gpt.ScoreFirstTTT.load_state\ntrain_gpt.ScoreFirstTTT.load_state = "
    slow = f"import time\n{slow}lambda *arguments: (time.sleep(0.5), load(*arguments))"
    script = cut_off(tmp_path, f"{code}\n{slow}")  # the counted script is there already
    process = command(script, tmp_path, **settings)
    assert process.returncode == 0 and "resumed within ttt" in process.stdout, process.stderr
    board = sorted((tmp_path / "board").rglob("*.*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        judged = audit.Audit(tmp_path / "run")
        verdicts = audit.judge(judged, HERE)
        judged.close()
    passed(verdicts)
    assert board and sorted((tmp_path / "board").rglob("*.*")) == board


def test_honest_run_that_ended_before_its_loops_passes(honest):
    """Its artifact says that it is scored without them, and is the same when it is packed again."""
    settings = SETTINGS | {"ITERATIONS": 2, "ENABLE_LOOPING_AT": 0.6, "RUN_ID": "tiny"}
    process = command(QUICK, honest, DATA_PATH="data", ARTIFACT_DIR="unlooped", **settings)
    assert process.returncode == 0, process.stderr
    judged = audit.Audit(honest / "unlooped")
    verdicts = audit.judge(judged, [name for name in HERE if name not in ("S1", "S2", "S4", "S5")])
    judged.close()
    passed(verdicts)


def test_what_passed_is_one_line_for_each_group():
    """What failed, or was not checked, is told in full, and nothing is wider than 100 columns."""
    evidence = "a long reason, and longer " * 9
    changes = {"W2": "NOT CHECKED", "D6": "CONSISTENT", "R1": "FAIL", "E1": "FAIL", "E2": "FAIL"}
    names = [name for name in audit.ORDER if name[0] in "WEDR"]
    found = [(name, audit.Verdict(changes.get(name, "VERIFIED"), evidence)) for name in names]
    lines = "\n".join(shown.table_lines(iter(found), in_full=False)).splitlines()
    assert lines[0] == "W   weights      VERIFIED W1 W3 W4"
    assert lines[1].startswith("W2  NOT CHECKED  ") and max(map(len, lines)) <= 100
    assert "D   evaluation   VERIFIED D1 D2 D3 D4 D5 D7 D8 D9; CONSISTENT D6" in lines
    assert [line[:2] for line in lines if line[0] != " "] == ["W ", "W2", "E1", "E2", "D ", "R ", "R1"]
    assert " ".join(" ".join(lines).split()).count(evidence.strip()) == 4


def test_fail_is_exit_code_1_and_in_audit_json(copy, capsys):
    copy.result(lambda result: result.update(val_bpb=1.0))
    arguments = [str(copy.run), "--data", str(copy.data), "--only", "R1,R2,R3"]
    assert audit.main(arguments) == 1
    assert "3 checks in 0 s: 1 CONSISTENT, 2 FAIL" in capsys.readouterr().out
    assert not (copy.run / "audit.json").exists(), "--only writes nothing"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["{data}"], "no result.json there: not the folder of a run that has ended"),
        (["{run}", "--only", "D3,X9"], "--only X9: must be among A1, A2, "),
        (["{run}", "--docs", "none.jsonl"], "--docs none.jsonl: no such file"),
        (["{run}", "--fresh", "none.jsonl"], "--fresh none.jsonl: no such file"),
        (["{run}", "--data", "none"], "--data none: no such folder"),
        (["{run}", "--wrong"], "unrecognized arguments: --wrong"),
        ([], "give the folder of a run, or --folder DIR"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(honest, capsys, arguments, message):
    places = {"data": honest / "data", "run": honest / "run"}
    assert audit.main([argument.format(**places) for argument in arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and message in shown.err


def test_data_that_have_moved_are_a_mistake_and_a_folder_that_is_read_only_is_none(copy, capsys, monkeypatch):
    shutil.move(copy.data, copy.data.with_name("elsewhere"))
    copy.result(lambda result: result["settings"].update(DATA_PATH=str(copy.data)))
    (copy.run / "ledger.jsonl").unlink()
    assert audit.main([str(copy.run)]) == 2
    assert "data: no fineweb_val_*.bin, the run's data: --data says where" in capsys.readouterr().err
    monkeypatch.setattr(audit, "asked_of", lambda judged: ["R2"])
    monkeypatch.setattr(audit, "outcome", lambda *_: ("CONSISTENT", "as it is"))
    (copy.run / "audit.json").mkdir()
    assert audit.main([str(copy.run), "--data", str(copy.data.with_name("elsewhere"))]) == 3
    assert "audit.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("result.json", {"model_bytes": None}, "damaged: model_bytes is missing, must be a whole number"),
        ("result.json", {"settings": []}, "damaged: settings is \\[\\], must be an object"),
        ("result.json", {"environment.house_sha256": 1.5}, "house_sha256 is 1.5, must be an object"),
        ("result.json", {"stages.quantised": [[]]}, "damaged: stages quantised is .* must be an object"),
        ("result.json", {"seconds.train": "x"}, "damaged: seconds train is 'x', must be a number"),
        ("result.json", {"settings.NUM_LAYERS": "x"}, "settings NUM_LAYERS is 'x', must be a whole"),
        ("result.json", {"val_bpb": 10**400}, r"damaged: val_bpb is 1000+, must be within 2\^63"),
        ("result.json", {"stages.ttt.targets": -(10**400)}, r"targets is -1000+, must be within 2\^63"),
        ("result.json", {"settings.SEED": 10**400}, "settings SEED is 1000+, must be within"),
        ("result.json", {"run": "tiny\ud800"}, r"run is 'tiny\\ud800', must be the name of its log"),
        ("result.json", {"run": "x" * 5000}, "run is 'xxx+, must be the name of its log"),
        ("result.json", {"run": "../tiny"}, "run is '../tiny', must be the name of its log"),
        ("result.json", {"run": ""}, "run is '', must be the name of its log"),
        ("result.json", {"settings.QUANTIZED_MODEL_PATH": "x" * 5000}, "MODEL_PATH is 'xxx+, must be a path"),
        ("result.json", {"settings.TOKENIZER_PATH": f"a/{'x' * 300}/b"}, "_PATH is 'a/xxx+, must be a path"),
        ("ledger.jsonl", b"", "empty, must hold what the run told"),
        ("ledger.jsonl", b'{"kind": "run"}\n\xff\n', "cannot be read .*can't decode byte 0xff"),
        ("ledger.jsonl", b'{"kind": "run"}\n{"kind": "jo', "line 2 cannot be read as JSON"),
        ("ledger.jsonl", b'{"kind": 7}\n', "line 1 is none of a run: it has no kind"),
        ("metrics.jsonl", b'{"stage": "start"}\n{"sta', "line 2 cannot be read as JSON"),
        ("documents.json", b"[]", "cannot be read as JSON .not a JSON object"),
    ],
)
def test_damaged_records_are_a_mistake_and_no_broken_rule(copy, capsys, name, change, said):
    path = copy.run / name
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        (place, value), result = next(iter(change.items())), json.loads(path.read_text())
        *folders, key = place.split(".")
        functools.reduce(dict.get, folders, result)[key] = value
        path.write_text(json.dumps(result))
    assert audit.main([str(copy.run), "--data", str(copy.data), "--only", "R1"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and re.search(f"{name}: .*{said}|{said}", err), err


RECORDS = (
    "result.json",
    "submission.json",
    "documents.json",
    "ledger.jsonl",
    "metrics.jsonl",
    "manifest.json",
)


@pytest.mark.parametrize("name", RECORDS)
def test_a_name_given_twice_in_a_record_is_a_mistake(copy, capsys, name):
    """One reader takes the first value, another the last."""
    path = (copy.data if name == "manifest.json" else copy.run) / name
    text = path.read_text() if path.is_file() else '{"val_bpb": 1.0}'
    path.write_text(text.replace("{", '{"twice": 1, "twice": 2, ', 1))
    assert audit.main([str(copy.run), "--data", str(copy.data), "--only", "R1"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1
    assert re.search(f"{name}: .*cannot be read as JSON .the name 'twice' stands there twice", err), err


def test_data_that_no_path_or_manifest_leads_to_are_a_mistake(copy, capsys):
    copy.result(lambda result: result["settings"].update(TOKENIZER_PATH=""))
    copy.json(copy.data / "manifest.json", lambda manifest: manifest.update(tokenizer=5))
    assert audit.main([str(copy.run), "--data", str(copy.data), "--only", "R1"]) == 2
    copy.ledger(lambda head, records: head.update(data_folder="\x1b" + "x" * 5000))
    assert audit.main([str(copy.run), "--only", "R1"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 2 and "\x1b" not in err and len(err) < 1000
    assert "manifest.json: not a manifest of" in err and "cannot be read (File name too long)" in err


def test_links_and_pipes_in_the_folder_are_a_mistake(copy, capsys):
    """Neither is read: the one leads to files that are not the run's, the other never ends."""
    for make, what in (
        (lambda path: path.symlink_to("/dev/zero"), "a link"),
        (os.mkfifo, "a pipe or a device"),
    ):
        path = copy.run / "logs" / "more.txt"
        make(path)
        assert audit.main([str(copy.run), "--data", str(copy.data)]) == 2
        assert f"more.txt: {what}, must be a file of its own" in capsys.readouterr().err
        path.unlink()


def test_a_file_that_changes_while_it_is_judged_is_a_mistake(copy, capsys, monkeypatch):
    def change(judged):
        (judged.folder / ARTIFACT).write_bytes((judged.folder / ARTIFACT).read_bytes())
        return ["R3"]

    monkeypatch.setattr(audit, "asked_of", change)
    assert audit.main([str(copy.run), "--data", str(copy.data)]) == 2
    assert f"{ARTIFACT} changed while it was judged: judge it again" in capsys.readouterr().err
    assert not (copy.run / "audit.json").exists()


def test_terminal_codes_and_line_ends_of_a_run_are_shown_as_such(copy):
    forged = "\x1b[2J\nVERIFIED: val_bpb 1.0 is the score"
    copy.result(lambda result: result["settings"].update(WANDB_PROJECT=forged))
    status, evidence = copy.verdict("R4", boxed=False)
    assert status == "FAIL" and r"\x1b[2J VERIFIED" in evidence and evidence.isprintable()


def test_a_house_that_tells_less_than_all_its_files_is_strange(copy):
    copy.result(lambda result: result["environment"]["house_sha256"].pop("harness/ledger.py"))
    with contextlib.closing(audit.Audit(copy.run, data=copy.data)) as judged:
        assert judged.strange_files == ["harness/ledger.py"] and not judged.known


def test_a_run_of_before_the_house_was_rebuilt_is_a_mistake(copy, capsys):
    copy.result(lambda result: result["environment"].pop("house_sha256"))
    assert audit.main([str(copy.run), "--data", str(copy.data)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert "made by a script of before the house was rebuilt" in shown.err


def test_r2_log_lacks_a_file_of_the_house(copy):
    log = copy.run / "logs" / "tiny.txt"
    log.write_text(log.read_text().replace("==== systems/ans.py ", "==== systems/other.py "))
    copy.fails("R2", "its log holds no systems/ans.py with the checksum", boxed=False)
    assert copy.verdict("D1", boxed=False) == ("NOT CHECKED", "the log does not hold the script that ran")


def test_strange_script_is_replayed_in_the_box_and_proves_nothing(copy, capsys):
    """Whatever file of the house it is: what its own checks find is its own word, but for a FAIL."""
    copy.script("def packed_script(", "def packed_script(*_):\n    return b'', True\n\n\ndef other(")
    arguments = [str(copy.run), "--data", str(copy.data), "--only"]
    assert audit.main([*arguments, "D8,S5,R2"]) == 1
    said = re.sub(r"\n +", " ", capsys.readouterr().out)
    assert re.search(r"^D8  CONSISTENT .* bit-identical.* \[by the run's own script\]$", said, re.M)
    assert re.search(r"^S5  FAIL .* is not the packing of the script in the log", said, re.M)
    assert re.search(r"^script \w{12}, NOT the repository's \(harness/packing.py\)$", said, re.M)


REACHING = """
import sys
sys.modules["__main__"].carry_out = lambda *_: ("VERIFIED", "nothing to see")
"""


def test_strange_script_that_reaches_for_the_audit_convinces_nobody(copy):
    """It can take over the process in the box; what comes out is data, and at best consistent."""
    copy.script('if __name__ == "__main__":', REACHING + 'if __name__ == "__main__":')
    assert copy.verdict("D2", boxed=False) == ("CONSISTENT", "nothing to see [by the run's own script]")
    assert copy.verdict("A3", boxed=False).status == "VERIFIED"


def test_counted_script_says_its_number_when_asked_from_outside(honest):
    """In the box, in a new place under new names (all questions: test_blackbox.py)."""
    if reason := box.available():
        pytest.skip(reason)
    with contextlib.closing(audit.Audit(honest / "run")) as judged:
        asked, result = subject_of(judged), judged.result
        total = asked.ask(asked.tokens, sizes=asked.sizes)
    assert math.isclose(total.nats, result["val_loss"] * total.targets, rel_tol=1e-5)
    assert total.bytes_are(asked.sizes.sum()) and total.targets == len(asked.tokens) - 1
    assert questions.answers(asked, ["B5"])["B5"].status == "VERIFIED", asked.outside


def test_ledgers_of_two_ranks_are_one(honest):
    artifact = honest / "run" / ARTIFACT
    settings = SETTINGS | {"TTT_EVAL_ONLY": 1, "QUANTIZED_MODEL_PATH": artifact, "RUN_ID": "two"}
    settings |= {"SLIDING_WINDOW_ENABLED": 1, "EVAL_STRIDE": 16}
    for process in ranks(honest, "two", **settings):
        assert process.returncode == 0, process.stderr
    judged = audit.Audit(honest / "two")
    verdicts = audit.judge(judged, ["T1", "D3", "D4", "D6", "D7", "D9", "R1", "R5"])
    judged.close()
    assert verdicts.pop("T1") == ("NOT CHECKED", "this run did not train")
    passed(verdicts)
    assert "on each of 2 ranks, 2 global phases; once each in stage sliding too" in verdicts["D4"].evidence
    losses = json.loads((honest / "two" / "documents.json").read_text())["losses"]
    for stage in ("quantised", "ttt"):
        score = judged.result["stages"][stage]
        assert sum(losses[stage]) == pytest.approx(score["val_loss"] * score["targets"], abs=0.01)


@pytest.mark.parametrize("name, stages", [("sliding", ["sliding"]), ("sgd", ["sliding", "ttt"])])
def test_documents_have_their_losses_of_every_stage(streams, name, stages):
    """Also of those whose windows slide over the stream."""
    losses = json.loads((streams / name / "documents.json").read_text())["losses"]
    scores = json.loads((streams / name / "result.json").read_text())["stages"]
    assert list(losses) == ["quantised", *stages] == list(scores)
    for stage, score in scores.items():
        assert len(losses[stage]) == score["documents"] and min(losses[stage]) > 0
        assert sum(losses[stage]) == pytest.approx(score["val_loss"] * score["targets"], abs=0.01)


def test_ledger_of_a_rank_that_is_gone_stays(honest, tmp_path):
    """Two ranks evaluate and slide, one goes on: what the other scored is still in ledger and documents."""
    settings = SETTINGS | {"CHECKPOINT_SECONDS": 1e6, "SLIDING_WINDOW_ENABLED": 1, "EVAL_STRIDE": 16}
    settings |= {"TTT_EVAL_ONLY": 1, "QUANTIZED_MODEL_PATH": honest / "run" / ARTIFACT, "RUN_ID": "gone"}
    cut = "train_gpt.Run.adapt_documents = lambda run: (run.ranks.wait_for_all('cut'), os._exit(9))"
    script = cut_off(tmp_path, f"packing.packed_script = stub\n{cut}")
    two = ranks(honest, "gone", script=script, **settings)
    assert "sliding val_loss" in two[0].stdout and 9 in {process.returncode for process in two}
    one = command(QUICK, honest, DATA_PATH="data", ARTIFACT_DIR="gone", **settings)
    assert one.returncode == 0 and "resumed gone after quantised, sliding" in one.stdout, one.stderr
    judged = audit.Audit(honest / "gone")
    verdict, chain = audit.judge(judged, ["D4", "R5"]).values()
    judged.close()
    assert chain.status in PASSES, chain
    assert verdict.status in PASSES and "once each in stage sliding too" in verdict.evidence, verdict
    losses = json.loads((honest / "gone" / "documents.json").read_text())["losses"]
    score = judged.result["stages"]["quantised"]
    assert sum(losses["quantised"]) == pytest.approx(score["val_loss"] * score["targets"], abs=0.01)


# -- A: the data


def test_a1_validation_cut_short(copy):
    for name in ("fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin"):
        copy.shard(name, lambda values: values[:-200])
    copy.fails("A1", r"the manifest says 14|tokens, the manifest says")


def test_a1_other_data_than_was_scored(copy):
    copy.shard("fineweb_val_000000.bin", lambda values: np.where(values == values.max(), 300, values))
    copy.fails("A1", "not the file that the run scored")


def test_a1_a_change_that_times_and_a_remembered_hash_deny(copy, tmp_path, monkeypatch):
    """Size and times are as they were, and a start of a run believes the old hash: the audit reads it all."""
    path, cache = copy.data / "fineweb_val_000000.bin", {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    monkeypatch.setattr("harness.hashes.YOUNG", -1.0)
    monkeypatch.setenv(*next(iter(cache.items())))
    told, before = path.stat(), Hashes.from_env(cache).sha256(path)
    copy.shard(path.name, lambda values: np.where(values == values.max(), 300, values))
    os.utime(path, ns=(told.st_atime_ns, told.st_mtime_ns))
    (kept,) = (tmp_path / "cache/train_gpt").iterdir()
    now = path.stat()
    mark = [now.st_size, now.st_dev, now.st_ino, now.st_mtime_ns, now.st_ctime_ns]
    kept.write_text(json.dumps([mark, before]))
    assert (now.st_size, now.st_mtime_ns) == (told.st_size, told.st_mtime_ns)
    assert Hashes.from_env(cache).sha256(path) == before
    copy.fails("A1", "not the file that the run scored")


def test_a1_only_a_sample_scored(copy):
    copy.result(lambda result: result["stages"]["ttt"].update(targets=1000))
    copy.fails("A1", "scored 1,000 and 2,619 of 1,276 targets and 2,619 bytes")


def test_a2_validation_document_in_a_train_shard(copy):
    val = np.fromfile(copy.data / "fineweb_val_000000.bin", "<u2")[512:]
    starts = np.flatnonzero(val == 1)
    copy.shard("fineweb_train_000000.bin", lambda train: np.append(train, val[starts[3] : starts[4]]))
    copy.fails("A2", "validation document 3 opens a document of fineweb_train_000000.bin")


def test_a2_documents_that_begin_alike(copy):
    """As two licences do: no document is there as a whole. Many of them are no chance."""
    val = np.fromfile(copy.data / "fineweb_val_000000.bin", "<u2")[512:]
    starts = [*np.flatnonzero(val == 1), len(val)]
    documents = [val[start:end] for start, end in itertools.pairwise(starts) if end - start > 80]
    alike = [np.append(document[:70], FIRST_PIECE) for document in documents]
    copy.shard("fineweb_train_000000.bin", lambda train: np.append(train, alike[0]))
    status, evidence = copy.verdict("A2")
    assert status in PASSES and "14 openings of 64 tokens, 1 among" in evidence, evidence
    copy.shard("fineweb_train_000000.bin", lambda train: np.concatenate([train, *alike]))
    copy.fails("A2", f"{len(alike)} of 14 validation documents open as training documents do")


def test_a2_validation_text_within_training_documents(copy):
    """Behind one token more, so that no opening is the same."""
    val = np.fromfile(copy.data / "fineweb_val_000000.bin", "<u2")[512:]
    behind = np.repeat(val, np.where(val == 1, 2, 1))
    behind[np.flatnonzero(behind == 1)[1::2]] = FIRST_PIECE
    copy.shard("fineweb_train_000000.bin", lambda train: np.append(train, behind))
    copy.fails("A2", r"of (\d+) passages of 32 tokens \1 stand in training text")


def test_a5_pieces_made_for_the_validation_text(copy, monkeypatch):
    """The training documents letter by letter; and a piece that is longer than those are."""
    tokenizer = sentencepiece.SentencePieceProcessor(str(copy.data / "tokenizer.model"))
    letter = tokenizer.piece_to_id("e")
    copy.shard("fineweb_train_000000.bin", lambda train: np.where(train == 1, 1, letter))
    copy.fails("A5", "made for validation text: 2.112 bytes a token in 14 validation documents, 1.000 in")
    monkeypatch.setattr(data, "LONGEST_PIECE", 3)
    copy.fails("A5", "piece .* has .* characters: text that nobody counts")


def test_a5_another_tokenizer_than_the_manifest_names(copy):
    path = copy.data / "tokenizer.model"
    path.write_bytes(path.read_bytes() + b"\x18\x00")  # what SentencePiece reads is the same
    copy.fails("A5", "tokenizer.model: another checksum than in the manifest")


def test_a3_flattering_byte_counts_of_one_document_beside_a_sample(copy, monkeypatch):
    """Those with most bytes a token are looked at, whatever is drawn."""
    starts = np.flatnonzero(np.fromfile(copy.data / "fineweb_val_000000.bin", "<u2")[512:] == 1)

    def flatter(sizes):
        sizes[starts[5] : starts[6]] *= 2
        return sizes

    copy.shard("fineweb_val_bytes_000000.bin", flatter)
    monkeypatch.setattr(auditing_run, "SAMPLE_DOCUMENTS", 4)
    copy.fails("A3", "decoded in 4 documents; 1 charged too many")


def test_a3_flattering_byte_counts(copy):
    """One byte too many for every twentieth token: the space counted twice."""
    copy.shard(
        "fineweb_val_bytes_000000.bin", lambda sizes: sizes + (np.arange(len(sizes)) % 20 == 7) * (sizes > 0)
    )
    copy.fails("A3", r"bytes charged, 2,619 decoded in 14 documents.* charged too many")


def test_a3_bos_carries_bytes(copy):
    copy.shard("fineweb_val_bytes_000000.bin", lambda sizes: np.maximum(sizes, 1))
    copy.fails("A3", "BOS tokens carry bytes")


def test_a3_recounts_given_documents(copy, tmp_path):
    from test_smoke import documents

    texts = documents(150)
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    status, evidence = copy.verdict("A3", docs=str(path))
    assert status in PASSES and evidence.startswith("2,619 bytes recounted"), evidence
    texts[2] = texts[2].replace("a", "é", 1)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    copy.fails("A3", "docs.jsonl line 3: has other tokens", docs=str(path))


def plain_audit(tg, folder: Path, texts: list[str], tokenizer) -> SimpleNamespace:
    """What A3 sees of a plain data set whose first 14 texts are its validation, which lies in `folder`."""
    from test_smoke import prepare

    docs = folder / "docs.jsonl"
    docs.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    named = [prepare.make_document(text, f"document {i}") for i, text in enumerate(texts)]
    manifest = prepare.prepare(named, tokenizer, folder / "plain", 14)
    vocab = tokenizer.processor.get_piece_size()
    cfg = tg.Config(data_path=str(folder / "plain"), caseops_enabled=False, vocab_size=vocab)
    val = tg.load_validation(cfg)
    facts = {"cfg": cfg, "script": tg, "options": SimpleNamespace(docs=""), "manifest": manifest}
    facts |= {"tokens": val.tokens.numpy(), "sidecar": np.append([0], val.target_bytes.numpy())}
    seen = SimpleNamespace(**facts)
    seen.documents = seen.drawn_documents = auditing_run.Audit.documents.func(seen)
    seen.texts = auditing_run.Audit.texts.func(seen)
    return seen


def a3(seen: SimpleNamespace, docs: str = "") -> audit.Verdict:
    seen.options.docs = docs
    return auditing_run.verdict_of(lambda: data.a3_bytes(seen), "VERIFIED")


def test_a3_recounts_documents_of_plain_text(tg, tmp_path):
    """Whose tokenizer has no operators of CaseOps."""
    from test_smoke import documents, prepare

    texts = documents(40)
    model = prepare.train_tokenizer(texts, 320, plain=True)
    tokenizer = prepare.make_tokenizer("tokenizer.model", model, lossless=True, plain=True)
    seen = plain_audit(tg, tmp_path, texts, tokenizer)
    status, evidence = a3(seen)
    assert status == "VERIFIED" and evidence.endswith("; tokenizer lossless")
    status, evidence = a3(seen, docs := str(tmp_path / "docs.jsonl"))
    assert status == "VERIFIED" and f"bytes recounted from {docs}, 0 of the originals uncharged" in evidence


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("rule", ["65\t65 65 65 65", "7A\t5A 5A 5A 5A"])
def test_a3_plain_text_that_the_tokenizer_makes_longer(tg, tmp_path, monkeypatch, rule, told):
    """Without the originals that is certain where it does so again; else nobody knows. A manifest may lie."""
    from test_data_faults import lengthening
    from test_smoke import documents, prepare

    texts = [text.replace("t", "z") for text in documents(40)]
    size = sum(len(text.encode()) for text in texts[:14])
    tokenizer = lengthening(tmp_path, rule)
    with monkeypatch.context() as careless:
        careless.setattr("dataprep.encoding.most_bytes", lambda text: 1 << 30)
        careless.setattr(prepare.Split, "lacks", lambda split: "")
        seen = plain_audit(tg, tmp_path, texts, tokenizer)
    charged = seen.sidecar.sum()
    assert charged > 1.1 * size
    seen.manifest["tokenizer"]["lossless"] = told
    status, evidence = a3(seen)
    if rule.startswith("65"):
        assert status == "FAIL" and "longer when encoded and decoded again" in evidence
    else:
        assert status == "NOT CHECKED" and "LOSSY tokenizer, not the contest's" in evidence
    assert evidence.startswith(f"{charged:,} bytes charged, {charged:,} decoded in 14 documents")
    status, evidence = a3(seen, docs := str(tmp_path / "docs.jsonl"))
    assert status == "FAIL" and f"{docs} line 1: " in evidence
    assert f"{charged:,} bytes charged, the originals have {size:,}; charged more than they have" in evidence


def test_a3_published_tokenizer_of_plain_text(tg, tmp_path, tokenizer_dir, monkeypatch):
    """Its NFKC may make a document longer, not all of them together."""
    from test_smoke import documents, prepare

    path = tokenizer_dir / "fineweb_8192_bpe.model"
    tokenizer = prepare.make_tokenizer(path.name, path.read_bytes(), plain=True)
    (tmp_path / "much").mkdir()
    texts = ["one \u00bd", "so      much space", *documents(38)]
    seen, docs = plain_audit(tg, tmp_path, texts, tokenizer), str(tmp_path / "docs.jsonl")
    status, evidence = a3(seen)
    assert status == "VERIFIED" and evidence.endswith("; LOSSY tokenizer, the contest's")
    status, evidence = a3(seen, docs)
    assert status == "VERIFIED", evidence
    assert evidence.endswith(
        f"; NFKC adds 3 bytes; charged more than they have: 1 documents ({docs} line 1: 9 for 6)"
    )
    monkeypatch.setattr(data, "CONTEST_TOKENIZERS", set())
    assert a3(seen).status == "NOT CHECKED" and a3(seen, docs).status == "VERIFIED"

    monkeypatch.setattr(prepare.Split, "lacks", lambda split: "")
    seen = plain_audit(tg, tmp_path / "much", [texts[0], *texts[2:]], tokenizer)
    status, evidence = a3(seen, str(tmp_path / "much" / "docs.jsonl"))
    assert status == "FAIL" and "charged more than they have: 1 documents" in evidence


def test_a4_case_folding(copy, monkeypatch):
    monkeypatch.setattr(lossless_caps, "encode", str.lower)
    copy.fails("A4", "comes back as")


def test_a4_other_documents(copy):
    def swap(values):
        piece = values >= FIRST_PIECE
        plain = piece[:-2] & piece[1:-1] & piece[2:] & (values[1:-1] != values[2:])
        i = np.flatnonzero(plain)[0]
        values[[i + 1, i + 2]] = values[[i + 2, i + 1]]
        return values

    copy.shard("fineweb_val_000000.bin", swap)
    copy.fails("A4", "1 of 14 decoded documents are not in the manifest")


# -- T: training


def test_t1_training_on_validation_shards(copy):
    old = 'cfg, ranks, paths = self.cfg, self.ranks, shard_paths(self.cfg.data_folder, "train")'
    copy.script(old, old.replace("train", "val"))
    copy.fails("T1", "weights depend on the validation tokens")


def test_t1_validation_file_opened_while_training(copy):
    name = str(copy.data / "fineweb_val_000000.bin")
    copy.ledger(lambda head, records: records[-1]["accesses"].append(["train", "read", name, 1.0]))
    copy.fails("T1", "opened while training: .*fineweb_val_000000.bin")


def test_t2_training_too_long(copy):
    copy.result(lambda result: result["seconds"].update(train=599.9, calibrate=0.2))
    copy.fails("T2", r"training 599.9 s \+ calibration 0.2 s > 600")


def test_t2_two_clocks(copy):
    copy.result(lambda result: result["seconds"].update(train=0.01))
    copy.fails("T2", "the events")


def test_t3_warm_up_that_trains(copy):
    copy.script("        self.restore(before)\n", "")
    copy.fails("T3", "state .* before, .* after")


def test_t4_network_module(copy):
    copy.script("import json\n", "import json\nimport urllib.request\n")
    copy.fails("T4", "the script imports urllib")


def test_t4_connection(copy):
    copy.ledger(
        lambda head, records: records[-1]["accesses"].append(["ttt", "network", "socket.connect x", 1.0])
    )
    copy.fails("T4", "1 connections, the first in ttt: socket.connect")


def test_t4_socket_of_this_machine(copy):
    """As wandb's own service has, offline too."""
    sockets = [["train", "network", f"socket.connect {name}", 1.0] for name in ("/tmp/a.sock", "b'\\x00a'")]
    copy.ledger(lambda head, records: records[-1]["accesses"].extend(sockets))
    status, evidence = copy.verdict("T4")
    assert status in PASSES and "2 within this machine (train: socket.connect /tmp/a.sock)" in evidence


def test_t5_calibration_on_validation(copy):
    old = 'loader = ShuffledLoader(shard_paths(cfg.data_folder, "train"), cfg)'
    copy.script(old, old.replace("train", "val"))
    copy.fails("T5", "the artifact depends on the validation tokens")


# -- W: the weights (W1 to W3: cheats.py)


def test_w4_counted_code_lacks_a_part_of_an_optimiser(copy):
    """As 500 bytes once did, unnoticed: here the weight decay of the matrices."""
    copy.counted(r"\w\.mul_\(1-\w\['lr'\]\*\w\['weight_decay'\]\);", "")
    copy.fails("W4", "step [23]: .* in metrics.jsonl, .* of the counted script")


ONE_STEP = "train step:1 train_loss:9 grad_norm:1 a:1\n"


@pytest.mark.parametrize(
    "output, code, late, status, said",
    [
        ("", -9, True, "NOT CHECKED", "came to no step of training in 300 s here"),
        ("", 1, False, "FAIL", r"tells no step \[1\], exit code 1: KeyError: 'x'"),
        (ONE_STEP, 0, False, "FAIL", r"tells no step \[2\], exit code 0"),
        (ONE_STEP, -9, True, "FAIL", "step 1: train_loss"),
        ("train step:x\ntrain step:1 train_loss:nan", -9, True, "NOT CHECKED", "no step of training"),
    ],
)
def test_w4_counted_code_that_tells_too_little(copy, monkeypatch, output, code, late, status, said):
    ran = box.Ran(code, output, "Traceback\nKeyError: 'x'\n" * (code == 1), [], [], 300.0, late)
    monkeypatch.setattr(packed, "trained_alone", lambda *_: ran)
    monkeypatch.setattr(packed, "first_steps", lambda _: ([], True))
    found = copy.verdict("W4")
    assert found.status == status and re.search(said, found.evidence), found


@pytest.mark.parametrize("name", ["S2", "S4", "T4", "W4"])
def test_code_for_a_gpu_is_not_checked_on_a_cpu(copy, name):
    copy.result(lambda result: result["environment"].update(device="NVIDIA H100 80GB HBM3"))
    said = "the counted script is one for a GPU, and there is none here"
    assert copy.verdict(name) == ("NOT CHECKED", said)


# -- S: the artifact


def test_s1_oversize_artifact(copy):
    code = (copy.run / "train_gpt.packed.py").stat().st_size
    with open(copy.run / ARTIFACT, "r+b") as file:
        file.truncate(16_000_000 - code)
    copy.fails("S1", "= 16,000,000 bytes")


def test_s5_counted_code_is_another_script(copy):
    copy.counted("1e-10", "1e-09")
    copy.fails("S5", "not the packing of the script in the log")


def test_s5_the_same_statements_of_another_python(copy):
    """Which may put spaces and quotes elsewhere: no accusation, and both Pythons are named."""
    copy.result(lambda result: result["environment"].update(python="3.99.1"))
    copy.counted(r"\Z", "\n\n# written otherwise\n")
    status, evidence = copy.verdict("S5")
    assert status == "NOT CHECKED" and "packed under Python 3.99.1, here is 3." in evidence, evidence
    copy.counted(r"""(?s)\A(.*?\bf["'])""", r"\1{exec()}")
    status, evidence = copy.verdict("S5")
    assert status == "NOT CHECKED" and OTHER_FSTRINGS in evidence
    whole = (copy.run / CODE).read_bytes()
    (copy.run / CODE).write_bytes(b"import math;math.log=max\n" + whole)  # around what is packed
    copy.fails("S5", "not the packing of the script in the log")
    (copy.run / CODE).write_bytes(whole)
    copy.counted("1e-10", "1e-09")
    copy.fails("S5", "not the packing of the script in the log")


def test_s2_evaluation_needs_training_data(copy):
    shards = "pathlib.Path(os.environ['DATA_PATH']).glob('fineweb_train_*.bin')"
    copy.counted(r"\A", f"import os,pathlib\nprint([*{shards}][0])\n")
    copy.fails("S2", r"exit code 1: IndexError")


def test_s2_counted_code_scores_otherwise(copy):
    copy.counted(r"def val_loss\((\w)\):return ", r"\g<0>.999*")
    copy.fails("S2", "quantised val_bpb .* alone, .* in the run")


def test_s3_lossy_storage(copy):
    copy.script(
        "arrays[part.key] = torch.from_numpy(array)", "arrays[part.key] = torch.from_numpy(array) // 2 * 2"
    )
    copy.fails("S3", "packed again it has")


def test_s4_evaluation_reads_what_training_left(copy):
    left = str(copy.run / "final_model.pt")
    copy.counted(r"\A", f"import contextlib\nwith contextlib.suppress(OSError):open({left!r}).close()\n")
    copy.fails("S4", "the evaluation alone wanted .*final_model.pt")


def test_s4_run_read_its_checkpoint(copy):
    entry = ["ttt", "read", str(copy.run / "final_model.pt"), 1.0]
    copy.ledger(lambda head, records: records[-1]["accesses"].append(entry))
    copy.fails("S4", "read by the run's evaluation: final_model.pt")


def test_s4_adaptation_begins_with_other_weights(copy):
    copy.ledger(lambda head, records: records_of(records, "start")[0].update(model_sha256="0" * 64))
    copy.fails("S4", "evaluation began with weights 000000000000")


# -- D: the evaluation


@pytest.mark.parametrize("chunk", [8, 32, 96])
@pytest.mark.parametrize("change", [("is_causal=True", "is_causal=False"), (".triu_(1)", ".triu_(2)")])
def test_d1_attention_sees_the_future(copy, change, chunk):
    """In short rows, or in those that are attended in blocks, whatever the documents of the replay."""
    copy.result(
        lambda result: result["settings"].update(TTT_CHUNK_SIZE=chunk, TTT_EVAL_SEQ_LEN=max(64, 2 * chunk))
    )
    copy.script(*change)
    copy.fails("D1", "losses before a flipped token change")


def test_d1_chunks_that_are_one_document_start(copy):
    """Smaller chunks for short documents: the last one may be the start of the next document alone."""
    copy.result(lambda result: result["settings"].update(TTT_CHUNK_BY_LENGTH="64:8"))
    assert copy.verdict("D1").status in PASSES


def test_d1_statistics_of_later_tokens(copy):
    old = '            self.watch.see("start", boundaries=self.boundaries)\n'
    fit = "            self.model.skip_weights.data.mul_(1 + 1e-4 * self.val.tokens.float().mean())\n"
    copy.script(old, fit + old)
    copy.fails("D1", "the weights before chunk 0 depend on it")


def test_d2_losses_are_no_distribution(copy):
    kept = "ctx.save_for_backward(h, weight, A, B, narrow, wide)\n        return "
    copy.script(f"{kept}losses", f"{kept}0.99 * losses")
    copy.fails("D2", "the loss of a token differs from -log p")


FLATTERING = '''
honest_losses = GPT.losses


def flattering_losses(self, *batch, scored=None, **options):
    """Flatter what counts for the score alone."""
    return honest_losses(self, *batch, scored=scored, **options) * (1 if scored is None else 0.999)


GPT.losses = flattering_losses
'''


def test_d2_only_the_score_is_flattered(copy):
    copy.script('if __name__ == "__main__":', FLATTERING + 'if __name__ == "__main__":')
    copy.fails("D2", "scored losses differ from -log p by 1.0e-03 of the sum")


EARLY = '''
honest_losses = GPT.losses


def early_losses(self, *batch, lora=None, **options):
    """Train on a chunk, then score it."""
    if lora is not None and torch.is_grad_enabled():
        loss = honest_losses(self, *batch, lora=lora, **options).mean()
        factors = [factor for low_rank in lora.maps() for factor in low_rank.factors]
        for factor, gradient in zip(factors, torch.autograd.grad(loss, factors), strict=True):
            factor.data.sub_(gradient, alpha=0.1)
    return honest_losses(self, *batch, lora=lora, **options)


GPT.losses = early_losses
'''


def test_d3_training_on_a_chunk_before_scoring_it(copy):
    copy.script('if __name__ == "__main__":', EARLY + 'if __name__ == "__main__":')
    copy.fails("D3", "the weights that score chunk 1 were trained on chunk 1")


def test_d3_ledger_with_an_update_first(copy):
    def swap(head, records):
        i = next(i for i, record in enumerate(records) if record["kind"] == "adapt")
        records[i - 1], records[i] = records[i], records[i - 1]

    copy.ledger(swap)
    copy.fails("D3", "trained on before it was scored")


def test_d3_global_phase_on_documents_not_yet_scored(copy):
    digest = hashlib.sha256(np.fromfile(copy.data / "fineweb_val_000000.bin", "<u2")[512:812]).hexdigest()

    def change(head, records):
        records_of(records, "global")[0].update(tokens=300, tokens_sha256=digest)

    copy.ledger(change)
    copy.fails("D3", "phase 1: its 300 tokens are not those of documents scored before")


def test_d4_target_scored_twice(copy):
    def repeat(head, records):
        first, second = records_of(records, "score")[:2]
        second["spans"].append(first["spans"][0])

    copy.ledger(repeat)
    copy.fails("D4", "32 targets scored more than once, 0 never")


def test_d4_tail_dropped(copy):
    copy.ledger(lambda head, records: records.remove(records_of(records, "score")[-1]))
    copy.fails("D4", r"0 targets scored more than once, \d+ never")


def test_d4_document_scored_out_of_order(copy):
    def swap(head, records):
        one, other = records_of(records, "score")[:2]
        one["spans"], other["spans"] = other["spans"], one["spans"]
        adapts = records_of(records, "adapt")[:2]
        adapts[0]["spans"], adapts[1]["spans"] = adapts[1]["spans"], adapts[0]["spans"]

    copy.ledger(swap)
    copy.fails("D4", r"document \d+: target \d+ scored, \d+ was due")


def test_d4_chunks_are_those_declared(copy):
    """A run that says it cut short documents smaller, and did not; its replay does."""
    copy.result(lambda result: result["settings"].update(TTT_CHUNK_BY_LENGTH="64:8"))
    copy.fails("D4", r"document \d+: 32 targets scored at once, 8 declared")
    assert copy.verdict("D3").status in PASSES


WARM_UP_ROW = "random_row(cfg, self.micro_tokens, cfg.train_seq_len, generator) for _ in micro"


def test_d5_validation_tokens_in_warm_up(copy):
    taken = '_read_stream(cfg.data_folder, "val")[: self.micro_tokens + 1]'
    copy.script(WARM_UP_ROW, f"packed_row({taken}, cfg.train_seq_len) for _ in micro")
    copy.fails("D5", "warm-up opened .*fineweb_val_000000.bin")


def test_d5_training_tokens_in_warm_up(copy):
    taken = "torch.from_numpy(self.loader._tokens[: self.micro_tokens + 1].astype(np.int64))"
    copy.script(WARM_UP_ROW, f"packed_row({taken}, cfg.train_seq_len) for _ in micro")
    copy.fails("D5", r"\d+ runs of 8 warm-up tokens occur in the data")


WARM_UP_TTT = "tokens = torch.randint(BOS + 1, cfg.vocab_size, (starts[-1],), generator=generator)"


def test_d5_validation_files_in_warm_up_of_adaptation(copy):
    taken = 'from train_gpt import _read_stream; tokens = _read_stream(cfg.data_folder, "val")'
    copy.script(WARM_UP_TTT, f"{taken}.repeat(9)[: starts[-1]].long()")
    copy.fails("D5", "test-time training: warm-up opened .*fineweb_val_000000.bin")


def test_d5_validation_tokens_in_warm_up_of_adaptation(copy):
    """Those that the run has read before, so that no file is opened."""
    call = 'compile_graphs(run, "ttt",'
    more = "ScoreFirstTTT(copy.deepcopy(model), run.val, model.cfg, looping=looping).run()"
    copy.script(call, f"import copy; {more}; {call}")
    copy.fails("D5", r"test-time training: \d+ runs of 8 warm-up tokens occur in the data")


def test_d5_warm_up_of_adaptation_that_trains(copy):
    """The same updates undone afterwards are no fault."""
    copy.script("SGD(model.parameters()), 0.0, 1)", "SGD(model.parameters()), 1.0, 1)")
    assert copy.verdict("D5").status in PASSES
    copy.script("        model.load_state_dict(before)\n    return", "    return")
    copy.fails("D5", "test-time training: weights or other state differ after the warm-up")


def test_d5_warm_up_of_adaptation_that_fails_is_not_checked(copy):
    copy.script(WARM_UP_TTT, "raise RuntimeError('no compiler here')")
    status, evidence = copy.verdict("D5")
    assert status == "NOT CHECKED" and "no compiler here" in evidence


def shorten(result: dict) -> None:
    """Half the evaluation's time in a result."""
    half = result["eval_seconds"] / 2
    result.update(eval_seconds=half)
    result["seconds"].update(ttt=half)
    result["stages"]["ttt"].update(seconds=half)


def test_d6_timer_starts_late(copy):
    copy.result(shorten)
    copy.fails("D6", "timer .* s, the ledger spans")


def test_d6_evaluation_too_long(copy):
    copy.result(lambda result: result.update(eval_seconds=600.5))
    copy.fails("D6", "600.5 s")


def test_d7_adapters_outlive_their_documents(copy):
    copy.script("low_rank.B.data.zero_()", "pass")
    copy.fails("D7", "B is not zero when a batch is first scored")


def test_d7_undeclared_warm_start(copy):
    copy.result(lambda result: result["settings"].update(TTT_WARM_START_A=False))
    copy.fails("D7", "A is carried over, which TTT_WARM_START_A=0 denies")


ACROSS = "if segments is None:\n        return _causal", "if True:\n        return _causal"


def test_d8_smear_gate_without_its_mask(copy):
    copy.script("if self.cfg.smear_bos_mask:", "if False:")
    copy.fails("D8", "losses of other documents in the row change")


def test_d8_smear_gate_that_is_meant_to_have_no_mask(copy):
    """PR #1667's: said, never called VERIFIED; anything else that crosses is still a violation."""
    copy.result(lambda result: result["settings"].update(SMEAR_BOS_MASK=False))
    copy.script("if self.cfg.smear_bos_mask:", "if False:")
    status, evidence = copy.verdict("D8")
    assert status == "NOT CHECKED" and "SMEAR_BOS_MASK=0" in evidence and "bit-identical" in evidence
    copy.script(*ACROSS)
    copy.fails("D8", "losses of other documents in the row change")


def test_d8_attention_across_documents(copy):
    copy.script(*ACROSS)
    copy.fails("D8", "losses of other documents in the row change")


def test_d8_plain_windows_read_what_came_before(honest, tmp_path):
    """The standard evaluation of PLAIN_WINDOWS=1: said as it is, and no further than the window."""
    settings = SETTINGS | {"TTT_EVAL_ONLY": 1, "QUANTIZED_MODEL_PATH": f"run/{ARTIFACT}", "RUN_ID": "tiny"}
    settings |= {"PLAIN_WINDOWS": 1, "TTT_ENABLED": 0}
    process = command(QUICK, honest, DATA_PATH="data", ARTIFACT_DIR="plain", **settings)
    assert process.returncode == 0, process.stderr
    shutil.copy(honest / "run" / ARTIFACT, honest / "plain")
    copy = Copy(honest, tmp_path, "plain")
    status, evidence = copy.verdict("D8")
    assert status in PASSES and re.search(r"[1-9]\d* later losses within a window change", evidence), evidence
    copy.script(*ACROSS)
    copy.fails("D8", "more than a window after the document")


def test_d9_last_chunk_trained_on(copy):
    copy.script("(chunk + 1) * size < length - 1", "True")
    copy.fails("D9", r"replay: documents \[0, 1, 2, 3\] were trained on their last chunk")


def test_d9_ledger_with_the_last_chunk(copy):
    def add(head, records):
        batch = records_of(records, "batch")[0]
        last = records[records.index(batch) - 1]
        after = [last["lora"][0], last["lora"][1] + 1]
        records.insert(records.index(batch), last | {"kind": "adapt", "lora": after})

    copy.ledger(add)
    copy.fails("D9", r"document \d+: trained on its last chunk")


# -- R: the report


def test_r1_flattered_score(copy):
    def flatter(result):
        for place in (result, result["stages"]["ttt"]):
            place["val_bpb"] *= 0.9999

    copy.result(flatter)
    copy.fails("R1", "val_bpb .*, recomputed")


def test_r2_result_says_other_than_the_log(copy):
    copy.result(lambda result: result.update(val_bpb=result["val_bpb"] - 0.001))
    copy.fails("R2", r"val_bpb: .* in result.json, .* in metrics.jsonl")


def test_r3_seed_chosen_afterwards(copy):
    copy.result(lambda result: result["settings"].update(SEED=43))
    copy.fails("R3", "seed 42 in the log, 43 in result.json")


def test_r3_hidden_run(copy):
    other = copy.run.parent / "other"
    shutil.copytree(copy.run, other)

    def hide(result: dict) -> None:
        """By what changes no result."""
        result["settings"].update(SEED=7, TRAIN_LOG_EVERY=3, VAL_LOSS_EVERY=9, MODEL_PATH="else.pt")
        result["settings"].update(CPU_THREADS=2, PRESET="pr1868")
        result["environment"]["house_sha256"]["harness/tracking.py"] = "0" * 64

    copy.json(other / "result.json", hide)
    assert "1 other runs of the same experiment beside it (7: " in copy.verdict("R3").evidence
    (copy.run / "submission.json").write_text(json.dumps({"val_bpb": 2.0, "seeds": [42]}))
    copy.fails("R3", "does not list the runs with seeds 7")
    copy.json(other / "result.json", lambda result: result["settings"].update(MATRIX_LR=0.5))
    assert copy.verdict("R3").status in PASSES, "another experiment"
    copy.json(other / "result.json", lambda result: result.update(settings=[]))
    assert copy.verdict("R3").status in PASSES, "no result at all"


def test_r2_submission_of_other_figures(copy):
    """Each figure that the result has too; seconds and scores may be rounded."""
    result = json.loads((copy.run / "result.json").read_text())
    names = ("val_bpb", "val_loss", "artifact_bytes", "code_bytes", "model_bytes", "steps")
    one = {name: result[name] for name in (*names, "train_seconds", "eval_seconds", "legal")}
    one |= {"stages": {name: round(stage["val_bpb"], 5) for name, stage in result["stages"].items()}}
    told = {
        "val_bpb": round(result["val_bpb"], 5),
        "val_loss": result["val_loss"],
        "seed_results": {"42": one},
    }
    told |= {f"bytes_{part}": result[f"{part}_bytes"] for part in ("code", "model")}
    told |= {"bytes_total": result["artifact_bytes"], "seeds": [42]}
    one |= {"train_seconds": round(result["train_seconds"], 1)}
    path = copy.run / "submission.json"
    path.write_text(json.dumps(told))
    assert "in result.json, metrics.jsonl, log, submission.json;" in copy.verdict("R2").evidence
    wrong = json.loads(path.read_text())
    places = [wrong, wrong["seed_results"]["42"], wrong["seed_results"]["42"]["stages"]]
    changed = [
        (place, name) for place in places for name, value in place.items() if isinstance(value, float | int)
    ]
    for place, name in changed:
        place[name] += 1
    path.write_text(json.dumps(wrong))
    evidence = copy.verdict("R2").evidence
    assert evidence.startswith("submission.json says val_bpb ") and evidence.count(", not ") == len(changed)
    for name in (
        "bytes_total",
        "seed 42 steps",
        "seed 42 legal",
        "seed 42 stages ttt",
        "seed 42 train_seconds",
    ):
        assert f"{name} " in evidence, name
    path.write_text(json.dumps({"val_bpb": round(result["val_bpb"], 2)}))
    copy.fails("R2", "submission.json says val_bpb")
    path.write_text("{}")
    copy.fails("R2", "submission.json tells no val_bpb")


def test_r5_ledger_of_another_seed(copy):
    """All other tamperings of the records are in test_tampering.py."""
    copy.ledger(lambda head, records: head["settings"].update(SEED=43))
    copy.fails("R5", "line 1: changed, its hash is .*, line 2 follows on")


def test_r4_a_run_that_went_on_with_other_threads(copy):
    copy.result(lambda result: result["settings"].update(CPU_THREADS=2, DATA_PATH="moved"))
    copy.fails("R4", "CPU_THREADS=1 in the log, 2 in result.json")
    copy.result(lambda result: result.update(resumed=1))
    assert copy.verdict("R4")[0] in PASSES


def test_r4_seeds_of_other_settings(copy):
    other = copy.run.parent / "other"
    shutil.copytree(copy.run, other)
    assert copy.verdict("R4", seeds=[other]).status in PASSES
    copy.json(other / "result.json", lambda result: result["settings"].update(TRAIN_LOG_EVERY=3))
    assert copy.verdict("R4", seeds=[other]).status in PASSES
    copy.json(other / "result.json", lambda result: result["settings"].update(TTT_LORA_LR=0.5))
    copy.fails("R4", r"other: other settings \(TTT_LORA_LR=0.5\)", seeds=[other])


# -- windows that slide over the stream, and SGD between their chunks


START = '        self.watch.see("start", boundaries=[])\n'


SLID = 'self.watch.see("slid", windows=windows, losses=losses)\n'


def test_stream_d1_attention_sees_the_future(sliding):
    sliding.script("is_causal=True", "is_causal=False")
    sliding.fails("D1", "the loss of target .* depends on it")


def test_stream_d1_statistics_of_later_tokens(sgd):
    fit = "        self.model.skip_weights.data.mul_(1 + 1e-4 * self.val.tokens.float().mean())\n"
    sgd.script(START, fit + START)
    sgd.fails("D1", "the weights before batch 0 depend on it")


def test_stream_d2_only_the_score_is_flattered(sliding):
    sliding.script('if __name__ == "__main__":', FLATTERING + 'if __name__ == "__main__":')
    sliding.fails("D2", "scored losses differ from -log p by 1.0e-03 of the sum")


SCORE = "            for _ in self.slide(first, end, part):\n"
LEARN = "            training.train(tokens, optimizer, cfg.ttt_lr, cfg.ttt_epochs)\n"


def test_stream_d3_training_on_a_chunk_before_scoring_it(sgd):
    sgd.script(SCORE, LEARN + SCORE)
    sgd.fails("D3", "the weights that score target .* were trained on its chunk")


def test_stream_d3_ledger_with_an_update_first(sgd):
    def later(head, records):
        for record in records_of(records, "slide"):
            record["base"] += record["stage"] == "ttt"

    sgd.ledger(later)
    sgd.fails("D3", "targets 0-255: scored by weights that were trained on them")


def test_stream_d3_ledger_with_other_tokens(sgd):
    sgd.ledger(lambda head, records: records_of(records, "sgd")[1].update(tokens_sha256="0" * 64))
    sgd.fails("D3", "targets 256-511: trained on other tokens than those scored")


def test_stream_d3_windows_that_learn(sliding):
    sliding.script(SLID, f"self.model.skip_weights.data.mul_(1.001)\n        {SLID}")
    sliding.fails("D3", "replay: the weights change from window to window")


def test_stream_d3_weights_changed_at_the_end(sliding):
    sliding.ledger(lambda head, records: records_of(records, "end")[0].update(model_sha256="0" * 64))
    sliding.fails("D3", "weights .*000000000000.* before and after")


@pytest.mark.parametrize("evaluator", ["sliding", "sgd"])
def test_stream_d4_target_scored_twice(request, evaluator):
    copy = request.getfixturevalue(evaluator)

    def repeat(head, records):
        record = records_of(records, "slide")[-1]
        record["spans"].append(record["spans"][0])

    copy.ledger(repeat)
    copy.fails("D4", r"\d+ targets scored more than once, 0 never")


def test_stream_d4_tail_dropped(sgd):
    sgd.ledger(lambda head, records: records.remove(records_of(records, "slide")[-1]))
    sgd.fails("D4", r"0 targets scored more than once, \d+ never")


def test_stream_d4_windows_before_the_score_counted_too(sgd):
    def drop(head, records):
        records.remove(next(record for record in records if record["kind"] == "slide"))

    sgd.ledger(drop)
    sgd.fails("D4", r"0 targets scored more than once, \d+ never")


def test_stream_d4_chunk_scored_again_by_what_it_taught(sgd):
    """The score of a chunk by the weights trained on it, instead of the one before."""
    old = '                self.watch.see("trained_span"'
    again = "                for _ in self.slide(first, end, BpbMeter()):\n                    pass\n"
    sgd.script(old, again + old)
    sgd.fails("D4", r"\d+ targets scored more than once, 0 never")


def test_stream_d6_timer_starts_late(sgd):
    sgd.result(shorten)
    sgd.fails("D6", "timer .* s, the ledger spans")


def test_stream_d7_evaluation_begins_with_other_weights(sgd):
    sgd.script(START, f"{START}        self.model.skip_weights.data.mul_(1.001)\n")
    sgd.fails("D7", "the weights change before anything is scored")


def test_stream_d8_state_beyond_the_window(sliding):
    sliding.script(SLID, f"self.model.skip_weights.data.mul_(1 + 1e-5 * x.float().mean())\n        {SLID}")
    sliding.fails("D8", "changes, more than a window after the document")


def test_stream_d9_last_chunk_trained_on(sgd):
    sgd.script("if chunk < chunks - 1:", "if True:")
    sgd.fails("D9", "replay: the last chunk was trained on")


def test_stream_r1_flattered_score(sliding):
    def flatter(result):
        for place in (result, result["stages"]["sliding"]):
            place["val_bpb"] *= 0.9999

    sliding.result(flatter)
    sliding.fails("R1", "val_bpb .*, recomputed")


def test_stream_s2_counted_code_scores_otherwise(sgd):
    sgd.counted(r"param_groups\[0\]\['lr'\]=", r"\g<0>2*")
    sgd.fails("S2", "ttt val_bpb .* alone, .* on 320 targets as the logged script")


# -- the verdict


def verdicts_with(**changes: str) -> dict[str, audit.Verdict]:
    """Those of a run that is verified, but for some."""
    told = dict.fromkeys([name for name in audit.ORDER if name[0] != "B"], "VERIFIED")
    told |= dict.fromkeys(("R1", "R2", "R3", "R4", "R5", "T2", "T4", "D6"), "CONSISTENT") | {
        "W2": "NOT CHECKED"
    }
    return {name: audit.Verdict(status, f"as {name} says") for name, status in (told | changes).items()}


def test_audit_of_a_folder_that_cannot_be_written_gives_its_verdict(tg, tmp_path, monkeypatch, capsys):
    (tmp_path / "audit.json").mkdir()
    verdicts = [("A1", audit.Verdict("VERIFIED", "whole"))]
    monkeypatch.setattr(audit, "judged", lambda judged, names: verdicts)
    monkeypatch.setattr(audit, "asked_of", lambda judged: ["A1"])
    monkeypatch.setattr(audit, "told_judge", lambda judged: {"sha256": "0" * 64, "commit": "", "changed": []})
    monkeypatch.setattr(audit, "summary_of", lambda *_: {"verdict": "VERIFIED", "headline": "all is well"})
    facts = {"folder": tmp_path, "script": tg, "known": True, "script_sha256": "0" * 64, "strange_files": []}
    assert audit.audited(SimpleNamespace(**facts, unchanged=lambda: None), []) == "VERIFIED"
    told = capsys.readouterr()
    assert "all is well" in told.out
    assert told.err == f"audit.py: error: {tmp_path}/audit.json: cannot be written (Is a directory)\n"
    (tmp_path / "audit.json").rmdir()
    summary = {"verdict": "VERIFIED", "headline": "all is well", "strange_files": ["a\ud800"]}
    monkeypatch.setattr(audit, "summary_of", lambda *_: summary)
    assert audit.audited(SimpleNamespace(**facts, unchanged=lambda: None), []) == "VERIFIED"
    assert json.loads((tmp_path / "audit.json").read_text(encoding="utf-8")) == summary


@pytest.mark.parametrize(
    ("changes", "strange", "expected", "said"),
    [
        (
            {},
            [],
            "VERIFIED",
            "made again here (as E2 says); NOT of the contest's validation set; training by",
        ),
        ({"W3": "NOT CHECKED"}, [], "CONSISTENT", "on its own word: W3 NOT CHECKED"),
        ({"W2": "VERIFIED"}, [], "VERIFIED", "the whole training repeated"),
        ({"R5": "FAIL"}, [], "FAIL", "not to be believed: R5"),
        ({"R5": "NOT CHECKED"}, [], "CONSISTENT", "R5 NOT CHECKED"),
        ({"W1": "NOT CHECKED"}, [], "CONSISTENT", "on its own word: W1 NOT CHECKED"),
        ({"E2": "CONSISTENT"}, [], "CONSISTENT", "E2 CONSISTENT"),
        ({"S6": "CONSISTENT"}, [], "CONSISTENT", "S6 CONSISTENT"),  # PYTHONPATH or the like is set
        (
            {"D1": "CONSISTENT"},
            ["train_gpt.py"],
            "CONSISTENT",
            "D1 CONSISTENT; script unknown (train_gpt.py)",
        ),
        ({"D1": "CONSISTENT", "W2": "VERIFIED"}, ["train_gpt.py"], "VERIFIED", "the whole training repeated"),
        ({"E1": "NOT CHECKED", "W2": "VERIFIED"}, ["train_gpt.py"], "CONSISTENT", "E1 NOT CHECKED"),
        ({"D2": "FAIL", "W2": "VERIFIED"}, ["train_gpt.py"], "FAIL", "D2"),
    ],
)
def test_headline_says_what_the_number_rests_on(changes, strange, expected, said):
    stage = {"targets": 1276, "bytes": 2619}
    result = {"val_bpb": 2.5, "final_stage": "ttt", "stages": {"ttt": stage}}
    run = SimpleNamespace(result=result, evaluator="lora", strange_files=strange, known=not strange)
    verdict, headline = audit.outcome(run, verdicts_with(**changes))
    assert verdict == expected and headline.startswith(f"{verdict}: val_bpb 2.500000") and said in headline


def test_headline_of_a_sample_says_so():
    run = SimpleNamespace(result={"val_bpb": 2.5, "final_stage": "ttt"}, evaluator="lora", known=True)
    run.result["stages"], run.strange_files = {"ttt": {"targets": 100, "bytes": 200}}, []
    sampled = verdicts_with() | {"E2": audit.Verdict("VERIFIED", "ttt 16 of 90 (16 drawn by seed 3)")}
    assert "of this artifact, of which a sample was made again here (ttt 16" in audit.outcome(run, sampled)[1]


def test_windows_that_slide_carry_the_number_without_an_adapted_score():
    run = SimpleNamespace(result={"val_bpb": 2.5, "final_stage": "sliding"}, evaluator="sliding", known=True)
    run.result["stages"], run.strange_files = {"sliding": {"targets": 100, "bytes": 200}}, []
    assert audit.outcome(run, verdicts_with(E2="NOT CHECKED"))[0] == "VERIFIED"
    assert audit.outcome(run, verdicts_with(E1="NOT CHECKED"))[0] == "CONSISTENT"


# -- what stands around


@pytest.fixture
def library(tmp_path, monkeypatch) -> Path:
    """A folder with an installed distribution of one module, as if Python's were there."""
    (tmp_path / "lib" / "honest-1.0.dist-info").mkdir(parents=True)
    module = tmp_path / "lib" / "honest.py"
    module.write_text("ANSWER = 42\n")
    value = base64.urlsafe_b64encode(hashlib.sha256(module.read_bytes()).digest()).rstrip(b"=").decode()
    record = f"honest.py,sha256={value},12\nhonest-1.0.dist-info/RECORD,,\n"
    (tmp_path / "lib" / "honest-1.0.dist-info" / "RECORD").write_text(record)
    monkeypatch.setattr(box, "_sites", lambda: [str(tmp_path / "lib")])
    monkeypatch.setattr(surroundings, "loaded_files", lambda: [str(module)])
    for name in surroundings.HOOKS:
        monkeypatch.delenv(name, raising=False)
    return module


def test_s6_library_was_changed(copy, library):
    assert copy.verdict("S6").status == "VERIFIED"
    library.write_text("ANSWER = 43\n")
    copy.fails("S6", "changed since it was installed: .*honest.py")


def test_s6_something_starts_with_python(copy, library):
    library.with_name("sitecustomize.py").write_text("")
    copy.fails("S6", "of no distribution.*sitecustomize.py")


def test_s6_hooks_are_said(copy, library, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    assert copy.verdict("S6") == ("CONSISTENT", "PYTHONPATH let other code in; 1 files as installed")
