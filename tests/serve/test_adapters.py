"""Adapters that requests choose among, over HTTP: who answers, and what is told of it."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
import pytest
import torch
import serve
from ftcore.config import PeftConfig
from ftcore.data.chat import encode_prompt
from ftcore.data.tokenizer import Tokenizer
from ftcore.evaluate.evaluator import continued, spoken
from ftcore.model.load import load_model
from ftcore.tune.adapter import load_adapter, save_adapter
from ftcore.tune.lora import apply_lora
from tests.serve.conftest import Client, filled, serving
from tests.tune.test_adapter import tune

NAMES = ("live", "one", "two.b")  # the base, by its link, and the adapters
TURNS = [{"role": "user", "content": "the other question"}]

def trained(base: Path, folder: Path, seed: int) -> Path:
    """An adapter of other values for each seed."""
    loaded = load_model(base, task="lm", dtype=torch.float32)
    config = PeftConfig(rank=2, alpha=2.0 + seed)
    apply_lora(loaded.model, config, generator=torch.Generator().manual_seed(seed))
    tune(loaded.model)
    save_adapter(loaded.model, folder, family=loaded.family, base_path=str(base))
    return folder

@pytest.fixture
def says(decoder: Path) -> Callable[[Path | None, int], str]:
    """(adapter, tokens) -> what the model says alone."""
    def say(folder: Path | None, count: int) -> str:
        loaded = load_model(decoder, task="lm", dtype=torch.float32)
        tokenizer = Tokenizer.load(decoder)
        if folder:
            load_adapter(loaded.model, folder, family=loaded.family)
        asked = [encode_prompt(TURNS, tokenizer)]
        return spoken(continued(loaded.model.eval(), tokenizer, asked, count)[0], tokenizer)

    return say

@pytest.fixture
def adapted(decoder: Path, tmp_path: Path) -> Iterator[Client]:
    """A server of a link to the decoder, with two adapters."""
    words = []
    for seed, name in enumerate(NAMES[1:]):
        words += ["--adapter", f"{name}={trained(decoder, tmp_path / f'adapter-{seed}', seed)}"]
    (tmp_path / "live").symlink_to(decoder)
    with serving(tmp_path / "live", tmp_path / "server", *words) as client:
        yield client

def test_each_request_is_answered_by_the_model_it_names(
    adapted: Client, main: Client, decoder: Path, tmp_path: Path, says: Callable
) -> None:
    openai = pytest.importorskip("openai")
    folders = [None, tmp_path / "adapter-0", tmp_path / "adapter-1"]
    want = dict(zip(NAMES, [says(folder, 40) for folder in folders], strict=True))
    assert len({*want.values()}) == 3
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{adapted.port}/v1", api_key="none",
                           max_retries=0)

    def chat(name: str) -> Any:
        return client.chat.completions.create(model=name, messages=TURNS, temperature=0,
                                              max_completion_tokens=40)

    with ThreadPoolExecutor(12) as pool:
        answers = [*pool.map(chat, NAMES * 8)]
    for name, answer in zip(NAMES * 8, answers, strict=True):
        assert (answer.model, answer.choices[0].message.content) == (name, want[name])
    prints = {answer.model: answer.system_fingerprint for answer in answers}
    assert len({*prints.values()}) == 3
    assert prints["live"] == main.complete().json["system_fingerprint"]
    with pytest.raises(openai.NotFoundError, match="no such model"):
        chat("two")
    streamed = adapted.chat(TURNS[0]["content"], model="one", max_tokens=40, stream=True).events
    assert {event["model"] for event in streamed[:-1]} == {"one"}
    said = "".join(e["choices"][0]["delta"].get("content", "") for e in streamed[:-1])
    assert said == want["one"]
    vectors = {}
    for name in NAMES:
        told = client.embeddings.create(model=name, input="one")
        assert told.model == name
        vectors[name] = (*told.data[0].embedding,)
    assert len({*vectors.values()}) == 3
    lines = [json.loads(line) for line in adapted.log.read_text().splitlines()]
    by_id = {line["id"]: line["model"] for line in lines if "model" in line}
    for answer in answers:
        version = decoder.name if answer.model == "live" else answer.model
        assert by_id[answer.id.removeprefix("chatcmpl-")] == version

def test_the_list_has_the_base_and_every_adapter(adapted: Client, tmp_path: Path) -> None:
    base, *others = adapted.get("/v1/models").json["data"]
    assert {*base} == {"id", "object", "created", "owned_by"} and base["id"] == "live"
    assert others == [base | {"id": name, "parent": "live", "root": str(tmp_path / f"adapter-{i}")}
                      for i, name in enumerate(NAMES[1:])]

def test_an_echo_is_of_the_adapter_too(adapted: Client) -> None:
    asked = {"prompt": "the other question", "max_tokens": 2, "echo": True, "logprobs": 0}
    told = {tuple(adapted.complete(model=name, **asked).json["choices"][0]["logprobs"][
        "token_logprobs"][1:]) for name in NAMES}
    assert len(told) == 3

def test_what_follows_a_link_reads_its_adapters_anew(
    adapted: Client, decoder: Path, tmp_path: Path, says: Callable
) -> None:
    def name(folder: Path) -> str:
        (tmp_path / "next").symlink_to(folder)
        os.replace(tmp_path / "next", tmp_path / "live")
        while "answer" not in (told := adapted.process.stdout.readline()):
            assert told
        return told

    def answered() -> str:
        answer = adapted.chat(TURNS[0]["content"], model="one", max_tokens=30).json
        return answer["choices"][0]["message"]["content"]

    assert answered() == says(tmp_path / "adapter-0", 30)
    for number in (0, 1):
        shutil.rmtree(tmp_path / f"adapter-{number}")
        trained(decoder, tmp_path / f"adapter-{number}", 7 + number)
    same, other = (shutil.copytree(decoder, tmp_path / each) for each in ("same", "other"))
    assert name(same) == f"same answers instead of {decoder.name}\n"
    assert answered() == says(tmp_path / "adapter-0", 30)
    config = json.loads((other / "config.json").read_text())
    filled(other, config | {"initializer_range": 0.6}, "lm")
    told = name(other)
    assert told.startswith("same goes on to answer") and "another base model" in told
    assert answered() == says(tmp_path / "adapter-0", 30)

def test_what_cannot_be_added_is_one_message(
    decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = trained(decoder, tmp_path / "adapter", 0)
    for words, said in (
        (["--adapter", "one"], "--adapter one: must be NAME=DIR"),
        (["--adapter", f"{decoder.name}={folder}"], f"none of {decoder.name}"),
        (["--adapter", f"one={folder}", "--adapter", f"one={folder}"], f"{decoder.name}, one"),
        (["--adapter", f"one={tmp_path}"], "adapter_config.json"),
    ):
        if "adapter_config" in said:
            shutil.rmtree(folder)
        assert serve.main([str(decoder), "--precision", "fp32", *words]) == 2
        errors = capsys.readouterr().err
        assert said in errors and errors.startswith("error: ") and errors.count("\n") == 1
