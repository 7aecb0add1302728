"""Adapters on disk in the peft package's format: peft and vLLM load ours, and we what peft saves.

    adapter_config.json         what is wrapped and how
    adapter_model.safetensors   base_model.model.<HF module>.lora_A.weight (R, C), .lora_B.weight
                                (O, R); fully trained modules as base_model.model.<HF parameter>
    ftcore_adapter.json         hash of the base that the adapter was trained on, how that was
                                quantised, and the adapted parts of fused modules; peft ignores it

Of modules that HF keeps as one and we keep apart, each part has factors of its own. HF's has

    A = [A_1; A_2; ..]                             (k R, C) for k adapted parts
    B = B_i in the rows of part i and in the columns of A_i, zero elsewhere

so B A is B_i A_i in the rows of part i: the same update, of rank k R (R of a part, C input width);
alpha grows so that the scale stays. Back, a file of ours is cut along these blocks; in one of
peft's all parts share one A, so each gets it with its rows of B. `module[i]` is part i of HF's.

source  peft docs, "PEFT checkpoint format"; peft 0.21 utils/save_and_load.py
"""

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ftcore.config import PeftConfig
from ftcore.errors import ModelError
from ftcore.files import MANIFEST, current, verify_folder, write_folder
from ftcore.model.families import Family
from ftcore.model.heads import Model
from ftcore.model.load import read_object
from ftcore.tune import lora
from ftcore.tune.freeze import tensor_sha256

CONFIG, WEIGHTS, ORIGIN = "adapter_config.json", "adapter_model.safetensors", "ftcore_adapter.json"
PREFIX, A, B = "base_model.model.", "lora_A.weight", "lora_B.weight"
PART = re.compile(r"\[(\d+)\]")
Tensors = dict[str, Tensor]
Places = Mapping[str, Sequence[int]]  # which parts of each fused module are adapted
Names = dict[str, str]  # HF name, perhaps of a part -> ours
Layout = dict[str, tuple[str, tuple[int, ...]]]  # key in the file -> our parameter, its shape

# peft: options that give the same tensors another meaning, or the model other tensors.
UNKNOWN_OPTIONS = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "rank_pattern", "alpha_pattern",
    "layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens",
    "arrow_config", "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip
KNOWN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # peft: others change the base

def base_sha256(model: nn.Module, *, without: Collection[str] = ()) -> str:
    """Hash of the base weights but those that the adapter brings: the same wrapped or not, merged
    or not, quantised or not, in bf16, fp32 or float64: each tensor is rounded to bf16 first."""
    digests = {}
    for name, module in lora.plain_modules(model).items():
        for attribute, param in module.named_parameters(recurse=False):
            digests[f"{name}.{attribute}"] = tensor_sha256(param.bfloat16())
        if isinstance(module, lora.NF4Linear):
            digests[f"{name}.weight"] = module.sha256
    lines = (f"{name} {digests[name]}\n" for name in sorted(digests.keys() - set(without)))
    return hashlib.sha256("".join(lines).encode()).hexdigest()

def named_parts(model: Model, family: Family, adapter: str = lora.DEFAULT) -> tuple[Names, Names]:
    """Layers of an adapter; fully trained modules. ModelError: no layers, or one has no HF name."""
    layers = lora.lora_layers(model).items()
    if not (adapted := [name for name, layer in layers if adapter in layer.adapters]):
        raise ModelError(f"the model has no LoRA layers of {adapter!r}: no adapter to save")
    # peft saves a module outside LoRA as a whole, so one that owns a trained parameter is taken.
    extra = {
        part_name(family, name): name
        for name, module in lora.plain_modules(model).items()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    }
    return {part_name(family, name): name for name in adapted}, extra

