"""The page: one HTML file that needs nothing else, readable on a phone, light and dark."""

import html
from collections.abc import Mapping, Sequence

from reporting.figures import COLOURS

CSS = """
:root{color-scheme:light dark;--bg:#ffffff;--panel:#f6f8fa;--good:#1a7f37;--bad:#cf222e;LIGHT}
@media (prefers-color-scheme:dark){:root{--bg:#0d1117;--panel:#151b23;--good:#3fb950;--bad:#f85149;DARK}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1320px;padding:12px;background:var(--bg);color:var(--ink);
 font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.45rem;margin:.3em 0}h2{font-size:1.15rem;margin:1.6em 0 .5em}
p{margin:.4em 0;max-width:75ch}.soft{color:var(--soft)}
.score{font-size:2.1rem;line-height:1.15;font-variant-numeric:tabular-nums}
.score small{font-size:1rem;white-space:nowrap}
.grid{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr))}
figure,.box{margin:0;padding:10px;min-width:0;background:var(--panel);border:1px solid var(--line)}
figure,.box{border-radius:8px}.full{grid-column:1/-1}.absent{align-self:start}
.runs td:first-child,.runs th:first-child{position:sticky;left:0;background:var(--panel)}
figure svg{display:block;width:100%;max-width:560px;height:auto;margin:0 auto}
figure svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif!important}
figcaption{color:var(--soft);font-size:.86rem;margin-top:6px}
.wide{overflow-x:auto}
.switch input{position:absolute;opacity:0}
.switch label{display:inline-block;padding:2px 10px;font-size:.86rem;color:var(--soft);cursor:pointer}
.switch label{border:1px solid var(--line);border-radius:6px;margin-right:6px}
.switch input:checked+label{color:var(--ink);border-color:var(--c1)}
.switch input:focus-visible+label{outline:2px solid var(--c1)}
.switch input:nth-of-type(1):not(:checked)~svg:nth-of-type(1){display:none}
.switch input:nth-of-type(2):not(:checked)~svg:nth-of-type(2){display:none}
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


def labelled(svg: str, name: str) -> str:
    """A picture with what a screen reader says of it."""
    return svg.replace('role="img"', f'role="img" aria-label="{text(name)}"', 1)


def figure(svg: str, name: str, caption: str, extra: str = "") -> str:
    """A picture with its caption; `name` is what a screen reader says."""
    return f"<figure>{labelled(svg, name)}<figcaption>{caption}</figcaption>{extra}</figure>"


def switch(key: str, pictures: Mapping[str, str], name: str, caption: str) -> str:
    """Two pictures in one place, by what they are drawn against, and a switch; the first one is shown."""
    parts = ""
    for number, against in enumerate(pictures):
        on = " checked" * (number == 0)
        parts += f'<input type="radio" name="{key}" id="{key}_{against}"{on}>'
        parts += f'<label for="{key}_{against}">{against}</label>'
    shown = "".join(labelled(svg, f"{name} against {against}") for against, svg in pictures.items())
    return f'<figure class="switch">{parts}{shown}<figcaption>{caption}</figcaption></figure>'


def absent(what: str, reason: str) -> str:
    """In the place of a part that a run lacks."""
    return f'<div class="box absent"><b>{text(what)}</b><p class="soft">Missing: {text(reason)}.</p></div>'


def page(title: str, parts: Sequence[str], made: str) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{style()}</style></head>\n<body>\n"
        + "\n".join(parts)
        + f'\n<p class="soft">{text(made)}</p>\n</body></html>\n'
    )
