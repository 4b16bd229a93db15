"""The record folder: what the folders of accepted records hold, made from finished runs, and only from them.

    README.md, submission.json      results, techniques, how to run it, compliance, credits; the claim
    train_gpt.py                    as it is counted: the script with the runs' settings in itself, compressed
    train_seedS.log                 one a seed, with the run's result (.json) and its audit (_audit.json)
    requirements.txt                what a run needs
    prepare_caseops_data.py with its modules, lossless_caps.py, tokenizers/   for CaseOps

Of the newest 15 accepted folders all have the fields of `REQUIRED` and `seeds` in submission.json, and 13 the
others of `EXPECTED`; 12 have val_bpb_std, 10 compliance and pytorch_version, 7 val_loss. Those of March name
no seeds.
"""

import dataclasses
import datetime
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from marked import write_whole
from reproducing import submission
from reproducing.seeds import ROOT
from reproducing.submission import BEGIN, CONTEST_DOCUMENTS, END, SubmissionError
from reproducing.techniques import credits, technique_table
from runs import RunRecord
from scripts import sha256_of

REQUIRED = ("name", "author", "github_id", "date", "val_bpb")
EXPECTED = (*REQUIRED, "seeds", "track", "seed_results", "hardware")
NAME = re.compile(r"(\d{4}-\d\d-\d\d)_(\S+)")
CONDITIONS = "https://github.com/openai/parameter-golf/issues/1017"
EVIDENCE = (".log", ".json", "_audit.json")
RECORD_TRACK = "track_10min_16mb"  # the folder of the contest's repository for records
# The checks of the audit that a reviewer looks for: C1 to C4, the number made again, limits and data.
SHOWN_CHECKS = ("D1", "D2", "D3", "D4", "E1", "E2", "W1", "W2", "W3", "T1", "T2", "T5", "D6", "S1", "S2")
SHOWN_CHECKS += ("A1", "A2", "A3", "R5")


def named(folder: Path) -> tuple[str, str]:
    """Date and name that a folder's name holds. Raises `SubmissionError` where it is not YYYY-MM-DD_Name."""
    found = NAME.fullmatch(folder.resolve().name)
    if found and not found[2].isprintable():
        raise SubmissionError(f"{str(folder)!r}: its name must be of letters that can be printed")
    try:
        return datetime.date.fromisoformat(found[1]).isoformat(), found[2]
    except (TypeError, ValueError):
        raise SubmissionError(f"{folder}: its name must be YYYY-MM-DD_Name, a date and a word") from None


def write_folder(records: Sequence[RunRecord], typed: Mapping, folder: Path) -> dict[str, object]:
    """Write the record folder of finished runs, or write it again: of its README only what was generated.

    Returns the submission. Raises `SubmissionError`, before anything is written, where runs may not be
    submitted, their counted code differs, something is missing, or the folder is of something else.
    """
    date, name = named(folder)
    submission.check_submittable(records)
    parts = parts_of(records)
    typed = {**typed, "date": date, "name": typed["name"] or name.replace("_", " ")}
    _refuse_others(records, folder, parts)
    folder.mkdir(parents=True, exist_ok=True)
    readme = folder / "README.md"
    if not readme.exists():  # first, for it says whose the folder is, also where the writing is interrupted
        write_whole(readme, f"# {typed['name']}\n\n{BEGIN}{END}\n".encode())
    for part, data in parts.items():
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder / part, data)
    published = submission.publish(records, folder, _log_name, ".log")
    evidence = (path.name for path in sorted(folder.glob("train_seed*")))
    typed["files"] = dict.fromkeys([*parts, *evidence])
    return submission.write(published, typed, folder, claim_of, page)


def claim_of(records: Sequence[RunRecord], typed: Mapping, folder: Path) -> dict[str, object]:
    """What submission.json says: the project's claim, and checksums of the files that `typed` names."""
    files = {name: folder / name for name in typed["files"]}
    sums = {name: sha256_of(path) if path.is_file() else None for name, path in files.items()}
    return {**submission.submission(records, typed, folder), "files": sums}


