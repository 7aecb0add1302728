"""Who may ask, who leaves, who is slow, who reads the log; and how a server ends."""

import asyncio
import hashlib
import hmac
import inspect
import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
import pytest
import tyro
from ftcore.config import ServeConfig
from ftcore.deploy import http
from ftcore.deploy.engine import Engine
from ftcore.model.heads import Model
from ftcore.monitor.journal import Journal
from tests.serve.conftest import CANARY, Client, parsed, serving, witnessed
from tests.tune.conftest import QWEN3 as SPEC

LONG: dict[str, Any] = {"prompt": "long", "max_tokens": 2000, "ignore_eos": True, "stream": True}

@pytest.fixture(scope="module")
def server(main: Client) -> Iterator[Client]:
    with witnessed(main) as client:
        yield client

def begun(client: Client, **fields: Any) -> socket.socket:
    """A connection on which a long answer has begun."""
    sock = client.connect()
    sock.sendall(client.request("/v1/completions", LONG | fields))
    assert sock.recv(20).startswith(b"HTTP/1.1 200")
    return sock

@pytest.mark.parametrize("stream", [True, False])
def test_whoever_leaves_frees_the_place(stream: bool, server: Client) -> None:
    before = server.metrics()["ft_requests_running"]
    sock = server.connect()
    sock.sendall(server.request("/v1/completions", LONG | {"stream": stream, "n": 4}))
    until = time.monotonic() + 20
    while server.metrics()["ft_requests_running"] < before + 3:
        assert time.monotonic() < until
    steps = server.metrics()["ft_engine_steps_total"]
    sock.close()
    while (told := server.metrics())["ft_requests_running"] > 1:  # the witness
        assert time.monotonic() < until
    assert told["ft_engine_steps_total"] < steps + 800  # of 2,000

def test_whoever_does_not_read_is_cut_off(server: Client) -> None:
    before = server.metrics()["ft_slow_client_dropped_total"]
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", server.port))
    body = LONG | {"logprobs": 5, "n": 8}
    sock.sendall(server.request("/v1/completions", body))
    until = time.monotonic() + 15
    while server.metrics()["ft_slow_client_dropped_total"] == before:
        assert time.monotonic() < until
        time.sleep(0.05)
    sock.close()

def test_the_log_has_no_text_and_no_line_that_was_forged(server: Client) -> None:
    forged = f'{CANARY}\r\n{{"id": "forged"}}\n'
    for fields in ({"prompt": forged}, {"stop": forged}, {"model": forged}, {forged: 1},
                   {"user": forged}, {"logit_bias": {forged: 1}}):
        server.complete(**fields)
    server.get("/" + CANARY)
    server.get("/v1/models", X=CANARY, Authorization="Bearer " + CANARY)
    server.chat(forged, max_tokens=2)
    text = server.log.read_text() + (server.folder / "stderr").read_text()
    assert CANARY not in text and "forged" not in text

def test_without_keys_another_site_is_kept_out(server: Client) -> None:
    for host in ("evil.test", "evil.test:8000", "127.0.0.1.evil.test", ""):
        assert server.get("/v1/models", Host=host).error[:2] == (403, "host_not_allowed")
    for host in ("localhost:8000", "127.0.0.1", "LOCALHOST"):
        answer = server.get("/v1/models", Host=host, Origin="http://evil.test")
        assert answer.status == 200
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]

def test_every_route_needs_the_key(keyed: Client) -> None:
    wrong = [None, "", "ALPHA", "alphA", "alph", "alpha2", "gamma", "\xe9", "x" * 9000]
    for path in ("/v1/models", "/metrics", "/nowhere", "/health/generate",
                 "/v1/chat/completions", "/tokenize"):
        for key in wrong:
            keyed.key = ""
            more = {} if key is None else {"Authorization": f"Bearer {key}"}
            answer = keyed.get(path, **more)
            assert answer.error == (401, "invalid_api_key", None)
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert keyed.get(path, Authorization="Basic alpha").status == 401
    assert keyed.get("/health/live").status == keyed.get("/health/ready").status == 200
    for key in ("alpha", "beta"):
        assert keyed.get("/v1/models", Authorization=f"bearer {key}").status == 200
        assert keyed.get("/v1/models", Authorization=f"Bearer {key}", Host="any").status == 200

