"""Folding across functions: parameters that say nothing go, and small functions become what they return."""

import ast
from collections.abc import Iterator
from typing import NamedTuple

from harness.expressions import UNKNOWN, is_kernel, is_pure, literal
from harness.scopes import COMPREHENSIONS, Analysis, Scope, Transformer, become, children, clone, walk

KEEPS_SIGNATURE = {  # decorators that hand all arguments on
    "staticmethod", "classmethod", "torch.no_grad()", "functools.cache", "contextlib.contextmanager",
}  # fmt: skip
MISSING, VARIES = object(), object()


class Function(NamedTuple):
    """A function whose calls are all known."""

    node: ast.FunctionDef
    calls: list[ast.Call]
    bound: int  # leading parameters that a call does not give: self or cls

    def names(self) -> list[str]:
        """Its parameters by position, without those that a call does not give."""
        a = self.node.args
        return [parameter.arg for parameter in [*a.posonlyargs, *a.args]][self.bound :]


def known_functions(tree: ast.Module, foreign: frozenset[str], analysis: Analysis) -> Iterator[Function]:
    """Functions and methods that are only ever called, with all those calls."""
    calls: dict[ast.expr, ast.Call] = {}
    attributes: dict[str, list[ast.Attribute]] = {}
    texts: set[str] = set()
    methods: dict[str, int] = {}
    for node in walk(tree):
        if isinstance(node, ast.Attribute):
            attributes.setdefault(node.attr, []).append(node)
        elif isinstance(node, ast.Call):
            calls[node.func] = node
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(node.value)
        elif isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    methods[part.name] = methods.get(part.name, 0) + 1
                elif isinstance(part, (ast.Assign, ast.AnnAssign)):
                    for name in walk(part):
                        if isinstance(name, ast.Name):
                            methods[name.id] = methods.get(name.id, 0) + 1
    for scope in analysis.module.walk():
        for node in getattr(scope.node, "body", []) if not isinstance(scope.node, ast.Lambda) else []:
            yield from _known(node, scope, analysis, calls, attributes, texts, methods, foreign)
    yield from _nested(analysis, calls)


def _keeps_signature(node: ast.FunctionDef) -> bool:
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    return all(text in KEEPS_SIGNATURE for text in decorators)


def _nested(analysis: Analysis, calls: dict) -> Iterator[Function]:
    """Functions inside functions that do not stand directly in the body."""
    direct = {part for scope in analysis.module.walk() for part in _statements(scope.node)}
    for scope in analysis.module.walk():
        for binding in scope.names.values() if not scope.is_class else ():
            node = binding.stores[0][0] if len(binding.stores) == 1 else None
            plain = isinstance(node, ast.FunctionDef) and node not in direct and not is_kernel(node)
            if plain and _keeps_signature(node) and binding.loads and all(u in calls for u in binding.loads):
                yield Function(node, [calls[use] for use in binding.loads], 0)


def _statements(node: ast.AST) -> list:
    body = getattr(node, "body", [])
    return body if isinstance(body, list) else []


def _known(node, scope, analysis, calls, attributes, texts, methods, foreign) -> Iterator[Function]:  # noqa: ANN001
    if isinstance(node, ast.FunctionDef) and not is_kernel(node) and _keeps_signature(node):
        if not scope.is_class:
            binding = scope.names.get(node.name)
            if (
                binding
                and len(binding.stores) == 1
                and binding.loads
                and all(u in calls for u in binding.loads)
            ):
                yield Function(node, [calls[use] for use in binding.loads], 0)
        elif methods[node.name] == 1 and node.name not in foreign and node.name not in texts:
            uses = attributes.get(node.name, [])
            if uses and all(use in calls for use in uses):
                static = "staticmethod" in map(ast.unparse, node.decorator_list)
                yield Function(node, [calls[use] for use in uses], 0 if static else 1)
    if isinstance(node, ast.ClassDef):
        inits = [p for p in node.body if isinstance(p, ast.FunctionDef) and p.name == "__init__"]
        binding = scope.names.get(node.name)
        simple = inits and binding and len(binding.stores) == 1 and not node.decorator_list
        if simple and binding.loads and all(use in calls for use in binding.loads):
            made = [calls[use] for use in binding.loads]
            inside = [n for n in walk(node) if isinstance(n, ast.Name) and n.id == "cls"]
            if all(use in calls or not isinstance(use.ctx, ast.Load) for use in inside):
                yield Function(inits[0], made + [calls[use] for use in inside if use in calls], 1)


