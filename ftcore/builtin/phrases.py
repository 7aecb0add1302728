"""What people say to an assistant: phrases made of an intent's parts (words/intents.toml).

A request is  greeting + (front clause) + polite opening + core + clauses + tail + mark.  A core is
a command ("wake me up at {time}"), which may follow "could you", or a statement ("I have to get up
at {time}"). A clause holds one slot that the core lacks. The core with its clauses, in their order
and place, is the request's combination; one combination in four is held back from training.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from . import wording
from .slots import kinds_of

MAX_SLOTS = 3

@dataclass(frozen=True)
class Intent:
    """One command of the assistant, and the parts that ask for it."""
    name: str
    share: int  # of the training rows
    slots: tuple[str, ...]  # in the order of the JSON command
    commands: tuple[str, ...]
    statements: tuple[str, ...]
    clauses: tuple[str, ...]
    required: tuple[str, ...] = ()  # slots that need a clause where the core lacks them

@dataclass(frozen=True)
class Phrase:
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
    parts = intent.commands + intent.statements + intent.clauses
    parts += tuple(f"{clause}," for clause in intent.clauses)
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
