"""Checkpoints survive kills, full disks and damage; what is read is what was written."""

import errno
import json
import logging
import math
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
import pytest
import torch
from torch import Tensor
from ftcore.errors import CheckpointError
from ftcore.tune import checkpoint
from ftcore.tune.checkpoint import Checkpoints, load

ROOT = Path(checkpoint.__file__).parents[2]

def tensors_of(step: int, size: int = 50) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    weight_CC = torch.randn(size, size, generator=generator)
    return {
        "model": {"trunk.layers.0.q_proj.weight": weight_CC.bfloat16()},
        "optimizer": {"exp_avg.0.q_proj.weight": weight_CC, "step": torch.tensor(step)},
    }

def save_all(checkpoints: Checkpoints, *steps: int, best: int = 0) -> None:
    for step in steps:
        checkpoints.save(step, tensors_of(step), {"epoch": 0}, best)

def assert_is(loaded: checkpoint.Loaded | None, step: int) -> None:
    assert loaded is not None and loaded.step == step
    assert_equal(loaded.tensors, tensors_of(step))

def assert_equal(got: dict[str, dict[str, Tensor]], want: dict[str, dict[str, Tensor]]) -> None:
    assert {group: set(named) for group, named in got.items()} == {
        group: set(named) for group, named in want.items()
    }
    for group, named in want.items():
        for name, tensor in named.items():
            other = got[group][name]
            assert other.dtype == tensor.dtype and other.shape == tensor.shape
            bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (other, tensor)]
            assert torch.equal(*bits), name

def test_tensors_and_state_come_back_bit_equal(tmp_path: Path) -> None:
    odd = torch.tensor([math.nan, -0.0, math.inf, 1e-45, 1 / 3])
    tensors = {
        "model": {
            "a.b.weight": odd.bfloat16(),
            "scalar": torch.tensor(3.5),
            "empty": torch.zeros(0, 4),
        },
        "optimizer": {"step": torch.tensor(2**62), "fp64": odd.double(), "half": odd.half()},
        "rng": {"cpu": torch.get_rng_state()},
        "none": {},
    }
    state = {"epoch": 2, "best": -math.inf, "loss_scale": 0.1 + 0.2, "name": "gr\u00fcn", "x": None}
    Checkpoints(tmp_path, keep_last=1).save(7, tensors, state)
    loaded = Checkpoints(tmp_path, keep_last=1).latest()
    assert loaded.step == 7 and loaded.state == {**state, "step": 7}
    assert_equal(loaded.tensors, tensors)
    folder = tmp_path / "checkpoints" / "step-7"
    assert sorted(os.listdir(folder)) == [
        "manifest.json", "model.safetensors", "none.safetensors", "optimizer.safetensors",
        "rng.safetensors", "state.json",
    ]  # fmt: skip
    assert (folder / "model.safetensors").stat().st_mode & 0o400

def test_loaded_tensors_do_not_hang_on_the_file(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save_all(checkpoints, 1)
    loaded = checkpoints.latest()
    # a mapped tensor would now be SIGBUS
    os.truncate(checkpoints.folder / "step-1" / "optimizer.safetensors", 0)
    assert_is(loaded, 1)

def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path, keep_last=1).latest() is None

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")

@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_falls_back_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    save_all(checkpoints, 5, 10)
    path = tmp_path / "checkpoints" / "step-10" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert_is(checkpoints.latest(), 5)
    (record,) = caplog.records
    assert f"step 10 is refused: {path}" in record.message

