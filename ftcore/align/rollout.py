"""Rollouts: answers drawn from a policy, scored (rewards.py), and what is known of each token.

Letters: M answer tokens of an episode. An episode is one answer to one prompt, which is a chat
without its last answer. Answers are drawn by random numbers with a key, each from the distribution
that is scored later: softmax(logits / temperature), nothing cut off."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
import numpy as np
from torch import Tensor
from ftcore.align import objective, rewards
from ftcore.config import PpoRun
from ftcore.data.chat import encode_prompt
from ftcore.data.columns import Chat, RowError, place
from ftcore.data.pack import Encoded, answered
from ftcore.data.store import Prepared, rendered
from ftcore.data.tokenizer import Tokenizer
from ftcore.env.compute import derived
from ftcore.errors import ConfigError, DataError
from ftcore.evaluate.evaluator import continued, spoken
from ftcore.files import write_file
from ftcore.model.heads import Model

PAGE, SHOWN = "rollouts.html", 16  # episodes on the page
DRAWN, BEST, ORDER = 11, 12, 13  # what random numbers are for

Prompt = tuple[Chat, np.ndarray]  # a chat whose last answer is to be given anew, and its ids

@dataclass
class Episode:
    document: Encoded  # prompt and answer, of which the answer's tokens count
    length: int  # M
    has_ended: bool  # by a token that ends, not by the limit
    score: float  # in all
    parts: dict[str, float]  # what each reward says
    told: dict[str, Tensor] = field(default_factory=dict)  # of each of its M tokens

class Actor:
    """A policy with all that its answers are made and scored by; `prompts` of training, `judges` of
    the dev rows. ConfigError: an option is missing, or of no use; DataError: as `_prompt`."""

    def __init__(self, model: Model, tokenizer: Tokenizer, config: PpoRun, data: Prepared) -> None:
        ppo, samples = config.ppo, config.rollout.samples
        if not config.rollout.max_new_tokens:
            raise ConfigError("how long may an answer be? Give --rollout.max-new-tokens N (tokens)")
        if ppo.advantage != "gae" and (samples < 2 or ppo.critic_warmup):
            what = f"ppo.advantage = {ppo.advantage} compares answers to one prompt, without values"
            raise ConfigError(f"{what}: --rollout.samples must be 2 or more, --ppo.critic-warmup 0")
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.rewards = rewards.Rewards(config.reward)
        self.prompts = [*map(self._prompt, data.train.chats)]
        self.judges = [*map(self._prompt, data.dev.chats)]

    def _prompt(self, chat: Chat) -> Prompt:
        """Raises DataError: it leaves no room for an answer, or cannot be rendered."""
        most = self.model.spec.max_positions - self.config.rollout.max_new_tokens
        try:
            ids = encode_prompt(chat.messages[:-1], self.tokenizer)
            if len(ids) > most:
                mend = f"--data.max-length {most} --data.over-length drop"
                raise RowError(f"its prompt has {len(ids)} tokens, no room to answer: {mend}")
        except RowError as error:
            raise DataError(f"{place(chat)}: {error}") from error
        return chat, ids

    def episodes(self, prompts: Sequence[Prompt], *key: int, samples: int = 1) -> list[Episode]:
        """Answers, greedy or drawn by the numbers of a key. TrainingError: a reward failed."""
        rule, chance_BT, found = self.config.rollout, None, []
        asked = [prompt for prompt in prompts for _ in range(samples)]
        if key:
            random = np.random.default_rng(derived(self.config.env.seed, *key))
            chance_BT = random.random((len(asked), rule.max_new_tokens))
        answers = continued(self.model, self.tokenizer, [ids for _, ids in asked],
                            rule.max_new_tokens, temperature=rule.temperature, chance_BT=chance_BT)
        texts = [spoken(ids, self.tokenizer) for ids in answers]
        scores, parts = self.rewards([chat for chat, _ in asked], texts)
        for i, ((chat, prompt_ids), ids) in enumerate(zip(asked, answers, strict=True)):
            document = answered(f"{chat.id}:{i}", prompt_ids, ids)
            said = {name: float(each[i]) for name, each in parts.items()}
            has_ended = ids[-1] in self.tokenizer.stop_ids
            found.append(Episode(document, len(ids), has_ended, float(scores[i]), said))
        return found

    def shaped(self, episodes: Sequence[Episode], control: objective.Control) -> dict[str, float]:
        """Take penalties off the scores, scale and bound them; returns what is logged of all."""
        rule, raw = self.config.reward, [episode.score for episode in episodes]
        for e in episodes:
            e.score -= rule.per_token * e.length + rule.missing_end * (not e.has_ended)
        scale = control.deviation([e.score for e in episodes]) if rule.scale else 1.0
        bound = rule.clip or math.inf
        for e in episodes:
            e.score = min(max(e.score / scale, -bound), bound)
        told = {"ppo/reward": raw, "ppo/score": [e.score for e in episodes],
                "ppo/length": [e.length for e in episodes],
                "ppo/ended": [e.has_ended for e in episodes]}
        told |= {f"reward/{name}": [e.parts[name] for e in episodes] for name in episodes[0].parts}
        return {name: float(np.mean(values)) for name, values in told.items()}

    def show(self, episodes: Sequence[Episode], step: int, run: Path) -> None:
        """RUN/rollouts.html: some answers, with all that is known of each of their tokens."""
        page = rendered(PAGE, Path(__file__).parent, episodes=episodes[:SHOWN], step=step,
                        where=run, decode=self.tokenizer.decode)
        write_file(run / PAGE, page)
