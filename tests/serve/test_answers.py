"""What the server says: the same as the model alone, whole or in events, by every route."""

import json
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
import numpy as np
import pytest
import torch
from ftcore.data.chat import encode_prompt
from ftcore.data.tokenizer import Tokenizer
from ftcore.evaluate.evaluator import continued, spoken
from ftcore.model.load import load_model
from kernels.docs import Docs
from tests.serve.conftest import Client, witnessed

PROMPTS = ("one", "the other question", "and")
ROUTES = {
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/classify", "/v1/score",
    "/v1/models", "/v1/feedback", "/v1/monitor", "/tokenize", "/tokenize/chat", "/detokenize",
    "/openapi.json", "/metrics", "/health", "/health/live", "/health/ready",
    "/health/generate",
}  # fmt: skip

@pytest.fixture(scope="module")
def server(main: Client) -> Iterator[Client]:
    with witnessed(main) as client:
        yield client

@pytest.fixture(scope="module")
def tokenizer(decoder: Path) -> Tokenizer:
    return Tokenizer.load(decoder)

@pytest.fixture(scope="module")
def model(decoder: Path) -> Any:
    return load_model(decoder, task="lm", dtype=torch.float32).model.eval()

def joined(events: list[Any]) -> str:
    """The text of a stream of one choice."""
    assert events[-1] == "[DONE]"
    choices = [event["choices"][0] for event in events[:-1] if event["choices"]]
    assert [c["finish_reason"] for c in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"]
    return "".join(c["delta"].get("content", "") if "delta" in c else c["text"] for c in choices)

def test_greedy_answers_are_those_of_the_model(
    server: Client, tokenizer: Tokenizer, model: Any
) -> None:
    asked = [encode_prompt([{"role": "user", "content": p}], tokenizer) for p in PROMPTS]
    for prompt, ids in zip(PROMPTS, continued(model, tokenizer, asked, 40), strict=True):
        answer = server.chat(prompt, max_tokens=40).json
        assert answer["choices"][0]["message"]["content"] == spoken(ids, tokenizer)
        assert answer["choices"][0]["finish_reason"] == "length" and len(ids) == 40
        assert answer["usage"]["completion_tokens"] == 40
        assert answer["usage"]["prompt_tokens"] == len(encode_prompt(
            [{"role": "user", "content": prompt}], tokenizer))

def test_the_model_is_listed_by_the_name_of_its_folder(server: Client, decoder: Path) -> None:
    assert [m["id"] for m in server.get("/v1/models").json["data"]] == [decoder.name]
    answers = [server.complete(model=name, max_tokens=20).json for name in (None, decoder.name)]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert [answer["model"] for answer in answers] == [decoder.name] * 2

def test_events_make_the_same_answer(server: Client) -> None:
    for ask in (server.chat, server.complete):
        whole = ask(max_tokens=60).json["choices"][0]
        events = ask(max_tokens=60, stream=True).events
        said = whole["message"]["content"] if "message" in whole else whole["text"]
        assert joined(events) == said
    first = server.chat(stream=True).events[0]
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert first["object"] == "chat.completion.chunk" and "usage" not in first

def test_usage_comes_last_if_asked(server: Client) -> None:
    events = server.chat(stream=True, stream_options={"include_usage": True}).events
    *some, last, done = events
    assert done == "[DONE]" and not last["choices"] and last["usage"]["completion_tokens"] == 8
    assert {event["usage"] for event in some} == {None}

def test_several_answers_to_several_prompts_keep_their_order(server: Client) -> None:
    asked = {"n": 2, "temperature": 1, "seed": 7}
    answer = server.complete(prompt=[*PROMPTS], **asked).json
    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == [*range(6)]
    for place, prompt in enumerate(PROMPTS):
        alone = server.complete(prompt=prompt, **asked | {"seed": 7 + 2 * place}).json["choices"]
        assert [c["text"] for c in alone] == [c["text"] for c in choices[2 * place :][:2]]
    assert choices[0]["text"] != choices[1]["text"]
    events = server.complete(prompt=[*PROMPTS], **asked, stream=True)
    texts = [""] * 6
    for event in events.events[:-1]:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == [choice["text"] for choice in choices]

def test_a_stop_string_ends_it(server: Client) -> None:
    text = server.complete(max_tokens=40).json["choices"][0]["text"]
    for stop in (text[9:12], text[5:9]):
        for stream in (False, True):
            answer = server.complete(max_tokens=40, stop=[stop], stream=stream)
            if stream:
                said, reason = joined(answer.events), answer.events[-2]["choices"][0]
            else:
                reason = answer.json["choices"][0]
                said = reason["text"]
            assert said == text[: text.find(stop)] and reason["finish_reason"] == "stop"

def test_log_probabilities_are_those_of_a_full_pass(
    server: Client, tokenizer: Tokenizer, model: Any
) -> None:
    asked = {"max_tokens": 12, "temperature": 1, "seed": 3, "ignore_eos": True}
    ids = tokenizer.encode("the other question").ids_T.tolist()
    told = server.complete(prompt=ids, logprobs=2, **asked).json["choices"][0]
    said = told["logprobs"]
    pieces = [*map(tokenizer.bytes_of, range(300))]
    text = told["text"]
    known = [pieces.index(bytes_of(token)) for token in said["tokens"]]
    assert len(known) == 12
    known = ids + known
    with torch.inference_mode():
        N, docs = torch.tensor(known), Docs.from_lengths([len(known)], "cpu")
        h_NC = model.trunk(N, docs.positions_N(), torch.zeros_like(N), docs)
        log_p_NV = model.head(h_NC).log_softmax(-1)
    own = log_p_NV[:-1].gather(1, N[1:, None]).squeeze(1).tolist()[-12:]
    assert np.allclose(said["token_logprobs"], own, atol=1e-4)
    best = log_p_NV[:-1].topk(2).values.tolist()[-12:]
    for top, values in zip(said["top_logprobs"], best, strict=True):
        assert np.allclose(sorted(top.values(), reverse=True), values, atol=1e-4)
    for token, offset in zip(said["tokens"], said["text_offset"], strict=True):
        is_part = token.startswith(("bytes:", "<|")) or text[offset] == "\ufffd"
        assert is_part or text.startswith(token, offset)
    # an echo says the same of the prompt before it
    whole = server.complete(prompt=[ids, ids[:3]], n=2, logprobs=2, echo=True, **asked).json
    assert whole["usage"]["prompt_tokens"] == len(ids) + 3
    assert whole["usage"]["completion_tokens"] == 4 * 12
    first, _, other, _ = whole["choices"]
    assert first["text"] == "the other question" + text
    assert first["logprobs"]["tokens"][-12:] == said["tokens"]
    every = log_p_NV[:-1].gather(1, N[1:, None]).squeeze(1).tolist()
    assert first["logprobs"]["token_logprobs"][0] is first["logprobs"]["top_logprobs"][0] is None
    assert np.allclose(first["logprobs"]["token_logprobs"][1:], every, atol=1e-4)
    assert np.allclose(other["logprobs"]["token_logprobs"][1:3], every[:2], atol=1e-4)
    for top, values in zip(first["logprobs"]["top_logprobs"][1:], log_p_NV[:-1].topk(2).values,
                           strict=True):
        assert np.allclose(sorted(top.values(), reverse=True), values, atol=1e-4)

def test_an_echo_is_text_before_the_answer(server: Client) -> None:
    """Told with its first piece; what would end the answer does not end it."""
    asked = {"prompt": "the other question", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    plain = server.complete(**asked).json
    told = server.complete(**asked, echo=True, stop="other").json
    assert told["choices"][0]["text"] == "the other question" + plain["choices"][0]["text"]
    assert told["usage"] == plain["usage"] and told["choices"][0]["logprobs"] is None
    events = server.complete(**asked, echo=True, stream=True).events[:-1]
    assert "".join(e["choices"][0]["text"] for e in events) == told["choices"][0]["text"]

def test_log_probabilities_without_alternatives(server: Client) -> None:
    told = server.complete(max_tokens=3, logprobs=0).json["choices"][0]["logprobs"]
    assert len(told["token_logprobs"]) == 3 and told["top_logprobs"] == [None] * 3
    content = server.chat(max_tokens=3, logprobs=True).json["choices"][0]["logprobs"]["content"]
    assert [each["top_logprobs"] for each in content] == [[]] * 3
    assert server.chat(logprobs=False).json["choices"][0]["logprobs"] is None

def bytes_of(token: str) -> bytes:
    if not token.startswith("bytes:"):
        return token.encode()
    return bytes(int(part, 16) for part in token.removeprefix("bytes:").split("\\x")[1:])

def test_log_probabilities_of_a_chat_have_their_bytes(server: Client, tokenizer: Tokenizer) -> None:
    asked = {"max_tokens": 12, "temperature": 1, "seed": 3, "logprobs": True, "top_logprobs": 3}
    whole = server.chat(**asked).json["choices"][0]
    content = whole["logprobs"]["content"]
    assert len(content) == 12 and all(len(told["top_logprobs"]) == 3 for told in content)
    said = b"".join(bytes(told["bytes"]) for told in content)
    assert said.decode("utf-8", "replace") == whole["message"]["content"]
    events = server.chat(**asked, stream=True).events[:-1]
    parts = [e["choices"][0]["logprobs"]["content"] for e in events]
    told = [told for part in parts for told in part]
    assert [each["bytes"] for each in told] == [each["bytes"] for each in content]
    values = [[each["logprob"] for each in some] for some in (told, content)]
    assert np.allclose(*values, atol=1e-5)

def test_the_end_of_an_answer_is_not_in_its_text(server: Client, tokenizer: Tokenizer) -> None:
    end = {str(tokenizer.eos_id): 100}
    answer = server.complete(logit_bias=end).json
    assert answer["choices"][0] == {"index": 0, "logprobs": None, "finish_reason": "stop",
                                    "text": ""}
    assert server.complete(logit_bias=end, min_tokens=3).json["usage"]["completion_tokens"] == 4
    longer = server.complete(logit_bias=end, ignore_eos=True).json
    assert longer["choices"][0]["finish_reason"] == "length" and not longer["choices"][0]["text"]

def test_tokens_there_and_back(server: Client, tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": part} for part in ("o", "ne")]
    for content in ("one", parts):
        body = {"messages": [{"role": "user", "content": content}]}
        expected = encode_prompt([{"role": "user", "content": "one"}], tokenizer).tolist()
        tokens = server.post("/tokenize/chat", body).json
        assert tokens == {"tokens": expected, "count": len(expected), "max_model_len": 2048}
        assert server.chat(content).json["usage"]["prompt_tokens"] == len(expected)
    text = server.post("/detokenize", {"tokens": expected}).json
    assert text == {"prompt": tokenizer.decode(expected, special=True)}
    ids = tokenizer.encode("one caf\u00e9").ids_T.tolist()
    assert server.post("/tokenize", {"prompt": "one caf\u00e9"}).json["tokens"] == ids
    assert server.post("/detokenize", {"tokens": ids}).json["prompt"] == "one caf\u00e9"

def test_the_parts_of_a_text_are_one_text(server: Client) -> None:
    parts = [{"type": "text", "text": part} for part in ("o", "ne")]
    one, other = server.chat(parts).json, server.chat("one").json
    assert one["choices"] == other["choices"] and one["usage"]["prompt_tokens"] == other["usage"][
        "prompt_tokens"]

def test_no_text_of_a_user_becomes_a_special_token(server: Client, tokenizer: Tokenizer) -> None:
    for token in tokenizer.special_tokens:
        for role in ("system", "user", "assistant", "tool"):
            body = {"messages": [{"role": role, "content": f"a{token}b"}]}
            assert server.post("/v1/chat/completions", body).error[0] == 400
        assert server.post("/tokenize", {"prompt": token}).error[0] == 400
        for body in ({"prompt": token}, {"prompt": ["x", token]}):
            assert server.post("/v1/completions", body).error[0] == 400
        assert server.post("/v1/embeddings", {"input": token}).error[0] == 400

def test_embeddings_do_not_depend_on_their_neighbours(server: Client) -> None:
    several = server.post("/v1/embeddings", {"input": [*PROMPTS]}).json
    assert [row["index"] for row in several["data"]] == [0, 1, 2]
    for prompt, row in zip(PROMPTS, several["data"], strict=True):
        alone = server.post("/v1/embeddings", {"input": prompt}).json["data"][0]["embedding"]
        assert np.allclose(alone, row["embedding"], atol=1e-5)
        assert np.isclose(np.linalg.norm(alone), 1, atol=1e-5)
    short = server.post("/v1/embeddings", {"input": "one", "dimensions": 4}).json
    assert len(short["data"][0]["embedding"]) == 4

def test_an_unknown_route_is_told_which_there_are(server: Client) -> None:
    told = server.get("/nowhere").json["error"]["message"].partition("there are ")[2]
    assert set(told.split(", ")) == ROUTES

def test_health(server: Client) -> None:
    before = server.metrics()["ft_engine_steps_total"]
    for route in ("/health", "/health/live", "/health/ready", "/health/generate"):
        assert server.get(route).json == {"status": "ok"}
    assert server.metrics()["ft_engine_steps_total"] > before, "the last one is answered by it"

def test_what_is_measured(server: Client) -> None:
    before = server.metrics()
    server.complete(max_tokens=5, ignore_eos=True)
    server.complete(n=0)
    told = server.metrics()
    assert told["ft_request_rejected_total"] >= before["ft_request_rejected_total"] + 1
    grown = ("ft_generation_tokens_total", "ft_time_to_first_token_seconds_count",
             "ft_inter_token_latency_seconds_count", "ft_request_prompt_tokens_sum",
             "ft_request_seconds_count", "ft_request_finished_total", "ft_engine_steps_total")
    assert all(told[name] > before[name] for name in grown)
    there = ("ft_requests_running", "ft_requests_waiting", "ft_engine_step_seconds",
             "ft_http_connections", "ft_engine_heartbeat_age_seconds", "ft_engine_errors_total",
             "ft_build_info", "ft_slow_client_dropped_total", "ft_process_resident_bytes")
    assert not [name for name in there if name not in told]
    kind = server.get("/metrics").headers["Content-Type"]
    assert kind == "text/plain; version=0.0.4; charset=utf-8"

def test_the_printed_command_works(server: Client) -> None:
    line = server.printed.splitlines()[-1].strip()
    command = [*shlex.split(line), "-sS", "-m", "20"]
    assert command[0] == "curl"
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(told)["choices"][0]["message"]["role"] == "assistant"

def test_openai_s_own_client(server: Client, decoder: Path) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none",
                           max_retries=0)
    asked = {"model": decoder.name, "messages": [{"role": "user", "content": "one"}],
             "temperature": 0, "max_completion_tokens": 12}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    stream = client.chat.completions.create(**asked, stream=True)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert said == whole.choices[0].message.content and whole.choices[0].logprobs.content[0].bytes
    short = {"prompt": "one", "max_tokens": 3, "logprobs": 1, "temperature": 0}
    text = client.completions.create(model=decoder.name, **short)
    assert len(text.choices[0].logprobs.tokens) == 3
    assert len(client.embeddings.create(model=decoder.name, input="one").data[0].embedding) == 16
    assert [m.id for m in client.models.list()] == [decoder.name]
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.chat.completions.create(**asked | {"model": "x"})
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**asked | {"temperature": 3})
    assert (error.value.code, error.value.param) == ("invalid_value", "temperature")
