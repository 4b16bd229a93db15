#!/usr/bin/env bash
# torchmetrics: after 16,777,216 tokens, Perplexity and MeanMetric no longer count the tokens that come one by one.
#
# Seen with torchmetrics 1.9.0 and torch 2.13.0 (CPU build, Python 3.11): both keep losses and their number as
# float32, whatever the type of what they are given, and 2^24 + 1 is 2^24 there. A validation text of the contest
# has 47.85 million tokens; a sliding window of stride 1, or the ends of documents, bring them singly or few at a
# time. The loss of each is still added, rounded to what a sum of that size can hold, so the mean moves away from
# the truth: after 16,777,216 tokens in large parts and 20,000 singly, each of two equal probabilities, Perplexity
# says 2.0024 instead of 2; where the single ones cost 3 nats and the others 1, MeanMetric says 1.0048 instead of
# 1.0024. `set_dtype(torch.float64)` before the first token keeps both right. (Sums of torcheval 0.0.7 are
# float64.) Exit code 1 if any of that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 torchmetrics==1.9.0
"$work/env/bin/python" - <<'PYTHON'
import sys

import torch
import torchmetrics

MANY, SINGLE, PART = 1 << 24, 20_000, 1 << 20


def after_all(perplexity, mean):
    """Tokens counted, perplexity and mean after 2^24 tokens in large parts and 20,000 single ones."""
    for tokens, nats in [(PART, 1.0)] * (MANY // PART) + [(1, 3.0)] * SINGLE:
        perplexity.update(torch.zeros(1, tokens, 2), torch.zeros(1, tokens, dtype=torch.long))
        mean.update(torch.full((tokens,), nats))
    return int(perplexity.count), float(perplexity.compute()), float(mean.compute())


right = MANY + SINGLE, 2.0, (MANY + 3 * SINGLE) / (MANY + SINGLE)
kinds = torchmetrics.text.Perplexity, torchmetrics.MeanMetric
as_they_come = after_all(*(kind() for kind in kinds))
in_float64 = after_all(*(kind().set_dtype(torch.float64) for kind in kinds))
for name, values in ("right", right), ("as they come", as_they_come), ("in float64", in_float64):
    print("{}: {} tokens, perplexity {:.6f}, mean {:.6f}".format(name, *values))
wrong = as_they_come[0] == MANY and as_they_come[1] > 2.002 and as_they_come[2] > right[2] + 0.002
same = in_float64[0] == right[0] and all(abs(x - y) < 1e-6 for x, y in zip(in_float64, right))
sys.exit(not (wrong and same))
PYTHON
