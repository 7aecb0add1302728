"""Chat messages to text through the model's own template, and where each message lies in it.

The text is rendered once, and only that rendering is ever tokenised. Positions are found by further
renderings with a pair of private-use characters around each content: if taking them out gives back
the text, they mark the contents exactly. They go around the whole content; where the template trims
contents, inside of the white space on that side. A template that looks into contents (Qwen3 cuts
<think> parts out of earlier turns) is asked once per message: what changes with that message alone?

Templates run in jinja2's sandbox, with a limit on size and time, and what transformers gives them.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, partial
from itertools import accumulate, islice
from typing import Literal, NoReturn, NotRequired, TypedDict

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import DataError, ModelError

MAX_CHARACTERS, MAX_SECONDS = 2**20, 10.0  # of a rendering
PRIVATE_USE = (0xF0000, 0x100000, 0xE000)  # the first character of each plane's, in turn

Span = tuple[int, int] | None  # start and end, in characters; None: left out of the text
Again = Callable[[Sequence[str]], str]  # the text of the chat with other contents
Trim = Callable[[str], str]  # what a template may do to contents

class Message(TypedDict):
    """One turn; `train` and `weight` matter to supervision only, never to the text."""
    role: Literal["system", "user", "assistant", "tool"]
    content: str
    train: NotRequired[bool]
    weight: NotRequired[float]

@dataclass(frozen=True)
class Rendering:
    """`text` and, for each message, the span of its content."""
    text: str
    spans: tuple[Span, ...]

class RowError(DataError):
    """One row cannot be used; whoever works through many rows rejects it and counts it."""

def render(messages: Sequence[Message], tokenizer: Tokenizer) -> Rendering:
    """Text of a chat and the span of each content. RowError: the template refuses the messages, or
    changes a content beyond finding; ModelError: no template, or one that does not compile."""
    text = render_text(messages, tokenizer)

    def again(contents: Sequence[str]) -> str:
        pairs = zip(messages, contents, strict=True)
        return render_text([{**m, "content": content} for m, content in pairs], tokenizer)

    contents = [message["content"] for message in messages]
    markers = _unused(text + "".join(contents), 2 * len(contents))
    for trim in (str, str.rstrip, str.lstrip, str.strip):
        spans = _marked_spans(text, contents, markers, again, trim)
        if spans is not None:
            return Rendering(text, spans)
    changed = partial(_changed_span, text, contents, markers[0], again)
    return Rendering(text, tuple(map(changed, range(len(contents)))))

def render_text(
    messages: Sequence[Message], tokenizer: Tokenizer, *, add_generation_prompt: bool = False
) -> str:
    """Text of a chat; `add_generation_prompt` ends it where the assistant is to answer."""
    if tokenizer.chat_template is None:
        problem = f"{tokenizer.where}: the tokenizer has no chat template; put one into "
        raise ModelError(f"{problem}chat_template.jinja, or start from a chat model")
    write = _compiled(tokenizer.chat_template, tokenizer.where)
    variables = {
        **tokenizer.special,
        "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
        "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt,
    }  # fmt: skip
    text, pieces, deadline = "", write(variables), time.monotonic() + MAX_SECONDS
    try:
        while some := list(islice(pieces, 64)):
            text += "".join(some)
            if len(text) > MAX_CHARACTERS or time.monotonic() > deadline:
                problem = f"the chat template wrote more than {MAX_CHARACTERS} characters or took"
                raise RowError(f"{problem} more than {MAX_SECONDS:g} s; split the chat")
    except (jinja2.TemplateError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise RowError(f"the chat template refuses the messages: {error}") from error
    return text

@lru_cache(maxsize=8)
def generation_prompt(tokenizer: Tokenizer) -> str:
    """What the template writes after a user's turn to ask for an answer, "" if it adds nothing:
    whatever differs from the text that does not ask, which Phi-3 ends with eos."""
    question: list[Message] = [{"role": "user", "content": "x"}]
    asked = render_text(question, tokenizer)
    prompted = render_text(question, tokenizer, add_generation_prompt=True)
    return prompted[len(os.path.commonprefix([asked, prompted])) :]

def _unused(text: str, count: int) -> str:
    """Private-use characters, in their order, that the text does not hold."""
    for first in PRIVATE_USE:
        characters = "".join(map(chr, range(first, first + count)))
        if text.isascii() or set(text).isdisjoint(characters):
            return characters
    problem = "the chat holds private-use characters of all three Unicode planes, so its contents"
    raise RowError(f"{problem} cannot be marked; remove those characters")

def _marked_spans(
    text: str, contents: Sequence[str], markers: str, again: Again, trim: Trim
) -> tuple[Span, ...] | None:
    """Spans of all contents by markers, None where these do not come through untouched."""
    pairs = list(zip(markers[::2], markers[1::2], strict=True))
    both = zip(contents, pairs, strict=True)
    try:
        marked = again([c.replace(trim(c), start + trim(c) + end, 1) for c, (start, end) in both])
    except RowError:  # a template that refuses marked contents may accept the plain ones
        return None
    parts = re.split(f"([{markers}])", marked)  # text and markers in turn
    if "".join(parts[::2]) != text:
        return None
    places = dict(zip(parts[1::2], accumulate(map(len, parts[::2])), strict=False))
    spans = [(places.get(start), places.get(end)) for start, end in pairs]
    if 2 * len(places) + 1 < len(parts) or any((a is None) != (b is None) for a, b in spans):
        return None  # a marker repeated or cut off
    return tuple(None if span == (None, None) else span for span in spans)

def _changed_span(text: str, contents: Sequence[str], mark: str, again: Again, at: int) -> Span:
    """Span that changes when one content is replaced, checked to hold text of that content."""
    other = again([*contents[:at], mark, *contents[at + 1 :]])
    if other == text:
        return None
    start = len(os.path.commonprefix([text, other]))
    shorter = min(len(text), len(other)) - start
    backwards = [text[::-1][:shorter], other[::-1][:shorter]]
    end = len(text) - len(os.path.commonprefix(backwards))
    found, content = ("".join(part.split()) for part in (text[start:end], contents[at]))
    if other.count(mark) != 1 or found not in content:
        what = f"cannot tell where message {at + 1} lies in the rendered text: the template changes"
        became = f"{contents[at][:60]!r} became {text[start:end][:60]!r}"
        raise RowError(f"{what} or repeats it ({became}); use one that writes contents as they are")
    return start, end

class _Generation(Extension):
    """HF: {% generation %} marks answers for transformers; here its body is plain text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)

@lru_cache(maxsize=8)
def _compiled(source: str, where: str) -> Callable[[dict], Iterator[str]]:
    """Variables -> the text in pieces."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        template = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        problem = f"{where}: chat template, line {error.lineno}: {error.message}; mend the template"
        raise ModelError(f"{problem} in chat_template.jinja or tokenizer_config.json") from error
    shared = dict(template.globals)  # cost: `generate` would copy them out of two dicts each time

    def write(variables: dict) -> Iterator[str]:
        context = template.new_context({**shared, **variables}, shared=True)
        return template.root_render_func(context)

    return write

def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
