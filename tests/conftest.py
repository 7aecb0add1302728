"""What all tests share: threads fitted to the machine, real data where there is some."""

import os
from collections.abc import Iterator
from pathlib import Path
import pytest
import torch

# Kernels run in Triton's CPU interpreter; triton reads this when something first imports it.
os.environ["TRITON_INTERPRET"] = "1"

MAX_THREADS = 1  # cost: threads that wait for each other on busy cores are several times slower

def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(MAX_THREADS)
    # of the interpreter's own code, once for every loop of a kernel
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0")

@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """What a test runs in this process may take other threads than the next test."""
    torch.set_num_threads(MAX_THREADS)
    yield

@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets that FTCORE_DATA names."""
    if "FTCORE_DATA" not in os.environ:
        pytest.skip("FTCORE_DATA is unset: no real data")
    return Path(os.environ["FTCORE_DATA"])
