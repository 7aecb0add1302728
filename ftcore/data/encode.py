"""Text, chats and labelled texts to `Encoded` documents: token ids with what is supervised.

Letters: T tokens of a document.

Labels are shifted: labels[t] is token t + 1 and weights[t] says how much predicting it counts.
Which tokens of a chat count follows from character spans of its one rendering: a token counts if it
overlaps an answer. An answer begins where generation would begin (after the template's generation
prompt) and ends with the special token that the template puts right after it, the end of the turn.

Batch functions return `EncodedRows`: every row is a document, or rejected with its reason.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from ftcore.data.chat import Message, Rendering, RowError, generation_prompt, render, render_text
from ftcore.data.columns import Chat, LabelledText, LabelMap, Rejected, Text, require_some
from ftcore.data.pack import Encoded
from ftcore.data.tokenizer import Encoding, Tokenizer
from ftcore.errors import DataError, ModelError

TrainOn = Literal["assistant", "last", "all"]
OverLength = Literal["error", "drop", "cut_right"]

IGNORED = -100  # label of a position that predicts nothing
_SPACE = re.compile(r"\s*")
SLAB = 1024  # rows tokenised in one call; a library encoding takes some 100 bytes a token


@dataclass
class EncodedRows:
    """Documents in row order; rows that gave none; rows that were cut to the maximum length."""

    documents: list[Encoded] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    cut: list[Rejected] = field(default_factory=list)


def encode_text(row_id: str, text: str, tokenizer: Tokenizer, *, end: bool) -> Encoded:
    """A document of plain text, every token supervised.

    end       close it with one end-of-text token
    raises    RowError: fewer than two tokens, so nothing to predict
    """
    return _supervised_text(row_id, tokenizer.encode(text), tokenizer, end=end)


def encode_texts(
    texts: Sequence[Text], tokenizer: Tokenizer, *, end: bool, max_length: int | None = None
) -> EncodedRows:
    """Documents of plain text; one longer than `max_length` tokens is `split`."""
    rows = EncodedRows()
    for slab in _slabs(texts):
        encodings = tokenizer.encode_batch([text.text for text in slab])
        for text, encoding in zip(slab, encodings, strict=True):
            try:
                document = _supervised_text(text.id, encoding, tokenizer, end=end)
            except RowError as error:
                rows.rejected.append(_rejected(text, str(error)))
                continue
            rows.documents += split(document, max_length) if max_length else [document]
    require_some(rows.documents, rows.rejected)
    return rows


def split(document: Encoded, max_length: int) -> list[Encoded]:
    """Pieces of at most `max_length` tokens; the last position of a piece still predicts the first
    token of the next, so that no supervised token is lost. Row ids become "id:0", "id:1", ..."""
    if len(document) <= max_length:
        return [document]
    starts = range(0, len(document), max_length)
    return [
        replace(_slice(document, start, start + max_length), row_id=f"{document.row_id}:{number}")
        for number, start in enumerate(starts)
    ]


def encode_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> np.ndarray:
    """Ids (int32) of a chat that ends where the assistant is to answer.

    They are the ids that `encode_chat` puts before the answer: white space at the end is tokenised
    as if a word followed, and left to the answer where it shares a token with that word.
    """
    _require_plain(messages, tokenizer)
    text = render_text(messages, tokenizer, add_generation_prompt=True)
    if not text[-1:].isspace():
        return tokenizer.encode(text, special=False).ids_T
    encoding = tokenizer.encode(text + "x", special=False)
    return encoding.ids_T[encoding.offsets_T2[:, 1] <= len(text)]


def encode_chat(
    chat: Chat, tokenizer: Tokenizer, *, train_on: TrainOn = "assistant", train_on_eot: bool = True
) -> Encoded:
    """A chat, with its answers supervised.

    train_on       assistant: messages whose `train` is true, by default all answers;
                   last: the last of these; all: every token of the chat
    train_on_eot   supervise the end-of-turn token too, so that the model learns to stop
    raises         RowError: nothing to supervise, or contents that the template cannot carry
    """
    rendering, answers = _answers(chat, tokenizer, train_on)
    encoding = tokenizer.encode(rendering.text, special=False)
    return _supervised_chat(chat.id, rendering.text, encoding, answers, tokenizer, train_on_eot)


def encode_chats(
    chats: Sequence[Chat],
    tokenizer: Tokenizer,
    *,
    train_on: TrainOn = "assistant",
    train_on_eot: bool = True,
    max_length: int | None = None,
    over_length: OverLength = "error",
) -> EncodedRows:
    """Many chats; see `encode_chat`.

    max_length    tokens; None: no limit
    over_length   what happens to a longer chat: error, drop, or cut_right (its end is cut off)
    raises        DataError: a chat is too long (error), or no chat can be used
    """
    rows = EncodedRows()
    for slab in _slabs(chats):
        rendered = []
        for chat in slab:
            try:
                rendered.append((chat, *_answers(chat, tokenizer, train_on)))
            except RowError as error:
                rows.rejected.append(_rejected(chat, str(error)))
        encodings = tokenizer.encode_batch([r.text for _, r, _ in rendered], special=False)
        for (chat, rendering, answers), encoding in zip(rendered, encodings, strict=True):
            document = _supervised_chat(
                chat.id, rendering.text, encoding, answers, tokenizer, train_on_eot
            )
            if max_length is None or len(document) <= max_length:
                rows.documents.append(document)
                continue
            short = _slice(document, 0, max_length)
            _admit_cut(rows, chat, document, short, over_length=over_length)
    require_some(rows.documents, rows.rejected)
    return rows


def encode_labelled(
    example: LabelledText,
    tokenizer: Tokenizer,
    labels: LabelMap | None,
    *,
    max_length: int | None = None,
) -> Encoded:
    """A labelled text or pair: labels is the class index, or the score where `labels` is None.

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
            _admit_cut(rows, example, document, short, over_length=over_length)
    require_some(rows.documents, rows.rejected)
    return rows


