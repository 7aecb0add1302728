"""What is measured for the task at hand, a few figures while it trains, everything at the end; and
results as people and programs read them: tables, predictions, a JSON line, the page of a run.

The merge certificate tells what changes when an adapter's update is folded into its matrices:

    loss, ...       and what else is watched in training, unmerged and merged, of held-out rows
    max_difference  of their logits at the scored tokens, or of the scored documents
    mean_kl         KL(unmerged || merged), nats; of several labels, each is a choice of its own
    changed         share of the arg-max that change"""

import json
import math
import re
import time
import tomllib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any
import numpy as np
import torch
import torch.nn.functional as F
from ftcore.cli import CONFIG_FILE
from ftcore.config import Run
from ftcore.data import dedup, encode, pack, store
from ftcore.data.tokenizer import Tokenizer
from ftcore.env.run import read_metrics
from ftcore.errors import ConfigError, DataError
from ftcore.evaluate import evaluator, metrics
from ftcore.evaluate.evaluator import Judged, all_logits, root_of, with_answers
from ftcore.files import write_file
from ftcore.model.heads import Model
from ftcore.tune.lora import merge

MAX_TEXT = 40
Parsed = Mapping[str, Any]  # a folder's files by name, parsed; those that it lacks are empty
SHOWN = ("loss", "perplexity", "bits_per_byte", "accuracy", "subset_accuracy", "f1_macro", "f1",
         "pearson", "spearman", "temperature")  # while it trains, where the task has it
MOST_ROWS, MOST_SCORED, MOST_LOGITS = 256, 2048, 2**25  # so that a certificate takes seconds, 1 GB

def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Aligned columns under `header`. Text is put on one line and cut at MAX_TEXT characters; "-"
    is None or NaN; floats show four decimals, or four significant digits where those hide it."""
    columns = []
    for name, *values in zip(header, *rows, strict=True):
        cells = [name, *map(_cell, values)]
        is_number = all(value is None or isinstance(value, Real) for value in values)
        width = max(map(len, cells))
        columns.append([cell.rjust(width) if is_number else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))

def metrics_table(results: Mapping[str, Mapping[str, float]]) -> str:
    names = dict.fromkeys(name for found in results.values() for name in found)
    rows = ([name, *(found.get(name) for found in results.values())] for name in names)
    return table(["metric", *results], rows)

def per_class_table(labels: Sequence[str], totals_3K: np.ndarray, *, max_rows: int = 20) -> str:
    """The classes that occur, of lowest F1 first, up to so many."""
    _, predicted_K, support_K = totals_3K
    *_, f1_K = scores = metrics.class_scores(totals_3K)
    occurring = np.flatnonzero(support_K + predicted_K)
    rows = ([labels[k], *(x_K[k] for x_K in (*scores, support_K, predicted_K))]
            for k in sorted(occurring, key=f1_K.__getitem__)[:max_rows])
    return table(("label", *metrics.SCORES, "support", "predicted"), rows)

def confusion_table(rows: Sequence[Mapping[str, Any]], texts: Mapping[str, str]) -> str:
    """The ten most frequent mistakes in predicted classes, their share of the target's rows, and
    the text of one, from `texts` by row_id."""
    such = {(row["label"], row["predicted"]): texts[row["row_id"]] for row in rows}
    counts = Counter((row["label"], row["predicted"]) for row in rows)
    support = Counter(row["label"] for row in rows)
    wrong = sorted((-n, *pair) for pair, n in counts.items() if pair[0] != pair[1])[:10]
    cells = [(k, p, -n, -n / support[k], such[k, p]) for n, k, p in wrong]
    head = ("target", "predicted", "rows", "of target", "such as")
    return table(head, cells) if wrong else "no mistakes"

def write_predictions(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one UTF-8 JSON line per row, whole or not at all. Raises CheckpointError: it cannot."""
    lines = [json.dumps(_plain(row), ensure_ascii=False) + "\n" for row in rows]
    write_file(path, "".join(lines).encode("utf-8", "backslashreplace"))  # half a pair: escaped

def note_opening(run: Path, files: Sequence[str], metrics: Mapping[str, Any]) -> int:
    """Add to RUN/openings.jsonl that test rows were judged; returns how often by now."""
    file, line = run / "openings.jsonl", {"time": round(time.time()), "files": [*map(str, files)]}
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line | {"metrics": _plain(metrics)}) + "\n")
    return file.read_bytes().count(b"\n")

def json_line(result: Mapping[str, Any]) -> str:
    """`result` as one compact line of ASCII JSON, floats to six significant digits."""
    return json.dumps(_plain(result, digits=6), separators=(",", ":"))

def _plain(value: Any, digits: int = 17) -> Any:
    """`value` for JSON: arrays as lists, floats not finite as null, others to `digits`; 17: all."""
    text = json.dumps(value, default=lambda array: array.tolist())
    return json.loads(text, parse_constant=lambda name: None,
                      parse_float=lambda number: float(f"{float(number):.{digits}g}"))

