"""The routes: OpenAI's and a few of its own, over one engine.

A body is read and checked by fields.toml, its texts become tokens by the path of training, both in
threads beside the event loop; then its jobs go to the engine. What that says comes back once a step
and is handed to each request on the loop.
"""

import asyncio
import base64
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np

from ftcore.data.chat import encode_prompt
from ftcore.data.columns import Chat
from ftcore.data.pairs import sides
from ftcore.data.tokenizer import Tokenizer
from ftcore.deploy.answers import Answers, Service, Work
from ftcore.deploy.engine import Engine, Job, Said
from ftcore.deploy.fields import TABLE, Fields, shown
from ftcore.deploy.http import Exchange, Refused
from ftcore.deploy.meters import Lines, Meters
from ftcore.deploy.options import ServeConfig
from ftcore.errors import DataError
from ftcore.evaluate.evaluator import stops
from kernels.sampling import Sampling

LATE = 30.0  # seconds without a turn of the engine, after which it is not ready
ROUTES = TABLE["routes"]
JsonObject = dict[str, Any]

@dataclass(frozen=True)
class Served:
    """What is served."""
    models: Mapping[str, str | None]  # names -> adapter of the engine; the first is the default
    tokenizer: Tokenizer
    labels: tuple[str, ...] = ()  # of a classifier's outputs
    problem: str | None = None  # HF's `problem_type` of a classifier; "regression": scores
    temperature: float = 1.0  # by which a classifier is calibrated
    fingerprint: str = ""  # hash of weights and adapters

