"""What runs show together: are they one experiment, mean and spread, and the comparison with a base."""

import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence

from reproducing.bases import Base
from runs import RunRecord
from systems.layout import as_set

MARGIN = 0.005  # nats per token by which a record must beat the standing one, at p < RECORD_P
RECORD_P = 0.01
SAME_TEXT = 1e-3  # relative difference of byte counts up to which two scores are of the same text


class ClaimError(ValueError):
    """Runs that make no claim together; one line."""


def check_alike(records: Sequence[RunRecord], mixed: bool = False) -> list[str]:
    """Make sure that runs are one experiment: same settings, script, data and evaluator, each seed once.

    Returns notes about what differs and is allowed to (hardware), or what cannot be told. With `mixed` every
    difference is a note. Raises `ClaimError` naming the two runs and the difference.
    """
    if not records:
        raise ClaimError("no runs")
    first, notes = records[0], []
    for other in records[1:]:
        for difference in _differences(first, other):
            text = f"{first.path} and {other.path}: {difference}"
            if not mixed:
                raise ClaimError(f"{text}; not one experiment (--mixed computes all the same)")
            notes.append(text)
    seeds = [record.seed for record in records]
    for record in records:
        if record.seed is None and len(records) > 1:
            raise ClaimError(f"{record.path}: tells no seed, and of several runs each needs its own")
        if seeds.count(record.seed) > 1:
            twice = [str(r.path) for r in records if r.seed == record.seed]
            raise ClaimError(f"seed {record.seed} {len(twice)} times ({', '.join(twice)}): each seed once")
    for key in ("device", "ranks", "torch", "train_shards"):
        values: dict[object, int] = {}
        for record in records:
            values.setdefault(record.environment.get(key), record.seed)
        if len(values) > 1:
            told = ", ".join(f"{value or 'not told'} (seed {seed})" for value, seed in values.items())
            notes.append(f"{key} differs: {told}")
    return notes


def _differences(one: RunRecord, two: RunRecord) -> Iterable[str]:
    """What makes two runs different experiments."""
    if one.final_stage != two.final_stage:
        yield f"scores of different evaluators: {one.final_stage}, {two.final_stage}"
    known = (record.compared_settings.items() for record in (one, two))
    mine, other = ({name: as_set(value) for name, value in values} for values in known)
    names = [n for n in {**mine, **other} if mine.get(n) != other.get(n)]
    if names:
        told = ", ".join(f"{n} {mine.get(n, 'not there')} and {other.get(n, 'not there')}" for n in names[:3])
        yield f"other settings: {told}" + (f" and {len(names) - 3} more" if names[3:] else "")
    for what, pick in SAME.items():
        a, b = pick(one), pick(two)
        if a is not None and b is not None and a != b:
            yield f"{what} {_short(a)} and {_short(b)}"


SAME: dict[str, Callable[[RunRecord], object]] = {
    "script": lambda record: record.script_sha256,
    "scripts of other sizes:": lambda record: record.environment.get("source_bytes"),
    "data": lambda record: record.data_sha256,
    "scored targets": lambda record: record.targets,
}


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1), None of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def welch(ours: Sequence[float], base: Sequence[float], margin: float = 0.0) -> dict[str, float] | None:
    """One-sided Welch test that our mean is below the base's by more than a margin: t, df, p.

    None where either side has fewer than two values or nothing varies. Raises ClaimError without scipy.
    """
    if min(len(ours), len(base)) < 2 or statistics.stdev(ours) + statistics.stdev(base) == 0:
        return None
    shifted = [value + margin for value in ours]
    try:
        from scipy import stats  # the audit, which needs other things of here, goes without it
    except ImportError:
        raise ClaimError("scipy is not installed: pip install -r requirements-dev.txt") from None
    with warnings.catch_warnings(action="ignore"):  # of a side whose scores are all the same
        found = stats.ttest_ind(shifted, base, equal_var=False, alternative="less")
    return {"t": float(found.statistic), "df": float(found.df), "p": float(found.pvalue)}


