"""Check S6: what stands around the scripts. A changed library can make any script, and the audit, lie."""

import os
import sys
from pathlib import Path

from auditing import box
from auditing.run import CONSISTENT, RECOMPUTED, Audit, Verdict, check, require

# Variables that let other code into a program before it begins.
HOOKS = ("LD_AUDIT", "LD_PRELOAD", "PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONUSERBASE")
TOOLS = ("_virtualenv.pth", "_virtualenv.py")  # what makers of environments leave there, without a RECORD


def loaded_files() -> list[str]:
    """Files of all modules and shared libraries that this process has loaded."""
    modules = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    maps = Path("/proc/self/maps")
    rows = maps.read_text().splitlines() if maps.exists() else []
    mapped = [row.split(maxsplit=5)[5] for row in rows if row.count("/")]
    return sorted({name for name in [*modules, *mapped] if name and os.path.isfile(name)})


@check("S6", "Python and its libraries as they were installed", RECOMPUTED)
def s6_surroundings(audit: Audit) -> str | Verdict:
    """Files that the audit has loaded against the RECORD of their distribution; what Python starts with."""
    names = loaded_files()
    strange = [name for name in box.strange_libraries(names) if Path(name).name not in TOOLS]
    require(not strange, f"of no distribution, or changed since it was installed: {', '.join(strange)[:300]}")
    hooks = [name for name in HOOKS if os.environ.get(name)]
    if hooks:
        return Verdict(CONSISTENT, f"{', '.join(hooks)} let other code in; {len(names):,} files as installed")
    return f"{len(names):,} loaded files as installed, nothing else is started with Python"
