"""HTTP/1.1 on asyncio streams: one request a connection, with a deadline and a cap on everything.

    connection -> head (h11 parses it, within head_seconds) -> Host or key -> route -> body (within
    body_seconds) -> the route's coroutine, beside a guard -> an answer, events, or an error object

A head is stricter than HTTP allows where readings differ: no bare line ends or folded lines, no
transfer encoding, none of ONCE twice. What comes behind the body is never read as a request.

Whoever leaves, reads too slowly or takes too long is told so by the guard: it cancels the route's
coroutine, which frees what it holds. The log has a line for each request, with no text of it.
"""

import asyncio
import hashlib
import hmac
import json
import os
import re
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Protocol

import h11

from ftcore.config import ServeConfig
from ftcore.deploy.meters import Lines, Meters

MAX_HEAD, MAX_FIELDS, BACKLOG = 16 * 1024, 64, 1024  # bytes, fields, waiting connections
TICK, KEEP_ALIVE, LINGER = 0.25, 15.0, 1.0  # seconds
ONCE = (b"host", b"content-length", b"authorization", b"content-type")
STRAY = re.compile(rb"(?<!\r)\n|\r(?!\n)|\r\n[ \t]")
JSON, EVENTS = "application/json", "text/event-stream; charset=utf-8"
ERRORS = {  # codes by status; their type, where it is not invalid_request_error
    400: ("bad_framing", "invalid_json", "json_too_deep", "duplicate_key", "unknown_parameter",
          "invalid_value", "unsupported_parameter", "unsupported_task", "too_many_sequences",
          "context_length_exceeded"),
    401: ("invalid_api_key",), 403: ("host_not_allowed",), 404: ("unknown_route", "model_not_found"),
    405: ("method_not_allowed",), 408: ("request_timeout",), 411: ("length_required",),
    413: ("body_too_large",), 415: ("unsupported_media_type",), 429: ("queue_full",),
    431: ("head_too_large",), 500: ("internal_error", "engine_error", "non_finite_logits"),
    503: ("too_many_connections", "queue_timeout", "time_limit", "draining", "shutting_down",
          "not_ready", "not_kept")}
STATUS = {code: status for status, codes in ERRORS.items() for code in codes}
TYPES = {"context_length_exceeded": "exceed_context_size_error", "model_not_found": "not_found_error",
         401: "authentication_error", 429: "rate_limit_error", 500: "server_error",
         503: "unavailable_error"}  # by code, or by status
ENDS = dict.fromkeys(ERRORS[500], "error") | {"time_limit": "timeout", "shutting_down": "cancelled"}

