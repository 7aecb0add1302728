"""Classification metrics against scikit-learn, perplexity against its definition."""

import csv
import math
from pathlib import Path
import numpy as np
import pytest
from sklearn import metrics as sk
from ftcore.evaluate.metrics import class_figures, class_scores, class_totals, perplexity

TOLERANCE = 1e-12
pytestmark = [
    pytest.mark.filterwarnings("ignore:A single label was found"),
    pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true"),
    pytest.mark.filterwarnings("ignore:.*have only one label in common"),
]

def counted(num_labels: int, target: list[int], predicted: list[int]) -> np.ndarray:
    return class_totals(np.array(target), np.array(predicted), num_labels)

def sklearn_metrics(target_B: np.ndarray, predicted_B: np.ndarray) -> dict[str, float]:
    """What scikit-learn says: labels restricted to the classes that occur."""
    occurring = sorted({*target_B.tolist(), *predicted_B.tolist()})
    result = {"accuracy": sk.accuracy_score(target_B, predicted_B)}
    for average in ("micro", "macro", "weighted"):
        precision, recall, f1, _ = sk.precision_recall_fscore_support(
            target_B, predicted_B, labels=occurring, average=average, zero_division=0
        )
        result |= {
            f"precision_{average}": precision,
            f"recall_{average}": recall,
            f"f1_{average}": f1,
        }
    return result | sklearn_agreement(target_B, predicted_B)

def sklearn_agreement(target_B: np.ndarray, predicted_B: np.ndarray) -> dict[str, float]:
    return {
        "balanced_accuracy": sk.balanced_accuracy_score(target_B, predicted_B),
        "mcc": sk.matthews_corrcoef(target_B, predicted_B),
        "kappa": sk.cohen_kappa_score(target_B, predicted_B, replace_undefined_by=0.0),
    }

def assert_equals_sklearn(num_labels: int, target: list[int], predicted: list[int]) -> None:
    target_B, predicted_B = np.array(target), np.array(predicted)
    totals_3K = counted(num_labels, target, predicted)
    assert class_figures(totals_3K) == pytest.approx(
        sklearn_metrics(target_B, predicted_B), rel=0, abs=TOLERANCE
    )
    every = list(range(num_labels))
    expected_KK = sk.confusion_matrix(target_B, predicted_B, labels=every)
    expected_3K = expected_KK.diagonal(), expected_KK.sum(0), expected_KK.sum(1)
    np.testing.assert_array_equal(totals_3K, expected_3K)
    columns = sk.precision_recall_fscore_support(
        target_B, predicted_B, labels=every, average=None, zero_division=0
    )
    for ours_K, expected_K in zip(class_scores(totals_3K), columns[:3], strict=True):
        np.testing.assert_allclose(ours_K, expected_K, rtol=0, atol=TOLERANCE)

@pytest.mark.parametrize("seed", range(40))
def test_random_labels_equal_sklearn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_labels, rows = int(rng.integers(1, 12)), int(rng.integers(1, 300))
    # Skewed, so that some classes are absent and others are never predicted.
    chances = [rng.dirichlet(np.full(num_labels, 0.3)) for _ in range(2)]
    target_B, guess_B = (rng.choice(num_labels, rows, p=p) for p in chances)
    predicted_B = np.where(rng.random(rows) < 0.5, target_B, guess_B)
    assert_equals_sklearn(num_labels, target_B.tolist(), predicted_B.tolist())

