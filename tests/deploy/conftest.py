"""Runs of train.py on tiny models, as tests/commands has them."""

from collections.abc import Callable
from pathlib import Path
import pytest
from tests.commands.conftest import (  # noqa: F401
    _apart,
    bert,
    classify,
    files,
    hub,
    masked,
    masked_bert,
    pretrain,
    qwen3,
    run,
    scored,
    several,
    sft,
    tags,
)

@pytest.fixture
def trained(request: pytest.FixtureRequest, run: Callable) -> Callable[..., Path]:  # noqa: F811
    """(kind of run, further words) -> the folder of a finished run, in which much was learned."""

    def train(kind: str, *words: str) -> Path:
        run("train", *request.getfixturevalue(kind), "--loop.epochs", "6", *words)
        return Path("runs/run")

    return train
