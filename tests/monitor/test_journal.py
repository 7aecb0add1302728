"""The log of a server read back, joined with feedback; and the reference that training makes."""

import json
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any
import numpy as np
import pytest
from ftcore.errors import DataError, ModelError
from ftcore.monitor.journal import Journal, read_journal, read_reference
from tests.serve.conftest import Asked

IDS = [f"{n:024x}" for n in range(9)]

def asked(n: int, *rows: dict[str, Any], model: str = "m", time: float | None = None) -> dict:
    return {"time": n if time is None else time, "id": IDS[n], "model": model, "rows": [*rows]}

def given(time: float, n: int, index: int = 0, **what: str) -> dict[str, Any]:
    return {"time": time, "id": IDS[8], "feedback": {"request_id": IDS[n], "index": index, **what}}

def read(lines: list[Any], folder: Path, model: str = "m") -> Journal:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "log").write_text("".join(text + "\n" for text in texts))
    return read_journal(folder / "log", model)

def vector(told: str) -> np.ndarray:
    return np.frombuffer(b64decode(told), np.int8)

def test_rows_of_a_request_are_records(tmp_path: Path) -> None:
    journal = read([asked(0, {"label": "a"}, {"label": "b"}), {"time": 1, "id": IDS[1]}], tmp_path)
    assert [*journal.records] == [{"label": "a", "id": f"{IDS[0]}:0", "time": 0},
                                  {"label": "b", "id": f"{IDS[0]}:1", "time": 0}]
    assert not +journal.counts

def test_feedback_is_joined_once(tmp_path: Path) -> None:
    lines = [asked(0, {"label": "a"}, {"label": "b"}), given(1, 0, label="a"),
             given(2, 0, 1, label="a"), given(3, 0, label="b"), given(4, 5, label="b")]
    journal = read(lines, tmp_path)
    assert [(r["wanted"], r["right"]) for r in journal.records] == [("a", True), ("a", False)]
    assert +journal.counts == {"feedback given twice": 1, "feedback for unknown ids": 1}

def test_a_better_answer_is_kept_and_compared_if_the_answer_was(tmp_path: Path) -> None:
    lines = [asked(0, {"answer": "x"}), asked(1, {}), given(2, 0, text="y"), given(3, 1, text="y")]
    one, two = read(lines, tmp_path).records
    assert (one["wanted"], one["right"]) == ("y", False)
    assert two["wanted"] == "y" and "right" not in two

def test_what_is_damaged_or_odd_is_counted_and_the_rest_kept(tmp_path: Path) -> None:
    lines = [asked(3, {"label": "a"}, time=9), "{\"time\": 1, \"id\"", "[]", "{}", "7",
             asked(4, {"label": "b"}, time=2), asked(5, {"label": "c"}, model="n", time=10)]
    journal = read(lines, tmp_path)
    assert [record["label"] for record in journal.records] == ["a", "b"]
    assert +journal.counts == {"damaged lines": 4, "clock went back": 1,
                               "of another model": 1}
    assert [r["label"] for r in read(lines, tmp_path, model="").records] == ["a", "b", "c"]

def test_figures_of_drawn_answers_are_left_out(tmp_path: Path) -> None:
    row = {"prompt_tokens": 3, "logprob": -1.0, "generation_tokens": 4, "reason": "stop"}
    one, two = read([asked(0, row), asked(1, row | {"temperature": 0.7})], tmp_path).records
    assert one["logprob"] == -1.0 and "logprob" not in two and two["prompt_tokens"] == 3

def test_the_newest_records_alone_are_kept_where_that_is_asked_for() -> None:
    journal = Journal("m", most=3)
    for n in range(5):
        journal.take(json.dumps(asked(n, {"label": str(n), "input": "x"})).encode())
    for n in (1, 4):
        journal.take(json.dumps(given(9, n, label=str(n))).encode())
    assert [(r["label"], "right" in r) for r in journal.records] == [
        ("2", False), ("3", False), ("4", True)]
    assert not any("input" in record for record in journal.records)
    assert +journal.counts == {"feedback for unknown ids": 1}

def test_parts_put_aside_come_first(tmp_path: Path) -> None:
    for n, end in ((0, ".100"), (1, ".200"), (2, "")):
        (tmp_path / f"log{end}").write_text(json.dumps(asked(n, {"label": str(n)})) + "\n")
    assert [r["label"] for r in read_journal(tmp_path / "log").records] == ["0", "1", "2"]
    with pytest.raises(DataError, match=r"none: there is no such log; .*--log"):
        read_journal(tmp_path / "none")

SHORT = ("--loop.max-steps", "2", "--env.threads", "1", "--env.precision", "fp32", "--log.name")

def test_the_reference_is_what_the_server_notes(
    bert: Path, files: dict[str, str], run: Callable, tmp_path: Path
) -> None:
    data = ("--data.train", files["train"], "--data.dev", files["test"])
    run("train", "classify", "--model.path", str(bert), *data, *SHORT, "a")
    texts = [line.split("\t")[1] for line in Path(files["test"]).read_text("utf-8").splitlines()]
    rows = Asked("runs/a").noted("/v1/classify", input=texts[1:])["rows"]
    found = read_reference(Path("runs/a"))
    assert len(rows) == len(found) > 3
    for row, record in zip(rows, found, strict=True):
        assert record["right"] in (True, False)
        assert np.allclose(vector(row.pop("embedding")), vector(record["embedding"]), atol=1)
        for name, value in row.items():
            same = value if isinstance(value, str) else pytest.approx(value, abs=1e-4)
            assert record[name] == same

def test_the_reference_of_answers_is_greedy(
    qwen3: Path, files: dict[str, str], run: Callable, tmp_path: Path
) -> None:
    data = ("--data.train", files["chat"], "--data.dev", files["chat"], "--data.duplicates", "off",
            "--data.leaks", "report", "--eval.max-new-tokens", "5")
    run("train", "sft", "--model.path", str(qwen3), *data, *SHORT, "a")
    found = read_reference(Path("runs/a"))
    chats = [json.loads(line) for line in Path(files["chat"]).read_text("utf-8").splitlines()]
    ask = Asked("runs/a")
    for chat, record in zip(chats, found, strict=True):
        asked = {"messages": chat["messages"][:-1], "max_tokens": 5, "temperature": 0}
        (row,) = ask.noted("/v1/chat/completions", **asked)["rows"]
        said = vector(row.pop("embedding"))
        assert np.allclose(said, vector(record.pop("embedding")), atol=1)
        assert {**record, **row, "logprob": 0} == {**record, "logprob": 0}
        assert np.isclose(row["logprob"], record["logprob"], atol=1e-4)

def test_a_run_without_dev_rows_has_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no reference.jsonl.*--data.dev"):
        read_reference(tmp_path)
