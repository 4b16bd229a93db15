"""What is an idea worth? Arms (settings) against a control, in pairs of the same weights and batches.

    python tools/study.py --docs FILE --prepare                    # data of the seeds, once: data/study/
    PREQUANT_ONLY=1 python tools/study.py --arms noise,training --seeds 4   # screening, SCALE=study
    python tools/study.py --arms storing,adapting --bytes 965000   # with quantiser and adaptation
    python tools/study.py --arm "slow:MATRIX_LR=0.01" --seeds 5-8  # any settings; four other seeds
    python tools/study.py --arms "fused markers" --confirm --seeds 8
    python tools/study.py --show [logs/study/NAME.json ...]        # the tables of what was run before

What is set in the environment holds for all arms (SCALE=study unless something else is). A seed has its own
weights and its own stream of training documents, the same in all arms. Screening scores held-out documents of
the training split, confirmation the validation split, with other seeds and streams.

    --arms NAMES      noise (null arm, other batches), training, storing, adapting, parts (the record without
                      each), whole (PRESET=best, SCALE=study), or single arms
    --seeds N | A-B   of this kind (default 2)         --confirm       validation documents, their own seeds
    --jobs N          runs at once (default 1)         --seconds S     begin no run after S seconds
    --bytes N         FIT_BYTES=N in all arms, so that quantised scores are compared at equal bytes
    --equal-seconds   arms that train slower or faster get as many steps as take the control's seconds
    --study NAME      (default: study)                 --out DIR       (default: runs/study)
    --data DIR        (default: data/study)            --json FILE     (default: OUT/NAME-KIND.json)
    --keep FILE ...   copy a study's JSON to logs/study/, write its table into docs/study.md and README.md
    --docs FILE ...   documents, JSONL; --sp MODEL their tokenizer (default: trains one of VOCAB_SIZE pieces)
    --split N         the first N documents are validation (default 1800), of which --scored (320) are scored
    --stream N        documents of each stream (default 1250); --streams of each kind (default 8)
    --fused           prepare the data with fused markers too

Finished runs are kept, so the same command goes on after Ctrl-C or kill -9. Several processes may work on
one study: a run belongs to whoever locks its folder. At the end: a table, a JSON file, and forest.png.

Exit code 0, 1 (a run failed), 2 (a mistake in the command, one line), 128 + signal (stopped).
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from command import ROOT, Mistake, Parser, complain, start

# What follows may not be installed: `command` says so.
# isort: split
import runs
import train_gpt as tg
from dataprep.shards import DataError, write_whole
from harness.settings import read_settings
from marked import MarkError, write_part
from reproducing.seeds import SeedError
from studying.arms import KEPT, OURS, chosen_arms
from studying.cells import NOISE_NAMES, Cell, Place, cells_of, processor_clock, run_all, same_seconds
from studying.page import EQUAL_SECONDS, forest, rows, summary, table
from sweeping.running import Stop

SHOWN, PAGE = ROOT / "logs" / "study", ROOT / "docs" / "study.md"
MOST_SEEDS = 1000
# A run gives its memory back to the kernel at each step and asks for it again, a third of its processor time.
MEMORY = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(1 << 32))
IDEAS = "<!-- ideas: written by tools/study.py --keep -->\n", "<!-- end of ideas -->"
SCORED_ON = {
    "screen": "held-out documents of the training split (screening: no validation document was read)",
    "confirm": "validation documents (confirmation: seeds and streams by which nothing was chosen)",
}


def parse_arguments(arguments: Sequence[str], environ: Mapping[str, str]) -> argparse.Namespace:
    """Command line, checked. Raises Mistake."""
    parser = Parser(__doc__)
    add = parser.add_argument
    other = parser.add_mutually_exclusive_group().add_argument
    other("--show", nargs="*", type=Path, metavar="FILE")
    other("--keep", nargs="+", type=Path, default=[], metavar="FILE")
    other("--prepare", action="store_true")
    add("--arms", default="")
    add("--arm", action="append", default=[], metavar="NAME:SETTING=VALUE")
    add("--seeds", default="2")
    add("--confirm", action="store_true")
    add("--jobs", type=int, default=1)
    add("--seconds", type=float, default=float("inf"))
    add("--bytes", type=int, default=0)
    add("--equal-seconds", action="store_true")
    add("--study", default="study")
    add("--out", type=Path, default=Path("runs/study"))
    add("--data", type=Path, default=Path("data/study"))
    add("--json", type=Path)
    add("--docs", nargs="+", default=[])
    add("--sp", default="")
    add("--fused", action="store_true")
    for name, default in (("--split", 1800), ("--scored", 320), ("--stream", 1250), ("--streams", 8)):
        add(name, type=int, default=default)
    options = parser.parse_args(arguments)
    for name in ("jobs", "split", "scored", "stream", "streams"):
        if (value := getattr(options, name)) < 1:
            raise Mistake(f"--{name} {value}: must be at least 1")
    if options.scored > options.split:
        raise Mistake(f"--scored {options.scored}: must be at most --split {options.split}")
    if not re.fullmatch(r"\w[\w.+-]*", options.study):
        raise Mistake(f"--study {options.study!r}: must be a name of letters, digits and . _ + -")
    if taken := [name for name in OURS if name in environ]:
        raise Mistake(f"{taken[0]} is set: every run of a study has its own; unset it")
    options.kind = "confirm" if options.confirm else "screen"
    options.numbers = _numbers(options.seeds)
    return options


def _numbers(text: str) -> list[int]:
    """`4` as 1, 2, 3, 4; `5-8` as 5, 6, 7, 8. Raises Mistake."""
    parts = re.fullmatch(r"(?:(\d+)-)?(\d+)", text)
    first, last = (int(parts[1] or 1), int(parts[2])) if parts else (0, 0)
    if not 1 <= first <= last <= MOST_SEEDS:
        what = "a number of seeds, or the first and the last, as 5-8"
        raise Mistake(f"--seeds {text}: must be {what}, at most {MOST_SEEDS}")
    return list(range(first, last + 1))


def prepare(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Make the data sets that are missing. Raises Mistake and DataError."""
    if not options.docs:
        raise Mistake("--prepare: needs --docs FILE, the documents")
    # What it takes to prepare data, a machine that only runs a study may lack.
    from studying.data import Streams, prepare_streams, read_documents, tokenizer_of

    streams = Streams(options.split, options.scored, options.stream, options.streams)
    documents = read_documents(options.docs, streams.needed)
    vocab = read_settings({"SCALE": "study", **environ, "DATA_PATH": str(options.data)}).vocab_size
    tokenizer = tokenizer_of(options.sp, documents, streams, vocab)
    for fused in (False, True)[: 1 + options.fused]:
        prepare_streams(options.data, documents, tokenizer._replace(fused=fused), streams)
    print(f"prepared {options.data}: {options.streams} seeds to screen, {options.streams} to confirm")
    return 0


