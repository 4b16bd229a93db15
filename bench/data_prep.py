"""Speed of data preparation, in MB of original text (UTF-8) per second, all in one run on the same documents.

    python bench/data_prep.py --docs FILE [--megabytes 60] [--strings 1000] [--json]
    python bench/data_prep.py --docs FILE --pipeline    # instead: the whole command alone, beside what it was
    python bench/data_prep.py --docs FILE --round-trips 1000000   # instead: decode(encode(s)) == s
    python bench/data_prep.py --check-shards 24    # instead: what --check does, in one process and all

CaseOps and the encoders are timed by the CPU time of one process, the best of --repeats. The whole command,
from plain JSONL to shards, is laid beside that of an earlier commit (`bench/encoder.py`): `*_over_before` by
wall clock, `*_cpu_over_before` by the processor time of all processes, which other work changes less. All
documents and --strings generated texts go through SentencePiece alone too: `equal_*` have the same tokens.
"""

import argparse
import functools
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lossless_caps
import prepare_caseops_data as prepare
from bench.encoder import CAPS, compare, equality, random_text
from dataprep.checking import scan_shards
from dataprep.encoding import Encoder, make_tokenizer
from dataprep.reading import Reader, parse_block
from dataprep.shards import BOS_ID, shard_bytes

TOKENIZER = "../shared/tokenizer/fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
PLAIN_TOKENIZER = "../shared/tokenizer/fineweb_8192_bpe.model"
DOCUMENT_TOKENS = 500  # of invented documents


def encode_by_character(text: str) -> str:
    """CaseOps by the letter of its definition, one step of Python a character: what to compare with."""
    title, all_caps, next_cap, escape = CAPS
    out, word = [], []

    def close() -> None:
        letters = "".join(word)
        if letters.islower():
            out.append(letters)
        elif len(letters) > 1 and letters.isupper():
            out.append(all_caps + letters.lower())
        else:
            for place, letter in enumerate(letters):
                if letter.isupper():
                    out.append(next_cap if place else title)
                out.append(letter.lower())
        word.clear()

    for character in text:
        if "a" <= character <= "z" or "A" <= character <= "Z":
            word.append(character)
            continue
        if word:
            close()
        if character in CAPS:
            out.append(escape)
        out.append(character)
    if word:
        close()
    return "".join(out)


