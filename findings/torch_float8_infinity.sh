#!/usr/bin/env bash
# torch turns an infinity into the finite 448 when it is stored as float8_e4m3fn; the other 8-bit formats keep a trace.
#
# Seen with torch 2.13.0 (CPU build, Python 3.11), from float32 and bfloat16 alike. float8_e4m3fn saturates: 500, 1e6 and
# infinity all become 448, and only NaN stays NaN, which the format has. float8_e5m2 gives infinity for what is too large,
# and float8_e4m3fnuz and float8_e5m2fnuz give NaN, as does float8_e8m0fnu for infinity; that one also drops the sign:
# -1e6 becomes 1048576. So a weight or a gradient that has overflowed passes a test for finite values once it has gone
# through the most common of these formats, and is seen in the other four. Exit code 1 if any of that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$work/convert.py" <<'PYTHON'
import torch

values = [500.0, 1e6, -1e6, float("inf"), float("-inf"), float("nan")]
expected = {
    torch.float8_e4m3fn: "[448.0, 448.0, -448.0, 448.0, -448.0, nan]",
    torch.float8_e5m2: "[512.0, inf, -inf, inf, -inf, nan]",
    torch.float8_e4m3fnuz: "[nan, nan, nan, nan, nan, nan]",
    torch.float8_e5m2fnuz: "[512.0, nan, nan, nan, nan, nan]",
    torch.float8_e8m0fnu: "[512.0, 1048576.0, 1048576.0, nan, nan, nan]",
}
print(f"torch {torch.__version__}: {values}")
for kind, wanted in expected.items():
    for source in (torch.float32, torch.bfloat16):
        found = torch.tensor(values, dtype=source).to(kind).float().tolist()
        print(f"{source} to {kind}: {found}")
        if str(found) != wanted:
            raise SystemExit(f"expected {wanted}")
PYTHON
"$work/venv/bin/python" "$work/convert.py"
