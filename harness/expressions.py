"""Folding of expressions: what is known of a run is put in, and what follows from it is computed."""

import ast
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from harness.scopes import Transformer, walk

UNKNOWN = object()  # value of an expression that is none before the script runs
PURE = (
    ast.Constant, ast.Name, ast.Attribute, ast.Tuple, ast.List, ast.Dict, ast.Set, ast.BinOp, ast.UnaryOp,
    ast.BoolOp, ast.Compare, ast.IfExp, ast.Subscript, ast.Slice, ast.JoinedStr, ast.FormattedValue,
    ast.Lambda, ast.arguments, ast.arg, ast.Starred, ast.keyword,
)  # fmt: skip
PURE_CALLS = {"len", "int", "float", "str", "bool", "range", "min", "max", "abs", "round", "type", "Path"}
BINARY = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
    ast.LShift: operator.lshift, ast.RShift: operator.rshift, ast.BitOr: operator.or_,
    ast.BitAnd: operator.and_, ast.BitXor: operator.xor,
}  # fmt: skip
UNARY = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_, ast.Invert: operator.invert}
COMPARE = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
CALLS = {"len": len, "int": int, "float": float, "str": str, "bool": bool, "min": min, "max": max, "abs": abs}
TEXT_METHODS = ("split", "upper", "lower", "startswith", "endswith", "replace", "strip")


class Facts(NamedTuple):
    """What is known of a run before its script starts."""

    settings: Mapping[str, object]  # cfg.name
    methods: Mapping[str, object] = {}  # cfg.name()
    backends: Mapping[str, object] = {}  # backends.name
    on_gpu: bool = False
    names: Mapping[str, object] = {"COUNTED": True, "__doc__": None}  # of the module


def as_node(value: object) -> ast.expr:
    """A literal."""
    if isinstance(value, (tuple, list)):
        kind = ast.Tuple if isinstance(value, tuple) else ast.List
        return kind([as_node(item) for item in value], ast.Load())
    if isinstance(value, dict):
        return ast.Dict([as_node(key) for key in value], [as_node(item) for item in value.values()])
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value < 0:
        return ast.UnaryOp(ast.USub(), ast.Constant(-value))
    return ast.Constant(value)


def literal(node: ast.AST | None) -> object:
    """The value of an expression of literals, UNKNOWN of any other."""
    kind = type(node)
    try:
        if kind is ast.Constant:
            return node.value
        if kind in (ast.Tuple, ast.List, ast.Set):
            values = [literal(item) for item in node.elts]
            known = UNKNOWN not in map(_identity, values)
            return {ast.Tuple: tuple, ast.List: list, ast.Set: set}[kind](values) if known else UNKNOWN
        if kind is ast.Dict:
            pairs = [(literal(k), literal(v)) for k, v in zip(node.keys, node.values, strict=True)]
            return UNKNOWN if any(v is UNKNOWN for pair in pairs for v in pair) else dict(pairs)
        if kind is ast.UnaryOp:
            value = literal(node.operand)
            return UNKNOWN if value is UNKNOWN else UNARY[type(node.op)](value)
        if kind is ast.BinOp:
            left, right = literal(node.left), literal(node.right)
            known = UNKNOWN not in (_identity(left), _identity(right)) and type(node.op) in BINARY
            large = type(node.op) in (ast.Pow, ast.LShift) and isinstance(right, int) and right > 64
            return BINARY[type(node.op)](left, right) if known and not large else UNKNOWN
    except Exception:  # what is wrong stays as it is
        pass
    return UNKNOWN


def _identity(value: object) -> object:
    return value if value is UNKNOWN else None


def is_pure(node: ast.AST, impure: Collection[str] = ()) -> bool:
    """Whether an expression only reads.

    `impure` are attributes whose reading does more and, with () behind it, a class whose making does nothing.
    """
    for part in walk(node):
        if isinstance(part, ast.Call):
            name = part.func.id if isinstance(part.func, ast.Name) else ""
            if name not in PURE_CALLS and f"{name}()" not in impure:
                return False
        elif not isinstance(part, PURE) or (isinstance(part, ast.Attribute) and part.attr in impure):
            return False
    return True


