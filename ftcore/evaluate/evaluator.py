"""Runs a model over held-out documents: what it says of each row, and the metrics of any rows.

The figures do not depend on how documents are cut into batches: what a row adds is kept by row. The
caller puts the model in evaluation mode, without gradients."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from ftcore.config import DpoConfig, EvalConfig, RewardConfig
from ftcore.data import columns, prepare
from ftcore.data.chat import encode_prompt
from ftcore.data.encode import Names, Split
from ftcore.data.pack import Batch, Encoded, apart, collate
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import ModelError
from ftcore.evaluate import metrics
from ftcore.model import generate, heads, transformer
from ftcore.tune.task import document_logits, hidden
from kernels.docs import pack

PROMPTS_AT_ONCE = 256

@dataclass
class Judged:
    """What a model says of B rows: documents or chats."""
    row_ids: Sequence[str]
    figures: metrics.Figures  # metrics of some rows, by their indices
    columns: dict[str, Sequence[Any]] = field(default_factory=dict)  # predictions, of each row
    totals_3K: np.ndarray | None = None  # where a row has classes: see metrics.py
    right_B: np.ndarray | None = None  # bool: whether a row is right, where it can be
    more: dict[str, float] = field(default_factory=dict)  # metrics that only all rows have
    classes: Sequence[str] = ()  # of totals_3K; none: the labels
    texts: Callable[[], Mapping[str, str]] = dict  # of the rows, by their ids

    @cached_property
    def values(self) -> dict[str, float]:
        """The metrics of all rows."""
        return {**self.figures(np.arange(len(self.row_ids))), **self.more}

    @cached_property
    def clusters_B(self) -> np.ndarray:
        """A number (int) for each row, the same for rows of nearly the same text."""
        texts = self.texts()
        numbers = dict(zip(texts, prepare.clusters([*texts.values()]), strict=True))
        return np.array([numbers[row_id] for row_id in self.row_ids])

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The predictions, row by row; none where there are no columns."""
        parts = zip(self.row_ids, *self.columns.values(), strict=True) if self.columns else ()
        return [dict(zip(("row_id", *self.columns), each, strict=True)) for each in parts]

def root_of(row_id: str) -> str:
    return row_id.partition(":")[0]

def streams(model: heads.Model, documents: Sequence[Encoded],
            max_tokens: int) -> Iterator[tuple[list[int], Batch]]:
    """Documents as batches of at most `max_tokens`, each with its documents' indices."""
    for indices in pack(list(map(len, documents)), max_tokens):
        some = [documents[i] for i in indices]
        yield indices, collate(some, is_causal=model.spec.is_causal).to(model.device)

def all_logits(model: heads.Model, documents: Sequence[Encoded], max_tokens: int) -> Tensor:
    """logits_BK of documents, or logits_MK of their scored tokens, in order; fp32 on the CPU."""
    documents, logits = apart(documents), {}
    for indices, batch in streams(model, documents, max_tokens):
        if model.task == "classify":
            logits_MK, counts = document_logits(model, batch), [1] * len(indices)
        else:
            logits_MK = model.head(hidden(model, batch, batch.scored_M))
            counts = [np.count_nonzero(documents[index].weights) for index in indices]
        logits.update(zip(indices, logits_MK.float().cpu().split(counts), strict=True))
    require_finite(documents, [logits[index].sum() for index in range(len(documents))])
    return torch.cat([logits[index] for index in range(len(documents))])

def require_finite(documents: Sequence[Encoded], values_B: Sequence[Tensor | float]) -> None:
    """ModelError that names the first document whose value is not finite."""
    if odd := [d.row_id for d, x in zip(documents, values_B, strict=True) if not math.isfinite(x)]:
        what = f"row {odd[0]}, one of {len(odd)}: what the model says of it is not finite"
        raise ModelError(f"{what}: its weights are damaged, or env.precision fp32 is needed")

def ids_of(split: Split) -> list[str]:
    return [document.row_id for document in split.documents]

