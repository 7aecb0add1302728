"""Metrics of probabilities: how well they rank, how far they can be believed, how to mend them.

B rows of K classes each; U distinct scores from high to low. h_u of the n_u rows with score u are
positive; H_u and N_u count those with this score or a higher one, H and N all:

    auroc = sum_u (n_u - h_u) (H_u - h_u / 2) / (H (N - H))    a positive beats a negative, ties 1/2
    auprc = sum_u h_u (H_u / N_u) / H                          average precision, nothing smoothed
    brier = mean over rows of sum_k (p_k - [k is the target])^2
    ece   = sum over bins of rows / N * |mean confidence - accuracy|

Sources: Hanley and McNeil 1982, Radiology 143, 29-36 (auroc); Brier 1950, Mon. Weather Rev. 78,
1-3; Guo et al. 2017, arXiv:1706.04599 (ece, temperature); Roelofs et al. 2022, arXiv:2012.08668."""

import math

import numpy as np

Array, Figures = np.ndarray, dict[str, float]

def ranking(target_B: Array, score_B: Array) -> Figures:
    """auroc, NaN where one side has no row; auprc, NaN without positives."""
    _, hits_U, rows_U = _curve(target_B, score_B)
    h_U, n_U = (np.diff(x_U, prepend=0) for x_U in (hits_U, rows_U))
    H, N = int(h_U.sum()), int(n_U.sum())
    won = int(((n_U - h_U) * (2 * hits_U - h_U)).sum())  # numerics: whole numbers, so exact
    auprc = float(h_U @ (hits_U / rows_U)) / H if H else math.nan
    return {"auroc": won / (2 * H * (N - H)) if 0 < H < N else math.nan, "auprc": auprc}

def probability_metrics(target_B: Array, p_BK: Array, top_k: int = 5) -> Figures:
    """Figures of rows that have one of K classes each. top_5_accuracy: share of the rows whose
    target is among the `top_k` classes, of equal ones the lower first, where K > top_k; auroc and
    auprc: of class 1 where K = 2, else of each class against the rest, the mean over those with
    rows on both sides; brier and ece: the formulas above, the bins those of `reliability`."""
    K, found = p_BK.shape[1], {}
    target_BK = target_B[:, None] == np.arange(K)
    if top_k < K:
        best_Bk = np.argsort(-p_BK, axis=1, kind="stable")[:, :top_k]
        found[f"top_{top_k}_accuracy"] = float((best_Bk == target_B[:, None]).any(1).mean())
    sides = [1] if K == 2 else np.flatnonzero(target_BK.any(0) & ~target_BK.all(0))
    ranks = [ranking(target_BK[:, k], p_BK[:, k]) for k in sides]
    for name in ("auroc", "auprc"):
        found[name] = float(np.mean([each[name] for each in ranks] or math.nan))
    gaps = (r["rows"] * abs(r["confidence"] - r["accuracy"]) for r in reliability(target_B, p_BK))
    brier = float(np.square(p_BK - target_BK).sum(1).mean())
    return found | {"brier": brier, "ece": sum(gaps) / len(p_BK)}

def reliability(target_B: Array, p_BK: Array, bins: int = 15) -> list[Figures]:
    """Rows, mean confidence (the highest probability) and accuracy of bins of equal mass. Rows of
    equal confidence share their hits evenly, so that it does not matter which one falls where."""
    score_U, place_B, n_U = np.unique(p_BK.max(1), return_inverse=True, return_counts=True)
    right_U = np.bincount(place_B, p_BK.argmax(1) == target_B) / n_U
    cuts = [np.array_split(np.repeat(x_U, n_U), min(bins, len(p_BK))) for x_U in (score_U, right_U)]
    return [{"rows": len(c), "confidence": float(c.mean()), "accuracy": float(a.mean())}
            for c, a in zip(*cuts, strict=True)]  # fmt: skip

def temperature(target_B: Array, logits_BK: Array) -> float:
    """The T, 0.05 ... 20, of least mean negative log likelihood of softmax(logits / T), convex in
    1 / T. 1.0 where each target has its row's highest logit: such rows ask for T = 0, or none."""
    z_BK = logits_BK - np.take_along_axis(logits_BK, target_B[:, None], 1)  # loss: log sum e^(b z)
    if z_BK.max() <= 0:
        return 1.0
    below_BK, low, high = z_BK - z_BK.max(1, keepdims=True), 1 / 20, 1 / 0.05
    for _ in range(50):  # the bracket ends 1e-14 wide
        e_BK = np.exp((b := math.sqrt(low * high)) * below_BK)
        slope = ((e_BK * z_BK).sum(1) / e_BK.sum(1)).mean()
        low, high = (b, high) if slope < 0 else (low, b)
    return 1 / b

def threshold_table(target_B: Array, score_B: Array, count: int = 9) -> list[Figures]:
    """What predicting "score >= threshold" gives, of thresholds at evenly spaced quantiles and of
    the `best`: its F1 is highest, and it the highest of such. share: rows predicted positive."""
    score_U, hits_U, rows_U = _curve(target_B, score_B)
    H, N, f1_U = hits_U[-1], rows_U[-1], 2 * hits_U / (rows_U + hits_U[-1])
    levels = np.arange(1, count + 1) / (count + 1)
    shown_U = np.isin(score_U, np.quantile(score_B, levels, method="inverted_cdf"))
    shown_U[f1_U.argmax()] = True
    columns = {"threshold": score_U, "precision": hits_U / rows_U, "recall": hits_U / max(H, 1),
               "f1": f1_U, "share": rows_U / N, "best": np.arange(len(f1_U)) == f1_U.argmax()}
    return [{name: x_U[u].item() for name, x_U in columns.items()}
            for u in np.flatnonzero(shown_U)[::-1]]  # fmt: skip

def _curve(target_B: Array, score_B: Array) -> tuple[Array, ...]:
    """Distinct scores from high to low; positives, and rows, with each of them or a higher one."""
    score_U, place_B, n_U = np.unique(score_B, return_inverse=True, return_counts=True)
    h_U = np.bincount(place_B[target_B], minlength=len(score_U))
    return score_U[::-1], np.cumsum(h_U[::-1]), np.cumsum(n_U[::-1])
