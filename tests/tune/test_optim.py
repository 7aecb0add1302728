"""AdamW against torch's own, and what it keeps for 16-bit, frozen and one-axis tensors."""

import gc
import math
import weakref
from itertools import pairwise
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from ftcore.config import OptimConfig
from ftcore.errors import CheckpointError
from ftcore.tune.optim import AdamW, Span

SHAPES = {"weight": (7, 5), "bias": (5,), "conv": (3, 2, 2), "one": (1, 1)}
OPTIONS = OptimConfig(eps=1e-6, weight_decay=0.1)

class ReadableAdamW(AdamW):
    """The same, its update written out as at the head of optim.py."""

    @torch.no_grad()
    def step(self, part: Span, lr: float, grad_scale: float = 1.0) -> None:
        self.step_count += 1
        (beta1, beta2), eps, step = self.config.betas, self.config.eps, self.step_count
        for (ratio, decay, _), pieces in self._work(part):
            for piece in pieces:
                p, m, v = (flat[slice(*piece)] for flat in self.flats.values())
                g, rate = self._gradient(piece).mul_(grad_scale), lr * ratio
                p.mul_(1 - rate * decay)
                m.lerp_(g, 1 - beta1)
                v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                denominator = (v / (1 - beta2**step)).sqrt_().add_(eps)
                p.addcdiv_(m, denominator, value=-rate / (1 - beta1**step))

def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return {n: nn.Parameter(torch.randn(s, generator=draw).to(dtype)) for n, s in SHAPES.items()}

def gradients(step: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return {n: torch.randn(s, generator=draw) * 10.0 ** (step % 5 - 3) for n, s in SHAPES.items()}

def whole(optimizer: AdamW) -> Span:
    (part,) = optimizer.parts(1)
    return part

def norm_of(optimizer: AdamW) -> float:
    return math.sqrt(sum(optimizer.square_sums(whole(optimizer))))

def backward(params: dict[str, nn.Parameter], grads: dict[str, Tensor]) -> None:
    """Give each parameter its gradient the way a loss would."""
    products = [params[name] * grad.to(params[name].dtype) for name, grad in grads.items()]
    sum(product.sum() for product in products).backward()

@pytest.mark.parametrize("kind", [ReadableAdamW, AdamW])
def test_it_is_the_adamw_of_torch(kind: type[AdamW]) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = kind(ours.items(), OPTIONS)
    matrices = [p for p in theirs.values() if p.dim() >= 2]
    vectors = [p for p in theirs.values() if p.dim() < 2]
    oracle = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=OPTIONS.betas,
        eps=OPTIONS.eps,
    )
    for step in range(20):
        lr = 1e-2 / (step + 1)
        optimizer.zero_grad()
        oracle.zero_grad()
        for params in (ours, theirs):
            backward(params, gradients(step))
        optimizer.step(whole(optimizer), lr)
        for group in oracle.param_groups:
            group["lr"] = lr
        oracle.step()
    for name in SHAPES:
        # Measured: at most 2 units in the last place after 20 steps.
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)

def test_the_fused_kernel_is_the_readable_form() -> None:
    fast, readable = parameters(), parameters()
    optimizers = [AdamW(fast.items(), OPTIONS), ReadableAdamW(readable.items(), OPTIONS)]
    for step in range(20):
        for optimizer in optimizers:
            optimizer.zero_grad()
            backward(optimizer.params, gradients(step))
            optimizer.step(whole(optimizer), 1e-2, grad_scale=0.5)
    fused, plain = (optimizer.state() for optimizer in optimizers)
    for group in ("master", "exp_avg", "exp_avg_sq"):
        for name in SHAPES:
            torch.testing.assert_close(fused[group][name], plain[group][name], rtol=1e-6, atol=1e-7)
    assert norm_of(optimizers[0]) == norm_of(optimizers[1])

