"""For `bench/data_prep.py`: the encoder beside SentencePiece alone, data preparation beside what it was."""

import argparse
import json
import os
import random
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

import lossless_caps
from dataprep.encoding import Encoder, make_tokenizer, train_tokenizer
from dataprep.shards import BOS_ID

ROOT = Path(__file__).resolve().parents[1]
BEFORE = "45873f6"  # the last commit whose encoder looked up one word at a time
VAL_SHARE = 32  # one document in so many is validation
BATCH = 4096  # texts
TRAINED_ON, TRAINED_VOCAB = 500, 2048  # documents and pieces of the tokenizer that is trained here
CAPS = lossless_caps.TITLE, lossless_caps.ALLCAPS, lossless_caps.CAPNEXT, lossless_caps.ESC

ALPHABETS = (
    string.ascii_letters,
    "aAbBzZ" + "".join(CAPS),
    string.printable + "".join(CAPS),
    "aZ " + "".join(map(chr, range(0x300, 0x330))) + "\u00e9\u00c9\u0130\u0131\ufb01\u212a\ufeff\u200b\0",
)


def random_text(generator: random.Random) -> str:
    """Case mixes, operators, combining marks, or any characters but surrogates."""
    length = generator.randrange(40)
    kind = generator.randrange(len(ALPHABETS) + 1)
    if kind < len(ALPHABETS):
        return "".join(generator.choices(ALPHABETS[kind], k=length))
    places = (generator.randrange(0x10F800) for _ in range(length))
    return "".join(chr(place + 0x800 * (place >= 0xD800)) for place in places)


TOKEN_PARTS = (
    *(
        "the",
        " the",
        "The",
        "NASA",
        "iPhone",
        "don't",
        "12",
        "3.14",
        " ",
        "  ",
        "   ",
        "\n",
        "\t",
        "\r\n",
        "\x0b",
        "\0",
    ),
    *(
        *CAPS,
        "\u2581",
        " \u2581",
        "\u2019s",
        "\u201c",
        "\u201d ",
        "\u2014",
        "\u2026",
        "\u00a0",
        "\u3000",
        "\u200b",
        "\ufeff",
    ),
    *(
        "\u0301",
        "e\u0301",
        "A\u030a",
        "\u00b4",
        "\ufb01",
        "\uff21",
        "\u2460",
        "\u1100\u1161",
        "\u00e9",
        "\u4e16\u754c",
        "\u03c3",
    ),
    *("<s>", "</s>", "<0x41>", "<unk>", "~", "}", "https://a.b/c?d=e", "_" * 9, "\U0001f600", "x" * 30),
)


def tokens_text(generator: random.Random) -> str:
    """What tokenizers get wrong: operators, lone U+2581, white space, what NFKC changes, any character."""
    parts = generator.choices(TOKEN_PARTS, k=generator.randrange(14))
    if generator.random() < 0.5:
        parts.insert(generator.randrange(len(parts) + 1), random_text(generator))
    return (" " if generator.random() < 0.3 else "").join(parts)


def unequal(encoders: Sequence[Encoder], texts: list[bytes]) -> int:
    """How many texts have other tokens, or other bytes of them, than by SentencePiece alone, in any model."""
    wrong = np.zeros(len(texts), bool)
    for encoder in encoders:
        found = zip(_alone(encoder, texts), encoder.documents(texts), encoder.counted(texts), strict=True)
        for number, (alone, tokens, counted) in enumerate(found):
            pairs = zip((tokens, *counted), (alone[0], *alone), strict=False)
            wrong[number] |= not all(np.array_equal(own, other) for own, other in pairs)
    return int(wrong.sum())


def _alone(encoder: Encoder, texts: list[bytes]) -> Iterator[list[np.ndarray]]:
    """Of each text its tokens and, of CaseOps text, the bytes of each, by SentencePiece and numpy alone.

    Plain text is counted by tables of the pieces: its counts are equal where its tokens are.
    """
    plain, processor = encoder.tokenizer.plain, encoder.tokenizer.processor
    encoded = texts if plain else lossless_caps.encode_many(texts)
    for text, mapping in zip(encoded, processor.encode(encoded, out_type="offset_mapping"), strict=True):
        alone = [np.array([BOS_ID, *mapping["ids"]])]
        if not plain:
            spans = np.array(mapping["offsets"], np.int64).reshape(-1, 2)
            alone.append(np.append(0, lossless_caps.span_byte_counts(text, spans)))
        yield alone


