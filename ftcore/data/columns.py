"""Rows to examples through a column map: texts, labelled, tagged or not, chats, pairs; labels."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict, get_args
from ftcore import config as configs
from ftcore.config import DataConfig
from ftcore.errors import DataError, nearest

class RowError(DataError):
    """One row cannot be used; whoever works through many rows rejects it and counts it."""

class Row(NamedTuple):  # cost: made in a third of the time that a frozen dataclass takes
    id: str  # 16 hex digits: sha1 of its raw text (and number among equal ones), wherever it stands
    file: str  # as given; line: where the record begins, from 1
    line: int
    fields: dict[str, Any]  # column -> value; text in tsv, csv and txt

@dataclass(frozen=True)
class Rejected:
    """A row that is not used as it is: where it stands, why, and in which step of `prepare`."""
    id: str
    file: str
    line: int
    reason: str  # equal for rows of one kind, so that it can be counted
    step: str = "encode"
    detail: str = ""  # its own: which other row, what text

class Text(NamedTuple):
    """One text, a pair or a sentence, and what is to be predicted of it."""
    id: str
    texts: tuple[str, ...]  # the text; both of a pair; the words of a sentence
    # its class, several, its score; the tag of each word, BIO of entities
    target: str | tuple[str, ...] | float | None = None
    file: str = ""
    line: int = 0
    weight: float = 1.0
    rejected = ""  # what a pair of chats has

    def with_texts(self, texts: Iterable[str]) -> "Text":
        return self._replace(texts=tuple(texts))

Role = Literal["system", "user", "assistant", "tool"]

class Message(TypedDict):
    """One turn; `train` and `weight` matter to supervision only, never to the text."""
    role: Role
    content: str
    train: NotRequired[bool]
    weight: NotRequired[float]

@dataclass(frozen=True)
class Chat:
    """A conversation; a pair of them has another last answer too, which is worse."""
    id: str
    messages: tuple[Message, ...]
    file: str = ""
    line: int = 0
    rejected: str = ""
    margin: float = 0.0  # how much worse

    @property
    def texts(self) -> tuple[str, ...]:
        return *(m["content"] for m in self.messages), *filter(None, [self.rejected])

    @property
    def target(self) -> str:
        """What the assistant says; of a pair the better answer before the worse."""
        said = [m["content"] for m in self.messages if m["role"] == "assistant"]
        return "\n".join([*said, self.rejected] if self.rejected else said)

    def with_texts(self, texts: Iterable[str]) -> "Chat":
        texts = iter(texts)
        messages = tuple({**message, "content": next(texts)} for message in self.messages)
        return replace(self, messages=messages, rejected=next(texts, ""))

Example = Text | Chat
Source = Row | Rejected | Example
ROLES, MARKS = get_args(Role), str.maketrans("SUEL", "BBII")  # MARKS: of single, end, last words
UNSUPPORTED = ("tool_calls", "function_call", "reasoning_content", "thinking", "reasoning")

def names_of(example: Text) -> tuple[str, ...]:
    return (example.target,) if isinstance(example.target, str) else example.target

def indices(labels: Mapping[str, int], example: Text) -> list[int]:
    """Class index of each label; DataError if the training data had no such one."""
    try:
        return [labels[name] for name in names_of(example)]
    except KeyError as error:
        what = f"{place(example)}: label {error} is not among the {len(labels)} labels of the"
        mend = "correct the row, or add training rows with it"
        raise DataError(f"{what} training data{nearest(*error.args, [*labels])}; {mend}") from None

def label_map(examples: Sequence[Text], *, are_tags: bool = False) -> tuple[str, ...]:
    """All labels of the training data, sorted, as numbers if all are; of a type that only begins or
    only goes on there, both tags. DataError: fewer than two."""
    names = {name for example in examples for name in names_of(example)}
    if are_tags:
        names |= {p + name[1:] for name in names if name[:2] in ("B-", "I-") for p in "BI"}
    if len(names) < 2:
        what = f"the training data has {len(names)} different label(s) {sorted(names)}"
        raise DataError(f"{what}, a classifier needs at least two; is this the label column?")
    are_numbers = None not in map(number_in, names)
    return tuple(sorted(names, key=lambda name: (are_numbers and number_in(name), name)))

def examples(rows: Sequence[Row], config: DataConfig) -> tuple[list[Example], list[Rejected]]:
    """Examples, and rows that give none. DataError: a column, role or kind of value is wrong."""
    if isinstance(config, configs.PairsDataConfig):
        make, named = preference, (*config.prompt, config.chosen, config.rejected, config.margin)
    elif isinstance(config, configs.ChatDataConfig):
        make = conversation
        named = (*config.prompt, config.answer) if config.prompt else (config.messages,)
    elif isinstance(config, configs.TaggedDataConfig):
        make, named = tagged, (config.tokens, config.tags)
    elif isinstance(config, configs.TextsConfig):
        make, named = labelled, (config.text, config.pair, config.label)
    else:
        make, named = plain, (config.text,)
    require(rows, *filter(None, named))
    rejected: list[Rejected] = []
    kept = usable(rows, partial(make, config=config), rejected, "map")
    return [example for _, example in kept], rejected

def plain(row: Row, config: configs.TextDataConfig) -> Text:
    return Text(row.id, (text_of(row, config.text),), None, row.file, row.line)

def labelled(row: Row, config: configs.LabelledDataConfig | configs.ScoredDataConfig) -> Text:
    """A text or pair with its label or score, or with a separator any number of labels."""
    texts = text_of(row, config.text), *([text_of(row, config.pair)] if config.pair else ())
    column, is_scored = config.label, isinstance(config, configs.ScoredDataConfig)
    separator = "" if is_scored else config.label_separator
    value = row.fields.get(column)
    if value is None or not (separator or str(value).strip()):
        raise RowError(f"column {column!r} holds no label")
    if separator:
        if not isinstance(value, list | str):
            raise wrong(row, f"column {column!r} must hold a list of labels, or text with them")
        parts = value.split(separator) if isinstance(value, str) else map(str, value)
        value = tuple(filter(None, dict.fromkeys(map(str.strip, parts))))
    elif isinstance(value, list | dict):
        problem = f"column {column!r} must hold one label, not {type(value).__name__}"
        raise wrong(row, f"{problem}; where rows have several, give data.label_separator")
    else:
        name = str(value).strip()
        value = number_in(name) if is_scored else name
        if value is None:
            raise wrong(row, f"column {column!r} must hold a number, not {name!r}")
    return Text(row.id, texts, value, row.file, row.line)

def tagged(row: Row, config: configs.TaggedDataConfig) -> Text:
    """A sentence from a list of words and one of as many tags, of entities as BIO."""
    words, tags = lists = [row.fields.get(column) for column in (config.tokens, config.tags)]
    if not all(isinstance(x, list) and all(isinstance(y, str) for y in x) for x in lists):
        raise wrong(row, f"columns {config.tokens!r} and {config.tags!r} must hold lists of texts")
    if len(words) != len(tags) or not all(tags):
        what = f"{len(words)} words have {len(list(filter(None, tags)))} tags: must be one each"
        raise wrong(row, f"{what}, O for a word outside every entity")
    if not words:
        raise RowError(f"column {config.tokens!r} holds no words")
    return Text(row.id, tuple(words), to_bio(tags), row.file, row.line)

def to_bio(tags: Sequence[str]) -> tuple[str, ...]:
    """IOB1 (B- parts neighbours of a type), BIOES and BILOU as BIO (B- begins all); others stay."""
    tags = [tag[0].translate(MARKS) + tag[1:] if tag[1:2] == "-" else tag for tag in tags]
    return tuple("B" + tag[1:] if tag[:2] == "I-" and last[1:] != tag[1:] else tag
                 for last, tag in pairwise(["O", *tags]))

def prompted(row: Row, config: configs.ChatDataConfig) -> list[Message]:
    """The turns of the first column of `prompt`; or a user's of the texts in all of them, of which
    those after the first may be empty."""
    first, *others = config.prompt
    if isinstance(row.fields.get(first), list):
        return turns_of(row, first, config)
    asked = [text_of(row, first)]
    asked += [text_of(row, name) for name in others if row.fields.get(name) not in (None, "")]
    return [Message(role="user", content="\n\n".join(asked), train=False, weight=1.0)]

def answer(text: str) -> Message:
    return Message(role="assistant", content=text, train=True, weight=1.0)

def conversation(row: Row, config: configs.ChatDataConfig) -> Chat:
    read, column = (_side, config.answer) if config.prompt else (turns_of, config.messages)
    return Chat(row.id, tuple(read(row, column, config)), row.file, row.line)

def preference(row: Row, config: configs.PairsDataConfig) -> Chat:
    """The chosen conversation, with the other answer and how much worse it is."""
    *prompt, chosen = _side(row, config.chosen, config)
    *other, rejected = _side(row, config.rejected, config)
    one, two = ([(m["role"], m["content"]) for m in turns] for turns in (prompt, other))
    if not prompt or one != two:
        raise RowError("the two answers have no common prompt")
    if chosen["content"] == rejected["content"]:
        raise RowError("the two answers are the same")
    margin = number_in(str(row.fields.get(config.margin))) if config.margin else 0.0
    if margin is None:
        raise wrong(row, f"column {config.margin!r} must hold a number")
    messages = *prompt, answer(chosen["content"])
    return Chat(row.id, messages, row.file, row.line, rejected["content"], margin)

def _side(row: Row, column: str, config: configs.ChatDataConfig) -> list[Message]:
    """Prompt and answer of one column; RowError: the last turn is empty or not the assistant's."""
    prompt = prompted(row, config) if config.prompt else []
    if prompt and not isinstance(row.fields.get(column), list):
        return [*prompt, answer(text_of(row, column))]
    turns = turns_of(row, column, config)
    if prompt and len(turns) != 1:
        raise RowError(f"column {column!r} holds {len(turns)} turns: must be one, the answer")
    if turns[-1]["role"] != "assistant" or not turns[-1]["content"].strip():
        raise RowError(f"the last turn of column {column!r} is not an answer of the assistant's")
    return [*prompt, *turns]

