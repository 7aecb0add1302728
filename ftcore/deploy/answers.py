"""The jobs of one request: what the engine says of them becomes text, choices and events."""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftcore.config import ServeConfig
from ftcore.data.tokenizer import Tokenizer
from ftcore.deploy.engine import Engine, Finish, Job, QueueFull, Scores
from ftcore.deploy.http import Exchange, Refused
from ftcore.deploy.meters import Meters
from ftcore.deploy.text import Speech
from ftcore.model.sampling import Token

FAILURES = {"non_finite_logits": "the model's numbers are not finite; its weights may be damaged",
            "shutting_down": "the server stops, and the answer is not complete"}

@dataclass(frozen=True)
class Service:
    """What all requests share."""
    engine: Engine
    tokenizer: Tokenizer
    options: ServeConfig
    meters: Meters
    fingerprint: str

class Work:
    """The jobs of one request, from the queue to the end of the last; `hear` gets what is said."""

    def __init__(self, service: Service, x: Exchange, jobs: Sequence[Job]) -> None:
        self.service, self.x, self.jobs, self.left = service, x, jobs, set(jobs)
        self.first = asyncio.get_running_loop().create_future()
        self.done = asyncio.get_running_loop().create_future()
        self.values: dict[Job, list[float]] = {}

    async def run(self) -> list[list[float]]:
        """Wait for all; returns the scores of each job without sampling."""
        seconds, engine = self.service.options.queue_seconds, self.service.engine
        try:
            for job in self.jobs:
                job.listener, job.owner = self.hear, self.x.owner
                engine.submit(job)
            await asyncio.wait([self.first], timeout=seconds)
            if not self.first.done():
                late = f"no turn within {seconds:g} s (--queue-seconds)"
                raise Refused("queue_timeout", late, Retry_After="5")
            await self.done
        except QueueFull:
            full = f"{self.service.options.queue} sequences wait already (--queue)"
            raise Refused("queue_full", full, Retry_After="1") from None
        finally:
            for job in self.left:
                engine.cancel(job)
        return [self.values[job] for job in self.jobs if job in self.values]

    def hear(self, job: Job, said: Token | Scores | Finish) -> None:
        """One word of the engine; what fails here ends this request alone."""
        if self.done.done():
            return
        if not self.first.done():
            self.first.set_result(None)
            self.service.meters.observe(time_to_first_token_seconds=time.monotonic() - self.x.began)
        try:
            if isinstance(said, Finish):
                self.left.discard(job)
                if said.reason == "error":
                    raise Refused(said.code, FAILURES.get(said.code, "the engine failed on this"))
            self.take(job, said)
            if not self.left:
                self.done.set_result(None)
        except Exception as error:
            self.done.set_exception(error)

    def take(self, job: Job, said: Token | Scores | Finish) -> None:
        if isinstance(said, Scores):
            self.values[job] = said.values

@dataclass
class Choice:
    """One answer as it grows: its `text` and tokens from number `told` on are yet to be told."""
    index: int
    speech: Speech
    text: str
    told: int = 0
    reason: str = ""
    cached_tokens: int = 0
    last: float = 0.0  # when its last token came

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer, the one that ends it too."""
        return len(self.speech.tokens) - self.speech.prompt_tokens

class Answers(Work):
    """Work that is answered in text: choices, told whole or as they grow; `texts` are echoed."""

    def __init__(self, service: Service, x: Exchange, jobs: Sequence[Job], fields: Mapping[str, Any],
                 texts: Sequence[str]) -> None:
        super().__init__(service, x, jobs)
        self.is_chat, self.choices, stop = "messages" in fields, {}, fields["stop"] or []
        self.streams = x.is_streamed = fields["stream"]
        self.tells_usage = bool((fields["stream_options"] or {}).get("include_usage"))
        self.wants_logprobs = fields["logprobs"] not in (None, False)
        kind = "chat.completion" if self.is_chat else "text_completion"
        self.head = {"id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{x.id}",
                     "object": kind + ".chunk" * (self.is_chat and self.streams),
                     "created": int(time.time()), "model": fields["model"],
                     "system_fingerprint": service.fingerprint}
        for index, (job, text) in enumerate(zip(jobs, texts, strict=True)):
            speech = Speech(service.tokenizer, [stop] if isinstance(stop, str) else stop,
                            prompt_tokens=len(job.ids) * job.sampling.prompt_logprobs,
                            trims=self.is_chat)
            self.choices[job] = Choice(index, speech, text)

    def take(self, job: Job, said: Token | Scores | Finish) -> None:
        choice, is_last = self.choices[job], isinstance(said, Finish)
        if is_last:
            choice.text += choice.speech.end()
            choice.reason, choice.cached_tokens = choice.reason or said.reason, said.cached_tokens
        elif choice.reason:  # a stop string was met, and the engine has not heard of it yet
            return
        else:
            choice.text += choice.speech.add(said)
            now, before = time.monotonic(), choice.last
            choice.last = now
            if before and choice.num_tokens > 1:
                self.service.meters.observe(inter_token_latency_seconds=now - before)
            if choice.speech.is_stopped:
                choice.reason = "stop"
                self.service.engine.cancel(job)
        if self.streams and (choice.text or is_last or self.wants_logprobs or not choice.told):
            self._send([self._told(choice, is_last)], usage=None)
            choice.text, choice.told = "", len(choice.speech.tokens)

    async def answer(self) -> dict[str, Any] | None:
        """The whole answer; None where it was told in events."""
        await self.run()
        told, choices = self.x.told, [*self.choices.values()]
        prompts = {id(job.ids): choice for job, choice in self.choices.items()}
        prompt = sum(len(job.ids) for job in {id(job.ids): job for job in self.jobs}.values())
        completion = sum(choice.num_tokens for choice in choices)
        cached = sum(choice.cached_tokens for choice in prompts.values())
        usage = {"prompt_tokens": prompt, "completion_tokens": completion,
                 "total_tokens": prompt + completion,
                 "prompt_tokens_details": {"cached_tokens": cached}}
        told |= {"reason": choices[-1].reason, "prompt_tokens": prompt,
                 "completion_tokens": completion}
        self.service.meters.generated(prompt, completion)
        if not self.streams:
            return {**self.head, "choices": [self._told(choice, True) for choice in choices],
                    "usage": usage}
        if self.tells_usage:
            self._send([], usage=usage)
        self.x.send(b"[DONE]")
        return None

    def _send(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> None:
        event = {**self.head, "choices": choices} | ({"usage": usage} if self.tells_usage else {})
        self.x.send(json.dumps(event).encode())

    def _told(self, choice: Choice, is_last: bool) -> dict[str, Any]:
        """A choice, or what is new in it."""
        told = {"index": choice.index, "logprobs": None,
                "finish_reason": choice.reason if is_last else None}
        if self.wants_logprobs:
            speech = choice.speech
            write = speech.chat_logprobs if self.is_chat else speech.text_logprobs
            told["logprobs"] = write(choice.told)
        if not self.is_chat:
            return told | {"text": choice.text}
        if not self.streams:
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            return told | {"message": message}
        role = {} if choice.told else {"role": "assistant"}
        return told | {"delta": role | ({"content": choice.text} if choice.text or role else {})}
