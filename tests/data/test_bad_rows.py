"""Rows as they should not be, from a file to its documents: an error, or counted, or fine."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
import numpy as np
import pytest
from ftcore.config import ChatDataConfig, LabelledDataConfig, TextDataConfig
from ftcore.data.prepare import prepare
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import DataError

WORDS = ["word" * 25] * 100_000  # ten megabytes
USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
GOOD = {"messages": [USER, ANSWER]}

@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., tuple[str]]:
    """Rows -> the path of a file that holds them."""

    def write(*rows: dict[str, Any], name: str = "rows") -> tuple[str]:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return (str(path),)

    return write

def labelled(names: str) -> list[dict[str, str]]:
    return [{"text": f"row {n}", "label": name} for n, name in enumerate(names)]

def classes(split: Any) -> Sequence[int]:
    return [document.labels for document in split.documents]

def test_an_unknown_role_is_an_error_that_says_where(base: Tokenizer, jsonl: Callable) -> None:
    bad = {"messages": [{**USER, "role": "human"}, ANSWER]}
    said = r"rows.jsonl:2: message 1 has role 'human'.*data.roles, as human=user; the row is {"
    with pytest.raises(DataError, match=said):
        prepare(ChatDataConfig(train=jsonl(GOOD, bad)), base, seed=0)

@pytest.mark.parametrize("content", ["", " \n", "\u3000"])
def test_a_chat_whose_answer_is_empty_is_left_out(
    content: str, base: Tokenizer, jsonl: Callable
) -> None:
    empty = {"messages": [USER, {**ANSWER, "content": content}]}
    train = prepare(ChatDataConfig(train=jsonl(empty, GOOD)), base, seed=0).train
    assert len(train.documents) == 1
    reason = "message 2 is to be trained on but empty"
    assert [(row.line, row.reason) for row in train.rejected] == [(1, reason)]

def test_an_empty_answer_that_is_not_trained_on_stays(base: Tokenizer, jsonl: Callable) -> None:
    empty = {**ANSWER, "content": "", "train": False}
    train = prepare(ChatDataConfig(train=jsonl({"messages": [USER, empty, USER, ANSWER]})), base,
                    seed=0).train  # fmt: skip
    assert not train.rejected and len(train.documents) == 1

def test_held_out_rows_may_lack_a_label(base: Tokenizer, jsonl: Callable) -> None:
    """Classes are those of the training rows, by the same index everywhere."""
    config = LabelledDataConfig(
        train=jsonl(*labelled("abcabc")),
        dev=jsonl(*labelled("cc"), name="dev"),
        test=jsonl(*labelled("ca"), name="test"),
        leaks="report",
    )
    data = prepare(config, base, seed=0)
    assert data.labels == ("a", "b", "c")
    assert (classes(data.dev), classes(data.tests["test"])) == ([2, 2], [2, 0])

@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_label_that_only_held_out_rows_have_is_an_error(
    split: str, base: Tokenizer, jsonl: Callable
) -> None:
    held = {split: jsonl(*labelled("az"), name="held")}
    said = "held.jsonl:2: label 'z' is not among the 3 labels of the training data"
    with pytest.raises(DataError, match=said):
        config = LabelledDataConfig(train=jsonl(*labelled("abc")), **held, leaks="report")
        prepare(config, base, seed=0)

def test_a_chat_of_ten_megabytes_is_left_out(base: Tokenizer, jsonl: Callable) -> None:
    huge = {**ANSWER, "content": " ".join(WORDS)}
    train = prepare(ChatDataConfig(train=jsonl({"messages": [USER, huge]}, GOOD)), base,
                    seed=0).train  # fmt: skip
    assert len(train.documents) == 1
    (row,) = train.rejected
    assert "wrote more than 1048576 characters" in row.reason and "split the chat" in row.reason

def test_a_text_of_ten_megabytes_is_cut(base: Tokenizer, jsonl: Callable) -> None:
    rows = [{"text": " ".join(WORDS), "label": "yes"}, *labelled("n")]
    limits = {"max_length": 16, "over_length": "cut_left"}
    data = prepare(LabelledDataConfig(train=jsonl(*rows), **limits), base, seed=0)
    assert len(data.train.documents[0]) == 16 and len(data.train.documents) == 2
    assert data.summary().endswith("; cut 1 (more than 16 tokens: cut_left)")

def test_a_text_of_ten_megabytes_is_split(base: Tokenizer, jsonl: Callable) -> None:
    text = " ".join(WORDS)
    config = TextDataConfig(train=jsonl({"text": text}), max_length=512, over_length="split")
    train = prepare(config, base, seed=0).train
    tokens = np.concatenate([document.tokens_T for document in train.documents])
    assert tokens.tolist() == [*base.encode(text).ids_T.tolist(), base.end_of_text_id]
    assert max(map(len, train.documents)) == 512

def test_more_reasons_than_fit_are_counted(base: Tokenizer, jsonl: Callable) -> None:
    odd = [{"messages": [USER] * n + [{**ANSWER, "thinking": "so"}]} for n in range(7)]
    data = prepare(ChatDataConfig(train=jsonl(*odd, GOOD)), base, seed=0)
    assert len(data.train.rejected) == 7 and "; left out 2 more" in data.summary()
