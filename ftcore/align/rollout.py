"""Rollouts: answers drawn from a policy, what they are worth, and what is known of each token.

Letters: M answer tokens of an episode. An episode is one answer to one prompt, which is a chat
without its last answer. Answers are drawn by random numbers with a key, each from the distribution
that is scored later: softmax(logits / temperature), nothing cut off."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ftcore.align.objective import Control
from ftcore.align.rewards import Rewards
from ftcore.config import PpoRun
from ftcore.data.chat import encode_prompt, shifted
from ftcore.data.columns import Chat, RowError, place
from ftcore.data.pack import Encoded
from ftcore.data.store import Prepared, rendered
from ftcore.data.tokenizer import Tokenizer
from ftcore.env.compute import derived
from ftcore.errors import ConfigError, DataError
from ftcore.evaluate.evaluator import continued, greedy, spoken, stops
from ftcore.files import write_file
from ftcore.model.heads import Model

PAGE, SHOWN = "rollouts.html", 16  # episodes on the page
DRAWN, ORDER = 11, 13  # what random numbers are for

class Prompt(NamedTuple):
    """A chat whose last answer is to be given anew."""
    chat: Chat
    ids: np.ndarray

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
    the dev rows. ConfigError: an option is missing, or of no use; DataError: as `_prompts`."""

    def __init__(self, model: Model, tokenizer: Tokenizer, config: PpoRun, data: Prepared) -> None:
        ppo, samples = config.ppo, config.rollout.samples
        if not config.rollout.max_new_tokens:
            raise ConfigError("how long may an answer be? Give --rollout.max-new-tokens N (tokens)")
        if ppo.advantage != "gae" and (samples < 2 or ppo.critic_warmup):
            what = f"ppo.advantage = {ppo.advantage} compares answers to one prompt, without values"
            raise ConfigError(f"{what}: --rollout.samples must be 2 or more, --ppo.critic-warmup 0")
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.rewards = Rewards(config.reward)
        self.prompts = self._prompts(data.train.chats)
        self.judges = self._prompts(data.dev.chats)

    def _prompts(self, chats: Sequence[Chat]) -> list[Prompt]:
        """Raises DataError: one leaves no room for an answer, or cannot be rendered."""
        found, most = [], self.model.spec.max_positions - self.config.rollout.max_new_tokens
        for chat in chats:
            try:
                ids = encode_prompt(chat.messages[:-1], self.tokenizer)
                if len(ids) > most:
                    mend = f"--data.max-length {most} --data.over-length drop"
                    raise RowError(f"its prompt has {len(ids)} tokens, no room to answer: {mend}")
            except RowError as error:
                raise DataError(f"{place(chat)}: {error}") from error
            found.append(Prompt(chat, ids))
        return found

    def drawn(self, prompts: Sequence[Prompt], seed: int) -> list[list[int]]:
        rule = self.config.rollout
        chance_BT = np.random.default_rng(seed).random((len(prompts), rule.max_new_tokens))
        return continued(self.model, self.tokenizer, [prompt.ids for prompt in prompts],
                         rule.max_new_tokens, temperature=rule.temperature, chance_BT=chance_BT)

    def episodes(self, prompts: Sequence[Prompt], step: int) -> list[Episode]:
        """Answers to each, with their scores. Raises TrainingError: a reward failed."""
        asked = [prompt for prompt in prompts for _ in range(self.config.rollout.samples)]
        ends, found = stops(self.tokenizer), []
        answers = self.drawn(asked, derived(self.config.env.seed, DRAWN, step))
        texts = [spoken(ids, self.tokenizer) for ids in answers]
        scores, parts = self.rewards([prompt.chat for prompt in asked], texts)
        for i, ((chat, prompt_ids), ids) in enumerate(zip(asked, answers, strict=True)):
            counts_T = np.repeat(np.float32([0, 1]), [len(prompt_ids), len(ids)])
            tokens_T = np.concatenate([prompt_ids, np.int32(ids)])
            document = shifted(f"{chat.id}:{i}", tokens_T, counts_T)
            said = {name: float(each[i]) for name, each in parts.items()}
            found.append(Episode(document, len(ids), ids[-1] in ends, float(scores[i]), said))
        return found

    def shaped(self, episodes: Sequence[Episode], control: Control) -> dict[str, float]:
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

    def likeliest(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Scores of the greedy answers."""
        ids, most = [prompt.ids for prompt in prompts], self.config.rollout.max_new_tokens
        answers = greedy(self.model, self.tokenizer, ids, most)
        return self.rewards([prompt.chat for prompt in prompts], answers)[0]

    def show(self, episodes: Sequence[Episode], step: int, run: Path) -> None:
        """RUN/rollouts.html: some answers, with all that is known of each of their tokens."""
        shown = []
        for e in episodes[:SHOWN]:
            tokens = [self.tokenizer.decode([i], special=True) for i in e.document.tokens_T]
            columns = {name: each.tolist() for name, each in e.told.items()}
            shown.append({"prompt": "".join(tokens[: -e.length]), "tokens": tokens[-e.length :],
                          "columns": columns, "score": e.score, "parts": e.parts})
        page = rendered(PAGE, Path(__file__).parent, episodes=shown, step=step, where=run)
        write_file(run / PAGE, page)
