"""Is the number true and legal? Checks a finished run against the contest's rules and prints a table.

    python tools/audit.py RUN_DIR [--all] [--docs FILE] [--data DIR] [--only A1,D3] [--full]
                          [--seeds RUN_DIR ...] [--sample N] [--sample-seed SEED] [--retrain] [--blackbox]
                          [--fresh FILE ...] [--anchor] [--anchored LINE]
    python tools/audit.py --folder records/... [--script FILE] [--data DIR] [--fresh FILE ...]   # anybody's

What the run brought (script, artifact, ledger, logs, result, data) is judged; what judges is this repository.
Every check is a function that returns the figure that it rests on, or raises what is broken or missing. Each
says VERIFIED (made again here, by code that the run did not bring), CONSISTENT (its own records agree),
NOT CHECKED, or FAIL. audit.json in the run's folder keeps the table. Exit code 0 where all that carries the
number is VERIFIED, 1 (a FAIL), 2 (a mistake in the command, one line), 3 (it rests on the run's own word).

    --all         every check with what it found; without it those that pass are one line for each group
    --docs FILE   the documents (JSONL) the data were prepared from: their bytes are counted anew
    --data DIR    where the run's data lie now, if they have moved
    --full        evaluate the artifact again as a whole (S2), not on a few documents
    --sample N    recompute the scores of N documents (E1, E2), drawn by a seed that the run could not know;
                  without it all, or where that took the run minutes as many as two minutes allow
    --sample-seed the seed of an earlier audit, to draw its documents again
    --retrain     train the run again, which must give its artifact (W2)
    --seeds       the other runs of the same experiment: R4 compares their settings and scripts
    --only        these checks alone, nothing is written
    --folder DIR  a record folder without a ledger: its claims, logs and sources; with --data, the validation
                  shards, its script and artifact are asked in the box as well
    --script FILE which of its scripts made the score; default train_gpt.py
    --blackbox    ask the counted script from outside too (B1-B6), as is done where it is not the repository's
    --fresh FILE  documents (JSONL) that no training can have seen: B4 compares scores
    --anchor      print the line to be posted before the score is known, of a run that has made its artifact
    --anchored L  the line that was posted, or a file with it: R5 looks whether it is of this run
"""

import contextlib
import functools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from command import Mistake, Parser, complain, start

# What follows may not be installed: `command` says so.
# isort: split
from auditing import chain, recompute
from auditing import folder as record_folder
from auditing.checks import ORDER, asked_of
from auditing.run import (
    CHECKS,
    REPLAYED,
    ROOT,
    Audit,
    AuditError,
    Verdict,
    carry_out,
    printable,
    short,
)
from auditing.shown import folded, table_lines
from auditing.strange import boxed_verdicts
from auditing.verdict import EXIT_CODES, counted, outcome, worst
from runs import hashes_of_files
from scripts import sha256_of

EVIDENCE = 1000  # characters of what a check says that are shown


def judged(audit: Audit, names: Sequence[str]) -> Iterator[tuple[str, Verdict]]:
    """Carry out checks; those that need the run's own script in the box, where it is not the repository's."""
    strange = () if audit.known or audit.boxed else tuple(n for n in names if CHECKS[n].proof == REPLAYED)
    for name in names:
        found = boxed_verdicts(audit, strange)[name] if name in strange else carry_out(audit, name)
        yield name, Verdict(found.status, printable(found.evidence)[:EVIDENCE])


def judge(audit: Audit, names: Sequence[str] = tuple(ORDER)) -> dict[str, Verdict]:
    """The verdicts of some checks."""
    return dict(judged(audit, names))


def table(verdicts: Mapping[str, Verdict]) -> str:
    """All checks in full: name, status, rule, evidence."""
    return "\n".join(table_lines(verdicts.items(), in_full=True))


def summary_of(audit: Audit, verdicts: Mapping[str, Verdict], seconds: float, judge: Mapping) -> dict:
    """What audit.json holds."""
    verdict, headline = outcome(audit, verdicts)
    return {
        "run": audit.result.get("run"),
        "val_bpb": audit.result["val_bpb"],
        "verdict": verdict,
        "headline": headline,
        "script_sha256": audit.script_sha256,
        "repository_script_is_the_same": audit.known,
        "strange_files": audit.strange_files,
        "files": hashes_of_files(audit.folder, audit.result),
        "judge": judge,
        "full": audit.options.full,
        "seconds": round(seconds, 1),
        "counts": counted(verdicts),
        "checks": {
            name: {"rule": CHECKS[name].rule, "status": v.status, "evidence": v.evidence}
            for name, v in verdicts.items()
        },
    }


JUDGES = ("*.py", "tools/**/*.py", "harness/*.py", "systems/*.py", "dataprep/*.py", "dataprep/*.c")


def told_judge(audit: Audit) -> dict[str, object]:
    """Which code judged: its checksum, the commit it lies in, and which of its files are not as there."""
    paths = sorted(path for pattern in JUDGES for path in ROOT.glob(pattern))
    files = {path.relative_to(ROOT).as_posix(): sha256_of(path) for path in paths}
    git = functools.partial(audit.script.command_output, "git", "-C", str(ROOT))
    changed = {line.split(maxsplit=1)[-1] for line in git("status", "--porcelain").splitlines()}
    told = {"sha256": sha256_of(json.dumps(files).encode()), "commit": git("rev-parse", "HEAD")}
    return told | {"changed": sorted(changed & files.keys())}


