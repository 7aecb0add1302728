"""What a run reads, as a person sees it: a step's batch, and the way of one row."""

import json
import sys
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from ftcore.config import ChatDataConfig, MaskedDataConfig, Run, TextDataConfig
from ftcore.data.collect import collect
from ftcore.data.columns import place, texts_of
from ftcore.data.ledger import Prepared
from ftcore.data.order import StepRows
from ftcore.data.pack import Encoded, pack, split
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import ConfigError, DataError

COLOURED, PLAIN = ("\x1b[32m", "\x1b[0m"), ("[[", "]]")  # around what is supervised in a text

class Shown:
    """A run's data, to look at; its files are read once more, for the places of the rows."""

    def __init__(self, run: Path, config: Run, data: Prepared, tokenizer: Tokenizer) -> None:
        self.run, self.config, self.data, self.tokenizer = run, config, data, tokenizer
        self.marks = COLOURED if sys.stdout.isatty() else PLAIN
        parts, seed = [*collect(config.data, {}).values()], config.env.seed
        self.rows = {e.id: e for part in reversed(parts) for e in part.examples}  # train's stay
        num_rows = len(data.train.documents)
        named = {"batch_size": config.optim.batch_size, "seed": seed}
        self.steps = StepRows(num_rows, **named, order=data.order(config.data.weights, seed))
        self.num_steps = config.loop.num_steps(num_rows, config.optim.batch_size)
        file = run / "data" / "rejected.jsonl"
        self.lost = [json.loads(line) for line in file.open()] if file.is_file() else []

    def step(self, step: int) -> Iterator[str]:
        """The streams of one optimiser step, counted from 1, as its processes read them."""
        if not 1 <= step <= self.num_steps:
            raise ConfigError(f"--step {step}: steps are counted from 1 to {self.num_steps}")
        documents = [self.data.train.documents[row] for row in self.steps(step - 1)]
        if self.data.draw:
            documents = [self.data.draw(document, step - 1) for document in documents]
        shares = min(self.config.env.threads, self.config.optim.batch_size)
        for number, share in enumerate(split(list(map(len, documents)), shares)):
            lengths = [len(documents[i]) for i in share]
            for stream in pack(lengths, self.config.loop.micro_batch_tokens):
                tokens = sum(lengths[i] for i in stream)
                yield f"== step {step}, share {number}: {len(stream)} documents, {tokens} tokens"
                for i in stream:
                    yield from self.document(documents[share[i]])

    def document(self, document: Encoded) -> Iterator[str]:
        """Its border, with its row, positions and weight, and its text."""
        weight = np.sum(document.weights, dtype=np.float64)
        example = self.rows.get(document.row_id.partition(":")[0])
        where = place(example) if example else "(its file has changed)"
        yield f"-- {document.row_id} {where}: positions 0 to {len(document) - 1}, weight {weight:g}"
        yield self.text(document)

    def text(self, document: Encoded) -> str:
        """The document as text, with what is supervised marked."""
        decode = self.tokenizer.decode
        if not isinstance(document.weights, np.ndarray):
            label = document.labels
            if self.data.labels and isinstance(label, int | np.integer):
                label = self.data.labels[label]
            return f"{decode(document.tokens_T, special=True)} -> {label}"
        counts_T, task = document.weights > 0, type(self.config.data)
        if is_shifted := task in (TextDataConfig, ChatDataConfig):  # labels are the next tokens
            counts_T = np.append(False, counts_T[:-1])
        shown, triples = "", zip(counts_T, document.tokens_T, document.labels, strict=True)
        for counts, run in groupby(triples, key=itemgetter(0)):
            _, ids, labels = zip(*run, strict=True)
            text = decode(ids, special=True)
            if counts and task is MaskedDataConfig:
                text += " <- " + decode(labels, special=True)
            elif counts and not is_shifted:
                text += " " + " ".join(self.data.labels[label] for label in labels)
            shown += text.join(self.marks) if counts else text
        return shown

    def row(self, row_id: str) -> Iterator[str]:
        """The way of a row, forward to its documents and steps, and back to its place."""
        ids = {*self.rows, *(found["id"] for found in self.lost)}
        matching = [id_ for id_ in ids if id_.startswith(row_id)]
        if len(matching) != 1:
            where = "data/rejected.jsonl and in what --step prints"
            raise DataError(f"--row {row_id}: {len(matching)} rows begin so; ids stand in {where}")
        (row_id,) = matching
        example = self.rows.get(row_id)
        where = place(example) if example else ""
        yield f"row {row_id}, {where or 'of which no example was made'}"
        yield from (f"    {text}" for text in (texts_of(example) if example else ()))
        for found in self.lost:
            if found["id"] == row_id:
                said = "{split}: {file}:{line} {what} in step {step}: {reason} {detail}"
                yield said.format(**found)
            elif where and f"{found['detail']},".startswith(f"{where},"):
                yield "{split}: {file}:{line} {reason} of it".format(**found)
        for name, part in self.data.splits():
            for number, document in enumerate(part.documents):
                if document.row_id.partition(":")[0] == row_id:
                    yield f"{name}: document {number}"
                    yield from self.document(document)
                    if name == "train":
                        steps = [n + 1 for n in range(self.num_steps) if number in self.steps(n)]
                        yield f"    read in steps {steps} of {self.num_steps}"
