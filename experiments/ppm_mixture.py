"""A byte model beside the network: the PPM-D mixture of PR #1858 on a finished run. Not a legal score.

    python experiments/ppm_mixture.py RUN_DIR [--sample N] [--data DIR] [--json]

The run's artifact scores its validation data by the script's own evaluator (sliding windows if the run used
them), without adaptation. An order-5 PPM-D model (ppmd.py) reads the same stream as bytes and learns each
byte after it is scored. Both are mixed in probability, byte by byte: p = w p_network + (1 - w) p_PPM with

    w = 0.05 where PPM is confident (one symbol has 0.9 of its longest context's counts) and the network is
        not sure (its most probable token costs 0.277 nats or more), else 0.9.

Neither condition looks at the byte, or at the token, that is being scored. (PR #1885's guard did: it asked
what the *realised* token costs. That variant is printed too, to show what looking is worth.)

Two numbers come out, and they differ because the first is no probability:

* **as published**: a token of n bytes and probability P gives each of its bytes P^(1/n). P and n are those of
  the realised token, which nobody knows before it: over the bytes that could come next these shares are no
  distribution. And that a token ends is never paid for: where PPM knows how a word goes on, "t", "th", "the"
  all get its probability in full, though only one of them can be next. The probability that this form hands
  out over the whole vocabulary is measured at some positions; it has to be 1. Rejected as C2 in the scan of
  #1902; issue #1872, about all such mixtures, is open.
* **normalised**: the network's distribution over tokens is summed up to one over bytes, p(next byte | bytes
  of the token so far) = (tokens that go on with it) / (tokens that go on); whether a token ends here, and
  which of those that spell the same it is, the network says alone. PPM's distribution is restricted to bytes
  with which some token goes on. The product is a distribution over the vocabulary that sums to one before
  the token is known. It needs the network's whole distribution at each token, so it is computed on a sample;
  the published form is given on the same sample.

The bytes are those of the tokens: with CaseOps the encoded text, an operator being one byte that UTF-8 never
uses. It spells the original, so its cost counts in full, and is divided by the bytes of the *original* text.
A token without bytes (BOS) costs what the network says. Even the normalised number is no contest score: the
artifact's counted code does not hold the mixture, and nobody has ruled on it.
"""

import argparse
import bisect
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lossless_caps  # noqa: E402
import train_gpt as tg  # noqa: E402
from harness.manifest import check_data  # noqa: E402
from harness.readers import read_artifact  # noqa: E402
from systems.plain_text import load_tokenizer  # noqa: E402
from systems.stream import SlidingEvaluation  # noqa: E402

LOW, HIGH, SURE = 0.05, 0.9, 0.277  # the network's weight; nats (0.4 bits) below which it is sure
OPERATORS = (lossless_caps.TITLE, lossless_caps.ALLCAPS, lossless_caps.CAPNEXT, lossless_caps.ESC)
FIRST_OPERATOR_BYTE = 0xF8  # 0xF8 to 0xFB stand nowhere in UTF-8
MASS_POSITIONS, BLOCK = 64, 1 << 20  # tokens
NOTICE = (
    "NOT A CONTEST SCORE (never val_bpb): a PPM-D mixture is not settled (issue #1872), its published form "
    "is no distribution (C2, rejected in the scan of #1902), and its code is not in the artifact"
)
WHY = (
    "Why they differ: p^(1/n) takes p and n from the token that is yet to come, so it is no distribution "
    "over bytes, and that a token ends is never paid for, so PPM's share goes in full to every token that "
    "begins alike: over the vocabulary the published form adds up to the figure above, not to 1. The "
    "normalised form mixes conditional distributions and pays for the end; what it gains is what PPM knows."
)


# -- tokens as bytes


def surface(processor: object, token: int) -> bytes:
    """The bytes that a token stands for: none for a control piece, one for an operator."""
    if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
        return b""
    piece = processor.id_to_piece(token)
    if processor.is_byte(token):
        return bytes([int(piece[1:-1], 16)])
    if piece in OPERATORS:
        return bytes([FIRST_OPERATOR_BYTE + OPERATORS.index(piece)])
    return piece.replace("\u2581", " ").encode()


class Prefix(NamedTuple):
    """The tokens that begin with some bytes, as places in the sorted vocabulary."""

    low: int
    longer: int  # tokens from `low` to here are exactly these bytes
    high: int
    following: np.ndarray  # uint8 [k]: the bytes with which a longer one can go on
    starts: np.ndarray  # [k]: where the tokens of each begin


