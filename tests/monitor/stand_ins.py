"""Stand-ins of ftcore.monitor.journal and .drift where those are not there yet: to be deleted."""

import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

def read_journal(files: Sequence[Path], model: str = "") -> SimpleNamespace:
    counts = dict.fromkeys(("damaged", "other", "back", "unknown", "twice"), 0)
    records, rated, last = {}, {}, 0.0
    for text in (text for file in files for text in file.read_bytes().splitlines()):
        try:
            line = json.loads(text)
        except ValueError:
            counts["damaged"] += 1
            continue
        counts["back"] += line["time"] < last
        last = line["time"]
        if told := line.get("feedback"):
            id_ = f"{told['request_id']}:{told['index']}"
            counts["twice"] += id_ in rated
            rated.setdefault(id_, told.get("label") or told.get("text"))
        elif model and line["model"] != model:
            counts["other"] += 1
        else:
            for index, row in enumerate(line.get("rows", ())):
                id_ = f"{line['id']}:{index}"
                records[id_] = {**row, "id": id_, "time": line["time"]}
    for id_, wanted in rated.items():
        if id_ not in records:
            counts["unknown"] += 1
        else:
            records[id_] |= {"wanted": wanted, "right": records[id_].get("label") == wanted}
    return SimpleNamespace(records=[*records.values()], counts=counts)

def read_reference(folder: Path) -> list[dict[str, Any]]:
    return [*map(json.loads, (folder / "reference.jsonl").read_text().splitlines())]

def use(name: str, **parts: Any) -> None:
    if find_spec(f"ftcore.monitor.{name}") is None:
        module = ModuleType(f"ftcore.monitor.{name}")
        vars(module).update(parts)
        sys.modules[module.__name__] = module

use("journal", read_journal=read_journal, read_reference=read_reference)
use("drift", Watch=None)
