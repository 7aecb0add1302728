"""The routes: OpenAI's and a few of its own, over one engine.

A body is read and checked by fields.toml, its texts become tokens by the path of training, both in
threads beside the event loop; then its jobs go to the engine. What that says comes back once a step
and is handed to each request on the loop."""

import asyncio
import base64
import json
import re
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
import numpy as np
from prometheus_client import generate_latest
from ftcore.config import ServeConfig
from ftcore.data import chat, columns, encode, store
from ftcore.deploy.answers import Answers, Served, class_figures, probs_of, redacted, text_figures
from ftcore.deploy.engine import Engine, Finish, Job, QueueFull, Said
from ftcore.deploy.fields import Fields, openapi, shown
from ftcore.deploy.http import FIELDS, Exchange, Meters, Refused, require
from ftcore.errors import DataError
from ftcore.evaluate.evaluator import spoken
from kernels.memory import held_bytes
from kernels.sampling import Sampling, Token

LATE = 30.0  # seconds without a turn of the engine, after which it is not ready
JsonObject = dict[str, Any]

class Api:
    """The routes, for `http.Server`; `start` once the event loop runs."""

    def __init__(self, engine: Engine, served: Served, config: ServeConfig, meters: Meters,
                 journal: Any, watch: Any) -> None:
        self.engine, self.served, self.options = engine, served, config
        self.journal, self.watch, self.looks = journal, watch, ThreadPoolExecutor(1)
        self.model, self.tokenizer, self.meters = engine.model, served.tokenizer, meters
        self.began, spec, flags = int(time.time()), self.model.spec, vars(config)
        self.context = min(spec.max_positions, engine.cache_tokens)
        self.numbers = {**flags, "context": self.context, "last_id": spec.vocab_size - 1,
                        "width": spec.hidden_size}
        self.routes = {
            path: ("POST" if groups else "GET",
                   partial(self._answer, getattr(self, name), Fields(groups, self.numbers, flags)))
            for path, (name, groups) in FIELDS["routes"].items()}
        sizes = map(len, map(self.tokenizer.bytes_of, range(self.tokenizer.vocab_size)))
        self.most_bytes = self.context * max(sizes)  # of a text that may fit

    def start(self) -> None:
        """Let the engine work, and hand out what it says."""
        def hand_out(said: Said) -> None:
            for job, word in said:
                job.listener((job, word))

        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(2))  # reads bodies and texts
        self.engine.start(partial(loop.call_soon_threadsafe, hand_out))

    async def _answer(self, route: Callable, rules: Fields, x: Exchange) -> bytes | None:
        fields = await asyncio.to_thread(rules.read, x.body) if x.method == "POST" else {}
        if "model" in fields:
            asked, name, own = fields["model"], self.served.name, self.served.adapters
            is_known = asked in (None, name, *own)
            require(is_known, "model", code="model_not_found", name=shown(asked or ""))
            x.adapter, fields["model"] = (asked if asked in own else None), asked or name
            x.told["model"] = x.adapter or self.served.version
        answer = await route(x, fields)
        return None if answer is None else json.dumps(answer).encode()

    async def _run(self, x: Exchange, jobs: Sequence[Job], take: Callable[[Job, Any], Any]) -> None:
        """Let the engine do jobs; `take` gets each word of it, and may tell it to end one. Those
        that are left when this ends, for whatever reason, do not go on."""
        seconds, inbox, left, before = self.options.queue_seconds, asyncio.Queue(), {*jobs}, {}
        try:
            for job in jobs:
                job.listener, job.adapter = inbox.put_nowait, x.adapter
                self.engine.submit(job)
            while left:
                job, word = await asyncio.wait_for(inbox.get(), None if before else seconds)
                now = time.monotonic()
                if not before:
                    self.meters["time_to_first_token_seconds"].observe(now - x.began)
                if isinstance(word, Finish):
                    left.discard(job)
                    require(word.reason != "error", code=word.code)
                elif job in before:
                    self.meters["inter_token_latency_seconds"].observe(now - before[job])
                before[job] = now
                if take(job, word):
                    self.engine.cancel(job)
        except TimeoutError:
            raise Refused("queue_timeout", **vars(self.options)) from None
        except QueueFull:
            raise Refused("queue_full", **vars(self.options)) from None
        finally:
            for job in left:
                self.engine.cancel(job)

    async def generate(self, x: Exchange, fields: JsonObject) -> JsonObject | None:
        require(self.model.task == "lm", "model", code="unsupported_task")
        asked = {fields["max_tokens"], fields.get("max_completion_tokens")} - {None}
        require(len(asked) < 2, "max_tokens", "differs from max_completion_tokens, its other name")
        param, several = await asyncio.to_thread(self._read, fields)
        num_top, count = fields["logprobs"], fields["n"]
        if param == "messages":
            top = fields["top_logprobs"]
            require(num_top or top is None, "top_logprobs", "needs logprobs: true")
            num_top = (top or 0) if num_top else None
        said = f"times the prompts must be <= {self.options.prompts} (--prompts)"
        require(count * len(several) <= self.options.prompts, "n", said, "too_many_sequences")
        most = next(iter(asked), max(1, self.context - max(map(len, several))))
        self._require_room(several, param, most)
        require(fields["min_tokens"] <= most, "min_tokens", f"must be <= {most}")
        seed = secrets.randbits(62) if fields["seed"] is None else fields["seed"]
        same = {name: fields[name] for name in fields if name in Sampling.__dataclass_fields__}
        sampling = Sampling(
            **same, max_new_tokens=most, min_new_tokens=fields["min_tokens"], num_top=num_top or 0,
            stop_ids=frozenset() if fields["ignore_eos"] else self.tokenizer.stop_ids)
        jobs = [Job(several[place // count], replace(sampling, seed=(seed + place) % 2**63),
                    owner=(x.owner, fields["model"])) for place in range(count * len(several))]
        echoes = [[*map(Token, job.ids)] if fields.get("echo") else [] for job in jobs]
        if any(echoes) and num_top is not None:
            read = [Job(ids, None, num_top=num_top) for ids in several]
            await self._run(x, read, lambda job, word: False)
            echoes = [job.read for job in read for _ in range(count)]
        answers = Answers(x, jobs, fields, self.served, num_top is not None, echoes)
        await self._run(x, jobs, answers.take)
        self._note(x, jobs, [each for each in listed(fields[param]) for _ in range(count)])
        for row, job, told in zip(x.told["rows"], jobs, answers.figures(), strict=True):
            row |= told | ({"temperature": sampling.temperature} if sampling.temperature else {})
            if self.options.log_texts:
                row["answer"] = redacted(spoken(job.answer, self.tokenizer))
        return answers.end()

    def _require_room(self, several: Sequence[list[int]], param: str, most: int = 0) -> None:
        require(all(several), param, "holds no token")
        count = max(map(len, several))
        said = f"{count} tokens + {most} of an answer are more than the context's {self.context}"
        require(count + most <= self.context, param, said, "context_length_exceeded")

    def _read(self, fields: JsonObject) -> tuple[str, list[list[int]]]:
        """The field that the model reads, and ids: of its conversation, its texts, or as given."""
        param = next(name for name in ("messages", "prompt", "input") if name in fields)
        given = fields[param]
        if param == "messages":
            return param, [self._conversation(given)]
        if isinstance((several := listed(given))[0], list):
            return param, several
        for place, text in enumerate(several):
            self._require_plain(text, param if several is not given else f"{param}[{place}]")
        texts = [(text,) for text in several]
        return param, [ids_T.tolist() for ids_T, _ in self.tokenizer.encode_pairs(texts)]

    def _conversation(self, messages: Sequence[JsonObject]) -> list[int]:
        """Ids of a chat, as in training: up to where a language model is to answer or, for one that
        judges it, to the end of the assistant's last turn."""
        require(self.tokenizer.chat_template, "model", code="unsupported_task")
        turns = [{**message, "content": content_of(message)} for message in messages]
        for place, turn in enumerate(turns):
            self._require_plain(turn["content"], f"messages[{place}].content")
        try:
            if self.model.task == "lm":
                return chat.encode_prompt(turns, self.tokenizer).tolist()
            is_answered = turns[-1]["role"] == "assistant" and turns[-1]["content"].strip()
            require(is_answered, "messages", "must end with a text of the assistant's")
            (read,) = encode.sides([columns.Chat("", (*turns,))], self.tokenizer).documents
        except DataError as error:
            raise Refused("invalid_value", "messages", said=error) from None
        return read.tokens_T.tolist()

    def _note(self, x: Exchange, jobs: Sequence[Job], given: Sequence[Any]) -> None:
        """For the log figures of each text, and the text itself where that is asked for."""
        x.told["rows"] = [text_figures(job, self.tokenizer) for job in jobs]
        for row, text in zip(x.told["rows"], given if self.options.log_texts else (), strict=False):
            if isinstance(text[0], int):
                text = self.tokenizer.decode(text)
            row["input"] = redacted(text) if isinstance(text, str) else [
                {**m, "content": redacted(content_of(m))} for m in text]

    def _require_plain(self, text: str, param: str) -> None:
        """Refuse a text that no reading makes fit, that writes a special token, or is not seen."""
        said = f"{(size := len(text.encode()))} bytes are more than {self.context} tokens hold"
        require(size <= self.most_bytes, param, said, "context_length_exceeded")
        said = "writes a special token; write it differently, or send token ids"
        require(self.tokenizer.find_special(text) is None, param, said)
        require(text.strip("\ufeff") or not text, param, "holds byte-order marks alone")

    async def _scores(self, x: Exchange, fields: JsonObject) -> np.ndarray:
        """scores_BK, float64: what the model says of each text, or of a conversation."""
        param, several = await asyncio.to_thread(self._read, fields)
        self._require_room(several, param)
        jobs = [Job(ids, None) for ids in several]
        x.told["prompt_tokens"] = sum(map(len, several))
        await self._run(x, jobs, lambda *said: False)
        self._note(x, jobs, listed(fields[param]))
        return np.array([job.scores for job in jobs])

    def _listed(self, x: Exchange, kind: str, rows: Sequence[JsonObject]) -> JsonObject:
        usage = dict.fromkeys(("prompt_tokens", "total_tokens"), x.told["prompt_tokens"])
        return {"object": "list", "id": f"{kind}-{x.id}", "created": int(time.time()),
                "model": x.adapter or self.served.name, "usage": usage,
                "data": [{"object": kind, "index": i} | row for i, row in enumerate(rows)]}

    async def embed(self, x: Exchange, fields: JsonObject) -> JsonObject:
        require(self.model.task != "classify", "model", code="unsupported_task")
        vectors_BC = (await self._scores(x, fields)).astype(np.float32)[:, : fields["dimensions"]]
        vectors_BC /= np.linalg.norm(vectors_BC, axis=1, keepdims=True).clip(1e-12)
        told = vectors_BC.tolist() if fields["encoding_format"] == "float" else [
            base64.b64encode(vector_C).decode() for vector_C in vectors_BC]
        return self._listed(x, "embedding", [{"embedding": each} for each in told])

    async def classify(self, x: Exchange, fields: JsonObject) -> JsonObject:
        labels, problem = self.served.labels, self.served.problem
        is_able = self.model.task == "classify" and problem != "regression"
        require(is_able, "model", code="unsupported_task")
        logits_BK = await self._scores(x, fields)
        calibrated_BK = probs_of(logits_BK / self.served.temperature, problem)
        for row, probs_K in zip(x.told["rows"], calibrated_BK, strict=True):
            row |= class_figures(probs_K, labels)
        probs_BK = calibrated_BK if fields["calibrated"] else probs_of(logits_BK, problem)
        return self._listed(x, "classification", [
            {"label": labels[int(np.argmax(probs))], "probs": probs, "num_classes": len(labels)}
            for probs in probs_BK.tolist()])

    async def score(self, x: Exchange, fields: JsonObject) -> JsonObject:
        require(self.served.problem == "regression", "model", code="unsupported_task")
        told = {"score": (await self._scores(x, fields)).item()}  # of one conversation
        x.told["rows"][0] |= told
        return self._listed(x, "score", [told])

    async def feedback(self, x: Exchange, fields: JsonObject) -> JsonObject:
        """What an answer should have been; monitoring joins it with the request that it names."""
        given = {name: value for name, value in fields.items() if value is not None}
        id_, is_text = re.search("[0-9a-f]{24}$", fields["request_id"]), "text" in given
        require(id_, "request_id", "must be the id of an answer, or its X-Request-Id")
        require(("label" in given) != is_text, "label", "or text: give one of them")
        require(self.options.log_texts or not is_text, "text", "is not kept here (--log-texts)")
        given |= {"text": redacted(given["text"])} if is_text else {}
        x.told["feedback"] = given | {"request_id": id_[0]}
        return {"object": "feedback", "request_id": id_[0]}

    async def tokenize(self, x: Exchange, fields: JsonObject) -> JsonObject:
        _, (ids,) = await asyncio.to_thread(self._read, fields)
        return {"tokens": ids, "count": len(ids), "max_model_len": self.context}

    async def detokenize(self, x: Exchange, fields: JsonObject) -> JsonObject:
        decode = partial(self.tokenizer.decode, special=True)
        return {"prompt": await asyncio.to_thread(decode, fields["tokens"])}

    async def models(self, x: Exchange, fields: JsonObject) -> JsonObject:
        base, given = self.served.name, (word.split("=", 1) for word in self.options.adapter)
        more = [{"id": name, "root": root, "parent": base} for name, root in given]
        same = {"object": "model", "created": self.began, "owned_by": "ftcore"}
        return {"object": "list", "data": [card | same for card in ({"id": base}, *more)]}

    async def openapi(self, x: Exchange, fields: JsonObject) -> JsonObject:
        return openapi(self.numbers)

    async def monitored(self, x: Exchange, fields: JsonObject) -> JsonObject:
        """What monitoring says of the newest requests."""
        look, loop = partial(self.watch.look, self.journal.records), asyncio.get_running_loop()
        found = await loop.run_in_executor(self.looks, look)  # the other threads are for texts
        return {"model": self.served.version, "canaries": {**self.engine.canaries},
                "signals": [finding._asdict() for finding in found],
                "records": len(self.journal.records), "not_used": {**self.journal.counts}}

    async def metrics(self, x: Exchange, fields: JsonObject) -> None:
        more = {"told": await self.monitored(x, fields), "served": self.served, "now": time.time(),
                "age": time.monotonic() - self.engine.beat, "bytes": held_bytes(),
                "records": self.journal.records, "engine": self.engine, "build": version("ftcore")}
        told = await asyncio.to_thread(store.rendered, "metrics.txt", Path(__file__).parent, **more)
        told = generate_latest(self.meters.registry) + told.encode()
        x.reply(200, told, "text/plain; version=0.0.4; charset=utf-8")

    async def live(self, x: Exchange, fields: JsonObject) -> JsonObject:
        return {"status": "ok"}

    async def ready(self, x: Exchange, fields: JsonObject) -> JsonObject:
        is_late = time.monotonic() - self.engine.beat > LATE
        require(not (self.engine.is_broken or is_late), code="not_ready")
        return {"status": "ok"}

    async def probe(self, x: Exchange, fields: JsonObject) -> JsonObject:
        """A token, or one pass, by the way of all requests."""
        how = Sampling(1, temperature=0) if self.model.task == "lm" else None
        await self._run(x, [Job([0], how)], lambda *said: False)
        return {"status": "ok"}

def listed(given: str | list) -> list:
    """The texts that a field holds, or lists of ids, one or several; or its one conversation."""
    return [given] if isinstance(given, str) or isinstance(given[0], int | dict) else given

def content_of(message: JsonObject) -> str:
    parts = message["content"]
    return parts if isinstance(parts, str) else "".join(part["text"] for part in parts)
