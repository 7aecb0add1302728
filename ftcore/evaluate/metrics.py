"""Figures of classes, of sets of labels, of scores, of language modelling.

K classes; n_kj rows of class k predicted as j; totals_3K are hits, predicted and support, int64:

    hits_k = n_kk        support_k = sum_j n_kj        predicted_k = sum_j n_jk
    precision_k = hits_k / predicted_k            recall_k = hits_k / support_k
    f1_k = 2 hits_k / (predicted_k + support_k)

0/0 is 0 in each of them. There is at least one row."""

import math
from collections.abc import Sequence
from operator import mul
from typing import Any

import numpy as np

SCORES = ("precision", "recall", "f1")
CLASS_COLUMNS = ("label", *SCORES, "support", "predicted")
AVERAGES = tuple(f"{score}_{mean}" for mean in ("micro", "macro", "weighted") for score in SCORES)
ByClass = list[dict[str, Any]]

def confusions(target_B: np.ndarray, predicted_B: np.ndarray, num_classes: int) -> np.ndarray:
    cells_B = target_B * num_classes + predicted_B
    return np.bincount(cells_B, minlength=num_classes**2).reshape(num_classes, num_classes)

def class_totals(counts_KK: np.ndarray) -> np.ndarray:
    return np.stack([counts_KK.diagonal(), counts_KK.sum(0), counts_KK.sum(1)])

def class_figures(counts_KK: np.ndarray) -> dict[str, float]:
    """accuracy, sum_k hits_k / rows; balanced_accuracy, mean recall_k of the classes with rows.

    ..._micro       the formulas above on sums over k; all equal the accuracy
    ..._macro       plain mean over the classes that occur, as target or as prediction
    ..._weighted    mean over the classes, weighted by support_k
    mcc             (c s - t.p) / sqrt((s^2 - p.p) (s^2 - t.t)) with c hits, s rows, t support, p
                    predicted; 0/0 is 0
    kappa           (c s - t.p) / (s^2 - t.p), the accuracy beyond chance; 0/0 is 0
    source          Gorodkin 2004, Comput. Biol. Chem. 28, 367-374 (mcc of K classes)"""
    hits_K, predicted_K, support_K = totals_3K = class_totals(counts_KK)
    recall_K = _scores(totals_3K)[1][support_K > 0]
    # numerics: Python integers, since rows^2 leaves int64 at 3e9 rows.
    s, t, p = int(support_K.sum()), support_K.tolist(), predicted_K.tolist()
    chance = sum(map(mul, t, p))
    beyond, most = int(hits_K.sum()) * s - chance, s**2 - chance
    spread = (s**2 - sum(map(mul, t, t))) * (s**2 - sum(map(mul, p, p)))
    return {"accuracy": float(hits_K.sum() / s), "balanced_accuracy": float(recall_K.mean()),
            **_averages(totals_3K, predicted_K + support_K > 0),
            "mcc": beyond / math.sqrt(spread) if spread else 0.0,
            "kappa": beyond / most if most else 0.0}

def label_totals(target_BK: np.ndarray, predicted_BK: np.ndarray) -> np.ndarray:
    """totals_3K of rows that have any number of K labels: bool, True where a row has the label."""
    return np.stack([target_BK & predicted_BK, predicted_BK, target_BK]).sum(1)

def label_figures(target_BK: np.ndarray, predicted_BK: np.ndarray) -> dict[str, float]:
    """subset_accuracy, share of the rows whose labels are all right; hamming_loss, share of the
    decisions that are wrong; averages over all K labels, 0 for one that never occurs."""
    totals_3K = label_totals(target_BK, predicted_BK)
    return {"subset_accuracy": float((target_BK == predicted_BK).all(1).mean()),
            "hamming_loss": float((target_BK != predicted_BK).mean()),
            **_averages(totals_3K, np.ones(target_BK.shape[1], dtype=bool))}

def regression_metrics(target_B: np.ndarray, predicted_B: np.ndarray) -> dict[str, float]:
    """pearson of the values, spearman of their ranks, equal ones sharing the mean of theirs; mae
    and rmse, in units of the score; r2 = 1 - squared errors / variance. NaN: by a constant."""
    errors_B = predicted_B - target_B
    spread = np.square(target_B - target_B.mean()).sum() if np.ptp(target_B) else math.nan
    return {"pearson": _correlation(target_B, predicted_B),
            "spearman": _correlation(_ranks(target_B), _ranks(predicted_B)),
            "mae": float(np.abs(errors_B).mean()), "rmse": math.sqrt(np.square(errors_B).mean()),
            "r2": float(1 - np.square(errors_B).sum() / spread)}

def perplexity(loss_sum: float, weight: float, num_bytes: int = 0) -> dict[str, float]:
    """Of a loss in nats over tokens of total `weight`, which spell so many bytes; 0: unknown. loss:
    a token, NaN without any; perplexity: exp(loss), infinite where that leaves float64;
    bits_per_byte: loss_sum / (ln 2 * num_bytes), by which different tokenizers compare."""
    loss = float(loss_sum / weight) if weight else math.nan
    # numerics: exp overflows just above 709.7.
    result = {"loss": loss, "perplexity": math.inf if loss > 709 else math.exp(loss)}
    bits = {"bits_per_byte": float(loss_sum / (math.log(2) * num_bytes))} if num_bytes else {}
    return result | bits

def by_class(labels: Sequence[str], totals_3K: np.ndarray) -> ByClass:
    """One dict per class, of CLASS_COLUMNS; support and predicted in rows."""
    _, predicted_K, support_K = totals_3K
    columns = (*_scores(totals_3K), support_K, predicted_K)
    rows = zip(labels, *(x_K.tolist() for x_K in columns), strict=True)
    return [dict(zip(CLASS_COLUMNS, row, strict=True)) for row in rows]

def _averages(totals_3K: np.ndarray, counted_K: np.ndarray) -> dict[str, float]:
    """AVERAGES; the macro ones over the classes that are counted."""
    scores, support_K = _scores(totals_3K), totals_3K[2]
    micro = (x_1[0] for x_1 in _scores(totals_3K.sum(1, keepdims=True)))
    macro = (x_K[counted_K].mean() for x_K in scores)
    weighted = (x_K @ support_K / max(support_K.sum(), 1) for x_K in scores)
    return dict(zip(AVERAGES, map(float, (*micro, *macro, *weighted)), strict=True))

def _correlation(x_B: np.ndarray, y_B: np.ndarray) -> float:
    if not (np.ptp(x_B) and np.ptp(y_B)):
        return math.nan
    x_B, y_B = x_B - x_B.mean(), y_B - y_B.mean()
    return float(x_B @ y_B) / math.sqrt((x_B @ x_B) * (y_B @ y_B))

def _ranks(x_B: np.ndarray) -> np.ndarray:
    _, place_B, counts = np.unique(x_B, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place_B]

def _scores(totals_3K: np.ndarray) -> list[np.ndarray]:
    """[precision_K, recall_K, f1_K] in float64."""
    hits_K, predicted_K, support_K = totals_3K
    parts = ((hits_K, predicted_K), (hits_K, support_K), (2 * hits_K, predicted_K + support_K))
    return [np.divide(a_K, b_K, out=np.zeros(len(a_K)), where=b_K > 0) for a_K, b_K in parts]
