#!/usr/bin/env bash
# An optuna journal whose disk was full once can be read as long as nobody writes to it; the next trial ends it.
#
# Seen with optuna 5.0.0 (Python 3.11, Linux): JournalFileBackend adds a line for each change. Where the disk (here a
# limit on the file's size, later lifted) takes only a part of a line, the study raises OSError, and the half
# line stays. A study that is loaded then looks whole: the reader passes over a last line without an end. But
# the next change is added right behind it, so that both are one line that is no JSON: that trial raises
# AttributeError, and from the one after it on every use of the study raises JSONDecodeError, with the room
# back. Cutting the file back to what stood before the half line mends it. Exit code 1 if any of that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check optuna==5.0.0
"$work/env/bin/python" - "$work/study.journal" <<'PYTHON'
import os
import resource
import signal
import sys

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

optuna.logging.set_verbosity(optuna.logging.ERROR)
path = sys.argv[1]


def one_more_trial() -> str:
    try:
        study = optuna.load_study(storage=JournalStorage(JournalFileBackend(path)), study_name="s")
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
        return f"{len(study.trials)} trials"
    except Exception as error:
        return type(error).__name__


study = optuna.create_study(storage=JournalStorage(JournalFileBackend(path)), study_name="s")
found = [one_more_trial(), one_more_trial()]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(path) + 40, unlimited[1]))
found.append(one_more_trial())  # no room
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
whole = open(path, "rb").read().rpartition(b"\n")[0] + b"\n"
loaded = optuna.load_study(storage=JournalStorage(JournalFileBackend(path)), study_name="s")
found.append(f"{len(loaded.trials)} trials can be read")
found += [one_more_trial() for _ in range(3)]
with open(path, "wb") as file:
    file.write(whole)
found.append(one_more_trial())  # cut back
print(f"optuna {optuna.__version__}", *found, sep="\n")
expected = ["1 trials", "2 trials", "OSError", "2 trials can be read", "AttributeError"]
sys.exit(found != [*expected, "JSONDecodeError", "JSONDecodeError", "3 trials"])
PYTHON
