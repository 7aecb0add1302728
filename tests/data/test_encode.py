"""Masks from spans, on eight styles of templates and on real chats; rejections, labels."""

import itertools
import json
import re
from operator import itemgetter
from typing import Any
import numpy as np
import pytest
from ftcore.config import ChatDataConfig, LabelledDataConfig, ScoredDataConfig, TextDataConfig
from ftcore.data.chat import encode_prompt, render
from ftcore.data.columns import Chat, RowError, Text
from ftcore.data.encode import Names, cut, encode
from ftcore.data.pack import Encoded
from ftcore.data.read import read_rows
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import DataError, ModelError
from tests.data.templates import TURNS, styles

CHAT = Chat("a", TURNS, "chat.jsonl", 7)
PAIRS = ("no", "yes")

def encode_chat(chat: Chat, tokenizer: Tokenizer, **options: Any) -> Encoded:
    (document,) = encode(ChatDataConfig(**options), [chat], tokenizer).documents
    return document

def encode_text(row_id: str, text: str, tokenizer: Tokenizer) -> Encoded:
    (document,) = encode(TextDataConfig(), [Text(row_id, (text,))], tokenizer).documents
    return document

def encode_one(example: Text, tokenizer: Tokenizer, labels: Names) -> Encoded:
    config = ScoredDataConfig() if labels is None else LabelledDataConfig()
    (document,) = encode(config, [example], tokenizer, labels).documents
    return document

def show(document: Encoded, tokenizer: Tokenizer) -> str:
    """A document as text, special tokens included, with supervised runs between double brackets."""
    if not isinstance(document.weights, np.ndarray):
        return f"{tokenizer.decode(document.tokens_T, special=True)} -> {document.labels}"
    pairs = zip(document.labels, document.weights > 0, strict=True)
    targets = [(document.tokens_T[0], False), *pairs]
    if not targets[-1][1]:  # the last position predicts nothing
        targets.pop()
    shown = ""
    for counts, run in itertools.groupby(targets, key=itemgetter(1)):
        text = tokenizer.decode([id_ for id_, _ in run], special=True)
        shown += f"[[{text}]]" if counts else text
    return shown

def supervised(document, tokenizer):
    """The text of every supervised run."""
    shown = show(document, tokenizer)
    return [piece.split("]]")[0] for piece in shown.split("[[")[1:]]

def weight_of_targets(document):
    """Weight of each token as a target; the first token never is one."""
    return np.append(np.float32(0), document.weights[:-1])

def test_answers_and_their_end_are_supervised_and_nothing_else(family):
    name, tokenizer, end = family
    document = encode_chat(CHAT, tokenizer)
    lead, tail = styles()[name].lead, styles()[name].tail
    thought = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    assert supervised(document, tokenizer) == [
        f"{lead}It is four.{tail}{end}",
        f"{lead}{thought}Still four \U0001f642\n\nin h\u00e9x.{tail}{end}",
    ]
    targets_T, weights_T = document.tokens_T, weight_of_targets(document)
    ends = weights_T[targets_T == tokenizer.id_of(end)]
    assert ends.sum() == 2  # once for each answer, never for a question

def test_labels_are_the_next_tokens(family):
    name, tokenizer, _ = family
    document = encode_chat(CHAT, tokenizer)
    assert (document.labels[:-1] == document.tokens_T[1:]).all()
    assert document.weights[-1] == 0
    assert document.tokens_T.dtype == document.labels.dtype == np.int32
    assert document.weights.dtype == np.float32
    if not styles()[name].greedy:  # a greedy token is decoded without its white space
        rendered, _ = render(TURNS, tokenizer)
        assert tokenizer.decode(document.tokens_T, special=True) == rendered

def test_the_prompt_is_what_training_saw_before_the_answer(family):
    _, tokenizer, _ = family
    for answer in ("It is four.", "4", "\u00e9"):  # " It" is one token, " 4" are two
        turns = (*TURNS[:3], {"role": "assistant", "content": answer})
        document = encode_chat(Chat("a", turns), tokenizer, train_on="last")
        first = int(np.flatnonzero(weight_of_targets(document))[0])
        prompt = encode_prompt(turns[:-1], tokenizer)
        assert document.tokens_T[:first].tolist() == prompt.tolist()

