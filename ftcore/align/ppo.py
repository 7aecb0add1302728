"""Reinforcement learning of a policy: PPO, and GRPO and RLOO, which need no values.

    for each iteration:  prompts -> answers, drawn -> scores              rollout.py, rewards.py
                         -> what policy, values and reference say of each token
                         -> rewards -> advantages                                     objective.py
                         -> epochs of clipped updates -> log, evaluate, save

Letters: M answer tokens of some episodes, end to end. An iteration is one step of the loop
(tune/loop.py), all but the answers shared by its processes, and a pure function of what is trained,
the `Control` and the step. Answers are scored by the very pass that is trained, in the same
streams, by the same process: the ratio of the first update is 1, bit by bit, as asserted.
The reference is the policy as it started: a copy of what is trained, which shares what is frozen.

source  Huang et al. 2024, arXiv:2403.17031: a value head that starts at zero (detail 8), dropout
        off (11), a penalty for a missing end (12), the score at the last token (15), losses over
        true tokens alone (16), whitened advantages (18)"""

import json
import math
import time
from collections import ChainMap, defaultdict
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
import numpy as np
import torch
from torch import Tensor
from ftcore.align import objective, rollout
from ftcore.data import columns, pack
from ftcore.env.compute import derived
from ftcore.errors import TrainingError
from ftcore.evaluate import evaluator, metrics
from ftcore.model.heads import Model
from ftcore.model.transformer import Linear
from ftcore.tune import freeze, loop
from ftcore.tune.workers import Workers

TOLD = ("logp", "ref_logp", "exact", "k1", "k3", "value")  # of each token
READ = ("logp", "value", "advantage", "return")  # of those, what the loss reads

