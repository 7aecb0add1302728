"""The order of rows is a function of (seed, step), and of nothing that happened before."""

import math
from functools import partial
import numpy as np
import pytest
from ftcore.data.pack import epoch_order, step_rows

def test_an_order_is_a_permutation_that_depends_on_seed_and_epoch_alone() -> None:
    first = epoch_order(100, seed=3, epoch=5)
    np.random.default_rng(9).random(7)
    assert first.tolist() == epoch_order(100, seed=3, epoch=5).tolist() and first.dtype == np.int64
    assert sorted(first.tolist()) == list(range(100))
    orders = {tuple(epoch_order(100, seed=s, epoch=e)) for s in range(4) for e in range(4)}
    assert len(orders) == 16

@pytest.mark.parametrize(("rows", "size"), [(10, 4), (12, 4), (3, 4), (1, 1), (97, 10)])
def test_every_row_is_seen_once_in_each_epoch(rows: int, size: int) -> None:
    steps = partial(step_rows, num_rows=rows, batch_size=size, seed=1)
    num_steps = math.ceil(rows / size)
    for epoch in range(3):
        batches = [steps(epoch * num_steps + place).tolist() for place in range(num_steps)]
        assert sorted(sum(batches, [])) == list(range(rows))
        assert [len(batch) for batch in batches[:-1]] == [size] * (num_steps - 1)
        assert len(batches[-1]) == (rows % size or size)  # short, but never dropped
        assert sum(batches, []) == epoch_order(rows, seed=1, epoch=epoch).tolist()

def test_a_late_step_replays_nothing() -> None:
    def made() -> int:
        return epoch_order.cache_info().misses

    steps = partial(step_rows, num_rows=10, batch_size=3, seed=0)
    before = made()
    resumed = steps(10**6).tolist()
    steps(10**6 + 1), steps(10**6 + 2), steps(10**6 + 3)  # one permutation for each epoch
    assert made() == before + 1
    steps(10**6 + 4)
    assert made() == before + 2
    assert step_rows(10**6, 10, batch_size=3, seed=0).tolist() == resumed
    assert steps(10**6).tolist() == resumed  # going back too
