"""Folding of what belongs to classes: attributes that are one literal, methods that only return one."""

import ast
import collections
import re
from collections.abc import Iterator

from harness.expressions import UNKNOWN, as_node, is_pure, literal
from harness.scopes import Transformer, children, walk

BY_NAME = ("getattr", "setattr", "hasattr", "attrgetter", "methodcaller")
OBJECT = ("self", "cls", "super()")


def named_in_texts(tree: ast.Module) -> set[str]:
    """Attributes that a text may mean: in getattr and its like, fields of namedtuple(), settings of Config.

    A text with gaps means all that it fits. Where anything may be asked for, each text that is a name is.
    """
    found, texts, own, open_ended = set(), set(), set(), False
    asked: list[ast.expr | None] = []  # what getattr and its like are given
    for node in walk(tree):
        if isinstance(node, ast.ClassDef):
            found.update(_texts(node) if node.name == "Config" else ())
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    own.add(part.name)
                else:
                    own.update(n.id for n in walk(part) if isinstance(n, ast.Name))
        elif isinstance(node, ast.Attribute):
            own.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(node.value)
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if called in ("namedtuple", "NamedTuple"):
                found.update(word for text in _texts(node) for word in text.replace(",", " ").split())
            elif called in BY_NAME:
                asked.append(node.args[1] if len(node.args) > 1 else None)
    for name in asked:
        if isinstance(name, ast.JoinedStr):
            parts = (re.escape(p.value) if isinstance(p, ast.Constant) else ".*" for p in name.values)
            found.update(filter(re.compile("".join(parts)).fullmatch, own))
        elif isinstance(name, ast.Constant):
            found.add(name.value)
        else:
            open_ended = True
    return found | {text for text in texts if text.isidentifier() and open_ended}


def _texts(tree: ast.AST) -> set[str]:
    constants = (node.value for node in walk(tree) if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str)}


def attribute_reads(tree: ast.AST, owner: str = "") -> set[str | tuple[str, str]]:
    """The attributes that are read: words or, where a class reads one of its own object, (class, word).

    What is read by a text is in `named_in_texts`.
    """
    found: set[str | tuple[str, str]] = set()
    stack: list[tuple[ast.AST, str]] = [(tree, owner)]
    while stack:
        node, owner = stack.pop()
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Store):
            receiver = node.value.id if isinstance(node.value, ast.Name) else ""
            if isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super":
                receiver = "super()"
            found.add((owner, node.attr) if owner and receiver in OBJECT else node.attr)
        inner = node.name if isinstance(node, ast.ClassDef) else owner
        stack += [(part, inner) for part in children(node)]
    return found


def families(tree: ast.Module) -> dict[str, set[str]]:
    """For each class itself, the classes that it is derived from and those derived from it."""
    own = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    above: dict[str, set[str]] = {}
    for name in own:
        found, left = set(), [name]
        while left:
            base = left.pop()
            found.add(base)
            left += [
                b.id for b in own[base].bases if isinstance(b, ast.Name) and b.id in own and b.id not in found
            ]
        above[name] = found
    return {name: above[name] | {other for other in own if name in above[other]} for name in own}


def is_read(word: str, owner: str, reads: set, family: dict[str, set[str]]) -> bool:
    """Whether an attribute of a class's objects is read."""
    return word in reads or any((name, word) in reads for name in family.get(owner, {owner}))


def pairs(node: ast.Assign) -> list[tuple[ast.expr, ast.expr]]:
    """Targets and values of an assignment, taken apart where both are tuples of the same length."""
    if len(node.targets) > 1:
        return [(target, node.value) for target in node.targets]
    target, value = node.targets[0], node.value
    tuples = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
    if not tuples or len(target.elts) != len(value.elts):
        return [(target, value)]
    if any(isinstance(part, ast.Starred) for part in [*target.elts, *value.elts]):
        return [(target, value)]
    return list(zip(target.elts, value.elts, strict=True))


class Members(Transformer):
    """Replaces attributes and calls of methods by the literal that they are."""

    def __init__(self, tree: ast.Module, impure: set[str], foreign: frozenset[str]):
        self.impure = impure
        stored: dict[str, list] = collections.defaultdict(list)
        methods: dict[str, list[ast.FunctionDef]] = collections.defaultdict(list)
        for word, value in self._stores(tree):
            stored[word].append(value)
        for node in walk(tree):
            if isinstance(node, ast.ClassDef):
                for part in node.body:
                    if isinstance(part, ast.FunctionDef):
                        methods[part.name].append(part)
        closed = foreign | named_in_texts(tree)
        self.values, self.results = {}, {}
        for word, values in stored.items():
            value = values[0] if len(values) == 1 and word not in methods and word not in closed else UNKNOWN
            if isinstance(value, (bool, int, float, str, type(None))):
                self.values[word] = value
        for word, nodes in methods.items():
            if word not in closed and word not in stored and not word.startswith("__"):
                results = [self._result(node) for node in nodes]
                if UNKNOWN not in results and all(
                    type(r) is type(results[0]) and r == results[0] for r in results
                ):
                    kinds = {tuple(map(ast.unparse, node.decorator_list)) for node in nodes}
                    if kinds == {("property",)}:
                        self.values[word] = results[0]
                    elif kinds <= {(), ("staticmethod",)}:
                        self.results[word] = results[0]

    @staticmethod
    def _stores(tree: ast.Module) -> Iterator[tuple[str, object]]:
        known = {}
        for node in walk(tree):
            if isinstance(node, ast.Assign):
                known |= {target: literal(value) for target, value in pairs(node)}
            if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
                yield node.attr, known.get(node, UNKNOWN)
            elif isinstance(node, ast.ClassDef):
                for part in node.body:
                    if isinstance(part, ast.Assign):
                        values = {target: literal(value) for target, value in pairs(part)}
                        for target in part.targets:
                            for name in walk(target):
                                if isinstance(name, ast.Name):
                                    yield name.id, values.get(name, UNKNOWN)
                    elif isinstance(part, ast.AnnAssign):
                        yield part.target.id, UNKNOWN

    @staticmethod
    def _result(node: ast.FunctionDef) -> object:
        if len(node.body) == 1 and isinstance(node.body[0], ast.Pass):
            return None
        if len(node.body) == 1 and isinstance(node.body[0], ast.Return):
            value = literal(node.body[0].value)
            return value if isinstance(value, (bool, int, float, str, type(None))) else UNKNOWN
        return UNKNOWN

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:  # noqa: N802, D102
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Load) and node.attr in self.values and is_pure(node.value, self.impure):
            return as_node(self.values[node.attr])
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:  # noqa: N802, D102
        self.generic_visit(node)
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr in self.results:
            parts = [function.value, *node.args, *(keyword.value for keyword in node.keywords)]
            if all(is_pure(part, self.impure) for part in parts):
                return as_node(self.results[function.attr])
        return node
