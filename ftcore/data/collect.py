"""Files to the examples of a task, split by split; rows that give none are remembered."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from glob import has_magic
from pathlib import Path
from typing import Any

from ftcore import config as configs
from ftcore.builtin import chat as builtin_chat
from ftcore.data import columns
from ftcore.data.columns import Example, Mapped
from ftcore.data.read import ReadReport, Rejected, Row, read_rows
from ftcore.errors import ConfigError, DataError

BUILTIN_CHAT = "builtin:chat"  # stands for the data set that ftcore makes itself
BUILTIN_TESTS = ("test_values", "test_combinations", "test_wording")
built_chat = cache(builtin_chat.build)  # its splits are made at once, and asked for one by one
MESSAGES = "messages"  # the column that tells a chat from plain text

DataConfig = configs.TextDataConfig | configs.ExamplesConfig
Notes = dict[str, Any]  # what was found, for people: JSON throughout

@dataclass
class Rows:
    """The examples of one split on their way, and what was lost."""
    examples: list[Example]
    rejected: list[Rejected]
    num_rows: int  # that were read
    groups: dict[str, Hashable] = field(default_factory=dict)  # row id -> value of data.group

    def drop(self, lost: Mapping[int, Rejected]) -> None:
        """Leave out examples, by index."""
        self.rejected += lost.values()
        self.examples = [e for index, e in enumerate(self.examples) if index not in lost]
        columns.require_some(self.examples, self.rejected)

def collect(config: DataConfig, notes: Notes) -> dict[str, Rows]:
    """Every split that has files: train, dev, and each test file under its name."""
    named = [("train", config.train), ("dev", config.dev), *_tests(config.test)]
    return {name: _collect(config, paths, name, notes) for name, paths in named if paths}

def _tests(paths: Sequence[str]) -> Iterator[tuple[str, tuple[str]]]:
    """Name and path of each test split: the file's name without endings, or its path if that is
    taken or a pattern; the built-in data set has three."""
    stems = [path if has_magic(path) else Path(path).name.split(".")[0] for path in paths]
    taken = [*stems, "train", "dev", *BUILTIN_TESTS]
    for stem, path in zip(stems, paths, strict=True):
        if path == BUILTIN_CHAT:
            yield from ((name, (path,)) for name in BUILTIN_TESTS)
        else:
            yield (stem if taken.count(stem) == 1 else path), (path,)

def _collect(config: DataConfig, paths: Sequence[str], split: str, notes: Notes) -> Rows:
    report = ReadReport()
    if BUILTIN_CHAT in paths:
        if len(paths) > 1:
            raise DataError(f"{BUILTIN_CHAT} cannot be mixed with files: {', '.join(paths)}")
        made, where = built_chat()[split], f"{BUILTIN_CHAT}/{split}"
        rows = [Row(d["id"], where, number, d) for number, d in enumerate(made, start=1)]
    else:
        asked = ("format", "columns", "encoding", "on_bad")
        rows = read_rows(paths, **{name: getattr(config, name) for name in asked}, report=report)
    notes.setdefault("sources", {})[split] = report.sources
    examples, rejected = _examples(config, rows)
    groups = {}
    if config.group and split == "train":
        columns.require(rows, config.group)
        groups = {row.id: str(row.fields.get(config.group) or "") for row in rows}
    bad = [replace(b, reason="damaged", detail=f"{b.reason}; {b.detail}") for b in report.bad]
    return Rows(examples, bad + rejected, len(rows) + len(bad), groups)

def _examples(config: DataConfig, rows: list[Row]) -> Mapped[Example]:
    if isinstance(config, configs.MaskedDataConfig):
        return columns.texts(rows, text=config.text)
    if isinstance(config, configs.TextDataConfig):
        plain = [row for row in rows if MESSAGES not in row.fields]
        talks = [row for row in rows if MESSAGES in row.fields]
        mapped = [columns.texts(plain, text=config.text)] if plain else []
        mapped += [columns.chats(talks)] if talks else []
        return tuple(sum(lists, []) for lists in zip(*mapped, strict=True))
    if isinstance(config, configs.ChatDataConfig):
        if config.prompt:
            return columns.answered(rows, prompt=config.prompt, answer=config.answer)
        roles = _renamed("data.roles", config.roles)
        return columns.chats(rows, messages=config.messages, keys=config.turn, roles=roles)
    if isinstance(config, configs.TaggedDataConfig):
        if config.spans:
            return columns.spanned(rows, text=config.text, spans=config.spans)
        return columns.tagged(rows, tokens=config.tokens, tags=config.tags)
    named = {"text": config.text, "pair": config.pair or None, "label": config.label}
    if isinstance(config, configs.ScoredDataConfig):
        return columns.labelled(rows, **named, scores=True)
    names = _renamed("data.relabel", config.relabel)
    return columns.labelled(rows, **named, separator=config.label_separator, relabel=names)

def _renamed(option: str, pairs: Sequence[str]) -> dict[str, str]:
    """New names by the old ones."""
    names = dict(pair.partition("=")[::2] for pair in pairs)
    if "" in names.values():
        raise ConfigError(f"{option} = {' '.join(pairs)}: must be OLD=NEW each")
    return names
