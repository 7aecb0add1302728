"""Metrics of generated answers: exact match, and commands written as one JSON object.

A command is a JSON object with a text field that names what to do (its name is a parameter) and
anything else beside it. Its slots are the leaves beside that field: a path and a value each, so

    {"intent": "set_alarm", "slots": {"time": "7:30", "days": ["sat", "sun"]}}

has the slots slots.time = "7:30", slots.days.0 = "sat", slots.days.1 = "sun". Values compare by
their JSON text: 1, 1.0, "1" and true all differ. Empty objects and lists hold no slot.
"""

import difflib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, Self

from ftcore.errors import DataError
from ftcore.evaluate.metrics import OUTSIDE, ClassificationMetrics

Leaves = dict[tuple[str | int, ...], str]


def exact_match(target: str, predicted: str) -> bool:
    """Equal character by character, surrounding whitespace stripped and nothing else done."""
    return target.strip() == predicted.strip()


def parse_object(text: str) -> dict[str, Any] | None:
    """The JSON object that `text` is, whitespace around it allowed; None for anything else.

    NaN and Infinity are not JSON. Of a repeated name the last value counts.
    """
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):  # the latter: a model that repeats "[" for ever
        return None
    return value if isinstance(value, dict) else None


def json_valid(text: str) -> bool:
    """Whether `text` is one JSON object and nothing else."""
    return parse_object(text) is not None


def intent_labels(targets: Iterable[str], *, intent: str = "intent") -> list[str]:
    """The distinct intents of `targets`, sorted. Raises DataError on one that is no command."""
    return sorted({_command(target, intent)[intent] for target in targets})


class JsonCommandMetrics:
    """How well generated commands match the wanted ones.

    labels          the intents there are; a generated intent that is none of them is wrong and
                    counts as metrics.OUTSIDE
    intent          name of the field that holds the intent
    intents         the ClassificationMetrics of the intents (per class, confusion)

    json_valid              share of the rows whose answer is one JSON object
    exact_match             share equal as text (see `exact_match`)
    exact_match_object      share equal as objects: order of names and spacing are free
    intent_accuracy, intent_{precision,recall,f1}_macro     see ClassificationMetrics
    slot_precision, slot_recall, slot_f1    right / given, right / wanted, 2 right / (given +
                    wanted) over the slots of all rows; right: the same value at the same path

    0/0 is NaN, there being nothing to judge: no rows, no slots given, no slots wanted. (The
    intent_* metrics keep the rules of ClassificationMetrics.)
    """

    def __init__(self, labels: Sequence[str], *, intent: str = "intent") -> None:
        self.intent = intent
        self.intents = ClassificationMetrics(labels)
        self.tally: Counter[str] = Counter()
        self._ids = {label: i for i, label in enumerate(self.intents.labels)}

    def update(self, target: str, predicted: str) -> dict[str, bool]:
        """Count one row; returns its verdicts, for predictions.jsonl and paired tests.

        raises          DataError: the target is no command, or its intent is not in the labels
        """
        wanted, given = _command(target, self.intent), parse_object(predicted)
        target_id = self._ids.get(wanted[self.intent])
        if target_id is None:
            name = wanted[self.intent]
            nearest = difflib.get_close_matches(name, self._ids, n=3, cutoff=0.0)
            raise DataError(
                f"target has {self.intent} {name!r}, which is none of the {len(self._ids)} labels"
                f" (nearest: {', '.join(nearest)}): add it to the labels or mend the row"
            )
        given_intent = (given or {}).get(self.intent)
        # A generated intent may be of any JSON type, lists included, which cannot be looked up.
        given_id = self._ids.get(given_intent, OUTSIDE) if isinstance(given_intent, str) else OUTSIDE
        wanted_leaves, given_leaves = _leaves(wanted), _leaves(given or {})
        verdicts = {
            "json_valid": given is not None,
            "exact_match": exact_match(target, predicted),
            "exact_match_object": given is not None and wanted_leaves == given_leaves,
            "intent_correct": given_id == target_id,
        }
        self.intents.update([target_id], [given_id])
        wanted_slots, given_slots = self._slots(wanted_leaves), self._slots(given_leaves)
        self.tally.update(verdicts)
        self.tally.update(
            rows=1,
            slots_right=len(wanted_slots & given_slots),
            slots_wanted=len(wanted_slots),
            slots_given=len(given_slots),
        )
        return verdicts

    def merge(self, other: Self) -> None:
        """Add what `other` has counted over the same labels."""
        self.intents.merge(other.intents)
        self.tally.update(other.tally)

    def compute(self) -> dict[str, float]:
        """The metrics named above, in that order."""
        n, intents = self.tally, self.intents.compute()
        rows, right, wanted, given = (
            n[key] for key in ("rows", "slots_right", "slots_wanted", "slots_given")
        )
        return {
            "json_valid": _share(n["json_valid"], rows),
            "exact_match": _share(n["exact_match"], rows),
            "exact_match_object": _share(n["exact_match_object"], rows),
            "intent_accuracy": intents["accuracy"],
            "intent_precision_macro": intents["precision_macro"],
            "intent_recall_macro": intents["recall_macro"],
            "intent_f1_macro": intents["f1_macro"],
            "slot_precision": _share(right, given),
            "slot_recall": _share(right, wanted),
            "slot_f1": _share(2 * right, given + wanted),
        }

    def _slots(self, leaves: Leaves) -> set[tuple[tuple[str | int, ...], str]]:
        return {
            (path, value)
            for path, value in leaves.items()
            if path != (self.intent,) and value not in ("{}", "[]")
        }


def _command(target: str, intent: str) -> dict[str, Any]:
    command = parse_object(target)
    if command is None or not isinstance(command.get(intent), str):
        raise DataError(
            f"target {target[:80]!r} is not a JSON object with a text field {intent!r}: mend the"
            " row or name the field that holds the intent"
        )
    return command


def _leaves(command: dict[str, Any]) -> Leaves:
    """{path: JSON text}; an empty object or list is a leaf too, so equal leaves, equal objects."""
    leaves, open_items = {}, [((), command)]
    # A stack, not recursion: generated objects nest deeper than Python's stack goes.
    while open_items:
        path, value = open_items.pop()
        if value and isinstance(value, dict):
            open_items += [((*path, name), item) for name, item in value.items()]
        elif value and isinstance(value, list):
            open_items += [((*path, i), item) for i, item in enumerate(value)]
        else:
            leaves[path] = json.dumps(value)
    return leaves


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
