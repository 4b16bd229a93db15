"""What watches over a run and is never counted: the command line, checks, checkpoints, ledger, trackers.

Libraries take seconds to load. So this file needs none until a run begins, nor does what it imports at its
beginning: `--help` and mistakes in settings are answered at once.
"""

import atexit
import gc
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import train_gpt
from harness.help import help_text
from harness.rules import check_ranks
from harness.settings import given_settings, show_settings
from systems.console import Console, keep_consoles
from systems.early import leave
from train_gpt import Config, ConfigError, UserError

_read: list[Config] = []  # the settings that `answer_early` leaves to `main`


def answer_early(arguments: Sequence[str], environ: Mapping[str, str]) -> None:
    """Before the libraries are loaded: end the program here if it was asked for help, or wrongly."""
    try:
        cfg = read_command(arguments, environ)
    except UserError as error:
        leave(" ".join(str(error).split()), 2)
    if cfg is None:
        sys.exit(0)
    _read.append(cfg)
    gc.disable()  # until `main` has loaded the libraries, which takes a tenth less so
    atexit.register(gc.freeze)  # else Python looks for garbage in all of torch when it ends: 0.5 s


def main(arguments: Sequence[str], environ: Mapping[str, str], sources: Mapping[str, bytes]) -> int:
    """The command line of the whole house; exit code as `train_gpt.main`, which reports UserError."""
    early = bool(_read)
    cfg = _read.pop() if early else read_command(arguments, environ)
    if cfg is None:
        return 0
    from harness.manifest import find_data
    from harness.watched import watch_run

    if early:
        gc.freeze()
        gc.enable()
    cfg = find_data(cfg)
    if "--show" in arguments:
        resolved = json.dumps({"preset": cfg.preset, "settings": cfg.as_env()})
        return show(resolved if "--json" in arguments else show_settings(cfg))
    return watch_run(cfg, environ, sources)


def read_command(arguments: Sequence[str], environ: Mapping[str, str]) -> Config | None:
    """The settings of the run that is asked for; None where it was help, which is given. Raises UserError."""
    keep_consoles()
    flags = {"--help", "-h"} & set(arguments)
    if flags:
        topic = " ".join(text for text in arguments if text not in flags)
        show(help_text(Path(train_gpt.__file__).read_text(encoding="utf-8"), topic))
        return None
    unknown = set(arguments) - {"--show", "--json"}
    if unknown or ("--json" in arguments and "--show" not in arguments):
        settings = [text for text in arguments if text.partition("=")[0] in Config().as_env()]
        hint = f"; settings are environment variables: {' '.join(settings)} python train_gpt.py"
        known = f"must be --help [TOPIC] or --show [--json]{hint * bool(settings)}"
        raise ConfigError(f"{' '.join(arguments)}: unknown, {known}")
    cfg = given_settings(environ)
    if "--show" not in arguments:
        check_ranks(cfg, environ)
    return cfg


def show(text: str) -> int:
    """Print a text. Returns the exit code, also when its reader has had enough (`| head`)."""
    print(text, file=Console(sys.stdout), flush=True)
    return 0
