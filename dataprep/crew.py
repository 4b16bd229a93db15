"""Work in one process or several: the same results in the same order."""

import gc
import itertools
import mmap
import multiprocessing
import os
import pickle
import signal
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection
from multiprocessing.connection import Connection
from traceback import format_exception
from typing import Any, NamedTuple, TypeVar

from dataprep.shards import DataError

BYTES_IN_FLIGHT = 64 << 20  # of input that waits or is worked on, but for one block that is larger
AHEAD = 12  # items for each other process, enough while this one writes a shard; it does what is more
PLACE_BYTES = 4 << 20  # of each of these; an item of more is done in this process
Tag = TypeVar("Tag")

_NUMBER = struct.Struct("=H")  # of a place: so few bytes are written to a pipe, and read from it, whole
_SIZE = struct.Struct("=Q")


class _Given:
    """An item with what became of it: the result, or what was raised; not yet, where it is to be done."""

    def __init__(self, tag: Any, item: Any, size: int, answer: "_Answer | None" = None) -> None:
        self.tag, self.item, self.size, self.answer = tag, item, size, answer


class _Answer(NamedTuple):
    result: Any = None
    error: Exception | None = None


class Crew:
    """`workers` processes that each apply a worker of their own to items; this process is one of them.

    Items and results lie in places of shared memory. A place's number goes through one pipe to whichever
    process reads it first, this one too, and comes back through another when the result is there. (An
    executor's threads would wait for this process's Python, and the other process for them.)
    """

    def __init__(self, make: Callable[[], Callable[[Any], Any]], workers: int) -> None:
        """`make` gives the worker, a pure function of an item; it and the items must be picklable.

        The worker is made here. Processes that are forked have it from there, others make it again.
        """
        self._work, self._processes = make(), []
        if workers < 2:
            return
        context = multiprocessing.get_context()
        forked = context.get_start_method() == "fork"
        size = AHEAD * (workers - 1) * PLACE_BYTES
        shared = mmap.mmap(-1, size) if forked else context.RawArray("B", size)
        self._memory = _places(shared)
        self._free, self._given = [*range(len(self._memory))], {}
        self._todo, self._give = context.Pipe(duplex=False)
        self._answers, answers = context.Pipe(duplex=False)
        os.set_blocking(self._todo.fileno(), False)
        arguments = make, self._work if forked else None, shared, self._todo, self._give, answers
        gc.freeze()  # a search for garbage writes to all that it looks at, which would copy it for a process
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until a process ignores it
        try:
            for _ in range(workers - 1):
                self._processes.append(context.Process(target=_serve, args=arguments, daemon=True))
                self._processes[-1].start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *exception: object) -> None:
        """End the other processes, whatever they do: it is of no use to anybody."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def map(
        self, items: Iterable[tuple[Tag, Any]], size: Callable[[Any], int] = lambda item: 0
    ) -> Iterator[tuple[Tag, Any]]:
        """Result of each item with its tag, in order; reads ahead no further than the processes need.

        An item is done in this process while the others have enough that waits for them, and while nothing
        else is to be done, what they have not begun.

        Args:
            size: bytes of an item, of which BYTES_IN_FLIGHT may wait.

        Raises:
            DataError: a process was killed. What the worker raises, and in its turn what `items` raises.
        """
        if not self._processes:
            yield from ((tag, self._work(item)) for tag, item in items)
            return
        waiting: deque[_Given] = deque()
        in_flight = 0
        for given in _in_turn(items, size):
            self._collect()
            while waiting and (waiting[0].answer or in_flight + given.size > BYTES_IN_FLIGHT):
                in_flight -= waiting[0].size
                yield self._finished(waiting.popleft())
            waiting.append(given)
            in_flight += given.size
            if not given.answer:
                self._give_away(given)
        while waiting:
            yield self._finished(waiting.popleft())

    def _give_away(self, given: _Given) -> None:
        """Give an item to the other processes; where they have enough, do the one that has waited longest.

        So results come nearly in order, and in the end, when there is nothing to give, few are to be taken.
        """
        if (self._free or self._help()) and _put(self._memory[self._free[-1]], given.item):
            place = self._free.pop()
            self._given[place] = given
            os.write(self._give.fileno(), _NUMBER.pack(place))
        else:  # others have begun all that they were given, or it is too large
            given.answer = _answer(self._work, given.item)

    def _help(self) -> bool:
        """Do here the first item that no other process has begun, if there is one."""
        place = _next(self._todo)
        if place is not None:
            given = self._given.pop(place)
            self._free.append(place)
            given.answer = _answer(self._work, given.item)
        return place is not None

    def _collect(self, wait: float | None = 0) -> None:
        """Take the answers that have come; with None, wait for some. DataError if a process has ended."""
        ready = connection.wait([self._answers, *(process.sentinel for process in self._processes)], wait)
        for process in self._processes:
            if process.sentinel in ready:
                process.join()
                if process.exitcode < 0:
                    raise DataError("a worker process was killed (out of memory? try fewer --workers)")
                raise RuntimeError(f"a worker process ended by itself, with exit code {process.exitcode}")
        if not ready:
            return
        for (place,) in _NUMBER.iter_unpack(os.read(self._answers.fileno(), 1024 * _NUMBER.size)):
            given, answer = self._given.pop(place), _got(self._memory[place])
            given.answer = answer or _answer(self._work, given.item)  # None: there was no room for it
            self._free.append(place)

    def _finished(self, given: _Given) -> tuple[Any, Any]:
        """Tag and result of an item; until it is there, this process does what nobody has begun."""
        while given.answer is None:
            if not self._help():
                self._collect(wait=None)
            elif given.answer is None:
                self._collect()
        if given.answer.error:
            raise given.answer.error
        return given.tag, given.answer.result


def _in_turn(items: Iterable[tuple[Any, Any]], size: Callable[[Any], int]) -> Iterator[_Given]:
    """Items with their tags; what reading them raises is told behind the results of those before."""
    try:
        for tag, item in items:
            yield _Given(tag, item, size(item))
    except Exception as error:
        yield _Given(None, None, 0, _Answer(error=error))


def _answer(work: Callable[[Any], Any], item: Any) -> _Answer:
    """What becomes of an item; what that raises is told in its turn."""
    try:
        return _Answer(work(item))
    except Exception as error:
        return _Answer(error=error)


def _serve(
    make: Callable,
    work: Callable | None,
    shared: Any,
    todo: Connection,
    give: Connection,
    answers: Connection,
) -> None:
    """What another process does, as long as its parent lives. Ctrl-C is for that to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    give.close()
    parent = os.getppid()
    work, memory = work or make(), _places(shared)
    while True:
        connection.wait([todo])
        try:
            place = _next(todo)
        except EOFError:
            return
        if os.getppid() != parent:
            return
        if place is not None:
            _reply(memory[place], _answer(work, _got(memory[place])))
            os.write(answers.fileno(), _NUMBER.pack(place))


