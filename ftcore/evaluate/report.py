"""Results as people and programs read them: aligned tables, predictions.jsonl, one JSON line.

Tables are plain text, columns two spaces apart, numbers right-aligned, "-" for what is not defined.
In JSON a float that is not finite is null, since NaN and Infinity are not JSON.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from ftcore.errors import DataError
from ftcore.evaluate.metrics import ClassificationMetrics

MAX_TEXT = 40


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Lines of aligned columns under `header`; a column of numbers is right-aligned.

    Text is put on one line and cut at 40 characters; floats show four decimals, or four
    significant digits where those would hide the value.
    """
    rows = list(rows)
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [all(_is_number(row[i]) for row in rows) for i in range(len(header))]
    lines = (
        "  ".join(
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in cells
    )
    return "\n".join(lines)


def metrics_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """One line per metric, one column per result ({"base": {...}, "tuned": {...}})."""
    names = dict.fromkeys(name for metrics in results.values() for name in metrics)
    rows = ([name, *(metrics.get(name) for metrics in results.values())] for name in names)
    return table(["metric", *results], rows)


def per_class_table(per_class: Sequence[Mapping[str, Any]], *, max_rows: int = 20) -> str:
    """The rows of `ClassificationMetrics.per_class`, in label order up to `max_rows` classes.

    Past that the worst come first (lowest F1, more rows first; classes that never occur last) and
    a last line says how many are not shown.
    """
    columns = ("label", "precision", "recall", "f1", "support", "predicted")
    shown = list(per_class)
    if len(shown) > max_rows:
        shown.sort(key=lambda row: (not row["support"] + row["predicted"], row["f1"], -row["support"]))
    text = table(columns, ([row[name] for name in columns] for row in shown[:max_rows]))
    hidden = shown[max_rows:]
    if not hidden:
        return text
    absent = sum(not row["support"] + row["predicted"] for row in hidden)
    best = f"... {len(hidden)} of {len(shown)} classes not shown, all with f1 >= {hidden[0]['f1']:.4f}"
    return f"{text}\n{best}" + (f" or without rows ({absent})" if absent else "")
