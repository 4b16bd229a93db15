"""The contest's ready-made CaseOps data: shards, sidecar and tokenizer, verified, into the default layout."""

import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from dataprep.checking import Checker
from dataprep.shards import (
    MANIFEST,
    SHARD_NAME,
    DataError,
    file_sha256,
    manifest_bytes,
    shard_paths,
    sync_folder,
    write_whole,
)

REPOSITORY = "romeerp/parameter-golf-caseops-v1"
LAYOUT = Path("data/datasets/fineweb10B_sp8192_caseops/datasets")  # where train_gpt.py looks
SHARD_FOLDER = "datasets/fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
TRIES = 3  # of a file whose content is not what the hub says


class Wanted(NamedTuple):
    """A file of the repository and its place here."""

    remote: str
    target: Path
    size: int
    sha256: str | None
    """None for a small file, which git itself keeps under `blob`."""
    blob: str

    def fault(self, path: Path) -> str:
        """What is wrong with a copy of the file, "" if nothing."""
        if path.stat().st_size != self.size:
            return f"{path.stat().st_size} bytes instead of {self.size}"
        if self.sha256:
            found, said = file_sha256(path), self.sha256
        else:
            data = path.read_bytes()
            found, said = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), self.blob
        return "" if found == said else f"hash {found[:16]} instead of {said[:16]}"


def download(out: Path | None, shards: int | None) -> tuple[Path, dict]:
    """Fetch what is not here yet, and write a manifest of it; returns the shards' folder and the manifest.

    Args:
        out: one folder for everything; None for the default layout under ./data.
        shards: how many training shards, from the first; None for all.

    Raises:
        DataError: the hub (HF_ENDPOINT names another) cannot be reached, or sends other than it says.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors, utils
    except ImportError:
        raise DataError("--download needs huggingface_hub: pip install huggingface_hub") from None
    utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    folder = out or LAYOUT / SHARD_FOLDER
    tokenizers = out or LAYOUT / "tokenizers"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizers.mkdir(parents=True, exist_ok=True)
    staging = folder / ".download"
    try:
        revision = hub.HfApi().dataset_info(REPOSITORY).sha
        tree = hub.HfApi().list_repo_tree(REPOSITORY, recursive=True, revision=revision, repo_type="dataset")
        wanted = _wanted([entry for entry in tree if hasattr(entry, "size")], folder, tokenizers, shards)
        for file in wanted:
            _fetch(hub, file, revision, staging)
    except (OSError, errors.HTTPError) as error:
        if isinstance(error, OSError) and error.errno:  # of this machine, a full disk for example
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{REPOSITORY}: cannot be fetched: {lines[0]}; run again to go on") from error
    shutil.rmtree(staging, ignore_errors=True)
    return folder, _write_manifest(folder, wanted, revision)


def _wanted(tree: list, folder: Path, tokenizers: Path, shards: int | None) -> list[Wanted]:
    """Which files are needed; DataError unless there are some of every kind."""
    wanted, kinds = [], {"tokenizer": 0, "train": 0, "val": 0, "val_bytes": 0}
    for entry in sorted(tree, key=lambda entry: entry.path):
        name = entry.path.rpartition("/")[2]
        if shard := SHARD_NAME.fullmatch(name):
            kind, target = shard[1], folder / name
            if kind == "train" and shards is not None and int(name[-10:-4]) >= shards:
                continue
        elif name.endswith(".model") and "caseops" in name:
            kind, target = "tokenizer", tokenizers / name
        elif name == MANIFEST and not kinds.get("manifest"):
            kind, target = "manifest", folder / "published_manifest.json"  # of another form than ours
        else:
            continue
        kinds[kind] = kinds.get(kind, 0) + 1
        sha256 = entry.lfs.sha256 if entry.lfs else None
        wanted.append(Wanted(entry.path, target, entry.size, sha256, entry.blob_id))
    for kind, count in kinds.items():
        if not count or (kind == "tokenizer" and count > 1):
            raise DataError(f"{REPOSITORY}: holds {count} {kind} files")
    return wanted


def _fetch(hub: object, file: Wanted, revision: str, staging: Path) -> None:
    """Let the file appear in its place, whole and with the hub's hash; one that is there already is kept."""
    if file.target.exists() and not file.fault(file.target):
        return
    for _ in range(TRIES):
        got = Path(
            hub.hf_hub_download(
                REPOSITORY, file.remote, repo_type="dataset", revision=revision, local_dir=staging
            )
        )
        if not (fault := file.fault(got)):
            break
        got.unlink()
    else:
        raise DataError(f"{file.target}: the hub sent {fault}, {TRIES} times; run again to go on")
    with open(got, "rb+") as whole:
        os.fsync(whole.fileno())
    os.replace(got, file.target)
    sync_folder(file.target.parent)
    print(f"fetched {file.target} bytes:{file.size}", flush=True)


def _write_manifest(folder: Path, wanted: list[Wanted], revision: str) -> dict:
    """Scan and check the folder. DataError if anything but the missing manifest is wrong."""
    names = {file.target.name for file in wanted}
    for split in ("train", "val", "val_bytes"):
        for path in shard_paths(folder, split):
            if path.name not in names:
                raise DataError(f"{path}: is not part of this download; remove it, or fetch more --shards")
    (folder / MANIFEST).unlink(missing_ok=True)
    check = Checker(folder)
    check.run(overlap=False)
    check.problems.remove(check.no_manifest)
    if check.problems:
        raise DataError(check.problems[0])
    manifest = check.scanned() | {"origin": "downloaded", "repository": REPOSITORY, "revision": revision}
    write_whole(folder / MANIFEST, manifest_bytes(manifest))
    return manifest
