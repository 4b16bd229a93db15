#!/usr/bin/env bash
# ZipNN's compress() overwrites what it is asked to compress: the weights in memory are other numbers afterwards.
#
# Seen with zipnn 0.5.4 (Python 3.11), on float32 and bfloat16. To pack exponents together, ZipNN rotates the sign bit
# of each number to the other end, in the caller's own memory, and does not turn it back. What it returns is right and
# gives the original back when decompressed, but the tensor is lost: 1.0 is 1.7e38 afterwards, with no warning. So a
# model that is saved in the middle of training goes on with nonsense, and the second compression of the same tensor
# keeps the nonsense. In the format "byte" the contents of a Python `bytes` object change, which the language holds for
# constant. float16 stays as it was, and so does a transposed view, which is copied first. Compressing a clone is the
# way round it. Exit code 1 if any of that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check zipnn==0.5.4 torch==2.13.0 numpy==2.4.6
cat > "$work/compress.py" <<'PYTHON'
import torch
from zipnn import ZipNN


def both_survive(values: torch.Tensor) -> tuple[bool, bool]:
    """Whether the tensor is the same after compression, and whether what was compressed is."""
    before = values.clone()
    packed = bytes(ZipNN(input_format="torch").compress(values))
    back = ZipNN(input_format="torch").decompress(packed)
    return torch.equal(values, before), torch.equal(back, before)


torch.manual_seed(0)
weights = torch.randn(300, 400)
found = {
    "float32": both_survive(weights.clone()),
    "bfloat16": both_survive(weights.bfloat16()),
    "float16": both_survive(weights.half()),
    "float32, transposed view": both_survive(weights.clone().t()),
}
for name, (kept, right) in found.items():
    print(f"{name}: input {'kept' if kept else 'OVERWRITTEN'}, decompressed {'right' if right else 'WRONG'}")

ones = torch.ones(300, 400)
packed = [bytes(ZipNN(input_format="torch").compress(ones)) for _ in range(2)]
stored = [f"{ZipNN(input_format='torch').decompress(part)[0, 0].item():.4g}" for part in packed]
print(f"1.0 compressed twice: the first time {stored[0]} is stored, the second time {stored[1]}")

constant = weights.bfloat16().view(torch.uint8).numpy().tobytes()
copy = bytearray(constant)
ZipNN(input_format="byte", bytearray_dtype="bfloat16").compress(constant)
print(f"a bytes object of {len(copy):,} bytes: {sum(a != b for a, b in zip(constant, copy)):,} are others afterwards")

if list(found.values()) != [(False, True), (False, True), (True, True), (True, True)]:
    raise SystemExit("expected float32 and bfloat16 to be overwritten, and all to come back right")
if stored != ["1", "1.701e+38"] or constant == copy:
    raise SystemExit("expected 1 and 1.701e+38, and bytes that have changed")
PYTHON
"$work/venv/bin/python" "$work/compress.py"
