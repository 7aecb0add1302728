"""Tagged sentences: the first token of each word is supervised, and no word is lost silently."""

from pathlib import Path
from typing import get_args, get_type_hints
import numpy as np
import pytest
from ftcore.config import TaggedDataConfig
from ftcore.data.__main__ import text as shown
from ftcore.data.columns import Row, Text, examples, label_map, to_bio
from ftcore.data.encode import Split, encode
from ftcore.data.pack import IGNORED
from ftcore.data.prepare import prepare
from ftcore.data.read import read_rows
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import DataError

LABELS = ("B-x", "I-x", "O")
LOST = "a word gives no token"
WORDS = ("Unaffable", "caf\u00e9s", ",", "\u200d", "don't", "a\u0301", "\U0001f642", "[SEP]", "O")

def rows(*fields: dict) -> list[Row]:
    return [Row(f"id{n}", "f.jsonl", n, dict(f)) for n, f in enumerate(fields, start=1)]

def sentence(words: tuple[str, ...], tag: str = "O") -> Text:
    return Text("s", words, (tag,) * len(words), "f.conll", 3)

def encoded(tokenizer: Tokenizer, *sentences: Text, **options: object) -> Split:
    return encode(TaggedDataConfig(**options), sentences, tokenizer, LABELS)

@pytest.mark.parametrize(
    ("given", "bio"),
    [
        ("O I-x I-x O", "O B-x I-x O"),
        ("I-x I-y B-y I-y", "B-x B-y B-y I-y"),
        ("B-x I-x B-x I-y", "B-x I-x B-x B-y"),
        ("B-x I-x O B-y I-y", "B-x I-x O B-y I-y"),
        ("NN I-x VB I-x", "NN B-x VB B-x"),
        ("B-x I-x E-x S-y NN", "B-x I-x I-x B-y NN"),
        ("U-y O B-x L-x B E S-", "B-y O B-x I-x B E B-"),
    ],
)
def test_iob1_becomes_bio(given: str, bio: str) -> None:
    assert to_bio(given.split()) == tuple(bio.split())
    assert to_bio(to_bio(given.split())) == to_bio(given.split())

def test_columns_of_words_and_tags() -> None:
    good = {"w": ["a", "b"], "t": ["I-x", "O"]}
    config = TaggedDataConfig(tokens="w", tags="t")
    kept, rejected = examples(rows(good, {"w": [], "t": []}), config)
    assert [(s.texts, s.target) for s in kept] == [(("a", "b"), ("B-x", "O"))]
    assert [(r.line, r.reason) for r in rejected] == [(2, "column 'w' holds no words")]
    lists, each = "columns 'w' and 't' must hold lists of texts", "must be one each, O for a word"
    for bad, message in (
        ({"w": "a b", "t": ["O", "O"]}, lists),
        ({"w": ["a"], "t": [1]}, lists),
        ({"w": ["a"]}, lists),
        ({"w": ["a", "b"], "t": ["O"]}, f"2 words have 1 tags: {each}"),
        ({"w": ["a"], "t": ["O", "O"]}, f"1 words have 2 tags: {each}"),
        ({"w": ["a"], "t": [""]}, f"1 words have 0 tags: {each}"),
    ):
        with pytest.raises(DataError, match=f"f.jsonl:2: {message}"):
            examples(rows(good, bad), config)
    with pytest.raises(DataError, match="no column 'tokens'; its columns are 'w', 't'"):
        examples(rows(good), TaggedDataConfig())

def test_both_tags_of_a_type_are_labels() -> None:
    kept = [sentence(("a", "b"), "B-x"), sentence(("c",), "I-y"), sentence(("d",))]
    assert label_map(kept, are_tags=True) == ("B-x", "B-y", "I-x", "I-y", "O")
    assert label_map([sentence(("a",), "NN"), *kept[2:]], are_tags=True) == ("NN", "O")
    with pytest.raises(DataError, match=r"1 different label\(s\) \['O'\]"):
        label_map(kept[2:], are_tags=True)

