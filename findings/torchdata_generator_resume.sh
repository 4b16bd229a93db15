#!/usr/bin/env bash
# A StatefulDataLoader with a generator of its own, resumed, shuffles all later epochs otherwise than the run that went on.
#
# Seen with torchdata 0.11.0 and torch 2.13.0 (Python 3.11). The loader is there to resume in the middle of an epoch, and
# the rest of that epoch comes back right. But where it was given `generator=`, the way to make shuffling depend on a seed,
# and no worker processes, every epoch after it has an order that the uninterrupted run never had, also where the state was
# taken before the first batch or at an epoch's end. Nothing is said, and the number of batches is right. Without a
# generator, or with two workers, all epochs are those of the uninterrupted run. So a comparison of a resumed run with one
# that was not interrupted differs from the second epoch on. Exit code 1 if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torchdata==0.11.0 torch==2.13.0 numpy==2.4.6
cat > "$work/resume.py" <<'PYTHON'
import warnings

import torch

warnings.filterwarnings("ignore")
from torchdata.stateful_dataloader import StatefulDataLoader


def loader(seeded: bool, workers: int) -> StatefulDataLoader:
    generator = torch.Generator().manual_seed(7) if seeded else None
    torch.manual_seed(3)
    return StatefulDataLoader(range(40), batch_size=4, shuffle=True, num_workers=workers, generator=generator)


def epoch(batches: StatefulDataLoader) -> list:
    return [batch.tolist() for batch in batches]


def compared(seeded: bool, workers: int, taken: int) -> list[bool]:
    """Whether the rest of the first epoch, the second and the third are as without interruption."""
    whole = loader(seeded, workers)
    expected = [epoch(whole) for _ in range(3)]
    first = loader(seeded, workers)
    batches = iter(first)
    for _ in range(taken):
        next(batches)
    second = loader(seeded, workers)
    second.load_state_dict(first.state_dict())
    found = [epoch(second) for _ in range(3)]
    assert [len(part) for part in found] == [10 - taken, 10, 10]
    return [found[0] == expected[0][taken:], *(a == b for a, b in zip(found[1:], expected[1:]))]


if __name__ == "__main__":
    wanted = {(True, 0): [True, False, False], (False, 0): [True] * 3, (True, 2): [True] * 3, (False, 2): [True] * 3}
    for (seeded, workers), answer in wanted.items():
        for taken in (0, 3, 9):
            found = compared(seeded, workers, taken)
            name = f"{'with' if seeded else 'without'} generator, {workers} workers, state after {taken} batches"
            print(f"{name}: rest {found[0]}, epoch 2 {found[1]}, epoch 3 {found[2]}")
            if found != answer:
                raise SystemExit(f"expected {answer}")
PYTHON
"$work/venv/bin/python" "$work/resume.py"
