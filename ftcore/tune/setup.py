"""What is trained: all, what rules name, or low-rank updates; and whether the data fits a model."""

from collections.abc import Sequence
from dataclasses import fields

import torch

from ftcore.config import PeftConfig
from ftcore.data.pack import lengths
from ftcore.data.prepare import Prepared
from ftcore.errors import ConfigError, DataError
from ftcore.model.heads import CLASSIFIERS, Model
from ftcore.model.transformer import ModelSpec
from ftcore.tune.freeze import apply_trainable, parameter_table
from ftcore.tune.lora import LoRAConfig, apply_lora
from ftcore.tune.quant import quantise_frozen

def choose_trainable(
    model: Model, config: PeftConfig, generator: torch.Generator, *, new: Sequence[str] = ()
) -> str:
    """Freeze, wrap by drawn factors, or leave; returns the table of parameters. Raises ConfigError:
    a rule or target matches nothing, or of `new`, which the checkpoint lacked, some stay frozen."""
    if config.quantize != "none" and config.method != "lora":
        raise ConfigError("peft.quantize is for frozen matrices: use --peft.method lora with it")
    if config.method == "lora":
        lora = LoRAConfig(**{f.name: getattr(config, f.name) for f in fields(LoRAConfig)})
        heads = ("head",) if model.task in CLASSIFIERS else ()  # new with the task, so trained
        report = apply_lora(model, lora, generator=generator, trained_heads=heads)
        table = f"{parameter_table(model)}\n{report}"
        if config.quantize == "nf4":
            table += f"\n{quantise_frozen(model)}"
    else:
        table = apply_trainable(model, ["all"] if config.method == "full" else config.trainable)
    # peft's files have no name for the parts of a tied head
    params = () if config.method == "lora" and model.task == "mlm" else model.named_parameters()
    trained = {name for name, param in params if param.requires_grad}
    if left := [name for name in new if name not in trained]:
        what = f"{', '.join(left)}: not in the checkpoint, so random, and would stay so"
        raise ConfigError(f"{what}: use --peft.method full, or head among --peft.trainable")
    return table

def check_lengths(spec: ModelSpec, data: Prepared) -> None:
    """Raise DataError where a document is longer than the model's learned positions reach."""
    if spec.position != "learned":
        return
    for name, split in data.splits():
        longest = split.documents[int(lengths(split.documents).argmax())]
        if len(longest) > (most := spec.max_positions):
            what = f"{name}: row {longest.row_id} has {len(longest)} tokens"
            advice = f"add --data.max-length {most} and --data.over-length cut_right (or drop)"
            raise DataError(f"{what}, the model takes at most {most}: {advice}")
