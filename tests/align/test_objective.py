"""Losses, divergences and their control against other ways to compute them, in float64."""

import math
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from ftcore.align.objective import Control, Seen, divergences, policy_loss, seen, value_loss
from ftcore.align.ppo import READ, PpoLoop
from ftcore.align.rollout import Actor
from ftcore.config import PpoConfig, PpoRun, RolloutConfig
from ftcore.data.columns import Chat
from ftcore.data.pack import Encoded, collate, total_weight
from ftcore.env.compute import generator
from ftcore.model.heads import Model
from ftcore.model.transformer import ModelSpec

SPEC = ModelSpec(
    vocab_size=29, hidden_size=16, num_layers=2, intermediate_size=24, num_heads=2, num_kv_heads=1,
    head_dim=8, max_positions=64, is_causal=True, norm="rms_norm", norm_eps=1e-6, norm_first=True,
    position="rope", mlp="swiglu", qk_norm=True, tie_word_embeddings=True, initializer_range=0.3,
)  # fmt: skip

def log_probabilities(*shape: int, seed: int, spread: float = 1.0) -> Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy(spread * random.normal(size=shape)).log_softmax(-1)

def says(logp_MV: Tensor, ids_M: Tensor) -> Seen:
    """What a model of these probabilities says of these tokens."""
    logp_M = logp_MV.gather(1, ids_M[:, None]).squeeze(1)
    return Seen(logp_M, logp_MV, logp_MV)

# ---- clipped losses ------------------------------------------------------------------------------

@pytest.mark.parametrize("clip", [0.05, 0.2, 1.5])
def test_the_policy_loss_and_its_gradient(clip: float) -> None:
    random = np.random.default_rng(3)
    old, moved, advantage = random.normal(size=(3, 400))
    logp_M = torch.tensor(old + 0.5 * moved, requires_grad=True)
    loss_M = policy_loss(logp_M, torch.tensor(old), torch.tensor(advantage), clip)
    loss_M.sum().backward()
    losses, slopes, biting = [], [], set()
    for now, before, a in zip(logp_M.tolist(), old, advantage, strict=True):
        ratio = math.exp(now - before)
        bounded = max(1 - clip, min(1 + clip, ratio))
        losses.append(-min(a * ratio, a * bounded))
        # gained enough already, or lost enough: nothing pulls any further
        bites = ratio > 1 + clip if a > 0 else ratio < 1 - clip
        slopes.append(0.0 if bites else -a * ratio)
        biting |= {(a > 0, ratio > 1 + clip, ratio < 1 - clip)}
    assert loss_M.tolist() == pytest.approx(losses, rel=1e-12)
    assert logp_M.grad.tolist() == pytest.approx(slopes, rel=1e-12)
    assert len(biting) == (6 if clip < 1 else 4)  # either sign below, within and above

def test_clipping_bites_where_the_move_was_made_and_not_on_the_way_back() -> None:
    """Ratios 1.5 and 0.5, clip 0.2, A = 1 and -1: two of four still pull, back to the start."""
    ratios, signs = torch.tensor([1.5, 0.5, 1.5, 0.5]), torch.tensor([1.0, 1, -1, -1])
    logp_M = ratios.log().requires_grad_()
    loss_M = policy_loss(logp_M, torch.zeros(4), signs, 0.2)
    loss_M.sum().backward()
    assert loss_M.tolist() == pytest.approx([-1.2, -0.5, 1.5, 0.8])
    assert logp_M.grad.tolist() == pytest.approx([0, -0.5, 1.5, 0])

def test_the_first_update_is_the_plain_policy_gradient() -> None:
    logp_M = torch.tensor([-0.5, -3.0, -1.0], requires_grad=True)
    advantages_M = torch.tensor([2.0, -1.0, 0.0])
    policy_loss(logp_M, logp_M.detach().clone(), advantages_M, 0.2).sum().backward()
    assert torch.equal(logp_M.grad, -advantages_M)

