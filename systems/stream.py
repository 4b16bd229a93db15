"""Plain windows, sliding-window evaluation, and SGD between its chunks (PR #549, #1493)."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from train_gpt import (
    BOS,
    CONTEST_MICRO_BATCHES,
    GPT,
    BaseTraining,
    BpbMeter,
    ChunkWindow,
    Config,
    ConfigError,
    Evaluation,
    Ranks,
    Run,
    Segments,
    ShuffledLoader,
    ValidationSet,
    compiled_graphs,
    copy_tensors,
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
        self._windows = ShuffledLoader(paths, cfg)
        self._rank, self._world_size, self._length = ranks.rank, ranks.world_size, cfg.train_seq_len

    def next(self) -> tuple[Tensor, Tensor, Segments]:
        """The next micro-batch of this rank: inputs [1, n], targets [1, n], segments."""
        self._windows.draw(self._rank * self._rows)
        x, y = (part.reshape(1, -1) for part in self._windows.next(self._rows))
        self._windows.draw((self._world_size - 1 - self._rank) * self._rows)
        return x, y, document_segments([], x.numel(), self._length)

    def state(self) -> tuple[dict, dict, list[int]]:
        """Position: PCG64 as it was before the windows were made, and as it is; how many are left where."""
        windows = self._windows
        return windows.began, windows.rng.bit_generator.state, windows.left.tolist()

    def load_state(self, state: tuple[dict, dict, list[int]]) -> None:
        """Go to a position: the windows are made again, and none of those before it is drawn."""
        windows, (began, now, left) = self._windows, state
        windows.rng.bit_generator.state = began
        windows.reset()
        windows.rng.bit_generator.state, windows.left = now, np.array(left)


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


def rows_of_windows(cfg: Config) -> int:
    """Windows that are scored side by side."""
    return max(1, cfg.val_batch_tokens // CONTEST_MICRO_BATCHES // cfg.eval_seq_len)


class SlidingEvaluation(Evaluation):
    """Sliding windows over the whole stream, in plain rows: no document segments. Nothing is trained.

    A unit is a batch of windows.
    """

    def __init__(self, *arguments: object, **options: object):
        super().__init__(*arguments, **options)
        self.total = self.val.num_targets / self.ranks.world_size
        self._rows = rows_of_windows(self.cfg)

    def slide(self, first: int, end: int, meter: BpbMeter) -> Iterable[None]:
        """Add this rank's share of the targets from `first` to `end` to a meter; yields after each batch."""
        cfg, ranks, rows = self.cfg, self.ranks, self._rows
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
        losses = self._losses(x, y, scored)
        self.watch.see("slid", windows=windows, losses=losses)
        for row, span in zip(losses, spans, strict=True):
            meter.add(row, val.target_bytes[span.stop - len(row) : span.stop])
        self.done += losses.numel()

    @torch.no_grad()
    def _losses(self, *rows: Tensor) -> Tensor:
        """Losses of rows x and y [n, T] at the places `scored` [n, t], on the CPU.

        Whole windows that score a stride have a graph, which is always given as many rows.
        """
        cfg, ranks, count, width = self.cfg, self.ranks, len(rows[0]), rows[2].size(1)
        x, y, scored = (ranks.put(part) for part in rows)
        with ranks.autocast():
            if not self.model.backends.compiler or (x.size(1), width) != (cfg.eval_seq_len, cfg.eval_stride):
                return self.model.losses(x, y, looping=self.looping, scored=scored).cpu()
            x, y, scored = (F.pad(part, (0, 0, 0, self._rows - count)) for part in (x, y, scored))
            return self.model(x, y, looping=self.looping, scored=scored)[:count].cpu()

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


def score_stream(run: Run, stage: str) -> None:
    """Do the stage "sliding", or "ttt" with SGD. Graphs are made before its clock starts."""
    kind = ScoreFirstSGD if stage == "ttt" else SlidingEvaluation
    if run.model.backends.compiler:
        from systems.compiled import compile_graphs

        compile_graphs(run, stage, lambda: warm_up_stream(run.model, kind, run.looping, run.ranks))
    run.score(stage, kind)


def warm_up_stream(model: GPT, kind: type[SlidingEvaluation], looping: bool, ranks: Ranks) -> int:
    """Do on random tokens what a stage does of each form; afterwards the weights are what they were.

    Returns the number of graphs.
    """
    cfg, before, graphs = model.cfg, copy_tensors(model.state_dict()), compiled_graphs()
    batch = rows_of_windows(cfg) * cfg.eval_stride
    count = cfg.eval_seq_len + ranks.world_size * batch  # one for each rank
    if kind is ScoreFirstSGD:
        count = 2 * cfg.ttt_chunk_tokens  # the last chunk is not trained on
    tokens = torch.randint(BOS, cfg.vocab_size, (count + 1,), generator=torch.Generator().manual_seed(0))
    try:
        kind(model, ValidationSet(tokens, tokens[1:], []), cfg, looping=looping, ranks=ranks).run()
    finally:
        model.zero_grad(set_to_none=True)
        model.load_state_dict(before)
    return compiled_graphs() - graphs
