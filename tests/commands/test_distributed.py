"""train.py under torchrun: two processes are one, stop together, and end where one dies."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ftcore.env.run import read_metrics
from ftcore.tune.checkpoint import load

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[dict[str, Any], str]]
# Without it AdamW makes full steps of rounding where the gradient is zero, as of a key's bias.
STEADY = ("--optim.eps", "1e-4")
KEPT = ("--loop.log-every", "1", "--loop.save-every", "1", "--loop.keep-last", "99")

# Several commands in one start, since each costs seconds; each may be disturbed in a step, thus:
# stop and kill end the second process, by signals; full is a disk that takes no checkpoint.
RANKS = """
import json, os, signal, sys
from contextlib import nullcontext
import train
from ftcore.env import compute
from ftcore.errors import CheckpointError
from ftcore.tune.checkpoint import Checkpoints
from ftcore.tune.loop import Loop

def refuse(*args):
    raise CheckpointError("the disk is full")

rank, step, save, codes = int(os.environ["RANK"]), Loop._step, Checkpoints.save, []
started = compute.joined("cpu")
world = started.__enter__()
compute.joined = lambda device: nullcontext(world)  # once for all commands
for disturbed, words in json.loads(sys.argv[1]):
    seen = []
    def disturbed_step(self, workers):
        if rank == 1 and self.progress.step == 1 and disturbed in ("stop", "kill"):
            os.kill(os.getpid(), signal.SIGTERM if disturbed == "stop" else signal.SIGKILL)
        seen.append(self.progress.step)
        return step(self, workers)
    def refused_save(self, *args):
        self.failed_in_a_row += 1
        refuse()
    Loop._step = disturbed_step
    Checkpoints.save = refused_save if disturbed == "full" else save
    codes.append((train.main(words), len(seen)))
    with open(f"rank-{rank}.json", "w") as file:
        json.dump(codes, file)
started.__exit__(None, None, None)
"""

def torchrun(*commands: tuple[str, list[str]]) -> subprocess.CompletedProcess[str]:
    """Run the commands, each disturbed as it says, in two processes."""
    Path("ranks.py").write_text(RANKS)
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "ranks.py"]
    return subprocess.run(
        [sys.executable, *words, json.dumps(commands)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip

def codes(rank: int) -> list[list[int]]:
    """Exit code of each command in one process, and its steps."""
    return json.loads(Path(f"rank-{rank}.json").read_text())

def named(words: list[str], name: str, *more: str) -> list[str]:
    """The command as another run."""
    place = words.index("--log.name") + 1
    return [*words[:place], name, *words[place + 1 :], *more]

def weights(run: str) -> dict[str, Tensor]:
    (file,) = (path for kind in ("model", "adapter") for path in Path("runs", run, kind).glob("*s"))
    return load_file(file)

def metrics(run: str) -> list[dict[str, Any]]:
    lines = read_metrics(Path("runs", run, "metrics.jsonl"))
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]

def assert_same(run: str, other: str) -> None:
    """The same gradient in the first step, weights in the end, and lines but for rounding."""
    first = [load(Path("runs", name, "checkpoints/step-1")).tensors for name in (run, other)]
    largest = max(g.norm() for g in first[0]["exp_avg"].values())
    for name, ours in first[0]["exp_avg"].items():
        error = (ours - first[1]["exp_avg"][name]).norm()
        assert error <= 1e-6 * max(ours.norm(), 1e-3 * largest), name
    mine, theirs = weights(run), weights(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-6)
    assert len(metrics(run)) == len(metrics(other)) >= 3
    for line, same in zip(metrics(run), metrics(other), strict=True):
        assert line == pytest.approx(same, rel=2e-6)

def cut(run: str, name: str, step: int) -> list[str]:
    """A copy of a run that was killed after a step; returns the command that continues it."""
    folder = Path(shutil.copytree(Path("runs", run), Path("runs", name)))
    for later in (folder / "checkpoints").glob("step-*"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)
    shutil.rmtree(folder / "model")
    return ["--resume", str(folder)]

def test_two_processes_are_one(classify: list[str], sft: list[str], run: Run) -> None:
    """Rows of uneven weight and length, a last step with fewer rows than processes (one), several
    streams a step; a dev file that stops and chooses; resumed with another number of processes; and
    whatever ends one ends the other, in the same step."""
    classify = [*classify, *STEADY, *KEPT]
    drops = ("--peft.dropout", "0.2", "--optim.batch-size", "5", "--loop.epochs", "2", *STEADY)
    small = ("--loop.micro-batch-tokens", "120", "--loop.eval-every", "3", "--loop.patience", "2")
    chat = [*sft, *drops, *small, *KEPT, "--eval.max-new-tokens", "1"]
    run("train", *named(classify, "one"))
    # The noise of dropout is that of a share: here the other one is a forked process's.
    run("train", *named(chat, "chat", "--env.threads", "2"))
    commands = [named(classify, "two"), named(chat, "chats"), cut("one", "one-then-two", 2)]
    disturbed = [(how, named(classify, how)) for how in ("stop", "full", "kill")]
    result = torchrun(*(("", words) for words in commands), *disturbed)
    run("train", *cut("two", "two-then-one", 2))
    assert_same("one", "two")
    assert_same("one", "one-then-two")
    assert_same("one", "two-then-one")
    assert_same("chat", "chats")
    for word in ("run folder: runs/two", "saved:  runs/two/model"):
        assert result.stdout.count(word) == 1, "the first process alone speaks"
    assert len(json.loads(Path("runs/one-then-two/run.json").read_text())["starts"]) == 2

    steps = len([line for line in metrics("chats") if "train/loss" in line])
    well = [[0, 3], [0, steps], [0, 1]]
    assert codes(0) == [*well, [143, 2], [4, 3], [5, 2]], result.stderr
    assert codes(1) == [*well, [0, 2], [4, 3]] and result.returncode != 0
    assert "stopped after step 2; continue with --resume runs/stop" in result.stdout
    assert "error: stopped, since checkpoints cannot be saved" in result.stderr
    assert "error: process 0 of 2: another one ended or cannot be reached" in result.stderr
    for how, step in (("stop", 2), ("kill", 1)):
        found = [path.name for path in Path("runs", how, "checkpoints").iterdir()]
        assert max(found) == f"step-{step}" and not Path("runs", how, "model").exists()
        run("train", "--resume", f"runs/{how}")
        assert_same("one", how)
