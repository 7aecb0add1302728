"""A step's gradient does not depend on how its rows are cut into micro-batches."""

from collections.abc import Callable
from dataclasses import replace
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from ftcore.config import OptimConfig
from ftcore.data.pack import Encoded, collate
from ftcore.env.compute import generator
from ftcore.errors import ModelError
from ftcore.model.heads import Model
from ftcore.tune.optim import AdamW
from ftcore.tune.task import TASKS, Task, classification, hidden, regression, token_labels
from kernels.docs import pack
from tests.tune.conftest import QWEN3

# Of `change`: the loss, and what it needs the labels of the rows to be.
KINDS = {
    "next token": ("qwen3", token_labels, None),
    "hidden token": ("masked", token_labels, None),
    "tags": ("tag", token_labels, None),
    "class": ("bert", classification, None),
    "several labels": ("bert", classification, lambda n: np.float32([n == 0, n < 2, n == 1])),
}

def change(kind: str, documents: list[Encoded]) -> tuple[Task, list[Encoded]]:
    """The loss of a kind, and documents with labels for it."""
    _, loss, labels = KINDS[kind]
    if labels is not None:
        documents = [replace(d, labels=labels(d.labels)) for d in documents]
    return loss, documents

@pytest.fixture
def gradient(tiny_model: Callable, rows: Callable) -> Callable[..., dict[str, Tensor]]:
    """(kind, dtype, streams of row numbers) -> the gradient of one step over these rows."""

    def compute(kind: str, dtype: torch.dtype, streams: list[list[int]]) -> dict[str, Tensor]:
        family = KINDS[kind][0]
        model = tiny_model(family, dtype=dtype)
        loss, documents = change(kind, rows(family, 9))
        optimizer = AdamW(model.named_parameters(), OptimConfig())
        batches = [collate([documents[index] for index in stream]) for stream in streams]
        weight = sum(batch.weights.double().sum().item() for batch in batches)
        for batch in batches:
            (loss(model, batch)[0] / weight).backward()
        return optimizer.grads

    return compute

@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_split_of_a_step_gives_the_same_gradient(
    gradient: Callable, rows: Callable, kind: str, dtype: torch.dtype, bound: float
) -> None:
    family = KINDS[kind][0]
    lengths = [len(row) for row in rows(family, 9)]
    whole = gradient(kind, dtype, [list(range(9))])
    assert min(grad.norm().item() for grad in whole.values()) > 0
    shuffle = np.random.default_rng(0).permutation(9).tolist()
    splits = [pack(lengths, budget) for budget in (1, 45, 70, 100)]
    splits += [[shuffle], [shuffle[:1], shuffle[1:]], [shuffle[5:], shuffle[:5]]]
    assert len({len(split) for split in splits}) >= 4
    for split in splits:
        for name, grad in gradient(kind, dtype, split).items():
            # An encoder's keys are shifted by their bias, which softmax ignores: noise over noise.
            if family != "qwen3" and name.endswith("k_proj.bias"):
                continue
            error = (grad - whole[name]).norm() / whole[name].norm()
            assert error <= bound, (name, split, error)

