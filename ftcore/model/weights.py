"""Safetensors in and out, with every tensor accounted for (law 7). Pickle is never read.

Reading checks names and shapes of all tensors against the model before anything is copied, and
lists all missing, unexpected and mis-shaped names in one error. Tensors are copied into memory that
we own, so a file that changes later cannot change or kill a running model.

source  safetensors format: 8-byte little-endian header length, JSON header, raw tensor data
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ftcore.errors import ModelError
from ftcore.model.families.family import Family

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass
class Accounting:
    """What happened to each tensor of a checkpoint and of the model."""

    loaded: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{len(self.loaded)} tensors loaded"
        if self.ignored:
            text += f", {len(self.ignored)} not needed ({', '.join(self.ignored[:4])})"
        if self.new:
            text += f", {len(self.new)} new, drawn at random ({', '.join(self.new)})"
        return text


def tensor_files(folder: Path) -> dict[str, Path]:
    """HF tensor name -> the file that holds it, from one file or from shards with an index.

    raises  ModelError: no safetensors, a pickled model only, an unreadable header, an index that
            names other files than bare names or tensors that its files do not hold
    """
    if (folder / INDEX).is_file():
        try:
            weight_map = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{folder / INDEX}: no readable weight_map: {error}") from error
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ModelError(f"{folder / INDEX}: {name} -> {file!r} must be a bare file name")
        files = [folder / name for name in sorted(set(weight_map.values()))]
    elif (folder / SINGLE).is_file():
        weight_map, files = None, [folder / SINGLE]
    else:
        pickled = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLED)
        hint = f" It holds {', '.join(pickled)}: convert to safetensors." if pickled else ""
        raise ModelError(f"{folder}: neither {SINGLE} nor {INDEX} is there.{hint}")
    found = {name: file for file in files for name in _header(file)}
    if weight_map is not None and set(weight_map) != set(found):
        odd = sorted(set(weight_map) ^ set(found))
        raise ModelError(f"{folder / INDEX}: index and shards differ in {_some(odd)}")
    return found


def _header(file: Path) -> dict[str, list[int]]:
    """Tensor name -> shape of one safetensors file; duplicate names are refused."""
    try:
        with safe_open(file, framework="pt") as handle:
            shapes = {name: handle.get_slice(name).get_shape() for name in handle.keys()}  # noqa: SIM118
        with open(file, "rb") as raw:
            size = int.from_bytes(raw.read(8), "little")
            json.loads(raw.read(size), object_pairs_hook=_refuse_duplicates)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{file}: not a whole safetensors file ({error}). Copy or download it again."
        ) from error
    return shapes


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError(f"a name occurs twice in {_some(sorted(names))}")
    return dict(pairs)


def read_tensors(names: Iterable[str], files: Mapping[str, Path]) -> dict[str, Tensor]:
    """The named tensors, copied into owned memory."""
    tensors = {}
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(files[name], []).append(name)
    for file, wanted in by_file.items():
        with safe_open(file, framework="pt") as handle:
            tensors.update({name: handle.get_tensor(name).clone() for name in wanted})
    return tensors


def load_weights(
    model: nn.Module, folder: Path, family: Family, *, may_be_new: tuple[str, ...] = ()
) -> Accounting:
    """Fill `model` from a checkpoint folder; its parameters keep their dtype and device.

    may_be_new  prefixes of our names that a checkpoint may lack, such as a new head's; these keep
                their random values and are listed
    raises      ModelError: every missing, unexpected and mis-shaped tensor, in one message
    """
    files = tensor_files(folder)
    shapes = {n: s for file in set(files.values()) for n, s in _header(file).items()}
    wanted = {name: list(tensor.shape) for name, tensor in _own_tensors(model).items()}
    accounting = Accounting()
    hf_name_of: dict[str, str] = {}
    unexpected, misshaped = [], []
    for hf_name, shape in sorted(shapes.items()):
        ours = family.to_ours(hf_name)
        is_tied_copy = hf_name == "lm_head.weight" and model.spec.tie_word_embeddings
        if ours not in wanted:
            known = ours is not None and ours.startswith("head.")  # a head of another task
            if known or is_tied_copy or family.is_ignored(hf_name):
                accounting.ignored.append(hf_name)
            else:
                unexpected.append(hf_name)
        elif list(shape) != wanted[ours]:
            misshaped.append(f"{hf_name} is {list(shape)}, config.json implies {wanted[ours]}")
        else:
            hf_name_of[ours] = hf_name
    refused = [line.split(" ")[0] for line in misshaped]
    absent = [
        n for n in wanted if n not in hf_name_of and family.to_hf(n) not in refused
    ]
    accounting.new = [name for name in absent if name.startswith(may_be_new)] if may_be_new else []
    missing = [family.to_hf(name) for name in absent if name not in accounting.new]
    _raise_if_any(folder, missing=missing, unexpected=unexpected, misshaped=misshaped)

    tensors = read_tensors(hf_name_of.values(), files)
    with torch.no_grad():
        for ours, parameter in _own_tensors(model).items():
            if ours in hf_name_of:
                parameter.copy_(tensors.pop(hf_name_of[ours]))
                accounting.loaded.append(ours)
    return accounting


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Our name -> parameter, each shared tensor once (under the embedding's name)."""
    return dict(model.named_parameters(remove_duplicate=True))


def _raise_if_any(folder: Path, **problems: list[str]) -> None:
    lines = [f"  {kind}: {_some(names)}" for kind, names in problems.items() if names]
    if lines:
        raise ModelError(
            f"{folder}: the tensors do not fit config.json\n" + "\n".join(lines)
            + "\nCheck that weights and config belong together."
        )


def _some(names: list[str], most: int = 8) -> str:
    """The names, or the first of them and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def hf_tensors(model: nn.Module, family: Family, *, bare: bool = False) -> dict[str, Tensor]:
    """HF name -> tensor of every parameter, each shared tensor once."""
    return {
        family.to_hf(name, bare=bare): tensor.detach().cpu().contiguous()
        for name, tensor in _own_tensors(model).items()
    }


def save_weights(tensors: dict[str, Tensor], folder: Path, *, max_shard_bytes: int) -> None:
    """Write one safetensors file, or shards with an index once they exceed `max_shard_bytes`."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / SINGLE, metadata={"format": "pt"})
        return
    weight_map = {}
    for index, shard in enumerate(shards, start=1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    (folder / INDEX).write_text(text, "utf-8")
