"""The inference engine: sequences of many requests, that come and go, in one batch.

A turn of its thread:  cancelled jobs leave -> waiting ones join -> one step -> what is to be said

A step is one pass over a flat stream: a token of each sequence that is decoding, and at most
`prefill_tokens` of prompts, in the order they came. A job waits until the cache has room for its
prompt and all of its answer, so none is ever put back. Rows of several adapters and of the base
share a step. Jobs without sampling are answered by one pass, packed, of `prefill_tokens` and more
only where a single one has more.

A step that raises is taken again sequence by sequence, and only those end that raise alone too.
Letters: N tokens of the stream, B documents, M rows of it, V vocabulary, K classes, C model width,
L layers, G key/value heads of width D.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from itertools import chain
from os.path import commonprefix

import torch
from torch import Tensor

from ftcore.deploy.jobs import Finish, Job, Kept, QueueFull, Running, Said, Scores
from ftcore.env.compute import reuse_across_steps
from ftcore.errors import ModelError
from ftcore.model.cache import Cache
from ftcore.model.heads import Model
from ftcore.model.sampling import Token, next_tokens
from ftcore.model.transformer import Linear
from ftcore.tune.lora import layers_with, mixed
from kernels.docs import Docs

LEAST_PREFIX = 16  # tokens; fewer are read again as fast as they are copied
MOST_FAILURES = 3  # steps in a row that nothing gets through
IDLE_SECONDS = 1.0  # between two beats where there is nothing to do

logger = logging.getLogger(__name__)

class Engine:
    """Answers jobs in a thread of its own; other threads submit, cancel, and read its figures.

    adapters            names of those that the model holds and jobs may ask for
    max_sequences       at most so many decode at once
    prefill_tokens      of prompts in a step; fewer keep the gaps between tokens short
    cache_tokens        slots of the cache, rows times the longest, of 2 L G D values each; as many
                        again at most are kept of finished sequences
    max_waiting         jobs that may wait
    threads             of torch, in the engine's thread; None: as many as in the thread that asks
    """

    def __init__(self, model: Model, adapters: Sequence[str] = (), *, max_sequences: int = 64,
                 prefill_tokens: int = 512, cache_tokens: int = 32768, max_waiting: int = 128,
                 threads: int | None = None) -> None:
        layers_with(model, adapters)
        self.model, self.adapters, self.threads = model.eval(), {*adapters, None}, threads
        for module in self.model.modules():
            if type(module) is Linear:
                module.pack()
        self.max_sequences, self.max_waiting = max_sequences, max_waiting
        self.prefill_tokens, self.cache_tokens = prefill_tokens, cache_tokens
        self.cache = Cache(model.spec.num_layers, reads_all=True)
        self.kept = deque[Kept]()
        self.running: list[Running] = []  # in the order they came
        self.waiting, self.cancelled = deque[Job](), deque[Job]()
        self.num_steps = self.errors = self.prefix_queries = self.prefix_hits = self.failures = 0
        self.step_seconds, self.beat, self.is_stopping = 0.0, time.monotonic(), False
        self.news = threading.Event()

    @property
    def num_running(self) -> int:
        """Sequences in the cache."""
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        """Jobs that wait."""
        return len(self.waiting)

    @property
    def cache_used(self) -> float:
        """Share of the cache that is promised."""
        return self._area([one.job for one in [*self.running]]) / self.cache_tokens

    @property
    def is_broken(self) -> bool:
        """Nothing gets through any more."""
        return self.failures >= MOST_FAILURES

    def start(self, deliver: Callable[[Said], None]) -> None:
        """Begin; `deliver` is called once a step, in the engine's thread, with what is said."""
        reuse_across_steps()
        threads = self.threads or torch.get_num_threads()
        self.thread = threading.Thread(target=self._live, args=(deliver, threads), daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> None:
        """Let a job wait for its turn. Raises QueueFull; ModelError: no room can ever be made for
        it, or its adapter is unknown."""
        most = min(self.model.spec.max_positions, self.cache_tokens)
        if not job.ids or job.size > most:
            raise ModelError(f"prompt and answer may have 1 to {most} tokens, not {job.size}")
        if job.adapter not in self.adapters:
            raise ModelError(f"adapter {job.adapter!r} is not loaded")
        if job.sampling and self.model.task != "lm":
            raise ModelError("the model has no language-model head: it cannot answer in tokens")
        if len(self.waiting) >= self.max_waiting:
            raise QueueFull(f"{len(self.waiting)} jobs wait already")
        self.waiting.append(job)
        self.news.set()

    def cancel(self, job: Job) -> None:
        """Let a job leave before the next step; one that is over is left alone."""
        self.cancelled.append(job)
        self.news.set()

    def stop(self) -> None:
        """End the thread after its step; jobs left are told."""
        self.is_stopping = True
        self.news.set()
        self.thread.join()

    @torch.inference_mode()
    def _live(self, deliver: Callable[[Said], None], threads: int) -> None:
        """The thread: torch's settings belong to it alone."""
        torch.set_num_threads(threads)
        while not self.is_stopping:
            self.beat = time.monotonic()
            self.news.clear()
            self._tell(deliver, self.turn())
            if not self.running and not self.waiting:
                self.news.wait(IDLE_SECONDS)
        jobs = [*(one.job for one in self.running), *self.waiting]
        self._tell(deliver, [(job, Finish("error", "shutting_down")) for job in jobs])

    def _tell(self, deliver: Callable[[Said], None], said: Said) -> None:
        try:
            if said:
                deliver(said)
        except Exception:
            self.errors += 1
            logger.exception("what the engine said was not taken")

    def turn(self) -> Said:
        """What the head of this file says."""
        said, start = [], time.monotonic()
        while self.cancelled:
            job = self.cancelled.popleft()
            if job in self.waiting:
                self.waiting.remove(job)
                said.append((job, Finish("cancelled")))
            for one in [one for one in self.running if one.job is job]:
                self._end(one, Finish("cancelled"), said)
        work = [(self._admit(said), self._score), (self._plan(said), self._step)]
        if passed := [self._attempt(items, run, said) for items, run in work if items]:
            self.step_seconds, self.num_steps = time.monotonic() - start, self.num_steps + 1
            self.failures = 0 if any(passed) or self._lives() else self.failures + 1
        return said

    @staticmethod
    def _area(jobs: Sequence[Job]) -> int:
        """Slots that these take: a row each, as long as the longest."""
        return len(jobs) * max((job.size for job in jobs), default=0)

    def _admit(self, said: Said) -> list[Job]:
        """Let jobs join while there is room, in the order they came; returns those without sampling
        that are next."""
        scored: list[Job] = []
        while self.waiting:
            job, jobs = self.waiting[0], [one.job for one in self.running]
            is_full = len(jobs) >= self.max_sequences
            if job.sampling is None:
                if scored and sum(len(j.ids) for j in (*scored, job)) > self.prefill_tokens:
                    break
                scored.append(job)
            elif is_full or jobs and self._area([*jobs, job]) > self.cache_tokens:
                break
            else:
                try:
                    chance_T = job.sampling.chances()
                    self.running.append(Running(job, self.cache.join(), chance_T, [*job.ids]))
                except Exception:
                    self._fail(job, said)
            self.waiting.popleft()
        return scored

    def _plan(self, said: Said) -> list[Running]:
        """Who takes part in the next step, with how many tokens; in the cache's order."""
        budget, ahead = self.prefill_tokens, []
        for one in [*self.running]:
            one.take = int(one.done > 0 and len(one.ids) - one.done == 1)
            if budget and not one.take:
                try:
                    if one.done or self._warm(one, ahead):
                        one.take = min(len(one.ids) - one.done, budget)
                        budget -= one.take
                except Exception:
                    self._fail(one, said)
            ahead.append(one)
        group = [one for one in self.running if one.take]
        return sorted(group, key=lambda one: (not one.done, one.take > 1))

    def _warm(self, one: Running, ahead: Sequence[Running]) -> bool:
        """Copy what others have read of its prompt; False: better wait until one ahead has."""
        whose, most = (one.job.owner, one.job.adapter), len(one.job.ids) - 1
        peers = [Kept((o.job.owner, o.job.adapter), o.ids, o) for o in ahead]
        shared, source = LEAST_PREFIX - 1, None
        for kept in [] if one.job.sampling.prompt_logprobs else (*peers, *self.kept):
            if kept.whose == whose:
                count = min(most, len(commonprefix([one.ids, kept.ids])))
                if count > shared:
                    shared, source = count, kept.tokens
        if isinstance(source, Running):
            if source.done < shared:
                return False
            source = self.cache.read(source.row, shared)
        self.prefix_queries += len(one.ids)
        if source is not None:
            self.cache.write(one.row, [tokens_2GSD[:, :, :shared] for tokens_2GSD in source])
            one.done = one.hit = shared
            self.prefix_hits += shared
        return True

    def _attempt(self, items: list, run: Callable[[list, Said], None], said: Said) -> bool:
        """Run all at once, or where that raises one by one; whether any got through."""
        try:
            run(items, said)
            return True
        except Exception:
            if len(items) == 1:
                self._fail(items[0], said)
                return False
            logger.exception("%d at once did not get through: they go on one by one", len(items))
        return any([self._attempt([item], run, said) for item in items])

    def _fail(self, item: Job | Running, said: Said) -> None:
        """End what has just raised, alone."""
        self.errors += 1
        logger.exception("a job has failed")
        finish = Finish("error", "engine_error")
        if isinstance(item, Running):
            return self._end(item, finish, said)
        return said.append((item, finish))

    def _lives(self) -> bool:
        """Whether a token of the base gets through, where jobs did not."""
        with suppress(Exception):
            self._logits([[0]], [None])
            return True
        return False

    def _logits(self, parts: Sequence[Sequence[int]], adapters: Sequence[str | None],
                rows: Sequence[int] | None = None, asked: Sequence[int] | None = None) -> Tensor:
        """One pass over these tokens, each document by its adapter.

        rows        of the cache that they add to: logits_MV of the stream's tokens that are
                    `asked` for, None: of all. None: whole documents, answered by their scores:
                    logits_BK of a classifier, or embeddings_BC
        """
        model, device = self.model, self.model.device
        docs = Docs.from_lengths([len(part) for part in parts], device)
        tokens_N = torch.tensor([*chain.from_iterable(parts)], device=device)
        types_N = torch.zeros_like(tokens_N)
        with mixed(model, adapters) if len(self.adapters) > 1 else nullcontext():
            if rows is not None:
                rows_M = None if asked is None else torch.tensor(asked, device=device)
                inputs = tokens_N, self.cache.extend(rows, docs), types_N, docs
                return model.head(model.trunk(*inputs, self.cache.attends, rows_M))
            inputs = tokens_N, docs.positions_N(), types_N, docs
            if model.task == "classify":
                return model.head(model.trunk(*inputs, rows_M=model.head.rows(docs)), docs)
            if model.spec.is_causal:
                return model.trunk(*inputs, rows_M=docs.last_B())
            return torch.stack([h.mean(0) for h in model.trunk(*inputs).split(docs.lengths)])

    def _score(self, jobs: list[Job], said: Said) -> None:
        """Answer jobs without sampling."""
        scores_BK = self._logits([job.ids for job in jobs], [job.adapter for job in jobs]).float()
        is_finite = scores_BK.isfinite().all(1).tolist()
        for job, values, ok in zip(jobs, scores_BK.tolist(), is_finite, strict=True):
            if ok:
                said += [(job, Scores(values)), (job, Finish("stop"))]
            else:
                said.append((job, Finish("error", "non_finite_logits")))

    def _step(self, group: list[Running], said: Said) -> None:
        """Read so many tokens of each sequence; those whose prompt is read grow by one. What is
        said, and kept of the sequences, changes only after all that may raise."""
        known, drawing, rows, start = [], [], [], 0  # rows: whose logits are asked for
        for one in group:
            start += one.take
            if one.job.sampling.prompt_logprobs and one.done < len(one.job.ids):
                known.append((one, len(rows)))
                rows += range(start - one.take, start - 1)
            if one.done + one.take == len(one.ids):
                drawing.append((one, len(rows)))
            rows.append(start - 1)
        try:
            logits_MV = self._logits(
                [one.ids[one.done : one.done + one.take] for one in group],
                [one.job.adapter for one in group], [one.row for one in group],
                rows if len(rows) < start else None)
            told = [(one.job, token) for one, first in known
                    for token in one.known_tokens(logits_MV[first : first + one.take])]
            asked = [row for _, row in drawing]
            z_BV = logits_MV if len(asked) == len(rows) else logits_MV[asked]
            tokens = next_tokens(z_BV, [one.draft for one, _ in drawing])
        except Exception:
            for one in group:
                self.cache.lengths[one.row] = one.done
            raise
        said += told
        for one in group:
            one.done += one.take
        for (one, _), token in zip(drawing, tokens, strict=True):
            self._grow(one, token, said)

    def _grow(self, one: Running, token: Token | None, said: Said) -> None:
        """Say a new token; end a sequence that stops, is long enough, or has none."""
        if token is None:
            return self._end(one, Finish("error", "non_finite_logits"), said)
        one.ids.append(token.id)
        said.append((one.job, token))
        if token.id in one.job.sampling.stop_ids:
            return self._end(one, Finish("stop"), said)
        return self._end(one, Finish("length"), said) if len(one.ids) == one.job.size else None

    def _end(self, one: Running, finish: Finish, said: Said) -> None:
        """Free a sequence's place, keeping its tokens for prompts that begin so."""
        self.running.remove(one)
        if finish.reason != "error" and one.done >= LEAST_PREFIX:
            whose, ids = (one.job.owner, one.job.adapter), one.ids[: one.done]
            tokens = [tokens_2GSD.clone() for tokens_2GSD in self.cache.read(one.row, one.done)]
            others = [k for k in self.kept if k.whose != whose or k.ids != ids[: len(k.ids)]]
            self.kept = deque([*others, Kept(whose, ids, tokens)])
            while sum(len(kept.ids) for kept in self.kept) > self.cache_tokens:
                self.kept.popleft()
        self.cache.leave(one.row)
        for other in self.running:
            if other.row == len(self.cache.lengths):
                other.row = one.row
        said.append((one.job, finish._replace(cached_tokens=one.hit)))
