"""Runs a model over held-out documents and feeds the metrics.

The figures do not depend on how documents are cut into batches: sums are taken over rows, in Python
floats, and every document is read alone inside its stream. The caller puts the model in evaluation
mode and switches gradients off; `limits` are what `streams` takes beside the documents.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ftcore.config import EvalConfig
from ftcore.data.columns import Chat
from ftcore.data.encode import encode_prompt
from ftcore.data.pack import Batch, Encoded, collate, pack
from ftcore.data.prepare import Split
from ftcore.data.tokenizer import Tokenizer
from ftcore.evaluate.entities import OUTSIDE, EntityMetrics
from ftcore.evaluate.metrics import (
    ClassificationMetrics,
    MultiLabelMetrics,
    Perplexity,
    regression_metrics,
)
from ftcore.evaluate.text import JsonCommandMetrics, exact_match, intent_labels
from ftcore.model.generate import generate
from ftcore.model.heads import Model
from ftcore.tune.task import Task, document_logits, hidden

PROMPTS_AT_ONCE = 256
Counted = ClassificationMetrics | MultiLabelMetrics | EntityMetrics
# Loss and metrics; what counted them, where it has tables; prediction rows.
Judged = tuple[dict[str, float], Counted | None, list[dict[str, Any]]]

def streams(
    documents: Sequence[Encoded], *, max_tokens: int, device: torch.device
) -> Iterator[tuple[list[int], Batch]]:
    """Documents as batches of at most `max_tokens`, each with its documents' indices."""
    for indices in pack(list(map(len, documents)), max_tokens):
        yield indices, collate([documents[i] for i in indices]).to(device)

def evaluate_loss(model: Model, task: Task, split: Split, **limits: Any) -> dict[str, float]:
    """Token-weighted loss and perplexity; bits per byte where the text's bytes are known."""
    perplexity = Perplexity()
    for _, batch in streams(split.documents, **limits):
        loss_sum, weight = task(model, batch)
        perplexity.update(loss_sum.item(), weight.item())
    return perplexity.compute(split.num_bytes)

def all_logits(model: Model, documents: Sequence[Encoded], **limits: Any) -> Tensor:
    """logits_BK of a head that judges whole documents, or logits_MK of one of tokens at the scored
    ones, in their order; fp32 on the CPU."""
    logits: dict[int, Tensor] = {}
    for indices, batch in streams(documents, **limits):
        if model.task == "classify":
            logits_MK, counts = document_logits(model, batch), [1] * len(indices)
        else:
            logits_MK = model.head(hidden(model, batch, batch.weights.nonzero().squeeze(1)))
            counts = [np.count_nonzero(documents[index].weights) for index in indices]
        logits.update(zip(indices, logits_MK.float().cpu().split(counts), strict=True))
    return torch.cat([logits[index] for index in range(len(documents))])

def evaluate_classes(model: Model, split: Split, labels: Sequence[str], **limits: Any) -> Judged:
    """Predicted class of each document; the loss in nats a document."""
    logits_BK = all_logits(model, split.documents, **limits)
    metrics, rows, loss_sum = ClassificationMetrics(labels), [], 0.0
    for document, logits_K in zip(split.documents, logits_BK, strict=True):
        predicted = int(logits_K.argmax())
        loss_sum -= float(logits_K.log_softmax(-1)[document.labels])
        metrics.update([document.labels], [predicted])
        rows.append({
            "row_id": document.row_id, "label": labels[document.labels],
            "predicted": labels[predicted],
            "probabilities": [round(p, 6) for p in logits_K.softmax(-1).tolist()],
        })
    return {"loss": loss_sum / len(rows), **metrics.compute()}, metrics, rows

def evaluate_label_sets(model: Model, split: Split, labels: Sequence[str], **limits: Any) -> Judged:
    """Predicted labels of each document, those above probability 1/2; the loss in nats a label."""
    logits_BK = all_logits(model, split.documents, **limits).double()
    has_BK = torch.from_numpy(np.stack([document.labels for document in split.documents])).double()
    loss = F.binary_cross_entropy_with_logits(logits_BK, has_BK).item()
    target_BK, predicted_BK = (has_BK > 0).numpy(), (logits_BK > 0).numpy()
    metrics = MultiLabelMetrics(labels)
    metrics.update(target_BK, predicted_BK)
    names = np.array(labels, dtype=object)
    parts = zip(split.documents, target_BK, predicted_BK, logits_BK, strict=True)
    rows = [{
        "row_id": document.row_id, "labels": names[target_K].tolist(),
        "predicted": names[predicted_K].tolist(),
        "probabilities": [round(p, 6) for p in logits_K.sigmoid().tolist()],
    } for document, target_K, predicted_K, logits_K in parts]  # fmt: skip
    return {"loss": loss, **metrics.compute()}, metrics, rows

