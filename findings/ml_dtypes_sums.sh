#!/usr/bin/env bash
# NumPy's sum and mean of ml_dtypes arrays are made in the array's own type: the mean of losses of 4.5 is 0.2, of ones in int4 0.
#
# Seen with ml_dtypes 0.6.0 and numpy 2.4.6 (Python 3.11). NumPy sums its own small integers in int64 and takes means of
# float16 in float32. The types that ml_dtypes adds (bfloat16 of safetensors and JAX checkpoints, float8, int4) have
# neither: the running sum is rounded to the type at every step. In bfloat16 it stands still as soon as it is 256 times an
# addend: ten thousand losses around 4.5 have a "mean" of 0.205, and ones of any number above 256 the sum 256. A hundred
# ones in int4 have the sum 4, as it wraps, and the mean 0. Nothing warns. `dtype=np.float32` in the call is the way round
# it; a matrix product is returned in float32 and is right. Exit code 1 if any of that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check ml_dtypes==0.6.0 numpy==2.4.6
cat > "$work/sums.py" <<'PYTHON'
import ml_dtypes
import numpy as np

losses = np.random.default_rng(0).normal(4.5, 1, 10_000).astype(np.float32)
means = {
    "float32": float(losses.mean()),
    "float16": float(losses.astype(np.float16).mean()),
    "bfloat16": float(losses.astype(ml_dtypes.bfloat16).mean()),
    "bfloat16, dtype=float32": float(losses.astype(ml_dtypes.bfloat16).mean(dtype=np.float32)),
}
for name, mean in means.items():
    print(f"mean of 10,000 losses in {name}: {mean:.4f}")

sums = {}
for name in ("int8", "int4", "bfloat16", "float8_e4m3fn"):
    ones = np.ones(300, getattr(ml_dtypes, name, name))
    sums[name] = float(ones.sum()), float(ones.mean())
    print(f"300 ones in {name}: sum {sums[name][0]:g}, mean {sums[name][1]:g}, sum in float32 {ones.sum(dtype=np.float32):g}")

matrix = np.ones((2, 300), ml_dtypes.bfloat16)
product = matrix @ matrix.T
print(f"product of rows of 300 ones in bfloat16: {product[0, 0]:g}, in {product.dtype}")

near = [abs(means[name] - means["float32"]) < 0.01 for name in ("float16", "bfloat16, dtype=float32")]
if not all(near) or not 0.1 < means["bfloat16"] < 0.3:
    raise SystemExit("expected the mean to be right but in bfloat16 without an argument")
if list(sums.values()) != [(300, 1), (-4, 0), (256, 0.8515625), (16, 0.0546875)] or product[0, 0] != 300:
    raise SystemExit("expected sums of 300, -4, 256 and 16, and a product of 300")
PYTHON
"$work/venv/bin/python" "$work/sums.py"
