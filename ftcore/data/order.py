"""Data order as a pure function of (seed, epoch, step): resuming replays nothing.

Step s of a run over n rows with b rows a step reads rows [j b, (j + 1) b) of the permutation of its
epoch, where epoch = s // k, j = s % k and k = ceil(n / b) steps make an epoch. The last step of an
epoch may be short; no row is dropped and none is seen twice in an epoch.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np

Order = Callable[..., np.ndarray]  # takes epoch=N

def epoch_order(num_rows: int, *, seed: int, epoch: int) -> np.ndarray:
    """Permutation of range(num_rows) for one epoch (int64)."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)

class StepRows:
    """Row indices (int64) of each optimiser step, counted from 0, of the `order` of an epoch, by
    its number; None: a permutation of all, `epoch_order`."""

    def __init__(
        self, num_rows: int, *, batch_size: int, seed: int, order: Order | None = None
    ) -> None:
        self.batch_size = batch_size
        self.steps_per_epoch = math.ceil(num_rows / batch_size)
        order = order or partial(epoch_order, num_rows, seed=seed)
        self._order = lru_cache(maxsize=1)(order)  # the current epoch's permutation is kept

    def __call__(self, step: int) -> np.ndarray:
        epoch, place = divmod(step, self.steps_per_epoch)
        return self._order(epoch=epoch)[place * self.batch_size : (place + 1) * self.batch_size]
