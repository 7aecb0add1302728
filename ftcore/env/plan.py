"""What a run will do, said before it does it: steps, tokens, trained parameters, memory.

The memory of a step is counted, not estimated: its forward and backward passes run on tensors that
have sizes and no values, so all that autograd saves and all that operations make is seen. On a CPU
glibc's heap is played with these sizes, for what its holes take.
"""

import weakref
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from itertools import count
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from ftcore.config import Recompute, Run
from ftcore.data.documents import lengths
from ftcore.data.pack import Batch, Encoded, collate, pack, split
from ftcore.env.device import free_bytes
from ftcore.model.heads import Model

MIB = 2**20
LINEAR_TOKENS = 4096  # from here on memory grows with the tokens: chunks of logits are full
LEAD, SPARE = 48, 96  # bytes that glibc cuts off before an aligned block, and asks for beside it
Loss = Callable[[Model, Batch], tuple[Tensor, Tensor]]

class Meter(TorchDispatchMode):
    """Bytes of the storages that operations make inside it: `live` now, `peak` at most, and as they
    came and went, `events` of (storage, bytes, below 0 where it went)."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.events: list[tuple[int, int]] = []
        self.known: set[int] = set()  # storages that are alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:  # its size is in the values, which are there
            with unset_fake_temporarily():
                return func(*args)
        made = func(*args, **(kwargs or {}))
        if func.is_view:  # of what is known, or of a parameter
            return made
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self._count(key, size)
                weakref.finalize(storage, self._count, key, -size)
        return made

    def _count(self, key: int, size: int) -> None:
        (self.known.add if size > 0 else self.known.discard)(key)
        self.events.append((key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

def heap_bytes(events: Iterable[tuple[int, int]]) -> int:
    """How far glibc's heap grows by such events, best fit first. Small objects take what is cut off
    before an aligned block, so a block that is free again serves smaller ones alone, until they go
    too: here when a third is left of what was alive, which fits what was measured (RECORDS.md)."""
    free: list[tuple[int, int]] = []  # sizes, ascending; the second number tells blocks apart
    held: dict[int, tuple[int, tuple[int, int]]] = {}  # sizes, and what was left of the free block
    top, live, high, number = 0, 0, 0, count()
    for key, size in events:
        live += size
        high = max(high, live)
        if size > 0:
            size = -(-size // 64) * 64 + 16
            place = bisect_left(free, (size + SPARE, 0))
            if place == len(free):
                free.append((size + LEAD, next(number)))
                top += size + LEAD
            held[key] = size, (free.pop(place)[0] - size - LEAD, next(number))
            insort(free, held[key][1])
        elif key in held:
            size, rest = held.pop(key)
            place = bisect_left(free, rest)
            if place < len(free) and free[place] == rest:
                size += free.pop(place)[0]
            insort(free, (size, next(number)))
            if live <= high / 3:
                free, high = [(sum(size for size, _ in free), next(number))], live
    return top

def step_bytes(model: Model, loss: Loss, documents: Sequence[Encoded]) -> dict[str, int]:
    """Memory of forward and backward over one micro-batch, gradients taken away as they come.

    returns     activations: what the trunk keeps for its backward pass; logits: the most that the
                loss adds; workspace: what the backward pass needs beyond both, and on a CPU holes
    """
    device, trained, meter = model.trunk.embed_tokens.weight.device, model.training, Meter()
    batch, marks = collate(documents).to(device), []
    batch.docs.walk  # noqa: B018  # planned by values, and kept
    with ExitStack() as undo:
        undo.callback(model.train, trained)
        for param in filter(lambda p: p.requires_grad, model.parameters()):
            hook = param.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            undo.callback(hook.remove)
        hook = model.trunk.register_forward_hook(lambda *_: marks.append(meter.live))
        undo.callback(hook.remove)
        model.train()
        undo.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        undo.enter_context(meter)
        loss_sum, _ = loss(model, batch)
        marks.append(meter.peak)
        loss_sum.backward()
    activations, forward = marks[0], max(marks)
    most = heap_bytes(meter.events) if device.type == "cpu" else meter.peak
    parts = {"activations": activations, "logits": forward - activations}
    return parts | {"workspace": max(most, forward) - forward}

class Plan:
    """Figures of a run: what `model` and `num_steps` optimiser steps over rows of these lengths
    will take.

    shares                      processes that a step is split between, each with its gradients
    accumulates                 whether a process may have several micro-batches a step
    num_rows, num_tokens        of one epoch
    num_params, num_trained     parameters
    memory_bytes                by component: what a run holds from start to end, also for rows of
                                embeddings that the data never read, which need none; after
                                `count`, what a step adds to it
    """

    def __init__(
        self, model: nn.Module, *, lengths: Sequence[int], num_steps: int, shares: int = 1,
        accumulates: bool = True,
    ) -> None:  # fmt: skip
        self.num_rows, self.num_tokens = len(lengths), int(np.sum(lengths))
        self.num_steps, self.shares, self.more = num_steps, shares, ""
        params = list(model.parameters())
        trained = [p for p in params if p.requires_grad]
        self.num_params, self.num_trained = (sum(p.numel() for p in x) for x in (params, trained))
        widths = {4} if accumulates else {p.element_size() for p in trained}
        self.memory_bytes = {
            "weights": sum(p.nbytes for p in params),
            "masters": 4 * sum(p.numel() for p in trained if p.element_size() < 4),
            "gradients": shares * max(widths) * self.num_trained,
            "moments": 8 * self.num_trained,
        }  # fmt: skip

    @classmethod
    def of(cls, config: Run, model: Model, documents: Sequence[Encoded]) -> "Plan":
        """The plan of a run on the model's device, with the heaviest micro-batch of it: the first
        one of a step that has the longest rows."""
        lengths_B, size = lengths(documents), config.optim.batch_size
        budget, is_cpu = config.loop.micro_batch_tokens, config.env.device == "cpu"
        longest = np.argsort(-lengths_B, kind="stable")[:size]
        plan = cls(
            model, lengths=lengths_B, num_steps=config.loop.num_steps(len(lengths_B), size),
            shares=min(config.env.threads, size) if is_cpu else 1,
            accumulates=int(lengths_B[longest].sum()) > budget,
        )  # fmt: skip
        mine = longest[split(lengths_B[longest], plan.shares)[0]]
        plan.heaviest = [documents[int(mine[i])] for i in pack(lengths_B[mine], budget)[0]]
        return plan

    def count(
        self, model: Model, loss: Loss, draw: Callable[[Encoded, int], Encoded] | None = None
    ) -> None:
        """Add what such micro-batches take, one in each process, and the largest ones that the
        device has memory for, by what is computed again."""
        documents = [draw(d, 0) for d in self.heaviest] if draw else self.heaviest
        model.use_kernels("eager")  # Triton's want values; so a GPU needs less than is said
        weight = model.trunk.embed_tokens.weight
        fixed, room = sum(self.memory_bytes.values()), free_bytes(weight.device)
        room += self.memory_bytes["weights"] if weight.device.type == "cpu" else 0
        step = step_bytes(model, loss, documents).items()
        self.memory_bytes |= {name: self.shares * size for name, size in step}
        tokens, chosen, most = sum(map(len, documents)), model.trunk.recompute, []
        many = [*documents] * -(-LINEAR_TOKENS // tokens)
        for model.trunk.recompute in get_args(Recompute):
            per_token = sum(step_bytes(model, loss, many).values()) / sum(map(len, many))
            fits = max(0, int((room - fixed) / self.shares / per_token))
            most.append(f"{model.trunk.recompute} {fits:,}")
        model.trunk.recompute = chosen
        peak = sum(self.memory_bytes.values())
        self.more = (
            f"\npredicted peak with micro-batches of {tokens:,} tokens: {peak / MIB:,.1f} MiB of"
            f" {room / MIB:,.1f}\nlargest micro-batches that fit, tokens, by env.recompute:"
            f" {', '.join(most)}"
        )

    def __str__(self) -> str:
        memory = "  ".join(f"{name} {size / MIB:.1f}" for name, size in self.memory_bytes.items())
        return (
            f"{self.num_steps} steps; an epoch is {self.num_rows} rows, {self.num_tokens} tokens\n"
            f"{self.num_trained} of {self.num_params} parameters are trained"
            f" ({self.num_trained / self.num_params:.1%})\nmemory, MiB: {memory}{self.more}"
        )
