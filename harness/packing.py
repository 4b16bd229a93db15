"""The script as it is counted: folded for its run, with short names, minified, compressed, in a wrapper.

A packed script has the run's settings in itself. It still reads from the environment, unchecked, what
`run_time_settings` names: where data and models lie, the seed, and which of the run's stages are wanted.
All other settings are constants of it, so a variable that names one of them changes nothing.
"""

import ast
import contextlib
import gc
import re
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from unittest import mock

from harness.expressions import Facts, as_node
from harness.folding import fold
from harness.renaming import rename
from harness.settings import PRESETS
from systems.layout import as_set
from train_gpt import Backends, Config, compress

WRAPPER = b'#coding:l1\nimport %s as c\nexec(c.decompress("""%s""".encode("l1")))\n'
KERNEL_WRAPPER = (  # Triton reads a kernel's source where linecache has it: under the name that exec gives
    b'#coding:l1\nimport %s as c,linecache as l\ns=c.decompress("""%s""".encode("l1")).decode()\n'
    b'l.cache["<string>"]=1,None,s.splitlines(1),""\nexec(s)\n'
)
RUN_TIME = (
    "seed", "run_id", "artifact_dir", "data_dir", "data_path", "tokenizer_path", "model_path",
    "quantized_model_path", "allow_unverified_data", "prequant_only", "quantize_only", "ttt_eval_only",
)  # fmt: skip


def packed_script(
    cfg: Config, backends: Backends, house: Mapping[str, bytes], on_gpu: bool = False
) -> tuple[bytes, bool]:
    """The script as it is counted for a run, and whether it was minified (python-minifier is installed).

    `house` has the files by their paths: train_gpt.py, and those of systems/. A packed script stays itself.
    Raises RunError where folding leaves something that is not whole.
    """
    source = house["train_gpt.py"]
    if source.startswith(WRAPPER.partition(b"%s")[0]):
        return source, True
    text, minified = folded_source(cfg, backends, house, on_gpu)
    return wrap(text.encode(), cfg), minified


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Trees are many objects and no garbage: to look for some would be a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@uncollected()
def folded_source(
    cfg: Config, backends: Backends, house: Mapping[str, bytes], on_gpu: bool = False
) -> tuple[str, bool]:
    """The text inside the wrapper, and whether it was minified."""
    return minify(folded_tree(cfg, backends, house, on_gpu))


@uncollected()
def folded_tree(cfg: Config, backends: Backends, house: Mapping[str, bytes], on_gpu: bool) -> ast.Module:
    """The folded script with short names."""
    parts = {name.removesuffix(".py").replace("/", "."): data for name, data in house.items()}
    facts, config = facts_of(cfg, backends, on_gpu), run_time_config(run_time_settings(cfg, on_gpu))
    return rename(fold(parts.pop("train_gpt"), parts, facts, config))


def wrap(source: bytes, cfg: Config) -> bytes:
    """A script that decompresses the source and runs it.

    The compressed bytes stand in a Latin-1 string literal (a fifth smaller than base85); only what a literal
    cannot hold is escaped.
    """
    wrapper = KERNEL_WRAPPER if b"import triton" in source else WRAPPER
    data = compress(source, cfg).replace(b"\\", rb"\\").replace(b"\r", rb"\r").replace(b'"""', rb'""\"')
    data = re.sub(rb"\0(?=[0-7])", rb"\\x00", data).replace(b"\0", rb"\0")
    codec = b"lzma" if cfg.compressor == "lzma" else b"brotli"
    return wrapper % (codec, data + b"\\\n" * data.endswith(b'"'))


def minify(tree: ast.Module) -> tuple[str, bool]:
    """The text of a tree, as short as it can be said, and whether it was minified.

    From Python 3.12 on a quote may stand inside an f-string of the same quote, and the minifier makes use of
    it. The machine that scores may have an older Python: the text is the same whichever Python packs it.
    """
    text = ast.unparse(tree)
    try:
        import python_minifier
        from python_minifier.f_string import OuterFString
    except ImportError:
        return text, False
    folded = (  # what folding and renaming have done
        "rename_locals", "hoist_literals", "remove_annotations", "remove_explicit_return_none",
        "remove_object_base", "convert_posargs_to_args", "remove_builtin_exception_brackets",
        "constant_folding",
    )  # fmt: skip
    begin = OuterFString.__init__
    with mock.patch.object(OuterFString, "__init__", lambda self, node, pep701: begin(self, node)):
        return python_minifier.minify(text, **dict.fromkeys(folded, False)), True


# -- what is known of a run


def run_time_settings(cfg: Config, on_gpu: bool) -> dict[str, object]:
    """The settings that a packed script still reads, with what they are when nothing is set.

    Places, seed and wanted stages are then the preset's and not the run's: the same code for all seeds, and
    as many bytes wherever the data lie.
    """
    names = [*RUN_TIME, *["cpu_threads"] * (not on_gpu)]
    row = PRESETS.get(cfg.preset, {})
    values = {name: row.get(name, getattr(Config, name)) for name in names}
    stream = cfg.ttt_sgd and cfg.ttt_enabled
    names = [name for name in ("ttt_enabled", "sliding_window_enabled") if getattr(cfg, name)]
    names += ["eval_stride"] * (cfg.sliding_window_enabled or stream) + ["ttt_chunk_tokens"] * stream
    names += ["val_doc_fraction"] * (cfg.ttt_enabled and not cfg.ttt_sgd)
    return values | {name: getattr(cfg, name) for name in names}


def facts_of(cfg: Config, backends: Backends, on_gpu: bool) -> Facts:
    """What is known before the packed script starts."""
    free = run_time_settings(cfg, on_gpu)
    settings = {name: value for name, value in vars(cfg).items() if name not in free}
    settings |= {"device": "cuda" if on_gpu else "cpu", "wandb_project": "", "tensorboard_dir": ""}
    settings |= {"checkpoint_seconds": 0.0, "audit": False, "preflight_only": False, "resume": False}
    methods = {}
    for name, member in vars(type(cfg)).items():
        if isinstance(member, property):
            value = _evaluate(member.fget, settings)
            settings |= {} if value is None else {name: value}
        elif callable(member) and not name.startswith("_") and name != "as_env":
            value = _evaluate(member, settings)
            methods |= {} if value is None else {name: value}
    return Facts(settings, methods, dict(vars(backends)), on_gpu)


def _evaluate(function: object, settings: Mapping[str, object]) -> object:
    """What a property or method gives from constant settings alone; None where that is not enough."""
    try:
        value = function(SimpleNamespace(**settings))
        return value if ast.literal_eval(repr(value)) == value else None
    except Exception:  # whatever is missing
        return None


def run_time_config(free: Mapping[str, object]) -> ast.ClassDef:
    """The class `Config` of a packed script: it takes its few settings from the environment, unchecked."""
    free = {name: as_set(value) for name, value in free.items()}
    text = f"""
class Config:
    def __init__(self, environ):
        for name, value in {ast.unparse(as_node(free))}.items():
            setattr(self, name, type(value)(environ.get(name.upper(), value)))
"""
    return ast.parse(text).body[0]
