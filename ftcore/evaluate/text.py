"""What each generated answer is worth beside the expected one: as text, or as a command.

A command is a JSON object with a text field that names what to do, the intent. Its slots are the
leaves of the rest, each a path and a value: {"intent": "wake", "at": {"days": ["sat", "sun"]}} has
at.days.0 = "sat" and at.days.1 = "sun". Values compare by their JSON text: 1, 1.0 and "1" differ.
"""

import json
import re
import string
from collections import Counter
from typing import Any

from ftcore.errors import DataError

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

def token_f1(target: str, predicted: str) -> float:
    """2 common / (sum of both lengths) of tokens: lower case, ASCII punctuation and the articles
    a, an, the dropped, split at white space. 1 where both texts have none, 0 where one has.
    source: Rajpurkar et al. 2016, arXiv:1606.05250; 2018, arXiv:1806.03822 (no tokens left)"""
    bare = (text.lower().translate(PUNCTUATION) for text in (target, predicted))
    wanted, given = (Counter(re.sub(r"\b(a|an|the)\b", " ", text).split()) for text in bare)
    length = wanted.total() + given.total()
    return 2 * (wanted & given).total() / length if length else 1.0

def judged_text(target: str, predicted: str) -> dict[str, float]:
    return {"exact_match": exact_match(target, predicted),
            "json_valid": parse_object(predicted) is not None,
            "token_f1": token_f1(target, predicted)}

def judged_command(target: str, predicted: str, *, intent: str = "intent") -> dict[str, float]:
    """Whether an answer is a JSON object, the very text, an equal object (order of names and
    spacing are free), has the intent; slot_f1_of_row = 2 right / (given + wanted) slots, of none:
    as exact_match_object, and of several rows the mean. DataError: the target is no command."""
    wanted, given = parse_object(target), parse_object(predicted)
    if not isinstance((wanted or {}).get(intent), str):
        what = f"target {target[:80]!r} is not a JSON object with a text field {intent!r}"
        raise DataError(f"{what}: mend the row or name the field that holds the intent")
    leaves = [_leaves(wanted), _leaves(given or {})]
    slots, found = ({(path, value) for path, value in each.items()
                     if path != (intent,) and value not in ("{}", "[]")} for each in leaves)
    is_equal, count = leaves[0] == leaves[1], len(slots) + len(found)
    return {"json_valid": given is not None, "exact_match": exact_match(target, predicted),
            "exact_match_object": is_equal,
            "intent_accuracy": (given or {}).get(intent) == wanted[intent],
            "slot_f1_of_row": 2 * len(slots & found) / count if count else float(is_equal)}

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