def _reply(place: memoryview, answer: _Answer) -> None:
    """Write an answer; an error, or a result, that cannot be pickled is told in words."""
    try:
        if answer.error:
            answer.error.add_note(_told(answer.error))
            pickle.loads(pickle.dumps(answer.error))
        fits = _put(place, answer)
    except Exception as error:
        fits = _put(place, _Answer(error=RuntimeError(_told(answer.error or error))))
    if not fits:
        _put(place, None)  # this takes 20 bytes, and the item had room


def _told(error: Exception) -> str:
    """An error with where it was raised, which pickling it loses."""
    return f"In another process:\n{''.join(format_exception(error))}"


def _next(todo: Connection) -> int | None:
    """The place of the next item that nobody has begun. EOFError: there will be none."""
    try:
        number = os.read(todo.fileno(), _NUMBER.size)
    except BlockingIOError:  # none, or another process was faster
        return None
    if not number:
        raise EOFError
    return _NUMBER.unpack(number)[0]


def _places(shared: Any) -> list[memoryview]:
    """The places that a memory has, which all processes share."""
    whole = memoryview(shared).cast("B")
    return [whole[at : at + PLACE_BYTES] for at in range(0, len(whole), PLACE_BYTES)]


def _put(place: memoryview, value: Any) -> bool:
    """Write a value, pickled, and its buffers; False if there is no room."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, 5, buffer_callback=buffers.append)
    parts = [head, *(buffer.raw() for buffer in buffers)]
    at = (1 + len(parts)) * _SIZE.size
    ends = [*itertools.accumulate(map(len, parts), initial=at)]
    if ends[-1] > len(place):
        return False
    for number, value in enumerate([len(parts), *ends[1:]]):
        _SIZE.pack_into(place, number * _SIZE.size, value)
    for part, (start, end) in zip(parts, itertools.pairwise(ends), strict=True):
        place[start:end] = part
    return True


def _got(place: memoryview) -> Any:
    """The value that was put; the place may be written to again."""
    (count,) = _SIZE.unpack_from(place)
    sizes = place[_SIZE.size : (1 + count) * _SIZE.size]
    ends = [(1 + count) * _SIZE.size, *(end for (end,) in _SIZE.iter_unpack(sizes))]
    head, *buffers = (bytes(place[start:end]) for start, end in itertools.pairwise(ends))
    return pickle.loads(head, buffers=buffers)
