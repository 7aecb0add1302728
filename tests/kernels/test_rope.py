"""kernels/rope.py against its definition, and its angles against HF's."""

from functools import partial
import pytest
import torch
from kernels.norm import rms_norm, rms_norm_reference
from kernels.rope import norm_rope, rope, rope_angles, rope_reference

SHAPES = [(1, 1, 2), (7, 3, 6), (123, 4, 64)]

def angles(shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    positions_N = torch.arange(shape[0]) * 3
    return rope_angles(positions_N, head_dim=shape[2], theta=1e4, dtype=dtype)

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_budget(shape, dtype, draw, within_budget) -> None:
    cos_sin_2NE = angles(shape, dtype)  # the same rounded angles for the oracle

    def with_angles(op, x_NHD: torch.Tensor) -> torch.Tensor:
        return op(x_NHD, cos_sin_2NE.to(x_NHD.dtype))

    ops = partial(with_angles, rope), partial(with_angles, rope_reference)
    assert within_budget(*ops, {"x_NHD": draw(*shape)}, dtype)

def test_channels_without_an_angle_stay(draw) -> None:
    x_NHD, cos_sin_2NE = draw(7, 3, 16), angles((7, 3, 6), torch.float32)
    y_NHD = rope(x_NHD, cos_sin_2NE)
    assert torch.equal(y_NHD[..., :6], rope(x_NHD[..., :6].contiguous(), cos_sin_2NE))
    assert torch.equal(y_NHD[..., 6:], x_NHD[..., 6:])

@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_rope_is_both_ops(dtype, offset, draw, within_budget) -> None:
    cos_sin_2NE, rule = angles((7, 3, 8), dtype), {"eps": 1e-6, "offset": offset}

    def composed(norm, turn, x_NHD: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
        return turn(norm(x_NHD, weight_D, **rule), cos_sin_2NE.to(x_NHD.dtype))

    inputs = {"x_NHD": draw(7, 3, 8), "weight_D": 1 - offset + 0.1 * draw(8)}
    op = partial(norm_rope, cos_sin_2NE=cos_sin_2NE, **rule)
    assert within_budget(op, partial(composed, rms_norm_reference, rope_reference), inputs, dtype)
    inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    assert torch.equal(op(**inputs), composed(rms_norm, rope, **inputs))

def test_auto_norms_and_turns_at_once_where_the_kernel_can(draw, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr("kernels.backend.uses_triton", lambda op, *_, fits: seen.append((op, fits)))
    for D in (8, 256, 258):
        norm_rope(draw(3, 2, D), draw(D), draw(2, 3, D // 2), eps=1e-6)
    assert [fits for op, fits in seen if op == "norm_rope"] == [True, True, False]
    assert [fits for op, fits in seen if op == "rope"] == [True] * 3
    rope(draw(3, 2, 600), draw(2, 3, 300))
    assert seen[-1] == ("rope", False)

@pytest.mark.parametrize("which", ["angle", "direction"])
def test_error_budget_sees_a_mutant(which, draw, within_budget) -> None:
    right = angles((7, 3, 6), torch.float64)
    wrong = right.clone()
    if which == "direction":
        wrong[1].neg_()
    else:
        wrong[:, 3] = right[:, 4]
    mutant = lambda x_NHD: rope(x_NHD, wrong.to(x_NHD.dtype))  # noqa: E731
    reference = lambda x_NHD: rope_reference(x_NHD, right.to(x_NHD.dtype))  # noqa: E731
    assert not within_budget(mutant, reference, {"x_NHD": draw(7, 3, 6)}, torch.float32)

@pytest.mark.parametrize("op", [rope, rope_reference])
def test_gradcheck(op, draw) -> None:
    x_NHD = draw(5, 2, 4).requires_grad_()
    cos_sin_2NE = angles((5, 2, 4), torch.float64)
    assert torch.autograd.gradcheck(lambda x: op(x, cos_sin_2NE), [x_NHD])

def test_scores_depend_on_distance_alone(draw) -> None:
    q_NHD, k_NHD = draw(2, 1, 8)[:1], draw(2, 1, 8)[1:]

    def score(q_position: int, k_position: int) -> torch.Tensor:
        turned = [
            rope(x, rope_angles(torch.tensor([p]), head_dim=8, theta=1e4, dtype=torch.float64))
            for x, p in ((q_NHD, q_position), (k_NHD, k_position))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(9, 4), score(5, 0), rtol=1e-5, atol=1e-5)
    assert abs(score(9, 4) - score(9, 0)) > 1e-2

@pytest.mark.parametrize(
    ("settings", "hf"),
    [
        ({}, {"rope_type": "default"}),
        ({"factor": 3.7}, {"rope_type": "linear", "factor": 3.7}),
        (
            {"factor": 8.0, "bands": (1.0, 4.0, 8192)},
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ],
    ids=["plain", "linear", "llama3"],
)
def test_angles_are_those_of_transformers(settings, hf) -> None:
    """To the bit at position 32,000, where an ulp of the frequency is seen."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(
        head_dim=64, max_position_embeddings=131_072, rope_parameters={**hf, "rope_theta": 5e5}
    )
    positions_N = torch.tensor([0, 1, 599, 31_999])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions_N[None])
    ours = rope_angles(positions_N, head_dim=64, theta=5e5, dtype=torch.float32, **settings)
    assert torch.equal(ours, torch.stack([cos[0, :, :32], sin[0, :, :32]]))
