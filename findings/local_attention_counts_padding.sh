#!/usr/bin/env bash
# local-attention's autopad lets the last window look at its own padding: a mean of ones comes out as 0.25.
#
# Seen with local-attention 1.11.2, torch 2.13.0 (CPU build), Python 3.11. With autopad=True a sequence whose length is
# no multiple of the window is filled up with zeros, and the output is cut back to the length. Without causal=True
# nothing keeps the real positions from those zeros: their scores are 0, not minus infinity, and they take their share
# of the softmax. Here all values are 1, so that each output, a weighted mean of them, has to be 1; with 10 positions in
# windows of 8, only 2 of the last window's 8 keys are real. No error and no warning. A mask that calls every position
# True is filled up with False and gives the right numbers, as do causal=True and a length that needs no filling; so
# training on full blocks is right, and an evaluation of the last short one is not. Exit code 1 if any of that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check local-attention==1.11.2 torch==2.13.0 numpy==2.4.6
cat > "$work/attend.py" <<'PYTHON'
import torch
from local_attention import LocalAttention

WINDOW = 8


def means(length: int, causal: bool, mask: bool, backward: int) -> list[float]:
    """What attention makes of values that are all 1, by position; queries and keys are 0, so all weights are equal."""
    attend = LocalAttention(
        window_size=WINDOW, causal=causal, look_backward=backward, look_forward=0, autopad=True,
        use_rotary_pos_emb=False,
    )
    zeros, ones = torch.zeros(1, 1, length, 4), torch.ones(1, 1, length, 4)
    seen = torch.ones(1, length, dtype=torch.bool) if mask else None
    return [round(value, 6) for value in attend(zeros, zeros, ones, mask=seen)[0, 0, :, 0].tolist()]


for length, causal, mask, backward, last in (
    (10, False, False, 0, 0.25),  # 2 of 8 keys
    (10, False, False, 1, 0.625),  # 10 of 16
    (15, False, False, 1, 0.9375),  # 15 of 16
    (16, False, False, 1, 1.0),
    (10, False, True, 0, 1.0),
    (10, True, False, 0, 1.0),
):
    found = means(length, causal, mask, backward)
    print(f"length {length}, causal={causal}, look_backward={backward}, mask={mask}: last {found[-1]}")
    if found != [1.0] * WINDOW + [last] * (length - WINDOW):
        raise SystemExit(f"expected ones and then {last}, found {found}")
PYTHON
"$work/venv/bin/python" "$work/attend.py"
