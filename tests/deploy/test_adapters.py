"""Adapters beside one another on one base: each answers as it does alone; what is refused."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
import peft
import pytest
import torch
from ftcore.config import PeftConfig
from ftcore.deploy.engine import Engine, Job
from ftcore.errors import ConfigError, FtcoreError, ModelError
from ftcore.model.load import LoadedModel, load_model
from ftcore.tune.adapter import base_sha256, load_adapter, save_adapter, share_base
from ftcore.tune.lora import apply_lora, lora_layers
from kernels.sampling import Sampling, Token
from tests.deploy.test_engine import LENGTHS, answers, documents, fails_on, hf, ids, said
from tests.tune.test_adapter import tune

__all__ = ["documents", "hf"]  # fixtures

HOW = Sampling(10, temperature=0, num_top=2)
TARGETS = {"gpt2-untied": ["c_attn"], "qwen3-untied": ["q_proj", "down_proj"],
           "gemma2-untied": ["v_proj", "up_proj"]}  # of peft's adapter
CLOSE = {"rtol": 0, "atol": 1e-4}
Read = Callable[[str], LoadedModel]

@pytest.fixture
def read(hf) -> Read:
    return lambda kind: load_model(hf(kind)[1], task="lm", dtype=torch.float32)

@pytest.fixture
def made(read: Read, tmp_path: Path) -> Callable[..., Path]:
    """(kind, name, options of ours) -> the folder of an adapter whose values are far from zero."""
    def make(kind: str, name: str, **options: object) -> Path:
        loaded = read(kind)
        config = PeftConfig(**{"rank": 3, "alpha": 4.0} | options)
        apply_lora(loaded.model, config, generator=torch.Generator().manual_seed(len(name)))
        tune(loaded.model)
        folder = tmp_path / name
        save_adapter(loaded.model, folder, family=loaded.family, base_path="base")
        return folder

    return make

def theirs(hf: Callable, kind: str, folder: Path) -> Path:
    """The folder of one that peft has made, of gpt2's q, k and v as the one that it keeps."""
    model, base = hf(kind)
    again = type(model).from_pretrained(base)  # the first may not be changed
    settings = {"target_modules": TARGETS[kind], "fan_in_fan_out": "gpt2" in kind}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(again, peft.LoraConfig(r=2, **settings))
    tune(wrapped)
    wrapped.save_pretrained(folder)
    return folder

@pytest.fixture(params=TARGETS)
def several(request, read: Read, made, hf, tmp_path: Path) -> tuple[LoadedModel, dict]:
    """A base with three adapters, and by name the same alone."""
    kind = request.param
    folders = {"ours": made(kind, "ours", targets=("all-linear", "lm_head")),
               "theirs": theirs(hf, kind, tmp_path / "theirs"),
               "some": made(kind, "some", targets=("*.0.mlp.up_proj",), rank=1)}
    alone = {None: read(kind).model}
    for name, folder in folders.items():
        loaded = read(kind)
        load_adapter(loaded.model, folder, family=loaded.family)
        alone[name] = loaded.model
    loaded = read(kind)
    before = base_sha256(loaded.model)
    prints = share_base(loaded, [f"{n}={folder}" for n, folder in folders.items()], ["base"], "x")
    assert base_sha256(loaded.model) == before and not lora_layers(loaded.model)
    assert len({*prints.values()}) == 3 and [*prints] == [*folders]
    return loaded, alone

def jobs_of(prompts: Sequence[list[int]], alone: dict, **more: object) -> list[Job]:
    """Every prompt to every model, by turns."""
    return [Job(prompt, more.get("sampling"), adapter=name, num_top=more.get("num_top"))
            for prompt in prompts for name in alone]

def by_itself(job: Job, alone: dict) -> tuple[Job, list]:
    same = replace(job, adapter=None)
    return same, said(Engine(alone[job.adapter]), [same])[same]

