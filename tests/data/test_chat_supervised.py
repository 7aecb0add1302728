"""What is supervised: properties that hold for any chat, in eight styles of templates and with two
kinds of tokenizers."""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ftcore.config import ChatDataConfig, TrainOn
from ftcore.data.chat import encode_prompt, render_text
from ftcore.data.columns import Chat, Message
from ftcore.data.encode import encode
from ftcore.data.pack import Encoded
from ftcore.data.prepare import prepare
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import ConfigError, DataError
from tests.data.templates import Style, build, styled, styles

KINDS = ("bytes", "pieces")
USER: Message = {"role": "user", "content": "two and two?"}
ANSWER: Message = {"role": "assistant", "content": "four"}
FINE = Chat("f", (USER, ANSWER))
# Words, white space, characters of several tokens and of several characters, and what templates
# write, where it is ordinary text.
BITS = (
    *("four", "the", "Two", "x", " ", "  ", "\n", "\n\n", "\t", "\u00a0", ".", "\u00e9", "e\u0301"),
    *("\U0001f642", "\U0001f469\u200d\U0001f52c", "\u4e2d\u6587", "user", "assistant", "</s>"),
    *("[INST]", " [/INST] ", "<<SYS>>\n", "<|user|>\n", "<|assistant|>\n", "<|end|>", "<|eot_id|>"),
    *("<start_of_turn>model\n", "<|im_end|>", "\n<|im_start|>assistant\n", "{{ eos_token }}"),
)
few = settings(max_examples=40, deadline=None, derandomize=True, database=None)

def said(tokenizer: Tokenizer) -> st.SearchStrategy[str]:
    """Contents without special tokens, which are refused."""
    texts = st.lists(st.sampled_from(BITS), max_size=7).map("".join)
    return texts.filter(lambda text: tokenizer.find_special(text) is None)

@st.composite
def chats(draw: Callable, style: Style, tokenizer: Tokenizer) -> Chat:
    """Rounds of question and answer, some of these not trained on, all with weights."""
    turns: list[Message] = []
    if style.system != "refused" and draw(st.booleans()):
        turns.append({"role": "system", "content": draw(said(tokenizer))})
    trained = draw(st.lists(st.booleans(), min_size=1, max_size=3).filter(any))
    for train in trained:
        turns.append({"role": "user", "content": draw(said(tokenizer))})
        answer = draw(said(tokenizer).filter(str.strip))
        weight = draw(st.sampled_from((0.25, 1.0, 3.0)))
        turns.append({"role": "assistant", "content": answer, "train": train, "weight": weight})
    return Chat("c", tuple(turns), "chats.jsonl", 1)

def encoded(chat: Chat, tokenizer: Tokenizer, **options: object) -> Encoded:
    (document,) = encode(ChatDataConfig(**options), [chat], tokenizer).documents
    return document

def runs(document: Encoded, tokenizer: Tokenizer) -> list[tuple[str, float]]:
    """Text and weight of every supervised run of tokens of one weight."""
    found, pairs = [], zip(document.labels, document.weights.tolist(), strict=True)
    for weight, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
        if weight:
            found.append((tokenizer.decode([id_ for id_, _ in run], special=True), weight))
    return found

def answers(chat: Chat, name: str, *, end: bool = True) -> list[tuple[str, float]]:
    """The same by what templates.toml says of the style, without rendering or tokens."""
    style, found = styles()[name], []
    for message in chat.messages:
        if not message.get("train"):
            continue
        text = message["content"]
        text = text.strip() if style.trims else text
        text = text.lstrip() if style.greedy else text
        if name == "qwen3" and message is chat.messages[-1]:
            text = "<think>\n\n</think>\n\n" + text.lstrip("\n")
        text = style.lead + text + (style.tail + style.end if end else "")
        found.append((text, message["weight"]))
    return found

def check(found: list[tuple[str, float]], wanted: list[tuple[str, float]], kind: str) -> None:
    """Equal, but for what a token brings along: a header's line break where white space follows it,
    and the blank that pieces begin with behind a special token."""
    assert [weight for _, weight in found] == [weight for _, weight in wanted]
    for (text, _), (answer, _) in zip(found, wanted, strict=True):
        assert text.endswith(answer)
        brought = {"", "\n" if answer[0].isspace() else "", " " if kind == "pieces" else ""}
        assert text.removesuffix(answer) in brought

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(styles()))
def test_answers_and_their_ends_and_nothing_else(name: str, kind: str) -> None:
    tokenizer = styled(name, kind=kind)

    @few
    @given(chats(styles()[name], tokenizer))
    def holds(chat: Chat) -> None:
        check(runs(encoded(chat, tokenizer), tokenizer), answers(chat, name), kind)
        last = encoded(chat, tokenizer, train_on="last")
        check(runs(last, tokenizer), answers(chat, name)[-1:], kind)
        endless = encoded(chat, tokenizer, train_on_end=False)
        check(runs(endless, tokenizer), answers(chat, name, end=False), kind)

    holds()

