"""Where the contest's data lie: on the hub, on a disk, and which tokenizer belongs to which data set."""

import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

DATASET_NAME = re.compile(r"(fineweb\w*)_sp(\d+)(\w*)")  # fineweb10B_sp1024, and what was done to the text
CASEOPS_SUFFIX = "_lossless_caps_caseops_v1_reserved"
TITLE_OPERATOR, TITLE_TOKEN = "\ue001", 4  # of CaseOps; where it is not that token, the text is plain
UNNAMED = "tokenizer.model"  # of a set with a name of its own
DEMO_OUT, DEMO_PLAIN_OUT = Path("data/demo"), Path("data/demo_plain")
PREPARE = Path(__file__).resolve().parents[1] / "prepare_caseops_data.py"
# Settings that no number of a run depends on: where things lie, what they are called, how it is watched and
# kept. A run that goes on may have others. A file that one of them names counts by its contents.
WITHOUT_EFFECT = {"RUN_ID", "ARTIFACT_DIR", "DATA_DIR", "DATA_PATH", "TOKENIZER_PATH", "MODEL_PATH"}
WITHOUT_EFFECT |= {"QUANTIZED_MODEL_PATH", "WANDB_PROJECT", "TENSORBOARD_DIR", "CHECKPOINT_SECONDS", "RESUME"}
WITHOUT_EFFECT |= {"CPU_THREADS", "DEVICE"}  # a device counts as what it comes to


def as_set(value: object) -> object:
    """A setting's value as its variable has it: 0 and 1 for False and True."""
    return int(value) if isinstance(value, bool) else value


def as_variables(settings: Mapping[str, object]) -> dict[str, str]:
    """Settings as an environment has them."""
    return {name: str(as_set(value)) for name, value in settings.items()}


class Source(NamedTuple):
    """A ready-made data set: the hub's repository that has it, its name, its home here."""

    repository: str
    dataset: str
    home: Path
    """Shards lie in its `datasets/NAME`, the tokenizer in its `tokenizers`."""

    @property
    def folder(self) -> Path:
        """Where `train_gpt.py` looks for the shards."""
        return self.home / "datasets" / self.dataset

    @property
    def is_plain(self) -> bool:
        """Text as it is, without a sidecar of byte counts."""
        return CASEOPS_SUFFIX not in self.dataset


SOURCES = {  # by what --download is told; the repositories are those that the records' READMEs name
    (plain, vocab): Source(repository, f"fineweb10B_sp{vocab}{'' if plain else CASEOPS_SUFFIX}", Path(home))
    for plain, vocab, repository, home in (
        (
            False,
            8192,
            "romeerp/parameter-golf-caseops-v1",
            "data/datasets/fineweb10B_sp8192_caseops/datasets",
        ),
        (True, 8192, "kevclark/parameter-golf", "data"),  # PR #1394
        (True, 4096, "kevclark/parameter-golf", "data"),
        (True, 1024, "willdepueoai/parameter-golf", "data"),  # the contest's own
    )
}


def prepare_command() -> str:
    """The program with the Python of this process, as it can be typed in the working folder."""
    python = "python" if shutil.which("python") == sys.executable else _typed(sys.executable or "python")
    return f"{python} {_typed(PREPARE) if PREPARE.is_file() else PREPARE.name}"


def _typed(path: str | Path) -> str:
    """A file, quoted: from the working folder where it lies below that, else the whole path."""
    near = os.path.relpath(path)
    return shlex.quote(str(path) if near.startswith("..") else near)


def set_name(folder: Path) -> str:
    """The name of a data set's folder, also of one that is written as `.`."""
    return Path(os.path.abspath(folder)).name


def download_command(plain: bool, vocab: int, folder: Path, shards: int = 0) -> str:
    """The command line that fetches a data set of SOURCES into a folder."""
    source = SOURCES[plain, vocab]
    options = (
        " --plain" * plain + f" --vocab {vocab}" * (vocab != 8192) + f" --shards {shards}" * bool(shards)
    )
    elsewhere = os.path.normpath(folder) != os.path.normpath(source.folder)
    return f"{prepare_command()} --download{options}" + f" --out {shlex.quote(str(folder))}" * elsewhere


def tokenizer_name(dataset: str) -> str:
    """The contest's name for a data set's tokenizer: fineweb10B_sp1024 -> fineweb_1024_bpe.model."""
    parts = DATASET_NAME.fullmatch(dataset)
    return f"fineweb_{parts[2]}_bpe{parts[3]}.model" if parts else UNNAMED


def is_caseops(processor: object) -> bool:
    """Whether a SentencePiece tokenizer is one of CaseOps text."""
    return processor.encode(TITLE_OPERATOR) == [TITLE_TOKEN]


def find_tokenizer(folder: Path, manifest: Mapping, data_dir: str) -> Path:
    """The SentencePiece model of a data set; where there is none, the path at which one should be.

    The manifest has the first word: its file, or that of its hash. Else it is the only model beside the
    shards, else the one that is named after the data set. No other is taken: its bytes would be others.

    Args:
        folder: of the shards; models are looked for in it and in `tokenizers` two levels up.
        manifest: of this program, {} where there is none.
        data_dir: root of the default layout (DATA_DIR), whose tokenizers are looked through last.
    """
    said = manifest.get("tokenizer", {})
    if said.get("file"):
        return folder / said["file"]
    home = Path(os.path.normpath(folder / ".." / ".."))  # of the path as it is written: sets may be links
    root, name = Path(data_dir), tokenizer_name(set_name(folder))
    places = [folder, home / "tokenizers", root / "tokenizers"]
    places += sorted(root.glob("datasets/*_caseops/datasets/tokenizers")) if os.path.isdir(root) else []
    models = [model for place in filter(os.path.isdir, places) for model in sorted(place.glob("*.model"))]
    beside = [model for model in models if model.parent == folder]
    found = (
        [model for model in models if said.get("sha256") == file_sha256(model)] if "sha256" in said else []
    )
    found += beside if len(beside) == 1 else []
    found += [model for model in models if model.name == name]
    return found[0] if found else (folder if name == UNNAMED else home / "tokenizers") / name


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def strict_json(text: str | bytes, **options: object) -> object:
    """The value of a JSON text; `options` are those of `json.loads`. ValueError also for a name given twice.

    Python takes the last of the two, other readers the first: one file would tell two things.
    """
    return json.loads(text, object_pairs_hook=_each_once, **options)


def _each_once(pairs: Sequence[tuple[str, object]]) -> dict:
    value, seen = dict(pairs), set()
    if len(value) < len(pairs):
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the name {twice[:60]!r} stands there twice")
    return value
