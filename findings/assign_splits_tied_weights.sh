#!/usr/bin/env bash
# load_state_dict(assign=True) leaves tied weights in one memory as two parameters: Adam's step is taken twice.
#
# Seen with torch 2.13.0 (CPU build, Python 3.11): a model whose head is its embedding is saved by torch.save and
# read by torch.load, which keeps the two entries of its state on one memory. With assign=False the model that
# reads it stays tied. With assign=True `head.weight is embedding.weight` becomes false while both still lie in
# the same memory, so nothing of the model's output tells. parameters() now has both: each gets its own part
# of the gradient and its own moments, and the weights are moved by one after the other. One step of AdamW moves
# them by twice the learning rate. Exit code 1 if any of that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$work/env/bin/python" - <<'PYTHON'
import io
import sys

import torch
from torch import nn


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids))


def loaded(assign):
    torch.manual_seed(0)
    file = io.BytesIO()
    torch.save(Tied().state_dict(), file)
    file.seek(0)
    model = Tied()
    model.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    return model


print(f"torch {torch.__version__}")
found = []
for assign in (False, True):
    model = loaded(assign)
    weight, other = model.embedding.weight, model.head.weight
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    model(torch.arange(4)).square().mean().backward()
    optimizer.step()
    moved = round((weight - before).abs().max().item(), 4)
    found.append((len([*model.parameters()]), weight is other, weight.data_ptr() == other.data_ptr(), moved))
    print(f"assign={assign}: parameters, one object, one memory, largest step of 0.01: {found[-1]}")
sys.exit(found != [(1, True, True, 0.01), (2, False, True, 0.02)])
PYTHON
