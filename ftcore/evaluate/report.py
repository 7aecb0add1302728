"""Results as people and programs read them: aligned tables, predictions.jsonl, one JSON line.

Tables are plain text, columns two spaces apart, numbers right-aligned, "-" for what is not defined.
In JSON a float that is not finite is null, since NaN and Infinity are not JSON.
"""

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ftcore.errors import DataError
from ftcore.evaluate.metrics import CLASS_COLUMNS, ClassificationMetrics
from ftcore.files import write_file

MAX_TEXT = 40

def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Aligned columns under `header`. Text is put on one line and cut at MAX_TEXT characters; None
    is not defined; floats show four decimals, or four significant digits where those hide it."""
    columns = []
    for name, *values in zip(header, *rows, strict=True):
        cells = [name, *map(_cell, values)]
        is_number = all(value is None or isinstance(value, Real) for value in values)
        width = max(map(len, cells))
        columns.append([cell.rjust(width) if is_number else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))

def metrics_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """One line per metric, one column per result ({"base": {...}, "tuned": {...}})."""
    names = dict.fromkeys(name for metrics in results.values() for name in metrics)
    rows = ([name, *(metrics.get(name) for metrics in results.values())] for name in names)
    return table(["metric", *results], rows)

def per_class_table(per_class: Sequence[Mapping[str, Any]], *, max_rows: int = 20) -> str:
    """Rows of CLASS_COLUMNS, in label order up to `max_rows` classes. Past that the worst are first
    (lowest F1, then more rows; classes that never occur last), and a line counts the others."""
    rows, note = list(per_class), ""
    if (left := len(rows) - max_rows) > 0:
        rows.sort(key=lambda r: (r["support"] + r["predicted"] == 0, r["f1"], -r["support"]))
        note = f"\n... {left} of {len(rows)} classes not shown: better, or without rows"
    cells = ([row[name] for name in CLASS_COLUMNS] for row in rows[:max_rows])
    return table(CLASS_COLUMNS, cells) + note

def confusion_table(
    metrics: ClassificationMetrics, texts: Mapping[tuple[str, str], str], *, max_pairs: int = 10
) -> str:
    """The most frequent mistakes: target, prediction, rows, their share of the target's rows, and
    the text of one, from `texts` by target and prediction."""
    wrong_KP, support_K = metrics.counts_KP.copy(), metrics.counts_KP.sum(1)
    np.fill_diagonal(wrong_KP, 0)
    if not wrong_KP.any():
        return "no mistakes"
    names = (*metrics.labels, "(none of the labels)")
    pairs = sorted(np.argwhere(wrong_KP).tolist(), key=lambda pair: -wrong_KP[*pair])
    rows = [
        (names[k], names[p], wrong_KP[k, p], wrong_KP[k, p] / support_K[k],
         texts.get((names[k], names[p]), ""))
        for k, p in pairs
    ]  # fmt: skip
    text = table(("target", "predicted", "rows", "of target", "such as"), rows[:max_pairs])
    if left := rows[max_pairs:]:
        text += f"\n... {len(left)} more pairs not shown, {sum(row[2] for row in left)} rows in all"
    return text

def write_predictions(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one UTF-8 JSON line per row, whole or not at all; returns the number of rows. Raises
    DataError: a row without "row_id"; CheckpointError: the file cannot be written."""
    lines = []
    for row in rows:
        if "row_id" not in row:
            raise DataError(f"prediction {len(lines) + 1} for {path} has no row_id: add it")
        lines.append(json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n")
    # Half a surrogate pair has no UTF-8 form, but its escape is JSON.
    write_file(Path(path), "".join(lines).encode("utf-8", "backslashreplace"))
    return len(lines)

def note_opening(run: Path, files: Sequence[str], metrics: Mapping[str, Any]) -> int:
    """Add to RUN/openings.jsonl that test rows were judged; returns how often by now."""
    file, line = run / "openings.jsonl", {"time": round(time.time()), "files": [*map(str, files)]}
    with file.open("a+", encoding="utf-8") as lines:
        lines.write(json.dumps(line | {"metrics": _plain(metrics)}) + "\n")
        lines.seek(0)
        return sum(1 for _ in lines)

def json_line(result: Mapping[str, Any]) -> str:
    """`result` as one compact line of ASCII JSON, floats to six significant digits."""
    return json.dumps(_plain(result, digits=6), allow_nan=False, separators=(",", ":"))

def _plain(value: Any, *, digits: int = 17) -> Any:
    """`value` for JSON: arrays as lists, floats not finite as null, others to `digits`; 17: all."""
    if isinstance(value, np.generic | np.ndarray | Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item, digits=digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, digits=digits) for item in value]
    if not isinstance(value, float):
        return value
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None

def _cell(value: Any) -> str:
    if value is None or (isinstance(value, Real) and math.isnan(value)):
        return "-"
    if isinstance(value, Real) and not isinstance(value, Integral):
        readable = value == 0 or math.isinf(value) or 1e-4 <= abs(value) < 1e6
        return f"{value:.4f}" if readable else f"{value:.3e}"
    text = " ".join(str(value).split())
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."
