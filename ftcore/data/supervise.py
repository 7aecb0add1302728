"""What is supervised in a chat: answers as character spans, spans as weights of tokens.

Letters: T tokens of a document.

Labels are shifted: labels[t] is token t + 1 and weights[t] says how much predicting it counts.
Which tokens count follows from character spans of the chat's one rendering: a token counts if it
overlaps an answer. An answer begins where generation would begin (after the template's generation
prompt) and ends with the special token that the template puts right after it, the end of the turn.
"""

import re
from collections.abc import Sequence

import numpy as np

from ftcore.config import TrainOn
from ftcore.data.chat import Message, Rendering, RowError, generation_prompt, render
from ftcore.data.columns import Chat
from ftcore.data.pack import Encoded
from ftcore.data.tokenizer import Encoding, Tokenizer

IGNORED = -100  # label of a position that predicts nothing
_SPACE = re.compile(r"\s*")


def find_answers(
    chat: Chat, tokenizer: Tokenizer, *, train_on: TrainOn
) -> tuple[Rendering, list[tuple[int, int, float]]]:
    """A chat's text, and what is supervised in it: start and end in characters, weight.

    train_on    see `encode_chats`
    raises      RowError: nothing is supervised, or an answer is empty or not in the text
    """
    require_plain(chat.messages, tokenizer)
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


def supervise(
    row_id: str,
    text: str,
    encoding: Encoding,
    answers: Sequence[tuple[int, int, float]],
    tokenizer: Tokenizer,
) -> Encoded:
    """The document of a tokenised chat: tokens that overlap an answer count with its weight, and so
    does the end of its turn, so that the model learns to stop."""
    starts_T, ends_T = np.ascontiguousarray(encoding.offsets_T2.T)
    weights_T = np.zeros(len(encoding), dtype=np.float32)
    for start, end, weight in answers:
        weights_T[(starts_T < end) & (ends_T > start)] = weight
        weights_T[_end_of_turn(text, encoding.ids_T, starts_T, end, tokenizer)] = weight
    return shifted(row_id, encoding.ids_T, weights_T)


def _end_of_turn(
    text: str, ids_T: np.ndarray, starts_T: np.ndarray, end: int, tokenizer: Tokenizer
) -> slice:
    """Tokens of the special token that follows a content; white space may stand before eos."""
    gap_end = _SPACE.match(text, end).end()
    first, last = starts_T.searchsorted(end), starts_T.searchsorted(gap_end)
    if last < len(ids_T):
        id_ = int(ids_T[last])
        if id_ == tokenizer.eos_id or (id_ in tokenizer.special_ids and gap_end == end):
            return slice(first, last + 1)
    return slice(0)


def shifted(row_id: str, ids_T: np.ndarray, counts_T: np.ndarray) -> Encoded:
    """A document whose token t counts `counts_T[t]`; the first token is never predicted."""
    labels_T, weights_T = np.full_like(ids_T, IGNORED), np.zeros_like(counts_T)
    labels_T[:-1], weights_T[:-1] = ids_T[1:], counts_T[1:]
    return Encoded(row_id, ids_T, labels_T, weights_T)


def require_plain(messages: Sequence[Message], tokenizer: Tokenizer) -> None:
    """RowError if a content spells a special token, with which it could forge a turn."""
    for number, message in enumerate(messages, start=1):
        token = tokenizer.find_special(message["content"])
        if token is not None:
            raise RowError(
                f"message {number} holds the special token {token!r}, which would be read as the "
                "template's own; remove it or write it differently"
            )
