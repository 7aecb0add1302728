"""Twenty kinds of bad input: each an error object with its status, code and field."""

import json
import random
import socket
import time
from collections.abc import Iterator
from typing import Any
import pytest
from tests.serve.conftest import CANARY, Answer, Ask, Client, parsed

CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
HIDDEN = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
Expected = tuple[int, str, str | None]

def chat(param: str | None, code: str = "invalid_value", **fields: Any) -> tuple[Ask, Expected]:
    return lambda client: client.chat(**fields), (400, code, param)

def text(param: str | None, code: str = "invalid_value", **fields: Any) -> tuple[Ask, Expected]:
    return lambda client: client.complete(**fields), (400, code, param)

def embed(param: str | None, code: str = "invalid_value", **fields: Any) -> tuple[Ask, Expected]:
    return lambda client: client.post(EMBED, {"input": "one", **fields}), (400, code, param)

def body(raw: bytes, param: str | None, code: str = "invalid_value") -> tuple[Ask, Expected]:
    return lambda client: client.post(CHAT, raw), (400, code, param)

def said(*messages: Any) -> tuple[Ask, str]:
    return lambda client: client.post(CHAT, {"messages": [*messages]})

def head(raw: bytes) -> Ask:
    """A request of which every line end is written out, and another behind it."""
    first, *rest = raw.split(b"\r\n", 1)

    def ask(client: Client) -> Answer:
        key = [f"Authorization: Bearer {client.key}".encode()] if client.key else []
        return parsed(client.raw(b"\r\n".join([first, *key, *rest]) + b"\r\n\r\n" + HIDDEN))

    return ask

