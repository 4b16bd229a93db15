"""Checks R1-R4: the report."""

import contextlib
import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path

from auditing.records import AuditError, read_json, read_result
from auditing.run import RECORDS, Audit, check, require, short
from reproducing import checking
from runs import config_hash, felt_settings
from scripts import hash_told
from systems.layout import WITHOUT_EFFECT, as_set


@check("R1", "val_bpb = sum of nats / ln 2 / sum of bytes", RECORDS)
def r1_arithmetic(audit: Audit) -> str:
    """Recomputed in float64 from the ledger's sums and the byte counts of the data."""
    final = audit.result["final_stage"]
    stage = audit.result["stages"][final]
    nats, targets, size = stage["val_loss"] * stage["targets"], stage["targets"], stage["bytes"]
    source = "result.json's mean"
    if audit.evaluator != "standard":
        nats, targets, size, sums = _ledger_sums(audit)
        source = f"{sums:,} sums of the ledger"
    bits = nats / math.log(2) / size
    figures = {"val_bpb": bits, "val_loss": nats / targets}
    for name, value in figures.items():
        for told in (audit.result[name], stage[name]):
            require(math.isclose(told, value, rel_tol=1e-9), f"{name} {told:.9f}, recomputed {value:.9f}")
    same = (targets, size) == (stage["targets"], stage["bytes"])
    require(same, f"{targets:,} targets, {size:,} bytes recounted")
    return f"{bits:.8f} from {source}: {nats:.4f} nats, {size:,} bytes"


def _ledger_sums(audit: Audit) -> tuple[float, int, int, int]:
    """Nats, targets, bytes (of the data, not of the ledger) and the number of sums in the ledger."""
    scored = audit.records("score" if audit.adapted else "slide")
    spans = [span[-2:] for record in scored for span in record["spans"]]
    if audit.adapted:
        chunks = [chunk for record in audit.records("batch") for chunk in record["chunks"]]
        sums, targets = [chunk[0] for chunk in chunks], sum(chunk[2] for chunk in chunks)
    else:
        sums, targets = [record["loss_sum"] for record in scored], sum(count for _, count in spans)
    size = sum(int(audit.sidecar[first + 1 : first + count + 1].sum()) for first, count in spans)
    return math.fsum(sums), targets, size, len(sums)


@check("R2", "the script writes the result, all records agree", RECORDS)
def r2_records_agree(audit: Audit) -> str:
    """result.json, the last event, the log's last line, and submission.json where there is one."""
    size = len(audit.sources)  # the script that ran stands in the log
    finals = [event for event in audit.metrics if event["stage"] == "final"]
    require(len(finals) == 1, f"{len(finals)} final events")
    for key, value in finals[0].items():
        told = audit.result.get(key, value)
        require(key == "stage" or told == value, f"{key}: {told} in result.json, {value} in metrics.jsonl")
    lines = [line for line in audit.log.splitlines() if line.startswith("final val_bpb:")]
    shown = f"final val_bpb:{audit.result['val_bpb']:.6g} "
    require(bool(lines) and lines[-1].startswith(shown), f"the log says {(lines or ['nothing'])[-1][:40]}")
    legal = not audit.result["broken_limits"] and audit.result["artifact_bytes"] > 0
    require(audit.result["legal"] is legal, f"legal is {audit.result['legal']}, the limits say {legal}")
    path = audit.folder / "submission.json"
    if path.is_file():
        _submission_agrees(read_json(path), audit.result)
    also = ", submission.json" if path.is_file() else ""
    figure = f"val_bpb {audit.result['val_bpb']:.6f} in result.json, metrics.jsonl, log{also}"
    return f"{figure}; the log holds all {size} files of the script that ran"


def _submission_agrees(told: Mapping, result: Mapping) -> None:
    """Raise Failed where a submission.json tells other figures than the run beside which it lies."""
    seed = result["settings"]["SEED"]
    require("val_bpb" in told, "submission.json tells no val_bpb")
    of_seed = checking.figures_of_seed(checking.told_of(told, seed), result)
    parts = {"": checking.totals(told, result), f"seed {seed} ": of_seed}
    apart = [
        f"{part}{name} {str(value)[:40]}, not {right}"
        for part, figures in parts.items()
        for name, value, right in itertools.filterfalse(checking.same_figure, figures)
    ]
    require(not apart, f"submission.json says {'; '.join(apart)}")
    near = math.isclose(told["val_bpb"], result["val_bpb"], abs_tol=5e-6)  # as printed, 1.06 may be 1.0649
    require(near, f"submission.json says val_bpb {told['val_bpb']}, not {result['val_bpb']}")


