"""Generators of values to copy, over one random stream.

Plain words, invented names, phrases, numbers, times, dates, prices, codes, addresses, identifiers,
and keys for them: open-ended, so that a text made of them cannot be learned by heart.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

T = TypeVar("T")


def split(text: str) -> list[str]:
    return text.split()


EVERYDAY = split("""
address afternoon air airport alarm animal answer apartment apple april arm arrive aunt autumn baby
back bag bake ball balcony banana band bank barber basement basket bath bathroom battery beach bean
bear bed bedroom bell bench bicycle big bill bird birthday biscuit black blanket blind blue board
boat book boots bottle bowl box boy bread break breakfast bridge bring broken brother brown brush
bucket build bus butter button buy cake calendar call camera candle car card carpet carrot cat
ceiling chair cheap cheese chicken child chocolate church cinema city clean clear climb clinic clock
clothes cloud coat coffee cold concert cook corner cousin cream cup curtain cycle dance dark
daughter dentist desk dinner doctor dog door dress drink drive dry dust early east egg electric
evening family farm fast father festival film find fish fix flat floor flour flower fly fog food
foot football forest fork fridge friend fruit full garage garden gate gift girl glass gloves good
grandmother grass green grey guest guitar gym hair half hall hammer hand happy hat head heating
heavy help hill holiday home honey horse hospital hot hotel house hungry husband ice invoice jacket
jam juice juggle keys kitchen kite knife ladder lake lamp large late laundry leaf lemon lesson
letter library light listen little loud lunch machine mail march market meal meat medicine meeting
melon milk mirror monday money moon morning mother mountain mouse movie museum mushroom music nap
near neighbour new nice night noise noon north notebook nurse nuts office oil old onion orange oven
paint pan paper parcel parents park party pasta path peas pen pepper phone photo piano picnic
picture pie pillow pink pizza plane plant plate play pocket police pool porch post pot potato
present pretty pull purple push quick quiet rabbit radio rain read red rent rest rice ride ring
river road roof room rope round run sad salad salt sand sandwich saturday scarf school sea seat sell
shelf ship shirt shoes shop shower sing sister sleep slow small snow soap socks sofa soft song soup
south speaker spicy spoon spring stairs stamp station steak stop storm street strong sugar suitcase
summer sun sunday sweater sweet swim table tall taxi tea teacher team teeth tent thursday ticket
tired toast toilet tomato tomorrow tonight tool toothbrush towel town toy train tree trip truck
tuesday umbrella uncle upstairs vacuum valley vegetables violin visit wake walk wall warm wash watch
water wednesday week weekend west wet wheel white wife wind window winter wood work workshop write
yard yellow yoga young
""")

GENERIC_KEYS = split("""
action address age amount animal answer area author bill body box brand branch capital card category
city class code colour command company contact content cost count country course customer date day
deadline dept destination device dish duration email end event field file flavour floor food from
gate goal group guest height host hour id item job key kind label language length level line link
list location machine make manager material meal member message method mode model month mood name
note number object option order origin owner page part person phone pin place plan plate player
price priority product project purpose quantity question rate reason recipient ref role room route
rule school score seat section sender serial service shape shelf shop side size source speed start
state status stop street style subject supplier symbol table tag target task team text ticket time
title to tool topic total track type unit until url user value vehicle version visitor voice weight
width winner word year zone
""")

# Words that announce a value; no value contains one.
CUES = split("""
about above after against along among around at before behind below beside between beyond by called
costing during for from holding in inside into like meaning named of off on onto over saying since
through titled to toward under until using via wearing with within without
""")

MONTHS = split(
    "January February March April May June July August September October November December"
)
DAYS = split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
HOURS = split("one two three four five six seven eight nine ten eleven twelve")
UNITS = split("g kg ml litres cups metres km miles minutes hours days boxes bags bottles pieces %")
LETTERS = "ABCDEFGHKLMNPQRSTUVWXYZ"
ONSETS = split(
    "b bl br c ch d dr f fl g gl gr h j k kl kr l m n p pl pr qu r s sh sk st t th tr v w y z"
)
VOWELS = split("a e i o u ai ea ee ia io oo ou y")
CODAS = ["", "", "", *split("b ck d l ll m n nd ng r rn s sk st t x")]


@dataclass(frozen=True)
class Lexicon:
    """Words to draw from: plain words, dotted or underscored identifiers, lines of prose."""

    words: Sequence[str]
    identifiers: Sequence[str]
    prose: Sequence[str]


class Draw:
    """One random stream and the value generators over it."""

    def __init__(self, lexicon: Lexicon, seed: int) -> None:
        self.lexicon = lexicon
        self.random = Random(seed).random

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.random() * len(options))]

    def between(self, low: int, high: int) -> int:
        """An integer of low..high, both included."""
        return low + int(self.random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def shuffled(self, items: Iterable[T]) -> list[T]:
        return sorted(items, key=lambda _: self.random())

    def word(self) -> str:
        return self.pick(EVERYDAY if self.chance(0.4) else self.lexicon.words)

    def invented(self) -> str:
        syllables = (self.pick(ONSETS) + self.pick(VOWELS) for _ in range(self.between(1, 3)))
        return "".join(syllables) + self.pick(CODAS)

    def phrase(self) -> str:
        words = [self.word() for _ in range(self.between(2, 5))]
        if self.chance(0.25):
            words[0] = self.pick(("the", "a", "my", "some", "our", "two", "her"))
        if self.chance(0.15):
            words[-1] = self.misspelt(words[-1])
        return " ".join(words)

    def misspelt(self, word: str) -> str:
        at = self.between(0, len(word) - 2)
        return self.pick((
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
            word[:at] + word[at + 1 :],
            word[: at + 1] + word[at:],
        ))

    def name(self) -> str:
        first = (self.word() if self.chance(0.3) else self.invented()).capitalize()
        return f"{first} {self.invented().capitalize()}" if self.chance(0.4) else first

    def number(self) -> str:
        return str(int(10 ** (5 * self.random())))

    def quantity(self) -> str:
        return f"{self.between(1, 400)} {self.pick(UNITS)}"

    def time(self) -> str:
        hour, minute = self.between(1, 12), self.between(0, 59)
        form = self.between(0, 4)
        if form == 0:
            return f"{hour} {self.pick(('am', 'pm'))}"
        if form == 1:
            return f"{self.pick(('half past', 'quarter to', 'quarter past'))} {self.pick(HOURS)}"
        if form == 2:
            return f"{hour}:{minute:02d} {self.pick(('am', 'pm'))}"
        return f"{self.between(0, 23)}:{minute:02d}"

    def date(self) -> str:
        day, month = self.between(1, 31), self.pick(MONTHS)
        form = self.between(0, 4)
        if form == 0:
            return f"{self.between(1990, 2035)}-{self.between(1, 12):02d}-{day:02d}"
        if form == 1:
            return f"{self.pick(DAYS)}, {day} {month}"
        if form == 2:
            return f"{month} {day}"
        return self.pick(DAYS) if form == 3 else f"{day} {month}"

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
            return self.pick(GENERIC_KEYS)
        return self.word() if form < 0.8 else f"{self.word()}_{self.pick(GENERIC_KEYS)}"

    def keys(self, count: int) -> list[str]:
        """`count` keys, all different."""
        keys: dict[str, None] = {}
        while len(keys) < count:
            keys[self.key()] = None
        return list(keys)

    def fields(self, count: int) -> dict[str, str]:
        return {key: self.value() for key in self.keys(count)}


VALUES: tuple[Callable[[Draw], str], ...] = (
    *[Draw.phrase] * 6, *[Draw.name] * 4, *[Draw.word] * 3, Draw.invented, Draw.identifier,
    Draw.number, Draw.quantity, Draw.price, *[Draw.time] * 2, *[Draw.date] * 2, Draw.code,
    Draw.email,
)
