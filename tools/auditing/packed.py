"""Check W4: the counted script trains as the script that ran. What folding leaves out is noticed here.

S5 packs the script that ran again, by its own packing: what that leaves out by mistake, as a part of an
optimiser, it leaves out again. So the counted script is started in the box on the run's own training data,
and stopped behind its first steps. Their losses and gradients hang on weights, data, the backward pass and,
from the second step on, on both optimisers.
"""

import contextlib
import functools
import math
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from auditing import box
from auditing.artifact import counted_code, need_its_device
from auditing.recompute import runs_on_gpu
from auditing.run import RECOMPUTED, Audit, Failed, NotChecked, check, require, write_values
from auditing.weights import NORM_FACTOR, first_steps, step_bound, told_steps, trains

STEPS = 3  # the second tells of the first update, the third of momentum
SECONDS_CPU, SECONDS_GPU = 300.0, 1800.0  # until those steps; on a GPU graphs are compiled first
DOCUMENTS = 2  # of the validation set, which some runs score before the first step


def _start_of_validation(audit: Audit, folder: Path) -> None:
    """The first documents of the validation set, with their bytes: what a training has to read anyway."""
    end = sum(audit.documents[min(DOCUMENTS, len(audit.documents)) - 1])
    write_values(folder / "fineweb_val_000000.bin", audit.tokens[:end])
    if audit.cfg.caseops_enabled:
        write_values(folder / "fineweb_val_bytes_000000.bin", audit.sidecar[:end])


def _events(output: str) -> dict[int, dict[str, float]]:
    """Loss and gradient of each step, as a log line tells them; a line that is not whole tells nothing."""
    number = r"(\S+)(?= )"
    line = rf"(?m)^train step:(\d+) train_loss:{number} grad_norm:{number} .*\n"
    found = {}
    for step, *values in re.findall(line, output):
        try:
            found[int(step)] = dict(zip(("train_loss", "grad_norm"), map(float, values), strict=True))
        except ValueError:
            continue
    return found


@functools.cache
def trained_alone(audit: Audit, steps: int) -> box.Ran:
    """Counted script, training shards, tokenizer and a little validation text in the box, up to a step."""
    folder = (audit.work / "counted").resolve()
    folder.mkdir(exist_ok=True)
    _start_of_validation(audit, folder)
    shards = [path.resolve() for path in audit.shards("train")]
    for number, path in enumerate(shards):
        (folder / f"fineweb_train_{number:06d}.bin").symlink_to(path)
    packed, tokenizer = counted_code(audit), audit.script.tokenizer_file(audit.cfg)
    for path in (packed, tokenizer):
        (folder / path.name).write_bytes(path.read_bytes())
    settings: dict[str, object] = dict.fromkeys(("QUANTIZE_ONLY", "TTT_EVAL_ONLY", "PREQUANT_ONLY"), 0)
    settings |= {"SEED": audit.cfg.seed, "DATA_PATH": folder, "TOKENIZER_PATH": tokenizer.name}
    settings |= {"ARTIFACT_DIR": "out", "RUN_ID": "counted", "PYTHONUNBUFFERED": 1}
    threads = audit.result["environment"].get("threads")
    if not runs_on_gpu(audit) and type(threads) is int and 0 < threads <= (os.cpu_count() or 1):
        settings |= {"CPU_THREADS": threads}  # sums have the order that they had
    kept = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    settings |= {name: os.environ[name] for name in kept if name in os.environ}
    return box.run(
        [sys.executable, packed.name],
        folder,
        readable=shards,
        environment={name: str(value) for name, value in settings.items()},
        timeout=SECONDS_GPU if runs_on_gpu(audit) else SECONDS_CPU,
        enough=lambda output: steps in _events(output.decode(errors="replace")),
    )


def _how_it_ended(ran: box.Ran) -> str:
    last = (ran.errors.strip().splitlines() or ran.output.strip().splitlines() or [""])[-1][:200]
    return f"exit code {ran.code}: {last}"


def _compared(audit: Audit, told: Mapping[int, Mapping], found: Mapping[int, Mapping]) -> float:
    """The largest relative difference. Raises Failed where a step differs by more than rounding.

    Where the repository's own script gives the bits of the run here, rounding explains nothing.
    """
    worst, exact = 0.0, False
    with contextlib.suppress(Failed, NotChecked):  # which W1 says
        exact = first_steps(audit)[1]
    for step, values in found.items():
        bound = 0.0 if exact else step_bound(audit, step)
        for (name, value), factor in zip(values.items(), (1, NORM_FACTOR), strict=True):
            ours = float(f"{told[step][name]:.6g}")  # as a log line has it
            same = math.isclose(ours, value, rel_tol=factor * bound)
            require(
                same, f"step {step}: {name} {ours:.6g} in metrics.jsonl, {value:.6g} of the counted script"
            )
            worst = max(worst, abs(ours - value) / max(abs(value), 1e-30))
    return worst


@check("W4", "the counted script trains as the run did: its first steps", RECOMPUTED)
def w4_counted_script_trains(audit: Audit) -> str:
    """The counted script's first steps in the box, beside those that the run told."""
    trains(audit)
    need_its_device(audit)
    told = told_steps(audit)
    last = min(STEPS, max(told))
    if last < min(2, audit.result["steps"]):
        raise NotChecked("one step alone can be repeated, which tells nothing of the optimisers")
    ran = trained_alone(audit, last)
    found = {step: values for step, values in _events(ran.output).items() if step <= last}
    if ran.timed_out and not found:
        raise NotChecked(f"the counted script came to no step of training in {ran.seconds:.0f} s here")
    lacking = sorted({*range(1, last + 1)} - found.keys())
    told_so = f"the counted script tells no step {lacking[:1]}, {_how_it_ended(ran)}"
    require(ran.timed_out or not lacking, told_so)
    refused = [name for name in ran.refused if not name.startswith("network ")]
    require(not refused, f"the counted script wanted {', '.join(refused)[:200]}")
    worst = _compared(audit, told, found)
    agree = f"within {worst:.0e}" if worst else "to every digit that it prints"
    return f"{len(found)} steps of the counted script as the run told, {agree}"
