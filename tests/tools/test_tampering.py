"""The chain of the ledger: an honest run passes R5, and every tampering is named with its line.

One tiny run is made, and one that is killed twice; each test changes a copy of the first one's files.
"""

import copy
import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from test_smoke import environment, make_data

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import audit  # noqa: E402
from auditing.run import carry_out, read_result  # noqa: E402
from harness.chain import BrokenChain, follow, line_hash  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_packing")
SETTINGS = {"AUDIT": 1, "RUN_ID": "tiny", "DATA_PATH": "data", "WARMUP_STEPS": 0, "TTT_CHUNK_SIZE": 64}
SETTINGS |= {"PHASED_TTT_NUM_PHASES": 1, "TTT_BATCH_SIZE": 8, "TRAIN_LOG_EVERY": 3, "ITERATIONS": 7}
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(scope="module")
def start(tg, tmp_path_factory, quick_packing):
    """Function: a tiny run in this process, in a folder of its own -> exit code."""
    work = tmp_path_factory.mktemp("chain")
    make_data(work / "data")

    def run(name: str, **settings: object) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(work)
            return tg.main([], environment(**SETTINGS | {"ARTIFACT_DIR": work / name} | settings))

    run.work = work
    return run


@pytest.fixture(scope="module")
def judged(start):
    """The audit of an honest run."""
    assert start("run") == 0
    made = audit.Audit(start.work / "run", data=start.work / "data")
    yield made
    made.close()


def verdict(judged: audit.Audit, folder: Path, anchored: str = "") -> audit.Verdict:
    """What R5 says of a folder. The audit is that of the honest run but for the files: it is made once."""
    other = copy.copy(judged)
    for name in ("log", "metrics", "ledger", "sources", "strange_files", "artifact"):
        vars(other).pop(name, None)
    other.folder, other.result = folder, read_result(folder / "result.json")
    other.options = dataclasses.replace(judged.options, anchored=anchored)
    return carry_out(other, "R5")


class Forgery:
    """A copy of an honest run's files, to be changed."""

    def __init__(self, judged: audit.Audit, folder: Path):
        self.judged, self.folder = judged, folder
        shutil.copytree(judged.folder, folder)
        self.ledger, self.metrics = folder / "ledger.jsonl", folder / "metrics.jsonl"

    def lines(self, path: Path, change) -> None:
        """Change the list of a file's lines."""
        lines = path.read_text().splitlines()
        change(lines)
        path.write_text("".join(f"{line}\n" for line in lines))

    def number(self, kind: str, stage: str = "", step: int = 0, last: bool = False) -> int:
        """Number of the first (or last) line of a kind, of an event where one is named."""
        rows = [json.loads(line) for line in self.ledger.read_text().splitlines()]
        found = []
        for number, row in enumerate(rows, 1):
            event = row.get("event", {})
            if (
                row["kind"] == kind
                and event.get("stage", "") == stage
                and (not step or event["step"] == step)
            ):
                found.append(number)
        return found[-last]

    def record(self, number: int, change, chained: bool = False) -> None:
        """Change a line of the ledger; `chained`: as a forger who makes the chain anew behind it."""

        def edit(lines: list[str]) -> None:
            row = json.loads(lines[number - 1])
            change(row)
            lines[number - 1] = json.dumps(row)

        self.lines(self.ledger, edit)
        if chained:
            self.chain()

    def chain(self) -> None:
        """Make numbers, hashes and the end in result.json anew (one rank)."""

        def anew(lines: list[str]) -> None:
            for place in range(1, len(lines)):
                row = json.loads(lines[place]) | {"order": place - 1, "prev": line_hash(lines[place - 1])}
                row |= {"ends": [row["prev"]]} if row["kind"] == "close" else {}
                lines[place] = json.dumps(row)
            self.result(lambda result: result.update(ledger_sha256=line_hash(lines[-1])))

        self.lines(self.ledger, anew)

    def result(self, change) -> None:
        self.json("result.json", change)

    def json(self, name: str, change) -> None:
        """Change a JSON file."""
        value = json.loads((self.folder / name).read_text())
        change(value)
        (self.folder / name).write_text(json.dumps(value))

    def fails(self, reason: str, **options: str) -> None:
        """R5 must say FAIL, and why."""
        status, evidence = verdict(self.judged, self.folder, **options)
        assert status == "FAIL" and re.match(reason, evidence), f"{status}: {evidence}"


