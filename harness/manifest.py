"""What headers, sizes and the manifest tell about the data, before any time is spent."""

import hashlib
import os
from collections.abc import Sequence

from systems.plain_text import load_tokenizer, read_manifest, tokenizer_file
from train_gpt import (
    Config,
    DataError,
    read_shard,
    shard_paths,
)


def check_data(cfg: Config, training_splits: Sequence[str] = ("train",)) -> dict:
    """Check everything about the data that headers, sizes and the manifest tell, before any time is spent.

    Evaluation alone passes no training split: it must not need training data. Returns the manifest. Raises
    DataError naming the file, what it is and what it must be.
    """
    folder = cfg.data_folder
    splits = [*training_splits, "val"] + ["val_bytes"] * cfg.caseops_enabled
    counts = {}
    for split in splits:
        paths = shard_paths(folder, split)
        if not paths:
            raise DataError(f"{folder}: no fineweb_{split}_*.bin there; {_how_to_get_data(cfg)}")
        counts |= {path.name: len(read_shard(path)) for path in paths}
    totals = {s: sum(counts[p.name] for p in shard_paths(folder, s)) for s in splits}
    if cfg.caseops_enabled and totals["val"] != totals["val_bytes"]:
        raise DataError(
            f"{folder}/fineweb_val_bytes_*: {totals['val_bytes']} entries, must be one a validation token "
            f"({totals['val']} in fineweb_val_*)"
        )
    if totals["val"] < 2:
        raise DataError(f"{folder}/fineweb_val_*: {totals['val']} tokens, must be at least 2")
    manifest = read_manifest(folder)
    try:
        _check_manifest(cfg, manifest, counts, totals)
    except DataError as error:
        if not cfg.allow_unverified_data:
            check = f"python prepare_caseops_data.py --check {folder}"
            raise DataError(f"{error}; see {check}; ALLOW_UNVERIFIED_DATA=1 overrides") from None
        manifest["unverified"] = str(error)
    load_tokenizer(cfg)  # only now: a damaged one may do anything to the library
    return manifest


def _how_to_get_data(cfg: Config) -> str:
    if "demo" in cfg.preset:
        plain = " --plain" * (not cfg.caseops_enabled)
        return f"build it with: python prepare_caseops_data.py --demo{plain}"
    return "set DATA_PATH, or build it: python prepare_caseops_data.py --docs docs.jsonl --out DIR --sp MODEL"


def _check_manifest(cfg: Config, manifest: dict, counts: dict[str, int], totals: dict[str, int]) -> None:
    path = cfg.data_folder / "manifest.json"
    if not manifest:
        if cfg.caseops_enabled:
            raise DataError(f"{path}: missing")
        return
    transform = manifest.get("transform")
    if cfg.caseops_enabled != (transform != "none"):
        raise DataError(
            f"CASEOPS_ENABLED={int(cfg.caseops_enabled)}: {path} says the transform is {transform!r}"
        )
    files = manifest.get("files", {})
    listed = [name for name in files if any(name.startswith(f"fineweb_{split}_0") for split in totals)]
    for name in [*listed, *counts]:
        said = files.get(name, {}).get("tokens", "nothing")
        if counts.get(name) != said:
            found = f"holds {counts[name]} tokens" if name in counts else "missing"
            raise DataError(f"{cfg.data_folder / name}: {found}, {path} says {said}")
    holds = {"val": ("tokens", totals["val"])}
    if cfg.caseops_enabled:
        carried = (read_shard(path).sum() for path in shard_paths(cfg.data_folder, "val_bytes"))
        holds["val_bytes"] = "bytes", int(sum(carried))
    for split, (key, count) in holds.items():
        said = manifest.get("splits", {}).get("val", {}).get(key, count)
        if said != count:
            raise DataError(f"{cfg.data_folder}/fineweb_{split}_*: {count} {key}, {path} says {said}")
    if not os.path.isfile(tokenizer_file(cfg)):
        return
    digest = hashlib.sha256(tokenizer_file(cfg).read_bytes()).hexdigest()
    if manifest.get("tokenizer", {}).get("sha256", digest) != digest:
        raise DataError(
            f"TOKENIZER_PATH={tokenizer_file(cfg)}: not the tokenizer that {path} was prepared with"
        )
