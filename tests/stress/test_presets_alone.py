"""The counted script of every preset gives the digits alone; the suite has one preset of each kind."""

import pytest
from test_packing import KINDS, data_folders  # noqa: F401 - a fixture
from test_packing import test_the_counted_script_gives_the_digits_alone as gives_the_digits_alone

from harness.settings import PRESETS


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.endswith("-demo") and name not in KINDS])
def test_preset(tg, data_folders, tmp_path, capsys, preset):  # noqa: F811
    gives_the_digits_alone(tg, data_folders, tmp_path, capsys, preset)
