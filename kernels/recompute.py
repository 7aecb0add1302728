"""Activations computed again in the backward pass, not kept for it (non-reentrant checkpointing).

Autograd saves a number in place of each tensor; the first that is asked for runs the function
again, with the same noise, up to the last tensor saved. torch's own form of this imports torch's
compiler: 152 MiB more in each process."""

from collections.abc import Callable
from contextlib import suppress
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

class _Done(Exception):
    """All that had been saved is there again."""

def computed_again(function: Callable[..., Tensor], x: Tensor, *rest: object) -> Tensor:
    """function(x, *rest), for whose one backward pass nothing but x is kept."""
    gpus = [x.device] if x.is_cuda else []
    noise = torch.get_rng_state(), *map(torch.cuda.get_rng_state, gpus)
    numbers: list[int] = []
    again: list[Tensor | None] = []

    def number(_: Tensor) -> int:
        numbers.append(len(numbers))
        return numbers[-1]

    def keep(tensor: Tensor) -> None:
        again.append(tensor.detach())
        if len(again) == len(numbers):
            raise _Done

    def tensor(number: int) -> Tensor | None:
        if not again:
            with torch.enable_grad(), torch.random.fork_rng(gpus), suppress(_Done):
                torch.set_rng_state(noise[0])
                for gpu, state in zip(gpus, noise[1:], strict=True):
                    torch.cuda.set_rng_state(state, gpu)
                with saved_tensors_hooks(keep, lambda _: None):
                    function(x.detach().requires_grad_(x.requires_grad), *rest)
        found, again[number] = again[number], None  # free once it is used
        return found

    with saved_tensors_hooks(number, tensor):
        return function(x, *rest)
