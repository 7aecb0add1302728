"""The training loop, by hand.

    for each step:  rows -> a share for each core -> streams -> loss sums / the step's weight
                    -> backward -> norm -> clip -> AdamW -> log -> evaluate -> save

A step is a pure function of the state before it: its rows come from (seed, step), its dropout
noise from (seed, step, micro-step), its rate from the step. So a resumed run is bit-equal to one
never killed. A step whose loss or gradient is not finite is not applied. Its rows and the first bad
gradient are named, but where the loss scale of fp16 finds its height. Too many end the run."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from ftcore.config import Run
from ftcore.data.pack import Batch, Encoded, collate, lengths, split, step_rows, total_weight
from ftcore.env.compute import LossScale, derived
from ftcore.env.run import RunFolder, StopFlag
from ftcore.errors import CheckpointError, TrainingError
from ftcore.model.heads import EMBEDDING, Model
from ftcore.tune import checkpoint, freeze
from ftcore.tune.optim import AdamW, learning_rate
from ftcore.tune.task import Task, passes, token_labels
from ftcore.tune.workers import Workers
from kernels import graph, memory
from kernels.docs import pack

MAX_FAILED_SAVES = 3

@dataclass
class Progress:
    """What a run must remember beside its tensors; saved as JSON in every checkpoint."""
    step: int = 0  # optimiser steps done
    best: float = math.inf  # dev loss so far, or -F1 of entities, with the step that gave it
    best_step: int = 0
    evals_since_best: int = 0  # evaluations since then, for early stopping
    skipped_steps: int = 0  # steps that were not applied
    skipped_in_a_row: int = 0  # the last of them, but for those whose loss scale was too high

@dataclass
class Loop:
    model: Model
    task: Task  # the loss
    documents: Sequence[Encoded]  # the rows
    config: Run
    run: RunFolder
    evaluate: Callable[[], Mapping[str, float]] | None = None  # in eval mode; returns eval/<metric>
    progress: Progress = field(default_factory=Progress)
    reads_rows: ClassVar[bool] = True  # whether the documents of a step are rows, known beforehand

    def __post_init__(self) -> None:
        optim, loop, count = self.config.optim, self.config.loop, len(self.documents)
        self.device, self.seed, trunk = self.model.device, self.config.env.seed, self.model.trunk
        self.checkpoints = checkpoint.Checkpoints(self.run.path, loop.keep_last)
        size = self.config.rows_per_step
        self.rows = partial(step_rows, num_rows=count, batch_size=size, seed=self.seed)
        self.total_steps = loop.num_steps(count, size)
        threads = torch.get_num_threads() if self.device.type == "cpu" else 1
        self.num_processes = min(threads, optim.batch_size)  # each with documents in every step
        self.scale = LossScale() if trunk.embed_tokens.weight.dtype == torch.float16 else None
        self.remembered = {"progress": self.progress}  # its fields stand in every checkpoint
        self.remembered |= {"loss_scale": self.scale} if self.scale else {}
        longest = np.sort(lengths(self.documents))[-optim.batch_size :]
        is_fixed = self.reads_rows and self.device.type == "cpu"  # what is made may read any row
        rows = rows_read(self.model, self.documents) if is_fixed else {}
        trunk.embed_tokens.sparse, rates = bool(rows), freeze.rates_of(self.model, optim)
        self.optimizer = AdamW(
            self.model.named_parameters(), optim, rates=rates, rows=rows,
            accumulates=int(longest.sum()) > loop.micro_batch_tokens or not self.reads_rows)
        # what computes again reads the state of the noise; what is made has another loss
        is_graphed = (self.device.type == "cuda" and self.task is token_labels and self.reads_rows
                      and trunk.recompute == "none" and trunk.spec.max_positions >= graph.GRAIN)
        mine = partial(passes, self.task, self.model)
        self.graphs = graph.Graphs(mine, self.optimizer, self.device) if is_graphed else None

    def restore(self, loaded: checkpoint.Loaded | None) -> None:
        """Continue from a checkpoint of this run, or from its start where it never saved one."""
        if loaded is not None:
            for name, part in self.remembered.items():
                vars(part).update(loaded.state[name])
            self.optimizer.load_state(loaded.tensors, loaded.state["optimizer_steps"])
        self.run.trim(loaded.step if loaded else -1)

    def restore_best(self) -> None:
        """Put the weights of the best evaluation back, or their mean; if not saved, the last."""
        step = self.progress.best_step
        if step != self.progress.step and step in self.checkpoints.steps():
            best = checkpoint.load(self.checkpoints.of(step))
            self.optimizer.load_state(best.tensors, best.state["optimizer_steps"])
        self.optimizer.swap_ema()

    def train(self) -> int:
        """The exit code: 0, 130, 143. Raises CheckpointError, TrainingError: it cannot go on."""
        self.model.train()
        progress, options = self.progress, self.config.loop
        with (Workers(self.num_processes, self.optimizer, self) as workers, StopFlag() as stop,
              tqdm(total=self.total_steps, initial=progress.step, unit="step") as bar):
            while progress.step < self.total_steps and not self._is_out_of_patience():
                values = self._step(workers)
                values["perf/peak_mem_gib"] = memory.peak_bytes(self.device) / 2**30
                bar.update()
                bar.set_postfix(loss=f"{values['train/loss']:.3f}", refresh=False)
                is_last = (step := progress.step) == self.total_steps
                if self._is_logged(step):
                    self.run.log(step, values)
                is_judged = self.evaluate and (step % options.eval_every == 0 or is_last)
                is_best = is_judged and self._evaluate()
                exit_code = stop.exit_code  # read once: what leaves has saved
                is_stuck = progress.skipped_in_a_row > options.max_skipped
                is_due = step % options.save_every == 0 or is_best or is_last or is_stuck
                if is_due or exit_code or self._is_out_of_patience():
                    self._save()
                if is_stuck:
                    what = f"{progress.skipped_in_a_row} steps in a row were not applied"
                    see = f"skipped up to step {step}: {self.run.path}/skipped-step-N.json"
                    raise TrainingError(f"{what}, {see}; lower optim.lr, or mend the rows")
                if self.checkpoints.failed_in_a_row >= MAX_FAILED_SAVES:
                    what = "stopped, since checkpoints cannot be saved: mend that, then continue"
                    raise CheckpointError(f"{what} with: python train.py --resume {self.run.path}")
                if exit_code:
                    tqdm.write(f"stopped after step {step}; continue with --resume {self.run.path}")
                    return exit_code
        if self._is_out_of_patience():
            tqdm.write(f"early stop at step {progress.step}: best was step {progress.best_step}")
        return 0

    def _is_logged(self, step: int) -> bool:
        return step % self.config.loop.log_every == 0 or step in (1, self.total_steps)

    def _is_out_of_patience(self) -> bool:
        return 0 < self.config.loop.patience <= self.progress.evals_since_best

    def documents_of(self, step: int) -> list[Encoded]:
        return [self.documents[row] for row in self.rows(step)]

    def share(self, share: int, shares: int, step: int, loss_scale: float) -> float:
        """Gradients of a share of a step, times `loss_scale`, into a buffer; the bare loss sum."""
        documents = self.documents_of(step)
        weight, loss = total_weight(documents), 0.0
        mine = [documents[i] for i in split([len(d) for d in documents], shares)[share]]
        streams = pack([len(d) for d in mine], self.config.loop.micro_batch_tokens)
        self.optimizer.zero_grad()
        run = self.graphs or partial(passes, self.task, self.model)
        for micro_step, stream in enumerate(streams):
            torch.manual_seed(derived(self.seed, step, micro_step * shares + share))  # of dropout
            packed = [mine[i] for i in stream]
            batch = (filled(packed) if self.graphs else
                     collate(packed, is_causal=self.model.spec.is_causal).to(self.device))
            loss += run(batch, loss_scale / weight).item()
        self.optimizer.zero_unreached()
        return loss

    def _step(self, workers: Workers) -> dict[str, float]:
        started, step = time.perf_counter(), self.progress.step
        values = self._update(workers, step)
        self.progress.step += 1
        tokens = sum(map(len, self.documents_of(step)))
        return values | {"perf/tokens_per_s": tokens / (time.perf_counter() - started)}

    def _update(self, workers: Workers, number: int) -> dict[str, float]:
        """One update, if finite, by the documents of that number; returns what is logged."""
        step, progress, optim = self.progress.step, self.progress, self.config.optim
        scale = self.scale.value if self.scale else 1.0
        loss, grad_norms = workers.compute(number, scale)
        grad_norm, documents = math.hypot(*grad_norms), self.documents_of(number)
        mean_loss = loss / total_weight(documents)
        rate = learning_rate(step, self.total_steps, optim.lr, self.config.schedule)
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if self.scale:
            self.scale.update(is_finite)
        progress.skipped_steps += not is_finite
        if is_finite:
            progress.skipped_in_a_row = 0
            workers.ask("step", rate, min(1.0, optim.max_grad_norm / (grad_norm + 1e-6)) / scale)
        elif scale == 1 or not math.isfinite(loss):  # else the scale was too high
            progress.skipped_in_a_row += 1
            record = {"rows": [document.row_id for document in documents], "loss": str(mean_loss)}
            record |= {"bad gradient": self.optimizer.first_not_finite(), "norm": str(grad_norm)}
            path = self.run.dump(f"skipped-step-{step + 1}.json", record)
            found = f"step {step + 1}: loss {mean_loss:g}, gradient norm {grad_norm:g}"
            show = f"python -m ftcore.data show {self.run.path} --step {step + 1}"
            tqdm.write(f"{found}: not applied; noted in {path}; its text: {show}")
        groups = zip(self.optimizer.groups(), grad_norms, strict=True) if grad_norms[1:] else ()
        return {"train/loss": mean_loss, "train/grad_norm": grad_norm, "train/lr": rate,
                "train/skipped_steps": progress.skipped_steps,
                **{f"train/grad_norm/{group}": norm for group, norm in groups},
                **({"train/loss_scale": scale} if self.scale else {})}

    def _evaluate(self) -> bool:
        """Evaluate; returns whether it is the best so far."""
        step, progress = self.progress.step, self.progress
        self.model.eval()
        self.optimizer.swap_ema()
        with torch.no_grad():
            values = self.evaluate()
        self.optimizer.swap_ema()
        self.model.train()
        self.run.log(step, values)
        tqdm.write(f"step {step}: " + "  ".join(f"{k} {v:.4f}" for k, v in values.items()))
        progress.evals_since_best += 1
        # F1 of entities still rises when the loss, of errors made with confidence, does too
        value = float(-values.get("eval/f1", 0) or values["eval/loss"])
        if is_best := value < progress.best:
            progress.best, progress.best_step, progress.evals_since_best = value, step, 0
        return is_best

    def _save(self) -> None:
        """Write a checkpoint; a failed one is reported, and the run goes on."""
        state = {"optimizer_steps": self.optimizer.step_count}
        state |= {name: vars(part) for name, part in self.remembered.items()}
        step, best = self.progress.step, self.progress.best_step
        try:
            self.run.sync()
            self.checkpoints.save(step, self.optimizer.state(), state, best)
        except CheckpointError as error:
            tqdm.write(f"step {step}: not saved: {error}")

def rows_read(model: Model, documents: Sequence[Encoded]) -> dict[str, Tensor]:
    """int64 rows of token embeddings that are read, by matrix name; none if frozen or tied."""
    weight_VC = model.trunk.embed_tokens.weight
    if model.is_tied or not weight_VC.requires_grad:
        return {}
    is_read_V = np.zeros(len(weight_VC), dtype=bool)
    for document in documents:
        is_read_V[document.tokens_T] = True
    return {EMBEDDING: torch.from_numpy(is_read_V.nonzero()[0])}

def filled(documents: Sequence[Encoded]) -> Batch:
    """A token task's batch whose sizes are few, by a last document and rows that count nothing."""
    zeros_T = np.zeros(graph.GRAIN - sum(map(len, documents)) % graph.GRAIN, np.int32)
    batch = collate([*documents, Encoded("", zeros_T, zeros_T, zeros_T.astype(np.float32))])
    more, last = -len(batch.scored_M) % graph.GRAIN, len(batch.tokens_N) - 1
    return replace(batch, scored_M=F.pad(batch.scored_M, (0, more), value=last))
