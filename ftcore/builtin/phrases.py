"""What people say to an assistant, in parts: intents, their core phrases, the clauses around them.

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

from .slots import SLOT

MAX_SLOTS = 3
# Slots whose clause may stand before the core.
FRONT = ("day", "time", "room", "city", "app", "unit", "language", "via")

GREETINGS = (
    "hey,", "hi,", "hello,", "ok,", "hey there,", "good morning,", "hi assistant,", "alright,",
    "so,",
)  # fmt: skip
POLITE_ORDERS = (
    "please", "I need you to", "I want you to", "I'd like you to", "go ahead and", "quickly",
    "just", "kindly", "you should",
)  # fmt: skip
POLITE_QUESTIONS = (
    "could you", "can you", "would you", "will you", "could you please", "can you please",
    "can you quickly",
)  # fmt: skip
QUESTION_WORDS = ("what", "what's", "how", "how's", "is", "will")
TAILS = (
    " please", ", please", " thanks", ", thanks", ", thank you", " for me", ", cheers",
    " right away",
)  # fmt: skip


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


INTENTS = (
    Intent(
        "play_music", 40, ("title", "artist", "genre", "room"),
        ("play {title}", "put on {title}", "play the song {title}", "start {title}",
         "queue {title}", "play some {genre}", "put on some {genre} music",
         "start a {genre} playlist", "play something by {artist}", "shuffle songs by {artist}",
         "play some music"),
        ("I want to hear {title}", "let's listen to {title}", "I'm in the mood for some {genre}",
         "I feel like listening to {artist}"),
        ("by {artist}", "from {artist}", "in the {room}", "on the {room} speaker"),
    ),
    Intent(
        "add_reminder", 16, ("task", "day", "time"),
        ("remind me to {task}", "add a reminder to {task}", "set a reminder to {task}",
         "ping me to {task}", "create a reminder to {task}", "make sure I remember to {task}"),
        ("I have to remember to {task}", "don't let me forget to {task}",
         "I must not forget to {task}", "I need a reminder to {task}"),
        ("on {day}", "{day:when}", "at {time}", "around {time}", "by {time}"),
    ),
    Intent(
        "send_message", 14, ("contact", "message", "app"),
        ("text {contact}", "message {contact}", "send a message to {contact}",
         "send {contact} a message", "write to {contact}", "send a text to {contact}",
         "drop {contact} a line", "tell {contact} that {message}",
         "let {contact} know that {message}"),
        ("I want to text {contact}", "I need to message {contact}"),
        ("saying {message}", "to say {message}", "with the words {message}", "and say {message}",
         "on {app}", "via {app}", "using {app}"),
        required=("message",),
    ),
    Intent(
        "get_weather", 12, ("city", "day"),
        ("check the weather", "show me the forecast", "tell me the weather",
         "get the weather report", "look up the forecast"),
        ("what's the weather", "what is the forecast", "how's the weather",
         "what will the weather be like", "is it going to rain", "will it be sunny",
         "I need the weather forecast"),
        ("in {city}", "for {city}", "on {day}", "{day:when}", "for {day:when}"),
    ),
    Intent(
        "turn_on", 12, ("device", "room", "time"),
        ("turn on the {device}", "turn the {device} on", "switch on the {device}",
         "switch the {device} on", "power up the {device}", "start the {device}",
         "activate the {device}"),
        ("I want the {device} on", "I need the {device} running"),
        ("in the {room}", "at {time}", "from {time}"),
    ),
    Intent(
        "set_alarm", 11, ("time", "day", "name"),
        ("set an alarm for {time}", "wake me up at {time}", "wake me at {time}",
         "create an alarm at {time}", "set my alarm clock to {time}", "add a {time} alarm",
         "put an alarm on for {time}"),
        ("I need an alarm at {time}", "I want to wake up at {time}", "I have to get up at {time}"),
        ("on {day}", "{day:when}", "for {day:when}", "called {name}", "with the label {name}"),
    ),
    Intent(
        "turn_off", 10, ("device", "room", "time"),
        ("turn off the {device}", "turn the {device} off", "switch off the {device}",
         "switch the {device} off", "shut off the {device}", "power down the {device}",
         "stop the {device}"),
        ("I want the {device} off", "nobody needs the {device}"),
        ("in the {room}", "at {time}", "after {time}"),
    ),
    Intent(
        "add_to_list", 9, ("item", "list"),
        ("add {item}", "put {item}", "write {item}", "place {item}", "include {item}"),
        ("I want {item}", "I need {item}", "we need {item}"),
        ("on my {list} list", "on the {list} list", "onto my {list} list", "onto the {list} list"),
        required=("list",),
    ),
    Intent(
        "start_timer", 8, ("duration", "name"),
        ("start a timer for {duration}", "set a timer for {duration}", "start a {duration} timer",
         "set a {duration} timer", "count down {duration}", "run a timer for {duration}"),
        ("I need a timer for {duration}", "I want a {duration} countdown"),
        ("for the {name}", "called {name}", "named {name}", "with the label {name}"),
    ),
    Intent(
        "navigate_to", 7, ("place", "via", "vehicle"),
        ("navigate to {place}", "take me to {place}", "get directions to {place}",
         "guide me to {place}", "show me the way to {place}", "find a route to {place}"),
        ("how do I get to {place}", "I need to get to {place}", "I want to go to {place}"),
        ("via {via:city}", "through {via:city}", "by {vehicle}", "by way of {via:city}"),
    ),
    Intent(
        "schedule_meeting", 6, ("contact", "day", "time", "topic"),
        ("schedule a meeting with {contact}", "set up a meeting with {contact}",
         "arrange a meeting with {contact}", "plan a meeting with {contact}",
         "book a meeting with {contact}"),
        ("I need to meet {contact}", "I'd like to meet with {contact}"),
        ("on {day}", "{day:when}", "at {time}", "about {topic}", "to discuss {topic}"),
    ),
    Intent(
        "book_table", 6, ("restaurant", "guests", "time", "day"),
        ("book a table", "reserve a table", "get us a table", "make a reservation", "find a table"),
        ("I'd like a table", "we need a table", "I want a reservation"),
        ("at {restaurant}", "for {guests}", "at {time}", "on {day}", "{day:when}"),
        required=("restaurant",),
    ),
    Intent(
        "convert", 5, ("amount", "unit"),
        ("convert {amount}", "change {amount}", "calculate {amount}", "express {amount}"),
        ("how much is {amount}", "what is {amount}"),
        ("to {unit}", "into {unit}", "in {unit}"),
        required=("unit",),
    ),
    Intent(
        "translate", 4, ("text", "language"),
        ("translate {text}", "put {text}", "translate the phrase {text}", "rephrase {text}"),
        ("I need {text} translated", "I'd like {text} translated"),
        ("in {language}", "into {language}"),
        required=("language",),
    ),
    Intent(
        "set_temperature", 4, ("degrees", "room", "time"),
        ("set the temperature to {degrees}", "heat up to {degrees}",
         "set the thermostat to {degrees}", "change the temperature to {degrees}",
         "make it {degrees}"),
        ("I want it to be {degrees}", "I'd like it at {degrees}"),
        ("in the {room}", "by {time}", "at {time}"),
    ),
    Intent(
        "call_contact", 2, ("contact", "phone"),
        ("call {contact}", "phone {contact}", "ring {contact}", "give {contact} a call"),
        ("I want to call {contact}", "I need to phone {contact}"),
        ("on {phone:line}", "using {phone:line}"),
    ),
)  # fmt: skip


def command(intent: str, slots: dict[str, str]) -> str:
    """The assistant's answer: one JSON object, the intent first."""
    return json.dumps({"intent": intent, **slots}, ensure_ascii=False)


