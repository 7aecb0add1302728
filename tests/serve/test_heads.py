"""Classifiers, reward models and encoders: the routes over an engine in this process."""

import asyncio
import base64
import threading
from dataclasses import replace
from typing import Any
import numpy as np
import pytest
from ftcore.data import chat
from ftcore.data.chat import render_text
from ftcore.deploy import fields
from ftcore.deploy.answers import Answers
from ftcore.deploy.http import Refused, Server
from tests.serve.conftest import BERT, QWEN3, Make

TALK = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "the other"}]

def labelled(count: int) -> dict[str, Any]:
    names = {str(index): f"c{index}" for index in range(count)}
    return {"id2label": names, "label2id": {name: int(index) for index, name in names.items()}}

def test_classes_and_their_probabilities(made: Make) -> None:
    ask = made(BERT | labelled(3), "classify", temperature=2.0)
    texts = ["one", "the other", "and"]
    told = ask("/v1/classify", input=texts)
    calibrated = ask("/v1/classify", input=texts, calibrated=True)
    for text, row, other in zip(texts, told["data"], calibrated["data"], strict=True):
        logits = ask.logits(text)
        expected = np.exp(logits) / np.exp(logits).sum()
        assert np.allclose(row["probs"], expected, atol=1e-5) and row["num_classes"] == 3
        assert row["label"] == f"c{expected.argmax()}" and abs(sum(row["probs"]) - 1) < 1e-6
        assert np.allclose(other["probs"], np.exp(logits / 2) / np.exp(logits / 2).sum(), atol=1e-5)
    assert told["usage"]["prompt_tokens"] == sum(len(ask.tokenizer.encode(t).ids_T) for t in texts)
    for path, body in (("/v1/embeddings", {"input": "x"}), ("/v1/completions", {"prompt": "x"}),
                       ("/v1/score", {"messages": TALK})):
        with pytest.raises(Refused) as error:
            ask(path, **body)
        assert error.value.code == "unsupported_task"

def test_several_labels_have_probabilities_of_their_own(made: Make) -> None:
    problem = {"problem_type": "multi_label_classification"}
    ask = made(BERT | labelled(3) | problem, "classify")
    (row,) = ask("/v1/classify", input="one")["data"]
    assert np.allclose(row["probs"], 1 / (1 + np.exp(-ask.logits("one"))), atol=1e-5)

def test_the_score_of_a_conversation(made: Make) -> None:
    ask = made(QWEN3 | labelled(1) | {"eos_token_id": 1}, "classify")
    (row,) = ask("/v1/score", messages=TALK)["data"]
    text = render_text(TALK, ask.tokenizer).rstrip()
    assert np.isclose(row["score"], ask.logits(text, special=False)[0], atol=1e-5)
    for messages in ([], TALK[:1], [TALK[0], {"role": "assistant", "content": " "}]):
        with pytest.raises(Refused) as error:
            ask("/v1/score", messages=messages)
        assert (error.value.code, error.value.status) == ("invalid_value", 400)

def test_embeddings(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = made(BERT, "trunk")
    (plain,) = ask("/v1/embeddings", input="one")["data"]
    (coded,) = ask("/v1/embeddings", input="one", encoding_format="base64")["data"]
    values = np.frombuffer(base64.b64decode(coded["embedding"]), dtype=np.float32)
    assert np.allclose(values, plain["embedding"], atol=1e-6) and len(values) == 16
    monkeypatch.setattr(ask.api, "_read", lambda *_: ("input", [[5], []]))
    with pytest.raises(Refused, match="input: holds no token"):
        ask("/v1/embeddings", input="one")
    monkeypatch.undo()
    with pytest.raises(Refused, match="the context's 64"):
        ask("/v1/embeddings", input="x " * 100)

def test_texts_are_read_beside_the_event_loop(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ask, threads = made(QWEN3, "lm"), []

    def watched(owner: Any, name: str) -> None:
        work = getattr(owner, name)

        def call(*inputs: Any, **more: Any) -> Any:
            threads.append(threading.current_thread())
            return work(*inputs, **more)

        monkeypatch.setattr(owner, name, call)

    for owner, name in ((fields.Fields, "_object"), (chat, "render_text"),
                        (ask.tokenizer, "encode"), (ask.tokenizer, "encode_pairs")):
        watched(owner, name)
    ask("/v1/completions", prompt="one", max_tokens=1)
    ask("/v1/chat/completions", messages=TALK[:1], max_tokens=1)
    ask("/v1/embeddings", input="one")
    assert len(threads) >= 7 and threading.main_thread() not in threads

def test_what_fails_in_the_text_ends_one_request(
    made: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = made(QWEN3, "lm")
    take = Answers.take

    def fail(self: Answers, *said: Any) -> None:
        monkeypatch.setattr(Answers, "take", take)
        raise RuntimeError("of a test")

    monkeypatch.setattr(Answers, "take", fail)
    with pytest.raises(RuntimeError, match="of a test"):
        ask("/v1/completions", prompt="one", max_tokens=50)
    assert ask("/v1/completions", prompt="one", max_tokens=5, temperature=0)["choices"]
    assert not ask.engine.running

def test_a_stop_string_frees_the_place(made: Make) -> None:
    ask = made(QWEN3, "lm")
    asked = {"prompt": "one", "temperature": 0, "ignore_eos": True}
    (choice,) = ask("/v1/completions", **asked, max_tokens=20)["choices"]
    before = ask.engine.num_steps
    ask("/v1/completions", **asked, max_tokens=2000, stop=choice["text"][:2])
    assert ask.engine.num_steps < before + 1500

def test_a_broken_engine_ends_the_server(made: Make) -> None:
    ask = made(QWEN3, "lm")
    ask.engine.failures = 3
    api = ask.api
    with pytest.raises(Refused, match="does not work"):
        asyncio.run(api.ready(None, {}))
    api.options = replace(api.options, port=0)
    assert asyncio.run(Server(api).run(lambda port: None)) == 1