def show(document: Encoded, tokenizer: Tokenizer) -> str:
    """A document as text, special tokens included, with supervised runs between double brackets."""
    if not isinstance(document.labels, np.ndarray):
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


def _answers(
    chat: Chat, tokenizer: Tokenizer, train_on: TrainOn
) -> tuple[Rendering, list[tuple[int, int, float]]]:
    """A chat's text, and what is supervised in it: start and end in characters, weight."""
    _require_plain(chat.messages, tokenizer)
    rendering = render(chat.messages, tokenizer)
    if train_on == "all":
        return rendering, [(0, len(rendering.text), 1.0)]
    trained = [
        index
        for index, message in enumerate(chat.messages)
        if message.get("train", message["role"] == "assistant") and message.get("weight", 1.0) > 0
    ]
    if not trained:
        roles = ", ".join(message["role"] for message in chat.messages)
        raise RowError(f"nothing to supervise: no message is trained on (roles: {roles})")
    header = generation_prompt(tokenizer)
    answers = []
    for index in trained[-1:] if train_on == "last" else trained:
        message, span = chat.messages[index], rendering.spans[index]
        if not message["content"].strip():
            raise RowError(f"message {index + 1} is to be trained on but empty")
        if span is None:
            raise RowError(f"message {index + 1} is to be trained on but the template omits it")
        start = span[0]
        if message["role"] == "assistant":
            start = _generation_start(rendering, index, header)
        answers.append((start, span[1], message.get("weight", 1.0)))
    return rendering, answers


def _generation_start(rendering: Rendering, index: int, header: str) -> int:
    """Where generation of this answer would begin: after the generation prompt, else at the white
    space before the content. Qwen3's empty <think> part is thus the model's to write."""
    start = rendering.spans[index][0]
    before = max((span[1] for span in rendering.spans[:index] if span), default=0)
    place = rendering.text.rfind(header, before, start) if header else -1
    if place >= 0:
        return place + len(header)
    return before + len(rendering.text[before:start].rstrip())


def _supervised_chat(
    row_id: str,
    text: str,
    encoding: Encoding,
    answers: Sequence[tuple[int, int, float]],
    tokenizer: Tokenizer,
    train_on_eot: bool,
) -> Encoded:
    starts_T, ends_T = encoding.offsets_T2.T
    weights_T = np.zeros(len(encoding), dtype=np.float32)
    for start, end, weight in answers:
        weights_T[(starts_T < end) & (ends_T > start)] = weight
        if train_on_eot:
            weights_T[_end_of_turn(text, encoding, end, tokenizer)] = weight
    return _shifted(row_id, encoding.ids_T, weights_T)


def _end_of_turn(text: str, encoding: Encoding, end: int, tokenizer: Tokenizer) -> slice:
    """Tokens of the special token that follows a content; white space may stand before eos."""
    gap_end = _SPACE.match(text, end).end()
    first, last = np.searchsorted(encoding.offsets_T2[:, 0], (end, gap_end))
    if last < len(encoding):
        id_ = int(encoding.ids_T[last])
        if id_ == tokenizer.eos_id or (id_ in tokenizer.special_ids and gap_end == end):
            return slice(first, last + 1)
    return slice(0)


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
    return _shifted(row_id, ids_T, np.ones(len(ids_T), dtype=np.float32))


def _shifted(row_id: str, ids_T: np.ndarray, counts_T: np.ndarray) -> Encoded:
    """A document whose token t counts `counts_T[t]`; the first token is never predicted."""
    labels_T = np.append(ids_T[1:], np.int32(IGNORED))
    weights_T = np.append(counts_T[1:], np.float32(0))
    return Encoded(row_id, ids_T, labels_T, weights_T)


def _labelled(
    example: LabelledText, ids_T: np.ndarray, types_T: np.ndarray, labels: LabelMap | None
) -> Encoded:
    label = float(example.label) if labels is None else labels.index(example)
    return Encoded(example.id, ids_T, label, 1.0, types_T if types_T.any() else None)


def _admit_cut(
    rows: EncodedRows,
    source: Chat | LabelledText,
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
        rows.rejected.append(_rejected(source, f"{length} tokens, {limit} are allowed"))
    elif isinstance(short.weights, np.ndarray) and not short.weights.any():
        reason = f"nothing to supervise in the first {limit} of {length} tokens"
        rows.rejected.append(_rejected(source, reason))
    else:
        rows.documents.append(short)
        rows.cut.append(_rejected(source, f"cut from {length} to {limit} tokens"))


def _rejected(source: Text | Chat | LabelledText, reason: str) -> Rejected:
    return Rejected(source.id, source.file, source.line, reason)


def _slice(document: Encoded, start: int, end: int) -> Encoded:
    """Positions start to end of a document of a token task, labels and weights with them."""
    return Encoded(
        document.row_id,
        document.tokens_T[start:end],
        document.labels[start:end],
        document.weights[start:end],
    )


def _require_plain(messages: Sequence[Message], tokenizer: Tokenizer) -> None:
    for number, message in enumerate(messages, start=1):
        token = tokenizer.find_special(message["content"])
        if token is not None:
            raise RowError(
                f"message {number} holds the special token {token!r}, which would be read as the "
                "template's own; remove it or write it differently"
            )


def _slabs(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(rows), SLAB):
        yield rows[start : start + SLAB]
