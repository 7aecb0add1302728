"""Everything that is measured on a run's test splits, for the task at hand."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ftcore.config import Run
from ftcore.data.prepare import Split
from ftcore.data.tokenizer import Tokenizer
from ftcore.evaluate.evaluator import evaluate_answers, evaluate_classes, evaluate_loss
from ftcore.evaluate.report import confusion_table, metrics_table, per_class_table
from ftcore.model.heads import Model
from ftcore.tune.task import TASKS


@dataclass
class Results:
    """Metrics by split, prediction rows of all splits, and further tables for people."""

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n\n".join([metrics_table(self.metrics), *self.tables])


def evaluate_splits(
    task: str,
    config: Run,
    model: Model,
    tokenizer: Tokenizer,
    splits: Mapping[str, Split],
    *,
    labels: tuple[str, ...] | None,
    device: torch.device,
) -> Results:
    """Loss and perplexity of every split; classes or generated answers where the task has them."""
    results = Results()
    for name, split in splits.items():
        limits = {"max_tokens": config.loop.micro_batch_tokens, "device": device}
        values = evaluate_loss(
            model, TASKS[task].loss, split.documents, num_bytes=split.num_bytes, **limits
        )
        rows: list[dict[str, Any]] = []
        if task == "classify":
            values.pop("perplexity")
            metrics, rows = evaluate_classes(model, split.documents, labels, **limits)
            values |= metrics.compute()
            results.tables += [
                f"{name}, by class\n{per_class_table(metrics.per_class())}",
                f"{name}, most confused\n{confusion_table(metrics)}",
            ]
        elif split.chats:
            answers, rows = evaluate_answers(
                model,
                tokenizer,
                split.chats,
                max_new_tokens=config.eval.max_new_tokens,
                intent_field=config.eval.intent_field,
            )
            values |= answers
        results.metrics[name] = values
        results.predictions += [{"split": name, **row} for row in rows]
    return results
