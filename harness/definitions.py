"""Definitions of a folded script: those that `main` reaches stay, and what is left must be whole."""

import ast
import builtins
import functools
import importlib
import re
from collections.abc import Collection, Iterator

from harness.expressions import is_pure
from harness.members import attribute_reads, families, is_read, named_in_texts, pairs
from harness.scopes import Analysis, Transformer, children, walk
from train_gpt import RunError

DUNDER = re.compile("__.*__")
HOUSE = ("harness", "systems", "train_gpt")
BY_NAME = {"vars", "locals", "globals", "eval", "exec", "dir", "__dict__", "_asdict", "_fields", "asdict"}


def words(text: str) -> list[str]:
    """What may be a name in a text."""
    return re.findall(r"\w+", text)


def impure_properties(tree: ast.Module) -> set[str]:
    """Properties of the script's classes that do more than read something."""
    found = set()
    for node in walk(tree):
        if isinstance(node, ast.FunctionDef) and any(
            "property" in ast.unparse(d) for d in node.decorator_list
        ):
            last = node.body[-1]
            if not (isinstance(last, ast.Return) and len(node.body) == 1 and is_pure(last.value)):
                found.add(node.name)
    return found


def own_attributes(tree: ast.AST) -> set[str]:
    """Attributes that the script's own classes define: methods, fields, and what is stored in an object."""
    found: set[str] = set()
    for node in walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    found.add(part.name)
                elif isinstance(part, (ast.Assign, ast.AnnAssign)):
                    targets = part.targets if isinstance(part, ast.Assign) else [part.target]
                    found.update(n.id for t in targets for n in walk(t) if isinstance(n, ast.Name))
    return found


def foreign_attributes(base: ast.expr, tree: ast.Module) -> frozenset[str]:
    """Attributes of a class of a library, {} of a class of ours."""
    names = {}
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (getattr(node, "module", ""), alias)
    root = base
    path: list[str] = []
    while isinstance(root, ast.Attribute):
        path.insert(0, root.attr)
        root = root.value
    if not isinstance(root, ast.Name):
        return frozenset()
    if root.id not in names:
        value = getattr(builtins, root.id, None)
        return frozenset(dir(value)) if value and not path else frozenset()
    module, alias = names[root.id]
    first = module or (alias.name if alias.asname else root.id)
    return _attributes(first, (*([alias.name] if module else []), *path))


@functools.cache
def _attributes(module: str, path: tuple[str, ...]) -> frozenset[str]:
    try:
        value = importlib.import_module(module)
        for index, name in enumerate(path):
            if not hasattr(value, name):
                value = importlib.import_module(".".join([module, *path[: index + 1]]))
            else:
                value = getattr(value, name)
    except ImportError:
        return frozenset()
    return frozenset(dir(value))


class Reach:
    """What is reached from the statements of a module that always run."""

    def __init__(self, tree: ast.Module):
        self.tree, self.analysis = tree, Analysis(tree)
        self.names: set[str] = set()
        self.words: set[str | tuple[str, str]] = set(named_in_texts(tree))
        self.family = families(tree)
        self.kept: set[ast.AST] = set()
        self.classes: list[ast.ClassDef] = []
        size = -1
        while size != (size := len(self.names) + len(self.words) + len(self.kept)):
            for statement in tree.body:
                self._statement(statement)
            for node in self.classes:
                self._methods(node)

    def _statement(self, statement: ast.stmt) -> None:
        if statement in self.kept or isinstance(statement, (ast.Import, ast.ImportFrom)):
            return
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            wanted = statement.name in self.names
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            stored = [n for t in targets for n in walk(t) if isinstance(n, ast.Name)]
            names = {node.id for node in stored}
            wanted = bool(names & self.names) or any(DUNDER.fullmatch(name) for name in names)
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            root = statement.value.func
            while isinstance(root, (ast.Attribute, ast.Call)):
                root = root.value if isinstance(root, ast.Attribute) else root.func
            own = isinstance(root, ast.Name) and self._own(root.id)
            wanted = not own or root.id in self.names
        else:
            wanted = True
        if wanted:
            self.kept.add(statement)
            self._reach(statement)

    def _own(self, name: str) -> bool:
        binding = self.analysis.module.names.get(name)
        return bool(binding) and not any(isinstance(node, ast.alias) for node, _ in binding.stores)

    def _reach(self, node: ast.AST, owner: str = "") -> None:
        if isinstance(node, ast.ClassDef):
            self.classes.append(node)
            parts, owner = [*node.bases, *node.keywords, *node.decorator_list], node.name
            parts += [part for part in node.body if not isinstance(part, ast.FunctionDef)]
        else:
            parts = [node]
        for part in parts:
            for child in walk(part):
                name = child.id if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Load) else ""
                if name and self.analysis.binding.get(child) is self.analysis.module.names.get(name):
                    self.names.add(name)
            self.words |= attribute_reads(part, owner)

    def _methods(self, node: ast.ClassDef) -> None:
        foreign = frozenset().union(*(foreign_attributes(base, self.tree) for base in self.bases(node)))
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and part not in self.kept:
                name = part.name
                wanted = is_read(name, node.name, self.words, self.family)
                if wanted or DUNDER.fullmatch(name) or name in foreign:
                    self.kept.add(part)
                    self._reach(part, node.name)

    def bases(self, node: ast.ClassDef) -> list[ast.expr]:
        """The bases of a class and of those."""
        own = {part.name: part for part in self.tree.body if isinstance(part, ast.ClassDef)}
        found = []
        for base in node.bases:
            inner = own.get(base.id) if isinstance(base, ast.Name) else None
            found += self.bases(inner) if inner else [base]
        return found