@cache
def slots_of(template: str) -> tuple[str, ...]:
    """The slots of a template, in the order of their appearance."""
    return tuple(slot["key"] for slot in SLOT.finditer(template))


def is_held_back(intent: Intent, combination: Sequence[str]) -> bool:
    """Whether training never shows this combination: one in four, and never a core alone.

    Counting through the parts, instead of drawing lots, leaves every part in other combinations.
    """
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
        (slot,) = slots_of(clause)
        if slot not in slots_of(core):
            clauses_of.setdefault(slot, []).append(clause)
    wanted = [slot for slot in clauses_of if slot in intent.required]
    optional = [slot for slot in clauses_of if slot not in intent.required and rng.random() < 0.5]
    rng.shuffle(optional)
    wanted += optional[: MAX_SLOTS - len(slots_of(core)) - len(wanted)]
    rng.shuffle(wanted)
    clauses = [rng.choice(clauses_of[slot]) for slot in wanted]
    if wanted and wanted[0] in FRONT and rng.random() < 0.25:
        return (f"{clauses[0]},", core, *clauses[1:])
    return (core, *clauses)


def _dress(intent: Intent, combination: Sequence[str], rng: Random) -> str:
    """The combination with a greeting, a polite opening, a tail and a mark, all optional."""
    front = [part for part in combination[:1] if part.endswith(",")]
    core, *clauses = combination[len(front) :]
    opening = [rng.choice(GREETINGS)] if rng.random() < 0.25 else []
    polite = []
    if core in intent.commands and rng.random() < 0.5:
        polite = [rng.choice(POLITE_ORDERS + POLITE_QUESTIONS)]
    asks = core.split()[0] in QUESTION_WORDS or any(part in POLITE_QUESTIONS for part in polite)
    tail = rng.choice(TAILS) if rng.random() < 0.2 else ""
    mark = rng.choice(("", "", "?") if asks else ("", "", ".", "!"))
    return " ".join([*opening, *front, *polite, core, *clauses]) + tail + mark
