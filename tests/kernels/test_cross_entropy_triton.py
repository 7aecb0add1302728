"""kernels/cross_entropy_triton.py in the interpreter, by the pass rule of the eager path."""

import pytest
import torch
import torch.nn.functional as F
from kernels import cross_entropy, launch
from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from tests.kernels import interpreter

interpreter.require()

SIZES = [(1, 1, 2), (7, 5, 3), (11, 6, 123), (4, 16, 4099)]  # rows, width, classes
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

def make(M: int, C: int, V: int, draw) -> dict[str, torch.Tensor]:
    return {"h_MC": draw(M, C), "weight_VC": draw(V, C) / C**0.5, "bias_V": draw(V)}

RULES = [
    {},
    {"softcap": 1.5},
    {"z_loss": 0.01, "label_smoothing": 0.2},
    {"softcap": 1.5, "z_loss": 0.1, "label_smoothing": 0.4},
]

def ops(M: int, V: int, rule: dict[str, float]):
    generator = torch.Generator().manual_seed(M)
    labels_M = torch.randint(0, V, (M,), generator=generator)
    weights_M = torch.tensor([1.0, 0.0, 0.25]).repeat(M)[:M]

    def op(h_MC, weight_VC, bias_V):
        args = (h_MC, weight_VC, labels_M, weights_M)
        return linear_cross_entropy(*args, bias_V=bias_V, **rule, impl="triton")[0]

    def reference(h_MC, weight_VC, bias_V):
        args = (h_MC, weight_VC, labels_M, weights_M, bias_V)
        return linear_cross_entropy_reference(*args, **rule)[0]

    return op, reference

@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_error_budget(sizes, dtype, rule, draw, within_budget, poisoned, monkeypatch) -> None:
    monkeypatch.setattr(cross_entropy, "TRITON_CHUNK_ROWS", 5)
    rows = {64: {"LANES": 4}, 431: {"LANES": 8}, 10**6: {"LANES": 128}}
    monkeypatch.setitem(launch.configs(), ("softmax_loss", "any"), rows)
    pair = ops(sizes[0], sizes[2], rule)
    assert within_budget(*pair, make(*sizes, draw), dtype)

@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("- target)", "- 0.999 * target)"),
        ("dz *= 1 - (z / softcap) * (z / softcap)", "dz *= 1 - z * z"),
        ("lane_sum * tl.exp(lane_max - new_max) +", "lane_sum +"),
        ("z = tl.load", "z = 0.999 * tl.load"),
        ("dz = weight * (", "dz = ("),
        ("tl.where(inside, z, 0.0)", "z"),
        ("tl.where(inside, z, 0.0)", "tl.where(inside, z, z_label)"),
        ("z_label - tl.sum(lane_total, 0) / V", "z_label"),
        ("loss += z_loss * lse * lse", "loss += z_loss * lse"),
        ("2 * weight * z_loss * lse * p", "weight * z_loss * lse * p"),
        ("(1 - smoothing) * target + smoothing / V", "(1 - smoothing) * target"),
    ],
)
def test_error_budget_sees_a_mutant(old, new, draw, within_budget, monkeypatch, tmp_path) -> None:
    interpreter.mutate(monkeypatch, tmp_path, "kernels.cross_entropy_triton", old, new)
    monkeypatch.setitem(launch.configs(), ("softmax_loss", "any"), {10**6: {"LANES": 8}})
    assert not within_budget(*ops(7, 123, RULES[-1]), make(7, 6, 123, draw), torch.float32)

@pytest.mark.parametrize("large", [3e4, -3e4])
def test_large_logits_neither_overflow_nor_vanish(large: float, draw) -> None:
    from kernels.cross_entropy_triton import softmax_loss_triton

    logits_JV = large + draw(3, 50).float()
    labels_J, weights_J = torch.tensor([0, 49, 7]), torch.tensor([1.0, 2.0, 0.0])
    wanted = logits_JV.double().requires_grad_()
    loss = (F.cross_entropy(wanted, labels_J, reduction="none") * weights_J).sum()
    loss.backward()
    args = logits_JV, labels_J, weights_J, (None, 0.0, 0.0)
    mine, dlogits_JV = softmax_loss_triton(*args, needs_gradient=True)
    torch.testing.assert_close(mine.double(), loss.detach(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dlogits_JV.double(), wanted.grad, rtol=1e-3, atol=1e-3)

def test_a_label_outside_the_vocabulary_makes_the_loss_nan(draw) -> None:
    inputs = make(3, 4, 5, draw)
    for label in (-100, 5):
        labels_M = torch.tensor([0, label, 1])
        tensors = inputs["h_MC"].float(), inputs["weight_VC"].float(), labels_M, torch.ones(3)
        assert linear_cross_entropy(*tensors, impl="triton")[0].isnan()

def test_frozen_head_and_no_grad_form_no_more_than_is_asked_for(draw) -> None:
    inputs = {name: tensor.float() for name, tensor in make(7, 5, 3, draw).items()}
    labels_M, weights_M = torch.zeros(7, dtype=torch.long), torch.ones(7)
    h_MC = inputs["h_MC"].requires_grad_()
    args = h_MC, inputs["weight_VC"], labels_M, weights_M
    dh_MC, dweight_VC, dbias_V = linear_cross_entropy(*args, impl="triton")[0].grad_fn.saved_tensors
    assert dh_MC is not None and dweight_VC is None and dbias_V is None
    with torch.no_grad():
        mine, true = (linear_cross_entropy(*args, impl=impl)[0] for impl in ("triton", "eager"))
    torch.testing.assert_close(mine, true)
    none = linear_cross_entropy(h_MC[:0], args[1], labels_M[:0], weights_M[:0], impl="triton")
    assert none[0] == none[1] == 0

def test_refuses_sizes_that_do_not_fit(draw) -> None:
    from kernels.cross_entropy_triton import softmax_loss_triton

    with pytest.raises(ValueError, match=r"labels has shape \(2,\), must be \(3,\)"):
        args = draw(3, 5).float(), torch.zeros(2), torch.ones(3), (None, 0.0, 0.0)
        softmax_loss_triton(*args, needs_gradient=True)
