"""The house that ran, imported as a package of its own: its modules never reach the repository's files."""

import ast
import functools
import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

from scripts import PARTS, HouseError, sha256_of

OWN = ("train_gpt", *PARTS)  # the top-level names by which modules of the house import each other


def moved_imports(source: str, package: str) -> str:
    """The source, whose imports of the house's modules are those of a package; all line numbers stay."""
    lines = source.split("\n")
    for line, start, end, text in _edits(source):
        old = lines[line - 1].encode()  # Python counts columns in bytes
        lines[line - 1] = (old[:start] + text.replace("*", package).encode() + old[end:]).decode()
    return "\n".join(lines)


@functools.cache  # most of the houses that one process looks at are the same
def _edits(source: str) -> list[tuple[int, int, int, str]]:
    """Line, first column, column behind and new text (`*` the package) of the house's imports, last first."""
    return sorted(_imports(ast.parse(source)), reverse=True)


def _imports(tree: ast.AST) -> Iterator[tuple[int, int, int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and _root(node.module) in OWN:
            start = node.col_offset + len("from ")
            yield node.lineno, start, start + len(node.module), f"*.{node.module}"
        for alias in node.names if isinstance(node, ast.Import) else ():
            root = _root(alias.name)
            if root in OWN:
                bound = alias.name if alias.asname else root  # `import a.b` gives the name `a`
                text = f"*.{bound} as {alias.asname or root}"
                text += f", *.{alias.name}" if bound != alias.name else ""
                yield alias.lineno, alias.col_offset, alias.end_col_offset, text


def _root(module: str | None) -> str:
    return (module or "").partition(".")[0]


class AuditedHouse:
    """Names of train_gpt.py, harness/ and systems/ as they ran, found as attributes of one object."""

    def __init__(self, sources: Mapping[str, bytes], folder: Path):
        """Write a house (sources by path) into a folder as a package of its own and import all of it.

        Raises HouseError where a module cannot be imported, for whatever reason.
        """
        self.sources = dict(sources)
        self.package = f"audited_{sha256_of(repr([folder, *sources.items()]).encode())[:8]}"
        files = {"__init__.py": b""} | {f"{part}/__init__.py": b"" for part in PARTS} | self.sources
        for path, source in files.items():
            target = folder / self.package / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(moved_imports(source.decode(), self.package), encoding="utf-8")
        sys.path.insert(0, str(folder))
        importlib.invalidate_caches()
        try:
            self.modules = [self._module(path) for path in self.sources]
        except Exception as error:
            raise HouseError(f"its script cannot be imported ({type(error).__name__}: {error})") from None
        finally:
            sys.path.remove(str(folder))

    def _module(self, path: str) -> ModuleType:
        name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        return importlib.import_module(f"{self.package}.{name}")

    def __getattr__(self, name: str) -> object:
        """What a name is in the module that defines it (or, where none does, in the first that has it)."""
        has = [module for module in vars(self).get("modules", ()) if name in vars(module)]
        if not has:
            raise AttributeError(f"nothing in the script under audit is called {name}")
        made = (m for m in has if getattr(vars(m)[name], "__module__", "") == m.__name__)
        return vars(next(made, has[0]))[name]

    def forget(self) -> None:
        """Take the modules out of Python's table."""
        for name in [name for name in sys.modules if _root(name) == self.package]:
            del sys.modules[name]