def _argument(function: Function, call: ast.Call, name: str) -> object:
    """What a call gives for a parameter: an expression, MISSING or VARIES."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value
    names = function.names()
    index = names.index(name) if name in names else len(call.args)
    star = next((i for i, part in enumerate(call.args) if isinstance(part, ast.Starred)), len(call.args))
    if name in names and index < star:
        return call.args[index]
    if name in names and star < len(call.args) or any(keyword.arg is None for keyword in call.keywords):
        return VARIES
    return MISSING


def _default(function: Function, name: str) -> ast.expr | None:
    a = function.node.args
    positional = [parameter.arg for parameter in [*a.posonlyargs, *a.args]]
    if name in positional:
        index = positional.index(name) - len(positional) + len(a.defaults)
        return a.defaults[index] if index >= 0 else None
    index = [parameter.arg for parameter in a.kwonlyargs].index(name)
    return a.kw_defaults[index]


def _drop(function: Function, name: str) -> None:
    """Take a parameter out of a function and of all its calls."""
    for call in function.calls:
        names = function.names()
        call.keywords = [keyword for keyword in call.keywords if keyword.arg != name]
        if name in names and names.index(name) < len(call.args):
            del call.args[names.index(name)]
    a = function.node.args
    positional = [parameter.arg for parameter in [*a.posonlyargs, *a.args]]
    if name in positional:
        index = positional.index(name)
        default = index - len(positional) + len(a.defaults)
        if default >= 0:
            del a.defaults[default]
        part = a.posonlyargs if index < len(a.posonlyargs) else a.args
        part[:] = [parameter for parameter in part if parameter.arg != name]
    else:
        index = [parameter.arg for parameter in a.kwonlyargs].index(name)
        del a.kwonlyargs[index], a.kw_defaults[index]


def drop_parameters(tree: ast.Module, impure: set[str], foreign: frozenset[str]) -> None:
    """Parameters that nothing reads, or that are the same literal (or global name) in every call, go."""
    analysis = Analysis(tree)
    for function in list(known_functions(tree, foreign, analysis)):
        scope = analysis.of[function.node]
        a = function.node.args
        names = [*function.names(), *(parameter.arg for parameter in a.kwonlyargs)]
        for name in names:
            binding = scope.names[name]
            given = [_argument(function, call, name) for call in function.calls]
            if VARIES in given:
                continue
            default = _default(function, name)
            values = [default if value is MISSING else value for value in given]
            if None in values:
                continue
            if not binding.loads and len(binding.stores) == 1:
                if all(value is MISSING or is_pure(value, impure) for value in given):
                    _drop(function, name)
            elif len(binding.stores) == 1 and (same := _same(values, analysis, scope)):
                for use in binding.loads:
                    become(use, same)
                binding.loads = []
                _drop(function, name)


def drop_keywords(tree: ast.Module) -> None:
    """Keyword-only parameters that are given one literal (or handed on) wherever a call names them go.

    Calls need not be known, only that no text says the name.
    """
    analysis = Analysis(tree)
    given, takers, closed = _keywords(tree, analysis)
    for name, functions in takers.items():
        bindings = [analysis.of[function].names[name] for function in functions]
        values = [v for v in given[name] if analysis.binding.get(v) not in bindings]
        simple = all(isinstance(literal(v), (bool, int, float, str, type(None))) for v in values)
        stored_once = all(len(binding.stores) == 1 for binding in bindings)
        if name in closed or not simple or not stored_once or len({ast.dump(v) for v in values}) != 1:
            continue
        for use in [use for binding in bindings for use in binding.loads]:
            become(use, values[0])
        for function in functions:
            index = [parameter.arg for parameter in function.args.kwonlyargs].index(name)
            del function.args.kwonlyargs[index], function.args.kw_defaults[index]
        for node in walk(tree):
            if isinstance(node, ast.Call):
                node.keywords = [keyword for keyword in node.keywords if keyword.arg != name]


def _keywords(tree: ast.Module, analysis: Analysis) -> tuple[dict, dict, set[str]]:
    """What is given for keyword-only parameters (defaults too), who takes them, and names to leave alone."""
    given: dict[str | None, list[ast.expr]] = {}
    takers: dict[str, list[ast.FunctionDef]] = {}
    closed: set[str] = set()
    for node in walk(tree):
        if isinstance(node, ast.Call):
            foreign = _is_foreign(node.func, analysis)
            for part in node.keywords:
                given.setdefault(part.arg, []).append(part.value)
                closed.update([part.arg] if foreign else [])
        elif isinstance(node, (ast.FunctionDef, ast.Lambda)):
            a = node.args
            closed.update(parameter.arg for parameter in [*a.posonlyargs, *a.args])  # given by position
            for parameter, default in zip(a.kwonlyargs, a.kw_defaults, strict=True):
                takers.setdefault(parameter.arg, []).append(node)
                given.setdefault(parameter.arg, []).extend([default] if default else [])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            closed.add(node.value)
    return given, takers, closed


def _is_foreign(function: ast.expr, analysis: Analysis) -> bool:
    """Whether a call is certainly of a library's or a builtin function."""
    while isinstance(function, ast.Attribute):
        function = function.value
    binding = analysis.binding.get(function)
    return isinstance(function, ast.Name) and (
        binding is None or any(isinstance(node, ast.alias) for node, _ in binding.stores)
    )


