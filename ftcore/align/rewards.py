"""Rewards: what an answer is worth, the weighted sum of what one or more sources say of it.

    match                  1 where it is the expected answer, character by character, else 0
    command:FIELD          of JSON commands, the mean of four figures from 0 to 1: it is a JSON
                           object, its FIELD (the intent) is right, F1 of its slots, all is right
    model:RUN              the score of a reward model (train.py reward), by its own tokenizer
    model:RUN=LABEL        log-odds that the answer has a LABEL, by a classifier (train.py classify)
    python:FILE.py:NAME    NAME(rows), a function that returns a number for each row
    program:COMMAND        reads a JSON list of rows from standard input, writes one of numbers

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
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any
import numpy as np
import torch
from ftcore.align.preference import TASKS
from ftcore.cli import known, parse
from ftcore.config import RewardsConfig
from ftcore.data import columns, encode
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import ConfigError, TrainingError
from ftcore.evaluate import evaluator, metrics
from ftcore.tune.adapter import load_artifact

PROGRAM_BYTES = 4 * 2**30  # that a program may take

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

    def __call__(self, chats: Sequence[columns.Chat],
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
    return lambda rows: [metrics.exact_match(row["target"], row["answer"]) for row in rows]

def command(field: str) -> Source:
    figures = itemgetter("json_valid", "intent_accuracy", "slot_f1_of_row", "exact_match_object")
    judge = partial(metrics.judged_command, intent=field)
    return lambda rows: [fmean(figures(judge(row["target"], row["answer"]))) for row in rows]

def model(rest: str) -> Source:
    """By the code that judges the test rows of the run."""
    run, _, label = rest.partition("=")
    asked, task = parse(["--resume", run]), "classify" if label else "reward"
    if asked.task != task:
        raise ConfigError(f"is a run of the task {asked.task}, not {task}")
    loaded = load_artifact(Path(run), kind=TASKS[task], dtype=torch.float32)
    tokenizer, judge = Tokenizer.load(loaded.folder), loaded.model.eval().requires_grad_(False)
    most, problem = asked.config.loop.micro_batch_tokens, asked.config.problem
    place = loaded.labels.index(known("label", label, loaded.labels)) if label else 0

    def scores(rows: Rows) -> list[float]:
        if label:
            texts = [columns.Text(str(n), (row["answer"],), label) for n, row in enumerate(rows)]
            documents = encode.encode(asked.config.data, texts, tokenizer, loaded.labels).documents
        else:
            turns = ((*row["messages"], columns.answer(row["answer"])) for row in rows)
            chats = [columns.Chat(str(n), each) for n, each in enumerate(turns)]
            documents = encode.sides(chats, tokenizer).documents
        with torch.inference_mode():
            score_BK = evaluator.all_logits(judge, documents, most)
        if problem == "single_label_classification":
            score_BK = score_BK.double().softmax(1).logit(1e-12)
        told = dict(zip((d.row_id for d in documents), score_BK[:, place].tolist(), strict=True))
        least = min(told.values())
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
