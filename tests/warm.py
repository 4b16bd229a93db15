"""Scripts as commands that find torch imported: one process has done so, and becomes each of them by a fork.

To import torch and what its optimisers use takes longer than most of the runs. What must be a new process
(`fresh` in test_smoke.py) says so.
"""

import atexit
import functools
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from patience import PATIENCE


def run(script: Path, folder: Path, environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    """What a command does in a folder, with these variables and no others."""
    return run_together(script, folder, [environ], *arguments)[0]


def run_together(
    script: Path, folder: Path, environs: list[dict[str, str]], *arguments: str
) -> list[subprocess.CompletedProcess]:
    """The same of several processes at once, each with its own variables: the ranks of a run."""
    with tempfile.TemporaryDirectory() as place:
        files = [[f"{place}/output{rank}", f"{place}/errors{rank}"] for rank in range(len(environs))]
        server, jobs = _server(), list(zip(environs, files, strict=True))
        print(json.dumps([[str(script), *arguments], str(folder), jobs]), file=server.stdin, flush=True)
        codes = json.loads(server.stdout.readline())
        texts = [[Path(file).read_text(encoding="utf-8") for file in pair] for pair in files]
    ended = zip(codes, texts, strict=True)
    return [subprocess.CompletedProcess([str(script), *arguments], code, *said) for code, said in ended]


@functools.cache
def _server() -> subprocess.Popen:
    """The process that forks; it ends with its standard input, that is with this one."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, __file__], env=kept | {"OMP_NUM_THREADS": "1"}, **pipes)


def _become(command: list[str], folder: str, environ: dict[str, str], files: list[str]) -> None:
    """Run a script in this process as if it had been started so; its exit code is this process's."""
    signal.alarm(PATIENCE)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update({"CONSOLE": "log"} | environ)
    for number, path in enumerate([os.devnull, *files]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.argv, sys.path[0] = command, str(Path(command[0]).parent)
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, int):
            _end(end.code)
        raise


def _end(code: int) -> None:
    """End as Python does, but for taking all modules apart, which torch's make 0.3 s of work."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve() -> None:
    """Fork for each line of the input, and print the exit codes."""
    import sentencepiece  # noqa: F401
    import torch._dynamo  # noqa: F401

    gc.freeze()  # else each child looks for garbage in all that torch has made: 0.9 s at its end
    for line in sys.stdin:
        command, folder, jobs = json.loads(line)
        children = []
        for job in jobs:
            children.append(os.fork())
            if not children[-1]:
                return _become(command, folder, *job)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    _serve()
