"""Documents from files, JSONL (plain, .xz, .gz, .zst, standard input) and Parquet, in blocks."""

import hashlib
import itertools
import json
import lzma
import os
import pickle
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson
import zstandard

from dataprep import words
from dataprep.shards import DataError

BLOCK_BYTES = 1 << 20  # a block is about this much input, or one longer line
READ_BYTES = 1 << 15  # of a compressed file at a time: one byte can stand for thousands
TEXT_TYPES = (  # Arrow's, of a Parquet column; or a dictionary of such values
    *("string", "large_string", "string_view"),
    *("binary", "large_binary", "binary_view", "fixed_size_binary"),
)
_BOM = b"\xef\xbb\xbf"
_SIGNATURES = {  # what a file begins with, whatever its name ends in
    b"\xfd7zXZ\0": ".xz",
    b"\x1f\x8b": ".gz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"PAR1": ".parquet",
}
_LONG_WINDOW = "made with zstd --long: unpack it first, zstd -d --long=31 FILE"
_SPACE = bytes([9, 10, 11, 12, 13, 28, 29, 30, 31, 32])  # what str.split() takes for white space in ASCII
_IN_SPACE = bytes({*"".join(filter(str.isspace, map(chr, range(0x3001)))).encode()})  # bytes of all of it
_START = 32  # bytes


class Identity(NamedTuple):
    """What a document is known by: see `Document`."""

    digest: bytes
    key: bytes
    start: bytes


class Document(NamedTuple):
    """A text as UTF-8, and where it came from (file and line)."""

    utf8: bytes
    origin: str

    @property
    def text(self) -> str:
        """The text as a string."""
        return self.utf8.decode("utf-8")

    @property
    def size(self) -> int:
        """UTF-8 bytes."""
        return len(self.utf8)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the text."""
        return hashlib.sha256(self.utf8).digest()

    @property
    def start(self) -> bytes:
        """A few bytes that are the same for texts with the same `key`, and soon told.

        They are the first of those that are part of no white space, however much of that is between them.
        """
        start = self.utf8[: 8 * _START].translate(None, _IN_SPACE)
        return (start if len(start) >= _START else self.utf8.translate(None, _IN_SPACE))[:_START]

    @property
    def key(self) -> bytes:
        """16 bytes that are the same for texts that differ in white space only."""
        if words.library():
            return hashlib.sha256(words.bare(self.utf8)).digest()[:16]
        bare = self.utf8.translate(None, _SPACE)
        if not bare.isascii():
            bare = "".join(bare.decode("utf-8").split()).encode("utf-8")
        return hashlib.sha256(bare).digest()[:16]

    @property
    def identity(self) -> Identity:
        """All of them."""
        return Identity(self.digest, self.key, self.start)


def make_document(text: str, origin: str) -> Document:
    """Document of `text`. Raises DataError for lone surrogates, which have no UTF-8 form."""
    try:
        return Document(text.encode("utf-8"), origin)
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise DataError(f"{origin}: lone surrogate U+{code:04X} at character {error.start}") from error


def _is_blank(line: "bytes | Document") -> bool:
    """Whether a line holds no document: white space, at most behind a byte order mark."""
    if isinstance(line, Document):
        return False
    return line.isspace() or line.startswith(_BOM) and not line[len(_BOM) :].strip()


class Block(NamedTuple):
    """Consecutive lines of one file (blank ones too), or documents that were never in a file."""

    name: str
    first_line: int
    lines: Sequence[bytes | Document]
    before: int = 0
    """Documents of the whole input before this block."""

    @property
    def size(self) -> int:
        """Bytes of the lines."""
        return sum(len(line) if isinstance(line, bytes) else line.size for line in self.lines)

    @property
    def documents(self) -> int:
        """How many, good or bad: lines that are not blank."""
        return sum(not _is_blank(line) for line in self.lines)

    def update(self, digest: "hashlib._Hash") -> None:
        """Add the block to a running hash of the input."""
        for line in self.lines:
            digest.update(line if isinstance(line, bytes) else line.utf8 + b"\n")

    def __reduce__(self) -> tuple:
        """Another process gets lines in one buffer: so many objects take longer to pickle."""
        if not all(isinstance(line, bytes) for line in self.lines):
            return Block, tuple(self)
        sizes = [*map(len, self.lines)]
        joined = pickle.PickleBuffer(b"".join(self.lines))
        return _with_lines, (self.name, self.first_line, sizes, joined, self.before)

    def split(self, documents: int) -> tuple["Block", "Block"]:
        """The first `documents` documents, and the rest."""
        number = 0
        for line in self.lines:
            if not documents:
                break
            documents -= not _is_blank(line)
            number += 1
        rest = self._replace(first_line=self.first_line + number, lines=self.lines[number:])
        return self._replace(lines=self.lines[:number]), rest


def _with_lines(name: str, first_line: int, sizes: list[int], joined: bytes, before: int) -> Block:
    ends = itertools.accumulate(sizes, initial=0)
    return Block(name, first_line, [joined[a:b] for a, b in itertools.pairwise(ends)], before)


class Parsed(NamedTuple):
    """What is in a block: good documents in order, a message for each bad line, remarks."""

    documents: list[Document]
    bad: list[str]
    notes: list[str]


def parse_block(block: Block) -> Parsed:
    """Documents of a block; a line that is none gives a message with file, line and reason."""
    parsed = Parsed([], [], [])
    for number, line in enumerate(block.lines, block.first_line):
        if isinstance(line, Document):
            parsed.documents.append(line)
        elif not _is_blank(line):
            origin = f"{block.name} line {number}"
            if line.startswith(_BOM):
                parsed.notes.append(f"{origin}: byte order mark removed")
                line = line[len(_BOM) :]
            try:
                parsed.documents.append(parse_line(line, origin))
            except DataError as error:
                parsed.bad.append(str(error))
    return parsed


def parse_line(line: bytes, origin: str) -> Document:
    """The document of a JSON line. DataError if there is none."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:  # which also is its word on what Python's own takes: NaN, lone surrogates
        record = _python_record(line, origin)
    text = record.get("text") if isinstance(record, dict) else record
    if not isinstance(text, str):
        found = "no text" if text is None else f"the text is of type {type(text).__name__}"
        raise DataError(f'{origin}: {found}; a document is {{"text": "..."}} or a bare string')
    return make_document(text, origin)


