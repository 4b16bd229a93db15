"""Check R5: the hash chain of the ledger, and that all records of a run say the same."""

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from auditing.records import read_json
from auditing.run import RECORDS, Audit, AuditError, Failed, NotChecked, check, require, short
from harness.chain import BrokenChain, Link, anchor, follow
from scripts import sha256_of
from systems.layout import WITHOUT_EFFECT

SCORES = ("ttt", "sliding", "quantised", "prequant")  # the last that was made is the run's
AFTER_THE_END = ("limit", "final", "notice")  # events that follow the ledger's last line
FITTED = ("compiler", "micro_batches")  # what a run may choose anew when its model does not compile or fit
TIMED = ("start", "reset", "score", "adapt", "batch", "global", "slide", "sgd", "end")  # of an evaluation
CLOCK_SECONDS = 0.01  # two readings of one clock
UNTIMED_SECONDS = 15.0  # that saving a file and the like may take where no stage's clock runs


class Chain:
    """The links of a whole ledger: head, records by kind, and the line that closes it."""

    def __init__(self, links: Sequence[Link]):
        self.links, self.head, self.close = links, links[0], links[-1]

    def of(self, *kinds: str) -> list[Link]:
        """Links of some kinds, in the order of the file."""
        return [link for link in self.links[1:] if link.record["kind"] in kinds]

    @property
    def events(self) -> list[tuple[Link, dict]]:
        """What the run told, as metrics.jsonl has it, each with its link."""
        return [(link, link.record["event"]) for link in self.of("line")]


def anchored_chain(folder: Path) -> str:
    """The line to be posted, of a run that is over or still going on. Raises AuditError."""
    path = folder / "ledger.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # the last may be half written
        links = follow(lines)[0]
    except OSError as error:
        raise AuditError(f"{path}: cannot be read ({error.strerror}); AUDIT=1 writes it") from None
    except (BrokenChain, UnicodeDecodeError) as error:
        raise AuditError(f"{path}: {error}") from None
    made = [link for link in links[1:] if link.record["kind"] == "artifact"]
    if not made:
        raise AuditError(f"{path}: no line of kind artifact: the run has made none so far")
    return anchor(links[0].record, made[-1])


def posted_line(text: str) -> str:
    """The anchor that was posted: the text itself, or the only one in the file of that name."""
    with contextlib.suppress(OSError, ValueError):  # a line is too long for a name
        if Path(text).is_file():
            text = Path(text).read_text(encoding="utf-8", errors="replace")
    found = set(re.findall(r"(?m)^anchor run=.*\S", text))
    if len(found) != 1:
        raise AuditError(
            f"--anchored {text[:60]!r}: holds {len(found)} lines `anchor run=...`, must hold one"
        )
    return found.pop()


@check("R5", "records are one hash chain, and agree", RECORDS)
def r5_chain(audit: Audit) -> str:
    """Every line follows on the one before; each figure is the same in ledger, result, events and log."""
    chain = _whole_chain(audit)
    figures = 0
    for name, link, mine, theirs, place in _figures(audit, chain):
        require(
            _same(mine, theirs), f"line {link.number}: {name} {_told(mine)}, {place} says {_told(theirs)}"
        )
        figures += 1
    _events_agree(audit, chain)
    _possible(audit, chain)
    posted = ""
    if audit.options.anchored:
        posted = f"; {_is_anchored(audit, chain)}"
    ranks = len({link.record["rank"] for link in chain.links[1:]})
    text = f"{len(chain.links):,} lines of {ranks} rank{'s' * (ranks > 1)} up to {short(chain.close.hash)}"
    return f"{text}; {figures} figures and {len(chain.events)} events in all records alike{posted}"


