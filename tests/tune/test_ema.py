"""A mean of the weights: what it is, and when it stands in their place."""

from collections.abc import Callable
import pytest
import torch
from torch import Tensor, nn
from ftcore.config import OptimConfig
from ftcore.tune.checkpoint import load
from ftcore.tune.loop import Loop
from ftcore.tune.optim import AdamW

DECAY = 0.75
MEAN = {"optim": {"ema": DECAY}}

def mean_of(weights: list[Tensor]) -> Tensor:
    """By the definition, in float64."""
    mean = torch.zeros_like(weights[0], dtype=torch.float64)
    for step, weight in enumerate(weights, 1):
        mean += max(1 - DECAY, 1 / step) * (weight - mean)
    return mean

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [None, {"embed": torch.tensor([1, 4, 5])}])
def test_it_follows_the_masters_and_takes_their_place(dtype: torch.dtype, rows: dict) -> None:
    draw = torch.Generator().manual_seed(0)
    params = {
        name: nn.Parameter(torch.randn(6, width, generator=draw).to(dtype))
        for name, width in (("embed", 3), ("weight", 5))
    }
    optimizer, seen = AdamW(params.items(), OptimConfig(ema=DECAY), rows=rows), []
    for _ in range(7):
        for grad in optimizer.grads.values():
            grad.copy_(torch.randn(grad.shape, generator=draw))
        for part in optimizer.parts(2):
            optimizer.step(part, 1e-1)
            optimizer.step_count -= 1  # that of each process
        optimizer.step_count += 1
        seen.append({n: x.double().clone() for n, x in optimizer.state()["master"].items()})
    before = {n: p.detach().clone() for n, p in params.items()}
    optimizer.swap_ema()
    for name, param in params.items():
        mean = mean_of([step[name] for step in seen])
        held = param.detach()[rows[name]] if name in (rows or {}) else param.detach()
        torch.testing.assert_close(held, mean.to(dtype))
        assert not torch.equal(param, before[name])
    optimizer.swap_ema()
    assert all(torch.equal(param, before[name]) for name, param in params.items())

def test_without_a_decay_there_is_none() -> None:
    params = {"weight": nn.Parameter(torch.ones(2, 2))}
    optimizer = AdamW(params.items(), OptimConfig())
    optimizer.step_count = 1
    optimizer.swap_ema()
    assert "ema" not in optimizer.state() and params["weight"].eq(1).all()

def test_the_mean_is_judged_and_kept(make_loop: Callable[..., Loop]) -> None:
    judged, values = [], iter([3.0, 1.0, 2.0])

    def evaluate() -> dict[str, float]:
        judged.append({n: p.detach().clone() for n, p in loop.model.named_parameters()})
        return {"eval/loss": next(values)}

    loop = make_loop("mean", evaluate=evaluate, eval_every=2, max_steps=6, **MEAN)
    assert loop.train() == 0
    last = {n: p.detach().clone() for n, p in loop.model.named_parameters()}
    saved = load(loop.checkpoints.of(4)).tensors
    loop.restore_best()
    for name, param in loop.model.named_parameters():
        assert torch.equal(param, judged[1][name]) and torch.equal(param, saved["ema"][name])
        assert not torch.equal(last[name], judged[2][name])

def test_before_a_first_step_there_is_nothing_to_exchange() -> None:
    """Where the loss scale was too high for all steps, weights are judged as they are."""
    params = {"weight": nn.Parameter(torch.ones(2, 2))}
    AdamW(params.items(), OptimConfig(ema=DECAY)).swap_ema()
    assert params["weight"].eq(1).all()

def test_training_itself_does_not_see_it(make_loop: Callable[..., Loop]) -> None:
    ends = []
    for name, options in (("with", MEAN), ("without", {})):
        evaluate = lambda: {"eval/loss": 1.0}  # noqa: E731
        loop = make_loop(name, evaluate=evaluate, eval_every=3, max_steps=6, **options)
        loop.train()
        ends.append([param.detach().clone() for param in loop.model.parameters()])
    assert all(map(torch.equal, *ends))
