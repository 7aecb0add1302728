"""The floor of a training step: its matrix products, bf16, with nothing between them.

Letters: N tokens of the step, B documents of length T, C width, H heads of width D, F MLP width, V
vocabulary, M rows that reach an LM head, K classes, R rank.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple
import torch
from ftcore.model.transformer import GATED, ModelSpec

class Product(NamedTuple):
    """(rows, inner) x (inner, cols), `batch` of them; "t" in `kind`: an operand lies transposed."""

    batch: int
    rows: int
    inner: int
    cols: int
    kind: Literal["nn", "nt", "tn"]

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.rows * self.inner * self.cols

def linear_products(
    N: int, ins: int, outs: int, *, passes_back: bool, trained: bool = False, R: int = 0
) -> list[Product]:
    """Products of y = x W^T over N rows, forward and backward.

    passes_back     the gradient of x is needed
    trained         that of W is
    R               rank of a trained update beside it; 0: none
    """
    found = [Product(1, N, ins, outs, "nt")]
    if passes_back:
        found.append(Product(1, N, outs, ins, "nn"))
    if trained:
        found.append(Product(1, outs, N, ins, "tn"))
    if R:
        found += [Product(1, N, ins, R, "nt"), Product(1, N, R, outs, "nt")]
        found += [Product(1, N, outs, R, "nn")]
        found += [Product(1, outs, N, R, "tn"), Product(1, R, N, ins, "tn")]
        if passes_back:
            found.append(Product(1, N, R, ins, "nn"))
    return found

def attention_products(lengths: Iterable[int], H: int, D: int) -> Counter[Product]:
    """Scores and their use: two products forward, four backward; documents of one length at once.

    A causal mask saves none of them.
    """
    found: Counter[Product] = Counter()
    for T, count in Counter(lengths).items():
        found[Product(count * H, T, D, T, "nt")] += 2  # scores, and dp = do v^T
        found[Product(count * H, T, T, D, "nn")] += 2  # o, and dq = ds k
        found[Product(count * H, T, T, D, "tn")] += 2  # dv = p^T do, and dk = ds^T q
    return found

def step_products(
    spec: ModelSpec, lengths: Sequence[int], scored: int, *, labels: int | None, R: int
) -> Counter[Product]:
    """All products of one step.

    lengths     tokens of each document
    scored      M, rows that reach an LM head
    labels      K of a classifier; None: an LM head
    R           rank of LoRA on every linear layer of the trunk; 0: all is trained
    """
    N, B, C, F = sum(lengths), len(lengths), spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    is_full = not R
    found: Counter[Product] = Counter()
    for layer in range(spec.num_layers):
        for outs in (q, kv, kv):  # below the first layer there is only the embedding
            passes_back = is_full or layer > 0
            found.update(linear_products(N, C, outs, passes_back=passes_back, trained=is_full, R=R))
        for ins, outs in [(q, C), *[(C, F)] * (2 if spec.mlp in GATED else 1), (F, C)]:
            found.update(linear_products(N, ins, outs, passes_back=True, trained=is_full, R=R))
        found.update(attention_products(lengths, spec.num_heads, spec.head_dim))
    if labels is None:
        found.update(linear_products(scored, C, spec.vocab_size, passes_back=True, trained=is_full))
    else:
        for outs in (C, labels) if spec.pooler else (labels,):
            found.update(linear_products(B, C, outs, passes_back=True, trained=True))
    return found

def seconds_of(products: Mapping[Product, int]) -> float:
    """Time of the products alone, each once untimed before."""
    seconds = 0.0
    for (batch, rows, inner, cols, kind), count in products.items():
        a_shape = (batch, inner, rows) if kind[0] == "t" else (batch, rows, inner)
        b_shape = (batch, cols, inner) if kind[1] == "t" else (batch, inner, cols)
        # Written, since memory that was never written is one page of zeros.
        a, b = (torch.full(shape, 0.01, dtype=torch.bfloat16) for shape in (a_shape, b_shape))
        a, b = a.mT if kind[0] == "t" else a, b.mT if kind[1] == "t" else b
        out = torch.empty(batch, rows, cols, dtype=torch.bfloat16)
        if batch == 1:
            a, b, out = a[0], b[0], out[0]
        multiply = torch.mm if batch == 1 else torch.bmm
        multiply(a, b, out=out)
        started = time.perf_counter()
        for _ in range(count):
            multiply(a, b, out=out)
        seconds += time.perf_counter() - started
    return seconds
