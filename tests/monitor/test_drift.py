"""Drift: formulas beside scipy, closed forms, alarms that are rare without a shift and come with
one, and what each signal cannot see."""

import math
from collections.abc import Iterator
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats
from scipy.spatial.distance import jensenshannon
from ftcore.deploy.answers import Record
from ftcore.monitor import drift
from ftcore.monitor.drift import STATISTICS, Finding, Watch, deciles, ks, psi

Array = np.ndarray
FAMILY = {"prompt_tokens", "unknown", "label", "entropy", "confidence"}

def sides(count: int) -> Iterator[tuple[Array, Array]]:
    """Two samples of any sizes, of one law or of two, with and without equal values."""
    for seed in range(count):
        random = np.random.default_rng(seed)
        sizes = random.integers(1, [300, 200])
        one, two = (random.normal(random.normal(), random.gamma(2), size=n) for n in sizes)
        digits = seed % 4
        yield (one, two) if digits == 3 else (one.round(digits), two.round(digits))

def records(count: int, random: np.random.Generator, *, longer: float = 0, sharpness: float = 2.5,
            unknown: float = 0, flipped: float = 0, feedback: float = 0) -> list[Record]:
    """What a calibrated classifier of four classes says; `flipped`: right ones whose label by
    feedback is another."""
    logits_BK = sharpness * random.normal(size=(count, 4))
    p_BK = special.softmax(logits_BK, 1)
    is_right_B = (random.random(count) < p_BK.max(1)) & (random.random(count) >= flipped)
    columns = {"prompt_tokens": random.lognormal(3 + longer, 0.6, count).astype(int).tolist(),
               "unknown": (0.1 * random.beta(1, 9, count) + unknown).tolist(),
               "label": [f"class {k}" for k in p_BK.argmax(1)],
               "confidence": p_BK.max(1).tolist(), "entropy": special.entr(p_BK).sum(1).tolist()}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    for row, is_right in zip(rows, is_right_B.tolist(), strict=True):
        if random.random() < feedback:
            row |= {"wanted": row["label"] if is_right else "another", "right": is_right}
    return rows

def states(findings: list[Finding]) -> dict[str, int | None]:
    """Of each signal: that of the statistic which moved most, None where none could be told."""
    found: dict[str, int | None] = {}
    for finding in findings:
        known = found.get(finding.signal)
        found[finding.signal] = finding.state if known is None else max(known, finding.state)
    return found

@pytest.fixture(scope="module")
def random() -> np.random.Generator:
    return np.random.default_rng(0)

@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch(records(1000, np.random.default_rng(1), feedback=1), window=200)

def test_ks_is_that_of_scipy() -> None:
    for one, two in sides(1000):
        largest, p = ks(one, two)
        expected = stats.ks_2samp(one, two, method="asymp")
        assert largest == pytest.approx(expected.statistic, abs=1e-12) and 0 <= p <= 1
        e = math.sqrt(len(one) * len(two) / (len(one) + len(two)))
        assert p == pytest.approx(special.kolmogorov(largest * (e + 0.12 + 0.11 / e)), abs=1e-9)
        if e > 5:
            assert p == pytest.approx(expected.pvalue, abs=0.03)

def test_wasserstein_is_that_of_scipy() -> None:
    for one, two in sides(1000):
        expected = stats.wasserstein_distance(one, two)
        if one.std():
            assert drift.wasserstein(one, two) * one.std() == pytest.approx(expected, abs=1e-12)
    nothing, mixed = np.zeros(300), np.repeat([0.0, 5.0], [90, 10])
    assert drift.wasserstein(nothing, nothing) == 0
    assert drift.wasserstein(nothing, mixed) == pytest.approx(0.5 / np.append(nothing, mixed).std())

def test_js_and_chi2_are_those_of_scipy() -> None:
    for seed in range(600):
        random = np.random.default_rng(seed)
        K = random.integers(2, 12)
        counts_2K = random.multinomial([300, 90], random.dirichlet(np.ones(K)))
        one, two = (np.repeat(np.arange(K), counts_K) for counts_K in counts_2K)
        assert drift.js(one, two) == pytest.approx(jensenshannon(*counts_2K, base=2), abs=1e-7)
        there_2K = counts_2K[:, counts_2K.any(0)]
        expected = stats.chi2_contingency(there_2K, correction=False)[:2]
        assert drift.chi2(one, two) == pytest.approx(expected, abs=1e-9)
    assert drift.chi2(np.zeros(9), np.zeros(4)) == (0, 1)

def test_two_coins() -> None:
    def entropy(p: float) -> float:
        return float(special.entr([p, 1 - p]).sum() / math.log(2))
    for p, q in ((0.5, 0.9), (0.1, 0.2), (0, 1), (0.3, 0.3), (0, 0.4)):
        one, two = (np.arange(1000) < 1000 * share for share in (p, q))
        expected = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
        assert drift.js(one, two) == pytest.approx(math.sqrt(expected), abs=1e-7)

