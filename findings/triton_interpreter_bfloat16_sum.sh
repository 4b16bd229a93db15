#!/usr/bin/env bash
# Triton's interpreter adds the bit patterns of bfloat16 numbers: tl.sum of 1, 2, -3, 4 is -0.0.
#
# Seen with triton 3.6.0 and 3.9.0, torch 2.13.0 (CPU build), Python 3.11, TRITON_INTERPRET=1, the way in which kernels
# are tested on a machine without a GPU. The interpreter holds bfloat16 as unsigned 16-bit integers. Products, comparisons,
# tl.max and tl.min convert them; tl.sum gives the integers to numpy's sum, and what comes out is read as bfloat16 again.
# float32 and float16 are right (4.0), and so is bfloat16 converted to float32 before the sum. Nothing is said: a test that
# compares a kernel with itself, or only for finite values, passes. Exit code 1 if any of that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/sums.py" <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def sums(source, target, count: tl.constexpr):
    values = tl.load(source + tl.arange(0, count))
    tl.store(target, tl.sum(values, 0).to(tl.float32))
    tl.store(target + 1, tl.sum(values.to(tl.float32), 0))
    tl.store(target + 2, tl.max(values, 0).to(tl.float32))


expected = {torch.float32: [4.0, 4.0, 4.0], torch.float16: [4.0, 4.0, 4.0], torch.bfloat16: [-0.0, 4.0, 4.0]}
for kind, wanted in expected.items():
    target = torch.empty(3)
    sums[(1,)](torch.tensor([1.0, 2.0, -3.0, 4.0]).to(kind), target, 4)
    print(f"triton {triton.__version__}, {kind}: sum, sum in float32, max: {target.tolist()}")
    if str(target.tolist()) != str(wanted):
        raise SystemExit(f"expected {wanted}")
PYTHON
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
for version in 3.6.0 3.9.0; do
  "$work/venv/bin/pip" install --quiet --disable-pip-version-check "triton==$version"
  TRITON_INTERPRET=1 "$work/venv/bin/python" "$work/sums.py"
done
