"""Files to the documents of one run: read, map columns, encode; every row accounted for.

`builtin:chat` stands for the data set that ftcore makes itself.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np

from ftcore.builtin import chat as builtin_chat
from ftcore.config import (
    ChatDataConfig,
    LabelledDataConfig,
    MaskedDataConfig,
    RowsConfig,
    ScoredDataConfig,
    TaggedDataConfig,
    TextDataConfig,
)
from ftcore.data import columns, talk
from ftcore.data.columns import Chat, LabelledText, LabelMap, Rejected, Tagged, Text
from ftcore.data.documents import lengths
from ftcore.data.encode import Split, encode_chats, encode_labelled, encode_texts
from ftcore.data.mask import Masking, encode_pieces
from ftcore.data.read import Row, read_rows
from ftcore.data.tag import encode_tagged
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import ConfigError, DataError

BUILTIN_CHAT = "builtin:chat"
BUILTIN_TESTS = ("test_values", "test_combinations", "test_wording")
built_chat = cache(builtin_chat.build)  # its splits are made at once, and asked for one by one
MESSAGES = "messages"  # the column that tells a chat from plain text

DataConfig = TextDataConfig | ChatDataConfig | RowsConfig
Example = Text | Chat | LabelledText | Tagged


@dataclass
class Prepared:
    """What a run trains and is judged on."""

    train: Split = field(default_factory=Split)
    dev: Split = field(default_factory=Split)
    tests: dict[str, Split] = field(default_factory=dict)
    # classes, by index; of a regression the one name of its scores
    labels: tuple[str, ...] | None = None
    # what a step makes of a training row: hides some tokens; None: nothing
    draw: Masking | None = None

    def splits(self) -> list[tuple[str, Split]]:
        """Every split that has rows, by name."""
        named = [("train", self.train), ("dev", self.dev), *self.tests.items()]
        return [(name, split) for name, split in named if split.documents]

    def summary(self) -> str:
        """Rows and tokens of each split, and what was left out, one line each."""
        lines = []
        for name, split in self.splits():
            tokens = lengths(split.documents).sum()
            line = f"{name}: {len(split.documents)} rows, {tokens} tokens"
            for what, found in _losses(split):
                reasons = Counter(row.reason for row in found)
                shown = reasons.most_common(5)
                line += "".join(f"; {what} {n} ({reason})" for reason, n in shown)
                more = reasons.total() - sum(n for _, n in shown)
                line += f"; {what} {more} more" if more else ""
            lines.append(line)
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Write rejected.jsonl: every row that was left out or cut, with its place and reason."""
        lines = [
            json.dumps({"split": name, "what": what, **asdict(row)}, ensure_ascii=False) + "\n"
            for name, split in self.splits()
            for what, found in _losses(split)
            for row in found
        ]
        folder.mkdir(exist_ok=True)
        (folder / "rejected.jsonl").write_text("".join(lines), "utf-8")


def _losses(split: Split) -> list[tuple[str, list[Rejected]]]:
    """What was lost, by the word for it."""
    return [("left out", split.rejected), ("cut", split.cut), ("without token", split.untold)]


def prepare(
    config: DataConfig, tokenizer: Tokenizer, *, seed: int, labels: tuple[str, ...] | None = None
) -> Prepared:
    """All splits of a run.

    seed        chooses the rows held out of training, and the tokens that a step hides
    labels      classes of a model that is only evaluated; None: those of the training rows
    raises      DataError: a file, column, label or row that cannot be used
    """
    if isinstance(config, RowsConfig) and not config.train and labels is None:
        raise DataError("data.train is empty: name files of labelled rows with --data.train FILE")
    prepared = Prepared(labels=labels)
    if isinstance(config, MaskedDataConfig):
        prepared.draw = Masking.of(tokenizer, seed)

    def encoded(examples: list[Example], rejected: Sequence[Rejected] = ()) -> Split:
        split = _encode(config, examples, tokenizer, prepared.labels)
        split.rejected[:0] = rejected
        return split

    def held_out(name: str, paths: Sequence[str]) -> Split:
        split = encoded(*_map(config, _read(config, paths, name)))
        if prepared.draw:  # the same tokens are hidden in every run
            hide = replace(prepared.draw, seed=0)
            split.documents = [hide(document, 0) for document in split.documents]
        return split

    if config.train:
        train, rejected = _map(config, _read(config, config.train, "train"))
        train, dev = _part(config, train, seed)
        if isinstance(config, ScoredDataConfig):
            prepared.labels = labels or (config.label,)
        elif isinstance(config, RowsConfig):
            prepared.labels = labels or columns.label_map(train).names
        prepared.train = encoded(train, rejected)
        if dev:
            prepared.dev = encoded(dev)
    if config.dev:
        prepared.dev = held_out("dev", config.dev)
    prepared.tests = {name: held_out(name, [path]) for name, path in _tests(config.test)}
    return prepared