def cpu_seconds(work: Callable[[], object]) -> float:
    """Processor time of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def wall_and_cpu(work: Callable[[], object]) -> tuple[float, float]:
    """Time that passes, and processor time of this process and its children."""

    def used() -> float:
        usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    start, before = time.perf_counter(), used()
    work()
    return time.perf_counter() - start, used() - before


def rate(megabytes: float, seconds: Sequence[float]) -> float:
    """MB per second, the best."""
    return round(megabytes / min(seconds), 2)


def read(path: str, megabytes: float) -> tuple[list[bytes], list[bytes]]:
    """Lines, and the texts in them as UTF-8, until there are so many megabytes."""
    lines, texts, size = [], [], 0
    for block in Reader([path]):
        lines += block.lines
        texts += [document.utf8 for document in parse_block(block).documents]
        size = sum(map(len, texts))
        if size >= megabytes * 1e6:
            break
    return lines, texts


def measure(options: argparse.Namespace) -> dict:
    """The table."""
    lines, texts = read(options.docs, options.megabytes)
    total = sum(map(len, texts)) / 1e6
    some = texts[: len(texts) // 8]
    part = sum(map(len, some)) / 1e6
    strings = [text.decode() for text in some]
    model = Path(options.sp).read_bytes()
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    encoder = Encoder(make_tokenizer(options.sp, model))
    blocks = [texts[place : place + 256] for place in range(0, len(texts), 256)]
    slow, fast, plain, words = [], [], [], []
    encoded = [lossless_caps.encode_utf8(text) for text in some]
    for _ in range(options.repeats):
        slow.append(cpu_seconds(lambda: [encode_by_character(text) for text in strings]))
        fast.append(cpu_seconds(lambda: [lossless_caps.encode_many(block) for block in blocks]))
        plain.append(cpu_seconds(lambda: processor.encode(encoded, out_type="numpy", num_threads=1)))
        words.append(cpu_seconds(lambda: [encoder.documents(block) for block in blocks]))
    assert [encode_by_character(text) for text in strings] == [text.decode() for text in encoded]
    table = {
        "megabytes": round(total, 1),
        "caseops_mb_s": rate(total, fast),
        "per_character_mb_s": rate(part, slow),
        "sentencepiece_mb_s": rate(part, plain),
        "encoder_mb_s": rate(total, words),
    }
    table["caseops_speedup"] = round(table["caseops_mb_s"] / table["per_character_mb_s"], 1)
    return table | compare(lines, options) | equality(texts, options)


def round_trips(count: int, seed: int = 0) -> int:
    """Encode and decode so many random texts, in batches and one by one; returns how many fail."""
    generator, wrong, batch = random.Random(seed), 0, 1000
    for start in range(0, count, batch):
        texts = [random_text(generator) for _ in range(min(batch, count - start))]
        many = lossless_caps.encode_many([text.encode() for text in texts])
        for text, encoded in zip(texts, many, strict=True):
            same = lossless_caps.decode(encoded.decode()) == text
            wrong += not (same and encoded.decode() == encode_by_character(text))
        wrong += lossless_caps.encode(texts[0]).encode() != many[0]
    return wrong


def document_round_trips(path: str) -> tuple[int, int]:
    """Every document of a file through encode and decode: how many, and how many fail."""
    seen = wrong = 0
    for block in Reader([path]):
        documents = parse_block(block).documents
        many = lossless_caps.encode_many([document.utf8 for document in documents])
        seen += len(documents)
        for document, encoded in zip(documents, many, strict=True):
            wrong += lossless_caps.decode(encoded.decode()).encode() != document.utf8
    return seen, wrong


def check_shards(count: int) -> dict:
    """Scan invented shards by one process and by one a core, A B B A: seconds, and their ratio."""
    drawn, cores = np.random.default_rng(0), os.cpu_count()
    seconds: dict[int, list[float]] = {1: [], cores: []}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"fineweb_train_{number:06d}.bin" for number in range(count)]
        for path in paths:
            tokens = drawn.integers(300, 8192, prepare.SHARD_TOKENS).astype(np.uint16)
            tokens[::DOCUMENT_TOKENS] = BOS_ID
            path.write_bytes(shard_bytes(tokens))
        for workers in (1, cores, cores, 1):
            seconds[workers].append(wall_and_cpu(functools.partial(scan_shards, paths, workers))[0])
    told = {f"seconds_by_{workers}": [round(s, 2) for s in times] for workers, times in seconds.items()}
    ratio = sum(seconds[cores]) / sum(seconds[1])
    return {"shards": count, "tokens": count * prepare.SHARD_TOKENS, **told, "ratio": round(ratio, 3)}


def main() -> int:
    """Print the table, or the result of the round trips; 1 if one of them fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", metavar="FILE", help="documents")
    parser.add_argument("--sp", default=TOKENIZER, metavar="MODEL", help="CaseOps tokenizer")
    parser.add_argument("--plain-sp", default=PLAIN_TOKENIZER, metavar="MODEL", help="plain tokenizer")
    parser.add_argument("--megabytes", type=float, default=float("inf"), help="of the file (default: all)")
    parser.add_argument("--strings", type=int, default=1_000_000, metavar="N", help="generated texts")
    parser.add_argument("--repeats", type=int, default=3, help="of which the best counts (default: 3)")
    parser.add_argument("--pipeline", action="store_true", help="only the whole command, of now and before")
    parser.add_argument("--round-trips", type=int, metavar="N", help="check N random texts and all documents")
    parser.add_argument(
        "--check-shards", type=int, metavar="N", help="check N invented shards, of 10 M tokens"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args()
    if not (options.docs or options.check_shards):
        parser.error("--docs: needed, but for --check-shards N")
    if options.check_shards:
        table = check_shards(options.check_shards)
    elif options.round_trips is not None:
        wrong = round_trips(options.round_trips)
        documents, lost = document_round_trips(options.docs)
        table = {"round_trips": options.round_trips, "wrong": wrong}
        table |= {"documents": documents, "documents_wrong": lost}
    elif options.pipeline:
        table = compare(read(options.docs, options.megabytes)[0], options)
    else:
        table = measure(options)
    if options.json:
        print(json.dumps(table))
    else:
        print("\n".join(f"{name:34} {value}" for name, value in table.items()))
    return int(any(table.get(key) for key in ("wrong", "documents_wrong", "unequal")))


if __name__ == "__main__":
    sys.exit(main())
