"""Runs a model over held-out documents and feeds the metrics.

The figures do not depend on how documents are cut into batches: sums are taken over rows, in Python
floats, and every document is read alone inside its stream. The caller puts the model in evaluation
mode and switches gradients off; `limits` are what `streams` takes beside the documents.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ftcore.data.chat import Message
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
from ftcore.tune.task import Task, hidden

PROMPTS_AT_ONCE = 256
# Loss and metrics; what counted them, where it has tables; prediction rows.
Judged = tuple[
    dict[str, float],
    ClassificationMetrics | MultiLabelMetrics | EntityMetrics | None,
    list[dict[str, Any]],
]


def streams(
    documents: Sequence[Encoded], *, max_tokens: int, device: torch.device
) -> Iterator[tuple[list[int], Batch]]:
    """Documents as batches of at most `max_tokens`, each with its documents' indices."""
    for indices in pack([len(document) for document in documents], max_tokens):
        yield indices, collate([documents[i] for i in indices]).to(device)


def evaluate_loss(model: Model, task: Task, split: Split, **limits: Any) -> dict[str, float]:
    """Token-weighted loss and perplexity; bits per byte where the text's bytes are known."""
    perplexity = Perplexity()
    for _, batch in streams(split.documents, **limits):
        loss_sum, weight = task(model, batch)
        perplexity.update(loss_sum.item(), weight.item())
    perplexity.update(0.0, 0.0, num_bytes=split.num_bytes)
    values = perplexity.compute()
    return {"loss": values.pop("nll"), **values}


def document_logits(model: Model, documents: Sequence[Encoded], **limits: Any) -> Tensor:
    """logits_BK of a head that judges whole documents, fp32 on the CPU."""
    logits: dict[int, Tensor] = {}
    for indices, batch in streams(documents, **limits):
        h_MC = hidden(model, batch, model.head.rows(batch.docs))
        for index, logits_K in zip(indices, model.head(h_MC, batch.docs).float(), strict=True):
            logits[index] = logits_K.cpu()
    return torch.stack([logits[index] for index in range(len(documents))])


def evaluate_classes(model: Model, split: Split, labels: Sequence[str], **limits: Any) -> Judged:
    """Predicted class of each document; the loss in nats a document."""
    logits_BK = document_logits(model, split.documents, **limits)
    metrics = ClassificationMetrics(labels)
    rows = []
    loss_sum = 0.0
    for document, logits_K in zip(split.documents, logits_BK, strict=True):
        predicted = int(logits_K.argmax())
        loss_sum -= float(logits_K.log_softmax(-1)[document.labels])
        metrics.update([document.labels], [predicted])
        rows.append({
            "row_id": document.row_id,
            "label": labels[document.labels],
            "predicted": labels[predicted],
            "probabilities": [round(p, 6) for p in logits_K.softmax(-1).tolist()],
        })
    return {"loss": loss_sum / len(rows), **metrics.compute()}, metrics, rows


def evaluate_label_sets(model: Model, split: Split, labels: Sequence[str], **limits: Any) -> Judged:
    """Predicted labels of each document, those above probability 1/2; the loss in nats a label."""
    logits_BK = document_logits(model, split.documents, **limits).double()
    has_BK = torch.from_numpy(np.stack([document.labels for document in split.documents])).double()
    loss = F.binary_cross_entropy_with_logits(logits_BK, has_BK).item()
    target_BK, predicted_BK = (has_BK > 0).numpy(), (logits_BK > 0).numpy()
    metrics = MultiLabelMetrics(labels)
    metrics.update(target_BK, predicted_BK)
    names = np.array(labels, dtype=object)
    rows = [
        {
            "row_id": document.row_id,
            "labels": names[target_K].tolist(),
            "predicted": names[predicted_K].tolist(),
            "probabilities": [round(p, 6) for p in logits_K.sigmoid().tolist()],
        }
        for document, target_K, predicted_K, logits_K in zip(
            split.documents, target_BK, predicted_BK, logits_BK, strict=True
        )
    ]
    return {"loss": loss, **metrics.compute()}, metrics, rows


def evaluate_scores(model: Model, split: Split, labels: Sequence[str], **limits: Any) -> Judged:
    """Predicted score of each document; the loss a mean squared error."""
    (predicted_B,) = document_logits(model, split.documents, **limits).double().numpy().T
    target_B = np.array([document.labels for document in split.documents])
    rows = [
        {"row_id": document.row_id, labels[0]: document.labels, "predicted": float(predicted)}
        for document, predicted in zip(split.documents, predicted_B, strict=True)
    ]
    loss = float(np.square(predicted_B - target_B).mean())
    return {"loss": loss, **regression_metrics(target_B, predicted_B)}, None, rows


