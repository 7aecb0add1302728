"""Text, chats and labelled texts to `Encoded` documents, one by one or many at once.

Letters: T tokens of a document.

What counts in a chat is said in supervise.py; in plain text every token counts. Batch functions
return `EncodedRows`: every row is a document, or rejected with its reason.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from ftcore.data.chat import Message, RowError, render_text
from ftcore.data.columns import (
    Chat,
    LabelledText,
    LabelMap,
    Rejected,
    Tagged,
    Text,
    require_some,
)
from ftcore.data.pack import Encoded
from ftcore.data.supervise import TrainOn, find_answers, require_plain, shifted, supervise
from ftcore.data.tokenizer import Encoding, Tokenizer
from ftcore.errors import DataError, ModelError

OverLength = Literal["error", "drop", "cut_right"]

SLAB = 1024  # rows tokenised in one call; a library encoding takes some 100 bytes a token


@dataclass(frozen=True)
class Sentence:
    """Words, their tags, and where the first token of each stands (int; -1: it has none)."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    places_W: np.ndarray


@dataclass
class EncodedRows:
    """What rows gave, in their order."""

    documents: list[Encoded] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)  # rows that gave none
    cut: list[Rejected] = field(default_factory=list)  # rows cut to the maximum length
    sentences: dict[str, Sentence] = field(default_factory=dict)  # by row id
    untold: list[Rejected] = field(default_factory=list)  # words that gave no token


def encode_texts(
    texts: Sequence[Text], tokenizer: Tokenizer, *, end: bool, max_length: int | None = None
) -> EncodedRows:
    """Documents of plain text; one longer than `max_length` tokens is `split`."""
    rows = EncodedRows()
    for slab in slabs(texts):
        encodings = tokenizer.encode_batch([text.text for text in slab])
        for text, encoding in zip(slab, encodings, strict=True):
            try:
                document = _supervised_text(text.id, encoding, tokenizer, end=end)
            except RowError as error:
                rows.rejected.append(left_out(text, str(error)))
                continue
            rows.documents += split(document, max_length) if max_length else [document]
    require_some(rows.documents, rows.rejected)
    return rows


def split(document: Encoded, max_length: int) -> list[Encoded]:
    """Pieces of at most `max_length` tokens; the last position of a piece still predicts the first
    token of the next, so that no supervised token is lost. Row ids become "id:0", "id:1", ..."""
    if len(document) <= max_length:
        return [document]
    cuts = [slice(s, s + max_length) for s in range(0, len(document), max_length)]
    return [replace(take(document, c), row_id=f"{document.row_id}:{n}") for n, c in enumerate(cuts)]


def encode_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> np.ndarray:
    """Ids (int32) of a chat that ends where the assistant is to answer.

    They are the ids that `encode_chats` puts before the answer, if that begins with a word: white
    space at the end is tokenised as if a word followed, and left out where it joins that word.
    """
    require_plain(messages, tokenizer)
    text = render_text(messages, tokenizer, add_generation_prompt=True)
    if not text[-1:].isspace():
        return tokenizer.encode(text, special=False).ids_T
    encoding = tokenizer.encode(text + "x", special=False)
    return encoding.ids_T[encoding.offsets_T2[:, 1] <= len(text)]


def encode_chats(
    chats: Sequence[Chat],
    tokenizer: Tokenizer,
    *,
    train_on: TrainOn = "assistant",
    train_on_eot: bool = True,
    max_length: int | None = None,
    over_length: OverLength = "error",
) -> EncodedRows:
    """Chats, with their answers supervised.

    train_on       assistant: messages whose `train` is true, by default all answers;
                   last: the last of these; all: every token of the chat
    train_on_eot   supervise the end-of-turn token too, so that the model learns to stop
    max_length     tokens; None: no limit
    over_length    what happens to a longer chat: error, drop, or cut_right (its end is cut off)
    raises         DataError: a chat is too long (error), or no chat can be used
    """
    rows = EncodedRows()
    for slab in slabs(chats):
        rendered = []
        for chat in slab:
            try:
                rendered.append((chat, *find_answers(chat, tokenizer, train_on=train_on)))
            except RowError as error:
                rows.rejected.append(left_out(chat, str(error)))
        encodings = tokenizer.encode_batch([r.text for _, r, _ in rendered], special=False)
        for (chat, rendering, answers), encoding in zip(rendered, encodings, strict=True):
            document = supervise(
                chat.id, rendering.text, encoding, answers, tokenizer, train_on_eot=train_on_eot
            )
            if max_length is None or len(document) <= max_length:
                rows.documents.append(document)
                continue
            short = take(document, slice(max_length))
            admit_cut(rows, chat, document, short, over_length=over_length)
    require_some(rows.documents, rows.rejected)
    return rows


def encode_labelled(
    example: LabelledText,
    tokenizer: Tokenizer,
    labels: LabelMap | None,
    *,
    max_length: int | None = None,
) -> Encoded:
    """A labelled text or pair: labels is the class index, or which of the classes it has, or the
    score where `labels` is None.

    max_length   tokens; the longer text of a pair loses its end, special tokens stay
    """
    ids_T, types_T = tokenizer.encode_pair(example.text, example.pair, max_length=max_length)
    return _labelled(example, ids_T, types_T, labels)


