"""Damage done on purpose: typos, the faults of a training set as it is found, corrupted commands.

Typos and odd characters spare the slot values, except for accents taken apart from their letters,
which NFC joins again. So every fault but a wrong label can be mended, or removed, by code.
"""

import re
import unicodedata
from collections.abc import Callable
from functools import partial
from itertools import cycle
from random import Random
from typing import Any

from .phrases import command, intents

Row = dict[str, Any]
Slots = dict[str, str]
Spoil = Callable[[str, Slots, Random], str]

FAULTS = {  # per clean row of train: the first two and the last add rows, the others alter one
    "exact_duplicate": 0.03, "near_duplicate": 0.03, "odd_unicode": 0.03, "wrong_label": 0.02,
    "empty": 0.01,
}  # fmt: skip
NEAR_DUPLICATE_CHARS = 36  # the least length at which one more letter keeps Jaccard above 0.8
EMPTIED = ((0,), (1,), (0, 1))  # the request, the answer, both

def spots(pattern: str, text: str, slots: Slots) -> list[re.Match[str]]:
    """Where a pattern matches outside of the slot values."""
    for value in sorted(slots.values(), key=len, reverse=True):
        text = text.replace(value, "\0" * len(value))
    return list(re.finditer(pattern, text))

def misspell(word: str, rng: Random) -> str:
    """Double, drop or swap a letter; the result always differs and is never empty."""
    at = rng.randrange(len(word))
    doubled, dropped = word[: at + 1] + word[at:], word[:at] + word[at + 1 :]
    swapped = word[:at] + word[at : at + 2][::-1] + word[at + 2 :]
    return rng.choice([form for form in (doubled, dropped, swapped) if form not in ("", word)])

def typo(text: str, slots: Slots, rng: Random) -> str:
    """The text with one misspelt word of four letters or more; without such a word, as it is."""
    words = spots(r"[A-Za-z]{4,}", text, slots)
    if not words:
        return text
    word = rng.choice(words)
    return text[: word.start()] + misspell(word[0], rng) + text[word.end() :]

def near_duplicate(text: str, slots: Slots, rng: Random) -> str:
    """One letter doubled, or a smile at the end: at least 0.8 of the 5-letter pieces are shared."""
    letters = spots(r"[A-Za-z]", text, slots)
    if len(text) < NEAR_DUPLICATE_CHARS or not letters:
        return text
    at = rng.choice(letters).start()
    return rng.choice((text[: at + 1] + text[at:], f"{text} :)"))

def zero_width(text: str, slots: Slots, rng: Random) -> str:
    """A zero-width space inside a word, or a byte order mark at the start."""
    inside = spots(r"(?<=[a-z])(?=[a-z])", text, slots)
    if not inside:
        return text
    at = rng.choice(inside).start()
    return rng.choice((f"{text[:at]}\u200b{text[at:]}", f"\ufeff{text}"))

def swapped(text: str, slots: Slots, rng: Random, *, old: str, new: str) -> str:
    """Every `old` character a `new` one."""
    for spot in spots(old, text, slots):
        text = text[: spot.start()] + new + text[spot.end() :]
    return text

ODD_UNICODE: dict[str, Spoil] = {
    "no_break_space": partial(swapped, old=" ", new="\u00a0"),
    "curly_quote": partial(swapped, old="'", new="\u2019"),
    "zero_width": zero_width,
    "loose_accent": lambda text, slots, rng: unicodedata.normalize("NFD", text),
}

def plant(rows: list[Row], rng: Random) -> list[Row]:
    """The rows with every fault of `FAULTS` planted, shuffled. No row has two; no twin has one."""
    pool = rng.sample(rows, len(rows))
    altered, added = [], []

    def spoiled(spoil: Spoil, kind: str, **notes: str) -> Row:
        """The next row of the pool that `spoil` changes, changed."""
        for at, row in enumerate(pool):
            request = row["messages"][0]["content"]
            if (changed := spoil(request, row["slots"], rng)) != request:
                del pool[at]
                return damaged(row, {0: changed}, kind, **notes)
        raise AssertionError(f"no row left for {kind} {notes}")

    def count(kind: str) -> range:
        return range(round(FAULTS[kind] * len(rows)))

    for _ in count("exact_duplicate"):
        added.append(damaged(pool.pop(), {}, "exact_duplicate"))
    for _ in count("near_duplicate"):
        added.append(spoiled(near_duplicate, "near_duplicate"))
    for _, form in zip(count("odd_unicode"), cycle(ODD_UNICODE), strict=False):
        altered.append(spoiled(ODD_UNICODE[form], "odd_unicode", form=form))
    for _ in count("wrong_label"):
        row = pool.pop()
        truth, wrong = row["intent"], other_intent(row["intent"], rng)
        row = damaged(row, {1: command(wrong, row["slots"])}, "wrong_label", truth=truth)
        altered.append({**row, "intent": wrong})
    for _, places in zip(count("empty"), cycle(EMPTIED), strict=False):
        blank = {place: rng.choice(("", " ", "\n")) for place in places}
        row = damaged(pool.pop(), blank, "empty")
        added.append({**row, "intent": "", "slots": {}} if 1 in blank else row)

    for number, row in enumerate(added, len(rows)):
        if row["fault"]["kind"].endswith("duplicate"):
            row["fault"]["of"] = row["id"]
        row["id"] = row_id("train", number)
    by_id = {row["id"]: row for row in (*rows, *altered)}
    planted = [*by_id.values(), *added]
    rng.shuffle(planted)
    return planted

def row_id(split: str, number: int) -> str:
    return f"{split}-{number:04d}"

def damaged(row: Row, texts: dict[int, str], kind: str, **notes: str) -> Row:
    """A copy of the row with that fault and, by their places, other texts of its messages."""
    pairs = enumerate(row["messages"])
    messages = [{**message, "content": texts.get(at, message["content"])} for at, message in pairs]
    return {**row, "messages": messages, "fault": {"kind": kind, **notes}}

def other_intent(intent: str, rng: Random) -> str:
    return rng.choice([other.name for other in intents() if other.name != intent])

def corrupt(row: Row, rng: Random) -> tuple[str, str]:
    """A wrong answer to the row's request, and the name of what is wrong with it: wrong_intent,
    missing_slot, altered_value (misspelt), swapped_slots (two different values) or broken_json (a
    brace, quote or colon missing, or single quotes)."""
    intent, slots = row["intent"], dict(row["slots"])
    kinds = ["wrong_intent", "broken_json"]
    if slots:
        kinds += ["missing_slot", "altered_value"]
    if len(set(slots.values())) > 1:
        kinds += ["swapped_slots"]
    kind = rng.choice(kinds)
    key = rng.choice(list(slots)) if slots else ""
    if kind == "wrong_intent":
        intent = other_intent(intent, rng)
    elif kind == "missing_slot":
        del slots[key]
    elif kind == "altered_value":
        slots[key] = misspell(slots[key], rng)
    elif kind == "swapped_slots":
        other = rng.choice([other for other in slots if slots[other] != slots[key]])
        slots[key], slots[other] = slots[other], slots[key]
    answer = command(intent, slots)
    if kind == "broken_json":
        answer = rng.choice((
            answer[:-1], answer[1:], answer.replace('"', "'"), answer.replace('"', "", 1),
            answer.replace(":", "", 1), answer.removesuffix('"}') + "}",
        ))  # fmt: skip
    return answer, kind
