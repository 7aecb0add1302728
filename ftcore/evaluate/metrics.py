"""Figures of classes, sets of labels, scores, language modelling, probabilities, and of generated
answers, as texts or commands; how far a figure may be off, and whether two models differ.

K classes; n_kj rows of class k predicted as j; totals_3K are hits, predicted and support, int64:

    hits_k = n_kk        support_k = sum_j n_kj        predicted_k = sum_j n_jk
    precision_k = hits_k / predicted_k            recall_k = hits_k / support_k
    f1_k = 2 hits_k / (predicted_k + support_k)

0/0 is 0 in each of them. There is at least one row. B rows of K classes each have U distinct scores
from high to low; h_u of the n_u rows with score u are positive; H_u and N_u count those with this
score or a higher one, H and N all:

    auroc = sum_u (n_u - h_u) (H_u - h_u / 2) / (H (N - H))    a positive beats a negative, ties 1/2
    auprc = sum_u h_u (H_u / N_u) / H                          average precision, nothing smoothed
    brier = mean over rows of sum_k (p_k - [k is the target])^2
    ece   = sum over bins of rows / N * |mean confidence - accuracy|

A command is a JSON object with a text field that names what to do, the intent. Its slots are the
leaves of the rest, each a path and a value: {"intent": "wake", "at": {"days": ["sat", "sun"]}} has
at.days.0 = "sat" and at.days.1 = "sun". Values compare by their JSON text: 1, 1.0 and "1" differ.

C clusters of the held-out rows, R draws of C clusters. Rows that say nearly the same are one
cluster and come and go together: taken one by one they would give too narrow an interval.

    interval    from the 2.5th to the 97.5th percentile of R draws
    p           of a difference d: 2 min(share of d <= 0, share of d >= 0), each draw of both models
    McNemar     of n rows that one model alone has right, k of them the one with less; twice
                P(X < k) + P(X = k) / 2 with X of Binomial(n, 1/2): the mid-p form

Sources: Hanley and McNeil 1982, Radiology 143, 29-36 (auroc); Brier 1950, Mon. Weather Rev. 78,
1-3; Guo et al. 2017, arXiv:1706.04599 (ece, temperature); Roelofs et al. 2022, arXiv:2012.08668;
Efron 1979, Ann. Statist. 7, 1-26; Berg-Kirkpatrick et al. 2012, ACL D12-1091 (paired); Fagerland
et al. 2013, BMC Med. Res. Methodol. 13:91 (mid-p)."""

import json
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, takewhile
from typing import Any
import numpy as np
from ftcore.data.columns import to_bio
from ftcore.errors import DataError

Metrics = dict[str, float]
SCORES = ("precision", "recall", "f1")
AVERAGES = tuple(f"{score}_{mean}" for mean in ("micro", "macro", "weighted") for score in SCORES)
Figures = Callable[[np.ndarray], Mapping[str, float]]  # metrics of any rows, by their indices
Intervals = dict[str, tuple[float, float]]  # lowest and highest value, by metric
DRAWS, LEVEL = 1000, 0.95
PUNCTUATION = str.maketrans("", "", string.punctuation)

def class_totals(target_B: np.ndarray, predicted_B: np.ndarray, num_classes: int) -> np.ndarray:
    """totals_3K of rows that have one of K classes each, by index."""
    sides = target_B[target_B == predicted_B], predicted_B, target_B
    return np.stack([np.bincount(side_B, minlength=num_classes) for side_B in sides])

def class_scores(totals_3K: np.ndarray) -> list[np.ndarray]:
    """[precision_K, recall_K, f1_K] in float64."""
    hits_K, predicted_K, support_K = totals_3K
    parts = ((hits_K, predicted_K), (hits_K, support_K), (2 * hits_K, predicted_K + support_K))
    return [np.divide(a_K, b_K, out=np.zeros(len(a_K)), where=b_K > 0) for a_K, b_K in parts]

def class_figures(totals_3K: np.ndarray) -> Metrics:
    """accuracy, sum_k hits_k / rows; balanced_accuracy, mean recall_k of the classes with rows.

    ..._micro       the formulas above on sums over k; all equal the accuracy
    ..._macro       plain mean over the classes that occur, as target or as prediction
    ..._weighted    mean over the classes, weighted by support_k
    mcc             (c s - t.p) / sqrt((s^2 - p.p) (s^2 - t.t)), where 0/0 is 0, as in kappa
    kappa           (c s - t.p) / (s^2 - t.p), beyond chance; c hits, s rows, t support, p predicted
    source          Gorodkin 2004, Comput. Biol. Chem. 28, 367-374 (mcc of K classes)"""
    hits_K, predicted_K, support_K = totals_3K
    recall_K = class_scores(totals_3K)[1][support_K > 0]
    # numerics: Python integers, since rows^2 leaves int64 at 3e9 rows.
    s, t, p = int(support_K.sum()), support_K.astype(object), predicted_K.astype(object)
    chance = t @ p
    beyond, most = int(hits_K.sum()) * s - chance, s**2 - chance
    spread = (s**2 - t @ t) * (s**2 - p @ p)
    return {"accuracy": float(hits_K.sum() / s), "balanced_accuracy": float(recall_K.mean()),
            **_averages(totals_3K, predicted_K + support_K > 0),
            "mcc": beyond / math.sqrt(spread) if spread else 0.0,
            "kappa": beyond / most if most else 0.0}

