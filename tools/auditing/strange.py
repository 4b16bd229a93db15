"""Checks that replay a script which is not the repository's: made in the box, by a process of their own.

That process may import the script, which may do there what it likes: what it writes is only read as data,
a FAIL is believed, and a check that passes is no more than the script's own word (CONSISTENT).
"""

import atexit
import contextlib
import functools
import gc
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from auditing import box, checks  # noqa: E402, F401 - the checks register themselves
from auditing.run import (  # noqa: E402
    CONSISTENT,
    FAIL,
    NOT_CHECKED,
    UNTOLD,
    Audit,
    AuditError,
    NotChecked,
    Verdict,
    carry_out,
)

SECONDS = 3600  # a script that replays for longer hangs
EVIDENCE = 600  # characters of it that are shown


@functools.cache
def boxed_verdicts(audit: Audit, names: tuple[str, ...]) -> Mapping[str, Verdict]:
    """What some checks find, by the script that ran, in the box."""
    if UNTOLD in audit.strange_files:
        return dict.fromkeys(names, Verdict(NOT_CHECKED, "the log does not hold the script that ran"))
    folder = Path(tempfile.mkdtemp(dir=audit.work))
    told = {"data": str(audit.data_folder.resolve()), "run": str(audit.folder.resolve()), "names": names}
    readable = [ROOT, audit.folder.resolve(), audit.data_folder.resolve()]
    readable += [path for path in _named_files(audit) if path.exists()]
    command = [sys.executable, str(Path(__file__).resolve()), json.dumps(told)]
    try:
        ran = box.run(command, folder, readable=readable, timeout=SECONDS)
    except NotChecked as reason:
        return dict.fromkeys(names, Verdict(NOT_CHECKED, str(reason)))
    last = (ran.errors.strip().splitlines() or [f"exit code {ran.code}"])[-1][:EVIDENCE]
    silent = Verdict(NOT_CHECKED, f"the script that ran, in the box: {last}")
    return dict.fromkeys(names, silent) | _believed(folder / "verdicts.jsonl", names)


def _named_files(audit: Audit) -> list[Path]:
    """Files that the settings name outside of the folders of run and data."""
    return [audit.artifact.resolve(), audit.script.tokenizer_file(audit.cfg).resolve()]


def _believed(path: Path, names: Sequence[str]) -> dict[str, Verdict]:
    """What the process in the box wrote, as far as it is believed."""
    found = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            name, status, evidence = json.loads(line)
            if name in names and name not in found:
                status = status if status in (FAIL, NOT_CHECKED) else CONSISTENT
                found[name] = Verdict(status, f"{str(evidence)[:EVIDENCE]} [by the run's own script]")
    return found


def main() -> None:
    """Inside the box: judge what the command asks for; a line of JSON for each check when it is done."""
    told = json.loads(sys.argv[1])
    atexit.register(gc.freeze)  # else Python looks for garbage in all of torch when it ends: 0.5 s
    try:
        audit = Audit(Path(told["run"]), boxed=True, data=Path(told["data"]))
    except AuditError as error:
        sys.exit(str(error))
    with open("verdicts.jsonl", "w", encoding="utf-8", buffering=1) as file:
        for name in told["names"]:
            file.write(json.dumps([name, *carry_out(audit, name)]) + "\n")


if __name__ == "__main__":
    main()
