"""Data of a study: for each seed a stream of training documents of its own, and what it is scored on.

Screening scores held-out training documents, confirmation the validation documents. Seeds of screening and
of confirmation have different streams, so that nothing is confirmed on what it was chosen by. The first
documents of the file are its validation split; the next are held out for screening; then come the streams.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dataprep.encoding import Tokenizer, make_tokenizer, tokenizer_texts, train_tokenizer
from dataprep.reading import Document, Reader, parse_block
from dataprep.shards import MANIFEST, DataError
from prepare_caseops_data import prepare
from studying.arms import KINDS, folder_of

TOKENIZER_BYTES = 50_000_000  # of text that a tokenizer is trained on where none is given


class Streams(NamedTuple):
    """How the documents of a file are shared out."""

    split: int  # the first so many documents are the file's validation split
    scored: int  # of them are scored by confirmation, and as many held-out training documents by screening
    documents: int  # of each stream
    seeds: int  # streams of each kind

    @property
    def needed(self) -> int:
        """Documents of the file that are looked at."""
        return self.split + self.scored + len(KINDS) * self.seeds * self.documents

    def of(self, kind: str, number: int) -> tuple[slice, slice]:
        """What seed `number` (from 1) of a kind is scored on, and its training documents."""
        first = 0 if kind == "confirm" else self.split
        place = KINDS.index(kind) * self.seeds + number - 1
        start = self.split + self.scored + place * self.documents
        return slice(first, first + self.scored), slice(start, start + self.documents)


def read_documents(files: Sequence[str], many: int) -> list[Document]:
    """The first documents of the files. Raises DataError where there are fewer."""
    blocks = (parse_block(block)[0] for block in Reader(list(files)))
    found = list(itertools.islice(itertools.chain.from_iterable(blocks), many))
    if len(found) < many:
        raise DataError(f"--docs {' '.join(files)}: {len(found)} documents, this study needs {many}")
    return found


def tokenizer_of(model: str, documents: Sequence[Document], streams: Streams, vocab: int) -> Tokenizer:
    """The tokenizer of a file or, without one, one that is trained on the streams of screening."""
    if model:
        try:
            return make_tokenizer(model, Path(model).read_bytes())
        except OSError as error:
            raise DataError(f"--sp {model}: cannot be read ({error.strerror})") from None
    first, last = (streams.of("screen", number)[1] for number in (1, streams.seeds))
    texts = tokenizer_texts(iter(documents[first.start : last.stop]), set(), TOKENIZER_BYTES)
    return make_tokenizer("tokenizer.model", train_tokenizer(texts, vocab), lossless=True)


def prepare_streams(
    root: Path, documents: Sequence[Document], tokenizer: Tokenizer, streams: Streams, **how: int
) -> Mapping[str, int]:
    """Write the data sets that are missing; returns how many there are of each kind. Raises DataError."""
    for kind, number in itertools.product(KINDS, range(1, streams.seeds + 1)):
        folder = folder_of(root, kind, number, "fused" if tokenizer.fused else "")
        if (folder / MANIFEST).is_file():
            continue
        scored, trained = streams.of(kind, number)
        prepare(documents[scored] + documents[trained], tokenizer, folder, streams.scored, **how)
    return dict.fromkeys(KINDS, streams.seeds)
