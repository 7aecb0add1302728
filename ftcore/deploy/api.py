"""What the server answers: OpenAI's routes and a few of its own, over one engine.

A request is read and checked against fields.toml, its texts become tokens by the path of training,
and both happen in threads beside the event loop; then its jobs go to the engine. What the engine
says comes back once a step, and is handed to each request on the loop, where it becomes text.
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

from ftcore.config import ServeConfig
from ftcore.data.chat import encode_prompt
from ftcore.data.columns import Chat, RowError
from ftcore.data.pairs import sides
from ftcore.data.tokenizer import Tokenizer
from ftcore.deploy.answers import Answers, Service, Work
from ftcore.deploy.engine import Engine, Finish, Job, Scores
from ftcore.deploy.fields import Fields
from ftcore.deploy.http import Exchange, Handler, Refused
from ftcore.deploy.meters import Lines, Meters
from ftcore.errors import DataError
from ftcore.evaluate.evaluator import stops
from ftcore.model.sampling import Sampling, Token

LATE = 30.0  # seconds without a turn of the engine, after which it is not ready
ROUTES = {  # path -> method, coroutine of Api, what its body may hold
    "/v1/chat/completions": ("POST", "chat", "model messages chat sampling refused ignored"),
    "/v1/completions": ("POST", "complete", "model completion sampling refused ignored"),
    "/v1/embeddings": ("POST", "embed", "model input embedding ignored"),
    "/v1/classify": ("POST", "classify", "model input classify ignored"),
    "/v1/score": ("POST", "score", "model messages ignored"),
    "/v1/feedback": ("POST", "keep_feedback", "feedback"),
    "/tokenize": ("POST", "tokenize", "model prompt messages"),
    "/detokenize": ("POST", "detokenize", "model tokens"),
    "/v1/models": ("GET", "models", ""), "/info": ("GET", "info", ""),
    "/openapi.json": ("GET", "openapi", ""), "/metrics": ("GET", "metrics", ""),
    "/health": ("GET", "ready", ""), "/health/ready": ("GET", "ready", ""),
    "/health/live": ("GET", "live", ""), "/health/generate": ("GET", "try_out", "")}

@dataclass(frozen=True)
class Served:
    """What is served."""
    name: str  # of the model that answers where a request names none
    models: Mapping[str, str | None]  # every name -> adapter of the engine; None: the base
    tokenizer: Tokenizer
    labels: tuple[str, ...] = ()  # of a classifier's outputs
    problem: str | None = None  # HF's `problem_type` of a classifier; "regression": a score
    temperature: float = 1.0  # by which a classifier is calibrated
    fingerprint: str = ""  # hash of weights and adapters

class Api:
    """The routes, for `http.Server`. `shapes` says how many positions and numbers the model has:
    context, last_id, width."""

    def __init__(self, engine: Engine, served: Served, options: ServeConfig,
                 shapes: Mapping[str, int]) -> None:
        self.engine, self.served, self.options = engine, served, options
        self.context, self.is_draining, self.began = shapes["context"], False, int(time.time())
        build = {"version": version("ftcore"), "model_hash": served.fingerprint}
        self.meters = Meters(engine, build)
        self.service = Service(engine, served.tokenizer, options, self.meters, served.fingerprint)
        self.feedback = Lines(options.feedback, self.meters.lost)
        self.pool = ThreadPoolExecutor(2, thread_name_prefix="text")
        flags = vars(options)
        self.fields = {path: Fields(groups, {**flags, **shapes}, flags)
                       for path, (_, _, groups) in ROUTES.items()}
        self.routes = {path: {method: partial(self._answer, getattr(self, name), path)}
                       for path, (method, name, _) in ROUTES.items()}
        vocabulary = range(served.tokenizer.vocab_size)
        longest = max(len(served.tokenizer.bytes_of(id_)) for id_ in vocabulary)
        self.most_bytes = longest * self.context  # of a text that may fit

    @property
    def is_broken(self) -> bool:
        return self.engine.is_broken

    def start(self) -> None:
        """Let the engine work, and what it says come to the requests; on the event loop."""
        loop = asyncio.get_running_loop()

        def hand_out(said: Sequence[tuple[Job, Token | Scores | Finish]]) -> None:
            for job, word in said:
                job.listener(job, word)

        self.engine.start(partial(loop.call_soon_threadsafe, hand_out))

    async def _answer(self, handler: Handler, path: str, x: Exchange) -> bytes | None:
        fields = await self._aside(self.fields[path].read, x.body) if x.method == "POST" else {}
        if (name := fields.get("model")) is not None and name not in self.served.models:
            said = f"{ascii(name[:64])}: no such model; GET /v1/models lists them"
            raise Refused("model_not_found", said, "model")
        if "model" in fields:
            x.told["model"] = fields["model"] = name or self.served.name
        answer = await handler(x, fields)
        return None if answer is None else json.dumps(answer).encode()

    async def _aside(self, work: Callable, *inputs: Any) -> Any:
        """A call in a thread beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, work, *inputs)

    async def chat(self, x: Exchange, fields: dict[str, Any]) -> dict | None:
        if fields["top_logprobs"] is not None and not fields["logprobs"]:
            raise Refused("invalid_value", "top_logprobs: needs logprobs: true", "top_logprobs")
        asked = {fields[name] for name in ("max_tokens", "max_completion_tokens")} - {None}
        if len(asked) > 1:
            said = "max_tokens: differs from max_completion_tokens, its other name"
            raise Refused("invalid_value", said, "max_tokens")
        num_top = (fields["top_logprobs"] or 0) if fields["logprobs"] else None
        return await self._generate(x, fields, next(iter(asked), None), num_top)

    async def complete(self, x: Exchange, fields: dict[str, Any]) -> dict | None:
        return await self._generate(x, fields, fields["max_tokens"], fields["logprobs"])

    async def _generate(self, x: Exchange, fields: dict[str, Any], most: int | None,
                        num_top: int | None) -> dict | None:
        if self.served.labels or self.engine.model.task != "lm":
            raise Refused("unsupported_task", "this model does not write text", "model")
        read = await self._aside(self._prompts, fields)
        count, param = fields["n"], "messages" if "messages" in fields else "prompt"
        if count * len(read) > self.options.prompts:
            said = f"n: times the prompts must be <= {self.options.prompts} (--prompts)"
            raise Refused("too_many_sequences", said, "n")
        longest = max(len(ids) for _, ids in read)
        wanted = most or max(1, self.context - longest)
        if longest + wanted > self.context:
            said = f"{param}: {longest} tokens and {wanted} of an answer are more than the"
            said = f"{said} {self.context} of the context"
            raise Refused("context_length_exceeded", said, param)
        if fields["min_tokens"] > wanted:
            raise Refused("invalid_value", f"min_tokens: must be <= {wanted}", "min_tokens")
        ends = frozenset() if fields["ignore_eos"] else stops(self.served.tokenizer)
        same = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                "frequency_penalty")
        seed = secrets.randbits(62) if fields["seed"] is None else fields["seed"]
        echoes = fields.get("echo", False)
        sampling = Sampling(
            max_new_tokens=wanted, min_new_tokens=fields["min_tokens"], stop_ids=ends,
            logit_bias=fields["logit_bias"] or {}, num_top=num_top,
            prompt_logprobs=echoes and num_top is not None, **{name: fields[name] for name in same})
        adapter, jobs, texts = self.served.models[fields["model"]], [], []
        for text, ids in read:
            for _ in range(count):
                own = replace(sampling, seed=(seed + len(jobs)) % 2**63)
                jobs.append(Job(ids, own, adapter))
                texts.append(text if echoes and num_top is None else "")
        return await Answers(self.service, x, jobs, fields, texts).answer()

    def _prompts(self, fields: Mapping[str, Any]) -> list[tuple[str, list[int]]]:
        """Each prompt as text, and as ids; in a thread."""
        messages, prompt = fields.get("messages"), fields.get("prompt")
        tokenizer = self.served.tokenizer
        if messages:
            turns = self._turns(messages)
            try:
                return [("", encode_prompt(turns, tokenizer).tolist())]
            except RowError as error:
                raise Refused("invalid_value", f"messages: {error}", "messages") from None
        if prompt is None:
            name = "messages" if "messages" in fields else "prompt"
            raise Refused("invalid_value", f"{name}: must be given", name)
        several = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
        is_one, found = several is not prompt, []
        for place, each in enumerate(several):
            param = "prompt" if is_one else f"prompt[{place}]"
            if isinstance(each, str):
                self._require_plain(each, param)
                found.append((each, tokenizer.encode(each).ids_T.tolist()))
            else:
                found.append((tokenizer.decode(each, special=True), each))
        return found

    def _turns(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
        """Messages with their texts as one string."""
        if self.served.tokenizer.chat_template is None:
            raise Refused("unsupported_task", "this model has no chat template", "messages")
        turns = []
        for place, message in enumerate(messages):
            content, param = message["content"], f"messages[{place}].content"
            if isinstance(content, list):
                content = "".join(part["text"] for part in content)
            self._require_plain(content, param)
            turns.append({"role": message["role"], "content": content})
        return turns

    def _require_plain(self, text: str, param: str) -> None:
        """Refuse a text that is too long for any reading, writes a special token, or shows none."""
        if (size := len(text.encode())) > self.most_bytes:
            said = f"{param}: {size} bytes do not fit into {self.context} tokens"
            raise Refused("context_length_exceeded", said, param)
        if self.served.tokenizer.find_special(text) is not None:
            said = f"{param}: writes a special token; write it differently, or send token ids"
            raise Refused("invalid_value", said, param)
        if text and not text.strip("\ufeff"):
            raise Refused("invalid_value", f"{param}: must hold more than byte-order marks", param)

    async def _judged(self, x: Exchange, fields: Mapping[str, Any], *,
                      encode: Callable) -> tuple[list[list[float]], dict[str, int]]:
        """What the model says of texts, and the usage."""
        several = await self._aside(encode, fields)
        for ids in several:
            if len(ids) > self.context:
                said = f"input: {len(ids)} tokens are more than the {self.context} of the context"
                raise Refused("context_length_exceeded", said, "input")
        adapter = self.served.models[fields["model"]]
        values = await Work(self.service, x, [Job(ids, None, adapter) for ids in several]).run()
        count = sum(map(len, several))
        x.told["prompt_tokens"] = count
        self.meters.generated(count, 0)
        return values, {"prompt_tokens": count, "total_tokens": count}

    def _texts(self, fields: Mapping[str, Any]) -> list[list[int]]:
        given = fields["input"]
        texts = [given] if isinstance(given, str) else given
        for text in texts:
            self._require_plain(text, "input")
        read = self.served.tokenizer.encode_pairs([(text,) for text in texts])
        return [ids_T.tolist() for ids_T, _ in read]

    async def embed(self, x: Exchange, fields: dict[str, Any]) -> dict:
        if self.served.labels:
            raise Refused("unsupported_task", "this model judges texts; see /info", "model")
        values, usage = await self._judged(x, fields, encode=self._texts)
        vectors_BC = np.array(values, dtype=np.float32)[:, : fields["dimensions"]]
        vectors_BC /= np.linalg.norm(vectors_BC, axis=1, keepdims=True).clip(1e-12)
        told = [base64.b64encode(vector_C.tobytes()).decode() for vector_C in vectors_BC]
        told = told if fields["encoding_format"] == "base64" else vectors_BC.tolist()
        data = [{"object": "embedding", "index": i, "embedding": e} for i, e in enumerate(told)]
        return {"object": "list", "data": data, "model": fields["model"], "usage": usage}

    async def classify(self, x: Exchange, fields: dict[str, Any]) -> dict:
        labels, data = self.served.labels, []
        if not labels or self.served.problem == "regression":
            raise Refused("unsupported_task", "this model has no classes; see /info", "model")
        values, usage = await self._judged(x, fields, encode=self._texts)
        logits_BK = np.array(values) / (self.served.temperature if fields["calibrated"] else 1.0)
        if self.served.problem == "multi_label_classification":
            probs_BK = 1 / (1 + np.exp(-logits_BK))
        else:
            probs_BK = np.exp(logits_BK - logits_BK.max(1, keepdims=True))
            probs_BK /= probs_BK.sum(1, keepdims=True)
        for index, probs in enumerate(probs_BK.tolist()):
            data.append({"index": index, "label": labels[int(np.argmax(probs))], "probs": probs,
                         "num_classes": len(labels)})
        return {"object": "list", "id": f"classify-{x.id}", "created": int(time.time()),
                "data": data, "model": fields["model"], "usage": usage}

    async def score(self, x: Exchange, fields: dict[str, Any]) -> dict:
        if self.served.problem != "regression":
            raise Refused("unsupported_task", "this model gives no scores; see /info", "model")
        values, usage = await self._judged(x, fields, encode=self._conversation)
        data = [{"index": 0, "object": "score", "score": values[0][0]}]
        return {"object": "list", "id": f"score-{x.id}", "created": int(time.time()),
                "data": data, "model": fields["model"], "usage": usage}

    def _conversation(self, fields: Mapping[str, Any]) -> list[list[int]]:
        """Ids of a conversation up to the end of its last turn, as in training."""
        if not (messages := fields["messages"]) or messages[-1]["role"] != "assistant":
            raise Refused("invalid_value", "messages: must end with the assistant's", "messages")
        try:
            read, _ = sides([Chat("", tuple(self._turns(messages)))], self.served.tokenizer)
        except DataError:
            read = {}
        if not read or read[""][1].any():
            said = "messages: the last turn holds no text, or is read as a pair of texts"
            raise Refused("invalid_value", said, "messages")
        return [read[""][0].tolist()]

    async def keep_feedback(self, x: Exchange, fields: dict[str, Any]) -> dict:
        if (fields["label"] is None) == (fields["score"] is None):
            raise Refused("invalid_value", "label: give it or score, one of them", "label")
        if not self.feedback.write({"time": round(time.time(), 3), "key": x.owner[:8], **fields}):
            raise Refused("not_kept", "the feedback cannot be written; try again later")
        return {"id": fields["id"], "kept": True}

    async def tokenize(self, x: Exchange, fields: dict[str, Any]) -> dict:
        ((_, ids),) = await self._aside(self._prompts, fields)
        return {"tokens": ids, "count": len(ids), "max_model_len": self.context}

    async def detokenize(self, x: Exchange, fields: dict[str, Any]) -> dict:
        decode = partial(self.served.tokenizer.decode, special=True)
        return {"prompt": await self._aside(decode, fields["tokens"])}

    async def models(self, x: Exchange, fields: dict[str, Any]) -> dict:
        base = next(name for name, adapter in self.served.models.items() if adapter is None)
        return {"object": "list", "data": [
            {"id": name, "object": "model", "created": self.began, "owned_by": "ftcore",
             "root": base, "parent": None if adapter is None else base}
            for name, adapter in self.served.models.items()]}

    async def info(self, x: Exchange, fields: dict[str, Any]) -> dict:
        served, model = self.served, self.engine.model
        pooling = "last token" if model.spec.is_causal else "mean of all tokens"
        return {"version": version("ftcore"), "fingerprint": served.fingerprint,
                "models": [*served.models], "task": model.task, "labels": served.labels,
                "problem": served.problem, "context": self.context, "max_bytes": self.most_bytes,
                "embedding": f"{pooling}, of length 1", "chat": bool(served.tokenizer.chat_template)}

    async def openapi(self, x: Exchange, fields: dict[str, Any]) -> dict:
        paths = {}
        for path, (method, name, _) in ROUTES.items():
            told = {"operationId": name, "responses": {"200": {"description": "the answer"},
                                                       "4XX": {"description": "an error object"}}}
            if method == "POST":
                schema = {"schema": self.fields[path].schema()}
                told["requestBody"] = {"content": {"application/json": schema}}
            paths[path] = {method.lower(): told}
        about = {"title": "ftcore", "version": version("ftcore")}
        return {"openapi": "3.1.0", "info": about, "paths": paths}

    async def metrics(self, x: Exchange, fields: dict[str, Any]) -> None:
        x.reply(200, self.meters.text(), "text/plain; version=0.0.4; charset=utf-8")

    async def live(self, x: Exchange, fields: dict[str, Any]) -> dict:
        return {"status": "ok"}

    async def ready(self, x: Exchange, fields: dict[str, Any]) -> dict:
        if self.is_draining:
            raise Refused("draining", "the server is stopping")
        if self.engine.is_broken or time.monotonic() - self.engine.beat > LATE:
            raise Refused("not_ready", "the engine does not work")
        return {"status": "ok"}

    async def try_out(self, x: Exchange, fields: dict[str, Any]) -> dict:
        is_lm = self.engine.model.task == "lm"
        await Work(self.service, x, [Job([0], Sampling(1) if is_lm else None)]).run()
        return await self.ready(x, fields)
