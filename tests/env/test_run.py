"""The run folder: one writer, honest records, metrics that resume without a seam."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
import pytest
from ftcore.env import run as run_module
from ftcore.env.run import RunFolder, read_metrics
from ftcore.errors import CheckpointError, ConfigError, DataError

ROOT = Path(run_module.__file__).parents[2]

HOLDER = """
import sys, time
from ftcore.env.run import RunFolder
run = RunFolder(sys.argv[1])
print("ready", flush=True)
time.sleep(60)
"""

def test_a_new_folder_records_what_it_ran_on(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "runs" / "a") as run:
        (start,) = json.loads((run.path / "run.json").read_text())["starts"]
    assert start["command"] == sys.argv
    assert {"python", "torch", "numpy", "tokenizers", "safetensors"} <= set(start["versions"])
    assert start["hardware"]["cpu_count"] == os.cpu_count() and start["hardware"]["cpu"]
    assert start["time"].endswith("+00:00")
    assert start["commit"] is None or len(start["commit"].removesuffix("-dirty")) == 40

def test_a_folder_in_use_is_refused_unless_resumed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to resume: .*/a has no run.json"):
        RunFolder(tmp_path / "a", resume=True)
    RunFolder(tmp_path / "a").close()
    RunFolder(tmp_path / "a").close()  # nothing is lost by beginning anew
    with RunFolder(tmp_path / "a") as run:
        run.dump("config.json", {})
    with pytest.raises(ConfigError, match="not empty: .* --resume .*/a"):
        RunFolder(tmp_path / "a")
    RunFolder(tmp_path / "a", resume=True).close()
    assert len(json.loads((tmp_path / "a" / "run.json").read_text())["starts"]) == 2

def test_a_second_writer_is_refused_and_a_dead_one_replaced(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "a")]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "ready\n"
        with pytest.raises(CheckpointError, match=f'held by another writer .*"pid": {holder.pid}'):
            RunFolder(tmp_path / "a", resume=True)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    first = RunFolder(tmp_path / "a", resume=True)
    with first, pytest.raises(CheckpointError, match=f'"pid": {os.getpid()}'):
        RunFolder(tmp_path / "a", resume=True)
    RunFolder(tmp_path / "a", resume=True).close()

def test_leftovers_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    RunFolder(tmp_path / "a").close()
    (tmp_path / "a" / "checkpoints" / ".tmp-step-3-77").mkdir(parents=True)
    RunFolder(tmp_path / "a", resume=True).close()
    assert os.listdir(tmp_path / "a" / "checkpoints") == []

def test_dump_writes_one_json_file_and_says_where(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a") as run:
        path = run.dump("skipped-step-3.json", {"rows": ["r1"], "loss": "nan"})
    assert path == tmp_path / "a" / "skipped-step-3.json"
    assert json.loads(path.read_text()) == {"rows": ["r1"], "loss": "nan"}

def test_metrics_and_tensorboard_carry_the_same_names(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a") as run:
        run.log(1, {"train/loss": 2.5, "train/grad_norm": math.inf})
        run.log(2, {"train/loss": math.nan})
    text = (tmp_path / "a" / "metrics.jsonl").read_text()
    assert text == (
        '{"step": 1, "train/loss": 2.5, "train/grad_norm": null}\n{"step": 2, "train/loss": null}\n'
    )
    points = tensorboard_points(tmp_path / "a")
    assert points["train/loss"][0] == (1, 2.5) and math.isnan(points["train/loss"][1][1])
    assert points["train/grad_norm"] == [(1, math.inf)]

def tensorboard_points(run: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}

def test_resume_forgets_what_came_after_the_loaded_step(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a") as run:
        for step in range(1, 6):
            run.log(step, {"train/loss": float(step)})
    path = tmp_path / "a" / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 6, "train/lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5]

    with RunFolder(tmp_path / "a", resume=True) as run:
        run.trim(3)
        for step in (4, 5):
            run.log(step, {"train/loss": float(step)})
        run.sync()
        assert path.read_bytes() == whole
    assert tensorboard_points(tmp_path / "a")["train/loss"] == [(s, float(s)) for s in range(1, 6)]

def test_every_cut_of_the_last_line_is_ignored(tmp_path: Path) -> None:
    path, first = tmp_path / "metrics.jsonl", b'{"step": 1, "a": 1.0}\n'
    second = b'{"step": 2, "a": 2.0}\n'
    for length in range(len(second)):
        path.write_bytes(first + second[:length])
        assert read_metrics(path) == [{"step": 1, "a": 1.0}]
    path.write_bytes(first[:-3] + b"\n" + second)
    with pytest.raises(DataError, match="metrics.jsonl, line 1"):
        read_metrics(path)

def test_a_resumed_run_must_be_trimmed_before_it_logs(tmp_path: Path) -> None:
    RunFolder(tmp_path / "a").close()
    with RunFolder(tmp_path / "a", resume=True) as run:
        with pytest.raises(AssertionError, match="trimmed"):
            run.log(1, {"train/loss": 1.0})
        run.trim(-1)
        run.log(1, {"train/loss": 1.0})

def test_outside_a_checkout_the_commit_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))
    assert run_module.describe_start()["commit"] is None
