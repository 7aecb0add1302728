"""What a policy is trained by: clipped losses of tokens, divergences, and what controls them.

Letters: M answer tokens, V vocabulary. p is the policy, p_old the one that answered, q the
reference; of tokens, log-probabilities of what was said, at the temperature it was drawn at.

ratio           rho = exp(p - p_old), exactly 1 before the first update
policy          max(-A rho, -A clip(rho, 1 - c, 1 + c))
value           max((v - R)^2, (v_old + clip(v - v_old, -c, c) - R)^2) / 2
entropy         -sum_V p log p
k1              p - q, its mean over what p said is KL(p || q)
k3              exp(q - p) - (q - p) - 1, the same mean, never negative, spread less
exact           sum_V p (log p - log q)
adaptive        kl_coef (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon), n episodes

source  Schulman et al. 2017, arXiv:1707.06347 (clipping); Ziegler et al. 2019, arXiv:1909.08593,
        section 2.2 (penalty, adaptive); Schulman 2020, joschu.net/blog/kl-approx.html (k1, k3);
        Engstrom et al. 2020, arXiv:2005.12729 (scaling by the running deviation)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ftcore.data.pack import Batch
from ftcore.model.heads import Model
from ftcore.tune.task import hidden

MOST_CHANGE = 0.2  # of the penalty's factor, by an iteration of `horizon` episodes

class Seen(NamedTuple):
    """What a model says at the M scored places of a batch."""
    logp_M: Tensor  # of the tokens that stand there, nats
    entropy_M: Tensor
    h_MC: Tensor  # hidden states, which values are read from
    logp_MV: Tensor

def seen(model: Model, batch: Batch, temperature: float) -> Seen:
    """One forward pass, by which rollouts are scored and policies trained alike."""
    rows_M = batch.scored_M
    h_MC = hidden(model, batch, rows_M)
    logits_MV = model.head(h_MC)
    wide = torch.promote_types(logits_MV.dtype, torch.float32)
    logp_MV = (logits_MV.to(wide) / temperature).log_softmax(-1)
    logp_M = logp_MV.gather(1, batch.labels[rows_M, None]).squeeze(1)
    return Seen(logp_M, -(logp_MV.exp() * logp_MV).sum(-1), h_MC, logp_MV)

def divergences(policy: Seen, reference: Seen) -> dict[str, Tensor]:
    """KL(policy || reference) at each token by three estimates: exact, k1, k3 (nats)."""
    away_M = reference.logp_M - policy.logp_M
    exact_M = (policy.logp_MV.exp() * (policy.logp_MV - reference.logp_MV)).sum(-1)
    return {"exact": exact_M, "k1": -away_M, "k3": away_M.exp() - away_M - 1}

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
        error = min(max(kl / target - 1, -MOST_CHANGE), MOST_CHANGE)
        self.kl_coef *= 1 + error * episodes / horizon

    def deviation(self, scores: Sequence[float]) -> float:
        """Standard deviation of all scores so far, these among them; 1 where they are all equal."""
        for score in scores:
            self.count += 1
            apart = score - self.mean
            self.mean += apart / self.count
            self.squares += apart * (score - self.mean)
        return math.sqrt(self.squares / max(1, self.count - 1)) or 1.0
