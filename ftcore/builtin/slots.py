"""Slot values of the chat data set: a small grammar, and the rule that keeps new values unseen.

A kind is a list of forms (words/slots.toml); in a form `{kind}` stands for a form of that kind. A
value belongs to the training rows or to the new ones by a hash of its text (`is_new`), so the two
never meet, whatever the seed. Long lists (names, cities, things: from `SPLIT_FROM` entries on) are
parted word by word as well: a new name is made of words that no training name has shown.
"""

import re
import unicodedata
import zlib
from collections.abc import Mapping
from functools import cache
from random import Random

from . import wording

SLOT = re.compile(r"\{(?P<key>\w+)(?::(?P<kind>\w+))?\}")  # {key}, or {key:kind} if they differ
SPLIT_FROM = 40
MAX_WORDS = 4

def kinds_of(template: str) -> dict[str, str]:
    """The slots of a template in order of appearance, each with the kind of its value."""
    return {slot["key"]: slot["kind"] or slot["key"] for slot in SLOT.finditer(template)}

def filled(template: str, values: Mapping[str, str]) -> str:
    """The template with each slot replaced by its value."""
    return SLOT.sub(lambda slot: values[slot["key"]], template)

def is_new(text: str) -> bool:
    """Whether a value is held back from training: one in four is."""
    return zlib.crc32(unicodedata.normalize("NFC", text).casefold().encode()) % 4 == 0

@cache
def forms(kind: str, new: bool) -> tuple[str, ...]:
    """The forms of a kind; of a long list only those of one side."""
    every = wording("slots")[kind]
    return tuple(form for form in every if len(every) < SPLIT_FROM or is_new(form) == new)

def draw(kind: str, rng: Random, *, new: bool) -> str:
    """A value of that kind, `MAX_WORDS` words at most, from the training side or the new one."""

    def expand(kind: str) -> str:
        return SLOT.sub(lambda part: expand(part["key"]), rng.choice(forms(kind, new)))

    while True:
        value = expand(kind)
        if is_new(value) == new and len(value.split()) <= MAX_WORDS:
            return value
