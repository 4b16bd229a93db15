"""Another `train_gpt.py` and ours on the same GPU with the same settings and data, in turn: A B A B.

    python bench/peer.py --script PATH [--steps 60] [--rounds 2] [--env NAME=VALUE ...] [--out DIR] [--json]
        [--who theirs]

The other script is a black box: it is run, and its log is read. Both get every setting of ours as an
environment variable. Where FlashAttention 3 is absent, a stand-in module `flash_attn_interface` built on our
backends serves the other script, and ours uses the same backend. Looping starts half-way.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import ROOT, SMALL, environment, report, tg

from harness.backends import choose_attention
from systems.layout import as_variables

STAND_IN = '''"""Stands in for FlashAttention 3: its two functions, computed by a backend of train_gpt.py."""

import importlib.util
import os
import sys

spec = importlib.util.spec_from_file_location("train_gpt", {script!r})  # as systems/ calls it
sys.path.append(os.path.dirname({script!r}))
tg = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = tg
spec.loader.exec_module(tg)


def flash_attn_func(q, k, v, softmax_scale=None, causal=False, **options):
    """q [B, T, H, d], k and v [B, T, G, d] -> [B, T, H, d]; causal only."""
    if not causal or softmax_scale or any(options.values()):
        raise NotImplementedError("the stand-in computes plain causal attention only")
    return tg.attend(q, k, v, None, tg.Backends({backend!r}))


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
    window_size=(-1, -1), **options
):
    """q [T, H, d], k and v [T, G, d] -> [T, H, d]; causal, every segment by itself, no window."""
    if not causal or softmax_scale or window_size[0] >= 0 or any(options.values()):
        raise NotImplementedError("the stand-in computes plain causal attention only")
    segments = tg.Segments(cu_seqlens_q, max_seqlen_q)
    return tg.attend(q[None], k[None], v[None], segments, tg.Backends({backend!r}))[0]
'''
NUMBER = r"([\d.eE+-]+)"
TRAIN = (  # step, loss, tokens per second since the start: the published scripts' lines, and ours
    rf"(\d+)/\d+ train_loss: {NUMBER} .*tok/s: *{NUMBER}",
    rf"train step:(\d+) train_loss:{NUMBER} .*tokens_per_second:{NUMBER}",
)
LOOPING = r"(?:layer_loop:enabled|looping) step:(\d+)"
MEMORY = r"peak memory allocated: (\d+) MiB|peak_memory_mib:(\d+)"
SCORES = rf"^(.*?) val_loss:{NUMBER} val_bpb:{NUMBER}"


def read_log(text: str, batch_tokens: int) -> dict[str, object]:
    """Losses, scores, memory and, from the running means of the log, the speed before and after looping."""
    points = [tuple(map(float, found)) for pattern in TRAIN for found in re.findall(pattern, text)]
    looping = re.search(LOOPING, text)
    border = int(looping[1]) if looping else float("inf")
    seconds = {step: step * batch_tokens / rate for step, _, rate in points}
    result = {"losses": {int(step): loss for step, loss, _ in points}}
    for name, steps in (
        ("before", sorted(s for s in seconds if s < border)),
        ("after", sorted(s for s in seconds if s > border)),
    ):
        if len(steps) > 1:
            spent = (seconds[steps[-1]] - seconds[steps[0]]) / (steps[-1] - steps[0])
            result |= {f"{name}_ms_per_step": 1e3 * spent, f"{name}_tokens_per_second": batch_tokens / spent}
    memory = re.search(MEMORY, text)
    if memory:
        result["peak_memory_mib"] = int(memory[1] or memory[2])
    scores = re.findall(SCORES, text, re.M)
    return result | {"scores": {name.strip(): float(bpb) for name, _, bpb in scores}}


def run(script: Path, folder: Path, environ: dict[str, str], args: argparse.Namespace) -> dict[str, object]:
    """Run a script in a folder of its own until its training (or all of it, `--until end`) is over."""
    folder.mkdir(parents=True)
    launcher = [sys.executable, str(script)]
    if args.gpus > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.gpus}"]
        launcher = [sys.executable, *launch, str(script)]
    start, first = time.monotonic(), None
    lines = []
    options = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "start_new_session": True,
    }
    with (
        subprocess.Popen(launcher, cwd=folder, env=environ, **options) as process,
        open(folder / "console.txt", "w") as console,
    ):
        alarm = signal.signal(signal.SIGALRM, lambda *_: os.killpg(process.pid, signal.SIGKILL))
        signal.alarm(args.limit)
        for line in process.stdout:
            lines.append(line)
            print(line, end="", file=console, flush=True)
            found = next((match for pattern in TRAIN if (match := re.search(pattern, line))), None)
            first = first or (time.monotonic() - start if found else None)
            if found and int(found[1]) >= args.steps and args.until == "train":
                os.killpg(process.pid, signal.SIGTERM)
                break
        signal.alarm(0)
        signal.signal(signal.SIGALRM, alarm)
        process.wait()
    result = read_log("".join(lines), args.batch_tokens)
    if not result["losses"]:
        last = "".join(lines[-15:])
        sys.exit(f"bench: {script}: no training step in its log ({folder}/console.txt), which ends:\n{last}")
    return {"seconds_to_first_step": first, **result}


def shared_settings(args: argparse.Namespace, backend: str) -> dict[str, str]:
    """Every setting of ours by name, so that a script with other defaults runs the same."""
    small = {} if torch.cuda.is_available() else {name.upper(): str(value) for name, value in SMALL.items()}
    steps = {
        "ITERATIONS": args.steps,
        "MAX_WALLCLOCK_SECONDS": 0,
        "ENABLE_LOOPING_AT": 0.5,
        "WARMUP_STEPS": 5,
    }
    steps |= {"TRAIN_LOG_EVERY": max(1, args.steps // 12), "VAL_LOSS_EVERY": 0, "SEED": 42}
    given = dict(pair.split("=", 1) for pair in args.env)
    asked = small | {name: str(value) for name, value in steps.items()} | given
    known = {
        name: value
        for name, value in {**os.environ, **asked}.items()
        if name.lower() in tg.Config.__annotations__
    }
    cfg = tg.Config.from_env({**known, "ATTENTION_BACKEND": backend})
    args.batch_tokens = cfg.train_batch_tokens
    settings = as_variables(cfg.as_env())
    for name in ("DATA_PATH", "TOKENIZER_PATH", "DATA_DIR"):  # the scripts run in folders of their own
        if settings[name]:
            settings[name] = str(Path(settings[name]).resolve()) + "/" * (name == "DATA_DIR")
    return {**given, **{name: value for name, value in settings.items() if value}}


def pick_backend(folder: Path) -> tuple[str, str]:
    """The backend for both scripts; where FlashAttention 3 is absent, the path that finds the stand-in."""
    ranks = tg.Ranks.from_env(tg.Config(), {})  # it also says which of torch's attention may be used
    compiler = "aot_eager" if torch.cuda.is_available() else ""
    if importlib.util.find_spec("flash_attn_interface"):
        try:
            return choose_attention(tg.Config(attention_backend="fa3"), ranks, compiler), ""
        except tg.ConfigError as error:
            sys.exit(f"bench: {error}")
    backend = choose_attention(tg.Config(), ranks, compiler)
    folder.mkdir(parents=True, exist_ok=True)
    text = STAND_IN.format(script=str(ROOT / "train_gpt.py"), backend=backend)
    (folder / "flash_attn_interface.py").write_text(text)
    return backend, str(folder)


def ratios(runs: dict[str, list[dict]]) -> list[dict]:
    """Medians of both scripts and their ratio, for every number that both have."""
    rows = []
    names = ("before_tokens_per_second", "after_tokens_per_second", "before_ms_per_step", "after_ms_per_step")
    for name in (*names, "seconds_to_first_step", "peak_memory_mib"):
        values = {who: [r[name] for r in results if r.get(name)] for who, results in runs.items()}
        if all(values.values()):
            ours, theirs = (statistics.median(values[who]) for who in ("ours", "theirs"))
            spread = {who: (max(v) - min(v)) / statistics.median(v) for who, v in values.items()}
            row = {"number": name, "ours": ours, "theirs": theirs, "ours / theirs": ours / theirs}
            rows.append(row | {"spread_ours": spread["ours"], "spread_theirs": spread["theirs"]})
    return rows


def main() -> None:
    """Run both scripts in turn and print the ratios."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--script", type=Path, required=True, help="the other train_gpt.py")
    options.add_argument("--steps", type=int, default=60, help="training steps, the second half with looping")
    options.add_argument("--rounds", type=int, default=2, help="how often each script runs")
    options.add_argument("--gpus", type=int, default=1)
    options.add_argument(
        "--who", choices=("both", "ours", "theirs"), default="both", help="run one of them only"
    )
    options.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="more settings of both"
    )
    options.add_argument(
        "--until", choices=("train", "end"), default="train", help="stop after training or not"
    )
    options.add_argument("--limit", type=int, default=450, help="seconds that one run may take")
    options.add_argument("--out", type=Path, default=Path("runs") / time.strftime("peer-%Y%m%d-%H%M%S"))
    options.add_argument("--json", action="store_true")
    args = options.parse_args()
    if not args.script.is_file():
        sys.exit(f"bench: --script {args.script}: no such file")
    out = args.out.resolve()
    backend, path = pick_backend(out / "stand_in")
    settings = shared_settings(args, backend)
    environ = {
        **os.environ,
        **settings,
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "CONSOLE": "log",
    }
    scripts = {"ours": ROOT / "train_gpt.py", "theirs": args.script.resolve()}
    scripts = {who: script for who, script in scripts.items() if args.who in ("both", who)}
    runs = {who: [] for who in scripts}
    for number in range(args.rounds):
        for who, script in scripts.items():
            extra = {"PYTHONPATH": os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))}
            extra = {} if who == "ours" else extra
            runs[who].append(run(script, out / f"{who}_{number}", environ | extra, args))
    device = tg.Ranks(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    result = {"benchmark": "peer", **environment(device), "attention": backend, "stand_in": bool(path)}
    result |= {"steps": args.steps, "batch_tokens": args.batch_tokens, "script": str(args.script)}
    (out / "runs.json").write_text(json.dumps({**result, "runs": runs, "settings": settings}, indent=1))
    losses = {f"last_loss_{who}": list(results[-1]["losses"].values())[-1] for who, results in runs.items()}
    if args.who != "both":
        result |= runs[args.who][-1]
    report({**result, **losses}, ratios(runs) if args.who == "both" else [], args.json)


if __name__ == "__main__":
    sys.exit(main())
