"""Greedy decoding over the cache against transformers, and drawing."""

from collections.abc import Callable
import numpy as np
import pytest
import torch
from torch import Tensor
from ftcore.errors import ModelError
from ftcore.model.generate import advanced, generate
from ftcore.model.heads import Model
from ftcore.model.load import load_model
from kernels import graph
from kernels.attention_cache import Cache
from kernels.docs import Docs
from kernels.sampling import drawn

NEVER: frozenset[int] = frozenset()
LENGTHS = [5, 1, 62, 130, 3]  # 62 outgrows the first slots while decoding

@pytest.fixture
def model(hf) -> Model:
    return load_model(hf("qwen3-untied")[1], task="lm", dtype=torch.float32).model

def hf_greedy(oracle, prompt: list[int], num: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = oracle.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num
    )
    return out[0, len(prompt) :].tolist()

def test_32_tokens_equal_transformers(lm_kind, hf, documents) -> None:
    oracle, folder = hf(lm_kind)
    model = load_model(folder, task="lm", dtype=torch.float32).model
    prompts = documents(LENGTHS)
    ours = generate(model, prompts, max_new_tokens=32, stop_ids=NEVER)
    assert ours == [hf_greedy(oracle, prompt, 32) for prompt in prompts]
    some = 3 if lm_kind.endswith("untied") else 1  # not one token for ever
    assert len({token for answer in ours for token in answer}) > some

def test_stopped_sequences_leave_and_change_nothing(model, documents) -> None:
    prompts = documents(LENGTHS)
    free = generate(model, prompts, max_new_tokens=32, stop_ids=NEVER)
    stops = frozenset({free[0][3], free[2][7]})
    stopped = generate(model, prompts, max_new_tokens=32, stop_ids=stops)

    def cut(answer: list[int]) -> list[int]:
        ends = [i + 1 for i, token in enumerate(answer) if token in stops]
        return answer[: min(ends, default=len(answer))]

    assert stopped == [cut(answer) for answer in free]
    assert len({len(answer) for answer in stopped}) > 1

def test_all_may_stop_at_one_step(model, documents) -> None:
    (prompt,) = documents([5])
    (answer,) = generate(model, [prompt], max_new_tokens=4, stop_ids=NEVER)
    stops = frozenset(answer[:1])
    assert generate(model, [prompt] * 3, max_new_tokens=4, stop_ids=stops) == [answer[:1]] * 3

def test_a_batch_equals_its_prompts_alone(model, documents) -> None:
    prompts = documents(LENGTHS)
    together = generate(model, prompts, max_new_tokens=8, stop_ids=NEVER)
    alone = [generate(model, [p], max_new_tokens=8, stop_ids=NEVER)[0] for p in prompts]
    assert together == alone

def test_head_sees_one_row_per_sequence(model, documents) -> None:
    seen = []
    model.head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    generate(model, documents(LENGTHS), max_new_tokens=3, stop_ids=NEVER)
    assert seen == [5, 5, 5]

def test_parameters_are_left_alone_and_dropout_does_not_decide(model) -> None:
    generate(model, [[1, 2]], max_new_tokens=2, stop_ids=NEVER)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model.train()
    with pytest.raises(AssertionError, match="model.eval.. before generating"):
        generate(model, [[1, 2]], max_new_tokens=2, stop_ids=NEVER)

def test_nothing_to_do(model) -> None:
    assert generate(model, [], max_new_tokens=4, stop_ids=NEVER) == []
    assert generate(model, [[1]], max_new_tokens=0, stop_ids=NEVER) == [[]]

def test_refuses_prompts_and_models(model, hf) -> None:
    with pytest.raises(ModelError, match="prompt 1 has 0 tokens: with 4 new ones it must have 1"):
        generate(model, [[1], []], max_new_tokens=4, stop_ids=NEVER)
    with pytest.raises(ModelError, match="prompt 0 has 637 tokens: .* must have 1 to 636"):
        generate(model, [[1] * 637], max_new_tokens=4, stop_ids=NEVER)
    for task in ("trunk", "mlm", "classify"):
        other = load_model(hf(f"bert-{task}")[1], task=task, dtype=torch.float32).model
        with pytest.raises(ModelError, match="the model has no language-model head"):
            generate(other, [[1]], max_new_tokens=4, stop_ids=NEVER)

def test_draws_do_not_depend_on_the_neighbours(model, documents) -> None:
    prompts = documents(LENGTHS)
    chance_BT = np.random.default_rng(0).random((len(prompts), 12))
    rule = {"max_new_tokens": 12, "stop_ids": NEVER, "temperature": 0.7}
    together = generate(model, prompts, chance_BT=chance_BT, **rule)
    alone = [generate(model, [prompt], chance_BT=chance_T[None], **rule)[0]
             for prompt, chance_T in zip(prompts, chance_BT, strict=True)]
    assert together == alone != generate(model, prompts, max_new_tokens=12, stop_ids=NEVER)