@pytest.mark.parametrize("clip", [0.0, 0.1, 0.7])
def test_the_value_loss_and_its_gradient(clip: float) -> None:
    random = np.random.default_rng(4)
    value, before, wanted = random.normal(size=(3, 400))
    values_M = torch.tensor(value, requires_grad=True)
    loss_M = value_loss(values_M, torch.tensor(before), torch.tensor(wanted), clip)
    loss_M.sum().backward()
    losses, slopes, biting = [], [], set()
    for v, old, r in zip(value, before, wanted, strict=True):
        near = old + max(-clip, min(clip, v - old)) if clip else v
        losses.append(max((v - r) ** 2, (near - r) ** 2) / 2)
        bites = near != v and (near - r) ** 2 > (v - r) ** 2
        slopes.append(0.0 if bites else v - r)
        biting |= {(bool(bites), v > old)}
    assert loss_M.tolist() == pytest.approx(losses, rel=1e-12)
    assert values_M.grad.tolist() == pytest.approx(slopes, rel=1e-12)
    assert len(biting) == (4 if clip else 2)

def test_clipping_never_lowers_the_value_loss() -> None:
    values_M, old_M, returns_M = log_probabilities(3, 100, seed=6)
    free_M = value_loss(values_M, old_M, returns_M, 0.0)
    assert (value_loss(values_M, old_M, returns_M, 0.2) >= free_M).all()

# ---- divergences ---------------------------------------------------------------------------------

def test_divergences_against_torch_distributions() -> None:
    p_MV, q_MV = log_probabilities(200, 11, seed=1), log_probabilities(200, 11, seed=2)
    ids_M = torch.from_numpy(np.random.default_rng(0).integers(0, 11, 200))
    found = divergences(says(p_MV, ids_M), says(q_MV, ids_M))
    p, q = Categorical(logits=p_MV), Categorical(logits=q_MV)
    torch.testing.assert_close(found["exact"], kl_divergence(p, q))
    away_M = p.log_prob(ids_M) - q.log_prob(ids_M)
    torch.testing.assert_close(found["k1"], away_M)
    torch.testing.assert_close(found["k3"], torch.exp(-away_M) + away_M - 1)
    assert (found["k3"] >= 0).all() and (found["exact"] >= 0).all() and (found["k1"] < 0).any()

def test_the_mean_of_every_estimate_is_the_divergence() -> None:
    """Over what p says; and k3 is spread less than k1 where both are near."""
    count, p_1V = 100_000, log_probabilities(1, 13, seed=1)
    moved_1V = p_1V + 0.2 * log_probabilities(1, 13, seed=2)
    q_1V = moved_1V.log_softmax(-1)
    random = np.random.default_rng(9)
    ids_M = torch.from_numpy(random.choice(13, count, p=p_1V[0].exp().numpy()))
    found = divergences(says(p_1V.expand(count, -1), ids_M), says(q_1V.expand(count, -1), ids_M))
    exact = kl_divergence(Categorical(logits=p_1V), Categorical(logits=q_1V)).item()
    torch.testing.assert_close(found["exact"], torch.full_like(found["exact"], exact))
    for name in ("k1", "k3"):
        error = found[name].std().item() / math.sqrt(count)
        assert abs(found[name].mean().item() - exact) < 4 * error < 0.2 * exact
    assert found["k3"].std() < 0.5 * found["k1"].std()

def test_equal_models_diverge_by_nothing_at_all() -> None:
    p = says(log_probabilities(50, 17, seed=8).float(), torch.arange(50) % 17)
    assert not any(each_M.any() for each_M in divergences(p, p).values())

# ---- what a model says ---------------------------------------------------------------------------

@pytest.fixture
def model() -> Model:
    made = Model(SPEC, "lm")
    made.init_weights(generator(0, 1))
    return made.double().eval()

