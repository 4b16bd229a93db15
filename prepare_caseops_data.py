"""Turn documents into training and validation shards: CaseOps text, tokens, original byte counts.

    python prepare_caseops_data.py --docs docs.jsonl.zst --sp tokenizer.model --out data/mine
    python prepare_caseops_data.py --docs a.parquet b.parquet --train-tokenizer 8192 --out data/mine
    python prepare_caseops_data.py --download [--shards 10]   # ready-made data of the contest, into data/
    python prepare_caseops_data.py --check DIR                # is a folder whole, right and free of leaks?
    python prepare_caseops_data.py --demo        # small real-text data set in data/demo, nothing to download

With --plain: text as it is, for CASEOPS_ENABLED=0 (--demo --plain writes data/demo_plain; --download --plain
fetches SP8192, or with --vocab 1024 SP1024).

Documents: JSONL (plain, .xz, .gz, .zst, or - for standard input), one a line, {"text": ...} or a bare
string, or the column `text` of Parquet files; blank lines are skipped. The first --val-docs documents are
the validation split. Written to --out:

    fineweb_train_%06d.bin       tokens: BOS before each document, no EOS; documents run on across shards
    fineweb_val_%06d.bin         the same for validation
    fineweb_val_bytes_%06d.bin   UTF-8 bytes of original text that each validation token carries (BOS: 0)
    <tokenizer>.model            the tokenizer used
    manifest.json                counts, checksums, hashes of the validation documents; written last

The work is a stream: `Reader` -> blocks of lines -> `Worker`, a pure function of a block, in as many
processes as there are cores -> `ShardWriter`, in order. A run that ended early, whatever the reason, goes on
after its last whole shard when the same command is given again. The parts are in `dataprep/`.
"""

import argparse
import atexit
import base64
import gc
import hashlib
import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import systems.early  # noqa: F401 - what is missing of the rest is said in one line

# isort: split
import numpy as np
from sentencepiece import SentencePieceProcessor

from dataprep import words
from dataprep.checking import check_folder, report_table, split_report
from dataprep.crew import Crew
from dataprep.demo import DEMO_VAL_DOCS, DEMO_VOCAB, demo_documents
from dataprep.download import download
from dataprep.encoding import (
    MAX_VOCAB,
    SPACE_PIECE,
    Encoder,
    Tokenizer,
    has_space,
    make_tokenizer,
    tokenizer_texts,
    train_tokenizer,
)
from dataprep.fusion import marker_pairs
from dataprep.leaks import NearIndex
from dataprep.progress import Progress
from dataprep.reading import Block, Document, Identity, Reader, document_blocks, make_document, parse_block
from dataprep.scanning import validation_hashes
from dataprep.shards import (
    BYTES_SHARD,
    FORMAT,
    NO_TRANSFORM,
    TRAIN_SHARD,
    TRANSFORM,
    UNFINISHED,
    VAL_SHARD,
    BusyError,
    DataError,
    DataFolder,
    ShardWriter,
    locked,
)
from dataprep.worker import EXAMPLES, HeldOut, Result, Worker
from systems.console import keep_consoles
from systems.layout import DEMO_OUT, DEMO_PLAIN_OUT, SOURCES

CANONICAL_VAL_DOCS = 50_000  # the contest's validation split; fewer would train on validation documents
SHARD_TOKENS = 10_000_000
TOKENIZER_TRAINING_BYTES = 200_000_000  # enough for stable merges; SentencePiece holds its texts in memory
VALIDATION_PART = 16  # documents: most of the sample is among them, some 2 ms each
NOTES = 5  # of a kind of remark that are printed

__all__ = ["DataError", "make_document", "make_tokenizer", "prepare", "train_tokenizer"]


class Job(NamedTuple):
    """What is to be made of the documents, and how."""

    val_docs: int
    shard_tokens: int = SHARD_TOKENS
    workers: int = 1
    max_bad: int = 0
    drop_near: bool = False


# ---- The data set ------------------------------------------------------------------------------------------


