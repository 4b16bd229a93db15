"""What headers, sizes and the manifest tell about the data, before any time is spent."""

import dataclasses
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from systems.layout import (
    CASEOPS_SUFFIX,
    DATASET_NAME,
    DEMO_OUT,
    DEMO_PLAIN_OUT,
    SOURCES,
    TITLE_TOKEN,
    download_command,
    file_sha256,
    find_tokenizer,
    is_caseops,
    prepare_command,
    set_name,
    strict_json,
)
from systems.plain_text import load_tokenizer, read_manifest, tokenizer_file
from train_gpt import (
    Config,
    DataError,
    read_shard,
    shard_paths,
)


def find_data(cfg: Config) -> Config:
    """The settings with the places of data and tokenizer, where the script takes others by itself.

    Data of a record lie one folder deeper than those of the contest, which come without a manifest that
    would name their tokenizer. What TOKENIZER_PATH and DATA_PATH say is left as it is.
    """
    sets, name = Path(cfg.data_dir) / "datasets", cfg.data_folder.name
    if not cfg.data_path and not os.path.isdir(cfg.data_folder) and os.path.isdir(sets / name):
        cfg = dataclasses.replace(cfg, data_path=str(sets / name))
    if cfg.tokenizer_path or not os.path.isdir(cfg.data_folder):
        return cfg
    model = find_tokenizer(cfg.data_folder, read_manifest(cfg.data_folder), cfg.data_dir)
    taken = model == tokenizer_file(cfg) or not model.is_file()
    return cfg if taken else dataclasses.replace(cfg, tokenizer_path=str(model))


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
            raise DataError(f"{folder}: no fineweb_{split}_*.bin there; {_how_to_get_data(cfg, split)}")
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
    _check_names(folder / "manifest.json")
    try:
        _check_manifest(cfg, manifest, counts, totals)
    except DataError as error:
        if not cfg.allow_unverified_data:
            check = check_command(cfg, manifest)
            raise DataError(f"{error}; see {check}; ALLOW_UNVERIFIED_DATA=1 overrides") from None
        manifest["unverified"] = str(error)
    processor = load_tokenizer(cfg)  # only now: a damaged one may do anything to the library
    plain_by_name = not cfg.caseops_enabled and is_caseops(processor)
    if plain_by_name and TITLE_TOKEN in read_shard(shard_paths(folder, "val")[0])[:1_000_000]:
        raise DataError(f"CASEOPS_ENABLED=0: {folder} holds CaseOps text; set CASEOPS_ENABLED=1")
    return manifest


def _how_to_get_data(cfg: Config, split: str) -> str:
    """What to set, or else to run, where a split is missing."""
    folder, plain = cfg.data_folder, not cfg.caseops_enabled
    if cfg.preset.endswith("-study"):
        return "build it with: python tools/study.py --prepare --docs FILE"
    if "demo" in cfg.preset:
        elsewhere = os.path.normpath(folder) != str(DEMO_PLAIN_OUT if plain else DEMO_OUT)
        out = f" --out {shlex.quote(str(folder))}" * elsewhere
        return f"build it with: {prepare_command()} --demo{' --plain' * plain}{out}"
    transform = read_manifest(folder).get("transform", "none")
    if split == "val_bytes" and transform == "none" and CASEOPS_SUFFIX not in set_name(folder):
        return f"plain text needs {_settings_for(cfg, folder)}"
    others = _other_data_sets(cfg)
    choose = f"set {_settings_for(cfg, others[0])}" if others else "set DATA_PATH"
    if (plain, cfg.vocab_size) in SOURCES:
        fetch = download_command(plain, cfg.vocab_size, folder)
        return f"{choose}, or fetch it: {fetch} (PRESET=demo makes do with the data of `make data`)"
    options = f"--train-tokenizer {cfg.vocab_size}{' --plain' * plain}"
    return f"{choose}, or build it: {prepare_command()} --docs docs.jsonl --out DIR {options}"


def _other_data_sets(cfg: Config) -> list[Path]:
    """Data sets with a name of the contest's, below DATA_PATH or DATA_DIR; the wanted kind of text first."""
    places = ("*", "datasets/*", "datasets/*/datasets/datasets/*")
    roots = [Path(root) for root in (cfg.data_path, cfg.data_dir) if root]
    patterns = [(root, f"{place}/fineweb_val_000000.bin") for root in roots for place in places]
    found = {path.parent for root, pattern in patterns for path in root.glob(pattern)} - {cfg.data_folder}
    named = [path for path in found if DATASET_NAME.fullmatch(path.name) and shard_paths(path, "train")]
    return sorted(named, key=lambda path: ((CASEOPS_SUFFIX in path.name) != cfg.caseops_enabled, path))


def _settings_for(cfg: Config, folder: Path) -> str:
    """The settings, of those that are others now, for a run on a data set; its name tells the vocabulary."""
    parts = DATASET_NAME.fullmatch(set_name(folder))
    now_and_then = {
        "DATA_PATH": (cfg.data_folder, folder),
        "CASEOPS_ENABLED": (int(cfg.caseops_enabled), int(CASEOPS_SUFFIX in set_name(folder))),
        "VOCAB_SIZE": (cfg.vocab_size, int(parts[2]) if parts else cfg.vocab_size),
    }
    changes = {name: then for name, (now, then) in now_and_then.items() if now != then}
    return " ".join(f"{name}={shlex.quote(str(value))}" for name, value in changes.items())


def check_command(cfg: Config, manifest: dict) -> str:
    """The command that checks the data, and writes a manifest where there is none.

    It names the tokenizer where it would find another, or none: it may be given without DATA_DIR.
    """
    folder, given = cfg.data_folder, cfg.tokenizer_path
    own = find_tokenizer(folder, manifest, Config.data_dir)
    same = own.is_file() and (
        not given or os.path.isfile(given) and file_sha256(Path(given)) == file_sha256(own)
    )
    model = "" if same else f" --sp {shlex.quote(given or 'MODEL')}"
    write = "" if manifest else " --write-manifest"
    return f"{prepare_command()} --check {shlex.quote(str(folder))}{write}{model}"


def _check_names(path: Path) -> None:
    """DataError where a name stands twice in the manifest: two readers would be told two things."""
    try:
        strict_json(path.read_bytes() if path.is_file() else "{}")
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


def _check_manifest(cfg: Config, manifest: dict, counts: dict[str, int], totals: dict[str, int]) -> None:
    path = cfg.data_folder / "manifest.json"
    if not manifest:
        if cfg.caseops_enabled:
            raise DataError(f"{path}: missing")
        _check_tokenizer(cfg, manifest)
        return
    transform = manifest.get("transform")
    if cfg.caseops_enabled != (transform != "none"):
        given = int(cfg.caseops_enabled)
        what = f"must be {1 - given}, {path} says the transform is {transform!r}"
        raise DataError(f"CASEOPS_ENABLED={given}: {what}")
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
    _check_tokenizer(cfg, manifest)


def _check_tokenizer(cfg: Config, manifest: dict) -> None:
    """DataError where the given tokenizer is not the data's, as far as the manifest or their names tell."""
    given, own = tokenizer_file(cfg), find_tokenizer(cfg.data_folder, manifest, cfg.data_dir)
    if not given.is_file():
        return
    said = manifest.get("tokenizer", {}).get("sha256") or own.is_file() and file_sha256(own)
    if said and said != file_sha256(given):
        made = cfg.data_folder / "manifest.json" if manifest else f"{cfg.data_folder} with {own}"
        raise DataError(f"TOKENIZER_PATH={given}: not the tokenizer that {made} was prepared with")
