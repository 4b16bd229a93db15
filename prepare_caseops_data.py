"""Turn documents into training and validation shards: CaseOps text, tokens, original byte counts.

    python prepare_caseops_data.py --docs docs.jsonl.zst --sp tokenizer.model --out data/mine
    python prepare_caseops_data.py --docs docs.jsonl.xz --train-tokenizer 8192 --out data/mine
    python prepare_caseops_data.py --demo        # small real-text data set in data/demo, nothing to download

Documents: JSONL (plain, .xz, .gz, .zst, or - for standard input), one a line, {"text": ...} or a bare string;
blank lines are skipped. The first --val-docs documents are the validation split. Written to --out:

    fineweb_train_%06d.bin       tokens: BOS before each document, no EOS; documents run on across shards
    fineweb_val_%06d.bin         the same for validation
    fineweb_val_bytes_%06d.bin   UTF-8 bytes of original text that each validation token carries (BOS: 0)
    <tokenizer>.model            the tokenizer used
    manifest.json                counts, checksums, hashes of the validation documents; written last

A shard is 256 little-endian int32 (20240520, 1, number of tokens, zeros), then uint16 values.
The work is a stream: `read_documents` -> `tokenise` (a pure function of a batch) -> `ShardWriter`.
"""

import argparse
import ast
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import zstandard
from tqdm import tqdm

import lossless_caps

CANONICAL_VAL_DOCS = 50_000  # the contest's validation split; fewer would train on validation documents
SHARD_TOKENS = 10_000_000
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256
MAX_TOKEN_BYTES, MAX_VOCAB = 65_535, 65_536  # uint16 values
BOS_ID, FIRST_OPERATOR_ID = 1, 4
OPERATORS = (lossless_caps.TITLE, lossless_caps.ALLCAPS, lossless_caps.CAPNEXT, lossless_caps.ESC)
SPACE_PIECE = "\u2581"  # how SentencePiece writes a space
TOKENIZER_TRAINING_BYTES = 200_000_000  # enough for stable merges; SentencePiece holds its texts in memory
BATCH_DOCUMENTS = 256

DEMO_OUT = Path("data/demo")
DEMO_VAL_DOCS = 40  # about 110 kB
DEMO_VOCAB = 1024
DEMO_MIN_CHARACTERS = 200  # modules with less documentation are left out


class DataError(ValueError):
    """Something the user gave cannot be used; the message is one line that names it."""


class Document(NamedTuple):
    """A text, where it came from (file and line), its UTF-8 size in bytes and its SHA-256."""

    text: str
    origin: str
    size: int
    digest: bytes


def make_document(text: str, origin: str) -> Document:
    """Document of `text`. Raises DataError for lone surrogates, which have no UTF-8 form."""
    try:
        utf8 = text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise DataError(f"{origin}: lone surrogate U+{code:04X} at character {error.start}") from error
    return Document(text, origin, len(utf8), hashlib.sha256(utf8).digest())


# ---- Reading -----------------------------------------------------------------------------------------------