class Split:
    """Counts of one split, with a histogram of document lengths, and its shards."""

    COUNTS = {
        "train": (
            "documents",
            "tokens",
            "bytes",
            "dropped_duplicates",
            "dropped_space_duplicates",
            "dropped_token_duplicates",
            "near_duplicates",
            "dropped_near_duplicates",
            "empty_documents",
            "bad_documents",
            "operator_tokens",
        ),
        "val": (
            "documents",
            "tokens",
            "bytes",
            "uncharged_bytes",
            "overcharged_bytes",
            "overcharged_documents",
            "round_trip_documents",
            "empty_documents",
            "bad_documents",
            "operator_tokens",
        ),
    }

    # Named where there are some: other manifests stay as they were.
    SELDOM = {"dropped_token_duplicates", "overcharged_bytes", "overcharged_documents"}

    def __init__(self, name: str, *writers: ShardWriter) -> None:
        self.name, self.writers = name, writers
        self.counts, self.lengths = Counter(), Counter()
        self.near: list[str] = []

    def add(self, result: Result) -> int:
        """Take a result; returns how many shards it completed."""
        self.counts += result.counts
        self.lengths.update(result.lengths.tolist())
        self.near += result.near[: EXAMPLES - len(self.near)]
        streams = (result.tokens, result.token_bytes)
        return sum(writer.add(values) for writer, values in zip(self.writers, streams, strict=False))

    def lacks(self) -> str:
        """Why a validation split of these documents could not be scored, "" if it can."""
        if not (self.counts["documents"] or self.counts["empty_documents"] or self.counts["bad_documents"]):
            return "the input holds no documents"
        if not self.counts["documents"]:
            return "all these documents are empty" + " or broken" * bool(self.counts["bad_documents"])
        if not self.counts["bytes"]:
            return "these documents leave no bytes to score (white space alone?)"
        more = self.counts["overcharged_bytes"] - self.counts["uncharged_bytes"]
        too_many = f"these documents would be charged {more} bytes more than they have"
        return f"{too_many}: the tokenizer's normaliser makes text longer" if more > 0 else ""

    def flush(self) -> None:
        """Write the last shard."""
        for writer in self.writers:
            writer.flush()

    def state(self) -> dict:
        """What a later run needs to go on."""
        held = [base64.b64encode(writer.held.tobytes()).decode() for writer in self.writers]
        shards = [writer.tokens for writer in self.writers]
        return {
            "counts": self.counts,
            "lengths": [list(self.lengths), list(self.lengths.values())],
            "near": self.near,
            "held": held,
            "shards": shards,
        }

    def resume(self, state: dict) -> None:
        """Go on from a state."""
        self.counts = Counter(state["counts"])
        self.lengths = Counter(dict(zip(*state["lengths"], strict=True)))
        self.near = state["near"]
        for writer, held, tokens in zip(self.writers, state["held"], state["shards"], strict=True):
            writer.resume(tokens, np.frombuffer(base64.b64decode(held), np.uint16))

    def manifest(self) -> dict:
        """The split's entry in the manifest."""
        names = self.COUNTS[self.name]
        return {name: self.counts[name] for name in names if self.counts[name] or name not in self.SELDOM}


