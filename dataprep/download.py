"""The contest's ready-made data: shards, sidecar and tokenizer, verified, into the default layout.

Nothing that is here is replaced or removed, but for a file that an earlier download wrote and that is damaged
since. A file with the hub's content is kept, whoever put it here.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dataprep.checking import Checker, read_manifest
from dataprep.shards import (
    MANIFEST,
    SHARD_NAME,
    UNFINISHED,
    DataError,
    locked,
    manifest_bytes,
    shard_paths,
    sync_folder,
    write_whole,
)
from systems.layout import Source, file_sha256, tokenizer_name

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


def download(source: Source, out: Path | None, shards: int | None, workers: int = 1) -> tuple[Path, dict]:
    """Fetch what is not here yet, and write a manifest of it; returns the shards' folder and the manifest.

    Args:
        out: one folder for everything; None for the default layout under ./data.
        shards: how many training shards, from the first; None for all.
        workers: processes that check what was fetched.

    Raises:
        DataError: the hub (HF_ENDPOINT names another) cannot be reached, or sends other than it says; the
            folder holds other data, then nothing is written.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub import utils
    except ImportError:
        raise DataError("--download needs huggingface_hub: pip install huggingface_hub") from None
    utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        utils.disable_progress_bars()
    folder, tokenizers = out or source.folder, out or source.home / "tokenizers"
    repository, staging = source.repository, folder / ".download"
    warnings.filterwarnings("ignore", "Not enough free disk space")  # the error itself is one line
    with locked(folder):
        own = _own_files(folder, source, tokenizers)
        _refuse_other_staging(staging)
        with _hub_errors(repository, folder):
            revision = hub.HfApi().dataset_info(repository).sha
            listed = {"recursive": True, "revision": revision, "repo_type": "dataset"}
            tree = list(hub.HfApi().list_repo_tree(repository, **listed))
        files = [entry for entry in tree if hasattr(entry, "size")]
        wanted = _wanted(source, files, folder, tokenizers, shards)
        for file in _missing(folder, wanted, own):
            _fetch(hub, repository, file, revision, staging)
        shutil.rmtree(staging, ignore_errors=True)
        check = Checker(folder, tokenizers / tokenizer_name(source.dataset), workers)
        return folder, _write_manifest(check, source, revision)


@contextlib.contextmanager
def _hub_errors(repository: str, folder: Path) -> Iterator[None]:
    """What goes wrong with the hub, in one line with the host; what is this machine's fault goes through.

    The client library lets through whatever its own libraries raise: no package for a SOCKS proxy
    (ImportError), a page of HTML where JSON should be (ValueError), JSON of another form (KeyError).
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # a full disk for example
            error.filename = error.filename or str(folder)
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, KeyError | TypeError | AttributeError | json.JSONDecodeError):
            reason = f"it does not answer as a hub does ({type(error).__name__}: {reason})"
        host = _host(error)
        raise DataError(
            f"{repository}: cannot be fetched from {host}: {reason}; run again to go on"
        ) from error


def _host(error: BaseException | None) -> str:
    """The host that a request went to which failed; the hub's where the error does not tell."""
    from huggingface_hub import constants

    while error is not None:
        with contextlib.suppress(AttributeError, RuntimeError):
            if host := error.request.url.netloc.decode():
                return host
        error = error.__cause__ or error.__context__
    return constants.ENDPOINT.partition("://")[2] or constants.ENDPOINT


def _own_files(folder: Path, source: Source, tokenizers: Path) -> dict[str, str]:
    """SHA-256 of the files that an earlier download wrote, and that no other data set may have replaced.

    DataError where the folder holds other data.
    """
    path = folder / MANIFEST
    if (folder / UNFINISHED).exists():
        raise DataError(f"{folder}: holds an unfinished data set; nothing was changed, choose another --out")
    if not os.path.lexists(path):
        return {}
    manifest = read_manifest(path) or {}
    if (manifest.get("repository"), manifest.get("dataset", source.dataset)) != source[:2]:
        raise DataError(f"{folder}: holds other data ({path}); nothing was changed, choose another --out")
    files = {name: entry.get("sha256", "") for name, entry in manifest["files"].items()}
    if tokenizers == folder:
        files[tokenizer_name(source.dataset)] = manifest.get("tokenizer", {}).get("sha256", "")
    return files


