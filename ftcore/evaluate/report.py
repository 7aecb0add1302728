"""Results as people and programs read them: aligned tables, predictions.jsonl, one JSON line; a
run's page, from the files in its folder."""

import json
import math
import re
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from ftcore.cli import CONFIG_FILE
from ftcore.data import store
from ftcore.env.run import read_metrics
from ftcore.errors import ConfigError
from ftcore.evaluate.metrics import CLASS_COLUMNS, reliability
from ftcore.files import write_file

MAX_TEXT = 40
MOST_CLASSES = 30  # of a matrix of confusions that is drawn
Run = Mapping[str, Any]  # a folder's files by name, parsed; those that it lacks are empty

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
    names = dict.fromkeys(name for metrics in results.values() for name in metrics)
    rows = ([name, *(metrics.get(name) for metrics in results.values())] for name in names)
    return table(["metric", *results], rows)

def per_class_table(per_class: Sequence[Mapping[str, Any]], *, max_rows: int = 20) -> str:
    """The classes that occur, of lowest F1 first, up to so many."""
    such = (row for row in per_class if row["support"] + row["predicted"])
    rows = sorted(such, key=lambda row: row["f1"])[:max_rows]
    return table(CLASS_COLUMNS, (row.values() for row in rows))

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

def read_run(folder: Path) -> Run:
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
    run["config"] = dict(flat(tomllib.loads(text)))
    run["asked"] = re.findall(r"^(\w+ = .*?)  # (?!default$)(.*)$", text, re.M)
    run["skipped"] = sorted(file.name for file in folder.glob("skipped-step-*.json"))
    return run

def write_page(folder: Path) -> Path:
    run = read_run(folder)
    shown = {**run["data"], **run, "where": folder, **judged(run)}
    write_file(folder / "report.html", store.rendered("run.html", Path(__file__).parent, **shown))
    return folder / "report.html"

def judged(run: Run) -> dict[str, Any]:
    """Reliability and confusions of rows that have a class each, if there are any."""
    rows = [row for row in run["predictions"] if "label" in row and "probabilities" in row]
    if not rows:
        return {}
    confidence_B = np.array([max(row["probabilities"]) for row in rows])
    right_B = np.array([row["label"] == row["predicted"] for row in rows])
    shown = {"reliability": reliability(confidence_B, right_B)}
    if len(labels := run["labels"]) <= MOST_CLASSES:
        counts = Counter((row["label"], row["predicted"]) for row in rows)
        shown["confusion"] = [[counts[one, two] for two in labels] for one in labels]
    return shown

def flat(tables: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