def test_when_none_is_good_the_run_does_not_start_from_zero(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    save_all(checkpoints, 5, 10)
    (tmp_path / "checkpoints" / "step-5" / "model.safetensors").unlink()
    (tmp_path / "checkpoints" / "step-10" / "manifest.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        checkpoints.latest()
    assert "step-10/manifest.json is missing" in str(caught.value)
    assert "step-5/model.safetensors is missing" in str(caught.value)

def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    save_all(checkpoints, 1, 2, 3, 10, 9_000, best=1)
    assert checkpoints.steps() == [9_000, 10, 1]
    assert_is(load(checkpoints.of(1)), 1)
    assert_is(checkpoints.latest(), 9_000)
    save_all(checkpoints, 9_001, best=10)
    assert checkpoints.steps() == [9_001, 9_000, 10]

def test_nothing_is_deleted_before_the_new_one_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save_all(checkpoints, 1)
    rename = os.rename

    def lying_disk(source: Path, target: Path) -> None:
        rename(source, target)
        (target / "model.safetensors").write_bytes(b"not what was written")

    monkeypatch.setattr(os, "rename", lying_disk)
    with pytest.raises(CheckpointError, match="step-2/model.safetensors"):
        save_all(checkpoints, 2)
    assert_is(checkpoints.latest(), 1)

def test_after_a_fall_back_the_refused_step_cannot_push_out_the_good_ones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save_all(checkpoints, 20)
    shutil.copytree(tmp_path / "checkpoints" / "step-20", tmp_path / "checkpoints" / "step-30")
    (tmp_path / "checkpoints" / "step-30" / "state.json").write_text("{}")
    save_all(checkpoints, 21)
    assert checkpoints.steps() == [21]

def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    save_all(checkpoints, 1, 2)
    (tmp_path / "checkpoints" / "step-2" / "state.json").write_text("{}")
    assert checkpoints.latest().step == 1
    save_all(checkpoints, 2)
    assert_is(checkpoints.latest(), 2)

def test_a_prune_that_was_killed_is_finished_by_the_next(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    save_all(checkpoints, 1, 2)
    (tmp_path / "checkpoints" / "step-1" / "manifest.json").unlink()
    save_all(checkpoints, 3)
    assert checkpoints.steps() == [3, 2]

def test_a_failed_save_is_counted_and_costs_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save_all(checkpoints, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
    try:
        for step in (2, 3):
            with pytest.raises(CheckpointError, match=f"step-{step}: .*File too large"):
                save_all(checkpoints, step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoints.failed_in_a_row == 2
    assert os.listdir(tmp_path / "checkpoints") == ["step-1"]
    assert_is(checkpoints.latest(), 1)
    save_all(checkpoints, 4)
    assert checkpoints.failed_in_a_row == 0

def test_a_full_disk_at_each_write_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save_all(checkpoints, 1)
    number_of_calls = 0
    for failing in range(100):
        calls = iter(range(10**6))
        with monkeypatch.context() as patch:
            for owner, name in ((checkpoint, "save_file"), (Path, "write_text"), (os, "fsync")):
                original = getattr(owner, name)

                def call(*args, original=original, calls=calls, failing=failing, **kwargs):
                    if next(calls) == failing:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    return original(*args, **kwargs)

                patch.setattr(owner, name, call)
            try:
                save_all(checkpoints, 2)
                break
            except CheckpointError as error:
                number_of_calls += 1
                assert "step-2: [Errno 28] No space left on device" in str(error)
        left = os.listdir(tmp_path / "checkpoints")
        if "step-2" in left:  # the last fsync, of the parent: it is there, but for how long?
            assert next(calls) == failing + 1
            shutil.rmtree(tmp_path / "checkpoints" / "step-2")
        assert sorted(left)[:1] == ["step-1"]
        assert_is(checkpoints.latest(), 1)
    assert number_of_calls == 10
    assert_is(checkpoints.latest(), 2)

# Forks savers from one warm process, kills each at a random moment, and checks what it left.
KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from ftcore import files
from ftcore.tune.checkpoint import Checkpoints, load

def save_until_killed(pipe, checkpoints, step):
    weight = torch.randn(100, 100)
    while True:
        step += 1
        tensors = {"model": {"w": weight + step}, "optimizer": {"m": weight - step}}
        best = step - step % 3
        state = {"sum": float((weight + step).sum()), "best": best}
        checkpoints.save(step, tensors, state, best)
        os.write(pipe, b"saved %d\\n" % step)

checkpoints, pace = Checkpoints(Path(sys.argv[1]), keep_last=2), random.Random(0)
promised, during = {"saved": 1}, 0
checkpoints.save(1, {"model": {"w": torch.ones(1)}}, {"sum": 1.0, "best": 0})
for _ in range(100):
    files.clean(checkpoints.folder.parent)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        save_until_killed(writer, checkpoints, promised["saved"])
    os.close(writer)
    time.sleep(pace.uniform(0.005, 0.060))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reader) as lines:
        promised |= {kind: int(step) for kind, step in (line.split() for line in lines)}
    during += any(checkpoints.folder.glob(".*"))
    loaded = checkpoints.latest()
    assert loaded.step >= promised["saved"], (loaded.step, promised)
    assert float(loaded.tensors["model"]["w"].sum()) == loaded.state["sum"]
    if best := loaded.state["best"]:
        assert load(checkpoints.of(best)).step == best
    promised["saved"] = loaded.step
print(json.dumps({"step": promised["saved"], "during": during}))
"""

def test_one_hundred_kills_during_saves_never_cost_a_saved_step(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLER, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "refused" not in result.stderr
    seen = json.loads(result.stdout)
    assert seen["during"] > 10, f"the kills missed the saves: {seen}"
    assert load(tmp_path / "checkpoints" / f"step-{seen['step']}").step == seen["step"]
