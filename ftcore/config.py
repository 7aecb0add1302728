"""What the user says: typed sections, and one run class per task that composes its own sections.

The command line is made from these classes (`ftcore/cli.py`); the text under a field is its help.
Every number has a unit or is a plain ratio. There is no value that means "inherit".
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

BASE = "builtin:base"
Format = Literal["auto", "tsv", "csv", "jsonl", "json", "txt", "conll", "labelled", "tar"]


@dataclass(frozen=True)
class ModelConfig:
    """The model to start from."""

    path: str = BASE
    """model folder in the HF layout, a hub id (owner/name), or builtin:base"""
    init: Literal["pretrained", "random"] = "pretrained"
    """read the weights, or draw them at random from the folder's config.json"""


@dataclass(frozen=True)
class TextDataConfig:
    """Plain text; rows with `messages` among it are chats, supervised on their answers."""

    train: tuple[str, ...] = ()
    """text files (.txt, .jsonl, .csv, .tsv, each also .gz)"""
    dev: tuple[str, ...] = ()
    """held-out text"""
    test: tuple[str, ...] = ()
    """files evaluated once, after training"""
    text: str = "text"
    """column of the text in tables and json"""
    max_length: int = 512
    """tokens of one document; longer ones are cut into several, none is lost"""


@dataclass(frozen=True)
class MaskedDataConfig(TextDataConfig):
    """Plain text, of which every step hides some tokens."""


@dataclass(frozen=True)
class ChatDataConfig:
    """Conversations: one JSON object a line with `messages` [{role, content}]."""

    train: tuple[str, ...] = ()
    """chat files (.jsonl, .json, each also .gz), or builtin:chat"""
    dev: tuple[str, ...] = ()
    """rows for choosing the best checkpoint; none: the last checkpoint is kept"""
    test: tuple[str, ...] = ()
    """files evaluated once, after training; builtin:chat has three test splits"""
    messages: str = "messages"
    """column of the conversation"""
    train_on: Literal["all", "assistant", "last"] = "assistant"
    """which turns are supervised; the end of a supervised turn always is"""
    max_length: int | None = None
    """tokens; None: any length"""
    over_length: Literal["error", "drop", "cut_right"] = "error"
    """what happens to a longer row; dropped and cut rows are counted and kept in a file"""


@dataclass(frozen=True)
class RowsConfig:
    """Labelled rows of any kind: their files, and how long they may be."""

    train: tuple[str, ...] = ()
    """files (.tsv, .csv, .jsonl, .json, .conll, .tar, each also .gz); FILE.json:KEY"""
    dev: tuple[str, ...] = ()
    """rows for choosing the best checkpoint; none: `holdout` rows of train"""
    test: tuple[str, ...] = ()
    """files evaluated once, after training"""
    format: Format = "auto"
    """of all files; auto: by their suffixes; labelled: lines of a label, a blank and the text"""
    columns: tuple[str, ...] = ()
    """column names, for files without a header line"""
    holdout: int = 0
    """training rows held out as dev rows when no dev file is given"""
    max_length: int | None = None
    """tokens, special ones included; None: any length"""
    over_length: Literal["error", "drop", "cut_right"] = "error"
    """what happens to a longer row; dropped and cut rows are counted and kept in a file"""


@dataclass(frozen=True)
class TextsConfig(RowsConfig):
    """Texts or pairs of texts."""

    text: str = "text"
    """column of the text"""
    pair: str = ""
    """column of the second text; empty: single texts"""


@dataclass(frozen=True)
class LabelledDataConfig(TextsConfig):
    """Texts or pairs of texts with one label, or several."""

    label: str = "label"
    """column of the label"""
    label_separator: str = ""
    """what stands between the labels where a row has several, in json also a list; empty: one"""
    relabel: tuple[str, ...] = ()
    """other names for labels as the files have them: OLD=NEW"""


@dataclass(frozen=True)
class ScoredDataConfig(TextsConfig):
    """Texts or pairs of texts with a score."""

    label: str = "score"
    """column of the score"""


@dataclass(frozen=True)
class TaggedDataConfig(RowsConfig):
    """Sentences with one tag a word: O, B-TYPE and I-TYPE (BIO or IOB1), or tags of any kind."""

    tokens: str = "tokens"
    """column of the words, a list; in CoNLL files the first one"""
    tags: str = "tags"
    """column of their tags, a list; in CoNLL files the last one"""


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
class PeftConfig:
    """What is trained."""

    method: Literal["full", "freeze", "lora"] = "full"
    """all tensors, those named by `trainable`, or low-rank updates"""
    trainable: tuple[str, ...] = ("head",)
    """freeze: head, last:K, embeddings, norms, biases, all, a name or a glob"""
    rank: int = 8
    """lora: rank of the update"""
    alpha: float = 16.0
    """lora: the update is scaled by alpha / rank"""
    dropout: float = 0.0
    """lora: dropout on the input of the update"""
    targets: tuple[str, ...] = ("all-linear",)
    """lora: layers by last name (q_proj), glob, or all-linear"""
    rs_lora: bool = False
    """lora: scale by alpha / sqrt(rank)"""
    extra_modules: tuple[str, ...] = ()
    """lora: modules that are trained fully beside it"""


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

    def num_steps(self, num_rows: int, batch_size: int) -> int:
        """Optimiser steps of a run over `num_rows` training rows."""
        return self.max_steps or math.ceil(self.epochs * math.ceil(num_rows / batch_size))