def assert_close(found: Sequence[Token], want: Sequence[Token]) -> None:
    assert ids(found) == ids(want)
    for one, other in zip(found, want, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [p for _, p in one.top] == pytest.approx([p for _, p in other.top], abs=1e-4)

@pytest.mark.parametrize("prefill", [16, 512])
def test_each_answers_in_company_as_alone(prefill: int, several, documents) -> None:
    """Prompts in chunks, and whole, beside sequences that decode; more of them than fit at once."""
    loaded, alone = several
    jobs = jobs_of(documents(LENGTHS), alone, sampling=HOW)
    found = said(Engine(loaded.model, prefill_tokens=prefill, max_sequences=9), jobs)
    for job in jobs:
        *want, end = by_itself(job, alone)[1]
        assert_close(found[job][:-1], want)
        assert found[job][-1] == end and end.reason == "length"
    firsts = {round(found[job][0].logprob, 3) for job in jobs[: len(alone)]}  # of one prompt
    assert len(firsts) == len(alone)

def test_what_is_read_and_embedded_too(several, documents) -> None:
    """In one pass: of a prompt its log-probabilities, or its last hidden state."""
    loaded, alone = several
    prompts = documents([40, 70, 3])
    for num_top in (1, None):
        jobs = jobs_of(prompts, alone, num_top=num_top)
        said(Engine(loaded.model), jobs)
        for job in jobs:
            want, _ = by_itself(job, alone)
            torch.testing.assert_close(torch.tensor(job.scores), torch.tensor(want.scores), **CLOSE)
            if num_top:
                assert [token.id for token in job.read] == job.ids
                assert_close(job.read[1:], want.read[1:])
        assert len({tuple(job.scores) for job in jobs[: len(alone)]}) == len(alone)

@pytest.mark.parametrize("several", ["qwen3-untied"], indirect=True)
def test_after_a_failure_each_is_still_its_own(several, documents, monkeypatch) -> None:
    """The step is taken again one by one, for one adapter after the other."""
    loaded, alone = several
    jobs = jobs_of(documents([20, 31]), alone, sampling=replace(HOW, num_top=0))
    want = answers(Engine(loaded.model), jobs)
    bad = Job([96] * 20, HOW, adapter="ours")
    fails_on(loaded.model, monkeypatch, lambda tokens: tokens.count(96) > 9)
    found = said(Engine(loaded.model), [jobs[0], bad, *jobs[1:]])
    assert [ids(found[job]) for job in jobs] == want
    assert found[bad][-1].code == "engine_error"

def test_the_factors_are_in_the_dtype_of_the_products(read: Read, made, documents) -> None:
    """As `--precision bf16-autocast` has them over fp32 weights."""
    folder, shared, alone = made("qwen3-untied", "a"), read("qwen3-untied"), read("qwen3-untied")
    load_adapter(alone.model, folder, family=alone.family)
    for loaded in (shared, alone):
        loaded.model.compute_in(torch.bfloat16)
    share_base(shared, [f"a={folder}"], ["base"], "x")
    jobs = base, one = [Job(*documents([30]), None, adapter=name) for name in (None, "a")]
    said(Engine(shared.model), jobs)
    want, _ = by_itself(one, {"a": alone.model})
    one, want, base = (torch.tensor(job.scores) for job in (one, want, base))
    assert (one - want).norm() < 0.1 * want.norm() and (one - base).norm() > 0.5 * want.norm()

def test_rows_are_filled_up_to_few_sizes(read: Read, made) -> None:
    """Each size of a product in bf16 takes memory on a CPU, for good: kernels/docs.py."""
    loaded = read("qwen3-untied")
    share_base(loaded, [f"a={made('qwen3-untied', 'a')}"], ["base"], "x")
    jobs = [Job([1], None, adapter=name) for name in ("a", None, "a")]
    Engine(loaded.model)._route(jobs, [9, 4, 8])
    (rows,) = [rows_M.tolist() for rows_M in loaded.model.trunk.routes.values()]
    assert {*rows} == {*range(9), *range(13, 21)} and len(rows) == 20
    Engine(loaded.model)._route(jobs[1:2], [4])
    assert loaded.model.trunk.routes == {}

def test_without_adapters_nothing_is_shared(read: Read) -> None:
    loaded = read("qwen3-untied")
    names = [*dict(loaded.model.named_modules())]
    assert share_base(loaded, (), ["base"], "x") == {}
    assert [*dict(loaded.model.named_modules())] == names and loaded.model.trunk.routes is None

def refusal(loaded: LoadedModel, *words: str, kind: type[FtcoreError]) -> str:
    with pytest.raises(kind) as error:
        share_base(loaded, words, ["live", "run-3"], "x")
    return str(error.value)

def test_refusals(read: Read, made, hf, tmp_path: Path) -> None:
    kind = "qwen3-untied"
    good = made(kind, "good")
    for word in ("good", "=x", "a=", f"live={good}", f"run-3={good}"):
        assert f"--adapter {word}: must be NAME=DIR" in refusal(read(kind), word, kind=ConfigError)
    told = refusal(read(kind), f"a={good}", f"a={good}", kind=ConfigError)
    assert told.endswith("none of live, run-3, a")
    full = made(kind, "full", extra_modules=("trunk.norm",))
    told = refusal(read(kind), f"a={full}", kind=ConfigError)
    assert "trained trunk.norm.weight and the like fully: serve it by itself" in told
    assert "--peft.extra-modules" in told
    told = refusal(read(kind), f"a={tmp_path / 'none'}", kind=ModelError)
    assert "none/adapter_config.json: cannot be read" in told and "LoRA run" in told
    told = refusal(read("qwen3-tied"), f"a={good}", kind=ModelError)
    assert "trained on another base" in told
    other = load_model(hf("bert-classify")[1], task="classify", dtype=torch.float32)
    assert "does not generate" in refusal(other, f"a={good}", kind=ConfigError)
