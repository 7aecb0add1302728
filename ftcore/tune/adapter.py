"""What a finished run leaves for others (README.md, "Folders"): an HF model folder, or an adapter
in the peft package's format: peft and vLLM load ours, and we what peft saves.

Of modules that HF keeps as one and we keep apart, each of k parts has factors of its own. HF's has

    A = [A_1; A_2; ..]   (k R, C)     B = B_i in the rows of part i and the columns of A_i, else 0

so B A is B_i A_i in the rows of part i: the same update, of rank k R (R of a part, C input width);
alpha grows so that the scale stays. In a file of peft's all parts share one A."""

import hashlib
import json
import math
import tomllib
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any
import torch
from safetensors.torch import save_file
from torch import nn
from ftcore import files
from ftcore.config import PeftConfig, Run
from ftcore.data.tokenizer import Tokenizer
from ftcore.errors import ConfigError, ModelError
from ftcore.hub import lineage
from ftcore.model import load
from ftcore.model.families import Family
from ftcore.model.heads import EMBEDDING, HEAD, Model
from ftcore.tune import freeze, lora
from ftcore.tune.task import TaskKind

MODEL, ADAPTER, LABELS = "model", "adapter", "labels.json"
CONFIG, WEIGHTS, ORIGIN = "adapter_config.json", "adapter_model.safetensors", "ftcore_adapter.json"
PREFIX, A, B = "base_model.model.", "lora_A.weight", "lora_B.weight"
Parts = dict[str, tuple[str, ...]]  # HF module -> ours that are in it
PEFT = tomllib.loads(Path(__file__).with_name("peft.toml").read_text("utf-8"))
KNOWN_VALUES = PEFT["known"] | dict.fromkeys(PEFT["off"], [None, False, {}, []])

def base_sha256(model: nn.Module, *, without: Collection[str] = ()) -> str:
    """Hash of the base, rounded to bf16, but for modules that the adapter brings; merged or not."""
    lines = [f"{name}.{attribute} {freeze.tensor_sha256(param.bfloat16())}\n"
             for name, module in lora.plain_modules(model).items() if name not in without
             for attribute, param in module.named_parameters(recurse=False)]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()

def named_parts(model: Model, family: Family) -> tuple[Parts, Parts]:
    """Layers of an adapter; fully trained modules. Raises ModelError: no layers, one has no HF
    name, or of those that HF keeps as one, some are adapted or trained fully and others not."""
    if not (adapted := lora.lora_layers(model)):
        raise ModelError("the model has no LoRA layers: no adapter to save")
    plain = lora.plain_modules(model).items()  # peft saves whole what owns a trained parameter
    owners = [n for n, m in plain if any(p.requires_grad for p in m.parameters(recurse=False))]
    for names in (adapted, owners):
        for module, ours in _by_hf(family, names).items():
            if not set(ours) <= set(names):
                raise ModelError(f"{module} is one for peft: train {', '.join(ours)} alike")
    return _by_hf(family, adapted), _by_hf(family, owners)

def _by_hf(family: Family, names: Iterable[str]) -> Parts:
    return {module: family.to_ours(module) for module in map(family.to_hf, names)}

