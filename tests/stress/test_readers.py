"""Random documents in files of every kind: they come back whole, in order, and from where they stood."""

import gzip
import json
import lzma
import random

import pytest
import zstandard

from dataprep import reading

TEXTS = (
    "a",
    "\u00e9",
    "\u4e16",
    "\U0001f600",
    "\n",
    "\r\n",
    "\u2028",
    "\0",
    '"',
    "\\",
    " ",
    "\ufeff",
    "NASA ",
)


def draw_text(rng: random.Random) -> str:
    """A document, now and then an empty or a long one."""
    return "".join(rng.choices(TEXTS, k=rng.choice((0, 1, 5, 40, 300)))) * rng.choice((1,) * 30 + (200,))


def json_line(text: str, rng: random.Random) -> bytes:
    """One of the forms of a line: string or record, escaped or not, with a mark or a blank before it."""
    value = rng.choice((text, {"text": text}, {"id": [1, {"text": 2}], "text": text}))
    line = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode()
    mark = b"\xef\xbb\xbf" if rng.random() < 0.05 else b""
    blank = rng.choice((b"\n", b" \t\n", b"\r\n")) if rng.random() < 0.1 else b""
    return blank + mark + line + rng.choice((b"\n", b"\r\n"))


def members(data: bytes, rng: random.Random) -> list[bytes]:
    """The data in one or several parts, cut anywhere; some may be empty."""
    cuts = sorted(rng.randint(0, len(data)) for _ in range(rng.choice((0, 0, 1, 3))))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def zst_frame(data: bytes, rng: random.Random) -> bytes:
    """A frame with or without its size and a checksum."""
    options = {"write_content_size": rng.random() < 0.5, "write_checksum": rng.random() < 0.5}
    return zstandard.ZstdCompressor(level=rng.choice((1, 3)), **options).compress(data)


PACKERS = {
    ".jsonl": lambda data, rng: data,
    ".txt": lambda data, rng: data,
    ".gz": lambda data, rng: gzip.compress(data, rng.choice((0, 1, 6))),
    ".xz": lambda data, rng: lzma.compress(
        data, preset=0, check=rng.choice((lzma.CHECK_CRC32, lzma.CHECK_NONE))
    ),
    ".zst": zst_frame,
}  # .xz streams follow each other here without padding between them


def write_parquet(path: object, texts: list[str], rng: random.Random) -> None:
    """A table with the column `text` among others."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": range(len(texts)), "text": pyarrow.array(texts, pyarrow.string())})
    options = {"compression": rng.choice(("none", "snappy", "zstd")), "use_dictionary": rng.random() < 0.5}
    parquet.write_table(table, path, row_group_size=rng.choice((1, 7, 1000)), **options)


@pytest.mark.cases(1200)
def test_documents_come_back(monkeypatch, rng, tmp_path):
    """From several files of any kinds, in members, whatever the size of a block; borders lose nothing."""
    monkeypatch.setattr(reading, "BLOCK_BYTES", rng.choice((1, 100, 4000, 1 << 20)))
    texts, paths = [], []
    for number in range(rng.randint(1, 3)):
        suffix, part = (
            rng.choice((*PACKERS, ".parquet")),
            [draw_text(rng) for _ in range(rng.choice((1, 2, 9, 60)))],
        )
        path = tmp_path / f"{number}{suffix}"
        if suffix == ".parquet":
            write_parquet(path, part, rng)
        else:
            data = b"".join(json_line(text, rng) for text in part)
            data = data[:-1] if rng.random() < 0.3 else data
            path.write_bytes(b"".join(PACKERS[suffix](member, rng) for member in members(data, rng)))
        texts, paths = texts + part, [*paths, str(path)]
    print(reading.BLOCK_BYTES, paths, len(texts))
    blocks = list(reading.Reader(paths))
    parsed = [reading.parse_block(block) for block in blocks]
    documents = [document for part in parsed for document in part.documents]
    assert [part.bad for part in parsed if part.bad] == []
    assert [document.text for document in documents] == texts
    assert sum(block.documents for block in blocks) == len(texts)
    assert all(document.origin.startswith(tuple(paths)) for document in documents)


@pytest.mark.cases(600)
def test_files_that_are_cut_off_are_refused(rng, tmp_path):
    """A compressed file without its end is never taken for a shorter one."""
    suffix = rng.choice((".gz", ".xz", ".zst", ".parquet"))
    texts, path = [draw_text(rng) for _ in range(rng.choice((1, 9, 60)))], tmp_path / f"cut{suffix}"
    if suffix == ".parquet":
        write_parquet(path, texts, rng)
    else:
        path.write_bytes(PACKERS[suffix](b"".join(json_line(text, rng) for text in texts), rng))
    size = rng.randrange(1, path.stat().st_size)
    print(path, size)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(reading.DataError, match="cannot be read"):
        list(reading.Reader([str(path)]))
