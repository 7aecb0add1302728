"""Synthetic copy tasks as chats, whose answers can only be predicted by copying.

A small model trained on prose alone does not learn to repeat values that it never saw. Each chat
here asks for something that stands in its own text: a line, a named field, the span after a cue
word, a JSON object of several fields. Values, keys, cue words and wording are drawn at random
(values.py): what is taught is copying, not one task. The plainest form is `echo`; with it in the
mix, copying appears after about a million tokens instead of after many.

A chat is a pure function of (source, lexicon, seed), which opens a random stream of its own.
"""

import json
from collections.abc import Callable, Sequence
from typing import Literal
from tests.bench.chat.phrases import filled, kinds_of

from .values import Draw, Lexicon, copying_words

Turns = list[tuple[str, str]]
Messages = list[dict[str, str]]
Source = Literal["copy", "echo"]

def dump(fields: dict[str, object]) -> str:
    return json.dumps(fields, ensure_ascii=False)

def quoted(draw: Draw, text: str) -> str:
    mark = draw.pick(('"', "'", "`", ""))
    return f"{mark}{text}{mark}"

def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

def aside(draw: Draw) -> str:
    """A sentence that holds nothing asked for."""
    if draw.chance(0.4):
        return f"{draw.pick(draw.lexicon.prose)}."
    opening = draw.pick(("By the way,", "I saw", "Nobody knows", "Thanks for", "Sorry about"))
    return f"{opening} {draw.phrase()}."

def state(draw: Draw, fields: dict[str, str]) -> str:
    """The fields as a sentence, a list or an assignment, in one style for the whole text."""
    style, mark = draw.one_of("statements"), draw.pick(("", "", "", '"', "'"))
    spaced = draw.chance(0.7)
    parts = [
        style.format(k=key.replace("_", " ") if spaced else key, v=f"{mark}{value}{mark}")
        for key, value in fields.items()
    ]
    text = draw.pick((", ", ", ", "; ", "\n", " and ", ". ")).join(parts)
    return text + draw.pick((".", ".", ""))

def around(draw: Draw, request: str, text: str) -> str:
    """The request before or after the text that it is about, now and then with an aside."""
    if draw.chance(0.25):
        text = f"{aside(draw)} {text}" if draw.chance(0.5) else f"{text} {aside(draw)}"
    gap = draw.pick(("\n", " ", "\n\n"))
    return f"{request}{gap}{text}" if draw.chance(0.6) else f"{text}{gap}{request}"

def repeat(draw: Draw) -> Turns:
    lines = [draw.pick(draw.lexicon.prose) if draw.chance(0.3) else draw.value()]
    lines += [draw.value() for _ in range(draw.pick((0, 0, 1, 1, 2, 3)))]
    text = draw.pick(("\n", ", ", " ")).join(lines)
    request = draw.pick(("Repeat exactly:", "Say this again:", "Copy:", "Write this:", "Echo"))
    return [("user", f"{request} {text}"), ("assistant", text)]

def ask_field(draw: Draw) -> Turns:
    fields = draw.fields(draw.between(2, 6))
    text = state(draw, fields)
    asks = draw.shuffled(fields)[: draw.pick((1, 1, 2, 3))]
    wording = draw.pick(("What is the {}?", "{}?", "Tell me the {}.", "Which {} was given?"))
    turns = [("user", around(draw, wording.format(asks[0]), text)), ("assistant", fields[asks[0]])]
    for key in asks[1:]:
        turns += [("user", wording.format(key)), ("assistant", fields[key])]
    return turns

def answer_json(draw: Draw, text: str, fields: dict[str, str]) -> Turns:
    """Ask for some of the fields by key, in an order of its own; the answer keeps that order."""
    keys = draw.shuffled(fields)[: draw.between(1, len(fields))]
    answer = dump({key: fields[key] for key in keys})
    request = draw.one_of("json_requests").format(listed(keys))
    if draw.chance(0.3):
        return [("system", request), ("user", text), ("assistant", answer)]
    return [("user", around(draw, request, text)), ("assistant", answer)]

def stated_json(draw: Draw) -> Turns:
    fields = draw.fields(draw.between(1, 5))
    text = state(draw, fields)
    if draw.chance(0.4):
        request = draw.pick(("As JSON:", "Write all of this as JSON.", "To JSON."))
        return [("user", around(draw, request, text)), ("assistant", dump(fields))]
    return answer_json(draw, text, fields)

def framed_json(draw: Draw) -> Turns:
    fields: dict[str, str] = {}
    sentences = []
    for frame in (draw.one_of("frames") for _ in range(draw.pick((1, 1, 2)))):
        drawn = {key: getattr(Draw, kind)(draw) for key, kind in kinds_of(frame).items()}
        if drawn.keys().isdisjoint(fields):
            fields |= drawn
            sentences.append(filled(frame, drawn))
    return answer_json(draw, " ".join(sentences), fields)

def cued_json(draw: Draw) -> Turns:
    """Rules give a key to each cue word and a name to each opening; utterances follow."""
    cues = draw.shuffled(copying_words()["cues"])[: draw.between(1, 4)]
    outer, inner, *keys = draw.keys(2 + len(cues))
    key_of = dict(zip(cues, keys, strict=True))
    names = range(draw.between(1, 3))
    name_of = {draw.word(): f"{draw.word()}_{draw.one_of('generic_keys')}" for _ in names}
    nested = draw.chance(0.5)
    rules = [f"{left} -> {right}" for left, right in (*name_of.items(), *key_of.items())]
    head = f"{outer}, {inner}: " if nested else f"{outer}: "
    turns = [("system", head + draw.pick((", ", "\n", "; ")).join(rules))]
    polite = draw.pick(("", "", "please ", "could you ", "I want to "))
    for _ in range(draw.pick((1, 1, 2))):
        opening = draw.pick(tuple(name_of))
        said = {cue: draw.value() for cue in draw.shuffled(cues)[: draw.between(1, len(cues))]}
        spans = " ".join(f"{cue} {value}" for cue, value in said.items())
        filled = {key_of[cue]: value for cue, value in said.items()}
        answer = {outer: name_of[opening], **({inner: filled} if nested else filled)}
        turns += [("user", f"{polite}{opening} {spans}"), ("assistant", dump(answer))]
    return turns

