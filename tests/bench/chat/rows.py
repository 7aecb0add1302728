"""Makes the rows that ftcore/builtin/chat.py describes: `build` five splits, `packed` their files.

A request comes from the parts and words of phrases.py; test_wording's from words/test_wording.toml.
"""

import gzip
import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from functools import partial
from itertools import cycle, islice
from random import Random
from ftcore.builtin.chat import Row

from .phrases import Intent, Phrase, command, compose, draw, filled, intents, kinds_of, wording

Slots = dict[str, str]
Spoil = Callable[[str, Slots, Random], str]

TRAIN_ROWS, DEV_ROWS = 9500, 300  # of train before duplicates and empty rows are added
TEST_ROWS_PER_INTENT = 16
TYPO_RATE = 0.12
CASES = {"as is": 0.4, "lower": 0.25, "capital": 0.35}  # of a request, its values included
FAULTS = {  # per clean row of train: the first two and the last add rows, the others alter one
    "exact_duplicate": 0.03, "near_duplicate": 0.03, "odd_unicode": 0.03, "wrong_label": 0.02,
    "empty": 0.01,
}  # fmt: skip
NEAR_DUPLICATE_CHARS = 36  # the least length at which one more letter keeps Jaccard above 0.8
EMPTIED = ((0,), (1,), (0, 1))  # the request, the answer, both

def build(seed: int = 0) -> dict[str, list[Row]]:
    """The five splits by name, the same for the same seed."""
    rng = Random(seed)
    known = partial(compose, rng=rng, new=False)
    written = partial(written_rows, rng=rng, said=set())

    def recombined(intent: Intent) -> Phrase:
        parts = {part for phrase in phrases[intent.name] for part in phrase.combination}
        while True:
            phrase = compose(intent, rng, new=True)
            if parts.issuperset(phrase.combination):
                return phrase

    train = plant(written("train", shares(TRAIN_ROWS), known), rng)
    phrases: dict[str, list[Phrase]] = {intent.name: [] for intent in intents()}
    for row in train:
        if row["fault"] is None and row["slots"]:
            phrases[row["intent"]].append(Phrase(tuple(row["combination"]), row["phrasing"]))
    tests = partial(written, counts=[TEST_ROWS_PER_INTENT] * len(intents()), new=True)
    new = wording("test_wording")
    return {"train": train, "dev": written("dev", shares(DEV_ROWS), known),
            "test_values": tests("test_values", of=lambda i: rng.choice(phrases[i.name])),
            "test_combinations": tests("test_combinations", of=recombined),
            "test_wording": tests("test_wording", of=lambda i: Phrase((), rng.choice(new[i.name])))}

def shares(size: int) -> list[int]:
    """Rows of each intent in a split of about that size with the imbalance of train."""
    total = sum(intent.share for intent in intents())
    return [round(size * intent.share / total) for intent in intents()]

def written_rows(split: str, counts: Iterable[int], of: Callable[[Intent], Phrase], *, rng: Random,
                 said: set[str], new: bool = False) -> list[Row]:
    """A split of `counts` rows of each intent, from the phrases `of` it, shuffled; `new` values or
    those of training. No request is among those `said`, and all are after it."""
    rows = []
    for intent, left in zip(intents(), counts, strict=True):
        while left:
            row = written_row(intent, of(intent), rng, new=new)
            gist = re.sub(r"\W", "", row["messages"][0]["content"]).casefold()
            if gist not in said:
                said.add(gist)
                rows.append(row)
                left -= 1
    rng.shuffle(rows)
    return [{"id": f"{split}-{number:04d}", **row} for number, row in enumerate(rows)]