def save_adapter(
    model: Model, folder: Path, *, family: Family, base_path: str, task_type: str,
    name: str = lora.DEFAULT,
) -> None:  # fmt: skip
    """Write an adapter's factors and every fully trained module; the folder appears whole or not.

    `base_path` is the folder or hub id of the base model, for the reader to find it; `task_type`
    peft's word for the head: "CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION". Raises ModelError: as
    `named_parts`; CheckpointError: the folder cannot be written."""
    layers, extra = named_parts(model, family, name)
    config = model.get_submodule(next(iter(layers.values()))).adapters[name].config
    names = {k: n for k, (n, _) in _layout(model, layers, extra, name, config.rank).items()}
    # HF: safetensors refuses tensors that share memory, so tied ones are written twice.
    tensors = {key: model.get_parameter(n).detach().cpu().clone() for key, n in names.items()}
    tensors, parts = join_parts(tensors, family, model.spec.num_heads)
    peft_config = {
        "peft_type": "LORA", "task_type": task_type, "base_model_name_or_path": base_path,
        "r": config.rank, "use_rslora": config.rs_lora, "lora_dropout": config.dropout,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "target_modules": list(dict.fromkeys(map(whole, layers))),
        "modules_to_save": list(dict.fromkeys(map(whole, extra))) or None,
        "bias": "none", "inference_mode": True,
        **({"fan_in_fan_out": True} if family.transposed else {}),  # as HF's matrices
    }  # fmt: skip
    origin = {"base_sha256": base_sha256(model, without=names.values()), "scale": config.scale}
    origin |= {"quantize": "nf4"} if lora.quantised_layers(model) else {}
    if parts:  # peft: a fused module has the rank of all its parts
        counts = {module: len(places) for module, places in parts.items()}
        power = 0.5 if config.rs_lora else 1.0
        peft_config["rank_pattern"] = {m: n * config.rank for m, n in counts.items()}
        peft_config["alpha_pattern"] = {m: n**power * config.alpha for m, n in counts.items()}
        origin["parts"] = parts

    def write(temp: Path) -> None:
        save_file(tensors, temp / WEIGHTS, metadata={"format": "pt"})
        (temp / CONFIG).write_text(json.dumps(peft_config, indent=2) + "\n", "utf-8")
        (temp / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", "utf-8")

    write_folder(folder, write)

def load_adapter(model: Model, folder: Path, *, family: Family, name: str = lora.DEFAULT) -> None:
    """Wrap a base model and fill it from an adapter folder, ours or peft's; quantise it first where
    the adapter was trained so. The one called `name` then answers; a load that fails changes
    nothing. Raises ModelError: unreadable files, an option of peft's that we do not have, another
    base, and in one message every missing, unexpected or mis-shaped tensor; CheckpointError: a file
    is not the one that the folder's manifest lists; ConfigError: as `apply_lora`."""
    folder = current(folder)
    if (folder / MANIFEST).is_file():
        verify_folder(folder)
    options = read_object(folder / CONFIG)
    origin = read_object(folder / ORIGIN) if (folder / ORIGIN).is_file() else {}
    parts = origin.get("parts", {})
    options |= {"rank_pattern": {}, "alpha_pattern": {}} if parts else {}  # those that we write
    if not (path := folder / WEIGHTS).is_file():
        raise ModelError(f"{path} is not there. A pickled .bin is never read: convert it")
    try:
        tensors = split_parts(load_file(path), parts, family, model.spec.num_heads)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error}): copy it anew") from error
    layers, extra = _held_or_listed(model, family, options, tensors)
    config = _lora_config(folder / CONFIG, options, layers, extra)
    layout = _layout(model, layers, extra, name, config.rank)
    _account(folder, {key: shape for key, (_, shape) in layout.items()}, tensors)
    incoming = {ours: tensors[key] for key, (ours, _) in layout.items()}
    _refuse_untied(folder, model, incoming)
    ours = base_sha256(model, without=incoming) if origin else None  # peft records none
    if (theirs := origin.get("base_sha256")) != ours:
        what = f"{folder / ORIGIN}: this adapter was trained on another base model"
        raise ModelError(f"{what}: SHA-256 {theirs}, here {ours}. {CONFIG} names the right one")
    wants_nf4, has_nf4 = "quantize" in origin, bool(lora.quantised_layers(model))
    if origin and wants_nf4 != has_nf4 and (has_nf4 or lora.lora_layers(model)):
        kinds = ("not in NF4", "in NF4")
        what = f"{folder / ORIGIN}: the adapter was trained on a base {kinds[wants_nf4]}, this one"
        raise ModelError(f"{what} is {kinds[has_nf4]}: load it on a base model of its own")
    lora.apply_lora(model, config, generator=torch.Generator(), name=name)
    if wants_nf4:
        lora.quantise_frozen(model)
    with torch.no_grad():
        for ours, tensor in incoming.items():
            model.get_parameter(ours).copy_(tensor)

def _layout(model: nn.Module, layers: Names, extra: Names, adapter: str, rank: int) -> Layout:
    """What the file of an adapter holds; the model may be wrapped or not."""
    plain, layout = lora.plain_modules(model), {}
    for hf_name, name in layers.items():
        linear, ours = plain[name], f"{name}.adapters.{adapter}"
        layout[f"{PREFIX}{hf_name}.{A}"] = f"{ours}.lora_a", (rank, linear.in_features)
        layout[f"{PREFIX}{hf_name}.{B}"] = f"{ours}.lora_b", (linear.out_features, rank)
    for hf_name, name in extra.items():
        for attribute, p in plain[name].named_parameters(recurse=False):
            layout[f"{PREFIX}{hf_name}.{attribute}"] = f"{name}.{attribute}", tuple(p.shape)
    return layout