def with_loss(loss_B: np.ndarray, of: Callable[..., Mapping[str, float]],
              *columns: np.ndarray) -> metrics.Figures:
    """The mean loss of some rows, and what `of` says of their part of the columns."""
    return lambda rows_M: {"loss": float(loss_B[rows_M].mean()),
                           **of(*(x_B[rows_M] for x_B in columns))}

def evaluate_classes(model: heads.Model, split: Split, max_tokens: int, labels: Names) -> Judged:
    """Predicted class of each document; the loss in nats a document."""
    log_p_BK = all_logits(model, split.documents, max_tokens).double().log_softmax(-1).numpy()
    target_B = np.array([document.labels for document in split.documents])
    predicted_B, p_BK = log_p_BK.argmax(1), np.exp(log_p_BK)
    nll_B, names = -log_p_BK[np.arange(len(target_B)), target_B], np.array(labels, dtype=object)
    sides, totals = (target_B, predicted_B), partial(metrics.class_totals, num_classes=len(labels))
    figures = with_loss(nll_B, lambda *rows: metrics.class_figures(totals(*rows)), *sides)
    columns = {"label": names[target_B].tolist(), "predicted": names[predicted_B].tolist(),
               "probabilities": p_BK.round(6).tolist()}
    more = metrics.probability_metrics(target_B, p_BK)
    more["temperature"] = metrics.temperature(target_B, log_p_BK)
    return Judged(ids_of(split), figures, columns, totals(*sides), target_B == predicted_B, more)

def evaluate_label_sets(model: heads.Model, split: Split, max_tokens: int, labels: Names) -> Judged:
    """Predicted labels of each document, those above probability 1/2; the loss in nats a label."""
    logits_BK = all_logits(model, split.documents, max_tokens).double()
    has_BK = torch.from_numpy(np.stack([document.labels for document in split.documents])).double()
    losses_BK = F.binary_cross_entropy_with_logits(logits_BK, has_BK, reduction="none")
    sides = target_BK, predicted_BK = (has_BK > 0).numpy(), (logits_BK > 0).numpy()
    figures = with_loss(losses_BK.mean(1).numpy(), metrics.label_figures, *sides)
    names = np.array(labels, dtype=object)
    columns = {"labels": [names[target_K].tolist() for target_K in target_BK],
               "predicted": [names[predicted_K].tolist() for predicted_K in predicted_BK],
               "probabilities": logits_BK.sigmoid().numpy().round(6).tolist()}
    right_B = (target_BK == predicted_BK).all(1)
    return Judged(ids_of(split), figures, columns, metrics.label_totals(*sides), right_B)

def evaluate_tags(model: heads.Model, split: Split, max_tokens: int, labels: Names) -> Judged:
    """Predicted tag of each word that has a token; the loss in nats a word; entities by type."""
    log_p_MK = all_logits(model, split.documents, max_tokens).double().log_softmax(-1).numpy()
    target_M = np.concatenate([d.labels[d.weights > 0] for d in split.documents])
    counts_B = [np.count_nonzero(document.weights) for document in split.documents]
    nll_M, predicted_M = -log_p_MK[np.arange(len(target_M)), target_M], log_p_MK.argmax(1)
    starts_B, names = np.cumsum([0, *counts_B[:-1]]), np.array(labels, dtype=object)
    sides = [np.split(names[x_M], starts_B[1:]) for x_M in (target_M, predicted_M)]
    types = sorted({name[2:] for name in labels if name[:2] in ("B-", "I-")})
    totals_B3K = np.array([metrics.entity_totals(*row, types) for row in zip(*sides, strict=True)])
    nll_B, right_B = (np.add.reduceat(x_M, starts_B) for x_M in (nll_M, target_M == predicted_M))

    def figures(rows_R: np.ndarray) -> metrics.Metrics:
        loss, right, words = (np.array(x_B)[rows_R].sum() for x_B in (nll_B, right_B, counts_B))
        told = metrics.entity_figures(totals_B3K[rows_R].sum(0)) if types else {}
        return {"loss": float(loss / words), "accuracy": float(right / words), **told}

    tags, predicted = ([row.tolist() for row in side] for side in sides)
    return Judged(ids_of(split), figures, {"tags": tags, "predicted": predicted},
                  totals_B3K.sum(0) if types else None, right_B == counts_B, classes=types)

