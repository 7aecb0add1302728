"""Rollouts: answers drawn from a policy, what they are worth, and what is known of each token.

Letters: M answer tokens of an episode. An episode is one answer to one prompt, which is a chat
without its last answer. Answers are drawn by random numbers with a key, each from the distribution
that is scored later: softmax(logits / temperature), nothing cut off.

An answer is worth the weighted sum of what one or more sources say of it:

    match                  1 where it is the expected answer, character by character, else 0
    command:FIELD          of JSON commands, the mean of four figures from 0 to 1: it is a JSON
                           object, its FIELD (the intent) is right, F1 of its slots, all is right
    model:RUN              the score of a reward model (train.py reward), by its own tokenizer
    python:FILE.py:NAME    NAME(rows), a function that returns a number for each row
    program:COMMAND        reads the rows, a JSON list, from standard input, writes a list of numbers

A row is {"messages": [{"role", "content"}, ...], "answer": ..., "target": the expected answer}. A
source that takes longer than --reward.seconds ends the run, as one that fails does."""

import json
import math
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ftcore.align.objective import Control
from ftcore.align.preference import TASKS
from ftcore.cli import known, parse
from ftcore.config import PpoRun, RewardsConfig
from ftcore.data.chat import encode_prompt
from ftcore.data.columns import Chat, RowError, answer, place
from ftcore.data.encode import sides
from ftcore.data.pack import Encoded, answered
from ftcore.data.store import Prepared, rendered
from ftcore.data.tokenizer import Tokenizer
from ftcore.env.compute import derived
from ftcore.errors import ConfigError, DataError, TrainingError
from ftcore.evaluate.evaluator import all_logits, continued, spoken
from ftcore.evaluate.metrics import exact_match, judged_command
from ftcore.files import write_file
from ftcore.model.heads import Model
from ftcore.tune.adapter import load_artifact

PAGE, SHOWN = "rollouts.html", 16  # episodes on the page
PROGRAM_BYTES = 4 * 2**30  # that a program which scores may take
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
            found.append((chat, ids))
        return found

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

    def show(self, episodes: Sequence[Episode], step: int, run: Path) -> None:
        """RUN/rollouts.html: some answers, with all that is known of each of their tokens."""
        columns = [{n: x_M.tolist() for n, x_M in e.told.items()} for e in episodes[:SHOWN]]
        shown = {"episodes": [*zip(episodes, columns, strict=False)], "step": step, "where": run}
        page = rendered(PAGE, Path(__file__).parent, **shown, decode=self.tokenizer.decode)
        write_file(run / PAGE, page)

Rows = Sequence[Mapping[str, Any]]
Source = Callable[[Rows], Sequence[float]]

