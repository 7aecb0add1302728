"""What a transformer is made of, free of any family's file format.

A family (`ftcore/model/families/`) turns a `config.json` into a `ModelSpec` and back; the
transformer reads nothing but the spec. Every switch is a plain value with one meaning.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelSpec:
    """Sizes and switches of one transformer.

    vocab_size, hidden_size, num_layers, intermediate_size      V, C, L, F
    num_heads, num_kv_heads, head_dim                           H, G, D (H a multiple of G)
    max_positions       longest document in tokens that the positions are made for
    is_causal           decoder (True) or encoder (False)
    norm                "rms_norm" or "layer_norm"
    norm_eps            added to the variance
    norm_offset         added to the weight of an RMSNorm
    norm_bias           bias of a layer norm
    norm_first          normalise a sub-layer's input (True, with a final norm) or the sum after it
    output_norms        with norm_first: normalise a sub-layer's output too, before the sum
    is_parallel         with norm_first: attention and MLP read the same state, and both are added
    position            "rope" or "learned"
    position_offset     row of the learned positions that the first token takes
    rope_theta          base of the rotary angles
    rope_dim            channels of each head that turn (0: all)
    rope_factor, rope_bands     scaled angles: kernels/rope.py
    local_rope_theta    base in layers with a window, whose angles are never scaled; None: the same
    windows             one number per layer: a token sees those fewer positions away (0: all);
                        empty: all layers see all
    attention_scale     factor on the scores; None: D ** -0.5
    attention_softcap, logit_softcap    smooth bound of the scores, of the LM head's logits
    mlp                 gated (gate, up, down): "swiglu", "geglu", "geglu_tanh";
                        plain (up, down): "gelu", "gelu_tanh"
    qk_norm             RMSNorm on each head's queries and keys
    linear_bias         biases on the MLP's linear maps and on o_proj
    qkv_bias            biases on q_proj, k_proj, v_proj
    num_types           segment embeddings (0: none)
    embedding_scale     factor on the token embeddings
    embedding_norm      normalise the sum of the embeddings; with norm_first the first layer's
                        attention has no norm of its own
    pooling             what a classifier sees of a document: "first" token, "last", or their "mean"
    pooler              what an encoder's classifier has before its last map: a dense map with
                        "tanh" or "relu", or the "transform" of the masked-LM head
    tie_word_embeddings the LM head is the embedding matrix
    dropout             probability on embeddings and sub-layer outputs while training
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    is_causal: bool
    norm: Literal["rms_norm", "layer_norm"]
    norm_eps: float
    norm_first: bool
    position: Literal["rope", "learned"]
    mlp: Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh"]
    norm_offset: float = 0.0
    norm_bias: bool = True
    output_norms: bool = False
    is_parallel: bool = False
    position_offset: int = 0
    rope_theta: float = 10000.0
    rope_dim: int = 0
    rope_factor: float = 1.0
    rope_bands: tuple[float, float, int] | None = None
    local_rope_theta: float | None = None
    windows: tuple[int, ...] = ()
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    qk_norm: bool = False
    linear_bias: bool = False
    qkv_bias: bool = False
    num_types: int = 0
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    pooling: Literal["first", "last", "mean"] = "last"
    pooler: Literal["tanh", "relu", "transform"] | None = None
    tie_word_embeddings: bool = False
    dropout: float = 0.0
    initializer_range: float = 0.02
