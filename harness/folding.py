"""Folding of a script: constants go in, and what they make superfluous goes out.

`fold` is given the core, the parts that it may ask for, and what is known of a run; it returns a tree that
does the same for that run. Rules that need more than one function are in harness/calls.py.
"""

import ast
from collections.abc import Iterator, Mapping

from harness.calls import drop_keywords, drop_parameters, inline_functions
from harness.definitions import Attributes, check, impure_properties, own_attributes, prune_definitions
from harness.expressions import UNKNOWN, Expressions, Facts, is_kernel, is_pure, literal
from harness.foreign import foreign_names
from harness.members import Members
from harness.scopes import FUNCTIONS, Analysis, Transformer, children, walk
from harness.variables import Locals, boolean_names
from train_gpt import RunError

ENDS = (ast.Return, ast.Raise, ast.Continue, ast.Break)
LEAST_ROUNDS, MOST_ROUNDS = 3, 20
SETTLED = 0.995  # of a tree's nodes: a round that leaves more is the last, as the next would win nothing


def fold(
    core: bytes, parts: Mapping[str, bytes], facts: Facts, config: "ast.ClassDef | None" = None
) -> ast.Module:
    """The tree of a script folded for a run. Raises RunError where what is left would not be whole.

    `parts` are the files of systems/ by module name. `config` stands in for the class of that name.
    """
    tree = inline_parts(ast.parse(core), parts)
    own = own_attributes(tree)
    if config:
        replace_config(tree, config)
    Stripper(tree).visit(tree)
    foreign, impure = foreign_names(tree), impure_properties(tree)
    wrong = RunError("packing: folding comes to no end")
    for number in range(1, MOST_ROUNDS + 1):
        before = len(walk(tree))
        fold_once(tree, facts, impure, foreign)
        if number < LEAST_ROUNDS or len(walk(tree)) <= SETTLED * before:
            continue
        if config:
            drop_unread_settings(tree, config)
        try:
            check(ast.fix_missing_locations(tree), own, foreign)
            return tree
        except RunError as error:  # what reads a name that is gone may itself go in the next round
            wrong = error
    raise wrong


def fold_once(tree: ast.Module, facts: Facts, impure: set[str], foreign: frozenset[str]) -> None:
    """One round of all rules."""
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef))
    impure = impure | {f"{node.name}()" for node in classes if _is_inert(node)}
    bound = Analysis(tree)
    module = {node for binding in bound.module.names.values() for node in binding.loads}
    Expressions(facts, impure, module, boolean_names(bound, tree)).visit(tree)
    members = Members(tree, impure, foreign)
    members.visit(tree)
    Statements(impure).visit(tree)
    prune_definitions(tree)
    Locals(tree, impure, members.results).visit(tree)
    Attributes(tree, impure, foreign).visit(tree)
    drop_parameters(tree, impure, foreign)
    drop_keywords(tree)
    inline_functions(tree, impure, foreign)


def _is_inert(node: ast.ClassDef) -> bool:
    """Whether making an object of a class does nothing."""
    makers = {"__init__", "__new__"} & {getattr(part, "name", "") for part in node.body}
    return not (node.bases or node.keywords or node.decorator_list or makers)


# -- the parts become one


def inline_parts(tree: ast.Module, parts: Mapping[str, bytes]) -> ast.Module:
    """The core with all modules of systems/ that it, or one of them, imports; a name twice is a RunError."""
    trees, wanted = {"": tree}, [""]
    for name in wanted:
        for module in _parts_of(trees[name]):
            if module not in wanted:
                if module not in parts:
                    raise RunError(f"packing: there is no {module}")
                wanted.append(module)
                trees[module] = ast.parse(parts[module])
    wanted = ["", *_in_order(trees, wanted[1:])]
    owners: dict[str, tuple] = {}
    for name in wanted:
        trees[name] = Parts().visit(trees[name])
        for statement in trees[name].body:
            statement.part = name  # for tools/counted.py
        for statement in trees[name].body:
            for defined, text in _defined(statement):
                before = owners.setdefault(defined, (name, text))
                if before[0] != name and (text is None or before[1] != text):
                    raise RunError(f"packing: {defined} of {name} is also in {before[0] or 'train_gpt'}")
    main = [statement for name in wanted[1:] for statement in trees[name].body]
    is_import = lambda node: isinstance(node, (ast.Import, ast.ImportFrom))  # noqa: E731
    imports = {ast.dump(node): node for node in [*filter(is_import, tree.body), *filter(is_import, main)]}
    rest = [node for node in tree.body if not is_import(node)]
    main = [node for node in main if not is_import(node)]
    guard = next((i for i, node in enumerate(rest) if _is_guard(node)), len(rest))
    tree.body = [*imports.values(), *rest[:guard], *main, *rest[guard:]]
    return tree


