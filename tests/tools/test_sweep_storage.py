"""A sweep's study outlives full disks, locks and other containers."""

import errno
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from sweeping import owner, storage  # noqa: E402

LINES = b'{"op_code":0,"n":1}\n{"op_code":4}\n'


@pytest.mark.parametrize(
    "rest",
    [b'{"op_code":5,"n', b"\0" * 4096, b"\0" * 99 + b"\n", b'{"op{"op_code":5}\n{"op_code":6}\n', b"7\n"],
)
def test_sweep_cuts_a_damaged_journal_back_to_its_last_whole_line(tmp_path, capsys, rest):
    path = tmp_path / "study.journal"
    path.write_bytes(LINES + rest)
    storage.repair(path)
    assert path.read_bytes() == LINES
    assert (tmp_path / "study.journal.damaged1").read_bytes() == rest
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and f"{path}: damaged, the last {len(rest)} bytes" in told
    storage.repair(path)
    assert len(list(tmp_path.iterdir())) == 2 and capsys.readouterr().err == ""


def test_sweep_goes_on_with_a_damaged_journal(tmp_path):
    """What optuna itself can read no more; a lock that an older version has left behind hinders nobody."""
    (tmp_path / "study.journal.lock").symlink_to("runs/sweep/study.journal")
    for number in range(2):
        study = optuna.create_study(
            storage=storage.open_storage("", tmp_path, bool), study_name="a", load_if_exists=True
        )
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
        assert len(study.trials) == number + 1
        with open(tmp_path / "study.journal", "ab") as file:
            file.write(b'{"op_code":5,"half')


def test_sweep_takes_half_a_line_back_where_the_disk_is_full(tmp_path, monkeypatch):
    journal = storage.Journal(tmp_path / "study.journal")
    journal.append_logs([{"a": 1}])

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        storage.SweepError, match=r"study.journal: cannot be written \(No space left on device\)"
    ):
        journal.append_logs([{"b": 1}])
    assert (tmp_path / "study.journal").read_bytes() == b'{"a":1}\n'


def test_sweep_says_who_holds_a_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "LOCKED_SECONDS", 0.1)
    first, second = (storage.HeldFile(tmp_path / "held") for _ in range(2))
    first.acquire()
    with pytest.raises(
        storage.SweepError, match=f"held for 0.1 s by process {os.getpid()} of {socket.gethostname()}"
    ):
        second.acquire()
    first.release()
    assert second.acquire()
    second.release()


@pytest.fixture
def locked(monkeypatch):
    """Function: how often a database is locked, whether the sweep is stopped -> the storage that waits."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def make(times: int, stopped: bool = False) -> optuna.storages.BaseStorage:
        made, left = optuna.storages.InMemoryStorage(), [times]

        def get_all_studies() -> str:
            left[0] -= 1
            if left[0] >= 0:
                raise optuna.exceptions.StorageInternalError("x") from OSError("database is locked")
            return "studies"

        made.get_all_studies = get_all_studies
        return storage.patient(made, "sqlite:///a.db", lambda: stopped)

    return make


def test_sweep_waits_for_a_locked_database_and_says_so(locked, capsys):
    assert locked(3).get_all_studies() == "studies"
    assert capsys.readouterr().err.count("sqlite:///a.db is locked by another process: waiting for it") == 1
    with pytest.raises(storage.SweepError, match="locked by another process for minutes"):
        locked(1000).get_all_studies()
    with pytest.raises(KeyboardInterrupt):
        locked(1000, stopped=True).get_all_studies()


HOLD = """
import sys
from pathlib import Path
from sweeping import owner
with owner.holding(Path(sys.argv[1]), {"token": "t"}):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_sweep_knows_whether_another_sweep_is_gone(tmp_path):
    me = owner.myself()
    there, elsewhere = {**me, "token": "t"}, {**me, "token": "t", "space": "pid:[1]", "process": 1}
    assert not owner.is_gone(me, []), "this process lives"
    assert owner.is_gone({**me, "started": "1"}, []), "another one had its number"
    assert not owner.is_gone(elsewhere, [tmp_path]), (
        "nothing is known of a container whose folder is not here"
    )
    assert not owner.is_gone({}, [tmp_path])
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    options = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "env": {"PYTHONPATH": str(ROOT / "tools")},
    }
    with subprocess.Popen(command, **options) as process:
        process.stdout.readline()
        assert not owner.is_gone(elsewhere, [tmp_path]), "a container of the same name, at work"
        assert not owner.is_gone({**elsewhere, "boot": "b"}, [tmp_path])
        process.kill()
        process.wait()
    assert owner.is_gone(elsewhere, [tmp_path / "no", tmp_path]), "a container that was started anew"
    assert owner.is_gone({**there, "boot": "b"}, [tmp_path]), "this machine was started anew"
    assert not owner.is_gone({**there, "boot": "b", "host": "other"}, [tmp_path]), "another machine's"
    assert not owner.is_gone({**elsewhere, "token": "u"}, [tmp_path]), "a trial of another study"
