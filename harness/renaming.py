"""Short names for what only the script itself knows by name.

Variables, functions and classes are renamed scope by scope. Attributes, and parameters that a call names, are
words of the whole script: they are renamed everywhere or, where something else may know them (a library, a
text, the keys of a state dict), nowhere.
"""

import ast
import collections
import itertools
import keyword
import string
from collections.abc import Iterator

from harness.definitions import DUNDER, own_attributes
from harness.expressions import is_kernel
from harness.foreign import foreign_names
from harness.members import named_in_texts
from harness.scopes import Analysis, Binding, Scope, walk

LETTERS = string.ascii_lowercase + string.ascii_uppercase


def short_names() -> Iterator[str]:
    """a, b, ..., Z, aa, ab, ..."""
    yield from LETTERS
    for first, second in itertools.product(LETTERS, LETTERS + string.digits):
        if not keyword.iskeyword(first + second) and first + second != "id":
            yield first + second


def rename(tree: ast.Module) -> ast.Module:
    """The tree with short names, in place."""
    words_ = Words(tree)
    analysis = words_.analysis
    groups: dict[str, list[Binding]] = collections.defaultdict(list)
    fixed: list[tuple[Binding, str]] = []
    for scope in analysis.module.walk():
        for binding in scope.names.values():
            name = words_.fixed(binding)
            if name is None:
                groups[binding.name].append(binding)
            else:
                fixed.append((binding, name))
    taken: dict[Scope, set[str]] = collections.defaultdict(set)
    for binding, name in fixed:
        for scope in binding.users:
            taken[scope].add(name)
    for name in analysis.undefined:  # builtins
        taken[analysis.module].add(name)
    plan = [*fixed]
    count = lambda name: sum(len(b.loads) + len(b.stores) for b in groups[name])  # noqa: E731
    for name in sorted(groups, key=lambda name: (-count(name), name)):
        plan += _choose(groups[name], taken)
    words_.apply()
    for binding, name in plan:
        binding.rename(name)
    return tree


def _choose(group: list[Binding], taken: dict[Scope, set[str]]) -> list[tuple[Binding, str]]:
    """Names for the bindings of one old name: one for all where a letter is free, else each its own."""
    everywhere = set().union(*(taken[scope] for binding in group for scope in binding.users))
    common = next((letter for letter in LETTERS if letter not in everywhere), None)
    plan = []
    for binding in sorted(group, key=lambda b: -len(b.loads)):
        used = set().union(*(taken[scope] for scope in binding.users))
        name = common or next(name for name in short_names() if name not in used)
        for scope in binding.users:
            taken[scope].add(name)
        plan.append((binding, name))
    return plan