USER = {"role": "user", "content": CANARY}
ASKED = json.dumps({"messages": [USER], "max_tokens": 1})
START = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
FIELD, MESSAGE = "unsupported_parameter", "messages[0].content"
CASES: dict[str, tuple[Ask, Expected]] = {
    "1 cut": body(b'{"model": "m",', None, "invalid_json"),
    "1 not utf-8": body(b'{"model": "\xff"}', None, "invalid_json"),
    "1 utf-16": body(ASKED.encode("utf-16"), None, "invalid_json"),
    "1 no object": body(b"[]", None, "invalid_json"),
    "2 deep": body(b"[" * 100_000, None, "json_too_deep"),
    **{f"3 max_tokens {str(bad)[:5]}": text("max_tokens", max_tokens=bad)
       for bad in (-1, 0, 1.5, "10", True, [])},
    "3 max_tokens digits": body(ASKED.replace('1}', "1" * 5000 + "}").encode(), "max_tokens"),
    **{f"4 temperature {bad}": body(ASKED.replace("}]", f'}}], "temperature": {bad}').encode(),
                                    "temperature") for bad in ("NaN", "1e400", "-0.1", "2.1")},
    "5 twice": body(ASKED.replace("{", '{"max_tokens": 2, ', 1).encode(), "max_tokens",
                    "duplicate_key"),
    "5 twice within": body(b'{"messages": [{"role": "user", "role": "user"}]}', "role",
                           "duplicate_key"),
    "6 unknown": chat("temprature", "unknown_parameter", temprature=1),
    "6 unknown within": (said({**USER, "name": "x"}), (400, "unknown_parameter",
                                                       "messages[0].name")),
    "7 n": chat("n", "too_many_sequences", n=1_000_000),
    "7 prompts": text("prompt", "too_many_sequences", prompt=["x"] * 10_000),
    "7 product": text("n", "too_many_sequences", prompt=["x"] * 8, n=4),
    **{f"8 stop {name}": chat("stop", stop=bad) for name, bad in
       {"five": ["a"] * 5, "empty": "", "empty within": ["a", ""], "long": "x" * 500_000,
        "number": 1, "none": [None]}.items()},
    **{f"9 bias {name}": chat("logit_bias", logit_bias=bad) for name, bad in
       {"vocab": {"300": 1}, "negative": {"-1": 1}, "word": {"abc": 1}, "large": {"5": 1e9},
        "many": {str(n): 1 for n in range(5000)}, "list": [1], "digits": {"9" * 5000: 1},
        "other digits": {"\u0663": 1}}.items()},
    "10 top 21": chat("top_logprobs", logprobs=True, top_logprobs=21),
    "10 top alone": chat("top_logprobs", top_logprobs=2),
    "10 six": text("logprobs", logprobs=6),
    "11 context": text("prompt", "context_length_exceeded", prompt=[5] * 2041),
    "11 context of a chat": chat("messages", "context_length_exceeded", max_tokens=2048),
    "11 ids": text("prompt", "context_length_exceeded", prompt=[5] * 300_000),
    "11 ids of the second": text("prompt[1]", "context_length_exceeded",
                                 prompt=[[5], [5] * 3000]),
    "11 bytes": text("prompt", "context_length_exceeded", prompt="x" * 1_000_000),
    "12 no messages": chat("messages", messages=[]),
    "12 role": (said({"role": "x", "content": "x"}), (400, "invalid_value", "messages[0].role")),
    "12 null": (said({"role": "user", "content": None}), (400, "invalid_value", MESSAGE)),
    "12 absent": (said({"role": "user"}), (400, "invalid_value", MESSAGE)),
    "12 boms": chat(MESSAGE, content="\ufeff\ufeff"),
    "12 surrogate": chat(MESSAGE, content="\ud800"),
    "12 special": chat(MESSAGE, content="x<|im_end|>"),
    "12 no object": (said("x"), (400, "invalid_value", "messages")),
    **{f"13 id {bad}": text("prompt[1]", prompt=[5, bad]) for bad in (-1, 300, 2**63, 1.5, "x")},
    "13 id of the second": text("prompt[1]", prompt=[[5], [300]]),
    "14 image": chat("messages[0].content.type", FIELD,
                     content=[{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]),
    "14 tools": chat("tools", FIELD, tools=[{"type": "function"}]),
    "14 schema": chat("response_format", FIELD, response_format={"type": "json_schema"}),
    "14 regex": chat("structured_outputs", FIELD, structured_outputs={"regex": "(a+)+b"}),
    "14 suffix": text("suffix", FIELD, suffix="x"),
    "14 best_of": text("best_of", FIELD, best_of=2),
    "14 echo": text("echo", echo=1),
    **{f"15 {ascii(bad)[:12]}": (lambda client, bad=bad: client.chat(model=bad),
                                 (404, "model_not_found", "model"))
       for bad in ("../../etc", "a\0b", "/etc", "x" * 1_000_000, "", "%2e%2e")},
    "16 empty list": embed("input", input=[]),
    "16 empty": embed("input", input=""),
    "16 many": embed("input", input=["x"] * 300),
    "16 dimensions": embed("dimensions", dimensions=10**9),
    "16 hex": embed("encoding_format", encoding_format="hex"),
    "16 classes": (lambda c: c.post("/v1/classify", {"input": "x"}),
                   (400, "unsupported_task", "model")),
    "16 scores": (lambda c: c.post("/v1/score", {"messages": [USER]}),
                  (400, "unsupported_task", "model")),
    "17 two keys": (head(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer a\r\n"
                         b"Authorization: Bearer a"), (400, "bad_framing", None)),
    "18 body": (head(START + b"Content-Length: 5242880"), (413, "body_too_large", None)),
    "18 gigabyte": (head(START + b"Content-Length: 1073741824"), (413, "body_too_large", None)),
    "18 head": (head(b"GET /health HTTP/1.1\r\nX: " + b"x" * 20_480),
                (431, "head_too_large", None)),
    "18 fields": (head(b"GET /health HTTP/1.1\r\nHost: localhost" + b"\r\nX: y" * 65),
                  (431, "head_too_large", None)),
    "19 chunked": (head(START + b"Transfer-Encoding: chunked"), (411, "length_required", None)),
    "19 no length": (head(START.removesuffix(b"\r\n")), (411, "length_required", None)),
    **{f"19 {lines.decode()[:40]!r}": (head(START + lines), (400, "bad_framing", None))
       for lines in (
        b"Transfer-Encoding: chunked\r\nContent-Length: 5",
        b"Content-Length: 5\r\nContent-Length: 5", b"Content-Length: -1", b"Content-Length: +3",
        b"Content-Length: 1_0", b"Content-Length: abc", b"Content-Length: " + b"9" * 31,
        b"Content-Length: 3\r\nHost: other", b"X: a\r\n b", b"X : a", b"X: a\nContent-Length: 5",
        b"X: a\0b", b"Content-Length 5")},
    "19 http/2": (head(b"PRI * HTTP/2.0"), (400, "bad_framing", None)),
    "19 http/0.9": (head(b"GET /"), (400, "bad_framing", None)),
    "19 no host": (head(b"GET /v1/models HTTP/1.1"), (400, "bad_framing", None)),
    "20 method": (lambda c: parsed(c.raw(c.head("PUT", "/v1/models", None))),
                  (405, "method_not_allowed", None)),
    "20 path": (lambda c: c.get("/v1/../etc/passwd"), (404, "unknown_route", None)),
    "20 type": (lambda c: c.post(CHAT, {}, Content_Type="text/plain"),
                (415, "unsupported_media_type", None)),
    "20 host": (lambda c: c.get("/v1/models", Host="evil.test"), (403, "host_not_allowed", None)),
}

@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str, server: Client, keyed: Client) -> None:
    ask, expected = CASES[case]
    keyed.key = "alpha"  # and its asserts are not run
    for client in [server, keyed][: 1 if case == "20 host" else 2]:
        answer = ask(client)
        assert answer.error == expected
        assert answer.headers["Connection"] == "close"
        assert CANARY not in answer.body.decode() and b"HTTP/1.1 200" not in answer.body

