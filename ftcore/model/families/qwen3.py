"""Qwen3: Llama's layout with a norm on each head's queries and keys.

source  Qwen team 2025, arXiv:2505.09388; HF layout of `Qwen3ForCausalLM`
"""

from dataclasses import replace

from ftcore.model.families import llama
from ftcore.model.families.family import architectures

FAMILY = replace(
    llama.FAMILY,
    name="qwen3",
    architectures=architectures("Qwen3", "lm"),
    switches={**llama.FAMILY.switches, "qk_norm": True},
    keys={**llama.FAMILY.keys, "head_dim": ("head_dim", 128)},
    fixed={"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
)