@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_seen_is_the_log_softmax_at_a_temperature(temperature: float, model: Model) -> None:
    random, documents = np.random.default_rng(2), []
    for index, length in enumerate((5, 2, 9)):
        ids_T = random.integers(0, 29, length).astype(np.int32)
        counts_T = np.float32([t >= length // 2 - 1 for t in range(length)]) * 0.25
        counts_T[-1] = 0
        documents.append(Encoded(f"{index}", ids_T, np.roll(ids_T, -1), counts_T))
    found = seen(model, collate(documents), temperature)
    logp, rows = [], []
    for document in documents:  # each alone, every row through the head
        with torch.no_grad():
            batch = collate([document])
            h_TC = model.trunk(batch.tokens_N, batch.positions_N, batch.types_N, batch.docs)
            logits_TV = model.head(h_TC).numpy() / temperature
        for t in np.flatnonzero(document.weights):
            z = logits_TV[t] - logits_TV[t].max()
            all_logp = z - math.log(math.fsum(np.exp(z)))
            rows.append(all_logp)
            logp.append(all_logp[document.labels[t]])
    assert len(logp) == len(found.h_MC) == 9
    assert found.logp_M.tolist() == pytest.approx(logp, rel=1e-10)
    assert found.logp_MV.detach().numpy() == pytest.approx(np.array(rows), rel=1e-10)

def test_seen_is_wide_where_the_model_is_narrow(model: Model) -> None:
    ids_T = np.arange(6, dtype=np.int32)
    batch = collate([Encoded("", ids_T, np.roll(ids_T, -1), np.ones(6, np.float32))])
    found = seen(model.bfloat16(), batch, 1.0)
    assert found.logp_M.dtype == found.logp_MV.dtype == torch.float32
    torch.testing.assert_close(found.logp_MV.exp().sum(-1), torch.ones(6))

# ---- control -------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (6.6, 1 + 0.1 * 0.64), (5.7, 1 - 0.05 * 0.64), (60.0, 1 + 0.2 * 0.64),
     (0.0, 1 - 0.2 * 0.64), (-3.0, 1 - 0.2 * 0.64)],
)  # fmt: skip
def test_the_penalty_follows_its_target(kl: float, factor: float) -> None:
    """Ziegler et al. 2019, 2.2: e = clip((KL - target) / target), and times 1 + K e."""
    control = Control(kl_coef=0.5)
    control.adapt(kl, 6.0, 64, 100.0)
    assert control.kl_coef == pytest.approx(0.5 * factor)

def test_scores_are_scaled_by_all_so_far() -> None:
    random, control, all_scores = np.random.default_rng(7), Control(), []
    for count in (3, 1, 8, 40):
        scores = (50 + 2 * random.normal(size=count)).tolist()
        all_scores += scores
        assert control.deviation(scores) == pytest.approx(np.std(all_scores, ddof=1), rel=1e-9)
    again = Control(**vars(control))  # out of a checkpoint
    assert again.deviation([1.0]) == control.deviation([1.0])

@pytest.mark.parametrize("scores", [[3.0], [0.5, 0.5, 0.5]])
def test_scores_that_do_not_differ_stay(scores: list[float]) -> None:
    assert Control().deviation(scores) == 1.0

# ---- the whole loss ------------------------------------------------------------------------------

LENGTHS, PROMPT = [3, 1, 7, 5], [4, 5]

class Canned(Actor):
    """Whose answers are given."""

    def __init__(self, config: PpoRun) -> None:
        self.config, self.model = config, None
        self.tokenizer = SimpleNamespace(stop_ids={1}, decode=str)
        self.rewards = lambda chats, texts: (np.zeros(len(texts)), {})

