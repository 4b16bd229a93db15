"""The chain of a ledger: each line carries the hash of the line before it, so none can be changed alone.

The first line ("head") begins a chain for every rank; `prev` of a later line is the hash of the line that the
same rank wrote before it. The last line ("close") names the ends of all chains; result.json has its hash.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from systems.layout import strict_json

# Kinds of lines that say what happened to the run; all other kinds say what it scored and learnt.
EVENTS = ("joined", "line", "weights", "artifact", "close")


class BrokenChain(ValueError):
    """A ledger whose lines do not follow on each other; the text names the line."""


class Link(NamedTuple):
    """A line of a ledger: its number in the file (from 1), what it says, its hash."""

    number: int
    record: dict
    hash: str


def line_hash(line: str) -> str:
    """SHA-256 of a line without its line break, hexadecimal."""
    return hashlib.sha256(line.encode()).hexdigest()


def value_hash(value: object) -> str:
    """SHA-256 of a plain value as JSON with sorted keys, hexadecimal."""
    return line_hash(json.dumps(value, sort_keys=True))


def follow(lines: Sequence[str]) -> tuple[list[Link], list[Link]]:
    """All links of a ledger, the head first, and the ends of its chains. Raises BrokenChain.

    A rank that comes back after it was gone begins another chain at the head.
    """
    links = [_link(number, line) for number, line in enumerate(lines, 1)]
    ends: dict[str, Link] = {}
    last: dict[int, Link] = {}  # by rank, to say what is wrong
    for link in links[1:]:
        record, before = link.record, ends.pop(link.record["prev"], None)
        begins = record["prev"] == links[0].hash and record["order"] == 0
        follows = before and (before.record["rank"], before.record["order"] + 1) == _place(record)
        if not (begins or follows):
            raise BrokenChain(_fault(link, last.get(record["rank"]), links[0]))
        if before and record["seconds"] < before.record["seconds"]:
            earlier = f"line {before.number}, which it follows, at {before.record['seconds']} s"
            raise BrokenChain(f"line {link.number}: written at {record['seconds']} s, {earlier}")
        ends[link.hash] = last[record["rank"]] = link
    return links, list(ends.values())


def _place(record: Mapping) -> tuple[int, int]:
    return record["rank"], record["order"]


def _link(number: int, line: str) -> Link:
    """A line, read. Raises BrokenChain where it is none of a chain."""
    try:
        record = strict_json(line)
    except (ValueError, RecursionError) as error:
        raise BrokenChain(f"line {number}: not JSON ({error})") from None
    types = {"kind": str, "rank": int, "order": int, "seconds": int | float, "stage": str, "prev": str}
    needed = types if number > 1 else {"kind": str, "run": str, "settings": dict, "environment": dict}
    if not isinstance(record, dict) or not all(isinstance(record.get(k), t) for k, t in needed.items()):
        raise BrokenChain(f"line {number}: not a line of a chain, which has {', '.join(needed)}")
    return Link(number, record, line_hash(line))


def _fault(link: Link, last: Link | None, head: Link) -> str:
    """What is wrong with a line that does not follow on the last one of its rank, or on the head."""
    rank, order = _place(link.record)
    due = last.record["order"] + 1 if last else 0
    if order != due:
        place = f"line {last.number}" if last else "the first line"
        return f"line {link.number}: record {order} of rank {rank}, after {place} record {due} is due"
    before, prev = last or head, link.record["prev"]
    return f"line {before.number}: changed, its hash is {before.hash}, line {link.number} follows on {prev}"


def anchor(head: Mapping, artifact: Link) -> str:
    """The line that binds a run before its score is known; `artifact`: the link of that kind."""
    environment = head["environment"]
    parts = {
        "run": head["run"],
        "seed": head["settings"]["SEED"],
        "script": value_hash([environment["source_sha256"], *sorted(environment["house_sha256"].items())]),
        "settings": value_hash(head["settings"]),
        "data": value_hash([head["val_sha256"], head["tokenizer_sha256"], environment["data_sha256"]]),
        "artifact": artifact.record["artifact_sha256"],
        "chain": artifact.hash,
    }
    return " ".join(["anchor", *(f"{name}={value}" for name, value in parts.items())])
