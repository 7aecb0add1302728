"""What all tests share: threads fitted to the machine, real data where there is some."""

import os
from pathlib import Path

import pytest
import torch

MAX_THREADS = 4  # cost: the tensors of tests are too small to gain from more


def pytest_configure() -> None:
    torch.set_num_threads(min(MAX_THREADS, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets that FTCORE_DATA names."""
    if "FTCORE_DATA" not in os.environ:
        pytest.skip("FTCORE_DATA is unset: no real data")
    return Path(os.environ["FTCORE_DATA"])
