"""Chat fine-tuning of a GPT-2 with LoRA, ours against transformers and peft.

    python -m tests.bench.sft --data DIR

`DIR` holds gsm8k/train.jsonl.gz, whose questions and answers become chats. The model has GPT-2's
sizes (124 M parameters, 50,257 tokens) and random weights, the tokenizer is that of builtin:base.
Tokens per second (padding is no token), peak memory, and how much of the floor each side reaches.
GPT-2's fused query-key-value matrix has one pair of factors in peft and three in ours, so ours
trains somewhat more. The last line is JSON.
"""

import argparse
import gzip
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
import torch
from torch import Tensor, nn
from ftcore.data.pack import Encoded
from ftcore.hub import BUILTIN
from tests.bench.compare import main
from tests.bench.rival import Bench

IGNORED = -100  # HF: a label that is not scored

def set_up(said: argparse.Namespace) -> None:
    write_gpt2(said.work / "model")
    with gzip.open(said.data / "gsm8k/train.jsonl.gz", "rt", encoding="utf-8") as file:
        chats = [chat(json.loads(line)) for line in file]
    (said.work / "chats.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats), "utf-8")

def write_gpt2(folder: Path) -> None:
    """A model folder of GPT-2's sizes: random weights, fp32, and the tokenizer of builtin:base."""
    import transformers

    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN["builtin:base"] / name, folder)

def chat(row: dict[str, str]) -> dict[str, Any]:
    """One question and its answer."""
    turns = (("user", row["question"]), ("assistant", row["answer"]))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}

def words(said: argparse.Namespace) -> list[str]:
    return [
        "sft", "--model.path", str(said.work / "model"),
        "--data.train", str(said.work / "chats.jsonl"), "--optim.lr", "1e-3",
    ]  # fmt: skip

def model(folder: Path, labels: int | None, options: dict[str, Any]) -> nn.Module:
    import transformers

    return transformers.GPT2LMHeadModel.from_pretrained(
        folder, attn_pdrop=0.0, use_cache=False, **options
    )

def padded(documents: Sequence[Encoded]) -> dict[str, Tensor]:
    """A batch as HF has it: the label of a position is its own token, where that was predicted."""
    longest = max(map(len, documents))
    ids = torch.zeros(len(documents), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, document in enumerate(documents):
        length = len(document)
        ids[row, :length] = torch.from_numpy(document.tokens_T)
        mask[row, :length] = 1
        scored_T = torch.from_numpy(document.weights > 0)[:-1]
        labels[row, 1:length][scored_T] = ids[row, 1:length][scored_T]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}

BENCH = Bench(
    name="sft",
    unit="tokens",
    bars={"lora": 1.6},
    set_up=set_up,
    words=words,
    model=model,
    peft={
        "task_type": "CAUSAL_LM",
        "target_modules": ["c_attn", "c_proj", "c_fc"],
        "fan_in_fan_out": True,
    },
    padded=padded,
)

if __name__ == "__main__":
    main(BENCH, steps=8, batch=8)