def _whole_chain(audit: Audit) -> Chain:
    """The ledger as a chain that result.json closes. Raises Failed, or NotChecked for one of before."""
    path, told = audit.folder / "ledger.jsonl", audit.result.get("ledger_sha256")
    if not path.is_file():
        require(not audit.options.anchored, "a line was posted, but there is no ledger.jsonl")
        raise NotChecked("the run wrote no ledger.jsonl (AUDIT=1)")
    text = path.read_text(encoding="utf-8", errors="replace")
    chained = told or '"prev"' in text or "harness/chain.py" in audit.result["environment"]["house_sha256"]
    if not (chained or audit.options.anchored):
        raise NotChecked("a ledger of before its lines were chained")
    require(text.endswith("\n"), "ledger.jsonl: its last line is not whole")
    try:
        links, ends = follow(text.split("\n")[:-1])
    except BrokenChain as error:
        raise Failed(str(error)) from None
    chain = Chain(links)
    closes = chain.of("close")
    require(closes == [chain.close], f"line {chain.close.number}: the last one, and not the one that closes")
    close, needed = chain.close, ("ends", "documents_sha256", "stage_seconds", "result", "environment")
    lacking = [name for name in needed if name not in close.record]
    require(not lacking, f"line {close.number}: closes without {', '.join(lacking)}")
    for end in ends:
        known = end is close or end.hash in close.record["ends"]
        require(known, f"line {end.number}: changed, or not the last of its rank when the run ended")
    gone = {*close.record["ends"]} - {end.hash for end in ends} - {close.record["prev"]}
    require(not gone, f"line {close.number}: names {short(min(gone, default=''))} as an end, no line has it")
    require(
        told == close.hash, f"line {close.number}: changed, result.json ends with {told}, it is {close.hash}"
    )
    return chain


def _same(mine: object, theirs: object) -> bool:
    """Equal as JSON: what is true is not 1, and a NaN is itself."""
    return json.dumps(mine, sort_keys=True) == json.dumps(theirs, sort_keys=True)


def _told(value: object) -> str:
    return "nothing" if value is None else str(value)[:80]


# -- figures: name, line, value there, value elsewhere, where that is

Figure = tuple[str, Link, object, object, str]


def _figures(audit: Audit, chain: Chain) -> Iterator[Figure]:
    """All that result.json and the files beside it tell, with the line that tells it too."""
    yield from _settings(audit, chain)
    yield from _machine(audit, chain)
    yield from _scores(audit, chain)
    yield from _summary(audit, chain)
    yield from _files(audit, chain)


def _compared(name: str, link: Link, mine: Mapping, theirs: Mapping, place: str) -> Iterator[Figure]:
    """All values of two mappings that should be the same."""
    for key in mine.keys() | theirs.keys():
        yield f"{name}{key}", link, mine.get(key), theirs.get(key), place


def _settings(audit: Audit, chain: Chain) -> Iterator[Figure]:
    """Settings with the seed; an artifact or a checkpoint that was given brings those of its model."""
    head, result = chain.head, audit.result
    yield "run", head, head.record["run"], result.get("run"), "result.json"
    given = set() if audit.trained else set(map(str.upper, audit.script.MODEL_SETTINGS))
    given |= WITHOUT_EFFECT if "resumed" in result else set()
    mine, theirs = (
        {k: v for k, v in part["settings"].items() if k not in given} for part in (head.record, result)
    )
    yield from _compared("", head, mine, theirs, "result.json")


def _machine(audit: Audit, chain: Chain) -> Iterator[Figure]:
    """Hardware, versions, ranks, checksums of the house: at the start, of those who joined, at the end."""
    close, joined = chain.close, chain.of("joined")
    told = {k: v for k, v in close.record["environment"].items() if k not in ("numpy", "cuda")}
    yield from _compared("", close, told, audit.result["environment"], "result.json")
    own = [link for link in joined if link.record["rank"] == 0]
    require(bool(own), "line 2: rank 0 never joined")
    begun = dict(chain.head.record["environment"])
    house = begun.pop("house_sha256", None)
    yield from _compared("", own[0], own[0].record["environment"], begun, "line 1")
    ended = dict(close.record["environment"])
    yield "house_sha256", close, ended.pop("house_sha256", None), house, "line 1"
    for name in FITTED:
        ended[name] = own[-1].record["environment"].get(name)
    yield from _compared("", own[-1], own[-1].record["environment"], ended, f"line {close.number}")
    for name, value in next((event for _, event in chain.events if event["stage"] == "start"), {}).items():
        if name in begun:
            yield name, chain.head, begun[name], value, "its event start"


def _scores(audit: Audit, chain: Chain) -> Iterator[Figure]:
    """The result of every stage, told once."""
    told: dict[str, Link] = {}
    for link, event in chain.events:
        if "val_bpb" in event:
            stage = event["stage"]
            require(
                stage not in told,
                f"line {link.number}: {stage} was scored in line {told.get(stage, link)[0]}",
            )
            told[stage] = link
    for stage in told.keys() | audit.result["stages"].keys():
        link, theirs = told.get(stage, chain.close), audit.result["stages"].get(stage)
        mine = link.record.get("event", {})
        mine = {name: value for name, value in mine.items() if name != "stage"}
        yield from _compared(f"{stage} ", link, mine, theirs or {}, "result.json")
    made = [stage for stage in SCORES if stage in told]
    require(bool(made), f"line {chain.close.number}: closes a run without a score")
    yield "final_stage", told[made[0]], made[0], audit.result["final_stage"], "result.json"
    for name in ("val_bpb", "val_loss"):
        yield name, told[made[0]], told[made[0]].record["event"][name], audit.result.get(name), "result.json"


