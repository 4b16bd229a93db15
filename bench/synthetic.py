"""A data set of random tokens for speed measurements: shards in the contest's format and a tokenizer.

    python bench/synthetic.py --out DIR [--tokens N] [--vocab 8192]

Documents are as long as FineWeb's and each token prefers a few followers, so that losses fall. Only speed
means anything on it: set DATA_PATH=DIR, TOKENIZER_PATH=DIR/tokenizer.model and ALLOW_UNVERIFIED_DATA=1.
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataprep.shards import shard_bytes  # noqa: E402


def write_shard(path: Path, values: np.ndarray) -> None:
    """A shard of uint16 values."""
    path.write_bytes(shard_bytes(values))


def make_tokens(count: int, vocab: int, rng: np.random.Generator) -> np.ndarray:
    """Documents behind a BOS (1); a token's follower is one of eight."""
    steps = rng.integers(1, 9, count) * 37
    tokens = 4 + steps.cumsum() % (vocab - 4)
    starts = np.maximum(rng.lognormal(np.log(567), 1.03, count // 100 + 2), 2).astype(np.int64).cumsum()
    tokens[starts[starts < count]] = 1
    tokens[0] = 1
    return tokens


def write_tokenizer(path: Path, vocab: int) -> None:
    """A SentencePiece model of made-up words."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b"] * 10),
        model_writer=model,
        vocab_size=vocab,
        model_type="char",
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        user_defined_symbols=[f"w{i}" for i in range(vocab - 7)],
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def main() -> None:
    """Write the folder."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--out", type=Path, required=True)
    options.add_argument(
        "--tokens", type=int, default=20_000_000, help="training tokens, in shards of ten million"
    )
    options.add_argument("--val-tokens", type=int, default=1_000_000)
    options.add_argument("--vocab", type=int, default=8192)
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number, start in enumerate(range(0, args.tokens, 10_000_000)):
        count = min(10_000_000, args.tokens - start)
        write_shard(args.out / f"fineweb_train_{number:06d}.bin", make_tokens(count, args.vocab, rng))
    val = make_tokens(args.val_tokens, args.vocab, rng)
    write_shard(args.out / "fineweb_val_000000.bin", val)
    write_shard(args.out / "fineweb_val_bytes_000000.bin", np.where(val == 1, 0, 4))
    write_tokenizer(args.out / "tokenizer.model", args.vocab)


if __name__ == "__main__":
    main()
