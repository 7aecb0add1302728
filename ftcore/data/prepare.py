"""Files to encoded documents for one run: read, map columns, encode; every row accounted for.

`builtin:chat` stands for the data set that ftcore makes itself.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
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
from ftcore.data.columns import (
    Chat,
    LabelledText,
    LabelMap,
    Rejected,
    Tagged,
    chats,
    label_map,
    labelled,
    tagged,
    texts,
)
from ftcore.data.encode import (
    EncodedRows,
    Sentence,
    encode_chats,
    encode_labelled_rows,
    encode_texts,
)
from ftcore.data.mask import Masking, encode_pieces
from ftcore.data.pack import Encoded
from ftcore.data.read import Row, read_rows
from ftcore.data.tag import encode_tagged
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import ConfigError, DataError

BUILTIN_CHAT = "builtin:chat"
Example = LabelledText | Tagged
MESSAGES = "messages"  # the column that tells a chat from plain text


@dataclass
class Split:
    """Rows of one purpose."""

    documents: list[Encoded]  # encoded rows, in file order
    # the conversations behind them, for generated answers
    chats: list[Chat] = field(default_factory=list)
    # words and tags behind them, by row id
    sentences: dict[str, Sentence] = field(default_factory=dict)
    num_bytes: int = 0  # UTF-8 bytes of plain text, for bits per byte; 0 for other data


@dataclass
class Prepared:
    """What a run trains and is judged on."""

    # train, dev, tests: splits; `tests` by name
    train: Split
    dev: Split
    tests: dict[str, Split]
    # classes, by index; of a regression the one name of its scores
    labels: tuple[str, ...] | None = None
    # rejected, cut: rows left out and rows cut short, by split, each with its reason
    rejected: dict[str, list[Rejected]] = field(default_factory=dict)
    cut: dict[str, list[Rejected]] = field(default_factory=dict)
    # words of sentences that gave no token, likewise
    untold: dict[str, list[Rejected]] = field(default_factory=dict)
    # what a step makes of a training row: hides some tokens; None: nothing
    draw: Masking | None = None

    def account(self, split: str, mapped: Sequence[Rejected], rows: EncodedRows) -> None:
        """Remember what a split lost."""
        self.rejected[split] = [*mapped, *rows.rejected]
        self.cut[split] = rows.cut
        self.untold[split] = rows.untold

    def losses(self) -> list[tuple[str, dict[str, list[Rejected]]]]:
        """What was lost, by the word for it."""
        return [("left out", self.rejected), ("cut", self.cut), ("without token", self.untold)]

    def splits(self) -> list[tuple[str, Split]]:
        """Every split that has rows, by name."""
        named = [("train", self.train), ("dev", self.dev), *self.tests.items()]
        return [(name, split) for name, split in named if split.documents]

    def summary(self) -> str:
        """Rows and tokens of each split, and what was left out, one line each."""
        lines = []
        for name, split in self.splits():
            tokens = sum(len(document) for document in split.documents)
            line = f"{name}: {len(split.documents)} rows, {tokens} tokens"
            for what, found in self.losses():
                reasons = Counter(row.reason for row in found.get(name, []))
                shown = reasons.most_common(5)
                line += "".join(f"; {what} {n} ({reason})" for reason, n in shown)
                more = reasons.total() - sum(n for _, n in shown)
                line += f"; {what} {more} more" if more else ""
            lines.append(line)
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Write rejected.jsonl: every row that was left out or cut, with its place and reason."""
        lines = [
            json.dumps({"split": split, "what": what, **asdict(row)}, ensure_ascii=False)
            for what, found in self.losses()
            for split, rows in found.items()
            for row in rows
        ]
        folder.mkdir(exist_ok=True)
        (folder / "rejected.jsonl").write_text("".join(line + "\n" for line in lines), "utf-8")


def prepare(
    config: TextDataConfig | ChatDataConfig | RowsConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    labels: tuple[str, ...] | None = None,
) -> Prepared:
    """All splits of a run.

    seed        chooses the rows held out of training
    labels      classes of a model that is only evaluated; None: those of the training rows
    raises      DataError: a file, column, label or row that cannot be used
    """
    if isinstance(config, MaskedDataConfig):
        return prepare_masked(config, tokenizer, seed=seed)
    if isinstance(config, TextDataConfig):
        return prepare_text(config, tokenizer)
    if isinstance(config, ChatDataConfig):
        return prepare_chats(config, tokenizer)
    return prepare_rows(config, tokenizer, seed=seed, labels=labels)


