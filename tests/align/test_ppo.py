"""The iteration: what it asserts of itself, that no part is dead code, that resuming is exact."""

import json
from collections.abc import Callable
from typing import Any
import pytest
import torch
from ftcore.align import objective
from ftcore.align.ppo import PpoLoop
from ftcore.align.rollout import BEST, DRAWN
from ftcore.env.run import read_metrics
from ftcore.errors import TrainingError
from ftcore.tune.optim import AdamW
from ftcore.tune.workers import Workers
from tests.tune.test_loop import stop_at

def trace(loop: PpoLoop) -> list[dict[str, float]]:
    """The metrics of every step, those of speed and memory aside."""
    return [{name: value for name, value in line.items() if not name.startswith("perf/")}
            for line in read_metrics(loop.run.path / "metrics.jsonl")]

def tensors(loop: PpoLoop) -> dict[str, torch.Tensor]:
    return {f"{group}/{name}": tensor.clone() for group, named in loop.optimizer.state().items()
            for name, tensor in named.items()}

def assert_equal(loop: PpoLoop, whole: tuple[dict[str, torch.Tensor], Any]) -> None:
    found = tensors(loop)
    assert found.keys() == whole[0].keys()
    assert all(torch.equal(found[name], whole[0][name]) for name in found)
    assert trace(loop) == whole[1]

RUN = {"optim": {"batch_size": 16}, "ppo": {"epochs": 2, "kl_target": 1.0},
       "reward": {"scale": True, "missing_end": 0.1}, "loop": {"eval_every": 2}}

OFF = {
    "gae": {"gae_lambda": 0.0}, "discount": {"gamma": 0.5}, "whitening": {"whiten": False},
    "clipping": {"clip": 1e6}, "divergence": {"kl_coef": 0.0}, "estimate": {"kl": "k3"},
    "value baseline": {"advantage": "group"}, "value clipping": {"value_clip": 0.0},
    "value loss": {"value_coef": 0.0}, "entropy": {"entropy_coef": 0.1},
    "warm-up": {"critic_warmup": 1}, "stop": {"stop_kl": 1e-9},
    "leave one out": {"advantage": "leave_one_out"}, "epochs": {"epochs": 1},
}  # fmt: skip

def test_no_part_is_dead_code(make_ppo: Callable[..., PpoLoop]) -> None:
    """Each option alone leaves another policy after three iterations."""
    common = {"rollout": {"samples": 2}, "optim": {"batch_size": 16}, "loop": {"max_steps": 3}}
    found = {}
    for name, options in {"all": {}, **OFF}.items():
        loop = make_ppo(name, **common, ppo={"kl_coef": 0.2, "epochs": 3, **options})
        assert loop.train() == 0
        found[name] = torch.cat([p.detach().flatten() for p in loop.model.parameters()])
        if options:  # its value head may be missing
            size = min(map(len, (found["all"], found[name])))
            assert not torch.equal(found["all"][:size], found[name][:size]), name

@pytest.mark.parametrize("options", [{"scale": True}, {"clip": 0.3}, {"missing_end": 0.5},
                                     {"per_token": 0.1}], ids=lambda o: next(iter(o)))
def test_scores_are_shaped(options: dict[str, Any], make_ppo: Callable[..., PpoLoop]) -> None:
    plain, shaped = make_ppo("plain"), make_ppo("shaped", reward=options)
    raw, scores = ([e.score for e in self_scored(loop)] for loop in (plain, shaped))
    episodes = self_scored(plain)
    if "scale" in options:
        want = torch.tensor(raw) / torch.tensor(raw).std()
    elif "clip" in options:
        want = torch.tensor(raw).clamp(-0.3, 0.3)
    elif "missing_end" in options:
        off = [0.5 * (not e.has_ended) for e in episodes]
        want = torch.tensor(raw) - torch.tensor(off)
    else:
        want = torch.tensor(raw) - torch.tensor([0.1 * e.length for e in episodes])
    torch.testing.assert_close(torch.tensor(scores), want)

