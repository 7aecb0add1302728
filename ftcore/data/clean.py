"""Texts made regular, and what is wrong with them: measures, mis-decoded bytes, personal data.

`normalised` and, on request, `redacted` change a text; all else is for reports. Limits and patterns
stand in quality.toml, with their sources.
"""

import math
import re
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping
from functools import cache
from html import unescape as html_unescape
from html.entities import html5
from pathlib import Path
from typing import Any, Literal

Personal = Literal["email", "phone", "card"]

def normalised(text: str, *, form: Literal["nfc", "nfkc"] = "nfc", unescape: bool = False) -> str:
    """One form for texts that look the same; indentation and blanks within lines stay as they are.

    Line breaks of all kinds, form feeds too, become "\\n"; white space at the ends of lines and of
    the text, controls, soft hyphens and zero-width characters that do nothing are dropped. C1
    characters stay, U+0085 too but after "\\r": in 10,000 IMDB reviews each is a byte of
    Windows-1252, and what it stood for would be lost. `mojibake` counts them. With `unescape` HTML
    entities that end in ";" become characters. Steps are repeated until none changes the text."""
    patterns, before = _patterns(), None
    if text.isascii() and not (
        patterns["control"].search(text)
        or " \n" in text or "\t\n" in text or text[-1:].isspace() or (unescape and "&" in text)):
        return text
    while text != before:
        before = text
        if unescape:
            text = patterns["entity"].sub(_character, text)
        text = patterns["break"].sub("\n", unicodedata.normalize(form.upper(), text))
        text = patterns["trailing"].sub("", patterns["unseen"].sub("", text)).rstrip("\n")
    return text

def _character(entity: re.Match[str]) -> str:
    is_known = entity[1][0] == "#" or f"{entity[1]};" in html5
    return html_unescape(f"&{entity[1]};") if is_known else f"&{entity[1]};"

def mojibake(text: str) -> int:
    """How many characters were lost to a wrong encoding, as far as that can be seen."""
    return len(_patterns()["mojibake"].findall(text))

def broken(text: str) -> list[tuple[str, str, float, dict[str, float]]]:
    """Measures of a text that are outside their limits in quality.toml, in the groups repetition,
    symbols and length: group, name, value, and the limit, "min", "max" or both."""
    words = text.split()
    found = {group: measure(text, words) for group, measure in MEASURES.items()}
    return [(group, name, found[group][name], limit)
            for group, limits in _table()["rules"].items() for name, limit in limits.items()
            if not limit.get("min", -math.inf) <= found[group][name] <= limit.get("max", math.inf)]

def _repetition(text: str, words: list[str]) -> dict[str, float]:
    values, size = {}, max(len(text), 1)
    for name, border in (("lines", r"\n+"), ("paragraphs", r"\n\n+")):
        parts = re.split(border, text.strip())
        again = len(parts) - len(counts := Counter(parts))
        characters = sum(map(len, parts)) - sum(map(len, counts))
        values[f"duplicate_{name}"] = again / len(parts)
        values[f"duplicate_{name}_characters"] = characters / size
    grams, counts = dict(enumerate(words)), Counter(words)
    for n in range(2, 11):
        # cost: an n-gram stands twice only where both of the next shorter ones in it do
        twice = {place for place, gram in grams.items() if counts[gram] > 1}
        grams = {p: tuple(words[p : p + n]) for p in grams if p in twice and p + 1 in twice}
        counts = Counter(grams.values()) if grams else {}
        if n < 5:
            top, count = counts.most_common(1)[0] if counts else ((), 0)
            count *= count > 1
            values[f"top_{n}_gram"] = count * len(" ".join(top)) / size
        else:
            values[f"duplicate_{n}_grams"] = _duplicates(grams, n) / size
    return values

def _duplicates(grams: Mapping[int, tuple[str, ...]], n: int) -> int:
    """Characters of the n-grams that stand earlier too, from left to right, without overlap."""
    seen, end, characters = set(), 0, 0
    for place, gram in grams.items():
        if place >= end and gram in seen:
            characters, end = characters + sum(map(len, gram)), place + n
        elif place >= end:
            seen.add(gram)
    return characters

def _symbols(text: str, words: list[str]) -> dict[str, float]:
    size, count = max(len(text), 1), max(len(words), 1)
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    num_lines = max(len(lines), 1)
    bullets, ellipses = (tuple(_table()["marks"][name]) for name in ("bullets", "ellipses"))
    marks = max(text.count("#"), sum(map(text.count, ellipses)))
    alphabetic = sum(word.isalpha() or any(map(str.isalpha, word)) for word in words)
    return {"symbols_per_word": marks / count,
            "bullet_lines": sum(line.startswith(bullets) for line in lines) / num_lines,
            "ellipsis_lines": sum(line.endswith(ellipses) for line in lines) / num_lines,
            "alphabetic_words": alphabetic / count, "digits": len(re.findall(r"\d", text)) / size,
            "whitespace": (len(text) - sum(map(len, words))) / size,
            "urls": sum(map(len, _patterns()["url"].findall(text))) / size,
            "brackets": sum(map(text.count, "()[]{}")) / size}

def _length(text: str, words: list[str]) -> dict[str, float]:
    found = {*text.lower().split()}.intersection(_table()["marks"]["stop_words"])
    return {"mean_word": sum(map(len, words)) / max(len(words), 1), "stop_words": len(found)}

MEASURES = {"repetition": _repetition, "symbols": _symbols, "length": _length}

def personal(text: str) -> list[str]:
    """The kinds of the e-mail addresses, phone numbers and card numbers that a text holds."""
    return [found.lastgroup for found in _found(text)]

def redacted(text: str, kinds: Collection[Personal]) -> str:
    """The text with [EMAIL], [PHONE] or [CARD] in place of personal data of these kinds."""
    for found in reversed(_found(text)):
        if found.lastgroup in kinds:
            text = f"{text[: found.start()]}[{found.lastgroup.upper()}]{text[found.end() :]}"
    return text

def _found(text: str) -> list[re.Match[str]]:
    if "@" not in text and not _patterns()["eight_digits"].search(text):
        return []
    matches = _patterns()["personal"].finditer(text)
    return [m for m in matches if m.lastgroup != "card" or _luhn(m[0]) % 10 == 0]

def _luhn(number: str) -> int:
    """The sum of its digits, every second from the right doubled and its own digits added."""
    digits = [int(c) for c in reversed(number) if c.isdigit()]
    return sum(digits[::2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2])

@cache
def _patterns() -> dict[str, re.Pattern[str]]:
    table = _table()
    kinds = "|".join(f"(?P<{kind}>{pattern})" for kind, pattern in table["personal"].items())
    patterns = {name: re.compile(pattern, re.X) for name, pattern in table["patterns"].items()}
    return patterns | {"personal": re.compile(kinds, re.X | re.A | re.I)}

@cache
def _table() -> dict[str, Any]:
    return tomllib.loads((Path(__file__).parent / "quality.toml").read_text("utf-8"))
