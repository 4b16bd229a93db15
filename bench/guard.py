"""How near documents come to losing their adapters when nothing has harmed them (TTT_GUARD).

    python bench/guard.py runs/demo-seed42-20261128-120000    # the weights and the data of a finished run
    python bench/guard.py --json RUN_DIR

Real documents (validation and training) are scored by the weights alone, without adapters, so each alarm is
false; so are those on invented losses, which are noisier. Told for chunks of several sizes: the largest
evidence of harm, how many documents reach the limit, and how many the rule before this one would have taken:
a chunk whose mean is 4 nats above the mean of those before.
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402
from systems.compiled import one_line  # noqa: E402

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 72)  # targets of a chunk
SHORTEST, LONGEST = 300, 2048  # tokens of the real documents that are looked at
OLD_LIMIT = 4.0


def judge(losses: Tensor, size: int, cfg: tg.Config) -> tuple[Tensor, Tensor]:
    """Which documents [B] keep their adapters, and the largest evidence of harm; losses [B, T] in chunks."""
    documents, tokens = losses.shape
    evaluator = object.__new__(tg.ScoreFirstTTT)
    evaluator.cfg, evaluator.ranks = cfg, tg.CPU
    lora, evidence = (
        SimpleNamespace(active=torch.ones(documents, dtype=torch.bool)),
        torch.zeros(3, documents),
    )
    largest = torch.zeros(documents)
    for chunk, part in enumerate(losses.split(size, 1)):
        trains = torch.full([documents], (chunk + 1) * size < tokens)
        facts = {"documents": range(documents), "valid": torch.ones_like(part, dtype=torch.bool)}
        evaluator._sums(SimpleNamespace(**facts, trains=trains, spans=[]), part, evidence, chunk, lora)
        largest = torch.maximum(largest, evidence[2])
    return lora.active, largest


def old_rule_takes(losses: Tensor, size: int) -> bool:
    """Whether a chunk of a document's losses [T] has a mean OLD_LIMIT above the mean of the means before."""
    means = torch.stack([part.mean() for part in losses.split(size)])
    before = means.cumsum(0)[:-1] / torch.arange(1, len(means))
    return bool((means[1:] > before + OLD_LIMIT).any())


def invented(seed: int, documents: int = 2000) -> Tensor:
    """Losses [documents, 720] with a mean of 3.3 nats, an exponential tail, and passages harder for good."""
    generator = torch.Generator().manual_seed(seed)
    level = 3.3 + 0.6 * torch.randn(documents, 10, 1, generator=generator).clamp(-3, 3)
    return (level * -torch.rand(documents, 10, 72, generator=generator).log()).flatten(1)


@torch.no_grad()
def real(folder: Path) -> tuple[tg.Config, list[Tensor]]:
    """Settings of a run, and the losses of the documents of its data by its weights. Raises UserError."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        told, looping = result["settings"], result["looping"]
        weights = torch.load(folder / Path(told["MODEL_PATH"]).name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise tg.UserError(f"{folder}: must be a finished run ({one_line(error)})") from None
    fields = tg.Config.__dataclass_fields__
    cfg = tg.Config(**{name.lower(): value for name, value in told.items() if name.lower() in fields})
    model = tg.GPT(cfg)
    model.load_state_dict(weights)
    tokens = torch.cat([tg._read_stream(cfg.data_folder, split) for split in ("val", "train")])
    found = []
    for start, length in tg.find_documents(tokens):
        if length > SHORTEST:
            row = tg.packed_row(tokens[start : start + min(length, LONGEST + 1)], cfg.ttt_eval_seq_len)
            found.append(model.losses(*row, looping=looping)[0])
    if not found:
        raise tg.UserError(f"{cfg.data_folder}: has no document of more than {SHORTEST} tokens")
    return cfg, found


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run, its weights in it")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    try:
        cfg, documents = real(chosen.run)
    except tg.UserError as error:
        print(f"bench/guard.py: {error}", file=sys.stderr)
        return 2
    every, noise, rows = torch.cat(documents), invented(1), []
    for size in SIZES:
        kept, largest = zip(*(judge(losses[None], size, cfg) for losses in documents), strict=True)
        noise_kept, noise_largest = judge(noise, size, cfg)
        row = {"chunk": size, "largest": float(max(largest)), "taken": sum(not bool(k) for k in kept)}
        row |= {"old_rule": sum(old_rule_takes(losses, size) for losses in documents)}
        row |= {"noise_largest": float(noise_largest.max()), "noise_taken": int((~noise_kept).sum())}
        rows.append(row)
    facts = {"limit": cfg.ttt_guard, "documents": len(documents), "targets": len(every)}
    facts |= {"mean": float(every.mean()), "deviation": float(every.std()), "invented": len(noise)}
    if chosen.json:
        print(json.dumps(facts | {"rows": rows}))
        return 0
    print(" ".join(f"{name}:{value:.6g}" for name, value in facts.items()))
    for row in rows:
        print(" ".join(f"{name}:{value:.4g}" for name, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
