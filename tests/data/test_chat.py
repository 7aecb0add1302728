"""Rendering and spans, on templates in the styles of eight families, against transformers."""

import pytest
from ftcore.data.chat import generation_prompt, render, render_text
from ftcore.data.columns import RowError
from ftcore.errors import ModelError
from tests.data.templates import styles

TURNS = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is four."},
    {"role": "user", "content": "  And in h\u00e9x \U0001f642?\n"},
    {"role": "assistant", "content": "four\n\nStill four. \n"},
]

def contents(messages, tokenizer):
    text, spans = render(messages, tokenizer)
    return [span and text[slice(*span)] for span in spans]

def test_spans_hold_the_contents(family):
    name, tokenizer, _ = family
    trims = styles()[name].trims
    expected = [m["content"].strip() if trims else m["content"] for m in TURNS]
    assert contents(TURNS, tokenizer) == expected

def test_text_equals_transformers(family):
    pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    _, tokenizer, _ = family
    for prompt in (False, True):
        expected, _ = render_jinja_template(
            conversations=[TURNS[:3]],
            chat_template=tokenizer.chat_template,
            add_generation_prompt=prompt,
            **tokenizer.special,
        )
        assert render_text(TURNS[:3], tokenizer, add_generation_prompt=prompt) == expected[0]

@pytest.mark.parametrize("prompt", [False, True])
def test_text_and_ids_equal_apply_chat_template(family, prompt, tmp_path):
    """Of the tokenizer as transformers reads it from the same folder."""
    transformers = pytest.importorskip("transformers")
    _, tokenizer, _ = family
    tokenizer.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = render_text(TURNS[:3], tokenizer, add_generation_prompt=prompt)
    assert text == theirs.apply_chat_template(
        TURNS[:3], tokenize=False, add_generation_prompt=prompt
    )
    ids = theirs.apply_chat_template(TURNS[:3], add_generation_prompt=prompt, return_dict=True)[
        "input_ids"
    ]
    assert tokenizer.encode(text, special=False).ids_T.tolist() == ids

def test_repeated_and_nested_contents_are_told_apart(family):
    _, tokenizer, _ = family
    turns = [{"role": role, "content": "user"} for role in ("user", "assistant") * 3]
    text, spans = render(turns, tokenizer)
    assert [text[start:end] for start, end in spans] == ["user"] * 6
    assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))

def test_system_message_where_the_template_takes_it(families):
    turns = [{"role": "system", "content": "Be brief."}, *TURNS]
    for name, style in styles().items():
        if style.system != "refused":
            assert contents(turns, families[name])[0] == "Be brief."
            continue
        with pytest.raises(RowError, match="refuses the messages: .* system"):
            render(turns, families[name])

def test_white_space_is_trimmed_on_the_side_of_the_template(families):
    turns = [{"role": "user", "content": " hi\n"}, {"role": "assistant", "content": "\nfour \n"}]
    assert contents(turns, families["qwen3"])[1] == "four \n"
    assert contents(turns, families["llama2"]) == ["hi", "four"]

def test_qwen3_cuts_thinking_out_of_earlier_turns(families):
    thought = "<think>\nadd them\n</think>\n\nIt is four."
    turns = [{**TURNS[0]}, {"role": "assistant", "content": thought}, *TURNS[2:]]
    text, _ = render(turns, families["qwen3"])
    assert "add them" not in text
    assert contents(turns, families["qwen3"])[1] == "It is four."
    last = contents(turns[:2], families["qwen3"])[1]
    assert last == "add them\n</think>\n\nIt is four."

def test_a_template_may_leave_a_message_out(build_tokenizer):
    template = "{% for m in messages if m.role != 'system' %}{{ m.content }};{% endfor %}"
    tokenizer = build_tokenizer(template, ())
    turns = [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}]
    assert render(turns, tokenizer)[1] == (None, (0, 1))

@pytest.mark.parametrize(
    ("expression", "expected"),
    [("m.content | upper", "HELLO  THERE"), ("m.content[:3]", "hel"), ("m.content | trim", None)],
)
def test_a_template_may_change_a_content(build_tokenizer, expression, expected):
    template = "{% for m in messages %}" + f"hel<{{{{ {expression} }}}}>the" + "{% endfor %}"
    found = contents([{"role": "user", "content": "hello  there"}], build_tokenizer(template, ()))
    assert found == [expected or "hello  there"]

@pytest.mark.parametrize(
    "template",
    [
        "{{ c + c }}",
        "{{ c | length }}",
        "{{ 'hello' if c == 'hello' else 'other' }}",  # right by chance: no content comes through
        "{{ 'goodbye' if c == 'hello' else c }}",
    ],
)
def test_a_content_that_cannot_be_found_is_an_error(build_tokenizer, template):
    template = "{% set c = messages[0].content %}" + template
    with pytest.raises(RowError, match="a message lies in the rendered text.*'hello' became"):
        render([{"role": "user", "content": "hello"}], build_tokenizer(template, ()))

def test_private_use_characters_in_contents(base):
    for content in ("\U000f0000icon\U000f0001", "\U000f0001\U00100000\U000f0003\ue000"):
        assert contents([{"role": "user", "content": content}], base) == [content]

def test_the_characters_that_mark_contents_may_stand_in_one(build_tokenizer):
    turns = [{"role": "user", "content": "\U000f0000icon\U000f0001"}]
    (found,) = contents(turns, build_tokenizer("{{ messages[0].content }};", ()))
    assert found == turns[0]["content"]

def test_generation_prompt(families):
    assert generation_prompt(families["qwen3"]) == "<|im_start|>assistant\n"
    assert generation_prompt(families["gemma"]) == "<start_of_turn>model\n"
    assert generation_prompt(families["mistral"]) == ""
    assert generation_prompt(families["phi3"]) == "assistant|>\n"  # without what eos begins with

def test_transformers_filters_and_tags(build_tokenizer):
    template = (
        "{{ {'a': 'h\u00e9<'} | tojson }}"
        "{% generation %}{% set c = messages[0].content %}{{ c }}{% endgeneration %}{{ c }}"
        "{% for m in messages %}{% if loop.index0 %}{% break %}{% endif %}!{% endfor %}"
        "{{ strftime_now('%Y')|length }}{{ tools is none }}{{ documents is none }}"
    )
    text = render_text([{"role": "user", "content": "hi"}] * 2, build_tokenizer(template, ()))
    assert text == '{"a": "h\u00e9<"}hi!4TrueTrue'

def test_hostile_templates(build_tokenizer):
    question = [{"role": "user", "content": "hi"}]
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(RowError, match="refuses the messages"):
        render(question, build_tokenizer(escape, ()))
    endless = "{% for i in range(9999) %}{% for j in range(9999) %}xxxxxxx{% endfor %}{% endfor %}"
    with pytest.raises(RowError, match="more than 1048576 characters"):
        render(question, build_tokenizer(endless, ()))

def test_broken_and_missing_templates(build_tokenizer):
    question = [{"role": "user", "content": "hi"}]
    with pytest.raises(ModelError, match="chat template, line 2"):
        render(question, build_tokenizer("a\n{% for %}", ()))
    with pytest.raises(ModelError, match="has no chat template"):
        render(question, build_tokenizer(None, ()))
