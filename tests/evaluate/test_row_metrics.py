"""Metrics of several labels a row, of scores and of entities, against libraries."""

import random
import warnings
import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk
from ftcore.data.encode import Split
from ftcore.data.pack import Encoded
from ftcore.evaluate.evaluator import Judged, evaluate_tags
from ftcore.evaluate.metrics import (
    AVERAGES,
    class_scores,
    entities,
    entity_figures,
    entity_totals,
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

NAMES, TYPES = ("precision", "recall", "f1"), ("x", "y")
TAGS = ["O", "O", "O", "B-x", "I-x", "B-y", "I-y"]

@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("tags", [TAGS, TAGS[2:]], ids=["often outside", "rarely"])
def test_entities_equal_seqeval(tags: list[str], seed: int) -> None:
    """Of any sequences of B-, I- and O, of which I- may go on with nothing or another type."""
    seqeval, rng = pytest.importorskip("seqeval.metrics"), random.Random(seed)
    target = [rng.choices(tags, k=rng.randint(1, 9)) for _ in range(rng.randint(1, 8))]
    predicted = [[t if rng.random() < 0.7 else rng.choice(tags) for t in row] for row in target]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functions = [getattr(seqeval, f"{name}_score") for name in NAMES]
        expected = [f(target, predicted) for f in functions]
        types = seqeval.classification_report(target, predicted, output_dict=True)
    pairs = zip(target, predicted, strict=True)
    totals_3K = np.sum([entity_totals(*pair, TYPES) for pair in pairs], axis=0)
    figures = entity_figures(totals_3K)
    assert [*figures] == [*NAMES]
    assert [*figures.values()] == pytest.approx(expected, rel=0, abs=TOLERANCE)
    assert set(types) - {"micro avg", "macro avg", "weighted avg"} <= set(TYPES)
    for name, *told, support in zip(TYPES, *class_scores(totals_3K), totals_3K[2], strict=True):
        found = types.get(name, dict.fromkeys(("precision", "recall", "f1-score", "support"), 0))
        theirs = [found["precision"], found["recall"], found["f1-score"]]
        assert told == pytest.approx(theirs, rel=0, abs=TOLERANCE)
        assert support == found["support"]

def test_entities_by_hand() -> None:
    """Type, first word and number of further ones."""
    assert entities(["B-x", "I-x", "B-x", "O", "I-y", "I-x"]) == {
        ("x", 0, 1), ("x", 2, 0), ("y", 4, 0), ("x", 5, 0)}  # fmt: skip
    found = entities(["O", "I-x", "I-x", "I-y", "O", "I-y"])
    assert found == {("x", 1, 1), ("y", 3, 0), ("y", 5, 0)}
    assert entities(["O"]) == entities(["NN", "VB"]) == entities([]) == set()
    assert entities(["B-a-b", "I-a-b", "I-a"]) == {("a-b", 0, 1), ("a", 2, 0)}

def test_totals_and_figures_of_entities_by_hand() -> None:
    """Right are type, first and last word: one that is too long counts on both sides."""
    target, predicted = ["B-x", "I-x", "O", "B-y", "B-x"], ["B-x", "I-x", "I-x", "B-y", "O"]
    totals_3K = entity_totals(target, predicted, TYPES)
    assert totals_3K.tolist() == [[0, 1], [1, 1], [2, 1]] and totals_3K.dtype == np.int64
    figures = entity_figures(totals_3K)
    assert figures == pytest.approx({"precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5})
    assert set(entity_figures(np.zeros((3, 2), dtype=np.int64)).values()) == {0}
    assert set(entity_figures(entity_totals(["NN"], ["VB"], ())).values()) == {0}

@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Judged:
    """Two sentences of three words and one, whose scores are those of LOG_P_MK."""
    documents = [Encoded(name, np.arange(size), np.array(tags), np.array(weights, np.float32))
                 for name, size, tags, weights in (("a", 5, [-100, 0, 1, -100, 2], [0, 1, 1, 0, 1]),
                                                   ("b", 2, [-100, 0], [0, 1]))]
    monkeypatch.setattr("ftcore.evaluate.evaluator.all_logits",
                        lambda model, some, max_tokens: torch.tensor(LOG_P_MK))
    return evaluate_tags(None, Split(documents=documents), 10, ("B-x", "I-x", "O"))

LOG_P_MK = np.log([[0.8, 0.1, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8], [0.3, 0.1, 0.6]])

def test_words_are_judged_by_tag_and_sentences_by_entity(judged: Judged) -> None:
    loss = -np.log([0.8, 0.5, 0.8, 0.3]).sum() / 4
    entity = {"precision": 1.0, "recall": 1 / 2, "f1": 2 / 3}
    assert judged.values == pytest.approx({"loss": loss, "accuracy": 3 / 4, **entity})
    assert judged.right_B.tolist() == [True, False] and [*judged.classes] == ["x"]
    assert judged.totals_3K.tolist() == [[1], [1], [2]]
    assert judged.rows == [
        {"row_id": "a", "tags": ["B-x", "I-x", "O"], "predicted": ["B-x", "I-x", "O"]},
        {"row_id": "b", "tags": ["B-x"], "predicted": ["O"]}]
    second = judged.figures(np.array([1, 1]))
    assert second == pytest.approx({"loss": -np.log(0.3), "accuracy": 0} | dict.fromkeys(NAMES, 0))