def study_of(options: argparse.Namespace, place: Place, cells: Sequence[Cell]) -> dict:
    """What is known so far, as JSON."""
    done = [cell for cell in cells if cell.record is not None]
    arms = {}
    for cell in cells:
        about = {"name": cell.arm.name, "source": cell.arm.source, "settings": dict(cell.arm.settings)}
        arms.setdefault(cell.arm.name, about | {"data": cell.arm.data, "runs": {}})
    for cell in done:
        arms[cell.arm.name]["runs"][str(cell.number)] = cell.summary()
    settings, machine = cells[0].settings, done[0].record.environment if done else {}
    gpu = bool(done) and not processor_clock(done[0].record)
    return {
        "study": f"{options.study}-{options.kind}",
        "scored_on": SCORED_ON[options.kind],
        "seconds_are": "seconds of the clock (GPU)" if gpu else "seconds of the processor",
        "steps": settings["ITERATIONS"],
        "batch_tokens": settings["TRAIN_BATCH_TOKENS"],
        "given": runs.given(place.environ, settings),
        "script_sha256": place.script,
        "machine": {name: machine.get(name) for name in ("device", "python", "torch", "commit")},
        "arms": list(arms.values()),
    }


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Run a study. Returns the exit code. Raises Mistake, SeedError and ReadError."""
    try:
        arms = chosen_arms(options.arms, options.arm)
    except ValueError as error:
        raise Mistake(str(error)) from None
    common = {"SCALE": "study", "VAL_LOSS_EVERY": "0", "AUDIT": "0", **MEMORY, **environ}
    common |= {"FIT_BYTES": str(options.bytes)} if options.bytes else {}
    folder = options.out / options.study / options.kind
    place = Place(folder, options.data, options.kind, options.numbers, common)
    cells, until = cells_of(place, arms), time.monotonic() + options.seconds
    target = options.json or options.out / f"{options.study}-{options.kind}.json"
    target.parent.mkdir(parents=True, exist_ok=True)  # what cannot be written to is said before the runs
    with Stop().listening():
        run_all(cells, options.jobs, until)
        result = study_of(options, place, cells)
        ratios = {row.name: row.seconds.mean for row in rows(result) if row.seconds}
        ratios = {name: ratio for name, ratio in ratios.items() if abs(ratio - 1) > EQUAL_SECONDS}
        ratios = {name: ratio for name, ratio in ratios.items() if name not in NOISE_NAMES}
        if options.equal_seconds and ratios and all(cell.settled for cell in cells):
            cells += cells_of(place, [arms[0], *same_seconds(cells, ratios)])
            run_all(cells, options.jobs, until)
            result = study_of(options, place, cells)
    write_whole(target, (json.dumps(result, indent=1) + "\n").encode())
    if any(arm["runs"] for arm in result["arms"][1:]):
        show(result, target)
    failed = [cell for cell in cells if cell.failure]
    for cell in failed:
        print(f"study.py: {cell.arm.name}, seed {cell.number}: {cell.failure}", file=sys.stderr)
    missing = sum(not cell.settled for cell in cells)
    if missing:
        print(f"{missing} of {len(cells)} runs are missing; the same command goes on")
    return 128 + Stop.signal if Stop.signal else int(bool(failed))


def show(study: Mapping, path: Path) -> None:
    """Print the table; draw the plot beside the JSON, where matplotlib is there."""
    print(f"\n{path}\n\n{table(study)}")
    picture = path.with_suffix(".png")
    try:
        write_whole(picture, forest(study))
        print(f"picture {picture}")
    except ImportError:
        print("no picture: matplotlib is not installed")


def read_study(path: Path) -> dict:
    """The JSON of a study that can be shown. Raises Mistake."""
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        table(study)
    except OSError as error:
        raise Mistake(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, StopIteration):
        raise Mistake(f"{path}: not the JSON of a study") from None
    return study


def show_all(paths: Sequence[Path]) -> int:
    """The tables of studies that were run before. Raises Mistake."""
    paths = paths or sorted(SHOWN.glob("*.json"))
    if not paths:
        raise Mistake(f"--show: no study in {SHOWN}; name its JSON file")
    for path in paths:
        print(f"{path}\n\n{table(read_study(path))}")
    return 0


def marks(name: str) -> tuple[str, str]:
    """The lines of docs/study.md between which a study's table stands."""
    return f"<!-- study {name}: written by tools/study.py --keep -->\n", f"<!-- end of study {name} -->"


def keep(paths: Sequence[Path]) -> int:
    """Copy studies to logs/study and write their tables into the page. Raises Mistake and MarkError."""
    for path in paths:
        study = read_study(path)
        write_part(PAGE, *marks(study["study"]), f"\n{table(study)}\n")
        SHOWN.mkdir(exist_ok=True)
        write_whole(SHOWN / f"{study['study']}.json", (json.dumps(study, indent=1) + "\n").encode())
    write_part(ROOT / "README.md", *IDEAS, ideas())
    return 0


def ideas() -> str:
    """The README's table of all studies in logs/study/."""
    return summary([read_study(path) for path in sorted(SHOWN.glob("*.json"))], KEPT)


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Command line; see above."""
    try:
        options = parse_arguments(arguments, environ)
        if options.show is not None:
            return show_all(options.show)
        if options.keep:
            return keep(options.keep)
        return prepare(options, environ) if options.prepare else run(options, environ)
    except (Mistake, MarkError, DataError, SeedError, runs.ReadError, tg.UserError, OSError) as error:
        return complain("study.py", error)


if __name__ == "__main__":
    start(main, sys.argv[1:], os.environ)
