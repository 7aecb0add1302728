"""kernels/dropout.py against its definition, and its draws against what is asked for."""

import pytest
import torch
from kernels.dropout import draw_keep, dropout, dropout_reference

def seeded(x: torch.Tensor, p: float) -> torch.Tensor:
    torch.manual_seed(5)
    return dropout(x, p, is_training=True)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (5, 7), (42, 123), (3, 5, 33)])
def test_error_budget(shape, dtype, draw, within_budget) -> None:
    torch.manual_seed(5)
    keep = draw_keep(draw(*shape), 0.3)
    ops = (lambda x: seeded(x, 0.3)), (lambda x: dropout_reference(x, keep.to(x.dtype), 0.3))
    assert within_budget(*ops, {"x": draw(*shape)}, dtype)

def test_error_budget_sees_a_mutant(draw, within_budget) -> None:
    torch.manual_seed(5)
    keep = draw_keep(draw(42, 123), 0.3)
    ops = (lambda x: seeded(x, 0.31)), (lambda x: dropout_reference(x, keep.to(x.dtype), 0.3))
    assert not within_budget(*ops, {"x": draw(42, 123)}, torch.float32)

@pytest.mark.parametrize("op", [seeded, lambda x, p: dropout_reference(x, (x > 0).to(x.dtype), p)])
def test_gradcheck(op, draw) -> None:
    assert torch.autograd.gradcheck(lambda x: op(x, 0.4), [draw(6, 7).requires_grad_()])

@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9, 0.999_999])
def test_a_share_of_p_is_dropped_everywhere_and_independently(p: float) -> None:
    torch.manual_seed(0)
    dropped = draw_keep(torch.empty(1000, 1000), p).flatten() == 0
    shares = dropped.view(-1, 4).double().mean(0)  # by the place in a draw of 64 bits
    assert (shares - p).abs().max() < 4 * (p * (1 - p) / 250_000) ** 0.5 + 2**-16
    both = (dropped[1:] & dropped[:-1]).double().mean()
    assert both.item() == pytest.approx(p * p, abs=4 * p / 1000)

def test_draws_follow_the_generator_and_go_on() -> None:
    x = torch.ones(33, 5)
    assert torch.equal(seeded(x, 0.5), seeded(x, 0.5))
    torch.manual_seed(5)
    first, second = (dropout(x, 0.5, is_training=True) for _ in range(2))
    assert not torch.equal(first, second)

def test_nothing_is_dropped_outside_training(draw) -> None:
    x = draw(5, 7)
    assert dropout(x, 0.5, is_training=False) is x
    assert dropout(x, 0.0, is_training=True) is x
