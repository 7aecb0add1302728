"""The chat data set: everyday requests, each answered by one JSON command with intent and slots.

    user       hey, wake me up at 7:30 on friday
    assistant  {"intent": "set_alarm", "time": "7:30", "day": "friday"}

Slot values are copied as they stand in the request. `build` makes five splits; no request occurs in
two of them, even if case, spaces and marks are disregarded:

    train              as data is found: imbalance of 20 to 1, typos, and the faults of faults.py
    dev                drawn like train, without the faults: for choosing
    test_values        requests of train with new slot values
    test_combinations  new combinations of a core and clauses that train has, and new slot values
    test_wording       new wording (words/test_wording.toml) and new slot values

The test splits hold every intent equally often. A row is a dict:

    id           unique, e.g. train-0042
    messages     request and answer, [{"role": "user", "content": ...}, {"role": "assistant", ...}]
    intent       the answer's intent
    slots        the answer's values by name, in the intent's order
    phrasing     the request without its values; `combination`: its core and clauses (parts of it)
    typo         whether a word of the request is misspelt
    fault        None, or what was planted: {"kind": ...} and its form, its truth or the twin's id

`labelled` gives the same rows for classification, `preference_pairs` for preference learning.
`python -m ftcore.builtin.chat DIR` writes every form as jsonl.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from random import Random

from ftcore.errors import CheckpointError
from ftcore.files import write_file

from .faults import Row, corrupt, plant, row_id, typo
from .phrases import Intent, Phrase, command, compose, draw, filled, intents, kinds_of, wording

TRAIN_ROWS, DEV_ROWS = 9500, 300  # of train before duplicates and empty rows are added
TEST_ROWS_PER_INTENT = 16
TYPO_RATE = 0.12
CASES = {"as is": 0.4, "lower": 0.25, "capital": 0.35}  # of a request, its values included

def build(seed: int = 0) -> dict[str, list[Row]]:
    """The five splits by name, the same for the same seed."""
    author = Author(seed)
    rng = author.rng
    known = partial(compose, rng=rng, new=False)

    def repeated(intent: Intent) -> Phrase:
        return rng.choice(said[intent.name])

    def recombined(intent: Intent) -> Phrase:
        while True:
            phrase = compose(intent, rng, new=True)
            if parts[intent.name].issuperset(phrase.combination):
                return phrase

    def reworded(intent: Intent) -> Phrase:
        return Phrase((), rng.choice(wording("test_wording")[intent.name]))

    train = plant(author.rows("train", shares(TRAIN_ROWS), known), rng)
    parts: dict[str, set[str]] = {intent.name: set() for intent in intents()}
    said: dict[str, list[Phrase]] = {intent.name: [] for intent in intents()}
    for row in train:
        if row["fault"] is None and row["slots"]:
            parts[row["intent"]].update(row["combination"])
            said[row["intent"]].append(Phrase(tuple(row["combination"]), row["phrasing"]))
    evenly = [TEST_ROWS_PER_INTENT] * len(intents())
    return {
        "train": train,
        "dev": author.rows("dev", shares(DEV_ROWS), known),
        "test_values": author.rows("test_values", evenly, repeated, new=True),
        "test_combinations": author.rows("test_combinations", evenly, recombined, new=True),
        "test_wording": author.rows("test_wording", evenly, reworded, new=True, typos=False),
    }

def shares(size: int) -> list[int]:
    """Rows of each intent in a split of about that size with the imbalance of train."""
    total = sum(intent.share for intent in intents())
    return [round(size * intent.share / total) for intent in intents()]

class Author:
    """Writes rows from phrases and never says the same thing twice."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.said: set[str] = set()

    def rows(
        self, split: str, counts: Iterable[int], phrase: Callable[[Intent], Phrase], *,
        new: bool = False, typos: bool = True,
    ) -> list[Row]:  # fmt: skip
        """A split of `counts` rows of each intent, shuffled; `new` values or those of training."""
        rows = []
        for intent, left in zip(intents(), counts, strict=True):
            while left:
                row = self.row(intent, phrase(intent), new=new, typos=typos)
                gist = re.sub(r"\W", "", row["messages"][0]["content"]).casefold()
                if gist not in self.said:
                    self.said.add(gist)
                    rows.append(row)
                    left -= 1
        self.rng.shuffle(rows)
        return [{"id": row_id(split, number), **row} for number, row in enumerate(rows)]

    def row(self, intent: Intent, phrase: Phrase, *, new: bool, typos: bool) -> Row:
        """One request with its answer, all but the id."""
        template = phrase.template
        values = {key: draw(kind, self.rng, new=new) for key, kind in kinds_of(template).items()}
        (case,) = self.rng.choices(list(CASES), list(CASES.values()))
        if case == "lower":
            template = template.lower()
            values = {key: value.lower() for key, value in values.items()}
        elif case == "capital" and not template.startswith("{"):
            template = template[0].upper() + template[1:]
        slots = {key: values[key] for key in intent.slots if key in values}
        clean = filled(template, values)
        text = typo(clean, slots, self.rng) if typos and self.rng.random() < TYPO_RATE else clean
        return {
            "messages": [
                {"role": "user", "content": text},
                {"role": "assistant", "content": command(intent.name, slots)},
            ],
            "intent": intent.name, "slots": slots, "phrasing": phrase.template,
            "combination": list(phrase.combination), "typo": text != clean, "fault": None,
        }  # fmt: skip

def labelled(rows: Iterable[Row]) -> list[Row]:
    """The requests for classification by intent: {"id", "text", "label"}."""
    return [
        {"id": r["id"], "text": r["messages"][0]["content"], "label": r["intent"]} for r in rows
    ]

def preference_pairs(rows: Iterable[Row], seed: int = 0) -> list[Row]:
    """The right command against a corrupted one, for every row without a fault: {"id", "prompt",
    "chosen", "rejected", "corruption"}, the middle three messages, the last from `corrupt`."""
    rng = Random(seed)
    pairs = []
    for row in (row for row in rows if row["fault"] is None):
        wrong, corruption = corrupt(row, rng)
        pairs.append({
            "id": row["id"], "prompt": row["messages"][:-1], "chosen": row["messages"][-1:],
            "rejected": [{"role": "assistant", "content": wrong}], "corruption": corruption,
        })  # fmt: skip
    return pairs

def main() -> None:
    """Write chat/, labelled/ and pairs/ with SPLIT.jsonl in each."""
    parser = argparse.ArgumentParser("python -m ftcore.builtin.chat", description=main.__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="made if it does not exist")
    folder = parser.parse_args().folder
    for split, rows in build().items():
        forms = {"chat": rows, "labelled": labelled(rows), "pairs": preference_pairs(rows)}
        for form, records in forms.items():
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            try:
                write_file(folder / form / f"{split}.jsonl", "".join(lines))
            except CheckpointError as error:
                parser.error(str(error))
        faults = Counter(row["fault"]["kind"] for row in rows if row["fault"])
        noted = ", ".join(f"{count} {kind}" for kind, count in sorted(faults.items()))
        print(f"{split}: {len(rows)} rows" + (f" ({noted})" if noted else ""))

if __name__ == "__main__":
    main()