def _cell(value: Any) -> str:
    if value is None or (isinstance(value, Real) and math.isnan(value)):
        return "-"
    if isinstance(value, Real) and not isinstance(value, Integral):
        readable = value == 0 or math.isinf(value) or 1e-4 <= abs(value) < 1e6
        return f"{value:.4f}" if readable else f"{value:.3e}"
    text = " ".join(str(value).split())
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."

def read_run(folder: Path) -> Parsed:
    """Raises ConfigError: it is no run folder."""
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"{folder} is no run folder: it has no {CONFIG_FILE}")
    run = {"data": store.read_account(folder / "data")}
    for name in ("run", "plan", "eval", "labels", "certificate"):
        file = folder / f"{name}.json"
        run[name] = json.loads(file.read_bytes()) if file.is_file() else {}
    for name in ("metrics", "predictions", "base-predictions", "openings"):
        run[name.replace("-", "_")] = read_metrics(folder / f"{name}.jsonl")
    text = (folder / CONFIG_FILE).read_text("utf-8")
    run["config"] = tomllib.loads(text)
    run["asked"] = re.findall(r"^(\w+ = .*?)  # (?!default$)(.*)$", text, re.M)
    run["skipped"] = sorted(file.name for file in folder.glob("skipped-step-*.json"))
    return run

def write_page(folder: Path) -> Path:
    run = read_run(folder)
    shown = {**run["data"], **run, "where": folder, **judged(run)}
    write_file(folder / "report.html", store.rendered("run.html", Path(__file__).parent, **shown))
    return folder / "report.html"

def judged(run: Parsed) -> dict[str, Any]:
    """Reliability and confusions of rows that have a class each, if there are any."""
    rows = [row for row in run["predictions"] if "label" in row and "probabilities" in row]
    if not rows:
        return {}
    confidence_B = np.array([max(row["probabilities"]) for row in rows])
    right_B = np.array([row["label"] == row["predicted"] for row in rows])
    return {"reliability": metrics.reliability(confidence_B, right_B),
            "confusion": Counter((row["label"], row["predicted"]) for row in rows)}

@dataclass
class Results:
    """Of each split what a model says of its rows, the metrics and how far they may be off."""
    seed: int
    judged: dict[str, Judged]
    metrics: dict[str, dict[str, float]]
    predictions: list[dict[str, Any]]
    tables: list[str]  # further ones for people

    @cached_property
    def intervals(self) -> dict[str, metrics.Intervals]:
        """By split the ends of each figure's interval."""
        return {name: metrics.intervals(judged.figures, judged.clusters_B, seed=self.seed)
                for name, judged in self.judged.items()}

    def against(self, base: Mapping[str, Mapping[str, float]]) -> str:
        """For people, each metric with its interval, beside that of the base model if there is."""
        told = []
        for name, mine in self.metrics.items():
            columns = {"base": base[name], "tuned": mine} if name in base else {"value": mine}
            for side, end in enumerate(("low", "high")):
                columns[end] = {metric: ends[side] for metric, ends in self.intervals[name].items()}
            told.append(f"{name}, with 95% intervals\n{metrics_table(columns)}")
        return "\n\n".join([*told, *self.tables])

    def compared(self, other: "Results") -> tuple[str, dict[str, dict[str, Any]]]:
        """Both models on the same rows, paired, for people and by split and metric."""
        found: dict[str, dict[str, Any]] = {}
        told, head = [], ("metric", "this", "other", "difference", "low", "high", "p", "")
        for name, a in self.judged.items():
            b = other.judged[name]
            if (a.row_ids, [*a.values]) != (b.row_ids, [*b.values]):
                raise DataError(f"{name}: both models must read, and keep, the same test rows")
            found[name] = metrics.compare(a.figures, b.figures, a.clusters_B, seed=self.seed)
            cells = ((key, a.values[key], b.values[key], *each.values(),
                      "too small to tell" if each["low"] <= 0 <= each["high"] else "differs")
                     for key, each in found[name].items())
            told.append(f"{name}, paired\n{table(head, cells)}")
            if a.right_B is not None:
                alone = {"gained": int((a.right_B & ~b.right_B).sum()),
                         "lost": int((b.right_B & ~a.right_B).sum())}
                found[name]["mcnemar"] = alone | {"p": metrics.mcnemar(**alone)}
                told.append("rows that one alone has right: {gained} this, {lost} the other; "
                            "McNemar mid-p {p:.4g}".format(**found[name]["mcnemar"]))
        return "\n\n".join(told), found

    def without(self, name: str, row_ids: Collection[str]) -> str:
        """The metrics of a split, beside those of its rows that are not among these."""
        judged = self.judged[name]
        kept = [i for i, row_id in enumerate(judged.row_ids) if row_id not in row_ids]
        rest = judged.figures(np.array(kept)) if kept else {}
        shown = metrics_table({"all rows": judged.values, "without": rest})
        return f"{shown}\n{len(kept)} of {len(judged.row_ids)} rows are left"