def our_loss(
    config: PpoRun, now_M: Tensor, told: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch,
    **state: Any,
) -> Tensor:  # fmt: skip
    """Of an update over answers of these log-probabilities, by the code of a run."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    prompts = [(Chat("id", turns), np.int32(PROMPT))] * 4
    answers = [list(range(2, 2 + length)) for length in LENGTHS]
    monkeypatch.setattr("ftcore.align.rollout.continued", lambda *_, **__: answers)
    documents = [episode.document for episode in Canned(config).episodes(prompts)]
    logp_MV = log_probabilities(len(now_M), 8, seed=4).float()
    said = Seen(now_M, torch.zeros(len(now_M), 1), logp_MV)
    monkeypatch.setattr("ftcore.align.objective.seen", lambda *_: said)
    parts = {name: each_M.split(LENGTHS) for name, each_M in told.items()}
    loop = SimpleNamespace(
        config=config, is_blind=False, sums=defaultdict(float), _values=lambda _: torch.zeros(16),
        updates_before=0, optimizer=SimpleNamespace(step_count=1),
        progress=SimpleNamespace(step=state.get("step", 0)),
        told={d.row_id: np.stack([parts[n][i] for n in READ]) for i, d in enumerate(documents)},
        device="cpu",
    )  # fmt: skip
    model = SimpleNamespace(value=state.get("value"))
    loss, weight = PpoLoop.loss(loop, model, collate(documents))
    assert weight.item() == pytest.approx(total_weight(documents))
    assert loop.sums["tokens"] == sum(LENGTHS)
    return loss / weight

def run_of(**ppo: Any) -> PpoRun:
    return PpoRun(ppo=PpoConfig(**ppo), rollout=RolloutConfig(max_new_tokens=8))

@pytest.mark.parametrize("theirs", ["bnpo", "dapo"])
def test_the_loss_is_that_of_trl(theirs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = pytest.importorskip(
        "trl.trainer.grpo_trainer", reason="trl is not installed: it is a rival").GRPOTrainer
    random = np.random.default_rng(8)
    old_M, advantages_B = torch.tensor(random.normal(size=16)), torch.tensor([1.5, -0.5, 0.7, -2.0])
    now_M = (old_M + 0.4 * torch.tensor(random.normal(size=16))).requires_grad_()
    mask_BT = torch.zeros(4, 7)
    for row, length in enumerate(LENGTHS):
        mask_BT[row, :length] = 1
    old_BT, now_BT = (
        torch.zeros(4, 7).double().masked_scatter(mask_BT > 0, x_M) for x_M in (old_M, now_M)
    )
    stand_in = SimpleNamespace(
        loss_type=theirs, beta=0.0, epsilon_low=0.2, epsilon_high=0.2, top_entropy_quantile=1.0,
        importance_sampling_level="token", off_policy_mask_threshold=None, use_vllm=False,
        aux_loss_enabled=False, _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        args=SimpleNamespace(delta=None, steps_per_generation=1),
        model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(
            num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x),
        _get_per_token_logps_and_entropies=lambda *_, **__: (now_BT, now_BT.detach(), None),
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.ones(4, 2), "prompt_mask": torch.ones(4, 2),
        "completion_ids": torch.ones(4, 7), "completion_mask": mask_BT,
        "advantages": advantages_B, "old_per_token_logps": old_BT,
        "num_items_in_batch": mask_BT.sum(),
    }  # fmt: skip
    wanted = trainer._compute_loss(stand_in, None, inputs)
    (wanted_grad_M,) = torch.autograd.grad(wanted, now_M)
    advantage_M = torch.repeat_interleave(advantages_B, torch.tensor(LENGTHS))
    told = {"logp": old_M, "advantage": advantage_M, "value": old_M, "return": old_M}
    found = our_loss(run_of(clip=0.2), now_M, told, monkeypatch)
    (found_grad_M,) = torch.autograd.grad(found, now_M)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert found_grad_M.tolist() == pytest.approx(wanted_grad_M.tolist(), rel=1e-6, abs=1e-12)
    assert 0 < (found_grad_M == 0).sum() < 16  # some are clipped

@pytest.mark.parametrize("step", [0, 2])
def test_the_loss_adds_up_its_parts(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """-A, 1/2 R^2 and the entropy, by their factors; while the critic warms up the second alone."""
    now_M = torch.zeros(16).requires_grad_()
    told = {"logp": torch.zeros(16), "advantage": torch.full((16,), 0.5), "value": torch.zeros(16),
            "return": torch.full((16,), 3.0)}  # fmt: skip
    config = run_of(entropy_coef=0.01, value_coef=0.2, critic_warmup=2)
    loss = our_loss(config, now_M, told, monkeypatch, step=step, value=True)
    entropy = Categorical(logits=log_probabilities(16, 8, seed=4)).entropy().mean().item()
    assert loss.item() == pytest.approx(0.2 * 4.5 + (step >= 2) * (-0.5 - 0.01 * entropy))

def test_the_policy_stays_while_the_critic_warms_up(make_ppo: Callable[..., PpoLoop]) -> None:
    loop = make_ppo("warm", ppo={"critic_warmup": 4}, optim={"batch_size": 8})
    before = {name: param.detach().clone() for name, param in loop.model.named_parameters()}
    assert loop.train() == 0
    moved = {n for n, p in loop.optimizer.params.items() if not torch.equal(p, before[n])}
    assert moved == {"value.weight", "value.bias"}