class Preparation:
    """Writes one data set. Empty and broken documents keep their place among the first `val_docs`."""

    def __init__(self, blocks: Iterable[Block], tokenizer: Tokenizer, folder: DataFolder, job: Job) -> None:
        self._tokenizer, self._folder, self._job = tokenizer, folder, job
        self._source = iter(blocks)
        reader = blocks if isinstance(blocks, Reader) else None
        self._progress = Progress(reader.total, lambda: reader.position) if reader else Progress()
        self._input = hashlib.sha256()  # of what the workers have been given
        names = (VAL_SHARD, BYTES_SHARD, TRAIN_SHARD)
        val, val_bytes, train = (ShardWriter(folder, name, job.shard_tokens) for name in names)
        self._val, self._train = Split("val", val, val_bytes), Split("train", train)
        self._held_out: list[Identity] = []  # validation documents, in order
        self._refused: set[str] = set()  # digests of validation documents that are not taken, in hex
        self._bad: list[str] = []
        self._noted = self._seen = 0
        self.resumed = False

    def run(self) -> dict:
        """Write everything; returns the manifest."""
        self._state = self._folder.begin(
            {
                "tokenizer": hashlib.sha256(self._tokenizer.model).hexdigest(),
                "--val-docs": self._job.val_docs,
                "--shard-tokens": self._job.shard_tokens,
                "--drop-near-duplicates": self._job.drop_near,
                "--plain": self._tokenizer.plain,
                **({"--fuse-markers": True} if self._tokenizer.fused else {}),
            }
        )
        self.resumed = "val" in self._state
        if words.library() is None:  # asked here first, so that workers find it compiled
            self._progress.say(
                "note: no C compiler (cc, gcc, clang): tokens by SentencePiece alone, several times slower"
            )
        self._encoder = Encoder(self._tokenizer)
        self._folder.publish(self._tokenizer.file_name, self._tokenizer.model)
        try:
            validation, rest = self._split_input()
            self._validation(validation)
            self._training(rest)
        finally:
            self._progress.close()
        manifest = self._manifest()
        self._folder.finish(manifest)
        return manifest

    @property
    def worth_keeping(self) -> bool:
        """There are whole training shards, of this run or one before."""
        return self.resumed or bool(self._train.writers[0].tokens)

    def _split_input(self) -> tuple[Iterator[Block], Iterator[Block]]:
        """Blocks of validation, and of training, to be read after them."""
        rest: list[Block] = []

        def validation() -> Iterator[Block]:
            wanted = self._job.val_docs
            for block in self._source:
                first, others = block.split(wanted)
                wanted -= first.documents
                while first.documents:  # in parts, so that no process has long to do when others have done
                    part, first = first.split(VALIDATION_PART)
                    yield part
                if others.documents:
                    rest.append(others)
                    return

        def training() -> Iterator[Block]:
            while rest:
                yield rest.pop()
            yield from (block for block in self._source if block.documents)

        return validation(), training()

    def _tagged(self, blocks: Iterable[Block]) -> Iterator[tuple[tuple[int, int, str], Block]]:
        """Each block with its number, its size and the hash of the input up to its end."""
        for number, block in enumerate(blocks, 1):
            block.update(self._input)
            block = block._replace(before=self._seen)
            self._seen += block.documents
            yield (number, block.size, self._input.hexdigest()), block

    def _take(self, split: Split, result: Result, size: int) -> int:
        """Count what a block gave; returns the number of shards it completed."""
        for message in result.bad:
            self._bad.append(message)
            if len(self._bad) > self._job.max_bad:
                raise DataError(f"{message} (more than --max-bad {self._job.max_bad})")
        for note in [*(f"skipped: {message}" for message in result.bad), *result.notes]:
            self._noted += 1
            if self._noted <= NOTES:
                self._progress.say(f"note: {note}")
        completed = split.add(result)
        self._progress.update(sum(s.counts["documents"] for s in (self._val, self._train)), size)
        return completed

    def _validation(self, blocks: Iterator[Block]) -> None:
        """Tokenise and write the validation split, or where that is done, read its hashes only."""
        if self.resumed:
            self._refused = set(self._state.get("refused", []))
            for (_, size, _), block in self._tagged(blocks):
                documents = [document for document in parse_block(block).documents if document.utf8]
                documents = [d for d in documents if d.digest.hex() not in self._refused]
                self._held_out += [document.identity for document in documents]
                self._progress.update(0, size)
            self._val.resume(self._state["val"])
            return
        with self._crew(None) as crew:
            for (_, size, _), result in crew.map(self._tagged(blocks), attrgetter("size")):
                self._take(self._val, result, size)
                self._held_out += result.held_out
                self._refused.update(digest.hex() for digest in result.refused)
        if fault := self._val.lacks():
            raise DataError(f"--val-docs {self._job.val_docs}: {fault}")
        self._val.flush()

    def _crew(self, held_out: HeldOut | None) -> Crew:
        return Crew(partial(Worker, self._encoder, held_out), self._job.workers)

    def _training(self, blocks: Iterator[Block]) -> None:
        """Tokenise and write the training split without what is held out."""
        first = next(blocks, None)
        if first is None:
            count = sum(self._val.counts[n] for n in ("documents", "empty_documents", "bad_documents"))
            left = f"leaves nothing for training, the input has {count}"
            raise DataError(f"--val-docs {self._job.val_docs}: {left}")
        tagged = self._tagged(itertools.chain([first], blocks))
        if self.resumed:
            self._skip(tagged)
        else:
            self._save(0, self._input.hexdigest())
        near = NearIndex.of_folder(self._folder.path)
        same = validation_hashes(self._folder.path)
        known = (set(values) for values in zip(*self._held_out, strict=True))
        held_out = HeldOut(*known, same, near, self._job.drop_near)
        with self._crew(held_out) as crew:
            for (number, size, digest), result in crew.map(tagged, attrgetter("size")):
                if self._take(self._train, result, size):
                    self._save(number, digest)
        if not self._train.counts["documents"]:
            raise DataError("nothing to train on: all other documents are empty or also validation documents")
        self._train.flush()

    def _save(self, blocks: int, digest: str) -> None:
        """Note that `blocks` blocks of training are done."""
        written = [writer.tokens for split in (self._val, self._train) for writer in split.writers]
        files = {
            name: {"tokens": tokens, "sha256": self._folder.sha256[name]}
            for shards in written
            for name, tokens in shards.items()
        }
        self._state |= {"val": self._val.state(), "train": self._train.state(), "files": files}
        self._state |= {"blocks": blocks, "input": digest, "bad": self._bad}
        self._state |= {"refused": sorted(self._refused)}
        self._folder.remember(self._state)

    def _skip(self, tagged: Iterator[tuple[tuple[int, int, str], Block]]) -> None:
        """Read past what an earlier run has done. DataError if it was other input."""
        digest = self._state["input"]
        for (_, size, _), _ in itertools.islice(tagged, self._state["blocks"]):
            self._progress.update(0, size)
        if self._input.hexdigest() != digest:
            raise DataError(
                f"{self._folder.path}: holds an unfinished data set of other documents; "
                "choose another --out or pass --overwrite"
            )
        self._train.resume(self._state["train"])
        self._bad = self._state["bad"]
        shards = len(self._state["files"])
        self._progress.say(f"note: {self._folder.path}: goes on after {shards} whole shards")

    def _manifest(self) -> dict:
        val, train = self._val.manifest(), self._train.manifest()
        sha256 = self._folder.sha256
        written = [writer.tokens for split in (self._val, self._train) for writer in split.writers]
        return {
            "format": FORMAT,
            "transform": NO_TRANSFORM if self._tokenizer.plain else TRANSFORM,
            "tokenizer": {
                "file": self._tokenizer.file_name,
                "sha256": sha256[self._tokenizer.file_name],
                "vocab_size": self._tokenizer.processor.get_piece_size(),
                "lossless": val["round_trip_documents"] == val["documents"],
            },
            **({"fused_markers": marker_pairs(self._tokenizer.processor)} if self._tokenizer.fused else {}),
            "encoder": self._encoder.name
            | {"equal_documents": sum(s.counts["sampled_documents"] for s in (self._train, self._val))},
            "val_docs": self._job.val_docs,
            "splits": {"train": train, "val": val},
            "report": {s.name: split_report(s.counts, s.lengths) for s in (self._train, self._val)},
            "bad_documents": self._bad[:EXAMPLES],
            "near_duplicates": self._train.near,
            "files": {
                name: {"tokens": tokens, "sha256": sha256[name]}
                for shards in written
                for name, tokens in shards.items()
            },
            "val_document_sha256": [document.digest.hex()[:16] for document in self._held_out],
        }


