"""Every op at sizes, read from cases.toml: small and odd ones, which check.py tries, and those of
real models, which bench.py times. Letters are those of the ops' own files."""

import ctypes
import math
import os
import signal
import tomllib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any
import torch
from torch import Tensor
from kernels.attention import attention, attention_reference
from kernels.attention_decode import attention_decode, attention_decode_reference
from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from kernels.docs import Docs
from kernels.lora import lora_linear, lora_linear_reference
from kernels.norm import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference
from kernels.rope import norm_rope, rope, rope_reference
from kernels.swiglu import geglu, geglu_reference, swiglu, swiglu_reference

Sizes = dict[str, Any]
Call = Callable[..., Tensor]
ARGUMENTS = ("is_causal", "window", "softcap", "dropout")

class Draw:
    """Normal values of one dtype on one device, the same for a seed."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(self.dtype)

    def below(self, limit: int, *shape: int) -> Tensor:
        """int64 values in [0, limit)."""
        return torch.randint(limit, shape, generator=self.generator, device=self.device)

@dataclass(frozen=True)
class Op:
    """A section of cases.toml, whose comment says what each value is; and

    call, reference   of the inputs and the other arguments; `call` takes `impl` too
    rest              of (draw, sizes): the other arguments, beside the section's `settings` and
                      those `ARGUMENTS` that are among the sizes"""
    call: Call
    reference: Call
    rest: Callable[[Draw, Sizes], dict[str, Any]] | None
    inputs: str
    kernels: dict[str, str]
    checks: list[Sizes]
    benches: list[Sizes]
    frozen: str = ""
    values: tuple[str, float, float] = ("", 0, 0)
    flop: tuple[str, float, float] = ("", 0, 0)
    settings: Mapping[str, float] = field(default_factory=dict)
    modes: Sequence[str] = ("forward", "backward")
    compiles: bool = True
    widest: int = 4

    def drawn(self, draw: Draw, sizes: Sizes) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The inputs, matrices of weights with a gain of one, and the other arguments."""
        inputs = {}
        for name in self.inputs.split():
            x = draw(*(int(c) if c.isdigit() else sizes[c] for c in name.rpartition("_")[2]))
            inputs[name] = x * x.shape[-1] ** -0.5 if name[0] in "wab" and x.ndim == 2 else x
        given = {name: sizes[name] for name in ARGUMENTS if name in sizes}
        return inputs, {**self.settings, **given, **(self.rest(draw, sizes) if self.rest else {})}

    def trained(self) -> list[str]:
        """The inputs that get a gradient."""
        frozen = self.inputs if self.modes == ["forward"] else self.frozen
        return [name for name in self.inputs.split() if name not in frozen.split()]

    def work(self, sizes: Sizes) -> tuple[float, float]:
        """Forward and backward: FLOP, or values to read and write."""
        if "lengths" in sizes:
            squares = sum(T * T for T in sizes["lengths"]) / (2 if sizes["is_causal"] else 1)
            return tuple(part * squares * sizes["H"] * sizes["D"] for part in (4, 10))
        letters, *parts = self.flop if self.flop[0] else self.values
        return tuple(part * math.prod(sizes[letter] for letter in letters) for part in parts)

def label(sizes: Sizes) -> str:
    """Sizes in a few words; of documents, how many and how long."""
    if lengths := sizes.get("lengths"):
        span = "-".join(map(str, sorted({min(lengths), max(lengths)})))
        sizes = {"docs": f"{len(lengths)} of {span}", **sizes}
    return " ".join(f"{key}={value}" for key, value in sizes.items() if key != "lengths")

def _documents(draw: Draw, sizes: Sizes) -> dict[str, Any]:
    return {"docs": Docs.from_lengths(sizes["lengths"], draw.device), "scale": sizes["D"] ** -0.5}

def _pages(draw: Draw, sizes: Sizes) -> dict[str, Any]:
    """Sequences of the most tokens, one less and so on, their pages scattered."""
    B, J, S = sizes["B"], sizes["J"], sizes["S"]
    pages_P = torch.randperm(B * J, generator=draw.generator, device=draw.device)
    lengths_B, pages_BJ = J * S - torch.arange(B, device=draw.device), pages_P.view(B, J).int()
    return {"scale": sizes["D"] ** -0.5, "lengths_B": lengths_B, "pages_BJ": pages_BJ}

def _scored(draw: Draw, sizes: Sizes) -> dict[str, Any]:
    labels_M = draw.below(sizes["V"], sizes["M"])
    return {"labels_M": labels_M, "weights_M": draw.below(2, sizes["M"]).float()}

def _loss(op: Callable[..., tuple[Tensor, Tensor]], **given: Any) -> Tensor:
    return op(**given)[0]

def _norm_rope_reference(*, cos_sin_2NE: Tensor, x_NHD: Tensor, **norm: Any) -> Tensor:
    return rope_reference(rms_norm_reference(x_NHD, norm.pop("weight_D"), **norm), cos_sin_2NE)

GEGLU = partial(geglu, uses_tanh=True), partial(geglu_reference, uses_tanh=True)
LOSSES = linear_cross_entropy, partial(linear_cross_entropy_reference, bias_V=None)
CALLS = {"rms_norm": (rms_norm, rms_norm_reference, None),
         "layer_norm": (layer_norm, layer_norm_reference, None),
         "rope": (rope, rope_reference, None),
         "norm_rope": (norm_rope, _norm_rope_reference, None),
         "swiglu": (swiglu, swiglu_reference, None), "geglu": (*GEGLU, None),
         "cross_entropy": (*(partial(_loss, op) for op in LOSSES), _scored),
         "lora": (lora_linear, lambda dropout=0, **x: lora_linear_reference(**x), None),
         "attention": (attention, attention_reference, _documents),
         "attention_decode": (attention_decode, attention_decode_reference, _pages)}

def chosen(parser: ArgumentParser, arguments: list[str] | None) -> Namespace:
    """What was typed, with the names of ops as `op`, checked."""
    parser.add_argument("op", nargs="*", help=f"of {', '.join(ops())}; none: all of them")
    options = parser.parse_args(arguments)
    if unknown := set(options.op) - set(ops()):
        parser.error(f"no op {', '.join(sorted(unknown))}; there are {', '.join(ops())}")
    options.op = options.op or list(ops())
    return options

def workers() -> ProcessPoolExecutor:
    """A process for each core; they are killed with this one."""
    return ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), _end_with_parent)

def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

@cache
def ops() -> dict[str, Op]:
    """All ops by name."""
    tables = tomllib.loads(Path(__file__).with_name("cases.toml").read_text(encoding="utf-8"))
    for sizes in tables["attention"]["checks"] + tables["attention"]["benches"]:
        if tokens := sizes.pop("packed", 0):
            random, sizes["lengths"] = Random(0), []
            while left := tokens - sum(sizes["lengths"]):
                sizes["lengths"].append(min(left, random.randint(16, 512)))
        sizes["N"] = sum(sizes["lengths"])
    return {op: Op(*CALLS[op.removesuffix("_frozen")], **table) for op, table in tables.items()}
