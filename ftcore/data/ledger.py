"""What a run trains and is judged on, and the account of it: what became of every row.

    RUN/data/  funnel.json  rejected.jsonl  report.html (which needs no network)

`rejected.jsonl` names every row that was left out, cut or lost a word, and why; the rest is counts.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from ftcore import files
from ftcore.data.columns import place
from ftcore.data.encode import Masking, Names, Split
from ftcore.data.formats import Rejected
from ftcore.data.pack import Order, digest, lengths, mixed
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import DataError

STEPS = ("read", "map", "filter", "compare", "split", "encode")  # in which rows can leave
PERCENTILES = (5, 50, 95, 99, 100)
BINS = 24  # of a histogram
FUNNEL = "funnel.json"
PAGE = Path(__file__).with_name("report.html")

@dataclass
class Prepared:
    """What a run trains and is judged on."""
    train: Split = field(default_factory=Split)
    dev: Split = field(default_factory=Split)
    tests: dict[str, Split] = field(default_factory=dict)
    labels: Names = None  # classes, by index; of a regression the one name of its scores
    draw: Masking | None = None  # what a step makes of a training row: hides some tokens
    runs: list[tuple[int, int]] = field(default_factory=list)  # `source_runs`, with data.weights
    notes: dict[str, Any] = field(default_factory=dict)  # what was found on the way, as JSON

    def splits(self) -> list[tuple[str, Split]]:
        """Every split that has rows, by name."""
        named = [("train", self.train), ("dev", self.dev), *self.tests.items()]
        return [(name, split) for name, split in named if split.num_rows]

    def order(self, weights: tuple[float, ...], seed: int) -> Order | None:
        """The rows of an epoch where training files have weights; see `mixed`."""
        if not weights:
            return None
        return partial(mixed, np.repeat(*np.array(self.runs).T), weights, seed=seed)

    def summary(self) -> str:
        """What was read and lost, for people: one line for each split, then what else was found."""
        lines = []
        for split, sources in self.notes.get("sources", {}).items():
            for file, found in sources.items():
                lines.append(f"{split}: {file}: {found['rows']} rows, {found['format']}")
                if split == "train":
                    lines += (f"    {row}" for row in found["first rows"])
        for name, split in self.splits():
            tokens = self.notes["statistics"][name]["tokens"]
            documents = len(split.documents)
            line = f"{name}: {split.num_rows} rows, {documents} documents, {tokens} tokens"
            if name == "train" and (held := self.notes.get("held out")):
                line += f"; held out {held}"
            for what, found in losses(split):
                reasons = Counter(row.reason for row in found)
                shown = reasons.most_common(5)
                line += "".join(f"; {what} {n} ({reason})" for reason, n in shown)
                more = reasons.total() - sum(n for _, n in shown)
                line += f"; {what} {more} more" if more else ""
            lines.append(line)
        for name, found in self.notes.get("found", {}).items():
            if found:
                lines.append(f"{name}: " + ", ".join(f"{what} {n}" for what, n in found.items()))
        for what, found in self.notes.get("alike", {}).items():
            if found["rows"] and not found["left out"]:
                lines.append(f"train: {found['rows']} rows with a {what}, kept")
        if several := self.notes.get("conflicts", {}).get("texts"):
            lines.append(f"train: {several} texts have several labels or answers")
        return "\n".join(lines)

    def write(self, folder: Path, *, resumes: bool = False) -> None:
        """Write the account into a run's data/. Raises DataError: it began with other rows."""
        self.notes["train sha256"] = now = digest(self.train.documents)
        kept = read_account(folder) if resumes and (folder / FUNNEL).is_file() else {}
        if kept.get("train sha256", now) != now:
            what = "the training rows are not those that the run began with"
            raise DataError(f"{folder}: {what}; restore the files, or begin another run")
        files.make_folder(folder)
        lines = [
            json.dumps({"split": name, "what": what, **asdict(row)}, ensure_ascii=False) + "\n"
            for name, split in self.splits() for what, found in losses(split) for row in found
        ]  # fmt: skip
        files.write_file(folder / "rejected.jsonl", "".join(lines))
        held = self.notes.get("held out", 0)
        steps = {name: funnel(s, held if name == "train" else 0) for name, s in self.splits()}
        kept = {n: Counter(row.reason for row in (*s.cut, *s.untold)) for n, s in self.splits()}
        account = json.dumps({**self.notes, "funnel": steps, "not_whole": kept}, indent=1)
        files.write_file(folder / FUNNEL, account)
        write_page(folder)

def read_account(folder: Path) -> dict[str, Any]:
    """funnel.json of a run's data/."""
    return json.loads((folder / FUNNEL).read_text("utf-8"))

def write_page(folder: Path) -> Path:
    """The page of a run's data/, made from its funnel.json."""
    account = read_account(folder)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(PAGE.read_text("utf-8")).render(account, where=folder.parent)
    files.write_file(folder / PAGE.name, page)
    return folder / PAGE.name

def losses(split: Split) -> list[tuple[str, list[Rejected]]]:
    """What was lost, by the word for it."""
    return [("left out", split.rejected), ("cut", split.cut), ("without token", split.untold)]

def funnel(split: Split, moved: int) -> list[dict[str, Any]]:
    """For each step the rows that came in and went on, what left and why, with an example each;
    `moved` rows are held out of this split and make another."""
    steps, rows = [], split.num_rows
    for step in STEPS:
        lost = [row for row in split.rejected if row.step == step]
        reasons = Counter(row.reason for row in lost).most_common()
        named = {row.reason: f"{place(row)} {row.detail[:200]}" for row in reversed(lost)}
        why = [{"reason": r, "rows": count, "such as": named[r]} for r, count in reasons]
        number = len({(row.file, row.line) for row in lost})
        if step == "split" and moved:
            number += moved
            why.append({"reason": "held out as dev rows", "rows": moved, "such as": ""})
        steps.append({"step": step, "in": rows, "out": rows - number, "lost": why})
        rows -= number
    return steps

def statistics(split: Split, tokenizer: Tokenizer, labels: Names) -> dict[str, Any]:
    """Lengths, labels, and shares of tokens."""
    documents, lengths_B = split.documents, lengths(split.documents)
    counts, edges = np.histogram(lengths_B, bins=BINS)
    named = zip(PERCENTILES, np.percentile(lengths_B, PERCENTILES).round().tolist(), strict=True)
    found = {
        "documents": len(documents), "tokens": int(lengths_B.sum()),
        "lengths": {f"p{percent}": int(length) for percent, length in named},
        "histogram": {"counts": counts.tolist(), "edges": edges.round(1).tolist()},
    }
    if isinstance(documents[0].weights, np.ndarray):
        scored = np.count_nonzero(np.concatenate([document.weights for document in documents]))
        found["scored share"] = round(int(scored) / found["tokens"], 4)
    elif labels and len(labels) > 1:
        all_labels = np.array([document.labels for document in documents])  # (B,) or (B, K)
        if all_labels.ndim == 1:
            all_labels = all_labels[:, None] == np.arange(len(labels))
        found["labels"] = dict(zip(labels, all_labels.sum(0).astype(int).tolist(), strict=True))
    if "unk_token" in tokenizer.special:
        id_ = tokenizer.id_of(tokenizer.special["unk_token"])
        unknown = np.concatenate([document.tokens_T for document in documents]) == id_
        found["unknown share"] = round(float(unknown.mean()), 6)
    return found
