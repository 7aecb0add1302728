"""kernels/lora_triton.py in the interpreter, by the pass rule of the eager path."""

from functools import partial
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernels import launch
from kernels.lora import lora_linear, lora_linear_reference
from tests.kernels import interpreter

interpreter.require()

OP = partial(lora_linear, scale=2.0, impl="triton")
REFERENCE = partial(lora_linear_reference, scale=2.0)
SIZES = [(1, 1, 1, 1), (5, 7, 3, 2), (42, 123, 6, 4), (70, 33, 49, 16), (23, 24, 10, 40)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    """So that small inputs have several tiles in every direction, and several groups."""
    for kernel, blocks in {
        "lora_shrink": {"BLOCK_N": 32, "BLOCK_C": 16},
        "lora_dh_db": {"BLOCK_N": 16, "BLOCK_O": 16, "PER_SM": 8},
        "lora_drop_bwd": {"BLOCK_N": 16, "BLOCK_C": 16, "PER_SM": 8},
    }.items():
        monkeypatch.setitem(launch.configs(), (kernel, "any"), {128: blocks})

def make(n: int, c: int, o: int, r: int, draw) -> dict[str, torch.Tensor]:
    shapes = {"x_NC": (n, c), "weight_OC": (o, c), "a_RC": (r, c), "b_OR": (o, r), "bias_O": (o,)}
    return {
        name: draw(*shape, seed=seed) / shape[-1] ** 0.5
        for seed, (name, shape) in enumerate(shapes.items())
    }

def seeded(x_NC, *args, dropout: float, **kwargs) -> torch.Tensor:
    torch.manual_seed(3)
    return lora_linear(x_NC, *args, dropout=dropout, impl="triton", **kwargs)

def mask_of(n: int, c: int, p: float) -> torch.Tensor:
    """keep / (1 - p) as the update shows it for x = 1, A = B = 1 and W = 0."""
    eye = torch.eye(c)
    return seeded(torch.ones(n, c), torch.zeros_like(eye), eye, eye, scale=1.0, dropout=p)

@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_error_budget(sizes, dtype, draw, within_budget, poisoned) -> None:
    assert within_budget(OP, REFERENCE, make(*sizes, draw), dtype)

@pytest.mark.parametrize("dtype", DTYPES)
def test_error_budget_with_dropout(dtype, draw, within_budget, poisoned) -> None:
    keep_NC = mask_of(42, 123, 0.25)
    assert 0 < (keep_NC == 0).sum() < keep_NC.numel()

    def composed(x_NC, weight_OC, a_RC, b_OR, bias_O):
        update_NO = (x_NC * keep_NC.to(x_NC.dtype)) @ a_RC.T @ b_OR.T
        return F.linear(x_NC, weight_OC, bias_O) + 2.0 * update_NO

    op = partial(seeded, scale=2.0, dropout=0.25)
    assert within_budget(op, composed, make(42, 123, 6, 4, draw), dtype)

@pytest.mark.parametrize(
    ("dropout", "old", "new"),
    [
        (0.0, "h = (h * keep_scale)", "h = (h * 1.001)"),
        (0.0, "db = tl.dot(tl.trans(dy), h, db,", "db = tl.dot(tl.trans(dy), h,"),
        (0.0, "pid_o.to(tl.int64) * N * R", "0 * N * R"),
        (0.3, "da = tl.dot(tl.trans(dh), tl.where(kept, x, 0.0),", "da = tl.dot(tl.trans(dh), x,"),
        (0.3, "tl.where(kept, keep_scale * tl", "tl.where(True, keep_scale * tl"),
    ],
)
def test_error_budget_sees_a_mutant(
    dropout, old, new, draw, within_budget, monkeypatch, tmp_path
) -> None:
    keep_NC = mask_of(70, 33, dropout)
    interpreter.mutate(monkeypatch, tmp_path, "kernels.lora_triton", old, new)

    def composed(x_NC, weight_OC, a_RC, b_OR, bias_O):
        update_NO = (x_NC * keep_NC.to(x_NC.dtype)) @ a_RC.T @ b_OR.T
        return F.linear(x_NC, weight_OC, bias_O) + 2.0 * update_NO

    op = partial(seeded, scale=2.0, dropout=dropout)
    assert not within_budget(op, composed, make(70, 33, 49, 4, draw), torch.float32)

def philox(seed: int, rows: int, columns: int) -> np.ndarray:
    """The shorts that decide on each input, in numpy (Salmon et al. 2011: Philox 4x32-7)."""
    column, row = np.meshgrid(np.arange(-(-columns // 8)), np.arange(rows))
    c = [row.astype(np.uint64), column.astype(np.uint64), np.uint64(0), np.uint64(0)]
    k0, k1, low = seed & 0xFFFFFFFF, seed >> 32, np.uint64(0xFFFFFFFF)
    for _ in range(7):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [b >> 32 ^ c[1] ^ np.uint64(k0), b & low, a >> 32 ^ c[3] ^ np.uint64(k1), a & low]
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    words = np.stack([np.broadcast_to(word, row.shape) for word in c], -1)
    order = words[..., [0, 2, 1, 3]]  # of joins of joins
    shorts = np.stack([order & np.uint64(0xFFFF), order >> np.uint64(16)], -1)
    return shorts.reshape(rows, -1)[:, :columns]

def test_the_mask_is_that_of_philox() -> None:
    torch.manual_seed(3)
    shorts = philox(torch.randint(2**63 - 1, (1,)).item(), 37, 42)
    dropped = round(0.3 * 2**16)
    keep_NC = mask_of(37, 42, 0.3).numpy()
    assert ((shorts >= dropped) == (keep_NC != 0)).all()
    assert np.allclose(keep_NC[keep_NC != 0], 2**16 / (2**16 - dropped))

def test_a_share_of_p_is_dropped() -> None:
    torch.manual_seed(3)
    shorts = philox(torch.randint(2**63 - 1, (1,)).item(), 1000, 1000)
    for p in (0.001, 0.1, 0.5):
        dropped = shorts < round(p * 2**16)
        assert abs(dropped.mean() - p) < 4 * (p * (1 - p) / 1e6) ** 0.5 + 2**-16
        assert (dropped[:, 1:] & dropped[:, :-1]).mean() == pytest.approx(p * p, abs=4 * p / 1000)

def test_frozen_weight_gets_no_gradient_and_wide_factors_keep_their_dtype(draw) -> None:
    inputs = {name: tensor.bfloat16() for name, tensor in make(6, 8, 4, 2, draw).items()}
    factors = [inputs[name].float().requires_grad_() for name in ("a_RC", "b_OR")]
    y_NO = OP(inputs["x_NC"], inputs["weight_OC"], *factors)
    y_NO.sum().backward()
    assert y_NO.dtype == torch.bfloat16 and inputs["weight_OC"].grad is None
    assert factors[0].grad.dtype == factors[1].grad.dtype == torch.float32

def test_strided_inputs_and_no_rows(draw) -> None:
    inputs = {name: tensor.float() for name, tensor in make(6, 8, 4, 2, draw).items()}
    strided = {name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in inputs.items()}
    torch.testing.assert_close(OP(**strided), REFERENCE(**inputs))
    inputs["x_NC"] = inputs["x_NC"][:0].requires_grad_()
    inputs["a_RC"].requires_grad_()
    OP(**inputs, dropout=0.5).sum().backward()
    assert not inputs["a_RC"].grad.any()

def test_refuses_what_does_not_fit(draw) -> None:
    inputs = {name: tensor.float() for name, tensor in make(6, 8, 4, 129, draw).items()}
    with pytest.raises(ValueError, match="lora_shrink: size 129, at most 128; pass impl="):
        OP(**inputs)
    inputs = {name: tensor.float() for name, tensor in make(6, 8, 4, 2, draw).items()}
    with pytest.raises(ValueError, match=r"a has shape \(2, 7\), must be \(2, 8\)"):
        OP(**inputs | {"a_RC": inputs["a_RC"][:, :7]})
    with pytest.raises(ValueError, match="weight is torch.float16, must be torch.float32; cast"):
        OP(**inputs | {"weight_OC": inputs["weight_OC"].half()})
    with pytest.raises(ValueError, match="b is on meta, must be on cpu; move it there"):
        OP(**inputs | {"b_OR": inputs["b_OR"].to("meta")})
