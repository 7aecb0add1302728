"""ModernBERT: an encoder with rotary positions, GeGLU, norms first, and windows in most layers.

source  Warner et al. 2024, arXiv:2412.13663; HF layout of `ModernBertModel`
"""

from typing import Any

from ftcore.errors import ModelError
from ftcore.model.families import positions
from ftcore.model.families.family import KEYS, Family, architectures, read_value, trunk_names
from ftcore.model.spec import ModelSpec

POOLING = {"cls": "first", "mean": "mean"}


def read(config: dict) -> dict[str, Any]:
    """Both bases of the angles, the windows, and what a classifier pools."""
    period = read_value(config, "global_attn_every_n_layers", 3)
    # HF: half the width on each side, and the token itself
    window = read_value(config, "local_attention", 128) // 2 + 1
    pooling = config.get("classifier_pooling", "cls")
    if pooling not in POOLING:
        raise ModelError(f"config.json: classifier_pooling = {pooling!r}: must be cls or mean")
    bases = ("global_rope_theta", 160000.0), ("local_rope_theta", 10000.0)
    return {
        **positions.read_two_ropes(config, *bases),
        "windows": positions.read_windows(config, window, period=period, full=0),
        "pooling": POOLING[pooling],
    }


def write(spec: ModelSpec) -> dict[str, Any]:
    """Undoes `read`."""
    return {
        "rope_parameters": positions.two_ropes_config(spec),
        "local_attention": 2 * (max(spec.windows) - 1),
        "layer_types": positions.layer_types(spec),
        "classifier_pooling": "cls" if spec.pooling == "first" else "mean",
    }


FAMILY = Family(
    name="modernbert",
    architectures=architectures("ModernBert", "mlm"),
    trunk_prefix="model.",
    trunk_names=trunk_names(
        "layers.{i}",
        embed_tokens="embeddings.tok_embeddings", embed_norm="embeddings.norm", norm="final_norm",
        input_layernorm="attn_norm", qkv_proj="attn.Wqkv", o_proj="attn.Wo",
        post_attention_layernorm="mlp_norm", gate_up_proj="mlp.Wi", down_proj="mlp.Wo",
    ),
    head_names={
        "head.dense": "head.transform.dense", "head.norm": "head.transform.norm",
        "decoder": "head.lm_head", "classifier": "head.classifier",
    },
    switches=dict(
        is_causal=False, norm="layer_norm", norm_bias=False, norm_first=True, position="rope",
        mlp="geglu", embedding_norm=True, pooler="transform",
    ),
    keys=KEYS | {"norm_eps": ("norm_eps", 1e-5)},
    fixed={
        "hidden_activation": "gelu", "classifier_activation": "gelu", "decoder_bias": True,
        **{f"{part}_bias": False for part in ("norm", "attention", "mlp", "classifier")},
        **{f"{part}_dropout": 0.0 for part in ("embedding", "attention", "mlp", "classifier")},
    },
    read=read, write=write,
)  # fmt: skip
