"""Rows to chats: lists of turns, questions with their answers, and transcripts.

    turns        [{"role": "user", "content": ...}, ...], under these keys or others
    question     one column, or several that are joined by an empty line, and one of the answer
    transcript   text, each turn after the name of its speaker and a colon at the start of a line
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_type_hints

from ftcore.data.chat import Message, RowError
from ftcore.data.columns import Chat, Mapped, examples, text_of, wrong
from ftcore.data.read import Row
from ftcore.errors import nearest

Keys = tuple[str, str]  # of a turn's role and its text
ROLES = get_args(get_type_hints(Message)["role"])
UNSUPPORTED = ("tool_calls", "function_call", "reasoning_content", "thinking", "reasoning")

def chats(
    rows: Sequence[Row], *, messages: str = "messages", keys: Keys = ("role", "content"),
    roles: Mapping[str, str] | None = None,
) -> Mapped[Chat]:  # fmt: skip
    """Chats from a column that holds a list of turns, or a transcript. A turn may also hold "train"
    (bool; by default answers are trained on, nothing else) and "weight" (number, default 1); other
    keys are ignored, but for those that change the text.

    roles     what the file calls them -> ours; these names part the turns of a transcript
    raises    DataError: a column is missing, a role is unknown, a value has the wrong type
    """
    names = dict(roles or {})

    def example(row: Row) -> Chat:
        turns = row.fields.get(messages)
        if turns in (None, [], ""):
            raise RowError(f"column {messages!r} holds no messages")
        if isinstance(turns, str) and names:
            turns = transcript(turns, names, keys)
        if not isinstance(turns, list):
            is_text = isinstance(turns, str)
            hint = "; for a transcript name its speakers with data.roles" if is_text else ""
            raise wrong(row, f"column {messages!r} must hold a list of messages{hint}")
        for number, turn in enumerate(turns, start=1):
            for key in UNSUPPORTED:
                if isinstance(turn, dict) and turn.get(key):
                    raise RowError(f"message {number} holds {key!r}, which is not supported")
        checked = tuple(message(row, n, turn, keys, names) for n, turn in enumerate(turns, start=1))
        return Chat(row.id, checked, row.file, row.line)

    return examples(rows, [messages], example)

def answered(rows: Sequence[Row], *, prompt: Sequence[str], answer: str) -> Mapped[Chat]:
    """Chats of one question and its answer; columns of `prompt` after the first may be empty.
    Raises DataError: a column is missing, a value is not text."""

    def example(row: Row) -> Chat:
        first, *others = prompt
        asked = [text_of(row, first)]
        asked += [text_of(row, name) for name in others if row.fields.get(name) not in (None, "")]
        question = Message(role="user", content="\n\n".join(asked), train=False, weight=1.0)
        reply = Message(role="assistant", content=text_of(row, answer), train=True, weight=1.0)
        return Chat(row.id, (question, reply), row.file, row.line)

    return examples(rows, [*prompt, answer], example)

def transcript(text: str, roles: Mapping[str, str], keys: Keys) -> list[dict[str, str]]:
    """Turns of a transcript; RowError where text stands before the first."""
    marks = "|".join(map(re.escape, roles))
    before, *parts = re.split(rf"^({marks}):", text, flags=re.M)
    if before.strip() or not parts:
        raise RowError(f"the transcript does not begin with one of {', '.join(roles)}")
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{keys[0]: speaker, keys[1]: said.strip()} for speaker, said in turns]

def message(row: Row, number: int, turn: Any, keys: Keys, roles: Mapping[str, str]) -> Message:
    """A turn as a message; `number` counts the turns of the row from 1."""
    if not isinstance(turn, dict) or not isinstance(turn.get(keys[1]), str):
        raise wrong(row, f'message {number} must be {{"{keys[0]}": ..., "{keys[1]}": text}}')
    said = turn.get(keys[0])
    role = roles.get(said, said) if isinstance(said, str) else said
    if role not in ROLES:
        hint = nearest(str(role), ROLES) or f"; name it with data.roles, as {role}=user"
        raise wrong(row, f"message {number} has role {role!r}, not one of {', '.join(ROLES)}{hint}")
    train, weight = turn.get("train", role == "assistant"), turn.get("weight", 1.0)
    if not isinstance(train, bool):
        raise wrong(row, f'message {number}: "train" must be true or false, not {train!r}')
    if type(weight) not in (int, float) or not 0 <= weight < math.inf:
        raise wrong(row, f'message {number}: "weight" must be a number >= 0, not {weight!r}')
    return Message(role=role, content=turn[keys[1]], train=train, weight=float(weight))
