"""The C functions of `words.c`: compiled once on a machine, and loaded where there is a compiler."""

import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

SOURCE = Path(__file__).with_suffix(".c")
KEPT = 1 << 18  # words whose tokens are remembered, in 64 bytes each; a power of two
SYMBOL_BITS = 17  # as in words.c
_BETWEEN = b"\xff"  # a byte that no UTF-8 text holds
_PADDING = 32  # bytes, and tokens, behind the last that functions may read or write
_LARGE_PAGE = 2 << 20  # bytes
_WIPE_ON_FORK = 18  # MADV_WIPEONFORK of Linux, which Python does not name
_COMPILERS = "cc", "gcc", "clang"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, None without a C compiler. They are kept beside those of Python."""
    source = SOURCE.read_bytes()
    name = f"words-{platform.machine()}-{hashlib.sha256(source).hexdigest()[:16]}.so"
    kept = SOURCE.parent / "__pycache__" / name
    with contextlib.suppress(OSError):  # there is none, or it is of another system
        return _loaded(kept)
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / name
        command = [compiler, "-O3", "-shared", "-fPIC", "-o", str(made), str(SOURCE)]
        try:
            subprocess.run(command, check=True, capture_output=True)
            loaded = _loaded(made)
        except (OSError, subprocess.CalledProcessError):
            return None
        with contextlib.suppress(OSError):  # the folder may be read only
            kept.parent.mkdir(exist_ok=True)
            whole = kept.with_suffix(f".{os.getpid()}")  # of two that compile at once each has its own
            shutil.copy(made, whole)
            whole.replace(kept)
        return loaded


def _loaded(path: Path) -> ctypes.CDLL:
    functions, pointer, count = ctypes.CDLL(str(path)), ctypes.c_void_p, ctypes.c_int64
    functions.caps.argtypes, functions.caps.restype = [pointer, count, pointer], count
    functions.fill.argtypes, functions.fill.restype = [pointer, count, pointer, count], count
    functions.bare.argtypes, functions.bare.restype = [pointer, count, pointer], count
    functions.hashes.argtypes, functions.hashes.restype = [pointer, pointer, count, pointer, pointer], None
    functions.windows.argtypes = [pointer, count, pointer, count, pointer, pointer]
    functions.windows.restype = count
    functions.encode.argtypes = [pointer, pointer, count, *[pointer] * 4]
    functions.encode.restype = count
    return functions


def joined(texts: Sequence[bytes]) -> np.ndarray:
    """Texts in one buffer, (n,) uint8, as the functions take them."""
    parts = [b"", *texts, bytes(_PADDING)]
    return np.frombuffer(bytearray(_BETWEEN).join(parts), np.uint8)


def caps(raw: np.ndarray) -> np.ndarray:
    """CaseOps of `joined` texts, as `lossless_caps.encode_many`."""
    encoded = np.empty(4 * len(raw), np.uint8)  # memory that is not written to costs nothing
    size = library().caps(raw.ctypes.data, len(raw) - _PADDING, encoded.ctypes.data)
    encoded[size : size + _PADDING] = 0
    return encoded[: size + _PADDING]


def caps_of(text: bytes) -> bytes:
    """CaseOps of one text."""
    return caps(joined([text]))[1 : -_PADDING - 1].tobytes()


def bare(text: bytes) -> memoryview:
    """UTF-8 without what `str.split` takes for white space."""
    out = np.empty(len(text), np.uint8)
    return out.data[: library().bare(text, len(text), out.ctypes.data)]


def document_hashes(tokens: np.ndarray, ends: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`leaks.document_hashes` of documents by their ends, (n,); values: of each token, (65536,) uint64."""
    tokens, ends = np.ascontiguousarray(tokens), np.ascontiguousarray(ends, np.int64)
    found = np.empty(len(ends), np.uint64)
    pointers = tokens.ctypes.data, ends.ctypes.data, len(ends), values.ctypes.data, found.ctypes.data
    library().hashes(*pointers)
    return found


def sampled_windows(tokens: np.ndarray, values: np.ndarray, bos: int) -> tuple[np.ndarray, np.ndarray]:
    """`leaks.sampled_windows`; values: of each token, (65536,) uint64."""
    tokens = np.ascontiguousarray(tokens)
    found, documents = np.empty(len(tokens), np.uint64), np.empty(len(tokens), np.int32)
    pointers = values.ctypes.data, bos, found.ctypes.data, documents.ctypes.data
    count = library().windows(tokens.ctypes.data, len(tokens), *pointers)
    return found[:count].copy(), documents[:count].copy()


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("ascii", "quotes", "operators", "merges")),
        *((name, ctypes.c_void_p) for name in ("tokens", "sizes", "words")),
        *((name, ctypes.c_int64) for name in ("merge_mask", "word_mask", "joins", "bos")),
    ]


class Model:
    """A BPE model as `words.c` takes it, with a memory of words of its own."""

    def __init__(self, tables: dict[str, np.ndarray], merges: np.ndarray, joins: bool, bos: int) -> None:
        """`tables`: `ascii`, `quotes`, `operators` (int32), `tokens`, `sizes` (uint16).

        `merges`: left, right and new symbol in one integer each, of SYMBOL_BITS, (n,) uint64.
        """
        slots = np.empty(1 << (2 * len(merges)).bit_length(), np.uint64)
        while not library().fill(slots.ctypes.data, len(slots) - 1, merges.ctypes.data, len(merges)):
            slots = np.empty(2 * len(slots), np.uint64)
        self._held = {**tables, "merges": slots, "words": _lines(KEPT)}
        masks = {"merge_mask": len(slots) - 1, "word_mask": KEPT - 1}
        pointers = {name: array.ctypes.data for name, array in self._held.items()}
        self._model = _Model(**pointers, **masks, joins=joins, bos=bos)

    def encode(self, raw: np.ndarray, counted: bool) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Tokens of `joined` texts, which are written to, a BOS before each, as far as they are made here.

        Returns:
            columns, each (T,): tokens, and if `counted`, the bytes of each; the ends of the texts in them,
            (n,); and the words that are missing, (m, 4): start and length in `raw`, their place in the
            columns, and the bytes of white space before their own.
        """
        size = len(raw) - _PADDING
        tokens = np.empty(len(raw), np.uint16)
        carried = np.empty(len(raw) if counted else 0, np.int64)
        ends = np.empty(np.count_nonzero(raw == 0xFF) - 1, np.int64)
        missing = np.empty((size // 2 + 1, 4), np.int64)  # a word is a space and more, or is the first
        count = library().encode(
            ctypes.byref(self._model),
            raw.ctypes.data,
            size,
            tokens.ctypes.data,
            carried.ctypes.data if counted else None,
            ends.ctypes.data,
            missing.ctypes.data,
        )
        total = ends[-1] if len(ends) else 0
        columns = [tokens[:total], *[carried[:total]] * counted]
        return columns, ends, missing[:count]


def _lines(count: int) -> np.ndarray:
    """So many lines of 64 zero bytes, as the processor's cache holds them: none lies across two.

    They are in large pages where there are such, since each word is looked for in another page. A process
    that is forked begins with zeros of its own: copies would be of small pages, in both processes.
    """
    memory = mmap.mmap(-1, 64 * count + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in (mmap.MADV_HUGEPAGE, _WIPE_ON_FORK) if sys.platform == "linux" else ():
        with contextlib.suppress(OSError):  # the kernel may know none
            memory.madvise(advice)
    lines = np.frombuffer(memory, np.uint8)
    return lines[-lines.ctypes.data % _LARGE_PAGE :][: 64 * count]
