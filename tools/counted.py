"""Counted bytes of the record (as for eight H100s) and of the demo (on a CPU), by section of the script.

    python tools/counted.py [--json]

Neither a GPU nor data are needed: packing runs nothing. A section counts what the compressed script grows by
when it is added to those before it; JSON has the keys record_cuda and demo.
"""

import ast
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from command import start  # noqa: E402

# What follows may not be installed: `command` says so.
# isort: split
import train_gpt  # noqa: E402
from harness import packing, settings  # noqa: E402

SCRIPTS = {  # key -> preset, backends, whether on a GPU
    "record_cuda": ("pr1851", ("fa3", train_gpt.Config.triton_kernels, "inductor", 8), True),
    "demo": ("demo", ("plain", "eager", "", 2), False),
}


def read_house() -> dict[str, bytes]:
    """The files that may be counted, by their paths."""
    files = [ROOT / "train_gpt.py", *sorted((ROOT / "systems").glob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in files}


def section_starts(source: str) -> list[tuple[int, str]]:
    """First line and title of each numbered section of the core."""
    titles = re.finditer(r"(?m)^# ---- (\d+\. [^:(;\n]*?) *(?:-*$|[:(;])", source)
    return [(source.count("\n", 0, match.start()) + 1, match[1].strip()) for match in titles]


def sections(tree: ast.Module, starts: Sequence[tuple[int, str]]) -> Iterator[tuple[str, list[ast.stmt]]]:
    """The statements of a folded script by section, in their order."""
    groups: dict[str, list[ast.stmt]] = {}
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            name = "imports"
        elif part := getattr(node, "part", ""):
            name = part.replace(".", "/") + ".py"
        elif node.lineno < starts[0][0]:  # the class of the settings is made while packing
            name = "settings"
        else:
            name = [title for line, title in starts if line <= node.lineno][-1]
        groups.setdefault(name, []).append(node)
    yield from groups.items()


def count(key: str) -> dict:
    """Bytes of one script: all, and by section."""
    preset, backends, on_gpu = SCRIPTS[key]
    cfg, house = settings.read_settings({"PRESET": preset}), read_house()
    arguments = cfg, train_gpt.Backends(*backends), house, on_gpu
    total = len(packing.packed_script(*arguments)[0])
    tree, text, before, parts = packing.folded_tree(*arguments), "", 0, {}
    for name, nodes in sections(tree, section_starts(house["train_gpt.py"].decode())):
        text += packing.minify(ast.Module(nodes, []))[0] + "\n"
        size = len(packing.wrap(text.encode(), cfg))
        parts[name], before = size - before, size
    return {"bytes": total, "sections": parts}


def main(arguments: Sequence[str]) -> int:
    """Print a table, or JSON."""
    if set(arguments) - {"--json"}:
        print(__doc__, file=sys.stderr)
        return 2
    counts = {key: count(key) for key in SCRIPTS}
    if arguments:
        print(json.dumps(counts, indent=1))
        return 0
    names = dict.fromkeys(name for counted in counts.values() for name in counted["sections"])
    rows = [[name, *(counted["sections"].get(name, 0) for counted in counts.values())] for name in names]
    rows.append(["whole script", *(counted["bytes"] for counted in counts.values())])
    print(f"{'section':<40}" + "".join(f"{key:>14}" for key in counts))
    for name, *sizes in rows:
        print(f"{name:<40}" + "".join(f"{size:>14,}" for size in sizes))
    return 0


if __name__ == "__main__":
    start(main, sys.argv[1:])
