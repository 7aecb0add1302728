"""Files to splits: every row accounted for, the same rows held out every time."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
import pytest
from ftcore.config import ChatDataConfig, LabelledDataConfig, ScoredDataConfig, TextDataConfig
from ftcore.data.pack import digest
from ftcore.data.prepare import prepare
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import DataError

@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[str, Sequence[dict]], str]:
    """(name, rows) -> the path of a file that holds them."""

    def write(name: str, rows: Sequence[dict]) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return str(path)

    return write

def labelled(count: int) -> list[dict]:
    return [{"text": f"row number {n}", "label": "abc"[n % 3]} for n in range(count)]

def test_text_is_cut_into_documents_and_counted(base: Tokenizer, jsonl: Callable) -> None:
    texts = ["gr\u00fcn " * 30, "", "two words", "   "]
    train = jsonl("train.jsonl", [{"text": text} for text in texts])
    config = TextDataConfig(train=(train,), dev=(), test=(train,), max_length=20)
    data = prepare(config, base, seed=0)
    assert all(len(document) <= 20 for document in data.train.documents)
    assert data.train.num_bytes == sum(len(text.rstrip().encode()) for text in texts)
    assert [row.line for row in data.train.rejected] == [2, 4]
    assert data.dev.documents == [] and list(data.tests) == [train]  # `train` is taken
    documents, tokens = len(data.train.documents), sum(map(len, data.train.documents))
    said = f"train: 4 rows, {documents} documents, {tokens} tokens; left out 2 (column 'text' is"
    assert f"{said} empty); cut 1 (more than 20 tokens: split; nothing" in data.summary()

def test_chats_too_long_are_named(base: Tokenizer, jsonl: Callable, tmp_path: Path) -> None:
    def chat(answer: str) -> dict:
        turns = (("user", "hi"), ("assistant", answer))
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    train = jsonl("chats.jsonl", [chat("yes"), chat("no " * 200), chat("maybe")])
    config = ChatDataConfig(train=(train,), dev=(), test=(), max_length=40, over_length="drop")
    data = prepare(config, base, seed=0)
    assert len(data.train.documents) == 2 and not data.train.chats  # nobody judges training rows
    judged = prepare(replace(config, train=(), test=(train,)), base, seed=0).tests["chats"]
    assert [c.messages[-1]["content"] for c in judged.chats] == ["yes", "maybe"]
    data.write(tmp_path / "data")
    (record,) = map(json.loads, (tmp_path / "data" / "rejected.jsonl").read_text().splitlines())
    assert (record["split"], record["what"], record["line"]) == ("train", "left out", 2)
    assert record["reason"] == "more than 40 tokens: drop"
    with pytest.raises(DataError, match="chats.jsonl:2: .* tokens, 40 are allowed"):
        prepare(ChatDataConfig(train=(train,), dev=(), test=(), max_length=40), base, seed=0)

def test_held_out_rows_leave_training_and_are_the_same_each_time(
    base: Tokenizer, jsonl: Callable
) -> None:
    train = jsonl("rows.jsonl", labelled(30))
    config = LabelledDataConfig(train=(train,), holdout=7)
    data, again, other = (prepare(config, base, seed=seed) for seed in (3, 3, 4))
    ids = [[row.row_id for row in split.documents] for split in (data.train, data.dev)]
    assert len(ids[0]) == 23 and len(ids[1]) == 7 and len({*ids[0], *ids[1]}) == 30
    assert ids[1] == [row.row_id for row in again.dev.documents]
    assert ids[1] != [row.row_id for row in other.dev.documents]
    assert data.labels == ("a", "b", "c")
    assert {row.labels for row in data.train.documents} == {0, 1, 2}

def test_no_row_is_held_out_where_a_dev_file_is_given(base: Tokenizer, jsonl: Callable) -> None:
    train, dev = jsonl("rows.jsonl", labelled(12)), jsonl("dev.jsonl", labelled(4))
    config = LabelledDataConfig(train=(train,), dev=(dev,), holdout=5, leaks="report")
    data = prepare(config, base, seed=0)
    assert (len(data.train.documents), len(data.dev.documents)) == (12, 4)

def test_files_of_one_name_stay_apart(base: Tokenizer, jsonl: Callable, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = tuple(jsonl(name, labelled(3)) for name in ("a.jsonl", "other/a.jsonl", "b.jsonl"))
    train = jsonl("rows.jsonl", labelled(12))
    data = prepare(LabelledDataConfig(train=(train,), test=paths), base, seed=0)
    assert list(data.tests) == [paths[0], paths[1], "b"]

@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": True, "holdout": 12}, "data.holdout = 12: train has 12 rows; hold out fewer"),
        ({"train": True, "label": "labl"}, "labl"),
        ({"train": True, "test": True}, "label 'z' is not among the 3 labels"),
    ],
)
def test_what_cannot_be_used_is_said(
    options: dict, message: str, base: Tokenizer, jsonl: Callable
) -> None:
    files = {
        "train": jsonl("rows.jsonl", labelled(12)),
        "test": jsonl("odd.jsonl", [{"text": "x", "label": "z"}]),
    }
    options = {k: (files[k],) if v is True else v for k, v in options.items()}
    with pytest.raises(DataError, match=message.replace("(", r"\(")):
        prepare(LabelledDataConfig(**options), base, seed=0)

def test_a_model_that_is_only_evaluated_brings_its_labels(base: Tokenizer, jsonl: Callable) -> None:
    config = LabelledDataConfig(test=(jsonl("test.jsonl", labelled(6)),))
    data = prepare(config, base, seed=0, labels=("c", "b", "a"))
    assert [row.labels for row in data.tests["test"].documents] == [2, 1, 0] * 2

def test_scores_have_one_label_that_names_them(base: Tokenizer, jsonl: Callable) -> None:
    train = jsonl("scored.jsonl", [{"text": f"row {n}", "points": n / 4} for n in range(6)])
    data = prepare(ScoredDataConfig(train=(train,), label="points"), base, seed=0)
    assert data.labels == ("points",)
    assert [row.labels for row in data.train.documents] == [n / 4 for n in range(6)]

def test_several_labels_become_a_vector(base: Tokenizer, jsonl: Callable) -> None:
    labels = [["a"], [], ["c", "a"]]
    train = jsonl("several.jsonl", [{"text": "one", "label": names} for names in labels])
    data = prepare(LabelledDataConfig(train=(train,), label_separator=","), base, seed=0)
    assert data.labels == ("a", "c")
    assert [row.labels.tolist() for row in data.train.documents] == [[1, 0], [0, 0], [1, 1]]

def test_built_in_data_stands_beside_files(base: Tokenizer, jsonl: Callable) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so early?"}]
    own = jsonl("rows.jsonl", [{"messages": turns}])
    alone, both = (
        prepare(ChatDataConfig(train=train), base, seed=0).train
        for train in (("builtin:chat",), ("builtin:chat", own))
    )
    assert both.num_rows == alone.num_rows + 1
    assert digest(both.documents[1:]) == digest(alone.documents)
