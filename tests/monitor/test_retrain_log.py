"""Decisions of the retraining loop as functions and as lines, without any model."""

from pathlib import Path
from typing import Any

import pytest

from ftcore.errors import CheckpointError
from ftcore.monitor.retrain import Limits, Registry, decide, judge, writing

def finding(signal: str, state: int | None, statistic: str = "psi") -> dict[str, Any]:
    return {"signal": signal, "statistic": statistic, "value": 0.5, "bound": 0.1, "state": state}

CALM = {"first": [], "known": [], "findings": [], "labelled": 200, "hours": 24.0, "days": 1.0}
TWO = [finding("length", 2), finding("entropy", 2)]

@pytest.mark.parametrize(("inputs", "answer"), [
    ({}, "wait"),
    ({"findings": TWO}, "propose"),
    ({"findings": TWO[:1]}, "wait"),
    ({"findings": [TWO[0], finding("entropy", 1)]}, "wait"),
    ({"findings": [TWO[0], finding("entropy", None)]}, "wait"),
    ({"findings": [TWO[0], finding("length", 2, "js"), finding("length", 1, "ks")]}, "wait"),
    ({"findings": [finding("right", 2, "accuracy")]}, "propose"),
    ({"findings": [finding("right", 1, "accuracy")]}, "wait"),
    ({"days": 90.1}, "propose"),
    ({"days": 90.1, "labelled": 199}, "wait"),
    ({"findings": TWO, "hours": 23.9}, "wait"),
    ({"findings": TWO, "hours": -5.0}, "wait"),  # the clock was put back
    ({"first": TWO}, "rollback"),
    ({"first": TWO, "labelled": 0, "hours": 0.0}, "rollback"),
    ({"first": TWO, "known": ["length"]}, "wait"),  # it moved before there was this model
    ({"first": [finding("right", 2, "accuracy")], "known": ["right"]}, "rollback"),
])  # fmt: skip
def test_what_is_decided(inputs: dict[str, Any], answer: str) -> None:
    told, reasons = decide({**CALM, **inputs}, Limits())
    assert told == answer and reasons

@pytest.mark.parametrize(("low", "difference", "answer"), [
    (0.001, 0.0, "pass"), (0.0, 0.1, "fail"), (0.2, -0.01, "pass"), (0.2, 0.99 - 1.0, "pass"),
    (0.2, -0.0101, "fail"),
])  # fmt: skip
def test_what_passes_the_gate(low: float, difference: float, answer: str) -> None:
    part = {"rows": 9, "low": low, "high": 0.5, "p": 0.1, "difference": 0.3}
    frozen = {**part, "difference": difference}
    assert judge({"recent": part, "frozen": frozen, "most_lost": 0.01})[0] == answer

def test_an_altered_line_is_named(tmp_path: Path) -> None:
    with writing(tmp_path) as registry:
        for number in range(5):
            registry.append("note", number=number)
        with pytest.raises(CheckpointError, match="held by another writer"), writing(tmp_path):
            pass
    log = tmp_path / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    assert len(Registry(tmp_path).lines) == 5
    for number, line in enumerate(lines, start=1):
        for place in (2, len(line) // 2, len(line) - 5):
            bad = bytearray(line)
            bad[place] ^= 1
            log.write_bytes(b"".join([*lines[: number - 1], bytes(bad), *lines[number:]]))
            with pytest.raises(CheckpointError, match=f"log.jsonl, line {number}: was altered"):
                Registry(tmp_path)
        log.write_bytes(b"".join([*lines[: number - 1], *lines[number:]]))
        if number < 5:
            with pytest.raises(CheckpointError, match=f"line {number}: .* is lost"):
                Registry(tmp_path)

def test_a_line_that_was_cut_is_no_line(tmp_path: Path) -> None:
    with writing(tmp_path) as registry:
        registry.append("promote", model="1")
    log = tmp_path / "log.jsonl"
    whole = log.read_bytes()
    with writing(tmp_path) as registry:
        registry.append("promote", model="2")
    longer = log.read_bytes()
    for size in range(len(whole), len(longer)):
        log.write_bytes(longer[:size])
        assert Registry(tmp_path).active() == "1"
    with writing(tmp_path) as registry:
        registry.append("promote", model="3")
    assert [line["model"] for line in Registry(tmp_path).lines] == ["1", "3"]
