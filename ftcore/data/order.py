"""Data order as a pure function of (seed, epoch, step): resuming replays nothing.

Step s of a run over n rows with b rows a step reads rows [j b, (j + 1) b) of the permutation of its
epoch, where epoch = s // k, j = s % k and k = ceil(n / b) steps make an epoch. The last step of an
epoch may be short; no row is dropped and none is seen twice in an epoch.
"""

import math

import numpy as np


def epoch_order(num_rows: int, *, seed: int, epoch: int) -> np.ndarray:
    """Permutation of range(num_rows) for one epoch (int64)."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Optimiser steps that show every row once."""
    return math.ceil(num_rows / batch_size)


class StepRows:
    """Rows of each optimiser step.

    num_rows     rows of the training set
    batch_size   rows of one step
    seed         of the permutations
    """

    def __init__(self, num_rows: int, *, batch_size: int, seed: int) -> None:
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = steps_per_epoch(num_rows, batch_size)
        self._cached: tuple[int, np.ndarray] | None = None  # the current epoch's permutation

    def __call__(self, step: int) -> np.ndarray:
        """Row indices of step `step` (0-based), int64."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, epoch_order(self.num_rows, seed=self.seed, epoch=epoch))
        return self._cached[1][place * self.batch_size : (place + 1) * self.batch_size]