def test_a_first_step_worked_by_hand() -> None:
    # m = 0.1 g, v = 0.02 g^2; both corrections undo the factors, so the step is lr g / (|g| + eps).
    params = {"matrix": nn.Parameter(torch.full((1, 1), 2.0)), "norm": nn.Parameter(torch.ones(1))}
    optimizer = AdamW(params.items(), OptimConfig(eps=0.0, weight_decay=0.5))
    backward(params, {"matrix": torch.full((1, 1), 3.0), "norm": torch.full((1,), -3.0)})
    optimizer.step(whole(optimizer), 0.1)
    assert params["matrix"].item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1)
    assert params["norm"].item() == pytest.approx(1.0 + 0.1)  # one axis: no decay

def test_a_rate_of_its_own() -> None:
    """LoRA+: the step and the decay of `matrix` are three times those of the same values beside."""
    params = {name: nn.Parameter(torch.full((1, 1), 2.0)) for name in ("matrix", "other")}
    config = OptimConfig(eps=0.0, weight_decay=0.5)
    optimizer = AdamW(params.items(), config, rates={"matrix": 3.0})
    backward(params, {name: torch.full((1, 1), 4.0) for name in params})
    optimizer.step(whole(optimizer), 0.1)
    assert params["matrix"].item() == pytest.approx(2.0 * (1 - 0.3 * 0.5) - 0.3)
    assert params["other"].item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1)

def test_gradients_add_up_over_micro_batches_and_are_scaled_once() -> None:
    params = parameters()
    optimizer = AdamW(params.items(), OPTIONS)
    for step in (0, 1, 2):
        backward(params, gradients(step))
    assert all(param.grad is None for param in params.values())
    total = {name: sum(gradients(step)[name] for step in (0, 1, 2)) for name in SHAPES}
    for name in SHAPES:
        torch.testing.assert_close(optimizer.grads[name], total[name], rtol=1e-6, atol=1e-9)
    norm = torch.cat([grad.flatten() for grad in total.values()]).norm().item()
    assert norm_of(optimizer) == pytest.approx(norm, rel=1e-6)
    optimizer.step(whole(optimizer), 0.0, grad_scale=0.25)
    torch.testing.assert_close(optimizer.state()["exp_avg"]["weight"], 0.1 * 0.25 * total["weight"])

def test_small_updates_of_a_bf16_tensor_are_not_lost() -> None:
    # bf16 keeps 8 bits: 1 - 1e-4 rounds back to 1. The fp32 master moves 100 times by 1e-4.
    ends = {}
    for dtype in (torch.bfloat16, torch.float32):
        params = {"weight": nn.Parameter(torch.ones(4, 4, dtype=dtype))}
        optimizer = AdamW(params.items(), OptimConfig(eps=0.0, weight_decay=0.0))
        for _ in range(100):
            optimizer.zero_grad()
            backward(params, {"weight": torch.ones(4, 4)})
            optimizer.step(whole(optimizer), 1e-4)
        ends[dtype] = (params["weight"], optimizer.masters["weight"])
    (rounded, master), (_, exact) = ends.values()
    assert master.dtype == torch.float32 and torch.equal(master, exact)
    assert master.flatten().tolist() == pytest.approx([0.99] * 16, rel=1e-5)
    assert torch.equal(rounded, torch.full((4, 4), 0.99, dtype=torch.bfloat16))

def test_micro_batches_of_a_bf16_tensor_add_up_in_fp32() -> None:
    params = {"weight": nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))}
    optimizer = AdamW(params.items(), OPTIONS)
    for grad in (256.0, *[1.0] * 8):  # in bf16, 256 + 1 = 256
        backward(params, {"weight": torch.full((2, 2), grad)})
    assert optimizer.grads["weight"].dtype == torch.float32
    assert torch.equal(optimizer.grads["weight"], torch.full((2, 2), 264.0))

