"""What a server noted in its log: the records of its requests, joined with what was said of them
later; and the reference that training leaves, records of dev rows: what requests should be like.

A record is a dict of figures of one text (deploy/answers.py); of a request it has an `id`,
"REQUEST:INDEX", and its `time`. `wanted` is what the answer should have been, and `right` whether
it was, where that is known. What cannot be used is counted, and the rest is kept."""

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
import numpy as np
import torch
from tqdm import tqdm
from ftcore.data import chat, encode
from ftcore.deploy import answers
from ftcore.deploy.engine import Engine, Finish, Job
from ftcore.env.run import read_metrics
from ftcore.errors import DataError, ModelError
from ftcore.evaluate import evaluator, metrics, report
from ftcore.model import heads, transformer
from kernels.sampling import Sampling

MOST_ROWS, AT_ONCE, LIVE = 2000, 256, 5000  # of a reference; LIVE: records a server keeps
DRAWN = ("generation_tokens", "reason", "logprob", "repeated")  # these depend on the temperature

class Journal:
    """The newest `most` records in the order of the log, of one `model` where that is named; DRAWN
    are left out of a drawn answer, as the reference is greedy, and of a bounded journal what was
    asked, which may be long. `counts`: what could not be used."""

    def __init__(self, model: str = "", most: int = sys.maxsize) -> None:
        self.model, self.most, self.latest = model, most, 0.0
        self.unread = () if most == sys.maxsize else ("input",)
        self.by_id, self.counts = dict[str, answers.Record](), Counter[str]()

    @property
    def records(self) -> list[answers.Record]:
        return [*self.by_id.values()]

    def told(self) -> str:
        return ", ".join(f"{count} {what}" for what, count in self.counts.items() if count)

    def take(self, text: bytes) -> None:
        """A line of the log."""
        try:
            line = json.loads(text)
            self.counts["clock went back"] += line["time"] < self.latest
            self.latest = max(self.latest, line["time"])
            if "feedback" in line:
                self._join(**line["feedback"])
            rows, is_other = line.get("rows", ()), self.model not in ("", line.get("model"))
            self.counts["of another model"] += is_other * len(rows)
            for index, row in enumerate(() if is_other else rows):
                left = (*self.unread, *(DRAWN if row.get("temperature") else ()))
                record, id_ = {k: row[k] for k in row if k not in left}, f"{line['id']}:{index}"
                self.by_id[id_] = record | {"id": id_, "time": line["time"]}
                if len(self.by_id) > self.most:
                    del self.by_id[next(iter(self.by_id))]
        except (ValueError, TypeError, KeyError):
            self.counts["damaged lines"] += 1

    def _join(self, request_id: str, index: int, label: str = "", text: str = "") -> None:
        record = self.by_id.get(f"{request_id}:{index}")
        if record is None or "wanted" in record:
            self.counts["feedback given twice" if record else "feedback for unknown ids"] += 1
            return
        record["wanted"] = label or text
        if (given := record.get("label" if label else "answer")) is not None:
            record["right"] = given == record["wanted"]

def read_journal(file: Path, model: str = "") -> Journal:
    """What a log holds, and what was put aside of it. Raises DataError: it is not there."""
    if not file.is_file():
        raise DataError(f"{file}: there is no such log; serve.py writes one with --log {file}")
    parts, journal = (*sorted(file.parent.glob(f"{file.name}.[0-9]*")), file), Journal(model)
    for text in (text for part in parts for text in part.read_bytes().splitlines()):
        journal.take(text)
    return journal

def read_reference(folder: Path) -> list[answers.Record]:
    """Of a run or bundle. Raises ModelError: it has none; DataError: a line of it is damaged."""
    if not (found := read_metrics(folder / answers.REFERENCE)):
        what = f"{folder}: has no {answers.REFERENCE}, which training makes of dev rows"
        raise ModelError(f"{what} of classes or answers: train with --data.dev, and bundle anew")
    return found

@torch.inference_mode()
def reference(model: heads.Model, split: encode.Split, suite: report.Suite) -> list[answers.Record]:
    """Records of dev rows that have one class each, or were answered, greedily; else none. They are
    made as a server makes them, by an engine. ModelError: it could not answer."""
    tokenizer, config, words = suite.tokenizer, suite.config, defaultdict(list)
    documents, chats = split.documents[:MOST_ROWS], split.chats[:MOST_ROWS]
    if is_class := config.problem == "single_label_classification":
        jobs = [Job(document.tokens_T.tolist(), None) for document in documents]
    else:
        greedy = Sampling(config.eval.max_new_tokens, 0, stop_ids=tokenizer.stop_ids, num_top=0)
        prompts = (chat.encode_prompt(each.messages[:-1], tokenizer) for each in chats)
        jobs = [Job(ids_T.tolist(), greedy) for ids_T in prompts if model.task == "lm"]
    if not jobs or getattr(config.data, "pair", ""):  # no server takes pairs
        return []
    with transformer.packed_linears(model), tqdm(total=len(jobs), desc="dev", disable=None) as bar:
        engine = Engine(model, max_sequences=AT_ONCE, max_waiting=len(jobs),
                        prefill_tokens=config.loop.micro_batch_tokens, cache_tokens=sys.maxsize)
        for job in jobs:
            engine.submit(job)
        while engine.waiting or engine.running:
            for job, word in engine.turn():
                words[job].append(word)
                bar.update(isinstance(word, Finish))
    if odd := [said[-1].code for said in words.values() if said[-1].reason == "error"]:
        raise ModelError(f"{len(odd)} of {len(jobs)} dev rows were not answered: {odd[0]}")
    if is_class:
        logits_BK = np.array([job.scores for job in jobs])
        target_B = np.array([document.labels for document in documents])
        logits_BK /= metrics.temperature(target_B, logits_BK)  # as the server does
        told = [answers.class_figures(p_K, suite.labels)
                for p_K in answers.probs_of(logits_BK, config.problem)]
        right_B = logits_BK.argmax(1) == target_B
    else:
        told = [answers.answer_figures(words[job][:-1], words[job][-1].reason) for job in jobs]
        right_B = [evaluator.spoken(job.answer, tokenizer) == chat.messages[-1]["content"]
                   for job, chat in zip(jobs, chats, strict=True)]
    return [answers.text_figures(job, tokenizer) | row | {"right": bool(is_right)}
            for job, row, is_right in zip(jobs, told, right_B, strict=True)]