def _summary(audit: Audit, chain: Chain) -> Iterator[Figure]:
    """Steps, sizes, seconds and whatever else result.json has."""
    close, result = chain.close, audit.result
    seconds, rest = close.record["stage_seconds"], dict(close.record["result"])
    yield from _compared("seconds of ", close, seconds, result.get("seconds", {}), "result.json")
    for name, stage in (("train", "train"), ("calibrate", "calibrate"), ("eval", result["final_stage"])):
        yield f"{name}_seconds", close, seconds.get(stage, 0.0), result.get(f"{name}_seconds"), "result.json"
    sizes = [(link, event) for link, event in chain.events if event["stage"] == "size"]
    for name in ("artifact_bytes", "code_bytes", "model_bytes"):
        link, event = sizes[-1] if sizes else (close, {})
        yield name, link, event.get(name, 0), result.get(name), "result.json"
        rest.setdefault(name, result.get(name))
    named = {
        "run",
        "final_stage",
        "val_bpb",
        "val_loss",
        "train_seconds",
        "calibrate_seconds",
        "eval_seconds",
    }
    named |= {"legal", "broken_limits", "stages", "seconds", "settings", "environment", "ledger_sha256"}
    told = {name: value for name, value in result.items() if name not in named}
    yield from _compared("", close, rest, told, "result.json")


def _files(audit: Audit, chain: Chain) -> Iterator[Figure]:
    """Checksums of what lies beside the ledger, and of the data's manifest and tokenizer where they are."""
    close, head, folder = chain.close, chain.head, audit.folder
    rows = [("documents_sha256", close, folder / "documents.json")]
    for link in chain.of("weights")[-1:]:
        rows.append(("file_sha256", link, folder / Path(audit.cfg.model_path).name))
    for link in chain.of("artifact")[-1:]:
        rows.append(("code_sha256", link, folder / "train_gpt.packed.py"))
        with contextlib.suppress(NotChecked):
            rows.append(("artifact_sha256", link, audit.artifact))
    for name, link, path in rows:
        if path.is_file() or path.name == "documents.json":
            found = sha256_of(path) if path.is_file() else None
            yield name, link, link.record.get(name), found, path.name
    tokenizer, manifest = audit.script.tokenizer_file(audit.cfg), audit.data_folder / "manifest.json"
    if tokenizer.is_file():
        yield (
            "tokenizer_sha256",
            head,
            head.record.get("tokenizer_sha256"),
            sha256_of(tokenizer),
            str(tokenizer),
        )
    if manifest.is_file():
        told = head.record["environment"].get("data_sha256")
        yield "data_sha256", head, told, sha256_of(manifest), str(manifest)


# -- events


def _events_agree(audit: Audit, chain: Chain) -> None:
    """Raise Failed unless metrics.jsonl is what the ledger's lines tell, and the log shows it."""
    events, metrics = chain.events, audit.metrics
    for number, (link, event) in enumerate(events):
        found = metrics[number] if number < len(metrics) else {}
        if not _same(event, found):
            mine, theirs = _apart(event, found)
            raise Failed(f"line {link.number}: {mine}, metrics.jsonl line {number + 1} says {theirs}")
    for number, event in enumerate(metrics[len(events) :], len(events) + 1):
        later = event["stage"] in AFTER_THE_END
        require(
            later, f"line {chain.close.number}: closes, and metrics.jsonl line {number} is {event['stage']}"
        )
    _log_agrees(audit, chain)


def _apart(event: Mapping, found: Mapping) -> tuple[str, str]:
    """Two events in as few words as tell them apart."""
    if event["stage"] != found.get("stage") or event.get("step") != found.get("step"):
        return shown_event(event)[:90], shown_event(found)[:90] if found else "nothing"
    keys = [key for key in {**event, **found} if not _same(event.get(key), found.get(key))]
    mine, theirs = (" ".join(f"{key}:{part.get(key)}" for key in keys)[:90] for part in (event, found))
    return f"{event['stage']} {mine}", theirs