def _python_record(line: bytes, origin: str) -> Any:
    """What Python's own library makes of a JSON line, or a DataError that says what is wrong with it."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: not UTF-8 (byte 0x{line[error.start]:02x} at {error.start})") from error
    except (ValueError, RecursionError) as error:
        nul = line.find(b"\0")
        reason = f"NUL byte at {nul}" if nul >= 0 else error
        raise DataError(f"{origin}: not JSON: {reason}") from error


class Reader:
    """Blocks of one or several files in order; where it is, in compressed bytes, for a progress bar.

    Block borders depend on the content alone, so every run over the same files makes the same blocks.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)
        self.total = sum(os.path.getsize(path) for path in paths if os.path.isfile(path))
        self._before, self._file = 0, None

    @property
    def position(self) -> int:
        """Compressed bytes read so far."""
        return self._before + (self._file.tell() if self._file and self._file.seekable() else 0)

    def __iter__(self) -> Iterator[Block]:
        """The blocks.

        Raises:
            DataError: a file cannot be read to its end; names it and the last line.
        """
        self._before = 0
        for path in self.paths:
            yield from self._blocks(path)

    def _blocks(self, path: str) -> Iterator[Block]:
        name = "standard input" if path == "-" else path
        lines, size, first, number = [], 0, 1, 0
        try:
            for number, line in enumerate(self._lines(path), 1):
                lines.append(line)
                size += len(line)
                if size >= BLOCK_BYTES:
                    yield Block(name, first, lines)
                    lines, size, first = [], 0, number + 1
        except (OSError, EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
            where = f"{name} after line {number}" if number else name
            reason = " ".join(str(getattr(error, "strerror", None) or error).split())
            if isinstance(error, zstandard.ZstdError) and "too much memory" in reason:
                reason = _LONG_WINDOW
            raise DataError(f"{where}: cannot be read: {reason}") from error
        if lines:
            yield Block(name, first, lines)

    def _lines(self, path: str) -> Iterator[bytes]:
        if path == "-":
            if sys.stdin is None:
                raise OSError(0, "it is closed")
            yield from _opener(path, sys.stdin.buffer)(sys.stdin.buffer)
            return
        with open(path, "rb") as self._file:
            yield from _opener(path, self._file)(self._file)
        self._before, self._file = self._before + os.path.getsize(path), None


class _Packing(NamedTuple):
    """A compressed format: a decompressor of one stream, and of what zeros behind a stream is a multiple."""

    make: Callable[[], Any]
    padding: int
    """Bytes; 0: the format knows no padding."""

    def lines(self, file: BinaryIO) -> Iterator[bytes]:
        """Lines of a compressed file."""
        rest: list[bytes] = []
        for part in self._parts(file):
            *lines, last = part.split(b"\n")
            if lines:
                yield b"".join([*rest, lines[0], b"\n"])
                yield from (line + b"\n" for line in lines[1:])
                rest = []
            rest.append(last)
        if line := b"".join(rest):
            yield line

    def _parts(self, file: BinaryIO) -> Iterator[bytes]:
        """What the streams hold, one after the other.

        The readers of the standard library and of zstandard are not used: they take a file for complete that
        is empty or cut short, or whose second stream is damaged.

        Raises:
            EOFError: the file ends inside a stream, or before the first.
            OSError: zeros behind a stream that are no padding.
        """
        stream, zeros = self.make(), 0
        while chunk := file.read(READ_BYTES):
            while chunk:
                if stream is None and self.padding:
                    size = len(chunk)
                    chunk = chunk.lstrip(b"\0")
                    zeros += size - len(chunk)
                    if not chunk:
                        break
                    self._check(zeros)
                stream, zeros = stream or self.make(), 0
                yield stream.decompress(chunk)
                chunk, stream = (stream.unused_data, None) if stream.eof else (b"", stream)
        if stream:
            raise EOFError("the compressed file is cut short")
        self._check(zeros)

    def _check(self, zeros: int) -> None:
        if zeros and zeros % self.padding:
            raise OSError(
                0, f"{zeros} zero bytes behind a compressed stream, must be a multiple of {self.padding}"
            )


def _parquet_lines(file: BinaryIO) -> Iterator[bytes]:
    """Rows of a Parquet file's column `text`, as lines: see `_row_line`."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise OSError(0, "Parquet needs pyarrow: pip install pyarrow") from None
    if not file.seekable():
        raise OSError(0, "Parquet must be a file, not a pipe")
    try:
        table = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
        _check_columns(table.schema_arrow)
        for batch in table.iter_batches(batch_size=256, columns=["text"]):
            column = batch.column(0)
            if pyarrow.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            # Strings are decoded here because Arrow neither checks them nor says which row is no UTF-8.
            yield from map(_row_line, column.cast(pyarrow.large_binary()).to_pylist())
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # of text; of a column's name
        raise OSError(0, str(error)) from error


def _check_columns(schema: Any) -> None:
    """OSError unless an Arrow schema has one column `text`, of text or bytes."""
    from pyarrow.types import is_dictionary

    names = ", ".join(schema.names)
    if "text" not in schema.names:
        raise OSError(0, f"no column 'text' among {names}")
    if schema.names.count("text") > 1:
        raise OSError(0, f"more than one column 'text' among {names}")
    kind = schema.field("text").type
    values = kind.value_type if is_dictionary(kind) else kind
    if str(values).partition("[")[0] not in TEXT_TYPES:
        raise OSError(0, f"column 'text' is of type {kind}, must be one of {', '.join(TEXT_TYPES)}")


def _row_line(value: bytes | None) -> bytes:
    """A row as a JSON line. One that is no UTF-8 stays as it is: `parse_line` refuses it and says where."""
    try:
        return json.dumps(None if value is None else value.decode("utf-8")).encode() + b"\n"
    except UnicodeDecodeError:
        return value + b"\n"


_OPENERS = {
    ".xz": _Packing(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), padding=4).lines,
    ".gz": _Packing(lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS), padding=1).lines,
    ".zst": _Packing(lambda: zstandard.ZstdDecompressor().decompressobj(), padding=0).lines,
    ".parquet": _parquet_lines,
}


def _opener(path: str, file: BinaryIO) -> Callable[[BinaryIO], Iterable[bytes]]:
    """What gives the lines of a file: by how it begins, else by its name's ending, else it is text."""
    start = file.peek(8)
    suffixes = (suffix for signature, suffix in _SIGNATURES.items() if start.startswith(signature))
    return _OPENERS.get(next(suffixes, Path(path).suffix.lower()), iter)


def document_blocks(documents: Iterable[Document]) -> Iterator[Block]:
    """Blocks of documents that are in memory already."""
    lines, size = [], 0
    for document in documents:
        lines.append(document)
        size += document.size
        if size >= BLOCK_BYTES:
            yield Block("", 0, lines)
            lines, size = [], 0
    if lines:
        yield Block("", 0, lines)
