"""Copies of an audited run, to be broken: file by file, or as a forger does who makes all records anew."""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import folds
import numpy as np
import pytest
from test_smoke import write_shard

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import audit  # noqa: E402
import scripts  # noqa: E402
from auditing import run as auditing_run  # noqa: E402
from auditing.chain import AFTER_THE_END, shown_event  # noqa: E402
from harness.chain import line_hash  # noqa: E402
from harness.packing import wrap  # noqa: E402
from scripts import sha256_of  # noqa: E402
from train_gpt import Config  # noqa: E402

ARTIFACT, MODEL, CODE = "final_model.int6.ptz", "final_model.pt", "train_gpt.packed.py"


@pytest.fixture(scope="module", autouse=True)
def one_house(tmp_path_factory):
    """Where a file imports this: its audits judge by one import of the repository's house."""
    real, ours = auditing_run.AuditedHouse, auditing_run.repository()
    house = real(ours, tmp_path_factory.mktemp("house"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            auditing_run, "AuditedHouse", lambda new, work: house if new == ours else real(new, work)
        )
        patch.setattr(house, "forget", lambda: None, raising=False)
        folds.fold_once(patch, next(m for m in house.modules if m.__name__.endswith(".harness.packing")))
        yield house


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
        """Change the counted script alone: the text in its wrapper, where a regular expression fits once."""
        text, count = re.subn(old, new, folds.unfolded((self.run / CODE).read_bytes()))
        assert count == 1, f"the counted script has {count} times {old!r}: mend this test"
        (self.run / CODE).write_bytes(wrap(text.encode(), Config()))

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

    def values(self, name: str) -> np.ndarray:
        """The tokens, or the bytes, of a shard."""
        return np.fromfile(self.data / name, "<u2")[512:]

    def shard(self, name: str, change) -> None:
        """Replace the tokens of a shard, and what the manifest says about the file."""
        path = self.data / name
        tokens = change(self.values(name))
        write_shard(path, tokens)
        entry = {"tokens": len(tokens), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        self.json(self.data / "manifest.json", lambda manifest: manifest["files"].update({name: entry}))

    def verdict(self, name: str, boxed: bool = True, **options) -> audit.Verdict:
        """What one check says about the copy; as in the box, but in this process: the script is a test's."""
        judged = audit.Audit(self.run, boxed=boxed, data=self.data, **options)
        try:
            return audit.judge(judged, [name])[name]
        finally:
            judged.close()

    def fails(self, name: str, reason: str, **options) -> None:
        """The check must say FAIL, and why."""
        status, evidence = self.verdict(name, **options)
        assert status == "FAIL" and re.search(reason, evidence), f"{name} {status}: {evidence}"
        assert "could not be carried out" not in evidence


def put_digest(environment: dict, path: str, digest: str) -> None:
    """Another checksum of a file of the house."""
    place = environment if path == scripts.CORE else environment["house_sha256"]
    place["source_sha256" if path == scripts.CORE else path] = digest


class Forgery(Copy):
    """A copy of which all records and the chain can be made consistent anew, as one who knows the audit does.

    A cheat changes result.json, documents.json, the data or the files of the run; `forge` tells the same in
    ledger, events and log, with all checksums. So only the cheat itself can be found.
    """

    def forge(self, change: Callable[[list[dict]], None] | None = None) -> None:
        """Make it so (of one rank); `change` gets the records of the ledger, the head first, before that."""
        path = self.run / "ledger.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        if change:
            change(records)
        result = json.loads((self.run / "result.json").read_text())
        result["environment"]["data_sha256"] = sha256_of(self.data / "manifest.json")
        for record in records:
            self._retell(record, result)
        lines = [json.dumps(records[0])]
        for order, record in enumerate(records[1:]):
            record |= {"order": order, "prev": line_hash(lines[-1])}
            record |= {"ends": [record["prev"]]} if record["kind"] == "close" else {}
            lines.append(json.dumps(record))
        path.write_text("".join(f"{line}\n" for line in lines))
        (self.run / "result.json").write_text(json.dumps(result | {"ledger_sha256": line_hash(lines[-1])}))
        self._events([record["event"] for record in records if record["kind"] == "line"], result)

    def _retell(self, record: dict, result: dict) -> None:
        """A record says what result.json and the files say."""
        kind, environment = record["kind"], result["environment"]
        sums = {"weights": {"file_sha256": MODEL}, "close": {"documents_sha256": "documents.json"}}
        sums["artifact"] = {"artifact_sha256": ARTIFACT, "code_sha256": CODE}
        record |= {name: sha256_of(self.run / file) for name, file in sums.get(kind, {}).items()}
        if kind == "run":
            record |= {"run": result["run"], "settings": result["settings"]}
            record["val_sha256"] = {name: sha256_of(self.data / name) for name in record["val_sha256"]}
            record["tokenizer_sha256"] = sha256_of(self.data / "tokenizer.model")
        if kind in ("run", "joined", "close"):
            record["environment"] |= {k: v for k, v in environment.items() if k in record["environment"]}
        if kind == "close":
            record["stage_seconds"] = result["seconds"]
            record["result"] = {name: result[name] for name in record["result"]}
        if kind == "line":
            event = record["event"]
            told = {"start": environment, "size": result, "saved": {"train_seconds": result["train_seconds"]}}
            told |= result["stages"]
            event |= {k: v for k, v in told.get(event["stage"], {}).items() if k in event}

    def _events(self, events: list[dict], result: dict) -> None:
        """metrics.jsonl and the log tell these events, and the settings of the result."""
        path, log = self.run / "metrics.jsonl", next((self.run / "logs").glob("*.txt"))
        later = [json.loads(line) for line in path.read_text().splitlines()]
        later = [event for event in later if event["stage"] in AFTER_THE_END]
        later = [{k: result.get(k, v) for k, v in e.items()} if e["stage"] == "final" else e for e in later]
        path.write_text("".join(json.dumps(event) + "\n" for event in [*events, *later]))
        head, end, rest = log.read_text(encoding="utf-8").partition("\n==== end\n")
        settings, rule, house = head.partition("=" * 80)
        for name, value in result["settings"].items():
            told = int(value) if isinstance(value, bool) else value
            settings = re.sub(rf"(?m)^{name}=.*$", f"{name}={told}", settings)
        machine = rest[: re.search(r"(?m)^start ", rest).start()]
        shown = "".join(f"{shown_event(event)}\n" for event in [*events, *later])
        log.write_text(settings + rule + house + end + machine + shown, encoding="utf-8")
