"""Figures of pairs that can be reckoned by hand."""

from typing import Any
import numpy as np
import pytest
import torch
from ftcore.config import DpoConfig, RewardConfig
from ftcore.data.encode import Split
from ftcore.data.pack import pair, shifted
from ftcore.evaluate import evaluator
from ftcore.evaluate.evaluator import evaluate_pairs

# Tokens of both answers, and scores: right, wrong, a tie, right.
TOKENS = [(5, 2), (4, 3), (2, 2), (1, 6)]
SCORES = [(2.0, 1.0), (0.0, 0.5), (1.0, 1.0), (3.0, -1.0)]

@pytest.fixture
def split() -> Split:
    made = []
    for name, counts in zip("abcd", TOKENS, strict=True):
        ids = [np.arange(3 + n, dtype=np.int32) for n in counts]
        sides = [shifted(name, ids_T, np.float32(ids_T >= 3)) for ids_T in ids]
        made.append(pair(name, sides, margin=0.5 * (name == "a")))
        made[-1].labels[4] = 0.25
    return Split(documents=made)

def test_scores(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = torch.tensor(SCORES).reshape(-1, 1)
    monkeypatch.setattr(evaluator, "all_logits", lambda *_, **__: flat)
    judged = evaluate_pairs(None, split, 64, None, options=RewardConfig(centring=0.1))
    found = judged.values
    softplus = np.log1p(np.exp([-0.5, 0.5, 0.0, -4.0]))  # of margin - gap
    squares = 0.1 * np.array([9.0, 0.25, 4.0, 4.0])
    assert found["loss"] == pytest.approx((softplus + squares).mean())
    assert found["accuracy"] == 2.5 / 4
    assert found["accuracy_chosen_longer"] == 1 / 2 and found["accuracy_chosen_shorter"] == 1
    assert found["longer_reply_accuracy"] == 2.5 / 4 and found["margin"] == 4.5 / 4
    assert found["length_bias"] == pytest.approx(spearman())
    chances = 1 / (1 + np.exp([-1.0, 0.5, 0.0, -4.0]))
    # every row its own bin: how sure it is of its choice, and whether that is right
    sure = np.maximum(chances, 1 - chances)
    assert found["ece"] == pytest.approx(np.abs(sure - [1, 0, 0, 1]).mean())
    assert judged.right_B.tolist() == [True, False, False, True]
    assert judged.rows[3] == {
        "row_id": "d", "gap": 4.0, "chosen_tokens": 1, "rejected_tokens": 6}
    some = judged.figures(np.array([2]))
    assert some["accuracy"] == 0.5 and np.isnan(some["accuracy_chosen_longer"])

def spearman() -> float:
    from scipy.stats import spearmanr

    return spearmanr(np.ravel(TOKENS), np.ravel(SCORES)).statistic

@pytest.mark.parametrize("options", [{}, {"length_normalised": True}, {"loss": "ipo"}])
def test_log_ratios(
    options: dict[str, Any], split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = np.array([(-score * n, n) for counts, scores in zip(TOKENS, SCORES, strict=True)
                     for n, score in zip(counts, scores, strict=True)])  # fmt: skip
    monkeypatch.setattr(evaluator, "scored_tokens", lambda *_, **__: sums)
    judged = evaluate_pairs(None, split, 64, None, options=DpoConfig(beta=0.5, **options))
    is_mean = "length_normalised" in options
    said = np.array(SCORES) * (1 if is_mean else np.array(TOKENS))
    gaps = said[:, 0] - said[:, 1] - 0.25
    assert [row["gap"] for row in judged.rows] == pytest.approx(gaps)
    losses = (gaps - 1) ** 2 if "loss" in options else np.log1p(np.exp(-0.5 * gaps))
    assert judged.values["loss"] == pytest.approx(losses.mean())
    assert "length_bias" not in judged.values
