"""BERT (MiniLM) as a classifier on SST-2, ours against transformers and peft.

    python -m tests.bench.classify --data DIR

`DIR` holds sst2_glue/train.tsv.gz. Full fine-tuning, and LoRA of rank 8 on all linear layers of the
trunk with the pooler and the classifier trained. Rows per second, peak memory, and how much of the
floor each side reaches. The last line is JSON.
"""

import argparse
from pathlib import Path
from typing import Any
from torch import nn
from tests.bench.compare import main
from tests.bench.rival import Bench
from tests.bench.sst2 import model_folder, padded

def words(said: argparse.Namespace) -> list[str]:
    return [
        "classify", "--model.path", model_folder(),
        "--data.train", str(said.data / "sst2_glue/train.tsv.gz"),
        "--data.text", "sentence", "--data.label", "label",
        "--optim.lr", "1e-3" if said.method == "lora" else "5e-5",
    ]  # fmt: skip

def model(folder: Path, labels: int | None, options: dict[str, Any]) -> nn.Module:
    import transformers

    return transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=labels, attention_probs_dropout_prob=0.0, **options
    )

BENCH = Bench(
    name="classify",
    unit="rows",
    bars={"full": 1.25, "lora": 1.4},
    set_up=lambda said: None,
    words=words,
    model=model,
    peft={
        "task_type": "SEQ_CLS",
        "target_modules": r".*\.encoder\..*\.(query|key|value|dense)",
        "modules_to_save": ["pooler", "classifier"],
    },
    padded=padded,
)

if __name__ == "__main__":
    main(BENCH, steps=50, batch=32)