def test_hundreds_of_small_samples_equal_sklearn() -> None:
    """So small that classes are missing, or targets are of one class."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        num_labels, rows = rng.integers(1, 5), rng.integers(1, 8)
        target_B = rng.integers(0, num_labels, rows)
        predicted_B = rng.integers(0, num_labels, rows)
        values = class_figures(counted(num_labels, target_B, predicted_B))
        for name, expected in sklearn_agreement(target_B, predicted_B).items():
            assert values[name] == pytest.approx(expected, rel=0, abs=TOLERANCE)

def test_agreement_by_hand() -> None:
    """6 of 10 right; by chance (7 * 5 + 3 * 5) / 100 of it."""
    target, predicted = [0] * 7 + [1] * 3, [0] * 4 + [1] * 3 + [1] * 2 + [0]
    values = class_figures(counted(2, target, predicted))
    assert values["kappa"] == pytest.approx((60 - 50) / (100 - 50), abs=1e-15)
    assert values["balanced_accuracy"] == pytest.approx((4 / 7 + 2 / 3) / 2, abs=1e-15)
    assert class_figures(counted(2, [1, 1], [1, 1]))["kappa"] == 0.0

@pytest.mark.parametrize(
    ("num_labels", "target", "predicted"),
    [
        pytest.param(3, [0, 0, 1], [0, 1, 1], id="class absent altogether"),
        pytest.param(3, [0, 0, 1], [0, 2, 1], id="class predicted, never a target"),
        pytest.param(3, [0, 1, 2], [0, 1, 0], id="class never predicted"),
        pytest.param(3, [1, 1, 1], [1, 1, 1], id="one class, all right"),
        pytest.param(3, [1, 1, 1], [0, 2, 0], id="one class, all wrong"),
        pytest.param(2, [0, 1, 0, 1], [1, 0, 1, 0], id="all wrong"),
        pytest.param(1, [0, 0], [0, 0], id="a label set of one"),
        pytest.param(2, [1], [1], id="one row"),
    ],
)
def test_edge_cases_equal_sklearn(num_labels: int, target: list[int], predicted: list[int]) -> None:
    assert_equals_sklearn(num_labels, target, predicted)

def test_macro_is_sklearns_own_default_over_the_classes_that_occur() -> None:
    target, predicted = [0, 1, 2, 2, 0], [0, 2, 2, 2, 1]
    expected = sk.f1_score(target, predicted, average="macro")
    values = class_figures(counted(9, target, predicted))
    assert values["f1_macro"] == pytest.approx(expected, abs=1e-15)

@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_the_counts_of_parts_add_up(batch_size: int) -> None:
    rng = np.random.default_rng(0)
    target_B, predicted_B = rng.integers(0, 5, (2, 1000))
    slices = [slice(start, start + batch_size) for start in range(0, 1000, batch_size)]
    parts = sum(counted(5, target_B[rows], predicted_B[rows]) for rows in slices)
    np.testing.assert_array_equal(parts, counted(5, target_B, predicted_B))

def test_counts_beyond_int64_squares_stay_exact() -> None:
    small_3K = counted(2, [0, 0, 0, 1, 1], [0, 0, 1, 1, 0])
    large = class_figures(small_3K * 10**17)
    assert large == pytest.approx(class_figures(small_3K), abs=TOLERANCE)

def test_77_real_intents_with_a_keyword_guess(data_dir: Path) -> None:
    """Banking77's test file: a crude classifier leaves many classes never predicted."""
    path = data_dir / "banking77" / "test.csv"
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labels = sorted({row["category"] for row in rows})
    ids = {label: i for i, label in enumerate(labels)}
    overlap = [
        [len(set(label.split("_")) & set(row["text"].lower().split())) for label in labels]
        for row in rows
    ]
    target_B = np.array([ids[row["category"]] for row in rows])
    predicted_B = np.argmax(overlap, axis=1)
    totals_3K = counted(len(labels), target_B, predicted_B)
    assert (len(rows), len(labels)) == (3080, 77)
    assert totals_3K[1].min() == 0
    expected = sklearn_metrics(target_B, predicted_B)
    assert class_figures(totals_3K) == pytest.approx(expected, rel=0, abs=TOLERANCE)

def test_perplexity_weighs_tokens() -> None:
    losses_N = np.random.default_rng(0).uniform(0, 8, 1000)
    expected = {
        "loss": losses_N.mean(),
        "perplexity": math.exp(losses_N.mean()),
        "bits_per_byte": losses_N.sum() / math.log(2) / 4321,
    }
    assert perplexity(losses_N.sum(), 1000, 4321) == pytest.approx(expected, rel=TOLERANCE)

def test_a_uniform_guess_over_bytes_is_eight_bits_per_byte() -> None:
    expected = {"loss": math.log(256), "perplexity": 256, "bits_per_byte": 8}
    assert perplexity(50 * math.log(256), 50, 50) == pytest.approx(expected, rel=TOLERANCE)

def test_perplexity_without_tokens_or_beyond_float64() -> None:
    assert all(math.isnan(value) for value in perplexity(0.0, 0).values())
    assert perplexity(1e6, 10) == {"loss": 1e5, "perplexity": math.inf}
