"""The script as it is counted."""

import ast
import re
from collections.abc import Container, Mapping

from harness.backends import ATTENTION
from train_gpt import _NAMES, KERNELS, PRESETS, Config, compress

WRAPPER = b'#coding:l1\nimport %s as c\nexec(c.decompress("""%s""".encode("l1")))\n'


def packed_script(cfg: Config, source: bytes) -> tuple[bytes, bool]:  # noqa: F811
    """The script as it is counted for a run, and was it minified? Nothing set, it has the run's settings.

    All but where data and models lie, what the machine is, the seed, and which stages are wanted.
    """
    off = [name for name, value in cfg.as_env().items() if not value]
    off += ["WHOLE", "CHECKPOINT_SECONDS"]  # what only the whole script has
    off += ["ANS"] * (cfg.compressor != "ans") + ["PLAIN_TEXT"] * cfg.caseops_enabled
    off += ["COMPILED"] * (cfg.compile_backend == "off")
    off += [name.upper() for name in ATTENTION if name != cfg.attention_backend]
    names = ["triton_kernels"] * (cfg.triton_kernels > "") + _NAMES[_NAMES.index("caseops_enabled") :]
    dropped = (*names, "checkpoint_seconds")
    row = {name: value for name, value in PRESETS[cfg.preset].items() if name not in dropped}
    row |= {name: getattr(cfg, name) for name in names if getattr(cfg, name) != getattr(Config, name)}
    return pack_code(source, cfg.compressor, off, {cfg.preset: row})


def pack_code(
    source: bytes, codec: str = "brotli", off: Container[str] = (), presets: Mapping | None = None
) -> tuple[bytes, bool]:
    """The script as it is counted: minified, compressed, in a wrapper that runs; a packed one stays itself.

    What stands between lines `# [if A or B]` and `# [end]` is left out when those settings are `off`; the
    packed script then refuses them. `presets` are all that it has.

    The compressed bytes stand in a Latin-1 string literal (a fifth smaller than base85); only what a literal
    cannot hold is escaped. Returns the wrapper and whether the source was minified: without `python-minifier`
    it is not.
    """
    if source.startswith(WRAPPER.partition(b"%s")[0]):
        return source, True

    left_out = set()

    def wanted(section: re.Match) -> bytes:
        names = set(section[1].decode().split(" or "))
        if names - set(off):
            return section[2]
        left_out.update(names)
        return b""

    source = re.sub(rb"(?ms)^# \[if ([\w ]+)\]\n(.*?)^# \[end\]\n", wanted, source)
    source = source.replace(b"LEFT_OUT = ()", f"LEFT_OUT = {sorted(left_out)}".encode(), 1)
    if presets:
        source = source.replace(b'= {"pr1851": {}}', f"= {presets}".encode(), 1)
    try:
        import python_minifier
    except ImportError:
        text, minified = source, False
    else:
        options = {"remove_literal_statements": True, "rename_globals": True, "hoist_literals": False}
        text = source.decode().replace(KERNELS, pack_kernels(KERNELS))
        text, minified = python_minifier.minify(_positional_only(text), **options).encode(), True
    codec = "lzma" if codec == "lzma" else "brotli"
    data = compress(text, codec).replace(b"\\", rb"\\").replace(b"\r", rb"\r").replace(b'"""', rb'""\"')
    data = re.sub(rb"\0(?=[0-7])", rb"\\x00", data).replace(b"\0", rb"\0")
    return WRAPPER % (codec.encode(), data + b"\\\n" * data.endswith(b'"')), minified


def pack_kernels(source: str) -> str:
    """Triton's source minified, but for parameters: a constant by another name is a tensor to Triton."""
    import python_minifier

    parameters = [node.arg for node in ast.walk(ast.parse(source)) if isinstance(node, ast.arg)]
    options = {"remove_annotations": False, "hoist_literals": False, "preserve_locals": parameters}
    return python_minifier.minify(source, **options)


def _positional_only(source: str) -> str:
    """Mark leading parameters that no call names (`name=`, or a key of `**options`): those can be renamed."""
    named, tree = set(re.findall(r'\w+(?=[="])', source)), ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            while node.args.args and node.args.args[0].arg not in named:
                node.args.posonlyargs.append(node.args.args.pop(0))
    return ast.unparse(tree)
