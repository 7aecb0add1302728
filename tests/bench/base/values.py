"""Generators of values to copy, over one random stream.

Plain words, invented names, phrases, numbers, times, dates, prices, codes, addresses, identifiers,
and keys for them: open-ended, so that a text made of them cannot be learned by heart.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeVar
from tests.bench.chat.phrases import wording

T = TypeVar("T")

ACCENTS = {
    "a": "\u00e1\u00e0\u00e4\u00e2\u00e3",
    "e": "\u00e9\u00e8\u00eb\u00ea",
    "i": "\u00ed\u00ef\u00ee\u00ec",
    "n": "\u00f1",
}
ACCENTS |= {"o": "\u00f3\u00f6\u00f4\u00f5", "u": "\u00fc\u00fa", "c": "\u00e7"}
LETTERS = "ABCDEFGHKLMNPQRSTUVWXYZ"

def copying_words() -> dict[str, Any]:
    """The word lists of copying.toml."""
    return wording("copying", Path(__file__).parent)

@dataclass(frozen=True)
class Lexicon:
    """Plain words, dotted or underscored identifiers, lines of prose, and a vocabulary's tokens."""

    words: Sequence[str]
    identifiers: Sequence[str]
    prose: Sequence[str]
    tokens: Sequence[str]

class Draw:
    """One random stream and the value generators over it."""

    def __init__(self, lexicon: Lexicon, seed: int) -> None:
        self.lexicon = lexicon
        self.random = Random(seed).random

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.random() * len(options))]

    def one_of(self, name: str) -> str:
        """An entry of that list of copying.toml."""
        return self.pick(copying_words()[name])

    def between(self, low: int, high: int) -> int:
        """An integer of low..high, both included."""
        return low + int(self.random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def shuffled(self, items: Iterable[T]) -> list[T]:
        return sorted(items, key=lambda _: self.random())

    def word(self) -> str:
        if self.chance(0.25):
            return self.letters(1)
        return self.one_of("everyday") if self.chance(0.4) else self.pick(self.lexicon.words)

    def invented(self) -> str:
        if self.chance(0.5):
            return self.letters(self.between(1, 3))
        syllables = ("onsets", "vowels") * self.between(1, 3)
        return "".join(map(self.one_of, (*syllables, "codas")))

    def letters(self, count: int) -> str:
        """`count` tokens of letters as one word; all are equally likely."""
        text = ""
        while count:
            token = self.scrap().strip()
            if token.isalpha() and token not in copying_words()["cues"]:
                text, count = text + token, count - 1
        return text if self.chance(0.1) else text[0] + text[1:].lower()

    def scrap(self) -> str:
        """A token of the vocabulary, with the space before it if it has one."""
        return self.pick(self.lexicon.tokens)

    def phrase(self) -> str:
        words = [self.word() for _ in range(self.between(2, 5))]
        if self.chance(0.25):
            words[0] = self.pick(("the", "a", "my", "some", "our", "two", "her"))
        if self.chance(0.15):
            words[-1] = self.misspelt(words[-1])
        return " ".join(words)

    def misspelt(self, word: str) -> str:
        if len(word) == 1:
            return 2 * word
        at = self.between(0, len(word) - 2)
        return self.pick(
            (
                word[:at] + word[at + 1] + word[at] + word[at + 2 :],
                word[:at] + word[at + 1 :],
                word[: at + 1] + word[at:],
            )
        )

    def name(self) -> str:
        first = (self.word() if self.chance(0.3) else self.invented()).capitalize()
        return f"{first} {self.invented().capitalize()}" if self.chance(0.4) else first

    def person(self) -> str:
        """A name, now and then with accents, a title or as a relation; in any case of letters."""
        name = self.name()
        if self.chance(0.2):
            name = self.accented(name)
        if self.chance(0.15):
            name = f"{self.one_of('relations')} {name}"
        return name.lower() if self.chance(0.3) else name

    def accented(self, word: str) -> str:
        """One vowel of the word, if it has one, with an accent."""
        at = [index for index, letter in enumerate(word) if letter in ACCENTS]
        if not at:
            return word
        index = self.pick(at)
        return word[:index] + self.pick(ACCENTS[word[index]]) + word[index + 1 :]

    def town(self) -> str:
        """A place by name."""
        name = self.name() if self.chance(0.8) else self.accented(self.name())
        return name.lower() if self.chance(0.3) else name

    def place(self) -> str:
        """A place by what is there."""
        return self.pick((
            f"the {self.gear()}", f"the {self.invented().capitalize()} {self.word()}",
            f"{self.between(1, 200)} {self.invented().capitalize()} {self.word()}", self.town(),
            f"{self.person()}'s {self.word()}",
        ))  # fmt: skip

    def gear(self) -> str:
        return self.word() if self.chance(0.5) else f"{self.word()} {self.word()}"

    def thing(self) -> str:
        amount = ("the", "a", "my", "some", "more", "a dozen", "a bag of", "", "", "")
        return f"{self.pick((*amount, self.one_of('hours')))} {self.gear()}".strip()

    def people(self) -> str:
        count = self.one_of("hours") if self.chance(0.6) else str(self.between(1, 30))
        return f"{count}{self.pick(('', ' people', ' guests', ' children', ' of us'))}"

    def when(self) -> str:
        """A day that depends on today."""
        day, part = self.one_of("days").lower(), self.one_of("parts")
        return self.pick((
            "today", "tomorrow", "yesterday", f"this {part}", f"tomorrow {part}", f"last {day}",
            f"next {day}", f"this {day}", f"next {day} {part}", f"{day} {part}", "last week",
            "next week", "this weekend", f"in {self.one_of('hours')} days", "next month",
            f"the {self.between(4, 20)}th", f"the {self.between(4, 20)}th of {self.month()}",
        ))  # fmt: skip

    def month(self) -> str:
        return self.one_of("months").lower()

    def number(self) -> str:
        return str(int(10 ** (5 * self.random())))

    def quantity(self) -> str:
        return f"{self.between(1, 400)} {self.one_of('units')}"

    def time(self) -> str:
        hour, minute = self.between(1, 12), self.between(0, 59)
        form = self.between(0, 4)
        if form == 0:
            return f"{hour} {self.pick(('am', 'pm'))}"
        if form == 1:
            part = self.pick(("half past", "quarter to", "quarter past"))
            return f"{part} {self.one_of('hours')}"
        if form == 2:
            return f"{hour}:{minute:02d} {self.pick(('am', 'pm'))}"
        return f"{self.between(0, 23)}:{minute:02d}"

    def date(self) -> str:
        day, month = self.between(1, 31), self.one_of("months")
        form = self.between(0, 4)
        if form == 0:
            return f"{self.between(1990, 2035)}-{self.between(1, 12):02d}-{day:02d}"
        if form == 1:
            return f"{self.one_of('days')}, {day} {month}"
        if form == 2:
            return f"{month} {day}"
        return self.one_of("days") if form == 3 else f"{day} {month}"

    def price(self) -> str:
        amount = f"{self.between(0, 300)}.{self.between(0, 99):02d}"
        return f"${amount}" if self.chance(0.5) else f"{amount} {self.pick(('euros', 'pounds'))}"

    def code(self) -> str:
        letters = "".join(self.pick(LETTERS) for _ in range(self.between(1, 3)))
        return f"{letters}{self.pick('-/ ')}{self.number()}"

    def email(self) -> str:
        domain = f"{self.word()}.{self.pick(('org', 'com', 'net'))}"
        return f"{self.invented()}{self.pick('._')}{self.word()}@{domain}"

    def identifier(self) -> str:
        return self.pick(self.lexicon.identifiers)

    def value(self) -> str:
        """A value of any kind; phrases and names most often."""
        return self.pick(VALUES)(self)

    def key(self) -> str:
        form = self.random()
        if form < 0.5:
            return self.one_of("generic_keys")
        return self.word() if form < 0.8 else f"{self.word()}_{self.one_of('generic_keys')}"

    def keys(self, count: int) -> list[str]:
        """`count` keys, all different."""
        keys: dict[str, None] = {}
        while len(keys) < count:
            keys[self.key()] = None
        return list(keys)

    def fields(self, count: int) -> dict[str, str]:
        return {key: self.value() for key in self.keys(count)}

VALUES: tuple[Callable[[Draw], str], ...] = (
    *[Draw.phrase] * 6,
    *[Draw.name] * 4,
    *[Draw.word] * 3,
    Draw.invented,
    Draw.identifier,
    Draw.number,
    Draw.quantity,
    Draw.price,
    *[Draw.time] * 2,
    *[Draw.date] * 2,
    Draw.code,
    Draw.email,
)
