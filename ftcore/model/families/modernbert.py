"""ModernBERT: an encoder with rotary positions, GeGLU, norms first, and windows in most layers.

source  Warner et al. 2024, arXiv:2412.13663; HF layout of `ModernBertModel`
"""

from typing import Any

from ftcore.errors import ModelError
from ftcore.model.families import positions
from ftcore.model.families.family import KEYS, Family, architectures, read_int
from ftcore.model.families.positions import FULL, WINDOWED
from ftcore.model.spec import ModelSpec

LAYER, OURS = "layers.{i}", "trunk.layers.{i}"
POOLING = {"cls": "first", "mean": "mean"}


def read(config: dict) -> dict[str, Any]:
    """Both bases of the angles, the windows, and what a classifier pools."""
    num_layers = read_int(config, "num_hidden_layers")
    period = read_int(config, "global_attn_every_n_layers", default=3)
    types = [WINDOWED if index % period else FULL for index in range(num_layers)]
    # HF: half the width on each side, and the token itself
    window = read_int(config, "local_attention", default=128) // 2 + 1
    pooling = config.get("classifier_pooling", "cls")
    if pooling not in POOLING:
        raise ModelError(f"config.json: classifier_pooling = {pooling!r}: must be cls or mean")
    return {
        **positions.read_two_ropes(
            config, theta=("global_rope_theta", 160000.0), local_theta=("local_rope_theta", 10000.0)
        ),
        "windows": positions.read_windows(config, window, types),
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
    trunk_prefix="model.",
    trunk_names={
        "embeddings.tok_embeddings": "trunk.embed_tokens",
        "embeddings.norm": "trunk.embed_norm",
        f"{LAYER}.attn_norm": f"{OURS}.input_layernorm",
        f"{LAYER}.attn.Wqkv": tuple(f"{OURS}.self_attn.{x}_proj" for x in "qkv"),
        f"{LAYER}.attn.Wo": f"{OURS}.self_attn.o_proj",
        f"{LAYER}.mlp_norm": f"{OURS}.post_attention_layernorm",
        f"{LAYER}.mlp.Wi": (f"{OURS}.mlp.gate_proj", f"{OURS}.mlp.up_proj"),
        f"{LAYER}.mlp.Wo": f"{OURS}.mlp.down_proj",
        "final_norm": "trunk.norm",
    },
    head_names={
        "head.dense": "head.transform.dense",
        "head.norm": "head.transform.norm",
        "decoder": "head.lm_head",
        "classifier": "head.classifier",
    },
    ignored=(),
    architectures=architectures("ModernBert", "mlm"),
    switches={
        "is_causal": False,
        "norm": "layer_norm",
        "norm_bias": False,
        "norm_first": True,
        "position": "rope",
        "mlp": "geglu",
        "embedding_norm": True,
        "pooler": "transform",
    },
    keys=KEYS | {"norm_eps": ("norm_eps", 1e-5)},
    fixed={
        "hidden_activation": "gelu",
        "classifier_activation": "gelu",
        "decoder_bias": True,
        **{f"{part}_bias": False for part in ("norm", "attention", "mlp", "classifier")},
        **{f"{part}_dropout": 0.0 for part in ("embedding", "attention", "mlp", "classifier")},
    },
    read=read,
    write=write,
)
