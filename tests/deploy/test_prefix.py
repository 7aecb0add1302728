"""Prompts that begin as something did that was read before: the same answers, fewer tokens read."""

from dataclasses import replace
import pytest
import torch
from ftcore.deploy.engine import Engine, Finish, Job
from ftcore.model.heads import Model
from ftcore.model.load import load_model
from kernels.attention_cache import Cache
from kernels.attention_prefix import Prefixes
from kernels.sampling import Sampling, Token
from tests.deploy.test_engine import fails_on, ids, said
from tests.model.conftest import documents, hf, lm_kind

__all__ = ["documents", "hf", "lm_kind"]  # fixtures

GREEDY = Sampling(12, temperature=0, num_top=2)

@pytest.fixture
def model(hf) -> Model:
    return load_model(hf("qwen3-untied")[1], task="lm", dtype=torch.float32).model

def assert_equal(engine: Engine, jobs: list[Job], want: list[Job]) -> None:
    """What is said of jobs is what another engine without prefixes says of the others."""
    found, alone = said(engine, jobs), said(Engine(engine.model), want)
    for job, other in zip(jobs, want, strict=True):
        assert found[job][-1] == alone[other][-1] and job.answer == other.answer
        for one, two in zip(found[job][:-1], alone[other][:-1], strict=True):
            assert isinstance(one, Token) and one.logprob == pytest.approx(two.logprob, abs=1e-4)
            tops = [value for _, value in one.top], [value for _, value in two.top]
            assert tops[0] == pytest.approx(tops[1], abs=1e-4)
    assert engine.errors == 0 and engine.cache.lengths == []

@pytest.mark.parametrize("prefill", [7, 512])
def test_the_next_turn_finds_the_last(prefill: int, lm_kind, hf, documents) -> None:
    """Prompt and answer; beside others, of which some begin alike for a while."""
    model = load_model(hf(lm_kind)[1], task="lm", dtype=torch.float32).model
    engine = Engine(model, prefix_tokens=4096, prefill_tokens=prefill, max_sequences=4)
    first, new = documents([50, 70, 5]), documents([9, 1, 40], seed=1)
    first.append(first[0][:40] + new[2])
    jobs = [Job(prompt, GREEDY) for prompt in first]
    assert_equal(engine, jobs, [Job(prompt, GREEDY) for prompt in first])
    later = [job.ids + job.answer + more for job, more in zip(jobs, [*new, new[0]], strict=True)]
    # one that leaves the path, one that goes on as another did from there, one that is unknown
    later += [first[1][:49] + new[0], first[0][:16] + first[1][16:], new[2]]
    jobs = [Job(prompt, replace(GREEDY, seed=3, temperature=0.5)) for prompt in later]
    assert_equal(engine, jobs, [Job(job.ids, job.sampling) for job in jobs])
    assert [job.cached for job in jobs] == [48, 80, 16, 80, 48, 16, 0]
    assert engine.prefix_found == 288
    assert engine.prefix_asked == sum(map(len, first)) + sum(map(len, later))

@pytest.mark.parametrize(("size", "known"), [(15, 0), (16, 0), (17, 16), (32, 16), (33, 32)])
def test_a_token_is_always_read(size: int, known: int, model, documents) -> None:
    """What is left may be one token, as if it were decoded."""
    engine, (prompt,) = Engine(model, prefix_tokens=64), documents([size])
    for count in (0, known):
        job = Job(prompt, GREEDY)
        assert_equal(engine, [job], [Job(prompt, GREEDY)])
        assert job.cached == count

def test_owners_never_share(model, documents) -> None:
    engine, (prompt,) = Engine(model, prefix_tokens=4096), documents([40])
    owners = [("key", None), ("other", None), ("key", "adapter"), ("", None), ()]
    for known in (0, 32):
        for owner in owners:
            said(engine, [job := Job(prompt, GREEDY, owner=owner)])
            assert job.cached == known