def encode_labelled_rows(
    examples: Sequence[LabelledText],
    tokenizer: Tokenizer,
    labels: LabelMap | None,
    *,
    max_length: int | None = None,
    over_length: OverLength = "error",
) -> EncodedRows:
    """Many labelled texts; see `encode_labelled` and, for `over_length`, `encode_chats`."""
    rows = EncodedRows()
    pairs = tokenizer.encode_pairs([e.text for e in examples], [e.pair for e in examples])
    for example, (ids_T, types_T) in zip(examples, pairs, strict=True):
        document = _labelled(example, ids_T, types_T, labels)
        if max_length is None or len(document) <= max_length:
            rows.documents.append(document)
        else:
            short = encode_labelled(example, tokenizer, labels, max_length=max_length)
            admit_cut(rows, example, document, short, over_length=over_length)
    require_some(rows.documents, rows.rejected)
    return rows


def pieces(encoding: Encoding, max_length: int) -> list[np.ndarray]:
    """Places of the tokens of each piece of at most `max_length`: some of the text's own between
    the special ones that stand around it.

    raises    DataError: the special tokens leave no room
    """
    own_T = np.flatnonzero(encoding.offsets_T2[:, 1] > encoding.offsets_T2[:, 0])
    first, last = (own_T[0], own_T[-1] + 1) if len(own_T) else (len(encoding), len(encoding))
    head, tail = np.arange(first), np.arange(last, len(encoding))
    room = max_length - len(head) - len(tail)
    if room < 1:
        raise DataError(
            f"data.max_length = {max_length}: {len(head) + len(tail)} special tokens leave no room"
        )
    starts = range(first, max(last, first + 1), room)
    return [np.concatenate([head, np.arange(s, min(s + room, last)), tail]) for s in starts]


def take(document: Encoded, places: np.ndarray | slice) -> Encoded:
    """A document of some of the tokens of one, their labels and weights with them."""
    return Encoded(
        document.row_id,
        document.tokens_T[places],
        document.labels[places],
        document.weights[places],
    )


def show(document: Encoded, tokenizer: Tokenizer) -> str:
    """A document as text, special tokens included, with supervised runs between double brackets."""
    if not isinstance(document.weights, np.ndarray):
        return f"{tokenizer.decode(document.tokens_T, special=True)} -> {document.labels}"
    targets_T = np.append(document.tokens_T[:1], document.labels)
    counts_T = np.append(False, document.weights > 0)
    if not counts_T[-1]:  # the last position predicts nothing
        targets_T, counts_T = targets_T[:-1], counts_T[:-1]
    borders = [0, *(np.flatnonzero(np.diff(counts_T)) + 1), len(targets_T)]
    runs = []
    for start, end in itertools.pairwise(borders):
        run = tokenizer.decode(targets_T[start:end], special=True)
        runs.append(f"[[{run}]]" if counts_T[start] else run)
    return "".join(runs)


def _supervised_text(
    row_id: str, encoding: Encoding, tokenizer: Tokenizer, *, end: bool
) -> Encoded:
    ids_T = encoding.ids_T
    if end:
        if tokenizer.end_of_text_id is None:
            raise ModelError(f"{tokenizer.where}: the tokenizer has no token that ends a text")
        ids_T = np.append(ids_T, np.int32(tokenizer.end_of_text_id))
    if len(ids_T) < 2:
        raise RowError(f"nothing to supervise: the text has {len(ids_T)} token(s)")
    return shifted(row_id, ids_T, np.ones(len(ids_T), dtype=np.float32))


def _labelled(
    example: LabelledText, ids_T: np.ndarray, types_T: np.ndarray, labels: LabelMap | None
) -> Encoded:
    types_T = types_T if types_T.any() else None
    if labels is None:
        return Encoded(example.id, ids_T, float(example.label), 1.0, types_T)
    indices = labels.indices(example)
    if isinstance(example.label, str):
        return Encoded(example.id, ids_T, indices[0], 1.0, types_T)
    has_K = np.zeros(len(labels), dtype=np.float32)
    has_K[indices] = 1.0
    return Encoded(example.id, ids_T, has_K, 1.0, types_T)


def admit_cut(
    rows: EncodedRows,
    source: Chat | LabelledText | Tagged,
    document: Encoded,
    short: Encoded,
    *,
    over_length: OverLength,
) -> None:
    """Deal with a document that is too long, of which `short` is the form cut to length."""
    length, limit = len(document), len(short)
    if over_length == "error":
        raise DataError(
            f"{source.file}:{source.line}: {length} tokens, {limit} are allowed; raise the maximum "
            "length, or choose to drop long rows or to cut them on the right"
        )
    if over_length == "drop":
        rows.rejected.append(left_out(source, f"{length} tokens, {limit} are allowed"))
    elif isinstance(short.weights, np.ndarray) and not short.weights.any():
        reason = f"nothing to supervise in the first {limit} of {length} tokens"
        rows.rejected.append(left_out(source, reason))
    else:
        rows.documents.append(short)
        rows.cut.append(left_out(source, f"cut from {length} to {limit} tokens"))


def left_out(source: Text | Chat | LabelledText | Tagged, reason: str) -> Rejected:
    """What is remembered of a row that is not used as it is."""
    return Rejected(source.id, source.file, source.line, reason)


def slabs(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Rows by the SLAB."""
    for start in range(0, len(rows), SLAB):
        yield rows[start : start + SLAB]
