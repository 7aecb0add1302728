"""Tagged sentences: the first token of each word is supervised, and no word is lost silently."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ftcore.config import TaggedDataConfig
from ftcore.data.columns import Text, examples, indices, label_map, to_bio
from ftcore.data.encode import encode, first_tokens
from ftcore.data.formats import Row
from ftcore.data.pack import Encoded
from ftcore.data.prepare import prepare
from ftcore.data.read import read_rows
from ftcore.data.tokenizer import Encoding, Tokenizer
from ftcore.errors import DataError
from ftcore.evaluate.evaluator import evaluate_tags

LABELS = {"B-x": 0, "I-x": 1, "O": 2}
WORDS = ("Unaffable", "caf\u00e9s", ",", "\u200d", "don't", "O")

def rows(*fields: dict) -> list[Row]:
    return [Row(f"id{n}", "f.jsonl", n, dict(f)) for n, f in enumerate(fields, start=1)]

def sentence(words: tuple[str, ...], tag: str = "O") -> Text:
    return Text("s", words, (tag,) * len(words), "f.conll", 3)

@pytest.mark.parametrize(
    ("given", "bio"),
    [
        ("O I-x I-x O", "O B-x I-x O"),
        ("I-x I-y B-y I-y", "B-x B-y B-y I-y"),
        ("B-x I-x B-x I-y", "B-x I-x B-x B-y"),
        ("B-x I-x O B-y I-y", "B-x I-x O B-y I-y"),
        ("B-x I-x E-x S-y NN", "B-x I-x E-x S-y NN"),
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
    for bad, message in (
        ({"w": "a b", "t": ["O", "O"]}, "columns 'w' and 't' must hold lists of texts"),
        ({"w": ["a"], "t": [1]}, "columns 'w' and 't' must hold lists of texts"),
        ({"w": ["a", "b"], "t": ["O"]}, "2 words have 1 tags: must be one each"),
        ({"w": ["a"], "t": [""]}, "a tag is empty: write O"),
    ):
        with pytest.raises(DataError, match=f"f.jsonl:2: {message}"):
            examples(rows(good, bad), config)

def test_both_tags_of_a_type_are_labels() -> None:
    kept = [sentence(("a", "b"), "B-x"), sentence(("c",), "I-y"), sentence(("d",))]
    assert label_map(kept, are_tags=True) == ("B-x", "B-y", "I-x", "I-y", "O")

@pytest.mark.parametrize("kind", ["bert", "base"])
def test_first_tokens_against_words_read_alone(kind: str, request: pytest.FixtureRequest) -> None:
    """A BERT drops the joiner; a byte-level tokenizer has tokens for everything."""
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    encoding = tokenizer.encode(" ".join(WORDS))
    places = first_tokens(WORDS, encoding).tolist()
    assert (places[3] < 0) == (kind == "bert")
    found = [place for place in places if place >= 0]
    assert found == sorted(set(found))
    for word, place in zip(WORDS, places, strict=True):
        lead = "" if kind == "bert" or word == WORDS[0] else " "
        read = tokenizer.encode(lead + word, special=False)
        alone = read.ids_T[read.offsets_T2[:, 1] > len(lead)]  # a blank may be a token of its own
        if place >= 0:
            assert encoding.ids_T[place : place + len(alone)].tolist() == alone.tolist()

def test_a_token_belongs_to_one_word() -> None:
    """Tokens [ab c][d][ e]: the second word's own first token is its second."""
    offsets_T2 = np.array([(0, 0), (0, 4), (4, 5), (5, 7), (0, 0)])
    encoding = Encoding(np.zeros(5, dtype=np.int32), offsets_T2)
    assert first_tokens(("ab", "cd", "e"), encoding).tolist() == [1, 2, 3]
    merged = Encoding(encoding.ids_T[:3], np.array([(0, 0), (0, 5), (5, 7)]))
    assert first_tokens(("ab", "cd", "e"), merged).tolist() == [1, -1, 2]