def test_psi_without_a_shift(random: np.random.Generator) -> None:
    """(bins - 1) (1 / N + 1 / M) in the mean: the usual limit of 0.1 says nothing by itself."""
    for N, M, share in ((1000, 200, 0.06), (2000, 500, 0), (1000, 100, 0.47)):
        told = [STATISTICS["psi"](random.gamma(2, size=N), random.gamma(2, size=M))
                for _ in range(1000)]  # fmt: skip
        assert np.mean(np.array(told) > 0.1) == pytest.approx(share, abs=0.05)
        assert np.mean(told) == pytest.approx(9 * (1 / N + 1 / M), rel=0.05 if M > 100 else 0.1)

def test_psi_by_hand() -> None:
    reference = np.arange(1.0, 101)
    assert deciles(reference).tolist() == list(range(10, 100, 10))
    assert psi(reference, np.repeat(reference, 2)) == 0  # an edge stays where it was
    first_alone = (1 - 0.1) * math.log(10) + 9 * (0.05 - 0.1) * math.log(0.05 / 0.1)
    assert psi(reference, np.full(10, -3.0)) == pytest.approx(first_alone)
    few = np.repeat([1.0, 2.0, 7.0], [45, 35, 20])
    assert deciles(few)[1:].tolist() == [1, 2, 7] and 0 < 1 - deciles(few)[0] < 1e-9
    assert psi(few, np.repeat(few, 3)) == 0

@pytest.mark.parametrize("moved", [0.0, 10.0])
def test_psi_of_a_constant_sees_values_on_both_sides(moved: float) -> None:
    reference, window = np.full(1000, 5.0), np.repeat([5.0, moved], 100)
    assert STATISTICS["psi"](reference, reference[:200]) == 0
    assert STATISTICS["psi"](reference, window) > 1

def test_ks_and_wasserstein_of_normals(random: np.random.Generator) -> None:
    for d in (0.2, 0.5, 1.5):
        one, two = random.normal(size=100_000), random.normal(d, size=100_000)
        assert ks(one, two)[0] == pytest.approx(2 * special.ndtr(d / 2) - 1, abs=0.01)
        assert drift.wasserstein(one, two) == pytest.approx(d, abs=0.02)
    told = [ks(random.normal(size=800), random.normal(size=200))[1] for _ in range(1000)]
    assert np.mean(np.array(told) < 0.01) <= 0.02

def test_ece_rises_where_confidence_is_not_earned(random: np.random.Generator) -> None:
    confidence_B = random.beta(5, 2, 20_000)
    right_B = random.random(20_000) < confidence_B
    calibrated = np.stack([confidence_B, right_B], 1)
    sharper = np.stack([special.expit(2 * special.logit(confidence_B)), right_B], 1)
    assert abs(STATISTICS["ece"](calibrated[:10_000], calibrated[10_000:])) < 0.01
    assert STATISTICS["ece"](calibrated, sharper) > 0.08
    sure = np.stack([np.full(100, 0.9), np.arange(100) % 2], 1)
    assert STATISTICS["ece"](np.array([[1.0, 1.0]]), sure) == pytest.approx(0.4)

@given(st.integers(0, 500), st.integers(0, 500), st.sampled_from([0.9, 0.95, 0.99]))
def test_wilson_is_that_of_scipy(hits: int, misses: int, level: float) -> None:
    found = drift.wilson(hits, n := hits + misses, level)
    expected = stats.binomtest(hits, n).proportion_ci(level, "wilson") if n else (0, 1)
    assert found == pytest.approx(tuple(expected), abs=1e-9)

def test_alarms_are_rare_without_a_shift_and_come_with_one() -> None:
    """A family of five signals: no more than one of 90 pairs of windows of one law alarms."""
    worst = []
    for seed in range(3):
        random = np.random.default_rng(seed)
        watch = Watch(records(600, random), window=100)
        for _ in range(100):
            found = states(watch.look(records(200, random)))
            assert set(found) == FAMILY
            worst.append(max(found.values()))
        for shift, signals in (({"longer": 0.5}, {"prompt_tokens"}),
                               ({"unknown": 0.05}, {"unknown"}),
                               ({"sharpness": 1.2}, {"entropy", "confidence"})):  # fmt: skip
            found = states(watch.look(records(200, random, **shift)))
            assert signals <= {name for name, state in found.items() if state == 2}
    assert sum(state == 2 for state in worst) <= 300 / 90

def test_a_bound_is_what_a_comparison_without_a_shift_exceeds_once_in_a_hundred() -> None:
    random = np.random.default_rng(0)
    reference = [{"confidence": x} for x in random.normal(size=500)]
    bound, again, other = (Watch(reference, window=100, seed=seed).look(reference)[0].bound
                           for seed in (0, 0, 1))
    expected = special.ndtri(0.99) * math.sqrt(1 / 500 + 1 / 100)
    assert bound == pytest.approx(expected, rel=0.15)
    assert bound == again != other
    steady = [{"confidence": 0.8 + x["confidence"] / 1000} for x in reference]
    assert Watch(steady, window=100).look(steady)[0].bound == 0.03