def read_documents(path: str) -> Iterator[Document]:
    """Documents of a JSONL file, or of standard input for "-", in order.

    Raises:
        DataError: the file cannot be read to its end, or a line is no document; names file and line.
    """
    name, number = "standard input" if path == "-" else path, 0
    try:
        for number, line in enumerate(_lines(path), 1):
            if line.strip():
                yield _parse_line(line, f"{name} line {number}")
    except (OSError, EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
        where = f"{name} after line {number}" if number else name
        raise DataError(f"{where}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _lines(path: str) -> Iterator[bytes]:
    if path == "-":
        yield from sys.stdin.buffer
    elif path.endswith(".zst"):
        yield from _zst_lines(path)
    else:
        opener = {".xz": lzma.open, ".gz": gzip.open}.get(Path(path).suffix, open)
        with opener(path, "rb") as file:
            yield from file


def _zst_lines(path: str) -> Iterator[bytes]:
    """Lines of a .zst file. zstandard's own reader takes a file that is cut short for a complete one."""
    frame, rest = None, b""
    with open(path, "rb") as file:
        while chunk := file.read(1 << 17):
            while chunk:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                *lines, rest = (rest + frame.decompress(chunk)).split(b"\n")
                yield from lines
                chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame:
        raise EOFError("the compressed file ends inside a frame")
    yield rest


def _parse_line(line: bytes, origin: str) -> Document:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: not UTF-8 (byte 0x{line[error.start]:02x} at {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin}: not JSON: {error}") from error
    text = record.get("text") if isinstance(record, dict) else record
    if not isinstance(text, str):
        found = "no text" if text is None else f"the text is of type {type(text).__name__}"
        raise DataError(f'{origin}: {found}; a document is {{"text": "..."}} or a bare string')
    return make_document(text, origin)


def split_documents(
    documents: Iterable[Document], val_docs: int
) -> tuple[list[Document], Iterator[Document]]:
    """The first `val_docs` documents, and a stream of the others. DataError if there are no others."""
    stream = iter(documents)
    validation = list(islice(stream, val_docs))
    for first in stream:
        return validation, chain([first], stream)
    raise DataError(f"--val-docs {val_docs}: leaves nothing for training, the input has {len(validation)}")


# ---- Tokenizer ---------------------------------------------------------------------------------------------


class Tokenizer(NamedTuple):
    """A SentencePiece model fit for CaseOps data; `lossless`: one that loses anything is refused."""

    file_name: str
    model: bytes
    processor: sentencepiece.SentencePieceProcessor
    lossless: bool


def make_tokenizer(path: str, model: bytes, lossless: bool = False) -> Tokenizer:
    """Tokenizer of a serialized SentencePiece model.

    Raises:
        DataError: not such a model, or one without BOS 1, the operators at 4-7 and a piece for a bare space.
    """
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model or b"\0")
    except RuntimeError as error:
        raise DataError(f"{path}: not a SentencePiece model") from error
    if processor.get_piece_size() > MAX_VOCAB:
        raise DataError(f"{path}: has {processor.get_piece_size()} pieces; shards hold at most {MAX_VOCAB}")
    if processor.bos_id() != BOS_ID:
        raise DataError(f"{path}: its BOS is {processor.bos_id()}; the data format needs {BOS_ID}")
    for token, operator in enumerate(OPERATORS, FIRST_OPERATOR_ID):
        if processor.encode(operator) != [token]:
            raise DataError(f"{path}: not a CaseOps tokenizer: U+{ord(operator):04X} is not token {token}")
    if processor.piece_to_id(SPACE_PIECE) == processor.unk_id():
        raise DataError(f"{path}: has no piece for a bare space (U+2581)")
    return Tokenizer(Path(path).name, model, processor, lossless)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Serialized SentencePiece BPE model that gives back every text without U+2581 unchanged.

    Args:
        texts: original documents; CaseOps is applied here. The same texts give the same bytes.
        vocab_size: pieces, including 4 control pieces, the 4 operators and 256 bytes.

    Raises:
        DataError: `vocab_size` does not suit the texts.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(lossless_caps.encode(text) for text in texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            pad_id=0,
            bos_id=BOS_ID,
            eos_id=2,
            unk_id=3,
            user_defined_symbols=list(OPERATORS),
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 30,  # bytes; a "sentence" is a document, and longer ones are left out
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip() or "no training text"
        raise DataError(f"--train-tokenizer {vocab_size}: {reason}") from error
    return model.getvalue()


def tokenizer_texts(documents: Iterable[Document], val_docs: int) -> Iterator[str]:
    """What a tokenizer may learn from: the first training documents that are not also in validation."""
    validation, training = split_documents(documents, val_docs)
    held_out = {document.digest for document in validation}
    room = TOKENIZER_TRAINING_BYTES
    for document in training:
        if document.digest in held_out:
            continue
        room -= document.size
        if room < 0:
            return
        yield document.text


def tokenise(processor: sentencepiece.SentencePieceProcessor, texts: Sequence[str]) -> np.ndarray:
    """Tokens, (T,) uint16, of a batch of documents, BOS before each. Its threads do not change the result."""
    encoded = [lossless_caps.encode(text) for text in texts]
    return np.concatenate(processor.encode(encoded, out_type="numpy", add_bos=True)).astype(np.uint16)


def tokenise_validation(tokenizer: Tokenizer, document: Document) -> tuple[np.ndarray, np.ndarray, bool]:
    """Tokens of one document, the original UTF-8 bytes of each (both (T,) uint16), and: do they decode to it?

    White space that the tokenizer drops at the ends belongs to no token and is not counted.

    Raises:
        DataError: a token carries more bytes than uint16 can hold, or a lossless tokenizer loses something.
    """
    encoded = lossless_caps.encode(document.text)
    # The surfaces of out_type="proto" as offsets in characters; these need no protobuf package.
    mapping = tokenizer.processor.encode(encoded, out_type="offset_mapping")
    counts = lossless_caps.piece_byte_counts([encoded[start:end] for start, end in mapping["offsets"]])
    if max(counts, default=0) > MAX_TOKEN_BYTES:
        raise DataError(
            f"{document.origin}: one token carries {max(counts)} bytes (a run of white space?), "
            f"more than the {MAX_TOKEN_BYTES} that a shard can say"
        )
    round_trip = tokenizer.processor.decode(mapping["ids"]) == encoded
    if tokenizer.lossless and not (round_trip and sum(counts) == document.size):
        why = ": it holds U+2581, which SentencePiece takes for a space" if SPACE_PIECE in encoded else ""
        raise DataError(f"{document.origin}: the trained tokenizer does not give this text back{why}")
    tokens = np.array([BOS_ID, *mapping["ids"]], dtype=np.uint16)
    return tokens, np.array([0, *counts], dtype=np.uint16), round_trip


# ---- Writing -----------------------------------------------------------------------------------------------


class DataFolder:
    """Output folder. Files appear whole, no other file is replaced unasked, a failed run leaves nothing."""

    def __init__(self, path: Path, overwrite: bool) -> None:
        """Make the folder; with `overwrite` remove its data set. DataError for *.bin files we never write."""
        self.path, self.overwrite = path, overwrite
        self.sha256: dict[str, str] = {}  # of every file of this data set, by name
        self._created: list[Path] = []
        path.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for old in [path / "manifest.json", *path.glob("*.bin")]:
                old.unlink(missing_ok=True)
        self._refuse_shards_unless(r"fineweb_(train|val|val_bytes)_\d{6}\.bin")

    def publish(self, name: str, data: bytes) -> None:
        """Let a complete file appear under its name. One that is there with the same bytes is kept.

        Raises:
            DataError: without `overwrite`, and there is another file of that name.
        """
        target, temporary = self.path / name, self.path / f".{name}.tmp"
        self.sha256[name] = hashlib.sha256(data).hexdigest()
        if target.exists():
            if target.read_bytes() == data:
                return
            if not self.overwrite:
                raise self._other_data(target)
        self._created += [temporary, target]
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)

    def finish(self, manifest: dict) -> None:
        """Write the manifest. DataError if the folder holds shards that are no part of this data set."""
        self._refuse_shards_unless("|".join(map(re.escape, self.sha256)))
        self.publish("manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())

    def discard(self) -> None:
        """Remove what this run has written."""
        for path in self._created:
            path.unlink(missing_ok=True)

    def _refuse_shards_unless(self, pattern: str) -> None:
        for path in sorted(self.path.glob("*.bin")):
            if not re.fullmatch(pattern, path.name):
                raise self._other_data(path)

    @staticmethod
    def _other_data(path: Path) -> DataError:
        return DataError(f"{path}: is of another data set; choose another --out or pass --overwrite")


class ShardWriter:
    """Cuts a stream of uint16 values into shard files of `shard_tokens`; the last may be shorter."""

    def __init__(self, folder: DataFolder, pattern: str, shard_tokens: int) -> None:
        self.tokens: dict[str, int] = {}  # number of values in each shard, by file name
        self._folder, self._pattern, self._shard_tokens = folder, pattern, shard_tokens
        self._parts: list[np.ndarray] = []
        self._held = 0

    def add(self, values: np.ndarray) -> None:
        """Append values, (n,) uint16, and write every shard that they fill."""
        while len(values):
            part, values = np.split(values, [self._shard_tokens - self._held])
            self._parts.append(part)
            self._held += len(part)
            if self._held == self._shard_tokens:
                self.flush()

    def flush(self) -> None:
        """Write what is held, if anything, as one shard."""
        if self._held:
            header = np.zeros(SHARD_HEADER_INTS, dtype="<i4")
            header[:3] = SHARD_MAGIC, SHARD_VERSION, self._held
            name = self._pattern % len(self.tokens)
            values = np.concatenate(self._parts).astype("<u2")
            self._folder.publish(name, header.tobytes() + values.tobytes())
            self.tokens[name] = self._held
            self._parts, self._held = [], 0


# ---- The data set ------------------------------------------------------------------------------------------


def prepare(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    out: Path,
    val_docs: int,
    overwrite: bool = False,
    shard_tokens: int = SHARD_TOKENS,
) -> dict:
    """Write a data set and return its manifest. Whatever ends it early, the files it wrote are removed again.

    Empty documents are counted and left out, but keep their place among the first `val_docs`.

    Raises:
        DataError: as `read_documents`, `split_documents`, `tokenise_validation` and `DataFolder`.
    """
    validation, training = split_documents(documents, val_docs)
    folder = DataFolder(out, overwrite)
    try:
        folder.publish(tokenizer.file_name, tokenizer.model)
        val, files = write_validation(validation, tokenizer, folder, shard_tokens)
        held_out = {document.digest for document in validation}
        train, train_files = write_training(training, held_out, tokenizer, folder, shard_tokens)
        files |= train_files
        manifest = {
            "format": "parameter-golf-data/1",
            "transform": "lossless_caps_caseops_v1",
            "tokenizer": {
                "file": tokenizer.file_name,
                "sha256": folder.sha256[tokenizer.file_name],
                "vocab_size": tokenizer.processor.get_piece_size(),
                "lossless": val["round_trip_documents"] == val["documents"],
            },
            "val_docs": val_docs,
            "splits": {"train": train, "val": val},
            "files": {name: {"tokens": files[name], "sha256": folder.sha256[name]} for name in files},
            "val_document_sha256": [document.digest.hex()[:16] for document in validation if document.text],
        }
        folder.finish(manifest)
    except BaseException:
        folder.discard()
        raise
    return manifest


def write_validation(
    validation: Iterable[Document], tokenizer: Tokenizer, folder: DataFolder, shard_tokens: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Write validation shards and byte sidecar; returns the split's counts and the tokens of each file.

    Raises:
        DataError: every document is empty.
    """
    names = ("documents", "tokens", "bytes", "uncharged_bytes", "round_trip_documents", "empty_documents")
    counts = dict.fromkeys(names, 0)
    token_writer = ShardWriter(folder, "fineweb_val_%06d.bin", shard_tokens)
    byte_writer = ShardWriter(folder, "fineweb_val_bytes_%06d.bin", shard_tokens)
    with _progress("validation") as bar:
        for document in validation:
            if not document.text:
                counts["empty_documents"] += 1
                continue
            tokens, token_bytes, round_trip = tokenise_validation(tokenizer, document)
            token_writer.add(tokens)
            byte_writer.add(token_bytes)
            charged = int(token_bytes.sum(dtype=np.int64))
            counts["documents"] += 1
            counts["tokens"] += len(tokens)
            counts["bytes"] += charged
            counts["uncharged_bytes"] += document.size - charged
            counts["round_trip_documents"] += round_trip
            _advance(bar, document.size, counts["documents"])
    if not counts["documents"]:
        raise DataError(f"--val-docs {counts['empty_documents']}: all these documents are empty")
    token_writer.flush()
    byte_writer.flush()
    return counts, token_writer.tokens | byte_writer.tokens


def write_training(
    training: Iterable[Document],
    held_out: set[bytes],
    tokenizer: Tokenizer,
    folder: DataFolder,
    shard_tokens: int,
) -> tuple[dict[str, int], dict[str, int]]:
    """Write training shards without the documents in `held_out` (digests); returns as `write_validation`.

    "bytes" is the UTF-8 size of the documents: training needs no byte count per token.

    Raises:
        DataError: no document is left.
    """
    counts = dict.fromkeys(("documents", "tokens", "bytes", "dropped_duplicates", "empty_documents"), 0)
    writer = ShardWriter(folder, "fineweb_train_%06d.bin", shard_tokens)
    stream = iter(training)
    with _progress("training") as bar:
        while batch := list(islice(stream, BATCH_DOCUMENTS)):
            filled = [document for document in batch if document.text]
            kept = [document for document in filled if document.digest not in held_out]
            counts["empty_documents"] += len(batch) - len(filled)
            counts["dropped_duplicates"] += len(filled) - len(kept)
            if not kept:
                continue
            tokens = tokenise(tokenizer.processor, [document.text for document in kept])
            writer.add(tokens)
            size = sum(document.size for document in kept)
            counts["documents"] += len(kept)
            counts["tokens"] += len(tokens)
            counts["bytes"] += size
            _advance(bar, size, counts["documents"])
    if not counts["documents"]:
        raise DataError("nothing to train on: every training document is empty or also a validation document")
    writer.flush()
    return counts, writer.tokens


def _progress(description: str) -> tqdm:
    """Bar in bytes per second; nothing is shown where stderr is not a terminal."""
    return tqdm(desc=description, unit="B", unit_scale=True, disable=None)


def _advance(bar: tqdm, size: int, documents: int) -> None:
    bar.set_postfix(documents=documents, refresh=False)
    bar.update(size)


# ---- Demo documents ----------------------------------------------------------------------------------------


def demo_documents(library: Path | None = None) -> list[Document]:
    """Python's own documentation: the help topics, and the docstrings of each module of `library`.

    Sources are parsed, never imported. Sorted by hash of the name, so that the first ones are a fair sample.

    Args:
        library: folder of the standard library; that of the running interpreter if not given.

    Raises:
        DataError: there are no sources to read there.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    texts = {f"help {topic}": text for topic, text in _topics(library)}
    for path in library.rglob("*.py"):
        module = path.relative_to(library).with_suffix("").parts
        if {"test", "tests", "idlelib"} & set(module) or not all(part.isidentifier() for part in module):
            continue  # site-packages and build folders are no identifiers
        name = ".".join(module).removesuffix(".__init__")
        text = "\n\n".join(_docstrings(_parse(path), name))
        if len(text) >= DEMO_MIN_CHARACTERS:
            texts[f"docstrings {name}"] = text
    if len(texts) <= DEMO_VAL_DOCS:
        raise DataError(f"{library}: holds too little documentation for the demo ({len(texts)} modules)")
    names = sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())
    return [make_document(texts[name], name) for name in names]


def _topics(library: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each help topic: the dictionary that `pydoc_data.topics` assigns."""
    path = library / "pydoc_data" / "topics.py"
    for statement in _parse(path).body if path.exists() else []:
        if isinstance(statement, ast.Assign):
            yield from ast.literal_eval(statement.value).items()


def _parse(path: Path) -> ast.Module:
    """Syntax tree of a source file; an empty one where it is not written for this Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return ast.Module([], [])


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    """Name and docstring of a definition and of those inside it, in the order of the source."""
    definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    if isinstance(node, definition) and (text := ast.get_docstring(node)):
        yield f"{name}\n\n{text}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield from _docstrings(child, f"{name}.{child.name}" if hasattr(child, "name") else name)


# ---- Command line ------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line without the usage, like every other message of this program."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line with every default filled in; prints one line and exits with 2 if it makes no sense."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--docs", metavar="FILE", help="JSONL documents: plain, .xz, .gz or .zst; - for standard input")
    add("--out", metavar="DIR", type=Path, help=f"output folder (with --demo: {DEMO_OUT})")
    add(
        "--val-docs", metavar="N", type=_count, help=f"validation documents (canonical: {CANONICAL_VAL_DOCS})"
    )
    add("--overwrite", action="store_true", help="replace the data set that --out holds")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--sp", metavar="MODEL", help="use this CaseOps SentencePiece model")
    add("--train-tokenizer", metavar="VOCAB", type=_count, help="train one, lossless, on the training split")
    add("--demo", action="store_true", help="small data set from Python's own documentation")
    options = parser.parse_args(arguments)
    if options.demo:
        if options.docs is not None:
            parser.error("--docs: not allowed with --demo, which brings its own documents")
        options.out = options.out or DEMO_OUT
        options.train_tokenizer = DEMO_VOCAB
        options.val_docs = options.val_docs or DEMO_VAL_DOCS
        return options
    options.val_docs = options.val_docs or CANONICAL_VAL_DOCS
    if options.docs is None or options.out is None:
        parser.error("--docs FILE and --out DIR are required (or --demo)")
    if options.sp is None and options.train_tokenizer is None:
        parser.error("a tokenizer is required: --sp MODEL or --train-tokenizer VOCAB")
    if options.docs == "-" and options.train_tokenizer is not None:
        parser.error("--docs -: --train-tokenizer reads the documents twice and needs a file")
    if options.train_tokenizer is not None and options.train_tokenizer > MAX_VOCAB:
        parser.error(
            f"--train-tokenizer {options.train_tokenizer}: a shard can hold at most {MAX_VOCAB} pieces"
        )
    return options


def run(options: argparse.Namespace) -> dict:
    """Prepare the data set that the options describe; returns its manifest. Raises DataError."""
    demo = demo_documents() if options.demo else None

    def documents() -> Iterable[Document]:
        return read_documents(options.docs) if demo is None else demo

    if options.train_tokenizer is not None:
        model = train_tokenizer(tokenizer_texts(documents(), options.val_docs), options.train_tokenizer)
        tokenizer = make_tokenizer("tokenizer.model", model, lossless=True)
    else:
        tokenizer = make_tokenizer(options.sp, Path(options.sp).read_bytes())
    return prepare(documents(), tokenizer, options.out, options.val_docs, options.overwrite)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry: 0, or 2 after one line on stderr when the input cannot be used."""
    options = parse_arguments(arguments)
    if not options.demo and options.val_docs != CANONICAL_VAL_DOCS:
        print(f"note: --val-docs {options.val_docs} is not the canonical split ({CANONICAL_VAL_DOCS})")
    try:
        manifest = run(options)
    except (DataError, OSError) as error:
        reason = (
            error if isinstance(error, DataError) else f"{error.filename or options.out}: {error.strerror}"
        )
        print(f"prepare_caseops_data.py: error: {reason}", file=sys.stderr)
        return 2
    counts = [f"{split}_{key}:{n}" for split, entry in manifest["splits"].items() for key, n in entry.items()]
    print(f"prepared {options.out} files:{len(manifest['files'])} {' '.join(counts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
