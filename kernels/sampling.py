"""The next token of each sequence of a batch: its likeliest, or one that is drawn.

z           logits, of seen tokens z / p where z > 0, else z p (repetition penalty p), less
            `frequency_penalty` for every time in the answer and `presence_penalty` if there at all,
            plus the bias; stop ids are out before `min_new_tokens`
greedy      the largest z
drawn       from softmax(z / temperature) over what is left by top_k, then top_p (the fewest tokens
            of that probability), then min_p (those at least so probable as a share of the largest)
source      Keskar et al. 2019, arXiv:1909.05858; top_p: Holtzman et al. 2020, arXiv:1904.09751

A token is drawn by a number in [0, 1) of its own sequence and place, so that it does not depend on
who else is in the batch. Letters: B sequences, V vocabulary, T places of an answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
import numpy as np
import torch
from torch import Tensor

PIECE = 2**17  # values of logits at once: what a core's cache holds between two operations

@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn."""
    max_new_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # of prompt and answer
    presence_penalty: float = 0.0  # of the answer
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    min_new_tokens: int = 0  # stop ids are not drawn before
    stop_ids: frozenset[int] = frozenset()
    num_top: int | None = None  # log-probabilities with so many alternatives; None: none

    def chances(self) -> np.ndarray:
        """chance_T: the number in [0, 1) that decides at each place of the answer."""
        return np.random.default_rng(self.seed).random(self.max_new_tokens)

    def shaped(self, z_V: Tensor, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        """z_V of logits: penalties, bias, and no stop id too early."""
        z_V, device = z_V.clone(), z_V.device
        if self.repetition_penalty != 1:
            seen = torch.tensor([*{*prompt, *answer}], device=device)
            z = z_V[seen]
            z_V[seen] = torch.where(z > 0, z / self.repetition_penalty, z * self.repetition_penalty)
        if answer and (self.presence_penalty or self.frequency_penalty):
            ids, counts = torch.tensor(answer, device=device).unique(return_counts=True)
            z_V[ids] -= self.presence_penalty + self.frequency_penalty * counts
        if self.logit_bias:
            z_V[[*self.logit_bias]] += torch.tensor([*self.logit_bias.values()], device=device)
        if len(answer) < self.min_new_tokens and self.stop_ids:
            z_V[[*self.stop_ids]] = -torch.inf
        return z_V

    def cut(self, z_V: Tensor) -> Tensor:
        """z_V at the temperature, -inf where a token may not be drawn."""
        z_V = z_V / self.temperature
        if 0 < self.top_k < len(z_V):
            z_V = z_V.masked_fill(z_V < z_V.topk(self.top_k).values[-1], -torch.inf)
        if self.top_p < 1:
            # cost: what is likely enough mostly lies among a few, of which alone a sort is cheap
            for count in (min(most, len(z_V)) for most in (256, 4096, len(z_V))):
                largest, ids = z_V.topk(count)
                before = (largest - z_V.logsumexp(0)).exp().cumsum(0)
                if before[-1] >= self.top_p:
                    break
            kept = ids[: int((before < self.top_p).sum()) + 1]
            z_V = torch.full_like(z_V, -torch.inf).index_copy_(0, kept, z_V[kept])
        if self.min_p:
            z_V = z_V.masked_fill(z_V < z_V.max() + np.log(self.min_p), -torch.inf)
        return z_V

    @property
    def reshapes(self) -> bool:
        """Whether `shaped` may change anything."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty,
                self.logit_bias, self.min_new_tokens) != (1, 0, 0, {}, 0)

    @property
    def cuts(self) -> bool:
        """Whether `cut` does more than the temperature."""
        return (self.top_k, self.top_p, self.min_p) != (0, 1, 0)

class Token(NamedTuple):
    """One token and, where they were asked for, log-probabilities: log softmax of the model's own
    logits, fp32; `top` those of the likeliest tokens."""
    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()

class Draft(NamedTuple):
    """A sequence whose next token is asked for."""
    sampling: Sampling
    prompt: Sequence[int]
    answer: Sequence[int]
    chance_T: np.ndarray

def drawn(logits_BV: Tensor, heat: float | Tensor, chance_B: np.ndarray) -> tuple[Tensor, Tensor]:
    """Ids (B,) from p = softmax(logits / heat), by numbers in [0, 1): where these lie in the
    running sum of p; and their p. `heat`, the temperature, is one or (B, 1)."""
    heat_B1 = torch.as_tensor(heat, device=logits_BV.device).expand(len(logits_BV), 1)
    each, found = (logits_BV, heat_B1, torch.from_numpy(chance_B).to(heat_B1.device)[:, None]), []
    for z_MV, heat_M1, chance_M1 in zip(*(x.split(_rows(logits_BV)) for x in each), strict=True):
        sums_MV = (p_MV := (z_MV.float() / heat_M1).softmax(-1)).double().cumsum(-1)
        ids_M1 = torch.searchsorted(sums_MV, chance_M1 * sums_MV[:, -1:], right=True)
        found.append((ids_M1.squeeze(1), p_MV.gather(1, ids_M1).squeeze(1)))
    return tuple(map(torch.cat, zip(*found, strict=True)))

def _rows(logits_BV: Tensor) -> int:
    """Rows of logits at once."""
    return max(1, PIECE // logits_BV.shape[1] if logits_BV.device.type == "cpu" else len(logits_BV))

def next_tokens(logits_BV: Tensor, drafts: Sequence[Draft]) -> list[Token | None]:
    """The next token of each sequence; None where its logits are not finite."""
    top, z_BV = logits_BV.max(-1), logits_BV
    is_finite = top.values.isfinite().tolist()
    if reshaped := [b for b, draft in enumerate(drafts) if draft.sampling.reshapes]:
        z_BV = logits_BV.to(torch.float32, copy=True)
        for b in reshaped:
            z_BV[b] = drafts[b].sampling.shaped(z_BV[b], *drafts[b][1:3])
        top = z_BV.max(-1)
    ids_B, told = top.indices, {}
    if rows := [b for b, d in enumerate(drafts) if d.sampling.temperature and is_finite[b]]:
        z_MV, heat = z_BV[rows].float(), [drafts[b].sampling.temperature for b in rows]
        for m, b in enumerate(rows):
            if drafts[b].sampling.cuts:
                z_MV[m], heat[m] = drafts[b].sampling.cut(z_MV[m]), 1.0
        chance_M = np.array([drafts[b].chance_T[len(drafts[b].answer)] for b in rows])
        ids_B[rows], p_M = drawn(z_MV, torch.tensor(heat, device=z_MV.device)[:, None], chance_M)
        each = zip(rows, ids_B[rows].tolist(), p_M.log().tolist(), strict=True)
        told = {b: Token(id_, own) for b, id_, own in each if (s := drafts[b].sampling).num_top == 0
                and (s.temperature, s.cuts, s.reshapes) == (1, False, False)}  # the model's own p
    counts = {b: d.sampling.num_top for b, d in enumerate(drafts) if d.sampling.num_top is not None}
    told |= with_logprobs(logits_BV, ids_B, {b: n for b, n in counts.items() if b not in told})
    return [told.get(b, Token(id_)) if is_finite[b] else None
            for b, id_ in enumerate(ids_B.tolist())]

def with_logprobs(logits_BV: Tensor, ids_B: Tensor, counts: Mapping[int, int]) -> dict[int, Token]:
    """The tokens of some rows with their log-probabilities and those of so many of the likeliest:
    `counts`, by row."""
    rows, size, found = [*counts], _rows(logits_BV), {}
    asked = (x if len(rows) == len(x) else x[rows] for x in (logits_BV, ids_B[:, None]))
    parts = (x.split(size) for x in asked)  # cost: views where all rows are asked for
    for start, z_MV, ids_M1 in zip(range(0, len(rows), size), *parts, strict=False):
        logprobs_MV, some = z_MV.float().log_softmax(-1), rows[start : start + size]
        own_M, tops = logprobs_MV.gather(1, ids_M1).squeeze(1).tolist(), [()] * len(some)
        if most := max(counts[b] for b in some):  # cost: to ask for none takes long, too
            tops = map(zip, *(each.tolist() for each in reversed(logprobs_MV.topk(most))))
        for b, (id_,), own, top in zip(some, ids_M1.tolist(), own_M, tops, strict=True):
            found[b] = Token(id_, own, (*top,)[: counts[b]])
    return found
