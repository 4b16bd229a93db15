"""What the audit's box (tools/auditing/box.py) costs: a program inside and outside of it.

    python bench/box.py [--repeats 4] [-- COMMAND ...]     # default: python -c "import torch"

    python bench/box.py [--repeats 4] [-- COMMAND ...]    # default: python -c "import torch"
both, wall clock and processor, and their ratios. Hashing the libraries that were opened is not in them: it is
done once an audit.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from auditing import box  # noqa: E402


def outside(command: list[str], folder: Path) -> None:
    """Run it as the box does, but for the box."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "TMPDIR": str(folder)}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True)


def inside(command: list[str], folder: Path) -> None:
    """Run it in the box. Raises NotChecked where there is none."""
    ran = box.run(command, folder)
    if ran.code:
        sys.exit(f"bench/box.py: exit code {ran.code} in the box: {ran.errors.strip()[-200:]}")


def seconds(run: object, command: list[str]) -> tuple[float, float]:
    """Wall clock and processor seconds of one run."""
    with tempfile.TemporaryDirectory() as folder:
        before, start = os.times(), time.perf_counter()
        run(command, Path(folder))
        wall, after = time.perf_counter() - start, os.times()
    return wall, sum(after[:4]) - sum(before[:4])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("command", nargs="*", default=[sys.executable, "-c", "import torch"])
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: must be at least 1")
    inside(options.command, Path(tempfile.mkdtemp()))  # libraries are hashed, files cached
    found = {outside: [], inside: []}
    for _ in range(options.repeats):
        for run in (outside, inside, inside, outside):
            found[run].append(seconds(run, options.command))
    means = [[sum(column) / len(column) for column in zip(*found[run], strict=True)] for run in found]
    for name, (wall, processor) in zip(("outside", "inside"), means, strict=True):
        print(f"{name:8} {wall:8.2f} s wall {processor:8.2f} s processor")
    ratios = [b / a for a, b in zip(*means, strict=True)]
    print(f"ratio    {ratios[0]:8.2f}        {ratios[1]:8.2f}")


if __name__ == "__main__":
    main()