@pytest.fixture
def forged(judged, tmp_path) -> Forgery:
    return Forgery(judged, tmp_path / "run")


# -- honest runs


def test_chain_of_an_honest_run(judged, forged):
    status, evidence = verdict(judged, judged.folder)
    lines = (judged.folder / "ledger.jsonl").read_text().splitlines()
    assert status == "CONSISTENT" and evidence.startswith(f"{len(lines):,} lines of 1 rank up to"), evidence
    last = json.loads((judged.folder / "result.json").read_text())["ledger_sha256"]
    assert line_hash(lines[-1]) == last and last[:12] in evidence
    assert sorted(path.name for path in judged.folder.glob("ledger*")) == ["ledger.jsonl"]
    forged.chain()
    assert forged.ledger.read_text().splitlines() == lines, "the forger of these tests makes the same chain"


def test_chain_is_written_while_the_run_goes_on(tg, start, judged, monkeypatch):
    """At its evaluation the file has all that came before, as the finished ledger has it; so has --anchor."""
    seen = []

    def looked(run: object) -> None:
        seen.append((run.log.folder / "ledger.jsonl").read_text())
        seen.append(audit.chain.anchored_chain(run.log.folder))

    monkeypatch.setattr(tg.Run, "adapt_documents", looked)
    monkeypatch.setattr(tg.Run, "finish", lambda run: 0)
    artifact = judged.folder / "final_model.int6.ptz"
    assert start("live", TTT_EVAL_ONLY=1, QUANTIZED_MODEL_PATH=artifact) == 0
    links, _ = follow(seen[0].splitlines())
    kinds = [link.record["kind"] for link in links]
    assert kinds == ["run", "joined", *["line"] * 4, "artifact", "line"]
    assert f"chain={links[6].hash}" in seen[1] and "seed=42" in seen[1]
    (log,) = (start.work / "live" / "logs").iterdir()
    assert seen[1] in log.read_text().splitlines()


def killed(tg, monkeypatch, target: str, count: int, start, **settings: object) -> None:
    """A run that ends without a word before the n-th call of a method."""

    class Killed(BaseException):
        pass

    owner, method = getattr(tg, target.partition(".")[0]), target.partition(".")[2]
    original, left = getattr(owner, method), [count]

    def counted(*arguments: object, **options: object) -> object:
        left[0] -= 1
        if not left[0]:
            raise Killed
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, counted)
        with pytest.raises(Killed):
            pytest.fail(f"{target} was not reached: {start('resumed', **settings)}")


def test_chain_of_a_resumed_run(tg, start, judged, monkeypatch, tmp_path):
    """Killed in training and in the adaptation; the anchor that it printed first stays that of the run."""
    kept = {"CHECKPOINT_SECONDS": 1e-9}
    killed(tg, monkeypatch, "Trainer.step", 6, start, **kept)
    killed(tg, monkeypatch, "ScoreFirstTTT._score_batch", 2, start, **kept)
    folder = start.work / "resumed"
    posted = audit.chain.anchored_chain(folder)
    assert start("resumed", **kept) == 0
    assert json.loads((folder / "result.json").read_text())["resumed"] == 2
    links, ends = follow((folder / "ledger.jsonl").read_text().splitlines())
    assert [link.record["kind"] for link in links].count("joined") == 3 and len(ends) == 1
    status, evidence = verdict(judged, folder, anchored=posted)
    assert status == "CONSISTENT" and "the posted line is of line" in evidence, evidence
    forged = Forgery(judged, tmp_path / "run")
    forged.fails(r"line \d+: settings=\w+, the line that was posted has \w+", anchored=posted)


