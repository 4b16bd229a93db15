#!/usr/bin/env bash
# torch's FlopCounterMode counts nothing of attention where that runs on a CPU.
#
# Seen with torch 2.13.0 (CPU build, Python 3.11): scaled_dot_product_attention of [1, 4, 64, 32] has
# 2,097,152 FLOPs in its two products. On a CPU the counter says 0, with is_causal, with a mask and without, with
# enable_gqa and with the backward pass too: the operator that a CPU takes is not in its table. Held to the
# reference kernel (SDPBackend.MATH), the same call counts all of it. So the FLOPs of a transformer, or a model's
# utilisation, from a count on a laptop lack the attention, and nothing says so. A product with a vector counts
# as 0 as well. Exit code 1 if any of that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$work/env/bin/python" - <<'PYTHON'
import contextlib
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

q = torch.randn(1, 4, 64, 32, requires_grad=True)
products = 2 * (2 * 4 * 64 * 64 * 32)  # queries by keys, shares by values
triangle = torch.ones(64, 64, dtype=torch.bool).tril()


def counted(call, backward=False, kernel=None):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(kernel) if kernel else contextlib.nullcontext():
        result = call()
        if backward:
            result.sum().backward()
    return counter.get_total_flops()


def attend(keys=q, **how):
    return F.scaled_dot_product_attention(q, keys, keys, **how)


found = {
    "attention": counted(attend),
    "causal": counted(lambda: attend(is_causal=True)),
    "masked": counted(lambda: attend(attn_mask=triangle)),
    "two heads of keys": counted(lambda: attend(q[:, :2], enable_gqa=True)),
    "causal, with backward": counted(lambda: attend(is_causal=True), backward=True),
    "causal, reference kernel": counted(lambda: attend(is_causal=True), kernel=SDPBackend.MATH),
    "matrix by matrix": counted(lambda: q[0, 0] @ q[0, 0].T),
    "matrix by vector": counted(lambda: q[0, 0] @ q[0, 0, 0]),
}
print(f"torch {torch.__version__}; the attention's products: {products} FLOPs")
for what, flops in found.items():
    print(f"{what:<26}{flops:>9}")
expected = [0, 0, 0, 0, 0, products, 2 * 64 * 64 * 32, 0]
sys.exit([*found.values()] != expected)
PYTHON
