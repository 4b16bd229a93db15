"""What does the host do for one more chunk, batch or window where there are many documents or shards?

    python bench/growth.py [--json] [--repeats 3]

Processor microseconds, the least of some repeats: planning test-time training (a document) and charging a
scored chunk of 64 documents to the ledger, by validation documents (40 to 2,560); drawing a window in random
order, by shards (1 to 800). Each is to stay what it is, whatever their number.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from common import parser, report, tg

from bench.synthetic import make_tokens, write_shard  # noqa: E402
from harness.ledger import Ledger  # noqa: E402

DOCUMENTS, SHARDS = (40, 160, 640, 2560), (1, 8, 80, 800)
DRAWS = 20_000


def microseconds(work: Callable[[], object], repeats: int) -> float:
    """Processor time of a call, the least of some."""
    times = []
    for _ in range(repeats or 3):
        start = time.process_time()
        work()
        times.append(1e6 * (time.process_time() - start))
    return min(times)


def by_documents(count: int, repeats: int) -> dict[str, float]:
    """The plan of test-time training, a document; what 64 scored chunks of one batch cost the ledger."""
    lengths = np.random.default_rng(0).lognormal(np.log(567), 1.03, count).astype(int) + 2
    starts = [0, *np.cumsum(lengths)[:-1].tolist()]
    documents = list(zip(starts, lengths.tolist(), strict=True))
    val = tg.ValidationSet(torch.empty(0), torch.empty(int(lengths.sum()) - 1), documents)
    cfg, ranks = tg.Config(), tg.Ranks(torch.device("cpu"), 0, 8)

    def plan() -> None:
        ttt = tg.ScoreFirstTTT(None, val, cfg, looping=True, ranks=ranks)
        for part in tg.split_at_boundaries(ttt.batches, ttt.boundaries):
            tg.share_documents(part, cfg, ranks.world_size)

    ledger = object.__new__(Ledger)
    ledger._run, ledger.losses = SimpleNamespace(val=val), {}
    places, losses = starts[:: max(1, count // 64)][:64], torch.ones(64)
    ledger.charge("ttt", places, losses[: len(places)])

    def charge() -> None:
        for _ in range(64):
            ledger.charge("ttt", places, losses[: len(places)])

    planned, charged = microseconds(plan, repeats), microseconds(charge, repeats)
    return {"documents": count, "plan_us_a_document": planned / count, "charge_us_a_chunk": charged / 64}


def by_shards(paths: list[Path], repeats: int) -> dict[str, float]:
    """A window that is drawn, not read."""
    loader = tg.ShuffledLoader(paths, tg.Config(train_seq_len=16))
    drawn = microseconds(lambda: loader.draw(DRAWS), repeats)
    return {"shards": len(paths), "draw_us_a_window": drawn / DRAWS}


def main() -> None:
    """Measure and print."""
    options = parser(__doc__.split("\n")[0]).parse_args()
    rows = [by_documents(count, options.repeats) for count in DOCUMENTS]
    with tempfile.TemporaryDirectory() as folder:
        rng, paths = np.random.default_rng(0), []
        for number in range(SHARDS[-1]):
            paths.append(Path(folder) / f"fineweb_train_{number:06d}.bin")
            write_shard(paths[-1], make_tokens(20_000, 512, rng))
        rows += [by_shards(paths[:count], options.repeats) for count in SHARDS]
    growth = {}
    for key in ("plan_us_a_document", "charge_us_a_chunk", "draw_us_a_window"):
        costs = [row[key] for row in rows if key in row]
        growth[f"{key}_growth"] = costs[-1] / costs[0]
    report({"python": sys.version.split()[0], "torch": torch.__version__, **growth}, rows, options.json)


if __name__ == "__main__":
    main()