def test_the_first_token_of_each_word_is_supervised(bert: Tokenizer) -> None:
    source = Text("s", WORDS, ("B-x", "I-x", "O", "B-x", "O", "B-x"), "f.conll", 3)
    encoded = encode(TaggedDataConfig(), [source, sentence(("\u200d",))], bert, LABELS)
    (document,) = encoded.documents
    places = document.weights.nonzero()[0]
    assert document.labels[places].tolist() == [0, 1, 2, 2, 0]
    assert set(document.labels[document.weights == 0]) == {-100}
    assert document.weights[0] == document.weights[-1] == 0  # [CLS] and [SEP]
    (kept,) = encoded.sentences
    assert kept.words == WORDS and kept.places_W[kept.places_W >= 0].tolist() == places.tolist()
    assert [r.reason for r in encoded.untold] == ["the word '\\u200d' gives no token"] * 2
    assert [(r.line, r.reason) for r in encoded.rejected] == [(3, "nothing to supervise in it")]

def test_long_sentences(bert: Tokenizer) -> None:
    source = sentence(("one", "unaffable", "two", "three"))
    full = encode(TaggedDataConfig(), [source], bert, LABELS).documents[0]
    for limit in range(4, len(full)):
        config = TaggedDataConfig(max_length=limit, over_length="cut_right")
        encoded = encode(config, [source], bert, LABELS)
        (short,), places_W = encoded.documents, encoded.sentences[0].places_W
        assert short.tokens_T.tolist() == [*full.tokens_T[: limit - 1], full.tokens_T[-1]]
        assert short.weights.nonzero()[0].tolist() == places_W[places_W >= 0].tolist()
        assert [r.reason for r in encoded.cut] == [f"more than {limit} tokens: cut_right"]
    assert len(places_W) == 4 and places_W[0] == 1
    with pytest.raises(DataError, match=f"f.conll:3: {len(full)} tokens, 4 are allowed"):
        encode(TaggedDataConfig(max_length=4), [source], bert, LABELS)
    with pytest.raises(DataError, match="max_length = 2: 2 special tokens leave no room"):
        encode(TaggedDataConfig(max_length=2, over_length="cut_right"), [source], bert, LABELS)

@pytest.mark.parametrize("over_length", ["cut_left", "split"])
def test_words_are_scored_once_and_where_they_stand(bert: Tokenizer, over_length: str) -> None:
    """Also a word of which every token but the first is in another document, or in none."""
    words = ("one", "\u200d", "unaffable" * 3, "three", "unaffable", "two")
    source = Text("s", words, ("B-x", "O", "I-x", "O", "B-x", "I-x"), "f.conll", 3)
    full = encode(TaggedDataConfig(), [source], bert, LABELS).documents[0]
    for limit in range(3, len(full)):
        options = {"max_length": limit, "over_length": over_length}
        encoded = encode(TaggedDataConfig(**options), [source], bert, LABELS)
        documents = encoded.documents
        assert {len(d) <= limit and d.row_id for d in documents} == {"s"}
        assert all(d.tokens_T[0] == full.tokens_T[0] for d in documents)
        assert all(d.tokens_T[-1] == full.tokens_T[-1] for d in documents)
        tokens, labels, weights = (
            np.concatenate([getattr(d, name) for d in documents])
            for name in ("tokens_T", "labels", "weights")
        )
        places_W = encoded.sentences[0].places_W
        told = places_W[places_W >= 0]
        assert told.tolist() == weights.nonzero()[0].tolist()
        expected = np.array(indices(LABELS, source))[places_W >= 0]
        assert labels[told].tolist() == expected.tolist()
        firsts = [bert.encode(word, special=False).ids_T[:1].tolist() for word in words]
        kept = [first for first, place in zip(firsts, places_W, strict=True) if place >= 0]
        assert tokens[told].tolist() == sum(kept, [])
        if over_length == "split":
            assert len(told) == 5 and np.flatnonzero(places_W < 0).tolist() == [1]
        else:
            assert tokens[1:-1].tolist() == full.tokens_T[len(full) + 1 - limit : -1].tolist()
        assert encoded.cut[0].reason.startswith(f"more than {limit} tokens: {over_length}")

