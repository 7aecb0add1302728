"""What people say to an assistant: phrases made of an intent's parts, and values for their slots.

A request is  greeting + (front clause) + polite opening + core + clauses + tail + mark.  A core is
a command ("wake me up at {time}"), which may follow "could you", or a statement ("I have to get up
at {time}"). A clause holds one slot that the core lacks. The core with its clauses, in their order
and place, is the request's combination; one combination in four is held back from training.

The value of a slot is of a kind, a list of forms, in which `{kind}` stands for a form of that kind.
A value belongs to the training rows or to the new ones by a hash of its text (`is_new`), so the two
never meet, whatever the seed. Long lists (names, cities, things: from `SPLIT_FROM` entries on) are
parted word by word as well: a new name is made of words that no training name has shown.

The wording is in the TOML files of words/. The order of a list decides what a random draw gives.
"""

import json
import re
import tomllib
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

SLOT = re.compile(r"\{(?P<key>\w+)(?::(?P<kind>\w+))?\}")  # {key}, or {key:kind} if they differ
SPLIT_FROM = 40
MAX_WORDS = 4
MAX_SLOTS = 3

@cache
def wording(name: str, folder: Path = Path(__file__).parent / "words") -> dict[str, Any]:
    """The table of NAME.toml."""
    return tomllib.loads((folder / f"{name}.toml").read_text(encoding="utf-8"))

def kinds_of(template: str) -> dict[str, str]:
    """The slots of a template in order of appearance, each with the kind of its value."""
    return {slot["key"]: slot["kind"] or slot["key"] for slot in SLOT.finditer(template)}

def filled(template: str, values: Mapping[str, str]) -> str:
    """The template with each slot replaced by its value."""
    return SLOT.sub(lambda slot: values[slot["key"]], template)

def is_new(text: str) -> bool:
    """Whether a value is held back from training: one in four is."""
    return zlib.crc32(unicodedata.normalize("NFC", text).casefold().encode()) % 4 == 0

@cache
def forms(kind: str, new: bool) -> tuple[str, ...]:
    """The forms of a kind; of a long list only those of one side."""
    every = wording("slots")[kind]
    return tuple(form for form in every if len(every) < SPLIT_FROM or is_new(form) == new)

def draw(kind: str, rng: Random, *, new: bool) -> str:
    """A value of that kind, `MAX_WORDS` words at most, from the training side or the new one."""

    def expand(kind: str) -> str:
        return SLOT.sub(lambda part: expand(part["key"]), rng.choice(forms(kind, new)))

    while True:
        value = expand(kind)
        if is_new(value) == new and len(value.split()) <= MAX_WORDS:
            return value

class Intent(NamedTuple):
    """One command of the assistant, and the parts that ask for it."""
    name: str
    share: int  # of the training rows
    slots: list[str]  # in the order of the JSON command
    commands: list[str]
    statements: list[str]
    clauses: list[str]
    required: Sequence[str] = ()  # slots that need a clause where the core lacks them

class Phrase(NamedTuple):
    """A request without its values; `combination` is empty for one that is not made of parts."""
    combination: tuple[str, ...]
    template: str

@cache
def intents() -> tuple[Intent, ...]:
    """The intents of words/intents.toml, the most frequent first."""
    return tuple(Intent(name, **parts) for name, parts in wording("intents")["intents"].items())

def command(intent: str, slots: dict[str, str]) -> str:
    """The assistant's answer: one JSON object, the intent first."""
    return json.dumps({"intent": intent, **slots}, ensure_ascii=False)

def is_held_back(intent: Intent, combination: Sequence[str]) -> bool:
    """Whether training never shows this combination: one in four, and never a core alone; counting
    through the parts, instead of drawing lots, leaves every part in other combinations."""
    fronts = [f"{clause}," for clause in intent.clauses]
    parts = intent.commands + intent.statements + intent.clauses + fronts
    return len(combination) > 1 and sum(map(parts.index, combination)) % 4 == 0

def compose(intent: Intent, rng: Random, *, new: bool) -> Phrase:
    """A request of known combinations, or of those held back from training."""
    while True:
        combination = _combine(intent, rng)
        if is_held_back(intent, combination) == new:
            return Phrase(combination, _dress(intent, combination, rng))

def _combine(intent: Intent, rng: Random) -> tuple[str, ...]:
    """A core and a clause for each of the slots drawn; a front clause ends with a comma."""
    core = rng.choice(intent.commands + intent.statements)
    clauses_of: dict[str, list[str]] = {}
    for clause in intent.clauses:
        (slot,) = kinds_of(clause)
        if slot not in kinds_of(core):
            clauses_of.setdefault(slot, []).append(clause)
    wanted = [slot for slot in clauses_of if slot in intent.required]
    optional = [slot for slot in clauses_of if slot not in intent.required and rng.random() < 0.5]
    rng.shuffle(optional)
    wanted += optional[: MAX_SLOTS - len(kinds_of(core)) - len(wanted)]
    rng.shuffle(wanted)
    clauses = [rng.choice(clauses_of[slot]) for slot in wanted]
    if wanted and wanted[0] in wording("intents")["front"] and rng.random() < 0.25:
        return (f"{clauses[0]},", core, *clauses[1:])
    return (core, *clauses)

def _dress(intent: Intent, combination: Sequence[str], rng: Random) -> str:
    """The combination with a greeting, a polite opening, a tail and a mark, all optional."""
    front = [part for part in combination[:1] if part.endswith(",")]
    core, *clauses = combination[len(front) :]
    said = wording("intents")
    opening = [rng.choice(said["greetings"])] if rng.random() < 0.25 else []
    polite, asks = [], core.split()[0] in said["question_words"]
    if core in intent.commands and rng.random() < 0.5:
        polite = [rng.choice(said["polite_orders"] + said["polite_questions"])]
        asks = asks or polite[0] in said["polite_questions"]
    tail = rng.choice(said["tails"]) if rng.random() < 0.2 else ""
    mark = rng.choice(("", "", "?") if asks else ("", "", ".", "!"))
    return " ".join([*opening, *front, *polite, core, *clauses]) + tail + mark
