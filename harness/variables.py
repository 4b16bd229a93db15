"""Folding of variables: those that are one literal become it, and those that nobody reads go."""

import ast
import itertools
from collections.abc import Collection, Mapping, Sequence

from harness.expressions import is_boolean, is_kernel, is_pure, literal
from harness.members import pairs
from harness.scopes import Analysis, Binding, Transformer, clone, walk


class Locals(Transformer):
    """Variables that are one literal become it, and assignments that nobody reads go; globals too."""

    def __init__(self, tree: ast.Module, impure: set[str], silent: Collection[str]):
        self.impure, self.silent, self.analysis = impure, silent, Analysis(tree)
        self.values: dict[Binding, ast.expr] = {}
        self.dead: set[ast.AST] = set()
        keep = set(itertools.chain(*(scope.outer for scope in self.analysis.module.walk())))
        simple = {}  # stores of the form `name = value`
        self.augmented: set[ast.AST] = set()  # stores of the form `name += value`
        for node in walk(tree):
            if isinstance(node, ast.Assign):
                for target, value in pairs(node):
                    if isinstance(target, ast.Name):
                        simple[target] = value
            elif isinstance(node, ast.NamedExpr):
                simple[node.target] = node.value
            elif isinstance(node, ast.AugAssign):
                self.augmented.add(node.target)
        for scope in self.analysis.module.walk():
            if scope.is_class or is_kernel(scope.node):
                continue
            for binding in scope.names.values():
                self._judge(binding, simple, keep)

    def _judge(self, binding: Binding, simple: Mapping[ast.AST, ast.expr], keep: set[str]) -> None:
        stores = [node for node, _ in binding.stores]
        value = simple.get(stores[0]) if len(stores) == 1 else None
        in_kernel = any(is_kernel(scope.node) for scope in binding.users)
        if value is not None and not in_kernel and self._propagates(binding, value):
            self.values[binding] = value
            self.dead.update(stores)
        elif self._changes_others(stores, simple):
            return
        elif not binding.loads and not binding.is_parameter and not binding.name.startswith("__"):
            self.dead.update(stores if binding.scope.parent or binding.name not in keep else ())

    def _changes_others(self, stores: Sequence[ast.AST], simple: Mapping[ast.AST, ast.expr]) -> bool:
        """Whether `+=` may change what others hold too: an array or a list, unless it began as a number."""
        begins = [store for store in stores if store not in self.augmented]
        numbers = [isinstance(literal(simple.get(store)), int | float) for store in begins]
        return len(begins) < len(stores) and not all(numbers)

    def _propagates(self, binding: Binding, value: ast.expr) -> bool:
        if isinstance(value, ast.Attribute) and value.attr in self.silent:
            return is_pure(value, self.impure)
        known = literal(value)
        if isinstance(known, (bool, int, float, type(None))):
            return (
                len(ast.unparse(value)) < 9 or len(binding.loads) < 2 or isinstance(known, (bool, type(None)))
            )
        if isinstance(known, (str, bytes)):
            return len(known) < 9 or len(binding.loads) < 2
        return False

    def visit_Name(self, node: ast.Name) -> ast.AST:  # noqa: N802, D102
        binding = self.analysis.binding.get(node)
        if isinstance(node.ctx, ast.Load) and binding in self.values:
            return self.visit(clone(self.values[binding]))
        return node

    def visit_NamedExpr(self, node: ast.NamedExpr) -> ast.AST:  # noqa: N802, D102
        self.generic_visit(node)
        return node.value if node.target in self.dead else node

    def visit_Assign(self, node: ast.Assign) -> ast.AST | list | None:  # noqa: N802, D102
        self.generic_visit(node)
        parts = pairs(node)
        drop = [target in self.dead for target, _ in parts]
        if not any(drop):
            return node
        if len(node.targets) > 1:
            node.targets = [target for target, gone in zip(node.targets, drop, strict=True) if not gone]
            return node if node.targets else self._effect(node.value)
        left = [pair for pair, gone in zip(parts, drop, strict=True) if not gone or not self._pure(pair[1])]
        if len(parts) == 1:
            return node if left and not drop[0] else self._effect(node.value)
        if len(left) == len(parts):
            return node
        if len(left) < 2:
            return [ast.Assign([target], value, lineno=node.lineno) for target, value in left] or None
        targets, values = zip(*left, strict=True)
        node.targets, node.value = (
            [ast.Tuple(list(targets), ast.Store())],
            ast.Tuple(list(values), ast.Load()),
        )
        return node

    def _pure(self, value: ast.expr) -> bool:
        return is_pure(value, self.impure)

    def _effect(self, value: ast.expr) -> ast.AST | None:
        return None if self._pure(value) else unused(value)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST | None:  # noqa: N802, D102
        self.generic_visit(node)
        return self._effect(node.value) if node.target in self.dead else node

    def _without_declarations(self, node: ast.Global | ast.Nonlocal) -> ast.AST | None:
        names = set()
        for binding in set(self.analysis.binding.values()):
            for declared, index in binding.declared:
                if declared is node and not {part for part, _ in binding.stores} <= self.dead:
                    names.add(node.names[index])
        node.names = [name for name in node.names if name in names]
        return node if node.names else None

    visit_Global = visit_Nonlocal = _without_declarations  # noqa: N815

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.AST:  # noqa: N802, D102
        self.generic_visit(node)
        node.name = None if node in self.dead else node.name
        node.body = node.body or [ast.Pass()]
        return node

    def visit_withitem(self, node: ast.withitem) -> ast.AST:  # noqa: D102
        self.generic_visit(node)
        if isinstance(node.optional_vars, ast.Name) and node.optional_vars in self.dead:
            node.optional_vars = None
        return node

    def _import(self, node: ast.Import | ast.ImportFrom) -> ast.AST | None:
        node.names = [alias for alias in node.names if alias not in self.dead]
        return node if node.names else None

    visit_Import = visit_ImportFrom = _import  # noqa: N815

    def _definition(self, node: ast.FunctionDef | ast.ClassDef) -> ast.AST | None:
        if is_kernel(node):
            return node
        if node in self.dead and not node.decorator_list:
            return None
        return self._body(node)

    visit_FunctionDef = visit_ClassDef = _definition  # noqa: N815

    def _body(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        if not node.body:
            node.body = [ast.Pass()]
        return node

    visit_If = visit_For = visit_While = visit_With = visit_Try = _body  # noqa: N815


def unused(value: ast.expr) -> ast.Expr:
    """An expression whose value nobody takes any more, as a statement."""
    statement = ast.Expr(value)
    statement.unused = True
    return statement


def boolean_names(analysis: Analysis, tree: ast.Module) -> set[ast.AST]:
    """Loads of variables that can only be True or False: stored once, as an expression of that kind."""
    values = {}
    for node in walk(tree):
        if isinstance(node, ast.Assign):
            values |= {target: value for target, value in pairs(node) if isinstance(target, ast.Name)}
    found: set[ast.AST] = set()
    for binding in set(analysis.binding.values()):
        if len(binding.stores) == 1 and is_boolean(values.get(binding.stores[0][0])):
            found.update(binding.loads)
    return found
