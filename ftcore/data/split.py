"""Rows held out, classes balanced, shares of sources: pure functions of the rows and the seed."""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np

from ftcore.data.columns import LabelledText
from ftcore.errors import DataError

Keys = Sequence[Hashable]  # one of each row

def apportioned(shares: Mapping[Hashable, float], total: int) -> dict[Hashable, int]:
    """`total` seats by shares: whole quotas first, the rest to the largest remainders."""
    quotas = {name: total * share / sum(shares.values()) for name, share in shares.items()}
    seats = {name: int(quota) for name, quota in quotas.items()}
    rest = sorted(quotas, key=lambda name: seats[name] - quotas[name])
    return seats | {name: seats[name] + 1 for name in rest[: total - sum(seats.values())]}

def together(groups: Keys, pairs: Iterable[tuple[int, int]]) -> list[int]:
    """A number for each row, equal for rows of one group, rows of a pair, and those that hang
    together through others; the group None has one row."""
    parents = list(range(len(groups)))

    def root(row: int) -> int:
        while parents[row] != row:
            parents[row] = row = parents[parents[row]]
        return row

    first: dict[Hashable, int] = {}
    named = ((first.setdefault(g, row), row) for row, g in enumerate(groups) if g is not None)
    for one, other in (*pairs, *named):
        parents[root(other)] = root(one)
    return [root(row) for row in range(len(parents))]

def held_out(strata: Keys, groups: Keys, count: int, seed: int) -> np.ndarray:
    """Which rows are held out (bool): `count`, or a few less where groups, which stay on one side,
    are large; of each stratum, a class, they have the share that all rows have."""
    if count >= len(strata):
        raise DataError(f"data.holdout = {count}: train has {len(strata)} rows; hold out fewer")
    room = Counter(apportioned(Counter(strata), count))
    members: dict[Hashable, list[int]] = {}
    for row in np.random.default_rng([seed, len(strata)]).permutation(len(strata)).tolist():
        members.setdefault(groups[row], []).append(row)
    held = np.zeros(len(strata), dtype=bool)
    for rows in members.values():
        wanted = Counter(strata[row] for row in rows)
        if wanted <= room:
            room -= wanted
            held[rows] = True
    return held

def balanced(
    examples: Sequence[LabelledText], method: str, cap: float, seed: int
) -> list[LabelledText]:
    """Examples of one label each, their classes balanced.

    weights   an example of a class weighs in inverse proportion to the class, at most `cap`, and
              the mean over all rows is 1 where the cap does not bite
    over      rows are repeated, at most `cap` times in all, up to the size of the largest class
    under     no class keeps more than `cap` times the rows of the smallest
    """
    counts = Counter(example.label for example in examples)
    if method == "weights":
        even = len(examples) / len(counts)
        return [e._replace(weight=min(cap, even / counts[e.label])) for e in examples]
    largest, smallest = max(counts.values()), min(counts.values())
    random, copies = np.random.default_rng([seed, 1]), np.zeros(len(examples), dtype=int)
    for label, count in counts.items():
        rows = [row for row, example in enumerate(examples) if example.label == label]
        over, under = min(largest, math.floor(cap * count)), min(count, math.floor(cap * smallest))
        copies[rows], rest = divmod(over if method == "over" else under, count)
        copies[random.permutation(rows)[:rest]] += 1
    return [e for e, times in zip(examples, copies, strict=True) for _ in range(times)]

def mixed(source_B: np.ndarray, weights: Sequence[float], *, seed: int, epoch: int) -> np.ndarray:
    """Rows of one epoch (int64), as many as there are: the share of each source, whose number is in
    `source_B`, is its weight's, its rows come in turn, none again before all were read."""
    order, seats = [], apportioned(dict(enumerate(weights)), len(source_B))
    for source, seat in seats.items():
        rows = np.flatnonzero(source_B == source)
        first, last = epoch * seat, (epoch + 1) * seat
        for turn in range(first // len(rows), -(-last // len(rows))):
            begin = turn * len(rows)
            shuffled = np.random.default_rng([seed, source, turn]).permutation(rows)
            order.append(shuffled[max(first - begin, 0) : last - begin])
    together = np.concatenate(order)
    return together[np.random.default_rng([seed, epoch]).permutation(len(together))]
