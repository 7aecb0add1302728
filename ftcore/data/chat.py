"""Chats to text through the model's own template, where each message lies in it, what is learned.

The text is rendered once, and only that rendering is ever tokenised. Positions are found by another
rendering, with a private-use character at both ends of each content (or of what is left where the
template trims it): without these it must be the text. A template that looks into contents (Qwen3
cuts <think> parts out of earlier turns) is asked once per message: what changes with it? Templates
run in jinja2's sandbox, with limits and what transformers gives."""

import json
import os
import re
import time
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache, partial
from itertools import accumulate, islice
from typing import NoReturn
import jinja2
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from ftcore.config import TrainOn
from ftcore.data.columns import Chat, Message, RowError
from ftcore.data.pack import Encoded, shifted
from ftcore.data.tokenizer import Encoding, Tokenizer
from ftcore.errors import ModelError

MAX_CHARACTERS, MAX_SECONDS = 2**20, 10.0  # of a rendering
PRIVATE_USE = range(0xE000, 0xF900)  # characters that no text means anything by

Span = tuple[int, int] | None  # start and end, in characters; None: left out of the text
Answers = Sequence[tuple[int, int, float]]  # start and end in characters, weight

def render(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[str, tuple[Span, ...]]:
    """Text of a chat and the span of each content. RowError: the template refuses the messages, or
    changes a content beyond finding; ModelError: no template, or one that does not compile."""
    rendered = partial(render_text, messages, tokenizer)
    text, contents = rendered(), [message["content"] for message in messages]
    used = text + "".join(contents)
    mark = next(character for character in map(chr, PRIVATE_USE) if character not in used)
    for put in (contents, [content.strip() for content in contents]):
        parts = rendered([mark + content + mark for content in put]).split(mark)
        if parts[1::2] == put and "".join(parts) == text:
            ends = list(accumulate(map(len, parts)))
            return text, tuple(zip(ends[::2], ends[1::2], strict=False))
    others = (rendered([*contents[:at], mark, *contents[at + 1 :]]) for at in range(len(contents)))
    return text, tuple(map(partial(_changed_span, text, mark), others, contents))

def render_text(messages: Sequence[Message], tokenizer: Tokenizer, contents: Sequence[str] = (), *,
                add_generation_prompt: bool = False) -> str:
    """Text of a chat, or of one with other contents; `add_generation_prompt` ends it where the
    assistant is to answer."""
    if tokenizer.chat_template is None:
        raise ModelError(f"{tokenizer.where} has no chat template: put one in chat_template.jinja")
    template = _compiled(tokenizer.chat_template, tokenizer.where)
    said = zip(messages, contents or [m["content"] for m in messages], strict=True)
    turns = [{"role": message["role"], "content": content} for message, content in said]
    variables = {**tokenizer.special, "messages": turns, "tools": None, "documents": None,
                 "add_generation_prompt": add_generation_prompt}
    pieces = template.root_render_func(template.new_context(variables))
    text, deadline = "", time.monotonic() + MAX_SECONDS
    try:
        while some := list(islice(pieces, 64)):
            text += "".join(some)
            if len(text) > MAX_CHARACTERS or time.monotonic() > deadline:
                limits = f"{MAX_CHARACTERS} characters or took more than {MAX_SECONDS:g} s"
                raise RowError(f"the chat template wrote more than {limits}; split the chat")
    except (jinja2.TemplateError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise RowError(f"the chat template refuses the messages: {error}") from error
    return text

@lru_cache(maxsize=8)
def generation_prompt(tokenizer: Tokenizer) -> str:
    """What the template writes after a user's turn to ask for an answer: whatever differs from the
    text that does not ask, which Phi-3 ends with eos."""
    question: list[Message] = [{"role": "user", "content": "x"}]
    prompted = render_text(question, tokenizer, add_generation_prompt=True)
    return prompted[len(os.path.commonprefix([render_text(question, tokenizer), prompted])) :]

def _changed_span(text: str, mark: str, other: str, content: str) -> Span:
    """Span that is the mark in another rendering, checked to hold text of the content."""
    if other == text:
        return None
    start = len(os.path.commonprefix([text, other]))
    backwards = [changed[start:][::-1] for changed in (text, other)]
    end = len(text) - len(os.path.commonprefix(backwards))
    found, said = ("".join(part.lower().split()) for part in (text[start:end], content))
    if other.count(mark) != 1 or found not in said:
        what = f"cannot see where a message lies in the rendered text: {content[:50]!r} became"
        raise RowError(f"{what} {text[start:end][:50]!r}; use a template that keeps texts")
    return start, end

@lru_cache(maxsize=8)
def _compiled(source: str, where: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    # HF: {% generation %} marks answers for transformers; here it is a scope, as there too
    source = re.sub(r"(\{%[-+]?\s*(?:end)?)generation\b", r"\1with", source)
    try:
        template = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        problem = f"{where}: chat template, line {error.lineno}: {error.message}; mend the template"
        raise ModelError(f"{problem} in chat_template.jinja or tokenizer_config.json") from error
    template.globals = dict(template.globals)  # cost: each rendering copies them, out of two dicts
    return template

def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)

def encode_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> np.ndarray:
    """Ids (int32) of a chat that ends where the assistant is to answer: those that `encode` puts
    before an answer that begins with a word, which white space at the end may join."""
    require_plain(messages, tokenizer)
    text = render_text(messages, tokenizer, add_generation_prompt=True)
    encoding = tokenizer.encode(text + "x" * text[-1:].isspace(), special=False)
    return encoding.ids_T[encoding.offsets_T2[:, 1] <= len(text)]

def find_answers(chat: Chat, tokenizer: Tokenizer, train_on: TrainOn) -> tuple[str, Answers]:
    """A chat's text, and what is supervised. RowError: nothing, or an answer is empty or lost."""
    require_plain(chat.messages, tokenizer)
    text, spans = render(chat.messages, tokenizer)
    if train_on == "all":
        return text, [(0, len(text), 1.0)]
    trained = [i for i, m in enumerate(chat.messages)
               if m.get("train", m["role"] == "assistant") and m.get("weight", 1.0) > 0]
    if not trained:
        roles = ", ".join(message["role"] for message in chat.messages)
        raise RowError(f"nothing to supervise: no message is trained on (roles: {roles})")
    header = generation_prompt(tokenizer)
    before = list(accumulate((span[1] if span else 0 for span in spans), max, initial=0))
    answers = []
    for index in trained if train_on == "assistant" else trained[-1:]:
        message, span = chat.messages[index], spans[index]
        if span is None or not message["content"].strip():
            why = "the template omits it" if message["content"].strip() else "empty"
            raise RowError(f"message {index + 1} is to be trained on but {why}")
        start, end = span
        if train_on == "completion":
            if index + 1 < len(chat.messages):
                raise RowError(f"message {index + 1} is to be completed, but others follow it")
            prompt = render_text(chat.messages[:index], tokenizer, add_generation_prompt=True)
            if not text.startswith(prompt):
                raise RowError("its text does not begin with its prompt's; take data.train_on last")
            start, end = len(prompt), len(text)
        elif message["role"] == "assistant":
            # behind the generation prompt, or the white space before: an empty <think> is learned
            place = text.rfind(header, before[index], start) if header else -1
            space = before[index] + len(text[before[index] : start].rstrip())
            start = place + len(header) if place >= 0 else space
        answers.append((start, end, message.get("weight", 1.0)))
    return text, answers

def supervise(row_id: str, text: str, encoding: Encoding, answers: Answers, tokenizer: Tokenizer,
              train_on_end: bool) -> Encoded:
    """The document of a tokenised chat: tokens that overlap an answer count with its weight, and so
    does the end of its turn, so that the model learns to stop, if `train_on_end`."""
    starts_T, ends_T = np.ascontiguousarray(encoding.offsets_T2.T)  # both in order
    weights_T = np.zeros(len(encoding.ids_T), dtype=np.float32)
    for start, end, weight in answers:
        first, past = ends_T.searchsorted(start, "right"), starts_T.searchsorted(end)
        if first < past and starts_T[first] < start:
            first += int(encoding.ids_T[first]) in tokenizer.special_ids
        weights_T[first:past] = weight
        if train_on_end:
            space_end = re.compile(r"\s*").match(text, end).end()  # may stand before eos
            first, last = ends_T.searchsorted([end, space_end], "right")
            id_ = int(encoding.ids_T[last]) if last < len(starts_T) else -1
            if id_ == tokenizer.eos_id or (space_end == end and id_ in tokenizer.special_ids):
                weights_T[first : last + 1] = weight
    return shifted(row_id, encoding.ids_T, weights_T)

def require_plain(messages: Sequence[Message], tokenizer: Tokenizer) -> None:
    """RowError if a content spells a special token, with which it could forge a turn."""
    for number, message in enumerate(messages, start=1):
        if (token := tokenizer.find_special(message["content"])) is not None:
            raise RowError(f"message {number} holds the special token {token!r}: write it apart")
