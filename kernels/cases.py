"""Every op at sizes: small and odd ones, which check.py tries, and real models', which bench.py
times. An input's letters are its shape; they are those of the op's own file.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor

from kernels.attention import attention, attention_reference
from kernels.attention_decode import attention_decode, attention_decode_reference
from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from kernels.docs import Docs
from kernels.lora import lora_linear, lora_linear_reference
from kernels.nf4 import dequantise, quantise
from kernels.norm import layer_norm, layer_norm_reference, rms_norm, rms_norm_reference
from kernels.rope import norm_rope, rope, rope_angles, rope_reference
from kernels.swiglu import geglu, geglu_reference, swiglu, swiglu_reference

Sizes = dict[str, Any]
Call = Callable[..., Any]


class Draw:
    """Normal values of one dtype on one device, the same for a seed."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        wide = torch.randn(shape, generator=self.generator, device=self.device)
        return wide.to(self.dtype)

    def below(self, limit: int, count: int) -> Tensor:
        """int64 values in [0, limit)."""
        return torch.randint(limit, (count,), generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Op:
    """An op, and what it is measured by.

    inputs      names; each is drawn in the shape of its letters, and gets a gradient
    kernels     rows of configs.toml that serve: kernel -> the size that they go by
    work        of (sizes): (forward, backward), values to read and write, or FLOP if `is_flop`
    checks      sizes that check.py tries; "auto" tries the first
    benches     sizes that bench.py times; inputs among "frozen" get no gradient there
    rest        of (draw, sizes): the other arguments
    modes       what is timed: "forward", "backward", or "both" in one
    compiles    whether torch.compile makes one graph of the definition, at the sizes of bench.py
    """

    call: Call
    reference: Call
    inputs: str
    kernels: Mapping[str, str]
    work: Call
    checks: list[Sizes]
    benches: list[Sizes]
    rest: Call = lambda draw, sizes: {}
    modes: tuple[str, ...] = ("forward", "backward")
    is_flop: bool = False
    compiles: bool = True

    def drawn(self, draw: Draw, sizes: Sizes) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The inputs, of unit variance and factors of unit gain, and the other arguments."""
        inputs = {}
        for name in self.inputs.split():
            x = draw(*(sizes[letter] for letter in name.partition("_")[2]))
            inputs[name] = x * x.shape[-1] ** -0.5 if name[0] in "wab" and x.ndim == 2 else x
        return inputs, self.rest(draw, sizes)


def label(sizes: Sizes) -> str:
    """Sizes in a few words; of documents, how many and how long."""
    words = []
    for key, value in sizes.items():
        if key == "lengths":
            same = len(set(value)) == 1
            value = f"{len(value)}x{value[0] if same else f'{min(value)}-{max(value)}'}"
        words.append(f"{key}={value}")
    return " ".join(words)


def _documents(draw: Draw, sizes: Sizes) -> dict[str, Any]:
    rule = {key: sizes[key] for key in ("is_causal", "window", "softcap") if key in sizes}
    docs = Docs.from_lengths(sizes["lengths"], draw.device)
    return {"docs": docs, "scale": sizes["D"] ** -0.5, **rule}


def _stream(lengths: list[int], H: int, G: int, D: int, *, is_causal: bool, **rule: Any) -> Sizes:
    heads = {"N": sum(lengths), "H": H, "G": G, "D": D}
    return {"lengths": lengths, **heads, "is_causal": is_causal, **rule}


def _attention_work(sizes: Sizes) -> tuple[float, float]:
    squares = sum(T * T for T in sizes["lengths"])
    flop = 4 * squares * sizes["H"] * sizes["D"] / (2 if sizes["is_causal"] else 1)
    return flop, 2.5 * flop


def _gemm(sizes: Sizes, letters: str, backward: int) -> tuple[int, int]:
    """FLOP of a product, and of that many more in the backward pass."""
    flop = 2 * math.prod(sizes[letter] for letter in letters)
    return flop, backward * flop


def _packed(tokens: int) -> list[int]:
    """Lengths of documents of 16 to 512 tokens."""
    lengths, random = [], Random(0)
    while left := tokens - sum(lengths):
        lengths.append(min(left, random.randint(16, 512)))
    return lengths


def _scored(draw: Draw, sizes: Sizes) -> dict[str, Any]:
    labels_M, weights_M = draw.below(sizes["V"], sizes["M"]), draw.below(2, sizes["M"]).float()
    return {"labels_M": labels_M, "weights_M": weights_M, "softcap": sizes.get("cap")}


def _loss(op: Call, **given: Any) -> Tensor:
    return op(given.pop("h_MC"), given.pop("weight_VC"), **given)[0]


def _angles(draw: Draw, sizes: Sizes) -> dict[str, Tensor]:
    positions_N = torch.arange(sizes["N"], device=draw.device)
    turn = {"head_dim": sizes["E"] * 2, "theta": 1e4, "dtype": draw.dtype}
    return {"cos_sin_2NE": rope_angles(positions_N, **turn)}


def _cache(B: int, H: int, G: int, D: int, S: int, J: int) -> Sizes:
    return {"B": B, "H": H, "G": G, "D": D, "S": S, "J": J, "P": B * J, "bytes": 2 * D}


def _pages(draw: Draw, sizes: Sizes) -> dict[str, Any]:
    """Sequences of the most tokens, one less and so on, their pages scattered."""
    B, J, device = sizes["B"], sizes["J"], draw.device
    pages_P = torch.randperm(B * J, generator=draw.generator, device=device)
    lengths_B, scale = J * sizes["S"] - torch.arange(B, device=device), sizes["D"] ** -0.5
    return {"lengths_B": lengths_B, "pages_BJ": pages_P.view(B, J).int(), "scale": scale}


def _decode_work(sizes: Sizes) -> tuple[float, float]:
    return 2 * sizes["P"] * sizes["S"] * sizes["G"] * sizes["D"], 0


def _norm_rope_reference(
    x_NHD: Tensor, weight_D: Tensor, cos_sin_2NE: Tensor, *, eps: float
) -> Tensor:
    return rope_reference(rms_norm_reference(x_NHD, weight_D, eps=eps), cos_sin_2NE)


def _there_and_back(weight_OC: Tensor, impl: str = "eager") -> Tensor:
    return dequantise(quantise(weight_OC, impl=impl), impl=impl)


MIXED, LONG = [1, 300, 17, 129, 128, 127], [4096] * 4
GLU_SIZES = [{"N": 123, "F": 431}, {"N": 1000, "F": 3072}], [{"N": 8192, "F": 14336}]
GLU = {
    "inputs": "gate_NF up_NF", "kernels": {"glu_fwd": "F", "glu_bwd": "F"},
    "work": lambda s: (3 * s["N"] * s["F"], 5 * s["N"] * s["F"]),
    "checks": GLU_SIZES[0], "benches": GLU_SIZES[1],
}  # fmt: skip
NORM = {
    "kernels": {"norm_fwd": "C", "norm_bwd": "C"},
    "work": lambda s: (2 * s["N"] * s["C"], 3 * s["N"] * s["C"]),
    "checks": [{"N": 37, "C": 431}, {"N": 6, "C": 42}, {"N": 300, "C": 4096}],
    "benches": [{"N": 8192, "C": 4096}, {"N": 8192, "C": 4096, "frozen": "weight_C bias_C"},
                {"N": 327680, "C": 128}],
    "rest": lambda draw, sizes: {"eps": 1e-6},
}  # fmt: skip
OPS = {
    "rms_norm": Op(rms_norm, rms_norm_reference, "x_NC weight_C", **NORM),
    "layer_norm": Op(layer_norm, layer_norm_reference, "x_NC weight_C bias_C", **NORM),
    "rope": Op(
        rope, rope_reference, "x_NHD", {"rope": "E"},
        lambda s: (2 * s["N"] * s["H"] * s["D"],) * 2,
        [{"N": 77, "H": 3, "D": 24, "E": 12}, {"N": 333, "H": 5, "D": 64, "E": 16}],
        [{"N": 8192, "H": 40, "D": 128, "E": 64}], _angles,
    ),
    "norm_rope": Op(
        norm_rope, _norm_rope_reference, "x_NHD weight_D", {"rope": "E", "norm_rope_bwd": "E"},
        lambda s: (2 * s["N"] * s["H"] * s["D"], 3 * s["N"] * s["H"] * s["D"]),
        [{"N": 77, "H": 3, "D": 24, "E": 12}, {"N": 333, "H": 5, "D": 128, "E": 64}],
        [{"N": 8192, "H": 40, "D": 128, "E": 64}],
        lambda draw, sizes: {"eps": 1e-6, **_angles(draw, sizes)},
    ),
    "swiglu": Op(swiglu, swiglu_reference, **GLU),
    "geglu": Op(
        partial(geglu, uses_tanh=True), partial(geglu_reference, uses_tanh=True), **GLU
    ),
    "cross_entropy": Op(
        partial(_loss, linear_cross_entropy),
        partial(_loss, linear_cross_entropy_reference, bias_V=None), "h_MC weight_VC",
        {"softmax_loss": "V"},
        lambda s: _gemm(s, "MCV", 1 if "frozen" in s else 2),
        [{"M": 77, "C": 96, "V": 123}, {"M": 300, "C": 64, "V": 50257, "cap": 30.0}],
        [{"M": 8192, "C": 4096, "V": 128256},
         {"M": 8192, "C": 4096, "V": 128256, "frozen": "weight_VC"}], _scored, ("both",), True,
    ),
    "lora": Op(
        lora_linear, lora_linear_reference, "x_NC weight_OC a_RC b_OR",
        {"lora_shrink": "R", "lora_dh_db": "R"}, lambda s: _gemm(s, "NCO", 1),
        [{"N": 77, "C": 96, "O": 123, "R": 8}, {"N": 512, "C": 1024, "O": 1024, "R": 64}],
        [{"N": 8192, "C": 4096, "O": 4096, "R": 16, "frozen": "weight_OC"}],
        lambda draw, sizes: {"scale": 2.0}, ("both",), True,
    ),
    "attention": Op(
        attention, attention_reference, "q_NHD k_NGD v_NGD",
        {"attention_fwd": "D", "attention_dq": "D", "attention_dkv": "D"}, _attention_work,
        [_stream(MIXED, 4, 2, 64, is_causal=True), _stream(MIXED, 4, 4, 128, is_causal=False),
         _stream([700, 33], 8, 1, 32, is_causal=True, window=100, softcap=20.0)],
        [_stream(LONG, 16, 16, 128, is_causal=True),
         _stream([8192] * 2, 16, 16, 128, is_causal=True),
         _stream(LONG, 16, 4, 128, is_causal=True), _stream(LONG, 16, 16, 64, is_causal=True),
         _stream(_packed(16384), 16, 16, 128, is_causal=True, shape="short")],
        _documents, is_flop=True, compiles=False,
    ),
    "attention_decode": Op(
        attention_decode, attention_decode_reference, "q_BHD k_PSGD v_PSGD",
        {"attention_decode": "bytes"}, _decode_work,
        [_cache(4, 4, 2, 64, 16, 9), _cache(3, 8, 1, 128, 100, 2)],
        [_cache(32, 32, 8, 128, 128, 32), _cache(1, 32, 8, 128, 128, 256)],
        _pages, ("forward",), compiles=False,
    ),
    "nf4": Op(
        _there_and_back, _there_and_back, "weight_OC",
        {"nf4_quantise": "C", "nf4_dequantise": "C"}, lambda s: (5 * s["O"] * s["C"], 0),
        [{"O": 64, "C": 96}], [{"O": 4096, "C": 14336}], modes=("forward",),
    ),
}  # fmt: skip
