"""The inference engine: sequences of many requests, that come and go, in one batch.

A turn of its thread:  cancelled jobs leave -> waiting ones join -> one step -> what is to be said

A step is one pass over a flat stream: a token of each sequence that is decoding, and at most
`prefill_tokens` of prompts, in the order they came. A job waits until the cache has room for its
prompt and all of its answer, so none is ever put back. Jobs without sampling are answered by one
pass, packed, of `prefill_tokens` and more only where a single one has more.

A step that raises is taken again sequence by sequence, and only those end that raise alone too.
Letters: N tokens of the stream, B documents, K classes, C model width."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from queue import Full as QueueFull
from statistics import fmean
from typing import NamedTuple
import numpy as np
import torch
from ftcore.errors import ModelError
from ftcore.model import generate, heads, transformer
from kernels import attention_cache, attention_prefix, memory
from kernels.docs import Docs, rounded
from kernels.sampling import Draft, Sampling, Token, next_tokens, with_logprobs

MOST_FAILURES = 3  # steps in a row that nothing gets through
READ_ROWS = 64  # of a prompt whose logits exist at once
CANARIES, HOUR = (4, 50), 3600.0  # prompts and their tokens; seconds

logger = logging.getLogger(__name__)

class Finish(NamedTuple):
    """The last thing that is said of a job."""
    reason: str  # "stop" (a stop id), "length", "cancelled", "error"
    code: str = ""  # of an error: "engine_error", "non_finite_logits", "shutting_down"

@dataclass(eq=False)
class Job:
    """One sequence: what is asked, and what came of it. Every token is said, a stop id too."""
    ids: list[int]  # the prompt
    sampling: Sampling | None  # None: one pass, for `scores` or, with a `num_top`, `read`
    listener: object = None  # opaque
    adapter: str | None = None  # whose answer it is, where the model has several; None: the base's
    answer: list[int] = field(default_factory=list)
    # logits of classes, a reward, or an embedding: the mean over an encoder, a decoder's last token
    scores: Sequence[float] = ()
    num_top: int | None = None  # likeliest tokens beside each of the prompt's
    read: Sequence[Token] = ()  # the prompt with log-probabilities, but for its first token
    chance_T: np.ndarray | None = None  # a number for each place of the answer
    owner: object = None  # who alone shares what it leaves for later prompts; told by its repr
    embedding: str = ""  # where its vector points: `sketched`
    cached: int = 0  # tokens of the prompt that were known
    row: int = 0  # of the cache
    done: int = 0  # tokens there
    take: int = 0  # that the next step reads
    is_cancelled: bool = False

    @property
    def size(self) -> int:
        """Tokens that it may come to."""
        return len(self.ids) + (self.sampling.max_new_tokens if self.sampling else 0)

Said = list[tuple[Job, Token | Finish]]

@dataclass(eq=False)
class Engine:
    """Answers jobs in a thread of its own; other threads submit, cancel, and read its figures."""
    model: heads.Model
    max_sequences: int = 64  # that decode at once
    prefill_tokens: int = 512  # of prompts in a step; fewer keep the gaps between tokens short
    cache_tokens: int = 65536  # slots of the cache, rows times the longest
    max_waiting: int = 128  # jobs
    prefix_tokens: int = 0  # of ended sequences, kept for prompts that begin like them
    threads: int = 2  # of torch, in the engine's thread

    def __post_init__(self) -> None:
        transformer.pack_linears(self.model.eval())
        self.cache = attention_cache.Cache(self.model.spec.num_layers, self.model.device)
        if self.model.trunk.routes is not None:
            self.cache.replays = None  # a graph would keep the routes of its first pass
        self.running: list[Job] = []  # in the order they came
        self.waiting: deque[Job] = deque()
        self.prefixes = attention_prefix.Prefixes(self.prefix_tokens)
        self.num_steps = self.errors = self.failures = self.prefix_asked = self.prefix_found = 0
        self.step_seconds, self.beat, self.is_stopping = 0.0, time.monotonic(), False
        self.news, self.canary_at = threading.Event(), 0.0
        self.canaries = {"sha256": "", "nll": None, "flips": 0}  # as /v1/monitor tells it

    @property
    def cache_used(self) -> float:
        """Share of the cache that is promised."""
        return self._area([*self.running]) / self.cache_tokens

    @property
    def is_broken(self) -> bool:
        """Nothing gets through any more."""
        return self.failures >= MOST_FAILURES

    def start(self, deliver: Callable[[Said], None]) -> None:
        """Begin; `deliver` is called once a step, in the engine's thread, with what is said."""
        memory.reuse_across_steps()
        self.thread = threading.Thread(target=self._live, args=(deliver,), daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> None:
        """Let a job wait. Raises QueueFull; ModelError: there is never room, or no LM head."""
        most = min(self.model.spec.max_positions, self.cache_tokens)
        if not job.ids or job.size > most:
            raise ModelError(f"prompt and answer may have 1 to {most} tokens, not {job.size}")
        if job.sampling and self.model.task != "lm":
            raise ModelError("the model has no language-model head: it cannot answer in tokens")
        if len(self.waiting) >= self.max_waiting:
            raise QueueFull(f"{len(self.waiting)} jobs wait already")
        job.is_cancelled = False
        self.waiting.append(job)
        self.news.set()

    def cancel(self, job: Job) -> None:
        """Let a job leave before the next step; one that is over is left alone."""
        job.is_cancelled = True
        self.news.set()

    def stop(self) -> None:
        """End the thread after its step; jobs left are told."""
        self.is_stopping = True
        self.news.set()
        self.thread.join()

    @torch.inference_mode()
    def _live(self, deliver: Callable[[Said], None]) -> None:
        """The thread: torch's settings belong to it alone."""
        torch.set_num_threads(self.threads)
        is_last = False
        while not is_last:
            self.news.clear()
            self.beat, is_last = time.monotonic(), self.is_stopping
            with self._spared("the canaries were not asked"):
                self._ask_canaries()
            left, finish = (*self.running, *self.waiting), Finish("error", "shutting_down")
            said = [(job, finish) for job in left] if is_last else self.turn()
            with self._spared("what the engine said was not taken"):
                if said:
                    deliver(said)
            if not (is_last or self.running or self.waiting):
                self.news.wait(1.0)  # a beat all the same

    @contextmanager
    def _spared(self, failed: str) -> Iterator[None]:
        """What raises here is counted, and ends nothing."""
        try:
            yield
        except Exception:
            self.errors += 1
            logger.exception(failed)

    def _ask_canaries(self) -> None:
        """Once an hour: prompts whose answers keep all bits, unless weights change in memory."""
        if time.monotonic() < self.canary_at:
            return
        self.canary_at = time.monotonic() + HOUR
        ids = np.random.default_rng(0).integers(self.model.spec.vocab_size, size=CANARIES)
        num_top = 1 if self.model.task == "lm" else None  # greedily, at each place
        jobs = [Job(prompt, None, num_top=num_top) for prompt in ids.tolist()]
        self._score(jobs, [])
        now = sha256(repr([(job.scores, job.read) for job in jobs]).encode()).hexdigest()
        self.canaries["sha256"] = first = self.canaries["sha256"] or now
        self.canaries["flips"] += now != first
        told = [t.logprob for job in jobs for t in job.read[1:] if math.isfinite(t.logprob)]
        self.canaries["nll"] = -fmean(told) if told else None

    def turn(self) -> Said:
        """What the head of this file says."""
        said, start = [], time.monotonic()
        for job in (*self.running, *self.waiting):
            if job.is_cancelled:
                self._end(job, Finish("cancelled"), said)
        work = [(self._admit(said), self._score), (self._plan(), self._step)]
        if passed := [self._attempt(jobs, run, said) for jobs, run in work if jobs]:
            self.step_seconds, self.num_steps = time.monotonic() - start, self.num_steps + 1
            is_alive = any(passed) or self._attempt([Job([0], None)], self._score, [])
            self.failures = 0 if is_alive else self.failures + 1
        return said

    @staticmethod
    def _area(jobs: Sequence[Job]) -> int:
        """Slots that these take: a row each, as long as the longest."""
        return len(jobs) * max((job.size for job in jobs), default=0)

    def _admit(self, said: Said) -> list[Job]:
        """Let jobs join in their order while there is room; returns the next without sampling."""
        scored: list[Job] = []
        while self.waiting:
            job, is_full = self.waiting[0], len(self.running) >= self.max_sequences
            if job.sampling is None:
                if scored and sum(len(j.ids) for j in (*scored, job)) > self.prefill_tokens:
                    break
                scored.append(self.waiting.popleft())
            elif is_full or self._area([*self.running, job]) > self.cache_tokens:
                break
            else:
                self._attempt([job], self._join, said)
        return scored

    def _join(self, jobs: list[Job], said: Said) -> None:
        for job in jobs:
            job.chance_T, job.answer, job.done = job.sampling.chances(), [], 0
            job.row = self.cache.join()
            self.running.append(self.waiting.popleft())
            with self._spared("what is known of a prompt was not taken"):
                if tokens := self.prefixes.find(job.owner, job.ids):
                    self.cache.write(job.row, tokens)
                    job.done = self.cache.lengths[job.row]
            self.cache.lengths[job.row] = job.cached = job.done
            self.prefix_asked += len(job.ids)
            self.prefix_found += job.cached

    def _plan(self) -> list[Job]:
        """Who takes part in the next step, with how many tokens; in the cache's order."""
        budget = self.prefill_tokens
        for job in self.running:
            left = len(job.ids) + len(job.answer) - job.done
            is_single = job.done > 0 and left == 1
            job.take = 1 if is_single else min(left, budget)
            budget -= 0 if is_single else job.take
        group = [job for job in self.running if job.take]
        return sorted(group, key=lambda job: (not job.done, job.take > 1, job.row))

    def _attempt(self, jobs: list[Job], run: Callable[[list[Job], Said], None], said: Said) -> bool:
        """Run all at once, or where that raises one by one; whether any got through."""
        try:
            run(jobs, said)
            return True
        except Exception:
            logger.exception("%d at once have failed", len(jobs))
        if len(jobs) > 1:
            return any([self._attempt([job], run, said) for job in jobs])
        self.errors += 1
        self._end(jobs[0], Finish("error", "engine_error"), said)
        return False

    def _route(self, jobs: Sequence[Job], counts: Sequence[int]) -> None:
        """Give each adapter its rows of the next pass, so many of each job."""
        if (routes := self.model.trunk.routes) is None:
            return
        asked = [job.adapter for job, count in zip(jobs, counts, strict=True) for _ in range(count)]
        routes.clear()
        for adapter in {*asked} - {None}:
            rows = [row for row, each in enumerate(asked) if each == adapter]
            rows += rows[:1] * (rounded(len(rows), least=4) - len(rows))  # products of few sizes
            routes[adapter] = torch.tensor(rows, device=self.model.device)

    def _score(self, jobs: list[Job], said: Said) -> None:
        """Answer jobs without sampling."""
        model, device = self.model, self.model.device
        docs = Docs.from_lengths([len(job.ids) for job in jobs], device)
        tokens_N = torch.tensor([id_ for job in jobs for id_ in job.ids], device=device)
        inputs = tokens_N, docs.positions_N(), torch.zeros_like(tokens_N), docs
        self._route(jobs, docs.lengths)
        if model.task == "classify":
            x_BC = model.head.features(model.trunk(*inputs, rows_M=model.head.rows(docs)), docs)
            scores_BK = model.head.last(x_BC)
        elif model.spec.is_causal and all(job.num_top is None for job in jobs):
            x_BC = scores_BK = model.trunk(*inputs, rows_M=docs.last_B())
        else:
            parts = model.trunk(*inputs).split(docs.lengths)
            for job, h_TC in zip(jobs, parts, strict=True):
                job.read = () if job.num_top is None else self._read(job, h_TC)
            x_BC = scores_BK = torch.stack([h_TC[-1] if model.spec.is_causal else h_TC.mean(0)
                                            for h_TC in parts])
        told_of_each = scores_BK.float().tolist(), heads.sketched(x_BC)
        for job, job.scores, job.embedding in zip(jobs, *told_of_each, strict=True):
            told = *job.scores, *(token.logprob for token in job.read[1:])
            is_finite = all(map(math.isfinite, told))
            end = Finish("stop") if is_finite else Finish("error", "non_finite_logits")
            said.append((job, end))

    def _read(self, job: Job, h_TC: torch.Tensor) -> list[Token]:
        ids_T, tokens = torch.tensor(job.ids, device=h_TC.device), [Token(job.ids[0])]
        for ids_M, h_MC in zip(ids_T[1:].split(READ_ROWS), h_TC[:-1].split(READ_ROWS), strict=True):
            counts = dict.fromkeys(range(len(ids_M)), job.num_top)
            self._route([job], [len(ids_M)])
            tokens += with_logprobs(self.model.head(h_MC), ids_M, counts).values()
        return tokens

    def _step(self, jobs: list[Job], said: Said) -> None:
        """Read so many tokens of each; those whose prompt is read grow by one. What is said, and
        kept of the sequences, changes only after all that may raise."""
        parts = [job.ids[job.done : job.done + job.take] or job.answer[-1:] for job in jobs]
        drawing = [job for job in jobs if job.done + job.take >= len(job.ids)]
        try:
            self._route(jobs, [job.take for job in jobs])
            h_BC = generate.advanced(self.model, self.cache, [job.row for job in jobs], parts)
            if len(drawing) < len(jobs):
                h_BC = h_BC[[b for b, job in enumerate(jobs) if job in drawing]]
            drafts = [Draft(job.sampling, job.ids, job.answer, job.chance_T) for job in drawing]
            self._route(drawing, [1] * len(drawing))  # of a head that is adapted too
            tokens = next_tokens(self.model.head(h_BC), drafts)
        except Exception:
            for job in jobs:
                self.cache.lengths[job.row] = job.done
            raise
        if new := [b for b, job in enumerate(drawing) if not job.answer]:
            for b, told in zip(new, heads.sketched(h_BC[new]), strict=True):
                drawing[b].embedding = told
        for job in jobs:
            job.done += job.take
        for job, token in zip(drawing, tokens, strict=True):
            if token is None:
                self._end(job, Finish("error", "non_finite_logits"), said)
                continue
            job.answer.append(token.id)
            said.append((job, token))
            if token.id in job.sampling.stop_ids:
                self._end(job, Finish("stop"), said)
            elif len(job.answer) == job.sampling.max_new_tokens:
                self._end(job, Finish("length"), said)

    def _end(self, job: Job, finish: Finish, said: Said) -> None:
        """Say so, and free its place in the queue or the cache."""
        if job in self.waiting:
            self.waiting.remove(job)
        elif job in self.running:
            with self._spared("a sequence was not kept for later prompts"):
                if finish.reason != "error":
                    known = (job.ids + job.answer)[: job.done]
                    self.prefixes.keep(job.owner, known, self.cache, job.row)
            self.running.remove(job)
            self.cache.leave(job.row)
            for other in self.running:
                if other.row == len(self.cache.lengths):
                    other.row = job.row
        said.append((job, finish))