def prepare_text(config: TextDataConfig, tokenizer: Tokenizer) -> Prepared:
    """Plain text, cut into documents of at most `config.max_length` tokens, and chats among it.

    A row with messages is a chat: its answers alone are supervised, and it is never cut. Beside
    chats no bits per byte are counted, since not every byte is predicted.
    """
    prepared = Prepared(Split([]), Split([]), {})

    def split(name: str, rows: list[Row]) -> Split:
        plain = [row for row in rows if MESSAGES not in row.fields]
        encoded, rejected, num_bytes = EncodedRows(), [], 0
        if plain:
            kept, rejected = texts(plain, text=config.text)
            encoded = encode_texts(kept, tokenizer, end=True, max_length=config.max_length)
            num_bytes = sum(len(t.text.encode()) for t in kept)
        if len(plain) < len(rows):
            talked, refused = chats([row for row in rows if MESSAGES in row.fields])
            answers = encode_chats(talked, tokenizer)
            encoded.documents += answers.documents
            rejected, num_bytes = rejected + refused + answers.rejected, 0
        prepared.account(name, rejected, encoded)
        return Split(encoded.documents, num_bytes=num_bytes)

    if config.train:
        prepared.train = split("train", read_rows(config.train))
    if config.dev:
        prepared.dev = split("dev", read_rows(config.dev))
    for name, path in _tests(config.test):
        prepared.tests[name] = split(name, read_rows([path]))
    return prepared


def prepare_masked(config: MaskedDataConfig, tokenizer: Tokenizer, *, seed: int) -> Prepared:
    """Plain text in pieces; of held-out ones the same tokens are hidden in every run."""
    prepared = Prepared(Split([]), Split([]), {}, draw=Masking.of(tokenizer, seed))

    def split(name: str, paths: Sequence[str]) -> Split:
        kept, rejected = texts(read_rows(paths), text=config.text)
        encoded = encode_pieces(kept, tokenizer, max_length=config.max_length)
        prepared.account(name, rejected, encoded)
        return Split(encoded.documents)

    def held_out(name: str, paths: Sequence[str]) -> Split:
        hide = Masking.of(tokenizer, seed=0)
        return Split([hide(document, 0) for document in split(name, paths).documents])

    if config.train:
        prepared.train = split("train", config.train)
    if config.dev:
        prepared.dev = held_out("dev", config.dev)
    prepared.tests |= {name: held_out(name, [path]) for name, path in _tests(config.test)}
    return prepared


def prepare_chats(config: ChatDataConfig, tokenizer: Tokenizer) -> Prepared:
    """Conversations, supervised by `config.train_on`."""
    prepared = Prepared(Split([]), Split([]), {})

    def split(name: str, rows: list[Row]) -> Split:
        kept, rejected = chats(rows, messages=config.messages)
        encoded = encode_chats(
            kept,
            tokenizer,
            train_on=config.train_on,
            max_length=config.max_length,
            over_length=config.over_length,
        )
        prepared.account(name, rejected, encoded)
        used = {document.row_id for document in encoded.documents}
        return Split(encoded.documents, chats=[chat for chat in kept if chat.id in used])

    if config.train:
        prepared.train = split("train", _chat_rows(config.train, "train"))
    if config.dev:
        prepared.dev = split("dev", _chat_rows(config.dev, "dev"))
    for name, path in _tests(config.test):
        for part in BUILTIN_TESTS if path == BUILTIN_CHAT else [name]:
            prepared.tests[part] = split(part, _chat_rows([path], part))
    return prepared