class Vocabulary:
    """The spelling of each token."""

    def __init__(self, surfaces: Sequence[bytes]):
        self.surfaces = list(surfaces)
        self.lengths = np.array([len(s) for s in self.surfaces])
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.bytes = np.frombuffer(b"".join(self.surfaces), np.uint8)
        self.order = np.array(sorted(range(len(self.surfaces)), key=self.surfaces.__getitem__))
        self._sorted = [self.surfaces[token] for token in self.order]
        self.prefix = functools.cache(self._prefix)

    def spell(self, tokens: np.ndarray) -> np.ndarray:
        """The bytes of tokens [n], one after the other, uint8."""
        lengths = self.lengths[tokens]
        ends = np.cumsum(lengths)
        place = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        return self.bytes[np.repeat(self.starts[tokens], lengths) + place]

    def _prefix(self, prefix: bytes) -> Prefix:
        size = len(prefix)
        low, high = (
            side(self._sorted, prefix, key=lambda s: s[:size])
            for side in (bisect.bisect_left, bisect.bisect_right)
        )
        longer = bisect.bisect_right(self._sorted, prefix)
        following = np.array([s[size] for s in self._sorted[longer:high]], np.uint8)
        values, starts = np.unique(following, return_index=True)
        return Prefix(low, longer, high, values, longer + starts)


# -- the network


class Recorder:
    """A model for the script's evaluators that keeps what it says about each target, in their order."""

    backends = tg.Backends()

    def __init__(self, model: tg.GPT, sample: np.ndarray):
        self._model, self._sample, self._done = model, sample, 0
        self._losses: list[np.ndarray] = []
        self._best: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []

    def losses(self, x, y, segments=None, *, looping, scored=None):
        """`GPT.losses`, by way of the whole distribution."""
        h = self._model.hidden(x, segments, looping=looping, wanted=scored)
        y = y if scored is None else y.gather(1, scored)
        distribution = self._model.logits(h).float().log_softmax(-1).flatten(0, 1)
        losses = -distribution.gather(-1, y.reshape(-1, 1))[:, 0]
        first, last = np.searchsorted(self._sample, [self._done, self._done + len(losses)])
        self._rows.append(distribution[self._sample[first:last] - self._done].cpu().numpy())
        self._losses.append(losses.double().cpu().numpy())
        self._best.append(distribution.max(-1).values.double().cpu().numpy())
        self._done += len(losses)
        return losses.view(y.shape)

    __call__ = losses

    def result(self) -> "Network":
        """What was said about all targets."""
        return Network(
            *(np.concatenate(part) for part in (self._losses, self._best, self._rows)), self._sample
        )


class Network(NamedTuple):
    """What the network says about each target [N], and all it says about the sampled ones."""

    losses: np.ndarray  # nats
    best: np.ndarray  # log probability of the most probable token
    rows: np.ndarray  # log probabilities [S, V] at
    sample: np.ndarray  # these targets, ascending, the first one first


def ask_network(
    model: tg.GPT, val: tg.ValidationSet, cfg: tg.Config, ranks: tg.Ranks, sample: int
) -> Network:
    """Score the whole stream with the script's evaluator. UserError if no sampled target carries a byte."""
    count = min(sample, val.num_targets)
    places = np.unique(np.linspace(0, val.num_targets, count, endpoint=False).astype(int))
    if not val.target_bytes[places].any():
        carrying = f"{int(val.target_bytes.bool().sum())} of all {val.num_targets} do"
        raise tg.UserError(f"--sample {sample}: no target carries a byte, at least one must; {carrying}")
    recorder = Recorder(model, places)
    looping = model.cfg.num_loops > 0 and model.cfg.enable_looping_at < 1  # as the model was trained
    kind = SlidingEvaluation if cfg.sliding_window_enabled else tg.StandardEvaluation
    meter = kind(recorder, val, cfg, looping=looping, ranks=ranks).run()
    network = recorder.result()
    if not math.isclose(network.losses.sum(), meter.loss_sum, rel_tol=1e-5):
        raise tg.RunError(f"recorded {network.losses.sum()} nats, the evaluator {meter.loss_sum}")
    return network


# -- the mixture


def gate(confident: np.ndarray, sure: np.ndarray) -> np.ndarray:
    """The network's weight at each byte."""
    return np.where(confident & ~sure, LOW, HIGH)


def as_published(losses, sure, lengths, ppm, confident) -> np.ndarray:
    """Nats of each token [n]: its loss spread evenly over its bytes, each mixed with PPM's.

    Args:
        losses, sure, lengths: of each token [n]: nats, is the network sure, bytes.
        ppm, confident: of each byte of the tokens: PPM's probability, and whether it is confident.
    """
    owner = np.repeat(np.arange(len(losses)), lengths)
    weight = gate(confident, np.asarray(sure)[owner])
    network = np.exp(-losses / np.maximum(lengths, 1))[owner]
    nats = -np.log(weight * network + (1 - weight) * ppm)
    return np.bincount(owner, nats, len(losses)) + np.where(lengths == 0, losses, 0.0)


