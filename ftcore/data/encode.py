"""Texts, chats and labelled texts to the `Encoded` documents of a `Split`.

Letters: T tokens of a document.

What counts in a chat is said in supervise.py; in plain text every token counts. Every row becomes a
document, or is rejected with its reason.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import tee

import numpy as np

from ftcore.config import OverLength, TrainOn
from ftcore.data.chat import Message, Rendering, RowError, render_text
from ftcore.data.columns import (
    Chat,
    LabelledText,
    LabelMap,
    Rejected,
    Tagged,
    Text,
    left_out,
    require_some,
)
from ftcore.data.pack import Encoded
from ftcore.data.supervise import find_answers, require_plain, shifted, supervise
from ftcore.data.tokenizer import Encoding, Tokenizer
from ftcore.errors import DataError, ModelError


@dataclass(frozen=True)
class Sentence:
    """Words, their tags, and where the first token of each stands (int; -1: it has none)."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    places_W: np.ndarray


@dataclass
class Split:
    """Documents of one purpose in the order of their rows, and what was lost on the way."""

    documents: Sequence[Encoded] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)  # rows that gave none
    cut: list[Rejected] = field(default_factory=list)  # rows cut to the maximum length
    untold: list[Rejected] = field(default_factory=list)  # words that gave no token
    chats: list[Chat] = field(default_factory=list)  # conversations behind the documents
    sentences: list[Sentence] = field(default_factory=list)  # sentences behind the documents
    num_bytes: int = 0  # UTF-8 bytes of plain text, for bits per byte; 0 for other data


def encode_texts(
    texts: Sequence[Text], tokenizer: Tokenizer, *, end: bool, max_length: int | None = None
) -> Split:
    """Documents of plain text; one longer than `max_length` tokens becomes several."""
    if end and tokenizer.end_of_text_id is None:
        raise ModelError(f"{tokenizer.where}: the tokenizer has no token that ends a text")
    last_T = np.array([tokenizer.end_of_text_id] if end else [], dtype=np.int32)
    split = Split(num_bytes=sum(len(text.text.encode()) for text in texts))
    encodings = tokenizer.encode_batch([text.text for text in texts])
    for text, encoding in zip(texts, encodings, strict=True):
        ids_T = np.append(encoding.ids_T, last_T)
        if len(ids_T) < 2:
            reason = f"nothing to supervise: the text has {len(ids_T)} token(s)"
            split.rejected.append(left_out(text, reason))
            continue
        document = shifted(text.id, ids_T, np.ones(len(ids_T), dtype=np.float32))
        split.documents += parts(document, max_length) if max_length else [document]
    require_some(split.documents, split.rejected)
    return split


def parts(document: Encoded, max_length: int) -> list[Encoded]:
    """A document in parts of at most `max_length` tokens; the last position of a part still
    predicts the first token of the next, so that no supervised token is lost. Row ids become
    "id:0", "id:1", ..."""
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
    max_length: int | None = None,
    over_length: OverLength = "error",
) -> Split:
    """Chats, with their answers supervised.

    train_on       assistant: messages whose `train` is true, by default all answers;
                   last: the last of these; all: every token of the chat
    max_length     tokens; None: no limit
    over_length    what happens to a longer chat: error, drop, or cut_right (its end is cut off)
    raises         DataError: a chat is too long (error), or no chat can be used
    """
    split = Split()

    def rendered() -> Iterator[tuple[Chat, Rendering, list[tuple[int, int, float]]]]:
        for chat in chats:
            try:
                yield chat, *find_answers(chat, tokenizer, train_on=train_on)
            except RowError as error:
                split.rejected.append(left_out(chat, str(error)))

    ahead, kept = tee(rendered())
    encodings = tokenizer.encode_batch((r.text for _, r, _ in ahead), special=False)
    for (chat, rendering, answers), encoding in zip(kept, encodings, strict=True):
        document = supervise(chat.id, rendering.text, encoding, answers, tokenizer)
        is_long = max_length is not None and len(document) > max_length
        short = take(document, slice(max_length)) if is_long else document
        admit(split, chat, document, short, over_length=over_length)
    require_some(split.documents, split.rejected)
    used = {document.row_id for document in split.documents}
    split.chats = [chat for chat in chats if chat.id in used]
    return split


def encode_labelled(
    examples: Sequence[LabelledText],
    tokenizer: Tokenizer,
    labels: LabelMap | None,
    *,
    max_length: int | None = None,
    over_length: OverLength = "error",
) -> Split:
    """Labelled texts and pairs: a label is the class index, or which of the classes a text has, or
    the score where `labels` is None.

    max_length   tokens; the longer text of a pair loses its end, special tokens stay
    over_length  see `encode_chats`
    """
    split, limit = Split(), max_length or math.inf

    def encoded(some: Sequence[LabelledText], max_length: int | None) -> Iterator[Encoded]:
        texts, seconds = [e.text for e in some], [e.pair for e in some]
        pairs = tokenizer.encode_pairs(texts, seconds, max_length=max_length)
        return (_labelled(e, *pair, labels) for e, pair in zip(some, pairs, strict=True))

    documents = list(encoded(examples, None))
    long = [e for e, d in zip(examples, documents, strict=True) if len(d) > limit]
    cut = encoded(long, max_length)
    for example, document in zip(examples, documents, strict=True):
        short = next(cut) if len(document) > limit else document
        admit(split, example, document, short, over_length=over_length)
    require_some(split.documents, split.rejected)
    return split


def _labelled(
    example: LabelledText, ids_T: np.ndarray, types_T: np.ndarray | None, labels: LabelMap | None
) -> Encoded:
    if labels is None:
        label = float(example.label)
    elif isinstance(example.label, str):
        (label,) = labels.indices(example)
    else:
        label = np.zeros(len(labels), dtype=np.float32)
        label[labels.indices(example)] = 1.0
    return Encoded(example.id, ids_T, label, types_T=types_T)


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


def admit(
    split: Split,
    source: Chat | LabelledText | Tagged,
    document: Encoded,
    short: Encoded,
    *,
    over_length: OverLength,
) -> None:
    """Take in a document, of which `short` is the form cut to length, or deal with its excess."""
    length, limit = len(document), len(short)
    if length == limit:
        split.documents.append(document)
    elif over_length == "error":
        raise DataError(
            f"{source.file}:{source.line}: {length} tokens, {limit} are allowed; raise the maximum "
            "length, or choose to drop long rows or to cut them on the right"
        )
    elif over_length == "drop":
        split.rejected.append(left_out(source, f"{length} tokens, {limit} are allowed"))
    elif isinstance(short.weights, np.ndarray) and not short.weights.any():
        reason = f"nothing to supervise in the first {limit} of {length} tokens"
        split.rejected.append(left_out(source, reason))
    else:
        split.documents.append(short)
        split.cut.append(left_out(source, f"cut from {length} to {limit} tokens"))
