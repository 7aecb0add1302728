"""Metrics of generated answers: exact match, the words that they share with a reference, and
commands written as one JSON object.

A command is a JSON object with a text field that names what to do, the intent, and anything else
beside it. Its slots are the leaves of the rest, each a path and a value:

    {"intent": "set_alarm", "slots": {"time": "7:30", "days": ["sat", "sun"]}}

has the slots slots.time = "7:30", slots.days.0 = "sat" and slots.days.1 = "sun". Values compare by
their JSON text: 1, 1.0, "1" and true all differ. Empty objects and lists hold no slot.
"""

import json
import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from ftcore.errors import DataError
from ftcore.evaluate.metrics import OUTSIDE, ClassificationMetrics

PUNCTUATION = str.maketrans("", "", string.punctuation)

def exact_match(target: str, predicted: str) -> bool:
    """Equal character by character, surrounding whitespace stripped and nothing else done."""
    return target.strip() == predicted.strip()

def parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object that `text` is, whitespace around it allowed; None for anything else, NaN and
    Infinity among it. Of a repeated name the last value counts."""
    try:
        value = json.loads(text, parse_constant=int)  # refuses NaN and Infinity
    except (ValueError, RecursionError):  # the latter: a model that repeats "[" for ever
        return None
    return value if isinstance(value, dict) else None

def intent_labels(targets: Iterable[str], *, intent: str = "intent") -> list[str]:
    """The distinct intents of `targets`, sorted. Raises DataError on one that is no command."""
    return sorted({_command(target, intent)[intent] for target in targets})

class JsonCommandMetrics:
    """How well generated commands match the wanted ones.

    labels                  the intents there are; a generated one that is none of them is OUTSIDE
    intent                  name of the field that holds the intent
    json_valid              share of the rows whose answer is one JSON object
    exact_match             share equal as text (see `exact_match`)
    exact_match_object      share equal as objects: order of names and spacing are free
    intent_accuracy, intent_{precision,recall,f1}_macro     of `intents`, ClassificationMetrics
    slot_precision, slot_recall, slot_f1    right / given, right / wanted, 2 right / (given +
                            wanted), slots of all rows; right: the same value at the same path

    0/0 is NaN, there being nothing to judge, but in the intent_* metrics.
    """

    def __init__(self, labels: Sequence[str], *, intent: str = "intent") -> None:
        self.intent = intent
        self.intents = ClassificationMetrics(labels)
        self._ids = {label: i for i, label in enumerate(self.intents.labels)}
        self._tally: Counter[str] = Counter()

    def update(self, target: str, predicted: str) -> dict[str, bool]:
        """Count one row; returns whether it is json_valid, exact_match, exact_match_object and
        intent_correct. Raises DataError: the target is no command, or its intent no label."""
        wanted, given = _command(target, self.intent), parse_object(predicted)
        label, name = wanted[self.intent], given and given.get(self.intent)
        if label not in self._ids:
            nearest = ", ".join(get_close_matches(label, self._ids, cutoff=0.0))
            what = f"target {self.intent} {label!r} is none of the {len(self._ids)} labels"
            raise DataError(f"{what} (nearest: {nearest}): add it to the labels or mend the row")
        # A generated intent may be of any JSON type, and a list cannot be looked up.
        predicted_id = self._ids.get(name, OUTSIDE) if isinstance(name, str) else OUTSIDE
        wanted_leaves, given_leaves = _leaves(wanted), _leaves(given or {})
        verdicts = {"json_valid": given is not None, "exact_match": exact_match(target, predicted),
                    "exact_match_object": wanted_leaves == given_leaves,
                    "intent_correct": predicted_id == self._ids[label]}
        slots, found = ({(path, value) for path, value in leaves.items()
                         if path != (self.intent,) and value not in ("{}", "[]")}
                        for leaves in (wanted_leaves, given_leaves))
        self.intents.update([self._ids[label]], [predicted_id])
        self._tally.update(verdicts)
        self._tally.update(rows=1, right=len(slots & found), wanted=len(slots), given=len(found))
        return verdicts

    def compute(self) -> dict[str, float]:
        """The metrics named above, in that order."""
        n, intents = self._tally, self.intents.compute()
        shares = ("json_valid", "exact_match", "exact_match_object")
        known = ("accuracy", "precision_macro", "recall_macro", "f1_macro")
        return {**{name: _ratio(n[name], n["rows"]) for name in shares},
                **{f"intent_{name}": intents[name] for name in known},
                "slot_precision": _ratio(n["right"], n["given"]),
                "slot_recall": _ratio(n["right"], n["wanted"]),
                "slot_f1": _ratio(2 * n["right"], n["given"] + n["wanted"])}

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

def text_metrics(target: str, predicted: str) -> dict[str, float]:
    """Of a free text, whose means are shown."""
    return {"exact_match": exact_match(target, predicted),
            "json_valid": parse_object(predicted) is not None,
            "token_f1": token_f1(target, predicted)}
