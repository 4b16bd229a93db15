"""Logs cut off, run together and mixed up: the numbers of one run, or one line that says no."""

import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import runs  # noqa: E402

NUMBERS = ("seed", "steps", "val_loss", "val_bpb", "targets", "artifact_bytes", "code_bytes", "model_bytes")
NUMBERS += ("train_seconds", "calibrate_seconds", "eval_seconds", "legal")
FOREIGN = [
    "W0427 10:00:00.1 99 torch/_logging/x.py:1] [3/8] a warning of another rank",
    "[rank3]: torch.OutOfMemoryError: CUDA out of memory",
    "[W419 09:24:01.177 AllocatorConfig.cpp:28] Warning: PYTORCH_CUDA_ALLOC_CONF is deprecated",
    "NCCL version 2.27.5+cuda12.9",
    "",
    "  0%|          | 0/782 [00:00<?, ?it/s]",
]
PREFIXES = ["[default0]:", "[rank0]: ", "0: ", "1776142719.307 ", "2026-04-19T01:16:29+00:00 ", "[12:00:01] "]


def our_log(seed: int) -> str:
    """A committed log of the demo; its script is cut down to some lines."""
    text = (ROOT / "logs" / f"demo_seed{seed}_cpu.txt").read_text(encoding="utf-8")
    head, source, rest = text.split(f"{runs.RULE}\n")
    return f"{runs.RULE}\n".join(
        [head, "\n".join(source.splitlines()[:20]) + "\n", rest.split("\n==== end\n")[1]]
    )


def lines_changed(lines: list[str], other: list[str], rng: random.Random) -> list[str]:
    """Some lines lost, doubled, exchanged, cut off and run into the next, or another run's or rank's."""
    kinds = ("lost", "lost", "doubled", "exchanged", "run together", "foreign", "of the other")
    lines, kind = lines.copy(), rng.choice(kinds)
    for _ in range(rng.choice((1, 1, 2, 10))):
        place, there = rng.randrange(len(lines) - 1), rng.randrange(len(lines))
        if kind == "lost":
            del lines[place]
        elif kind == "exchanged":
            lines[place], lines[there] = lines[there], lines[place]
        elif kind == "run together":
            joined = lines[place][: rng.randrange(len(lines[place]))] + lines[place + 1]
            lines[place : place + 2] = [joined]
        else:
            drawn = {"doubled": lines, "foreign": [f"{line}\n" for line in FOREIGN], "of the other": other}
            lines.insert(there, rng.choice(drawn[kind]))
    return lines


def mixture(first: str, second: str, rng: random.Random) -> str:
    """What may become of the logs of two runs."""
    one, other = (text.splitlines(keepends=True) for text in (first, second))
    kind = rng.choice(("cut", "lines", "lines", "lines", "both", "dead before", "dead behind", "interleaved"))
    print(kind)
    if kind == "cut":
        return first[: rng.randrange(len(first))]
    if kind == "lines":
        return "".join(lines_changed(one, other, rng))
    if kind == "both":
        return first + second
    if kind == "dead before":
        return "".join(one[: rng.randrange(1, len(one))] + other)
    if kind == "dead behind":
        return "".join(one + other[: rng.randrange(1, len(other))])
    return interleaved(one, other, rng)


def interleaved(one: Sequence[str], other: Sequence[str], rng: random.Random) -> str:
    """The lines of two runs in turn, some at a time."""
    queues, merged, run = [[*one], [*other]], [], rng.choice((1, 10, 100))
    while any(queues):
        source = rng.choice([lines for lines in queues if lines])
        merged += source[:run]
        del source[:run]
    return "".join(merged)


def numbers(record: runs.RunRecord) -> list:
    """What is compared, and reported."""
    return [getattr(record, name) for name in NUMBERS]


def check(first: str, second: str, rng: random.Random, path: Path) -> None:
    """A mixture is refused, or tells the numbers of one of the two; of what is lost nothing."""
    told = []
    for text in (first, second):
        path.write_text(text, encoding="utf-8")
        told.append(numbers(runs.read(path)))
    assert told[0] != told[1]
    for _ in range(20):
        text = mixture(first, second, rng)
        path.write_text(text, encoding="utf-8")
        try:
            found = numbers(runs.read(path))
        except runs.ReadError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            continue
        fits = [all(x in (None, y) for x, y in zip(found, true, strict=True)) for true in told]
        assert any(fits), (found, told, re.sub(r"(?s)^.*(?=.{3000})", "", text))


@pytest.mark.cases(100)
def test_mixtures_of_our_logs(rng, tmp_path):
    first, second = map(our_log, rng.sample((42, 314, 1234), 2))
    check(first, second, rng, tmp_path / "log.txt")


@pytest.mark.cases(100)
def test_mixtures_of_published_logs(published_logs, rng, tmp_path):
    """Of one system, where each line of the one could stand in the other, or of any two that tell a seed."""
    paths = [path for path in sorted(published_logs.glob("*.log")) if "pr1218" not in path.name]
    first = rng.choice(paths)
    alike = [path for path in paths if path != first and rng.random() < 0.5]
    alike = [path for path in alike if path.name[:6] == first.name[:6]] or [p for p in paths if p != first]
    second = rng.choice(alike)
    print(first, second)
    check(*(path.read_text(encoding="utf-8") for path in (first, second)), rng, tmp_path / "published.log")


@pytest.mark.cases(30)
def test_published_logs_as_launchers_write_them(published_logs, rng, tmp_path):
    """Prefixed, with Windows' line ends, colours or every line twice: the same numbers."""
    source = rng.choice(sorted(published_logs.glob("*.log")))
    lines, prefix = source.read_text(encoding="utf-8").splitlines(), rng.choice(PREFIXES)
    print(source, repr(prefix))
    forms = {
        "prefixed": [prefix + line for line in lines],
        "windows": [f"{line}\r" for line in lines],
        "coloured": [f"\x1b[32m{line}\x1b[0m" for line in lines],
        "twice": [line for line in lines for _ in range(2)],
    }
    path = tmp_path / source.name
    for form in forms.values():
        path.write_text("\n".join(form) + "\n", encoding="utf-8", newline="")
        assert numbers(runs.read(path)) == numbers(runs.read(source))


@pytest.mark.cases(300)
def test_events_of_a_dead_run(rng, tmp_path):
    """Cut off anywhere: the events up to there."""
    events = [{"stage": "train", "step": n, "loss": rng.random()} for n in range(rng.randint(1, 9))]
    text, path = "".join(runs.json.dumps(event) + "\n" for event in events), tmp_path / "metrics.jsonl"
    size = rng.randint(1, len(text))
    path.write_text(text[:size])
    assert runs.read_events(path) == events[: text[: size + 1].count("}\n") if size < len(text) else None]
