"""The chat data set as jsonl, to look at:

    python -m tests.bench.chat.export DIR       chat/, labelled/ and pairs/ with SPLIT.jsonl in each

and noisy/train.jsonl, which builtin:start was trained on: demonstrations of which most are wrong.
"""

import json
import sys
from pathlib import Path
from random import Random
from ftcore.builtin.chat import SPLITS, Row, preference_pairs, rows
from ftcore.files import write_file

def labelled(rows: list[Row]) -> list[Row]:
    """The requests, for classification by intent."""
    return [{"id": row["id"], "text": row["messages"][0]["content"], "label": row["intent"]}
            for row in rows]

def noisy(rows: list[Row], share: float = 0.6) -> list[Row]:
    """Chats without a fault, of which this share, by chance, has the wrong answer."""
    random, found = Random(0), []
    for row in (row for row in rows if row["fault"] is None):
        *asked, last = row["messages"]
        said = row["rejected"] if random.random() < share else last["content"]
        found.append({"id": row["id"], "messages": [*asked, last | {"content": said}]})
    return found

def main(folder: Path) -> None:
    for split in SPLITS:
        found = rows(split)
        chats = [{k: row[k] for k in row if k not in ("rejected", "corruption")} for row in found]
        forms = {"chat": chats, "labelled": labelled(found), "pairs": preference_pairs(found)}
        forms |= {"noisy": noisy(found)} if split == "train" else {}
        for form, records in forms.items():
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            write_file(folder / form / f"{split}.jsonl", "".join(lines))
        print(f"{split}: {len(found)} rows")

if __name__ == "__main__":
    main(Path(sys.argv[1]))
