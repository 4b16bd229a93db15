"""The counted script: each rule of folding on a small source, then whole scripts that must do the same."""

import ast
import contextlib
import inspect
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import packing_cases
import pytest
import python_minifier
import test_smoke as smoke
import torch
import warm

import prepare_caseops_data as prepare
from harness import packing
from harness.definitions import words
from harness.expressions import Facts
from harness.folding import fold
from harness.renaming import rename
from harness.scopes import children, walk
from harness.settings import PRESETS

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import reproduce  # noqa: E402

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


def cases(text: str) -> dict[str, tuple[str, str]]:
    """Source and words of each case by its name."""
    parts = re.split(r"(?m)^# == (.*)\n", text)[1:]
    heads = (head.partition(" | ") for head in parts[::2])
    return {name: (source, lost) for (name, _, lost), source in zip(heads, parts[1::2], strict=True)}


RULES, SAME = cases(packing_cases.RULES), cases(packing_cases.SAME)


@pytest.mark.parametrize("rule", RULES)
def test_rule(rule):
    source, lost = RULES[rule]
    assert not set(lost.split()) & set(words(counted(source)))


@pytest.mark.parametrize("case", SAME)
def test_what_stays_the_same(case):
    counted(SAME[case][0])


def test_a_walk_leaves_out_contexts_and_operators_only():
    """Also where a field holds no node: constants, names that are texts, the missing key of `**`."""
    source = (
        "async def f(x: int, *, y=2, z) -> str:\n    global a\n    import b.c as d\n    return {**x, 'k': y}"
    )
    aside = (ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop)
    for text in (source, (ROOT / "train_gpt.py").read_text(encoding="utf-8")):
        tree = ast.parse(text)
        found = [*walk(tree)]
        assert len(found) == len(set(found))
        assert set(found) == {node for node in ast.walk(tree) if not isinstance(node, aside)}
        below = [child for node in found for child in children(node)]
        assert len(below) == len(found) - 1 and {tree, *below} == set(found)


def test_parts_become_one():
    core = "WIDTH = 2\ndef main():\n    if cfg.width == 3:\n        from systems.a import area"
    core += "\n        print(area(4))"
    parts = {
        "systems.a": '"""A."""\nimport math\nfrom train_gpt import WIDTH\nfrom systems.b import half\n'
        "FIRST = half(6)\ndef area(x): return half(x) * WIDTH * math.floor(1.5) + FIRST\n"
        "def unused(): pass\n",
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
        "first = second + 1\nsecond = 2\nfirst = [first]\nsecond = [second]\n"
        "def main(): print(first, second)",
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
        "from torch import nn\nclass Net(nn.Module):\n"
        "    def __init__(self, wide):\n        super().__init__()\n"
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
    """Triton reads its functions' source; parameters keep names and annotations, other names need not."""
    pytest.importorskip("triton")
    text, _ = packing.minify(rename(folded(KERNEL)))
    path = tmp_path / "packed.py"
    path.write_bytes(packing.wrap(text.encode(), tg.Config(compressor="lzma")))
    process = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True)
    assert "(source,result,LENGTH:" in process.stdout.replace(", ", ",") and "places" not in process.stdout


OPERATORS = {  # inputs of the fused kernels' operators
    "head_loss": lambda r: (r(5, 16), r(40, 16), torch.arange(5), 30.0),
    "mlp": lambda r: (r(5, 32), r(64, 32), r(32, 64)),
    "qkv_norm_rope": lambda r: (r(6, 8 * 16), r(4), r(6, 4), r(6, 4), 2),
    "xsa_gate": lambda r: (r(6, 4, 16), r(6, 2, 16), r(6, 4)),
}


def test_kernels_of_the_counted_script_give_the_same_numbers(tg, tmp_path):
    """Forward and backward of every operator, by Triton's interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    backends = tg.Backends("plain", tg.Config.triton_kernels, "", 2)
    path = tmp_path / "packed.py"
    path.write_bytes(packing.packed_script(tg.Config(compressor="lzma"), backends, tg.read_sources())[0])
    packed = operators(runpy.run_path(str(path)))
    whole = operators({name: getattr(tg, name) for name in dir(tg)})
    assert set(OPERATORS) <= set(packed) and set(packed) <= set(whole)
    generator = torch.Generator().manual_seed(0)
    for name, make in OPERATORS.items():
        inputs = make(lambda *shape: torch.randn(shape, generator=generator))
        ours, theirs = (forward_and_backward(ops[name], inputs) for ops in (packed, whole))
        assert len(ours) > 1 and all(map(torch.equal, ours, theirs)), name


def operators(names: dict) -> dict:
    """Torch's operators among the names of a module, by the names that they have for torch."""
    return {value._name: value for value in names.values() if type(value).__name__ == "CustomOpDef"}


