"""What a transformer is made of, free of any family's file format.

A family (`ftcore/model/families/`) turns a `config.json` into a `ModelSpec` and back; the
transformer reads nothing but the spec. Every switch is a plain value with one meaning.
"""

from dataclasses import dataclass
from typing import Literal

@dataclass(frozen=True)
class ModelSpec:
    """Sizes and switches of one transformer."""
    vocab_size: int  # V
    hidden_size: int  # C
    num_layers: int  # L
    intermediate_size: int  # F
    num_heads: int  # H
    num_kv_heads: int  # G, of which H is a multiple
    head_dim: int  # D
    max_positions: int  # longest document in tokens that the positions are made for
    is_causal: bool  # decoder (True) or encoder (False)
    norm: Literal["rms_norm", "layer_norm"]
    norm_eps: float  # added to the variance
    norm_first: bool  # normalise a sub-layer's input (True, with a final norm) or the sum after it
    position: Literal["rope", "learned"]
    # gated (gate, up, down): "swiglu", "geglu", "geglu_tanh"; plain (up, down): "gelu", "gelu_tanh"
    mlp: Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh"]
    norm_offset: float = 0.0  # added to the weight of an RMSNorm
    norm_bias: bool = True  # bias of a layer norm
    output_norms: bool = False  # with norm_first: normalise a sub-layer's output before the sum too
    is_parallel: bool = False  # with norm_first: attention and MLP read the same state
    position_offset: int = 0  # row of the learned positions that the first token takes
    rope_theta: float = 10000.0  # base of the rotary angles
    rope_dim: int = 0  # channels of each head that turn (0: all)
    rope_factor: float = 1.0  # scales the angles, as rope_bands does: kernels/rope.py
    rope_bands: tuple[float, float, int] | None = None
    local_rope_theta: float | None = None  # base in windowed layers, never scaled; None: the same
    # one number per layer: a token sees those fewer positions away (0: all); empty: all see all
    windows: tuple[int, ...] = ()
    attention_scale: float | None = None  # factor on the scores; None: D ** -0.5
    attention_softcap: float | None = None  # smooth bound of the scores
    logit_softcap: float | None = None  # smooth bound of the LM head's logits
    qk_norm: bool = False  # RMSNorm on each head's queries and keys
    linear_bias: bool = False  # biases on the MLP's linear maps and on o_proj
    qkv_bias: bool = False  # biases on q_proj, k_proj, v_proj
    num_types: int = 0  # segment embeddings (0: none)
    embedding_scale: float = 1.0  # factor on the token embeddings
    # normalise the sum of the embeddings; with norm_first the first attention then has no norm
    embedding_norm: bool = False
    pooling: Literal["first", "last", "mean"] = "last"  # of a document's tokens, for a classifier
    # what an encoder's classifier has before its last map: a dense map with "tanh" or "relu", or
    # the "transform" of the masked-LM head
    pooler: Literal["tanh", "relu", "transform"] | None = None
    tie_word_embeddings: bool = False  # the LM head is the embedding matrix
    dropout: float = 0.0  # probability on embeddings and sub-layer outputs while training
    initializer_range: float = 0.02
