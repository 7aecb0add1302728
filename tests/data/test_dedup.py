"""Duplicates against all pairs, one by one; every order of rows; real data; leaks."""

import csv
import random
from collections.abc import Iterator
from pathlib import Path
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ftcore.data import dedup
from ftcore.data.dedup import alike, duplicates, folded, leaks
from ftcore.errors import DataError

def jaccard(a: str, b: str) -> float:
    """By the words of the module's docstring; 0 where two texts are not compared."""
    a, b = folded(a), folded(b)
    words = sorted((len(a.split()), len(b.split())))
    if words[0] >= 20:
        sides = [a.split(), b.split()]
    elif words[1] < 25:
        sides = [list(a), list(b)]
    else:
        return 0.0
    x, y = ({tuple(side[i : i + 5]) for i in range(len(side) - 4)} for side in sides)
    return len(x & y) / max(len(x | y), 1)

def sentence(rng: random.Random, words: int) -> list[str]:
    return [f"{rng.choice('abcdefgh')}{rng.randrange(10**4)}" for _ in range(words)]

def planted(seed: int, pairs: int) -> list[str]:
    """Texts of 3 to 120 words, each with a copy in which some words are changed, added or lost."""
    rng = random.Random(seed)
    texts = []
    for _ in range(pairs):
        words = sentence(rng, round(3 * 40 ** rng.random()))
        copy = list(words)
        for _ in range(rng.randint(1, 1 + len(words) // 40)):
            place = rng.randrange(len(copy))
            copy[place : place + rng.randint(0, 1)] = sentence(rng, rng.randint(0, 1))
        texts += [" ".join(words), " ".join(copy or words)]
    return texts

def ranked(texts: list[str]) -> list[str]:
    return sorted({folded(text) for text in texts}, key=lambda form: (-len(form), form))

def test_planted_pairs_are_found_and_no_others() -> None:
    named = ranked(planted(0, 4000))
    found = {(a, b): similar for a, b, similar in alike(named)}
    texts = planted(0, 4000)
    close = [(a, b) for a, b in zip(texts[::2], texts[1::2], strict=True) if a != b]
    close = [(folded(a), folded(b)) for a, b in close if jaccard(a, b) >= 0.8]
    rank = {form: index for index, form in enumerate(named)}
    hits = [tuple(sorted(pair, key=rank.__getitem__)) in found for pair in close]
    assert len(close) > 1000 and sum(hits) >= 0.98 * len(hits)
    lengths = [len(a.split()) for a, _ in close]
    assert min(lengths) < 20 <= max(lengths)
    for (a, b), similar in found.items():
        assert rank[a] < rank[b] and similar == jaccard(a, b) >= 0.8

def test_borderline_pairs_are_found_as_often_as_the_bands_promise() -> None:
    rng, texts = random.Random(1), []
    for _ in range(1500):  # 45 shingles, of which 5 are others: J = 40 / 50
        words = sentence(rng, 49)
        texts += [" ".join(words), " ".join([*words[:-5], *sentence(rng, 5)])]
    assert {jaccard(texts[i], texts[i + 1]) for i in range(0, 3000, 2)} == {0.8}
    assert len(alike(ranked(texts))) >= 0.98 * 1500
    signature_BH = dedup._signatures(texts, letters=False)
    estimate_P = (signature_BH[::2] == signature_BH[1::2]).mean(1)
    assert estimate_P.mean() == pytest.approx(0.8, abs=0.004)
    assert estimate_P.std() == pytest.approx((0.8 * 0.2 / 128) ** 0.5, rel=0.1)

WORDS = st.lists(st.sampled_from(["aa", "b", "Cc\td", "\xe9", "7", "\ud800", "x"]), max_size=30)

@settings(max_examples=25, deadline=None)
@given(st.lists(WORDS.map(" ".join), max_size=12), st.randoms(use_true_random=False))
def test_small_sets_are_exact_in_any_order(texts: list[str], rng: random.Random) -> None:
    named = ranked(texts)
    for a, b, similar in alike(named):
        assert named.index(a) < named.index(b) and similar == jaccard(a, b) >= 0.8
    removed = {folded(texts[row]): folded(texts[twin]) for row, twin, _ in duplicates(texts)}
    rows = {row for row, *_ in duplicates(texts)}
    assert {folded(texts[row]) for row in range(len(texts)) if row not in rows} == {
        form for form in named if removed.get(form, form) == form
    }
    shuffled = rng.sample(texts, len(texts))
    again = duplicates(shuffled)
    assert removed == {folded(shuffled[row]): folded(shuffled[twin]) for row, twin, _ in again}

@pytest.mark.parametrize("chunk", [1, 1 << 9])
def test_rows_order_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    texts = planted(2, 150)
    texts += [text.upper() for text in texts[::7]]

    def told(order: list[int]) -> set[tuple[str, str, float]]:
        mixed = [texts[i] for i in order]
        twins = duplicates(mixed)
        rows = [row for row, *_ in twins]
        assert rows == sorted(set(rows)) and not {twin for _, twin, _ in twins} & set(rows)
        return {(folded(mixed[row]), folded(mixed[twin]), near) for row, twin, near in twins}

    first = told(list(range(len(texts))))
    assert {a == b for a, b, _ in first} == {True, False}
    assert all(near == (a == b or jaccard(a, b)) for a, b, near in first)
    monkeypatch.setattr(dedup, "CHUNK", chunk)
    for seed in range(2):
        assert told(random.Random(seed).sample(range(len(texts)), len(texts))) == first

def test_a_star_has_no_chains() -> None:
    words = [f"w{i}" for i in range(10, 70)]
    steps = [" ".join(words[i : 50 + i]) for i in (0, 3, 6)]  # each is like the next one only
    assert jaccard(steps[0], steps[1]) == 43 / 49 >= 0.8 > jaccard(steps[0], steps[2])
    steps[1] += " and more"  # the longest: both others are like it
    assert duplicates(["x", *steps, steps[0].title()]) == [
        (1, 2, jaccard(steps[0], steps[1])),
        (3, 2, jaccard(steps[2], steps[1])),
        (4, 2, jaccard(steps[0], steps[1])),
    ]
    steps[1], steps[0] = steps[1].removesuffix(" and more"), steps[0] + " z"
    assert [pair[:2] for pair in duplicates(steps)] == [(1, 0)]  # 2 is like 1 alone: it stays
    assert duplicates(["A  b", "c", "a b", " a\nB"]) == [(2, 0, 1.0), (3, 0, 1.0)]

def test_digits_and_lengths_decide() -> None:
    sums = [f"what is {n} plus {n + 1}" for n in (17, 42)]
    assert duplicates(sums) == [] == duplicates(["", "abcd", "abce", "a"]) == duplicates([])
    words = sentence(random.Random(3), 26)
    assert duplicates([" ".join(words), " ".join(word[::-1] for word in words)]) == []
    for num_words, longer, like in ((18, 19, 1), (19, 20, 1), (19, 25, 0), (23, 24, 1)):
        pair = [" ".join(words[:num_words]), " ".join(words[:longer])]
        assert len(duplicates(pair)) == like == (jaccard(*pair) >= 0.8)

def test_a_large_cluster_stops_for_review() -> None:
    rng = random.Random(0)
    stem = " ".join(sentence(rng, 12))
    texts = [" ".join(sentence(rng, 12)) for _ in range(900)] + [f"{stem} {n}" for n in range(100)]
    with pytest.raises(DataError) as error:
        duplicates(texts)
    assert str(error.value) == (
        "row 910 (from 0) is like 99 other texts, above 1.0%: "
        + ", ".join(repr(f"{stem} {n}") for n in (10, 11, 12))
        + "; stop for review: if only equal texts shall go, say data.duplicates exact"
    )
    assert len(duplicates(texts, max_share=0.1)) == 99
    assert len(duplicates(texts[:921])) == 20  # too few to ask

def test_rows_from_a_template_meet_a_bounded_number_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng, compared = random.Random(0), []
    template = "please do tell me what the word {} means"
    texts = [template.format(" ".join(sentence(rng, 2))) for _ in range(3000)]
    signature_BH, chunks = dedup._signatures(texts, letters=True), dedup._chunks

    def counted(sizes: np.ndarray) -> Iterator[slice]:
        compared.append(len(sizes))
        return chunks(sizes)

    monkeypatch.setattr(dedup, "_chunks", counted)
    dedup._candidates(signature_BH, np.arange(len(signature_BH)))
    assert sum(compared) <= 3000 * (1 + 2 * dedup.BANDS * (dedup.WINDOW + 1)) < 3000 * 2999 / 2

def test_leaks_by_kind() -> None:
    rng = random.Random(5)
    held = [" ".join(sentence(rng, 40)) for _ in range(4)] + ["a short one of six words"]
    held += [held[0], " ".join(held[1].split()[:39])]
    other = sentence(rng, 60)
    near = " ".join(held[1].split()[:38])
    run = " ".join([*other[:20], *held[2].split()[7:20], *other[20:]])
    train = [run, held[0].upper(), near, " ".join(other), held[0], "a short one of six words."]
    train += [" ".join([*other[:20], *held[3].split()[:12], *other[20:]])]  # 12 words: no leak
    assert leaks(train, held) == {
        0: (2, "13 words", " ".join(held[2].split()[7:20])),
        1: (0, "exact", "Jaccard 1.000"),
        2: (6, "near", f"Jaccard {34 / 35:.3f}"),  # and 34 / 36 to held[1]
        4: (0, "exact", "Jaccard 1.000"),
        5: (4, "near", f"Jaccard {20 / 21:.3f}"),
    }
    assert leaks(train, []) == leaks([], held) == {}

    def told() -> dict[str, tuple[str, str]]:
        found = leaks(train, held).items()
        return {train[row]: (kind, held[twin]) for row, (twin, kind, _) in found}

    rows = told()
    train.reverse(), held.reverse()
    assert rows == told()

def test_real_rows(data_dir: Path) -> None:
    def banking(split: str) -> list[str]:
        with open(data_dir / "banking77" / f"{split}.csv", encoding="utf-8", newline="") as file:
            return [row["text"] for row in csv.DictReader(file)]

    train, test = banking("train"), banking("test")
    found = leaks(train, test)
    assert len({folded(test[twin]) for twin, kind, _ in found.values() if kind == "exact"}) == 7
    every = [(train[row], train[twin], similar) for row, twin, similar in duplicates(train)]
    near = [pair for pair in every if folded(pair[0]) != folded(pair[1])]
    assert len(train) - len({folded(text) for text in train}) == 4
    assert len(every) - len(near) <= 4 < len(every) < 0.02 * len(train)
    given = [(row, twin, by) for row, (twin, kind, by) in found.items() if kind == "near"]
    assert len(near) + len(given) > 150
    assert all(similar == jaccard(a, b) >= 0.8 for a, b, similar in near)
    for row, twin, by in given:
        similar = jaccard(train[row], test[twin])
        assert similar >= 0.8 and by == f"Jaccard {similar:.3f}"
