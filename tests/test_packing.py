"""The counted script: each rule of folding on a small source, then whole scripts that must do the same."""

import ast
import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_smoke as smoke
import torch

import prepare_caseops_data as prepare
from harness import packing
from harness.definitions import words
from harness.expressions import Facts
from harness.folding import fold
from harness.renaming import rename

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"width": 3, "on": False, "style": "lanes", "rate": 0.5}
BACKENDS = {"attention": "plain", "kernels": "", "compiler": ""}
END = '\nif __name__ == "__main__":\n    main()\n'


def printed(source: str, **names: object) -> str:
    """What a script prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(source, "script", "exec"), {"__name__": "__main__", **names})
    return out.getvalue()


def folded(source: str, parts: dict | None = None, **facts: object) -> ast.Module:
    known = Facts(facts.pop("settings", SETTINGS), {}, BACKENDS, **facts)
    parts = {name: text.encode() for name, text in (parts or {}).items()}
    return fold((source + END).encode(), parts, known)


def counted(source: str, **facts: object) -> str:
    """The folded source, which prints what the whole one does, also with short names."""
    names = {"cfg": SimpleNamespace(**SETTINGS), "backends": SimpleNamespace(**BACKENDS), "COUNTED": True}
    expected = printed(source.replace("COUNTED = False", "COUNTED = True") + END, **names)
    tree = folded(source, **facts)
    text = ast.unparse(tree)
    assert printed(text) == expected
    short, minified = packing.minify(rename(tree))
    assert minified and printed(short) == expected
    return text


RULES = {  # source -> words that must have gone
    "setting": ("def main():\n    print(cfg.width * 2)", "cfg width"),
    "setting of an attribute": (
        "class Run:\n    def __init__(self): self.cfg = cfg\n    def go(self): return self.cfg.width\n"
        "def main(): print(Run().go())",
        "cfg width",
    ),
    "branch": ("def main():\n    if cfg.on:\n        print(lost())\n    else:\n        print(1)", "lost"),
    "elif": (
        "def main():\n    if cfg.style == 'single': print(lost())\n    elif cfg.width > 2: print(2)\n"
        "    else: print(lost())",
        "lost",
    ),
    "conditional": ("def main(): print(lost() if cfg.on else 5, 6 if cfg.width else lost())", "lost"),
    "boolean": ("def main(): print(cfg.on and lost(), cfg.width or lost(), not cfg.on)", "lost"),
    "membership": ("def main():\n    if cfg.style in ('a', 'b'): lost()\n    print('x' in 'xyz')", "lost"),
    "chain": ("def main():\n    for i in range(6): print(i, 0 < cfg.width <= i)", "cfg"),
    "backend": ("def main():\n    if 'mlp' in backends.kernels: lost()\n    print(backends.attention)", "lost"),
    "counted": ("COUNTED = False\ndef main():\n    if not COUNTED: lost()\n    print(1)", "lost COUNTED"),
    "text": ("def main(): print(f'{cfg.width}-{cfg.rate:.2f}-{cfg.style!r}')", "cfg"),
    "dictionary": ("def main():\n    x = 4\n    print({'lanes': x, 'single': x + 1}[cfg.style])", "single"),
    "unpacked dictionary": (
        "def f(a, b): return a - b\ndef main(): print(f(**{'a': 7, 'b': cfg.width}), {**{'k': 1}})",
        "cfg",
    ),
    "star of a tuple": ("def f(*a): return a\ndef main(): print(f(*(1, cfg.width)), [*[2, 3]])", "cfg"),
    "behind an end": ("def main():\n    print(1)\n    return\n    print(lost())", "lost"),
    "assertion": ("def main():\n    assert cfg.width == 3\n    print(1)", "assert"),
    "dead variable": ("def main():\n    dead = [cfg.width, 2]\n    dead2 = dead\n    print(1)", "dead dead2"),
    "dead effect": ("def main():\n    dead = print('still')\n    print(1)", "dead"),
    "parameter of one value": (
        "def f(x, size, kind='a'): return x * size if kind == 'a' else lost()\n"
        "def main(): print([f(i, cfg.width) for i in (1, 2)])",
        "lost size kind",
    ),
    "unused parameter": ("def f(x, lost): return x + x\ndef main(): print(f(2, 3), f(4, 'b'))", "lost"),
    "keyword handed on": (
        "def inner(x, *, cache=None): return [x, 1] if cache is None else lost()\n"
        "def outer(*a, cache=None, **o):\n    print(a)\n    return inner(*a, cache=cache, **o)\n"
        "def main(): print(outer(1), outer(*(2,), cache=None))",
        "cache lost",
    ),
    "constant function": (
        "def f(x, name): return cfg.on and name in x\n"
        "def main():\n    y = 'a'\n    if f(y, 'a'): print(lost())\n    print(f(y, 'b'))",
        "lost",
    ),
    "silent methods": (
        "class Watch:\n    def saw(self, kind, **facts): pass\n    def kept(self, stage): return None\n"
        "class Run:\n    def __init__(self): self.watch = Watch()\n    def go(self):\n"
        "        tell = self.watch.saw\n        tell('start', run=self)\n"
        "        if (state := self.watch.kept('x')) is not None: self.lost(state)\n        print(1)\n"
        "    def lost(self, state): print(state)\ndef main(): Run().go()",
        "Watch watch saw kept lost",
    ),
    "attribute of one value": (
        "class A:\n    def __init__(self, n): self.capped, self.n = cfg.on, n\n"
        "    def go(self): print(self.n if not self.capped else lost())\ndef main(): A(4).go()",
        "capped lost",
    ),
    "unreached definitions": (
        "def lost(): pass\nclass Lost: pass\nLOST = {}\nclass A:\n    def used(self): return 1\n"
        "    def lost(self): return 2\ndef main(): print(A().used())",
        "lost Lost LOST",
    ),
    "docstrings and annotations": (
        "class P:\n    'words'\n    x: int = 1\n    def f(self, a: 'lost') -> 'lost':\n        'words'\n"
        "        y: lost = a\n        return y\ndef main(): print(P().f(2), P.x)",
        "words lost",
    ),
    "errors": (
        "class Wrong(ValueError): 'A fault.'\ndef f(x):\n    text = f'lost {x}'\n    if x > 2:\n"
        "        raise Wrong(f'{x}: {text}') from None\ndef main():\n    f(1)\n    try: f(3)\n"
        "    except Wrong as error: print('caught')",
        "lost text",
    ),
    "imports that nothing needs": ("import json\nimport math as m\ndef main(): print(m.pi)", "json"),
}


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule):
    source, lost = RULES[rule]
    assert not set(lost.split()) & set(words(counted(source)))


SAME = {  # what must stay as it is
    "shadowed": "size = 5\ndef f(size): return size\ndef main():\n    print(f(2), size, [size for size in (7, 8)])",
    "shadowed constant": "COUNTED = False\ndef f(COUNTED): return COUNTED\ndef main(): print(f(0), f(2))",
    "walrus": "def main():\n    print([y for x in (1, 2, 3) if (y := x * 2) > 2], y)\n    while (z := y) > 9: pass",
    "comprehension": "x = 1\ndef main():\n    y = 2\n    print([x + y for x in range(y)], {x: y for y in (x,)}, x)",
    "closure": (
        "def make(n):\n    total = 0\n    def add(k):\n        nonlocal total\n        total += k * n\n"
        "        return total\n    return add\ndef main():\n    f, g = make(1), make(2)\n    print(f(1), f(1), g(3))"
    ),
    "late closure": "def main():\n    fs = [lambda: i for i in range(3)]\n    print([f() for f in fs])",
    "global": "count = 0\ndef up():\n    global count\n    count += 1\ndef main():\n    up(), up()\n    print(count)",
    "keywords of a dictionary": (
        "def f(*, alpha, beta=2): return alpha - beta\n"
        "def main():\n    options = {'alpha': 5}\n    print(f(**options), f(alpha=1, **{'beta': 4}))"
    ),
    "collected keywords": (
        "def event(stage, **values): return stage, sorted(values)\n"
        "def f(seconds): return seconds\ndef main(): print(event('x', seconds=f(seconds=3), size=1))"
    ),
    "attribute by name": (
        "class A:\n    def __init__(self): self.left_side, self.right_side = 1, 2\n"
        "    def get(self, side): return getattr(self, f'{side}_side')\n"
        "def main(): print(A().get('left'), getattr(A(), 'right_side'), hasattr(A(), 'other'))"
    ),
    "decorators": (
        "import contextlib, functools\n@functools.cache\ndef f(x):\n    print('once')\n    return x\n"
        "@contextlib.contextmanager\ndef block(name):\n    print('in', name)\n    yield\n    print('out')\n"
        "class A:\n    @property\n    def p(self): return self.go(1)\n    @staticmethod\n    def s(x): return x\n"
        "    @classmethod\n    def c(cls, x): return cls().go(x)\n    @functools.cached_property\n"
        "    def q(self):\n        print('made')\n        return 8\n    def go(self, x): return x + 1\n"
        "def main():\n    a = A()\n    print(f(1), f(1), a.p, a.s(3), A.c(4), a.q, a.q)\n    with block('b'): pass"
    ),
    "inheritance": (
        "class A:\n    kind = 'a'\n    def __init__(self, x): self.x = x\n    def run(self): return self.step() * 2\n"
        "    def step(self): raise NotImplementedError\nclass B(A):\n    kind = 'b'\n    def __init__(self, x, y):\n"
        "        super().__init__(x)\n        self.y = y\n    def step(self): return self.x - self.y\n"
        "class C(B):\n    def step(self): return super().step() + 100\n"
        "def main():\n    for kind in (B, C): print(kind(5, 3).run(), kind.kind)"
    ),
    "overridden silence": (
        "class A:\n    def told(self): pass\nclass B(A):\n    def told(self): print('b')\n"
        "def main():\n    for k in (A, B): k().told()"
    ),
    "defaults": (
        "def f(a, b=[], *, c=1 + 1):\n    b.append(a)\n    return b, c\n"
        "def main(): print(f(1), f(2), f(3, []), f(4, c=9))"
    ),
    "stars": (
        "def f(a, b, *rest, **more): return a, b, rest, more\n"
        "def main():\n    l, d = [2, 3], {'k': 4}\n    print(f(1, *l, 5), f(*l, **d), f(*[1], b=2))"
    ),
    "named tuple": (
        "from typing import NamedTuple\nclass P(NamedTuple):\n    first: int\n    second: int = 7\n\n    @property\n"
        "    def both(self): return self.first + self.second\n"
        "def main():\n    p = P(first=1)\n    q = p._replace(first=5)\n    a, b = q\n    print(q.both, a, b, p[1])"
    ),
    "data class": (
        "import dataclasses\nfrom dataclasses import dataclass\n@dataclass(frozen=True)\nclass D:\n    one: int\n"
        "    many: list = dataclasses.field(default_factory=list)\n"
        "def main():\n    d = D(1)\n    d.many.append(2)\n    print(d.one, d.many, D(one=1) == D(1, []))"
    ),
    "order of effects": (
        "def say(x):\n    print(x)\n    return x\ndef pair(a, b): return say(3), b, a\n"
        "def second(a, b): return b - a\ndef main(): print(pair(say(1), say(2)), second(say(4), say(5)))"
    ),
    "generator": (
        "class W:\n    def units(self):\n        if cfg.on:\n            yield 1\n        print('end')\n"
        "def main():\n    print([*W().units()])"
    ),
    "loop": (
        "def main():\n    n = 0\n    while True:\n        n += 1\n        if n > cfg.width: break\n"
        "        if n == 2: continue\n        print(n)\n    else: print('no')\n"
        "    for _ in range(1): print('once')"
    ),
    "try": (
        "def main():\n    try:\n        if cfg.on: raise ValueError\n        print(int('x'))\n"
        "    except (KeyError, ValueError) as error:\n        print(type(error).__name__)\n"
        "    else: print('none')\n    finally: print('end')"
    ),
    "arithmetic": "def main(): print(2 ** -cfg.width, -7 // 2, (-3) ** 2, 1 << 20, 1 / 3, 0.1 + 0.2, 2.0 ** -24)",
    "swap": "def main():\n    a, b = cfg.width, 4\n    a, b = b, a\n    print(a, b)",
    "chained": "def main():\n    a = b = [1]\n    a.append(2)\n    print(b)",
    "library's names": (
        "class Box:\n    def __init__(self): self.items, self.append = 3, 4\n"
        "def main():\n    b, l = Box(), []\n    l.append(b.items)\n    print(l, b.append, {'k': 1}.items())"
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_what_stays_the_same(case):
    counted(SAME[case])


def test_parts_become_one():
    core = "WIDTH = 2\ndef main():\n    if cfg.width == 3:\n        from systems.a import area\n        print(area(4))"
    parts = {
        "systems.a": '"""A."""\nimport math\nfrom train_gpt import WIDTH\nfrom systems.b import half\n'
        "FIRST = half(6)\ndef area(x): return half(x) * WIDTH * math.floor(1.5) + FIRST\ndef unused(): pass\n",
        "systems.b": "import math\ndef half(x): return math.ceil(x / 2)\nHALVES = [half(9)]\n",
    }
    tree = folded(core, parts)
    text = ast.unparse(tree)
    assert "systems" not in text and "unused" not in text and text.count("import math") == 1
    assert printed(text) == printed(packing.minify(rename(tree))[0]) == "7\n"


def test_a_part_is_left_out_with_its_branch():
    core = "def main():\n    if cfg.on:\n        from systems.a import gone\n        gone()\n    print(1)"
    assert "gone" not in ast.unparse(folded(core, {"systems.a": "def gone(): return lost_name\n"}))


WRONG = {  # source and parts -> what the error names
    "two definitions of one name": (
        "def half(x): return x\ndef main():\n    from systems.a import other\n    print(half(1), other())",
        {"systems.a": "def half(): pass\ndef other(): return half()\n"},
        "half of systems.a is also in train_gpt",
    ),
    "a name that nothing binds": ("def main(): print(undefined_name)", {}, "undefined_name"),
    "a name that is bound too late": (
        "first = second + 1\nsecond = 2\nfirst = [first]\nsecond = [second]\ndef main(): print(first, second)",
        {},
        "second .as early",
    ),
    "a part that is not there": ("def main():\n    from systems.z import f\n    f()", {}, "no systems.z"),
    "the harness": ("def main():\n    from harness.z import f\n    f()", {}, "harness.z"),
    "names by text": ("def main():\n    x = 1\n    print(locals())", {}, "locals"),
    "another name for a part": (
        "def main():\n    from systems.a import f as g\n    g()",
        {"systems.a": "def f(): pass\n"},
        "under another name",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_fold_that_goes_wrong_says_so(tg, case):
    source, parts, message = WRONG[case]
    with pytest.raises(tg.RunError, match=message):
        folded(source, parts)


def test_a_setting_that_is_not_known_is_named(tg):
    source = "class Config:\n    depth: int = 2\ndef main(): print(Config().depth)" + END
    config = ast.parse("class Config: pass").body[0]
    with pytest.raises(tg.RunError, match=r"\.depth \(line 3\)"):
        fold(source.encode(), {}, Facts(SETTINGS), config)


def test_attributes_of_the_device():
    source = "def f(x): return x.is_cuda\ndef main():\n    print(f(1), 'gpu' if ranks.on_gpu else 'cpu')"
    assert printed(ast.unparse(folded(source))) == "False cpu\n"
    assert printed(ast.unparse(folded(source, on_gpu=True))) == "True gpu\n"


def test_parts_of_a_network_keep_their_names():
    source = (
        "from torch import nn\nclass Net(nn.Module):\n    def __init__(self, wide):\n        super().__init__()\n"
        "        self.layer_width = wide\n        self.first_layer = nn.Linear(wide, 2, bias=False)\n"
        "    def forward(self, tokens): return self.first_layer(tokens)[:, : self.layer_width]\n"
        "def main():\n    for wide in (2, 3): print([*Net(wide).state_dict()])"
    )
    text = rename(folded(source))
    assert printed(ast.unparse(text)) == "['first_layer.weight']\n" * 2
    assert "layer_width" not in ast.unparse(text)


KERNEL = '''
def kernel():
    import triton
    import triton.language as tl

    @triton.jit
    def double_all(source, result, LENGTH: tl.constexpr):
        """Words."""
        places = tl.arange(0, LENGTH)
        tl.store(result + places, 2 * tl.load(source + places))

    return double_all


def main():
    import inspect
    print(inspect.getsource(kernel().fn))
'''


def test_a_kernels_source_can_be_read(tg, tmp_path):
    """Triton reads its functions' source; parameters keep their names and annotations, local names need not."""
    pytest.importorskip("triton")
    text, _ = packing.minify(rename(folded(KERNEL)))
    path = tmp_path / "packed.py"
    path.write_bytes(packing.wrap(text.encode(), tg.Config(compressor="lzma")))
    process = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True)
    assert "(source,result,LENGTH:" in process.stdout.replace(", ", ",") and "places" not in process.stdout


