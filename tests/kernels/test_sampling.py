"""What may be drawn, how likely, and what is said of it; against transformers."""

from dataclasses import replace
import numpy as np
import pytest
import torch
from kernels.sampling import Draft, Sampling, Token, next_tokens

V = 600
GREEDY = Sampling(8, temperature=0)

def logits(seed: int, rows: int = 1) -> torch.Tensor:
    return 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))

def draft(sampling: Sampling, prompt: list[int], answer: list[int]) -> Draft:
    return Draft(sampling, prompt, answer, sampling.chances())

def rivals(sampling: Sampling, prompt: list[int]) -> list:
    """The processors of transformers for the same settings, in its order."""
    t = pytest.importorskip("transformers")
    found = [t.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    if sampling.logit_bias:
        bias = {(token,): float(value) for token, value in sampling.logit_bias.items()}
        found.append(t.SequenceBiasLogitsProcessor(bias))
    if sampling.min_new_tokens:
        eos = [*sampling.stop_ids]
        found.append(t.MinNewTokensLengthLogitsProcessor(
            len(prompt), sampling.min_new_tokens, eos, device="cpu"))
    found.append(t.TemperatureLogitsWarper(sampling.temperature))
    found += [t.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    found += [t.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    return found + ([t.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else [])

@pytest.mark.parametrize("seed", range(60))
def test_the_distribution_is_that_of_transformers(seed: int) -> None:
    chance = np.random.default_rng(seed)
    sampling = Sampling(
        8, temperature=float(chance.choice([0.3, 0.7, 1.0, 1.7])),
        top_k=int(chance.choice([0, 1, 5, 40, 10_000])),
        top_p=float(chance.choice([1.0, 0.99, 0.9, 0.5, 0.01])),
        min_p=float(chance.choice([0.0, 0.02, 0.3])),
        repetition_penalty=float(chance.choice([1.0, 1.3, 0.8])),
        logit_bias=chance.choice([{}, {7: 5.0, 11: -100.0}]),
        min_new_tokens=int(chance.choice([0, 3, 6])), stop_ids=frozenset({3, 9}))
    prompt, answer = ([*map(int, ids)] for ids in (chance.integers(V, size=20), [5, 5, 17, 3]))
    want_1V = logits(seed)
    ids_1N = torch.tensor([prompt + answer])
    for rival in rivals(sampling, prompt):
        want_1V = rival(ids_1N, want_1V)
    found_V = sampling.cut(sampling.shaped(logits(seed)[0], prompt, answer))
    torch.testing.assert_close(found_V.softmax(-1), want_1V[0].softmax(-1), rtol=1e-5, atol=1e-7)

def test_penalties_of_the_answer() -> None:
    """OpenAI's formula: by count, and once where there at all; the prompt's tokens count not."""
    sampling = Sampling(8, presence_penalty=0.5, frequency_penalty=0.25)
    z_V = logits(0)[0]
    found_V = z_V - sampling.shaped(z_V, [1, 2, 2], [7, 8, 7, 7])
    assert found_V.nonzero().squeeze(1).tolist() == [7, 8]
    assert found_V[[7, 8]].tolist() == pytest.approx([0.5 + 3 * 0.25, 0.5 + 0.25], abs=1e-6)

SETTINGS = [
    GREEDY, Sampling(8, seed=1), Sampling(8, temperature=0.6, seed=2),
    Sampling(8, top_p=0.8, seed=3),
    Sampling(8, top_k=9, seed=4, num_top=3), Sampling(8, min_p=0.1, seed=5, repetition_penalty=1.2),
    replace(GREEDY, presence_penalty=2.0, num_top=0),
    Sampling(8, seed=6, logit_bias={4: 9.0}, frequency_penalty=1.0)]

def test_a_token_does_not_depend_on_the_neighbours() -> None:
    logits_BV = logits(3, len(SETTINGS))
    drafts = [draft(sampling, [4, 5], [6, 6, 7]) for sampling in SETTINGS]
    together = next_tokens(logits_BV.clone(), drafts)
    alone = [next_tokens(z_V[None].clone(), [one])[0]
             for z_V, one in zip(logits_BV, drafts, strict=True)]
    assert [token.id for token in together] == [token.id for token in alone]
    other = next_tokens(logits_BV, [one._replace(answer=[6, 6]) for one in drafts])
    assert [token.id for token in together] != [token.id for token in other]

def test_draws_follow_what_is_left() -> None:
    """Of 4,000 draws by other numbers none is of a token that is cut; frequencies are as told."""
    sampling, z_V = Sampling(4000, top_k=4, temperature=1.5), logits(5)[0]
    p_V = sampling.cut(z_V).softmax(-1).numpy()
    one = draft(sampling, [1], [])
    drafts = [one._replace(chance_T=one.chance_T[place:]) for place in range(4000)]
    counts_V = np.bincount([t.id for t in next_tokens(z_V.expand(4000, -1), drafts)], minlength=V)
    assert np.count_nonzero(counts_V) == 4 and counts_V[p_V == 0].sum() == 0
    off = (counts_V - 4000 * p_V)[p_V > 0] ** 2 / (4000 * p_V[p_V > 0])
    assert off.sum() < 16.3  # 0.1 % of such draws with 3 degrees of freedom

def test_log_probabilities_are_of_the_logits_as_they_came() -> None:
    """Whatever is cut, penalised or biased."""
    sampling = Sampling(8, temperature=0.5, top_k=3, logit_bias={40: 90.0}, num_top=2)
    logits_BV = logits(8, 2)
    first, second = next_tokens(logits_BV, [draft(sampling, [1], []), draft(GREEDY, [1], [])])
    logprobs_V = logits_BV[0].log_softmax(-1)
    best = logprobs_V.topk(2)
    assert first.id == 40 and first.logprob == pytest.approx(logprobs_V[40].item(), abs=1e-6)
    assert [id_ for id_, _ in first.top] == best.indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(best.values.tolist(), abs=1e-6)
    assert second == Token(logits_BV[1].argmax().item(), None, ())

@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", SETTINGS)
def test_what_is_not_finite_ends_a_row_alone(bad: float, sampling: Sampling) -> None:
    logits_BV = logits(9, 3)
    drafts = [draft(each, [4], [6]) for each in (SETTINGS[2], sampling, SETTINGS[5])]
    want = next_tokens(logits_BV.clone(), drafts)
    logits_BV[1, 17] = bad
    found = next_tokens(logits_BV, drafts)
    assert found[1] is None and (found[0], found[2]) == (want[0], want[2])

def test_half_precision_is_drawn_from_in_full() -> None:
    z_BV = logits(1, 4).bfloat16()
    drafts = [draft(sampling, [4], [6]) for sampling in SETTINGS[:4]]
    found, want = (next_tokens(z, drafts) for z in (z_BV, z_BV.float()))
    assert found == want

@pytest.mark.parametrize("rule", [
    {}, {"temperature": 0.0}, {"temperature": 0.7}, {"top_k": 3}, {"presence_penalty": 2.0},
    {"min_new_tokens": 3, "stop_ids": frozenset({0, 1})}])
def test_a_log_probability_is_the_models_whatever_is_drawn_from(rule: dict) -> None:
    """Also where the probabilities that were drawn from are at hand; in pieces, as all at once."""
    logits_BV = 3 * torch.randn(70, 4096, generator=torch.Generator().manual_seed(1))
    chance_BT = np.random.default_rng(1).random((70, 4))
    found = []
    for top in (0, 2):
        drafts = [Draft(Sampling(4, num_top=top, **rule), [7], [int(b)], chance_BT[b])
                  for b in range(70)]
        found.append(next_tokens(logits_BV, drafts))
    told = logits_BV.log_softmax(-1)
    for b, (plain, asked) in enumerate(zip(*found, strict=True)):
        assert plain.id == asked.id and len(asked.top) == 2 and not plain.top
        for token in (plain, asked):
            assert token.logprob == pytest.approx(told[b, token.id].item(), abs=1e-5)
