"""A run's folder read back: its page, and where two runs part. Everything comes from its files."""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from ftcore import files
from ftcore.cli import CONFIG_FILE
from ftcore.data import store
from ftcore.env.run import METRICS, read_metrics
from ftcore.errors import ConfigError
from ftcore.evaluate.metrics import ClassificationMetrics
from ftcore.evaluate.probabilities import reliability

WIDTH, HEIGHT, POINTS = 600, 150, 300  # of a curve, in units of its drawing and in points
CURVES = (  # the metrics drawn together
    ("train/loss", "eval/loss"), ("train/grad_norm",), ("train/lr",), ("train/loss_deviation",),
    ("perf/tokens_per_s",), ("perf/peak_mem_gib",),
)  # fmt: skip
MOST_CLASSES = 30  # of a matrix of confusions that is drawn
Run = Mapping[str, Any]  # a folder's files by name, parsed; those that it lacks are empty

def read_run(folder: Path) -> Run:
    """Raises ConfigError: it is no run folder."""
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"{folder} is no run folder: it has no {CONFIG_FILE}")
    run: dict[str, Any] = {"folder": folder, "metrics": read_metrics(folder / METRICS)}
    for name in ("run", "plan", "eval", "base", "certificate"):
        file = folder / f"{name}.json"
        run[name] = json.loads(file.read_bytes()) if file.is_file() else {}
    run["data"] = store.read_account(folder / "data")
    for name in ("predictions", "base-predictions", "openings"):
        file = folder / f"{name}.jsonl"
        run[name] = [*map(json.loads, file.read_bytes().splitlines())] if file.is_file() else []
    text = (folder / CONFIG_FILE).read_text("utf-8")
    run["config"] = dict(_flat(tomllib.loads(text)))
    run["asked"] = re.findall(r"^(\w+ = .*?)  # (?!default$)(.*)$", text, re.M)
    run["skipped"] = sorted(file.name for file in folder.glob("skipped-step-*.json"))
    return run

def write_page(folder: Path) -> Path:
    """RUN/report.html, which needs no other file and no network."""
    run = read_run(folder)
    curves = [found for names in CURVES if (found := curve(run["metrics"], names))]
    shown = {**run["data"], **run, "where": folder, "curves": curves, **judged(run)}
    page = store.rendered("run.html", Path(__file__).parent, **shown)
    files.write_file(folder / "report.html", page)
    return folder / "report.html"

def curve(metrics: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, Any] | None:
    """Lines of some metrics over the steps, as points of an SVG; None where there are none. Of many
    steps each point is a mean."""
    found = {n: [(m["step"], m[n]) for m in metrics if m.get(n) is not None] for n in names}
    found = {name: np.array(pairs, dtype=float) for name, pairs in found.items() if pairs}
    if not found:
        return None
    every_N2 = np.concatenate([*found.values()])
    low, high = every_N2.min(0), every_N2.max(0)
    lines = {}
    for name, pairs_N2 in found.items():
        parts = np.array_split(pairs_N2, min(POINTS, len(pairs_N2)))
        places = (np.array([part.mean(0) for part in parts]) - low) / np.maximum(high - low, 1e-30)
        lines[name] = " ".join(f"{WIDTH * x:.1f},{HEIGHT * (1 - y):.1f}" for x, y in places)
    last = {name: pairs_N2[-1, 1] for name, pairs_N2 in found.items()}
    return {"lines": lines, "last": last, "low": low.tolist(), "high": high.tolist()}

def judged(run: Run) -> dict[str, Any]:
    """Confusions and reliability from predicted classes; answers beside those of the base model."""
    base = {row["row_id"]: row["predicted"] for row in run["base-predictions"]}
    answers = [{"base": base.get(r["row_id"]), **r} for r in run["predictions"] if "prompt" in r]
    rows = [row for row in run["predictions"] if "label" in row and "probabilities" in row]
    if not rows:
        return {"answers": answers[:: max(1, len(answers) // 20)]}
    labels = json.loads((run["folder"] / "labels.json").read_bytes())
    target_B, predicted_B = (
        np.array([labels.index(row[key]) for row in rows]) for key in ("label", "predicted")
    )
    metrics = ClassificationMetrics(labels)
    metrics.update(target_B, predicted_B)
    bins = reliability(target_B, np.array([row["probabilities"] for row in rows]))
    is_small = len(labels) <= MOST_CLASSES
    confusion = {"labels": labels, "counts": metrics.confusion_KK.tolist()} if is_small else {}
    return {"answers": [], "confusion": confusion, "reliability": bins}

def differences(one: Path, other: Path) -> Iterator[str]:
    """What two runs were asked, what they ran on and read, and the first step where they part."""
    runs = read_run(one), read_run(other)
    parts = {"configuration": [run["config"] for run in runs]}
    starts = [run["run"]["starts"][-1] for run in runs]
    names = "commit", "versions", "hardware"
    parts["code and machine"] = [dict(_flat({n: each[n] for n in names})) for each in starts]
    found = [run["data"] for run in runs]
    parts["data"] = [{"key": f["key"], **dict(_flat(f["statistics"]))} for f in found]
    for what, (mine, theirs) in parts.items():
        keys = [key for key in mine | theirs if mine.get(key) != theirs.get(key)]
        yield f"{what}: {len(keys) or 'nothing'} differs"
        yield from (f"  {key}: {mine.get(key)!r} | {theirs.get(key)!r}" for key in keys)
    lines = [
        [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in run["metrics"]]
        for run in runs
    ]
    for mine, theirs in zip_longest(*lines, fillvalue={}):
        if mine != theirs:
            yield f"they part in step {mine.get('step', theirs.get('step'))} of {METRICS}"
            keys = [key for key in mine | theirs if mine.get(key) != theirs.get(key)]
            yield from (f"  {key}: {mine.get(key)} | {theirs.get(key)}" for key in keys)
            return
    yield f"all {len(lines[0])} lines of {METRICS} are equal, perf/ aside"

def _flat(tables: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values by dotted names."""
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
