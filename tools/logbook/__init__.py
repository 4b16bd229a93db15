"""The published logs of the contest, from its first baseline to PR #1868: `published.read_published`.

`lines.py` takes off what launchers and clocks put before the lines. `families.py` holds tables of what the
systems print; the next one is a row there. `scores.py` finds what is final, `published.py` all else. Our own
logs are for `ours.py`.
"""
