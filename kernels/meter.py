"""The memory that operations take, counted as they make their tensors; these may have no values."""

import weakref
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any
import torch
from torch import Tensor, cuda, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

LEAD, SPARE = 48, 96  # bytes that glibc cuts off before an aligned block, and asks for beside it

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
        tensors = made if isinstance(made, tuple | list) else [made]
        for storage in (t.untyped_storage() for t in tensors if isinstance(t, Tensor)):
            if storage._cdata not in self.known:
                self._count(storage._cdata, storage.nbytes())
                weakref.finalize(storage, self._count, storage._cdata, -storage.nbytes())
        return made

    def _count(self, key: int, size: int) -> None:
        (self.known.add if size > 0 else self.known.discard)(key)
        self.events.append((key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

def heap_bytes(events: Iterable[tuple[int, int]]) -> int:
    """How far glibc's heap grows by such events, best fit first. A block that is free again serves
    smaller ones alone, until what took its lead goes too: here when a third is left of what was
    alive, which fits what was measured (ftcore/RECORDS.md)."""
    free: list[tuple[int, int]] = []  # sizes, ascending; the second number tells blocks apart
    held: dict[int, tuple[int, tuple[int, int]]] = {}  # sizes, and what was left of the free block
    top, live, high = 0, 0, 0
    for number, (key, size) in enumerate(events):
        live += size
        high = max(high, live)
        if size > 0:
            size = -(-size // 64) * 64 + 16
            place = bisect_left(free, (size + SPARE, 0))
            if place == len(free):
                free.append((size + LEAD, number))
                top += size + LEAD
            held[key] = size, (free.pop(place)[0] - size - LEAD, number)
            insort(free, held[key][1])
        elif key in held:
            size, rest = held.pop(key)
            place = bisect_left(free, rest)
            if place < len(free) and free[place] == rest:
                size += free.pop(place)[0]
            insort(free, (size, number))
            if live <= high / 3:
                free, high = [(sum(size for size, _ in free), number)], live
    return top

def passes_bytes(loss_sum: Callable[[], Tensor], model: nn.Module, trunk: nn.Module, *,
                 is_taken: bool = False) -> dict[str, int]:
    """Memory of a model's forward pass to a loss and of its backward pass, in training, on tensors
    that have sizes and no values: activations, kept by its trunk; logits, what the loss adds;
    workspace, what the backward pass needs beyond both, and holes on a CPU. With `is_taken` a GPU
    takes the passes, and tells; raises torch.OutOfMemoryError."""
    meter, marks, start = Meter(), [], cuda.memory_allocated() if is_taken else 0
    now = (lambda: cuda.memory_allocated() - start) if is_taken else lambda: meter.live
    most = (lambda: cuda.max_memory_allocated() - start) if is_taken else lambda: meter.peak
    with ExitStack() as undo:
        undo.callback(model.train, model.training)
        for param in (trained := [p for p in model.parameters() if p.requires_grad]):
            hook = param.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            undo.callback(hook.remove)
        undo.enter_context(trunk.register_forward_hook(lambda *_: marks.append(now())))
        model.train()
        if is_taken:
            cuda.reset_peak_memory_stats()
        for counts in () if is_taken else (FakeTensorMode(allow_non_fake_inputs=True), meter):
            undo.enter_context(counts)
        loss = loss_sum()
        forward = most()
        loss.backward()
    peak = heap_bytes(meter.events) if trained[0].device.type == "cpu" else most()
    return {"activations": marks[0], "logits": forward - marks[0],
            "workspace": max(0, peak - forward)}