def normalised(vocabulary: Vocabulary, row: np.ndarray, token: int, ppm) -> tuple[float, list]:
    """Nats of a token by the mixture that sums to one over the vocabulary; PPM learns its bytes.

    Args:
        row: the network's log probabilities of all tokens [V].

    Returns:
        nats, and what `PPMD.advance` says of each byte of the token.
    """
    p = np.exp(row.astype(np.float64))
    p /= p.sum()
    ordered, spelling = p[vocabulary.order], vocabulary.surfaces[token]
    sure = np.array(-row.max() < SURE)
    nats, heard = 0.0, []
    for size in range(len(spelling)):
        prefix = vocabulary.prefix(spelling[:size])
        longer = np.add.reduceat(ordered[: prefix.high], prefix.starts)
        ends = ordered[prefix.low : prefix.longer].sum()
        guess = ppm.distribution()[prefix.following]
        weight = gate(np.array(ppm.confident), sure)
        mixed = weight * longer / longer.sum() + (1 - weight) * guess / guess.sum()
        place = np.searchsorted(prefix.following, spelling[size])
        nats -= math.log(longer.sum() / (ends + longer.sum())) + math.log(mixed[place])
        heard.append(ppm.advance(np.frombuffer(spelling, np.uint8)[size : size + 1]))
    prefix = vocabulary.prefix(spelling)
    return nats - math.log(p[token] / ordered[prefix.low : prefix.high].sum()), heard


def mass(vocabulary: Vocabulary, row: np.ndarray, ppm) -> float:
    """What the published form hands out over all tokens that could come next (PPM frozen inside a token)."""
    losses = -row.astype(np.float64)
    heard = ppm.spell(vocabulary.bytes, vocabulary.starts)
    sure = np.full(len(losses), losses.min() < SURE)
    return float(np.exp(-as_published(losses, sure, vocabulary.lengths, *heard)).sum())