def turns_of(row: Row, column: str, config: configs.ChatDataConfig) -> list[Message]:
    """A list of turns, or a transcript, whose speakers `roles` names. A turn may also hold "train"
    (bool; default: of answers) and "weight" (default 1), but no key that changes its text."""
    roles = dict(pair.partition("=")[::2] for pair in config.roles)
    turns = row.fields.get(column)
    if turns in (None, [], ""):
        raise RowError(f"column {column!r} holds no messages")
    if isinstance(turns, str) and roles:
        turns = transcript(turns, roles, config.turn)
    if not isinstance(turns, list):
        hint = "of a transcript name the speakers with data.roles"
        raise wrong(row, f"column {column!r} must hold a list of messages; {hint}")
    return [message(row, n, turn, config.turn, roles) for n, turn in enumerate(turns, start=1)]

def transcript(text: str, roles: Mapping[str, str], keys: tuple[str, str]) -> list[dict[str, str]]:
    """Turns of a text that has "NAME:" at the start of each; RowError: text before the first."""
    before, *parts = re.split(rf"^({'|'.join(map(re.escape, roles))}):", text, flags=re.M)
    if before.strip() or not parts:
        raise RowError(f"the transcript does not begin with one of {', '.join(roles)}")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{keys[0]: speaker, keys[1]: said.strip()} for speaker, said in turns]

