"""Answers in text while their tokens come, whole or in events, as OpenAI's API has them; and what
the log notes of each text, by which monitoring (ftcore/monitor) tells whether requests are still
like those that the model was made for. A text itself only on demand.

    prompt_tokens, unknown,          of every text; unknown: share of its tokens; where its vector
    embedding                        points, as `heads.sketched` has it
    label, confidence, entropy       of a classifier: the highest probability, and nats
    generation_tokens, reason,       of an answer: why it ended, the mean over its tokens (nats),
    logprob, repeated                the share of its runs of 4 tokens that it had before

A token may be half a character, and a stop string may begin in one token and end in another: what
may still become part of either is held back. Bytes that are no UTF-8 become U+FFFD."""

import codecs
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any
import numpy as np
from ftcore.data.tokenizer import Tokenizer
from ftcore.deploy import engine, http
from kernels.sampling import Token

REFERENCE = "reference.jsonl"  # records of dev rows, in a run and in its bundle
Record = dict[str, Any]

@dataclass(frozen=True)
class Served:
    name: str  # by which it is asked for
    version: str  # what answers by that name, in the log
    tokenizer: Tokenizer
    labels: tuple[str, ...] = ()  # of a classifier's outputs
    problem: str | None = None  # HF's `problem_type` of a classifier; "regression": scores
    temperature: float = 1.0  # by which a classifier is calibrated
    fingerprint: str = ""  # hash of weights and adapters
    written: Sequence[float] = ()  # when the files of its weights were, seconds since 1970
    adapters: Mapping[str, str] = field(default_factory=dict)  # by request: the fingerprints

class Choice:
    """One answer as it grows: its `text`, and its `tokens` from number `told` on, are yet to be
    told; once it has ended there is a `reason`.

    stops   strings that end it, which are not shown
    trims   as an answer alone, without the blank of some tokenizers before the first word
    echo    tokens that it begins with, which are not of the answer"""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], *, trims: bool = False,
                 echo: Sequence[Token] = ()) -> None:
        self.tokenizer, self.stops, self.trims = tokenizer, (), trims
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.text = self.held = self.reason = ""
        self.tokens: list[Token] = []
        self.offsets: list[int] = []  # how many characters stand before each
        self.size = self.told = 0  # size: characters, those held back too
        for token in echo:
            self.add(token)
        self.stops, self.num_echoed = stops, len(echo)

    @property
    def answer(self) -> list[Token]:
        return self.tokens[self.num_echoed :]

    def add(self, token: Token) -> None:
        self.tokens.append(token)
        self.offsets.append(self.size)
        raw = b"" if token.id in self.tokenizer.special_ids else self.tokenizer.bytes_of(token.id)
        if raw and self.trims:
            self.trims = False
            raw = raw if self.tokenizer.decode([token.id])[:1] == " " else raw.removeprefix(b" ")
        self._show(self.utf8.decode(raw))

    def end(self, reason: str) -> None:
        if not self.reason:  # else a stop string has ended it, which the engine does not know
            self._show(self.utf8.decode(b"", True))
            self.text, self.reason = self.text + self.held, self.reason or reason

    def _show(self, piece: str) -> None:
        self.size += len(piece)
        text = self.held + piece
        cuts = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        sizes = (k for stop in self.stops for k in range(1, len(stop)) if text.endswith(stop[:k]))
        shown = min(cuts, default=len(text) - max(sizes, default=0))
        self.text, self.held = self.text + text[:shown], "" if cuts else text[shown:]
        self.reason = "stop" if cuts else ""

    def logprobs(self, is_chat: bool) -> dict[str, Any]:
        """Those of the tokens that are yet to be told, as chats or completions have them."""
        tokens, raw = self.tokens[self.told :], self.tokenizer.bytes_of

        def told(id_: int, logprob: float) -> dict[str, Any]:
            return {"token": spelled(raw(id_)), "logprob": logprob, "bytes": [*raw(id_)]}

        if is_chat:
            return {"content": [told(t.id, t.logprob) | {"top_logprobs": [told(*o) for o in t.top]}
                                for t in tokens]}
        return {"tokens": [spelled(raw(token.id)) for token in tokens],
                "token_logprobs": [token.logprob for token in tokens],
                "top_logprobs": [{spelled(raw(id_)): logprob for id_, logprob in token.top} or None
                                 for token in tokens], "text_offset": self.offsets[self.told :]}

def spelled(raw: bytes) -> str:
    """A token as text, or its bytes where it is no whole characters."""
    text = raw.decode("utf-8", "replace")
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw) if "\ufffd" in text else text

