#!/usr/bin/env bash
# Triton's interpreter computes with the bit patterns of bfloat16 numbers: the sum of 1, 2, -3, 4 is -0.0.
#
# Seen with triton 3.9.0, torch 2.13.0 (CPU build), Python 3.11, TRITON_INTERPRET=1, the way in which kernels
# are tested on a machine without a GPU. The interpreter holds bfloat16 as unsigned 16-bit integers. A product of two,
# tl.max and tl.min convert them; tl.sum, the minus sign, a product with 2, tl.sort and tl.maximum with 0 work on the
# integers, and what comes out is read as bfloat16 again. The conversion of float32 to bfloat16 cuts the last bits off,
# where a GPU and torch round to the nearest. float16 is right, and so is bfloat16 converted to float32 first, which is
# what Triton's guide to debugging asks for; but no error and no warning tells it. Exit code 1 if any of that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/compute.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def compute(source, target, count: tl.constexpr):
    at = tl.arange(0, count)
    values = tl.load(source + at)
    tl.store(target, tl.sum(values, 0).to(tl.float32))
    tl.store(target + 1, tl.sum(values.to(tl.float32), 0))
    tl.store(target + 2, tl.max(values, 0).to(tl.float32))
    tl.store(target + count + at, (-values).to(tl.float32))
    tl.store(target + 2 * count + at, (values * 2).to(tl.float32))
    tl.store(target + 3 * count + at, tl.sort(values).to(tl.float32))
    tl.store(target + 4 * count + at, tl.maximum(values, 0).to(tl.float32))


@triton.jit
def convert(source, target):
    tl.store(target, tl.load(source).to(tl.bfloat16).to(tl.float32))


NAMES = "(sum, sum in float32, max)", "minus", "times 2", "sorted", "maximum with 0"
WRONG = (
    [-0.0, 4.0, 4.0, 0.0],
    [-4.0, -2.0, 1.5, -1.0],
    [0.0, 0.0, 0.0, 0.0],
    [1.0, 2.0, 4.0, -3.0],
    [1.0, 2.0, -3.0, 4.0],
)
values = torch.tensor([1.0, 2.0, -3.0, 4.0])
right = [[4.0, 4.0, 4.0, 0.0], *(v.tolist() for v in (-values, values * 2, values.sort().values, values.clamp(min=0)))]
for kind in (torch.float32, torch.float16, torch.bfloat16):
    target = torch.zeros(20)
    compute[(1,)](values.to(kind), target, 4)
    found = target.view(5, 4).tolist()
    for name, own, wanted in zip(NAMES, found, WRONG if kind is torch.bfloat16 else right):
        print(f"triton {triton.__version__}, {kind}, {name}: {own}")
        if str(own) != str(wanted):
            raise SystemExit(f"expected {wanted}")
number, target = torch.tensor([1 + 3 / 256]), torch.zeros(1)
convert[(1,)](number, target)
print(f"{number.item()} in bfloat16: interpreter {target.item()}, torch {number.bfloat16().item()}")
if (target.item(), number.bfloat16().item()) != (1.0078125, 1.015625):
    raise SystemExit("expected 1.0078125 and 1.015625")
PYTHON
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 triton==3.9.0 numpy
TRITON_INTERPRET=1 "$work/venv/bin/python" "$work/compute.py"