def is_boolean(node: ast.AST, names: Collection[ast.AST] = ()) -> bool:
    """Whether an expression can only be True or False; `names` are those that are known to be."""
    if node in names:
        return True
    if isinstance(node, ast.BoolOp):
        return all(is_boolean(part, names) for part in node.values)
    if isinstance(node, ast.Compare):  # a comparison of tensors is a tensor, membership and identity are not
        return all(isinstance(op, (ast.Is, ast.IsNot, ast.In, ast.NotIn)) for op in node.ops)
    negated = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    return negated or isinstance(node, ast.Constant) and isinstance(node.value, bool)


class Expressions(Transformer):
    """Folds every expression of a tree in place."""

    def __init__(self, facts: Facts, impure: set[str], module: Collection, booleans: Collection):
        """`module`: loads of the module's own names; `booleans`: of variables that are only such."""
        self.facts, self.impure, self.module, self.booleans = facts, impure, module, booleans
        self.owner = ""  # what `self` stands for

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:  # noqa: N802, D102
        before, self.owner = self.owner, {"Config": "cfg", "Backends": "backends"}.get(node.name, "")
        self.generic_visit(node)
        self.owner = before
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:  # noqa: N802, D102
        return node if is_kernel(node) else self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:  # noqa: N802, D102
        of_module = node in self.module or node.id == "__doc__"  # which nothing assigns
        known = isinstance(node.ctx, ast.Load) and node.id in self.facts.names and of_module
        return as_node(self.facts.names[node.id]) if known else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:  # noqa: N802, D102
        self.generic_visit(node)
        if not isinstance(node.ctx, ast.Load):
            return node
        value = node.value
        owner = value.id if isinstance(value, ast.Name) else getattr(value, "attr", "")
        owner = self.owner if owner == "self" else owner
        table = {"cfg": self.facts.settings, "backends": self.facts.backends}.get(owner, {})
        if node.attr in table:
            return as_node(table[node.attr])
        if node.attr in ("on_gpu", "is_cuda") and is_pure(value, self.impure):
            return ast.Constant(self.facts.on_gpu)
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:  # noqa: N802, D102
        self.generic_visit(node)
        stops = isinstance(node.op, ast.Or)  # a value of this truth ends it
        values = []
        for i, part in enumerate(node.values):
            value = literal(part)
            if value is not UNKNOWN and bool(value) != stops and i < len(node.values) - 1:
                continue
            values.append(part)
            if value is not UNKNOWN and bool(value) == stops:
                break
        *before, last = values
        if (
            before
            and isinstance(literal(last), bool)
            and all(is_boolean(part, self.booleans) for part in before)
        ):
            if literal(last) != stops:
                values = before
            elif all(is_pure(part, self.impure) for part in before):
                values = [last]
        node.values = values
        return values[0] if len(values) == 1 else node

    def truth(self, node: ast.expr) -> ast.expr:
        """An expression of which only its truth matters."""
        if isinstance(node, ast.BoolOp):
            node.values = [self.truth(part) for part in node.values]
            node = self.visit_BoolOp(node)
        if isinstance(node, ast.BoolOp):
            *before, last = node.values
            value, stops = literal(last), isinstance(node.op, ast.Or)
            if value is not UNKNOWN and bool(value) != stops:
                node = before[0] if len(before) == 1 else ast.BoolOp(node.op, before)
            elif value is not UNKNOWN and all(is_pure(part, self.impure) for part in before):
                node = ast.Constant(stops)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            node.operand = self.truth(node.operand)
            node = self.visit_UnaryOp(node)
        return node

    def _tested(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        node.test = self.truth(node.test)
        return node

    visit_If = visit_While = visit_Assert = _tested  # noqa: N815

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:  # noqa: N802, D102
        value = literal(self._tested(node).test)
        if value is UNKNOWN:
            return node
        return node.body if value else node.orelse

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:  # noqa: N802, D102
        self.generic_visit(node)
        value = literal(node)
        return ast.Constant(value) if isinstance(node.op, ast.Not) and value is not UNKNOWN else node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:  # noqa: N802, D102
        self.generic_visit(node)
        dicts = [part for part in (node.left, node.right) if isinstance(part, ast.Dict)]
        if isinstance(node.op, ast.BitOr) and len(dicts) == 2:
            return ast.Dict(dicts[0].keys + dicts[1].keys, dicts[0].values + dicts[1].values)
        return self._shorter(node)

    def _shorter(self, node: ast.expr) -> ast.expr:
        """The value instead of the expression, where it is known and takes no more room."""
        value = literal(node)
        if (
            value is UNKNOWN
            or isinstance(value, (set, complex))
            or value != value
            or value in (1e999, -1e999)
        ):
            return node
        return as_node(value) if len(repr(value)) <= len(ast.unparse(node)) else node

    def visit_Compare(self, node: ast.Compare) -> ast.AST:  # noqa: N802, D102
        self.generic_visit(node)
        if len(node.ops) > 1:  # a < b < c: what is known of its ends
            first = self._compared(node.left, node.ops[0], node.comparators[0])
            if first is False:
                return ast.Constant(False)
            if first:
                rest = ast.Compare(node.comparators[0], node.ops[1:], node.comparators[1:])
                return self.visit_Compare(rest)
            end = node.comparators[-2:]
            if self._compared(end[0], node.ops[-1], end[1]):
                rest = ast.Compare(node.left, node.ops[:-1], node.comparators[:-1])
                return self.visit_Compare(rest)
            return node
        value = self._compared(node.left, node.ops[0], node.comparators[0])
        return node if value is None else ast.Constant(value)

    @staticmethod
    def _compared(left: ast.expr, op: ast.cmpop, right: ast.expr) -> bool | None:
        a, b = literal(left), literal(right)
        if a is UNKNOWN or b is UNKNOWN:
            return None
        try:
            if isinstance(op, (ast.Is, ast.IsNot)) and not {a, b} & {None, True, False}:
                return None
            return bool(COMPARE[type(op)](a, b))
        except TypeError:
            return None

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:  # noqa: N802, D102
        self.generic_visit(node)
        value, key = node.value, literal(node.slice)
        if not isinstance(node.ctx, ast.Load) or not is_pure(value, self.impure):
            return node
        if isinstance(value, ast.Dict) and key is not UNKNOWN:
            keys = [literal(part) for part in value.keys]
            if key in keys and UNKNOWN not in map(_identity, keys) and keys.count(key) == 1:
                return value.values[keys.index(key)]
        if isinstance(value, (ast.Tuple, ast.List)) and not any(
            isinstance(e, ast.Starred) for e in value.elts
        ):
            if isinstance(key, int) and -len(value.elts) <= key < len(value.elts):
                return value.elts[key]
            if isinstance(node.slice, ast.Slice):
                ends = [node.slice.lower, node.slice.upper, node.slice.step]
                known = [None if part is None else literal(part) for part in ends]
                if all(part is None or type(part) in (int, bool) for part in known):
                    value.elts = value.elts[slice(*known)]
                    return value
        return node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:  # noqa: N802, D102
        self.generic_visit(node)
        parts: list[ast.expr] = []
        for part in node.values:
            text = part.value if isinstance(part, ast.Constant) else None
            if isinstance(part, ast.FormattedValue) and literal(part.value) is not UNKNOWN:
                text = self._formatted(part)
            if text is not None and parts and isinstance(parts[-1], ast.Constant):
                parts[-1] = ast.Constant(parts[-1].value + text)
            else:
                parts.append(part if text is None else ast.Constant(text))
        if not parts or len(parts) == 1 and isinstance(parts[0], ast.Constant):
            return parts[0] if parts else ast.Constant("")
        node.values = parts
        return node

    @staticmethod
    def _formatted(part: ast.FormattedValue) -> str | None:
        value, spec = literal(part.value), ""
        if part.format_spec is not None:
            spec = part.format_spec
            spec = spec.value if isinstance(spec, ast.Constant) else None
            if spec is None and all(isinstance(v, ast.Constant) for v in part.format_spec.values):
                spec = "".join(v.value for v in part.format_spec.values)
        convert = {-1: lambda v: v, 115: str, 114: repr, 97: ascii}[part.conversion]
        try:
            return None if spec is None else format(convert(value), spec)
        except (TypeError, ValueError):
            return None

    def visit_FormattedValue(self, node: ast.FormattedValue) -> ast.AST:  # noqa: N802, D102
        node.value = self.visit(node.value)
        if node.format_spec is not None:
            for part in node.format_spec.values:
                self.visit(part)
        return node

    def _spliced(self, node: ast.AST) -> ast.AST:
        """No stars before literals."""
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Load):
            node.elts = _without_stars(node.elts)
        return node

    visit_Tuple = visit_List = _spliced  # noqa: N815

    def visit_Dict(self, node: ast.Dict) -> ast.AST:  # noqa: N802, D102
        self.generic_visit(node)
        keys, values = [], []
        for key, value in zip(node.keys, node.values, strict=True):
            inner = key is None and isinstance(value, ast.Dict)
            keys += value.keys if inner else [key]
            values += value.values if inner else [value]
        node.keys, node.values = keys, values
        return node

    def visit_comprehension(self, node: ast.comprehension) -> ast.AST:  # noqa: D102
        self.generic_visit(node)
        tests = [self.truth(test) for test in node.ifs]
        node.ifs = [test for test in tests if not (isinstance(test, ast.Constant) and test.value)]
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:  # noqa: N802, D102
        self.generic_visit(node)
        node.args = _without_stars(node.args)
        keywords = []
        for keyword in node.keywords:
            value = keyword.value
            names = [literal(k) for k in value.keys] if isinstance(value, ast.Dict) else [None]
            if keyword.arg is None and all(isinstance(n, str) and n.isidentifier() for n in names):
                keywords += [ast.keyword(n, v) for n, v in zip(names, value.values, strict=True)]
            else:
                keywords.append(keyword)
        node.keywords = keywords
        return self._called(node)

    def _called(self, node: ast.Call) -> ast.AST:
        function, values = node.func, [literal(argument) for argument in node.args]
        if isinstance(function, ast.Attribute) and not values and not node.keywords:
            value = function.value
            owner = value.id if isinstance(value, ast.Name) else getattr(value, "attr", "")
            owner = self.owner if owner == "self" else owner
            if owner == "cfg" and function.attr in self.facts.methods:
                return as_node(self.facts.methods[function.attr])
        if node.keywords or UNKNOWN in map(_identity, values):
            return node
        try:
            if isinstance(function, ast.Name) and function.id in CALLS and values:
                result = CALLS[function.id](*values)
            elif isinstance(function, ast.Attribute) and function.attr in TEXT_METHODS:
                text = literal(function.value)
                if not isinstance(text, str):
                    return node
                result = getattr(text, function.attr)(*values)
            else:
                return node
        except Exception:  # what is wrong stays as it is
            return node
        return as_node(result) if len(repr(result)) <= len(ast.unparse(node)) else node


def _without_stars(parts: Sequence[ast.expr]) -> list[ast.expr]:
    flat = []
    for part in parts:
        inner = part.value if isinstance(part, ast.Starred) else None
        flat += inner.elts if isinstance(inner, (ast.Tuple, ast.List)) else [part]
    return flat


def is_kernel(node: ast.AST) -> bool:
    """Whether a function is Triton's."""
    decorators = getattr(node, "decorator_list", [])
    return any("triton.jit" in ast.unparse(decorator) for decorator in decorators)
