"""Tables line up, and files are whole or absent."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
import numpy as np
import pytest
import torch
from ftcore.errors import CheckpointError
from ftcore.evaluate.metrics import class_scores, class_totals
from ftcore.evaluate.report import (
    confusion_table,
    json_line,
    judged,
    metrics_table,
    per_class_table,
    table,
    write_predictions,
)

def test_table_lines_up() -> None:
    text = table(["name", "rows", "score"], [["a", 5, 0.5], ["longer name", 1234, None]])
    assert text.split("\n") == [
        "name         rows   score",
        "a               5  0.5000",
        "longer name  1234       -",
    ]

def test_cells_stay_on_their_line_and_readable() -> None:
    values = [0.0, 1e-7, 123456.789, 3e9, math.inf, math.nan, np.float32(0.25), np.int64(7)]
    column = [line.split()[-1] for line in table(["x"], [[v] for v in values]).split("\n")]
    assert column == [
        "x", "0.0000", "1.000e-07", "123456.7890", "3.000e+09", "inf", "-", "0.2500", "7"
    ]  # fmt: skip
    assert table(["text"], [["two\nlines\tand a tab"]]).split("\n")[1] == "two lines and a tab"
    assert table(["text"], [["x" * 99]]).split("\n")[1] == "x" * 37 + "..."

def test_metrics_table_has_a_column_per_result() -> None:
    text = metrics_table({"base": {"f1": 0.25, "nll": 3.0}, "tuned": {"f1": 1.0, "rows": 10}})
    assert [line.split() for line in text.split("\n")] == [
        ["metric", "base", "tuned"],
        ["f1", "0.2500", "1.0000"],
        ["nll", "3.0000", "-"],
        ["rows", "-", "10"],
    ]

def ladder(num_labels: int) -> np.ndarray:
    """totals_3K: class k has k + 1 rows, all right but one, which is taken for class 0; the last
    class has none."""
    pairs = [(k, p) for k in range(num_labels) for p in [0] + [k] * k]
    return class_totals(*np.array(pairs).T, num_labels + 1)

def test_per_class_worst_first() -> None:
    totals_3K, names = ladder(30), [f"c{k:02}" for k in range(31)]
    lines = [line.split() for line in per_class_table(names, totals_3K).split("\n")]
    assert lines[0] == ["label", "precision", "recall", "f1", "support", "predicted"]
    precision_K, recall_K, f1_K = class_scores(totals_3K)
    for k, line in zip(sorted(range(30), key=f1_K.__getitem__)[:20], lines[1:], strict=True):
        scores = [f"{x_K[k]:.4f}" for x_K in (precision_K, recall_K, f1_K)]
        assert line == [names[k], *scores, str(totals_3K[2, k]), str(totals_3K[1, k])]

def test_confusion_table_counts_pairs() -> None:
    pairs = ["cat dog", "cat dog", "cat cat", "cat eel", "dog cat", "eel dog", "eel dog"]
    rows = [{"row_id": str(i), **dict(zip(("label", "predicted"), pair.split(), strict=True))}
            for i, pair in enumerate(pairs)]  # fmt: skip
    said = {row["row_id"]: "it barks" if row["row_id"] in "01" else "" for row in rows}
    lines = confusion_table(rows, said).split("\n")
    assert [line.split() for line in lines[1:3]] == [
        ["cat", "dog", "2", "0.5000", "it", "barks"],
        ["eel", "dog", "2", "1.0000"],
    ]
    assert len(lines) == 5
    several = [{"row_id": str(i), "label": str(i), "predicted": "x"} for i in range(30)]
    assert len(confusion_table(several, {str(i): "" for i in range(30)}).split("\n")) == 11

def test_confusion_table_without_mistakes() -> None:
    rows = [{"row_id": name, "label": name, "predicted": name} for name in "ab"]
    assert confusion_table(rows, dict(zip("ab", "ab", strict=True))) == "no mistakes"

def test_predictions_come_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    texts = ["caf\u00e9", "two\nlines", "\u2028", "\U0001f600", "\ud83d", "\x00"]
    rows = [{"row_id": str(i), "text": text, "right": i > 2} for i, text in enumerate(texts)]
    write_predictions(path, rows)
    text = path.read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.rstrip("\n").split("\n")] == rows
    assert "caf\u00e9" in text

def test_predictions_hold_plain_values(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    write_predictions(path, [{"row_id": "a", "loss": np.float32("nan"), "p_K": torch.ones(2)}])
    assert path.read_text(encoding="utf-8") == '{"row_id": "a", "loss": null, "p_K": [1.0, 1.0]}\n'

def test_a_failure_midway_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, [{"row_id": "old"}])
    before = path.read_bytes()

    def stopped() -> Iterator[dict[str, str]]:
        yield {"row_id": "new"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_predictions(path, stopped())
    with pytest.raises(AttributeError):
        write_predictions(path, [{"row_id": object()}])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]

def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, [{"row_id": "old"}])

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="cannot write .*No space left.*is untouched"):
        write_predictions(path, [{"row_id": "new"}])
    assert path.read_text(encoding="utf-8") == '{"row_id": "old"}\n'
    assert [file.name for file in tmp_path.iterdir()] == [path.name]

def test_a_path_that_cannot_be_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot write .*p.jsonl"):
        write_predictions(tmp_path / "file" / "p.jsonl", [{"row_id": "a"}])

def test_json_line_is_one_strict_line() -> None:
    result = {
        "nll": math.nan,
        "perplexity": np.float64("inf"),
        "confusion": np.eye(2, dtype=np.int64),
        "note": "caf\u00e9\n\u2028",
        "nested": {"low": -math.inf, "interval": (0.1, 0.2)},
    }
    line = json_line(result)
    assert line.isascii() and "\n" not in line

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(line, parse_constant=refuse) == {
        "nll": None,
        "perplexity": None,
        "confusion": [[1, 0], [0, 1]],
        "note": "caf\u00e9\n\u2028",
        "nested": {"low": None, "interval": [0.1, 0.2]},
    }

def test_the_page_counts_each_pair_of_classes() -> None:
    rows = [{"row_id": pair, "label": pair[0], "predicted": pair[1], "probabilities": [0.4, 0.6]}
            for pair in ("ab", "ab", "bb", "ba")]  # fmt: skip
    shown = judged({"predictions": rows, "labels": ["a", "b"]})
    assert shown["confusion"] == {("a", "b"): 2, ("b", "b"): 1, ("b", "a"): 1}
    assert len(shown["reliability"]) == 4