def _held_or_listed(
    model: nn.Module, family: Family, options: dict, keys: Collection[str]
) -> tuple[Names, Names]:
    """Linear layers that the file adapts or lists; modules that it holds fully, or lists."""
    targets, saved = options.get("target_modules"), options.get("modules_to_save")
    # peft: with one of these, or a regular expression, only the tensors say which layers it is.
    partial = options.get("layers_to_transform") or options.get("exclude_modules")
    targets = targets if isinstance(targets, list) and not partial else []
    saved = saved if isinstance(saved, list) else []
    present, owners = {whole(cut(k)[0]) for k in keys}, {k.rpartition(".")[0] for k in keys}
    layers, extra = {}, {}
    for name, module in lora.plain_modules(model).items():
        if not isinstance(module, nn.Linear) and not list(module.parameters(recurse=False)):
            continue
        try:
            hf_name = part_name(family, name)
        except ModelError:  # HF has none for it
            continue
        path = f".{whole(hf_name)}"
        is_held = any(f"{PREFIX}{hf_name}.{factor}" in keys for factor in (A, B))
        is_listed = path[1:] not in present and any(path.endswith(f".{t}") for t in targets)
        if isinstance(module, nn.Linear) and (is_held or is_listed):
            layers[hf_name] = name
        elif PREFIX + hf_name in owners or any(f".{m}." in f"{path}." for m in saved):
            extra[hf_name] = name
    return layers, extra

def _lora_config(path: Path, options: dict, layers: Names, extra: Names) -> PeftConfig:
    """Peft's options as ours; one that would change the numbers and is not known is refused."""
    refused = [f"{k} = {options[k]!r} is not known" for k in UNKNOWN_OPTIONS if options.get(k)]
    if options.get("peft_type") != "LORA":
        refused.append(f"peft_type = {options.get('peft_type')!r} must be 'LORA'")
    if options.get("bias", "none") != "none":
        refused.append(f"bias = {options['bias']!r} must be 'none'")
    if (start := options.get("init_lora_weights", True)) not in KNOWN_STARTS:
        refused.append(f"init_lora_weights = {start!r} changes the base: convert to plain LoRA")
    rank, alpha, dropout = (options.get(key) for key in ("r", "lora_alpha", "lora_dropout"))
    are_numbers = type(rank) is int and {type(alpha), type(dropout)} <= {int, float}
    if not are_numbers or rank < 1 or not 0 < alpha < math.inf or not 0 <= dropout < 1:
        said = f"r = {rank!r}, lora_alpha = {alpha!r}, lora_dropout = {dropout!r}"
        refused.append(f"{said} must be numbers: from 1 on, above 0, in [0, 1)")
    if refused:
        raise ModelError(f"{path}: {'; '.join(refused)}")
    return PeftConfig(
        method="lora", rank=rank, alpha=alpha, dropout=dropout, targets=tuple(layers.values()),
        rs_lora=bool(options.get("use_rslora")), extra_modules=tuple(extra.values()),
    )  # fmt: skip

def _account(folder: Path, shapes: dict[str, tuple], tensors: Mapping[str, Tensor]) -> None:
    """Refuse a file that does not hold exactly the tensors that its config implies (law 7)."""
    given = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    problems = [f"missing: {key}" for key in shapes.keys() - given.keys()]
    problems += [f"unexpected: {key}" for key in given.keys() - shapes.keys()]
    misfits = (key for key, shape in shapes.items() if given.get(key, shape) != shape)
    problems += [f"mis-shaped: {k} is {given[k]}, must be {shapes[k]}" for k in misfits]
    if problems:
        listing = "\n  ".join(sorted(problems))
        raise ModelError(f"{folder / WEIGHTS} does not fit {CONFIG} and this model:\n  {listing}")

def _refuse_untied(folder: Path, model: nn.Module, incoming: Mapping[str, Tensor]) -> None:
    """Refuse different values for the two names of one tied matrix."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in incoming.keys() & parameters.keys():
        for other in (n for n, p in parameters.items() if p is parameters[name]):
            if other not in incoming or not torch.equal(incoming[name], incoming[other]):
                what = f"{folder / WEIGHTS}: trains {name} apart from {other}, tied in this model"
                raise ModelError(f"{what}: untie its base (tie_word_embeddings = false), save anew")

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
