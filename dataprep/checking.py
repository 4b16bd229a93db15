"""What a prepared or downloaded folder holds, whether it is whole and right, whether validation leaked."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from dataprep.leaks import token_values
from dataprep.shards import (
    BOS_ID,
    FIRST_OPERATOR_ID,
    FORMAT,
    MANIFEST,
    NO_TRANSFORM,
    OPERATOR_COUNT,
    TRANSFORM,
    UNFINISHED,
    DataError,
    file_sha256,
    manifest_bytes,
    read_shard,
    shard_paths,
    write_whole,
)
from lossless_caps import TITLE

PERCENTILES = (1, 10, 50, 90, 99)
CHUNK_TOKENS = 1 << 21
ODD_BYTES_ALLOWED = 0.01  # share of pieces of letters that may carry other bytes: NFKC folds a few
_PREPARE = "python prepare_caseops_data.py"


class Scan:
    """One pass over the shards of a split: counts, document lengths, a hash of each document's tokens."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.counts, self.lengths, self.highest = Counter(), Counter(), 0
        self.starts_with_bos = True
        hashes = [np.empty(0, np.uint64)]
        held = np.empty(0, np.uint16)
        for tokens in self._chunks(paths):
            held = np.concatenate([held, tokens])
            starts = np.flatnonzero(held == BOS_ID)
            if len(starts) > 1:
                hashes.append(self._documents(held[: starts[-1]], starts[:-1]))
                held = held[starts[-1] :]
        if len(held):
            hashes.append(self._documents(held, np.flatnonzero(held == BOS_ID)))
        self.hashes = np.concatenate(hashes)

    def _chunks(self, paths: Sequence[Path]) -> Iterator[np.ndarray]:
        for path in paths:
            shard = read_shard(path)
            for start in range(0, len(shard), CHUNK_TOKENS):
                chunk = np.array(shard[start : start + CHUNK_TOKENS])
                if not self.counts["tokens"]:
                    self.starts_with_bos = bool(chunk[0] == BOS_ID)
                operator = chunk - np.uint16(FIRST_OPERATOR_ID) < OPERATOR_COUNT
                self.counts.update(tokens=len(chunk), operator_tokens=int(np.count_nonzero(operator)))
                self.highest = max(self.highest, int(chunk.max()))
                yield chunk

    def _documents(self, tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Count whole documents; their hashes, (n,) uint64: sum over the tokens of value * factor^place."""
        self.counts["documents"] += len(starts)
        if not len(starts):
            return np.empty(0, np.uint64)
        lengths = np.diff(starts, append=len(tokens))
        self.lengths.update(lengths.tolist())
        tokens = tokens[starts[0] :]
        places = np.arange(len(tokens)) - np.repeat(starts - starts[0], lengths)
        powers = np.full(lengths.max(), 0x9E3779B97F4A7C15, np.uint64)
        powers[0] = 1
        powers = np.multiply.accumulate(powers)
        return np.add.reduceat(token_values(tokens) * powers[places], starts - starts[0])


def check_folder(folder: Path, write_manifest: bool = False) -> tuple[list[str], dict]:
    """Everything that is wrong in a folder, each with what mends it, and a manifest of what is there.

    Args:
        folder: holds shards, sidecar, manifest; the tokenizer too or beside it, as in the default layout.
        write_manifest: where nothing else is wrong than that there is none, write one.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    check = Checker(folder)
    check.run()
    if write_manifest and not check.manifest and check.problems == [check.no_manifest]:
        write_whole(folder / MANIFEST, manifest_bytes(check.scanned()))
        check.problems.clear()
    known = check.manifest if check.manifest.get("report") else check.scanned()
    return check.problems, known


class Checker:
    """Collects what is wrong in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []
        self.manifest: dict = {}
        self.scans: dict[str, Scan] = {}
        self.sha256: dict[str, str] = {}
        self.charged: int | None = None
        self.no_manifest = (
            f"{folder}: has no {MANIFEST}, so nothing says what it should hold; if you trust it: "
            f"{_PREPARE} --check {folder} --write-manifest"
        )
        self._tokenizer = find_tokenizer(folder, {})
        self._processor: sentencepiece.SentencePieceProcessor | None = None

    def run(self, overlap: bool = True) -> None:
        """All checks, cheap ones first; `overlap`: of validation with training too."""
        if (self.folder / UNFINISHED).exists():
            self._wrong(f"{self.folder}: was not finished", "repeat the command that prepared it")
        self._read_manifest()
        self._load_tokenizer()
        self._shards()
        if len(self.scans) == 3:
            self._documents()
            self._sidecar()
        if overlap and {"train", "val"} <= self.scans.keys():
            self._overlap()

    def scanned(self) -> dict:
        """A manifest of what the folder holds, as far as that can be seen."""
        keys = ("documents", "tokens", *["operator_tokens"] * (not self._plain()))
        splits = {
            split: {key: scan.counts[key] for key in keys}
            for split, scan in self.scans.items()
            if split != "val_bytes"
        }
        if self.charged is not None and "val" in splits:
            splits["val"]["bytes"] = self.charged
        names = {path.name: path for split in ("train", "val", "val_bytes") for path in self._paths(split)}
        tokenizer, path = {}, self._tokenizer
        if path and self._processor:
            tokenizer = {"sha256": file_sha256(path), "vocab_size": self._processor.get_piece_size()}
            tokenizer |= {"file": path.name} if path.parent == self.folder else {}
        return {
            "format": FORMAT,
            "transform": NO_TRANSFORM if self._plain() else TRANSFORM,
            "origin": "scanned",
            "tokenizer": tokenizer,
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

    def _plain(self) -> bool:
        """The tokenizer knows no operators."""
        return self._processor is not None and self._processor.encode(TITLE) != [FIRST_OPERATOR_ID]

    def _wrong(self, what: str, mend: str = "") -> None:
        again = f"{_PREPARE} --docs FILE --sp MODEL --out {self.folder} --overwrite"
        if "repository" in self.manifest:
            again = f"{_PREPARE} --download"
        self.problems.append(f"{what}; mend: {mend or again}")

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
        try:
            manifest = json.loads(path.read_bytes())
            known = manifest["format"] == FORMAT and isinstance(manifest["files"], dict)
        except (ValueError, TypeError, KeyError):
            known = False
        if not known:
            self._wrong(f"{path}: not a manifest of this program")
            return
        self.manifest = manifest
        self._tokenizer = find_tokenizer(self.folder, manifest)

    def _load_tokenizer(self) -> None:
        path = self._tokenizer
        if path is None:
            self._wrong(f"{self.folder}: its tokenizer is missing")
        elif self.manifest.get("tokenizer", {}).get("sha256", file_sha256(path)) != file_sha256(path):
            self._wrong(f"{path}: is not the tokenizer that {MANIFEST} names")
        else:
            try:
                self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
            except RuntimeError:
                self._wrong(f"{path}: not a SentencePiece model")

    def _shards(self) -> None:
        """Names without gaps, headers, sizes; against the manifest tokens and hashes; then scan."""
        listed = dict(self.manifest.get("files", {}))
        for split in ("train", "val", "val_bytes"):
            paths, whole = self._paths(split), True
            if [path.name for path in paths] != [f"fineweb_{split}_{n:06d}.bin" for n in range(len(paths))]:
                self._wrong(f"{self.folder}: fineweb_{split}_* are not numbered from 0 without gaps")
            if not paths:
                self._wrong(f"{self.folder}: no fineweb_{split}_*.bin")
            for path in paths:
                whole &= self._shard(path, listed.pop(path.name, None))
            if paths and whole:
                self.scans[split] = Scan(paths)
        for name in listed:
            self._wrong(f"{self.folder / name}: is missing, the manifest lists it")

    def _shard(self, path: Path, entry: dict | None) -> bool:
        """Whether a shard can be read."""
        try:
            tokens = len(read_shard(path))
        except DataError as error:
            self._wrong(str(error))
            return False
        if not self.manifest:
            return True
        if entry is None:
            self._wrong(f"{path}: is not in the manifest")
        elif entry.get("tokens") != tokens:
            self._wrong(f"{path}: holds {tokens} tokens, the manifest says {entry.get('tokens')}")
        elif entry.get("sha256") != self._sha256(path):
            self._wrong(f"{path}: SHA-256 differs from the manifest's")
        return True

    def _documents(self) -> None:
        for split in ("train", "val"):
            scan, said = self.scans[split], self.manifest.get("splits", {}).get(split, {})
            if not scan.starts_with_bos:
                self._wrong(f"{self.folder}/fineweb_{split}_000000.bin: does not begin with BOS ({BOS_ID})")
            for key in ("documents", "tokens"):
                if said.get(key, scan.counts[key]) != scan.counts[key]:
                    holds = f"holds {scan.counts[key]} {split} {key}"
                    self._wrong(f"{self.folder}: {holds}, the manifest says {said[key]}")
            vocab = self.manifest.get("tokenizer", {}).get("vocab_size", 1 << 16)
            if scan.highest >= vocab:
                self._wrong(f"{self.folder}: {split} holds token {scan.highest}, the tokenizer has {vocab}")

    def _sidecar(self) -> None:
        """Byte counts against tokens: as many, none for BOS, letters as long as they are, the sum."""
        pieces = letter_lengths(self._processor)
        odd = letters = self.charged = 0
        for path, beside in zip(self._paths("val"), self._paths("val_bytes"), strict=False):
            tokens, carried = read_shard(path), read_shard(beside)
            if len(tokens) != len(carried):
                self._wrong(f"{beside}: {len(carried)} entries for the {len(tokens)} tokens of {path.name}")
                return
            if carried[tokens == BOS_ID].any():
                self._wrong(f"{beside}: charges bytes to BOS tokens")
            self.charged += int(carried.sum(dtype=np.int64))
            expected = pieces[tokens]
            letters += np.count_nonzero(expected)
            odd += np.count_nonzero((expected != carried) & (expected > 0))
        if len(self._paths("val")) != len(self._paths("val_bytes")):
            self._wrong(f"{self.folder}: not as many shards fineweb_val_bytes_* as fineweb_val_*")
        if odd > ODD_BYTES_ALLOWED * letters:
            found = f"{odd} of {letters} pieces of letters carry other bytes than those"
            self._wrong(f"{self.folder}: the sidecar is not that of these tokens: {found}")
        said = self.manifest.get("splits", {}).get("val", {}).get("bytes", self.charged)
        if said != self.charged:
            self._wrong(f"{self.folder}: the sidecar charges {self.charged} bytes, the manifest says {said}")

    def _overlap(self) -> None:
        """Validation documents, all of them, whose tokens are those of a training document."""
        val = self.scans["val"].hashes
        leaked = int(np.isin(val, self.scans["train"].hashes).sum())
        if leaked:
            self._wrong(
                f"{self.folder}: {leaked} of {len(val)} validation documents are training documents too",
                f"prepare from the documents, which drops them: {_PREPARE} --docs FILE --sp MODEL --out DIR",
            )


def find_tokenizer(folder: Path, manifest: dict) -> Path | None:
    """The tokenizer: named by the manifest, else the one model in the folder or in the default layout."""
    named = manifest.get("tokenizer", {}).get("file")
    if named:
        return folder / named if (folder / named).is_file() else None
    for place in (folder, folder.parent.parent / "tokenizers"):
        models = sorted(place.glob("*.model"))
        if len(models) == 1:
            return models[0]
    return None


def letter_lengths(processor: sentencepiece.SentencePieceProcessor | None) -> np.ndarray:
    """Length of each piece that is lower-case letters only, else 0: (65536,) int64."""
    lengths = np.zeros(1 << 16, np.int64)
    for token in range(processor.get_piece_size() if processor else 0):
        piece = processor.id_to_piece(token)
        lengths[token] = len(piece) if re.fullmatch("[a-z]+", piece) else 0
    return lengths


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
    keys = ("documents", "tokens", "bytes", "uncharged_bytes", "empty_documents", "bad_documents")
    keys += ("dropped_duplicates", "dropped_space_duplicates", "near_duplicates", "dropped_near_duplicates")
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