def prepare_rows(
    config: RowsConfig,
    tokenizer: Tokenizer,
    *,
    seed: int,
    labels: tuple[str, ...] | None = None,
) -> Prepared:
    """Rows with labels, scores or tags.

    labels      classes of a model that is only evaluated; None: those of the training rows
    raises      DataError: no file, a bad one, a bad column; a label that training rows do not have
    """
    if not config.train and labels is None:
        raise DataError("data.train is empty: name files of labelled rows with --data.train FILE")
    prepared = Prepared(Split([]), Split([]), {}, labels)

    def examples(name: str, paths: Sequence[str]) -> list[Example]:
        rows = read_rows(paths, format=config.format, columns=config.columns)
        kept, prepared.rejected[name] = _map(config, rows)
        return kept

    def split(name: str, kept: list[Example]) -> Split:
        encoded = _encode(config, kept, tokenizer, LabelMap(prepared.labels))
        prepared.account(name, prepared.rejected.get(name, []), encoded)
        return Split(encoded.documents, sentences=encoded.sentences)

    if config.train:
        train = examples("train", config.train)
        count = 0 if config.dev else config.holdout
        held = set(_holdout(len(train), count, seed).tolist())
        dev = [example for index, example in enumerate(train) if index in held]
        train = [example for index, example in enumerate(train) if index not in held]
        prepared.labels = prepared.labels or _labels(config, train)
        prepared.train = split("train", train)
        if config.dev:
            dev = examples("dev", config.dev)
        if dev:
            prepared.dev = split("dev", dev)
    for name, path in _tests(config.test):
        prepared.tests[name] = split(name, examples(name, [path]))
    return prepared


def _map(config: RowsConfig, rows: list[Row]) -> tuple[list[Example], list[Rejected]]:
    if isinstance(config, TaggedDataConfig):
        return tagged(rows, tokens=config.tokens, tags=config.tags)
    columns = {"text": config.text, "pair": config.pair or None, "label": config.label}
    if isinstance(config, ScoredDataConfig):
        return labelled(rows, **columns, scores=True)
    kept, rejected = labelled(rows, **columns, separator=config.label_separator)
    return [_relabelled(config, example) for example in kept], rejected


def _relabelled(config: LabelledDataConfig, example: LabelledText) -> LabelledText:
    names = dict(pair.partition("=")[::2] for pair in config.relabel)
    if "" in names.values():
        raise ConfigError(f"data.relabel = {' '.join(config.relabel)}: must be OLD=NEW each")
    label = tuple(names.get(name, name) for name in example.names)
    return replace(example, label=label if config.label_separator else label[0])


def _labels(config: RowsConfig, train: list[Example]) -> tuple[str, ...]:
    return (config.label,) if isinstance(config, ScoredDataConfig) else label_map(train).names


def _encode(
    config: RowsConfig, kept: list[Example], tokenizer: Tokenizer, labels: LabelMap
) -> EncodedRows:
    encode = encode_tagged if isinstance(config, TaggedDataConfig) else encode_labelled_rows
    return encode(
        kept,
        tokenizer,
        None if isinstance(config, ScoredDataConfig) else labels,
        max_length=config.max_length,
        over_length=config.over_length,
    )


BUILTIN_TESTS = ("test_values", "test_combinations", "test_wording")


def _holdout(num_rows: int, count: int, seed: int) -> np.ndarray:
    """Indices of the rows held out of training, a pure function of (num_rows, count, seed)."""
    if count >= num_rows:
        raise DataError(f"data.holdout = {count}: train has {num_rows} rows; hold out fewer")
    return np.random.default_rng([seed, num_rows]).permutation(num_rows)[:count]


def _chat_rows(paths: Sequence[str], split: str) -> list[Row]:
    if BUILTIN_CHAT not in paths:
        return read_rows(paths)
    if len(paths) > 1:
        raise DataError(f"{BUILTIN_CHAT} cannot be mixed with files: {', '.join(paths)}")
    made = builtin_chat.build()[split]
    return [Row(d["id"], f"{BUILTIN_CHAT}/{split}", n, d) for n, d in enumerate(made, start=1)]


def _tests(paths: Sequence[str]) -> list[tuple[str, str]]:
    """Name and path of each test file: its name without endings, or the path if that is taken."""
    stems = [Path(path).name.split(".")[0] for path in paths]
    taken = [*stems, "train", "dev", *BUILTIN_TESTS]
    return [
        (stem if taken.count(stem) == 1 else path, path)
        for stem, path in zip(stems, paths, strict=True)
    ]
