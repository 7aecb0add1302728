"""kernels/bench.py with a stand-in for the GPU's clock, and the kernels in the interpreter."""

import csv
import dataclasses
import json
import sys
import tomllib
from contextlib import contextmanager
from types import SimpleNamespace
import pytest
import torch
from tests.kernels import interpreter

interpreter.require()

from kernels import bench, cases, launch  # noqa: E402

SMALL = {
    "rms_norm": [{"N": 5, "C": 8}],
    "swiglu": [{"N": 2, "F": 64}],
    "lora": [{"N": 5, "C": 8, "O": 8, "R": 2}],
}

@pytest.fixture
def clock(monkeypatch, tmp_path) -> list:
    """Small sizes on the CPU, where all take the same time. What would be written stands in a
    folder of the test. Returns what workers were given."""
    ops = {
        name: dataclasses.replace(cases.ops()[name], benches=sizes)
        for name, sizes in SMALL.items()
    }
    monkeypatch.setattr(cases, "ops", lambda: ops)
    monkeypatch.setattr(bench, "ops", lambda: ops)
    monkeypatch.setattr(bench, "CUDA", torch.device("cpu"))
    monkeypatch.setattr(bench, "ceilings", lambda: {"GB/s": 1e-3, "TFLOP/s": 1e-6})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a stand-in")
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)

    def times_ms(calls):
        for call in calls.values():
            call()
        return {name: [1.0, 2.0, 4.0] for name in calls}

    monkeypatch.setattr(bench, "times_ms", times_ms)
    for module, name in ((bench, "CONFIGS_FILE"), (launch, "CONFIGS_FILE"), (bench, "RECORDS")):
        path = tmp_path / getattr(module, name).name
        path.write_bytes(getattr(module, name).read_bytes())
        monkeypatch.setattr(module, name, path)
    tables = {key: dict(rows) for key, rows in launch.configs().items()}
    monkeypatch.setattr(launch, "configs", lambda: tables)
    monkeypatch.setattr(bench, "configs", lambda: tables)

    given = []

    @contextmanager
    def workers():
        """Runs here what processes of their own would, which leave nothing behind."""

        def run(call, items):
            kept = dict(tables)
            given.extend(items)
            found = [call(item) for item in items]
            tables.update(kept)
            return found

        yield SimpleNamespace(map=run)

    monkeypatch.setattr(bench, "workers", workers)
    return given

def test_prints_and_keeps_every_time(clock, monkeypatch, capsys, tmp_path) -> None:
    def absent(**_):
        raise ImportError("no such package")

    rivals = {"rms_norm": {"torch": lambda x_NC, weight_C, **_: x_NC * weight_C, "other": absent}}
    monkeypatch.setitem(sys.modules, "rivals", SimpleNamespace(RIVALS=rivals))
    assert bench.main(["rms_norm", "swiglu", "--record", "--rivals", "rivals"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert "    rms_norm, other: ImportError: no such package" in lines
    found = json.loads(last)["rows"]
    who = ["triton", "eager", "torch", "compile"]
    assert [(row["mode"], row["who"]) for row in found if row["op"] == "rms_norm"] == [
        (mode, name) for mode in ("forward", "backward") for name in who
    ]
    # 2 x 5 x 8 values of 2 bytes in 2 ms
    row = found[0]
    assert (row["p20_us"], row["p50_us"], row["p80_us"]) == (1000.0, 2000.0, 4000.0)
    assert (row["unit"], row["x eager"], row["sizes"]) == ("GB/s", 1.0, "N=5 C=8")
    assert row["%"] == pytest.approx(100 * 2 * 5 * 8 * 2 / 2e-3 * 1e-9 / 1e-3, abs=0.1)
    with (tmp_path / "records.csv").open(encoding="utf-8") as file:
        recorded = [*csv.DictReader(file)][-len(found) :]
    for row, mine in zip(recorded, found, strict=True):
        assert row.pop("date") and row.pop("hardware").startswith("a stand-in, torch ")
        assert row == {name: str(value) for name, value in mine.items()}

def test_tuning_keeps_the_fastest_neighbour_and_the_rest_of_the_file(
    clock, monkeypatch, tmp_path
) -> None:
    def time_ms(op, sizes):
        config = launch.config_of("lora_shrink", sizes["R"], torch.device("cpu"))
        return float("inf") if config["num_warps"] > 4 else 100.0 - config["BLOCK_C"]

    monkeypatch.setattr(bench, "time_ms", time_ms)
    before = tomllib.loads((tmp_path / "configs.toml").read_text("utf-8"))
    start = before["lora_shrink"]["any"]["32"]["BLOCK_C"]
    lora = cases.ops()["lora"]
    small = dataclasses.replace(lora, kernels={"lora_shrink": "R"})
    monkeypatch.setitem(cases.ops(), "lora", small)
    bench.main(["lora", "--tune"])
    text = (tmp_path / "configs.toml").read_text("utf-8")
    after = tomllib.loads(text)
    tuned = after["lora_shrink"].pop("interpreter")
    assert tuned["32"]["BLOCK_C"] == 2 * start and after == before
    assert text.startswith("# Block sizes, warps and stages")
    assert len(clock) == 1 + len(list(bench.neighbours(before["lora_shrink"]["any"]["32"])))
    assert all(set(table) == {32.0, 64.0, 128.0} for table in clock)
    assert [table[32.0]["BLOCK_C"] for table in clock].count(2 * start) == 1

def test_neighbours_are_one_step_away() -> None:
    config = {"BLOCK_N": 1, "num_warps": 32, "num_stages": 1}
    assert list(bench.neighbours(config)) == [
        config | {"BLOCK_N": 2}, config | {"num_warps": 16}, config | {"num_stages": 2}
    ]  # fmt: skip

def test_says_that_there_is_no_gpu(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench.main(["rms_norm"])
    assert "no GPU, and times of the interpreter say nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["norm"])
    assert "no op norm; there are rms_norm, " in capsys.readouterr().err
