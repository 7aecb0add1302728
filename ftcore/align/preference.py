"""Losses of pairs, two answers to one prompt, chosen and rejected; with them all tasks of train.py.

Letters: B pairs, their 2 B documents chosen and rejected in turn; M tokens of all answers.
s a score of an answer, m the margin of a pair, pi the model, ref the model before training:

    bradley_terry   -log sigmoid(s_c - s_r - m) + centring (s_c + s_r)^2
    dpo             z = log pi(c) / pi(r) - log ref(c) / ref(r), sums over tokens, or their means
                    sigmoid  -log sigmoid(beta z)          ipo  (z - 1 / (2 beta))^2

memory: dpo has two passes over the answers' logits, some rows at a time. The first, without a
gradient, gives the loss and its slope for each token; cross-entropy with slopes for weights, whose
gradients are formed chunk by chunk, has the gradient of the loss.
source: Bradley and Terry 1952, Biometrika 39, 324-345; the margin: Touvron et al. 2023,
arXiv:2307.09288, section 3.2.2; centring: Eisenstein et al. 2023, arXiv:2312.09244, section 4; DPO:
Rafailov et al. 2023, arXiv:2305.18290, eq. 7; IPO: Azar et al. 2023, arXiv:2310.12036, eq. 17"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from ftcore.config import DpoRun, Run
from ftcore.data import pack, store
from ftcore.evaluate.evaluator import log_ratios
from ftcore.model.heads import Model
from ftcore.tune import task as tune

AT_ONCE = 256  # pairs, between two moves of the bar

def bradley_terry(model: Model, batch: pack.Batch, *, centring: float) -> tuple[Tensor, Tensor]:
    chosen_B, rejected_B = tune.document_logits(model, batch).view(-1, 2).unbind(1)
    gap_B = chosen_B - rejected_B - batch.pairs[:, 3].to(chosen_B)
    loss_B = centring * (chosen_B + rejected_B).square() - F.logsigmoid(gap_B)
    return loss_B.sum(), torch.ones_like(loss_B.detach()).sum()

def dpo(model: Model, batch: pack.Batch, *, beta: float, loss: str,
        length_normalised: bool) -> tuple[Tensor, Tensor]:
    """The loss of log-ratios, as a sum over pairs and their number. Its gradient is that of the
    cross-entropy of all tokens, each weighted by the slope of the loss in it."""
    scored_M = batch.scored_M
    h_MC, labels_M = tune.hidden(model, batch, scored_M), batch.labels[scored_M]
    owner_M = batch.docs.doc_of_N()[scored_M]
    nll_M = model.head.token_losses(h_MC, labels_M)
    with torch.enable_grad():
        nll_D = nll_M.new_zeros(2 * len(batch.pairs)).index_add(0, owner_M, nll_M.requires_grad_())
        if length_normalised:
            nll_D = nll_D / owner_M.bincount()  # tokens of each answer
        chosen_B, rejected_B = nll_D.view(-1, 2).unbind(1)
        z_B = rejected_B - chosen_B - batch.pairs[:, 4].to(nll_D)
        loss_B = (z_B - 1 / (2 * beta)).square() if loss == "ipo" else -F.logsigmoid(beta * z_B)
        (slope_M,) = torch.autograd.grad(loss_B.sum(), nll_M)
    carrier, _ = model.head.loss(h_MC, labels_M, slope_M)
    value = loss_B.detach().sum() + (carrier - carrier.detach())
    return value, torch.ones_like(loss_B.detach()).sum()

@torch.no_grad()
def refer(model: Model, data: store.Prepared, config: DpoRun) -> None:
    """Fill the log-ratios of the model as it stands, the reference, into all pairs."""
    rule = config.loop.micro_batch_tokens, config.dpo.length_normalised
    model.eval()
    for name, split in data.splits():
        pairs = split.documents
        starts = tqdm(range(0, len(pairs), AT_ONCE), desc=f"reference, {name}", disable=None)
        parts = [log_ratios(model, pairs[start : start + AT_ONCE], *rule) for start in starts]
        ratios_B = np.concatenate(parts, dtype=np.float32)
        split.documents = [replace(pair, labels=np.append(pair.labels[:4], ratio))
                           for pair, ratio in zip(pairs, ratios_B, strict=True)]

POLICY = tune.TaskKind("lm", tune.token_labels)  # ppo.py has its loss; for the plan
PAIRED = {"reward": tune.TaskKind("classify", bradley_terry), "dpo": tune.TaskKind("lm", dpo)}
TASKS: Mapping[str, tune.TaskKind] = {**tune.TASKS, **PAIRED, "ppo": POLICY, "grpo": POLICY}

def kind_of(task: str, config: Run) -> tune.TaskKind:
    """A task; a loss of pairs with the options of the section that has the task's name."""
    kind = TASKS[task]
    options = vars(getattr(config, task)) if task in PAIRED else {}
    return kind._replace(loss=partial(kind.loss, **options)) if options else kind
