"""The house itself: its sizes, what may import what, no name twice where the packer makes one file of it."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORE, HARNESS, SYSTEMS = "train_gpt.py", "harness", "systems"
CORE_LINES, PART_LINES, FUNCTION_LINES = 3300, 400, 60


def sources() -> dict[str, str]:
    """Text of the script and of what stands beside it, by file."""
    parts = [path for part in (HARNESS, SYSTEMS) for path in sorted((ROOT / part).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in (ROOT / CORE, *parts)}


SOURCES = sources()
TREES = {name: ast.parse(text) for name, text in SOURCES.items()}
EARLY, EARLY_FILE = "import systems.early", "systems/early.py"  # before the libraries; never counted
# Core and systems/: one file when packed.
COUNTED = [name for name in SOURCES if not name.startswith(HARNESS) and name != EARLY_FILE]


def imported(node: ast.AST) -> list[str]:
    """Top-level packages that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    return [node.module.split(".")[0]] if isinstance(node, ast.ImportFrom) and node.module else []


def run_on_import(tree: ast.AST) -> Iterator[ast.AST]:
    """All statements but those inside functions and under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not typing and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from run_on_import(node)


def definitions(tree: ast.Module) -> Iterator[str]:
    """Names that a module defines at its top level; imports are no definitions."""
    for node in run_on_import_top(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets if isinstance(node, ast.Assign | ast.AnnAssign) else []:
            yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))


def run_on_import_top(tree: ast.Module) -> Iterator[ast.AST]:
    """The statements of the module itself, those of `if` and `with` among them."""
    for node in tree.body:
        yield node
        if isinstance(node, ast.If | ast.With | ast.Try | ast.For):
            yield from ast.walk(node)


# -- sizes


def test_the_script_can_be_read_in_one_sitting():
    assert len(SOURCES[CORE].splitlines()) <= CORE_LINES


def test_files_beside_it_are_short():
    lines = {name: len(text.splitlines()) for name, text in SOURCES.items() if name != CORE}
    assert {name: count for name, count in lines.items() if count > PART_LINES} == {}


def test_functions_are_short():
    """From `def` to the last line, docstring and comments included."""
    long = {}
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                long |= {f"{name}: {node.name}": lines} if lines > FUNCTION_LINES else {}
    assert long == {}


def test_nothing_stands_between_markers():
    """The packer folds what it reads; a marked region would be cut out as text."""
    marked = [
        f"{name}: {line}" for name, text in SOURCES.items() for line in text.splitlines() if "# [" in line
    ]
    assert [line for line in marked if "# [if" in line or "# [end" in line] == []


# -- what may import what


def packed_source() -> str:
    """The demo's counted script, before it is compressed."""
    import train_gpt as tg
    from harness.packing import folded_source
    from harness.settings import read_settings

    cfg = read_settings({"PRESET": "demo"})
    return folded_source(cfg, tg.Backends(micro_batches=2), tg.read_sources(), False)[0]


def test_the_script_imports_its_parts_only_where_they_are_used():
    """So that it runs without them."""
    statements = run_on_import(TREES[CORE])
    assert [ast.unparse(s) for s in statements if {HARNESS, SYSTEMS} & set(imported(s))] == [EARLY]
    assert "systems" not in packed_source()


def test_parts_of_systems_are_imported_by_name():
    """`from systems.part import name`: what the packer follows; nothing else reaches them."""
    for name in COUNTED:
        for node in ast.walk(TREES[name]):
            if SYSTEMS in imported(node) and ast.unparse(node) != EARLY:
                assert isinstance(node, ast.ImportFrom) and node.module.count(".") == 1, ast.unparse(node)
                assert (ROOT / f"{node.module.replace('.', '/')}.py").is_file(), ast.unparse(node)
                assert "*" not in [alias.name for alias in node.names]


def test_systems_know_nothing_of_the_harness():
    for name in SOURCES:
        if name.startswith(SYSTEMS):
            assert HARNESS not in sum(map(imported, ast.walk(TREES[name])), []), name


def test_every_module_names_what_it_takes_from_the_script():
    """`import train_gpt` would hide from reader and packer what is used."""
    for name in SOURCES:
        if name.startswith(SYSTEMS):
            bare = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.Import)]
            assert "train_gpt" not in sum(map(imported, bare), []), name


# -- names


def test_no_name_is_defined_twice():
    """Core and systems/ share one namespace in the counted script."""
    counts = Counter(name for file in COUNTED for name in definitions(TREES[file]))
    assert {name: count for name, count in counts.items() if count > 1} == {}


def test_no_import_has_the_name_of_a_definition():
    """Nor may a part rename what it imports: in one namespace both names would have to be there."""
    defined = {name for file in COUNTED for name in definitions(TREES[file])}
    for file in COUNTED:
        for node in ast.walk(TREES[file]):
            ours = {"train_gpt", SYSTEMS} & set(imported(node))
            for alias in node.names if imported(node) and not ours else []:
                assert (alias.asname or alias.name) not in defined, f"{file}: {ast.unparse(node)}"


def test_the_whole_house_can_be_imported(tg):
    """Every name that a module takes from another is there."""
    files = {name.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for name in SOURCES}
    assert files - {SYSTEMS} == {module.__name__ for module in tg.modules}
