"""What a finished run leaves for others: an HF model folder, or a peft adapter.

RUN/model/          config.json, model.safetensors, tokenizer files     full and partial
RUN/adapter/        peft's files; base model and tokenizer stay where they were     LoRA
RUN/labels.json     class names, for classifiers
"""

import json
from pathlib import Path

import torch

from ftcore.config import Run
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import ModelError
from ftcore.files import current, write_file, write_folder
from ftcore.hub import resolve
from ftcore.model.load import LoadedModel, load_model, save_model
from ftcore.tune.adapter import load_adapter, save_adapter
from ftcore.tune.lora import lora_layers
from ftcore.tune.task import TaskKind

MODEL, ADAPTER, LABELS = "model", "adapter", "labels.json"

def save_artifact(
    loaded: LoadedModel, tokenizer: Tokenizer, run: Path, config: Run, kind: TaskKind,
    labels: tuple[str, ...] | None,
) -> Path:  # fmt: skip
    """Write the trained model of a run; returns its folder. An adapter names its base; a classifier
    its `labels` and, in HF's word, the problem that its outputs answer."""
    if labels:
        write_file(run / LABELS, json.dumps(labels, ensure_ascii=False) + "\n")
    if lora_layers(loaded.model):
        base = {"family": loaded.family, "base_path": config.model.path}
        save_adapter(loaded.model, run / ADAPTER, **base, task_type=kind.peft_type)
        return run / ADAPTER

    def write(folder: Path) -> None:
        save_model(loaded, folder, labels=labels, problem=config.problem)
        tokenizer.save(folder)

    write_folder(run / MODEL, write)
    return run / MODEL

def load_artifact(run: Path, *, base: str, kind: TaskKind, dtype: torch.dtype) -> LoadedModel:
    """The trained model of a finished run; a LoRA run's adapter is put on its base model, `base`.
    Raises ModelError: the run has left neither, or its files are damaged."""
    saved, adapter = current(run / MODEL), current(run / ADAPTER)
    if saved.is_dir():
        return load_model(saved, task=kind.model_task, dtype=dtype)
    if not adapter.is_dir():
        what = f"{run}: has neither {MODEL}/ nor {ADAPTER}/, so the run has not finished"
        raise ModelError(f"{what}; continue it with: python train.py --resume {run}")
    labels = read_labels(run)
    loaded = load_model(
        resolve(base), task=kind.model_task, dtype=dtype, num_labels=len(labels or ()) or None,
        generator=torch.Generator(),  # draws the head that the adapter then replaces
    )  # fmt: skip
    load_adapter(loaded.model, adapter, family=loaded.family)
    loaded.model.eval()
    return loaded

def read_labels(run: Path) -> tuple[str, ...] | None:
    """Class names that a run wrote, or None."""
    path = run / LABELS
    return tuple(json.loads(path.read_text("utf-8"))) if path.is_file() else None