def evaluate_scores(model: Model, split: Split, labels: Sequence[str], **limits: Any) -> Judged:
    """Predicted score of each document; the loss a mean squared error."""
    (predicted_B,) = all_logits(model, split.documents, **limits).double().numpy().T
    target_B = np.array([document.labels for document in split.documents])
    rows = [
        {"row_id": document.row_id, labels[0]: document.labels, "predicted": float(predicted)}
        for document, predicted in zip(split.documents, predicted_B, strict=True)
    ]
    loss = float(np.square(predicted_B - target_B).mean())
    return {"loss": loss, **regression_metrics(target_B, predicted_B)}, None, rows

def token_predictions(
    model: Model, documents: Sequence[Encoded], **limits: Any
) -> tuple[Perplexity, list[list[int]]]:
    """Loss over the scored tokens, and the ids predicted for those of each document, in order."""
    perplexity, chosen = Perplexity(), {}
    for indices, batch in streams(documents, **limits):
        scored_M = batch.weights.nonzero().squeeze(1)
        logits_MV = model.head(hidden(model, batch, scored_M)).float()
        loss_sum = F.cross_entropy(logits_MV, batch.labels[scored_M], reduction="sum").item()
        perplexity.update(loss_sum, len(scored_M))
        counts = [np.count_nonzero(documents[index].weights) for index in indices]
        parts = logits_MV.argmax(-1).split(counts)
        chosen |= zip(indices, (ids.tolist() for ids in parts), strict=True)
    return perplexity, [chosen[index] for index in range(len(documents))]

def evaluate_masked(model: Model, split: Split, labels: Sequence[str], **limits: Any) -> Judged:
    """Predicted token of `labels`, the vocabulary, at each hidden place; loss in nats a place."""
    perplexity, chosen = token_predictions(model, split.documents, **limits)
    hits, rows = 0, []
    for document, given in zip(split.documents, chosen, strict=True):
        wanted = document.labels[document.weights > 0].tolist()
        hits += sum(a == b for a, b in zip(wanted, given, strict=True))
        names = {"hidden": [labels[i] for i in wanted], "predicted": [labels[i] for i in given]}
        rows.append({"row_id": document.row_id, **names})
    return {**perplexity.compute(), "accuracy": hits / perplexity.weight}, None, rows

def evaluate_tags(model: Model, split: Split, labels: Sequence[str], **limits: Any) -> Judged:
    """Predicted tag of each word, OUTSIDE for one without a token; loss in nats a word with one."""
    perplexity, chosen = token_predictions(model, split.documents, **limits)
    scored: dict[str, list[int]] = {}  # of the documents of each sentence, end to end
    for document, ids in zip(split.documents, chosen, strict=True):
        scored.setdefault(document.row_id, []).extend(ids)
    metrics, rows = EntityMetrics(), []
    for sentence in split.sentences:
        ids = iter(scored[sentence.row_id])
        tags = [OUTSIDE if place < 0 else labels[next(ids)] for place in sentence.places_W]
        assert next(ids, None) is None, "each word with a token is scored once"
        metrics.update(sentence.tags, tags)
        words = {"tokens": sentence.words, "tags": sentence.tags, "predicted": tags}
        rows.append({"row_id": sentence.row_id, **words})
    return {"loss": perplexity.compute()["loss"], **metrics.compute()}, metrics, rows

# By HF's `problem_type`, or the task that has none.
JUDGES: Mapping[str, Callable[..., Judged]] = {
    "single_label_classification": evaluate_classes,
    "multi_label_classification": evaluate_label_sets, "regression": evaluate_scores,
    "tag": evaluate_tags, "mlm": evaluate_masked,
}

def evaluate_answers(
    model: Model, tokenizer: Tokenizer, chats: Sequence[Chat], config: EvalConfig
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics of greedy answers against expected last turns, and one prediction row a chat."""
    stop_ids = frozenset({tokenizer.eos_id, tokenizer.end_of_text_id} - {None})
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(chats), unit="answer", leave=False, disable=None) as bar:
        for start in range(0, len(chats), PROMPTS_AT_ONCE):
            some = chats[start : start + PROMPTS_AT_ONCE]
            prompts = [encode_prompt(chat.messages[:-1], tokenizer) for chat in some]
            limits = {"max_new_tokens": config.max_new_tokens, "stop_ids": stop_ids}
            for chat, ids in zip(some, generate(model, prompts, **limits), strict=True):
                said, target = (turn["content"] for turn in chat.messages[-2:])
                text = tokenizer.decode([i for i in ids if i not in stop_ids])
                row = {"row_id": chat.id, "prompt": said, "target": target, "predicted": text}
                rows.append(row | {"exact_match": exact_match(target, text)})
            bar.update(len(some))
    if not (intent := config.intent_field):
        return {"exact_match": sum(row["exact_match"] for row in rows) / len(rows)}, rows
    labels = intent_labels((row["target"] for row in rows), intent=intent)
    commands = JsonCommandMetrics(labels, intent=intent)
    for row in rows:
        row.update(commands.update(row["target"], row["predicted"]))
    return commands.compute(), rows
