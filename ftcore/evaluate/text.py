"""Metrics of generated answers: exact match, how much of a reference they repeat, and commands
written as one JSON object.

token_f1 and rouge_l are figures of one row, 0 ... 1; that of a corpus is their mean. BLEU and chrF,
0 ... 100, are figures of a corpus: the S counts of its rows, int64, are added and the figure read
from the sum, so any split into batches or ranks gives the same, and a resample is a sum too.

Of the n-grams of order n, m_n match (each as often as it stands in both texts), p_n are in the
predicted text and t_n in the target:

    BLEU = 100 min(1, exp(1 - t_1 / p_1)) (product over n = 1 ... 4 of m_n / p_n)^(1/4)    words
    chrF = 100 * 5 P R / (4 P + R), P and R the means of m_n / p_n and m_n / t_n    characters

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

import numpy as np

from ftcore.errors import DataError
from ftcore.evaluate.metrics import OUTSIDE, ClassificationMetrics
from ftcore.evaluate.significance import Figures

BLEU_SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:ftcore-0.1.0"
CHRF_SIGNATURE = "nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:ftcore-0.1.0"
PUNCTUATION = str.maketrans("", "", string.punctuation)
# NIST's mteval-v13a.pl, applied in this order. A match takes its neighbour along, so that
# the second dot of "a..5" stays with the 5.
RULES_13A = {
    "<skipped>": "", "-\n": "", "\n": " ", "&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">",
    r"([!-&(-+/:-@[-`{-~])": r" \1 ",  # ASCII punctuation but ' , - .
    r"([^0-9])([.,])": r"\1 \2 ", r"([.,])([^0-9])": r" \1 \2",  # 3.5 and 1,000 stay whole
    r"([0-9])-": r"\1 - ",
}  # fmt: skip

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
        slots, found = self._slots(wanted_leaves), self._slots(given_leaves)
        self.intents.update([self._ids[label]], [predicted_id])
        self._tally.update(verdicts)
        self._tally.update(rows=1, right=len(slots & found), wanted=len(slots), given=len(found))
        return verdicts

    def compute(self) -> dict[str, float]:
        """The metrics named above, in that order."""
        n, intents = self._tally, self.intents.compute()
        shares = ("json_valid", "exact_match", "exact_match_object")
        macros = ("precision_macro", "recall_macro", "f1_macro")
        return {**{name: _ratio(n[name], n["rows"]) for name in shares},
                **{f"intent_{name}": intents[name] for name in ("accuracy", *macros)},
                "slot_precision": _ratio(n["right"], n["given"]),
                "slot_recall": _ratio(n["right"], n["wanted"]),
                "slot_f1": _ratio(2 * n["right"], n["given"] + n["wanted"])}

    def _slots(self, leaves: dict[tuple, str]) -> set[tuple[tuple, str]]:
        slots = leaves.keys() - {(self.intent,)}
        return {(path, leaves[path]) for path in slots if leaves[path] not in ("{}", "[]")}

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

def rouge_l(target: str, predicted: str) -> float:
    """2 L / (sum of both lengths), L that of the longest common subsequence of tokens: runs of a-z
    and 0-9 in the lower-cased text, not stemmed. 0 where either text has none.
    source: Lin 2004, ACL W04-1013. cost: p_1 operations on t_1 bits
    source: Hyyro 2004, Bit-parallel LCS-length computation revisited (L)"""
    wanted, given = (re.findall("[a-z0-9]+", text.lower()) for text in (target, predicted))
    places = dict.fromkeys(wanted, 0)
    for i, token in enumerate(wanted):
        places[token] |= 1 << i
    all_bits = free = (1 << len(wanted)) - 1
    for token in given:  # L of wanted[:i] and the tokens so far: zeros in the low i bits of free
        hits = free & places.get(token, 0)
        free = (free + hits | free - hits) & all_bits
    return 2 * (all_bits ^ free).bit_count() / max(len(wanted) + len(given), 1)

def bleu_counts(target: str, predicted: str) -> np.ndarray:
    """m_1 ... m_4, p_1 ... p_4, and the lengths p_1 and t_1: S = 10."""
    counts_34 = _ngram_counts(_words(target), _words(predicted), 4)
    return np.concatenate([counts_34[:2].reshape(-1), counts_34[1:, 0]])

def bleu(counts_S: np.ndarray) -> float:
    """BLEU of a sum of `bleu_counts`. The i-th order without a match counts as 2^-i of one; 0 where
    no word matches, or no predicted text has four words.
    source: Papineni et al. 2002, ACL P02-1040; Chen and Cherry 2014, ACL W14-3346, method 3"""
    matches_4, predicted_4, (length, target_length) = _parts(counts_S, 4, 4, 2)
    if not matches_4[0] or not predicted_4[3]:
        return 0.0
    missed_4 = matches_4 == 0
    precision_4 = np.where(missed_4, 0.5 ** missed_4.cumsum(), matches_4) / predicted_4
    return 100 * math.exp(min(0, 1 - target_length / length) + np.log(precision_4).mean())

def chrf_counts(target: str, predicted: str) -> np.ndarray:
    """m_1 ... m_6, p_1 ... p_6, t_1 ... t_6 of characters, white space left out: S = 18. p_n is 0
    in a row whose t_n is."""
    counts_36 = _ngram_counts("".join(target.split()), "".join(predicted.split()), 6)
    counts_36[1] *= counts_36[2] > 0
    return counts_36.reshape(-1)

def chrf(counts_S: np.ndarray) -> float:
    """chrF of a sum of `chrf_counts`: beta 2, means over the n with p_n and t_n above 0; 0 where
    nothing matches. source: Popovic 2015, ACL W15-3049"""
    matches_6, predicted_6, target_6 = _parts(counts_S, 6, 6, 6)
    both_6 = (predicted_6 > 0) & (target_6 > 0)
    p, r = (float((matches_6[both_6] / x_6[both_6]).sum()) for x_6 in (predicted_6, target_6))
    return 100 * 5 * p * r / (4 * p + r) / both_6.sum() if p else 0.0

def _words(text: str) -> tuple[str, ...]:
    text = f" {text.rstrip()} "
    for pattern, new in RULES_13A.items():
        text = re.sub(pattern, new, text)
    return tuple(text.split())

def _ngram_counts(target: Sequence[str], predicted: Sequence[str], order: int) -> np.ndarray:
    """int64 (3, order): m_n, p_n and t_n."""
    counts, texts = [], (predicted, target)
    for n in range(1, order + 1):
        given, wanted = (Counter(x[i : i + n] for i in range(len(x) - n + 1)) for x in texts)
        counts.append([(given & wanted).total(), given.total(), wanted.total()])
    return np.array(counts, dtype=np.int64).T

def _parts(counts_S: np.ndarray, *sizes: int) -> list[np.ndarray]:
    if counts_S.shape != (sum(sizes),):
        what = f"counts of shape {counts_S.shape}: must be ({sum(sizes)},)"
        raise DataError(f"{what}, the counts of the rows added up")
    return np.split(counts_S, np.cumsum(sizes)[:-1])

def text_figures(targets: Sequence[str], predicted: Sequence[str]) -> Figures:
    """Of free text: means of exact_match, json_valid, token_f1 and rouge_l; bleu and chrf."""
    pairs = list(zip(targets, predicted, strict=True))
    each = (exact_match, lambda _, said: parse_object(said) is not None, token_f1, rouge_l)
    means_BS = np.array([[float(measure(*pair)) for measure in each] for pair in pairs])
    counts = ([count(*pair) for pair in pairs] for count in (bleu_counts, chrf_counts))
    bleu_BS, chrf_BS = map(np.stack, counts)

    def figures(rows_M: np.ndarray) -> dict[str, float]:
        names = ("exact_match", "json_valid", "token_f1", "rouge_l")
        found = dict(zip(names, means_BS[rows_M].mean(0).tolist(), strict=True))
        sums = bleu(bleu_BS[rows_M].sum(0)), chrf(chrf_BS[rows_M].sum(0))
        return found | {"bleu": sums[0], "chrf": sums[1]}

    return figures
