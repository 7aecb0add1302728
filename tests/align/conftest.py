"""A policy so small that every answer it can give is enumerated, on rewards that are known."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
import pytest
import tokenizers
import torch
from torch import Tensor
from ftcore.align.ppo import PpoLoop
from ftcore.align.rollout import Actor
from ftcore.config import GrpoRun, PpoRun, PromptsDataConfig
from ftcore.data.columns import Chat, Message
from ftcore.data.encode import encode
from ftcore.data.store import Prepared
from ftcore.data.tokenizer import Tokenizer
from ftcore.env.compute import generator
from ftcore.env.run import RunFolder
from ftcore.model.heads import Model
from ftcore.model.transformer import ModelSpec
from ftcore.tune.task import choose_trainable, token_labels

LETTERS, END, LONGEST = "abcd", "<|end|>", 3
WORTH = {"a": 1.0, "b": 0.3, "c": 0.0, "d": -0.5}  # of each letter of an answer
TEMPLATE = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|end|>" \
           "{% endif %}{% endfor %}"
SIZES = {
    "vocab_size": len(LETTERS) + 1, "hidden_size": 32, "num_layers": 2, "intermediate_size": 48,
    "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "max_positions": 32, "is_causal": True,
    "norm": "rms_norm", "norm_eps": 1e-6, "norm_first": True, "position": "rope", "mlp": "swiglu",
    "initializer_range": 0.3,
}

def worth(rows: list[dict[str, Any]]) -> list[float]:
    """The reward: what the letters of an answer are worth."""
    return [sum(WORTH[letter] for letter in row["answer"]) for row in rows]

@pytest.fixture(scope="session")
def letters() -> Tokenizer:
    vocab = {token: id_ for id_, token in enumerate([*LETTERS, END])}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    fast.decoder = tokenizers.decoders.Fuse()
    fast.add_special_tokens([END])
    config = f'{{"eos_token": "{END}"}}'.encode()
    files = {"tokenizer.json": fast.to_str().encode(), "tokenizer_config.json": config,
             "chat_template.jinja": TEMPLATE.encode()}
    return Tokenizer(files, where="letters")

@pytest.fixture
def make_ppo(tmp_path: Path, letters: Tokenizer) -> Callable[..., PpoLoop]:
    """(name, seed) -> a run of PPO; options by the names of sections. `resume=True` makes what a
    new process would."""
    code = tmp_path / "worth.py"
    code.write_text(f"WORTH = {WORTH}\ndef worth(rows):\n    return [sum(WORTH[c] for c in "
                    'row["answer"]) for row in rows]\n', "utf-8")
    open_runs: list[RunFolder] = []

    def make(name: str, seed: int = 0, *, resume: bool = False, group: bool = False,
             sources: tuple[str, ...] = (f"python:{code}:worth",), **sections: Any) -> PpoLoop:
        while open_runs:
            open_runs.pop().close()
        config = (GrpoRun if group else PpoRun)()
        given = {
            "env": {"precision": "fp32", "seed": seed}, "peft": {"method": "full"},
            "reward": {"sources": sources}, "rollout": {"max_new_tokens": LONGEST, "prompts": 32},
            "optim": {"lr": 1e-2, "batch_size": 64, "weight_decay": 0.0},
            "schedule": {"warmup": 0.0, "shape": "constant"},
            "loop": {"max_steps": 4, "log_every": 1, "save_every": 100, "eval_every": 100},
        }  # fmt: skip
        for section, options in {**given, **sections}.items():
            options = {**given.get(section, {}), **options}
            config = replace(config, **{section: replace(getattr(config, section), **options)})
        model = Model(ModelSpec(**SIZES), "lm")
        model.init_weights(generator(seed, 1))
        choose_trainable(model, config.peft, generator(seed, 2))
        chats = [Chat(f"r{i}", (Message(role="user", content=a + b),
                                Message(role="assistant", content="a")))
                 for i, (a, b) in enumerate(product(LETTERS, LETTERS))]
        split = encode(PromptsDataConfig(), chats, letters)
        data = Prepared(train=split, dev=replace(split, chats=split.chats[:4]))
        open_runs.append(run := RunFolder(tmp_path / name, resume=resume))
        loop = PpoLoop(model, token_labels, split.documents, config, run,
                       actor=Actor(model, letters, config, data))
        if resume:
            loop.restore(loop.checkpoints.latest())
        return loop

    yield make
    while open_runs:
        open_runs.pop().close()

def answers() -> list[list[int]]:
    """Every answer that there can be, as ids: up to the end, or to the longest."""
    end, found = len(LETTERS), [[]]
    done: list[list[int]] = []
    for _ in range(LONGEST):
        longer = [[*ids, id_] for ids in found for id_ in range(end + 1)]
        done += [ids for ids in longer if ids[-1] == end]
        found = [ids for ids in longer if ids[-1] != end]
    return done + found

@torch.no_grad()
def chances(model: Model, prompt: list[int]) -> Tensor:
    """Log-probability of each of `answers()`, float64."""
    from kernels.docs import Docs

    rows = [prompt + ids for ids in answers()]
    docs = Docs.from_lengths([*map(len, rows)])
    tokens_N = torch.tensor([id_ for ids in rows for id_ in ids])
    h_NC = model.trunk(tokens_N, docs.positions_N(), torch.zeros_like(tokens_N), docs)
    logp_NV = model.head(h_NC).double().log_softmax(-1)
    parts = []
    for ids, logp_TV in zip(rows, logp_NV.split(docs.lengths), strict=True):
        said = torch.tensor(ids[len(prompt) :])
        parts.append(logp_TV[len(prompt) - 1 : -1].gather(1, said[:, None]).sum())
    return torch.stack(parts)