def test_split_sentences_are_judged_whole(
    bert: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entity that goes on in the next document is one; here the model is always right."""
    source = Text("s", ("one", "two", "three"), ("O", "B-x", "I-x"), "f.conll", 3)
    options = {"max_length": 4, "over_length": "split"}
    split = encode(TaggedDataConfig(**options), [source], bert, LABELS)
    assert len(split.documents) == 2

    def right(_: object, documents: Sequence[Encoded]) -> tuple[np.ndarray, list[list[int]]]:
        sums_B2 = np.array([[0.5, 2.0], [0.25, 1.0]])
        return sums_B2, [d.labels[d.weights > 0].tolist() for d in documents]

    monkeypatch.setattr("ftcore.evaluate.evaluator.scored_tokens", right)
    judged = evaluate_tags(None, split, list(LABELS))
    assert judged.values["f1"] == judged.values["accuracy"] == 1
    assert judged.values["loss"] == 0.25 and judged.right_B.tolist() == [True]
    assert [row["support"] for row in judged.by_class] == [1] and len(judged.rows) == 1
    assert judged.rows[0]["predicted"] == ["O", "B-x", "I-x"]

def test_prepared_sentences(bert: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("a B-x\n\u200d O\n\nb O\n\nc I-x\n", "utf-8")
    (tmp_path / "b.tags").write_text("a O\n", "utf-8")
    paths = (str(tmp_path / "a.conll"),), (str(tmp_path / "b.tags"),)
    config = TaggedDataConfig(train=paths[0], test=paths[1], holdout=1, format="conll")
    data = prepare(config, bert, seed=0)
    assert data.labels == ("B-x", "I-x", "O")
    assert len(data.train.documents) == 2 and len(data.dev.documents) == 1
    assert not data.train.sentences  # nobody judges training rows
    for split in (data.dev, data.tests["b"]):
        assert [len(s.places_W) for s in split.sentences] == [
            int((s.places_W < 0).sum() + (d.weights > 0).sum())
            for s, d in zip(split.sentences, split.documents, strict=True)
        ]
    text = "without token 1 (the word '\\u200d' gives no token)"
    assert text in data.summary()
    data.write(tmp_path / "data")
    assert '"what": "without token"' in (tmp_path / "data" / "rejected.jsonl").read_text("utf-8")

REAL = ["ner_wnut17/wnut17train.conll", "ner_wikigold/wikigold.conll.txt"]

@pytest.mark.parametrize("name", REAL)
def test_real_sentences(name: str, data_dir: Path, bert: Tokenizer, base: Tokenizer) -> None:
    kept, rejected = examples(read_rows([data_dir / name], format="conll"), TaggedDataConfig())
    begins = sum(tag[:2] == "B-" for s in kept for tag in s.target)
    words = sum(len(s.texts) for s in kept)
    assert (begins, words) == ((1975, 62730) if "wnut" in name else (3558, 39152 - 145))
    labels = label_map(kept, are_tags=True)
    assert len(labels) == 1 + 2 * (6 if "wnut" in name else 4) and not rejected
    for tokenizer in (bert, base):
        encoded = encode(TaggedDataConfig(), kept, tokenizer, labels)
        supervised = sum(int(d.weights.sum()) for d in encoded.documents)
        assert supervised + len(encoded.untold) == words and len(encoded.untold) < 20

def test_more_reasons_than_fit_are_counted(bert: Tokenizer, tmp_path: Path) -> None:
    lost = [chr(0x200B + n) for n in range(5)] + ["\u2060", "\ufeff"]
    text = "".join(f"{word} O\na B-x\n\n" for word in lost)
    (tmp_path / "a.conll").write_text(text, "utf-8")
    data = prepare(TaggedDataConfig(train=(str(tmp_path / "a.conll"),)), bert, seed=0)
    assert len(data.train.untold) == 7 and "; without token 2 more" in data.summary()
