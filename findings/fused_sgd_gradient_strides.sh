#!/usr/bin/env bash
# torch's fused SGD on a CPU reads a gradient as if it lay in memory like its parameter.
#
# Seen with torch 2.13.0 (CPU build, Python 3.11): a gradient that is assigned to `.grad` as a transposed view,
# with the right shape and values, is applied in the order of its memory. SGD(fused=True) then adds the numbers
# to the wrong places of the parameter; nothing is raised. fused=False is right, and so is fused=True once the
# gradient is made contiguous. backward() lays gradients out like their parameters, so plain training is not
# hit; results of torch.autograd.grad, or gradients made by hand, are. Exit code 1 if any of that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$work/env/bin/python" - <<'PYTHON'
import sys

import torch


def after_one_step(fused: bool, contiguous: bool) -> list[float]:
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    gradient = torch.arange(12.0).view(4, 3).t()  # [3, 4], strides (1, 3)
    parameter.grad = gradient.contiguous() if contiguous else gradient
    torch.optim.SGD([parameter], lr=1.0, fused=fused).step()
    return (-parameter.detach()).flatten().int().tolist()


right = [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
found = {(fused, contiguous): after_one_step(fused, contiguous) for fused in (0, 1) for contiguous in (0, 1)}
print(f"torch {torch.__version__}")
for (fused, contiguous), values in found.items():
    print(f"fused={fused} contiguous={contiguous}: {values} {'right' if values == right else 'WRONG'}")
expected = {(0, 0): True, (0, 1): True, (1, 0): False, (1, 1): True}
sys.exit({key: values == right for key, values in found.items()} != expected)
PYTHON
