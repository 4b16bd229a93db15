"""This checkout against another revision, or another script, in processor seconds on one core.

    python bench/side_by_side.py --before REV [--peer PATH] [--keys step,ttt] [--blocks 3] [--json]

Each block runs A B B A, every letter a process of its own: A is the revision (unpacked into a temporary
folder), B this checkout. A ratio below 1 means that B takes less. Given are the geometric mean over the
blocks and its 95 % interval (Student's t of the logarithms). Processor seconds, and not a clock, because the
machine may be busy; neighbours still cost cache, so a figure is worth what its interval says.

`step`, `step_looping`: `Trainer.step` at demo size; `step_middle`: 8 layers x 256, vocabulary 8,192, before
and after looping; `ttt`: test-time training of eight documents; `standard`: the standard evaluation; `load`:
an `ans` artifact to a state dict; `demo`, `demo_rss`: a whole run of the demo, its seconds and peak memory;
`help`: `train_gpt.py --help`. The peer is a black box, so it is compared in `demo` and `demo_rss` alone
(published scripts do nothing without a GPU). Rows are also told on stderr as they come.
"""

import argparse
import dataclasses
import importlib.metadata
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
MIDDLE = {"num_layers": 8, "model_dim": 256, "num_heads": 8, "num_kv_heads": 4, "vocab_size": 8192}
MIDDLE |= {"xsa_last_n": 8, "parallel_start_layer": 5}
PROCESSES = ("demo", "demo_rss", "help")
STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % points, 1 to 9 degrees
KEYS = ("step", "step_looping", "step_middle", "ttt", "standard", "load", *PROCESSES)


# -- one process: what a revision does, timed


def model_of(tg: object, cfg: object) -> object:
    """A model none of whose matrices is zero, with the backends that a run on a CPU would have."""
    import torch

    torch.manual_seed(cfg.seed)
    chosen = [tg.plain_backends(cfg, tg.CPU)] if hasattr(tg, "plain_backends") else []  # younger than 427ca10
    model = tg.GPT(cfg, *chosen)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def steps(tg: object, cfg: object, fractions: Sequence[float]) -> Callable[[], object]:
    """A training step on the same rows of the demo's text at each fraction of training."""
    import numpy as np
    import torch

    size = cfg.train_batch_tokens // cfg.grad_accum_steps
    shard = np.fromfile(cfg.data_folder / "fineweb_train_000000.bin", "<u2", offset=1024)
    tokens = torch.from_numpy(shard[: cfg.grad_accum_steps * (size + 1)].astype(np.int64))
    rows = [tg.packed_row(part, cfg.train_seq_len) for part in tokens.split(size + 1)]
    loader = SimpleNamespace(state=lambda: None, load_state=lambda state: None)
    trainer = tg.Trainer(cfg, model_of(tg, cfg), loader)
    trainer.micro_batches = len(rows)
    return lambda: [trainer.step(3, fraction, rows).train_loss for fraction in fractions]


def adaptation(tg: object, cfg: object) -> Callable[[], object]:
    """Test-time training of eight documents of the demo, short ones, without a global phase."""
    import torch

    cfg = dataclasses.replace(cfg, phased_ttt_prefix_docs=0)
    tokens, model = tg.load_validation(cfg).tokens, model_of(tg, cfg)
    spans = sorted(tg.find_documents(tokens), key=lambda span: span[1])[8:16]
    chosen = torch.cat([tokens[start : start + length - 1] for start, length in spans] + [tokens[:1]])
    val = tg.ValidationSet.from_sidecar(chosen, torch.ones_like(chosen))
    return lambda: tg.ScoreFirstTTT(model, val, cfg, looping=True).run()


def standard(tg: object, cfg: object) -> Callable[[], object]:
    """The standard evaluation of the demo's validation text."""
    val, model = tg.load_validation(cfg), model_of(tg, cfg)
    if hasattr(tg, "StandardEvaluation"):
        return lambda: tg.StandardEvaluation(model, val, cfg, looping=True).run()
    score, row = tg.model_score(model, looping=True), cfg.val_batch_tokens // 8
    return lambda: tg.evaluate_standard(score, val, row, cfg.eval_seq_len)


def load(tg: object, cfg: object, artifact: Path) -> Callable[[], object]:
    """An artifact from bytes to a state dict."""
    data, given = artifact.read_bytes(), ()
    if hasattr(tg, "read_artifact"):
        read = tg.read_artifact
    else:
        from harness.readers import read_artifact as read

        given = (cfg,)
    return lambda: [tg.dequantize_state(read(data, *given)[1], cfg.num_layers) for _ in range(5)]