def test_a_state_is_that_of_the_newest_two_windows(watch: Watch) -> None:
    random = np.random.default_rng(2)
    same, moved = (records(200, random, longer=by, feedback=1) for by in (0, 0.7))
    for windows, state in (([same, same], 0), ([moved, same], 0), ([same, moved], 1),
                           ([moved], 1), ([same, moved, moved], 2)):  # fmt: skip
        found = watch.look([record for window in windows for record in window])
        assert states(found)["prompt_tokens"] == state
    assert states(watch.look(moved[:199])) == dict.fromkeys([*FAMILY, "accuracy", "calibration"])
    assert all(f.value is None and f.p_value is None for f in watch.look([]))

def test_each_statistic_of_a_signal_alarms_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    reference = [{"unknown": x} for x in random.random(500)]
    monkeypatch.setitem(drift.STATISTICS, "wasserstein", lambda one, two: 0.05)
    found = Watch(reference, window=200).look([{"unknown": x} for x in random.random(400) / 2])
    unknown = {f.statistic: f for f in found if f.signal == "unknown"}
    assert unknown["ks"].value > unknown["ks"].bound and unknown["ks"].state == 2
    assert unknown["wasserstein"].value == 0.05 and unknown["wasserstein"].state == 0
    assert unknown["ks"].p_value < 1e-6 and unknown["wasserstein"].p_value is None

def test_flipped_labels_are_seen_by_feedback_alone(watch: Watch) -> None:
    """The blind spot of an estimate without labels: the model is as sure as before."""
    found = watch.look(records(400, np.random.default_rng(4), flipped=0.3, feedback=1))
    alarms = {signal for signal, state in states(found).items() if state}
    assert alarms == {"accuracy", "calibration"}
    told = {f.statistic: f.value for f in found}
    assert abs(told["drop"]) < 0.03 and told["accuracy"] > 0.15

def test_the_estimate_follows_the_accuracy_where_the_inputs_moved(watch: Watch) -> None:
    told = {f.statistic: f.value for f in watch.look(
        records(200, np.random.default_rng(5), sharpness=1.2, feedback=1))}
    assert told["drop"] == pytest.approx(told["accuracy"], abs=0.06) and told["drop"] > 0.15

def test_feedback_makes_do_with_a_hundred(watch: Watch) -> None:
    """Of the newest two windows, or older ones where these hold fewer."""
    random = np.random.default_rng(7)
    for old, new, size in ((0, 99, 99), (0, 100, 100), (0, 250, 100), (0, 400, 200), (300, 0, 100),
                           (40, 60, 100)):  # fmt: skip
        given = records(old, random, feedback=1) + records(400 - new, random)
        found = watch.look(given + records(new, random, feedback=1))
        (accuracy,) = (f for f in found if f.signal == "accuracy")
        assert accuracy.size == size and (accuracy.state is None) == (old + new < 100)

def test_feedback_for_few_is_waited_for(watch: Watch) -> None:
    """However long it takes, while other figures are read of the newest windows alone."""
    random = np.random.default_rng(9)
    rows = records(8000, random, flipped=0.5, feedback=0.02)
    told = {f.signal: f for f in watch.look(rows)}
    assert sum("right" in row for row in rows[-10 * watch.window :]) < 100
    assert told["accuracy"].size == 100 and told["accuracy"].state >= 1
    assert told["prompt_tokens"].state == 0
    silent = [{"prompt_tokens": 5}] * (10 * watch.window)
    found = {f.signal: f for f in watch.look([*rows, *silent])}
    assert found["entropy"].state is None and found["accuracy"].state == told["accuracy"].state

def test_a_new_category_counts() -> None:
    random = np.random.default_rng(8)
    same = [{"reason": "stop" if x < 0.9 else "length"} for x in random.random(1000)]
    cut = [{"reason": "error"} if random.random() < 0.1 else record for record in same]
    found = {f.signal: f for f in Watch(same, window=200).look(cut)}["reason"]
    assert found.state == 2 and found.p_value < 0.001

@pytest.mark.filterwarnings("error")
def test_fields_that_are_absent_constant_or_no_numbers(watch: Watch) -> None:
    reference = [{"prompt_tokens": 5, "label": "a", "confidence": 1.0, "entropy": None,
                  "unknown": math.nan, "right": True, "input": "text"}] * 300  # fmt: skip
    steady = Watch(reference, window=100)
    assert set(steady.reference) == FAMILY - {"unknown", "entropy"} | {"accuracy", "calibration"}
    assert set(states(steady.look(reference)).values()) == {0}
    found = steady.look([record | {"prompt_tokens": 6} for record in reference])
    assert {f.signal for f in found if f.state} == {"prompt_tokens"}
    holes = [record | {"unknown": math.inf, "entropy": None, "label": 3} if row % 2 else record
             for row, record in enumerate(records(500, np.random.default_rng(11)))]  # fmt: skip
    found = watch.look([{"prompt_tokens": 7}, *holes, {}, {"prompt_tokens": 1e300}])
    assert {f.signal: f.size for f in found if f.signal in FAMILY} == dict.fromkeys(FAMILY, 200)
    assert states(found)["unknown"] == states(found)["label"] == 0
    assert all(math.isfinite(f.value) for f in found if f.state is not None)
    assert Watch([]).look(holes) == []