def prepare(
    documents: Iterable[Document] | Reader,
    tokenizer: Tokenizer,
    out: Path,
    val_docs: int,
    overwrite: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    **how: int,
) -> dict:
    """Write a data set and return its manifest. Ended early, it leaves what the next run needs to go on.

    Args:
        how: `workers`, `max_bad` and `drop_near` of `Job`.

    Raises:
        DataError: as `Reader`, `tokenise_validation` and `DataFolder`; a broken document more than allowed;
            nothing left for one of the splits.
    """
    blocks = documents if isinstance(documents, Reader) else list(document_blocks(documents))
    with locked(out):
        folder = DataFolder(out, overwrite)
        preparation = Preparation(blocks, tokenizer, folder, Job(val_docs, shard_tokens, **how))
        try:
            return preparation.run()
        except BaseException:
            if not preparation.worth_keeping:
                folder.discard()
            raise


# ---- Command line ------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line without the usage, like every other message of this program."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _place(text: str) -> str:
    """A file or folder, with the user's home for `~` where no shell has put it: `--out=~/x`."""
    return os.path.expanduser(text)


def _folder(text: str) -> Path:
    return Path(_place(text))


def _count_or_none(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--docs",
        metavar="FILE",
        nargs="+",
        type=_place,
        help="documents: JSONL (.xz, .gz, .zst, -) or .parquet",
    )
    add("--out", metavar="DIR", type=_folder, help=f"output folder (with --demo: {DEMO_OUT})")
    add("--val-docs", metavar="N", type=_count, help=f"validation documents (default: {CANONICAL_VAL_DOCS})")
    add("--shard-tokens", metavar="N", type=_count, help=f"tokens of a shard (default: {SHARD_TOKENS})")
    add("--workers", metavar="N", type=_count, help="processes (default: one a core); the result is the same")
    add("--max-bad", metavar="N", type=_count_or_none, help="broken documents to skip at most (default: 0)")
    add("--drop-near-duplicates", action="store_true", help="of validation documents, not only count them")
    add("--plain", action="store_true", help="without CaseOps: text as it is, for CASEOPS_ENABLED=0")
    add("--fuse-markers", action="store_true", help="one token for a space and a capital's operator")
    add("--overwrite", action="store_true", help="replace the data set that --out holds")
    add("--report", action="store_true", help="print a table of what the data is")
    add("--write-manifest", action="store_true", help="with --check: for a right folder that has none")
    add("--shards", metavar="N", type=_count, help="with --download: only the first N training shards")
    add("--vocab", metavar="N", type=_count, help="with --download: pieces of the tokenizer (default: 8192)")
    add(
        "--sp",
        metavar="MODEL",
        type=_place,
        help="use this SentencePiece model; with --check: it is the tokenizer",
    )
    add = parser.add_mutually_exclusive_group().add_argument
    add("--train-tokenizer", metavar="VOCAB", type=_count, help="train one, lossless, on the training split")
    add("--demo", action="store_true", help="small data set from the documentation of Python 3.11")
    add("--download", action="store_true", help="the contest's ready-made data, into data/ (or --out)")
    add("--check", metavar="DIR", type=_folder, help="verify a folder; says what is wrong and how to mend it")
    return parser


