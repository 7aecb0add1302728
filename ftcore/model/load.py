"""A model folder in HF layout, in and out: config.json and safetensors.

load -> save -> load is bit-equal, and transformers loads what is saved. Unknown keys of config.json
are kept, so that a model leaves as it came but for what was trained.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ftcore.errors import ModelError
from ftcore.model.families import Family, family_of
from ftcore.model.heads import CLASSIFIERS, Model, ModelTask, init_module
from ftcore.model.spec import ModelSpec
from ftcore.model.weights import EMBEDDING, HEAD, Accounting, hf_tensors, load_weights

CONFIG = "config.json"
# A checkpoint of another task lacks these parts of the head.
PARTS = ("classifier", "pooler", "transform.dense", "transform.norm", "lm_head")

@dataclass(frozen=True)
class LoadedModel:
    """A model and what is needed to save it again."""
    model: Model  # on the CPU, in evaluation mode
    family: Family  # its file format
    config: dict  # config.json as read
    accounting: Accounting  # what happened to each tensor
    folder: Path  # where it was read from

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Class names of a saved classifier, by class index; None where config.json has none."""
        return labels_of(self.config, str(self.folder / CONFIG))

def read_object(path: Path, *, advice: str = "") -> dict[str, Any]:
    """The JSON object that a file holds. Raises ModelError: no such file, with `advice` on what to
    do about it, or no JSON object in it."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}){advice}") from error
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error}). Download it again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds {type(value).__name__}, must be a JSON object")
    return value

def labels_of(config: Mapping, where: str) -> tuple[str, ...] | None:
    """Class names of `id2label`, by class index; None without one. Raises ModelError: the indices
    are not 0 .. K - 1, or two classes share a name."""
    if (id2label := config.get("id2label")) is None:
        return None
    try:
        labels = tuple(str(id2label[str(index)]) for index in range(len(id2label)))
    except (KeyError, TypeError):
        labels = ()
    if not labels or len(set(labels)) != len(labels):
        raise ModelError(f"{where}: id2label = {id2label}: must name classes 0 .. K - 1, each once")
    return labels

def load_model(
    folder: Path, *, task: ModelTask, dtype: torch.dtype, num_labels: int | None = None,
    init: Literal["pretrained", "random"] = "pretrained", generator: torch.Generator | None = None,
) -> LoadedModel:  # fmt: skip
    """Build the model of a folder, with the head of a task (heads.py), and fill it.

    num_labels      classes of "classify" and "tag"; default: as many as config.json names
    init            "random" draws every tensor from `generator` and reads config.json alone
    generator       draws what the checkpoint lacks of a head, but for "lm"; None: that is an error
    raises          ModelError: unknown family, damaged files, tensors that do not fit
    """
    layout = ". A model folder holds config.json and model.safetensors in HF layout."
    config = read_object(folder / CONFIG, advice=layout)
    family = family_of(config, str(folder / CONFIG), task)
    if task not in family.architectures:
        what = f"{folder}: {family.name} has no head for the task {task!r}"
        raise ModelError(f"{what}; it has {', '.join(family.architectures)}")
    try:
        spec = family.to_spec(config)
    except ModelError as error:
        raise ModelError(f"{folder}/{error}") from None
    if task in CLASSIFIERS and num_labels is None:
        if (labels := labels_of(config, str(folder / CONFIG))) is None:
            raise ModelError(f"{folder / CONFIG}: names no classes (id2label): it is no classifier")
        num_labels = len(labels)
    model = empty_model(spec, task, num_labels, dtype)
    if init == "random":
        assert generator is not None, "random weights are drawn from a generator"
        model.init_weights(generator)
        accounting = Accounting(new=[name for name, _ in model.named_parameters()])
    else:
        # a folder that names this very task has all of the head
        is_other = family.architectures[task] not in (config.get("architectures") or ())
        parts = PARTS if is_other and task != "lm" and generator is not None else ()
        accounting = load_weights(model, folder, family, may_be_new={f"head.{p}" for p in parts})
        for name in dict.fromkeys(name.rpartition(".")[0] for name in accounting.new):
            module = model.get_submodule(name)
            if f"{name}.weight" in accounting.new:
                init_module(module, spec.initializer_range, generator)
            else:  # it is that of the embeddings
                torch.nn.init.zeros_(module.bias)
    return LoadedModel(model.eval(), family, config, accounting, folder)

def empty_model(
    spec: ModelSpec, task: ModelTask, num_labels: int | None, dtype: torch.dtype
) -> Model:
    """A model without values. No page of its memory is touched before they are written.
    On the meta device the same would import torch's tracing machinery: a second of every start."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return Model(spec, task, num_labels)
    finally:
        torch.set_default_dtype(usual)

def save_model(
    loaded: LoadedModel, folder: Path, *, labels: tuple[str, ...] | None = None,
    problem: str | None = None, state: Mapping[str, Tensor] | None = None,
    max_shard_bytes: int = 5_000_000_000,  # HF's
) -> None:  # fmt: skip
    """Write config.json and the weights into an existing folder.

    labels          class names of a classifier, by class index; default: those it was loaded with
    problem         HF's `problem_type`: what a classifier's outputs mean; None: as it was
    state           tensors to save instead of the model's own, under its names (merged LoRA)
    raises          ModelError: a tensor is missing, unknown or mis-shaped, or labels do not fit
    """
    from huggingface_hub import save_torch_state_dict

    model, spec, task = loaded.model, loaded.model.spec, loaded.model.task
    state = dict(model.named_parameters() if state is None else state)
    if spec.tie_word_embeddings:
        state.pop(HEAD, None)
    whole = empty_model(spec, task, model.num_labels, torch.float32)
    wanted = {name: tensor.shape for name, tensor in whole.named_parameters()}
    given = {name: tensor.shape for name, tensor in state.items()}
    if odd := sorted(name for name in wanted | given if wanted.get(name) != given.get(name)):
        raise ModelError(f"not saved: tensors missing, unknown or mis-shaped: {', '.join(odd)}")
    config = {**loaded.config, **loaded.family.to_config(spec)}
    config.pop("torch_dtype", None)  # HF: the older name of `dtype`
    config["architectures"] = [loaded.family.architectures[task]]
    config["dtype"] = str(state[EMBEDDING].dtype).removeprefix("torch.")
    if task in CLASSIFIERS:
        count = model.num_labels
        labels = labels or loaded.labels or tuple(f"LABEL_{index}" for index in range(count))
        if len(labels) != count:
            raise ModelError(f"{len(labels)} labels for {count} classes: {', '.join(labels)}")
        config["id2label"] = {str(index): label for index, label in enumerate(labels)}
        config["label2id"] = {label: index for index, label in enumerate(labels)}
        if problem is not None:
            config["problem_type"] = problem
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, "utf-8")
    tensors = hf_tensors(state, loaded.family, spec.num_heads, bare=task == "trunk")
    save_torch_state_dict(tensors, folder, max_shard_size=max_shard_bytes)
