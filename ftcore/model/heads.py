"""What sits on the transformer: the (masked) LM head, the tagger and the sequence classifier.

A head never sees rows that are not scored, nor does the last layer compute them: the LM head and
the tagger get the M selected rows of the stream, the classifier those that it pools. Logits are in
the compute dtype; a `loss` does without them as a whole.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ftcore.model.spec import ModelSpec
from ftcore.model.transformer import LayerNorm, Linear, RMSNorm, Transformer, norm
from kernels.backend import Impl
from kernels.cross_entropy import linear_cross_entropy
from kernels.docs import Docs
from kernels.dropout import dropout

ModelTask = Literal["lm", "mlm", "classify", "tag", "trunk"]
Loss = tuple[Tensor, Tensor]  # cross-entropy of the rows as (sum, weight)

def _loss(
    last: Linear, x_MC: Tensor, labels_M: Tensor, weights_M: Tensor, softcap: float | None = None
) -> Loss:
    x_MC, weight_VC, bias_V = last.cast(x_MC)
    rule = {"bias_V": bias_V, "softcap": softcap, "impl": last.impl}
    return linear_cross_entropy(x_MC, weight_VC, labels_M, weights_M, **rule)

class Transform(nn.Module):
    """What an encoder's masked-LM head does before its vocabulary: norm(gelu(dense(h)))."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.dense = Linear(spec.hidden_size, spec.hidden_size, bias=spec.linear_bias)
        self.norm = norm(spec)

    def forward(self, h_MC: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(h_MC)))

class LMHead(nn.Module):
    """Logits over the vocabulary: z = h W^T of the next token in a decoder, transform(h) W^T + b of
    a masked one in an encoder. W is the embedding matrix where the spec ties them; a soft cap
    bounds z where the spec has one."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.softcap = spec.logit_softcap
        self.transform = nn.Identity() if spec.is_causal else Transform(spec)
        self.lm_head = Linear(spec.hidden_size, spec.vocab_size, bias=not spec.is_causal)

    def forward(self, h_MC: Tensor) -> Tensor:
        """logits_MV."""
        z_MV, cap = self.lm_head(self.transform(h_MC)), self.softcap
        return z_MV if cap is None else cap * (z_MV / cap).tanh()

    def loss(self, h_MC: Tensor, labels_M: Tensor, weights_M: Tensor) -> Loss:
        """Cross-entropy of the rows as (sum, weight)."""
        return _loss(self.lm_head, self.transform(h_MC), labels_M, weights_M, self.softcap)

class TokenHead(nn.Module):
    """Class scores of each of M tokens; in an encoder that pools through the `transform` of its
    masked-LM head, through the same."""

    def __init__(self, spec: ModelSpec, num_labels: int) -> None:
        super().__init__()
        self.dropout = spec.dropout
        self.transform = Transform(spec) if spec.pooler == "transform" else nn.Identity()
        self.classifier = Linear(spec.hidden_size, num_labels)

    def features(self, h_MC: Tensor) -> Tensor:
        """What the classifier sees, x_MC."""
        return dropout(self.transform(h_MC), self.dropout, is_training=self.training)

    def forward(self, h_MC: Tensor) -> Tensor:
        """logits_MK."""
        return self.classifier(self.features(h_MC))

    def loss(self, h_MC: Tensor, labels_M: Tensor, weights_M: Tensor) -> Loss:
        """Cross-entropy of the rows as (sum, weight)."""
        return _loss(self.classifier, self.features(h_MC), labels_M, weights_M)

POOLERS = {"tanh": torch.tanh, "relu": torch.relu}

class ClassificationHead(nn.Module):
    """Class scores of each document. Encoders pool the first token, or the mean of all, through
    what the spec's `pooler` names; decoders the last one, which has seen the whole document."""

    def __init__(self, spec: ModelSpec, num_labels: int) -> None:
        super().__init__()
        C = spec.hidden_size
        self.pooling, self.dropout = spec.pooling, spec.dropout
        self.activation = POOLERS.get(spec.pooler)
        self.pooler = Linear(C, C) if self.activation else None
        self.transform = Transform(spec) if spec.pooler == "transform" else nn.Identity()
        self.classifier = Linear(C, num_labels, bias=not spec.is_causal)

    def rows(self, docs: Docs) -> Tensor | None:
        """rows_B of the stream that this head reads; None: all."""
        if self.pooling == "mean":
            return None
        return docs.last_B() if self.pooling == "last" else docs.first_B()

    def pool(self, h_MC: Tensor, docs: Docs) -> Tensor:
        """pooled_BC, one row per document."""
        if self.pooling == "mean":
            h_MC = torch.stack([h_TC.mean(0) for h_TC in h_MC.split(docs.lengths)])
        pooled_BC = self.activation(self.pooler(h_MC)) if self.pooler else h_MC
        return dropout(self.transform(pooled_BC), self.dropout, is_training=self.training)

    def forward(self, h_MC: Tensor, docs: Docs) -> Tensor:
        """logits_BK; h_MC are the hidden states of `rows`."""
        return self.classifier(self.pool(h_MC, docs))

    def loss(self, h_MC: Tensor, docs: Docs, labels_B: Tensor, weights_B: Tensor) -> Loss:
        """Cross-entropy of the documents as (sum, weight)."""
        return _loss(self.classifier, self.pool(h_MC, docs), labels_B, weights_B)

CLASSIFIERS = {"classify": ClassificationHead, "tag": TokenHead}

class Model(nn.Module):
    """A transformer and the head of its task.

    task        "lm": LM head; "mlm": masked-LM head; "classify": scores of each document; "tag":
                scores of each token; "trunk": no head
    num_labels  scores of a classifier; otherwise unread
    """

    def __init__(self, spec: ModelSpec, task: ModelTask, num_labels: int | None = None) -> None:
        super().__init__()
        self.spec, self.task, self.num_labels = spec, task, num_labels
        self.trunk = Transformer(spec)
        self.head: nn.Module | None = None
        if task in CLASSIFIERS:
            self.head = CLASSIFIERS[task](spec, num_labels)
        elif task != "trunk":
            self.head = LMHead(spec)
            if spec.tie_word_embeddings:
                self.head.lm_head.weight = self.trunk.embed_tokens.weight

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw Normal(0, initializer_range) matrices; biases become zero, norms one."""
        for module in self.modules():
            init_module(module, self.spec.initializer_range, generator)

    def use_kernels(self, impl: Impl) -> None:
        """How every operation runs from now on: see kernels/backend.py."""
        for module in self.modules():
            module.impl = impl

    def compute_in(self, dtype: torch.dtype | None) -> None:
        """The dtype of every matrix product and of attention from now on: autocast, written out.
        The stream between them, norms and losses stay in that of the weights; None: all does."""
        for module in self.modules():
            module.compute = dtype

def init_module(module: nn.Module, std: float, generator: torch.Generator) -> None:
    """Draw the parameters that `module` itself owns."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std, generator=generator)
    if isinstance(module, RMSNorm | LayerNorm):
        nn.init.constant_(module.weight, 1 - module.offset)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)
