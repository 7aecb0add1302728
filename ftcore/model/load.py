"""A model folder in HF layout, in and out: config.json and safetensors. Pickle is never read.

Every tensor is accounted for: names and shapes are checked before anything is copied into memory
that we own. load -> save -> load is bit-equal, unknown keys too; transformers loads it."""

import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from ftcore.errors import ModelError
from ftcore.hub import json_object
from ftcore.model.families import Family, family_named, matches
from ftcore.model.heads import CLASSIFIERS, EMBEDDING, HEAD, Model, ModelTask
from ftcore.model.transformer import ModelSpec

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
MOST_LAYERS, MOST_MISSING = 1_000, 2**24  # the latter in values
FLOATS = ("BF16", "F16", "F32", "F64")

Stored = Mapping[str, tuple[Path, str, list[int]]]  # HF name -> file, dtype and shape of a tensor

class Accounting(NamedTuple):
    loaded: Sequence[str] = ()
    ignored: Sequence[str] = ()
    new: Sequence[str] = ()

    def __str__(self) -> str:
        others = {"not needed": self.ignored, "new, drawn at random": self.new}
        more = (f", {len(some)} {kind} ({_some(some)})" for kind, some in others.items() if some)
        return f"{len(self.loaded)} tensors loaded{''.join(more)}"

class LoadedModel(NamedTuple):
    """A model and what is needed to save it again."""
    model: Model  # on the CPU, in evaluation mode
    family: Family  # its file format
    config: dict  # config.json as read
    accounting: Accounting  # what happened to each tensor
    folder: Path  # where it was read from
    labels: tuple[str, ...] | None = None  # of a classifier's classes

def read_object(path: Path, *, advice: str = "") -> dict[str, Any]:
    """The JSON object of a file. Raises ModelError: none in it, or no file, with `advice`."""
    try:
        return json_object(path.read_bytes(), path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}){advice}") from error

def labels_of(config: Mapping, where: Path) -> tuple[str, ...]:
    """Class names of `id2label`, by index. ModelError: none, not 0 .. K - 1, or two of one name."""
    id2label = config.get("id2label")
    named = id2label if isinstance(id2label, dict) else {}
    labels = tuple(str(named[key]) for key in map(str, range(len(named))) if key in named)
    if not labels or len(set(labels)) != len(named):
        must = "must name a classifier's classes 0 .. K - 1, each once; else it is no classifier"
        raise ModelError(f"{where}: id2label = {id2label}: {must}")
    return labels

def load_model(folder: Path, *, task: ModelTask, dtype: torch.dtype,
               labels: tuple[str, ...] | None = None, generator: torch.Generator | None = None,
               init: Literal["pretrained", "random"] = "pretrained") -> LoadedModel:
    """Build the model of a folder, with the head of a task (heads.py), and fill it. `labels` are by
    default those that config.json names; init "random" draws every tensor from `generator`,
    which else draws what the checkpoint lacks of a head, but for "lm"; None: that is an error.
    Raises ModelError: unknown family, damaged files, tensors that do not fit."""
    config = read_object(folder / CONFIG, advice=f". A folder in HF layout holds it and {SINGLE}")
    family = family_named(config.get("model_type"), task, where=str(folder / CONFIG))
    if task not in family.architectures:
        raise ModelError(f"{folder}: task {task!r} is none of {', '.join(family.architectures)}")
    try:
        spec = family.to_spec(config)
    except ModelError as error:
        raise ModelError(f"{folder}/{error}") from None
    if task in CLASSIFIERS:
        labels = labels or labels_of(config, folder / CONFIG)
    _require_room(spec, folder, dtype, is_random=init == "random")
    model = empty_model(spec, task, len(labels or ()), dtype)
    if init == "random":
        accounting = Accounting(new=[name for name, _ in model.named_parameters()])
    else:
        named = config.get("architectures")  # where this task is among them, the head is whole
        is_other = not isinstance(named, list) or family.architectures[task] not in named
        may_be_new = is_other and task != "lm" and generator is not None
        accounting = load_weights(model, folder, family, head_may_be_new=may_be_new)
    model.init_weights(generator, accounting.new)
    return LoadedModel(model.eval(), family, config, accounting, folder, labels)

