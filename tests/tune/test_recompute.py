"""Layers computed again: the same gradients to the bit, less kept for them, off when judged."""

from collections.abc import Callable, Iterator
import pytest
import torch
from torch import Tensor
from ftcore.config import PeftConfig
from ftcore.data.pack import Encoded, collate
from ftcore.env.compute import generator
from ftcore.model.heads import Model
from ftcore.tune.loop import Loop
from ftcore.tune.task import choose_trainable, classification, token_labels
from kernels.meter import Meter

PEFT = {
    "full": PeftConfig(),
    "last layer": PeftConfig(method="freeze", trainable=("last:1",)),
    "lora": PeftConfig(method="lora", rank=3, alpha=6.0, dropout=0.2),
}

def gradients(model: Model, family: str, rows: list[Encoded]) -> tuple[dict[str, Tensor], int]:
    """Of one batch, with the noise of seed 5; and the bytes alive between the passes."""
    torch.manual_seed(5)
    loss = classification if family == "bert" else token_labels
    with Meter() as meter:
        loss_sum, _ = loss(model, collate(rows))
    live = meter.live
    loss_sum.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found["noise"] = torch.rand(8)  # what comes next in the generator
    model.zero_grad()
    return found, live

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("peft", PEFT)
@pytest.mark.parametrize("family", ["qwen3", "bert", "tag"])
def test_gradients_are_equal_to_the_bit(
    family: str, peft: str, dtype: torch.dtype, tiny_model: Callable[..., Model], rows: Callable
) -> None:
    model = tiny_model(family, dtype=dtype, dropout=0.1)
    choose_trainable(model, PEFT[peft], generator(0, 2))
    for name, param in model.named_parameters():
        if name.endswith("lora_b"):  # zero at the start, so that A would have no gradient
            torch.nn.init.normal_(param, generator=generator(0, 3))
    batch = rows(family, 9)
    kept, most = gradients(model, family, batch)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == kept.keys() - {"noise"}
    assert all(grad.count_nonzero() for name, grad in kept.items() if "k_proj.bias" not in name)
    for model.trunk.recompute in ("selective", "all"):
        again, live = gradients(model, family, batch)
        assert again.keys() == kept.keys()
        assert not [name for name in kept if not torch.equal(kept[name], again[name])]
        # each keeps less than the one before; but nothing of the frozen first layer was kept
        assert live < most or (peft == "last layer" and model.trunk.recompute == "selective")
        most = live

def test_only_training_computes_again(
    tiny_model: Callable[..., Model], rows: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **options: object) -> Tensor:
        raise RuntimeError("computed again")

    monkeypatch.setattr("ftcore.model.transformer.computed_again", never)
    model, batch = tiny_model("qwen3"), collate(rows("qwen3", 3))
    for model.trunk.recompute in ("selective", "all"):
        with pytest.raises(RuntimeError, match="computed again"):
            token_labels(model.train(), batch)
        token_labels(model.eval(), batch)
        with torch.no_grad():
            token_labels(model.train(), batch)

@pytest.fixture
def two_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)

@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("peft", ["full", "lora"])
def test_runs_on_two_cores_end_in_the_same_weights(
    peft: str, make_loop: Callable[..., Loop]
) -> None:
    ends = []
    for kind in ("none", "selective", "all"):
        loop = make_loop(kind, dropout=0.1, peft=PEFT[peft], max_steps=4)
        loop.model.trunk.recompute = kind
        assert loop.train() == 0
        ends.append({name: p.detach().clone() for name, p in loop.optimizer.params.items()})
    for end in ends[1:]:
        assert not [name for name in end if not torch.equal(end[name], ends[0][name])]