MAKING = ("docs", "val_docs", "shard_tokens", "max_bad", "drop_near_duplicates", "fuse_markers", "overwrite")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line with every default filled in; prints one line and exits with 2 if it makes no sense."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for name, mode in {"shards": "download", "vocab": "download", "write_manifest": "check"}.items():
        if getattr(options, name) and not getattr(options, mode):
            parser.error(f"--{name.replace('_', '-')}: only with --{mode}")
    barred = {"demo": ("docs", "sp"), "download": (*MAKING, "sp"), "check": (*MAKING, "out", "plain")}
    barred["train_tokenizer"] = ("sp",)
    mode = next((name for name in barred if getattr(options, name)), "")
    for name in barred.get(mode, ()):
        if getattr(options, name):
            parser.error(f"--{name.replace('_', '-')}: not allowed with --{mode.replace('_', '-')}")
    if options.fuse_markers and options.plain:
        parser.error("--fuse-markers: plain text has no markers; not allowed with --plain")
    if mode in ("", "train_tokenizer"):
        _check_making(parser, options)
    if options.download:
        _check_source(parser, options)
    if options.demo:
        options.out = options.out or (DEMO_PLAIN_OUT if options.plain else DEMO_OUT)
        options.train_tokenizer = DEMO_VOCAB
    options.val_docs = options.val_docs or (DEMO_VAL_DOCS if options.demo else CANONICAL_VAL_DOCS)
    options.shard_tokens = options.shard_tokens or SHARD_TOKENS
    most = 4 * (os.cpu_count() or 1)  # far more than cores, and they only take memory
    if (options.workers or 0) > most:
        parser.error(f"--workers {options.workers}: must be at most {most} on this machine")
    options.workers = options.workers or (1 if options.demo else _cores())
    options.max_bad = options.max_bad or 0
    return options


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_making(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.docs is None or options.out is None:
        parser.error("--docs FILE and --out DIR are required (or --demo, --download, --check DIR)")
    if options.sp is None and options.train_tokenizer is None:
        parser.error("a tokenizer is required: --sp MODEL or --train-tokenizer VOCAB")
    for path, times in Counter(options.docs).items():
        pipe = path == "-" or os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))
        if pipe and options.train_tokenizer is not None:
            parser.error(f"--docs {path}: --train-tokenizer reads the documents twice and needs a file")
        if times > 1:
            parser.error(f"--docs {path}: is named {times} times")
    if (options.train_tokenizer or 0) > MAX_VOCAB:
        limit = f"a shard can hold at most {MAX_VOCAB} pieces"
        parser.error(f"--train-tokenizer {options.train_tokenizer}: {limit}")


