"""A task: which head it needs, what of the model is trained for it, whether its data fits.

Its loss is (sum, weight), over the scored rows, which alone reach the head (law 2). No task divides
(law 3): the loop does once, by the weight of the whole step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple
import torch
import torch.nn.functional as F
from torch import Tensor
from ftcore.config import PeftConfig
from ftcore.data.pack import Batch
from ftcore.errors import ConfigError
from ftcore.model.heads import CLASSIFIERS, Model, ModelTask
from ftcore.tune.freeze import apply_trainable, parameter_table
from ftcore.tune.lora import apply_lora
from kernels.attention import attention
from kernels.docs import Docs

Task = Callable[[Model, Batch], tuple[Tensor, Tensor]]  # fp32 sums: loss (nats, squares), weight

def hidden(model: Model, batch: Batch, rows_M: Tensor | None) -> Tensor:
    """h_MC, hidden states of these rows of the stream; None: of all. Of documents that begin alike
    the nodes of their tree are computed, but for attention, which sees whole documents."""
    inputs, most = (batch.tokens_N, batch.positions_N, batch.types_N), model.spec.max_positions
    if batch.own is None or max(batch.docs.lengths) > most:  # which may be refused
        return model.trunk(*inputs, batch.docs, rows_M=rows_M)

    def attend(q_UHD: Tensor, k_UGD: Tensor, v_UGD: Tensor, _: Docs, **rule: float) -> Tensor:
        whole = (x.index_select(0, batch.node_N) for x in (q_UHD, k_UGD, v_UGD))
        o_NHD = attention(*whole, batch.docs, is_causal=True, **rule)
        # behind them what fills up: `Docs.num_rows`
        return torch.cat([o_NHD.index_select(0, batch.rows_U), q_UHD[len(batch.rows_U) :]])

    nodes_M = batch.node_N if rows_M is None else batch.node_N[rows_M]
    inputs = (x_N[batch.rows_U] for x_N in inputs)
    return model.trunk(*inputs, batch.own, [attend] * model.spec.num_layers, nodes_M)

def token_labels(model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the label of each scored token: the next token, the hidden one, its tag."""
    scored_M = batch.scored_M
    h_MC = hidden(model, batch, scored_M)
    return model.head.loss(h_MC, batch.labels[scored_M], batch.weights[scored_M])

def classification(model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross-entropy of a document's class; of several, of each being there or not, their mean."""
    if batch.labels.ndim == 2:
        logits_BK = document_logits(model, batch)
        has_BK = batch.labels.to(logits_BK)
        nll_BK = F.binary_cross_entropy_with_logits(logits_BK, has_BK, reduction="none")
        return (nll_BK.mean(1) * batch.weights).sum(), batch.weights.sum()
    h_MC = hidden(model, batch, model.head.rows(batch.docs))
    return model.head.loss(h_MC, batch.labels, batch.weights, batch.docs)

def regression(model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
    errors_B = document_logits(model, batch).squeeze(1) - batch.labels
    return (errors_B.square() * batch.weights).sum(), batch.weights.sum()

def document_logits(model: Model, batch: Batch) -> Tensor:
    """logits_BK of a head that judges whole documents, fp32, or float64 where the model is."""
    logits_BK = model.head(hidden(model, batch, model.head.rows(batch.docs)), batch.docs)
    return logits_BK.to(torch.promote_types(logits_BK.dtype, torch.float32))

def passes(task: Task, model: Model, batch: Batch, factor: float | Tensor) -> Tensor:
    """Forward and backward over a micro-batch, with a factor on its gradients; the loss sum."""
    loss_sum, _ = task(model, batch)
    (loss_sum * factor).backward()
    return loss_sum.detach()

class TaskKind(NamedTuple):
    model_task: ModelTask
    loss: Task

TASKS: Mapping[str, TaskKind] = {
    "pretrain": TaskKind("lm", token_labels), "sft": TaskKind("lm", token_labels),
    "mlm": TaskKind("mlm", token_labels), "classify": TaskKind("classify", classification),
    "regress": TaskKind("classify", regression), "tag": TaskKind("tag", token_labels)}

def choose_trainable(model: Model, config: PeftConfig, generator: torch.Generator, *,
                     new: Sequence[str] = ()) -> str:
    """Freeze, wrap by drawn factors, or leave; returns the table of parameters. Raises ConfigError:
    a rule or target matches nothing, or of `new`, which the checkpoint lacked, some stay frozen."""
    if config.method == "lora":
        if model.task in CLASSIFIERS:  # its head is new with the task, so trained
            config = replace(config, extra_modules=(*config.extra_modules, "head"))
        report = apply_lora(model, config, generator=generator)
        table = f"{parameter_table(model)}\n{report}"
    else:
        table = apply_trainable(model, ["all"] if config.method == "full" else config.trainable)
    if left := set(new) - {n for n, p in model.named_parameters() if p.requires_grad}:
        what = f"{', '.join(sorted(left))}: not in the checkpoint, so random, and would stay so"
        raise ConfigError(f"{what}: use --peft.method full, or head among --peft.trainable")
    return table
