"""Losses of pairs: of two answers to one prompt the chosen one is better than the rejected one.

Letters: B pairs, their 2 B documents chosen and rejected in turn; M tokens of all answers.
s a score of an answer, m the margin of a pair, pi the model, ref the model before training:

    bradley_terry   -log sigmoid(s_c - s_r - m) + centring (s_c + s_r)^2
    dpo             z = log pi(c) / pi(r) - log ref(c) / ref(r)
                    sigmoid  -log sigmoid(beta z)          ipo  (z - 1 / (2 beta))^2

log pi of an answer is the sum over its tokens, the one that ends it too, or with length_normalised
their mean. Scores and log-probabilities in fp32, or float64 where the model is.
memory: dpo has two passes over the answers' logits, some rows at a time. The first has no gradient
and gives the loss and its slope for each token; with slopes for weights, cross-entropy, whose
gradients are formed chunk by chunk, has the gradient of the loss. Both see the same hidden states.
source: Bradley and Terry 1952, Biometrika 39, 324-345; the margin: Touvron et al. 2023 (Llama 2),
arXiv:2307.09288, section 3.2.2; centring: Eisenstein et al. 2023, arXiv:2312.09244, section 4; DPO:
Rafailov et al. 2023, arXiv:2305.18290, eq. 7; IPO: Azar et al. 2023, arXiv:2310.12036, eq. 17
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ftcore.config import DpoRun
from ftcore.data.pack import Batch, Encoded
from ftcore.data.store import Prepared
from ftcore.evaluate.evaluator import MOST_LOGITS, log_ratios
from ftcore.model.heads import Model
from ftcore.tune.task import document_logits, hidden

AT_ONCE = 256  # pairs between two moves of the bar

def bradley_terry(model: Model, batch: Batch, *, centring: float) -> tuple[Tensor, Tensor]:
    """The loss of scores, as a sum over pairs and their number."""
    scores_B2 = document_logits(model, batch).view(-1, 2)
    chosen_B, rejected_B = scores_B2.unbind(1)
    margin_B = batch.pairs[:, 3].to(scores_B2)
    loss_B = centring * scores_B2.sum(1).square() - F.logsigmoid(chosen_B - rejected_B - margin_B)
    return loss_B.sum(), torch.ones_like(loss_B.detach()).sum()

def dpo(model: Model, batch: Batch, *, beta: float, loss: str,
        length_normalised: bool) -> tuple[Tensor, Tensor]:
    """The loss of log-ratios, as a sum over pairs and their number. Its gradient is that of the
    cross-entropy of all tokens, each weighted by how much less of it the loss asks for."""
    scored_M = batch.weights.nonzero().squeeze(1)
    h_MC, labels_M = hidden(model, batch, scored_M), batch.labels[scored_M]
    said_M = log_probabilities(model, h_MC, labels_M)
    owner_M = batch.docs.doc_of_N()[scored_M]
    with torch.enable_grad():
        given_M = said_M.requires_grad_()
        sums_D = given_M.new_zeros(batch.docs.num_docs)
        answers_D = sums_D.index_add(0, owner_M, given_M)
        if length_normalised:
            answers_D = answers_D / sums_D.index_add(0, owner_M, torch.ones_like(said_M))
        chosen_B, rejected_B = answers_D.view(-1, 2).unbind(1)
        z_B = chosen_B - rejected_B - batch.pairs[:, 4].to(said_M)
        loss_B = (z_B - 1 / (2 * beta)).square() if loss == "ipo" else -F.logsigmoid(beta * z_B)
        (slope_M,) = torch.autograd.grad(loss_B.sum(), given_M)
    value, weight = loss_B.detach().sum(), torch.ones_like(loss_B.detach()).sum()
    if not h_MC.requires_grad:
        return value, weight
    carrier, _ = model.head.loss(h_MC, labels_M, -slope_M)
    return value + (carrier - carrier.detach()), weight

@torch.no_grad()
def log_probabilities(model: Model, h_MC: Tensor, labels_M: Tensor) -> Tensor:
    """log p of each label, by the hidden state before it; no gradient."""
    size, made = max(1, MOST_LOGITS // model.spec.vocab_size), []
    for h_PC, labels_P in zip(h_MC.split(size), labels_M.split(size), strict=True):
        logits_PV = model.head(h_PC)
        wide_PV = logits_PV.to(torch.promote_types(logits_PV.dtype, torch.float32))
        made.append(-F.cross_entropy(wide_PV, labels_P, reduction="none"))
    return torch.cat(made)

@torch.no_grad()
def refer(model: Model, data: Prepared, config: DpoRun) -> None:
    """Fill the reference's log-ratios into all pairs: those of the model as it stands."""
    model.eval()
    limits = {"max_tokens": config.loop.micro_batch_tokens, "device": model.device}
    for name, split in data.splits():
        split.documents = referenced(
            model, split.documents, what=name, **limits,
            length_normalised=config.dpo.length_normalised)

def referenced(model: Model, documents: Sequence[Encoded], *, what: str,
               **options: Any) -> list[Encoded]:
    """The pairs with the log-ratios of this model."""
    made = []
    with tqdm(total=len(documents), desc=f"reference, {what}", unit="pair", disable=None) as bar:
        for start in range(0, len(documents), AT_ONCE):
            some = documents[start : start + AT_ONCE]
            for document, ratio in zip(some, log_ratios(model, some, **options), strict=True):
                labels = document.labels.copy()
                labels[4] = ratio
                made.append(replace(document, labels=labels))
            bar.update(len(some))
    return made
