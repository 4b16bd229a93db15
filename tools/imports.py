"""Say which imports of the repository's own names lead nowhere; a part of `make lint` that runs no file.

A module is looked up as Python would: beside the file that imports it, then in the folders that
pyproject.toml has for ruff and the tests. What is found nowhere there is not the repository's.
"""

import ast
import gc
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def own_files(root: Path) -> list[Path]:
    """The Python files of a checkout, those of hidden folders (.venv, .git), data and runs aside.

    The counted script of a run may lie anywhere: it is no text in UTF-8, as its first line says.
    """
    aside = {"data", "runs"}
    inside = [path.relative_to(root) for path in sorted(root.rglob("*.py"))]
    own = [root / path for path in inside if path.parts[0] not in aside and path.parts[0][0] != "."]
    return [path for path in own if not path.read_bytes().startswith(b"#coding:")]


def roots(root: Path) -> tuple[Path, ...]:
    """The folders that the repository's own commands and tests have on their path."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    named = [*settings["ruff"]["src"], *settings["pytest"]["ini_options"]["pythonpath"]]
    return tuple(root / name for name in named)


@cache
def find_module(name: str, folders: tuple[Path, ...]) -> Path | None:
    """The file or folder of a module; None where no folder has it. A folder of loose files comes last."""
    places = [folder / name.replace(".", "/") for folder in folders]
    for place in places:
        if place.with_suffix(".py").is_file():
            return place.with_suffix(".py")
        if (place / "__init__.py").is_file():
            return place
    return next((place for place in places if any(place.glob("*.py"))), None)


@cache
def tree_of(path: Path) -> ast.Module:
    """The parsed text of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def bound(node: ast.AST) -> Iterator[str]:
    """The names that a module's statements bind at its top level, in `if`, `try` and `with` too."""
    for part in ast.iter_child_nodes(node):
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield part.name
        elif isinstance(part, ast.alias):
            yield part.asname or part.name.partition(".")[0]
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            yield part.id
        else:
            yield from bound(part)


@cache
def names_of(module: Path) -> frozenset[str]:
    """What can be imported from a module, or from a package: its own names and the modules in it."""
    if module.is_file():
        return frozenset(bound(tree_of(module)))
    inside = {path.stem for path in module.glob("*.py")}
    inside |= {path.parent.name for path in module.glob("*/*.py")}
    start = module / "__init__.py"
    return frozenset(inside) | (names_of(start) if start.is_file() else frozenset())


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """All statements below a node: expressions hold no imports, and most nodes are expressions."""
    for part in ast.iter_child_nodes(node):
        if isinstance(part, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield part
            yield from statements(part)


def wrong_imports(path: Path, folders: tuple[Path, ...]) -> Iterator[str]:
    """One line for each name that a file takes from a module of the repository which has no such name."""
    search = (path.parent, *folders)
    for node in statements(tree_of(path)):
        of_a_module = isinstance(node, ast.ImportFrom)
        for alias in node.names if of_a_module or isinstance(node, ast.Import) else []:
            name = node.module if of_a_module else alias.name
            module = find_module(name, search)
            if module is None and find_module(name.partition(".")[0], search):
                yield f"{path}:{node.lineno}: there is no module {name}"
            elif module and of_a_module and alias.name not in names_of(module):
                yield f"{path}:{node.lineno}: {name} has no {alias.name}"


def main(root: Path) -> int:
    """Exit code 1 where an import leads nowhere; each is one line."""
    folders = roots(root)
    wrong = [line for path in own_files(root) for line in wrong_imports(path, folders)]
    print(*wrong, sep="\n", end="\n" * bool(wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    gc.disable()  # trees are no garbage, and to look for some takes three times as long as to parse
    sys.exit(main(ROOT))