def compare(records: Sequence[RunRecord], base: Base) -> dict[str, object]:
    """Our runs against a base: differences in bits and nats, Welch's test, the rule of 0.005 nats.

    Where the base has other tokens than ours (another tokenizer), its nats per token are its bits per byte
    times our nats per bit. Raises `ClaimError` where the base scored another text, or is made of our runs.
    """
    for record in records:
        if (record.seed, record.val_loss, record.val_bpb) in base.scores:
            text = f"{record.path}: stands on both sides, in base {base.name} too (seed {record.seed})"
            raise ClaimError(f"{text}; compare it with others")
    ours, theirs = records[0].text_bytes, base.text_bytes
    if ours and theirs and abs(ours / theirs - 1) > SAME_TEXT:
        raise ClaimError(f"base {base.name}: scored {theirs:,.0f} bytes of text, these runs {ours:,.0f}")
    bpb, losses = [r.val_bpb for r in records], [r.val_loss for r in records]
    base_bpb = [score for _, _, score in base.scores]
    per_bit = statistics.fmean(r.nats_per_bit for r in records)
    base_losses = [loss for _, loss, _ in base.scores]
    converted = any(
        loss is None or not math.isclose(loss / score, per_bit, rel_tol=1e-4)
        for _, loss, score in base.scores
    )
    if converted:
        base_losses = [score * per_bit for score in base_bpb]
    mean, std = mean_and_std(base_bpb)
    gained = statistics.fmean(base_losses) - statistics.fmean(losses)
    test, with_margin = welch(bpb, base_bpb), welch(losses, base_losses, MARGIN)
    return {
        "base": base.name,
        "runs": len(records),
        "base_seeds": [seed for seed, _, _ in base.scores],
        "base_mean": mean,
        "base_std": std,
        "difference_bpb": statistics.fmean(bpb) - mean,
        "difference_nats": -gained,
        "nats_converted": converted,
        **(test or {"t": None, "df": None, "p": None}),
        "p_margin": with_margin and with_margin["p"],
        "margin_nats": MARGIN,
        "beats_margin": gained >= MARGIN and bool(with_margin) and with_margin["p"] < RECORD_P,
    }


# -- as text


def _figure(value: float | None, digits: int = 5) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _stage(record: RunRecord, stage: str) -> float | None:
    return record.stages.get(stage, {}).get("val_bpb")


def _limits(record: RunRecord) -> str:
    if record.legal is None:
        return "not told"
    return "yes" if record.legal else "NO: " + "; ".join(record.broken_limits or ["no artifact"])


def table(records: Sequence[RunRecord]) -> str:
    """Markdown: a row for each seed, then mean and sample standard deviation. Scores in bits per byte."""
    names = ["seed", "steps", "pre-quant", "quantised", "final", "bytes", "train s", "calibrate s", "eval s"]
    columns = [
        [float(r.steps) if r.steps else None for r in records],
        [_stage(r, "prequant") for r in records],
        [_stage(r, "quantised") for r in records],
        [r.val_bpb for r in records],
        [r.artifact_bytes for r in records],
        [r.train_seconds for r in records],
        [r.calibrate_seconds for r in records],
        [r.eval_seconds for r in records],
    ]
    digits = [0, 5, 5, 5, 0, 1, 2, 1]
    rows = [
        [str(record.seed), *(_figure(c[i], d) for c, d in zip(columns, digits, strict=True)), _limits(record)]
        for i, record in enumerate(records)
    ]
    if len(records) > 1:
        summaries = [mean_and_std(c) if None not in c else (None, None) for c in columns]
        rows += [
            [name, *(_figure(s[k], d) for s, d in zip(summaries, digits, strict=True)), ""]
            for k, name in enumerate(("**mean**", "sample sd"))
        ]
    lines = [[*names, "limits kept"], ["---"] * (len(names) + 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def headline(records: Sequence[RunRecord]) -> str:
    """One line: mean and spread in bits per byte and in nats per token."""
    parts = []
    for name, values in (
        ("val_bpb", [r.val_bpb for r in records]),
        ("val_loss", [r.val_loss for r in records]),
    ):
        mean, std = mean_and_std(values)
        spread = f", sample standard deviation {std:.5f}" if std is not None else ""
        parts.append(f"{name} {mean:.5f}{spread}")
    runs = f"{len(records)} seeds" if len(records) > 1 else f"one seed, {records[0].seed}"
    return f"{parts[0]}; {parts[1]} nats per token ({runs})"


def sentence(comparison: dict[str, object], title: str) -> str:
    """A comparison in words."""
    c = comparison
    spread = f" +/- {c['base_std']:.5f}" if c["base_std"] is not None else ""
    seeds = ", ".join(map(str, c["base_seeds"]))
    nats = f"{c['difference_nats']:+.5f} nats per token{' of ours' if c['nats_converted'] else ''}"
    against = f"Against {title} ({c['base_mean']:.5f}{spread}, seeds {seeds})"
    start = f"{against}: {c['difference_bpb']:+.5f} bits per byte, {nats}"
    if c["p"] is None:
        few = min(c["runs"], len(c["base_seeds"])) < 2
        why = "it takes two runs on each side" if few else "no run differs from another of its side"
        return f"{start}. No test: {why}."
    rule = "met" if c["beats_margin"] else "not met"
    return (
        f"{start}. One-sided Welch t = {c['t']:.3f}, df = {c['df']:.2f}, p = {c['p']:.3g}. "
        f"Rule of {MARGIN} nats at p < {RECORD_P}: {rule} (p = {c['p_margin']:.3g})."
    )


def audit_counts(record: RunRecord) -> dict[str, object] | None:
    """The verdict of a run's audit, and how many of its checks have each status; None without an audit."""
    return record.audit and {"verdict": record.audit.get("verdict"), **record.audit["counts"]}


def audit_words(counts: Mapping[str, object]) -> str:
    """`audit_counts` in words."""
    checks = ", ".join(f"{count} {status}" for status, count in counts.items() if status != "verdict")
    return f"{counts['verdict']} ({checks})"
