"""What the server counts, for Prometheus, and files of JSON lines.

Durations are in seconds of one monotonic clock; labels come from closed sets, never from requests.
"""

import json
import os
import resource
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ftcore.deploy.engine import Engine

SECONDS = (.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300)
TOKENS = tuple(2**power for power in range(16))
HISTOGRAMS = {
    "time_to_first_token_seconds": "From a request's head to its first token",
    "inter_token_latency_seconds": "Between two tokens of an answer",
    "request_seconds": "Of a request in all", "request_prompt_tokens": "Of a request",
    "request_generation_tokens": "Of a request's answers"}
ENGINE = {  # name -> what it is, and how it is read, whenever it is asked for
    "requests_running": ("Sequences in work", lambda e: e.num_running),
    "requests_waiting": ("Sequences in the queue", lambda e: e.num_waiting),
    "kv_cache_usage_ratio": ("Share of the cache in use", lambda e: e.cache_used),
    "engine_step_seconds": ("Duration of the last step", lambda e: e.step_seconds),
    "engine_steps_total": ("Steps", lambda e: e.num_steps),
    "engine_errors_total": ("Steps and sequences that failed", lambda e: e.errors),
    "engine_heartbeat_age_seconds": ("Since its last turn", lambda e: time.monotonic() - e.beat),
    "prefix_cache_queries_total": ("Prompt tokens looked up", lambda e: e.prefix_queries),
    "prefix_cache_hits_total": ("Prompt tokens found", lambda e: e.prefix_hits),
    "process_resident_bytes": ("Memory of the process", lambda e: resident_bytes())}

class Meters:
    """The counters of a server; `build` are labels that tell what is served."""

    def __init__(self, engine: Engine, build: Mapping[str, str]) -> None:
        self.engine, self.registry = engine, CollectorRegistry()
        own = {"namespace": "ft", "registry": self.registry}
        self.histograms = {
            name: Histogram(name, text, buckets=TOKENS if "_tokens" in name else SECONDS, **own)
            for name, text in HISTOGRAMS.items()}
        self.received = Counter("requests_received", "Requests", **own)
        self.finished = Counter("request_finished", "Requests taken, by end", ["reason"], **own)
        self.rejected = Counter("request_rejected", "Requests refused", ["code"], **own)
        self.tokens = {kind: Counter(f"{kind}_tokens", f"Tokens ({kind})", **own)
                       for kind in ("prompt", "generation")}
        self.connections = Gauge("http_connections", "Open connections", **own)
        self.slow = Counter("slow_client_dropped", "Clients cut off, who did not read", **own)
        self.lost = Counter("lines_lost", "Lines that could not be written", **own)
        Gauge("build_info", "What is served", [*build], **own).labels(**build).set(1)
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """What the engine knows; the registry asks."""
        for name, (text, read) in ENGINE.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield kind(f"ft_{name}", text, value=read(self.engine))

    def observe(self, **values: float) -> None:
        for name, value in values.items():
            self.histograms[name].observe(value)

    def generated(self, prompt: int, generation: int) -> None:
        """Count the tokens of a request."""
        for kind, count in (("prompt", prompt), ("generation", generation)):
            self.tokens[kind].inc(count)
            self.histograms[f"request_{kind}_tokens"].observe(count)

    def ended(self, end: str, seconds: float, *, is_refusal: bool) -> None:
        """Count a request by its end."""
        self.observe(request_seconds=seconds)
        (self.rejected if is_refusal else self.finished).labels(end).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)

def resident_bytes() -> int:
    """Of this process: pages, the second number of statm."""
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * resource.getpagesize()

class Lines:
    """A file to which JSON lines are added (None: standard error); lost ones are counted."""

    def __init__(self, path: Path | None, lost: Counter) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        self.lost, self.file = lost, os.open(path, flags, 0o644) if path else 2

    def write(self, record: Mapping[str, Any]) -> bool:
        """Whether the whole line is written."""
        line = json.dumps(record).encode() + b"\n"
        try:
            is_whole = os.write(self.file, line) == len(line)
        except OSError:
            is_whole = False
        self.lost.inc(not is_whole)
        return is_whole
