"""Damage to the files of a run, which the audit must answer with a FAIL or in one line, never a traceback."""

import json
import random
from pathlib import Path

import pytest
from audited import audit

TEXTS = ("result.json", "documents.json", "ledger.jsonl", "metrics.jsonl", "logs/tiny.txt")
WHOLE = ("final_model.int6.ptz", "final_model.pt", "train_gpt.packed.py")
DATA = ("fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin", "fineweb_train_000000.bin")
DATA += ("manifest.json", "tokenizer.model")
VALUES = (
    0,
    -1,
    7,
    10**30,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    True,
    None,
    "",
    "x",
    [],
    [[]],
    {},
    {"a": 1},
)
KINDS = ("flip", "cut", "empty", "value", "value", "value", "drop", "deep", "bytes")


def containers(value: object) -> list:
    """All lists and dictionaries inside a value that are not empty."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] * bool(inner) + [found for part in inner for found in containers(part)]


def damaged_json(text: str, kind: str, rng: random.Random) -> str:
    """One line of JSON with one value replaced, left out, or nested deeply."""
    value = json.loads(text)
    where = rng.choice(containers(value))
    key = rng.choice(list(where)) if isinstance(where, dict) else rng.randrange(len(where))
    print(kind, key)
    if kind == "deep":
        return json.dumps(value)[:-1] + ', "deep": ' + "[" * 5000 + "]" * 5000 + "}"
    if kind == "drop":
        del where[key]
    else:
        where[key] = rng.choice(VALUES)
        print(where[key])
    return json.dumps(value)


def damaged(data: bytes, kind: str, name: str, rng: random.Random) -> bytes:
    """The bytes of a file, damaged; those that are no JSON lose or change bytes."""
    if kind == "empty":
        return b""
    if kind == "cut":
        return data[: rng.randrange(len(data))]
    if kind in ("value", "drop", "deep") and name.endswith((".json", ".jsonl")):
        lines = data.decode().splitlines() if name.endswith("l") else [data.decode()]
        number = rng.randrange(len(lines))
        lines[number] = damaged_json(lines[number], kind, rng)
        return "\n".join([*lines, ""]).encode()
    place = rng.randrange(len(data))
    more = bytes(rng.randrange(256) for _ in range(1 if kind == "flip" else 40))
    return data[:place] + more + data[place + len(more) :]


def damage(run: Path, data: Path, rng: random.Random) -> bool:
    """Damage one file of a run or of its data. Whether the audit must say so: of the log some lines count."""
    name, kind = rng.choice((*TEXTS, *TEXTS, *WHOLE, *DATA)), rng.choice(KINDS)
    path = (data if name in DATA else run) / name
    print(kind, name)
    before = path.read_bytes()
    path.write_bytes(damaged(before, kind, name, rng))
    return not name.startswith("logs/") and read(path, before) != read(path, path.read_bytes())


def read(path: Path, data: bytes) -> object:
    """What a file holds; where it is JSON, white space and the like do not count."""
    try:
        return json.dumps(json.loads(data)) if path.suffix == ".json" else data
    except (ValueError, RecursionError):
        return data


def judge(run: Path, data: Path, only: list[str], capsys: pytest.CaptureFixture, rng: random.Random) -> None:
    """Damage, and look at what the audit says."""
    tells = damage(run, data, rng)
    done = capsys.readouterr().out  # what the damage is
    code = audit.main([str(run), "--data", str(data), "--only", ",".join(only)])
    shown = capsys.readouterr()
    print(done)
    assert "Traceback" not in shown.out + shown.err
    if code == 2:
        assert not shown.out and shown.err.count("\n") == 1 and len(shown.err) < 1000, shown.err
    assert code in (1, 2) or code == 3 and not tells, f"{code}: {shown.out}"