def _refuse_other_staging(staging: Path) -> None:
    """DataError where the folder in which files arrive, and which is removed, is not that of a download."""
    if staging.is_dir() and any(staging.iterdir()) and not (staging / ".cache" / "huggingface").is_dir():
        raise DataError(f"{staging}: is not of a download; nothing was changed, choose another --out")


def _wanted(
    source: Source, tree: list, folder: Path, tokenizers: Path, shards: int | None
) -> dict[Path, Wanted]:
    """Which files are needed, by place; DataError unless there are some of every kind, each once."""
    wanted = {}
    kinds = dict.fromkeys(("tokenizer", "train", "val", *["val_bytes"] * (not source.is_plain)), 0)
    for entry in sorted(tree, key=lambda entry: entry.path):
        path = Path(entry.path)
        shard = SHARD_NAME.fullmatch(path.name) if path.parent.name == source.dataset else None
        if shard and shard[1] in kinds:
            kind, target = shard[1], folder / path.name
            if kind == "train" and shards is not None and int(path.stem[-6:]) >= shards:
                continue
        elif path.name == tokenizer_name(source.dataset):
            kind, target = "tokenizer", tokenizers / path.name
        else:
            continue
        if target in wanted and wanted[target].blob != entry.blob_id:
            raise DataError(f"{source.repository}: holds two {path.name}: {wanted[target].remote}, {path}")
        kinds[kind] += 1
        sha256 = entry.lfs.sha256 if entry.lfs else None
        wanted[target] = Wanted(entry.path, target, entry.size, sha256, entry.blob_id)
    for kind, count in kinds.items():
        if not count:
            raise DataError(f"{source.repository}: holds 0 {kind} files of {source.dataset}")
    return wanted


def _missing(folder: Path, wanted: dict[Path, Wanted], own: dict[str, str]) -> list[Wanted]:
    """What is to be fetched: is not here, or was downloaded and is damaged.

    Raises:
        DataError: the folder holds a shard that is no part of the download, or a file of another content.
    """
    for split in ("train", "val", "val_bytes"):
        for path in shard_paths(folder, split):
            if path not in wanted:
                raise DataError(f"{path}: is not part of this download; remove it, or fetch more --shards")
    missing = []
    for file in wanted.values():
        if not os.path.lexists(file.target):
            missing.append(file)
        elif fault := file.fault(file.target):
            downloaded = own.get(file.target.name)
            if downloaded in (None, file_sha256(file.target)):
                what = "the hub has changed it since" if downloaded else "is of other data"
                hint = "nothing was changed, move it away or choose another --out"
                raise DataError(f"{file.target}: {what} ({fault}); {hint}")
            missing.append(file)
    return missing


def _fetch(hub: object, repository: str, file: Wanted, revision: str, staging: Path) -> None:
    """Let the file appear in its place, whole and with the hub's hash."""
    staging.mkdir(parents=True, exist_ok=True)
    file.target.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(TRIES):
        where = {"repo_type": "dataset", "revision": revision, "local_dir": staging}
        with _hub_errors(repository, staging.parent):
            got = Path(hub.hf_hub_download(repository, file.remote, **where))
        if not (fault := file.fault(got)):
            break
        got.unlink()
    else:
        raise DataError(f"{file.target}: {_host(None)} sent {fault}, {TRIES} times; run again to go on")
    with open(got, "rb+") as whole:
        os.fsync(whole.fileno())
    os.replace(got, file.target)
    sync_folder(file.target.parent)
    print(f"fetched {file.target} bytes:{file.size}", flush=True)


def _write_manifest(check: Checker, source: Source, revision: str) -> dict:
    """Scan and check the folder. DataError if anything is wrong."""
    check.run(overlap=False, new=True)
    if check.problems:
        raise DataError(check.problems[0])
    origin = {"origin": "downloaded", "repository": source.repository, "dataset": source.dataset}
    manifest = check.scanned() | origin | {"revision": revision}
    write_whole(check.folder / MANIFEST, manifest_bytes(manifest))
    return manifest
