"""Losses of pairs beside the definition, document by document in float64, and beside trl's."""

# ruff: noqa: F401, F811  # a fixture of another folder

import math
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
import numpy as np
import pytest
import torch
from torch import Tensor
from ftcore.align import preference
from ftcore.align.preference import TASKS, bradley_terry, dpo, kind_of, refer
from ftcore.config import DpoConfig, DpoRun, PretrainRun, RewardConfig, RewardRun
from ftcore.data.encode import Split
from ftcore.data.pack import Encoded, collate, pair, shifted
from ftcore.data.store import Prepared
from ftcore.evaluate.evaluator import evaluate_pairs
from ftcore.model.heads import Model
from kernels import cross_entropy
from kernels.docs import Docs, pack
from tests.tune.conftest import tiny_model

MAX_TOKENS = 60
DPO = {
    "sigmoid": {"beta": 0.3, "loss": "sigmoid", "length_normalised": False},
    "sigmoid_norm": {"beta": 0.3, "loss": "sigmoid", "length_normalised": True},
    "ipo": {"beta": 0.3, "loss": "ipo", "length_normalised": True},
    "ipo of sums": {"beta": 0.3, "loss": "ipo", "length_normalised": False},
}

@pytest.fixture
def documents() -> list[Encoded]:
    """Pairs of 6 to 30 tokens, margins and references."""
    random, made = np.random.default_rng(1), []
    for index in range(7):
        sides = []
        for length in random.integers(3, 16, 2):
            tokens_T = random.integers(0, 61, length).astype(np.int32)
            types_T = (np.arange(length) > length // 2).astype(np.int32)
            counts_T = np.float32(np.arange(length) >= random.integers(1, length))
            sides.append(shifted("", tokens_T, counts_T, types_T))
        made.append(pair(f"row-{index}", sides, margin=index / 4))
        made[-1].labels[4] = random.normal()
    return made

def scorer(tiny_model: Callable, family: str, dtype: torch.dtype = torch.float64) -> Model:
    if family == "bert":
        return tiny_model("bert", dtype=dtype, num_labels=1)
    model = Model(tiny_model("qwen3").spec, "classify", 1)
    model.init_weights(torch.Generator().manual_seed(3))
    return model.to(dtype).train()

def alone(model: Model, tokens_T: np.ndarray, types_T: np.ndarray | None) -> Tensor:
    """The head's logits of one document: no stream, no packing."""
    ids_T = torch.from_numpy(tokens_T).long()
    types_T = torch.zeros_like(ids_T) if types_T is None else torch.from_numpy(types_T).long()
    docs = Docs.from_lengths([len(ids_T)])
    h_TC = model.trunk(ids_T, torch.arange(len(ids_T)), types_T, docs)
    if model.task == "lm":
        return model.head(h_TC)
    return model.head(h_TC[-1:] if model.spec.is_causal else h_TC[:1], docs)

def halves(document: Encoded) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Tokens, types and place of the answer of both sides, read off the labels once more."""
    middle, *places = document.labels[:3].astype(int)
    both = (np.split(x_T, [middle]) for x_T in (document.tokens_T, document.types_T))
    parts = zip(*both, strict=True)
    return [(*part, place) for part, place in zip(parts, places, strict=True)]

def plain_reward(model: Model, documents: list[Encoded], centring: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for document in documents:
        chosen, rejected = (alone(model, *half[:2]).squeeze() for half in halves(document))
        chance = 1 / (1 + (float(document.labels[3]) + rejected - chosen).exp())
        total = total - chance.log() + centring * (chosen + rejected) ** 2
    return total

def said(model: Model, document: Encoded, *, mean: bool) -> list[Tensor]:
    """log p of both answers, of all their tokens or a token."""
    made = []
    for tokens_T, types_T, place in halves(document):
        log_p_TV = alone(model, tokens_T, types_T).log_softmax(-1)
        steps = [log_p_TV[t - 1, int(tokens_T[t])] for t in range(place, len(tokens_T))]
        made.append(sum(steps) / (len(steps) if mean else 1))
    return made

def plain_dpo(model: Model, documents: list[Encoded], options: dict[str, Any]) -> Tensor:
    total, beta = torch.zeros((), dtype=torch.float64), options["beta"]
    for document in documents:
        chosen, rejected = said(model, document, mean=options["length_normalised"])
        z = chosen - rejected - float(document.labels[4])
        is_ipo = options["loss"] == "ipo"
        total = total + ((z - 0.5 / beta) ** 2 if is_ipo else (1 + (-beta * z).exp()).log())
    return total

def gradient(model: Model, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    grads = (p.grad for p in model.parameters() if p.grad is not None)
    return torch.cat([grad.flatten().double() for grad in grads])

def assert_same(model: Model, one: Tensor, other: Tensor, bound: float = 1e-11) -> None:
    assert one.item() == pytest.approx(other.item(), rel=bound)
    ours, theirs = gradient(model, one), gradient(model, other)
    assert theirs.norm() > 0 and (ours - theirs).norm() / theirs.norm() < bound

@pytest.mark.parametrize("centring", [0.0, 0.3])
@pytest.mark.parametrize("family", ["bert", "qwen3"])
def test_bradley_terry_is_its_definition(
    family: str, centring: float, documents: list[Encoded], tiny_model: Callable
) -> None:
    model = scorer(tiny_model, family)
    loss, weight = bradley_terry(model, collate(documents), centring=centring)
    assert weight == 7
    assert_same(model, loss, plain_reward(model, documents, centring))

@pytest.mark.parametrize("kind", DPO)
def test_dpo_is_its_definition(
    kind: str, documents: list[Encoded], tiny_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "MOST_LOGITS", 61 * 5)  # so that there are several chunks
    model = tiny_model("qwen3", dtype=torch.float64)
    loss, weight = dpo(model, collate(documents), **DPO[kind])
    assert weight == 7
    assert_same(model, loss, plain_dpo(model, documents, DPO[kind]))
    with torch.no_grad():
        again, _ = dpo(model, collate(documents), **DPO[kind])
    assert again.item() == pytest.approx(loss.item(), rel=1e-12) and not again.requires_grad

@pytest.mark.parametrize(("task", "dtype", "bound"), [
    ("reward", torch.float32, 1e-6), ("reward", torch.float64, 1e-12),
    ("dpo", torch.float32, 2e-6), ("dpo", torch.float64, 1e-12),
])  # fmt: skip
def test_any_split_of_a_step_gives_the_same_gradient(
    task: str, dtype: torch.dtype, bound: float, documents: list[Encoded], tiny_model: Callable
) -> None:
    if task == "dpo":
        model, loss = tiny_model("qwen3", dtype=dtype), lambda *a: dpo(*a, **DPO["sigmoid"])
    else:
        model = scorer(tiny_model, "bert", dtype)
        loss = lambda *a: bradley_terry(*a, centring=0.1)  # noqa: E731
    sums = []
    for budget in (1, 40, 1000):
        streams = pack(list(map(len, documents)), budget)
        losses = [loss(model, collate([documents[i] for i in stream]))[0] for stream in streams]
        sums.append(gradient(model, sum(losses)))
    for other in sums[:2]:
        assert (other - sums[2]).norm() / sums[2].norm() < bound

@pytest.mark.parametrize("kind", ["sigmoid", "sigmoid_norm", "ipo"])
def test_dpo_is_that_of_trl(kind: str, documents: list[Encoded], tiny_model: Callable) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed: it is a rival")
    model, options = tiny_model("qwen3", dtype=torch.float64), DPO[kind]
    logps = [[steps_of(model, *half) for half in halves(document)] for document in documents]
    sides = [steps for column in zip(*logps, strict=True) for steps in column]
    longest = max(map(len, sides))
    ids, mask, log_p = (torch.zeros(len(sides), longest + 1, dtype=torch.float64) for _ in "123")
    for row, steps in enumerate(sides):  # an answer behind one token of prompt
        mask[row, 1 : len(steps) + 1] = 1
        log_p[row, 1 : len(steps) + 1] = steps
    count = len(documents)
    # Ours are differences a token where the loss is of means, trl's are sums.
    ratios = [float(document.labels[4]) for document in documents]
    per = [len(steps) if options["length_normalised"] else 1 for steps in sides[:count]]
    reference = torch.tensor([r * n for r, n in zip(ratios, per, strict=True)])
    outputs = defaultdict(lambda: torch.zeros(len(sides), longest), log_probs=log_p[:, 1:])
    outputs["is_top1"] = torch.zeros(len(sides), longest, dtype=torch.bool)
    same = lambda x: x  # noqa: E731
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), aux_loss_enabled=False, ld_alpha=None, beta=0.3,
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[kind],
        loss_weights=[1.0], use_weighting=False, _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0)  # fmt: skip
    inputs = {"input_ids": ids.long(), "completion_mask": mask, "attention_mask": mask,
              "ref_chosen_logps": reference, "ref_rejected_logps": torch.zeros(count)}
    theirs = trl.DPOTrainer._compute_loss(
        trainer, lambda **_: SimpleNamespace(**{name: outputs[name] for name in (
            "log_probs", "entropy", "mean_logits", "is_top1")}), inputs, False)  # fmt: skip
    loss, weight = dpo(model, collate(documents), **options)
    assert_same(model, loss / weight, theirs, 1e-6)  # our references are kept in fp32

def steps_of(model: Model, tokens_T: np.ndarray, types_T: np.ndarray, place: int) -> Tensor:
    log_p_TV = alone(model, tokens_T, types_T).log_softmax(-1)
    at = torch.arange(place, len(tokens_T))
    return log_p_TV[at - 1, torch.from_numpy(tokens_T).long()[at]]

@pytest.mark.parametrize("mean", [False, True])
def test_the_reference_is_the_model_before_it_learns(
    mean: bool, documents: list[Encoded], tiny_model: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preference, "AT_ONCE", 3)
    model = tiny_model("qwen3", dtype=torch.float64)
    data = Prepared(train=Split(num_rows=7, documents=documents))
    with torch.no_grad():
        refer(model, data, DpoRun(dpo=DpoConfig(length_normalised=mean)))
        made = data.train.documents
        for old, new in zip(documents, made, strict=True):
            chosen, rejected = said(model, old, mean=mean)
            assert new.labels[4] == pytest.approx((chosen - rejected).item(), rel=1e-5, abs=1e-6)
            assert (new.labels[:4] == old.labels[:4]).all() and new.row_id == old.row_id
        options = {"beta": 0.3, "loss": "sigmoid", "length_normalised": mean}
        loss, weight = dpo(model, collate(made), **options)
    assert (loss / weight).item() == pytest.approx(math.log(2), rel=1e-6)

@pytest.mark.parametrize("kind", [*DPO, "reward"])
def test_what_is_judged_is_the_loss_that_is_trained(
    kind: str, documents: list[Encoded], tiny_model: Callable
) -> None:
    if kind == "reward":
        model, options = scorer(tiny_model, "bert", torch.float32), RewardConfig(centring=0.2)
        loss = bradley_terry
    else:
        model, options, loss = tiny_model("qwen3"), DpoConfig(**DPO[kind]), dpo
    with torch.no_grad():
        split = Split(documents=documents)
        judged = evaluate_pairs(model.eval(), split, MAX_TOKENS, None, options=options)
        value, weight = loss(model, collate(documents), **vars(options))
    assert judged.values["loss"] == pytest.approx((value / weight).item(), rel=1e-5)
    gaps = np.array([row["gap"] for row in judged.rows])
    assert judged.values["accuracy"] == (gaps > 0).mean()
    assert judged.values["margin"] == pytest.approx(gaps.mean())

def test_options_of_a_section_reach_the_loss_of_its_name() -> None:
    assert kind_of("reward", RewardRun(reward=RewardConfig(centring=0.5))).loss.keywords == {
        "centring": 0.5}
    kind = kind_of("dpo", DpoRun(dpo=DpoConfig(beta=2.0)))
    assert kind.loss.keywords == {"beta": 2.0, "loss": "sigmoid", "length_normalised": False}
    assert kind_of("pretrain", PretrainRun()) is TASKS["pretrain"]
