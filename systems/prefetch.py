"""Training batches prepared in the background, for a GPU that must not wait for them."""

from concurrent.futures import ThreadPoolExecutor

import torch

from train_gpt import Batch, PackedLoader


class Prefetched:
    """A loader whose next micro-batch is prepared in the background, in pinned memory for a quick copy."""

    def __init__(self, loader: PackedLoader):
        self._loader, self._pool, self._next = loader, ThreadPoolExecutor(1), None
        self.load_state(loader.state())

    def _load(self) -> tuple[Batch, object]:
        x, y, segments = self._loader.next()
        if torch.cuda.is_available():
            x, y, cu_seqlens = (part.pin_memory() for part in (x, y, segments.cu_seqlens))
            segments = segments._replace(cu_seqlens=cu_seqlens)
        return (x, y, segments), self._loader.state()

    def next(self) -> Batch:
        """As the loader's."""
        batch, self._state = self._next.result()
        self._next = self._pool.submit(self._load)
        return batch

    def state(self) -> object:
        """Position behind the last batch that was taken."""
        return self._state

    def load_state(self, state: object) -> None:
        """Go back to a position; what lies ready is thrown away."""
        if self._next:
            self._next.exception()
        self._loader.load_state(state)
        self._state, self._next = state, self._pool.submit(self._load)
