"""The plan's figures, counted by hand on a model of two tensors."""

import torch
from torch import nn

from ftcore.env.plan import Plan

def test_memory_by_component() -> None:
    model = nn.ModuleDict({
        "frozen": nn.Linear(10, 10, bias=False).requires_grad_(False).to(torch.bfloat16),
        "trained": nn.Linear(10, 2, bias=False).to(torch.bfloat16),
        "wide": nn.Linear(5, 1, bias=False),
    })
    made = Plan(model, lengths=[3, 4, 5], num_steps=9)
    assert (made.num_rows, made.num_tokens, made.num_steps) == (3, 12, 9)
    assert (made.num_params, made.num_trained) == (125, 25)
    assert made.memory_bytes == {
        "weights": 200 + 40 + 20,
        "masters": 80,  # the bf16 tensor's; the fp32 one is its own
        "gradients": 100,
        "moments": 200,
    }
    assert str(made).splitlines()[:2] == [
        "9 steps; an epoch is 3 rows, 12 tokens",
        "25 of 125 parameters are trained (20.0%)",
    ]

def test_a_tied_matrix_is_counted_once() -> None:
    model = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    model[1].weight = model[0].weight
    made = Plan(model, lengths=[1], num_steps=1)
    assert made.num_params == 16 and made.memory_bytes["weights"] == 64