def _log_name(record: RunRecord) -> str:
    return f"train_seed{record.seed}"


def _refuse_others(records: Sequence[RunRecord], folder: Path, parts: Mapping) -> None:
    """Raise `SubmissionError` where a folder holds files of something else.

    Without a README of ours these are all that would be written over, with one the logs that would stay.
    """
    if (folder / "README.md").exists():
        submission.with_block(folder / "README.md", "")
    else:
        evidence = [f"{_log_name(record)}{end}" for record in records for end in EVIDENCE]
        for name in ("submission.json", *parts, *evidence):
            if (folder / name).exists():
                raise SubmissionError(f"{folder / name}: not written by --folder; choose another folder")
    for log in sorted(folder.glob("train_seed*.log")):
        if log.stem not in map(_log_name, records):
            raise SubmissionError(f"{log}: of none of these runs; remove it, or choose another folder")


# -- the files


def parts_of(records: Sequence[RunRecord]) -> dict[str, bytes]:
    """The files that are no evidence, by their paths in the folder."""
    first = records[0]
    parts = {"train_gpt.py": counted_script(records), "requirements.txt": requirements(first).encode()}
    if first.settings["CASEOPS_ENABLED"]:
        sources = [ROOT / "prepare_caseops_data.py", ROOT / "lossless_caps.py"]
        sources += sorted(path for path in (ROOT / "dataprep").iterdir() if path.suffix in (".py", ".c"))
        sources += [
            ROOT / "systems" / name for name in ("__init__.py", "console.py", "early.py", "layout.py")
        ]
        parts |= {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in sources}
        tokenizer = tokenizer_of(first)
        parts[f"tokenizers/{tokenizer.name}"] = tokenizer.read_bytes()
    return parts


def counted_script(records: Sequence[RunRecord]) -> bytes:
    """The one script that all runs counted. Raises `SubmissionError` where there is none, or several."""
    codes = {}
    for record in records:
        path = record.path / "train_gpt.packed.py"
        if not path.is_file():
            raise SubmissionError(
                f"{record.path}: holds no {path.name}; --folder needs the runs' own folders"
            )
        codes[record.path] = path.read_bytes()
        if len(codes[record.path]) != record.code_bytes:
            told = f"has {len(codes[record.path])} bytes, the result says {record.code_bytes}"
            raise SubmissionError(f"{path}: {told}; not the code that was counted")
    first = records[0].path
    for path, code in codes.items():
        if code != codes[first]:
            raise SubmissionError(f"{first} and {path}: their train_gpt.packed.py differ, must be the same")
    return codes[first]


def requirements(record: RunRecord) -> str:
    """The project's requirements, with the version of torch that ran."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    version = record.environment.get("torch", "").partition("+")[0]  # +cu128 is of another index
    return re.sub(r"(?m)^torch==.*$", f"torch=={version}", text) if version else text


def tokenizer_of(record: RunRecord) -> Path:
    """The tokenizer of a run's data. Raises `SubmissionError` where they are gone, or others by now."""
    from systems.plain_text import tokenizer_file  # here: it takes seconds, and no other use needs torch
    from train_gpt import Config, DataError

    known = {field.name for field in dataclasses.fields(Config)}
    told = {name.lower(): value for name, value in record.settings.items()}
    cfg = Config(**{name: value for name, value in told.items() if name in known})
    manifest = cfg.data_folder / "manifest.json"
    if not manifest.is_file() or sha256_of(manifest) != record.data_sha256:
        raise SubmissionError(
            f"{manifest}: not there, or of other data than {record.path}, whose tokenizer is due"
        )
    try:
        path = tokenizer_file(cfg)
    except DataError as error:
        raise SubmissionError(str(error)) from None
    if not path.is_file():
        raise SubmissionError(f"{path}: no such file, the tokenizer of {record.path}")
    return path