def test_keys_are_compared_in_constant_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []

    def compare(one: bytes, two: bytes) -> bool:
        compared.append((one, two))
        return one == two

    monkeypatch.setattr(hmac, "compare_digest", compare)
    (tmp_path / "keys").write_text("alpha\nbeta\ngamma")
    config = ServeConfig(api_key_file=tmp_path / "keys")
    server = http.Server(api({}, config))
    server._owner({b"authorization": b"Bearer alpha"}, "/v1/models")
    assert [one for one, _ in compared] == [hashlib.sha256(b"alpha").digest()] * 3

def api(routes: dict[str, tuple[str, http.Handler]], config: ServeConfig) -> SimpleNamespace:
    meters, engine = http.Meters(), Engine(Model(SPEC, "lm"))
    return SimpleNamespace(routes=routes, options=config, engine=engine, meters=meters,
                           journal=Journal())

def answered(handler: http.Handler, config: ServeConfig, *, is_late: bool = False) -> bytes:
    """What a server in this process says to a request for /x, read with pauses, or only once the
    server has given up."""
    async def ask() -> bytes:
        server = http.Server(api({"/x": ("GET", handler)}, config))
        listening = await asyncio.start_server(server._connected, "127.0.0.1", 0)
        async with listening:
            where = listening.sockets[0].getsockname()
            reader, writer = await asyncio.open_connection(*where, limit=2**16)
            writer.write(b"GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n")
            said = await reader.read(1)
            while is_late and server.open:
                await asyncio.sleep(0.01)
            with suppress(ConnectionError):
                while some := await reader.read(2**20):
                    said += some
                    await asyncio.sleep(0.001)
            writer.close()
            while server.open:
                await asyncio.sleep(0.01)
            return said

    return asyncio.run(ask())

def test_a_long_answer_is_read_slowly_but_not_never() -> None:
    whole = b" " * 2**25

    async def long(x: http.Exchange) -> bytes:
        return whole

    assert answered(long, ServeConfig(stall_seconds=20)).endswith(whole)
    assert len(answered(long, ServeConfig(stall_seconds=0.2), is_late=True)) < len(whole)

def test_a_failure_is_told_without_its_text(capfd: pytest.CaptureFixture[str]) -> None:
    async def failing(x: http.Exchange) -> None:
        x.send(b"{}")
        raise ValueError(CANARY)

    said = answered(failing, ServeConfig())
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and body.startswith(b"data: {}\n\n")
    assert b'"internal_error"' in body.split(b"data: ")[2] and b"DONE" not in body
    told = capfd.readouterr().err
    assert CANARY not in told + said.decode() and "in failing" in told and "ValueError" in told

def test_a_full_queue_says_so(keyed: Client) -> None:
    keyed.key = "alpha"
    socks = [begun(keyed), begun(keyed)]
    for _ in range(2):
        socks.append(keyed.connect())
        socks[-1].sendall(keyed.request("/v1/completions", LONG))
    until = time.monotonic() + 20
    while keyed.metrics()["ft_requests_waiting"] < 2:
        assert time.monotonic() < until
    answer = keyed.complete()
    assert answer.error == (429, "queue_full", None) and answer.headers["Retry-After"] == "1"
    assert keyed.get("/v1/models", Authorization="Bearer x").status == 401
    for sock in socks:
        sock.close()
    keyed.idle()

@pytest.fixture
def mortal(decoder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Client]:
    """A server that a test may end."""
    with serving(decoder, tmp_path, *request.param) as client:
        yield client