def _same(values: list[ast.expr], analysis: Analysis, scope: Scope) -> ast.expr | None:
    """The one expression that all values are: a literal, or a name of the module that is stored once."""
    if len({ast.dump(value) for value in values}) != 1:
        return None
    value = values[0]
    known = literal(value)
    if known is not UNKNOWN and (isinstance(known, (bool, int, float, type(None), str)) or known == ()):
        return value
    if isinstance(value, ast.Name):
        bindings = [analysis.binding.get(v) for v in values if isinstance(v, ast.Name)]
        module = analysis.module.names.get(value.id)
        fixed = module and len(module.stores) == 1 and all(binding is module for binding in bindings)
        if fixed and all(s.find(value.id) is module for s in scope.walk()):
            return value
    return None


# -- functions of one expression


def inline_functions(tree: ast.Module, impure: set[str], foreign: frozenset[str]) -> None:
    """Calls of functions that only return an expression become it, if it is a literal or called once."""
    analysis = Analysis(tree)
    scopes = {}
    for scope in analysis.module.walk():
        scopes |= {node: scope for node in _own_nodes(scope.node)}
    for function in list(known_functions(tree, foreign, analysis)):
        node, body = function.node, function.node.body
        if node.name == "__init__" or len(body) != 1 or not isinstance(body[0], ast.Return):
            continue
        if any(ast.unparse(decorator) != "staticmethod" for decorator in node.decorator_list):
            continue
        a = node.args
        if a.vararg or a.kwarg or body[0].value is None:
            continue
        for call in function.calls:
            _inline(function, call, analysis, scopes.get(call), impure)


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a scope that are in no scope inside it; those of a scope's head may be in both."""
    parts = children(node)
    while parts:
        part = parts.pop()
        yield part
        if not isinstance(part, (ast.FunctionDef, ast.Lambda, ast.ClassDef, *COMPREHENSIONS)):
            parts += children(part)


class _Substitute(Transformer):
    def __init__(self, values: dict[str, ast.expr]):
        self.values = values

    def visit_Name(self, node: ast.Name) -> ast.AST:  # noqa: N802
        return clone(self.values[node.id]) if node.id in self.values else node


def _in_order(expression: ast.expr, names: list[str]) -> bool:
    """Whether an expression reads these names first of all, in this order, and always."""
    left = list(names)

    def visit(node: ast.AST) -> bool:
        if not left:
            return True
        if isinstance(node, ast.Name) and node.id in left:
            return left.pop(0) == node.id
        parts = children(node)
        if isinstance(node, (ast.BoolOp, ast.IfExp, ast.Compare)):  # the rest may not be evaluated
            return visit(parts[0]) and not left
        return all(map(visit, parts)) and (not left or not isinstance(node, (ast.Call, ast.Await)))

    return visit(expression) and not left


def _inline(
    function: Function, call: ast.Call, analysis: Analysis, scope: Scope | None, impure: set[str]
) -> None:
    a = function.node.args
    names = [*function.names(), *(parameter.arg for parameter in a.kwonlyargs)]
    values = {}
    for name in names:
        value = _argument(function, call, name)
        value = _default(function, name) if value is MISSING else value
        if value is VARIES or value is None:
            return
        values[name] = value
    receiver = call.func.value if isinstance(call.func, ast.Attribute) else None
    if receiver is not None and not is_pure(receiver, impure):
        return
    if function.bound:
        values[function.node.args.args[0].arg] = receiver
        names = list(values)
    if any(isinstance(part, ast.Starred) for part in call.args):
        return
    expression = function.node.body[0].value
    inside = [node for node in walk(expression) if isinstance(node, ast.Name)]
    nested = any(isinstance(n, (ast.Lambda, *COMPREHENSIONS, ast.NamedExpr)) for n in walk(expression))
    uses = {name: sum(node.id == name for node in inside) for name in values}
    if literal(expression) is UNKNOWN:
        small = isinstance(expression, (ast.Name, ast.Constant))
        if len(function.calls) > 1 and not small or nested or scope is None:
            return
        if any(node.id in ("super", "__class__") for node in inside):
            return
        if any(isinstance(n, (ast.Yield, ast.Await)) for n in walk(expression)):
            return
        rich = [name for name, value in values.items() if not isinstance(value, (ast.Name, ast.Constant))]
        if function.bound and isinstance(receiver, ast.Attribute):
            rich.remove(function.node.args.args[0].arg)
        if any(uses[name] != 1 for name in rich) or not _in_order(expression, rich):
            return
        for node in inside:
            if node.id not in values and scope.find(node.id) is not analysis.binding.get(node):
                return
    elif not all(is_pure(value, impure) for value in values.values()):
        return
    become(call, _Substitute(values).visit(clone(expression)))