def named_judge(told: Mapping) -> str:
    """The same in a line."""
    changed = f", CHANGED SINCE: {', '.join(told['changed'])}" * bool(told["changed"])
    return f"code {short(told['sha256'])} of commit {short(told['commit']) or 'unknown'}{changed}"


def parse_arguments(arguments: Sequence[str]) -> dict:
    """Command line: `run_dir`, `only` and the fields of `Options`. Mistake if it makes no sense."""
    parser = Parser(__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, nargs="?")
    parser.add_argument("--docs", metavar="FILE", default="")
    parser.add_argument("--data", metavar="DIR", type=Path)
    parser.add_argument("--only", metavar="A1,D3", default="")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--sample", metavar="N", type=int, default=0)
    parser.add_argument("--sample-seed", metavar="SEED", type=int)
    parser.add_argument("--retrain", action="store_true")
    parser.add_argument("--seeds", metavar="RUN_DIR", type=Path, nargs="+", default=[])
    parser.add_argument("--folder", metavar="DIR", type=Path)
    parser.add_argument("--script", metavar="FILE", default="")
    parser.add_argument("--blackbox", action="store_true")
    parser.add_argument("--fresh", metavar="FILE", type=Path, nargs="+", default=[])
    parser.add_argument("--anchor", action="store_true")
    parser.add_argument("--anchored", metavar="LINE", default="")
    options = vars(parser.parse_args(arguments))
    _check_subject(options)
    options["only"] = [name for name in options["only"].upper().split(",") if name]
    unknown = sorted(set(options["only"]) - set(CHECKS))
    if unknown:
        raise AuditError(f"--only {','.join(unknown)}: must be among {', '.join(ORDER)}")
    for name, paths in {"docs": filter(None, [options["docs"]]), "fresh": options["fresh"]}.items():
        for path in paths:
            if not Path(path).is_file():
                raise AuditError(f"--{name} {path}: no such file")
    if options["data"] and not options["data"].is_dir():
        raise AuditError(f"--data {options['data']}: no such folder")
    if options["sample"] < 0:
        raise AuditError(f"--sample {options['sample']}: must be at least 0 (0: by the time that it takes)")
    if options["sample_seed"] is not None and options["sample_seed"] < 0:
        raise AuditError(f"--sample-seed {options['sample_seed']}: must be at least 0")
    if options["anchored"]:
        options["anchored"] = chain.posted_line(options["anchored"])
    return options


RUN_OPTIONS = ("docs", "only", "all", "full", "sample", "sample_seed", "retrain", "blackbox")
RUN_OPTIONS += ("seeds", "anchor", "anchored")


def _check_subject(options: Mapping[str, object]) -> None:
    """Raise Mistake unless a run or a folder is given, with the options that are for it."""
    if (options["run_dir"] is None) == (options["folder"] is None):
        raise Mistake("give the folder of a run, or --folder DIR for a record folder")
    others = RUN_OPTIONS if options["folder"] else ("script",)
    given = [f"--{name.replace('_', '-')}" for name in others if options[name]]
    if given:
        raise Mistake(
            f"{', '.join(given)}: not for {'--folder' if options['folder'] else 'the folder of a run'}"
        )


def audited(audit: Audit, only: Sequence[str], in_full: bool = False) -> str:
    """Judge and print, group by group or check by check; write audit.json where all were asked for.

    Returns the verdict.
    """
    began, verdicts = time.perf_counter(), {}

    def kept() -> Iterator[tuple[str, Verdict]]:
        for name, verdict in judged(audit, only or asked_of(audit)):
            verdicts[name] = verdict
            yield name, verdict

    for line in table_lines(kept(), in_full or bool(only)):
        print(line, flush=True)
    seconds = time.perf_counter() - began
    strange = f"NOT the repository's ({', '.join(audit.strange_files)})"
    whose = "the repository's" if audit.known else printable(strange)[:EVIDENCE]
    print(folded(f"script {short(audit.script_sha256)}, {whose}"))
    code = told_judge(audit)
    print(folded(f"judged by {named_judge(code)}"))
    counts = ", ".join(f"{count} {status}" for status, count in counted(verdicts).items())
    print(f"{len(verdicts)} checks in {seconds:.0f} s: {counts}")
    if only:
        print("of these checks alone: the number rests on others too")
        return worst(verdicts)
    audit.unchanged()
    summary = summary_of(audit, verdicts, seconds, code)
    print(folded(summary["headline"]))
    text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    try:
        audit.script.write_whole(audit.folder / "audit.json", text.encode(errors="backslashreplace"))
    except audit.script.RunError as error:  # the verdict stands where its file cannot be written
        complain("audit.py", error)
    return summary["verdict"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, write audit.json. Exit code 0, 1, 2 or 3, as above."""
    try:
        options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        only, folder = options.pop("only"), options.pop("run_dir")
        record, script, in_full = (options.pop(name) for name in ("folder", "script", "all"))
        if record:
            return record_folder.main(record_folder.Case(record, script, options["data"], options["fresh"]))
        if options.pop("anchor"):
            print(chain.anchored_chain(folder))
            return 0
        with contextlib.closing(Audit(folder, **options)) as audit:
            audit.need_data()
            aside = recompute.in_background(audit) if "E2" in (only or ORDER) else contextlib.nullcontext()
            with aside:
                return EXIT_CODES[audited(audit, only, in_full)]
    except Mistake as error:
        return complain("audit.py", error)


if __name__ == "__main__":
    start(main)