# -- whole scripts


@pytest.fixture(scope="module")
def house() -> dict[str, bytes]:
    """The files that are packed."""
    files = [ROOT / "train_gpt.py", *sorted((ROOT / "systems").glob("*.py"))]
    return {str(path.relative_to(ROOT)): path.read_bytes() for path in files}


def backends_of(tg, on_gpu: bool):
    names = tg.Config.triton_kernels
    return tg.Backends("fa3", names, "inductor", 8) if on_gpu else tg.Backends("plain", "", "", 2)


@pytest.mark.parametrize(("preset", "on_gpu", "limit"), [("pr1851", True, 25_000), ("demo", False, 21_500)])
def test_size_and_repetition(tg, house, preset, on_gpu, limit):
    """Few bytes, and always the same ones."""
    cfg = tg.read_settings({"PRESET": preset})
    packed, minified = packing.packed_script(cfg, backends_of(tg, on_gpu), house, on_gpu)
    assert minified and len(packed) <= limit
    assert packing.packed_script(cfg, backends_of(tg, on_gpu), house, on_gpu)[0] == packed
    assert packing.packed_script(cfg, None, {"train_gpt.py": packed}, on_gpu) == (packed, True)


@pytest.mark.parametrize("backend", ["fa3", "fa4", "torch_varlen", "flex", "plain"])
def test_every_backend_can_be_packed(tg, house, backend):
    cfg = tg.read_settings({"PRESET": "pr1855" if backend == "fa4" else "pr1493"})
    text, _ = packing.folded_source(cfg, tg.Backends(backend, "loss", "inductor", 8), house, True)
    compile(text, "script", "exec")


