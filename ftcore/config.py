"""What the user says: typed sections, and one run class per task that composes its own sections.

The command line is made from these classes (`ftcore/cli.py`): its headings are the docstrings, the
text of an option the comment behind it, or above. The type of a number says what it may be."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple, dataclass_transform
from tyro.conf import UseAppendAction

Format = Literal["auto", "tsv", "csv", "jsonl", "json", "txt", "labelled", "conll"]
OverLength = Literal["error", "drop", "cut_left", "cut_right", "split"]
TrainOn = Literal["all", "assistant", "last", "completion"]
Recompute = Literal["none", "selective", "all"]

class Limit(NamedTuple):
    """What a number must be, in words and in code; nothing holds for nan."""
    claim: str
    holds: Callable[[float], bool]

Natural = Annotated[int, Limit(">= 0", lambda n: n >= 0)]
Count = Annotated[int, Limit(">= 1", lambda n: n >= 1)]
NotNegative = Annotated[float, Limit(">= 0", lambda x: 0 <= x < math.inf)]
Positive = Annotated[float, Limit("> 0", lambda x: 0 < x < math.inf)]
Finite = Annotated[float, Limit("finite", math.isfinite)]
Share = Annotated[float, Limit("in [0, 1]", lambda x: 0 <= x <= 1)]
ProperShare = Annotated[float, Limit("in [0, 1)", lambda x: 0 <= x < 1)]

@dataclass_transform(frozen_default=True, kw_only_default=True)
class Section:
    """What is made from it is a frozen dataclass, whose fields are given by name."""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True, kw_only=True)(cls)

class ModelConfig(Section):
    """The model to start from."""
    path: str = "builtin:base"  # builtin:base or :start, a run, a folder in HF layout, or a hub id
    init: Literal["pretrained", "random"] = "pretrained"  # read weights, or draw them at random

class DataConfig(Section):
    """Files, what is done with their rows before they are tokens, and how long these may be."""
    train: tuple[str, ...] = ()  # files or globs (.jsonl .json .csv .tsv .txt .conll, also .gz)
    dev: tuple[str, ...] = ()  # rows that choose the best checkpoint; none: `holdout` of train
    test: tuple[str, ...] = ()  # files evaluated once, after training
    format: Format = "auto"  # auto: by suffix; labelled: lines of a label, a blank and the text
    columns: tuple[str, ...] = ()  # column names, for files without a header line
    on_bad: Literal["stop", "skip"] = "stop"  # what a damaged record does; skipped ones are kept
    holdout: Natural = 0  # training rows held out as dev rows when no dev file is given
    group: str = ""  # column whose value keeps rows together when some are held out
    unicode: Literal["nfc", "nfkc", "off"] = "nfc"  # normal form; controls and ends of lines go
    unescape: bool = False  # turn HTML entities into characters
    duplicates: Literal["off", "report", "exact", "near"] = "exact"  # which leave the training rows
    leaks: Literal["report", "drop"] = "drop"  # rows that give held-out ones away, as in 13 words
    cache: Path | None = Path("runs/cache")  # where tokens are kept for the next run; None: nowhere
    max_length: Count | None = None  # tokens, special ones included; None: any length
    over_length: OverLength = "error"  # of longer rows; cut_left keeps the end; all are listed

class TextDataConfig(DataConfig):
    """Plain text, of which every token is supervised."""
    leaks: Literal["report", "drop"] = "report"  # texts that are nearly held-out ones
    text: str = "text"  # column of the text in tables and json
    max_length: Count = 512  # tokens of one document
    over_length: OverLength = "split"  # of longer texts; split: several documents, none lost

class MaskedDataConfig(TextDataConfig):
    """Plain text, of which some tokens are hidden and to be told."""
    maskings: Count = 1  # times each text is there, with other tokens hidden each time

class ChatDataConfig(DataConfig):
    """Conversations: `messages` [{role, content}], or others by the names of their columns."""
    messages: str = "messages"  # column of turns, or of a transcript whose speakers `roles` names
    turn: tuple[str, str] = ("role", "content")  # keys of a turn: its role, its text
    roles: tuple[str, ...] = ()  # other names of roles in the files: human=user gpt=assistant
    prompt: tuple[str, ...] = ()  # columns of a question, joined by empty lines; not `messages`
    answer: str = "answer"  # column of the answer to `prompt`
    train_on: TrainOn = "assistant"  # completion: the last answer and all the template adds to it
    train_on_end: bool = True  # supervise the token that ends a turn, so that the model stops

class PromptsDataConfig(ChatDataConfig):
    """Conversations whose last answer the policy gives anew; rewards may compare it with theirs."""

class PairsDataConfig(ChatDataConfig):
    """Two answers to one prompt, the better one first; without `prompt` whole conversations."""
    prompt: tuple[str, ...] = ()  # columns of a question, or its turns; none: what both begin with
    chosen: str = "chosen"  # column of the better answer: text, or a list of its one turn
    rejected: str = "rejected"  # column of the worse answer
    margin: str = ""  # column of how much better it is, in units of the score; empty: all alike
    over_length: Literal["error", "drop", "cut_left"] = "error"  # cut_left: of the prompt alone
    messages: ClassVar[str] = ""  # chats have these three; of a pair both answers are learned from
    answer: ClassVar[str] = ""
    train_on: ClassVar[TrainOn] = "last"

class TextsConfig(DataConfig):
    """Texts or pairs of texts, never split: what is said of a text is not said of its parts."""
    text: str = "text"  # column of the text
    pair: str = ""  # column of the second text; empty: single texts
    over_length: Literal["error", "drop", "cut_left", "cut_right"] = "error"  # of longer rows

class LabelledDataConfig(TextsConfig):
    """Texts or pairs of texts with one label, or several."""
    label: str = "label"  # column of the label
    label_separator: str = ""  # between the labels of a row that has several; empty: one
    balance: Literal["off", "weights", "over", "under"] = "off"  # rare classes: weigh, repeat more
    # most that a row may weigh, or be repeated, or that the largest class is times the smallest
    balance_cap: Annotated[float, Limit(">= 1", lambda x: 1 <= x < math.inf)] = 10.0

class ScoredDataConfig(TextsConfig):
    """Texts or pairs of texts with a score."""
    label: str = "score"  # column of the score

class TaggedDataConfig(DataConfig):
    """Sentences with one tag a word: O, B-TYPE and I-TYPE (BIO, IOB1, BIOES, BILOU), or others."""
    tokens: str = "tokens"  # column of the words, a list; in CoNLL files the first one
    tags: str = "tags"  # column of their tags, a list; in CoNLL files the last one
    over_length: Literal["error", "drop"] = "error"  # of longer sentences

class EnvConfig(Section):
    """Where and how exactly it computes."""
    device: str = "auto"  # auto (a GPU, if there is one), cpu, cuda or cuda:N
    # bf16, fp16: with an fp32 master, fp16 with a loss scale too; bf16-autocast: its products alone
    precision: Literal["bf16", "bf16-autocast", "fp16", "fp32"] = "bf16"
    threads: Count = 2  # CPU cores: a share of a training step each, or threads of one operation
    kernels: Literal["auto", "eager", "triton"] = "auto"  # auto: Triton on a GPU, if it is exact
    recompute: Recompute = "none"  # layers (activation checkpointing): less memory, more time
    deterministic: bool = True  # the same bits each time; what that costs here, --verify tells
    seed: Natural = 0  # of data order, initial values and dropout

class PeftConfig(Section):
    """What is trained."""
    method: Literal["full", "freeze", "lora"] = "full"  # all, `trainable`, or low-rank updates
    trainable: tuple[str, ...] = ("head",)  # head, last:K, embeddings, norms, biases, all, a glob
    rank: Count = 8  # lora: rank of the update
    alpha: Positive = 16.0  # lora: the update is scaled by alpha / rank
    dropout: ProperShare = 0.0  # lora: dropout on the input of the update
    targets: tuple[str, ...] = ("all-linear",)  # lora: layers by last name, glob, or all-linear
    rs_lora: bool = False  # lora: scale by alpha / sqrt(rank)
    extra_modules: tuple[str, ...] = ()  # lora: modules that are trained fully beside it

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rs_lora else self.rank)

class OptimConfig(Section):
    """AdamW."""
    lr: Positive = 5e-5  # peak learning rate
    batch_size: Count = 32  # rows of one optimiser step
    betas: tuple[ProperShare, ProperShare] = (0.9, 0.98)  # decay rates of the two moments
    eps: Positive = 1e-8  # floor of the denominator
    weight_decay: NotNegative = 0.01  # decoupled, on matrices only
    max_grad_norm: Positive = 1.0  # clip the global gradient norm to this
    ema: ProperShare = 0.0  # decay of a mean of the weights, which is judged and kept; 0: none
    loraplus_lr_ratio: Positive = 1.0  # lora: learning rate of B over that of A (LoRA+)
    head_lr_ratio: Positive = 1.0  # learning rate of the head over that of the run
    embedding_lr_ratio: Positive = 1.0  # the same of token, position and segment embeddings
    layer_lr_decay: Share = 1.0  # factor on it from each layer to the one below, embeddings too

class ScheduleConfig(Section):
    """Learning rate over the run."""
    shape: Literal["cosine", "linear", "constant", "wsd"] = "linear"  # wsd: peak, then a decay
    warmup: ProperShare = 0.1  # share of the steps that warm up, in [0, 1)
    decay: ProperShare = 0.2  # wsd: share of the steps in which it decays, in [0, 1)
    final: Share = 0.0  # share of the peak that is left at the end, in [0, 1]

class LoopConfig(Section):
    """How long, how often."""
    epochs: Positive = 1.0  # passes over the training rows
    max_steps: Natural = 0  # optimiser steps; 0: as many as the epochs take
    micro_batch_tokens: Count = 8192  # token budget of one forward and backward pass
    eval_every: Count = 200  # steps between evaluations on the dev rows
    save_every: Count = 200  # steps between checkpoints
    log_every: Count = 10  # steps between lines of metrics.jsonl
    keep_last: Count = 2  # checkpoints kept beside the best one
    max_skipped: Natural = 20  # steps in a row that may be not applied before the run stops
    patience: Natural = 0  # evaluations without a better dev value before it stops early; 0: never

    def num_steps(self, num_rows: int, batch_size: int) -> int:  # of a run over so many rows
        return self.max_steps or math.ceil(self.epochs * math.ceil(num_rows / batch_size))

class EvalConfig(Section):
    """How the model is judged."""
    max_new_tokens: Count = 64  # longest generated answer, tokens
    intent_field: str = ""  # field of JSON answers scored as a class; empty: plain text

class RewardsConfig(Section):
    """What an answer is worth."""
    sources: tuple[str, ...] = ()  # match, command:FIELD, model:RUN, python:FILE:NAME, program:CMD
    weights: tuple[Finite, ...] = ()  # factor of each source; none: 1 each
    missing_end: NotNegative = 0.0  # taken off where the limit cut the answer
    per_token: NotNegative = 0.0  # taken off for each token of the answer
    scale: bool = False  # divide scores by the standard deviation of all so far
    clip: NotNegative = 0.0  # bound of a score, on both sides, after scaling; 0: none
    seconds: Positive = 300.0  # that a source may take for the answers of an iteration

class RolloutConfig(Section):
    """Answers drawn from the policy."""
    prompts: Count = 32  # of one iteration
    samples: Count = 1  # answers to each prompt
    max_new_tokens: Natural = 0  # longest answer, tokens; to be given: there is no good default
    temperature: Positive = 1.0  # of drawing and of all log-probabilities

class PpoConfig(Section):
    """How the policy is updated; `optim.batch_size` answers make one update."""
    advantage: Literal["gae", "group", "leave_one_out"] = "gae"  # a value head's, GRPO's, RLOO's
    epochs: Count = 4  # over the answers of an iteration
    clip: Positive = 0.2  # of the ratio of new to old probability, around 1
    kl: Literal["k1", "k3", "exact"] = "k1"  # estimate of the divergence in the rewards
    kl_coef: NotNegative = 0.05  # its factor, at first
    kl_target: NotNegative = 0.0  # nats an answer, towards which the factor is adapted; 0: fixed
    kl_horizon: Positive = 10000.0  # answers over which it adapts
    stop_kl: NotNegative = 0.0  # nats a token, above which an iteration's updates end; 0: none
    gamma: Share = 1.0  # discount
    gae_lambda: Share = 0.95  # 0: one step ahead, 1: the whole answer
    whiten: bool = True  # advantages, over the whole rollout
    value_coef: NotNegative = 0.1  # factor of the value loss
    value_clip: NotNegative = 0.2  # of a value's change; 0: none
    entropy_coef: NotNegative = 0.0  # factor of the entropy, which is rewarded
    critic_warmup: Natural = 0  # first iterations, in which the values alone are trained
    best_of: Natural = 0  # answers of the start, of which the best is told beside; 0: none

class RewardConfig(Section):
    """The score of an answer, learned from pairs."""
    centring: NotNegative = 0.01  # weight of the squared sum of a pair's scores: they stay near 0

class DpoConfig(Section):
    """Direct preference optimisation; the reference is the model as it was."""
    beta: Positive = 0.1  # how closely the model stays to the reference: higher is closer
    loss: Literal["sigmoid", "ipo"] = "sigmoid"  # ipo: no gain beyond a margin of 1 / (2 beta)
    length_normalised: bool = False  # log-probabilities a token, not of whole answers

class LogConfig(Section):
    """Where the run is written down."""
    dir: Path = Path("runs")  # folder of all runs
    name: str = ""  # folder of this run inside it; empty: the task and the time

class ServeConfig(Section):
    """What is served, to whom, within which limits."""
    host: str = "127.0.0.1"  # address; others than this machine's own need keys
    port: Annotated[int, Limit("in [0, 65535]", lambda n: 0 <= n < 2**16)] = 8000  # 0: any free one
    api_key_file: Path | None = None  # a key a line; None: whoever reaches the port may ask
    insecure: bool = False  # no keys, and every Host, at any address
    public_metrics: bool = False  # /metrics needs no key
    adapter: UseAppendAction[tuple[str, ...]] = ()  # NAME=DIR: LoRA that requests may name as model
    device: str = "auto"  # auto (a GPU, if there is one), cpu, cuda or cuda:N
    precision: Literal["bf16", "bf16-autocast", "fp16", "fp32"] = "bf16"  # autocast: fp32 weights
    kernels: Literal["auto", "eager", "triton"] = "auto"  # auto: Triton on a GPU
    threads: Count = 2  # CPU cores of the engine
    max_sequences: Count = 64  # that are answered at once
    prefill_tokens: Count = 512  # of prompts in one step
    cache_tokens: Count = 65536  # slots of keys and values
    prefix_tokens: Natural = 16384  # kept of ended sequences for prompts that begin alike; 0: off
    queue: Count = 512  # sequences that may wait; a request may hold `inputs` at once
    connections: Count = 1024  # at once
    head_seconds: Positive = 5.0  # from the connection to the end of the head
    body_seconds: Positive = 10.0  # from there to the end of the body
    queue_seconds: Positive = 30.0  # until the first token
    request_seconds: Positive = 300.0  # of a request in all
    stall_seconds: Positive = 30.0  # in which a client reads nothing, or not the rest
    drain_seconds: NotNegative = 30.0  # for running requests, after the first signal to stop
    body_kib: Count = 1024  # KiB of a body
    send_buffer_kib: Count = 256  # KiB that a client has not read
    choices: Count = 8  # of one prompt (n)
    prompts: Count = 16  # of one request, times its choices
    messages: Count = 512  # of one conversation
    inputs: Count = 256  # texts of one request for embeddings or classes
    stop_strings: Count = 4  # strings that end an answer, of one request
    bias_entries: Count = 300  # of logit_bias
    log: Path | None = None  # file of a JSON line a request; None: standard error
    log_mib: Count = 64  # MiB of it, after which it is put aside as FILE.TIME and begun anew
    log_texts: bool = False  # texts too, without e-mail addresses and numbers of phones and cards

class PretrainRun(Section):
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
    problem: ClassVar[str | None] = None  # HF's `problem_type`, where documents are judged
    labels: ClassVar[tuple[str, ...] | None] = None  # names of outputs that the data does not name

    @property
    def rows_per_step(self) -> int:  # training rows that a step of the loop reads
        return self.optim.batch_size

class MaskedRun(PretrainRun):
    """Masked-language modelling: an encoder learns to tell hidden tokens of plain text."""
    data: MaskedDataConfig = MaskedDataConfig()

class SftRun(PretrainRun):
    """Supervised fine-tuning on conversations."""
    data: ChatDataConfig = ChatDataConfig()
    peft: PeftConfig = PeftConfig(method="lora")

class PpoRun(SftRun):
    """Reinforcement learning of a policy from rewards: PPO."""
    data: PromptsDataConfig = PromptsDataConfig()
    reward: RewardsConfig = RewardsConfig()
    rollout: RolloutConfig = RolloutConfig()
    ppo: PpoConfig = PpoConfig()

    @property
    def rows_per_step(self) -> int:
        return self.rollout.prompts

class GrpoRun(PpoRun):
    """Reinforcement learning by comparing several answers to each prompt: GRPO, RLOO."""
    rollout: RolloutConfig = RolloutConfig(prompts=8, samples=8)
    ppo: PpoConfig = PpoConfig(advantage="group", epochs=1, whiten=False)

class ClassifyRun(PretrainRun):
    """Fine-tuning a classifier of texts or pairs of texts, with one label a row or several."""
    data: LabelledDataConfig = LabelledDataConfig()

    @property
    def problem(self) -> str:
        return f"{'multi' if self.data.label_separator else 'single'}_label_classification"

class RegressRun(PretrainRun):
    """Fine-tuning a model to score texts or pairs of texts."""
    data: ScoredDataConfig = ScoredDataConfig()
    problem = "regression"

class TagRun(PretrainRun):
    """Fine-tuning a tagger of words, such as of named entities."""
    data: TaggedDataConfig = TaggedDataConfig()
    problem = "token_classification"

class RewardRun(PretrainRun):
    """Training a model to score answers: of a pair, the chosen one above the rejected one."""
    data: PairsDataConfig = PairsDataConfig()
    reward: RewardConfig = RewardConfig()
    problem = "regression"
    labels = ("reward",)

class DpoRun(SftRun):
    """Direct preference optimisation: chosen answers become likelier, rejected ones less."""
    data: PairsDataConfig = PairsDataConfig()
    dpo: DpoConfig = DpoConfig()

RUNS = {"pretrain": PretrainRun, "mlm": MaskedRun, "sft": SftRun, "classify": ClassifyRun,
        "regress": RegressRun, "tag": TagRun, "reward": RewardRun, "dpo": DpoRun, "ppo": PpoRun,
        "grpo": GrpoRun}
Run = PretrainRun  # and the tasks made from it
