"""What the user says: typed sections, and one run class per task that composes its own sections.

The command line is made from these classes (`ftcore/cli.py`); the text under a field is its help.
Every number has a unit or is a plain ratio. There is no value that means "inherit".
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

BASE = "builtin:base"


@dataclass(frozen=True)
class ModelConfig:
    """The model to start from."""

    path: str = BASE
    """model folder in the HF layout, a hub id (owner/name), or builtin:base"""
    init: Literal["pretrained", "random"] = "pretrained"
    """read the weights, or draw them at random from the folder's config.json"""


@dataclass(frozen=True)
class TextDataConfig:
    """Plain text for pre-training."""

    train: tuple[str, ...] = ("builtin:corpus",)
    """text files (.txt, .jsonl with `text`, .gz), or builtin:corpus"""
    dev: tuple[str, ...] = ("builtin:corpus",)
    """held-out text, or builtin:corpus for its held-out part"""
    text: str = "text"
    """column of the text in tables and json"""
    max_length: int = 512
    """tokens of one document; longer ones are cut into several, none is lost"""
    copies: int = 120_000
    """copy tasks in the built-in corpus, rows"""


@dataclass(frozen=True)
class EnvConfig:
    """Where and how exactly it computes."""

    device: str = "cpu"
    """cpu, cuda or cuda:N"""
    precision: Literal["bf16", "fp32"] = "bf16"
    """compute dtype; with bf16 whatever is trained has an fp32 master"""
    threads: int = 2
    """CPU threads of one operation"""
    seed: int = 0
    """of data order, initial values and dropout"""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW."""

    lr: float = 5e-5
    """peak learning rate"""
    batch_size: int = 32
    """rows of one optimiser step"""
    betas: tuple[float, float] = (0.9, 0.98)
    """decay rates of the two moments"""
    eps: float = 1e-8
    """floor of the denominator"""
    weight_decay: float = 0.01
    """decoupled, on matrices only"""
    max_grad_norm: float = 1.0
    """clip the global gradient norm to this"""


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the run."""

    shape: Literal["cosine", "linear", "constant"] = "linear"
    """after the warm-up"""
    warmup: float = 0.1
    """share of the steps that warm up, in [0, 1)"""
    final: float = 0.0
    """share of the peak that is left at the end, in [0, 1]"""


@dataclass(frozen=True)
class LoopConfig:
    """How long, how often."""

    epochs: float = 1.0
    """passes over the training rows"""
    max_steps: int = 0
    """optimiser steps; 0: as many as the epochs take"""
    micro_batch_tokens: int = 8192
    """token budget of one forward and backward pass"""
    eval_every: int = 200
    """steps between evaluations on the dev rows"""
    save_every: int = 200
    """steps between checkpoints"""
    log_every: int = 10
    """steps between lines of metrics.jsonl"""
    keep_last: int = 2
    """checkpoints kept beside the best one"""
    patience: int = 0
    """evaluations without a better dev value before it stops early; 0: never"""


@dataclass(frozen=True)
class LogConfig:
    """Where the run is written down."""

    dir: Path = Path("runs")
    """folder of all runs"""
    name: str = ""
    """folder of this run inside it; empty: the task and the time"""


@dataclass(frozen=True)
class PretrainRun:
    """Next-token training on plain text."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: TextDataConfig = field(default_factory=TextDataConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    log: LogConfig = field(default_factory=LogConfig)
