"""The audit: an honest run passes every check; each check catches the rule that is broken on purpose.

One tiny run is made; each test breaks a copy of its files, script or data, and wants FAIL and the reason.
"""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from test_smoke import SCRIPT, command, make_data, write_shard
from test_two_ranks import ONE_NODE, launch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import audit  # noqa: E402
import lossless_caps  # noqa: E402
import scripts  # noqa: E402
from auditing.artifact import packed_code  # noqa: E402

ARTIFACT = "final_model.int6.ptz"
FIRST_PIECE = 264  # after control pieces, operators and bytes
SETTINGS = {"AUDIT": 1, "TTT_BATCH_SIZE": 3}  # 14 documents: two full batches after the last phase


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Path:
    """Folder with a data set and an audited run on it."""
    work = tmp_path_factory.mktemp("audit")
    make_data(work / "data")
    process = command(SCRIPT, work, DATA_PATH="data", ARTIFACT_DIR="run", RUN_ID="tiny", **SETTINGS)
    assert process.returncode == 0, process.stderr
    return work


@pytest.fixture(scope="module")
def streams(honest) -> Path:
    """The same folder with two runs more of its artifact: sliding windows, and SGD between them."""
    common = SETTINGS | {"TTT_EVAL_ONLY": 1, "QUANTIZED_MODEL_PATH": f"run/{ARTIFACT}", "RUN_ID": "tiny"}
    common |= {"SLIDING_WINDOW_ENABLED": 1, "EVAL_STRIDE": 16, "TTT_CHUNK_TOKENS": 256}
    for name, settings in {"sliding": {"TTT_ENABLED": 0}, "sgd": {"TTT_SGD": 1}}.items():
        process = command(SCRIPT, honest, DATA_PATH="data", ARTIFACT_DIR=name, **common, **settings)
        assert process.returncode == 0, process.stderr
        shutil.copy(honest / "run" / ARTIFACT, honest / name)
    return honest


