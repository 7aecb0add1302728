"""What is noted of each text that was answered: figures, by which monitoring (ftcore/monitor) tells
whether requests are still like those the model was made for. A text itself only on demand.

    prompt_tokens, unknown           of every text; unknown: share of its tokens
    label, confidence, entropy       of a classifier: the highest probability, and nats
    generation_tokens, reason,       of an answer: why it ended, the mean over its tokens (nats),
    logprob, repeated                the share of its runs of 4 tokens that it had before"""

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ftcore.data.tokenizer import Tokenizer

REFERENCE = "reference.jsonl"  # records of dev rows, in a run and in its bundle
Record = dict[str, Any]
PERSONAL = tomllib.loads(Path(__file__).with_name("personal.toml").read_text("utf-8"))

def prompt_figures(ids: Sequence[int], tokenizer: Tokenizer) -> Record:
    unknown = tokenizer.special.get("unk_token")
    share = {"unknown": ids.count(tokenizer.id_of(unknown)) / len(ids)} if unknown else {}
    return {"prompt_tokens": len(ids), **share}

def class_figures(probs_K: np.ndarray, labels: Sequence[str]) -> Record:
    """Of calibrated probabilities, float64: of one class a row, or of labels by themselves."""
    return {"label": labels[int(probs_K.argmax())], "confidence": float(probs_K.max()),
            "entropy": float(-(probs_K * np.log(probs_K.clip(1e-300))).sum())}

def answer_figures(ids: Sequence[int], logprob: float, reason: str) -> Record:
    runs = [(*ids[i : i + 4],) for i in range(len(ids) - 3)]
    return {"generation_tokens": len(ids), "reason": reason, "logprob": logprob,
            "repeated": 1 - len({*runs}) / len(runs) if runs else 0.0}

def probabilities(logits_BK: np.ndarray, problem: str | None) -> np.ndarray:
    """probs_BK of classes, or of labels by themselves; `problem` is HF's `problem_type`."""
    if problem == "multi_label_classification":
        return 1 / (1 + np.exp(-logits_BK))
    odds_BK = np.exp(logits_BK - logits_BK.max(1, keepdims=True))
    return odds_BK / odds_BK.sum(1, keepdims=True)

def redacted(text: str) -> str:
    """A text with names of kinds in place of e-mail addresses and of long numbers."""
    for kind, pattern in PERSONAL.items():
        text = re.sub(pattern, f"[{kind}]", text)
    return text