def child(key: str, root: Path) -> None:
    """Print the processor seconds of a key's work in a checkout, without what prepares it."""
    sys.path.insert(0, str(root))
    import torch

    import train_gpt as tg

    torch.set_num_threads(1)
    cfg = tg.Config.from_env({"PRESET": "demo", "DATA_PATH": str(ROOT / "data" / "demo")})
    prepare = {
        "step": lambda: steps(tg, cfg, [0.0]),
        "step_looping": lambda: steps(tg, cfg, [1.0]),
        "step_middle": lambda: steps(tg, dataclasses.replace(cfg, **MIDDLE), [0.0, 1.0]),
        "ttt": lambda: adaptation(tg, cfg),
        "standard": lambda: standard(tg, cfg),
        "load": lambda: load(tg, cfg, artifact_of(root)),
    }
    work, repeats = prepare[key](), {"step": 6, "step_looping": 6, "step_middle": 2, "load": 5}.get(key, 1)
    if repeats > 1:  # the first time also asks for memory and compiles products
        work()
    start = time.process_time()
    for _ in range(repeats):
        work()
    print((time.process_time() - start) / repeats)


# -- all processes


def artifact_of(root: Path) -> Path:
    """Where the `ans` artifact of a checkout lies that `load` reads."""
    return root / "runs" / "side_by_side" / "final_model.int6.ptz"