def _require_room(spec: ModelSpec, folder: Path, dtype: torch.dtype, *, is_random: bool) -> None:
    """Refuse, before any memory is taken, what asks for more than files or machine can hold."""
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // dtype.itemsize
    if not is_random:  # what is missing is named later; a head may be new
        held = sum(math.prod(shape) for _, _, shape in stored_tensors(folder).values())
        most = min(most, MOST_MISSING + 4 * held)
    # of the matrices that every such model has, and one of a head
    rows = spec.vocab_size + spec.num_types + spec.max_positions * (spec.position == "learned")
    of_layer = spec.intermediate_size + spec.head_dim * (spec.num_heads + spec.num_kv_heads)
    values = spec.hidden_size * (rows + spec.hidden_size + 2 * spec.num_layers * of_layer)
    if spec.num_layers > MOST_LAYERS or values > most:
        what = f"{folder / CONFIG}: asks for {spec.num_layers:,} layers, {values:,} values in all"
        must = f"at most {MOST_LAYERS:,}, and {most:,} by its files and this machine's memory"
        raise ModelError(f"{what}: must be {must}")

def empty_model(spec: ModelSpec, task: ModelTask, num_labels: int, dtype: torch.dtype) -> Model:
    """A model without values. No page of its memory is touched before they are written.
    On the meta device the same would import torch's tracing machinery: a second of every start."""
    with ExitStack() as undo:
        undo.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(dtype)
        return Model(spec, task, num_labels)

def save_model(loaded: LoadedModel, folder: Path, *, problem: str | None = None) -> None:
    """Write config.json and the weights into an existing folder; `problem` is HF's `problem_type`,
    what outputs mean. Raises ModelError, with nothing written: HF has no name for a tensor."""
    from huggingface_hub import save_torch_state_dict

    model, spec, task = loaded.model, loaded.model.spec, loaded.model.task
    state, tensors = dict(model.named_parameters()), {}
    prefix = loaded.family.trunk_prefix if task == "trunk" else ""  # HF: its trunk has none
    for hf_name in dict.fromkeys(map(loaded.family.to_hf, state)):
        parts = [state[name].detach().cpu() for name in loaded.family.to_ours(hf_name)]
        tensor = loaded.family.join(hf_name, parts, spec.num_heads).contiguous()
        # HF: its writer refuses a view of a larger storage, which a trained parameter may be
        is_whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        tensors[hf_name.removeprefix(prefix)] = tensor if is_whole else tensor.clone()
    config = {**loaded.config, **loaded.family.to_config(spec)}
    config.pop("torch_dtype", None)  # HF: the older name of `dtype`
    config["architectures"] = [loaded.family.architectures[task]]
    config["dtype"] = str(state[EMBEDDING].dtype).removeprefix("torch.")
    if task in CLASSIFIERS:
        config["id2label"] = {str(index): label for index, label in enumerate(loaded.labels)}
        config["label2id"] = {label: index for index, label in enumerate(loaded.labels)}
        config |= {"problem_type": problem} if problem and task == "classify" else {}
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, "utf-8")
    save_torch_state_dict(tensors, folder)