def _parts_of(tree: ast.AST) -> Iterator[str]:
    for node in walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("systems."):
            yield node.module


def _in_order(trees: Mapping[str, ast.Module], wanted: list[str]) -> list[str]:
    """Modules of systems/, each behind those that it imports at its beginning."""
    done: list[str] = []
    for name in wanted:
        imports = [node for node in trees[name].body if isinstance(node, ast.ImportFrom)]
        needed = _in_order(trees, [*_parts_of(ast.Module(imports, []))]) if imports else []
        done += [part for part in [*needed, name] if part not in done]
    return done


def _is_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def _defined(statement: ast.stmt) -> Iterator[tuple[str, str | None]]:
    """The names that a statement of a module defines; of imports with their origin: the same is no clash."""
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        for alias in statement.names:
            origin = f"{getattr(statement, 'module', '')} {alias.name}"
            yield alias.asname or alias.name.partition(".")[0], origin
    elif isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        yield statement.name, None
    elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
        for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
            for node in walk(target):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    yield node.id, None


class Parts(Transformer):
    """Imports of the house's own modules go: all names are in one."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:  # noqa: N802, D102
        own = (node.module or "").partition(".")[0] in ("systems", "train_gpt")
        if own and any(alias.asname for alias in node.names):
            raise RunError(f"packing: {ast.unparse(node)}: an import of the house under another name")
        return None if own else node

    def visit_Module(self, node: ast.Module) -> ast.AST:  # noqa: N802, D102
        node.body = [self.visit(s) for s in node.body]
        node.body = [s for s in node.body if s is not None]
        return node

    def _body(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        for field in ("body", "orelse"):
            if getattr(node, field, None) == [] and field == "body":
                node.body = [ast.Pass()]
        return node

    visit_FunctionDef = visit_ClassDef = visit_If = visit_For = visit_With = visit_Try = _body  # noqa: N815


def replace_config(tree: ast.Module, config: ast.ClassDef) -> None:
    """Put a class with the settings that a run may still be given in the place of `Config`."""
    for index, node in enumerate(tree.body):
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            made = {part.name for part in config.body if isinstance(part, ast.FunctionDef)}
            kept = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            dropped = made | {"__post_init__", "from_env"}
            config.body += [part for part in kept if part.name not in dropped]
            tree.body[index] = config
    for node in walk(tree):
        function = node.func if isinstance(node, ast.Call) else None
        if isinstance(function, ast.Attribute) and ast.unparse(function) == "Config.from_env":
            node.func, node.args = function.value, node.args[:1]


def drop_unread_settings(tree: ast.Module, config: ast.ClassDef) -> None:
    """Leave those settings in the new class that something reads, or names in a text."""
    inside = set(walk(config))
    read = {node.attr for node in walk(tree) if isinstance(node, ast.Attribute)}
    read |= {node.value for node in walk(tree) if isinstance(node, ast.Constant) and node not in inside}
    for node in inside:
        if isinstance(node, ast.Dict):
            kept = [(k, v) for k, v in zip(node.keys, node.values, strict=True) if k.value in read]
            node.keys, node.values = [k for k, _ in kept], [v for _, v in kept]


# -- what only readers need


class Stripper(Transformer):
    """Docstrings, annotations and the texts of errors go."""

    def __init__(self, tree: ast.Module):
        classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        self.fields = {
            name
            for name, node in classes.items()
            if any("NamedTuple" in ast.unparse(base) for base in node.bases)
            or any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
        }
        self.errors = {name for name in classes if self._is_error(name, classes)}
        self.inside = ""

    @staticmethod
    def _is_error(name: str, classes: Mapping[str, ast.ClassDef]) -> bool:
        while name in classes and classes[name].bases:
            name = ast.unparse(classes[name].bases[0])
        return name.endswith(("Error", "Exception"))

    def _drop_docstring(self, node: ast.AST) -> None:
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            node.body[:1] = [] if len(node.body) > 1 else [ast.Pass()]

    def visit_Module(self, node: ast.Module) -> ast.AST:  # noqa: N802, D102
        self._drop_docstring(node)
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:  # noqa: N802, D102
        self._drop_docstring(node)
        before, self.inside = self.inside, node.name
        self.generic_visit(node)
        self.inside = before
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:  # noqa: N802, D102
        self._drop_docstring(node)
        before, self.inside = self.inside, ""
        if not is_kernel(node):
            node.returns = None
            a = node.args
            for parameter in [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]:
                parameter.annotation = None
        self.generic_visit(node)
        self.inside = before
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:  # noqa: N802, D102
        self.generic_visit(node)
        if self.inside in self.fields and self.inside:
            node.annotation = ast.Name("int", ast.Load())
            return node
        return ast.Assign([node.target], node.value, lineno=node.lineno) if node.value else ast.Pass()

    def visit_Raise(self, node: ast.Raise) -> ast.AST:  # noqa: N802, D102
        call = node.exc
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in self.errors:
            node.exc = ast.Call(call.func, [ast.Constant(node.lineno)], [])
            node.cause = None
        return node


# -- statements


class Statements(Transformer):
    """Branches that are never taken, and what stands behind an end or does nothing."""

    def __init__(self, impure: set[str]):
        self.impure = impure

    def block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """The statements that are left of some."""
        kept: list[ast.stmt] = []
        for statement in statements:
            result = self.visit(statement)
            kept += result if isinstance(result, list) else [result] if result is not None else []
            if kept and isinstance(kept[-1], ENDS):
                break
        if kept and isinstance(kept[-1], ast.Raise):
            while len(kept) > 1 and getattr(kept[-2], "unused", False):  # was part of the error's text
                del kept[-2]
        return kept

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Visit blocks as blocks; expressions have none, but for lambdas."""
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            if isinstance(statements, list):
                left = self.block(statements)
                setattr(node, field, left or ([ast.Pass()] if field == "body" else []))
        for handler in getattr(node, "handlers", []):
            self.generic_visit(handler)
        return node

    def visit_Module(self, node: ast.Module) -> ast.AST:  # noqa: N802, D102
        node.body = self.block(node.body)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:  # noqa: N802, D102
        if is_kernel(node):
            return node
        generator = _yields(node)
        self.generic_visit(node)
        last = node.body[-1]
        if isinstance(last, ast.Return) and (last.value is None or literal(last.value) is None):
            node.body = node.body[:-1] or [ast.Pass()]
        if generator and not _yields(node):
            node.body += [ast.Return(), ast.Expr(ast.Yield())]
        return node

    def visit_Pass(self, node: ast.Pass) -> None:  # noqa: N802, D102
        return None

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:  # noqa: N802, D102
        return None if is_pure(node.value, self.impure) else node

    def visit_Assert(self, node: ast.Assert) -> ast.AST | None:  # noqa: N802, D102
        value = literal(node.test)
        return node if value is UNKNOWN or not value else None

    def visit_If(self, node: ast.If) -> ast.AST | list | None:  # noqa: N802, D102
        value = literal(node.test)
        if value is not UNKNOWN:
            return self.block(node.body if value else node.orelse)
        node.body, node.orelse = self.block(node.body), self.block(node.orelse)
        if not node.body and not node.orelse:
            return self.visit_Expr(ast.Expr(node.test))
        if not node.body:
            node.test, node.body, node.orelse = ast.UnaryOp(ast.Not(), node.test), node.orelse, []
        if node.orelse and isinstance(node.body[-1], ENDS):
            tail, node.orelse = node.orelse, []
            return [node, *tail]
        return node

    def visit_While(self, node: ast.While) -> ast.AST | list:  # noqa: N802, D102
        value = literal(node.test)
        return self.block(node.orelse) if value is not UNKNOWN and not value else self.generic_visit(node)

    def visit_For(self, node: ast.For) -> ast.AST | list:  # noqa: N802, D102
        if literal(node.iter) in ((), []):
            return self.block(node.orelse)
        self.generic_visit(node)
        if isinstance(node.body[0], ast.Pass) and is_pure(node.iter, self.impure):
            return self.block(node.orelse)
        once = ast.unparse(node.iter) == "range(1)" and not node.orelse
        if once and not any(
            isinstance(part, (ast.Break, ast.Continue)) for s in node.body for part in walk(s)
        ):
            return [ast.Assign([node.target], ast.Constant(0), lineno=node.lineno), *node.body]
        return node

    def visit_Try(self, node: ast.Try) -> ast.AST | list:  # noqa: N802, D102
        self.generic_visit(node)
        if all(isinstance(part, ast.Pass) for part in node.body):
            return [*node.orelse, *node.finalbody]
        return node if node.handlers or node.finalbody else [*node.body, *node.orelse]


def _yields(function: ast.FunctionDef) -> bool:
    parts: list[ast.AST] = list(function.body)
    while parts:
        part = parts.pop()
        if isinstance(part, (ast.Yield, ast.YieldFrom)):
            return True
        if not isinstance(part, (*FUNCTIONS, ast.ClassDef)):
            parts += children(part)
    return False
