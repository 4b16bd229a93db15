"""What short texts come to, remembered in arrays, so that all words of a block are looked up at once.

A dictionary answers for one word at a time and costs a step of Python for each. Here a text is three 64-bit
integers that hold its bytes and its length, so two texts are the same if and only if their integers are.
"""

from collections.abc import Callable

import numpy as np

LONGEST = 23  # bytes of a text that is remembered; the 24th of its key says how many there are
KEPT = 1 << 18  # texts remembered, in about 60 bytes each
PADDING = 32  # bytes that must follow the texts in their buffer: keys are read in whole integers
MISSES = 8  # a full memory to which one text in so many is new holds the wrong ones, and starts anew

_MASKS = np.array([(1 << 8 * min(size, 8)) - 1 for size in range(LONGEST + 1)], np.uint64)  # the first bytes
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)

Columns = list[np.ndarray]
"""Arrays of equal length: tokens, and where they are counted, the bytes that each carries."""
Make = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[Columns, np.ndarray]]
"""From a buffer, (n,) starts and (n,) lengths in it: columns of all texts, and how many (n,) are of each."""


def ragged(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The integers from each start on, as many as its length says, one after the other."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


def pack(raw: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The texts alone, one behind the other, in a buffer with its padding; and their starts in it."""
    size = int(lengths.sum())
    packed = np.zeros(size + PADDING, np.uint8)
    packed[:size] = raw[ragged(starts, lengths)]
    return packed, np.cumsum(lengths) - lengths


class Memory:
    """What `make` gives for texts: made once for each that is not too long, while there is room.

    What a text comes to stands in `columns`, at a place of its own; places hold until the next `find`.
    """

    def __init__(self, make: Make, types: list[type]) -> None:
        """`types` are those of the columns that `make` gives."""
        self._make, self._kept = make, KEPT
        self.columns = [np.empty(1 << 16, kind) for kind in types]
        self._clear()

    def _clear(self) -> None:
        """Forget everything but the empty text, which is number 0."""
        self._slots = np.full(1 << (2 * self._kept - 1).bit_length(), -1, np.int32)  # numbers, by hash
        self._keys = [np.empty(self._kept, np.uint64) for _ in _FACTORS]
        self._places, self._counts = np.zeros(self._kept, np.int64), np.zeros(self._kept, np.int64)
        self._texts = 1
        self._end = self._used = 0  # in the columns: of what is remembered, of all
        self._outdated = False

    def find(self, raw: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places in `columns`, (n,), and counts, (n,), of texts given by starts and lengths in a buffer."""
        if self._outdated:
            self._clear()
        self._used = self._end
        short = np.flatnonzero((lengths > 0) & (lengths <= LONGEST))
        keys = _keys(raw, starts[short], lengths[short])
        hashes = _hashes(keys)
        numbers = np.zeros(len(starts), np.int64)
        numbers[short] = found = self._numbers(keys, hashes)
        new = np.flatnonzero(found < 0)
        places, counts = self._places[numbers], self._counts[numbers]
        if len(new):
            first, which = _distinct([key[new] for key in keys], hashes[new])
            at, first = short[new], new[first]
            place, count = self._add(raw, starts[short[first]], lengths[short[first]])
            places[at], counts[at] = place[which], count[which]
            if self._texts + len(first) <= self._kept:
                self._remember([key[first] for key in keys], hashes[first], place, count)
            else:
                self._outdated = len(new) * MISSES > len(starts)
        long = np.flatnonzero(lengths > LONGEST)
        if len(long):
            places[long], counts[long] = self._add(raw, starts[long], lengths[long])
        return places, counts

    def take(self, places: np.ndarray, counts: np.ndarray) -> Columns:
        """The columns of texts, one behind the other."""
        index = ragged(places, counts)
        return [column[index] for column in self.columns]

    def _add(self, raw: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Make what texts come to, behind all that is there: places and counts."""
        made, counts = self._make(raw, starts, lengths)
        end = self._used + len(made[0])
        if end > len(self.columns[0]):
            self.columns = [np.resize(column, 2 * end) for column in self.columns]
        for column, values in zip(self.columns, made, strict=True):
            column[self._used : end] = values
        places = self._used + np.cumsum(counts) - counts
        self._used = end
        return places, counts

    def _numbers(self, keys: Columns, hashes: np.ndarray) -> np.ndarray:
        """Numbers of texts, (n,) int64, -1 for those that are not remembered: one slot after the other."""
        mask = np.uint64(len(self._slots) - 1)
        slots = (hashes & mask).astype(np.int64)
        numbers = self._slots[slots].astype(np.int64)
        wrong = np.flatnonzero(self._differ(keys, numbers) & (numbers >= 0))
        while len(wrong):
            slots[wrong] = slots[wrong] + 1 & int(mask)
            numbers[wrong] = self._slots[slots[wrong]]
            differ = self._differ([key[wrong] for key in keys], numbers[wrong])
            wrong = wrong[differ & (numbers[wrong] >= 0)]
        return numbers

    def _differ(self, keys: Columns, numbers: np.ndarray) -> np.ndarray:
        """Whether keys are others than those of the texts with these numbers, (n,) bool."""
        kept = [own[numbers] for own in self._keys]
        return (keys[0] != kept[0]) | (keys[1] != kept[1]) | (keys[2] != kept[2])

    def _remember(self, keys: Columns, hashes: np.ndarray, places: np.ndarray, counts: np.ndarray) -> None:
        """Keep texts, each once, that are not there yet."""
        start, self._texts = self._texts, self._texts + len(hashes)
        for own, key in zip(self._keys, keys, strict=True):
            own[start : self._texts] = key
        self._places[start : self._texts], self._counts[start : self._texts] = places, counts
        self._end = self._used
        numbers = np.arange(start, self._texts, dtype=np.int32)
        mask = len(self._slots) - 1
        slots = (hashes & np.uint64(mask)).astype(np.int64)
        while len(numbers):
            free = self._slots[slots] < 0
            self._slots[slots[free]] = numbers[free]
            lost = self._slots[slots] != numbers  # to another of them, or the slot was taken before
            numbers, slots = numbers[lost], slots[lost] + 1 & mask


def _keys(raw: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Columns:
    """Three integers for each text of at most LONGEST bytes, little-endian: its bytes, then their number."""
    integers = np.ndarray(len(raw) - 7, "<u8", raw.data, strides=1)
    keys = [integers[starts] & _MASKS[lengths]]
    more = np.flatnonzero(lengths > 8)
    for place in (8, 16):
        keys.append(np.zeros(len(starts), np.uint64))
        keys[-1][more] = integers[starts[more] + place] & _MASKS[np.maximum(lengths[more] - place, 0)]
    keys[2] |= lengths.astype(np.uint64) << np.uint64(56)
    return keys


def _hashes(keys: Columns) -> np.ndarray:
    """A hash of each key, (n,) uint64, whose low bits depend on all of it."""
    mixed = keys[0] * _FACTORS[0] ^ keys[1] * _FACTORS[1] ^ keys[2] * _FACTORS[2]
    mixed ^= mixed >> np.uint64(32)
    mixed *= _FACTORS[0]
    return mixed ^ mixed >> np.uint64(32)


def _distinct(keys: Columns, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First of each of the different keys, and for every key the number of its equal among those."""
    order = np.lexsort((*keys, hashes))
    new = np.zeros(len(order), bool)
    new[:1] = True
    for key in keys:
        new[1:] |= key[order[1:]] != key[order[:-1]]
    which = np.empty(len(order), np.int64)
    which[order] = np.cumsum(new) - 1
    return order[new], which
