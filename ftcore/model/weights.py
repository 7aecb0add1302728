"""Safetensors in, with every tensor accounted for (law 7). Pickle is never read.

Names and shapes are checked before anything is copied; then tensors are copied into memory that we
own, so a file that changes later cannot change or kill a running model.
source: safetensors format, 8-byte little-endian header length, JSON header, raw tensor data
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ftcore.errors import ModelError
from ftcore.hub import BUILTIN
from ftcore.model.families import Family, matches

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
EMBEDDING, HEAD = "trunk.embed_tokens.weight", "head.lm_head.weight"
FLOATS = ("BF16", "F16", "F32", "F64")

@dataclass
class Accounting:
    """What happened to each tensor of a checkpoint and of the model."""
    loaded: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        others = {"not needed": self.ignored, "new, drawn at random": self.new}
        more = (f", {len(some)} {kind} ({_some(some)})" for kind, some in others.items() if some)
        return f"{len(self.loaded)} tensors loaded{''.join(more)}"

def tensor_files(folder: Path) -> dict[str, Path]:
    """HF tensor name -> the file that holds it, from one file or from shards with an index. Raises
    ModelError: no safetensors, a pickled model only, an unreadable header, an index that names
    other files than bare names or tensors that its files do not hold."""
    if (folder / INDEX).is_file():
        try:
            weight_map = dict(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"])
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
        if folder in BUILTIN.values():
            hint = " It comes with this repository: get it back with git checkout."
        raise ModelError(f"{folder}: neither {SINGLE} nor {INDEX} is there.{hint}")
    found = {name: file for file in files for name in _header(file)}
    if weight_map is not None and set(weight_map) != set(found):
        odd = sorted(set(weight_map) ^ set(found))
        raise ModelError(f"{folder / INDEX}: index and shards differ in {_some(odd)}")
    return found

def _header(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Tensor name -> dtype and shape of one safetensors file; duplicate names are refused."""
    try:
        with safe_open(file, framework="pt"), open(file, "rb") as raw:  # the former checks it all
            size = int.from_bytes(raw.read(8), "little")
            pairs = json.loads(raw.read(size), object_pairs_hook=list)
        header = {name: dict(part) for name, part in pairs if name != "__metadata__"}
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError(f"a name occurs twice in {_some(sorted(name for name, _ in pairs))}")
    except (SafetensorError, OSError, ValueError) as error:
        said = f"{file}: not a whole safetensors file ({error}). Copy or download it again."
        raise ModelError(said) from error
    return {name: (part["dtype"], part["shape"]) for name, part in header.items()}

def mapped_tensors(
    names: Collection[str], files: Mapping[str, Path]
) -> Iterator[tuple[str, Tensor]]:
    """The named tensors, each a view of its file, to be read at once and then let go."""
    for file in {files[name]: None for name in names}:
        with safe_open(file, framework="pt") as handle:
            yield from ((name, handle.get_tensor(name)) for name in names if files[name] == file)

def load_weights(
    model: nn.Module, folder: Path, family: Family, *, may_be_new: Collection[str] = ()
) -> Accounting:
    """Fill `model` from a checkpoint folder; its parameters keep their dtype and device. Modules of
    `may_be_new`, by our names, may be absent as a whole, such as a new head: they keep their values
    and are listed. ModelError: all missing, unexpected and mis-shaped tensors, in one message."""
    files = tensor_files(folder)
    headers = {name: found for file in set(files.values()) for name, found in _header(file).items()}
    wanted = dict(model.named_parameters())  # a shared one once, under the embedding's name
    ours_of = {hf_name: family.to_ours(hf_name) for hf_name in headers}
    modules = {name.rpartition(".")[0] for name in wanted}
    hf_name_of: dict[str, str] = {}
    ignored, unexpected, misfits = [], [], []
    for hf_name, (dtype, shape) in sorted(headers.items()):
        first = next(iter(ours_of[hf_name]), "")
        if first not in wanted:
            other_head = first.startswith("head.") and first.rpartition(".")[0] not in modules
            is_tied = first == HEAD and model.spec.tie_word_embeddings
            is_needless = other_head or is_tied or matches(hf_name, family.ignored)
            (ignored if is_needless else unexpected).append(hf_name)
            continue
        if first in hf_name_of:
            unexpected.append(f"{hf_name} beside {hf_name_of[first]}")
        elif shape != (fitting := family.hf_shape(hf_name, wanted[first].shape)):
            misfits.append(f"{hf_name} is {shape}, must be {fitting}")
        elif dtype not in FLOATS:
            misfits.append(f"{hf_name} is {dtype}, must be one of {', '.join(FLOATS)}")
        hf_name_of.update(dict.fromkeys(ours_of[hf_name], hf_name))
    absent = [name for name in wanted if name not in hf_name_of]
    new_modules = set(may_be_new) - {name.rpartition(".")[0] for name in hf_name_of}
    new = [name for name in absent if name.rpartition(".")[0] in new_modules]
    # A fused tensor is missing once.
    missing = list(dict.fromkeys(family.to_hf(name) for name in absent if name not in new))
    problems = {"missing": missing, "unexpected": unexpected, "misfit": misfits}
    if lines := [f"  {kind}: {_some(names)}" for kind, names in problems.items() if names]:
        head = f"{folder}: the tensors do not fit the model of config.json"
        advice = "Check that weights, config and number of labels belong together."
        raise ModelError("\n".join([head, *lines, advice]))
    if model.spec.tie_word_embeddings:
        _refuse_untied(ours_of, files)
    with torch.no_grad():
        for hf_name, tensor in mapped_tensors(dict.fromkeys(hf_name_of.values()), files):
            targets = [wanted[name] for name in ours_of[hf_name]]
            if matches(hf_name, family.transposed):  # cost: in the dtype first, half the time
                tensor = tensor.to(targets[0].dtype)
            parts = family.split(hf_name, tensor, model.spec.num_heads)
            for target, part in zip(targets, parts, strict=True):
                target.copy_(part)
    return Accounting([name for name in wanted if name in hf_name_of], ignored, new)

def hf_tensors(
    state: Mapping[str, Tensor], family: Family, num_heads: int, *, bare: bool
) -> dict[str, Tensor]:
    """HF name -> tensor of all of ours, on the CPU; `bare` leaves out the trunk's prefix."""
    tensors = {}
    for hf_name in dict.fromkeys(family.to_hf(name, bare=bare) for name in state):
        parts = [state[name].detach().cpu() for name in family.to_ours(hf_name)]
        tensor = family.join(hf_name, parts, num_heads).contiguous()
        # HF: its writer refuses a view of a larger storage, which a trained parameter may be
        is_whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        tensors[hf_name] = tensor if is_whole else tensor.clone()
    return tensors

def _refuse_untied(ours_of: Mapping[str, tuple[str, ...]], files: Mapping[str, Path]) -> None:
    """Raise ModelError where a tied model's file holds an LM head of its own."""
    hf_names = {ours: hf_name for hf_name, names in ours_of.items() for ours in names}
    if (name := hf_names.get(HEAD)) is None:
        return
    pair = dict(mapped_tensors([name, hf_names[EMBEDDING]], files))
    if not torch.equal(*pair.values()):
        what = f"{files[name]}: {name} differs from the embeddings, which config.json ties it to"
        raise ModelError(f"{what}: set tie_word_embeddings to false, or remove {name}")

def _some(names: list[str], most: int = 8) -> str:
    """The names, or the first of them and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
