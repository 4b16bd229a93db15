#!/usr/bin/env bash
# x-transformers' causal Decoder shows the future to the past, if values or residuals are made orthogonal.
#
# Seen with x-transformers 2.31.10, torch 2.13.0 (CPU build), Python 3.11. Three options take from a vector the part
# that points along another one: the attention's output along the position's own value (attn_orthog_projected_values and
# attn_orthog_projected_values_per_head) and a layer's output along the residual (orthog_residual). Each position has a
# direction of its own, but the projection is made once over all positions and channels of a sequence as one long
# vector, so its one coefficient knows every later token. With new tokens from position 8 on, the logits of positions 0
# to 7 change too, for a plain Decoder by exactly 0. The variant per head gives the very digits of the one across heads.
# So a loss on whole sequences is not that of a causal model, and generation from a prefix sees other logits than
# training did. Nothing warns of it. Exit code 1 if any of that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check x-transformers==2.31.10 torch==2.13.0 numpy==2.4.6
cat > "$work/leak.py" <<'PYTHON'
import torch
from x_transformers import Decoder, TransformerWrapper

CHANGED = 8  # the first position whose token differs between the two texts
torch.set_num_threads(1)


def differences(**options: bool) -> list[float]:
    """By how much the logits of two texts, equal up to position CHANGED, differ at most, by position."""
    torch.manual_seed(0)
    decoder = Decoder(dim=32, depth=2, heads=4, attn_dim_head=16, **options)
    model = TransformerWrapper(num_tokens=20, max_seq_len=32, attn_layers=decoder).eval()
    text = torch.randint(0, 20, (1, 12))
    other = text.clone()
    other[:, CHANGED:] = (other[:, CHANGED:] + 3) % 20
    with torch.no_grad():
        return (model(text) - model(other))[0].abs().amax(-1).tolist()


found = {}
for option in (None, "attn_orthog_projected_values", "attn_orthog_projected_values_per_head", "orthog_residual"):
    found[option] = differences(**({option: True} if option else {}))
    before, after = found[option][:CHANGED], found[option][CHANGED:]
    print(f"{option or 'plain'}: before {CHANGED} {min(before):.4f} to {max(before):.4f}, then up to {max(after):.2f}")
    if not all(value == 0 if option is None else value > 1e-3 for value in before):
        raise SystemExit("expected zeros for the plain decoder and changes for each option")
if found["attn_orthog_projected_values"] != found["attn_orthog_projected_values_per_head"]:
    raise SystemExit("expected the same for both kinds of projected values")
PYTHON
"$work/venv/bin/python" "$work/leak.py"
