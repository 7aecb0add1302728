"""What the server counts, for Prometheus (meters.toml). Labels come from closed sets alone."""

import resource
import time
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ftcore.deploy.engine import Engine

TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))

class Meters(dict):
    """Counters, gauges and histograms by name, and a `registry` of them and of the engine's."""
    __hash__ = object.__hash__  # the registry asks for it

    def __init__(self, engine: Engine, model_hash: str) -> None:
        self.engine, self.registry = engine, CollectorRegistry()
        own = {"namespace": "ft", "registry": self.registry}
        for name, text in TABLE["histograms"].items():
            buckets = TABLE["buckets"]["tokens" if "_tokens" in name else "seconds"]
            self[name] = Histogram(name, text, buckets=buckets, **own)
        for kind, table in ((Counter, TABLE["counters"]), (Gauge, TABLE["gauges"])):
            self.update({name: kind(name, *told, **own) for name, told in table.items()})
        self["build_info"].labels(version("ftcore"), model_hash).set(1)
        self["process_resident_bytes"].set_function(resident_bytes)
        self["engine_heartbeat_age_seconds"].set_function(lambda: time.monotonic() - engine.beat)
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """What the engine knows; the registry asks."""
        for attribute, (name, text) in TABLE["engine"].items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield kind(f"ft_{name}", text, value=getattr(self.engine, attribute))

def resident_bytes() -> int:
    """Of this process: pages, the second number of statm."""
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * resource.getpagesize()