def written_row(intent: Intent, phrase: Phrase, rng: Random, *, new: bool) -> Row:
    """One request with its answer, all but the id; wording by hand, not of parts, has no typos."""
    template = phrase.template
    values = {key: draw(kind, rng, new=new) for key, kind in kinds_of(template).items()}
    (case,) = rng.choices(list(CASES), list(CASES.values()))
    if case == "lower":
        template = template.lower()
        values = {key: value.lower() for key, value in values.items()}
    elif case == "capital" and not template.startswith("{"):
        template = template[0].upper() + template[1:]
    slots = {key: values[key] for key in intent.slots if key in values}
    clean = text = filled(template, values)
    if phrase.combination and rng.random() < TYPO_RATE:
        text = typo(clean, slots, rng)
    return {
        "messages": [{"role": "user", "content": text},
                     {"role": "assistant", "content": command(intent.name, slots)}],
        "intent": intent.name, "slots": slots, "phrasing": phrase.template,
        "combination": list(phrase.combination), "typo": text != clean, "fault": None,
    }  # fmt: skip

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
    if not (words := spots(r"[A-Za-z]{4,}", text, slots)):
        return text
    word = rng.choice(words)
    return text[: word.start()] + misspell(word[0], rng) + text[word.end() :]

def near_duplicate(text: str, slots: Slots, rng: Random) -> str:
    """One letter doubled, or a smile at the end: at least 0.8 of the 5-letter pieces are shared."""
    if len(text) < NEAR_DUPLICATE_CHARS or not (letters := spots(r"[A-Za-z]", text, slots)):
        return text
    at = rng.choice(letters).start()
    return rng.choice((text[: at + 1] + text[at:], f"{text} :)"))

def zero_width(text: str, slots: Slots, rng: Random) -> str:
    """A zero-width space inside a word, or a byte order mark at the start."""
    if not (inside := spots(r"(?<=[a-z])(?=[a-z])", text, slots)):
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

    count = {kind: round(share * len(rows)) for kind, share in FAULTS.items()}
    for _ in range(count["exact_duplicate"]):
        added.append(damaged(pool.pop(), {}, "exact_duplicate"))
    for _ in range(count["near_duplicate"]):
        added.append(spoiled(near_duplicate, "near_duplicate"))
    for form in islice(cycle(ODD_UNICODE), count["odd_unicode"]):
        altered.append(spoiled(ODD_UNICODE[form], "odd_unicode", form=form))
    for _ in range(count["wrong_label"]):
        row = pool.pop()
        truth, wrong = row["intent"], other_intent(row["intent"], rng)
        row = damaged(row, {1: command(wrong, row["slots"])}, "wrong_label", truth=truth)
        altered.append({**row, "intent": wrong})
    for places in islice(cycle(EMPTIED), count["empty"]):
        blank = {place: rng.choice(("", " ", "\n")) for place in places}
        row = damaged(pool.pop(), blank, "empty")
        added.append({**row, "intent": "", "slots": {}} if 1 in blank else row)

    for number, row in enumerate(added, len(rows)):
        if row["fault"]["kind"].endswith("duplicate"):
            row["fault"]["of"] = row["id"]
        row["id"] = f"train-{number:04d}"
    by_id = {row["id"]: row for row in (*rows, *altered)}
    planted = [*by_id.values(), *added]
    rng.shuffle(planted)
    return planted

def damaged(row: Row, texts: dict[int, str], kind: str, **notes: str) -> Row:
    """A copy of the row with that fault and, by their places, other texts of its messages."""
    pairs = enumerate(row["messages"])
    messages = [{**message, "content": texts.get(at, message["content"])} for at, message in pairs]
    return {**row, "messages": messages, "fault": {"kind": kind, **notes}}

def rivalled(rows: Iterable[Row], seed: int = 0) -> list[Row]:
    """The rows, those without a fault with "rejected" and "corruption", both from `corrupt`."""
    rng = Random(seed)

    def rival(row: Row) -> Row:
        return dict(zip(("rejected", "corruption"), corrupt(row, rng), strict=True))

    return [row if row["fault"] else row | rival(row) for row in rows]

def packed(seed: int = 0) -> dict[str, bytes]:
    """The splits as gzipped jsonl, the same bytes for the same seed."""
    files = {}
    for split, rows in build(seed).items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rivalled(rows))
        files[split] = gzip.compress("".join(lines).encode(), mtime=0)
    return files

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
        answer = rng.choice((answer[:-1], answer[1:], answer.replace('"', "'"),
                             answer.replace('"', "", 1), answer.replace(":", "", 1),
                             answer.removesuffix('"}') + "}"))
    return answer, kind