def evaluate_scores(model: heads.Model, split: Split, max_tokens: int, labels: Names) -> Judged:
    """Predicted score of each document; the loss a mean squared error."""
    (predicted_B,) = all_logits(model, split.documents, max_tokens).double().numpy().T
    target_B = np.array(targets := [document.labels for document in split.documents])
    figures = with_loss(np.square(predicted_B - target_B), metrics.regression_metrics,
                        target_B, predicted_B)
    return Judged(ids_of(split), figures, {labels[0]: targets, "predicted": predicted_B.tolist()})

def scored_tokens(model: heads.Model, documents: Sequence[Encoded], max_tokens: int) -> np.ndarray:
    """Of each document the loss (nats) and weight of its scored tokens, sums_B2."""
    sums_B2 = np.zeros((len(documents), 2))
    for indices, batch in streams(model, documents, max_tokens):
        scored_M = batch.scored_M
        h_MC, weights_M = hidden(model, batch, scored_M), batch.weights[scored_M].cpu().double()
        losses_M = model.head.token_losses(h_MC, batch.labels[scored_M]).cpu().double()
        counts = [np.count_nonzero(documents[index].weights) for index in indices]
        for column, x_M in enumerate((losses_M * weights_M, weights_M)):
            sums_B2[indices, column] = [float(x_T.sum()) for x_T in x_M.split(counts)]
    require_finite(documents, sums_B2[:, 0])
    return sums_B2

def evaluate_language(model: heads.Model, split: Split, max_tokens: int, labels: Names) -> Judged:
    """Token-weighted loss and perplexity; a text is one row; bits per byte, if bytes are known."""
    sums_D2, rows = scored_tokens(model, split.documents, max_tokens), dict[str, np.ndarray]()
    for id_, sums_2 in zip(map(root_of, ids_of(split)), sums_D2, strict=True):
        rows[id_] = rows.get(id_, 0) + sums_2
    sums_B2 = np.array([*rows.values()])
    return Judged([*rows], lambda rows_M: metrics.perplexity(*sums_B2[rows_M].sum(0)),
                  more=metrics.perplexity(*sums_D2.sum(0), split.num_bytes))

def log_ratios(model: heads.Model, pairs: Sequence[Encoded], max_tokens: int,
               length_normalised: bool) -> np.ndarray:
    """How much likelier each chosen answer is than the rejected one: nats, or nats a token."""
    nll_D, counts_D = scored_tokens(model, apart(pairs), max_tokens).T
    said_B2 = -(nll_D / counts_D if length_normalised else nll_D).reshape(-1, 2)
    return said_B2[:, 0] - said_B2[:, 1]