# -- the chain is cut


def test_chain_with_a_line_removed(forged):
    number = forged.number("line", "train", step=3)
    forged.lines(forged.ledger, lambda lines: lines.pop(number - 1))
    forged.fails(
        rf"line {number}: record {number - 1} of rank 0, after line {number - 1} record {number - 2} "
    )


def test_chain_with_lines_swapped(forged):
    number = forged.number("score")

    def swap(lines: list[str]) -> None:
        lines[number - 1], lines[number] = lines[number], lines[number - 1]

    forged.lines(forged.ledger, swap)
    forged.fails(
        rf"line {number}: record {number - 1} of rank 0, after line {number - 1} record {number - 2} "
    )


def test_chain_with_a_line_twice(forged):
    number = forged.number("adapt")
    forged.lines(forged.ledger, lambda lines: lines.insert(number, lines[number - 1]))
    forged.fails(
        rf"line {number + 1}: record {number - 2} of rank 0, after line {number} record {number - 1} "
    )


def test_chain_with_a_line_changed(forged):
    number = forged.number("batch")
    forged.record(number, lambda row: row["chunks"][0].__setitem__(0, 1.0))
    forged.fails(rf"line {number}: changed, its hash is \w+, line {number + 1} follows on")


def test_chain_with_lines_renumbered(forged):
    number = forged.number("score", last=True)
    forged.record(number, lambda row: row.update(order=row["order"] + 1))
    forged.fails(rf"line {number}: record {number - 1} of rank 0")


def test_chain_with_its_first_line_changed(forged):
    forged.record(1, lambda row: row["settings"].update(SEED=7))
    forged.fails("line 1: changed, its hash is .*, line 2 follows on")


@pytest.mark.parametrize("change", [{"stage_seconds": {}}, {"documents_sha256": "0" * 64}])
def test_chain_with_its_last_line_changed(forged, change):
    number = forged.number("close")
    forged.record(number, lambda row: row.update(change))
    forged.fails(rf"line {number}: changed, result.json ends with \w+, it is")


def test_chain_without_its_last_line(forged):
    forged.lines(forged.ledger, lambda lines: lines.pop())
    number = forged.number("line", "ttt")
    forged.fails(rf"line {number}: the last one, and not the one that closes")


def test_chain_without_hashes_is_no_excuse(forged):
    """A script that chains its ledger has made no other one."""
    forged.lines(forged.ledger, lambda lines: lines.__setitem__(slice(None), map(unchained, lines)))
    forged.result(lambda result: result.pop("ledger_sha256"))
    forged.fails("line 2: not a line of a chain, which has kind, rank, order, seconds, stage, prev")


def unchained(line: str) -> str:
    """A line as it was before there was a chain."""
    return json.dumps({name: value for name, value in json.loads(line).items() if name != "prev"})


def test_ledger_of_before_the_chain_is_not_checked(forged):
    forged.lines(forged.ledger, lambda lines: lines.__setitem__(slice(None), map(unchained, lines)))
    forged.result(lambda result: result.pop("ledger_sha256"))
    forged.result(lambda result: result["environment"]["house_sha256"].pop("harness/chain.py"))
    status, evidence = verdict(forged.judged, forged.folder)
    assert (status, evidence) == ("NOT CHECKED", "a ledger of before its lines were chained")
    forged.ledger.unlink()
    assert verdict(forged.judged, forged.folder)[0] == "NOT CHECKED"
    forged.fails("a line was posted, but there is no ledger.jsonl", anchored="anchor run=tiny")


