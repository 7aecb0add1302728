"""HTTP/1.1 on asyncio streams: one request a connection, with a deadline and a cap on everything.

    connection -> head (h11 parses it, within head_seconds) -> Host or key -> route -> body (within
    body_seconds) -> the route's coroutine, watched -> an answer, events, or an error object

A head is refused where readers differ about it: bare line ends, folded lines, a transfer encoding,
one of ONCE twice. What comes behind the body is never read as a request. The coroutine is ended,
which frees what it holds, once the client leaves, reads too slowly or time is over."""

import asyncio
import hashlib
import hmac
import json
import os
import re
import secrets
import signal
import socket
import sys
import time
import tomllib
import traceback
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any
import h11
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

MAX_HEAD, MAX_FIELDS, BACKLOG = 16 * 1024, 64, 1024  # bytes, fields, waiting connections
TICK, LINGER = 0.25, 1.0  # seconds
ONCE = (b"host", b"content-length", b"authorization", b"content-type")
STRAY = re.compile(rb"(?<!\r)\n|\r(?!\n)|\r\n[ \t]")
JSON, EVENTS = "application/json", "text/event-stream; charset=utf-8"
ERRORS, FIELDS, METERS, PERSONAL = (
    tomllib.loads(Path(__file__).with_name(f"{name}.toml").read_text("utf-8"))
    for name in ("errors", "fields", "meters", "personal"))
LOG = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK  # the latter: a pipe nobody reads

class Refused(Exception):
    """A request gets an error object: a code of errors.toml with its values, the field at fault."""

    def __init__(self, code: str, param: str | None = None, **values: Any) -> None:
        row = {"type": "invalid_request_error", "headers": {}, "end": code} | ERRORS[code]
        message = (f"{param}: " if param else "") + row["says"].format(**values)
        super().__init__(message)
        self.code, self.status, self.end = code, row["status"], row["end"]
        self.headers = {name: text.format(**values) for name, text in row["headers"].items()}
        error = {"message": message, "type": row["type"], "param": param, "code": code}
        self.body = json.dumps({"error": error}).encode()

def require(holds: Any, param: str | None = None, said: str = "", code: str = "invalid_value",
            **values: Any) -> None:
    """Refuse a request, or a field of it, of which something does not hold."""
    if not holds:
        raise Refused(code, param, said=said, **values)

class Exchange:
    """One request and its answer. `route` is empty of unknown ones, `owner` a hash of the key,
    `adapter` what answers (None: the base), `told` for the log; `began`: its head was read."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.id, self.began = secrets.token_hex(12), time.monotonic()
        self.method = self.route = self.owner = ""
        self.body, self.told, self.status, self.adapter = b"", {}, 0, None

    def reply(self, status: int, body: bytes, kind: str = JSON, **headers: str) -> None:
        """The whole answer; of events the head."""
        self.status = status
        length = {} if kind == EVENTS else {"Content-Length": len(body)}
        fields = {"Content-Type": kind, "Connection": "close", "Cache-Control": "no-store",
                  "X-Content-Type-Options": "nosniff", "X-Request-Id": self.id, **length, **headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{lines}\r\n"
        self.writer.write(head.encode() + body)

    def send(self, event: bytes) -> None:
        """One server-sent event."""
        if not self.status:
            self.reply(200, b"", EVENTS)
        self.writer.write(b"data: %b\n\n" % event)

    async def gone(self) -> None:
        """Returns once the client has closed its side; what it sends until then is not read."""
        while await self.reader.read(MAX_HEAD):
            pass

    async def close(self, seconds: float) -> None:
        """Let the client read what is written. It loses that where this side closes before all that
        it sent is read, so it may close first, a little while."""
        with suppress(OSError, TimeoutError):
            await asyncio.wait_for(self.writer.drain(), seconds)
            self.writer.write_eof()
            await asyncio.wait_for(self.gone(), LINGER)
        self.writer.transport.abort()

class Meters(dict):
    """What is counted of requests, by name (meters.toml), in a `registry`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = {"namespace": "ft", "registry": self.registry}
        for name, text in METERS["histograms"].items():
            buckets = METERS["buckets"]["tokens" if "_tokens" in name else "seconds"]
            self[name] = Histogram(name, text, buckets=buckets, **own)
        for kind, table in ((Counter, METERS["counters"]), (Gauge, METERS["gauges"])):
            self.update({name: kind(name, *told, **own) for name, told in table.items()})

