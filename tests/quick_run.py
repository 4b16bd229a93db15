"""`train_gpt.py` as a command that neither folds its counted code nor compiles: both are other tests'."""

import atexit
import gc
import os
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    gc.disable()  # until the libraries are loaded, as a run does

import torch  # noqa: E402

import train_gpt  # noqa: E402
from harness import packing  # noqa: E402

QUICK = Path(__file__).resolve()


def stub(*_: object) -> tuple[bytes, bool]:
    """Stands for `packed_script`."""
    return b"packed", True


def without_compiler() -> None:
    """Optimisers import torch's compiler (2 s) only to tell it not to trace them; no such run compiles."""
    stand_in = types.ModuleType("torch._dynamo")
    stand_in.graph_break = lambda: None
    stand_in.disable = lambda function, *_, **__: function
    stand_in.trace_rules = types.SimpleNamespace(clear_lru_cache=lambda: None)  # by torch.distributed
    torch._dynamo = sys.modules.setdefault("torch._dynamo", stand_in)


if __name__ == "__main__":
    packing.packed_script = stub
    without_compiler()
    gc.freeze()
    gc.enable()
    atexit.register(gc.freeze)  # else Python looks for garbage in all of torch when it ends: 0.5 s
    sys.exit(train_gpt.main(sys.argv[1:], os.environ))
