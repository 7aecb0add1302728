"""How sure a metric is: bootstrap intervals and a paired test, from one value per row.

Rows are resampled with replacement; the interval runs between percentiles of the resampled means.
Two systems are compared row by row on the same rows, which is far sharper than comparing their
intervals. The same values and seed give the same interval.

sources: Efron and Tibshirani 1993, An Introduction to the Bootstrap, ch. 13 (percentile interval);
Fagerland, Lydersen and Laake 2013, BMC Med. Res. Methodol. 13:91 (McNemar mid-p).
"""

from collections.abc import Sequence
from typing import NamedTuple
import numpy as np
from ftcore.errors import DataError

Values = np.ndarray | Sequence[float]

class Interval(NamedTuple):
    """A mean and its percentile interval."""

    mean: float
    low: float
    high: float

def bootstrap_mean(
    values_B: Values, *, seed: int, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """Percentile interval, of coverage `level`, of the mean of one finite value per row.

    cost: resamples * B draws, 2^20 at a time
    """
    values_B = _checked(values_B)
    B = len(values_B)
    rng = np.random.default_rng(seed)
    block = max(1, 2**20 // B)
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    means = [values_B[rng.integers(0, B, (size, B))].mean(1) for size in sizes]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values_B.mean()), float(low), float(high))

def bootstrap_difference(
    a_B: Values, b_B: Values, *, seed: int, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """Interval of mean(b) - mean(a) over the same rows; one that holds 0 shows no difference."""
    a_B, b_B = _paired(a_B, b_B)
    return bootstrap_mean(b_B - a_B, seed=seed, resamples=resamples, level=level)

def mcnemar_midp(right_a_B: Values, right_b_B: Values) -> float:
    """Two-sided mid-p value of "a and b are right equally often", from 0/1 per row of each.

    n rows have only one of the two right, m of them the side with fewer. X ~ Binomial(n, 1/2):
    p = P(more extreme) + P(as extreme) / 2 = 2 P(X < m) + P(X = m), and 1 - P(X = m) / 2 where
    n = 2 m > 0; 1 where n = 0. Summed in integers, so exact for every n.
    """
    a_B, b_B = (x_B.astype(bool) for x_B in _paired(right_a_B, right_b_B))
    only_a, only_b = int((a_B & ~b_B).sum()), int((b_B & ~a_B).sum())
    n, m = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    ways, below = 1, 0  # C(n, k), and the sum of C(n, j) over j < k
    for k in range(m):
        below += ways
        ways = ways * (n - k) // (k + 1)
    return 1 - ways / 2 ** (n + 1) if only_a == only_b else (2 * below + ways) / 2**n

def _checked(values: Values) -> np.ndarray:
    values_B = np.asarray(values, dtype=np.float64)
    if values_B.ndim != 1 or not len(values_B) or not np.isfinite(values_B).all():
        raise DataError(f"values of shape {values_B.shape}: need finite numbers, one per row")
    return values_B

def _paired(a: Values, b: Values) -> tuple[np.ndarray, np.ndarray]:
    a_B, b_B = _checked(a), _checked(b)
    if len(a_B) != len(b_B):
        raise DataError(f"{len(a_B)} rows against {len(b_B)}: a paired test needs the same rows")
    return a_B, b_B
