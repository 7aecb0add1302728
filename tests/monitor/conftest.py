"""Runs of train.py on tiny models, as tests/commands has them."""

from tests.commands.conftest import _apart, bert, files, qwen3, run  # noqa: F401
