"""Qwen2 and Qwen2.5: Llama's layout with biases on queries, keys and values.

source  Qwen team 2024, arXiv:2407.10671; HF layout of `Qwen2ForCausalLM`
"""

from dataclasses import replace

from ftcore.model.families import llama
from ftcore.model.families.family import architectures

FAMILY = replace(
    llama.FAMILY,
    name="qwen2",
    architectures=architectures("Qwen2", "lm"),
    switches={**llama.FAMILY.switches, "qkv_bias": True},
    fixed={"hidden_act": "silu", "use_sliding_window": False},
)
