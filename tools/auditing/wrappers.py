"""Sources inside self-extracting scripts, read without running them: only literals are decoded."""

import ast
import base64
import bz2
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

MOST_BYTES = 8_000_000  # of a source; what unpacks to more is no script but a bomb
MOST_LAYERS = 6  # wrappers within wrappers
RUNS_TEXT = ("exec", "eval", "compile", "marshal.loads", "pickle.loads", "runpy.run_path", "runpy.run_module")


BUILT_IN = ("exec", "eval", "__builtins__")


class Unreadable(ValueError):
    """A text that only its own program could make; the reason."""


class Layer(NamedTuple):
    """A source: as it lies in a file, or as a wrapper holds it."""

    text: str
    tree: ast.Module
    hidden: tuple[int, ...]  # lines that run a text which was not read


def parse(text: str) -> ast.Module:
    """The tree of a source, also of one for a later Python. Raises Unreadable for what is none."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass
    try:  # Python 3.12 allows strings within an f-string that Python 3.11 cannot read
        return ast.parse(without_fstrings(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Unreadable(f"no Python that can be parsed ({type(error).__name__})") from None


COMMENT_OR_STRING = re.compile(r"""#[^\n]*|((?<!\w)(?i:f|rf|fr))?(\"{3}|'{3}|"|')""")
SPECIAL = re.compile(r"""["'\\(){}\[\]]""")


def without_fstrings(text: str) -> str:
    """The source with "" for every f-string; all lines stay where they are."""
    parts, last = [], 0
    for begin, end in _fstrings(text):
        parts += [text[last:begin], '""', "\\\n" * text.count("\n", begin, end)]
        last = end
    return "".join([*parts, text[last:]])


def words_of_fstrings(text: str) -> str:
    """What all f-strings of a source say, but for what one Python may write otherwise: quotes and spaces."""
    said = (re.sub(r"""^\w+|["'\\\s]""", "", text[begin:end]) for begin, end in _fstrings(text))
    return "".join(said)


def _fstrings(text: str) -> Iterator[tuple[int, int]]:
    """Where the f-strings of a source begin and end."""
    at = 0
    while match := COMMENT_OR_STRING.search(text, at):
        at = _end_of_string(text, match) if match[2] else match.end()
        if match[1]:
            yield match.start(), at


def _end_of_string(text: str, begin: re.Match) -> int:
    """Where the literal ends that begins there; strings inside the braces of an f-string are passed over."""
    at, depth = begin.end(), 0
    while found := SPECIAL.search(text, at):
        at, sign = found.end(), found[0]
        if sign == "\\":
            at += 1
        elif depth == 0 and text.startswith(begin[2], found.start()):
            return found.start() + len(begin[2])
        elif depth and sign in "\"'":
            at = _end_of_string(text, COMMENT_OR_STRING.match(text, found.start()))
        elif begin[1] and depth == 0 and sign in "{}" and text[at : at + 1] == sign:
            at += 1  # {{ and }} are braces of the text
        elif begin[1] and (sign == "{" or depth and sign in "(["):
            depth += 1
        elif depth and sign in ")]}":
            depth -= 1
    return len(text)


def decoded(data: bytes) -> str:
    """The text of a source file, by the encoding that its first two lines declare."""
    first = b"\n".join(data.split(b"\n", 2)[:2])
    latin = any(name in first for name in (b"coding:l1", b"coding:latin", b"coding: latin"))
    return data.decode("latin-1" if latin else "utf-8", "surrogateescape")


def layers(data: bytes, depth: int = 0) -> Iterator[Layer]:
    """A source and, one after the other, those that its wrappers hold. Raises Unreadable."""
    text = decoded(data)
    tree = parse(text)
    found, hidden = [], []
    if depth == MOST_LAYERS:
        raise Unreadable(f"more than {MOST_LAYERS} wrappers within each other")
    reader = Reader(tree, data)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    direct = {id(call.func) for call in calls}
    for node in ast.walk(tree):  # `run = exec` and the like: what that runs is anybody's guess
        if isinstance(node, ast.Name) and node.id in BUILT_IN and id(node) not in direct:
            hidden.append(node.lineno)
    for call in calls:
        if reader.called(call) not in RUNS_TEXT:
            continue
        try:
            value = reader.value(call.args[0]) if call.args else None
            found.append(value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value)
        except (Unreadable, LookupError, TypeError, ValueError):
            hidden.append(call.lineno)
    yield Layer(text, tree, tuple(dict.fromkeys(hidden)))
    for inner in dict.fromkeys(value for value in found if isinstance(value, bytes) and value.strip()):
        yield from layers(inner, depth + 1)


def imported(tree: ast.AST) -> dict[str, str]:
    """What the names that imports bind stand for: `import lzma as L` gives L: lzma."""
    names = {}
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.Import) else ():
            names[alias.asname or alias.name.partition(".")[0]] = (
                alias.name if alias.asname else alias.name.partition(".")[0]
            )
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            names[alias.asname or alias.name] = f"{'.' * node.level}{node.module or ''}.{alias.name}"
    return names


def imported_always(tree: ast.Module) -> set[str]:
    """First names of the modules that a source imports whatever happens: not in a branch or a function."""
    found: set[str] = set()
    for node in tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found |= {name.partition(".")[0] for name in names}
    return found


