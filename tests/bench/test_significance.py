"""Intervals and the paired test against scipy and published values."""

import numpy as np
import pytest
from scipy import stats
from ftcore.errors import DataError
from tests.bench.significance import bootstrap_difference, bootstrap_mean, mcnemar_midp

def paired(only_a: int, only_b: int, both: int = 0) -> tuple[list[int], list[int]]:
    """0/1 per row of two systems with these disagreements."""
    a = [1] * only_a + [0] * only_b + [1] * both
    return a, [1 - x for x in a[: only_a + only_b]] + [1] * both

def test_interval_is_scipys_percentile_bootstrap() -> None:
    values_B = np.random.default_rng(3).gamma(2.0, size=200)
    ours = bootstrap_mean(values_B, seed=0, resamples=20_000, level=0.9)
    theirs = stats.bootstrap(
        (values_B,), np.mean, n_resamples=20_000, confidence_level=0.9, method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    # Two draws of 20,000 resamples: ends agree within a few hundredths of the standard error.
    error = values_B.std() / np.sqrt(200)
    assert ours.mean == values_B.mean()
    assert ours.low == pytest.approx(theirs.low, abs=0.1 * error)
    assert ours.high == pytest.approx(theirs.high, abs=0.1 * error)

def test_interval_of_0_1_values_has_binomial_ends() -> None:
    right_B = [1] * 80 + [0] * 20
    interval = bootstrap_mean(right_B, seed=0)
    low, high = stats.binom(100, 0.8).ppf([0.025, 0.975]) / 100
    assert interval.mean == 0.8
    assert abs(interval.low - low) <= 0.01 and abs(interval.high - high) <= 0.01

def test_same_seed_same_interval_in_any_block_size() -> None:
    values_B = np.random.default_rng(0).normal(size=3000)
    first = bootstrap_mean(values_B, seed=1, resamples=777)
    assert first == bootstrap_mean(values_B, seed=1, resamples=777)
    assert first != bootstrap_mean(values_B, seed=2, resamples=777)
    rng = np.random.default_rng(1)
    one_by_one = [values_B[rng.integers(0, 3000, 3000)].mean() for _ in range(777)]
    assert first[1:] == pytest.approx(np.quantile(one_by_one, [0.025, 0.975]), abs=1e-12)

def test_coverage_is_near_its_level() -> None:
    rng = np.random.default_rng(5)
    samples_SB = rng.exponential(size=(300, 100))
    intervals = [bootstrap_mean(values_B, seed=0, resamples=500) for values_B in samples_SB]
    covered = sum(low <= 1.0 <= high for _, low, high in intervals) / 300
    assert 0.88 <= covered <= 0.98

def test_pairs_sharpen_a_difference() -> None:
    rng = np.random.default_rng(0)
    a_B = rng.normal(size=300)
    b_B = a_B + 0.05 + rng.normal(scale=0.1, size=300)
    paired_interval = bootstrap_difference(a_B, b_B, seed=0)
    assert paired_interval.mean == pytest.approx(b_B.mean() - a_B.mean(), abs=1e-12)
    assert 0 < paired_interval.low < paired_interval.high < 0.1
    shuffled = bootstrap_difference(a_B, rng.permutation(b_B), seed=0)
    assert shuffled.low < 0 < shuffled.high

@pytest.mark.parametrize(
    ("only_a", "only_b", "published"),
    # Fagerland et al. 2013: Bentur et al. (airway hyper-responsiveness), and hand-worked values.
    [(1, 7, 0.0390625), (0, 1, 0.5), (0, 5, 0.03125), (1, 1, 0.75), (0, 0, 1.0)],
)
def test_mcnemar_known_values(only_a: int, only_b: int, published: float) -> None:
    assert mcnemar_midp(*paired(only_a, only_b, both=9)) == published
    assert mcnemar_midp(*paired(only_b, only_a, both=2)) == published

@pytest.mark.parametrize(
    ("only_a", "only_b"), [(3, 11), (40, 61), (25, 25), (900, 1100), (0, 2000)]
)
def test_mcnemar_equals_scipys_binomial(only_a: int, only_b: int) -> None:
    n, m = only_a + only_b, min(only_a, only_b)
    exact = stats.binomtest(only_a, n).pvalue
    as_extreme = stats.binom(n, 0.5).pmf(m) * (1 if only_a == only_b else 2)
    expected = exact - as_extreme / 2
    assert mcnemar_midp(*paired(only_a, only_b)) == pytest.approx(expected, rel=1e-9, abs=1e-15)

def test_bad_values() -> None:
    for values in ([], [1.0, np.nan], [[1.0]]):
        with pytest.raises(DataError, match="need finite numbers, one per row"):
            bootstrap_mean(values, seed=0)
    with pytest.raises(DataError, match="2 rows against 1"):
        bootstrap_difference([1, 2], [1], seed=0)
    with pytest.raises(DataError, match="2 rows against 3"):
        mcnemar_midp([1, 0], [1, 0, 1])
