"""Metrics of probabilities against scikit-learn and scipy, by hand, and in any order of the rows.

Random probabilities are counts over a small total: many are equal, as those of a small tree or of
rounded files are.
"""

import math
from fractions import Fraction
from typing import Any
import numpy as np
import pytest
from scipy import optimize, special
from sklearn import metrics as sk
from ftcore.evaluate.metrics import (
    probability_metrics,
    ranking,
    reliability,
    temperature,
    threshold_table,
)

TOLERANCE = 1e-12

def close(expected: Any) -> Any:
    return pytest.approx(expected, rel=0, abs=TOLERANCE, nan_ok=True)

def two_sides(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Some rows, from none positive to all, their scores with many ties, few or none."""
    B, levels = int(rng.integers(1, 50)), int(rng.choice([1, 4, 30, 10**9]))
    return rng.random(B) < rng.choice([0, 0.1, 0.5, 1.0]), rng.integers(0, levels, B) / levels

def several_classes(rng: np.random.Generator, K: int) -> tuple[np.ndarray, np.ndarray]:
    """Targets, of one class in some draws, and probabilities of K classes."""
    B, total = int(rng.integers(1, 50)), int(rng.choice([2, 8, 10**6]))
    p_BK = rng.multinomial(total, rng.dirichlet(np.ones(K), B)) / total
    chance_K = rng.dirichlet(np.full(K, rng.choice([0.1, 1.0])))
    guess_B = rng.choice(K, B, p=chance_K)
    return np.where(rng.random(B) < 0.4, guess_B, p_BK.argmax(1) * (B % 3 > 0)), p_BK

def sklearn_ranking(target_B: np.ndarray, score_B: np.ndarray) -> dict[str, float]:
    has = target_B.any()
    both = has and not target_B.all()
    return {
        "auroc": sk.roc_auc_score(target_B, score_B) if both else math.nan,
        "auprc": sk.average_precision_score(target_B, score_B) if has else math.nan,
    }

def sklearn_macro(target_BK: np.ndarray, p_BK: np.ndarray) -> dict[str, float]:
    both = [k for k, t_B in enumerate(target_BK.T) if 0 < t_B.sum() < len(t_B)]
    if not both:
        return {"auroc": math.nan, "auprc": math.nan}
    return {
        "auroc": sk.roc_auc_score(target_BK[:, both], p_BK[:, both], average="macro"),
        "auprc": sk.average_precision_score(target_BK[:, both], p_BK[:, both], average="macro"),
    }

def plain_ece(target_B: np.ndarray, p_BK: np.ndarray, bins: int = 15) -> float:
    """In whole fractions, row by row: each of n rows with one confidence is right hits/n times."""
    rows = [(Fraction(p_K.max()), int(p_K.argmax()) == t)
            for t, p_K in zip(target_B.tolist(), p_BK, strict=True)]  # fmt: skip
    fair = []
    for confidence, _ in sorted(rows):
        peers = [right for other, right in rows if other == confidence]
        fair.append(confidence - Fraction(sum(peers), len(peers)))
    small, larger = divmod(len(rows), bins)
    total, start = Fraction(0), 0
    for i in range(bins):
        stop = start + small + (i < larger)
        total, start = total + abs(sum(fair[start:stop])), stop
    return float(total / len(rows))

def sure(target_B: np.ndarray, p_BK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How sure the likeliest class is, and whether it is right."""
    return p_BK.max(1), p_BK.argmax(1) == target_B

def test_rankings_equal_sklearn() -> None:
    rng = np.random.default_rng(0)
    for _ in range(1000):
        target_B, score_B = two_sides(rng)
        assert ranking(target_B, score_B) == close(sklearn_ranking(target_B, score_B))

def test_rankings_by_hand() -> None:
    """Pairs won: 2 of (0.9, .), 1 and a tie of (0.4, .)."""
    target, score = [True, False, True, False], [0.9, 0.4, 0.4, 0.1]
    expected = {"auroc": 3.5 / 4, "auprc": (1 + 2 / 3) / 2}
    assert ranking(np.array(target), np.array(score)) == close(expected)
    assert ranking(np.array(target), np.zeros(4)) == {"auroc": 0.5, "auprc": 0.5}

@pytest.mark.parametrize("target", [[], [False], [True], [True, True]])
def test_a_side_without_rows(target: list[bool]) -> None:
    found = ranking(np.array(target, dtype=bool), np.arange(len(target)))
    assert found == close({"auroc": math.nan, "auprc": 1.0 if any(target) else math.nan})

@pytest.mark.parametrize("K", [1, 2, 3, 5, 9])
def test_classes_equal_sklearn(K: int) -> None:
    rng = np.random.default_rng(K)
    for _ in range(120):
        target_B, p_BK = several_classes(rng, K)
        top_k, ids = int(rng.integers(1, 7)), list(range(K))
        has_top = top_k < K
        target_BK = np.eye(K, dtype=bool)[target_B]
        expected = sklearn_macro(target_BK, p_BK)
        if K == 2:
            expected = sklearn_ranking(target_B == 1, p_BK[:, 1])
        expected["brier"], expected["ece"] = 0.0, plain_ece(target_B, p_BK)
        if K > 1:
            options = {"labels": ids, "scale_by_half": False}
            expected["brier"] = sk.brier_score_loss(target_B, p_BK, **options)
        found = probability_metrics(target_B, p_BK, top_k)
        if has_top and K > 2:
            # Turned round, since scikit-learn takes the higher of two equal classes.
            turned = K - 1 - target_B, p_BK[:, ::-1]
            best = sk.top_k_accuracy_score(*turned, k=top_k, labels=ids)
            expected[f"top_{top_k}_accuracy"] = best
        elif has_top:
            expected["top_1_accuracy"] = (p_BK.argmax(1) == target_B).mean()
        assert found == close(expected)

def test_the_order_of_the_rows_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        target_B, p_BK = several_classes(rng, int(rng.integers(2, 8)))
        order_B = rng.permutation(len(target_B))
        turned = target_B[order_B], p_BK[order_B]
        found, again = probability_metrics(target_B, p_BK, 1), probability_metrics(*turned, 1)
        assert found == close(again)
        assert found["ece"] == again["ece"]  # to the last bit, as all that is cut after sorting
        assert reliability(*sure(target_B, p_BK), 4) == reliability(*sure(*turned), 4)
        table = threshold_table(target_B == 1, p_BK[:, 1])
        assert table == threshold_table(turned[0] == 1, turned[1][:, 1])
        assert temperature(*turned) == pytest.approx(temperature(target_B, p_BK), rel=1e-9)

def test_calibrated_rows_of_one_confidence_have_no_error() -> None:
    """Cut as they stand, the first bins would hold right rows only and the last ones none."""
    target_B, p_BK = np.array([0] * 30 + [1] * 10), np.tile([0.75, 0.25], (40, 1))
    assert probability_metrics(target_B, p_BK)["ece"] == close(0)
    bins = reliability(*sure(target_B, p_BK))
    assert [bin["rows"] for bin in bins] == [3] * 10 + [2] * 5
    assert {bin["accuracy"] for bin in bins} == {0.75} == {bin["confidence"] for bin in bins}

def test_bins_by_hand() -> None:
    """Five rows in two bins of three and two: 0.6 wrong, 0.7 wrong and right | 0.9 and 1.0."""
    p_BK = np.array([[1.0, 0.0], [0.3, 0.7], [0.4, 0.6], [0.7, 0.3], [0.1, 0.9]])
    target_B = np.array([0, 1, 0, 1, 1])
    low, high = reliability(*sure(target_B, p_BK), bins=2)
    assert low == close({"rows": 3, "confidence": 2 / 3, "accuracy": 1 / 3})
    assert high == close({"rows": 2, "confidence": 0.95, "accuracy": 1.0})
    assert [bin["rows"] for bin in reliability(*sure(target_B, p_BK))] == [1] * 5
    # One row a bin, the two rows of 0.7 half right each.
    expected = (0.6 + 2 * 0.2 + 0.1 + 0.0) / 5
    assert probability_metrics(target_B, p_BK)["ece"] == close(expected)

def test_of_equal_probabilities_the_lower_class_is_first() -> None:
    p_BK = np.full((7, 7), 1 / 7)
    found = probability_metrics(np.arange(7), p_BK)
    assert found["top_5_accuracy"] == close(5 / 7)
    assert list(found) == ["top_5_accuracy", "auroc", "auprc", "brier", "ece"]
    assert "top_5_accuracy" not in probability_metrics(np.arange(5), np.full((5, 5), 0.2))

def loss(log_t: float, target_B: np.ndarray, logits_BK: np.ndarray) -> float:
    log_p_BK = special.log_softmax(logits_BK / math.exp(log_t), axis=1)
    return -log_p_BK[np.arange(len(target_B)), target_B].mean()

def slope(b: float, target_B: np.ndarray, logits_BK: np.ndarray) -> float:
    p_BK = special.softmax(b * logits_BK, axis=1)
    return ((p_BK * logits_BK).sum(1) - logits_BK[np.arange(len(target_B)), target_B]).mean()

def test_temperatures_equal_scipys_minimum() -> None:
    rng, inside, ends = np.random.default_rng(0), 0, set()
    bounds = math.log(0.05), math.log(20)
    for _ in range(500):
        B, K, scale = int(rng.integers(1, 60)), int(rng.integers(2, 7)), 10 ** rng.uniform(-2, 2)
        logits_BK = rng.normal(0, 1, (B, K))
        target_B = (rng.gumbel(0, 1, (B, K)) + rng.choice([0, 1, 3]) * logits_BK).argmax(1)
        logits_BK = scale * (logits_BK if B % 2 else logits_BK.round())
        found = temperature(target_B, logits_BK)
        if (logits_BK[np.arange(B), target_B] == logits_BK.max(1)).all():
            assert found == 1.0
            continue
        options = {"args": (target_B, logits_BK), "method": "bounded", "options": {"xatol": 1e-9}}
        best = optimize.minimize_scalar(loss, bounds=bounds, **options)
        assert loss(math.log(found), target_B, logits_BK) <= best.fun + 1e-12
        assert 0.05 <= found <= 20
        args = target_B, logits_BK
        if slope(1 / 20, *args) < 0 < slope(1 / 0.05, *args):
            inside += 1
            root = optimize.brentq(slope, 1 / 20, 1 / 0.05, args, xtol=1e-14, rtol=1e-14)
            assert 1 / found == pytest.approx(root, rel=1e-7)
        else:
            ends.add(round(found, 9))
    assert inside > 200 and ends == {0.05, 20.0}

def test_temperature_mends_confidence() -> None:
    """Logits that were the truth times 3 are cooled by about 3, and the error falls."""
    rng = np.random.default_rng(0)
    logits_BK = rng.normal(0, 1.5, (4000, 4))
    target_B = (logits_BK + rng.gumbel(0, 1, logits_BK.shape)).argmax(1)
    found = temperature(target_B, 3 * logits_BK)
    assert found == pytest.approx(3, rel=0.05)
    assert temperature(target_B, logits_BK) == pytest.approx(found / 3, rel=1e-9)
    shifted_BK = 3 * logits_BK + rng.normal(0, 5, (4000, 1))
    assert temperature(target_B, shifted_BK) == pytest.approx(found, rel=1e-9)
    before, after = (probability_metrics(target_B, special.softmax(3 * logits_BK / t, axis=1))
                     for t in (1, found))  # fmt: skip
    assert after["ece"] < 0.03 < before["ece"] and after["brier"] < before["brier"]

@pytest.mark.parametrize(
    ("target", "logits", "expected"),
    [
        pytest.param([0, 1], [[2, 1], [0, 9]], 1, id="all right"),
        pytest.param([0, 1], [[1, 1], [0, 9]], 1, id="right or equal"),
        pytest.param([0, 1], [[3, 3], [3, 3]], 1, id="all equal"),
        pytest.param([0, 0], [[5], [7]], 1, id="one class"),
        pytest.param([1, 0], [[2, 1], [0, 9]], 20, id="all wrong"),
        pytest.param([0] * 99 + [1], [[0.01, 0]] * 100, 0.05, id="far too timid"),
        pytest.param([0] * 3 + [1], [[9e3, 0]] * 4, 20, id="far too bold"),
        pytest.param([0] * 3 + [1], [[math.log(9), 0]] * 4, 2, id="3 of 4 at 0.9"),
    ],
)
def test_temperatures_by_hand(target: list, logits: list, expected: float) -> None:
    assert temperature(np.array(target), np.array(logits)) == pytest.approx(expected, rel=1e-9)

@pytest.mark.filterwarnings("ignore:No positive class found")
def test_thresholds_equal_sklearn() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        target_B, score_B = two_sides(rng)
        count = int(rng.integers(0, 12))
        rows = threshold_table(target_B, score_B, count)
        # Without positives scikit-learn has a recall of one, here it is 0.
        *scores, thresholds_U = sk.precision_recall_curve(target_B, score_B)
        precision_U, recall_U = (x_U[:-1] * target_B.any() for x_U in scores)
        both_U = precision_U + recall_U
        f1_U = 2 * precision_U * recall_U / np.where(both_U, both_U, 1)
        for row in rows:
            (u,) = np.flatnonzero(thresholds_U == row["threshold"])
            expected = precision_U[u], recall_U[u], f1_U[u], (score_B >= thresholds_U[u]).mean()
            assert [row[x] for x in ("precision", "recall", "f1", "share")] == close(expected)
        thresholds, (best,) = [row["threshold"] for row in rows], [r for r in rows if r["best"]]
        sorted_B = sorted(score_B.tolist())
        shares = [Fraction(i, count + 1) for i in range(1, count + 1)]
        quantiles = {sorted_B[math.ceil(share * len(sorted_B)) - 1] for share in shares}
        assert thresholds == sorted(quantiles | {best["threshold"]})
        assert best["threshold"] == thresholds_U[f1_U > f1_U.max() - TOLERANCE].max()

def test_thresholds_by_hand() -> None:
    target_B, score_B = np.array([False, True, False, True]), np.array([0.1, 0.4, 0.4, 0.8])
    names = ("threshold", "precision", "recall", "f1", "share", "best")
    expected = [(0.1, 0.5, 1.0, 2 / 3, 1.0, False), (0.4, 2 / 3, 1.0, 0.8, 0.75, True)]
    rows = [dict(zip(names, row, strict=True)) for row in expected]
    assert threshold_table(target_B, score_B, count=3) == [close(row) for row in rows]
    (row,) = threshold_table(np.zeros(2, dtype=bool), np.ones(2))
    assert row == dict(zip(names, (1.0, 0.0, 0.0, 0.0, 1.0, True), strict=True))
