"""Passes as CUDA graphs: what a GPU was told once, Python need not tell it again.

A step of a small model is thousands of kernels, which take less time than Python to launch them. A
graph holds for sizes, so streams are filled up: in training the tokens by one document of weight 0,
the scored rows by its last row, the tables of tiles by copies of their cheapest; in decoding by
copies of a sequence. The first pass of some sizes is computed as ever, the second captured; from
then on they are replayed: the same kernels over the same places, into which what is new is
written."""

import gc
import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol
import torch
from torch import Tensor
from kernels.docs import Docs

GRAIN, MORE_DOCS = 512, 32  # tokens and scored rows, and documents, are filled up to a multiple
MOST = 64  # graphs of a run; batches of other sizes are computed as ever
Replay = Callable[[], None]
Passes = Callable[[Any, Tensor], Tensor]  # (batch, factor of the loss) to the loss sum

def recorded(run: Callable[[], Tensor], **where: Any) -> tuple[Tensor, Replay]:
    """What `run` returns, not yet computed, and what computes it, as often as it is called; `where`
    are pool and stream of the graph. Raises RuntimeError: an operation waits for the device."""
    graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
    gc.disable()  # an old graph that is collected while this one is captured ends the capture
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local", **where):
            return run(), graph.replay
    finally:
        if collects:
            gc.enable()

class Replays:
    """Passes without gradients, by key: computed once, then captured, from then on replayed."""

    def __init__(self) -> None:
        self.graphs: dict[Hashable, tuple[Any, ...]] = {}

    def __call__(self, key: Hashable, run: Callable[[], Tensor], table: Tensor) -> Tensor:
        """What `run` returns, until the next call; all it reads that changes is in the table."""
        if key not in self.graphs:
            result = run()
            self.graphs[key] = ()
            return result
        self.graphs[key] = self.graphs[key] or (*recorded(run), table)
        result, replay, mine = self.graphs[key]
        mine.copy_(table)
        replay()
        return result

class Sink(Protocol):
    """Where the gradients go."""
    stale: set[str]  # what the passes have not reached yet

class Graphs:
    """The passes of a run on its GPU, on a stream of their own, since autograd remembers the stream
    that a parameter was used on. A batch is a dataclass of tensors: tokens_N, scored_M, `docs`."""

    def __init__(self, passes: Passes, sink: Sink, device: torch.device) -> None:
        self.passes, self.sink, self.device = passes, sink, device
        if device.type == "cuda":
            self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.tilings: dict[Hashable, list] = {}  # by sizes: arguments of `Docs.tiles`
        self.graphs: dict[Hashable, tuple[Any, Tensor, Tensor, set[str], Replay]] = {}

    def __call__(self, batch: Any, factor: float) -> Tensor:
        """The loss sum of a batch that is filled up; `factor` is on its gradients."""
        sizes = (len(batch.tokens_N), len(batch.scored_M), len(batch.docs.lengths) // MORE_DOCS,
                 batch.docs.is_short, len(self.sink.stale))
        with self.aside():
            return self._passed(sizes, batch, torch.tensor(factor))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """On the stream of the graphs, between what came before and what comes after."""
        main = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            yield
        main.wait_stream(self.stream)

    def _passed(self, sizes: Hashable, batch: Any, factor: Tensor) -> Tensor:
        if sizes not in self.graphs and self.tilings.get(sizes) and len(self.graphs) < MOST:
            self._capture(sizes, batch, factor)
        if sizes not in self.graphs:
            loss = self.passes(batch := batch.to(self.device), factor.to(self.device))
            # a plan by values, of the path without kernels, is not written anew
            by_tiles = () if "walk" in vars(batch.docs) else batch.docs.by_tiling
            self.tilings.setdefault(sizes, [*by_tiles])
            return loss
        mine, my_factor, loss, reached, replay = self.graphs[sizes]
        for old, new in zip(vars(mine).values(), vars(batch).values(), strict=True):
            if isinstance(old, Tensor):
                old.copy_(new)
        for tiling, table in mine.docs.by_tiling.items():
            table.copy_(filled_tiles(batch.docs, tiling))
        my_factor.copy_(factor)
        replay()
        self.sink.stale -= reached
        return loss

    def _capture(self, sizes: Hashable, batch: Any, factor: Tensor) -> None:
        mine, my_factor = batch.to(self.device), factor.to(self.device)
        for tiling in self.tilings[sizes]:
            mine.docs.by_tiling[tiling] = filled_tiles(batch.docs, tiling).to(self.device)
        before = set(self.sink.stale)
        try:
            run = partial(self.passes, mine, my_factor)
            loss, replay = recorded(run, pool=self.pool, stream=self.stream)
            self.graphs[sizes] = mine, my_factor, loss, before - self.sink.stale, replay
        except RuntimeError as error:  # an operation that waits for the device
            self.tilings[sizes] = []
            logging.getLogger(__name__).warning("computed without a CUDA graph: %s", error)
        self.sink.stale = before

def filled_tiles(docs: Docs, tiling: tuple[int, int, int, int]) -> Tensor:
    """The tiles of documents, filled up to as many as some of their sizes can have."""
    rows, columns, back, ahead = tiling
    tiles = docs.tiles(rows, columns, back=back, ahead=ahead)
    most = docs.num_tokens // rows + MORE_DOCS * (len(docs.lengths) // MORE_DOCS + 1)
    return torch.cat([tiles, tiles[-1:].expand(most - len(tiles), -1)])