def prune_definitions(tree: ast.Module) -> None:
    """Drop functions, classes, methods and variables of the module that nothing reaches."""
    reach = Reach(tree)
    tree.body = [
        node for node in tree.body if node in reach.kept or isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    for node in reach.classes:
        left = [part for part in node.body if not isinstance(part, ast.FunctionDef) or part in reach.kept]
        node.body = left or [ast.Pass()]
    loaded = {node.id for node in walk(tree) if isinstance(node, ast.Name)}
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            named = [a for a in node.names if (a.asname or a.name.partition(".")[0]) in loaded]
            node.names = named
    tree.body = [node for node in tree.body if getattr(node, "names", True)]


class Attributes(Transformer):
    """Stores of attributes that nothing reads go, in objects and in classes."""

    def __init__(self, tree: ast.Module, impure: set[str], foreign: frozenset[str]):
        self.reads, self.family = attribute_reads(tree) | named_in_texts(tree), families(tree)
        self.impure, self.foreign, self.owner = impure, foreign, ""

    def _dead(self, target: ast.expr) -> bool:
        if not isinstance(target, ast.Attribute) or target.attr in self.foreign:
            return False
        mine = self.owner and isinstance(target.value, ast.Name) and target.value.id == "self"
        if mine:
            return not is_read(target.attr, self.owner, self.reads, self.family)
        return target.attr not in self.reads and not any(
            target.attr == part[1] for part in self.reads if len(part) == 2
        )

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:  # noqa: N802, D102
        before, self.owner = self.owner, node.name
        self.generic_visit(node)
        self.owner = before
        loads = {
            n.id
            for p in node.body
            for n in walk(p)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
        }
        kept = []
        for part in node.body:
            if isinstance(part, ast.Assign) and is_pure(part.value, self.impure):
                names = [n.id for target in part.targets for n in walk(target) if isinstance(n, ast.Name)]
                if not any(self._kept(name, node.name, loads) for name in names):
                    continue
            kept.append(part)
        node.body = kept or [ast.Pass()]
        return node

    def _kept(self, name: str, owner: str, loads: set[str]) -> bool:
        read = is_read(name, owner, self.reads, self.family)
        return read or name in loads | self.foreign or bool(DUNDER.fullmatch(name))

    def visit_Assign(self, node: ast.Assign) -> ast.AST | list | None:  # noqa: N802, D102
        self.generic_visit(node)
        parts = pairs(node)
        if len(node.targets) > 1:
            node.targets = [t for t in node.targets if not self._dead(t)] or node.targets
            return node
        left = [(t, v) for t, v in parts if not self._dead(t) or not is_pure(v, self.impure)]
        if len(parts) == 1:
            if not self._dead(parts[0][0]):
                return node
            return ast.Expr(node.value) if left else ast.Pass()
        if len(left) > 1:
            targets, values = zip(*left, strict=True)
            node.targets[0].elts, node.value.elts = list(targets), list(values)
            return node
        return [ast.Assign([t], v, lineno=node.lineno) for t, v in left] or ast.Pass()


def _read_at_once(node: ast.AST) -> Iterator[str]:
    """Names that a statement of the module reads when it is executed: not those inside functions."""
    if isinstance(node, (ast.FunctionDef, ast.Lambda)):
        outside = [*node.args.defaults, *filter(None, node.args.kw_defaults)]
        for part in [*outside, *getattr(node, "decorator_list", ())]:
            yield from _read_at_once(part)
    elif isinstance(node, ast.Name):
        yield from [node.id] if isinstance(node.ctx, ast.Load) else []
    else:
        for part in children(node):
            yield from _read_at_once(part)


def early_reads(tree: ast.Module) -> Iterator[str]:
    """Names that the module reads before it binds them."""
    analysis, bound = Analysis(tree), set()
    later = analysis.module.names.keys()
    for statement in tree.body:
        stores = (n for n in walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
        inside = {name.id for name in stores}
        yield from (name for name in _read_at_once(statement) if name in later and name not in bound | inside)
        names = (a.asname or a.name.partition(".")[0] for a in walk(statement) if isinstance(a, ast.alias))
        bound |= {*names, *inside, getattr(statement, "name", "")}


def check(tree: ast.Module, own: set[str], foreign: Collection[str]) -> None:
    """Raise RunError unless every name is bound and every attribute of ours that is read is there.

    `own` are the attributes that the whole script's classes have. Nor may anything ask for names in a way
    that folding and renaming do not see.
    """
    missing = {name for name in Analysis(tree).undefined if not hasattr(builtins, name)}
    missing -= {"__file__", "__name__", "__doc__"}
    missing.update(f"{name} (as early as it is read)" for name in early_reads(tree))
    config = next((node for node in tree.body if getattr(node, "name", "") == "Config"), ast.Pass())
    settings = set(walk(config))  # the only names that are texts
    left = own_attributes(tree) | named_in_texts(tree)
    for node in walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            own_parts = [name for name in names if name.partition(".")[0] in HOUSE]
            missing.update(f"{name} (line {node.lineno})" for name in own_parts)
        name = getattr(node, "id", getattr(node, "attr", None))
        if name in BY_NAME and node not in settings:
            raise RunError(f"packing: {name} (line {node.lineno}) asks for names that may be others now")
        read = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and name in own
        if read and name not in left and name not in foreign and not DUNDER.fullmatch(name):
            missing.add(f".{name} (line {node.lineno})")
    if missing:
        raise RunError(f"packing: folding left nothing that is called {', '.join(sorted(missing))}")
