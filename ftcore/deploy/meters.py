"""What the server counts, for Prometheus (meters.toml), and files of JSON lines.

Labels come from closed sets, never from requests.
"""

import json
import os
import resource
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ftcore.deploy.engine import Engine

SECONDS = (.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300)
TOKENS = tuple(2**power for power in range(16))
TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))

class Meters:
    """The counters and histograms, by name; `build` are labels that tell what is served."""

    def __init__(self, engine: Engine, build: Mapping[str, str]) -> None:
        self.engine, self.registry = engine, CollectorRegistry()
        own = {"namespace": "ft", "registry": self.registry}
        self.counters = {k: Counter(k, text, **own) for k, text in TABLE["counters"].items()}
        self.histograms = {
            name: Histogram(name, text, buckets=TOKENS if "_tokens" in name else SECONDS, **own)
            for name, text in TABLE["histograms"].items()}
        self.finished = Counter("request_finished", "Requests taken, by end", ["reason"], **own)
        self.rejected = Counter("request_rejected", "Requests refused", ["code"], **own)
        self.connections = Gauge("http_connections", "Open connections", **own)
        Gauge("build_info", "What is served", [*build], **own).labels(**build).set(1)
        age = Gauge("engine_heartbeat_age_seconds", "Since the engine's last turn", **own)
        age.set_function(lambda: time.monotonic() - engine.beat)
        memory = Gauge("process_resident_bytes", "Memory of the process", **own)
        memory.set_function(resident_bytes)
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """What the engine knows; the registry asks."""
        for attribute, (name, text) in TABLE["engine"].items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield kind(f"ft_{name}", text, value=getattr(self.engine, attribute))

    def generated(self, prompt: int, generation: int) -> None:
        """Count the tokens of a request."""
        for name, count in (("prompt_tokens", prompt), ("generation_tokens", generation)):
            self.counters[name].inc(count)
            self.histograms[f"request_{name}"].observe(count)

    def text(self) -> bytes:
        return generate_latest(self.registry)

def resident_bytes() -> int:
    """Of this process: pages, the second number of statm."""
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * resource.getpagesize()

class Lines:
    """A file to which JSON lines are added (None: standard error); lost ones are counted."""

    def __init__(self, path: Path | None, meters: Meters) -> None:
        self.lost, flags = meters.counters["lines_lost"], os.O_WRONLY | os.O_APPEND | os.O_CREAT
        self.file = os.open(path, flags, 0o644) if path else 2

    def write(self, record: Mapping[str, Any]) -> bool:
        """Whether the whole line is written."""
        line = json.dumps(record).encode() + b"\n"
        try:
            is_whole = os.write(self.file, line) == len(line)
        except OSError:
            is_whole = False
        self.lost.inc(not is_whole)
        return is_whole