def test_what_an_error_adds(server: Client) -> None:
    answer = CASES["20 method"][0](server)
    assert answer.headers["Allow"] == "GET"
    assert "2041" in CASES["11 context"][0](server).body.decode()
    assert "nearest: 'temperature'" in CASES["6 unknown"][0](server).body.decode()
    assert "--choices" in CASES["7 n"][0](server).body.decode()

def test_a_bomb_is_refused_quickly_and_takes_no_memory(server: Client) -> None:
    before = server.metrics()["ft_process_resident_bytes"]
    for case in ("2 deep", "7 n", "7 prompts", "18 gigabyte", "3 max_tokens digits"):
        CASES[case][0](server)
    assert server.metrics()["ft_process_resident_bytes"] < before + 5 * 2**20

@pytest.mark.parametrize("part", ["head", "body"])
def test_drip_feeding_ends_at_the_deadline(part: str, server: Client) -> None:
    with server.connect() as sock:
        if part == "body":
            sock.sendall(server.head("POST", CHAT, 100))
        start = time.monotonic()
        sock.settimeout(0.1)
        got = b""
        while time.monotonic() < start + 5 and b"408" not in got:
            try:
                sock.sendall(b"x")
                got += sock.recv(65536)
            except TimeoutError:
                continue
    assert parsed(got).error == (408, "request_timeout", None)

def test_many_half_requests_leave_the_others_alone(server: Client) -> None:
    half = [server.connect() for _ in range(200)]
    for sock in half:
        sock.sendall(b"GET /v1/models HTTP/1.1\r\n")
    assert server.complete().status == 200
    assert parsed(half[0].recv(65536)).status == 408
    for sock in half:
        sock.close()

def test_a_burst_of_connections_is_answered(server: Client) -> None:
    socks = []
    for _ in range(256):
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", server.port))
        socks.append(sock)
    for sock in socks:
        sock.settimeout(10)
        sock.sendall(HIDDEN)
    for sock in socks:
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
        sock.close()

def mutations(count: int) -> Iterator[bytes]:
    """A valid request with something wrong: bytes changed, or a value put in another's place."""
    valid = {"messages": [USER], "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "n": 1,
             "stop": ["x"], "logit_bias": {"5": 1}, "seed": 1, "logprobs": True, "top_logprobs": 2}
    odd = [None, True, -1, 0, 1, 2**63, 1e308, "", "x", [], [1], {}, {"a": 1}, "\ud800", [[]], "1"]
    draw = random.Random(0)
    for _ in range(count):
        if draw.random() < 0.5:
            raw = bytearray(json.dumps(valid).encode())
            for _ in range(draw.randint(1, 3)):
                raw[draw.randrange(len(raw))] = draw.randrange(256)
            yield bytes(raw)
        else:
            some = {**valid, draw.choice([*valid, "x", "stream"]): draw.choice(odd)}
            other = [dict.fromkeys(USER, draw.choice(odd))]
            some["messages"] = draw.choice([some["messages"], other])
            yield json.dumps(some).encode()

@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutations_are_answered_or_refused(count: int, server: Client) -> None:
    seen = set()
    for raw in mutations(count):
        answer: Answer = server.post(CHAT, raw)
        seen.add(answer.status)
        assert answer.status == 200 or 400 <= answer.status < 500, raw
        if answer.status != 200:
            assert answer.error
    assert {200, 400} <= seen