def token_logits(
    model: Model, documents: Sequence[Encoded], **limits: Any
) -> Iterator[tuple[list[int], Batch, Tensor, Tensor]]:
    """Streams with their documents' indices, scored_M: which tokens are scored, and logits_MV of
    these, fp32."""
    for indices, batch in streams(documents, **limits):
        scored_M = batch.weights.nonzero().squeeze(1)
        yield indices, batch, scored_M, model.head(hidden(model, batch, scored_M)).float()


def evaluate_masked(model: Model, split: Split, labels: Sequence[str], **limits: Any) -> Judged:
    """Predicted token at each hidden place; the loss in nats a hidden token. `labels` are the
    vocabulary, by id."""
    perplexity, hits, rows = Perplexity(), 0, {}
    for indices, batch, scored_M, logits_MV in token_logits(model, split.documents, **limits):
        labels_M, chosen_M = batch.labels[scored_M], logits_MV.argmax(-1)
        loss_sum = F.cross_entropy(logits_MV, labels_M, reduction="sum").item()
        perplexity.update(loss_sum, len(labels_M))
        hits += int((chosen_M == labels_M).sum())
        counts = [np.count_nonzero(split.documents[index].weights) for index in indices]
        for index, truth, chosen in zip(
            indices, labels_M.split(counts), chosen_M.split(counts), strict=True
        ):
            rows[index] = {
                "row_id": split.documents[index].row_id,
                "hidden": [labels[id_] for id_ in truth.tolist()],
                "predicted": [labels[id_] for id_ in chosen.tolist()],
            }
    values = perplexity.compute()
    accuracy = hits / perplexity.weight
    values = {"loss": values.pop("nll"), **values, "accuracy": accuracy}
    return values, None, [rows[index] for index in range(len(rows))]


def evaluate_tags(model: Model, split: Split, labels: Sequence[str], **limits: Any) -> Judged:
    """Predicted tag of each word, OUTSIDE for one without a token; the loss in nats a word that has
    one."""
    loss_sum, weight = 0.0, 0
    chosen: dict[int, list[int]] = {}
    for indices, batch, scored_M, logits_MK in token_logits(model, split.documents, **limits):
        loss_sum += F.cross_entropy(logits_MK, batch.labels[scored_M], reduction="sum").item()
        weight += len(scored_M)
        chosen_N = torch.zeros_like(batch.tokens_N)
        chosen_N[scored_M] = logits_MK.argmax(-1)
        for index, chosen_T in zip(indices, chosen_N.split(batch.docs.lengths), strict=True):
            chosen[index] = chosen_T.tolist()
    metrics, rows = EntityMetrics(), []
    for index, document in enumerate(split.documents):
        sentence = split.sentences[index]
        predicted = [
            OUTSIDE if place < 0 else labels[chosen[index][place]] for place in sentence.places_W
        ]
        metrics.update(sentence.tags, predicted)
        words = {"tokens": sentence.words, "tags": sentence.tags, "predicted": predicted}
        rows.append({"row_id": document.row_id, **words})
    return {"loss": loss_sum / weight, **metrics.compute()}, metrics, rows


def answer(
    model: Model,
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
) -> list[str]:
    """Greedy answer to each conversation that ends in a user turn."""
    stop_ids = frozenset({tokenizer.eos_id, tokenizer.end_of_text_id} - {None})
    texts: list[str] = []
    with tqdm(total=len(conversations), unit="answer", leave=False, disable=None) as bar:
        for start in range(0, len(conversations), PROMPTS_AT_ONCE):
            some = conversations[start : start + PROMPTS_AT_ONCE]
            prompts = [encode_prompt(messages, tokenizer) for messages in some]
            outputs = generate(model, prompts, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
            kept = [[id_ for id_ in ids if id_ not in stop_ids] for ids in outputs]
            texts += [tokenizer.decode(ids) for ids in kept]
            bar.update(len(some))
    return texts


def evaluate_answers(
    model: Model,
    tokenizer: Tokenizer,
    chats: Sequence[Chat],
    *,
    max_new_tokens: int,
    intent_field: str,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Generated against expected last turns.

    chats           the last message of each is the expected answer
    intent_field    JSON field that is scored as a class; empty: exact match alone
    returns         the metrics, and one prediction row a chat
    """
    prompts = [chat.messages[:-1] for chat in chats]
    targets = [chat.messages[-1]["content"] for chat in chats]
    texts = answer(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    rows = [
        {
            "row_id": chat.id,
            "prompt": chat.messages[-2]["content"],
            "target": target,
            "predicted": text,
            "exact_match": exact_match(target, text),
        }
        for chat, target, text in zip(chats, targets, texts, strict=True)
    ]
    if not intent_field:
        return {"exact_match": sum(row["exact_match"] for row in rows) / len(rows)}, rows
    labels = intent_labels(targets, intent=intent_field)
    commands = JsonCommandMetrics(labels, intent=intent_field)
    for row in rows:
        row.update(commands.update(row["target"], row["predicted"]))
    return commands.compute(), rows
