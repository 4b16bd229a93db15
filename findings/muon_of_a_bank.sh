#!/usr/bin/env bash
# Two packages' Muon do different things to a stack of matrices, and neither says so.
#
# Seen with pytorch_optimizer 4.1.0, muon-optimizer 0.1.0 and torch 2.13.0 (CPU build, Python 3.11): a parameter
# of three 8 x 8 matrices, [3, 8, 8], as models keep the weights of all layers in one bank. muon-optimizer makes
# each of the three nearly orthogonal: all singular values between 0.6 and 1.2. pytorch_optimizer takes the
# parameter for a convolution, as one matrix of 3 x 64, and makes that orthogonal: singular values of a layer's
# own update go from 0.003 to 0.66, so its layers compete for one update and some directions hardly move.
# Exit code 1 if any of that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 pytorch_optimizer==4.1.0 muon-optimizer==0.1.0
"$work/env/bin/python" - <<'PYTHON'
import sys

import torch
from muon import SingleDeviceMuon
from pytorch_optimizer import Muon

gradient = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))


def singular_values(optimizer, *options):
    """Of the first update: each layer's alone [3, 8], and of all layers as one matrix of 3 rows [3]."""
    bank = torch.nn.Parameter(torch.zeros(3, 8, 8))
    bank.grad = gradient.clone()
    optimizer(bank).step()
    update = bank.detach()
    return torch.linalg.svdvals(update), torch.linalg.svdvals(update.view(3, -1))


def told(values):
    return f"{values.min():.3f} to {values.max():.3f}"


each, whole = singular_values(lambda bank: SingleDeviceMuon([bank], lr=1.0))
each_too, whole_too = singular_values(lambda bank: Muon([{"params": [bank], "use_muon": True}], lr=1.0))
print(f"torch {torch.__version__}; singular values of the first update of three 8 x 8 matrices")
print(f"muon-optimizer:    of each {told(each)}, of the whole as 3 x 64 {told(whole)}")
print(f"pytorch_optimizer: of each {told(each_too)}, of the whole as 3 x 64 {told(whole_too)}")
apart = each.min() > 0.6 and each.max() < 1.2 and whole.min() > 1.3
as_one = each_too.min() < 0.1 and each_too.max() < 0.8 and 0.6 < whole_too.min() and whole_too.max() < 1.2
sys.exit(not (apart and as_one))
PYTHON
