"""The pass rule of a kernel: its error against that of its definition, in the same dtype."""

from collections.abc import Callable, Iterator, Mapping
import pytest
import torch
from torch import Tensor
from kernels.check import errors

Op = Callable[..., Tensor]

def _within_budget(op: Op, reference: Op, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
    found = errors(op, reference, inputs, dtype, inputs)
    return all(error.mine <= error.allowed for error in found)

@pytest.fixture
def within_budget() -> Callable[[Op, Op, Mapping[str, Tensor], torch.dtype], bool]:
    """Whether (op, reference, inputs, dtype) keeps the pass rule."""
    return _within_budget

@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """Normal float64 values of a shape, the same in every run."""

    def normal(*shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(sum(shape) + seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return normal

@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN, so that what a kernel leaves unwritten is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fills