def message(row: Row, n: int, turn: Any, keys: tuple[str, str], roles: dict[str, str]) -> Message:
    turn = turn if isinstance(turn, dict) else {}
    if odd := [key for key in UNSUPPORTED if turn.get(key)]:
        raise RowError(f"message {n} holds {odd[0]!r}, which is not supported")
    if not isinstance(turn.get(keys[1]), str):
        raise wrong(row, f'message {n} must be {{"{keys[0]}": ..., "{keys[1]}": text}}')
    said = turn.get(keys[0])
    role = roles.get(said, said) if isinstance(said, str) else said
    if role not in ROLES:
        hint = nearest(str(role), ROLES) or f"; name it with data.roles, as {role}=user"
        raise wrong(row, f"message {n} has role {role!r}, not one of {', '.join(ROLES)}{hint}")
    train, weight = turn.get("train", role == "assistant"), turn.get("weight", 1.0)
    if not isinstance(train, bool):
        raise wrong(row, f'message {n}: "train" must be true or false, not {train!r}')
    if type(weight) not in (int, float) or not 0 <= weight < math.inf:
        raise wrong(row, f'message {n}: "weight" must be a number >= 0, not {weight!r}')
    return Message(role=role, content=turn[keys[1]], train=train, weight=float(weight))

def require(rows: Sequence[Row], *columns: str) -> None:
    for column in columns:
        if not any(column in row.fields for row in rows):
            names = list(rows[0].fields)
            shown = ", ".join(map(repr, names)) + nearest(column, names)
            raise DataError(f"{rows[0].file}: no column {column!r}; its columns are {shown}")

def text_of(row: Row, column: str) -> str:
    value = row.fields.get(column)
    if value is not None and not isinstance(value, str):
        raise wrong(row, f"column {column!r} must hold text, not {type(value).__name__}")
    if not (value or "").strip():
        raise RowError(f"column {column!r} is empty")
    return value

def number_in(name: str) -> float | None:
    try:
        value = float(name)
    except ValueError:
        return None
    return value if math.isfinite(value) else None

def wrong(row: Row, problem: str) -> DataError:
    shown = json.dumps(row.fields, ensure_ascii=False, default=str)[:400]
    return DataError(f"{place(row)}: {problem}; the row is {shown}")

def place(source: Source) -> str:
    return f"{source.file}:{source.line}"

def left_out(source: Source, reason: str, step: str = "encode", detail: str = "") -> Rejected:
    return Rejected(source.id, source.file, source.line, reason, step, detail)

def usable(sources: Iterable[Any], make: Callable[[Any], Any], rejected: list[Rejected],
           step: str = "encode") -> Iterator[tuple[Any, Any]]:
    """Each with what is made of it; those of which nothing can be are rejected."""
    for source in sources:
        try:
            yield source, make(source)
        except RowError as error:
            rejected.append(left_out(source, str(error), step))

def besides(rows: Iterable[Any], others: Iterable[Source]) -> list[Any]:
    """Those whose id none of the others has."""
    known = {other.id for other in others}
    return [row for row in rows if row.id not in known]

def reasons(rejected: Iterable[Rejected]) -> list[tuple[str, int]]:
    return Counter(row.reason for row in rejected).most_common()

def require_some(kept: Sequence[Any], rejected: Sequence[Rejected]) -> None:
    if not kept:
        counted = "; ".join(f"{count} x {reason}" for reason, count in reasons(rejected)[:3])
        what = f"none of the {len(rejected)} rows can be used ({counted})"
        raise DataError(f"{rejected[0].file}: {what}; the first stands in line {rejected[0].line}")
