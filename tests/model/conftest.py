"""Tiny random models of transformers, saved to folders, as the oracle of ours.

A kind is `variant-task`: a variant of a family, and trunk, classify, tag, mlm, mlm_untied, tied or
untied (the last two with a head for the next token).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any
import pytest
import torch

SHARED = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.1,
    "max_position_embeddings": 640,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = {"num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # of 4 frequencies, some kept, blended and divided
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}

# variant -> (HF model_type, settings of its own)
DECODERS = {
    "qwen3": ("qwen3", GROUPED | {"head_dim": 16}),
    "gpt2": ("gpt2", {"n_inner": 48}),
    "llama": ("llama", GROUPED | {"rope_parameters": LLAMA3}),
    "llama_linear": ("llama", {"rope_parameters": LINEAR, "head_dim": 12}),
    "mistral": ("mistral", GROUPED | {"sliding_window": 20}),
    "qwen2": ("qwen2", GROUPED),
    "neox": ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4}}),
    "neox_serial": ("gpt_neox", {"use_parallel_residual": False}),
    "neox_odd": ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.4} | LINEAR}),
    "gemma2": (
        "gemma2",
        GROUPED
        | {"head_dim": 12, "query_pre_attn_scalar": 17, "sliding_window": 20}
        | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
    ),
    "gemma3": (
        "gemma3_text",
        GROUPED
        | {"head_dim": 12, "query_pre_attn_scalar": 17, "sliding_window": 20}
        | {"num_hidden_layers": 7, "rope_parameters": {"full_attention": LINEAR}},
    ),
}
ENCODERS = {
    "bert": ("bert", {}),
    "roberta": ("roberta", {"type_vocab_size": 1, "pad_token_id": 1}),
    "distilbert": ("distilbert", {"hidden_dim": 48}),
    "modernbert": ("modernbert", {"local_attention": 20, "num_hidden_layers": 4}),
    "modernbert_mean": ("modernbert", {"classifier_pooling": "mean", "norm_eps": 1e-4}),
}
VARIANTS = DECODERS | ENCODERS
LABELS = {0: "bad", 1: "fair", 2: "good"}
KINDS = [
    *(f"{name}-{task}" for name in DECODERS for task in ("tied", "untied", "trunk", "classify")),
    *(f"{name}-{task}" for name in ENCODERS for task in ("trunk", "classify", "tag", "mlm")),
    *(f"{name}-tag" for name in DECODERS if name != "gemma3"),
    *(f"{name}-mlm_untied" for name in ("distilbert", "modernbert")),
]
AUTO = {
    "trunk": "AutoModel",
    "lm": "AutoModelForCausalLM",
    "mlm": "AutoModelForMaskedLM",
    "classify": "AutoModelForSequenceClassification",
    "tag": "AutoModelForTokenClassification",
}

def _task(kind: str) -> str:
    task = kind.split("-")[1].removesuffix("_untied")
    return "lm" if task in ("tied", "untied") else task

def _build(kind: str) -> torch.nn.Module:
    """The model, in evaluation mode, with every tensor away from its initial constant."""
    transformers = pytest.importorskip("transformers")
    variant, task = kind.split("-")
    model_type, own = VARIANTS[variant]
    settings = SHARED | own
    if task in ("classify", "tag"):
        settings |= {"id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}}
    if variant in DECODERS or task.endswith("untied"):
        settings |= {"tie_word_embeddings": task == "tied"}
    config = transformers.AutoConfig.for_model(model_type, **settings)
    auto = getattr(transformers, AUTO[_task(kind)])
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = auto.from_config(config, attn_implementation="eager").eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            # Gemma: norms of outputs, which would add a variance of 1 in each sub-layer.
            if "gemma" in model_type and ".post_" in name:
                parameter.sub_(0.8)
    return model

@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Every kind in turn; a test that names its own kinds overrides this."""
    return request.param

@pytest.fixture(params=[kind for kind in KINDS if _task(kind) == "lm"])
def lm_kind(request: pytest.FixtureRequest) -> str:
    """Every kind with a head for the next token."""
    return request.param

@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """kind -> (the transformers model, the folder it was saved to); neither may be changed."""
    made: dict[str, tuple[Any, Path]] = {}

    def get(kind: str) -> tuple[Any, Path]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            model = _build(kind)
            model.save_pretrained(folder)
            made[kind] = (model, folder)
        return made[kind]

    return get

@pytest.fixture
def task_of_kind() -> Callable[[str], str]:
    """kind -> the task to load it for."""
    return _task

@pytest.fixture
def auto_class() -> Callable[[str], Any]:
    """kind -> the class of transformers that loads it."""
    transformers = pytest.importorskip("transformers")
    return lambda kind: getattr(transformers, AUTO[_task(kind)])

@pytest.fixture
def documents() -> Callable[..., list[list[int]]]:
    """Lengths -> random documents without the padding token, the same in every run."""

    def draw(lengths: list[int], seed: int = 0) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(2, 97, (n,), generator=generator).tolist() for n in lengths]

    return draw