class Copy:
    """A copy of an honest run and its data, to be broken."""

    def __init__(self, honest: Path, folder: Path, name: str = "run"):
        self.run, self.data = folder / "run", folder / "data"
        shutil.copytree(honest / name, self.run, ignore=shutil.ignore_patterns("audit.json"))
        shutil.copytree(honest / "data", self.data)
        self.original = honest / name

    def house(self) -> dict[str, str]:
        """The script and its house in the log, by path."""
        told = json.loads((self.run / "result.json").read_text())["environment"]
        log = (self.run / "logs" / "tiny.txt").read_text(encoding="utf-8")
        house = scripts.logged_house(log, told["source_sha256"], told["house_sha256"])
        return {path: source.decode() for path, source in house.items()}

    def changed(self, old: str, new: str) -> dict[str, str]:
        """The files of the house in which a text stands, with another in its place."""
        house = {path: text for path, text in self.house().items() if old in text}
        assert house, f"the script has no {old!r} any more: mend this test"
        return {path: text.replace(old, new) for path, text in house.items()}

    def script(self, old: str, new: str) -> None:
        """Change the script that ran, as if it had been that all along."""
        before, path = self.house(), self.run / "logs" / "tiny.txt"
        log = path.read_text(encoding="utf-8")
        for name, after in self.changed(old, new).items():
            digests = [scripts.sha256_of(text.encode()) for text in (before[name], after)]
            log = log.replace(before[name], after).replace(*digests)
            self.result(lambda result, at=name, to=digests[1]: put_digest(result["environment"], at, to))
        path.write_text(log, encoding="utf-8")

    def counted(self, old: str, new: str) -> None:
        """Change the counted script alone."""
        judged = audit.Audit(self.run, data=self.data)
        house = {path: text.encode() for path, text in (self.house() | self.changed(old, new)).items()}
        (self.run / "train_gpt.packed.py").write_bytes(packed_code(judged, house))
        judged.close()

    def result(self, change) -> None:
        self.json(self.run / "result.json", change)

    @staticmethod
    def json(path: Path, change) -> None:
        """Change a JSON file in place."""
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    def ledger(self, change) -> None:
        """Change head and records of the ledger; records that appear or go are numbered anew."""
        path = self.run / "ledger.jsonl"
        head, *records = [json.loads(line) for line in path.read_text().splitlines()]
        change(head, records)
        for order, record in enumerate(records):
            record["order"] = order
        path.write_text("".join(json.dumps(line) + "\n" for line in [head, *records]))

    def shard(self, name: str, change) -> None:
        """Replace the tokens of a shard, and what the manifest says about the file."""
        path = self.data / name
        tokens = change(np.fromfile(path, "<u2")[512:])
        write_shard(path, tokens)
        entry = {"tokens": len(tokens), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        self.json(self.data / "manifest.json", lambda manifest: manifest["files"].update({name: entry}))

    def verdict(self, name: str, **options) -> audit.Verdict:
        """What one check says about the copy."""
        judged = audit.Audit(self.run, data=self.data, **options)
        try:
            return audit.judge(judged, [name])[name]
        finally:
            judged.close()

    def fails(self, name: str, reason: str, **options) -> None:
        """The check must say FAIL, and why."""
        status, evidence = self.verdict(name, **options)
        assert status == "FAIL" and re.search(reason, evidence), f"{name} {status}: {evidence}"
        assert "could not be carried out" not in evidence


@pytest.fixture
def copy(honest, tmp_path) -> Copy:
    return Copy(honest, tmp_path)


@pytest.fixture
def sgd(streams, tmp_path) -> Copy:
    return Copy(streams, tmp_path, "sgd")


@pytest.fixture
def sliding(streams, tmp_path) -> Copy:
    return Copy(streams, tmp_path, "sliding")


def put_digest(environment: dict, path: str, digest: str) -> None:
    """Another checksum of a file of the house."""
    place = environment if path == scripts.CORE else environment["house_sha256"]
    place["source_sha256" if path == scripts.CORE else path] = digest


def records_of(records: list[dict], *kinds: str) -> list[dict]:
    return [record for record in records if record["kind"] in kinds]


# -- the honest run


def test_honest_run_passes_every_check(honest, capsys):
    assert audit.main([str(honest / "run")]) == 0
    table = capsys.readouterr().out
    saved = json.loads((honest / "run" / "audit.json").read_text())
    assert list(saved["checks"]) == list(audit.ORDER) and len(audit.ORDER) == 26
    assert {entry["status"] for entry in saved["checks"].values()} == {"PASS"}
    assert saved["counts"] == {"PASS": 26} and saved["repository_script_is_the_same"] is True
    for name, entry in saved["checks"].items():
        assert re.search(
            rf"^{name}  PASS +{re.escape(entry['rule'])} +{re.escape(entry['evidence'])}$", table, re.M
        )
    columns = {line.index("PASS") for line in table.splitlines()[:26]}
    assert len(columns) == 1, "not aligned"


def test_every_check_is_broken_in_this_file():
    broken = set(re.findall(r"copy\.fails\(\s*\"([A-Z]\d)\"", Path(__file__).read_text()))
    assert broken == set(audit.ORDER)


def test_run_without_a_ledger_is_not_called_legal(copy):
    (copy.run / "ledger.jsonl").unlink()
    for name in ("D3", "D4", "D7", "D9", "T4"):
        assert copy.verdict(name) == ("NOT CHECKED", "the run wrote no ledger.jsonl (AUDIT=1)")


@pytest.mark.parametrize("name", ["sliding", "sgd"])
def test_honest_runs_on_the_stream_pass_every_check(streams, name):
    """But for what is said of training: these runs evaluate an artifact."""
    judged = audit.Audit(streams / name)
    verdicts = audit.judge(judged)
    judged.close()
    untrained = {check for check, verdict in verdicts.items() if "this run did not train" in verdict.evidence}
    assert untrained == {"T1", "T2", "T3", "T5", "D5"}
    assert {verdicts[check].status for check in verdicts.keys() - untrained} == {"PASS"}, audit.table(
        verdicts
    )
    assert re.search(r"on 320 targets as the logged script", verdicts["S2"].evidence)
    learns = {"sliding": "nothing is trained", "sgd": "4 updates, each on tokens scored before"}[name]
    assert learns in verdicts["D3"].evidence


def cut_off(folder: Path, change: str) -> Path:
    """A script that runs the real one, changed so that it is cut off somewhere."""
    start = f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train_gpt\n"
    start += "from harness.checkpoints import Checkpoints\n"
    (folder / "cut_off.py").write_text(f"{start}{change}\ntrain_gpt.main([], os.environ)\n")
    return folder / "cut_off.py"


def test_honest_run_that_was_resumed_and_watched_passes_every_check(honest, tmp_path):
    """Checkpoints after every batch, killed in the adaptation; the audit adds nothing to its TensorBoard."""
    keep = "kept = Checkpoints._keep_weights\nCheckpoints._keep_weights = "
    script = cut_off(tmp_path, f"{keep}lambda *arguments: (kept(*arguments), os._exit(9))")
    settings = SETTINGS | {"CHECKPOINT_SECONDS": 1e-9, "TENSORBOARD_DIR": "board", "ARTIFACT_DIR": "run"}
    settings |= {"DATA_PATH": honest / "data", "RUN_ID": "tiny"}
    assert command(script, tmp_path, **settings).returncode == 9
    process = command(SCRIPT, tmp_path, **settings)
    assert process.returncode == 0 and "resumed within ttt" in process.stdout, process.stderr
    board = sorted((tmp_path / "board").rglob("*.*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        judged = audit.Audit(tmp_path / "run")
        verdicts = audit.judge(judged)
        judged.close()
    assert {verdict.status for verdict in verdicts.values()} == {"PASS"}, audit.table(verdicts)
    assert board and sorted((tmp_path / "board").rglob("*.*")) == board


def test_fail_is_exit_code_1_and_in_audit_json(copy, capsys):
    copy.result(lambda result: result.update(val_bpb=1.0))
    arguments = [str(copy.run), "--data", str(copy.data), "--only", "R1,R2,R3"]
    assert audit.main(arguments) == 1
    assert "1 PASS, 2 FAIL, 0 NOT CHECKED" in capsys.readouterr().out
    assert not (copy.run / "audit.json").exists(), "--only writes nothing"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["{data}"], "result.json: cannot be read as JSON (No such file or directory)"),
        (["{run}", "--only", "D3,X9"], "--only X9: must be among A1, A2, "),
        (["{run}", "--docs", "none.jsonl"], "--docs none.jsonl: no such file"),
        (["{run}", "--data", "none"], "--data none: no such folder"),
        (["{run}", "--wrong"], "unrecognized arguments: --wrong"),
        ([], "the following arguments are required: RUN_DIR"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(honest, capsys, arguments, message):
    places = {"data": honest / "data", "run": honest / "run"}
    assert audit.main([argument.format(**places) for argument in arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and message in shown.err


def test_a_run_of_before_the_house_was_rebuilt_is_a_mistake(copy, capsys):
    copy.result(lambda result: result["environment"].pop("house_sha256"))
    assert audit.main([str(copy.run), "--data", str(copy.data)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert "made by a script of before the house was rebuilt" in shown.err


def test_a_log_that_lacks_a_file_of_the_house_is_a_mistake(copy, capsys):
    log = copy.run / "logs" / "tiny.txt"
    log.write_text(log.read_text().replace("==== systems/ans.py ", "==== systems/other.py "))
    assert audit.main([str(copy.run), "--data", str(copy.data)]) == 2
    assert "its log holds no systems/ans.py with the checksum" in capsys.readouterr().err


def test_what_is_not_the_repositorys_is_named(copy, capsys):
    """Whatever file of the house it is; the verdict is that of the run's own one."""
    arguments = [str(copy.run), "--data", str(copy.data), "--only", "S1"]
    assert audit.main(arguments) == 0
    assert re.search(r"^script \w{12}, the repository's;", capsys.readouterr().out, re.M)
    copy.script("def packed_script(", "def packed_script(*_):\n    return b'', True\n\n\ndef other(")
    assert audit.main(arguments) == 1
    said = capsys.readouterr().out
    assert "is not the packing of the script in the log" in said
    assert re.search(r"^script \w{12}, NOT the repository's \(harness/packing.py\);", said, re.M)


def test_ledgers_of_two_ranks_are_one(honest):
    artifact = honest / "run" / ARTIFACT
    settings = SETTINGS | {"TTT_EVAL_ONLY": 1, "QUANTIZED_MODEL_PATH": artifact, "RUN_ID": "two"}
    settings["SLIDING_WINDOW_ENABLED"] = 1
    process = launch(honest, "two", *ONE_NODE, **settings)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    judged = audit.Audit(honest / "two")
    verdicts = audit.judge(judged, ["S1", "T1", "D3", "D4", "D6", "D7", "D9", "R1"])
    judged.close()
    assert verdicts.pop("T1") == ("NOT CHECKED", "this run did not train")
    assert {verdict.status for verdict in verdicts.values()} == {"PASS"}, audit.table(verdicts)
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
    settings = SETTINGS | {"CHECKPOINT_SECONDS": 1e6, "SLIDING_WINDOW_ENABLED": 1, "RUN_ID": "gone"}
    settings |= {"TTT_EVAL_ONLY": 1, "QUANTIZED_MODEL_PATH": honest / "run" / ARTIFACT}
    cut = "train_gpt.Run.adapt = lambda run: (run.ranks.wait_for_all('cut'), os._exit(9))"
    script = cut_off(tmp_path, cut)
    two = launch(honest, "gone", *ONE_NODE, script=script, **settings)
    assert "sliding val_loss" in two.communicate(timeout=120)[0] and two.returncode == 1
    one = command(SCRIPT, honest, DATA_PATH="data", ARTIFACT_DIR="gone", **settings)
    assert one.returncode == 0 and "resumed gone after quantised, sliding" in one.stdout, one.stderr
    judged = audit.Audit(honest / "gone")
    verdict = audit.judge(judged, ["D4"])["D4"]
    judged.close()
    assert verdict.status == "PASS" and "once each in stage sliding too" in verdict.evidence, verdict
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


def test_a1_only_a_sample_scored(copy):
    copy.result(lambda result: result["stages"]["ttt"].update(targets=1000))
    copy.fails("A1", "scored 1,000 and 2,619 of 1,276 targets and 2,619 bytes")


def test_a2_validation_document_in_a_train_shard(copy):
    val = np.fromfile(copy.data / "fineweb_val_000000.bin", "<u2")[512:]
    starts = np.flatnonzero(val == 1)
    copy.shard("fineweb_train_000000.bin", lambda train: np.append(train, val[starts[3] : starts[4]]))
    copy.fails("A2", "validation document 3 opens a document of fineweb_train_000000.bin")


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
    assert status == "PASS" and evidence.startswith("2,619 bytes recounted"), evidence
    texts[2] = texts[2].replace("a", "é", 1)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    copy.fails("A3", "docs.jsonl line 3: has other tokens", docs=str(path))


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
    copy.ledger(lambda head, records: head["accesses"].append(["train", "read", name, 1.0]))
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
    copy.ledger(lambda head, records: head["accesses"].append(["ttt", "network", "socket.connect x", 1.0]))
    copy.fails("T4", "1 connections, the first in ttt: socket.connect")


def test_t5_calibration_on_validation(copy):
    old = 'paths = shard_paths(cfg.data_folder, "train")\n            loader = ShuffledLoader('
    copy.script(old, old.replace("train", "val"))
    copy.fails("T5", "the artifact depends on the validation tokens")


# -- S: the artifact


def test_s1_oversize_artifact(copy):
    code = (copy.run / "train_gpt.packed.py").stat().st_size
    with open(copy.run / ARTIFACT, "r+b") as file:
        file.truncate(16_000_000 - code)
    copy.fails("S1", "= 16,000,000 bytes")


def test_s1_counted_code_is_another_script(copy):
    copy.script('"eps": 1e-10', '"eps": 1e-9')
    copy.fails("S1", "not the packing of the script in the log")


def test_s2_evaluation_needs_training_data(copy):
    old = "self.val = load_validation(cfg)"
    copy.counted(old, f'self.first = shard_paths(cfg.data_folder, "train")[0]; print(self.first); {old}')
    copy.fails("S2", r"exit code 1: IndexError")


def test_s2_counted_code_scores_otherwise(copy):
    copy.counted("self.loss_sum / self.tokens", "0.999 * self.loss_sum / self.tokens")
    copy.fails("S2", "quantised val_bpb .* alone, .* in the run")


def test_s3_lossy_storage(copy):
    copy.script(
        "arrays[part.key] = torch.from_numpy(array)", "arrays[part.key] = torch.from_numpy(array) // 2 * 2"
    )
    copy.fails("S3", "packed again it has")


def test_s4_evaluation_reads_what_training_left(copy):
    left = str(copy.run / "final_model.pt")
    peek = f"with contextlib.suppress(OSError):\n                open({left!r}).close()\n            "
    old = "self.artifact = artifact.read_bytes()"
    copy.counted(old, peek + old)
    copy.fails("S4", "the evaluation alone wanted .*final_model.pt")


def test_s4_run_read_its_checkpoint(copy):
    entry = ["ttt", "read", str(copy.run / "final_model.pt"), 1.0]
    copy.ledger(lambda head, records: head["accesses"].append(entry))
    copy.fails("S4", "read by the run's evaluation: final_model.pt")


def test_s4_adaptation_begins_with_other_weights(copy):
    copy.ledger(lambda head, records: records[0].update(model_sha256="0" * 64))
    copy.fails("S4", "evaluation began with weights 000000000000")


# -- D: the evaluation


def test_d1_attention_sees_the_future(copy):
    copy.script("is_causal=True", "is_causal=False")
    copy.fails("D1", "losses before a flipped token change")


def test_d1_chunks_that_are_one_document_start(copy):
    """Smaller chunks for short documents: the last one may be the start of the next document alone."""
    copy.result(lambda result: result["settings"].update(TTT_CHUNK_BY_LENGTH="64:8"))
    assert copy.verdict("D1").status == "PASS"


def test_d1_statistics_of_later_tokens(copy):
    old = '            self.watch.see("start", boundaries=self.boundaries)\n'
    fit = "            self.model.skip_weights.data.mul_(1 + 1e-4 * self.val.tokens.float().mean())\n"
    copy.script(old, fit + old)
    copy.fails("D1", "the weights before chunk 0 depend on it")


def test_d2_losses_are_no_distribution(copy):
    copy.script("return losses.view(targets.shape)", "return 0.99 * losses.view(targets.shape)")
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
    copy.fails("D4", "16 targets scored more than once, 0 never")


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
    copy.fails("D4", r"document \d+: 16 targets scored at once, 8 declared")
    assert copy.verdict("D3").status == "PASS"


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
    call = "graphs = warm_up_ttt(self.model, cfg, sizes, self.looping, self.ranks)\n"
    more = "ScoreFirstTTT(copy.deepcopy(self.model), self.val, cfg, looping=self.looping).run()"
    copy.script(call, f"import copy; {more}; {call}")
    copy.fails("D5", r"test-time training: \d+ runs of 8 warm-up tokens occur in the data")


def test_d5_warm_up_of_adaptation_that_trains(copy):
    """The same updates undone afterwards are no fault."""
    learnt = ".sum().backward(); [p.data.sub_(p.grad) for p in model.parameters() if p.grad is not None]\n"
    copy.script(".losses(row).sum().backward()\n    finally:", f".losses(row){learnt}    finally:")
    assert copy.verdict("D5").status == "PASS"
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


ACROSS = "[q.size(2)] if segments is None else", "[q.size(2)] if True else"


def test_d8_smear_gate_without_its_mask(copy):
    copy.script("if self.cfg.smear_bos_mask:", "if False:")
    copy.fails("D8", "losses of other documents in the row change")


def test_d8_smear_gate_that_is_meant_to_have_no_mask(copy):
    """PR #1667's: said, never called PASS; anything else that crosses is still a violation."""
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
    process = command(SCRIPT, honest, DATA_PATH="data", ARTIFACT_DIR="plain", **settings)
    assert process.returncode == 0, process.stderr
    shutil.copy(honest / "run" / ARTIFACT, honest / "plain")
    copy = Copy(honest, tmp_path, "plain")
    status, evidence = copy.verdict("D8")
    assert status == "PASS" and re.search(r"[1-9]\d* later losses within a window change", evidence), evidence
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
    copy.json(other / "result.json", lambda result: result["settings"].update(SEED=7))
    assert "1 other runs of the same script and settings beside it (7: " in copy.verdict("R3").evidence
    (copy.run / "submission.json").write_text(json.dumps({"val_bpb": 2.0, "seeds": [42]}))
    copy.fails("R3", "does not list the runs with seeds 7")


def test_r4_seeds_of_other_settings(copy):
    other = copy.run.parent / "other"
    shutil.copytree(copy.run, other)
    assert copy.verdict("R4", seeds=[other]).status == "PASS"
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
    sgd.counted('optimizer.param_groups[0]["lr"] = rate\n', 'optimizer.param_groups[0]["lr"] = 2 * rate\n')
    sgd.fails("S2", "ttt val_bpb .* alone, .* on 320 targets as the logged script")
