"""The jobs of one request: what the engine says of them becomes text, choices and events."""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftcore.data.tokenizer import Tokenizer
from ftcore.deploy.engine import Engine, Finish, Job, QueueFull, Scores
from ftcore.deploy.http import Exchange, Refused
from ftcore.deploy.meters import Meters
from ftcore.deploy.options import ServeConfig
from ftcore.deploy.text import Speech
from kernels.sampling import Token

Word = Token | Scores | Finish

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
        self.service, self.x, self.jobs, self.left = service, x, jobs, {*jobs}
        loop = asyncio.get_running_loop()
        self.first, self.done = loop.create_future(), loop.create_future()
        self.values: dict[Job, list[float]] = {}

    async def run(self) -> list[list[float]]:
        """Wait for all; returns the scores of jobs without sampling."""
        engine, options = self.service.engine, self.service.options
        try:
            for job in self.jobs:
                job.listener = self.hear
                engine.submit(job)
            await asyncio.wait([self.first], timeout=options.queue_seconds)
            if not self.first.done():
                said = f"no turn within {options.queue_seconds:g} s (--queue-seconds)"
                raise Refused("queue_timeout", said, Retry_After="5")
            await self.done
        except QueueFull:
            said = f"{options.queue} sequences wait already (--queue)"
            raise Refused("queue_full", said, Retry_After="1") from None
        finally:
            for job in self.left:
                engine.cancel(job)
        return [self.values[job] for job in self.jobs if job in self.values]

    def hear(self, job: Job, said: Word) -> None:
        """One word of the engine; what fails here ends this request alone."""
        if self.done.done():
            return
        if not self.first.done():
            self.first.set_result(None)
            first = self.service.meters.histograms["time_to_first_token_seconds"]
            first.observe(time.monotonic() - self.x.began)
        try:
            if isinstance(said, Finish):
                self.left.discard(job)
                if said.reason == "error":
                    raise Refused(said.code, "the answer was not completed; the log may say why")
            self.take(job, said)
            if not self.left:
                self.done.set_result(None)
        except Exception as error:
            self.done.set_exception(error)

    def take(self, job: Job, said: Word) -> None:
        if isinstance(said, Scores):
            self.values[job] = said.values

@dataclass
class Choice:
    """One answer as it grows: its `text`, and its tokens from number `told` on, are yet to be told;
    `last` is when one came."""
    index: int
    speech: Speech
    text: str
    told: int = 0
    reason: str = ""
    last: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer, the one that ends it too."""
        return len(self.speech.tokens) - self.speech.prompt_tokens

class Answers(Work):
    """Work that is answered in text: choices, told whole or as they grow; each begins with an echo.
    Jobs of one prompt share its list of ids."""

    def __init__(self, service: Service, x: Exchange, jobs: Sequence[Job],
                 fields: Mapping[str, Any], echoes: Sequence[str]) -> None:
        super().__init__(service, x, jobs)
        self.is_chat, self.choices, stops = "messages" in fields, {}, fields["stop"]
        self.streams = x.is_streamed = fields["stream"]
        self.tells_usage = bool(fields["stream_options"].get("include_usage"))
        self.wants_logprobs = jobs[0].sampling.num_top is not None
        kind = "chat.completion" if self.is_chat else "text_completion"
        self.head = {"id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{x.id}",
                     "object": kind + ".chunk" * (self.is_chat and self.streams),
                     "created": int(time.time()), "model": fields["model"],
                     "system_fingerprint": service.fingerprint}
        for index, (job, echo) in enumerate(zip(jobs, echoes, strict=True)):
            speech = Speech(service.tokenizer, [stops] if isinstance(stops, str) else stops,
                            trims=self.is_chat)
            self.choices[job] = Choice(index, speech, echo)

    def take(self, job: Job, said: Word) -> None:
        choice, is_last = self.choices[job], isinstance(said, Finish)
        if is_last:
            choice.text += choice.speech.end()
            choice.reason = choice.reason or said.reason
        elif choice.reason:  # a stop string was met, which the engine has not heard of yet
            return
        else:
            choice.text += choice.speech.add(said)
            before, choice.last = choice.last, time.monotonic()
            if before and choice.num_tokens > 1:
                gaps = self.service.meters.histograms["inter_token_latency_seconds"]
                gaps.observe(choice.last - before)
            if choice.speech.is_stopped:
                choice.reason = "stop"
                self.service.engine.cancel(job)
        if self.streams and (choice.text or is_last or self.wants_logprobs or not choice.told):
            self._send([self._told(choice, is_last)])
            choice.text, choice.told = "", len(choice.speech.tokens)

    async def answer(self) -> dict[str, Any] | None:
        """The whole answer; None where it was told in events."""
        await self.run()
        choices = [*self.choices.values()]
        prompt = sum({id(job.ids): len(job.ids) for job in self.jobs}.values())
        completion = sum(choice.num_tokens for choice in choices)
        counts = {"prompt_tokens": prompt, "completion_tokens": completion}
        usage = {**counts, "total_tokens": prompt + completion,
                 "prompt_tokens_details": {"cached_tokens": 0}}
        self.x.told |= {"reason": choices[-1].reason, **counts}
        self.service.meters.generated(prompt, completion)
        if not self.streams:
            return {**self.head, "choices": [self._told(choice, True) for choice in choices],
                    "usage": usage}
        if self.tells_usage:
            self._send([], usage)
        self.x.send(b"[DONE]")
        return None

    def _send(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> None:
        event = {**self.head, "choices": choices} | ({"usage": usage} if self.tells_usage else {})
        self.x.send(json.dumps(event).encode())

    def _told(self, choice: Choice, is_last: bool) -> dict[str, Any]:
        """A choice, or what is new in it."""
        write = choice.speech.chat_logprobs if self.is_chat else choice.speech.text_logprobs
        told = {"index": choice.index, "finish_reason": choice.reason if is_last else None,
                "logprobs": write(choice.told) if self.wants_logprobs else None}
        if not self.is_chat:
            return told | {"text": choice.text}
        message = {} if self.streams and choice.told else {"role": "assistant", "content": ""}
        message |= {"content": choice.text} if choice.text else {}
        return told | ({"delta": message} if self.streams else
                       {"message": message | {"refusal": None}})
