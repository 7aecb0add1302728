"""Intervals that cover the truth, and tests that do not cry wolf."""

import numpy as np
import pytest
from scipy import stats
from ftcore.evaluate.metrics import Figures, compare, draws, intervals, mcnemar

def accuracy(right_B: np.ndarray) -> Figures:
    return lambda rows: {"accuracy": float(right_B[rows].mean())}

def test_a_draw_takes_whole_clusters() -> None:
    clusters_B = np.array([7, 3, 7, 9, 3, 7])
    members = {7: {0, 2, 5}, 3: {1, 4}, 9: {3}}
    seen = set()
    for rows in draws(clusters_B, seed=1, count=200):
        counts = np.bincount(rows, minlength=6)
        for rows_of_one in members.values():
            assert len({counts[row] for row in rows_of_one}) == 1
        assert sum(counts[min(rows_of_one)] for rows_of_one in members.values()) == 3
        seen.add(tuple(counts))
    assert len(seen) == 10  # all ways to draw 3 of 3
    again = [rows.tolist() for rows in draws(clusters_B, seed=1, count=5)]
    assert again == [rows.tolist() for rows in draws(clusters_B, seed=1, count=5)]
    assert again != [rows.tolist() for rows in draws(clusters_B, seed=2, count=5)]

def test_an_interval_is_that_of_scipy() -> None:
    values_B = np.random.default_rng(0).gamma(2, size=300)
    found = intervals(lambda rows: {"mean": values_B[rows].mean()}, np.arange(300), seed=3)
    expected = stats.bootstrap((values_B,), np.mean, method="percentile", rng=4).confidence_interval
    assert found["mean"] == pytest.approx(tuple(expected), rel=1e-2)

def test_copies_of_rows_tell_no_more_than_the_rows() -> None:
    right_B = np.random.default_rng(0).random(100) < 0.7
    once = intervals(accuracy(right_B), np.arange(100))["accuracy"]
    copies = np.repeat(right_B, 9)
    same = intervals(accuracy(copies), np.repeat(np.arange(100), 9))["accuracy"]
    apart = intervals(accuracy(copies), np.arange(900))["accuracy"]
    assert same == pytest.approx(once, abs=0.011)
    assert apart[1] - apart[0] < 0.5 * (once[1] - once[0])

def test_what_some_draws_lack_has_no_interval() -> None:
    found = intervals(lambda rows: {"a": 1.0, "b": np.nan if rows[0] else 1.0}, np.arange(9))
    assert found == {"a": (1.0, 1.0)}

@pytest.mark.parametrize(("alone", "other"), [(0, 0), (1, 0), (3, 3), (9, 2), (40, 61), (0, 2000)])
def test_mcnemar_is_the_mid_p_of_a_binomial(alone: int, other: int) -> None:
    k, n = min(alone, other), alone + other
    expected = 2 * stats.binom.cdf(k - 1, n, 0.5) + stats.binom.pmf(k, n, 0.5)
    found = mcnemar(alone, other)
    assert found == mcnemar(other, alone) == pytest.approx(min(1.0, expected), rel=1e-9)

def test_a_clear_difference_and_none() -> None:
    random = np.random.default_rng(0)
    one_B, two_B = (random.random(400) < share for share in (0.9, 0.7))
    found = compare(accuracy(one_B), accuracy(two_B), np.arange(400))["accuracy"]
    assert found["difference"] == one_B.mean() - two_B.mean()
    assert 0 < found["low"] < found["difference"] < found["high"] and found["p"] < 0.01
    same = compare(accuracy(one_B), accuracy(one_B), np.arange(400))["accuracy"]
    assert same == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}

def simulated(seed: int, share: float, flips: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows that two models of the same accuracy have right, mostly the same ones."""
    random = np.random.default_rng(seed)
    one_B = random.random(300) < share
    changed_B = random.random(300) < flips
    return one_B, np.where(changed_B, random.random(300) < share, one_B)

@pytest.mark.slow
def test_intervals_and_tests_hold_on_1000_data_sets() -> None:
    """The interval covers the truth 93 to 97 times in 100; false alarms at 5% are at most 6.5%."""
    share, covered, alarms, exact = 0.8, 0, 0, 0
    for seed in range(1000):
        one_B, two_B = simulated(seed, share, 0.3)
        low, high = intervals(accuracy(one_B), np.arange(300), seed=seed)["accuracy"]
        covered += low <= share <= high
        alarms += compare(accuracy(one_B), accuracy(two_B), np.arange(300), seed=seed)[
            "accuracy"
        ]["p"] < 0.05
        exact += mcnemar((one_B & ~two_B).sum(), (two_B & ~one_B).sum()) < 0.05
    print(f"covered {covered}, paired alarms {alarms}, McNemar alarms {exact} of 1000")
    assert 930 <= covered <= 970 and alarms <= 65 and exact <= 65
    assert min(alarms, exact) >= 20  # nor are they blind
