"""Generated parts of README.md and docs/: each stands between two lines that mark it."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataprep.shards import write_whole  # noqa: E402


class MarkError(ValueError):
    """A page without the lines that mark a generated part; one line."""


def with_part(page: Path, begin: str, end: str, part: str) -> str:
    """The text of a page with another part between its marks. Raises MarkError unless they stand once."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not closed or text.count(begin) != 1:
        raise MarkError(f"{page.name}: needs the lines {begin.strip()} and {end}, once")
    return f"{before}{begin}{part}{end}{after}"


def write_part(page: Path, begin: str, end: str, part: str) -> None:
    """Replace a part of a page. Raises MarkError."""
    write_whole(page, with_part(page, begin, end, part).encode())