def event_json(draw: Draw) -> Turns:
    """What happened, with some of its details in any order; the answer's order is the event's."""
    name = draw.pick(tuple(copying_words()["events"]))
    event = copying_words()["events"][name]
    core = draw.pick(event["cores"])
    clauses: dict[str, str] = {}
    for clause in draw.shuffled(event["clauses"]):
        (slot,) = kinds_of(clause)
        if slot not in kinds_of(core) and draw.chance(0.5):
            clauses[slot] = clause
    parts = [core, *clauses.values()]
    if clauses and draw.chance(0.2):
        parts = [f"{parts[-1]},", *parts[:-1]]
    opening, ending = draw.one_of("openings"), draw.pick(("", "", ".", "!"))
    template = " ".join(filter(None, (opening, *parts))) + ending
    template = template[0].upper() + template[1:] if draw.chance(0.5) else template
    if draw.chance(0.2):
        template = with_a_typo(draw, template)
    values = {key: getattr(Draw, kind)(draw) for key, kind in kinds_of(template).items()}
    slots = {slot: values[slot] for slot in event["slots"] if slot in values}
    return [("user", filled(template, values)), ("assistant", dump({"event": name, **slots}))]

def with_a_typo(draw: Draw, template: str) -> str:
    """The template with one of its own words misspelt, where one has four letters or more."""
    words = template.split(" ")
    places = [at for at, word in enumerate(words) if len(word) >= 4 and word.isalpha()]
    if places:
        at = draw.pick(places)
        words[at] = draw.misspelt(words[at])
    return " ".join(words)

def lookup(draw: Draw) -> Turns:
    keys = draw.shuffled("abcdefghijklmnpqrstuvwxyz")[: draw.between(3, 8)]
    make = draw.pick((Draw.number, Draw.word, Draw.invented, Draw.code))
    table = {key if draw.chance(0.5) else draw.invented(): make(draw) for key in keys}
    key = draw.pick(tuple(table))
    text = ", ".join(f"{key} = {value}" for key, value in table.items())
    request = draw.pick(("what is {}?", "{} = ?", "find {}", "value of {}?")).format(key)
    return [("user", f"{text}; {request}"), ("assistant", table[key])]

def choose(draw: Draw) -> Turns:
    options = list(dict.fromkeys(draw.value() for _ in range(draw.between(3, 5))))
    right = draw.pick(options)
    text = draw.pick(("Then {} came up again.", "I think it was {}.", "We found {} there.", "{}!"))
    question = f"Which of these occurs: {', '.join(draw.shuffled(options))}?"
    return [("user", f"{aside(draw)} {text.format(right)} {question}"), ("assistant", right)]

def neighbour(draw: Draw) -> Turns:
    words = list(dict.fromkeys(draw.word() for _ in range(draw.between(5, 12))))
    at = draw.between(0, len(words) - 2)
    question, answer = draw.pick((
        (f"Which word comes after {quoted(draw, words[at])}?", words[at + 1]),
        (f"Everything after {quoted(draw, words[at])}:", " ".join(words[at + 1 :])),
        (f"Everything up to {quoted(draw, words[at])}:", " ".join(words[: at + 1])),
        ("The last word?", words[-1]),
        ("One word per line.", "\n".join(words)),
        ("Count them off.", "\n".join(f"{i}. {word}" for i, word in enumerate(words, 1))),
    ))
    return [("user", around(draw, question, " ".join(words))), ("assistant", answer)]

def spell(draw: Draw) -> Turns:
    words = [draw.pick((draw.word, draw.invented))() for _ in range(draw.between(1, 4))]
    mark = draw.pick((" ", "-", ", "))
    answer = "\n".join(mark.join(word) for word in words)
    return [("user", f"Spell with {mark!r}: {' '.join(words)}"), ("assistant", answer)]

def substitute(draw: Draw) -> Turns:
    old, new = draw.phrase(), draw.value()
    ending = draw.pick((" and {}.", ", not {}.", " for {}.", "; see {}."))
    text = draw.pick(draw.lexicon.prose) + ending
    request = f"Put {quoted(draw, new)} in place of {quoted(draw, old)}:"
    return [("user", f"{request} {text.format(old)}"), ("assistant", text.format(new))]

TASKS: tuple[Callable[[Draw], Turns], ...] = (
    *[event_json] * 30, *[framed_json] * 5, *[cued_json] * 5, *[stated_json] * 4,
    *[ask_field] * 3, *[repeat] * 3,
    lookup, choose, neighbour, spell, substitute,
)

def echo(draw: Draw) -> Turns:
    """Scraps of words without order or sense: nothing but copying predicts their repetition."""
    text = "".join(draw.scrap() for _ in range(draw.between(4, 24))).strip()
    return [("user", text), ("assistant", text)]

def chat(source: Source, lexicon: Lexicon, seed: int) -> Messages:
    """An echo, or a copy task drawn at random; it ends with an assistant's turn."""
    draw = Draw(lexicon, seed)
    turns = echo(draw) if source == "echo" else draw.pick(TASKS)(draw)
    return [{"role": role, "content": content} for role, content in turns]
