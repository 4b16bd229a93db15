"""The lines of a log as its script wrote them, and what they say."""

import functools
import itertools
import re

Value = bool | int | float | str

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
CLOCK = r"\d\d:\d\d:\d\d(?:[.,]\d+)?"
DATE = rf"\d{{4}}-\d\d-\d\d[T ]{CLOCK}(?:Z|[+-]\d\d:?\d\d)?"
PREFIXES = (
    rf"\[{DATE}\]",
    rf"{DATE}(?=\s|$)",
    rf"\[{CLOCK}\]",
    rf"{CLOCK}(?=\s|$)",
    r"\d{10}\.\d+(?=\s|$)",  # seconds since 1970
    r"\[[a-z_]*\d+\]:?",  # torchrun --tee with its role, and the errors of torch.distributed
    r"\[\d+,\d+\]<std(?:out|err)>:",  # mpirun --tag-output
    r" *\d+:(?=\s|$)",  # srun --label, whose numbers of more than ten tasks are as wide
)
ANY_PREFIX = "|".join(f"(?:{prefix})" for prefix in PREFIXES)
PREFIXED = re.compile(rf"(?:{ANY_PREFIX})(?:\s*(?:{ANY_PREFIX}))*")


class LogError(ValueError):
    """A log that cannot be read, or only with numbers that may be wrong; the reason in one line."""


def mixed(what: str, first: object, second: object) -> LogError:
    """The error of a log that says two things where a run says one."""
    return LogError(f"says {what} twice, {first} and {second}: lines of several runs")


def parse_value(text: str) -> Value:
    """A number, True or False where the text is one, else the text."""
    if text in ("True", "False"):
        return text == "True"
    if re.fullmatch(r"-?\d{1,19}", text):
        return int(text)
    if re.fullmatch(r"-?\d+(\.\d+)?(e[+-]?\d{1,3})?|nan|-?inf", text):
        return float(text)
    return text


def cleaned(text: str) -> str:
    """A log without colours, prefixes and spaces at the ends of lines, as a terminal may copy them.

    A prefix is told by its shape. Where a space follows each prefix of a shape it belongs to it; else spaces
    are the script's own, as before a setting.
    """
    lines = [_split(line) for line in ANSI.sub("", text.removeprefix("\ufeff")).split("\n")]
    tight = {shape for shape, rest in lines if rest.strip() and not rest.startswith(" ")}
    return "\n".join((rest if not shape or shape in tight else rest[1:]).rstrip() for shape, rest in lines)


def _split(line: str) -> tuple[str, str]:
    """Shape of the prefixes of a line, and what follows them."""
    found = PREFIXED.match(line)
    return (re.sub(r" *\d+", "0", found[0]), line[found.end() :]) if found else ("", line)


def once(text: str) -> tuple[str, int]:
    """A log whose lines all stand there several times, with each once; and how often they do at least."""
    groups = [(line, len([*group])) for line, group in itertools.groupby(filter(str.strip, text.split("\n")))]
    times = min((count for _, count in groups), default=1)
    return ("\n".join(line for line, _ in groups) + "\n", times) if times > 1 else (text, 1)


def found(text: str, *patterns: str) -> list[re.Match]:
    """All whole lines of some patterns, in their order in the text."""
    return sorted((match for pattern in patterns for match in _lines_of(text, pattern)), key=re.Match.start)


@functools.lru_cache(maxsize=128)  # a log's patterns are looked for several times
def _lines_of(text: str, pattern: str) -> tuple[re.Match, ...]:
    return (*re.finditer(rf"(?m)^(?:{pattern})$", text),)


def value(match: re.Match) -> str:
    """The first group of a pattern that took part."""
    return next(group for group in match.groups() if group is not None)


def one(text: str, what: str, pattern: str) -> str | None:
    """What a line says that a run prints once. Raises `LogError` where two lines say different things."""
    told = [*dict.fromkeys(map(value, found(text, pattern)))]
    if len(told) > 1:
        raise mixed(what, *told[:2])
    return told[0] if told else None


def last_line(text: str) -> str:
    """The last line, for a message."""
    return f"its last line is {text.rstrip().rpartition(chr(10))[2][:60]!r}"
