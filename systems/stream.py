"""Plain windows, sliding-window evaluation, and test-time training by SGD between its chunks (PR #549, #1493)."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from train_gpt import (
    CONTEST_MICRO_BATCHES,
    CPU,
    GPT,
    BpbMeter,
    ChunkWindow,
    Config,
    ConfigError,
    Ranks,
    Run,
    Segments,
    ShuffledLoader,
    ValidationSet,
    document_segments,
    global_optimizer,
    global_sgd_chunk,
    global_sgd_lr,
)


class WindowLoader:
    """Training batches of plain windows in random order (PR #1493), one segment each.

    All ranks draw the same windows and take micro-batches in turn, so their number does not matter.
    """

    def __init__(self, paths: Sequence[Path], cfg: Config, ranks: "Ranks"):
        shared = ranks.world_size * cfg.micro_batches(ranks.world_size)
        self._rows, rest = divmod(cfg.train_batch_tokens // shared, cfg.train_seq_len)
        if rest:
            windows = f"{shared} micro-batches of whole windows of TRAIN_SEQ_LEN={cfg.train_seq_len} tokens"
            raise ConfigError(f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens}: must be {windows}")
        self._new = lambda: ShuffledLoader(paths, 1, 0, cfg.train_seq_len, cfg.vocab_size)
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


def evaluate_sliding(
    model: GPT,
    val: ValidationSet,
    cfg: Config,
    first: int,
    end: int,
    *,
    looping: bool,
    ranks: Ranks = CPU,
    on_event: Callable[..., None] | None = None,
) -> BpbMeter:
    """Score the targets from `first` to `end`: this rank's sums. Rows are plain: no document segments."""
    meter, rows = BpbMeter(), max(1, cfg.val_batch_tokens // CONTEST_MICRO_BATCHES // cfg.eval_seq_len)
    windows = sliding_windows(first, end, cfg.eval_seq_len, cfg.eval_stride)
    for _, alike in itertools.groupby(windows, lambda window: window[1:]):
        alike = list(alike)
        batches = [alike[start : start + rows] for start in range(0, len(alike), rows)]
        for batch in batches[ranks.rank :: ranks.world_size]:
            spans = [slice(window.start, window.start + window.length) for window in batch]
            x = torch.stack([val.tokens[span] for span in spans]).long()
            y = torch.stack([val.tokens[span.start + 1 : span.stop + 1] for span in spans]).long()
            scored = torch.arange(batch[0].offset, batch[0].length).expand(len(batch), -1)
            with torch.no_grad(), ranks.autocast():
                x, y, scored = (ranks.put(part) for part in (x, y, scored))
                losses = model.losses(x, y, looping=looping, scored=scored).cpu()
            if on_event:
                on_event("slid", windows=batch, losses=losses)
            for row, span in zip(losses, spans, strict=True):
                meter.add(row, val.target_bytes[span.stop - len(row) : span.stop])
    return meter


def evaluate_windows(
    model: GPT, val: ValidationSet, cfg: Config, *, on_event: Callable[..., None], **options: object
) -> BpbMeter:
    """Sliding windows over the whole stream; returns the sums of all ranks. Nothing is trained."""
    on_event("start", boundaries=[])
    meter = evaluate_sliding(model, val, cfg, 0, val.num_targets, on_event=on_event, **options)
    on_event("end")
    meter.sum_over(options["ranks"])
    return meter


def score_first_sgd(
    model: GPT,
    val: ValidationSet,
    cfg: Config,
    *,
    looping: bool,
    ranks: Ranks = CPU,
    on_event: Callable[..., None] | None = None,
) -> BpbMeter:
    """Chunks of the stream: score one by sliding windows, then train all base weights on it; not on the last.

    The rate is a cosine over the chunks. The model is changed in place.
    """
    on_event = on_event or (lambda kind, **data: None)
    on_event("start", boundaries=[])
    meter, size = BpbMeter(), cfg.ttt_chunk_tokens
    sgd = dataclasses.replace(
        cfg,
        global_ttt_lr=cfg.ttt_lr,
        global_ttt_momentum=cfg.ttt_momentum,
        global_ttt_epochs=cfg.ttt_epochs,
        global_ttt_warmup_chunks=0,
        global_ttt_respect_doc_boundaries=False,
    )
    optimizer, num_chunks = global_optimizer(model, sgd), -(-val.num_targets // size)
    options = {"looping": looping, "ranks": ranks}
    for chunk in range(num_chunks):
        first, end = chunk * size, min((chunk + 1) * size, val.num_targets)
        part = evaluate_sliding(model, val, cfg, first, end, on_event=on_event, **options)
        meter.add_sums(part.loss_sum, part.bytes, part.tokens)
        on_event("scored_span", chunk=chunk, first=first, end=end)
        if chunk < num_chunks - 1:
            rate, row = global_sgd_lr(chunk, num_chunks, sgd), val.tokens[first : end + 1]
            norms = global_sgd_chunk(model, row, sgd, optimizer, rate, **options)
            on_event("trained_span", chunk=chunk, first=first, tokens=row, steps=len(norms))
    meter.sum_over(ranks)
    return meter


def evaluate_stream(run: "Run", stage: str, evaluate: Callable[..., BpbMeter]) -> None:
    """A stage that evaluates the stream as one, unless it was: by sliding windows, or with SGD between."""
    if stage in run.stages:
        return
    progress, done = run.log.progress(stage, run.val.num_targets / run.ranks.world_size), 0

    def on_event(kind: str, **data: object) -> None:
        nonlocal done
        if run.ledger:
            run.ledger.record(kind, data)
        if kind == "slid":
            done += data["losses"].numel()
            progress.update(done)

    with run.watch.stage(stage):
        options = {"looping": run.looping, "ranks": run.ranks, "on_event": on_event}
        meter = evaluate(run.model, run.val, run.cfg, **options)
    run.record(stage, meter, run.val.documents)
