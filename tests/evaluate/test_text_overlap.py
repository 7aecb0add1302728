"""F1 of tokens, ROUGE-L, BLEU and chrF against sacrebleu and rouge-score, drawn and real texts."""

import random
import string
import tomllib
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ftcore.data.read import read_rows
from ftcore.errors import DataError
from ftcore.evaluate.text import (
    BLEU_SIGNATURE,
    CHRF_SIGNATURE,
    bleu,
    bleu_counts,
    chrf,
    chrf_counts,
    rouge_l,
    token_f1,
)

sacrebleu = pytest.importorskip("sacrebleu.metrics")
rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")

Rows = list[tuple[str, str]]  # target, predicted
TOLERANCE = 1e-9
SUMMED = {"bleu": (bleu_counts, bleu, "BLEU"), "chrf": (chrf_counts, chrf, "CHRF")}

# Few words, so that long n-grams match; and what tokenizers disagree on.
PLAIN = "the The a an cat cats sat on mat, mat. mat mat- 3.5 1,000"
ODD = r"""
    3,5 1.000. .5 5. 5- 5-6 -6 a-b don't U.S. e.g., (see [1] {x} "hi" x_y a/b 100% $5 c++ #1 @me
    ... ..5 ,,5 5,. .,5 1.,2 ?! : ; ~ ` ^ | \ &amp; &lt;b&gt; &quot; &amp;lt; &amp <skipped>
"""
FOREIGN = """
    caf\u00e9 cafe\u0301 \u00dcber \u0130x \u4f60\u597d \u2014 a\u2014b \u201cq\u201d \u00bd
    \u0663.\u0664 \U0001f600 the\U0001f600 \u2019s\u2026
"""
COMMON, WORDS = PLAIN.split(), [*PLAIN.split(), *ODD.split(), *FOREIGN.split()]
BLANKS = [" "] * 12 + ["", "", "  ", "\n", "-\n", "\t", "\r\n", "\u00a0", "\u2028", "\x1c"]
texts = st.one_of(
    st.lists(st.sampled_from(WORDS + BLANKS), max_size=24).map("".join),
    st.text("ab05 .,-&;\n'\u00e9", max_size=16),
    st.text(max_size=12),
)
corpora = st.lists(
    st.one_of(st.tuples(texts, texts), texts.map(lambda text: (text, text))), min_size=1, max_size=5
)

def drawn_text(rng: random.Random) -> str:
    words = rng.choices(COMMON if rng.random() < 0.6 else WORDS, k=rng.choice([0, 1, 3, 8, 30]))
    return "".join(word + rng.choice(BLANKS) for word in words)

def drawn_corpus(rng: random.Random) -> Rows:
    """Predicted texts that are the target, or near it, or another one."""
    rows = []
    for _ in range(rng.randint(1, 6)):
        target, other = drawn_text(rng), drawn_text(rng)
        cut = rng.randrange(len(target) + 1)
        rows.append((target, rng.choice([target, other, target[:cut] + other, target[cut:], ""])))
    return rows

def total(name: str, rows: Rows) -> np.ndarray:
    return sum(SUMMED[name][0](*row) for row in rows)

def assert_equals_oracles(rows: Rows) -> None:
    targets, predicted = map(list, zip(*rows, strict=True))
    for name, (_, figure, oracle) in SUMMED.items():
        expected = getattr(sacrebleu, oracle)().corpus_score(predicted, [targets]).score
        assert figure(total(name, rows)) == pytest.approx(expected, rel=0, abs=TOLERANCE), name
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    for row in rows:
        expected = scorer.score(*row)["rougeL"].fmeasure
        assert rouge_l(*row) == pytest.approx(expected, rel=0, abs=TOLERANCE), row

@pytest.mark.parametrize("seed", range(8))
def test_drawn_corpora_equal_the_oracles(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(250):
        assert_equals_oracles(drawn_corpus(rng))

@given(corpora)
@example([("", "")])
@example([("a b c d", ""), ("", "a b c d")])
@example([("", "a b c d e"), ("ab", "abcdefgh"), ("a b c d e", "a b c d e")])
@example([("a-<skipped>\nb c d e", "ab c d e"), ("x-\ny z w v", "xy z w v\n")])
@settings(max_examples=1000, deadline=None)
def test_any_corpus_equals_the_oracles(rows: Rows) -> None:
    assert_equals_oracles(rows)

@pytest.mark.parametrize("name", ["dev.tsv", "msr_paraphrase_test.txt"])
def test_real_sentences_equal_the_oracles(name: str, data_dir: Path) -> None:
    fields = [row.fields for row in read_rows([data_dir / "mrpc" / name], format="tsv")]
    rows = [(row["#1 String"], row["#2 String"]) for row in fields]
    assert_equals_oracles(rows)
    for row in rows[:200]:
        assert_equals_oracles([row])

def test_counts_add_up_in_any_split_and_order() -> None:
    rng = random.Random(0)
    rows = drawn_corpus(rng) + drawn_corpus(rng) + drawn_corpus(rng)
    for name, (counts, _, _) in SUMMED.items():
        whole = total(name, rows)
        assert counts(*rows[0]).dtype == whole.dtype == np.int64
        shuffled = rng.sample(rows, len(rows))
        np.testing.assert_array_equal(total(name, shuffled[:2]) + total(name, shuffled[2:]), whole)

def test_counts_by_hand() -> None:
    # the second "the" has no partner; nor has the only 4-gram, nor "the the", "the the cat"
    counts_S = bleu_counts("the cat sat", "the the cat sat")
    assert counts_S.tolist() == [3, 2, 1, 0, 4, 3, 2, 1, 4, 3]
    precisions = 3 / 4 * 2 / 3 * 1 / 2 * (1 / 2) / 1  # no 4-gram: half of one
    assert bleu(counts_S) == pytest.approx(100 * precisions**0.25, abs=TOLERANCE)
    assert bleu(counts_S * 1000) == pytest.approx(100 * (precisions / 1000) ** 0.25, abs=TOLERANCE)
    counts_S = chrf_counts("a b c", "abd")
    assert counts_S.tolist() == [2, 1, 0, 0, 0, 0, 3, 2, 1, 0, 0, 0, 3, 2, 1, 0, 0, 0]
    assert chrf(counts_S) == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3, abs=TOLERANCE)
    assert chrf_counts("a", "abc").tolist() == [1] + [0] * 5 + [3] + [0] * 5 + [1] + [0] * 5