@dataclass(frozen=True)
class Suite:
    task: str  # key of TASKS
    config: Run  # the run's sections
    tokenizer: Tokenizer
    labels: tuple[str, ...] | None  # classes of a classifier, by index

    def dev(self, model: Model, split: encode.Split) -> dict[str, float]:
        """What the loop shows and chooses the best checkpoint by; nothing is generated."""
        values = self._judged(model, split).values
        return {f"eval/{name}": values[name] for name in SHOWN if name in values}

    def tests(self, model: Model, splits: Mapping[str, encode.Split]) -> Results:
        judged = {name: self._judged(model, split, answers=True) for name, split in splits.items()}
        values = {name: each.values for name, each in judged.items()}
        rows = [{"split": name, **row} for name, each in judged.items() for row in each.rows]
        tables = [f"{name}, {told}" for name, each in judged.items() for told in self._tables(each)]
        return Results(self.config.env.seed, judged, values, rows, tables)

    def gap(self, model: Model, train: Sequence[pack.Encoded], dev: encode.Split) -> str:
        """How much better the model is on as many rows of its training; empty without dev rows."""
        if not dev.documents:
            return ""
        rows = encode.Split(documents=train[: len(dev.documents)])
        one, two = self._judged(model, dev), self._judged(model, rows)
        found = metrics.compare(one.figures, two.figures, one.clusters_B, two.clusters_B,
                                seed=self.config.env.seed)
        cells = ((name, two.values[name], one.values[name], *found[name].values())
                 for name in SHOWN if name in found)
        head = ("metric", "train", "dev", "difference", "low", "high", "p")
        return f"over-fitting, {len(rows.documents)} rows each\n{table(head, cells)}"

    def leaked(self, split: encode.Split, train: Sequence[pack.Encoded]) -> dict[str, str]:
        """By row id, why training knows it: the same text, nearly the same, or 13 words."""
        mine, theirs = self._texts(split.documents), self._texts(train)
        names, found = list(mine), dedup.leaks(list(mine.values()), list(theirs.values()))
        return {names[row]: kind for row, (_, kind, _) in found.items()}

    def _texts(self, documents: Sequence[pack.Encoded]) -> dict[str, str]:
        texts: dict[str, str] = {}
        for document in documents:
            end = int(document.labels[1]) if pack.is_pair(document) else len(document)
            root, text = root_of(document.row_id), self.tokenizer.decode(document.tokens_T[:end])
            texts[root] = texts.get(root, "") + text
        return texts

    def _tables(self, judged: Judged) -> Iterator[str]:
        """What is told of classes, where the task has them."""
        if judged.totals_3K is None:
            return
        yield f"by class\n{per_class_table(judged.classes or self.labels, judged.totals_3K)}"
        if "label" in judged.columns:  # one a row
            yield f"most confused\n{confusion_table(judged.rows, judged.texts())}"
            if len(self.labels) == 2:
                is_one_B = np.array(judged.columns["label"], dtype=object) == self.labels[1]
                score_B = np.array(judged.columns["probabilities"])[:, 1]
                found = metrics.threshold_table(is_one_B, score_B)
                shown = table(found[0], [each.values() for each in found])
                yield f"thresholds of {self.labels[1]}\n{shown}"

    @torch.inference_mode()
    def _judged(self, model: Model, split: encode.Split, *, answers: bool = False) -> Judged:
        model.eval()
        judge = evaluator.JUDGES[self.config.problem]
        if self.task in ("reward", "dpo"):
            judge = partial(evaluator.evaluate_pairs, options=getattr(self.config, self.task))
        judged = judge(model, split, self.config.loop.micro_batch_tokens, self.labels)
        judged.texts = cache(partial(self._texts, split.documents))
        if answers and split.chats:
            return with_answers(judged, model, self.tokenizer, split.chats, self.config.eval)
        return judged

@torch.inference_mode()
def certify(model: Model, split: encode.Split, suite: Suite) -> dict[str, Any]:
    """Of a split's first rows; scores have neither KL nor arg-max. Leaves the model unmerged."""
    model.eval()
    documents = split.documents[:MOST_ROWS]
    scored = np.cumsum([sum(np.count_nonzero(side.weights) for side in pack.apart([document]))
                        for document in documents])
    most = min(MOST_SCORED, MOST_LOGITS // model.spec.vocab_size)
    few = documents[: max(1, np.count_nonzero(scored <= most))]
    proof: dict[str, Any] = {"rows": len(few)}
    if not few:
        return proof
    values, logits = [], []
    for is_merged in (False, True):
        merge(model, is_merged=is_merged)
        logits.append(all_logits(model, few, suite.config.loop.micro_batch_tokens))
        values.append(suite.dev(model, encode.Split(documents=few)))
    merge(model, is_merged=False)
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
