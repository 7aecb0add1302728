"""The floor counts the products of a step: against sums worked by hand and torch's own counter."""

from collections import Counter
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from ftcore.model.transformer import ModelSpec
from tests.bench.floor import (
    Product,
    attention_products,
    linear_products,
    seconds_of,
    step_products,
)

LENGTHS = (3, 5, 5)  # 13 tokens
C, F, H, D, V = 8, 20, 2, 4, 50
LAYER = C * C * 4 + 2 * C * F  # values of one layer's matrices
ATTENTION = 2 * H * D * sum(length**2 for length in LENGTHS)  # FLOP of one of its products

def spec(*, is_causal: bool) -> ModelSpec:
    return ModelSpec(
        vocab_size=V, hidden_size=C, num_layers=2, intermediate_size=F, num_heads=H, num_kv_heads=H,
        head_dim=D, max_positions=16, is_causal=is_causal, norm="layer_norm", norm_eps=1e-5,
        norm_first=is_causal, position="learned", mlp="gelu", pooler=None if is_causal else "tanh",
    )  # fmt: skip

def flops(products: Counter[Product]) -> int:
    return sum(product.flops * count for product, count in products.items())

def test_a_linear_layer_costs_what_torch_counts() -> None:
    x_NC = torch.zeros(13, C, requires_grad=True)
    weight_OC = torch.zeros(F, C, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        (x_NC @ weight_OC.T).sum().backward()
    found = linear_products(13, C, F, passes_back=True, trained=True)
    assert flops(Counter(found)) == counter.get_total_flops()

def test_full_fine_tuning_of_a_classifier() -> None:
    found = step_products(spec(is_causal=False), LENGTHS, 0, labels=3, R=0)
    layers = 2 * (3 * 2 * 13 * LAYER + 6 * ATTENTION)
    head = 3 * 2 * len(LENGTHS) * (C * C + 3 * C)  # one row per document
    assert flops(found) == layers + head

def test_lora_forms_no_gradient_of_frozen_matrices_nor_below_the_first_layer() -> None:
    R, scored = 2, 6
    found = step_products(spec(is_causal=True), LENGTHS, scored, labels=None, R=R)
    frozen = 2 * (2 * 2 * 13 * LAYER + 6 * ATTENTION) - 2 * 13 * 3 * C * C
    ends = 2 * (4 * 2 * C + 2 * (C + F))  # inputs and outputs of all adapted layers, summed
    # h, y and their gradients, dA and dB: three products with each end; dx misses three times
    factors = 3 * 2 * 13 * R * ends - 2 * 13 * R * 3 * C
    head = 2 * 2 * scored * C * V
    assert flops(found) == frozen + factors + head
    assert Product(1, V, scored, C, "tn") not in found  # the head is frozen

def test_documents_of_one_length_share_their_products() -> None:
    found = attention_products(LENGTHS, H, D)
    assert {(p.batch, p.rows if p.kind == "nt" else p.inner) for p in found} == {(H, 3), (2 * H, 5)}
    assert flops(found) == 6 * ATTENTION

@pytest.mark.parametrize("kind", ["nn", "nt", "tn"])
@pytest.mark.parametrize("batch", [1, 3])
def test_products_have_the_shapes_that_they_name(kind: str, batch: int) -> None:
    product = Product(batch, 4, 6, 10, kind)
    with FlopCounterMode(display=False) as counter:
        assert seconds_of({product: 2}) > 0
    assert counter.get_total_flops() == 3 * product.flops  # two timed, one before
