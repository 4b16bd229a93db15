"""Kill runs, fill their disk, damage their files: nothing may be lost, nothing may come out different.

    python bench/faults.py [--kills 20] [--full-disk 12] [--damage 2000] [--ranks 1 2] [--seed 0] [--json]

* Kills: the demo, made smaller, is killed (SIGKILL) at a random moment of each stage in turn: training, while
  a checkpoint is written, while an output is written, calibration, test-time training. The same command
  resumes it each time; what it ends with is compared with the undisturbed run of as many ranks: weights,
  artifact, packed script, all scores, all events, the ledger. After each kill every file with a final name
  must be whole.
* Full disk: a write of each output fails half-way with ENOSPC. The run must end with a line that names the
  file, earlier outputs as they were, and resume to the same end; a checkpoint's failure must not end it.
* Cost: what share of the processor a checkpoint every ten seconds takes in the demo (`checkpoint_share`).
* Damage: changed bytes of data, tokenizer, artifact and checkpoints: refused with the file's name, or read as
  they were (harmless). Anything else is wrong.

Exit code 1 if anything is wrong. Needs the demo data (`make data`).
"""

import argparse
import contextlib
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train_gpt.py"
sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402
from bench.damage import run_damage  # noqa: E402
from bench.fuzz_artifact import damaged  # noqa: E402
from harness.chain import EVENTS  # noqa: E402
from harness.settings import read_settings  # noqa: E402
from harness.unfinished import CheckpointFolder, read_checkpoint, write_checkpoint  # noqa: E402
from systems.layout import file_sha256  # noqa: E402

DEMO = {
    "PRESET": "demo",
    "DATA_PATH": str(ROOT / "data" / "demo"),
    "MODEL_DIM": "32",
    "ROPE_DIMS": "8",
    "TRAIN_BATCH_TOKENS": "2048",
    "ITERATIONS": "16",
    "WARMUP_STEPS": "0",
    "VAL_LOSS_EVERY": "8",
    "GPTQ_CALIBRATION_BATCHES": "4",
    "VAL_DOC_FRACTION": "0.3",
    "TTT_BATCH_SIZE": "2",
    "TTT_CHUNK_SIZE": "64",
    "TTT_WARM_START_A": "1",
    "PHASED_TTT_PREFIX_DOCS": "6",
    "CHECKPOINT_SECONDS": "0.3",
}
OUTPUTS = ("final_model.pt", "final_model.int6.ptz", "train_gpt.packed.py", "documents.json")
MEASURED = ("start", "preflight", "speed")  # events about the machine
STAGES = ("training", "checkpointing", "saving", "calibration", "ttt")
BEGINS = {"training": "model ", "calibration": "prequant ", "ttt": "quantised "}  # log line before the stage
ENDS = {"training": "saved ", "calibration": "artifact ", "ttt": "ttt val_loss"}
HANG_SECONDS = 900.0

