"""What `--help` prints: the settings that are changed first, the topics, and each topic by itself."""

import dataclasses
import re
from collections.abc import Iterable

import train_gpt
from harness.rules import allowed
from harness.settings import NEEDS, NO_SETTINGS, PRESETS, SCALES, WITHOUT, nearest_name
from harness.unread import needs_of
from systems.layout import as_set
from train_gpt import Config, ConfigError

FIRST = (  # what people change first
    *("PRESET", "SEED", "DATA_PATH", "ARTIFACT_DIR", "ITERATIONS", "MAX_WALLCLOCK_SECONDS", "MATRIX_LR"),
    *("TTT_ENABLED", "CHECKPOINT_SECONDS", "AUDIT"),
)
SIZED = tuple(f"-{scale}" for scale in SCALES)  # how the names of what SCALE makes of presets end
LIKE = "PRESET=demo SEED=1 python train_gpt.py"


def setting_comments(source: str) -> dict[str, str]:
    """Help text of each setting: the comments behind the fields in the script's source."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))


def setting_groups(source: str) -> dict[str, str]:
    """The first field of each group of `Config` -> the comment that heads the group."""
    return {field: title for title, field in re.findall(r"^    # (\w.*)\n    (\w+): ", source, re.M)}


def help_text(source: str, topic: str = "") -> str:
    """What `--help TOPIC` prints, by the source of train_gpt.py: a group of settings, a setting, or "all".

    Raises ConfigError where there is no such topic.
    """
    rows, topics = _rows(source), _topics(source)
    names = " ".join([*topics, "presets", "all"])
    if not topic:
        shown = sum(not name.endswith(SIZED) for name in PRESETS)
        listed = "\n".join(f"  {name:<14}{len(found):>3} settings" for name, found in topics.items())
        listed += f"\n  {'presets':<14}{shown:>3} presets\n  {'all':<14}{len(rows):>3} settings"
        first = f"Settings are environment variables: {LIKE}\nThe ten that are changed first:"
        more = "Topics, for --help TOPIC; --help NAME tells of one setting:"
        return f"{_about()}\n\n{first}\n\n{_joined(rows, FIRST)}\n\n{more}\n\n{listed}"
    if topic == "all":
        head = f"Settings, as environment variables (PRESET one of {', '.join(PRESETS)}):"
        return f"{_about()}\n\n{head}\n\n{_joined(rows, rows)}"
    if topic == "presets":
        return _presets()
    if topic.upper() in rows:
        return rows[topic.upper()] + _needed(topic.upper())
    if topic.lower() not in topics:
        near = nearest_name(topic.upper(), [*rows, *map(str.upper, topics)])
        meant = f"; did you mean {near}?" if near else ""
        raise ConfigError(f"--help {topic}: must be one of {names}, or a setting{meant}")
    return _joined(rows, topics[topic.lower()])


def _needed(name: str) -> str:
    """A line with what a setting needs, to be read or to be on; empty where that is nothing."""
    if needs := needs_of(name):
        return f"\n      read only with {needs}"
    off, needs = NEEDS.get(name, ("", ""))
    return f"\n      other than {off or 'empty'} only with {needs}" * bool(needs)


def _about() -> str:
    """What the script does and its commands: the rest of its docstring is for who reads it."""
    return train_gpt.__doc__.partition("\n\nA reader")[0]


def _presets() -> str:
    """What a preset is, and each in a line: what it changes, or how much."""
    lines = [
        "PRESET=NAME is a base that explicit variables change; --show prints what it comes to. SCALE=demo",
        "makes it as small as the demo, SCALE=study as a study, each on its own data (--help SCALE).\n",
    ]
    for name, row in PRESETS.items():
        if name.endswith(SIZED):
            continue
        changes = [f"{key.upper()}={as_set(v)}" for key, v in row.items() if v != getattr(Config, key)]
        few, many = " ".join(changes), f"{len(changes)} settings are not the record's"
        told = (few if len(changes) <= 3 else many) if changes else "the record, where nothing is set"
        left_out = f"; without {WITHOUT[name].partition(':')[0]}" if name in WITHOUT else ""
        lines.append(f"  {name:<9}{told}{left_out}")
    return "\n".join(lines)


def _rows(source: str) -> dict[str, str]:
    """Name of each variable -> its two lines; a packed script has lost its comments."""
    comments, rows = setting_comments(source), {}
    for field in dataclasses.fields(Config):
        default = as_set(field.default)
        help_of = f"{comments.get(field.name, '')} [{allowed(field.type)}]"
        rows[field.name.upper()] = f"  {field.name.upper()}={default}\n      {help_of}"
    for name, (values, text) in NO_SETTINGS.items():
        rows[name] = f"  {name}={values[0]}\n      {text} [one of {', '.join(values)}]"
    return rows


def _topics(source: str) -> dict[str, list[str]]:
    """Topic, the first word of the head of a group, -> its variables."""
    heads, topics = setting_groups(source), {"run": [*NO_SETTINGS]}
    topic = "run"
    for field in dataclasses.fields(Config):
        topic = heads[field.name].split()[0].lower() if field.name in heads else topic
        topics.setdefault(topic, []).append(field.name.upper())
    return topics


def _joined(rows: dict[str, str], names: Iterable[str]) -> str:
    return "\n".join(rows[name] for name in names)
