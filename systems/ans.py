"""The entropy coder of COMPRESSOR=ans: asymmetric numeral systems (arXiv 1311.2540), in integers throughout.

All matrices are coded at once, row by row: a row's levels, of all columns of all matrices that have such a
row, are dealt out to parallel coders. Each column has a model of its own, told by the rows above.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from train_gpt import ArtifactError


def _variance_steps() -> np.ndarray:
    """Bounds of the variance classes, in 1/256: a geometric row of integers, ratio 2^(1/4)."""
    steps = [8]
    while steps[-1] < 1 << 23:
        steps.append(steps[-1] * 1189 // 1000 + 1)
    return np.array(steps)


def _bell() -> np.ndarray:
    """2^24 exp(-i/256), in integers."""
    values = [1 << 24]
    while len(values) < 4096:
        values.append(values[-1] - (values[-1] >> 8) + (values[-1] >> 17))
    return np.array(values)


VARIANCE_STEPS, BELL = _variance_steps(), _bell()
COLUMN_OPTIONS = tuple(itertools.product((0, 1, 2), (8, 32, 128, 512), (0, 8, 32)))
OPTIONS = np.array(COLUMN_OPTIONS).T
ESCAPE, ZERO = 0, 128  # symbols: of a level that has no frequency, of level 0
LEVELS_PER_CODER, STATE_BYTES = 15, 5  # log2; of a coder at the end of coding
LOWEST = 1 << 24  # a coder's state is from here to 2^40
SEGMENT = 256  # rows after which a trellis begins anew
MOST_TABLES = 2048  # that may tell means; matrices of the record's size have 608
TABLES_AT_ONCE = 256  # which are made: more would take memory


class ColumnModels:
    """What the levels of each column are like, told by the rows above: class of variance, mean in halves.

    A trained matrix has loud and quiet columns. Sums are integers (in 1/256), so that every machine agrees.
    An option is an index of COLUMN_OPTIONS: the shift by which older blocks of rows fade, and the rows that
    the variance and the mean expected at first count for. A level is the class of that variance. Options and
    levels are numbers, or arrays [columns].
    """

    def __init__(self, columns: int, option: np.ndarray | int, level: np.ndarray | int):
        fade, spread, mean = OPTIONS[:, option]
        self.told = np.zeros((3, columns), np.int64)  # rows, their sums and sums of squares
        self.counts = np.stack([np.broadcast_to(count, columns) for count in (fade, spread, mean)])
        self.prior = self.counts[1] * VARIANCE_STEPS[level]

    def cut(self, columns: int) -> None:
        """Keep the first columns only."""
        self.told, self.counts, self.prior = (x[..., :columns] for x in (self.told, self.counts, self.prior))

    def classes(self) -> tuple[np.ndarray, np.ndarray]:
        """Class of variance and mean (in quarters) that are expected of each column, int64 [columns]."""
        (rows, sums, squares), (_, rows_spread, rows_mean) = self.told, self.counts
        known = rows + 256 * rows_mean
        mean = 2 * np.clip((4 * sums + known) // np.maximum(2 * known, 1), -31, 31) * (rows_mean > 0)
        spread = squares - mean * sums // 2 + rows * mean * mean // 16
        variance = 256 * (spread + self.prior) // (rows + 256 * rows_spread)
        return np.searchsorted(VARIANCE_STEPS[1:-1], variance), mean

    def add(self, *sums: object) -> None:
        """Take in a block of rows: their number, the sums of its columns and of their squares."""
        self.told = (self.told >> self.counts[0]) + 256 * np.stack(np.broadcast_arrays(*sums))


def _column_sums(levels: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Rows of a block, and the sums of its columns and of their squares."""
    block = levels.astype(np.int32)
    return len(block), block.sum(0), (block * block).sum(0)


def _block_starts(rows: int) -> list[int]:
    """Starts of the blocks of rows that share their models; the first ones are short."""
    return [start for start in (0, 4, 8, *range(16, rows, 16)) if start < rows]


