"""Imports that lead nowhere are found without running anything; what Python would find is left alone."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import imports  # noqa: E402

FILES = {
    "pyproject.toml": 'tool.ruff.src = [".", "tools"]\ntool.pytest.ini_options.pythonpath = ["tests"]\n',
    "house/__init__.py": "try:\n    import json as read\nexcept ImportError:\n    read = None\n",
    "house/part.py": "A, (B, *C) = 1, (2, 3)\nfor D in (): pass\ndef f(): hidden = 1\nclass G: inside = 1\n",
    "tests/house/test_it.py": "E = 1\n",  # a folder of the package's name, which is none itself
    "tools/alone.py": "import shared\nimport os.path\nfrom shared import F\n",
    "tests/shared.py": "import house.part\nF = house\n",
    ".venv/lib/foreign.py": "from house import nothing\n",
}


@pytest.fixture
def wrong(tmp_path, capsys):
    """Function: text of a file in tools/ -> what is said of its imports."""

    def said(text: str) -> str:
        for path, content in (FILES | {"tools/user.py": text}).items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(content)
        code = imports.main(tmp_path)
        lines = capsys.readouterr().err
        assert code == bool(lines)
        return lines.replace(f"{tmp_path}/", "")

    for kept in (imports.tree_of, imports.names_of, imports.find_module):
        kept.cache_clear()
    return said


@pytest.mark.parametrize(
    "text",
    [
        "from house.part import A, B, C, D, G, f",
        "import house.part as p, alone, numpy.nothing\nfrom house import part, read",
        "from alone import F\nfrom elsewhere import anything\nfrom house import part as read",
        "from tests.house import test_it\nfrom tests.house.test_it import E",
    ],
)
def test_what_is_there(wrong, text):
    assert wrong(text) == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("from house.part import A, hidden", "1: house.part has no hidden"),
        ("def f():\n    if f:\n        from house.part import inside", "3: house.part has no inside"),
        ("try:\n    from house import json\nexcept ImportError:\n    pass", "2: house has no json"),
        ("import os, house.gone", "1: there is no module house.gone"),
        ("from house.gone import A", "1: there is no module house.gone"),
        ("from house import test_it", "1: house has no test_it"),
        ("from house import f", "1: house has no f"),
    ],
)
def test_what_is_missing_is_named(wrong, text, words):
    assert wrong(text) == f"tools/user.py:{words}\n"


def test_the_demo_and_its_audit_need_no_more_than_requirements_txt():
    """`make demo` installs no more; what is for developers is hidden here, by the names of its modules."""
    of = {"scikit-learn": "sklearn", "pytest-xdist": "xdist"}
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    names = [line.partition("==")[0] for line in lines if "==" in line]
    hidden = [of.get(name, name) for name in names]
    assert {"scipy", "matplotlib", "optuna"} <= set(hidden)
    places = [str(ROOT), str(ROOT / "tools")]
    code = f"import sys; sys.modules |= dict.fromkeys({hidden}); sys.path[:0] = {places}"
    code += "; import audit, counted, harness.packing, prepare_caseops_data, train_gpt"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
