"""Metrics of several labels a row and of scores, against scikit-learn and scipy."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk
from ftcore.evaluate.metrics import (
    AVERAGES,
    class_scores,
    label_figures,
    label_totals,
    regression_metrics,
)

TOLERANCE = 1e-12

def sklearn_says(target_BK: np.ndarray, predicted_BK: np.ndarray) -> dict[str, float]:
    result = {
        "subset_accuracy": sk.accuracy_score(target_BK, predicted_BK),
        "hamming_loss": sk.hamming_loss(target_BK, predicted_BK),
    }
    for average in ("micro", "macro", "weighted"):
        scores = sk.precision_recall_fscore_support(
            target_BK, predicted_BK, average=average, zero_division=0
        )
        names = ("precision", "recall", "f1")
        result |= {f"{x}_{average}": y for x, y in zip(names, scores[:3], strict=True)}
    return result

@pytest.mark.parametrize("seed", range(20))
def test_several_labels_equal_sklearn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    B, K = int(rng.integers(1, 60)), int(rng.integers(2, 9))
    share_K = rng.choice([0.0, 0.2, 0.7], K)  # some labels never occur
    target_BK, guess_BK = (rng.random((B, K)) < share_K for _ in range(2))
    predicted_BK = np.where(rng.random((B, K)) < 0.6, target_BK, guess_BK)
    totals_3K = label_totals(target_BK, predicted_BK)
    values = label_figures(target_BK, predicted_BK)
    assert tuple(values) == ("subset_accuracy", "hamming_loss", *AVERAGES)
    expected = sklearn_says(target_BK.astype(int), predicted_BK.astype(int))
    assert values == pytest.approx(expected, rel=0, abs=TOLERANCE)
    recalls = sk.recall_score(target_BK, predicted_BK, average=None, zero_division=0)
    assert class_scores(totals_3K)[1] == pytest.approx(recalls)
    assert totals_3K[1:].tolist() == [predicted_BK.sum(0).tolist(), target_BK.sum(0).tolist()]

@pytest.mark.parametrize("step", [0.0, 0.5, 2.0])  # 0.5 and 2.0: many equal values
@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_scipy_and_sklearn(seed: int, step: float) -> None:
    rng = np.random.default_rng(seed)
    target_B = rng.normal(3, 2, 80)
    predicted_B = 0.7 * target_B + rng.normal(0, 1, 80)
    if step:
        target_B, predicted_B = (np.round(x_B / step) * step for x_B in (target_B, predicted_B))
    assert regression_metrics(target_B, predicted_B) == pytest.approx(
        {
            "pearson": stats.pearsonr(target_B, predicted_B).statistic,
            "spearman": stats.spearmanr(target_B, predicted_B).statistic,
            "mae": sk.mean_absolute_error(target_B, predicted_B),
            "rmse": sk.root_mean_squared_error(target_B, predicted_B),
            "r2": sk.r2_score(target_B, predicted_B),
        },
        rel=0,
        abs=TOLERANCE,
    )

def test_a_constant_has_no_correlation() -> None:
    values = regression_metrics(np.array([1.0, 2.0]), np.array([3.0, 3.0]))
    assert np.isnan(values["pearson"]) and np.isnan(values["spearman"])
    assert values["mae"] == 1.5 and values["r2"] == pytest.approx(-9)
    # The mean of three times 0.1 is not 0.1.
    assert np.isnan(regression_metrics(np.full(3, 0.1), np.array([1.0, 2.0, 4.0]))["r2"])
