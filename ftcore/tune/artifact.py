"""What a finished run leaves for others: an HF model folder, or a peft adapter, and the tokenizer.

    RUN/model/      config.json, model.safetensors, tokenizer files     full and partial fine-tuning
    RUN/adapter/    peft's files, tokenizer files in RUN/tokenizer/     LoRA
    RUN/labels.json class names, for classifiers
"""

import json
from pathlib import Path

from ftcore.data.tokenizer import Tokenizer
from ftcore.env.files import write_file, write_folder
from ftcore.errors import ModelError
from ftcore.model.load import LoadedModel, save_model
from ftcore.tune.adapter import load_adapter, save_adapter
from ftcore.tune.lora import lora_layers
from ftcore.tune.task import TaskKind

MODEL, ADAPTER, LABELS = "model", "adapter", "labels.json"


def save_artifact(
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    run: Path,
    *,
    labels: tuple[str, ...] | None,
    base: str,
    kind: TaskKind,
) -> Path:
    """Write the trained model of a run; returns its folder.

    labels      class names of a classifier
    base        where the base model came from, for the reader of an adapter to find it
    """
    if labels:
        write_file(run / LABELS, json.dumps(labels, ensure_ascii=False) + "\n")
    if lora_layers(loaded.model):
        save_adapter(
            loaded.model,
            run / ADAPTER,
            to_hf=loaded.family.to_hf,
            base_path=base,
            task_type=kind.peft_type,
        )
        return run / ADAPTER

    def write(folder: Path) -> None:
        save_model(loaded, folder, labels=labels)
        tokenizer.save(folder)

    write_folder(run / MODEL, write)
    return run / MODEL


def read_labels(run: Path) -> tuple[str, ...] | None:
    """Class names that a run wrote, or None."""
    path = run / LABELS
    return tuple(json.loads(path.read_text("utf-8"))) if path.is_file() else None


def restore_adapter(loaded: LoadedModel, run: Path) -> None:
    """Wrap the base model of a LoRA run and fill it from the run's adapter."""
    if not (run / ADAPTER).is_dir():
        raise ModelError(f"{run}: has neither {MODEL}/ nor {ADAPTER}/; has the run finished?")
    load_adapter(loaded.model, run / ADAPTER, to_hf=loaded.family.to_hf)
