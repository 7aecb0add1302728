"""What is asked of the engine, what it says, and what it knows of a sequence."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ftcore.model.sampling import Draft, Sampling, Token, with_logprobs

class QueueFull(RuntimeError):
    """As many jobs wait as may."""

class Scores(NamedTuple):
    """The answer to a job without sampling: logits of classes, a reward, or an embedding: the mean
    over the tokens of an encoder, the last token of a decoder."""
    values: list[float]

class Finish(NamedTuple):
    """The last thing that is said of a job."""
    reason: str  # "stop" (a stop id), "length", "cancelled", "error"
    code: str = ""  # of an error: "engine_error", "non_finite_logits", "shutting_down"
    cached_tokens: int = 0  # of the prompt, found in the prefix cache

@dataclass(eq=False)
class Job:
    """One sequence: what is asked. Of its tokens every one is said, a stop id too; where the
    prompt's log-probabilities are asked for, those of the prompt before."""
    ids: list[int]  # the prompt
    sampling: Sampling | None  # None: one pass, answered by Scores, then Finish("stop")
    adapter: str | None = None  # name of a loaded one; None: the base
    owner: str = ""  # whose prefix cache it may use
    listener: object = None  # opaque

    @property
    def size(self) -> int:
        """Tokens that it may come to."""
        return len(self.ids) + (self.sampling.max_new_tokens if self.sampling else 0)

Said = list[tuple[Job, Token | Scores | Finish]]

@dataclass(eq=False)
class Running:
    """A sequence in the cache."""
    job: Job
    row: int  # of the cache
    chance_T: np.ndarray  # a number for each place of the answer
    ids: list[int]  # prompt and answer
    done: int = 0  # tokens in the cache
    hit: int = 0  # of those, found there
    take: int = 0  # tokens that the next step reads

    @property
    def draft(self) -> Draft:
        """What its next token is drawn by."""
        count = len(self.job.ids)
        return Draft(self.job.sampling, self.job.ids, self.ids[count:], self.chance_T)

    def known_tokens(self, logits_TV: Tensor) -> list[Token]:
        """Tokens of the prompt, by the logits of those that are read; the first has none before."""
        ids = self.job.ids[self.done + 1 : self.done + self.take + 1]
        ids_T = torch.tensor(ids, dtype=torch.long, device=logits_TV.device)
        tops = [self.job.sampling.num_top or 0] * len(ids)
        first = [] if self.done else [Token(self.ids[0])]
        return first + with_logprobs(logits_TV[: len(ids)], ids_T, tops)

class Kept(NamedTuple):
    """What another prompt may begin with."""
    whose: tuple[str, str | None]  # owner and adapter
    ids: list[int]
    tokens: list[Tensor] | Running  # as Cache.read gives them, or who has them in the cache
