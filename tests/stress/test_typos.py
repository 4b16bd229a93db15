"""Every typo of one letter in a setting's name is refused with a nearest name; the suite has a quarter."""

from test_config import fields  # noqa: F401 - a fixture
from test_config import test_single_typos_are_refused as are_refused


def test_every_single_typo(tg, fields):  # noqa: F811
    are_refused(tg, fields, every=1)
