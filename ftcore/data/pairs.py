"""Pairs to documents: one prompt, the answer that was chosen and the one that was rejected.

A pair is one document (`pack.pair`), so that no step divides it; each conversation ends with its
answer. One is read by the chat template, or, where an encoder has none, as a pair of texts."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from ftcore.config import ChatDataConfig, OverLength, PairsDataConfig
from ftcore.data import columns
from ftcore.data.columns import Chat, Rejected
from ftcore.data.encode import Split, admit, encode
from ftcore.data.pack import Encoded, Side, pair
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import ConfigError

def encode_pairs(config: PairsDataConfig, chats: Sequence[Chat], tokenizer: Tokenizer) -> Split:
    """As `encode`. Each conversation must fit into `max_length`, and what is cut of one is the
    start of its prompt. ConfigError: answers were to be cut."""
    if config.over_length in ("cut_right", "split"):
        what = "part of an answer is another answer: choose cut_left, which keeps the end, or drop"
        raise ConfigError(f"data.over_length = {config.over_length}: {what}")
    split, lead = Split(), int(reads_texts(tokenizer) or tokenizer.bos_id is not None)
    others = [replace(chat, messages=(*prompt, {**answer, "content": chat.rejected}))
              for chat in chats for *prompt, answer in [chat.messages]]
    found = [sides(some, tokenizer, config.train_on_end) for some in (chats, others)]
    lost = {row.id: row for _, rows in reversed(found) for row in rows}
    split.rejected += lost.values()
    for chat in (chat for chat in chats if chat.id not in lost):
        both = [read[chat.id] for read, _ in found]
        if np.array_equal(both[0][0], both[1][0]):
            split.rejected.append(columns.left_out(chat, "the two answers are the same tokens"))
        else:
            size, shorten = max(len(ids_T) for ids_T, *_ in both), partial(_cut, both, lead)
            admit(split, chat, pair(chat.id, both, chat.margin), shorten, config, size=size)
    columns.require_some(split.documents, split.rejected)
    return split

def _cut(sides: Sequence[Side], lead: int, document: Encoded, limit: int,
         _: OverLength) -> list[Encoded]:
    """The pair without what is over at the starts of its prompts, but for `lead` tokens; none where
    no prompt would be left."""
    both = []
    for ids_T, types_T, start in sides:
        over = max(0, len(ids_T) - limit)
        if start - over <= lead:
            return []
        kept_T = np.r_[:lead, lead + over : len(ids_T)]
        both.append((ids_T[kept_T], types_T[kept_T], start - over))
    return [pair(document.row_id, both, document.labels[3])]

def sides(chats: Sequence[Chat], tokenizer: Tokenizer,
          train_on_end: bool = True) -> tuple[dict[str, Side], list[Rejected]]:
    """What a model reads of each conversation, by id; those that give nothing. DataError: all."""
    found: dict[str, Side] = {}
    if not reads_texts(tokenizer):
        half = encode(ChatDataConfig(train_on="last", train_on_end=train_on_end), chats, tokenizer)
        for document in half.documents:
            scored_M = np.flatnonzero(document.weights)
            ids_T = document.tokens_T[: scored_M[-1] + 2]
            found[document.row_id] = ids_T, np.zeros_like(ids_T), int(scored_M[0]) + 1
        return found, half.rejected
    lost, texts = [], [("\n".join(m["content"] for m in chat.messages[:-1]),
                        chat.messages[-1]["content"]) for chat in chats]
    answers = tokenizer.encode_batch((answer for _, answer in texts), special=False)
    read = zip(chats, tokenizer.encode_pairs(texts), answers, strict=True)
    for chat, (ids_T, types_T), answer in read:
        if len(answer):  # behind it stands one special token
            types_T = np.zeros_like(ids_T) if types_T is None else types_T
            found[chat.id] = ids_T, types_T, len(ids_T) - 1 - len(answer)
        else:
            lost.append(columns.left_out(chat, "an answer is empty"))
    return found, lost

def reads_texts(tokenizer: Tokenizer) -> bool:
    """Whether it is an encoder's, which reads a pair of texts."""
    return tokenizer.chat_template is None and "cls_token" in tokenizer.special
