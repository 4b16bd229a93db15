"""What the sources of a folder show without being run: one row a rule, with the lines to look at.

A source can hide anything from such a reading, so a rule that finds nothing says CONSISTENT at most. It says
FAIL only where the line itself breaks a rule; what only looks like a known fault is NOT CHECKED, with its
line. Numbers after # are issues and pull requests of the contest, whose rulings the rules follow.
"""

import ast
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from auditing.run import CONSISTENT, FAIL, NOT_CHECKED, NotChecked, Verdict
from auditing.wrappers import Layer, Unreadable, dotted, imported, imported_always, layers
from command import Mistake
from reproducing.submission import CONTEST_DOCUMENTS
from runs import SIZE_LIMIT, RunRecord

OWN_SHARDS = 1_000  # shards of 10M tokens, as a folder's own preparation writes them; others have 80
SHOWN = 3  # hits of a rule that a row names


class Hit(NamedTuple):
    """A place that a rule is about."""

    where: str  # FILE:LINE
    what: str
    certain: bool = False  # whether the line itself breaks the rule


@dataclass(frozen=True)
class Source:
    """A source of the folder, or one that a wrapper held."""

    name: str
    tree: ast.Module
    imports: dict[str, str]

    @functools.cached_property
    def every(self) -> list[ast.AST]:
        """All nodes."""
        return list(ast.walk(self.tree))

    def at(self, node: ast.AST, what: str, certain: bool = False) -> Hit:
        """A hit at a node."""
        return Hit(f"{self.name}:{node.lineno}", what, certain)

    def nodes(self, *kinds: type) -> Iterator:
        """All nodes of some kinds, in no order that matters."""
        return (node for node in self.every if isinstance(node, kinds))

    def called(self, call: ast.Call) -> str:
        """The full name of what is called."""
        return dotted(call.func, self.imports)

    def identifiers(self) -> Iterator[tuple[str, ast.AST]]:
        """Every name that the source gives or uses, with a node of its line."""
        for node in self.every:
            match node:
                case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                    yield name, node
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    yield name, node


class Program:
    """The sources of a folder: the script with what it unpacks and imports, and all others (preparation)."""

    def __init__(self, folder: Path, script: Path, logs: Sequence[RunRecord] = ()):
        self.folder, self.script, self.logs = folder, script, logs
        self.unread: list[str] = []  # what hides from this reading
        self.files = sorted(path for path in folder.rglob("*") if path.is_file())
        modules = {path.stem: path for path in self.files if path.suffix == ".py" and path != script}
        self.sources = list(self._sources(script))
        self.helpers: list[Path] = []
        for source in self.sources:  # grows by what is imported
            for name in {full.lstrip(".").split(".")[0] for full in source.imports.values()} & {*modules}:
                if modules[name] not in self.helpers:
                    self.helpers.append(modules[name])
                    self.sources += self._sources(modules[name])
        self.helpers.sort()
        rest = [path for path in modules.values() if path not in self.helpers]
        self.others = [source for path in rest for source in self._sources(path, judged=False)]

    def _sources(self, path: Path, judged: bool = True) -> Iterator[Source]:
        name = path.relative_to(self.folder).as_posix()
        try:
            found: list[Layer] = list(layers(path.read_bytes()))
        except (Unreadable, OSError) as error:
            self.unread += [f"{name}: {error}"] if judged else []
            return
        for depth, layer in enumerate(found):
            shown = f"{name}, unpacked" if depth else name
            hidden = layer.hidden if judged else ()
            self.unread += [f"{shown}:{line} runs a text that only it can make" for line in hidden]
            yield Source(shown, layer.tree, imported(layer.tree))

    @property
    def lines(self) -> int:
        """Lines of the script and what it unpacks and imports."""
        return sum(max((n.end_lineno for n in source.tree.body), default=0) for source in self.sources)


class Rule(NamedTuple):
    """A row of the table."""

    name: str
    rule: str
    why: str
    find: Callable[[Program], Iterator[Hit]]


def script_of(folder: Path, named: str = "") -> Path | None:
    """The script of a folder, None where it has none. Raises Mistake where it is not clear which it is."""
    if named:
        path = folder / named
        if not path.is_file():
            raise Mistake(f"--script {named}: no such file in {folder}")
        return path
    found = sorted(folder.glob("train*.py"))
    if folder / "train_gpt.py" in found:
        return folder / "train_gpt.py"
    if len(found) > 1:
        raise Mistake(f"{folder}: has {', '.join(path.name for path in found)}; say with --script which ran")
    return found[0] if found else None


