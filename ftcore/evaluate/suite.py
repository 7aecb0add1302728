"""What is measured for the task at hand: a few figures while it trains, everything at the end."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ftcore.config import Run
from ftcore.data.prepare import Split
from ftcore.data.tokenizer import Tokenizer
from ftcore.evaluate.evaluator import JUDGES, Judged, evaluate_answers, evaluate_loss
from ftcore.evaluate.metrics import ClassificationMetrics
from ftcore.evaluate.report import confusion_table, metrics_table, per_class_table
from ftcore.model.heads import Model
from ftcore.tune.task import TASKS

SHOWN = (  # while it trains, where the task has it
    "loss", "perplexity", "bits_per_byte", "accuracy", "subset_accuracy", "f1_macro", "f1",
    "pearson", "spearman",
)  # fmt: skip

@dataclass
class Results:
    """Metrics by split, prediction rows of all splits, and further tables for people."""
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n\n".join([metrics_table(self.metrics), *self.tables])

    def against(self, base: Mapping[str, Mapping[str, float]]) -> str:
        """The same for people, each metric beside that of the base model."""
        pairs = {name: {"base": base[name], "tuned": mine} for name, mine in self.metrics.items()}
        tables = (f"{name}\n{metrics_table(pair)}" for name, pair in pairs.items())
        return "\n\n".join([*tables, *self.tables])

    def samples(self, count: int) -> str:
        """Some answers, evenly spaced over the splits; empty where nothing was generated."""
        answers = [row for row in self.predictions if "prompt" in row]
        chosen = [answers[i * len(answers) // count] for i in range(min(count, len(answers)))]
        return "".join(
            f"\n> {row['prompt']}\n{row['predicted']}\n"
            + ("" if row["exact_match"] else f"  (expected: {row['target']})\n")
            for row in chosen
        )

@dataclass(frozen=True)
class Suite:
    """The evaluation of one run."""
    task: str  # key of TASKS
    config: Run  # the run's sections
    tokenizer: Tokenizer
    labels: tuple[str, ...] | None  # classes of a classifier, by index
    device: torch.device

    def dev(self, model: Model, split: Split) -> dict[str, float]:
        """What the loop shows and chooses the best checkpoint by; nothing is generated."""
        values = self._judged(model, split)[0]
        return {f"eval/{name}": values[name] for name in SHOWN if name in values}

    def tests(self, model: Model, splits: Mapping[str, Split]) -> Results:
        """Loss of every split; classes or generated answers where the task has them."""
        results = Results()
        for name, split in splits.items():
            values, metrics, rows = self._judged(model, split)
            if metrics is not None:
                results.tables.append(f"{name}, by class\n{per_class_table(metrics.per_class())}")
            if isinstance(metrics, ClassificationMetrics):
                results.tables.append(f"{name}, most confused\n{confusion_table(metrics)}")
            if split.chats:
                config = self.config.eval
                answers, rows = evaluate_answers(model, self.tokenizer, split.chats, config)
                values |= answers
            results.metrics[name] = values
            results.predictions += [{"split": name, **row} for row in rows]
        return results

    @torch.inference_mode()
    def _judged(self, model: Model, split: Split) -> Judged:
        model.eval()
        limits = {"max_tokens": self.config.loop.micro_batch_tokens, "device": self.device}
        if judge := JUDGES.get(self.config.problem or self.task):
            return judge(model, split, self.labels or self.tokenizer.vocabulary, **limits)
        return evaluate_loss(model, TASKS[self.task].loss, split, **limits), None, []
