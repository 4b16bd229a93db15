#!/usr/bin/env bash
# loralib: a state saved after eval() has its adapters in it twice.
#
# Seen with loralib 0.1.2 and torch 2.13.0 (CPU build, Python 3.11): eval() adds B A to the layer's own weight,
# train() subtracts it again. A state_dict() taken between the two, as after an evaluation, has the sum as weight
# and A and B beside it; a layer that loads it adds B A once more, in training and in evaluation, and nothing is
# raised. And adapters that are changed between eval() and train() leave the frozen weight changed for good, for
# what is subtracted is not what was added. (`layer.eval()` gives None, too, where torch's gives the layer.) Exit
# code 1 if any of that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 loralib==0.1.2
"$work/env/bin/python" - <<'PYTHON'
import sys

import loralib
import torch

torch.manual_seed(0)
x = torch.randn(2, 16)


def layer():
    made = loralib.Linear(16, 16, r=4, bias=False)
    torch.nn.init.normal_(made.lora_B)
    return made


def apart(one, other):
    return float((one - other).detach().abs().max()) > 1e-3


trained = layer()
right, own = trained(x), trained.weight.detach().clone()
share = (trained.lora_B @ trained.lora_A).detach() * trained.scaling
in_training = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
given = trained.eval()
in_evaluation = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
found = {"output of eval() is another": apart(trained(x), right), "eval() gives the layer": given is not None}
for name, state in ("train()", in_training), ("eval()", in_evaluation):
    fresh = layer()
    fresh.load_state_dict(state)
    found[f"output is another where the state is of {name}"] = apart(fresh(x), right)
twice = fresh.weight + (fresh.lora_B @ fresh.lora_A) * fresh.scaling
found["it is that of adapters added twice"] = not apart(twice, own + 2 * share)
with torch.no_grad():
    trained.lora_B.mul_(2)
trained.train()
found["frozen weight changed after adapters changed in eval()"] = apart(trained.weight, own)
print(f"torch {torch.__version__}")
for what, is_so in found.items():
    print(f"{what}: {is_so}")
sys.exit([*found.values()] != [False, False, False, True, True, True])
PYTHON
