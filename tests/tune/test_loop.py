"""The loop: bad steps and bad disks are survived, the best is kept."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
import pytest
import torch
from torch import Tensor
from ftcore.config import PeftConfig
from ftcore.data.pack import collate
from ftcore.env.run import read_metrics
from ftcore.errors import CheckpointError
from ftcore.tune.checkpoint import load
from ftcore.tune.freeze import assert_unmoved, frozen_hashes
from ftcore.tune.loop import Loop

LORA = PeftConfig(method="lora", rank=3, alpha=6.0, dropout=0.2, extra_modules=("trunk.norm",))

def tensors(loop: Loop) -> dict[str, Tensor]:
    """All that a run has computed: the model's tensors and the optimiser's."""
    found = {name: tensor.detach().clone() for name, tensor in loop.model.state_dict().items()}
    for group, named in loop.optimizer.state().items():
        found |= {f"{group}/{name}": tensor.detach().clone() for name, tensor in named.items()}
    return found

def metrics(loop: Loop) -> list[dict[str, Any]]:
    lines = read_metrics(loop.run.path / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]

def stop_at(loop: Loop, step: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Train as if a signal had come during step `step`."""

    class Stop:
        def __enter__(self) -> "Stop":
            return self

        def __exit__(self, *exception: object) -> None: ...

        @property
        def exit_code(self) -> int:
            return 143 if loop.progress.step >= step else 0

    with monkeypatch.context() as patch:
        patch.setattr("ftcore.tune.loop.StopFlag", Stop)
        return loop.train()

