"""Adapters of modules that HF keeps as one and we keep apart, each part with factors of its own.

    A = [A_1; A_2; ..]                             (k R, C) for k adapted parts
    B = B_i in the rows of part i and in the columns of A_i, zero elsewhere

so B A is B_i A_i in the rows of part i: the same update, of rank k R (R of a part, C input width);
alpha grows so that the scale stays. Back, a file of ours is cut along these blocks; in one of
peft's all parts share one A, so each gets it with its rows of B. `module[i]` is part i of HF's.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ftcore.errors import ModelError
from ftcore.model.families import Family

PREFIX = "base_model.model."
A, B = "lora_A.weight", "lora_B.weight"
PART = re.compile(r"\[(\d+)\]")
Tensors = dict[str, Tensor]
Places = Mapping[str, Sequence[int]]  # which parts of each fused module are adapted

def part_name(family: Family, our_name: str) -> str:
    """HF name of a module of ours, with its place in it where HF keeps several in one."""
    hf_name = family.to_hf(our_name)
    parts = family.to_ours(hf_name)
    return f"{hf_name}[{parts.index(our_name)}]" if len(parts) > 1 else hf_name

def whole(name: str) -> str:
    """The module of a part, or of a key that names one."""
    return PART.sub("", name)

def cut(key: str) -> tuple[str, str]:
    """Module or part, and attribute, of a tensor of an adapter file."""
    name = key.removeprefix(PREFIX)
    attribute = next((f for f in (A, B) if name.endswith(f".{f}")), name.rpartition(".")[2])
    return name.removesuffix(f".{attribute}"), attribute

def join_parts(tensors: Tensors, family: Family, num_heads: int) -> tuple[Tensors, Places]:
    """Tensors as HF's modules have them; and which parts of each fused one are adapted. Raises
    ModelError where some parts of a module are trained fully, others not."""
    groups: dict[str, dict[int, Tensor]] = {}
    for key, tensor in tensors.items():
        place = PART.search(key)
        groups.setdefault(whole(key), {})[int(place[1]) if place else 0] = tensor
    joined, adapted = {}, {}
    for key, group in groups.items():
        module, attribute = cut(key)
        ours, places = family.to_ours(module), sorted(group)
        parts = [group[place] for place in places]
        if attribute == A:
            joined[key] = torch.cat(parts)
            if len(ours) > 1:
                adapted[module] = places
        elif attribute == B:
            empty = parts[0].new_zeros(len(parts[0]), 0)
            rows = torch.block_diag(*(group.get(i, empty) for i in range(len(ours))))
            joined[key] = family.join(module, rows.split(len(empty)), num_heads)
        elif len(parts) < len(ours):
            what = f"{module} is one module for peft"
            raise ModelError(f"{what}: train all of {', '.join(ours)} fully, or none")
        else:
            joined[key] = family.join(f"{module}.{attribute}", parts, num_heads)
    return {key: tensor.contiguous() for key, tensor in joined.items()}, adapted

def split_parts(tensors: Tensors, adapted: Places, family: Family, num_heads: int) -> Tensors:
    """Undoes `join_parts`; a module not in `adapted` is as peft's. ModelError: it has no parts."""
    split: Tensors = {}
    for key, tensor in tensors.items():
        module, attribute = cut(key)
        if not (count := len(family.to_ours(module))):  # the caller reports what nobody knows
            split[key] = tensor
            continue
        places = adapted.get(module, range(count))
        names = [f"{PREFIX}{module}[{i}].{attribute}" for i in places] if count > 1 else [key]
        try:
            if attribute == A:
                pieces = tensor.chunk(len(places)) if module in adapted else [tensor] * count
            elif attribute == B:
                rows = family.split(module, tensor, num_heads)
                pieces = [rows[place] for place in places]
                if module in adapted:
                    pieces = [part.chunk(len(places), dim=1)[i] for i, part in enumerate(pieces)]
            else:
                pieces = family.split(f"{module}.{attribute}", tensor, num_heads)
            split.update(zip(names, pieces, strict=True))
        except (RuntimeError, IndexError, ValueError) as error:
            what = f"{key} is {list(tensor.shape)}: it holds no {len(places)} parts"
            raise ModelError(what) from error
    return split