def process(command: Sequence[str], folder: Path, environ: dict[str, str]) -> tuple[float, float, str]:
    """Run a command: its processor seconds, its peak memory in MiB, its output. It must not fail."""
    with tempfile.TemporaryFile("w+") as output:
        running = subprocess.Popen(command, cwd=folder, env=environ, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(running.pid, 0)
        running.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if running.returncode not in (0, 3):  # 3: a limit of the contest, which a busy machine exceeds
        sys.exit(f"bench: {' '.join(command)}: exit code {running.returncode}\n{text[-2000:]}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, text


def measured(key: str, root: Path, environ: dict[str, str]) -> tuple[float, float]:
    """One letter of a block: processor seconds of a key in a checkout, and the process's peak in MiB."""
    environ = (
        os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "CONSOLE": "log"} | environ
    )
    script = str(root / "train_gpt.py")
    if key == "help":
        return process([sys.executable, script, "--help"], root, environ)[:2]
    if key == "demo":
        with tempfile.TemporaryDirectory() as folder:
            return process([sys.executable, script], root, environ | {"ARTIFACT_DIR": f"{folder}/run"})[:2]
    command = [sys.executable, str(Path(__file__).resolve()), "--child", key, "--root", str(root)]
    _, memory, text = process(command, root, environ)
    return float(text.split()[-1]), memory


def summary(blocks: Sequence[Sequence[float]]) -> dict[str, float]:
    """Geometric mean of the ratios B / A of A B B A blocks, with its 95 % interval, and the means of both."""
    logs = [math.log((b1 + b2) / (a1 + a2)) for a1, b1, b2, a2 in blocks]
    mean = statistics.mean(logs)
    half = math.inf
    if len(logs) > 1:
        student = STUDENT[min(len(logs) - 2, len(STUDENT) - 1)]
        half = student * statistics.stdev(logs) / math.sqrt(len(logs))
    low, high = math.exp(mean - half), math.exp(mean + half) if math.isfinite(half) else math.inf
    before = statistics.mean(a for block in blocks for a in (block[0], block[3]))
    now = statistics.mean(b for block in blocks for b in block[1:3])
    return {"ratio": math.exp(mean), "low": low, "high": high, "before": before, "now": now}


def compare(
    keys: Sequence[str], before: Path, blocks: int, other: dict[str, str], ours: dict[str, str]
) -> list[dict[str, object]]:
    """A row for each key: A B B A so many times; each side with variables of its own.

    Seconds and memory of the demo are of the same runs. Each row is told at once: a later key may fail.
    """
    sides, runs, rows = {"A": (before, other), "B": (ROOT, ours)}, {}, []
    for key in keys:
        work, column = key.removesuffix("_rss"), int(key.endswith("_rss"))
        if work not in runs:
            runs[work] = [[measured(work, *sides[letter]) for letter in "ABBA"] for _ in range(blocks)]
        rows.append({"key": key, **summary([[spent[column] for spent in block] for block in runs[work]])})
        print(*(f"{name}:{value}" for name, value in rows[-1].items()), file=sys.stderr, flush=True)
    return rows


def demo_environ() -> dict[str, str]:
    """Variables of a run of the demo."""
    return {"PRESET": "demo", "DATA_PATH": str(ROOT / "data" / "demo")}


def unpack(revision: str, folder: Path) -> Path:
    """The files of a revision in a folder of their own."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run(
        [*git, "rev-parse", "--verify", "-q", f"{revision}^{{commit}}"], capture_output=True
    )
    if found.returncode:
        sys.exit(f"bench: --before {revision}: no such revision here")
    folder.mkdir()
    archive = subprocess.Popen([*git, "archive", revision], stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "-C", str(folder)], stdin=archive.stdout, check=True)
    return folder


def add_packages(root: Path, folder: Path) -> dict[str, str]:
    """Install what a revision requires and this environment lacks; variables by which it is found."""
    lines = (root / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = {re.split("[^A-Za-z0-9_-]", line)[0]: line for line in lines}
    present = {found.name.lower() for found in importlib.metadata.distributions()}
    missing = [line for name, line in names.items() if name and name.lower() not in present]
    if not missing:
        return {}
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *missing]
    process(command, root, dict(os.environ))
    return {"PYTHONPATH": str(folder)}


def make_artifact(root: Path, environ: dict[str, str]) -> None:
    """An `ans` artifact in a checkout's own format: of a demo of two steps, not timed."""
    folder = artifact_of(root).parent
    if not artifact_of(root).exists():
        short = {
            "ITERATIONS": "2",
            "VAL_LOSS_EVERY": "0",
            "TTT_ENABLED": "0",
            "COMPRESSOR": "ans",
            "AUDIT": "0",
        }
        environ = os.environ | environ | short | {"ARTIFACT_DIR": str(folder)}
        process([sys.executable, str(root / "train_gpt.py")], root, environ)


def peer_environ(folder: Path) -> dict[str, str]:
    """Every setting of the demo by name for another script, and the path of its stand-in for attention."""
    import peer

    backend, path = peer.pick_backend(folder)
    settings = peer.tg.PRESETS["demo"] | {"data_path": ROOT / "data" / "demo", "audit": False}
    given = [f"{name.upper()}={int(v) if isinstance(v, bool) else v}" for name, v in settings.items()]
    args = SimpleNamespace(steps=settings["iterations"], env=[*given, "ENABLE_LOOPING_AT=0.35"])
    return peer.shared_settings(args, backend) | {"PYTHONPATH": path}


def main() -> None:
    """Measure the keys that are asked for."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument(
        "--before", metavar="REV", help="the git revision that this checkout is compared with"
    )
    options.add_argument("--peer", type=Path, metavar="PATH", help="another train_gpt.py, run as a black box")
    options.add_argument("--keys", default=",".join(KEYS), help="what to measure, with commas between")
    options.add_argument("--blocks", type=int, default=3, help="how often A B B A is run")
    options.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options.add_argument("--child", choices=KEYS, help=argparse.SUPPRESS)
    options.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.child:
        child(args.child, args.root)
        return
    keys = args.keys.split(",")
    if wrong := [key for key in keys if key not in KEYS]:
        sys.exit(f"bench: --keys {wrong[0]}: must be some of {','.join(KEYS)}")
    if not args.before and not args.peer:
        sys.exit("bench: --before or --peer: one of them is needed")
    if args.peer and not args.peer.is_file():
        sys.exit(f"bench: --peer {args.peer}: no such file")
    rows = []
    with tempfile.TemporaryDirectory(prefix="side_by_side-") as folder:
        if args.peer:
            theirs, root = peer_environ(Path(folder) / "stand_in"), args.peer.resolve().parent
            chosen = [key for key in keys if key in PROCESSES[:2]]
            for row in compare(chosen, root, args.blocks, theirs, demo_environ()):
                rows.append(row | {"key": f"peer_{row['key']}"})
        if args.before:
            before, ours = unpack(args.before, Path(folder) / "before"), demo_environ()
            other = ours | add_packages(before, Path(folder) / "packages")
            for root, environ in ((before, other), (ROOT, ours)) if "load" in keys else ():
                make_artifact(root, environ)
            rows += compare(keys, before, args.blocks, other, ours)
    from common import environment, report, tg  # not in a child, which has the other revision's script

    heading = {"benchmark": "side_by_side", "before": args.before, "peer": str(args.peer or "")}
    if args.json:
        heading |= {row["key"]: row["ratio"] for row in rows}
    report({**heading, "blocks": args.blocks, **environment(tg.CPU)}, rows, args.json)


if __name__ == "__main__":
    sys.exit(main())
