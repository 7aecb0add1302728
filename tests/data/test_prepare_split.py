"""Held-out rows, balanced classes: counts that can be reckoned by hand."""

from collections import Counter
import numpy as np
import pytest
from ftcore.data.columns import Text
from ftcore.data.prepare import balanced, clusters, held_out
from ftcore.errors import DataError

def rows(**counts: int) -> list[Text]:
    labels = [label for label, count in counts.items() for _ in range(count)]
    return [Text(f"{n}", (f"text {n}",), label) for n, label in enumerate(labels)]

def test_seats_are_apportioned_by_largest_remainders() -> None:
    def seats(count: int, **rows: int) -> Counter[str]:
        strata = [name for name, number in rows.items() for _ in range(number)]
        held = held_out(strata, range(len(strata)), count, seed=0)
        return Counter(np.array(strata)[held])

    assert seats(4, a=5, b=3, c=2) == {"a": 2, "b": 1, "c": 1}
    assert seats(4, a=10, b=10, c=10) == {"a": 2, "b": 1, "c": 1}
    assert seats(123, **{f"of {n}": n for n in range(1, 20)}).total() == 123

def test_classes_keep_their_shares_among_the_rows_held_out() -> None:
    strata = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    held = held_out(strata, range(100), 20, seed=0)
    assert Counter(np.array(strata)[held]) == {"a": 12, "b": 6, "c": 2}
    assert (held == held_out(strata, range(100), 20, seed=0)).all()
    assert (held != held_out(strata, range(100), 20, seed=1)).any()

def test_groups_never_straddle() -> None:
    groups = [n // 3 for n in range(90)]
    held = held_out(["all"] * 90, groups, 31, seed=4)
    assert held.sum() == 30  # 31 is no multiple of 3
    assert all(len(set(held[3 * g : 3 * g + 3])) == 1 for g in range(30))

def test_more_rows_than_there_are_cannot_be_held_out() -> None:
    with pytest.raises(DataError, match="data.holdout = 9: train has 9 rows; hold out fewer"):
        held_out(["x"] * 9, range(9), 9, seed=0)

def test_rows_are_together_through_either_key_and_through_others() -> None:
    groups, texts = ["x", "x", None, None, "y", "y"], ["one", "two", "Two ", "four", "five", "six"]
    numbers = clusters(texts, groups)
    assert numbers[0] == numbers[1] == numbers[2] and numbers[4] == numbers[5]
    assert len(set(numbers)) == 3

def test_weights_are_inverse_to_the_class_and_capped() -> None:
    found = {e.target: e.weight for e in balanced(rows(a=90, b=9, c=1), "weights", 5.0, seed=0)}
    assert found == pytest.approx({"a": 100 / 3 / 90, "b": 100 / 3 / 9, "c": 5.0})
    even = balanced(rows(a=30, b=10), "weights", 10.0, seed=0)
    assert sum(e.weight for e in even) == pytest.approx(40)

@pytest.mark.parametrize(
    ("method", "cap", "wanted"),
    [
        ("over", 10.0, {"a": 90, "b": 90, "c": 10}),
        ("over", 2.5, {"a": 90, "b": 22, "c": 2}),
        ("under", 10.0, {"a": 10, "b": 9, "c": 1}),
        ("under", 20.0, {"a": 20, "b": 9, "c": 1}),
    ],
)
def test_rows_are_repeated_or_left_out_up_to_the_cap(method, cap, wanted) -> None:
    found = balanced(rows(a=90, b=9, c=1), method, cap, seed=0)
    assert Counter(e.target for e in found) == wanted
    copies = Counter(e.id for e in found if e.target == "b").values()
    assert max(copies) - min(copies) <= 1  # no row is a favourite
