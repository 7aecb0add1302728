"""The chat data set: everyday requests, each answered by one JSON command with intent and slots.

    user       hey, wake me up at 7:30 on friday
    assistant  {"intent": "set_alarm", "time": "7:30", "day": "friday"}

No request is in two of the five splits, even if case, spaces and marks are disregarded:

    train              as data is found: imbalance of 20 to 1, typos, and planted faults
    dev                drawn like train, without the faults: for choosing
    test_values        requests of train; like the next two with new values, every intent as often
    test_combinations  new combinations of a core and clauses that train has
    test_wording       new wording

A row is a dict; tests/bench/chat makes the rows, and writes every form of them as jsonl:

    id, intent   e.g. train-0042, and the answer's intent; `slots`: its values by name
    messages     request and answer, [{"role": "user", "content": ...}, {"role": "assistant", ...}]
    phrasing     the request without its values; `combination`: its core and clauses (parts of it)
    typo         whether a word of the request is misspelt, never one of a slot
    fault        None, or what was planted: {"kind": ...} and its form, its truth or the twin's id
    rejected     of a row without a fault, a wrong answer; `corruption`: what is wrong with it
"""

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SPLITS = ("train", "dev", "test_values", "test_combinations", "test_wording")
FOLDER = Path(__file__).parent / "rows"

@cache
def rows(split: str) -> list[Row]:
    content = gzip.decompress((FOLDER / f"{split}.jsonl.gz").read_bytes())
    return [json.loads(line) for line in content.splitlines()]

def preference_pairs(rows: list[Row]) -> list[Row]:
    """The right answer (chosen) against the wrong one, as messages, for rows without a fault."""
    return [{"id": row["id"], "prompt": row["messages"][:-1], "chosen": row["messages"][-1:],
             "rejected": [{"role": "assistant", "content": row["rejected"]}],
             "corruption": row["corruption"]} for row in rows if row["fault"] is None]
