"""The golden test: what a bundle's model says of some texts, written down when it was made.

Each text is read in one pass, with its greedy answer where there is one. Its ids must be the same,
and each token of the answer, each class of a document, the likeliest tag or token at each place
must have its log-probability again, within what other kernels, another device and the rounding of
a merged matrix may change; a score likewise. An answer that is nearly tied may come out otherwise.
"""

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ftcore.data.chat import encode_prompt
from ftcore.data.pack import Encoded
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import ModelError
from ftcore.evaluate.evaluator import all_logits, continued
from ftcore.model.heads import Model
from ftcore.model.load import read_object
from ftcore.tune import lora

GOLDEN = "golden.json"
TEXTS = "Where is my order?", "4 seats in Zu\u0308rich", " \u00abIt's 3.5\u00a0\u20ac\u00bb\n"
ANSWER, MOST_TOKENS = 16, 8192  # tokens of an answer, and of one pass
NARROW, WIDE = 1e-3, 0.2  # nats, or shares of a score; in bf16 0.07 were seen, without adapter 24
Probe = dict[str, Any]  # text, ids, answer of a language model, says: log-probabilities (nats)

def write_golden(model: Model, tokenizer: Tokenizer, folder: Path, about: dict[str, Any]) -> None:
    """Write golden.json of a model, `about` which bundle.json tells."""
    is_chat = model.task == "lm" and about["task"] != "pretrain" and bool(tokenizer.chat_template)
    probes: list[Probe] = [{"text": text, "ids": _ids(tokenizer, text, is_chat)} for text in TEXTS]
    if model.task == "lm":
        answers = continued(model, tokenizer, [probe["ids"] for probe in probes], ANSWER)
        probes = [probe | {"answer": ids} for probe, ids in zip(probes, answers, strict=True)]
    said = _said(model, probes, about["problem"])
    probes = [probe | {"says": values} for probe, values in zip(probes, said, strict=True)]
    golden = {"is_chat": is_chat, "problem": about["problem"], "probes": probes,
              "tolerance": NARROW if about["precision"] == "fp32" else WIDE}
    (folder / GOLDEN).write_text(json.dumps(golden) + "\n", "utf-8")

def try_golden(model: Model, tokenizer: Tokenizer, folder: Path) -> None:
    """Run the golden test of a bundle. Raises ModelError: the first difference, or an adapter
    without which the model says the same."""
    golden, where = read_object(folder / GOLDEN), folder / GOLDEN
    probes, problem = golden["probes"], golden["problem"]
    for probe in probes:
        if (ids := _ids(tokenizer, probe["text"], golden["is_chat"])) != probe["ids"]:
            what = f"{where}: {probe['text']!r}: its ids are {ids}, must be {probe['ids']}"
            raise ModelError(f"{what}: the tokenizer, or its chat template, is not the bundle's")
    said = _said(model, probes, problem)
    for probe, values in zip(probes, said, strict=True):
        for place, (now, was) in enumerate(zip(values, probe["says"], strict=True)):
            if not abs(now - was) <= golden["tolerance"] * max(1, abs(was)):
                what = f"{where}: {probe['text']!r}: value {place} is {now:.4f}, must be {was:.4f}"
                raise ModelError(f"{what}: its weights, or its adapter, are not those of the run")
    if layers := lora.lora_layers(model).values():
        for layer in layers:
            layer.active = None
        if _said(model, probes, problem) == said:
            raise ModelError(f"{folder}: the model says the same without its adapter")
        lora.use(model, lora.DEFAULT)

def _ids(tokenizer: Tokenizer, text: str, is_chat: bool) -> list[int]:
    if is_chat:
        return encode_prompt([{"role": "user", "content": text}], tokenizer).tolist()
    return next(tokenizer.encode_pairs([(text,)]))[0].tolist()

@torch.inference_mode()
def _said(model: Model, probes: Sequence[Probe], problem: str | None) -> list[list[float]]:
    """Of each text what is compared."""
    documents, counts, is_lm = [], [], model.task == "lm"
    for probe in probes:
        ids_T = np.array([*probe["ids"], *probe.get("answer", ())[:-1]], np.int32)
        counts.append(len(probe["answer"]) if is_lm else len(ids_T))
        scored_T = np.float32(np.arange(len(ids_T)) >= len(ids_T) - counts[-1])
        labels = (0, 1.0) if model.task == "classify" else (ids_T, scored_T)
        documents.append(Encoded(probe["text"], ids_T, *labels))
    logits_MK = all_logits(model, documents, max_tokens=MOST_TOKENS, device=model.device).double()
    if problem == "regression":
        return logits_MK.tolist()
    is_several = problem == "multi_label_classification"
    logp_MK = F.logsigmoid(logits_MK) if is_several else logits_MK.log_softmax(-1)
    if model.task == "classify":
        return logp_MK.tolist()
    chosen_M = logp_MK.argmax(-1)
    if is_lm:
        chosen_M = torch.tensor([*chain.from_iterable(probe["answer"] for probe in probes)])
    logp_M = logp_MK.gather(1, chosen_M[:, None]).squeeze(1)
    return [logp_T.tolist() for logp_T in logp_M.split(counts)]
