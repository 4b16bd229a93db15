"""The page: one HTML file that needs nothing else, readable on a phone, light and dark."""

import html
from collections.abc import Mapping, Sequence

from reporting.figures import COLOURS, octaves
from reporting.run import GROUPS, Missing, Run
from reproducing.submission import CONTEST_DOCUMENTS
from runs import SIZE_LIMIT
from systems.layout import as_set

CSS = """
:root{color-scheme:light dark;--bg:#ffffff;--panel:#f6f8fa;--good:#1a7f37;--bad:#cf222e;LIGHT}
@media (prefers-color-scheme:dark){:root{--bg:#0d1117;--panel:#151b23;--good:#3fb950;--bad:#f85149;DARK}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1320px;padding:12px;background:var(--bg);color:var(--ink);
 font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.45rem;margin:.3em 0}h2{font-size:1.15rem;margin:1.6em 0 .5em}
p{margin:.4em 0;max-width:75ch}.soft{color:var(--soft)}
.grid{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr))}
figure,.box{margin:0;padding:10px;min-width:0;background:var(--panel);border:1px solid var(--line)}
figure,.box{border-radius:8px}.full{grid-column:1/-1}.absent{align-self:start}
.runs td:first-child,.runs th:first-child{position:sticky;left:0;background:var(--panel)}
figure svg{display:block;width:100%;max-width:560px;height:auto;margin:0 auto}
figure svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif!important}
figcaption{color:var(--soft);font-size:.86rem;margin-top:6px}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:4px 10px 4px 0;border-bottom:1px solid var(--line);vertical-align:top}
td.n,th.n{text-align:right;white-space:nowrap}th{vertical-align:bottom}tr:last-child td{border-bottom:0}
.key{display:inline-block;width:.75em;height:.75em;border-radius:2px;margin-right:.4em}
.good{color:var(--good)}.bad{color:var(--bad)}
summary{cursor:pointer;color:var(--soft);font-size:.88rem;margin-top:6px}
details table{margin-top:6px}code{font-size:.88em}
@media (max-width:560px){td,th{padding-right:8px}
.audit tbody,.audit tr,.audit td{display:block}.audit th{display:none}.audit td{border:0;padding:1px 0}
.audit tr{border-bottom:1px solid var(--line);padding:6px 0}.audit td:nth-child(4){color:var(--soft)}
.audit td:nth-child(-n+2){display:inline-block;margin-right:.6em}}
"""


def style() -> str:
    """The style sheet with both sets of colours."""
    sets = ["".join(f"--{n}:{pair[i]};" for n, pair in COLOURS.items()) for i in (0, 1)]
    return CSS.replace("LIGHT", sets[0]).replace("DARK", sets[1]).strip()


def text(value: object) -> str:
    """A value of the page, safe and short."""
    shown = f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)
    return html.escape(shown)


def table(head: Sequence[object], rows: Sequence[Sequence[object]], numbers: bool = True) -> str:
    """A table; columns but the first are numbers unless told otherwise. A cell may be ready-made (`Raw`)."""

    def cell(tag: str, column: int, value: object) -> str:
        kind = ' class="n"' if column and numbers else ""
        return f"<{tag}{kind}>{value if isinstance(value, Raw) else text(value)}</{tag}>"

    def line(tag: str, row: Sequence[object]) -> str:
        return "<tr>" + "".join(cell(tag, column, value) for column, value in enumerate(row)) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return f'<div class="wide"><table>{line("th", head)}{body}</table></div>'


class Raw(str):
    """Ready-made HTML."""


def details(title: str, content: str) -> str:
    """A part that is folded away."""
    return f"<details><summary>{text(title)}</summary>{content}</details>"


def figure(svg: str, name: str, caption: str, extra: str = "") -> str:
    """A picture with its caption; `name` is what a screen reader says."""
    labelled = svg.replace('role="img"', f'role="img" aria-label="{text(name)}"', 1)
    return f"<figure>{labelled}<figcaption>{caption}</figcaption>{extra}</figure>"


def absent(what: str, reason: str) -> str:
    """In the place of a part that a run lacks."""
    return f'<div class="box absent"><b>{text(what)}</b><p class="soft">Missing: {text(reason)}.</p></div>'


# -- parts


def title(run: Run) -> str:
    """What ran, in a few words: the preset, its seed, and the name of the run."""
    preset, seed = run.record.settings.get("PRESET"), run.record.seed
    told = [f"PRESET={preset}" if preset else "", "" if seed is None else f"seed {seed}"]
    told = [word for word in told if word and word.replace("PRESET=", "") != run.label]
    return f"{', '.join(told)} ({run.label})" if told else run.label


def headline(run: Run) -> str:
    """The verdict on a run: its score, what the audit says of it, and whose text was scored."""
    if not run.finished:
        return f'<p class="soft">{text(run.state)}</p>'
    record, audit = run.record, run.record.audit or {}
    verdict = audit.get("headline") or f"not audited: python tools/audit.py {run.folder or 'RUN_DIR'}"
    look = {"VERIFIED": "good", "FAIL": "bad"}.get(audit.get("verdict"), "soft")
    documents = record.stages[record.final_stage].get("documents")
    note = ""
    if documents not in (None, CONTEST_DOCUMENTS):
        note = f" Not the contest's validation set: {documents:,} documents, not {CONTEST_DOCUMENTS:,}."
    return (
        f"<p><b>{record.val_bpb:.5f} bits per byte</b> ({text(record.final_stage)}).{text(note)}</p>"
        f'<p class="{look}">{text(verdict)}</p><p class="soft">{text(run.state)}</p>'
    )


