"""The text of an answer while its tokens come, and how their log-probabilities are written.

A token may be half a character, and a stop string may begin in one token and end in another: what
may still become part of either is held back. Bytes that are no UTF-8 become U+FFFD.
"""

import codecs
from collections.abc import Sequence
from typing import Any

from ftcore.data.tokenizer import Tokenizer
from kernels.sampling import Token

class Speech:
    """Text that grows by tokens: `add` and `end` return what may be shown now.

    stops           strings that end it, which are not shown; then `is_stopped`
    prompt_tokens   come first, and are searched for no stops
    trims           as an answer alone, without the blank of some tokenizers before the first word
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], *, prompt_tokens: int = 0,
                 trims: bool = False) -> None:
        self.tokenizer, self.stops, self.trims = tokenizer, stops, trims
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.prompt_tokens, self.held, self.is_stopped = prompt_tokens, "", False
        self.tokens: list[Token] = []  # all of them, and how many characters stand before each
        self.offsets: list[int] = []
        self.size = 0  # characters, those held back too

    def add(self, token: Token) -> str:
        self.tokens.append(token)
        self.offsets.append(self.size)
        is_text = token.id not in self.tokenizer.special_ids
        raw = self.tokenizer.bytes_of(token.id) if is_text else b""
        if raw and self.trims:
            self.trims = False
            raw = raw if self.tokenizer.decode([token.id])[:1] == " " else raw.removeprefix(b" ")
        return self._released(self.utf8.decode(raw))

    def end(self) -> str:
        return self._released(self.utf8.decode(b"", True)) + ("" if self.is_stopped else self.held)

    def _released(self, piece: str) -> str:
        self.size += len(piece)
        if self.is_stopped or len(self.tokens) <= self.prompt_tokens:
            return "" if self.is_stopped else piece
        text = self.held + piece
        if cuts := [place for stop in self.stops if (place := text.find(stop)) >= 0]:
            self.is_stopped = True
            return text[: min(cuts)]
        sizes = (k for stop in self.stops for k in range(1, len(stop)) if text.endswith(stop[:k]))
        shown = len(text) - max(sizes, default=0)
        self.held = text[shown:]
        return text[:shown]

    def chat_logprobs(self, first: int) -> dict[str, Any]:
        """Those of the tokens from number `first` on, in the form of OpenAI's chats."""
        def told(id_: int, logprob: float | None) -> dict[str, Any]:
            raw = self.tokenizer.bytes_of(id_)
            return {"token": spelled(raw), "logprob": logprob, "bytes": [*raw]}

        return {"content": [told(t.id, t.logprob) | {"top_logprobs": [told(*o) for o in t.top]}
                            for t in self.tokens[first:]]}

    def text_logprobs(self, first: int) -> dict[str, Any]:
        """The same in the form of its completions."""
        tokens, raw = self.tokens[first:], self.tokenizer.bytes_of
        return {"tokens": [spelled(raw(token.id)) for token in tokens],
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": [{spelled(raw(id_)): logprob for id_, logprob in token.top} or None
                                 for token in tokens], "text_offset": self.offsets[first:]}

def spelled(raw: bytes) -> str:
    """A token as text, or its bytes where it is no whole characters."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