def equality(texts: list[bytes], options: argparse.Namespace) -> dict:
    """Documents and generated texts that three encoders, each, give SentencePiece's tokens and bytes."""
    strings = [text.decode() for text in texts[:TRAINED_ON]]
    trained = make_tokenizer("trained", train_tokenizer(strings, TRAINED_VOCAB))
    models = [Path(options.sp), Path(options.plain_sp)]
    published = [make_tokenizer(str(m), m.read_bytes(), plain=bool(n)) for n, m in enumerate(models)]
    encoders = [Encoder(tokenizer) for tokenizer in (*published, trained)]
    documents = sum(unequal(encoders, texts[at : at + BATCH]) for at in range(0, len(texts), BATCH))
    generated = sum(unequal(encoders, batch) for batch in _generated(options.strings))
    return {
        "models": len(encoders),
        "equal_documents": len(texts) - documents,
        "equal_strings": options.strings - generated,
        "unequal": documents + generated,
    }


def _generated(count: int) -> Iterator[list[bytes]]:
    generator = random.Random(0)
    for start in range(0, count, BATCH):
        yield [tokens_text(generator).encode() for _ in range(min(BATCH, count - start))]


def compare(lines: list[bytes], options: argparse.Namespace) -> dict:
    """The whole command, from a JSONL file to a data set, of this tree and of BEFORE, on both models.

    In the order before, now, now with two workers, and back again.
    """
    table = {}
    with tempfile.TemporaryDirectory() as place:
        docs, before = Path(place) / "docs.jsonl", Path(place) / "before"
        docs.write_bytes(b"".join(lines))
        before.mkdir()
        tree = subprocess.run(["git", "archive", BEFORE], cwd=ROOT, capture_output=True, check=True).stdout
        subprocess.run(["tar", "-x"], cwd=before, input=tree, check=True)
        for name, model, flags in (("pipeline", options.sp, []), ("plain", options.plain_sp, ["--plain"])):
            flags = [*flags, "--sp", str(Path(model).resolve()), "--docs", str(docs)]
            flags += ["--val-docs", str(max(len(lines) // VAL_SHARE, 1))]
            order = [(before, 1), (ROOT, 1), (ROOT, 2)]
            table |= _told(name, [(root, n, _run(root, n, flags, place)) for root, n in order + order[::-1]])
    return table


# Runs a script and prints the peak of its own memory: what `wait4` tells of a child counts its parent's too.
_RUN = """
import atexit, runpy, sys
peak = lambda: next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
atexit.register(lambda: print(peak()))
del sys.argv[0]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def _run(root: Path, workers: int, flags: list[str], place: str) -> tuple[float, float, float, dict]:
    """One run: seconds that pass, processor seconds, peak MB of the first process, the files that it made."""
    with tempfile.TemporaryDirectory(dir=place) as out, tempfile.TemporaryFile("w+") as said:
        script = root / "prepare_caseops_data.py"
        command = [sys.executable, "-c", _RUN, script, "--out", out, "--workers", str(workers), *flags]
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=root, stdout=said, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{script} ended with {process.returncode}")
        said.seek(0)
        peak = int(said.read().split()[-1]) / 1024
        files = json.loads((Path(out) / "manifest.json").read_text())["files"]
    return seconds, used.ru_utime + used.ru_stime, peak, files


def _told(name: str, runs: list[tuple[Path, int, tuple]]) -> dict:
    """The ratios of runs in turns."""
    sums = {key: [0.0, 0.0, 0.0] for key in ("before", "one", "two")}
    for root, workers, (seconds, cpu, peak, _) in runs:
        own = sums["before" if root != ROOT else "one" if workers == 1 else "two"]
        own[0], own[1], own[2] = own[0] + seconds, own[1] + cpu, max(own[2], peak)
    before, one, two = sums.values()
    return {
        f"{name}_seconds": [round(run[2][0], 2) for run in runs],
        f"{name}_cpu_seconds": [round(run[2][1], 2) for run in runs],
        f"{name}_over_before": round(before[0] / one[0], 2),
        f"{name}_cpu_over_before": round(before[1] / one[1], 2),
        f"{name}_peak_mb": [round(before[2]), round(one[2])],
        f"{name}_same_files": all(run[2][3] == runs[0][2][3] for run in runs),
        "two_workers_over_one" if name == "pipeline" else f"{name}_two_workers_over_one": round(
            one[0] / two[0], 2
        ),
    }
