"""What a prepared or downloaded folder holds, whether it is whole and right, whether validation leaked."""

import contextlib
import functools
import itertools
import os
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from dataprep.crew import Crew
from dataprep.fusion import marker_pairs, pairs_of, unfused
from dataprep.leaks import NearIndex, Overlap
from dataprep.progress import Progress
from dataprep.scanning import Scan, ShardScan, joined, scan_shard
from dataprep.shards import (
    BOS_ID,
    FORMAT,
    MANIFEST,
    NO_TRANSFORM,
    TRANSFORM,
    UNFINISHED,
    DataError,
    locked,
    manifest_bytes,
    read_shard,
    shard_paths,
    write_whole,
)
from dataprep.sidecar import is_lossless, odd_tokens, pieces_of
from systems.layout import (
    SOURCES,
    download_command,
    file_sha256,
    find_tokenizer,
    is_caseops,
    prepare_command,
    strict_json,
)

SPLITS = ("train", "val", "val_bytes")
PERCENTILES = (1, 10, 50, 90, 99)
SHARED = 0.2  # of the validation documents may come again in part; texts of the web do (the demo's: 5 %)


def shard_scanner(near: NearIndex | None = None) -> Callable[[Path], ShardScan]:
    """The worker of a crew that scans shards."""
    return functools.partial(scan_shard, near=near)


def scan_shards(paths: Sequence[Path], workers: int, near: NearIndex | None = None) -> dict[str, ShardScan]:
    """Scans of shards by file name, made in several processes; progress goes to stderr.

    Args:
        near: the validation documents that training shards are compared with, if at all.

    Raises:
        DataError: as `scan_shard`, or a process was killed.
    """
    tagged = [(path.stat().st_size, path) for path in paths]
    found, documents, progress = {}, 0, Progress(sum(size for size, _ in tagged))
    try:
        with Crew(functools.partial(shard_scanner, near), min(workers, len(paths) or 1)) as crew:
            for path, (size, result) in zip(paths, crew.map(tagged), strict=True):
                found[path.name] = result
                documents += result.scan.counts["documents"]
                progress.update(documents, size)
    finally:
        progress.close()
    return found


