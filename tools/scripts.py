"""The script of a run and its house: train_gpt.py, the core, with harness/ and systems/ beside it.

Between two lines of 80 `=` a log holds the core. Every other file of the house follows: a line `==== PATH
sha256:HEX`, then its text; the last one ends at the line `==== end`. A script that ran alone has no others.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

CORE = "train_gpt.py"
PARTS = ("harness", "systems")
RULE = "=" * 80
FILE_LINE = re.compile(r"(?m)^==== ((?:harness|systems)/\w+\.py) sha256:([0-9a-f]{64})\n")
LOGGED_SCRIPT = re.compile(rf"(?ms)^{RULE}\n.*?^{RULE}\n(?:{FILE_LINE.pattern[4:]}.*?^==== end\n)?")


class HouseError(ValueError):
    """A log that does not hold the script that ran; one line."""


def sha256_of(data: bytes | Path) -> str:
    """Checksum of bytes, or of a file's."""
    if isinstance(data, bytes):
        return hashlib.sha256(data).hexdigest()
    with open(data, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def house_beside(script: Path) -> dict[str, Path]:
    """The other files of a script's house by their paths from its folder; none where it stands alone."""
    folder = script.parent
    files = (path for part in PARTS for path in sorted((folder / part).glob("*.py")))
    return {str(path.relative_to(folder)): path for path in files}


def script_hash(core: str, house: Mapping[str, str]) -> str:
    """One checksum of a script and its house, from those of the files; a lonely script's is its own."""
    return sha256_of(json.dumps([core, *sorted(house.items())]).encode()) if house else core


def hash_told(environment: Mapping) -> str | None:
    """`script_hash` of what a run says of its environment; None where it does not tell."""
    core = environment.get("source_sha256")
    return script_hash(core, environment.get("house_sha256", {})) if core else None


def hash_on_disk(script: Path) -> str:
    """`script_hash` of a script and what lies beside it."""
    house = {name: sha256_of(path) for name, path in house_beside(script).items()}
    return script_hash(sha256_of(script), house)


def logged_house(log: str, core: str, house: Mapping[str, str]) -> dict[str, bytes]:
    """Sources by path, CORE first, as a log holds them. Raises HouseError where a checksum is another."""
    text, found, rest = log.partition(f"{RULE}\n")[2].partition(f"\n{RULE}\n")
    pieces = FILE_LINE.split(rest.partition("\n==== end\n")[0])
    texts = {path: text for path, _, text in zip(*[iter(pieces[1:])] * 3, strict=True)}
    texts |= {CORE: text} if found else {}
    sources = {}
    for path, wanted in {CORE: core, **house}.items():
        source = _with_checksum(texts.get(path, ""), wanted)
        if source is None:
            raise HouseError(f"its log holds no {path} with the checksum {wanted}")
        sources[path] = source
    return sources


def _with_checksum(text: str, wanted: str) -> bytes | None:
    """The text with the end of its last line as it was; None where no form of it has the checksum."""
    forms = (form.encode() for form in (text, f"{text}\n", text.removesuffix("\n")))
    return next((form for form in forms if sha256_of(form) == wanted), None)