def save_adapter(model: Model, folder: Path, *, family: Family, base_path: str) -> None:
    """Write an adapter's factors and every fully trained module. `base_path` is the folder or hub
    id of the base model, for the reader to find it. Raises ModelError: as `named_parts`;
    CheckpointError: the folder cannot be written."""
    layers, extra = named_parts(model, family)
    tensors, modules, H = {}, [*chain(*extra.values())], model.spec.num_heads
    for module, parts in layers.items():
        own = [model.get_submodule(part) for part in parts]
        config, b_OR = own[0].config, torch.block_diag(*(layer.lora_b for layer in own))
        tensors[f"{PREFIX}{module}.{A}"] = torch.cat([layer.lora_a for layer in own])
        tensors[f"{PREFIX}{module}.{B}"] = family.join(module, b_OR.split(len(own[0].lora_b)), H)
    for key, names in _trained_fully(model, family, modules).items():
        tensors[PREFIX + key] = family.join(key, [*map(model.get_parameter, names)], H)
    # HF: safetensors refuses tensors that share memory, so tied ones are written twice.
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    peft_config = {
        "peft_type": "LORA", "bias": "none", "inference_mode": True, "use_rslora": config.rs_lora,
        "task_type": PEFT["task_types"][model.task], "base_model_name_or_path": base_path,
        "r": config.rank, "lora_dropout": config.dropout, "modules_to_save": list(extra) or None,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "target_modules": list(layers), **({"fan_in_fan_out": True} if family.transposed else {})}
    origin = {"base_sha256": base_sha256(model, without=modules), "scale": config.scale}
    if fused := {module: len(parts) for module, parts in layers.items() if len(parts) > 1}:
        power = 0.5 if config.rs_lora else 1.0
        peft_config["rank_pattern"] = {m: k * config.rank for m, k in fused.items()}
        peft_config["alpha_pattern"] = {m: k**power * config.alpha for m, k in fused.items()}
    with files.write_folder(folder) as temp:
        save_file(tensors, temp / WEIGHTS, metadata={"format": "pt"})
        (temp / CONFIG).write_text(json.dumps(peft_config, indent=2) + "\n", "utf-8")
        (temp / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", "utf-8")

def load_adapter(model: Model, folder: Path, *, family: Family) -> None:
    """Wrap a base model and fill it from an adapter folder, ours or peft's; a load that fails
    changes nothing. Raises ModelError: unreadable files, an unknown option of peft's, another base,
    or as `refuse_misfits`; CheckpointError: as `verify_folder`; ConfigError: as `apply_lora`."""
    if (folder / files.MANIFEST).is_file():
        files.verify_folder(folder)
    options = load.read_object(folder / CONFIG, advice=". A finished LoRA run, or peft, has it")
    origin = load.read_object(folder / ORIGIN) if (folder / ORIGIN).is_file() else {}
    options |= {"rank_pattern": {}, "alpha_pattern": {}} if origin else {}  # those that we write
    tensors = dict(load.mapped(held := load.stored_tensors(folder, WEIGHTS), held))
    layers, extra = _held_or_listed(model, family, options, tensors)
    config = _lora_config(folder / CONFIG, options, layers, extra)
    trained = _trained_fully(model, family, config.extra_modules)
    plain, shapes = lora.plain_modules(model), {}
    for module, parts in layers.items():
        linear, rank = plain[parts[0]], config.rank * (len(parts) if origin else 1)
        shapes[f"{PREFIX}{module}.{A}"] = [rank, linear.in_features]
        shapes[f"{PREFIX}{module}.{B}"] = [linear.out_features * len(parts), rank]
    for key, names in trained.items():
        shapes[PREFIX + key] = family.hf_shape(key, model.get_parameter(names[0]).shape)
    load.refuse_misfits(f"{folder / WEIGHTS} does not fit {CONFIG} and this model", held, shapes)
    H, incoming = model.spec.num_heads, {}
    for module, parts in layers.items():
        parts_A = tensors[f"{PREFIX}{module}.{A}"].split(config.rank)
        rows = family.split(module, tensors[f"{PREFIX}{module}.{B}"], H)
        for i, part in enumerate(parts):
            incoming[f"{part}.lora_a"] = parts_A[i % len(parts_A)]
            incoming[f"{part}.lora_b"] = rows[i].split(config.rank, dim=1)[i % len(parts_A)]
    for key, names in trained.items():
        incoming |= zip(names, family.split(key, tensors[PREFIX + key], H), strict=True)
    tied = [incoming[name] for name in (EMBEDDING, HEAD) if name in incoming and model.is_tied]
    if tied and not (tied[1:] and torch.equal(*tied)):
        what = f"{folder / WEIGHTS}: trains {EMBEDDING} apart from {HEAD}, tied in this model"
        raise ModelError(f"{what}: untie its base (tie_word_embeddings = false), save anew")
    ours = base_sha256(model, without=config.extra_modules) if origin else None  # peft records none
    if (theirs := origin.get("base_sha256")) != ours:
        what = f"{folder / ORIGIN}: this adapter was trained on another base model"
        raise ModelError(f"{what}: SHA-256 {theirs}, here {ours}. {CONFIG} names the right one")
    lora.apply_lora(model, config, generator=torch.Generator())
    model.load_state_dict(incoming, strict=False)  # all that it does not bring stays

def _trained_fully(model: nn.Module, family: Family, modules: Collection[str]) -> Parts:
    """HF name of each tensor of such modules -> names of our parameters in it."""
    names = (name for name, _ in model.named_parameters(remove_duplicate=False))
    return _by_hf(family, [name for name in names if name.rpartition(".")[0] in modules])

def _held_or_listed(model: nn.Module, family: Family, options: dict,
                    keys: Collection[str]) -> tuple[Parts, Parts]:
    """Linear layers that the file adapts or lists; modules that it holds fully, or lists."""
    # peft: with one of these, or a regular expression, only the tensors say which layers it is.
    partial = options.get("layers_to_transform") or options.get("exclude_modules")
    listed = () if partial else options.get("target_modules"), options.get("modules_to_save")
    targets, saved = (names if isinstance(names, list) else () for names in listed)
    owners = {key.removeprefix(PREFIX).rpartition(".")[0] for key in keys}
    plain, layers, extra = lora.plain_modules(model), {}, {}
    for module, parts in _by_hf(family, plain).items():
        path, is_owner = f".{module}", module in owners
        is_held = f"{module}.lora_A" in owners or f"{module}.lora_B" in owners
        is_listed = not is_owner and any(path.endswith(f".{target}") for target in targets)
        if (is_held or is_listed) and all(isinstance(plain[p], nn.Linear) for p in parts):
            layers[module] = parts
        elif is_owner or any(f".{m}." in f"{path}." for m in saved):
            extra[module] = parts
    return layers, extra

def _lora_config(path: Path, options: dict, layers: Parts, extra: Parts) -> PeftConfig:
    """Peft's options as ours; one that would change the numbers and is not known is refused."""
    refused = [f"{key} = {options[key]!r} must be {known[0]!r}: convert it to plain LoRA"
               for key, known in KNOWN_VALUES.items() if options.get(key, known[0]) not in known]
    rank, alpha, dropout = (options.get(key) for key in ("r", "lora_alpha", "lora_dropout"))
    are_numbers = type(rank) is int and {type(alpha), type(dropout)} <= {int, float}
    if not are_numbers or rank < 1 or not 0 < alpha < math.inf or not 0 <= dropout < 1:
        said = f"r = {rank!r}, lora_alpha = {alpha!r}, lora_dropout = {dropout!r}"
        refused.append(f"{said} must be numbers: from 1 on, above 0, in [0, 1)")
    if refused:
        raise ModelError(f"{path}: {'; '.join(refused)}")
    targets, modules = (tuple(chain(*parts.values())) for parts in (layers, extra))
    return PeftConfig(method="lora", rank=rank, alpha=alpha, dropout=dropout, targets=targets,
                      rs_lora=bool(options.get("use_rslora")), extra_modules=modules)

def save_artifact(loaded: load.LoadedModel, tokenizer: Tokenizer, run: Path, config: Run) -> Path:
    """Write the trained model of a run; returns its folder."""
    if loaded.labels:
        files.write_file(run / LABELS, json.dumps(loaded.labels, ensure_ascii=False) + "\n")
    if lora.lora_layers(loaded.model):
        save_adapter(loaded.model, run / ADAPTER, family=loaded.family, base_path=config.model.path)
        return run / ADAPTER
    with files.write_folder(run / MODEL) as folder:
        load.save_model(loaded, folder, problem=config.problem)
        tokenizer.save(folder)
    return run / MODEL

def load_base(path: str, *, keeps_last: bool = False, **how: Any) -> load.LoadedModel:
    """What `model.path` names, as `load_model` reads it; of adapters, with each folded into the
    matrices under it, or the last left on them. Raises ModelError: as these and `hub.lineage`."""
    folder, adapters = lineage(path)
    loaded = load.load_model(folder, **how)
    for adapter in adapters:
        lora.fold(loaded.model)
        load_adapter(loaded.model, adapter, family=loaded.family)
    if not keeps_last:
        lora.fold(loaded.model)
    return loaded

def load_artifact(run: Path, *, kind: TaskKind, dtype: torch.dtype) -> load.LoadedModel:
    """The trained model of a finished run, an adapter of it apart from its base. Raises ModelError:
    the run has left neither, or its files are damaged."""
    if not ((run / MODEL).is_dir() or (run / ADAPTER).is_dir()):
        what = f"{run}: has neither {MODEL}/ nor {ADAPTER}/, so the run has not finished"
        raise ModelError(f"{what}; continue it with: python train.py --resume {run}")
    file = run / LABELS
    labels = tuple(json.loads(file.read_bytes())) if file.is_file() else None
    return load_base(str(run), keeps_last=True, task=kind.model_task, dtype=dtype, labels=labels,
                     generator=torch.Generator())  # draws the head that an adapter then replaces

def fingerprint(*hashes: str) -> str:
    """Of what answers: its base, and the adapters on it."""
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]