def mix(vocabulary: Vocabulary, network: Network, targets: np.ndarray, byte_counts: np.ndarray, ppm) -> dict:
    """Bits per original byte of every form; PPM reads the targets once, in order."""
    sums = dict.fromkeys(("network", "ppm", "as_published", "guard_that_looks"), 0.0)
    few = dict.fromkeys(("network", "as_published", "normalised"), 0.0)
    cuts = np.union1d(network.sample, np.arange(0, len(targets) + BLOCK, BLOCK).clip(max=len(targets)))
    weighed = set(network.sample[:: max(1, len(network.sample) // MASS_POSITIONS)].tolist())
    rows, masses, low = dict(zip(network.sample.tolist(), network.rows, strict=True)), [], 0
    for first, end in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        tokens, losses = targets[first:end], network.losses[first:end]
        lengths, heard, stop = vocabulary.lengths[tokens], [], first
        if first in rows:
            if first in weighed:
                masses.append(mass(vocabulary, rows[first], ppm))
            nats, heard = normalised(vocabulary, rows[first], int(tokens[0]), ppm)
            few["normalised"] += nats
            stop = first + 1
        heard.append(ppm.advance(vocabulary.spell(targets[stop:end])))
        guesses, confident = (np.concatenate(part) for part in zip(*heard, strict=True))
        sure = -network.best[first:end] < SURE
        published = as_published(losses, sure, lengths, guesses, confident)
        peeking = as_published(losses, losses < SURE, lengths, guesses, confident)
        alone = losses[lengths == 0].sum() - np.log(guesses).sum()
        for name, nats in zip(sums, (losses.sum(), alone, published.sum(), peeking.sum()), strict=True):
            sums[name] += float(nats)
        if first in rows:
            few["network"] += float(losses[0])
            few["as_published"] += float(published[0])
        low += int((confident & ~np.repeat(sure, lengths)).sum())
    size = int(vocabulary.lengths[targets].sum())
    return {
        "targets": len(targets),
        "original_bytes": int(byte_counts.sum()),
        "token_bytes": size,
        "bits_per_byte": _bits(sums, byte_counts),
        "low_weight_share": low / max(size, 1),
        "sample": {
            "targets": len(network.sample),
            "original_bytes": int(byte_counts[network.sample].sum()),
            "bits_per_byte": _bits(few, byte_counts[network.sample]),
        },
        "published_mass": {"mean": float(np.mean(masses)), "max": max(masses), "positions": len(masses)},
    }


def _bits(nats: dict[str, float], byte_counts: np.ndarray) -> dict[str, float]:
    return {name: value / math.log(2) / float(byte_counts.sum()) for name, value in nats.items()}


# -- the command


def read_run(folder: Path, data: str) -> tuple[dict, tg.Config, tg.GPT, tg.Ranks]:
    """Result, settings and artifact of a finished run. Raises UserError naming the file that does not fit."""
    path = folder / "result.json"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        told = {name.lower(): value for name, value in result["settings"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise tg.UserError(f"{path}: must be the result of a finished run") from None
    fields = {field.name for field in dataclasses.fields(tg.Config)}
    cfg = tg.Config(**{name: value for name, value in told.items() if name in fields})
    here = {"device": "auto", "attention_backend": "auto", "compile_backend": "off"}
    cfg = dataclasses.replace(cfg, **here, **({"data_path": data} if data else {}))
    ranks = tg.Ranks.from_env(cfg, {})
    backends = tg.plain_backends(cfg, ranks)
    path = folder / Path(cfg.quantized_model_path).name
    if not path.is_file():
        raise tg.UserError(f"{path}: no such file, must be the artifact of the run")
    settings, records = read_artifact(path.read_bytes(), tg.Config())
    model = tg.GPT(dataclasses.replace(cfg, **settings), backends)
    model.load_state_dict(tg.dequantize_state(records, model.cfg.num_layers))
    return result, cfg, backends.move_and_compile(model, ranks.device), ranks


def measure(folder: Path, data: str, sample: int) -> dict:
    """All figures of a run, as --json prints them."""
    try:
        from ppmd import PPMD
    except ModuleNotFoundError as error:
        raise tg.UserError(f"{error.name}: not installed; pip install -r requirements-dev.txt") from None
    result, cfg, model, ranks = read_run(folder, data)
    check_data(cfg, [])
    val = tg.load_validation(cfg)
    processor = load_tokenizer(cfg)
    vocabulary = Vocabulary([surface(processor, token) for token in range(cfg.vocab_size)])
    network = ask_network(model, val, cfg, ranks, sample)
    start, ppm = time.process_time(), PPMD()
    figures = mix(vocabulary, network, val.tokens[1:].long().numpy(), val.target_bytes.long().numpy(), ppm)
    stage = "sliding" if cfg.sliding_window_enabled else "quantised"
    return {
        "notice": NOTICE,
        "run": result.get("run"),
        "evaluation": "sliding windows" if cfg.sliding_window_enabled else "standard",
        "run_said": result.get("stages", {}).get(stage, {}).get("val_bpb"),
        **figures,
        "ppm_nodes": ppm.nodes,
        "mixture_seconds": time.process_time() - start,
        "legal": False,
    }


def report(figures: dict) -> str:
    """The figures in words."""
    whole, sample, mass_ = figures["bits_per_byte"], figures["sample"], figures["published_mass"]
    few = sample["bits_per_byte"]
    rows = [
        f"run {figures['run']}, {figures['evaluation']} evaluation of its artifact, no adaptation",
        f"on {figures['targets']:,} tokens: {figures['original_bytes']:,} original bytes, spelt with "
        f"{figures['token_bytes']:,}; bits per original byte:",
        f"  network alone             {whole['network']:.5f}  (the run says {figures['run_said']})",
        f"  PPM-D alone               {whole['ppm']:.5f}  ({figures['ppm_nodes']:,} nodes)",
        f"  mixture as published      {whole['as_published']:.5f}  ({figures['low_weight_share']:.1%} of the "
        f"bytes left to PPM)",
        f"  a guard that looks        {whole['guard_that_looks']:.5f}  (at the token's own cost: not causal)",
        f"on a sample of {sample['targets']:,} of these tokens, {sample['original_bytes']:,} original bytes:",
        f"  network alone             {few['network']:.5f}",
        f"  mixture as published      {few['as_published']:.5f}",
        f"  mixture normalised        {few['normalised']:.5f}",
        f"probability that the published form hands out over the vocabulary, at {mass_['positions']} "
        f"positions: mean {mass_['mean']:.3f}, largest {mass_['max']:.3f} (must be 1)",
        WHY,
    ]
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures between two notices (with --json on stderr). Exit code 0, or 2 (a mistake)."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> None:
            raise tg.UserError(message)

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    parser.add_argument("--sample", metavar="N", type=int, default=2000)
    parser.add_argument("--data", metavar="DIR", default="")
    parser.add_argument("--json", action="store_true")
    try:
        options = parser.parse_args(arguments)
        if options.sample < 1:
            raise tg.UserError(f"--sample {options.sample}: must be at least 1")
        notices = sys.stderr if options.json else sys.stdout
        print(NOTICE, file=notices, flush=True)
        figures = measure(options.run_dir, options.data, options.sample)
        print(json.dumps(figures) if options.json else report(figures), flush=True)
        print(NOTICE, file=notices)
    except tg.UserError as error:
        print(f"ppm_mixture.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