class Refused(Exception):
    """A request that gets an error object: a code of ERRORS, what is wrong, the field at fault."""

    def __init__(self, code: str, message: str, param: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.code, self.status, self.headers = code, STATUS[code], headers
        kind = TYPES.get(code) or TYPES.get(self.status, "invalid_request_error")
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.body = json.dumps({"error": error}).encode()

class Left(Exception):
    """The client has closed its side, or is cut off: nothing more can be said to it."""

class Exchange:
    """One request and its answer. `route` is the path of a known route, `owner` a hash of the key,
    `told` what the log says beside the time and the end; `began` is when the head was read."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, cap: int) -> None:
        self.reader, self.writer, self.cap = reader, writer, cap
        self.id, self.began = secrets.token_hex(12), time.monotonic()
        self.method = self.route = self.owner = ""
        self.body, self.told, self.status = b"", {}, 0
        self.is_streamed = self.is_slow = False
        self.sent = self.began  # when the last byte was

    def reply(self, status: int, body: bytes, kind: str = JSON, **headers: str) -> None:
        """The whole answer; of events (`body` empty) its head."""
        self.status = status
        fields = {"Content-Type": kind, "Connection": "close", "Cache-Control": "no-store",
                  "X-Content-Type-Options": "nosniff", "X-Request-Id": self.id, **headers}
        if kind != EVENTS:
            fields["Content-Length"] = str(len(body))
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{lines}\r\n"
        self.writer.write(head.encode() + (b"" if self.method == "HEAD" else body))

    def send(self, event: bytes | None) -> None:
        """One server-sent event; None: a comment, which keeps the connection alive."""
        if self.is_slow:
            return
        if not self.status:
            self.reply(200, b"", EVENTS)
        self.writer.write(b": keep-alive\n\n" if event is None else b"data: %b\n\n" % event)
        self.sent = time.monotonic()
        self.is_slow = self.writer.transport.get_write_buffer_size() > self.cap

    def refuse(self, error: Refused) -> None:
        """The error, as the answer or, where events were sent, as the last of them."""
        if self.status:
            self.send(error.body)
        else:
            self.reply(error.status, error.body, **error.headers)

    async def close(self, seconds: float) -> None:
        """Hand over what is written, then wait a little for the client to close first: it would
        lose the answer if this side closed before reading all it sent."""
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(seconds):
                await self.writer.drain()
            self.writer.write_eof()
            async with asyncio.timeout(LINGER):
                while await self.reader.read(MAX_HEAD):
                    pass
        self.writer.transport.abort()

Handler = Callable[[Exchange], Awaitable[bytes | None]]  # returns JSON, or None: it has answered

class App(Protocol):
    """What is served: path -> method -> coroutine; whether it can work, and whether for good not."""
    routes: Mapping[str, Mapping[str, Handler]]
    is_broken: bool
    is_draining: bool

class Server:
    """Takes connections to an app until a signal, or until the app is broken."""

    def __init__(self, app: App, options: ServeConfig, meters: Meters, log: Lines) -> None:
        self.app, self.options, self.meters, self.log = app, options, meters, log
        self.open: set[Exchange] = set()
        self.stop_at = 0.0  # when the last requests are cut off; 0: not stopping
        keys = options.api_key_file.read_bytes().split() if options.api_key_file else ()
        self.keys = [hashlib.sha256(key).digest() for key in keys]
        self.hosts = {"localhost", "127.0.0.1", "[::1]", options.host}
        self.free = {"/health", "/health/live", "/health/ready"}  # need no key
        self.free |= {"/metrics"} if options.public_metrics else set()

    async def run(self, ready: Callable[[int], None]) -> int:
        """Serve; `ready` is told the port. Returns the exit code: 0, or 1 of a broken app."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        where = self.options.host, self.options.port
        server = await asyncio.start_server(self._connected, *where, limit=MAX_HEAD, backlog=BACKLOG)
        ready(server.sockets[0].getsockname()[1])
        while not self.app.is_broken and not (self.stop_at and not self.open):
            await asyncio.sleep(TICK)
        server.close()
        return int(self.app.is_broken)

    def _stop(self) -> None:
        if self.stop_at:
            os._exit(130)
        self.stop_at, self.app.is_draining = time.monotonic() + self.options.drain_seconds, True

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        x, options = Exchange(reader, writer, 1024 * self.options.send_buffer_kib), self.options
        writer.transport.set_write_buffer_limits(0)  # drain waits for all
        self.open.add(x)
        self.meters.connections.set(len(self.open))
        end = "ok"
        try:
            if len(self.open) > options.connections:
                raise Refused("too_many_connections", "try again later (--connections)", Retry_After="1")
            body = await self._work(x, await self._received(x))
            if body is not None:
                x.reply(x.status or 200, body)
            end = x.told.get("reason", end)
        except Refused as error:
            end = ENDS.get(error.code, error.code)
            x.refuse(error)
        except (Left, OSError):
            end = "cancelled"
            writer.transport.abort()
        except Exception as error:  # its message may hold text of the request, its place does not
            end = "error"
            print(*traceback.format_tb(error.__traceback__), type(error), file=sys.stderr)
            x.refuse(Refused("internal_error", "the server failed; see its log"))
        if x.method or x.status:
            self._account(x, end)
        await x.close(options.stall_seconds)
        self.open.discard(x)
        self.meters.connections.set(len(self.open))

    def _account(self, x: Exchange, end: str) -> None:
        """Count a request, and write its line."""
        seconds = time.monotonic() - x.began
        self.meters.received.inc(not x.method)  # the head was no head
        self.meters.ended(end, is_refusal=end in STATUS, seconds=seconds)
        self.meters.slow.inc(x.is_slow)
        self.log.write({"time": round(time.time(), 3), "id": x.id, "route": x.route or "other",
                        "status": x.status, "end": end, "seconds": round(seconds, 4),
                        "key": x.owner[:8], **x.told})

    async def _received(self, x: Exchange) -> Handler:
        """The route that a request asks for, once all of it is there and allowed."""
        options = self.options
        try:
            async with asyncio.timeout(options.head_seconds):
                head = await x.reader.readuntil(b"\r\n\r\n")
        except TimeoutError:
            late = f"the head took more than {options.head_seconds:g} s (--head-seconds)"
            raise Refused("request_timeout", late) from None
        except asyncio.LimitOverrunError:
            raise Refused("head_too_large", f"the head has more than {MAX_HEAD} bytes") from None
        except asyncio.IncompleteReadError as error:
            raise Refused("bad_framing", "the head ends early") if error.partial else Left from None
        x.began = time.monotonic()
        x.method, path, fields = parsed(head)
        self.meters.received.inc()
        x.owner = self._owner(fields, path)
        if (methods := self.app.routes.get(path)) is None:
            raise Refused("unknown_route", "no such route; /openapi.json lists them")
        x.route = path
        if x.method not in methods:
            allowed = ", ".join(methods)
            raise Refused("method_not_allowed", f"this route takes {allowed}", Allow=allowed)
        if x.method == "POST":
            await self._read_body(x, fields)
        return methods[x.method]

    async def _read_body(self, x: Exchange, fields: Mapping[bytes, bytes]) -> None:
        options = self.options
        if fields.get(b"content-type", b"").split(b";")[0].strip().lower() != JSON.encode():
            raise Refused("unsupported_media_type", f"Content-Type must be {JSON}")
        if b"content-length" not in fields:
            raise Refused("length_required", "a body needs Content-Length")
        if (size := int(fields[b"content-length"])) > 1024 * options.body_kib:
            raise Refused("body_too_large", f"more than {options.body_kib} KiB (--body-kib)")
        if self.stop_at:
            raise Refused("draining", "the server is stopping; ask another", Retry_After="5")
        if fields.get(b"expect", b"").lower() == b"100-continue":
            x.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            async with asyncio.timeout(options.body_seconds):
                x.body = await x.reader.readexactly(size)
        except TimeoutError:
            late = f"the body took more than {options.body_seconds:g} s (--body-seconds)"
            raise Refused("request_timeout", late) from None
        except asyncio.IncompleteReadError:
            raise Left from None

    def _owner(self, fields: Mapping[bytes, bytes], path: str) -> str:
        """Hash of the key. Without keys a browser's page of another site is kept out by Host."""
        if not self.keys:
            host = re.sub(r":\d+$", "", fields.get(b"host", b"").decode("latin-1").lower())
            if host not in self.hosts and not self.options.insecure:
                raise Refused("host_not_allowed", "Host must be that of --host, or localhost")
            return ""
        word, _, key = fields.get(b"authorization", b"").partition(b" ")
        given, is_known = hashlib.sha256(key).digest(), False
        for known in self.keys:  # all of them, so that time does not tell which
            is_known |= hmac.compare_digest(given, known)
        if is_known and word.lower() == b"bearer":
            return given.hex()
        if path not in self.free:
            said = "this server needs a known API key: Authorization: Bearer KEY"
            raise Refused("invalid_api_key", said, WWW_Authenticate="Bearer")
        return ""

    async def _work(self, x: Exchange, handler: Handler) -> bytes | None:
        """What the route answers, unless the guard ends it first."""
        tasks = work, guard = [asyncio.ensure_future(f) for f in (handler(x), self._guard(x))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return await (work if work.done() else guard)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _guard(self, x: Exchange) -> None:
        """Raises what ends a request early, when something does."""
        options, waiting, moved = self.options, 0, time.monotonic()
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(TICK):
                    if not await x.reader.read(MAX_HEAD):
                        raise Left
            now, before = time.monotonic(), waiting
            waiting = x.writer.transport.get_write_buffer_size()
            moved = now if waiting < before or not waiting else moved
            x.is_slow |= now > moved + options.stall_seconds
            if x.is_slow:
                raise Left
            if now > x.began + options.request_seconds:
                over = f"it took more than {options.request_seconds:g} s (--request-seconds)"
                raise Refused("time_limit", over)
            if self.stop_at and now > self.stop_at:
                raise Refused("shutting_down", "the server stops, and the answer is not complete")
            if x.is_streamed and now > x.sent + KEEP_ALIVE:
                x.send(None)

def parsed(head: bytes) -> tuple[str, str, dict[bytes, bytes]]:
    """Method, path and fields (by names in lower case) of a head."""
    names = [name.lower() for name in re.findall(rb"\r\n([^:\r\n]+):", head)]
    if len(names) > MAX_FIELDS:
        raise Refused("head_too_large", f"the head has more than {MAX_FIELDS} fields")
    if b"transfer-encoding" in names and b"content-length" not in names:
        raise Refused("length_required", "Transfer-Encoding is not taken: send Content-Length")
    is_odd = STRAY.search(head) or b"transfer-encoding" in names
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    connection.receive_data(head)
    event = None
    with suppress(h11.RemoteProtocolError):
        event = connection.next_event()
    twice = [name.decode() for name in ONCE if names.count(name) > 1]
    if is_odd or twice or event is None or event.http_version not in (b"1.0", b"1.1"):
        what = f"{twice[0]} stands twice" if twice else "not a plain HTTP/1.1 head"
        raise Refused("bad_framing", what)
    path = event.target.partition(b"?")[0].decode("latin-1")
    return event.method.decode(), path, dict(event.headers)