def judged(rule: Rule, program: Program) -> Verdict:
    """What a rule finds."""
    hits = list(dict.fromkeys(rule.find(program)))
    certain = [hit for hit in hits if hit.certain]
    if hits:
        shown = certain or hits
        text = "; ".join(f"{hit.where} {hit.what}" for hit in shown[:SHOWN])
        text += f" and {len(shown) - SHOWN} more" * (len(shown) > SHOWN)
        return Verdict(FAIL, text) if certain else Verdict(NOT_CHECKED, f"look at {text} ({rule.why})")
    if program.unread:
        return Verdict(NOT_CHECKED, "; ".join(program.unread[:SHOWN]))
    read = f"{len(program.sources)} sources, {program.lines:,} lines"
    return Verdict(CONSISTENT, f"nothing of the kind seen in {read}")


# -- bytes


SPACE = "▁"  # as SentencePiece writes a space


def byte_tables(program: Program) -> Iterator[Hit]:
    """Lengths of pieces that count the space which a flag adds again; decoded single tokens; equal shares."""
    for source in [*program.sources, *program.others]:
        for function in source.nodes(ast.FunctionDef):
            if _space_twice(list(ast.walk(function))):
                yield source.at(function, f"{function.name} measures pieces with their space, and flags it")
        for call in source.nodes(ast.Call):
            if _decodes_one(call):
                yield source.at(call, "measures single tokens decoded: half a letter is U+FFFD, 3 bytes")
        for node in source.nodes(ast.BinOp):
            if not isinstance(node.op, ast.Div):
                continue
            above, below = (ast.unparse(side)[:30] for side in (node.left, node.right))
            if re.search(r"(?i)log_?p|\blp\b", above) and re.search(r"(?i)byte|nb\b", below):
                yield source.at(node, f"spreads a probability evenly over bytes: {above} / {below}")


def _space_twice(nodes: Sequence[ast.AST]) -> bool:
    """Whether a function measures pieces, looks for their space, and never cuts it off."""
    measures = any(_is_method(node, "encode") for node in nodes)
    cuts = any(_called_with(nodes, name, SPACE) for name in ("lstrip", "removeprefix", "strip"))
    cuts = cuts or _called_with(nodes, "replace", SPACE, "")
    cuts = cuts or any(isinstance(n, ast.Slice) and getattr(n.lower, "value", 0) == 1 for n in nodes)
    return measures and _called_with(nodes, "startswith", SPACE) and not cuts


def _called_with(nodes: Sequence[ast.AST], method: str, *arguments: object) -> bool:
    """Whether a method is called with these literals as its first arguments."""
    calls = (node for node in nodes if _is_method(node, method))
    return any(
        [getattr(a, "value", None) for a in call.args[: len(arguments)]] == [*arguments] for call in calls
    )


def _decodes_one(call: ast.Call) -> bool:
    """Whether a call is `x.decode([token]).encode(...)`."""
    inner = call.func.value if _is_method(call, "encode") else None
    if not _is_method(inner, "decode"):
        return False
    return any(isinstance(given, ast.List) and len(given.elts) == 1 for given in inner.args)