# -- README.md


def page(records: Sequence[RunRecord], told: Mapping) -> str:
    """The generated part of the README."""
    settings = records[0].settings
    sections = {
        "Results": submission.readme_block(records, told).rstrip().splitlines(),
        "Techniques": technique_table(settings),
        "How to run it": _how_to_run(records[0], told),
        "Compliance": _compliance(records),
        "Credits": credits(settings),
        "Files": _files(records[0].path.parent, told),
    }
    texts = ["\n".join([f"## {title}", "", *lines]) for title, lines in sections.items()]
    size = f"{told['bytes_total']:,} bytes"
    head = f"**val_bpb {told['val_bpb']:.5f}** | **{size}** | {told['hardware']}"
    return "\n\n".join([head, *texts]) + "\n"


def _how_to_run(record: RunRecord, told: Mapping) -> list[str]:
    """Commands that give this result, in this folder."""
    ranks = record.environment.get("ranks")
    run = f"torchrun --standalone --nproc_per_node={ranks}" if ranks != 1 else "python"
    data = "DATA_PATH=DIR " if record.settings["CASEOPS_ENABLED"] else "DATA_PATH=DIR TOKENIZER_PATH=MODEL "
    lines = ["pip install -r requirements.txt"]
    if record.settings["CASEOPS_ENABLED"]:
        tokenizer = next((name for name in told["files"] if name.startswith("tokenizers/")), "MODEL")
        documents = told["validation"]["documents"]
        prepare = f"--docs FILE --sp {tokenizer} --val-docs {documents} --out DIR"
        if (documents, record.settings["VOCAB_SIZE"]) == (CONTEST_DOCUMENTS, 8192):
            prepare, data = "--download", ""  # ready-made, at the place where the script looks
        lines.append(f"python prepare_caseops_data.py {prepare}")
    lines += [f"SEED={seed} {data}{run} train_gpt.py" for seed in told["seeds"]]
    attention = record.environment.get("attention")
    return [
        "```bash",
        *lines,
        "```",
        "",
        "`train_gpt.py` is the counted file. The settings of the runs are constants of it; seed and places "
        "(`SEED`, `DATA_PATH`, `TOKENIZER_PATH`, `ARTIFACT_DIR`) are read from the environment. "
        f"Attention: {attention}" + (", installed separately." if attention in ("fa3", "fa4") else "."),
    ]


def _compliance(records: Sequence[RunRecord]) -> list[str]:
    """What the audits found about the contest's conditions, limits and data."""
    audits = {record.seed: record.audit["checks"] for record in records if record.audit}
    if not audits:
        return ["Not audited."]
    rules = {name: check["rule"] for checks in audits.values() for name, check in checks.items()}
    rows = []
    for name in filter(rules.get, SHOWN_CHECKS):
        found = [
            f"seed {s}: {c[name]['status']}, {c[name]['evidence']}" for s, c in audits.items() if name in c
        ]
        rows.append(f"| {name} | {rules[name]} | {'<br>'.join(found).replace('|', chr(92) + '|')} |")
    return [
        f"C1 to C4 are the conditions of [issue #1017]({CONDITIONS}). All checks of a seed are in its "
        "`train_seedS_audit.json`.",
        "",
        "| check | rule | found |",
        "| --- | --- | --- |",
        *rows,
    ]


def _files(folder: Path, told: Mapping) -> list[str]:
    """The files that are no evidence, with their bytes. The contest counts train_gpt.py and the model."""
    names = [name for name in told["files"] if not name.startswith("train_seed")]
    sizes = {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}
    return [
        f"* `{name}`: {size:,} bytes, {'' if name == 'train_gpt.py' else 'not '}counted"
        for name, size in sizes.items()
    ]
