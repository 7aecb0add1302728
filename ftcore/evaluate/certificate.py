"""The merge certificate: what changes when an adapter's update is folded into its matrices.

    lost        ||rounded - exact|| / ||scale B A||, exact = W + scale B A in float64: the share of
                the update that the dtype of W cannot hold; of each layer also ||scale B A|| / ||W||
    logits      merged against unmerged, at the M scored places (tokens, or documents) of some held-
                out rows: largest difference, mean KL(unmerged || merged), share of changed arg-max
    loss        of those rows, before and after
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ftcore.data.encode import Split
from ftcore.data.pack import Encoded
from ftcore.evaluate.evaluator import streams
from ftcore.evaluate.suite import Suite
from ftcore.model.heads import ClassificationHead, Model
from ftcore.tune.lora import LoRALinear, lora_layers
from ftcore.tune.task import TASKS, document_logits, hidden

MOST_ROWS, MOST_PLACES = 256, 2048  # so that it takes seconds

@torch.inference_mode()
def certify(model: Model, split: Split, suite: Suite) -> dict[str, Any]:
    """The certificate on the first rows of a split; without rows, of the weights alone. The model
    is left unmerged, in evaluation mode."""
    model.eval()
    layers = lora_layers(model)
    norms = {name: rounding(layer) for name, layer in layers.items()}
    lost, update, _ = np.sqrt(np.square(list(norms.values())).sum(0)).tolist()
    documents = split.documents[:MOST_ROWS]
    counts = accumulate(int(np.count_nonzero(document.weights)) for document in documents)
    documents = documents[: max(1, sum(count <= MOST_PLACES for count in counts))]
    shares = {name: {"lost": e / (u or 1), "update": u / w} for name, (e, u, w) in norms.items()}
    proof = {"lost": lost / (update or 1), "rows": len(documents), "layers": shares}
    if not documents:
        return proof
    before_MK, loss = _judged(model, documents, suite)
    for layer in layers.values():
        layer.merge()
    after_MK, loss_after = _judged(model, documents, suite)
    for layer in layers.values():
        layer.unmerge()
    proof["loss"] = {"unmerged": loss, "merged": loss_after}
    return proof | compare(before_MK, after_MK, suite.config.problem)

def rounding(layer: LoRALinear) -> tuple[float, float, float]:
    """Norms of what merging a layer loses, of its update, and of its base."""
    weight_OC, a_RC, b_OR = (x.double() for x in (layer.base.weight, layer.lora_a, layer.lora_b))
    update_OC = layer.config.scale * b_OR @ a_RC
    lost_OC = layer.folded_weight().double() - (weight_OC + update_OC)
    return lost_OC.norm().item(), update_OC.norm().item(), weight_OC.norm().item()

def _judged(model: Model, documents: Sequence[Encoded], suite: Suite) -> tuple[Tensor, float]:
    """logits_MK of the scored places, fp32 on the CPU, and the loss."""
    limits = {"max_tokens": suite.config.loop.micro_batch_tokens, "device": suite.device}
    logits, sums = [], np.zeros(2)
    for _, batch in streams(documents, **limits):
        if isinstance(model.head, ClassificationHead):
            logits_MK = document_logits(model, batch)
        else:
            logits_MK = model.head(hidden(model, batch, batch.weights.nonzero().squeeze(1)))
        logits.append(logits_MK.float().cpu())
        sums += [value.item() for value in TASKS[suite.task].loss(model, batch)]
    return torch.cat(logits), float(sums[0] / sums[1])

def compare(before_MK: Tensor, after_MK: Tensor, problem: str | None) -> dict[str, float | None]:
    """How far logits have moved. Scores have neither KL (nats) nor arg-max: both are None; each of
    several labels is a choice between it and its absence."""
    largest = (after_MK - before_MK).abs().max().item()
    if problem == "regression":
        return {"max_difference": largest, "mean_kl": None, "changed": None}
    pair = before_MK, after_MK
    if problem == "multi_label_classification":
        pair = [F.pad(logits_MK.reshape(-1, 1), (0, 1)) for logits_MK in pair]
    log_p, log_q = (x.double().log_softmax(-1) for x in pair)
    kl = ((log_p.exp() * (log_p - log_q)).sum(-1)).mean().item()
    changed = (pair[0].argmax(-1) != pair[1].argmax(-1)).float().mean().item()
    return {"max_difference": largest, "mean_kl": kl, "changed": changed}

def certificate_line(proof: dict[str, Any]) -> str:
    """A certificate for people."""
    said = f"merge: {proof['lost']:.2%} of the update is lost to rounding"
    if not proof["rows"]:
        return f"{said}; no held-out rows to compare logits on"
    said += f"; on {proof['rows']} held-out rows logits differ by {proof['max_difference']:.1e}"
    if proof["mean_kl"] is not None:
        said += f" at most, mean KL {proof['mean_kl']:.1e}, arg-max changed {proof['changed']:.2%}"
    return f"{said}, loss {proof['loss']['unmerged']:.4f} -> {proof['loss']['merged']:.4f}"
