"""Hashes of data files are remembered for as long as the files are the same, and are never evidence."""

import json
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def shard(tmp_path) -> Path:
    path = tmp_path / "fineweb_val_000000.bin"
    path.write_bytes(b"a" * 1000)
    return path


@pytest.fixture
def read(tg, monkeypatch) -> list[Path]:
    """The files that are read to be hashed; all are old enough to be remembered."""
    files, whole = [], tg.file_sha256
    monkeypatch.setattr(tg, "file_sha256", lambda path: files.append(path) or whole(path))
    monkeypatch.setattr("harness.hashes.YOUNG", -1.0)
    return files


def from_env(tg, tmp_path, **environ: str):
    return tg.Hashes.from_env({"XDG_CACHE_HOME": str(tmp_path / "cache")} | environ)


def test_a_file_is_read_at_the_first_start_only(tg, tmp_path, shard, read):
    first, second = (from_env(tg, tmp_path).sha256(shard) for _ in range(2))
    assert first == second and len(read) == 1
    assert from_env(tg, tmp_path, VERIFY="1").sha256(shard) == first and len(read) == 2
    assert tg.NO_HASHES.sha256(shard) == first and len(read) == 3


def test_a_changed_file_of_the_same_size_and_time_is_read_again(tg, tmp_path, shard, read):
    """What a program can set is set as it was; another file in its place has another inode too."""
    told = shard.stat()
    before = from_env(tg, tmp_path).sha256(shard)
    shard.write_bytes(b"b" * 1000)
    os.utime(shard, ns=(told.st_atime_ns, told.st_mtime_ns))
    now = shard.stat()
    assert (now.st_size, now.st_mtime_ns, now.st_ino) == (told.st_size, told.st_mtime_ns, told.st_ino)
    assert from_env(tg, tmp_path).sha256(shard) != before and len(read) == 2


def test_a_file_that_has_just_changed_is_not_remembered(tg, tmp_path, shard, read, monkeypatch):
    """The clock of a file system may be coarse: within it a second change leaves all times as they are."""
    monkeypatch.setattr("harness.hashes.YOUNG", 3600.0)
    for _ in range(2):
        from_env(tg, tmp_path).sha256(shard)
    assert len(read) == 2


@pytest.mark.parametrize("damage", ["", "{}", "[[], 5]", "[1]", '[[1, 2], "ab"]'])
def test_what_is_remembered_may_be_damaged(tg, tmp_path, shard, read, damage):
    right = from_env(tg, tmp_path).sha256(shard)
    (kept,) = (tmp_path / "cache/train_gpt").iterdir()
    kept.write_text(damage)
    assert from_env(tg, tmp_path).sha256(shard) == right and len(read) == 2
    assert json.loads(kept.read_text())[1] == right


def test_without_a_folder_nothing_is_remembered(tg, tmp_path, shard, read):
    """No HOME, or a folder that cannot be made."""
    (tmp_path / "cache").write_text("a file")
    for hashes in (from_env(tg, tmp_path), tg.Hashes.from_env({})):
        assert hashes.sha256(shard) == hashes.sha256(shard)
    assert len(read) == 4


def test_a_wrong_wish_is_refused(tg):
    with pytest.raises(tg.ConfigError, match="VERIFY='yes': must be 0 or 1"):
        tg.read_settings({"VERIFY": "yes"})


def test_what_judges_remembers_no_hash():
    """Nothing in tools/ takes a hash from anywhere but the file."""
    texts = [path.read_text() for path in sorted((ROOT / "tools").rglob("*.py"))]
    assert len(texts) > 30 and not [text for text in texts if re.search(r"\bhashes\b.*\bHashes\b", text)]
    assert not [text for text in texts if "harness.hashes" in text or "NO_HASHES" in text]
