"""The chat data set: everyday requests, each answered by one JSON command with intent and slots.

    user       hey, wake me up at 7:30 on friday
    assistant  {"intent": "set_alarm", "time": "7:30", "day": "friday"}

No request is in two of the five splits: train, with imbalance of 20 to 1, typos and planted faults;
dev, like it without the faults; three tests with new values, new combinations, new wording. What a
row, a dict, holds is told in tests/bench/chat, which makes them and writes them as jsonl."""

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