class Words:
    """Attributes and named parameters: which get another name, and which."""

    def __init__(self, tree: ast.Module):
        self.tree, self.analysis = tree, Analysis(tree)
        self.foreign = foreign_names(tree)
        self.own = own_attributes(tree)
        self.functions: dict[str, list[ast.FunctionDef]] = collections.defaultdict(list)
        self.classes = {node.name: node for node in walk(tree) if isinstance(node, ast.ClassDef)}
        self.fields: dict[str, set[str]] = {}
        self.methods: dict[str, list[ast.FunctionDef]] = collections.defaultdict(list)
        for node in walk(tree):
            if isinstance(node, ast.FunctionDef):
                self.functions[node.name].append(node)
            elif isinstance(node, ast.ClassDef):
                for part in node.body:
                    if isinstance(part, ast.FunctionDef):
                        self.methods[part.name].append(part)
                self.fields[node.name] = own_attributes(ast.Module([node], []))
        self.texts = set(self._texts())
        self.keywords: set[str] = set()  # words that calls of our functions use
        self.kept = set(self.foreign) | self.texts | set(self._module_keys())
        self._calls()
        self.opened = self._opened()
        self.new = self._name()

    def _texts(self) -> Iterator[str]:
        """Words that a text may use as a name: whole texts, and what getattr and its like may mean."""
        yield from named_in_texts(self.tree)
        for node in walk(self.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                yield node.value

    def _module_keys(self) -> Iterator[str]:
        """Attributes that may be parts of a network: keys of its state dict."""
        for node in self.classes.values():
            if any("Module" in ast.unparse(base) for base in node.bases):
                for part in walk(node):
                    if isinstance(part, ast.Assign) and any(
                        isinstance(n, ast.Call) for n in walk(part.value)
                    ):
                        for target in part.targets:
                            yield from (n.attr for n in walk(target) if isinstance(n, ast.Attribute))

    def _calls(self) -> None:
        for call in walk(self.tree):
            for keyword_ in call.keywords if isinstance(call, ast.Call) else ():
                if keyword_.arg is not None:
                    known = keyword_.arg in self._parameters(call.func)
                    (self.keywords if known else self.kept).add(keyword_.arg)

    def _parameters(self, function: ast.expr) -> set[str]:
        """The names that a call may give, where it is certainly one of ours; else none."""
        if isinstance(function, ast.Name):
            binding = self.analysis.binding.get(function)
            nodes = [node for node, _ in binding.stores] if binding else []
            if all(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in nodes):
                return set().union(*map(self._names, nodes))
            return set()
        if isinstance(function, ast.Attribute) and function.attr not in self.foreign:
            root = function.value
            while isinstance(root, ast.Attribute):
                root = root.value
            binding = self.analysis.binding.get(root) if isinstance(root, ast.Name) else None
            if not (binding and any(isinstance(node, ast.alias) for node, _ in binding.stores)):
                nodes = self.methods.get(function.attr, [])
                return set.intersection(*map(self._names, nodes)) if nodes else set()
        return set()

    def _names(self, node: ast.AST) -> set[str]:
        if isinstance(node, ast.ClassDef):
            inits = [part for part in node.body if getattr(part, "name", "") == "__init__"]
            if inits:
                return self._names(inits[0])
            data = {p.target.id for p in node.body if isinstance(p, ast.AnnAssign)}
            own = [self.classes[b.id] for b in node.bases if isinstance(b, ast.Name) and b.id in self.classes]
            return data.union(*map(self._names, own))
        return {parameter.arg for parameter in [*node.args.args, *node.args.kwonlyargs]}

    def _opened(self) -> set[ast.AST]:
        """Functions whose parameters a text may name: called with `**`, or given to something else."""
        called = {call.func: call for call in walk(self.tree) if isinstance(call, ast.Call)}
        opened: set[ast.AST] = set()
        for node in walk(self.tree):
            if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
                call = called.get(node)
                if call and not any(k.arg is None for k in call.keywords):
                    continue
                if isinstance(node, ast.Name):
                    binding = self.analysis.binding.get(node)
                    opened.update(part for part, _ in (binding.stores if binding else ()))
                else:
                    opened.update(self.methods.get(node.attr, ()))
            elif isinstance(node, ast.keyword) and node.arg == "setup_context":
                opened.add(node.value)
        for name, nodes in self.methods.items():
            if name in self.foreign or any(node in opened for node in nodes):
                opened.update(nodes)
        for node in self.classes.values():
            if node in opened:
                opened.update(part for part in node.body if getattr(part, "name", "") == "__init__")
        return opened

    def _name(self) -> dict[str, str]:
        free = {
            word for word in self.own | self.keywords if word not in self.kept and not DUNDER.fullmatch(word)
        }
        uses = collections.Counter()
        for node in walk(self.tree):
            if isinstance(node, ast.Attribute):
                uses[node.attr] += 1
            elif isinstance(node, ast.keyword):
                uses[node.arg] += 1
        order = sorted(free, key=lambda word: (-uses[word], word))
        blocked = set(self.foreign) | (set(uses) - free) | self.own - free
        candidates = (name for name in short_names() if name not in blocked)
        return dict(zip(order, candidates, strict=False))

    def fixed(self, binding: Binding) -> str | None:
        """The name that a binding has to have; None: it may get any."""
        scope, name = binding.scope, binding.name
        if DUNDER.fullmatch(name):
            return name
        if scope.is_class:
            return self.new.get(name, name)
        if any(user is not scope and is_kernel(user.node) for user in binding.users):
            return name  # Triton's interpreter knows `tl` by this name only
        for node, _ in binding.stores:
            if isinstance(node, ast.alias) and node.asname is None and "." in node.name:
                return name
            if isinstance(node, ast.arg):
                if is_kernel(scope.node) or scope.node in self.opened and name in self.kept_of(scope.node):
                    return name
                if name in self.keywords | self.kept and self._is_named(scope.node, name):
                    return self.new.get(name, name)
        return None

    def kept_of(self, node: ast.AST) -> set[str]:
        """Names of parameters that a function which is given away has to keep."""
        return {"ctx", "inputs", "output"} if isinstance(node, ast.Lambda) else self.texts | self.kept

    def _is_named(self, node: ast.AST, name: str) -> bool:
        """Whether some call names a parameter of that name: a lambda's and a star's are not meant."""
        if isinstance(node, ast.Lambda):
            return False
        stars = {parameter.arg for parameter in (node.args.vararg, node.args.kwarg) if parameter}
        return name not in stars and (name in self.keywords or name in self._given())

    def _given(self) -> set[str]:
        if not hasattr(self, "_all"):
            self._all = {n.arg for n in walk(self.tree) if isinstance(n, ast.keyword) and n.arg}
        return self._all

    def apply(self) -> None:
        """Rename attributes and the keywords of calls."""
        for node in walk(self.tree):
            if isinstance(node, ast.Attribute):
                node.attr = self.new.get(node.attr, node.attr)
            elif isinstance(node, ast.keyword) and node.arg:
                node.arg = self.new.get(node.arg, node.arg)
