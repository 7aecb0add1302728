"""A tiny random decoder, servers of it in processes of their own, and a client of raw sockets.

While a module attacks a server, a witness asks it the same question again and again. After the
last test five things must hold: the witness was always answered as at first (W1), nothing is left
in the cache (W2), every request was counted once (W3), the same process is ready (W4), and the log
has a line for each request and no text of any (W5).
"""

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
import numpy as np
import pytest
import tokenizers
import torch
import tyro
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import decoders, models, pre_tokenizers, trainers
import serve
from ftcore.config import ServeConfig
from ftcore.data.tokenizer import Tokenizer
from ftcore.deploy.api import Api, Served
from ftcore.deploy.engine import Engine
from ftcore.deploy.http import Exchange, Meters
from ftcore.model.load import load_model, save_model
from ftcore.monitor.drift import Watch
from ftcore.monitor.journal import Journal
from kernels.docs import Docs
from tests.data.templates import styles

ROOT = Path(__file__).parents[2]
CANARY = "CanaryText"  # in what is asked, never in a log
QWEN3 = {
    "model_type": "qwen3", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.5,
    "max_position_embeddings": 2048, "tie_word_embeddings": True, "eos_token_id": 1,
}  # fmt: skip
BERT = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.5}
QUICK = (
    *("--head-seconds", "2", "--body-seconds", "2", "--send-buffer-kib", "32"),
    *("--threads", "1", "--precision", "fp32", "--cache-tokens", "16384"),
)

@dataclass
class Answer:
    """What came back: of a stream `events` too, the last being [DONE] where it is whole."""
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> tuple[int, str, str | None]:
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return self.status, error["code"], error["param"]

    @property
    def events(self) -> list[Any]:
        parts = [p for p in self.body.decode().split("\n\n") if p.startswith("data: ")]
        return [p if p == "[DONE]" else json.loads(p) for p in (p[6:] for p in parts)]

def parsed(raw: bytes) -> Answer:
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    return Answer(int(first.split()[1]), dict(line.split(": ", 1) for line in lines), body)

