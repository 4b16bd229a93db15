"""Which name of a source is bound where: what folding and renaming know about names."""

import ast
from collections.abc import Iterator

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


NO_NODES = {
    "ctx", "op", "ops", "id", "attr", "arg", "name", "asname", "level", "module", "kind", "simple",
    "conversion", "is_async", "type_comment",
}  # fmt: skip
LEAVES = {ast.Constant, ast.Global, ast.Nonlocal}
PARTS = {  # the fields of a kind of node that may hold nodes, contexts and operators aside
    kind: () if kind in LEAVES else tuple(field for field in kind._fields if field not in NO_NODES)
    for kind in vars(ast).values()
    if isinstance(kind, type) and issubclass(kind, ast.AST)
}
LAST_FIRST = {kind: fields[::-1] for kind, fields in PARTS.items()}


def children(node: ast.AST) -> list[ast.AST]:
    """The nodes directly below one, in the order of its fields."""
    found = []
    for field in PARTS[node.__class__]:
        value = getattr(node, field, None)
        if value.__class__ is list:
            found += value
        else:
            found.append(value)
    return [part for part in found if part is not None]


def walk(node: ast.AST) -> list[ast.AST]:
    """A node and all below it, as `ast.walk`, but quicker and in the order of the text."""
    found, stack = [], [node]
    while stack:
        node = stack.pop()
        if node is not None:  # a default that is missing, the key of `**`
            found.append(node)
            for field in LAST_FIRST[node.__class__]:
                value = getattr(node, field, None)
                if value.__class__ is list:
                    stack += value[::-1]
                elif value is not None:
                    stack.append(value)
    return found


class Visitor:
    """`ast.NodeVisitor`, but quicker: contexts and operators are not visited."""

    def __init_subclass__(cls):
        found = [name for name in dir(cls) if name.startswith("visit_")]
        cls.methods = {getattr(ast, name.removeprefix("visit_")): getattr(cls, name) for name in found}

    def visit(self, node: ast.AST) -> ast.AST | list | None:
        """Call the method `visit_KIND` of a node, or visit what is below it."""
        method = self.methods.get(node.__class__)
        return method(self, node) if method else self.generic_visit(node)

    def generic_visit(self, node: ast.AST) -> object:
        """Visit all nodes below one."""
        for part in children(node):
            self.visit(part)
        return node


class Transformer(Visitor):
    """`ast.NodeTransformer`: a visit returns what stands in a node's place, a node, several or None."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Visit all nodes below one, and put what they become in their place."""
        for field in PARTS[node.__class__]:
            old = getattr(node, field, None)
            if old.__class__ is list:
                new = []
                for part in old:
                    result = self.visit(part) if part is not None else None
                    if result.__class__ is list:
                        new += result
                    elif result is not None or part is None:
                        new.append(result)
                old[:] = new
            elif old is not None:
                setattr(node, field, self.visit(old))
        return node


def clone(node: object) -> object:
    """A copy of a tree. (`copy.deepcopy` would also copy what a minifier has hung on the nodes.)"""
    if isinstance(node, list):
        return [clone(part) for part in node]
    if not isinstance(node, ast.AST) or not node._fields:
        return node
    new = type(node)(**{field: clone(getattr(node, field, None)) for field in node._fields})
    return ast.copy_location(new, node)


def become(node: ast.AST, value: ast.AST) -> None:
    """Make a node another one, in place."""
    new = clone(value)
    node.__class__ = new.__class__
    vars(node).clear()
    vars(node).update(vars(new))


class Binding:
    """A name of one scope: the nodes that store it, with their field for the name, and those that load it."""

    def __init__(self, name: str, scope: "Scope"):
        self.name, self.scope = name, scope
        self.stores: list[tuple[ast.AST, object]] = []
        self.loads: list[ast.Name] = []
        self.declared: list[tuple[ast.AST, int]] = []  # in statements `global` and `nonlocal`
        self.users: set[Scope] = {scope}  # the scopes in which the name stands

    @property
    def is_parameter(self) -> bool:
        """Whether a function's caller gives the value."""
        return any(isinstance(node, ast.arg) for node, _ in self.stores)

    def rename(self, name: str) -> None:
        """Put another name in all places."""
        for node, field in self.stores:
            setattr(node, field, name)
        for node in self.loads:
            node.id = name
        for node, index in self.declared:
            node.names[index] = name
        self.name = name


class Scope:
    """A module, class, function, lambda or comprehension with the names that it binds."""

    def __init__(self, node: ast.AST, parent: "Scope | None"):
        self.node, self.parent = node, parent
        self.names: dict[str, Binding] = {}
        self.outer: dict[str, str] = {}  # names declared `global` or `nonlocal` here
        self.children: list[Scope] = []
        if parent:
            parent.children.append(self)

    @property
    def is_class(self) -> bool:
        """Whether functions inside do not see the names."""
        return isinstance(self.node, ast.ClassDef)

    def above(self) -> "Iterator[Scope]":
        """The scopes in which names of this one are looked up, this one first."""
        yield self
        scope = self.parent
        while scope:
            if not scope.is_class:
                yield scope
            scope = scope.parent

    def find(self, name: str) -> Binding | None:
        """What a name means in this scope; None: a builtin, or nothing."""
        kind = self.outer.get(name)
        for scope in self.above():
            if kind == "global" and scope.parent is not None or kind == "nonlocal" and scope is self:
                continue
            if name in scope.names:
                return scope.names[name]
            if scope is not self and name in scope.outer:
                return scope.find(name)
        return None

    def walk(self) -> "Iterator[Scope]":
        """This scope and all inside it."""
        yield self
        for child in self.children:
            yield from child.walk()


