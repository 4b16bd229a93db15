"""Seeds, statistics, submission: a result that a reviewer believes at a glance.

    python tools/reproduce.py --preset pr1851 --seeds 42,314,1234 --base pr1855 --audit -- \\
        torchrun --standalone --nproc_per_node=8 train_gpt.py   # run what is missing, tell what it shows
    python tools/reproduce.py --from-logs runs/a runs/b logs/c.txt  # tell: of run folders, results, logs
    python tools/reproduce.py --check                # do submission.json and README agree with logs/ ?
    python tools/reproduce.py --check-folder DIR     # the same of a record folder, anybody's

Prints a Markdown table of the seeds, mean and sample standard deviation, and a one-sided Welch test against a
base: lower by chance? Both in bits per byte and in nats per token, with the contest's rule of 0.005 nats.
Runs whose settings, script, data or evaluator differ are refused, and the difference is named. The published
logs of the contest, up to PR #1868, are read too; what they do not tell is said.

    --seeds S,S     seeds to run, a folder each: OUT/seedS; finished ones are not run again
    --preset NAME   PRESET of the runs; other settings come from the environment, as always
    --out DIR       their folder; default runs/PRESET-SCRIPT, with the script's checksum
    --audit         judge each run with tools/audit.py
    --base B ...    a published system (%(bases)s), or runs and logs as for --from-logs
    --mixed         compute although the runs differ; never for a submission
    --submission    copy logs to logs/, write submission.json and the README's results from them
    --folder DIR    with --submission: write a folder of the contest, .../YYYY-MM-DD_Name, instead
    --name, --author, --github-id   what submission.json says there
    --json          a last line of JSON: mean, std, seeds, welch, runs, missing, notes

Exit code 0, 1 (a run or its audit failed, or a check found something), 2 (a mistake, one line), 130 (Ctrl-C).
"""

import argparse
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from command import Mistake, Parser, complain, start
from reproducing import checking, claim, folder, seeds, submission
from reproducing.bases import BASES, Base, base_of
from runs import ReadError, RunRecord, read

MISTAKES = (Mistake, ReadError, claim.ClaimError, seeds.SeedError, submission.SubmissionError, OSError)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line; `command` is what stands behind `--`."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    text = __doc__.replace("%(bases)s", ", ".join(BASES))
    parser = Parser(text)
    parser.add_argument("--from-logs", metavar="FILE", nargs="+", default=[])
    parser.add_argument("--seeds", metavar="S,S", default="")
    parser.add_argument("--preset", default="")
    parser.add_argument("--out", metavar="DIR", type=Path)
    parser.add_argument("--base", metavar="B", nargs="+", default=[])
    for flag in ("--folder", "--check-folder"):
        parser.add_argument(flag, metavar="DIR", type=Path)
    for flag in ("--audit", "--mixed", "--submission", "--json", "--check"):
        parser.add_argument(flag, action="store_true")
    for name in ("--name", "--author", "--github-id"):
        parser.add_argument(name, default="")
    options = parser.parse_args(arguments[:split])
    options.command = list(arguments[split + 1 :])
    options.seeds = [_seed(text) for text in options.seeds.split(",") if text]
    _check_options(options)
    return options


def _seed(text: str) -> int:
    if not text.strip().isdigit():
        raise Mistake(f"--seeds {text}: must be whole numbers, like 42,314,1234")
    return int(text)


def _check_options(options: argparse.Namespace) -> None:
    if options.check or options.check_folder:
        return
    if bool(options.from_logs) == bool(options.seeds):
        raise Mistake("give --from-logs FILE ..., or --seeds 42,314,1234 and a command behind --")
    if options.seeds and not options.command:
        raise Mistake("--seeds: needs the command behind --, like: -- python train_gpt.py")
    if options.from_logs:
        for name in ("preset", "out", "audit"):
            if getattr(options, name):
                raise Mistake(f"--{name}: is for runs, not for --from-logs")
    if len(set(options.seeds)) < len(options.seeds):
        raise Mistake(f"--seeds {','.join(map(str, options.seeds))}: each seed once")
    if options.mixed and options.submission:
        raise Mistake("--mixed: never for a submission")
    if options.folder:
        _check_folder_options(options)
    if options.submission and options.base and options.base[0] not in BASES:
        raise Mistake(f"--base {options.base[0]}: for a submission one of {', '.join(BASES)}")


def _check_folder_options(options: argparse.Namespace) -> None:
    """Raise `Mistake` or `SubmissionError` now, before a run is paid for."""
    if not options.submission:
        raise Mistake("--folder: is for --submission")
    for flag in ("author", "github_id"):
        if not getattr(options, flag).strip():
            raise Mistake(f"--{flag.replace('_', '-')}: missing, submission.json of a --folder must say it")
    for flag in ("name", "author", "github_id"):
        if not (told := getattr(options, flag)).isprintable():
            raise Mistake(f"--{flag.replace('_', '-')} {told!r}: must be one line that can be printed")
    folder.named(options.folder)


