"""Plain windows, sliding-window evaluation, and SGD between its chunks (PR #549, #1493)."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from train_gpt import (
    CONTEST_MICRO_BATCHES,
    BaseTraining,
    BpbMeter,
    ChunkWindow,
    Config,
    ConfigError,
    Evaluation,
    Ranks,
    Segments,
    ShuffledLoader,
    cosine_rate,
    document_segments,
)


class WindowLoader:
    """Training batches of plain windows in random order (PR #1493), one segment each.

    All ranks draw the same windows and take micro-batches in turn, so their number does not matter.
    """

    def __init__(self, paths: Sequence[Path], cfg: Config, ranks: Ranks, micro_tokens: int):
        self._rows, rest = divmod(micro_tokens, cfg.train_seq_len)
        if rest:
            count = cfg.train_batch_tokens // micro_tokens
            windows = f"{count} micro-batches of whole windows of TRAIN_SEQ_LEN={cfg.train_seq_len} tokens"
            raise ConfigError(f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens}: must be {windows}")
        self._new = lambda: ShuffledLoader(paths, cfg)
        self._rank, self._world_size, self._length = ranks.rank, ranks.world_size, cfg.train_seq_len
        self.load_state((0, 0, 0))

    def next(self) -> tuple[Tensor, Tensor, Segments]:
        """The next micro-batch of this rank: inputs [1, n], targets [1, n], segments."""
        self._windows.skip(self._rank * self._rows)
        x, y = (part.reshape(1, -1) for part in self._windows.next(self._rows))
        self._windows.skip((self._world_size - 1 - self._rank) * self._rows)
        self._taken += self._world_size * self._rows
        return x, y, document_segments([], x.numel(), self._length)

    def state(self) -> tuple[int, int, int]:
        """Position, in the form of `PackedLoader`'s: windows drawn so far, by all ranks."""
        return 0, 0, self._taken

    def load_state(self, state: tuple[int, int, int]) -> None:
        """Go to a position: draw anew what lies before it."""
        self._windows, self._taken = self._new(), state[2]
        self._windows.skip(self._taken)


def sliding_windows(first: int, end: int, window: int, stride: int) -> list[ChunkWindow]:
    """Windows over a stream that score the targets from `first` to `end`, `stride` each, once.

    Each sees the last `window` inputs; the stream's very first one scores all of its own.
    """
    windows, done = [], first
    while done < end:
        stop = min(max(done + stride, window), end)
        start = max(0, stop - window)
        windows.append(ChunkWindow(start, stop - start, done - start, stop - done))
        done = stop
    return windows


class SlidingEvaluation(Evaluation):
    """Sliding windows over the whole stream, in plain rows: no document segments. Nothing is trained.

    A unit is a batch of windows.
    """

    def __init__(self, *arguments: object, **options: object):
        super().__init__(*arguments, **options)
        self.total = self.val.num_targets / self.ranks.world_size

    def slide(self, first: int, end: int, meter: BpbMeter) -> Iterable[None]:
        """Add this rank's share of the targets from `first` to `end` to a meter; yields after each batch."""
        cfg, ranks = self.cfg, self.ranks
        rows = max(1, cfg.val_batch_tokens // CONTEST_MICRO_BATCHES // cfg.eval_seq_len)
        windows = sliding_windows(first, end, cfg.eval_seq_len, cfg.eval_stride)
        for _, alike in itertools.groupby(windows, lambda window: window[1:]):
            alike = list(alike)
            batches = [alike[start : start + rows] for start in range(0, len(alike), rows)]
            for batch in batches[ranks.rank :: ranks.world_size]:
                self._score(batch, meter)
                yield

    def _score(self, windows: Sequence[ChunkWindow], meter: BpbMeter) -> None:
        """Score windows of one form side by side."""
        val, spans = self.val, [slice(window.start, window.start + window.length) for window in windows]
        x = torch.stack([val.tokens[span] for span in spans]).long()
        y = torch.stack([val.tokens[span.start + 1 : span.stop + 1] for span in spans]).long()
        scored = torch.arange(windows[0].offset, windows[0].length).expand(len(windows), -1)
        with torch.no_grad(), self.ranks.autocast():
            x, y, scored = (self.ranks.put(part) for part in (x, y, scored))
            losses = self.model.losses(x, y, looping=self.looping, scored=scored).cpu()
        self.watch.see("slid", windows=windows, losses=losses)
        for row, span in zip(losses, spans, strict=True):
            meter.add(row, val.target_bytes[span.stop - len(row) : span.stop])
        self.done += losses.numel()

    def units(self) -> Iterable[None]:
        """Slide over the stream."""
        self.watch.see("start", boundaries=[])
        yield from self.slide(0, self.val.num_targets, self.meter)
        self.watch.see("end")
        self.meter.sum_over(self.ranks)


class ScoreFirstSGD(SlidingEvaluation):
    """Chunks of the stream: score one by sliding windows, then train all base weights on it; not on the last.

    The rate is a cosine over the chunks. The model is changed in place. A unit is a chunk.
    """

    def units(self) -> Iterable[None]:
        """Score and train chunk after chunk."""
        self.watch.see("start", boundaries=[])
        cfg, val, size = self.cfg, self.val, self.cfg.ttt_chunk_tokens
        optimizer = torch.optim.SGD(self.model.parameters(), cfg.ttt_lr, cfg.ttt_momentum)
        training = BaseTraining(self.model, cfg, False, self.looping, self.ranks)
        chunks = -(-val.num_targets // size)
        for chunk in range(chunks):
            first, end = chunk * size, min((chunk + 1) * size, val.num_targets)
            part, tokens = BpbMeter(), val.tokens[first : end + 1]
            for _ in self.slide(first, end, part):
                pass
            self.meter.add_sums(*part.sums)
            self.watch.see("scored_span", chunk=chunk, first=first, end=end)
            if chunk < chunks - 1:
                rate = cosine_rate(cfg.ttt_lr, chunk, chunks)
                steps = len(training.train(tokens, optimizer, rate, cfg.ttt_epochs))
                self.watch.see("trained_span", chunk=chunk, first=first, tokens=tokens, steps=steps)
            yield
        self.meter.sum_over(self.ranks)
