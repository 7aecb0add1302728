"""Which parameters each rule trains, the table, and the proof of freezing."""

import pytest
import torch
from torch import nn
from ftcore.errors import ConfigError, ModelError
from ftcore.model.families import family_named
from ftcore.model.heads import Model
from ftcore.tune.freeze import (
    apply_trainable,
    assert_unmoved,
    frozen_hashes,
    parameter_table,
    tensor_sha256,
)

QWEN3 = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
BERT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}

def make_qwen3(*, tied: bool = False) -> Model:
    return Model(family_named("qwen3").to_spec(QWEN3 | {"tie_word_embeddings": tied}), "lm")

def make_bert() -> Model:
    return Model(family_named("bert").to_spec(BERT), "classify", 3)

def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}

def test_all_and_head() -> None:
    model = make_qwen3()
    apply_trainable(model, ["all"])
    assert trained(model) == dict(model.named_parameters()).keys()
    apply_trainable(model, ["head"])
    assert trained(model) == {"head.lm_head.weight"}

def test_last_layers_and_what_follows() -> None:
    model = make_qwen3(tied=True)
    apply_trainable(model, ["last:2"])
    names = trained(model)
    assert {n.split(".")[2] for n in names if ".layers." in n} == {"1", "2"}
    assert {n for n in names if ".layers." not in n} == {"trunk.norm.weight"}
    assert len(names) == 2 * 11 + 1
    model = make_bert()
    apply_trainable(model, ["last:1"])
    assert {n for n in trained(model) if ".layers." not in n} == {
        *("head.pooler.weight", "head.pooler.bias"),
        *("head.classifier.weight", "head.classifier.bias"),
    }

def test_embeddings_norms_biases() -> None:
    model = make_bert()
    apply_trainable(model, ["embeddings"])
    assert trained(model) == {
        f"trunk.embed_{what}.weight" for what in ("tokens", "positions", "types")
    }
    apply_trainable(model, ["norms"])
    norms = {f"trunk.layers.{i}.{n}" for i in (0, 1) for n in ("input_", "post_attention_")}
    expected = {"trunk.embed_norm", *(f"{name}layernorm" for name in norms)}
    assert trained(model) == {f"{n}.{p}" for n in expected for p in ("weight", "bias")}
    apply_trainable(model, ["biases"])
    assert trained(model) == {n for n, _ in model.named_parameters() if n.endswith(".bias")}
    assert "trunk.layers.0.self_attn.q_proj.bias" in trained(model)
    model = make_qwen3()
    apply_trainable(model, ["norms"])
    assert "trunk.layers.0.self_attn.q_norm.weight" in trained(model)

def test_patterns_train_the_union() -> None:
    model = make_qwen3()
    apply_trainable(model, ["trunk.layers.[01].mlp", "v_proj", "trunk.norm.weight"])
    mlp = {f"trunk.layers.{i}.mlp.{p}_proj.weight" for i in (0, 1) for p in ("gate", "up", "down")}
    values = {f"trunk.layers.{i}.self_attn.v_proj.weight" for i in range(3)}
    assert trained(model) == mlp | values | {"trunk.norm.weight"}

@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("v_porj", "'v_porj' matches nothing; nearest: 'v_proj'"),
        ("attn_output_norm", "'attn_output_norm' matches nothing"),  # it has no parameter here
        ("embedding", "nearest: 'embeddings'"),
        ("trunk.layers.7.*", "matches nothing; nearest: 'trunk.layers.2"),
        ("biases", "no such parameter"),
        ("head", "trained by 'embeddings'"),
        ("last:0", r"K must be an integer in \[1, 3\]"),
        ("last:4", r"K must be an integer in \[1, 3\]"),
        ("last:two", r"K must be an integer in \[1, 3\]"),
    ],
)
def test_a_rule_without_effect_is_an_error_and_changes_nothing(rule: str, message: str) -> None:
    model = make_qwen3(tied=True)
    before = trained(model)
    with pytest.raises(ConfigError, match=message):
        apply_trainable(model, ["norms", rule])
    assert trained(model) == before

def test_no_rule_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no rule says what to train; known: all, head"):
        apply_trainable(make_qwen3(), [])

def test_table_groups_equal_layers_and_counts_tied_weights_once() -> None:
    model = make_qwen3(tied=True)
    table = apply_trainable(model, ["trunk.layers.[02].self_attn.q_proj", "trunk.norm"])
    lines = [line.split() for line in table.splitlines()]
    assert ["trunk.embed_tokens.weight", "50", "x", "16", "800", "-"] in lines
    q_proj = "trunk.layers.{%s}.self_attn.q_proj.weight"
    assert [q_proj % "0,2", "16", "x", "16", "512", "yes"] in lines
    assert [q_proj % "1", "16", "x", "16", "256", "-"] in lines
    assert ["trunk.layers.{0-2}.mlp.up_proj.weight", "24", "x", "16", "1,152", "-"] in lines
    total = sum(p.numel() for p in model.parameters())
    assert table.splitlines()[-1] == f"trainable: 528 of {total:,} values ({528 / total:.2%})"
    assert table == parameter_table(model)

def test_proof_of_freezing() -> None:
    model = make_qwen3()
    model.init_weights(torch.Generator().manual_seed(0))
    apply_trainable(model, ["norms"])
    before = frozen_hashes(model)
    assert before.keys() == dict(model.named_parameters()).keys() - trained(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    x_NC = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    model.trunk.layers[0].mlp(model.trunk.norm(x_NC)).square().sum().backward()
    optimizer.step()
    assert_unmoved(before, model)
    with torch.no_grad():
        model.trunk.layers[1].mlp.up_proj.weight[3, 5] *= 1 + 2**-23
        model.trunk.embed_tokens.weight[0, 0] = -0.0
    with pytest.raises(ModelError, match="embed_tokens.weight, trunk.layers.1.mlp.up_proj.weight$"):
        assert_unmoved(before, model)

def test_hash_is_of_bits_shape_and_dtype() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    assert tensor_sha256(tensor) == tensor_sha256(tensor.t().contiguous().t())
    others = [tensor.view(3, 2), tensor.t(), tensor.bfloat16(), tensor.double(), tensor + 1e-6]
    assert tensor_sha256(tensor) not in map(tensor_sha256, others)
    assert tensor_sha256(torch.tensor(1.0)) != tensor_sha256(torch.tensor([1.0]))