class Analysis(Visitor):
    """All scopes of a module; `undefined` are the names that nothing binds, builtins among them."""

    def __init__(self, tree: ast.Module):
        self.module = self.scope = Scope(tree, None)
        self.of: dict[ast.AST, Scope] = {tree: self.module}  # scope that a node opens
        self.uses: list[tuple[ast.Name, Scope]] = []
        self.binding: dict[ast.AST, Binding] = {}  # of a Name, or of a definition
        self.undefined: dict[str, ast.Name] = {}
        self.pending: list[tuple[str, ast.AST, object, Scope]] = []
        for statement in tree.body:
            self.visit(statement)
        for name, node, field, scope in self.pending:
            self._store(name, node, field, scope)
        for node, scope in self.uses:
            binding = scope.find(node.id)
            if binding is None:
                self.undefined.setdefault(node.id, node)
                continue
            binding.loads.append(node)
            self.binding[node] = binding
            self._mark(binding, scope)
        for scope in self.module.walk():
            for node in getattr(scope.node, "body", []) if scope.outer else []:
                self._declare(node, scope)

    def __del__(self):
        """Take the scopes apart: they know each other, and would be left to Python's search for garbage."""
        for scope in [*self.module.walk()]:
            vars(scope).clear()

    def _declare(self, node: ast.AST, scope: Scope) -> None:
        for child in walk(node):
            if isinstance(child, (ast.Global, ast.Nonlocal)):
                for index, name in enumerate(child.names):
                    binding = scope.find(name)
                    if binding and (child, index) not in binding.declared and name in scope.outer:
                        binding.declared.append((child, index))

    @staticmethod
    def _mark(binding: Binding, scope: Scope) -> None:
        while scope is not binding.scope:
            binding.users.add(scope)
            scope = scope.parent

    def bind(self, name: str, node: ast.AST, field: object, scope: Scope | None = None) -> None:
        """A place that stores a name."""
        scope = scope or self.scope
        if name in scope.outer:
            self.pending.append((name, node, field, scope))
        else:
            binding = scope.names.get(name)
            if binding is None:
                binding = scope.names[name] = Binding(name, scope)
            binding.stores.append((node, field))
            self.binding[node] = binding

    def _store(self, name: str, node: ast.AST, field: object, scope: Scope) -> None:
        binding = scope.find(name)
        if binding is None:
            binding = self.module.names.setdefault(name, Binding(name, self.module))
        binding.stores.append((node, field))
        self.binding[node] = binding
        self._mark(binding, scope)

    def _inside(self, node: ast.AST, parts: list) -> None:
        self.scope = self.of[node] = Scope(node, self.scope)
        for part in parts:
            self.visit(part)
        self.scope = self.scope.parent

    def visit_Name(self, node: ast.Name) -> None:  # noqa: N802, D102
        if isinstance(node.ctx, ast.Load):
            self.uses.append((node, self.scope))
        else:
            self.bind(node.id, node, "id")

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:  # noqa: N802, D102
        self.visit(node.value)
        scope = self.scope
        while isinstance(scope.node, COMPREHENSIONS):
            scope = scope.parent
        self.bind(node.target.id, node.target, "id", scope)

    def visit_arg(self, node: ast.arg) -> None:  # noqa: D102
        self.bind(node.arg, node, "arg")

    def _function(self, node: ast.FunctionDef | ast.Lambda) -> None:
        a = node.args
        parameters = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        outside = [*a.defaults, *filter(None, a.kw_defaults), *(p.annotation for p in parameters)]
        if not isinstance(node, ast.Lambda):
            self.bind(node.name, node, "name")
            outside += [*node.decorator_list, node.returns]
        for part in filter(None, outside):
            self.visit(part)
        body = [node.body] if isinstance(node, ast.Lambda) else node.body
        declared = [] if isinstance(node, ast.Lambda) else [*body]
        self.scope = self.of[node] = Scope(node, self.scope)
        while declared:  # `global` and `nonlocal` stand before what they are about
            part = declared.pop()
            if isinstance(part, (ast.Global, ast.Nonlocal)):
                self.scope.outer |= dict.fromkeys(part.names, type(part).__name__.lower())
            if not isinstance(part, (*FUNCTIONS, ast.ClassDef, ast.expr)):
                declared += children(part)
        for part in [*parameters, *body]:
            self.visit(part)
        self.scope = self.scope.parent

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _function  # noqa: N815

    def visit_ClassDef(self, node: ast.ClassDef) -> None:  # noqa: N802, D102
        self.bind(node.name, node, "name")
        for part in [*node.bases, *node.keywords, *node.decorator_list]:
            self.visit(part)
        self._inside(node, node.body)

    def _comprehension(self, node: ast.ListComp) -> None:
        first, *others = node.generators
        self.visit(first.iter)
        values = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        self._inside(node, [first.target, *first.ifs, *others, *values])

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension  # noqa: N815

    def visit_alias(self, node: ast.alias) -> None:  # noqa: D102
        self.bind(node.asname or node.name.partition(".")[0], node, "asname")

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:  # noqa: N802, D102
        if node.name:
            self.bind(node.name, node, "name")
        self.generic_visit(node)
