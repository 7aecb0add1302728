"""Pairs: one prompt, the answer that was chosen and the one that was rejected; rows to documents.

The prompt has columns of its own, or is all but the last turns of two whole conversations. A pair
is one document (`pack.pair`), so that no step divides it. Each conversation ends with its answer.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ftcore.config import ChatDataConfig, PairsDataConfig
from ftcore.data import columns
from ftcore.data.columns import Chat, Mapped, Message, RowError
from ftcore.data.encode import Split, encode
from ftcore.data.formats import Rejected, Row
from ftcore.data.pack import Side, pair
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import ConfigError, DataError

def pairs(rows: Sequence[Row], config: PairsDataConfig) -> Mapped:
    """The pairs of some rows, and the rows that hold none; as `columns.examples`."""
    named = *config.prompt, config.chosen, config.rejected, config.margin
    return columns.mapped(rows, preference, config, *filter(None, named))

def preference(row: Row, config: PairsDataConfig) -> Chat:
    """The chosen conversation, with the other answer and how much worse it is."""
    (*prompt, chosen), (*other, rejected) = (
        conversation(row, column, config) for column in (config.chosen, config.rejected))
    one, two = ([(m["role"], m["content"]) for m in turns] for turns in (prompt, other))
    if not prompt or one != two:
        raise RowError("the two answers have no common prompt")
    if chosen["content"] == rejected["content"]:
        raise RowError("the two answers are the same")
    margin = columns.number_in(str(row.fields.get(config.margin))) if config.margin else 0.0
    if margin is None:
        raise columns.wrong(row, f"column {config.margin!r} must hold a number")
    answer = Message(role="assistant", content=chosen["content"], train=True, weight=1.0)
    return Chat(row.id, (*prompt, answer), row.file, row.line, rejected["content"], margin)

def conversation(row: Row, column: str, config: PairsDataConfig) -> list[Message]:
    """Prompt and answer of one column; RowError: the last turn is empty or not the assistant's."""
    prompt, value = [], row.fields.get(column)
    if config.prompt and isinstance(row.fields.get(config.prompt[0]), list):
        prompt += columns.turns_of(row, config.prompt[0], config)
    elif config.prompt:
        prompt.append(columns.question(row, config.prompt))
    if config.prompt and not isinstance(value, list):
        return [*prompt, Message(role="assistant", content=columns.text_of(row, column))]
    turns = columns.turns_of(row, column, config)
    if config.prompt and len(turns) != 1:
        raise RowError(f"column {column!r} holds {len(turns)} turns: must be one, the answer")
    if turns[-1]["role"] != "assistant" or not turns[-1]["content"].strip():
        raise RowError(f"the last turn of column {column!r} is not an answer of the assistant's")
    return [*prompt, *turns]

def encode_pairs(config: PairsDataConfig, chats: Sequence[Chat], tokenizer: Tokenizer) -> Split:
    """As `encode`: each conversation by the chat template, or as a pair of texts without one. Each
    must fit into `max_length`; cut is the start of a prompt, never an answer (ConfigError)."""
    limit, choice, split = config.max_length, config.over_length, Split()
    if choice in ("cut_right", "split"):
        what = "part of an answer is another answer: choose cut_left, which keeps the end, or drop"
        raise ConfigError(f"data.over_length = {choice}: {what}")
    lead = int(reads_texts(tokenizer) or tokenizer.bos_id is not None)
    others = [replace(chat, messages=(*prompt, {**answer, "content": chat.rejected}))
              for chat in chats for *prompt, answer in [chat.messages]]
    found = [sides(some, tokenizer, config.train_on_end) for some in (chats, others)]
    lost = {row.id: row for _, rows in reversed(found) for row in rows}
    split.rejected += lost.values()
    for chat in (chat for chat in chats if chat.id not in lost):
        both = [read[chat.id] for read, _ in found]
        sizes = [len(ids_T) for ids_T, _, _ in both]
        over, why, is_lost = [max(0, n - (limit or n)) for n in sizes], "", False
        if any(over):
            why, is_lost = f"more than {limit} tokens: {choice}", choice == "drop"
            if choice == "error":
                what = f"{columns.place(chat)}: {max(sizes)} tokens, {limit} are allowed"
                raise DataError(f"{what}; raise data.max_length, or choose data.over_length for it")
            kept = [np.r_[:lead, lead + n : size] for n, size in zip(over, sizes, strict=True)]
            both = [(ids_T[places_T], types_T[places_T], start - n) for
                     (ids_T, types_T, start), n, places_T in zip(both, over, kept, strict=True)]
            if not is_lost and min(start for *_, start in both) <= lead:
                why, is_lost = f"{why}, no room for a prompt", True
        if np.array_equal(both[0][0], both[1][0]):
            why, is_lost = "the two answers are the same tokens", True
        if why:
            (split.rejected if is_lost else split.cut).append(columns.left_out(chat, why))
        if not is_lost:
            split.documents.append(pair(chat.id, both, chat.margin))
    columns.require_some(split.documents, split.rejected)
    return split

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
