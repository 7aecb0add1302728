"""What sits on the transformer: the LM head and the sequence classifier.

A head never sees rows that are not scored: the LM head gets the M selected rows of the stream, the
classifier one pooled row per document.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftcore.model.spec import ModelSpec
from ftcore.model.transformer import LayerNorm, RMSNorm, Transformer
from kernels.docs import Docs


class LMHead(nn.Module):
    """Next-token logits z = h W^T; W is the embedding matrix where the spec ties them."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)

    def forward(self, h_MC: Tensor) -> Tensor:
        """logits_MV, compute dtype."""
        return self.lm_head(h_MC)


class ClassificationHead(nn.Module):
    """Class scores of each document.

    Encoders pool the first token (through the checkpoint's dense + tanh pooler where it has one),
    decoders the last one, which has seen the whole document.
    """

    def __init__(self, spec: ModelSpec, num_labels: int) -> None:
        super().__init__()
        C = spec.hidden_size
        self.pools_last = spec.is_causal
        self.dropout = spec.dropout
        self.pooler = nn.Linear(C, C) if spec.has_pooler else None
        self.classifier = nn.Linear(C, num_labels, bias=not spec.is_causal)

    def pool(self, h_NC: Tensor, docs: Docs) -> Tensor:
        """pooled_BC, one row per document."""
        pooled_BC = h_NC[docs.last_B() if self.pools_last else docs.first_B()]
        if self.pooler is not None:
            pooled_BC = torch.tanh(self.pooler(pooled_BC))
        return F.dropout(pooled_BC, self.dropout, self.training)

    def forward(self, h_NC: Tensor, docs: Docs) -> Tensor:
        """logits_BK, compute dtype."""
        return self.classifier(self.pool(h_NC, docs))


class Model(nn.Module):
    """A transformer and the head of its task.

    spec        sizes and switches
    trunk       the transformer
    head        LMHead, ClassificationHead, or None for bare hidden states
    """

    def __init__(self, spec: ModelSpec, *, num_labels: int | None = None, lm: bool = True) -> None:
        super().__init__()
        self.spec = spec
        self.trunk = Transformer(spec)
        self.head: nn.Module | None = None
        if num_labels is not None:
            self.head = ClassificationHead(spec, num_labels)
        elif lm:
            self.head = LMHead(spec)
            self.tie_weights()

    def tie_weights(self) -> None:
        """Make the LM head's matrix the embedding matrix, where the spec ties them."""
        if isinstance(self.head, LMHead) and self.spec.tie_word_embeddings:
            self.head.lm_head.weight = self.trunk.embed_tokens.weight

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw Normal(0, initializer_range) matrices; biases become zero, norms one."""
        for module in self.modules():
            init_module(module, self.spec.initializer_range, generator)


def init_module(module: nn.Module, std: float, generator: torch.Generator) -> None:
    """Draw the parameters that `module` itself owns."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std, generator=generator)
    if isinstance(module, RMSNorm | LayerNorm):
        nn.init.ones_(module.weight)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)