def dotted(node: ast.AST, names: Mapping[str, str]) -> str:
    """The full name of an expression such as L.decompress, or `__import__("lzma").decompress`; else ""."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        before = dotted(node.value, names)
        return before and f"{before}.{node.attr}".removeprefix("builtins.")
    if isinstance(node, ast.Call) and dotted(node.func, names) in ("__import__", "importlib.import_module"):
        name = node.args[0] if node.args else None
        return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else ""
    return ""


class Reader:
    """Works out expressions of literals and of decoders; a name is what one assignment says it is."""

    def __init__(self, tree: ast.Module, data: bytes):
        self.data, self.imports = data, imported(tree)
        stores = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        self.assigned = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name) and stores.count(target.id) == 1
        }

    def called(self, call: ast.Call) -> str:
        """The full name of what is called."""
        return dotted(call.func, self.imports)

    def value(self, node: ast.AST) -> object:
        """What an expression is. Raises Unreadable unless it is made of literals and known decoders."""
        match node:
            case ast.Constant():
                return node.value
            case ast.List() | ast.Tuple():
                return [self.value(item) for item in node.elts]
            case ast.Dict():
                return {self.value(k): self.value(v) for k, v in zip(node.keys, node.values, strict=True)}
            case ast.Name() if node.id in self.assigned:
                return self.value(self.assigned[node.id])
            case ast.Attribute() if dotted(node, self.imports) in LZMA_CONSTANTS:
                return LZMA_CONSTANTS[dotted(node, self.imports)]
            case ast.BinOp(op=ast.Add()):
                return self.value(node.left) + self.value(node.right)
            case ast.Subscript(slice=ast.Slice(step=None) as part):
                ends = [end and self.value(end) for end in (part.lower, part.upper)]
                return self.value(node.value)[slice(*ends)]
            case ast.UnaryOp(op=ast.USub()):
                return -self.value(node.operand)
            case ast.Call():
                return self._result(node)
        raise Unreadable(f"line {node.lineno}: {ast.unparse(node)[:60]}")

    def _result(self, call: ast.Call) -> object:
        name = self.called(call)
        if name.endswith(".read") or name == "":
            opened = self._own_bytes(call)
            if opened is not None:
                return opened
        arguments = [self.value(argument) for argument in call.args]
        named = {word.arg: self.value(word.value) for word in call.keywords}
        if name == "compile":
            return arguments[0]
        if name in DECODERS:
            return DECODERS[name](*arguments, **named)
        if isinstance(call.func, ast.Attribute) and call.func.attr in METHODS:
            return getattr(self.value(call.func.value), call.func.attr)(*arguments, **named)
        raise Unreadable(f"line {call.lineno}: calls {name or 'something'}")

    def _own_bytes(self, call: ast.Call) -> bytes | str | None:
        """What `open(__file__, "rb").read()` gives."""
        reads = isinstance(call.func, ast.Attribute) and call.func.attr == "read"
        opener = call.func.value if reads else None
        if not (isinstance(opener, ast.Call) and self.called(opener) == "open" and opener.args):
            return None
        if not (isinstance(opener.args[0], ast.Name) and opener.args[0].id == "__file__"):
            return None
        binary = [self.value(a) for a in opener.args[1:2]] == ["rb"]
        return self.data if binary else decoded(self.data)


def _limited(data: bytes) -> bytes:
    if len(data) > MOST_BYTES:
        raise Unreadable(f"unpacks to more than {MOST_BYTES:,} bytes")
    return data


def _lzma(data: bytes, format: int = lzma.FORMAT_AUTO, memlimit: int | None = None, filters=None) -> bytes:
    try:
        return _limited(lzma.LZMADecompressor(format, memlimit, filters).decompress(data, MOST_BYTES + 1))
    except lzma.LZMAError as error:
        raise Unreadable(f"lzma: {error}") from None


def _zlib(data: bytes, wbits: int = zlib.MAX_WBITS, bufsize: int = 0) -> bytes:
    try:
        return _limited(zlib.decompressobj(wbits).decompress(data, MOST_BYTES + 1))
    except zlib.error as error:
        raise Unreadable(f"zlib: {error}") from None


def _bz2(data: bytes) -> bytes:
    try:
        return _limited(bz2.BZ2Decompressor().decompress(data, MOST_BYTES + 1))
    except OSError as error:
        raise Unreadable(f"bz2: {error}") from None


def _brotli(data: bytes) -> bytes:
    import brotli  # here: requirements.txt has it, but a script in another wrapper is read without

    try:
        unpacker = brotli.Decompressor()
        text = unpacker.process(data, output_buffer_limit=MOST_BYTES + 1)
    except brotli.error as error:
        raise Unreadable(f"brotli: {error}") from None
    return _limited(text)


DECODERS: Mapping[str, Callable] = {
    "lzma.decompress": _lzma,
    "zlib.decompress": _zlib,
    "gzip.decompress": lambda data: _zlib(data, zlib.MAX_WBITS | 16),
    "bz2.decompress": _bz2,
    "brotli.decompress": _brotli,
    "bytes.fromhex": bytes.fromhex,
    "binascii.unhexlify": bytes.fromhex,
    **{
        f"base64.{name}": getattr(base64, name)
        for name in ("b85decode", "a85decode", "b64decode", "urlsafe_b64decode", "b32decode", "b16decode")
    },
}
METHODS = ("decode", "encode", "join", "replace", "strip")
LZMA_CONSTANTS = {
    f"lzma.{name}": value for name, value in vars(lzma).items() if name.startswith(("FORMAT_", "FILTER_"))
}
