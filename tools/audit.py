"""Is the number legal? Checks a finished run against the contest's rules and prints a table.

    python tools/audit.py RUN_DIR [--docs FILE] [--data DIR] [--only A1,D3] [--full] [--seeds RUN_DIR ...]

Judged are the run's own files, never the repository's: the script as its log holds it, the counted script and
the artifact, the data as they lie on the disk now, and `ledger.jsonl`, written by a run with AUDIT=1. Every
check is a function that returns the figure that it rests on, or raises what is broken or missing. Some read;
some do it again on a small scale with the run's script: train on scrambled validation data, flip future
tokens, perturb a neighbour, run the artifact in a folder that holds nothing else. audit.json in the run's
folder keeps the table. Exit code 0, 1 (a FAIL), 2 (a mistake in the command, one line).

    --docs FILE   the documents (JSONL) the data were prepared from: their bytes are counted anew
    --data DIR    where the run's data lie now, if they have moved
    --full        evaluate the artifact again as a whole (S2), not on a few documents
    --seeds       the other runs of the same experiment: R4 compares their settings and scripts
    --only        these checks alone, nothing is written
"""

import argparse
import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from auditing import artifact, data, evaluation, report, training  # noqa: F401, I001 - each registers its checks
from auditing.run import CHECKS, Audit, AuditError, Failed, NotChecked, Verdict, short
from command import Mistake, Parser, complain

STATUSES = ("PASS", "FAIL", "NOT CHECKED")
ORDER = sorted(CHECKS, key=lambda name: ("ATSDR".index(name[0]), name))


def judge(audit: Audit, names: Iterable[str] = tuple(ORDER)) -> dict[str, Verdict]:
    """Carry out checks. One that cannot be carried out because of an error has failed: nothing is hidden."""
    verdicts = {}
    for name in names:
        try:
            verdicts[name] = Verdict("PASS", CHECKS[name][1](audit))
        except NotChecked as reason:
            verdicts[name] = Verdict("NOT CHECKED", str(reason))
        except Failed as reason:
            verdicts[name] = Verdict("FAIL", str(reason))
        except AuditError:
            raise
        except Exception as error:  # whatever the script under audit raises
            text = " ".join(f"{type(error).__name__}: {error}".split())
            verdicts[name] = Verdict("FAIL", f"could not be carried out ({text[:300]})")
    return verdicts


def table(verdicts: Mapping[str, Verdict]) -> str:
    """Aligned lines: check, status, rule, evidence."""
    rules = max(len(rule) for rule, _ in CHECKS.values())
    rows = verdicts.items()
    return "\n".join(f"{n}  {v.status:<11}  {CHECKS[n][0]:<{rules}}  {v.evidence}" for n, v in rows)


def summary_of(audit: Audit, verdicts: Mapping[str, Verdict], seconds: float) -> dict:
    """What audit.json holds."""
    return {
        "run": audit.result.get("run"),
        "val_bpb": audit.result["val_bpb"],
        "script_sha256": audit.script_sha256,
        "repository_script_is_the_same": not audit.strange_files,
        "strange_files": audit.strange_files,
        "full": audit.full,
        "seconds": round(seconds, 1),
        "counts": dict(Counter(verdict.status for verdict in verdicts.values())),
        "checks": {
            name: {"rule": CHECKS[name][0], "status": v.status, "evidence": v.evidence}
            for name, v in verdicts.items()
        },
    }


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line; Mistake if it makes no sense."""
    parser = Parser(__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    parser.add_argument("--docs", metavar="FILE", default="")
    parser.add_argument("--data", metavar="DIR", type=Path)
    parser.add_argument("--only", metavar="A1,D3", default="")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--seeds", metavar="RUN_DIR", type=Path, nargs="+", default=[])
    options = parser.parse_args(arguments)
    options.only = [name for name in options.only.upper().split(",") if name]
    unknown = sorted(set(options.only) - set(CHECKS))
    if unknown:
        raise AuditError(f"--only {','.join(unknown)}: must be among {', '.join(ORDER)}")
    if options.docs and not Path(options.docs).is_file():
        raise AuditError(f"--docs {options.docs}: no such file")
    if options.data and not options.data.is_dir():
        raise AuditError(f"--data {options.data}: no such folder")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, write audit.json. Exit code 0, 1 (a FAIL) or 2 (a mistake in the command)."""
    start = time.perf_counter()
    try:
        options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        audit = Audit(options.run_dir, options.data, options.docs, options.full, options.seeds)
        with contextlib.closing(audit):
            verdicts = {}
            for name in options.only or ORDER:
                verdicts |= judge(audit, [name])
                print(table({name: verdicts[name]}), flush=True)
            summary = summary_of(audit, verdicts, time.perf_counter() - start)
            strange = f"NOT the repository's ({', '.join(audit.strange_files)})"
            whose = strange if audit.strange_files else "the repository's"
            print(f"script {short(audit.script_sha256)}, {whose}; val_bpb {summary['val_bpb']:.6f}")
            counts = [f"{summary['counts'].get(status, 0)} {status}" for status in STATUSES]
            print(f"{len(verdicts)} checks in {summary['seconds']:.0f} s: {', '.join(counts)}")
            if not options.only:
                text = (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode()
                audit.script.write_whole(audit.folder / "audit.json", text)
    except Mistake as error:
        return complain("audit.py", error)
    return int(summary["counts"].get("FAIL", 0) > 0)


if __name__ == "__main__":
    sys.exit(main())