def test_without_the_minifier_it_is_longer(tg, house, monkeypatch):
    monkeypatch.setitem(sys.modules, "python_minifier", None)
    text, minified = packing.folded_source(tg.Config(), backends_of(tg, False), house)
    assert not minified and compile(text, "script", "exec")


def test_bytes_of_all_kinds_come_back(tg, monkeypatch):
    """What a literal cannot hold is escaped: zeros before digits, quotes, backslashes, carriage returns."""
    data = bytes(range(256)) + b"\\\0001\0" + b'"""' * 5 + b"\r\n\\" + b'"'
    monkeypatch.setattr(packing, "compress", lambda source, cfg: data)
    for source in (b"1", b"import triton"):
        tree = ast.parse(packing.wrap(source, tg.Config()))
        texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        assert data in [text.encode("l1") for text in texts if isinstance(text, str) and len(text) > 99]


@pytest.fixture(scope="module")
def data_folders(tmp_path_factory) -> dict[bool, Path]:
    """CaseOps data, and plain ones."""
    folder = tmp_path_factory.mktemp("packing")
    texts = smoke.documents(150)
    model = prepare.train_tokenizer(texts, smoke.VOCAB, plain=True)
    tokenizer = prepare.make_tokenizer("tokenizer.model", model, lossless=True, plain=True)
    named = [prepare.make_document(text, f"document {i}") for i, text in enumerate(texts)]
    prepare.prepare(named, tokenizer, folder / "plain", smoke.VAL_DOCS)
    return {True: smoke.make_data(folder / "caseops"), False: folder / "plain"}