def _read(config: DataConfig, paths: Sequence[str], split: str) -> list[Row]:
    if isinstance(config, RowsConfig):
        return read_rows(paths, format=config.format, columns=config.columns)
    if isinstance(config, TextDataConfig) or BUILTIN_CHAT not in paths:
        return read_rows(paths)
    if len(paths) > 1:
        raise DataError(f"{BUILTIN_CHAT} cannot be mixed with files: {', '.join(paths)}")
    made = built_chat()[split]
    return [Row(d["id"], f"{BUILTIN_CHAT}/{split}", n, d) for n, d in enumerate(made, start=1)]


def _map(config: DataConfig, rows: list[Row]) -> tuple[list[Example], list[Rejected]]:
    """Examples, and the rows that give none."""
    if isinstance(config, MaskedDataConfig):
        return columns.texts(rows, text=config.text)
    if isinstance(config, TextDataConfig):
        plain = [row for row in rows if MESSAGES not in row.fields]
        talks = [row for row in rows if MESSAGES in row.fields]
        mapped = [columns.texts(plain, text=config.text)] if plain else []
        mapped += [talk.chats(talks)] if talks else []
        kept, rejected = (sum(lists, []) for lists in zip(*mapped, strict=True))
        return kept, rejected
    if isinstance(config, ChatDataConfig):
        if config.prompt:
            return talk.answered(rows, prompt=config.prompt, answer=config.answer)
        roles = _renamed("data.roles", config.roles)
        return talk.chats(rows, messages=config.messages, keys=config.turn, roles=roles)
    if isinstance(config, TaggedDataConfig):
        return columns.tagged(rows, tokens=config.tokens, tags=config.tags)
    named = {"text": config.text, "pair": config.pair or None, "label": config.label}
    if isinstance(config, ScoredDataConfig):
        return columns.labelled(rows, **named, scores=True)
    kept, rejected = columns.labelled(rows, **named, separator=config.label_separator)
    if names := _renamed("data.relabel", config.relabel):
        kept = [_relabelled(example, names, config) for example in kept]
    return kept, rejected


def _relabelled(
    example: LabelledText, names: Mapping[str, str], config: LabelledDataConfig
) -> LabelledText:
    label = tuple(names.get(name, name) for name in example.names)
    return replace(example, label=label if config.label_separator else label[0])


def _renamed(option: str, pairs: Sequence[str]) -> dict[str, str]:
    """New names by the old ones."""
    names = dict(pair.partition("=")[::2] for pair in pairs)
    if "" in names.values():
        raise ConfigError(f"{option} = {' '.join(pairs)}: must be OLD=NEW each")
    return names


def _part(
    config: DataConfig, train: list[Example], seed: int
) -> tuple[list[Example], list[Example]]:
    """Examples to train on, and those held out: a pure function of (their number, count, seed)."""
    if isinstance(config, TextDataConfig) or config.dev or not config.holdout:
        return train, []
    if config.holdout >= len(train):
        raise DataError(
            f"data.holdout = {config.holdout}: train has {len(train)} rows; hold out fewer"
        )
    order = np.random.default_rng([seed, len(train)]).permutation(len(train))
    held = set(order[: config.holdout].tolist())
    dev = [example for index, example in enumerate(train) if index in held]
    return [example for index, example in enumerate(train) if index not in held], dev


def _encode(
    config: DataConfig,
    examples: list[Example],
    tokenizer: Tokenizer,
    labels: tuple[str, ...] | None,
) -> Split:
    if isinstance(config, MaskedDataConfig):
        return encode_pieces(examples, tokenizer, max_length=config.max_length)
    if isinstance(config, TextDataConfig):
        return _encode_mixed(config, examples, tokenizer)
    limits = {"max_length": config.max_length, "over_length": config.over_length}
    if isinstance(config, ChatDataConfig):
        return encode_chats(examples, tokenizer, train_on=config.train_on, **limits)
    if isinstance(config, ScoredDataConfig):
        return encode_labelled(examples, tokenizer, None, **limits)
    encode = encode_tagged if isinstance(config, TaggedDataConfig) else encode_labelled
    return encode(examples, tokenizer, LabelMap(labels), **limits)


def _encode_mixed(config: TextDataConfig, examples: list[Example], tokenizer: Tokenizer) -> Split:
    """Plain text, cut into documents of at most `config.max_length` tokens, and chats after it.

    Of a chat the answers alone are supervised, and it is never cut. Beside chats no bits per byte
    are counted, since not every byte is predicted.
    """
    plain = [example for example in examples if isinstance(example, Text)]
    talks = [example for example in examples if isinstance(example, Chat)]
    split = Split()
    if plain:
        split = encode_texts(plain, tokenizer, end=True, max_length=config.max_length)
    if talks:
        answers = encode_chats(talks, tokenizer)
        split.documents += answers.documents
        split.rejected += answers.rejected
        split.num_bytes = 0
    return split


def _tests(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and path of each test split: the file's name without endings, or its path if that is
    taken; the built-in data set has three."""
    stems = [Path(path).name.split(".")[0] for path in paths]
    taken = [*stems, "train", "dev", *BUILTIN_TESTS]
    for stem, path in zip(stems, paths, strict=True):
        if path == BUILTIN_CHAT:
            yield from ((name, path) for name in BUILTIN_TESTS)
        else:
            yield (stem if taken.count(stem) == 1 else path), path