def test_the_least_recently_used_leave_within_the_budget(model, documents) -> None:
    """Blocks: 2 of each prompt, room for 5; the end of a sequence before its beginning."""
    engine, prompts = Engine(model, prefix_tokens=5 * 16 + 15), documents([40] * 4)

    def known(number: int) -> int:
        said(engine, [job := Job(prompts[number], replace(GREEDY, max_new_tokens=1))])
        assert len(engine.prefixes.blocks) <= 5
        return job.cached

    # the first is used again, so the second loses its end to the third; then all of it
    assert [known(n) for n in (0, 1, 0, 2, 0, 1)] == [0, 0, 32, 0, 32, 16]
    assert [known(n) for n in (3, 2, 1, 0)] == [0, 0, 16, 0]
    long, = documents([200])
    said(engine, [Job(long, GREEDY)])
    said(engine, [job := Job(long, GREEDY)])
    assert job.cached == 80 and len(engine.prefixes.blocks) == 5
    kept = sum(block.untyped_storage().nbytes() for block in engine.prefixes.blocks.values())
    assert kept == 80 * 2 * 3 * 2 * 16 * 4  # tokens, keys and values, layers, heads, width, bytes

def test_without_a_budget_nothing_is_kept(model, documents) -> None:
    engine, (prompt,) = Engine(model), documents([40])
    for _ in range(2):
        said(engine, [job := Job(prompt, GREEDY)])
        assert job.cached == 0 and not engine.prefixes.blocks

@torch.inference_mode()
def test_a_sequence_that_is_cancelled_leaves_what_was_read(model, documents) -> None:
    prompts = documents([90, 40])
    engine = Engine(model, prefix_tokens=4096, prefill_tokens=50)
    jobs = [Job(prompt, GREEDY) for prompt in prompts]
    for job in jobs:
        engine.submit(job)
    engine.turn()
    for job in jobs:  # of the first 50 tokens are read, of the second none
        engine.cancel(job)
    engine.turn()
    jobs = [Job(prompt, GREEDY) for prompt in prompts]
    assert_equal(engine, jobs, [Job(prompt, GREEDY) for prompt in prompts])
    assert [job.cached for job in jobs] == [48, 0]

def test_a_sequence_that_failed_leaves_nothing(model, documents, monkeypatch) -> None:
    prompts = documents([40, 40])
    prompts[0][20], engine = (rare := 95), Engine(model, prefix_tokens=4096)
    fails_on(model, monkeypatch, lambda tokens: rare in tokens)
    said(engine, [Job(prompts[0], GREEDY)])
    monkeypatch.undo()
    before = model.trunk.embed_tokens.weight.detach().clone()
    with torch.no_grad():
        model.trunk.embed_tokens.weight[rare] = torch.nan
        found = said(engine, [job := Job(prompts[0], GREEDY)])
        model.trunk.embed_tokens.weight.copy_(before)
    assert found[job] == [Finish("error", "non_finite_logits")] and not engine.prefixes.blocks

@pytest.mark.parametrize("stage", ["find", "write", "keep"])
def test_a_failure_ends_nothing(stage: str, model, documents, monkeypatch) -> None:
    """A write that fails in the middle among them."""
    engine, (prompt, other) = Engine(model, prefix_tokens=4096), documents([60, 30])
    want = [ids(says) for says in said(engine, [Job(prompt, GREEDY), Job(other, GREEDY)]).values()]
    if stage == "write":
        write = Cache.write

        def failing(cache: Cache, row: int, tokens: tuple) -> None:
            is_new = cache.lengths[row] == 0
            write(cache, row, tokens[: 1 if is_new else None])
            if is_new:
                raise RuntimeError("injected")

        monkeypatch.setattr(Cache, "write", failing)
    else:
        monkeypatch.setattr(Prefixes, stage, lambda *_: [][0])
    found = said(engine, jobs := [Job(prompt, GREEDY), Job(other, GREEDY)])
    assert [ids(says) for says in found.values()] == want
    assert {job.cached for job in jobs} == ({0} if stage != "keep" else {48, 16})
    assert engine.errors >= 2 and engine.cache.lengths == [] and not engine.is_broken
