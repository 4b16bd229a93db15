"""The entropy coder of COMPRESSOR=ans."""

import itertools
from collections.abc import Sequence

import numpy as np

from train_gpt import COUNTED, ArtifactError


def _variance_steps() -> np.ndarray:
    """Bounds of the variance classes, in 1/256: a geometric row of integers, ratio 2^(1/5)."""
    steps = [8]
    while steps[-1] < 1 << 23:
        steps.append(steps[-1] * 1149 // 1000 + 1)
    return np.array(steps)


VARIANCE_STEPS = _variance_steps()
COLUMN_OPTIONS = tuple(itertools.product((0, 1, 2), (8, 32, 128, 512), (0, 8, 32)))


class ColumnModel:
    """What the levels of each column are like, told by the rows above: class of variance, mean in quarters.

    A trained matrix has loud and quiet columns. Sums are integers (in 1/256), so that every machine agrees.
    `option` is an index of COLUMN_OPTIONS: the shift by which older blocks of rows fade, and the rows that
    the variance and the mean expected at first count for. `level` is the class of that variance.
    """

    def __init__(self, columns: int, option: int, level: int):
        self.fade, self.rows_spread, self.rows_mean = COLUMN_OPTIONS[option]
        self.prior = self.rows_spread * VARIANCE_STEPS[level]
        self.rows, self.sums, self.squares = 0, *np.zeros((2, columns), np.int64)

    def classes(self) -> tuple[np.ndarray, np.ndarray]:
        """Class of variance and mean (in quarters) that are expected of each column, int64 [columns]."""
        mean = np.zeros_like(self.sums)
        if self.rows_mean:
            rows = self.rows + 256 * self.rows_mean
            mean = np.clip((8 * self.sums + rows) // (2 * rows), -63, 63)
        spread = self.squares - mean * self.sums // 2 + self.rows * mean * mean // 16
        variance = 256 * (spread + self.prior) // (self.rows + 256 * self.rows_spread)
        return np.searchsorted(VARIANCE_STEPS[1:-1], variance), mean

    def add(self, rows: int, sums: np.ndarray, squares: np.ndarray) -> None:
        """Take in a block of rows by its column sums."""
        self.rows = (self.rows >> self.fade) + 256 * rows
        self.sums = (self.sums >> self.fade) + 256 * sums
        self.squares = (self.squares >> self.fade) + 256 * squares


def _column_sums(levels: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    """Rows of a block, and the sums of its columns and of their squares."""
    block = levels.astype(np.int64)
    return len(block), block.sum(0), (block * block).sum(0)


def _row_blocks(rows: int) -> list[tuple[int, int]]:
    """Start and end of the blocks of rows that are coded at once; the first ones are short."""
    starts = [start for start in (0, 16, 32, *range(64, rows, 64)) if start < rows]
    return list(itertools.pairwise([*starts, rows]))


def choose_column_model(levels: np.ndarray) -> tuple[int, int]:
    """Option and starting class of the `ColumnModel` that codes a matrix best (an estimate in integers)."""
    blocks = [_column_sums(levels[start:end]) for start, end in _row_blocks(len(levels))]
    total = 256 * sum(int(squares.sum()) for *_, squares in blocks) // max(levels.size, 1)
    level, costs = int(np.searchsorted(VARIANCE_STEPS[1:-1], total)), []
    for option in range(len(COLUMN_OPTIONS)):
        columns, cost = ColumnModel(levels.shape[1], option, level), 0
        for rows, sums, squares in blocks:
            kind, mean = columns.classes()
            spread = 16 * squares - 8 * mean * sums + rows * mean * mean
            bits = rows * kind * 1024 // 10 + spread * 16 * 739 // VARIANCE_STEPS[kind]  # times 1024
            cost += int(bits.sum())
            columns.add(rows, sums, squares)
        costs.append(cost)
    return costs.index(min(costs)), level


class LevelCoder:
    """Asymmetric numeral systems (arXiv 1311.2540) over integer matrices, through `constriction`.

    Each class of a `ColumnModel` has a table of symbol frequencies: 64 imagined symbols of a Gaussian, and
    all symbols of the class that were coded so far. Tables are integers; they are learnt in the order of
    decoding. A coder that is given words decodes them.
    """

    def __init__(self, words: np.ndarray | None = None):
        from constriction import stream

        self.coder = stream.stack.AnsCoder() if words is None else stream.stack.AnsCoder(words)
        self.categorical = stream.model.Categorical
        self.decodes, self.jobs = words is not None, []
        bells = [1 << 24]
        while len(bells) < 4096:
            bells.append(bells[-1] - (bells[-1] >> 8) + (bells[-1] >> 17))
        self.bell = np.array(bells)  # 2^24 exp(-i/256), in integers
        self.tables: dict[tuple[int, int], np.ndarray] = {}

    def _code_class(self, symbols: np.ndarray, key: int, top: int) -> np.ndarray:
        """Code symbols of one class, or decode as many. `key` = 128 class + mean + 64."""
        table = self.tables.get((top, key))
        if table is None:
            distance = 4 * np.arange(-top - 1, top + 1) - (key % 128 - 64)
            bell = self.bell[np.minimum(2048 * distance**2 // VARIANCE_STEPS[key // 128], 4095)]
            table = (bell << 22) // bell.sum() + 1
        model = self.categorical(table.astype(np.float64), perfect=False)
        if self.decodes:
            symbols = self.coder.decode(model, symbols.size)
        else:
            self.jobs.append((model, symbols))
        self.tables[top, key] = table + (np.bincount(symbols, minlength=table.size) << 16)
        return symbols

    def code_matrix(self, levels: np.ndarray, top: int, option: int, level: int) -> None:
        """Code a matrix int8 of values -top-1..top; in decoding, fill it."""
        columns = ColumnModel(levels.shape[1], option, level)
        for start, end in _row_blocks(len(levels)) if levels.size else ():
            kind, mean = columns.classes()
            keys = kind * 128 + mean + 64
            order = np.argsort(keys, kind="stable")
            keys = keys[order]
            block = levels[start:end].T[order].astype(np.int32) + (top + 1)
            edges = [0, *(np.flatnonzero(np.diff(keys)) + 1), len(keys)]
            for low, high in itertools.pairwise(edges):
                symbols = self._code_class(block[low:high].ravel(), int(keys[low]), top)
                block[low:high] = symbols.reshape(high - low, -1)
            levels[start:end] = (block[np.argsort(order)] - (top + 1)).T
            columns.add(*_column_sums(levels[start:end]))

    def words(self) -> np.ndarray:
        """The coded words, uint32: the last symbol goes in first, as decoding is last in, first out."""
        for model, symbols in reversed(self.jobs):
            self.coder.encode_reverse(symbols, model)
        return self.coder.get_compressed()


def encode_levels(matrices: Sequence[tuple[np.ndarray, int]]) -> bytes:
    """Integer matrices with the largest level of each -> two bytes of options per matrix, then the words."""
    coder, head = LevelCoder(), bytearray()
    for levels, top in matrices:
        head += bytes(options := choose_column_model(levels))
        coder.code_matrix(levels.copy(), top, *options)
    return bytes(head) + coder.words().astype("<u4").tobytes()


def decode_levels(data: bytes, layout: Sequence[tuple[tuple[int, int], int]]) -> list[np.ndarray]:
    """The inverse of `encode_levels`, by shape and largest level of each. Raises ArtifactError."""
    options, words = data[: 2 * len(layout)], data[2 * len(layout) :]
    if not COUNTED:
        cut = len(options) < 2 * len(layout) or len(words) % 4 or (words and not any(words[-4:]))
        known = all(o < len(COLUMN_OPTIONS) for o in options[::2])
        if cut or not known or max(options[1::2], default=0) > len(VARIANCE_STEPS) - 2:
            raise ArtifactError("damaged ans stream")
    coder = LevelCoder(np.frombuffer(words, "<u4").astype(np.uint32))
    matrices = [np.zeros(shape, np.int8) for shape, _ in layout]
    for levels, (_, top), option, level in zip(matrices, layout, options[::2], options[1::2], strict=True):
        coder.code_matrix(levels, top, option, level)
    if not COUNTED and not coder.coder.is_empty():
        raise ArtifactError("damaged ans stream")
    return matrices