def load_weights(model: Model, folder: Path, family: Family, *,
                 head_may_be_new: bool = False) -> Accounting:
    """Fill `model`, whose parameters keep dtype and device, from a checkpoint folder. A module of a
    head that may be new may be absent as a whole; it is listed. Raises as `refuse_misfits`."""
    stored, held, H = stored_tensors(folder), {}, model.spec.num_heads
    wanted = dict(model.named_parameters())  # a shared one once, under the embedding's name
    ours_of = {hf_name: family.to_ours(hf_name) for hf_name in stored}
    modules = {name.rpartition(".")[0] for name in wanted}
    hf_name_of: dict[str, str] = {}
    ignored, shapes = [], {}
    for hf_name in sorted(stored):
        first, label = next(iter(ours_of[hf_name]), ""), hf_name
        is_other_head = first.startswith("head.") and first.rpartition(".")[0] not in modules
        if first in wanted and first not in hf_name_of:
            hf_name_of |= dict.fromkeys(ours_of[hf_name], hf_name)
            shapes[hf_name] = family.hf_shape(hf_name, wanted[first].shape)
        elif is_other_head or matches(hf_name, family.ignored):
            ignored.append(hf_name)
            continue
        elif first in hf_name_of:
            label = f"{hf_name} beside {hf_name_of[first]}"
        held[label] = stored[hf_name]
    absent = [name for name in wanted if name not in hf_name_of]
    whole = modules - {name.rpartition(".")[0] for name in hf_name_of} if head_may_be_new else set()
    new = [n for n in absent if n.startswith("head.") and n.rpartition(".")[0] in whole]
    shapes |= {family.to_hf(n): [*wanted[n].shape] for n in absent if n not in new}  # fused: once
    what = f"{folder}: weights, config.json and the number of labels do not fit each other"
    refuse_misfits(what, held, shapes)
    for name in (n for n in ignored if HEAD in ours_of[n] and model.spec.tie_word_embeddings):
        if not torch.equal(*dict(mapped([name, hf_name_of[EMBEDDING]], stored)).values()):
            what = f"{folder}: {name} differs from the embeddings, which config.json ties it to"
            raise ModelError(f"{what}: set tie_word_embeddings to false, or remove {name}")
    with torch.no_grad():
        for hf_name, tensor in mapped(shapes, stored):
            targets = [wanted[name] for name in ours_of[hf_name]]
            if matches(hf_name, family.transposed):  # cost: in the dtype first, half the time
                tensor = tensor.to(targets[0].dtype)
            for target, part in zip(targets, family.split(hf_name, tensor, H), strict=True):
                target.copy_(part)
    return Accounting([*hf_name_of], ignored, new)

def refuse_misfits(what: str, held: Stored, shapes: Mapping[str, list[int]]) -> None:
    """ModelError, `what` and each tensor that is missing, unexpected, mis-shaped or no float."""
    both = [name for name in shapes if name in held]
    odd = [f"{n} is {held[n][2]}, must be {shapes[n]}" for n in both if held[n][2] != shapes[n]]
    odd += [f"{n} is {held[n][1]}, must be one of {', '.join(FLOATS)}"
            for n in both if held[n][1] not in FLOATS]
    problems = {"missing": [name for name in shapes if name not in held],
                "unexpected": [name for name in held if name not in shapes], "misfit": odd}
    if lines := [f"  {kind}: {_some(names)}" for kind, names in problems.items() if names]:
        raise ModelError("\n".join([what, *lines]))

def stored_tensors(folder: Path, single: str = SINGLE) -> Stored:
    """What is in one file, or in shards with an index. Raises ModelError: no safetensors, a pickled
    model only, an unreadable header, an index of paths or of tensors that its files lack."""
    if (index := folder / f"{single}.index.json").is_file():
        if not isinstance(weight_map := read_object(index).get("weight_map"), dict):
            raise ModelError(f"{index}: weight_map = {weight_map}: must be an object")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ModelError(f"{index}: {name} -> {file!r} must be a bare file name")
        headers = [read_header(folder / file) for file in sorted(set(weight_map.values()))]
        found = {name: tensor for header in headers for name, tensor in header.items()}
        if odd := sorted(weight_map.keys() ^ found.keys()):
            raise ModelError(f"{index}: index and shards differ in {_some(odd)}")
        return found
    if (folder / single).is_file():
        return read_header(folder / single)
    pickled = ", ".join(path.name for path in folder.glob("*") if path.suffix in PICKLED)
    hint = f" It holds {pickled}: convert to safetensors." if pickled else ""
    raise ModelError(f"{folder}: neither {single} nor {index.name} is there.{hint}")

def read_header(file: Path) -> Stored:
    """What one file holds. safetensors refuses holes and overlaps: all of it has a name."""
    try:
        with safe_open(file, framework="pt") as handle:
            parts = {name: handle.get_slice(name) for name in [*handle.keys()]}
            return {n: (file, part.get_dtype(), part.get_shape()) for n, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: not a whole safetensors file ({error}): copy it anew") from error

def mapped(names: Collection[str], stored: Stored) -> Iterator[tuple[str, Tensor]]:
    """The named tensors, each a view of its file, to be read at once and then let go."""
    for file in dict.fromkeys(stored[name][0] for name in names):
        with safe_open(file, framework="pt") as handle:
            held = (name for name in names if stored[name][0] == file)
            yield from ((name, handle.get_tensor(name)) for name in held)

def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")