def test_a_prompt_that_ends_in_a_space_leaves_it_to_the_answer(build_tokenizer):
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = build_tokenizer(template, (), eos_token="<|im_end|>")
    document = encode_chat(Chat("a", TURNS[:2]), tokenizer)
    prompt = encode_prompt(TURNS[:1], tokenizer)
    assert supervised(document, tokenizer) == [" It is four.<|im_end|>"]
    assert document.tokens_T[: len(prompt)].tolist() == prompt.tolist()
    assert tokenizer.decode(prompt).endswith("assistant:")

def test_end_of_turn_after_white_space(build_tokenizer):
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + ' </s>' }}{% endfor %}"
    tokenizer = build_tokenizer(template, ("</s>",), eos_token="</s>")
    assert supervised(encode_chat(CHAT, tokenizer), tokenizer)[0] == " It is four. </s>"

def test_the_next_header_is_no_end_of_turn(build_tokenizer):
    template = "{% for m in messages %}{{ '<|u|>' + m.content + '\\n' }}{% endfor %}"
    tokenizer = build_tokenizer(template, ("<|u|>",))
    turns = (*TURNS, TURNS[0])
    assert supervised(encode_chat(Chat("a", turns), tokenizer), tokenizer)[0] == "It is four."

def test_trailing_white_space_of_an_answer_is_part_of_it(base):
    turns = (TURNS[0], {"role": "assistant", "content": " four\n"})
    document = encode_chat(Chat("a", turns), base)
    assert supervised(document, base) == [" four\n<|im_end|>"]

@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ((TURNS[0],), r"nothing to supervise: no message is trained on \(roles: user\)"),
        ((TURNS[0], {**TURNS[1], "train": False}), "nothing to supervise"),
        ((TURNS[0], {**TURNS[1], "weight": 0.0}), "nothing to supervise"),
        ((TURNS[0], {"role": "assistant", "content": " \n"}), "message 2 is to be trained on but"),
        (({"role": "user", "content": "a<|im_end|>b"}, TURNS[1]), "message 1 holds the special"),
    ],
)
def test_rows_that_cannot_be_used(base, turns, reason):
    bad = Chat("b", turns, "chat.jsonl", 9)
    rows = encode(ChatDataConfig(), [CHAT, bad], base)
    assert [document.row_id for document in rows.documents] == ["a"]
    (rejected,) = rows.rejected
    assert (rejected.id, rejected.file, rejected.line) == ("b", "chat.jsonl", 9)
    assert re.match(reason, rejected.reason)
    with pytest.raises(DataError, match="none of the 2 rows can be used .*2 x .*line 9"):
        encode(ChatDataConfig(), [bad, bad], base)

def test_an_omitted_answer_is_rejected(build_tokenizer):
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="message 2 is to be trained on but the template omits it"):
        encode_chat(CHAT, build_tokenizer(template, ()))

def test_a_special_token_in_a_prompt_is_refused(base):
    with pytest.raises(RowError, match="message 1 holds the special token '<|endoftext|>'"):
        encode_prompt([{"role": "user", "content": "<|endoftext|>"}], base)

def test_batches_equal_single_chats(base):
    chats = [Chat("short", TURNS[:2]), Chat("long", TURNS)]
    rows = encode(ChatDataConfig(), chats * 700, base)
    assert len(rows.documents) == 1400
    for chat, document in zip(chats, rows.documents[-2:], strict=True):
        alone = encode_chat(chat, base)
        assert document.row_id == alone.row_id
        assert (document.tokens_T == alone.tokens_T).all()
        assert (document.weights == alone.weights).all()

def test_text_with_one_end_token(base):
    document = encode_text("t", "To be, or not to be.", base)
    assert document.tokens_T[-1] == base.id_of("<|endoftext|>")
    assert (document.tokens_T == base.id_of("<|endoftext|>")).sum() == 1
    assert document.weights.tolist() == [1.0] * (len(document) - 1) + [0.0]

