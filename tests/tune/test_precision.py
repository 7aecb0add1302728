"""Precision: products in bf16 over fp32 weights, and the loss scale of fp16."""

import json
import math
from collections.abc import Callable
from typing import Any
import pytest
import torch
from torch import Tensor
from ftcore.config import PeftConfig
from ftcore.data.pack import collate
from ftcore.env.compute import GROWTH_STEPS, LossScale, generator
from ftcore.env.run import read_metrics
from ftcore.errors import TrainingError
from ftcore.tune.loop import Loop
from ftcore.tune.task import choose_trainable, classification, token_labels

TASKS = {"qwen3": token_labels, "bert": classification}
LORA = PeftConfig(method="lora", rank=3, alpha=6.0)

def losses(loop: Loop) -> list[float]:
    return [line["train/loss"] for line in read_metrics(loop.run.path / "metrics.jsonl")]

@pytest.mark.parametrize("peft", [PeftConfig(), LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", TASKS)
def test_products_are_in_bf16_and_all_else_in_fp32(
    family: str, peft: PeftConfig, tiny_model: Callable, rows: Callable
) -> None:
    """The gradient of autocast, within what bf16 costs, and in the dtype of the weights."""
    grads, dtypes, batch = [], {}, collate(rows(family, 6))

    def note(name: str) -> Callable:
        return lambda module, inputs, output: dtypes.update({name: output.dtype})

    for compute in (None, torch.bfloat16):
        model = tiny_model(family)
        choose_trainable(model, peft, generator(0, 2))
        for name, param in model.named_parameters():
            if name.endswith("lora_b"):  # else the factors A have no gradient
                torch.nn.init.normal_(param, std=0.1, generator=generator(0, 3))
        model.compute_in(compute)
        block = model.trunk.layers[1]
        if compute:
            for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
                block.get_submodule(name).register_forward_hook(note(name))
            block.register_forward_hook(note("stream"))
        loss, weight = TASKS[family](model, batch)
        assert loss.dtype == torch.float32
        (loss / weight).backward()
        named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert {grad.dtype for grad in named.values()} == {torch.float32}
        grads.append(torch.cat([grad.flatten() for grad in named.values()]))
    assert dtypes.pop("stream") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    exact, rounded = grads
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 3e-2

@pytest.mark.parametrize(
    "precision",
    [{"compute": torch.bfloat16}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}],
    ids=["bf16-autocast", "bf16", "fp16"],
)  # fmt: skip
@pytest.mark.parametrize("family", TASKS)
def test_a_run_falls_as_in_fp32(
    family: str, precision: dict[str, Any], make_loop: Callable[..., Loop]
) -> None:
    curves = []
    for name, options in (("fp32", {}), ("other", precision)):
        loop = make_loop(name, family=family, **options)
        assert loop.train() == 0
        curves.append(losses(loop))
    apart = [abs(a - b) / a for a, b in zip(*curves, strict=True)]
    assert max(apart[:4]) < 0.01 and max(apart) < 0.1  # what is small at first grows at this rate
    assert curves[1] != curves[0] and curves[1][-1] < curves[1][0]

def test_the_loss_scale_falls_until_the_gradient_fits_and_is_saved(
    make_loop: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An overflow changes no weight, is no fault of the rows, and costs a step."""
    monkeypatch.setattr(LossScale, "__init__", _starting_at(2.0**40))
    loop = make_loop("scaled", dtype=torch.float16, max_steps=30)
    before = {name: param.clone() for name, param in loop.model.named_parameters()}
    steps: list[dict[str, Tensor]] = []
    update = LossScale.update

    def noted(scale: LossScale, is_finite: bool) -> None:
        steps.append({n: p.clone() for n, p in loop.model.named_parameters()})
        update(scale, is_finite)

    monkeypatch.setattr(LossScale, "update", noted)
    assert loop.train() == 0
    lines = read_metrics(loop.run.path / "metrics.jsonl")
    scales = [line["train/loss_scale"] for line in lines]
    skipped = [line["train/skipped_steps"] for line in lines]
    assert scales == [2.0 ** (40 - count) for count in (0, *skipped[:-1])]
    assert skipped[9] == 10 and 10 < skipped[-1] < 28
    assert all(torch.equal(before[name], steps[10][name]) for name in before)
    assert any(not torch.equal(before[name], steps[-1][name]) for name in before)
    assert not list(loop.run.path.glob("skipped-step-*"))
    state = json.loads((loop.run.path / "checkpoints" / "step-30" / "state.json").read_text())
    assert state["loss_scale"] == vars(loop.scale)

def _starting_at(value: float) -> Callable:
    def init(scale: LossScale, value: float = value, finite_steps: int = 0) -> None:
        scale.value, scale.finite_steps = value, finite_steps

    return init

def test_the_loss_scale_by_hand() -> None:
    scale = LossScale(8.0)
    for _ in range(GROWTH_STEPS - 1):
        scale.update(True)
    assert vars(scale) == {"value": 8.0, "finite_steps": GROWTH_STEPS - 1}
    scale.update(True)
    assert vars(scale) == {"value": 16.0, "finite_steps": 0}
    scale.update(True)
    for value in (8.0, 4.0, 2.0, 1.0, 1.0):
        scale.update(False)
        assert vars(scale) == {"value": value, "finite_steps": 0}

def test_the_gradient_does_not_depend_on_the_loss_scale(make_loop: Callable[..., Loop]) -> None:
    """A power of two changes no bit of an fp32 gradient, nor of the norm and the loss told."""
    ends = []
    for name, value in (("one", 1.0), ("many", 1024.0)):
        loop = make_loop(name, max_steps=3)
        loop.scale = LossScale(value)
        loop.train()
        lines = read_metrics(loop.run.path / "metrics.jsonl")
        told = [(line["train/loss"], line["train/grad_norm"]) for line in lines]
        ends.append((told, {n: p.clone() for n, p in loop.model.named_parameters()}))
    (told, weights), (others, scaled) = ends
    assert told == others
    for name in weights:
        torch.testing.assert_close(weights[name], scaled[name], rtol=1e-5, atol=1e-7)

def test_a_run_of_steps_that_are_never_finite_ends(make_loop: Callable[..., Loop]) -> None:
    loop = make_loop("hopeless", max_steps=12, max_skipped=3)
    compute, steps = loop.task, []

    def task(*args: Any) -> tuple[Tensor, Tensor]:
        steps.append(loop.progress.step)
        loss, weight = compute(*args)
        return loss * (1.0 if loop.progress.step in (0, 3) else math.nan), weight

    loop.task = task
    with pytest.raises(TrainingError, match=r"4 steps in a row .* step 8: .*skipped-step-N.json"):
        loop.train()
    assert max(steps) == 7 and loop.progress.skipped_steps == 6
    assert loop.checkpoints.latest().step == 8