# A child whose write number COUNT to a file whose name holds NAME stops half-way: no space left on device.
FULL_DISK = """
import builtins, errno, os, runpy, sys
name, count = os.environ.pop("FULL_DISK_NAME"), int(os.environ.pop("FULL_DISK_COUNT"))
real, left = builtins.open, [count]

class Full:
    def __init__(self, file):
        self.__dict__["file"] = file
    def __getattr__(self, key):
        return getattr(self.file, key)
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self.file.close()
    def write(self, data):
        if left[0] == 0:
            self.file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        return self.file.write(data)

def filling(path, mode="r", *rest, **options):
    file = real(path, mode, *rest, **options)
    hit = isinstance(path, (str, os.PathLike)) and name in os.path.basename(path) and mode[0] in "wa"
    return Full(file) if hit else file

builtins.open = filling
sys.argv[:] = [sys.argv[1]]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Outcome(NamedTuple):
    """How a process ended: exit code, its lines with the seconds since its start, standard error."""

    code: int
    lines: list[tuple[float, str]]
    errors: str

    @property
    def finished(self) -> bool:
        """The run came to its end (its exit code may be 3, which torchrun makes 1)."""
        return any(line.startswith("final ") or "this run has ended" in line for _, line in self.lines)


class Bench:
    """Runs of one command in folders of a working folder."""

    def __init__(self, work: Path, settings: dict[str, str], ranks: int = 1, script: Path = SCRIPT):
        self.work, self.ranks, self.script = work, ranks, script
        kept = ("PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR")
        self.env = {name: os.environ[name] for name in kept if name in os.environ}
        self.env |= {"OMP_NUM_THREADS": "1", "CONSOLE": "log"} | settings

    @contextlib.contextmanager
    def process(self, name: str, **env: str) -> Iterator[subprocess.Popen]:
        """The command, with its outputs in the folder `name`; whatever is left of it is killed behind."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"]
        command = [sys.executable, *(torchrun if self.ranks > 1 else []), str(self.script)]
        if "FULL_DISK_NAME" in env:
            command = [sys.executable, "-c", FULL_DISK, str(self.script)]
        with tempfile.TemporaryFile("w+") as errors:
            child = subprocess.Popen(
                command,
                cwd=self.work,
                env=self.env | {"ARTIFACT_DIR": name, "RUN_ID": "faults"} | env,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            child.errors = errors
            try:
                yield child
            finally:
                kill(child.pid)
                child.wait()

    def run(self, name: str, cut: Callable[["Watched"], None] | None = None, **env: str) -> Outcome:
        """Run to the end; `cut`, in a thread of its own, may end it earlier."""
        with self.process(name, **env) as child:
            watched = Watched(child, self.work / name)
            threads = [threading.Thread(target=cut, args=[watched])] if cut else []
            hang = threading.Timer(HANG_SECONDS, kill, [child.pid])
            for thread in [*threads, hang]:
                thread.start()
            for line in child.stdout:
                watched.lines.append((time.monotonic() - watched.start, line.rstrip("\n")))
            code = child.wait()
            watched.ended.set()
            hung = hang.finished.is_set()
            hang.cancel()
            for thread in threads:
                thread.join()
            child.errors.seek(0)
            return Outcome(124 if hung else code, watched.lines, child.errors.read())


class Watched:
    """A running process, its lines so far and its folder."""

    def __init__(self, child: subprocess.Popen, folder: Path):
        self.child, self.folder, self.lines, self.start = child, folder, [], time.monotonic()
        self.ended = threading.Event()

    def after_line(self, begins: Callable[[str], bool], delay: float) -> bool:
        """Wait for a line and some seconds more; False when the process has ended before."""
        while not any(begins(line) for _, line in self.lines):
            if self.ended.wait(0.005):
                return False
        return not self.ended.wait(delay)

    def while_writing(self, pattern: str, skip: int) -> bool:
        """Wait until, behind `skip` others, a temporary file of that pattern is seen."""
        found = set()
        while len(found) <= skip and not self.ended.is_set():
            with contextlib.suppress(OSError):
                found.update(path.name for path in self.folder.glob(pattern))
        return not self.ended.is_set()


def kill(pid: int, one: bool = False) -> None:
    """SIGKILL to a process and all below it (torchrun's workers have own sessions), or to one worker."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if one and children:
            os.kill(int(children[-1]), signal.SIGKILL)
            return
        os.kill(pid, signal.SIGKILL)
    except OSError:
        return
    for child in children:
        kill(int(child))


def timeless(rows: Sequence[dict]) -> list[dict]:
    """Rows without what another run of the same command may have otherwise."""
    other = ("order", "prev")  # the chain of the ledger, which also counts events and resumes
    return [{k: v for k, v in row.items() if "second" not in k and k not in other} for row in rows]


def contents(folder: Path) -> dict[str, object]:
    """What two runs must agree in: outputs, all scores, the records of the ledger; without times."""
    result = json.loads((folder / "result.json").read_text())
    ledger = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()[1:]]
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ledger = [row for row in ledger if row["kind"] not in EVENTS]  # those stand in "events"
    found = {name: file_sha256(folder / name) for name in OUTPUTS}
    found |= {"ledger": timeless(ledger), "stages": timeless([result["stages"][s] for s in result["stages"]])}
    hidden = ("folder", "file")
    found["events"] = [
        {k: v for k, v in row.items() if k not in hidden}
        for row in timeless(events)
        if row["stage"] not in MEASURED
    ]
    return found | {"val_bpb": result["val_bpb"], "steps": result["steps"]}


def unwhole(folder: Path, reference: dict[str, object]) -> list[str]:
    """Files with a final name that are not whole."""
    wrong = []
    for name in OUTPUTS:
        path = folder / name
        if path.exists() and file_sha256(path) != reference[name]:
            wrong.append(str(path))
    for path in [*folder.glob("checkpoints/*.ckpt"), *folder.glob("result.json")]:
        try:
            read_checkpoint(path) if path.suffix == ".ckpt" else json.loads(path.read_text())
        except ValueError:
            wrong.append(str(path))
    return wrong


def difference(folder: Path, reference: dict[str, object]) -> list[str]:
    """Names of what a finished run has other than the undisturbed one."""
    try:
        found = contents(folder)
    except (OSError, ValueError) as error:
        return [f"{folder}: {error}"]
    return [f"{folder}: {key}" for key in reference if found[key] != reference[key]]


def durations(outcome: Outcome) -> dict[str, float]:
    """Seconds of the stages in the undisturbed run."""
    at = lambda text: next(when for when, line in outcome.lines if line.startswith(text))  # noqa: E731
    return {stage: at(ENDS[stage]) - at(BEGINS[stage]) for stage in BEGINS}


def killed(bench: Bench, name: str, stage: str, seconds: dict[str, float], rng: random.Random) -> Outcome:
    """Run the command and kill it in a stage: all of it, or one of several ranks."""
    skip, output, one = rng.randrange(2), rng.choice(OUTPUTS[:2]), bench.ranks > 1 and rng.random() < 0.5
    begins = BEGINS.get(stage, "")
    word = begins.replace("model", "within train").strip()

    def cut(run: Watched) -> None:
        if stage == "checkpointing":
            there = run.while_writing("checkpoints/.*.tmp", skip)
        elif stage == "saving":
            there = run.while_writing(f".{output}.tmp", 0)
        else:
            first = lambda line: line.startswith(begins) or (line.startswith("resumed ") and word in line)  # noqa: E731
            there = run.after_line(first, rng.uniform(0, seconds[stage]))
        if there:
            kill(run.child.pid, one)

    return bench.run(name, cut)


def kill_chain(
    bench: Bench, name: str, kills: int, reference: dict, seconds: dict, rng: random.Random
) -> Counter:
    """Kill one run again and again, once a stage, then let it end and compare it."""
    counts, wrong, chosen = Counter(), [], rng.sample(STAGES, kills)
    for stage in (stage for stage in STAGES if stage in chosen):
        outcome = killed(bench, name, stage, seconds, rng)
        if not outcome.finished:
            counts.update(kills=1, **{stage: 1})
        wrong += unwhole(bench.work / name, reference) + ["hang"] * (outcome.code == 124)
    outcome = bench.run(name)
    wrong += difference(bench.work / name, reference)
    if not outcome.finished or wrong:
        counts["wrong"] = max(counts["kills"], 1)
        reason = "; ".join(wrong) or f"exit code {outcome.code}: {outcome.errors[-300:]}"
        print(f"WRONG {name}: {reason}", file=sys.stderr, flush=True)
    else:
        counts["identical"] = counts["kills"]
    return counts


def kill_all(work: Path, settings: dict, kills: int, ranks: Sequence[int], seed: int) -> Counter:
    """Kills in chains, alternating between numbers of ranks."""
    total, benches = Counter(), [Bench(work, settings, count) for count in ranks]
    known = []
    for bench in benches:
        outcome = bench.run(f"undisturbed-{bench.ranks}")
        if not outcome.finished:
            raise SystemExit(f"the undisturbed run fails: {outcome.errors[-2000:]}")
        known.append((contents(work / f"undisturbed-{bench.ranks}"), durations(outcome)))
    for chain in range(3 * kills):
        left = kills - total["kills"]
        if left <= 0:
            break
        bench, (reference, seconds) = benches[chain % len(ranks)], known[chain % len(ranks)]
        rng, name = random.Random(f"{seed} {chain}"), f"killed-{chain}"
        total += kill_chain(bench, name, min(left, len(STAGES)), reference, seconds, rng)
        print(f"{bench.ranks} ranks, chain {chain}: {dict(total)}", file=sys.stderr, flush=True)
    return total


# -- full disk

FULL = (  # part of the name of a file, the write to it that fails, a line that the run reaches nevertheless
    ("metrics.jsonl", 6, ""),
    ("faults.txt", 150, ""),  # behind the sources in its head
    (".final_model.pt.tmp", 0, ""),
    (".final_model.int6.ptz.tmp", 0, "saved "),
    (".train_gpt.packed.py.tmp", 0, "artifact "),
    (".result.json.tmp", 0, "ttt val_loss"),
    (".ledger.jsonl.tmp", 0, "ttt val_loss"),
    (".run.000001.ckpt.tmp", 0, "final "),
    (".run.000002.ckpt.tmp", 0, "final "),
    (".run.000004.ckpt.tmp", 0, "final "),
    (".ttt-0.000001.ckpt.tmp", 0, "final "),
    (".weights.000001.ckpt.tmp", 0, "final "),
)


def full_disk(work: Path, settings: dict, cases: int, script: Path = SCRIPT) -> Counter:
    """Fail one write of each file, then resume: `full` cases, of which `lost` ended as they must not."""
    bench, counts = Bench(work, settings, script=script), Counter()
    if not (work / "undisturbed-1").is_dir():
        bench.run("undisturbed-1")
    reference = contents(work / "undisturbed-1")
    for number, (part, count, reached) in enumerate(FULL[:cases]):
        name = f"full-{number}"
        outcome = bench.run(name, FULL_DISK_NAME=part, FULL_DISK_COUNT=str(count))
        wrong, errors = unwhole(work / name, reference), outcome.errors.strip().splitlines()
        shown = [line for _, line in outcome.lines]
        file = part.strip(".").removesuffix(".tmp")
        if ".ckpt" in part:
            told = any("not written, going on" in line and file in line for line in shown)
            wrong += ["not told"] * (not told) + ["run ended"] * (not outcome.finished)
        else:
            wrong += [f"exit code {outcome.code}"] * (outcome.code != 1)
            first, *last = errors or [""]
            clear = file in first and "No space left on device" in first
            clear &= len(last) <= 1 and all("last checkpoint" in line for line in last)
            wrong += [f"message {errors}"] * (not clear)
        wrong += [f"did not reach {reached}"] * (not any(line.startswith(reached) for line in shown))
        wrong += [str(path) for path in work.glob(f"{name}/**/.*.tmp")]
        outcome = bench.run(name)
        wrong += difference(work / name, reference)
        counts.update(full=1, lost=int(bool(wrong)))
        if wrong:
            print(f"WRONG {part}: {'; '.join(wrong)}", file=sys.stderr, flush=True)
    return counts


# -- damage


def damage_checkpoints(cases: int, seed: int) -> Counter:
    """Read damaged checkpoints: refused by name, or the same values and tensors."""
    counts, values = Counter(), {"stages": {"a": {"val_bpb": 1.5}}, "text": "x" * 500}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        path = Path(folder) / "run.000001.ckpt"
        write_checkpoint(path, values, {"weight": torch.arange(3000.0).view(3, 1000)})
        blob = path.read_bytes()
        whole = _state(path)
        for case in range(cases):
            bad = damaged(blob, random.Random(f"{seed} {case}"))
            path.write_bytes(bad)
            try:
                kind = "harmless" if _state(path) == whole else "wrong"
            except tg.ArtifactError as error:
                kind = "refused" if str(path) in str(error) else "wrong"
            counts.update({"damaged": 1, kind: 1})
    return counts


def _state(path: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(read_checkpoint(path), buffer)
    return buffer.getvalue()


def damage_all(cases: int, seed: int) -> Counter:
    """A fifth of the cases are checkpoints, the others are those of bench/damage.py."""
    told = run_damage(cases - cases // 5, seed)
    damage = Counter({key: told[key] for key in ("damaged", "refused", "harmless", "wrong")})
    return damage + damage_checkpoints(cases // 5, seed)


def checkpoint_cost(steps: int, seconds: float = 10.0) -> float:
    """Share of the processor that a checkpoint of the demo every `seconds` takes, median over steps."""
    cfg = read_settings({"PRESET": "demo", "DATA_PATH": DEMO["DATA_PATH"], "DEVICE": "cpu"})
    backends = tg.Backends(micro_batches=cfg.grad_accum_steps)
    count, tokens = tg.micro_batches(cfg, backends, 1)
    loader = tg.PackedLoader(tg.shard_paths(cfg.data_folder, "train"), cfg, tg.CPU, tokens, count)
    trainer = tg.Trainer(cfg, tg.GPT(cfg, backends), loader)
    costs = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        checkpoints = CheckpointFolder(Path(folder), "run")
        for step in range(steps):
            trainer.step(step, 0.5)
            if step >= 1:
                start = time.process_time()
                checkpoints.add({}, trainer.state())
                costs.append(time.process_time() - start)
    return statistics.median(costs) / seconds


def main() -> int:
    """Run all and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--full-disk", type=int, default=len(FULL), help="how many of the files are tried")
    parser.add_argument("--damage", type=int, default=2000, help="damaged files in all")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if not (ROOT / "data" / "demo" / "manifest.json").is_file():
        parser.error("no demo data: run `make data` first")
    torch.set_num_threads(1)
    start, counts = time.monotonic(), Counter()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        if arguments.kills:
            counts += kill_all(Path(folder), DEMO, arguments.kills, arguments.ranks, arguments.seed)
        if arguments.full_disk:
            counts += full_disk(Path(folder), DEMO, arguments.full_disk)
    counts += damage_all(arguments.damage, arguments.seed)
    keys = ("kills", "identical", *STAGES, "full", "lost", "damaged", "refused", "harmless", "wrong")
    report = {key: counts[key] for key in keys} | {"checkpoint_share": checkpoint_cost(8)}
    report["seconds"] = round(time.monotonic() - start, 1)
    print(json.dumps(report) if arguments.json else "\n".join(f"{k:14} {v}" for k, v in report.items()))
    fine = counts["identical"] == counts["kills"] and not counts["lost"] and not counts["wrong"]
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
