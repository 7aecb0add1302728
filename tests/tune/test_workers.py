"""Training on several cores: the same run but for rounding, resumed bit-equal, no process left."""

import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any
import pytest
import torch
from torch import Tensor, nn
from ftcore.config import PeftConfig
from ftcore.data.pack import Batch
from ftcore.env.run import read_metrics
from ftcore.tune.loop import Loop
from ftcore.tune.task import Task

LORA = PeftConfig(method="lora", rank=3, alpha=6.0, dropout=0.2, extra_modules=("trunk.norm",))

@pytest.fixture
def cores() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)

def trained(loop: Loop) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Run to the end; the trained parameters and what was logged."""
    assert loop.train() == 0
    assert not multiprocessing.active_children()
    lines = read_metrics(loop.run.path / "metrics.jsonl")
    lines = [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]
    return {name: param.detach().clone() for name, param in loop.optimizer.params.items()}, lines

@pytest.mark.parametrize("family", ["qwen3", "bert"])
@pytest.mark.parametrize("count", [2, 3, 9])  # four rows a step: some of nine would have none
def test_cores_share_a_step_and_change_rounding_alone(
    family: str, count: int, make_loop: Callable[..., Loop], cores: Callable
) -> None:
    # In float64: where a gradient is zero, as of the key bias, AdamW makes steps of rounding.
    options = {"family": family, "max_steps": 5, "count": 17, "dtype": torch.float64}
    alone, lines = trained(make_loop("alone", **options))
    cores(count)
    together, others = trained(make_loop("together", **options))
    assert torch.get_num_threads() == count
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-6, atol=1e-7)
    for line, other in zip(lines, others, strict=True):
        assert line == pytest.approx(other, rel=1e-6)

def test_a_step_that_is_not_finite_is_skipped_by_all(
    make_loop: Callable[..., Loop], cores: Callable
) -> None:
    """The share of one process is not finite; the other's steps and counts stay those of both."""
    runs = []
    for count in (1, 2):
        cores(count)
        loop = make_loop(f"on {count}", family="bert", max_steps=8, dtype=torch.float64)
        compute = loop.task

        def task(model: nn.Module, batch: Batch, compute: Task = compute) -> tuple[Tensor, Tensor]:
            loss, weight = compute(model, batch)
            return loss * (math.nan if "row-3" in batch.row_ids else 1.0), weight

        loop.task = task
        runs.append((*trained(loop), loop.optimizer.step_count))
    (alone, lines, steps), (together, others, same_steps) = runs
    assert steps == same_steps == 8 - lines[-1]["train/skipped_steps"] < 8
    assert [line["train/skipped_steps"] for line in lines] == [
        line["train/skipped_steps"] for line in others
    ]
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-6, atol=1e-7)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_on_two_cores_is_resumed_bit_equal(
    dtype: torch.dtype, make_loop: Callable[..., Loop], cores: Callable
) -> None:
    cores(2)
    options = {"dropout": 0.1, "peft": LORA, "dtype": dtype, "save_every": 3}
    whole, lines = trained(make_loop("whole", **options))
    loop = make_loop("killed", **options)
    compute = loop.task

    def dying(*args: Any) -> tuple[Tensor, Tensor]:
        if loop.progress.step == 5:
            raise KeyboardInterrupt
        return compute(*args)

    loop.task = dying
    with pytest.raises(KeyboardInterrupt):
        loop.train()
    assert not multiprocessing.active_children()
    loop = make_loop("killed", **options, resume=True)
    assert loop.progress.step == 3
    again, others = trained(loop)
    assert not [name for name in whole if not torch.equal(whole[name], again[name])]
    assert lines == others

def test_a_worker_that_is_gone_ends_the_run_with_a_reason(
    make_loop: Callable[..., Loop], cores: Callable
) -> None:
    cores(2)
    loop = make_loop("orphaned")
    compute = loop.task

    def task(*args: Any) -> tuple[Tensor, Tensor]:
        if loop.progress.step == 2 and (children := multiprocessing.active_children()):
            os.kill(children[0].pid, signal.SIGKILL)
        return compute(*args)

    loop.task = task
    with pytest.raises(RuntimeError, match=r"1 of 2 ended during step [23];.*--env.threads"):
        loop.train()
    assert not multiprocessing.active_children()