def two_ranks() -> list[str]:
    """A small ledger of two ranks."""
    head = json.dumps({"kind": "run", "run": "two", "settings": {}, "environment": {}})
    lines, last = [head], {0: head, 1: head}
    for order, seconds in enumerate((0.0, 1.0, 2.0)):
        for rank in (0, 1):
            row = {"kind": "score", "rank": rank, "order": order, "seconds": seconds, "stage": "ttt"}
            last[rank] = json.dumps(row | {"prev": line_hash(last[rank])})
            lines.append(last[rank])
    return lines


def test_chains_of_two_ranks_are_apart():
    lines = two_ranks()
    links, ends = follow(lines)
    assert [link.number for link in ends] == [6, 7] and len(links) == 7
    lines[3], lines[4] = lines[4], lines[3]
    assert len(follow(lines)[1]) == 2, "the order between ranks is that of the file, not of the chain"
    with pytest.raises(BrokenChain, match="line 5: record 2 of rank 0, after line 2 record 1 is due"):
        follow(two_ranks()[:3] + two_ranks()[4:])
    with pytest.raises(BrokenChain, match="line 2: record 0 of rank 3|line 4: not JSON"):
        follow([*two_ranks()[:3], "no"])
    with pytest.raises(BrokenChain, match="line 2: not JSON .the name 'rank' stands there twice"):
        follow([two_ranks()[0], two_ranks()[1].replace("{", '{"rank": 7, ')])


# -- the chain is whole, other files say other things


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda result: result["settings"].update(SEED=43), "line 1: SEED 42, result.json says 43"),
        (lambda result: result.update(run="best"), "line 1: run tiny, result.json says best"),
        (
            lambda result: result["environment"].update(device=H100),
            rf"line \d+: device .*, result.json says {H100}",
        ),
        (lambda result: result["environment"].update(ranks=8), r"line \d+: ranks 1, result.json says 8"),
        (
            lambda result: result["stages"]["ttt"].update(val_bpb=1.0),
            r"line \d+: ttt val_bpb .*, result.json says 1.0",
        ),
        (lambda result: result.update(val_bpb=1.0), r"line \d+: val_bpb .*, result.json says 1.0"),
        (lambda result: result["stages"].pop("prequant"), r"line \d+: prequant .*, result.json says nothing"),
        (
            lambda result: result["seconds"].update(train=0.1),
            r"line \d+: seconds of train .*, result.json says 0.1",
        ),
        (lambda result: result.update(eval_seconds=0.1), r"line \d+: eval_seconds .*, result.json says 0.1"),
        (lambda result: result.update(steps=6), r"line \d+: steps 7, result.json says 6"),
        (lambda result: result.update(code_bytes=5), r"line \d+: code_bytes 6, result.json says 5"),
        (lambda result: result.update(record=True), r"line \d+: record nothing, result.json says True"),
    ],
)
def test_chain_and_result_differ(forged, change, reason):
    forged.result(change)
    forged.fails(reason)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("documents.json", r"line \d+: documents_sha256"),
        ("final_model.int6.ptz", r"line \d+: artifact_sha256"),
        ("final_model.pt", r"line \d+: file_sha256"),
        ("train_gpt.packed.py", r"line \d+: code_sha256"),
    ],
)
def test_chain_and_a_file_differ(forged, name, reason):
    data = (forged.folder / name).read_bytes()
    (forged.folder / name).write_bytes(data + b" ")
    forged.fails(rf"{reason} \w+, {name} says \w+")


def test_chain_and_events_differ(forged):
    number, last = forged.number("line", "train", step=4), forged.number("close")
    lines = forged.metrics.read_text().splitlines()
    place = next(place for place, line in enumerate(lines) if '"step": 4, "train_loss"' in line)
    forged.lines(forged.metrics, lambda lines: lines.pop(place))
    forged.fails(rf"line {number}: train step:4 .*, metrics.jsonl line {place + 1} says step_4 ")
    forged.metrics.write_text("\n".join([*lines[:place], lines[place], *lines[place:]]) + "\n")
    forged.fails(rf"line {number + 1}: step_4 .*, metrics.jsonl line {place + 2} says train step:4")
    forged.metrics.write_text("\n".join([*lines, lines[place]]) + "\n")
    forged.fails(rf"line {last}: closes, and metrics.jsonl line {len(lines) + 1} is train")