def label_totals(target_BK: np.ndarray, predicted_BK: np.ndarray) -> np.ndarray:
    """totals_3K of rows that have any number of K labels: bool, True where a row has the label."""
    return np.stack([target_BK & predicted_BK, predicted_BK, target_BK]).sum(1)

def label_figures(target_BK: np.ndarray, predicted_BK: np.ndarray) -> Metrics:
    """subset_accuracy, share of the rows whose labels are all right; hamming_loss, share of the
    decisions that are wrong; averages over all K labels, 0 for one that never occurs."""
    totals_3K = label_totals(target_BK, predicted_BK)
    return {"subset_accuracy": float((target_BK == predicted_BK).all(1).mean()),
            "hamming_loss": float((target_BK != predicted_BK).mean()),
            **_averages(totals_3K, np.ones(target_BK.shape[1], dtype=bool))}

def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Type, first word and number of further words of each entity, as seqeval counts: an I- that
    goes on with nothing begins one."""
    bio = to_bio(tags)
    return {(tag[2:], first, len([*takewhile(f"I{tag[1:]}".__eq__, bio[first + 1 :])]))
            for first, tag in enumerate(bio) if tag.startswith("B-")}

def entity_totals(target: Sequence[str], predicted: Sequence[str],
                  types: Sequence[str]) -> np.ndarray:
    """totals_3K of a sentence's entities; right are type, first and last word."""
    wanted, given = entities(target), entities(predicted)
    counted = (Counter(type_ for type_, *_ in side) for side in (wanted & given, given, wanted))
    return np.array([[counts[type_] for type_ in types] for counts in counted], dtype=np.int64)

def entity_figures(totals_3K: np.ndarray) -> Metrics:
    """precision, recall and F1 of the entities of all types."""
    found = class_scores(totals_3K.sum(1, keepdims=True))
    return dict(zip(SCORES, (float(x_1[0]) for x_1 in found), strict=True))

def regression_metrics(target_B: np.ndarray, predicted_B: np.ndarray) -> Metrics:
    """pearson of the values, spearman of their ranks, equal ones sharing the mean of theirs; mae
    and rmse, in units of the score; r2 = 1 - squared errors / variance. NaN: by a constant."""
    errors_B = predicted_B - target_B
    spread = np.square(target_B - target_B.mean()).sum() if np.ptp(target_B) else math.nan
    return {"pearson": _correlation(target_B, predicted_B),
            "spearman": _correlation(_ranks(target_B), _ranks(predicted_B)),
            "mae": float(np.abs(errors_B).mean()), "rmse": math.sqrt(np.square(errors_B).mean()),
            "r2": float(1 - np.square(errors_B).sum() / spread)}

def perplexity(loss_sum: float, weight: float, num_bytes: int = 0) -> Metrics:
    """Of a loss in nats over tokens of total `weight`, which spell so many bytes; 0: unknown. loss:
    a token, NaN without any; perplexity: exp(loss), infinite from 709 on, near float64's end;
    bits_per_byte: loss_sum / (ln 2 * num_bytes), by which different tokenizers compare."""
    loss = float(loss_sum / weight) if weight else math.nan
    bits = {"bits_per_byte": float(loss_sum / (math.log(2) * num_bytes))} if num_bytes else {}
    return {"loss": loss, "perplexity": math.inf if loss > 709 else math.exp(loss), **bits}

def _averages(totals_3K: np.ndarray, counted_K: np.ndarray) -> Metrics:
    """AVERAGES; the macro ones over the classes that are counted."""
    scores, support_K = class_scores(totals_3K), totals_3K[2]
    micro = (x_1[0] for x_1 in class_scores(totals_3K.sum(1, keepdims=True)))
    macro = (x_K[counted_K].mean() for x_K in scores)
    weighted = (x_K @ support_K / max(support_K.sum(), 1) for x_K in scores)
    return dict(zip(AVERAGES, map(float, (*micro, *macro, *weighted)), strict=True))

def _correlation(x_B: np.ndarray, y_B: np.ndarray) -> float:
    return float(np.corrcoef(x_B, y_B)[0, 1]) if np.ptp(x_B) and np.ptp(y_B) else math.nan

