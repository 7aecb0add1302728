"""A task in a TOML file: prompts made from rows, and a model that answers or chooses.

    data = ["test.jsonl"]               files, in any format of train.py
    prompt = "{{question}}\\nAnswer:"    Jinja over the columns of a row
    target = "{{answer}}"               the answer; of choices the text of one, or its place from 0
    choices = ["{{a}}", "{{b}}"]        the likeliest is taken; or the name of a column of lists
    shots = 2                           rows of `shots_from` before each prompt, with their answers
    shots_from = ["train.jsonl"]
    chat = true                         a prompt is a user's turn, in the model's own template
    max_new_tokens = 64
    stop = ["\\n\\n"]                     texts that end an answer, and are not part of it

The first three are needed. Answers are greedy. The model is ours or, by its URL, of a server with
OpenAI's API, its key in OPENAI_API_KEY; a choice there needs `echo` and `logprobs`.
"""

import json
import os
import tomllib
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tqdm import tqdm

from ftcore.data.chat import encode_prompt, shifted
from ftcore.data.read import Row, read_rows
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import ConfigError, DataError, nearest
from ftcore.evaluate.evaluator import Judged, answered, greedy, require_finite, streams
from ftcore.model.heads import Model
from ftcore.tune.task import hidden

TIMEOUT, AT_ONCE = 600, 8  # seconds for an answer of a server; requests in flight

@dataclass(frozen=True)
class EvalTask:
    """What a task's file says."""
    data: Sequence[str]
    prompt: str
    target: str
    choices: Sequence[str] | str = ()
    shots: int = 0
    shots_from: Sequence[str] = ()
    chat: bool = False
    max_new_tokens: int = 64
    stop: Sequence[str] = ()

    @classmethod
    def load(cls, path: Path) -> "EvalTask":
        """Raises ConfigError: no such file, an unknown key, or one that is missing."""
        try:
            values = tomllib.loads(path.read_text("utf-8"))
            if odd := [key for key in values if key not in (known := cls.__dataclass_fields__)]:
                raise ValueError(f"unknown key {odd[0]!r}{nearest(odd[0], [*known])}")
            if isinstance(values.get("data"), str):
                raise ValueError("data must be a list of files")
            if values.get("chat") and values.get("choices"):
                raise ValueError("choices continue a text, chat asks for an answer: leave one out")
            return cls(**values)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{path}: {error}") from error

@dataclass(frozen=True)
class Local:
    """A model in this process; in `pairs` the second text continues the first."""
    model: Model
    tokenizer: Tokenizer
    limits: dict[str, Any]  # of `streams`

    def answers(self, prompts: Sequence[str], task: EvalTask) -> list[str]:
        turns = ([{"role": "user", "content": prompt}] for prompt in prompts)
        ids = [encode_prompt(turn, self.tokenizer) for turn in turns] if task.chat else [
            encoding.ids_T for encoding in self.tokenizer.encode_batch(prompts)]  # fmt: skip
        return greedy(self.model, self.tokenizer, ids, task.max_new_tokens)

    @torch.inference_mode()
    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Choices that differ in their last token alone are read off one document."""
        encodings = [*self.tokenizer.encode_batch([prompt + text for prompt, text in pairs])]
        groups: dict[tuple[bytes, bytes], list[int]] = {}
        counted, sums = [], np.zeros(len(pairs))
        for number, ((prompt, _), encoding) in enumerate(zip(pairs, encodings, strict=True)):
            counted.append(encoding.offsets_T2[:, 1] > len(prompt.rstrip()))
            counted[-1][:1] = False  # nothing stands before it
            key = counted[-1].tobytes(), encoding.ids_T[:-1].tobytes()
            groups.setdefault(key, []).append(number)
        owners, ids = [*groups.values()], [encoding.ids_T for encoding in encodings]
        documents = [shifted(str(n), ids[n], np.float32(counted[n])) for n, *_ in owners]
        for indices, batch in streams(documents, **self.limits):
            h_MC = hidden(self.model, batch, batch.weights.nonzero().squeeze(1))
            sizes = [counted[owners[index][0]].sum() for index in indices]
            for index, h_TC in zip(indices, h_MC.split(sizes), strict=True):
                log_p_TV = self.model.head(h_TC).float().log_softmax(-1).cpu()
                for n in owners[index]:
                    own_T = torch.from_numpy(ids[n][counted[n]]).long()
                    sums[n] = log_p_TV.gather(1, own_T[:, None]).sum().item()
        require_finite(documents, [sums[n] for n, *_ in owners])
        return sums.tolist()

@dataclass(frozen=True)
class Remote:
    """A model behind a URL that ends in /v1, by its name there."""
    url: str
    name: str

    def answers(self, prompts: Sequence[str], task: EvalTask) -> list[str]:
        more = {"max_tokens": task.max_new_tokens} | ({"stop": task.stop} if task.stop else {})
        if not task.chat:
            told = self._asked("completions", [{"prompt": p, **more} for p in prompts])
            return [each["text"] for each in told]
        turns = ([{"role": "user", "content": prompt}] for prompt in prompts)
        told = self._asked("chat/completions", [{"messages": turn, **more} for turn in turns])
        return [each["message"]["content"] for each in told]

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        more = {"max_tokens": 1, "echo": True, "logprobs": 1}
        told = self._asked("completions", [{"prompt": p + text, **more} for p, text in pairs])
        sums = []
        for (prompt, text), each in zip(pairs, told, strict=True):
            if not (found := each.get("logprobs")):
                raise DataError(f"{self.url}: gives no logprobs of a prompt (echo), so no choices")
            ends = [*found["text_offset"][1:], None]
            inside = range(len(prompt.rstrip()) + 1, len(prompt + text) + 1)
            both = zip(ends, found["token_logprobs"], strict=True)
            sums.append(sum(logprob for end, logprob in both if end in inside and logprob))
        return sums

    def _asked(self, route: str, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The first choice of each answer. Raises DataError: the server gives none."""

        def one(body: dict[str, Any]) -> dict[str, Any]:
            words = json.dumps({"model": self.name, "temperature": 0, **body}).encode()
            request = urllib.request.Request(f"{self.url}/{route}", words)
            request.add_header("Content-Type", "application/json")
            request.add_header("Authorization", f"Bearer {os.environ.get('OPENAI_API_KEY', '')}")
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                    return json.load(answer)["choices"][0]
            except (OSError, ValueError, LookupError) as error:
                said = error.read(300).decode(errors="replace") if hasattr(error, "read") else ""
                what = f"{self.url}/{route}: {error} {said}"
                raise DataError(f"{what}; is the server up, and is its URL with /v1?") from error

        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(tqdm(pool.map(one, bodies), total=len(bodies), unit="row", disable=None))

