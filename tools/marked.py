"""Generated parts of the README: each stands between two lines that mark it."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataprep.shards import write_whole  # noqa: E402


class MarkError(ValueError):
    """A text without the lines that mark a generated part; one line."""


def replaced(text: str, begin: str, end: str, part: str) -> str:
    """The README's text with another part between its marks. Raises MarkError unless they stand once."""
    before, _, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not closed or text.count(begin) != 1:
        raise MarkError(f"README.md: needs the lines {begin.strip()} and {end}, once")
    return f"{before}{begin}{part}{end}{after}"


def write_part(folder: Path, begin: str, end: str, part: str) -> None:
    """Replace a part of a folder's README. Raises MarkError."""
    readme = folder / "README.md"
    write_whole(readme, replaced(readme.read_text(encoding="utf-8"), begin, end, part).encode())
