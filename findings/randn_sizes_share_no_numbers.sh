#!/usr/bin/env bash
# On a CPU, torch.randn of two sizes under one seed may have no number in common.
#
# Seen with torch 2.13.0 (CPU build, Python 3.11): the normal numbers of a seed depend on how many are asked for.
# Up to 15 are drawn one after the other, 16 and more sixteen at a time, and where the size is no multiple of 16
# its last sixteen are drawn anew. So randn(15) is not the beginning of randn(16), nor randn(17) that of
# randn(32), and four rows of 20 drawn at once are not four draws of 20, while with rows of 16 they are. (The
# same holds of normal_, so also of initial weights and of adapters drawn for one document or for a batch.)
# torch.rand has no such step: shorter draws begin longer ones. Exit code 1 if any of that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$work/env/bin/python" - <<'PYTHON'
import sys

import torch


def begins(draw, short, long):
    """How many numbers of a short draw are those at the same places of a longer one under the same seed."""
    few, many = (draw(size, generator=torch.Generator().manual_seed(0)) for size in (short, long))
    return int((few == many[:short]).sum())


def rows_alike(draw, columns):
    """How many of four rows drawn at once are the same as one after the other."""
    together = draw(4, columns, generator=torch.Generator().manual_seed(0))
    one = torch.Generator().manual_seed(0)
    return sum(bool(torch.equal(row, draw(columns, generator=one))) for row in together)


print(f"torch {torch.__version__}")
found = {}
for draw in (torch.randn, torch.rand):
    for short, long in ((8, 15), (15, 16), (16, 32), (16, 17), (17, 32)):
        found[draw.__name__, short, long] = begins(draw, short, long)
        print(f"{draw.__name__}({short}) and {draw.__name__}({long}): {found[draw.__name__, short, long]} alike")
    for columns in (16, 20):
        found[draw.__name__, columns] = rows_alike(draw, columns)
        print(f"{draw.__name__}: {found[draw.__name__, columns]} of 4 rows of {columns} alike")
print([*found.values()])
sys.exit([*found.values()] != [8, 0, 16, 1, 1, 4, 0, 8, 15, 16, 16, 17, 4, 4])
PYTHON