@pytest.mark.parametrize("compute", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("changes", [
    {}, {"windows": (3, 0), "attention_softcap": 5.0}, {"position": "learned"},
], ids=["qwen3", "windows and caps", "learned positions"])  # fmt: skip
def test_documents_that_begin_alike_are_computed_once(
    changes: dict, compute: torch.dtype, rows: Callable
) -> None:
    """A batch with a prefix tree has the losses and gradients of the one without."""
    documents = rows("qwen3", 6)
    for n, long in enumerate(rows("qwen3", 6)):  # half of it, another end; then the very same
        ids_T = np.append(long.tokens_T[: len(long) // 2], np.int32([n, 7]))
        documents += [replace(long, row_id="half", tokens_T=ids_T, labels=ids_T,
                              weights=np.ones(len(ids_T), np.float32)), long]
    computed, found = [], {}
    for is_causal in (False, True):
        model = Model(replace(QWEN3, **changes), "lm")
        model.init_weights(generator(0, 5))
        model.double().compute_in(compute)
        model.trunk.layers[0].register_forward_hook(lambda *call: computed.append(len(call[2])))
        batch = collate(documents, is_causal=is_causal)
        loss, _ = token_labels(model, batch)
        loss.backward()
        grads = {name: param.grad for name, param in model.named_parameters()}
        found[is_causal] = {"loss": loss.detach(), "all": hidden(model, batch, None), **grads}
    assert computed[2] < 0.6 * computed[0]
    bound = 1e-11 if compute == torch.float64 else 2e-2
    for name, value in found[False].items():
        error = (found[True][name] - value).norm() / value.norm()
        assert error <= bound and value.norm() > 0, (name, float(error))

def test_a_document_beyond_the_learned_positions_is_refused_though_it_begins_like_another() -> None:
    model = Model(replace(QWEN3, position="learned", max_positions=8), "lm")
    ids_T = np.arange(9, dtype=np.int32)
    row = Encoded("long", ids_T, ids_T, np.ones(9, np.float32))
    with pytest.raises(ModelError, match="a document has 9 tokens, the model has positions for 8"):
        token_labels(model, collate([row, row], is_causal=True))

def test_the_mean_of_micro_batch_means_is_something_else(
    gradient: Callable, tiny_model: Callable, rows: Callable
) -> None:
    """The error that (sum, weight) is there to avoid is large on these rows."""
    model, documents = tiny_model("qwen3"), rows("qwen3", 9)
    for row in documents:
        loss, weight = token_labels(model, collate([row]))
        (loss / weight / len(documents)).backward()
    name = "trunk.layers.0.self_attn.q_proj.weight"
    right = gradient("next token", torch.float32, [list(range(9))])[name]
    assert (model.get_parameter(name).grad - right).norm() / right.norm() > 1e-2

def test_language_modelling_is_weighted_cross_entropy(tiny_model: Callable, rows: Callable) -> None:
    model, batch = tiny_model("qwen3"), collate(rows("qwen3", 5))
    loss, weight = token_labels(model, batch)
    h_NC = model.trunk(batch.tokens_N, batch.positions_N, batch.types_N, batch.docs)
    nll_N = F.cross_entropy(model.head(h_NC), batch.labels, reduction="none")
    assert (batch.weights == 0).any()
    torch.testing.assert_close(loss, (nll_N * batch.weights).sum(), rtol=1e-5, atol=0)
    assert weight.item() == batch.weights.sum().item()

def test_rows_of_weight_zero_never_reach_the_head(
    tiny_model: Callable, rows: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(h_MC: Tensor, *args: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        seen.append(len(h_MC))
        return h_MC.sum(), args[-1].sum()

    monkeypatch.setattr("kernels.cross_entropy.linear_cross_entropy", spy)
    for family in ("qwen3", "tag"):
        batch = collate(rows(family, 5))
        token_labels(tiny_model(family), batch)
        assert seen.pop() == int((batch.weights > 0).sum()) < batch.docs.num_tokens and not seen

def test_classification_is_weighted_cross_entropy(tiny_model: Callable, rows: Callable) -> None:
    model, batch = tiny_model("bert"), collate(rows("bert", 5))
    loss, weight = classification(model, batch)
    h_NC = model.trunk(batch.tokens_N, batch.positions_N, batch.types_N, batch.docs)
    logits_BK = model.head(h_NC[batch.docs.first_B()], batch.docs)
    nll_B = F.cross_entropy(logits_BK, batch.labels, reduction="none")
    torch.testing.assert_close(loss, (nll_B * batch.weights).sum(), rtol=1e-5, atol=0)
    assert weight.item() == batch.weights.sum().item() != 5

def test_several_labels_are_weighted_binary_cross_entropy(
    tiny_model: Callable, rows: Callable
) -> None:
    """Averaged over the labels: with equal weights it is transformers' loss."""
    model = tiny_model("bert")
    loss, documents = change("several labels", rows("bert", 5))
    batch = collate(documents)
    total, weight = loss(model, batch)
    h_NC = model.trunk(batch.tokens_N, batch.positions_N, batch.types_N, batch.docs)
    p_BK = model.head(h_NC[batch.docs.first_B()], batch.docs).sigmoid()
    nll_BK = -torch.where(batch.labels > 0, p_BK.log(), (1 - p_BK).log())
    torch.testing.assert_close(total, (nll_BK.mean(1) * batch.weights).sum(), rtol=1e-5, atol=0)
    assert weight.item() == batch.weights.sum().item() != 5

def test_regression_is_weighted_squared_error(tiny_model: Callable, rows: Callable) -> None:
    model = tiny_model("bert", num_labels=1)
    batch = collate([replace(row, labels=row.labels - 0.75) for row in rows("bert", 5)])
    total, weight = regression(model, batch)
    h_NC = model.trunk(batch.tokens_N, batch.positions_N, batch.types_N, batch.docs)
    errors_B = model.head(h_NC[batch.docs.first_B()], batch.docs)[:, 0] - batch.labels
    expected = (errors_B.double() ** 2 * batch.weights).sum().float()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
    assert weight.item() == batch.weights.sum().item()

def test_each_task_has_the_head_that_its_loss_asserts(tiny_model: Callable, rows: Callable) -> None:
    for name, kind in TASKS.items():
        families = {"lm": "qwen3", "mlm": "masked", "classify": "bert", "tag": "tag"}
        family = families[kind.model_task]
        model = tiny_model(family, num_labels=1 if name == "regress" else 3)
        kind.loss(model, collate(rows(family, 2)))
