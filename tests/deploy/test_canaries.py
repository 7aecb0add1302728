"""Prompts that never change, asked once an hour: what is said of them, bit by bit; and where the
vectors of requests point, alone and in company."""

import time
from base64 import b64decode
import numpy as np
import pytest
import torch
from ftcore.deploy import engine as engines
from ftcore.deploy.engine import Engine, Job
from ftcore.model.heads import Model
from kernels.sampling import Sampling
from tests.deploy.test_engine import GREEDY, documents, hf, lm_kind, model, said
from tests.tune.conftest import BERT, QWEN3

__all__ = ["documents", "hf", "lm_kind", "model"]  # fixtures

def drawn(spec, task: str) -> Model:
    made = Model(spec, task, num_labels=3)
    made.init_weights(torch.Generator().manual_seed(0))
    return made

def vectors(told: list[str]) -> np.ndarray:
    return np.array([np.frombuffer(b64decode(each), np.int8) for each in told], int)

@torch.inference_mode()
def asked(engine: Engine) -> str:
    """The hash of another hour."""
    engine.canary_at = 0.0
    engine._ask_canaries()
    return engine.canaries["sha256"]

@pytest.mark.parametrize(("spec", "task"), [
    (QWEN3, "lm"), (QWEN3, "classify"), (BERT, "classify"), (BERT, "trunk")])
def test_a_flipped_bit_is_told(spec, task: str) -> None:
    engine = Engine(drawn(spec, task))
    first = asked(engine)
    assert asked(engine) == first and engine.canaries["flips"] == 0 and len(first) == 64
    assert (engine.canaries["nll"] is None) == (task != "lm")
    weight_C = engine.model.trunk.layers[0].input_layernorm.weight.data
    before = weight_C[3].clone()
    weight_C[3] += 1e-3
    asked(engine)
    asked(engine)
    assert engine.canaries["flips"] == 2, "each hour is compared with the first"
    weight_C[3] = before
    assert asked(engine) == first and engine.canaries["flips"] == 2

@torch.inference_mode()
def test_company_changes_nothing(model: Model) -> None:
    engine = Engine(model)
    first = asked(engine)
    for length in (3, 40, 9):
        engine.submit(Job([5] * length, Sampling(20, seed=length)))
        engine.turn()
        assert asked(engine) == first
    assert len(engine.running) == 3 and engine.canaries["flips"] == 0

def test_they_are_asked_when_the_engine_starts_and_each_hour(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, scored = Engine(model), []
    score = engine._score
    monkeypatch.setattr(engine, "_score", lambda jobs, said: (scored.append(len(jobs)),
                                                              score(jobs, said)))
    monkeypatch.setattr(engines, "HOUR", 0.2)
    engine.start(lambda said: None)
    until = time.monotonic() + 20
    while len(scored) < 3:
        assert time.monotonic() < until
        engine.news.set()
        time.sleep(0.01)
    engine.stop()
    assert {*scored} == {4} and engine.errors == engine.canaries["flips"] == 0

def test_a_failure_is_counted_and_ends_nothing(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("injected")

    engine, heard = Engine(model), []
    monkeypatch.setattr(engine, "_score", failing)
    engine.start(heard.extend)
    job = Job([5, 6], GREEDY)
    engine.submit(job)
    until = time.monotonic() + 20
    while len(job.answer) < GREEDY.max_new_tokens:
        assert time.monotonic() < until
        time.sleep(0.01)
    engine.stop()
    assert engine.errors == 1 and engine.canaries["sha256"] == ""

def test_a_prompt_points_where_it_does_alone(model: Model) -> None:
    """In company, read in pieces, answered or scored."""
    prompts = [[5 * i % 48 + 1 for i in range(n)] for n in (5, 2, 60, 131)]
    alone = []
    for prompt in prompts:
        job = Job(prompt, None)
        said(Engine(model), [job])
        alone.append(job.embedding)
    assert np.abs(vectors(alone[:1]) - vectors(alone[1:2])).max() > 6
    for sampling in (None, GREEDY):
        jobs = [Job(prompt, sampling) for prompt in prompts]
        said(Engine(model, prefill_tokens=16, max_sequences=3), jobs)
        assert np.abs(vectors([job.embedding for job in jobs]) - vectors(alone)).max() <= 1
