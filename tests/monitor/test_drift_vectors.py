"""Drift of what requests are about: vectors beside the formula, a library and known answers."""

from base64 import b64decode
import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from ftcore.deploy.answers import Record
from ftcore.model.heads import SKETCH, sketched
from ftcore.monitor.drift import Finding, Watch, auroc, mmd

Array = np.ndarray

def normal(seed: int, count: int, *, shift: float = 0, width: int = 64, moved: int = 8) -> Array:
    x_NE = np.random.default_rng(seed).normal(size=(count, width))
    x_NE[:, :moved] += shift
    return x_NE

def records(topics: list[int], seed: int = 0) -> list[Record]:
    """Vectors around the topics."""
    noise, centres = np.random.default_rng(seed), np.random.default_rng(99).normal(size=(9, 32))
    x_BC = torch.from_numpy(centres[topics] + noise.normal(size=(len(topics), 32)) / 2)
    return [{"embedding": told} for told in sketched(x_BC)]

def vectors(told: list[str]) -> Array:
    return np.array([np.frombuffer(b64decode(each), np.int8) for each in told], float)

def states(findings: list[Finding]) -> dict[str, int | None]:
    return {finding.statistic: finding.state for finding in findings}

def test_mmd_is_its_formula() -> None:
    for seed, (N, M) in enumerate([(2, 2), (9, 30), (150, 40), (200, 200)]):
        x_NE, y_ME = normal(seed, N, width=5), normal(seed + 10, M, shift=0.3, width=5)
        z_BE = np.concatenate([x_NE, y_ME])
        apart_BB = np.square(z_BE[:, None] - z_BE).sum(-1)
        k_BB = np.exp(-apart_BB / np.median(apart_BB[::9]))
        within_x, within_y = (k.sum() - len(k) for k in (k_BB[:N, :N], k_BB[N:, N:]))
        expected = within_x / (N * (N - 1)) + within_y / (M * (M - 1)) - 2 * k_BB[:N, N:].mean()
        assert mmd(x_NE, y_ME)[0] == pytest.approx(expected, abs=1e-5)
    assert mmd(np.ones((40, 4)), np.ones((30, 4)), deals=9) == (0, 1)

def test_dealt_anew_equal_sides_are_told_apart_as_seldom_as_they_should() -> None:
    told = [mmd(normal(seed, 200), normal(seed + 500, 200), deals=100) for seed in range(100)]
    assert np.mean([p <= 0.05 for _, p in told]) <= 0.1
    assert abs(np.mean([value for value, _ in told])) < 2e-4, "unbiased"
    moved = [mmd(normal(seed, 200), normal(seed + 500, 200, shift=0.25), deals=100)[1]
             for seed in range(20)]  # fmt: skip
    assert np.mean([p <= 0.05 for p in moved]) >= 0.9

def test_a_classifier_tells_sides_of_one_law_apart_as_chance_does() -> None:
    told = [auroc(normal(seed, 2000), normal(seed + 50, 2000)) for seed in range(30)]
    values, p_values = np.array(told).T
    assert np.mean(values) == pytest.approx(0.5, abs=0.02)
    assert np.mean([0.45 < each < 0.55 for each in values]) > 0.9
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.15)
    value, p = auroc(normal(0, 200), normal(1, 200, shift=5))
    assert value > 0.999 and p < 1e-9
    assert auroc(np.ones((20, 3)), np.ones((20, 3))) == (0.5, 0.5)

@pytest.mark.parametrize("shift", [0.0, 0.3, 1.0])
def test_the_classifier_is_that_of_a_library(shift: float) -> None:
    sides = normal(0, 400), normal(1, 100, shift=shift)
    z_BE, is_new_B = np.concatenate(sides), np.arange(500) >= 400
    z_BE = (z_BE - z_BE.mean(0)) / z_BE.std(0)
    z_BE = np.insert(z_BE, 0, 1, 1)
    theirs = LogisticRegression(C=1.0, fit_intercept=False).fit(z_BE[::2], is_new_B[::2])
    expected = roc_auc_score(is_new_B[1::2], theirs.decision_function(z_BE[1::2]))
    value, p = auroc(*sides)
    assert value == pytest.approx(expected, abs=1e-3)
    z_T, is_new_T = theirs.decision_function(z_BE[1::2]), is_new_B[1::2]
    ranks = mannwhitneyu(z_T[is_new_T], z_T[~is_new_T], alternative="greater",
                         method="asymptotic")
    assert p == pytest.approx(ranks.pvalue, rel=0.05)

def test_other_topics_alarm_and_an_order_of_topics_does_not() -> None:
    """A file of dev rows may be sorted by its classes."""
    watch = Watch(records(sorted([*range(6)] * 100)), window=100)
    mixed = np.random.default_rng(1).integers(6, size=200).tolist()
    assert states(watch.look(records(mixed, 1))) == {"mmd": 0, "auroc": 0}
    assert states(watch.look(records([6, 7] * 100, 2))) == {"mmd": 2, "auroc": 2}
    some = records(mixed[:100], 3) + records([6, 7] * 50, 4)
    assert states(watch.look(some)) == {"mmd": 1, "auroc": 1}
    found = watch.look(some)[0]
    assert found.p_value == pytest.approx(1 / 101) and found.value > found.bound > 0

def test_windows_of_one_law_seldom_alarm() -> None:
    random, alarms = np.random.default_rng(0), 0
    for _ in range(4):
        watch = Watch(records(random.integers(6, size=600).tolist(), int(random.integers(2**31))),
                      window=150)
        for _ in range(25):
            topics, seed = random.integers(6, size=300).tolist(), int(random.integers(2**31))
            alarms += 2 in states(watch.look(records(topics, seed))).values()
    assert alarms <= 1

def test_a_prompt_that_is_asked_again_and_again_counts_once() -> None:
    """As answers to one prompt do, of which each is a record."""
    watch = Watch(records([0, 1] * 300), window=50)
    rows = records([0, 1] * 100, 5)
    often = [row for row in rows for _ in range(8)]
    assert [f[:5] for f in watch.look(often)] == [f[:5] for f in watch.look(often[:1600:8])]

@pytest.mark.filterwarnings("error")
def test_vectors_that_are_none_are_left_out() -> None:
    rows = records([0, 1] * 100)
    watch = Watch(rows, window=50)
    odd = [{"embedding": each} for each in
           ("text", None, 7, [1, 2], "A" * 88, "A" * 87 + "=", "-" * 86 + "==")]
    (found, _) = watch.look([*odd, *rows[:100], *odd])
    assert found.size == 50 and found.state == 0
    assert {f.state for f in watch.look(odd * 20)} == {None}

def test_sketches_keep_neighbours_and_forget_lengths() -> None:
    x_BC = torch.from_numpy(normal(0, 300, width=96, moved=90, shift=0.5))
    told_BE = vectors(sketched(x_BC))
    assert sketched(x_BC) == sketched(7 * x_BC) and told_BE.shape == (300, SKETCH)
    assert np.abs(told_BE[:9] - vectors(sketched(x_BC[:9]))).max() <= 1
    unit_BC = x_BC / x_BC.norm(dim=1, keepdim=True)
    one, two = (torch.pdist(x).numpy() for x in (unit_BC, torch.from_numpy(told_BE / 240)))
    assert np.corrcoef(one, two)[0, 1] > 0.5 and two.mean() == pytest.approx(one.mean(), rel=0.1)
