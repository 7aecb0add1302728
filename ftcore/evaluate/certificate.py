"""The merge certificate: what changes when an adapter's update is folded into its matrices.

    loss, ...       and what else is watched in training, unmerged and merged, of held-out rows
    max_difference  of their logits at the scored tokens, or of the scored documents
    mean_kl         KL(unmerged || merged), nats; of several labels, each is a choice of its own
    changed         share of the arg-max that change"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ftcore.data.encode import Split
from ftcore.data.pack import apart
from ftcore.evaluate.evaluator import all_logits
from ftcore.evaluate.suite import Suite
from ftcore.model.heads import Model
from ftcore.tune.lora import LoRALinear, lora_layers

MOST_ROWS, MOST_SCORED, MOST_LOGITS = 256, 2048, 2**25  # so that it takes seconds and 1 GB

@torch.inference_mode()
def certify(model: Model, split: Split, suite: Suite) -> dict[str, Any]:
    """On the first rows of a split; scores have neither KL nor arg-max. The model is left unmerged,
    in evaluation mode."""
    model.eval()
    layers = lora_layers(model).values()
    documents = split.documents[:MOST_ROWS]
    scored = np.cumsum([sum(np.count_nonzero(side.weights) for side in apart([document]))
                        for document in documents])
    most = min(MOST_SCORED, MOST_LOGITS // model.spec.vocab_size)
    few = documents[: max(1, np.count_nonzero(scored <= most))]
    cut = {document.row_id for document in split.documents[len(few) :]}
    rows = Split(documents=few, sentences=[s for s in split.sentences if s.row_id not in cut])
    proof: dict[str, Any] = {"rows": len(rows.documents)}
    if not documents:
        return proof
    limits = {"max_tokens": suite.config.loop.micro_batch_tokens, "device": model.device}
    values, logits = [], []
    for change in (LoRALinear.unmerge, LoRALinear.merge):
        for layer in layers:
            change(layer)
        logits.append(all_logits(model, rows.documents, **limits))
        values.append(suite.dev(model, rows))
    for layer in layers:
        layer.unmerge()
    proof |= {key.removeprefix("eval/"): [each[key] for each in values] for key in values[0]}
    proof["max_difference"] = (logits[1] - logits[0]).abs().max().item()
    if suite.config.problem == "regression":
        return proof
    if suite.config.problem == "multi_label_classification":
        logits = [F.pad(logits_BK.reshape(-1, 1), (0, 1)) for logits_BK in logits]
    log_p, log_q = (logits_MK.double().log_softmax(-1) for logits_MK in logits)
    kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    changed = (logits[0].argmax(-1) != logits[1].argmax(-1)).double().mean()
    return proof | {"mean_kl": kl.item(), "changed": changed.item()}
