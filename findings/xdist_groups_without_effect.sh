#!/usr/bin/env bash
# pytest-xdist's --dist loadgroup does nothing under pytest 9.2: tests of one group run in several processes.
#
# Seen with pytest 9.2.0 and pytest-xdist 3.8.0 (Python 3.11): four tests marked xdist_group("one"), two processes. The
# plugin keeps a test's group by writing it behind the test's id, into an attribute that pytest no longer reads, so
# the scheduler sees no groups and spreads the tests. Nothing is said; a fixture that a group should share is made
# in each process. With pytest 8.4.2 all four run in one process. Exit code 1 if any of that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/test_group.py" <<'PYTHON'
import os
import time

import pytest

pytestmark = pytest.mark.xdist_group("one")


@pytest.mark.parametrize("number", range(4))
def test_one_of_a_group(number):
    time.sleep(0.5)
    with open("processes.txt", "a") as file:
        file.write(f"{os.getpid()}\n")
PYTHON
for version in 8.4.2 9.2.0; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet --disable-pip-version-check "pytest==$version" pytest-xdist==3.8.0
  (cd "$work" && rm -f processes.txt && "$work/$version/bin/python" -m pytest -q -n 2 --dist loadgroup -p no:cacheprovider > log.txt)
  count=$(sort -u "$work/processes.txt" | wc -l)
  echo "pytest $version, pytest-xdist 3.8.0: 4 tests of one group in $count process(es)"
  expected=$([ "$version" = 8.4.2 ] && echo 1 || echo 2)
  [ "$count" = "$expected" ] || { echo "expected $expected"; exit 1; }
done