def judge_task(task: EvalTask, answerer: Local | Remote) -> tuple[Judged, dict[str, str]]:
    """The figures, and what is asked by row id. Raises DataError: a file or row is of no use."""
    rows, lead = read_rows(task.data), ""
    for row in read_rows(task.shots_from)[: task.shots] if task.shots else ():
        lead += f"{written(task.prompt, row)}{_expected(task, row)[0]}\n\n"
    asked, told = {row.id: written(task.prompt, row) for row in rows}, []
    choices_B = []
    for row in rows:
        target, choices = _expected(task, row)
        told.append({"row_id": row.id, "prompt": lead + asked[row.id], "target": target})
        choices_B.append(choices)
    if task.choices:
        return _judge_choices(told, choices_B, answerer), asked
    answers = answerer.answers([each["prompt"] for each in told], task)
    for each, answer in zip(told, answers, strict=True):
        each["predicted"] = cut(answer, task.stop)
    return answered(told), asked

def _judge_choices(told: list[dict[str, Any]], choices_B: list[list[str]],
                   answerer: Local | Remote) -> Judged:
    """By the likeliest choice, and by the likeliest for each of its bytes."""
    both = zip(told, choices_B, strict=True)
    pairs = [(each["prompt"], choice) for each, choices in both for choice in choices]
    scores, right = iter(answerer.log_likelihoods(pairs)), []
    for each, choices in zip(told, choices_B, strict=True):
        own = {choice: next(scores) for choice in choices}
        best = max(own, key=own.__getitem__)
        dense = max(own, key=lambda choice: own[choice] / max(len(choice.encode()), 1))
        right.append([best == each["target"], dense == each["target"]])
        each |= {"predicted": best, "log_likelihoods": [*own.values()]}
    right_B2 = np.array(right)

    def figures(rows_M: np.ndarray) -> dict[str, float]:
        shares = right_B2[rows_M].mean(0).tolist()
        return dict(zip(("accuracy", "accuracy_by_byte"), shares, strict=True))

    return Judged([each["row_id"] for each in told], figures, told, right_B=right_B2[:, 0])

def _expected(task: EvalTask, row: Row) -> tuple[str, list[str]]:
    """What is expected of a row, and its choices."""
    target, listed, where = written(task.target, row), task.choices, f"{row.file}:{row.line}"
    if not listed:
        return target, []
    by_name = isinstance(listed, str)
    choices = row.fields.get(listed) if by_name else [written(each, row) for each in listed]
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(f"{where}: {listed!r} must give two choices or more")
    choices = [*map(str, choices)]
    named = [choice for choice in choices if choice.strip() == target.strip()]
    if not named and target.isdecimal() and int(target) < len(choices):
        named = [choices[int(target)]]
    if not named:
        raise DataError(f"{where}: target {target!r} is none of {choices}")
    return named[0], choices

def written(template: str, row: Row) -> str:
    """A template over the columns of a row. Raises DataError: it names one that is not there."""
    try:
        return _compiled(template).render(row.fields)
    except (jinja2.TemplateError, TypeError) as error:
        columns = ", ".join(row.fields)
        raise DataError(f"{row.file}:{row.line}: {error}; its columns are {columns}") from error

def cut(answer: str, stop: Sequence[str]) -> str:
    """The answer before the first of the texts that end it."""
    ends = [place for text in stop if (place := answer.find(text)) >= 0]
    return answer[: min(ends, default=len(answer))]

@cache
def _compiled(template: str) -> jinja2.Template:
    options = {"undefined": jinja2.StrictUndefined, "keep_trailing_newline": True}
    return ImmutableSandboxedEnvironment(**options).from_string(template)