@dataclass
class Client:
    """A server that runs, and how to speak to it."""
    process: subprocess.Popen
    port: int
    log: Path
    folder: Path
    key: str = ""
    printed: str = ""

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def raw(self, *parts: bytes) -> bytes:
        """Send bytes, return all that comes until the server closes."""
        with self.connect() as sock:
            for part in parts:
                sock.sendall(part)
            got = b""
            while some := sock.recv(65536):
                got += some
        return got

    def head(self, method: str, path: str, size: int | None, **headers: str) -> bytes:
        key = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        fields = {"Host": "localhost"} | key
        if size is not None:
            fields |= {"Content-Type": "application/json", "Content-Length": str(size)}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1")

    def request(self, path: str, body: Any, **headers: str) -> bytes:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.head("POST", path, len(raw), **headers) + raw

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return parsed(self.raw(self.request(path, body, **headers)))

    def get(self, path: str, **headers: str) -> Answer:
        return parsed(self.raw(self.head("GET", path, None, **headers)))

    def complete(self, **fields: Any) -> Answer:
        defaults = {"prompt": "one", "temperature": 0, "max_tokens": 8}
        return self.post("/v1/completions", defaults | fields)

    def chat(self, content: Any = "one", **fields: Any) -> Answer:
        messages = {"messages": [{"role": "user", "content": content}]}
        return self.post("/v1/chat/completions",
                         messages | {"temperature": 0, "max_tokens": 8} | fields)

    def metrics(self) -> dict[str, float]:
        """Sums over labels by name."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.get("/metrics").body.decode()):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    def idle(self, seconds: float = 20.0) -> dict[str, float]:
        """The figures once nothing runs any more."""
        until = time.monotonic() + seconds
        while (told := self.metrics())["ft_kv_cache_usage_ratio"] or told["ft_requests_waiting"]:
            assert time.monotonic() < until, told
            time.sleep(0.02)
        return told

@contextmanager
def serving(model: Path, folder: Path, *flags: str, optimised: bool = False) -> Iterator[Client]:
    """A server in a process of its own; killed at the end, if it still runs."""
    folder.mkdir(exist_ok=True)
    log = folder / "log.jsonl"
    words = [sys.executable, *(["-O"] if optimised else []), str(ROOT / "serve.py"), str(model)]
    words += ["--port", "0", "--log", str(log), *QUICK, *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
                   "CUDA_VISIBLE_DEVICES": ""}
    with open(folder / "stderr", "wb") as errors:
        process = subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.PIPE,
                                   stderr=errors, text=True)
    try:
        printed = ""
        while "serving" not in printed:
            line = process.stdout.readline()
            assert line, (folder / "stderr").read_text()
            printed += line
        client = Client(process, int(re.search(r"127.0.0.1:(\d+);", printed)[1]), log, folder)
        client.printed = printed + process.stdout.readline()
        yield client
    finally:
        process.kill()
        process.wait()
        process.stdout.close()

@contextmanager
def witnessed(client: Client) -> Iterator[Client]:
    """W1 to W5 of what happens within."""
    body = {"prompt": "witness", "max_tokens": 60, "temperature": 0, "ignore_eos": True,
            "stream": True}

    def witness() -> str:
        events = client.post("/v1/completions", body).events
        assert events[-1] == "[DONE]"
        return "".join(event["choices"][0]["text"] for event in events[:-1])

    alone, seen, is_over = witness(), [], threading.Event()
    before = client.idle()

    def watch() -> None:
        while not is_over.is_set():
            try:
                seen.append(witness())
            except Exception as error:
                seen.append(repr(error))
            is_over.wait(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield client
    finally:
        is_over.set()
        thread.join()
    assert set(seen) == {alone}  # W1
    told = client.idle()  # W2
    assert told["ft_kv_cache_usage_ratio"] == before["ft_kv_cache_usage_ratio"] == 0
    ended = told["ft_request_finished_total"] + told.get("ft_request_rejected_total", 0)
    assert told["ft_requests_received_total"] == ended + 1  # W3: and the one that asked
    assert client.get("/health/ready").status == 200 and client.process.poll() is None  # W4
    lines = [json.loads(line) for line in client.log.read_text().splitlines()]
    assert len(lines) == len({line["id"] for line in lines}) == ended + 2  # W5
    assert CANARY not in client.log.read_text() + (client.folder / "stderr").read_text()

class Asked:
    """Routes of a model, without a socket."""

    def __init__(self, path: str, flags: tuple[str, ...] = (), **more: Any) -> None:
        words = ["--precision", "fp32", "--threads", "1"]
        config = tyro.cli(ServeConfig, args=[*words, *flags])
        self.loaded, about = serve.opened(path, Path(path).name, config)
        self.model = self.loaded.model
        self.tokenizer = Tokenizer.load(self.loaded.folder)
        served = Served(**{"name": about["version"], "tokenizer": self.tokenizer} | about | more)
        self.engine = Engine(self.model, threads=1)
        self.api = Api(self.engine, served, config, Meters(), Journal(), Watch([]))

    def exchange(self, path: str, **body: Any) -> Exchange:
        """A request, answered; `body` is then the answer's."""
        async def ask() -> Exchange:
            self.api.start()
            x = Exchange(None, None)
            x.method, x.body = "POST", json.dumps(body).encode()
            try:
                x.body = await self.api.routes[path][1](x)
            finally:
                self.engine.is_stopping = True
                self.engine.news.set()
                await asyncio.to_thread(self.engine.thread.join)
                self.engine.is_stopping = False
            return x

        return asyncio.run(ask())

    def __call__(self, path: str, **body: Any) -> dict[str, Any]:
        return json.loads(self.exchange(path, **body).body)

    def noted(self, path: str, **body: Any) -> dict[str, Any]:
        """What the log says of it."""
        return self.exchange(path, **body).told

    def logits(self, text: str, *, special: bool = True) -> np.ndarray:
        ids = torch.tensor(self.tokenizer.encode(text, special=special).ids_T)
        docs, zeros = Docs.from_lengths([len(ids)], "cpu"), torch.zeros_like(ids)
        head = self.model.head
        with torch.inference_mode():
            h_MC = self.model.trunk(ids, docs.positions_N(), zeros, docs, rows_M=head.rows(docs))
            return head(h_MC, docs)[0].double().numpy()

@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: random weights, a byte-level tokenizer, a chat template."""
    folder = tmp_path_factory.mktemp("decoder")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(["the one and the other answer to a question"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    extra = {"eos_token": "<|im_end|>", "chat_template": styles()["chatml"].template,
             "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(extra), "utf-8")
    return filled(folder, {**QWEN3, "vocab_size": tokenizer.get_vocab_size()}, "lm")

def filled(folder: Path, config: dict[str, Any], task: str) -> Path:
    """Random weights for a config."""
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    loaded = load_model(folder, task=task, dtype=torch.float32, init="random",
                        generator=torch.Generator().manual_seed(0))
    save_model(loaded, folder)
    return folder

@pytest.fixture(scope="session")
def main(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A server without keys, of the decoder."""
    with serving(decoder, tmp_path_factory.mktemp("main")) as client:
        yield client

@pytest.fixture(scope="module")
def server(main: Client) -> Iterator[Client]:
    """The same, with the witness."""
    with witnessed(main) as client:
        yield client

@pytest.fixture(scope="session")
def keyed(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A small server with two keys, "alpha" and "beta", and Python without asserts."""
    folder = tmp_path_factory.mktemp("keyed")
    (folder / "keys").write_text("alpha\nbeta\n")
    flags = ("--api-key-file", "keys", "--max-sequences", "2", "--queue", "2")
    with serving(decoder, folder, *flags, optimised=True) as client:
        client.key = "alpha"
        yield client

Ask = Callable[[Client], Answer]

Make = Callable[..., Asked]

@pytest.fixture
def made(decoder: Path, tmp_path: Path) -> Make:
    """(config, task, ...) -> the routes of a random model with the decoder's tokenizer."""
    def make(config: dict[str, Any], task: str, **more: Any) -> Asked:
        folder = tmp_path / "model"
        folder.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(decoder / name, folder)
        filled(folder, {**config, "vocab_size": 300}, task)
        return Asked(str(folder), **more)

    return make
