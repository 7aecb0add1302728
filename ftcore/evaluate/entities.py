"""Entities in sequences of tags, counted as the CoNLL-2000 script and seqeval's default mode do.

A tag is a mark (B, I, O, also E and S) and a type: "B-LOC"; marks may stand in any order. An entity
begins where a mark or a change of type says so, whatever stood before, and is right if its type,
its first and its last word are.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ftcore.evaluate.metrics import SCORES, by_class

OUTSIDE = "O"

def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Type, first word and last word of each entity of one sentence."""
    found, first = set(), 0
    last_mark, last_type = OUTSIDE, "_"
    for place, tag in enumerate([*tags, OUTSIDE]):
        mark, type_ = tag[:1], tag[1:].split("-", maxsplit=1)[-1] or "_"
        is_other = type_ != last_type
        leaves = last_mark in "ES" or (last_mark in "BI" and mark in "BSO")
        if leaves or (is_other and last_mark not in "O."):
            found.add((last_type, first, place - 1))
        enters = mark in "BS" or (mark in "EI" and last_mark in "ESO")
        if enters or (is_other and mark not in "O."):
            first = place
        last_mark, last_type = mark, type_
    return found

def entity_figures(counts_5: Sequence[int]) -> dict[str, float]:
    """Precision, recall and F1 of entities of all types together, and accuracy, the share of right
    tags; of the counts that `EntityMetrics.update` returns, summed over sentences."""
    words, right, *totals = counts_5
    (row,) = by_class(["all"], np.array(totals)[:, None])
    accuracy = {"accuracy": float(right / words) if words else math.nan}
    return accuracy | {name: row[name] for name in SCORES}

class EntityMetrics:
    """Figures of entities of each type."""

    def __init__(self) -> None:
        self.totals = Counter(), Counter(), Counter()  # hits, predicted and support of each type

    def update(self, target: Sequence[str], predicted: Sequence[str]) -> tuple[int, ...]:
        """Count one sentence; returns its words, right tags, and entities right, predicted and in
        the target."""
        right = sum(a == b for a, b in zip(target, predicted, strict=True))
        wanted, given = entities(target), entities(predicted)
        found = wanted & given, given, wanted
        for counter, some in zip(self.totals, found, strict=True):
            counter.update(type_ for type_, _, _ in some)
        return len(target), right, *map(len, found)

    def per_class(self) -> list[dict[str, Any]]:
        """One dict per type, as `ClassificationMetrics.per_class`; support in entities."""
        types = sorted(set().union(*self.totals))
        return by_class(types, np.array([[counter[t] for t in types] for counter in self.totals]))