def dying(loop: Loop, step: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """The loop's task, ending the process (so to say) in the middle of step `step`."""
    compute = loop.task

    def task(*args: Any) -> tuple[Tensor, Tensor]:
        if loop.progress.step == step:
            raise KeyboardInterrupt
        return compute(*args)

    return task

def assert_same_run(loop: Loop, other: tuple[dict[str, Tensor], list[dict[str, Any]]]) -> None:
    ours, (theirs, lines) = tensors(loop), other
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert metrics(loop) == lines

def test_steps_are_cut_into_micro_batches_and_the_cut_changes_nothing_else(
    make_loop: Callable[..., Loop],
) -> None:
    ends = []
    for budget in (1, 50, 10_000):
        loop, calls = make_loop(f"budget-{budget}", micro_batch_tokens=budget, max_steps=3), []
        compute = loop.task
        loop.task = lambda *args, compute=compute, calls=calls: (calls.append(1), compute(*args))[1]
        loop.train()
        ends.append((len(calls), metrics(loop)))
    (singles, alone), (some, several), (ones, together) = ends
    assert singles == 12 > some > ones == 3
    for line, other, third in zip(alone, several, together, strict=True):
        assert line["train/loss"] == pytest.approx(other["train/loss"], rel=1e-4)
        assert line["train/grad_norm"] == pytest.approx(third["train/grad_norm"], rel=1e-4)

def test_loss_and_gradient_are_means_over_the_weight_of_the_step(
    make_loop: Callable[..., Loop], tiny_model: Callable
) -> None:
    loop, model = make_loop("means", max_steps=1), tiny_model("qwen3")
    loss, weight = loop.task(model, collate([loop.documents[row] for row in loop.rows(0)]))
    (loss / weight).backward()
    norm = torch.cat([param.grad.flatten() for param in model.parameters()]).norm()
    loop.train()
    (line,) = metrics(loop)
    assert line["train/loss"] == pytest.approx((loss / weight).item(), rel=1e-5)
    assert line["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert line["train/lr"] == pytest.approx(1e-2)  # a run of one step has no warm-up

def test_the_gradient_is_clipped_to_its_global_norm(make_loop: Callable[..., Loop]) -> None:
    loop = make_loop("clipped", max_steps=1)
    optim = replace(loop.config.optim, max_grad_norm=0.01)
    loop.config = replace(loop.config, optim=optim)
    loop.train()
    moments = loop.optimizer.state()["exp_avg"].values()
    norm = math.sqrt(sum((m / 0.1).square().sum().item() for m in moments))
    assert metrics(loop)[0]["train/grad_norm"] > 0.1
    assert norm == pytest.approx(0.01, rel=1e-3)

@pytest.mark.parametrize("fault", ["loss", "gradient", "both"])
def test_a_step_that_is_not_finite_is_not_applied(
    fault: str, make_loop: Callable[..., Loop], capsys: pytest.CaptureFixture
) -> None:
    loop, seen = make_loop("bad", max_steps=4), {}
    compute = loop.task

    def task(model: torch.nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        loss, weight = compute(model, batch)
        step = loop.progress.step
        seen.setdefault(step, tensors(loop))
        if step == 2:
            if fault == "gradient":
                loss.register_hook(lambda grad: grad * math.inf)
            else:
                return (loss + math.nan if fault == "loss" else loss * math.nan), weight
        return loss, weight

    loop.task = task
    assert loop.train() == 0
    before, after = seen[2], seen[3]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(after[name], tensors(loop)[name]) for name in after)
    assert [line["train/skipped_steps"] for line in metrics(loop)] == [0, 0, 1, 1]
    assert loop.optimizer.step_count == 3 and loop.progress.step == 4
    record = json.loads((loop.run.path / "skipped-step-3.json").read_text())
    assert sorted(record["rows"]) == sorted(f"row-{row}" for row in loop.rows(2))
    first = None if fault == "loss" else next(iter(loop.optimizer.params))
    assert record["bad gradient"] == first
    assert "step 3: loss" in (said := capsys.readouterr().out) and "not applied" in said
    assert f"ftcore.data show {loop.run.path} --step 3" in said

@pytest.fixture
def falling() -> Callable[[list[float]], Callable[[], dict[str, float]]]:
    """Values of the watched metric, one for each evaluation."""

    def make(values: list[float]) -> Callable[[], dict[str, float]]:
        left: Iterator[float] = iter(values)
        return lambda: {"eval/loss": next(left)}

    return make

def test_patience_ends_a_run_and_the_best_weights_come_back(
    make_loop: Callable[..., Loop], falling: Callable
) -> None:
    options = {"eval_every": 2, "patience": 2, "max_steps": 40}
    loop = make_loop("early", evaluate=falling([3.0, 2.0, 2.5, math.nan]), **options)
    assert loop.train() == 0 and loop.progress.step == 8
    assert (loop.progress.best, loop.progress.best_step) == (2.0, 4)
    best = load(loop.checkpoints.of(4))
    last = tensors(loop)
    loop.restore_best()
    for name, param in loop.model.named_parameters():
        assert torch.equal(param, best.tensors["master"][name])
    assert any(not torch.equal(last[name], tensors(loop)[name]) for name in last)
    assert [line["eval/loss"] for line in metrics(loop) if "eval/loss" in line] == [3, 2, 2.5, None]
    # Stopped early, then killed before it was evaluated: it does not train on.
    loop = make_loop("early", evaluate=falling([]), **options, resume=True)
    assert loop.train() == 0 and loop.progress.step == 8
    loop.restore_best()
    assert all(torch.equal(p, best.tensors["master"][n]) for n, p in loop.model.named_parameters())

def test_of_tags_the_best_f1_is_kept(make_loop: Callable[..., Loop]) -> None:
    said = iter([(0.2, 1.0), (0.7, 3.0), (0.6, 0.5)])
    evaluate = lambda: dict(zip(("eval/f1", "eval/loss"), next(said), strict=True))  # noqa: E731
    loop = make_loop("tags", evaluate=evaluate, eval_every=2, max_steps=6)
    assert loop.train() == 0 and (loop.progress.best, loop.progress.best_step) == (-0.7, 4)

def test_while_no_entity_is_found_the_loss_decides(make_loop: Callable[..., Loop]) -> None:
    loss = iter([3.0, 2.0, 2.5])
    evaluate = lambda: {"eval/f1": 0.0, "eval/loss": next(loss)}  # noqa: E731
    loop = make_loop("none", evaluate=evaluate, eval_every=2, max_steps=6)
    assert loop.train() == 0 and (loop.progress.best, loop.progress.best_step) == (2.0, 4)

def test_an_evaluation_that_betters_the_best_restores_patience(
    make_loop: Callable[..., Loop], falling: Callable
) -> None:
    values = [3.0, 4.0, 2.0, 4.0, 1.0, 4.0]
    loop = make_loop("patient", evaluate=falling(values), eval_every=2, patience=2)
    loop.train()
    assert loop.progress.step == 12 and loop.progress.best_step == 10
    assert loop.checkpoints.steps() == [12, 10]

def test_the_model_is_evaluated_in_eval_mode_and_trained_in_train_mode(
    make_loop: Callable[..., Loop],
) -> None:
    modes = []

    def evaluate() -> dict[str, float]:
        modes.append((loop.model.training, torch.is_grad_enabled()))
        return {"eval/loss": 1.0}

    loop = make_loop("modes", evaluate=evaluate, eval_every=5, dropout=0.1)
    loop.train()
    assert modes == [(False, False)] * 3 and loop.model.training  # steps 5, 10 and the last

@pytest.mark.parametrize(("failing", "ends"), [({4}, False), ({4, 6}, False), ({4, 6, 8}, True)])
def test_failed_saves_end_a_run_when_three_come_in_a_row(
    failing: set[int],
    ends: bool,
    make_loop: Callable[..., Loop],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    from ftcore import files

    write_folder = files.write_folder

    def full_disk(target: Path, **options: Any) -> AbstractContextManager[Path]:
        if target.name in {f"step-{step}" for step in failing}:
            raise CheckpointError(f"cannot write {target}: No space left on device")
        return write_folder(target, **options)

    monkeypatch.setattr(files, "write_folder", full_disk)
    loop = make_loop("full", save_every=2)
    if ends:
        with pytest.raises(CheckpointError, match=r"cannot be saved.* --resume .*/full"):
            loop.train()
    else:
        assert loop.train() == 0
    assert loop.progress.step == (8 if ends else 12)
    said = capsys.readouterr().out
    assert all(f"step {step}: not saved: cannot write" in said for step in failing)
    assert loop.checkpoints.latest().step == (2 if ends else 12)

def test_a_stop_saves_the_step_that_was_done(
    make_loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop("stopped", save_every=3)
    assert stop_at(loop, 5, monkeypatch) == 143
    assert loop.checkpoints.steps() == [5, 3]

@pytest.mark.parametrize("method", ["lora", "freeze"])
def test_frozen_tensors_do_not_move(method: str, make_loop: Callable[..., Loop]) -> None:
    peft = LORA if method == "lora" else PeftConfig(method="freeze", trainable=("last:1",))
    loop = make_loop("frozen", peft=peft)
    frozen, before = frozen_hashes(loop.model), tensors(loop)
    trained = {name for name, p in loop.model.named_parameters() if p.requires_grad}
    loop.train()
    assert_unmoved(frozen, loop.model)
    moved = {n for n, p in loop.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trained == set(loop.optimizer.masters) and frozen

def test_another_configuration_is_not_resumed(
    make_loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(make_loop("lora", peft=LORA), 2, monkeypatch)
    with pytest.raises(CheckpointError, match="tensors of master are missing, unknown"):
        make_loop("lora", peft=PeftConfig(method="lora", rank=4), resume=True)
