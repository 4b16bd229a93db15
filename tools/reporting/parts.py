"""What a report says in words and tables: scores and their meaning, sizes, times, settings, audit."""

import contextlib
from collections.abc import Mapping, Sequence

from reporting.figures import octaves
from reporting.page import Raw, absent, details, table, text
from reporting.run import GROUPS, Missing, Run
from reproducing.submission import CONTEST_DOCUMENTS
from runs import SIZE_LIMIT
from systems.layout import as_set
from train_gpt import Config

RECORD = Config.preset  # whose settings are the defaults
LOOKS = {"VERIFIED": "good", "FAIL": "bad"}  # verdict of an audit -> how it looks
SCORED = {  # stage -> what it scored
    "ttt": "the artifact's model, which learns from each part of a document once that is scored,",
    "sliding": "the artifact's model, by sliding windows,",
    "quantised": "the artifact's model",
    "prequant": "the model in full precision, before it was quantised,",
}


def title(run: Run) -> str:
    """What ran, in a few words: the preset, its seed, and the name of the run."""
    preset, seed = run.record.settings.get("PRESET"), run.record.seed
    told = [f"PRESET={preset}" if preset else "", "" if seed is None else f"seed {seed}"]
    told = [word for word in told if word and word.replace("PRESET=", "") != run.name]
    return f"{', '.join(told)} ({run.name})" if told else run.name


def head(runs: Sequence[Run]) -> str:
    """The top of the page: what ran, the score, and of several runs the table of all scores."""
    first = runs[0]
    if len(runs) == 1:
        return f"<h1>{text(title(first))}</h1>{headline(first)}"
    same = len({run.scored_text for run in runs if run.finished}) == 1
    said = f"the best is {first.name}" if same else "their scores are of different texts, or there are none"
    return f"<h1>{len(runs)} runs: {text(said)}</h1>{score(first) * same}{ranking(runs)}"


def headline(run: Run) -> str:
    """The score of a run and what it means, what the audit says of it, and whose text was scored."""
    if not run.finished:
        return f'<p class="soft">{text(run.state)}</p>'
    audit = run.record.audit or {}
    verdict = audit.get("headline") or f"not audited: python tools/audit.py {run.folder or 'RUN_DIR'}"
    return (
        f'{score(run)}<p class="{LOOKS.get(audit.get("verdict"), "soft")}">{text(verdict)}</p>'
        f'<p class="soft">{text(run.state)}</p>'
    )


def score(run: Run) -> str:
    """The score in large type, and what it means."""
    val_bpb, stage = run.record.val_bpb, run.record.final_stage
    meaning = (
        f"The bits that {SCORED.get(stage, stage)} needs for a byte of the validation text. As it is, a byte "
        f"has 8: an ideal coder would shrink the text to {val_bpb / 8:.1%} of its size. Lower is better."
    )
    large = f'<p class="score"><b>{val_bpb:.5f}</b> <small>bits per byte</small></p>'
    return f"{large}<p>{text(meaning)} {note(run)}</p>"


def note(run: Run) -> str:
    """What keeps a score from being compared with the contest's."""
    documents = run.record.stages[run.record.final_stage].get("documents")
    if documents in (None, CONTEST_DOCUMENTS):
        return ""
    least = f"Not the contest's validation set: {documents:,} documents, not {CONTEST_DOCUMENTS:,}."
    return f"<b>{text(least)}</b>"


def ranking(runs: Sequence[Run]) -> str:
    """Several runs, one a row, in their order: scores, and how far each is behind the first."""
    stages = [stage for stage in ("prequant", "quantised", "sliding") if _any(runs, stage)]
    head = ["run", "val_bpb", "behind the first", *stages]
    head += ["artifact, bytes", "training, s", "evaluation, s", "limits kept", "audit"]
    rows = [
        [
            Raw(f"{number}. {_key(number - 1)}{text(run.name)}"),
            f"{run.record.val_bpb:.5f}" if run.finished else "-",
            _difference(run, runs[0]),
            *(_score(run, stage) for stage in stages),
            _count(run.record.artifact_bytes),
            _seconds(run.record.train_seconds),
            _seconds(run.record.eval_seconds),
            _legal(run),
            _verdict(run),
        ]
        for number, run in enumerate(runs, 1)
    ]
    told = "".join(f"<p><b>{text(run.name)}</b>: {text(run.state)}</p>" for run in runs if run.told)
    return f'<div class="box ranking">{table(head, rows)}{told}</div>'


def columns(runs: Sequence[Run]) -> list[str]:
    """How tables call the runs."""
    return [run.label for run in runs] if len(runs) > 1 else ["this run"]