def forward_and_backward(operator, inputs) -> list[torch.Tensor]:
    """Results of an operator, and the gradients of its first result's sum of squares."""
    inputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    learned = [x.requires_grad_() for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point()]
    results = operator(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    learned = learned[:2] if operator._name == "qkv_norm_rope" else learned  # tables have no gradient
    return [*results, *torch.autograd.grad(results[0].square().sum(), learned)]


# -- whole scripts


@pytest.fixture(scope="module")
def house() -> dict[str, bytes]:
    """The files that are packed."""
    files = [ROOT / "train_gpt.py", *sorted((ROOT / "systems").glob("*.py"))]
    return {str(path.relative_to(ROOT)): path.read_bytes() for path in files}


def backends_of(tg, on_gpu: bool):
    names = tg.Config.triton_kernels
    return tg.Backends("fa3", names, "inductor", 8) if on_gpu else tg.Backends("plain", "eager", "", 2)


@pytest.mark.parametrize(
    ("preset", "on_gpu", "limit"), [("pr1851", True, 25_000), ("best", True, 31_250), ("demo", False, 21_500)]
)
def test_size(tg, house, preset, on_gpu, limit):
    cfg = tg.read_settings({"PRESET": preset})
    packed, minified = packing.packed_script(cfg, backends_of(tg, on_gpu), house, on_gpu)
    assert minified and len(packed) <= limit
    assert packing.packed_script(cfg, None, {"train_gpt.py": packed}, on_gpu) == (packed, True)
    texts: list[str | bytes] = []  # what the wrapper runs
    exec(packed, {"exec": texts.append})
    text = texts[0] if isinstance(texts[0], str) else texts[0].decode()
    ast.parse(text, feature_version=(3, 10))  # the oldest that torch has
    for python in other_pythons():
        reading = "import ast, sys; ast.parse(sys.stdin.read())"
        subprocess.run([python, "-c", reading], input=text, encoding="utf-8", check=True)
    if preset == "demo":  # and the same bytes in a process that orders its sets differently
        env = os.environ | {"PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
        again = subprocess.run([sys.executable, "-c", REPEATED], cwd=ROOT, env=env, capture_output=True)
        assert bytes.fromhex(again.stdout.decode()) == packed, again.stderr.decode()


REPEATED = """
import atexit, gc
import train_gpt
atexit.register(gc.freeze)
from harness import packing, settings
cfg, backends = settings.read_settings({"PRESET": "demo"}), train_gpt.Backends("plain", "eager", "", 2)
print(packing.packed_script(cfg, backends, train_gpt.read_sources())[0].hex())
"""


@pytest.mark.parametrize("backend", ["fa4", "torch_varlen", "flex"])
def test_every_backend_can_be_packed(tg, house, backend):
    """Also those that no other test packs."""
    cfg = tg.read_settings({"PRESET": "pr1855" if backend == "fa4" else "pr1493"})
    tree = packing.folded_tree(cfg, tg.Backends(backend, "loss", "inductor", 8), house, True)
    compile(ast.unparse(tree), "script", "exec")


NESTED = """
def told(values, name):
    pairs = (f"{k}:{f'{v:.6g}' if isinstance(v, float) else v}" for k, v in values.items())
    return " ".join(pairs) + f"{' '.join(name)}"
"""
ELSEWHERE = """
import ast, sys, types, unittest.mock as mock
sys.path.append(sys.argv[1])
exec(sys.argv[2])
print(minify(ast.parse(sys.stdin.read()))[0])
"""


def other_pythons() -> list[Path]:
    """Interpreters of this machine that the script may be packed with, this one not among them."""
    beside = Path(sys.base_prefix).parent.glob("3.*/bin/python3")
    found = {path.resolve() for path in beside if int(path.parts[-3].split(".")[1]) >= 11}
    return sorted(found - {Path(sys.executable).resolve()})


def test_whichever_python_packs_the_text_is_the_same(tmp_path):
    """From 3.12 on quotes nest: what is packed there must start under 3.11 too."""
    library = tmp_path / "library"
    library.mkdir()
    (library / "python_minifier").symlink_to(Path(python_minifier.__file__).parent)
    here = packing.minify(ast.parse(NESTED))[0]
    assert "{f'{" in here and "{' '." in here, "no quote of an f-string stands within it"
    code = inspect.getsource(packing.minify)
    for python in other_pythons():
        command = [python, "-c", ELSEWHERE, library, code]
        there = subprocess.run(command, input=NESTED, capture_output=True, text=True)
        assert there.stdout == f"{here}\n", (python, there.stderr)


def test_without_the_minifier_it_is_longer(monkeypatch):
    monkeypatch.setitem(sys.modules, "python_minifier", None)
    source = "def f():\n    return 1"
    assert packing.minify(ast.parse(source)) == (source, False)


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


# One of each kind of preset; `make stress` has all of them.
KINDS = ("demo", "pr1855-demo", "pr1736-demo", "pr1729-demo", "pr1667-demo", "pr1858-demo", "pr1394-demo")
VARIANTS = {
    **{name: {} for name in KINDS},
    "other gates, lzma": {
        "SPARSE_ATTN_GATE_ENABLED": 0, "GATED_ATTN_ENABLED": 1, "GATED_ATTN_QUANT_GATE": 1,
        "TIE_EMBEDDINGS": 0, "CLIP_GLOBAL": 1, "LQER_ASYM_ENABLED": 0, "COMPRESSOR": "lzma",
        "TTT_GRAD_STEPS": 2, "TTT_CACHE_WINDOW": 32, "TTT_CHUNK_BY_LENGTH": "20:8", "TTT_WARM_START_A": 1,
    },
    "four momenta, MUDD, tilted": {"MUON_MAXWELL": 1, "MUDD_WIDTH": 8, "NGRAM_TILT": "2:1.5,1:0.5"},
    "trellis, fitted": {
        "QUANTIZER": "trellis", "COMPRESSOR": "ans", "FIT_BYTES": 60_000, "GPTQ_DRIFT_BATCHES": 1
    },
}  # fmt: skip


def alone(folder: Path, **environ: object) -> dict[str, float]:
    """The score of each stage of a counted train_gpt.py, run with these variables and no others."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    kept |= {"OMP_NUM_THREADS": "1", "RUN_ID": "r"} | {name: str(value) for name, value in environ.items()}
    process = warm.run(folder / "train_gpt.py", folder, kept)
    assert process.returncode == 0, process.stderr.splitlines()[-1]
    return bits(folder / kept["ARTIFACT_DIR"])


def bits(folder: Path) -> dict[str, float]:
    """The score of each stage of a run."""
    stages = json.loads((folder / "result.json").read_text())["stages"]
    return {name: stage["val_bpb"] for name, stage in stages.items()}


def record_folder(run: Path, place: Path) -> Path:
    """The record folder of a run."""
    arguments = ["--from-logs", str(run), "--submission", "--folder", str(place)]
    assert reproduce.main([*arguments, "--author", "a", "--github-id", "b"]) == 0
    assert reproduce.main(["--check-folder", str(place)]) == 0
    return place


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_counted_script_gives_the_digits_alone(tg, data_folders, tmp_path, capsys, variant):
    """A whole run, then its counted script, which knows the settings, in an empty folder.

    Two go where a reviewer has them: into their record folders, which are then copied elsewhere.
    """
    preset = variant if variant in PRESETS else "demo"
    settings = {"PRESET": preset, "AUDIT": 0, "TTT_CHUNK_TOKENS": 128, "EVAL_STRIDE": 16, "TTT_LORA_ALPHA": 2}
    settings |= {"TTT_CHUNK_SIZE": 32, "GLOBAL_TTT_CHUNK_TOKENS": 256}  # still several of them in a document
    cfg = tg.read_settings({"PRESET": preset})
    data, fitted = data_folders[cfg.caseops_enabled], {"FIT_BYTES": 60_000} if cfg.fit_bytes else {}
    whole, folder = tmp_path / "whole", tmp_path / "alone"
    settings |= {"DATA_PATH": data, "ARTIFACT_DIR": whole, "RUN_ID": "r"} | fitted | VARIANTS.get(variant, {})
    torch.set_num_threads(1)
    assert tg.main([], smoke.environment(**settings)) == 0, capsys.readouterr().err
    if variant in ("demo", "pr1667-demo"):
        record_folder(whole, tmp_path / "2026-04-30_Demo").rename(folder)
    else:
        folder.mkdir()
        shutil.copy(whole / "train_gpt.packed.py", folder / "train_gpt.py")
    assert alone(folder, DATA_PATH=data, ARTIFACT_DIR="out") == bits(whole)
    for name in ("final_model.int6.ptz", "train_gpt.packed.py"):
        assert (folder / "out" / name).read_bytes() == (whole / name).read_bytes()
    if variant in ("pr1667-demo", "pr1858-demo", "trellis, fitted"):  # evaluated, and nothing else
        given = {"QUANTIZED_MODEL_PATH": whole / "final_model.int6.ptz", "TTT_EVAL_ONLY": 1}
        again = alone(folder, DATA_PATH=data, ARTIFACT_DIR="again", **given)
        assert again == {name: bits(whole)[name] for name in again} and "ttt" in again
