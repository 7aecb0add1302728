"""kernels/rope_triton.py in the interpreter, by the pass rule of the eager path."""

import pytest
import torch

from kernels.rope import rope, rope_angles, rope_reference
from tests.kernels import interpreter

interpreter.require()

SHAPES = [(1, 1, 2), (7, 3, 6), (42, 6, 64), (31, 4, 24)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def ops(shape: tuple[int, int, int], dtype: torch.dtype, part: float = 1.0):
    turned = max(2, int(part * shape[2]) // 2 * 2)
    positions_N = torch.arange(shape[0]) * 3
    cos_sin_2NE = rope_angles(positions_N, head_dim=turned, theta=1e4, dtype=dtype)
    return (
        lambda x_NHD: rope(x_NHD, cos_sin_2NE.to(x_NHD.dtype), impl="triton"),
        lambda x_NHD: rope_reference(x_NHD, cos_sin_2NE.to(x_NHD.dtype)),
    )


@pytest.mark.parametrize("part", [1.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_budget(shape, dtype, part, draw, within_budget, poisoned) -> None:
    assert within_budget(*ops(shape, dtype, part), {"x_NHD": draw(*shape)}, dtype)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x1 * cos - x2 * sin", "x1 * cos + x2 * sin"),
        ("if IS_BACKWARD", "if False"),
        ("offs_r % H * stride_xh", "offs_r % 2 * stride_xh"),
        ("2 * E + tl.arange", "E + tl.arange"),
    ],
)
def test_error_budget_sees_a_mutant(old, new, draw, within_budget, monkeypatch, tmp_path) -> None:
    interpreter.mutate(monkeypatch, tmp_path, "kernels.rope_triton", old, new)
    pair = ops((7, 3, 12), torch.float32, 0.5)
    assert not within_budget(*pair, {"x_NHD": draw(7, 3, 12)}, torch.float32)


def test_strided_heads_and_no_rows(draw) -> None:
    fused_NHD = draw(7, 5, 8).float()
    op, reference = ops((7, 2, 8), torch.float32)
    part_NHD = fused_NHD[:, 1:3]
    torch.testing.assert_close(op(part_NHD), reference(part_NHD))
    turned_NHD = part_NHD.transpose(0, 2).contiguous().transpose(0, 2)
    torch.testing.assert_close(op(turned_NHD), reference(part_NHD))
    assert ops((0, 2, 8), torch.float32)[0](fused_NHD[:0, :2]).shape == (0, 2, 8)


def test_refuses_sizes_that_do_not_fit(draw) -> None:
    x_NHD = draw(3, 2, 4).float()
    with pytest.raises(ValueError, match=r"cos_sin has shape \(2, 5, 2\), must be \(2, 3, 2\)"):
        rope(x_NHD, draw(2, 5, 2).float(), impl="triton")
    with pytest.raises(ValueError, match="channels that turn = 6: the kernel takes at most 4"):
        rope(x_NHD, draw(2, 3, 3).float(), impl="triton")