def overview(runs: Sequence[Run]) -> str:
    """One column a run: its scores, sizes, times, and what it was made of."""

    def row(name: str, value: object) -> list[object]:
        return [name, *(value(run) for run in runs)]

    stages = [stage for stage in ("prequant", "quantised", "sliding", "ttt") if _any(runs, stage)]
    rows = [
        row("final val_bpb", lambda r: f"{r.record.val_bpb:.5f}" if r.finished else "-"),
        *([row(f"less {runs[0].label}'s", lambda r: _difference(r, runs[0]))] if len(runs) > 1 else []),
        row("final val_loss", lambda r: r.record.val_loss if r.finished else "-"),
        *(row(f"val_bpb {stage}", lambda r, stage=stage: _score(r, stage)) for stage in stages),
        row("artifact, bytes", lambda r: _count(r.record.artifact_bytes)),
        row("bytes left of 16,000,000", lambda r: _count(_left(r))),
        row("code, bytes", lambda r: _count(r.record.code_bytes)),
        row("steps", lambda r: _count(r.record.steps)),
        row("training, s", lambda r: _seconds(r.record.train_seconds)),
        row("calibration, s", lambda r: _seconds(r.record.calibrate_seconds)),
        row("final evaluation, s", lambda r: _seconds(r.record.eval_seconds)),
        row("limits kept", _legal),
        row("parameters", lambda r: _count(r.parameters)),
        row("device", lambda r: r.record.environment.get("device", "-")),
        row("seed", lambda r: "-" if r.record.seed is None else r.record.seed),
        row("ended", lambda r: r.ended),
        row("commit", lambda r: (r.record.environment.get("commit") or "-")[:12]),
        row("script, SHA-256", lambda r: (r.record.script_sha256 or "-")[:12]),
        row("data, SHA-256", lambda r: (r.record.data_sha256 or "-")[:12]),
    ]
    head = [
        "",
        *(Raw(_key(i) + text(run.label)) if len(runs) > 1 else run.label for i, run in enumerate(runs)),
    ]
    rows = [row for row in rows if any(cell != "-" for cell in row[1:])]
    return f'<div class="box{" full" * (len(runs) > 1)} runs">{table(head, rows)}</div>'


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
    return details("all seconds", table(["stage", *(run.label for run in runs)], rows))


def byte_rows(runs: Sequence[Run]) -> str:
    """Bytes of each group, of the runs whose artifact is there."""
    found: dict[str, Mapping[str, int]] = {}
    for run in runs:
        try:
            found[run.label] = run.byte_groups
        except Missing:
            continue
    rows = [[name, *(f"{groups[name]:,}" for groups in found.values())] for name in GROUPS]
    rows.append(["all", *(f"{sum(groups.values()):,}" for groups in found.values())])
    return table(["", *found], rows)


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
    return details("means", table(["tokens", "documents", "quantised", "adapted", "gain"], rows))


def audit_table(run: Run) -> str:
    """The verdicts of tools/audit.py."""
    audit = run.record.audit
    if not audit:
        return absent(
            f"Audit of {run.label}", f"no audit.json: python tools/audit.py {run.folder or 'RUN_DIR'}"
        )
    looks = {"VERIFIED": "good", "FAIL": "bad"}
    rows = [
        [
            name,
            Raw(f'<span class="{looks.get(check["status"], "soft")}">{text(check["status"])}</span>'),
            check["rule"],
            check["evidence"],
        ]
        for name, check in audit["checks"].items()
    ]
    counts = ", ".join(f"{count} {status}" for status, count in audit["counts"].items())
    shown = table(["check", "verdict", "rule", "evidence"], rows, numbers=False)
    return f'<div class="box full audit"><b>{text(run.label)}: {text(counts)}</b>{shown}</div>'


def settings_table(runs: Sequence[Run], defaults: Mapping[str, object]) -> str:
    """Settings that are not the defaults; with several runs those in which they differ come first."""
    known = [{"SEED": run.record.seed} | run.record.compared_settings for run in runs]
    names = list(dict.fromkeys(name for settings in known for name in settings))
    values = {name: [settings.get(name) for settings in known] for name in names}
    told = {name: [value for value in values[name] if value is not None] for name in names}
    differing = [name for name in names if any(value != told[name][0] for value in told[name])]
    others = [name for name in names if name not in differing and told[name]]
    changed = [name for name in others if told[name][0] != defaults.get(name, told[name][0])]
    head = ["setting", *(run.label for run in runs), "default"]
    parts = ""
    sets = ("settings in which the runs differ", differing), ("settings not at their default", changed)
    for title, chosen in sets:
        if chosen:
            cells = ([_plain(value) for value in (*values[name], defaults.get(name))] for name in chosen)
            codes = (Raw(f"<code>{text(name)}</code>") for name in chosen)
            rows = [[code, *row] for code, row in zip(codes, cells, strict=True)]
            shown = table(head, rows, numbers=False)
            inner = (
                details(f"{len(chosen)} {title}", shown) if chosen is changed else f"<b>{title}</b>{shown}"
            )
            parts += f'<div class="box full">{inner}</div>'
    return parts or absent("Settings", "none is known that is not at its default")


def _plain(value: object) -> object:
    return "-" if value is None else as_set(value)


def page(title: str, parts: Sequence[str], made: str) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{style()}</style></head>\n<body>\n"
        + "\n".join(parts)
        + f'\n<p class="soft">{text(made)}</p>\n</body></html>\n'
    )
