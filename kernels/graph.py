"""What a GPU was told once, recorded as a CUDA graph and told again without Python."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Replay = Callable[[], None]

class Recorder:
    """A stream of its own, since autograd remembers the stream that a parameter was used on, and
    the memory of the graphs recorded on it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """On the stream of the graphs, between what came before and what comes after."""
        main = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            yield
        main.wait_stream(self.stream)

    def recorded(self, run: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        """What `run` returns, not yet computed, and what computes it, as often as it is called."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            result = run()
        return result, graph.replay