Handler = Callable[[Exchange], Awaitable[bytes | None]]  # returns JSON, or None: it has answered

class Server:
    """Serves the `routes` (path -> method, Handler) of its `api`, until a signal or a break."""

    def __init__(self, api: Any) -> None:
        self.api, self.options, self.meters = api, (options := api.options), api.meters
        self.open = set[Exchange]()
        self.log = os.open(options.log, LOG, 0o644) if options.log else 2  # 2: standard error
        self.meters["http_connections"].set_function(lambda: len(self.open))
        self.most_unsent = 1024 * options.send_buffer_kib  # bytes
        self.stop_at = 0.0  # when running requests are cut off; 0: it is not stopping
        keys = options.api_key_file.read_bytes().split() if options.api_key_file else ()
        self.keys = [hashlib.sha256(key).digest() for key in keys]

    async def run(self, ready: Callable[[int], None]) -> int:
        """Serve; `ready` is told the port. Returns the exit code: 1 if broken."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop)
        server = await asyncio.start_server(self._connected, self.options.host, self.options.port,
                                            limit=MAX_HEAD, backlog=BACKLOG)
        for each in server.sockets:  # else the system holds some MiB more for a slow reader
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.most_unsent)
        ready(server.sockets[0].getsockname()[1])
        while not self.api.engine.is_broken and not (self.stop_at and not self.open):
            await asyncio.sleep(TICK)
        server.close()
        return int(self.api.engine.is_broken)

    def _stop(self) -> None:
        if self.stop_at:
            os._exit(130)
        self.stop_at = time.monotonic() + self.options.drain_seconds

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        x, end, refused = Exchange(reader, writer), "ok", None
        writer.transport.set_write_buffer_limits(0)  # drain waits for all
        self.open.add(x)
        try:
            has_room = len(self.open) <= self.options.connections
            require(has_room, code="too_many_connections", **vars(self.options))
            if (body := await self._watched(x, await self._received(x))) is not None:
                x.reply(200, body)
            end = x.told.get("reason", end)
        except Refused as error:
            refused = error
        except TimeoutError:
            refused = Refused("request_timeout", part="body" if x.method else "head")
        except (OSError, EOFError):  # the client has left, or is cut off
            end = "cancelled"
            writer.transport.abort()
        except Exception as error:  # its message may hold text of the request, its place does not
            print(*traceback.format_tb(error.__traceback__), type(error), file=sys.stderr)
            refused = Refused("internal_error")
        if refused:
            end = refused.end
            if x.status:  # events were sent: this is the last of them
                x.send(refused.body)
            else:
                x.reply(refused.status, refused.body, **refused.headers)
        if x.method or x.status:
            meters, seconds = self.meters, time.monotonic() - x.began
            meters["requests_received"].inc(not x.method)  # a head that was none
            meters["request_seconds"].observe(seconds)
            meters["request_rejected" if end in ERRORS else "request_finished"].labels(end).inc()
            for name in x.told.keys() & {"prompt_tokens", "generation_tokens"}:
                meters[name].inc(x.told[name])
                meters[f"request_{name}"].observe(x.told[name])
            self._note({"time": time.time(), "id": x.id, "route": x.route or "other", "end": end,
                        "status": x.status, "key": x.owner[:8], "seconds": seconds, **x.told})
        await x.close(self.options.stall_seconds)
        self.open.discard(x)

    def _note(self, told: Mapping[str, Any]) -> None:
        line, size = json.dumps(told).encode() + b"\n", 0
        with suppress(OSError):
            if self.options.log and os.fstat(self.log).st_size >= self.options.log_mib * 2**20:
                os.rename(self.options.log, f"{self.options.log}.{time.time_ns()}")
                full, self.log = self.log, os.open(self.options.log, LOG, 0o644)
                os.close(full)
            size = os.write(self.log, line)
        self.meters["lines_lost"].inc(size < len(line))
        self.api.journal.take(line)

    async def _received(self, x: Exchange) -> Handler:
        """The route that a request asks for, once all of it is there and allowed."""
        options = self.options
        try:
            head = await asyncio.wait_for(x.reader.readuntil(b"\r\n\r\n"), options.head_seconds)
        except asyncio.LimitOverrunError:
            raise Refused("head_too_large", most=f"{MAX_HEAD} bytes") from None
        x.began, request = time.monotonic(), parsed(head)
        path, fields = request.target.partition(b"?")[0].decode("latin-1"), dict(request.headers)
        x.method = request.method.decode()
        self.meters["requests_received"].inc()
        x.owner = self._owner(fields, path)
        routes = self.api.routes
        require(path in routes, code="unknown_route", routes=", ".join(routes))
        x.route, (method, handler) = path, routes[path]
        require(x.method == method, code="method_not_allowed", method=method)
        require(not self.stop_at or path in FIELDS["alive"], code="draining")
        if x.method == "POST":
            kind = fields.get(b"content-type", b"").split(b";")[0].strip().lower()
            require(kind == JSON.encode(), code="unsupported_media_type")
            require(b"content-length" in fields, code="length_required")
            size = int(fields[b"content-length"])
            require(size <= 1024 * options.body_kib, code="body_too_large", **vars(options))
            x.body = await asyncio.wait_for(x.reader.readexactly(size), options.body_seconds)
        return handler

    def _owner(self, fields: Mapping[bytes, bytes], path: str) -> str:
        """Hash of the key. Without keys Host keeps out what a page of another site asks for."""
        if not self.keys:
            host = re.sub(r":\d+$", "", fields.get(b"host", b"").decode("latin-1").lower())
            known = "localhost", "127.0.0.1", "[::1]", self.options.host
            require(host in known or self.options.insecure, code="host_not_allowed")
            return ""
        word, _, key = fields.get(b"authorization", b"").partition(b" ")
        given = hashlib.sha256(key).digest()
        are_equal = [hmac.compare_digest(given, known) for known in self.keys]  # in equal time
        if any(are_equal) and word.lower() == b"bearer":
            return given.hex()
        is_free = path in FIELDS["free"] or self.options.public_metrics and path == "/metrics"
        require(is_free, code="invalid_api_key")
        return ""

    async def _watched(self, x: Exchange, handler: Handler) -> bytes | None:
        """What the route answers, unless something ends it first."""
        options, unsent, moved = self.options, 0, time.monotonic()
        size = x.writer.transport.get_write_buffer_size  # bytes that the client has not read
        tasks = work, gone = [asyncio.ensure_future(each) for each in (handler(x), x.gone())]
        try:
            while True:
                await asyncio.wait(tasks, timeout=TICK, return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    return await work
                now, before, unsent = time.monotonic(), unsent, size()
                moved = now if unsent < before or not unsent else moved
                is_slow = unsent > self.most_unsent or now > moved + options.stall_seconds
                self.meters["slow_client_dropped"].inc(is_slow)
                if is_slow or gone.done():
                    raise ConnectionResetError
                is_late = now > x.began + options.request_seconds
                require(not is_late, code="time_limit", **vars(options))
                require(not self.stop_at or now <= self.stop_at, code="shutting_down")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

def parsed(head: bytes) -> h11.Request:
    names, event = re.findall(rb"\r\n([^:\r\n]+):", head.lower()), None
    require(len(names) <= MAX_FIELDS, code="head_too_large", most=f"{MAX_FIELDS} fields")
    has_encoding = b"transfer-encoding" in names
    require(not has_encoding or b"content-length" in names, code="length_required")
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
    connection.receive_data(head)
    with suppress(h11.RemoteProtocolError):
        event = connection.next_event()
    is_odd = has_encoding or STRAY.search(head) or any(names.count(name) > 1 for name in ONCE)
    is_whole = isinstance(event, h11.Request) and event.http_version <= b"1.1"
    require(is_whole and not is_odd, code="bad_framing")
    return event