def check_folder(
    folder: Path, write_manifest: bool = False, tokenizer: Path | None = None, workers: int = 1
) -> tuple[list[str], dict]:
    """Everything that is wrong in a folder, each with what mends it, and a manifest of what is there.

    Args:
        folder: holds shards, manifest, for CaseOps text the sidecar.
        write_manifest: where nothing else is wrong than that there is none, write one.
        tokenizer: the data's; None for the one that `find_tokenizer` finds.
        workers: processes that read the shards.

    Raises:
        DataError: there is no such folder or tokenizer, or another process is to write the manifest.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    if tokenizer and not tokenizer.is_file():
        raise DataError(f"--sp {tokenizer}: no such file")
    check = Checker(folder, tokenizer, workers)
    with locked(folder) if write_manifest else contextlib.nullcontext():
        check.run()
        if write_manifest and check.can_have_manifest:
            write_whole(folder / MANIFEST, manifest_bytes(check.scanned()))
            check.problems.clear()
    known = check.manifest if check.manifest.get("report") else check.scanned()
    return check.problems, known


class Checker:
    """Collects what is wrong in a folder."""

    def __init__(self, folder: Path, tokenizer: Path | None = None, workers: int = 1) -> None:
        """Arguments as those of `check_folder`."""
        self.folder = folder
        self.problems: list[str] = []
        self.manifest: dict = {}
        self.scans: dict[str, Scan] = {}
        self.sha256: dict[str, str] = {}
        self.charged: int | None = None
        self.near: Overlap | None = None
        self._given, self._workers = tokenizer, workers
        self._data_dir = os.environ.get("DATA_DIR", "./data/")  # as in train_gpt.py
        self._processor: sentencepiece.SentencePieceProcessor | None = None

    def run(self, overlap: bool = True, new: bool = False) -> None:
        """All checks, cheap ones first.

        Args:
            overlap: look for validation documents in training too.
            new: no manifest is looked for: one is to be written.
        """
        if (self.folder / UNFINISHED).exists():
            self._wrong(f"{self.folder}: was not finished", "repeat the command that prepared it")
        if not new:
            self._read_manifest()
        self._load_tokenizer()
        self._shards(overlap)
        if {"train", "val"} <= self.scans.keys():
            self._documents()
            if "val_bytes" in self.scans:
                self._sidecar()
            if overlap:
                self._overlap()

    @property
    def can_have_manifest(self) -> bool:
        """There is none, and nothing else is wrong."""
        return self.problems == [self.no_manifest] and self._processor is not None

    @property
    def no_manifest(self) -> str:
        """The problem of a folder without a manifest, which may be all that there is to say of it."""
        lacks = f"no {MANIFEST}" + " and no tokenizer" * (not self._tokenizer.is_file())
        return (
            f"{self.folder}: has {lacks}, so nothing says what it should hold; "
            f"if you trust it: {self._write_command}"
        )

    @property
    def _write_command(self) -> str:
        """The command that writes a manifest of the folder."""
        needed = self._given or not self._tokenizer.is_file()
        model = f" --sp {shlex.quote(str(self._given or 'MODEL'))}" if needed else ""
        folder = shlex.quote(str(self.folder))
        return f"{prepare_command()} --check {folder} --write-manifest{model}"

    def scanned(self) -> dict:
        """A manifest of what the folder holds, as far as that can be seen."""
        keys = ("documents", "tokens", *["operator_tokens"] * (not self.is_plain))
        splits = {split: {key: scan.counts[key] for key in keys} for split, scan in self.scans.items()}
        splits.pop("val_bytes", None)
        if self.near and "train" in splits:
            splits["train"]["near_duplicates"] = self.near.documents
        if self.charged is not None and "val" in splits:
            splits["val"]["bytes"] = self.charged
        names = {path.name: path for split in SPLITS for path in self._paths(split)}
        return {
            "format": FORMAT,
            "transform": NO_TRANSFORM if self.is_plain else TRANSFORM,
            "origin": "scanned",
            "tokenizer": self._tokenizer_entry() if self._processor else {},
            "val_docs": splits.get("val", {}).get("documents", 0),
            "splits": splits,
            "report": {
                split: split_report(Counter(splits[split]), self.scans[split].lengths) for split in splits
            },
            "files": {
                name: {"tokens": (path.stat().st_size - 1024) // 2, "sha256": self._sha256(path)}
                for name, path in names.items()
            },
        }

    def _tokenizer_entry(self) -> dict:
        """The manifest's word on the tokenizer, with its path from the folder where that must be said."""
        path, folder = self._tokenizer, self.folder
        entry = {"sha256": file_sha256(path), "vocab_size": self._processor.get_piece_size()}
        found = find_tokenizer(folder, {"tokenizer": entry}, self._data_dir)
        if found.parent != folder and found.is_file() and file_sha256(found) == entry["sha256"]:
            return entry
        return entry | {"file": os.path.relpath(path.resolve(), folder.resolve())}

    @property
    def is_plain(self) -> bool:
        """The tokenizer knows no operators; without one, the manifest says so, or there is no sidecar."""
        if self._processor is not None:
            return not is_caseops(self._processor)
        if "transform" in self.manifest:
            return self.manifest["transform"] == NO_TRANSFORM
        return not self._paths("val_bytes")

    @property
    def _tokenizer(self) -> Path:
        return self._given or find_tokenizer(self.folder, self.manifest, self._data_dir)

    def _wrong(self, what: str, mend: str = "") -> None:
        self.problems.append(f"{what}; mend: {mend or self._again()}")

    def _again(self) -> str:
        """The command that makes these data anew."""
        folder = shlex.quote(str(self.folder))
        for (plain, vocab), source in SOURCES.items():
            made = self.manifest.get("repository"), self.manifest.get("dataset", SOURCES[False, 8192].dataset)
            if made == (source.repository, source.dataset):
                shards = sum(name.startswith("fineweb_train_") for name in self.manifest["files"])
                return download_command(plain, vocab, self.folder, shards)
        options = f"--docs FILE --sp MODEL --out {folder} --overwrite{' --plain' * self.is_plain}"
        return f"{prepare_command()} {options}"

    def _paths(self, split: str) -> list[Path]:
        return shard_paths(self.folder, split)

    def _sha256(self, path: Path) -> str:
        if path.name not in self.sha256:
            self.sha256[path.name] = file_sha256(path)
        return self.sha256[path.name]

    def _read_manifest(self) -> None:
        path = self.folder / MANIFEST
        if not path.exists():
            self.problems.append(self.no_manifest)
            return
        manifest = read_manifest(path)
        if manifest is None:
            names = (f"{path}.foreign{number or ''}" for number in itertools.count())
            aside = next(name for name in names if not os.path.lexists(name))  # `mv` would replace it
            move = f"mv {shlex.quote(str(path))} {shlex.quote(aside)}"
            self._wrong(f"{path}: not a manifest of this program", f"{move} && {self._write_command}")
            return
        self.manifest = manifest

    def _load_tokenizer(self) -> None:
        path = self._tokenizer
        if not path.is_file():
            if self.no_manifest not in self.problems:
                self._wrong(f"{path}: the tokenizer is missing")
        elif self.manifest.get("tokenizer", {}).get("sha256", file_sha256(path)) != file_sha256(path):
            self._wrong(f"{path}: is not the tokenizer that {MANIFEST} names")
        else:
            try:
                model = path.read_bytes() or b"\0"  # a path must be UTF-8, and nothing would be no model
                self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            except RuntimeError:
                self._wrong(f"{path}: not a SentencePiece model")

    def _shards(self, overlap: bool) -> None:
        """Names without gaps, headers, sizes; against the manifest tokens and hashes; then scan."""
        listed = dict(self.manifest.get("files", {}))
        readable = {split: [*filter(self._is_readable, self._paths(split))] for split in SPLITS}
        whole = overlap and readable["val"] and readable["val"] == self._paths("val")
        near = NearIndex.of_folder(self.folder) if whole else None
        shards = scan_shards(sum(readable.values(), []), self._workers, near)
        if near:
            parts = [shard.overlap for shard in shards.values()]
            self.near = Overlap(sum(part.documents for part in parts), set().union(*(p.held for p in parts)))
        self.sha256 |= {name: shard.sha256 for name, shard in shards.items()}
        for split in SPLITS:
            paths = self._paths(split)
            if [path.name for path in paths] != [f"fineweb_{split}_{n:06d}.bin" for n in range(len(paths))]:
                self._wrong(f"{self.folder}: fineweb_{split}_* are not numbered from 0 without gaps")
            if not paths and not (split == "val_bytes" and self.is_plain):
                self._wrong(f"{self.folder}: no fineweb_{split}_*.bin")
            for path in paths:
                entry = listed.pop(path.name, None)
                if self.manifest and path in readable[split]:
                    self._compare(path, entry)
            if paths and paths == readable[split]:
                self.scans[split] = joined(shards[path.name].scan for path in paths)
        for name in listed:
            self._wrong(f"{self.folder / name}: is missing, the manifest lists it")

    def _is_readable(self, path: Path) -> bool:
        try:
            read_shard(path)
        except DataError as error:
            self._wrong(str(error))
            return False
        return True

    def _compare(self, path: Path, entry: dict | None) -> None:
        """A shard with its entry in the manifest."""
        tokens = len(read_shard(path))
        if entry is None:
            self._wrong(f"{path}: is not in the manifest")
        elif entry.get("tokens") != tokens:
            self._wrong(f"{path}: holds {tokens} tokens, the manifest says {entry.get('tokens')}")
        elif entry.get("sha256") != self._sha256(path):
            self._wrong(f"{path}: SHA-256 differs from the manifest's")

    def _documents(self) -> None:
        for split in ("train", "val"):
            scan, said = self.scans[split], self.manifest.get("splits", {}).get(split, {})
            if scan.first != BOS_ID:
                self._wrong(f"{self.folder}/fineweb_{split}_000000.bin: does not begin with BOS ({BOS_ID})")
            for key in ("documents", "tokens"):
                if said.get(key, scan.counts[key]) != scan.counts[key]:
                    holds = f"holds {scan.counts[key]} {split} {key}"
                    self._wrong(f"{self.folder}: {holds}, the manifest says {said[key]}")
            vocab = self.manifest.get("tokenizer", {}).get("vocab_size", 1 << 16)
            vocab = self._processor.get_piece_size() if self._processor else vocab
            if scan.highest >= vocab:
                self._wrong(f"{self.folder}: {split} holds token {scan.highest}, the tokenizer has {vocab}")

    def _sidecar(self) -> None:
        """Byte counts against tokens: as many, none for BOS, those of the pieces, the sum."""
        self.charged, streams = 0, []
        for path, beside in zip(self._paths("val"), self._paths("val_bytes"), strict=False):
            tokens, carried = read_shard(path), read_shard(beside)
            if len(tokens) != len(carried):
                self._wrong(f"{beside}: {len(carried)} entries for the {len(tokens)} tokens of {path.name}")
                return
            if carried[tokens == BOS_ID].any():
                self._wrong(f"{beside}: charges bytes to BOS tokens")
            self.charged += int(carried.sum(dtype=np.int64))
            streams.append((tokens, carried))
        if len(self._paths("val")) != len(self._paths("val_bytes")):
            self._wrong(f"{self.folder}: not as many shards fineweb_val_bytes_* as fineweb_val_*")
        if self._processor is not None and streams and not self.is_plain:
            self._pieces(*map(np.concatenate, zip(*streams, strict=True)))
        said = self.manifest.get("splits", {}).get("val", {}).get("bytes", self.charged)
        if said != self.charged:
            self._wrong(f"{self.folder}: the sidecar charges {self.charged} bytes, the manifest says {said}")
        if not self.charged:
            self._wrong(f"{self.folder}: the validation documents leave no bytes to score")

    def _pieces(self, tokens: np.ndarray, carried: np.ndarray) -> None:
        """Every token's bytes against its piece. What a normalising tokenizer hides, the documents tell."""
        if pairs := pairs_of(self.manifest):
            if pairs != marker_pairs(self._processor):
                self._wrong(f"{self.folder}: the manifest's fused_markers are not those of the tokenizer")
                return
            tokens, carried = unfused(tokens, pairs, carried)
        lossless = is_lossless(self._processor)
        odd = odd_tokens(tokens, carried, pieces_of(self._processor), lossless)
        problem = odd.problem(lossless)
        if problem and (lossless or not self._is_as_prepared()):
            self._wrong(f"{self.folder}: the sidecar is not that of these tokens: {problem}")

    def _is_as_prepared(self) -> bool:
        """Validation tokens and sidecar are, byte for byte, what this program made of the documents."""
        files = self.manifest.get("files", {})
        paths = [*self._paths("val"), *self._paths("val_bytes")]
        same = all(files.get(path.name, {}).get("sha256") == self._sha256(path) for path in paths)
        return bool(files) and "origin" not in self.manifest and same

    def _overlap(self) -> None:
        """Validation documents whose tokens are those of a training document, or nearly so."""
        val, problem = self.scans["val"].hashes, ""
        if leaked := int(np.isin(val, self.scans["train"].hashes).sum()):
            problem = f"{leaked} of {len(val)} validation documents are training documents too"
        elif self.near:
            problem = too_near(self.near, self.manifest, len(val), len(self._paths("train")))
        if problem:
            self._wrong(
                f"{self.folder}: {problem}",
                f"prepare from the documents, which drops them: {prepare_command()} --docs FILE --sp MODEL "
                f"--out DIR{' --plain' * self.is_plain}" + " --drop-near-duplicates" * (not leaked),
            )


