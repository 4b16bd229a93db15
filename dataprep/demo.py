"""Documents of the demo data set: Python's own documentation, so that nothing has to be downloaded."""

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from dataprep.reading import Document, make_document
from dataprep.shards import DataError

DEMO_VAL_DOCS = 40  # about 110 kB
DEMO_VOCAB = 1024
DEMO_MIN_CHARACTERS = 200  # modules with less documentation are left out


def demo_documents(library: Path | None = None) -> list[Document]:
    """Python's own documentation: the help topics, and the docstrings of each module of `library`.

    Sources are parsed, never imported. Sorted by hash of the name, so that the first ones are a fair sample.

    Args:
        library: folder of the standard library; that of the running interpreter if not given.

    Raises:
        DataError: there are no sources to read there.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    texts = {f"help {topic}": text for topic, text in _topics(library)}
    for path in library.rglob("*.py"):
        module = path.relative_to(library).with_suffix("").parts
        if {"test", "tests", "idlelib"} & set(module) or not all(part.isidentifier() for part in module):
            continue  # site-packages and build folders are no identifiers
        name = ".".join(module).removesuffix(".__init__")
        text = "\n\n".join(_docstrings(_parse(path), name))
        if len(text) >= DEMO_MIN_CHARACTERS:
            texts[f"docstrings {name}"] = text
    if len(texts) <= DEMO_VAL_DOCS:
        raise DataError(f"{library}: holds too little documentation for the demo ({len(texts)} modules)")
    names = sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())
    return [make_document(texts[name], name) for name in names]


def _topics(library: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each help topic: the dictionary that `pydoc_data.topics` assigns."""
    path = library / "pydoc_data" / "topics.py"
    for statement in _parse(path).body if path.exists() else []:
        if isinstance(statement, ast.Assign):
            yield from ast.literal_eval(statement.value).items()


def _parse(path: Path) -> ast.Module:
    """Syntax tree of a source file; an empty one where it is not written for this Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return ast.Module([], [])


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    """Name and docstring of a definition and of those inside it, in the order of the source."""
    definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    if isinstance(node, definition) and (text := ast.get_docstring(node)):
        yield f"{name}\n\n{text}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield from _docstrings(child, f"{name}.{child.name}" if hasattr(child, "name") else name)
