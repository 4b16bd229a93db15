#!/usr/bin/env bash
# gloo's all_reduce with MAX or MIN keeps a NaN or drops it, by the place in the tensor and the rank that has it.
#
# Seen with torch 2.13.0 (CPU build, Python 3.11), two and three processes on gloo; one of them has only NaN, the
# others 1 + rank. torch.amax of the same numbers is NaN. Of a single number, such as a loss or a largest gradient,
# all_reduce keeps the NaN only if it is rank 0's; else it is dropped, and numbers are dropped with it: the MAX of 1,
# NaN, 3 is 1. Of 40 numbers in two processes one half is NaN and the other half is the other rank's number. MIN does
# the same, and SUM keeps every NaN. All ranks get the same result, so a check that they agree finds nothing, and
# nothing is raised. So a guard that takes the maximum over ranks to see a NaN anywhere misses it on most ranks, and
# clipping by the largest norm may go by a smaller one. Exit code 1 if any of that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$work/reduce.py" <<'PYTHON'
import json
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

CASES = [(name, size) for name in ("MAX", "MIN", "SUM") for size in (1, 40)]


def reduced(rank: int, world: int, folder: str) -> None:
    """Writes, by operation, size and rank with the NaN: how often each number is in what this rank has afterwards."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
    found = {}
    for name, size in CASES:
        for holder in range(world):
            own = torch.full((size,), float("nan") if rank == holder else 1.0 + rank)
            dist.all_reduce(own, op=getattr(dist.ReduceOp, name))
            values = [str(value) for value in own.tolist()]
            counts = {value: values.count(value) for value in sorted(set(values))}
            found[f"{world} processes, {name} of {size}, NaN on rank {holder}"] = counts
    with open(f"{folder}/{world}.{rank}", "w") as file:
        json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    found = {}
    for world in (2, 3):
        mp.spawn(reduced, (world, sys.argv[1]), nprocs=world)
        ranks = [json.load(open(f"{sys.argv[1]}/{world}.{rank}")) for rank in range(world)]
        if any(rank != ranks[0] for rank in ranks):
            raise SystemExit("expected all ranks to have the same")
        found |= ranks[0]
    for case, counts in found.items():
        print(f"{case}: {counts}")
    for name in ("MAX", "MIN"):
        for holder, other in ((0, "2.0"), (1, "1.0")):
            if found[f"2 processes, {name} of 40, NaN on rank {holder}"] != {other: 20, "nan": 20}:
                raise SystemExit("expected half of 40 numbers to be NaN")
        single = [found[f"2 processes, {name} of 1, NaN on rank {holder}"] for holder in (0, 1)]
        if single != [{"nan": 1}, {"1.0": 1}]:
            raise SystemExit("expected rank 0's NaN to be kept and rank 1's to be dropped")
    three = [found[f"3 processes, MAX of 1, NaN on rank {holder}"] for holder in range(3)]
    if three != [{"nan": 1}, {"1.0": 1}, {"2.0": 1}]:
        raise SystemExit("expected NaN, then 1 as the maximum of 1, NaN and 3, then 2")
    if not torch.tensor([1.0, float("nan"), 3.0]).amax().isnan():
        raise SystemExit("expected NaN as the maximum within one process")
    if any(set(counts) != {"nan"} for case, counts in found.items() if "SUM" in case):
        raise SystemExit("expected sums to be NaN")
PYTHON
"$work/venv/bin/python" "$work/reduce.py" "$work"