def self_scored(loop: PpoLoop) -> list[Any]:
    """The episodes of the first iteration, their scores shaped."""
    episodes = loop.actor.episodes([loop.actor.prompts[row] for row in loop.rows(0)], DRAWN, 0)
    loop.actor.shaped(episodes, objective.Control())
    return episodes

@pytest.mark.parametrize("group", [False, True])
def test_a_run_resumed_after_any_iteration_is_bit_equal(
    group: bool, make_ppo: Callable[..., PpoLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**RUN, "rollout": {"samples": 2}}
    loop = make_ppo("whole", group=group, **options)
    assert loop.train() == 0 and loop.progress.step == 4
    whole = tensors(loop), trace(loop)
    assert ("master/value.weight" in whole[0]) != group
    for step in range(1, 4):
        loop = make_ppo(f"stopped-{step}", group=group, **options)
        assert stop_at(loop, step, monkeypatch) == 143
        loop = make_ppo(f"stopped-{step}", group=group, **options, resume=True)
        assert loop.progress.step == step and loop.control.kl_coef != loop.config.ppo.kl_coef
        assert loop.train() == 0
        assert_equal(loop, whole)

class Killed(BaseException):
    """What nothing in a run catches."""

@pytest.mark.parametrize("where", ["rollout", "epoch", "save"])
def test_a_run_killed_anywhere_is_bit_equal(
    where: str, make_ppo: Callable[..., PpoLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**RUN, "loop": {"eval_every": 100, "save_every": 2}}
    loop = make_ppo("whole", **options)
    assert loop.train() == 0
    whole = tensors(loop), trace(loop)
    loop = make_ppo("killed", **options)
    calls = {"rollout": (loop.actor.rewards, "sources", 4), "epoch": (AdamW, "square_sums", 5),
             "save": (loop.checkpoints, "save", 1)}

    def dies(left: list[int], real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(*args, **more)

        return call

    owner, name, after = calls[where]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        real, left = getattr(owner, name), [after]
        if where == "rollout":
            patch.setattr(owner, name, {n: dies(left, source) for n, source in real.items()})
        else:
            patch.setattr(owner, name, dies(left, real))
        loop.train()
    assert loop.progress.step == (4 if where == "save" else 2)
    loop = make_ppo("killed", **options, resume=True)
    assert loop.progress.step == 2 and loop.train() == 0
    assert_equal(loop, whole)

def test_the_first_iteration_proves_itself(
    make_ppo: Callable[..., PpoLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_ppo("moved")
    with torch.no_grad():
        next(iter(loop.reference.parameters())).mul_(1.01)
    with pytest.raises(AssertionError, match="the reference must be the start"):
        loop.train()
    loop = make_ppo("other temperature")
    real = objective.seen
    monkeypatch.setattr(objective, "seen", lambda model, batch, temperature: real(
        model, batch, temperature * (1.01 if torch.is_grad_enabled() else 1.0)))
    with pytest.raises(AssertionError, match="the first update must see what was scored"):
        loop.train()
    monkeypatch.setattr(objective, "seen", real)
    loop = make_ppo("by neighbours")
    rewards = loop.actor.rewards
    (source,) = rewards.sources.values()
    rewards.sources, rewards.weights = {"model:X": lambda rows: [
        score + len(rows) for score in source(rows)]}, {"model:X": 1.0}
    with pytest.raises(AssertionError, match="model:X says .* of one"):
        loop.train()

@pytest.mark.parametrize("group", [False, True])
def test_two_processes_share_all_but_the_answers(
    group: bool, make_ppo: Callable[..., PpoLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forked once, before autograd has threads that a fork would lack, they change rounding alone,
    and are resumed bit-equal; what they look at is what a single one sees."""
    forks, real = [], Workers.__init__
    monkeypatch.setattr(Workers, "__init__", lambda *args: forks.append(1) or real(*args))
    options = {**RUN, "rollout": {"samples": 2}, "optim": {"batch_size": 16, "lr": 1e-3}}

    def made(name: str, count: int, *, resume: bool = False) -> PpoLoop:
        monkeypatch.setattr(torch, "get_num_threads", lambda: count)
        monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
        loop = make_ppo(name, group=group, **options, resume=resume)
        assert loop.num_processes == count
        return loop

    alone, both = made("alone", 1), made("both", 2)
    for loop in (alone, both):
        assert loop.train() == 0
    assert len(forks) == 2, "one crew for each run"
    for line, other in zip(trace(both), trace(alone), strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-4)
    whole = tensors(both), trace(both)
    assert stop_at(made("stopped", 2), 2, monkeypatch) == 143
    loop = made("stopped", 2, resume=True)
    assert loop.train() == 0
    assert_equal(loop, whole)

def test_the_reference_shares_what_is_frozen(make_ppo: Callable[..., PpoLoop]) -> None:
    loop = make_ppo("lora", peft={"method": "lora", "rank": 2})
    before = {name: p.clone() for name, p in loop.reference.named_parameters()}
    assert loop.train() == 0
    mine = dict(loop.model.named_parameters())
    for name, param in loop.reference.named_parameters():
        assert torch.equal(param, before[name])
        assert (param is mine[name]) != mine[name].requires_grad
    loop.restore_best()
    assert not any(name.startswith("value") for name, _ in loop.model.named_parameters())

def test_dropout_is_off(make_ppo: Callable[..., PpoLoop]) -> None:
    loop = make_ppo("dropout", peft={"method": "lora", "rank": 2, "dropout": 0.5})
    loop.model.trunk.layers[0].dropout = 0.5
    assert loop.train() == 0  # or the first update would not see what was scored

def test_a_failed_reward_keeps_what_was_trained(make_ppo: Callable[..., PpoLoop]) -> None:
    loop = make_ppo("fails")
    name, source = next(iter(loop.actor.rewards.sources.items()))
    calls = iter([source] * 5)  # one more in the first iteration, for an answer alone
    loop.actor.rewards.sources[name] = lambda rows: next(calls)(rows)
    with pytest.raises(TrainingError, match=r"reward .*: StopIteration"):
        loop.train()
    assert loop.checkpoints.latest().step == loop.progress.step == 3

def test_one_update_needs_no_scores_before_it(
    make_ppo: Callable[..., PpoLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is logged, the same weights come from half the passes."""
    options = {"group": True, "rollout": {"prompts": 16, "samples": 4}, "ppo": {"kl_coef": 0.0},
               "optim": {"batch_size": 64}}
    often = make_ppo("often", **options, loop={"max_steps": 4, "log_every": 1})
    assert often.train() == 0
    whole, calls, real = tensors(often), [], objective.seen
    monkeypatch.setattr(objective, "seen", lambda *args: calls.append(1) or real(*args))
    seldom = make_ppo("seldom", **options, loop={"max_steps": 4, "log_every": 100})
    assert seldom.train() == 0
    assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors(seldom).items())
    assert len(calls) == 2 * 3 + 2 * 1, "the first and the last are logged, and look at both models"

def test_the_best_of_several_answers_is_told_beside(make_ppo: Callable[..., PpoLoop]) -> None:
    loop = make_ppo("several", ppo={"best_of": 4})
    drawn = loop.actor.episodes(loop.actor.judges, BEST, 4, samples=4)
    assert loop.train() == 0
    told = json.loads((loop.run.path / "start.json").read_bytes())
    several = [[episode.score for episode in drawn[i : i + 4]] for i in range(0, len(drawn), 4)]
    assert len(several) == len(told["scores"]) == told["best_of"] == 4
    assert told["best"] == pytest.approx(sum(map(max, several)) / 4)
    assert told["one"] == pytest.approx(sum(scores[0] for scores in several) / 4)
    assert told["one"] < told["best"]
