"""Column maps: every row becomes an example or is rejected with a reason; order of labels."""

import pytest
from ftcore.config import LabelledDataConfig, ScoredDataConfig, TextDataConfig
from ftcore.data.columns import Row, Text, examples, indices, label_map
from ftcore.data.read import Rows, read_rows
from ftcore.errors import DataError

def rows(*fields):
    return [Row(f"id{n}", "f.jsonl", n, dict(f)) for n, f in enumerate(fields, start=1)]

def made(*labels):
    return [Text(str(n), ("text",), label) for n, label in enumerate(labels)]

def test_labelled_text_and_pairs():
    source = rows({"a": "one", "b": "two", "y": 1}, {"a": "three", "b": "four", "y": " x "})
    kept, rejected = examples(source, LabelledDataConfig(text="a", label="y"))
    assert [(e.id, e.texts, e.target) for e in kept] == [
        ("id1", ("one",), "1"),
        ("id2", ("three",), "x"),
    ]
    assert (kept[1].file, kept[1].line, rejected) == ("f.jsonl", 2, [])
    pairs, _ = examples(source, LabelledDataConfig(text="a", pair="b", label="y"))
    assert [e.texts for e in pairs] == [("one", "two"), ("three", "four")]

def test_rows_without_text_or_label_are_rejected_with_reasons():
    source = rows(
        {"a": "one", "b": "two", "y": "x"},
        {"a": " \t", "b": "two", "y": "x"},
        {"a": "one", "b": None, "y": "x"},
        {"a": "one", "b": "two", "y": ""},
        {"a": "one", "b": "two", "y": None},
        {"a": "one", "b": "two"},
    )
    kept, rejected = examples(source, LabelledDataConfig(text="a", pair="b", label="y"))
    assert [e.id for e in kept] == ["id1"]
    assert [(r.id, r.line) for r in rejected] == [(f"id{n}", n) for n in range(2, 7)]
    assert [r.reason for r in rejected] == [
        "column 'a' is empty",
        "column 'b' is empty",
        *["column 'y' holds no label"] * 3,
    ]
    with pytest.raises(DataError, match="f.jsonl: none of the 2 rows .*1 x column 'a' is empty"):
        Rows(*examples(source[1:3], LabelledDataConfig(text="a", pair="b", label="y")), 2).drop([])

def test_scores():
    kept, _ = examples(rows({"a": "one", "y": "3.25"}), ScoredDataConfig(text="a", label="y"))
    assert kept[0].target == 3.25
    for value in ("high", "nan", "inf"):
        with pytest.raises(DataError, match=f"f.jsonl:1: column 'y' must hold a number, .*{value}"):
            examples(rows({"a": "one", "y": value}), ScoredDataConfig(text="a", label="y"))

def test_a_missing_column_shows_those_that_exist():
    source = rows({"sentence": "one", "label": "x"})
    with pytest.raises(DataError) as error:
        examples(source, LabelledDataConfig(text="sentense", label="label"))
    assert str(error.value) == (
        "f.jsonl: no column 'sentense'; its columns are 'sentence', 'label'; nearest: 'sentence'"
    )
    with pytest.raises(DataError, match="f.jsonl: no column 'text'"):
        examples(source, TextDataConfig())

def test_wrong_types_show_the_row():
    with pytest.raises(DataError, match='f.jsonl:1: column .a. must hold text, not int; .*{"a": 7'):
        examples(rows({"a": 7, "y": "x"}), LabelledDataConfig(text="a", label="y"))
    with pytest.raises(DataError, match="must hold one label, not list; .*label_separator"):
        examples(rows({"a": "one", "y": ["x"]}), LabelledDataConfig(text="a", label="y"))

def test_label_order():
    assert label_map(made("10", "9", "-1", "2.5")) == ("-1", "2.5", "9", "10")
    assert label_map(made("b", "a", "10", "9")) == ("10", "9", "a", "b")
    with pytest.raises(DataError, match=r"1 different label\(s\) \['a'\]"):
        label_map(made("a", "a"))

def test_a_label_that_training_did_not_have():
    labels = {"negative": 0, "positive": 1}
    example = Text("i", ("text",), "positve", "dev.tsv", 17)
    with pytest.raises(DataError) as error:
        indices(labels, example)
    assert str(error.value) == (
        "dev.tsv:17: label 'positve' is not among the 2 labels of the training data; nearest: "
        "'positive'; correct the row, or add training rows with it"
    )
    assert [indices(labels, e) for e in made("positive", "negative")] == [[1], [0]]

def test_several_labels_a_row():
    values = [["b", " a ", "b"], [], "", "c;a; ", None, ["7", 7]]
    source = rows(*({"a": "one", "y": value} for value in values))
    config = LabelledDataConfig(text="a", label="y", label_separator=";")
    kept, rejected = examples(source, config)
    assert [e.target for e in kept] == [("b", "a"), (), (), ("c", "a"), ("7",)]
    assert [(r.line, r.reason) for r in rejected] == [(5, "column 'y' holds no label")]
    assert label_map(kept) == ("7", "a", "b", "c")
    labels = {name: index for index, name in enumerate(label_map(kept))}
    assert [indices(labels, e) for e in kept] == [[2, 1], [], [], [3, 1], [0]]
    with pytest.raises(DataError, match="f.jsonl:1: column 'y' must hold a list of labels, or"):
        examples(rows({"a": "one", "y": 3}), config)
    odd = Text("i", ("text",), ("a", "x"), "dev.tsv", 17)
    with pytest.raises(DataError, match="dev.tsv:17: label 'x' is not among the 4 labels"):
        indices(labels, odd)

def test_texts():
    kept, rejected = examples(rows({"text": "one"}, {"text": "\n"}), TextDataConfig())
    assert [(t.id, t.texts, t.target) for t in kept] == [("id1", ("one",), None)]
    assert [r.reason for r in rejected] == ["column 'text' is empty"]

def test_real_columns(data_dir):
    source = read_rows([data_dir / "banking77" / "train.csv"])
    kept, rejected = examples(source, LabelledDataConfig(text="text", label="category"))
    assert (len(kept), len(rejected), len(label_map(kept))) == (10003, 0, 77)
    source = read_rows([data_dir / "mrpc" / "dev.tsv"])
    config = LabelledDataConfig(text="#1 String", pair="#2 String", label="Quality")
    kept, _ = examples(source, config)
    assert label_map(kept) == ("0", "1")
    assert sum(indices({"0": 0, "1": 1}, e)[0] for e in kept) == 279