@pytest.mark.parametrize("mortal", [("--drain-seconds", "20")], indirect=True)
def test_a_signal_lets_running_answers_end(mortal: Client) -> None:
    sock = begun(mortal, max_tokens=700)
    mortal.process.send_signal(signal.SIGTERM)
    until = time.monotonic() + 20
    while (answer := mortal.get("/health/ready")).status == 200:
        assert time.monotonic() < until
    assert answer.error[:2] == (503, "draining")
    assert mortal.complete().error[:2] == (503, "draining")
    got = b""
    while some := sock.recv(65536):
        got += some
    assert got.endswith(b"data: [DONE]\n\n")
    assert mortal.process.wait(10) == 0 and not (mortal.folder / "stderr").read_text()

@pytest.mark.parametrize("mortal", [("--drain-seconds", "0.2", "--cache-tokens", "2048")],
                         indirect=True)
def test_what_is_not_done_in_time_ends_with_an_error(mortal: Client) -> None:
    streamed, waiting = begun(mortal), mortal.connect()
    waiting.sendall(mortal.request("/v1/completions", LONG | {"stream": False}))
    await_waiting(mortal)
    mortal.process.send_signal(signal.SIGINT)
    got = b""
    while some := streamed.recv(65536):
        got += some
    last = json.loads(got.decode().strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["code"] == "shutting_down" and b"[DONE]" not in got
    assert parsed(waiting.recv(65536)).error[:2] == (503, "shutting_down")
    assert mortal.process.wait(10) == 0 and not (mortal.folder / "stderr").read_text()

def await_waiting(client: Client) -> None:
    until = time.monotonic() + 20
    while not client.metrics()["ft_requests_waiting"]:
        assert time.monotonic() < until

LIMITS = ("--queue-seconds", "0.3", "--request-seconds", "1", "--cache-tokens", "2048",
          "--connections", "3", "--log", "/dev/full")

@pytest.mark.parametrize("mortal", [LIMITS], indirect=True)
def test_time_and_connections_are_limited_and_a_full_disk_is_borne(mortal: Client) -> None:
    first = begun(mortal, max_tokens=2044)
    answer = mortal.complete(max_tokens=2000)
    assert answer.error[:2] == (503, "queue_timeout") and "Retry-After" in answer.headers
    assert mortal.get("/health/generate").error[:2] == (503, "queue_timeout")
    got = b""
    while some := first.recv(65536):
        got += some
    assert b'"time_limit"' in got and b"[DONE]" not in got
    assert mortal.metrics()["ft_lines_lost_total"] == 3
    idle = [mortal.connect() for _ in range(3)]
    assert parsed(mortal.connect().recv(65536)).error[:2] == (503, "too_many_connections")
    for sock in idle:
        sock.close()
    until = time.monotonic() + 20
    while mortal.get("/health/live").status != 200:
        assert time.monotonic() < until
    _left = begun(mortal, max_tokens=2044)
    mortal.process.send_signal(signal.SIGTERM)
    while mortal.get("/health/ready").status == 200:
        assert time.monotonic() < until
    mortal.process.send_signal(signal.SIGTERM)
    assert mortal.process.wait(10) == 130

def test_every_option_has_a_text_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(ServeConfig, args=["--help"])
    shown = " ".join(re.sub("[^ -~]", " ", capsys.readouterr().out).split())
    lines = inspect.getsource(ServeConfig).splitlines()
    texts = [line.partition("  # ")[2] for line in lines if re.match(r"    \w+: ", line)]
    assert len({*texts}) == len(vars(ServeConfig())) and all(text in shown for text in texts)

def test_what_cannot_be_meant_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import serve

    (tmp_path / "empty").write_text("\n")
    for words, part in (
        (["x", "--host", "0.0.0.0"], "--api-key-file"), (["x", "--port", "99999"], "65535"),
        (["x", "--api-key-file", str(tmp_path / "empty")], "holds no key"),
        (["x", "--api-key-file", str(tmp_path / "none")], "No such file"),
        (["x"], "no such folder"),
    ):
        assert serve.main(words) == 2
        assert part in capsys.readouterr().err
