"""What a policy is trained by: rewards and advantages of tokens, their clipped losses, divergences.

Letters: M answer tokens of all episodes, end to end; V vocabulary; B episodes, S to each prompt.
p is the policy, p_old the one that answered, q the reference: log-probabilities of what was said.

k1, k3, exact   p - q;  exp(q - p) - (q - p) - 1;  sum_V p (log p - log q): all of mean KL(p || q)
rewards         r_t = -kl_coef kl_t, and at an episode's last token its score too
gae             d_t = r_t + gamma v_t+1 - v_t,  A_t = d_t + gamma lambda A_t+1, both 0 at the end
group           A = (R - mean) / (std + 1e-4) of the S episodes, R their sums of rewards (GRPO)
leave_one_out   A = R - mean of the S - 1 others (RLOO)
policy          max(-A rho, -A clip(rho, 1 - c, 1 + c)), rho = exp(p - p_old)
value           max((v - R)^2, (v_old + clip(v - v_old, -c, c) - R)^2) / 2, R = A + v_old
adaptive        kl_coef (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon), n episodes

source  Schulman et al. 2015, arXiv:1506.02438 (GAE); 2017, arXiv:1707.06347 (clipping); 2020,
        joschu.net/blog/kl-approx.html (k1, k3); Ziegler et al. 2019, arXiv:1909.08593, section 2.2
        (adaptive); Engstrom et al. 2020, arXiv:2005.12729 (scaling by the running deviation); Shao
        et al. 2024, arXiv:2402.03300 (GRPO); Ahmadian et al. 2024, arXiv:2402.14740 (RLOO)"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple
import torch
from torch import Tensor
from ftcore.data.pack import Batch
from ftcore.model.heads import Model
from ftcore.tune.task import hidden

class Seen(NamedTuple):
    """What a model says at the M scored places of a batch."""
    logp_M: Tensor  # of the tokens that stand there, nats
    h_MC: Tensor  # hidden states, which values are read from
    logp_MV: Tensor

def seen(model: Model, batch: Batch, temperature: float) -> Seen:
    """One forward pass, by which rollouts are scored and policies trained alike."""
    rows_M = batch.scored_M
    h_MC = hidden(model, batch, rows_M)
    logits_MV = model.head(h_MC)
    wide = torch.promote_types(logits_MV.dtype, torch.float32)
    logp_MV = (logits_MV.to(wide) / temperature).log_softmax(-1)
    return Seen(logp_MV.gather(1, batch.labels[rows_M, None]).squeeze(1), h_MC, logp_MV)

def divergences(policy: Seen, reference: Seen) -> dict[str, Tensor]:
    """KL(policy || reference) at each token by three estimates: exact, k1, k3 (nats)."""
    away_M = reference.logp_M - policy.logp_M
    exact_M = (policy.logp_MV.exp() * (policy.logp_MV - reference.logp_MV)).sum(-1)
    return {"exact": exact_M, "k1": -away_M, "k3": away_M.exp() - away_M - 1}

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
        deltas = reversed((r_T + gamma * torch.cat([v_T[1:], v_T.new_zeros(1)]) - v_T).tolist())
        backwards = accumulate(deltas, lambda ahead, delta: delta + gamma * lam * ahead)
        advantages += reversed([*backwards])
    return rewards_M.new_tensor(advantages)

def grouped(rewards_M: Tensor, lengths: Sequence[int], samples: int, *, is_rloo: bool) -> Tensor:
    """advantages_M by the other answers to the prompt, of which each has `samples` in turn."""
    # numerics: float64, or what rounding leaves of equal rewards is divided by nearly nothing
    sums_B = torch.stack([r_T.sum() for r_T in rewards_M.cpu().double().split(lengths)])
    sums_PS = sums_B.view(-1, samples)
    apart_PS = sums_PS - sums_PS.mean(1, keepdim=True)
    if is_rloo:
        apart_PS = apart_PS * samples / (samples - 1)
    else:
        apart_PS = apart_PS / (sums_PS.std(1, keepdim=True) + 1e-4)
    return apart_PS.flatten().repeat_interleave(torch.tensor(lengths)).to(rewards_M)

def whitened(x_M: Tensor) -> Tensor:
    """Mean 0, standard deviation 1; 0 where they are all equal, as a single one is."""
    wide_M = x_M.double()  # numerics: as above
    return ((wide_M - wide_M.mean()) / (wide_M.std(correction=0) + 1e-8)).to(x_M)

def policy_loss(logp_M: Tensor, old_M: Tensor, advantages_M: Tensor, clip: float) -> Tensor:
    ratio_M = (logp_M - old_M).exp()
    return torch.maximum(-advantages_M * ratio_M, -advantages_M * ratio_M.clamp(1 - clip, 1 + clip))

def value_loss(values_M: Tensor, old_M: Tensor, returns_M: Tensor, clip: float) -> Tensor:
    """Loss of each token; clip 0: not clipped."""
    loss_M = (values_M - returns_M).square()
    if clip:
        near_M = old_M + (values_M - old_M).clamp(-clip, clip)
        loss_M = torch.maximum(loss_M, (near_M - returns_M).square())
    return loss_M / 2

@dataclass
class Control:
    """What a run remembers from one iteration to the next; saved in its checkpoints."""
    kl_coef: float = 0.0  # factor of the divergence in the rewards
    count: int = 0  # scores so far, their mean, and the sum of squares around it
    mean: float = 0.0
    squares: float = 0.0

    def adapt(self, kl: float, target: float, episodes: int, horizon: float) -> None:
        self.kl_coef *= 1 + min(max(kl / target - 1, -0.2), 0.2) * episodes / horizon

    def deviation(self, scores: Sequence[float]) -> float:
        """Standard deviation of all scores so far, these among them; 1 where they are all equal."""
        for score in scores:
            self.count += 1
            apart = score - self.mean
            self.mean += apart / self.count
            self.squares += apart * (score - self.mean)
        return math.sqrt(self.squares / max(1, self.count - 1)) or 1.0