class Answers:
    """The choices of one request, a job each: `take` is given what the engine says, `end` returns
    all of it, or None where it was sent in events."""

    def __init__(self, x: http.Exchange, jobs: Sequence[engine.Job], fields: Mapping[str, Any],
                 served: Served, tells_logprobs: bool, echoes: Sequence[Sequence[Token]]) -> None:
        self.x, self.is_chat, self.streams = x, "messages" in fields, fields["stream"]
        self.tells_usage = bool(fields["stream_options"].get("include_usage"))
        self.tells_logprobs = tells_logprobs
        kind = "chat.completion" if self.is_chat else "text_completion"
        self.head = {"id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{x.id}",
                     "object": kind + ".chunk" * (self.is_chat and self.streams),
                     "created": int(time.time()), "model": fields["model"],
                     "system_fingerprint": served.adapters.get(x.adapter, served.fingerprint)}
        stops = [fields["stop"]] if isinstance(fields["stop"], str) else fields["stop"]
        self.choices = {job: Choice(served.tokenizer, stops, trims=self.is_chat, echo=echo)
                        for job, echo in zip(jobs, echoes, strict=True)}
        self.jobs, self.firsts = jobs, jobs[:: fields["n"]]  # firsts: of each prompt

    def take(self, job: engine.Job, word: Token | engine.Finish) -> bool:
        """Whether the job shall end, because a stop string was met."""
        choice, is_last = self.choices[job], isinstance(word, engine.Finish)
        if is_last:
            choice.end(word.reason)
        elif not choice.reason:
            choice.add(word)
        has_news = choice.text or self.tells_logprobs or not choice.told
        if self.streams and (is_last or has_news and len(choice.tokens) > choice.told):
            self._send([self._told(job, is_last)])
            choice.text, choice.told = "", len(choice.tokens)
        return bool(choice.reason) and not is_last

    def end(self) -> dict[str, Any] | None:
        prompt = sum(len(job.ids) for job in self.firsts)
        completion = sum(len(choice.answer) for choice in self.choices.values())
        self.x.told |= {"reason": self.choices[self.jobs[-1]].reason, "prompt_tokens": prompt,
                        "generation_tokens": completion}
        usage = {"prompt_tokens": prompt, "completion_tokens": completion,
                 "total_tokens": prompt + completion,
                 "prompt_tokens_details": {"cached_tokens": sum(j.cached for j in self.firsts)}}
        if not self.streams:
            told = [self._told(job, True) for job in self.choices]
            return {**self.head, "choices": told, "usage": usage}
        if self.tells_usage:
            self._send([], usage)
        self.x.send(b"[DONE]")
        return None

    def figures(self) -> list[Record]:
        """Of each answer, for the log."""
        return [answer_figures(each.answer, each.reason) for each in self.choices.values()]

    def _send(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> None:
        event = {**self.head, "choices": choices} | ({"usage": usage} if self.tells_usage else {})
        self.x.send(json.dumps(event).encode())

    def _told(self, job: engine.Job, is_last: bool) -> dict[str, Any]:
        """A choice, or what is new in it."""
        choice = self.choices[job]
        told = {"index": self.jobs.index(job), "finish_reason": choice.reason if is_last else None,
                "logprobs": choice.logprobs(self.is_chat) if self.tells_logprobs else None}
        if not self.is_chat:
            return told | {"text": choice.text}
        if not self.streams:
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            return told | {"message": message}
        delta = {} if choice.told else {"role": "assistant", "content": ""}
        return told | {"delta": delta | ({"content": choice.text} if choice.text else {})}

def text_figures(job: engine.Job, tokenizer: Tokenizer) -> Record:
    unknown, ids = tokenizer.special.get("unk_token"), job.ids
    share = {"unknown": ids.count(tokenizer.id_of(unknown)) / len(ids)} if unknown else {}
    return {"prompt_tokens": len(ids), **share, "embedding": job.embedding}

def class_figures(probs_K: np.ndarray, labels: Sequence[str]) -> Record:
    """Of calibrated probabilities, float64: of one class a row, or of labels by themselves."""
    return {"label": labels[int(probs_K.argmax())], "confidence": float(probs_K.max()),
            "entropy": float(-(probs_K * np.log(probs_K.clip(1e-300))).sum())}

def answer_figures(tokens: Sequence[Token], reason: str) -> Record:
    ids, logprob = [token.id for token in tokens], fmean(token.logprob for token in tokens)
    runs = [(*ids[i : i + 4],) for i in range(len(ids) - 3)]
    return {"generation_tokens": len(ids), "reason": reason, "logprob": logprob,
            "repeated": 1 - len({*runs}) / len(runs) if runs else 0.0}

def probs_of(logits_BK: np.ndarray, problem: str | None) -> np.ndarray:
    """probs_BK of classes, or of labels by themselves; `problem` is HF's `problem_type`."""
    if problem == "multi_label_classification":
        return 1 / (1 + np.exp(-logits_BK))
    odds_BK = np.exp(logits_BK - logits_BK.max(1, keepdims=True))
    return odds_BK / odds_BK.sum(1, keepdims=True)

def redacted(text: str) -> str:
    """A text with names of kinds in place of e-mail addresses and of long numbers."""
    for kind, pattern in http.PERSONAL.items():
        text = re.sub(pattern, f"[{kind}]", text)
    return text
