"""What kernels.bench times beside ours: torch's own operations, peft's LoRA, and Liger's kernels.

A rival takes an op's inputs by name, and `sizes` and `rest` (see kernels/cases.py). One that is not
installed raises ImportError, which the bench tells.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from inspect import signature
from typing import Any
import torch
import torch.nn.functional as F
from torch import Tensor
from kernels.docs import Docs

def liger(op: str, *args: Any, **kwargs: Any) -> Tensor:
    module = import_module("liger_kernel.transformers.functional")
    return getattr(module, f"liger_{op}")(*args, **kwargs)

def torch_rms_norm(x_NC: Tensor, weight_C: Tensor, **_: Any) -> Tensor:
    return F.rms_norm(x_NC, weight_C.shape, weight_C, 1e-6)

def torch_layer_norm(x_NC: Tensor, weight_C: Tensor, bias_C: Tensor, **_: Any) -> Tensor:
    return F.layer_norm(x_NC, weight_C.shape, weight_C, bias_C, 1e-6)

def liger_norm(kind: str, sizes: Any, rest: Any, **inputs: Tensor) -> Tensor:
    # in_place would write into the gradient that all share
    more = {"in_place": False} if kind == "rms_norm" else {}
    return liger(kind, *inputs.values(), 1e-6, **more)

def liger_glu(kind: str, sizes: Any, rest: Any, **inputs: Tensor) -> Tensor:
    return liger(kind, *inputs.values())

def liger_loss(h_MC: Tensor, weight_VC: Tensor, rest: dict[str, Any], **_: Any) -> Tensor:
    found = liger("fused_linear_cross_entropy", h_MC, weight_VC, rest["labels_M"], reduction="sum")
    return found[0] if isinstance(found, tuple) else found

def frozen_linear(x_NC: Tensor, weight_OC: Tensor, **_: Any) -> Tensor:
    """The floor of a LoRA linear: the product that it adds to."""
    return F.linear(x_NC, weight_OC.detach())

def peft_lora(x_NC: Tensor, weight_OC: Tensor, a_RC: Tensor, b_OR: Tensor, **_: Any) -> Tensor:
    layer = peft_layer(len(a_RC), *weight_OC.shape)
    names = ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight")
    tensors = dict(zip(names, (weight_OC.detach(), a_RC, b_OR), strict=True))
    return torch.func.functional_call(layer, tensors, (x_NC,))

@cache
def peft_layer(rank: int, width_o: int, width_c: int) -> torch.nn.Module:
    peft, layer = import_module("peft"), import_module("peft.tuners.lora.layer")
    base = torch.nn.Linear(width_c, width_o, bias=False, device="meta")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank)
    try:
        made = layer.Linear(base, "default", config, r=rank, lora_alpha=2 * rank)
    except TypeError:  # before peft 0.19 the configuration's parts, one by one
        made = layer.Linear(base, "default", r=rank, lora_alpha=2 * rank)
    return made.to(torch.bfloat16)

def sdpa(backend: str, sizes: Any, rest: dict[str, Any], **qkv: Tensor) -> Tensor:
    """Of documents that are equally long, as a batch."""
    attention = import_module("torch.nn.attention")
    (length,) = set(rest["docs"].lengths)
    rule = {"is_causal": rest["is_causal"], "enable_gqa": sizes["H"] != sizes["G"]}
    with attention.sdpa_kernel(getattr(attention.SDPBackend, f"{backend}_ATTENTION")):
        batch = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in qkv.values())
        return F.scaled_dot_product_attention(*batch, **rule)

def varlen(sizes: Any, rest: dict[str, Any], **qkv: Tensor) -> Tensor:
    op = import_module("torch.nn.attention.varlen").varlen_attn
    docs = rest["docs"]
    borders, longest = docs.cu_seqlens_B1, max(docs.lengths)
    args = (*qkv.values(), borders, borders, longest, longest)
    rule = {"window_size": (-1, 0 if rest["is_causal"] else -1)}
    if sizes["H"] != sizes["G"] and "enable_gqa" in signature(op).parameters:  # from torch 2.12
        rule["enable_gqa"] = True
    return op(*args, **rule)

def flex(sizes: Any, rest: dict[str, Any], **qkv: Tensor) -> Tensor:
    if len(set(rest["docs"].lengths)) == 1:
        raise ValueError("timed for packed documents alone, as its compiler takes long")
    attend, mask = flex_of(rest["docs"], rest["is_causal"])
    batch = (x.transpose(0, 1)[None] for x in qkv.values())
    return attend(*batch, block_mask=mask, enable_gqa=sizes["H"] != sizes["G"])

@cache
def flex_of(docs: Docs, is_causal: bool) -> tuple[Callable[..., Tensor], Any]:
    module = import_module("torch.nn.attention.flex_attention")
    doc_N, N = docs.doc_of_N(), docs.num_tokens

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        is_same = doc_N[q] == doc_N[k]
        return is_same & (q >= k) if is_causal else is_same

    mask = module.create_block_mask(sees, None, None, N, N, device=docs.cu_seqlens_B1.device)
    return torch.compile(module.flex_attention), mask

RIVALS = {
    "rms_norm": {"torch": torch_rms_norm, "liger": partial(liger_norm, "rms_norm")},
    "layer_norm": {"torch": torch_layer_norm, "liger": partial(liger_norm, "layer_norm")},
    "swiglu": {"liger": partial(liger_glu, "swiglu")},
    "geglu": {"liger": partial(liger_glu, "geglu")},
    "cross_entropy": {"liger": liger_loss},
    "lora": {"frozen linear": frozen_linear, "peft": peft_lora},
    "attention": {
        "flash": partial(sdpa, "FLASH"), "cudnn": partial(sdpa, "CUDNN"),
        "varlen": varlen, "flex": flex,
    },
}  # fmt: skip