def test_chain_and_log_differ(forged):
    (path,) = (forged.folder / "logs").iterdir()
    log, number = path.read_text(), forged.number("line", "saved")
    path.write_text(re.sub(r"(?m)^(saved .*train_seconds:).*$", r"\g<1>0.01", log))
    forged.fails(rf"line {number}: saved .*, the log says saved ")
    path.write_text(re.sub(r"(?m)^(train step:3 .*)$", r"\1\n\1", log))
    number = forged.number("line", "train", step=3)
    forged.fails(rf"line {number + 1}: looping .*, the log says train step:3")


# -- the chain was made anew


def test_forged_documents_do_not_make_the_score(forged):
    def halve(told: dict) -> None:
        told["losses"]["ttt"] = [loss / 2 for loss in told["losses"]["ttt"]]

    forged.json("documents.json", halve)
    digest = audit.chain.sha256_of(forged.folder / "documents.json")
    forged.record(forged.number("close"), lambda row: row.update(documents_sha256=digest), chained=True)
    number = forged.number("line", "ttt")
    forged.fails(rf"line {number}: ttt [\d.]+ nats, documents.json [\d.]+")


def claim(forged: Forgery, **claims: object) -> None:
    """Claims about the machine, in every record."""
    forged.result(lambda result: result["environment"].update(claims))
    forged.record(1, lambda row: row["environment"].update(claims))
    for kind in ("joined", "close"):
        forged.record(forged.number(kind), lambda row: row["environment"].update(claims))
    forged.record(forged.number("line", "start"), lambda row: row["event"].update(claims))
    forged.lines(
        forged.metrics, lambda lines: lines.__setitem__(0, json.dumps(json.loads(lines[0]) | claims))
    )
    (path,) = (forged.folder / "logs").iterdir()
    for name, value in claims.items():
        log = path.read_text()
        path.write_text(re.sub(rf"(?m)^(start .* {name}:).*?( \w+:)", rf"\g<1>{value}\g<2>", log))
    forged.chain()


def test_forged_hardware(forged):
    claim(forged, device=H100)
    found = rf"line {forged.number('joined')}: {H100} by torch .*\+cpu, CUDA None"
    if torch.version.cuda:  # by which it might have been; then the log tells
        found = rf"line {forged.number('close')}: {H100}, which the log's head does not name"
    forged.fails(found)


def test_forged_hardware_that_the_log_does_not_name(forged):
    claim(forged, device="Cray-1")
    (path,) = (forged.folder / "logs").iterdir()
    log = path.read_text()
    path.write_text(log.replace("\n==== end\n", "\n==== end\nModel name: Z80\n"))
    forged.fails(rf"line {forged.number('close')}: Cray-1, which the log's head does not name")


def test_forged_number_of_ranks(forged):
    claim(forged, ranks=8)
    forged.fails(rf"line {forged.number('close')}: 8 ranks, joined have \[0\]")


def test_forged_clock_that_runs_backwards(forged):
    number = forged.number("adapt")
    forged.record(number, lambda row: row.update(seconds=0.001), chained=True)
    forged.fails(rf"line {number}: written at 0.001 s, line {number - 1}, which it follows, at")