def too_near(found: Overlap, manifest: Mapping, documents: int, shards: int) -> str:
    """What is wrong with so much overlap, "" where nothing is.

    Texts of the web come again: what a manifest tells of is known, and half of a few documents is chance.

    Args:
        found: what the training shards have of the validation documents.
        documents: how many of these there are.
        shards: how many training shards, at whose ends documents are cut in two.
    """
    split = manifest.get("splits", {}).get("train", {})
    if "near_duplicates" in split:
        told = split["near_duplicates"] - split.get("dropped_near_duplicates", 0)
        if found.documents > told + shards - 1:
            near = f"{found.documents} training documents are near validation documents"
            return f"{near}, the manifest says {told}"
    if len(found.held) > 1 + SHARED * documents:
        return f"training documents hold the half of {len(found.held)} of {documents} validation documents"
    return ""


def read_manifest(path: Path) -> dict | None:
    """A manifest, None where the file is not one of this program."""
    try:
        manifest = strict_json(path.read_bytes())
        known = manifest["format"] == FORMAT and isinstance(manifest["files"], dict)
    except (ValueError, TypeError, KeyError):
        known = False
    return manifest if known else None


def split_report(counts: Counter, lengths: Counter) -> dict:
    """What a split is: ratios of its counts, and the lengths of its documents in tokens."""
    report = {}
    if counts["tokens"]:
        report["operator_share"] = round(counts["operator_tokens"] / counts["tokens"], 6)
        if counts["bytes"]:
            report["bytes_per_token"] = round(counts["bytes"] / counts["tokens"], 6)
    if lengths:
        values = np.array(sorted(lengths))
        upto = np.cumsum([lengths[value] for value in values.tolist()])
        ranks = {f"p{p}": -(-p * int(upto[-1]) // 100) for p in PERCENTILES}
        places = {name: np.searchsorted(upto, rank) for name, rank in ranks.items()}
        places = {"min": 0, **places, "max": -1}
        report["document_tokens"] = {name: int(values[place]) for name, place in places.items()}
    return report


def report_table(manifest: dict) -> str:
    """The manifest's counts and report as a table, a column for each split; "-" where it is not known."""
    splits, report = manifest.get("splits", {}), manifest.get("report", {})
    columns = [name for name in ("train", "val") if name in splits]
    keys = ("documents", "tokens", "bytes", "uncharged_bytes", "overcharged_bytes")
    keys += (
        "empty_documents",
        "bad_documents",
        "dropped_duplicates",
        "dropped_space_duplicates",
        "dropped_token_duplicates",
        "near_duplicates",
        "dropped_near_duplicates",
    )
    rows = [(key, [splits[name].get(key) for name in columns]) for key in keys]
    for key in ("bytes_per_token", "operator_share"):
        rows.append((key, [report.get(name, {}).get(key) for name in columns]))
    for key in ("min", *(f"p{p}" for p in PERCENTILES), "max"):
        found = [report.get(name, {}).get("document_tokens", {}).get(key) for name in columns]
        rows.append((f"document_tokens_{key}", found))
    lines = [f"{'':26}" + "".join(f"{name:>18}" for name in columns)]
    for key, values in rows:
        shown = ["-" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.4f}" for v in values]
        lines.append(f"{key:26}" + "".join(f"{value:>18}" for value in shown))
    return "\n".join(lines)
