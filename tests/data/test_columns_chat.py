"""Rows to chats: turns under any keys, questions with their answers, transcripts."""

import pytest
from ftcore.config import ChatDataConfig
from ftcore.data.columns import Row, examples
from ftcore.data.prepare import prepare
from ftcore.data.read import BUILTIN_CHAT
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import DataError
from ftcore.hub import resolve

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}
SPEAKERS = ("User 1=user", "User 2=assistant")

def rows(*fields):
    return [Row(f"id{n}", "f.jsonl", n, dict(f)) for n, f in enumerate(fields, start=1)]

def said(chat):
    return [(m["role"], m["content"], m["train"]) for m in chat.messages]

def test_chats_fill_in_what_is_trained():
    system = {"role": "system", "content": ""}
    kept, _ = examples(rows({"messages": [system, USER, ANSWER]}), ChatDataConfig())
    assert kept[0].messages[2] == {**ANSWER, "train": True, "weight": 1.0}
    assert [m["train"] for m in kept[0].messages] == [False, False, True]
    turns = [{**USER, "train": True, "name": "x"}, {**ANSWER, "train": False, "weight": 2}]
    kept, _ = examples(rows({"dialog": turns}), ChatDataConfig(messages="dialog"))
    assert [(m["train"], m["weight"]) for m in kept[0].messages] == [(True, 1.0), (False, 2.0)]

def test_chats_without_messages_or_with_tools_are_rejected():
    call = {**ANSWER, "tool_calls": [{"name": "f"}]}
    source = rows(
        {"messages": [USER, ANSWER]},
        {"messages": []},
        {"messages": None},
        {"messages": [USER, call]},
    )
    kept, rejected = examples(source, ChatDataConfig())
    assert len(kept) == 1
    assert [r.reason for r in rejected] == [
        "column 'messages' holds no messages",
        "column 'messages' holds no messages",
        "message 2 holds 'tool_calls', which is not supported",
    ]

@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("User: hi", "column 'messages' must hold a list .*of a transcript name the speakers"),
        ({"a": 1}, "column 'messages' must hold a list of messages; .*; the row"),
        ([USER, "hi"], 'message 2 must be {"role": ..., "content": text}'),
        ([{"role": "user"}], "message 1 must be"),
        ([{"role": "user", "content": 3}], "message 1 must be"),
        ([{**USER, "role": "asistant"}], "message 1 has role 'asistant', .*; nearest: 'assistant'"),
        ([{**USER, "role": "human"}], "message 1 has role 'human'.*with data.roles, as human=user"),
        ([{**USER, "role": None}], "message 1 has role None"),
        ([{**USER, "role": ["user"]}], "message 1 has role"),
        ([{**USER, "train": "yes"}], "message 1: \"train\" must be true or false, not 'yes'"),
        ([{**USER, "weight": -1}], 'message 1: "weight" must be a number >= 0, not -1'),
        ([{**USER, "weight": True}], 'message 1: "weight" must be a number'),
    ],
)
def test_bad_messages_are_errors_that_print_the_row(turns, message):
    with pytest.raises(DataError, match=f"f.jsonl:2: {message}") as error:
        examples(rows({"messages": [USER, ANSWER]}, {"messages": turns}), ChatDataConfig())
    assert 'the row is {"messages": ' in str(error.value)

def test_turns_under_other_keys_and_roles():
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello", "train": False}]
    source = rows({"conversations": turns})
    options = {"messages": "conversations", "turn": ("from", "value")}
    kept, _ = examples(source, ChatDataConfig(**options, roles=("human=user", "gpt=assistant")))
    assert said(kept[0]) == [("user", "hi", False), ("assistant", "hello", False)]
    with pytest.raises(DataError, match='message 1 must be {"role": ..., "content": text}'):
        examples(source, ChatDataConfig(messages="conversations"))
    with pytest.raises(DataError, match="f.jsonl: no column 'messages'"):
        examples(source, ChatDataConfig())

def test_transcripts():
    texts = (
        "User 1: Hi!\r\nUser 2:How: are you?\n\nStill here?\nUser 1: Fine.\nUser 1:\nUser 10: no",
        "\n\nUser 2: me first",
        "(a bar)\nUser 1: hi",
        "nobody: speaks",
        "",
    )
    source = rows(*({"messages": text} for text in texts))
    kept, rejected = examples(source, ChatDataConfig(roles=SPEAKERS))
    assert said(kept[0]) == [
        ("user", "Hi!", False),
        ("assistant", "How: are you?\n\nStill here?", True),
        ("user", "Fine.", False),
        ("user", "User 10: no", False),
    ]
    assert said(kept[1]) == [("assistant", "me first", True)]
    begins = "the transcript does not begin with one of User 1, User 2"
    assert [r.reason for r in rejected] == [begins, begins, "column 'messages' holds no messages"]

def test_questions_with_answers():
    source = rows(
        {"q": "Sum?", "input": "1 2", "a": "3"},
        {"q": "Say hi.", "input": "", "a": "hi"},
        {"q": "Say ho.", "a": "ho"},
        {"q": "", "input": "x", "a": "y"},
        {"q": "x", "input": "", "a": " "},
    )
    config = ChatDataConfig(prompt=("q", "input"), answer="a")
    kept, rejected = examples(source, config)
    assert said(kept[0]) == [("user", "Sum?\n\n1 2", False), ("assistant", "3", True)]
    assert [chat.messages[0]["content"] for chat in kept[1:]] == ["Say hi.", "Say ho."]
    assert [r.reason for r in rejected] == ["column 'q' is empty", "column 'a' is empty"]
    with pytest.raises(DataError, match="no column 'answer'; its columns are 'q', 'input', 'a'"):
        examples(source, ChatDataConfig(prompt=("q",), answer="answer"))
    with pytest.raises(DataError, match="f.jsonl:1: column 'input' must hold text, not int"):
        examples(rows({"q": "a", "input": 3, "a": "b"}), config)

def test_real_chats(data_dir):
    tokenizer = Tokenizer.load(resolve("builtin:base"))
    count = {
        "gsm8k/test.jsonl": (1319, {"prompt": ("question",)}),
        "gpteacher/codegen-instruct.json.gz": (
            4535, {"prompt": ("instruction", "input"), "answer": "response"},
        ),
        "taskmaster4/data/data_07.json.gz": (
            210, {"messages": "utterances", "turn": ("speaker", "text")},
        ),
        "synthetic_persona_chat/Synthetic-Persona-Chat_test.csv.gz": (
            968,
            {
                "messages": "Best Generated Conversation",
                "roles": ("User 1=user", "User 2=assistant"),
            },
        ),
    }  # fmt: skip
    for name, (number, options) in count.items():
        config = ChatDataConfig(test=(str(data_dir / name),), **options)
        (split,) = prepare(config, tokenizer, seed=0).tests.values()
        assert len(split.documents) + len(split.rejected) == number, name
        assert len(split.rejected) <= 0.01 * number, [row.reason for row in split.rejected]

def test_rows_held_out_of_chats():
    tokenizer = Tokenizer.load(resolve("builtin:base"))
    config = ChatDataConfig(train=(BUILTIN_CHAT,), holdout=20)
    data = prepare(config, tokenizer, seed=0)
    ids = [{d.row_id for d in split.documents} for split in (data.train, data.dev)]
    assert len(ids[1]) == 20 and not ids[0] & ids[1]