def _is_method(node: ast.AST | None, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name


def pieces_of(model: bytes) -> list[str]:
    """The pieces of a SentencePiece model (protobuf: field 1 of the model, and field 1 of that).

    Raises IndexError or UnicodeDecodeError where it is none.
    """
    pieces, at = [], 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            value |= (model[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if model[at - 1] < 128:
                return value

    while at < len(model):
        key = number()
        if key & 7 != 2:
            break  # the pieces come first
        size = number()
        if key >> 3 == 1:
            end = at + size
            at += 1
            length = number()
            pieces.append(model[at : at + length].decode())
            at = end
        else:
            at += size
    return pieces


def tokenizers(program: Program) -> Iterator[Hit]:
    """Vocabularies of the folder without a piece for a space alone. Raises NotChecked where it has none."""
    models = [path for path in program.files if path.suffix == ".model"]
    if not models:
        raise NotChecked("no tokenizer in the folder")
    for path in models:
        name = path.relative_to(program.folder).as_posix()
        try:
            pieces = pieces_of(path.read_bytes())
        except (IndexError, UnicodeDecodeError):
            pieces = []
        if not pieces:
            yield Hit(name, "is not read as a SentencePiece model")
        elif SPACE not in pieces:
            yield Hit(name, f"has {len(pieces):,} pieces, none of them a space alone")


# -- what is reached and read

NETWORK = ("urllib.request.urlopen", "urllib.request.urlretrieve", "socket.create_connection")
NETWORK_MODULES = ("requests", "httpx", "aiohttp", "huggingface_hub", "datasets", "boto3", "ftplib")
NETWORK_WORDS = re.compile(r"\b(?:curl|wget|rsync|scp|git clone|pip3? install|apt(?:-get)? install)\b")
STARTS = ("os.system", "os.popen", "subprocess.run", "subprocess.call", "subprocess.Popen")
STARTS += ("subprocess.check_call", "subprocess.check_output")


def network(program: Program) -> Iterator[Hit]:
    """Downloads by the script; what prepares data may download."""
    for source in program.sources:
        for call in source.nodes(ast.Call):
            name = source.called(call)
            module, _, attribute = name.partition(".")
            if name in NETWORK or (attribute and module in NETWORK_MODULES):
                yield source.at(call, f"calls {name}", certain=True)
            elif name in STARTS and (found := NETWORK_WORDS.search(" ".join(_texts(call)))):
                yield source.at(call, f"starts {found[0]}", certain=True)
            elif name in ("socket.socket", "wandb.init", "urllib.request.Request"):
                yield source.at(call, f"calls {name}")
        for name in source.imports.values():
            if name.partition(".")[0] in NETWORK_MODULES:
                yield Hit(source.name, f"imports {name}")


def _texts(node: ast.AST) -> list[str]:
    """The literal texts inside an expression."""
    found = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
    return [value for value in found if isinstance(value, str)]


OPENERS = ("open", "io.open", "numpy.load", "numpy.fromfile", "numpy.memmap", "numpy.loadtxt", "torch.load")
OPENERS += ("pathlib.Path", "gzip.open", "lzma.open", "bz2.open", "sqlite3.connect", "ctypes.CDLL")
OPENERS += ("safetensors.torch.load_file", "ctypes.cdll.LoadLibrary")
HARMLESS = ("nvidia-smi", "git", "pyminify")  # none of them reads what a script is scored with
FREE = {".py", ".md", ".model", ".vocab", ".log"}  # code has its own row; tokenizers are not counted


def other_files(program: Program) -> Iterator[Hit]:
    """Files of the folder that the script opens by name and nobody counts."""
    counted = {log.model_bytes for log in program.logs} - {None}
    there = {
        path.name: path.stat().st_size
        for path in program.files
        if path.suffix not in FREE and path.stat().st_size not in counted
    }
    for source in program.sources:
        for call in source.nodes(ast.Call):
            name = source.called(call)
            if name.startswith("ctypes.") and name in OPENERS:
                yield source.at(call, "loads a library of machine code, which is not read here")
            started = next(iter(_texts(call)), "what is not said")
            if name in STARTS and started.split(" ")[0] not in HARMLESS:
                yield source.at(call, f"starts another program: {started[:40]}")
            for file in _files_in(call, there) if name in OPENERS and not _writes(call) else ():
                told = f"opens {file}, {there[file]:,} bytes of this folder that are not counted"
                yield source.at(call, told, certain=True)
        for text in source.nodes(ast.Constant):
            for file in _files_in(text, there):
                yield source.at(text, f"names {file}, {there[file]:,} bytes that are not counted")


def _files_in(node: ast.AST, there: Mapping[str, int]) -> set[str]:
    """Those of some files that an expression names."""
    return {text.rpartition("/")[2] for text in _texts(node)} & {*there}


def _writes(call: ast.Call) -> bool:
    """Whether an `open` is there to write."""
    modes = [*call.args[1:2], *(word.value for word in call.keywords if word.arg == "mode")]
    return any(set(text) & set("wax") for mode in modes for text in _texts(mode))


def helpers(program: Program) -> Iterator[Hit]:
    """Modules of the folder that the script imports, unless the logs' code bytes have them."""
    if not program.helpers:
        return
    size = program.script.stat().st_size
    more = sum(path.stat().st_size for path in program.helpers)
    if any(log.code_bytes == size + more for log in program.logs):
        return
    whole = max((log.artifact_bytes or 0 for log in program.logs), default=0)
    names = ", ".join(path.relative_to(program.folder).as_posix() for path in program.helpers)
    told = f"imports {names}, {more:,} bytes beside the counted script"
    over = whole + more >= SIZE_LIMIT
    told += f": {whole + more:,} bytes in all, limit {SIZE_LIMIT:,}" * over
    always = {name for source in program.sources for name in imported_always(source.tree)}
    yield Hit(program.script.name, told, certain=over and {path.stem for path in program.helpers} <= always)


# -- data


def overlap(program: Program) -> Iterator[Hit]:
    """Defaults of a data preparation that train on documents of the validation set.

    Raises NotChecked where no source of the folder has such a default.
    """
    own = any((log.environment.get("train_shards") or 0) >= OWN_SHARDS for log in program.logs)
    every = [*program.others, *program.sources]
    splits = [(source, value) for source in every for value in _splits(source)]
    if not splits:
        raise NotChecked("no source of the folder says how many documents are kept for validation")
    for source, value in splits:
        if value.value < CONTEST_DOCUMENTS:
            told = (
                f"keeps the first {value.value:,} documents for validation, scored are {CONTEST_DOCUMENTS:,}"
            )
            told += ", and the logs trained on shards of this size" * own
            yield source.at(value, told, certain=own)


def _splits(source: Source) -> Iterator[ast.Constant]:
    """The whole numbers that an option --val-docs has as its default, or that a name like VAL_DOCS is."""
    for call in source.nodes(ast.Call):
        option = next((getattr(a, "value", None) for a in call.args), None)
        if option in ("--val-docs", "--val_docs", "--num-val-docs", "--num_val_docs"):
            values = [word.value for word in call.keywords if word.arg == "default"]
            yield from (value for value in values if _whole(value))
    for node in source.nodes(ast.Assign, ast.AnnAssign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            named = re.fullmatch(r"(?i)(num_|n_|default_)?val(idation)?_docs", getattr(target, "id", ""))
            if named and _whole(node.value):
                yield node.value


def _whole(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int


# -- how it is scored


def _named(program: Program, pattern: str, what: str) -> Iterator[Hit]:
    """Names of the script that match, each where it stands first."""
    for source in program.sources:
        first: dict[str, ast.AST] = {}
        for name, node in source.identifiers():
            if re.search(pattern, name) and node.lineno <= getattr(first.get(name), "lineno", node.lineno):
                first[name] = node
        for name, node in sorted(first.items()):
            yield source.at(node, f"{name}: {what}")


def before_quantisation(program: Program) -> Iterator[Hit]:
    """Adaptation on validation tokens before anything was scored."""
    pattern = r"(?i)pre_?quant\w*(ttt|adapt)|(ttt|adapt)\w*pre_?quant|val_?finetune|finetune\w*_val"
    yield from _named(program, pattern, "adapts before the model is quantised and scored")
    for source in program.sources:
        functions = list(source.nodes(ast.FunctionDef))
        trains = {function.name for function in functions if {"backward", "step"} <= _attributes(function)}
        for function in functions:
            calls = [n for n in ast.walk(function) if isinstance(n, ast.Call)]
            names = [(call, source.called(call).rpartition(".")[2]) for call in calls]
            quantised = [call.lineno for call, name in names if re.search(r"(?i)quantiz|quantis|gptq", name)]
            for call, name in names:
                early = quantised and call.lineno < min(quantised)
                if early and name in trains and any(map(_of_validation, call.args)):
                    yield source.at(call, f"{name} trains on validation tokens before the quantisation")


def _attributes(node: ast.AST) -> set[str]:
    return {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}


def _of_validation(argument: ast.AST) -> bool:
    names = _attributes(argument) | {n.id for n in ast.walk(argument) if isinstance(n, ast.Name)}
    return any(re.match(r"val_(tok|data|stream)", name) for name in names)


SCORES = re.compile(r"(?i)nll|loss_sum|total_loss|loss_total|sum_loss|val_loss|bits")
TABLES = re.compile(r"(?i)count|cache|table|hist|ngram|memory")
EVALUATES = re.compile(r"(?i)eval|ttt|score|slot|adapt|valid")


def _updates(node: ast.AST) -> bool:
    if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Subscript):
        return bool(TABLES.search(ast.unparse(node.target)))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "step":
        return bool(re.search(r"(?i)opt", ast.unparse(node.func.value)))
    return False


def update_first(program: Program) -> Iterator[Hit]:
    """Loops of an evaluation that update before they add up the score; deltas fitted to what is scored."""
    pattern = r"(?i)(^|_)slot_?(delta|bias|lr|steps|opt)"
    yield from _named(program, pattern, "fits a delta to the scored positions")
    for source in program.sources:
        functions = (f for f in source.nodes(ast.FunctionDef) if EVALUATES.search(f.name))
        loops = ((f, n) for f in functions for n in ast.walk(f) if isinstance(n, ast.For | ast.While))
        for function, loop in loops:
            updates = min((n.lineno for n in ast.walk(loop) if _updates(n)), default=0)
            scores = min((n.lineno for n in ast.walk(loop) if _adds_score(n)), default=0)
            if 0 < updates < scores:
                yield source.at(loop, f"{function.name} updates in line {updates}, scores in {scores}")


def _adds_score(node: ast.AST) -> bool:
    adds = isinstance(node, ast.AugAssign) and not _updates(node)
    return adds and bool(SCORES.search(ast.unparse(node.target)))


TARGET = re.compile(r"(?i)^(tgt|targets?|y|tok|token|nxt|next_tok\w*|x_t|tgt_np|target_ids?)$")


def target_keys(program: Program) -> Iterator[Hit]:
    """Tables asked for the very token that is scored: what others would get is never looked at."""
    for source in program.sources:
        for function in source.nodes(ast.FunctionDef):
            nodes = list(ast.walk(function))
            mixed = (n for n in nodes if isinstance(n, ast.Assign) and _mixes_target(n.value))
            keys = {target.id for n in mixed for target in n.targets if isinstance(target, ast.Name)}
            for node in nodes:
                table, key = _looked_up(node)
                asked = _mixes_target(key) or (isinstance(key, ast.Name) and key.id in keys)
                if asked and TABLES.search(ast.unparse(table)):
                    told = f"{function.name} looks the scored token up: {ast.unparse(node)[:50]}"
                    yield source.at(node, told)


def _mixes_target(node: ast.AST | None) -> bool:
    """Whether an expression makes one key of the target and something else."""
    hashes = isinstance(node, ast.Call) and "hash" in ast.unparse(node.func)
    if not hashes and not isinstance(node, ast.BinOp | ast.Tuple):
        return False
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return any(map(TARGET.search, names)) and len(names) > 1


def _looked_up(node: ast.AST) -> tuple[ast.AST | None, ast.AST | None]:
    """Table and key of `table[key]`, read, or `table.get(key)`."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        return node.value, node.slice
    if _is_method(node, "get") and node.args:
        return node.func.value, node.args[0]
    return None, None


def passes(program: Program) -> Iterator[Hit]:
    """Second passes, the best of several, settings fitted to scored tokens."""
    yield from _named(program, r"(?i)two_?pass|second_?pass|pass_?2\b|re_?scor(e|ing)", "scores again")
    pattern = r"(?i)(fit|tune|best|search|optimi[sz]e)_?temp|temp\w*_(grid|search)|best_of"
    yield from _named(program, pattern, "chosen after the score was seen")
    for source in program.sources:
        for function in source.nodes(ast.FunctionDef):
            for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
                text = ast.unparse(call)
                if source.called(call) == "min" and re.search(r"(?i)nll|val_loss|bpb", text):
                    yield source.at(call, f"{function.name} takes the least: {text[:50]}")


RULES = (
    Rule("P1", "bytes: no space twice, no U+FFFD, no equal shares", "#1632, #1289, #1872", byte_tables),
    Rule("P2", "tokenizer has a piece for a space alone", "#897", tokenizers),
    Rule("P3", "script does not reach the network", "README", network),
    Rule("P4", "script opens no file that is not counted", "README", other_files),
    Rule("P5", "modules beside the script are counted", "README", helpers),
    Rule("P6", "preparation keeps 50,000 validation documents", "#2127", overlap),
    Rule("P7", "no training on validation tokens before the score", "#1376, #1958", before_quantisation),
    Rule("P8", "scored before updated, no SLOT", "#1240, #677", update_first),
    Rule("P9", "no table asked for the scored token alone", "#978, #1147", target_keys),
    Rule("P10", "one pass, nothing chosen by its score", "#677, #1017", passes),
)
