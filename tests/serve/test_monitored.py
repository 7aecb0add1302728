"""What a running server tells of its requests: /v1/monitor, and the same in /metrics."""

import asyncio
import json
from pathlib import Path
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ftcore.deploy.http import Exchange
from ftcore.monitor.drift import Finding, Watch
from ftcore.monitor.retrain import _alarms
from tests.serve.conftest import BERT, QWEN3, Asked, Client, Make, serving

THREE = BERT | {"id2label": {"0": "a", "1": "b", "2": "c"}}

def told(ask: Asked) -> tuple[dict, dict[tuple[str, str], float]]:
    """Of both routes, in this process: by name and statistic."""
    x = Exchange(None, None)
    x.reply = lambda status, body, kind: setattr(x, "body", body)
    answer = asyncio.run(ask.api.monitored(x, {}))
    asyncio.run(ask.api.metrics(x, {}))
    assert all(map(str.strip, x.body.decode().splitlines())), "no line is empty"
    families = text_string_to_metric_families(x.body.decode())
    samples = [sample for family in families for sample in family.samples]
    json.dumps(answer, allow_nan=False)
    return answer, {(s.name, s.labels.get("signal", "") + s.labels.get("stat", "")): s.value
                    for s in samples}

def noted(ask: Asked, texts: list[str], start: int) -> None:
    for n, text in enumerate(texts, start=start):
        row = ask.noted("/v1/classify", input=text)
        ask.api.journal.take(json.dumps({**row, "time": float(n), "id": f"{n:024x}"}).encode())

def test_requests_that_moved_are_told_in_both(made: Make) -> None:
    ask = made(THREE, "classify")
    usual = [f"one and the other {n}" for n in range(10)]
    other = [f"question answer question answer to a {n} {n}" for n in range(10)]
    noted(ask, usual, 0)
    ask.api.watch = Watch(ask.api.journal.records * 20, window=5)
    answer, samples = told(ask)
    assert {s["state"] for s in answer["signals"]} == {0} and answer["records"] == 10
    assert samples["ft_retrain_state", ""] == 0 <= samples["ft_seconds_since_train", ""] < 3600
    noted(ask, other, 10)
    answer, samples = told(ask)
    moved = {s["signal"] for s in answer["signals"] if s["state"] == 2}
    assert {"prompt_tokens", "embedding"} <= moved and answer["records"] == 20
    for found in answer["signals"]:
        key = found["signal"] + found["statistic"]
        for name, field in (("statistic", "value"), ("threshold", "bound"), ("state", "state"),
                            ("window_size", "size")):
            assert samples[f"ft_drift_{name}", key] == pytest.approx(found[field])

LOUD = {"drift": ("entropy", "ks"), "labels": ("label", "js"), "vectors": ("embedding", "mmd"),
        "feedback": ("accuracy", "accuracy"), "decay": ("calibration", "ece")}

@pytest.mark.parametrize(("loud", "state"), [
    ([], 0), (["drift"], 1), (["labels", "vectors"], 1), (["drift", "vectors"], 2),
    (["drift", "labels", "decay"], 2), (["feedback"], 2), (["decay"], 1)])
def test_what_asks_for_training_is_what_plan_trains_by(
    made: Make, loud: list[str], state: int
) -> None:
    found = [Finding(*LOUD[name], 500, 0.3, 0.1, 2 if name in loud else 1) for name in LOUD]
    ask = made(THREE, "classify")
    ask.api.watch.look = lambda records: found
    _, samples = told(ask)
    assert samples["ft_retrain_state", ""] == state
    assert bool(_alarms([each._asdict() for each in found], {})) == (state == 2)

def test_feedback_is_told(made: Make) -> None:
    ask = made(THREE, "classify")
    noted(ask, ["one", "and", "other", "the"], 0)
    records = ask.api.journal.records
    _, samples = told(ask)
    assert samples["ft_feedback_coverage_ratio", ""] == 0
    assert ("ft_feedback_accuracy", "") not in samples
    for n, label in ((0, records[0]["label"]), (2, "another"), (3, "another")):
        given = {"request_id": f"{n:024x}", "index": 0, "label": label}
        ask.api.journal.take(json.dumps({"time": 9.0, "id": "f", "feedback": given}).encode())
    _, samples = told(ask)
    assert samples["ft_feedback_coverage_ratio", ""] == 0.75
    assert samples["ft_feedback_accuracy", ""] == pytest.approx(1 / 3)
    mean = np.mean([record["confidence"] for record in records])
    assert samples["ft_quality_estimate", ""] == pytest.approx(mean)

def test_too_few_are_no_figure(made: Make) -> None:
    ask = made(THREE, "classify")
    noted(ask, ["one"], 0)
    ask.api.watch = Watch(ask.api.journal.records * 20, window=5)
    answer, samples = told(ask)
    assert {s["state"] for s in answer["signals"]} == {None}
    assert not [name for name, _ in samples if name == "ft_drift_statistic"]
    assert {value for (name, _), value in samples.items() if name == "ft_drift_window_size"} == {1}

def test_canaries_are_told(made: Make) -> None:
    ask = made(QWEN3, "lm")
    ask.noted("/v1/completions", prompt="one", max_tokens=2)
    answer, samples = told(ask)
    canaries = answer["canaries"]
    assert len(canaries["sha256"]) == 64 and canaries["flips"] == 0
    assert samples["ft_canary_nll", ""] == pytest.approx(canaries["nll"]) and canaries["nll"] > 1
    assert samples["ft_canary_changes_total", ""] == 0

def test_a_server_without_a_reference_counts_its_requests(server: Client) -> None:
    before = server.get("/v1/monitor").json
    assert before["signals"] == [] and before["canaries"]["flips"] == 0
    assert server.complete().status == 200
    after = server.get("/v1/monitor").json
    assert after["records"] > before["records"] and after["canaries"]["flips"] == 0
    assert server.post("/v1/monitor", {}).status == 405

def test_a_served_run_is_watched_beside_its_reference(decoder: Path, tmp_path: Path) -> None:
    """The rows of a log are those that the reference has; so the figures of a run's own rows do
    not move, and others do."""
    with serving(decoder, tmp_path / "one") as client:
        for n in range(24):
            client.complete(prompt="one " * (1 + n % 3))
    rows = [row for line in map(json.loads, client.log.read_text().splitlines())
            for row in line.get("rows", ())]
    folder = tmp_path / "model"
    folder.mkdir()
    for file in decoder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "reference.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 10))
    with serving(folder, tmp_path / "two") as client:
        told = client.get("/v1/monitor").json
        sizes = {s["signal"]: s["size"] for s in told["signals"]}
        assert {"prompt_tokens", "embedding", "logprob"} <= sizes.keys()
        assert {*sizes.values()} == {0}
        client.complete()
        told = client.get("/v1/monitor").json
        assert {s["size"] for s in told["signals"]} == {1} and told["records"] == 1
        metrics = client.metrics()
        assert metrics["ft_drift_window_size"] == len(told["signals"])
        assert 0 < metrics["ft_seconds_since_train"] < 600

def test_embeddings_stand_in_the_log_of_each_kind(made: Make) -> None:
    rows = made(THREE, "classify").noted("/v1/classify", input=["one", "two"])["rows"]
    assert [len(row["embedding"]) for row in rows] == [88, 88]
    assert rows[0]["embedding"] != rows[1]["embedding"]
