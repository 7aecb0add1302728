"""F1 of tokens, by hand and on drawn texts against a plain form of it."""

import random
import string
from itertools import groupby
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ftcore.evaluate.metrics import token_f1

Rows = list[tuple[str, str]]  # target, predicted
TOLERANCE = 1e-9

# Few words, so that many match; and what tokenizers disagree on.
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
