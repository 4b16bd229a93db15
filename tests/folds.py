"""The counted code of runs inside this process: it takes seconds, so what is the same is folded once.

What is folded twice from the same is the same: that is a test of its own (test_packing.py).
"""

import hashlib
import sys
from collections.abc import Mapping
from types import ModuleType

import pytest
from house import ROOT

sys.path.insert(0, str(ROOT / "tools"))

from auditing.wrappers import layers  # noqa: E402

FOLDED: dict[str, tuple[str, bool]] = {}


def key_of(
    packing: ModuleType, cfg: object, backends: object, house: Mapping[str, bytes], on_gpu: bool
) -> str:
    """All that the folded source hangs on: what is known of the run, the sources, and the minifier."""
    facts = packing.facts_of(cfg, backends, on_gpu), packing.run_time_settings(cfg, on_gpu)
    sources = sorted((name, hashlib.sha256(text).hexdigest()) for name, text in house.items())
    return repr((facts, sources, sys.modules.get("python_minifier", "") is None))


def fold_once(patch: pytest.MonkeyPatch, packing: ModuleType) -> None:
    """Give a module `packing` the memory that all have; for houses whose harness/ is the repository's."""
    fold = packing.folded_source

    def folded_source(cfg: object, backends: object, house: Mapping[str, bytes], on_gpu: bool = False):
        key = key_of(packing, cfg, backends, house, on_gpu)
        if key not in FOLDED:
            FOLDED[key] = fold(cfg, backends, house, on_gpu)
        return FOLDED[key]

    patch.setattr(packing, "folded_source", folded_source)


def unfolded(packed: bytes) -> str:
    """The text in the wrapper of a counted script."""
    return list(layers(packed))[-1].text
