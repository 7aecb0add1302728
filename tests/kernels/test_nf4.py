"""kernels/nf4.py against its definition and the published table; its kernels against it."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from kernels.lora import lora_linear
from kernels.nf4 import (
    BLOCK,
    TABLE,
    dequantise,
    nf4_linear,
    nf4_reference,
    quantise,
    scale_table,
)
from tests.kernels import interpreter

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 64), (6, 128), (43, 320), (300, 64)]  # 43 x 5 blocks: a group that is not full
CPU = torch.device("cpu")

@pytest.fixture
def triton_here() -> None:
    interpreter.require()

def test_the_table_is_that_of_the_normal_distribution() -> None:
    """Quantiles of the middles of equal shares, 8 of them above zero and 7 below (appendix E)."""
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083
    above = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    below = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    values = torch.cat([above, torch.zeros(1), below]).sort().values
    torch.testing.assert_close(values / values.max(), torch.tensor(TABLE), rtol=0, atol=2e-6)

def test_the_table_of_scales_has_256_places_over_seven_powers_of_ten() -> None:
    table = scale_table(CPU)
    assert len(table.unique()) == len(table) == 256 and table.equal(table.sort().values)
    assert table[-1] == 1 and table.abs().sort().values[1] == pytest.approx(0.55e-6)

@pytest.mark.parametrize("shape", SHAPES)
def test_near_the_definition_with_exact_scales(shape, draw) -> None:
    """What double quantisation adds is small beside what four bits lose."""
    weight_OC = draw(*shape).float()
    true_OC = nf4_reference(weight_OC.double())
    found_OC = dequantise(quantise(weight_OC)).double()
    added, lost = (found_OC - true_OC).norm(), (true_OC - weight_OC.double()).norm()
    assert 0 <= added < 0.15 * lost
    blocks_QB = weight_OC.view(-1, BLOCK)
    step = torch.tensor(TABLE).diff().max() / 2
    within = (found_OC.view(-1, BLOCK) - blocks_QB).abs() <= 1.1 * step * blocks_QB.abs().amax(
        1, True
    )
    assert within.all()

def test_values_of_the_table_come_back() -> None:
    weight_OC = torch.tensor(TABLE).repeat(8).view(2, 64) * 0.5
    assert torch.equal(dequantise(quantise(weight_OC)), weight_OC)
    zeros_OC = torch.zeros(2, 64)
    assert torch.equal(dequantise(quantise(zeros_OC)), zeros_OC)

def test_two_codes_a_byte_the_first_one_high() -> None:
    weight_OC = torch.zeros(1, 64)
    weight_OC[0, :3] = torch.tensor([1.0, -1.0, TABLE[9]])
    assert quantise(weight_OC).codes_P[:2].tolist() == [15 << 4 | 0, 9 << 4 | 7]

def test_refuses_what_is_not_made_of_blocks() -> None:
    for shape in ((3, 63), (0, 64)):
        with pytest.raises(ValueError, match=r"is not made of blocks of 64: leave it unquantised"):
            quantise(torch.zeros(shape))

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_give_the_same_bits(shape, dtype, draw, triton_here, poisoned) -> None:
    weight_OC = draw(*shape).to(dtype)
    weight_OC[0] = 0.0
    mine, true = quantise(weight_OC, impl="triton"), quantise(weight_OC)
    for name in ("codes_P", "scale_codes_Q", "maxima_S", "mean"):
        assert torch.equal(getattr(mine, name), getattr(true, name)), name
    assert torch.equal(dequantise(mine, impl="triton"), dequantise(true))

@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x > border", "x >= -border"),
        ("high << 4 | low", "low << 4 | high"),
        ("offs_q // GROUP", "offs_q * 0"),
        ("* maximum +", "* maximum -"),
    ],
)
def test_a_mutant_is_seen(old, new, draw, triton_here, monkeypatch, tmp_path) -> None:
    interpreter.mutate(monkeypatch, tmp_path, "kernels.nf4_triton", old, new)
    weight_OC = draw(300, 64).float()
    round_trip = [
        partial(dequantise, impl=i)(quantise(weight_OC, impl=i)) for i in ("triton", "eager")
    ]
    assert not torch.equal(*round_trip)

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_linear_maps_over_codes_are_those_over_the_matrix(dtype, impl, draw, triton_here) -> None:
    """Outputs and gradients, bit by bit; with LoRA beside it too."""
    weight = quantise(draw(64, 48).to(dtype))
    bias_O, x_NC, dy_NO = draw(64).to(dtype), draw(21, 48).to(dtype), draw(21, 64).to(dtype)
    a_RC, b_OR = draw(4, 48).float(), draw(64, 4).float()

    def gradients(function, *inputs) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        y_NO = function(*leaves)
        return [y_NO, *torch.autograd.grad(y_NO, leaves, dy_NO)]

    dense_OC = dequantise(weight)
    pairs = [
        (
            gradients(lambda x, bias: nf4_linear(x, weight, bias, impl=impl), x_NC, bias_O),
            gradients(lambda x, bias: F.linear(x, dense_OC, bias), x_NC, bias_O),
        ),
        tuple(
            gradients(
                lambda x, a, b, bias, w=w: lora_linear(
                    x, w, a, b, bias_O=bias, scale=2.0, impl=impl
                ),
                *(x_NC, a_RC, b_OR, bias_O),
            )
            for w in (weight, dense_OC)
        ),
    ]
    for mine, true in pairs:
        assert len(mine) == len(true) and all(map(torch.equal, mine, true))
