"""How fast is the PPM-D model of experiments/ppmd.py, and how well does it predict?

    head -c 100000000 FILE | python bench/ppm.py [--json]

Reads bytes from standard input, one process, one core. Seconds are the processor's, so that other jobs count
only by the memory they take; compilation is not counted.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))

from ppmd import PPMD  # noqa: E402

BLOCK = 1 << 20  # bytes


def measure(data: np.ndarray) -> dict[str, float]:
    """Speed, bits per byte and size of the trie after reading bytes [n]."""
    PPMD().advance(data[:100])  # compiles
    model, bits, seconds = PPMD(), 0.0, 0.0
    for start in range(0, len(data), BLOCK):
        before = time.process_time()
        probabilities, _ = model.advance(data[start : start + BLOCK])
        seconds += time.process_time() - before
        bits -= float(np.log2(probabilities).sum())
    return {
        "bytes": len(data),
        "seconds": seconds,
        "megabytes_per_second": len(data) / 1e6 / seconds,
        "bits_per_byte": bits / len(data),
        "nodes": model.nodes,
    }


def main() -> None:
    """Print one table, or one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    data = np.frombuffer(sys.stdin.buffer.read(), np.uint8)
    if not len(data):
        parser.error("standard input is empty")
    figures = measure(data)
    rows = [
        f"{name:<22}{value:.5g}" if isinstance(value, float) else f"{name:<22}{value:,}"
        for name, value in figures.items()
    ]
    print(json.dumps(figures) if options.json else "\n".join(rows))


if __name__ == "__main__":
    main()