def _check_source(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    options.vocab = options.vocab or 8192
    known = [vocab for plain, vocab in SOURCES if plain == options.plain]
    if options.vocab not in known:
        kind = "plain text" if options.plain else "CaseOps text (see --plain)"
        parser.error(f"--vocab {options.vocab}: must be {' or '.join(map(str, known))} for {kind}")


def make_data(options: argparse.Namespace) -> dict:
    """Prepare the data set that the options describe; returns its manifest. Raises DataError."""
    demo, plain = demo_documents() if options.demo else None, options.plain

    def documents() -> Reader | list[Document]:
        return Reader(options.docs) if demo is None else demo

    def trained(required: str) -> bytes:
        source = documents()
        blocks = source if isinstance(source, Reader) else document_blocks(source)
        texts = training_texts(blocks, options.val_docs, options.max_bad)
        return train_tokenizer(texts, options.train_tokenizer, plain, required)

    if options.train_tokenizer is not None:
        model = trained(required="")
        if not has_space(SentencePieceProcessor(model_proto=model)):  # of Chinese text, for example
            model = trained(required=SPACE_PIECE)
        tokenizer = make_tokenizer("tokenizer.model", model, lossless=True, plain=plain)
    else:
        tokenizer = make_tokenizer(options.sp, Path(options.sp).read_bytes(), plain=plain)
    return prepare(
        documents(),
        tokenizer._replace(fused=options.fuse_markers),
        options.out,
        options.val_docs,
        options.overwrite,
        options.shard_tokens,
        workers=options.workers,
        max_bad=options.max_bad,
        drop_near=options.drop_near_duplicates,
    )


def training_texts(blocks: Iterable[Block], val_docs: int, max_bad: int) -> Iterator[str]:
    """What a tokenizer may learn from; DataError at once for a document that preparation would refuse."""
    stream, held_out, bad, place = iter(blocks), set(), 0, 0

    def training() -> Iterator[Document]:
        nonlocal bad, place
        for block in stream:
            for part in block.split(max(val_docs - place, 0)):
                parsed = parse_block(part)
                bad += len(parsed.bad)
                if bad > max_bad:
                    raise DataError(parsed.bad[-1])
                place += part.documents
                if place <= val_docs:
                    held_out.update(document.key for document in parsed.documents)
                else:
                    yield from parsed.documents

    learnt, left_out = yield from tokenizer_texts(training(), held_out, TOKENIZER_TRAINING_BYTES)
    if left_out:
        limit = f"the tokenizer learns from {TOKENIZER_TRAINING_BYTES} bytes at most, here {learnt} documents"
        print(f"note: {limit}; {left_out.origin} and all that follows is left out")
    if place <= val_docs:
        raise DataError(f"--val-docs {val_docs}: leaves nothing for training, the input has {place}")


def run(options: argparse.Namespace) -> int:
    """Do what the options say; returns the exit code. Raises DataError."""
    if options.check:
        tokenizer = Path(options.sp) if options.sp else None
        problems, manifest = check_folder(options.check, options.write_manifest, tokenizer, options.workers)
        for problem in problems:
            print(f"problem: {problem}")
        if options.report:
            print(report_table(manifest))
        print(f"checked {options.check} problems:{len(problems)}")
        return 2 if problems else 0
    if options.download:
        source = SOURCES[options.plain, options.vocab]
        folder, manifest = download(source, options.out, options.shards, options.workers)
    else:
        if not options.demo and options.val_docs != CANONICAL_VAL_DOCS:
            print(f"note: --val-docs {options.val_docs} is not the canonical split ({CANONICAL_VAL_DOCS})")
        folder, manifest = options.out, make_data(options)
    if options.report:
        print(report_table(manifest))
    counts = [f"{split}_{key}:{n}" for split, entry in manifest["splits"].items() for key, n in entry.items()]
    done = "downloaded" if options.download else "prepared"
    print(f"{done} {folder} files:{len(manifest['files'])} {' '.join(counts)}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry: 0; 2 after one line on stderr when the input cannot be used; 130 after Ctrl-C."""
    options = parse_arguments(arguments)
    code, reason, busy = 2, "", False
    try:
        return run(options)
    except DataError as error:
        busy = isinstance(error, BusyError)
        reason = str(error)
    except OSError as error:
        reason = f"{error.filename or options.out}: {error.strerror or error}"
    except KeyboardInterrupt:
        code, reason = 130, "interrupted"
    unfinished = options.out and not busy and (options.out / UNFINISHED).is_file()
    if unfinished and "--overwrite" not in reason:
        reason += f"; the whole shards in {options.out} are kept, the same command goes on after them"
    print(f"prepare_caseops_data.py: error: {reason}", file=sys.stderr)
    return code


if __name__ == "__main__":
    keep_consoles()
    atexit.register(gc.freeze)  # else Python looks for garbage in all that was read: 40 ms
    sys.exit(main())
