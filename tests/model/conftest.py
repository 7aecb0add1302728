"""Tiny random models of transformers, saved to folders, as the oracle of ours."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

KINDS = {
    "bert-trunk": "BertModel",
    "bert-classify": "BertForSequenceClassification",
    "qwen3-tied": "Qwen3ForCausalLM",
    "qwen3-untied": "Qwen3ForCausalLM",
    "qwen3-trunk": "Qwen3Model",
    "qwen3-classify": "Qwen3ForSequenceClassification",
}
SHARED = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.1,
    "max_position_embeddings": 640,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
QWEN3 = {"num_key_value_heads": 2, "head_dim": 16, "eos_token_id": None}
LABELS = {0: "bad", 1: "fair", 2: "good"}


def _build(kind: str) -> torch.nn.Module:
    """The model, in evaluation mode, with every tensor away from its initial constant."""
    transformers = pytest.importorskip("transformers")
    family, task = kind.split("-")
    settings = SHARED | (QWEN3 if family == "qwen3" else {})
    if task == "classify":
        settings |= {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}}
    if family == "qwen3":
        settings |= {"tie_word_embeddings": task == "tied"}
        config = transformers.Qwen3Config(**settings)
    else:
        config = transformers.BertConfig(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, KINDS[kind])(config).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                base = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
                torch.nn.init.normal_(parameter, mean=base, std=0.1)
    return model


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """kind -> (the transformers model, the folder it was saved to); neither may be changed."""
    made: dict[str, tuple[Any, Path]] = {}

    def get(kind: str) -> tuple[Any, Path]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            model = _build(kind)
            model.save_pretrained(folder)
            made[kind] = (model, folder)
        return made[kind]

    return get


@pytest.fixture
def task_of_kind() -> Callable[[str], str]:
    """kind -> the task to load it for."""
    return lambda kind: {"tied": "lm", "untied": "lm"}.get(kind.split("-")[1], kind.split("-")[1])


@pytest.fixture
def documents() -> Callable[..., list[list[int]]]:
    """Lengths -> random documents, the same in every run."""

    def draw(lengths: list[int], seed: int = 0) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(0, 97, (n,), generator=generator).tolist() for n in lengths]

    return draw