def _verdict(run: Run) -> str:
    verdict = (run.record.audit or {}).get("verdict")
    return Raw(f'<span class="{LOOKS.get(verdict, "soft")}">{text(verdict)}</span>') if verdict else "-"


def overview(runs: Sequence[Run]) -> str:
    """One column a run: its scores, sizes, times, and what it was made of."""

    def row(name: str, value: object) -> list[object]:
        return [name, *(value(run) for run in runs)]

    stages = [stage for stage in ("prequant", "quantised", "sliding", "ttt") if _any(runs, stage)]
    ranked = [  # of several runs `ranking` has these
        row("final val_bpb", lambda r: f"{r.record.val_bpb:.5f}" if r.finished else "-"),
        *(row(f"val_bpb {stage}", lambda r, stage=stage: _score(r, stage)) for stage in stages),
        row("artifact, bytes", lambda r: _count(r.record.artifact_bytes)),
        row("training, s", lambda r: _seconds(r.record.train_seconds)),
        row("final evaluation, s", lambda r: _seconds(r.record.eval_seconds)),
        row("limits kept", _legal),
    ]
    rows = [
        *(ranked if len(runs) == 1 else []),
        row("final val_loss", lambda r: r.record.val_loss if r.finished else "-"),
        row("bytes left of 16,000,000", lambda r: _count(_left(r))),
        row("code, bytes", lambda r: _count(r.record.code_bytes)),
        row("steps", lambda r: _count(r.record.steps)),
        row("calibration, s", lambda r: _seconds(r.record.calibrate_seconds)),
        row("parameters", lambda r: _count(r.parameters)),
        row("device", lambda r: r.record.environment.get("device", "-")),
        row("seed", lambda r: "-" if r.record.seed is None else r.record.seed),
        row("ended", lambda r: r.ended),
        row("commit", lambda r: (r.record.environment.get("commit") or "-")[:12]),
        row("script, SHA-256", lambda r: (r.record.script_sha256 or "-")[:12]),
        row("data, SHA-256", lambda r: (r.record.data_sha256 or "-")[:12]),
    ]
    several = len(runs) > 1
    head = ["", *(Raw(_key(i) * several + text(name)) for i, name in enumerate(columns(runs)))]
    rows = [row for row in rows if any(cell != "-" for cell in row[1:])]
    return f'<div class="box{" full" * several} runs">{table(head, rows)}</div>'


def _key(number: int) -> str:
    return f'<span class="key" style="background:var(--c{number % 8 + 1})"></span>'


def _any(runs: Sequence[Run], stage: str) -> bool:
    return any(stage in run.record.stages for run in runs)


def _score(run: Run, stage: str) -> str:
    return f"{run.record.stages[stage]['val_bpb']:.5f}" if stage in run.record.stages else "-"


def _difference(run: Run, first: Run) -> str:
    if run is first or not (run.finished and first.finished):
        return "-"
    if run.scored_text != first.scored_text:
        return "other text"
    return f"{run.record.val_bpb - first.record.val_bpb:+.5f}"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _left(run: Run) -> int | None:
    return run.record.artifact_bytes and SIZE_LIMIT - run.record.artifact_bytes


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _legal(run: Run) -> Raw:
    if run.record.legal:
        return Raw('<span class="good">yes</span>')
    return Raw('<span class="bad">no</span>' if run.record.broken_limits else "-")


def stage_rows(run: Run) -> str:
    """Every stage of a run with its figures."""
    keys = ("val_loss", "val_bpb", "documents", "targets", "seconds")
    rows = [[name, *(score.get(key, "-") for key in keys)] for name, score in run.record.stages.items()]
    return details(f"all stages of {run.label}", table(["stage", *keys], rows))


def seconds_rows(runs: Sequence[Run]) -> str:
    """Seconds of every stage, of all runs."""
    names = list(dict.fromkeys(name for run in runs for name in run.record.seconds))
    rows = [[name, *(_seconds(run.record.seconds.get(name)) for run in runs)] for name in names]
    return details("all seconds", table(["stage", *columns(runs)], rows))


def byte_rows(runs: Sequence[Run]) -> str:
    """Bytes of each group, of the runs whose artifact is there."""
    found: list[tuple[str, Mapping[str, int]]] = []
    for name, run in zip(columns(runs), runs, strict=True):
        with contextlib.suppress(Missing):
            found.append((name, run.byte_groups))
    rows = [[group, *(f"{groups[group]:,}" for _, groups in found)] for group in GROUPS]
    rows.append(["all", *(f"{sum(groups.values()):,}" for _, groups in found)])
    return table(["", *(name for name, _ in found)], rows)


