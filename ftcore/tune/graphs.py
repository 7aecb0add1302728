"""Passes of a micro-batch as CUDA graphs: what a GPU was told once, Python need not tell it again.

A step of a small model is thousands of kernels, which take less time than Python to launch them. A
graph holds for sizes, so streams are filled up: the tokens by one document of weight 0, the scored
rows by its last row, the tables of tiles by copies of their cheapest. The first micro-batch of some
sizes is computed as ever, the second captured; from then on they are replayed: the same kernels
over the same places, into which a batch is written."""

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ftcore.data.pack import Batch, Encoded, collate
from ftcore.tune.optim import AdamW
from kernels.graph import Recorder, Replay

GRAIN, MORE_DOCS = 512, 32  # tokens and scored rows, and documents, are filled up to a multiple
MOST = 64  # graphs of a run; batches of other sizes are computed as ever
Passes = Callable[[Batch, Tensor], Tensor]  # (batch, factor of the loss) to the loss sum

def filled(documents: Sequence[Encoded]) -> Batch:
    """A batch of a token task, with a last document and last rows that count nothing."""
    zeros_T = np.zeros(GRAIN - sum(map(len, documents)) % GRAIN, np.int32)
    batch = collate([*documents, Encoded("", zeros_T, zeros_T, zeros_T.astype(np.float32))])
    more = -len(batch.scored_M) % GRAIN
    return replace(batch, scored_M=F.pad(batch.scored_M, (0, more), value=len(batch.tokens_N) - 1))

class Graphs(Recorder):
    """The passes of a run on its GPU; gradients go to the optimiser's buffer."""

    def __init__(self, passes: Passes, optimizer: AdamW, device: torch.device) -> None:
        super().__init__(device)
        self.passes, self.optimizer = passes, optimizer
        self.tilings: dict[Hashable, list] = {}  # by sizes: arguments of `Docs.tiles`
        self.graphs: dict[Hashable, tuple[Batch, Tensor, Tensor, set[str], Replay]] = {}

    def __call__(self, documents: Sequence[Encoded], factor: float) -> Tensor:
        """The loss sum of documents of a token task; `factor` is on its gradients."""
        batch = filled(documents)
        sizes = (len(batch.tokens_N), len(batch.scored_M), batch.docs.num_docs // MORE_DOCS,
                 batch.docs.is_short, len(self.optimizer.stale))
        with self.aside():
            return self._passed(sizes, batch, torch.tensor(factor))

    def _passed(self, sizes: Hashable, batch: Batch, factor: Tensor) -> Tensor:
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
            table.copy_(self._table(batch, tiling))
        my_factor.copy_(factor)
        replay()
        self.optimizer.stale -= reached
        return loss

    def _table(self, batch: Batch, tiling: tuple[int, int, int, int]) -> Tensor:
        """The tiles of a batch, filled up to as many as one of its sizes can have."""
        rows, columns, back, ahead = tiling
        tiles = batch.docs.tiles(rows, columns, back=back, ahead=ahead)
        most = len(batch.tokens_N) // rows + MORE_DOCS * (batch.docs.num_docs // MORE_DOCS + 1)
        return torch.cat([tiles, tiles[-1:].expand(most - len(tiles), -1)])

    def _capture(self, sizes: Hashable, batch: Batch, factor: Tensor) -> None:
        mine, my_factor = batch.to(self.device), factor.to(self.device)
        for tiling in self.tilings[sizes]:
            mine.docs.by_tiling[tiling] = self._table(batch, tiling).to(self.device)
        before = set(self.optimizer.stale)
        try:
            loss, replay = self.recorded(partial(self.passes, mine, my_factor))
            self.graphs[sizes] = mine, my_factor, loss, before - self.optimizer.stale, replay
        except RuntimeError as error:  # an operation that waits for the device
            self.tilings[sizes] = []
            logging.getLogger(__name__).warning("computed without a CUDA graph: %s", error)
        self.optimizer.stale = before