@check("R3", "seed fixed before the run, no run hidden", RECORDS)
def r3_seeds(audit: Audit) -> str:
    """The seed stands in the log before the first step; other runs of the same experiment are disclosed."""
    settings = audit.log.partition("=" * 80)[0]
    found = re.search(r"^SEED=(\d+)", settings, re.M)
    seed = audit.result["settings"]["SEED"]
    logged = int(found[1]) if found else None
    require(logged == seed, f"seed {logged} in the log, {seed} in result.json")
    others = {
        path: other for path, other in _siblings(audit).items() if path.resolve() != audit.folder.resolve()
    }
    path = audit.folder / "submission.json"
    listed = {str(s) for s in read_json(path).get("seeds", [])} if path.is_file() else None
    hidden = sorted(
        str(r["settings"]["SEED"])
        for r in others.values()
        if listed and str(r["settings"]["SEED"]) not in listed
    )
    require(not hidden, f"submission.json does not list the runs with seeds {', '.join(hidden)}")
    scores = ", ".join(f"{r['settings']['SEED']}: {r['val_bpb']:.5f}" for r in list(others.values())[:8])
    same = (
        f"{len(others)} other runs of the same experiment beside it ({scores})"
        if others
        else "no other run beside it"
    )
    return f"seed {seed} in the log's head; {same}"


def _siblings(audit: Audit) -> dict[Path, dict]:
    """Results of the runs in the same parent folder that are of the same experiment, by folder.

    That is what changes a result: other words in harness/, which never counts, or other intervals of the log
    make no other experiment.
    """
    mine, found = _experiment(audit.result), {}
    for path in sorted(audit.folder.resolve().parent.glob("*/result.json")):
        with contextlib.suppress(AuditError):
            other = read_result(path)
            if _experiment(other) == mine:
                found[path.parent] = other
    return found


def _experiment(result: Mapping) -> tuple[dict, str, dict]:
    """What a result depends on, seed and data aside: settings, and checksums of the files that may count."""
    told = result["environment"]
    counted = {path: value for path, value in told["house_sha256"].items() if path.startswith("systems/")}
    return felt_settings(result["settings"]), told["source_sha256"], counted


@check("R4", "one configuration for all seeds", RECORDS)
def r4_one_configuration(audit: Audit) -> str:
    """Hash of the settings without the seed: in log and result, and in the runs of --seeds."""
    mine = config_hash(audit.result["settings"])
    script = audit.script_sha256
    logged = dict(
        re.findall(r"^([A-Z][A-Z0-9_]*)=(.*?)(?:    # default .*)?$", audit.log.partition("=" * 80)[0], re.M)
    )
    model = set(map(str.upper, audit.script.MODEL_SETTINGS))  # an evaluated artifact brings its own
    for name, value in audit.result["settings"].items():
        told = str(as_set(value))
        resumed = "resumed" in audit.result and name in WITHOUT_EFFECT
        same = name in model or resumed or logged.get(name) == told
        require(same, f"{name}={logged.get(name)} in the log, {told} in result.json")
    for folder in audit.options.seeds:
        other = read_result(folder / "result.json")
        differs = _difference(audit, other)
        require(not differs, f"{folder}: other settings ({', '.join(differs[:3])})")
        require(hash_told(other["environment"]) == script, f"{folder}: another script")
    count = len(audit.options.seeds) + 1
    return f"config {short(mine)}, script {short(script)}: {count} run{'s' * (count > 1)}"


def _difference(audit: Audit, other: Mapping) -> list[str]:
    """Settings of another run that its result depends on, and that are not the run's."""
    ours, theirs = (felt_settings(result["settings"]) for result in (audit.result, other))
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return [f"{name}={theirs.get(name)}" for name in names]
