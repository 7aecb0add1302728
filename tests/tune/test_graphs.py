"""Micro-batches replayed from a graph, against the same computed one by one.

There is no GPU here: what stands for a graph runs the captured passes again, over the places that
they were captured on, by the kernels in the interpreter.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
import numpy as np
import pytest
import torch
from torch import Tensor
from ftcore.config import OptimConfig
from ftcore.data.pack import Batch, Encoded, collate, shifted
from ftcore.model.heads import Model
from ftcore.tune import loop
from ftcore.tune.optim import AdamW
from ftcore.tune.task import passes, token_labels
from kernels import graph
from tests.kernels import interpreter

interpreter.require()
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|All-NaN)")

class Interpreted(graph.Graphs):
    """Graphs without a GPU."""

    replays, pool, stream = 0, None, None

    @contextmanager
    def aside(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graph, "recorded", self.recorded)
            yield

    def recorded(self, run: Callable[[], Tensor],
                 **where: object) -> tuple[Tensor, Callable[[], None]]:
        kept = [buffer.clone() for buffer in self.sink.buffers]
        loss = run()
        for buffer, before in zip(self.sink.buffers, kept, strict=True):
            buffer.copy_(before)
        loss.fill_(torch.nan)

        def replay() -> None:
            self.replays += 1
            kept, self.sink.stale = self.sink.stale, set(self.sink.stale)
            loss.copy_(run())
            self.sink.stale = kept  # a graph runs no hooks

        return loss, replay

def document(length: int, seed: int) -> Encoded:
    random = np.random.default_rng(seed)
    counts_T = (np.arange(length) > length // 3).astype(np.float32)
    return shifted(str(seed), random.integers(0, 61, length).astype(np.int32), counts_T)

# Micro-batches of three steps; each is filled to 32 tokens and 32 scored rows.
STEPS = [[[9, 7], [31]], [[5, 5, 5, 5], [1, 20, 2]], [[12], [20, 3]]]

@pytest.fixture(autouse=True)
def fine(monkeypatch) -> None:
    monkeypatch.setattr(graph, "GRAIN", 32)
    monkeypatch.setattr(graph, "MORE_DOCS", 8)

def collected(tiny_model, impl: str) -> tuple[AdamW, Callable]:
    """An optimiser, and the passes whose gradients it collects."""
    model = tiny_model("qwen3")
    model.use_kernels(impl)
    optimizer = AdamW(model.named_parameters(), OptimConfig())
    return optimizer, partial(passes, token_labels, model)

def test_replayed_steps_have_the_gradients_of_steps_computed_one_by_one(tiny_model) -> None:
    optimizer, mine = collected(tiny_model, "triton")
    replayed = Interpreted(mine, optimizer, torch.device("cpu"))
    plain_optimizer, plain = collected(tiny_model, "eager")
    for step, streams in enumerate(STEPS):
        optimizer.zero_grad()
        plain_optimizer.zero_grad()
        for micro_step, lengths in enumerate(streams):
            stream = [document(n, 10 * step + micro_step) for n in lengths]
            loss = replayed(loop.filled(stream), 0.5 + step)
            torch.testing.assert_close(loss, plain(collate(stream), 0.5 + step))
        assert optimizer.stale == plain_optimizer.stale == set()
        mine, true = optimizer.buffers[0], plain_optimizer.buffers[0]
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5)
    # of first and of later micro-batches: one computed, one captured and replayed, one replayed
    assert len(replayed.graphs) == 2 and replayed.replays == 4

def test_a_batch_is_filled_by_what_counts_nothing() -> None:
    for length in (31, 32, 33):
        batch = loop.filled([document(length, 1)])
        assert len(batch.tokens_N) == (32 if length < 32 else 64)
        assert len(batch.scored_M) == 32
        scored = int((document(length, 1).weights > 0).sum())
        assert (batch.weights[batch.scored_M] > 0).sum() == scored

def counted(batch: Batch, factor: Tensor) -> Tensor:
    """Passes that read the tiles of a batch alone."""
    batch.docs.tiles(16, 16, back=64, ahead=0)
    return (batch.weights[batch.scored_M] * factor).sum()

def asked(found: graph.Graphs, *lengths: int) -> list[float]:
    found.sink.zero_grad()
    streams = ([document(length, length)] for length in lengths)
    return [found(loop.filled(stream), 1.0).item() for stream in streams]

@pytest.fixture
def optimizer(tiny_model) -> AdamW:
    return AdamW(tiny_model("qwen3").named_parameters(), OptimConfig())

def test_more_sizes_than_may_be_are_computed_as_ever(optimizer, monkeypatch) -> None:
    monkeypatch.setattr(graph, "MOST", 1)
    found = Interpreted(counted, optimizer, torch.device("cpu"))
    assert [asked(found, 20, 40) for _ in range(3)] == [[13, 26]] * 3
    assert len(found.graphs) == 1 and found.replays == 2

def test_a_path_that_plans_by_values_is_computed_as_ever(optimizer) -> None:
    def by_walk(batch: Batch, factor: Tensor) -> Tensor:
        assert batch.docs.walk
        return counted(batch, factor)

    found = Interpreted(by_walk, optimizer, torch.device("cpu"))
    assert [asked(found, 20) for _ in range(3)] == [[13]] * 3 and not found.graphs

def test_what_cannot_be_captured_is_computed_as_ever_and_told(optimizer, caplog) -> None:
    found = Interpreted(counted, optimizer, torch.device("cpu"))

    def recorded(run: Callable[[], Tensor], **where: object) -> None:
        found.sink.stale = set()
        raise RuntimeError("the stream is capturing")

    found.recorded = recorded
    assert [asked(found, 20) for _ in range(3)] == [[13]] * 3 and not found.graphs
    assert found.sink.stale == set(optimizer.params)
    assert [record.getMessage() for record in caplog.records] == [
        "computed without a CUDA graph: the stream is capturing"]

class Maker(loop.Loop):
    """One whose rows are made on the way, with a loss of their own."""

    reads_rows = False

def test_the_loss_of_rows_that_are_made_has_no_graph(
    make_loop: Callable[..., loop.Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "device", torch.device("cuda"))
    monkeypatch.setattr(graph, "Graphs", lambda *_: "replayed")
    read = make_loop("read")
    assert read.graphs == "replayed"
    assert Maker(read.model, read.task, read.documents, read.config, read.run).graphs is None
