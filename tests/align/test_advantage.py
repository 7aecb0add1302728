"""Advantages against their definitions, written out as sums over each episode by itself."""

import math
from collections.abc import Callable
import numpy as np
import pytest
import torch
from torch import Tensor
from ftcore.align.objective import gae, grouped, token_rewards, whitened

DISCOUNTS = [(1.0, 0.95), (0.9, 0.8), (0.97, 0.0), (1.0, 1.0), (0.9, 1.0), (0.0, 0.7)]
Draw = Callable[[int], Tensor]

@pytest.fixture
def draw() -> Draw:
    """Count -> so many normal numbers, float64, the same in every run."""
    random = np.random.default_rng(11)
    return lambda count: torch.from_numpy(random.normal(size=count))

@pytest.fixture
def ragged() -> list[list[int]]:
    """Lengths of the episodes of many rollouts, among them single tokens and single episodes."""
    random = np.random.default_rng(5)
    drawn = (random.integers(1, 14, random.integers(1, 9)).tolist() for _ in range(60))
    return [[1], [1, 1, 1], [7], [1, 12, 1], *drawn]

def double_sum(r_T: list[float], v_T: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum over l of (gamma lambda)^l d_t+l, each d by itself; O(T^2)."""
    ends = [*v_T, 0.0]
    deltas = [r + gamma * ends[t + 1] - ends[t] for t, r in enumerate(r_T)]
    return [
        math.fsum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas)))
        for t in range(len(deltas))
    ]

@pytest.mark.parametrize(("gamma", "lam"), DISCOUNTS)
def test_gae_is_the_double_sum_of_each_episode(
    gamma: float, lam: float, ragged: list[list[int]], draw: Draw
) -> None:
    for lengths in ragged:
        rewards_M, values_M = draw(sum(lengths)), draw(sum(lengths))
        parts = zip(rewards_M.split(lengths), values_M.split(lengths), strict=True)
        wanted = [a for r, v in parts for a in double_sum(r.tolist(), v.tolist(), gamma, lam)]
        found_M = gae(rewards_M, values_M, lengths, gamma=gamma, lam=lam)
        assert found_M.dtype == torch.float64
        assert found_M.tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-12)

def test_gae_of_a_table_worked_by_hand() -> None:
    """gamma 1/2, lambda 1/2, so gamma lambda is 1/4. Episode 1: rewards 0 0 8, values 4 2 6;
    d_3 = 8 + 0 - 6 = 2, d_2 = 0 + 3 - 2 = 1, d_1 = 0 + 1 - 4 = -3;
    A_3 = 2, A_2 = 1 + 2/4 = 1.5, A_1 = -3 + 1.5/4 = -2.625. Episode 2, one token: 5 - 7 = -2."""
    rewards_M, values_M = torch.tensor([0.0, 0, 8, 5]), torch.tensor([4.0, 2, 6, 7])
    found_M = gae(rewards_M, values_M, [3, 1], gamma=0.5, lam=0.5)
    assert found_M.tolist() == [-2.625, 1.5, 2.0, -2.0]

def test_gae_at_its_two_ends(draw: Draw) -> None:
    """lambda 0 is one step ahead; lambda 1 all that is to come, less what was expected."""
    rewards_M, values_M = draw(6), draw(6)
    next_M = torch.cat([values_M[1:], torch.zeros(1, dtype=torch.float64)])
    one = gae(rewards_M, values_M, [6], gamma=0.9, lam=0.0)
    torch.testing.assert_close(one, rewards_M + 0.9 * next_M - values_M)
    whole = gae(rewards_M, values_M, [6], gamma=1.0, lam=1.0)
    torch.testing.assert_close(whole, rewards_M.flip(0).cumsum(0).flip(0) - values_M)

def test_episodes_do_not_see_each_other(draw: Draw) -> None:
    lengths = [3, 1, 5]
    rewards_M, values_M = draw(9), draw(9)
    rule = {"gamma": 0.9, "lam": 0.9}
    together = gae(rewards_M, values_M, lengths, **rule).split(lengths)
    parts = zip(rewards_M.split(lengths), values_M.split(lengths), lengths, strict=True)
    for mine, (r_T, v_T, length) in zip(together, parts, strict=True):
        assert torch.equal(mine, gae(r_T, v_T, [length], **rule))

@pytest.mark.parametrize("is_rloo", [False, True])
@pytest.mark.parametrize(("prompts", "samples"), [(1, 2), (1, 8), (3, 2), (4, 8), (2, 5)])
def test_answers_are_compared_with_others_to_their_prompt(
    prompts: int, samples: int, is_rloo: bool, draw: Draw
) -> None:
    random = np.random.default_rng(samples)
    for _ in range(20):
        lengths = random.integers(1, 6, prompts * samples).tolist()
        rewards_M = draw(sum(lengths))
        sums = [math.fsum(r_T.tolist()) for r_T in rewards_M.split(lengths)]
        wanted = []
        for i, length in enumerate(lengths):
            first = i // samples * samples
            same = sums[first : first + samples]
            if is_rloo:
                wanted += [sums[i] - (sum(same) - sums[i]) / (samples - 1)] * length
            else:
                wanted += [(sums[i] - np.mean(same)) / (np.std(same, ddof=1) + 1e-4)] * length
        found_M = grouped(rewards_M, lengths, samples, is_rloo=is_rloo)
        assert found_M.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-12)

def test_equal_answers_have_no_advantage() -> None:
    rewards_M, lengths = torch.tensor([1.0, 0, 1, 0.25, 0.75, 2, 2]), [2, 1, 3, 1]
    for is_rloo in (False, True):
        same_M = grouped(rewards_M[:6], lengths[:2] + [2, 1], 2, is_rloo=is_rloo)
        assert same_M[:3].tolist() == [0.0] * 3 and same_M[3:].abs().min() > 0

def test_advantages_of_a_group_sum_to_nothing(draw: Draw) -> None:
    found_M = grouped(draw(8), [1] * 8, 4, is_rloo=True)
    assert found_M[:4].sum().item() == pytest.approx(0, abs=1e-12)
    assert found_M[4:].sum().item() == pytest.approx(0, abs=1e-12)

def test_each_token_pays_its_divergence_and_the_last_has_the_score(
    ragged: list[list[int]], draw: Draw
) -> None:
    for lengths in ragged:
        scores_B, kl_M = draw(len(lengths)), draw(sum(lengths))
        before = kl_M.clone()
        wanted = []
        for score, kl_T in zip(scores_B.tolist(), kl_M.split(lengths), strict=True):
            wanted += [-0.3 * kl for kl in kl_T.tolist()]
            wanted[-1] += score
        found_M = token_rewards(scores_B, kl_M, lengths, 0.3)
        assert found_M.tolist() == pytest.approx(wanted, rel=1e-12)
        assert torch.equal(kl_M, before)  # which is logged, and drawn on the page

def test_rewards_at_no_penalty_are_the_scores_alone() -> None:
    found_M = token_rewards(torch.tensor([2.0, -1.0]), torch.ones(4), [3, 1], 0.0)
    assert found_M.tolist() == [0, 0, 2, -1]

def test_whitening_is_over_all_tokens_of_the_rollout(draw: Draw) -> None:
    x_M = 3 * draw(57) - 5
    found = whitened(x_M).numpy()
    assert found == pytest.approx((x_M.numpy() - x_M.numpy().mean()) / x_M.numpy().std(), rel=1e-6)
    assert found.mean() == pytest.approx(0, abs=1e-9) and found.std() == pytest.approx(1, rel=1e-6)
    parts = torch.cat([whitened(part) for part in x_M.split([20, 37])]).numpy()
    assert np.abs(found - parts).max() > 1e-3  # not those of each micro-batch

@pytest.mark.parametrize("x", [4.0, 0.1, 0.7, -123.4])
def test_what_does_not_differ_is_whitened_to_nothing(x: float) -> None:
    """In fp32 the mean of equal numbers is not that number, and what is left would be scaled up."""
    for count in (1, 3, 7, 31, 4097):
        assert whitened(torch.full((count,), x)).abs().max() < 1e-5
        for is_rloo in (False, True):
            rule = {"is_rloo": is_rloo}
            apart_M = grouped(torch.full((2 * count,), x), [1] * 2 * count, 2 * count, **rule)
            assert apart_M.abs().max() < 1e-6 and apart_M.dtype == torch.float32