def _ranks(x_B: np.ndarray) -> np.ndarray:
    _, place_B, counts = np.unique(x_B, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place_B]

def ranking(target_B: np.ndarray, score_B: np.ndarray) -> Metrics:
    """auroc, NaN where one side has no row; auprc, NaN without positives."""
    _, hits_U, rows_U = _curve(target_B, score_B)
    h_U, n_U = (np.diff(x_U, prepend=0) for x_U in (hits_U, rows_U))
    H, N = int(h_U.sum()), int(n_U.sum())
    won = int(((n_U - h_U) * (2 * hits_U - h_U)).sum())  # numerics: whole numbers, so exact
    auprc = float(h_U @ (hits_U / rows_U)) / H if H else math.nan
    return {"auroc": won / (2 * H * (N - H)) if 0 < H < N else math.nan, "auprc": auprc}

def probability_metrics(target_B: np.ndarray, p_BK: np.ndarray, top_k: int = 5) -> Metrics:
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
    return found | {"brier": float(np.square(p_BK - target_BK).sum(1).mean()),
                    "ece": calibration_error(p_BK.max(1), p_BK.argmax(1) == target_B)}

def calibration_error(confidence_B: np.ndarray, right_B: np.ndarray) -> float:
    bins = reliability(confidence_B, right_B)
    return sum(x["rows"] * abs(x["confidence"] - x["accuracy"]) for x in bins) / len(right_B)

def reliability(confidence_B: np.ndarray, right_B: np.ndarray, bins: int = 15) -> list[Metrics]:
    """Rows, mean confidence (the highest probability) and accuracy of bins of equal mass. Rows of
    equal confidence share their hits evenly, so that it does not matter which one falls where."""
    score_U, place_B, n_U = np.unique(confidence_B, return_inverse=True, return_counts=True)
    parts, right_U = min(bins, len(right_B)), np.bincount(place_B, right_B) / n_U
    cuts = [np.array_split(np.repeat(x_U, n_U), parts) for x_U in (score_U, right_U)]
    return [{"rows": len(c), "confidence": float(c.mean()), "accuracy": float(a.mean())}
            for c, a in zip(*cuts, strict=True)]

def temperature(target_B: np.ndarray, logits_BK: np.ndarray) -> float:
    """The T, 0.05 ... 20, of least mean negative log likelihood of softmax(logits / T), convex in
    1 / T. 1.0 where each target has its row's highest logit: such rows ask for T = 0, or none."""
    z_BK = logits_BK - np.take_along_axis(logits_BK, target_B[:, None], 1)  # loss: log sum e^(b z)
    if z_BK.max() <= 0:
        return 1.0
    below_BK, low, high = z_BK - z_BK.max(1, keepdims=True), 1 / 20, 1 / 0.05
    for _ in range(50):  # the bracket ends 1e-14 wide
        e_BK = np.exp((b := math.sqrt(low * high)) * below_BK)
        low, high = (b, high) if ((e_BK * z_BK).sum(1) / e_BK.sum(1)).mean() < 0 else (low, b)
    return 1 / b

def threshold_table(target_B: np.ndarray, score_B: np.ndarray, count: int = 9) -> list[Metrics]:
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
            for u in np.flatnonzero(shown_U)[::-1]]

def _curve(target_B: np.ndarray, score_B: np.ndarray) -> tuple[np.ndarray, ...]:
    """Distinct scores from high to low; positives, and rows, with each of them or a higher one."""
    score_U, place_B, n_U = np.unique(score_B, return_inverse=True, return_counts=True)
    h_U = np.bincount(place_B[target_B], minlength=len(score_U))
    return score_U[::-1], np.cumsum(h_U[::-1]), np.cumsum(n_U[::-1])

def exact_match(target: str, predicted: str) -> bool:
    """Equal character by character, surrounding whitespace stripped and nothing else done."""
    return target.strip() == predicted.strip()

def parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object that `text` is; None for anything else, NaN and Infinity among it."""
    try:
        value = json.loads(text, parse_constant=int)  # refuses NaN and Infinity
    except (ValueError, RecursionError):  # the latter: a model that repeats "[" for ever
        return None
    return value if isinstance(value, dict) else None

def token_f1(target: str, predicted: str) -> float:
    """2 common / (sum of both lengths) of tokens: lower case, ASCII punctuation and the articles
    a, an, the dropped, split at white space. 1 where both texts have none, 0 where one has.
    source: Rajpurkar et al. 2016, arXiv:1606.05250; 2018, arXiv:1806.03822 (no tokens left)"""
    bare = (text.lower().translate(PUNCTUATION) for text in (target, predicted))
    wanted, given = (Counter(re.sub(r"\b(a|an|the)\b", " ", text).split()) for text in bare)
    length = wanted.total() + given.total()
    return 2 * (wanted & given).total() / length if length else 1.0

def judged_text(target: str, predicted: str) -> dict[str, float]:
    return {"exact_match": exact_match(target, predicted),
            "json_valid": parse_object(predicted) is not None,
            "token_f1": token_f1(target, predicted)}

def judged_command(target: str, predicted: str, *, intent: str = "intent") -> dict[str, float]:
    """Whether an answer is a JSON object, the very text, an equal object (order of names and
    spacing are free), has the intent; slot_f1_of_row = 2 right / (given + wanted) slots, of none:
    as exact_match_object, and of several rows the mean. DataError: the target is no command."""
    wanted, given = parse_object(target), parse_object(predicted)
    if not isinstance((wanted or {}).get(intent), str):
        what = f"target {target[:80]!r} is not a JSON object with a text field {intent!r}"
        raise DataError(f"{what}: mend the row or name the field that holds the intent")
    leaves = [_leaves(wanted), _leaves(given or {})]
    slots, found = ({(path, value) for path, value in each.items()
                     if path != (intent,) and value not in ("{}", "[]")} for each in leaves)
    is_equal, count = leaves[0] == leaves[1], len(slots) + len(found)
    return {"json_valid": given is not None, "exact_match": exact_match(target, predicted),
            "exact_match_object": is_equal,
            "intent_accuracy": (given or {}).get(intent) == wanted[intent],
            "slot_f1_of_row": 2 * len(slots & found) / count if count else float(is_equal)}

def _leaves(command: dict[str, Any]) -> dict[tuple, str]:
    """{path: JSON text}; an empty object or list is a leaf too, so equal leaves, equal objects."""
    leaves, open_items = {}, [((), command)]
    while open_items:  # no recursion: what is generated may nest deeper than Python's stack goes
        path, value = open_items.pop()
        if value and isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            open_items += [((*path, key), item) for key, item in items]
        else:
            leaves[path] = json.dumps(value)
    return leaves

def draws(clusters_B: np.ndarray, seed: int, count: int = DRAWS) -> Iterator[np.ndarray]:
    """Row indices (int64) of each draw; clusters_B (int) are the same for rows of one cluster."""
    order_B = np.argsort(clusters_B, kind="stable")
    _, starts_C, sizes_C = np.unique(clusters_B[order_B], return_index=True, return_counts=True)
    random = np.random.default_rng(seed)
    for _ in range(count):
        picked_C = random.integers(len(starts_C), size=len(starts_C))
        sizes, firsts = sizes_C[picked_C], np.cumsum(sizes_C[picked_C]) - sizes_C[picked_C]
        yield order_B[np.arange(sizes.sum()) - np.repeat(firsts - starts_C[picked_C], sizes)]

def intervals(figures: Figures, clusters_B: np.ndarray, *, seed: int = 0) -> Intervals:
    return _ranges([figures(rows) for rows in draws(clusters_B, seed)])

def compare(one: Figures, other: Figures, clusters_B: np.ndarray,
            others_B: np.ndarray | None = None, *, seed: int = 0) -> dict[str, dict[str, float]]:
    """`difference` of each metric, `one` less `other`, of the same rows by two models, or of other
    rows in the clusters others_B; its `low` and `high`, and `p`. Zero between: too few to tell."""
    theirs_B = clusters_B if others_B is None else others_B
    mine = chain([np.arange(len(clusters_B))], draws(clusters_B, seed))
    theirs = chain([np.arange(len(theirs_B))], draws(theirs_B, seed + (theirs_B is others_B)))
    pairs = zip(map(one, mine), map(other, theirs), strict=True)
    whole, *told = ({name: a[name] - b[name] for name in a} for a, b in pairs)
    found: dict[str, dict[str, float]] = {}
    for name, (low, high) in _ranges(told).items():
        d_R = np.array([each[name] for each in told])
        sides = (1 + (d_R <= 0).sum(), 1 + (d_R >= 0).sum())  # the rows themselves count too
        p = min(1.0, 2 * float(min(sides)) / (1 + len(d_R)))
        found[name] = {"difference": whole[name], "low": low, "high": high, "p": p}
    return found

def mcnemar(gained: int, lost: int) -> float:
    """Mid-p of so uneven numbers of rows that either model alone has right; 1 without any."""
    n, k = gained + lost, min(gained, lost)
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1)]
    shares = [math.exp(each - n * math.log(2)) for each in logs]
    return min(1.0, 2 * (math.fsum(shares) - shares[-1] / 2))

def _ranges(told: Sequence[Mapping[str, float]]) -> Intervals:
    values = {name: np.array([each[name] for each in told]) for name in told[0]}
    return {name: tuple(np.quantile(values_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist())
            for name, values_R in values.items() if np.isfinite(values_R).all()}