def test_one_micro_batch_keeps_the_dtype_of_a_bf16_tensor() -> None:
    """The same steps bit for bit; a second micro-batch is refused, since it would lose bits."""
    runs = []
    for accumulates in (True, False):
        params = parameters(torch.bfloat16)
        optimizer = AdamW(params.items(), OPTIONS, accumulates=accumulates)
        for step in range(4):
            optimizer.zero_grad()
            backward(params, gradients(step))
            square = sum(optimizer.square_sums(whole(optimizer)))
            optimizer.step(whole(optimizer), 1e-2, grad_scale=0.5)
        runs.append((params, optimizer, square))
    (params, wide, square), (others, narrow, other) = runs
    assert square == other
    assert all(torch.equal(params[name], others[name]) for name in SHAPES)
    assert {wide.grads["bias"].dtype, narrow.grads["bias"].dtype} == {torch.float32, torch.bfloat16}
    with pytest.raises(AssertionError, match="a sum would lose bits"):
        backward(others, gradients(9))

def test_gradients_of_several_processes_are_added_in_fp32() -> None:
    params = {"weight": nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))}
    optimizer = AdamW(params.items(), OPTIONS, accumulates=False)
    optimizer.open_buffers(3)
    for number, grad in enumerate((256.0, 1.0, 1.0)):  # in bf16, 256 + 1 = 256
        optimizer.collect_in(number)
        optimizer.zero_grad()
        backward(params, {"weight": torch.full((2, 2), grad)})
    assert norm_of(optimizer) == 2 * 258.0

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wide_tensor_is_its_own_master(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = AdamW(params.items(), OPTIONS)
    assert optimizer.flat_param is None
    optimizer.flats["master"].zero_()
    assert not any(param.any() for param in params.values())
    assert {t.dtype for group in optimizer.state().values() for t in group.values()} == {dtype}

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_round_bit_equal(dtype: torch.dtype) -> None:
    runs = []
    for stops in (False, True):
        params = parameters(dtype)
        optimizer = AdamW(params.items(), OPTIONS)
        for step in range(6):
            if stops and step == 3:
                saved = {
                    group: {name: tensor.detach().clone() for name, tensor in named.items()}
                    for group, named in optimizer.state().items()
                }
                params = {n: nn.Parameter(torch.zeros_like(p)) for n, p in params.items()}
                optimizer = AdamW(params.items(), OPTIONS)
                optimizer.load_state(saved, 3)
            optimizer.zero_grad()
            backward(params, gradients(step))
            optimizer.step(whole(optimizer), 1e-2)
        runs.append((params, optimizer.state()))
    (params, state), (resumed, resumed_state) = runs
    for name in SHAPES:
        assert torch.equal(params[name], resumed[name])
        assert all(torch.equal(state[g][name], resumed_state[g][name]) for g in state)

@pytest.mark.parametrize("fault", ["missing", "unknown", "shape", "group"])
def test_a_state_that_does_not_fit_changes_nothing(fault: str) -> None:
    optimizer = AdamW(parameters().items(), OPTIONS)
    state = {
        group: {name: tensor.detach() + 1 for name, tensor in named.items()}
        for group, named in optimizer.state().items()
    }
    if fault == "missing":
        del state["exp_avg_sq"]["bias"]
    elif fault == "unknown":
        state["exp_avg_sq"]["scale"] = torch.zeros(1)
    elif fault == "shape":
        state["exp_avg_sq"]["weight"] = torch.zeros(1, 5)  # would broadcast
    else:
        del state["exp_avg_sq"]
    with pytest.raises(CheckpointError, match="tensors of exp_avg_sq are missing, unknown"):
        optimizer.load_state(state, 9)
    assert optimizer.step_count == 0
    assert all(torch.equal(optimizer.params[name], p) for name, p in parameters().items())

@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_parts_make_the_same_step(count: int) -> None:
    """They are cut between parameters, and some are empty."""
    ends = []
    for cut in (1, count):
        params = parameters(torch.bfloat16)
        optimizer = AdamW(params.items(), OPTIONS, rates={"conv": 4.0})
        parts = optimizer.parts(cut)
        assert len(parts) == cut and all(a[1] == b[0] for a, b in pairwise(parts))
        backward(params, gradients(1))
        squares = [sum(optimizer.square_sums(part)) for part in parts]
        for part in parts:
            optimizer.step_count = 0  # that of each process
            optimizer.step(part, 1e-2, grad_scale=0.5)
        ends.append((params, optimizer.state(), sum(squares)))
    (alone, state, square), (together, other, squares) = ends
    assert squares == pytest.approx(square, rel=1e-6)
    for name in SHAPES:
        assert torch.equal(alone[name], together[name])
        assert all(torch.equal(state[group][name], other[group][name]) for group in state)

def test_buffers_of_processes_that_are_gone_are_not_summed() -> None:
    params = {"weight": nn.Parameter(torch.ones(2, 2))}
    optimizer = AdamW(params.items(), OPTIONS)
    for count in (2, 1):
        optimizer.open_buffers(count)
        for buffer in optimizer.buffers:
            buffer.fill_(1.0)
        assert norm_of(optimizer) == 2.0 * count

def test_a_row_read_often_has_its_gradients_summed_in_fp32() -> None:
    params = {"embed": nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))}
    rows = {"embed": torch.tensor([0, 2])}
    optimizer = AdamW(params.items(), OPTIONS, rows=rows, accumulates=False)
    optimizer.zero_grad()
    x_NC = F.embedding(torch.tensor([2] * 300), params["embed"], sparse=True)
    x_NC.sum().backward()  # in bf16, 256 + 1 = 256
    assert optimizer.grads["embed"].tolist() == [[0, 0], [300, 300]]

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_with_a_sparse_gradient_are_trained_as_the_whole_is(dtype: torch.dtype) -> None:
    """Rows of `rows` exactly, momentum without a gradient too; the others not at all."""
    rows_L, runs = torch.tensor([1, 2, 5]), []
    for is_sparse in (False, True):
        draw = torch.Generator().manual_seed(0)
        params = {"embed": nn.Parameter(torch.randn(7, 3, generator=draw).to(dtype))}
        rows = {"embed": rows_L} if is_sparse else None
        optimizer = AdamW(params.items(), OPTIONS, rows=rows)
        start = params["embed"].detach().clone()
        for step, reads in enumerate([[1, 5, 1], [2], [], [5, 5]]):
            optimizer.zero_grad()
            for read in reads:  # each a micro-batch
                x_NC = F.embedding(torch.tensor([read, read]), params["embed"], sparse=is_sparse)
                (x_NC * (step + read)).sum().backward()
            optimizer.zero_unreached()
            optimizer.step(whole(optimizer), 1e-2)
        runs.append((params["embed"].detach(), optimizer.state()))
    (true, dense), (found, sparse) = runs
    assert torch.equal(found[rows_L], true[rows_L])
    rest = [0, 3, 4, 6]
    assert torch.equal(found[rest], start[rest]) and not torch.equal(true[rest], start[rest])
    assert torch.equal(sparse.pop("rows")["embed"], rows_L)
    for group, named in sparse.items():
        assert torch.equal(named["embed"], dense[group]["embed"][rows_L])

def test_rows_of_other_data_are_refused() -> None:
    """As many, but others: their places would be taken for those of the first."""
    first, second = (
        AdamW([("embed", nn.Parameter(torch.ones(7, 3)))], OPTIONS, rows={"embed": rows_L})
        for rows_L in (torch.tensor([1, 2, 5]), torch.tensor([1, 3, 5]))
    )
    with pytest.raises(CheckpointError, match="the training rows are not those of the"):
        second.load_state(first.state(), 4)
    assert second.step_count == 0

def test_the_norm_of_a_long_gradient() -> None:
    """In one sum over few fp32 lanes, 30 M values would lose 0.2 %."""
    optimizer = AdamW([("one", nn.Parameter(torch.ones(30_000_000)))], OPTIONS)
    optimizer.buffers[0].fill_(0.1)
    assert norm_of(optimizer) == pytest.approx(0.1 * 30_000_000**0.5, rel=2e-5)

def test_an_optimiser_that_nobody_holds_is_gone() -> None:
    """Its state too, also where its hooks are still on the parameters."""
    model = nn.Linear(3, 2)
    there = weakref.ref(AdamW(model.named_parameters(), OptimConfig()))
    gc.collect()
    assert there() is None and not model.weight.grad