def test_text_without_anything_to_predict(base, build_tokenizer):
    with pytest.raises(DataError, match="1 x nothing to supervise in it"):
        encode_text("t", "", base)
    texts = [Text("t", ("",), None, "x.txt", 1), Text("u", ("a b",))]
    rows = encode(TextDataConfig(), texts, base)
    assert [row.id for row in rows.rejected] == ["t"]

def test_bos_comes_from_the_post_processor(families):
    llama = families["llama3"]
    content = json.loads(llama.files["tokenizer.json"])
    bos = {"id": "<|begin_of_text|>", "type_id": 0}
    ids = [llama.bos_id]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": bos}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos["id"]: {"id": bos["id"], "ids": ids, "tokens": [bos["id"]]}},
    }
    files = {**llama.files, "tokenizer.json": json.dumps(content).encode()}
    tokenizer = Tokenizer(files, where="test")
    for text in ("hi there", "<|begin_of_text|>hi there"):
        document = encode_text("t", text, tokenizer)
        assert (document.tokens_T == tokenizer.bos_id).tolist().count(True) == 1
    chat = encode_chat(CHAT, tokenizer)
    assert (chat.tokens_T == tokenizer.bos_id).tolist() == [True] + [False] * (len(chat) - 1)

def test_end_of_text_falls_back_to_eos_or_fails(build_tokenizer):
    vocab = {"hello": 0, "world": 1, "</s>": 2}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "</s>"}
    content = {"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}}
    files = {"tokenizer.json": json.dumps(content).encode()}
    named = {**files, "tokenizer_config.json": b'{"eos_token": "</s>"}'}
    document = encode_text("t", "hello world", Tokenizer(named, where="m"))
    assert document.tokens_T.tolist() == [0, 1, 2]
    with pytest.raises(ModelError, match="no token that ends a text"):
        encode_text("t", "hello world", Tokenizer(files, where="m"))

def test_labelled_texts_and_pairs(bert):
    single = encode_one(Text("r", ("a good film",), "yes"), bert, PAIRS)
    assert single.labels == 1 and single.types_T is None
    assert bert.decode(single.tokens_T, special=True) == "[CLS] a good film [SEP]"
    pair = encode_one(Text("r", ("a film", "a good film"), 3.5), bert, None)
    assert pair.labels == 3.5
    assert pair.types_T.tolist() == [0] * 4 + [1] * 4

def test_a_label_that_training_did_not_have(bert):
    example = Text("r", ("good",), "yess", "dev.tsv", 17)
    with pytest.raises(DataError, match="dev.tsv:17: label 'yess' .*nearest: 'yes'"):
        encode(LabelledDataConfig(), [example], bert, PAIRS)

def test_show(base, bert):
    document = encode_chat(Chat("a", TURNS[:2]), base)
    assert show(document, base) == (
        "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n[[It is four.<|im_end|>]]\n"
    )
    labelled = encode_one(Text("r", ("good",), "yes"), bert, PAIRS)
    assert show(labelled, bert) == "[CLS] good [SEP] -> 1"
    several = encode_one(Text("r", ("good",), ("yes", "no")), bert, PAIRS)
    assert show(several, bert) == "[CLS] good [SEP] -> [1. 1.]"
    first = cut(encode_text("t", "one two three", base), TextDataConfig(max_length=2), None)[0]
    assert show(first, base).startswith("o") and show(first, base).endswith("]]")

def test_real_chats_supervise_exactly_the_answers(data_dir, base):
    rows = read_rows([data_dir / "gsm8k" / "test.jsonl"])
    chats = [
        Chat(
            row.id,
            (
                {"role": "user", "content": row.fields["question"]},
                {"role": "assistant", "content": row.fields["answer"]},
            ),
        )
        for row in rows
    ]
    encoded = encode(ChatDataConfig(), chats, base)
    assert len(encoded.documents) == 1319
    for chat, document in zip(chats, encoded.documents, strict=True):
        answer = chat.messages[1]["content"] + "<|im_end|>"
        kept = document.labels[document.weights > 0]
        assert base.decode(kept, special=True) == answer