def find_base(names: Sequence[str]) -> Base | None:
    """A published base by its name, or the one that given runs and logs make."""
    if not names:
        return None
    if len(names) == 1 and names[0] in BASES:
        return BASES[names[0]]
    for name in names:
        if not Path(name).exists():
            raise Mistake(f"--base {name}: no file, and none of {', '.join(BASES)}")
    records = [read(name) for name in names]
    claim.check_alike(records)
    return base_of(records)


def summary_of(records: Sequence[RunRecord], notes: list[str], comparison: dict | None) -> dict:
    """What --json prints."""
    bpb = claim.mean_and_std([record.val_bpb for record in records])
    loss = claim.mean_and_std([record.val_loss for record in records])
    keys = ("path", "form", "seed", "steps", "val_bpb", "val_loss", "artifact_bytes", "code_bytes")
    keys += ("train_seconds", "calibrate_seconds", "eval_seconds", "legal", "broken_limits", "missing")
    keys += ("script_sha256", "data_sha256", "settings_sha256", "notices")
    runs = [{key: getattr(r, key) for key in keys} | {"audit": claim.audit_counts(r)} for r in records]
    return {
        "mean": bpb[0],
        "std": bpb[1],
        "mean_loss": loss[0],
        "std_loss": loss[1],
        "seeds": [record.seed for record in records],
        "welch": comparison,
        "runs": runs,
        "missing": missing_of(records),
        "notes": notes,
    }


def missing_of(records: Sequence[RunRecord]) -> list[str]:
    """What some of the sources do not tell."""
    return list(dict.fromkeys(name for record in records for name in record.missing))


def report(records: Sequence[RunRecord], notes: Sequence[str], comparison: dict | None, title: str) -> str:
    """Table and sentences, Markdown."""
    lines = [claim.table(records), "", claim.headline(records)]
    if comparison:
        lines.append(claim.sentence(comparison, title))
    audits = [f"seed {r.seed} {claim.audit_words(claim.audit_counts(r))}" for r in records if r.audit]
    lines += [f"Audit: {'; '.join(audits)}."] * bool(audits)
    missing = missing_of(records)
    lines += [f"Not told by these files: {', '.join(missing)}."] * bool(missing)
    return "\n".join([*lines, *(f"Note: {note}." for note in notes)])


def submit(records: Sequence[RunRecord], options: argparse.Namespace, command: str) -> None:
    """Publish the logs, then write submission.json and README from them; or write a record folder."""
    typed = {name: getattr(options, name) for name in ("name", "author", "github_id")}
    typed |= {"command": command, "base": "".join(options.base)}
    if options.folder:
        told = folder.write_folder(records, typed, options.folder)
        print(f"wrote {options.folder} ({told['track']})")
        if told["non_record"] and options.folder.resolve().parent.name == folder.RECORD_TRACK:
            reasons = "; ".join(told["non_record_reasons"])
            print(f"Note: no record ({reasons}), so its place is not {folder.RECORD_TRACK}.")
        return
    submission.check_submittable(records)
    root = seeds.ROOT
    published = submission.publish(records, root / "logs")
    typed["name"] = typed["name"] or f"train_gpt.py, preset {records[0].settings['PRESET']}"
    told = submission.write(published, typed, root)
    print(f"wrote submission.json ({told['track']}) and the README's results")


def check() -> int:
    """Compare submission.json and README with the logs that they name."""
    found = submission.disagreements()
    for line in found:
        print(line, file=sys.stderr)
    return int(bool(found))


def check_folder(path: Path) -> int:
    """Print what a record folder says of itself and whether it agrees; exit code."""
    findings = checking.check_folder(path)
    counts = Counter(finding.status for finding in findings)
    print(*findings, ", ".join(f"{counts[status]} {status}" for status in checking.STATUSES), sep="\n")
    return int(not checking.passes(findings))


def carry_out(options: argparse.Namespace) -> int:
    """Run or read, then tell; exit code."""
    if options.check:
        return check()
    if options.check_folder:
        return check_folder(options.check_folder)
    base = find_base(options.base)  # a mistake here should not cost the runs
    command = shlex.join(options.command)
    if options.seeds:
        experiment = seeds.plan(options.command, os.environ, options.preset)
        command = experiment.shown
        out = options.out or experiment.default_folder
        records = seeds.run_missing(experiment, out, options.seeds, options.audit)
    else:
        records = [read(name) for name in options.from_logs]
    notes = [f"{record.path}: {notice}" for record in records for notice in record.notices]
    notes += claim.check_alike(records, options.mixed)
    comparison = claim.compare(records, base) if base else None
    print(report(records, notes, comparison, base.title if base else ""))
    if options.submission:
        submit(records, options, command)
    if options.json:
        print(json.dumps(summary_of(records, notes, comparison), default=str))
    return int(options.audit and any(not r.audit or "FAIL" in r.audit["counts"] for r in records))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Exit code 0, 1 or 2."""
    try:
        return carry_out(parse_arguments(sys.argv[1:] if arguments is None else arguments))
    except MISTAKES as error:
        return complain("reproduce.py", error)
    except seeds.RunFailed as error:
        print(f"reproduce.py: {error}", file=sys.stderr)
        return 2 if error.code == 2 else 1
    except KeyboardInterrupt:
        print("reproduce.py: interrupted; the same command goes on with what is missing", file=sys.stderr)
        return 130


if __name__ == "__main__":
    start(main)
