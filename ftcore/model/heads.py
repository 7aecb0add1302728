"""The heads: logits, in the compute dtype, or a `loss` that does without them as a whole."""

from base64 import b64encode
from collections.abc import Iterable
from functools import cache, partial
from typing import Literal
import torch
from torch import Tensor, nn
from ftcore.model.transformer import Linear, ModelSpec, Norm, Transformer
from kernels import backend, cross_entropy
from kernels.docs import Docs
from kernels.dropout import dropout
from kernels.softcap import capped

ModelTask = Literal["lm", "mlm", "classify", "tag", "trunk"]
CLASSIFIERS = ("classify", "tag")
EMBEDDING, HEAD = "trunk.embed_tokens.weight", "head.lm_head.weight"
SKETCH = 64
POOLERS = {"tanh": torch.tanh, "relu": torch.relu, "transform": nn.functional.gelu}

class Head(nn.Module):
    """Scores from hidden states: a last linear map over the `features` of M scored rows.

    lm_head      over the vocabulary: a decoder's next token ("lm"); an encoder's hidden one, behind
                 its transform, norm(gelu(dense)) ("mlm")
    classifier   over the classes of each document ("classify"). Encoders pool the first token, or
                 the mean of all, through a dense map and what the spec's `pooler` names, or the
                 transform; decoders the last one, which has seen the whole document. Over the tags
                 of each row ("tag"), behind the transform or nothing"""

    def __init__(self, spec: ModelSpec, task: ModelTask, num_labels: int) -> None:
        super().__init__()
        C, self.is_classifier = spec.hidden_size, task in CLASSIFIERS
        is_transform = task == "mlm" or self.is_classifier and spec.pooler == "transform"
        pooler = spec.pooler if task == "classify" else "transform" if is_transform else None
        self.pooling, self.activation = spec.pooling, POOLERS.get(pooler)
        dense = partial(Linear, C, C, bias=spec.linear_bias)
        self.pooler = dense() if pooler and not is_transform else None
        self.transform = dense() if is_transform else None
        self.transform_norm = Norm(spec) if is_transform else nn.Identity()
        if self.is_classifier:
            self.dropout, self.softcap = spec.dropout, None
            self.classifier = Linear(C, num_labels, bias=task == "tag" or not spec.is_causal)
        else:
            self.dropout, self.softcap = 0.0, spec.logit_softcap
            self.lm_head = Linear(C, spec.vocab_size, bias=task == "mlm")

    @property
    def last(self) -> Linear:
        return self.classifier if self.is_classifier else self.lm_head

    def rows(self, docs: Docs) -> Tensor | None:
        """rows_B of the stream that a head of documents reads; None: all."""
        return {"cls": docs.first_B, "last": docs.last_B, "mean": lambda: None}[self.pooling]()

    def features(self, h_MC: Tensor, docs: Docs | None) -> Tensor:
        """What the last map sees, x_MC; of documents one row each."""
        if self.pooling == "mean" and docs is not None:
            h_MC = torch.stack([h_TC.mean(0) for h_TC in h_MC.split(docs.lengths)])
        if self.activation is not None:
            h_MC = self.transform_norm(self.activation((self.pooler or self.transform)(h_MC)))
        return dropout(h_MC, self.dropout, is_training=self.training)

    def forward(self, h_MC: Tensor, docs: Docs | None = None) -> Tensor:
        """logits_MV or logits_MK of these rows; of documents, whose `rows` they are, logits_BK."""
        return capped(self.last(self.features(h_MC, docs)), self.softcap)

    def loss(self, h_MC: Tensor, labels_M: Tensor, weights_M: Tensor,
             docs: Docs | None = None) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the rows, or documents, as (sum, weight)."""
        x_MC, weight_VC, bias_V = self.last.cast(self.features(h_MC, docs))
        rule = {"bias_V": bias_V, "softcap": self.softcap, "impl": self.last.impl}
        return cross_entropy.linear_cross_entropy(x_MC, weight_VC, labels_M, weights_M, **rule)

    def token_losses(self, h_MC: Tensor, labels_M: Tensor) -> Tensor:
        """Cross-entropy of each row by itself, without gradients; fp32, or float64."""
        x_MC, weight_VC, bias_V = self.last.cast(self.features(h_MC, None))
        return cross_entropy.row_losses(x_MC, weight_VC, labels_M, bias_V, self.softcap)

class Model(nn.Module):
    """A transformer and the head of its task, none for "trunk"; a classifier has `num_labels`."""

    def __init__(self, spec: ModelSpec, task: ModelTask, num_labels: int = 0) -> None:
        super().__init__()
        self.spec, self.task, self.num_labels = spec, task, num_labels
        self.trunk = Transformer(spec)
        self.head = None if task == "trunk" else Head(spec, task, num_labels)
        self.is_tied = task in ("lm", "mlm") and spec.tie_word_embeddings
        if self.is_tied:
            self.head.lm_head.weight = self.trunk.embed_tokens.weight

    def init_weights(self, generator: torch.Generator, names: Iterable[str] | None = None) -> None:
        """Draw Normal(0, initializer_range) matrices; biases become zero; norms are one as made.
        `names`: of these parameters alone."""
        of = dict(self.named_parameters())
        for name in of if names is None else names:
            if of[name].ndim > 1:
                nn.init.normal_(of[name], std=self.spec.initializer_range, generator=generator)
            elif name.endswith(".bias"):
                nn.init.zeros_(of[name])

    @property
    def device(self) -> torch.device:
        return self.trunk.embed_tokens.weight.device

    def use_kernels(self, impl: backend.Impl) -> None:
        """How every operation runs from now on: see kernels/backend.py."""
        self.apply(lambda module: setattr(module, "impl", impl))

    def compute_in(self, dtype: torch.dtype | None) -> None:
        """The dtype of every matrix product and of attention from now on: autocast, written out.
        The stream between them, norms and losses stay in that of the weights; None: all does."""
        self.apply(lambda module: setattr(module, "compute", dtype))

@cache
def directions(width: int) -> Tensor:
    return torch.randn(width, SKETCH, generator=torch.Generator().manual_seed(0))

def sketched(x_BC: Tensor) -> list[str]:
    """Where vectors point: SKETCH projections of each, at length 1, on directions drawn once for
    all, as int8 in base64. Neighbours stay neighbours; guesses of a text can be checked by it."""
    unit_BC = nn.functional.normalize(x_BC.float().cpu(), dim=1)
    told_BE = (30 * unit_BC @ directions(x_BC.shape[1])).round().clamp(-127, 127).to(torch.int8)
    return [b64encode(told_E.tobytes()).decode() for told_E in told_BE.numpy()]