def choose_column_model(levels: np.ndarray) -> tuple[int, int]:
    """Option and starting class of the `ColumnModels` that code a matrix best (an estimate in integers).

    All options are tried at once, on some 128 of the columns.
    """
    squares = np.square(levels, dtype=np.int64).sum()
    level = int(np.searchsorted(VARIANCE_STEPS[1:-1], 256 * squares // max(levels.size, 1)))
    sample, count = levels[:, :: max(levels.shape[1] // 128, 1)], len(COLUMN_OPTIONS)
    models = ColumnModels(count * sample.shape[1], np.repeat(np.arange(count), sample.shape[1]), level)
    costs = np.zeros(count * sample.shape[1], np.int64)
    for start, end in itertools.pairwise([*_block_starts(len(levels)), len(levels)]):
        kind, mean = models.classes()
        rows, *sums = _column_sums(sample[start:end])
        sums, squares = (np.tile(values, count) for values in sums)
        spread = 16 * squares - 8 * mean * sums + rows * mean * mean
        costs += rows * kind * 1024 // 8 + spread * 16 * 739 // VARIANCE_STEPS[kind]  # bits times 1024
        models.add(rows, sums, squares)
    return int(costs.reshape(count, -1).sum(1).argmin()), level


def _batches(values: np.ndarray) -> Iterator[np.ndarray]:
    """Parts of at most TABLES_AT_ONCE values."""
    return (values[low : low + TABLES_AT_ONCE] for low in range(0, len(values), TABLES_AT_ONCE))


class FrequencyTables:
    """Frequencies of symbols in each class, of 2^16 in all: learnt in the order of decoding.

    A table begins as 128 imagined symbols of a Gaussian; it is made anew when the class has a quarter more
    symbols. What is further away than 5.6 deviations and was never seen has no frequency: it is an escape.
    """

    def __init__(self):
        self.index: dict[int, int] = {}
        self.weights, self.learnt, self.made = np.zeros((0, 256), np.int64), *np.zeros((2, 0), np.int64)
        self.following = np.zeros((0, 256), np.uint8)
        self.first, self.packed = np.zeros((0, 1 << 13), np.uint8), np.zeros((0, 256), np.int64)

    def rows(self, keys: np.ndarray) -> np.ndarray:
        """The rows of the tables of some keys: (lattice, kind, mean) as one number. New ones are made.

        Where there are MOST_TABLES, what is new has mean 0: a file that means harm may ask for any number.
        """
        distinct, inverse = np.unique(keys, return_inverse=True)
        known = np.array([int(key) in self.index for key in distinct])
        surplus = np.flatnonzero(~known)[max(MOST_TABLES - len(self.index), 0) :]
        distinct[surplus] = distinct[surplus] & -128 | 64
        fresh = [key for key in dict.fromkeys(distinct.tolist()) if key not in self.index]
        self.index |= {key: len(self.index) + i for i, key in enumerate(fresh)}
        self._make_room()
        for batch in _batches(np.array(fresh, int)):
            self._begin(batch)
        rows = np.array([self.index[key] for key in distinct.tolist()])
        for batch in _batches(np.unique(rows[4 * self.learnt[rows] >= 5 * self.made[rows]])):
            self._make(batch)
        return rows[inverse].reshape(keys.shape)

    def _make_room(self) -> None:
        """Longer arrays, at least twice as long, where there are more tables than in them."""
        end, room = len(self.index), len(self.learnt)
        if end <= room:
            return
        for name in ("weights", "learnt", "made", "following", "first", "packed"):
            old = getattr(self, name)
            setattr(self, name, np.zeros((max(end, 2 * room), *old.shape[1:]), old.dtype))
            getattr(self, name)[:room] = old

    def _begin(self, keys: np.ndarray) -> None:
        """Weights of new classes. Lattice 0 has every integer, lattices 2 and 3 the even and the odd ones."""
        lattice, kind, mean = keys >> 14 & 3, keys >> 7 & 127, (keys & 127) - 64
        numbers = (np.arange(256) - ZERO << (lattice > 1)[:, None]) + (lattice & 1)[:, None]
        bell = 2048 * (4 * numbers - mean[:, None]) ** 2 // VARIANCE_STEPS[kind][:, None]
        bell = np.where(bell < len(BELL), BELL[np.minimum(bell, len(BELL) - 1)], 0)
        weights = (bell << 23) // np.maximum(bell.sum(1), 1)[:, None]
        weights[:, ESCAPE] += 1 << 12
        rows = [self.index[key] for key in keys.tolist()]
        self.weights[rows], self.learnt[rows] = weights, 128

    def _make(self, rows: np.ndarray) -> None:
        """Frequencies by the weights, at least 1 of what has a weight; the commonest gets what is left."""
        weights = self.weights[rows]
        known = weights > 0
        left = (1 << 16) - known.sum(1, keepdims=True)
        counts = known + weights * left // np.maximum(weights.sum(1, keepdims=True), 1)
        counts[np.arange(len(rows)), counts.argmax(1)] += (1 << 16) - counts.sum(1)
        self.packed[rows] = counts << 16 | (counts.cumsum(1) - counts) & 0xFFFF
        ends = counts.cumsum(1) + 7 >> 3
        buckets = np.diff(ends, axis=1, prepend=0).ravel()  # of 8 slots, by the symbol of their first slot
        symbols = np.tile(np.arange(256, dtype=np.uint8), len(rows))
        self.first[rows] = np.repeat(symbols, buckets).reshape(-1, 1 << 13)
        following = np.where(known, np.arange(256), 255)[:, :0:-1]
        self.following[rows, :-1] = np.minimum.accumulate(following, axis=1)[:, ::-1]
        self.made[rows] = self.learnt[rows]

    def learn(self, rows: np.ndarray, symbols: np.ndarray) -> None:
        """Count symbols uint8 in the tables of their rows, both [n]."""
        np.add.at(self.weights.reshape(-1), rows.ravel() << 8 | symbols.ravel(), 1 << 16)
        self.learnt += np.bincount(rows.ravel(), minlength=len(self.learnt))


def next_states(states: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """States of the trellis after the levels `2 numbers + (states & 1)`: see systems/trellis.py."""
    return states << 1 & 6 | (numbers ^ states >> 1 ^ states >> 2) & 1


class LevelCoder:
    """The walk over all levels, which coding and decoding share, and the states of the parallel coders.

    A column with a trellis has a state that allows the even or the odd levels; what is coded of a level is
    its number among these. Columns of the matrices with the most rows come first, so that those that go on
    are always the beginning. Coders' states have 40 bits, and give and take words of 16.
    """

    def __init__(self, matrices: Sequence[np.ndarray], tops: Sequence[int], options: bytes):
        shapes = [matrix.shape for matrix in matrices]
        filled = [i for i, (_, columns) in enumerate(shapes) if columns]
        self.matrices, self.order = matrices, sorted(filled, key=lambda i: -shapes[i][0])
        places = np.repeat(self.order, [shapes[i][1] for i in self.order]).astype(int)
        facts = [(len(m), top, m.dtype == np.int16) for m, top in zip(matrices, tops, strict=True)]
        self.heights, tops, trellis = np.array(facts, int).reshape(-1, 3)[places].T
        self.trellis = trellis.astype(np.int16)
        self.lattices = (tops << 2 | trellis << 1) << 14
        chosen = np.frombuffer(options, np.uint8).reshape(-1, 2)[places].T
        self.models = ColumnModels(len(places), *chosen)
        self.tables = FrequencyTables()
        self.coders = np.full((self.heights.sum() >> LEVELS_PER_CODER) + 1, LOWEST, np.int64)

    def code(self) -> None:
        """Go through the matrices row by row; decoding fills them."""
        height, states = self.heights.max(initial=0), np.zeros(len(self.heights), np.int16)
        edges = np.unique([*_block_starts(height), *self.heights])
        for start, end in itertools.pairwise(edges.tolist()):
            width = np.count_nonzero(self.heights > start)
            self.models.cut(width)
            trellis, states = self.trellis[:width], states[:width]
            trellises = trellis.any()
            kind, mean = self.models.classes()
            keys = self.lattices[:width] + (kind << 7) + mean + 64
            tables = self.tables.rows(keys), self.tables.rows(keys + (trellis.astype(int) << 14))
            parts = [self.matrices[i][start:end] for i in self.order if len(self.matrices[i]) > start]
            block = np.concatenate(parts, axis=1, dtype=np.int16) >> trellis
            rows, parities = np.tile(tables[0].astype(np.int32), (end - start, 1)), np.zeros_like(block)
            for row, numbers in enumerate(block):
                table = tables[0]
                if trellises:
                    states = states * trellis if (start + row) % SEGMENT else np.zeros_like(states)
                    parities[row] = states & 1
                    rows[row] = table = np.where(parities[row], tables[1], table)
                numbers[:] = self._code_row(table, numbers)
                if trellises:
                    states = next_states(states, numbers)
            self.tables.learn(rows, block + ZERO)
            levels = (block << trellis) + parities
            self.models.add(*_column_sums(levels))
            edges = np.cumsum([part.shape[1] for part in parts])[:-1]
            for part, decoded in zip(parts, np.split(levels, edges, axis=1), strict=True):
                self._end_block(part, decoded)

    def _code_row(self, rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Code the numbers of a row by their tables; returns them, or what they are in decoding."""
        raise NotImplementedError

    def _end_block(self, part: np.ndarray, levels: np.ndarray) -> None:
        """A matrix's part of a block has been gone through."""


class LevelEncoder(LevelCoder):
    """Gathers the frequencies of all levels, then codes them from the last one to the first."""

    def __init__(self, *arguments: object):
        super().__init__(*arguments)
        self.jobs, self.escapes = [], []

    def _code_row(self, rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        symbols = numbers + ZERO
        packed = self.tables.packed[rows, symbols]
        escapes = np.flatnonzero((packed < 1 << 16) | (symbols == ESCAPE))
        packed[escapes] = self.tables.packed[rows[escapes], ESCAPE]
        self.escapes.append(symbols[escapes].astype(np.uint8))
        self.jobs.append(packed.astype(np.uint32))
        return numbers

    def stream(self) -> bytes:
        """The coders' states, the words, and the escapes from behind."""
        words, count = [], len(self.coders)
        for packed in reversed(self.jobs):
            for low in reversed(range(0, len(packed), count)):
                part = packed[low : low + count].astype(np.int64)
                frequency, coders = part >> 16, self.coders[: len(part)]
                full = coders // LOWEST >= frequency
                words.append(coders[full].astype("<u2"))
                coders[full] >>= 16
                whole, rest = np.divmod(coders, frequency)
                coders[:] = (whole << 16) + rest + (part & 0xFFFF)
        escapes = b"".join(part.tobytes() for part in self.escapes)
        words = b"".join(part.tobytes() for part in reversed(words))
        states = self.coders.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :STATE_BYTES]
        return states.tobytes() + words + escapes[::-1]


class LevelDecoder(LevelCoder):
    """Decodes a stream of a `LevelEncoder`."""

    def __init__(self, data: bytes, *arguments: object):
        super().__init__(*arguments)
        size = STATE_BYTES * len(self.coders)
        states = np.frombuffer(data[:size], np.uint8).reshape(-1, STATE_BYTES)
        self.coders[:] = np.pad(states, ((0, 0), (0, 8 - STATE_BYTES))).view("<i8")[:, 0]
        self.words = np.frombuffer(data[size:], "<u2", len(data) - size >> 1).astype(np.int64)
        self.escapes, self.left = np.frombuffer(data, np.uint8)[::-1], len(data) - size
        self.used = self.escaped = 0

    def _code_row(self, rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        symbols, first, packed = np.empty(len(rows), np.uint8), rows << 13, rows << 8
        tables, count = self.tables, len(self.coders)
        for low in range(0, len(rows), count):
            coders, row = self.coders[: len(rows) - low], packed[low : low + count]
            slot = coders & 0xFFFF
            found = tables.first.take(first[low : low + count] + (slot >> 3))
            table = tables.packed.take(row + found)
            rest, frequency = slot - (table & 0xFFFF), table >> 16
            while len(late := (rest >= frequency).nonzero()[0]):  # a later symbol of the bucket
                found[late] = tables.following.take(row[late] + found[late])
                table = tables.packed.take(row[late] + found[late])
                rest[late], frequency[late] = slot[late] - (table & 0xFFFF), table >> 16
            coders[:] = frequency * (coders >> 16) + rest
            empty = (coders < LOWEST).nonzero()[0]
            coders[empty] = coders[empty] << 16 | self.words[self.used : self.used + len(empty)]
            self.used += len(empty)
            symbols[low : low + count] = found
        escapes = np.flatnonzero(symbols == ESCAPE)
        symbols[escapes] = self.escapes[self.escaped : self.escaped + len(escapes)]
        self.escaped += len(escapes)
        return symbols.astype(np.int16) - ZERO

    def _end_block(self, part: np.ndarray, levels: np.ndarray) -> None:
        part[:] = levels

    def is_whole(self) -> bool:
        """Whether all of the stream was used, and the coders are as they were at the beginning."""
        return self.left == 2 * self.used + self.escaped and bool((self.coders == LOWEST).all())


def encode_levels(matrices: Sequence[np.ndarray], tops: Sequence[int]) -> bytes:
    """Matrices of levels -> two bytes of options for each, then the stream of all.

    Args:
        matrices: int8 of -top - 1..top; or int16 of a trellis, twice as far.
        tops: the largest level of each.
    """
    options = bytes(itertools.chain.from_iterable(map(choose_column_model, matrices)))
    coder = LevelEncoder(matrices, tops, options)
    coder.code()
    return options + coder.stream()


def decode_levels(data: bytes, layout: Sequence[tuple[Sequence[int], str, int]]) -> list[np.ndarray]:
    """The inverse of `encode_levels`, by shape, type and largest level of each. Raises ArtifactError."""
    options, stream = data[: 2 * len(layout)], data[2 * len(layout) :]
    matrices = [np.zeros(shape, dtype) for shape, dtype, _ in layout]
    try:
        coder = LevelDecoder(stream, matrices, [top for *_, top in layout], options)
        coder.code()
        whole = coder.is_whole()
    except (ValueError, IndexError):  # an array that should hold words or options is too short
        whole = False
    if not whole:
        raise ArtifactError("damaged ans stream")
    return matrices
