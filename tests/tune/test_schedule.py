"""The learning rate at points worked out by hand."""

import math

import pytest

from ftcore.tune.schedule import learning_rate

RUN = {"peak": 8.0, "total_steps": 12, "warmup_steps": 4, "final": 0.25}

@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_the_warm_up_rises_from_the_first_step_to_the_peak(shape: str) -> None:
    rates = [learning_rate(step, shape=shape, **RUN) for step in range(5)]
    assert rates == [2.0, 4.0, 6.0, 8.0, 8.0]

@pytest.mark.parametrize(
    ("shape", "step", "rate"),
    [
        ("linear", 6, 8 * (1 - 0.75 / 4)),
        ("linear", 8, 5.0),  # halfway between 8 and 2
        ("linear", 11, 8 * (1 - 0.75 * 7 / 8)),
        ("linear", 12, 2.0),
        ("cosine", 6, 2 + 6 * (1 + math.sqrt(0.5)) / 2),
        ("cosine", 8, 5.0),
        ("cosine", 12, 2.0),
        ("constant", 11, 8.0),
        ("wsd", 8, 8.0),  # the last three steps decay
        ("wsd", 9, 8.0),
        ("wsd", 10, 6.0),
        ("wsd", 11, 4.0),
        ("wsd", 12, 2.0),
        ("linear", 1000, 2.0),  # never below the end
        ("cosine", 1000, 2.0),
    ],
)
def test_after_the_warm_up(shape: str, step: int, rate: float) -> None:
    assert learning_rate(step, shape=shape, decay_steps=3, **RUN) == pytest.approx(rate, rel=1e-12)

def test_a_decay_begins_after_the_warm_up() -> None:
    rates = [learning_rate(step, shape="wsd", decay_steps=11, **RUN) for step in range(5)]
    assert rates == [2.0, 4.0, 6.0, 8.0, 8.0]

def test_without_warm_up_it_starts_at_the_peak_and_falls_at_each_step() -> None:
    for shape in ("cosine", "linear"):
        rates = [
            learning_rate(s, peak=1.0, total_steps=50, warmup_steps=0, shape=shape, final=0.0)
            for s in range(50)
        ]
        assert rates[0] == 1.0 and rates == sorted(set(rates), reverse=True)
        assert 0 < rates[-1] < 0.03  # the last step is not wasted

def test_a_run_of_one_step() -> None:
    rate = learning_rate(0, peak=3.0, total_steps=1, warmup_steps=0, shape="cosine", final=0.0)
    assert rate == 3.0
