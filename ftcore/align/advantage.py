"""Advantages: how much better than expected each token of a rollout was.

Letters: M answer tokens of all episodes, end to end; B episodes, S of them to each prompt.

rewards         r_t = -kl_coef kl_t, and at an episode's last token its score s too
gae             d_t = r_t + gamma v_t+1 - v_t,  A_t = d_t + gamma lambda A_t+1;  behind the last
                token v and A are 0
returns         A + v: what the values are fitted to
group           A = (R - mean) / (std + 1e-4) over the S episodes of its prompt, R the sum of the
                episode's rewards; the same for all of its tokens (GRPO)
leave_one_out   A = R - mean of the S - 1 others (RLOO)
whitened        (A - mean) / std over all tokens of the rollout, not of a micro-batch

source  Schulman et al. 2015, arXiv:1506.02438 (GAE); Shao et al. 2024, arXiv:2402.03300 (GRPO);
        Ahmadian et al. 2024, arXiv:2402.14740 (RLOO); Huang et al. 2024, arXiv:2403.17031
"""

from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-4

def token_rewards(scores_B: Tensor, kl_M: Tensor, lengths: Sequence[int], kl_coef: float) -> Tensor:
    """rewards_M: the penalty of each token, and at the end the score."""
    rewards_M = -kl_coef * kl_M
    rewards_M[torch.tensor(lengths).cumsum(0) - 1] += scores_B
    return rewards_M

def gae(rewards_M: Tensor, values_M: Tensor, lengths: Sequence[int], *, gamma: float,
        lam: float) -> Tensor:
    """advantages_M by generalised advantage estimation, each episode by itself."""
    advantages: list[float] = []
    for r_T, v_T in zip(rewards_M.split(lengths), values_M.split(lengths), strict=True):
        next_T = torch.cat([v_T[1:], v_T.new_zeros(1)])
        backwards, ahead = [], 0.0
        for delta in reversed((r_T + gamma * next_T - v_T).tolist()):
            ahead = delta + gamma * lam * ahead
            backwards.append(ahead)
        advantages += reversed(backwards)
    return rewards_M.new_tensor(advantages)

def grouped(rewards_M: Tensor, lengths: Sequence[int], groups: Sequence[int], *,
            leaves_one_out: bool) -> Tensor:
    """advantages_M by the other answers to the prompt, whose number is in `groups`; 0 if alone."""
    # numerics: float64, or what rounding leaves of equal rewards is divided by nearly nothing
    sums_B = torch.stack([r_T.sum() for r_T in rewards_M.cpu().double().split(lengths)])
    _, of_B, count_G = torch.unique(torch.tensor(groups), return_inverse=True, return_counts=True)
    others_G = (count_G - 1).clamp(min=1)
    apart_B = sums_B - (torch.bincount(of_B, sums_B) / count_G)[of_B]
    if leaves_one_out:
        apart_B = apart_B * count_G[of_B] / others_G[of_B]
    else:
        std_G = (torch.bincount(of_B, apart_B**2) / others_G).sqrt()
        apart_B = apart_B / (std_G[of_B] + EPSILON)
    return torch.repeat_interleave(apart_B, torch.tensor(lengths)).to(rewards_M)

def whitened(x_M: Tensor) -> Tensor:
    """Mean 0, standard deviation 1; 0 where they are all equal, as a single one is."""
    wide_M = x_M.double()  # numerics: as above
    return ((wide_M - wide_M.mean()) / (wide_M.std(correction=0) + 1e-8)).to(x_M)
