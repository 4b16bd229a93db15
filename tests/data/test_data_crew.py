"""Work in several processes: who does what, in which order it is told, how items and results get there."""

import functools
import io
import multiprocessing
import operator
import os
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from patience import wait_for

from dataprep import crew as crews
from dataprep import progress as progress_bar
from dataprep import scanning
from dataprep.crew import AHEAD, Crew
from dataprep.leaks import document_hashes
from dataprep.reading import Block, Document
from dataprep.shards import DataError, shard_bytes

PATIENCE = 60  # seconds


def doubling() -> Callable[[np.ndarray], tuple[int, np.ndarray]]:
    """A worker that says which process it is in; here it is slow, so that others do most."""
    parent = os.getpid()

    def work(values: np.ndarray) -> tuple[int, np.ndarray]:
        time.sleep(0.003 * (os.getpid() == parent))
        return os.getpid(), 2 * values

    return work


def told(items: list, make: Callable, workers: int) -> list:
    with Crew(make, workers) as crew:
        return [*crew.map(enumerate(items))]


@pytest.mark.parametrize("place", [1 << 20, 800, 8], ids=["room for all", "for some", "for none"])
def test_data_crew_is_this_process_and_others(monkeypatch, place):
    """As many processes as there are workers; results stay what they were when their memory is used again."""
    monkeypatch.setattr(crews, "PLACE_BYTES", place)
    items = [np.arange(n) for n in range(200)]
    for workers in (1, 2, 3):
        found = told(items, doubling, workers)
        assert [number for number, _ in found] == [*range(200)]
        assert all(
            np.array_equal(values, 2 * item) for (_, (_, values)), item in zip(found, items, strict=True)
        )
        processes = {own for _, (own, _) in found}
        others = place > 8 and workers > 1  # nothing is given away where there is no room for it
        assert os.getpid() in processes and 1 + others <= len(processes) <= (workers if others else 1)


def test_data_crew_where_processes_are_not_forked(monkeypatch):
    """They share no memory then, and make their own worker."""
    spawning = multiprocessing.get_context("spawn")
    monkeypatch.setattr(multiprocessing, "get_context", lambda: spawning)
    items = [(np.arange(n), n) for n in range(20)]
    found = told(items, functools.partial(operator.itemgetter, 0), 2)
    assert [(number, values.tolist()) for number, values in found] == [(n, [*range(n)]) for n in range(20)]


def waiting(folder: Path) -> Callable[[int], int]:
    """A worker that, in another process, only goes on when this one has done nearly everything."""
    parent, own = os.getpid(), []

    def work(item: int) -> int:
        if os.getpid() == parent:
            own.append(item)
            if len(own) == AHEAD + 2:
                (folder / "go").touch()
        end = time.monotonic() + PATIENCE
        while not (folder / "go").exists() and os.getpid() != parent:
            assert time.monotonic() < end, "this process waits although there is work that nobody has begun"
            time.sleep(0.01)
        return item

    return work


def test_data_crew_takes_back_what_nobody_has_begun(tmp_path):
    """Five items are this process's; in the end it does what the other has not begun, three or more."""
    items = [*range(AHEAD + 5)]
    assert told(items, functools.partial(waiting, tmp_path), 2) == [*zip(items, items, strict=True)]


def refusing() -> Callable[[int], int]:
    parent = os.getpid()

    def work(item: int) -> int:
        if os.getpid() != parent:
            time.sleep(0.3)
        raise DataError(f"item {item}")

    return work


def test_data_crew_tells_the_first_error_first():
    """Whichever process was the sooner."""
    with pytest.raises(DataError, match="^item 0(\n|$)"):
        told([*range(AHEAD + 3)], refusing, 2)


