"""kernels/attention_decode.py against its definition."""

from collections.abc import Callable
import pytest
import torch
from torch import Tensor
from kernels.attention import attention_reference
from kernels.attention_decode import (
    attention_chunk,
    attention_decode,
    attention_decode_reference,
)
from kernels.docs import Docs

# lengths, slots, (query heads, key heads, width)
SHAPES = [
    ([1], 1, (1, 1, 1)),
    ([5, 1, 9], 9, (4, 2, 16)),
    ([123, 6, 42], 130, (6, 3, 5)),
]

RULES = [{}, {"window": 5}, {"softcap": 0.7}, {"window": 40, "softcap": 2.0}]

def errors(
    op: Callable[..., Tensor],
    tensors: list[Tensor],
    lengths: list[int],
    dtype: torch.dtype,
    **rule: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Largest error of the op, that of the definition in the same dtype, and the RMS."""
    lengths_B = torch.tensor(lengths)
    true = attention_decode_reference(*tensors, lengths_B, scale=0.3, **rule)
    cast = [tensor.to(dtype) for tensor in tensors]
    plain = attention_decode_reference(*cast, lengths_B, scale=0.3, **rule).double()
    mine = op(*cast, lengths_B, scale=0.3, **rule).double()
    return (mine - true).abs().max(), (plain - true).abs().max(), true.square().mean().sqrt()

@pytest.fixture
def make(draw: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    def inputs(num: int, slots: int, heads: tuple[int, int, int]) -> list[Tensor]:
        H, G, D = heads
        return [draw(num, H, D), draw(num, slots, G, D), draw(num, slots, G, D, seed=1)]

    return inputs

@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lengths", "slots", "heads"), SHAPES)
def test_error_budget(lengths, slots, heads, dtype, rule, make) -> None:
    tensors = make(len(lengths), slots, heads)
    mine, plain, rms = errors(attention_decode, tensors, lengths, dtype, **rule)
    assert mine <= 2 * plain + torch.finfo(dtype).eps * rms

@pytest.mark.parametrize(
    ("extra", "factor", "change"),
    [
        (1, 1.0, {}),
        (-1, 1.0, {}),
        (0, 1.001, {}),
        (0, 1.0, {"window": 41}),
        (0, 1.0, {"softcap": 2.01}),
    ],
)
def test_error_budget_sees_a_mutant(extra: int, factor: float, change, make) -> None:
    def mutant(q_BHD, k_BSGD, v_BSGD, lengths_B, *, scale, **rule) -> Tensor:
        settings = {"scale": scale * factor, **rule, **change}
        return attention_decode(q_BHD, k_BSGD, v_BSGD, lengths_B + extra, **settings)

    lengths, slots, heads = SHAPES[2]
    mine, plain, rms = errors(mutant, make(3, slots, heads), lengths, torch.float32, **RULES[-1])
    assert mine > 2 * plain + torch.finfo(torch.float32).eps * rms

def test_unused_slots_have_no_effect_and_layout_is_free(make) -> None:
    lengths, slots, heads = SHAPES[2]
    q_BHD, k_BSGD, v_BSGD = make(3, slots, heads)
    lengths_B = torch.tensor(lengths)
    before = attention_decode(q_BHD, k_BSGD, v_BSGD, lengths_B)
    for slab_BSGD in (k_BSGD, v_BSGD):
        for row, length in enumerate(lengths):
            slab_BSGD[row, length:] = 1e30
    assert torch.equal(before, attention_decode(q_BHD, k_BSGD, v_BSGD, lengths_B))
    slabs = [slab.transpose(1, 2).contiguous().transpose(1, 2) for slab in (k_BSGD, v_BSGD)]
    assert not slabs[0].is_contiguous()
    torch.testing.assert_close(attention_decode(q_BHD, *slabs, lengths_B), before)

def test_pages_in_any_order_are_their_slabs(make) -> None:
    lengths, (q_BHD, k_BSGD, v_BSGD) = torch.tensor([24, 1, 9]), make(3, 24, (6, 3, 5))
    true = attention_decode(q_BHD, k_BSGD, v_BSGD, lengths, window=20)
    order = torch.tensor([4, 0, 7, 2, 8, 1, 6, 3, 5])
    pools = [x.reshape(9, 8, 3, 5)[order.argsort()] for x in (k_BSGD, v_BSGD)]
    pages_BJ = order.view(3, 3).int()
    assert torch.equal(pools[0][pages_BJ[1, 2]], k_BSGD[1, 16:])
    pages_BJ[1, 1:], pages_BJ[2, 2:] = 99, -99
    for op in (attention_decode, attention_decode_reference):
        found = op(q_BHD, *pools, lengths, pages_BJ=pages_BJ, scale=5**-0.5, window=20)
        torch.testing.assert_close(found, true)

@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("new", [1, 17, 42])
def test_a_chunk_is_the_end_of_the_whole(new: int, rule: dict, draw) -> None:
    whole = [draw(42, heads, 5, seed=seed) for seed, heads in enumerate((6, 3, 3))]
    true = attention_reference(
        *whole, Docs.from_lengths([42]), is_causal=True, scale=0.3, **rule)[-new:]
    found = attention_chunk(whole[0][-new:], *whole[1:], scale=0.3, **rule)
    torch.testing.assert_close(found, true, rtol=1e-12, atol=1e-12)
    other = attention_chunk(whole[0][-new:], *whole[1:], scale=0.301, **rule)
    assert not torch.allclose(other, true, rtol=1e-6)