def test_a_prompt_that_stands_several_times_is_read_once(model, documents, monkeypatch) -> None:
    one, two = documents([7, 4])
    several, chance_BT = [one, one, two, two, one], np.random.default_rng(1).random((5, 6))
    rule = {"max_new_tokens": 6, "stop_ids": NEVER, "chance_BT": chance_BT}
    want = generate(model, [list(prompt) for prompt in several], **rule)
    read = []
    forward = model.trunk.forward
    monkeypatch.setattr(model.trunk, "forward",
                        lambda tokens_N, *rest: read.append(len(tokens_N)) or
                        forward(tokens_N, *rest))
    assert generate(model, several, **rule) == want
    assert read[0] == 7 + 4 + 7 and read[1] == 5

class Replayed(Cache):
    """A cache whose passes of single tokens are replayed without a GPU: what stands for a graph
    runs a captured pass again, over the tensors and with the sizes that it was captured with."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.replays, self.num_replays, self.sizes = graph.Replays(), 0, set()

    def recorded(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        then = vars(self) | {"lengths": [*self.lengths], "slabs": [*self.slabs]}
        result = run().fill_(torch.nan)
        self.sizes.add(len(result))

        def replay() -> None:
            now = dict(vars(self))
            vars(self).update(then)
            result.copy_(run())
            vars(self).update(now, num_replays=now["num_replays"] + 1)

        return result, replay

def test_replayed_passes_give_the_same_answers(lm_kind, hf, documents, monkeypatch) -> None:
    """Sequences of other lengths, which outgrow a slab, stop, and are fewer than a graph's rows."""
    model = load_model(hf(lm_kind)[1], task="lm", dtype=torch.float32).model
    prompts, caches = documents([5, 1, 50, 61, 3, 9, 20]), []
    rule = {"max_new_tokens": 24, "temperature": 1.0}
    rule["chance_BT"] = np.random.default_rng(0).random((len(prompts), 24))
    free = generate(model, prompts, stop_ids=NEVER, **rule)
    rule["stop_ids"] = frozenset({free[0][9], free[2][14]})
    want = generate(model, prompts, **rule)

    def made(*args: object) -> Replayed:
        caches.append(Replayed(*args))
        monkeypatch.setattr(graph, "recorded", caches[-1].recorded)
        return caches[-1]

    monkeypatch.setattr("ftcore.model.generate.Cache", made)
    assert generate(model, prompts, **rule) == want != free
    assert caches[0].num_replays >= 12 and len(caches[0].sizes) > 1

@torch.inference_mode()
def test_no_pass_is_replayed_over_slabs_that_were_left(model, documents, monkeypatch) -> None:
    """A long sequence comes and goes: what was captured before it is of other slabs."""
    *texts, long = documents([30, 30, 100])
    cache = Replayed(model.spec.num_layers, model.device)
    monkeypatch.setattr(graph, "recorded", cache.recorded)
    rows = [cache.join(), cache.join()]

    def step(place: int, *more: list[int]) -> torch.Tensor:
        parts = [*(text[place : place + 1] for text in texts), *more]
        return advanced(model, cache, range(len(parts)), parts)[:2].clone()

    advanced(model, cache, rows, [text[:10] for text in texts])
    for place in range(10, 15):
        step(place)
    assert cache.num_replays > 0
    advanced(model, cache, [cache.join()], [long])
    found = [step(place, [7]) for place in range(15, 18)]
    cache.leave(2)
    found += [step(place) for place in range(18, 20)]
    docs, tokens_N = Docs.from_lengths([20, 20]), torch.tensor([*texts[0][:20], *texts[1][:20]])
    h_NC = model.trunk(tokens_N, docs.positions_N(), tokens_N * 0, docs)
    for place, h_BC in enumerate(found, start=15):
        torch.testing.assert_close(h_BC, h_NC[[place, 20 + place]], atol=2e-5, rtol=0)

def test_draws_follow_the_distribution() -> None:
    """Chi-square of 20,000 draws; an impossible token is never drawn, whatever the number."""
    logits_V = torch.tensor([1.0, -float("inf"), 0.0, 2.0, -1.0])
    p_V = (logits_V / 0.5).softmax(0).numpy()
    chance_B = np.random.default_rng(2).random(20_000)
    ids_B, told_B = (x.numpy() for x in drawn(logits_V.expand(20_000, -1), 0.5, chance_B))
    np.testing.assert_allclose(told_B, p_V[ids_B], rtol=1e-6)
    counts_V, kept = np.bincount(ids_B, minlength=5), p_V > 0
    assert counts_V[1] == 0
    off = (counts_V[kept] - 20_000 * p_V[kept]) ** 2 / (20_000 * p_V[kept])
    assert off.sum() < 16.3  # 0.1 % of such draws with 3 degrees of freedom
    edges, _ = drawn(logits_V.expand(3, -1), 0.5, np.array([0.0, p_V[0], 1 - 1e-16]))
    assert edges.tolist() in ([0, 2, 3], [0, 2, 4])