@dataclass
class PpoLoop(loop.Loop):
    """A run whose documents are answers of the model itself."""
    actor: rollout.Actor | None = None
    reads_rows = False

    def __post_init__(self) -> None:
        ppo, self.documents = self.config.ppo, [ids for _, ids in self.actor.prompts]
        tensors = (*self.model.eval().parameters(), *self.model.buffers())
        shared = {id(tensor): tensor for tensor in tensors if not tensor.requires_grad}
        self.reference = deepcopy(self.model, shared).requires_grad_(False)
        self.model.value = None
        if ppo.advantage == "gae":
            self.model.value = Linear(self.model.spec.hidden_size, 1).to(self.model.device)
            for param in self.model.value.parameters():
                torch.nn.init.zeros_(param)
        super().__post_init__()
        self.task, self.evaluate = self.loss, self.judged if self.actor.judges else None
        self.documents_of = lambda number: self.batches[number]
        self.control = self.remembered["control"] = objective.Control(ppo.kl_coef)

    def train(self) -> int:
        """As `Loop.train`, after the start was judged, which all that follows is compared with."""
        trained = [freeze.tensor_sha256(param) for param in self.reference.parameters()]
        print(f"\nreference: the start, sha256 {sha256(repr(trained).encode()).hexdigest()[:16]}")
        file, actor = self.run.path / "start.json", self.actor
        if actor.judges and not file.is_file():
            scores = [episode.score for episode in actor.episodes(actor.judges)]
            told = {"scores": scores, "reward": np.mean(scores)}
            if count := self.config.ppo.best_of:  # rejection sampling
                drawn = actor.episodes(actor.judges, rollout.BEST, count, samples=count)
                scores_PS = np.reshape([episode.score for episode in drawn], (-1, count))
                told |= {"best_of": count, "best": scores_PS.max(1).mean(),
                         "one": scores_PS[:, 0].mean()}
            self.run.dump(file.name, told)
        if actor.judges:
            told = json.loads(file.read_bytes())
            self.start = np.array(told.pop("scores"))
            print("the start on dev prompts:", *(f"{name} {x:g}" for name, x in told.items()))
        code = super().train()
        self.model.value = None  # what is left is a policy, like any model
        return code

    def _step(self, workers: Workers) -> dict[str, float]:
        started, step, ppo = time.perf_counter(), self.progress.step, self.config.ppo
        self.model.eval()  # dropout off, here and, by `take`, in the other processes
        prompts = [self.actor.prompts[row] for row in self.rows(step)]
        try:
            samples = self.config.rollout.samples
            episodes = self.actor.episodes(prompts, rollout.DRAWN, step, samples=samples)
            if step == 0:
                self._assert_scored(episodes[0], prompts[0][0])
        except TrainingError:
            self._save()  # nothing of the iterations before is lost
            raise
        values = self.actor.shaped(episodes, self.control)
        size, batches = self.config.optim.batch_size, []
        for epoch in range(ppo.epochs):
            random = np.random.default_rng(derived(self.seed, rollout.ORDER, step, epoch))
            mixed = [episodes[i].document for i in random.permutation(len(episodes))]
            batches += [mixed[i : i + size] for i in range(0, len(mixed), size)]
        # cost: the reference is asked for rewards or the log; nothing, where one update sees all
        measures = bool(self.control.kl_coef or ppo.kl_target or self._is_logged(step + 1))
        is_blind = len(batches) == 1 and self.model.value is None and not measures
        workers.ask("take", {
            "progress": self.progress, "batches": batches, "measures": measures,
            "is_blind": is_blind, "updates_before": self.optimizer.step_count,
            "sums": defaultdict(float)})  # of a process's own shares: `tell`
        told_M = torch.zeros(len(TOLD), sum(e.length for e in episodes))
        if not is_blind:
            seen = ChainMap(*workers.ask("look"))
            parts = [seen[e.document.row_id] for e in episodes]
            told_M = torch.from_numpy(np.concatenate(parts, 1))
        values |= self._rate(episodes, dict(zip(TOLD, told_M, strict=True)))
        told = {e.document.row_id: np.stack([e.told[n] for n in READ]) for e in episodes}
        workers.ask("take", {"told": told})
        sums = defaultdict(float)
        for number in range(len(batches)):
            before = sums
            values |= self._update(workers, number)
            each = workers.ask("tell")
            sums = {name: sum(own[name] for own in each) for name in self.sums}
            tokens, moved = (sums[n] - before[n] for n in ("tokens", "approx_kl"))
            if 0 < ppo.stop_kl < moved / tokens:
                break
        if ppo.kl_target:
            self.control.adapt(values["ppo/kl"], ppo.kl_target, len(episodes), ppo.kl_horizon)
        if self._is_logged(step + 1):
            self.actor.show(episodes, step + 1, self.run.path)
        self.progress.step += 1
        tokens, seconds = sums.pop("tokens"), time.perf_counter() - started
        values |= {f"ppo/{name}": total / tokens for name, total in sums.items()}
        return values | {"ppo/updates": number + 1, "perf/samples_per_s": len(episodes) / seconds}

    def _assert_scored(self, episode: rollout.Episode, chat: columns.Chat) -> None:
        """A model must score an answer among others as it does alone."""
        tokens_M = episode.document.tokens_T[-episode.length :]
        _, alone = self.actor.rewards([chat], [evaluator.spoken(tokens_M, self.actor.tokenizer)])
        for name in (name for name in alone if name.startswith("model:")):
            both = alone[name][0], episode.parts[name]
            assert math.isclose(*both, rel_tol=1e-4, abs_tol=1e-4), f"{name} says {both} of one"

    def take(self, share: int, shares: int, told: Mapping[str, Any]) -> None:
        """In every process: what its shares of the iteration read."""
        vars(self).update(told)
        self.model.eval()

    def tell(self, share: int, shares: int) -> dict[str, float]:
        """What the losses of a process's shares have come to, in this iteration."""
        return self.sums

    @torch.no_grad()
    def look(self, share: int, shares: int) -> dict[str, np.ndarray]:
        """What policy, values and reference say of each token, in the streams of an update: TOLD x
        M of each document of a share."""
        most, found = self.config.loop.micro_batch_tokens, {}
        for batch in self.batches[: len(self.batches) // self.config.ppo.epochs]:
            mine = [batch[i] for i in pack.split([len(d) for d in batch], shares)[share]]
            for indices, stream in evaluator.streams(self.model, mine, most):
                rule = stream, self.config.rollout.temperature
                now = objective.seen(self.model, *rule)
                start = objective.seen(self.reference, *rule) if self.measures else now
                told = {"logp": now.logp_M, "ref_logp": start.logp_M}
                told |= {**objective.divergences(now, start), "value": self._values(now)}
                if self.progress.step == 0:
                    assert not told["exact"].any(), "the reference must be the start"
                ends = np.cumsum([np.count_nonzero(mine[i].weights) for i in indices])
                told_M = torch.stack([*told.values()]).cpu().numpy()
                found |= zip(stream.row_ids, np.split(told_M, ends[:-1], 1), strict=True)
        return found

    def _values(self, now: objective.Seen) -> Tensor:
        """values_M: what is expected from each token on; zero without a value head."""
        if (head := self.model.value) is None:
            return torch.zeros_like(now.logp_M)
        return head(now.h_MC.to(head.weight.dtype)).squeeze(1)

    def _rate(self, episodes: list[rollout.Episode], told: dict[str, Tensor]) -> dict[str, float]:
        """Add reward, return and advantage of each token; returns what is logged of them."""
        ppo, lengths = self.config.ppo, [episode.length for episode in episodes]
        scores_B = told["logp"].new_tensor([episode.score for episode in episodes])
        rule = told[ppo.kl], lengths, self.control.kl_coef
        told["reward"] = objective.token_rewards(scores_B, *rule)
        if ppo.advantage == "gae":
            discounts = {"gamma": ppo.gamma, "lam": ppo.gae_lambda}
            found_M = objective.gae(told["reward"], told["value"], lengths, **discounts)
        else:
            samples, is_rloo = self.config.rollout.samples, ppo.advantage == "leave_one_out"
            found_M = objective.grouped(told["reward"], lengths, samples, is_rloo=is_rloo)
        told["return"] = found_M + told["value"]
        told["advantage"] = objective.whitened(found_M) if ppo.whiten else found_M
        parts = torch.stack([*told.values()]).split(lengths, 1)
        for episode, part in zip(episodes, parts, strict=True):
            episode.told = dict(zip(told, part, strict=True))
        means = {f"ppo/kl_{name}": float(told[name].mean()) for name in ("exact", "k1", "k3")}
        if ppo.advantage == "gae":
            spread = told["return"].var(correction=0).clamp(min=1e-12)
            means["ppo/explained_variance"] = float(1 - found_M.var(correction=0) / spread)
        return means | {"ppo/kl": float(told["exact"].sum()) / len(episodes),
                        "ppo/kl_coef": self.control.kl_coef}

    def loss(self, model: Model, batch: pack.Batch) -> tuple[Tensor, Tensor]:
        ppo, now = self.config.ppo, objective.seen(model, batch, self.config.rollout.temperature)
        told_M = np.concatenate([self.told[row_id] for row_id in batch.row_ids], 1)
        old_M, value_M, advantage_M, return_M = torch.from_numpy(told_M).to(self.device)
        old_M = now.logp_M.detach() if self.is_blind else old_M
        if self.optimizer.step_count == self.updates_before:
            assert torch.equal(now.logp_M, old_M), "the first update must see what was scored"
        policy_M = objective.policy_loss(now.logp_M, old_M, advantage_M, ppo.clip)
        is_warm = self.progress.step >= ppo.critic_warmup
        with torch.set_grad_enabled(ppo.entropy_coef > 0):  # cost: two passes over M x V
            entropy_M = -(now.logp_MV.exp() * now.logp_MV).sum(-1)
        loss_M = is_warm * (policy_M - ppo.entropy_coef * entropy_M)
        away_M = (now.logp_M - old_M).detach()
        told = {"tokens": torch.ones_like(away_M), "policy_loss": policy_M,
                "entropy": entropy_M, "approx_kl": away_M.exp() - 1 - away_M,
                "clip_frac": (away_M.exp() - 1).abs() > ppo.clip}
        if model.value is not None:
            read = now if is_warm else now._replace(h_MC=now.h_MC.detach())  # the policy stays
            rule = value_M, return_M, ppo.value_clip
            told["value_loss"] = objective.value_loss(self._values(read), *rule)
            loss_M = loss_M + ppo.value_coef * told["value_loss"]
        for name, each_M in told.items():
            self.sums[name] += float(each_M.detach().sum())
        return loss_M.sum(), batch.weights.sum()  # each token of an answer weighs 1

    def judged(self) -> Mapping[str, float]:
        """Rewards of greedy answers to dev prompts, and how often these beat those of the start."""
        scores = np.array([e.score for e in self.actor.episodes(self.actor.judges)])
        wins = (scores > self.start) + 0.5 * (scores == self.start)
        told = metrics.intervals(lambda rows: {"": wins[rows].mean()}, np.arange(len(wins)))[""]
        return {"eval/loss": -scores.mean(), "eval/reward": scores.mean(),
                "eval/win_rate": wins.mean(), "eval/win_low": told[0], "eval/win_high": told[1]}
