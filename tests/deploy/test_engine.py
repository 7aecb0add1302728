"""Sequences in company against each alone, what is said of them, and what ends them."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
import pytest
import torch
from ftcore.deploy.engine import Engine, Finish, Job, QueueFull, Said
from ftcore.errors import ModelError
from ftcore.model.generate import generate
from ftcore.model.heads import Model
from ftcore.model.load import load_model
from kernels.docs import Docs
from kernels.sampling import Sampling, Token
from tests.model.conftest import documents, hf, lm_kind

__all__ = ["documents", "hf", "lm_kind"]  # fixtures

GREEDY = Sampling(12, temperature=0)
LENGTHS = [5, 1, 62, 130, 3, 40]
DRAWN = [Sampling(12, seed=1), Sampling(9, temperature=0.7, seed=2),
         Sampling(12, top_p=0.8, seed=3), Sampling(5, top_k=9, seed=4),
         Sampling(12, min_p=0.1, repetition_penalty=1.2, seed=5),
         Sampling(12, presence_penalty=1.0, logit_bias={4: 3.0}, seed=6)]

@pytest.fixture
def model(hf) -> Model:
    return load_model(hf("qwen3-untied")[1], task="lm", dtype=torch.float32).model

@torch.inference_mode()
def said(engine: Engine, jobs: Sequence[Job], *, turns: int = 500) -> dict[Job, list]:
    """What the engine says of each job until all are over, without its thread."""
    for job in jobs:
        engine.submit(job)
    found: dict[Job, list] = {job: [] for job in jobs}
    for _ in range(turns):
        for job, what in engine.turn():
            found.setdefault(job, []).append(what)
        if not engine.running and not engine.waiting:
            return found
    raise AssertionError(f"not over after {turns} turns")

def ids(says: Sequence[Any]) -> list[int]:
    return [token.id for token in says if isinstance(token, Token)]

def answers(engine: Engine, jobs: Sequence[Job]) -> list[list[int]]:
    found = said(engine, jobs)
    assert [found[job][-1].reason for job in jobs] == ["length"] * len(jobs)
    return [ids(found[job]) for job in jobs]

def fails_on(
    model: Model, monkeypatch: pytest.MonkeyPatch, when: Callable[[list[int]], bool]
) -> None:
    """The trunk raises where `when` says so of the stream's tokens."""
    forward = model.trunk.forward

    def checked(tokens_N: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        if when(tokens_N.tolist()):
            raise RuntimeError("injected")
        return forward(tokens_N, *args, **more)

    monkeypatch.setattr(model.trunk, "forward", checked)

@pytest.mark.parametrize("prefill", [16, 512])
def test_in_company_as_alone(prefill: int, lm_kind, hf, documents) -> None:
    """Prompts in chunks beside sequences that decode, more of them than fit at once."""
    model = load_model(hf(lm_kind)[1], task="lm", dtype=torch.float32).model
    prompts = documents(LENGTHS)
    engine = Engine(model, prefill_tokens=prefill, max_sequences=4)
    found = answers(engine, [Job(prompt, GREEDY) for prompt in prompts])
    for prompt, answer in zip(prompts, found, strict=True):
        (want,) = generate(model, [prompt], max_new_tokens=12, stop_ids=frozenset())
        assert answer == want
    assert engine.cache.lengths == [] and engine.cache_used == 0

def test_draws_are_the_same_alone_and_in_company(model, documents) -> None:
    jobs = [Job(prompt, how) for prompt, how in zip(documents(LENGTHS), DRAWN, strict=True)]
    together = answers(Engine(model, prefill_tokens=50), jobs)
    assert together == [answers(Engine(model), [job])[0] for job in jobs]
    assert together != answers(Engine(model), [
        Job(job.ids, replace(job.sampling, seed=9)) for job in jobs])

def test_a_stop_id_ends_and_is_said(model, documents) -> None:
    (prompt,) = documents([9])
    (free,) = answers(Engine(model), [Job(prompt, GREEDY)])
    how = replace(GREEDY, stop_ids=frozenset({stop := free[4]}))
    stopped, later = [Job(prompt, how), Job(prompt, replace(how, min_new_tokens=7))]
    found = said(Engine(model), [stopped, later])
    assert ids(found[stopped]) == free[: free.index(stop) + 1]
    assert found[stopped][-1].reason == "stop"
    assert len(ids(found[later])) >= 7 and stop not in ids(found[later])[:7]

@pytest.mark.parametrize("prefill", [7, 512])
def test_log_probabilities_are_those_of_a_full_pass(prefill: int, model, documents) -> None:
    """Of an answer whose prompt is read in chunks or whole."""
    (prompt,) = documents([40])
    job = Job(prompt, Sampling(6, seed=3, num_top=2))
    *tokens, _ = said(Engine(model, prefill_tokens=prefill), [job])[job]
    assert len(tokens) == 6
    docs, tokens_N = Docs.from_lengths([46]), torch.tensor(prompt + ids(tokens))
    with torch.no_grad():
        h_NC = model.trunk(tokens_N, docs.positions_N(), tokens_N * 0, docs)
        logprobs_NV = model.head(h_NC).log_softmax(-1)
    for place, token in enumerate(tokens, start=39):
        best = logprobs_NV[place].topk(2).values.tolist()
        assert token.logprob == pytest.approx(logprobs_NV[place, token.id].item(), abs=1e-4)
        assert [value for _, value in token.top] == pytest.approx(best, abs=1e-4)

def test_what_is_not_finite_ends_one_alone(model, documents) -> None:
    """A token whose vector has one NaN: the neighbours' logits are the same bits."""
    how = replace(GREEDY, num_top=1)
    jobs = [Job(prompt, how) for prompt in documents([20, 31, 9])]
    jobs[1].ids[7] = rare = 95
    jobs[1].sampling = replace(how, max_new_tokens=1)  # so that steps are of as many sequences
    want = said(Engine(model), jobs)
    assert sum(rare in (*job.ids, *job.answer) for job in jobs) == 1
    with torch.no_grad():
        model.trunk.embed_tokens.weight[rare, 0] = float("nan")
    found = said(Engine(model), jobs)
    assert found[jobs[1]] == [Finish("error", "non_finite_logits")]
    for job in (jobs[0], jobs[2]):
        assert found[job] == want[job]

def test_a_sequence_waits_for_room(model, documents) -> None:
    """Six of 52 tokens where there is room for 3; the same answers as with all the room."""
    jobs = [Job(prompt, GREEDY) for prompt in documents([40] * 6)]
    want, engine, most = answers(Engine(model), jobs), Engine(model, cache_tokens=160), []
    turn = engine.turn

    def counted() -> Said:
        most.append((len(engine.running), engine.cache_used))
        return turn()

    engine.turn = counted
    assert answers(engine, jobs) == want
    assert max(count for count, _ in most) == 3 and max(used for _, used in most) == 156 / 160

@torch.inference_mode()
def test_cancelled_jobs_are_gone_before_the_next_step(model, documents) -> None:
    """One that decodes, one whose prompt is being read, and one that waits."""
    engine = Engine(model, max_sequences=3, prefill_tokens=16)
    stays, *others = jobs = [Job(prompt, GREEDY) for prompt in documents([6, 7, 90, 5])]
    for job in jobs:
        engine.submit(job)
    engine.turn()
    assert (len(engine.running), len(engine.waiting)) == (3, 1)
    for job in (*others, Job([1], GREEDY), others[0]):  # one unknown, one twice
        engine.cancel(job)
    found = [pair for pair in engine.turn() if pair[0] is not stays]
    assert found == [(job, Finish("cancelled")) for job in others]
    assert (len(engine.running), len(engine.waiting), len(engine.cache.lengths)) == (1, 0, 1)
    rest = []
    while engine.running:
        rest += engine.turn()
    (want,) = answers(Engine(model), [stays])
    assert ids([what for _, what in rest]) == want[2:]

BAD = {
    "admit": Job([2] * 20, replace(GREEDY, max_new_tokens=13)),
    "prefill": Job([96] * 20, GREEDY),
    "decode": Job([95] * 20, GREEDY),
    "sample": Job([2] * 20, replace(GREEDY, logit_bias={10**6: 1.0})),
}

@pytest.mark.parametrize("stage", BAD)
def test_a_failure_ends_one_alone(stage: str, model, documents, monkeypatch) -> None:
    jobs = [Job(prompt, GREEDY) for prompt in documents([20, 31, 9])]
    want = answers(Engine(model), jobs)
    bad = BAD[stage]
    if stage == "admit":
        chances = Sampling.chances
        monkeypatch.setattr(
            Sampling, "chances", lambda how: [][0] if how.max_new_tokens == 13 else chances(how))
    if stage == "prefill":
        fails_on(model, monkeypatch, lambda tokens: tokens.count(96) > 9)
    if stage == "decode":
        token = answers(Engine(model), [bad])[0][0]
        fails_on(model, monkeypatch, lambda tokens: token in tokens and len(tokens) < 5)
        jobs = [job for job, answer in zip(jobs, want, strict=True) if token not in answer]
        want = [answer for answer in want if token not in answer]
    engine = Engine(model)
    found = said(engine, [jobs[0], bad, *jobs[1:]])
    assert [ids(found[job]) for job in jobs] == want and len(jobs) > 1
    assert found[bad][-1] == Finish("error", "engine_error")
    assert len(ids(found[bad])) == (stage == "decode")
    assert engine.errors and not engine.is_broken and engine.cache.lengths == []

def test_where_nothing_gets_through_it_is_broken(model, documents, monkeypatch) -> None:
    """Failures of single jobs do not make it so, however many; a step that works mends it."""
    engine, prompts = Engine(model), documents([5, 6])
    for _ in range(4):
        said(engine, [BAD["sample"]])
    assert not engine.is_broken and engine.errors == 4
    fails_on(model, monkeypatch, lambda tokens: True)
    for count in range(3):
        assert engine.is_broken == (count > 2)
        found = said(engine, [Job(prompt, GREEDY) for prompt in prompts])
        assert {says[-1] for says in found.values()} == {Finish("error", "engine_error")}
    assert engine.is_broken
    monkeypatch.undo()
    said(engine, [Job(prompts[0], GREEDY)])
    assert not engine.is_broken

def test_the_first_step_may_fail(model, documents, monkeypatch) -> None:
    jobs = [Job(prompt, GREEDY) for prompt in documents([5, 6, 7])]
    want, engine = answers(Engine(model), jobs), Engine(model)
    fails_on(model, monkeypatch, lambda tokens: len(tokens) > 6)
    found = said(engine, jobs)
    assert [ids(found[job]) for job in jobs] == [*want[:2], []]
    fails_on(model, monkeypatch, lambda tokens: True)
    found = said(engine := Engine(model), jobs)
    assert engine.errors == 4 and {len(says) for says in found.values()} == {1}

@pytest.mark.parametrize("kind", ["bert-classify", "modernbert_mean-classify", "qwen3-classify",
                                  "bert-trunk", "llama-trunk", "llama-untied"])
def test_jobs_without_sampling(kind: str, hf, documents) -> None:
    """Packed as alone; as many in a step as the budget allows, in the order they came."""
    task = {"classify": "classify", "trunk": "trunk", "untied": "lm"}[kind.split("-")[1]]
    model = load_model(hf(kind)[1], task=task, dtype=torch.float32).model
    engine, texts = Engine(model, prefill_tokens=100), documents([60, 30, 11, 200, 5])
    jobs = [Job(text, None) for text in texts]
    for job in jobs:
        engine.submit(job)
    with torch.inference_mode():
        steps = [engine.turn() for _ in range(4)]
    assert steps == [[(job, Finish("stop")) for job in some]
                     for some in (jobs[:2], jobs[2:3], jobs[3:4], jobs[4:])]
    for job in jobs:
        docs, tokens_N = Docs.from_lengths([len(job.ids)]), torch.tensor(job.ids)
        with torch.no_grad():
            inputs = tokens_N, docs.positions_N(), tokens_N * 0, docs
            h_NC = model.trunk(*inputs)
            if task == "classify":
                rows_B = model.head.rows(docs)
                want_K = model.head(h_NC if rows_B is None else h_NC[rows_B], docs)[0]
            else:
                want_K = h_NC[-1] if model.spec.is_causal else h_NC.mean(0)
        assert job.scores == pytest.approx(want_K.tolist(), abs=1e-5)

def test_what_cannot_be_is_refused(model, hf) -> None:
    engine = Engine(model, max_waiting=1, cache_tokens=100)
    with pytest.raises(ModelError, match="may have 1 to 100 tokens, not 101"):
        engine.submit(Job([1] * 89, GREEDY))
    with pytest.raises(ModelError, match="may have 1 to 100 tokens, not 12"):
        engine.submit(Job([], GREEDY))
    engine.submit(Job([1], GREEDY))
    with pytest.raises(QueueFull, match="1 jobs wait already"):
        engine.submit(Job([1], GREEDY))
    other = load_model(hf("bert-trunk")[1], task="trunk", dtype=torch.float32).model
    with pytest.raises(ModelError, match="no language-model head"):
        Engine(other).submit(Job([1], GREEDY))

def test_a_thread_answers_and_ends(model, documents) -> None:
    """What it says goes to `deliver`, in its own thread, once a step; a `deliver` that raises does
    not end it; what is left at its end is told so."""
    prompts, over, calls = documents([5, 30]), threading.Event(), []
    jobs = [Job(prompt, GREEDY) for prompt in prompts]
    (want, _) = answers(Engine(model), jobs)
    engine = Engine(model, threads=1)

    def deliver(step: Said) -> None:
        calls.append((threading.current_thread(), step))
        if sum(isinstance(what, Finish) for _, step in calls for _, what in step) == 2:
            over.set()
        if len(calls) == 1:
            raise ValueError("not now")

    engine.start(deliver)
    for job in jobs:
        engine.submit(job)
    assert over.wait(20)
    long = Job(prompts[0], replace(GREEDY, max_new_tokens=600))
    engine.submit(long)
    engine.stop()
    assert not engine.thread.is_alive() and {thread for thread, _ in calls} == {engine.thread}
    found = [pair for _, step in calls for pair in step]
    assert ids([what for job, what in found if job is jobs[0]]) == want
    assert found[-1] == (long, Finish("error", "shutting_down"))
    assert engine.errors == 1