@pytest.mark.parametrize("name", sorted(styles()))
def test_a_completion_is_all_behind_the_prompt(name: str) -> None:
    tokenizer = styled(name)

    @few
    @given(chats(styles()[name], tokenizer))
    def holds(chat: Chat) -> None:
        *before, last = chat.messages
        if not last["train"]:
            config = ChatDataConfig(train_on="completion")
            (row,) = encode(config, [chat, FINE], tokenizer).rejected
            assert re.fullmatch(r"message \d is to be completed, but others follow it", row.reason)
            return
        prompt = render_text(before, tokenizer, add_generation_prompt=True)
        rest = render_text(chat.messages, tokenizer).removeprefix(prompt)
        rest = rest.replace("<|end|>\n", "<|end|>").lstrip() if styles()[name].greedy else rest
        document = encoded(chat, tokenizer, train_on="completion")
        check(runs(document, tokenizer), [(rest, last["weight"])], "bytes")

    holds()

@pytest.mark.parametrize("name", sorted(styles()))
def test_one_bos_and_any_pad(name: str) -> None:
    style, tokenizer = styles()[name], styled(name)
    other = styled(name, pad="<|pad|>")

    @few
    @given(chats(style, tokenizer))
    def holds(chat: Chat) -> None:
        document, padded = encoded(chat, tokenizer), encoded(chat, other)
        assert document.tokens_T.tolist() == padded.tokens_T.tolist()
        assert document.weights.tolist() == padded.weights.tolist()
        places = (document.tokens_T == tokenizer.bos_id).nonzero()[0].tolist()
        rounds = sum(message["role"] == "user" for message in chat.messages)
        if name == "llama2":  # every question opens a document
            assert len(places) == rounds and places[0] == 0 and 1 not in set(np.diff(places))
        else:
            assert places == ([0] if "bos_token" in style.template else [])

    holds()

def test_headers_that_take_white_space_are_not_supervised() -> None:
    """Phi-3's <|assistant|> takes the line break behind it and what white space the answer begins
    with."""
    style, greedy = styles()["phi3"], styled("phi3")
    plain = build(style.template, style.special, bos_token=style.bos, eos_token=style.eos)
    for tokenizer, content in ((greedy, "  four"), (greedy, "four"), (plain, "four")):
        turns = (USER, {"role": "assistant", "content": content})
        document = encoded(Chat("c", turns), tokenizer)
        assert runs(document, tokenizer) == [("four<|end|>", 1.0)]
        prompt = encode_prompt([USER], tokenizer)
        assert document.tokens_T[: len(prompt)].tolist() == prompt.tolist()

def test_a_question_that_spells_the_generation_prompt_is_not_supervised() -> None:
    """Where the template itself does not write it in front of answers."""
    template = (
        "{% for m in messages %}{{ m.role ~ ':' ~ m.content ~ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:<think>{% endif %}"
    )
    tokenizer = build(template, (), eos_token="<|im_end|>")
    turns = ({"role": "user", "content": "assistant:<think> hm"}, ANSWER)
    assert runs(encoded(Chat("c", turns), tokenizer), tokenizer) == [("four<|im_end|>", 1.0)]

def test_what_follows_a_completion_is_supervised_too() -> None:
    turns = (USER, ANSWER)
    found = {name: encoded(Chat("c", turns), styled(name), train_on="completion")
             for name in ("qwen3", "phi3", "llama2")}  # fmt: skip
    shown = {name: runs(document, styled(name))[0][0] for name, document in found.items()}
    assert shown == {
        "qwen3": "<think>\n\n</think>\n\nfour<|im_end|>\n",
        "phi3": "four<|end|><|endoftext|>",
        "llama2": " four </s>",
    }

def test_completions_of_prompts_and_answers_in_columns(tmp_path: Path) -> None:
    rows = [{"q": "two and two?", "a": "four"}, {"q": "two and one?", "a": " "}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    options = {"train": (str(path),), "prompt": ("q",), "answer": "a"}
    tokenizer, found = styled("zephyr"), []
    for more in ({}, {"train_on": "completion"}, {"train_on_end": False}):
        split = prepare(ChatDataConfig(**options, **more), tokenizer, seed=0).train
        assert [row.reason for row in split.rejected] == ["column 'a' is empty"]
        found += [text for document in split.documents for text, _ in runs(document, tokenizer)]
    assert found == ["four</s>", "four</s>\n", "four"]

def test_a_template_whose_prompt_is_no_beginning_has_no_completions() -> None:
    template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    tokenizer = build(template, (), eos_token="<|im_end|>")
    with pytest.raises(DataError, match="does not begin with its prompt's; take data.train_on las"):
        encoded(FINE, tokenizer, train_on="completion")
    assert runs(encoded(FINE, tokenizer), tokenizer) == [("four<|im_end|>", 1.0)]

@pytest.mark.parametrize("train_on", ["all", "completion"])
def test_ends_cannot_be_left_out_of_what_holds_them(train_on: TrainOn) -> None:
    with pytest.raises(ConfigError, match=f"data.train_on = {train_on} supervises ends of turns"):
        encoded(FINE, styled("chatml"), train_on=train_on, train_on_end=False)