def evaluate_pairs(model: heads.Model, split: Split, max_tokens: int, labels: Names, *,
                   options: RewardConfig | DpoConfig) -> Judged:
    """Which answer of each pair is preferred, by the gap of its scores, or of its log-ratio and the
    reference's; a tie is half right. The loss is that of training; ece that of sigmoid(beta gap);
    length_bias the Spearman correlation of scores and tokens of the answers."""
    about_B5 = np.stack([document.labels for document in split.documents]).astype(np.float64)
    tokens_D = np.array([np.count_nonzero(side.weights) for side in apart(split.documents)])
    chosen_B, rejected_B = tokens_D.reshape(-1, 2).T
    if isinstance(options, RewardConfig):
        score_B2 = all_logits(model, split.documents, max_tokens).double().numpy().reshape(-1, 2)
        gap_B, beta = score_B2[:, 0] - score_B2[:, 1], 1.0
        loss_B = np.logaddexp(0, about_B5[:, 3] - gap_B) + options.centring * score_B2.sum(1) ** 2
        more = {"length_bias": metrics.regression_metrics(tokens_D, score_B2.flatten())["spearman"]}
    else:
        long, beta, more = options.length_normalised, options.beta, {}
        gap_B = log_ratios(model, split.documents, max_tokens, long) - about_B5[:, 4]
        is_ipo = options.loss == "ipo"
        loss_B = (gap_B - 0.5 / beta) ** 2 if is_ipo else np.logaddexp(0, -beta * gap_B)

    def shares(right_M: np.ndarray, longer_M: np.ndarray) -> dict[str, float]:
        of = {"accuracy": right_M, "accuracy_chosen_longer": right_M[longer_M > 0],
              "accuracy_chosen_shorter": right_M[longer_M < 0],
              "longer_reply_accuracy": (longer_M + 1) / 2}
        return {name: float(x_M.mean()) if len(x_M) else math.nan for name, x_M in of.items()}

    figures = with_loss(loss_B, shares, (np.sign(gap_B) + 1) / 2, np.sign(chosen_B - rejected_B))
    p_B = 1 / (1 + np.exp(-np.clip(beta * gap_B, -500, 500)))
    more |= {"margin": float(gap_B.mean()),
             "ece": metrics.calibration_error(np.maximum(p_B, 1 - p_B), p_B > 0.5)}
    columns = {"gap": gap_B.tolist(), "chosen_tokens": chosen_B.tolist(),
               "rejected_tokens": rejected_B.tolist()}
    return Judged(ids_of(split), figures, columns, right_B=gap_B > 0, more=more)

JUDGES: Mapping[str | None, Callable[..., Judged]] = {  # by HF's `problem_type`; not of pairs
    "single_label_classification": evaluate_classes, "regression": evaluate_scores,
    "multi_label_classification": evaluate_label_sets, "token_classification": evaluate_tags,
    None: evaluate_language}

def continued(model: heads.Model, tokenizer: Tokenizer, prompts: Sequence[np.ndarray],
              max_new_tokens: int, *, temperature: float = 1.0,
              chance_BT: np.ndarray | None = None) -> list[list[int]]:
    """Ids that continue each prompt (ids), some prompts at a time: see `generate`."""
    how = dict(max_new_tokens=max_new_tokens, stop_ids=tokenizer.stop_ids, temperature=temperature)
    made: list[list[int]] = []
    starts = range(0, len(prompts), PROMPTS_AT_ONCE)
    with transformer.packed_linears(model):
        for start in tqdm(starts, desc="answers", leave=False, disable=None):
            some = slice(start, start + PROMPTS_AT_ONCE)
            chance = None if chance_BT is None else chance_BT[some]
            made += generate.generate(model, prompts[some], chance_BT=chance, **how)
    return made

def spoken(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """An answer as text, without the token that ends it."""
    return tokenizer.decode([id_ for id_ in ids if id_ not in tokenizer.stop_ids])

def with_answers(judged: Judged, model: heads.Model, tokenizer: Tokenizer,
                 chats: Sequence[columns.Chat], config: EvalConfig) -> Judged:
    """With what is said of each chat, greedy answers against expected last turns."""
    prompts = [encode_prompt(chat.messages[:-1], tokenizer) for chat in chats]
    asked, targets = ([chat.messages[turn]["content"] for chat in chats] for turn in (-2, -1))
    made = continued(model, tokenizer, prompts, config.max_new_tokens)
    answers = [spoken(ids, tokenizer) for ids in made]
    intent = config.intent_field
    judge = partial(metrics.judged_command, intent=intent) if intent else metrics.judged_text
    verdicts = [*map(judge, targets, answers)]
    names, values_BS = verdicts[0], np.array([[*each.values()] for each in verdicts], dtype=float)
    columns = {"prompt": asked, "target": targets, "predicted": answers}
    columns |= {name: [each[name] for each in verdicts] for name in names}
    return replace(judged, columns=columns, right_B=np.array(columns["exact_match"]),
                   figures=lambda rows_M: {**judged.figures(rows_M), **dict(
                       zip(names, values_BS[rows_M].mean(0).tolist(), strict=True))})
