"""kernels/cross_entropy.py against its definition, over one chunk and over several."""

import math
from collections.abc import Callable
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from kernels import cross_entropy
from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

SIZES = [(1, 1, 2), (7, 5, 3), (42, 6, 123), (33, 16, 431)]  # rows, width, classes

@pytest.fixture
def make(draw: Callable[..., Tensor]) -> Callable[..., dict[str, Tensor]]:
    def inputs(M: int, C: int, V: int) -> dict[str, Tensor]:
        return {"h_MC": draw(M, C), "weight_VC": draw(V, C) / C**0.5, "bias_V": draw(V)}

    return inputs

def targets(M: int, V: int) -> tuple[Tensor, Tensor]:
    """Labels, and weights among which are zeros and fractions."""
    generator = torch.Generator().manual_seed(M)
    labels_M = torch.randint(0, V, (M,), generator=generator)
    return labels_M, torch.tensor([1.0, 0.0, 0.25]).repeat(M)[:M]

RULES = [
    {},
    {"softcap": 1.5},
    {"z_loss": 0.1},
    {"label_smoothing": 0.2},
    {"softcap": 1.5, "z_loss": 0.1, "label_smoothing": 0.1},
]

def ops(
    M: int, V: int, rule: dict[str, float], factor: float = 1.0, **change: float
) -> tuple[Callable[..., Tensor], ...]:
    """The op with factor and change, and the definition without them."""
    labels_M, weights_M = targets(M, V)

    def op(h_MC: Tensor, weight_VC: Tensor, bias_V: Tensor) -> Tensor:
        args = (h_MC, weight_VC, labels_M, weights_M * factor)
        return linear_cross_entropy(*args, bias_V=bias_V, **rule | change)[0]

    def reference(h_MC: Tensor, weight_VC: Tensor, bias_V: Tensor) -> Tensor:
        args = (h_MC, weight_VC, labels_M, weights_M, bias_V)
        return linear_cross_entropy_reference(*args, **rule)[0]

    return op, reference

@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("chunk", [5, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
def test_error_budget(sizes, dtype, chunk, rule, make, within_budget, monkeypatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", chunk)
    op, reference = ops(sizes[0], sizes[2], rule)
    assert within_budget(op, reference, make(*sizes), dtype)

@pytest.mark.parametrize(
    "change",
    [{"factor": 1.0001}, {"softcap": 1.5015}, {"z_loss": 0.1001}, {"label_smoothing": 0.1001}],
)
def test_error_budget_sees_a_mutant(change, make, within_budget) -> None:
    mutant, reference = ops(42, 123, RULES[-1], **change)
    assert not within_budget(mutant, reference, make(42, 6, 123), torch.float32)

@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("which", [0, 1])
def test_gradcheck(which: int, rule: dict[str, float], make, monkeypatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 3)
    tensors = [tensor.requires_grad_() for tensor in make(7, 5, 3).values()]
    assert torch.autograd.gradcheck(ops(7, 3, rule)[which], tensors)

@pytest.mark.parametrize("rule", RULES)
def test_equals_torch_in_float64(rule: dict[str, float], make) -> None:
    """Smoothing by torch's own argument, and the squared logsumexp written out."""
    tensors = [tensor.requires_grad_() for tensor in make(33, 16, 431).values()]
    labels_M, weights_M = targets(33, 431)
    z_MV = F.linear(*tensors)
    if cap := rule.get("softcap"):
        z_MV = cap * (z_MV / cap).tanh()
    smoothing = rule.get("label_smoothing", 0.0)
    nll_M = F.cross_entropy(z_MV, labels_M, reduction="none", label_smoothing=smoothing)
    true = ((nll_M + rule.get("z_loss", 0.0) * z_MV.exp().sum(-1).log() ** 2) * weights_M).sum()
    mine = ops(33, 431, rule)[0](*tensors)
    torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(true, tensors)
    for found, grad in zip(torch.autograd.grad(mine, tensors), wanted, strict=True):
        torch.testing.assert_close(found, grad, rtol=1e-11, atol=1e-12)

@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"z_loss": -0.1}, "z_loss = -0.1: must be a finite number >= 0; 0 is off"),
        ({"z_loss": math.nan}, "z_loss = nan: must be"),
        ({"z_loss": math.inf}, "z_loss = inf: must be"),
        ({"label_smoothing": 1.0}, r"label_smoothing = 1.0: must be in \[0, 1\); 0 is off"),
        ({"label_smoothing": -0.1}, "label_smoothing = -0.1: must be"),
    ],
)
def test_refuses_what_is_out_of_range(rule: dict[str, float], message: str, make) -> None:
    with pytest.raises(ValueError, match=message):
        ops(7, 3, rule)[0](**make(7, 5, 3))

def test_sum_and_weight(make) -> None:
    inputs = make(7, 5, 3)
    labels_M, weights_M = targets(7, 3)
    loss, weight = linear_cross_entropy(inputs["h_MC"], inputs["weight_VC"], labels_M, weights_M)
    nll_M = -(inputs["h_MC"] @ inputs["weight_VC"].T).log_softmax(-1)[range(7), labels_M]
    torch.testing.assert_close(loss, (nll_M * weights_M).sum())
    assert weight == 1.0 * 3 + 0.25 * 2

def test_forms_only_the_gradients_asked_for(make) -> None:
    inputs = make(7, 5, 3)
    labels_M, weights_M = targets(7, 3)
    inputs["h_MC"].requires_grad_()
    loss, _ = linear_cross_entropy(inputs["h_MC"], inputs["weight_VC"], labels_M, weights_M)
    dh_MC, dweight_VC, dbias_V = loss.grad_fn.saved_tensors
    assert dh_MC is not None and dweight_VC is None and dbias_V is None

def test_forms_no_gradient_without_grad_mode(make, monkeypatch) -> None:
    inputs = {name: tensor.requires_grad_() for name, tensor in make(7, 5, 3).items()}
    monkeypatch.setattr(torch.Tensor, "scatter_add_", None)  # the first step of the gradients
    labels_M, weights_M = targets(7, 3)
    with torch.no_grad():
        linear_cross_entropy(inputs["h_MC"], inputs["weight_VC"], labels_M, weights_M)
    with pytest.raises(TypeError):
        linear_cross_entropy(inputs["h_MC"], inputs["weight_VC"], labels_M, weights_M)

def test_no_rows_weigh_nothing(make) -> None:
    inputs = make(7, 5, 3)
    weight_VC = inputs["weight_VC"].requires_grad_()
    none = torch.zeros(0, dtype=torch.long)
    loss, weight = linear_cross_entropy(inputs["h_MC"][:0], weight_VC, none, torch.zeros(0))
    loss.backward()
    assert loss == weight == 0 and not weight_VC.grad.any()

@pytest.mark.parametrize("softcap", [None, 1.5])
def test_row_losses(softcap: float | None, make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    M, C, V = SIZES[2]
    inputs = {name: x.double() for name, x in make(M, C, V).items()}
    labels_M, weights_M = targets(M, V)
    monkeypatch.setattr(cross_entropy, "MOST_LOGITS", 5 * V)  # so that there are several chunks
    losses_M = cross_entropy.row_losses(labels_M=labels_M, softcap=softcap, **inputs)
    assert losses_M.shape == (M,) and losses_M.dtype == torch.float64
    told = {"labels_M": labels_M, "weights_M": weights_M, "softcap": softcap}
    total, _ = linear_cross_entropy_reference(**inputs, **told)
    assert torch.allclose((losses_M * weights_M).sum(), total, rtol=1e-12)
