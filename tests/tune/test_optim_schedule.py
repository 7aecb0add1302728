"""The learning rate at points worked out by hand."""

import math
import pytest
from ftcore.config import ScheduleConfig
from ftcore.tune.optim import learning_rate

def rate_of(step: int, shape: str, decay: float = 0.25) -> float:
    """Of 12 steps, 4 of which warm up to 8; a quarter of that is left in the end."""
    config = ScheduleConfig(shape=shape, warmup=4 / 12, decay=decay, final=0.25)
    return learning_rate(step, 12, 8.0, config)

@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
def test_the_warm_up_rises_from_the_first_step_to_the_peak(shape: str) -> None:
    rates = [rate_of(step, shape) for step in range(5)]
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
    assert rate_of(step, shape) == pytest.approx(rate, rel=1e-12)

def test_a_decay_begins_after_the_warm_up() -> None:
    rates = [rate_of(step, "wsd", decay=11 / 12) for step in range(5)]
    assert rates == [2.0, 4.0, 6.0, 8.0, 8.0]

def test_without_warm_up_it_starts_at_the_peak_and_falls_at_each_step() -> None:
    for shape in ("cosine", "linear"):
        config = ScheduleConfig(shape=shape, warmup=0.0, final=0.0)
        rates = [learning_rate(step, 50, 1.0, config) for step in range(50)]
        assert rates[0] == 1.0 and rates == sorted(set(rates), reverse=True)
        assert 0 < rates[-1] < 0.03  # the last step is not wasted

def test_a_run_of_one_step() -> None:
    assert learning_rate(0, 1, 3.0, ScheduleConfig(shape="cosine")) == 3.0