def error_rows(run: Run) -> str:
    """Error of every matrix."""
    rows = [
        ["embedding" if error.layer is None else error.layer, error.role, f"{100 * error.error:.2f}"]
        for error in run.matrix_errors
    ]
    content = table(["layer", "matrix", "% of norm"], rows)
    if run.weighted_errors:
        weighted = [[name, f"{error:.4g}"] for name, error in run.weighted_errors.items()]
        content += table(["matrix", "GPTQ's tr(E H Eᵀ)"], weighted)
    return details("all matrices", content)


def gain_rows(run: Run) -> str:
    """Mean gain of each octave of lengths."""
    lengths, before, after = run.gains
    counts = [
        int(((lengths >= at / 2**0.5) & (lengths < at * 2**0.5)).sum()) for at in octaves(lengths, before)[0]
    ]
    columns = [octaves(lengths, values)[1] for values in (before, after, before - after)]
    rows = []
    for i, at in enumerate(octaves(lengths, before)[0]):
        low, high = round(at / 2**0.5), round(at * 2**0.5) - 1
        rows.append([f"{low:,} to {high:,}", counts[i], *(f"{column[i]:.4f}" for column in columns)])
    return details(
        f"means of {run.label}", table(["tokens", "documents", "quantised", "adapted", "gain"], rows)
    )


def audit_table(run: Run, folded: bool) -> str:
    """The verdicts of tools/audit.py, open or folded away."""
    audit = run.record.audit
    if not audit:
        reason = run.record.audit_doubt or "no audit.json"
        return absent(f"Audit of {run.label}", f"{reason}: python tools/audit.py {run.folder or 'RUN_DIR'}")
    rows = [
        [
            name,
            Raw(f'<span class="{LOOKS.get(check["status"], "soft")}">{text(check["status"])}</span>'),
            check["rule"],
            check["evidence"],
        ]
        for name, check in audit["checks"].items()
    ]
    counts = ", ".join(f"{count} {status}" for status, count in audit["counts"].items())
    shown = table(["check", "verdict", "rule", "evidence"], rows, numbers=False)
    title = f"{run.name}: {counts}"
    inner = details(title, shown) if folded else f"<b>{text(title)}</b>{shown}"
    return f'<div class="box full audit">{inner}</div>'


def settings_table(runs: Sequence[Run], presets: Mapping[str, Mapping[str, object]]) -> str:
    """Settings in which the runs differ, those that are not their preset's, and others.

    `presets`: the settings of each by its name; a run that names none is compared with the record.
    """
    known = [{"SEED": run.record.seed} | run.record.compared_settings for run in runs]
    own = [name if (name := run.record.settings.get("PRESET")) in presets else RECORD for run in runs]
    names = [name for name in dict.fromkeys(name for told in known for name in told) if name != "PRESET"]

    def away(name: str, bases: Sequence[str]) -> bool:
        """Whether a run tells of another value than its base has; published ones have names of their own."""
        pairs = ((told.get(name), presets[base].get(name)) for told, base in zip(known, bases, strict=True))
        return any(None not in pair and pair[0] != pair[1] for pair in pairs)

    def rows(chosen: Sequence[str], bases: Sequence[str]) -> str:
        """Values of the runs and of what they are compared with."""
        sets = [*known, *(presets[base] for base in bases)]
        cells = [[Raw(f"<code>{n}</code>"), *(_plain(one.get(n)) for one in sets)] for n in chosen]
        titles = ["setting", *columns(runs), *(f"PRESET={base}" for base in bases)]
        return table(titles, cells, numbers=False)

    bases = [*dict.fromkeys(own)]
    differing = [n for n in names if len({told[n] for told in known if told.get(n) is not None}) > 1]
    rest = [n for n in names if n not in differing]
    changed = [n for n in rest if away(n, own)]
    others = [n for n in rest if n not in changed and away(n, [RECORD] * len(runs))]
    shown = [f"<b>Settings in which the runs differ</b>{rows(differing, bases)}"] * bool(differing)
    if changed:
        shown += [f"<b>Settings that are not those of the preset</b>{rows(changed, bases)}"]
    elif rest:
        shown += [
            f"All {'other ' * bool(differing)}settings are those of PRESET={text(', PRESET='.join(bases))}."
        ]
    if others:
        shown += [details(f"{len(others)} settings that make up the preset", rows(others, [RECORD]))]
    return "".join(f'<div class="box full">{part}</div>' for part in shown) or absent(
        "Settings", "none is known"
    )


def _plain(value: object) -> object:
    return "-" if value is None else as_set(value)