def share_base(loaded: load.LoadedModel, words: Sequence[str], taken: Collection[str],
               hashes: Sequence[str]) -> dict[str, str]:
    """Put adapters side by side on a generator, each NAME=DIR: a finished run, or a folder of an
    adapter. Returns by name the fingerprint, of the base's `hashes` and the adapter. ConfigError:
    no generator, a name that is `taken`, modules trained fully; and as `load_adapter`."""
    model, shared, prints = loaded.model, {}, {}  # shared[layer][adapter]
    if words and model.task != "lm":
        mend = "leave out --adapter, or serve the adapter's run by itself"
        raise ConfigError(f"{loaded.folder} does not generate, so requests find no adapter: {mend}")
    for word in words:
        lora.fold(model)
        name, _, path = word.partition("=")
        if not name or not path or name in (*taken, *prints):
            others = ", ".join(dict.fromkeys((*taken, *prints)))
            raise ConfigError(f"--adapter {word}: must be NAME=DIR, and the NAME none of {others}")
        run = Path(path).expanduser()
        folder = own if (own := run / ADAPTER).is_dir() else run
        load_adapter(model, folder, family=loaded.family)
        for layer, wrapped in lora.unwrap(model).items():
            shared.setdefault(layer, {})[name] = wrapped
        if full := [n for n, param in model.named_parameters() if param.requires_grad]:
            mend = "serve it by itself, or train it without --peft.extra-modules"
            raise ConfigError(f"--adapter {word}: trained {full[0]} and the like fully: {mend}")
        prints[name] = fingerprint(*hashes, files.sha256_file(folder / WEIGHTS))
    model.trunk.routes = routes = {} if shared else None
    for layer, wrapped in shared.items():
        model.set_submodule(layer, lora.SharedLinear(wrapped, routes))
    return prints
