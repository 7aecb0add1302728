"""What is supervised in a chat: answers as character spans, spans as weights of tokens.

Of a document of T tokens labels[t] is token t + 1, and weights[t] how much predicting it counts. A
token counts if it overlaps an answer, which begins where generation would begin (after the
template's generation prompt) and ends with the special token right after it, the end of the turn.
A header that swallows the white space behind it, as Phi-3's tokens do, is no part of an answer.
"""

import re
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from ftcore.config import TrainOn
from ftcore.data.chat import Message, Rendering, RowError, generation_prompt, render, render_text
from ftcore.data.columns import Chat
from ftcore.data.pack import Encoded
from ftcore.data.tokenizer import Encoding, Tokenizer

Answers = Sequence[tuple[int, int, float]]  # start and end in characters, weight
IGNORED = -100  # label of a position that predicts nothing
_SPACE = re.compile(r"\s*")

def find_answers(
    chat: Chat, tokenizer: Tokenizer, *, train_on: TrainOn
) -> tuple[Rendering, Answers]:
    """A chat's text, and what is supervised in it (`train_on`: see `encode_chats`). RowError:
    nothing is supervised, or an answer is empty or not in the text."""
    require_plain(chat.messages, tokenizer)
    rendering = render(chat.messages, tokenizer)
    if train_on == "all":
        return rendering, [(0, len(rendering.text), 1.0)]
    trained = [
        i for i, message in enumerate(chat.messages)
        if message.get("train", message["role"] == "assistant") and message.get("weight", 1.0) > 0
    ]  # fmt: skip
    if not trained:
        roles = ", ".join(message["role"] for message in chat.messages)
        raise RowError(f"nothing to supervise: no message is trained on (roles: {roles})")
    header = generation_prompt(tokenizer)
    before = list(accumulate((span[1] if span else 0 for span in rendering.spans), max, initial=0))
    answers = []
    for index in trained if train_on == "assistant" else trained[-1:]:
        message, span = chat.messages[index], rendering.spans[index]
        if not message["content"].strip():
            raise RowError(f"message {index + 1} is to be trained on but empty")
        if span is None:
            raise RowError(f"message {index + 1} is to be trained on but the template omits it")
        start, end = span
        if train_on == "completion":
            if index + 1 < len(chat.messages):
                raise RowError(f"message {index + 1} is to be completed, but others follow it")
            prompt = render_text(chat.messages[:index], tokenizer, add_generation_prompt=True)
            if not rendering.text.startswith(prompt):
                raise RowError("its text does not begin with its prompt's; take data.train_on last")
            start, end = len(prompt), len(rendering.text)
        elif message["role"] == "assistant":
            # after the generation prompt, else at the white space before the content: Qwen3's empty
            # <think> part is thus the model's to write
            place = rendering.text.rfind(header, before[index], start) if header else -1
            space = before[index] + len(rendering.text[before[index] : start].rstrip())
            start = place + len(header) if place >= 0 else space
        answers.append((start, end, message.get("weight", 1.0)))
    return rendering, answers

def supervise(
    row_id: str, text: str, encoding: Encoding, answers: Answers, tokenizer: Tokenizer, *,
    train_on_end: bool,
) -> Encoded:  # fmt: skip
    """The document of a tokenised chat: tokens that overlap an answer count with its weight, and so
    does the end of its turn, so that the model learns to stop, if `train_on_end`."""
    starts_T, ends_T = np.ascontiguousarray(encoding.offsets_T2.T)  # both in order
    weights_T = np.zeros(len(encoding), dtype=np.float32)
    for start, end, weight in answers:
        first, past = ends_T.searchsorted(start, "right"), starts_T.searchsorted(end)
        if first < past and starts_T[first] < start:
            first += int(encoding.ids_T[first]) in tokenizer.special_ids
        weights_T[first:past] = weight
        if train_on_end:
            space_end = _SPACE.match(text, end).end()  # white space may stand before eos
            first, last = ends_T.searchsorted([end, space_end], "right")
            id_ = int(encoding.ids_T[last]) if last < len(encoding) else -1
            is_special = id_ in tokenizer.special_ids and space_end == end
            if is_special or id_ == tokenizer.eos_id:
                weights_T[first : last + 1] = weight
    return shifted(row_id, encoding.ids_T, weights_T)

def shifted(row_id: str, ids_T: np.ndarray, counts_T: np.ndarray) -> Encoded:
    """A document whose token t counts `counts_T[t]`; the first token is never predicted."""
    labels_T, weights_T = ids_T.copy(), counts_T.copy()
    labels_T[:-1], weights_T[:-1] = ids_T[1:], counts_T[1:]
    labels_T[-1:], weights_T[-1:] = IGNORED, 0
    return Encoded(row_id, ids_T, labels_T, weights_T)

def require_plain(messages: Sequence[Message], tokenizer: Tokenizer) -> None:
    """RowError if a content spells a special token, with which it could forge a turn."""
    for number, message in enumerate(messages, start=1):
        if (token := tokenizer.find_special(message["content"])) is not None:
            what = f"message {number} holds the special token {token!r}, which would be read as the"
            raise RowError(f"{what} template's own; remove it or write it differently")