@pytest.mark.parametrize("kind", ["bert", "base"])
def test_first_tokens_are_those_of_words_read_alone(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """A BERT drops the joiner; a byte-level tokenizer has tokens for everything."""
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    split = encoded(tokenizer, sentence(WORDS))
    (document,) = split.documents
    lost = [row.detail for row in split.cut]
    assert lost == (["'\\u200d'"] if kind == "bert" else [])
    assert {(row.line, row.reason) for row in split.cut} <= {(3, LOST)}
    places = document.weights.nonzero()[0].tolist()
    told = [word for word in WORDS if repr(word) not in lost]
    for word, place in zip(told, places, strict=True):
        lead = "" if kind == "bert" or word == WORDS[0] else " "
        read = tokenizer.encode(lead + word, special=False)
        alone = read.ids_T[read.offsets_T2[:, 1] > len(lead)]  # a blank may be a token of its own
        assert document.tokens_T[place : place + len(alone)].tolist() == alone.tolist()

@pytest.mark.parametrize("kind", ["bert", "base"])
def test_only_the_first_token_of_a_word_has_its_tag(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tags = tuple(LABELS[n * n % 3] for n in range(len(WORDS)))
    split = encoded(request.getfixturevalue(kind), Text("s", WORDS, tags, "f.conll", 3))
    (document,) = split.documents
    is_scored_T = document.weights > 0
    pairs = zip(WORDS, tags, strict=True)
    told = [tag for word, tag in pairs if kind == "base" or word != "\u200d"]
    assert [LABELS[index] for index in document.labels[is_scored_T]] == told
    assert set(document.labels[~is_scored_T]) == {IGNORED} and set(document.weights) == {0, 1}
    assert document.labels.dtype == np.int32 and document.weights.dtype == np.float32
    assert len(document.labels) == len(document.weights) == len(document) > len(told)
    if kind == "bert":
        assert not is_scored_T[[0, -1]].any()

def test_words_that_are_written_as_one_another_stay_apart(base: Tokenizer) -> None:
    """A blank inside a word, or a word that a tag looks like, moves no other word's tag."""
    words = ("New York", "B-x", "x", "<|im_end|>", "y")
    split = encoded(base, Text("s", words, ("B-x", "O", "I-x", "O", "B-x"), "f.conll", 3))
    (document,), places = split.documents, split.documents[0].weights.nonzero()[0]
    assert document.labels[places].tolist() == [0, 2, 1, 2, 0] and not split.cut
    found = [base.decode(document.tokens_T[[place]]).strip() for place in places]
    assert all(word.startswith(start) for word, start in zip(words, found, strict=True))

def test_a_sentence_without_tokens_is_left_out(bert: Tokenizer) -> None:
    split = encoded(bert, sentence(("\u200d", "\u200b")), sentence(("a",)))
    assert [(row.line, row.reason) for row in split.rejected] == [(3, "nothing to supervise in it")]
    assert len(split.documents) == 1 and not split.cut
    with pytest.raises(DataError, match="none of the 1 rows can be used"):
        encoded(bert, sentence(("\u200d",)))

def test_long_sentences_are_an_error_or_dropped(bert: Tokenizer) -> None:
    long, short = sentence(("one", "unaffable", "two", "three")), sentence(("one",))
    (whole,) = encoded(bert, long).documents
    size = len(whole)
    assert len(encoded(bert, long, max_length=size).documents) == 1
    with pytest.raises(DataError, match=f"f.conll:3: {size} tokens, {size - 1} are allowed"):
        encoded(bert, long, max_length=size - 1)
    split = encoded(bert, short, long, short, max_length=size - 1, over_length="drop")
    assert [len(document) for document in split.documents] == [3, 3]
    assert [row.reason for row in split.rejected] == [f"more than {size - 1} tokens: drop"]
    assert get_args(get_type_hints(TaggedDataConfig)["over_length"]) == ("error", "drop")

def test_a_tag_that_training_has_not_is_an_error(bert: Tokenizer) -> None:
    with pytest.raises(DataError, match="f.conll:3: label 'B-y' is not among the 3 labels of the"):
        encoded(bert, sentence(("a",), "B-y"))

def test_prepared_sentences(bert: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("a B-x\n\u0300 O\n\nb O\n\nc I-x\n", "utf-8")
    (tmp_path / "b.tags").write_text("a O\n\u0300 B-x\nc B-x\n", "utf-8")
    paths = (str(tmp_path / "a.conll"),), (str(tmp_path / "b.tags"),)
    config = TaggedDataConfig(train=paths[0], test=paths[1], holdout=1, format="conll")
    data = prepare(config, bert, seed=0)
    assert data.labels == LABELS
    assert len(data.train.documents) == 2 and len(data.dev.documents) == 1
    (judged,) = data.tests["b"].documents
    assert [data.labels[tag] for tag in judged.labels[judged.weights > 0]] == ["O", "B-x"]
    assert [row.detail for row in data.tests["b"].cut] == ["'\u0300'"]
    assert f"cut 1 ({LOST})" in data.summary()
    data.write(tmp_path / "data")
    assert f'"{LOST}"' in (tmp_path / "data" / "rejected.jsonl").read_text("utf-8")
    again = prepare(TaggedDataConfig(test=paths[1], format="conll"), bert, seed=0, labels=LABELS)
    assert (again.tests["b"].documents[0].labels == judged.labels).all()

@pytest.mark.parametrize("kind", ["bert", "base"])
def test_a_word_that_is_nothing_once_it_is_normalised_stays_as_it_was(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    (tmp_path / "a.conll").write_text("a O\n\u200d O\nb B-x\n\n\u200d O\n\u200b B-x\n", "utf-8")
    tokenizer = request.getfixturevalue(kind)
    train = prepare(TaggedDataConfig(train=(str(tmp_path / "a.conll"),)), tokenizer, seed=0).train
    told = [document.labels[document.weights > 0].tolist() for document in train.documents]
    cut, rejected = ([row.line for row in rows] for rows in (train.cut, train.rejected))
    # a BERT drops it, and says so; a byte-level tokenizer has tokens for everything
    assert told == ([[2, 0]] if kind == "bert" else [[2, 2, 0], [2, 0]])
    assert (cut, rejected) == (([1], [5]) if kind == "bert" else ([], []))

def test_a_shown_sentence_has_each_tag_behind_its_token(bert: Tokenizer, base: Tokenizer) -> None:
    source = Text("s", ("Unaffable", "New", "York"), ("O", "B-x", "I-x"), "f.conll", 3)
    (document,) = encoded(bert, source).documents
    expected = "[CLS] una [[O]] ##ffa ##ble new [[B-x]] york [[I-x]] [SEP]"
    assert shown(document, LABELS, bert) == expected
    (document,) = encoded(base, source).documents
    said = shown(document, LABELS, base)
    marks = [part.partition("]]")[0] for part in said.split("[[")[1:]]
    assert marks == ["O", "B-x", "I-x"] and said.startswith(base.decode(document.tokens_T[:1]))

REAL = {
    "ner_wnut17/wnut17train.conll": (3394, 1975, 62730, 6),
    "ner_wikigold/wikigold.conll.txt": (1696, 3558, 39152 - 145, 4),
}

@pytest.mark.parametrize("name", REAL)
def test_real_sentences(name: str, data_dir: Path, bert: Tokenizer, base: Tokenizer) -> None:
    kept, rejected = examples(read_rows([data_dir / name], format="conll"), TaggedDataConfig())
    begins = sum(tag[:2] == "B-" for s in kept for tag in s.target)
    words, labels = sum(len(s.texts) for s in kept), label_map(kept, are_tags=True)
    assert (len(kept), begins, words, len(labels) // 2) == REAL[name] and not rejected
    for tokenizer in (bert, base):
        split = encode(TaggedDataConfig(), kept, tokenizer, labels)
        supervised = sum(int(d.weights.sum()) for d in split.documents)
        assert supervised + len(split.cut) == words and len(split.cut) < 20
        assert {row.reason for row in split.cut} <= {LOST} and not split.rejected

def test_real_sentences_are_all_prepared(data_dir: Path, bert: Tokenizer) -> None:
    for name, (count, *_) in REAL.items():
        files = (str(data_dir / name),)
        options = {"duplicates": "off", "format": "conll"}
        train = prepare(TaggedDataConfig(train=files, **options), bert, seed=0).train
        assert len(train.documents) == count and not train.rejected
