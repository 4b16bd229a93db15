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
MIXED = 255  # what is told of a bucket (8 slots side by side) that several symbols share
LEVELS_PER_CODER, STATE_BYTES = 15, 5  # log2; of a coder at the end of coding
# A coder's state is from LOWEST to 2^40. These are arrays, because numpy would convert a Python integer anew
# in each operation, which takes a third of the time of one on so few states.
LOWEST, WORD, LOW_WORD, BUCKET = map(np.array, (1 << 24, 16, 0xFFFF, 3))
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
        self.told >>= self.counts[0]
        for kind, value in enumerate(sums):
            self.told[kind] += 256 * value


def _column_sums(levels: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Rows of a block, and the sums of its columns and of their squares."""
    sums = levels.sum(0, dtype=np.int32), np.square(levels, dtype=np.int32).sum(0, dtype=np.int32)
    return len(levels), *sums


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

    A symbol of table `row` has the place 256 row + symbol. `packed` tells the first slot of each place,
    counted through all tables, and in 16 bits below it the frequency. `bucket` tells the symbol that has all
    slots of a bucket, or MIXED, which is symbol 255 too: then the place is looked for in `packed`.
    """

    def __init__(self, scales: int):
        self.index, self.count = np.full(scales << 15, -1, np.int16), 0  # row of each key; rows
        self.weights, self.made = np.zeros((0, 256), np.int64), np.zeros(0, np.int64)
        self.bucket, self.packed = np.zeros((0, 1 << 13), np.uint8), np.zeros((0, 256), np.int64)

    def places(self, keys: np.ndarray) -> np.ndarray:
        """First places of the tables of keys: (lattice, kind, mean) as one number, [lattices, columns].

        New tables are begun, and made where enough was learnt.
        """
        for row in keys:
            self._add(np.unique(row[self.index[row] < 0]))
        learnt = self.weights.sum(1) >> 16
        for batch in _batches(np.flatnonzero(4 * learnt >= 5 * self.made)):
            self._make(batch)
            self.made[batch] = learnt[batch]
        return self.index[keys].astype(int) << 8

    def _add(self, keys: np.ndarray) -> None:
        """Begin tables of keys that have none, each once.

        Where there are MOST_TABLES, what is new has mean 0: a file that means harm may ask for any number.
        """
        kept = np.where(np.arange(len(keys)) < MOST_TABLES - self.count, keys, keys & -64 | 32)
        fresh = np.unique(kept[self.index[kept] < 0])
        self.index[fresh] = np.arange(len(fresh)) + self.count
        self.index[keys] = self.index[kept]
        self.count += len(fresh)
        for array in (self.weights, self.made, self.bucket, self.packed):  # no longer than is needed: memory
            array.resize((self.count, *array.shape[1:]), refcheck=False)
        for batch in _batches(fresh):
            self._begin(batch)

    def _begin(self, keys: np.ndarray) -> None:
        """Weights of new classes. Lattice 0 has every integer, lattices 2 and 3 the even and the odd ones."""
        lattice, kind, mean = keys >> 13 & 3, keys >> 6 & 127, 2 * (keys & 63) - 64
        numbers = (np.arange(256) - ZERO << (lattice > 1)[:, None]) + (lattice & 1)[:, None]
        bell = 2048 * (4 * numbers - mean[:, None]) ** 2 // VARIANCE_STEPS[kind][:, None]
        bell = np.where(bell < len(BELL), BELL[np.minimum(bell, len(BELL) - 1)], 0)
        bell[:, ZERO] += ~bell.any(1)  # so quiet a class between two levels has none: two symbols at least
        weights = (bell << 23) // bell.sum(1)[:, None]
        weights[:, ESCAPE] += 1 << 12
        self.weights[self.index[keys]] = weights

    def _make(self, rows: np.ndarray) -> None:
        """Frequencies by the weights, at least 1 of what has a weight; the commonest gets what is left."""
        weights = self.weights[rows]
        known = weights > 0
        left = (1 << 16) - known.sum(1, keepdims=True)
        counts = known + weights * left // weights.sum(1, keepdims=True)
        counts[np.arange(len(rows)), counts.argmax(1)] += (1 << 16) - counts.sum(1)
        ends = counts.cumsum(1)
        self.packed[rows] = (rows[:, None] << 16) + ends - counts << 16 | counts
        buckets = np.diff(ends + 7 >> 3, axis=1, prepend=0).ravel()  # by the symbol of their first slot
        symbols = np.tile(np.arange(256, dtype=np.uint8), len(rows))
        self.bucket[rows] = np.repeat(symbols, buckets).reshape(-1, 1 << 13)
        mixed = (ends & 7).nonzero()
        self.bucket[rows[mixed[0]], ends[mixed] >> 3] = MIXED


class LevelCoder:
    """The walk over all levels, which coding and decoding share, and the states of the parallel coders.

    A column with a trellis has a state that allows the even or the odd levels; what is coded of a level is
    its number among these. The state is whether the levels of this row and of the two above are odd. Columns
    of the matrices with the most rows come first, so that those that go on are always the beginning. Coders'
    states have 40 bits, and give and take words of 16.
    """

    def __init__(self, matrices: Sequence[np.ndarray], tops: Sequence[int], options: bytes):
        shapes = [matrix.shape for matrix in matrices]
        filled = [i for i, (_, columns) in enumerate(shapes) if columns]
        self.matrices, self.order = matrices, sorted(filled, key=lambda i: -shapes[i][0])
        places = np.repeat(self.order, [shapes[i][1] for i in self.order]).astype(int)
        scales = sorted(set(tops))
        kinds = zip(matrices, tops, strict=True)
        facts = [(len(m), scales.index(top), m.dtype == np.int16) for m, top in kinds]
        self.heights, scale, trellis = np.array(facts, int).reshape(-1, 3)[places].T
        self.trellis = trellis.astype(np.uint8)
        parities = np.arange(1 + trellis.any())[:, None]
        self.lattices = (scale << 2 | trellis << 1 | trellis & parities) << 13
        chosen = np.frombuffer(options, np.uint8).reshape(-1, 2)[places].T
        self.models = ColumnModels(len(places), *chosen)
        self.tables = FrequencyTables(len(scales))
        self.coders = np.full((self.heights.sum() >> LEVELS_PER_CODER) + 1, LOWEST, np.int64)

    def code(self) -> None:
        """Go through the matrices row by row; decoding fills them."""
        height, past = self.heights.max(initial=0), np.zeros((3, len(self.heights)), np.uint8)
        edges = np.unique([*_block_starts(height), *self.heights])
        for start, end in itertools.pairwise(edges.tolist()):
            width = np.count_nonzero(self.heights > start)
            self.models.cut(width)
            trellis = self.trellis[:width]
            kind, mean = self.models.classes()
            tables = self.tables.places(self.lattices[:, :width] + (kind << 6) + (mean >> 1) + 32)
            between = tables[-1] - tables[0]
            parts = [self.matrices[i][start:end] for i in self.order if len(self.matrices[i]) > start]
            symbols = (np.concatenate(parts, axis=1) >> trellis).astype(np.uint8) ^ ZERO
            odd = np.zeros((len(symbols) + 3, width), np.uint8)  # levels, from those two rows above on
            if start % SEGMENT:
                odd[:3] = past[:, :width]
            for row, numbers in enumerate(symbols):
                places = odd[row + 2] * between + tables[0]
                self._code_row(places, numbers)
                np.add.at(self.tables.weights.reshape(-1), places, 1 << 16)
                odd[row + 3] = (numbers ^ odd[row] ^ odd[row + 1]) & trellis
            past = odd[-3:]
            levels = ((symbols ^ ZERO).view(np.int8).astype(np.int16) << trellis) + odd[2:-1]
            self.models.add(*_column_sums(levels))
            edges = np.cumsum([part.shape[1] for part in parts])[:-1]
            for part, decoded in zip(parts, np.split(levels, edges, axis=1), strict=True):
                self._end_block(part, decoded)

    def _code_row(self, places: np.ndarray, symbols: np.ndarray) -> None:
        """Code the symbols uint8 of a row, or fill them in; first places of their tables become their own."""
        raise NotImplementedError

    def _end_block(self, part: np.ndarray, levels: np.ndarray) -> None:
        """A matrix's part of a block has been gone through."""


class LevelEncoder(LevelCoder):
    """Gathers the frequencies of all levels, then codes them from the last one to the first."""

    def __init__(self, *arguments: object):
        super().__init__(*arguments)
        self.jobs, self.escapes = [], []

    def _code_row(self, places: np.ndarray, symbols: np.ndarray) -> None:
        places += symbols
        packed = self.tables.packed.take(places)
        escapes = np.flatnonzero((packed & LOW_WORD == 0) | (symbols == ESCAPE))
        packed[escapes] = self.tables.packed.take(places[escapes] & -256 | ESCAPE)
        self.escapes.append(symbols[escapes])
        self.jobs.append(packed.astype(np.uint32))

    def stream(self) -> bytes:
        """The coders' states, the words, and the escapes from behind."""
        words, count = [], len(self.coders)
        for packed in reversed(self.jobs):
            for low in reversed(range(0, len(packed), count)):
                part = packed[low : low + count].astype(np.int64)
                frequency, coders = part & 0xFFFF, self.coders[: len(part)]
                full = coders // LOWEST >= frequency
                words.append(coders[full].astype("<u2"))
                coders[full] >>= 16
                whole, rest = np.divmod(coders, frequency)
                coders[:] = (whole << 16) + rest + (part >> 16)
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
        self.words = np.frombuffer(data[size:], "<u2", len(data) - size >> 1)
        self.escapes, self.left = np.frombuffer(data, np.uint8)[::-1], len(data) - size
        self.used = self.escaped = 0

    def _code_row(self, places: np.ndarray, symbols: np.ndarray) -> None:
        tables, packed, count, slots = self.tables, self.tables.packed.ravel(), len(self.coders), places << 8
        for low in range(0, len(places), count):
            coders, place = self.coders[: len(places) - low], places[low : low + count]
            slot = (coders & LOW_WORD) + slots[low : low + count]
            symbol = tables.bucket.take(slot >> BUCKET)
            place += symbol
            if len(mixed := (symbol == MIXED).nonzero()[0]):
                place[mixed] = packed.searchsorted(slot[mixed] + 1 << WORD) - 1
            table = packed.take(place)
            coders >>= WORD
            coders *= table & LOW_WORD
            coders += slot - (table >> WORD)
            empty = (coders < LOWEST).nonzero()[0]
            coders[empty] = coders[empty] << WORD | self.words[self.used : self.used + len(empty)]
            self.used += len(empty)
        symbols[:] = places
        escapes = np.flatnonzero(symbols == ESCAPE)
        symbols[escapes] = self.escapes[self.escaped : self.escaped + len(escapes)]
        places[escapes] += symbols[escapes]
        self.escaped += len(escapes)

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
