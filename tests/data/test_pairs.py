"""Pairs of answers: three forms of rows, what is rejected, what repeats, how they are encoded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
import numpy as np
import pytest
import torch
from ftcore.config import PairsDataConfig
from ftcore.data.__main__ import text as shown
from ftcore.data.columns import Chat, Row, examples
from ftcore.data.encode import encode
from ftcore.data.pack import Encoded, apart, collate, is_pair
from ftcore.data.prepare import (
    UNASKED,
    clusters,
    conflicts,
    nearly_repeated,
    prepare,
    prepared,
    repeated,
    said,
)
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import DataError
from tests.data.templates import styled

ASKED = "what is red?\n\na colour"
ROLES = ("Human=user", "Assistant=assistant")
LONG = " ".join(f"word{n}" for n in range(60))

def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}

def made(config: PairsDataConfig, *fields: dict[str, Any]) -> tuple[list[Chat], list[str]]:
    """Pairs of rows of these fields, and why others were rejected."""
    rows = [Row(f"r{n}", "pairs.jsonl", n, each) for n, each in enumerate(fields, start=1)]
    kept, rejected = examples(rows, config)
    return kept, [row.reason for row in rejected]

def chat(asked: str, chosen: str, rejected: str, name: str = "a") -> Chat:
    messages = (turn("user", asked), turn("assistant", chosen))
    return Chat(name, messages, "pairs.jsonl", 1, rejected)

FORMS = {
    "columns of text": (
        PairsDataConfig(prompt=("q", "input"), chosen="good", rejected="bad", margin="by"),
        {"q": "what is red?", "input": "a colour", "good": "warm", "bad": "cold", "by": "1.5"}),
    "lists of turns": (
        PairsDataConfig(prompt=("prompt",), margin="by"),
        {"prompt": [turn("user", ASKED)], "chosen": [turn("assistant", "warm")],
         "rejected": [turn("assistant", "cold")], "by": 1.5}),
    "whole conversations": (
        PairsDataConfig(margin="by"),
        {name: [turn("user", ASKED), turn("assistant", said)]
         for name, said in (("chosen", "warm"), ("rejected", "cold"))} | {"by": 1.5}),
    "transcripts": (
        PairsDataConfig(roles=ROLES, margin="by"),
        {name: f"\n\nHuman: {ASKED}\n\nAssistant: {said}"
         for name, said in (("chosen", "warm"), ("rejected", "cold"))} | {"by": 1.5}),
}  # fmt: skip

@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pair(form: str) -> None:
    config, fields = FORMS[form]
    ((pair,), lost) = made(config, fields)
    assert [(m["role"], m["content"]) for m in pair.messages] == [
        ("user", ASKED), ("assistant", "warm")]
    assert (pair.rejected, pair.margin, pair.line, lost) == ("cold", 1.5, 1, [])
    assert pair.texts == (ASKED, "warm", "cold")
    other = pair.with_texts(["x", "y", "z"])
    assert other.texts == ("x", "y", "z") and other.messages[1]["content"] == "y"

def test_conversations_of_many_turns_part_at_the_last() -> None:
    begin = "Human: hi\n\nAssistant: hello\n\nHuman: and?\n\nAssistant: "
    (pair,), _ = made(PairsDataConfig(roles=ROLES),
                      {"chosen": begin + "yes, it is", "rejected": begin + "yes, it isn't"})
    assert [m["content"] for m in pair.messages] == ["hi", "hello", "and?", "yes, it is"]

def test_what_is_no_pair_is_rejected_with_its_reason() -> None:
    said = {"good": "Human: a\n\nAssistant: b", "other": "Human: x\n\nAssistant: c",
            "longer": "Human: a\n\nAssistant: b\n\nHuman: q\n\nAssistant: r",
            "asks": "Human: a\n\nAssistant: b\n\nHuman: c", "empty": "Human: a\n\nAssistant: ",
            "alone": "Assistant: b", "lone": "Assistant: c"}  # fmt: skip
    twos = [("good", "good"), ("good", "other"), ("good", "longer"), ("asks", "asks"),
            ("good", "empty"), ("empty", "good"), ("alone", "lone")]  # fmt: skip
    rows = [{"chosen": said[one], "rejected": said[two]} for one, two in twos]
    fine = {"chosen": said["good"], "rejected": "Human: a\n\nAssistant: z"}
    kept, lost = made(PairsDataConfig(roles=ROLES), *rows, fine)
    assert len(kept) == 1 and lost == [
        "the two answers are the same",
        "the two answers have no common prompt", "the two answers have no common prompt",
        "the last turn of column 'chosen' is not an answer of the assistant's",
        "the last turn of column 'rejected' is not an answer of the assistant's",
        "the last turn of column 'chosen' is not an answer of the assistant's",
        "the two answers have no common prompt",
    ]  # fmt: skip
    config = PairsDataConfig(prompt=("prompt",))
    two = [turn("assistant", "b"), turn("assistant", "c")]
    fields = {"prompt": "q", "chosen": "a", "rejected": "b"}
    _, lost = made(config, fields, fields | {"chosen": " "}, fields | {"rejected": two})
    assert lost == [
        "column 'chosen' is empty", "column 'rejected' holds 2 turns: must be one, the answer"]

def test_what_shows_that_the_columns_are_wrong_stops() -> None:
    fields = {"prompt": "q", "chosen": "a", "rejected": "b", "by": "much"}
    with pytest.raises(DataError, match="pairs.jsonl:1: column 'by' must hold a number"):
        made(PairsDataConfig(prompt=("prompt",), margin="by"), fields)
    with pytest.raises(DataError, match="no column 'choosen'.*nearest: 'chosen'"):
        made(PairsDataConfig(prompt=("prompt",), chosen="choosen"), fields)

def test_rows_repeat_each_other_where_both_answers_do() -> None:
    words = [f"{LONG} {end}" for end in ("one", "two")]
    answers = [("a", "b"), ("a", "c"), ("a", "b"), ("b", "a")]
    rows = [chat("q", *both, str(number)) for number, both in enumerate(answers)]
    assert [row.id for row in repeated(rows)] == ["2"]
    near = [chat(words[0], "a", "b", "1"), chat(words[1], "a", "b", "2")]
    assert len(nearly_repeated(near, 1.0)) == 1
    far = chat(words[0], "a", " ".join(reversed(LONG.split())), "3")
    assert not nearly_repeated([near[0], far], 1.0)

def test_only_a_preference_turned_round_is_a_conflict() -> None:
    rows = [chat("q", "a", "b"), chat("q", "c", "d"), chat("q", "a", "d")]
    assert conflicts(rows)["texts"] == 0
    assert conflicts([*rows, chat("Q ", "b", "a")])["texts"] == 1

def test_pairs_of_one_prompt_are_held_out_together(base: Tokenizer, write: Callable) -> None:
    rows = [chat(LONG, "a", "b"), chat(f"{LONG} more", "c d", "e"), chat("q", "a", "b")]
    again = clusters([said(row, without=UNASKED) for row in rows])
    assert again[0] == again[1] != again[2]
    lines = [
        f'{{"prompt": "question {n % 20} of {"abcdefghijklmnopqrst"[n % 20] * 9}",'
        f' "chosen": "yes {n}", "rejected": "no {n}"}}'
        for n in range(60)
    ]
    path = str(write("pairs.jsonl", "\n".join(lines)))
    config = PairsDataConfig(train=(path,), prompt=("prompt",), holdout=15, cache=None)
    data = prepare(config, base, seed=3)
    sides = [{base.decode(d.tokens_T[: int(d.labels[1])]) for d in split.documents}
             for split in (data.train, data.dev)]  # fmt: skip
    assert len(data.dev.documents) == 15 and len(sides[1]) == 5
    assert not sides[0] & sides[1] and len(sides[0]) == 15

def text_of(tokenizer: Tokenizer, side: Encoded, *, scored: bool = False) -> str:
    ids = side.labels[side.weights > 0] if scored else side.tokens_T
    return tokenizer.decode(ids, special=True)

def test_a_decoder_reads_both_chats_up_to_the_end_of_the_answer(base: Tokenizer) -> None:
    rows = [chat("hi", "good day", "go"), chat("ho", "x", "yes <|im_end|>", "b")]
    split = encode(PairsDataConfig(), rows, base)
    (document,) = split.documents
    begin = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    both = apart([document])
    assert is_pair(document) and document.weights == 1.0 and document.labels.dtype == np.float32
    assert [text_of(base, side) for side in both] == [
        f"{begin}good day<|im_end|>", f"{begin}go<|im_end|>"]
    assert [text_of(base, side, scored=True) for side in both] == [
        "good day<|im_end|>", "go<|im_end|>"]
    assert document.labels[0] == len(both[0]) and document.labels[1] == document.labels[2]
    assert split.rejected[0].reason.startswith("message 2 holds the special token")
    open_end = encode(PairsDataConfig(train_on_end=False), rows[:1], base).documents
    assert text_of(base, apart(open_end)[1], scored=True) == "go"

@pytest.mark.parametrize("style", ["llama3", "gemma"])
def test_templates_with_bos(style: str) -> None:
    tokenizer = styled(style)
    (document,) = encode(PairsDataConfig(), [chat("hi", "good day", "go")],
                               tokenizer).documents
    for side, text in zip(apart([document]), ("good day", "go"), strict=True):
        assert side.tokens_T[0] == tokenizer.bos_id
        assert text_of(tokenizer, side, scored=True).startswith(text)

def test_an_encoder_reads_pairs_of_texts(bert: Tokenizer) -> None:
    turns = [turn("user", "hi"), turn("assistant", "yes?"), turn("user", "red?")]
    pair = Chat("a", (*turns, turn("assistant", "it is warm")), rejected="no")
    same = chat("hi", "Warm", "warm", "b")  # this tokenizer has no capitals
    split = encode(PairsDataConfig(), [pair, same], bert)
    both = apart(split.documents)
    texts = [("hi\nyes?\nred?", answer) for answer in ("it is warm", "no")]
    for side, (ids_T, types_T) in zip(both, bert.encode_pairs(texts), strict=True):
        assert (side.tokens_T == ids_T).all() and (side.types_T == types_T).all()
    assert text_of(bert, both[0], scored=True) == "it is warm [SEP]"
    assert [row.reason for row in split.rejected] == ["the two answers are the same tokens"]

@pytest.mark.parametrize("kind", ["base", "bert", "llama3"])
def test_rows_that_are_too_long(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = styled(kind) if kind == "llama3" else request.getfixturevalue(kind)
    rows = [chat(LONG, "good", "bad bad bad"), chat("q", "one", "two", "b"),
            chat("q", LONG, "short", "c")]  # fmt: skip
    with pytest.raises(DataError, match=r"pairs.jsonl:1: \d+ tokens, 40 are allowed; raise"):
        encode(PairsDataConfig(max_length=40), rows, tokenizer)
    dropped = encode(PairsDataConfig(max_length=40, over_length="drop"), rows, tokenizer)
    assert [d.row_id for d in dropped.documents] == ["b"] and len(dropped.rejected) == 2
    cut = encode(PairsDataConfig(max_length=40, over_length="cut_left"), rows, tokenizer)
    whole = apart(encode(PairsDataConfig(), rows, tokenizer).documents[:2])
    assert [d.row_id for d in cut.documents] == ["a", "b"] and len(cut.cut) == 1
    assert [r.reason for r in cut.rejected] == [
        "more than 40 tokens: cut_left, no room for a prompt"]
    assert not is_pair(apart(cut.documents)[0])
    for n, (side, full) in enumerate(zip(apart(cut.documents), whole, strict=True)):
        assert text_of(tokenizer, side, scored=True) == text_of(tokenizer, full, scored=True)
        lead = int(kind != "base")
        assert len(side) == (40 if n < 2 else len(full))
        assert (side.tokens_T[:lead] == full.tokens_T[:lead]).all()
        assert (side.tokens_T[lead:] == full.tokens_T[len(full) - len(side) + lead :]).all()

def test_a_batch_of_pairs_has_both_documents_of_each(bert: Tokenizer) -> None:
    rows = [chat("red?", "it is warm", "no"), chat("and blue, what is that?", "cold", "no", "b")]
    documents = encode(PairsDataConfig(), rows, bert).documents
    batch, sides = collate(documents), apart(documents)
    assert batch.docs.lengths == tuple(map(len, sides)) and batch.row_ids == ("a", "a", "b", "b")
    assert batch.positions_N.tolist() == [t for side in sides for t in range(len(side))]
    assert batch.types_N.tolist() == [t for side in sides for t in side.types_T]
    assert torch.equal(batch.pairs, torch.tensor(np.stack([d.labels for d in documents])))
    assert batch.to("cpu").pairs is not None and collate(sides).to("cpu").pairs is None
    classes = [Encoded("x", np.arange(3), np.float32([1, 1, 0, 1, 1]))] * 2
    assert apart(classes) is classes and collate(classes).labels.shape == (2, 5)

def test_pairs_come_from_the_cache_and_are_shown(
    base: Tokenizer, write: Callable, tmp_path: Path
) -> None:
    text = '{"prompt": "what?", "chosen": "this", "rejected": "that"}\n'
    path = write("pairs.jsonl", text)
    config = PairsDataConfig(train=(str(path),), prompt=("prompt",), cache=tmp_path)
    (first, _), (again, said) = (prepared(config, base, seed=0) for _ in range(2))
    assert "from the cache" in said
    (one,), (two,) = first.train.documents, again.train.documents
    assert (one.labels == two.labels).all() and (one.tokens_T == two.tokens_T).all()
    told = shown(two, None, base)
    assert "[[this<|im_end|>]]\n-- rather than\n" in told and "[[that<|im_end|>]]" in told
