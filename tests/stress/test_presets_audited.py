"""The honest run of every preset is VERIFIED by the whole audit, exit code 0; the suite has one preset.

So is that of a trellis, fitted to a size.
"""

import sys
from pathlib import Path

import pytest
import test_smoke as smoke
from test_packing import data_folders  # noqa: F401 - a fixture

from harness.settings import PRESETS

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import audit  # noqa: E402

# Which is said of these and cannot be verified: the last token of a document reaches over the next one's BOS.
UNMASKED = {"D8"}


TRELLIS = {"QUANTIZER": "trellis", "COMPRESSOR": "ans", "FIT_BYTES": 60_000, "GPTQ_DRIFT_BATCHES": 1}
RUNS = {name: {"PRESET": name} for name in PRESETS if name.endswith("demo")}
RUNS["trellis, fitted"] = {"PRESET": "demo"} | TRELLIS


@pytest.mark.parametrize("variant", RUNS)
def test_preset_is_verified(tg, data_folders, tmp_path, capsys, variant):  # noqa: F811
    settings = {"AUDIT": 1, "TTT_CHUNK_TOKENS": 128, "EVAL_STRIDE": 16, "RUN_ID": "r"} | RUNS[variant]
    cfg = tg.read_settings({"PRESET": settings["PRESET"]})
    settings = ({"FIT_BYTES": 60_000} if cfg.fit_bytes else {}) | settings  # of so small a model
    data = data_folders[cfg.caseops_enabled]
    environment = smoke.environment(**settings, DATA_PATH=data, ARTIFACT_DIR=tmp_path / "run")
    assert tg.main([], environment) == 0, capsys.readouterr().err
    code, said = audit.main([str(tmp_path / "run")]), capsys.readouterr().out
    assert code == 0, said
