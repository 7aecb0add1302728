"""Metrics of generated answers: exact match, the words that they share with a reference, and
commands written as one JSON object.

A command is a JSON object with a text field that names what to do, the intent, and anything else
beside it. Its slots are the leaves of the rest, each a path and a value:

    {"intent": "set_alarm", "slots": {"time": "7:30", "days": ["sat", "sun"]}}

has the slots slots.time = "7:30", slots.days.0 = "sat" and slots.days.1 = "sun". Values compare by
their JSON text: 1, 1.0, "1" and true all differ.
"""

import json
import math
import re
import string
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from ftcore.errors import DataError
from ftcore.evaluate.metrics import OUTSIDE, class_figures, confusions

JudgedCommand = tuple[dict[str, bool], tuple[str, Any], tuple[int, int, int]]
PUNCTUATION = str.maketrans("", "", string.punctuation)

def exact_match(target: str, predicted: str) -> bool:
    """Equal character by character, surrounding whitespace stripped and nothing else done."""
    return target.strip() == predicted.strip()

def parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object that `text` is; None for anything else, NaN and Infinity among it."""
    try:
        value = json.loads(text, parse_constant=int)  # refuses NaN and Infinity
    except (ValueError, RecursionError):  # the latter: a model that repeats "[" for ever
        return None
    return value if isinstance(value, dict) else None

def judged_command(target: str, predicted: str, *, intent: str = "intent") -> JudgedCommand:
    """Whether an answer is json_valid, exact_match, exact_match_object, intent_correct; the intent
    wanted and given; slots right (same path and value), given, wanted. DataError: no command."""
    wanted, given = _command(target, intent), parse_object(predicted)
    leaves = [_leaves(wanted), _leaves(given or {})]
    slots, found = ({(path, value) for path, value in each.items()
                     if path != (intent,) and value not in ("{}", "[]")} for each in leaves)
    names = wanted[intent], given and given.get(intent)
    verdicts = {"json_valid": given is not None, "exact_match": exact_match(target, predicted),
                "exact_match_object": leaves[0] == leaves[1],
                "intent_correct": names[0] == names[1]}
    return verdicts, names, (len(slots & found), len(found), len(slots))

def command_figures(judged: Iterable[JudgedCommand]) -> dict[str, float]:
    """Of all rows together: shares json_valid, exact_match, and exact_match_object, where order of
    names and spacing are free; intent_accuracy, intent_{precision,recall,f1}_macro, of the intents
    of the targets as classes; slot_precision = right / given, slot_recall = right / wanted, slot_f1
    = 2 right / (given + wanted), slots of all rows; 0/0 of slots is NaN: there are none."""
    verdicts, names, slots = zip(*judged, strict=True)
    right, given, wanted = map(sum, zip(*slots, strict=True))
    ids = {name: index for index, name in enumerate(sorted({name for name, _ in names}))}
    # A generated intent may be of any JSON type, and a list cannot be looked up.
    found = [(ids[a], ids.get(b, OUTSIDE) if isinstance(b, str) else OUTSIDE) for a, b in names]
    intents = class_figures(confusions(*np.array(found).T, len(ids)))
    known = ("accuracy", "precision_macro", "recall_macro", "f1_macro")
    return {**{name: sum(row[name] for row in verdicts) / len(verdicts)
               for name in ("json_valid", "exact_match", "exact_match_object")},
            **{f"intent_{name}": intents[name] for name in known},
            "slot_precision": _ratio(right, given), "slot_recall": _ratio(right, wanted),
            "slot_f1": _ratio(2 * right, given + wanted)}

def _command(target: str, intent: str) -> dict[str, Any]:
    command = parse_object(target)
    if command and isinstance(command.get(intent), str):
        return command
    what = f"target {target[:80]!r} is not a JSON object with a text field {intent!r}"
    raise DataError(f"{what}: mend the row or name the field that holds the intent")

def _leaves(command: dict[str, Any]) -> dict[tuple, str]:
    """{path: JSON text}; an empty object or list is a leaf too, so equal leaves, equal objects."""
    leaves, open_items = {}, [((), command)]
    # A stack, not recursion: generated objects may nest deeper than Python's stack goes.
    while open_items:
        path, value = open_items.pop()
        if value and isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            open_items += [((*path, key), item) for key, item in items]
        else:
            leaves[path] = json.dumps(value)
    return leaves

def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan

def token_f1(target: str, predicted: str) -> float:
    """2 common / (sum of both lengths) of tokens: lower case, ASCII punctuation and the articles
    a, an, the dropped, split at white space. 1 where both texts have none, 0 where one has.
    source: Rajpurkar et al. 2016, arXiv:1606.05250; 2018, arXiv:1806.03822 (no tokens left)"""
    bare = (text.lower().translate(PUNCTUATION) for text in (target, predicted))
    wanted, given = (Counter(re.sub(r"\b(a|an|the)\b", " ", text).split()) for text in bare)
    length = wanted.total() + given.total()
    return 2 * (wanted & given).total() / length if length else 1.0
