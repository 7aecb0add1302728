"""A toy whose optimum is known: of all policies the best is q exp(r / beta), over its sum."""

from collections.abc import Callable
import pytest
import torch
from ftcore.align.ppo import PpoLoop
from tests.align.conftest import LETTERS, WORTH, answers, chances

BETA = 0.5  # factor of the divergence
RUN = {
    "optim": {"lr": 4e-3, "batch_size": 512}, "schedule": {"shape": "linear"},
    "rollout": {"prompts": 16, "samples": 32}, "loop": {"max_steps": 60},
}  # fmt: skip
PPO = {"kl_coef": BETA, "epochs": 2, "gae_lambda": 1.0, "whiten": False, "value_clip": 0.0,
       "value_coef": 1.0}

def rewards_and_divergences(loop: PpoLoop) -> list[list[float]]:
    """Of the optimum, the policy and the reference: means over the prompts, exactly."""
    worth = torch.tensor(
        [sum(WORTH[LETTERS[i]] for i in ids if i < len(LETTERS)) for ids in answers()]).double()
    told = []
    for _, ids_T in loop.actor.prompts:
        log_q, log_p = (chances(m, ids_T.tolist()) for m in (loop.reference, loop.model))
        assert abs(log_q.exp().sum() - 1) < 1e-5, "these are all answers"
        log_best = (log_q + worth / BETA).log_softmax(0)
        told.append([[(x.exp() * worth).sum(), (x.exp() * (x - log_q)).sum()]
                     for x in (log_best, log_p, log_q)])
    return torch.tensor(told).mean(0).tolist()

@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_finds_it(seed: int, make_ppo: Callable[..., PpoLoop]) -> None:
    loop = make_ppo(f"seed-{seed}", seed, **RUN, ppo=PPO)
    assert loop.train() == 0
    (best, most), (found, spent), (start, _) = rewards_and_divergences(loop)
    print(f"reward {start:.3f} -> {found:.3f} of {best:.3f}, divergence {spent:.3f} of {most:.3f}")
    assert found >= 0.95 * best and spent <= 1.1 * most
    assert start < 0.7 * best, "a start that is near to the optimum would prove little"