def shown_event(event: Mapping) -> str:
    """An event as the log has it, see `RunLog.event`."""
    values = ((name, value) for name, value in event.items() if name != "stage")
    pairs = [f"{name}:{f'{value:.6g}' if isinstance(value, float) else value}" for name, value in values]
    return " ".join([event["stage"], *pairs])


def _log_agrees(audit: Audit, chain: Chain) -> None:
    """The log shows all events, in order, and none besides; a resumed run's also those that were lost."""
    stages = {event["stage"] for event in audit.metrics}
    rows = audit.log.partition("\n==== end\n")[2].splitlines()
    told = [row for row in rows if re.match(r"\S+ [^\s:]+:", row) and row.partition(" ")[0] in stages]
    place, resumed = 0, "resumed" in audit.result
    links = [link for link, _ in chain.events] + [chain.close] * len(audit.metrics)
    for link, event in zip(links, audit.metrics, strict=False):
        wanted = shown_event(event)
        while resumed and place < len(told) and told[place] != wanted:
            place += 1
        found = told[place] if place < len(told) else "nothing"
        require(found == wanted, f"line {link.number}: {wanted[:90]}, the log says {found[:90]}")
        place += 1
    more = told[place:]
    require(not more, f"line {chain.close.number}: closes, and the log goes on with {(more or [''])[0][:60]}")


# -- what no run can be, though its chain was made anew


def _possible(audit: Audit, chain: Chain) -> None:
    """Raise Failed where the records are one chain and tell of what cannot have been."""
    _clocks(chain)
    _timed(chain)
    _hardware(audit, chain)
    _steps(audit, chain)
    _documents(audit, chain)
    made = [link.record["order"] for link in chain.of("artifact")]
    first = next((link for link in chain.of("score", "slide") if link.record["rank"] == 0), None)
    early = first and made and first.record["order"] < made[0]
    require(not early, f"line {first and first.number}: scored before the artifact was made")


def _clocks(chain: Chain) -> None:
    """What rank 0 did in a stage lasted no longer than the stage did; and each was done in a stage."""
    lasted: dict[str, float] = {}
    latest: dict[str, Link] = {}
    own = [link for link in chain.links[1:] if link.record["rank"] == 0]
    own.sort(key=lambda link: link.record["order"])
    for link in own:
        timed = link.record["kind"] in TIMED or link.record.get("event", {}).get("stage") == "train"
        outside = timed and link.record["stage"] == "between stages"
        require(not outside, f"line {link.number}: a step of training or adaptation that nothing timed")
    for before, link in zip(own, own[1:], strict=False):
        stage, event = link.record["stage"], link.record.get("event", {})
        if before.record["stage"] == stage and stage != "between stages":
            within = event.get("seconds", 0.0) if "val_bpb" in event else 0.0  # a stage inside this one
            passed = link.record["seconds"] - before.record["seconds"] - within
            lasted[stage], latest[stage] = lasted.get(stage, 0.0) + max(passed, 0.0), link
    for stage, seconds in lasted.items():
        told = chain.close.record["stage_seconds"].get(stage, 0.0)
        where = f"line {latest[stage].number}: {stage} had lasted {seconds:.2f} s"
        require(
            seconds <= told + CLOCK_SECONDS, f"{where}, line {chain.close.number} says {told:.2f} s in all"
        )


def _timed(chain: Chain) -> None:
    """From the last step told to the end of training, and from there to the artifact, the ledger's clock
    goes on by no more than the stages' own clocks tell.
    """
    since, inside = None, 0.0  # the last such line, and the seconds of evaluations behind it
    for link in (link for link in chain.of("line", "joined") if link.record["rank"] == 0):
        event = link.record.get("event", {"stage": "joined"})  # resumed: the clock went on elsewhere
        inside += event["seconds"] if "val_bpb" in event else 0.0
        stage = event["stage"]
        if stage in ("saved", "artifact") and since:
            names = ("train",) if stage == "saved" else ("calibrate", "quantise", "compress")
            timed = inside + sum(event[f"{name}_seconds"] for name in names)
            timed -= since.record["event"]["train_seconds"] if stage == "saved" else 0.0
            timed += chain.close.record["stage_seconds"].get("fallback", 0.0) if stage == "artifact" else 0.0
            passed = link.record["seconds"] - since.record["seconds"]
            said = f"line {link.number}: {passed:.2f} s after line {since.number}"
            require(passed <= timed + UNTIMED_SECONDS, f"{said}, the stages tell {timed:.2f} s of them")
        if stage in ("train", "saved", "artifact", "joined"):
            since, inside = (link if stage != "joined" else None), 0.0