class Rewards:
    """The sources of a run, opened. Raises ConfigError: one cannot be."""

    def __init__(self, config: RewardsConfig) -> None:
        if not config.sources:
            kinds = ", ".join(KINDS)
            raise ConfigError(f"nothing says what an answer is worth: --reward.sources {{{kinds}}}")
        if twice := {name for name in config.sources if config.sources.count(name) > 1}:
            raise ConfigError(f"reward.sources names {', '.join(sorted(twice))} twice: weigh it")
        weights = config.weights or (1.0,) * len(config.sources)
        if len(weights) != len(config.sources):
            raise ConfigError(f"reward.weights = {config.weights}: must be one for each source")
        self.weights = dict(zip(config.sources, weights, strict=True))
        self.sources = {name: opened(name) for name in config.sources}
        self.seconds = config.seconds

    def __call__(self, chats: Sequence[Chat],
                 answers: Sequence[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores of answers to the last turns, in all and by source. TrainingError: one failed."""
        rows = []
        for chat, said in zip(chats, answers, strict=True):
            *asked, last = ({"role": m["role"], "content": m["content"]} for m in chat.messages)
            rows.append({"messages": asked, "answer": said, "target": last["content"]})
        parts = {name: self._said(name, source, rows) for name, source in self.sources.items()}
        return sum(self.weights[name] * part for name, part in parts.items()), parts

    def _said(self, name: str, source: Source, rows: Rows) -> np.ndarray:
        try:
            with limited(self.seconds):
                scores = [*map(float, islice(source(rows), len(rows) + 1))]  # it may never end
            if len(scores) != len(rows):
                raise ValueError(f"not one number for each of {len(rows)} answers")
            if odd := [row for row, x in zip(rows, scores, strict=True) if not math.isfinite(x)]:
                raise ValueError(f"not finite for the answer {odd[0]['answer'][:200]!r}")
        except (Exception, SystemExit) as error:  # whatever a function of the user's raises
            what = f"reward {name}: {type(error).__name__}: {error}"
            raise TrainingError(f"{what}: mend it, then resume") from error
        return np.array(scores)

@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer, and each second again where that is caught there."""
    def late(*_: Any) -> None:
        raise TimeoutError(f"takes longer than {seconds:g} s (--reward.seconds)")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

def opened(name: str) -> Source:
    kind, _, rest = name.partition(":")
    kind = known("reward.sources", kind, KINDS)
    try:
        return KINDS[kind](rest)
    except Exception as error:  # whatever a file of the user's raises when it is read
        raise ConfigError(f"reward.sources: {name}: {error}") from error

def match(rest: str) -> Source:
    return lambda rows: [exact_match(row["target"], row["answer"]) for row in rows]

def command(field: str) -> Source:
    figures = "json_valid", "intent_accuracy", "slot_f1_of_row", "exact_match_object"

    def score(row: Mapping[str, Any]) -> float:
        said = judged_command(row["target"], row["answer"], intent=field)
        return sum(said[name] for name in figures) / len(figures)

    return lambda rows: map(score, rows)

def model(run: str) -> Source:
    """By the code that judges the test rows of the run."""
    asked = parse(["--resume", run])
    if asked.task != "reward":
        raise ConfigError(f"is a run of the task {asked.task}, not reward")
    loaded = load_artifact(Path(run), kind=TASKS["reward"], dtype=torch.float32)
    tokenizer, judge = Tokenizer.load(loaded.folder), loaded.model.eval().requires_grad_(False)
    most = asked.config.loop.micro_batch_tokens

    def scores(rows: Rows) -> list[float]:
        turns = ((*row["messages"], answer(row["answer"])) for row in rows)
        chats = [Chat(str(n), each) for n, each in enumerate(turns)]
        documents = sides(chats, tokenizer).documents
        with torch.inference_mode():
            score_B = all_logits(judge, documents, most)[:, 0].tolist()
        told = dict(zip((d.row_id for d in documents), score_B, strict=True))
        least = min(score_B)
        return [told.get(str(n), least) for n in range(len(rows))]  # the least: it holds nothing

    return scores

def python(rest: str) -> Source:
    file, _, name = rest.rpartition(":")
    found = runpy.run_path(file) if file else {}
    if name not in found:
        raise ConfigError("holds no such function: write python:FILE.py:NAME")
    return found[name]

def program(rest: str) -> Source:
    """A process of its own for each iteration, which may take PROGRAM_BYTES."""
    words = shlex.split(rest)
    if not (words and shutil.which(words[0])):
        raise ConfigError("is no command that can be run: write program:COMMAND")
    limit = partial(resource.setrlimit, resource.RLIMIT_AS, (PROGRAM_BYTES, PROGRAM_BYTES))

    def scores(rows: Rows) -> list[float]:
        done = subprocess.run(words, input=json.dumps(rows), capture_output=True, text=True,
                              check=False, preexec_fn=limit)
        if done.returncode:
            raise ValueError(f"ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        return json.loads(done.stdout)

    return scores

KINDS = {kind.__name__: kind for kind in (match, command, model, python, program)}
