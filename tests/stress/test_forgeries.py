"""Artifacts and other inputs, damaged or made by hand: refused in one line, or harmless."""

import contextlib
import copy
import random
import time

import pytest
from test_codec import forge

from bench import damage, fuzz_artifact

MOST_GROWTH = 256 << 20  # bytes of a process that reads what is some kilobytes
VALUES = (0, 1, -1, 2, 7, 10**3, 10**6, 10**9, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"))
VALUES += (True, False, None, "", "x", "gptq", "asym", "a\nb", "é" * 300, [], [[]], {}, {"a": 1})


def containers(value: object) -> list:
    """All lists and dictionaries inside a value that are not empty."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] * bool(inner) + [found for part in inner for found in containers(part)]


def change(header: dict, rng: random.Random) -> None:
    """One edit somewhere: a value replaced, one that stands elsewhere, left out, doubled, or renamed."""
    places = containers(header)
    where, kind = rng.choice(places), rng.choice(("value", "value", "value", "other", "drop", "add", "order"))
    key = rng.choice(list(where)) if isinstance(where, dict) else rng.randrange(len(where))
    value = rng.choice(VALUES)
    if kind == "other":
        source = rng.choice(places)
        value = rng.choice(list(source.values() if isinstance(source, dict) else source))
    value = copy.deepcopy(value)  # nothing may hold itself
    print(kind, key, ascii(value)[:100])
    if kind in ("value", "other"):
        where[key] = value
    elif kind == "drop":
        del where[key]
    elif isinstance(where, dict):
        where[str(key) + "x" * (kind == "add")] = where.pop(key)
    else:
        where.insert(rng.randrange(len(where)), where[key])


@pytest.fixture(scope="module")
def samples(tg) -> dict[str, bytes]:
    """An artifact of a small model in each format."""
    made = {}
    for kind in fuzz_artifact.FORMATS:
        cfg = fuzz_artifact.format_config(kind)
        records = fuzz_artifact.small_records(cfg)
        published = kind == "published"
        made[kind] = (
            fuzz_artifact.published_artifact(records) if published else tg.pack_artifact(records, cfg)
        )
    return made


@pytest.mark.cases(60)
def test_damaged_artifacts(samples, rng):
    """What `bench/fuzz_artifact.py` does, which looks at errors and time."""
    kind, seed, before = rng.choice(list(samples)), rng.randrange(10**6), fuzz_artifact.memory_growth()
    print(kind, "seed", seed)
    ends = fuzz_artifact.fuzz(samples[kind], 500, seed)
    assert sum(ends.values()) == 500 and ends["refused"] > 350
    assert fuzz_artifact.memory_growth() - before < MOST_GROWTH


@pytest.mark.cases(600)
def test_forged_headers(tg, samples, rng):
    """Edits under a checksum that fits: what is read is built, as a run does, or refused."""
    kind = rng.choice([kind for kind in samples if kind != "published"])  # which has no header
    print(kind)
    before, started = fuzz_artifact.memory_growth(), time.process_time()
    for _ in range(10):
        edits = rng.choice((1, 1, 2, 5))
        forged = forge(tg, samples[kind], lambda header, n=edits: [change(header, rng) for _ in range(n)])
        with contextlib.suppress(tg.ArtifactError):  # which a run says in one line, cut short
            fuzz_artifact.build(forged)
    assert time.process_time() - started < 10 * fuzz_artifact.MOST_SECONDS
    assert fuzz_artifact.memory_growth() - before < MOST_GROWTH


@pytest.mark.cases(18)
def test_damaged_inputs_of_every_kind(rng):
    """What `bench/damage.py` does: shards, sidecar, tokenizer, manifest, weights, artifacts."""
    seed = rng.randrange(10**6)
    print("seed", seed)
    result = damage.run_damage(180, seed)
    assert result["examples"] == [] and result["wrong"] == 0