@dataclass(frozen=True)
class EvalConfig:
    """How the model is judged."""

    max_new_tokens: int = 64
    """longest generated answer, tokens"""
    intent_field: str = ""
    """field of JSON answers that is scored as a class; empty: answers are plain text"""
    samples: int = 3
    """answers shown at the end"""


@dataclass(frozen=True)
class LogConfig:
    """Where the run is written down."""

    dir: Path = Path("runs")
    """folder of all runs"""
    name: str = ""
    """folder of this run inside it; empty: the task and the time"""


@dataclass(frozen=True, kw_only=True)
class PretrainRun:
    """Next-token training on plain text."""

    model: ModelConfig = ModelConfig()
    data: TextDataConfig = TextDataConfig()
    env: EnvConfig = EnvConfig()
    peft: PeftConfig = PeftConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loop: LoopConfig = LoopConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    problem: ClassVar[str | None] = None
    """HF's `problem_type` of a model that judges whole documents; None: it does not"""


@dataclass(frozen=True, kw_only=True)
class MaskedRun(PretrainRun):
    """Masked-language modelling: an encoder learns to fill in hidden tokens of plain text."""

    data: MaskedDataConfig = MaskedDataConfig()


@dataclass(frozen=True, kw_only=True)
class SftRun(PretrainRun):
    """Supervised fine-tuning on conversations."""

    data: ChatDataConfig = ChatDataConfig()
    peft: PeftConfig = PeftConfig(method="lora")


@dataclass(frozen=True, kw_only=True)
class ClassifyRun(PretrainRun):
    """Fine-tuning a classifier of texts or pairs of texts, with one label a row or several."""

    data: LabelledDataConfig = LabelledDataConfig()

    @property
    def problem(self) -> str:
        return f"{'multi' if self.data.label_separator else 'single'}_label_classification"


@dataclass(frozen=True, kw_only=True)
class RegressRun(PretrainRun):
    """Fine-tuning a model to score texts or pairs of texts."""

    data: ScoredDataConfig = ScoredDataConfig()
    problem = "regression"


@dataclass(frozen=True, kw_only=True)
class TagRun(PretrainRun):
    """Fine-tuning a tagger of words, such as named entities."""

    data: TaggedDataConfig = TaggedDataConfig()


RUNS = {
    "pretrain": PretrainRun,
    "mlm": MaskedRun,
    "sft": SftRun,
    "classify": ClassifyRun,
    "regress": RegressRun,
    "tag": TagRun,
}
Run = PretrainRun  # and the tasks made from it

Limit = tuple[str, Callable[[float], bool]]
POSITIVE: Limit = ("> 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE: Limit = (">= 0", lambda value: 0 <= value < math.inf)
AT_LEAST_1: Limit = (">= 1", lambda value: value >= 1)
PROPER_SHARE: Limit = ("in [0, 1)", lambda value: 0 <= value < 1)
SHARE: Limit = ("in [0, 1]", lambda value: 0 <= value <= 1)
LIMITS: dict[str, dict[str, Limit]] = {
    "data": {"max_length": AT_LEAST_1, "holdout": NOT_NEGATIVE},
    "env": {"threads": AT_LEAST_1, "seed": NOT_NEGATIVE},
    "peft": {"rank": AT_LEAST_1, "alpha": POSITIVE, "dropout": PROPER_SHARE},
    "optim": {
        "lr": POSITIVE,
        "batch_size": AT_LEAST_1,
        "betas": PROPER_SHARE,
        "eps": POSITIVE,
        "weight_decay": NOT_NEGATIVE,
        "max_grad_norm": POSITIVE,
    },
    "schedule": {"warmup": PROPER_SHARE, "final": SHARE},
    "loop": {
        "epochs": POSITIVE,
        "max_steps": NOT_NEGATIVE,
        "patience": NOT_NEGATIVE,
        **dict.fromkeys(("micro_batch_tokens", "eval_every"), AT_LEAST_1),
        **dict.fromkeys(("save_every", "log_every", "keep_last"), AT_LEAST_1),
    },
    "eval": {"max_new_tokens": AT_LEAST_1, "samples": NOT_NEGATIVE},
}


def out_of_range(run: Run) -> Iterator[tuple[str, Any, str]]:
    """Name, value and limit of each number that cannot be meant."""
    for section, limits in LIMITS.items():
        for key, (claim, holds) in limits.items():
            value = getattr(getattr(run, section), key, None)
            numbers = value if isinstance(value, tuple) else (value,)
            if value is not None and not all(map(holds, numbers)):
                yield f"{section}.{key}", value, claim