def test_short_answers_pay_and_long_ones_do_not() -> None:
    target = "a b c d e f g h"
    assert bleu(bleu_counts(target, target[:7])) == pytest.approx(100 * np.exp(1 - 8 / 4))
    assert bleu(bleu_counts(target, target)) == pytest.approx(100)
    assert bleu(bleu_counts(target, "a b c")) == 0  # no 4-gram at all, as sacrebleu has it

def test_recall_weighs_more_in_chrf() -> None:
    longer, shorter = (chrf(chrf_counts(t, p)) for t, p in (("abcd", "abcdef"), ("abcdef", "abcd")))
    assert longer > shorter

@pytest.mark.parametrize(
    ("target", "predicted", "expected"),
    [
        ("The Cat!", "a cat", 1),
        ("an", "the", 1),
        ("", "?!", 1),
        ("", "cat", 0),
        ("the", "cat", 0),
        ("cat", "dog", 0),
        ("cat cat dog", "cat", 1 / 2),
        ("b c d", "b b c x", 2 * 2 / 7),
        ("U.S.", "us", 1),
        ("well-known", "well known", 0),
        ("theatre", "atre", 0),
        ("3.5", "35", 1),
        ("a\u2014b", "\u2014b", 1),  # an article is bounded by anything that is no letter
        ("\u201ccat\u201d", "cat", 0),  # only ASCII punctuation is dropped
        ("cat\u00a0sat", "cat\nsat", 1),
    ],
)
def test_token_f1_by_hand(target: str, predicted: str, expected: float) -> None:
    assert token_f1(target, predicted) == pytest.approx(expected, abs=1e-15)
    assert token_f1(predicted, target) == pytest.approx(expected, abs=1e-15)

def plain_tokens(text: str) -> list[str]:
    """Those of token_f1, from runs of letters and digits and of anything else."""
    bare = (c for c in text.lower() if c not in string.punctuation)
    runs = ("".join(run) for _, run in groupby(bare, str.isalnum))
    return "".join(" " if run in ("a", "an", "the") else run for run in runs).split()

def plain_token_f1(target: str, predicted: str) -> float:
    wanted, answer = plain_tokens(target), plain_tokens(predicted)
    if not wanted or not answer:
        return float(wanted == answer)
    common = sum(min(wanted.count(word), answer.count(word)) for word in set(wanted))
    precision, recall = common / len(answer), common / len(wanted)
    return 2 * precision * recall / (precision + recall) if common else 0.0

@pytest.mark.parametrize("seed", range(4))
def test_token_f1_of_drawn_texts(seed: int) -> None:
    rng = random.Random(seed)
    for row in (row for _ in range(500) for row in drawn_corpus(rng)):
        assert token_f1(*row) == pytest.approx(plain_token_f1(*row), rel=0, abs=TOLERANCE), row

@given(texts, texts)
@settings(max_examples=500, deadline=None)
def test_token_f1_of_any_texts(target: str, predicted: str) -> None:
    expected = plain_token_f1(target, predicted)
    assert token_f1(target, predicted) == pytest.approx(expected, rel=0, abs=TOLERANCE)

def test_a_long_answer_takes_no_table_of_pairs() -> None:
    words = [str(i) for i in range(20_000)]
    assert rouge_l(" ".join(words), " ".join(words[::2])) == pytest.approx(2 / 3, abs=TOLERANCE)
    assert rouge_l("x y", " ".join(words)) == rouge_l("", "") == rouge_l("a", "?") == 0

@pytest.mark.parametrize(
    ("name", "signature"), [("BLEU", BLEU_SIGNATURE), ("CHRF", CHRF_SIGNATURE)]
)
def test_signatures_are_those_of_sacrebleu(name: str, signature: str) -> None:
    oracle = getattr(sacrebleu, name)()
    oracle.corpus_score(["a"], [["a"]])
    expected = str(oracle.get_signature()).rpartition("|")[0]
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert signature == f"{expected}|version:ftcore-{project['version']}"

def test_counts_that_are_not_one_sum() -> None:
    for figure, counts_S, size in ((bleu, bleu_counts("a", "a"), 10), (chrf, np.zeros(10), 18)):
        with pytest.raises(DataError, match=rf"must be \({size},\), the counts of the rows added"):
            figure(np.stack([counts_S, counts_S]))
