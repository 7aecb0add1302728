"""Rows that leave in odd ways: each is counted once, and never without a word."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
import pytest
from ftcore.config import ChatDataConfig, LabelledDataConfig
from ftcore.data.prepare import prepare
from ftcore.data.store import funnel
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import DataError

RUN = " ".join(f"shared{n}" for n in range(20))

@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[str, Sequence[dict]], str]:
    def write(name: str, rows: Sequence[dict]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return str(tmp_path / name)

    return write

def labelled(count: int, start: int = 0) -> list[dict]:
    rows = range(start, start + count)
    return [{"text": f"{n}th word{n} of row{n * 7}", "label": "ab"[n % 2]} for n in rows]

def test_a_text_that_is_empty_once_it_is_normalised_leaves(base: Tokenizer, jsonl) -> None:
    train = jsonl("a.jsonl", [*labelled(4), {"text": "\u200b", "label": "a"}])
    data = prepare(LabelledDataConfig(train=(train,)), base, seed=0)
    (lost,) = data.train.rejected
    assert lost.line == 5 and lost.reason == "empty, once it is normalised"

def test_chats_in_which_no_user_speaks_give_nothing_away(base: Tokenizer, jsonl) -> None:
    def said(text: str) -> dict:
        return {"messages": [{"role": "assistant", "content": text}]}

    train = jsonl("a.jsonl", [said(f"answer {n} is {n * n}") for n in range(5)])
    dev = jsonl("dev.jsonl", [said("something else")])
    data = prepare(ChatDataConfig(train=(train,), dev=(dev,)), base, seed=0)
    assert len(data.train.documents) == 5

def test_rows_that_are_left_out_for_balance_are_told(base: Tokenizer, jsonl) -> None:
    rows = [{**row, "label": "a" if n < 3 else "b"} for n, row in enumerate(labelled(20))]
    train = (jsonl("a.jsonl", rows),)
    data = prepare(LabelledDataConfig(train=train, balance="under", balance_cap=1.0), base, seed=0)
    assert Counter(row.reason for row in data.train.rejected) == {"balance": 14}
    assert funnel(data.train)[-1]["out"] == len(data.train.documents) == 6
    assert "left out 14 (balance)" in data.summary()

def test_damaged_records_of_several_files_are_counted_each(base: Tokenizer, tmp_path: Path) -> None:
    good = json.dumps({"text": "a b", "label": "x"}), json.dumps({"text": "c d", "label": "y"})
    files = tuple(f"{tmp_path}/{name}.jsonl" for name in "ab")
    for file, line in zip(files, good, strict=True):
        Path(file).write_text(f"{line}\nno json\n", "utf-8")
    data = prepare(LabelledDataConfig(train=files, on_bad="skip"), base, seed=0)
    read, *_, encode = funnel(data.train)
    assert (read["in"], read["out"], encode["out"]) == (4, 2, 2)
    assert [(why["reason"], why["rows"]) for why in read["lost"]] == [("damaged", 2)]

def test_what_is_held_out_is_not_given_away_by_what_stays(base: Tokenizer, jsonl) -> None:
    rows = [{"text": f"{n} {n * 3} {RUN} {n * 5}", "label": "a"} for n in range(4)]
    train = (jsonl("a.jsonl", [*rows, *labelled(40)]),)
    data = prepare(LabelledDataConfig(train=train, holdout=20), base, seed=1)
    shared = [sum(len(d) > 40 for d in split.documents) for split in (data.train, data.dev)]
    assert 0 in shared, "rows that share 13 words stand on both sides"
    assert "left out 20 (held out as dev rows)" in data.summary()

def test_groups_may_be_lists_and_are_asked_of_train_alone(base: Tokenizer, jsonl) -> None:
    rows = [{**row, "of": [n // 4]} for n, row in enumerate(labelled(24))]
    train, test = (jsonl("a.jsonl", rows),), (jsonl("t.jsonl", labelled(3, 90)),)
    data = prepare(LabelledDataConfig(train=train, test=test, group="of", holdout=8), base, seed=0)
    held = {document.row_id for document in data.dev.documents}
    assert len(held) == 8 and len(data.tests["t"].documents) == 3

def test_a_line_of_many_brackets_is_damaged(base: Tokenizer, jsonl, tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text("[" * 200_000 + "\n", "utf-8")
    with pytest.raises(DataError, match="deep.jsonl:1"):
        prepare(LabelledDataConfig(train=(str(tmp_path / "deep.jsonl"),)), base, seed=0)
