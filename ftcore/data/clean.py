"""Texts made regular, and what is wrong with them: mis-decoded bytes, personal data.

`normalised` and, on request, `redacted` change a text; all else is for reports. Patterns stand in
patterns.toml.
"""

import re
import tomllib
import unicodedata
from collections.abc import Collection
from functools import cache
from html import unescape as html_unescape
from html.entities import html5
from pathlib import Path
from typing import Literal

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
    table = tomllib.loads((Path(__file__).parent / "patterns.toml").read_text("utf-8"))
    kinds = "|".join(f"(?P<{kind}>{pattern})" for kind, pattern in table["personal"].items())
    patterns = {name: re.compile(pattern, re.X) for name, pattern in table["patterns"].items()}
    return patterns | {"personal": re.compile(kinds, re.X | re.A | re.I)}
