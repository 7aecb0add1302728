"""Tiny random models and rows for the training loop."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
import numpy as np
import pytest
import torch
from ftcore.align.preference import bradley_terry, dpo
from ftcore.config import (
    EnvConfig,
    LoopConfig,
    OptimConfig,
    PeftConfig,
    PretrainRun,
    ScheduleConfig,
)
from ftcore.data.pack import Encoded, pair, shifted
from ftcore.env.compute import generator
from ftcore.env.run import RunFolder
from ftcore.model.heads import Model
from ftcore.model.transformer import ModelSpec
from ftcore.tune.loop import Loop
from ftcore.tune.task import choose_trainable, classification, token_labels

QWEN3 = ModelSpec(
    vocab_size=61, hidden_size=16, num_layers=2, intermediate_size=24, num_heads=2, num_kv_heads=1,
    head_dim=8, max_positions=64, is_causal=True, norm="rms_norm", norm_eps=1e-6, norm_first=True,
    position="rope", mlp="swiglu", qk_norm=True, tie_word_embeddings=True, initializer_range=0.2,
)  # fmt: skip
BERT = ModelSpec(
    vocab_size=61, hidden_size=16, num_layers=2, intermediate_size=24, num_heads=2, num_kv_heads=2,
    head_dim=8, max_positions=64, is_causal=False, norm="layer_norm", norm_eps=1e-12,
    norm_first=False, position="learned", mlp="gelu", linear_bias=True, qkv_bias=True, num_types=2,
    embedding_norm=True, pooling="cls", pooler="tanh", tie_word_embeddings=True,
    initializer_range=0.2,
)  # fmt: skip
LOSSES = {
    "bert": classification, "reward": partial(bradley_terry, centring=0.01),
    "dpo": partial(dpo, beta=0.3, loss="sigmoid", length_normalised=False),
}  # fmt: skip

@pytest.fixture
def tiny_model() -> Callable[..., Model]:
    """(family, dtype, dropout) -> a random model of that family, with its head, in train mode.

    "tag" and "masked" are the BERT with a head for each token, "reward" with one of one score;
    "dpo" is the Qwen3.
    """

    def make(
        family: str,
        *,
        dtype: torch.dtype = torch.float32,
        dropout: float = 0.0,
        num_labels: int = 3,
    ) -> Model:
        task = {"qwen3": "lm", "dpo": "lm", "tag": "tag", "masked": "mlm"}.get(family, "classify")
        spec = replace(QWEN3 if task == "lm" else BERT, dropout=dropout)
        model = Model(spec, task, 1 if family == "reward" else num_labels)
        model.init_weights(generator(0, 99))
        return model.to(dtype).train()

    return make

@pytest.fixture
def rows() -> Callable[..., list[Encoded]]:
    """(family, count) -> rows of 2 to 40 tokens; weights uneven, many of them zero by token. Pairs
    are two of the BERT's."""

    def make(family: str, count: int) -> list[Encoded]:
        if family in ("reward", "dpo"):
            sides = make("bert", 2 * count)
            sides = [shifted(d.row_id, d.tokens_T, np.ones(len(d), np.float32), d.types_T)
                     for d in sides]
            twos = zip(sides[::2], sides[1::2], strict=True)
            return [pair(both[0].row_id, both, margin=0.0) for both in twos]
        random = np.random.default_rng(count)
        made = []
        for index in range(count):
            length = int(random.integers(2, 40))
            tokens_T = random.integers(0, 61, length).astype(np.int32)
            if family == "bert":
                types_T = (np.arange(length) > length // 2).astype(np.int32)
                label, weight = int(random.integers(3)), float(random.integers(1, 9)) / 4
                made.append(Encoded(f"row-{index}", tokens_T, label, weight, types_T))
                continue
            weights_T = random.integers(0, 4, length).astype(np.float32) * (index % 3 + 0.25)
            weights_T[0], weights_T[-1] = 1.0, 0.0
            labels_T = tokens_T % 3 if family == "tag" else np.roll(tokens_T, -1)
            made.append(Encoded(f"row-{index}", tokens_T, labels_T, weights_T))
        return made

    return make

@pytest.fixture
def make_loop(tmp_path: Path, tiny_model: Callable, rows: Callable) -> Callable[..., Loop]:
    """A Loop on a tiny model; call it again with `resume=True` for what a new process would make.

    family, dtype, dropout, peft    the model, and what of it is trained
    compute                         of its matrix products
    optim                           options of the optimiser
    wrap                            decides on the latter in place of `peft`
    count                           training rows, 4 of them a step
    """
    loops: list[Loop] = []

    def make(
        name: str,
        *,
        resume: bool = False,
        family: str = "qwen3",
        dtype: torch.dtype = torch.float32,
        dropout: float = 0.0,
        peft: PeftConfig | None = None,
        wrap: Callable[[Model], object] | None = None,
        count: int = 18,
        compute: torch.dtype | None = None,
        optim: dict[str, Any] | None = None,
        evaluate: Callable[[], dict[str, float]] | None = None,
        **loop: Any,
    ) -> Loop:
        if loops:
            loops.pop().run.close()
        torch.manual_seed(1234 + len(name))  # what is left over in the generator must not matter
        model = tiny_model(family, dtype=dtype, dropout=dropout)
        if wrap is None:
            choose_trainable(model, peft or PeftConfig(), generator(0, 2))
        else:
            wrap(model)
        model.compute_in(compute)
        settings = {"max_steps": 12, "micro_batch_tokens": 50, "log_every": 1, "save_every": 100}
        made = Loop(
            model,
            LOSSES.get(family, token_labels),
            rows(family, count),
            PretrainRun(
                optim=OptimConfig(**({"lr": 1e-2, "batch_size": 4} | (optim or {}))),
                schedule=ScheduleConfig(shape="cosine", warmup=0.25, final=0.1),
                loop=LoopConfig(**(settings | loop)),
                env=EnvConfig(seed=7),
            ),
            RunFolder(tmp_path / name, resume=resume),
            evaluate=evaluate,
        )
        if resume:
            made.restore(made.checkpoints.latest())
        loops.append(made)
        return made

    yield make
    for loop in loops:
        loop.run.close()