PRESETS = ("demo", "pr1851-demo", "pr1868-demo", "pr1855-demo", "pr1667-demo", "pr1858-demo", "pr1493-demo")
VARIANTS = {
    **{name: {} for name in (*PRESETS, "pr1485-demo")},
    "other gates, lzma": {
        "SPARSE_ATTN_GATE_ENABLED": 0, "GATED_ATTN_ENABLED": 1, "GATED_ATTN_QUANT_GATE": 1, "TIE_EMBEDDINGS": 0,
        "CLIP_GLOBAL": 1, "LQER_ASYM_ENABLED": 0, "COMPRESSOR": "lzma", "TTT_GRAD_STEPS": 2,
        "TTT_CACHE_WINDOW": 32, "TTT_CHUNK_BY_LENGTH": "20:8", "TTT_WARM_START_A": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_counted_script_gives_the_digits_alone(tg, data_folders, tmp_path, monkeypatch, capsys, variant):
    """Every preset: a whole run, then its counted script, which knows the settings, in an empty folder."""
    preset = variant if variant in PRESETS or variant.startswith("pr") else "demo"
    settings = {"PRESET": preset, "AUDIT": 0, "TTT_CHUNK_TOKENS": 128, "EVAL_STRIDE": 16, "TTT_LORA_ALPHA": 2}
    cfg = tg.read_settings({"PRESET": preset})
    folder = data_folders[cfg.caseops_enabled]
    settings |= {"DATA_PATH": folder, "ARTIFACT_DIR": tmp_path / "whole", "RUN_ID": "r"} | VARIANTS[variant]
    torch.set_num_threads(1)
    assert tg.main([], smoke.environment(**settings)) == 0, capsys.readouterr().err
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "script.py").write_bytes((tmp_path / "whole/train_gpt.packed.py").read_bytes())
    environ = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    environ |= {"OMP_NUM_THREADS": "1", "DATA_PATH": str(folder), "ARTIFACT_DIR": "out", "RUN_ID": "r"}
    process = subprocess.run(
        [sys.executable, "script.py"], cwd=alone, env=environ, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr.splitlines()[-1]
    results = [json.loads((path / "result.json").read_text()) for path in (tmp_path / "whole", alone / "out")]
    whole, packed = ({k: v["val_bpb"] for k, v in result["stages"].items()} for result in results)
    assert packed == whole
    artifacts = [(path / "final_model.int6.ptz").read_bytes() for path in (tmp_path / "whole", alone / "out")]
    assert artifacts[0] == artifacts[1]
    assert (alone / "out/train_gpt.packed.py").read_bytes() == (alone / "script.py").read_bytes()
