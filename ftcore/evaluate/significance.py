"""How far a figure may be off, and whether two models differ: held-out rows drawn again.

Letters: B rows, C clusters of them, R draws of C clusters. `Figures` gives the metrics of any rows,
by their indices. Rows that say nearly the same are one cluster and come and go together: taken one
by one they would give too narrow an interval.

    interval    from the 2.5th to the 97.5th percentile of R draws
    p           of a difference d: 2 min(share of d <= 0, share of d >= 0), each draw of both models
    McNemar     of n rows that one model alone has right, k of them the one with less; twice
                P(X < k) + P(X = k) / 2 with X of Binomial(n, 1/2): the mid-p form

source  Efron 1979, Ann. Statist. 7, 1-26; Berg-Kirkpatrick et al. 2012, ACL D12-1091 (paired);
        Fagerland et al. 2013, BMC Med. Res. Methodol. 13:91 (mid-p)"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

Figures = Callable[[np.ndarray], Mapping[str, float]]
Intervals = dict[str, tuple[float, float]]  # lowest and highest value, by metric
DRAWS, LEVEL = 1000, 0.95

def draws(clusters_B: np.ndarray, seed: int, count: int = DRAWS) -> Iterator[np.ndarray]:
    """Row indices (int64) of each draw; clusters_B (int) are the same for rows of one cluster."""
    order_B = np.argsort(clusters_B, kind="stable")
    _, starts_C, sizes_C = np.unique(clusters_B[order_B], return_index=True, return_counts=True)
    random = np.random.default_rng(seed)
    for _ in range(count):
        picked_C = random.integers(len(starts_C), size=len(starts_C))
        sizes, firsts = sizes_C[picked_C], np.cumsum(sizes_C[picked_C]) - sizes_C[picked_C]
        places = np.arange(sizes.sum()) - np.repeat(firsts - starts_C[picked_C], sizes)
        yield order_B[places]

def intervals(figures: Figures, clusters_B: np.ndarray, *, seed: int = 0) -> Intervals:
    return _ranges([figures(rows) for rows in draws(clusters_B, seed)])

def compare(one: Figures, other: Figures, clusters_B: np.ndarray,
            others_B: np.ndarray | None = None, *, seed: int = 0) -> dict[str, dict[str, float]]:
    """`difference` of each metric, `one` less `other`, of the same rows by two models, or of other
    rows in the clusters others_B; its `low` and `high`, and `p`. Zero between: too few to tell."""
    theirs_B = clusters_B if others_B is None else others_B
    mine, theirs = draws(clusters_B, seed), draws(theirs_B, seed + (theirs_B is others_B))
    told = [_less(one(rows), other(others)) for rows, others in zip(mine, theirs, strict=True)]
    whole = _less(one(np.arange(len(clusters_B))), other(np.arange(len(theirs_B))))
    found: dict[str, dict[str, float]] = {}
    for name, (low, high) in _ranges(told).items():
        d_R = np.array([each[name] for each in told])
        sides = (1 + (d_R <= 0).sum(), 1 + (d_R >= 0).sum())  # the rows themselves count too
        p = min(1.0, 2 * float(min(sides)) / (1 + len(d_R)))
        found[name] = {"difference": whole[name], "low": low, "high": high, "p": p}
    return found

def mcnemar(right_B: np.ndarray, other_right_B: np.ndarray) -> float:
    """Mid-p of as uneven a number of rows that one model alone has right (bool); 1 without any."""
    alone, other = int((right_B & ~other_right_B).sum()), int((other_right_B & ~right_B).sum())
    n, k = alone + other, min(alone, other)
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1)]
    shares = [math.exp(each - n * math.log(2)) for each in logs]
    return min(1.0, 2 * (math.fsum(shares) - shares[-1] / 2))

def _less(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: one[name] - other[name] for name in one}

def _ranges(told: Sequence[Mapping[str, float]]) -> Intervals:
    values = {name: np.array([each[name] for each in told]) for name in told[0]}
    return {name: tuple(np.quantile(values_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist())
            for name, values_R in values.items() if np.isfinite(values_R).all()}