def _hardware(audit: Audit, chain: Chain) -> None:
    """Device, build of torch, ranks and the log's word on the machine go together."""
    joined = chain.of("joined")
    for link in joined:
        machine = link.record["environment"]
        build, cuda = machine["torch"], machine["cuda"]
        possible = "NVIDIA" not in machine["device"] or (cuda and "+cpu" not in build)
        require(bool(possible), f"line {link.number}: {machine['device']} by torch {build}, CUDA {cuda}")
    close = chain.close.record["environment"]
    ranks = {link.record["rank"] for link in joined if link.record["environment"]["ranks"] == close["ranks"]}
    everyone = ranks == set(range(close["ranks"]))
    require(everyone, f"line {chain.close.number}: {close['ranks']} ranks, joined have {sorted(ranks)}")
    hardware = "".join(re.findall(r"(?s)\n==== end\n(.*?\n)start run:", audit.log))  # of every resume
    named = close["device"] in hardware or not re.search(r"Model name:|NVIDIA", hardware)
    require(named, f"line {chain.close.number}: {close['device']}, which the log's head does not name")


def _steps(audit: Audit, chain: Chain) -> None:
    """The steps that a run logs are all there, once, with clocks and speeds that fit."""
    if not audit.trained:
        return
    settings, steps = chain.head.record["settings"], audit.result["steps"]
    every, tokens = settings["TRAIN_LOG_EVERY"], settings["TRAIN_BATCH_TOKENS"]
    due = [step for step in range(1, steps + 1) if step <= 5 or step % every == 0]
    told = [(link, event) for link, event in chain.events if event["stage"] == "train"]
    for number, (link, event) in enumerate(told):
        wanted = due[number] if number < len(due) else "none"
        require(
            event["step"] == wanted, f"line {link.number}: step {event['step']}, {wanted} of {steps} is due"
        )
        speed = event["step"] * tokens / event["train_seconds"]
        fits = math.isclose(speed, event["tokens_per_second"], rel_tol=1e-9)
        require(
            fits, f"line {link.number}: {event['tokens_per_second']:.1f} tokens/s, its clock says {speed:.1f}"
        )
    missing = due[len(told) :]
    require(
        not missing, f"line {chain.close.number}: {steps} steps, but no line of step {(missing or [0])[0]}"
    )


def _documents(audit: Audit, chain: Chain) -> None:
    """The losses of documents.json make the loss of every stage."""
    told = read_json(audit.folder / "documents.json")
    links = {event["stage"]: (link, event) for link, event in chain.events if "val_bpb" in event}
    for stage, (link, event) in links.items():
        losses, nats = told["losses"].get(stage, []), event["val_loss"] * event["targets"]
        whole = len(losses) == len(told["documents"])
        count = f"{len(told['documents'])} documents"
        require(whole, f"line {link.number}: {stage}, documents.json has {len(losses)} losses of {count}")
        least = min(losses, default=0.0)
        require(least >= 0, f"line {link.number}: {stage}, documents.json has a document of {least:.4f} nats")
        near = math.isclose(math.fsum(losses), nats, rel_tol=1e-5, abs_tol=1e-4 * len(losses))
        said = f"documents.json {math.fsum(losses):.4f}"
        require(near, f"line {link.number}: {stage} {nats:.4f} nats, {said}")
    with contextlib.suppress(NotChecked):
        same = [start for start, _ in told["documents"]] == [start for start, _ in audit.documents]
        require(same, "documents.json: other documents than those of the data")


def _is_anchored(audit: Audit, chain: Chain) -> str:
    """Raise Failed unless the posted line is of this chain."""
    posted = audit.options.anchored
    parts = dict(pair.partition("=")[::2] for pair in posted.split()[1:])
    made = chain.of("artifact")
    require(
        bool(made), f"line {chain.close.number}: closes a run without an artifact, {posted[:40]} was posted"
    )
    link = next((link for link in made if link.hash == parts.get("chain")), made[-1])
    own = dict(pair.partition("=")[::2] for pair in anchor(chain.head.record, link).split()[1:])
    for name in own | parts:
        mine, theirs = own.get(name), parts.get(name)
        require(mine == theirs, f"line {link.number}: {name}={mine}, the line that was posted has {theirs}")
    return f"the posted line is of line {link.number}"
