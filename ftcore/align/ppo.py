"""Reinforcement learning of a policy: PPO, and GRPO and RLOO, which need no values.

    for each iteration:  prompts -> answers, drawn -> scores
                         -> what policy, values and reference say of each token -> rewards
                         -> advantages -> epochs of clipped updates -> log, evaluate, save

Letters: M answer tokens of some episodes, end to end. An episode is one answer to one prompt.

An iteration is one step of the loop (tune/loop.py): a pure function of what is trained, the
`Control` and the step, so that a run killed anywhere in it and resumed is bit-equal to one that was
not. Dropout is off throughout. Answers are scored by the very pass that is trained, in the same
streams: the ratio of the first update is 1, bit by bit, and asserted to be. The reference is the
policy as it started: a copy of what is trained, which shares every frozen tensor; its divergence is
0 in the first iteration, and asserted to be.

source  Huang et al. 2024, arXiv:2403.17031: the reward at the end of an answer (detail 15), a value
        head that starts at zero (8), dropout off (11), a penalty for a missing end (12), whitened
        advantages (18), losses over true tokens alone (16)
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftcore.align import advantage
from ftcore.align.objective import Control, Seen, divergences, policy_loss, seen, value_loss
from ftcore.align.rewards import Rewards
from ftcore.config import PpoRun
from ftcore.data.chat import encode_prompt, shifted
from ftcore.data.columns import Chat, RowError, place
from ftcore.data.pack import Batch, Encoded, StepRows
from ftcore.data.store import Prepared, rendered
from ftcore.data.tokenizer import Tokenizer
from ftcore.env.compute import peak_bytes
from ftcore.errors import ConfigError, DataError, TrainingError
from ftcore.evaluate.evaluator import greedy, streams
from ftcore.evaluate.significance import intervals
from ftcore.files import write_file
from ftcore.model.generate import generate
from ftcore.model.heads import Model
from ftcore.model.transformer import Linear
from ftcore.tune.freeze import tensor_sha256
from ftcore.tune.loop import Loop
from ftcore.tune.workers import Workers

START, PAGE, SHOWN = "start.json", "rollouts.html", 16  # episodes on the page

@dataclass
class Episode:
    """One answer."""
    chat: Chat
    document: Encoded  # prompt and answer, of which the answer's tokens count
    group: int  # number of its prompt
    text: str
    has_ended: bool  # by a token that ends, not by the limit
    score: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)  # what each reward says
    told: dict[str, Tensor] = field(default_factory=dict)  # of each of its M tokens

    @property
    def length(self) -> int:
        return int(np.count_nonzero(self.document.weights))

@dataclass
class PpoLoop(Loop):
    """A run whose documents are answers of the model itself. Raises ConfigError: an option is
    missing; DataError: a prompt is too long, where that is an error."""
    tokenizer: Tokenizer | None = None
    data: Prepared | None = None  # whose chats are the prompts, of training and of the dev rows
    reads_rows = False

    def __post_init__(self) -> None:
        config: PpoRun = self.config
        if not config.rollout.max_new_tokens:
            raise ConfigError("how long may an answer be? Give --rollout.max-new-tokens N (tokens)")
        if config.ppo.advantage != "gae" and config.rollout.samples < 2:
            what = f"ppo.advantage = {config.ppo.advantage} compares answers to one prompt"
            raise ConfigError(f"{what}: give --rollout.samples N, 2 or more")
        if self.world.size > 1:
            raise ConfigError("answers are drawn in one process: start it without torchrun")
        self.rewards = Rewards(config.reward)
        self.stop_ids = frozenset({self.tokenizer.eos_id, self.tokenizer.end_of_text_id} - {None})
        self.prompts = dict(self._prompts(self.data.train.chats))
        self.asked = dict(self._prompts(self.data.dev.chats))
        self.reference = copy_of(self.model.eval())
        self.model.value = None
        if config.ppo.advantage == "gae":
            self.model.value = Linear(self.model.spec.hidden_size, 1).to(self.model.device)
            for param in self.model.value.parameters():
                torch.nn.init.zeros_(param)
        super().__post_init__()
        self.task, self.minibatch, self.sums = self.loss, [], defaultdict(float)
        self.documents_of = lambda step: self.minibatch
        num_prompts, size = len(self.prompts), config.rollout.prompts
        self.rows = StepRows(num_prompts, batch_size=size, seed=self.seed)
        self.total_steps = config.loop.num_steps(num_prompts, size)
        self.control = self.remembered["control"] = Control(config.ppo.kl_coef)
        self.evaluate = self.judged if self.asked else None

    def _prompts(self, chats: Sequence[Chat]) -> Iterator[tuple[Chat, np.ndarray]]:
        """Chats with the ids of their prompts; those that leave no room for an answer are an error,
        or, where data.over_length is drop, counted and left out."""
        most, left = self.model.spec.max_positions - self.config.rollout.max_new_tokens, 0
        for chat in chats:
            try:
                ids = encode_prompt(chat.messages[:-1], self.tokenizer)
                if len(ids) > most:
                    raise RowError(f"its prompt has {len(ids)} tokens, {most} leave room to answer")
            except RowError as error:
                if self.config.data.over_length != "drop":
                    mend = "leave such prompts out with --data.over-length drop"
                    raise DataError(f"{place(chat)}: {error}; {mend}") from error
                left += 1
            else:
                yield chat, ids
        if left:
            print(f"prompts left out: {left} of {len(chats)}, too long or not to be rendered")
        if chats and left == len(chats):
            raise DataError(f"none of the {left} prompts leaves room for an answer")

    def train(self) -> int:
        """As `Loop.train`; first the start is judged, once, beside which later ones are told."""
        trained = [tensor_sha256(p) for p in self.reference.parameters()]
        print(f"\nreference: the start, sha256 {sha256(repr(trained).encode()).hexdigest()[:16]}")
        file = self.path / START
        if not file.is_file() and self.asked:
            scores = self._scores(greedy(self.model, self.tokenizer, [*self.asked.values()],
                                         self.config.rollout.max_new_tokens))
            self.run.dump(START, {"scores": scores.tolist(), **self._best_of()})
        self.start = json.loads(file.read_bytes()) if file.is_file() else {}
        if "best_of" in self.start:
            told = "the best of {best_of} answers of the start has {best_reward:.4f} on dev prompts"
            print(f"{told.format(**self.start)}, one drawn {self.start['one_reward']:.4f}")
        return super().train()

    def restore_best(self) -> None:
        super().restore_best()
        self.model.value = None  # what is left is a policy, like any model

    def _step(self, workers: Workers) -> dict[str, float]:
        """One iteration; returns what is logged of it."""
        started, step, ppo = time.perf_counter(), self.progress.step, self.config.ppo
        self.model.eval()  # dropout off
        try:
            episodes, values = self.rollout(step)
        except TrainingError:
            self._save(is_best=False)  # nothing of the last iterations is lost
            raise
        batches = [*self.batches(episodes, step, 0)]
        for batch in batches:
            self.look(batch)
        values |= self.rate(episodes)
        self.known = {e.document.row_id: e.told for e in episodes}
        self.sums.clear()
        self.is_first, updates = True, 0
        for number in range(ppo.epochs * len(batches)):
            epoch, index = divmod(number, len(batches))
            if index == 0 and epoch:
                batches = [*self.batches(episodes, step, epoch)]
            self.minibatch, before = [e.document for e in batches[index]], dict(self.sums)
            values |= self._update(workers)
            self.is_first, updates = False, updates + 1
            tokens, moved = (self.sums[n] - before.get(n, 0) for n in ("tokens", "approx_kl"))
            if 0 < ppo.stop_kl < moved / tokens:
                break
        if ppo.kl_target:
            self.control.adapt(values["ppo/kl"], ppo.kl_target, len(episodes), ppo.kl_horizon)
        tokens, seconds = self.sums.pop("tokens"), time.perf_counter() - started
        values |= {f"ppo/{name}": total / tokens for name, total in self.sums.items()}
        if self.run and (step + 1) % self.config.loop.log_every == 0 or step == 0:
            self.show(episodes[:SHOWN], step + 1)
        self.progress.step += 1
        return values | {"ppo/updates": updates, "perf/samples_per_s": len(episodes) / seconds,
                         "perf/peak_mem_gib": peak_bytes(self.device) / 2**30}

    def rollout(self, step: int) -> tuple[list[Episode], dict[str, float]]:
        """Answers to the prompts of a step, with their scores; and what is logged of these."""
        config, chats = self.config, [*self.prompts]
        named = [(number, chats[row]) for number, row in enumerate(self.rows(step))]
        several = [pair for pair in named for _ in range(config.rollout.samples)]
        key = [self.seed, step, len(several)]
        answers = self.answers([self.prompts[chat] for _, chat in several], key)
        texts = [self.tokenizer.decode([i for i in a if i not in self.stop_ids]) for a in answers]
        scores, parts = self.rewards([chat for _, chat in several], texts)
        episodes = []
        for i, ((number, chat), ids, text) in enumerate(zip(several, answers, texts, strict=True)):
            prompt, length = self.prompts[chat], len(ids)
            weight = 1.0 if config.ppo.loss_over == "tokens" else 1 / length
            counts_T = np.repeat(np.float32([0, weight]), [len(prompt), length])
            tokens_T = np.concatenate([prompt, np.int32(ids)])
            document = shifted(f"{chat.id}:{i}", tokens_T, counts_T)
            said = {name: float(each[i]) for name, each in parts.items()}
            episodes.append(Episode(chat, document, number, text, ids[-1] in self.stop_ids,
                                    float(scores[i]), said))
        kept = [episode for episode in episodes if np.isfinite(episode.score)]
        if not kept:
            raise TrainingError(f"iteration {step + 1}: no answer has a score: mend the rewards")
        return kept, self._shaped(kept) | {"ppo/left_out": len(episodes) - len(kept)}

    def _shaped(self, episodes: Sequence[Episode]) -> dict[str, float]:
        """Penalties, scaling and clipping of scores; returns what is logged."""
        rule, raw = self.config.reward, [episode.score for episode in episodes]
        for episode in episodes:
            episode.score -= rule.per_token * episode.length
            episode.score -= rule.missing_end * (not episode.has_ended)
        scale = self.control.deviation(e.score for e in episodes) if rule.scale else 1.0
        for episode in episodes:
            episode.score /= scale
            if rule.clip:
                episode.score = min(max(episode.score, -rule.clip), rule.clip)
        means = {f"reward/{n}": np.mean([e.parts[n] for e in episodes]) for n in episodes[0].parts}
        return {"ppo/reward": float(np.mean(raw)), **means,
                "ppo/score": float(np.mean([e.score for e in episodes])),
                "ppo/length": float(np.mean([e.length for e in episodes])),
                "ppo/ended": float(np.mean([e.has_ended for e in episodes]))}

    def answers(self, prompts: Sequence[np.ndarray], key: Sequence[int]) -> list[list[int]]:
        """Ids drawn from the policy, by random numbers of that key."""
        rule = self.config.rollout
        chance_BT = np.random.default_rng(key).random((len(prompts), rule.max_new_tokens))
        return generate(self.model, prompts, max_new_tokens=rule.max_new_tokens,
                        stop_ids=self.stop_ids, temperature=rule.temperature, chance_BT=chance_BT)

    def batches(self, episodes: Sequence[Episode], step: int, epoch: int) -> Iterator[list[Episode]]:
        """The episodes of each update of an epoch."""
        order = np.random.default_rng([self.seed, step, epoch]).permutation(len(episodes))
        for start in range(0, len(order), size := self.config.optim.batch_size):
            yield [episodes[i] for i in order[start : start + size]]

    @torch.no_grad()
    def look(self, episodes: Sequence[Episode]) -> None:
        """What policy, values and reference say of each token, in the streams of an update."""
        documents = [episode.document for episode in episodes]
        limits = {"max_tokens": self.config.loop.micro_batch_tokens, "device": self.device}
        for indices, stream in streams(documents, **limits):
            both = [seen(m, stream, self.config.rollout.temperature)
                    for m in (self.model, self.reference)]
            told = divergences(*both) | {"logp": both[0].logp_M, "ref_logp": both[1].logp_M}
            told["value"] = self.values(both[0])
            parts = torch.stack([*told.values()]).split([episodes[i].length for i in indices], 1)
            for index, part in zip(indices, parts, strict=True):
                episodes[index].told = dict(zip(told, part, strict=True))
            if self.progress.step == 0:
                assert told["exact"].abs().max() == 0, "the reference must be the start"

    def values(self, now: Seen) -> Tensor:
        """values_M: what is expected from each token on; zero without a value head."""
        if self.model.value is None:
            return torch.zeros_like(now.logp_M)
        return self.model.value(now.h_MC.to(now.logp_M.dtype)).squeeze(1)

    def rate(self, episodes: Sequence[Episode]) -> dict[str, float]:
        """Rewards, advantages and returns of each token; returns what is logged of them."""
        ppo, lengths = self.config.ppo, [episode.length for episode in episodes]
        told = {n: torch.cat([e.told[n] for e in episodes]) for n in episodes[0].told}
        scores_B = told["logp"].new_tensor([episode.score for episode in episodes])
        rule = told[ppo.kl], lengths, self.control.kl_coef
        told["reward"] = advantage.token_rewards(scores_B, *rule)
        if ppo.advantage == "gae":
            how = {"gamma": ppo.gamma, "lam": ppo.gae_lambda}
            found_M = advantage.gae(told["reward"], told["value"], lengths, **how)
        else:
            groups, how = [e.group for e in episodes], ppo.advantage == "leave_one_out"
            found_M = advantage.grouped(told["reward"], lengths, groups, leaves_one_out=how)
        told["return"] = found_M + told["value"]
        told["advantage"] = advantage.whitened(found_M) if ppo.whiten else found_M
        for episode, parts in zip(episodes, torch.stack([*told.values()]).split(lengths, 1),
                                  strict=True):
            episode.told = dict(zip(told, parts, strict=True))
        left = told["return"] - told["value"]
        explained = 1 - left.var(correction=0) / told["return"].var(correction=0).clamp(min=1e-12)
        kl = {f"ppo/kl_{name}": float(told[name].mean()) for name in ("exact", "k1", "k3")}
        return {**kl, "ppo/kl": float(told["exact"].sum()) / len(episodes),
                "ppo/kl_coef": self.control.kl_coef, "ppo/explained_variance": float(explained)}

    def loss(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        """The clipped objective of a micro-batch, as (sum, weight)."""
        ppo, now = self.config.ppo, seen(model, batch, self.config.rollout.temperature)
        names = "logp", "value", "advantage", "return"
        old_M, value_M, advantage_M, return_M = (
            torch.cat([self.known[row_id][name] for row_id in batch.row_ids]) for name in names)
        if self.is_first:
            assert torch.equal(now.logp_M, old_M), "the first update must see what was scored"
        weights_M = batch.weights[batch.weights > 0]
        policy_M = policy_loss(now.logp_M, old_M, advantage_M, ppo.clip)
        loss_M = policy_M - ppo.entropy_coef * now.entropy_M
        if self.progress.step < ppo.critic_warmup:
            loss_M = 0.0 * loss_M
        values_M = value_loss(self.values(now), value_M, return_M, ppo.value_clip)
        if model.value is not None:
            loss_M = loss_M + ppo.value_coef * values_M
        with torch.no_grad():
            away_M = now.logp_M - old_M
            told = {"tokens": torch.ones_like(away_M), "policy_loss": policy_M,
                    "value_loss": values_M, "entropy": now.entropy_M,
                    "approx_kl": away_M.exp() - 1 - away_M,
                    "clip_frac": ((away_M.exp() - 1).abs() > ppo.clip).to(away_M)}
            for name, each_M in told.items():
                self.sums[name] += float(each_M.sum())
        return (loss_M * weights_M).sum(), weights_M.sum()

    def judged(self) -> Mapping[str, float]:
        """The mean reward of greedy answers to dev prompts, and how often they beat the start's."""
        scores = self._scores(greedy(self.model, self.tokenizer, [*self.asked.values()],
                                     self.config.rollout.max_new_tokens))
        start = np.array(self.start["scores"])
        wins = (scores > start) + 0.5 * (scores == start)
        low, high = intervals(lambda rows: {"win": wins[rows].mean()}, np.arange(len(wins)))["win"]
        return {"eval/loss": -float(scores.mean()), "eval/reward": float(scores.mean()),
                "eval/win_rate": float(wins.mean()), "eval/win_low": low, "eval/win_high": high}

    def _scores(self, answers: Sequence[str], times: int = 1) -> np.ndarray:
        """Of answers to dev prompts, so many to each in turn; one without a score has the worst."""
        scores, _ = self.rewards([chat for chat in self.asked for _ in range(times)], answers)
        return np.nan_to_num(scores, nan=np.nanmin(scores))

    def _best_of(self) -> dict[str, Any]:
        """Rejection sampling from the start, as far as it gets without training."""
        if not (count := self.config.ppo.best_of):
            return {}
        prompts = [ids for ids in self.asked.values() for _ in range(count)]
        made = self.answers(prompts, [self.seed, len(prompts)])
        texts = [self.tokenizer.decode([i for i in ids if i not in self.stop_ids]) for ids in made]
        scores_BS = self._scores(texts, count).reshape(-1, count)
        best, one = (float(each.mean()) for each in (scores_BS.max(1), scores_BS[:, 0]))
        return {"best_of": count, "best_reward": best, "one_reward": one}

    def show(self, episodes: Sequence[Episode], step: int) -> None:
        """RUN/rollouts.html: answers of this iteration, with all that is known of each token."""
        shown = []
        for episode in episodes:
            ids = episode.document.tokens_T[-episode.length :]
            tokens = [self.tokenizer.decode([id_], special=True) for id_ in ids]
            columns = {name: each.tolist() for name, each in episode.told.items()}
            shown.append({"asked": episode.chat.messages[-2]["content"], "tokens": tokens,
                          "columns": columns, "score": episode.score, "parts": episode.parts})
        page = rendered(PAGE, Path(__file__).parent, episodes=shown, step=step, where=self.path)
        write_file(self.path / PAGE, page)

def copy_of(model: Model) -> Model:
    """A model that does not move: what is trained is copied, what is frozen shared."""
    shared = (t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad)
    return deepcopy(model, {id(tensor): tensor for tensor in shared}).requires_grad_(False)

def loop_of(task: str, data: Prepared, tokenizer: Tokenizer) -> type[Loop] | partial[PpoLoop]:
    """The loop of a task of train.py."""
    if task not in ("ppo", "grpo"):
        return Loop
    return partial(PpoLoop, tokenizer=tokenizer, data=data)
