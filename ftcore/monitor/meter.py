"""Monitoring inside a server: its newest requests beside the reference, for /v1/monitor, /metrics.

It holds two windows, and looks in a thread of its own whenever a fifth of one has come."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric

from ftcore.deploy.http import METERS
from ftcore.deploy.records import Record
from ftcore.monitor.drift import STATES, Finding, Watch, wilson
from ftcore.monitor.journal import Journal

class Monitor:
    """`hear` takes the lines of the log, `told` is for people, `collect` for Prometheus."""

    def __init__(self, reference: Sequence[Record], window: int, model: str) -> None:
        self.watch, self.journal = Watch(reference, window=window), Journal(model, 2 * window)
        self.window, self.fresh, self.lock = window, 0, Lock()
        self.findings: list[Finding] = []
        self.thread = ThreadPoolExecutor(1)
        self.thread.submit(self.watch.look, reference)  # draws what equal data gives

    def hear(self, line: Mapping[str, Any]) -> None:
        if "rows" in line or "feedback" in line:
            with self.lock:
                self.journal.add(line)
            self.fresh += len(line.get("rows", ()))
            if self.fresh >= self.window / 5:
                self.fresh = 0
                self.thread.submit(self._look)

    def _look(self) -> None:
        with self.lock:
            records = [*map(dict, self.journal.records)]
        self.findings = self.watch.look(records)

    def told(self) -> dict[str, Any]:
        with self.lock:
            newest = [*self.journal.records][-self.window :]
        rights = [record["right"] for record in newest if "right" in record]
        low, high = wilson(sum(rights), len(rights))
        return {"window": self.window, "requests": len(newest), "counts": {**self.journal.counts},
                "feedback": {"rows": len(rights), "right": sum(rights), "low": low, "high": high},
                "findings": [{key: x for key, x in f._asdict().items() if x == x}  # no NaN
                             | {"state": STATES[f.state]} for f in self.findings]}

    def collect(self) -> Iterator[Metric]:
        told = self.told()
        for name, column in (("statistic", "value"), ("threshold", "bound"), ("state", "state")):
            text, labels = METERS["monitor"][name], ("signal", "stat")
            family = GaugeMetricFamily(f"ft_drift_{name}", text, labels=labels)
            for finding in (f for f in self.findings if f.state is not None):
                family.add_metric((finding.signal, finding.statistic), getattr(finding, column))
            yield family
        count, (rows, right, *_) = told["requests"], told["feedback"].values()
        values = {"drift_window_size": count, "feedback_accuracy": right / max(1, rows),
                  "feedback_coverage_ratio": rows / max(1, count)}
        for name, value in values.items():
            yield GaugeMetricFamily(f"ft_{name}", METERS["monitor"][name], value=value)