class Odd(Exception):
    """Pickled, but not made again: that gives one argument."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def failing(folder: Path, kind: str) -> Callable[[int], object]:
    """A worker that fails in another process, for which this one waits."""
    parent = os.getpid()

    def work(item: int) -> object:
        if os.getpid() == parent:
            wait_for((folder / "begun").exists)
            return item
        (folder / "begun").touch()
        if kind == "result":
            return lambda: item
        raise (
            Odd("an", "item") if kind == "odd" else ValueError("an item", *[lambda: item] * (kind == "held"))
        )

    return work


@pytest.mark.parametrize(
    ("kind", "words"),
    {"plain": "in work", "odd": "Odd: an item", "held": "in work", "result": "pickle"}.items(),
)
def test_data_crew_tells_where_an_error_was_raised(tmp_path, kind, words):
    """A fault of the program has its traceback, from whichever process, also one that cannot be pickled."""
    error = ValueError if kind == "plain" else RuntimeError
    with pytest.raises(error, match=f"(?s)In another process:.*{words}"):
        told([*range(AHEAD + 3)], functools.partial(failing, tmp_path, kind), 2)


def leaving(folder: Path) -> Callable[[int], int]:
    """This process does nothing before the other one has begun something, and so has left."""
    parent, left = os.getpid(), folder / "left"

    def work(item: int) -> int:
        if os.getpid() != parent:
            left.touch()
            sys.exit(7)
        wait_for(left.exists)
        return item

    return work


def test_data_crew_does_not_take_a_fault_for_a_kill(tmp_path):
    with pytest.raises(RuntimeError, match="by itself, with exit code 7"):
        told([*range(500)], functools.partial(leaving, tmp_path), 2)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_data_crew_tells_results_before_an_error_of_the_input(workers):
    """What is kept and what is said does not depend on the number of processes."""

    def items():
        yield from enumerate(range(3 * AHEAD))
        raise DataError("cannot be read")

    found = []
    with Crew(doubling, workers) as crew, pytest.raises(DataError, match="^cannot be read$"):
        for result in crew.map((number, np.full(1, item)) for number, item in items()):
            found.append(result)
    assert [number for number, _ in found] == [*range(3 * AHEAD)]


LINES = {
    "lines": [b'"one"\n', b"\n", b'"two"\n', b'"without an end"'],
    "rows that are no UTF-8": [b"a\nb\xff\n", b'"c"\n', b"\n\n"],
    "none": [],
    "documents": [Document(b"one", "here"), Document(b"two", "there")],
}


@pytest.mark.parametrize("kind", LINES)
def test_data_blocks_come_as_they_were(kind):
    """In another process, line by line: a row of a Parquet file may have a line end inside."""
    block = Block("a file", 7, LINES[kind], before=3)
    buffers = []
    data = pickle.dumps(block, 5, buffer_callback=buffers.append)
    assert pickle.loads(data, buffers=[bytes(buffer) for buffer in buffers]) == block
    assert pickle.loads(pickle.dumps(block, 5)) == block
    assert len(buffers) == (kind != "documents")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("total", [0, 4_000_000])
def test_data_progress_is_a_bar_on_a_terminal(monkeypatch, capsys, total):
    """Of a pipe, too, whose end nobody knows. Remarks go to standard output."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = progress_bar.Progress(total)
    progress.update(3, 1_000_000)
    progress.say("note: something")
    progress._bar.refresh()
    progress.close()
    shown = sys.stderr.getvalue()
    assert "1.00M" in shown and "documents=3" in shown and ("25%" in shown) == bool(total)
    assert "note: something" in capsys.readouterr().out


def test_data_validation_hashes_are_those_of_the_stream(tmp_path, monkeypatch):
    """Of documents that run on from shard to shard, each hash once; a part of a shard at a time: memory."""
    tokens = np.random.default_rng(0).integers(2, 9, 500).astype(np.uint16)
    tokens[[0, 7, 14, 90, 91, 92, 250]] = 1
    tokens[8:14] = tokens[1:7]
    for number in range(5):
        shard = tmp_path / f"fineweb_val_{number:06d}.bin"
        shard.write_bytes(shard_bytes(tokens[100 * number : 100 * number + 100]))
    sizes = []
    hashes = lambda part, starts: sizes.append(len(part)) or document_hashes(part, starts)  # noqa: E731
    monkeypatch.setattr(scanning, "document_hashes", hashes)
    monkeypatch.setattr(scanning, "CHUNK_TOKENS", 20)
    found = scanning.validation_hashes(tmp_path)
    assert found.tolist() == sorted({*document_hashes(tokens, np.flatnonzero(tokens == 1)).tolist()})
    assert len(found) == 5
    assert sum(sizes) == 500 and max(sizes) == 250  # the longest document
