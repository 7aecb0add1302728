"""The invariance suite, `train.py TASK ... --verify`: what must not change a result, tried on some
training rows and the model that is about to be trained, read in fp32. Every claim is measured, and
one that does not hold is an error. Only temporary files are written."""

import tempfile
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any
import torch
from torch import Tensor
from ftcore.config import Run
from ftcore.data import pack, store
from ftcore.data.chat import encode_prompt
from ftcore.data.tokenizer import Tokenizer
from ftcore.env.run import RunFolder
from ftcore.errors import ModelError
from ftcore.evaluate import evaluator, report
from ftcore.model.load import LoadedModel
from ftcore.tune import adapter, checkpoint, lora, task
from ftcore.tune.loop import Loop
from ftcore.tune.workers import Workers

TOKENS = 2048  # of the rows that it is tried on, together; two rows at least, 16 at most
ALL = 8 * TOKENS  # side by side
STEPS = 4  # of the runs that are compared
NEAR, EXACT = 1e-5, 0.0  # relative distances: what sums in another order may cost in fp32, and none
Claim = tuple[str, float, float]  # what must not change a result, how far it did, how far it may

class Verifier:
    def __init__(self, config: Run, kind: task.TaskKind, loaded: LoadedModel, tokenizer: Tokenizer,
                 data: store.Prepared, work: Path) -> None:
        self.config, self.kind, self.loaded, self.tokenizer = config, kind, loaded, tokenizer
        self.data, self.work, self.model = data, work, loaded.model.eval()
        self.exact = EXACT if config.env.deterministic else NEAR
        first = data.train.documents[:16]
        self.documents = first[: max(2, (pack.lengths(first).cumsum() <= TOKENS).sum())]

    def loop(self, name: str, *, steps: int = 1, tokens: int = ALL, resume: bool = False) -> Loop:
        """A run from the first weights; in one step it takes all rows, in several half of them."""
        self.model = deepcopy(self.loaded.model)
        size = len(self.documents) if steps == 1 else max(1, len(self.documents) // 2)
        limits = {"micro_batch_tokens": tokens, "max_steps": steps, "save_every": STEPS // 2}
        config = replace(self.config, optim=replace(self.config.optim, batch_size=size),
                         loop=replace(self.config.loop, **limits, keep_last=2))
        run = RunFolder(self.work / name, resume=resume)
        return Loop(self.model, self.kind.loss, self.documents, config, run)

    def gradient(self, name: str, processes: int = 1, again: str = "", **options: Any) -> Tensor:
        """Of one step over all rows; `again`: with noise, and these layers computed again."""
        loop = self.loop(name, **options)
        self.model.train(bool(again)).trunk.recompute = again or "none"
        with loop.run, Workers(processes, loop.optimizer, loop) as workers:
            workers.compute(0)
            return sum(buffer.double() for buffer in loop.optimizer.buffers)

    def trained(self, *, resume: bool) -> Tensor:
        """Weights after STEPS steps, or after the second half of them in another run."""
        loop = self.loop("run", steps=STEPS, resume=resume)
        with loop.run:
            if resume:
                loop.restore(checkpoint.load(loop.run.path / "checkpoints" / f"step-{STEPS // 2}"))
            loop.train()
        return torch.nn.utils.parameters_to_vector(self.model.eval().parameters()).detach()

    @torch.no_grad()
    def outputs(self, tokens: int = ALL) -> Tensor:
        return evaluator.all_logits(self.model, self.documents, tokens)

    def claims(self) -> Iterator[Claim]:
        alone = self.outputs(tokens=1)
        yield "a row alone, or packed with others", apart(self.outputs(), alone), NEAR
        step, again = self.gradient("step"), self.gradient("again")
        yield "a step, or the same once more", apart(step, again), self.exact
        yield "one micro-batch, or a row in each", apart(step, self.gradient("row", tokens=1)), NEAR
        kept, again = (self.gradient(word, again=word) for word in ("none", "all"))
        yield "activations kept, or computed again", apart(kept, again), self.exact
        if self.model.device.type == "cpu":
            yield "one process, or two", apart(step, self.gradient("two", processes=2)), NEAR
        else:
            self.loaded.model.use_kernels("eager")
            yield "Triton's kernels, or torch", apart(step, self.gradient("eager")), 1e-3
            self.loaded.model.use_kernels(self.config.env.kernels)
        once, twice = self.trained(resume=False), self.trained(resume=True)
        yield f"{STEPS} steps, or resumed after {STEPS // 2}", apart(once, twice), self.exact
        last = self.outputs()
        if lora.lora_layers(self.model):
            lora.merge(self.model)
            yield "updates beside the matrices, or merged", apart(last, self.outputs()), NEAR
        made = self.loaded._replace(model=self.model)
        adapter.save_artifact(made, self.tokenizer, self.work, self.config)
        again = adapter.load_artifact(self.work, kind=self.kind, dtype=torch.float32)
        self.model = again.model.to(self.loaded.model.device)
        self.model.use_kernels(self.config.env.kernels)
        yield "in memory, or saved and loaded", apart(last, self.outputs()), EXACT
        judged = [split for _, split in self.data.splits() if split.chats]
        read = {d.row_id: d.tokens_T.tolist() for split in judged for d in split.documents}
        chats = [chat for split in judged for chat in split.chats[:16] if chat.id in read]
        prompts = [encode_prompt(chat.messages[:-1], self.tokenizer).tolist() for chat in chats]
        if odd := [read[c.id][: len(p)] != p for c, p in zip(chats, prompts, strict=True)]:
            yield f"prompts of {len(odd)} chats, or training's", sum(odd) / len(odd), EXACT

def apart(one: Tensor, other: Tensor) -> float:
    return ((one.double() - other.double()).norm() / one.double().norm().clamp(min=1e-30)).item()

def verify(*what: Any) -> str:
    """The claims as a table; `what` goes to Verifier. Raises ModelError: one does not hold."""
    with tempfile.TemporaryDirectory() as work:
        claims = list(Verifier(*what, Path(work)).claims())
    rows = [(*claim, "holds" if claim[1] <= claim[2] else "DOES NOT HOLD") for claim in claims]
    told = report.table(("what must not change a result", "apart", "at most", ""), rows)
    if broken := [name for name, distance, most in claims if not distance <= most]:
        raise ModelError(f"{told}\n\nverify: {'; '.join(broken)}: does not hold; train no further")
    return told
