"""Runs a model over held-out documents and feeds the metrics.

The figures do not depend on how documents are cut into batches: sums are taken over rows, in Python
floats, and every document is read alone inside its stream.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ftcore.data.chat import Message
from ftcore.data.columns import Chat
from ftcore.data.encode import encode_prompt
from ftcore.data.pack import Batch, Encoded, collate, pack
from ftcore.data.tokenizer import Tokenizer
from ftcore.evaluate.metrics import ClassificationMetrics, Perplexity
from ftcore.evaluate.text import JsonCommandMetrics, exact_match, intent_labels
from ftcore.model.generate import generate
from ftcore.model.heads import Model
from ftcore.tune.task import Task

PROMPTS_AT_ONCE = 256


def streams(
    documents: Sequence[Encoded], max_tokens: int, device: torch.device
) -> Iterator[tuple[list[int], Batch]]:
    """Documents as batches of at most `max_tokens`, each with its documents' indices."""
    for indices in pack([len(document) for document in documents], max_tokens):
        yield indices, collate([documents[i] for i in indices]).to(device)


@torch.inference_mode()
def evaluate_loss(
    model: Model,
    task: Task,
    documents: Sequence[Encoded],
    *,
    max_tokens: int,
    device: torch.device,
    num_bytes: int = 0,
) -> dict[str, float]:
    """Token-weighted loss and perplexity; bits per byte where the text's bytes are given."""
    model.eval()
    perplexity = Perplexity()
    for _, batch in streams(documents, max_tokens, device):
        loss_sum, weight = task(model, batch)
        perplexity.update(loss_sum.item(), weight.item())
    perplexity.update(0.0, 0.0, num_bytes=num_bytes)
    values = perplexity.compute()
    return {"loss": values.pop("nll"), **values}


@torch.inference_mode()
def evaluate_classes(
    model: Model,
    documents: Sequence[Encoded],
    labels: Sequence[str],
    *,
    max_tokens: int,
    device: torch.device,
) -> tuple[dict[str, float], ClassificationMetrics, list[dict[str, Any]]]:
    """Predicted class of each document.

    returns   loss (nats a document) and the metrics; the metrics themselves, for tables; one
              prediction row a document
    """
    model.eval()
    logits_BK: dict[int, Tensor] = {}
    for indices, batch in streams(documents, max_tokens, device):
        h_NC = model.trunk(batch.tokens_N, batch.positions_N, batch.types_N, batch.docs)
        for index, logits_K in zip(indices, model.head(h_NC, batch.docs).float(), strict=True):
            logits_BK[index] = logits_K.cpu()
    metrics = ClassificationMetrics(labels)
    rows = []
    loss_sum = 0.0
    for index, document in enumerate(documents):
        predicted = int(logits_BK[index].argmax())
        loss_sum -= float(logits_BK[index].log_softmax(-1)[document.labels])
        metrics.update([document.labels], [predicted])
        rows.append({
            "row_id": document.row_id,
            "label": labels[document.labels],
            "predicted": labels[predicted],
            "probabilities": [round(p, 6) for p in logits_BK[index].softmax(-1).tolist()],
        })
    return {"loss": loss_sum / len(documents), **metrics.compute()}, metrics, rows


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
    commands = JsonCommandMetrics(
        intent_labels(targets, intent=intent_field), intent=intent_field
    )
    for row in rows:
        row.update(commands.update(row["target"], row["predicted"]))
    return commands.compute(), rows