def test_forged_seconds_of_a_stage(forged):
    """The stopwatch of the adaptation, shortened wherever it is told."""
    seconds = forged.judged.result["seconds"]["ttt"] / 2
    forged.result(lambda result: result["seconds"].update(ttt=seconds))
    forged.result(lambda result: result["stages"]["ttt"].update(seconds=seconds))
    forged.result(lambda result: result.update(eval_seconds=seconds))
    forged.record(forged.number("line", "ttt"), lambda row: row["event"].update(seconds=seconds))
    forged.record(forged.number("close"), lambda row: row["stage_seconds"].update(ttt=seconds))
    forged.chain()

    def shorten(lines: list[str]) -> None:
        for place, event in enumerate(map(json.loads, lines)):
            event |= {"seconds": seconds} if event["stage"] == "ttt" else {}
            event |= {"eval_seconds": seconds} if event["stage"] == "final" else {}
            lines[place] = json.dumps(event)

    forged.lines(forged.metrics, shorten)
    (path,) = (forged.folder / "logs").iterdir()
    log = re.sub(r"(?m)^(ttt val_loss.* seconds:).*$", rf"\g<1>{seconds:.6g}", path.read_text())
    path.write_text(re.sub(r"(?m)^(final .* eval_seconds:)\S+", rf"\g<1>{seconds:.6g}", log))
    last, close = forged.number("line", "ttt") - 1, forged.number("close")
    forged.fails(rf"line {last}: ttt had lasted [\d.]+ s, line {close} says [\d.]+ s in all")


def without(forged: Forgery, step: int) -> int:
    """A step goes out of all records; number of its line."""
    number = forged.number("line", "train", step=step)
    forged.lines(forged.ledger, lambda lines: lines.pop(number - 1))
    forged.chain()
    mark = f'"step": {step}, "train_loss"'
    forged.metrics.write_text(
        "".join(f"{line}\n" for line in forged.metrics.read_text().splitlines() if mark not in line)
    )
    (path,) = (forged.folder / "logs").iterdir()
    path.write_text(re.sub(rf"(?m)^train step:{step} .*\n", "", path.read_text()))
    return number


def test_forged_steps(forged):
    number = without(forged, 3)
    forged.fails(rf"line {number + 1}: step 4, 3 of 7 is due")


def test_forged_last_step(forged):
    without(forged, 6)
    forged.fails(rf"line {forged.number('close')}: 7 steps, but no line of step 6")


# -- the anchor


def test_anchor_is_a_line_of_the_log_and_of_the_command(judged, forged, capsys, tmp_path):
    assert audit.main([str(judged.folder), "--anchor"]) == 0
    posted = capsys.readouterr().out.strip()
    (log,) = (judged.folder / "logs").iterdir()
    assert posted in log.read_text().splitlines()
    assert f"script={judged.script_sha256} " in posted and posted.startswith("anchor run=tiny seed=42 ")
    number = forged.number("artifact")
    status, evidence = verdict(judged, judged.folder, anchored=posted)
    assert status == "CONSISTENT" and f"the posted line is of line {number}" in evidence
    forged.record(forged.number("line", "saved"), lambda row: row.update(base=0, note=1), chained=True)
    forged.fails(rf"line {number}: chain=\w+, the line that was posted has \w+", anchored=posted)
    (tmp_path / "post.txt").write_text(f"I am about to score this:\n{posted}\n")
    assert audit.chain.posted_line(str(tmp_path / "post.txt")) == posted
    assert audit.main([str(forged.folder), "--only", "R5", "--anchored", str(tmp_path / "post.txt")]) == 1


def test_anchor_mistakes_are_one_line(forged, capsys):
    number, run = forged.number("artifact"), str(forged.folder)
    lines = forged.ledger.read_text().splitlines()
    forged.ledger.write_text("\n".join(lines[: number - 1]) + '\n{"kind": "arti')
    assert audit.main([run, "--anchor"]) == 2
    forged.ledger.write_text("\n".join([*lines[:3], *lines[4:]]) + "\n")
    assert audit.main([run, "--anchor"]) == 2
    assert audit.main([run, "--anchored", "nothing"]) == 2
    assert audit.main([run + "x", "--anchor"]) == 2
    shown = capsys.readouterr()
    reasons = ("no line of kind artifact", "line 4: record 3 of rank 0", "holds 0 lines", "cannot be read")
    assert shown.out == "" and shown.err.count("\n") == 4
    assert all(reason in line for reason, line in zip(reasons, shown.err.splitlines(), strict=True)), (
        shown.err
    )