class Api:
    """The routes, for `http.Server`; `start` once the event loop runs."""

    def __init__(self, engine: Engine, served: Served, options: ServeConfig) -> None:
        self.engine, self.served, self.options = engine, served, options
        self.model, self.tokenizer = engine.model, served.tokenizer
        build = {"version": version("ftcore"), "model_hash": served.fingerprint}
        self.meters = meters = Meters(engine, build)
        self.service = Service(engine, self.tokenizer, options, meters, served.fingerprint)
        self.feedback = Lines(options.feedback, meters)
        self.pool, self.began = ThreadPoolExecutor(2), int(time.time())
        spec, flags = self.model.spec, vars(options)
        self.context = min(spec.max_positions, engine.cache_tokens)
        numbers = {**flags, "context": self.context, "last_id": spec.vocab_size - 1,
                   "width": spec.hidden_size}
        self.fields = {path: Fields(groups, numbers, flags)
                       for path, (_, groups) in ROUTES.items()}
        self.routes = {path: {"POST" if groups else "GET": partial(self._answer, name, path)}
                       for path, (name, groups) in ROUTES.items()}
        sizes = map(len, map(self.tokenizer.bytes_of, range(self.tokenizer.vocab_size)))
        self.most_bytes = self.context * max(sizes)  # of a text that may fit

    def start(self) -> None:
        """Let the engine work, and hand out what it says."""
        def hand_out(said: Said) -> None:
            for job, word in said:
                job.listener(job, word)

        self.engine.start(partial(asyncio.get_running_loop().call_soon_threadsafe, hand_out))

    async def _answer(self, name: str, path: str, x: Exchange) -> bytes | None:
        fields = await self._aside(self.fields[path].read, x.body) if x.method == "POST" else {}
        if "model" in fields:
            asked = next(iter(self.served.models)) if fields["model"] is None else fields["model"]
            if asked not in self.served.models:
                said = f"{shown(asked)!r}: no such model; GET /v1/models lists them"
                raise Refused("model_not_found", said, "model")
            x.told["model"] = fields["model"] = asked
        answer = await getattr(self, name)(x, fields)
        return None if answer is None else json.dumps(answer).encode()

    async def _aside(self, work: Callable, *inputs: Any) -> Any:
        """A call in a thread beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, work, *inputs)

    def _require(self, holds: bool) -> None:
        if not holds:
            raise Refused("unsupported_task", "this model does something else: see /info", "model")

    async def generate(self, x: Exchange, fields: JsonObject) -> JsonObject | None:
        self._require(self.model.task == "lm")
        asked = {fields["max_tokens"], fields.get("max_completion_tokens")} - {None}
        num_top, is_chat = fields["logprobs"], "messages" in fields
        if len(asked) > 1:
            said = "max_tokens: differs from max_completion_tokens, its other name"
            raise Refused("invalid_value", said, "max_tokens")
        if is_chat and fields["top_logprobs"] is not None and not num_top:
            raise Refused("invalid_value", "top_logprobs: needs logprobs: true", "top_logprobs")
        if is_chat:
            num_top = (fields["top_logprobs"] or 0) if num_top else None
        read, count = await self._aside(self._prompts, fields), fields["n"]
        if count * len(read) > self.options.prompts:
            said = f"n: times the prompts must be <= {self.options.prompts} (--prompts)"
            raise Refused("too_many_sequences", said, "n")
        longest = max(len(ids) for _, ids in read)
        most = next(iter(asked), max(1, self.context - longest))
        self._require_room(longest, "messages" if is_chat else "prompt", most)
        if fields["min_tokens"] > most:
            raise Refused("invalid_value", f"min_tokens: must be <= {most}", "min_tokens")
        if (echoes := fields.get("echo", False)) and num_top is not None:
            said = "echo: log-probabilities of a prompt are not told; leave logprobs out"
            raise Refused("unsupported_parameter", said, "echo")
        seed = secrets.randbits(62) if fields["seed"] is None else fields["seed"]
        same = {name: fields[name] for name in fields if name in Sampling.__dataclass_fields__}
        sampling = Sampling(
            **same, max_new_tokens=most, min_new_tokens=fields["min_tokens"], num_top=num_top,
            stop_ids=frozenset() if fields["ignore_eos"] else stops(self.tokenizer))
        each = [(text, ids) for text, ids in read for _ in range(count)]
        jobs = [Job(ids, replace(sampling, seed=(seed + place) % 2**63))
                for place, (_, ids) in enumerate(each)]
        texts = [text if echoes else "" for text, _ in each]
        return await Answers(self.service, x, jobs, fields, texts).answer()

    def _require_room(self, count: int, param: str, most: int = 0) -> None:
        if count + most > self.context:
            said = f"{param}: {count} tokens, and {most} of an answer, are more than the context's"
            raise Refused("context_length_exceeded", f"{said} {self.context}", param)

    def _prompts(self, fields: JsonObject) -> list[tuple[str, list[int]]]:
        """Each prompt as text, and as ids; in a thread."""
        messages, prompt = fields.get("messages"), fields.get("prompt")
        if messages:
            try:
                return [("", encode_prompt(self._turns(messages), self.tokenizer).tolist())]
            except DataError as error:
                raise Refused("invalid_value", f"messages: {error}", "messages") from None
        if prompt is None:
            name = "messages" if "messages" in fields else "prompt"
            raise Refused("invalid_value", f"{name}: must be given", name)
        is_one, found = isinstance(prompt, str) or isinstance(prompt[0], int), []
        for place, each in enumerate([prompt] if is_one else prompt):
            if isinstance(each, str):
                self._require_plain(each, "prompt" if is_one else f"prompt[{place}]")
                found.append((each, self.tokenizer.encode(each).ids_T.tolist()))
            else:
                found.append((self.tokenizer.decode(each, special=True), each))
        return found

    def _turns(self, messages: Sequence[JsonObject]) -> list[dict[str, str]]:
        """Messages with their texts as one string."""
        self._require(self.tokenizer.chat_template is not None)
        turns = []
        for place, message in enumerate(messages):
            if isinstance(content := message["content"], list):
                content = "".join(part["text"] for part in content)
            self._require_plain(content, f"messages[{place}].content")
            turns.append({"role": message["role"], "content": content})
        return turns

    def _require_plain(self, text: str, param: str) -> None:
        """Refuse a text that no reading makes fit, that writes a special token, or is not seen."""
        if (size := len(text.encode())) > self.most_bytes:
            said = f"{param}: {size} bytes are more than {self.context} tokens, the context, hold"
            raise Refused("context_length_exceeded", said, param)
        if self.tokenizer.find_special(text) is not None:
            said = f"{param}: writes a special token; write it differently, or send token ids"
            raise Refused("invalid_value", said, param)
        if text and not text.strip("\ufeff"):
            raise Refused("invalid_value", f"{param}: holds byte-order marks alone", param)

    async def _judged(self, x: Exchange, fields: JsonObject, encode: Callable, kind: str,
                      tell: Callable[[list[list[float]]], list[JsonObject]]) -> JsonObject:
        """What the model says of texts, told as `data`."""
        several = await self._aside(encode, fields)
        self._require_room(max(map(len, several)), "input" if "input" in fields else "messages")
        values = await Work(self.service, x, [Job(ids, None) for ids in several]).run()
        count = x.told["prompt_tokens"] = sum(map(len, several))
        self.meters.generated(count, 0)
        return {"object": "list", "id": f"{kind}-{x.id}", "created": int(time.time()),
                "model": fields["model"], "usage": {"prompt_tokens": count, "total_tokens": count},
                "data": [{"object": kind, "index": i} | one for i, one in enumerate(tell(values))]}

    def _texts(self, fields: JsonObject) -> list[list[int]]:
        texts = [given] if isinstance(given := fields["input"], str) else given
        for text in texts:
            self._require_plain(text, "input")
        return [ids_T.tolist() for ids_T, _ in self.tokenizer.encode_pairs([(t,) for t in texts])]

    def _conversation(self, fields: JsonObject) -> list[list[int]]:
        """A conversation up to the end of its last turn, as in training."""
        read, messages = {}, fields["messages"] or []
        if messages and messages[-1]["role"] == "assistant" and messages[-1]["content"]:
            try:
                read, _ = sides([Chat("", tuple(self._turns(messages)))], self.tokenizer)
            except DataError:
                read = {}
        if not read or read[""][1].any():
            said = "messages: must end with a text of the assistant's, and be read as one"
            raise Refused("invalid_value", said, "messages")
        return [read[""][0].tolist()]

    async def embed(self, x: Exchange, fields: JsonObject) -> JsonObject:
        self._require(self.model.task != "classify")

        def tell(values: list[list[float]]) -> list[JsonObject]:
            vectors_BC = np.array(values, dtype=np.float32)[:, : fields["dimensions"]]
            vectors_BC /= np.linalg.norm(vectors_BC, axis=1, keepdims=True).clip(1e-12)
            told = vectors_BC.tolist() if fields["encoding_format"] == "float" else [
                base64.b64encode(vector_C).decode() for vector_C in vectors_BC]
            return [{"embedding": each} for each in told]

        return await self._judged(x, fields, self._texts, "embedding", tell)

    async def classify(self, x: Exchange, fields: JsonObject) -> JsonObject:
        labels, problem = self.served.labels, self.served.problem
        self._require(bool(labels) and problem != "regression")

        def tell(values: list[list[float]]) -> list[JsonObject]:
            logits_BK = np.array(values) / (self.served.temperature if fields["calibrated"] else 1)
            odds_BK = np.exp(logits_BK - logits_BK.max(1, keepdims=True))
            probs_BK = (1 / (1 + np.exp(-logits_BK)) if problem == "multi_label_classification"
                        else odds_BK / odds_BK.sum(1, keepdims=True))
            return [{"label": labels[int(np.argmax(probs))], "probs": probs,
                     "num_classes": len(labels)} for probs in probs_BK.tolist()]

        return await self._judged(x, fields, self._texts, "classification", tell)

    async def score(self, x: Exchange, fields: JsonObject) -> JsonObject:
        self._require(self.served.problem == "regression")
        return await self._judged(x, fields, self._conversation, "score",
                                  lambda values: [{"score": score} for score, in values])

    async def keep_feedback(self, x: Exchange, fields: JsonObject) -> JsonObject:
        if (fields["label"] is None) == (fields["score"] is None):
            raise Refused("invalid_value", "label: give it or score, one of them", "label")
        if not self.feedback.write({"time": round(time.time(), 3), "key": x.owner[:8], **fields}):
            raise Refused("not_kept", "the feedback cannot be written; try again later")
        return {"id": fields["id"], "kept": True}

    async def tokenize(self, x: Exchange, fields: JsonObject) -> JsonObject:
        ((_, ids),) = await self._aside(self._prompts, fields)
        return {"tokens": ids, "count": len(ids), "max_model_len": self.context}

    async def detokenize(self, x: Exchange, fields: JsonObject) -> JsonObject:
        decode = partial(self.tokenizer.decode, special=True)
        return {"prompt": await self._aside(decode, fields["tokens"])}

    async def models(self, x: Exchange, fields: JsonObject) -> JsonObject:
        adapters = self.served.models
        base = next((name for name in adapters if adapters[name] is None), None)
        same = {"object": "model", "created": self.began, "owned_by": "ftcore", "root": base}
        return {"object": "list", "data": [
            {"id": name, **same, "parent": base if name != base else None} for name in adapters]}

    async def info(self, x: Exchange, fields: JsonObject) -> JsonObject:
        served, is_causal = self.served, self.model.spec.is_causal
        pooling = "last token" if is_causal else "mean of all tokens"
        return {"version": version("ftcore"), "fingerprint": served.fingerprint,
                "models": [*served.models], "task": self.model.task, "labels": served.labels,
                "problem": served.problem, "context": self.context,
                "embedding": f"{pooling}, of length 1", "chat": bool(self.tokenizer.chat_template)}

    async def openapi(self, x: Exchange, fields: JsonObject) -> JsonObject:
        paths, answers = {}, {"default": {"description": "an answer, or an error object"}}
        for path, fields_of in self.fields.items():
            schema = {"application/json": {"schema": fields_of.schema(fields_of.rule)}}
            body = {"requestBody": {"content": schema}} if ROUTES[path][1] else {}
            paths[path] = {"post" if body else "get": {"responses": answers, **body}}
        about = {"title": "ftcore", "version": version("ftcore")}
        return {"openapi": "3.1.0", "info": about, "paths": paths}

    async def metrics(self, x: Exchange, fields: JsonObject) -> None:
        x.reply(200, self.meters.text(), "text/plain; version=0.0.4; charset=utf-8")

    async def live(self, x: Exchange, fields: JsonObject) -> JsonObject:
        return {"status": "ok"}

    async def ready(self, x: Exchange, fields: JsonObject) -> JsonObject:
        if self.engine.is_broken or time.monotonic() - self.engine.beat > LATE:
            raise Refused("not_ready", "the engine does not work")
        return {"status": "ok"}

    async def try_out(self, x: Exchange, fields: JsonObject) -> JsonObject:
        sampling = Sampling(1) if self.model.task == "lm" else None
        await Work(self.service, x, [Job([0], sampling)]).run()
        return await self.ready(x, fields)
