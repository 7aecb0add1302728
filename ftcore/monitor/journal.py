"""What a server noted: the records of its requests, joined with what was said of them later.

    reference.jsonl     in a run and its bundle: records of dev rows, what requests should be like
    FILE, FILE.TIME     the log of serve.py, and what was put aside of it

A record is a dict of figures of one text (deploy/records.py); of a request it has an `id`,
"REQUEST:INDEX", and its `time`. `wanted` is what the answer should have been, and `right` whether
it was, where that is known. What cannot be used is counted, and the rest is kept."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ftcore.data.chat import encode_prompt
from ftcore.data.encode import Split
from ftcore.data.pack import answered
from ftcore.deploy import records
from ftcore.deploy.records import REFERENCE, Record
from ftcore.errors import DataError, ModelError
from ftcore.evaluate import evaluator, metrics
from ftcore.evaluate.suite import Suite
from ftcore.model.heads import Model

MOST_ROWS = 2000  # of a reference
DRAWN = ("generation_tokens", "reason", "logprob", "repeated")  # these depend on the temperature

class Journal(NamedTuple):
    records: list[Record]  # in the order of the log
    counts: Counter[str]  # of what could not be used

    def told(self) -> str:
        return ", ".join(f"{count} {what}" for what, count in self.counts.items() if count)

def read_journal(file: Path, model: str = "") -> Journal:
    """What a log holds, and what was put aside of it; `model`: of that one alone. DRAWN are left
    out of a drawn answer, as the reference is greedy. Raises DataError: it is not there."""
    if not file.is_file():
        raise DataError(f"{file}: there is no such log; serve.py writes one with --log {file}")
    parts = (*sorted(file.parent.glob(f"{file.name}.[0-9]*")), file)
    records, counts, latest = {}, Counter(), 0.0
    for text in (text for part in parts for text in part.read_bytes().splitlines()):
        try:
            line = json.loads(text)
            counts["clock went back"] += line["time"] < latest
            latest = max(latest, line["time"])
            if "feedback" in line:
                _join(records, counts, **line["feedback"])
            rows, is_other = line.get("rows", ()), model not in ("", line.get("model"))
            counts["of another model"] += is_other * len(rows)
            for index, row in enumerate(() if is_other else rows):
                left = DRAWN if row.get("temperature") else ()
                record = {key: value for key, value in row.items() if key not in left}
                record |= {"id": f"{line['id']}:{index}", "time": line["time"]}
                records[record["id"]] = record
        except (ValueError, TypeError, KeyError):
            counts["damaged lines"] += 1
    return Journal([*records.values()], counts)

def _join(records: Mapping[str, Record], counts: Counter[str], request_id: str, index: int,
          label: str = "", text: str = "") -> None:
    record = records.get(f"{request_id}:{index}")
    if record is None or "wanted" in record:
        counts["feedback given twice" if record else "feedback for unknown ids"] += 1
        return
    record["wanted"] = label or text
    if (given := record.get("label" if label else "answer")) is not None:
        record["right"] = given == record["wanted"]

def read_reference(folder: Path) -> list[Record]:
    """Of a run or bundle. Raises ModelError: it has none."""
    if not (file := folder / REFERENCE).is_file():
        what = f"{folder}: has no {REFERENCE}, which training makes of dev rows"
        raise ModelError(f"{what}: train with --data.dev FILE or --data.holdout N, and bundle anew")
    return [*map(json.loads, file.read_bytes().splitlines())]

@torch.inference_mode()
def reference(model: Model, split: Split, suite: Suite) -> list[Record]:
    """Records of dev rows that have one class each, or were answered, greedily; else none."""
    documents, chats = split.documents[:MOST_ROWS], split.chats[:MOST_ROWS]
    tokenizer, config = suite.tokenizer, suite.config
    max_tokens = config.loop.micro_batch_tokens
    model.eval()
    if config.problem == "single_label_classification" and documents:
        asked = [document.tokens_T for document in documents]
        target_B = np.array([document.labels for document in documents])
        logits_BK = evaluator.all_logits(model, documents, max_tokens).double().numpy()
        logits_BK /= metrics.temperature(target_B, logits_BK)  # as the server does
        told = [records.class_figures(p_K, suite.labels)
                for p_K in records.probabilities(logits_BK, config.problem)]
        right_B = logits_BK.argmax(1) == target_B
    elif model.task == "lm" and chats:
        asked = [encode_prompt(chat.messages[:-1], tokenizer) for chat in chats]
        answers = evaluator.continued(model, tokenizer, asked, config.eval.max_new_tokens)
        both = [answered("", *each) for each in zip(asked, answers, strict=True)]
        nll_B, count_B = evaluator.scored_tokens(model, both, max_tokens).T
        ends, logprobs = tokenizer.stop_ids, (-nll_B / count_B).tolist()
        told = [records.answer_figures(answer, logprob, "stop" if answer[-1] in ends else "length")
                for answer, logprob in zip(answers, logprobs, strict=True)]
        right_B = [evaluator.spoken(answer, tokenizer) == chat.messages[-1]["content"]
                   for answer, chat in zip(answers, chats, strict=True)]
    else:
        return []
    return [records.prompt_figures(ids_T.tolist(), tokenizer) | row | {"right": bool(is_right)}
            for ids_T, row, is_right in zip(asked, told, right_B, strict=True)]
